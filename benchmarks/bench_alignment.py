"""Aligning two gradients: time against the floor that memory sets, beside eager, compiled and published ways of doing it.

    python benchmarks/bench_alignment.py [--numel 1000000 10000000 100000000] [--layout flat list] [--threads 1 2] [--seconds 3]
    pytest benchmarks/bench_alignment.py

Gram reads both gradients, combine reads both and writes one: 5 N elements, 2.5 times what copying N elements moves. The floor is 2.5 times
the time of such a copy in the same run; "% of copy" is the bandwidth reached, as a share of the copy's. Every provider must first agree
with the decomposition in float64. All of them, the copy too, are called in turn, with empty caches, and their medians compared. "Warm"
times are with an allocator that keeps what was freed, as on a GPU; "cold" ones with the C library's own. "list" is the 192 tensors of a
transformer's 12 blocks.

Providers: `decomposition` (the method as it is told), `foreach` (closed form in torch._foreach operations), `compiled` (closed form through
torch.compile, into preallocated tensors), `pcgrad, published` (flatten, project, unflatten: Yu et al., NeurIPS 2020, restated), `pcgrad,
torchjd` (jac_to_grad, from stacked gradients to .grad), and `gf.align_gradients` on each backend that can run, in place and into other
tensors; the reference there is the decomposition's closed form in float64. `GradientAligner` is the same in place, with the gradients
handed over as backward passes hand them over, and with a norm to clip at that is never reached.
"""

import argparse
import functools
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from measurement import keep_freed_memory, measure_together, peak_extra_bytes, threads, transformer_shapes

import genrep_fast as gf
from genrep_fast.reference.alignment import alignment_coefficients

WEIGHTS, POWER = [0.7, 0.3], 2.0
ELEMENTS_MOVED = 5
torch._dynamo.config.recompile_limit = 64  # every size and number of threads is compiled for itself
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Setting:
    """Two gradients as lists of tensors, and where results go."""

    def __init__(self, numel, layout, device=DEVICE):
        self.shapes = [(numel,)] if layout == "flat" else transformer_shapes(numel)
        generator = torch.Generator(device).manual_seed(0)
        self.p, noise = ([torch.randn(shape, generator=generator, device=device) for shape in self.shapes] for _ in range(2))
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
        return gf.GradientAligner([torch.nn.Parameter(tensor) for tensor in self.out], weights=WEIGHTS, power=POWER)


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
        aligned_a, aligned_b = (a - parallel_a) + rho * parallel_a, (b - parallel_b) + rho * parallel_b
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
    squared_p, dot, squared_g = (sum((a * b).sum() for a, b in zip(*pair, strict=True)) for pair in ((p, p), (p, g), (g, g)))
    c = coefficients_of(squared_p, dot, squared_g)
    for a, b, result in zip(p, g, out, strict=True):
        result.copy_(c[0] * a + c[1] * b)


def compiled(in_place, setting):
    closed_form(setting.p, setting.g, setting.p if in_place else setting.out)


def published_pcgrad(setting):
    flat = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (setting.p, setting.g)]
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
        gf.align_gradients(setting.p, setting.g, weights=WEIGHTS, power=POWER, out=setting.p if in_place else setting.out)


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


BACKENDS = [name for name in ("cpu", "triton", "cuda") if gf.info()["backends"][name]["available"] and (name == "cpu") == (DEVICE == "cpu")]
PROVIDERS = {
    "decomposition": decomposition,
    "foreach": foreach,
    "compiled": functools.partial(compiled, False),
    "compiled, in place": functools.partial(compiled, True),
    "pcgrad, published": published_pcgrad,
    **({"pcgrad, torchjd": torchjd_pcgrad} if find_spec("torchjd") else {}),
    "gf.align_gradients, reference": functools.partial(ours, "reference", False),
    **{f"gf.align_gradients, {name}": functools.partial(ours, name, False) for name in BACKENDS},
    **{f"gf.align_gradients, {name}, in place": functools.partial(ours, name, True) for name in BACKENDS},
    **{f"GradientAligner.align(), {name}": functools.partial(training_loop, name, None) for name in BACKENDS},
    **{f"GradientAligner.align(max_norm), {name}": functools.partial(training_loop, name, 1e9) for name in BACKENDS},
}
IN_PLACE = {name for name in PROVIDERS if name.endswith("in place") or name.startswith("GradientAligner")}


def check(name, numel, layout):
    """The provider's result against the decomposition's, or PCGrad's, in float64."""
    setting, exact = Setting(numel, layout), Setting(numel, layout)
    exact.p, exact.g, exact.out = ([tensor.double() for tensor in tensors] for tensors in (exact.p, exact.g, exact.out))
    if name.startswith("pcgrad"):
        expected = published_pcgrad(exact)
        results = PROVIDERS[name](setting)
    else:
        decomposition(exact)
        PROVIDERS[name](setting)
        expected, results = exact.out, setting.p if name in IN_PLACE else setting.out
    error = sum((a.double() - b).square().sum() for a, b in zip(results, expected, strict=True)).sqrt().item()
    error /= sum(b.square().sum() for b in expected).sqrt().item()
    if not error < 5e-3:  # in float32 `torch.dot` loses 3e-5 at N = 1e7, and a matrix product 2.4e-3 at N = 1e8
        raise RuntimeError(f"{name}: relative error {error:.1e}")


@pytest.mark.parametrize("layout", ["flat", "list"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_alignment(benchmark, name, layout):
    if name.startswith("compiled") and layout == "list":
        pytest.skip("compiling 192 tensors takes minutes")
    check(name, 1_000_000, layout)
    benchmark(PROVIDERS[name], Setting(1_000_000, layout))


def runs_of(names, numel, layout):
    """Providers by name, behind the copy; those that write over a gradient have gradients of their own, which soon conflict no more."""
    settings = {in_place: Setting(numel, layout) for in_place in {name in IN_PLACE for name in names}}
    source, target = torch.randn(numel, device=DEVICE), torch.empty(numel, device=DEVICE)
    runs = {name: functools.partial(PROVIDERS[name], settings[name in IN_PLACE]) for name in names}
    return {"copy": functools.partial(target.copy_, source)} | runs


def main():
    parser = argparse.ArgumentParser(description="Time of aligning two gradients, by provider.")
    parser.add_argument("--numel", type=int, nargs="+", default=[10**6, 10**7, 10**8], help="elements of one gradient")
    parser.add_argument("--layout", nargs="+", choices=["flat", "list"], default=["flat", "list"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each table and temper of the allocator")
    parser.add_argument("--provider", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    cases = [(numel, layout, number) for numel in options.numel for layout in options.layout for number in options.threads]
    names = {
        layout: [name for name in options.provider if layout == "flat" or not name.startswith("compiled")] for layout in options.layout
    }
    for numel in options.numel:
        for layout in options.layout:
            for name in names[layout]:
                check(name, numel, layout)
    cold, warm, memory = {}, {}, {}
    for times in (cold, warm):
        if times is warm:
            keep_freed_memory()
        for case in cases:
            numel, layout, number = case
            with threads(number):
                runs = runs_of(names[layout], numel, layout)
                if times is cold:
                    memory[case] = {name: peak_extra_bytes(run) for name, run in runs.items()}
                times[case] = measure_together(runs, options.seconds)
    rows = []
    for case in cases:
        numel, layout, number = case
        floors = [ELEMENTS_MOVED / 2 * times[case]["copy"].median for times in (warm, cold)]
        print(f"\nN = {numel}, {layout}, float32, {number} threads, {DEVICE}, torch {torch.__version__}, floor {floors[0]:.3f} ms")
        print(f"{'provider':36}{'warm ms':>10}{'x floor':>9}{'20-80 %':>14}{'% of copy':>11}{'cold x floor':>14}{'extra memory / 4N':>19}")
        for name in names[layout]:
            low, median, high, host = warm[case][name]
            extra, ratio, cold_ratio = memory[case][name] / (4 * numel), median / floors[0], cold[case][name].median / floors[1]
            spread = f"{low / floors[0]:.2f}-{high / floors[0]:.2f}"
            print(f"{name:36}{median:10.3f}{ratio:9.2f}{spread:>14}{100 / ratio:11.0f}{cold_ratio:14.2f}{extra:19.2f}")
            rows.append({"numel": numel, "layout": layout, "threads": number, "provider": name, "warm_ms": median, "floor_ms": floors[0]})
            rows[-1] |= {"host_ms": host, "warm_ratio": ratio, "cold_ratio": cold_ratio, "extra_memory_ratio": extra}
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
