"""The wheel of `make wheel`: its tag and contents, and that it works where there is nothing else.

Compiling for every architecture takes minutes: the wheel is built for the newest of the Makefile's,
on which kernels have spilled that others hold in registers, or for those of $WHEEL_ARCHITECTURES.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import genrep_fast as gf

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
RELEASED = re.search(r"^WHEEL_ARCHITECTURES := (.*)$", MAKEFILE, re.M)[1]
ARCHITECTURES = os.environ.get("WHEEL_ARCHITECTURES", RELEASED.split(";")[-1])


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


clean_environment = load(ROOT / "tests/packaging/clean_environment.py")
native_build = load(ROOT / "csrc/build.py")
needs_nvcc = pytest.mark.skipif(native_build.nvcc() is None, reason="nvcc is not there")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources with the built wheel in dist/, so that nothing of an earlier build gets
    in.
    """
    folder = tmp_path_factory.mktemp("wheel") / "source"
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
    shutil.copytree(ROOT, folder, ignore=ignored)
    target = "repaired-wheel" if native_build.nvcc() else "repaired-wheel GENREP_FAST_CUDA=0"
    clean_environment.run(
        "make",
        "--no-print-directory",
        *target.split(),
        f"WHEEL_ARCHITECTURES={ARCHITECTURES}",
        f"BIN={Path(sys.executable).parent}",
        cwd=folder,
    )
    return folder


@pytest.fixture(scope="module")
def wheel(source):
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Of an environment with the wheel and this torch, without the +cpu of a wheel that lies on
    some index.
    """
    return clean_environment.create(
        tmp_path_factory.mktemp("clean") / "environment", wheel, version("torch").partition("+")[0]
    )


def test_make_builds_for_every_architecture():
    names = {"GENREP_FAST_CUDA", "WHEEL_ARCHITECTURES", "TORCH_CUDA_ARCH_LIST"}
    environment = {name: value for name, value in os.environ.items() if name not in names}
    commands = clean_environment.run(
        "make", "--dry-run", "repaired-wheel", cwd=ROOT, env=environment
    )
    assert f"GENREP_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST='{RELEASED}'" in commands
    numbers = [number.replace(".", "") for number in RELEASED.split(";")]
    assert numbers[0] == "80" and numbers[-1].endswith("+PTX")
    compilation = " ".join(native_build.nvcc_command(Path("x.cu"), RELEASED))
    for number in (*numbers[:-1], numbers[-1].removesuffix("+PTX")):
        assert f"-gencode arch=compute_{number},code=sm_{number}" in compilation
    newest = numbers[-1].removesuffix("+PTX")
    assert f"-gencode arch=compute_{newest},code=compute_{newest}" in compilation


def test_tag_and_size(wheel):
    assert re.fullmatch(
        rf"genrep_fast-{re.escape(gf.__version__)}-py3-none-manylinux_2_\d+_{os.uname().machine}\.whl",
        wheel.name,
    )
    metadata = zipfile.ZipFile(wheel).read(f"genrep_fast-{gf.__version__}.dist-info/WHEEL").decode()
    assert re.findall(r"^Tag: (py3-none-manylinux)_", metadata, re.M) == ["py3-none-manylinux"]
    assert wheel.stat().st_size <= 20e6
    print(f"{wheel.stat().st_size / 1e6:.1f} MB")


def test_contents(wheel):
    names = [
        name
        for name in zipfile.ZipFile(wheel).namelist()
        if name.endswith((".so", ".json", ".libs")) or ".libs/" in name
    ]
    built = {*native_build.libraries(), "build.json", "gpu_backends.json"}
    assert {
        name.removeprefix("genrep_fast/") for name in names
    } == built  # none of torch's libraries


@needs_nvcc
def test_machine_code_for_every_architecture(wheel, tmp_path):
    triton = pytest.importorskip("triton")
    library = zipfile.ZipFile(wheel).extract("genrep_fast/_C_cuda.so", tmp_path)
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    *numbers, last = (number.replace(".", "") for number in ARCHITECTURES.split(";"))
    elf, ptx = (
        set(re.findall(r"sm_(\w+)", clean_environment.run(cuobjdump, option, library)))
        for option in ("--list-elf", "--list-ptx")
    )
    newest = last.removesuffix("+PTX")
    assert elf == {*numbers, newest} and ptx == {newest} and "+PTX" in last


# On Blackwell two kernels that few calls reach do not fit into the registers: eight losses, and
# summed gradients of single locations. Rows of 16-bit outputs spill a few words outside of the
# loop over elements, large tiles of shared centres outside of that over their products.
SPILLS = {
    ("alignment_gram_sums_kernelILi8E", "100"),
    ("alignment_gram_sums_kernelILi8E", "120"),
    ("log_likelihood_backward_sums_kernelILb1E", "120"),
    ("log_likelihood_rows_kernelINS_11WholeAccessILNS_5DtypeE", "120"),
    ("log_likelihood_backward_rows_kernelINS_11WholeAccessILNS_5DtypeE", "120"),
    ("log_likelihood_shared_centers_kernelINS0_4TileILi4E", "120"),
}


@needs_nvcc
def test_no_other_cuda_kernel_spills(source):
    logs = {path.name: path.read_text() for path in source.glob("build/temp*/nvcc-*.o.log")}
    assert set(logs) == {f"nvcc-{path.stem}.o.log" for path in (ROOT / "csrc/cuda").glob("*.cu")}
    pattern = (
        r"entry function '(\w+)' for 'sm_(\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    kernels = [kernel for report in logs.values() for kernel in re.findall(pattern, report, re.S)]
    assert len(kernels) >= 40 * len(ARCHITECTURES.split(";"))
    spilling = {
        (re.search(r"[a-z_]+_kernel(I\w+?E)?", name)[0], sm)
        for name, sm, *sizes in kernels
        if sizes != ["0", "0", "0"]
    }
    assert spilling <= SPILLS


# Instruction set -> what is left out of its tests, and a number of tests that certainly passes. The
# public functions, schemas and graphs do not depend on the instruction set: the widest is enough.
PUBLIC = ("test_alignment.py", "test_optimizer.py")
CAPABILITIES = {
    "avx512": ((), 900),
    "avx2": (("opcheck", "compiles", "autocast", *PUBLIC), 650),
    "default": (("opcheck", "compiles", "autocast", *PUBLIC), 650),
}


@pytest.fixture(scope="module")
def operator_tests(python, tmp_path_factory):
    """Instruction set -> the future numbers of tests that passed and were skipped."""
    folder = tmp_path_factory.mktemp("operators")
    with ThreadPoolExecutor(2) as executor:
        yield {
            capability: executor.submit(
                clean_environment.run_operator_tests,
                python,
                folder / capability,
                left_out,
                GENREP_FAST_CPU_CAPABILITY=capability,
            )
            for capability, (left_out, _) in CAPABILITIES.items()
        }


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_operators_in_every_instruction_set(operator_tests, capability):
    passed, skipped = operator_tests[capability].result()
    assert passed > CAPABILITIES[capability][1] and skipped < 20


def test_information_without_anything_else(python, tmp_path):
    found = json.loads(
        clean_environment.run_alone(
            python,
            "-c",
            "import genrep_fast, json; print(json.dumps(genrep_fast.info()))",
            cwd=tmp_path,
        )
    )
    assert found["torch"] == torch.__version__ and found["triton"] is None
    assert found["built"]["torch_target"] == native_build.TORCH_TARGET
    assert set(found["built"]["libraries"]) == set(native_build.libraries())
    if native_build.nvcc():
        assert (
            found["built"]["architectures"] == ARCHITECTURES
            and found["built"]["minimum_driver"] >= 525
        )
    assert (
        found["backends"]["cpu"]["available"]
        and found["backends"]["triton"]["reason"] == "triton is not installed"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # From elsewhere than the sources, which Python would find first.
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    answer = subprocess.run(found["reproduce"], shell=True, **options)
    # Info needs none of the command line's own requirements.
    assert json.loads(answer.stdout)["built"] == found["built"]
    answer = subprocess.run(
        [python, "-m", "genrep_fast", "bench"], cwd=tmp_path, capture_output=True, text=True
    )
    assert answer.returncode == 2 and "genrep_fast[train]" in answer.stderr
