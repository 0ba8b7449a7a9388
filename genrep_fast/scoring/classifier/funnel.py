"""What a call asks to precede its strategy, and the screens that come of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from .calibration import Calibration
from .candidates import Candidates, best_scores, require_candidates
from .engine import Arrival, Engine, Plan
from .screening import Screened

# Makes an engine that runs a plan.
EngineOf = Callable[[Plan], Engine]


class Screen(Protocol):
    """A screen that is ready to run."""

    def replay(self, calibration: Calibration, screened: Sequence[Screened]) -> list[Screened]:
        """What it would have made of each calibration image."""
        ...

    def run(
        self, arrivals: Iterator[Arrival], engine: EngineOf, deadline: float | None
    ) -> Iterator[Arrival]:
        """Images as they have passed it, in any order."""
        ...

    def most(self, reaching: int) -> int | None:
        """The most classes that pass it where so many reach it; None: that is not known."""
        ...


class Screens(NamedTuple):
    """The screens of a call in their order.

    Attributes:
        parts: each of them.
        screened: what they would have made of each calibration image, or None without a
            calibration.
        reaching: the most classes of an image that reach the strategy; None: that is not known.
    """

    parts: tuple[Screen, ...] = ()
    screened: list[Screened] | None = None
    reaching: int | None = None

    def run(
        self, arrivals: Iterator[Arrival], engine: EngineOf, deadline: float | None
    ) -> Iterator[Arrival]:
        """Images as they have passed all of them."""
        for part in self.parts:
            arrivals = part.run(arrivals, engine, deadline)
        return arrivals


@dataclasses.dataclass(frozen=True)
class Funnel:
    """What a call asks to precede its strategy.

    Attributes:
        num_classes: K.
        candidates: or None.
    """

    num_classes: int
    candidates: Candidates | None = None

    @classmethod
    def of(cls, num_classes: int, candidates: Any = None) -> Funnel:
        """The funnel of a call's arguments.

        Raises:
            TypeError, ValueError: for arguments that do not fit.
        """
        return cls(num_classes, require_candidates(candidates, num_classes))

    @property
    def key(self) -> tuple:
        """What `screens` depends on, besides the calibration."""
        return (None if self.candidates is None else (self.candidates.keep,),)

    @property
    def shares(self) -> int:
        """Screens that may miss the full budget's winner by calibration, not as they are told."""
        return int(self.candidates is not None and self.candidates.keep is None)

    @property
    def least(self) -> int:
        """Classes that reach the strategy, as far as that is known without a calibration."""
        if self.candidates is None:
            return self.num_classes
        return self.candidates.keep or 1

    @property
    def scorer(self) -> Any:
        """Of the candidates, or None."""
        return None if self.candidates is None else self.candidates.scorer

    def scores(self, images: Tensor) -> Sequence[np.ndarray | None]:
        """Of the candidates, [K] each, or None."""
        if self.candidates is None:
            return [None] * len(images)
        return list(self.candidates.scores(images, self.num_classes))

    def screens(self, calibration: Calibration | None, weights: str, error: float) -> Screens:
        """The screens, each of which may miss the full budget's winner in a share of images.

        Args:
            calibration: or None.
            weights: of the full budget, as of the strategy.
            error: the share of images, of all calibrated screens together.

        Raises:
            ValueError: where the calibration lacks what a screen needs.
        """
        screened = None
        winners = None
        if calibration is not None:
            screened = [Screened.of_all(self.num_classes)] * len(calibration.errors)
            winners = calibration.full_winners(weights)
        error /= max(self.shares, 1)
        parts: list[Screen] = []
        reaching: int | None = self.num_classes
        if self.candidates is not None:
            scores = None if calibration is None else calibration.scores
            keep = self.candidates.keep
            parts.append(best_scores(keep, scores, winners, self.num_classes, error))
        for part in parts:
            if calibration is not None and screened is not None:
                screened = part.replay(calibration, screened)
            reaching = None if reaching is None else part.most(reaching)
        return Screens(tuple(parts), screened, reaching)
