"""Elbo and image-chain estimators against explicit loops, and all three estimators on a Gaussian
whose exact denoiser is known.
"""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
)
from torch.distributions import Normal

from genrep_fast import ChainBank
from genrep_fast.reference.reverse_step import INITIAL_ROW, chain_noise
from genrep_fast.scoring.estimators import (
    ElboEstimator,
    ImageChainEstimator,
    denoise_classes,
    training_target,
)

SHAPE, NUM_CLASSES = (1, 4, 3), 3


def toy_denoiser(x_t, timesteps, labels):
    """A smooth function of everything that it is given, in the precision of x_t."""
    phase = (labels.to(x_t.dtype) + 1) * 0.7 + timesteps.to(x_t.dtype) / 300
    return torch.sin(x_t * 1.3 + phase.view(-1, *[1] * (x_t.ndim - 1)))


def images(count, dtype=torch.float64):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(count), dtype=dtype)


def no_clipping(cls, **options):
    return cls(clip_sample=False, **options)


def test_a_scheduler_without_noise_levels_is_refused():
    with pytest.raises(TypeError, match="ScoreSdeVeScheduler predicts the score"):
        ElboEstimator(toy_denoiser, ScoreSdeVeScheduler(), NUM_CLASSES)


def test_an_image_chain_needs_the_levels_of_ddpm():
    with pytest.raises(
        TypeError, match="scheduler must have alphas_cumprod.* got FlowMatchEulerDiscreteScheduler"
    ):
        ImageChainEstimator(toy_denoiser, FlowMatchEulerDiscreteScheduler(), NUM_CLASSES)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("num_steps", [1, 7])
def test_elbo_equals_an_explicit_loop(prediction_type, num_steps):
    scheduler = no_clipping(DDPMScheduler, prediction_type=prediction_type)
    x = images(5)
    estimator = ElboEstimator(toy_denoiser, scheduler, NUM_CLASSES, num_steps=num_steps, seed=11)
    expected = torch.zeros(5, NUM_CLASSES, dtype=torch.float64)
    for step in range(num_steps):
        timestep = int((step + 0.5) * 1000 / num_steps)
        alpha_bar = scheduler.alphas_cumprod[timestep].double().item()
        noise = chain_noise(11, torch.zeros(1, dtype=torch.int64), step, SHAPE)[0]
        for i in range(5):
            x_t = math.sqrt(alpha_bar) * x[i] + math.sqrt(1 - alpha_bar) * noise
            target = {
                "epsilon": noise,
                "sample": x[i],
                "v_prediction": math.sqrt(alpha_bar) * noise - math.sqrt(1 - alpha_bar) * x[i],
            }[prediction_type]
            for label in range(NUM_CLASSES):
                output = toy_denoiser(x_t[None], torch.tensor([timestep]), torch.tensor([label]))[0]
                expected[i, label] -= ((target - output) ** 2).sum() / num_steps
    actual = estimator.log_likelihood(x)
    assert actual.shape == (5, NUM_CLASSES)
    # The scheduler adds noise by its float32 table; sums are about 10.
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-5)
    assert estimator.evaluations == 5 * NUM_CLASSES * num_steps


def test_elbo_of_an_image_does_not_depend_on_its_batch():
    x = images(6, torch.float32)
    estimator = ElboEstimator(
        toy_denoiser, no_clipping(DDPMScheduler), NUM_CLASSES, num_steps=5, seed=2
    )
    together = estimator.log_likelihood(x)
    torch.testing.assert_close(
        torch.cat([estimator.log_likelihood(image[None]) for image in x]),
        together,
        rtol=1e-6,
        atol=1e-6,
    )
    assert estimator.evaluations == 2 * 6 * NUM_CLASSES * 5
    other_seed = ElboEstimator(
        toy_denoiser, no_clipping(DDPMScheduler), NUM_CLASSES, num_steps=5, seed=3
    )
    assert (other_seed.log_likelihood(x) - together).abs().min() > 1e-4


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_elbo_refuses_steps_that_the_schedule_does_not_have(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be between 1 and 1000, got {num_steps}"):
        ElboEstimator(toy_denoiser, no_clipping(DDPMScheduler), NUM_CLASSES, num_steps=num_steps)


@pytest.mark.parametrize("num_steps", [1, 10, 40])
def test_elbo_steps_are_the_midpoints_of_equal_parts(num_steps):
    scheduler = no_clipping(DDPMScheduler, num_train_timesteps=40)
    timesteps = ElboEstimator(toy_denoiser, scheduler, NUM_CLASSES, num_steps=num_steps).timesteps
    width = 40 // num_steps
    assert timesteps.tolist() == [part * width + width // 2 for part in range(num_steps)]


@pytest.mark.parametrize(
    ("center", "burn_in", "thin", "variance_type"),
    [
        ("mean", 0, 1, "fixed_small"),
        ("mean", 2, 2, "fixed_large"),
        ("sample", 0, 1, "fixed_large"),
        ("sample", 2, 2, "fixed_small"),
    ],
)
def test_image_chain_equals_an_explicit_loop(monkeypatch, center, burn_in, thin, variance_type):
    scheduler = no_clipping(DDPMScheduler, variance_type=variance_type, prediction_type="sample")
    x, floor, seed = images(4), 0.3, 5
    options = {"num_inference_steps": 10, "start": 0.6, "burn_in": burn_in, "thin": thin}
    estimator = ImageChainEstimator(
        toy_denoiser, scheduler, NUM_CLASSES, center=center, sigma_floor=floor, seed=seed, **options
    )

    reference = no_clipping(DDPMScheduler, variance_type=variance_type, prediction_type="sample")
    reference.set_timesteps(10)
    timesteps = [500, 400, 300, 200, 100, 0]
    alpha_bar = reference.alphas_cumprod[500].double().item()
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: torch.zeros(())
    )
    expected = torch.empty(4, NUM_CLASSES, dtype=torch.float64)
    for i in range(4):
        for label in range(NUM_CLASSES):
            chain = torch.tensor([i * NUM_CLASSES + label])
            x_t = (
                math.sqrt(alpha_bar) * x[i]
                + math.sqrt(1 - alpha_bar) * chain_noise(seed, chain, INITIAL_ROW, SHAPE)[0]
            )
            components = []
            for position, timestep in enumerate(timesteps):
                output = toy_denoiser(x_t[None], torch.tensor([timestep]), torch.tensor([label]))[0]
                # Its noise is zero: prev_sample is the mean.
                step = reference.step(output, timestep, x_t)
                std = reference._get_variance(timestep).double().sqrt()
                if position >= burn_in and (position - burn_in) % thin == 0:
                    middle = step.prev_sample if center == "mean" else step.pred_original_sample
                    components.append(Normal(middle, std.clamp(min=floor)).log_prob(x[i]).sum())
                x_t = (
                    step.prev_sample
                    + (timestep > 0) * std * chain_noise(seed, chain, position, SHAPE)[0]
                )
            expected[i, label] = torch.stack(components).logsumexp(0) - math.log(len(components))
    actual = estimator.log_likelihood(x)
    # The tables are float32; log-likelihoods are about −20 to −200.
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)
    assert estimator.evaluations == 4 * NUM_CLASSES * 6


def test_image_chain_needs_a_step_to_keep():
    with pytest.raises(
        ValueError, match="burn_in must be less than the 5 steps below start = 0.5, got 5"
    ):
        ImageChainEstimator(
            toy_denoiser, no_clipping(DDPMScheduler), NUM_CLASSES, num_inference_steps=10, burn_in=5
        )


def test_image_chain_leaves_the_scheduler_alone():
    scheduler = no_clipping(DDPMScheduler)
    ImageChainEstimator(
        toy_denoiser, scheduler, NUM_CLASSES, num_inference_steps=10, sigma_floor=0.1
    )
    assert len(scheduler.timesteps) == 1000


def test_denoise_classes_pairs_every_image_with_every_class():
    seen = []

    def denoiser(x_t, timesteps, labels):
        seen.append((x_t.shape, timesteps.tolist(), labels.tolist()))
        return x_t * 10 + labels.view(-1, 1, 1, 1)

    x = images(2)
    output = denoise_classes(denoiser, x[:, None], torch.tensor(7), NUM_CLASSES)
    assert seen == [((6, *SHAPE), [7] * 6, [0, 1, 2, 0, 1, 2])]
    for label in range(NUM_CLASSES):
        assert torch.equal(output[:, label], x * 10 + label)


def test_training_target_refuses_an_unknown_prediction_type():
    scheduler = no_clipping(DDPMScheduler)
    scheduler.register_to_config(prediction_type="score")
    with pytest.raises(
        ValueError,
        match="prediction_type must be 'epsilon', 'v_prediction' or 'sample', got 'score'",
    ):
        training_target(scheduler, images(1), images(1), torch.tensor([3]))


class GaussianClasses:
    """Data N(μ_y, s²·I), whose exact denoiser is E[ε | x_t, y] = σ·(x_t − α·μ_y) / (α²·s² + σ²)."""

    std, shape = 0.4, (1, 6, 6)

    def __init__(self, scheduler):
        generator = torch.Generator().manual_seed(0)
        self.alphas_cumprod = scheduler.alphas_cumprod
        self.means = 0.6 * torch.randn(NUM_CLASSES, *self.shape, generator=generator)
        self.labels = torch.arange(60) % NUM_CLASSES
        self.x = self.means[self.labels] + self.std * torch.randn(
            60, *self.shape, generator=generator
        )

    def denoiser(self, x_t, timesteps, labels):
        alpha_bar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        scale = (1 - alpha_bar).sqrt() / (alpha_bar * self.std**2 + 1 - alpha_bar)
        return scale * (x_t - alpha_bar.sqrt() * self.means[labels])


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("estimator", ["elbo", "image_chain", "bank"])
def test_every_estimator_recognises_gaussian_classes(estimator, scheduler_class):
    scheduler = no_clipping(scheduler_class)
    data = GaussianClasses(scheduler)
    if estimator == "elbo":
        scores = ElboEstimator(data.denoiser, scheduler, NUM_CLASSES, num_steps=8).log_likelihood(
            data.x
        )
    elif estimator == "image_chain":
        scores = ImageChainEstimator(
            data.denoiser, scheduler, NUM_CLASSES, center="sample", sigma_floor=0.3
        ).log_likelihood(data.x)
    else:
        options = {
            "num_inference_steps": 20,
            "chains": 8,
            "burn_in": 5,
            "center": "sample",
            "sigma_floor": 0.3,
            "seed": 0,
        }
        scores = ChainBank.build(
            data.denoiser, scheduler, NUM_CLASSES, data.shape, **options
        ).log_likelihood(data.x)
    exact = Normal(data.means, data.std).log_prob(data.x[:, None]).flatten(2).sum(2)
    assert torch.equal(exact.argmax(1), data.labels)  # classes that lie apart
    assert torch.equal(scores.argmax(1), data.labels)
