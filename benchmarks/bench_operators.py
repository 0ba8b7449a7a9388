"""Every operator by itself and in three sizes, on each backend that can run.

This decides between Triton and CUDA C++ on a GPU. The same arguments go to
``torch.ops.genrep_fast.<operator>`` under every backend. Each must first agree with the reference
in float64, in the norm. Memory moves at least what is read and written, each tensor once.

    python -m genrep_fast.benchmarks.bench_operators BACKEND

runs the large cases between marks of the CUDA profiler, for ncu.
"""

import functools
import sys

import torch

import genrep_fast as gf
from genrep_fast.benchmarks.bench_alignment import transformer_shapes
from genrep_fast.benchmarks.measurement import DEVICE, Case, Provider, compiled_backends, copy_of
from genrep_fast.reference.scoring import empty_state

operators = torch.ops.genrep_fast
SIZES = ("small", "medium", "large")
CHANNELS = (4, 32, 32)
STEP_SCALE = 0.02  # of residuals, so that likelihoods of images of 4096 elements differ by about 1


class Random:
    """Makes the same random tensors every time."""

    def __init__(self):
        self.generator = torch.Generator(DEVICE).manual_seed(0)

    def __call__(self, *shape):
        return torch.randn(shape, generator=self.generator, device=DEVICE)


def tables(steps):
    """data, noisy, output, inv_var, log_norm [5, S] of the residual x - o."""
    one = torch.ones(steps, device=DEVICE)
    inv_var = STEP_SCALE**2 * torch.linspace(0.9, 1.1, steps, device=DEVICE)
    return torch.stack((one, 0 * one, -one, inv_var, 0 * one))


def gradients(numel, lists):
    random = Random()
    return [random(*shape) for _ in range(lists) for shape in transformer_shapes(numel)]


def gram(numel):
    tensors = gradients(numel, 2)
    return [tensors, 2, [0] * (len(tensors) // 2), 1]


def alignment_coefficients(groups):
    factors = Random()(groups, 2, 8).double()
    return [factors @ factors.mT, [0.7, 0.3], 2.0]


def group_gram(tensors):
    factors = Random()(tensors, 2, 8).double()
    return [factors @ factors.mT, [0] * tensors, 1]


def tensor_coefficients(tensors):
    coefficients = torch.tensor([[0.7, 0.3]], dtype=torch.float64, device=DEVICE)
    return [coefficients, *group_gram(tensors)[:2], [0.5, 0.5]]


def combine(numel):
    tensors = gradients(numel, 3)
    count = len(tensors) // 3
    coefficients = torch.tensor([[0.7, 0.3]], dtype=torch.float64, device=DEVICE)
    return [tensors[: 2 * count], coefficients, [0] * count, [0.7, 0.3], tensors[2 * count :]]


def adamw_step(numel):
    tensors = gradients(numel, 6)
    count = len(tensors) // 6
    params, exp_avgs, squares, emas = (tensors[i * count : (i + 1) * count] for i in range(4))
    coefficients = torch.tensor([[0.7, 0.3]], dtype=torch.float64, device=DEVICE)
    steps = [torch.tensor(3.0) for _ in range(count)]
    rest = [[0] * count, [0.7, 0.3], steps, torch.tensor(1e-3), 0.9, 0.999, 1e-8, 0.01, 0.999, None]
    return [
        params,
        exp_avgs,
        [square.square() for square in squares],
        emas,
        tensors[4 * count :],
        coefficients,
        *rest,
    ]


def chunk(batch, classes, steps, shared=False):
    random = Random()
    return [
        random(batch, *CHANNELS),
        random(1 if shared else batch, classes, steps, *CHANNELS),
        None,
        tables(steps),
    ]


def log_likelihood(*sizes):
    return [*chunk(*sizes), "mixture", False]


def shared_centres(*sizes):
    return [*chunk(*sizes, shared=True), "mixture", False]


def log_likelihood_backward(*sizes):
    arguments = chunk(*sizes)
    with gf.use_backend("reference"):
        likelihood, remainder = operators.log_likelihood(*arguments, "mixture", False)
    return [
        torch.ones_like(likelihood),
        likelihood,
        remainder,
        *arguments,
        "mixture",
        False,
        [False, True, False],
    ]


def score_update(batch, classes, steps):
    count = torch.zeros(classes, dtype=torch.int64, device=DEVICE)
    return [
        *chunk(batch, classes, steps),
        None,
        "mixture",
        False,
        count,
        empty_state((batch, classes), "mixture", torch.device(DEVICE)),
    ]


def posterior(*shape):
    return [Random()(*shape), None, 2.0]


def distillation_loss(*shape):
    random = Random()
    return [random(*shape), random(*shape), None, 2.0]


def distillation_loss_backward(*shape):
    arguments = distillation_loss(*shape)
    return [torch.ones(shape[0], *shape[2:], device=DEVICE), *arguments, [True, True]]


def reverse_step(batch):
    random, table = Random(), torch.linspace(0.5, 1, 8, device=DEVICE)
    x_t, output, x = (random(batch, *CHANNELS) for _ in range(3))
    return [x_t, output, *[table] * 8, 3, 7, torch.arange(batch, device=DEVICE), x, None]


PARAMETERS = [(10**5,), (10**7,), (10**8,)]
CHUNKS = [(1, 5, 5), (4, 10, 25), (8, 10, 200)]
SCORES = [(8, 10), (64, 1000), (8, 150, 16384)]
# case -> operator, what makes its arguments, FLOPs an element of the largest one, sizes
ARGUMENTS = {
    "gram": ("gram", gram, 6, PARAMETERS),
    "alignment_coefficients": (
        "alignment_coefficients",
        alignment_coefficients,
        20,
        [(1,), (100,), (10_000,)],
    ),
    "group_gram": ("group_gram", group_gram, 2, [(1,), (100,), (10_000,)]),
    "tensor_coefficients": (
        "tensor_coefficients",
        tensor_coefficients,
        1,
        [(1,), (100,), (10_000,)],
    ),
    "combine": ("combine", combine, 3, PARAMETERS),
    "adamw_step": ("adamw_step", adamw_step, 20, PARAMETERS),
    "log_likelihood": ("log_likelihood", log_likelihood, 6, CHUNKS),
    "log_likelihood, shared centres": (
        "log_likelihood",
        shared_centres,
        6,
        [(8, 10, 5), (64, 10, 100), (64, 10, 600)],
    ),
    "log_likelihood_backward": ("log_likelihood_backward", log_likelihood_backward, 14, CHUNKS),
    "score_update": ("score_update", score_update, 6, [(1, 5, 1), (4, 10, 1), (8, 1000, 1)]),
    "posterior": ("posterior", posterior, 5, SCORES),
    "distillation_loss": ("distillation_loss", distillation_loss, 12, SCORES),
    "distillation_loss_backward": (
        "distillation_loss_backward",
        distillation_loss_backward,
        16,
        SCORES,
    ),
    "reverse_step": ("reverse_step", reverse_step, 30, [(2,), (256,), (8192,)]),
}


def flatten(values):
    """All floating-point tensors in nested lists and tuples."""
    if isinstance(values, torch.Tensor):
        return [values] if values.is_floating_point() else []
    return (
        [tensor for value in values for tensor in flatten(value)]
        if isinstance(values, list | tuple)
        else []
    )


def double(values):
    """Copies, in float64 where they are floating-point."""
    if isinstance(values, torch.Tensor):
        return values.to(torch.float64, copy=True) if values.is_floating_point() else values.clone()
    return type(values)(map(double, values)) if isinstance(values, list | tuple) else values


def run(operator, backend, arguments):
    with gf.use_backend(backend):
        return getattr(operators, operator)(*arguments)


def error_of(operator, backend, make):
    """Of results and of what was changed in place, relative in the norm."""
    arguments = make()
    exact = double(arguments)
    results, expected = (
        list(flatten([run(operator, *call), call[1]]))
        for call in ((backend, arguments), ("reference", exact))
    )
    if operator == "log_likelihood":
        del results[1], expected[1]  # what rounding took from the likelihood
    worst = 0.0
    for result, value in zip(results, expected, strict=True):
        if value.numel():
            worst = max(worst, ((result.double() - value).norm() / value.norm()).item())
    if not worst < 1e-5:
        raise RuntimeError(f"relative error {worst:.1e}")
    return worst


def case(operator, builder, flops, sizes):
    make = functools.partial(builder, *sizes)
    arguments = make()
    backends = {"reference": "eager"} | dict.fromkeys(compiled_backends(operator), "ours")
    providers = {
        backend: Provider(
            functools.partial(run, operator, backend, arguments),
            functools.partial(error_of, operator, backend, make),
            role,
        )
        for backend, role in backends.items()
    }
    results = run(operator, "reference", make())
    elements = max(sum(tensor.numel() for tensor in flatten([argument])) for argument in arguments)
    moved = sum(tensor.nbytes for tensor in flatten([arguments, results]))
    if operator == "adamw_step":  # parameters, moments and averages are written too
        moved += sum(tensor.nbytes for tensor in flatten(arguments[:4]))
    work = elements * (sizes[0] if builder is shared_centres else 1)
    arithmetic = builder is shared_centres or operator in (
        "group_gram",
        "alignment_coefficients",
        "tensor_coefficients",
    )
    return Case(
        providers,
        elements,
        None if arithmetic else moved,
        flops * work,
        **copy_of(torch.empty(max(elements, 1), device=DEVICE)),
    )


CASES = {
    f"{name} {size}": functools.partial(case, operator, builder, flops, sizes)
    for name, (operator, builder, flops, all_sizes) in ARGUMENTS.items()
    for size, sizes in zip(SIZES, all_sizes, strict=True)
    if (size, DEVICE) != ("large", "cpu")  # minutes and gigabytes, most of them for the check
}
QUICK = []
SMALLEST = "gram small"


def main():
    for operator, builder, _, sizes in ARGUMENTS.values():
        arguments = builder(*sizes[-1])
        run(operator, sys.argv[1], arguments)  # Triton compiles
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run(operator, sys.argv[1], arguments)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
