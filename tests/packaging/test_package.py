"""The package as users meet it: public names, light import, wheel, and the command's surface."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import torch

import genrep_fast as gf
from genrep_fast import cli, extras

ROOT = Path(__file__).parents[2]


def run_python(code: str, cwd: Path, python_path: Path) -> str:
    """Standard output of `code` in a fresh interpreter, as if `python_path` were installed and
    `cwd` the working directory.
    """
    environment = os.environ | {"PYTHONPATH": str(python_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("name", gf.__all__)
def test_public_names_exist_and_are_documented(name):
    assert getattr(gf, name).__doc__.strip()


def test_all_holds_every_public_import():
    assert dir(gf) == sorted(gf.__all__)
    imported = {
        alias.name
        for node in ast.parse(Path(gf.__file__).read_text()).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    others = {"annotations", "import_module", "__version__", "_moved"}
    assert imported - others | set(gf._LAZY) == set(gf.__all__)


def test_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="no attribute 'DiffusionSegmenter'"):
        _ = gf.DiffusionSegmenter


def test_import_is_light_and_touches_no_device(tmp_path):
    code = """
import sys, torch
before = set(sys.modules)
import genrep_fast
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
print(torch.cuda.is_initialized())
"""
    modules, initialized = run_python(code, tmp_path, ROOT).splitlines()
    heavy = (
        "accelerate diffusers jinja2 jsonargparse matplotlib PIL rich scipy sklearn torchmetrics "
        "torchvision transformers triton"
    )
    assert "genrep_fast" in modules.split()
    assert set(modules.split()) & set(heavy.split()) == set()
    assert initialized == "False"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel without native code, built from a copy, so that nothing of an earlier build gets
    in; test_build.py has the other one.
    """
    source, output = tmp_path_factory.mktemp("build") / "source", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(
        ".*",
        "build",
        "dist",
        "runs",
        "device-results",
        "*.egg-info",
        "__pycache__",
        "*.so",
        "build.json",
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    options = [
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--disable-pip-version-check",
        "--wheel-dir",
        output,
        source,
    ]
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options],
        env=os.environ | {"GENREP_FAST_PURE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return next(output.glob("*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    package = {
        str(path.relative_to(ROOT))
        for pattern in ("*.py", "*.jinja")
        for path in (ROOT / "genrep_fast").rglob(pattern)
    }
    package |= {"genrep_fast/gpu_backends.json", "genrep_fast/py.typed"}
    kernels = {
        f"genrep_fast/kernels/{path.name}" for path in (ROOT / "kernels/triton").glob("*.py")
    }
    benchmarks = {
        f"genrep_fast/benchmarks/{path.name}"
        for path in (ROOT / "benchmarks").glob("*.*")
        if path.suffix in (".py", ".jinja") and not path.name.startswith("test_")
    }
    metadata = f"genrep_fast-{gf.__version__}.dist-info/"
    assert wheel.name == f"genrep_fast-{gf.__version__}-py3-none-any.whl"
    assert {
        name for name in names if not name.startswith(metadata)
    } == package | kernels | benchmarks
    assert metadata + "licenses/LICENSE" in names


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = f"genrep_fast-{gf.__version__}.dist-info/"
    lines = archive.read(metadata + "METADATA").decode().splitlines()
    assert f"Version: {gf.__version__}" in lines
    assert "Requires-Python: >=3.10" in lines
    assert {
        line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line
    } == {
        "Requires-Dist: torch>=2.11",
        "Requires-Dist: numpy",
        "Requires-Dist: safetensors",
    }
    assert "genrep = genrep_fast.cli:main" in archive.read(metadata + "entry_points.txt").decode()


def test_wheel_works_outside_the_source_tree(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import genrep_fast, genrep_fast.kernels, torch
print(genrep_fast.__file__)
print(genrep_fast.gram([torch.ones(3)], [torch.ones(3)])[0, 0, 1])
"""
    file, inner = run_python(code, tmp_path, tmp_path / "site").splitlines()
    assert Path(file).is_relative_to(tmp_path / "site")
    assert inner == "tensor(3., dtype=torch.float64)"


@pytest.mark.slow
def test_repository_root_does_not_shadow_hugging_face_kernels(tmp_path):
    code = (
        "from diffusers.utils import is_kernels_available; "
        "import kernels; print(is_kernels_available(), kernels.__file__)"
    )
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").touch()
    (tmp_path / "kernels-1.0.dist-info").mkdir()
    (tmp_path / "kernels-1.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 1.0\n"
    )
    assert run_python(code, ROOT, tmp_path) == f"True {tmp_path / 'kernels/__init__.py'}"


@pytest.mark.slow
def test_repository_root_does_not_pass_for_hugging_face_kernels(tmp_path):
    code = "from diffusers.utils import is_kernels_available; print(is_kernels_available())"
    assert run_python(code, ROOT, tmp_path) == str("kernels" in packages_distributions())


def test_help(capsys):
    for arguments in ([], *([command] for command in cli.COMMANDS)):
        with pytest.raises(SystemExit) as exit_:
            cli.main([*arguments, "--help"])
        assert exit_.value.code == 0
        assert capsys.readouterr().out.startswith("usage: genrep")


def test_info_json(capsys):
    cli.main(["info", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["genrep_fast"], found["torch"]) == (gf.__version__, torch.__version__)
    assert found["backends"]["reference"]["available"]


EXTRA = extras.MODULES


def run_without(missing, code: str, *, status: int = 0):
    """Standard output and error of `code` where the modules `missing` are not installed."""
    code = f"import sys\nsys.modules.update(dict.fromkeys({tuple(missing)!r}))\n{code}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == status, result.stderr
    return result.stdout, result.stderr


def test_the_extra_is_that_of_the_project():
    block = re.search(
        r"^train = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )[1]
    packages = re.findall(r'^ *"([\w-]+)', block, re.MULTILINE)
    modules = {"pillow": "PIL", "scikit-learn": "sklearn"}
    assert {modules.get(package, package) for package in packages} == set(EXTRA)


ERRORS_OF_NAMES = """
import genrep_fast
for name in {names!r}:
    try:
        getattr(genrep_fast, name)
    except ImportError as error:
        print(error)
"""


@pytest.mark.parametrize("missing", [("diffusers",), EXTRA])
def test_names_that_need_the_extra_say_so(missing):
    names = ("GenRep", "GenRepPipeline")
    output, _ = run_without(missing, ERRORS_OF_NAMES.format(names=names))
    assert output.splitlines() == [
        f'{name} needs diffusers, which comes with: pip install "genrep_fast[train]"'
        for name in names
    ]


def test_genrep_weighting_says_that_it_needs_torchjd():
    code = """
import genrep_fast
try:
    genrep_fast.GenRepWeighting
except ImportError as error:
    print(error)
"""
    assert "pip install 'torchjd>=0.18'" in run_without(["torchjd"], code)[0]


def test_a_fault_of_our_own_is_not_taken_for_a_missing_extra():
    code = ERRORS_OF_NAMES.format(names=("GenRep", "GenRepWeighting"))
    output, _ = run_without(["genrep_fast.models", "genrep_fast.alignment.torchjd"], code)
    assert len(output.splitlines()) == 2
    assert all("genrep_fast." in line for line in output.splitlines())
    assert "pip install" not in output


@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["info", "--help"]])
def test_info_runs_without_any_extra(arguments):
    code = f"""
sys.argv = ["genrep", *{arguments!r}]
import runpy
runpy.run_module("genrep_fast", run_name="__main__")
"""
    output, errors = run_without([*EXTRA, "torchjd", "triton"], code)
    assert errors == ""
    if "--json" in arguments:
        assert json.loads(output)["backends"]["reference"]["available"]
    assert output.startswith(
        {"--json": "{", "--help": "usage: genrep info"}.get(arguments[-1], "genrep_fast  ")
    )


def test_info_imports_nothing_that_it_does_not_need(tmp_path):
    code = f"""
import sys
from genrep_fast import cli
cli.main(["info", "--json"])
print("modules", *(set({EXTRA!r}) & set(sys.modules)))
"""
    assert run_python(code, tmp_path, ROOT).splitlines()[-1] == "modules"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "commands"),
    [
        (
            EXTRA,
            {
                "train": "genrep: train needs jsonargparse",
                "bench --quick": "genrep: bench needs jsonargparse",
                "": "genrep: every command but info needs jsonargparse",
                "--help": "genrep: every command but info needs jsonargparse",
            },
        ),
        (["accelerate"], {"train --steps 3": "genrep train: train needs accelerate"}),
        (["rich"], {"evaluate --checkpoint x": "genrep evaluate: evaluate needs rich"}),
    ],
    ids=["all", "accelerate", "rich"],
)
def test_commands_without_the_extra_name_it(missing, commands):
    code = f"""
from genrep_fast import cli
for command in {list(commands)!r}:
    try:
        cli.main(command.split())
    except SystemExit as end:
        print(end.code)
"""
    output, errors = run_without(missing, code)
    assert output.split() == ["2"] * len(commands)
    assert errors.splitlines() == [
        f'{line}, which comes with: pip install "genrep_fast[train]"' for line in commands.values()
    ]


@pytest.mark.parametrize(
    "arguments", [["info", "--xml"], ["info", "--json", "yes"], ["info", "more"]]
)
def test_info_refuses_other_arguments_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("genrep") and arguments[-1] in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--no_such_option", "1"],
        ["train", "--batch_size", "many"],
        ["train", "--batch_size", "0"],
        ["classify", "--checkpoint", "nowhere", "--images", "one.png"],
        ["generate", "--checkpoint", "nowhere", "--labels", "3"],
        ["no-such-command"],
        [],
    ],
)
def test_bad_input_ends_with_one_line(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith("genrep") and captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
