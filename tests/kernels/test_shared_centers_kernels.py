"""Likelihoods and gradients where a batch shares its centres, on every compiled backend."""

import math

import pytest
import torch

from genrep_fast.reference import scoring as reference
from kernel_cases import (
    ALL,
    BF16,
    F16,
    F32,
    LAYOUTS,
    REDUCTIONS,
    assert_equal_bits,
    assert_scored,
    chunk,
    operators,
    random,
    tables,
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


# The sizes from which tiles are worth while, and the seams of those of CUDA: of 16, 32 and 64
# images, and as many steps.
TILED = [
    (2, 8, 127),
    (2, 8, 128),
    (15, 9, 17),
    (16, 100, 33),
    (17, 8, 17),
    (31, 5, 16),
    (32, 100, 33),
    (33, 6, 15),
    (128, 2, 31),
]


@pytest.mark.parametrize(("batch", "classes", "steps"), TILED)
def test_shared_centres_of_tiles(batch, classes, steps, compiled):
    """Elements are no multiple of four, more than a tile holds at once, and fewer."""
    for channels, spatial, x_t_axes in ((3, (3, 7), None), (2, (2,), (1, 1, None))):
        x, model_output, x_t, columns = chunk(
            batch, classes, steps, channels, 0, spatial, x_t_axes=x_t_axes
        )
        centres = random(1, *model_output.shape[1:], seed=4)
        assert_scored((x, centres, x_t, columns), "mixture", False, ((True, True, False),))
        assert_scored((x, centres, x_t, columns), "mean", False, ())


@pytest.mark.parametrize("dtypes", [(F32,) * 3, (BF16,) * 3, (F32, F16, BF16)])
@pytest.mark.parametrize(
    ("sizes", "elements"),
    [
        ((19, 4, 40), 132),
        ((40, 3, 33), 132),
        ((40, 3, 33), 32),
        ((33, 100, 33), 36),
        ((33, 200, 33), 36),
        ((65, 100, 34), 4),
    ],
)
def test_tiles_of_wide_loads(sizes, elements, dtypes, compiled):
    x, model_output, x_t, columns = chunk(*sizes, elements, dtypes=dtypes, x_t_axes=(1, None, None))
    centres = random(1, *model_output.shape[1:], seed=4, dtype=dtypes[1])
    for noisy in (None, x_t):
        assert_scored((x, centres, noisy, columns), "mixture", False, ())


def test_images_of_a_tile_do_not_meet():
    """A NaN stays in its image, in its class and in its steps."""
    x, _, _, columns = chunk(40, 5, 20, 8)
    centres = random(1, 5, 20, 8, seed=4)
    clean = operators.log_likelihood(x, centres, None, columns, "mixture", False)[0]
    x[17, 3] = math.nan
    centres[0, 2, 7, 5] = math.inf
    marred = operators.log_likelihood(x, centres, None, columns, "mixture", False)[0]
    assert marred[17].isnan().all()
    rest = torch.arange(40) != 17
    assert_equal_bits([marred[rest][:, [0, 1, 3, 4]]], [clean[rest][:, [0, 1, 3, 4]]])
    assert marred[rest].isfinite().all()


@pytest.mark.parametrize("elements", [0, 8])
@pytest.mark.parametrize("sizes", [(0, 60, 40), (40, 0, 60), (40, 5, 20)])
def test_shared_centres_without_elements(sizes, elements, compiled):
    batch, classes, steps = sizes
    x, centres = random(batch, elements), random(1, classes, steps, elements, seed=4)
    arguments = (x, centres, None, tables(steps, max(elements, 1)))
    for reduction in REDUCTIONS:
        result = operators.log_likelihood(*arguments, reduction, False)[0]
        expected = reference.log_likelihood(*arguments, reduction, False)[0]
        torch.testing.assert_close(result, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("sizes", "blocks", "threads"),
    [
        # The sizes of benchmarks/bench_operators.py,
        ((64, 10, 100), 70, 128),
        ((64, 10, 600), 380, 128),
        # and of larger and of smaller tiles.
        ((64, 10, 1300), 210, 256),
        ((64, 10, 650), 210, 128),
        ((32, 10, 650), 210, 128),
        ((32, 10, 100), 70, 128),
        ((16, 10, 650), 210, 128),
        ((16, 10, 100), 70, 128),
    ],
)
def test_tiles_are_as_many_as_a_gpu_needs(sizes, blocks, threads, recorded_launches):
    batch, classes, steps = sizes
    arguments = random(batch, 4), random(1, classes, steps, 4), None, tables(steps, 4)
    with recorded_launches() as recorded:
        operators.log_likelihood(*arguments, "mixture", False)
    assert "shared_centers" in recorded[0].kernel
    assert (recorded[0].blocks, recorded[0].threads) == (blocks, threads)


def test_a_few_images_are_read_row_by_row(recorded_launches):
    arguments = random(8, 4), random(1, 10, 5, 4), None, tables(5, 4)
    with recorded_launches() as recorded:
        operators.log_likelihood(*arguments, "mixture", False)
    assert not any("shared_centers" in launch.kernel for launch in recorded)
