"""Which files of a folder are its images, whose class they are, and which folders are splits."""

import os
import subprocess
import sys
import unicodedata
import warnings

import pytest
from image_folders import contents, save_classes, save_image

from genrep_fast.data import load_data

PARTS = ("train", "calibration", "test")


def load(root, **options):
    return load_data(f"folder:{root}", image_size=8, **options)


def images(splits):
    return [content for part in PARTS for content in contents(getattr(splits, part))]


# The walk


def test_hidden_files_and_folders_are_left_out_at_any_depth(tmp_path):
    save_classes(tmp_path, {"a": 5, "b": 5, ".c": 5})
    for path in ("a/.thumbnails/1.png", "a/deep/.git/x/1.png", "a/._1.png", "a/deep/1.png"):
        save_image(tmp_path / path, len(path))
    splits = load(tmp_path)
    assert splits.class_names == ("a", "b") and len(set(images(splits))) == 5 + 1 + 5


def test_links_are_followed_and_what_is_reached_twice_counts_once(tmp_path):
    root = save_classes(tmp_path / "data", {"a": 5, "b": 5})
    elsewhere = tmp_path / "elsewhere"
    save_image(elsewhere / "sub" / "x.png", 101)
    save_image(elsewhere / "y.png", 102)
    (root / "a" / "more").symlink_to(elsewhere)
    (root / "a" / "again").symlink_to(elsewhere / "sub")
    (root / "a" / "link.png").symlink_to(root / "a" / "000.png")
    (root / "b" / "link.png").symlink_to(elsewhere / "y.png")
    (root / "c").symlink_to(save_classes(tmp_path / "others", {"c": 3}, first=1) / "c")
    splits = load(root)
    assert splits.class_names == ("a", "b", "c")
    found = images(splits)
    assert len(found) == 5 + 2 + 5 + 1 + 3 and len(set(found)) == len(found) - 1


@pytest.mark.parametrize("target", [".", "a", "a/deep", "..", "/"])
def test_links_to_folders_above_end(tmp_path, target):
    root = save_classes(tmp_path / "data", {"a": 5, "b": 5})
    save_image(root / "a" / "deep" / "x.png", 1)
    (root / "a" / "deep" / "up").symlink_to(root / target)
    if target not in ("a", "a/deep"):
        (root / "up").symlink_to(root / target)
    splits = load(root)
    assert splits.class_names == ("a", "b") and len(images(splits)) == 11


def test_two_names_of_one_folder_are_no_two_classes(tmp_path):
    save_classes(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "c").symlink_to(tmp_path / "b")
    with pytest.raises(ValueError, match="one folder a class, got 'b' and 'c', which are the same"):
        load(tmp_path)


def test_files_that_are_no_images_are_named_in_one_warning(tmp_path):
    save_classes(tmp_path, {"a": 5, "b": 5})
    for path in ("README", "loose.png", "a/notes.txt", "a/page.eps", "b/deep/labels.csv"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("%!PS-Adobe-3.0 EPSF-3.0")
    (tmp_path / "a" / "gone.png").symlink_to("nowhere")
    (tmp_path / "a" / "itself.png").symlink_to("itself.png")
    with pytest.warns(UserWarning) as caught:
        splits = load(tmp_path)
    assert len(caught) == 1 and len(images(splits)) == 10
    message = str(caught[0].message)
    assert "7 files are no images" in message and "and 2 more" in message
    assert message.startswith(f"data folder {tmp_path}:") and "'a/notes.txt'" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("split", ["content", "random"])
def test_a_pipe_is_never_opened(tmp_path, split):
    save_classes(tmp_path, {"a": 5, "b": 5})
    os.mkfifo(tmp_path / "a" / "pipe.png")
    program = "import sys; from genrep_fast.data import load_data; "
    program += f"load_data('folder:{tmp_path}', split='{split}')"
    # In a process that ends: where the pipe is opened, it waits for a writer.
    command = [sys.executable, "-c", program]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "pipe.png" in finished.stderr
    assert finished.returncode == (0 if split == "content" else 1)


# Classes


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "9", "2", "0", "1"], ["0", "1", "2", "9", "10"]),
        (["007", "7", "-1"], ["-1", "007", "7"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["b", "B", "a"], ["B", "a", "b"]),
    ],
)
def test_classes_are_sorted_and_numbers_as_numbers(tmp_path, names, order):
    save_classes(tmp_path, dict.fromkeys(names, 3))
    assert list(load(tmp_path).class_names) == order
    by_text = sorted(names)
    assert list(load(tmp_path, split="random").class_names) == by_text


def test_class_names_are_any_text(tmp_path):
    names = sorted(["$5_$10", "<b>", 'it\'s "x"', "a\nb", " ", "ü", "x" * 255])
    save_classes(tmp_path, dict.fromkeys(names, 3))
    assert list(load(tmp_path).class_names) == names


def test_class_names_do_not_depend_on_the_form_in_which_a_filesystem_keeps_them(tmp_path):
    decomposed = unicodedata.normalize("NFD", "é")
    save_classes(tmp_path, {"a": 3, decomposed: 3})
    assert load(tmp_path).class_names == ("a", "é")
    try:
        save_classes(tmp_path, {"é": 3})
        both = len(list(tmp_path.iterdir())) == 3
    except OSError:
        both = False
    if both:
        with pytest.raises(ValueError, match="must hold one folder a class"):
            load(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a filesystem that takes any bytes")
def test_names_that_are_no_text(tmp_path):
    save_classes(tmp_path, {"a": 5, "b": 5})
    os.rename(tmp_path / "a" / "000.png", os.fsencode(tmp_path / "a") + b"/\xff.png")
    assert len(images(load(tmp_path))) == 10
    os.mkdir(os.fsencode(tmp_path) + b"/\xff\xfe")
    with pytest.raises(ValueError, match=r"class folder b'.*\\xff\\xfe' must have a name in UTF-8"):
        load(tmp_path)


# Folders of splits


@pytest.mark.parametrize(
    ("folders", "sizes"),
    [
        ({"train": 10, "val": 3, "test": 4}, [20, 6, 8]),
        ({"train": 10, "validation": 3, "test": 4}, [20, 6, 8]),
        ({"Training": 10, "Valid": 1, "Testing": 4}, [20, 2, 8]),
        ({"train": 10, "test": 4}, [None, None, 8]),
        ({"train": 10, "valid": 3}, [None, None, 6]),
    ],
)
def test_a_root_of_train_and_others_holds_the_splits(tmp_path, folders, sizes):
    for number, (folder, count) in enumerate(folders.items()):
        save_classes(tmp_path / folder, {"x": count, "y": count}, first=number)
    splits = load(tmp_path)
    assert splits.class_names == ("x", "y")
    for part, size in zip(PARTS, sizes, strict=True):
        assert size is None or len(getattr(splits, part)) == size
        assert set(getattr(splits, part).labels.tolist()) == {0, 1}
    assert len(splits.train) + len(splits.calibration) >= 20


def test_other_folders_beside_splits_are_named(tmp_path):
    for folder in ("train", "test", "devkit"):
        save_classes(tmp_path / folder, {"x": 3, "y": 3})
    with pytest.warns(UserWarning) as caught:
        load(tmp_path)
    assert "'devkit'" in str(caught[0].message)
    assert "test images are training images too (the first is 'test/x/" in str(caught[1].message)


def test_splits_of_other_classes_are_refused_by_name(tmp_path):
    save_classes(tmp_path / "train", {"x": 4, "y": 4})
    save_classes(tmp_path / "test", {"x": 4, "z": 4})
    with pytest.raises(ValueError, match=r"data: .*test must have .*missing: 'y'; surplus: 'z'"):
        load(tmp_path)
    (tmp_path / "test" / "z").rename(tmp_path / "test" / "y")
    save_classes(tmp_path / "valid", {"x": 1, "y": 1})
    save_classes(tmp_path / "val", {"x": 1, "y": 1})
    with pytest.raises(ValueError, match="one validation split, got 'val' and 'valid'"):
        load(tmp_path)


def test_a_class_without_images_in_a_split_is_named(tmp_path):
    save_classes(tmp_path / "train", {"x": 4, "y": 1})
    save_classes(tmp_path / "test", {"x": 4, "y": 4})
    with pytest.raises(ValueError, match=r"train/y must hold at least two images, .*got 1"):
        load(tmp_path)
    save_classes(tmp_path / "train", {"x": 4, "y": 2})
    (tmp_path / "val" / "x").mkdir(parents=True)
    (tmp_path / "val" / "y").mkdir()
    with pytest.raises(ValueError, match="val/x must hold at least one image, got 0"):
        load(tmp_path)


def test_a_class_may_be_called_train(tmp_path):
    save_classes(tmp_path, {"train": 3, "test": 3, "bus": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path).class_names == ("bus", "test", "train")


def test_the_walk_tells_how_far_it_is(tmp_path):
    save_classes(tmp_path, {"a": 3, "b": 4})
    seen = []
    load(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 7) for done in range(1, 8)]
