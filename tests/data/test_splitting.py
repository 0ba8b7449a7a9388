"""The split by content: no image moves when others come or go, and no part is empty."""

import random
import shutil

import pytest
import torch
from image_folders import contents, save_classes, save_image

from genrep_fast.data import DataRecord, check_class_names, load_data
from genrep_fast.data.splitting import PARTS, rule, split_by_content


def load(root, **options):
    return load_data(f"folder:{root}", image_size=8, **options)


def parts(splits):
    """Image -> part."""
    return {image: part for part in PARTS for image in contents(getattr(splits, part))}


def record_of(splits):
    return DataRecord(splits.class_names, splits.borrowed)


def test_no_image_moves_when_others_come_and_go(tmp_path):
    save_classes(tmp_path, {"a": 60, "b": 60})
    before = parts(load(tmp_path))
    save_classes(tmp_path, {"a": 70, "b": 61, "c": 20}, first=0)
    for index in range(10):
        (tmp_path / "b" / f"{index:03}.png").unlink()
    after = parts(load(tmp_path))
    assert len(after) == 70 + 51 + 20
    common = before.keys() & after.keys()
    assert len(common) == 110 and all(before[image] == after[image] for image in common)


def test_names_and_folders_have_no_say_and_no_order(tmp_path):
    save_classes(tmp_path / "one", {"a": 30, "b": 30})
    paths = list((tmp_path / "one").rglob("*.png"))
    random.Random(0).shuffle(paths)
    for number, path in enumerate(paths):
        target = tmp_path / "two" / path.parent.name / f"{number % 3}" / f"{number}.PNG"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    for part in PARTS:
        assert torch.equal(getattr(one, part).images, getattr(two, part).images)
        assert torch.equal(getattr(one, part).labels, getattr(two, part).labels)


def test_equal_files_are_in_one_part(tmp_path):
    save_classes(tmp_path, {"a": 30, "b": 30})
    for path in list((tmp_path / "a").iterdir()):
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
        shutil.copy(path, tmp_path / "b" / f"from a {path.name}")
    splits = load(tmp_path)
    assert sum(len(getattr(splits, part)) for part in PARTS) == 120
    sets = [set(contents(getattr(splits, part))) for part in PARTS]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 60


def test_the_shares_are_those_of_the_rule():
    digests = [bytes([high, low, *bytes(30)]) for high in range(256) for low in range(0, 256, 16)]
    of_all = [rule(digest, PARTS) for digest in digests]
    shares = [of_all.count(part) / len(digests) for part in PARTS]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.001)
    assert rule(bytes(32), PARTS) == "test" and rule(b"\xff" * 32, PARTS) == "train"
    assert rule(bytes(32), ("train", "calibration")) == "train" and rule(bytes(32), ("x",)) == "x"


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_every_part_has_an_image_of_every_class(tmp_path, count):
    save_classes(tmp_path, {name: count for name in "abcdefgh"})
    splits = load(tmp_path)
    for part in PARTS:
        assert set(getattr(splits, part).labels.tolist()) == set(range(8))
    assert sum(map(len, splits.borrowed.values())) > 0
    assert parts(load(tmp_path)) == parts(splits)


def test_a_part_borrows_the_image_that_is_nearest_to_it():
    def content(number):
        return int(number * 2**48).to_bytes(6, "big") + bytes(26)

    digests = [content(number) for number in (0.9, 0.5, 0.4, 0.8)]
    part_of, borrowed = split_by_content(digests, [0] * 4, PARTS)
    assert borrowed.keys() == {content(0.4), content(0.5)}
    assert set(part_of.values()) == set(PARTS)
    assert part_of[content(0.8)] == part_of[content(0.9)] == "train"


def test_classes_that_share_images_have_every_part_too(tmp_path):
    save_classes(tmp_path, {"a": 3, "b": 1})
    for path in (tmp_path / "a").iterdir():
        shutil.copy(path, tmp_path / "b" / f"same {path.name}")
    splits = load(tmp_path)
    assert all(set(getattr(splits, part).labels.tolist()) == {0, 1} for part in PARTS)


def test_fewer_different_images_than_parts_are_refused(tmp_path):
    save_classes(tmp_path, {"a": 3, "b": 2})
    shutil.copy(tmp_path / "b" / "000.png", tmp_path / "b" / "same.png")
    with pytest.raises(ValueError, match="b must hold at least three different images.*got 2"):
        load(tmp_path)


# What a run keeps


def test_what_a_run_borrowed_stays_where_it_was(tmp_path):
    save_classes(tmp_path, {"a": 3, "b": 3})
    first = load(tmp_path)
    assert first.borrowed
    record = record_of(first)
    save_classes(tmp_path, {"a": 30, "b": 30})
    before, after = parts(first), parts(load(tmp_path, record=record))
    assert len(after) == 60 and all(after[image] == part for image, part in before.items())
    # Without the record they return to where the rule has them.
    anew = parts(load(tmp_path))
    assert any(anew[image] != part for image, part in before.items())


def test_nothing_is_borrowed_from_what_a_run_may_have_trained_on(tmp_path):
    save_classes(tmp_path, {"a": 30, "b": 30})
    splits = load(tmp_path)
    for index in range(len(splits.test)):
        if splits.test.labels[index] == 1:
            (tmp_path / splits.test.path(index)).unlink()
    with pytest.raises(ValueError, match="b must hold an image that the run's split gives to test"):
        load(tmp_path, record=record_of(splits))
    assert len(load(tmp_path).test) > 0


def test_a_record_is_read_as_it_was_written(tmp_path):
    assert DataRecord.read(tmp_path) is None
    record = DataRecord(("a", "é\n<$5_$10>"), {"test": ("0" * 64, "f" * 64), "train": ()})
    record.save(tmp_path)
    assert DataRecord.read(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "7",
        "{}",
        '{"class_names": ["a"]}',
        '{"class_names": [1], "borrowed": {}}',
        '{"class_names": ["a"], "borrowed": {"other": []}}',
        '{"class_names": ["a"], "borrowed": {"test": "ab"}}',
        '{"class_names": ["a"], "borrowed": {"test": ["ab"]}}',
        '{"class_names": ["a"], "borrowed": {"test": ["HASH"], "train": ["HASH"]}}',
    ],
)
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "data.json").write_text(content.replace("HASH", "0" * 64))
    with pytest.raises(ValueError, match=f"{tmp_path}/data.json is damaged"):
        DataRecord.read(tmp_path)


def test_class_names_are_compared_one_by_one():
    check_class_names(["a", "b"], ("a", "b"), "data")
    with pytest.raises(ValueError) as error:
        check_class_names(["a", "c", "d"], ["a", "b"], "data")
    assert str(error.value) == (
        "data must have the same 2 classes, got 3; missing: 'b'; surplus: 'c', 'd'"
    )
    with pytest.raises(ValueError, match=r"surplus: '0', .* and 15 more"):
        check_class_names(list(map(str, range(20))), [], "data")
    with pytest.raises(
        ValueError, match="2 classes, got 2 in another order: 'b', 'a', not 'a', 'b'"
    ):
        check_class_names(["b", "a"], ["a", "b"], "data")


# The rule of versions before


def test_the_random_split_is_that_of_versions_before(tmp_path):
    """Which took files of hidden folders, too, and had labels in the order of text."""
    save_classes(tmp_path, {"10": 20, "9": 20})
    save_image(tmp_path / "9" / ".thumbnails" / "000.png", 1)
    splits = load(tmp_path, split="random")
    assert splits.class_names == ("10", "9")
    assert [len(getattr(splits, part)) for part in PARTS] == [14 + 15, 4, 8]
    generator = torch.Generator().manual_seed(0)
    names = []
    for count in (20, 21):
        order = torch.randperm(count, generator=generator).tolist()
        names.append(sorted(order[-4:]))
    found = [splits.test.path(index) for index in range(8)]
    # "." sorts before digits: the hidden folder's image is the first of its class.
    files = [[f"10/{i:03}.png" for i in range(20)]]
    files.append(["9/.thumbnails/000.png"] + [f"9/{i:03}.png" for i in range(20)])
    expected = [files[label][index] for label in (0, 1) for index in names[label]]
    assert [path[len(str(tmp_path)) + 1 :] for path in found] == expected
