"""What `generate` and `pipeline(images)` take and leave: modes, guidance, generators, batches,
names, half precision and schedulers.
"""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image

from genrep_fast.models import GenRepPipeline

LABELS = [2, 0, 1, 1, 2]


@pytest.fixture
def make_pipeline(tiny_model):
    def make(kind="dit", scheduler=None, class_names=None, **options):
        model = tiny_model(kind, active=True, **options)
        model.register_to_config(class_names=class_names)
        scheduler = scheduler or DDIMScheduler(clip_sample=False)
        pipeline = GenRepPipeline(model=model, scheduler=scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


def generate(pipeline, labels=LABELS, **options):
    return pipeline.generate(labels, **{"num_inference_steps": 4, "output_type": "pt", **options})[
        0
    ]


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def test_every_module_is_left_in_its_mode(make_pipeline):
    pipeline = make_pipeline("unet", dropout=0.5)
    expected = pipeline(torch.zeros(1, 1, 8, 8)).logits
    model = pipeline.model.train()
    model.backbone.mid_block.eval()
    before = modes(model)
    assert len(set(before.values())) == 2
    assert torch.equal(pipeline(torch.zeros(1, 1, 8, 8)).logits, expected)
    generate(pipeline)
    with pytest.raises(ValueError, match="images must be"):
        pipeline(torch.zeros(1, 1, 9, 9))
    with pytest.raises(ValueError, match="images must be finite"):
        pipeline(torch.full((1, 1, 8, 8), torch.nan))
    torch.nn.init.constant_(model.mean_modulation.bias, torch.nan)
    with pytest.raises(FloatingPointError):
        generate(pipeline)
    assert modes(model) == before


def counted(pipeline):
    """Sizes of the batches that go through the network."""
    sizes = []
    pipeline.model.register_forward_hook(lambda module, inputs, _: sizes.append(len(inputs[0])))
    return sizes


@pytest.mark.parametrize("scale", [0.0, 0.5, 3])
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_guidance_is_that_of_diffusers(make_pipeline, monkeypatch, kind, scale):
    pipeline = make_pipeline(kind)
    model, scheduler = pipeline.model, DDIMScheduler(clip_sample=False)
    monkeypatch.setattr(model, "decode", lambda x: x)
    scheduler.set_timesteps(4)
    labels, null = torch.tensor(LABELS), torch.full((5,), model.null_class)
    # The noise from which the chains start.
    start = []
    hook = model.register_forward_pre_hook(lambda module, inputs: start.append(inputs[0][:5]))
    actual = generate(pipeline, guidance_scale=scale)
    hook.remove()
    x = start[0]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            own, other = (model(x, timestep, given).sample for given in (labels, null))
            x = scheduler.step(other + scale * (own - other), timestep, x).prev_sample
    torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-4)
    assert (actual - generate(pipeline)).abs().max() > 1e-4


def test_guidance_leaves_the_variance_to_the_class(make_pipeline, monkeypatch):
    scheduler = DDPMScheduler(clip_sample=False, variance_type="learned_range")
    pipeline = make_pipeline(scheduler=scheduler, out_channels=2)
    torch.nn.init.constant_(pipeline.model.log_std_modulation[-1].bias, 0.3)
    x_t = torch.randn(5, 1, 8, 8)
    labels = torch.tensor(LABELS)
    with torch.no_grad():
        plain = pipeline._predictor(labels, 1.0)(0, torch.tensor(500), x_t)
        guided = pipeline._predictor(labels, 4.0)(0, torch.tensor(500), x_t)
        null = pipeline.model(x_t, 500, torch.full((5,), 3)).sample[:, :1]
    torch.testing.assert_close(guided.output[:, 1:], plain.output[:, 1:])
    torch.testing.assert_close(guided.std_scale, plain.std_scale)
    torch.testing.assert_close(guided.output[:, :1], null + 4 * (plain.output[:, :1] - null))


def test_no_guidance_is_one_evaluation_and_the_same_bits(make_pipeline):
    pipeline = make_pipeline()
    sizes = counted(pipeline)
    images = generate(pipeline)
    assert sizes == [5] * 4
    assert torch.equal(generate(pipeline, guidance_scale=1), images)
    assert sizes == [5] * 8
    generate(pipeline, guidance_scale=2.0)
    assert sizes[8:] == [10] * 4


@pytest.mark.parametrize("scale", [-1.0, torch.inf, torch.nan, "7", None])
def test_bad_guidance_is_named(make_pipeline, scale):
    with pytest.raises((TypeError, ValueError), match="guidance_scale must be"):
        generate(make_pipeline(), guidance_scale=scale)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_a_generator_decides_the_noise(make_pipeline):
    pipeline = make_pipeline()
    images = generate(pipeline, generator=seeded(5))
    torch.manual_seed(0)
    assert torch.equal(generate(pipeline, generator=seeded(5)), images)
    assert not torch.equal(generate(pipeline, generator=seeded(6)), images)
    generator = seeded(5)
    assert torch.equal(generate(pipeline, generator=generator), images)
    assert not torch.equal(generate(pipeline, generator=generator), images)


def test_a_generator_a_label_gives_the_image_that_each_gives_alone(make_pipeline):
    pipeline = make_pipeline(scheduler=DDPMScheduler(clip_sample=False))
    together = generate(pipeline, generator=[seeded(seed) for seed in range(5)])
    for index, label in enumerate(LABELS):
        alone = generate(pipeline, [label], generator=seeded(index))
        assert torch.equal(alone[0], together[index])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 0, "generator": torch.Generator()}, "seed and generator"),
        ({"generator": [torch.Generator()] * 4}, "got 4 for 5 labels"),
        ({"generator": []}, "got 0 for 5 labels"),
        ({"generator": 3}, "generator must be .* got int"),
        ({"generator": [1] * 5}, "generator must be .* got list"),
        ({"generator": "seed"}, "generator must be .* got str"),
        ({"seed": 2**64}, "seed must lie in"),
        ({"seed": -1}, "seed must lie in"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be an integer"),
        ({"num_inference_steps": True}, "num_inference_steps must be an integer"),
    ],
)
def test_bad_options_are_named(make_pipeline, options, message):
    pipeline = make_pipeline()
    sizes = counted(pipeline)
    with pytest.raises((TypeError, ValueError), match=message):
        generate(pipeline, **options)
    assert sizes == []


def test_images_do_not_depend_on_their_batch(make_pipeline):
    pipeline = make_pipeline(scheduler=DDPMScheduler(clip_sample=False))
    sizes = counted(pipeline)
    images = generate(pipeline)
    for batch_size, expected in ((2, [2, 2, 1]), (5, [5]), (99, [5])):
        del sizes[:]
        batched = generate(pipeline, batch_size=batch_size)
        torch.testing.assert_close(batched, images, rtol=1e-4, atol=1e-5)
        assert sizes == [size for size in expected for _ in range(4)]


def test_the_progress_bar_counts_the_steps_of_all_batches(make_pipeline, monkeypatch):
    pipeline = make_pipeline()
    bars = []
    make_bar = pipeline.progress_bar
    monkeypatch.setattr(
        pipeline, "progress_bar", lambda **options: bars.append(make_bar(**options)) or bars[-1]
    )
    pipeline.set_progress_bar_config(file=open("/dev/null", "w"))  # noqa: SIM115
    generate(pipeline, batch_size=2)
    ((bar),) = bars
    assert bar.total == bar.n == 12


def test_perceives_in_batches(make_pipeline):
    pipeline = make_pipeline()
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    expected = pipeline(images)
    for batch_size in (1, 2, 7):
        result = pipeline(images, batch_size=batch_size)
        torch.testing.assert_close(result.logits, expected.logits)
        torch.testing.assert_close(result.probabilities, expected.probabilities)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 9), dtype=np.uint8)
    pictures = [Image.fromarray(picture) for picture in pixels]
    whole = pipeline(pictures).logits
    torch.testing.assert_close(pipeline(iter(pictures), batch_size=2).logits, whole)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        pipeline(images, batch_size=-1)
    with pytest.raises(ValueError, match="images must hold at least one image"):
        pipeline(images[:0])


def test_labels_may_be_names(make_pipeline):
    pipeline = make_pipeline(class_names=["2", "ape", "0"])
    expected = generate(pipeline, [0, 1, 2])
    assert torch.equal(generate(pipeline, ["2", "ape", "0"]), expected)
    unnamed = make_pipeline()
    assert torch.equal(generate(unnamed, ["2", "0"]), generate(unnamed, [2, 0]))


@pytest.mark.parametrize(
    ("names", "labels", "error", "message"),
    [
        (["ape", "bee", "cat"], ["dog"], ValueError, "'dog' is no class"),
        (["ape", "ape", "cat"], ["ape"], ValueError, "'ape' names 2 classes, .0, 1."),
        (["ape", "bee"], ["ape"], ValueError, "got 2 for 3 classes"),
        (["ape", "bee", "cat"], ["ape", 1], TypeError, "got 1 among names"),
        (["ape", "bee", "cat"], [1, "ape"], TypeError, "labels must be"),
        (["ape", "bee", "cat"], "ape", TypeError, "labels must be"),
        (["ape", "bee", "cat"], None, TypeError, "labels must be"),
    ],
)
def test_other_names_are_refused(make_pipeline, names, labels, error, message):
    with pytest.raises(error, match=message):
        generate(make_pipeline(class_names=names), labels)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gain", [1, 100])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_learned_variance_in_half_precision(make_pipeline, dtype, gain, spacing):
    scheduler = DDPMScheduler(
        clip_sample=False, variance_type="learned_range", timestep_spacing=spacing
    )
    pipeline = make_pipeline(scheduler=scheduler, out_channels=2)
    # The predicted variance of an untrained network may lie anywhere.
    pipeline.model.register_forward_hook(
        lambda _, __, output: dataclasses.replace(output, sample=scaled(output.sample, gain))
    )
    pipeline.model.to(dtype)
    with contextlib.suppress(FloatingPointError):
        # A variance far outside of its range makes samples that half precision cannot hold.
        assert generate(pipeline, [0, 1, 2]).isfinite().all()
        return
    assert gain > 1


def scaled(sample, gain):
    return torch.cat([sample[:, :1], sample[:, 1:].clamp(-1, 1) * gain], 1)


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_schedulers_of_other_classes_are_named(make_pipeline, scheduler):
    pipeline = make_pipeline(scheduler=scheduler())
    assert pipeline(torch.zeros(1, 1, 8, 8)).probabilities.shape == (1, 3)
    with pytest.raises(TypeError, match=f"scheduler must be .* got {scheduler.__name__}"):
        generate(pipeline)


def test_a_learned_variance_that_the_network_lacks_is_named(make_pipeline):
    scheduler = DDPMScheduler(clip_sample=False, variance_type="learned_range")
    with pytest.raises(ValueError, match="must have 2 output channels, got 1"):
        generate(make_pipeline(scheduler=scheduler))


def test_fractional_timesteps_in_half_precision(make_pipeline):
    pipeline = make_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    expected = generate(pipeline, num_inference_steps=7)
    pipeline.model.to(torch.bfloat16)
    images = generate(pipeline, num_inference_steps=7).float()
    torch.testing.assert_close(images, expected, rtol=0, atol=0.2)
