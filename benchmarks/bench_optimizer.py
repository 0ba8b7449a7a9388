"""One optimizer step on two gradients: alignment, AdamW and the moving average of the parameters.

The fused step reads p and g for the Gram matrix (2 N elements), then reads p, g, the parameters,
both moments and the average, and writes those four: 12 N. The same step on one gradient, without
alignment, moves 10 N. Every provider must first agree with the separate operations in float64, over
three steps.

Providers: `decomposition`, `foreach` and `compiled` (alignment as in bench_alignment.py, then
`AdamW(fused=True)` and `torch._foreach_lerp_`), `unaligned` (the latter two alone, on one gradient
as it is: what a step costs without alignment), `align_gradients` (as the first three), and
`AlignedAdamW` on each backend that can run, handing the gradients over included.
"""

import functools

import torch

import genrep_fast as gf
from genrep_fast.benchmarks import bench_alignment
from genrep_fast.benchmarks.bench_alignment import POWER, WEIGHTS
from genrep_fast.benchmarks.measurement import DEVICE, Case, Provider, compiled_backends, copy_of

EMA_DECAY = 0.999
BACKENDS = compiled_backends(
    "gram", "group_gram", "alignment_coefficients", "tensor_coefficients", "combine", "adamw_step"
)


class Setting(bench_alignment.Setting):
    """Parameters, two gradients, and the state of both kinds of step."""

    def __init__(self, numel, layout, dtype=torch.float32):
        super().__init__(numel, layout)
        self.p, self.g, self.out = (
            [tensor.to(dtype) for tensor in tensors] for tensors in (self.p, self.g, self.out)
        )
        generator = torch.Generator(DEVICE).manual_seed(1)
        self.weights = [
            torch.nn.Parameter(torch.randn(shape, generator=generator, device=DEVICE).to(dtype))
            for shape in self.shapes
        ]
        self.averages = [weight.detach().clone() for weight in self.weights]

    @functools.cached_property
    def adamw(self):
        return torch.optim.AdamW(self.weights, fused=True)

    @functools.cached_property
    def aligned_adamw(self):
        aligner = gf.GradientAligner(self.weights, weights=WEIGHTS, power=POWER)
        return gf.AlignedAdamW(
            self.weights, aligner=aligner, ema=self.averages, ema_decay=EMA_DECAY
        )


def step_with(setting, gradients):
    for weight, gradient in zip(setting.weights, gradients, strict=True):
        weight.grad = gradient
    setting.adamw.step()
    torch._foreach_lerp_(
        setting.averages, [weight.detach() for weight in setting.weights], 1 - EMA_DECAY
    )


def unaligned(setting):
    step_with(setting, setting.p)


def separate(align, setting):
    align(setting)
    step_with(setting, setting.out)


def fused(backend, setting):
    with gf.use_backend(backend):
        bench_alignment.hand_over(setting.aligned_adamw.aligner, setting.p, setting.g)
        setting.aligned_adamw.step()


PROVIDERS = {  # name -> role and function
    "decomposition": ("eager", functools.partial(separate, bench_alignment.decomposition)),
    "foreach": ("peer", functools.partial(separate, bench_alignment.foreach)),
    "compiled": (
        "compiled",
        functools.partial(separate, functools.partial(bench_alignment.compiled, False)),
    ),
    "unaligned": ("bound", unaligned),
    **{
        f"align_gradients, {name}": (
            "variant",
            functools.partial(separate, functools.partial(bench_alignment.ours, name, False)),
        )
        for name in BACKENDS
    },
    **{f"AlignedAdamW, {name}": ("ours", functools.partial(fused, name)) for name in BACKENDS},
}


def error_of(name, numel, layout):
    """Relative error of parameters and averages, in the norm.

    Adam divides by gradients of any size, small wrong ones too.
    """
    setting, exact = Setting(numel, layout), Setting(numel, layout, torch.float64)
    for _ in range(3):
        PROVIDERS[name][1](setting)
        PROVIDERS["unaligned" if name == "unaligned" else "decomposition"][1](exact)
    errors = []
    for results, expected in ((setting.weights, exact.weights), (setting.averages, exact.averages)):
        difference = torch.cat(
            [
                (result.double() - value).flatten()
                for result, value in zip(results, expected, strict=True)
            ]
        ).norm()
        errors.append(
            (difference / torch.cat([value.flatten() for value in expected]).norm()).item()
        )
    if not max(errors) < 1e-4:  # in float32 `torch.dot` costs 6e-6 at N = 1e7
        raise RuntimeError(f"relative error {max(errors):.1e}")
    return max(errors)


def case(numel, layout):
    providers = {
        name: Provider(
            functools.partial(run, Setting(numel, layout)),
            functools.partial(error_of, name, numel, layout),
            role,
        )
        for name, (role, run) in PROVIDERS.items()
        if layout == "flat" or role != "compiled"
    }
    numel = Setting(numel, layout).numel
    return Case(
        providers, numel, 12 * 4 * numel, 26 * numel, **copy_of(torch.empty(numel, device=DEVICE))
    )


CASES = {
    f"{name} {layout}": functools.partial(case, numel, layout)
    for name, numel in (("1e6", 10**6), ("1e7", 10**7), ("1e8", 10**8))
    if (name, DEVICE) != ("1e8", "cpu")  # six settings of 3 GB each
    for layout in ("flat", "list")
}
QUICK = ["1e7 flat", "1e7 list"]
SMALLEST = "1e6 list"
