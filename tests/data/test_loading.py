"""Loading of the data sets: splits, ranges, colours, and one clear error for everything that cannot
be read.
"""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from genrep_fast.data import ImageDataset, as_tensors, few_labels, load_data

SPLITS = ("train", "calibration", "test")


def save_images(root, counts, size=(8, 8), mode="L"):
    """Class folders of `counts[name]` images of one grey level each, different within a folder."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("L", size, 10 + index).convert(mode).save(root / name / f"{index}.png")


def all_images(splits):
    return torch.cat([as_tensors(getattr(splits, name))[0] for name in SPLITS])


def test_digits_are_split_into_all_the_images_once():
    from sklearn.datasets import load_digits

    splits = load_data("digits")
    assert [len(getattr(splits, name)) for name in SPLITS] == [1097, 200, 500]
    assert (
        splits.image_shape == (1, 8, 8)
        and splits.num_classes == 10
        and splits.class_names[3] == "3"
    )
    expected = load_digits().data / 8 - 1
    rows = all_images(splits).flatten(1).double().numpy()
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])


def test_digits_are_stratified_labelled_and_independent_of_the_seed():
    from sklearn.datasets import load_digits

    label_of = {
        image.tobytes(): int(label)
        for image, label in zip(load_digits().data, load_digits().target, strict=True)
    }
    splits, again = load_data("digits"), load_data("digits", seed=1)
    for name in SPLITS:
        images, labels = as_tensors(getattr(splits, name))
        assert images.dtype == torch.float32 and labels.dtype == torch.int64
        raw = ((images + 1) * 8).flatten(1).double().numpy()
        assert [label_of[row.tobytes()] for row in raw] == labels.tolist()
        assert np.ptp(labels.bincount().numpy()) <= 0.1 * len(labels) / 10 + 2
        assert torch.equal(images, as_tensors(getattr(again, name))[0])


def test_items_are_a_float_image_and_a_python_int():
    image, label = load_data("digits").test[0]
    assert image.dtype == torch.float32 and image.shape == (1, 8, 8) and type(label) is int


def test_image_size_resizes_the_digits():
    splits = load_data("digits", image_size=13)
    assert splits.image_shape == (1, 13, 13)
    assert all_images(splits).abs().max() <= 1


def test_folder_takes_every_image_once_and_every_class_into_every_split(tmp_path):
    save_images(tmp_path, {"cat": 40, "dog": 3, ".hidden": 2})
    splits = load_data(f"folder:{tmp_path}", image_size=4)
    assert splits.class_names == ("cat", "dog") and splits.image_shape == (1, 4, 4)
    assert sum(len(getattr(splits, name)) for name in SPLITS) == 43
    levels = sorted(((all_images(splits)[:, 0, 0, 0] + 1) * 127.5).round().int().tolist())
    assert levels == sorted([10 + i for i in range(40)] + [10 + i for i in range(3)])
    for name in SPLITS:
        assert set(as_tensors(getattr(splits, name))[1].tolist()) == {0, 1}


def test_a_random_split_of_a_folder_follows_its_seed(tmp_path):
    save_images(tmp_path, {"a": 40, "b": 3})
    first, same, other = (
        load_data(f"folder:{tmp_path}", image_size=1, seed=seed, split="random")
        for seed in (0, 0, 1)
    )
    assert [len(getattr(first, name)) for name in SPLITS] == [28 + 1, 4 + 1, 8 + 1]
    assert torch.equal(first.test.images, same.test.images)
    assert not torch.equal(first.test.images, other.test.images)


def test_a_split_by_content_follows_no_seed(tmp_path):
    save_images(tmp_path, {"a": 30, "b": 30})
    first, other = (load_data(f"folder:{tmp_path}", image_size=1, seed=seed) for seed in (0, 1))
    assert torch.equal(first.test.images, other.test.images)
    with pytest.raises(ValueError, match="split must be 'content' or 'random', got 'order'"):
        load_data(f"folder:{tmp_path}", split="order")


def test_folder_is_rgb_as_soon_as_one_image_is(tmp_path):
    save_images(tmp_path, {"a": 3, "b": 3})
    Image.new("RGB", (8, 8), (255, 0, 51)).save(tmp_path / "b" / "red.png")
    splits = load_data(f"folder:{tmp_path}")
    assert splits.image_shape == (3, 32, 32)
    red = torch.tensor([1.0, -1.0, -0.6])[:, None, None].expand(3, 32, 32)
    assert sum(torch.allclose(image, red, atol=1e-6) for image in all_images(splits)) == 1


def test_folder_crops_the_centre_and_turns_images_upright(tmp_path):
    save_images(tmp_path, {"a": 3, "b": 2})
    columns = np.zeros((4, 12), dtype=np.uint8)
    columns[:2, 4:8] = 255  # the middle third: white above black
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    Image.fromarray(columns).save(tmp_path / "b" / "wide.png", exif=exif)
    images = all_images(load_data(f"folder:{tmp_path}", image_size=4))[:, 0]
    expected = torch.tensor([-1.0, -1.0, 1.0, 1.0])[:, None].expand(4, 4)
    assert sum(torch.equal(image, expected) for image in images) == 1


def test_folder_scales_16_bit_images_instead_of_clipping(tmp_path):
    save_images(tmp_path, {"a": 3, "b": 2})
    Image.fromarray(np.full((4, 4), 257 * 100, dtype=np.uint16)).save(tmp_path / "b" / "deep.png")
    levels = (all_images(load_data(f"folder:{tmp_path}", image_size=4))[:, 0, 0, 0] + 1) * 127.5
    assert levels.max().item() == pytest.approx(100, abs=1e-3)


def write_garbage(path):
    path.write_bytes(b"no image at all")


def truncate(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def write_float_image(path):
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(path.with_suffix(".tiff"))


@pytest.mark.parametrize("spoil", [write_garbage, truncate, write_float_image])
def test_unreadable_image_is_named_when_the_folder_is_loaded(tmp_path, spoil):
    save_images(tmp_path, {"a": 3, "b": 3})
    spoil(tmp_path / "b" / "broken.png")
    with pytest.raises(ValueError, match=r"b/broken\..* cannot be read as an image"):
        load_data(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "at least two classes, got 0"),
        ({"a": 5}, "got 1"),
        ({"a": 5, "b": 0}, "b must hold at least three images"),
    ],
)
def test_empty_folders_and_classes_raise(tmp_path, counts, message):
    save_images(tmp_path, counts)
    with pytest.raises(ValueError, match=message):
        load_data(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    "name", ["", "mnist", "digits:8", "folder:", "folder", "torchvision:", "hub:x"]
)
def test_unknown_names_raise(name):
    with pytest.raises(ValueError, match="data must be"):
        load_data(name)


def test_missing_folder_and_bad_size_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_data(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match="image_size must be positive, got 0"):
        load_data("digits", image_size=0)


class StubPairs(list):
    """What a class of torchvision.datasets looks like: pairs of a PIL image and a label."""

    calls: list = []

    def __init__(self, root, chosen, download):
        self.calls.append((chosen, download))
        count = 30 if chosen in (True, "train") else 7
        super().__init__(
            (Image.new("RGB", (10, 6), (index, 0, 0)), index % 3) for index in range(count)
        )


class WithTrain(StubPairs):
    classes = ["zero", "one", "two"]

    def __init__(self, root, train=True, transform=None, download=False):
        super().__init__(root, train, download)


class WithSplit(StubPairs):
    def __init__(self, root, split="train", download=False):
        super().__init__(root, split, download)


class WithNeither(StubPairs):
    def __init__(self, root, download=False):
        raise AssertionError("must not be built")


@pytest.fixture
def torchvision(monkeypatch):
    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(
        WithTrain=WithTrain, WithSplit=WithSplit, WithNeither=WithNeither
    )
    monkeypatch.setitem(sys.modules, "torchvision", module)
    monkeypatch.setattr(StubPairs, "calls", [])


@pytest.mark.parametrize(
    ("name", "calls", "class_names"),
    [
        ("WithTrain", [(True, True), (False, True)], ("zero", "one", "two")),
        ("WithSplit", [("train", True), ("test", True)], ("0", "1", "2")),
    ],
)
def test_torchvision_keeps_its_own_test_split(torchvision, name, calls, class_names):
    splits = load_data(f"torchvision:{name}", image_size=5)
    assert StubPairs.calls == calls
    assert splits.class_names == class_names and splits.image_shape == (3, 5, 5)
    assert [len(getattr(splits, name)) for name in SPLITS] == [27, 3, 7]
    assert sorted(as_tensors(splits.calibration)[1].tolist()) == [0, 1, 2]
    training = torch.cat([as_tensors(part)[0] for part in (splits.train, splits.calibration)])
    levels = ((training[:, 0, 0, 0] + 1) * 127.5).round().int()
    assert sorted(levels.tolist()) == list(range(30))


def test_torchvision_decodes_what_is_read_and_knows_its_labels(torchvision, monkeypatch):
    monkeypatch.setattr(
        WithTrain,
        "targets",
        property(lambda self: [i % 3 for i in range(len(self))]),
        raising=False,
    )
    read = []
    original = list.__getitem__
    monkeypatch.setattr(
        StubPairs, "__getitem__", lambda self, i: read.append(i) or original(self, i), raising=False
    )
    splits = load_data("torchvision:WithTrain", image_size=5)
    assert set(read) == {0}
    image, label = splits.train[4]
    assert read[-1] == round((image[0, 0, 0].item() + 1) * 127.5) and label == read[-1] % 3


@pytest.mark.parametrize(
    ("name", "message"),
    [("Nonesuch", "has no 'Nonesuch'"), ("WithNeither", "must take a train or a split argument")],
)
def test_torchvision_names_what_it_cannot_use(torchvision, name, message):
    with pytest.raises(ValueError, match=message):
        load_data(f"torchvision:{name}")


def test_torchvision_missing_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="needs torchvision, which is not installed"):
        load_data("torchvision:MNIST")


def test_as_tensors_stacks_any_map_style_dataset_and_refuses_an_empty_one():
    splits = load_data("digits")
    subset = torch.utils.data.Subset(splits.test, [5, 2])
    images, labels = as_tensors(subset)
    assert torch.equal(images[1], splits.test[2][0]) and labels.tolist() == [
        splits.test[5][1],
        splits.test[2][1],
    ]
    with pytest.raises(ValueError, match="at least one image"):
        as_tensors(torch.utils.data.Subset(splits.test, []))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [(0, 0, "at least one image"), (3, 2, "one label an image, got 2 for 3")],
)
def test_image_dataset_checks_its_lengths(images, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageDataset(torch.zeros(images, 1, 2, 2), torch.zeros(labels, dtype=torch.int64))


def test_few_labels_takes_as_many_of_each_class():
    labels = torch.tensor([0, 1, 2] * 21 + [7] * 4)
    mask = few_labels(labels, 5, seed=0)
    assert mask.dtype == torch.bool and labels[mask].bincount().tolist() == [5, 5, 5, 0, 0, 0, 0, 4]
    assert torch.equal(mask, few_labels(labels, 5, seed=0))
    assert not torch.equal(mask, few_labels(labels, 5, seed=1))
    with pytest.raises(ValueError, match="per_class must be positive, got 0"):
        few_labels(labels, 0, seed=0)
