"""Classifications that are written into a folder as images finish, and go on where they ended."""

import collections
import dataclasses
import functools
import json
import os
import pickle
import shutil
import sys
import threading
import time

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import genrep_fast as gf
from genrep_fast.files import only_writer
from genrep_fast.scoring.classifier import collector, output_folder, parts
from genrep_fast.scoring.classifier.description import described, differences, tensors_hash

K = 4
SHAPE = (1, 4, 4)
QUIET = {"progress": False}
SCHEDULER = DDPMScheduler(clip_sample=False)


class Denoiser(nn.Module):
    """The noise that is expected where class y is normal around its mean; counts its rows."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.means = nn.Parameter(0.6 * torch.randn(K, *SHAPE, generator=generator))
        self.rows = 0

    def forward(self, x_t, timesteps, labels):
        self.rows += len(x_t)
        alpha_bar = SCHEDULER.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (1 - alpha_bar).sqrt() * (x_t - alpha_bar.sqrt() * self.means[labels % K])
        return noise / (1 - 0.75 * alpha_bar)


def draw(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % K
    return Denoiser().means.detach()[labels] + 0.5 * torch.randn(
        count, *SHAPE, generator=generator
    ), labels


def make(**options):
    classifier = gf.DiffusionClassifier(
        Denoiser(), SCHEDULER, K, **{"batch_size": 8, "pad_to": 8, **options}
    )
    classifier.calibration = CALIBRATION
    return classifier


def calibration():
    classifier = gf.DiffusionClassifier(Denoiser(), SCHEDULER, K)
    return classifier.calibrate(*draw(40, seed=2), steps=6, **QUIET)


CALIBRATION = calibration()


def batches(images, labels, size=5):
    """A stream that cannot be read twice."""
    return iter(zip(images.split(size), labels.split(size), strict=True))


@pytest.fixture(params=["parquet", "csv"])
def kind(request, monkeypatch):
    """What parts are."""
    monkeypatch.setattr(output_folder, "preferred_kind", lambda: request.param)
    return request.param


@pytest.fixture
def few_rows(monkeypatch):
    """Parts hold four images, and every batch is written."""
    monkeypatch.setattr(parts, "_MOST_ROWS", 4)
    monkeypatch.setattr(output_folder, "_SHARE", float("inf"))


def assert_same(found, expected):
    for field in dataclasses.fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7)), field.name
        else:
            assert a == b, field.name


def part_names(folder):
    return sorted(path.name for path in (folder / "parts").iterdir())


class Interrupted(Exception):
    pass


def breaking(stream, after):
    """A stream that fails after so many batches."""
    for number, batch in enumerate(stream):
        if number == after:
            raise Interrupted
        yield batch


# Results


@pytest.mark.parametrize("strategy", ["race", gf.Full(3), gf.Staged(keep=(2, 1), steps=(1, 3))])
def test_a_folder_holds_what_a_plain_call_returns(tmp_path, kind, few_rows, strategy):
    images, labels = draw(23)
    plain = make()(images, labels=labels, strategy=strategy, **QUIET)
    saved = make()(batches(images, labels), output=tmp_path, strategy=strategy, **QUIET)
    assert len(saved) == 23
    assert part_names(tmp_path) == [f"part-{number:06d}.{kind}" for number in range(6)]
    assert_same(saved.load(), plain)
    # A part at a time, in the order in which images finished.
    read = list(gf.SavedResults(tmp_path))
    assert [len(part) for part in read] == [4] * 5 + [3]
    assert sorted(torch.cat([part.image_ids for part in read]).tolist()) == list(range(23))
    assert torch.equal(read[0].prediction, plain.prediction[read[0].image_ids])


def test_lift_names_and_ids_are_kept(tmp_path, kind):
    images, labels = draw(6)
    names = ["a,b", 'say "c"', "é\n", "", "\udcff", "6"]
    batch = {"pixel_values": images, "labels": labels.tolist(), "names": names}
    batch["image_id"] = torch.tensor([7, 3, 2**32 - 1, 0, 11, 5])
    classifier = make(null_class=K)
    saved = classifier([batch], strategy=gf.Full(2), output=tmp_path, **QUIET).load()
    order = batch["image_id"].argsort()
    plain = classifier([batch], strategy=gf.Full(2), **QUIET)
    assert plain.names == names and torch.equal(plain.image_ids, batch["image_id"])
    assert torch.equal(saved.image_ids, batch["image_id"][order])
    assert torch.equal(saved.lift, plain.lift[order]) and torch.equal(saved.labels, labels[order])
    assert saved.names == ["", 'say "c"', "6", "a,b", "\\udcff", "é\\n"]
    with_ids = classifier(
        images, image_ids=batch["image_id"], labels=labels, strategy=gf.Full(2), **QUIET
    )
    assert torch.equal(with_ids.log_likelihood, plain.log_likelihood)


def test_the_files_are_read_by_pandas(tmp_path, kind):
    import pandas

    images, labels = draw(9)
    result = make()(batches(images, labels), output=tmp_path, **QUIET).load()
    if kind == "parquet":
        table = pandas.read_parquet(tmp_path / "parts")
        evidence = np.stack(table["evidence"])
    else:
        (path,) = (tmp_path / "parts").iterdir()
        table = pandas.read_csv(path)
        evidence = np.stack([np.array(cell.split(), np.float32) for cell in table["evidence"]])
    table["row"] = range(9)
    order = table.sort_values("image_id")["row"].to_numpy()
    assert np.array_equal(evidence[order], result.evidence.numpy())
    assert table["prediction"].to_numpy()[order].tolist() == result.prediction.tolist()
    assert table["label"].to_numpy()[order].tolist() == labels.tolist()


def test_what_results_depend_on_is_written_beside_them(tmp_path):
    images, labels = draw(5)
    classifier = make()
    saved = classifier(images, output=tmp_path, seed=3, strategy=gf.Race(order="signal"), **QUIET)
    settings = json.loads((tmp_path / "classification.json").read_text())
    assert settings == saved.settings
    assert settings["strategy"] == {
        "name": "Race",
        "max_steps": None,
        "order": "signal",
        "weights": "calibrated",
        "correlation": "measured",
    }
    assert (settings["seed"], settings["confidence"], settings["pad_to"]) == (3, 0.99, 8)
    assert settings["scheduler"]["_class_name"] == "DDPMScheduler"
    assert settings["scheduler"]["beta_schedule"] == "linear"
    assert settings["denoiser"]["class"].endswith("Denoiser")
    hashed = tensors_hash({"0.means": classifier._network.denoiser.means})
    assert settings["denoiser"]["parameters"] == hashed
    assert settings["versions"]["genrep_fast"] == gf.__version__
    assert len(settings["calibration"]) == 32 and settings["dtype"] == "torch.float32"
    assert settings["temperature"] == saved.load().temperature


def test_without_pyarrow_parts_are_csv(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    images, labels = draw(3)
    make()(images, output=tmp_path / "a", **QUIET)
    assert part_names(tmp_path / "a") == ["part-000000.csv"]
    monkeypatch.undo()
    # A folder stays what it is.
    make()(images, output=tmp_path / "a", **QUIET)
    make()(images, output=tmp_path / "b", **QUIET)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs pyarrow: pip install .*\[parquet\]"):
        make()(images, output=tmp_path / "b", **QUIET)


# Going on


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_call_goes_on_with_the_same_bits(tmp_path, kind, few_rows, after):
    images, labels = draw(23)
    whole = make()(batches(images, labels), output=tmp_path / "whole", **QUIET).load()
    classifier = make()
    with pytest.raises(Interrupted):
        classifier(breaking(batches(images, labels), after), output=tmp_path / "o", **QUIET)
    kept = gf.SavedResults(tmp_path / "o")
    assert 0 < len(kept) <= 5 * after
    evaluated = int(kept.load().evaluations.sum())
    before = {path: path.read_bytes() for path in (tmp_path / "o" / "parts").iterdir()}
    resumed = make()
    found = resumed(batches(images, labels), output=tmp_path / "o", **QUIET).load()
    assert_same(found, whole)
    assert int(found.evaluations.sum()) - evaluated <= resumed._network.denoiser.rows
    assert {path: path.read_bytes() for path in before} == before
    # All have finished: the network has nothing to do.
    done = make()
    again = done(batches(images, labels), output=tmp_path / "o", **QUIET).load()
    assert_same(again, whole)
    assert done._network.denoiser.rows == 0


def test_what_has_finished_is_kept_whatever_ends_a_call(tmp_path, monkeypatch):
    images, labels = draw(20)
    # Nothing but the first batch is written before the end.
    monkeypatch.setattr(output_folder, "_SHARE", 1e-12)
    original, finished = collector.Recorder.add, []

    def add(recorder, contest, *arguments):
        finished.append(contest.index)
        return original(recorder, contest, *arguments)

    monkeypatch.setattr(collector.Recorder, "add", add)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    def not_finite(*arguments):
        return torch.full_like(arguments[0], torch.nan)

    for name, error, act in (
        ("interrupt", KeyboardInterrupt, interrupt),
        ("output", ValueError, not_finite),
        ("memory", MemoryError, lambda *arguments: bytearray(2**62)),
    ):
        classifier = make()
        own = classifier._network.denoiser.forward
        calls = []

        def forward(*arguments, own=own, act=act, calls=calls):
            calls.append(1)
            return own(*arguments) if len(calls) < 8 else act(*arguments)

        classifier._network.denoiser.forward = forward
        finished.clear()
        with pytest.raises(error):
            classifier(batches(images, labels), output=tmp_path / name, **QUIET)
        kept = gf.SavedResults(tmp_path / name).load()
        assert 0 < len(kept) < 20 and kept.decided.all(), name
        assert kept.image_ids.tolist() == sorted(finished)
        assert not list((tmp_path / name).rglob(".*"))


def test_images_that_the_deadline_leaves_are_run_again(tmp_path, monkeypatch):
    images, labels = draw(20)
    whole = make()(images, labels=labels, **QUIET)
    classifier = make()
    own = classifier._network.denoiser.forward

    def slow(*arguments):
        time.sleep(0.02)
        return own(*arguments)

    classifier._network.denoiser.forward = slow
    with pytest.warns(UserWarning, match="deadline: the stream was left after"):
        saved = classifier(batches(images, labels), output=tmp_path, deadline=0.1, **QUIET)
    assert len(saved) < 20
    found = make()(batches(images, labels), output=tmp_path, **QUIET).load()
    assert_same(found, whole)
    # Nothing has finished.
    with pytest.warns(UserWarning, match="deadline"):
        empty = make()(batches(images, labels), output=tmp_path / "e", deadline=1e-9, **QUIET)
    assert len(empty) == 0 and list(empty) == []
    with pytest.raises(ValueError, match="no image has finished"):
        empty.load()


def test_memory_holds_no_more_than_the_newest_part(tmp_path, few_rows, monkeypatch):
    sizes = []

    def measure(recorder):
        kept = {name: value for name, value in vars(recorder).items() if name != "_folder"}
        sizes.append(len(pickle.dumps(kept)) + len(pickle.dumps(vars(recorder._folder))))
        recorder.write()

    monkeypatch.setattr(collector.Recorder, "write_if_due", measure)
    stream = (draw(3, seed=number) for number in range(24))
    saved = make()(stream, output=tmp_path, **QUIET)
    assert len(saved) == 72 and len(sizes) > 40
    assert max(sizes[-20:]) <= 1.1 * max(sizes[:20])


def test_the_newest_part_grows(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder, "_SHARE", float("inf"))
    images, labels = draw(20)
    seen = []

    def stream():
        for batch in batches(images, labels):
            if (tmp_path / "parts").is_dir():
                seen.append((part_names(tmp_path), len(gf.SavedResults(tmp_path))))
            yield batch

    make()(stream(), output=tmp_path, **QUIET)
    names, counts = zip(*seen, strict=True)
    assert set(map(tuple, names)) == {("part-000000.parquet",)}
    assert list(counts) == sorted(set(counts))


def test_writing_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    part = parts.Part(make()(draw(1)[0], **QUIET), np.array([-1]), ["0" * 16])
    now = [0.0]

    def write(path, content):
        now[0] += 2

    monkeypatch.setattr(output_folder.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(output_folder, "write_atomically", write)
    folder = output_folder.OutputFolder(tmp_path, {"num_classes": K, "null_class": None})
    assert folder.is_due()
    folder.begin()
    folder.write(part, complete=False)
    now[0] += 39
    assert not folder.is_due()
    now[0] += 2
    assert folder.is_due()


def test_the_bar_counts_what_had_finished(tmp_path, capsys):
    images, labels = draw(10)
    make()((images[:6], labels[:6]), output=tmp_path, **QUIET)
    make()((images, labels), output=tmp_path)
    told = capsys.readouterr().err
    assert "classify: about" in told and "10/10" in told and "accuracy=" in told


# What is refused


def test_other_settings_are_refused_with_what_differs(tmp_path):
    images, labels = draw(4)
    make()(images, output=tmp_path, **QUIET)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = make()
    with torch.no_grad():
        other._network.denoiser.means[0] += 1e-6
    cosine = make()
    cosine.scheduler = DDPMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2")
    recalibrated = make()
    recalibrated.calibration = dataclasses.replace(CALIBRATION, labels=None)
    for classifier, call, phrase in (
        (make(), {"seed": 1}, "seed is 0 there and 1 here"),
        (make(), {"confidence": 0.9}, "confidence is 0.99 there and 0.9 here"),
        (make(), {"budget": 12}, "budget is null there and 12 here"),
        (make(), {"strategy": "full"}, 'strategy.name is "Race" there and "Full" here'),
        (make(), {"strategy": gf.Race(max_steps=3)}, "max_steps is null there and 3 here"),
        (make(pad_to=9), {}, "pad_to is 8 there and 9 here"),
        (make(dtype=torch.float64), {}, 'dtype is "torch.float32" there'),
        (make(null_class=K), {}, "null_class is null there and 4 here"),
        (other, {}, "denoiser.parameters is"),
        (cosine, {}, 'scheduler.beta_schedule is "linear" there and "squaredcos_cap_v2" here'),
        (recalibrated, {}, "calibration is"),
    ):
        with pytest.raises(ValueError, match="holds images of other settings") as error:
            classifier(images, output=tmp_path, **call, **QUIET)
        assert phrase in str(error.value)
        assert str(error.value).startswith(f"output: {tmp_path} holds")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    # Batches are filled up to one size: how many rows of them count does not matter.
    assert len(make(batch_size=4)(images, output=tmp_path, **QUIET)) == 4


def test_other_images_and_labels_are_refused(tmp_path):
    images, labels = draw(8)
    make()((images, labels), output=tmp_path, **QUIET)
    swapped = images[[0, 2, 1, *range(3, 8)]]
    with pytest.raises(ValueError, match="the image with id 1 is not the one that .* holds under"):
        make()((swapped, labels), output=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="image with id 2 has the label 2 in .* and the label 3"):
        make()((images, labels.clone().index_fill(0, torch.tensor(2), 3)), output=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="image with id 0 has the label 0 in .* and no label now"):
        make()(images, output=tmp_path, **QUIET)
    # Their own ids tell images apart, in whatever order they come.
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    again = make()
    saved = again((images[order], labels[order]), image_ids=order, output=tmp_path, **QUIET)
    assert len(saved) == 8 and again._network.denoiser.rows == 0
    # More images under other ids join them.
    more, more_labels = draw(3, seed=5)
    grown = make()((more, more_labels), image_ids=[20, 30, 40], output=tmp_path, **QUIET).load()
    assert grown.image_ids.tolist() == [*range(8), 20, 30, 40]


def test_folders_of_others_are_refused(tmp_path):
    images, _ = draw(3)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds 'notes.txt' and no classification.json"):
        make()(images, output=tmp_path, **QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(OSError, match="cannot be used as a folder"):
        make()(images, output=tmp_path / "notes.txt", **QUIET)
    with pytest.raises(TypeError, match="output must be the path of a folder, got int"):
        make()(images, output=3, **QUIET)
    with pytest.raises(FileNotFoundError, match="classification.json does not exist"):
        gf.SavedResults(tmp_path)
    with only_writer(tmp_path / "used"):
        pass
    uncalibrated = gf.DiffusionClassifier(Denoiser(), SCHEDULER, K)
    with pytest.raises(ValueError, match="output: a race goes on with the calibration"):
        uncalibrated(images, output=tmp_path / "o", **QUIET)
    # Images that are refused leave nothing.
    with pytest.raises(ValueError, match="images must be"):
        make()(torch.zeros(2, 3), output=tmp_path / "o", **QUIET)
    assert not (tmp_path / "o").exists()


def test_two_writers_are_one_too_many(tmp_path):
    images, _ = draw(3)
    errors = []

    def write():
        try:
            make()(images, output=tmp_path, **QUIET)
        except BlockingIOError as error:
            errors.append(str(error))

    thread = threading.Thread(target=write)
    with only_writer(tmp_path):
        thread.start()
        thread.join()
    assert len(errors) == 1 and "is in use by another run" in errors[0]
    assert len(make()(images, output=tmp_path, **QUIET)) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"x" * 1000),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.symlink_to(path)),
    ],
    ids=["torn", "empty", "garbage", "folder", "pipe", "loop"],
)
def test_a_damaged_part_is_named_and_may_be_removed(tmp_path, kind, few_rows, damage):
    images, labels = draw(10)
    whole = make()(batches(images, labels), output=tmp_path, **QUIET).load()
    path = tmp_path / "parts" / f"part-000001.{kind}"
    damage(path)
    for use in (
        lambda: make()(batches(images, labels), output=tmp_path, **QUIET),
        lambda: gf.SavedResults(tmp_path).load(),
    ):
        with pytest.raises(ValueError, match="damaged or no part of this folder") as error:
            use()
        assert str(path) in str(error.value) and "remove it" in str(error.value)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert_same(make()(batches(images, labels), output=tmp_path, **QUIET).load(), whole)


def test_a_damaged_number_is_noticed(tmp_path):
    """Pages of Parquet have checksums."""
    images, labels = draw(40)
    saved = make()(batches(images, labels), output=tmp_path, **QUIET)
    path = tmp_path / "parts" / "part-000000.parquet"
    content = bytearray(path.read_bytes())
    evidence = next(iter(saved)).evidence.numpy().tobytes()
    content[content.index(evidence[4:16])] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        saved.load()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"{", "classification.json is damaged"),
        (b"[]", "format must be 1"),
        ({"format": 2}, "format must be 1"),
        ({"parts": "orc"}, 'parts must be "parquet" or "csv"'),
        ({"num_classes": True}, "num_classes must be at least 2"),
        ({"num_classes": "4"}, "num_classes must be at least 2"),
        ({"temperature": None}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
    ],
)
def test_damaged_settings_are_named(tmp_path, value, message):
    images, _ = draw(2)
    make()(images, output=tmp_path, **QUIET)
    file = tmp_path / "classification.json"
    if isinstance(value, dict):
        value = json.dumps(json.loads(file.read_text()) | value).encode()
    file.write_bytes(value)
    for use in (
        lambda: gf.SavedResults(tmp_path),
        lambda: make()(images, output=tmp_path, **QUIET),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_an_image_in_two_parts_is_refused(tmp_path, few_rows):
    images, labels = draw(10)
    make()(batches(images, labels), output=tmp_path, **QUIET)
    folder = tmp_path / "parts"
    shutil.copy(folder / "part-000000.parquet", folder / "part-000007.parquet")
    with pytest.raises(ValueError, match="is in .*part-000000.parquet and in part-000007.parquet"):
        make()(batches(images, labels), output=tmp_path, **QUIET)


def test_a_full_disk_keeps_what_was_written(tmp_path, few_rows, monkeypatch):
    images, labels = draw(20)
    whole = make()(batches(images, labels), output=tmp_path / "whole", **QUIET).load()
    original, writes = output_folder.write_atomically, []

    def full(path, content):
        writes.append(path)
        if len(writes) > 4:
            raise OSError(28, "No space left on device", str(path))
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "write_atomically", full)
        with pytest.raises(OSError, match="No space left on device"):
            make()(batches(images, labels), output=tmp_path / "o", **QUIET)
    assert len(gf.SavedResults(tmp_path / "o")) > 0
    assert_same(make()(batches(images, labels), output=tmp_path / "o", **QUIET).load(), whole)


# Batches of other libraries


def test_batches_may_be_dictionaries():
    images, labels = draw(10)
    classifier = make()
    expected = classifier((images, labels), **QUIET)
    whole = {"pixel_values": images, "labels": labels, "input_ids": [0] * 10}
    items = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
    for stream in (
        whole,
        collections.UserDict(whole),
        [
            {"images": images[:7], "label": labels[:7].tolist()},
            {"image": images[7:], "label": labels[7:]},
        ],
        ({"image": list(images[n : n + 1]), "label": int(labels[n])} for n in range(10)),
        DataLoader(items, batch_size=4),
    ):
        found = classifier(stream, **QUIET)
        assert torch.equal(found.log_likelihood, expected.log_likelihood)
        assert torch.equal(found.labels, labels)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"label": [1]}, "labels must be one an image, got 1 for 2"),
        ({"name": ["a"]}, "names must be one an image, got 1 for 2"),
        ({"name": [1, 2]}, "names must be text, got int"),
        ({"image_id": [1, 1]}, r"image_ids must be distinct.*got \[1\] more than once"),
        ({"image_id": [1, -1]}, r"image_ids must lie in \[0, 2\*\*32\)"),
        ({"image_id": ["a", "b"]}, "image_ids must be integers"),
        ({"image_id": [1]}, "image_ids must be one an image, got 1"),
    ],
)
def test_other_dictionaries_are_refused(beside, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()([{"image": torch.zeros(2, *SHAPE), **beside}], **QUIET)


def test_dictionaries_without_images_are_refused():
    wanted = "images: a dictionary must hold pixel_values, images or image, got "
    for batch, found in (({"x": 1, "y": 2}, "'x', 'y'"), ({}, "an empty one")):
        with pytest.raises(TypeError, match=wanted + found):
            make()(batch, **QUIET)


def test_ids_of_batches_are_distinct_over_the_stream():
    def stream(*ids):
        return ({"image": draw(2)[0], "image_id": own} for own in ids)

    with pytest.raises(ValueError, match=r"got \[1\] more than once \(batch 1 of the stream\)"):
        make()(stream([0, 1], [1, 2]), **QUIET)
    mixed = [{"image": draw(2)[0], "image_id": [0, 1]}, draw(2)[0]]
    with pytest.raises(ValueError, match="image_ids must come with every batch or with none"):
        make()(mixed, **QUIET)
    with pytest.raises(ValueError, match="image_ids must come with every batch or with none"):
        make()(mixed[::-1], **QUIET)


class Numbered(IterableDataset):
    """Images that every worker gives a share of."""

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        images, labels = draw(11)
        for n in range(worker.id, 11, worker.num_workers):
            yield {"pixel_values": images[n], "labels": labels[n], "image_id": n}


def test_loaders_with_workers_bring_ids_in_any_order(tmp_path):
    images, labels = draw(11)
    expected = make()((images, labels), **QUIET)
    loader = DataLoader(Numbered(), batch_size=3, num_workers=2)
    saved = make()(loader, output=tmp_path, **QUIET)
    assert_same(saved.load(), expected)


# Descriptions


def test_networks_are_described_by_their_weights():
    first, second = Denoiser(), Denoiser()
    assert described(first) == described(second)
    wrapped = lambda x, t, y: first(x, t, y)  # noqa: E731
    compiled = nn.ModuleDict({"_orig_mod": first})
    methods = (first.forward, wrapped, functools.partial(wrapped, t=0), compiled)
    assert {described(way)["parameters"] for way in methods} == {described(first)["parameters"]}
    with torch.no_grad():
        second.means[0, 0, 0, 0] += 1e-7
    assert list(differences(described(first), described(second)))[0].startswith("parameters is")
    assert described(lambda x, t, y: x)["parameters"] is None
    assert described(gf.Staged()) == {
        "name": "Staged",
        "keep": [5, 1],
        "steps": [50, 500],
        "weights": "uniform",
    }


def test_half_precision_weights_are_hashed():
    values = {"w": torch.zeros(3, dtype=torch.bfloat16), "n": torch.tensor(3)}
    changed = {**values, "n": torch.tensor(4)}
    assert tensors_hash(values) == tensors_hash(dict(reversed(values.items())))
    assert tensors_hash(values) != tensors_hash(changed)
    assert tensors_hash({"w": torch.zeros(2, device="meta")})
    strided = torch.arange(8.0)[::2]
    assert tensors_hash({"w": strided}) == tensors_hash({"w": strided.clone()})
