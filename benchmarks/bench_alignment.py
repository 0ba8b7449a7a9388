"""Aligning two gradients: time against the floor that memory sets.

    python benchmarks/bench_alignment.py [--numel 1000000] [--tensors 1]
    pytest benchmarks/bench_alignment.py

Gram reads both gradients, combine reads both and writes one: 5 N elements, 2.5 times what copying N elements moves. The floor is 2.5 times
the time of such a copy in the same run. Every provider writes into preallocated tensors and must first agree with the decomposition in
float64.
"""

import argparse
import functools

import pytest
import torch
from measurement import measure, print_header, print_row

import genrep_fast as gf
from genrep_fast.reference.alignment import alignment_coefficients

WEIGHTS, POWER = [0.7, 0.3], 2.0
ELEMENTS_MOVED = 5


def inner_product(first, second):
    return sum(torch.dot(a.view(-1), b.view(-1)) for a, b in zip(first, second, strict=True))


def coefficients_of(squared_p, dot, squared_g):
    matrix = torch.stack([squared_p, dot, dot, squared_g]).double().view(1, 2, 2)
    return alignment_coefficients(matrix, WEIGHTS, POWER)[0][0].to(squared_p.dtype)


def decomposition(p, g, out):
    """The method as it is told: project each gradient on the other one, damp the parallel part, recombine."""
    dot, squared_p, squared_g = inner_product(p, g), inner_product(p, p), inner_product(g, g)
    rho = ((dot / (squared_p.sqrt() * squared_g.sqrt()) + 1) / 2) ** POWER
    for a, b, result in zip(p, g, out, strict=True):
        parallel_a, parallel_b = dot / squared_g * b, dot / squared_p * a
        aligned_a, aligned_b = (a - parallel_a) + rho * parallel_a, (b - parallel_b) + rho * parallel_b
        result.copy_(WEIGHTS[0] * aligned_a + WEIGHTS[1] * aligned_b)


def foreach(p, g, out):
    """Closed form in `torch._foreach` operations; reading the coefficients on the host saves a temporary of N elements."""
    c = coefficients_of(inner_product(p, p), inner_product(p, g), inner_product(g, g)).tolist()
    torch._foreach_copy_(out, g)
    torch._foreach_mul_(out, c[1])
    torch._foreach_add_(out, p, alpha=c[0])


@torch.compile(fullgraph=True)
def compiled(p, g, out):
    """Closed form, written for the compiler to fuse."""
    squared_p, dot, squared_g = (sum((a * b).sum() for a, b in zip(*pair, strict=True)) for pair in ((p, p), (p, g), (g, g)))
    c = coefficients_of(squared_p, dot, squared_g)
    for a, b, result in zip(p, g, out, strict=True):
        result.copy_(c[0] * a + c[1] * b)


def reference(p, g, out):
    """`gf.align_gradients` on the reference."""
    with gf.use_backend("reference"):
        gf.align_gradients(p, g, weights=WEIGHTS, power=POWER, out=out)


PROVIDERS = {"decomposition": decomposition, "foreach": foreach, "compiled": compiled, "reference": reference}


def make_gradients(numel, num_tensors):
    generator = torch.Generator().manual_seed(0)
    p, noise = (torch.randn(numel, generator=generator) for _ in range(2))
    return [list(flat.tensor_split(num_tensors)) for flat in (p, noise - 0.5 * p, torch.full_like(p, torch.nan))]


def check(provider, p, g, out):
    exact = [torch.empty_like(tensor, dtype=torch.float64) for tensor in out]
    decomposition([tensor.double() for tensor in p], [tensor.double() for tensor in g], exact)
    provider(p, g, out)
    error = ((torch.cat(out) - torch.cat(exact)).norm() / torch.cat(exact).norm()).item()
    if not error < 1e-3:  # float32 `torch.dot` loses 3e-5 at N = 1e7
        raise RuntimeError(f"relative error {error:.1e}")


@pytest.mark.parametrize("name", PROVIDERS)
def test_alignment(benchmark, name):
    arguments = make_gradients(1_000_000, 1)
    check(PROVIDERS[name], *arguments)
    benchmark(PROVIDERS[name], *arguments)


def main():
    parser = argparse.ArgumentParser(description="Time of aligning two gradients, by provider.")
    parser.add_argument("--numel", type=int, default=1_000_000, help="elements of one gradient")
    parser.add_argument("--tensors", type=int, default=1, help="tensors that they are spread over")
    options = parser.parse_args()
    p, g, out = make_gradients(options.numel, options.tensors)
    source, target = torch.randn(options.numel), torch.empty(options.numel)
    floor = ELEMENTS_MOVED / 2 * measure(lambda: target.copy_(source)).median
    print_header(f"N = {options.numel}, {options.tensors} tensors, float32, floor {floor:.3f} ms", "floor")
    for name, provider in PROVIDERS.items():
        check(provider, p, g, out)
        print_row(name, measure(functools.partial(provider, p, g, out)), floor)


if __name__ == "__main__":
    main()
