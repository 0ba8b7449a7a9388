"""Bayes' rule and the distillation loss with its gradients, see `genrep_fast.reference.posterior`.

    log p = log_softmax_y( L / temperature + log prior )
    KL = sum_y p (log p - log q),    dKL/dlogits = q - p

distillation_loss reads both inputs once; the others read theirs a second time, for what they write:
memory bounds them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .states import finite


class Block(NamedTuple):
    """Locations of one image, whose classes a program takes CLASSES at a time."""

    image: tl.tensor
    location: tl.tensor  # [1, LOCATIONS]
    mask: tl.tensor
    classes: tl.tensor
    locations: tl.tensor


class Scores(NamedTuple):
    """Logarithms of a distribution over the classes, not normalised: scores [B, K, *loc]."""

    pointer: tl.tensor
    # Of the block's image, [K]; None where there is no prior.
    prior: tl.tensor
    inverse_temperature: tl.tensor


class Normalizer(NamedTuple):
    """log sum_y exp(score) = largest + log_total, [1, LOCATIONS] each."""

    largest: tl.tensor  # 0 where every score is -inf
    log_total: tl.tensor


def posterior(log_likelihood: Tensor, log_prior: Tensor | None, temperature: float) -> Tensor:
    """log p(y|x), float32 [B, K, *loc]; see the reference."""
    result = torch.empty(log_likelihood.shape, dtype=torch.float32, device=log_likelihood.device)
    _launch_bayes(
        posterior_kernel, (log_likelihood.contiguous(),), log_prior, temperature, (result,)
    )
    return result


def distillation_loss(
    student_logits: Tensor, log_likelihood: Tensor, log_prior: Tensor | None, temperature: float
) -> Tensor:
    """KL(p || q), float32 [B, *loc]; see the reference."""
    shape = log_likelihood.shape
    loss = torch.empty(shape[0], *shape[2:], dtype=torch.float32, device=log_likelihood.device)
    tensors = (log_likelihood.contiguous(), student_logits.contiguous())
    _launch_bayes(distillation_loss_kernel, tensors, log_prior, temperature, (loss,))
    return loss


def distillation_loss_backward(
    grad: Tensor,
    student_logits: Tensor,
    log_likelihood: Tensor,
    log_prior: Tensor | None,
    temperature: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of both inputs; empty where `output_mask` is False; see the reference."""
    tensors = (log_likelihood.contiguous(), student_logits.contiguous())
    grad_logits, grad_likelihood = (
        torch.empty_like(tensor) if needed else None
        for tensor, needed in zip(tensors[::-1], output_mask, strict=True)
    )
    results = (grad.contiguous(), grad_logits, grad_likelihood)
    _launch_bayes(distillation_loss_backward_kernel, tensors, log_prior, temperature, results)
    return tuple(grad.new_empty(0) if result is None else result for result in results[1:])


def _launch_bayes(
    kernel: triton.JITFunction,
    tensors: tuple[Tensor, ...],
    log_prior: Tensor | None,
    temperature: float,
    results: tuple[Tensor | None, ...],
) -> None:
    batch, classes = tensors[0].shape[:2]
    locations = math.prod(tensors[0].shape[2:])
    block = (1024, 1) if locations == 1 else (8, 128)
    blocks = triton.cdiv(locations, block[1])
    if batch * blocks == 0:
        return
    prior, prior_stride = None, 0
    if log_prior is not None:
        prior = log_prior.contiguous()
        prior_stride = classes if len(prior) > 1 else 0
    with torch.cuda.device_of(tensors[0]):
        kernel[(batch * blocks,)](
            *tensors,
            prior,
            *results,
            prior_stride,
            classes,
            locations,
            1 / temperature,
            CLASSES=block[0],
            LOCATIONS=block[1],
            num_warps=8,
        )


@triton.jit
def _block(classes, locations, LOCATIONS: tl.constexpr):
    """The program's block."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(locations, LOCATIONS)
    location = (program % blocks) * LOCATIONS + tl.arange(0, LOCATIONS)[None, :]
    return Block(program // blocks, location, location < locations, classes, locations)


@triton.jit
def _load_scores(scores, block, first, CLASSES: tl.constexpr):
    """Scores of CLASSES classes from `first` on, their places, and their mask.

    float64; -inf where there is no class.
    """
    class_ = first + tl.arange(0, CLASSES)[:, None]
    places = (block.image * block.classes + class_) * block.locations + block.location
    mask = block.mask & (class_ < block.classes)
    values = tl.load(scores.pointer + places, mask=mask, other=0.0).to(tl.float64)
    values *= scores.inverse_temperature
    if scores.prior is not None:
        values += tl.load(scores.prior + class_, mask=mask, other=0.0).to(tl.float64)
    return tl.where(mask, values, float("-inf")), places, mask


@triton.jit
def _exp(x):
    """Float32's exponential of a float64 difference."""
    return tl.exp(x.to(tl.float32)).to(tl.float64)


@triton.jit
def _normalize(scores, block, CLASSES: tl.constexpr, LOCATIONS: tl.constexpr):
    """The normalizer of scores."""
    largest = tl.full([CLASSES, LOCATIONS], float("-inf"), tl.float64)
    total = tl.zeros([CLASSES, LOCATIONS], tl.float64)
    first = 0
    while first < block.classes:
        values, _, _ = _load_scores(scores, block, first, CLASSES)
        larger = tl.maximum(largest, values)
        total = total * _exp(largest - finite(larger)) + _exp(values - finite(larger))
        largest = larger
        first += CLASSES
    overall = finite(tl.max(largest, axis=0)[None, :])
    total = tl.sum(total * _exp(largest - overall), axis=0)[None, :]
    return Normalizer(overall, tl.log(total))


@triton.jit
def _log_probabilities(scores, normalizer, block, first, CLASSES: tl.constexpr):
    """Log-probabilities of CLASSES classes from `first` on, their places, and their mask."""
    values, places, mask = _load_scores(scores, block, first, CLASSES)
    return values - normalizer.largest - normalizer.log_total, places, mask


@triton.jit
def _divergence(teacher, student, block, CLASSES: tl.constexpr, LOCATIONS: tl.constexpr):
    """Both normalizers, and KL(p || q) [1, LOCATIONS], of one pass over the scores.

    With w = exp(s - largest s) of the teacher's s and d = (s - largest s) - (r - largest r) of the
    student's r, KL = sum(w d) / sum(w) - log sum(w) + log sum(exp(r - largest r)).
    """
    p_largest = tl.full([CLASSES, LOCATIONS], float("-inf"), tl.float64)
    q_largest = tl.full([CLASSES, LOCATIONS], float("-inf"), tl.float64)
    p_total = tl.zeros([CLASSES, LOCATIONS], tl.float64)
    q_total = tl.zeros([CLASSES, LOCATIONS], tl.float64)
    weighted = tl.zeros([CLASSES, LOCATIONS], tl.float64)
    first = 0
    while first < block.classes:
        p_values, _, _ = _load_scores(teacher, block, first, CLASSES)
        q_values, _, _ = _load_scores(student, block, first, CLASSES)
        p_larger, q_larger = tl.maximum(p_largest, p_values), tl.maximum(q_largest, q_values)
        p_scale = _exp(p_largest - finite(p_larger))
        q_scale = _exp(q_largest - finite(q_larger))
        weighted = _rescaled(weighted, p_total, p_scale, p_largest, q_largest, p_larger, q_larger)
        p_difference, q_difference = p_values - finite(p_larger), q_values - finite(q_larger)
        w = _exp(p_difference)
        weighted += tl.where(w == 0, 0.0, w * (p_difference - q_difference))
        p_total = p_total * p_scale + w
        q_total = q_total * q_scale + _exp(q_difference)
        p_largest, q_largest = p_larger, q_larger
        first += CLASSES
    p_overall = finite(tl.max(p_largest, axis=0)[None, :])
    q_overall = finite(tl.max(q_largest, axis=0)[None, :])
    p_scale, q_scale = _exp(p_largest - p_overall), _exp(q_largest - q_overall)
    weighted = _rescaled(weighted, p_total, p_scale, p_largest, q_largest, p_overall, q_overall)
    p_sum = tl.sum(p_total * p_scale, axis=0)[None, :]
    p_normalizer = Normalizer(p_overall, tl.log(p_sum))
    q_normalizer = Normalizer(q_overall, tl.log(tl.sum(q_total * q_scale, axis=0)[None, :]))
    mean_difference = tl.sum(weighted, axis=0)[None, :] / p_sum
    divergence = mean_difference - p_normalizer.log_total + q_normalizer.log_total
    return p_normalizer, q_normalizer, divergence


@triton.jit
def _rescaled(weighted, total, scale, p_largest, q_largest, p_larger, q_larger):
    """`weighted` = sum(w d), with the weights `total`, relative to larger scores."""
    shift = (finite(p_largest) - finite(p_larger)) - (finite(q_largest) - finite(q_larger))
    # Weights that vanish take infinite differences with them.
    return tl.where(scale * total == 0, 0.0, scale * (weighted + total * shift))


@triton.jit(
    do_not_specialize=["prior_stride", "classes", "locations"],
    do_not_specialize_on_alignment=["likelihood_ptr", "prior_ptr", "result_ptr"],
)
def posterior_kernel(
    likelihood_ptr,  # [B, K, *loc]
    prior_ptr,  # [1|B, K]
    result_ptr,  # [B, K, *loc]
    prior_stride: tl.int64,
    classes: tl.int64,
    locations: tl.int64,
    inverse_temperature: tl.float64,
    CLASSES: tl.constexpr,
    LOCATIONS: tl.constexpr,
):
    """log p(y|x) of a block of locations of one image."""
    block = _block(classes, locations, LOCATIONS)
    if prior_ptr is not None:
        prior_ptr += block.image * prior_stride
    scores = Scores(likelihood_ptr, prior_ptr, inverse_temperature)
    normalizer = _normalize(scores, block, CLASSES, LOCATIONS)
    first = 0
    while first < classes:
        log_p, places, mask = _log_probabilities(scores, normalizer, block, first, CLASSES)
        tl.store(result_ptr + places, log_p.to(tl.float32), mask=mask)
        first += CLASSES


@triton.jit(
    do_not_specialize=["prior_stride", "classes", "locations"],
    do_not_specialize_on_alignment=["likelihood_ptr", "logits_ptr", "prior_ptr", "loss_ptr"],
)
def distillation_loss_kernel(
    likelihood_ptr,  # [B, K, *loc]
    logits_ptr,  # [B, K, *loc]
    prior_ptr,  # [1|B, K]
    loss_ptr,  # [B, *loc]
    prior_stride: tl.int64,
    classes: tl.int64,
    locations: tl.int64,
    inverse_temperature: tl.float64,
    CLASSES: tl.constexpr,
    LOCATIONS: tl.constexpr,
):
    """KL(p || q) of a block of locations of one image."""
    block = _block(classes, locations, LOCATIONS)
    if prior_ptr is not None:
        prior_ptr += block.image * prior_stride
    teacher = Scores(likelihood_ptr, prior_ptr, inverse_temperature)
    student = Scores(logits_ptr, None, 1.0)
    _, _, divergence = _divergence(teacher, student, block, CLASSES, LOCATIONS)
    places = block.image * locations + block.location
    tl.store(loss_ptr + places, divergence.to(tl.float32), mask=block.mask)


@triton.jit(
    do_not_specialize=["prior_stride", "classes", "locations"],
    do_not_specialize_on_alignment=[
        "likelihood_ptr",
        "logits_ptr",
        "prior_ptr",
        "grad_ptr",
        "grad_logits_ptr",
        "grad_likelihood_ptr",
    ],
)
def distillation_loss_backward_kernel(
    likelihood_ptr,  # [B, K, *loc]
    logits_ptr,  # [B, K, *loc]
    prior_ptr,  # [1|B, K]
    grad_ptr,  # [B, *loc]
    grad_logits_ptr,  # [B, K, *loc]
    grad_likelihood_ptr,  # [B, K, *loc]
    prior_stride: tl.int64,
    classes: tl.int64,
    locations: tl.int64,
    inverse_temperature: tl.float64,
    CLASSES: tl.constexpr,
    LOCATIONS: tl.constexpr,
):
    """grad (q - p) and grad p (log p - log q - KL) / temperature of a block of locations."""
    block = _block(classes, locations, LOCATIONS)
    if prior_ptr is not None:
        prior_ptr += block.image * prior_stride
    teacher = Scores(likelihood_ptr, prior_ptr, inverse_temperature)
    student = Scores(logits_ptr, None, 1.0)
    if grad_likelihood_ptr is not None:
        p_normalizer, q_normalizer, divergence = _divergence(
            teacher, student, block, CLASSES, LOCATIONS
        )
    else:
        p_normalizer = _normalize(teacher, block, CLASSES, LOCATIONS)
        q_normalizer = _normalize(student, block, CLASSES, LOCATIONS)
    grad_places = block.image * locations + block.location
    grad = tl.load(grad_ptr + grad_places, mask=block.mask, other=0.0)
    first = 0
    while first < classes:
        log_p, places, mask = _log_probabilities(teacher, p_normalizer, block, first, CLASSES)
        log_q, _, _ = _log_probabilities(student, q_normalizer, block, first, CLASSES)
        p = tl.where(mask, _exp(log_p), 0.0)
        if grad_logits_ptr is not None:
            gradient = (grad * (_exp(log_q) - p)).to(tl.float32)
            dtype = grad_logits_ptr.dtype.element_ty
            tl.store(grad_logits_ptr + places, gradient.to(dtype), mask=mask)
        if grad_likelihood_ptr is not None:
            slope = tl.where(p == 0, 0.0, p * (log_p - log_q - divergence))
            gradient = (grad * slope * inverse_temperature).to(tl.float32)
            dtype = grad_likelihood_ptr.dtype.element_ty
            tl.store(grad_likelihood_ptr + places, gradient.to(dtype), mask=mask)
        first += CLASSES
