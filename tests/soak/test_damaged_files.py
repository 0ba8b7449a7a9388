"""Damaged files of every kind that the package reads: each loads, or is refused with its name.

Nothing else is raised, nothing hangs, nothing takes a gigabyte, and no file is changed.
"""

import os
import random
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from damage import damage, within_limits
from diffusers import DDPMScheduler
from PIL import Image
from soak_share import seeds
from tiny_runs import four_steps, train

from genrep_fast import ChainBank, DiffusionClassifier, Full, GenRepPipeline, SavedResults
from genrep_fast.data import load_data
from genrep_fast.scoring.classifier import output_folder, parts
from genrep_fast.training import TrainingConfig
from genrep_fast.training.checkpoints import newest_checkpoint, read_checkpoint
from genrep_fast.training.config import saved_data
from genrep_fast.training.state import read_history


@pytest.fixture(scope="module")
def good(tiny_backbone, tmp_path_factory):
    """A finished run, and a folder of images."""
    root = tmp_path_factory.mktemp("good")
    tiny_backbone("dit").save_pretrained(root / "backbone")
    train(four_steps(root / "run", root / "backbone"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    generator = random.Random(0)
    for name in ("ape", "bee"):
        (root / "images" / name).mkdir(parents=True)
        for number in range(6):
            pixels = generator.randbytes(8 * 8)
            path = root / "images" / name / f"{number}.{('png', 'jpg')[number % 2]}"
            Image.frombytes("L", (8, 8), pixels).save(path)
    for kind in ("parquet", "csv"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(output_folder, "preferred_kind", lambda kind=kind: kind)
            patch.setattr(parts, "_MOST_ROWS", 4)
            classify(root / kind)
    return root


def classify(folder):
    """The results of ten images, of which every one differs."""

    def denoiser(x_t, timesteps, labels):
        return x_t * labels.view(-1, 1, 1, 1) / 3

    classifier = DiffusionClassifier(denoiser, DDPMScheduler(clip_sample=False), 3)
    images = torch.linspace(-1, 1, 10).view(-1, 1, 1, 1).expand(10, 1, 4, 4)
    labels = torch.arange(10) % 3
    return classifier(
        iter([(images[:5], labels[:5]), (images[5:], labels[5:])]),
        strategy=Full(3),
        output=folder,
        progress=False,
    )


def cases(count, of_a_round):
    """A generator a case, with its seed."""
    return pytest.mark.parametrize("seed", seeds(count, of_a_round))


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def load(read, folder, told):
    """What `read` returns within limits, or None where it refuses, with a word of `told`."""
    before = snapshot(folder)
    try:
        with within_limits():
            result = read()
    except (ValueError, OSError) as error:
        assert any(str(name) in str(error) for name in told), f"{told} not in: {error}"
        result = None
    assert snapshot(folder) == before
    return result


def snapshot(folder):
    """Names of everything in a folder, with contents of regular files."""
    paths = (path for path in sorted(folder.rglob("*")))
    regular = {path: path.read_bytes() for path in paths if path.is_file()}
    return sorted(os.walk(folder)), regular


def damaged(folder, generator, times=1):
    """Damage `times` files of a folder; their names."""
    names = []
    for path in generator.sample(files_of(folder), times):
        others = [other for other in files_of(folder) if other != path]
        print(damage(path, generator, others))
        names.append(path.name)
    return names


@cases(8, 80)
def test_checkpoints(good, tmp_path, seed):
    generator = random.Random(seed)
    folder = newest_checkpoint(good / "run")
    expected = read_checkpoint(folder)
    copy = tmp_path / "checkpoints" / folder.name
    shutil.copytree(folder, copy)
    damaged(copy, generator, generator.choice((1, 1, 2)))
    found = load(lambda: read_checkpoint(copy), copy, [copy])
    if found is None:
        return
    assert found.state == expected.state and found.tensors.keys() == expected.tensors.keys()
    for name, tensors in expected.tensors.items():
        assert tensors.keys() == found.tensors[name].keys()
        assert all(torch.equal(tensors[key], found.tensors[name][key]) for key in tensors)
    assert torch.equal(found.bank.centers, expected.bank.centers)


@cases(15, 150)
def test_banks(good, tmp_path, seed):
    generator = random.Random(seed)
    path = tmp_path / "bank.safetensors"
    shutil.copy(newest_checkpoint(good / "run") / path.name, path)
    others = files_of(newest_checkpoint(good / "run"))
    print(damage(path, generator, others))
    bank = load(lambda: ChainBank.load(path), tmp_path, [path])
    if bank is not None:
        # A value of a centre may have changed, which no check could tell.
        assert bank.log_likelihood(torch.zeros(2, *bank.centers.shape[2:])).shape == (2, 3)


@cases(20, 200)
def test_options_and_histories(good, tmp_path, seed):
    generator = random.Random(seed)
    for name in ("config.json", "history.jsonl"):
        shutil.copy(good / "run" / name, tmp_path / name)
    damaged(tmp_path, generator)
    config = TrainingConfig(output=str(tmp_path), resume=True)
    result = load(config.resumed, tmp_path, ["config.json"])
    assert result is None or isinstance(result, TrainingConfig)
    data = load(lambda: saved_data(tmp_path / "config.json"), tmp_path, ["config.json"])
    assert data is None or isinstance(data, str)
    history = load(lambda: read_history(tmp_path / "history.jsonl"), tmp_path, ["history.jsonl"])
    for row in history or ():
        assert all(type(value) in (int, float) for value in row.values())


@cases(6, 40)
def test_pipelines(good, tmp_path, seed):
    generator = random.Random(seed)
    folder = tmp_path / "model"
    shutil.copytree(good / "run" / "model", folder)
    names = damaged(folder, generator)
    pipeline = load(lambda: GenRepPipeline.from_pretrained(folder), folder, [folder, *names])
    # Options of another model may be such that it cannot run, which no check could tell.
    if pipeline is not None and "config.json" not in names:
        assert pipeline.model.config.num_classes == 3
        pipeline(torch.zeros(2, *pipeline.model.image_shape))


def every(split):
    return (split[index] for index in range(len(split)))


@cases(10, 80)
def test_folders_of_images(good, tmp_path, seed):
    generator = random.Random(seed)
    folder = tmp_path / "images"
    shutil.copytree(good / "images", folder)
    names = damaged(folder, generator)
    data = load(lambda: load_data(f"folder:{folder}", image_size=8), folder, [folder, *names])
    if data is None:
        return
    splits = (data.train, data.calibration, data.test)
    # Damage amid the pixels shows when they are decoded.
    items = load(lambda: [item for split in splits for item in every(split)], folder, names)
    for image, label in items or ():
        assert image.shape == data.image_shape and label in (0, 1)
        assert image.isfinite().all() and image.abs().max() <= 1


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@cases(5, 60)
def test_classifications(good, tmp_path, seed, kind):
    generator = random.Random(seed)
    folder = tmp_path / "results"
    shutil.copytree(good / kind, folder)
    names = damaged(folder, generator, generator.choice((1, 1, 2)))
    told = [folder, *names]
    expected = SavedResults(good / kind).load()
    found = load(lambda: SavedResults(folder).load(), folder, told)
    # No checksum protects CSV, and parts that are missing could have been removed.
    if found is not None and kind == "parquet":
        rows = found.image_ids
        assert found.prediction.equal(expected.prediction[rows])
        if not any(name.endswith(".json") for name in names):
            assert found.posterior.equal(expected.posterior[rows])
    # Goes on where what is left is whole, and else changes nothing.
    before = snapshot(folder)
    try:
        with within_limits():
            again = classify(folder).load()
    except (ValueError, OSError) as error:
        assert any(str(name) in str(error) for name in told), f"{told} not in: {error}"
        assert snapshot(folder) == before
        return
    assert len(again) == 10
    if kind == "parquet":
        assert again.prediction.equal(expected.prediction)
