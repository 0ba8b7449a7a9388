"""The micro-batches of a run: workers, augmentation and balanced classes, each from the seed and
its index alone.
"""

import dataclasses
import multiprocessing
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import NUM_CLASSES, InterruptedRun, interrupt_after, make_splits, resume, train

from genrep_fast.data import ImageDataset, as_tensors, batches, load_data
from genrep_fast.training import Trainer, TrainingConfig
from genrep_fast.training.batches import seeded_loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of grey images: a bright left half and noise, different heights."""
    root = tmp_path_factory.mktemp("folder")
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (root / name).mkdir()
        for index in range(12):
            pixels = generator.integers(0, 100, (20, 20 + index), dtype=np.uint8)
            pixels[:, : 10 + index // 2] += 120
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def all_batches(dataset, start=0, **options):
    config = TrainingConfig(**{"batch_size": 7, "steps": 9, **options})
    return list(seeded_loader(config, dataset, start=start))


def equal(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


AUGMENTED = {"random_flip": True, "random_crop": True, "class_balanced": True}


@pytest.mark.parametrize("options", [{}, AUGMENTED])
def test_batches_are_the_same_with_any_number_of_workers_and_from_any_start(folder, options):
    dataset = load_data(f"folder:{folder}", image_size=8).train
    expected = all_batches(dataset, **options)
    assert len(expected) == 9 and expected[0][0].shape == (7, 1, 8, 8)
    assert equal(all_batches(dataset, dataloader_num_workers=2, **options), expected)
    assert equal(all_batches(dataset, start=5, dataloader_num_workers=1, **options), expected[5:])


def test_torchs_random_state_is_left_alone(folder):
    dataset = load_data(f"folder:{folder}", image_size=8).train
    torch.manual_seed(0)
    expected = torch.rand(3)
    for workers in (0, 1):
        torch.manual_seed(0)
        all_batches(dataset, dataloader_num_workers=workers, **AUGMENTED)
        list(batches(dataset, 4, num_workers=workers))
        assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_images_are_flipped_every_other_time(seed):
    ramp = torch.linspace(-1, 1, 8).expand(1, 1, 8, 8)
    dataset = ImageDataset(ramp.expand(50, 1, 8, 8), torch.arange(50) % 2)
    options = {"batch_size": 50, "steps": 20, "seed": seed}
    found = torch.cat([batch[0] for batch in all_batches(dataset, random_flip=True, **options)])
    flipped = (found == ramp.flip(-1)).flatten(1).all(1)
    assert (flipped | (found == ramp).flatten(1).all(1)).all()
    # Each image and each batch has its own throw.
    throws = flipped.view(20, 50)
    assert len(throws.unique(dim=0)) == 20 and len(throws.unique(dim=1)[0]) > 40
    # A thousand throws: five standard deviations.
    assert 0.42 < flipped.float().mean() < 0.58
    assert dataset[0][0].equal(ramp[0])


@pytest.mark.parametrize("kind", ["tensors", "folder"])
def test_crops_are_cut_out_of_larger_images(tmp_path, kind):
    columns = torch.linspace(-1, 1, 16).expand(1, 16, 16)
    if kind == "tensors":
        dataset = ImageDataset(columns.expand(40, 1, 16, 16), torch.arange(40) % 2)
    else:
        pixels = ((columns[0].numpy() + 1) * 127.5).astype(np.uint8)
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            for index in range(30):
                # Different files of nearly one image.
                pixels[0, 0] = index + 100 * (name == "b")
                Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
        dataset = load_data(f"folder:{tmp_path}", image_size=16).train
    plain = dataset[0][0][0, 8]
    found = all_batches(dataset, random_crop=True, batch_size=20, steps=10)
    rows = torch.cat([batch[0] for batch in found])[:, 0, 8]
    assert rows.shape == (len(rows), 16) and rows.abs().max() <= 1 + 1e-6
    slopes = (rows[:, -2] - rows[:, 1]) / (plain[-2] - plain[1])
    # 18 pixels in the place of 16.
    assert torch.allclose(slopes, torch.tensor(16 / 18), atol=0.02)
    assert len(rows[:, 8].mul(100).round().unique()) == 3


def test_only_training_images_are_augmented(folder, make_config, monkeypatch):
    splits = load_data(f"folder:{folder}", image_size=8)
    whole = {image.numpy().tobytes() for image in splits.train.images}
    calibrated = []
    monkeypatch.setattr(
        "genrep_fast.training.teacher.Teacher.prepare",
        lambda self, scored: calibrated.extend(scored),
    )
    trainer = Trainer(make_config(random_crop=True, random_flip=True), splits)
    seen = torch.cat([batch[0] for batch in trainer._loader()])
    assert not any(image.numpy().tobytes() in whole for image in seen)
    trainer.run()
    images, labels = (torch.cat(parts) for parts in zip(*calibrated, strict=True))
    expected = as_tensors(splits.calibration)
    assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])
    assert {image.numpy().tobytes() for image in splits.train.images} == whole


def test_classes_are_drawn_equally_often():
    counts = torch.tensor([70, 20, 5, 1])
    labels = torch.arange(4).repeat_interleave(counts)
    images = torch.arange(96.0).view(96, 1, 1, 1)
    found = all_batches(ImageDataset(images, labels), class_balanced=True, batch_size=24, steps=8)
    epochs = [torch.cat([batch[0] for batch in found[i : i + 4]]).flatten() for i in (0, 4)]
    for epoch in epochs:
        drawn = epoch.long().bincount(minlength=96)
        assert [part.sum().item() for part in drawn.split(counts.tolist())] == [24] * 4
        for part, count in zip(drawn.split(counts.tolist()), counts.tolist(), strict=True):
            assert set(part.tolist()) <= {24 // count, -(-24 // count)}
    assert not torch.equal(epochs[0], epochs[1])
    # Mixed, not class after class.
    assert all(len(batch[1].unique()) > 1 for batch in found)
    plain = all_batches(ImageDataset(images, labels), batch_size=96, steps=1)
    assert plain[0][1].bincount().tolist() == counts.tolist()


def test_shares_that_are_not_whole_differ_by_one():
    labels = torch.tensor([0] * 5 + [1] * 4 + [7] * 2)
    dataset = ImageDataset(torch.zeros(11, 1, 1, 1), labels)
    found = all_batches(dataset, class_balanced=True, batch_size=11, steps=5)
    for batch in found:
        assert sorted(batch[1].bincount()[[0, 1, 7]].tolist()) == [3, 4, 4]


def test_a_run_with_workers_resumes_to_the_bit(folder, make_config, monkeypatch, tmp_path):
    splits = load_data(f"folder:{folder}", image_size=8)
    options = {"output": str(tmp_path / "whole"), **AUGMENTED}
    expected = train(make_config(**options), splits).parameters
    config = make_config(dataloader_num_workers=1, **AUGMENTED)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(InterruptedRun):
            train(config, splits)
    resumed = train(dataclasses.replace(config, resume=True, dataloader_num_workers=2), splits)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, expected, strict=True))
    for _ in range(100):
        if not multiprocessing.active_children():
            break
        time.sleep(0.1)
    assert multiprocessing.active_children() == []


def test_the_number_of_workers_is_no_option_that_a_run_is_held_to(finished, copied):
    config, _ = finished
    other = TrainingConfig(output=config.output, resume=True, dataloader_num_workers=3).resumed()
    assert other == dataclasses.replace(config, resume=True, dataloader_num_workers=3)
    with pytest.raises(ValueError, match="random_flip is True now"):
        TrainingConfig(output=config.output, resume=True, random_flip=True).resumed()
    resume(copied, config, dataloader_num_workers=1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", ["train", "calibration"])
def test_an_image_that_is_lost_during_training_is_named_in_one_line(
    tmp_path, make_config, workers, part
):
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(10):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    splits = load_data(f"folder:{tmp_path / 'images'}", image_size=8)
    # The first of the training images is read when the model is built.
    path = getattr(splits, part).path(1)
    with open(path, "rb+") as file:
        file.truncate(40)
    with pytest.raises(ValueError) as error:
        train(make_config(dataloader_num_workers=workers, batch_size=30), splits)
    assert str(error.value).startswith(f"{path} cannot be read as an image (")
    assert "\n" not in str(error.value)


def test_batches_are_read_in_order_and_end_their_workers(folder):
    dataset = load_data(f"folder:{folder}", image_size=8).train
    images, labels = as_tensors(dataset)
    order = [3, 0, 5, 5, 1]
    for workers in (0, 2):
        found = list(batches(dataset, 2, order, num_workers=workers))
        assert [len(batch) for batch, _ in found] == [2, 2, 1]
        assert torch.equal(torch.cat([batch for batch, _ in found]), images[order])
        assert torch.equal(torch.cat([batch for _, batch in found]), labels[order])
    started = batches(dataset, 2, torch.tensor(order), num_workers=2)
    next(started)
    assert multiprocessing.active_children()
    started.close()
    assert not multiprocessing.active_children()


def test_few_labels_of_augmented_images_are_those_of_plain_ones():
    dataset = make_splits().train
    few = {"labelled_per_class": 2, "batch_size": 24, "steps": 1}
    plain = all_batches(dataset, **few)[0]
    augmented = all_batches(dataset, random_flip=True, random_crop=True, **few)[0]
    assert torch.equal(plain[1], augmented[1]) and torch.equal(plain[2], augmented[2])
    assert plain[2].dtype == torch.bool and plain[2].sum() == 2 * NUM_CLASSES
