"""How a command ends: its one line on standard error, its exit status, and what Ctrl-C leaves.

A leaf: every room may use it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from .names import shortened

# Exit statuses.
BAD_INPUT = 2
INTERRUPTED = 130

# Characters of the one line.
_LONGEST = 1000
_UNWRITABLE = (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EDQUOT)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end(name: str, reason: BaseException | str, status: int = BAD_INPUT) -> NoReturn:
    """Say why the command `name` ends, in one line on standard error, and exit."""
    told = " ".join(_sentence(reason).split())
    flush_output()
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"{name}: {shortened(told, _LONGEST)}", file=sys.stderr, flush=True)
    sys.exit(status)


def _sentence(reason: BaseException | str) -> str:
    text = str(reason)
    # Of PyTorch, which raises RuntimeError on a CPU.
    if "can't allocate memory" in text or type(reason).__name__ == "OutOfMemoryError":
        wanted = text.partition("tried to allocate")[2].partition(".")[0].strip()
        return f"not enough memory{f': {wanted} were wanted at once' if wanted else ''}"
    if isinstance(reason, MemoryError) and not text:
        return "not enough memory"
    # Writers of files name them.
    if isinstance(reason, OSError) and reason.errno in _UNWRITABLE and reason.filename is None:
        return f"standard output: {reason.strerror}"
    if isinstance(reason, RecursionError):
        return f"something is nested too deeply ({text})"
    return text or type(reason).__name__


def flush_output() -> OSError | None:
    """Flush standard output; the error where that fails.

    Python flushes it once more at exit, and what could not be written goes nowhere then.
    """
    if sys.stdout is None:
        return None
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(io.UnsupportedOperation):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def print_all_text() -> None:
    """Let standard output and error escape what their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Have SIGTERM raise KeyboardInterrupt as SIGINT does, where nobody handles it otherwise."""
    main_thread = threading.current_thread() is threading.main_thread()
    if not main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def ignore_interrupts() -> None:
    """Let nothing disturb a process that ends already."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def interrupts_after() -> Iterator[list[int]]:
    """Put SIGINT and SIGTERM off until the block ends, as their handlers would cut it in two.

    A second signal is not put off. In other threads than the main one, which get no signals, and
    for signals that nobody handles, the block changes nothing.

    Yields:
        The signals that came, a list that is empty at first.
    """
    received: list[int] = []
    previous: dict[int, Callable[[int, FrameType | None], object]] = {}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            previous[number](number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    for handled in _SIGNALS:
        handler = signal.getsignal(handled)
        if callable(handler):
            previous[handled] = handler
            signal.signal(handled, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        previous[received[0]](received[0], None)
