"""DiffusionClassifier.from_pipeline, against loops written with each pipeline's own modules."""

import copy
import inspect
import math
import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline

import genrep_fast as gf
from genrep_fast.reference.reverse_step import chain_noise
from genrep_fast.scoring.classifier.strategies import low_discrepancy_order

pytest.importorskip("transformers")
import tiny_pipelines  # noqa: E402

FAMILIES = tuple(tiny_pipelines.BUILDERS)
PROMPTS = ["a cat", ["a dog", "sun", "bed"], "a sea"]
QUIET = {"progress": False}
STEPS, SEED = 3, 5
# What SanaPipeline takes by default.
SANA_INSTRUCTION = (
    inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A function that gives the folder of a saved pipeline."""
    found = {}

    def folder(family):
        if family not in found:
            found[family] = tmp_path_factory.mktemp(family)
            tiny_pipelines.save_pipeline(family, found[family])
        return found[family]

    return folder


@pytest.fixture
def pipe_of(folders):
    """A function that loads a pipeline of a family, a new one every time."""
    return lambda family: tiny_pipelines.load_pipeline(folders(family))


@pytest.fixture
def pipe(pipe_of):
    return pipe_of("StableDiffusionPipeline")


def pictures(count=3, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(count, 3, size, size, generator=generator) - 1


# The plain loops: latents, noise levels and the network's output, as each pipeline has them.


def plain_latents(pipe, images):
    config = pipe.vae.config
    encoded = pipe.vae.encode(images)
    latents = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    if getattr(config, "latents_mean", None) is not None:
        mean, std = (torch.tensor(config[f"latents_{name}"]) for name in ("mean", "std"))
        mean, std = mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
        return (latents - mean) * config.scaling_factor / std
    return (latents - (getattr(config, "shift_factor", None) or 0)) * config.scaling_factor


def plain_steps(pipe, steps):
    """Timesteps, α and σ, at the midpoints of equal parts of the training timesteps."""
    rows = ((torch.arange(steps) + 0.5) * (1000 / steps)).long()
    scheduler = pipe.scheduler
    if hasattr(scheduler, "alphas_cumprod") and not scheduler.config.get("use_flow_sigmas"):
        alphas = scheduler.alphas_cumprod.double()[rows]
        return rows, alphas.sqrt(), (1 - alphas).sqrt()
    sigma = (rows + 1).double() / 1000
    if scheduler.config.get("use_dynamic_shifting"):
        # Of 4,096 tokens.
        sigma = scheduler.time_shift(scheduler.config.max_shift, 1.0, sigma)
    else:
        shift = scheduler.config.get("flow_shift") or scheduler.config.shift
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return (sigma * 1000).float(), 1 - sigma, sigma


def plain_target(pipe, x, noise, alpha, sigma):
    kind = pipe.scheduler.config.get("prediction_type") or "flow_prediction"
    return {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * x,
        "flow_prediction": noise - x,
    }[kind]


def predict_stable_diffusion(pipe, x, t, prompt):
    states, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    return pipe.unet(x, t, encoder_hidden_states=states).sample


def predict_stable_diffusion_xl(pipe, x, t, prompt):
    if prompt:
        states, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    else:
        _, states, _, pooled = pipe.encode_prompt("a cat", do_classifier_free_guidance=True)
    time_ids = pipe._get_add_time_ids((16, 16), (0, 0), (16, 16), x.dtype, 12)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    return pipe.unet(x, t, encoder_hidden_states=states, added_cond_kwargs=added).sample


def predict_stable_diffusion_3(pipe, x, t, prompt):
    states, _, pooled, _ = pipe.encode_prompt(
        prompt, prompt, prompt, do_classifier_free_guidance=False
    )
    return pipe.transformer(x, states, pooled, t).sample


def predict_flux(pipe, x, t, prompt):
    states, pooled, text_ids = pipe.encode_prompt(prompt, prompt)
    image_ids = pipe._prepare_latent_image_ids(1, 4, 4, "cpu", x.dtype)
    output = pipe.transformer(
        hidden_states=pipe._pack_latents(x, 1, 4, 8, 8),
        timestep=t / 1000,
        guidance=torch.tensor([1.0]),
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=text_ids,
        img_ids=image_ids,
    ).sample
    return pipe._unpack_latents(output, 16, 16, pipe.vae_scale_factor)


def predict_pixart(pipe, x, t, prompt):
    states, mask, _, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    added = {"resolution": None, "aspect_ratio": None}
    if type(pipe).__name__ == "PixArtAlphaPipeline":
        added = {"resolution": torch.tensor([[16.0, 16]]), "aspect_ratio": torch.tensor([[1.0]])}
    return pipe.transformer(
        x, states, timestep=t, added_cond_kwargs=added, encoder_attention_mask=mask
    ).sample


def predict_sana(pipe, x, t, prompt):
    states, mask, negative, negative_mask = pipe.encode_prompt(
        prompt, complex_human_instruction=SANA_INSTRUCTION
    )
    if not prompt:
        states, mask = negative, negative_mask
    return pipe.transformer(x, states, t, encoder_attention_mask=mask).sample


def predict_dit(pipe, x, t, prompt):
    label = pipe.get_label_ids([prompt]) if prompt else [5]
    return pipe.transformer(x, t, torch.tensor(label)).sample


PREDICT = {
    "StableDiffusionPipeline": predict_stable_diffusion,
    "StableDiffusionXLPipeline": predict_stable_diffusion_xl,
    "StableDiffusion3Pipeline": predict_stable_diffusion_3,
    "FluxPipeline": predict_flux,
    "PixArtAlphaPipeline": predict_pixart,
    "PixArtSigmaPipeline": predict_pixart,
    "SanaPipeline": predict_sana,
    "DiTPipeline": predict_dit,
}


@torch.no_grad()
def plain_errors(pipe, images, prompts, steps=STEPS, seed=SEED):
    """‖target − output‖² of every image, step and prompt, one row at a time, float64 [B, S, P]."""
    predict = PREDICT[type(pipe).__name__]
    latents = plain_latents(pipe, images)
    timesteps, alphas, sigmas = plain_steps(pipe, steps)
    errors = torch.zeros(len(images), steps, len(prompts), dtype=torch.float64)
    for image, x in enumerate(latents[:, None]):
        for step, (t, alpha, sigma) in enumerate(zip(timesteps, alphas, sigmas, strict=True)):
            ids = torch.tensor([image]), torch.tensor([step])
            noise = chain_noise(seed, *ids, x.shape[1:])
            noisy = (alpha * x + sigma * noise).float()
            target = plain_target(pipe, x, noise, alpha, sigma)
            for place, prompt in enumerate(prompts):
                output = predict(pipe, noisy, t[None], prompt)[:, :4]
                errors[image, step, place] = ((target - output) ** 2).sum()
    return errors


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_and_a_plain_loop_agree(family, pipe_of):
    pipe, images = pipe_of(family), pictures()
    classifier = gf.DiffusionClassifier.from_pipeline(pipe, PROMPTS, batch_size=7)
    result = classifier(images, strategy=gf.Full(STEPS), seed=SEED, **QUIET)
    flat = ["a cat", "a dog", "sun", "bed", "a sea", ""]
    errors = plain_errors(pipe, images, flat).mean(1)
    of_class = torch.stack([errors[:, 0], errors[:, 1:4].mean(1), errors[:, 4]], 1)
    # The network listens to its prompt, and not by accident.
    assert (of_class.std(1) / of_class.mean(1)).min() > 1e-4
    torch.testing.assert_close(result.log_likelihood.double(), -of_class, rtol=1e-5, atol=0)
    # Differences of errors have the errors' rounding.
    bound = {"rtol": 0, "atol": 1e-5 * errors.mean().item()}
    posterior = (-of_class).log_softmax(1)
    torch.testing.assert_close(result.posterior.double(), posterior, **bound)
    torch.testing.assert_close(result.lift.double(), errors[:, 5:] - of_class, **bound)
    assert result.evaluations.tolist() == [STEPS * 6] * 3
