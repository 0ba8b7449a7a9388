"""A plain model of `GradientAligner` and `AlignedAdamW`, written from the method's formulas alone.

It takes each gradient from ``autograd.grad``, computes in float64, steps with `torch.optim.AdamW`,
and says beside every number by how much arithmetic in the parameters' dtype may miss it.
"""

import itertools
import math
from dataclasses import dataclass, field

import torch

# Entries of Gram matrices, next to the product of norms: products of float32 are summed in float32
# up to 16 at a time, which the tests of kernels bound by this; float64 rounds its sums alone.
GRAM_ERROR = {torch.float64: 1e-14}
GRAM_ERROR_OF_OTHERS = 2e-7


def roundoff(dtype):
    return torch.finfo(dtype).eps / 2


def genrep(gram, weights, power):
    first, second = gram[0, 0].item(), gram[1, 1].item()
    dot = gram[0, 1].item()
    cosine = min(1.0, max(-1.0, dot / math.sqrt(first * second)))
    removed = 1 - ((cosine + 1) / 2) ** power
    return [
        weights[0] - weights[1] * removed * dot / first,
        weights[1] - weights[0] * removed * dot / second,
    ]


def pcgrad(gram, weights, power):
    return [1 + max(0.0, -gram[0, 1].item()) / gram[i, i].item() for i in range(2)]


def mgda(gram, weights, power):
    excess = [max(0.0, (gram[1 - i, 1 - i] - gram[0, 1]).item()) for i in range(2)]
    return [each / sum(excess) for each in excess] if sum(excess) else [0.5, 0.5]


def nash_mtl(gram, weights, power):
    norms = gram.diagonal().sqrt().tolist()
    cosine = gram[0, 1].item() / norms[0] / norms[1]
    return [1 / (norm * math.sqrt(max(1 + cosine, 1e-300))) for norm in norms]


def inverse_norms(gram, weights, power):
    return [1 / norm for norm in gram.diagonal().sqrt().tolist()]


RULES = {
    "genrep": genrep,
    "pcgrad": pcgrad,
    "mgda": mgda,
    "nash_mtl": nash_mtl,
    "own": inverse_norms,
}


@dataclass
class Combined:
    """The combined gradients of a step, and what statistics say of them.

    Attributes:
        gradients: by parameter, float64, with the bound of each element's error, and the sum of the
            sizes of the terms that make up the element.
        coefficients: by group, with the bound of their errors; of groups that all losses reach.
        total_norm: before clipping, with the bound of its error.
    """

    gradients: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    coefficients: dict
    total_norm: tuple[float, float]


def combine(gradients, keys, rule, weights, power, max_norm, dtype):
    """`gradients`: for each loss a list with None where it does not reach a parameter; `keys`: of
    the parameters' groups, None for none.
    """
    n, shared, own = len(gradients), {}, {}
    for index, of_losses in enumerate(zip(*gradients, strict=True)):
        if all(gradient is None for gradient in of_losses):
            continue
        own[index] = matrix(of_losses)
        if keys[index] is not None and all((own[index].diagonal() != 0).tolist()):
            shared.setdefault(keys[index], []).append(index)
    rows = {index: (list(weights), [0.0] * n) for index in own}
    coefficients = {}
    for key, members in shared.items():
        gram = sum(own[index] for index in members)
        coefficients[key] = with_error(gram, rule, weights, power, dtype)
        rows.update(dict.fromkeys(members, coefficients[key]))
    total, total_error, factor, factor_error = clipping(own, rows, max_norm, dtype)
    combined = {}
    for index, (row, errors) in rows.items():
        terms = [
            (value * factor, error * factor + abs(value) * factor_error, of_loss[index].double())
            for value, error, of_loss in zip(row, errors, gradients, strict=True)
            if of_loss[index] is not None
        ]
        size = sum(abs(value) * gradient.abs() for value, _, gradient in terms)
        error = sum(error * gradient.abs() for _, error, gradient in terms)
        computed_in = torch.promote_types(dtype, torch.float32)
        error = error + 2 * n * roundoff(computed_in) * size
        combined[index] = (sum(value * gradient for value, _, gradient in terms), error, size)
    return Combined(combined, coefficients, (total, total_error))


def matrix(of_losses):
    n = len(of_losses)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for i, j in itertools.product(range(n), repeat=2):
        if of_losses[i] is not None and of_losses[j] is not None:
            gram[i, j] = (of_losses[i].double() * of_losses[j].double()).sum()
    return gram


def with_error(gram, rule, weights, power, dtype):
    """Coefficients of a group, and by how much they move where the entries of its matrix do."""
    values = RULES[rule](gram, weights, power)
    n, largest = len(gram), [0.0] * len(gram)
    norms = gram.diagonal().sqrt()
    size = GRAM_ERROR.get(dtype, GRAM_ERROR_OF_OTHERS) * norms[:, None] * norms[None, :]
    for signs in itertools.product((-1.0, 1.0), repeat=n * (n + 1) // 2):
        pattern = torch.zeros(n, n, dtype=torch.float64)
        pattern[tuple(torch.triu_indices(n, n))] = torch.tensor(signs, dtype=torch.float64)
        moved = RULES[rule](gram + size * (pattern + pattern.triu(1).T), weights, power)
        largest = [max(a, abs(b - c)) for a, b, c in zip(largest, moved, values, strict=True)]
    pairs = zip(largest, values, strict=True)
    return values, [4 * error + 1e-12 * abs(value) for error, value in pairs]


def clipping(own, rows, max_norm, dtype):
    """Norm of the result, the factor that shortens it, and the bounds of both errors."""
    square = square_error = 0.0
    for index, gram in own.items():
        row, errors = (torch.tensor(values, dtype=torch.float64) for values in rows[index])
        norms = gram.diagonal().sqrt()
        square += (row @ gram @ row).item()
        size = (row.abs() * norms).sum().item()
        gram_error = GRAM_ERROR.get(dtype, GRAM_ERROR_OF_OTHERS)
        square_error += 2 * size * (errors * norms).sum().item() + 4 * gram_error * size**2
    total = math.sqrt(max(square, 0.0))
    error = math.sqrt(max(square, 0.0) + square_error) - total
    error = max(error, total - math.sqrt(max(square - square_error, 0.0)))
    if max_norm is None:
        return total, error, 1.0, 0.0
    factors = [
        min(1.0, max_norm / (max(each, 0.0) + 1e-6))
        for each in (total, total - error, total + error)
    ]
    return total, error, factors[0], 2 * max(abs(each - factors[0]) for each in factors)


@dataclass
class Place:
    """A parameter and what is kept of it, as they were last seen to be right."""

    value: torch.Tensor
    average: torch.Tensor | None = None
    step: int = 0
    moments: tuple[torch.Tensor, torch.Tensor] | None = None
    # What may have to be told of a failure.
    name: str = field(default="", compare=False)


def adamw(place, gradient, error, size, group):
    """Parameter and moments after a step of `torch.optim.AdamW` in float64, and the bounds of what
    arithmetic in float32 (or in float64, for such a parameter) and rounding to the dtypes in which
    they are kept may add to the `error` of the gradient; `size` is that of its terms.
    """
    parameter = place.value.double().requires_grad_()
    moments = place.moments or (torch.zeros_like(place.value),) * 2
    options = {name: group[name] for name in ("betas", "eps", "weight_decay")}
    lr = float(group["lr"])
    optimizer = torch.optim.AdamW([parameter], lr=lr, foreach=False, **options)
    optimizer.state[parameter] = {
        "step": torch.tensor(float(place.step)),
        "exp_avg": moments[0].double().clone(),
        "exp_avg_sq": moments[1].double().clone(),
    }
    parameter.grad = gradient
    optimizer.step()
    state = optimizer.state[parameter]
    first, second = state["exp_avg"], state["exp_avg_sq"]

    dtype = place.value.dtype
    unit = roundoff(torch.promote_types(dtype, torch.float32))
    beta1, beta2 = options["betas"]
    correction1, correction2 = (1 - beta ** (place.step + 1) for beta in (beta1, beta2))
    first_error = (1 - beta1) * error + 4 * unit * (moments[0].double().abs() + size)
    square_error = 2 * gradient.abs() * error + error**2
    second_error = (1 - beta2) * square_error + 4 * unit * second
    root = (second / correction2).sqrt()
    root_error = ((second + second_error) / correction2).sqrt() - root + 4 * unit * root
    lower = ((second - second_error).clamp(min=0) / correction2).sqrt()
    root_error = torch.maximum(root_error, root - lower)
    divisor = root + options["eps"]
    smallest = (divisor - root_error).clamp(min=0)
    update = (first / correction1).abs()
    update_error = (first_error / correction1 + 4 * unit * update) / smallest
    update_error = update_error + update / divisor * root_error / smallest
    moved = parameter.detach()
    moved_error = lr * update_error.nan_to_num(nan=0.0)
    moved_error = moved_error + 8 * unit * (place.value.double().abs() + lr * update / divisor)
    values = (moved, first, second)
    errors = (moved_error, first_error, second_error)
    stored = [error + rounding(value, dtype) for value, error in zip(values, errors, strict=True)]
    return values, stored


def rounding(value, dtype):
    """What rounding `value` to `dtype` may take from it or add to it."""
    return 1.01 * roundoff(dtype) * value.abs() + torch.finfo(dtype).smallest_normal
