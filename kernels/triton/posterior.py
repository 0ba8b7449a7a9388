"""Bayes' rule and the distillation loss with its gradients, see `genrep_fast.reference.posterior`.

    log p = log_softmax_y( L / temperature + log prior )
    KL = sum_y p (log p - log q),    dKL/dlogits = q - p

Each reads B K numbers a location once or twice, and writes as much at most: memory bounds them.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scoring import finite


def posterior(log_likelihood: Tensor, log_prior: Tensor | None, temperature: float) -> Tensor:
    """log p(y|x), float32 [B, K, *loc]; see the reference."""
    result = torch.empty(log_likelihood.shape, dtype=torch.float32, device=log_likelihood.device)
    _launch_bayes(
        _posterior_kernel, (log_likelihood.contiguous(),), log_prior, temperature, (result,)
    )
    return result


def distillation_loss(
    student_logits: Tensor, log_likelihood: Tensor, log_prior: Tensor | None, temperature: float
) -> Tensor:
    """KL(p || q), float32 [B, *loc]; see the reference."""
    shape = log_likelihood.shape
    loss = torch.empty(shape[0], *shape[2:], dtype=torch.float32, device=log_likelihood.device)
    tensors = (log_likelihood.contiguous(), student_logits.contiguous())
    _launch_bayes(_distillation_kernel, tensors, log_prior, temperature, (loss,))
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
    _launch_bayes(_distillation_backward_kernel, tensors, log_prior, temperature, results)
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
    prior, prior_stride = (
        (None, 0)
        if log_prior is None
        else (log_prior.contiguous(), classes if len(log_prior) > 1 else 0)
    )
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
def _place(classes, locations, LOCATIONS: tl.constexpr):
    """The program's image, its locations [1, LOCATIONS], and their mask."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(locations, LOCATIONS)
    location = (program % blocks) * LOCATIONS + tl.arange(0, LOCATIONS)[None, :]
    return program // blocks, location, location < locations


@triton.jit
def _scores(scores_ptr, prior_ptr, places, class_, mask, inverse_temperature):
    """Logarithms of unnormalised probabilities in float64, -inf where there are none."""
    scores = tl.load(scores_ptr + places, mask=mask, other=0.0).to(tl.float64) * inverse_temperature
    if prior_ptr is not None:
        scores += tl.load(prior_ptr + class_, mask=mask, other=0.0).to(tl.float64)
    return tl.where(mask, scores, float("-inf"))


@triton.jit
def _exp(x):
    """Float32's exponential of a float64 difference."""
    return tl.exp(x.to(tl.float32)).to(tl.float64)


@triton.jit
def _normalizer(
    scores_ptr,
    prior_ptr,
    image,
    location,
    mask,
    classes,
    locations,
    inverse_temperature,
    CLASSES: tl.constexpr,
    LOCATIONS: tl.constexpr,
):
    """Largest score, or 0, and log sum exp(score - largest) over classes, [1, LOCATIONS] each."""
    largest = tl.full([CLASSES, LOCATIONS], float("-inf"), tl.float64)
    total = tl.zeros([CLASSES, LOCATIONS], tl.float64)
    first = 0
    while first < classes:
        class_ = first + tl.arange(0, CLASSES)[:, None]
        places = (image * classes + class_) * locations + location
        scores = _scores(
            scores_ptr, prior_ptr, places, class_, mask & (class_ < classes), inverse_temperature
        )
        larger = tl.maximum(largest, scores)
        total = total * _exp(largest - finite(larger)) + _exp(scores - finite(larger))
        largest = larger
        first += CLASSES
    overall = finite(tl.max(largest, axis=0)[None, :])
    total = tl.sum(total * _exp(largest - overall), axis=0)[None, :]
    return overall, tl.log(total)


@triton.jit
def _log_probabilities(
    scores_ptr,
    prior_ptr,
    image,
    location,
    first,
    mask,
    classes,
    locations,
    inverse_temperature,
    normalizer,
    CLASSES: tl.constexpr,
):
    """Log-probabilities of CLASSES classes from `first` on, their places, and their mask."""
    class_ = first + tl.arange(0, CLASSES)[:, None]
    places = (image * classes + class_) * locations + location
    mask = mask & (class_ < classes)
    scores = _scores(scores_ptr, prior_ptr, places, class_, mask, inverse_temperature)
    return scores - normalizer[0] - normalizer[1], places, mask


@triton.jit
def _divergence_terms(log_p, log_q, mask):
    """p, and p (log p - log q) with 0 log 0 = 0; 0 outside the mask"""
    p = tl.where(mask, _exp(log_p), 0.0)
    return p, tl.where(p == 0, 0.0, p * (log_p - log_q))


@triton.jit(
    do_not_specialize=["prior_stride", "classes", "locations"],
    do_not_specialize_on_alignment=["likelihood_ptr", "prior_ptr", "result_ptr"],
)
def _posterior_kernel(
    likelihood_ptr,
    prior_ptr,
    result_ptr,
    prior_stride: tl.int64,
    classes: tl.int64,
    locations: tl.int64,
    inverse_temperature: tl.float64,
    CLASSES: tl.constexpr,
    LOCATIONS: tl.constexpr,
):
    """log p(y|x) of a block of locations of one image."""
    image, location, inside = _place(classes, locations, LOCATIONS)
    if prior_ptr is not None:
        prior_ptr += image * prior_stride
    normalizer = _normalizer(
        likelihood_ptr,
        prior_ptr,
        image,
        location,
        inside,
        classes,
        locations,
        inverse_temperature,
        CLASSES,
        LOCATIONS,
    )
    first = 0
    while first < classes:
        log_p, places, mask = _log_probabilities(
            likelihood_ptr,
            prior_ptr,
            image,
            location,
            first,
            inside,
            classes,
            locations,
            inverse_temperature,
            normalizer,
            CLASSES,
        )
        tl.store(result_ptr + places, log_p.to(tl.float32), mask=mask)
        first += CLASSES


@triton.jit
def _divergence(
    likelihood_ptr,
    logits_ptr,
    prior_ptr,
    image,
    location,
    inside,
    classes,
    locations,
    inverse_temperature,
    teacher,
    student,
    CLASSES: tl.constexpr,
    LOCATIONS: tl.constexpr,
):
    """KL(p || q) [1, LOCATIONS], given both normalizers."""
    divergence = tl.zeros([CLASSES, LOCATIONS], tl.float64)
    first = 0
    while first < classes:
        log_p, _, mask = _log_probabilities(
            likelihood_ptr,
            prior_ptr,
            image,
            location,
            first,
            inside,
            classes,
            locations,
            inverse_temperature,
            teacher,
            CLASSES,
        )
        log_q, _, _ = _log_probabilities(
            logits_ptr,
            None,
            image,
            location,
            first,
            inside,
            classes,
            locations,
            1.0,
            student,
            CLASSES,
        )
        divergence += _divergence_terms(log_p, log_q, mask)[1]
        first += CLASSES
    return tl.sum(divergence, axis=0)[None, :]


@triton.jit(
    do_not_specialize=["prior_stride", "classes", "locations"],
    do_not_specialize_on_alignment=["likelihood_ptr", "logits_ptr", "prior_ptr", "loss_ptr"],
)
def _distillation_kernel(
    likelihood_ptr,
    logits_ptr,
    prior_ptr,
    loss_ptr,
    prior_stride: tl.int64,
    classes: tl.int64,
    locations: tl.int64,
    inverse_temperature: tl.float64,
    CLASSES: tl.constexpr,
    LOCATIONS: tl.constexpr,
):
    """KL(p || q) of a block of locations of one image."""
    image, location, inside = _place(classes, locations, LOCATIONS)
    if prior_ptr is not None:
        prior_ptr += image * prior_stride
    teacher = _normalizer(
        likelihood_ptr,
        prior_ptr,
        image,
        location,
        inside,
        classes,
        locations,
        inverse_temperature,
        CLASSES,
        LOCATIONS,
    )
    student = _normalizer(
        logits_ptr, None, image, location, inside, classes, locations, 1.0, CLASSES, LOCATIONS
    )
    divergence = _divergence(
        likelihood_ptr,
        logits_ptr,
        prior_ptr,
        image,
        location,
        inside,
        classes,
        locations,
        inverse_temperature,
        teacher,
        student,
        CLASSES,
        LOCATIONS,
    )
    tl.store(loss_ptr + image * locations + location, divergence.to(tl.float32), mask=inside)


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
def _distillation_backward_kernel(
    likelihood_ptr,
    logits_ptr,
    prior_ptr,
    grad_ptr,
    grad_logits_ptr,
    grad_likelihood_ptr,
    prior_stride: tl.int64,
    classes: tl.int64,
    locations: tl.int64,
    inverse_temperature: tl.float64,
    CLASSES: tl.constexpr,
    LOCATIONS: tl.constexpr,
):
    """grad (q - p) and grad p (log p - log q - KL) / temperature of a block of locations."""
    image, location, inside = _place(classes, locations, LOCATIONS)
    if prior_ptr is not None:
        prior_ptr += image * prior_stride
    teacher = _normalizer(
        likelihood_ptr,
        prior_ptr,
        image,
        location,
        inside,
        classes,
        locations,
        inverse_temperature,
        CLASSES,
        LOCATIONS,
    )
    student = _normalizer(
        logits_ptr, None, image, location, inside, classes, locations, 1.0, CLASSES, LOCATIONS
    )
    if grad_likelihood_ptr is not None:
        divergence = _divergence(
            likelihood_ptr,
            logits_ptr,
            prior_ptr,
            image,
            location,
            inside,
            classes,
            locations,
            inverse_temperature,
            teacher,
            student,
            CLASSES,
            LOCATIONS,
        )
    grad = tl.load(grad_ptr + image * locations + location, mask=inside, other=0.0)
    first = 0
    while first < classes:
        log_p, places, mask = _log_probabilities(
            likelihood_ptr,
            prior_ptr,
            image,
            location,
            first,
            inside,
            classes,
            locations,
            inverse_temperature,
            teacher,
            CLASSES,
        )
        log_q, _, _ = _log_probabilities(
            logits_ptr,
            None,
            image,
            location,
            first,
            inside,
            classes,
            locations,
            1.0,
            student,
            CLASSES,
        )
        p, term = _divergence_terms(log_p, log_q, mask)
        if grad_logits_ptr is not None:
            gradient = grad * (_exp(log_q) - p)
            tl.store(
                grad_logits_ptr + places,
                gradient.to(tl.float32).to(grad_logits_ptr.dtype.element_ty),
                mask=mask,
            )
        if grad_likelihood_ptr is not None:
            gradient = grad * tl.where(p == 0, 0.0, term - p * divergence) * inverse_temperature
            tl.store(
                grad_likelihood_ptr + places,
                gradient.to(tl.float32).to(grad_likelihood_ptr.dtype.element_ty),
                mask=mask,
            )
        first += CLASSES
