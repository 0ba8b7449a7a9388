"""What is Triton's own: tables of addresses, launches, and kernels compiled for GPUs that are not here; test_kernels.py runs the operators.

Without a GPU the kernels run in Triton's interpreter, chosen in conftest.py.
"""

import inspect
import itertools
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import triton

import genrep_fast as gf
import genrep_fast.kernels
from genrep_fast.kernels import alignment, multi_tensor, optimizer

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def test_sums_over_more_slots_than_a_block_holds():
    bounds = [0, 1100, 1100, 3000]
    partials = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    matrices = torch.full((3, 3, 3), math.nan, dtype=torch.float64, device=DEVICE)
    alignment._sum_kernel[(3, 3, 3)](partials, torch.tensor(bounds, device=DEVICE), matrices, 3, BLOCK=1024)
    upper = torch.stack([partials[first:last].sum(0) for first, last in itertools.pairwise(bounds)])  # [3, 6]
    rows, columns = torch.triu_indices(3, 3)
    torch.testing.assert_close(matrices[:, rows, columns], upper, rtol=0, atol=1e-12)
    assert torch.equal(matrices, matrices.mT)


def assert_gram(gradients, groups, num_groups):
    with gf.use_backend("reference"):
        expected = torch.ops.genrep_fast.gram(gradients, 2, groups, num_groups)
    torch.testing.assert_close(alignment.gram(gradients, 2, groups, num_groups), expected, rtol=1e-12, atol=1e-12)


def test_tables_are_built_once_while_tensors_stay_where_they_are():
    gradients = [torch.randn(size, generator=torch.Generator().manual_seed(size)).to(DEVICE) for size in (100, 200, 100, 200)]
    alignment.gram(gradients, 2, [0, 0], 1)
    misses = multi_tensor._build_once.cache_info().misses
    for gradient in gradients:
        gradient *= 2
    assert_gram(gradients, [0, 0], 1)
    assert multi_tensor._build_once.cache_info().misses == misses
    assert_gram(gradients, [0, 1], 2)
    moved = [gradients[0], gradients[1].clone(), *gradients[2:]]
    assert_gram(moved, [0, 0], 1)
    shorter = [gradient[:90] for gradient in gradients]
    assert_gram(shorter, [0, 0], 1)
    assert multi_tensor._build_once.cache_info().misses == misses + 3


def test_wide_loads_are_for_aligned_tensors_alone():
    buffer = torch.zeros(600, device=DEVICE)
    aligned, shifted = buffer[:256], buffer[257:513]
    lists = [[aligned, aligned, shifted, aligned[:255]], [aligned, shifted, aligned, buffer[256:511]]]
    launches = multi_tensor.plan(lists, [0] * 4, 1, DEVICE).launches
    assert {launch.aligned: launch.chunks[:, 0].tolist() for launch in launches} == {True: [0], False: [1, 2, 3]}


# Compiled for GPUs that are not here

COMPILED = [  # dtypes of the gradients, and a size: of 256 elements loads are wide, of 255 they are not
    *(((dtype, dtype), size) for dtype in (F32, BF16, F16) for size in (256, 255)),
    ((F32, BF16), 256),
    ((F32, None), 256),
    ((F32, BF16, F16), 256),
    ((F32,) * 8, 256),
    ((BF16,) * 8, 255),
]


class OfflineDriver:
    """Stands for a GPU when kernels are compiled and not launched."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


def compile_offline(capability, folder):
    """Call the operators on CPU tensors with launches replaced by compilation; write each kernel's cubin, print kernels and files."""
    triton.runtime.driver.set_active(OfflineDriver(capability))
    launch, compiled = triton.runtime.JITFunction.run, {}

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        compiled[id(kernel)] = (self.__name__, kernel)

    triton.runtime.JITFunction.run = compile_only
    for dtypes, size in COMPILED:
        gradients = [None if dtype is None else torch.ones(size, dtype=dtype) for dtype in dtypes]
        params, *state = ([torch.ones(size, dtype=dtype)] for dtype in (dtypes[0], F32, F32, F32))
        gram = alignment.gram(gradients, len(dtypes), [0], 1)
        coefficients = alignment.alignment_coefficients(gram[:, :2, :2], [0.7, 0.3], 2.0)[0].new_empty(1, len(dtypes))
        alignment.combine(gradients, coefficients, [0], [], params)
        for emas, found_inf in ((state[2], None), ([], torch.zeros(1))):
            scalars = ([torch.ones(())], torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.01, 0.999, found_inf)
            optimizer.adamw_step(params, *state[:2], emas, gradients, coefficients, [0], [], *scalars)
    entries = []
    for i, (name, kernel) in enumerate(compiled.values()):
        file = Path(folder, f"{i}.cubin")
        assert kernel.metadata.target.arch == capability
        file.write_bytes(kernel.asm["cubin"])
        entries.append((name, str(file)))
    print(json.dumps(entries))


def kernels_of_the_package():
    """Names of the functions that are launched; helpers have no names in _kernel."""
    modules = [import_module(f"genrep_fast.kernels.{module.name}") for module in pkgutil.iter_modules(genrep_fast.kernels.__path__)]
    return {name for module in modules for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "fn")}


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_without_spills(capability, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, __file__, str(capability), str(tmp_path)]
    output = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    entries = json.loads(output.stdout)
    assert {name for name, _ in entries} == kernels_of_the_package()
    cuobjdump = Path(inspect.getfile(triton)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for name, file in entries:
        usage = subprocess.run([cuobjdump, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        registers, stack, local = (int(re.search(rf"{resource}:(\d+)", usage)[1]) for resource in ("REG", "STACK", "LOCAL"))
        print(f"sm_{capability} {name}: {registers} registers")
        assert (stack, local) == (0, 0), f"{name} spills: {usage}"


if __name__ == "__main__":
    compile_offline(int(sys.argv[1]), sys.argv[2])
