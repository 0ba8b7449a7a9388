"""Gradient alignment operators: Gram matrices, GenRep's coefficients, combined gradients."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import (
    DTYPES,
    check_length,
    check_power,
    check_tensor,
    check_weights,
    check_writable,
)
from ..dispatch.list_checks import lists_fit
from ..dispatch.operators import define_operator
from ..memory_overlap import check_no_overlap
from ..reference import alignment as reference

# Of one loss: a tensor for each parameter, None where the loss does not reach it.
Gradients = Sequence[Tensor | None]

_PLAIN_TENSORS = {Tensor, torch.nn.Parameter}

MAX_LOSSES = 8
# A wrong index ends in a message, not in gigabytes of Gram matrices.
MAX_GROUPS = 1 << 20


def _first(gradients: Gradients) -> Tensor:
    return next(gradient for gradient in gradients if gradient is not None)


gram_operator = define_operator(
    "gram(Tensor?[] gradients, int n, int[] groups, int num_groups) -> Tensor",
    reference=reference.gram,
    fake=lambda gradients, n, groups, num_groups: _first(gradients).new_empty(
        num_groups, n, n, dtype=torch.float64
    ),
    vmap=False,
)

alignment_coefficients_operator = define_operator(
    "alignment_coefficients(Tensor gram, float[] weights, float power) "
    "-> (Tensor coefficients, Tensor cosine, Tensor alpha)",
    reference=reference.alignment_coefficients,
    fake=lambda gram, weights, power: (
        gram.new_empty(len(gram), 2),
        gram.new_empty(len(gram)),
        gram.new_empty(len(gram)),
    ),
    dtype_from=(),
)

# A loss does not reach a tensor whose gradient of it is zero everywhere: autograd makes zeros of
# None in many ordinary models. The two operators around the coefficients find such tensors on the
# device, by the tensors' own Gram matrices.
group_gram_operator = define_operator(
    "group_gram(Tensor grams, int[] groups, int num_groups) -> Tensor",
    reference=reference.group_gram,
    fake=lambda grams, groups, num_groups: grams.new_empty(num_groups, *grams.shape[1:]),
    dtype_from=(),
    vmap=False,
)

tensor_coefficients_operator = define_operator(
    "tensor_coefficients(Tensor coefficients, Tensor grams, int[] groups, float[] weights) "
    "-> Tensor",
    reference=reference.tensor_coefficients,
    fake=lambda coefficients, grams, groups, weights: coefficients.new_empty(grams.shape[:2]),
    dtype_from=(),
)

combine_operator = define_operator(
    "combine(Tensor?[] gradients, Tensor coefficients, int[] groups, "
    "float[] weights, Tensor(a!)[] out) -> ()",
    reference=reference.combine,
    fake=lambda gradients, coefficients, groups, weights, out: None,
    dtype_from=(0, 4),
    vmap=False,
)


@dataclass(frozen=True)
class AlignmentStats:
    """What an alignment did, group by group: float64 tensors on the gradients' device.

    They cover the tensors that every loss reaches (see `align_gradients`).

    Attributes:
        cosine: [groups], cosine between the two gradients; 0 where there are none.
        alpha: [groups], the factor rho = ((cosine + 1) / 2) ** power on the parallel parts.
        norms: [groups, 2], Euclidean norms of the perception and the generation gradient.
        coefficients: [groups, 2], factors c with aligned = c[:, 0] perception + c[:, 1] generation.
    """

    cosine: Tensor
    alpha: Tensor
    norms: Tensor
    coefficients: Tensor


@torch.no_grad()
def align_gradients(
    perception: Gradients,
    generation: Gradients,
    *,
    weights: Sequence[float] = (0.7, 0.3),
    power: float = 2.0,
    groups: Sequence[int | None] | None = None,
    out: Gradients | None = None,
) -> tuple[list[Tensor | None], AlignmentStats]:
    """Damp the parts of two gradients that are parallel to each other, and add the gradients up.

    Inside a group, each gradient is split into a part parallel to the other gradient and an
    orthogonal one; the parallel part is scaled by rho = ((cosine + 1) / 2) ** power and the two
    results are added with `weights` (GenRep, Li, Yang and Wang, ICLR 2026).

    A loss does not reach a tensor whose gradient of it is None or zero everywhere: autograd hands
    out either, depending on the model. A tensor that one loss alone reaches gets its gradient times
    that loss's weight. One that none reaches gets zeros, or None where both gradients are None. The
    statistics cover the tensors that have a group and that both losses reach.

    Args:
        perception: gradients of the perception loss, one dense tensor for each parameter (float32,
            bfloat16, float16 or float64, any shape and strides), None or zeros where the loss does
            not reach the parameter.
        generation: gradients of the generation loss, as many; shapes as in `perception`, dtypes may
            differ.
        weights: of the perception and the generation loss.
        power: damping exponent, >= 0; 0 gives the plain weighted sum.
        groups: for each tensor the index of its group, or None for a plain weighted sum; None puts
            every tensor into group 0.
        out: tensors to write the results to, of the gradients' shapes and any of the dtypes above;
            may be `perception` or `generation`. out[t] may be perception[t] or generation[t], in
            the same place with the same strides and dtype; it must share no memory with any other
            gradient or output. None, also as an entry, allocates.

    Returns:
        The aligned gradients (None where both gradients are), in the promoted dtype of the two
        gradients unless `out` says otherwise, and the statistics.

    Raises:
        TypeError: for an argument of a wrong type, or a gradient of a wrong dtype.
        ValueError: for a wrong length, shape, device, layout, group index, weight or power, and for
            an output that overlaps itself, a gradient or another output; nothing is written then.
    """
    gradients = (perception, generation)
    fit = _are_fit(gradients, out)
    layout = check_gradients(gradients, ("perception", "generation"), groups, fit=fit)
    weights = check_weights(weights, 2)
    power = check_power(power)
    if not fit:
        _check_out(out, layout, {"perception": perception, "generation": generation})
    grouped = layout.grouped
    own_groups = [layout.groups[t] for t in grouped]
    rows = list(range(len(grouped)))
    grams = _gram_matrices(gradients, grouped, rows, len(rows), layout.device)
    tensor_rows, stats = _aligned(grams, own_groups, layout.num_groups, weights, power)
    if len(grouped) < len(layout.groups):
        place_of = {t: place for place, t in enumerate(grouped)}
        rows = [place_of.get(t, -1) for t in layout.reached]
    return _weighted_sums(gradients, tensor_rows, rows, layout, weights, out), stats


@torch.no_grad()
def gram(*gradients: Gradients, groups: Sequence[int | None] | None = None) -> Tensor:
    """Gram matrices of the gradients of n losses.

    Entry [k, i, j] is the inner product of gradients i and j over the tensors of group k.

    Args:
        gradients: 2 to 8 sequences of equal length, one for each loss, as in `align_gradients`.
            Tensors of which some gradient is None are left out; zeros are taken as they are.
        groups: for each tensor the index of its group, or None to leave it out; None puts every
            tensor into group 0.

    Returns:
        [groups, n, n] float64 on the gradients' device, with groups the highest index plus 1.

    Raises:
        TypeError: for an argument of a wrong type, or a gradient of a wrong dtype.
        ValueError: for a wrong number of gradients, length, shape, device, layout or group index.
    """
    fit = _are_fit(gradients)
    layout = check_gradients(gradients, numbered(gradients), groups, fit=fit)
    grouped = layout.grouped
    own_groups = [layout.groups[t] for t in grouped]
    return _gram_matrices(gradients, grouped, own_groups, layout.num_groups, layout.device)


@torch.no_grad()
def combine(
    gradients: Sequence[Gradients],
    coefficients: Tensor,
    groups: Sequence[int | None] | None = None,
    *,
    weights: Sequence[float] | None = None,
    out: Gradients | None = None,
) -> list[Tensor | None]:
    """Weighted sum of the gradients of n losses; every group of tensors has its own weights.

    Args:
        gradients: 2 to 8 sequences of equal length, one for each loss, as in `align_gradients`.
        coefficients: [groups, n] floating point on the gradients' device, e.g.
            ``AlignmentStats.coefficients``.
        groups: for each tensor the row of `coefficients`, or None to use `weights`; None uses row 0
            for every tensor.
        weights: n numbers for tensors that have no group or of which some gradient is None; None
            where there are no such tensors.
        out: as in `align_gradients`; may be one of `gradients`, out[t] the same tensor as
            gradients[i][t] of one i. It must share no memory with any other gradient, output or the
            coefficients.

    Returns:
        The sums (None where every gradient is None), in the promoted dtype of the tensor's
        gradients unless `out` says otherwise. Sums are formed in float32, or in float64 where a
        gradient is float64.

    Raises:
        TypeError: for an argument of a wrong type, or a tensor of a wrong dtype.
        ValueError: for a wrong number of gradients, length, shape, device, layout or group index,
            for `weights` that are missing, and for an output that overlaps itself, another argument
            or another output; nothing is written then.
    """
    names = numbered(gradients)
    fit = _are_fit(gradients, out, coefficients)
    layout = check_gradients(gradients, names, groups, fit=fit)
    table, weights = check_coefficients(coefficients, weights, len(gradients), layout)
    if not fit:
        _check_out(out, layout, dict(zip(names, gradients, strict=True)), coefficients)
    rows = [layout.groups[t] for t in layout.reached]
    return _weighted_sums(gradients, table, rows, layout, weights, out)


class GradientLayout(NamedTuple):
    """Where the tensors of checked gradients belong.

    A loss reaches a tensor here whose gradient of it is not None.
    """

    # For each tensor; -1: plain weighted sum, because it has no group or because a loss does not
    # reach it.
    groups: list[int]
    num_groups: int
    # For each tensor one of its gradients; None where no loss reaches it.
    samples: list[Tensor | None]
    device: torch.device

    @property
    def reached(self) -> list[int]:
        """Indices of the tensors that some loss reaches."""
        return [t for t, sample in enumerate(self.samples) if sample is not None]

    @property
    def grouped(self) -> list[int]:
        """Indices of the tensors that have a group and that every loss reaches."""
        return [t for t, group in enumerate(self.groups) if group >= 0]


def _are_fit(
    gradients: Sequence[Gradients],
    out: Gradients | None = None,
    coefficients: Tensor | None = None,
) -> bool:
    """Whether nothing is wrong with the tensors of these arguments; False where it is not known.

    `out` may be in the place of gradients, and overlaps nothing else.
    """
    lists = list(gradients) if out is None else [out, *gradients]
    if not all([isinstance(tensors, (list, tuple)) for tensors in lists]):
        return False
    if not 2 <= len(gradients) <= MAX_LOSSES or len({len(tensors) for tensors in lists}) > 1:
        return False
    others = () if coefficients is None or out is None else (coefficients,)
    if not all([isinstance(other, Tensor) for other in others]):
        return False
    return lists_fit([] if out is None else [out], gradients, others)


def check_gradients(
    gradients: Sequence[Gradients],
    names: Sequence[str],
    groups: Sequence[int | None] | None,
    *,
    fit: bool = False,
) -> GradientLayout:
    """Check gradients of 2 to 8 losses, called `names` in messages, and their groups.

    Nothing is wrong with their tensors where they are `fit`. What raises: see `align_gradients`.
    """
    if gradients and not isinstance(gradients[0], Sequence):
        check_length(gradients[0], names[0], 0)
    if not 2 <= len(gradients) <= MAX_LOSSES:
        raise ValueError(f"gradients of 2 to {MAX_LOSSES} losses are needed, got {len(gradients)}")
    for name, tensors in zip(names, gradients, strict=True):
        check_length(tensors, name, len(gradients[0]))
    indices, num_groups = _check_groups(groups, len(gradients[0]))
    samples: list[Tensor | None] = [None] * len(indices)
    device = None
    for name, tensors in zip(names, gradients, strict=True):
        # Asking every tensor of a long list for one property after the other takes half as long as
        # one tensor for all of them.
        alike = fit or _are_alike(tensors, samples, device)
        for t, gradient in enumerate(tensors):
            if gradient is None:
                indices[t] = -1
                continue
            if not alike:
                sample = samples[t]
                shape = None if sample is None else sample.shape
                check_tensor(gradient, f"{name}[{t}]", shape, device)
            samples[t] = gradient
            device = device or gradient.device
    return GradientLayout(indices, num_groups, samples, device or torch.device("cpu"))


def _are_alike(
    tensors: Gradients, samples: list[Tensor | None], device: torch.device | None
) -> bool:
    """Whether `check_tensor` would pass all tensors.

    Their shapes are those of `samples`, their device is `device` or one of their own.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    if not {type(tensor) for tensor in present} <= _PLAIN_TENSORS:
        return False
    if not {tensor.layout for tensor in present} <= {torch.strided}:
        return False
    if any([tensor.is_nested for tensor in present]):
        return False
    if not {tensor.dtype for tensor in present} <= set(DTYPES):
        return False
    devices = {tensor.device for tensor in present}
    if device is not None:
        devices.add(device)
    if len(devices) > 1:
        return False
    pairs = zip(tensors, samples, strict=True)
    return all([a.shape == b.shape for a, b in pairs if a is not None and b is not None])


def check_coefficients(
    coefficients: Tensor, weights: Sequence[float] | None, n: int, layout: GradientLayout
) -> tuple[Tensor, list[float]]:
    """Check `coefficients` and `weights` of `combine`; return them as the operators take them.

    Weights are empty where none are needed.
    """
    check_tensor(coefficients, "coefficients", None, layout.device)
    fits = coefficients.ndim == 2 and coefficients.shape[1] == n
    if not fits or len(coefficients) < layout.num_groups:
        raise ValueError(
            f"coefficients must have shape [{layout.num_groups} groups or more, {n}], "
            f"got {tuple(coefficients.shape)}"
        )
    coefficients = coefficients.double().contiguous()
    if weights is not None:
        return coefficients, check_weights(weights, n)
    if any(layout.groups[t] < 0 for t in layout.reached):
        raise ValueError(
            "weights must be given where a tensor has no group or a loss does not reach it, "
            "got None"
        )
    return coefficients, []


def _check_groups(groups: Sequence[int | None] | None, num_tensors: int) -> tuple[list[int], int]:
    if groups is None:
        return [0] * num_tensors, 1
    check_length(groups, "groups", num_tensors)
    for t, index in enumerate(groups):
        if index is None:
            continue
        if isinstance(index, bool) or not isinstance(index, (int, numbers.Integral)):
            raise TypeError(f"groups[{t}] must be an int or None, got {type(index).__name__}")
        if index < 0:
            raise ValueError(f"groups[{t}] must not be negative, got {index}")
        if index >= MAX_GROUPS:
            raise ValueError(f"groups[{t}] must be below {MAX_GROUPS}, got {index}")
    indices = [-1 if index is None else int(index) for index in groups]
    return indices, max(indices, default=-1) + 1


def _check_out(
    out: Gradients | None,
    layout: GradientLayout,
    gradients: Mapping[str, Gradients],
    coefficients: Tensor | None = None,
) -> None:
    """Check `out`, which overlaps no argument, but for the tensors written in place.

    Tensor t may be tensor t of one of `gradients`, by name.
    """
    if out is None:
        return
    check_length(out, "out", len(layout.samples))
    contiguous = _are_alike(out, layout.samples, layout.device)
    contiguous = contiguous and all([one.is_contiguous() for one in out if one is not None])
    if not contiguous:
        for t, (tensor, sample) in enumerate(zip(out, layout.samples, strict=True)):
            if tensor is not None and sample is not None:
                check_writable(tensor, f"out[{t}]", sample.shape, layout.device)
    # What no loss reaches is not written.
    pairs = zip(out, layout.samples, strict=True)
    written = [None if sample is None else tensor for tensor, sample in pairs]
    read: dict[str, Tensor | Gradients] = dict(gradients)
    if coefficients is not None:
        read["coefficients"] = coefficients
    check_no_overlap({"out": written}, read, in_place=gradients)


def numbered(gradients: Sequence[Gradients]) -> list[str]:
    """Names of the gradients of losses, for messages."""
    if not isinstance(gradients, Sequence):
        raise TypeError(f"gradients must be a list or a tuple, got {type(gradients).__name__}")
    return [f"gradients[{i}]" for i in range(len(gradients))]


def _gram_matrices(
    gradients: Sequence[Gradients],
    indices: list[int],
    groups: list[int],
    num_groups: int,
    device: torch.device,
) -> Tensor:
    """[num_groups, n, n]: Gram matrices of the tensors `indices`, which belong to `groups`."""
    n = len(gradients)
    if not indices:
        return torch.zeros(num_groups, n, n, dtype=torch.float64, device=device)
    tensors = [loss_gradients[t] for loss_gradients in gradients for t in indices]
    return gram_operator(tensors, n, groups, num_groups)


def _aligned(
    grams: Tensor, groups: list[int], num_groups: int, weights: list[float], power: float
) -> tuple[Tensor, AlignmentStats]:
    """Coefficients [T, 2] of tensors from their own Gram matrices [T, 2, 2], and statistics."""
    matrices = group_gram_operator(grams, groups, num_groups)
    coefficients, cosine, alpha = alignment_coefficients_operator(matrices, weights, power)
    norms = matrices.diagonal(dim1=1, dim2=2).sqrt()
    stats = AlignmentStats(cosine, alpha, norms, coefficients)
    if groups == list(range(num_groups)):
        # Each tensor is a group, in order. Where a loss does not reach it, its matrix is zero, of
        # which the coefficients are the weights.
        return coefficients, stats
    return tensor_coefficients_operator(coefficients, grams, groups, weights), stats


def _weighted_sums(
    gradients: Sequence[Gradients],
    coefficients: Tensor,
    rows: list[int],
    layout: GradientLayout,
    weights: list[float],
    out: Gradients | None,
) -> list[Tensor | None]:
    """Weighted sums of the gradients, written to `out` where it has a tensor for them.

    `rows` of `coefficients` (-1: `weights`), one for each tensor of ``layout.reached``.
    """
    results: list[Tensor | None] = [None] * len(layout.samples)
    written: list[Tensor] = []
    reached = layout.reached
    for t in reached:
        result = None if out is None else out[t]
        if result is None:
            own = [loss_gradients[t] for loss_gradients in gradients]
            present = [gradient for gradient in own if gradient is not None]
            dtypes = {gradient.dtype for gradient in present}
            result = torch.empty_like(present[-1], dtype=reduce(torch.promote_types, dtypes))
        results[t] = result
        written.append(result)
    if reached:
        tensors = [loss_gradients[t] for loss_gradients in gradients for t in reached]
        combine_operator(tensors, coefficients, rows, weights, written)
    return results
