"""How the benchmarks measure: cases and providers, correctness gate, times, memory, and ratios."""

from __future__ import annotations

import ctypes
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import genrep_fast as gf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)
_CACHE_BYTES = 512 << 20  # more than the caches hold
_CYCLES_PER_SECOND = 2e9  # of a GPU, about
_LEAST_CALLS = 7

torch._dynamo.config.recompile_limit = (
    64  # every size, dtype and number of threads is compiled for itself
)


@dataclass(frozen=True)
class Provider:
    """One way of doing a case's work.

    Attributes:
        run: does it once.
        error: does it once and returns its error against float64, as the suite defines it; raises
            RuntimeError where it is too large.
        role: what a ratio to it means; a "bound" does less than the work, for comparison, and a
            "variant" is another way of ours.
    """

    run: Callable[[], object]
    error: Callable[[], float]
    role: Literal["eager", "compiled", "peer", "bound", "ours", "variant"]


@dataclass(frozen=True)
class Case:
    """The same work by several providers.

    Attributes:
        providers: by name.
        elements: size of the work.
        moved_bytes: that memory must move at least, whoever does it; None where memory is not what
            bounds it.
        flops: floating-point operations that it takes at least.
        copy: `Tensor.copy_` on as much memory as the case's data, for the bandwidth.
        copied_bytes: read and written by `copy`.
    """

    providers: dict[str, Provider]
    elements: int
    moved_bytes: int | None
    flops: int
    copy: Callable[[], object]
    copied_bytes: int


class Quantiles(NamedTuple):
    """20 %, 50 % and 80 % quantiles of a time in milliseconds.

    On a GPU also the median time after which the host goes on.
    """

    low: float
    median: float
    high: float
    host: float | None


def copy_of(tensor: torch.Tensor) -> dict:
    """The arguments `copy` and `copied_bytes` of a case whose data is `tensor`."""
    source, target = torch.ones_like(tensor), torch.empty_like(tensor)
    return {"copy": lambda: target.copy_(source), "copied_bytes": 2 * tensor.nbytes}


def compiled_backends(*operators: str) -> list[str]:
    """Backends besides the reference that run all of `operators` on `DEVICE`."""
    backends = gf.info()["backends"]
    return [
        name
        for name in (["cpu"] if DEVICE == "cpu" else ["triton", "cuda"])
        if set(operators) <= set(backends[name]["operators"])
    ]


def measure(
    builders: dict[tuple[str, str], Callable[[], Case]],
    *,
    seconds: float,
    cold: bool,
    chosen: Callable[[str, str], bool],
) -> Iterator[list[dict]]:
    """Check, weigh and time the `chosen` providers of every case.

    All are weighed before the first is timed where the allocator changes its temper in between,
    since it does not go back.

    Args:
        builders: (suite, case) -> the case, made anew for either pass, so that they fit into memory
            one after the other.
        seconds: for the times of a case.
        cold: large temporaries are new memory each time, as the C library would have it; else it
            keeps what was freed, as on a GPU.
        chosen: of a provider's name and role, whether it is wanted.

    Yields:
        Of one case after the other, a row a provider: suite, case, provider, role, threads,
        elements, moved_bytes, flops, then `failure` (a sentence) or error, extra_bytes, ms (the
        median), low_ms and high_ms (20 % and 80 % quantiles), host_ms (on a GPU), copy_gb_per_s,
        floor_ms and bandwidth_percent (moved_bytes at the bandwidth of the same run's copy), and
        over_eager, over_compiled, over_peer: time of the eager and the compiled provider and of the
        fastest peer (`peer`) as multiples of this one's.
    """
    if cold or DEVICE == "cuda":
        for key, build in builders.items():
            case = build()
            rows = _examine(*key, case, chosen)
            _time(case, rows, seconds)
            yield rows
        return
    examined = {key: _examine(*key, build(), chosen) for key, build in builders.items()}
    keep_freed_memory()
    for key, build in builders.items():
        _time(build(), examined[key], seconds)
        yield examined[key]


def _examine(suite: str, name: str, case: Case, chosen: Callable[[str, str], bool]) -> list[dict]:
    rows = []
    for provider_name, provider in case.providers.items():
        if not chosen(provider_name, provider.role):
            continue
        row = {
            "suite": suite,
            "case": name,
            "provider": provider_name,
            "role": provider.role,
            "threads": torch.get_num_threads(),
        }
        row |= {"elements": case.elements, "moved_bytes": case.moved_bytes, "flops": case.flops}
        try:
            row["error"] = provider.error()
            row["extra_bytes"] = peak_extra_bytes(provider.run)
        except (
            Exception
        ) as error:  # a peer that cannot run here, or runs wrong, takes no other one's row away
            row["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        rows.append(row)
    return rows


def _time(case: Case, all_rows: list[dict], seconds: float) -> None:
    """Add times and ratios to the rows of one case that have not failed."""
    rows = {row["provider"]: row for row in all_rows if "failure" not in row}
    if not rows:
        return
    runs = {"": case.copy} | {name: case.providers[name].run for name in rows}
    times = measure_together(runs, seconds)
    bandwidth = case.copied_bytes / times[""].median  # bytes a millisecond
    medians = {
        role: {name: times[name].median for name, row in rows.items() if row["role"] == role}
        for role in ("eager", "compiled", "peer")
    }
    for name, row in rows.items():
        low, median, high, host = times[name]
        row |= {"ms": median, "low_ms": low, "high_ms": high, "copy_gb_per_s": bandwidth / 1e6}
        if host is not None:
            row["host_ms"] = host
        if case.moved_bytes is not None:
            floor = case.moved_bytes / bandwidth
            row |= {"floor_ms": floor, "bandwidth_percent": 100 * floor / median}
        for role, others in medians.items():
            if others:
                fastest = min(others, key=others.get)
                row[f"over_{role}"] = others[fastest] / median
                if role == "peer":
                    row["peer"] = fastest


def measure_together(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, Quantiles]:
    """Call every one of `runs` in turn, for about `seconds` and seven times at least.

    Two calls before these do not count. What disturbs the machine for a while disturbs all of them,
    so that their ratios hold although their times wander. Before each call the caches are emptied,
    lest it profit, or suffer, from what the one before it left there. A GPU is kept busy until the
    whole call is queued, so that its time is that of its kernels; what Python, dispatch and
    launches take is the host's.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    filler = torch.zeros(_CACHE_BYTES // 4, device=DEVICE)
    for run in runs.values():
        run()
    hosts = {name: _time_on_host(run) for name, run in runs.items()}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < _LEAST_CALLS:
        for name, run in runs.items():
            filler.add_(1)
            if DEVICE == "cuda":
                times[name].append(_time_on_gpu(run, hosts[name]))
            else:
                times[name].append((_time_on_host(run), 0.0))
    return {name: _quantiles(values) for name, values in times.items()}


def keep_freed_memory() -> None:
    """Have the C library keep freed memory, as a GPU's caching allocator does.

    A large temporary then costs no page faults ("warm").
    """
    library = ctypes.CDLL(None)
    library.mallopt(_M_MMAP_MAX, 0)
    library.mallopt(_M_TRIM_THRESHOLD, -1)


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Most memory that one call of `run` holds on top of what is held before.

    Of the GPU, or resident in this process (Linux).
    """
    run()
    if DEVICE == "cuda":
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


def peak_gflops() -> float:
    """Billions of floating-point operations a second of a float32 matrix product, without TF32."""
    matrix = torch.rand(2048, 2048, device=DEVICE)
    result = torch.empty_like(matrix)
    times = measure_together({"": lambda: torch.mm(matrix, matrix, out=result)}, 0.5)
    return 2 * 2048**3 / times[""].median / 1e6


def _time_on_host(run: Callable[[], object]) -> float:
    """Seconds until `run` returns."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _time_on_gpu(run: Callable[[], object], host_seconds: float) -> tuple[float, float]:
    """Seconds that the GPU takes once it has the whole of `run`, and those of the host.

    To hand it over takes the host about `host_seconds`.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int((1.5 * host_seconds + 2e-4) * _CYCLES_PER_SECOND))
    begin.record()
    host = _time_on_host(run)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, host


def _quantiles(times: list[tuple[float, float]]) -> Quantiles:
    seconds, hosts = zip(*times, strict=True)
    fifths = statistics.quantiles([1e3 * value for value in seconds], n=5)
    return Quantiles(
        fifths[0],
        1e3 * statistics.median(seconds),
        fifths[3],
        1e3 * statistics.median(hosts) if DEVICE == "cuda" else None,
    )
