"""Every operator of one backend on tensors that fill their memory, for a tool that watches memory.

    compute-sanitizer --tool memcheck python benchmarks/operators_once.py cuda

Tensors fill their memory to the last byte. Sizes are odd, dtypes mixed, memory is laid out in every
way that kernels tell apart, n gradients are 2, 3 and 8, and one is missing. That every result is
finite is all that is checked: the tests in tests/kernels compare values. torch's own kernels are
left out where they can be, as a tool would watch them too.
"""

import itertools
import math
import sys

import torch

import genrep_fast as gf
from genrep_fast.reference.scoring import empty_state

SIZES = [1, 63, 127, 129, 0, 1009, 16384 + 1, 2 * 16384 + 5]
GROUPS = [0, 1, -1, 0, 1, 2, 0, 2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [("mixture", False), ("mean", True), ("mixture", True), ("mean", False)]
LAYOUTS = {  # views of the shape [..., C, H, W] that end where their memory ends
    "contiguous": lambda make, lead, c, h, w: make(*lead, c, h, w),
    "channels last": lambda make, lead, c, h, w: make(*lead, h, w, c).movedim(-1, -3),
    "channel slice": lambda make, lead, c, h, w: make(*lead, c + 3, h, w)[..., 3:, :, :],
    "channels last, sliced": lambda make, lead, c, h, w: make(*lead, h, w, c + 3)[..., 3:].movedim(
        -1, -3
    ),
    "batch inside": lambda make, lead, c, h, w: make(*lead[1:], lead[0], c, h, w).movedim(-4, 0),
    "batch innermost": lambda make, lead, c, h, w: make(*lead[1:], c, h, w, lead[0]).movedim(-1, 0),
    "expanded": lambda make, lead, c, h, w: make(c, h, w).expand(*lead, c, h, w),
    "unaligned": lambda make, lead, c, h, w: make(math.prod(lead) * c * h * w + 1)[1:].view(
        *lead, c, h, w
    ),
    "every other": lambda make, lead, c, h, w: make(*lead, c, h, w, 2)[..., 1],
    "transposed": lambda make, lead, c, h, w: make(*lead, c, w, h).mT,
    "cropped": lambda make, lead, c, h, w: make(*lead, c, h + 1, w + 2)[..., 1:, 2:],
}
operators = torch.ops.genrep_fast


class Tensors:
    """Makes tensors of random numbers in [0, 1) on one device, of one dtype after the other."""

    def __init__(self, dtypes, device):
        self.generator, self.dtypes, self.device = (
            torch.Generator().manual_seed(0),
            itertools.cycle(dtypes),
            device,
        )

    def __call__(self, *shape, dtype=None):
        return (
            torch.rand(shape, generator=self.generator)
            .to(dtype or next(self.dtypes))
            .to(self.device)
        )

    def table(self, *shape):
        return self(*shape, dtype=torch.float32)


def require_finite(name, *results):
    if not all(result.cpu().isfinite().all() for result in results):
        raise RuntimeError(f"{name}: a result is not finite")


def align(n, dtypes, device):
    make = Tensors(dtypes, device)
    gradients = [make(size) for _ in range(n) for size in SIZES]
    gradients[3] = None
    grams = operators.gram(gradients, n, list(range(len(SIZES))), len(SIZES))
    matrices = operators.group_gram(grams, GROUPS, 3)
    coefficients = (
        operators.alignment_coefficients(matrices, [0.7, 0.3], 2.0)[0]
        if n == 2
        else torch.ones(3, n).double().to(device)
    )
    rows = operators.tensor_coefficients(coefficients, grams, GROUPS, [1 / n] * n)
    out = [make(size) for size in SIZES]
    operators.combine(gradients, rows, list(range(len(SIZES))), [], out)
    operators.combine(gradients, coefficients, GROUPS, [1 / n] * n, out)
    params, *state = ([make(size, dtype=dtypes[0]) for size in SIZES] for _ in range(4))
    steps = [torch.ones(()) for _ in SIZES]
    rest = (
        GROUPS,
        [1 / n] * n,
        steps,
        torch.tensor(0.01),
        0.9,
        0.999,
        1e-8,
        0.1,
        0.99,
        torch.zeros(1).to(device),
    )
    operators.adamw_step(params, *state, gradients, coefficients, *rest)
    require_finite(
        f"n = {n}, {dtypes}",
        matrices,
        coefficients,
        rows,
        *out,
        *params,
        *state[0],
        *state[1],
        *state[2],
    )


def group(device):
    """Tensors and groups that take the GPU's kernels several launches."""
    for n in (2, 3, 8):
        make = Tensors([torch.float64], device)
        for groups, num_groups in (
            ([0] * 1201, 1),
            (list(range(1201)), 1201),
            ([t % 7 - 1 for t in range(1201)], 600),
        ):
            grams, coefficients = make(1201, n, n), make(num_groups, n)
            matrices = operators.group_gram(grams, groups, num_groups)
            require_finite(
                f"groups, n = {n}",
                matrices,
                operators.tensor_coefficients(coefficients, grams, groups, [1 / n] * n),
            )


def score(name, x, model_output, x_t, reduction, per_location, make):
    """The operators that read a chunk of steps, on classes in another order than the state's."""
    classes, steps = model_output.shape[1:3]
    arguments = (
        x,
        model_output,
        x_t,
        torch.stack([make.table(steps) for _ in range(5)]),
        reduction,
        per_location,
    )
    likelihood, remainder = operators.log_likelihood(*arguments)
    for mask in ([True, True, x_t is not None], [False, True, False]):
        gradients = operators.log_likelihood_backward(
            likelihood, likelihood, remainder, *arguments, mask
        )
        require_finite(name, *gradients)
    count = torch.zeros(classes + 1, dtype=torch.int64).to(make.device)
    state = empty_state((len(x), classes + 1, *likelihood.shape[2:]), reduction, "cpu").to(
        make.device
    )
    for chosen in (range(classes - 1, -1, -1), range(1, classes + 1)):
        operators.score_update(
            *arguments[:-2],
            torch.tensor(chosen).to(make.device),
            reduction,
            per_location,
            count,
            state,
        )
    require_finite(name, likelihood, remainder, state)


def score_layouts(device):
    for i, (name, view) in enumerate(LAYOUTS.items()):
        make, options = Tensors(DTYPES[i % 3 :] + DTYPES[: i % 3], device), OPTIONS[i % 4]
        x, x_t = view(make, (3,), 3, 5, 7), view(make, (3, 1, 5), 3, 5, 7)
        score(name, x, view(make, (3, 2, 5), 4, 5, 7), None if i % 5 == 4 else x_t, *options, make)


def score_shapes(device):
    make = Tensors(DTYPES[:1], device)
    for batch, classes, steps, channels, spatial in (
        (1, 1, 1, 1, ()),
        (1, 2, 3, 4, (33, 65)),
        (2, 1, 131, 2, ()),
        (1, 257, 2, 1, (3,)),
    ):
        for options in OPTIONS:
            sizes = make(batch, channels, *spatial), make(batch, classes, steps, channels, *spatial)
            score(f"{(batch, classes, steps, channels, *spatial)}", *sizes, None, *options, make)


def score_shared_centres(device):
    for i, dtypes in enumerate((DTYPES, DTYPES[1:], DTYPES[:1])):
        make = Tensors(dtypes, device)
        for batch, channels, side in ((1, 3, 5), (70, 4, 9), (17, 1, 37)):
            x_t = make(1, 3, 9, channels, side, side) if i == 2 else None
            score(
                f"centres of {batch}",
                make(batch, channels, side, side),
                make(1, 3, 9, channels, side, side),
                x_t,
                *OPTIONS[i],
                make,
            )


def bayes(device):
    for dtypes, shape in itertools.product(
        ([dtype] for dtype in DTYPES), ((1, 1), (5, 127), (2, 2003), (3, 10, 129), (2, 3, 5, 7))
    ):
        make = Tensors(dtypes, device)
        prior = make.table(1, shape[1], *[1] * (len(shape) - 2))
        arguments = (make(*shape), make(*shape), prior, 2.0)
        loss = operators.distillation_loss(*arguments)
        gradients = operators.distillation_loss_backward(loss, *arguments, [True, True])
        require_finite(f"{shape}, {dtypes}", operators.posterior(*arguments[1:]), loss, *gradients)


def step_chains(device):
    for i, (name, view) in enumerate(LAYOUTS.items()):
        make = Tensors(DTYPES[i % 3 :] + DTYPES[: i % 3], device)
        x_t, model_output, x = (view(make, (3,), channels, 5, 7) for channels in (3, 4, 3))
        scale = (None, make(3, 1, 1, 1) + 1, view(make, (3,), 3, 5, 7) + 1)[i % 3]
        chain_ids = torch.tensor([5, 2**32 - 1, 0]).to(device)
        tables = [make.table(7) for _ in range(8)]
        x_prev, score = operators.reverse_step(
            x_t, model_output, *tables, 6, -5, chain_ids, None if i % 4 == 3 else x, scale
        )
        require_finite(name, x_prev, score)


def main():
    backend = sys.argv[1]
    device = "cpu" if backend == "cpu" else "cuda"
    with gf.use_backend(backend):
        for n in (2, 3, 8):
            for dtypes in (*([dtype] for dtype in DTYPES), DTYPES):
                align(n, dtypes, device)
        for run in (group, score_layouts, score_shapes, score_shared_centres, bayes, step_chains):
            run(device)
    print(f"{backend}: every result is finite")


if __name__ == "__main__":
    main()
