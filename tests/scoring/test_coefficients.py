"""StepCoefficients against diffusers' own `step`, `add_noise` and `get_velocity`, and every pitfall
of reading a scheduler.
"""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from genrep_fast import StepCoefficients, log_likelihood
from genrep_fast.coefficients.transitions import learned_std_scale, normal_tables

SHAPE = (2, 3, 5, 7)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
BOUND = (
    1.2e-5  # relative error against schedulers that compute in float32; the worst seen is printed
)
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STABLE_DIFFUSION = {**SCALED_LINEAR, "set_alpha_to_one": False, "steps_offset": 1}


def ddpm(**config):
    return DDPMScheduler(**{"clip_sample": False, **config})


def ddim(**config):
    return DDIMScheduler(**{"clip_sample": False, **config})


def in_float64(scheduler):
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    else:
        scheduler.one = scheduler.one.double()
    return scheduler


def draw(*shape, dtype=torch.float32):
    return torch.randn(
        *shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape) + sum(shape))
    )


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def apply(coefficients, row, x_t, output, noise):
    return (
        coefficients.mean_noisy[row] * x_t
        + coefficients.mean_output[row] * output
        + coefficients.std[row] * noise
    )


def check_steps(scheduler, coefficients, bound, record, **options):
    """Compare every row with the scheduler's own step, mean and noise apart."""
    dtype = coefficients.data.dtype
    x_t, output = draw(*SHAPE, dtype=dtype), 0.5 * draw(*SHAPE, dtype=dtype).flip(0)
    worst = 0.0
    for row, timestep in enumerate(scheduler.timesteps):
        theirs = scheduler.step(
            output, timestep, x_t, generator=torch.Generator().manual_seed(row), **options
        ).prev_sample
        noise = torch.randn(SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(row))
        worst = max(worst, relative_error(apply(coefficients, row, x_t, output, noise), theirs))
    record("relative_error", worst)
    print(f"worst relative error {worst:.2e}, bound {bound:.1e}")
    assert worst <= bound


@pytest.mark.parametrize("precision, bound, steps", [("float32", BOUND, 50), ("float64", 1e-12, 7)])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "fixed_small_log"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_chain_is_the_schedulers_step(
    prediction, variance, precision, bound, steps, record_property
):
    scheduler = ddpm(prediction_type=prediction, variance_type=variance)
    if precision == "float64":
        in_float64(scheduler)
    scheduler.set_timesteps(steps)
    coefficients = StepCoefficients.chain(
        scheduler, scheduler.timesteps, dtype=getattr(torch, precision)
    )
    check_steps(scheduler, coefficients, bound, record_property)


@pytest.mark.parametrize(
    "precision, bound, config",
    [("float32", BOUND, {}), ("float32", BOUND, STABLE_DIFFUSION), ("float64", 1e-12, {})],
    ids=["float32", "stable-diffusion", "float64"],
)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_chain_is_the_schedulers_step(
    prediction, eta, precision, bound, config, record_property
):
    scheduler = ddim(prediction_type=prediction, **config)
    if precision == "float64":
        in_float64(scheduler)
    scheduler.set_timesteps(50)
    coefficients = StepCoefficients.chain(
        scheduler, scheduler.timesteps, eta=eta, dtype=getattr(torch, precision)
    )
    check_steps(scheduler, coefficients, bound, record_property, eta=eta)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_chain_is_the_schedulers_step(shift, record_property):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(13)
    check_steps(
        scheduler, StepCoefficients.chain(scheduler, scheduler.timesteps), BOUND, record_property
    )


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_full_ddpm_chain_takes_the_neighbouring_timestep(variance, record_property):
    # In float64: between neighbours the scheduler's own float32 1 − ᾱ/ᾱ′ loses more than the bound
    # (3e-5 of a step).
    scheduler = in_float64(ddpm(num_train_timesteps=63, variance_type=variance))
    coefficients = StepCoefficients.chain(scheduler, scheduler.timesteps, dtype=torch.float64)
    check_steps(scheduler, coefficients, 1e-12, record_property)


@pytest.mark.parametrize(
    "scheduler",
    [ddpm(variance_type="fixed_large"), ddpm(), ddim()],
    ids=["fixed_large", "fixed_small", "ddim"],
)
def test_std_alone_is_the_schedulers_noise_response(scheduler):
    in_float64(scheduler).set_timesteps(20)
    options = {"eta": 0.7} if isinstance(scheduler, DDIMScheduler) else {}
    coefficients = StepCoefficients.chain(
        scheduler, scheduler.timesteps, dtype=torch.float64, **options
    )
    zero = torch.zeros(1, 1, 4, dtype=torch.float64)
    for row, timestep in enumerate(scheduler.timesteps):
        response = scheduler.step(
            zero, timestep, zero, generator=torch.Generator().manual_seed(0), **options
        ).prev_sample
        noise = torch.randn(
            zero.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        torch.testing.assert_close(coefficients.std[row] * noise, response, rtol=1e-10, atol=1e-12)


def test_the_last_step_adds_no_noise_but_fixed_large_scores_it():
    scheduler = ddpm(variance_type="fixed_large", timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    coefficients = StepCoefficients.chain(scheduler, scheduler.timesteps)
    assert coefficients.std[-1] == 0 and (coefficients.std[:-1] > 0).all()
    last = (1 - scheduler.alphas_cumprod[scheduler.timesteps[-1]]).item()
    assert coefficients.inv_var[-1].item() == pytest.approx(1 / last, rel=1e-5)
    assert coefficients.unscorable == ()


@pytest.mark.parametrize("center", ["mean", "sample"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_chain_scores_the_normal_density_around_its_center(prediction, center):
    scheduler = in_float64(ddpm(prediction_type=prediction))
    scheduler.set_timesteps(11)
    coefficients = StepCoefficients.chain(
        scheduler, scheduler.timesteps[:-1], center=center, dtype=torch.float64
    )
    x, x_t, output = (draw(1, 2, size, dtype=torch.float64)[..., :4] for size in (4, 5, 6))
    for row, timestep in enumerate(scheduler.timesteps[:-1]):
        step = scheduler.step(output, timestep, x_t, generator=torch.Generator().manual_seed(3))
        noise = torch.randn(
            x_t.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        )
        expected = (
            step.pred_original_sample
            if center == "sample"
            else step.prev_sample - coefficients.std[row] * noise
        )
        r = (
            coefficients.data[row] * x
            + coefficients.noisy[row] * x_t
            + coefficients.output[row] * output
        )
        ours = (-0.5 * coefficients.inv_var[row] * r**2 + coefficients.log_norm[row]).sum()
        density = torch.distributions.Normal(expected, coefficients.std[row]).log_prob(x).sum()
        torch.testing.assert_close(ours, density, rtol=1e-9, atol=0)


def test_floor_and_center_never_change_how_the_chain_moves():
    scheduler = ddpm()
    scheduler.set_timesteps(10)
    plain = StepCoefficients.chain(scheduler, scheduler.timesteps)
    other = StepCoefficients.chain(scheduler, scheduler.timesteps, center="sample", sigma_floor=0.3)
    for name in ("mean_noisy", "mean_output", "std"):
        assert torch.equal(getattr(plain, name), getattr(other, name))
    torch.testing.assert_close(other.inv_var, plain.std.clamp(min=0.3) ** -2)
    torch.testing.assert_close(
        other.log_norm, -0.5 * (2 * math.pi * plain.std.clamp(min=0.3) ** 2).log()
    )
    assert other.unscorable == ()


@pytest.mark.parametrize(
    "make, options", [(ddpm, {}), (ddim, {}), (FlowMatchEulerDiscreteScheduler, {})]
)
def test_a_vanishing_std_is_refused_when_scored_and_not_before(make, options):
    scheduler = make(**options)
    scheduler.set_timesteps(5)
    coefficients = StepCoefficients.chain(scheduler, scheduler.timesteps)
    assert coefficients.unscorable[-1] == 4
    with pytest.raises(ValueError, match=r"rows \[.*4\].*sigma_floor"):
        coefficients.require_scorable()
    with pytest.raises(ValueError, match=r"rows \[4\]"):
        coefficients.require_scorable(4)
    StepCoefficients.chain(scheduler, scheduler.timesteps, sigma_floor=0.01).require_scorable()


def test_mean_parameterization_takes_the_output_as_it_is_and_allows_clipping():
    scheduler = DDPMScheduler(clip_sample=True)
    scheduler.set_timesteps(10)
    coefficients = StepCoefficients.chain(scheduler, scheduler.timesteps, parameterization="mean")
    assert torch.equal(coefficients.mean_output, torch.ones(10)) and torch.equal(
        coefficients.output, -torch.ones(10)
    )
    assert not coefficients.noisy.any() and not coefficients.mean_noisy.any()
    with pytest.raises(ValueError, match="center"):
        StepCoefficients.chain(
            scheduler, scheduler.timesteps, parameterization="mean", center="sample"
        )


@pytest.mark.parametrize("option", ["clip_sample", "thresholding"])
@pytest.mark.parametrize("make", [ddpm, ddim])
def test_clipping_schedulers_are_refused_with_what_to_set(make, option):
    with pytest.raises(ValueError, match=f"set {option}=False"):
        StepCoefficients.chain(make(**{option: True}), [500])


# Evidence lower bound


def elbo_case(prediction):
    """A scheduler, its timesteps, x, the noise, x_s for each step, and the training target of each
    step, all float64 [S, 2, 9].
    """
    x, noise = draw(2, 9, dtype=torch.float64), draw(9, 2, dtype=torch.float64).T
    if prediction == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(9)
        timesteps = scheduler.timesteps[1::3]
        scheduler.sigmas = scheduler.sigmas.double()
        x_s = torch.stack(
            [scheduler.scale_noise(x, timestep[None], noise) for timestep in timesteps]
        )
        return scheduler, timesteps, x, noise, x_s, (noise - x).expand_as(x_s)
    scheduler = in_float64(ddpm(prediction_type=prediction))
    timesteps = torch.tensor([0, 17, 500, 999])
    x_s = torch.stack([scheduler.add_noise(x, noise, timestep.expand(2)) for timestep in timesteps])
    velocity = torch.stack(
        [scheduler.get_velocity(x, noise, timestep.expand(2)) for timestep in timesteps]
    )
    return (
        scheduler,
        timesteps,
        x,
        noise,
        x_s,
        {"epsilon": noise, "sample": x, "v_prediction": velocity}[prediction].expand_as(x_s),
    )


def implied_noise(prediction, x_s, output, alpha, sigma):
    """The noise that an output implies, by solving the forward process."""
    if prediction == "epsilon":
        return output
    if prediction == "sample":
        return (x_s - alpha * output) / sigma
    if prediction == "v_prediction":
        return sigma * x_s + alpha * output
    return x_s + alpha * output


@pytest.mark.parametrize("weight", ["uniform", "given"])
@pytest.mark.parametrize("space", ["native", "epsilon"])
@pytest.mark.parametrize("input", ["target", "noisy"])
@pytest.mark.parametrize("prediction", [*PREDICTIONS, "flow"])
def test_elbo_is_the_weighted_squared_error(prediction, input, space, weight):
    scheduler, timesteps, x, noise, x_s, target = elbo_case(prediction)
    weights = (
        torch.ones(len(timesteps)) if weight == "uniform" else torch.arange(1.0, len(timesteps) + 1)
    )
    coefficients = StepCoefficients.elbo(
        scheduler,
        timesteps,
        input=input,
        space=space,
        weight="uniform" if weight == "uniform" else weights,
        dtype=torch.float64,
    )
    assert coefficients.mean_noisy is None and not coefficients.log_norm.any()
    output = draw(len(timesteps), 2, 9, dtype=torch.float64)
    levels = (
        scheduler.sigmas[1:-1:3] if prediction == "flow" else scheduler.alphas_cumprod[timesteps]
    )
    alpha, sigma = (
        (1 - levels, levels) if prediction == "flow" else (levels.sqrt(), (1 - levels).sqrt())
    )
    for row in range(len(timesteps)):
        error = target[row] - output[row]
        if space == "epsilon":
            error = noise - implied_noise(prediction, x_s[row], output[row], alpha[row], sigma[row])
        given = target[row] if input == "target" else x_s[row]
        r = (
            coefficients.data[row] * x
            + coefficients.noisy[row] * given
            + coefficients.output[row] * output[row]
        )
        ours = (-0.5 * coefficients.inv_var[row] * r**2).sum(1)
        torch.testing.assert_close(ours, -weights[row] * error.square().sum(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("weight", [[1.0, 2.0], [-1.0], [math.nan], "snr"])
def test_elbo_weights_out_of_range_are_refused(weight):
    with pytest.raises(ValueError, match="weight"):
        StepCoefficients.elbo(ddpm(), [5], weight=weight)


def test_elbo_does_not_mind_clipping():
    StepCoefficients.elbo(DDPMScheduler(clip_sample=True), [5]).require_scorable()


# Precision and schedules


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_alphas_are_rebuilt_from_the_betas(half):
    scheduler, exact = ddpm(**SCALED_LINEAR), ddpm(**SCALED_LINEAR)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(half)
    ours, theirs = (
        StepCoefficients.elbo(each, [0, 1, 500, 999], input="noisy") for each in (scheduler, exact)
    )
    for name in ("data", "noisy", "output"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=0)


@pytest.mark.parametrize("stale", ["half betas", "another schedule"])
def test_half_precision_alphas_without_their_betas_are_refused(stale):
    scheduler = ddpm()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(torch.bfloat16)
    scheduler.betas = (
        scheduler.betas.to(torch.bfloat16) if stale == "half betas" else scheduler.betas * 1.1
    )
    with pytest.raises(ValueError, match="alphas_cumprod is torch.bfloat16"):
        StepCoefficients.elbo(scheduler, [5])


def test_tables_are_rounded_once_from_float64():
    scheduler = ddpm()
    scheduler.set_timesteps(50)
    single, double = (
        StepCoefficients.chain(scheduler, scheduler.timesteps[:-1], dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for field in dataclasses.fields(StepCoefficients)[:8]:
        assert getattr(double, field.name).dtype == torch.float64
        assert torch.equal(getattr(single, field.name), getattr(double, field.name).float())


def test_zero_terminal_snr_has_no_clean_sample_from_epsilon():
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match="zero terminal SNR"):
        StepCoefficients.chain(ddpm(**config), [999])
    for prediction in ("sample", "v_prediction"):
        scheduler = ddim(prediction_type=prediction, **config)
        scheduler.set_timesteps(10)
        check_steps(
            scheduler,
            StepCoefficients.chain(scheduler, scheduler.timesteps),
            BOUND,
            lambda *_: None,
        )


@pytest.mark.parametrize(
    "spacing, differs", [("leading", False), ("linspace", True), ("trailing", True)]
)
def test_the_successor_decides_and_ddims_own_pairs_can_be_given(spacing, differs):
    scheduler = ddim(timestep_spacing=spacing)
    scheduler.set_timesteps(7)
    timesteps = scheduler.timesteps
    default = StepCoefficients.chain(scheduler, timesteps)
    successors = StepCoefficients.chain(scheduler, timesteps, [*timesteps[1:].tolist(), -1])
    own = StepCoefficients.chain(scheduler, timesteps, timesteps - 1000 // 7)
    assert torch.equal(default.mean_output, successors.mean_output)
    assert torch.allclose(default.mean_output, own.mean_output, rtol=1e-3) is not differs
    check_steps(scheduler, own, BOUND, lambda *_: None)


def test_a_thinned_list_keeps_the_chains_own_pairs():
    scheduler = ddpm()
    scheduler.set_timesteps(50)
    whole = StepCoefficients.chain(scheduler, scheduler.timesteps)
    thinned = StepCoefficients.chain(scheduler, scheduler.timesteps[11::3])
    assert torch.equal(thinned.std, whole.std[11::3]) and torch.equal(
        thinned.mean_noisy, whole.mean_noisy[11::3]
    )
    with pytest.raises(ValueError, match=r"\[981\] are not in scheduler.timesteps"):
        StepCoefficients.chain(scheduler, [981])


def test_set_alpha_to_one_decides_the_final_level():
    for alpha_to_one, final in ((True, 1.0), (False, None)):
        scheduler = ddim(set_alpha_to_one=alpha_to_one)
        final = scheduler.alphas_cumprod[0].item() if final is None else final
        level = scheduler.alphas_cumprod[500].item()
        coefficients = StepCoefficients.chain(scheduler, [500], [-20], eta=1.0, dtype=torch.float64)
        assert coefficients.std.item() == pytest.approx(
            math.sqrt((1 - level / final) * (1 - final) / (1 - level)), rel=1e-9
        )


def test_flow_levels_are_read_not_shifted_again():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = StepCoefficients.chain(scheduler, scheduler.timesteps[:1])
    assert before.mean_output.item() == pytest.approx(
        (scheduler.sigmas[1] - scheduler.sigmas[0]).item(), rel=1e-6
    )
    final = StepCoefficients.chain(scheduler, scheduler.timesteps[-1:])
    assert final.mean_output.item() == pytest.approx(-scheduler.sigmas[-1].item(), rel=1e-6)


@pytest.mark.parametrize("option, value", [("stochastic_sampling", True), ("invert_sigmas", True)])
def test_other_flow_steps_are_refused(option, value):
    scheduler = FlowMatchEulerDiscreteScheduler(**{option: value})
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=f"set {option}=False"):
        StepCoefficients.chain(scheduler, scheduler.timesteps)


@pytest.mark.parametrize("variance", ["learned", "learned_range", "fixed_large_log"])
def test_a_variance_that_fits_no_table_needs_a_choice(variance):
    scheduler = ddpm(variance_type=variance)
    with pytest.raises(ValueError, match='variance must be "fixed_small" or "fixed_large"'):
        StepCoefficients.chain(scheduler, [500])
    chosen = StepCoefficients.chain(scheduler, [500], variance="fixed_large")
    assert torch.equal(
        chosen.std, StepCoefficients.chain(ddpm(variance_type="fixed_large"), [500]).std
    )


# Bad input


@pytest.mark.parametrize(
    "make, arguments, error, message",
    [
        (EulerDiscreteScheduler, {"timesteps": [5]}, TypeError, "EulerDiscreteScheduler"),
        (ddpm, {"timesteps": [1000]}, ValueError, r"timesteps.*\[1000\]"),
        (ddpm, {"timesteps": [-1]}, ValueError, r"timesteps.*\[-1\]"),
        (ddpm, {"timesteps": [5.0]}, TypeError, "timesteps must be integers"),
        (ddpm, {"timesteps": 5}, TypeError, "timesteps must be a one-dimensional"),
        (ddpm, {"timesteps": [True]}, TypeError, "timesteps must be a one-dimensional"),
        (
            ddpm,
            {"timesteps": [5], "previous_timesteps": [5]},
            ValueError,
            "previous_timesteps must lie below",
        ),
        (
            ddpm,
            {"timesteps": [5], "previous_timesteps": [4, 3]},
            ValueError,
            "previous_timesteps must have as many",
        ),
        (ddpm, {"timesteps": [5], "parameterization": "flow"}, ValueError, "parameterization"),
        (ddpm, {"timesteps": [5], "eta": 0.5}, ValueError, "eta does not exist"),
        (ddpm, {"timesteps": [5], "center": "x0"}, ValueError, "center"),
        (ddpm, {"timesteps": [5], "sigma_floor": -0.1}, ValueError, "sigma_floor"),
        (ddpm, {"timesteps": [5], "sigma_floor": 1e-7}, ValueError, "sigma_floor"),
        (ddpm, {"timesteps": [5], "dtype": torch.float16}, TypeError, "float32 or float64"),
        (ddim, {"timesteps": [5], "eta": 1.5}, ValueError, "eta must be from 0 to 1"),
        (
            ddim,
            {"timesteps": [5], "variance": "fixed_small"},
            ValueError,
            "variance does not exist",
        ),
        (
            FlowMatchEulerDiscreteScheduler,
            {"timesteps": [5.5]},
            ValueError,
            r"\[5.5\] are not in scheduler.timesteps",
        ),
        (
            FlowMatchEulerDiscreteScheduler,
            {"timesteps": [1000.0], "parameterization": "epsilon"},
            ValueError,
            "parameterization",
        ),
    ],
)
def test_bad_chain_arguments_raise_one_clear_error(make, arguments, error, message):
    with pytest.raises(error, match=message):
        StepCoefficients.chain(make(), **arguments)


@pytest.mark.parametrize(
    "option, value", [("input", "x_t"), ("space", "x0"), ("parameterization", "mean")]
)
def test_bad_elbo_arguments_raise_one_clear_error(option, value):
    with pytest.raises(ValueError, match=option):
        StepCoefficients.elbo(ddpm(), [5], **{option: value})


def tables(**changes):
    one = torch.ones(3)
    return {"data": one, "noisy": one, "output": one, "inv_var": one, "log_norm": one, **changes}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"noisy": torch.ones(2)}, ValueError, "noisy must have"),
        ({"data": torch.ones(1, 3)}, ValueError, "data must have"),
        ({"output": torch.ones(3, dtype=torch.float64)}, TypeError, "output must have the dtype"),
        ({"data": torch.ones(3, dtype=torch.int64)}, TypeError, "data must be a float32"),
        ({"log_norm": [1.0, 1.0, 1.0]}, TypeError, "log_norm must be a float32"),
        ({"log_norm": torch.ones(3, device="meta")}, ValueError, "log_norm must lie"),
        ({"noisy": torch.tensor([1, math.inf, 1])}, ValueError, "noisy must be finite"),
        ({"inv_var": torch.tensor([1, math.nan, 1])}, ValueError, "inv_var must not"),
        ({"inv_var": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "inv_var must not"),
        ({"log_norm": torch.tensor([1, math.nan, 1])}, ValueError, "log_norm must be finite"),
        ({"std": torch.ones(3)}, ValueError, "must be given together"),
        (
            {"mean_noisy": torch.ones(3), "mean_output": torch.ones(3), "std": -torch.ones(3)},
            ValueError,
            "std must not be negative",
        ),
    ],
)
def test_tables_given_directly_are_checked(changes, error, message):
    with pytest.raises(error, match=message):
        StepCoefficients(**tables(**changes))


def test_tables_given_directly_are_kept():
    coefficients = StepCoefficients(**tables(inv_var=torch.tensor([1.0, math.inf, 2.0])))
    assert len(coefficients) == 3 and coefficients.unscorable == (1,) and coefficients.std is None
    assert coefficients.to("cpu", torch.float32) is coefficients
    moved = coefficients.to(dtype=torch.float64)
    assert moved.data.dtype == torch.float64 and moved.unscorable == (1,) and moved.std is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        coefficients.data = torch.zeros(3)
    assert len(StepCoefficients(**{name: table[:0] for name, table in tables().items()})) == 0


def test_another_device_gets_the_tables_without_a_second_check():
    """meta holds no values that could be read."""
    coefficients = StepCoefficients(**tables(inv_var=torch.tensor([1.0, math.inf, 2.0])))
    moved = coefficients.to("meta")
    assert (
        moved.data.device.type == moved.log_norm.device.type == "meta"
        and moved.unscorable == (1,)
        and moved.needs_noisy
    )
    assert coefficients.data.device.type == "cpu"


def test_tables_know_whether_the_noisy_input_is_needed():
    assert StepCoefficients(**tables(noisy=torch.tensor([0.0, 0.0, 1e-30]))).needs_noisy
    assert not StepCoefficients(**tables(noisy=torch.zeros(3))).needs_noisy
    assert not StepCoefficients.elbo(ddpm(prediction_type="sample"), [5, 500]).needs_noisy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scoring_tables_stand_in_the_order_of_the_operators(dtype):
    coefficients = StepCoefficients(**tables())
    given = (
        coefficients.data,
        coefficients.noisy,
        coefficients.output,
        coefficients.inv_var,
        coefficients.log_norm,
    )
    for table, expected in zip(coefficients.scoring_tables(dtype), given, strict=True):
        assert table.dtype == dtype and torch.equal(table.float(), expected)
        assert (table.data_ptr() == expected.data_ptr()) == (dtype == torch.float32)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]
)
@pytest.mark.parametrize("chain", [False, True])
def test_copies_are_whole_and_hold_the_tables_once(copied, chain):
    made = ddpm()
    made.set_timesteps(10)
    coefficients = StepCoefficients(**tables())
    if chain:
        coefficients = StepCoefficients.chain(made, made.timesteps)
    other = copied(coefficients).to(dtype=torch.float64).to(dtype=torch.float32)
    assert torch.equal(other.tables, coefficients.tables) and (other.std is None) != chain
    assert other.unscorable == coefficients.unscorable
    assert other.needs_noisy == coefficients.needs_noisy
    size = coefficients.tables.numel() * coefficients.tables.element_size()
    assert len(pickle.dumps(coefficients)) < size + 1500


@pytest.mark.parametrize("name", ["data", "log_norm"])
def test_tables_that_require_a_gradient_are_refused(name):
    """They would lose it without a word."""
    learned = tables()[name].clone().requires_grad_()
    with pytest.raises(ValueError, match=f"{name} must not require a gradient.*detach it"):
        StepCoefficients(**tables(**{name: learned}))
    StepCoefficients(**tables(**{name: learned.detach()}))
    with pytest.raises(ValueError, match="timesteps must not require a gradient.*detach it"):
        StepCoefficients.elbo(ddpm(), torch.ones(1, requires_grad=True))
    with pytest.raises(ValueError, match="weight must not require a gradient.*detach it"):
        StepCoefficients.elbo(ddpm(), [1], weight=torch.ones(1, requires_grad=True))


def test_tables_of_inference_mode_serve_training():
    with torch.inference_mode():
        made = StepCoefficients(**tables())
        kept = [made, made.to(dtype=torch.float64).to(dtype=torch.float32)]
        kept.append(pickle.loads(pickle.dumps(made)))
    for coefficients in kept:
        x = torch.ones(1, 2, requires_grad=True)
        log_likelihood(x, torch.zeros(1, 3, 2), coefficients, torch.zeros(1, 3, 2)).sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("derived", [("unscorable", "needs_noisy"), ("unscorable",)])
def test_pickles_of_tables_one_by_one_load(derived):
    coefficients = StepCoefficients(**tables())
    state = {name: getattr(coefficients, name) for name in (*tables(), *derived)}
    state |= {"mean_noisy": None, "mean_output": None, "std": None}
    loaded = StepCoefficients.__new__(StepCoefficients)
    loaded.__setstate__(state)
    assert torch.equal(loaded.to(dtype=torch.float64).tables, coefficients.tables.double())
    assert loaded.needs_noisy == coefficients.needs_noisy


def test_normal_tables_normalise_the_density():
    std = torch.tensor([0.3, 1e-6, 0.0, 2.0], dtype=torch.float64)
    inv_var, log_norm = normal_tables(std)
    density = torch.distributions.Normal(0.0, std[[0, 3]]).log_prob(torch.tensor(0.7))
    torch.testing.assert_close((-0.5 * inv_var * 0.7**2 + log_norm)[[0, 3]], density)
    assert inv_var[1:3].isinf().all()


@pytest.mark.parametrize("table", ["chain", "elbo"])
def test_diffusers_own_name_of_the_flow_is_taken(table):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    build = getattr(StepCoefficients, table)
    named = build(scheduler, scheduler.timesteps[1:3], parameterization="flow_prediction")
    expected = build(scheduler, scheduler.timesteps[1:3], parameterization="flow")
    assert torch.equal(named.tables, expected.tables)
    scheduler.register_to_config(prediction_type="flow_prediction")
    assert torch.equal(build(scheduler, scheduler.timesteps[1:3]).tables, expected.tables)


@pytest.mark.parametrize("given", ["flow_prediction", "flow", ["epsilon"], "noise"])
def test_a_prediction_that_ddpm_does_not_have_is_refused(given):
    with pytest.raises(ValueError, match="parameterization of DDPMScheduler must be one of eps"):
        StepCoefficients.elbo(DDPMScheduler(clip_sample=False), [5], parameterization=given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_learned_std_is_positive_and_finite_in_any_dtype(dtype):
    ratio = torch.tensor(-37.0, dtype=torch.float64)
    output = torch.tensor([0.0, -1.0, 0.5, 1.0, -50.0, 50.0])[None].expand(2, -1).to(dtype)
    scale = learned_std_scale(output[None], 1, ratio)
    assert scale.dtype == torch.promote_types(dtype, torch.float32)
    assert (scale > 0).all() and scale.isfinite().all()
    fraction = (output[1, :4].double() + 1) / 2
    expected = (0.5 * (1 - fraction) * ratio).exp()
    torch.testing.assert_close(scale[0, 0, :4].double(), expected, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="must have 4 channels .* got 2"):
        learned_std_scale(output[None], 2, ratio)
