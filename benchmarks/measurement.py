"""What the benchmarks share: options, interleaved wall times, the allocator's two tempers, peak memory, a transformer's tensors, tables."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import genrep_fast as gf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)
_CACHE_BYTES = 512 << 20  # more than the caches hold
_CYCLES_PER_SECOND = 2e9  # of a GPU, about


class Quantiles(NamedTuple):
    """20 %, 50 % and 80 % quantiles of a time in milliseconds; on a GPU also the median time after which the host goes on."""

    low: float
    median: float
    high: float
    host: float | None = None


def measure_together(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, Quantiles]:
    """Call every one of `runs` in turn, after two calls that do not count, for about `seconds` and seven times at least.

    What disturbs the machine for a while disturbs all of them, so that their ratios hold although their times wander. Before each call the
    caches are emptied, lest it profit, or suffer, from what the one before it left there. A GPU is kept busy until the whole call is queued,
    so that its time is that of its kernels; what Python, dispatch and launches take is the host's.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    filler = torch.zeros(_CACHE_BYTES // 4, device=DEVICE)
    for run in runs.values():
        run()
    hosts = {name: _time_on_host(run) for name, run in runs.items()}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 7:
        for name, run in runs.items():
            filler.add_(1)
            if DEVICE == "cuda":
                times[name].append(_time_on_gpu(run, hosts[name]))
            else:
                times[name].append((_time_on_host(run), 0.0))
    return {name: _quantiles(values) for name, values in times.items()}


def _time_on_host(run: Callable[[], object]) -> float:
    """Seconds until `run` returns."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _time_on_gpu(run: Callable[[], object], host_seconds: float) -> tuple[float, float]:
    """Seconds that the GPU takes once it has the whole of `run`, which takes the host about `host_seconds`, and those of the host."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int((1.5 * host_seconds + 2e-4) * _CYCLES_PER_SECOND))
    begin.record()
    host = _time_on_host(run)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, host


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
    ctypes.CDLL(None).malloc_trim(0)  # what is free already would not count, were it used again
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


def compiled_backends(*operators: str) -> list[str]:
    """Backends besides the reference that run all of `operators` on `DEVICE`."""
    backends = gf.info()["backends"]
    return [name for name in (["cpu"] if DEVICE == "cpu" else ["triton", "cuda"]) if set(operators) <= set(backends[name]["operators"])]


def measure_cases(cases: dict[str, dict[str, Callable[[], object]]], options: argparse.Namespace) -> list[dict]:
    """Measure every provider of every case (case -> provider -> run) as `options`, those of `benchmark_options`, say; memory first.

    Returns:
        A row each: `layout` (the case), `threads`, `provider`, `extra_bytes`, and in milliseconds `ms` (the median), `low_ms` and `high_ms`
        (20 % and 80 % quantiles).
    """
    rows = {(case, number, name): {} for case, runs in cases.items() for number in options.threads for name in runs}
    for (case, number, name), row in rows.items():
        with threads(number):
            row |= {"layout": case, "threads": number, "provider": name, "extra_bytes": peak_extra_bytes(cases[case][name])}
    if not options.cold:
        keep_freed_memory()
    for case, runs in cases.items():
        for number in options.threads:
            with threads(number):
                times = measure_together(runs, options.seconds)
            for name, (low, median, high, host) in times.items():
                rows[case, number, name] |= {"ms": median, "low_ms": low, "high_ms": high}
                if host is not None:
                    rows[case, number, name]["host_ms"] = host
    return list(rows.values())


def benchmark_options(description: str, providers: list[str]) -> argparse.ArgumentParser:
    """Options that benchmarks of several providers have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each table")
    parser.add_argument("--cold", action="store_true", help="large temporaries are new memory each time, as the C library would have it")
    parser.add_argument("--provider", nargs="+", choices=providers, default=providers)
    parser.add_argument("--json", type=Path, help="where to write all figures")
    return parser


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


def tables_of(rows: list[dict]) -> list[list[dict]]:
    """`rows` of one case and number of threads each, in order."""
    return [list(table) for _, table in itertools.groupby(rows, key=lambda row: (row["layout"], row["threads"]))]


def print_table(title: str, rows: list[dict], columns: dict[str, tuple[str, str]]) -> None:
    """`rows` by provider; `columns`: head -> key of a row and format, blank where a row lacks the key."""
    print(f"\n{title}, {rows[0]['threads']} threads, {DEVICE}, torch {torch.__version__}")
    print(f"{'provider':40}" + "".join(f"{head:>13}" for head in columns))
    for row in rows:
        print(f"{row['provider']:40}" + "".join(f"{format(row[key], spec) if key in row else '':>13}" for key, spec in columns.values()))


def _quantiles(times: list[tuple[float, float]]) -> Quantiles:
    seconds, hosts = zip(*times, strict=True)
    fifths = statistics.quantiles([1e3 * value for value in seconds], n=5)
    return Quantiles(fifths[0], 1e3 * statistics.median(seconds), fifths[3], 1e3 * statistics.median(hosts) if DEVICE == "cuda" else None)
