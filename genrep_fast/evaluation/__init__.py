"""Evaluation of a GenRep model: metrics, figures and one self-contained report."""

from .evaluator import EvaluationSettings, evaluate

__all__ = ["EvaluationSettings", "evaluate"]
