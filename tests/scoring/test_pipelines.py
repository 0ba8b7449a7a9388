"""DiffusionClassifier.from_pipeline, against loops written with each pipeline's own modules."""

import gc
import inspect
import json
import weakref

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    UniPCMultistepScheduler,
)

import genrep_fast as gf
from genrep_fast.reference.reverse_step import chain_noise
from genrep_fast.scoring.classifier.pipelines import denoiser
from genrep_fast.scoring.classifier.strategies import low_discrepancy_order

# Earlier versions make tokenizers from files alone.
pytest.importorskip("transformers", minversion="5")
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


def pictures(count=3, size=16, seed=0, width=None):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(count, 3, size, width or size, generator=generator) - 1


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
    time_ids = pipe._get_add_time_ids((16, 24), (0, 0), (16, 24), x.dtype, 12)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    return pipe.unet(x, t, encoder_hidden_states=states, added_cond_kwargs=added).sample


def predict_stable_diffusion_3(pipe, x, t, prompt):
    states, _, pooled, _ = pipe.encode_prompt(
        prompt, prompt, prompt, do_classifier_free_guidance=False
    )
    return pipe.transformer(x, states, pooled, t).sample


def predict_flux(pipe, x, t, prompt):
    states, pooled, text_ids = pipe.encode_prompt(prompt, prompt)
    image_ids = pipe._prepare_latent_image_ids(1, 4, 6, "cpu", x.dtype)
    output = pipe.transformer(
        hidden_states=pipe._pack_latents(x, 1, 4, 8, 12),
        timestep=t / 1000,
        guidance=torch.tensor([1.0]),
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=text_ids,
        img_ids=image_ids,
    ).sample
    return pipe._unpack_latents(output, 16, 24, pipe.vae_scale_factor)


def predict_pixart(pipe, x, t, prompt):
    states, mask, _, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    added = {"resolution": None, "aspect_ratio": None}
    if type(pipe).__name__ == "PixArtAlphaPipeline":
        ratio = torch.tensor([[16 / 24]])
        added = {"resolution": torch.tensor([[16.0, 24]]), "aspect_ratio": ratio}
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
    pipe = pipe_of(family)
    images = pictures(2, width=16 if family == "DiTPipeline" else 24)
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
    assert result.evaluations.tolist() == [STEPS * 6] * 2


# Strategies


def published_stages(errors, keep, samples, order):
    """The adaptive evaluation of Diffusion Classifier over errors of timesteps [S] and prompts [P].

    Every stage evaluates the prompts that are left at further timesteps, and keeps the best by the
    mean of all of their errors. Returns the last one, and the mean errors of all prompts.
    """
    remaining = list(range(errors.shape[1]))
    evaluated = {prompt: [] for prompt in remaining}
    seen = []
    for most, stage in zip(keep, samples, strict=True):
        new = [row for row in order(stage) if row not in seen]
        seen += new
        for prompt in remaining:
            evaluated[prompt] += [errors[row, prompt] for row in new]
        means = [torch.stack(evaluated[prompt]).mean() for prompt in remaining]
        best = torch.stack(means).topk(most, largest=False).indices
        remaining = [remaining[place] for place in best.tolist()]
    return remaining[0], torch.stack([torch.stack(found).mean() for found in evaluated.values()])


@pytest.mark.parametrize(
    ("keep", "samples", "order"),
    [
        # The published order: at each stage every so many of all timesteps, from the middle on.
        ((2, 1), (1, 8), lambda stage: range(8 // stage // 2, 8, 8 // stage)),
        # In this package's, the beginnings are spread as evenly and are of any length.
        ((3, 2, 1), (2, 5, 8), lambda stage: low_discrepancy_order(8)[:stage].tolist()),
    ],
)
def test_staged_is_the_published_adaptive_evaluation(keep, samples, order, pipe):
    prompts = ["a cat", "a dog", "sun", "a bed"]
    classifier = gf.DiffusionClassifier.from_pipeline(pipe, prompts, null_prompt=None)
    images = pictures(4)
    result = classifier(images, strategy=gf.Staged(keep, samples), seed=SEED, **QUIET)
    for image, errors in enumerate(plain_errors(pipe, images, prompts, steps=8)):
        winner, means = published_stages(errors, keep, samples, order)
        assert result.prediction[image] == winner
        left = result.steps[image] == 8
        found = -result.log_likelihood[image].double()
        torch.testing.assert_close(found[left], means[left], rtol=1e-5, atol=0)
        # A class that left keeps its difference to the winner over the steps of both.
        for cls in (~left).nonzero()[:, 0].tolist():
            stages = [stage for stage in samples if stage <= result.steps[image, cls]]
            common = sorted({row for stage in stages for row in order(stage)})
            gap = errors[common, cls].mean() - errors[common, winner].mean()
            assert found[cls] - means[winner] == pytest.approx(max(gap.item(), 0), abs=2e-3)
    assert result.lift is None


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_unlabelled_images_tell_where_a_flow_has_its_signal(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    means = 0.5 * torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(0))

    def flow(x_t, timesteps, labels):
        """noise − x of Gaussian classes, which differ between 0.73 and 0.93 alone."""
        level = timesteps.view(-1, 1, 1, 1) / 1000
        differ = (level > 0.73) & (level < 0.93)
        mean = torch.where(differ, means[labels], means.mean(0))
        noise = level * (x_t - (1 - level) * mean) / (0.25 * (1 - level) ** 2 + level**2)
        return noise - (x_t - level * noise) / (1 - level).clamp(min=1e-3)

    generator = torch.Generator().manual_seed(1)
    images = means[torch.arange(60) % 6] + 0.5 * torch.randn(60, 1, 6, 6, generator=generator)
    classifier = gf.DiffusionClassifier(flow, scheduler, 6)
    calibration = classifier.calibrate(images, **QUIET)
    levels = calibration.timesteps / 1000
    is_in_band = (levels > 0.73) & (levels < 0.93)
    first = calibration.order("signal")[: is_in_band.sum()]
    assert is_in_band.sum() >= 4 and is_in_band[first].all()


def test_dynamic_shifting_places_timesteps_as_the_pipeline_does(pipe_of):
    pipe, prompts = pipe_of("FluxPipeline"), ["a cat", "a dog"]
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    multistep = UniPCMultistepScheduler(use_dynamic_shifting=True, **flow)
    for name, scheduler in (("shift", pipe.scheduler), ("flow_shift", multistep)):
        pipe.scheduler = scheduler
        config = gf.DiffusionClassifier.from_pipeline(pipe, prompts).scheduler.config
        assert not config.use_dynamic_shifting and config[name] == pytest.approx(np.exp(1.15))


# What is refused


@pytest.mark.parametrize(
    "name",
    [
        "LCMScheduler",
        "TCDScheduler",
        "SCMScheduler",
        "FlowMatchLCMScheduler",
        "FlowMapEulerDiscreteScheduler",
    ],
)
def test_consistency_and_mean_flow_models_are_refused(name, pipe):
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers has no {name}")
    pipe.scheduler = getattr(diffusers, name)()
    with pytest.raises((TypeError, ValueError), match="belongs to (distilled|consistency) models"):
        gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])


def test_networks_of_distilled_models_are_refused(pipe_of):
    pipe = pipe_of("StableDiffusionPipeline")
    pipe.unet = tiny_pipelines.unet(cross_attention_dim=16, time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="pipe.unet takes a guidance scale"):
        gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])
    pipe = pipe_of("SanaPipeline")
    pipe.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(ValueError, match="pipe.transformer takes a guidance scale, as Sana-Sprint"):
        gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])


def turbo(pipe):
    from diffusers import EulerAncestralDiscreteScheduler

    pipe.scheduler = EulerAncestralDiscreteScheduler(timestep_spacing="trailing")


def named(name):
    return lambda pipe: pipe.register_to_config(_name_or_path=name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (turbo, "EulerAncestralDiscreteScheduler has trailing timesteps"),
        (named("stabilityai/stable-diffusion-3.5-large-turbo"), "its name is .*-large-turbo"),
        (named("/cache/models--ByteDance--SDXL-Lightning/snapshots/4a1e"), "SDXL-Lightning"),
        (named("C:\\models\\pixart_lcm\\"), "its name is pixart_lcm"),
    ],
)
def test_what_looks_distilled_gives_a_warning(change, reason, pipe):
    change(pipe)
    with pytest.warns(UserWarning, match=f"distilled into few steps.*{reason}") as caught:
        gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])
    assert caught[0].filename == __file__


def test_schnell_gives_a_warning(pipe):
    with pytest.warns(UserWarning, match="as FLUX.1-schnell"):
        gf.DiffusionClassifier.from_pipeline(
            tiny_pipelines.flux(guidance_embeds=False), ["a cat", "a dog"]
        )


@pytest.mark.parametrize("name", ["turbot/salcman-hyperion", "/data/turbo/sd-1.5"])
def test_other_names_give_none(name, pipe, recwarn):
    pipe.register_to_config(_name_or_path=name)
    gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])
    assert not [each for each in recwarn if "distilled" in str(each.message)]


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("a cat", TypeError, "prompts must be a list .* for each class, got str"),
        ({"cat": "a cat"}, TypeError, "prompts must be a list .*, got dict"),
        (None, TypeError, "prompts must be a list .*, got NoneType"),
        ([], ValueError, "two classes at least, got 0"),
        (["a cat"], ValueError, "two classes at least, got 1"),
        (["a cat", []], ValueError, r"prompts\[1\] must hold a prompt, got none"),
        (b"ab", TypeError, "prompts must be a list .*, got bytes"),
        (["a cat", b"a dog"], TypeError, r"prompts\[1\] must be a string, got bytes"),
        (["a cat", 3], TypeError, r"prompts\[1\] must be a string, got int"),
        (["a cat", ["a dog", None]], TypeError, r"prompts\[1\]\[1\] must be a string"),
        (["a cat", " "], ValueError, r"prompts\[1\] is empty; null_prompt stands for no class"),
        (["a cat", "a dog", "a cat"], ValueError, r"the same in prompts\[0\] and prompts\[2\]"),
        (["a cat", "A  CAT"], ValueError, r"the same in prompts\[0\] and prompts\[1\]: 'A  CAT'"),
        ([["a", "b"], ["b", "a"]], ValueError, r"the same in prompts\[0\] and prompts\[1\]"),
        ([["a", "b", "a"], "c"], ValueError, r"prompts\[0\] must be distinct .* 'a' twice"),
        (
            ["a cat", ["a dog", "a cat and a dog by the sea"]],
            ValueError,
            r"prompts\[1\]\[1\] has 21 tokens, of which pipe.tokenizer takes 16: shorten it",
        ),
    ],
)
def test_prompts_that_are_none(prompts, error, message, pipe):
    with pytest.raises(error, match=message):
        gf.DiffusionClassifier.from_pipeline(pipe, prompts)


def test_a_null_prompt_that_is_none(pipe, pipe_of):
    with pytest.raises(TypeError, match="null_prompt must be a string or None, got int"):
        gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"], null_prompt=0)
    with pytest.raises(ValueError, match="null_prompt has 21 tokens, of which pipe.tokenizer"):
        null_prompt = "nothing to be seen here"
        gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"], null_prompt=null_prompt)
    with pytest.raises(ValueError, match='null_prompt must be "" or None for DiTPipeline'):
        dit = pipe_of("DiTPipeline")
        gf.DiffusionClassifier.from_pipeline(dit, ["a cat", "a dog"], null_prompt="nothing")


def test_a_prompt_that_one_encoder_cuts(pipe_of):
    pipe = pipe_of("StableDiffusion3Pipeline")
    prompts = ["a cat", "a cat and a dog by the sea"]
    message = r"prompts\[1\] has 21 tokens, of which pipe.tokenizer takes 16; another encoder reads"
    with pytest.warns(UserWarning, match=message) as caught:
        gf.DiffusionClassifier.from_pipeline(pipe, prompts)
    assert len(caught) == 1 and caught[0].filename == __file__
    pipe.text_encoder_3 = pipe.tokenizer_3 = None
    with pytest.warns(UserWarning, match="CLIP alone reads the prompts") as caught:
        with pytest.raises(ValueError, match=r"pipe.tokenizer takes 16: shorten it"):
            gf.DiffusionClassifier.from_pipeline(pipe, prompts)
        classifier = gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])
    assert {each.filename for each in caught} == {__file__}
    assert len(classifier(pictures(1), strategy=gf.Full(1), **QUIET)) == 1


def test_labels_of_a_class_conditional_pipeline(pipe_of):
    pipe = pipe_of("DiTPipeline")
    by_name = gf.DiffusionClassifier.from_pipeline(pipe, ["tabby", "bed"])
    by_number = gf.DiffusionClassifier.from_pipeline(pipe, [0, np.int64(4)])
    first, second = (
        each(pictures(2), strategy=gf.Full(2), **QUIET) for each in (by_name, by_number)
    )
    assert torch.equal(first.log_likelihood, second.log_likelihood)
    assert by_number.prompts == ((0,), (4,))
    with pytest.raises(ValueError, match=r"prompts\[1\] must be among pipe.labels .* got 'lion'"):
        gf.DiffusionClassifier.from_pipeline(pipe, ["bed", "lion"])
    with pytest.raises(ValueError, match=r"prompts\[0\] must lie in \[0, 5\), got 5"):
        gf.DiffusionClassifier.from_pipeline(pipe, [5, "bed"])
    with pytest.raises(ValueError, match="prompts must tell the classes apart"):
        gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "tabby"])
    with pytest.raises(ValueError, match=r"images must give latents \[1, 4, 8, 8\]"):
        by_name(pictures(1, size=32), strategy=gf.Full(1), **QUIET)


def test_other_pipelines_are_refused(pipe):
    from diffusers import StableDiffusionImg2ImgPipeline

    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with pytest.raises(TypeError) as caught:
        gf.DiffusionClassifier.from_pipeline(other, ["a cat", "a dog"])
    for name in (
        *FAMILIES,
        "got StableDiffusionImg2ImgPipeline; StableDiffusionPipeline.from_pipe",
    ):
        assert name in str(caught.value)
    with pytest.raises(TypeError, match="got str: load it with from_pretrained"):
        gf.DiffusionClassifier.from_pipeline("stable-diffusion", ["a cat", "a dog"])

    # Of one's own, which is one of them.
    def call(self, *arguments, **options):
        return super(type(self), self).__call__(*arguments, **options)

    pipe.__class__ = type("MyPipeline", (type(pipe),), {"__call__": call})
    assert gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"]).num_classes == 2


def of_own(pipe, call):
    """What networks get of prompts and the null prompt, without and with a call of one's own."""
    found = []
    for own in (pipe.__class__, type("MyPipeline", (type(pipe),), {"__call__": call})):
        pipe.__class__ = own
        classifier = gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])
        found.append(classifier._network.denoiser.conditioning["encoder_hidden_states"])
    return found


# Stable Diffusion 1 and 2 can skip none with version 5 of transformers.
@pytest.mark.parametrize("family", FAMILIES[1:3])
def test_layers_of_clip_that_a_pipeline_of_ones_own_skips(family, pipe_of):
    def call(self, prompt, clip_skip=1):
        return super(type(self), self).__call__(prompt, clip_skip=clip_skip)

    pipe = pipe_of(family)
    whole, skipped = of_own(pipe, call)
    with torch.no_grad():
        parts = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False, "clip_skip": 1}
        if family == "StableDiffusion3Pipeline":
            parts |= {"prompt_2": None, "prompt_3": None}
        expected = pipe.encode_prompt(["a cat", "a dog"], device="cpu", **parts)[0]
    torch.testing.assert_close(skipped[:2], expected)
    assert not torch.allclose(skipped[:2], whole[:2])
    # The pipelines skip none for negative prompts.
    torch.testing.assert_close(skipped[2], whole[2])


def test_a_sana_pipeline_of_ones_own_without_an_instruction(pipe_of):
    def call(self, prompt, complex_human_instruction=None):
        return super(type(self), self).__call__(prompt, complex_human_instruction=None)

    pipe = pipe_of("SanaPipeline")
    instructed, plain = of_own(pipe, call)
    with torch.no_grad():
        expected = pipe.encode_prompt(["a cat", "a dog"], do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(plain[:2], expected)
    assert not torch.allclose(plain[:2], instructed[:2])


def test_components_that_do_not_fit_are_refused(pipe_of):
    def refused(message, family, **changes):
        pipe = pipe_of(family)
        for name, value in changes.items():
            setattr(pipe, name, value)
        with pytest.raises(ValueError, match=message):
            gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])

    refused("pipe.text_encoder is None", "StableDiffusionPipeline", text_encoder=None)
    refused("pipe.vae is None", "StableDiffusionPipeline", vae=None)
    inpainting = tiny_pipelines.unet(cross_attention_dim=16)
    inpainting.register_to_config(in_channels=9)
    refused("pipe.unet takes 9 channels, not the 4", "StableDiffusionPipeline", unet=inpainting)
    adapted = tiny_pipelines.unet(cross_attention_dim=16)
    adapted.register_to_config(encoder_hid_dim_type="ip_image_proj")
    refused("call pipe.unload_ip_adapter", "StableDiffusionPipeline", unet=adapted)
    refiner = tiny_pipelines.unet(
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12 + 5 * 4,
    )
    refused("a refiner is no classifier", "StableDiffusionXLPipeline", unet=refiner)
    nan = pipe_of("StableDiffusionPipeline").text_encoder
    torch.nn.init.constant_(next(nan.parameters()), float("nan"))
    refused(
        r"NaN or infinity for prompts\[0\]: keep its text",
        "StableDiffusionPipeline",
        text_encoder=nan,
    )


def test_a_network_that_caches_is_refused(pipe_of):
    from diffusers import FirstBlockCacheConfig

    pipe = pipe_of("FluxPipeline")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="call its disable_cache"):
        gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])


def test_images_that_would_be_cut_are_refused(pipe_of):
    classifier = gf.DiffusionClassifier.from_pipeline(pipe_of("FluxPipeline"), ["a cat", "a dog"])
    message = "sides that are multiples of 4, got 18 x 18; the pipeline's own size is 256 x 256"
    with pytest.raises(ValueError, match=message):
        classifier(pictures(1, size=18), strategy=gf.Full(1), **QUIET)
    assert classifier.image_size == (256, 256)
    assert len(classifier(pictures(1, size=24), strategy=gf.Full(1), **QUIET)) == 1


@pytest.mark.parametrize("images", [torch.zeros(2, 1, 16, 16), torch.zeros(2, 4, 8, 8)])
def test_images_of_other_channels_are_refused(images, pipe):
    classifier = gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])
    with pytest.raises(ValueError, match="images must have the 3 channels of the VAE, got [14]"):
        classifier(images, strategy=gf.Full(1), **QUIET)


def test_images_beyond_the_positions_of_a_network(pipe_of):
    pipe = pipe_of("StableDiffusion3Pipeline")
    classifier = gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])
    with pytest.raises(ValueError, match="sides of at most 32 pixels, got 32 x 36"):
        classifier(pictures(1, size=32, width=36), strategy=gf.Full(1), **QUIET)
    assert len(classifier(pictures(1, size=32), strategy=gf.Full(1), **QUIET)) == 1


def test_a_network_that_does_not_say_its_size(pipe):
    pipe.unet.register_to_config(sample_size=None)
    classifier = gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])
    assert classifier.image_size is None
    assert classifier.estimate(strategy="full").memory > 0
    assert len(classifier(pictures(1), strategy=gf.Full(1), **QUIET)) == 1
    with pytest.raises(ValueError, match="multiples of 2, got 17 x 17$"):
        classifier(pictures(1, size=17), strategy=gf.Full(1), **QUIET)


# Precision and devices


def test_a_vae_that_overflows_in_half_precision_runs_in_float32(pipe):
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(3e5)
    pipe.vae.register_to_config(force_upcast=False)
    images = pictures(3)
    images[1] = 1e-4
    expected = gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])(
        images, strategy=gf.Full(1), **QUIET
    )
    pipe.vae.half()
    classifier = gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])
    with torch.no_grad():
        assert not pipe.vae.encode(images.half()).latent_dist.mode().isfinite().all()
    result = classifier(images, strategy=gf.Full(1), **QUIET)
    assert pipe.vae.dtype == torch.float16
    torch.testing.assert_close(result.log_likelihood, expected.log_likelihood, rtol=0.02, atol=0)


def test_large_images_go_through_a_vae_by_twos(pipe):
    seen = []

    def vae(images):
        seen.append(len(images))
        return images[:, :1, ::128, ::128]

    classifier = gf.DiffusionClassifier(lambda x_t, t, y: x_t, DDPMScheduler(), 2, vae=vae)
    for size in (16, 1024):
        classifier(
            torch.zeros(1, 3, size, size).expand(9, -1, -1, -1), strategy=gf.Full(1), **QUIET
        )
    assert seen == [8, 1, 2, 2, 2, 2, 1]


def test_latents_that_are_nan_name_their_image(pipe):
    encode = pipe.vae.encode

    def broken(images):
        output = encode(images)
        output.latent_dist.mean[images.flatten(1).min(1).values == 0.5] = float("nan")
        return output

    pipe.vae.encode = broken
    images = pictures(12)
    images[10] = 0.5
    classifier = gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])
    with pytest.raises(ValueError, match=r"got NaN or infinity for image 10 \(id 40\)"):
        classifier(images, strategy=gf.Full(1), image_ids=range(30, 42), **QUIET)


def test_half_precision_networks_get_prompts_in_their_own(pipe_of):
    pipe = pipe_of("StableDiffusion3Pipeline")
    prompts, images = ["a cat", ["a dog", "sun"]], pictures(2)
    whole = gf.DiffusionClassifier.from_pipeline(pipe, prompts)(
        images, strategy=gf.Full(2), **QUIET
    )
    pipe.transformer.bfloat16()
    half = gf.DiffusionClassifier.from_pipeline(pipe, prompts)(images, strategy=gf.Full(2), **QUIET)
    torch.testing.assert_close(half.log_likelihood, whole.log_likelihood, rtol=0.02, atol=0)
    assert not torch.equal(half.log_likelihood, whole.log_likelihood)


@pytest.mark.parametrize("family", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_an_offloaded_pipeline_classifies_the_same(family, pipe_of):
    accelerate = pytest.importorskip("accelerate")
    prompts, images = ["a cat", ["a dog", "sun"]], pictures(2)
    plain = gf.DiffusionClassifier.from_pipeline(pipe_of(family), prompts)
    pipe = pipe_of(family)
    modules = [each for each in pipe.components.values() if isinstance(each, torch.nn.Module)]
    for module in modules:
        # Its weights lie on the device "meta" until they are needed.
        accelerate.cpu_offload(module, execution_device="cpu")
    offloaded = gf.DiffusionClassifier.from_pipeline(pipe, prompts)
    first, second = (each(images, strategy=gf.Full(2), **QUIET) for each in (plain, offloaded))
    assert torch.equal(first.log_likelihood, second.log_likelihood)


def test_text_encoders_on_several_devices_are_refused(pipe_of):
    pipe = pipe_of("StableDiffusionXLPipeline")
    pipe.text_encoder_2.to("meta")
    message = "on one device, got text_encoder on cpu, text_encoder_2 on meta"
    with pytest.raises(ValueError, match=message):
        gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])


def test_an_offloaded_vae_is_not_copied(pipe):
    accelerate = pytest.importorskip("accelerate")
    pipe.vae.half().register_to_config(force_upcast=True)
    accelerate.cpu_offload(pipe.vae, execution_device="cpu")
    classifier = gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])
    with pytest.raises(ValueError, match=r"vae overflows in float16, and is offloaded: convert it"):
        classifier(pictures(1), strategy=gf.Full(1), **QUIET)


@pytest.mark.slow
def test_a_compiled_network_classifies_the_same(pipe):
    plain = gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])
    unet = pipe.unet
    pipe.unet = torch.compile(unet, backend="eager")
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    compiled = gf.DiffusionClassifier.from_pipeline(pipe, ["a cat", "a dog"])
    pipe.unet.train()
    first, second = (each(pictures(2), strategy=gf.Full(1), **QUIET) for each in (plain, compiled))
    torch.testing.assert_close(first.log_likelihood, second.log_likelihood)
    assert unet.training


def test_prompts_are_encoded_in_parts(pipe, monkeypatch):
    whole = gf.DiffusionClassifier.from_pipeline(pipe, PROMPTS)
    monkeypatch.setattr(denoiser, "_ENCODED", 2)
    in_parts = gf.DiffusionClassifier.from_pipeline(pipe, PROMPTS)
    first, second = (each(pictures(2), strategy=gf.Full(1), **QUIET) for each in (whole, in_parts))
    torch.testing.assert_close(first.log_likelihood, second.log_likelihood, rtol=1e-5, atol=0)
    torch.testing.assert_close(first.lift, second.lift, rtol=0, atol=2e-3)


def test_text_encoders_are_in_eval_mode_once_and_may_be_freed(pipe_of):
    pipe, prompts = pipe_of("PixArtSigmaPipeline"), ["a cat", "a dog"]

    def found(classifier):
        return classifier(pictures(1), strategy=gf.Full(1), **QUIET).log_likelihood

    expected = found(gf.DiffusionClassifier.from_pipeline(pipe, prompts))
    # In training mode T5 drops units.
    pipe.text_encoder.train()
    classifier = gf.DiffusionClassifier.from_pipeline(pipe, prompts)
    assert pipe.text_encoder.training
    encoder = weakref.ref(pipe.text_encoder)
    pipe.text_encoder = None
    gc.collect()
    assert encoder() is None
    assert torch.equal(found(classifier), expected)


# Saved


@pytest.fixture
def saved(pipe, tmp_path):
    classifier = gf.DiffusionClassifier.from_pipeline(pipe, PROMPTS)
    classifier.calibrate(pictures(6), steps=4, **QUIET)
    classifier.save_pretrained(tmp_path / "saved")
    return classifier, tmp_path / "saved"


def test_a_saved_classifier_of_a_pipeline_decides_the_same(saved, pipe):
    classifier, folder = saved
    loaded = gf.DiffusionClassifier.from_pretrained(folder, pipe=pipe, prompts=PROMPTS, pad_to=64)
    assert loaded.prompts == classifier.prompts == (("a cat",), ("a dog", "sun", "bed"), ("a sea",))
    assert (loaded.null_class, loaded.pad_to) == (3, 64)
    images = pictures(3, seed=1)
    first, second = (each(images, **QUIET) for each in (classifier, loaded))
    torch.testing.assert_close(first.posterior, second.posterior, rtol=1e-4, atol=1e-5)
    assert torch.equal(first.evaluations, second.evaluations)
    # Another scheduler of the same noise levels.
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert gf.DiffusionClassifier.from_pretrained(folder, pipe=pipe).calibration is not None


def test_another_source_than_the_saved_one_is_refused(saved, pipe, pipe_of, tmp_path):
    _, folder = saved
    load = gf.DiffusionClassifier.from_pretrained
    with pytest.raises(
        TypeError, match="pipe must be given, and no denoiser: .* a StableDiffusion"
    ):
        load(folder, pipe.unet)
    with pytest.raises(
        ValueError, match="pipe must be a StableDiffusionPipeline, .* got DiTPipeline"
    ):
        load(folder, pipe=pipe_of("DiTPipeline"))
    with pytest.raises(ValueError, match="prompts must be those of the saved classifier"):
        load(folder, pipe=pipe, prompts=["a cat", ["a dog", "sun"], "a sea"])
    for wrong in (5, "a cat"):
        with pytest.raises(TypeError, match="prompts must be those .*, a list, got (int|str)"):
            load(folder, pipe=pipe, prompts=wrong)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="pipe.scheduler must have the noise levels of the saved"):
        load(folder, pipe=pipe)
    gf.DiffusionClassifier(lambda *rows: rows[0], DDPMScheduler(), 2).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="denoiser must be given, and neither pipe nor prompts"):
        load(tmp_path, pipe=pipe)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [["a cat"], ["a dog"], ["a sea"]]}, "measured with other prompts than those"),
        ({"null_prompt": "nothing"}, "measured with other prompts than those"),
        ({"prompts": [["a cat"], ["a dog"]]}, "pipeline must have prompts of 3 classes, got 2"),
        ({"prompts": ["a cat", "a dog", "a sea"]}, "pipeline must have a class, lists of prompts"),
        ({"class": "DiTPipeline"}, "pipe must be a DiTPipeline"),
    ],
)
def test_changed_prompts_of_a_saved_classifier(saved, pipe, change, message):
    _, folder = saved
    file = folder / "classifier.json"
    content = json.loads(file.read_text())
    content["pipeline"] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        gf.DiffusionClassifier.from_pretrained(folder, pipe=pipe)
