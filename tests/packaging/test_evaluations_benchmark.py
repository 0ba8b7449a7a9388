"""bench_evaluations over an untrained model of the digits: counts, agreements, files, resuming."""

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

import genrep_fast as gf
from genrep_fast.benchmarks import bench_evaluations
from genrep_fast.benchmarks.evaluations_setting import tree_of_digits
from genrep_fast.scoring.classifier.contest import Contest, Steps
from genrep_fast.training import TrainingConfig

IMAGES = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    folder = tmp_path_factory.mktemp("run")
    model = gf.GenRep.from_backbone(unet, 10, class_names=[str(n) for n in range(10)])
    # Outputs have to depend on the label.
    torch.nn.init.normal_(model.backbone.class_embedding.weight)
    pipeline = gf.GenRepPipeline(model=model, scheduler=DDPMScheduler(clip_sample=False))
    pipeline.save_pretrained(folder / "model")
    TrainingConfig(output=str(folder)).save()
    return folder


def measure(run, monkeypatch, *options, output=None):
    output = output or run / "evaluations"
    monkeypatch.setattr(bench_evaluations, "T_TEST_MOST", 22)
    command = ["bench_evaluations", str(run), "--images", str(IMAGES), "--calibration", "12"]
    command += ["--steps", "3", "--batch_size", "32", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    bench_evaluations.main()
    return json.loads((output / "evaluations.json").read_text())


@pytest.mark.slow
def test_what_it_measures_and_writes(run, monkeypatch, capsys):
    rules = ("--rules", "race", "stratified, 2 steps", "t-test*", "--rival_evaluations", "1600")
    results = measure(run, monkeypatch, *rules)
    assert list(results["rules"]) == ["race", "stratified, 2 steps", "t-test, from 20 steps"]
    stratified, t_test = (results["rules"][name] for name in list(results["rules"])[1:])
    assert stratified["evaluations"] == 20 and stratified["images"] == IMAGES
    # As many images as the evaluations are enough for, eight at least.
    assert t_test["images"] == 8 and 20 * 10 <= t_test["evaluations"] <= 22 * 10
    full = results["full"][0]
    caches = [np.load(run / f"evaluations/full/seed-{seed}.npz") for seed in (11, 12)]
    # The labels of a network that knows nothing give uniform weights.
    assert results["calibration"].endswith("power of the weights 0.0")
    winners = [cache["errors"].astype(float).mean(1).argmin(1) for cache in caches]
    assert full["ceiling"][0] == 100 * np.mean(winners[0] == winners[1])
    agreement = np.mean([stratified["prediction"] == winner for winner in winners])
    assert stratified["agreement"][0] == pytest.approx(100 * agreement)
    assert full["evaluations"] == 30 and results["gflops"] > 0
    errors = results["stated_error"]
    assert len(errors) == 4 and {found["races"] for found in errors.values()} == {2 * IMAGES}
    table = (run / "evaluations/evaluations.md").read_text()
    assert all(f"| {name} |" in table for name in results["rules"])
    assert (run / "evaluations/evaluations.png").read_bytes().startswith(b"\x89PNG")
    # Nothing that is there is measured again.
    monkeypatch.setattr(bench_evaluations, "measured_rule", None)
    monkeypatch.setattr(bench_evaluations.Setting, "new_classifier", without_calibrating())
    assert measure(run, monkeypatch, "--rules", "race")["rules"] == results["rules"]


@pytest.mark.slow
def test_what_precedes_a_race(run, monkeypatch, tmp_path):
    rules = ("--rules", "race*", "--no-stated_error", "--head", "--coarse")
    monkeypatch.setattr(bench_evaluations, "RULES", {"race": gf.Race()})
    results = measure(run, monkeypatch, *rules, output=tmp_path)
    assert list(results["rules"]) == ["race", "race after head", "race after coarse"]
    assert results["stated_error"] == {}
    head = results["rules"]["race after head"]
    assert head["gflops"] > head["evaluations"] * results["gflops"]
    assert 1 <= head["compared"] <= 10
    race = results["rules"]["race"]
    assert race["compared"] == 10
    assert race["gflops"] == pytest.approx(race["evaluations"] * results["gflops"])
    assert tree_of_digits(0, 2)[3] == list(range(30, 40))


def without_calibrating():
    new_classifier = bench_evaluations.Setting.new_classifier

    def refused(setting):
        classifier = new_classifier(setting)
        classifier.calibrate = None
        return classifier

    return refused


def test_the_t_test_drops_what_is_far_behind():
    steps = Steps(np.arange(20), np.ones(20), (20,))
    contest = Contest(0, 0, None, 3)
    generator = np.random.default_rng(0)
    shared = generator.normal(size=(20, 1))
    gaps = generator.normal(size=(20, 3)) * 0.1 + np.array([0, 1, 0.01])
    contest.add(shared + gaps, np.empty(0), steps)
    (leaving,) = bench_evaluations.TTest().leaving([contest], steps)
    assert leaving.tolist() == [False, True, False]
