"""Files are written whole or not at all, and one run writes to a folder."""

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import change_json, failure, resume, snapshot

from genrep_fast import files
from genrep_fast.files import only_writer, replacing, write_atomically

# Whole files


def test_a_file_that_does_not_fit_is_named(tmp_path):
    """The limit of this process alone, which Python tells by an error and not by a signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "large.safetensors"
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match=f"File too large: '{path}'"), replacing(path) as place:
            save_file({"x": torch.zeros(10**6)}, place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_block_that_fails_leaves_the_old_content(tmp_path, kind):
    path = tmp_path / "x"

    def write(place, text):
        if kind == "folder":
            place.mkdir()
            place = place / "y"
        place.write_text(text)

    for text in ("old", "new"):
        with replacing(path) as unfinished:
            write(unfinished, text)
    with pytest.raises(KeyError), replacing(path) as unfinished:
        write(unfinished, "half")
        raise KeyError
    assert [place.read_text() for place in tmp_path.rglob("*") if place.is_file()] == ["new"]


def test_an_error_of_the_system_names_the_file(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/none/x'"):
        write_atomically(tmp_path / "none" / "x", "content")
    monkeypatch.setattr(
        Path,
        "write_bytes",
        lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
    )
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/x'"):
        write_atomically(tmp_path / "x", "content")
    assert not list(tmp_path.iterdir())


# One run a folder

# Loads the module alone, as the package would import torch, and holds the folder until its standard
# input ends.
HOLDER = """
import runpy, sys
with runpy.run_path(sys.argv[1])["only_writer"](sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold():
    """A function that has another process write to a folder until it is killed."""
    processes = []

    def start(folder):
        command = [sys.executable, "-c", HOLDER, files.__file__, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes.append(subprocess.Popen(command, **pipes, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_run_is_one_line_by_any_spelling(
    capsys, hold, copied, tmp_path, monkeypatch, finished
):
    (tmp_path / "link").symlink_to(copied, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    process = hold(copied)
    before = snapshot(copied)
    capsys.readouterr()
    for spelling in (copied, "run", "./link", "run/../link/", str(tmp_path) + "//run/."):
        for flags in ((), ("--resume",), ("--ablation",)):
            line = failure(capsys, "train", *flags, "--output", spelling)
            assert f"is in use by another run (process {process.pid} on " in line, line
    with pytest.raises(BlockingIOError):
        resume("run", finished[0])
    line = failure(capsys, "train", "--output", copied)
    assert (
        line.startswith(f"genrep train: output: {copied} is in use")
        and "choose another folder" in line
    )
    assert snapshot(copied) == before


def test_an_evaluation_waits_for_nobody_but_its_own_folder(capsys, hold, copied):
    change_json(copied / "config.json", data="digits")
    hold(copied / "evaluation")
    capsys.readouterr()
    assert f"output: {copied / 'evaluation'} is in use" in failure(
        capsys, "evaluate", "--checkpoint", copied
    )
    with only_writer(copied):
        pass


def test_the_lock_of_a_killed_process_blocks_nobody(hold, tmp_path):
    process = hold(tmp_path / "run")
    with pytest.raises(BlockingIOError), only_writer(tmp_path / "run"):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / ".lock").exists()
    with only_writer(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()
    assert not list((tmp_path / "run").iterdir())


def test_blocks_of_a_thread_are_nested_and_those_of_two_are_not(tmp_path):
    refused = []

    def enter():
        try:
            with only_writer(tmp_path):
                pass
        except BlockingIOError as error:
            refused.append(error)

    with only_writer(tmp_path):
        with only_writer(tmp_path / "." / ""):
            pass
        assert (tmp_path / ".lock").exists()
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(refused) == 1 and not (tmp_path / ".lock").exists()


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(KeyError), only_writer(tmp_path / "a" / "b"):
        raise KeyError
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    with only_writer(tmp_path / "mine"):
        pass
    with only_writer(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert (tmp_path / "mine").exists() and (tmp_path / "a" / "b" / "result").exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, None])
def test_without_locks_a_warning_says_so(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    if number is None:
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", flock)
    with (
        pytest.warns(UserWarning, match="cannot be locked.*let no other run write to it"),
        only_writer(tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_file_that_goes_while_it_is_waited_for_is_made_again(tmp_path, monkeypatch):
    """As where the holder removes it between the opening and the locking of another."""
    original, calls = files.fcntl.flock, []

    def flock(file, operation):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(operation)
        original(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with only_writer(tmp_path):
        assert len(calls) == 2 and (tmp_path / ".lock").exists()


@pytest.mark.parametrize(
    "what",
    ["folder is a file", "lock is a folder", "lock is a link", "read-only", "link to nothing"],
)
def test_a_folder_that_cannot_be_locked_is_one_line(capsys, tmp_path, monkeypatch, what):
    output = tmp_path / "run"
    if what == "folder is a file":
        output.touch()
    elif what == "link to nothing":
        output.symlink_to(tmp_path / "gone" / "away" / "\0".replace("\0", "x" * 300))
    elif what == "read-only":
        output.mkdir()
        monkeypatch.setattr(
            files.os,
            "open",
            lambda *_: (_ for _ in ()).throw(OSError(errno.EROFS, os.strerror(errno.EROFS))),
        )
    elif what == "lock is a folder":
        (output / ".lock").mkdir(parents=True)
    else:
        output.mkdir()
        (tmp_path / "precious").write_text("content")
        (output / ".lock").symlink_to(tmp_path / "precious")
    line = failure(capsys, "train", "--output", output)
    assert f"output: {output} cannot be" in line
    assert what != "lock is a link" or (tmp_path / "precious").read_text() == "content"


def test_a_run_leaves_no_lock(finished):
    config, _ = finished
    assert sorted(os.listdir(config.output)) == [
        "checkpoints",
        "config.json",
        "data.json",
        "history.jsonl",
        "model",
    ]
