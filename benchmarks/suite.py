"""The suite: which cases there are, one run of them, and what it ran on."""

from __future__ import annotations

import datetime
import fnmatch
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from pathlib import Path

import torch

import genrep_fast as gf

from .measurement import DEVICE, Case, measure, peak_gflops

SUITES = (
    "alignment",
    "optimizer",
    "scoring",
    "chain_bank",
    "reverse_step",
    "training_step",
    "operators",
)
QUICK_SECONDS, SECONDS = 0.5, 3.0


def find_cases(
    suites: Sequence[str], pattern: str | None, quick: bool
) -> dict[tuple[str, str], Callable[[], Case]]:
    """(suite, case) -> what builds it.

    Of all cases those that match `pattern`, else those of a quick or a full run.

    Raises:
        ValueError: for a suite that does not exist and where no case is left.
    """
    found = {}
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {suite!r}")
        module = import_module(f"genrep_fast.benchmarks.bench_{suite}")
        for name, build in module.CASES.items():
            if (
                fnmatch.fnmatch(name, pattern)
                if pattern is not None
                else not quick or name in module.QUICK
            ):
                found[suite, name] = build
    if not found:
        raise ValueError(f"case: no case of {', '.join(suites)} matches {pattern!r}")
    return found


def run(
    suites: Sequence[str] = SUITES,
    pattern: str | None = None,
    *,
    quick: bool = False,
    seconds: float | None = None,
    threads: int | None = None,
    cold: bool = False,
    roles: Sequence[str] | None = None,
    progress: Callable[[dict], None] = lambda results: None,
) -> dict:
    """Measure the cases in this process.

    Args:
        suites, pattern, quick: see `find_cases`.
        seconds: for the times of a case.
        threads: of torch.
        cold: see `measure`.
        roles: of the providers that are wanted; all where not given.
        progress: called after each case with the results so far.

    Returns:
        ``environment`` (see below) and ``rows`` (see `measure`).

    Raises:
        ValueError: where `find_cases` does, and for fewer threads than 1 or negative seconds.
    """
    cases = find_cases(suites, pattern, quick)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if seconds is not None and not seconds >= 0:
        raise ValueError(f"seconds must not be negative, got {seconds}")
    if threads is not None:
        torch.set_num_threads(threads)
    seconds = (QUICK_SECONDS if quick else SECONDS) if seconds is None else seconds
    results = {"environment": environment(cold) | {"peak_gflops": peak_gflops()}, "rows": []}
    for rows in measure(
        cases, seconds=seconds, cold=cold, chosen=lambda name, role: roles is None or role in roles
    ):
        results["rows"] += rows
        progress(results)
    return results


def environment(cold: bool = False) -> dict:
    """What figures depend on: date, command, commit, device, versions, threads and allocator."""
    installed = {
        distribution.metadata["Name"]: distribution.version
        for distribution in metadata.distributions()
    }
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": re.sub(
            r" --output[= ]\S+", "", " ".join(["genrep", *map(shlex.quote, sys.argv[1:])])
        ),
        "commit": commit(),
        "device": device_name(),
        "cuda": torch.version.cuda,
        "python": ".".join(map(str, sys.version_info[:3])),
        "genrep_fast": gf.__version__,
        "packages": {
            name: installed.get(name)
            for name in ("torch", "triton", "numpy", "diffusers", "torchjd")
        },
        "threads": torch.get_num_threads(),
        "allocator": "cold" if cold else "warm",
    }


def commit() -> str:
    """Of the sources where they are a git checkout; $COMMIT; or unknown.

    ``-dirty`` stands behind it where the sources differ from it.
    """
    command = [
        "git",
        "-C",
        str(Path(gf.__file__).parent),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty",
    ]
    try:
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        found = ""
    return os.environ.get("COMMIT") or found or "unknown"


def device_name() -> str:
    """The GPU's name, or the processor's with its cores and the kernels' instruction set."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    build = gf.info()["backends"]["cpu"]["build"] or {}
    parts = [
        names[0] if names else "CPU",
        f"{len(os.sched_getaffinity(0))} cores",
        build.get("capability", ""),
    ]
    return ", ".join(filter(None, parts))
