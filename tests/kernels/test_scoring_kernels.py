"""Scoring and the reverse step on every compiled backend that can run here, against the reference
in float64.

Without a GPU these are the C++ kernels, and the Triton kernels in Triton's interpreter (chosen in
conftest.py); with one, Triton and CUDA C++. What the operators mean is tested in test_scoring.py,
test_posterior_scorer.py and test_reverse_step.py.
"""

import contextlib
import ctypes
import functools
import itertools
import math
import re
from pathlib import Path

import pytest
import torch

import genrep_fast as gf
from genrep_fast.reference import posterior as posterior_reference
from genrep_fast.reference import reverse_step as step_reference
from genrep_fast.reference import scoring as reference

pytestmark = [
    pytest.mark.usefixtures("backend"),
    # Of the interpreter, at infinities.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
operators = torch.ops.genrep_fast

REDUCTIONS = ["mixture", "mean"]
ALL = (True, True, True)
SIZES = [  # B, K, S, C, extra channels, spatial
    (1, 1, 1, 1, 0, ()),
    (2, 3, 2, 2, 1, (3, 4)),
    (2, 1, 2, 7, 2, ()),
    (1, 2, 3, 3, 1, (2, 3, 5)),
    (5, 1, 3, 1, 0, (1, 1)),
    (1, 1, 67, 1, 0, (3,)),
    (1, 1, 1, 2, 1, (1009,)),
]
LARGER_SIZES = [
    (3, 2, 63, 1, 0, (13,)),
    (2, 1, 2, 127, 2, ()),
    (2, 2, 3, 129, 0, (1,)),
    (1, 2, 2, 4, 4, (1009,)),
    (1, 1, 1000, 2, 0, (3,)),
    (1, 2, 1009, 1, 0, ()),
    (1, 1, 2, 3, 0, (1009, 33)),
    (1, 20_011, 3, 1, 0, ()),
    (2, 20_000, 1, 2, 1, ()),
    (1, 1, 2, 1, 0, (1_000_003,)),
    (3, 1, 70, 257, 0, (63,)),
]


@pytest.fixture
def size(interpreted):
    """B, K, S, C, extra channels, spatial of an ordinary chunk"""
    return (2, 2, 2, 2, 1, (3, 2)) if interpreted else (3, 2, 4, 3, 1, (5, 7))


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
    result, or of `size`: the terms that are added up to it, where they cancel.
    """
    assert result.shape == exact.shape and result.dtype == plain.dtype and result.is_contiguous()
    scale = (exact if size is None else size).double().norm().item()
    error, plain_error = (
        (value.double() - exact.double()).norm().item() for value in (result, plain)
    )
    bound = (
        2 * plain_error + torch.finfo(result.dtype).eps / (2 if result.dtype == F32 else 8) * scale
    )
    errors = f"error {error:.1e}, plain formula {plain_error:.1e}, bound {bound:.1e}"
    print(f"{name}, {result.dtype}: {errors}")
    assert error <= bound


def assert_equal_bits(results, expected):
    for result, value in zip(results, expected, strict=True):
        assert result.dtype == value.dtype and result.shape == value.shape
        assert torch.equal(result.flatten().view(torch.uint8), value.flatten().view(torch.uint8))


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


# Likelihood


@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_likelihood(size, reduction, per_location):
    assert_scored(chunk(*size), reduction, per_location)


@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", LARGER_SIZES)
def test_likelihood_of_larger_sizes(size, reduction, per_location, compiled):
    assert_scored(chunk(*size), reduction, per_location)


@pytest.mark.parametrize(
    "dtypes", [(BF16,) * 3, (F16,) * 3, (F32, BF16, F16), (BF16, F32, F32), (F16, BF16, F32)]
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_likelihood_of_any_dtypes(reduction, dtypes, size):
    for per_location in (False, True):
        assert_scored(chunk(*size, dtypes=dtypes), reduction, per_location)


@pytest.mark.parametrize("x_t_axes", [None, *itertools.product((1, None), repeat=3)])
def test_x_t_shared_by_any_axes(x_t_axes, size, interpreted):
    assert_scored(
        chunk(*size, x_t_axes=x_t_axes),
        "mixture",
        False,
        (ALL, (False, True, False), (True, False, True)),
    )
    assert_scored(chunk(*size, x_t_axes=x_t_axes), "mean", True)
    if not interpreted:
        assert_scored(
            chunk(*size, x_t_axes=x_t_axes),
            "mixture",
            True,
            (ALL, (False, True, False), (True, False, True)),
        )
        assert_scored(chunk(*size, x_t_axes=x_t_axes), "mean", False)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_classes_are_those_of_x_t(batch):
    x, _, x_t, columns = chunk(3, 5, 2, 2, 0, (3,), x_t_axes=(None, None, 1))
    model_output = random(batch, 1, 2, 3, 3, seed=4)
    for per_location in (False, True):
        assert_scored((x, model_output, x_t, columns), "mixture", per_location)


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


@pytest.mark.parametrize("second", ["contiguous", "channels last", "transposed", "every other"])
@pytest.mark.parametrize("first", LAYOUTS)
def test_any_strides(first, second, size, interpreted):
    if interpreted and second != "channels last":
        pytest.skip("too slow in the interpreter")
    x, model_output, x_t, columns = chunk(*size)
    model_output = LAYOUTS[first](model_output)
    for layouts in ((second, first),) if interpreted else ((first, second), (second, first)):
        own_x, own_x_t = (
            LAYOUTS[layout](tensor) for layout, tensor in zip(layouts, (x, x_t), strict=True)
        )
        for per_location in (False, True):
            assert_scored((own_x, model_output, own_x_t, columns), "mixture", per_location)


@pytest.mark.parametrize(
    "dtypes", [(F32,) * 3, (BF16,) * 3, (F16,) * 3, (F32, BF16, F32), (BF16, F32, BF16)]
)
@pytest.mark.parametrize("extra", [0, 1, 4])
@pytest.mark.parametrize("first", LAYOUTS)
def test_sizes_for_wide_loads_in_any_layout(first, extra, dtypes, compiled):
    """Where the sizes allow loads of 16 bytes, strides and places in memory may not."""
    for channels, second in itertools.product((4, 8), ("contiguous", "channels last")):
        x, model_output, x_t, columns = chunk(3, 2, 2, channels, extra, (4, 8), dtypes=dtypes)
        model_output = LAYOUTS[first](model_output)
        for layouts in ((first, second), (second, first)):
            own_x, own_x_t = (
                LAYOUTS[layout](tensor) for layout, tensor in zip(layouts, (x, x_t), strict=True)
            )
            for per_location in (False, True):
                assert_scored((own_x, model_output, own_x_t, columns), "mixture", per_location)
        centres = LAYOUTS[first](model_output[:1].clone())
        masks = (ALL, (False, True, False))
        assert_scored((LAYOUTS[second](x), model_output, None, columns), "mixture", False, masks)
        assert_scored((LAYOUTS[second](x), centres, None, columns), "mean", False, masks)
    arguments = list(
        reverse_step_arguments(
            (3, 8, 4, 8), dtypes=dtypes, extra=extra, std_scale=random(3, 8, 4, 8, seed=4).exp()
        )
    )
    for position in (0, 1, 13, 14):
        arguments[position] = LAYOUTS[first](arguments[position])
    assert_stepped(arguments)


@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize("steps", [1, 9, 70])
@pytest.mark.parametrize("elements", [4, 16, 20, 64, 512, 1024, 8192, 8196, 12288])
def test_rows_of_whole_blocks(elements, steps, extra, compiled):
    assert_scored(
        chunk(2, 2, steps, elements, extra), "mixture", False, (ALL, (False, True, False))
    )


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_expanded_outputs(axes, size, interpreted):
    x, model_output, x_t, columns = chunk(*size, x_t_axes=(None, None, None))
    for layout in (
        ("contiguous",) if interpreted else ("contiguous", "steps first", "channels last")
    ):
        expanded = [LAYOUTS[layout](tensor) for tensor in (model_output, x_t)]
        for axis in axes:
            expanded = [tensor.narrow(axis, 0, 1).expand_as(tensor) for tensor in expanded]
        for per_location in (False, True):
            assert_scored((x[:1].expand_as(x), *expanded, columns), "mixture", per_location)


@pytest.mark.parametrize(
    "x_t_axes", [None, (1, None, None), (1, 1, 1), (1, 1, None), (None, 1, None)]
)
@pytest.mark.parametrize("batch", [1, 3, 17, 70])
def test_centres_shared_by_the_batch(batch, x_t_axes, interpreted):
    if interpreted and batch > 1 and x_t_axes is not None:
        pytest.skip("too slow in the interpreter")
    shape = (2, 3, 2, 0, (3,)) if interpreted else (3, 5, 3, 0, (3, 7))
    x, model_output, x_t, columns = chunk(batch, *shape, x_t_axes=x_t_axes)
    centres = random(1, *model_output.shape[1:], seed=4)
    assert_scored((x, centres, x_t, columns), "mixture", False, (ALL, (False, True, False)))
    if batch <= 3 or not interpreted:
        assert_scored((x, centres, x_t, columns), "mean", False)
        assert_scored((x, centres, x_t, columns), "mixture", True)


@pytest.mark.parametrize("first", LAYOUTS)
def test_shared_centres_of_any_strides_and_dtypes(first, interpreted):
    x, model_output, _, columns = chunk(
        *((3, 2, 2, 2, 0, (3, 2)) if interpreted else (19, 2, 3, 3, 0, (5, 7))), x_t_axes=None
    )
    centres = LAYOUTS[first](random(1, *model_output.shape[1:], seed=4))
    assert_scored((x, centres, None, columns), "mixture", False)
    assert_scored((LAYOUTS[first](x).half(), centres.bfloat16(), None, columns), "mixture", False)


@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_score(shape, per_location):
    for x_t_axes in (None, (None, 1, None), (1, 1, 1)):
        arguments = chunk(*shape, 2, 1, (3,), x_t_axes=x_t_axes)
        assert_scored_without_terms(arguments, "mixture", per_location)
        if shape[2] > 0:
            assert_scored_without_terms(arguments, "mean", per_location)


def assert_scored_without_terms(arguments, *options):
    likelihood, remainder = operators.log_likelihood(*arguments, *options)
    expected = reference.log_likelihood(*arguments, *options)
    assert torch.equal(likelihood, expected[0]) and torch.equal(remainder, expected[1])
    mask = [True, True, arguments[2] is not None]
    grad = torch.ones_like(likelihood)
    results = operators.log_likelihood_backward(
        grad, likelihood, remainder, *arguments, *options, mask
    )
    for result, tensor, needed in zip(results, arguments, mask, strict=False):
        assert result.shape == (tensor.shape if needed else (0,)) and (result == 0).all()


# Extreme likelihoods


def plain_tables(steps):
    """Tables [5, S] with which l = -sum o^2 / 2."""
    zeros, ones = torch.zeros(steps, device=DEVICE), torch.ones(steps, device=DEVICE)
    return torch.stack((zeros, zeros, ones, ones, zeros))


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


@pytest.mark.parametrize(("elements", "largest"), [(63, 20), (129, 300), (63, 700)])
def test_weights_of_large_likelihoods(elements, largest, interpreted):
    """o[0] = 1, so that the gradient there is minus the weight of its step."""
    steps = 7 if interpreted else 37
    arguments = whole_numbers(steps, elements, largest)
    likelihood, remainder = operators.log_likelihood(*arguments, "mixture", False)
    likelihoods = -0.5 * arguments[1].double().square().sum(-1)  # [1, 2, S]
    expected = likelihoods.logsumexp(-1) - math.log(steps)
    print(f"log-likelihoods near {expected[0, 0].item():.0f}")
    assert (likelihood.double() - expected).abs().max() <= expected.abs().max() * 2**-24
    assert (
        likelihood.double() + remainder.double() - expected
    ).abs().max() < 2e-7 + expected.abs().max() * 2**-40
    ones = torch.ones_like(likelihood)
    weights = -operators.log_likelihood_backward(
        ones, likelihood, remainder, *arguments, "mixture", False, [False, True, False]
    )[1][..., 0]
    torch.testing.assert_close(weights.double(), likelihoods.softmax(-1), rtol=2e-6, atol=0)
    assert (weights > 1e-3).all()


@pytest.mark.parametrize("shift", [3.0, 1e2, 1e3])
@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_weights_add_up_to_one(shift, per_location, shared, interpreted):
    """Where likelihoods are rounded to more than a nat, backward must find the very ones that
    forward added up.
    """
    classes, steps, channels = (1, 5, 7) if interpreted else (3, 33, 127)
    model_output = random(1 if shared else 2, classes, steps, channels, 2, seed=1) * 1e-2 + shift
    model_output[:, :, :, 0] = 1
    arguments = (
        torch.zeros(2, channels, 2, device=DEVICE),
        model_output,
        None,
        plain_tables(steps),
    )
    likelihood, remainder = operators.log_likelihood(*arguments, "mixture", per_location)
    print(f"log-likelihoods near {likelihood.flatten()[0].item():.3g}")
    grad = torch.ones_like(likelihood)
    gradient = operators.log_likelihood_backward(
        grad, likelihood, remainder, *arguments, "mixture", per_location, [False, True, False]
    )[1]
    sums = -gradient[:, :, :, 0].double().sum(2)  # [B, K, 2]
    error = (sums - (2 if shared else 1)).abs().max().item()
    print(f"largest error of a sum {error:.1e}")
    assert error <= 1e-6 * (2 if shared else 1)


@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gaps_and_infinities(per_location, shared):
    """A step beside gaps of 1e6 nats and more, steps without likelihood, a class without any."""
    batch, classes, steps = 2, 5, 4
    x = random(batch, 2, 3, seed=1)
    model_output = random(1 if shared else batch, classes, steps, 3, 3, seed=2)
    model_output[:, 0, 1:, :2] += 1500.0
    model_output[:, 1, ::2, 1, 2] = math.inf
    model_output[:, 2, :, 0] = -math.inf
    model_output[:, 3, 3, 0] = 1e30  # its square overflows
    for reduction in REDUCTIONS:
        arguments = (x, model_output, None, tables(steps, 1))
        likelihood, remainder = operators.log_likelihood(*arguments, reduction, per_location)
        assert_close_and_defined(
            likelihood, reference.log_likelihood(*arguments, reduction, per_location)[0]
        )
        if reduction == "mixture":
            assert (remainder[likelihood.isinf()] == 0).all()
            assert (likelihood[:, 2] == -math.inf).all() and likelihood[
                :, [0, 3, 4]
            ].isfinite().all()
        grad = random(*likelihood.shape, seed=9)
        grad[0, 1] = 0
        inputs = (
            grad,
            likelihood,
            remainder,
            *arguments,
            reduction,
            per_location,
            [True, True, False],
        )
        gradients, expected = (
            operators.log_likelihood_backward(*inputs),
            reference.log_likelihood_backward(*inputs),
        )
        for gradient, value in zip(gradients[:2], expected[:2], strict=True):
            assert_close_and_defined(gradient, value)


def assert_close_and_defined(result, expected):
    """Float32 in another order: a few roundings of a likelihood change a weight by as many parts in
    1e7, times its size.
    """
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-6, equal_nan=True)
    assert torch.equal(result == 0, expected == 0)


@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_nan_stays_in_its_image_and_class(reduction, per_location):
    arguments = chunk(3, 2, 4, 2, 1, (7,), x_t_axes=(None, None, None))
    model_output, x_t = arguments[1:3]
    clean = scored_and_differentiated(arguments, reduction, per_location)
    model_output[1, 1, 3, 1, 4] = math.nan
    x_t[2, 0, 0, 0, 6] = math.nan
    model_output[0, 1, 1, 2] = math.nan  # of the learned variance
    likelihood, _, *gradients = scored_and_differentiated(arguments, reduction, per_location)
    expected = torch.zeros(3, 2, 7, dtype=torch.bool, device=DEVICE)
    if per_location:
        expected[1, 1, 4] = expected[2, 0, 6] = True
    else:
        expected[1, 1] = expected[2, 0] = True
    assert torch.equal(likelihood.isnan(), expected if per_location else expected[..., 0])
    # Every step has a softmax weight that is NaN; the mean's have none.
    poisoned = expected[:, :, None, None].expand_as(x_t)
    for gradient, value in zip(gradients[1:], clean[3:], strict=True):
        gradient, value = gradient[:, :, :, :2], value[:, :, :, :2]
        assert_equal_bits([gradient[~poisoned]], [value[~poisoned]])
        assert gradient.isnan()[1, 1, 3, 1, 4] and gradient.isnan()[2, 0, 0, 0, 6]
        if reduction == "mixture":
            assert gradient[poisoned].isnan().all()
    assert (gradients[1][:, :, :, 2] == 0).all() and gradients[0][0].isfinite().all()


def scored_and_differentiated(arguments, *options):
    """Likelihood, remainder, and gradients for an upstream gradient of random numbers."""
    outputs = operators.log_likelihood(*arguments, *options)
    grad = random(*outputs[0].shape, seed=9)
    mask = [True, True, arguments[2] is not None]
    return *outputs, *operators.log_likelihood_backward(grad, *outputs, *arguments, *options, mask)


# Posterior and distillation

# [B, K, *loc]
SCORES = [
    (1, 1),
    (3, 2),
    (2, 1, 63),
    (2, 63, 2, 3),
    (1, 2003),
    (2, 5, 129),
    (0, 3),
    (0, 3, 5),
    (2, 3, 0),
]


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


@pytest.mark.parametrize("kind", [None, "shared", "own", "excludes"])
@pytest.mark.parametrize("shape", SCORES)
def test_posterior_and_distillation(shape, kind, interpreted):
    if interpreted and shape == (2, 63, 2, 3) and kind != "own":
        pytest.skip("too slow in the interpreter")
    assert_bayes(
        3 * random(*shape, seed=1), 30 * random(*shape, seed=2), prior_of(kind, shape), 7.0
    )


@pytest.mark.parametrize("dtypes", list(itertools.product((F32, BF16, F16), repeat=2)))
def test_posterior_and_distillation_of_any_dtypes(dtypes):
    for shape in ((3, 63), (2, 5, 17)):
        logits, likelihood = (
            scale * random(*shape, seed=seed) for seed, scale in ((1, 3.0), (2, 10.0))
        )
        assert_bayes(logits.to(dtypes[0]), likelihood.to(dtypes[1]), prior_of("shared", shape), 2.5)


@pytest.mark.parametrize("layout", ["transposed", "every other", "cropped", "batch inside"])
def test_posterior_and_distillation_of_any_strides(layout):
    logits, likelihood = (LAYOUTS[layout](random(3, 5, 7, 9, seed=seed)) for seed in (1, 2))
    assert_bayes(logits, likelihood, None, 1.0)
    assert_bayes(
        likelihood.contiguous(), logits, prior_of("own", (3, 5, 7, 9)).expand(3, 5, 1, 1), 1.0
    )


def test_posterior_and_distillation_of_many_classes(compiled):
    assert_bayes(
        random(2, 20_011, seed=1),
        5 * random(2, 20_011, seed=2),
        prior_of("shared", (2, 20_011)),
        0.5,
    )


def assert_bayes(logits, likelihood, prior, temperature):
    arguments = (logits, likelihood, prior, temperature)
    log_p, log_q = (
        posterior_reference.posterior(*double(arguments[1:])),
        logits.double().log_softmax(1),
    )
    # Of the divergence, [B, K, *loc].
    terms = torch.where(log_p == -math.inf, 0, log_p.exp() * (log_p.abs() + log_q.abs()))

    def compare(name, arguments, sizes):
        outputs = [getattr(operators, name)(*arguments)]
        outputs += [
            getattr(posterior_reference, name)(*values) for values in (arguments, double(arguments))
        ]
        outputs = [(values,) if isinstance(values, torch.Tensor) else values for values in outputs]
        for result, plain, exact, size in zip(*outputs, sizes, strict=True):
            infinite = exact.isinf()
            assert_equal_bits([result.double()[infinite]], [exact[infinite].double()])
            assert_accurate(
                name, *(values.masked_fill(infinite, 0) for values in (result, plain, exact)), size
            )

    compare("posterior", arguments[1:], [None])
    compare("distillation_loss", arguments, [terms.sum(1)])
    grad = random(logits.shape[0], *logits.shape[2:], seed=3)
    size = (log_p.exp() * terms.sum(1, keepdim=True) + terms) * grad.unsqueeze(1) / temperature
    for mask in ([True, True], [True, False], [False, True]):
        compare("distillation_loss_backward", (grad, *arguments, mask), [None, size])


EXTREMES = {  # logits, likelihood and prior of [K = 5]
    "one class is certain": ([0.0] * 5, [-3e5, 1e6, -1e6, 0.0, 1.0], None),
    "all are tied": ([2.0] * 5, [-123456.0] * 5, None),
    "two are tied": ([0.0] * 5, [-1e6, 7e5, -1e6, 7e5, 0.0], None),
    "the student is certain": ([0.0, -1e4, -1e4, -1e4, -1e4], [0.0] * 5, None),
    "both are certain of one": ([0.0, -1e4, -1e4, -1e4, -1e4], [0.0, -1e5, -1e5, -1e5, -1e5], None),
    "each is certain of another": (
        [0.0, -1e4, -1e4, -1e4, -1e4],
        [-1e5, 0.0, -1e5, -1e5, -1e5],
        None,
    ),
    "a class that neither has": (
        [0.0, 1.0, -math.inf, 0.5, 0.0],
        [1.0, 2.0, -math.inf, 0.0, 1.0],
        None,
    ),
    "a class that the prior excludes": (
        [0.0, 1.0, -math.inf, 0.5, 0.0],
        [1.0, 2.0, 1e6, 0.0, 1.0],
        [-1.0, -2.0, -math.inf, -1.0, -1.5],
    ),
    "a class that the student alone excludes": (
        [0.0, 1.0, -math.inf, 0.5, 0.0],
        [1.0, 2.0, 3.0, 0.0, 1.0],
        None,
    ),
    "a class that the teacher alone excludes": (
        [0.0, 1.0, 2.0, 0.5, 0.0],
        [1.0, 2.0, -math.inf, 0.0, 1.0],
        None,
    ),
    "only one is left": ([0.0, 1.0, 2.0, 0.5, 0.0], [-math.inf] * 3 + [-1e6, -math.inf], None),
    "none is left": ([0.0, 1.0, 2.0, 0.5, 0.0], [-math.inf] * 5, None),
    "a class beyond measure": ([0.0] * 5, [0.0, math.inf, 0.0, 0.0, 0.0], None),
    "a NaN of the teacher": ([0.0] * 5, [0.0, math.nan, 0.0, 0.0, 0.0], None),
    "a NaN of the student": ([0.0, math.nan, 0.0, 0.0, 0.0], [0.0] * 5, None),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("spatial", [(), (3,)])
def test_extreme_posteriors(name, spatial, interpreted):
    """An extreme image, or location, between ordinary ones, which it must not touch."""
    if interpreted and not spatial:
        pytest.skip("too slow in the interpreter")
    logits, likelihood = random(3, 5, *spatial, seed=1), random(3, 5, *spatial, seed=2)
    prior = torch.zeros(3, 5, *[1] * len(spatial), device=DEVICE)
    middle = (1, slice(None), *[1] * len(spatial))
    grad = random(3, *spatial, seed=3)

    def run(operators):
        arguments = (logits, likelihood, prior if EXTREMES[name][2] else None, 1.0)
        backward = operators.distillation_loss_backward(grad, *arguments, [True, True])
        return (
            operators.posterior(*arguments[1:]),
            operators.distillation_loss(*arguments),
            *backward,
        )

    clean = run(operators)
    for tensor, row in zip((logits, likelihood, prior), EXTREMES[name], strict=True):
        if row is not None:
            tensor[middle if tensor is not prior else (1, slice(None), *[0] * len(spatial))] = (
                torch.tensor(row, device=DEVICE)
            )
    results, expected = run(operators), run(posterior_reference)
    print(
        *(
            result[middle if result.ndim == logits.ndim else (1, *middle[2:])].tolist()
            for result in results
        ),
        sep="\n",
    )
    for result, value, before in zip(results, expected, clean, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-6, equal_nan=True)
        if EXTREMES[name][2] is None:  # a prior is the same at every location
            keep = torch.ones_like(result, dtype=torch.bool)
            keep[middle if result.ndim == logits.ndim else (1, *middle[2:])] = False
            assert_equal_bits([result[keep]], [before[keep]])


# Streaming


def state_of(batch, num_classes, spatial, reduction, per_location):
    shape = (batch, num_classes, *(spatial if per_location else ()))
    return torch.zeros(num_classes, dtype=torch.int64, device=DEVICE), reference.empty_state(
        shape, reduction, DEVICE
    )


def chunks_of_steps_and_classes(arguments, num_classes):
    """The chunk's steps and classes in pieces, in another order, some classes with fewer steps."""
    x, model_output, x_t, columns = arguments
    generator = torch.Generator().manual_seed(0)
    for steps in torch.randperm(model_output.shape[2], generator=generator).split([1, 4, 2, 4]):
        for classes in (
            torch.randperm(num_classes, generator=generator)
            .repeat_interleave(2)
            .split([6, 2, 2 * num_classes - 8])
        ):
            # Classes are not contiguous.
            classes, own_steps = (
                classes.to(DEVICE)[::2],
                steps.to(DEVICE),
            )
            yield (
                (
                    x,
                    model_output[:, classes][:, :, own_steps],
                    x_t[:, :, own_steps],
                    columns[:, own_steps],
                ),
                classes,
            )
    first = columns[:, :3]
    yield (x, model_output[:, :2, :3], x_t[:, :, :3], first), torch.tensor([1, 0], device=DEVICE)
    yield (
        (
            x,
            model_output[:, :, :3].transpose(1, 2).contiguous().transpose(1, 2),
            x_t[:, :, :3],
            first,
        ),
        None,
    )


@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_updates_in_any_order(dtype, reduction, per_location, interpreted):
    batch, channels, spatial = (1, 1, (2,)) if interpreted else (2, 3, (5,))
    arguments = chunk(batch, 7, 11, channels, 1, spatial, dtypes=(dtype, dtype, F32))
    states = [state_of(batch, 7, spatial, reduction, per_location) for _ in range(3)]
    for piece, classes in chunks_of_steps_and_classes(arguments, 7):
        others = sorted(set(range(7)) - set(range(7) if classes is None else classes.tolist()))
        untouched = states[0][1][:, :, others].clone()
        operators.score_update(*piece, classes, reduction, per_location, *states[0])
        reference.score_update(*piece, classes, reduction, per_location, *states[1])
        reference.score_update(*double(piece), classes, reduction, per_location, *states[2])
        assert_equal_bits([states[0][1][:, :, others]], [untouched])
    assert all(torch.equal(count, states[2][0]) for count, _ in states)
    for query in (
        reference.state_log_likelihood,
        reference.state_effective_components,
        reference.state_standard_error,
    ):
        # Sums of float32 likelihoods: as exact as those, so that the rule is float32's.
        assert_accurate(
            query.__name__,
            *(query(*state, reduction).float() for state in states[:2]),
            query(*states[2], reduction),
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_updates_lose_nothing_of_exact_likelihoods(reduction):
    x, model_output, x_t, columns = whole_numbers(37, 63, 700)
    count, state = state_of(1, 2, (), reduction, False)
    for steps in (slice(0, 1), slice(1, 30), slice(30, 37)):
        operators.score_update(
            x,
            model_output[:, :, steps],
            None,
            columns[:, steps],
            None,
            reduction,
            False,
            count,
            state,
        )
    likelihoods = -0.5 * model_output.double().square().sum(-1)  # [1, 2, S]
    expected = (
        likelihoods.logsumexp(-1) - math.log(37) if reduction == "mixture" else likelihoods.mean(-1)
    )
    torch.testing.assert_close(
        reference.state_log_likelihood(count, state, reduction), expected, rtol=1e-12, atol=2e-7
    )
    weights = (likelihoods - likelihoods.amax(-1, keepdim=True)).exp()
    squares = (
        weights.square().sum(-1)
        if reduction == "mixture"
        else likelihoods.var(-1, correction=0) * 37
    )
    # Float32 weights are good to 1e-7; differences of float64 numbers of 1e6 to 1e-10.
    torch.testing.assert_close(
        state[-1], squares, rtol=3e-7 if reduction == "mixture" else 1e-9, atol=0
    )
    if reduction == "mixture":
        torch.testing.assert_close(state[1], weights.sum(-1), rtol=3e-7, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_updates_with_gaps_infinities_and_nans(reduction):
    x, model_output, x_t, columns = chunk(2, 6, 8, 2, 0, (3,), x_t_axes=None)
    model_output[:, 0, ::2] += 1500.0
    model_output[:, 1, :6] = math.inf
    model_output[:, 2] = -math.inf
    model_output[1, 3, 2, 0, 1] = math.nan
    states = [state_of(2, 6, (), reduction, False) for _ in range(2)]
    for steps in (slice(0, 3), slice(3, 4), slice(4, 8)):
        piece = (x, model_output[:, :, steps], None, columns[:, steps])
        operators.score_update(*piece, None, reduction, False, *states[0])
        reference.score_update(*piece, None, reduction, False, *states[1])
    for query in (
        reference.state_log_likelihood,
        reference.state_effective_components,
        reference.state_standard_error,
    ):
        result, expected = (query(*state, reduction) for state in states)
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-6, equal_nan=True)
    nan = reference.state_log_likelihood(*states[0], reduction).isnan().nonzero().tolist()
    assert nan == ([[1, 3]] if reduction == "mixture" else nan) and [1, 3] in nan


def test_an_update_of_shared_centres_and_of_no_images():
    for batch in (0, 17):
        x, _, x_t, columns = chunk(batch, 4, 5, 3, 0, (7,), x_t_axes=None)
        centres = random(1, 4, 5, 3, 7, seed=4)
        states = [state_of(batch, 4, (), "mixture", False) for _ in range(3)]
        operators.score_update(x, centres, None, columns, None, "mixture", False, *states[0])
        reference.score_update(x, centres, None, columns, None, "mixture", False, *states[1])
        reference.score_update(
            *double((x, centres, None, columns)), None, "mixture", False, *states[2]
        )
        assert states[0][0].tolist() == [5] * 4
        queries = (reference.state_log_likelihood(*state, "mixture") for state in states)
        assert_accurate("likelihood", *(query.float() for query in queries))


# Reverse step

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
        *tables(STEPS, 1),
        *own,
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


def noise(shape, chain_ids, *, seed=-3, step=3, dtype=F32, layout=torch.Tensor.contiguous):
    """x_prev of a step that is nothing but noise."""
    zeros, ones = torch.zeros(STEPS, device=DEVICE), torch.ones(STEPS, device=DEVICE)
    sample = layout(torch.zeros(len(chain_ids), *shape, dtype=dtype, device=DEVICE))
    columns = [zeros] * 7 + [ones]
    return operators.reverse_step(
        sample, sample, *columns, step, seed, chain_ids.to(DEVICE), None, None
    )[0]


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (2, 63),
        (3, 1, 127),
        (2, 3, 1, 43),
        (5, 2, 2, 3, 5),
        (7, 4, 16, 16),
        (0, 2, 3),
        (1, 1, 1009),
    ],
)
@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_reverse_step(shape, step):
    assert_stepped(reverse_step_arguments(shape, extra=step % 2, step=step))
    x_prev, score = operators.reverse_step(
        *reverse_step_arguments(shape, extra=step % 2, step=step, scored=False)
    )
    assert score.shape == (0,)
    assert_equal_bits(
        [x_prev],
        [operators.reverse_step(*reverse_step_arguments(shape, extra=step % 2, step=step))[0]],
    )


@pytest.mark.parametrize(
    "dtypes", [(BF16,) * 3, (F16,) * 3, (F32, BF16, F16), (BF16, F32, F32), (F16, BF16, F32)]
)
def test_reverse_step_of_any_dtypes(dtypes):
    assert_stepped(reverse_step_arguments((3, 3, 5, 7), dtypes=dtypes, extra=1))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1, 1), (4, 1, 1), (3, 4, 5, 7), (5, 1)])
def test_reverse_step_with_scaled_std(shape, dtype):
    assert_stepped(
        reverse_step_arguments((3, 4, 5, 7), std_scale=random(*shape, seed=4).exp().to(dtype))
    )


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "steps first"])
def test_reverse_step_of_any_strides(layout, interpreted):
    """In logical order, and so the same numbers as of contiguous tensors; the score is summed in
    another order.
    """
    arguments = reverse_step_arguments(
        (3, 4, 5, 7), extra=1, std_scale=random(3, 4, 5, 7, seed=4).exp()
    )
    expected = operators.reverse_step(*arguments)[0]
    for changed in ((0, 1, 13, 14),) if interpreted else ((0,), (1,), (13,), (14,), (0, 1, 13, 14)):
        moved = [
            LAYOUTS[layout](value) if position in changed else value
            for position, value in enumerate(arguments)
        ]
        assert_stepped(moved)
        torch.testing.assert_close(
            operators.reverse_step(*moved)[0], expected, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_noise(seed, interpreted):
    channels = 255 if interpreted else 65535
    z = noise((channels, 4), CHAIN_IDS, seed=seed)
    exact = step_reference.chain_noise(seed, CHAIN_IDS.to(DEVICE), 3, (channels, 4))
    error = (z.double() - exact).abs().max().item()
    print(
        f"largest error of {z.numel()} draws {error:.1e}, largest draw {z.abs().max().item():.2f}"
    )
    assert error <= 1e-6


def test_noise_of_extreme_words():
    """Chains, found by a search of all 2^32, whose first four words lie where the logarithm or the
    quadrant changes its form.
    """
    for seed, chains in EXTREME_CHAINS.items():
        chain_ids = torch.tensor([chain for chain, _, _ in chains])
        zeros = torch.zeros_like(chain_ids)
        words = step_reference.philox_4x32_10((zeros, zeros, chain_ids, zeros), (seed, 0))
        for i, (_, position, word) in enumerate(chains):
            assert words[position][i] == word
        z, exact = (
            noise((4,), chain_ids, seed=seed, step=0).cpu(),
            step_reference.chain_noise(seed, chain_ids, 0, (4,)),
        )
        error = (z.double() - exact).abs().max().item()
        print(f"seed {seed}: largest error {error:.1e}, largest draw {z.abs().max().item():.3f}")
        assert error <= 1e-6


# seed -> chain id, position of a word, word; words 0 and 2 make a radius, 1 and 3 an angle
EXTREME_CHAINS = {
    0: [
        (748582185, 0, 0x00000000),  # the largest radius
        (84170650, 0, 0x00000001),
        (389732782, 2, 0xFFFFFFFF),  # the smallest
        (297716614, 0, 0x7FFFFFFF),
        (3643567110, 2, 0x80000000),
        (1783771166, 2, 0xB504F333),  # u next to the root of 1/2
        (3233056940, 2, 0xB504F334),
        (371492825, 1, 0x00000000),
        (2618200274, 1, 0xFFFFFFFF),
        (1156969299, 1, 0x1FFFFFFF),  # odd multiples of pi/4
        (2140324976, 1, 0x20000000),
        (557913854, 1, 0x3FFFFFFF),  # multiples of pi/2
        (4058211074, 1, 0x40000000),
        (415462752, 1, 0x7FFFFFFF),
        (2613920627, 1, 0x80000000),
        (1365366521, 3, 0xDFFFFFFF),
        (4155162198, 1, 0xE0000000),
    ],
    1: [
        (3797258575, 0, 0x00000000),
        (3546996192, 2, 0x00000000),
        (1205451635, 0, 0xFFFFFFFF),
        (12237067, 0, 0xFFFFFFFE),
        (1879925146, 1, 0x5FFFFFFF),
        (2205461996, 1, 0x60000000),
        (3539950633, 1, 0x9FFFFFFF),
        (1571622358, 1, 0xA0000000),
        (3968707122, 1, 0xBFFFFFFF),
        (2486802813, 1, 0xC0000000),
    ],
}


@pytest.mark.parametrize("shape", [(7,), (3, 5, 7), (4, 8, 8)])
def test_noise_is_that_of_the_chain(shape):
    """The same bits wherever a chain lies in the batch, in any layout and in every dtype, where it
    is rounded.
    """
    z = noise(shape, CHAIN_IDS)
    assert_equal_bits([noise(shape, CHAIN_IDS[[3, 0]])], [z[[3, 0]]])
    assert_equal_bits([noise(shape, CHAIN_IDS[2:3])], [z[2:3]])
    assert_equal_bits([noise(shape, CHAIN_IDS.repeat_interleave(3)[::3])], [z])
    for dtype in (BF16, F16):
        assert_equal_bits([noise(shape, CHAIN_IDS, dtype=dtype)], [z.to(dtype)])
    if len(shape) == 3:
        for layout in ("channels last", "batch innermost", "transposed", "cropped"):
            zeros = lambda sample, name=layout: LAYOUTS[name](sample)  # noqa: E731
            assert_equal_bits([noise(shape, CHAIN_IDS, layout=zeros)], [z])
    different = [
        noise(shape, CHAIN_IDS, seed=5),
        noise(shape, CHAIN_IDS, step=2),
        noise(shape, CHAIN_IDS, seed=-3 - 2**32),
        z.roll(1, 0),
    ]
    assert all((other != z).float().mean() > 0.99 for other in different)


def test_a_nan_stays_in_its_chain():
    arguments = reverse_step_arguments((3, 4, 5, 7), extra=1)
    clean = operators.reverse_step(*arguments)
    arguments[1][1, 2, 3, 3] = arguments[1][2, 4] = math.nan
    arguments[13][0, 0, 0, 0] = math.inf
    x_prev, score = operators.reverse_step(*arguments)
    assert x_prev.isnan().nonzero().tolist() == [[1, 2, 3, 3]]
    keep = ~x_prev.isnan()
    assert_equal_bits([x_prev[keep]], [clean[0][keep]])
    assert score[0] == -math.inf and score[1].isnan()
    assert_equal_bits([score[2]], [clean[1][2]])


# Every operator


def scoring_call(name, shared, reduction, per_location):
    """An operator that reads a chunk of several tiles, and its arguments."""
    if shared:
        x, _, x_t, columns = chunk(19, 5, 6, 4, 0, (16, 17), x_t_axes=None)
        arguments = x, random(1, 5, 6, 4, 16, 17, seed=4), x_t, columns, reduction, per_location
    else:
        arguments = (
            *chunk(3, 5, 6, 4, 1, (16, 17), x_t_axes=(None, None, None)),
            reduction,
            per_location,
        )
    if name == "log_likelihood_backward":
        outputs = operators.log_likelihood(*arguments)
        arguments = (
            random(*outputs[0].shape, seed=9),
            *outputs,
            *arguments,
            [True, True, not shared],
        )
    elif name == "score_update":
        classes = torch.tensor([6, 0, 3, 7, 2], device=DEVICE)
        arguments = (
            *arguments[:-2],
            classes,
            reduction,
            per_location,
            *state_of(len(arguments[0]), 8, (16, 17), reduction, per_location),
        )
    return getattr(operators, name), arguments


def bayes_call(name):
    logits, likelihood, grad = (
        random(5, 10, 129, seed=1),
        random(5, 10, 129, seed=2),
        random(5, 129, seed=3),
    )
    prior = prior_of("own", (5, 10, 129))
    arguments = {
        "posterior": (likelihood, prior, 2.0),
        "distillation_loss": (logits, likelihood, prior, 2.0),
        "distillation_loss_backward": (grad, logits, likelihood, prior, 2.0, [True, True]),
    }
    return getattr(operators, name), arguments[name]


def reverse_step_call():
    return operators.reverse_step, reverse_step_arguments(
        (5, 4, 33, 65), std_scale=random(5, 1, 1, 1, seed=4).exp()
    )


CALLS = {  # every operator: functions that return it and its arguments
    **{
        ", ".join(
            (
                name,
                f"{'shared' if shared else 'own'} centres",
                reduction,
                "locations" if per_location else "images",
            )
        ): functools.partial(scoring_call, name, shared, reduction, per_location)
        for name in ("log_likelihood", "log_likelihood_backward", "score_update")
        for shared, reduction, per_location in itertools.product(
            (False, True), REDUCTIONS, (False, True)
        )
    },
    **{
        name: functools.partial(bayes_call, name)
        for name in ("posterior", "distillation_loss", "distillation_loss_backward")
    },
    "reverse_step": reverse_step_call,
}


def outcome(name):
    """What a call returns, or what it leaves in the state that it changes."""
    operator, arguments = CALLS[name]()
    results = operator(*arguments)
    if results is None:
        return arguments[-2:]
    return (results,) if isinstance(results, torch.Tensor) else results


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_every_time_and_for_any_number_of_threads(name, backend, compiled):
    expected = outcome(name)
    previous = torch.get_num_threads()
    for threads in (1, 2, 3) if backend == "cpu" else (1,):
        torch.set_num_threads(threads)
        try:
            assert_equal_bits(outcome(name), expected)
        finally:
            torch.set_num_threads(previous)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name, compiled):
    expected = outcome(name)
    with torch.autocast(DEVICE.type, dtype=BF16):
        assert_equal_bits(outcome(name), expected)


@pytest.mark.parametrize("name", [name for name in CALLS if "locations" not in name])
def test_opcheck(name, compiled):
    operator, arguments = CALLS[name]()
    arguments = tuple(
        value.requires_grad_() if needs_gradient(name, value) else value for value in arguments
    )
    torch.library.opcheck(operator.default, arguments)


def needs_gradient(name, value):
    differentiable = name.startswith(("log_likelihood,", "posterior"))
    return (
        differentiable
        and isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.ndim > 1
    )


def test_the_whole_way_compiles_without_a_graph_break():
    x, model_output, x_t, columns = chunk(2, 3, 4, 2, 1, (5,))
    coefficients = gf.StepCoefficients(*columns)
    logits = random(2, 3, seed=5)

    def run(model_output, logits):
        likelihood = gf.log_likelihood(x, model_output, coefficients, x_t)
        return gf.distillation_loss(logits, likelihood, temperature=3.0), gf.posterior(likelihood)

    torch._dynamo.reset()
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.detach().requires_grad_() for tensor in (model_output, logits)]
        loss, posterior = function(*leaves)
        results.append([loss, posterior, *torch.autograd.grad(loss, leaves)])
    assert_equal_bits(
        [value.detach() for value in results[1]], [value.detach() for value in results[0]]
    )


def test_arguments_that_would_leave_memory_are_refused(backend):
    if backend == "triton":
        pytest.skip("its launchers are Python, behind the same checks of the public functions")
    x, model_output, x_t, columns = chunk(2, 3, 4, 2, 1, (5,))
    options = ("mixture", False)
    grad = torch.ones(2, 3, device=DEVICE)
    for arguments in (
        (x, model_output[:, :, :, :1], x_t, columns),
        (x, model_output[..., :4], x_t, columns),
        (x, model_output, x_t[:, :, :3], columns),
        (x, model_output, x_t, columns[:, :3]),
        (x, model_output, x_t, columns[:4]),
        (x, model_output, x_t, columns.t().contiguous().t()),
        (x, model_output, x_t, columns.double()),
        (x[:1], model_output, x_t, columns),
    ):
        with pytest.raises(RuntimeError):
            operators.log_likelihood(*arguments, *options)
        with pytest.raises(RuntimeError):
            operators.log_likelihood_backward(grad, grad, grad, *arguments, *options, list(ALL))
        with pytest.raises(RuntimeError):
            operators.score_update(*arguments, None, *options, *state_of(2, 3, (), *options))
    arguments = (x, model_output, x_t, columns)
    with pytest.raises(RuntimeError):
        operators.log_likelihood_backward(grad[:1], grad, grad, *arguments, *options, list(ALL))
    with pytest.raises(RuntimeError):
        operators.score_update(*arguments, None, *options, *state_of(2, 4, (), *options))
    with pytest.raises(RuntimeError):
        operators.score_update(*arguments, None, *options, *state_of(1, 3, (), *options))
    with pytest.raises(RuntimeError):
        operators.distillation_loss(grad, grad[:1], None, 1.0)
    with pytest.raises(RuntimeError):
        operators.posterior(grad, torch.zeros(1, 4, device=DEVICE), 1.0)
    arguments = reverse_step_arguments((3, 4, 5))
    for position, value in (
        (1, arguments[1][:, :3]),
        (10, STEPS),
        (10, -1),
        (12, arguments[12][:2]),
        (13, arguments[13][:2]),
    ):
        with pytest.raises(RuntimeError):
            operators.reverse_step(*arguments[:position], value, *arguments[position + 1 :])


# Memory


def peak_bytes(function):
    """Most memory that `function` holds beside what was there before it."""
    if HAS_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def resident(name):
        return 1024 * int(
            re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
        )

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be taken again
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux and glibc")
@pytest.mark.parametrize("case", ["bank", "forward", "backward", "update"])
def test_memory_does_not_hold_steps(case, compiled):
    """One more number for each image, class and step would be 6 MB (bank) or 3.2 MB, for each
    element far more.
    """
    if case == "bank":
        batch, classes, steps = 64, 10, 2400
        arguments = (
            random(batch, 64, seed=1),
            random(1, classes, steps, 64, seed=2),
            None,
            tables(steps, 64),
        )
    else:
        batch, classes, steps = 2, 400, 1000
        output = random(batch, classes, steps, 9, seed=2)
        arguments = (random(batch, 9, seed=1), output, None, tables(steps, 9))
    outputs = operators.log_likelihood(*arguments, "mixture", False)
    state = state_of(batch, classes, (), "mixture", False)

    def run():
        if case == "backward":
            operators.log_likelihood_backward(
                outputs[0], *outputs, *arguments, "mixture", False, [False, True, False]
            )
        elif case == "update":
            operators.score_update(*arguments, None, "mixture", False, *state)
        else:
            operators.log_likelihood(*arguments, "mixture", False)

    run()  # what a process allocates once
    extra = peak_bytes(run) - (output.nbytes if case == "backward" else 0)
    print(f"{extra} bytes beyond the gradient" if case == "backward" else f"{extra} bytes")
    assert extra <= 2 * batch * classes * 8 + 2**20


# What one call does to another


def test_many_rows_and_then_few(interpreted):
    for batch, classes, steps in ((3, 2, 5),) if interpreted else ((65, 2, 130), (1, 1, 3)):
        arguments = chunk(batch, classes, steps, 1)
        likelihood, _ = operators.log_likelihood(*arguments, "mixture", False)
        torch.testing.assert_close(
            likelihood,
            reference.log_likelihood(*arguments, "mixture", False)[0],
            rtol=1e-5,
            atol=1e-5,
        )


def test_no_locations():
    arguments = chunk(3, 2, 4, 2, 1, (0,))
    result = operators.log_likelihood(*arguments, "mixture", False)
    for actual in operators.log_likelihood_backward(
        torch.ones_like(result[0]), *result, *arguments, "mixture", False, [True] * 3
    ):
        assert actual.numel() == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_gradients(reduction):
    def penalty(dtype):
        x, model_output, x_t, columns = (value.to(dtype) for value in chunk(2, 3, 4, 2, 1, (3,)))
        x, model_output = x.requires_grad_(), model_output.requires_grad_()
        logits = torch.linspace(-1, 1, 6, dtype=dtype, device=DEVICE).view(2, 3).requires_grad_()
        coefficients = gf.StepCoefficients(*columns)
        with gf.use_backend("reference") if dtype == torch.float64 else contextlib.nullcontext():
            likelihood = gf.log_likelihood(x, model_output, coefficients, x_t, reduction=reduction)
            loss = gf.distillation_loss(logits, likelihood, temperature=10.0)
            first = torch.autograd.grad(loss, (x, model_output, logits), create_graph=True)
            return torch.autograd.grad(
                sum(gradient.square().sum() for gradient in first), (x, model_output, logits)
            )

    for result, exact in zip(penalty(F32), penalty(torch.float64), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-6)


def test_backward_is_that_of_forwards_backend():
    x, model_output, x_t, columns = chunk(2, 3, 4, 2, 1, (3,))
    x *= 300  # where float32 rounds a likelihood to hundredths
    coefficients = gf.StepCoefficients(*columns)
    gradients = []
    for inside in (True, False):
        leaf = x.clone().requires_grad_()
        with gf.use_backend("reference"):
            likelihood = gf.log_likelihood(leaf, model_output, coefficients, x_t)
            if inside:
                likelihood.sum().backward()
        if not inside:
            likelihood.sum().backward()
        gradients.append(leaf.grad)
    assert_equal_bits(gradients[:1], gradients[1:])


@pytest.mark.parametrize("classes", [3, 16])
def test_a_temperature_beyond_float32(classes):
    likelihood = random(2, classes, seed=1)
    torch.testing.assert_close(
        operators.posterior(likelihood, None, 1e39), torch.full_like(likelihood, -math.log(classes))
    )
    assert (
        operators.distillation_loss(torch.zeros_like(likelihood), likelihood, None, 1e39)
        .abs()
        .max()
        < 1e-6
    )
