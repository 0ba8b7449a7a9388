"""What a DiffusionClassifier takes and refuses: images, networks, VAEs, schedulers, settings."""

import builtins
import copy
import re
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import genrep_fast as gf
from genrep_fast.coefficients.forward_process import stratified_process
from genrep_fast.coefficients.noise_schedules import FAMILIES
from genrep_fast.reference.reverse_step import chain_noise
from genrep_fast.scoring.classifier import progress
from genrep_fast.scoring.classifier.images import as_images
from genrep_fast.scoring.classifier.network import Network

QUIET = {"progress": False}
FULL = {"strategy": gf.Full(2), "progress": False}
SCHEDULER = DDPMScheduler(clip_sample=False)
# Of schedulers whose defaults do not serve.
SETTINGS = {
    "HeliosScheduler": {"stages": 1},
    "HeliosDMDScheduler": {"stages": 1},
    "RFD4ProteinaScheduler": {
        "schedule_mode": "power",
        "noise_mode": "1/t",
        "tsr_k": 1.0,
        "tsr_sigma": 1.0,
    },
}


def denoiser(x_t, timesteps, labels):
    return x_t * (1 + labels.view(-1, 1, 1, 1).to(x_t.dtype)) / 3


def classifier(function=denoiser, scheduler=SCHEDULER, num_classes=3, **options):
    return gf.DiffusionClassifier(function, scheduler, num_classes, **options)


def pictures(count=4, channels=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)


# Images


def test_every_kind_of_image_is_the_same_image():
    arrays = pictures()
    tensor = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    expected = classifier()(tensor.float() / 127.5 - 1, **FULL)
    kinds = {
        "array": arrays,
        "uint8 tensor": tensor,
        "list of arrays": list(arrays),
        "PIL": [Image.fromarray(array) for array in arrays],
        "list of tensors": list(tensor.float() / 127.5 - 1),
        "generator": (tensor[start : start + 1] for start in range(4)),
        "list of batches": [tensor[:3], tensor[3:]],
        "generator of PIL": ([Image.fromarray(array)] for array in arrays),
        "float array": tensor.float().numpy() / np.float32(127.5) - np.float32(1),
    }
    for name, images in kinds.items():
        found = classifier()(images, **FULL)
        assert torch.allclose(found.log_likelihood, expected.log_likelihood, rtol=1e-4), name
    single = classifier()(Image.fromarray(arrays[0]), **FULL)
    torch.testing.assert_close(single.posterior, expected.posterior[:1], rtol=1e-4, atol=1e-4)


def test_grey_images_have_one_channel():
    grey = pictures(channels=1)
    expected = torch.from_numpy(grey[..., 0]).float()[:, None] / 127.5 - 1
    assert torch.equal(as_images(grey[..., 0], None), expected)
    assert torch.equal(as_images(grey[0, ..., 0], None), expected[:1])
    images = [Image.fromarray(array[..., 0]) for array in grey]
    assert torch.equal(as_images(images, None), expected)
    # The network's channels decide what a PIL image is converted to.
    assert as_images(images, (3, 8, 8)).shape == (4, 3, 8, 8)
    assert as_images([Image.fromarray(pictures()[0])], (1, 8, 8)).shape == (1, 1, 8, 8)


def test_photographs_are_turned_upright():
    image = Image.fromarray(pictures(1)[0, :4])
    exif = image.getexif()
    exif[274] = 6
    import io

    file = io.BytesIO()
    image.save(file, "png", exif=exif)
    assert as_images(Image.open(file), None).shape == (1, 3, 8, 4)


def test_labels_come_with_the_batches_of_a_loader():
    x, labels = torch.rand(10, 1, 4, 4), torch.arange(10) % 3
    loader = DataLoader(TensorDataset(x, labels), batch_size=4)
    result = classifier()(loader, **FULL)
    assert torch.equal(result.labels, labels)
    pair = classifier()((x, labels), **FULL)
    assert torch.equal(pair.labels, labels) and torch.equal(pair.posterior, result.posterior)
    plain = classifier()(DataLoader(x, batch_size=4), **FULL)
    assert plain.labels is None
    assert torch.equal(plain.posterior, result.posterior)


def test_a_stream_is_read_as_it_is_needed():
    read = []

    def stream():
        for number in range(50):
            read.append(number)
            yield torch.rand(4, 1, 4, 4)

    seen = []

    def counting(x_t, timesteps, labels):
        seen.append(len(read))
        return denoiser(x_t, timesteps, labels)

    classifier(counting, batch_size=12)(stream(), **FULL)
    assert seen[0] <= 2 and len(read) == 50


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 1, 4, 4), "images must hold at least one image, got none"),
        (iter([]), "images must hold at least one image, got none"),
        ([], "images must hold at least one image, got none"),
        (torch.zeros(2, 4, 4), re.escape("images must be [B, C, H, W], got [2, 4, 4]")),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), "images must be floating point"),
        (torch.tensor([[[[0.0, float("nan")]]]]), r"images must be finite, got NaN.*images \[0\]"),
        (
            torch.full((1, 1, 4, 4), 200.0),
            r"images must lie in -1...1 .*got values from 200 to 200",
        ),
        (3, "images must be a tensor, PIL images, uint8 arrays, or an iterable"),
        ("folder/", "images must be tensors, PIL images or uint8 arrays, got str"),
        (["a.png"], "images must be tensors, PIL images or uint8 arrays, got str"),
        ([torch.zeros(1, 4, 4), torch.zeros(1, 5, 4)], "images must have one size"),
        (
            [torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 5, 4)],
            r"images must be \[B, 1, 4, 4\], got \[1, 1, 5, 4\] \(batch 1 of the stream\)",
        ),
        (np.zeros((1, 2, 3, 4, 5), dtype=np.uint8), "images must be uint8 arrays"),
        ([Image.new("I;16", (4, 4))], "images must have 8 bits a channel"),
    ],
)
def test_other_images_are_refused(images, message):
    with pytest.raises((TypeError, ValueError), match=message):
        classifier()(images, **FULL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_ids": [0, 1, 1]}, r"image_ids must be distinct.*got \[1\] more than once"),
        ({"image_ids": [0, 1]}, "image_ids must be one an image, got 2 for 3 images"),
        ({"image_ids": [0, 1, 2**32]}, r"image_ids must lie in \[0, 2\*\*32\)"),
        ({"image_ids": [0.5, 1.0, 2.0]}, "image_ids must be a sequence of integers"),
        ({"labels": [0, 1, 3]}, r"labels must lie in \[0, 3\), got 0 to 3"),
        ({"labels": [0, 1]}, "labels must be one an image, got 2 for 3 images"),
        ({"strategy": "fastest"}, 'strategy must be "full", "stratified", "staged" or "race"'),
        ({"strategy": gf.Full}, "strategy must be a name, or gf.Full"),
        ({"strategy": gf.Full(1001)}, "steps must lie between 1 and 1000"),
        ({"confidence": 1.0}, "confidence must lie between 0 and 1, got 1.0"),
        ({"confidence": "high"}, "confidence must be a number"),
        ({"budget": 2}, "budget must be at least 3 evaluations an image, one a class, got 2"),
        ({"budget": 7.5}, "budget must be an integer"),
        ({"deadline": 0}, "deadline must be positive and finite, got 0"),
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*64\), got -1"),
        ({"strategy": "race", "budget": 10}, "more than the budget of 10: call calibrate first"),
    ],
)
def test_other_settings_of_a_call_are_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        classifier()(torch.zeros(3, 1, 4, 4), **{**FULL, **options})


def test_ids_and_labels_of_a_stream_are_counted():
    batches = [torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)]
    for name in ("image_ids", "labels"):
        for count in (3, 5):
            values = torch.arange(count) % 3 if name == "labels" else torch.arange(count)
            with pytest.raises(ValueError, match=f"{name} must be one an image, got {count}"):
                classifier()(iter(batches), **{name: values}, **FULL)


# The class


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"num_classes": 2.5}, "num_classes must be an integer"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"pad_to": 8}, "pad_to must be at least batch_size 64, got 8"),
        ({"null_class": 2}, "null_class must lie beyond the 3 classes, got 2"),
        ({"function": 3}, "denoiser must be callable"),
        ({"scheduler": object()}, "scheduler"),
        ({"parameterization": "score"}, "parameterization"),
        ({"vae": 3}, "vae must have encode"),
        ({"dtype": torch.int32}, "dtype must be float32"),
    ],
)
def test_other_arguments_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        classifier(**arguments)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: gf.Full(0), "steps must be at least 1"),
        (lambda: gf.Full(weights="best"), "weights must be"),
        (lambda: gf.Stratified(2.5), "steps must be an integer"),
        (lambda: gf.Staged(keep=(5,), steps=(1, 2)), "keep and steps must have one entry a stage"),
        (lambda: gf.Staged(keep=(1, 5), steps=(1, 2)), "keep must not grow"),
        (lambda: gf.Staged(keep=(5, 1), steps=(2, 2)), "steps must grow"),
        (lambda: gf.Staged(keep=5, steps=(2,)), "keep must be a sequence"),
        (lambda: gf.Race(order="random"), "order must be"),
        (lambda: gf.Race(correlation="half"), "correlation must be"),
        (lambda: gf.Race(max_steps=0), "max_steps must be at least 1"),
    ],
)
def test_other_strategies_are_refused(build, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build()


def test_a_race_longer_than_its_calibration_is_refused():
    found = classifier()
    found.calibrate(torch.rand(4, 1, 4, 4), steps=3, **QUIET)
    with pytest.raises(ValueError, match="max_steps must be at most the calibration's 3 steps"):
        found(torch.rand(4, 1, 4, 4), strategy=gf.Race(max_steps=5), **QUIET)


def test_calibration_needs_two_images_and_a_denoiser_that_listens():
    with pytest.raises(ValueError, match="images must be at least two to calibrate, got 1"):
        classifier().calibrate(torch.rand(1, 1, 4, 4), **QUIET)
    deaf = classifier(lambda x_t, t, labels: x_t)
    with pytest.raises(ValueError, match="denoiser must depend on its labels"):
        deaf.calibrate(torch.rand(4, 1, 4, 4), **QUIET)
    assert deaf.calibration is None
    other = classifier(num_classes=2)
    other.calibrate(torch.rand(4, 1, 4, 4), steps=2, **QUIET)
    with pytest.raises(ValueError, match="calibration must be of 3 classes, got 2"):
        classifier().calibration = other.calibration


# Networks


class Output:
    def __init__(self, sample):
        self.sample = sample


@pytest.mark.parametrize(
    "wrap",
    [lambda o: o, Output, lambda o: (o,), lambda o: [o, 3], lambda o: torch.cat([o, o], 1)],
    ids=["tensor", "sample", "tuple", "list", "learned variance"],
)
def test_outputs_of_every_kind(wrap):
    x = torch.rand(3, 1, 4, 4)
    expected = classifier()(x, **FULL)
    found = classifier(lambda *arguments: wrap(denoiser(*arguments)))(x, **FULL)
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x, t, y: None, "denoiser must return a tensor, .* got NoneType"),
        (lambda x, t, y: x.long(), "denoiser's output must be float32, .* got torch.int64"),
        (lambda x, t, y: x[:, :, :2], "denoiser must return .* up to further channels"),
        (lambda x, t, y: x[:1], "denoiser must return .* up to further channels"),
        (
            lambda x, t, y: torch.where(y.view(-1, 1, 1, 1) == 1, torch.inf, x),
            "got NaN or infinity for the image with id 7 under class 1 at timestep 750",
        ),
    ],
)
def test_other_outputs_are_refused(function, message):
    with pytest.raises((TypeError, ValueError), match=message):
        classifier(function)(torch.rand(1, 1, 4, 4), image_ids=[7], **FULL)


def test_a_text_conditional_network_is_refused():
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=8,
    )
    with pytest.raises(TypeError, match="takes encoder_hidden_states, not class labels"):
        classifier(unet)


class Small(nn.Module):
    """Half precision, a config and modes, as diffusers' models have them."""

    def __init__(self, dtype=torch.float32, **config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.config = type("Config", (), {"sample_size": 4, "in_channels": 1, **config})()
        self.seen = []

    def forward(self, x_t, timesteps, class_labels):
        self.seen.append((x_t.dtype, timesteps.dtype, self.training))
        return denoiser(x_t, timesteps, class_labels) * self.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_networks_dtype_and_mode(dtype):
    model = Small(dtype)
    result = classifier(model)(torch.rand(3, 1, 4, 4), **FULL)
    assert set(model.seen) == {(dtype, torch.int64, False)}
    assert model.training
    assert result.log_likelihood.dtype == torch.float32
    # A method of a module is called in its modes as well.
    classifier(model.forward, dtype=torch.float32)(torch.rand(3, 1, 4, 4).half(), **FULL)
    assert model.seen[-1] == (torch.float32, torch.int64, False)


def test_sizes_that_the_config_tells():
    with pytest.raises(
        ValueError, match=re.escape("images must be [B, 1, 4, 4], got [1, 1, 8, 8]")
    ):
        classifier(Small())(torch.rand(1, 1, 8, 8), **FULL)
    with pytest.raises(ValueError, match="fit the 2 rows of the denoiser's class embedding"):
        classifier(Small(num_class_embeds=2))
    with pytest.raises(ValueError, match="got labels up to 5"):
        classifier(Small(num_embeds_ada_norm=4), null_class=5)
    assert classifier(Small(num_embeds_ada_norm=4), null_class=4).null_class == 4


def test_autocast_and_gradients():
    model = Small()
    with torch.autocast("cpu", torch.bfloat16):
        result = classifier(model)(torch.rand(2, 1, 4, 4), **FULL)
    assert not result.posterior.requires_grad


# VAEs


@pytest.mark.parametrize("upcast", [True, False])
def test_a_vae_with_force_upcast_never_runs_in_float16(upcast):
    vae = tiny_vae(force_upcast=upcast).half()
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    exact = Network(denoiser, copy.deepcopy(vae).float(), 3, None, None).encode(x)
    found = Network(denoiser, vae, 3, None, None).encode(x)
    error = (found - exact).abs().max()
    # float16 errs by 1e-4 here, float32 by 1.5e-8.
    assert (error < 1e-6) == upcast and vae.dtype == torch.float16


def tiny_vae(**options):
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=2,
        **options,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"scaling_factor": 0.5},
        {"scaling_factor": 0.5, "shift_factor": 0.1},
        {"scaling_factor": 0.5, "latents_mean": [0.1, -0.2], "latents_std": [0.7, 1.2]},
    ],
)
def test_latents_are_scaled_as_pipelines_do(options):
    vae = tiny_vae(**options).train()
    x = torch.rand(3, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mode()
    if "latents_mean" in options:
        mean, std = (
            torch.tensor(options[key]).view(1, 2, 1, 1) for key in ("latents_mean", "latents_std")
        )
        latents = (latents - mean) / std
    latents = (latents - options.get("shift_factor", 0)) * options["scaling_factor"]
    torch.testing.assert_close(Network(denoiser, vae, 3, None, None).encode(x).detach(), latents)
    found = classifier(vae=vae)(x, **FULL)
    torch.testing.assert_close(found.log_likelihood, classifier()(latents, **FULL).log_likelihood)
    assert vae.training


def test_other_autoencoders_and_functions():
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=2,
    )
    assert classifier(vae=tiny)(x, **FULL).decided.all()
    pooled = classifier(vae=lambda images: images[:, :, ::2, ::2])(x, **FULL)
    expected = classifier()(x[:, :, ::2, ::2], **FULL)
    torch.testing.assert_close(pooled.log_likelihood, expected.log_likelihood)
    with pytest.raises(ValueError, match=r"images must lie in -1...1 .*got values from"):
        classifier(vae=tiny)(x.abs() * 3, **FULL)
    for vae, message in (
        (lambda images: "latents", "vae must return a tensor, got str"),
        (lambda images: images[:1], "images must give latents one an image, got"),
        (lambda images: images * torch.nan, "vae must return finite latents"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            classifier(vae=vae)(x, **FULL)
    small = Small(in_channels=2)
    with pytest.raises(ValueError, match=re.escape("images must give latents [2, 2, 4, 4], got")):
        classifier(small, vae=tiny)(x, **FULL)


# Schedulers


def test_a_scheduler_that_has_generated_classifies_as_a_new_one():
    x = torch.rand(2, 1, 4, 4)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    expected = classifier(scheduler=scheduler)(x, **FULL)
    scheduler.set_timesteps(7)
    found = classifier(scheduler=scheduler)(x, **FULL)
    assert torch.equal(found.log_likelihood, expected.log_likelihood)
    assert len(scheduler.timesteps) == 7


def test_zero_terminal_snr_without_a_signal_is_refused():
    options = {"clip_sample": False, "rescale_betas_zero_snr": True}
    noise = DDPMScheduler(**options)
    with pytest.raises(ValueError, match=r"timesteps \[999\] have no signal"):
        classifier(scheduler=noise)(torch.rand(1, 1, 4, 4), strategy=gf.Full(1000), **QUIET)
    velocity = DDPMScheduler(**options, prediction_type="v_prediction")
    assert classifier(scheduler=velocity)(torch.rand(1, 1, 4, 4), **FULL).decided.all()


def test_a_clipping_scheduler_serves_as_one_that_does_not():
    x = torch.rand(2, 1, 4, 4)
    found = classifier(scheduler=DDPMScheduler())(x, **FULL)
    assert torch.equal(found.log_likelihood, classifier()(x, **FULL).log_likelihood)


def test_a_scheduler_of_few_timesteps_has_a_smaller_full_budget():
    scheduler = DDPMScheduler(num_train_timesteps=10, clip_sample=False)
    result = classifier(scheduler=scheduler)(torch.rand(2, 1, 4, 4), strategy="full", **QUIET)
    assert (result.steps == 10).all()


# Progress


def test_progress_tells_the_cost_and_the_accuracy(capsys):
    found = classifier()
    found(torch.rand(6, 1, 4, 4), strategy=gf.Full(2), labels=[0, 1, 2, 0, 1, 2])
    told = capsys.readouterr().err
    assert "classify: about 6.0 evaluations an image, at most 6; 36 for 6 images" in told
    assert "evaluations/image=6.0" in told and "accuracy=" in told
    found(torch.rand(6, 1, 4, 4), **FULL)
    assert capsys.readouterr().err == ""
    estimate = found.estimate(100, strategy="staged")
    assert estimate.evaluations == estimate.most == 3 * 50 + 3 * 450
    assert estimate.seconds > 0


def test_progress_tells_hours_after_some_batches(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    bar = progress.Progress(True, "classify", progress.CostEstimate(1000.0, 2000, 2000, None))
    for _ in range(1000):
        bar.skip(900, None)
    # The first batch takes long.
    for seconds in (60, 0.5, 0.5, 0.5, 1.0):
        assert "a second" not in capsys.readouterr().err
        clock[0] += seconds
        bar.after_batch(50)
    # 200 evaluations in 2.5 seconds; 999,750 are left.
    told = capsys.readouterr().err
    assert "classify: 80.0 evaluations a second, some 3.5 hours left" in told
    clock[0] += 10
    bar.after_batch(50)
    assert "a second" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (119, "119 s"), (150, "2 minutes"), (9000, "2.5 hours"), (864000, "10.0 days")],
)
def test_durations_in_words(seconds, words):
    assert progress.duration(seconds) == words


def test_an_estimate_tells_what_memory_is_needed():
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 3, padding=1))
    weights = 4 * sum(tensor.numel() for tensor in model.parameters())

    class Denoiser(Small):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x_t, timesteps, class_labels):
            return self.model(x_t)

        def denoise(self, x_t, timesteps, class_labels):
            return self.model[0](x_t)[:, :1]

    small = Denoiser()
    for function in (small, small.denoise):
        found = classifier(function, batch_size=10)
        assert found.estimate(strategy="full").memory == weights + 4 + 10 * 4 * 6 * 16
    assert str(found.estimate(strategy="full")).endswith("; over 4.3 kB of memory")
    padded = classifier(small, batch_size=10, pad_to=20, vae=tiny_vae())
    of_vae = 4 * sum(tensor.numel() for tensor in padded._network.vae.parameters())
    expected = weights + 4 + of_vae + 20 * 4 * 6 * 16
    assert padded.estimate(strategy="full").memory == expected
    assert small.model[0].weight.device.type == "cpu"
    assert classifier().estimate(strategy="full").memory is None
    # A network that cannot be told without values: its weights are known.
    small.forward = lambda *arguments: arguments[0] * small.weight.item()
    assert classifier(small).estimate(strategy="full").memory >= weights + 4


def test_progress_without_tqdm(monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *arguments, **options):
        if name.partition(".")[0] == "tqdm":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    assert classifier()(torch.rand(2, 1, 4, 4), strategy=gf.Full(2), progress=True).decided.all()
    assert capsys.readouterr().err == ""


def test_an_estimate_of_a_race_needs_a_calibration():
    found = classifier()
    with pytest.raises(ValueError, match="a race needs a calibration"):
        found.estimate(10)
    found.calibrate(torch.rand(8, 1, 4, 4), steps=3, **QUIET)
    estimate = found.estimate(10)
    assert 3 <= estimate.evaluations <= estimate.most == 9


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_scheduler_with_noise_levels(name, tmp_path):
    """Full is a plain loop over the forward process; a race is saved and read."""
    try:
        scheduler = getattr(diffusers, name)(**SETTINGS.get(name, {}))
    except ImportError as error:
        pytest.skip(str(error))
    x = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    found = classifier(scheduler=scheduler)
    result = found(x, strategy=gf.Full(5), **QUIET)
    process = stratified_process(scheduler, 5)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for row in range(5):
        noise = chain_noise(0, torch.arange(4), row, x.shape[1:])
        x_t = process[row].noisy_input(x.double(), noise).float()
        target = process[row].target(x.double(), noise)
        for label in range(3):
            error = target - denoiser(x_t, None, torch.full((4,), label)).double()
            expected[:, label] -= error.square().flatten(1).sum(1) / 5
    torch.testing.assert_close(result.log_likelihood.double(), expected, rtol=1e-5, atol=0)
    found.calibrate(x.repeat(3, 1, 1, 1), steps=4, **QUIET)
    found.save_pretrained(tmp_path)
    loaded = gf.DiffusionClassifier.from_pretrained(tmp_path, denoiser)
    assert torch.equal(loaded(x, **QUIET).posterior, found(x, **QUIET).posterior)


def test_a_scheduler_without_noise_levels_is_refused():
    with pytest.raises(TypeError, match="corrupts discrete tokens"):
        classifier(scheduler=diffusers.VQDiffusionScheduler(num_vec_classes=4))
