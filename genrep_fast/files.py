"""Files that survive the death of a process, written whole or not at all; one writer a folder."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import socket
import stat
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:
    # Windows.
    fcntl = None  # type: ignore[assignment]

_LOCK = ".lock"
# No number in the configuration of a model or a scheduler is larger, and no count of layers.
_LARGEST_NUMBER = 10**6
# Options that diffusers itself writes as -Infinity.
_MAY_BE_INFINITE = ("lambda_min_clipped",)
_MOST_LAYERS = 1000
_UNFINISHED = re.compile(r"\..+\.[0-9]+\.tmp")
# What filesystems say that cannot lock or flush: some network ones and some in user space.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_IN_USE = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)

# Device and inode of the folders that this thread has locked.
_held: ContextVar[frozenset[tuple[int, int]]] = ContextVar("held", default=frozenset())


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` so that `path` holds the old or the new content, whenever the machine dies.

    Raises:
        OSError: where it cannot be written; the old content is kept.
    """
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside `path`, for a file or folder that takes the place of `path` at the end.

    Whenever process or machine dies, `path` holds all of the old content or all of the new; where
    the block fails, the old. A folder that replaces another is missing for a moment between two
    renames. Files may be read by whom the umask lets, whatever wrote them: safetensors lets nobody
    but their owner.

    Raises:
        OSError: with `path` in it, where the block or the renaming fails for want of space, rights
            and the like.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        remove(unfinished)
        yield unfinished
        _flush(unfinished, _mode_of_new_files(unfinished))
        if path.is_dir() and not path.is_symlink():
            replaced = path.with_name(f".{path.name}.replaced.{os.getpid()}.tmp")
            os.rename(path, replaced)
            try:
                os.rename(unfinished, path)
            except OSError:
                os.rename(replaced, path)
                raise
            remove(replaced)
        else:
            os.replace(unfinished, path)
        _flush_entry(path.parent)
    except (OSError, SafetensorError) as error:
        told = _with_path(error, path, unfinished)
        if told is error:
            raise
        raise told from error
    finally:
        with contextlib.suppress(OSError):
            remove(unfinished)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what processes that died in `replacing` left in `folder`, to which nobody writes."""
    if folder.is_dir():
        for path in list(folder.iterdir()):
            if _UNFINISHED.fullmatch(path.name):
                remove(path)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: with `path` in it, where it is damaged.
    """
    return _parsed(path, _text(path))


def read_configuration(path: Path) -> dict[str, Any]:
    """The content of a JSON file that configures a model or a scheduler.

    Raises:
        ValueError: with `path` in it, where it is damaged: no object, or numbers that no model has.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no options, but a {type(content).__name__}")
    try:
        numbers = list(_numbers("", content))
    except RecursionError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    for name, number in numbers:
        if name in _MAY_BE_INFINITE and number == -math.inf:
            continue
        # Of NaN, too, this is not so.
        if not abs(number) <= (_MOST_LAYERS if "layers" in name else _LARGEST_NUMBER):
            raise ValueError(f"{path} is damaged: {name} cannot be {number:g}")
    return content


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """All numbers in a value of JSON, each with the name of the option that it belongs to."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(key, inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(name, inner)
    elif isinstance(value, (int, float)):
        yield name, value


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Name `what`, an argument and its files, where a library fails on what is in them.

    Raises:
        ValueError: in place of every exception that does not name it, but for those that the files
            are not to blame for: a package that is missing, and want of memory.
    """
    try:
        yield
    except (ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:
        reason = str(error)
        if isinstance(error, (OSError, ValueError)) and what.rpartition(": ")[2] in reason:
            raise
        if "can't allocate memory" in reason:
            reason = "it asks for more memory than there is"
        elif not isinstance(error, (OSError, ValueError)) or not reason:
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{what} cannot be loaded ({reason})") from error


def read_json_lines(path: Path) -> list[Any]:
    """The content of a file of one JSON value a line.

    Raises:
        ValueError: with `path` and the line's number in it, where it is damaged.
    """
    lines = _text(path).splitlines()
    return [_parsed(f"{path}, line {number},", line) for number, line in enumerate(lines, start=1)]


@contextlib.contextmanager
def only_writer(folder: Path, argument: str = "output") -> Iterator[None]:
    """Make `folder` where it is missing, and keep other writers out of it until the block ends.

    Blocks of one thread may be nested. The operating system holds the lock, on the file ``.lock``
    in the folder, and drops it when the process dies. Where the filesystem has no locks, a warning
    says so and the block runs without one. A folder that was made here is removed if nothing was
    written to it.

    Args:
        folder: by any of its spellings.
        argument: what it is called in messages.

    Raises:
        BlockingIOError: where another process, or another thread, writes to the folder.
        OSError: where the folder cannot be made or written to.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"{argument}: {folder} cannot be used as a folder ({why})") from error
    identity = (found.st_dev, found.st_ino)
    if identity in _held.get():
        yield
        return
    try:
        file = _lock(folder, argument)
        token = _held.set(_held.get() | {identity})
        try:
            yield
        finally:
            _held.reset(token)
            # While the lock is held: who opened the file sees that it has gone, and makes another.
            with contextlib.suppress(OSError):
                (folder / _LOCK).unlink()
            os.close(file)
    finally:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _lock(folder: Path, argument: str) -> int:
    """The descriptor of the folder's lock file, locked."""
    path = folder / _LOCK
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            why = f"{path.name}: {error.strerror}"
            raise OSError(f"{argument}: {folder} cannot be written to ({why})") from error
        try:
            _lock_file(file, folder, argument)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.lstat(path)):
                    _sign(file)
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _lock_file(file: int, folder: Path, argument: str) -> None:
    why = "this system has no flock"
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in _IN_USE:
                used = f"{argument}: {folder} is in use by another run{_signature(file)}"
                advice = "wait until it ends, or choose another folder"
                raise BlockingIOError(f"{used}; {advice}") from error
            why = error.strerror or str(error)
            if error.errno not in _UNSUPPORTED:
                raise OSError(f"{argument}: {folder} cannot be locked ({why})") from error
    advice = "let no other run write to it"
    warnings.warn(f"{argument}: {folder} cannot be locked ({why}); {advice}", stacklevel=5)


def _sign(file: int) -> None:
    """Say who holds the lock, for the message to others; the lock does not depend on it."""
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()} {socket.gethostname()}\n".encode())


def _signature(file: int) -> str:
    with contextlib.suppress(OSError):
        signed = re.fullmatch(rb"([0-9]{1,10}) ([\w.-]{1,64})\n", os.read(file, 100))
        if signed:
            process, host = (part.decode() for part in signed.groups())
            return f" (process {process} on {host})"
    return ""


def _mode_of_new_files(beside: Path) -> int | None:
    """What the system gives a new file here: the umask cannot be read without changing it.

    None where it gives none.
    """
    probe = beside.with_name(f".mode{beside.name}")
    try:
        descriptor = os.open(probe, os.O_CREAT | os.O_WRONLY, 0o666)
        try:
            return stat.S_IMODE(os.fstat(descriptor).st_mode)
        finally:
            os.close(descriptor)
            probe.unlink()
    except OSError:
        return None


def _flush(path: Path, mode: int | None) -> None:
    """Have the device write a file, of this mode, or a folder with all that is in it."""
    if path.is_dir():
        for inner in path.iterdir():
            _flush(inner, mode)
        _flush_entry(path)
        return
    with open(path, "rb+") as file:
        if mode is not None and stat.S_IMODE(os.fstat(file.fileno()).st_mode) != mode:
            os.chmod(path, mode)
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise


def _flush_entry(folder: Path) -> None:
    """Have the device write the names in a folder, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _with_path(error: OSError | SafetensorError, path: Path, unfinished: Path) -> Exception:
    """`error`, about `path` where it is about the unfinished file or about no file at all."""
    number = getattr(error, "errno", None)
    if isinstance(error, SafetensorError):
        # safetensors gives the system's error in words alone.
        found = re.search(r"os error ([0-9]+)", str(error))
        if found is None:
            return error
        number = int(found.group(1))
    elif number is None or not str(error.filename or unfinished).startswith(str(unfinished)):
        return error
    return OSError(number, os.strerror(number), str(path))


def _text(path: Path) -> str:
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _parsed(name: Path | str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; readers differ in which of two values of a name they take."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it says {twice!r} twice")
    return content
