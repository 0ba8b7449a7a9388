"""Streaming updates on every compiled backend, against the reference in float64."""

import math

import pytest
import torch

from genrep_fast.reference import scoring as reference
from kernel_cases import (
    BF16,
    DEVICE,
    F32,
    REDUCTIONS,
    assert_accurate,
    assert_equal_bits,
    chunk,
    double,
    operators,
    random,
    state_of,
    whole_numbers,
)

pytestmark = [
    pytest.mark.usefixtures("backend"),
    # Of the interpreter, at infinities.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


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
    if interpreted and dtype == BF16 and per_location == (reduction == "mixture"):
        pytest.skip("too slow in the interpreter")
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
