"""ChainBank: its chains against diffusers' own steps, its likelihood against torch.distributions,
refresh and files bit by bit.
"""

import importlib
import json
import math
import os
import random
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import genrep_fast as gf
from genrep_fast import ChainBank, StepCoefficients
from genrep_fast.reference.reverse_step import INITIAL_ROW, chain_noise
from genrep_fast.scoring import chain_bank, chain_bank_file

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
@pytest.mark.parametrize("elements", [None, 1, 1000, 4000])
@pytest.mark.parametrize("batch", [1, 7, 63])
def test_likelihood_is_the_mixture_of_torch_distributions(monkeypatch, batch, elements, dtype):
    if elements:
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
    bank = ChainBank.build(
        lambda x, timesteps, labels: x * labels[:, None] / 20_000,
        ddpm(),
        20_000,
        (2,),
        num_inference_steps=2,
        chains=1,
        burn_in=0,
        thin=1,
        seed=0,
        batch_size=20_000,
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
        (torch.zeros(2, *SHAPE, dtype=torch.int64), TypeError, "floating-point"),
        (torch.zeros(2, *SHAPE, device="meta"), ValueError, "device"),
    ],
)
def test_wrong_images_raise(x, error, message):
    with pytest.raises(error, match=message):
        build().log_likelihood(x)


# Refresh and files


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


@pytest.mark.parametrize(
    "scheduler, options, channels",
    [
        (ddpm(), {}, 2),
        (ddpm(variance_type="learned_range"), {"variance": "fixed_large"}, 4),
        (ddim(), {"eta": 1.0, "sigma_floor": 0.1}, 2),
        (FlowMatchEulerDiscreteScheduler(), {"sigma_floor": 0.1}, 2),
    ],
    ids=["ddpm", "learned_range", "ddim", "flow"],
)
def test_a_loaded_bank_continues_bit_by_bit(tmp_path, scheduler, options, channels):
    bank = build(Denoiser(channels), scheduler, dtype=torch.bfloat16, center="sample", **options)
    bank.refresh(Denoiser(channels), chains=3)
    bank.save(tmp_path / "bank.safetensors")
    loaded = ChainBank.load(tmp_path / "bank.safetensors")
    assert loaded.settings == bank.settings and loaded.evaluations == bank.evaluations
    for _ in range(2):
        assert torch.equal(loaded.centers, bank.centers) and torch.equal(loaded.std, bank.std)
        assert torch.equal(loaded.log_likelihood(images(3)), bank.log_likelihood(images(3)))
        for each in (loaded, bank):
            each.refresh(Denoiser(channels), chains=2)
    assert [file.name for file in tmp_path.iterdir()] == ["bank.safetensors"]


def half_written(tensors, file, metadata):
    file.write_bytes(b"half")
    raise OSError("disk full")


def not_replaced(file, path):
    raise OSError("disk full")


@pytest.mark.parametrize(
    "module, name, failing",
    [(chain_bank_file, "save_file", half_written), (os, "replace", not_replaced)],
)
def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, module, name, failing):
    path = tmp_path / "bank.safetensors"
    bank = build()
    bank.save(path)
    before = path.read_bytes()
    bank.refresh(Denoiser())
    monkeypatch.setattr(module, name, failing)
    with pytest.raises(OSError, match="disk full"):
        bank.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["truncated", "empty", "another safetensors", "text"])
def test_a_file_that_is_no_bank_gets_one_clear_error(tmp_path, content):
    path = tmp_path / "bank.safetensors"
    build().save(path)
    if content == "another safetensors":
        save_file({"weight": torch.ones(3)}, path)
    else:
        path.write_bytes(
            {"truncated": path.read_bytes()[:-100], "empty": b"", "text": b"not a bank at all"}[
                content
            ]
        )
    with pytest.raises(ValueError, match="bank.safetensors is truncated or not a chain bank"):
        ChainBank.load(path)


FAMILIES = {
    "ddpm": (ddpm(), {}),
    "ddpm, trailing, fixed_large": (ddpm(timestep_spacing="trailing"), {}),
    "ddpm, linspace, clipped": (ddpm(timestep_spacing="linspace", clip_sample=True), {}),
    "ddpm, fixed_small, steps_offset": (
        ddpm(variance_type="fixed_small", steps_offset=1),
        {"sigma_floor": 0.1},
    ),
    "ddpm, zero terminal SNR": (
        ddpm(
            rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
        ),
        {},
    ),
    "learned_range scored large": (
        ddpm(variance_type="learned_range"),
        {"variance": "fixed_large"},
    ),
    "learned_range scored small": (
        ddpm(variance_type="learned_range"),
        {"variance": "fixed_small", "sigma_floor": 1},
    ),
    "learned_range, trailing": (
        ddpm(variance_type="learned_range", timestep_spacing="trailing"),
        {"variance": "fixed_large"},
    ),
    "ddim": (ddim(), {"eta": 0.5, "sigma_floor": 0.1}),
    "ddim, eta 0, no alpha one": (ddim(set_alpha_to_one=False), {"sigma_floor": 0.1}),
    "flow": (FlowMatchEulerDiscreteScheduler(shift=3.0), {"sigma_floor": 0.2}),
}


def parts(path):
    """The state and the tensors of a bank's file."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["chain_bank"]), tensors


def refused(path, message=""):
    """Loading ends with one line that names the file and holds `message`."""
    with pytest.raises(ValueError) as error:
        ChainBank.load(path)
    line = str(error.value)
    assert re.search(message, line), line
    assert (
        line.startswith(f"{path} is truncated or not a chain bank: ")
        and "\n" not in line
        and len(line) < 500 + len(str(path))
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """State and tensors of a bank that learns its variance, the kind with most to check."""
    path = tmp_path_factory.mktemp("saved") / "bank"
    scheduler, options = FAMILIES["learned_range scored small"]
    build(Denoiser(4), scheduler, dtype=torch.float32, **{**options, "sigma_floor": 0.1}).save(path)
    return parts(path)


@pytest.mark.parametrize("center", ["mean", "sample"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_bank_that_can_be_built_loads(tmp_path, family, dtype, center):
    scheduler, options = FAMILIES[family]
    for burn_in, thin in ((0, 1), (STEPS - 1, 1), (1, 10**30)):
        bank = build(
            Denoiser(4),
            scheduler,
            dtype=dtype,
            center=center,
            burn_in=burn_in,
            thin=thin,
            **{"sigma_floor": 0.1, **options},
        )
        bank.refresh(Denoiser(4), chains=3)
        bank.save(tmp_path / "bank")
        loaded = ChainBank.load(tmp_path / "bank")
        assert loaded.settings == bank.settings and loaded.evaluations == bank.evaluations
        assert torch.equal(loaded.centers, bank.centers) and torch.equal(loaded.std, bank.std)
        loaded.save(tmp_path / "again")
        state, tensors = parts(tmp_path / "bank")
        again_state, again_tensors = parts(tmp_path / "again")
        assert state == again_state
        assert all(
            torch.equal(tensors[name].view(torch.uint8), table.view(torch.uint8))
            for name, table in again_tensors.items()
        )


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_bank_with_a_chain_that_diverged_loads(tmp_path, value):
    bank = build(dtype=torch.float32)
    bank.centers[1, 2, 0, 0, 0] = value
    bank.save(tmp_path / "bank")
    scores = ChainBank.load(tmp_path / "bank").log_likelihood(images(3, torch.float32))
    assert (
        torch.equal(
            scores,
            bank.log_likelihood(images(3, torch.float32)),
        )
        or scores[:, 1].isnan().all()
    )
    assert scores[:, ::2].isfinite().all()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chains", 10**9, "centers must hold 1000000000 chains"),
        ("chains", 3, "centers must hold 3 chains of 4 kept steps a class"),
        ("chains", -2, "chains must be at least 1, got -2"),
        ("chains", 4.0, "chains must be an integer, got 4.0"),
        ("chains", True, "chains must be an integer, got True"),
        ("chains", None, "chains must be an integer, got None"),
        ("burn_in", -3, "burn_in must be at least 0"),
        ("burn_in", 1, "centers must hold"),
        ("burn_in", STEPS, "burn_in must be less than num_inference_steps, 10, got 10"),
        ("burn_in", 10**40, "burn_in must be less than"),
        ("thin", 0, "thin must be at least 1"),
        ("thin", 1, "centers must hold"),
        ("thin", [2], r"thin must be an integer, got \[2\]"),
        ("center", "evil", 'center must be "mean" or "sample", got \'evil\''),
        ("center", ["mean"], "center must be"),
        ("sigma_floor", -1.0, "sigma_floor must be 0 or a number above"),
        ("sigma_floor", 1e-9, "sigma_floor must be 0 or a number above"),
        ("sigma_floor", 5.0, "coefficients.inv_var must follow from score_std and sigma_floor"),
        ("sigma_floor", "0.1", "sigma_floor must be a number, got '0.1'"),
        ("sigma_floor", True, "sigma_floor must be a number, got True"),
        ("sigma_floor", None, "sigma_floor must be a number, got None"),
        ("sigma_floor", 10**400, "sigma_floor must be 0 or a number above"),
        ("sigma_floor", math.nan, "chain_bank must hold finite numbers, got NaN"),
        ("sigma_floor", math.inf, "chain_bank must hold finite numbers, got Infinity"),
        ("seed", "x", "seed must be an integer, got 'x'"),
        ("seed", -1, "seed must be at least 0"),
        ("seed", 2**64, "seed must be less than"),
        ("seed", 1.0, "seed must be an integer"),
        ("clip_range", -5.0, "clip_range must be finite and positive"),
        ("clip_range", 0, "clip_range must be finite and positive"),
        ("clip_range", False, "clip_range must be a number or None"),
        ("clip_range", "1", "clip_range must be a number or None"),
        ("temperature", 1.0, "settings must hold nothing but a bank's, got 'temperature'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, saved, field, value, message):
    state, tensors = saved
    state = {**state, "settings": {**state["settings"], field: value}}
    save_file(tensors, tmp_path / "bank", metadata={"chain_bank": json.dumps(state)})
    refused(tmp_path / "bank", message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drawn": 0}, "drawn must be at least the number of chains, 4, got 0"),
        ({"drawn": -1}, "drawn must be at least 0"),
        ({"drawn": 5}, "evaluations must be 150, of 5 chains"),
        ({"drawn": 2**40, "evaluations": 2**40 * 30}, "need more than"),
        ({"drawn": 4.0}, "drawn must be an integer"),
        ({"evaluations": 119}, "evaluations must be 120"),
        ({"evaluations": "120"}, "evaluations must be an integer"),
        ({"settings": None}, "settings must be a dictionary, got NoneType"),
        (
            {"settings": {}},
            "settings must hold chains, burn_in, thin, center, sigma_floor, seed, clip_range, "
            "got none",
        ),
        ({"version": 2}, "chain_bank must hold nothing but a bank's, got 'version'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path, saved, change, message):
    state, tensors = saved
    save_file(tensors, tmp_path / "bank", metadata={"chain_bank": json.dumps({**state, **change})})
    refused(tmp_path / "bank", message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "chain_bank must be JSON"),
        ("[]", "chain_bank must be a dictionary, got list"),
        ("null", "chain_bank must be a dictionary, got NoneType"),
        ("[" * 50_000, "must be JSON|recursion"),
        ("9" * 5000, "integer string conversion"),
        (" " * 10**6, "chain_bank must have at most 65536 characters of metadata, got 1000000"),
        ("\x00", "chain_bank must be JSON"),
        (None, "the metadata must hold chain_bank, got none"),
    ],
    ids=["cut", "list", "null", "deep", "long number", "huge", "control character", "none"],
)
def test_metadata_that_is_no_state_is_refused(tmp_path, saved, text, message):
    save_file(saved[1], tmp_path / "bank", metadata=None if text is None else {"chain_bank": text})
    refused(tmp_path / "bank", message)


def replaced(name, change):
    return lambda tensors: {**tensors, name: change(tensors[name])}


def without(name):
    return lambda tensors: {key: table for key, table in tensors.items() if key != name}


def with_value(row, value):
    def change(table):
        table = table.clone()
        table[row] = value
        return table

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("centers", torch.Tensor.int), "centers torch.int32 .*dtype must be float32"),
        (replaced("centers", lambda table: table.to(torch.float8_e4m3fn)), "dtype must be float32"),
        (replaced("centers", torch.Tensor.double), "coefficients.data must be torch.float64"),
        (
            replaced("centers", lambda table: table[:, :, 0, 0, 0].clone()),
            r"centers must be \[K, S, \*sample_shape\]",
        ),
        (replaced("centers", lambda table: table[:0]), "num_classes must be at least 1, got 0"),
        (
            replaced("centers", lambda table: table[:, :-1].clone()),
            "centers must hold 4 chains of 4 kept steps a class",
        ),
        (
            replaced("centers", lambda table: table[..., :0]),
            "sample_shape must hold positive integers",
        ),
        (
            replaced("centers", lambda table: torch.empty(3, 2**40, 0)),
            "sample_shape must hold positive integers",
        ),
        (replaced("timesteps", torch.Tensor.bool), "timesteps must be numbers"),
        (replaced("timesteps", lambda table: -table), "timesteps must be finite and not negative"),
        (replaced("timesteps", lambda table: table.flip(0)), "timesteps must not increase"),
        (
            replaced("timesteps", lambda table: table[:-1].clone()),
            "must be torch.float64 .9.|centers must hold",
        ),
        (replaced("timesteps", lambda table: table[:0]), "burn_in must be less than"),
        (replaced("timesteps", lambda table: table[:, None].clone()), "timesteps must be numbers"),
        (
            replaced("score_std", lambda table: table[:2].clone()),
            r"score_std must be torch.float64 \[10\]",
        ),
        (replaced("score_std", torch.Tensor.float), "score_std must be torch.float64"),
        (replaced("score_std", torch.Tensor.neg), "score_std must not be negative"),
        (replaced("score_std", with_value(3, math.nan)), "score_std must be finite, got nan"),
        (replaced("score_std", with_value(3, 0.5)), "std must be 0 or score_std"),
        (replaced("std", with_value(3, 0.5)), "std must be 0 or score_std"),
        (replaced("std", with_value(3, 0.0)), "coefficients.std must be the kernel's std"),
        (replaced("mean_noisy", with_value(0, math.inf)), "mean_noisy must be finite, got inf"),
        (replaced("coefficients.data", with_value(0, 2.0)), "coefficients.data must be 1"),
        (
            replaced("coefficients.mean_output", with_value(0, math.nan)),
            "coefficients.mean_output must be finite",
        ),
        (
            replaced("coefficients.std", with_value(3, 0.5)),
            "coefficients.std must be the kernel's std",
        ),
        (replaced("coefficients.inv_var", torch.Tensor.neg), "coefficients.inv_var must follow"),
        (
            replaced("coefficients.log_norm", with_value(3, 7.0)),
            "coefficients.log_norm must follow",
        ),
        (
            replaced("coefficients.std", torch.Tensor.double),
            "coefficients.std must be torch.float32",
        ),
        (
            replaced("log_variance_ratio", with_value(2, 50.0)),
            "log_variance_ratio must not be positive, got 50.0",
        ),
        (
            replaced("log_variance_ratio", with_value(2, math.nan)),
            "log_variance_ratio must be finite",
        ),
        (
            replaced("log_variance_ratio", lambda table: table[:3].clone()),
            "log_variance_ratio must be torch.float64",
        ),
        (without("log_variance_ratio"), "coefficients.std must be the kernel's std"),
        (without("mean_sample"), "tensors must hold mean_sample, got none"),
        (without("coefficients.std"), "tensors must hold coefficients.std, got none"),
        (
            lambda tensors: {**tensors, "payload": torch.ones(1)},
            "tensors must hold nothing but a bank's, got 'payload'",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, saved, change, message):
    state, tensors = saved
    save_file(change(tensors), tmp_path / "bank", metadata={"chain_bank": json.dumps(state)})
    refused(tmp_path / "bank", message)


VALUES = [
    0,
    1,
    -1,
    2,
    3,
    7,
    10,
    10**9,
    2**64,
    0.5,
    -0.5,
    1e-9,
    1e300,
    math.nan,
    math.inf,
    True,
    None,
    "",
    "mean",
    [],
    {},
    [1],
    {"a": 1},
]


def mutated_state(state, generator):
    state = {**state, "settings": dict(state["settings"])}
    fields = [
        *(("settings", name) for name in state["settings"]),
        (None, "drawn"),
        (None, "evaluations"),
        ("settings", "extra"),
    ]
    owner, name = generator.choice(fields)
    owner = state if owner is None else state[owner]
    if generator.random() < 0.1:
        owner.pop(name, None)
    else:
        owner[name] = generator.choice(VALUES)
    return state


def mutated_tensors(tensors, generator):
    name = generator.choice(list(tensors))
    table = tensors[name]
    flat = table.clone().flatten()
    place = generator.randrange(len(flat))
    kind = generator.choice(["value", "shape", "dtype", "gone", "swapped"])
    if kind == "gone":
        return without(name)(tensors)
    if kind == "swapped":
        return {**tensors, name: tensors[generator.choice(list(tensors))].clone()}
    if kind == "dtype":
        return {
            **tensors,
            name: table.to(
                generator.choice(
                    [torch.int64, torch.float16, torch.float32, torch.float64, torch.bool]
                )
            ),
        }
    if kind == "shape":
        shapes = [
            table[:-1],
            table[:0],
            torch.cat([table, table]),
            table[None],
            table[..., None],
            table.new_empty(0),
            table.flip(0),
        ]
        return {**tensors, name: generator.choice(shapes).clone()}
    values = [0, 1, -1, 1e30, 0.5] if table.dtype.is_floating_point else [0, 1, -1, 10**12]
    flat[place] = generator.choice(values + [math.nan, math.inf] * table.dtype.is_floating_point)
    return {**tensors, name: flat.reshape(table.shape)}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_loads_after_a_random_change_works(tmp_path, family):
    """Either one line of ValueError, or a bank that scores and refreshes."""
    scheduler, options = FAMILIES[family]
    generator, path, loaded_count = random.Random(family), tmp_path / "bank", 0
    build(Denoiser(4), scheduler, dtype=torch.float32, **options).save(path)
    state, tensors = parts(path)
    for _ in range(120):
        changed_state, changed_tensors = state, tensors
        for _ in range(generator.choice([1, 1, 2])):
            if generator.random() < 0.5:
                changed_state = mutated_state(changed_state, generator)
            else:
                changed_tensors = mutated_tensors(changed_tensors, generator)
        changed_tensors = {name: table.contiguous() for name, table in changed_tensors.items()}
        save_file(changed_tensors, path, metadata={"chain_bank": json.dumps(changed_state)})
        try:
            loaded = ChainBank.load(path)
        except ValueError:
            refused(path)
            continue
        loaded_count += 1
        shape = loaded.centers.shape[2:]
        assert loaded.log_likelihood(torch.zeros(2, *shape)).shape == (2, len(loaded.centers))
        loaded.refresh(lambda x, timesteps, labels: torch.cat([0.1 * x, x.tanh()], 1))
    print(f"{family}: {loaded_count} of 120 load")


@pytest.mark.parametrize("family", ["ddpm", "flow"])
def test_a_file_with_changed_bytes_is_refused_or_works(tmp_path, family):
    scheduler, options = FAMILIES[family]
    generator, path = random.Random(family), tmp_path / "bank"
    build(Denoiser(4), scheduler, dtype=torch.float32, **options).save(path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(200):
        changed = bytearray(content)
        for _ in range(generator.choice([1, 3])):
            changed[generator.randrange(header)] = generator.randrange(256)
        path.write_bytes(changed)
        try:
            loaded = ChainBank.load(path)
        except ValueError:
            refused(path)
            continue
        loaded.log_likelihood(torch.zeros(1, *loaded.centers.shape[2:]))
        loaded.refresh(lambda x, timesteps, labels: torch.cat([0.1 * x, x.tanh()], 1))


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", 3.5])
def test_a_device_that_is_not_there_is_refused(tmp_path, device):
    build().save(tmp_path / "bank")
    with pytest.raises(ValueError, match="device must"):
        ChainBank.load(tmp_path / "bank", device=device)


def test_a_folder_is_no_bank(tmp_path):
    refused(tmp_path)


def test_a_bank_whose_chain_ids_are_used_up_is_not_refreshed(tmp_path, saved):
    state, tensors = saved
    drawn = 2**32 // (CLASSES * CHAINS) * CHAINS
    state = {**state, "drawn": drawn, "evaluations": drawn * CLASSES * STEPS}
    save_file(tensors, tmp_path / "bank", metadata={"chain_bank": json.dumps(state)})
    bank = ChainBank.load(tmp_path / "bank")
    with pytest.raises(ValueError, match="chain ids: build a new bank"):
        bank.refresh(never)


def test_a_loaded_bank_is_mapped_into_memory_and_leaves_its_file_alone(tmp_path):
    path = tmp_path / "bank.safetensors"
    build().save(path)
    before, loaded = path.read_bytes(), ChainBank.load(path)
    assert "bank.safetensors" in Path("/proc/self/maps").read_text()
    loaded.refresh(Denoiser(), chains=CHAINS)
    assert path.read_bytes() == before and not torch.equal(
        loaded.centers, ChainBank.load(path).centers
    )


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        ChainBank.load(tmp_path / "bank.safetensors")


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
