"""GenRepPipeline: classifying, generating against diffusers' own schedulers, saving and loading."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from genrep_fast import GenRepPipeline
from genrep_fast.data import image_to_tensor
from genrep_fast.reference.reverse_step import INITIAL_ROW, chain_noise

KINDS = ("unet", "dit")
LABELS = [2, 0, 1, 1, 2]


def schedulers():
    return {
        "ddpm": DDPMScheduler(clip_sample=False),
        "ddpm fixed_large": DDPMScheduler(
            clip_sample=False, variance_type="fixed_large", prediction_type="v_prediction"
        ),
        "ddpm learned_range": DDPMScheduler(clip_sample=False, variance_type="learned_range"),
        "ddim": DDIMScheduler(clip_sample=False),
        "ddim sample": DDIMScheduler(
            clip_sample=False, prediction_type="sample", timestep_spacing="trailing"
        ),
        "flow": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


@pytest.fixture
def make_pipeline(tiny_model):
    def make(kind="unet", scheduler="ddim", **options):
        pipeline = GenRepPipeline(
            model=tiny_model(kind, **{"active": True, **options}), scheduler=schedulers()[scheduler]
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


def grey_image(side=8):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8))


def generate(pipeline, labels=LABELS, **options):
    return pipeline.generate(
        labels, **{"num_inference_steps": 5, "seed": 7, "output_type": "pt", **options}
    ).images


def unclamped(pipeline, monkeypatch, **options):
    """Generated latents before `decode` clamps them to the range of images."""
    monkeypatch.setattr(pipeline.model, "decode", lambda x: x)
    return generate(pipeline, **options)


@pytest.mark.parametrize(("kind", "latent"), [("unet", False), ("dit", False), ("dit", True)])
def test_save_and_load_give_the_same_bits(make_pipeline, tiny_vae, tmp_path, kind, latent):
    pipeline = make_pipeline(kind, "ddpm", vae=tiny_vae() if latent else None)
    pipeline.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {
        ".json",
        ".safetensors",
    }
    loaded = GenRepPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    images = torch.rand(3, *((3, 16, 16) if latent else (1, 8, 8))) * 2 - 1
    assert torch.equal(loaded(images).probabilities, pipeline(images).probabilities)
    assert torch.equal(generate(loaded), generate(pipeline))
    assert type(loaded.scheduler) is DDPMScheduler and loaded.scheduler.config.clip_sample is False


def test_loads_in_another_dtype_and_never_a_pickle(make_pipeline, tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    assert (
        GenRepPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16).model.dtype
        == torch.float16
    )
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        pipeline.model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    weights = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    torch.save(pipeline.model.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(OSError, match="safetensors"):
        GenRepPipeline.from_pretrained(tmp_path)


def test_a_directory_without_a_pipeline_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.model_index.json does not exist"):
        GenRepPipeline.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model_index.json", "[" * 100_000),
        ("model_index.json", '{"a": 1}'),
        ("scheduler/scheduler_config.json", "true"),
        ("scheduler/scheduler_config.json", "[" * 100_000),
        ("scheduler/scheduler_config.json", '{"beta_schedule": "none"}'),
        ("model/config.json", "7"),
        ("model/config.json", '{"num_classes": []}'),
    ],
)
def test_a_damaged_configuration_is_one_error(make_pipeline, tmp_path, file, content):
    make_pipeline().save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises((ValueError, OSError), match=str(tmp_path)):
        GenRepPipeline.from_pretrained(tmp_path)


def test_truncated_weights_are_one_error(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):
        GenRepPipeline.from_pretrained(tmp_path)


def test_incomplete_weights_are_one_error(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    save_file(
        {
            name: tensor
            for name, tensor in load_file(weights).items()
            if not name.startswith("head.")
        },
        weights,
    )
    with pytest.raises(
        ValueError, match=r"4 missing \(head.0.bias, head.0.weight, head.1.bias and 1 more\)"
    ):
        GenRepPipeline.from_pretrained(tmp_path)


def test_a_variant_is_loaded(make_pipeline, tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path, variant="fp16")
    loaded = GenRepPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert loaded.model.dtype == torch.float16
    for parameter, expected in zip(
        loaded.model.parameters(), pipeline.model.parameters(), strict=True
    ):
        assert torch.equal(parameter, expected.half())


@pytest.mark.parametrize("kind", KINDS)
def test_perceives_tensors(make_pipeline, kind):
    pipeline = make_pipeline(kind)
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    pipeline.model.train()
    result = pipeline(images)
    logits = pipeline.model.perceive(images).detach()
    torch.testing.assert_close(result.logits, logits)
    torch.testing.assert_close(
        result.probabilities.double(),
        logits.double().exp() / logits.double().exp().sum(1, keepdim=True),
    )
    assert not result.probabilities.requires_grad
    assert torch.equal(pipeline(images.double()).probabilities, result.probabilities)


def test_perceives_grey_pictures_of_any_mode_and_size(make_pipeline):
    pipeline = make_pipeline()
    picture = grey_image()
    tensor = torch.from_numpy(np.array(picture)).float()[None, None] / 127.5 - 1
    expected = pipeline(tensor).logits
    for mode in ("L", "RGB", "RGBA"):
        torch.testing.assert_close(
            pipeline(picture.convert(mode)).logits, expected, rtol=0, atol=1e-5
        )
    flat = Image.new("L", (8, 8), 200)
    result = pipeline(
        [
            picture,
            picture.resize((24, 24), Image.Resampling.NEAREST),
            flat.resize((13, 5)).convert("RGB"),
            flat,
        ]
    )
    assert result.probabilities.shape == (4, 3)
    torch.testing.assert_close(result.logits[2], result.logits[3], rtol=0, atol=1e-5)
    torch.testing.assert_close(result.logits[:1], expected, rtol=0, atol=1e-5)


def test_perceives_colour_pictures_at_the_size_of_the_vae(make_pipeline, tiny_vae):
    pipeline = make_pipeline("dit", vae=tiny_vae())
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).float()[None] / 127.5 - 1
    torch.testing.assert_close(
        pipeline(Image.fromarray(pixels)).logits, pipeline(tensor).logits, rtol=0, atol=1e-5
    )
    assert pipeline([grey_image(20), Image.fromarray(pixels)]).probabilities.shape == (2, 3)


def test_photographs_are_prepared_as_for_training(make_pipeline):
    pipeline = make_pipeline()
    photograph = Image.fromarray(
        np.random.default_rng(2).integers(0, 256, (20, 33), dtype=np.uint8)
    )
    turned = io.BytesIO()
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be turned clockwise
    photograph.transpose(Image.Transpose.ROTATE_90).save(turned, "png", exif=orientation)
    expected = pipeline(image_to_tensor(photograph, (8, 8), "L")[None]).logits
    for picture in (
        photograph,
        Image.open(turned),
        Image.fromarray(np.asarray(photograph).astype(np.uint16) * 257),
    ):
        torch.testing.assert_close(pipeline(picture).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (2, 3, 8, 8), (2, 1, 8, 9)])
def test_tensors_of_another_shape_are_refused(make_pipeline, shape):
    with pytest.raises(
        ValueError, match=r"images must be \[B, 1, 8, 8\], got \[" + ", ".join(map(str, shape))
    ):
        make_pipeline()(torch.zeros(shape))


def test_what_is_no_image_is_refused(make_pipeline):
    pipeline = make_pipeline()
    with pytest.raises(
        TypeError, match="images must be a floating-point tensor in .* got torch.uint8"
    ):
        pipeline(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="images"):
        pipeline([])
    with pytest.raises((TypeError, ValueError), match="[Ii]nput|images"):
        pipeline("digit.png")
    with pytest.raises(ValueError, match="images must have values"):
        pipeline(torch.zeros(2, 1, 8, 8, device="meta"))
    with pytest.raises(ValueError, match="images must be dense"):
        pipeline(torch.zeros(2, 1, 8, 8).to_sparse())


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [("unet", "ddpm learned_range"), *(("dit", name) for name in schedulers())],
)
def test_generation_equals_the_loop_of_diffusers(make_pipeline, monkeypatch, kind, scheduler):
    """The noise is injected where diffusers draws its own; a modulated std is a factor on it."""
    pipeline = make_pipeline(
        kind, scheduler, **({"out_channels": 2} if "learned" in scheduler else {})
    )
    model, reference = pipeline.model, schedulers()[scheduler]
    torch.nn.init.constant_(model.log_std_modulation[-1].bias, 0.3)
    # What an untrained network says may be anything; a learned variance far outside of its range
    # would overflow.
    model.register_forward_hook(
        lambda _, __, output: dataclasses.replace(output, sample=output.sample.tanh())
    )
    reference.set_timesteps(8)
    chain_ids = torch.arange(len(LABELS))
    x = chain_noise(7, chain_ids, INITIAL_ROW, (1, 8, 8)).float()
    injected = {}
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: injected["noise"]
    )
    with torch.no_grad():
        for row, timestep in enumerate(reference.timesteps):
            output = model(x, timestep, torch.tensor(LABELS))
            scale = output.log_std_shift.exp()[:, None, None, None]
            injected["noise"] = chain_noise(7, chain_ids, row, (1, 8, 8)).float() * scale
            x = reference.step(output.sample, timestep, x).prev_sample
    assert (scale - 1).abs().min() > 0.1
    actual = unclamped(pipeline, monkeypatch, num_inference_steps=8)
    torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-4)


def test_eta_adds_the_noise_of_ddim(make_pipeline, monkeypatch):
    pipeline = make_pipeline()
    reference = schedulers()["ddim"]
    reference.set_timesteps(5)
    chain_ids = torch.arange(len(LABELS))
    x = chain_noise(7, chain_ids, INITIAL_ROW, (1, 8, 8)).float()
    with torch.no_grad():
        for row, timestep in enumerate(reference.timesteps):
            output = pipeline.model(x, timestep, torch.tensor(LABELS))
            noise = (
                chain_noise(7, chain_ids, row, (1, 8, 8)).float()
                * output.log_std_shift.exp()[:, None, None, None]
            )
            x = reference.step(
                output.sample, timestep, x, eta=0.6, variance_noise=noise
            ).prev_sample
    torch.testing.assert_close(unclamped(pipeline, monkeypatch, eta=0.6), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "flow"])
def test_seed_and_place_alone_decide_an_image(make_pipeline, monkeypatch, scheduler):
    pipeline = make_pipeline("dit", scheduler)
    images = unclamped(pipeline, monkeypatch)
    torch.manual_seed(12345)
    assert torch.equal(generate(pipeline), images)
    assert (generate(pipeline, seed=8) - images).abs().amax((1, 2, 3)).min() > 0.1
    for others in ([2, 0], [2, 0, 0, 2, 0, 1, 1]):
        torch.testing.assert_close(
            generate(pipeline, labels=others)[:2], images[:2], rtol=1e-5, atol=1e-5
        )
    swapped = generate(pipeline, labels=[0, *LABELS[1:]])
    assert (swapped[0] - images[0]).abs().max() > 1e-3
    torch.testing.assert_close(swapped[1:], images[1:], rtol=1e-5, atol=1e-5)
    assert len(pipeline.scheduler.timesteps) == 1000  # the pipeline's own scheduler stays as it is


def test_outputs_are_pictures_or_tensors(make_pipeline, tiny_vae):
    pipeline = make_pipeline()
    tensor = generate(pipeline)
    assert tensor.shape == (5, 1, 8, 8) and tensor.abs().max() <= 1
    pictures = generate(pipeline, output_type="pil")
    assert [(picture.mode, picture.size) for picture in pictures] == [("L", (8, 8))] * 5
    pixels = torch.from_numpy(np.stack([np.array(picture) for picture in pictures])).float()
    torch.testing.assert_close(pixels / 127.5 - 1, tensor[:, 0], rtol=0, atol=0.51 / 127.5)
    latent = make_pipeline("dit", vae=tiny_vae())
    assert generate(latent).shape == (5, 3, 16, 16)
    assert [
        (picture.mode, picture.size)
        for picture in generate(latent, labels=torch.tensor([1]), output_type="pil")
    ] == [("RGB", (16, 16))]


@pytest.mark.parametrize("labels", [[3], [0, -1], [], [[0, 1]], 1])
def test_bad_labels_are_refused(make_pipeline, labels):
    with pytest.raises(ValueError, match="labels must be"):
        generate(make_pipeline(), labels=labels)


def test_other_bad_arguments_are_refused(make_pipeline):
    pipeline = make_pipeline(scheduler="ddpm")
    with pytest.raises(ValueError, match="labels must have values"):
        generate(pipeline, labels=torch.tensor([1], device="meta"))
    with pytest.raises(ValueError, match="labels must be dense"):
        generate(pipeline, labels=torch.tensor([1]).to_sparse())
    with pytest.raises(TypeError, match="labels must be integers, got torch.float32"):
        generate(pipeline, labels=[0.5])
    with pytest.raises(ValueError, match="output_type must be 'pil' or 'pt', got 'np'"):
        generate(pipeline, output_type="np")
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        generate(pipeline, num_inference_steps=0)
    with pytest.raises(ValueError, match="eta does not exist for DDPMScheduler"):
        generate(pipeline, eta=0.5)
    pipeline.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="clip_sample=True"):
        generate(pipeline)


def test_the_index_names_the_classes(make_pipeline, tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "GenRepPipeline" and index["model"][1] == "GenRep"
