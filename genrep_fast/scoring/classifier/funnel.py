"""What a call asks to precede its strategy, and the screens that come of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from .calibration import Calibration, of_contests
from .candidates import Candidates, best_scores, require_candidates
from .coarse import MOST_STEPS, Coarse, best_coarse, measured_coarse, require_coarse
from .coarse_network import CoarseNetwork
from .contest import Contest, Steps
from .engine import Arrival, Engines, Plan
from .members import Members
from .noise import ForwardNoise
from .screening import Screened
from .tree import Tree, calibrated_branches, require_tree


class Screen(Protocol):
    """A screen that is ready to run."""

    def replay(self, calibration: Calibration, screened: Sequence[Screened]) -> list[Screened]:
        """What it would have made of each calibration image."""
        ...

    def run(
        self, arrivals: Iterator[Arrival], engines: Engines, deadline: float | None
    ) -> Iterator[Arrival]:
        """Images as they have passed it, in any order."""
        ...

    def most(self, reaching: int | None) -> int | None:
        """The most classes that pass it where so many reach it; None: all of them may."""
        ...

    def most_cost(self, reaching: int) -> float:
        """The most evaluations' worth of an image that so many classes reach."""
        ...


class Basis(NamedTuple):
    """The full budget that screens are calibrated for.

    Attributes:
        calibration: of it.
        noise, steps: its timesteps in the order of their signal, with the strategy's weights.
        winners: of the calibration images, int64 [N].
        later: steps that the strategy takes for a class that reaches it, about.
        members: of the K classes.
    """

    calibration: Calibration
    noise: ForwardNoise
    steps: Steps
    winners: np.ndarray
    later: float
    members: Members

    @property
    def num_classes(self) -> int:
        """K."""
        return self.calibration.errors.shape[2]


class Screens(NamedTuple):
    """The screens of a call in their order.

    Attributes:
        parts: each of them.
        screened: what they would have made of each calibration image.
        reaching: the most classes of an image that reach the strategy; None: all of them may.
        most_cost: evaluations' worth of an image before the strategy, at most.
        coarse_share: cost of a coarse evaluation, of a full one; 0 without a coarse pass.
    """

    parts: tuple[Screen, ...] = ()
    screened: Sequence[Screened] = ()
    reaching: int | None = None
    most_cost: float = 0.0
    coarse_share: float = 0.0

    def run(
        self, arrivals: Iterator[Arrival], engines: Engines, deadline: float | None
    ) -> Iterator[Arrival]:
        """Images as they have passed all of them."""
        for part in self.parts:
            arrivals = part.run(arrivals, engines, deadline)
        return arrivals

    def followed_by(self, screen: Screen | None, basis: Basis) -> Screens:
        """With one screen more, where there is one that pays."""
        if screen is None:
            return self
        reaching = basis.num_classes if self.reaching is None else self.reaching
        return self._replace(
            parts=(*self.parts, screen),
            screened=screen.replay(basis.calibration, self.screened),
            reaching=screen.most(self.reaching),
            most_cost=self.most_cost + screen.most_cost(reaching),
        )


@dataclasses.dataclass(frozen=True)
class Funnel:
    """What a call asks to precede its strategy, in this order.

    Attributes:
        num_classes: K.
        candidates, tree, coarse: or None.
    """

    num_classes: int
    candidates: Candidates | None = None
    tree: Tree | None = None
    coarse: Coarse | None = None

    @classmethod
    def of(
        cls, num_classes: int, candidates: Any = None, tree: Any = None, coarse: Any = None
    ) -> Funnel:
        """The funnel of a call's arguments.

        Raises:
            TypeError, ValueError: for arguments that do not fit.
        """
        return cls(
            num_classes,
            require_candidates(candidates, num_classes),
            require_tree(tree, num_classes),
            require_coarse(coarse, num_classes),
        )

    @property
    def key(self) -> tuple:
        """What `screens` depends on, besides the calibration."""
        keep = () if self.candidates is None else (self.candidates.keep,)
        return keep, self.tree, self.coarse

    @property
    def shares(self) -> int:
        """Screens that may miss the full budget's winner by calibration, not as they are told."""
        chosen = [part for part in (self.candidates, self.coarse) if part is not None]
        return sum(part.keep is None for part in chosen) + (self.tree is not None)

    @property
    def least(self) -> int:
        """Classes that reach the strategy at least, as far as that is known beforehand."""
        if self.tree is not None or (self.coarse is not None and self.coarse.keep is None):
            return 1
        keeps = [part.keep or 1 for part in (self.candidates, self.coarse) if part is not None]
        return min(keeps, default=self.num_classes)

    @property
    def scorer(self) -> Any:
        """Of the candidates, or None."""
        return None if self.candidates is None else self.candidates.scorer

    def scores(self, images: Tensor) -> Sequence[np.ndarray | None]:
        """Of the candidates, [K] each, or None."""
        if self.candidates is None:
            return [None] * len(images)
        return list(self.candidates.scores(images, self.num_classes))

    def calibration(
        self, plan: Plan, contests: list[Contest], labels: Tensor | None, engines: Engines
    ) -> Calibration:
        """That of images that ran through the full budget, with what the coarse pass makes of them.

        Args:
            plan: of the full budget.
            contests: of the images.
            labels: of the images by their `index`, or None.
            engines: for the coarse pass, where there is one.
        """
        calibration = of_contests(plan.noise, contests, plan.steps, labels)
        arrivals = [Arrival(part.index, part.image_id, part.image) for part in contests]
        return self.measured(calibration, plan.noise, arrivals, engines)

    def measured(
        self,
        calibration: Calibration,
        noise: ForwardNoise,
        arrivals: Sequence[Arrival],
        engines: Engines,
    ) -> Calibration:
        """A calibration with what the coarse pass makes of its images, where there is one."""
        if self.coarse is None:
            return calibration
        rows = calibration.order("signal")[:MOST_STEPS]
        network = CoarseNetwork(engines.network, self.coarse.factor)
        found = measured_coarse(network, noise, rows, arrivals, engines)
        return dataclasses.replace(calibration, coarse=found)

    def screens(self, basis: Basis | None, error: float) -> Screens:
        """The screens, which together may miss the full budget's winner in a share of images.

        Args:
            basis: or None without a calibration.
            error: the share of images.

        Raises:
            ValueError: where the calibration lacks what a screen needs.
        """
        if basis is None:
            return self._uncalibrated(error)
        error /= max(self.shares, 1)
        screens = Screens((), [Screened.of_all(self.num_classes)] * len(basis.winners))
        if self.candidates is not None:
            scores, keep = basis.calibration.scores, self.candidates.keep
            best = best_scores(keep, scores, basis.winners, error)
            screens = screens.followed_by(best, basis)
        if self.tree is not None:
            branches = calibrated_branches(self.tree, basis, screens.screened, error)
            screens = screens.followed_by(branches, basis)
        if self.coarse is not None:
            coarse = best_coarse(self.coarse, basis, screens.screened, error)
            screens = screens.followed_by(coarse, basis)
            if coarse is not None:
                screens = screens._replace(coarse_share=coarse.share)
        return screens

    def _uncalibrated(self, error: float) -> Screens:
        for name, part in (("tree", self.tree), ("coarse", self.coarse)):
            if part is not None:
                raise ValueError(f"{name} needs a calibration; call calibrate first")
        if self.candidates is None:
            return Screens()
        best = best_scores(self.candidates.keep, None, None, error)
        return Screens((best,), reaching=self.candidates.keep)
