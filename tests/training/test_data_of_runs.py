"""Folders that change between training, resuming and evaluating: what was trained on is never
tested, and other classes are refused by name.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny_runs import change_json, failure, train

from genrep_fast.data import DataRecord, DataSplits, load_data
from genrep_fast.reporting import terminal
from genrep_fast.training import Trainer, TrainingConfig, ablation, checkpoints
from genrep_fast.training import run as training_run
from genrep_fast.training.config import SavedData, saved_data

CLASSES = ("1", "2", "10")


def save_images(root, names, count, first=0):
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(first, first + count):
            pixels = np.random.default_rng([1 + label, index]).integers(0, 256, (8, 8))
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index}.png")


@pytest.fixture
def images(tmp_path):
    """Three images a class: two of the three parts of most classes have to borrow."""
    root = tmp_path / "images"
    save_images(root, CLASSES, 3)
    return root


@pytest.fixture
def started(images, make_config):
    """The options of a run that was trained on these images, through the command's own door."""
    config = make_config(data=f"folder:{images}", image_size=8, teacher="none")
    training_run.train_and_evaluate(config)
    return config


@pytest.fixture
def loaded(monkeypatch):
    """The splits that commands load, in turn; an evaluation ends once it has them."""
    seen = []

    class Seen(Exception):
        pass

    def keep(*arguments, **options):
        seen.append(load_data(*arguments, **options))
        return seen[-1]

    def stop(model, scheduler, splits, *_, **__):
        raise ValueError("stopped before the evaluation")

    monkeypatch.setattr("genrep_fast.training.run.load_data", keep)
    monkeypatch.setattr("genrep_fast.data.load_data", keep)
    monkeypatch.setattr("genrep_fast.evaluation.evaluate", stop)
    return seen


def contents(dataset):
    return {image.numpy().tobytes() for image in dataset.images}


def parts(splits: DataSplits):
    return {
        image: part
        for part in ("train", "calibration", "test")
        for image in contents(getattr(splits, part))
    }


def test_a_run_keeps_names_and_borrowed_images(started, images):
    splits = load_data(started.data, image_size=8)
    record = DataRecord.read(tmp := images.parent / "run")
    assert record == DataRecord(CLASSES, splits.borrowed) and splits.borrowed
    assert json.loads((tmp / "config.json").read_text())["split"] == "content"


@pytest.mark.parametrize("place", ["run", "run/model"])
def test_an_evaluation_tests_no_image_that_the_run_was_trained_on(
    started, images, loaded, capsys, place
):
    before = parts(load_data(started.data, image_size=8))
    save_images(images, CLASSES, 40, first=3)
    capsys.readouterr()
    failure(capsys, "evaluate", "--checkpoint", images.parent / place)
    failure(capsys, "evaluate", "--checkpoint", images.parent / place, "--data", f"folder:{images}")
    for splits in loaded:
        after = parts(splits)
        assert len(after) == 129 and all(after[image] == part for image, part in before.items())
    assert len(loaded) == 2


def test_a_resumed_run_trains_on_no_image_that_was_tested(started, images, loaded):
    before = parts(load_data(started.data, image_size=8))
    save_images(images, CLASSES, 40, first=3)
    config = TrainingConfig(output=started.output, resume=True)
    training_run.train_and_evaluate(config)
    after = parts(loaded[-1])
    assert all(after[image] == part for image, part in before.items())
    assert DataRecord.read(images.parent / "run").borrowed == loaded[-1].borrowed


def test_other_classes_are_refused_when_a_run_is_resumed(started, images, capsys):
    (images / "10").rename(images / "11")
    capsys.readouterr()
    line = failure(capsys, "train", "--resume", "--output", started.output)
    assert "data must have the same 3 classes, got 3; missing: '10'; surplus: '11'" in line
    save_images(images, ["10"], 3)
    line = failure(capsys, "train", "--resume", "--output", started.output)
    assert "got 4; surplus: '11'" in line


def test_splits_without_the_runs_record_are_refused(started, images):
    save_images(images, CLASSES, 40, first=3)
    config = dataclasses.replace(started, resume=True)
    with pytest.raises(ValueError, match=r"splits must have the parts that .*run keeps"):
        Trainer(config, load_data(started.data, image_size=8))
    record = DataRecord.read(images.parent / "run")
    Trainer(config, load_data(started.data, image_size=8, record=record))


def test_a_damaged_record_is_one_line(started, images, capsys):
    (images.parent / "run" / "data.json").write_text("{}")
    capsys.readouterr()
    for command in (("train", "--resume", "--output"), ("evaluate", "--checkpoint")):
        assert "run/data.json is damaged" in failure(capsys, *command, started.output)


# Runs of versions before


@pytest.fixture
def older(images, make_config):
    """A run as versions before 0.2 left it, half-way."""
    config = make_config(data=f"folder:{images}", image_size=8, split="random")
    save_images(images, CLASSES, 20, first=3)
    splits = load_data(config.data, image_size=8, split="random")
    whole = train(dataclasses.replace(config, output=config.output + " whole"), splits)
    train(config, splits)
    run = images.parent / "run"
    (run / "data.json").unlink()
    new = ("split", "dataloader_num_workers", "random_flip", "random_crop", "class_balanced")
    options = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(
        json.dumps({name: value for name, value in options.items() if name not in new})
    )
    shutil.rmtree(run / "checkpoints" / "step-0000009")
    forget_options(run / "checkpoints" / "step-0000008", new)
    return config, whole.parameters


def forget_options(checkpoint, names):
    state = json.loads((checkpoint / "state.json").read_text())
    state["options"] = {k: v for k, v in state["options"].items() if k not in names}
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    path = checkpoint / "state.json"
    manifest["files"]["state.json"] = {
        "bytes": path.stat().st_size,
        "sha256": checkpoints._hash(path),
    }
    (checkpoint / "manifest.json").write_bytes(checkpoints._canonical(manifest))


def test_older_runs_keep_their_split(older, images, loaded, capsys):
    config, expected = older
    before = parts(load_data(config.data, image_size=8, split="random"))
    capsys.readouterr()
    failure(capsys, "evaluate", "--checkpoint", images.parent / "run")
    assert parts(loaded[-1]) == before
    assert loaded[-1].class_names == ("1", "10", "2")
    training_run.train_and_evaluate(TrainingConfig(output=config.output, resume=True))
    assert parts(loaded[-1]) == before
    saved = json.loads((images.parent / "run" / "config.json").read_text())
    assert saved["split"] == "random"
    assert DataRecord.read(images.parent / "run").class_names == ("1", "10", "2")
    record = DataRecord.read(images.parent / "run")
    splits = load_data(config.data, image_size=8, split="random", record=record)
    trainer = train(dataclasses.replace(config, resume=True), splits)
    assert all(torch.equal(a, b) for a, b in zip(trainer.parameters, expected, strict=True))


def test_an_older_checkpoint_is_no_part_of_a_run_with_another_split(older, images):
    config, _ = older
    (images.parent / "run" / "config.json").unlink()
    splits = load_data(config.data, image_size=8)
    changed = dataclasses.replace(config, resume=True, split="content")
    with pytest.raises(ValueError, match="split is content now, and was random"):
        train(changed, splits)
    # Other data have no such choice.
    train(dataclasses.replace(changed, data="digits"), splits)


def test_another_split_is_refused_when_a_run_is_resumed(started):
    other = dataclasses.replace(started, resume=True, split="random")
    with pytest.raises(ValueError, match="split is random now, but .* says content"):
        other.resumed()
    change_json(folder_of(started) / "config.json", split="other")
    with pytest.raises(ValueError, match=r"config.json is damaged: split cannot be 'other'"):
        saved_data(folder_of(started))


def folder_of(config):
    return Path(config.output)


def test_what_is_no_run_has_no_data(tmp_path, started):
    assert saved_data(tmp_path) is None
    shutil.copytree(folder_of(started) / "model", tmp_path / "elsewhere" / "model")
    assert saved_data(tmp_path / "elsewhere" / "model") is None
    record = DataRecord.read(folder_of(started))
    for place in (folder_of(started), folder_of(started) / "model"):
        assert saved_data(place) == SavedData(started.data, "content", record)


# Runs that share a stage, and what a terminal shows


@pytest.mark.parametrize("split", ["content", "random"])
def test_rows_of_an_ablation_have_the_parts_of_the_stage_that_they_share(
    tmp_path, monkeypatch, split
):
    rows = []
    config = TrainingConfig(output=str(tmp_path), data="folder:images")
    stage = dataclasses.replace(config, output=str(tmp_path / "stage"), split=split)
    stage.save()
    record = DataRecord(CLASSES, {"test": ("0" * 64,)})
    record.save(tmp_path / "stage")

    def keep(row):
        rows.append((row.split, DataRecord.read(folder_of(row))))
        return dict.fromkeys(ablation.COLUMNS, 1.0)

    monkeypatch.setattr(ablation, "_shared_backbone", lambda _: tmp_path / "stage" / "backbone")
    monkeypatch.setattr(ablation, "_metrics", keep)
    ablation.run_ablation(config, 1)
    assert rows == [(split, record)] * len(ablation.ROWS)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_shows_how_far_the_reading_is(images, monkeypatch, is_terminal):
    save_images(images, CLASSES, 40, first=3)
    console = Console(force_terminal=is_terminal, width=80, record=True)
    monkeypatch.setattr(terminal, "console", console)
    with terminal.reading_progress() as progress:
        load_data(f"folder:{images}", progress=progress)
        progress(12_000, 20_000)
        progress(12_032, 20_000)
    shown = console.export_text()
    assert ("of 20,000 files" in shown) == is_terminal
    assert is_terminal or shown == ""
