"""Monte Carlo posterior scoring and gradient alignment for diffusion models.

The models perceive and generate. Importing the package compiles nothing and probes no device;
`GenRep` and `GenRepPipeline` import diffusers when they are first used, and `GenRepWeighting`
imports torchjd.
"""

from __future__ import annotations

import typing
from importlib import import_module

from . import _moved
from ._version import __version__ as __version__
from .alignment.aligned_adamw import AlignedAdamW
from .alignment.aligner import AlignerStats, GradientAligner
from .coefficients.forward_process import ForwardProcess, forward_process
from .coefficients.tables import StepCoefficients
from .dispatch.report import info
from .dispatch.selection import BackendUnavailableError, use_backend
from .ops.alignment import AlignmentStats, align_gradients, combine, gram
from .ops.posterior import distillation_loss, fit_temperature, log_evidence, posterior
from .ops.reverse_step import reverse_step
from .ops.scoring import log_likelihood
from .scoring.chain_bank import ChainBank
from .scoring.classifier.candidates import Candidates
from .scoring.classifier.coarse import Coarse
from .scoring.classifier.diffusion_classifier import DiffusionClassifier
from .scoring.classifier.saved_results import SavedResults
from .scoring.classifier.strategies import Full, Race, Staged, Stratified
from .scoring.scorer import PosteriorScorer

if typing.TYPE_CHECKING:
    from .alignment.torchjd import GenRepWeighting
    from .models import GenRep, GenRepPipeline

# Where names live that need more than torch.
_LAZY = {
    "GenRep": "models",
    "GenRepPipeline": "models",
    "GenRepWeighting": "alignment.torchjd",
}

__all__ = [
    "AlignedAdamW",
    "AlignerStats",
    "AlignmentStats",
    "BackendUnavailableError",
    "Candidates",
    "ChainBank",
    "Coarse",
    "DiffusionClassifier",
    "ForwardProcess",
    "Full",
    "GenRep",
    "GenRepPipeline",
    "GenRepWeighting",
    "GradientAligner",
    "PosteriorScorer",
    "Race",
    "SavedResults",
    "Staged",
    "StepCoefficients",
    "Stratified",
    "align_gradients",
    "combine",
    "distillation_loss",
    "fit_temperature",
    "forward_process",
    "gram",
    "info",
    "log_evidence",
    "log_likelihood",
    "posterior",
    "reverse_step",
    "use_backend",
]


def __getattr__(name: str) -> object:
    if name in _moved.MOVED:
        return import_module(f"genrep_fast.{name}")
    if name in _LAZY:
        try:
            module = import_module(f"genrep_fast.{_LAZY[name]}")
        except ModuleNotFoundError as error:
            from .extras import advice

            raise ImportError(advice(name, error) or str(error)) from error
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
