"""Scoring: a denoiser's outputs through the mixture likelihood to the distillation loss.

Measured forward, with backward, and streamed. The outputs [B, K, S, C, H, W] must be read once.
"backward" means both passes, to the gradients of outputs and logits: read, read and write.
"streamed" hands over one step at a time and ends with the same loss; it must read once. Each
provider must first agree with the reference in float64. Precisions are such that every step and
class carries weight: no gradient vanishes.

Providers: `eager reference` (genrep_fast.reference, which materialises the residuals), `eager,
preallocated` (with out= and in place), `eager, mse_loss` (F.mse_loss for the residuals), `compiled
reference` (torch.compile on the whole of it; where streamed, on its update of the running state),
and genrep_fast's operators on each backend that can run. The large sizes are left to the last two.
"""

import functools
import math
from typing import NamedTuple

import torch

import genrep_fast as gf
from genrep_fast.benchmarks.measurement import DEVICE, Case, Provider, compiled_backends, copy_of
from genrep_fast.reference import posterior, scoring

PASSES = {
    "forward": 1,
    "backward": 3,
    "streamed": 1,
}  # over the outputs; writing costs what reading does
FLOPS = {"forward": 6, "backward": 14, "streamed": 6}  # an element
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Size(NamedTuple):
    """B, K, S and [C, H, W]; what is measured."""

    batch: int
    classes: int
    steps: int
    shape: tuple[int, int, int]
    per_location: bool = False
    directions: tuple[str, ...] = tuple(PASSES)
    dtypes: tuple[str, ...] = ("float32",)
    large: bool = False


SIZES = {
    "small": Size(4, 10, 10, (4, 16, 16), dtypes=tuple(DTYPES)),
    "latent": Size(8, 10, 50, (4, 32, 32), dtypes=tuple(DTYPES)),
    "imagenet": Size(1, 1000, 50, (4, 32, 32), directions=("streamed",), large=True),
    "segmentation": Size(
        1, 150, 10, (4, 64, 64), True, directions=("forward", "backward"), large=True
    ),
}


class Setting:
    """Logits [B, K, *loc], images [B, C, H, W], outputs [B, K, S, C, H, W] and tables.

    Their residual is x - o. Outputs that are to be streamed lie in memory step by step.
    """

    def __init__(self, size, dtype, streamed):
        self.per_location, steps = size.per_location, size.steps
        random = functools.partial(
            torch.randn, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE
        )
        self.logits = random(
            size.batch, size.classes, *(size.shape[1:] if size.per_location else ())
        )
        self.x = random(size.batch, *size.shape, dtype=dtype)
        if streamed:
            self.model_output = random(
                steps, size.batch, size.classes, *size.shape, dtype=dtype
            ).movedim(0, 2)
        else:
            self.model_output = random(size.batch, size.classes, steps, *size.shape, dtype=dtype)
        one = torch.ones(steps, device=DEVICE)
        elements = size.shape[0] if size.per_location else math.prod(size.shape)
        inv_var = (
            torch.linspace(0.99, 1.01, steps, device=DEVICE) / (2 * elements) ** 0.5
        )  # log-likelihoods vary by about 1
        self.tables = torch.stack((one, 0 * one, -one, inv_var, 0 * one))
        self.coefficients = gf.StepCoefficients(*self.tables)
        self.step_coefficients = [
            gf.StepCoefficients(*self.tables[:, s : s + 1]) for s in range(steps)
        ]

    @functools.cached_property
    def buffer(self):
        return torch.empty_like(self.model_output)

    @property
    def chunks(self):
        """Outputs [B, K, 1, C, H, W] of one step after the other, and its coefficients."""
        return zip(self.model_output.split(1, 2), self.step_coefficients, strict=True)


def reference_loss(logits, x, model_output, tables, per_location):
    scores, _ = scoring.log_likelihood(x, model_output, None, tables, "mixture", per_location)
    return posterior.distillation_loss(logits, scores, None, 1.0).mean()


def loss_of_squares(squares, logits, tables):
    """From squared residuals [B, K, S, *loc] on."""
    steps = -0.5 * tables[3].view(-1, *[1] * (squares.ndim - 3)) * squares
    return posterior.distillation_loss(
        logits, steps.logsumexp(2) - math.log(steps.shape[2]), None, 1.0
    ).mean()


def mse_loss(logits, x, model_output, tables, per_location):
    squares = torch.nn.functional.mse_loss(
        x[:, None, None].expand_as(model_output), model_output, reduction="none"
    )
    return loss_of_squares(squares.sum(3 if per_location else (3, 4, 5)), logits, tables)


def forward(loss, setting):
    return (
        loss(setting.logits, setting.x, setting.model_output, setting.tables, setting.per_location),
    )


def backward(loss, setting):
    leaves = (
        setting.logits.detach().requires_grad_(),
        setting.model_output.detach().requires_grad_(),
    )
    value = loss(leaves[0], setting.x, leaves[1], setting.tables, setting.per_location)
    return value.detach(), *torch.autograd.grad(value, leaves)


def preallocated(differentiate, setting):
    """The residuals' memory becomes that of the outputs' gradient."""
    residual = torch.sub(setting.x[:, None, None], setting.model_output, out=setting.buffer)
    squares = torch.linalg.vector_norm(
        residual, dim=3 if setting.per_location else (3, 4, 5)
    ).square()
    if not differentiate:
        return (loss_of_squares(squares, setting.logits, setting.tables),)
    leaves = setting.logits.detach().requires_grad_(), squares.requires_grad_()
    loss = loss_of_squares(squares, leaves[0], setting.tables)
    grad_logits, grad_squares = torch.autograd.grad(loss, leaves)
    scale = grad_squares.mul_(-2)
    return (
        loss.detach(),
        grad_logits,
        residual.mul_(scale.unsqueeze(3) if setting.per_location else scale[..., None, None, None]),
    )


def streamed(update, setting):
    state = scoring.empty_state(setting.logits.shape, "mixture", setting.x.device)
    count = torch.zeros(state.shape[2], dtype=torch.int64, device=setting.x.device)
    for model_output, steps in setting.chunks:
        update(
            setting.x,
            model_output,
            None,
            steps.tables,
            None,
            "mixture",
            setting.per_location,
            count,
            state,
        )
    scores = scoring.state_log_likelihood(count, state, "mixture").float()
    return (posterior.distillation_loss(setting.logits, scores, None, 1.0).mean(),)


def ours(backend, direction, setting):
    def loss(logits, x, model_output, *_):
        scores = gf.log_likelihood(
            x, model_output, setting.coefficients, per_location=setting.per_location
        )
        return gf.distillation_loss(logits, scores, reduction="mean")

    with gf.use_backend(backend):
        if direction != "streamed":
            return (forward if direction == "forward" else backward)(loss, setting)
        scorer = gf.PosteriorScorer(setting.logits.shape[1], per_location=setting.per_location)
        for model_output, steps in setting.chunks:
            scorer.update(setting.x, model_output, steps)
        return (gf.distillation_loss(setting.logits, scorer.log_likelihood(), reduction="mean"),)


compiled_loss = torch.compile(reference_loss, fullgraph=True, dynamic=False)
compiled_update = torch.compile(scoring.score_update, fullgraph=True, dynamic=False)
BACKENDS = compiled_backends(
    "log_likelihood",
    "log_likelihood_backward",
    "distillation_loss",
    "distillation_loss_backward",
    "score_update",
)
PROVIDERS = {
    "forward": {
        "eager reference": functools.partial(forward, reference_loss),
        "eager, preallocated": functools.partial(preallocated, False),
        "eager, mse_loss": functools.partial(forward, mse_loss),
        "compiled reference": functools.partial(forward, compiled_loss),
    },
    "backward": {
        "eager reference": functools.partial(backward, reference_loss),
        "eager, preallocated": functools.partial(preallocated, True),
        "eager, mse_loss": functools.partial(backward, mse_loss),
        "compiled reference": functools.partial(backward, compiled_loss),
    },
    "streamed": {
        "eager reference": functools.partial(streamed, scoring.score_update),
        "compiled reference": functools.partial(streamed, compiled_update),
    },
}
for direction, providers in PROVIDERS.items():
    providers |= {
        f"genrep_fast, {name}": functools.partial(ours, name, direction) for name in BACKENDS
    }
ROLES = {"eager reference": "eager", "compiled reference": "compiled"} | {
    f"genrep_fast, {name}": "ours" for name in BACKENDS
}


@functools.lru_cache(maxsize=1)
def expected(setting, direction):
    """Loss, and gradients of logits and outputs, in float64 and a few classes at a time."""
    x, logits, tables = (
        setting.x.double(),
        setting.logits.double(),
        setting.tables.double(),
    )
    options = ("mixture", setting.per_location)
    parts = setting.model_output.split(10, 1)
    results = [scoring.log_likelihood(x, part.double(), None, tables, *options) for part in parts]
    scores = torch.cat([result[0] for result in results], 1)
    loss = posterior.distillation_loss(logits, scores, None, 1.0)
    if direction != "backward":
        return (loss.mean(),)
    grad = torch.full_like(loss, 1 / loss.numel())
    grad_logits, grad_scores = posterior.distillation_loss_backward(
        grad, logits, scores, None, 1.0, [True, True]
    )
    grad_parts = [
        scoring.log_likelihood_backward(
            grad, *result, x, part.double(), None, tables, *options, [False, True, False]
        )[1]
        for grad, result, part in zip(grad_scores.split(10, 1), results, parts, strict=True)
    ]
    return loss.mean(), grad_logits, torch.cat(grad_parts, 1)


def error_of(name, direction, setting):
    """Largest error over the largest value, of loss and gradients.

    Allowed is 1e-4, or what rounding a result to its dtype costs.
    """
    worst = 0.0
    for result, value in zip(
        PROVIDERS[direction][name](setting), expected(setting, direction), strict=True
    ):
        error = ((result.double() - value).abs().max() / value.abs().max()).item()
        if not error < max(1e-4, torch.finfo(result.dtype).eps):
            raise RuntimeError(f"relative error {error:.1e}")
        worst = max(worst, error)
    return worst


def case(size, direction, dtype):
    setting = Setting(size, DTYPES[dtype], direction == "streamed")
    names = [
        name
        for name in PROVIDERS[direction]
        if not size.large or ROLES.get(name) in ("compiled", "ours")
    ]
    providers = {
        name: Provider(
            functools.partial(PROVIDERS[direction][name], setting),
            functools.partial(error_of, name, direction, setting),
            ROLES.get(name, "peer"),
        )
        for name in names
    }
    outputs = setting.model_output
    return Case(
        providers,
        outputs.numel(),
        PASSES[direction] * outputs.nbytes,
        FLOPS[direction] * outputs.numel(),
        **copy_of(outputs),
    )


CASES = {
    f"{name} {direction}{'' if dtype == 'float32' else ' ' + dtype}": functools.partial(
        case, size, direction, dtype
    )
    for name, size in SIZES.items()
    for dtype in size.dtypes
    for direction in size.directions
}
QUICK = ["latent forward", "latent backward", "latent streamed"]
SMALLEST = "small backward"
