"""Class-chain bank: a batch of images against the centres of every class.

The likelihood is log (1/S) sum_s N(x; center, sigma_s^2 I).

A bank of 10 classes and as many chains of 75 steps as the case says, run by the scheduler with an
analytic denoiser, D = 1 x 32 x 32. The centres are bfloat16 numbers, so that banks in float32 and
bfloat16 have the same likelihoods; the error is the largest difference from them in float64, in
nats. Arithmetic bounds the case: 3 FLOPs an image, centre and element.

Providers: `broadcasting` (x - c, as many centres at a time as fit into 64 MB), `compiled
broadcasting` (the same through torch.compile), `cdist` (torch.cdist in its default mode, which is a
matrix product here, and logsumexp), `cdist, direct` (without that product), `matrix product` (|x|^2
- 2 x c + |c|^2 spelled out), and `ChainBank` on each backend that can run, from float32 and
bfloat16 centres.
"""

import functools
import math

import torch
from diffusers import DDPMScheduler

import genrep_fast as gf
from genrep_fast.benchmarks.measurement import DEVICE, Case, Provider, compiled_backends, copy_of

CLASSES, STEPS, SHAPE = 10, 75, (1, 32, 32)
SIGMA_FLOOR = 0.1
BLOCK_ELEMENTS = 2**24
BACKENDS = compiled_backends("log_likelihood")


def denoiser(x_t, timesteps, labels):
    """The exact noise prediction for N(m_y, 0.25 I), m_y a wave of as many periods as the label."""
    level = DDPMScheduler().alphas_cumprod.to(x_t)[timesteps].view(-1, 1, 1, 1)
    mean = torch.sin(
        labels.view(-1, 1, 1, 1) * torch.linspace(0, 2 * math.pi, SHAPE[2], device=x_t.device)
    )
    return (1 - level).sqrt() * (x_t - level.sqrt() * mean) / (0.25 * level + 1 - level)


class Setting:
    """Banks and images near some of their centres."""

    def __init__(self, images, chains):
        scheduler = DDPMScheduler(clip_sample=False)
        options = {
            "num_inference_steps": STEPS,
            "chains": chains,
            "burn_in": 0,
            "thin": 1,
            "sigma_floor": SIGMA_FLOOR,
            "seed": 0,
        }
        self.banks = {
            dtype: gf.ChainBank.build(
                denoiser, scheduler, CLASSES, SHAPE, **options, dtype=dtype, device=DEVICE
            )
            for dtype in (torch.float32, torch.bfloat16)
        }
        half, full = self.banks[torch.bfloat16], self.banks[torch.float32]
        full.centers.copy_(half.centers)
        self.std = full.std.float()
        generator = torch.Generator(DEVICE).manual_seed(0)
        last = full.centers[:, STEPS - 1 :: STEPS].flatten(0, 1)  # the chains' ends
        chosen = torch.randint(len(last), (images,), generator=generator, device=DEVICE)
        self.x = last[chosen] + SIGMA_FLOOR * torch.randn(
            images, *SHAPE, generator=generator, device=DEVICE
        )

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
    squares = (
        x.square().sum(1)[:, None] - 2 * (x @ centers.mT) + centers.square().sum(2)[:, None]
    )  # [K, B, S]
    return mixture(squares, setting.std, x.shape[1]).T


def squared_distances(x, centers):
    return (x[:, None] - centers).square().sum(2)


compiled_squared_distances = torch.compile(squared_distances, fullgraph=True, dynamic=False)


def broadcasting(squares_of, setting):
    x, centers = setting.flat
    at_a_time = max(1, BLOCK_ELEMENTS // x.numel())
    squares = [
        torch.cat([squares_of(x, part) for part in of_class.split(at_a_time)], 1)
        for of_class in centers
    ]
    return mixture(torch.stack(squares, 1), setting.std, x.shape[1])


def bank(backend, dtype, setting):
    with gf.use_backend(backend):
        return setting.banks[dtype].log_likelihood(setting.x)


DIRECT = "donot_use_mm_for_euclid_dist"
PROVIDERS = {  # name -> role and function
    "broadcasting": ("eager", functools.partial(broadcasting, squared_distances)),
    "compiled broadcasting": (
        "compiled",
        functools.partial(broadcasting, compiled_squared_distances),
    ),
    "cdist": ("peer", functools.partial(cdist, "use_mm_for_euclid_dist_if_necessary")),
    "cdist, direct": ("peer", functools.partial(cdist, DIRECT)),
    "matrix product": ("peer", matrix_product),
}
for name in BACKENDS:
    for suffix, dtype in (("", torch.float32), (", bfloat16", torch.bfloat16)):
        PROVIDERS |= {
            f"ChainBank, {name}{suffix}": (
                "variant" if suffix else "ours",
                functools.partial(bank, name, dtype),
            )
        }


@functools.lru_cache(maxsize=1)
def expected(setting):
    """Direct distances in float64, a class at a time."""
    x, centers = setting.flat
    squares = [
        torch.cdist(x.double(), of_class.double(), compute_mode=DIRECT).square()
        for of_class in centers
    ]
    return mixture(torch.stack(squares, 1), setting.std.double(), x.shape[1])


def error_of(name, setting):
    """Largest error in nats; allowed: 1e-5 of the largest likelihood, of a matrix product 1e-2."""
    exact = expected(setting)
    error = (PROVIDERS[name][1](setting).double() - exact).abs().max().item()
    if (
        not error
        < (1e-2 if name in ("cdist", "matrix product") else 1e-5) * exact.abs().max().item()
    ):
        raise RuntimeError(
            f"error of {error:.1e} nats, largest likelihood {exact.abs().max().item():.1e}"
        )
    return error


def case(images, chains):
    setting = Setting(images, chains)
    providers = {
        name: Provider(
            functools.partial(run, setting), functools.partial(error_of, name, setting), role
        )
        for name, (role, run) in PROVIDERS.items()
    }
    centers = setting.banks[torch.float32].centers
    return Case(providers, centers.numel(), None, 3 * images * centers.numel(), **copy_of(centers))


CASES = {
    "1 chain, 8 images": functools.partial(case, 8, 1),
    "32 chains, 64 images": functools.partial(case, 64, 32),
}
QUICK = ["32 chains, 64 images"]
SMALLEST = "1 chain, 8 images"
