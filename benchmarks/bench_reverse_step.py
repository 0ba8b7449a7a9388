"""Reverse step with its score: ours, diffusers' step and eager scoring, and both compiled.

"step" is one step of 2^24 elements: read x_t, o and x, write x' (without x where there is no
score). "chain" is 50 such steps, one after the other, of 16 samples of 4 x 32 x 32, the denoiser's
outputs given. Each provider must first agree with the step and its score in float64, ours with the
noise too.

Providers: `DDPMScheduler` (diffusers' step, then the score as a reader would write it), `compiled`
(mean, score and the addition of noise of torch.randn in one compiled function), and `reverse_step`
on each backend that can run. Beside them, as a measure of what noise costs, `normal_` alone.
"""

import functools
import math

import torch
from diffusers import DDPMScheduler

from genrep_fast import StepCoefficients, reverse_step, use_backend
from genrep_fast.benchmarks.measurement import DEVICE, Case, Provider, compiled_backends, copy_of
from genrep_fast.reference import reverse_step as reference

SHAPE, STEPS, STEP, SEED = (4, 32, 32), 50, 20, 7
CHECKED = 64  # samples
BACKENDS = compiled_backends("reverse_step")


class Setting:
    """Samples, denoiser outputs and clean samples [B, 4, 32, 32], a scheduler and its tables."""

    def __init__(self, batch):
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        self.x_t, self.output, self.x = (
            torch.randn(batch, *SHAPE, generator=self.generator, device=DEVICE) for _ in range(3)
        )
        self.scheduler = DDPMScheduler(clip_sample=False, variance_type="fixed_large")
        self.scheduler.set_timesteps(STEPS)
        self.coefficients = StepCoefficients.chain(self.scheduler, self.scheduler.timesteps).to(
            DEVICE
        )
        self.chain_ids = torch.arange(batch, device=DEVICE)


def diffusers_step(scored, setting, x_t, step):
    moved = setting.scheduler.step(
        setting.output, setting.scheduler.timesteps[step], x_t, generator=setting.generator
    ).prev_sample
    if not scored:
        return moved, None
    tables = setting.coefficients
    mean = tables.mean_noisy[step] * x_t + tables.mean_output[step] * setting.output
    return moved, torch.distributions.Normal(mean, tables.std[step], validate_args=False).log_prob(
        setting.x
    ).flatten(1).sum(1)


@torch.compile(fullgraph=True, dynamic=False)
def fused_step(x_t, output, x, noise, mean_noisy, mean_output, std):
    mean = mean_noisy * x_t + mean_output * output
    score = None
    if x is not None:
        score = (
            (-0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi))
            .flatten(1)
            .sum(1)
        )
    return mean + std * noise, score


def compiled(scored, setting, x_t, step):
    noise = torch.randn(x_t.shape, generator=setting.generator, device=DEVICE)
    tables = (
        table[step]
        for table in (
            setting.coefficients.mean_noisy,
            setting.coefficients.mean_output,
            setting.coefficients.std,
        )
    )
    return fused_step(x_t, setting.output, setting.x if scored else None, noise, *tables)


def normal(setting, x_t, step):
    return torch.empty_like(x_t).normal_(), None


def ours(backend, scored, setting, x_t, step):
    x = setting.x if scored else None
    with use_backend(backend):
        return reverse_step(
            x_t,
            setting.output,
            setting.coefficients,
            step,
            seed=SEED,
            chain_ids=setting.chain_ids,
            x=x,
        )


def chain(provider, setting):
    x_t, scores = setting.x_t, []
    for step in range(STEPS):
        x_t, score = provider(setting, x_t, step)
        scores.append(score)
    return x_t, scores


def providers_of(scored):
    """Name -> role and function."""
    return {
        "DDPMScheduler": ("eager", functools.partial(diffusers_step, scored)),
        "compiled": ("compiled", functools.partial(compiled, scored)),
        "normal_": ("bound", normal),
        **{
            f"reverse_step, {name}": ("ours", functools.partial(ours, name, scored))
            for name in BACKENDS
        },
    }


def error_of(name, provider, setting):
    """Largest error of the samples, or of the scores, over the largest value.

    diffusers and torch.compile draw noise of their own.
    """
    if name == "normal_":
        return 0.0
    generator_state = setting.generator.get_state()
    moved, score = provider(setting, setting.x_t, STEP)
    samples = torch.arange(len(setting.x_t), device=DEVICE)
    samples = torch.cat([samples[:CHECKED], samples[CHECKED:][-CHECKED:]])
    some = [
        tensor[samples] for tensor in (setting.x_t, setting.output, setting.x, setting.chain_ids)
    ]
    x_t, output, x, chain_ids = (
        tensor.double() if tensor.is_floating_point() else tensor for tensor in some
    )
    expected, expected_score = reverse_step(
        x_t, output, setting.coefficients, STEP, seed=SEED, chain_ids=chain_ids, x=x
    )
    if not name.startswith("reverse_step"):
        drawn = torch.randn(
            setting.x_t.shape, generator=setting.generator.set_state(generator_state), device=DEVICE
        )
        noise = reference.chain_noise(SEED, chain_ids, STEP, SHAPE)
        expected += setting.coefficients.std[STEP].double() * (drawn[samples].double() - noise)
    errors = [((moved[samples].double() - expected).abs().max() / expected.abs().max()).item()]
    if score is not None:
        errors += [
            (
                (score[samples].double() - expected_score).abs().max() / expected_score.abs().max()
            ).item()
        ]
    if not max(errors) < 1e-5:
        raise RuntimeError(f"relative errors {', '.join(f'{error:.1e}' for error in errors)}")
    return max(errors)


def case(batch, scored, chained):
    setting = Setting(batch)
    providers = {
        name: Provider(
            functools.partial(chain, run, setting)
            if chained
            else functools.partial(run, setting, setting.x_t, STEP),
            functools.partial(error_of, name, run, setting),
            role,
        )
        for name, (role, run) in providers_of(scored).items()
    }
    elements, steps = setting.x_t.numel(), STEPS if chained else 1
    tensors = 4 if scored else 3
    return Case(
        providers,
        steps * elements,
        steps * tensors * 4 * elements,
        steps * (30 if scored else 24) * elements,
        **copy_of(setting.x_t),
    )


CASES = {
    "step": functools.partial(case, 2**24 // math.prod(SHAPE), True, False),
    "step without score": functools.partial(case, 2**24 // math.prod(SHAPE), False, False),
    "chain": functools.partial(case, 16, True, True),
}
QUICK = ["step"]
SMALLEST = "chain"
