"""Reverse step with its score: ours against `DDPMScheduler.step` followed by eager scoring, and against `normal_` on the same elements.

`python benchmarks/bench_reverse_step.py [--elements N]` prints a table; `pytest benchmarks/bench_reverse_step.py` runs the same in
pytest-benchmark.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler
from measurement import measure, print_header, print_row

from genrep_fast import StepCoefficients, reverse_step
from genrep_fast.reference.reverse_step import chain_noise

CHANNELS, SIZE, STEP, SEED = 4, 32, 20, 7
PROVIDERS = ("reverse_step and score", "DDPMScheduler.step and score", "normal_", "copy_")


def make_providers(elements: int) -> dict[str, Callable[[], object]]:
    """One function a provider, over the same inputs of about `elements` elements, checked against each other first."""
    batch = max(1, elements // (CHANNELS * SIZE**2))
    generator = torch.Generator().manual_seed(0)
    x_t, output, x = torch.randn(3, batch, CHANNELS, SIZE, SIZE, generator=generator)
    scheduler = DDPMScheduler(clip_sample=False, variance_type="fixed_large")
    scheduler.set_timesteps(50)
    timestep = scheduler.timesteps[STEP]
    coefficients = StepCoefficients.chain(scheduler, scheduler.timesteps)
    std = coefficients.std[STEP]
    chain_ids, buffer = torch.arange(batch), torch.empty_like(x_t)

    def ours() -> tuple[torch.Tensor, torch.Tensor]:
        return reverse_step(x_t, output, coefficients, STEP, seed=SEED, chain_ids=chain_ids, x=x)

    def diffusers_step() -> tuple[torch.Tensor, torch.Tensor]:
        mean = coefficients.mean_noisy[STEP] * x_t + coefficients.mean_output[STEP] * output
        score = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1)
        return scheduler.step(output, timestep, x_t, generator=generator).prev_sample, score

    (moved, score), (_, other_score) = ours(), diffusers_step()
    torch.testing.assert_close(score, other_score, rtol=1e-5, atol=0)
    drawn = torch.randn(x_t.shape, generator=generator.manual_seed(1))
    other = scheduler.step(output, timestep, x_t, generator=generator.manual_seed(1)).prev_sample
    noise = chain_noise(SEED, chain_ids, STEP, x_t.shape[1:]).float()
    torch.testing.assert_close(moved - std * noise, other - std * drawn, rtol=1e-5, atol=1e-5)
    return dict(zip(PROVIDERS, (ours, diffusers_step, lambda: buffer.normal_(), lambda: buffer.copy_(x_t)), strict=True))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_bench_reverse_step(benchmark, provider: str):
    benchmark(make_providers(2**18)[provider])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=2**20)
    options = parser.parse_args()
    rows = {name: measure(run) for name, run in make_providers(options.elements).items()}
    print_header(f"{options.elements} float32 elements", "normal_")
    for name, times in rows.items():
        print_row(name, times, rows["normal_"].median)


if __name__ == "__main__":
    main()
