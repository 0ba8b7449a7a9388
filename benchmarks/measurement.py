"""What the benchmarks share: wall times as quantiles, and the lines of their tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer


class Quantiles(NamedTuple):
    """20 %, 50 % and 80 % quantiles of a wall time in milliseconds."""

    low: float
    median: float
    high: float


def measure(run: Callable[[], object], seconds: float = 0.5) -> Quantiles:
    """Call `run` warm, again and again, for about `seconds`."""
    times = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads()).blocked_autorange(min_run_time=seconds).times
    fifths = statistics.quantiles([1e3 * time for time in times], n=5)
    return Quantiles(fifths[0], 1e3 * statistics.median(times), fifths[3])


def print_header(conditions: str, unit: str) -> None:
    """Conditions of the run, then the table's head; `unit` is what the last column is a multiple of."""
    print(f"{conditions}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'provider':34}{'20 % ms':>10}{'median':>10}{'80 %':>10}{'x ' + unit:>12}")


def print_row(name: str, times: Quantiles, unit_ms: float) -> None:
    """One provider; `unit_ms` is the time that the last column is a multiple of."""
    print(f"{name:34}{times.low:10.3f}{times.median:10.3f}{times.high:10.3f}{times.median / unit_ms:12.2f}")
