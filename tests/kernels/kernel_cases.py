"""What the tests of the scoring kernels share: arguments, layouts in memory, and bounds of errors.

Without a GPU kernels are the C++ ones, and the Triton kernels in Triton's interpreter (chosen in
conftest.py); with one, Triton and CUDA C++. What the operators mean is tested in tests/ops.
"""

import math
import os

import torch

from genrep_fast.reference import reverse_step as step_reference
from genrep_fast.reference import scoring as reference

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
operators = torch.ops.genrep_fast
REDUCTIONS = ["mixture", "mean"]
ALL = (True, True, True)
# Numbers of a result whose errors do not average out.
FEW = 16


def random(*shape, seed=0, dtype=F32):
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
        .to(dtype)
        .to(DEVICE)
    )


def tables(steps, elements):
    """data, noisy, output, inv_var and log_norm [5, S], such that many steps have weight and no
    term of a likelihood is positive
    """
    rising = torch.linspace(0, 1, steps, dtype=F64)
    inv_var = (0.9 + 0.2 * rising) / math.sqrt(elements)
    columns = (
        1.2 - 0.4 * rising,
        0.3 * rising - 0.6,
        rising - 1.5,
        inv_var,
        -0.5 - rising / elements,
    )
    return torch.stack(columns).float().to(DEVICE)


def plain_tables(steps):
    """Tables [5, S] with which l = -sum o^2 / 2."""
    zeros, ones = torch.zeros(steps, device=DEVICE), torch.ones(steps, device=DEVICE)
    return torch.stack((zeros, zeros, ones, ones, zeros))


def chunk(
    batch,
    classes,
    steps,
    channels,
    extra=0,
    spatial=(),
    *,
    dtypes=(F32, F32, F32),
    x_t_axes=(None, 1, None),
):
    """x, model_output, x_t and tables; `x_t_axes`: a size for each leading axis of x_t, None for
    the whole axis, or None for no x_t.
    """
    lead = (batch, classes, steps)
    x = random(batch, channels, *spatial, seed=1, dtype=dtypes[0])
    model_output = random(*lead, channels + extra, *spatial, seed=2, dtype=dtypes[1])
    x_t = None
    if x_t_axes is not None:
        own = [full if size is None else size for full, size in zip(lead, x_t_axes, strict=True)]
        x_t = random(*own, channels, *spatial, seed=3, dtype=dtypes[2])
    return x, model_output, x_t, tables(steps, channels * math.prod(spatial))


def double(values):
    return [
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in values
    ]


def assert_accurate(name, result, plain, exact, size=None):
    """At most twice the error of the plain formula in the same dtype, and a floor, as that may be
    exact by chance.

    The floor is half a rounding unit of float32, or an eighth of one of lower precision, of the
    result, or of `size`: the terms that are added up to it, where they cancel. Of a few numbers it
    is a whole unit of float32: the five roundings that lead to each do not average out.
    """
    assert result.shape == exact.shape and result.dtype == plain.dtype and result.is_contiguous()
    scale = (exact if size is None else size).double().norm().item()
    error, plain_error = (
        (value.double() - exact.double()).norm().item() for value in (result, plain)
    )
    units = 1 / 8
    if result.dtype == F32:
        units = 1 if result.numel() <= FEW else 1 / 2
    bound = 2 * plain_error + torch.finfo(result.dtype).eps * units * scale
    errors = f"error {error:.1e}, plain formula {plain_error:.1e}, bound {bound:.1e}"
    print(f"{name}, {result.dtype}: {errors}")
    note_accuracy(f"{name}, {result.dtype}", error, bound)
    assert error <= bound


def note_accuracy(name, error, bound):
    """Append the error as a part of its bound to the file of benchmarks/on_device.sh, which keeps
    it where the process does not end.
    """
    path = os.environ.get("GENREP_FAST_ACCURACY_FILE")
    if path:
        part = error / bound if bound else float(error > 0)
        with open(path, "a") as file:
            file.write(f"{part:.3f} {name}: {os.environ.get('PYTEST_CURRENT_TEST', '')}\n")


def assert_equal_bits(results, expected):
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == value.dtype and result.shape == value.shape
        assert torch.equal(result.flatten().view(torch.uint8), value.flatten().view(torch.uint8))


# More channels of model_output than x has, and dtypes: with these, sizes allow wide loads, or
# strides and places forbid them.
WIDE = [
    (0, (F32,) * 3),
    (1, (F32,) * 3),
    (4, (F32, BF16, F32)),
    (0, (BF16,) * 3),
    (1, (BF16, F32, BF16)),
    (4, (BF16,) * 3),
    (4, (F16,) * 3),
    (4, (F32, F16, F32)),
]


def assert_scored(arguments, reduction, per_location, masks=(ALL,)):
    """Likelihood and gradients of the operators' leading arguments."""
    options = (reduction, per_location)
    likelihood, remainder = operators.log_likelihood(*arguments, *options)
    plain, exact = (
        reference.log_likelihood(*values, *options)[0] for values in (arguments, double(arguments))
    )
    assert_accurate("likelihood", likelihood, plain, exact)
    assert (
        remainder.shape == (likelihood.shape if reduction == "mixture" else (0,))
        and remainder.dtype == F32
    )
    grad = random(*likelihood.shape, seed=9)
    sizes = added_sizes(grad, arguments, options)
    for mask in masks:
        mask = [
            needed and tensor is not None
            for needed, tensor in zip(mask, arguments[:3], strict=True)
        ]
        results, plain, exact = (
            backward(grad, likelihood, remainder, *values, *options, mask)
            for backward, values in (
                (operators.log_likelihood_backward, arguments),
                (reference.log_likelihood_backward, arguments),
                (reference.log_likelihood_backward, double(arguments)),
            )
        )
        for name, needed, *gradients in zip(
            ("x", "model_output", "x_t"), mask, results, plain, exact, strict=True
        ):
            if needed:
                assert_accurate(f"gradient of {name}", *gradients, sizes[name])
            else:
                assert gradients[0].shape == (0,)


def added_sizes(grad, arguments, options):
    """By tensor: the sizes of the terms that make up its gradient, added up as the terms are."""
    x, model_output, x_t, columns = double(arguments)
    lead = (len(x), grad.shape[1], columns.shape[1])
    exact = reference.log_likelihood(x, model_output, x_t, columns, *options)
    whole = model_output.expand(*lead, *model_output.shape[3:])
    terms = reference.log_likelihood_backward(
        grad.double(), *exact, x, whole, x_t, columns, *options, [False, True, False]
    )[1].abs()
    data, noisy, output = (column.abs().view(-1, *[1] * (x.ndim - 1)) for column in columns[:3])
    residuals = terms[:, :, :, : x.shape[1]] / output
    return {
        "x": (residuals * data).sum((1, 2)),
        "model_output": terms.sum_to_size(model_output.shape),
        "x_t": None if x_t is None else (residuals * noisy).sum_to_size(x_t.shape),
    }


def pad(tensor, *sizes):
    return torch.nn.functional.pad(tensor, sizes, value=math.nan)


# Copies of [..., C, H, W] with a part of their memory, or all of it, in another order; what lies
# between is NaN.
LAYOUTS = {
    "contiguous": lambda tensor: tensor.clone(),
    "unaligned": lambda tensor: torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(
        tensor.shape
    ),
    "channels last": lambda tensor: tensor.movedim(-3, -1).contiguous().movedim(-1, -3),
    "channels last, sliced": lambda tensor: pad(tensor.movedim(-3, -1), 1, 2)[..., 1:-2].movedim(
        -1, -3
    ),
    "channel slice": lambda tensor: pad(tensor, 0, 0, 0, 0, 1, 2)[..., 1:-2, :, :],
    "steps first": lambda tensor: tensor.movedim(-4, 0).contiguous().movedim(0, -4),
    "batch inside": lambda tensor: tensor.movedim(0, -4).contiguous().movedim(-4, 0),
    "batch innermost": lambda tensor: tensor.movedim(0, -1).contiguous().movedim(-1, 0),
    "every other": lambda tensor: torch.stack([tensor, torch.full_like(tensor, math.nan)], -1)[
        ..., 0
    ],
    "transposed": lambda tensor: tensor.mT.contiguous().mT,
    "cropped": lambda tensor: pad(tensor, 1, 2, 0, 3)[..., :-3, 1:-2],
}


def state_of(batch, num_classes, spatial, reduction, per_location):
    shape = (batch, num_classes, *(spatial if per_location else ()))
    return torch.zeros(num_classes, dtype=torch.int64, device=DEVICE), reference.empty_state(
        shape, reduction, DEVICE
    )


def whole_numbers(steps, elements, largest):
    """x = 0, model_output [1, 2, S, D] of whole numbers, the first of them 1, and tables with which
    l = -sum o^2 / 2.

    Float32 holds every partial sum; a row's l is up to 2 nats from another's.
    """
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(-largest, largest + 1, (elements - 2,), generator=generator)
    rows = [
        torch.tensor([1, i % 3, *row[torch.randperm(elements - 2, generator=generator)]])
        for i in range(2 * steps)
    ]
    x = torch.zeros(1, elements, device=DEVICE)
    return (
        x,
        torch.stack(rows).reshape(1, 2, steps, elements).float().to(DEVICE),
        None,
        plain_tables(steps),
    )


def prior_of(kind, shape):
    """log_prior as operators get it"""
    if kind is None:
        return None
    prior = random(
        1 if kind == "shared" else shape[0], shape[1], *[1] * (len(shape) - 2), seed=5
    ).log_softmax(1)
    if kind == "excludes":
        prior[:, 1::3] = -math.inf
    return prior


STEPS = 7


# The last is 2^64 - 3 in the schema's signed integer.
SEEDS = [0, 0x299F31D0A4093822, 2**63 - 1, -3]


CHAIN_IDS = torch.tensor([2**32 - 1, 0, 7, 2**31, 12345])


def reverse_step_arguments(
    shape, *, dtypes=(F32, F32, F32), extra=0, step=3, seed=-3, std_scale=None, scored=True
):
    batch, channels, *spatial = shape
    x_t, x = random(*shape, seed=1, dtype=dtypes[0]), random(*shape, seed=3, dtype=dtypes[2])
    model_output = random(batch, channels + extra, *spatial, seed=2, dtype=dtypes[1])
    rising = torch.linspace(0, 1, STEPS, dtype=F64)
    own = [
        column.float().to(DEVICE)
        for column in (1.1 - 0.3 * rising, -0.2 - rising, 0.1 + 0.3 * rising)
    ]
    chain_ids = CHAIN_IDS.repeat(batch // 5 + 1)[:batch].to(DEVICE)
    return (
        x_t,
        model_output,
        torch.stack([*tables(STEPS, 1), *own]),
        step,
        seed,
        chain_ids,
        x if scored else None,
        std_scale,
    )


def assert_stepped(arguments):
    results = operators.reverse_step(*arguments)
    plain, exact = (
        step_reference.reverse_step(*arguments),
        step_reference.reverse_step(*double(arguments)),
    )
    for name, *values in zip(("x_prev", "score"), results, plain, exact, strict=True):
        assert_accurate(name, *values)
