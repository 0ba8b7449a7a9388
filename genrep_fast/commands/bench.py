"""`genrep bench`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ARGUMENTS: dict[str, dict[str, Any]] = {
    "suite": {
        "nargs": "+",
        "help": "of alignment, optimizer, scoring, chain_bank, reverse_step, training_step "
        "and operators; all of them where not given",
    },
    "quick": {"action": "store_true", "help": "few cases, in a few minutes"},
    "cold": {
        "action": "store_true",
        "help": "on a CPU, let the C library give freed memory back; "
        "else it keeps it, as PyTorch does on a GPU",
    },
}


def bench(
    suite: list[str] | None = None,
    case: str | None = None,
    quick: bool = False,
    seconds: float | None = None,
    threads: int | None = None,
    cold: bool = False,
    output: str = "runs/bench",
    against: str | None = None,
    rounds: int = 5,
) -> None:
    """Measure the operators and a whole training step beside other implementations.

    Those are eager, compiled and other packages' ones.

    Args:
        case: pattern of the cases' names, e.g. 'latent*'; those of a quick or a full run where not
            given.
        seconds: for the times of a case; 3, or 0.5 with --quick, where not given.
        threads: of torch; its own choice where not given.
        output: folder for report.html, table.md, bench.json, bench.csv and the pictures.
        against: commit with which the sources as they are get compared; with exit status 1 where
            something got slower.
        rounds: of the comparison, a process a commit each.
    """
    from ..benchmarks import suite as benchmarks
    from ..reporting.terminal import console

    suites = suite or benchmarks.SUITES
    # What cannot be found is told before anything is measured.
    benchmarks.find_cases(suites, case, quick)
    options = {
        "suites": suites,
        "pattern": case,
        "quick": quick,
        "seconds": seconds,
        "threads": threads,
        "cold": cold,
    }
    if against is None:
        _measure(options, Path(output))
        return
    from ..benchmarks.against import compare

    _print_comparison(compare(against, options, rounds=rounds, progress=console.print))


def _measure(options: dict[str, Any], folder: Path) -> None:
    """Run the benchmarks and write their report; exit with 1 where a kernel of ours failed."""
    from ..benchmarks import suite as benchmarks
    from ..benchmarks.report import table, write
    from ..reporting.terminal import console

    def keep(results: dict[str, Any]) -> None:
        write(results, folder, complete=False)
        row = results["rows"][-1]
        console.print(f"measured {row['suite'].replace('_', ' ')}: {row['case']}", highlight=False)

    console.print("checks every case first, and what memory it needs")
    results = benchmarks.run(**options, progress=keep)
    written = ", ".join(map(str, write(results, folder)))
    print(f"\n{table(results)}\nwrote {written}")
    ours = [row for row in results["rows"] if row["role"] in ("ours", "variant")]
    if any("failure" in row for row in ours):
        sys.exit(1)


def _print_comparison(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        change = f"{row['ratio']:7.3f}" if "ratio" in row else " " * 7
        print(f"{row['verdict']:8}{change}  {row['suite']}: {row['case']}: {row['provider']}")
    if any(row["verdict"] == "slower" for row in rows):
        sys.exit(1)
