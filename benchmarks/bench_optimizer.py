"""One optimizer step on two gradients: alignment, AdamW and the moving average of the parameters.

    python benchmarks/bench_optimizer.py [--numel 1000000 10000000] [--layout flat list] [--threads 1 2] [--seconds 3]
    pytest benchmarks/bench_optimizer.py

The fused step reads p and g for the Gram matrix (2 N elements), then reads p, g, the parameters, both moments and the average, and writes
those four: 12 N. The same step on one gradient, without alignment, moves 10 N. The floor is 6 times the time of copying N elements (2 N) in
the same run. Every provider must first agree with the separate operations in float64; all of them, the copy too, are called in turn.

Providers: `unaligned` (AdamW(fused=True) and the moving average on one gradient as it is: what a step costs without alignment), `foreach`
and `compiled` (alignment as in bench_alignment.py, then the same), `gf.align_gradients` (likewise), and `AlignedAdamW` on each backend that
can run, handing the gradients over included.
"""

import argparse
import functools
import json
from pathlib import Path

import bench_alignment
import pytest
import torch
from bench_alignment import BACKENDS, DEVICE, POWER, WEIGHTS
from measurement import keep_freed_memory, measure_together, print_header, print_row, threads

import genrep_fast as gf

EMA_DECAY = 0.999
ELEMENTS_MOVED = 12


class Setting(bench_alignment.Setting):
    """Parameters, two gradients, and the state of both kinds of step."""

    def __init__(self, numel, layout, dtype=torch.float32):
        super().__init__(numel, layout)
        self.p, self.g, self.out = ([tensor.to(dtype) for tensor in tensors] for tensors in (self.p, self.g, self.out))
        generator = torch.Generator(DEVICE).manual_seed(1)
        self.weights = [torch.nn.Parameter(torch.randn(shape, generator=generator, device=DEVICE).to(dtype)) for shape in self.shapes]
        self.averages = [weight.detach().clone() for weight in self.weights]

    @functools.cached_property
    def adamw(self):
        return torch.optim.AdamW(self.weights, fused=True)

    @functools.cached_property
    def aligned_adamw(self):
        aligner = gf.GradientAligner(self.weights, weights=WEIGHTS, power=POWER)
        return gf.AlignedAdamW(self.weights, aligner=aligner, ema=self.averages, ema_decay=EMA_DECAY)


def step_with(setting, gradients):
    for weight, gradient in zip(setting.weights, gradients, strict=True):
        weight.grad = gradient
    setting.adamw.step()
    torch._foreach_lerp_(setting.averages, [weight.detach() for weight in setting.weights], 1 - EMA_DECAY)


def unaligned(setting):
    step_with(setting, setting.p)


def separate(align, setting):
    align(setting)
    step_with(setting, setting.out)


def fused(backend, setting):
    with gf.use_backend(backend):
        bench_alignment.hand_over(setting.aligned_adamw.aligner, setting.p, setting.g)
        setting.aligned_adamw.step()


PROVIDERS = {
    "unaligned": unaligned,
    "foreach": functools.partial(separate, bench_alignment.foreach),
    "compiled": functools.partial(separate, functools.partial(bench_alignment.compiled, False)),
    **{
        f"gf.align_gradients, {name}": functools.partial(separate, functools.partial(bench_alignment.ours, name, False))
        for name in ("reference", *BACKENDS)
    },
    **{f"AlignedAdamW, {name}": functools.partial(fused, name) for name in ("reference", *BACKENDS)},
}


def check(name, numel, layout):
    """Three steps must agree with the separate operations in float64."""
    setting, exact = Setting(numel, layout), Setting(numel, layout, torch.float64)
    for _ in range(3):
        PROVIDERS[name](setting)
        PROVIDERS["unaligned" if name == "unaligned" else "gf.align_gradients, reference"](exact)
    for results, expected in ((setting.weights, exact.weights), (setting.averages, exact.averages)):
        # In the norm: Adam divides by gradients of any size, small wrong ones too. Float32 `torch.dot` costs foreach 6e-6 at N = 1e7.
        error = torch.cat([(result.double() - value).flatten() for result, value in zip(results, expected, strict=True)]).norm()
        error = (error / torch.cat([value.flatten() for value in expected]).norm()).item()
        if not error < 1e-4:
            raise RuntimeError(f"{name}: relative error {error:.1e}")


def providers_of(layout):
    return [name for name in PROVIDERS if (name, layout) != ("compiled", "list")]  # compiling 192 tensors takes minutes


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for layout in ("flat", "list") for name in providers_of(layout)])
def test_optimizer(benchmark, name, layout):
    check(name, 1_000_000, layout)
    benchmark(PROVIDERS[name], Setting(1_000_000, layout))


def main():
    parser = argparse.ArgumentParser(description="Time of one optimizer step on two gradients, by provider.")
    parser.add_argument("--numel", type=int, nargs="+", default=[10**6, 10**7], help="number of parameters")
    parser.add_argument("--layout", nargs="+", choices=["flat", "list"], default=["flat", "list"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each table")
    parser.add_argument("--provider", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS), help="besides `unaligned`")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    keep_freed_memory()
    rows = []
    for numel in options.numel:
        for layout in options.layout:
            names = [name for name in providers_of(layout) if name in ("unaligned", *options.provider)]
            for name in names:
                check(name, numel, layout)
            for number in options.threads:
                with threads(number):
                    source, target = torch.randn(numel, device=DEVICE), torch.empty(numel, device=DEVICE)
                    runs = {"copy": functools.partial(target.copy_, source)}
                    runs |= {name: functools.partial(PROVIDERS[name], Setting(numel, layout)) for name in names}
                    times = measure_together(runs, options.seconds)
                    floor = ELEMENTS_MOVED / 2 * times["copy"].median
                    print_header(f"\nN = {numel}, {layout}, float32, {DEVICE}, floor {floor:.3f} ms", "unaligned")
                for name in names:
                    print_row(name, times[name], times["unaligned"].median)
                    rows.append({"numel": numel, "layout": layout, "threads": number, "provider": name, "ms": times[name].median})
                    rows[-1] |= {"host_ms": times[name].host, "floor_ms": floor, "unaligned_ms": times["unaligned"].median}
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
