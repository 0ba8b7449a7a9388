"""The native build: what the libraries link to, which instructions they hold, how a missing part is reported, and the wheel."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import genrep_fast as gf

ROOT = Path(__file__).parent.parent
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
    assert {"adamw_step", "alignment_coefficients", "combine", "gram"} <= set(cpu["operators"])
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
    undefined = [line.split()[-1] for line in output_of("nm", "-D", "--undefined-only", library).splitlines() if " U " in line]
    assert undefined
    foreign = [
        name for name in undefined if not re.match(r"(aoti_)?torch_\w+$", name) and not re.search(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_", name)
    ]
    assert foreign == []
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output_of("readelf", "-d", library))
    runtimes = {"libtorch_cpu.so", "libtorch_cuda.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}
    assert {"libtorch_cpu.so", *(["libtorch_cuda.so"] if "cuda" in library.name else [])} <= set(needed)
    assert set(needed) <= runtimes | {"libdl.so.2", "librt.so.1", "libpthread.so.0"}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="registers of x86-64")
def test_wide_registers_stay_in_the_copies_for_their_instruction_set():
    # A baseline function with AVX in it ends in an illegal instruction on a processor without.
    function, allowed, found = "", "", {"avx2": 0, "avx512": 0}
    for line in output_of("objdump", "-d", "--no-show-raw-insn", PACKAGE / "_C_cpu.so").splitlines():
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


@needs_nvcc
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_no_cuda_kernel_spills(source, tmp_path):
    report = output_of(*native_build.nvcc_command(source), "-o", tmp_path / "kernels.o")
    kernels = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert all(kernel == ("0", "0", "0") for kernel in kernels), report
    assert bool(kernels) == ("__global__" in source.read_text())


# Asking for something else


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_environment_lowers_the_instruction_set(capability):
    code = "import genrep_fast; print(genrep_fast.info()['backends']['cpu']['build']['capability'])"
    order = ["default", "avx2", "avx512"]
    here = gf.info()["backends"]["cpu"]["build"]["capability"]
    expected = order[min(order.index(here), order.index(capability))]
    answer = output_of(sys.executable, "-c", code, env=os.environ | {"GENREP_FAST_CPU_CAPABILITY": capability})
    assert answer.strip() == expected


def test_unknown_instruction_set_is_refused():
    code = "import genrep_fast; print(genrep_fast.info()['backends']['cpu']['reason'])"
    answer = output_of(sys.executable, "-c", code, env=os.environ | {"GENREP_FAST_CPU_CAPABILITY": "AVX2"})
    assert answer.strip() == "GENREP_FAST_CPU_CAPABILITY must be one of default, avx2, avx512, got 'AVX2'"


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_kernels_of_lower_instruction_sets(capability):
    """The other tests run the best one."""
    files = ("test_kernels.py", "test_scoring_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "cpu", *(str(ROOT / "tests" / name) for name in files)]
    summary = output_of(*command, cwd=ROOT, env=os.environ | {"GENREP_FAST_CPU_CAPABILITY": capability})
    assert int(re.search(r"(\d+) passed", summary)[1]) > 300


def test_architectures(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;12.0+PTX")
    command = " ".join(native_build.nvcc_command(Path("x.cu")))
    for flag in ("compute_86,code=sm_86", "compute_90a,code=sm_90a", "compute_120,code=sm_120", "compute_120,code=compute_120"):
        assert f"-gencode arch={flag}" in command
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", " ")
    assert "-gencode arch=compute_80,code=sm_80" in " ".join(native_build.nvcc_command(Path("x.cu")))
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


def test_compiler_with_options_and_folders_with_strange_names(monkeypatch, tmp_path):
    monkeypatch.setenv("GENREP_FAST_CUDA", "0")
    monkeypatch.setenv("CXX", "g++ -pipe")
    sources = shutil.copytree(ROOT / "csrc", tmp_path / "so(ur) ce's & $x")
    monkeypatch.setattr(native_build, "SOURCES", sources)
    native_build.build(tmp_path / "o (u) t", tmp_path / "b")
    assert {path.name for path in (tmp_path / "o (u) t").iterdir()} == set(native_build.libraries())


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
    monkeypatch.setattr(native_build.importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    if missing == "torch":
        monkeypatch.setattr(native_build.sysconfig, "get_paths", lambda: dict.fromkeys(("purelib", "platlib", "include"), str(tmp_path)))
    absent = {"compiler": ("g++", "c++", "clang++"), "ninja": ("ninja",)}.get(missing, ())
    monkeypatch.setattr(native_build.shutil, "which", lambda name, **options: None if name in absent else which(name, **options))
    with pytest.raises(native_build.BuildError, match=missing) as error:
        native_build.build(tmp_path / "out", tmp_path / "build")
    message = str(error.value)
    assert "pip install --no-build-isolation ." in message and "GENREP_FAST_PURE=1" in message and "\n" not in message


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "it was not built: _C_cpu.so is not in"), (b"no library", "its library did not load:")]
)
def test_missing_or_broken_library_never_breaks_the_import(content, reason, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "genrep_fast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
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
    result, found, error = output_of(sys.executable, "-c", code, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}).splitlines()
    assert result == "[[[3.0, 3.0], [3.0, 3.0]]]"
    assert found.startswith(reason)
    assert error == f"backend 'cpu' was asked for, but {found}"


# The wheel


def build_wheel(output: Path, **environment) -> Path:
    """A wheel of the package, built from a copy, so that nothing of an earlier build gets in."""
    source = output / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "runs", "device-results", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, ignore=ignored)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", output, source]
    output_of(sys.executable, "-m", "pip", "wheel", *options, env=os.environ | environment)
    shutil.rmtree(source)
    return next(output.glob("*.whl"))


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory):
    """Folder into which the wheel was installed; its native code is the CPU library alone, which takes seconds."""
    folder = tmp_path_factory.mktemp("wheel")
    wheel = build_wheel(folder, GENREP_FAST_CUDA="0")
    target = folder / "site"
    output_of(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        "--target",
        target,
        wheel,
    )
    return target


def test_wheel_passes_the_operators_tests_outside_the_source_tree(installed_wheel, tmp_path):
    for name in ("conftest.py", "test_alignment.py", "test_kernels.py", "test_optimizer.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    (tmp_path / "test_where.py").write_text(
        f"import genrep_fast\ndef test_where():\n    assert genrep_fast.__file__ == {str(installed_wheel / 'genrep_fast/__init__.py')!r}\n"
        "    assert genrep_fast.info()['backends']['cpu']['available']\n"
    )
    environment = os.environ | {"PYTHONPATH": str(installed_wheel)}
    summary = output_of(sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", ".", cwd=tmp_path, env=environment)
    assert int(re.search(r"(\d+) passed", summary)[1]) > 250


def test_wheel_holds_the_native_code(installed_wheel):
    assert {path.name for path in (installed_wheel / "genrep_fast").glob("*.so")} == {
        "_C_cpu.so",
        f"_introspection{native_build.sysconfig.get_config_var('EXT_SUFFIX')}",
    }


def test_pure_installation_on_request(tmp_path):
    wheel = build_wheel(tmp_path, GENREP_FAST_PURE="1")
    assert wheel.name == f"genrep_fast-{gf.__version__}-py3-none-any.whl"
