"""One optimizer step on two gradients: alignment, AdamW and the moving average of the parameters.

    python benchmarks/bench_optimizer.py [--numel 1000000] [--tensors 1]
    pytest benchmarks/bench_optimizer.py

The fused step reads p and g for the Gram matrix (2 N elements), then reads p, g, the parameters, both moments and the average, and writes
those four: 12 N. The same step without alignment moves 10 N. The floor is 6 times the time of copying N elements (2 N) in the same run.
"""

import argparse
import functools

import pytest
import torch
from measurement import measure, print_header, print_row

import genrep_fast as gf
from genrep_fast.ops.optimizer import adamw_step

EMA_DECAY = 0.999
ELEMENTS_MOVED = 12


class Setting:
    """Parameters, two gradients, and the state of both kinds of step: `torch.optim.AdamW`'s and that of `adamw_step`."""

    def __init__(self, numel, num_tensors, dtype=torch.float32):
        generator = torch.Generator().manual_seed(0)
        flat = [torch.randn(numel, generator=generator).to(dtype) for _ in range(3)]
        params, self.p, self.g = (list(tensor.tensor_split(num_tensors)) for tensor in flat)
        self.params = [torch.nn.Parameter(param) for param in params]
        self.emas = [param.detach().clone() for param in params]
        self.aligned = [torch.empty_like(param) for param in params]
        self.optimizer = torch.optim.AdamW(self.params, fused=True)
        self.exp_avgs, self.exp_avg_sqs = ([torch.zeros_like(param) for param in params] for _ in range(2))
        self.step = torch.zeros(())


def step_with(setting, gradients):
    for param, gradient in zip(setting.params, gradients, strict=True):
        param.grad = gradient
    setting.optimizer.step()
    torch._foreach_lerp_(setting.emas, [param.detach() for param in setting.params], 1 - EMA_DECAY)


def unaligned(setting):
    """`AdamW(fused=True)` and the moving average on one gradient as it is: what a step costs without alignment."""
    step_with(setting, setting.p)


def separate(setting):
    """`gf.align_gradients`, then `AdamW(fused=True)`, then the moving average."""
    step_with(setting, gf.align_gradients(setting.p, setting.g, out=setting.aligned)[0])


def fused(setting):
    """Gram matrix, coefficients, and `adamw_step` on the reference."""
    setting.step += 1
    coefficients = torch.ops.genrep_fast.alignment_coefficients(gf.gram(setting.p, setting.g), [0.7, 0.3], 2.0)[0]
    adamw_step(
        setting.params,
        (setting.p, setting.g),
        coefficients,
        exp_avgs=setting.exp_avgs,
        exp_avg_sqs=setting.exp_avg_sqs,
        steps=[setting.step] * len(setting.params),
        lr=1e-3,
        emas=setting.emas,
        ema_decay=EMA_DECAY,
    )


PROVIDERS = {"unaligned": unaligned, "separate": separate, "fused": fused}


def check(name, numel, num_tensors):
    """Three steps must agree with the separate operations in float64."""
    setting, exact = Setting(numel, num_tensors), Setting(numel, num_tensors, torch.float64)
    for _ in range(3):
        PROVIDERS[name](setting)
        PROVIDERS["unaligned" if name == "unaligned" else "separate"](exact)
    for results, expected in ((setting.params, exact.params), (setting.emas, exact.emas)):
        torch.testing.assert_close(torch.cat(results).double(), torch.cat(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PROVIDERS)
def test_optimizer(benchmark, name):
    check(name, 1_000_000, 1)
    benchmark(PROVIDERS[name], Setting(1_000_000, 1))


def main():
    parser = argparse.ArgumentParser(description="Time of one optimizer step on two gradients, by provider.")
    parser.add_argument("--numel", type=int, default=1_000_000, help="number of parameters")
    parser.add_argument("--tensors", type=int, default=1, help="tensors that they are spread over")
    options = parser.parse_args()
    source, target = torch.randn(options.numel), torch.empty(options.numel)
    floor = ELEMENTS_MOVED / 2 * measure(lambda: target.copy_(source)).median
    print_header(f"N = {options.numel}, {options.tensors} tensors, float32, floor {floor:.3f} ms", "floor")
    for name, provider in PROVIDERS.items():
        check(name, options.numel, options.tensors)
        print_row(name, measure(functools.partial(provider, Setting(options.numel, options.tensors))), floor)


if __name__ == "__main__":
    main()
