"""Compiles csrc/cuda for the host, over emulator.h.

``build_emulator.py FOLDER [--sanitize]`` leaves ``FOLDER/_C_emulated.so``, which holds the
operators of ``_C_cuda.so`` for tensors in the host's memory. It needs g++, ninja, and the CUDA
toolkit's headers. What has not changed is not compiled again. With ``--sanitize`` under
AddressSanitizer and UndefinedBehaviorSanitizer, which must be loaded before Python is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"
sys.path.insert(0, str(SOURCES))

import build  # noqa: E402

# Of csrc/cuda, what only a device can answer.
LEFT_OUT = {"introspection.cu"}

FLAGS = ["-std=c++20", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-w"]
# nvcc makes multiply-adds of a b + c wherever it can.
FLAGS += ["-mfma", "-ffp-contract=fast"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE += ["-fno-omit-frame-pointer"]


def for_the_host(text: str) -> str:
    """A source of csrc/cuda for a C++ compiler that includes emulator.h."""
    text = text.replace("#include <cuda_runtime.h>", '#include "emulator.h"')
    text = text.replace("genrep_fast_cuda, CUDA, m", "genrep_fast_cuda, CPU, m")
    # All threads read one copy of them, which may have 32 KB.
    text = re.sub(r"const __grid_constant__ ([^(),]+[^(),\s]) (\w+)(?=[,)])", r"const \1& \2", text)
    while "<<<" in text:
        text = _with_a_launch_as_a_call(text)
    return text


def _with_a_launch_as_a_call(text: str) -> str:
    """`text` with its first ``kernel<<<blocks, threads, 0, stream>>>`` as a call."""
    before, _, rest = text.partition("<<<")
    configuration, _, after = rest.partition(">>>")
    blocks, threads, shared_bytes, _ = _split_at_commas(configuration)
    if shared_bytes != "0":
        raise ValueError(f"the emulator knows no dynamic shared memory: {configuration}")
    before = before.rstrip()
    start = _start_of_name(before)
    kernel = before[start:]
    kernel = f'emulator::launch("{" ".join(kernel.split())}", {kernel}, {blocks}, {threads})'
    return before[:start] + kernel + after


def _split_at_commas(text: str) -> list[str]:
    """Parts between the commas that stand outside of parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _start_of_name(text: str) -> int:
    """Where the name, with template arguments, begins with which `text` ends."""
    end = len(text)
    if text.endswith(">"):
        depth = 0
        for end in range(len(text) - 1, -1, -1):
            depth += (text[end] == ">") - (text[end] == "<")
            if depth == 0:
                break
    return re.search(r"\w+$", text[:end]).start()


def write_sources(folder: Path) -> list[Path]:
    """Write what is to be compiled, where it has changed."""
    sources = []
    for path in sorted((SOURCES / "cuda").iterdir()):
        if path.name in LEFT_OUT:
            continue
        suffix = ".cpp" if path.suffix == ".cu" else path.suffix
        target = folder / "cuda" / (path.stem + suffix)
        _write(target, for_the_host(path.read_text()))
        if suffix == ".cpp":
            sources.append(target)
    for path in SOURCES.glob("*.h"):
        _write(folder / path.name, path.read_text())
    return sources


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def toolkit_headers() -> Path:
    """The folder of the CUDA toolkit's headers."""
    roots = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    nvcc = build.nvcc()
    if nvcc:
        roots.append(Path(nvcc).resolve().parents[1])
    for root in roots:
        if (root / "include/cuda_runtime.h").is_file():
            return root / "include"
    sys.exit("The emulator needs the CUDA toolkit's headers: set CUDA_HOME.")


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    sanitize = SANITIZE if "--sanitize" in sys.argv[2:] else []
    sources = [HERE / "emulator.cpp", *write_sources(folder)]
    compiler = [os.environ.get("CXX", "g++"), *FLAGS, *sanitize]
    compiler += ["-DUSE_CUDA", "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    compiler += [f"-I{HERE}", "-isystem", str(build.torch_headers())]
    compiler += ["-isystem", str(toolkit_headers())]
    library = folder / "_C_emulated.so"
    # The emulator's functions stand before those of the same names in torch, for which a library
    # without symbols stands while linking.
    link = [compiler[0], "-shared", "-Wl,-Bsymbolic,--no-as-needed", *sanitize]
    stub = [compiler[0], "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libtorch_cpu.so"]
    lines = [
        "rule compile",
        f"  command = {' '.join(compiler)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {' '.join(link)} -o $out $in",
        "rule stub",
        f"  command = {' '.join(stub)} -o $out",
        "build libtorch_cpu.so: stub",
    ]
    objects = []
    for source in sources:
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines += [f"build {library}: link {' '.join(objects)} libtorch_cpu.so", ""]
    (folder / "build.ninja").write_text("\n".join(lines))
    scripts = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    ninja = shutil.which("ninja", path=os.pathsep.join(scripts))
    subprocess.run([ninja or "ninja", "-C", str(folder)], check=True)


if __name__ == "__main__":
    main()
