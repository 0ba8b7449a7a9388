"""Denoisers as diffusers has them: what their models return, and what is none."""

import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

import genrep_fast as gf
from genrep_fast.models.genrep import GenRepOutput
from genrep_fast.scoring.estimators import ElboEstimator, ImageChainEstimator

CLASSES, SHAPE = 3, (1, 8, 8)


def plain(x, timesteps, labels):
    return 0.1 * x + labels.reshape(-1, 1, 1, 1).to(x.dtype)


def bank(denoiser):
    return gf.ChainBank.build(
        denoiser,
        DDPMScheduler(10, clip_sample=False),
        CLASSES,
        SHAPE,
        num_inference_steps=4,
        chains=1,
        burn_in=1,
        thin=1,
        sigma_floor=0.3,
        seed=0,
    )


def estimates(denoiser):
    scheduler, x = DDPMScheduler(10, clip_sample=False), torch.ones(2, *SHAPE)
    kept = bank(denoiser)
    kept.refresh(denoiser)
    return (
        kept.log_likelihood(x),
        ElboEstimator(denoiser, scheduler, CLASSES, num_steps=2).log_likelihood(x),
        ImageChainEstimator(
            denoiser, scheduler, CLASSES, num_inference_steps=4, sigma_floor=0.3
        ).log_likelihood(x),
    )


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda output: UNet2DOutput(sample=output),
        lambda output: GenRepOutput(sample=output, log_std_shift=None, features=None),
        lambda output: (output,),
        lambda output: [output, None],
    ],
)
def test_an_output_object_is_its_sample(wrapped):
    expected = estimates(plain)
    given = estimates(lambda *arguments: wrapped(plain(*arguments)))
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


def test_diffusers_models_are_denoisers():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        num_class_embeds=CLASSES,
    ).eval()
    transformer = DiTTransformer2DModel(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=1,
        out_channels=2,
        num_layers=1,
        norm_num_groups=4,
        sample_size=8,
        num_embeds_ada_norm=CLASSES,
    ).eval()
    for model in (unet, transformer):
        given = estimates(model)
        expected = estimates(lambda *arguments, model=model: model(*arguments).sample)
        torch.testing.assert_close(given, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda x: None, TypeError, "denoiser must return a tensor, .* got NoneType"),
        (lambda x: (), TypeError, "denoiser must return a tensor, .* got tuple"),
        (lambda x: {"sample": x}, TypeError, "denoiser must return a tensor, .* got dict"),
        (lambda x: ("x", x), TypeError, "denoiser must return a tensor, .* got tuple"),
        (lambda x: torch.distributions.Normal(x, 1), TypeError, "must return .* got Normal"),
        (lambda x: x.numpy(), TypeError, "denoiser must return a tensor, .* got ndarray"),
        (lambda x: x.long(), TypeError, "denoiser's output must be float32"),
        (lambda x: x.to_sparse(), ValueError, "denoiser's output must be dense"),
        (lambda x: x[:, :, :4], ValueError, "denoiser must return .* up to further channels"),
        (lambda x: x[:1], ValueError, "denoiser must return .* up to further channels"),
        (lambda x: x[:, 0], ValueError, "denoiser must return .* up to further channels"),
    ],
)
@pytest.mark.parametrize("number", range(3))
def test_what_no_denoiser_returns_is_refused(returned, error, message, number):
    scheduler, x = DDPMScheduler(10, clip_sample=False), torch.ones(2, *SHAPE)

    def denoiser(x_t, timesteps, labels):
        return returned(x_t)

    calls = (
        lambda: bank(denoiser),
        lambda: ElboEstimator(denoiser, scheduler, CLASSES, num_steps=2).log_likelihood(x),
        lambda: ImageChainEstimator(
            denoiser, scheduler, CLASSES, num_inference_steps=4, sigma_floor=0.3
        ).log_likelihood(x),
    )
    with pytest.raises(error, match=message):
        calls[number]()


@pytest.mark.parametrize(
    "make",
    [
        lambda: bank(None),
        lambda: ElboEstimator(None, DDPMScheduler(10), CLASSES),
        lambda: ImageChainEstimator(None, DDPMScheduler(10), CLASSES),
    ],
)
def test_what_cannot_be_called_is_refused(make):
    with pytest.raises(TypeError, match="denoiser must be callable, got NoneType"):
        make()
