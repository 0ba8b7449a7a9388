"""Aggregation rules: weights of the gradients of n losses from their Gram matrices alone.

A rule maps Gram matrices [groups, n, n] to weights [groups, n], both float64, and the aggregate of
a group is sum_i weights_i g_i. None calls a solver, waits for the device or branches on a value, so
that a CUDA graph can hold any of them. Besides the matrices a rule takes the dtype of the
gradients, which says how exactly their angles are known: see `eigenvalue_tolerance`.

    genrep (n = 2)     Li, Yang, Wang: Reconciling Visual Perception and Generation in Diffusion
                       Models, ICLR 2026
    pcgrad (2)         Yu et al.: Gradient Surgery for Multi-Task Learning, NeurIPS 2020
    upgrad (2)         Quinton, Rey: Jacobian Descent for Multi-Objective Optimization, 2024
    dualproj (2)       Lopez-Paz, Ranzato: Gradient Episodic Memory for Continual Learning,
                       NeurIPS 2017
    mgda (2)           Désidéri: Multiple-Gradient Descent Algorithm, Comptes Rendus
                       Mathématique 2012
    nash_mtl (2)       Navon et al.: Multi-Task Learning as a Bargaining Game, ICML 2022
    imtl_g (any n)     Liu et al.: Towards Impartial Multi-task Learning, ICLR 2021
    aligned_mtl (any)  Senushkin et al.: Independent Component Alignment for Multi-Task
                       Learning, CVPR 2023
    config (any)       Liu, Chu, Thuerey: ConFIG, Towards Conflict-free Training of Physics
                       Informed Neural Networks, ICLR 2025

Where n is 2 the rule has a closed form for two losses and otherwise depends on a quadratic program,
an iteration or a random order. All but genrep give the aggregate of TorchJD (the package of Quinton
and Rey) at its defaults, without its regularisation and, for nash_mtl, without its max_norm.
Gradients at an angle below 3e-3 (float32, float16) or 5e-3 (bfloat16) count as parallel or
opposite, those above 1e-2 never do; of dependent gradients the result of several rules is another
one than the limit. A NaN makes the weights that depend on it NaN, and neither it nor an infinite
entry affects the weights of another matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..checks import check_power, check_weights

Rule = Callable[[Tensor, torch.dtype], Tensor]

# TorchJD's: a sum or a length below it, next to numbers of order 1, is taken as 0.
_NEGLIGIBLE = 1e-12
# Of Jacobi rotations; convergence is quadratic, and 8 x 8 matrices need 5 or 6.
_SWEEPS = 8
# The rules in place of what takes no Gram matrix in TorchJD.
_NAMES = {"ConFIG": "config", "NashMTL": "nash_mtl", "_NashMTLWeighting": "nash_mtl"}
# TorchJD's weightings of the gradients themselves.
_NEED_GRADIENTS = ("ExcessMTLWeighting", "_NashMTLWeighting")


def pcgrad(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of both gradients, each without its projection onto the other one where they conflict.

    w_i = 1 + max(0, -<g_1,g_2>) / |g_i|^2, as g_j loses the multiple <g_1,g_2> / |g_i|^2 of g_i. A
    zero gradient conflicts with nothing.
    """
    squared_norms, dot = _entries(gram)
    return 1 + _divide((-dot).clamp(min=0), squared_norms)


def upgrad(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean of both gradients' projections onto the dual cone {x: <x,g_1> >= 0, <x,g_2> >= 0}.

    Where two gradients conflict, projecting one onto the cone projects it onto the plane orthogonal
    to the other: half of `pcgrad`.
    """
    return pcgrad(gram, dtype) / 2


def dualproj(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Projection of the mean gradient onto the dual cone.

    w_i = max(1, -<g_1,g_2> / |g_i|^2) / 2; (1/2, 1/2) where a gradient is zero.

    Only the shorter of the two can have a negative inner product with the mean; its weight grows
    until that product is 0.
    """
    squared_norms, dot = _entries(gram)
    return _divide(-dot, squared_norms).clamp(min=1) / 2


def mgda(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Shortest convex combination: w_i proportional to max(0, |g_j|^2 - <g_1,g_2>).

    Here j is the other one. A zero gradient takes the whole weight; of equal gradients each takes
    half (TorchJD: the first one all, with the same aggregate).
    """
    squared_norms, dot = _entries(gram)
    excess = (squared_norms - dot).clamp(min=0)  # [G, 2]
    total = excess.sum(dim=1, keepdim=True)
    return torch.where(total == 0, 0.5, excess.flip(1) / total)


def nash_mtl(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Nash bargaining solution, Gram w = 1/w: w_i = 1 / (|g_i| sqrt(1 + cosine)).

    The aggregate bisects the angle and has norm sqrt(2); TorchJD's max_norm, 1 by default, then
    shortens it to that norm, which is not done here. A zero gradient has weight 0 and leaves
    1/|g_j| to the other one; of opposite gradients both have weight 0, as no solution exists.
    """
    squared_norms, dot = _entries(gram)
    norms = squared_norms.sqrt()
    cosine = _divide(_divide(dot, norms[:, :1]), norms[:, 1:])
    opposite = 1 + cosine <= eigenvalue_tolerance(dtype, 2)
    return torch.where(opposite, 0.0, _divide((1 + cosine).rsqrt(), norms))


def imtl_g(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Equal projections of the aggregate onto all gradients' directions.

    w is proportional to Gram^+ norms, its sum 1. Zero gradients have weight 0. Dependent gradients
    take the pseudoinverse's solution, for which projections differ: (|g_1|, ±|g_2|) / (|g_1| ±
    |g_2|) for parallel (+) and opposite (-) ones. Where the weights' sum vanishes, all of them are
    0.
    """
    # To order 1.
    gram = _divide(gram, gram.diagonal(dim1=1, dim2=2).amax(dim=1)[:, None, None])
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    eigenvalues, eigenvectors = _spectrum(gram, dtype)
    solution = _transform(eigenvectors, 1 / eigenvalues, norms)
    total = solution.sum(dim=1, keepdim=True)
    # Of opposite gradients whose lengths differ by the share d the sum is d^2/2, and d is known to
    # the rounding of their elements.
    negligible = max(_NEGLIGIBLE, torch.finfo(dtype).eps ** 2 / 2)
    return torch.where(total.abs() < negligible, 0.0, solution / total)


def aligned_mtl(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean of the gradients after all their principal components got the smallest one's length.

    w = sqrt(lambda_min) Gram^(-1/2) 1/n. lambda_min is the smallest eigenvalue of those that are
    not negligible, the others drop out; where none is left w = 1/n.
    """
    n = gram.shape[1]
    eigenvalues, eigenvectors = _spectrum(gram, dtype)
    smallest = eigenvalues.amin(dim=1, keepdim=True)
    mean = gram.new_full((1, n), 1 / n)
    balanced = _transform(eigenvectors, (smallest / eigenvalues).sqrt(), mean)
    return torch.where(smallest.isinf(), mean, balanced)


def config(gram: Tensor, dtype: torch.dtype) -> Tensor:
    """Direction of equal cosine with all gradients; its length is the sum of their projections.

    With cosines C and u = C^+ 1: w_i = u_i / |g_i| sum_j |g_j| (C u)_j / (u^T C u). At n = 2 that
    is (|g_1| + |g_2|) / (2 |g_i|), whatever the angle. Zero gradients have weight 0; where the
    direction vanishes (two opposite gradients), so have all.
    """
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    cosine = _cosine(gram, norms)
    eigenvalues, eigenvectors = _eigenpairs(cosine)
    negligible = _negligible(eigenvalues, dtype)
    eigenvalues = torch.where(negligible, torch.inf, eigenvalues)
    solution = _transform(eigenvectors, 1 / eigenvalues, torch.ones_like(norms))
    projections = (cosine @ solution[:, :, None])[:, :, 0]
    # Of sum_i u_i g_i / |g_i|.
    squared_length = (solution * projections).sum(dim=1, keepdim=True)
    total = (norms * projections).sum(dim=1, keepdim=True)
    # Of independent gradients it is at least 1; of dependent ones it is the square of an angle to
    # those whose direction vanishes.
    vanishing = _NEGLIGIBLE**2
    if dtype != torch.float64:
        vanishing = eigenvalue_tolerance(dtype, gram.shape[1])
    weights = _divide(solution, norms) * total / squared_length
    return torch.where(squared_length < vanishing, 0.0, weights)


_OF_TWO: dict[str, Rule] = {
    "pcgrad": pcgrad,
    "upgrad": upgrad,
    "dualproj": dualproj,
    "mgda": mgda,
    "nash_mtl": nash_mtl,
}
_OF_ANY: dict[str, Rule] = {"imtl_g": imtl_g, "aligned_mtl": aligned_mtl, "config": config}
RULES = ("genrep", *_OF_TWO, *_OF_ANY)


def default_weights(rule: object, n: int) -> tuple[float, ...]:
    """GenRep's weights are its paper's; the papers of all other rules sum losses."""
    return (0.7, 0.3) if rule == "genrep" and n == 2 else (1.0,) * n


def resolve_rule(
    rule: str | Callable[[Tensor], Tensor], weights: Sequence[float], power: float, n: int
) -> Rule:
    """The function ``(gram, dtype) -> weights`` that `rule` stands for.

    Its arguments are Gram matrices [groups, n, n] float64 and the least accurate dtype of the
    gradients (`least_accurate_dtype`), its result are weights [groups, n] float64.

    Args:
        rule: one of `RULES`; or a callable from Gram matrices [groups, n, n] float64 to weights
            [groups, n] on the same device; or a Weighting of TorchJD, called with one [n, n] matrix
            after the other. Both get the matrices alone, not the dtype. Most Weightings make the
            host wait for the device.
        weights: of the n losses, for genrep alone.
        power: damping exponent, >= 0, for genrep alone.
        n: number of losses.

    Returns:
        The function. It raises TypeError where a callable returns no tensor, and ValueError for one
        of a wrong shape or device and for a stateful Weighting that meets several groups.

    Raises:
        TypeError: for a rule that is neither a name nor callable, or a TorchJD object that cannot
            work from a Gram matrix.
        ValueError: for an unknown name, a rule that does not exist for n losses, or weights or a
            power that genrep does not take.
    """
    if isinstance(rule, str):
        return _named_rule(rule, weights, power, n)
    if not callable(rule):
        raise TypeError(
            f"rule must be a name, a callable or a TorchJD Weighting, got {type(rule).__name__}"
        )
    return partial(_checked, _torchjd_rule(rule) or rule)


def least_accurate_dtype(tensors: Iterable[Tensor | None]) -> torch.dtype:
    """The coarsest dtype of those that are not None; float64 where there is none."""
    dtypes = (tensor.dtype for tensor in tensors if tensor is not None)
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


def eigenvalue_tolerance(dtype: torch.dtype, n: int) -> float:
    """The largest eigenvalue of the cosine matrix of gradients of `dtype` that counts as zero.

    Of n = 2 gradients it is 1 - |cosine|, angle^2 / 2.

    The entries of a Gram matrix of float32 are accurate to |dG_ij| <= eps sqrt(G_ii G_jj), hence
    these eigenvalues to a few eps, and what is kept, more than 32 eps, to about a tenth. Half
    precision has exact products, but rounds the gradients' elements: by ulp / sqrt(12) in the root
    mean square, which makes an expected 1 - |cosine| of at most eps^2 / 12 of two parallel
    gradients; twice that is negligible. float64 has the tolerance of `torch.linalg.pinv`, relative
    to the largest eigenvalue, and of the Gram matrix itself where a rule is defined by that; so has
    TorchJD.
    """
    if dtype == torch.float64:
        return n * torch.finfo(torch.float64).eps
    of_the_entries = 32 * torch.finfo(torch.float32).eps
    of_the_elements = torch.finfo(dtype).eps ** 2 / 6
    return max(of_the_entries, of_the_elements)


def genrep(gram: Tensor, dtype: torch.dtype, *, weights: Sequence[float], power: float) -> Tensor:
    """Coefficients [groups, 2], which ``genrep_fast::alignment_coefficients`` defines."""
    return torch.ops.genrep_fast.alignment_coefficients(gram, weights, power)[0]


def _named_rule(name: str, weights: Sequence[float], power: float, n: int) -> Rule:
    if name not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {name!r}")
    if n != 2 and name not in _OF_ANY:
        raise ValueError(
            f"rule {name!r} takes 2 losses, got {n}; "
            f"{', '.join(_OF_ANY)} and TorchJD's weightings take any number"
        )
    if name == "genrep":
        return partial(genrep, weights=check_weights(weights, 2), power=check_power(power))
    return (_OF_TWO | _OF_ANY)[name]


def _torchjd_rule(rule: Callable) -> Callable[[Tensor], Tensor] | None:
    """The rule that calls a TorchJD Weighting group by group; None for anything else."""
    # An object of TorchJD's exists only where TorchJD was imported.
    torchjd = sys.modules.get("torchjd.aggregation")
    if torchjd is None:
        return None
    if isinstance(rule, torchjd.Aggregator):
        raise TypeError(_weighting_advice(rule, torchjd.__all__))
    if not isinstance(rule, torchjd.Weighting):
        return None
    if any(type(module).__name__ in _NEED_GRADIENTS for module in rule.modules()):
        name = type(rule).__name__
        instead = f'; for two losses there is rule="{_NAMES[name]}"' if name in _NAMES else ""
        raise TypeError(
            f"rule must work from Gram matrices, got {name}, which needs the gradients{instead}"
        )
    return partial(_group_by_group, rule)


def _weighting_advice(aggregator: torch.nn.Module, public: Sequence[str]) -> str:
    """What to pass as a rule in place of an aggregator of TorchJD.

    `public` are the names that ``torchjd.aggregation`` has.
    """
    name = type(aggregator).__name__
    got = f"got the aggregator {name}"
    if name in _NAMES:
        return f'rule must be a name or a Weighting, here rule="{_NAMES[name]}", {got}'
    weighting = f"{name}Weighting"
    if weighting in _NEED_GRADIENTS or not hasattr(aggregator, "weighting"):
        return f"rule must work from Gram matrices, {got}, which needs the gradients"
    if weighting in public:
        return f"rule must be a TorchJD Weighting such as {weighting}(), {got}"
    attribute = "gramian_weighting" if hasattr(aggregator, "gramian_weighting") else "weighting"
    return f"rule must be a TorchJD Weighting, such as the aggregator's .{attribute}, {got}"


def _group_by_group(weighting: torch.nn.Module, gram: Tensor) -> Tensor:
    stateful = sys.modules["torchjd"].Stateful
    if len(gram) > 1 and any(isinstance(module, stateful) for module in weighting.modules()):
        raise ValueError(
            f"rule {type(weighting).__name__} keeps a state from call to call, "
            f"which {len(gram)} groups would mix up: use one group, "
            "or a callable that holds a weighting for each"
        )
    if not len(gram):
        return gram.new_empty(gram.shape[:2])
    return torch.stack([weighting(matrix) for matrix in gram])


def _checked(rule: Callable[[Tensor], Tensor], gram: Tensor, dtype: torch.dtype) -> Tensor:
    """``rule(gram)`` as float64, checked to be a tensor of the right shape and device."""
    result = rule(gram)
    if not isinstance(result, Tensor):
        raise TypeError(f"rule must return a tensor, got {type(result).__name__}")
    if result.shape != gram.shape[:2]:
        raise ValueError(
            f"rule must return weights of shape {tuple(gram.shape[:2])}, got {tuple(result.shape)}"
        )
    if result.device != gram.device:
        raise ValueError(f"rule must return weights on {gram.device}, got {result.device}")
    return result.to(gram.dtype)


def _entries(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms [G, 2] and inner products [G, 1] of Gram matrices [G, 2, 2]."""
    return gram.diagonal(dim1=1, dim2=2), gram[:, 0, 1:]


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is 0: nothing of a zero gradient is along anything."""
    return torch.where(denominator == 0, 0.0, numerator / denominator)


def _cosine(gram: Tensor, norms: Tensor) -> Tensor:
    """Cosines [G, n, n] between gradients of these `norms` [G, n]; 0 for a zero gradient.

    The cosine of a zero gradient to itself is 0, too.
    """
    return _divide(_divide(gram, norms[:, :, None]), norms[:, None, :])


def _transform(eigenvectors: Tensor, factors: Tensor, vectors: Tensor) -> Tensor:
    """V diag(factors) V^T vectors.

    Eigenvectors V are [G, n, n], factors [G, n] and vectors [G or 1, n].
    """
    components = (vectors[:, None, :] @ eigenvectors)[:, 0]  # [G, n]
    return (eigenvectors @ (factors * components)[:, :, None])[:, :, 0]


def _spectrum(gram: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Eigenvalues [G, n] and eigenvectors [G, n, n] of Gram matrices of gradients of `dtype`.

    Negligible eigenvalues are infinite. So a reciprocal drops them, a minimum passes them over, and
    a NaN stays one. The rank is that of the cosine matrix, as the error of an entry is relative to
    both gradients' lengths: a short gradient counts as much as a long one. What is negligible there
    is taken out of the matrix before its own eigenvalues are computed, and as many of these as it
    had are dropped.
    """
    n = gram.shape[1]
    smallest = n * torch.finfo(gram.dtype).eps
    if dtype == torch.float64:
        eigenvalues, eigenvectors = _eigenpairs(gram)
        negligible = eigenvalues <= smallest * eigenvalues.amax(dim=1, keepdim=True)
        return torch.where(negligible, torch.inf, eigenvalues), eigenvectors
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    eigenvalues, eigenvectors = _eigenpairs(_cosine(gram, norms))
    negligible = _negligible(eigenvalues, dtype)
    kept = torch.where(negligible, 0.0, eigenvalues)
    cosine = (eigenvectors * kept[:, None, :]) @ eigenvectors.mT
    eigenvalues, eigenvectors = _eigenpairs(norms[:, :, None] * cosine * norms[:, None, :])
    position = eigenvalues.argsort(dim=1).argsort(dim=1)
    negligible = position < negligible.sum(dim=1, keepdim=True)
    negligible = negligible | (eigenvalues <= smallest * eigenvalues.amax(dim=1, keepdim=True))
    return torch.where(negligible, torch.inf, eigenvalues), eigenvectors


def _negligible(eigenvalues: Tensor, dtype: torch.dtype) -> Tensor:
    """Which eigenvalues [G, n] of cosine matrices count as zero for `dtype`; bool [G, n]."""
    tolerance = eigenvalue_tolerance(dtype, eigenvalues.shape[1])
    if dtype == torch.float64:
        return eigenvalues <= tolerance * eigenvalues.amax(dim=1, keepdim=True)
    return eigenvalues <= tolerance


def _eigenpairs(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [G, n] and eigenvectors [G, n, n] of symmetric matrices.

    `torch.linalg.eigh` would make the host wait for the device.
    """
    n = matrices.shape[1]
    index = torch.arange(n, device=matrices.device)
    # Step s pairs index i with i XOR s: disjoint pairs that rotate at once, and over all steps
    # every pair once.
    pairings = []
    for step in range(1, 1 << (n - 1).bit_length()):
        is_pair = (index[:, None] ^ step) == index  # [n, n]
        pairings.append(is_pair.to(matrices.dtype))
    eigenvectors = torch.eye(n, dtype=matrices.dtype, device=matrices.device)
    # The only pair of two needs one rotation.
    for _ in range(1 if n == 2 else _SWEEPS):
        for pairs in pairings:
            rotation = _rotation(matrices, pairs)
            matrices = rotation.mT @ matrices @ rotation
            eigenvectors = eigenvectors @ rotation
    return matrices.diagonal(dim1=1, dim2=2), eigenvectors


def _rotation(matrices: Tensor, pairs: Tensor) -> Tensor:
    """Jacobi rotation R [G, n, n]: R^T A R has zeros at `pairs`.

    Golub and Van Loan, Matrix Computations, section 8.5.
    """
    # 1 for the first of a pair, -1 for the second, 0 for an index without a partner.
    sign = (pairs.triu() - pairs.tril()).sum(dim=1)  # [n]
    diagonal = matrices.diagonal(dim1=1, dim2=2)  # [G, n]
    # a_jj - a_ii of the pair (i, j), at i and at j.
    gap = sign * (diagonal @ pairs - diagonal)  # [G, n]
    # 2 a_ij, bit for bit the same at i and at j: else R is not orthogonal.
    entry = ((matrices + matrices.mT) * pairs).sum(dim=2)  # [G, n]
    # At most pi/4: small ones converge.
    angle = torch.atan2(torch.where(gap < 0, -entry, entry), gap.abs()) / 2
    return torch.diag_embed(angle.cos()) + pairs * (sign * angle.sin())[:, :, None]
