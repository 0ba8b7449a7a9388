"""Experiment trackers beside history.jsonl, and pictures that a run draws of itself."""

import dataclasses
import json
import types

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import (
    InterruptedRun,
    history_file,
    interrupt_after,
    make_splits,
    resume,
    train,
    without_times,
)

from genrep_fast.training import Trainer, tracking

FOLDER = tracking.PROJECT


def events(output):
    """What tensorboard shows of a run: steps and values by name, and the steps of the pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(output / FOLDER), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    tags = accumulator.Tags()
    scalars = {
        name: [(event.step, event.value) for event in accumulator.Scalars(name)]
        for name in tags["scalars"]
    }
    pictures = [event.step for name in tags["images"] for event in accumulator.Images(name)]
    return scalars, pictures


def logged(output, name):
    rows = history_file(output)
    return [(row["step"], pytest.approx(row[name])) for row in rows if name in row]


def test_tensorboard_gets_what_the_history_gets(make_config, tmp_path):
    train(make_config(log_with="tensorboard", log_every=2, sample_every=4))
    scalars, pictures = events(tmp_path / "run")
    for name in ("generation", "perception", "cosine", "learning_rate", "stage"):
        assert scalars[name] == logged(tmp_path / "run", name)
    assert set(scalars) == {name for row in history_file(tmp_path / "run") for name in row} - {
        "step"
    }
    assert pictures == [4, 8]


def test_samples_change_nothing_of_the_training(make_config, tmp_path):
    plain = train(make_config())
    before = torch.get_rng_state()
    watched = train(
        make_config(output=str(tmp_path / "watched"), sample_every=2, log_with="tensorboard")
    )
    assert watched.model.training == plain.model.training
    assert torch.equal(before, torch.get_rng_state())
    for one, other in zip(plain.parameters, watched.parameters, strict=True):
        assert torch.equal(one, other)
    assert without_times(plain.state.history) == without_times(watched.state.history)
    files = sorted((tmp_path / "watched" / "samples").iterdir())
    assert [file.name for file in files] == [f"step-000000{step}.png" for step in (2, 4, 6, 8)]
    # Three classes, four images of 8 × 8 each.
    pictures = [np.asarray(Image.open(file)) for file in files]
    assert all(picture.shape == (3 * 8, 4 * 8) for picture in pictures)
    assert not np.array_equal(pictures[0], pictures[1])


def test_a_run_that_goes_on_goes_on_in_its_tracker(make_config, tmp_path, monkeypatch):
    config = make_config(log_with="tensorboard", checkpoint_every=2, sample_every=2)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 8)
        patch.setattr(Trainer, "_checkpoint", dropped_after(Trainer._checkpoint, 6))
        with pytest.raises(InterruptedRun):
            train(config)
    resume(tmp_path / "run", config)
    scalars, pictures = events(tmp_path / "run")
    assert scalars["generation"] == logged(tmp_path / "run", "generation")
    assert pictures == [2, 4, 6, 8]


def dropped_after(checkpoint, step):
    """No checkpoint is written after `step`, so that the run goes back when it goes on."""
    return lambda self: checkpoint(self) if self.state.step <= step else None


def test_watching_may_begin_and_end_with_a_resumption(make_config, tmp_path, monkeypatch):
    config = make_config()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(InterruptedRun):
            train(config)
    watched = dataclasses.replace(config, resume=True, sample_every=3, log_with="tensorboard")
    train(watched.resumed())
    assert [file.name for file in sorted((tmp_path / "run" / "samples").iterdir())] == [
        "step-0000006.png",
        "step-0000009.png",
    ]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["sample_every"] == 3


@pytest.mark.parametrize("fails", [False, True])
def test_trackers_end_with_the_run(make_config, monkeypatch, fails):
    trainer = Trainer(make_config(log_with="tensorboard", teacher="none"), make_splits())
    ended = []
    monkeypatch.setattr(trainer.accelerator, "end_training", lambda: ended.append(True))
    if fails:
        interrupt_after(monkeypatch, 2)
        with pytest.raises(InterruptedRun):
            trainer.run()
    else:
        trainer.run()
    assert ended == [True]


def test_a_missing_package_is_named_before_anything_starts(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    for name, package in (("wandb", "wandb"), ("tensorboard", r'"genrep_fast\[trackers\]"')):
        with pytest.raises(ImportError, match=f"log_with: {name} is not.*pip install {package}"):
            Trainer(make_config(log_with=name), make_splits())
    with pytest.raises(ValueError, match="log_with must be one of .*tensorboard, wandb"):
        Trainer(make_config(log_with="paper"), make_splits())
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_name_in_wandb(make_config, tmp_path):
    """Without the package: what would be asked of it."""
    asked = []
    accelerator = types.SimpleNamespace(
        log_with=["wandb"],
        trackers=[],
        init_trackers=lambda project, config, init_kwargs: asked.append((config, init_kwargs)),
        end_training=lambda: None,
    )
    config = make_config()
    config.log_with = "wandb"
    (tmp_path / "run").mkdir()
    for step in (0, 5):
        with tracking.Tracking(config, accelerator).started(step):
            pass
    (options, first), (again, second) = asked
    assert first == second and first["wandb"]["resume"] == "allow" and first["wandb"]["id"]
    assert options["gradient_weights"] == "(0.7, 0.3)" and again is None
