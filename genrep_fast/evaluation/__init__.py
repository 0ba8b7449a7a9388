"""Evaluation of a GenRep model: metrics, figures and one self-contained report."""

from .evaluator import check_splits, evaluate
from .settings import EvaluationSettings, described, network_evaluations, settings_for

__all__ = [
    "EvaluationSettings",
    "check_splits",
    "described",
    "evaluate",
    "network_evaluations",
    "settings_for",
]
