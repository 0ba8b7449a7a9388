"""Gradient alignment from Gram matrices: the definition.

Two gradients p and g of the same parameters, cos their cosine, rho = ((cos + 1) / 2) ** power. Each
gradient keeps its part orthogonal to the other one and has its parallel part scaled by rho; the
weighted sum of both is again a combination of p and g (GenRep, Li, Yang and Wang, ICLR 2026):

    c_p = w_p - w_g (1 - rho) <p,g> / |p|^2
    c_g = w_g - w_p (1 - rho) <p,g> / |g|^2
    result = c_p p + c_g g

Gradients come flattened, loss by loss: with T tensors, ``gradients[i * T + t]`` is the gradient of
loss i for tensor t.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


def gram(gradients: list[Tensor | None], n: int, groups: list[int], num_groups: int) -> Tensor:
    """Gram matrices [num_groups, n, n] float64 of `n` losses' gradients.

    Tensor t adds to the matrix of ``groups[t]``.

    A gradient that is None counts as zero: its row and its column get nothing from that tensor, not
    even another gradient's NaN. Products of float32 (or narrower) numbers are exact in float64, so
    only the float64 sum rounds, and nothing finite overflows.

    A tensor adds 0 to the diagonal only where every element of its gradient is 0: where all squares
    of float64 numbers vanish, it adds the smallest normal one.
    """
    device = next(gradient.device for gradient in gradients if gradient is not None)
    matrices = torch.zeros(num_groups, n, n, dtype=torch.float64, device=device)
    for t, group in enumerate(groups):
        of_losses = enumerate(gradients[t :: len(groups)])
        present = {i: gradient for i, gradient in of_losses if gradient is not None}
        if present:
            flat = [gradient.reshape(-1).double() for gradient in present.values()]
            rows = torch.stack(flat)  # [present, numel]
            index = torch.tensor(list(present), device=device)
            products = rows @ rows.T  # [present, present]
            vanished = (products.diagonal() == 0) & rows.any(dim=1)  # [present]
            products.diagonal().masked_fill_(vanished, torch.finfo(torch.float64).tiny)
            matrices[group, index[:, None], index] += products
    return matrices


def group_gram(grams: Tensor, groups: list[int], num_groups: int) -> Tensor:
    """Gram matrices [num_groups, n, n] of the tensors that a group's losses share.

    `grams` are the tensors' own [T, n, n]; all are float64.

    Tensor t adds to the matrix of ``groups[t]``, or to none for group -1, where every loss reaches
    it: where no gradient of it is zero everywhere.
    """
    shared = torch.where(_reached(grams)[:, None, None], grams, 0.0)  # [T, n, n]
    matrices = grams.new_zeros(num_groups, *grams.shape[1:])
    for t, group in enumerate(groups):
        if group >= 0:
            matrices[group] += shared[t]
    return matrices


def alignment_coefficients(
    gram: Tensor, weights: list[float], power: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [G, 2], cosine [G] and alpha = rho [G] of Gram matrices [G, 2, 2], all float64.

    Where a gradient is zero its direction is undefined: the cosine is taken as 0 and the
    coefficients are the weights.
    """
    squared_norms = gram.diagonal(dim1=1, dim2=2)  # [G, 2]
    dot = gram[:, 0, 1]  # [G]
    has_zero = (squared_norms == 0).any(dim=1)  # [G]
    norms = squared_norms.sqrt()
    cosine = torch.where(has_zero, 0.0, dot / norms[:, 0] / norms[:, 1]).clamp(-1, 1)
    alpha = ((cosine + 1) / 2) ** power
    # Share of each gradient that lies along it in the other one: <p,g>/|p|^2, <p,g>/|g|^2.
    projection = torch.where(has_zero[:, None], 0.0, dot[:, None] / squared_norms)  # [G, 2]
    removed = (1 - alpha)[:, None] * projection
    first, second = weights
    columns = [first - second * removed[:, 0], second - first * removed[:, 1]]
    return torch.stack(columns, dim=1), cosine, alpha


def tensor_coefficients(
    coefficients: Tensor,
    grams: Tensor,
    groups: list[int],
    weights: list[float],
) -> Tensor:
    """Coefficients [T, n] of tensors from those of groups [G, n], all float64.

    Tensor t gets row ``groups[t]``, or the n `weights` for group -1 and where a loss does not reach
    it, which its own Gram matrix of `grams` [T, n, n] tells (see `group_gram`).
    """
    plain = coefficients.new_tensor(weights)[None]  # [1, n]
    # Group -1 takes the last row.
    rows = torch.cat([coefficients, plain])[groups]  # [T, n]
    return torch.where(_reached(grams)[:, None], rows, plain)


def _reached(grams: Tensor) -> Tensor:
    """Whether every loss reaches a tensor [T], from the tensors' own Gram matrices [T, n, n].

    A NaN is not zero.
    """
    return (grams.diagonal(dim1=1, dim2=2) != 0).all(dim=1)


def weighted_sum(gradients: Sequence[Tensor | None], weights: Sequence[float] | Tensor) -> Tensor:
    """sum_i weights_i gradients_i over the gradients that are not None.

    It is in their promoted dtype or float32, whichever is wider.
    """
    dtypes = (gradient.dtype for gradient in gradients if gradient is not None)
    dtype = reduce(torch.promote_types, dtypes, torch.float32)
    pairs = zip(weights, gradients, strict=True)
    return sum(weight * gradient.to(dtype) for weight, gradient in pairs if gradient is not None)


def combine(
    gradients: list[Tensor | None],
    coefficients: Tensor,
    groups: list[int],
    weights: list[float],
    out: list[Tensor],
) -> None:
    """Write sum_i c_i gradients_i into ``out[t]``, which may be one of its inputs.

    c is row ``groups[t]`` of `coefficients` [G, n], or `weights` for group -1.
    """
    for t, (group, result) in enumerate(zip(groups, out, strict=True)):
        row = weights if group < 0 else coefficients[group]
        result.copy_(weighted_sum(gradients[t :: len(groups)], row))
