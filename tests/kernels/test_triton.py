"""What is Triton's own: tables of addresses, launches, and kernels compiled for GPUs that are not
here; the other files run the operators.

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
from genrep_fast.dispatch.selection import operators_of
from genrep_fast.kernels import (
    alignment,
    multi_tensor,
    optimizer,
    posterior,
    reverse_step,
    scoring,
    scoring_backward,
    scoring_chunk,
)
from genrep_fast.reference import scoring as scoring_reference

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def test_sums_over_more_slots_than_a_block_holds():
    bounds = [0, 1100, 1100, 3000]
    partials = torch.randn(
        3000, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(DEVICE)
    matrices = torch.full((3, 3, 3), math.nan, dtype=torch.float64, device=DEVICE)
    alignment.alignment_gram_sums_kernel[(3, 3, 3)](
        partials, torch.tensor(bounds, device=DEVICE), matrices, 3, BLOCK=1024
    )
    upper = torch.stack(
        [partials[first:last].sum(0) for first, last in itertools.pairwise(bounds)]
    )  # [3, 6]
    rows, columns = torch.triu_indices(3, 3)
    torch.testing.assert_close(matrices[:, rows, columns], upper, rtol=0, atol=1e-12)
    assert torch.equal(matrices, matrices.mT)


def assert_gram(gradients, groups, num_groups):
    with gf.use_backend("reference"):
        expected = torch.ops.genrep_fast.gram(gradients, 2, groups, num_groups)
    torch.testing.assert_close(
        alignment.gram(gradients, 2, groups, num_groups), expected, rtol=1e-12, atol=1e-12
    )


def test_tables_are_built_once_while_tensors_stay_where_they_are():
    gradients = [
        torch.randn(size, generator=torch.Generator().manual_seed(size)).to(DEVICE)
        for size in (100, 200, 100, 200)
    ]
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


def test_tables_of_groups_are_built_once_and_serve_both_operators():
    grams = torch.ones(3, 2, 2, dtype=torch.float64, device=DEVICE)
    coefficients = torch.ones(2, 2, dtype=torch.float64, device=DEVICE)
    misses = multi_tensor._build_group_tables_once.cache_info().misses
    for groups, count in (([1, -1, 0], 1), ([1, -1, 0], 1), ([0, -1, 0], 2)):
        assert alignment.group_gram(grams, groups, 2)[:, 0, 0].tolist() == [
            groups.count(0),
            groups.count(1),
        ]
        assert alignment.tensor_coefficients(coefficients, grams, groups, [3.0, 4.0])[
            :, 0
        ].tolist() == [1, 3, 1]
        assert multi_tensor._build_group_tables_once.cache_info().misses == misses + count
    for groups in ([2], [-2]):
        with pytest.raises(
            ValueError, match=f"groups must be from -1 to 1, got {groups[0]} to {groups[0]}"
        ):
            alignment.group_gram(grams[:1], groups, 2)


def test_wide_loads_are_for_aligned_tensors_alone():
    buffer = torch.zeros(600, device=DEVICE)
    aligned, shifted = buffer[:256], buffer[257:513]
    lists = [
        [aligned, aligned, shifted, aligned[:255]],
        [aligned, shifted, aligned, buffer[256:511]],
    ]
    launches = multi_tensor.plan(lists, [0] * 4, 1, DEVICE).launches
    assert {launch.aligned: launch.chunks[:, 0].tolist() for launch in launches} == {
        True: [0],
        False: [1, 2, 3],
    }


def scored_chunk(
    batch, classes, steps, channels, spatial, *, dtype=F32, shared=False, x_t_axes=None
):
    """Leading arguments of the scoring operators; `x_t_axes`: its first three sizes, or None for no
    x_t.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    x, model_output = (
        random(batch, channels, *spatial),
        random(1 if shared else batch, classes, steps, channels, *spatial),
    )
    x_t = None if x_t_axes is None else random(*x_t_axes, channels, *spatial)
    return x, model_output, x_t, torch.linspace(0.5, 1.5, steps, device=DEVICE).repeat(5, 1)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reduction", ["mixture", "mean"])
def test_groups_of_steps_are_merged(monkeypatch, reduction, shared):
    arguments = scored_chunk(5, 2, 19, 2, (3,), shared=shared)
    likelihood = scoring.log_likelihood(*arguments, reduction, False)[0]
    monkeypatch.setattr(scoring_chunk, "_GROUP_ELEMENTS", 1)
    chunk = scoring_chunk.chunk_of(*arguments, False)
    assert (
        chunk.kind == ("shared_centers" if shared else "rows")
        and chunk.split(chunk.tile(backward=False))[2] > 1
    )
    torch.testing.assert_close(
        scoring.log_likelihood(*arguments, reduction, False)[0], likelihood, rtol=1e-7, atol=0
    )
    states = [scoring_reference.empty_state((5, 2), reduction, DEVICE) for _ in range(2)]
    for state, update in zip(
        states, (scoring.score_update, scoring_reference.score_update), strict=True
    ):
        count = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        for _ in range(2):
            update(*arguments, None, reduction, False, count, state)
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 7, 8, 9, 1000, 4001])
def test_groups_hold_every_step_once(steps, shared):
    for batch, classes, elements in itertools.product((1, 8, 33), (1, 10, 2000), (1, 100, 5000)):
        output = torch.empty(1, device=DEVICE).expand(
            1 if shared else batch, classes, steps, elements
        )
        chunk = scoring_chunk.chunk_of(
            output[0, 0, :1].expand(batch, -1) if steps else output.new_empty(batch, elements),
            output,
            None,
            torch.empty(5, steps, device=DEVICE),
            False,
        )
        for backward in (False, True):
            tile = chunk.tile(backward)
            _, size, groups = chunk.split(tile)
            assert size % tile.steps == 0 and (groups - 1) * size < max(steps, 1) <= groups * size


def test_wide_loads_are_for_aligned_rows_alone():
    def aligned(x, model_output, x_t, tables, per_location=False):
        return scoring_chunk.chunk_of(x, model_output, x_t, tables, per_location).aligned

    x, model_output, x_t, tables = scored_chunk(2, 3, 4, 2, (4, 8), x_t_axes=(2, 1, 4))
    assert aligned(x, model_output, x_t, tables) and aligned(
        x, model_output, x_t, tables, per_location=True
    )
    channels_last = [
        tensor.movedim(-3, -1).contiguous().movedim(-1, -3) for tensor in (x, model_output, x_t)
    ]
    assert aligned(*channels_last, tables) and not aligned(
        *channels_last, tables, per_location=True
    )
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    odd = [tensor[..., :7].contiguous() for tensor in (x, model_output, x_t)]
    for tensors in (
        odd,
        (shifted, model_output, x_t),
        (channels_last[0], model_output, x_t),
        (x, model_output[..., :1, :], x_t[..., :1, :]),
    ):
        x = tensors[0][..., : tensors[1].shape[-2], :]
        assert not aligned(x, *tensors[1:], tables)


# Compiled for GPUs that are not here

CAPABILITIES = [80, 90]

# B, K, S, C, spatial and options of `scored_chunk`, per_location: each kind of tile, with and
# without wide loads.
SCORED = [
    ((2, 3, 50, 4, (16, 16)), {"x_t_axes": (2, 1, 50)}, False),
    ((2, 3, 50, 3, (13, 17)), {"x_t_axes": (2, 3, 1), "dtype": BF16}, False),
    ((2, 3, 1, 4, (16, 16)), {"dtype": F16}, False),
    ((2, 3, 50, 4, (4, 4)), {"x_t_axes": (2, 1, 50)}, False),
    ((64, 3, 50, 4, (16, 16)), {"shared": True}, False),
    ((64, 3, 50, 3, (13, 17)), {"shared": True, "x_t_axes": (64, 3, 50)}, False),
    ((2, 3, 50, 4, (16, 16)), {"x_t_axes": (2, 1, 50)}, True),
    ((2, 3, 50, 3, (13, 17)), {"dtype": BF16}, True),
]
# Of these the mean, which needs less of everything, on the newest GPU.
AVERAGED = [SCORED[0], SCORED[5], SCORED[6]]
# Other sizes of a layout that is among them; 1 and multiples of 16 are what Triton looks for.
SAME_LAYOUT = [
    ((1, 2, 17, 4, (16, 64)), {"x_t_axes": (1, 1, 17)}, False),
    ((3, 16, 64, 4, (16, 32)), {"x_t_axes": (3, 1, 64)}, False),
    ((80, 1, 31, 4, (16, 32)), {"shared": True}, False),
    ((1, 2, 31, 16, (32, 32)), {"x_t_axes": (1, 1, 31)}, True),
]
# Dtypes of the gradients, and a size: of 256 elements loads are wide, of 255 they are not.
COMPILED = [
    ((F32, F32), 256),
    ((F32, F32), 255),
    ((BF16, F16), 256),
    ((F32, None), 256),
    ((F32, BF16, F16), 255),
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
    """Call the operators on CPU tensors with launches replaced by compilation.

    Write each kernel's cubin. Print its function, its name and its file; and the names of kernels
    that other sizes compiled once more.
    """
    triton.runtime.driver.set_active(OfflineDriver(capability))
    launch, compiled = triton.runtime.JITFunction.run, {}

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
        compiled[id(kernel)] = (self.__name__, kernel)

    triton.runtime.JITFunction.run = compile_only
    compile_tensor_lists()
    for sizes, options, per_location in SCORED:
        compile_scoring(sizes, options, per_location, "mixture")
    if capability == CAPABILITIES[-1]:
        for sizes, options, per_location in AVERAGED:
            compile_scoring(sizes, options, per_location, "mean")
    for shape in ((8, 10), (8, 150, 32, 32)):
        compile_posterior(shape)
    for dtype, x, scale in ((F32, True, True), (BF16, True, False), (F32, False, True)):
        x_t = torch.zeros(8, 4, 16, 16, dtype=dtype)
        optional = (x_t if x else None, x_t[:, :1] if scale else None)
        reverse_step.reverse_step(x_t, x_t, torch.ones(8, 5), 2, 7, torch.arange(8), *optional)
    before = list(compiled)
    for sizes, options, per_location in SAME_LAYOUT:
        compile_scoring(sizes, options, per_location, "mixture")
    for shape in ((1, 1), (16, 32), (1, 16, 7), (3, 1, 64, 64)):
        compile_posterior(shape)
    entries = []
    for i, (function, kernel) in enumerate(compiled.values()):
        file = Path(folder, f"{i}.cubin")
        assert kernel.metadata.target.arch == capability
        file.write_bytes(kernel.asm["cubin"])
        entries.append((function, kernel.metadata.name, str(file)))
    print(
        json.dumps({"entries": entries, "again": [name for _, name, _ in entries[len(before) :]]})
    )


def compile_tensor_lists():
    for dtypes, size in COMPILED:
        gradients = [None if dtype is None else torch.ones(size, dtype=dtype) for dtype in dtypes]
        params, *state = ([torch.ones(size, dtype=dtype)] for dtype in (dtypes[0], F32, F32, F32))
        gram = alignment.gram(gradients, len(dtypes), [0], 1)
        coefficients = alignment.alignment_coefficients(gram[:, :2, :2], [0.7, 0.3], 2.0)[
            0
        ].new_empty(1, len(dtypes))
        own = torch.ones(1, len(dtypes), len(dtypes), dtype=torch.float64)
        alignment.group_gram(own, [0], 1)
        alignment.tensor_coefficients(coefficients, own, [0], [0.5] * len(dtypes))
        alignment.combine(gradients, coefficients, [0], [], params)
        for emas, found_inf in ((state[2], None), ([], torch.zeros(1))):
            factors = (0.9, 0.999, 1e-8, 0.01, 0.999)
            scalars = ([torch.ones(())], torch.tensor(0.1), *factors, found_inf)
            optimizer.adamw_step(
                params, *state[:2], emas, gradients, coefficients, [0], [], *scalars
            )


def compile_scoring(sizes, options, per_location, reduction):
    arguments = scored_chunk(*sizes, **options)
    likelihood, remainder = scoring.log_likelihood(*arguments, reduction, per_location)
    state = scoring_reference.empty_state(likelihood.shape, reduction, DEVICE)
    count = torch.zeros(sizes[1], dtype=torch.int64)
    scoring.score_update(*arguments, None, reduction, per_location, count, state)
    mask = [arguments[2] is not None, True, arguments[2] is not None]
    scoring_backward.log_likelihood_backward(
        likelihood, likelihood, remainder, *arguments, reduction, per_location, mask
    )


def compile_posterior(shape):
    scores, prior = torch.zeros(shape), torch.zeros(1, shape[1], *[1] * (len(shape) - 2))
    for log_prior in (None, prior):
        posterior.posterior(scores, log_prior, 2.0)
        posterior.distillation_loss(scores, scores, log_prior, 2.0)
        posterior.distillation_loss_backward(
            scores[:, 0], scores, scores, log_prior, 2.0, [True, log_prior is None]
        )


def kernels_of_the_package():
    """Names of the functions that are launched; helpers have no names in _kernel."""
    modules = [
        import_module(f"genrep_fast.kernels.{module.name}")
        for module in pkgutil.iter_modules(genrep_fast.kernels.__path__)
    ]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "fn")
    }


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """What processes printed, by capability, which compile at the same time."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    processes = {}
    for capability in CAPABILITIES:
        folder = tmp_path_factory.mktemp(f"sm_{capability}")
        own = {"CUDA_VISIBLE_DEVICES": "", "TRITON_CACHE_DIR": str(folder / "cache")}
        processes[capability] = subprocess.Popen(
            [sys.executable, __file__, str(capability), str(folder)],
            env=environment | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        printed = {}
        for capability, process in processes.items():
            output, messages = process.communicate()
            assert process.returncode == 0, messages
            printed[capability] = json.loads(output)
        return printed
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_without_spills(capability, compilations):
    entries = compilations[capability]["entries"]
    assert {function for function, _, _ in entries} == kernels_of_the_package()
    cuobjdump = Path(inspect.getfile(triton)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for _, name, file in entries:
        usage = subprocess.run(
            [cuobjdump, "-res-usage", file], capture_output=True, text=True, check=True
        ).stdout
        registers, stack, local = (
            int(re.search(rf"{resource}:(\d+)", usage)[1]) for resource in ("REG", "STACK", "LOCAL")
        )
        print(f"sm_{capability} {name}: {registers} registers")
        assert (stack, local) == (0, 0), f"{name} spills: {usage}"


def test_other_sizes_compile_nothing_again(compilations):
    assert compilations[90]["again"] == []


def test_kernels_bear_their_operators_names(compilations):
    """A profiler shows them; those of scoring also tell the kind of tile."""
    names = {name for _, name, _ in compilations[90]["entries"]}
    nameless = [name for name in names if not any(o in name for o in operators_of("triton"))]
    assert nameless == []
    for operator in ("log_likelihood", "log_likelihood_backward", "score_update"):
        kinds = ("rows", "shared_centers", "locations")
        assert names >= {f"{operator}_{kind}_kernel" for kind in kinds}


if __name__ == "__main__":
    compile_offline(int(sys.argv[1]), sys.argv[2])
