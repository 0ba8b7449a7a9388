"""Every scheduler class that diffusers exports: its noise levels, inputs and targets are those of
its own `add_noise`, `scale_model_input` and conversions, or it is refused with what to use instead.
"""

import copy
import importlib
import inspect
import itertools
import math
import re
import sys
import types

import diffusers
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import genrep_fast as gf
from genrep_fast.coefficients.forward_process import forward_process, stratified_process
from genrep_fast.coefficients.noise_schedules import FAMILIES, REFUSED
from genrep_fast.reference.reverse_step import chain_noise
from genrep_fast.scoring.estimators import ElboEstimator, training_target

# Of diffusers' own arithmetic with NumPy.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

EXPORTED = sorted(
    name for name in dir(diffusers) if name.endswith("Scheduler") and name[0].isupper()
)
# Files of the classes that ask for torchsde, which only their steps need.
WITH_TORCHSDE = {
    "CosineDPMSolverMultistepScheduler": "scheduling_cosine_dpmsolver_multistep",
    "DPMSolverSDEScheduler": "scheduling_dpmsolver_sde",
}
# Arguments without a default, and what keeps the schedules small, unclipped and of one stage.
SETTINGS = {
    "num_train_timesteps": 100,
    "clip_sample": False,
    "stages": 1,
    "stage_range": [0, 1],
    "schedule_mode": "power",
    "noise_mode": "tan",
    "tsr_k": 1.0,
    "tsr_sigma": 1.0,
    "tail_steps": 0,
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
OPTIONS = {
    "default": {},
    "stable diffusion": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    },
    "cosine betas": {"beta_schedule": "squaredcos_cap_v2"},
    "velocity": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "zero snr": {
        "rescale_betas_zero_snr": True,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    },
    "snr shift": {"snr_shift_scale": 1.0, "prediction_type": "v_prediction"},
    "trained betas": {"trained_betas": torch.linspace(0.001, 0.1, 100).numpy()},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "final": {"final_sigmas_type": "sigma_min"},
    "log linear": {"interpolation_type": "log_linear"},
    "continuous": {
        "timestep_type": "continuous",
        "prediction_type": "v_prediction",
        "use_karras_sigmas": True,
        "sigma_min": 0.002,
        "sigma_max": 700.0,
    },
    "flow": {**FLOW, "flow_shift": 3.0},
    "flow of noise": {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "epsilon"},
    "flow to a terminal": {**FLOW, "use_dynamic_shifting": True, "shift_terminal": 0.1},
    "shift": {"shift": 3.0},
    "dynamic shift": {"use_dynamic_shifting": True, "time_shift_type": "exponential"},
    "terminal": {"shift": 2.0, "shift_terminal": 0.1},
    "exponential edm": {"sigma_schedule": "exponential", "prediction_type": "v_prediction"},
    "edm data": {"sigma_data": 0.3, "sigma_max": 20.0},
    "scaler": {"scaler": 2.0},
}
# What diffusers itself never converts: it raises when it steps.
MEANINGLESS = {
    ("CosineDPMSolverMultistepScheduler", "sample"),
    ("EDMDPMSolverMultistepScheduler", "sample"),
    ("EDMEulerScheduler", "sample"),
    ("HeliosDMDScheduler", "sample"),
    ("HeliosDMDScheduler", "velocity"),
    ("HeliosScheduler", "sample"),
    ("HeliosScheduler", "velocity"),
}
SHAPE = (2, 3, 4)


def find_class(name):
    if name not in WITH_TORCHSDE:
        return getattr(diffusers, name)
    sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    return getattr(importlib.import_module(f"diffusers.schedulers.{WITH_TORCHSDE[name]}"), name)


def parameters(name):
    return inspect.signature(find_class(name).__init__).parameters


def make(name, options="default"):
    settings = {key: value for key, value in SETTINGS.items() if key in parameters(name)}
    return find_class(name)(**{**settings, **OPTIONS[options]})


def options_of(name):
    """Names of the options that a class has."""
    known = set(parameters(name))
    return [options for options, given in OPTIONS.items() if set(given) <= known]


CASES = [
    case
    for name in sorted(set(FAMILIES) & set(EXPORTED))
    for case in itertools.product([name], options_of(name))
]
CASES = [case for case in CASES if case not in MEANINGLESS]


def set_timesteps(scheduler, steps=7):
    is_dynamic = scheduler.config.get("use_dynamic_shifting", False)
    scheduler.set_timesteps(steps, **({"mu": 0.7} if is_dynamic else {}))
    return scheduler


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


X, NOISE = draw(0, *SHAPE), draw(1, *SHAPE)


def assert_close(actual, expected, bound=1e-12):
    """Both come from the same float32 tables, so only float64's rounding is between them."""
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


def in_float64(scheduler):
    """A copy that computes in float64 with the same float32 tables."""
    scheduler = copy.deepcopy(scheduler)
    for name in ("sigmas", "sigmas_interpol", "betas", "alphas_cumprod"):
        if isinstance(getattr(scheduler, name, None), torch.Tensor):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def ddpm_of(scheduler):
    """DDPM with the training levels of another scheduler."""
    ddpm = DDPMScheduler(num_train_timesteps=len(scheduler.alphas_cumprod))
    ddpm.alphas_cumprod = scheduler.alphas_cumprod.double()
    return ddpm


def row_of(scheduler, timestep):
    """Where the scheduler looks a timestep up: the second of equal ones."""
    return (scheduler.timesteps == timestep).nonzero().flatten().tolist()[:2][-1]


def own_noise(scheduler, timestep, x=X, noise=NOISE):
    """The scheduler's own noisy images at one timestep, before its `scale_model_input`."""
    name = type(scheduler).__name__
    steps = timestep.expand(len(x))
    if name in ("RePaintScheduler", "DDIMInverseScheduler"):
        # They have none of their own; RePaint's error points to DDPM's.
        return ddpm_of(scheduler).add_noise(x, noise, steps)
    if name in ("HeliosScheduler", "LTXEulerAncestralRFScheduler"):
        sigma = scheduler.sigmas[row_of(scheduler, timestep)]
        return (1 - sigma) * x + sigma * noise
    if name == "SASolverScheduler" and scheduler.config.use_flow_sigmas:
        # Its add_noise overlooks use_flow_sigmas, its steps do not.
        sigma = scheduler.sigmas[row_of(scheduler, timestep)]
        return (1 - sigma) * x + sigma * noise
    if name == "IPNDMScheduler":
        sigma = scheduler.betas[row_of(scheduler, timestep)]
        return (1 - sigma**2).sqrt() * x + sigma * noise
    if name == "HeliosDMDScheduler":
        schedule = {"sigmas": scheduler.sigmas, "timesteps": scheduler.timesteps}
        video = scheduler.add_noise(x[..., None, None], noise[..., None, None], steps, **schedule)
        return video[..., 0, 0]
    if name == "FlowMatchHeunDiscreteScheduler":
        return scheduler.scale_noise(x, timestep, noise)
    if name == "DDPMWuerstchenScheduler":
        return scheduler.add_noise(x, noise, steps.double())
    if hasattr(scheduler, "add_noise"):
        return scheduler.add_noise(x, noise, steps)
    return scheduler.scale_noise(x, steps, noise)


def own_input(scheduler, noisy, timestep):
    if not hasattr(scheduler, "scale_model_input"):
        return noisy
    return scheduler.scale_model_input(noisy, timestep)


# The table


def test_every_exported_class_is_supported_or_refused():
    assert len(EXPORTED) >= 40
    assert set(EXPORTED) <= set(FAMILIES) | set(REFUSED)
    assert not set(FAMILIES) & set(REFUSED)
    assert {name for name, _ in CASES} == set(FAMILIES) & set(EXPORTED)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_inputs_are_the_schedulers_own(name, options):
    scheduler = set_timesteps(make(name, options))
    seen = 0
    for timestep in scheduler.timesteps.unique():
        own = in_float64(scheduler)
        noisy = own_noise(own, timestep)
        if torch.equal(noisy, X):
            # The end of the chain, which no step is scored at.
            continue
        process = forward_process(scheduler, timestep[None])
        expected = own_input(own, noisy, timestep)
        assert_close(process.noisy_input(X, NOISE), expected)
        assert_close(process.alpha * X + process.sigma * NOISE, expected)
        assert_close(process.input_scale * noisy, expected)
        seen += 1
    assert seen >= 4


def is_by_training_step(name, options):
    """Whether the timesteps count the steps of a training whose levels are DDPM's."""
    return "alphas_cumprod" in vars(make(name, options)) and options not in (
        "continuous",
        "flow",
        "flow of noise",
        "flow to a terminal",
    )


@pytest.mark.parametrize(
    ("name", "options"), [case for case in CASES if is_by_training_step(*case)]
)
def test_training_timesteps_have_ddpms_levels_before_and_after_set_timesteps(name, options):
    scheduler = make(name, options)
    fresh = stratified_process(scheduler, 100)
    x, noise = X[:1].expand(100, 3, 4), NOISE[:1].expand(100, 3, 4)
    expected = ddpm_of(scheduler).add_noise(x, noise, torch.arange(100))
    assert fresh.timesteps.tolist() == list(range(100))
    assert_close(fresh.noisy_input(x, noise), expected)
    set_timesteps(scheduler)
    assert torch.equal(stratified_process(scheduler, 100).alpha, fresh.alpha)
    # Those that set_timesteps left out; for the others the scheduler may hold another level.
    others = [step for step in range(100) if step not in scheduler.timesteps.tolist()]
    assert torch.equal(forward_process(scheduler, others).alpha, fresh.alpha[others])


@pytest.mark.parametrize(
    ("name", "options"), [case for case in CASES if not is_by_training_step(*case)]
)
def test_other_training_timesteps_are_those_of_a_new_scheduler(name, options):
    scheduler = make(name, options)
    fresh = stratified_process(scheduler, 9)
    reference = training_reference(scheduler, fresh.timesteps)
    # FlowMap's add_noise divides the timestep, which is rounded to float32.
    bound = 1e-6 if name == "FlowMapEulerDiscreteScheduler" else 1e-12
    for row, timestep in enumerate(fresh.timesteps):
        own = in_float64(reference)
        expected = own_input(own, own_noise(own, timestep), timestep)
        assert_close(fresh[row].noisy_input(X, NOISE), expected, bound)
    assert (fresh.alpha / fresh.sigma).diff().max() < 0
    after = stratified_process(set_timesteps(scheduler), 9)
    assert torch.equal(after.timesteps, fresh.timesteps)
    assert torch.equal(after.sigma, fresh.sigma)


def training_reference(scheduler, timesteps):
    """The scheduler whose `add_noise` is that of training."""
    config = scheduler.config
    name = type(scheduler).__name__
    if name == "IPNDMScheduler":
        # Its levels are a function of timesteps, of which its own list holds others.
        reference = copy.deepcopy(scheduler)
        reference.timesteps = timesteps.double()
        reference.betas = (reference.timesteps * math.pi / 2).sin()
        return reference
    if name == "LTXEulerAncestralRFScheduler" or config.get("use_flow_sigmas", False):
        shift = config.get("flow_shift", config.get("shift", 1.0))
        if config.get("use_dynamic_shifting", False):
            shift = 1.0
        return FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=config.num_train_timesteps, shift=shift
        )
    if hasattr(scheduler, "alphas_cumprod") and config.get("timestep_type") != "continuous":
        return ddpm_of(scheduler)
    return scheduler


# Targets


def own_clean_image(scheduler, noisy, output, timestep):
    """What the scheduler makes of an output and of noisy images before their scaling."""
    name = type(scheduler).__name__
    if hasattr(scheduler, "precondition_outputs"):
        sigma = scheduler.sigmas[row_of(scheduler, timestep)]
        return scheduler.precondition_outputs(noisy, output, sigma)
    if name == "IPNDMScheduler":
        row = row_of(scheduler, timestep)
        scheduler.alphas = (1 - scheduler.betas**2).sqrt()
        scheduler.step(output, timestep, noisy)
        return (noisy - scheduler.betas[row] * scheduler.ets[0]) / scheduler.alphas[row]
    if name in ("FlowMatchHeunDiscreteScheduler", "LTXEulerAncestralRFScheduler"):
        return noisy - output * scheduler.sigmas[row_of(scheduler, timestep)]
    if name == "MiniMaxH3Scheduler":
        # Its last step ends at the clean image.
        scheduler.sigmas = torch.stack([1 - timestep, torch.tensor(0.0)]).double()
        scheduler.timesteps = timestep[None]
        return scheduler.step(output, timestep, noisy).prev_sample
    if name == "RFD4ProteinaScheduler":
        return noisy + (1 - timestep) * output
    scheduler._step_index = row_of(scheduler, timestep)
    if hasattr(scheduler, "convert_model_output"):
        converted = scheduler.convert_model_output(output, sample=noisy)
        if name != "DEISMultistepScheduler":
            return converted
        # The noise.
        sigma = scheduler.sigmas[scheduler._step_index]
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(sigma)
        return (noisy - sigma * converted) / alpha
    return scheduler.step(output, timestep, noisy).pred_original_sample


# The others' steps return something else, or convert with a sigma that is not `add_noise`'s.
WITH_CLEAN_IMAGE = {
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "IPNDMScheduler",
    "LMSDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "MiniMaxH3Scheduler",
    "RFD4ProteinaScheduler",
    "UnCLIPScheduler",
}
UNCONVERTED = {
    ("EulerAncestralDiscreteScheduler", "sample"),
    ("UnCLIPScheduler", "velocity"),
    # Whose steps take the sigmas of set_timesteps, its add_noise those of training.
    ("SASolverScheduler", "karras"),
    ("SASolverScheduler", "exponential"),
    ("SASolverScheduler", "beta"),
}


CONVERTED = [
    case
    for case in CASES
    if hasattr(find_class(case[0]), "convert_model_output")
    or hasattr(find_class(case[0]), "precondition_outputs")
    or case[0] in WITH_CLEAN_IMAGE
    if case not in UNCONVERTED
]


@pytest.mark.parametrize(("name", "options"), CONVERTED)
def test_the_scheduler_makes_the_clean_image_of_the_target(name, options):
    scheduler = set_timesteps(make(name, options))
    compared = 0
    for timestep in scheduler.timesteps.unique():
        own = in_float64(scheduler)
        noisy = own_noise(own, timestep)
        if torch.equal(noisy, X) or torch.equal(noisy, NOISE):
            continue
        process = forward_process(scheduler, timestep[None])
        target = process.target(X, NOISE)
        clean = own_clean_image(own, noisy, target, timestep)
        # Some steps round to float32, and at much noise the image is what little remains.
        bound = 1e-6 * (1 + process.sigma / process.alpha).item()
        torch.testing.assert_close(clean.double(), X, rtol=bound, atol=bound)
        compared += 1
    assert compared >= 4


VELOCITIES = [
    case
    for case in CASES
    # Euler's own counts its timesteps from the wrong end.
    if hasattr(find_class(case[0]), "get_velocity") and case[0] != "EulerDiscreteScheduler"
    if OPTIONS[case[1]].get("prediction_type") == "v_prediction"
]


@pytest.mark.parametrize(("name", "options"), VELOCITIES)
def test_velocities_are_the_schedulers_own(name, options):
    scheduler = make(name, options)
    steps = torch.tensor([3, 97])
    expected = in_float64(scheduler).get_velocity(X, NOISE, steps)
    assert_close(forward_process(scheduler, steps).target(X, NOISE), expected)
    assert_close(training_target(scheduler, X, NOISE, steps), expected)


@pytest.mark.parametrize("space", ["native", "epsilon"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_tables_measure_the_error_of_the_output_and_of_the_noise_it_implies(name, options, space):
    scheduler = make(name, options)
    process = forward_process(scheduler, stratified_process(scheduler, 6).timesteps)
    if options == "zero snr" and space == "epsilon":
        # Without signal an output implies its own noise, whatever it is.
        process = process[:5]
    timesteps = process.timesteps
    x, noise, output = (draw(seed, len(process), 5) for seed in (0, 1, 2))
    one, none = torch.ones(len(process), 1).double(), torch.zeros(len(process), 1).double()
    error = process.target(x, noise) - output
    if space == "epsilon":
        # The clean image and noise of which x_s and the output are what they are.
        system = torch.stack(
            [
                torch.cat([process.alpha[:, None], process.sigma[:, None]], 1),
                torch.cat([process.target(one, none), process.target(none, one)], 1),
            ],
            1,
        )
        given = torch.stack([process.noisy_input(x, noise), output], 1)
        error = noise - torch.linalg.solve(system, given)[:, 1]
    for input, given in (
        ("noisy", process.noisy_input(x, noise)),
        ("target", process.target(x, noise)),
    ):
        tables = gf.StepCoefficients.elbo(
            scheduler, timesteps, input=input, space=space, dtype=torch.float64
        )
        columns = [getattr(tables, column)[:, None] for column in ("data", "noisy", "output")]
        residual = columns[0] * x + columns[1] * given + columns[2] * output
        actual = 0.5 * tables.inv_var[:, None] * residual**2
        torch.testing.assert_close(actual, error**2, rtol=1e-6, atol=1e-9)


# The estimator


def denoiser(x_t, timesteps, labels):
    phase = (labels.to(x_t.dtype) + 1) * 0.7 + timesteps.to(x_t.dtype) / 30
    return torch.sin(x_t * 1.3 + phase[:, None, None])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_posterior_is_that_of_a_plain_loop(name, options):
    scheduler = make(name, options)
    prediction = scheduler.config.get("prediction_type")
    estimator = ElboEstimator(denoiser, scheduler, 3, num_steps=4, seed=5)
    x = X.float()
    actual = estimator.log_likelihood(x)
    reference = training_reference(scheduler, estimator.timesteps)
    expected = torch.zeros(len(x), 3)
    for step, timestep in enumerate(estimator.timesteps):
        own = copy.deepcopy(reference)
        noise = chain_noise(5, torch.zeros(1, dtype=torch.int64), step, SHAPE[1:]).float()
        noise = noise.expand_as(x)
        noisy = own_noise(own, timestep, x, noise)
        x_t = own_input(own, noisy, timestep).float()
        for label in range(3):
            output = denoiser(x_t, timestep.expand(2), torch.tensor([label, label]))
            target = plain_target(own, prediction, timestep, x, noise, noisy)
            expected[:, label] -= (target - output).square().flatten(1).sum(1).float() / 4
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gf.posterior(actual), gf.posterior(expected), rtol=1e-5, atol=1e-5 * actual.abs().max()
    )
    assert estimator.evaluations == 2 * 3 * 4


def plain_target(scheduler, prediction, timestep, x, noise, noisy):
    """The training target in the schedulers' own terms."""
    name = type(scheduler).__name__
    if hasattr(scheduler, "precondition_outputs"):
        # The output that preconditioning makes the clean image of.
        sigma = scheduler.sigmas[row_of(scheduler, timestep)]
        zero, one = torch.zeros(()), torch.ones(())
        of_noisy = scheduler.precondition_outputs(noisy, zero, sigma)
        return (x - of_noisy) / scheduler.precondition_outputs(zero, one, sigma)
    if name in ("MiniMaxH3Scheduler", "RFD4ProteinaScheduler"):
        return x - noise
    if prediction == "v_prediction" and name == "DDPMScheduler":
        return scheduler.get_velocity(x, noise, timestep.expand(len(x)))
    if prediction == "v_prediction" and name == "EulerDiscreteScheduler":
        # That of which its step makes the clean image: o = (noise − σ·x)/√(σ² + 1).
        sigma = scheduler.sigmas[row_of(scheduler, timestep)]
        return (noise - sigma * x) / (sigma**2 + 1) ** 0.5
    if name == "IPNDMScheduler":
        sigma = scheduler.betas[row_of(scheduler, timestep)].float()
        return (1 - sigma**2).sqrt() * noise - sigma * x
    if prediction in ("flow_prediction", None) and name.startswith(("Flow", "Helios")):
        return noise - x
    return x if prediction == "sample" else noise


def test_the_estimator_does_not_mind_what_a_pipeline_left_in_the_scheduler():
    scheduler = EulerDiscreteScheduler(use_karras_sigmas=True)
    x = X.float()
    fresh = ElboEstimator(denoiser, scheduler, 3, num_steps=4).log_likelihood(x)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(2)
    scheduler.step(x, scheduler.timesteps[2], x)
    used = ElboEstimator(denoiser, scheduler, 3, num_steps=4)
    assert torch.equal(used.log_likelihood(x), fresh)
    before = copy.deepcopy(vars(scheduler))
    forward_process(scheduler, scheduler.timesteps)
    used.log_likelihood(x)
    assert str(vars(scheduler)) == str(before)


def test_low_precision_images_are_noised_in_float32():
    process = forward_process(EulerDiscreteScheduler(), [300, 500])
    x, noise = X.bfloat16(), NOISE.bfloat16()
    expected = process.noisy_input(x.float(), noise.float()).bfloat16()
    assert torch.equal(process.noisy_input(x, noise), expected)
    # Levels in bfloat16 would give others.
    alpha, sigma = process.alpha.bfloat16(), process.sigma.bfloat16()
    rough = alpha[:, None, None] * x + sigma[:, None, None] * noise
    assert not torch.equal(rough, expected)


# What the scheduler holds

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
COGVIDEOX = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 1.0,
    "timestep_spacing": "trailing",
}
VIDEO_DIFFUSION = {
    **OPTIONS["continuous"],
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
}


@pytest.mark.parametrize(
    ("name", "config", "prediction"),
    [
        ("PNDMScheduler", STABLE_DIFFUSION, "epsilon"),
        ("EulerDiscreteScheduler", STABLE_DIFFUSION, "epsilon"),
        ("DPMSolverMultistepScheduler", {**STABLE_DIFFUSION, **OPTIONS["karras"]}, "epsilon"),
        ("DPMSolverMultistepScheduler", {"beta_schedule": "linear"}, "epsilon"),
        ("EulerDiscreteScheduler", VIDEO_DIFFUSION, "v_prediction"),
        ("CogVideoXDDIMScheduler", COGVIDEOX, "v_prediction"),
        ("DPMSolverMultistepScheduler", OPTIONS["flow"], "flow"),
        ("UniPCMultistepScheduler", {**FLOW, "flow_shift": 5.0}, "flow"),
        ("UniPCMultistepScheduler", {**FLOW, "use_karras_sigmas": True}, "flow"),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, "flow"),
        ("FlowMatchEulerDiscreteScheduler", OPTIONS["dynamic shift"], "flow"),
        ("EDMDPMSolverMultistepScheduler", {"sigma_data": 0.5}, "v_prediction"),
    ],
)
def test_published_configurations(name, config, prediction):
    """Stable Diffusion 1.5 and XL, PixArt, Stable Video Diffusion, CogVideoX, Sana, Wan, Cosmos,
    Stable Diffusion 3, Flux and Playground 2.5, as a pipeline uses them.
    """
    scheduler = set_timesteps(find_class(name).from_config(config), 20)
    process = forward_process(scheduler, scheduler.timesteps)
    assert process.parameterization == prediction
    for row, timestep in enumerate(scheduler.timesteps):
        own = in_float64(scheduler)
        expected = own_input(own, own_noise(own, timestep), timestep)
        assert_close(process[row].noisy_input(X, NOISE), expected)


def test_timesteps_and_sigmas_given_apart_are_taken_as_they_are_held():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    # What set_timesteps(timesteps=..., sigmas=...) makes of them is the version's affair.
    scheduler.timesteps = torch.tensor([900.0, 500.0])
    scheduler.sigmas = torch.tensor([0.92, 0.56, 0.0])
    held = scheduler.sigmas[:2].double()
    process = forward_process(scheduler, scheduler.timesteps)
    assert torch.equal(process.sigma, held) and torch.equal(process.alpha, 1 - held)
    with pytest.raises(ValueError, match=r"\[700.0\].* has scheduler.timesteps alone"):
        forward_process(scheduler, [700.0])
    # Training is another matter.
    levels = stratified_process(scheduler, 5).sigma
    assert torch.equal(
        levels, stratified_process(FlowMatchEulerDiscreteScheduler(shift=3.0), 5).sigma
    )


@pytest.mark.parametrize("shifts", [1, 2])
def test_flow_levels_are_read_however_often_the_scheduler_shifts_them(shifts):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = torch.linspace(0.001, 1, 7).flip(0)
    for _ in range(shifts):
        levels = 3 * levels / (1 + 2 * levels)
    scheduler.sigmas, scheduler.timesteps = torch.cat([levels, torch.zeros(1)]), levels * 1000
    assert torch.equal(forward_process(scheduler, scheduler.timesteps).sigma, levels.double())
    assert forward_process(scheduler, [250]).sigma.item() == 0.25


def test_a_repeated_timestep_has_the_sigma_that_the_scheduler_takes():
    scheduler = DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True
    )
    scheduler.set_timesteps(20)
    repeated, counts = scheduler.timesteps.unique(return_counts=True)
    assert counts.max() > 2
    for timestep in repeated[counts > 1]:
        process = forward_process(scheduler, timestep[None])
        assert_close(process.noisy_input(X, NOISE), own_noise(in_float64(scheduler), timestep))


def test_explicit_sigmas_are_taken_as_they_are_held():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[14.6, 6.5, 1.9, 0.4, 0.0])
    ratio = torch.tensor([14.6, 6.5, 1.9, 0.4]).double()
    process = forward_process(scheduler, scheduler.timesteps)
    assert_close(process.sigma / process.alpha, ratio)
    assert_close(process.input_scale, 1 / (ratio**2 + 1).sqrt())


def test_an_integer_flow_timestep_has_the_sigma_it_was_cut_from():
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    scheduler.set_timesteps(20)
    cut = scheduler.sigmas[:-1].double() * 1000 - scheduler.timesteps
    assert cut.max() > 0.5
    process = forward_process(scheduler, scheduler.timesteps)
    assert torch.equal(process.sigma, scheduler.sigmas[:-1].double())


def test_between_training_timesteps_the_sigma_is_interpolated_as_by_set_timesteps():
    scheduler = LMSDiscreteScheduler()
    scheduler.set_timesteps(7)
    new = LMSDiscreteScheduler()
    assert not set(scheduler.timesteps.tolist()) <= set(new.timesteps.tolist())
    process = forward_process(new, scheduler.timesteps)
    assert_close(process.sigma / process.alpha, scheduler.sigmas[:-1].double(), bound=1e-6)


def test_a_subclass_has_the_noise_levels_of_its_ancestor():
    class OwnScheduler(UniPCMultistepScheduler):
        pass

    process = forward_process(OwnScheduler(), [3, 500])
    assert torch.equal(process.alpha, forward_process(UniPCMultistepScheduler(), [3, 500]).alpha)


# Refusals


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_scheduler_without_noise_levels_is_refused_with_what_to_use(name):
    scheduler = type(name, (), {})()
    with pytest.raises(TypeError) as error:
        gf.StepCoefficients.elbo(scheduler, [5])
    message = str(error.value)
    assert message.startswith(f"scheduler: {name} ") and len(message) < 260
    assert any(f": {advice} " in message for advice in ("use", "build", "score"))
    for suggested in re.findall(r"\w+Scheduler", message.removeprefix(f"scheduler: {name}")):
        assert suggested in FAMILIES
    with pytest.raises(TypeError, match=name):
        ElboEstimator(denoiser, scheduler, 3)


@pytest.mark.parametrize("scheduler", [None, object(), EulerDiscreteScheduler])
def test_what_is_no_scheduler_is_refused(scheduler):
    with pytest.raises(TypeError, match="scheduler must be one of .*, got "):
        forward_process(scheduler, [5])


def flow(cls, steps=None, **options):
    scheduler = cls(use_flow_sigmas=True, prediction_type="flow_prediction", **options)
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def half(scheduler):
    scheduler.sigmas = scheduler.sigmas.half()
    return scheduler


@pytest.mark.parametrize(
    ("make_scheduler", "timesteps", "error", "message"),
    [
        (EulerDiscreteScheduler, [1000.0], ValueError, r"\[1000.0\], EulerDiscreteScheduler has 0"),
        (EulerDiscreteScheduler, [-1], ValueError, r"does not have \[-1\]"),
        (EulerDiscreteScheduler, [math.nan], ValueError, r"does not have \[nan\]"),
        (PNDMScheduler, [1000, 3], ValueError, r"\[1000\], PNDMScheduler has 0 to 999"),
        (PNDMScheduler, [3.0], TypeError, "timesteps must be integers for PNDMScheduler"),
        # A training step where the denoiser takes a quarter of log σ.
        (EDMEulerScheduler, [500], ValueError, r"\[500\], EDMEulerScheduler has -1.5537 to 1.0955"),
        (FlowMatchEulerDiscreteScheduler, [0], ValueError, r"\[0\], .* has above 0 to 1000"),
        (FlowMatchEulerDiscreteScheduler, [1000.5], ValueError, r"does not have \[1000.5\]"),
        (lambda: half(EulerDiscreteScheduler()), [5], ValueError, "scheduler.sigmas is .*float16"),
        (HeliosScheduler, [500], ValueError, "HeliosScheduler has stages=3.* set stages=1"),
        (
            lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
            [500],
            ValueError,
            "set invert_sigmas=False",
        ),
        (
            lambda: flow(DPMSolverMultistepScheduler, 5, use_karras_sigmas=True),
            None,
            ValueError,
            "sigmas above 1.* unset use_karras_sigmas",
        ),
        (
            lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction"),
            [500],
            ValueError,
            "got 'flow_prediction'; a flow needs use_flow_sigmas=True",
        ),
        (
            lambda: UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="v_prediction"),
            [500],
            ValueError,
            "must be one of flow, flow_prediction, epsilon, sample, got 'v_prediction'",
        ),
        (
            lambda: EDMEulerScheduler(prediction_type="sample"),
            [0.5],
            ValueError,
            "must be one of epsilon, v_prediction, got 'sample'",
        ),
    ],
)
def test_bad_timesteps_and_configurations_raise_one_clear_error(
    make_scheduler, timesteps, error, message
):
    scheduler = make_scheduler()
    with pytest.raises(error, match=message):
        forward_process(scheduler, scheduler.timesteps if timesteps is None else timesteps)


def test_bad_images_raise_one_clear_error():
    process = forward_process(EulerDiscreteScheduler(), [3, 500, 999])
    with pytest.raises(ValueError, match="x must have 3 images, one a timestep, got 2"):
        process.noisy_input(X, NOISE)
    with pytest.raises(IndexError):
        process[3]
    with pytest.raises(TypeError, match="x must be float32"):
        process[-1].noisy_input(X.long(), NOISE)
