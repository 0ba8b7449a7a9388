"""The suite behind `genrep bench`: which cases it finds, that its gates can fail, its rows, report
and comparison of commits.
"""

import csv
import io
import json
from importlib import import_module

import pytest
import torch

from genrep_fast import cli
from genrep_fast.benchmarks import against, measurement, report, suite
from genrep_fast.benchmarks.measurement import Case, Provider
from genrep_fast.dispatch import selection

# Cases

SIZES = ("small", "medium", "large") if measurement.DEVICE == "cuda" else ("small", "medium")


def test_cases_of_a_quick_and_of_a_full_run():
    quick, full = (suite.find_cases(suite.SUITES, None, quick) for quick in (True, False))
    assert set(quick) < set(full)
    assert {name for name, _ in full} == set(suite.SUITES)
    assert ("scoring", "latent forward") in quick
    assert set(suite.find_cases(["operators"], "gram *", True)) == {
        ("operators", f"gram {size}") for size in SIZES
    }


@pytest.mark.parametrize("name", suite.SUITES)
def test_named_cases_exist(name):
    module = import_module(f"genrep_fast.benchmarks.bench_{name}")
    assert {*module.QUICK, module.SMALLEST} <= set(module.CASES)


def test_nothing_to_measure():
    with pytest.raises(ValueError, match="suite must be one of alignment, .*, got 'speed'"):
        suite.find_cases(["speed"], None, False)
    with pytest.raises(ValueError, match="no case of scoring, operators matches 'gram'"):
        suite.find_cases(["scoring", "operators"], "gram", False)


@pytest.mark.parametrize(
    ("option", "value"), [("threads", 0), ("seconds", -1.0), ("seconds", float("nan"))]
)
def test_options_out_of_range(option, value):
    with pytest.raises(ValueError, match=f"{option} must .*, got {value}"):
        suite.run(["scoring"], "small forward", **{option: value})


def test_the_command_refuses_them(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["--suite", "speed"], "got 'speed'"),
        (["--against", "no-such-commit"], "'no-such-commit' is no commit"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["bench", *arguments])
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# Gates


BROKEN = {  # suite -> case, operator whose result is off by a thousandth
    "alignment": ("1e6 list", "combine"),
    "optimizer": ("1e6 list", "adamw_step"),
    "scoring": ("small forward", "log_likelihood"),
    "chain_bank": ("1 chain, 8 images", "log_likelihood"),
    "reverse_step": ("chain", "reverse_step"),
    "training_step": ("scoring", "distillation_loss"),
    "operators": ("score_update small", "score_update"),
}


def scale(values):
    for value in values if isinstance(values, list | tuple) else [values]:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.detach().mul_(1.001)


@pytest.mark.parametrize("name", suite.SUITES)
def test_a_wrong_kernel_does_not_pass_the_gate(name, monkeypatch):
    case_name, operator = BROKEN[name]
    case = import_module(f"genrep_fast.benchmarks.bench_{name}").CASES[case_name]()
    *_, provider = (
        provider for provider in case.providers.values() if provider.role in ("ours", "variant")
    )
    assert provider.error() < 1e-2
    kernel = selection._implementations[operator]["cpu"]

    def wrong(*arguments):
        results = kernel(*arguments)
        scale(results)
        if operator in ("combine", "score_update"):
            scale(arguments[-1])
        if operator == "adamw_step":
            scale(arguments[0])
        return results

    monkeypatch.setitem(selection._implementations[operator], "cpu", wrong)
    with pytest.raises(RuntimeError, match="error"):
        provider.error()


# Rows


def fail():
    raise RuntimeError("relative error\n 1.0")


def small_case(**errors):
    source, target = torch.ones(1000), torch.empty(1000)
    roles = {
        "loop": "eager",
        "fused": "compiled",
        "peer a": "peer",
        "peer b": "peer",
        "least": "bound",
        "mine": "ours",
        "other": "ours",
    }
    providers = {
        name: Provider(lambda: target.copy_(source), errors.get(name, lambda: 1e-7), role)
        for name, role in roles.items()
    }
    return Case(providers, 1000, 8000, 2000, lambda: target.copy_(source), 8000)


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(measurement, "keep_freed_memory", lambda: None)  # of this process, for good
    case = small_case(other=fail)
    (rows,) = measurement.measure(
        {("scoring", "tiny"): lambda: case},
        seconds=0,
        cold=False,
        chosen=lambda name, role: name != "least" or role != "bound",
    )
    return {row["provider"]: row for row in rows}


def test_ratios_and_bandwidth(rows):
    # The bound was not chosen.
    assert set(rows) == {
        "loop",
        "fused",
        "peer a",
        "peer b",
        "mine",
        "other",
    }
    mine = rows["mine"]
    assert mine["error"] == 1e-7 and (mine["elements"], mine["moved_bytes"], mine["flops"]) == (
        1000,
        8000,
        2000,
    )
    assert mine["over_eager"] == pytest.approx(rows["loop"]["ms"] / mine["ms"])
    assert mine["over_compiled"] == pytest.approx(rows["fused"]["ms"] / mine["ms"])
    fastest = min(("peer a", "peer b"), key=lambda name: rows[name]["ms"])
    assert mine["peer"] == fastest and mine["over_peer"] == pytest.approx(
        rows[fastest]["ms"] / mine["ms"]
    )
    assert mine["low_ms"] <= mine["ms"] <= mine["high_ms"]
    assert mine["bandwidth_percent"] == pytest.approx(100 * mine["floor_ms"] / mine["ms"])
    assert mine["floor_ms"] == pytest.approx(mine["moved_bytes"] / mine["copy_gb_per_s"] / 1e6)


def test_what_is_wrong_is_not_timed(rows):
    assert rows["other"]["failure"] == "RuntimeError: relative error 1.0"
    assert not {"ms", "error", "over_eager"} & set(rows["other"])


def test_a_case_in_which_everything_fails(monkeypatch):
    case = Case({"mine": Provider(fail, fail, "ours")}, 1, None, 1, fail, 1)
    (rows,) = measurement.measure(
        {("scoring", "tiny"): lambda: case}, seconds=0, cold=True, chosen=lambda name, role: True
    )
    assert [row["provider"] for row in rows if "failure" in row] == ["mine"]


def test_peak_memory_of_a_call():
    assert 30e6 < measurement.peak_extra_bytes(lambda: torch.ones(10_000_000)) < 60e6
    kept = torch.ones(10_000_000)
    assert measurement.peak_extra_bytes(lambda: kept.add_(1)) < 5e6


# Report


@pytest.fixture
def results(rows):
    environment = suite.environment() | {"peak_gflops": 100.0, "device": "Some GPU, 80 GB"}
    return {"environment": environment, "rows": list(rows.values())}


def test_report_files(results, tmp_path):
    assert {path.name for path in report.write(results, tmp_path, complete=False)} == {
        "bench.json",
        "bench.csv",
    }
    paths = report.write(results, tmp_path / "run")
    assert {path.name for path in paths} == {
        "bench.json",
        "bench.csv",
        "table.md",
        "report.html",
        "roofline.png",
    }
    assert json.loads((tmp_path / "run/bench.json").read_text()) == results
    assert (tmp_path / "run/roofline.png").read_bytes().startswith(b"\x89PNG")
    html = (tmp_path / "run/report.html").read_text()
    assert (
        html.count('<img src="data:image/png;base64,') == 1
        and "<td>mine</td>" in html
        and "relative error 1.0" in html
    )


def test_lines_are_keyed(results):
    lines = list(csv.DictReader(io.StringIO(report.as_csv(results))))
    assert len(lines) == 6
    assert {line["device"] for line in lines} == {"Some GPU, 80 GB"}
    assert {line["torch"] for line in lines} == {results["environment"]["packages"]["torch"]}
    assert all(line["commit"] and line["date"] for line in lines)
    assert {line["provider"]: line["ms"] for line in lines}["mine"] == str(results["rows"][4]["ms"])


def test_table(results):
    text = report.table(results)
    head, rule, *lines = text.splitlines()
    assert [line.split(" | ")[1] for line in lines if line.startswith("| ")] == ["mine"]
    assert head.count("|") == rule.count("|") == lines[0].count("|")
    assert f"{results['rows'][4]['over_eager']:.3g} ×" in text and "ms on the host" not in text
    assert "Some GPU, 80 GB" in text and results["environment"]["date"][:10] in text
    assert "- scoring, tiny, other: RuntimeError: relative error 1.0" in lines


def test_empty_columns_are_left_out(results):
    for row in results["rows"]:
        row.pop("over_peer", None)
    assert "best peer" not in report.table(results).splitlines()[0]


def test_tables_are_written_between_marks(results, tmp_path):
    page = "above\n<!-- table: bench.json -->\nold | \\1\n<!-- end of table -->\nbelow\n"
    (tmp_path / "some-cpu").mkdir()
    (tmp_path / "some-cpu/bench.json").write_text(json.dumps(results))
    written = report.written_tables(page, tmp_path)
    marked = f"<!-- table: bench.json -->\n{report.table(results)}<!-- end of table -->"
    assert written == f"above\n{marked}\nbelow\n"
    page = (
        "<!-- table: bench.json scoring -->\n<!-- end of table -->\n"
        "<!-- table: bench.json optimizer -->\n<!-- end of table -->"
    )
    assert report.written_tables(page, tmp_path).count("| mine |") == 1
    assert report.written_tables("no marks\n", tmp_path) == "no marks\n"
    assert report.written_tables(written, tmp_path) == written


def step_rows():
    ms = {
        ("denoiser", "torch"): 100,
        ("teacher evaluations", "torch"): 5,
        ("step", "unaligned"): 110,
    }
    ms |= {
        (case, "eager reference"): value
        for case, value in (("scoring", 50), ("alignment", 9), ("optimizer", 8), ("average", 2))
    }
    ms |= {
        ("method", "eager reference"): 70,
        ("step", "eager reference"): 175,
        ("scoring", "mine"): 1,
        ("Gram pass", "mine"): 1,
    }
    ms |= {
        ("update", "mine"): 4,
        ("method", "mine"): 5,
        ("step", "mine"): 100,
        ("update", "eager reference"): 19,
    }
    return [
        {
            "suite": "training_step",
            "case": case,
            "provider": provider,
            "role": "ours",
            "ms": float(value),
            "flops": 0,
            "moved_bytes": None,
        }
        | {"extra_bytes": 0, "error": 0.0, "elements": 1}
        for (case, provider), value in ms.items()
    ]


def test_training_step(results, tmp_path):
    results = results | {"rows": step_rows()}
    assert "training_step.png" in {path.name for path in report.write(results, tmp_path)}
    text = (tmp_path / "table.md").read_text()
    assert "of a whole training step: eager reference: 40.0%; mine: 5.0%." in text
    assert "apart from it: 4.5% of a step without the method" in text


def test_slug():
    assert report.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


# Two commits


def test_verdicts():
    def verdict(old, new):
        return against._verdict(("scoring", "a", "mine"), old, new)["verdict"]

    assert verdict([1.0, 1.1, 1.05], [1.2, 1.25, 1.3]) == "slower"
    assert verdict([1.2, 1.25, 1.3], [1.0, 1.1, 1.05]) == "faster"
    assert verdict([1.0, 1.3, 1.05], [1.2, 1.25, 1.3]) == "same"  # they overlap
    assert verdict([1.0, 1.001], [1.02, 1.021]) == "same"  # too little
    assert verdict(None, [1.0]) == "new" and verdict([1.0], None) == "gone"


def test_commits_are_measured_in_turn(monkeypatch):
    built, ran = {}, []

    def build(root, site):
        built[site.name] = root
        assert (root / "genrep_fast/__init__.py").is_file()

    def run(site, options, output):
        ran.append(site.name)
        assert options == {"quick": True}
        times = {"a": 1.0, "b": 2.0 if site.name == "new" else 1.5}
        return [
            {"suite": "scoring", "case": case, "provider": "mine", "ms": ms + 0.001 * len(ran)}
            for case, ms in times.items()
        ]

    monkeypatch.setattr(against, "_build", build)
    monkeypatch.setattr(against, "_run", run)
    rows = against.compare("HEAD", {"quick": True}, rounds=3)
    assert ran == ["old", "new", "new", "old", "old", "new"]
    assert built["new"] == against.ROOT and built["old"] != against.ROOT
    assert {row["case"]: row["verdict"] for row in rows} == {"a": "same", "b": "slower"}


SUITE = """
SUITES = ("alignment",{more})

def run(suites, roles):
    assert roles == ["ours", "variant"]
    row = {{"case": {case!r}, "provider": "mine", "ms": 1.0}}
    return {{"rows": [{{"suite": suite, **row}} for suite in suites]}}
"""


def test_each_commit_runs_its_own_benchmarks(monkeypatch, tmp_path):
    for name, suite_source in (
        ("old", SUITE.format(more="", case="a")),
        ("new", SUITE.format(more='"retrieval"', case="b")),
    ):
        for folder in ("genrep_fast", "kernels/triton", "benchmarks", "csrc"):
            (tmp_path / name / folder).mkdir(parents=True)
        for file in (
            "genrep_fast/__init__.py",
            "kernels/triton/__init__.py",
            "benchmarks/__init__.py",
        ):
            (tmp_path / name / file).touch()
        (tmp_path / name / "csrc/build.py").write_text("def build(package, objects): pass\n")
        (tmp_path / name / "benchmarks/suite.py").write_text(suite_source)
        against._build(tmp_path / name, tmp_path / "sites" / name)
    found = {}
    for name in ("old", "new"):
        rows = against._run(
            tmp_path / "sites" / name,
            {"suites": ["alignment", "retrieval"]},
            tmp_path / "rows.json",
        )
        found[name] = [(row["suite"], row["case"]) for row in rows]
    assert found == {"old": [("alignment", "a")], "new": [("alignment", "b"), ("retrieval", "b")]}


def test_nothing_to_compare_with(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="rounds must be at least 2, got 1"):
        against.compare("HEAD", {}, rounds=1)
    monkeypatch.setattr(against, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="is no git checkout of its sources"):
        against.compare("HEAD", {})
