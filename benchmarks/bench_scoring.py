"""Scoring: denoiser outputs through the mixture likelihood to the distillation loss, forward and with backward.

`python benchmarks/bench_scoring.py` prints a table; `pytest benchmarks/bench_scoring.py` runs the same under pytest-benchmark. A floor is
the time in which the outputs can be moved: half of `copy_` for the forward pass (read), three halves with backward (read, read, write),
measured in the same run.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import pytest
import torch
from measurement import measure, print_header, print_row

import genrep_fast as gf
from genrep_fast.reference import scoring as reference

TEMPERATURE = 50.0
HALF_COPIES = {"forward": 1, "forward + backward": 3}


def make_inputs(batch: int, classes: int, steps: int, size: int, dtype: torch.dtype = torch.float32) -> tuple:
    """Logits [B, K], images [B, 4, H, W], outputs [B, K, S, 4, H, W] and the tables of a chain whose outputs are its means; D = 4 H W."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, size, size, generator=generator).to(dtype)
    model_output = torch.randn(batch, classes, steps, 4, size, size, generator=generator).to(dtype)
    one, std = torch.ones(steps), torch.linspace(0.3, 1, steps)
    log_norm = torch.distributions.Normal(0, std).log_prob(torch.zeros(1))
    coefficients = gf.StepCoefficients(data=one, noisy=0 * one, output=-one, inv_var=std**-2, log_norm=log_norm)
    return torch.randn(batch, classes, generator=generator), x, model_output, coefficients


def reference_loss(logits, x, model_output, coefficients):
    tables = (coefficients.data, coefficients.noisy, coefficients.output, coefficients.inv_var, coefficients.log_norm)
    likelihood = reference.log_likelihood(x, model_output, None, *tables, "mixture", False)
    return reference.distillation_loss(logits, likelihood, None, TEMPERATURE).mean()


def operator_loss(logits, x, model_output, coefficients):
    return gf.distillation_loss(logits, gf.log_likelihood(x, model_output, coefficients), temperature=TEMPERATURE)


PROVIDERS = {
    "eager reference": reference_loss,
    "compiled reference": torch.compile(reference_loss, fullgraph=True),
    "genrep_fast": operator_loss,
}


def make_run(provider: str, mode: str, inputs: tuple) -> Callable[[], tuple]:
    """A call that returns the loss, and the outputs' gradient where `mode` has it."""
    logits, x, model_output, coefficients = inputs
    if mode == "forward":
        return lambda: (PROVIDERS[provider](*inputs),)

    def run() -> tuple:
        leaf = model_output.detach().requires_grad_()
        loss = PROVIDERS[provider](logits, x, leaf, coefficients)
        return loss, *torch.autograd.grad(loss, leaf)

    return run


def check(run: Callable[[], tuple], mode: str, inputs: tuple) -> None:
    """The correctness gate: against the eager reference in float64, within 1e-4 of the largest value."""
    logits, x, model_output, coefficients = inputs
    exact = make_run("eager reference", mode, (logits.double(), x.double(), model_output.double(), coefficients))()
    for got, expected in zip(run(), exact, strict=True):
        torch.testing.assert_close(got.double(), expected.detach(), rtol=0, atol=1e-4 * expected.abs().max().item())


@functools.cache
def default_inputs() -> tuple:
    return make_inputs(batch=4, classes=10, steps=10, size=16)


@pytest.mark.parametrize("mode", HALF_COPIES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_scoring(benchmark, provider, mode):
    run = make_run(provider, mode, default_inputs())
    check(run, mode, default_inputs())
    benchmark(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("batch", 4), ("classes", 10), ("steps", 10), ("size", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    inputs = make_inputs(options.batch, options.classes, options.steps, options.size)
    target = torch.empty_like(inputs[2])
    copy = measure(lambda: target.copy_(inputs[2])).median
    print_header(f"outputs {tuple(target.shape)}, {target.nbytes / 1e6:.1f} MB, copy_ {copy:.3f} ms", "floor")
    for mode, halves in HALF_COPIES.items():
        for provider in PROVIDERS:
            run = make_run(provider, mode, inputs)
            check(run, mode, inputs)
            print_row(f"{provider}, {mode}", measure(run), copy * halves / 2)


if __name__ == "__main__":
    main()
