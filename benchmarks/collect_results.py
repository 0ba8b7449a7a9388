"""What benchmarks/on_device.sh found, in one file.

    python benchmarks/collect_results.py environment FILE        # device, versions, and what the native libraries say about themselves
    python benchmarks/collect_results.py results FOLDER OUTPUT   # results.json and table.txt; exit status 1 unless everything succeeded

results.json holds `date` (UTC), `commit`, `finished`, `succeeded` (every step passed, or was skipped for want of a tool), `environment`
(see above), `steps` (verdict and seconds of each, in the order in which they ended), `tests` (counts by file, and the names of failures),
`sanitizers` (verdicts), `benchmarks` (the rows as each benchmark wrote them, and `percent_of_copy`: the time in which the same process
copies what the fused operation moves at least, as a share of the provider's) and `triton_over_cuda` (Triton's time as a multiple of
CUDA's). It is made from what there is of a folder of intermediate files:

    environment.json, status/<group>:<name> ("<exit status> <seconds>" or "skipped: <reason>"), logs/<group>/<name>, junit/<name>.xml,
    benchmarks/<benchmark>,<name>.json, finished (empty)
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path
from xml.etree import ElementTree

PACKAGES = ("torch", "triton", "numpy", "diffusers", "torchjd", "pytest")
NO_TIME = "skipped: no time was left"
NO_TESTS = 5  # pytest's exit status, also where a file asks for a package that is not there
UNSUPPORTED = "Device not supported"  # compute-sanitizer's words under some virtual machines


def environment() -> dict:
    """Device, versions and native libraries; imports torch and genrep_fast."""
    import torch

    import genrep_fast as gf

    installed = {distribution.metadata["Name"]: distribution.version for distribution in metadata.distributions()}
    found = {"device": "cpu", "cuda": torch.version.cuda, "packages": {name: installed.get(name) for name in PACKAGES}, "info": gf.info()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count}
        query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    if gf.info()["backends"]["cuda"]["build"]:
        describe = import_module("genrep_fast._introspection").describe
        library = Path(gf.__file__).parent / "_C_cuda.so"
        found["kernel_attributes"] = json.loads(describe(str(library), "genrep_fast_cuda_kernel_attributes"))
    return found


def results(folder: Path) -> dict:
    """The content of results.json."""
    statuses = sorted(folder.glob("status/*"), key=lambda path: path.stat().st_mtime_ns)
    steps = {path.name: verdict_of(path, folder) for path in statuses}
    finished = (folder / "finished").exists()
    failed = [name for name, step in steps.items() if step["verdict"] == NO_TIME or not step["verdict"].startswith(("passed", "skipped"))]
    found = folder / "environment.json"
    rows = benchmark_rows(folder)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("COMMIT", "unknown"),
        "finished": finished,
        "succeeded": finished and not failed,
        "environment": json.loads(found.read_text()) if found.exists() else None,
        "steps": steps,
        "tests": {path.stem: count_tests(path) for path in sorted(folder.glob("junit/*.xml"))},
        "sanitizers": {name.partition(":")[2]: step["verdict"] for name, step in steps.items() if name.startswith("sanitizers:")},
        "benchmarks": rows,
        "triton_over_cuda": compare_backends(rows),
    }


def verdict_of(path: Path, folder: Path) -> dict:
    text = path.read_text().strip()
    if text.startswith("skipped"):
        return {"verdict": text, "seconds": 0}
    status, seconds = (int(part) for part in text.split())
    log = folder / "logs" / path.name.replace(":", "/")
    if status and path.name.startswith("sanitizers:") and UNSUPPORTED in log.read_text(errors="replace"):
        return {"verdict": "skipped: compute-sanitizer does not support this device", "seconds": seconds}
    if status == NO_TESTS and path.name.startswith("tests:"):
        return {"verdict": "skipped: no test was left to run", "seconds": seconds}
    verdict = {0: "passed", 124: "timed out", 137: "timed out"}.get(status, f"failed: exit status {status}")
    return {"verdict": verdict, "seconds": seconds}


def count_tests(path: Path) -> dict:
    cases = list(ElementTree.parse(path).iter("testcase"))
    by_outcome = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    failures = by_outcome["failure"] + by_outcome["error"]
    passed = len(cases) - len(failures) - len(by_outcome["skipped"])
    counts = {"passed": passed, "failed": len(failures), "skipped": len(by_outcome["skipped"])}
    return counts | {"failures": [case.get("name") for case in failures]}


def benchmark_rows(folder: Path) -> dict[str, list[dict]]:
    rows = {}
    for path in sorted(folder.glob("benchmarks/*.json")):
        for row in json.loads(path.read_text()):
            if "floor_ms" in row:
                row["percent_of_copy"] = 100 * row["floor_ms"] / milliseconds(row)
            rows.setdefault(path.name.partition(",")[0], []).append(row)
    return rows


def compare_backends(rows: dict[str, list[dict]]) -> list[dict]:
    """A row for each operation that both backends were timed in."""
    comparison = []
    for benchmark, timed in rows.items():
        settings = {(row.get("numel"), row.get("layout"), row["threads"], row["provider"]): milliseconds(row) for row in timed}
        for (numel, layout, threads, provider), cuda in settings.items():
            triton = settings.get((numel, layout, threads, provider.replace(", cuda", ", triton")))
            if ", cuda" in provider and triton is not None:
                row = {"benchmark": benchmark, "numel": numel, "layout": layout, "operation": provider.replace(", cuda", "")}
                comparison.append(row | {"cuda_ms": cuda, "triton_ms": triton, "ratio": triton / cuda})
    return comparison


def milliseconds(row: dict) -> float:
    return row["warm_ms"] if "warm_ms" in row else row["ms"]


def table(found: dict) -> str:
    """The results as text."""
    device = found["environment"]["device"] if found["environment"] else "unknown device"
    lines = [f"{device}, commit {found['commit']}, {found['date']}", ""]
    lines += [f"{name:36}{step['seconds']:5} s  {step['verdict']}" for name, step in found["steps"].items()]
    lines += ["", f"{'tests':36}{'passed':>8}{'failed':>8}{'skipped':>9}"]
    lines += [f"{name:36}{counts['passed']:8}{counts['failed']:8}{counts['skipped']:9}" for name, counts in found["tests"].items()]
    for benchmark, rows in found["benchmarks"].items():
        lines += ["", f"{benchmark:48}{'elements':>10}  {'layout':40}{'ms':>10}{'host ms':>10}{'% of copy':>11}"]
        for row in rows:
            share = f"{row['percent_of_copy']:11.0f}" if "percent_of_copy" in row else ""
            lines += [f"{row['provider']:48}{row['numel']:10}  {row.get('layout') or row['allocator']:40}{milliseconds(row):10.3f}{row.get('host_ms') or 0:10.3f}{share}"]
    lines += ["", f"{'Triton over CUDA':48}{'elements':>10}  {'layout':40}{'ratio':>10}"]
    lines += [f"{row['operation']:48}{row['numel']:10}  {row['layout']:40}{row['ratio']:10.2f}" for row in found["triton_over_cuda"]]
    return "\n".join(lines) + "\n"


def replace(path: Path, text: str) -> None:
    """Write a file that is never seen half written."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    temporary.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Collect what benchmarks/on_device.sh found.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("environment").add_argument("file", type=Path)
    collect = commands.add_parser("results")
    collect.add_argument("folder", type=Path)
    collect.add_argument("output", type=Path)
    options = parser.parse_args()
    if options.command == "environment":
        replace(options.file, json.dumps(environment(), indent=1) + "\n")
        return 0
    found = results(options.folder)
    replace(options.output / "results.json", json.dumps(found, indent=1) + "\n")
    replace(options.output / "table.txt", table(found))
    return 0 if found["succeeded"] else 1


if __name__ == "__main__":
    sys.exit(main())
