"""The native build: what the libraries link to, which instructions they hold, and how a missing
part is reported.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import genrep_fast as gf
from genrep_fast.dispatch import libraries

ROOT = Path(__file__).parents[2]
PACKAGE = Path(gf.__file__).parent

spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc/build.py")
native_build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native_build)

needs_nvcc = pytest.mark.skipif(native_build.nvcc() is None, reason="nvcc is not there")


def output_of(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def built_libraries():
    return [PACKAGE / name for name in native_build.libraries() if name.startswith("_C")]


# What was built


def test_cpu_library_is_loaded_and_describes_itself():
    cpu = gf.info()["backends"]["cpu"]
    assert cpu["available"] and cpu["reason"] is None
    assert {
        "adamw_step",
        "alignment_coefficients",
        "combine",
        "gram",
        "group_gram",
        "tensor_coefficients",
    } <= set(cpu["operators"])
    assert cpu["build"]["torch_target"] == native_build.TORCH_TARGET
    assert cpu["build"]["capability"] in ("default", "avx2", "avx512")


@needs_nvcc
def test_cuda_library_is_built_and_says_why_it_cannot_run():
    cuda = gf.info()["backends"]["cuda"]
    assert (PACKAGE / "_C_cuda.so").is_file()
    assert cuda["available"] == (torch.version.cuda is not None)
    assert cuda["available"] or cuda["reason"] == "this torch is built without CUDA"


@pytest.mark.parametrize("library", built_libraries(), ids=lambda path: path.name)
def test_undefined_symbols_are_torchs_stable_shims_and_the_runtimes(library):
    undefined = [
        line.split()[-1]
        for line in output_of("nm", "-D", "--undefined-only", library).splitlines()
        if " U " in line
    ]
    assert undefined
    foreign = [
        name
        for name in undefined
        if not re.match(r"(aoti_)?torch_\w+$", name)
        and not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name)
    ]
    assert foreign == []
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output_of("readelf", "-d", library))
    runtimes = {
        "libtorch_cpu.so",
        "libtorch_cuda.so",
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libm.so.6",
        "libc.so.6",
        "ld-linux-x86-64.so.2",
    }
    assert {"libtorch_cpu.so", *(["libtorch_cuda.so"] if "cuda" in library.name else [])} <= set(
        needed
    )
    assert set(needed) <= runtimes | {"libdl.so.2", "librt.so.1", "libpthread.so.0"}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="registers of x86-64")
def test_wide_registers_stay_in_the_copies_for_their_instruction_set():
    # A baseline function with AVX in it ends in an illegal instruction on a processor without.
    function, allowed, found = "", "", {"avx2": 0, "avx512": 0}
    for line in output_of(
        "objdump", "-d", "--no-show-raw-insn", PACKAGE / "_C_cpu.so"
    ).splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:", line):
            function = match[1]
            allowed = next((isa for isa in found if f"_{isa}" in function), "baseline")
        elif "%zmm" in line:
            assert allowed == "avx512", function
            found["avx512"] += 1
        elif "%ymm" in line or re.search(r"\tv\w+ +.*%xmm", line):
            assert allowed != "baseline", (function, line)
            found["avx2"] += allowed == "avx2"
    assert found["avx2"] > 100 and found["avx512"] > 100


# Asking for something else


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_environment_lowers_the_instruction_set(capability):
    code = "import genrep_fast; print(genrep_fast.info()['backends']['cpu']['build']['capability'])"
    order = ["default", "avx2", "avx512"]
    here = gf.info()["backends"]["cpu"]["build"]["capability"]
    expected = order[min(order.index(here), order.index(capability))]
    answer = output_of(
        sys.executable, "-c", code, env=os.environ | {"GENREP_FAST_CPU_CAPABILITY": capability}
    )
    assert answer.strip() == expected


def test_unknown_instruction_set_is_refused():
    code = "import genrep_fast; print(genrep_fast.info()['backends']['cpu']['reason'])"
    answer = output_of(
        sys.executable, "-c", code, env=os.environ | {"GENREP_FAST_CPU_CAPABILITY": "AVX2"}
    )
    assert (
        answer.strip()
        == "GENREP_FAST_CPU_CAPABILITY must be one of default, avx2, avx512, got 'AVX2'"
    )


def test_architectures(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;12.0+PTX")
    command = " ".join(native_build.nvcc_command(Path("x.cu")))
    for flag in (
        "compute_86,code=sm_86",
        "compute_90a,code=sm_90a",
        "compute_120,code=sm_120",
        "compute_120,code=compute_120",
    ):
        assert f"-gencode arch={flag}" in command
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " ")
    assert "-gencode arch=compute_80,code=sm_80" in " ".join(
        native_build.nvcc_command(Path("x.cu"))
    )
    with pytest.raises(native_build.BuildError, match="TORCH_CUDA_ARCH_LIST.*got 'Hopper'"):
        native_build.nvcc_command(Path("x.cu"), "Hopper")


def test_cuda_may_be_declined_or_demanded(monkeypatch):
    monkeypatch.setenv("GENREP_FAST_CUDA", "0")
    assert "_C_cuda.so" not in native_build.libraries()
    monkeypatch.setenv("GENREP_FAST_CUDA", "1")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setattr(native_build.shutil, "which", lambda *arguments, **options: None)
    with pytest.raises(native_build.BuildError, match="GENREP_FAST_CUDA=1"):
        native_build.nvcc()


@pytest.mark.slow
def test_compiler_with_options_and_folders_with_strange_names(monkeypatch, tmp_path):
    monkeypatch.setenv("GENREP_FAST_CUDA", "0")
    monkeypatch.setenv("CXX", "g++ -pipe")
    sources = shutil.copytree(ROOT / "csrc", tmp_path / "so(ur) ce's & $x")
    # Names are what matters here: the wheel and the dry run on a device compile all the rest.
    for source in (sources / "cpu").glob("*.cpp"):
        if source.stem not in ("posterior", "vector"):
            source.write_text("")
    monkeypatch.setattr(native_build, "SOURCES", sources)
    native_build.build(tmp_path / "o (u) t", tmp_path / "b")
    assert {path.name for path in (tmp_path / "o (u) t").iterdir()} == {
        *native_build.libraries(),
        "build.json",
    }
    record = json.loads((tmp_path / "o (u) t/build.json").read_text())
    assert (
        record["libraries"] == native_build.libraries()
        and record["torch"] == torch.__version__.partition("+")[0]
    )
    assert (
        record["torch_target"] == native_build.TORCH_TARGET
        and record["compiler"].startswith("g++")
        and "nvcc" not in record
    )


def test_failed_compilation_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("GENREP_FAST_CUDA", "0")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(native_build.BuildError, match="did not compile .* GENREP_FAST_PURE=1"):
        native_build.build(tmp_path / "out", tmp_path / "build")


# What is missing


@pytest.mark.parametrize("missing", ["torch", "compiler", "pybind11", "ninja"])
def test_missing_requirement_is_one_sentence(missing, monkeypatch, tmp_path):
    monkeypatch.setenv("GENREP_FAST_CUDA", "0")
    monkeypatch.delenv("CXX", raising=False)
    find_spec, which = importlib.util.find_spec, shutil.which
    monkeypatch.setattr(
        native_build.importlib.util,
        "find_spec",
        lambda name: None if name == missing else find_spec(name),
    )
    if missing == "torch":
        monkeypatch.setattr(
            native_build.sysconfig,
            "get_paths",
            lambda: dict.fromkeys(("purelib", "platlib", "include"), str(tmp_path)),
        )
    absent = {"compiler": ("g++", "c++", "clang++"), "ninja": ("ninja",)}.get(missing, ())
    monkeypatch.setattr(
        native_build.shutil,
        "which",
        lambda name, **options: None if name in absent else which(name, **options),
    )
    with pytest.raises(native_build.BuildError, match=missing) as error:
        native_build.build(tmp_path / "out", tmp_path / "build")
    message = str(error.value)
    assert (
        "pip install --no-build-isolation ." in message
        and "GENREP_FAST_PURE=1" in message
        and "\n" not in message
    )


@pytest.mark.parametrize(
    "hook", ["prepare_metadata_for_build_wheel", "prepare_metadata_for_build_editable"]
)
@pytest.mark.parametrize("pure", ["0", "1"])
def test_without_torch_the_metadata_is_refused_before_anything_is_fetched(hook, pure, tmp_path):
    """pip asks for the metadata first and fetches torch, which they require, before it builds."""
    ignored = shutil.ignore_patterns(
        ".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "build.json", "results"
    )
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignored)
    venv.create(tmp_path / "environment", with_pip=False)
    (tmp_path / "site").mkdir()
    packages = Path(importlib.util.find_spec("setuptools").origin).parent.parent
    # Its commands are entry points, which the folder of its metadata holds.
    for folder in (
        "setuptools",
        "_distutils_hack",
        *(path.name for path in packages.glob("setuptools-*.dist-info")),
    ):
        (tmp_path / "site" / folder).symlink_to(packages / folder)
    code = f"import setuptools.build_meta as backend; print(backend.{hook}({str(tmp_path)!r}))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "GENREP_FAST_PURE": pure}
    python = tmp_path / "environment/bin/python"
    result = subprocess.run(
        [python, "-c", code],
        cwd=tmp_path / "source",
        env=environment,
        capture_output=True,
        text=True,
    )
    if pure == "1":
        assert result.returncode == 0, result.stderr
        assert (
            "Requires-Dist: torch>=2.11" in next(tmp_path.glob("*.dist-info/METADATA")).read_text()
        )
        return
    line = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and not list(tmp_path.glob("*.dist-info/METADATA"))
    assert line.startswith(
        "genrep_fast cannot build its native code, because torch is not installed: "
        "install it and run `pip install "
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "it was not built: _C_cpu.so is not in"),
        (b"no library", "its library, built for torch 2.11 and newer, did not load in torch "),
    ],
)
def test_missing_or_broken_library_never_breaks_the_import(content, reason, tmp_path):
    shutil.copytree(
        PACKAGE, tmp_path / "genrep_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    if content is not None:
        (tmp_path / "genrep_fast/_C_cpu.so").write_bytes(content)
    code = """
import torch, genrep_fast as gf
print(gf.gram([torch.ones(3)], [torch.ones(3)]).tolist())
print(gf.info()["backends"]["cpu"]["reason"])
try:
    with gf.use_backend("cpu"):
        pass
except gf.BackendUnavailableError as error:
    print(error)
"""
    result, found, error = output_of(
        sys.executable, "-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}
    ).splitlines()
    assert result == "[[[3.0, 3.0], [3.0, 3.0]]]"
    assert found.startswith(reason)
    assert error == f"backend 'cpu' was asked for, but {found}"


def run_with_torch(version, code, folder):
    """Standard output and error of Python in `folder`, in which torch says that it is another
    version.
    """
    code = f"import torch; torch.__version__ = {version!r}\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


def test_an_older_torch_is_one_sentence():
    result = run_with_torch("2.10.1+cu128", "import genrep_fast", ROOT)
    assert (
        result.stderr.splitlines()[-1]
        == "ImportError: genrep_fast needs torch 2.11 or newer, this is torch 2.10.1+cu128"
    )
    assert run_with_torch("2.100.0a0+git1234", "import genrep_fast", ROOT).returncode == 0


def test_a_missing_symbol_is_one_sentence(tmp_path):
    shutil.copytree(
        PACKAGE, tmp_path / "genrep_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    (tmp_path / "library.c").write_text(
        "extern int torch_that_is_no_more(void); int call(void) { return torch_that_is_no_more(); }"
    )
    output_of(
        "g++",
        "-shared",
        "-fPIC",
        "-x",
        "c",
        "-Wl,-z,now",
        tmp_path / "library.c",
        "-o",
        tmp_path / "genrep_fast/_C_cpu.so",
    )
    code = "import genrep_fast; print(genrep_fast.info()['backends']['cpu']['reason'])"
    reason = run_with_torch("9.1.0", code, tmp_path).stdout
    assert reason.startswith(
        "its library, built for torch 2.11 and newer, did not load in torch 9.1.0: "
    )
    assert "torch_that_is_no_more" in reason and reason.count("\n") == 1


@pytest.mark.parametrize(
    ("version", "needed", "driver"),
    [("570.124.06", 580, 570), ("580.65.06", 580, None), (None, 580, None), ("570.1", None, None)],
)
def test_an_older_driver_is_one_sentence(version, needed, driver, monkeypatch, tmp_path):
    text = None
    if version is not None:
        module = f"NVIDIA UNIX Open Kernel Module for x86_64  {version}"
        text = f"NVRM version: {module}  Release Build  (dvs-builder)\n"
    (tmp_path / "_C_cuda.so").touch()
    (tmp_path / "build.json").write_text(json.dumps({"minimum_driver": needed}))
    monkeypatch.setattr(libraries, "_FOLDER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    read_text = Path.read_text

    def read(path, *arguments):
        if path != Path("/proc/driver/nvidia/version"):
            return read_text(path, *arguments)
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read)
    reason = libraries._load("cuda")
    if driver is None:  # the next obstacle is the empty library
        assert reason.startswith("its library, built for torch 2.11 and newer, did not load")
    else:
        assert reason == f"it needs NVIDIA's driver {needed} or newer, this is {driver}"
