"""Reverse step with its score: ours, diffusers' own step followed by eager scoring, and what drawing the noise and moving memory cost.

    python benchmarks/bench_reverse_step.py [--elements 16777216] [--chains 16] [--threads 1 2]
    pytest benchmarks/bench_reverse_step.py

"step" is one step of `--elements` elements. Its memory floor is two `copy_` of x_t: read x_t, o and x, write x' (one and a half without x).
Its bound, what the step is to take at most, is 1.5 floors and a quarter of `normal_` on the same elements. "chain" is 50 such steps, one
after the other, of `--chains` samples of 4 x 32 x 32, the denoiser's outputs given. "speed-up" is over diffusers with, or without, a score.
All providers of a table are called in turn, with empty caches, and their medians compared. Each must first agree with the step and its
score in float64, ours with the noise too.

Providers: `DDPMScheduler` (diffusers' step, then the score as a reader would write it), `DDPMScheduler, no score`, `reverse_step` on each
backend that can run, with and without a score; the reference, which draws noise from 64-bit integers, in the chain alone.
"""

import functools
import json
import math

import pytest
import torch
from diffusers import DDPMScheduler
from measurement import DEVICE, benchmark_options, compiled_backends, measure_cases, print_table, tables_of

from genrep_fast import StepCoefficients, reverse_step, use_backend
from genrep_fast.reference import reverse_step as reference

SHAPE, STEPS, STEP, SEED = (4, 32, 32), 50, 20, 7
CHECKED = 64  # samples
BACKENDS = compiled_backends("reverse_step")
COLUMNS = {
    "median ms": ("ms", ".3f"),
    "20 % ms": ("low_ms", ".3f"),
    "80 % ms": ("high_ms", ".3f"),
    "x floor": ("floor_ratio", ".2f"),
    "x bound": ("bound_ratio", ".2f"),
    "speed-up": ("speed_up", ".2f"),
    "extra MB": ("extra_mb", ".2f"),
}


class Setting:
    """Samples, denoiser outputs and clean samples [B, 4, 32, 32], a scheduler and its tables."""

    def __init__(self, batch):
        self.generator = torch.Generator(DEVICE).manual_seed(0)
        self.x_t, self.output, self.x = (torch.randn(batch, *SHAPE, generator=self.generator, device=DEVICE) for _ in range(3))
        self.scheduler = DDPMScheduler(clip_sample=False, variance_type="fixed_large")
        self.scheduler.set_timesteps(STEPS)
        self.coefficients = StepCoefficients.chain(self.scheduler, self.scheduler.timesteps).to(DEVICE)
        self.chain_ids = torch.arange(batch, device=DEVICE)

    @functools.cached_property
    def buffer(self):
        return torch.empty_like(self.x_t)


def diffusers_step(scored, setting, x_t, step):
    moved = setting.scheduler.step(setting.output, setting.scheduler.timesteps[step], x_t, generator=setting.generator).prev_sample
    if not scored:
        return moved, None
    tables = setting.coefficients
    mean = tables.mean_noisy[step] * x_t + tables.mean_output[step] * setting.output
    return moved, torch.distributions.Normal(mean, tables.std[step], validate_args=False).log_prob(setting.x).flatten(1).sum(1)


def ours(backend, scored, setting, x_t, step):
    x = setting.x if scored else None
    with use_backend(backend):
        return reverse_step(x_t, setting.output, setting.coefficients, step, seed=SEED, chain_ids=setting.chain_ids, x=x)


def chain(provider, setting):
    x_t, scores = setting.x_t, []
    for step in range(STEPS):
        x_t, score = provider(setting, x_t, step)
        scores.append(score)
    return x_t, scores


PROVIDERS = {
    "DDPMScheduler": functools.partial(diffusers_step, True),
    "DDPMScheduler, no score": functools.partial(diffusers_step, False),
}
for name in (*BACKENDS, "reference"):
    PROVIDERS |= {f"reverse_step, {name}": functools.partial(ours, name, True)}
    PROVIDERS |= {f"reverse_step, {name}, no score": functools.partial(ours, name, False)}


def check(name, setting):
    """One step against the reference in float64; diffusers draws noise of its own."""
    generator_state = setting.generator.get_state()
    moved, score = PROVIDERS[name](setting, setting.x_t, STEP)
    samples = torch.arange(len(setting.x_t), device=DEVICE)
    samples = torch.cat([samples[:CHECKED], samples[CHECKED:][-CHECKED:]])
    some = [tensor[samples] for tensor in (setting.x_t, setting.output, setting.x, setting.chain_ids)]
    x_t, output, x, chain_ids = (tensor.double() if tensor.is_floating_point() else tensor for tensor in some)
    expected, expected_score = reverse_step(x_t, output, setting.coefficients, STEP, seed=SEED, chain_ids=chain_ids, x=x)
    if name.startswith("DDPMScheduler"):
        drawn = torch.randn(setting.x_t.shape, generator=setting.generator.set_state(generator_state), device=DEVICE)
        noise = reference.chain_noise(SEED, chain_ids, STEP, SHAPE)
        expected += setting.coefficients.std[STEP].double() * (drawn[samples].double() - noise)
    errors = [(moved[samples].double() - expected).abs().max() / expected.abs().max()]
    if score is not None:
        errors += [(score[samples].double() - expected_score).abs().max() / expected_score.abs().max()]
    if not all(error.item() < 1e-5 for error in errors):
        raise RuntimeError(f"{name}: relative errors {', '.join(f'{error.item():.1e}' for error in errors)}")


def runs_of(names, setting, chained):
    """Checked providers by name, behind the copy and `normal_`."""
    runs = {"copy_": functools.partial(setting.buffer.copy_, setting.x_t), "normal_": setting.buffer.normal_}
    for name in names:
        check(name, setting)
        provider = PROVIDERS[name]
        runs[name] = functools.partial(chain, provider, setting) if chained else functools.partial(provider, setting, setting.x_t, STEP)
    return runs


def complete(rows, numel):
    """Add ratios to one table's rows; floor and bound are a single step's."""
    times = {row["provider"]: row["ms"] for row in rows}
    for row in rows:
        row |= {"numel": numel, "extra_mb": row["extra_bytes"] / 1e6}
        if row["provider"] in ("copy_", "normal_"):
            continue
        without_score = row["provider"].endswith("no score")
        peer = "DDPMScheduler, no score" if without_score else "DDPMScheduler"
        if peer in times:
            row["speed_up"] = times[peer] / row["ms"]
        if row["layout"] == "step":
            floor = (1.5 if without_score else 2) * times["copy_"]
            row |= {"floor_ms": floor, "floor_ratio": row["ms"] / floor}
            row["bound_ratio"] = row["ms"] / (0.25 * times["normal_"] + 1.5 * floor)


@pytest.mark.parametrize("name", PROVIDERS)
def test_reverse_step(benchmark, name):
    setting = Setting(CHECKED)
    check(name, setting)
    benchmark(functools.partial(PROVIDERS[name], setting, setting.x_t, STEP))


def main():
    parser = benchmark_options("Time of a reverse step and its score, by provider.", list(PROVIDERS))
    parser.add_argument("--elements", type=int, default=2**24, help="of one step")
    parser.add_argument("--chains", type=int, default=16)
    options = parser.parse_args()
    fast = [name for name in options.provider if "reference" not in name]
    elements = math.prod(SHAPE)
    large, small = Setting(max(1, options.elements // elements)), Setting(options.chains)
    cases = {"step": runs_of(fast, large, False), "chain": runs_of(options.provider, small, True)}
    rows = measure_cases(cases, options)
    for table in tables_of(rows):
        x_t = (large if table[0]["layout"] == "step" else small).x_t
        complete(table, x_t.numel())
        print_table(f"{table[0]['layout']}, x_t {list(x_t.shape)}, {x_t.nbytes / 1e6:.1f} MB", table, COLUMNS)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
