"""What memory there is, and one line in place of a process that the system kills for want of it.

A leaf: every room may use it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

try:
    import resource
except ImportError:
    # Windows.
    resource = None  # type: ignore[assignment]

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Limit, usage, and what of the usage the system gives back, in its two versions.
_OF_A_CONTAINER = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def require_memory(argument: str, needed: float, what: str, available: int | None = None) -> None:
    """Refuse what cannot fit.

    Args:
        argument: that asks for it.
        needed: bytes, rather too few than too many.
        what: takes them, for the message.
        available: bytes; those of the process on the CPU where not given.

    Raises:
        MemoryError: with both numbers.
    """
    available = available_memory() if available is None else available
    if available is not None and needed > available:
        numbers = (
            f"would take {shown_bytes(needed)} of memory, {shown_bytes(available)} are available"
        )
        raise MemoryError(f"{argument}: {what} {numbers}")


def available_memory() -> int | None:
    """Bytes that this process can still get on the CPU; None where the system does not say."""
    found = [*_of_machine(), *_of_container(), *_of_process()]
    return max(0, min(found)) if found else None


def _of_machine() -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError, KeyError):
        yield _fields(_MEMINFO)["MemAvailable:"] * 1024


def _of_container() -> Iterator[int]:
    for limit, usage, statistics, given_back in _OF_A_CONTAINER:
        # Without a limit there is no file, or the word "max" in it.
        with contextlib.suppress(OSError, ValueError, KeyError):
            most = int((_CGROUP / limit).read_text())
            used = int((_CGROUP / usage).read_text()) - _fields(_CGROUP / statistics)[given_back]
            yield most - used


def _of_process() -> Iterator[int]:
    if resource is None:
        return
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        yield limit - pages * resource.getpagesize()


def _fields(path: Path) -> dict[str, int]:
    """The numbers of a file of lines like ``name 123`` or ``name: 123 kB``."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0]: int(line[1]) for line in lines if len(line) > 1}


def shown_bytes(number: float) -> str:
    """A number of bytes with its unit."""
    units = ["bytes", "kB", "MB", "GB"]
    while number >= 1000 and len(units) > 1:
        number /= 1000
        units.pop(0)
    return f"{number:,.0f} {units[0]}" if number >= 100 else f"{number:.3g} {units[0]}"
