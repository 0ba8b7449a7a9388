"""Aligning two gradients: time over memory's floor, beside eager, compiled and published ways.

Gram reads both gradients, combine reads both and writes one: 5 N elements, 2.5 times what copying N
elements moves. Every provider must first agree with the decomposition in float64. "list" is the 192
tensors of a transformer's 12 blocks.

Providers: `decomposition` (the method as it is told), `foreach` (closed form in torch._foreach
operations), `compiled` (closed form through torch.compile, into preallocated tensors; not of lists,
which take minutes to compile), `pcgrad, published` (flatten, project, unflatten: Yu et al., NeurIPS
2020, restated), `pcgrad, torchjd` (jac_to_grad, from stacked gradients to .grad), and
`align_gradients` on each backend that can run, in place and into other tensors. `GradientAligner`
is the same in place, with the gradients handed over as backward passes hand them over, and with a
norm to clip at that is never reached.
"""

import functools
from importlib.util import find_spec

import torch

import genrep_fast as gf
from genrep_fast.benchmarks.measurement import DEVICE, Case, Provider, compiled_backends, copy_of
from genrep_fast.reference.alignment import alignment_coefficients

WEIGHTS, POWER = [0.7, 0.3], 2.0
BACKENDS = compiled_backends(
    "gram", "group_gram", "alignment_coefficients", "tensor_coefficients", "combine"
)


class Setting:
    """Two gradients as lists of tensors, and where results go."""

    def __init__(self, numel, layout):
        self.shapes = [(numel,)] if layout == "flat" else transformer_shapes(numel)
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.p, noise = (
            [torch.randn(shape, generator=generator, device=DEVICE) for shape in self.shapes]
            for _ in range(2)
        )
        self.g = [b - 0.5 * a for a, b in zip(self.p, noise, strict=True)]
        self.out = [torch.full_like(tensor, torch.nan) for tensor in self.p]
        self.numel = sum(tensor.numel() for tensor in self.p)

    @functools.cached_property
    def params(self):
        """Parameters with stacked gradients in .jac, as TorchJD wants them."""
        params = [torch.nn.Parameter(tensor) for tensor in self.out]
        for param, a, b in zip(params, self.p, self.g, strict=True):
            param.jac = torch.stack([a, b])
        return params

    @functools.cached_property
    def aligner(self):
        return gf.GradientAligner(
            [torch.nn.Parameter(tensor) for tensor in self.out], weights=WEIGHTS, power=POWER
        )


def transformer_shapes(numel):
    """Shapes of about `numel` parameters in 12 blocks of a diffusion transformer.

    192 tensors, half of them tiny; DiT-B has width 768.
    """
    width = max(1, round((numel / (12 * 18)) ** 0.5))
    attention = [(width, width), (width,)] * 4
    rest = [
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        (width,),
        (6 * width, width),
        (6 * width,),
        (width,),
        (width,),
    ]
    return [*attention, *rest] * 12


def inner_product(first, second):
    return sum(torch.dot(a.view(-1), b.view(-1)) for a, b in zip(first, second, strict=True))


def coefficients_of(squared_p, dot, squared_g):
    matrix = torch.stack([squared_p, dot, dot, squared_g]).double().view(1, 2, 2)
    return alignment_coefficients(matrix, WEIGHTS, POWER)[0][0].to(squared_p.dtype)


def decomposition(setting):
    p, g = setting.p, setting.g
    dot, squared_p, squared_g = inner_product(p, g), inner_product(p, p), inner_product(g, g)
    rho = ((dot / (squared_p.sqrt() * squared_g.sqrt()) + 1) / 2) ** POWER
    for a, b, result in zip(p, g, setting.out, strict=True):
        parallel_a, parallel_b = dot / squared_g * b, dot / squared_p * a
        aligned_a, aligned_b = (
            (a - parallel_a) + rho * parallel_a,
            (b - parallel_b) + rho * parallel_b,
        )
        result.copy_(WEIGHTS[0] * aligned_a + WEIGHTS[1] * aligned_b)


def foreach(setting):
    """Reading the coefficients on the host saves a temporary of N elements."""
    p, g, out = setting.p, setting.g, setting.out
    c = coefficients_of(inner_product(p, p), inner_product(p, g), inner_product(g, g)).tolist()
    torch._foreach_copy_(out, g)
    torch._foreach_mul_(out, c[1])
    torch._foreach_add_(out, p, alpha=c[0])


@torch.compile(fullgraph=True, dynamic=False)
def closed_form(p, g, out):
    """Written for the compiler to fuse."""
    squared_p, dot, squared_g = (
        sum((a * b).sum() for a, b in zip(*pair, strict=True)) for pair in ((p, p), (p, g), (g, g))
    )
    c = coefficients_of(squared_p, dot, squared_g)
    for a, b, result in zip(p, g, out, strict=True):
        result.copy_(c[0] * a + c[1] * b)


def compiled(in_place, setting):
    closed_form(setting.p, setting.g, setting.p if in_place else setting.out)


def published_pcgrad(setting):
    flat = [
        torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (setting.p, setting.g)
    ]
    projected = [gradient.clone() for gradient in flat]
    for gradient, other in zip(projected, reversed(flat), strict=True):
        dot = torch.dot(gradient, other)
        if dot < 0:
            gradient -= dot * other / other.norm() ** 2
    merged = torch.stack(projected).sum(dim=0)
    pieces = merged.split([tensor.numel() for tensor in setting.out])
    return [piece.view(shape).clone() for piece, shape in zip(pieces, setting.shapes, strict=True)]


def torchjd_pcgrad(setting):
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac_to_grad

    jac_to_grad(setting.params, PCGrad(), retain_jac=True)
    results = [param.grad for param in setting.params]
    for param in setting.params:
        param.grad = None
    return results


def ours(backend, in_place, setting):
    with gf.use_backend(backend):
        gf.align_gradients(
            setting.p,
            setting.g,
            weights=WEIGHTS,
            power=POWER,
            out=setting.p if in_place else setting.out,
        )


def hand_over(aligner, p, g):
    """As backward passes would."""
    aligner.zero_grad()
    for name, gradients in zip(aligner.names, (p, g), strict=True):
        with aligner.collect(name):
            for parameter, gradient in zip(aligner.parameters, gradients, strict=True):
                parameter.grad = gradient


def training_loop(backend, max_norm, setting):
    with gf.use_backend(backend):
        hand_over(setting.aligner, setting.p, setting.g)
        setting.aligner.align(max_norm)


PROVIDERS = {  # name -> role and function
    "decomposition": ("eager", decomposition),
    "foreach": ("peer", foreach),
    "compiled": ("compiled", functools.partial(compiled, False)),
    "compiled, in place": ("bound", functools.partial(compiled, True)),
    "pcgrad, published": ("peer", published_pcgrad),
    **({"pcgrad, torchjd": ("peer", torchjd_pcgrad)} if find_spec("torchjd") else {}),
    **{
        f"align_gradients, {name}": ("ours", functools.partial(ours, name, False))
        for name in BACKENDS
    },
    **{
        f"align_gradients, {name}, in place": ("variant", functools.partial(ours, name, True))
        for name in BACKENDS
    },
    **{
        f"GradientAligner, {name}": ("variant", functools.partial(training_loop, name, None))
        for name in BACKENDS
    },
    **{
        f"GradientAligner, {name}, max_norm": (
            "variant",
            functools.partial(training_loop, name, 1e9),
        )
        for name in BACKENDS
    },
}


def writes_over_gradient(name):
    return "in place" in name or name.startswith("GradientAligner")


def error_of(name, numel, layout):
    """Relative to the decomposition, or to PCGrad, in float64, in the norm."""
    setting, exact = Setting(numel, layout), Setting(numel, layout)
    exact.p, exact.g, exact.out = (
        [tensor.double() for tensor in tensors] for tensors in (exact.p, exact.g, exact.out)
    )
    if name.startswith("pcgrad"):
        expected, results = published_pcgrad(exact), PROVIDERS[name][1](setting)
    else:
        decomposition(exact)
        PROVIDERS[name][1](setting)
        expected, results = exact.out, setting.p if writes_over_gradient(name) else setting.out
    error = (
        sum((a.double() - b).square().sum() for a, b in zip(results, expected, strict=True))
        .sqrt()
        .item()
    )
    error /= sum(b.square().sum() for b in expected).sqrt().item()
    # In float32 `torch.dot` loses 3e-5 at N = 1e7, and a matrix product 2.4e-3 at N = 1e8.
    if not error < (1e-6 if PROVIDERS[name][0] in ("ours", "variant") else 5e-3):
        raise RuntimeError(f"relative error {error:.1e}")
    return error


def case(numel, layout):
    # Those that write over a gradient have gradients of their own, which soon conflict no more.
    settings = {in_place: Setting(numel, layout) for in_place in (False, True)}
    providers = {
        name: Provider(
            functools.partial(run, settings[writes_over_gradient(name)]),
            functools.partial(error_of, name, numel, layout),
            role,
        )
        for name, (role, run) in PROVIDERS.items()
        if layout == "flat" or not name.startswith("compiled")
    }
    numel = settings[False].numel
    return Case(
        providers, numel, 5 * 4 * numel, 9 * numel, **copy_of(torch.empty(numel, device=DEVICE))
    )


CASES = {
    f"{name} {layout}": functools.partial(case, numel, layout)
    for name, numel in (("1e6", 10**6), ("1e7", 10**7), ("1e8", 10**8))
    if (name, DEVICE) != ("1e8", "cpu")  # minutes, most of them for the check
    for layout in ("flat", "list")
}
QUICK = ["1e7 flat", "1e7 list"]
SMALLEST = "1e6 list"
