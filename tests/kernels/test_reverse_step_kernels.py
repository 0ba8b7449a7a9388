"""The reverse step and its noise on every compiled backend, against the reference."""

import math

import pytest
import torch

from genrep_fast.reference import reverse_step as step_reference
from kernel_cases import (
    BF16,
    CHAIN_IDS,
    DEVICE,
    F16,
    F32,
    LAYOUTS,
    SEEDS,
    STEPS,
    WIDE,
    assert_equal_bits,
    assert_stepped,
    operators,
    random,
    reverse_step_arguments,
)

pytestmark = [
    pytest.mark.usefixtures("backend"),
    # Of the interpreter, at infinities.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


def noise(shape, chain_ids, *, seed=-3, step=3, dtype=F32, layout=torch.Tensor.contiguous):
    """x_prev of a step that is nothing but noise."""
    rows = torch.zeros(8, STEPS, device=DEVICE)
    rows[-1] = 1
    sample = layout(torch.zeros(len(chain_ids), *shape, dtype=dtype, device=DEVICE))
    return operators.reverse_step(
        sample, sample, rows, step, seed, chain_ids.to(DEVICE), None, None
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
def test_reverse_step(shape, step, interpreted):
    if interpreted and (len(shape) + shape[0] + step) % 2:
        pytest.skip("too slow in the interpreter: every shape has one of the steps")
    assert_stepped(reverse_step_arguments(shape, extra=step % 2, step=step))
    x_prev, score = operators.reverse_step(
        *reverse_step_arguments(shape, extra=step % 2, step=step, scored=False)
    )
    assert score.shape == (0,)
    assert_equal_bits(
        [x_prev],
        [operators.reverse_step(*reverse_step_arguments(shape, extra=step % 2, step=step))[0]],
    )


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        # Chains that share a block of CUDA's, the last of which is not full,
        (33, 1, 4),
        (70, 2, 3),
        (9, 4, 31),
        # those of a block of their own,
        (2, 257),
        (2, 4, 16, 15),
        (1, 16381),
        (2, 4, 64, 64),
        # and those of several.
        (1, 16385),
        (2, 4, 4097),
        (1, 2, 3, 7001),
    ],
)
def test_reverse_step_of_short_and_long_chains(shape, scaled, compiled):
    scale = random(*shape, seed=4).exp() if scaled else None
    for dtypes in ((F32,) * 3, (F16, BF16, F16), (BF16, BF16, BF16)):
        assert_stepped(reverse_step_arguments(shape, dtypes=dtypes, std_scale=scale))


@pytest.mark.parametrize("scale_dtype", [BF16, F16, F32])
@pytest.mark.parametrize("dtypes", [(F32, BF16, F32), (F32, F16, F32), (BF16,) * 3, (F16,) * 3])
def test_reverse_step_of_wide_loads_with_scaled_std(dtypes, scale_dtype, compiled):
    scale = random(3, 4, 8, 12, seed=4).exp().to(scale_dtype)
    for own in (scale, scale[:, :1], scale[:, :, :, 1:2], scale[:1, :1, :1, :1]):
        assert_stepped(reverse_step_arguments((3, 4, 8, 12), dtypes=dtypes, extra=4, std_scale=own))


@pytest.mark.parametrize(
    ("shape", "blocks", "threads"),
    [
        ((8, 4), 1, 32),
        ((513, 64), 17, 256),
        ((3, 3, 32, 32), 3, 192),
        ((3, 4, 64, 64), 3, 512),
        ((2, 16385), 10, 256),
    ],
)
def test_chains_are_cut_by_their_size(shape, blocks, threads, recorded_launches):
    arguments = reverse_step_arguments(shape)
    with recorded_launches() as recorded:
        operators.reverse_step(*arguments)
    assert (recorded[0].blocks, recorded[0].threads) == (blocks, threads)
    assert [launch.blocks for launch in recorded[1:]] == ([] if blocks != 10 else [2])


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
    for changed in ((0, 1, 6, 7),) if interpreted else ((0,), (1,), (6,), (7,), (0, 1, 6, 7)):
        moved = [
            LAYOUTS[layout](value) if position in changed else value
            for position, value in enumerate(arguments)
        ]
        assert_stepped(moved)
        torch.testing.assert_close(
            operators.reverse_step(*moved)[0], expected, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize(("extra", "dtypes"), WIDE)
@pytest.mark.parametrize("first", LAYOUTS)
def test_reverse_step_of_sizes_for_wide_loads(first, extra, dtypes, compiled):
    scale = random(3, 8, 4, 8, seed=4).exp()
    arguments = list(
        reverse_step_arguments((3, 8, 4, 8), dtypes=dtypes, extra=extra, std_scale=scale)
    )
    for position in (0, 1, 6, 7):
        arguments[position] = LAYOUTS[first](arguments[position])
    assert_stepped(arguments)


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
def test_noise_is_that_of_the_chain(shape, interpreted):
    """The same bits wherever a chain lies in the batch, in any layout and in every dtype, where it
    is rounded.
    """
    if interpreted and shape == (4, 8, 8):
        pytest.skip("too slow in the interpreter")
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
    arguments[6][0, 0, 0, 0] = math.inf
    x_prev, score = operators.reverse_step(*arguments)
    assert x_prev.isnan().nonzero().tolist() == [[1, 2, 3, 3]]
    keep = ~x_prev.isnan()
    assert_equal_bits([x_prev[keep]], [clean[0][keep]])
    assert score[0] == -math.inf and score[1].isnan()
    assert_equal_bits([score[2]], [clean[1][2]])
