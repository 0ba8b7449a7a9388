"""What benchmarks/on_device.sh found, in one file.

    python benchmarks/collect_results.py environment FILE
        writes device, versions, and what the native libraries say about themselves
    python benchmarks/collect_results.py results FOLDER OUTPUT
        writes results.json and table.txt; its exit status is 1 unless everything succeeded
    python benchmarks/collect_results.py backends RESULTS FILE
        enters the faster backend of each operator into genrep_fast/gpu_backends.json

results.json holds `date` (UTC), `commit`, `finished`, `succeeded` (every step passed, or was
skipped for want of a tool), `environment` (see above), `steps` (verdict and seconds of each, in the
order in which they ended), `tests` (counts by file, and the names of failures), `sanitizers`
(verdicts), `rows` (of `genrep bench`, see `measure`), `triton_over_cuda` (of every case that both
ran, with the time that a loop of calls would take: the GPU's, or the host's where that is longer),
and `ncu` (kernels of the operators' large cases: share of the memory's peak throughput, and time).
It is made from what there is of a folder of intermediate files:

    environment.json, status/<group>:<name> ("<exit status> <seconds>" or "skipped: <reason>"),
    logs/<group>/<name>, junit/<name>.xml, benchmarks/<name>/bench.json and *.png, finished (empty)
"""

import argparse
import csv
import datetime
import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from xml.etree import ElementTree

NO_TIME = "skipped: no time was left"
NO_TESTS = 5  # pytest's exit status, also where a file asks for a package that is not there
UNSUPPORTED = "Device not supported"  # compute-sanitizer's words under some virtual machines
PICTURES = ("roofline.png", "training_step.png")


def environment() -> dict:
    """Device, versions and native libraries; imports torch and genrep_fast."""
    import torch

    import genrep_fast as gf
    from genrep_fast.benchmarks.suite import environment

    found = environment() | {"info": gf.info()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
        }
        found |= {"multiprocessors": properties.multi_processor_count}
        query = ["nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(
            query, capture_output=True, text=True, check=True
        ).stdout.strip()
        library = Path(gf.__file__).parent / "_C_cuda.so"
        try:
            describe = import_module("genrep_fast._introspection").describe
            found["kernel_attributes"] = json.loads(
                describe(str(library), "genrep_fast_cuda_kernel_attributes")
            )
        except (ImportError, RuntimeError) as error:  # a wheel of another Python, or no library
            found["kernel_attributes"] = str(error)
    return found


def results(folder: Path) -> dict:
    """The content of results.json."""
    statuses = sorted(folder.glob("status/*"), key=lambda path: path.stat().st_mtime_ns)
    steps = {path.name: verdict_of(path, folder) for path in statuses}
    finished = (folder / "finished").exists()
    failed = [
        name
        for name, step in steps.items()
        if step["verdict"] == NO_TIME or not step["verdict"].startswith(("passed", "skipped"))
    ]
    found = folder / "environment.json"
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("benchmarks/*/bench.json"))]
    rows = [row | {"command": run["environment"]["command"]} for run in runs for row in run["rows"]]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("COMMIT", "unknown"),
        "finished": finished,
        "succeeded": finished and not failed,
        "environment": json.loads(found.read_text()) if found.exists() else None,
        "steps": steps,
        "tests": {path.stem: count_tests(path) for path in sorted(folder.glob("junit/*.xml"))},
        "sanitizers": {
            name.partition(":")[2]: step["verdict"]
            for name, step in steps.items()
            if name.startswith("sanitizers:")
        },
        "peak_gflops": max((run["environment"]["peak_gflops"] for run in runs), default=None),
        "rows": rows,
        "triton_over_cuda": compare_backends(rows),
        "ncu": {
            path.stem.removeprefix("ncu_"): kernels_of(path)
            for path in sorted(folder.glob("logs/benchmarks/ncu_*"))
        },
    }


def verdict_of(path: Path, folder: Path) -> dict:
    text = path.read_text().strip()
    if text.startswith("skipped"):
        return {"verdict": text, "seconds": 0}
    status, seconds = (int(part) for part in text.split())
    log = folder / "logs" / path.name.replace(":", "/")
    if (
        status
        and path.name.startswith("sanitizers:")
        and UNSUPPORTED in log.read_text(errors="replace")
    ):
        return {
            "verdict": "skipped: compute-sanitizer does not support this device",
            "seconds": seconds,
        }
    if status == NO_TESTS and path.name.startswith("tests:"):
        return {"verdict": "skipped: no test was left to run", "seconds": seconds}
    verdict = {0: "passed", 124: "timed out", 137: "timed out"}.get(
        status, f"failed: exit status {status}"
    )
    return {"verdict": verdict, "seconds": seconds}


def count_tests(path: Path) -> dict:
    cases = list(ElementTree.parse(path).iter("testcase"))
    by_outcome = {
        kind: [case for case in cases if case.find(kind) is not None]
        for kind in ("failure", "error", "skipped")
    }
    failures = by_outcome["failure"] + by_outcome["error"]
    passed = len(cases) - len(failures) - len(by_outcome["skipped"])
    counts = {"passed": passed, "failed": len(failures), "skipped": len(by_outcome["skipped"])}
    return counts | {"failures": [case.get("name") for case in failures]}


def compare_backends(rows: list[dict]) -> list[dict]:
    """A row for each case and way that both backends were timed in."""
    times = {
        (row["suite"], row["case"], row["provider"]): max(row["ms"], row.get("host_ms", 0.0))
        for row in rows
        if "ms" in row
    }
    sizes = {(row["suite"], row["case"]): row["elements"] for row in rows}
    comparison = []
    for (suite, case, provider), cuda in times.items():
        triton = times.get((suite, case, provider.replace("cuda", "triton")))
        if "cuda" in provider and triton is not None:
            row = {
                "suite": suite,
                "case": case,
                "provider": provider.replace("cuda", "…"),
                "elements": sizes[suite, case],
            }
            comparison.append(row | {"cuda_ms": cuda, "triton_ms": triton, "ratio": triton / cuda})
    return comparison


def kernels_of(log: Path) -> list[dict]:
    """Kernels in ncu's CSV: name, percent of the memory's peak throughput, and microseconds.

    Whatever else was printed is passed over.
    """
    lines = log.read_text(errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict] = {}
    for line in csv.DictReader(lines[start:]):
        if not (line["ID"] or "").isdigit():
            continue
        kernel = kernels.setdefault(line["ID"], {"kernel": line["Kernel Name"][:120]})
        value = float(line["Metric Value"].replace(",", ""))
        if line["Metric Name"] == "gpu__time_duration.sum":
            kernel["us"] = value * {"ns": 1e-3, "us": 1.0, "ms": 1e3}[line["Metric Unit"]]
        else:
            kernel["memory_percent"] = value
    return list(kernels.values())


def faster_backends(comparison: list[dict]) -> dict[str, list[list]]:
    """Operator -> [number of elements, faster backend up to it], the last number None.

    Between two sizes that were measured the border is their geometric mean. A gradient finds its
    steps' likelihoods again only where it runs on forward's backend, whose entry it takes
    therefore.
    """
    found: dict[str, list[list]] = {}
    for row in sorted(
        (row for row in comparison if row["suite"] == "operators"), key=lambda row: row["elements"]
    ):
        name = row["case"].rpartition(" ")[0]
        if "," in name:  # another kind of arguments of an operator that has a row of its own
            continue
        backend, steps = "triton" if row["ratio"] < 1 else "cuda", found.setdefault(name, [])
        if steps and steps[-1][1] != backend:
            steps[-1][0] = round((steps[-1][0] * row["elements"]) ** 0.5)
            steps.append([row["elements"], backend])
        elif steps:
            steps[-1][0] = row["elements"]
        else:
            steps.append([row["elements"], backend])
    for steps in found.values():
        steps[-1][0] = None
    if "log_likelihood" in found:
        found["log_likelihood_backward"] = found["log_likelihood"]
    return dict(sorted(found.items()))


def table(found: dict) -> str:
    """The results as text."""
    device = found["environment"]["device"] if found["environment"] else "unknown device"
    lines = [f"{device}, commit {found['commit']}, {found['date']}", ""]
    lines += [
        f"{name:36}{step['seconds']:5} s  {step['verdict']}"
        for name, step in found["steps"].items()
    ]
    lines += ["", f"{'tests':36}{'passed':>8}{'failed':>8}{'skipped':>9}"]
    lines += [
        f"{name:36}{counts['passed']:8}{counts['failed']:8}{counts['skipped']:9}"
        for name, counts in found["tests"].items()
    ]
    lines += [
        "",
        f"{'case':54}{'provider':32}{'ms':>10}{'host ms':>10}{'% of copy':>11}"
        f"{'eager':>8}{'compiled':>10}",
    ]
    for row in found["rows"]:
        figures = [
            (row.get(key), spec)
            for key, spec in (("ms", "10.4f"), ("host_ms", "10.3f"), ("bandwidth_percent", "11.0f"))
        ]
        figures += [
            (row.get(key), spec)
            for key, spec in (("over_eager", "8.2f"), ("over_compiled", "10.2f"))
        ]
        text = "".join(
            " " * int(spec.partition(".")[0]) if value is None else format(value, spec)
            for value, spec in figures
        )
        case, failure = f"{row['suite']}: {row['case']}", row.get("failure", "")
        lines.append(f"{case:54}{row['provider']:32}{text}{failure}")
    lines += ["", f"{'Triton over CUDA':54}{'provider':32}{'elements':>12}{'ratio':>8}"]
    for row in found["triton_over_cuda"]:
        case = f"{row['suite']}: {row['case']}"
        lines.append(f"{case:54}{row['provider']:32}{row['elements']:12}{row['ratio']:8.2f}")
    for backend, kernels in found["ncu"].items():
        lines += ["", f"{'ncu, ' + backend:100}{'us':>10}{'% of peak':>11}"]
        lines += [
            f"{row['kernel'][:98]:100}{row.get('us', 0):10.1f}{row.get('memory_percent', 0):11.0f}"
            for row in kernels
        ]
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
    backends = commands.add_parser("backends")
    backends.add_argument("results", type=Path)
    backends.add_argument("file", type=Path)
    options = parser.parse_args()
    if options.command == "environment":
        replace(options.file, json.dumps(environment(), indent=1) + "\n")
        return 0
    if options.command == "backends":
        found = json.loads(options.results.read_text())
        known = json.loads(options.file.read_text()) if options.file.exists() else {}
        known[found["environment"]["capability"]] = faster_backends(found["triton_over_cuda"])
        lines = [
            f' "{capability}": {{\n'
            + ",\n".join(f'  "{name}": {json.dumps(steps)}' for name, steps in of_device.items())
            + "\n }"
            for capability, of_device in sorted(known.items())
        ]
        replace(options.file, "{\n" + ",\n".join(lines) + "\n}\n")
        return 0
    found = results(options.folder)
    replace(options.output / "results.json", json.dumps(found, indent=1) + "\n")
    replace(options.output / "table.txt", table(found))
    for picture in PICTURES:
        if (options.folder / "benchmarks/quick" / picture).exists():
            shutil.copy(options.folder / "benchmarks/quick" / picture, options.output)
    return 0 if found["succeeded"] else 1


if __name__ == "__main__":
    sys.exit(main())
