"""Training: resuming to the bit, gradients, averages, losses, teachers, and what happens when
something breaks.
"""

import dataclasses
import json
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
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler
from PIL import Image
from rich.console import Console
from torch.distributions import Normal, kl_divergence

import genrep_fast as gf
from genrep_fast import GenRepPipeline, cli
from genrep_fast.data import DataSplits, ImageDataset
from genrep_fast.reporting import terminal as progress
from genrep_fast.training import Trainer, TrainingConfig, losses
from genrep_fast.training import trainer as trainer_module
from genrep_fast.training.losses import GenerationLoss, perception_loss, stratified_timesteps
from genrep_fast.training.run import closing_table
from genrep_fast.training.teacher import Teacher

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NUM_CLASSES = 3
TIMES = ("teacher_seconds",)


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    """Accelerate keeps one state a process, whatever precision and accumulation the next run asks
    for.
    """
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def backbones(tiny_backbone, tiny_vae, tmp_path_factory):
    """Folders of backbones and of a VAE, as diffusers writes them."""
    root = tmp_path_factory.mktemp("backbones")
    tiny_backbone("unet").save_pretrained(root / "unet")
    tiny_backbone("dit").save_pretrained(root / "dit")
    tiny_backbone("dit", out_channels=2).save_pretrained(root / "learned dit")
    tiny_backbone("dit", channels=4, out_channels=8).save_pretrained(root / "latent dit")
    tiny_vae().save_pretrained(root / "vae")
    return root


def make_splits(channels=1, side=8):
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(NUM_CLASSES, channels, side, side, generator=generator) * 1.6 - 0.8

    def split(count):
        labels = torch.arange(count) % NUM_CLASSES
        noise = 0.1 * torch.randn(count, channels, side, side, generator=generator)
        return ImageDataset((patterns[labels] + noise).clamp(-1, 1), labels)

    return DataSplits(split(24), split(9), split(9), ("ape", "bee", "cat"), (channels, side, side))


@pytest.fixture
def make_config(backbones, tmp_path):
    def make(**options):
        defaults = {
            "output": str(tmp_path / "run"),
            "backbone": str(backbones / "dit"),  # a fifth of the UNet's time
            "diffusion_steps": 3,
            "perception_steps": 2,
            "joint_steps": 4,
            "batch_size": 8,
            "teacher_chains": 4,
            "teacher_steps": 4,
            "teacher_refresh": 2,
            "checkpoint_every": 2,
            "log_every": 1,
            "evaluate": False,
        }
        return TrainingConfig(**{**defaults, **options})

    return make


def train(config, splits=None):
    trainer = Trainer(config, splits or make_splits())
    trainer.run()
    return trainer


def resume(config, output):
    return train(dataclasses.replace(config, resume=True, output=str(output)))


def history_file(output):
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


def without_times(history):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in history]


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


class InterruptedRun(Exception):
    """Stands for whatever ends a process."""


def interrupt_after(monkeypatch, steps):
    original, taken = Trainer._step, []

    def step(self, *arguments):
        if len(taken) == steps:
            raise InterruptedRun
        taken.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", step)


@pytest.mark.parametrize(
    ("backbone", "accumulation", "interruptions"),
    [("dit", 1, (1, 3, 4, 5, 7)), ("dit", 2, (4, 7)), ("unet", 1, (7,))],
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
        resumed = resume(config, output)
        assert_same_run(resumed, whole)
        for name in (
            "model/model/diffusion_pytorch_model.safetensors",
            "checkpoints/step-0000009/bank.safetensors",
        ):
            assert (output / name).read_bytes() == (Path(config.output) / name).read_bytes()
        rows = history_file(output)
        assert without_times(rows) == without_times(whole.state.history)


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
            "diffusion_steps": 8,
            "perception_steps": 4,
            "joint_steps": 12,
            "batch_size": 8,
            "teacher_chains": 4,
            "teacher_steps": 4,
            "teacher_refresh": 5,
            "checkpoint_every": 3,
            "evaluate": "false",
        }
        return [
            "train",
            *(str(word) for name, value in options.items() for word in (f"--{name}", value)),
            *flags,
        ]

    target = random.randrange(1, 17)
    command = [
        sys.executable,
        "-c",
        "import sys; from genrep_fast.cli import main; main(sys.argv[1:])",
        *arguments("killed"),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": str(Path(cli.__file__).parents[1]),
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
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
        "checkpoints/step-0000024/model.safetensors",
        "checkpoints/step-0000024/bank.safetensors",
        "model/model/diffusion_pytorch_model.safetensors",
    ):
        assert (tmp_path / "killed" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes(), f"killed after step {target}"
    histories = [without_times(history_file(tmp_path / run)) for run in ("killed", "whole")]
    assert histories[0] == histories[1] and [row["step"] for row in histories[0]] == [
        8,
        10,
        12,
        20,
        24,
    ]


@pytest.mark.parametrize("what", ["write_atomically", "save_checkpoint", "GenRepPipeline"])
def test_a_run_that_ends_around_its_last_checkpoint_is_completed(
    finished_run, tmp_path, monkeypatch, what
):
    config, expected = finished_run
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
    resumed = resume(config, output)
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


def test_the_teachers_share_survives_a_checkpoint(finished_run):
    config, _ = finished_run
    trainer = resume(config, config.output)
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
    assert 3 <= stopwatch.seconds < 3.5


@pytest.mark.parametrize("teacher", ["image_chain", "elbo", "none"])
def test_other_teachers_go_on_to_the_bit_too(make_config, tmp_path, monkeypatch, teacher):
    config = make_config(teacher=teacher, output=str(tmp_path / "whole"))
    whole = train(config)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(InterruptedRun):
            train(dataclasses.replace(config, output=str(tmp_path / "interrupted")))
    resumed = resume(config, tmp_path / "interrupted")
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


def applied_gradients(trainer):
    """Gradients that the optimizer applied, one list a step: its first moment is the gradient
    itself where beta1 is 0.
    """
    optimizer, seen = trainer.optimizer.optimizer, []
    for group in optimizer.param_groups:
        group["betas"] = (0.0, 0.999)

    def record(*_):
        seen.append(
            [
                optimizer.state[p]["exp_avg"].clone() if p in optimizer.state else None
                for p in trainer.parameters
            ]
        )

    optimizer.register_step_post_hook(record)
    return seen


def total_norm(gradients):
    return (
        torch.cat([gradient.double().flatten() for gradient in gradients if gradient is not None])
        .norm()
        .item()
    )


def test_accumulated_micro_batches_equal_one_batch(make_config, tmp_path):
    """With a loss that draws nothing: the real one stratifies its timesteps over a micro-batch, so
    its numbers differ by chance.
    """

    def fixed_loss(model, x, labels, **_):
        loss = F.mse_loss(model(x, 100, labels, modulate=False).sample, x)
        return loss, {"diffusion": loss}

    found = {}
    for accumulation in (1, 4):
        options = {
            "batch_size": 8 // accumulation,
            "gradient_accumulation_steps": accumulation,
            "output": str(tmp_path / str(accumulation)),
        }
        trainer = Trainer(
            make_config(
                diffusion_steps=2, perception_steps=0, joint_steps=0, max_grad_norm=0, **options
            ),
            make_splits(),
        )
        trainer.generation_loss = fixed_loss
        found[accumulation] = applied_gradients(trainer)
        trainer.run()
        assert len(found[accumulation]) == 2 and trainer.state.micro_batch == 2 * accumulation
    for whole, parts in zip(found[1][0], found[4][0], strict=True):
        assert (whole is None) == (parts is None)
        if whole is not None:
            torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(make_config, tmp_path):
    for limit in (1e-3, 0.0):
        trainer = Trainer(
            make_config(max_grad_norm=limit, output=str(tmp_path / str(limit))), make_splits()
        )
        seen = applied_gradients(trainer)
        trainer.run()
        norms = [total_norm(gradients) for gradients in seen]
        assert len(norms) == 9
        if limit:
            assert norms == pytest.approx([limit] * 9, rel=2e-3)  # the divisor is the norm + 1e-6
            assert min(row["gradient_norm"] for row in trainer.state.history) > 10 * limit
        else:
            assert min(norms) > 1e-2 and not any(
                "gradient_norm" in row for row in trainer.state.history
            )


@pytest.mark.parametrize("align", [True, False])
def test_joint_gradients_are_aligned_on_the_attention_blocks(make_config, backbones, align):
    """Against the decomposition into a parallel and an orthogonal part, by block, in float64."""
    options = {"backbone": str(backbones / "unet"), "diffusion_steps": 0, "joint_steps": 2}
    trainer, seen = Trainer(make_config(**options, max_grad_norm=0, align=align), make_splits()), []
    applied = applied_gradients(trainer)

    def record(*_):
        collected = [
            [None if g is None else g.double() for g in gradients]
            for gradients in trainer.aligner._collected.gradients
        ]
        seen.append(dict(zip(trainer.aligner.names, collected, strict=True)))

    trainer.optimizer.optimizer.register_step_pre_hook(record)
    trainer.run()
    parts, written = (
        seen[-1],
        [None if gradient is None else gradient.double() for gradient in applied[-1]],
    )
    blocks, shared = {}, 0
    for index, name in enumerate(trainer.names):
        p, g = parts["perception"][index], parts["generation"][index]
        if align and ".attentions." in name and p is not None and g is not None:
            blocks.setdefault(
                name.split(".attentions.")[0] + name.split(".attentions.")[1][0], []
            ).append((p, g, written[index]))
        elif p is None and g is None:
            assert written[index] is None
        else:
            expected = (0.7 * p if p is not None else 0) + (0.3 * g if g is not None else 0)
            torch.testing.assert_close(written[index], expected, rtol=1e-5, atol=1e-8)
            shared += p is not None and g is not None
    assert shared > 10
    cosines = []
    for tensors in blocks.values():
        p, g, actual = (
            torch.cat([t[position].flatten() for t in tensors]) for position in range(3)
        )
        cosines.append(p @ g / (p.norm() * g.norm()))
        damping = ((cosines[-1] + 1) / 2) ** 2
        p_parallel, g_parallel = (p @ g) / (g @ g) * g, (p @ g) / (p @ p) * p
        expected = 0.7 * (p - p_parallel + damping * p_parallel) + 0.3 * (
            g - g_parallel + damping * g_parallel
        )
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)
    row = trainer.state.history[-1]
    assert len(cosines) == (4 if align else 0) and {"cosine", "alpha"} & set(row) == (
        {"cosine", "alpha"} if align else set()
    )
    if align:
        cosines = torch.stack(cosines)
        assert row["cosine"] == pytest.approx(cosines.mean().item(), abs=1e-5)
        assert row["alpha"] == pytest.approx((((cosines + 1) / 2) ** 2).mean().item(), abs=1e-5)


def test_the_only_loss_of_an_early_stage_counts_whole(make_config):
    trainer, seen = Trainer(make_config(joint_steps=0, max_grad_norm=0), make_splits()), []
    applied = applied_gradients(trainer)

    def record(*_):
        (gradients,) = [
            gradients
            for gradients in trainer.aligner._collected.gradients
            if any(gradient is not None for gradient in gradients)
        ]
        seen.append([None if gradient is None else gradient.clone() for gradient in gradients])

    trainer.optimizer.optimizer.register_step_pre_hook(record)
    trainer.run()
    assert len(applied) == len(seen) == 5
    for written, collected in zip(applied, seen, strict=True):
        assert [gradient is None for gradient in written] == [
            gradient is None for gradient in collected
        ]
        pairs = [(w, c) for w, c in zip(written, collected, strict=True) if w is not None]
        assert len(pairs) > 5
        for w, c in pairs:
            torch.testing.assert_close(w, c, rtol=1e-6, atol=0)


def change_loss(trainer, monkeypatch, factor, after=0):
    """Multiply the generation loss by `factor` after so many calls."""
    original, calls = trainer.generation_loss, []

    def generation_loss(*arguments, **options):
        calls.append(1)
        loss, parts = original(*arguments, **options)
        return (loss * factor, parts) if len(calls) > after else (loss, parts)

    monkeypatch.setattr(trainer, "generation_loss", generation_loss)


def scaled(scale):
    """An accelerator with the GradScaler of fp16, which needs a GPU; the scaler does not."""
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


def test_scaled_losses_train_like_unscaled_ones(make_config, tmp_path):
    runs = []
    for name, accelerator in (("plain", None), ("scaled", scaled(2.0**16))):
        runs.append(Trainer(make_config(output=str(tmp_path / name)), make_splits(), accelerator))
        runs[-1].run()
    for plain, row in zip(*(without_times(run.state.history) for run in runs), strict=True):
        assert row == pytest.approx(plain, rel=1e-5)


def test_a_step_whose_gradients_overflow_is_skipped(make_config, monkeypatch):
    """A thousand times the loss, scaled by 2^127, overflows until the scaler has halved its scale
    often enough.
    """
    trainer, seen = (
        Trainer(
            make_config(diffusion_steps=20, perception_steps=0, joint_steps=0),
            make_splits(),
            scaled(2.0**127),
        ),
        [],
    )
    change_loss(trainer, monkeypatch, 1e3)
    optimizer = trainer.optimizer.optimizer
    kept = [parameter.detach().clone() for parameter in trainer.parameters]

    def record(*_):
        moved = [
            not torch.equal(p, k)
            for values in (trainer.parameters, trainer.averages)
            for p, k in zip(values, kept, strict=True)
        ]
        seen.append((any(moved), max(state["step"].item() for state in optimizer.state.values())))

    optimizer.register_step_post_hook(record)
    trainer.run()
    skipped = [moved for moved, _ in seen].index(True)
    assert 5 < skipped < 15 and all(steps == 0 for _, steps in seen[:skipped])
    assert [steps for _, steps in seen[skipped:]] == list(range(1, 21 - skipped))
    assert all(parameter.isfinite().all() for parameter in (*trainer.parameters, *trainer.averages))


def test_averages_are_saved_and_start_anew_in_every_stage(make_config, tmp_path, monkeypatch):
    """The average's decay is diffusers': min(decay, (1 + n) / (10 + n)) after n steps, 0 for the
    first.
    """
    followed, momentum = {}, 0.9
    original = Trainer._step

    def step(self, stage, batches):
        if stage not in followed:
            followed[stage] = {
                "semantic": [p.detach().double() for p in self.parameters],
                "count": 0,
            }
            if stage > 0:  # a stage starts from the averages of the one before
                for p, average in zip(self.parameters, followed[stage - 1]["average"], strict=True):
                    torch.testing.assert_close(p.double(), average, rtol=1e-5, atol=1e-6)
        metrics = original(self, stage, batches)
        found, now = followed[stage], [p.detach().double() for p in self.parameters]
        n = found["count"]
        decay = 0.0 if n == 0 else min(0.995, (1 + n) / (10 + n))
        found["average"] = (
            now
            if n == 0
            else [decay * a + (1 - decay) * p for a, p in zip(found["average"], now, strict=True)]
        )
        found["semantic"] = [
            momentum * s + (1 - momentum) * p for s, p in zip(found["semantic"], now, strict=True)
        ]
        found["count"], found["now"] = n + 1, now
        return metrics

    monkeypatch.setattr(Trainer, "_step", step)
    trainer = train(
        make_config(momentum=momentum, learning_rate=0.01, perception_learning_rate=0.01)
    )
    saved = GenRepPipeline.from_pretrained(tmp_path / "run" / "model").model
    expected = {"average": saved, "semantic": trainer.state.momentum}
    for name, network in expected.items():
        for parameter, value in zip(trainer.names, followed[2][name], strict=True):
            torch.testing.assert_close(
                network.get_parameter(parameter).double(), value, rtol=1e-5, atol=1e-6
            )
    differences = [
        (saved.get_parameter(name).double() - value).abs().max()
        for name, value in zip(trainer.names, followed[2]["now"], strict=True)
    ]
    assert max(differences) > 1e-4, "the last weights themselves would pass too"


def test_the_null_class_of_a_new_backbone_is_the_mean_of_the_others(make_config):
    trainer = train(
        make_config(
            backbone=None, diffusion_steps=2, perception_steps=0, joint_steps=0, teacher="none"
        )
    )
    table = trainer.model.backbone.class_embedding.weight
    assert table[:-1].abs().max() > 0
    torch.testing.assert_close(table[-1], table[:-1].mean(0))
    trainer._enter_stage(1)
    assert all(
        torch.equal(a, p) for a, p in zip(trainer.averages, trainer.parameters, strict=True)
    ), "an average without the new class"


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_a_number_ends_the_run_and_keeps_its_checkpoints(
    make_config, tmp_path, monkeypatch, log_every
):
    options = {
        "log_every": log_every,
        "diffusion_steps": 9,
        "perception_steps": 0,
        "joint_steps": 0,
    }
    whole = train(make_config(**options, output=str(tmp_path / "whole")))
    trainer = Trainer(make_config(**options), make_splits())
    change_loss(trainer, monkeypatch, torch.nan, after=4)
    with pytest.raises(FloatingPointError, match=rf"step [56].* kept in {tmp_path / 'run'}"):
        trainer.run()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-0000002",
        "step-0000004",
    ]
    resumed = resume(whole.config, tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))
    assert resumed.state.history == whole.state.history


@pytest.fixture(scope="module")
def finished_run(backbones, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "run"
    options = {
        "diffusion_steps": 1,
        "perception_steps": 1,
        "joint_steps": 2,
        "batch_size": 8,
        "teacher_chains": 2,
        "teacher_steps": 4,
    }
    config = TrainingConfig(
        output=str(output),
        backbone=str(backbones / "dit"),
        checkpoint_every=1,
        log_every=1,
        evaluate=False,
        **options,
    )
    trainer = train(config)
    return config, [parameter.detach().clone() for parameter in trainer.parameters]


def test_a_used_output_folder_is_refused(finished_run):
    config, _ = finished_run
    before = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")}
    with pytest.raises(ValueError, match=r"output: .* holds a run already; pass --resume"):
        Trainer(config, make_splits())
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")} == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", 5),
        ("batch_size", 9),
        ("gradient_weights", (0.5, 0.5)),
        ("teacher", "elbo"),
        ("vae", "elsewhere"),
    ],
)
def test_resuming_with_another_option_names_it(finished_run, option, value):
    config, _ = finished_run
    assert dataclasses.replace(config, resume=True).resumed() == dataclasses.replace(
        config, resume=True
    )
    with pytest.raises(ValueError, match=rf"{option} is .* now, but .*config.json says"):
        dataclasses.replace(config, resume=True, **{option: value}).resumed()


def test_resuming_takes_the_options_that_were_not_given_from_the_run(finished_run):
    config, _ = finished_run
    resumed = TrainingConfig(output=config.output, resume=True).resumed()
    assert resumed == dataclasses.replace(config, resume=True)
    fresh = TrainingConfig(output=config.output + " elsewhere", resume=True)
    assert fresh.resumed() == fresh


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"joint_steps": -1}, "joint_steps must not be negative, got -1"),
        ({"momentum": 1.5}, "momentum must be between 0 and 1, got 1.5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"labelled_per_class": 0}, "labelled_per_class must be at least 1, got 0"),
        ({"diffusion_steps": 0, "perception_steps": 0, "joint_steps": 0}, "must not all be 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)


def test_steps_are_shared_out_in_the_ratio_of_the_stages():
    config = TrainingConfig(steps=41, diffusion_steps=200, perception_steps=50, joint_steps=150)
    assert config.stage_steps == (20, 5, 16) and config.scale == pytest.approx(41 / 400)
    assert TrainingConfig(steps=10**6).scale == 1


@pytest.mark.parametrize(
    ("options", "splits", "message"),
    [
        (
            {"backbone": "unet"},
            (1, 10),
            r"data: images \[1, 10, 10\] give inputs \[1, 10, 10\], "
            r"the backbone wants \[1, 8, 8\]; see image_size",
        ),
        ({"backbone": "unet"}, (3, 8), r"the backbone wants \[1, 8, 8\]"),
        ({"backbone": None}, (1, 9), "image_size must be even, got 9 × 9"),
        (
            {"backbone": None, "vae": "vae"},
            (1, 8),
            "vae: a latent model needs a backbone, got none",
        ),
    ],
)
def test_data_that_does_not_fit_the_backbone_is_refused(
    make_config, backbones, options, splits, message
):
    folders = {name: value and str(backbones / value) for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        Trainer(make_config(**folders), make_splits(*splits))


def test_missing_folders_are_named(make_config, tmp_path):
    for name in ("backbone", "scheduler"):
        with pytest.raises(FileNotFoundError, match=f"{name}: .*missing"):
            Trainer(make_config(**{name: str(tmp_path / "missing")}), make_splits())


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


def test_more_than_one_process_is_refused(make_config):
    with pytest.raises(RuntimeError, match="training runs in one process, got 2"):
        Trainer(make_config(), make_splits(), accelerator=SimpleNamespace(num_processes=2))


@pytest.mark.parametrize("batch", [1, 7, 128])
def test_timesteps_are_stratified(batch):
    for _ in range(20):
        timesteps = stratified_timesteps(batch, 1000, torch.device("cpu"))
        assert timesteps.dtype == torch.int64
        assert ((timesteps + 1) * batch > torch.arange(batch) * 1000).all() and (
            timesteps * batch < (torch.arange(batch) + 1) * 1000
        ).all()


@pytest.mark.parametrize("labelled", [[True, False, True, True, False], [False] * 5])
def test_perception_loss_equals_an_explicit_sum(labelled):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (
        torch.randn(5, 4, generator=generator),
        30 * torch.randn(5, 4, generator=generator),
    )
    labels = torch.tensor([3, 1, 0, 2, 2])
    distillation = gf.distillation_loss(logits, teacher, temperature=20.0)
    loss, parts = perception_loss(
        logits, labels, torch.tensor(labelled), distillation, distillation_weight=0.6
    )
    student = logits.double().log_softmax(1)
    target = (teacher.double() / 20).softmax(1)
    losses_of_labelled = [-student[i, labels[i]].item() for i in range(5) if labelled[i]]
    discrimination = sum(losses_of_labelled) / max(len(losses_of_labelled), 1)
    distillation = (target * (target.log() - student)).sum().item() / 5
    assert parts["discrimination"].item() == pytest.approx(discrimination, abs=1e-6)
    assert parts["distillation"].item() == pytest.approx(distillation, abs=1e-6)
    assert loss.item() == pytest.approx(discrimination + 0.6 * distillation, abs=1e-6)


TIMESTEPS = torch.tensor([0, 1, 2, 250, 700, 998, 999])


def variational_bound(
    tiny_model, monkeypatch, learned, prediction_type, own=False, variance_type="fixed_small"
):
    """The loss's own value with known timesteps and noise, and all that it was made of."""
    model = tiny_model("unet", active=True, **({"out_channels": 2} if learned else {}))
    torch.nn.init.constant_(model.log_std_modulation[-1].bias, -0.4)
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(7, 1, 8, 8, generator=generator) * 2 - 1
    labels = torch.arange(7) % NUM_CLASSES
    semantic = model.frozen_copy().semantic_features(x)
    scheduler = DDPMScheduler(
        clip_sample=False, prediction_type=prediction_type, variance_type=variance_type
    )
    loss = GenerationLoss(scheduler, alignment_weight=0.0, variance_weight=1.0)
    monkeypatch.setattr(losses, "stratified_timesteps", lambda *_: TIMESTEPS)
    torch.manual_seed(6)
    _, parts = loss(model, x, labels, semantic=semantic, own=own)
    torch.manual_seed(6)
    x_t = loss.scheduler.add_noise(x, torch.randn_like(x), TIMESTEPS)
    return (
        model,
        x,
        x_t,
        model(x_t, TIMESTEPS, labels, semantic=semantic),
        parts["variational_bound"],
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_variational_bound_is_the_divergence_of_the_reverse_steps(
    tiny_model, monkeypatch, variance, prediction_type
):
    """Against torch's KL of the two normal distributions, whose means and variances are diffusers'
    own, at every kind of timestep.
    """
    fixed = "fixed_large" if variance == "fixed_large" else "fixed_small"
    _, x, x_t, output, actual = variational_bound(
        tiny_model, monkeypatch, variance == "learned", prediction_type, variance_type=fixed
    )
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: torch.zeros(())
    )
    denoised = DDPMScheduler(clip_sample=False, prediction_type=prediction_type)
    exact = DDPMScheduler(clip_sample=False, prediction_type="sample")
    total = 0.0
    for i, timestep in enumerate(TIMESTEPS.tolist()):
        true_mean = exact.step(x[i].double(), timestep, x_t[i].double()).prev_sample
        mean = denoised.step(
            output.sample[i, :1].detach().double(), timestep, x_t[i].double()
        ).prev_sample
        small = exact._get_variance(max(timestep, 1)).double().sqrt()  # that of t = 0 is zero
        log_std = small.log() + output.log_std_shift[i].detach().double()
        large = exact._get_variance(timestep, variance_type="fixed_large").double().sqrt()
        if variance == "learned":
            log_std = (
                log_std + (output.sample[i, 1:].detach().double() + 1) / 2 * (large / small).log()
            )
        elif variance == "fixed_large":
            log_std = log_std + (large / small).log()
        divergence = kl_divergence(Normal(true_mean, small), Normal(mean, log_std.exp()))
        total += divergence.mean().item() / len(TIMESTEPS)
    assert actual.item() == pytest.approx(total, rel=2e-4)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_variational_bound_trains_the_variance_alone(tiny_model, monkeypatch, learned, own):
    model, *_, bound = variational_bound(tiny_model, monkeypatch, learned, "epsilon", own)
    bound.backward()
    assert all(parameter.grad.any() for parameter in model.log_std_modulation.parameters())
    if learned:
        of_mean, of_variance = (model.backbone.conv_out.weight.grad[channel] for channel in (0, 1))
        assert not of_mean.any() and of_variance.any()
        mean_rows, variance_rows = model.mean_modulation.weight.grad.chunk(2)
        assert not mean_rows.any() and variance_rows.any()
    else:
        others = [*model.backbone.parameters(), *model.mean_modulation.parameters()]
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in others)
