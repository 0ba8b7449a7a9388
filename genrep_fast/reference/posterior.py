"""Definition of Bayes' rule over log-likelihoods L and of the distillation loss.

Shapes: B images, K classes; *loc is *spatial where a likelihood is kept for each location, and
nothing where it is kept for each image. Everything is computed in float32, or in float64 where an
input is float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .scoring import accumulation_dtype


def posterior(log_likelihood: Tensor, log_prior: Tensor | None, temperature: float) -> Tensor:
    """log p(y|x) = log_softmax_y( L / temperature + log p(y) ).

    [B, K, *loc], [1|B, K, *1] -> [B, K, *loc]
    """
    return _scores(log_likelihood, log_prior, temperature).log_softmax(1)


def log_evidence(log_likelihood: Tensor, log_prior: Tensor | None) -> Tensor:
    """log p(x) = logsumexp_y( L + log p(y) ), uniform p(y) where None. -> [B, *loc]"""
    evidence = _scores(log_likelihood, log_prior, 1.0).logsumexp(1)
    if log_prior is None:
        return evidence - math.log(log_likelihood.shape[1])
    return evidence


def distillation_loss(
    student_logits: Tensor, log_likelihood: Tensor, log_prior: Tensor | None, temperature: float
) -> Tensor:
    """KL(p || q) of the posterior p and q = softmax(student_logits). -> [B, *loc]"""
    return _divergence(student_logits, log_likelihood, log_prior, temperature)[3]


def distillation_loss_backward(
    grad: Tensor,
    student_logits: Tensor,
    log_likelihood: Tensor,
    log_prior: Tensor | None,
    temperature: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """d/dlogits = q - p, d/dL = p (log p - log q - KL) / temperature, in the inputs' dtypes.

    Empty where `output_mask` is False.
    """
    parts = _divergence(student_logits, log_likelihood, log_prior, temperature)
    p, q, log_ratio, divergence = parts
    grad = grad.unsqueeze(1)
    grad_logits = grad_likelihood = grad.new_empty(0)
    if output_mask[0]:
        grad_logits = (grad * (q - p)).to(student_logits.dtype).contiguous()
    if output_mask[1]:
        slope = torch.where(p == 0, 0, p * (log_ratio - divergence.unsqueeze(1)))
        grad_likelihood = grad * slope / temperature
        grad_likelihood = grad_likelihood.to(log_likelihood.dtype).contiguous()
    return grad_logits, grad_likelihood


def _scores(log_likelihood: Tensor, log_prior: Tensor | None, temperature: float) -> Tensor:
    scores = log_likelihood.to(accumulation_dtype(log_likelihood)) / temperature
    return scores if log_prior is None else scores + log_prior.to(scores.dtype)


def _divergence(
    student_logits: Tensor, log_likelihood: Tensor, log_prior: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, q, log p - log q [B, K, *loc] and KL(p || q) [B, *loc], where 0 log 0 = 0."""
    log_p = posterior(log_likelihood, log_prior, temperature)
    log_q = student_logits.to(log_p.dtype).log_softmax(1)
    p = log_p.exp()
    log_ratio = log_p - log_q
    return p, log_q.exp(), log_ratio, torch.where(p == 0, 0, p * log_ratio).sum(1)
