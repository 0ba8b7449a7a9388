"""What the benchmarks share: interleaved wall times, the allocator's two tempers, peak memory, tensor sizes of a transformer, tables."""

from __future__ import annotations

import contextlib
import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)
_CACHE_BYTES = 512 << 20  # more than the caches hold


class Quantiles(NamedTuple):
    """20 %, 50 % and 80 % quantiles of a wall time in milliseconds."""

    low: float
    median: float
    high: float


def measure(run: Callable[[], object], seconds: float = 0.5) -> Quantiles:
    """Call `run` warm, again and again, for about `seconds`."""
    times = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()).blocked_autorange(min_run_time=seconds).times
    return _quantiles(times)


def measure_together(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, Quantiles]:
    """Call every one of `runs` in turn, after two calls that do not count, for about `seconds` and seven times at least.

    What disturbs the machine for a while disturbs all of them, so that their ratios hold although their times wander. Before each call the
    caches are emptied, lest it profit, or suffer, from what the one before it left there.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    filler = torch.zeros(_CACHE_BYTES // 4, device="cuda" if torch.cuda.is_available() else "cpu")
    for run in 2 * list(runs.values()):
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 7:
        for name, run in runs.items():
            filler.add_(1)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: _quantiles(values) for name, values in times.items()}


def keep_freed_memory() -> None:
    """Have the C library keep freed memory, as a GPU's caching allocator does: a large temporary then costs no page faults ("warm")."""
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, -1)


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Most memory that one call of `run` holds on top of what is held before: of the GPU, or resident in this process (Linux)."""
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    page, most, done = os.sysconf("SC_PAGE_SIZE"), 0, threading.Event()
    statm = Path("/proc/self/statm")
    before = int(statm.read_text().split()[1]) * page

    def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, int(statm.read_text().split()[1]) * page)
            time.sleep(1e-4)

    thread = threading.Thread(target=watch)
    thread.start()
    run()
    done.set()
    thread.join()
    return max(0, most - before)


@contextlib.contextmanager
def threads(number: int):
    """`number` threads of torch inside the block."""
    previous = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def transformer_shapes(numel: int) -> list[tuple[int, ...]]:
    """Shapes of about `numel` parameters in 12 blocks of a diffusion transformer (DiT-B has width 768): 192 tensors, half of them tiny."""
    width = max(1, round((numel / (12 * 18)) ** 0.5))
    attention = [(width, width), (width,)] * 4
    rest = [(4 * width, width), (4 * width,), (width, 4 * width), (width,), (6 * width, width), (6 * width,), (width,), (width,)]
    return [*attention, *rest] * 12


def print_header(conditions: str, unit: str) -> None:
    """Conditions of the run, then the table's head; `unit` is what the last column is a multiple of."""
    print(f"{conditions}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'provider':44}{'20 % ms':>10}{'median':>10}{'80 %':>10}{'x ' + unit:>12}")


def print_row(name: str, times: Quantiles, unit_ms: float) -> None:
    """One provider; `unit_ms` is the time that the last column is a multiple of."""
    print(f"{name:44}{times.low:10.3f}{times.median:10.3f}{times.high:10.3f}{times.median / unit_ms:12.2f}")


def _quantiles(seconds: list[float]) -> Quantiles:
    fifths = statistics.quantiles([1e3 * value for value in seconds], n=5)
    return Quantiles(fifths[0], 1e3 * statistics.median(seconds), fifths[3])
