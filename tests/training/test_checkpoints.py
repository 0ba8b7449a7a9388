"""What a run writes and reads again: checkpoints that run nothing and notice damage."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_runs import NEWEST, change_json, failure, make_splits, resume, snapshot, train

from genrep_fast import GenRepPipeline
from genrep_fast.training import Trainer, TrainingConfig, checkpoints
from genrep_fast.training.checkpoints import newest_checkpoint, read_checkpoint, save_checkpoint

BEFORE = "step-0000003"
FILES = (
    "averages.safetensors",
    "bank.safetensors",
    "model.safetensors",
    "momentum.safetensors",
    "optimizer.safetensors",
    "state.json",
    "teacher.safetensors",
)


def flip(path, position=None, bit=0):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1 << bit
    path.write_bytes(content)


def write_manifest(folder, change=None):
    """Make the manifest one of the files that are there, as far as they can be read; `change` gets
    its content first.
    """
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in list(manifest["files"]):
        path = folder / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": checkpoints._hash(path)}
    if change is not None:
        change(manifest)
    (folder / "manifest.json").write_bytes(checkpoints._canonical(manifest))


# What a checkpoint holds


def test_a_checkpoint_holds_json_and_safetensors_alone(finished):
    folder = newest_checkpoint(Path(finished[0].output))
    assert sorted(path.name for path in folder.iterdir()) == sorted((*FILES, "manifest.json"))
    for path in folder.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert load_file(path)


PICKLES = (
    "custom_checkpoint_0.pkl",
    "optimizer.bin",
    "scheduler.bin",
    "random_states_0.pkl",
    "scaler.pt",
    "sampler.bin",
    "dl_state_dict.bin",
    "pytorch_model.bin",
    "model.pt",
    "state.pkl",
)


@pytest.mark.parametrize("instead", [None, "model.safetensors", "state.json", "manifest.json"])
def test_nothing_in_a_checkpoint_is_unpickled(copied, newest, finished, tmp_path, instead):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "RAN"),)

    if instead is not None:
        (newest / instead).unlink()
    for name in PICKLES:
        (newest / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises(ValueError, match=f"checkpoint {newest} cannot be read"):
            read_checkpoint(newest)
        (newest / name).unlink()
    for name in PICKLES:
        (newest / name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=f"checkpoint {newest} cannot be read"):
        resume(copied, finished[0])
    for known in FILES:
        (newest / known).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError):
        read_checkpoint(newest)
    assert not (tmp_path / "RAN").exists()


def test_a_checkpoint_of_accelerate_is_refused_with_the_reason(copied, newest, finished):
    shutil.rmtree(newest)
    shutil.rmtree(newest.with_name(BEFORE))
    Trainer(
        dataclasses.replace(finished[0], output=str(copied), resume=True), make_splits()
    ).accelerator.save_state(str(newest))
    with pytest.raises(
        ValueError,
        match=f"{NEWEST} cannot be read .*pickles, which can run code: "
        "train anew in another folder",
    ):
        resume(copied, finished[0])


# Damage


@pytest.mark.parametrize(
    "damage", ["flip", "empty", "half", "longer", "missing", "link", "folder", "pipe"]
)
@pytest.mark.parametrize("file", FILES)
def test_damage_is_named_with_the_checkpoint_before(copied, newest, tmp_path, file, damage):
    path = newest / file
    content = path.read_bytes()
    if damage == "flip":
        flip(path)
    elif damage in ("empty", "half", "longer"):
        path.write_bytes(
            {"empty": b"", "half": content[: len(content) // 2], "longer": content + b" "}[damage]
        )
    else:
        path.unlink()
        (tmp_path / "elsewhere").write_bytes(content)
        make = {
            "missing": lambda: None,
            "link": lambda: path.symlink_to(tmp_path / "elsewhere"),
            "folder": path.mkdir,
        }
        make.get(damage, lambda: os.mkfifo(path))()
    before = snapshot(copied) if damage != "pipe" else None
    with pytest.raises(
        ValueError,
        match=rf"{NEWEST} cannot be read \({file} is .*\); "
        "delete it to resume from the one before, step 3",
    ):
        read_checkpoint(newest)
    assert before is None or snapshot(copied) == before


@pytest.mark.parametrize("kept", [0, 0.5])
@pytest.mark.parametrize("file", ["optimizer.safetensors", "manifest.json"])
def test_the_checkpoint_before_a_damaged_one_serves(copied, newest, finished, file, kept):
    config, expected = finished
    damaged = newest / file
    damaged.write_bytes(damaged.read_bytes()[: int(kept * damaged.stat().st_size)])
    before = snapshot(copied)
    with pytest.raises(
        ValueError,
        match=r"checkpoint .*step-0000004 cannot be read .*delete it to resume from the one before",
    ):
        resume(copied, config)
    assert snapshot(copied) == before
    shutil.rmtree(newest)
    assert all(
        torch.equal(a, b) for a, b in zip(resume(copied, config).parameters, expected, strict=True)
    )


def test_what_a_dead_process_did_not_drop_is_dropped(copied, newest, finished):
    shutil.copytree(newest.with_name("step-0000003"), newest.with_name("step-0000002"))
    resume(copied, finished[0])
    names = sorted(path.name for path in newest.parent.iterdir())
    assert names == ["step-0000003", "step-0000004"]


def test_any_byte_of_the_manifest_counts(newest):
    path = newest / "manifest.json"
    content = path.read_bytes()
    for position in range(0, len(content), 5):
        path.write_bytes(content)
        flip(path, position, position % 8)
        with pytest.raises(ValueError, match=r"manifest.json is damaged.*step 3"):
            read_checkpoint(newest)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"7", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"files": []}', b" " * 2_000_000],
)
def test_a_manifest_of_something_else_is_named(newest, content):
    (newest / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        read_checkpoint(newest)


@pytest.mark.parametrize(
    "files",
    [
        [],
        {"model.safetensors": 3},
        {"model.safetensors": {}},
        {"model.safetensors": {"bytes": "many", "sha256": None}},
    ],
)
def test_a_manifest_of_odd_entries_is_named(newest, files):
    write_manifest(newest, lambda manifest: manifest.update(files=files))
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(newest)


@pytest.mark.parametrize(
    "where",
    [
        "../../secret",
        "{tmp}/secret",
        "../step-0000003/model.safetensors",
        "./model.safetensors",
        "",
    ],
)
def test_a_path_in_the_manifest_is_not_followed(newest, tmp_path, monkeypatch, where):
    (tmp_path / "run" / "secret").write_text("x")
    (tmp_path / "secret").write_text("x")
    name = where.format(tmp=tmp_path)
    write_manifest(
        newest, lambda manifest: manifest["files"].update({name: {"bytes": 1, "sha256": "0" * 64}})
    )
    read = []
    original = checkpoints._hash
    monkeypatch.setattr(checkpoints, "_hash", lambda path: read.append(path.name) or original(path))
    with pytest.raises(ValueError, match="cannot be read .* is missing"):
        read_checkpoint(newest)
    assert not set(read) - set(FILES)


def test_a_manifest_of_another_format_or_step_is_named(newest):
    write_manifest(newest, lambda manifest: manifest.update(format="genrep_fast checkpoint 2"))
    with pytest.raises(
        ValueError, match="has the format 'genrep_fast checkpoint 2', this genrep_fast reads"
    ):
        read_checkpoint(newest)
    write_manifest(
        newest, lambda manifest: manifest.update(format="genrep_fast checkpoint 1", step=5)
    )
    with pytest.raises(ValueError, match="manifest.json is that of step 5"):
        read_checkpoint(newest)
    write_manifest(newest, lambda manifest: manifest.update(step=4))
    read_checkpoint(newest)
    change_json(newest / "state.json", step=3)
    write_manifest(newest)
    with pytest.raises(ValueError, match="state.json is not that of step 4"):
        read_checkpoint(newest)


def test_files_of_the_system_are_no_damage(copied, newest, finished):
    for name in (".DS_Store", "._model.safetensors", ".nfs0000123", "Thumbs.db", "desktop.ini"):
        (newest / name).write_text("x")
        (copied / "checkpoints" / name).write_text("x")
    (newest / ".ipynb_checkpoints").mkdir()
    resume(copied, finished[0])


def test_surplus_files_are_named(newest):
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (newest / name).write_text("x")
    with pytest.raises(ValueError, match="a.txt, b.txt, c.txt and 1 more are no part of it"):
        read_checkpoint(newest)


def test_where_no_checkpoint_is_whole_the_message_says_so(copied, newest):
    flip(newest / "model.safetensors")
    flip(newest.with_name(BEFORE) / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=f"delete {copied}/checkpoints, in which there is no whole one before it, to start",
    ):
        read_checkpoint(newest)


@pytest.mark.parametrize("what", ["file", "link", "empty"])
def test_a_checkpoint_that_is_no_folder_of_files_is_named(copied, newest, finished, what):
    shutil.move(newest, copied / "moved")
    make = {
        "file": newest.touch,
        "link": lambda: newest.symlink_to(copied / "moved"),
        "empty": newest.mkdir,
    }
    make[what]()
    with pytest.raises(
        ValueError,
        match=f"{NEWEST} cannot be read .*(is not a folder|manifest.json is missing).* step 3",
    ):
        resume(copied, finished[0])


def test_a_file_in_the_place_of_the_checkpoints_is_named(copied, finished):
    shutil.rmtree(copied / "checkpoints")
    (copied / "checkpoints").touch()
    with pytest.raises(ValueError, match=f"output: {copied}/checkpoints is not a folder"):
        resume(copied, finished[0])


def test_checkpoints_are_sorted_by_number_and_other_names_left_alone(tmp_path):
    names = [
        "step-0000002",
        "step-10000000",
        "step-9999999",
        "step-0000009 (copy)",
        "step-²",
        "step-x",
        "step-",
        "step-0000011.bak",
    ]
    for name in (*names, ".step-99999999.7.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path).name == "step-10000000"
    content = checkpoints.Checkpoint({"step": 20_000_000}, {})
    save_checkpoint(tmp_path, content)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {*names, "step-20000000", ".step-99999999.7.tmp"} - {
        "step-0000002",
        "step-9999999",
    }


@pytest.mark.parametrize("digits", [1, 12])
def test_a_renamed_checkpoint_of_other_digits_is_read(copied, newest, finished, digits):
    newest.rename(newest.with_name(f"step-{4:0{digits}d}"))
    assert resume(copied, finished[0]).state.step == 4


# Checkpoints that are whole, but of another run


def test_weights_of_another_network_change_nothing(copied, newest, finished):
    config, _ = finished
    cases = {
        "model": "head.1.bias",
        "averages": "head.1.bias",
        "momentum": "head.1.bias",
        "teacher": "head.1.bias",
        "optimizer": "head.1.bias/exp_avg",
    }
    for file, key in cases.items():
        path = newest / f"{file}.safetensors"
        content, tensors = path.read_bytes(), load_file(path)
        for change, message in (
            (lambda t, key=key: t.pop(key), rf"1 missing \({key}\)"),
            (lambda t: t.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
            (
                lambda t, key=key: t.update({key: torch.zeros(7)}),
                rf"{key} is \[7\] float32, not \[3\] float32",
            ),
            (
                lambda t, key=key: t.update({key: t[key].double()}),
                rf"{key} is \[3\] float64, not \[3\] float32",
            ),
        ):
            changed = dict(tensors)
            change(changed)
            save_file(changed, path)
            write_manifest(newest)
            run = Trainer(
                dataclasses.replace(config, output=str(copied), resume=True), make_splits()
            )
            before = [tensor.clone() for tensor in (*run.parameters, *run.averages)]
            with pytest.raises(
                ValueError,
                match=f"checkpoint {newest} is not one of this run: "
                f".*{file}.safetensors.* {message}",
            ):
                run.run()
            assert all(
                torch.equal(a, b)
                for a, b in zip((*run.parameters, *run.averages), before, strict=True)
            )
            assert (
                run.state.step == 0
                and run.state.teacher is None
                and not run.optimizer.state_dict()["state"]
            )
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch": 7}, "micro-batch 7 .* no place in this run"),
        ({"stage": 1}, "stage 1 are no place in this run"),
        ({"teacher": None}, "teacher's part"),
        ({"history": [{"step": 1}]}, "row 1 of the history"),
        ({"history": 7}, "the history is a int"),
        ({"seconds": {"diffusion": 1.0}}, "seconds"),
        (
            {"seconds": {"diffusion": float("nan"), "perception": 1.0, "joint": 1.0}},
            "seconds in state.json must be numbers and finite",
        ),
        ({"schedule": {}}, "schedule in state.json is not"),
        ({"scaler": {"scale": 1.0}}, "scaler .* mixed precision"),
        (
            {"schedule": {"last_epoch": 4, "_step_count": 5, "_last_lr": ["x"]}},
            "schedule .* numbers",
        ),
        (
            {"schedule": {"last_epoch": 4, "_step_count": 5, "_last_lr": []}},
            "0 learning rates for 1",
        ),
        ({"teacher": {"temperature": "x"}}, "teacher's part of state.json must be numbers"),
        ({"teacher": {"temperature": 1.0}}, "state.json lacks"),
        ({"options": 7}, "state.json lacks"),
    ],
)
def test_a_state_of_something_else_is_named(copied, newest, finished, change, message):
    change_json(newest / "state.json", **change)
    write_manifest(newest)
    with pytest.raises(ValueError, match=f"is not one of this run: .*{message}"):
        resume(copied, finished[0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", 1),
        ("batch_size", 9),
        ("learning_rate", 2.1e-3),
        ("gradient_weights", [0.7, 0.4]),
        ("semantic", False),
    ],
)
def test_an_option_that_changed_in_the_configuration_is_named(copied, name, value):
    """As by a flipped bit that leaves another option that could be meant."""
    change_json(copied / "config.json", **{name: value})
    config = TrainingConfig(output=str(copied), resume=True).resumed()
    before = snapshot(copied)
    with pytest.raises(ValueError, match=f"is not one of this run: {name} is .* now, and was "):
        train(config)
    assert snapshot(copied) == before


def test_a_run_goes_on_in_another_place(copied, finished, tmp_path):
    """Copied, reached through a link, and with its backbone elsewhere."""
    config, expected = finished
    shutil.rmtree(copied / "checkpoints" / NEWEST)
    (tmp_path / "link").symlink_to(copied, target_is_directory=True)
    backbone = shutil.copytree(config.backbone, tmp_path / "moved backbone")
    run = resume(tmp_path / "link", config, backbone=str(backbone))
    assert all(torch.equal(a, b) for a, b in zip(run.parameters, expected, strict=True))


def train_scaled(config):
    """With the GradScaler of fp16: steps whose gradients overflow are skipped until the scale has
    fallen often enough.
    """
    accelerator = Accelerator()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
    run = Trainer(config, make_splits(), accelerator)
    original = run.generation_loss

    def large(*arguments, **options):
        loss, parts = original(*arguments, **options)
        return loss * 1e3, parts

    run.generation_loss = large
    run.run()
    return run


@pytest.mark.parametrize("steps", [4, 14])
def test_the_scale_of_fp16_survives_a_checkpoint(finished, tmp_path, monkeypatch, steps):
    lengths = {
        "diffusion_steps": 18,
        "perception_steps": 0,
        "joint_steps": 0,
        "checkpoint_every": 2,
    }
    config = dataclasses.replace(finished[0], **lengths, output=str(tmp_path / "whole"))
    whole = train_scaled(config)
    interrupted = dataclasses.replace(config, output=str(tmp_path / "run"))
    with monkeypatch.context() as patch:

        def checkpoint(run, original=Trainer._checkpoint):
            original(run)
            if run.state.step == steps:
                raise KeyboardInterrupt

        patch.setattr(Trainer, "_checkpoint", checkpoint)
        with pytest.raises(KeyboardInterrupt):
            train_scaled(interrupted)
    resumed = train_scaled(dataclasses.replace(interrupted, resume=True))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))
    scales = [run.accelerator.scaler.state_dict() for run in (resumed, whole)]
    assert scales[0] == scales[1] and scales[0]["scale"] < 2.0**122
    steps_taken = max(
        state["step"].item() for state in whole.optimizer.state_dict()["state"].values()
    )
    assert 0 < steps_taken < 15, "no step was skipped"


# Files that are damaged beside the checkpoints


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[]", b"7", b"[" * 100_000, b'{"data": 7}', b'{"batch_size": "8"}'],
)
def test_a_damaged_configuration_is_one_line(capsys, copied, content):
    (copied / "config.json").write_bytes(content)
    before = snapshot(copied)
    capsys.readouterr()
    assert f"{copied}/config.json is damaged" in failure(
        capsys, "train", "--resume", "--output", copied
    )
    assert snapshot(copied) == before
    line = failure(capsys, "evaluate", "--checkpoint", copied)
    assert f"{copied}/config.json is damaged" in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_sizf", 8),
        ("batch_size", 8.5),
        ("batch_size", True),
        ("batch_size", 0),
        ("learning_rate", "fast"),
        ("teacher", "bbnk"),
        ("gradient_weights", [0.7]),
        ("semantic", 1),
        ("vae", 7),
    ],
)
def test_odd_options_in_the_configuration_are_named(copied, name, value):
    change_json(copied / "config.json", **{name: value})
    with pytest.raises(ValueError, match=rf"config.json is damaged.*{name}"):
        TrainingConfig(output=str(copied), resume=True).resumed()


@pytest.mark.parametrize(
    "content",
    [
        b'{"step": 1',
        b"\xff",
        b"[1]",
        b'{"step": 1}',
        b'{"step": 1, "stage": 0, "loss": "x"}',
        b"\n",
    ],
)
def test_a_damaged_history_is_one_line_and_a_resumed_run_writes_it_again(
    capsys, copied, finished, content
):
    history = copied / "history.jsonl"
    whole = history.read_bytes()
    history.write_bytes(whole + content + b"\n")
    change_json(copied / "config.json", data="digits")
    capsys.readouterr()
    assert f"{history}" in failure(capsys, "evaluate", "--checkpoint", copied)
    change_json(copied / "config.json", data=finished[0].data)
    resume(copied, finished[0])
    assert history.read_bytes() == whole


# Writing


def test_a_full_disk_is_told_and_the_checkpoint_before_is_kept(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished[0], output=str(tmp_path / "run"))
    written = []

    def full(tensors, path, metadata=None):
        if Path(path).name == "optimizer.safetensors":
            written.append(path)
            if len(written) == 3:
                Path(path).write_bytes(b"half")
                raise SafetensorError(
                    "Error while serializing: I/O error: No space left on device (os error 28)"
                )
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        message = (
            r"checkpoint .*step-0000003 cannot be written \(No space left on device\); "
            "the one before, step-0000002, is kept"
        )
        with pytest.raises(OSError, match=message):
            train(config)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(os.listdir(folder)) == ["step-0000001", "step-0000002"]
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    assert all(
        torch.equal(a, b)
        for a, b in zip(resume(tmp_path / "run", config).parameters, finished[1], strict=True)
    )


def test_what_a_killed_process_left_is_removed(copied, newest, finished):
    shutil.rmtree(newest)
    for name in (f".{NEWEST}.123.tmp", f".{BEFORE}.123.tmp"):
        (copied / "checkpoints" / name).mkdir()
        (copied / "checkpoints" / name / "model.safetensors").write_text("half")
    (copied / ".history.jsonl.123.tmp").write_text("half")
    (copied / ".model.123.tmp").mkdir()
    (copied / ".lock").write_text("123 elsewhere\n")
    resume(copied, finished[0])
    left = ["checkpoints", "config.json", "data.json", "history.jsonl", "model"]
    assert sorted(os.listdir(copied)) == left
    assert sorted(os.listdir(copied / "checkpoints")) == [BEFORE, NEWEST]


def test_a_pipeline_that_cannot_be_written_leaves_the_old_one(copied, finished, monkeypatch):
    before = snapshot(copied / "model")

    def fail(self, path):
        Path(path).mkdir()
        (Path(path) / "model_index.json").write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(GenRepPipeline, "save_pretrained", fail)
    with pytest.raises(OSError, match=f"No space left on device: '{copied}/model'"):
        resume(copied, finished[0])
    assert snapshot(copied / "model") == before and not (copied / ".lock").exists()
