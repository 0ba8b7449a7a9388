"""The native build, described once for setup.py and the tests.

`build` compiles the sources beside this file with ninja into `_C_cpu.so`, `_C_cuda.so` (where there
is an nvcc) and the module `_introspection`, and records in `build.json` what it used. The two
libraries use torch's stable ABI alone, so that they outlive the torch they were built with. The
build needs torch's headers, and no GPU.

Environment: ``GENREP_FAST_CUDA`` (0: without CUDA; 1: an nvcc must be there),
``TORCH_CUDA_ARCH_LIST`` (default ``8.0;9.0+PTX``), ``GENREP_FAST_SANITIZE`` (1: the CPU library
with AddressSanitizer and UndefinedBehaviorSanitizer), ``CXX``, ``CUDACXX``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCES = Path(__file__).parent
# The oldest torch that the libraries work with.
TORCH_TARGET = "2.11"
_TORCH_TARGET_VERSION = "0x020b000000000000"

# The oldest NVIDIA driver that runs programs of a CUDA release, by its major number (table 2 of the
# CUDA Compatibility guide). Of CUDA 12 the first that takes the 32 KB of parameters of the kernels
# for long lists of tensors.
_MINIMUM_DRIVERS = {12: 530, 13: 580}
_DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"

_STABLE_ABI = ["-DTORCH_STABLE_ONLY", f"-DTORCH_TARGET_VERSION={_TORCH_TARGET_VERSION}"]
_COMPILE = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Neither errno nor floating-point exceptions are read; vectors are never passed to functions that
# are not inlined.
_KERNEL = ["-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
_SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-g",
    "-O1",
]
_NVCC = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-DUSE_CUDA",
    "-Xptxas",
    "-v",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
]


class BuildError(Exception):
    """The native build cannot start.

    The message is one sentence that says what is missing and what to do.
    """


def libraries() -> list[str]:
    """File names of what `build` compiles."""
    names = ["_C_cpu.so", f"_introspection{sysconfig.get_config_var('EXT_SUFFIX')}"]
    return names + ["_C_cuda.so"] if nvcc() else names


def build(output: Path, build_dir: Path) -> None:
    """Compile into the folder `output`.

    Objects, logs of the compilers and ninja's file stay in `build_dir`.

    Raises:
        BuildError: where torch's headers, a compiler, ninja or pybind11 are missing, or the
            compilation fails.
    """
    build_dir.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text(_ninja_file(output.resolve()))
    # Compilers take about 1 GB each.
    result = subprocess.run([_executable("ninja"), "-C", str(build_dir)])
    if result.returncode:
        raise BuildError(
            "genrep_fast's native code did not compile (the messages are above); "
            "GENREP_FAST_PURE=1 installs without it."
        )
    (output / "build.json").write_text(json.dumps(_record(), indent=1) + "\n")


def nvcc() -> str | None:
    """Path of the CUDA compiler, None where there is none and with ``GENREP_FAST_CUDA=0``."""
    wanted = os.environ.get("GENREP_FAST_CUDA")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    found = found or shutil.which("nvcc", path=f"{home}/bin")
    if wanted == "1" and found is None:
        raise BuildError(
            "GENREP_FAST_CUDA=1 asks for the CUDA library, "
            "but no nvcc was found on PATH or in CUDA_HOME."
        )
    return found


def nvcc_command(source: Path, architectures: str | None = None) -> list[str]:
    """The command that compiles one CUDA source, up to ``-o``.

    `architectures` are as in ``TORCH_CUDA_ARCH_LIST``.
    """
    architectures = architectures or _architectures()
    flags = [
        *_NVCC,
        *_STABLE_ABI,
        f"-I{torch_headers()}",
        f'-DGENREP_FAST_CUDA_ARCHITECTURES="{architectures}"',
    ]
    return [nvcc() or "nvcc", *flags, *_gencode(architectures), "-c", str(source)]


def torch_headers() -> Path:
    """The folder of torch's headers.

    Also from a build in isolation: the interpreter's own site-packages are looked at as well.
    """
    spec = importlib.util.find_spec("torch")
    roots = list(spec.submodule_search_locations) if spec else []
    roots += [Path(sysconfig.get_paths()[name]) / "torch" for name in ("purelib", "platlib")]
    for root in roots:
        if (Path(root) / "include/torch/csrc/stable/library.h").is_file():
            return Path(root) / "include"
    raise BuildError(_advice("torch is not installed"))


def _record() -> dict:
    """What the libraries were built with."""
    headers = (torch_headers() / "torch/headeronly/version.h").read_text()
    version = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        version.append(re.search(rf"#define TORCH_VERSION_{part} (\d+)", headers)[1])
    record = {
        "libraries": libraries(),
        "torch": ".".join(version),
        "torch_target": TORCH_TARGET,
        "compiler": _first_line(*_compiler(), "--version"),
    }
    if nvcc():
        printed = subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.(\d+)", printed)
        record |= {"nvcc": ".".join(release.groups()), "architectures": _architectures()}
        record["minimum_driver"] = _MINIMUM_DRIVERS.get(int(release[1]))
    return record


def _first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


def _architectures() -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,") or _DEFAULT_ARCHITECTURES


def _compiler() -> list[str]:
    compiler = shlex.split(os.environ.get("CXX", ""))
    if compiler:
        return compiler
    for name in ("g++", "c++", "clang++"):
        path = shutil.which(name)
        if path:
            return [path]
    raise BuildError(_advice("no C++ compiler was found"))


def _gencode(architectures: str) -> list[str]:
    flags = []
    for name in re.split(r"[;, ]+", architectures):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not match:
            raise BuildError(
                "TORCH_CUDA_ARCH_LIST must hold architectures like 9.0 or 9.0+PTX, "
                f"separated by semicolons, got {name!r}."
            )
        number = "".join(match.groups("")[:3])
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[4]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def _ninja_file(output: Path) -> str:
    compiler = _compiler()
    if importlib.util.find_spec("pybind11") is None:
        raise BuildError(_advice("pybind11 is not installed"))
    import pybind11

    sanitize = _SANITIZE if os.environ.get("GENREP_FAST_SANITIZE") == "1" else []
    depfile = ["-MMD", "-MF", "$out.d"]
    torch = ["-isystem", str(torch_headers())]
    cxx = [*compiler, *_COMPILE, *_KERNEL, *_STABLE_ABI, *sanitize, *torch, *depfile]
    bindings = ["-isystem", pybind11.get_include()]
    bindings += ["-isystem", sysconfig.get_paths()["include"]]
    python = [*compiler, *_COMPILE, *bindings, *depfile]
    link = [*compiler, "-shared", *sanitize, "-Wl,--no-as-needed"]
    # A library without symbols stands for torch's own while linking: only its name is kept, and the
    # one that Python loaded is used.
    stub = [*compiler, "-shared", "-x", "c", "/dev/null", "-Wl,-soname,$out"]
    lines = [
        *_rule("cxx", [*cxx, "-c", "$in", "-o", "$out"], depfile=True),
        *_rule("python", [*python, "-c", "$in", "-o", "$out"], depfile=True),
        *_rule("stub", [*stub, "-o", "$out"]),
        *_rule("link", [*link, "-o", "$out", "$in"]),
    ]
    objects = _compile(lines, "cxx", sorted((SOURCES / "cpu").glob("*.cpp")))
    lines += ["build libtorch_cpu.so: stub"]
    lines += [f"build {_path(output / '_C_cpu.so')}: link {' '.join(objects)} libtorch_cpu.so"]
    objects = _compile(lines, "python", [SOURCES / "introspection.cpp"])
    lines += [f"build {_path(output / libraries()[1])}: link {' '.join(objects)}"]
    if nvcc():
        _add_cuda(lines, output)
    return "\n".join(lines) + "\n"


def _add_cuda(lines: list[str], output: Path) -> None:
    """Add the CUDA library to the lines of ninja's file."""
    # Of -Xptxas -v, which nobody wants to see where all is well.
    log = "> $out.log 2>&1 || (cat $out.log; false)"
    command = [*nvcc_command(Path("$in")), "-MD", "-MF", "$out.d", "-o", "$out"]
    lines += _rule("nvcc", command, depfile=True, suffix=log)
    objects = _compile(lines, "nvcc", sorted((SOURCES / "cuda").glob("*.cu")))
    # No device code is left to link, of which nvcc would add an empty piece for an architecture of
    # its own choice. It hands the linker's own options over behind all of its inputs.
    stubs = ["libtorch_cpu.so", "libtorch_cuda.so"]
    options = ["-Xlinker", ",".join(["--no-as-needed", *stubs, "--as-needed"])]
    command = [nvcc(), "-shared", "-nodlink", "-cudart", "static", "-o", "$out", "$in", *options]
    lines += _rule("link_cuda", command)
    lines += ["build libtorch_cuda.so: stub"]
    library, inputs = _path(output / "_C_cuda.so"), " ".join(objects)
    lines += [f"build {library}: link_cuda {inputs} | {' '.join(stubs)}"]


def _rule(name: str, command: list[str], depfile: bool = False, suffix: str = "") -> list[str]:
    """A rule of ninja's; $in and $out stand for its files, `suffix` is the shell's."""
    dependencies = ["  depfile = $out.d", "  deps = gcc"] if depfile else []
    variables = {"$in", "$out", "$out.d", "-Wl,-soname,$out"}

    def quoted(part: str) -> str:
        return part if part in variables else shlex.quote(part).replace("$", "$$")

    line = f"  command = {' '.join(map(quoted, command))} {suffix}"
    return [f"rule {name}", line.rstrip(), *dependencies]


def _compile(lines: list[str], rule: str, sources: list[Path]) -> list[str]:
    """Add the lines that compile `sources` with `rule`, and return the names of the objects."""
    objects = [f"{rule}-{source.stem}.o" for source in sources]
    for target, source in zip(objects, sources, strict=True):
        lines.append(f"build {target}: {rule} {_path(source)}")
    return objects


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _executable(name: str) -> str:
    """A command, also where the interpreter's folder of scripts is not on PATH."""
    folders = [sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        raise BuildError(_advice(f"{name} is not installed"))
    return found


def _advice(reason: str) -> str:
    return (
        f"genrep_fast cannot build its native code, because {reason}: "
        "install it and run `pip install --no-build-isolation .`, "
        "or set GENREP_FAST_PURE=1 for an installation without native code."
    )
