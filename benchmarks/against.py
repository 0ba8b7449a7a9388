"""Two commits in turn on one machine, with their own benchmarks: what got slower beyond noise."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import genrep_fast

from .measurement import DEVICE

ROOT = Path(genrep_fast.__file__).parent.parent
LEAST_CHANGE = 0.03  # smaller ones are not told, however sure
_BUILD = "import sys, pathlib, build; build.build(*map(pathlib.Path, sys.argv[1:]))"
_RUN = """
import json, pathlib, sys
from genrep_fast.benchmarks import suite
options = json.loads(sys.argv[1])
options["suites"] = [name for name in options["suites"] if name in suite.SUITES]
pathlib.Path(sys.argv[2]).write_text(json.dumps(suite.run(**options, roles=["ours", "variant"])))
"""


def compare(
    revision: str,
    options: dict,
    *,
    rounds: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """Measure `revision` and the sources as they lie here, each with its own benchmarks, in turn.

    Rows of both belong together where suite, case and provider have the same names: the work of a
    case must not change under its name.

    Args:
        revision: of this checkout's git.
        options: of `suite.run`.
        rounds: processes a commit; which of both comes first alternates.

    Returns:
        A row a provider of ours: suite, case, provider, old_ms and new_ms (medians of the rounds'
            medians), ratio (new over old), and
        `verdict`: slower or faster where no round of one overlaps those of the other and the change
        is 3 % at least, else "same"; "new" and "gone" where only one has it.

    Raises:
        ValueError: where the package does not run from a git checkout, or `revision` is none of its
            commits.
        RuntimeError: where a commit cannot be built, or its benchmarks do not run with these
            options.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {rounds}")
    # An installed package can lie in an environment inside of some checkout.
    if (
        not (ROOT / "csrc/build.py").is_file()
        or _git("rev-parse", "--is-inside-work-tree").returncode
    ):
        raise ValueError(
            f"against: genrep_fast runs from {ROOT}, which is no git checkout of its sources"
        )
    found = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if found.returncode:
        raise ValueError(f"against: {revision!r} is no commit of {ROOT}")
    with tempfile.TemporaryDirectory() as folder:
        sites = {"old": Path(folder) / "old", "new": Path(folder) / "new"}
        source = Path(folder) / "source"
        archive = Path(folder) / "source.tar"
        _checked(_git("archive", "--output", str(archive), found.stdout.strip()), "git archive")
        shutil.unpack_archive(archive, source)
        for name, root in (("old", source), ("new", ROOT)):
            progress(f"builds {revision if name == 'old' else 'the sources as they are'}")
            _build(root, sites[name])
        times: dict[str, dict[tuple, list[float]]] = {"old": {}, "new": {}}
        for number in range(rounds):
            for name in ("old", "new") if number % 2 == 0 else ("new", "old"):
                progress(f"round {number + 1} of {rounds}: {name}")
                for row in _run(sites[name], options, Path(folder) / "rows.json"):
                    if "ms" in row:
                        times[name].setdefault(
                            (row["suite"], row["case"], row["provider"]), []
                        ).append(row["ms"])
    return [
        _verdict(key, times["old"].get(key), times["new"].get(key))
        for key in dict.fromkeys([*times["old"], *times["new"]])
    ]


def _verdict(key: tuple[str, str, str], old: list[float] | None, new: list[float] | None) -> dict:
    row = dict(zip(("suite", "case", "provider"), key, strict=True))
    if old is None or new is None:
        return row | {"verdict": "new" if old is None else "gone"}
    row |= {"old_ms": statistics.median(old), "new_ms": statistics.median(new)}
    row["ratio"] = row["new_ms"] / row["old_ms"]
    slower, faster = min(new) > max(old), max(new) < min(old)
    changed = abs(row["ratio"] - 1) >= LEAST_CHANGE
    return row | {
        "verdict": "slower" if slower and changed else "faster" if faster and changed else "same"
    }


def _build(root: Path, site: Path) -> None:
    """A copy of the package at `root` with its own native code and benchmarks."""
    package = shutil.copytree(
        root / "genrep_fast",
        site / "genrep_fast",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    shutil.copytree(root / "kernels/triton", package / "kernels")
    shutil.copytree(
        root / "benchmarks",
        package / "benchmarks",
        ignore=shutil.ignore_patterns("results", "test_*", "__pycache__"),
    )
    environment = os.environ | {"PYTHONPATH": str(root / "csrc")}
    if DEVICE == "cpu":
        environment["GENREP_FAST_CUDA"] = "0"
    command = [sys.executable, "-c", _BUILD, str(package), str(site / "objects")]
    _checked(
        subprocess.run(command, env=environment, capture_output=True, text=True), f"building {root}"
    )


def _run(site: Path, options: dict, output: Path) -> list[dict]:
    command = [sys.executable, "-c", _RUN, json.dumps(options), str(output)]
    # Not from the checkout's folder, whose package would come before the copy.
    result = subprocess.run(
        command,
        cwd=site,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    _checked(result, "the benchmark")
    return json.loads(output.read_text())["rows"]


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)


def _checked(result: subprocess.CompletedProcess, what: str) -> None:
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise RuntimeError(f"{what} failed: {lines[-1]}")
