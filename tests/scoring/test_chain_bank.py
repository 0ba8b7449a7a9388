"""ChainBank: its chains against diffusers' own steps, its likelihood against torch.distributions,
refresh bit by bit.
"""

import copy
import importlib
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import genrep_fast as gf
from genrep_fast import ChainBank, StepCoefficients
from genrep_fast.reference.reverse_step import INITIAL_ROW, chain_noise
from genrep_fast.scoring import chain_bank

SHAPE, CLASSES, CHAINS, STEPS = (2, 3, 5), 3, 4, 10


class Denoiser:
    """Depends on every argument; as many channels as asked for; counts the samples it has seen."""

    def __init__(self, channels=2):
        self.channels, self.seen = channels, 0

    def __call__(self, x, timesteps, labels):
        self.seen += len(x)
        y, t = (values.to(x.dtype).reshape(-1, 1, 1, 1) for values in (labels, timesteps))
        output = torch.sin(x + y) + 0.2 * x * (1 + t / 1000)
        return torch.cat([output, torch.tanh(x - 0.3 * y)], 1)[:, : self.channels]


def ddpm(**config):
    scheduler = DDPMScheduler(**{"clip_sample": False, "variance_type": "fixed_large", **config})
    scheduler.alphas_cumprod, scheduler.one = (
        scheduler.alphas_cumprod.double(),
        scheduler.one.double(),
    )
    return scheduler


def ddim(**config):
    scheduler = DDIMScheduler(**{"clip_sample": False, **config})
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = (
        scheduler.alphas_cumprod.double(),
        scheduler.final_alpha_cumprod.double(),
    )
    return scheduler


def build(denoiser=None, scheduler=None, **changes):
    options = {
        "num_inference_steps": STEPS,
        "chains": CHAINS,
        "burn_in": 3,
        "thin": 2,
        "seed": 5,
        "dtype": torch.float64,
        **changes,
    }
    return ChainBank.build(denoiser or Denoiser(), scheduler or ddpm(), CLASSES, SHAPE, **options)


def diffusers_chain(monkeypatch, denoiser, scheduler, chain_ids, labels, center, eta, seed=5):
    """Centres [N, STEPS, *SHAPE] of chains run with the scheduler's own step, fed with the bank's
    noise.
    """
    drawn = torch.zeros(())
    module = importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: drawn)
    scheduler.set_timesteps(STEPS)
    options = {"eta": eta} if isinstance(scheduler, DDIMScheduler) else {}
    x_t, centers = chain_noise(seed, chain_ids, INITIAL_ROW, SHAPE), []
    for row, timestep in enumerate(scheduler.timesteps):
        output = denoiser(x_t, timestep.expand(len(x_t)), labels)
        if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            # The scheduler's step rounds to float32.
            step = scheduler.sigmas[row + 1].double() - scheduler.sigmas[row].double()
            centers.append(
                x_t - scheduler.sigmas[row].double() * output
                if center == "sample"
                else x_t + step * output
            )
            x_t = x_t + step * output
            continue
        drawn = torch.zeros(x_t.shape, dtype=torch.float64)
        own = output if scheduler.config.get("variance_type") == "learned_range" else output[:, :2]
        result = scheduler.step(own, timestep, x_t, **options)
        centers.append(result.pred_original_sample if center == "sample" else result.prev_sample)
        drawn = chain_noise(seed, chain_ids, row, SHAPE)
        x_t = scheduler.step(own, timestep, x_t, **options).prev_sample
    return torch.stack(centers, 1)


@pytest.mark.parametrize("center", ["mean", "sample"])
@pytest.mark.parametrize(
    "make, config, options, channels",
    [
        (ddpm, {}, {}, 2),
        (ddpm, {"prediction_type": "v_prediction"}, {}, 4),
        (ddpm, {"clip_sample": True, "clip_sample_range": 0.7}, {}, 2),
        (ddpm, {"variance_type": "learned_range"}, {"variance": "fixed_large"}, 4),
        (
            ddpm,
            {"variance_type": "learned_range"},
            {"variance": "fixed_small", "sigma_floor": 0.1},
            4,
        ),
        (ddim, {}, {"eta": 1.0, "sigma_floor": 0.1}, 2),
        (
            ddim,
            {"clip_sample": True, "prediction_type": "sample"},
            {"eta": 0.5, "sigma_floor": 0.1},
            4,
        ),
        (ddim, {"clip_sample": True}, {"sigma_floor": 0.2}, 2),
        (FlowMatchEulerDiscreteScheduler, {"shift": 2.0}, {"sigma_floor": 0.2}, 2),
    ],
)
def test_chains_are_the_schedulers_own(monkeypatch, make, config, options, channels, center):
    denoiser = Denoiser(channels)
    bank = build(denoiser, make(**config), center=center, **options)
    labels = torch.arange(CLASSES).repeat_interleave(CHAINS)
    chain_ids = torch.arange(CLASSES * CHAINS)  # class · chains + chain
    whole = diffusers_chain(
        monkeypatch, denoiser, make(**config), chain_ids, labels, center, options.get("eta", 0.0)
    )
    expected = whole[:, 3::2].reshape(CLASSES, CHAINS * 4, *SHAPE)
    torch.testing.assert_close(bank.centers, expected, rtol=1e-9, atol=1e-9)


def test_sizes_standard_deviations_and_evaluations():
    denoiser, scheduler = Denoiser(), ddpm()
    timesteps = scheduler.timesteps.clone()
    bank = build(denoiser, scheduler, sigma_floor=0.15)
    assert bank.centers.shape == (CLASSES, CHAINS * 4, *SHAPE)
    assert bank.evaluations == denoiser.seen == CLASSES * CHAINS * STEPS
    assert torch.equal(scheduler.timesteps, timesteps) and scheduler.num_inference_steps is None, (
        "the caller's scheduler was changed"
    )
    scheduler.set_timesteps(STEPS)
    kept = StepCoefficients.chain(
        scheduler, scheduler.timesteps[3::2], sigma_floor=0.15, dtype=torch.float64
    )
    torch.testing.assert_close(bank.std, kept.inv_var.rsqrt().repeat(CHAINS))


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_batch_size_does_not_change_a_bit(batch_size):
    assert torch.equal(build(batch_size=batch_size).centers, build().centers)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_centers_are_kept_in_the_chosen_dtype(dtype):
    seen = []

    def denoiser(x, timesteps, labels):
        seen.append(x.dtype)
        return Denoiser()(x, timesteps, labels).bfloat16()  # as under autocast

    bank = build(denoiser, dtype=dtype)
    assert bank.centers.dtype == (dtype or torch.float32) and set(seen) == {torch.float32}
    assert bank.log_likelihood(torch.zeros(2, *SHAPE)).dtype == torch.float32


# Likelihood


def mixture(bank, x):
    """log p(x|y) [B, K] of torch.distributions, float64."""
    centers, std = bank.centers.double().flatten(2), bank.std.double()  # [K, S, D], [S]
    components = torch.distributions.Independent(
        torch.distributions.Normal(centers, std[:, None]), 1
    )
    weights = torch.distributions.Categorical(torch.ones(centers.shape[:2], dtype=torch.float64))
    return torch.distributions.MixtureSameFamily(weights, components).log_prob(
        x.double().flatten(1)[:, None]
    )


def images(batch, dtype=torch.float64):
    return torch.randn(
        batch, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(batch)
    ).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("batch", "elements"),
    [(1, 2**21), (7, 2**21), (63, 2**21), (1, 1), (7, 1), (7, 1000), (7, 4000), (63, 4000)],
)
def test_likelihood_is_the_mixture_of_torch_distributions(monkeypatch, batch, elements, dtype):
    monkeypatch.setattr(chain_bank, "_REFERENCE_ELEMENTS", elements)
    bank, x = build(dtype=dtype), images(batch)
    torch.testing.assert_close(bank.log_likelihood(x), mixture(bank, x), rtol=1e-10, atol=0)


@pytest.mark.parametrize("backend", ["", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_residuals_that_are_written_out_are_few(monkeypatch, dtype, backend):
    """Only the reference writes them out: one image and one class at a time where more would be too
    many; kernels get all at once.
    """
    monkeypatch.setenv("GENREP_FAST_BACKEND", backend)  # empty: whatever is fastest
    monkeypatch.setattr(chain_bank, "_REFERENCE_ELEMENTS", 1000)
    parts, original = [], chain_bank.log_likelihood

    def record(x, centers, tables):
        parts.append(len(x) * centers.numel())
        return original(x, centers, tables)

    monkeypatch.setattr(chain_bank, "log_likelihood", record)
    bank = build(dtype=dtype)
    bank.log_likelihood(images(5, dtype))
    kernel = dtype == torch.float32 and not backend and gf.info()["backends"]["cpu"]["available"]
    class_elements = bank.centers[0].numel()  # 480
    assert parts == (
        [5 * CLASSES * class_elements] if kernel else [2 * class_elements, class_elements] * 5
    )


def test_no_images_have_no_likelihood():
    assert build().log_likelihood(images(0)).shape == (0, CLASSES)


class RecordedOutputs(TorchDispatchMode):
    """The dtype and the number of elements of every tensor that an operator makes anew."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        known = {
            value.untyped_storage().data_ptr()
            for value in tree_leaves((arguments, keywords))
            if isinstance(value, torch.Tensor)
        }
        outputs = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        self.made += [
            (value.dtype, value.numel())
            for value in outputs
            if value.untyped_storage().data_ptr() not in known
        ]
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_bank_is_read_as_it_is_kept(dtype):
    bank, x = build(dtype=dtype), images(3, torch.float32)
    with RecordedOutputs() as recorded:
        bank.log_likelihood(x)
    assert max(elements for _, elements in recorded.made) <= x.numel()


def test_a_denoiser_that_is_trained_leaves_no_graph_in_the_bank():
    network = torch.nn.Conv2d(2, 2, 3, padding=1, dtype=torch.float64)
    bank = build(lambda x, timesteps, labels: network(x))
    assert not bank.centers.requires_grad
    x = images(2).requires_grad_()
    for _ in range(2):
        copy.deepcopy(bank).log_likelihood(x).sum().backward()
        bank.log_likelihood(x).sum().backward()
    assert network.weight.grad is None and x.grad.isfinite().all()


def test_refreshing_one_chain_does_not_copy_the_bank():
    bank = build(dtype=torch.float32)
    with RecordedOutputs() as recorded:
        bank.refresh(Denoiser())
    assert (
        max(elements for dtype, elements in recorded.made if dtype == torch.float32)
        <= bank.centers.numel() // CHAINS
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_error_of_the_likelihood(dtype):
    bank = build(dtype=dtype)
    x = images(63, dtype)
    error = ((bank.log_likelihood(x) - mixture(bank, x)) / mixture(bank, x)).abs().max().item()
    print(f"{dtype}: worst relative error {error:.1e}, bound 2e-6")
    assert error < 2e-6


def test_likelihood_is_differentiable_in_the_images():
    bank = build()
    assert torch.autograd.gradcheck(bank.log_likelihood, images(2).requires_grad_())


def test_gradients_of_float32_images():
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x = images(7).to(dtype).requires_grad_()
        build(dtype=dtype).log_likelihood(x).sum().backward()
        gradients.append(x.grad.double())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("centers", "expected"),
    [
        ([0.0, 300.0, 400.0], [1, 0, 0]),  # gaps of 1e6 nats
        ([300.0, 400.0, 300.0], [1 / 2, 0, 1 / 2]),  # tied at -1e6 nats
        ([7.0, 7.0, 7.0], [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_one_hot_tied_and_uniform_posteriors(centers, expected, dtype):
    bank = build(dtype=dtype)
    bank.centers.copy_(
        torch.tensor(centers, dtype=dtype).reshape(CLASSES, 1, 1, 1, 1).expand_as(bank.centers)
    )
    likelihood = bank.log_likelihood(torch.zeros(1, *SHAPE, dtype=dtype))
    torch.testing.assert_close(likelihood, mixture(bank, torch.zeros(1, *SHAPE)).to(dtype))
    torch.testing.assert_close(
        gf.posterior(likelihood).exp(), torch.tensor([expected], dtype=dtype)
    )


def test_many_classes():
    count = 20_000
    options = {"num_inference_steps": 2, "chains": 1, "burn_in": 0, "thin": 1, "seed": 0}
    bank = ChainBank.build(
        lambda x, timesteps, labels: x * labels[:, None] / count,
        ddpm(),
        count,
        (2,),
        batch_size=count,
        **options,
    )
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        bank.log_likelihood(x).double(), mixture(bank, x), rtol=1e-5, atol=1e-5
    )


def test_a_nan_stays_in_its_class_and_image():
    bank, x = build(), images(3)
    clean = bank.log_likelihood(x)
    bank.centers[1, 2, 0, 0, 0] = math.nan
    x[2, 0, 0, 0] = math.nan
    scores = bank.log_likelihood(x)
    assert scores[:, 1].isnan().all() and scores[2].isnan().all()
    assert torch.equal(scores[:2, ::2], clean[:2, ::2])


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(2, 2, 3, 4), ValueError, r"x must be \[B, 2, 3, 5\]"),
        (torch.zeros(()), ValueError, "x must be"),
        (torch.zeros(2, *SHAPE, dtype=torch.int64), TypeError, "x must be float32"),
        (torch.zeros(2, *SHAPE, device="meta"), ValueError, "device"),
    ],
)
def test_wrong_images_raise(x, error, message):
    with pytest.raises(error, match=message):
        build().log_likelihood(x)


# Refresh


def changed_chains(before, after):
    """Which chains differ in every class; a chain differs in all classes or in none."""
    differs = (before != after).unflatten(1, (CHAINS, -1)).flatten(2).any(2)  # [K, chains]
    assert (differs == differs[:1]).all()
    return differs[0].nonzero().flatten().tolist()


def test_refresh_replaces_the_oldest_chains_in_turn_with_new_noise():
    bank = build(Denoiser())
    seen = [bank.centers.clone()]
    for chains, slots in [(1, [0]), (2, [1, 2]), (2, [0, 3]), (4, [0, 1, 2, 3])]:
        bank.refresh(Denoiser(), chains=chains)
        assert changed_chains(seen[-1], bank.centers) == slots
        seen.append(bank.centers.clone())
    assert bank.evaluations == CLASSES * (CHAINS + 9) * STEPS
    starts = torch.cat(seen).unflatten(1, (CHAINS, -1))[:, :, 0].flatten(0, 1).flatten(1)
    assert len(starts.unique(dim=0)) == CLASSES * (CHAINS + 9), "a chain was drawn twice"


def test_refresh_in_parts_is_refresh_at_once():
    one, other = build(), build()
    for _ in range(3):
        one.refresh(Denoiser())
    other.refresh(Denoiser(), chains=3, batch_size=2)
    assert torch.equal(one.centers, other.centers)


def test_a_failing_refresh_changes_nothing():
    bank = build()
    before = bank.centers.clone()

    def wrong_for_the_last_class(x, timesteps, labels):
        return x[:, :1] if labels[0] == CLASSES - 1 else x

    with pytest.raises(ValueError, match="denoiser must return"):
        bank.refresh(wrong_for_the_last_class, chains=2, batch_size=2)
    assert torch.equal(bank.centers, before)
    bank.refresh(Denoiser())
    assert changed_chains(before, bank.centers) == [0]


def never(*_):
    raise AssertionError("the network was called before the arguments were checked")


@pytest.mark.parametrize(
    "scheduler, changes, error, message",
    [
        (ddpm(), {"chains": 0}, ValueError, "chains must be at least 1"),
        (ddpm(), {"thin": 0}, ValueError, "thin must be at least 1"),
        (ddpm(), {"thin": 1.5}, TypeError, "thin must be an integer, got 1.5"),
        (ddpm(), {"chains": True}, TypeError, "chains must be an integer, got True"),
        (ddpm(), {"sigma_floor": "0.1"}, TypeError, "sigma_floor must be a number, got '0.1'"),
        (
            ddpm(clip_sample=True, clip_sample_range=-1.0),
            {},
            ValueError,
            "clip_range must be finite and positive, got -1.0",
        ),
        (ddpm(), {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        (ddpm(), {"burn_in": -1}, ValueError, "burn_in must be at least 0"),
        (ddpm(), {"burn_in": STEPS}, ValueError, "burn_in must be less than num_inference_steps"),
        (ddpm(), {"center": "x0"}, ValueError, "center must be"),
        (ddpm(), {"seed": -1}, ValueError, "seed must be at least 0"),
        (ddpm(), {"seed": 2**64}, ValueError, "seed must be less than"),
        (ddpm(), {"dtype": torch.int64}, TypeError, "dtype must be float32, bfloat16"),
        (
            ddpm(),
            {"dtype": torch.float8_e4m3fn},
            TypeError,
            "dtype must be float32, bfloat16.* got torch.float8",
        ),
        (ddpm(variance_type="fixed_small"), {}, ValueError, r"rows \[9\].*sigma_floor"),
        (ddpm(variance_type="learned_range"), {}, ValueError, "variance must be"),
        (ddpm(variance_type="learned"), {"variance": "fixed_large"}, ValueError, "variance_type"),
        (ddpm(thresholding=True), {}, ValueError, "set thresholding=False"),
        (ddim(), {}, ValueError, "sigma_floor"),
    ],
)
def test_bad_settings_raise_before_the_network_runs(scheduler, changes, error, message):
    with pytest.raises(error, match=message):
        build(never, scheduler, **changes)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chains": 0}, "chains must"),
        ({"chains": CHAINS + 1}, "chains must"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_refresh_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        build().refresh(never, **options)


def test_autocast_does_not_reach_the_likelihood():
    bank, x = build(dtype=torch.float32), images(7, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        scores = bank.log_likelihood(x)
    assert torch.equal(scores, bank.log_likelihood(x))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((), "sample_shape must be"),
        ((0, 3), "positive integers, got"),
        ((2.0,), "positive integers"),
    ],
)
def test_a_sample_needs_a_shape(shape, message):
    with pytest.raises(ValueError, match=message):
        ChainBank.build(never, ddpm(), 2, shape, num_inference_steps=STEPS, burn_in=3, seed=0)
