"""Likelihoods and their gradients on every compiled backend, against the reference in float64."""

import contextlib
import itertools
import math

import pytest
import torch

import genrep_fast as gf
from genrep_fast.reference import scoring as reference
from kernel_cases import (
    ALL,
    BF16,
    DEVICE,
    F16,
    F32,
    LAYOUTS,
    REDUCTIONS,
    WIDE,
    assert_equal_bits,
    assert_scored,
    chunk,
    operators,
    plain_tables,
    random,
    state_of,
    tables,
    whole_numbers,
)

pytestmark = [
    pytest.mark.usefixtures("backend"),
    # Of the interpreter, at infinities.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


def test_triton_reads_tables_of_any_strides():
    pytest.importorskip("triton")
    x, model_output, x_t, columns = chunk(2, 3, 2, 2, 0, (5,))
    results = []
    for strided in (columns, columns.t().contiguous().t()):
        with gf.use_backend("triton"):
            results.append(
                operators.log_likelihood(x, model_output, x_t, strided, "mixture", False)
            )
    assert_equal_bits(*results)


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


@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_likelihood(size, reduction, per_location, interpreted):
    if interpreted and (SIZES.index(size) + per_location) % 2 != REDUCTIONS.index(reduction):
        pytest.skip("too slow in the interpreter: half of the combinations stand for all")
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
def test_likelihood_of_any_dtypes(reduction, dtypes, size, interpreted):
    for per_location in (reduction == "mean",) if interpreted else (False, True):
        assert_scored(chunk(*size, dtypes=dtypes), reduction, per_location)


# Float32 images are copied, in another order, for 32 half-precision rows or more of each.
@pytest.mark.parametrize("steps", [31, 32])
@pytest.mark.parametrize("half", [BF16, F16])
def test_likelihood_of_few_and_many_half_precision_rows(half, steps, compiled):
    assert_scored(chunk(2, 1, steps, 2081, dtypes=(F32, half, half)), "mixture", False)


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
        # In the interpreter every layout meets one of them.
        own = list(LAYOUTS).index(first) % 2 == 0
        for per_location in (own,) if interpreted else (False, True):
            assert_scored((own_x, model_output, own_x_t, columns), "mixture", per_location)


@pytest.mark.parametrize(("extra", "dtypes"), WIDE)
@pytest.mark.parametrize("first", LAYOUTS)
def test_sizes_for_wide_loads_in_any_layout(first, extra, dtypes, compiled):
    """Where the sizes allow loads of 16 bytes, strides and places in memory may not."""
    for channels, second in ((4, "contiguous"), (8, "channels last")):
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


@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize("steps", [1, 9, 70])
@pytest.mark.parametrize("elements", [4, 16, 20, 64, 512, 1024, 8192, 8196, 12288])
def test_rows_of_whole_blocks(elements, steps, extra, compiled):
    assert_scored(
        chunk(2, 2, steps, elements, extra), "mixture", False, (ALL, (False, True, False))
    )


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F32, BF16), (F16, F16)])
def test_large_gradients_are_those_of_their_rows(dtypes):
    """A megabyte is written past the caches, in fewer pieces; a class alone is not."""
    x, outputs = random(1, 50024, dtype=dtypes[0]), random(1, 4, 3, 50024, dtype=dtypes[1])
    one = torch.ones(3, device=DEVICE)
    inv_var = torch.linspace(0.99, 1.01, 3, device=DEVICE) / (2 * 50024) ** 0.5
    coefficients = gf.StepCoefficients(one, 0 * one, -one, inv_var, 0 * one)

    def gradient(model_output):
        leaf = model_output.clone().requires_grad_()
        return torch.autograd.grad(gf.log_likelihood(x, leaf, coefficients).sum(), leaf)[0]

    expected = torch.cat([gradient(outputs[:, k : k + 1]) for k in range(4)], 1)
    # The second time the memory is not new any more.
    for _ in range(2):
        assert_equal_bits([gradient(outputs)], [expected])


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_expanded_outputs(axes, size, interpreted):
    x, model_output, x_t, columns = chunk(*size, x_t_axes=(None, None, None))
    for layout in (
        ("contiguous",) if interpreted else ("contiguous", "steps first", "channels last")
    ):
        expanded = [LAYOUTS[layout](tensor) for tensor in (model_output, x_t)]
        for axis in axes:
            expanded = [tensor.narrow(axis, 0, 1).expand_as(tensor) for tensor in expanded]
        for per_location in (axes[-1] == 1,) if interpreted else (False, True):
            assert_scored((x[:1].expand_as(x), *expanded, columns), "mixture", per_location)


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


@pytest.mark.parametrize("channels", [600, 2051, 9001])
def test_weights_of_wide_rows_add_up_to_one(channels, compiled):
    """Rows of several warps, and of several parts, whose sums have an order of their own."""
    model_output = random(2, 2, 5, channels, 2, seed=1) * 1e-2 + 1e2
    model_output[:, :, :, 0] = 1
    arguments = (
        torch.zeros(2, channels, 2, device=DEVICE),
        model_output,
        None,
        plain_tables(5),
    )
    outputs = operators.log_likelihood(*arguments, "mixture", False)
    gradient = operators.log_likelihood_backward(
        torch.ones_like(outputs[0]), *outputs, *arguments, "mixture", False, [False, True, False]
    )[1]
    assert (gradient[:, :, :, 0].double().sum(2) + 1).abs().max() <= 1e-6


@pytest.mark.parametrize("steps", [1, 7, 70])
@pytest.mark.parametrize("elements", [3, 100, 513, 4096, 9000])
def test_an_image_has_the_bits_that_it_has_alone(elements, steps, backend, compiled):
    """Which blocks share its rows depends on what else there is; the order of sums does not."""
    if backend != "cuda":
        pytest.skip("others cut into groups by how many images and classes there are")
    x, model_output, x_t, columns = chunk(5, 7, steps, elements)
    together = operators.log_likelihood(x, model_output, x_t, columns, "mixture", False)
    for b, k in ((0, 0), (2, 6), (4, 3)):
        alone = operators.log_likelihood(
            x[b : b + 1],
            model_output[b : b + 1, k : k + 1],
            x_t[b : b + 1],
            columns,
            "mixture",
            False,
        )
        assert_equal_bits(alone, [result[b : b + 1, k : k + 1] for result in together])


# Rows, elements of each, and how many blocks there are: as many as run at once on the three
# multiprocessors of the emulator, and none without a batch for each of its threads.
EXTREME_SHAPES = [
    ((1, 2, 1), 300_000, 9),
    ((64, 400, 1), 16, 9),
    ((1, 2000, 2), 4, 9),
    ((1, 40, 2), 4, 1),
    ((1, 2, 2), 16, 1),
    ((1, 1, 5), 4096, 5),
]


@pytest.mark.parametrize(("rows", "elements", "blocks"), EXTREME_SHAPES)
def test_launches_of_extreme_shapes(rows, elements, blocks, recorded_launches):
    x = random(rows[0], elements, seed=1)
    model_output = random(*rows, elements, seed=2)
    arguments = (x, model_output, None, tables(rows[2], elements))
    state = state_of(rows[0], rows[1], (), "mixture", False)
    with recorded_launches() as launches:
        likelihood = operators.log_likelihood(*arguments, "mixture", False)[0]
        operators.score_update(*arguments, None, "mixture", False, *state)
    # The count of steps has no launch of its own, nor have partial states.
    assert [launch.kernel.partition("<")[0] for launch in launches] == (
        ["log_likelihood_rows_kernel"] * 2
    )
    assert {(launch.blocks, launch.threads) for launch in launches} == {(blocks, 256)}
    expected = reference.log_likelihood(*arguments, "mixture", False)[0]
    torch.testing.assert_close(likelihood, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        reference.state_log_likelihood(*state, "mixture").float(), expected, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("channels", [4, 128])
def test_gradients_of_many_channels_at_a_location_share_its_factor(channels, recorded_launches):
    """Each channel's would read all channels otherwise."""
    arguments = chunk(2, 2, 3, channels, 0, (5,), x_t_axes=None)
    outputs = operators.log_likelihood(*arguments, "mixture", True)
    with recorded_launches() as launches:
        operators.log_likelihood_backward(
            torch.ones_like(outputs[0]), *outputs, *arguments, "mixture", True, [True, False, False]
        )
    kernels = [launch.kernel.partition("<")[0] for launch in launches]
    expected = ["log_likelihood_backward_locations_kernel"] if channels > 4 else []
    assert kernels[:-1] == expected


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
