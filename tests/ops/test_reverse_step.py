"""The reverse step: Philox against its published vectors, noise against its layout, step and score
against torch.distributions.
"""

import math

import numpy
import pytest
import torch
from diffusers import DDPMScheduler

from genrep_fast import StepCoefficients, reverse_step
from genrep_fast.reference.reverse_step import INITIAL_ROW, chain_noise, philox_4x32_10

SEED = 2**64 - 3  # negative in the schema's signed integer
PI_COUNTER, PI_KEY = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)


def scheduler(**config):
    made = DDPMScheduler(**{"clip_sample": False, "variance_type": "fixed_large", **config})
    made.set_timesteps(10)
    return made


def coefficients(dtype=torch.float32, **options):
    made = scheduler()
    return StepCoefficients.chain(made, made.timesteps, dtype=dtype, **options)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def case(shape=(3, 2, 5, 7), dtype=torch.float32, extra=0):
    """x_t, model_output with `extra` channels, x, chain ids."""
    batch, channels, *spatial = shape
    ids = torch.tensor([2**32 - 1, 0, 7, 12345, 2**31])[torch.arange(batch) % 5]
    return (
        draw(*shape, dtype=dtype),
        draw(batch, channels + extra, *spatial, seed=1, dtype=dtype),
        draw(*shape, seed=2, dtype=dtype),
        ids,
    )


def test_seeds_of_numpy_and_float64_tables_change_nothing():
    x_t, output, x, ids = case()
    for seed in (7, 2**63 + 1):
        expected = reverse_step(x_t, output, coefficients(), 3, seed=seed, chain_ids=ids, x=x)
        own = coefficients(torch.float64), 3
        given = reverse_step(x_t, output, *own, seed=numpy.uint64(seed), chain_ids=ids, x=x)
        torch.testing.assert_close(given, expected, rtol=0, atol=0)


# Noise


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI_COUNTER, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_meets_the_known_answers_of_random123(counter, key, expected):
    words = philox_4x32_10([torch.tensor([word]) for word in counter], key)
    assert tuple(word.item() for word in words) == expected


def philox_in_python(counter, key):
    """The ten rounds in Python integers, which never wrap."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize("shape", [(1,), (2, 3), (3, 5, 7), (129,)])
@pytest.mark.parametrize("seed, row", [(0, 0), (SEED, 5), (0x299F31D0A4093822, INITIAL_ROW)])
def test_noise_layout_element_by_element(seed, row, shape):
    ids = torch.tensor([0, 11, 2**32 - 1])
    ours = chain_noise(seed, ids, row, shape)
    assert ours.shape == (3, *shape) and ours.dtype == torch.float64
    for chain, flat in zip(ids.tolist(), ours.flatten(1).tolist(), strict=True):
        for element, value in enumerate(flat):
            words = philox_in_python((element // 4, 0, chain, row), (seed % 2**32, seed // 2**32))
            pair = words[2 * (element % 4 // 2) :][:2]
            uniform = [(word + 0.5) / 2**32 for word in pair]
            wave = math.sin if element % 2 else math.cos
            assert value == pytest.approx(
                math.sqrt(-2 * math.log(uniform[0])) * wave(2 * math.pi * uniform[1]),
                rel=1e-12,
                abs=1e-14,
            )


def test_noise_is_standard_normal_and_uncorrelated():
    z = chain_noise(3, torch.arange(64), 0, (1000,))
    values = z.flatten().sort().values
    distance = (
        (torch.distributions.Normal(0.0, 1.0).cdf(values) - torch.arange(len(values)) / len(values))
        .abs()
        .max()
    )
    assert distance < 1.95 / math.sqrt(len(values))  # Kolmogorov–Smirnov, level 0.1%
    others = [
        chain_noise(4, torch.arange(64), 0, (1000,)),
        chain_noise(3, torch.arange(64), 1, (1000,)),
        z.roll(1, 0),
        z.roll(1, 1),
    ]
    for other in others:
        assert (z * other).mean().abs() < 4 / math.sqrt(z.numel())


def test_noise_depends_on_the_chain_not_on_its_place():
    ids = torch.tensor([5, 9, 2, 100])
    whole = chain_noise(1, ids, 3, (2, 7))
    assert torch.equal(chain_noise(1, ids[[2, 0]], 3, (2, 7)), whole[[2, 0]])
    assert torch.equal(chain_noise(1, ids[:0], 3, (2, 7)), whole[:0])


# Step and score


@pytest.mark.parametrize("scaled", [None, (), (3, 1, 1, 1), (2, 5, 7)])
@pytest.mark.parametrize("center", ["mean", "sample"])
def test_step_and_score_are_diffusers_step_and_the_normal_density(center, scaled):
    x_t, output, x, ids = case(dtype=torch.float64, extra=2)
    made = scheduler()
    made.alphas_cumprod, made.one = made.alphas_cumprod.double(), made.one.double()
    tables = StepCoefficients.chain(made, made.timesteps, center=center, dtype=torch.float64)
    scale = None if scaled is None else draw(*scaled, seed=4, dtype=torch.float64).exp()
    for step, timestep in enumerate(made.timesteps[:-1]):
        x_prev, score = reverse_step(
            x_t, output, tables, step, seed=SEED, chain_ids=ids, x=x, std_scale=scale
        )
        own = made.step(output[:, :2], timestep, x_t, generator=torch.Generator().manual_seed(step))
        drawn = torch.randn(
            x_t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
        )
        mean = own.prev_sample - tables.std[step] * drawn
        std = tables.std[step] * (1 if scale is None else scale)
        torch.testing.assert_close(
            x_prev, mean + std * chain_noise(SEED, ids, step, (2, 5, 7)), rtol=1e-10, atol=1e-12
        )
        middle = own.pred_original_sample if center == "sample" else mean
        density = (
            torch.distributions.Normal(middle, std.expand_as(middle)).log_prob(x).sum((1, 2, 3))
        )
        torch.testing.assert_close(score, density, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 63), (3, 1, 127), (2, 3, 1, 43), (0, 2, 3), (2, 3, 0)]
)
def test_odd_shapes_and_no_elements(shape):
    x_t, output, x, ids = case(shape)
    x_prev, score = reverse_step(x_t, output, coefficients(), 3, seed=1, chain_ids=ids, x=x)
    assert x_prev.shape == shape and score.shape == shape[:1]
    assert x_prev.isfinite().all() and score.isfinite().all()


def test_strided_inputs_are_read_in_place():
    x_t, output, x, ids = case((4, 3, 5, 7))
    strided = [tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in (x_t, output, x)]
    strided_ids = ids.repeat_interleave(2)[::2]
    ours = reverse_step(
        strided[0], strided[1], coefficients(), 2, seed=1, chain_ids=strided_ids, x=strided[2]
    )
    for one, other in zip(
        ours, reverse_step(x_t, output, coefficients(), 2, seed=1, chain_ids=ids, x=x), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype):
    x_t, output, x, ids = (
        tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in case((3, 2, 9, 7))
    )
    x_prev, score = reverse_step(x_t, output, coefficients(), 4, seed=1, chain_ids=ids, x=x)
    exact = reverse_step(
        x_t.double(),
        output.double(),
        coefficients(torch.float64),
        4,
        seed=1,
        chain_ids=ids,
        x=x.double(),
    )
    assert x_prev.dtype == dtype and score.dtype == torch.float32
    error = ((x_prev.double() - exact[0]).abs() / exact[0].abs().clamp(min=1)).max().item()
    # One rounding of the result, and float32's of its three terms.
    bound = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    print(f"{dtype}: worst relative error of the step {error:.1e}, bound {bound:.1e}")
    assert error <= bound
    torch.testing.assert_close(score.double(), exact[1], rtol=2e-6, atol=0)


def test_a_nan_stays_in_its_chain():
    x_t, output, x, ids = case()
    clean = reverse_step(x_t, output, coefficients(), 2, seed=1, chain_ids=ids, x=x)
    output[1, 0, 2, 3] = math.nan
    x_prev, score = reverse_step(x_t, output, coefficients(), 2, seed=1, chain_ids=ids, x=x)
    assert score.isnan().tolist() == [False, True, False] and x_prev.isnan().sum() == 1
    assert torch.equal(x_prev[[0, 2]], clean[0][[0, 2]]) and torch.equal(
        score[[0, 2]], clean[1][[0, 2]]
    )


def test_the_last_row_moves_but_is_not_scored():
    made = scheduler(variance_type="fixed_small")
    tables = StepCoefficients.chain(made, made.timesteps)
    x_t, output, x, ids = case()
    x_prev, score = reverse_step(x_t, output, tables, 9, seed=1, chain_ids=ids)
    assert score is None
    torch.testing.assert_close(x_prev, made.step(output, made.timesteps[9], x_t).prev_sample)
    with pytest.raises(ValueError, match=r"rows \[9\].*sigma_floor"):
        reverse_step(x_t, output, tables, 9, seed=1, chain_ids=ids, x=x)
    assert reverse_step(x_t, output, tables, 8, seed=1, chain_ids=ids, x=x)[1].isfinite().all()


# Operator


@pytest.mark.parametrize("scored", [False, True])
def test_opcheck(scored):
    x_t, output, x, ids = case(extra=1)
    optional = (x, torch.ones(1)) if scored else (None, None)
    arguments = (x_t, output, coefficients().tables, 3, -5, ids, *optional)
    torch.library.opcheck(torch.ops.genrep_fast.reverse_step.default, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole_for_every_step_and_seed(backend):
    x_t, output, x, ids = case()
    tables = coefficients()

    def run(x_t, chain_ids, step, seed):
        return reverse_step(x_t, 2 * output, tables, step, seed=seed, chain_ids=chain_ids, x=x)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for step, seed in [(0, 0), (1, 1), (2, 2**63 + 1), (7, 2**64 - 1)]:
        for ours, expected in zip(
            compiled(x_t, ids, step, seed), run(x_t, ids, step, seed), strict=True
        ):
            torch.testing.assert_close(ours, expected)


def test_no_gradient_flows():
    x_t, output, x, ids = case()
    x_prev, score = reverse_step(
        x_t.requires_grad_(), output.requires_grad_(), coefficients(), 3, seed=1, chain_ids=ids, x=x
    )
    assert not x_prev.requires_grad and not score.requires_grad


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x_t": torch.ones(3)}, ValueError, r"x_t must be \[B, C"),
        ({"x_t": torch.ones(3, 2, 5, 7, dtype=torch.int64)}, TypeError, "x_t must be float32"),
        ({"model_output": torch.ones(3, 1, 5, 7)}, ValueError, "model_output must have at least"),
        ({"model_output": torch.ones(3, 2, 5, 6)}, ValueError, "model_output must be"),
        (
            {"model_output": torch.ones(3, 2, 5, 7, dtype=torch.float64)},
            TypeError,
            "model_output must be float64 if and only if x_t is",
        ),
        (
            {"model_output": torch.ones(3, 2, 5, 7, device="meta")},
            ValueError,
            "model_output must be on",
        ),
        ({"coefficients": None}, TypeError, "coefficients must be StepCoefficients"),
        (
            {"coefficients": StepCoefficients.elbo(DDPMScheduler(), [5])},
            ValueError,
            "StepCoefficients.chain",
        ),
        ({"step": 10}, ValueError, r"step must lie in \[0, 10\)"),
        ({"step": -1}, ValueError, "step must lie"),
        ({"step": torch.tensor(1)}, TypeError, "step must be an integer"),
        ({"seed": -1}, ValueError, "seed must lie"),
        ({"seed": 2**64}, ValueError, "seed must lie"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        ({"chain_ids": [0, 1, 2]}, TypeError, "chain_ids must be a tensor, got list"),
        (
            {"chain_ids": torch.tensor([0, 1, 2], dtype=torch.int32)},
            TypeError,
            "chain_ids must be an int64",
        ),
        ({"chain_ids": torch.tensor([0, 1])}, ValueError, r"chain_ids must be \[3\]"),
        ({"chain_ids": torch.tensor([0, 1, 2**32])}, ValueError, r"chain_ids must lie in \[0"),
        ({"chain_ids": torch.tensor([0, -1, 2])}, ValueError, r"chain_ids must lie in \[0"),
        ({"x": torch.ones(3, 1, 5, 7)}, ValueError, "x must have x_t's shape"),
        ({"std_scale": torch.ones(2, 1, 1, 1)}, ValueError, "std_scale must broadcast"),
        ({"std_scale": torch.ones(1, 3, 2, 5, 7)}, ValueError, "std_scale must broadcast"),
        ({"std_scale": 2.0}, TypeError, "std_scale must be a tensor"),
        (
            {"std_scale": torch.tensor([1.0, 0.0, 2.0])[:, None, None, None]},
            ValueError,
            "std_scale must be positive",
        ),
        ({"std_scale": torch.tensor(math.nan)}, ValueError, "std_scale must be positive"),
    ],
)
def test_bad_input_raises_one_clear_error(change, error, message):
    x_t, output, x, ids = case()
    given = {
        "x_t": x_t,
        "model_output": output,
        "coefficients": coefficients(),
        "step": 3,
        "seed": 1,
        "chain_ids": ids,
        "x": x,
        **change,
    }
    with pytest.raises(error, match=message):
        reverse_step(
            given.pop("x_t"),
            given.pop("model_output"),
            given.pop("coefficients"),
            given.pop("step"),
            **given,
        )
