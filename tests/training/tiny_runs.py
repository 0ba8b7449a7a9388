"""Runs of a few steps on three classes of tiny images, and what their tests ask of them."""

import dataclasses
import json

import pytest
import torch

from genrep_fast import cli
from genrep_fast.data import DataSplits, ImageDataset
from genrep_fast.reporting import html
from genrep_fast.training import Trainer, TrainingConfig

NUM_CLASSES = 3
TIMES = ("teacher_seconds",)
# The newest checkpoint of the finished run.
NEWEST = "step-0000004"


def make_splits(channels=1, side=8):
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(NUM_CLASSES, channels, side, side, generator=generator) * 1.6 - 0.8

    def split(count):
        labels = torch.arange(count) % NUM_CLASSES
        noise = 0.1 * torch.randn(count, channels, side, side, generator=generator)
        return ImageDataset((patterns[labels] + noise).clamp(-1, 1), labels)

    return DataSplits(split(24), split(9), split(9), ("ape", "bee", "cat"), (channels, side, side))


def four_steps(output, backbone):
    """The options of a run of four steps in three stages, with a checkpoint after each."""
    return TrainingConfig(
        output=str(output),
        backbone=str(backbone),
        diffusion_steps=1,
        perception_steps=1,
        joint_steps=2,
        batch_size=8,
        teacher_chains=2,
        teacher_steps=4,
        checkpoint_every=1,
        log_every=1,
        evaluate=False,
    )


def train(config, splits=None):
    trainer = Trainer(config, splits or make_splits())
    trainer.run()
    return trainer


def resume(output, config, **options):
    return train(dataclasses.replace(config, output=str(output), resume=True, **options))


def history_file(output):
    return [json.loads(line) for line in (output / "history.jsonl").read_text().splitlines()]


def without_times(history):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in history]


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


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def snapshot(folder):
    """The content of every file."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failure(capsys, *arguments):
    """The one line that a command leaves on standard error, having ended with status 2."""
    with pytest.raises(SystemExit) as error:
        cli.main([str(argument) for argument in arguments])
    assert error.value.code == 2
    line = capsys.readouterr().err
    assert line.endswith("\n") and line.count("\n") == 1, line
    return line


def half_metrics(teacher):
    """What a report is made of, with 0.5 for every result."""
    metrics = {row.section: {} for row in html.SUMMARY}
    for row in html.SUMMARY:
        metrics[row.section][row.key] = 0.5
    sizes = (
        "test_images",
        "scored_test_images",
        "samples",
        "classes",
        "elbo_steps",
        "num_inference_steps",
    )
    metrics["sizes"] = {**dict.fromkeys(sizes, 1), "data": "digits"}
    metrics["generation"]["recognition_rate_per_class"] = {"ape": 0.5}
    return {**metrics, "teacher": teacher, "seconds": {}, "undefined": []}
