"""Monte Carlo posterior scoring and gradient alignment for diffusion models that perceive and generate.

Importing it compiles nothing and probes no device; `GenRep` and `GenRepPipeline` import diffusers when they are first used, and
`GenRepWeighting` imports torchjd.
"""

from __future__ import annotations

from .aligned_adamw import AlignedAdamW
from .backends import BackendUnavailableError, info, use_backend
from .chain_bank import ChainBank
from .coefficients import StepCoefficients
from .gradient_aligner import AlignerStats, GradientAligner
from .ops.alignment import AlignmentStats, align_gradients, combine, gram
from .ops.reverse_step import reverse_step
from .ops.scoring import distillation_loss, fit_temperature, log_evidence, log_likelihood, posterior
from .posterior_scorer import PosteriorScorer

__version__ = "0.1.0"

_MODELS = ("GenRep", "GenRepPipeline", "GenRepWeighting")

__all__ = [
    "AlignedAdamW",
    "AlignerStats",
    "AlignmentStats",
    "BackendUnavailableError",
    "ChainBank",
    "GenRep",
    "GenRepPipeline",
    "GenRepWeighting",
    "GradientAligner",
    "PosteriorScorer",
    "StepCoefficients",
    "align_gradients",
    "combine",
    "distillation_loss",
    "fit_temperature",
    "gram",
    "info",
    "log_evidence",
    "log_likelihood",
    "posterior",
    "reverse_step",
    "use_backend",
]


def __getattr__(name: str):
    if name == "GenRepWeighting":
        from .genrep_weighting import GenRepWeighting

        return GenRepWeighting
    if name in _MODELS:
        from . import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
