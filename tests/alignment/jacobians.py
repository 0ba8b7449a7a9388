"""Random Jacobians, rules by name, and how a result is compared."""

import torch

from genrep_fast.alignment.rules import resolve_rule

WEIGHTS, POWER = (0.7, 0.3), 2.0


def random_jacobians(count, n, columns=7, *, seed=0):
    """[count, n, columns] float64; norms from 1 to 100, and cosines that cover [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    jacobians = torch.randn(count, n, columns, generator=generator, dtype=torch.float64)
    shared = torch.randn(count, 1, columns, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, (count, n, 1), generator=generator) * 2 - 1
    strength = 4 * torch.rand(count, 1, 1, generator=generator, dtype=torch.float64)
    return (jacobians + signs * strength * shared) * 100 ** torch.rand(
        count, n, 1, generator=generator, dtype=torch.float64
    )


def named(name, n=2, dtype=torch.float64):
    """The rule as a function of Gram matrices alone, for gradients of `dtype`."""
    rule = resolve_rule(name, WEIGHTS, POWER, n)
    return lambda gram: rule(gram, dtype)


def assert_close(result, expected, scale, tolerance):
    """Vectors [count, columns] that differ by at most `tolerance` times `scale`, [count]."""
    assert result.isfinite().all()
    assert ((result - expected).norm(dim=1) <= tolerance * scale).all()
