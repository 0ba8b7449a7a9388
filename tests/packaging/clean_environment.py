"""A wheel where there is nothing else: torch, the package's own requirements, pytest; no compiler.

    python tests/packaging/clean_environment.py WHEEL TORCH...

is `make wheel-matrix`: the operators' tests beside each version of torch, without a compiler on
PATH.
"""

import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPERATOR_TESTS = (
    "ops/test_alignment.py",
    "ops/test_optimizer.py",
    "kernels/tensor_list_cases.py",
    "kernels/test_alignment_kernels.py",
    "kernels/test_optimizer_kernels.py",
    "kernels/kernel_cases.py",
    "kernels/test_kernel_calls.py",
    "kernels/test_posterior_kernels.py",
    "kernels/test_reverse_step_kernels.py",
    "kernels/test_scoring_kernels.py",
    "kernels/test_shared_centers_kernels.py",
    "kernels/test_states_kernels.py",
)
IMPORT = (
    "import time, torch; start = time.perf_counter(); "
    "import genrep_fast; print(time.perf_counter() - start)"
)


def create(folder: Path, wheel: Path, torch: str) -> Path:
    """Make the environment in `folder`; the path of its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch by itself: together with a wheel that asks for torch >= 2.11, pip may look for the
    # newest one.
    for packages in (
        [f"torch=={torch}"],
        ["numpy", "safetensors", "pytest", "pytest-benchmark"],
        ["--no-deps", wheel],
    ):
        run(*install, *packages)
    return python


def run(*command: object, **options) -> str:
    """Standard output; RuntimeError with what was printed where the command fails."""
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )
    if result.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, command))} failed:\n{result.stdout}\n{result.stderr}"
        )
    return result.stdout


def run_alone(python: Path, *arguments: object, cwd: Path, **environment: str) -> str:
    """Run Python with nothing on PATH but the environment's own programs."""
    return run(
        python,
        *arguments,
        cwd=cwd,
        env={"PATH": str(python.parent), "HOME": str(cwd), "OMP_NUM_THREADS": "1", **environment},
    )


def run_operator_tests(
    python: Path, folder: Path, left_out: Iterable[str] = (), **environment: str
) -> tuple[int, int]:
    """Numbers of the operators' tests that passed and that were skipped.

    They are of the C++ kernels, as Triton is not there. `left_out`: parts of the names of tests or
    files.
    """
    folder.mkdir()
    for name in ("conftest.py", *OPERATOR_TESTS):
        shutil.copy(ROOT / "tests" / name, folder)
    # Inductor needs a compiler of its own on a CPU; the next two are of CUDA.
    of_others = ("triton", "inductor", "recorded_launches", "has_the_bits_that_it_has_alone")
    keyword = " and ".join(f"not {name}" for name in (*of_others, *left_out))
    options = ["-q", "--import-mode=importlib", "-k", keyword]
    summary = run_alone(python, "-m", "pytest", *options, ".", cwd=folder, **environment)
    return tuple(
        int((re.search(rf"(\d+) {kind}", summary) or [0, 0])[1]) for kind in ("passed", "skipped")
    )


def main() -> None:
    wheel, *versions = sys.argv[1:]
    print(f"{Path(wheel).name}: {Path(wheel).stat().st_size / 1e6:.1f} MB")
    for version in versions:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            python = create(folder / "environment", Path(wheel).resolve(), version)
            passed, skipped = run_operator_tests(python, folder / "tests")
            seconds = [float(run_alone(python, "-c", IMPORT, cwd=folder)) for _ in range(5)]
            installed = run_alone(
                python, "-c", "import torch; print(torch.__version__)", cwd=folder
            ).strip()
            counts = f"{passed} passed, {skipped} skipped"
            import_time = f"import after torch {statistics.median(seconds):.3f} s"
            print(f"torch {installed}: {counts}; {import_time}", flush=True)


if __name__ == "__main__":
    main()
