"""The one call for machines with a GPU: its dry run on the CPU, and what it makes of steps that
fail.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import genrep_fast as gf
from genrep_fast.benchmarks.suite import device_name

ROOT = Path(__file__).parents[2]

spec = importlib.util.spec_from_file_location(
    "collect_results", ROOT / "benchmarks/collect_results.py"
)
collect_results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(collect_results)


STRIDES = "posterior_kernels,any_strides+and+cropped+and+cpu"


def run_dry(output, *options, deadline=3600):
    """Exit status of a dry run of some tests of two files, and of a file that does not exist."""
    environment = {
        "OUT": str(output),
        "PYTHON": sys.executable,
        "COMMIT": "0123abc",
        "TESTS": f"dispatch,use+and+insist {STRIDES} missing",
        "OMP_NUM_THREADS": "1",
        "DEADLINE": str(deadline),
    }
    environment["WHEELS"] = str(output / "none")
    command = [ROOT / "benchmarks/on_device.sh", "--dry-run", *options]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    return result.returncode


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Exit status and folder of a dry run."""
    output = tmp_path_factory.mktemp("dry_run")
    return run_dry(output), output


def results_of(dry_run):
    return json.loads((dry_run[1] / "results.json").read_text())


@pytest.mark.slow
def test_a_failing_step_stops_nothing_but_is_reported(dry_run):
    status, results = dry_run[0], results_of(dry_run)
    verdicts = {name: step["verdict"] for name, step in results["steps"].items()}
    assert verdicts.pop("tests:missing") == "failed: exit status 4"
    for backend in ("cuda", "triton"):
        assert verdicts.pop(f"benchmarks:ncu_{backend}") == "skipped: a dry run has no GPU"
    assert set(verdicts.values()) == {"passed"}
    groups = [name.partition(":")[0] for name in verdicts]
    assert (
        groups[:2] == ["build"] * 2
        and sorted(groups[2:5]) == ["sanitizers", "tests", "tests"]
        and groups[5:] == ["benchmarks"] * 2
    )
    assert status == 1 and results["finished"] and not results["succeeded"]


@pytest.mark.slow
def test_environment_is_recorded(dry_run):
    results = results_of(dry_run)
    assert results["commit"] == "0123abc"
    environment = results["environment"]
    assert (
        environment["device"] == device_name()
        and environment["packages"]["torch"] == torch.__version__
    )
    backends = environment["info"]["backends"]
    # Built by the run itself.
    assert backends["cpu"]["build"] == gf.info()["backends"]["cpu"]["build"]
    assert not backends["cuda"]["available"]


@pytest.mark.slow
def test_tests_are_counted(dry_run):
    tests = results_of(dry_run)["tests"]
    assert tests["dispatch,use+and+insist"] == {
        "passed": 1,
        "failed": 0,
        "skipped": 0,
        "failures": [],
    }
    assert tests[STRIDES] == {"passed": 1, "failed": 0, "skipped": 0, "failures": []}
    assert tests["missing"] == {"passed": 0, "failed": 0, "skipped": 0, "failures": []}


@pytest.mark.slow
def test_benchmarks_are_collected(dry_run):
    rows = results_of(dry_run)["rows"]
    assert {row["suite"] for row in rows} == {"scoring", "operators"}
    assert {"eager reference", "genrep_fast, cpu"} <= {
        row["provider"] for row in rows if row["suite"] == "scoring"
    }
    assert {row["case"] for row in rows if row["suite"] == "operators"} >= {
        "gram small",
        "reverse_step small",
    }
    assert not [row for row in rows if "failure" in row]
    for row in rows:
        if row["moved_bytes"] is not None:
            assert row["bandwidth_percent"] == pytest.approx(
                100 * row["moved_bytes"] / 1e6 / row["copy_gb_per_s"] / row["ms"]
            )


@pytest.mark.slow
def test_the_accuracy_of_every_compared_result_is_kept(dry_run):
    lines = (dry_run[1] / "accuracy.txt").read_text().splitlines()
    assert lines and all("test_posterior_and_distillation_of_any_strides" in line for line in lines)
    assert all(0 <= float(line.split()[0]) <= 1 for line in lines)


@pytest.mark.slow
def test_single_tests_are_named(dry_run):
    log = (dry_run[1] / "tests.log").read_text()
    assert "test_posterior_and_distillation_of_any_strides[cpu-cropped] PASSED" in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "groups"),
    [
        ("tests", {"build", "sanitizers", "tests"}),
        ("benchmarks", {"build", "benchmarks"}),
        ("profile", {"build", "benchmarks"}),
    ],
)
def test_a_part_alone(part, groups, tmp_path):
    # No time for any step: that each would run is what is left of them.
    assert run_dry(tmp_path, "--part", part, deadline=1) == 1
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert {name.partition(":")[0] for name in steps} == groups
    profiled = {name for name in steps if "ncu" in name}
    expected = {"benchmarks:ncu_cuda", "benchmarks:ncu_triton"}
    assert profiled == (expected if part == "profile" else set())


@pytest.mark.parametrize("options", [["--part"], ["--part", "nothing"], ["nothing"]])
def test_unknown_options_are_refused(options, tmp_path):
    command = [ROOT / "benchmarks/on_device.sh", *options]
    environment = os.environ | {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and "--part tests|benchmarks|profile" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_everything_fits_into_nine_small_files(dry_run):
    files = list(dry_run[1].iterdir())
    assert {path.name for path in files} == {
        "results.json",
        "table.txt",
        "accuracy.txt",
        "roofline.png",
        *(f"{log}.log" for log in ("build", "tests", "sanitizers", "benchmarks")),
    }
    assert sum(path.stat().st_size for path in files) < 2**20
    assert "genrep_fast, cpu" in (dry_run[1] / "table.txt").read_text()
    assert "not found" in (dry_run[1] / "tests.log").read_text()


def test_asks_for_a_gpu_otherwise(tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
    }
    result = subprocess.run(
        [ROOT / "benchmarks/on_device.sh"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2 and "--dry-run" in result.stderr
    assert not (tmp_path / "out").exists()


# Collected from intermediate files


@pytest.fixture
def folder(tmp_path):
    """What a run without failures leaves."""
    for name in ("status", "logs/sanitizers", "junit", "benchmarks", "output"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "status/build:native_code").write_text("0 61\n")
    (tmp_path / "status/sanitizers:memcheck,triton").write_text(
        "skipped: there is no compute-sanitizer\n"
    )
    (tmp_path / "finished").touch()
    return tmp_path


def collect(folder, monkeypatch):
    """Exit status and content of results.json."""
    monkeypatch.setattr(
        sys, "argv", ["collect_results.py", "results", str(folder), str(folder / "output")]
    )
    status = collect_results.main()
    return status, json.loads((folder / "output/results.json").read_text())


def test_success(folder, monkeypatch):
    status, results = collect(folder, monkeypatch)
    assert status == 0 and results["succeeded"]
    assert results["steps"]["build:native_code"] == {"verdict": "passed", "seconds": 61}
    assert results["sanitizers"] == {"memcheck,triton": "skipped: there is no compute-sanitizer"}


def test_an_interrupted_run_has_not_succeeded(folder, monkeypatch):
    (folder / "finished").unlink()
    status, results = collect(folder, monkeypatch)
    assert status == 1 and not results["finished"] and not results["succeeded"]


@pytest.mark.parametrize(
    ("step", "content", "verdict", "succeeded"),
    [
        ("build:native_code", "1 5", "failed: exit status 1", False),
        ("sanitizers:racecheck,cuda", "99 20", "failed: exit status 99", False),
        ("tests:kernels", "124 170", "timed out", False),
        ("benchmarks:optimizer_1e8", "137 160", "timed out", False),
        (
            "benchmarks:optimizer_1e8",
            "skipped: no time was left",
            "skipped: no time was left",
            False,
        ),
        ("tests:rules", "5 2", "skipped: no test was left to run", True),
    ],
)
def test_verdicts(step, content, verdict, succeeded, folder, monkeypatch):
    (folder / "logs/sanitizers/racecheck,cuda").write_text("========= ERROR SUMMARY: 2 errors\n")
    (folder / "status" / step).write_text(content)
    status, results = collect(folder, monkeypatch)
    assert results["steps"][step]["verdict"] == verdict
    assert results["succeeded"] == succeeded and status == (0 if succeeded else 1)


def test_a_device_without_sanitizers_fails_nothing(folder, monkeypatch):
    (folder / "status/sanitizers:memcheck,cuda").write_text("1 3")
    (folder / "logs/sanitizers/memcheck,cuda").write_text(
        "========= Error: Device not supported.\n"
    )
    status, results = collect(folder, monkeypatch)
    assert status == 0
    assert (
        results["sanitizers"]["memcheck,cuda"]
        == "skipped: compute-sanitizer does not support this device"
    )


def test_failing_tests_are_named(folder, monkeypatch):
    (folder / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert False\n"
        "@pytest.mark.skip\ndef test_absent(): pass\n"
        "@pytest.fixture\ndef broken(): raise OSError\ndef test_broken(broken): pass\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--junitxml=junit/some.xml",
        "test_some.py",
    ]
    assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 1
    counts = collect(folder, monkeypatch)[1]["tests"]["some"]
    assert counts == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": ["test_bad", "test_broken"],
    }


def operator_row(case, elements, backend, ms, host_ms=0.1):
    row = {
        "suite": "operators",
        "case": case,
        "provider": backend,
        "role": "ours",
        "elements": elements,
        "moved_bytes": 4 * elements,
    }
    return row | {"ms": ms, "host_ms": host_ms, "bandwidth_percent": 50.0}


def test_triton_is_compared_with_cuda(folder, monkeypatch):
    environment = {"command": "genrep bench", "peak_gflops": 7.0}
    rows = [
        operator_row("gram large", 10**8, "cuda", 2.0),
        operator_row("gram large", 10**8, "triton", 3.0),
    ]
    # The host is slower.
    rows += [
        operator_row("gram small", 10, "cuda", 0.01, 0.2),
        operator_row("gram small", 10, "triton", 0.005, 0.5),
    ]
    rows += [
        operator_row("combine small", 10, "cuda", 0.3),
        operator_row("posterior small", 10, "triton", 0.3),
    ]
    (folder / "benchmarks/operators").mkdir()
    (folder / "benchmarks/operators/bench.json").write_text(
        json.dumps({"environment": environment, "rows": rows})
    )
    results = collect(folder, monkeypatch)[1]
    assert {(row["case"], row["ratio"]) for row in results["triton_over_cuda"]} == {
        ("gram large", 1.5),
        ("gram small", 2.5),
    }
    assert results["peak_gflops"] == 7.0 and len(results["rows"]) == 6
    assert "gram large" in (folder / "output/table.txt").read_text()


def test_the_faster_backend_of_each_size_is_entered(tmp_path, monkeypatch):
    def comparison(case, elements, ratio):
        return {"suite": "operators", "case": case, "elements": elements, "ratio": ratio}

    compared = [
        comparison("gram large", 10**8, 0.5),
        comparison("gram small", 10**4, 1.5),
        comparison("gram medium", 10**6, 1.1),
    ]
    compared += [
        comparison("log_likelihood small", 10, 0.9),
        comparison("log_likelihood_backward small", 10, 1.1),
    ]
    compared += [
        comparison("log_likelihood, shared centres small", 10, 1.5),
        comparison("combine small", 10, 2.0),
    ]
    (tmp_path / "results.json").write_text(
        json.dumps({"environment": {"capability": "9.0"}, "triton_over_cuda": compared})
    )
    (tmp_path / "backends.json").write_text(json.dumps({"8.0": {"gram": [[None, "cuda"]]}}))
    arguments = [
        "collect_results.py",
        "backends",
        str(tmp_path / "results.json"),
        str(tmp_path / "backends.json"),
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    assert collect_results.main() == 0
    assert json.loads((tmp_path / "backends.json").read_text()) == {
        "8.0": {"gram": [[None, "cuda"]]},
        "9.0": {
            "combine": [[None, "cuda"]],
            "gram": [[10**7, "cuda"], [None, "triton"]],
            "log_likelihood": [[None, "triton"]],
            "log_likelihood_backward": [[None, "triton"]],
        },
    }


def test_kernels_that_ncu_measured(tmp_path):
    head = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
    lines = ["==PROF== Connected", head]
    lines += ['"0","1","a<4>(int)","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","87.5"']
    lines += [
        '"0","1","a<4>(int)","gpu__time_duration.sum","us","1,175.5"',
        '"1","1","b","gpu__time_duration.sum","ns","500"',
    ]
    (tmp_path / "ncu_cuda").write_text("\n".join(lines))
    kernels = collect_results.kernels_of(tmp_path / "ncu_cuda")
    assert kernels == [
        {"kernel": "a<4>(int)", "memory_percent": 87.5, "us": 1175.5},
        {"kernel": "b", "us": 0.5},
    ]
    (tmp_path / "ncu_triton").write_text("==ERROR== no permission\n")
    assert collect_results.kernels_of(tmp_path / "ncu_triton") == []
