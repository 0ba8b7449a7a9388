"""Candidates: a cheap scorer of images says which classes the denoiser compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ...checks import check_at_least
from .calibration import Calibration
from .engine import Arrival
from .screening import Cut, Screened, calibrated_cut


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The best classes of a scorer go on to the strategy.

    Args:
        scorer: ``scorer(images) -> scores``: images as the denoiser gets them, [B, C, H, W] (so
            latents of a latent model), -> [B, K], greater for likelier classes; logits or
            log-probabilities, a tensor or an object with ``logits``. −inf rules a class out. Or a
            model with `perceive`, such as a GenRep. A module is put into eval mode during a call.
        keep: classes of an image that go on; None: the calibration says how many, or how far below
            the best score, whichever are fewer. It has to be made with the same scorer.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
    """

    scorer: Callable[[Tensor], Any]
    keep: int | None = None

    def __post_init__(self) -> None:
        if not (callable(self.scorer) or hasattr(self.scorer, "perceive")):
            found = type(self.scorer).__name__
            raise TypeError(f"scorer must be a function of images or a GenRep, got {found}")
        if self.keep is not None:
            check_at_least(1, keep=self.keep)

    @property
    def function(self) -> Callable[[Tensor], Any]:
        """What is called with images."""
        return getattr(self.scorer, "perceive", self.scorer)

    def scores(self, images: Tensor, num_classes: int) -> np.ndarray:
        """Scores of a batch, float64 [B, K].

        Raises:
            TypeError, ValueError: for another shape, NaN, +inf, and an image without any candidate.
        """
        found = self.function(images)
        found = getattr(found, "logits", found)
        if not isinstance(found, Tensor):
            raise TypeError(f"candidates must give a tensor of scores, got {type(found).__name__}")
        wanted = [len(images), num_classes]
        if list(found.shape) != wanted:
            raise ValueError(
                f"candidates must give scores {wanted}, one an image and class, "
                f"got {list(found.shape)}"
            )
        scores = found.detach().cpu().double().numpy()
        if np.isnan(scores).any() or np.isposinf(scores).any():
            raise ValueError("candidates must give scores below infinity, got NaN or infinity")
        if np.isneginf(scores).all(1).any():
            raise ValueError(
                "candidates must leave a class to each image, got scores of -inf for all of them"
            )
        return scores


def require_candidates(candidates: Any, num_classes: int) -> Candidates | None:
    """The candidates of a call, where a scorer alone was given too.

    Raises:
        TypeError, ValueError: for what is neither, and more candidates than classes.
    """
    if candidates is None:
        return None
    if not isinstance(candidates, Candidates):
        if not (callable(candidates) or hasattr(candidates, "perceive")):
            wanted = "a function of images, a GenRep or gf.Candidates"
            raise TypeError(f"candidates must be {wanted}, got {type(candidates).__name__}")
        candidates = Candidates(candidates)
    if candidates.keep is not None and candidates.keep > num_classes:
        raise ValueError(
            f"keep must be at most the {num_classes} classes, got {candidates.keep} candidates"
        )
    return candidates


@dataclasses.dataclass(frozen=True)
class BestScores:
    """The screen of candidates: the best scores of an image go on.

    Attributes:
        cut: which of them.
        miss: the chance that the winner is not among them.
    """

    cut: Cut
    miss: float

    def replay(self, calibration: Calibration, screened: Sequence[Screened]) -> list[Screened]:
        """What it would have made of each calibration image; nothing without their scores."""
        if calibration.scores is None:
            return list(screened)
        images = zip(calibration.scores, screened, strict=True)
        return [self.select(scores, before) for scores, before in images]

    def run(self, arrivals: Iterator[Arrival], *_: Any) -> Iterator[Arrival]:
        """Images with their candidates."""
        for arrival in arrivals:
            assert arrival.scores is not None
            before = arrival.screened or Screened.of_all(len(arrival.scores))
            yield arrival._replace(screened=self.select(arrival.scores, before))

    def most(self, reaching: int | None) -> int | None:
        """The most classes that pass it; None: all of them may."""
        return self.cut.most(reaching)

    def most_cost(self, reaching: int) -> float:
        """Evaluations' worth of an image: none."""
        return 0.0

    def select(self, scores: np.ndarray, screened: Screened) -> Screened:
        """Those of the live classes that go on, by the scores of all classes [K]."""
        of_live = scores[screened.live]
        return screened.keep(self.cut.staying(of_live), self.miss, of_live)


def best_scores(
    keep: int | None, scores: np.ndarray | None, winners: np.ndarray | None, error: float
) -> BestScores:
    """How many candidates go on.

    Args:
        keep: of the call, or None.
        scores: of the calibration images [N, K], or None.
        winners: of their full budgets, int64 [N], or None.
        error: the share of images whose winner may be missed.

    Raises:
        ValueError: where neither says how many.
    """
    if scores is not None and winners is not None:
        return BestScores(*calibrated_cut(scores, winners, error, keep))
    if keep is None:
        raise ValueError(
            "candidates: the calibration has no scores of them; call calibrate with "
            "candidates, or say how many go on: gf.Candidates(scorer, keep=...)"
        )
    return BestScores(Cut(keep), error)
