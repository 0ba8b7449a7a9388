"""A command in a process of its own that dies at a chosen place, and what it leaves.

Processes are forked from a server that has imported everything, which takes seconds.
"""

import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import sklearn.datasets  # noqa: F401
import torch

import genrep_fast.training.run  # noqa: F401
from genrep_fast import cli

# What Python tells of files, and safetensors does not.
_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


class Death(NamedTuple):
    """Where a process dies: at its n-th call that changes a file of the run ("event") or that opens
    a checkpoint's last one ("manifest"), in the middle of writing a file of more than n bytes
    ("size"), or after n milliseconds ("time").
    """

    kind: str
    n: int


def run(arguments, death=None):
    """Run the command in a process of its own; returns its exit status, negative for a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    log = Path(arguments[arguments.index("--output") + 1] + ".log")
    process = context.Process(target=_command, args=(arguments, death, log))
    process.start()
    if death is not None and death.kind == "time":
        process.join(death.n / 1000)
        process.kill()
    process.join(120)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"{arguments[0]} hangs: {log.read_text()}")
    assert process.exitcode in (0, -signal.SIGKILL, -signal.SIGXFSZ), log.read_text()
    return process.exitcode


def _command(arguments, death, log):
    torch.set_num_threads(1)
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    if death is not None and death.kind in ("event", "manifest"):
        _die_at_event(death, str(Path(arguments[arguments.index("--output") + 1]).resolve()))
    if death is not None and death.kind == "size":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (death.n, death.n))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cli.main(arguments)


def _die_at_event(death, folder):
    left = death.n

    def count(event, arguments):
        nonlocal left
        if event not in _EVENTS:
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        # What removes a folder names its files by a descriptor of the folder.
        beside_descriptor = event == "os.remove" and arguments[1] != -1
        if not beside_descriptor and not str(arguments[0]).startswith(folder):
            return
        if death.kind == "manifest" and not str(arguments[0]).endswith("manifest.json"):
            return
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
