"""Every alignment operator of one backend on tensors that fill their memory to the last byte, for a tool that watches memory.

    compute-sanitizer --tool memcheck python benchmarks/operators_once.py cuda

Sizes are odd, dtypes mixed, n is 2, 3 and 8, and one gradient is missing. That every result is finite is all that is checked:
tests/test_kernels.py compares values. torch's own kernels are left out, as a tool would watch them too.
"""

import sys

import torch

import genrep_fast as gf

SIZES = [1, 63, 127, 129, 0, 1009, 16384 + 1, 2 * 16384 + 5]
GROUPS = [0, 1, -1, 0, 1, 2, 0, 2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(seed, dtypes, device):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, generator=generator).to(dtypes[(seed + t) % len(dtypes)]).to(device) for t, size in enumerate(SIZES)]


def run(n, dtypes, device):
    operators = torch.ops.genrep_fast
    gradients = [tensor for seed in range(n) for tensor in tensors(seed, dtypes, device)]
    gradients[3] = None
    matrices = operators.gram(gradients, n, [max(group, 0) for group in GROUPS], 3)
    coefficients = operators.alignment_coefficients(matrices, [0.7, 0.3], 2.0)[0] if n == 2 else torch.ones(3, n).double().to(device)
    out = tensors(n, dtypes, device)
    operators.combine(gradients, coefficients, GROUPS, [1 / n] * n, out)
    params, *state = (tensors(seed, dtypes[:1], device) for seed in range(4))
    steps = [torch.ones(()) for _ in SIZES]
    rest = (GROUPS, [1 / n] * n, steps, torch.tensor(0.01), 0.9, 0.999, 1e-8, 0.1, 0.99, torch.zeros(1).to(device))
    operators.adamw_step(params, *state, gradients, coefficients, *rest)
    results = (matrices, coefficients, *out, *params, *state[0], *state[1], *state[2])
    if not all(result.cpu().isfinite().all() for result in results):
        raise RuntimeError(f"n = {n}, {dtypes}: a result is not finite")


def main():
    backend = sys.argv[1]
    device = "cpu" if backend == "cpu" else "cuda"
    with gf.use_backend(backend):
        for n in (2, 3, 8):
            for dtypes in (*([dtype] for dtype in DTYPES), DTYPES):
                run(n, dtypes, device)
    print(f"{backend}: every result is finite")


if __name__ == "__main__":
    main()
