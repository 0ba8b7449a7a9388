"""VAEs as diffusers' pipelines use them: scales of latents, float16, and what is refused."""

import copy
import json

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, VQModel

from genrep_fast.models import GenRep, GenRepPipeline

MEAN, STD = (0.5, -0.5, 0.2, 0.1), (2.0, 3.0, 1.0, 0.5)


def build_vae(**options):
    torch.manual_seed(1)
    return AutoencoderKL(
        **{
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (4, 8),
            "norm_num_groups": 4,
            "latent_channels": 4,
            "sample_size": 16,
            "scaling_factor": 0.36,
            **options,
        }
    ).eval()


def overflowing(vae):
    """A VAE like SDXL's: what passes through it is beyond float16, its results are not."""
    with torch.no_grad():
        for network in (vae.encoder, vae.decoder):
            network.conv_in.weight *= 3e5
            network.conv_in.bias *= 3e5
    return vae


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def make_pipeline(model):
    pipeline = GenRepPipeline(model=model, scheduler=DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def channels(values):
    return torch.tensor(values)[:, None, None]


SCALES = {
    "scaling_factor": ({}, lambda z: z * 0.36, lambda x: x / 0.36),
    "no shift": ({"shift_factor": 0.0}, lambda z: z * 0.36, lambda x: x / 0.36),
    "shift_factor": (
        {"shift_factor": 0.9},
        lambda z: (z - 0.9) * 0.36,
        lambda x: x / 0.36 + 0.9,
    ),
    "mean and std": (
        {"latents_mean": MEAN, "latents_std": STD},
        lambda z: (z - channels(MEAN)) * 0.36 / channels(STD),
        lambda x: x * channels(STD) / 0.36 + channels(MEAN),
    ),
    "nested lists": (
        {"latents_mean": [[[[m]] for m in MEAN]], "latents_std": list(STD)},
        lambda z: (z - channels(MEAN)) * 0.36 / channels(STD),
        lambda x: x * channels(STD) / 0.36 + channels(MEAN),
    ),
    "no quant_conv": (
        {"shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False},
        lambda z: (z - 0.1) * 0.36,
        lambda x: x / 0.36 + 0.1,
    ),
}


@pytest.mark.parametrize("scale", SCALES)
def test_latents_are_those_of_diffusers_pipelines(tiny_model, tmp_path, images, scale):
    options, normalise, denormalise = SCALES[scale]
    vae = build_vae(**options)
    tiny_model("dit", vae=vae).save_pretrained(tmp_path)
    for model in (tiny_model("dit", vae=vae), GenRep.from_pretrained(tmp_path)):
        with torch.no_grad():
            latents = normalise(vae.encode(images).latent_dist.mode())
            decoded = vae.decode(denormalise(latents)).sample.clamp(-1, 1)
        torch.testing.assert_close(model.encode(images), latents, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.decode(latents), decoded, rtol=0, atol=1e-5)
        pipeline = make_pipeline(model)
        assert pipeline(images).probabilities.isfinite().all()
        pictures = pipeline.generate([0, 2], num_inference_steps=2)
        assert [picture.size for picture in pictures.images] == [(16, 16)] * 2


BAD_SCALES = [
    ({"shift_factor": 0.5, "latents_mean": MEAN, "latents_std": STD}, "got both, shift_factor 0.5"),
    ({"latents_mean": MEAN}, "go together, got latents_mean alone"),
    ({"latents_std": STD}, "go together, got latents_std alone"),
    ({"latents_mean": MEAN[:3], "latents_std": STD}, "latents_mean must be 4 numbers"),
    ({"latents_mean": MEAN, "latents_std": (1.0, 0.0, 1.0, 1.0)}, "latents_std must be 4 numbers"),
    ({"latents_mean": "none", "latents_std": STD}, "latents_mean must be 4 numbers"),
    ({"scaling_factor": 0.0}, "scaling_factor must be a positive number, got 0.0"),
    ({"scaling_factor": None}, "scaling_factor must be a positive number, got None"),
    ({"shift_factor": "0.1"}, "shift_factor must be a number or None, got '0.1'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_SCALES)
def test_scales_that_diffusers_would_ignore_are_refused(tiny_model, options, message):
    with pytest.raises(ValueError, match=f"vae: .*{message}"):
        tiny_model("dit", vae=build_vae(**options))


def test_vaes_of_other_classes_and_latents_are_refused(tiny_backbone, tmp_path):
    backbone = tiny_backbone("dit", channels=4)
    for vae in (AutoencoderTiny(), VQModel(norm_num_groups=32, block_out_channels=(32,))):
        name = type(vae).__name__
        with pytest.raises(TypeError, match=f"vae must be an AutoencoderKL, got {name}"):
            GenRep.from_backbone(backbone, 3, vae=vae)
        vae.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"vae must be an AutoencoderKL, got '{name}'"):
            GenRep.from_backbone(backbone, 3, vae=tmp_path / name)
    with pytest.raises(ValueError, match="latent_channels must be .* in_channels = 4, got 16"):
        GenRep.from_backbone(backbone, 3, vae=build_vae(latent_channels=16))


@pytest.mark.parametrize("config", ["[]", "{", "{}", '"AutoencoderKL"'])
def test_a_damaged_configuration_is_one_error(tiny_backbone, tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=r"vae|config\.json"):
        GenRep.from_backbone(tiny_backbone("dit", channels=4), 3, vae=tmp_path)


def test_half_precision_of_a_vae_that_wants_float32(tiny_model, images):
    model = tiny_model("dit", active=True, vae=overflowing(build_vae(shift_factor=0.1)))
    expected = model.encode(images)
    decoded = model.decode(expected)
    half = copy.deepcopy(model).half()
    held = {name: tensor.clone() for name, tensor in half.vae.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in half.vae.parameters()]
    latents = half.encode(images)
    assert latents.dtype == torch.float16
    torch.testing.assert_close(latents.float(), expected, rtol=1e-2, atol=1e-2)
    assert half.decode(latents).dtype == torch.float16
    torch.testing.assert_close(half.decode(latents).float(), decoded, rtol=0, atol=0.05)
    for name, tensor in half.vae.state_dict().items():
        assert torch.equal(tensor, held[name]) and tensor.dtype == torch.float16
    assert [parameter.data_ptr() for parameter in half.vae.parameters()] == pointers
    pipeline = make_pipeline(half)
    assert pipeline(images).probabilities.isfinite().all()
    assert (
        pipeline.generate([0, 1], num_inference_steps=2, output_type="pt").images.isfinite().all()
    )


def test_half_precision_keeps_tiling_and_slicing(tiny_model):
    model = tiny_model("dit", vae=overflowing(build_vae())).half()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    whole = model.encode(images)
    model.vae.enable_slicing()
    torch.testing.assert_close(model.encode(images), whole, rtol=1e-3, atol=1e-3)
    model.vae.enable_tiling()
    assert not torch.equal(model.encode(images), whole)
    assert model.encode(images).isfinite().all() and model.decode(whole).isfinite().all()


def test_a_vae_alone_in_float32_serves_a_half_model(tiny_model, images):
    model = tiny_model("dit", vae=build_vae())
    expected = model.encode(images)
    model.half()
    model.vae.float()
    assert model.encode(images).dtype == torch.float16 and model.vae.dtype == torch.float32
    torch.testing.assert_close(model.encode(images).float(), expected, rtol=1e-2, atol=1e-2)
    assert make_pipeline(model)(images).logits.dtype == torch.float16


@pytest.mark.parametrize("mean", [None, MEAN])
def test_bfloat16(tiny_model, images, mean):
    vae = build_vae(latents_mean=mean, latents_std=mean and STD)
    model = tiny_model("dit", vae=vae)
    expected = model.encode(images)
    model.to(torch.bfloat16)
    latents = model.encode(images)
    assert latents.dtype == model.decode(latents).dtype == torch.bfloat16
    torch.testing.assert_close(latents.float(), expected, rtol=0.1, atol=0.1)
    pictures = make_pipeline(model).generate([0, 1], num_inference_steps=2).images
    assert [picture.size for picture in pictures] == [(16, 16)] * 2


def test_autocast_to_half_precision_spares_the_vae(tiny_model, images):
    model = tiny_model("dit", vae=overflowing(build_vae()))
    expected = model.encode(images)
    with torch.autocast("cpu", dtype=torch.float16):
        latents = model.encode(images)
        decoded = model.decode(latents)
    assert latents.dtype == torch.float32 and torch.equal(latents, expected)
    assert torch.equal(decoded, model.decode(expected))


def test_what_is_not_finite_is_one_error(tiny_model, images):
    model = tiny_model("dit", vae=overflowing(build_vae(force_upcast=False)))
    latents = model.encode(images)
    model.half()
    pipeline = make_pipeline(model)
    for call in (model.encode, pipeline):
        with pytest.raises(
            FloatingPointError,
            match="AutoencoderKL in float16 gives latents that are not finite; set its force_up",
        ):
            call(images)
    with pytest.raises(FloatingPointError, match="AutoencoderKL in float16 gives images"):
        model.decode(latents)
    with pytest.raises(FloatingPointError, match="float16"):
        pipeline.generate([0], num_inference_steps=1)
    images[1, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="images must be finite"):
        pipeline(images)


def test_pixels_and_networks_that_are_not_finite(tiny_model):
    pipeline = make_pipeline(tiny_model("unet"))
    images = torch.zeros(2, 1, 8, 8)
    images[0, 0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="images must be finite"):
        pipeline(images)
    torch.nn.init.constant_(pipeline.model.backbone.conv_in.bias, torch.nan)
    with pytest.raises(FloatingPointError, match="logits in float32 are not finite"):
        pipeline(torch.zeros(2, 1, 8, 8))
    with pytest.raises(FloatingPointError, match="in float32 is not finite at timestep 0"):
        pipeline.generate([0], num_inference_steps=1)


def test_saved_configurations_keep_what_scales_latents(tiny_model, tmp_path):
    tiny_model("dit", vae=build_vae(shift_factor=0.9)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config["vae_config"]["shift_factor"] == 0.9
    config["vae_config"]["_class_name"] = "AutoencoderKLWan"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vae must be an AutoencoderKL, got 'AutoencoderKLWan'"):
        GenRep.from_pretrained(tmp_path)
