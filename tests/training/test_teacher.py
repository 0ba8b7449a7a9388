"""The elbo teacher: its race, what it costs, what a checkpoint keeps of it, and what it refuses."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_runs import (
    NUM_CLASSES,
    InterruptedRun,
    change_json,
    half_metrics,
    interrupt_after,
    make_splits,
    resume,
    train,
    without_times,
)

import genrep_fast as gf
from genrep_fast.data import DataSplits, ImageDataset
from genrep_fast.reporting import html
from genrep_fast.training import Trainer, TrainingConfig, checkpoints
from genrep_fast.training.batches import seed_of
from genrep_fast.training.race import calibration_images
from genrep_fast.training.run import _teacher_facts, closing_table
from genrep_fast.training.teacher import Teacher, planned_evaluations

SHORT = {"teacher": "elbo", "diffusion_steps": 1, "perception_steps": 2, "joint_steps": 2}
FULL_BUDGET = NUM_CLASSES * 8


class ExactDenoiser:
    """The noise that is expected in x_t where each class is normal around the mean of its images.

    Takes the place of a teacher's network, and counts its rows.
    """

    def __init__(self, splits, std=0.3):
        images, labels = splits.train.images, splits.train.labels
        self.means = torch.stack([images[labels == label].mean(0) for label in labels.unique()])
        self.std = std
        self.rows = 0

    def __call__(self, x_t, timesteps, labels):
        self.rows += len(x_t)
        alpha_bar = DDPMScheduler(clip_sample=False, beta_schedule="linear").alphas_cumprod
        alpha_bar = alpha_bar[timesteps].view(-1, 1, 1, 1)
        clean = alpha_bar.sqrt() * self.means[labels]
        variance = alpha_bar * self.std**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (x_t - clean) / variance


@pytest.fixture
def exact(monkeypatch):
    denoiser = ExactDenoiser(make_splits())
    monkeypatch.setattr(Teacher, "_denoise", lambda _, *arguments: denoiser(*arguments))
    return denoiser


def same_output(_, x_t, timesteps, labels):
    return 0.5 * x_t


# What is distilled


def test_what_is_distilled_is_the_posterior_of_a_race(make_config, exact):
    trainer = train(make_config(**SHORT, teacher_steps=8, seed=3))
    splits, teacher = make_splits(), trainer.state.teacher
    classifier = gf.DiffusionClassifier(exact, trainer.scheduler, NUM_CLASSES)
    calibration = splits.calibration
    classifier.calibrate(
        calibration.images, calibration.labels, steps=8, seed=seed_of(3, -1), progress=False
    )
    x = splits.train.images[:8]
    logits = torch.randn(8, NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    for micro_batch in (0, 7):
        result = classifier(x, seed=seed_of(3, micro_batch), progress=False)
        divergence = torch.nn.functional.kl_div(
            logits.log_softmax(1), result.posterior, log_target=True, reduction="batchmean"
        )
        found = teacher.distillation_loss(logits, x, micro_batch)
        torch.testing.assert_close(found, divergence, rtol=1e-4, atol=1e-6)
        assert teacher.temperature == pytest.approx(result.temperature, rel=1e-4)
    assert teacher.accuracy == 1


def test_noise_differs_from_micro_batch_to_micro_batch(make_config, exact, monkeypatch):
    asked = []
    original = gf.DiffusionClassifier.__call__

    def call(self, images, **options):
        asked.append(options["seed"])
        return original(self, images, **options)

    monkeypatch.setattr(gf.DiffusionClassifier, "__call__", call)
    trainer = train(make_config(**SHORT, gradient_accumulation_steps=2, teacher_steps=8, seed=5))
    # After the trial on the calibration images; the first step was not taught.
    assert asked[1:] == [seed_of(5, micro_batch) for micro_batch in range(2, 10)]
    assert len(set(asked)) == 9 and seed_of(5, -1) not in asked
    race, x = trainer.state.teacher.race, make_splits().train.images[:8]
    first, again, other = (race.evidence(x, micro_batch) for micro_batch in (2, 2, 3))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_race_takes_fewer_evaluations_and_counts_them(make_config, exact):
    trainer = train(make_config(**SHORT, teacher_steps=8))
    teacher, config = trainer.state.teacher, trainer.config
    assert teacher.evaluations == exact.rows
    cost = teacher.race.cost
    assert (cost.calibration_images, cost.taught_images) == (9, 4 * 8)
    trial = exact.rows - 9 * FULL_BUDGET - cost.taught_evaluations
    assert 9 * NUM_CLASSES <= trial < 9 * FULL_BUDGET
    assert NUM_CLASSES * cost.taught_images <= cost.taught_evaluations
    assert cost.taught_evaluations < planned_evaluations(config, NUM_CLASSES) / 2
    history = [row["teacher_evaluations"] for row in trainer.state.history[1:]]
    assert history == sorted(set(history)) and history[-1] == exact.rows


def test_the_cost_of_a_taught_step_is_told_before_and_after(make_config, exact, capsys):
    trainer = train(make_config(**SHORT, teacher_steps=8))
    expected = trainer.state.teacher.race.classifier.estimate().evaluations
    assert (
        f"about {expected:.1f} evaluations an image in place of {FULL_BUDGET}, "
        "calibrated on 9 images"
    ) in re.sub(r"\s+", " ", capsys.readouterr().out)
    cost = trainer.state.teacher.race.cost
    cost.taught_images, cost.taught_evaluations, cost.calibration_seconds = 32, 160, 18.0
    trainer.state.teacher.in_steps.seconds = 6.0
    facts = _teacher_facts(trainer.state)
    assert facts["evaluations_an_image"] == 5
    assert facts["full_budget_evaluations_an_image"] == FULL_BUDGET
    assert facts["seconds_a_step"] == 1.5
    assert facts["full_budget_seconds_a_step"] == 2 * 8
    assert facts["calibration_images"] == 9
    terminal = Console(record=True, width=120)
    terminal.print(closing_table(trainer, None, 0.0))
    text = terminal.export_text()
    assert re.search(r"teacher, evaluations an image +│ 5.0 \(full budget: 24\)", text)
    assert re.search(r"time, teacher, a taught step +│ 1.5 s \(full budget: 16 s\)", text)
    page = html.render_report(half_metrics(facts), [])
    assert (
        "Its race took 5.0 network evaluations an image and 1.5 s of a step; "
        "the full budget takes 24 and 16 s."
    ) in re.sub(r"\s+", " ", page)
    assert '<td class="number">1.5</td>' in page


@pytest.mark.parametrize(
    ("options", "available", "number"),
    [
        ({}, 1000, 200),
        ({"diffusion_steps": 0, "perception_steps": 10, "joint_steps": 20}, 1000, 96),
        ({"batch_size": 1, "steps": 10}, 1000, 50),
        ({}, 200, None),
        ({"batch_size": 1, "steps": 10}, 9, None),
        ({"teacher": "bank"}, 1000, None),
        ({"teacher": "image_chain"}, 1000, None),
    ],
)
def test_calibration_images_are_as_many_as_the_run_is_long(options, available, number):
    chosen = calibration_images(TrainingConfig(**{"teacher": "elbo", **options}), available)
    if number is None:
        assert chosen is None
    else:
        assert len(chosen.unique()) == number and chosen.min() >= 0 and chosen.max() < available


# Every kind of run


def zero_snr(**options):
    return DDPMScheduler(rescale_betas_zero_snr=True, clip_sample=False, **options)


@pytest.mark.parametrize(
    ("options", "scheduler"),
    [
        ({"batch_size": 1}, None),
        ({"teacher_steps": 1}, None),
        ({"mixed_precision": "bf16", "gradient_accumulation_steps": 2}, None),
        ({"backbone": "learned dit"}, DDPMScheduler(variance_type="learned_range")),
        ({"backbone": "latent dit", "vae": "vae"}, None),
        ({}, DDPMScheduler(num_train_timesteps=50, prediction_type="v_prediction")),
        ({"teacher_steps": 50}, zero_snr(num_train_timesteps=50, prediction_type="v_prediction")),
        ({}, zero_snr(prediction_type="sample", timestep_spacing="trailing")),
    ],
)
def test_every_kind_of_run_is_taught(make_config, backbones, tmp_path, options, scheduler):
    folders = {name: options[name] for name in ("backbone", "vae") if name in options}
    options = options | {name: str(backbones / folder) for name, folder in folders.items()}
    if scheduler is not None:
        scheduler.save_pretrained(tmp_path / "scheduler")
        options["scheduler"] = str(tmp_path / "scheduler")
    splits = make_splits(3, 16) if "vae" in folders else make_splits()
    trainer = train(make_config(**SHORT | options), splits)
    teacher = trainer.state.teacher
    assert teacher.temperature > 0 and trainer.state.history[-1]["distillation"] >= 0
    assert (
        0 < teacher.race.cost.taught_evaluations <= planned_evaluations(trainer.config, NUM_CLASSES)
    )


@pytest.mark.parametrize("images", [2, 3])
def test_two_classes_and_few_calibration_images_are_enough(make_config, exact, images):
    whole = make_splits()
    exact.means = exact.means[:2]

    def two_classes(split, most=None):
        kept = (split.labels < 2).nonzero().flatten()[:most]
        return ImageDataset(split.images[kept], split.labels[kept])

    splits = DataSplits(
        two_classes(whole.train),
        two_classes(whole.calibration, images),
        two_classes(whole.test),
        ("ape", "bee"),
        whole.image_shape,
    )
    trainer = train(make_config(**SHORT, backbone=None), splits)
    assert trainer.state.teacher.race.cost.calibration_images == images
    assert trainer.state.teacher.accuracy == 1


def test_a_denoiser_without_labels_teaches_a_uniform_posterior(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(Teacher, "_denoise", same_output)
    config = make_config(**SHORT, checkpoint_every=1, output=str(tmp_path / "whole"))
    with pytest.warns(UserWarning, match="same output under every class, so its posterior is unif"):
        whole = train(config)
    teacher = whole.state.teacher
    assert teacher.evaluations == 9 * NUM_CLASSES * 4
    logits = torch.randn(8, NUM_CLASSES)
    expected = -logits.log_softmax(1).mean(1).mean() - torch.tensor(NUM_CLASSES).log()
    loss = teacher.distillation_loss(logits, make_splits().train.images[:8], 0)
    torch.testing.assert_close(loss, expected)
    output = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(InterruptedRun), pytest.warns(UserWarning, match="every class"):
            train(dataclasses.replace(config, output=str(output)))
    resumed = resume(output, config)
    pairs = zip(resumed.parameters, whole.parameters, strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# Checkpoints


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_killed_run_goes_on_to_the_bit(make_config, tmp_path, accumulation):
    config = make_config(
        **SHORT | {"joint_steps": 3},
        gradient_accumulation_steps=accumulation,
        checkpoint_every=1,
        output=str(tmp_path / "whole"),
    )
    whole = train(config)
    # Before the calibration, right after it, and in the last stage.
    for steps in (1, 2, 5):
        output = tmp_path / f"killed {steps}"
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, steps)
            with pytest.raises(InterruptedRun):
                train(dataclasses.replace(config, output=str(output)))
        resumed = resume(output, config)
        pairs = zip(resumed.parameters, whole.parameters, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert without_times(resumed.state.history) == without_times(whole.state.history)
        ours, theirs = (run.state.teacher for run in (resumed, whole))
        assert ours.evaluations == theirs.evaluations and ours.temperature == theirs.temperature
        for name in ("calibration_images", "taught_images", "taught_evaluations"):
            assert getattr(ours.race.cost, name) == getattr(theirs.race.cost, name)
        for name in (
            "model/model/diffusion_pytorch_model.safetensors",
            "checkpoints/step-0000006/calibration.safetensors",
        ):
            assert (output / name).read_bytes() == (Path(config.output) / name).read_bytes()


@pytest.fixture(scope="module")
def taught(backbones, tmp_path_factory):
    """The options of a finished run with an elbo teacher."""
    config = TrainingConfig(
        output=str(tmp_path_factory.mktemp("taught") / "run"),
        backbone=str(backbones / "dit"),
        diffusion_steps=0,
        perception_steps=1,
        joint_steps=0,
        batch_size=8,
        teacher="elbo",
        teacher_steps=4,
        evaluate=False,
    )
    train(config)
    return config


def seal(folder):
    """Make the manifest one of the files that are there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    present = {path.name: path for path in folder.iterdir() if path.name != "manifest.json"}
    manifest["files"] = {
        name: {"bytes": path.stat().st_size, "sha256": checkpoints._hash(path)}
        for name, path in present.items()
    }
    (folder / "manifest.json").write_bytes(checkpoints._canonical(manifest))


def without_costs(folder):
    state = json.loads((folder / "state.json").read_text())
    names = ("calibration_images", "calibration_seconds", "taught_images", "taught_evaluations")
    kept = {name: value for name, value in state["teacher"].items() if name not in names}
    change_json(folder / "state.json", teacher=kept)
    (folder / "calibration.safetensors").unlink()


def change_tensors(**changes):
    def change(folder):
        path = folder / "calibration.safetensors"
        tensors = load_file(path)
        for name, of in changes.items():
            tensors[name] = of(tensors[name]).contiguous()
        save_file(tensors, path)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_costs, "its elbo teacher has no calibration: it is of an earlier genrep_fast"),
        (
            lambda folder: (folder / "calibration.safetensors").unlink(),
            "calibration.safetensors is missing",
        ),
        (
            change_tensors(errors=lambda errors: errors * float("nan")),
            "calibration.safetensors: errors must be finite",
        ),
        (
            change_tensors(roots=lambda roots: roots[:, :, :2]),
            r"calibration.safetensors: roots must be torch.float32 \[9, 4, 3\], got",
        ),
        (
            change_tensors(timesteps=lambda timesteps: timesteps + 1),
            "calibration.safetensors: timesteps must be the scheduler's",
        ),
        (
            change_tensors(roots=torch.zeros_like),
            "calibration.safetensors: denoiser must depend on its labels",
        ),
        (
            change_tensors(**dict.fromkeys(("errors", "roots", "labels"), lambda part: part[:5])),
            "calibration.safetensors is of 5 images at 4 timesteps, its teacher's of 9 at 4",
        ),
    ],
)
def test_a_calibration_of_something_else_is_refused(taught, tmp_path, change, message):
    output = Path(shutil.copytree(taught.output, tmp_path / "run"))
    newest = output / "checkpoints" / "step-0000001"
    change(newest)
    seal(newest)
    with pytest.raises(ValueError, match=f"checkpoint {newest} is not one of this run: {message}"):
        resume(output, taught)


def test_a_damaged_calibration_is_named(taught, tmp_path):
    output = Path(shutil.copytree(taught.output, tmp_path / "run"))
    path = output / "checkpoints" / "step-0000001" / "calibration.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="calibration.safetensors is damaged"):
        resume(output, taught)


def test_a_calibration_of_another_teacher_is_refused(taught, copied, newest, finished):
    source = Path(taught.output) / "checkpoints" / "step-0000001" / "calibration.safetensors"
    shutil.copy(source, newest)
    seal(newest)
    with pytest.raises(ValueError, match="a teacher of the kind bank got a calibration"):
        resume(copied, finished[0])


# What is refused before anything is trained


def test_a_teacher_that_cannot_score_is_refused_at_once(make_config):
    whole = make_splits()
    one = ImageDataset(whole.calibration.images[:1], whole.calibration.labels[:1])
    with pytest.raises(ValueError, match="two calibration images at least, got 3 and 1"):
        Trainer(make_config(teacher="elbo"), dataclasses.replace(whole, calibration=one))
    Trainer(make_config(), dataclasses.replace(whole, calibration=one))
    with pytest.raises(ValueError, match="teacher_steps must be at most 1000"):
        Trainer(make_config(teacher="elbo", teacher_steps=1001), whole)
