"""Runs: resuming to the bit, what the history tells, teachers, backbones and stages."""

import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from rich.console import Console
from tiny_runs import (
    NUM_CLASSES,
    InterruptedRun,
    history_file,
    interrupt_after,
    make_splits,
    resume,
    train,
    without_times,
)

import genrep_fast as gf
from genrep_fast import GenRepPipeline, cli
from genrep_fast.evaluation import settings_for
from genrep_fast.reporting import terminal as progress
from genrep_fast.training import Trainer, TrainingConfig
from genrep_fast.training import run as run_module
from genrep_fast.training import trainer as trainer_module
from genrep_fast.training.run import closing_table
from genrep_fast.training.teacher import Teacher

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def assert_same_run(actual, expected):
    """Weights, averages, momentum network, optimizer, bank and history, all to the bit."""
    tensors = {
        "parameters": lambda trainer: trainer.parameters,
        "averages": lambda trainer: trainer.averages,
        "momentum": lambda trainer: list(trainer.state.momentum.parameters()),
        "bank": lambda trainer: [trainer.state.teacher.estimator.centers],
        "optimizer": lambda trainer: [
            value
            for state in trainer.optimizer.state_dict()["state"].values()
            for _, value in sorted(state.items())
        ],
    }
    for name, of in tensors.items():
        pairs = list(zip(of(actual), of(expected), strict=True))
        assert pairs and all(torch.equal(a, b) for a, b in pairs), name
    assert without_times(actual.state.history) == without_times(expected.state.history)
    assert actual.state.micro_batch == expected.state.micro_batch
    assert actual.state.teacher.evaluations == expected.state.teacher.evaluations
    assert actual.state.teacher.temperature == expected.state.teacher.temperature


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "accumulation", "interruptions"),
    [("dit", 1, (1, 3, 5, 7)), ("dit", 2, (7,)), ("unet", 1, (7,))],
)
def test_an_interrupted_run_goes_on_to_the_bit(
    make_config, backbones, tmp_path, backbone, accumulation, interruptions
):
    options = {"backbone": str(backbones / backbone), "gradient_accumulation_steps": accumulation}
    config = make_config(**options, output=str(tmp_path / "whole"))
    whole = train(config)
    assert [row["step"] for row in whole.state.history] == list(range(1, 10))
    # Before any checkpoint; at the end of a stage, where a checkpoint lies; and between checkpoints
    # of every stage.
    for steps in interruptions:
        output = tmp_path / f"interrupted {steps}"
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, steps)
            with pytest.raises(InterruptedRun):
                train(dataclasses.replace(config, output=str(output)))
        resumed = resume(output, config)
        assert_same_run(resumed, whole)
        for name in (
            "model/model/diffusion_pytorch_model.safetensors",
            "checkpoints/step-0000009/bank.safetensors",
        ):
            assert (output / name).read_bytes() == (Path(config.output) / name).read_bytes()
        rows = history_file(output)
        assert without_times(rows) == without_times(whole.state.history)


@pytest.mark.slow
@pytest.mark.skipif(
    not gf.info()["backends"]["cpu"]["available"], reason="the compiled library is not built"
)
def test_kernels_and_reference_train_alike(make_config, backbones, tmp_path, monkeypatch):
    """They round differently, by 1e-7; 20 steps make 1e-5 of it in the distillation loss, the worst
    of seven seeds, and 6e-6 elsewhere.
    """
    histories = []
    for backend in ("", "reference"):
        monkeypatch.setenv("GENREP_FAST_BACKEND", backend)  # empty: whatever is fastest
        stages = {"diffusion_steps": 8, "perception_steps": 4, "joint_steps": 8}
        trainer = train(
            make_config(
                backbone=str(backbones / "unet"), output=str(tmp_path / f"run {backend}"), **stages
            )
        )
        histories.append(without_times(trainer.state.history))
    for row, expected in zip(*histories, strict=True):
        assert row == pytest.approx(expected, rel=5e-5, abs=3e-5)
    assert histories[0] != histories[1], "one of them ran twice"


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_bit(backbones, tmp_path):
    for label in range(NUM_CLASSES):
        folder = tmp_path / "data" / str(label)
        folder.mkdir(parents=True)
        for index in range(12):
            Image.new("L", (8, 8), 60 * label + 5 * index).save(folder / f"{index}.png")

    def arguments(output, *flags):
        options = {
            "data": f"folder:{tmp_path / 'data'}",
            "image_size": 8,
            "backbone": backbones / "dit",
            "output": tmp_path / output,
            "diffusion_steps": 4,
            "perception_steps": 2,
            "joint_steps": 6,
            "batch_size": 8,
            "teacher_chains": 4,
            "teacher_steps": 4,
            "teacher_refresh": 5,
            "checkpoint_every": 2,
            "evaluate": "false",
        }
        return [
            "train",
            *(str(word) for name, value in options.items() for word in (f"--{name}", value)),
            *flags,
        ]

    target = random.randrange(1, 10)
    # A run that ends before it is seen to have come so far waits to be killed.
    program = "import sys; from genrep_fast.cli import main; main(sys.argv[1:]); sys.stdin.read()"
    command = [sys.executable, "-c", program, *arguments("killed")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": str(Path(cli.__file__).parents[1]),
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, text=True, **pipes)
    deadline = time.monotonic() + 600
    while not any(
        int(path.name[5:]) >= target
        for path in (tmp_path / "killed" / "checkpoints").glob("step-*")
    ):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    cli.main(arguments("killed", "--resume"))
    cli.main(arguments("whole"))
    for name in (
        "checkpoints/step-0000012/model.safetensors",
        "checkpoints/step-0000012/bank.safetensors",
        "model/model/diffusion_pytorch_model.safetensors",
    ):
        assert (tmp_path / "killed" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes(), f"killed after step {target}"
    histories = [without_times(history_file(tmp_path / run)) for run in ("killed", "whole")]
    assert histories[0] == histories[1]
    assert [row["step"] for row in histories[0]] == [4, 6, 10, 12]


@pytest.mark.parametrize("what", ["write_atomically", "save_checkpoint", "GenRepPipeline"])
def test_a_run_that_ends_around_its_last_checkpoint_is_completed(
    finished, tmp_path, monkeypatch, what
):
    config, expected = finished
    original = getattr(trainer_module, what)

    def fail(*arguments, **options):
        if Path(output / "checkpoints" / "step-0000003").is_dir():
            raise InterruptedRun
        return original(*arguments, **options)

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, what, fail)
        with pytest.raises(InterruptedRun):
            train(dataclasses.replace(config, output=str(output)))
    resumed = resume(output, config)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, expected, strict=True))
    for name in (
        "model/model/diffusion_pytorch_model.safetensors",
        "model/scheduler/scheduler_config.json",
    ):
        assert (output / name).read_bytes() == (Path(config.output) / name).read_bytes()
    assert len(history_file(output)) == 4


def test_history_tells_losses_statistics_and_costs(make_config, tmp_path):
    trainer = train(make_config(log_every=2))
    rows = history_file(tmp_path / "run")
    assert rows == trainer.state.history
    assert [(row["step"], row["stage"]) for row in rows] == [
        (2, 0),
        (3, 0),
        (4, 1),
        (5, 1),
        (6, 2),
        (8, 2),
        (9, 2),
    ]
    common = {"step", "stage", "learning_rate", "gradient_norm"}
    teacher = {"teacher_evaluations", "teacher_seconds"}
    generation, perception = (
        {"generation", "diffusion"},
        {"perception", "discrimination", "distillation"},
    )
    joint = {"representation_alignment", "variational_bound", "cosine", "alpha"}
    expected = {
        0: generation,
        1: perception | teacher,
        2: generation | perception | joint | teacher,
    }
    for row in rows:
        assert set(row) == common | expected[row["stage"]]
    # 3 classes, 4 chains, 4 steps; one chain in four is renewed after every second step from stage
    # 1 on
    assert [row["teacher_evaluations"] for row in rows[2:]] == [
        48 + 12 * n for n in (1, 1, 2, 3, 3)
    ]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-0000008",
        "step-0000009",
    ]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("teacher", ["bank", "image_chain", "elbo", "none"])
def test_every_teacher_and_precision_trains(make_config, teacher, precision):
    trainer = train(
        make_config(
            teacher=teacher,
            mixed_precision=precision,
            diffusion_steps=1,
            perception_steps=1,
            joint_steps=2,
        )
    )
    history = trainer.state.history
    assert [("distillation" in row) for row in history] == [False] + [teacher != "none"] * 3
    assert all(
        parameter.dtype == torch.float32 and parameter.isfinite().all()
        for parameter in trainer.parameters
    )
    if teacher == "none":
        assert trainer.state.teacher is None
        return
    assert history[-1]["teacher_evaluations"] > history[1]["teacher_evaluations"] > 0
    assert trainer.state.teacher.temperature > 0 and 0 <= trainer.state.teacher.accuracy <= 1


def test_the_teachers_share_of_a_step_is_told(make_config, monkeypatch):
    """The scores of 6 batches in the steps of the last stages; the calibration's one batch and 3
    refreshes are told apart.
    """
    clock = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(progress, "wall_clock", lambda device: clock.seconds)
    monkeypatch.setattr(trainer_module, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))

    def takes(seconds, owner, name):
        original = getattr(owner, name)

        def slow(*arguments, **options):
            clock.seconds += seconds
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, slow)

    takes(3, gf.ChainBank, "log_likelihood")
    takes(50, gf.ChainBank, "refresh")
    takes(7, Trainer, "_step")
    trainer = train(make_config())
    teacher = trainer.state.teacher
    assert (teacher.in_steps.seconds, teacher.apart.seconds) == (6 * 3, 3 * 50 + 3)
    assert trainer.state.seconds == {"diffusion": 3 * 7, "perception": 2 * 10, "joint": 4 * 10}
    assert trainer.state.teacher_percent == pytest.approx(30)
    terminal = Console(record=True, width=120)
    terminal.print(closing_table(trainer, None, 0.0))
    assert re.search("teacher +│ 30.0% of a training step", terminal.export_text())


def test_the_teachers_share_survives_a_checkpoint(finished, copied):
    config, _ = finished
    trainer = resume(copied, config)
    again = Teacher(config, trainer.model.frozen_copy(), trainer.scheduler)
    again.load_state_dict(trainer.state.teacher.state_dict())
    for name in ("in_steps", "apart"):
        assert getattr(again, name).seconds == getattr(trainer.state.teacher, name).seconds > 0
    assert 0 < trainer.state.teacher_percent < 100


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_stopwatch_adds_up_its_blocks(device):
    """On a GPU the seconds of the device, which are many more than those of the calls that ask for
    its work.
    """
    stopwatch, matrix = (
        progress.Stopwatch(torch.device(device)),
        torch.ones(8192, 8192, device=device) if device == "cuda" else None,
    )
    for _ in range(2):
        with stopwatch:
            if device == "cuda":
                matrix @ matrix
            else:
                time.sleep(0.01)
    first = stopwatch.seconds
    assert (0.02 if device == "cpu" else 0.001) < first == stopwatch.seconds
    stopwatch.seconds = 3.0
    with stopwatch:
        pass
    assert 3 <= stopwatch.seconds < 6


@pytest.mark.parametrize("teacher", ["image_chain", "elbo", "none"])
def test_other_teachers_go_on_to_the_bit_too(make_config, tmp_path, monkeypatch, teacher):
    config = make_config(teacher=teacher, output=str(tmp_path / "whole"))
    whole = train(config)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(InterruptedRun):
            train(dataclasses.replace(config, output=str(tmp_path / "interrupted")))
    resumed = resume(tmp_path / "interrupted", config)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))
    assert without_times(resumed.state.history) == without_times(whole.state.history)


@pytest.mark.parametrize(("backbone", "vae"), [("unet", None), ("latent dit", "vae"), (None, None)])
def test_other_backbones_train_and_are_loaded_again(
    make_config, backbones, tmp_path, backbone, vae
):
    folders = {
        name: str(backbones / value) if value else None
        for name, value in (("backbone", backbone), ("vae", vae))
    }
    splits = make_splits(3, 16) if vae else make_splits()
    trainer = train(
        make_config(**folders, diffusion_steps=1, perception_steps=1, joint_steps=1), splits
    )
    pipeline = GenRepPipeline.from_pretrained(tmp_path / "run" / "model")
    images = splits.test.images
    assert torch.equal(
        pipeline(images).logits, trainer.model.perceive(trainer.model.encode(images)).detach()
    )
    assert list(pipeline.model.config.class_names) == ["ape", "bee", "cat"]
    assert (pipeline.model.vae is None) == (vae is None)


def test_no_diffusion_stage_and_no_perception_stage(make_config):
    trainer = train(make_config(diffusion_steps=0, perception_steps=0, joint_steps=2))
    assert [row["stage"] for row in trainer.state.history] == [2, 2]
    assert (
        trainer.state.seconds["diffusion"]
        == trainer.state.seconds["perception"]
        == 0
        < trainer.state.seconds["joint"]
    )


def test_without_semantics_the_modulation_is_left_alone(make_config):
    trainer = train(make_config(semantic=False))
    assert not any(
        {"representation_alignment", "variational_bound"} & set(row)
        for row in trainer.state.history
    )
    assert "cosine" in trainer.state.history[-1]
    assert not any(parameter.any() for parameter in trainer.model.mean_modulation.parameters())
    assert not any(
        parameter.any() for parameter in trainer.model.log_std_modulation[-1].parameters()
    )


@pytest.mark.parametrize(("rate", "given"), [(1.0, True), (0.0, False)])
def test_semantic_rate_says_whose_features_modulate(make_config, monkeypatch, rate, given):
    trainer, seen = Trainer(make_config(semantic_rate=rate, teacher="none"), make_splits()), []
    original = trainer.model.forward
    monkeypatch.setattr(
        trainer.model,
        "forward",
        lambda *a, **k: (
            seen.append((k["modulate"], k["semantic"] is not None)) or original(*a, **k)
        ),
    )
    trainer.run()
    assert seen == [(False, False)] * 3 + [(True, given)] * 4


def test_only_the_labelled_images_teach_the_head(make_config):
    trainer = Trainer(make_config(labelled_per_class=2), make_splits())
    # One epoch: 24 images.
    batches = [batch for batch, _ in zip(trainer._loader(), range(3), strict=False)]
    labels, labelled = (torch.cat([batch[position] for batch in batches]) for position in (1, 2))
    assert labels[labelled].bincount().tolist() == [2] * NUM_CLASSES and len(labelled) == 24
    train(make_config(labelled_per_class=2))


def test_batches_are_whole_epochs_in_an_order_of_their_own(make_config):
    trainer = Trainer(make_config(batch_size=7), make_splits())
    images = [batch[0] for batch in trainer._loader()]
    assert len(images) == 9 and all(len(batch) == 7 for batch in images)
    epochs = [torch.cat(images[start : start + 3]).flatten(1) for start in (0, 3, 6)]
    assert all(len(epoch.unique(dim=0)) == 21 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_the_scheduler_of_a_pretrained_backbone_is_used(make_config, tmp_path):
    DDPMScheduler(num_train_timesteps=100, prediction_type="v_prediction").save_pretrained(
        tmp_path / "scheduler"
    )
    train(
        make_config(
            scheduler=str(tmp_path / "scheduler"),
            diffusion_steps=1,
            perception_steps=1,
            joint_steps=1,
        )
    )
    config = GenRepPipeline.from_pretrained(tmp_path / "run" / "model").scheduler.config
    assert (config.num_train_timesteps, config.prediction_type, config.clip_sample) == (
        100,
        "v_prediction",
        False,
    )


@pytest.mark.parametrize("teacher", ["bank", "image_chain", "elbo"])
def test_every_teacher_trains_with_a_learned_variance(make_config, backbones, tmp_path, teacher):
    DDPMScheduler(variance_type="learned_range").save_pretrained(tmp_path / "scheduler")
    folders = {"backbone": str(backbones / "learned dit"), "scheduler": str(tmp_path / "scheduler")}
    trainer = train(
        make_config(
            **folders, teacher=teacher, diffusion_steps=1, perception_steps=1, joint_steps=1
        )
    )
    assert trainer.state.history[-1]["distillation"] >= 0
    assert trainer.scheduler.config.variance_type == "learned_range"


@pytest.mark.parametrize(
    ("teacher", "seconds", "advice"),
    [
        ("bank", 0.1, "fewer teacher_chains or teacher_steps, teacher_refresh 0, or teacher none"),
        ("elbo", 0.1, "fewer teacher_steps, teacher bank or teacher none"),
        ("image_chain", 0.1, "fewer teacher_steps, teacher bank or teacher none"),
        # What takes seconds is not worth a word.
        ("bank", 1e-3, None),
        ("none", 0.1, None),
    ],
)
def test_the_plan_says_what_makes_an_expensive_teacher_cheaper(
    monkeypatch, teacher, seconds, advice
):
    sizes = {"train": range(20_000), "calibration": range(1_000), "test": range(1_000)}
    trainer = SimpleNamespace(
        config=TrainingConfig(data="digit-strings:3", teacher=teacher),
        splits=SimpleNamespace(num_classes=1000, **sizes),
    )
    monkeypatch.setattr(run_module, "_seconds_per_pass", lambda trainer: seconds)
    table, remarks = run_module._budget(trainer, settings_for(1000))
    assert (table.columns[0]._cells[-1], len(table.rows)) == ("evaluation", 4 + (teacher != "none"))
    evaluation = remarks.pop()
    assert evaluation == (
        "evaluation: posterior of 100 of 1,000 test images in 8 steps × 1000 classes, "
        "5 samples a class: 2,250,000 network evaluations; more with genrep evaluate"
    )
    assert len(remarks) == (advice is not None)
    if advice is not None:
        assert remarks[0].endswith(f"less with {advice}")
