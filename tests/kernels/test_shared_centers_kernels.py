"""Likelihoods and gradients where a batch shares its centres, on every compiled backend."""

import pytest

from kernel_cases import (
    ALL,
    LAYOUTS,
    assert_scored,
    chunk,
    random,
)

pytestmark = [
    pytest.mark.usefixtures("backend"),
    # Of the interpreter, at infinities.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


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
