"""A whole training step on two losses: what alignment adds to it.

    python benchmarks/bench_training_step.py [--layers 6] [--batch 32] [--threads 1 2] [--seconds 20]
    pytest benchmarks/bench_training_step.py

A diffusion transformer (16 million parameters by default) computes a classification loss on clean images and a denoising loss on noisy
ones. `unaligned` runs two plain backward passes into ``.grad``, `torch.optim.AdamW(fused=True)` and a `torch._foreach_lerp_` moving
average; `aligned` replaces them by `GradientAligner.backward` and `AlignedAdamW`, whose first step must agree with ``align_gradients`` and
AdamW in the reference. Both kinds of step are taken in turn. Alignment holds two gradients where plain accumulation holds one: with the C
library's own allocator ("cold") the second one costs page faults in every step, with one that keeps what was freed ("warm"), as on a GPU,
it does not.
"""

import argparse
import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from measurement import keep_freed_memory, measure_together, print_header, print_row, threads

import genrep_fast as gf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EMA_DECAY = 0.999


def build_model(layers):
    torch.manual_seed(0)
    options = {"num_attention_heads": 6, "attention_head_dim": 64, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10}
    model = DiTTransformer2DModel(in_channels=1, out_channels=1, num_layers=layers, **options).to(DEVICE)
    for parameter in model.parameters():  # the zero-initialised output layer would stop both gradients
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


class Setting:
    """A model, a batch, and both losses on it."""

    def __init__(self, layers, batch):
        self.model = build_model(layers)
        self.averages = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.head = torch.randn(64, 10, device=DEVICE) / 8
        self.images, self.noise = (torch.randn(batch, 1, 8, 8, device=DEVICE) for _ in range(2))
        self.labels = torch.randint(10, (batch,), device=DEVICE)
        self.timesteps = torch.randint(1000, (batch,), device=DEVICE)

    def losses(self):
        clean = self.model(self.images, torch.zeros_like(self.timesteps), self.labels * 0).sample
        perception = torch.nn.functional.cross_entropy(clean.flatten(1) @ self.head, self.labels)
        output = self.model(0.7 * self.images + 0.7 * self.noise, self.timesteps, self.labels).sample
        return perception, torch.nn.functional.mse_loss(output, self.noise)


class Unaligned(Setting):
    def __init__(self, layers, batch):
        super().__init__(layers, batch)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def step(self):
        perception, generation = self.losses()
        self.optimizer.zero_grad()
        perception.backward()
        generation.backward()
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, list(self.model.parameters()), 1 - EMA_DECAY)


class Aligned(Setting):
    def __init__(self, layers, batch):
        super().__init__(layers, batch)
        self.aligner = gf.GradientAligner(self.model)
        self.optimizer = gf.AlignedAdamW(self.model.parameters(), aligner=self.aligner, ema=self.averages, ema_decay=EMA_DECAY)

    def step(self):
        perception, generation = self.losses()
        self.optimizer.zero_grad()
        self.aligner.backward(perception, generation)
        self.optimizer.step()


def check(layers, batch):
    """The first step of `Aligned` against its parts, in the reference."""
    setting = Aligned(layers, batch)
    setting.model.eval()  # without the labels' dropout, so that the losses can be computed again
    reference = copy.deepcopy(setting.model)
    parameters = list(reference.parameters())
    setting.step()
    setting.model = reference
    gradients = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in setting.losses()]
    with gf.use_backend("reference"):
        aligned, _ = gf.align_gradients(*gradients)
    for parameter, gradient in zip(parameters, aligned, strict=True):
        parameter.grad = gradient
    torch.optim.AdamW(parameters).step()
    with torch.no_grad():
        for average, parameter, start in zip(setting.averages, parameters, build_model(layers).parameters(), strict=True):
            error = (average - torch.lerp(start, parameter, 1 - EMA_DECAY)).norm().item()
            if not error <= 1e-5 * average.norm().item():
                raise RuntimeError(f"moving average of a parameter of shape {tuple(average.shape)}: error {error:.1e}")


@pytest.mark.parametrize("kind", [Unaligned, Aligned], ids=["unaligned", "aligned"])
def test_training_step(benchmark, kind):
    check(2, 4)
    benchmark(kind(2, 4).step)


def main():
    parser = argparse.ArgumentParser(description="Time of a training step on two losses, with and without alignment.")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each table")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    check(options.layers, options.batch)
    settings = {"unaligned": Unaligned(options.layers, options.batch), "aligned": Aligned(options.layers, options.batch)}
    runs = {name: setting.step for name, setting in settings.items()}
    numel = sum(parameter.numel() for parameter in settings["aligned"].model.parameters())
    rows = []
    for temper in ("cold", "warm"):
        if temper == "warm":
            keep_freed_memory()
        for number in options.threads:
            with threads(number):
                times = measure_together(runs, options.seconds)
                print_header(f"\n{temper}: {numel} parameters, batch of {options.batch}, {DEVICE}", "unaligned")
            for name in runs:
                print_row(name, times[name], times["unaligned"].median)
                rows.append({"numel": numel, "layers": options.layers, "batch": options.batch, "allocator": temper, "threads": number})
                rows[-1] |= {"host_ms": times[name].host, "provider": name, "ms": times[name].median, "unaligned_ms": times["unaligned"].median}
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
