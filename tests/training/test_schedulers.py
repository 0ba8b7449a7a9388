"""`genrep train --scheduler FOLDER`: which schedulers are taken, as what, and which are refused."""

import json

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler

from genrep_fast.training import TrainingConfig
from genrep_fast.training.networks import build_scheduler

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def loaded(folder, config):
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "scheduler_config.json").write_text(text)
    return build_scheduler(TrainingConfig(scheduler=str(folder)))


def saved_scheduler(folder, name, **options):
    getattr(diffusers, name)(**options).save_pretrained(folder)
    return build_scheduler(TrainingConfig(scheduler=str(folder)))


def test_the_schedule_of_stable_diffusion(tmp_path):
    scheduler = loaded(tmp_path, STABLE_DIFFUSION)
    assert type(scheduler) is DDPMScheduler and not scheduler.config.clip_sample
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    levels = (1 - betas).cumprod(0)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), levels, rtol=1e-4, atol=1e-6)
    assert scheduler.config.prediction_type == "epsilon" and scheduler.config.steps_offset == 1


@pytest.mark.parametrize(
    "name",
    [
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}]
)
def test_schedulers_of_the_same_noise_are_taken(tmp_path, name, options):
    scheduler = saved_scheduler(tmp_path, name, **options)
    source = getattr(diffusers, name)(**options)
    assert type(scheduler) is DDPMScheduler and not scheduler.config.clip_sample
    torch.testing.assert_close(scheduler.alphas_cumprod, source.alphas_cumprod)
    assert scheduler.config.prediction_type == source.config.prediction_type


def test_what_a_file_leaves_out_is_the_default_of_its_class(tmp_path):
    scheduler = loaded(tmp_path, {"_class_name": "HeunDiscreteScheduler"})
    assert scheduler.config.beta_end == 0.012 != DDPMScheduler().config.beta_end


@pytest.mark.parametrize(
    "name",
    [
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        "ScoreSdeVeScheduler",
        "CMStochasticIterativeScheduler",
        "DDPMWuerstchenScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "VQDiffusionScheduler",
        "BananaScheduler",
        None,
        ["DDPMScheduler"],
    ],
)
def test_other_classes_are_refused_by_name(tmp_path, name):
    with pytest.raises(
        ValueError, match="is of a .*so one of DDPMScheduler, .* is wanted"
    ) as error:
        loaded(tmp_path, {"_class_name": name, "beta_schedule": "linear"})
    assert repr(name) in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "config", ["[]", "null", '"DDPMScheduler"', "{", "", "{}", '{"beta_start": 0.1}']
)
def test_damaged_files_are_one_error(tmp_path, config):
    with pytest.raises(ValueError, match="scheduler_config.json") as error:
        loaded(tmp_path, config)
    assert str(error.value).startswith(("scheduler: ", str(tmp_path)))


def test_a_folder_without_a_scheduler_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="scheduler: .*scheduler_config.json"):
        build_scheduler(TrainingConfig(scheduler=str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_schedule": "banana"}, "banana"),
        ({"prediction_type": "flow_prediction"}, "prediction_type .* got 'flow_prediction'"),
        ({"prediction_type": "noise"}, "prediction_type .* must be one of epsilon, v_prediction"),
        ({"variance_type": "learned"}, "variance_type .* got 'learned'"),
        ({"variance_type": "fixed_large_log"}, "variance_type .* got 'fixed_large_log'"),
        ({"timestep_spacing": "sideways"}, "timestep_spacing .* got 'sideways'"),
        ({"thresholding": True}, "thresholding=True"),
        ({"beta_end": 2.0}, "betas from 0 to 1"),
        ({"beta_start": "small"}, "noise schedule"),
        ({"num_train_timesteps": "many"}, "noise schedule"),
        ({"num_train_timesteps": 0}, "two at least"),
        ({"num_train_timesteps": 1}, "two at least"),
        ({"trained_betas": [0.1, 0.2]}, "must have 1000 noise levels"),
    ],
)
def test_options_that_training_does_not_have_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as error:
        loaded(tmp_path, {"_class_name": "DDPMScheduler", **options})
    assert str(error.value).startswith("scheduler: ")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}),
    ],
)
def test_flows_in_the_clothes_of_others_are_refused(tmp_path, name, options):
    with pytest.raises(ValueError, match="scheduler: "):
        loaded(tmp_path, {"_class_name": name, **options})


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_zero_terminal_snr_and_trained_betas_are_kept(tmp_path, name):
    options = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert saved_scheduler(tmp_path, name, **options).alphas_cumprod[-1] == 0
    betas = torch.linspace(0.001, 0.03, 1000).tolist()
    scheduler = saved_scheduler(tmp_path, name, trained_betas=betas)
    torch.testing.assert_close(scheduler.betas, torch.tensor(betas))
