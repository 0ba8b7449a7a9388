"""Class-chain bank: a batch of images against the centres of every class, log (1/S) sum_s N(x; center, sigma_s^2 I).

    python benchmarks/bench_chain_bank.py [--images 64] [--chains 32] [--threads 1 2]
    pytest benchmarks/bench_chain_bank.py

A bank of 10 classes and `--chains` chains of 75 steps, run by the scheduler with an analytic denoiser, D = 1 x 32 x 32. All providers are
called in turn, with empty caches, and their medians compared, as multiples of copying the bank and as speed-ups over `cdist` and
broadcasting. The centres are bfloat16 numbers, so that banks in float32 and bfloat16 have the same likelihoods; the error is the largest
difference from them in float64, in nats.

Providers: `cdist` (torch.cdist in its default mode, which is a matrix product here, and logsumexp), `cdist, direct` (without that product),
`matrix product` (|x|^2 - 2 x c + |c|^2 spelled out), `broadcasting` (x - c, as many centres at a time as fit into 64 MB), `compiled
broadcasting` (the same through torch.compile), and `log_likelihood` and `ChainBank` (its `log_likelihood`) on each backend that can run,
from float32 and bfloat16 centres. Ours may hold at most 16 bytes an image and class and 1 MiB.
"""

import functools
import json
import math

import pytest
import torch
from diffusers import DDPMScheduler
from measurement import DEVICE, benchmark_options, compiled_backends, measure_cases, print_table, tables_of

import genrep_fast as gf

CLASSES, STEPS, SHAPE = 10, 75, (1, 32, 32)
SIGMA_FLOOR = 0.1
BLOCK_ELEMENTS = 2**24
BACKENDS = compiled_backends("log_likelihood")
COLUMNS = {
    "median ms": ("ms", ".3f"),
    "20 % ms": ("low_ms", ".3f"),
    "80 % ms": ("high_ms", ".3f"),
    "x copy_": ("copy_ratio", ".2f"),
    "over cdist": ("over_cdist", ".2f"),
    "over broad.": ("over_broadcasting", ".2f"),
    "error, nats": ("error", ".1e"),
    "extra MB": ("extra_mb", ".2f"),
}


def denoiser(x_t, timesteps, labels):
    """The exact noise prediction for data N(m_y, 0.25 I) with m_y a wave of as many periods as the label."""
    level = DDPMScheduler().alphas_cumprod.to(x_t)[timesteps].view(-1, 1, 1, 1)
    mean = torch.sin(labels.view(-1, 1, 1, 1) * torch.linspace(0, 2 * math.pi, SHAPE[2], device=x_t.device))
    return (1 - level).sqrt() * (x_t - level.sqrt() * mean) / (0.25 * level + 1 - level)


class Setting:
    """Banks and images near some of their centres."""

    def __init__(self, images, chains):
        scheduler = DDPMScheduler(clip_sample=False)
        options = {"num_inference_steps": STEPS, "chains": chains, "burn_in": 0, "thin": 1, "sigma_floor": SIGMA_FLOOR, "seed": 0}
        self.banks = {
            dtype: gf.ChainBank.build(denoiser, scheduler, CLASSES, SHAPE, **options, dtype=dtype, device=DEVICE)
            for dtype in (torch.float32, torch.bfloat16)
        }
        half, full = self.banks[torch.bfloat16], self.banks[torch.float32]
        full.centers.copy_(half.centers)
        self.std = full.std.float()
        generator = torch.Generator(DEVICE).manual_seed(0)
        last = full.centers[:, STEPS - 1 :: STEPS].flatten(0, 1)  # the chains' ends
        chosen = torch.randint(len(last), (images,), generator=generator, device=DEVICE)
        self.x = last[chosen] + SIGMA_FLOOR * torch.randn(images, *SHAPE, generator=generator, device=DEVICE)
        one = torch.ones_like(self.std)
        log_norm = -self.std.log() - 0.5 * math.log(2 * math.pi)
        self.coefficients = gf.StepCoefficients(one, 0 * one, -one, self.std**-2, log_norm)

    @functools.cached_property
    def buffer(self):
        return torch.empty_like(self.banks[torch.float32].centers)

    @property
    def flat(self):
        """Images [B, D] and float32 centres [K, S, D]."""
        return self.x.flatten(1), self.banks[torch.float32].centers.flatten(2)


def mixture(squares, std, elements):
    """From squared distances [..., S] on."""
    scores = -0.5 * squares / std**2 - elements * (std.log() + 0.5 * math.log(2 * math.pi))
    return scores.logsumexp(-1) - math.log(len(std))


def cdist(mode, setting):
    x, centers = setting.flat
    return mixture(torch.cdist(x, centers, compute_mode=mode).square(), setting.std, x.shape[1]).T


def matrix_product(setting):
    x, centers = setting.flat
    squares = x.square().sum(1)[:, None] - 2 * (x @ centers.mT) + centers.square().sum(2)[:, None]  # [K, B, S]
    return mixture(squares, setting.std, x.shape[1]).T


def squared_distances(x, centers):
    return (x[:, None] - centers).square().sum(2)


compiled_squared_distances = torch.compile(squared_distances, fullgraph=True, dynamic=False)


def broadcasting(squares_of, setting):
    x, centers = setting.flat
    at_a_time = max(1, BLOCK_ELEMENTS // x.numel())
    squares = [torch.cat([squares_of(x, part) for part in of_class.split(at_a_time)], 1) for of_class in centers]
    return mixture(torch.stack(squares, 1), setting.std, x.shape[1])


def operator(backend, dtype, setting):
    with gf.use_backend(backend):
        return gf.log_likelihood(setting.x, setting.banks[dtype].centers, setting.coefficients)


def bank(backend, dtype, setting):
    with gf.use_backend(backend):
        return setting.banks[dtype].log_likelihood(setting.x)


DIRECT = "donot_use_mm_for_euclid_dist"
PROVIDERS = {
    "cdist": functools.partial(cdist, "use_mm_for_euclid_dist_if_necessary"),
    "cdist, direct": functools.partial(cdist, DIRECT),
    "matrix product": matrix_product,
    "broadcasting": functools.partial(broadcasting, squared_distances),
    "compiled broadcasting": functools.partial(broadcasting, compiled_squared_distances),
}
for name in BACKENDS:
    for suffix, dtype in (("", torch.float32), (", bfloat16", torch.bfloat16)):
        PROVIDERS |= {f"log_likelihood, {name}{suffix}": functools.partial(operator, name, dtype)}
        PROVIDERS |= {f"ChainBank, {name}{suffix}": functools.partial(bank, name, dtype)}


def expected(setting):
    """Direct distances in float64, a class at a time."""
    x, centers = setting.flat
    squares = [torch.cdist(x.double(), of_class.double(), compute_mode=DIRECT).square() for of_class in centers]
    return mixture(torch.stack(squares, 1), setting.std.double(), x.shape[1])


def error_of(name, setting, exact):
    """Largest error in nats; raises where it is too large for the provider's formula."""
    error = (PROVIDERS[name](setting).double() - exact).abs().max().item()
    if not error < (1e-2 if name in ("cdist", "matrix product") else 1e-5) * exact.abs().max().item():
        raise RuntimeError(f"{name}: error of {error:.1e} nats, largest likelihood {exact.abs().max().item():.1e}")
    return error


@functools.cache
def small_setting():
    return Setting(8, 1)


@pytest.mark.parametrize("name", PROVIDERS)
def test_chain_bank(benchmark, name):
    error_of(name, small_setting(), expected(small_setting()))
    benchmark(functools.partial(PROVIDERS[name], small_setting()))


def main():
    parser = benchmark_options("Time of scoring images against a bank of class chains, by provider.", list(PROVIDERS))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--chains", type=int, default=32)
    options = parser.parse_args()
    setting = Setting(options.images, options.chains)
    exact = expected(setting)
    errors = {name: error_of(name, setting, exact) for name in options.provider}
    centers = setting.banks[torch.float32].centers
    layout = f"images [{options.images}, D], centres {list(centers.flatten(2).shape)}"
    runs = {"copy_": functools.partial(setting.buffer.copy_, centers)}
    runs |= {name: functools.partial(PROVIDERS[name], setting) for name in options.provider}
    rows = measure_cases({layout: runs}, options)
    for table in tables_of(rows):
        times = {row["provider"]: row["ms"] for row in table}
        for row in table:
            row |= {"numel": centers.numel(), "copy_ratio": row["ms"] / times["copy_"], "extra_mb": row["extra_bytes"] / 1e6}
            if row["provider"] in errors:
                row["error"] = errors[row["provider"]]
            for peer in {"cdist", "broadcasting"} & times.keys():
                row[f"over_{peer}"] = times[peer] / row["ms"]
        print_table(layout, table, COLUMNS)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
