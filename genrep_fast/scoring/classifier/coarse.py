"""A coarse pass: classes are compared at lower resolution first, and the best ones go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...checks import check_at_least
from ...ops.posterior import fit_temperature
from .calibration import Calibration, CoarseErrors
from .coarse_network import CoarseNetwork
from .contest import KeepBest, Steps
from .engine import Arrival, Engines, Plan
from .members import Members
from .noise import ForwardNoise
from .screening import Cut, Screened, calibrated_cut

if TYPE_CHECKING:
    from .funnel import Basis

# Steps of a coarse pass at most; a calibration measures as many.
MOST_STEPS = 4


@dataclasses.dataclass(frozen=True)
class Coarse:
    """Classes are compared at lower resolution first, and the best ones go on.

    Args:
        factor: by which height and width shrink.
        steps: timesteps of the pass, 1 to 4; None: what the calibration finds cheapest.
        keep: classes of an image that go on; None: the calibration says how many, or how much
            worse than the best one, whichever are fewer.

    Raises:
        TypeError, ValueError: for arguments that do not fit.
    """

    factor: int = 2
    steps: int | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        check_at_least(2, factor=self.factor)
        if self.steps is not None:
            check_at_least(1, steps=self.steps)
            if self.steps > MOST_STEPS:
                raise ValueError(
                    f"steps of a coarse pass must be at most {MOST_STEPS}, got {self.steps}"
                )
        if self.keep is not None:
            check_at_least(1, keep=self.keep)


def require_coarse(coarse: Any, num_classes: int) -> Coarse | None:
    """The coarse pass of a call; True stands for the defaults.

    Raises:
        TypeError, ValueError: for another value, and for more classes than there are.
    """
    if coarse is None or coarse is False:
        return None
    if coarse is True:
        return Coarse()
    if not isinstance(coarse, Coarse):
        raise TypeError(f"coarse must be True or gf.Coarse, got {coarse!r}")
    if coarse.keep is not None and coarse.keep > num_classes:
        raise ValueError(f"keep must be at most the {num_classes} classes, got {coarse.keep}")
    return coarse


def measured_coarse(
    network: CoarseNetwork,
    noise: ForwardNoise,
    rows: np.ndarray,
    arrivals: Sequence[Arrival],
    engines: Engines,
) -> CoarseErrors:
    """Errors of calibration images under every class at lower resolution.

    Args:
        network: at lower resolution.
        noise: of the full budget.
        rows: of its steps, those that are measured.
        arrivals: the images, by their place.
        engines: makes one.
    """
    share = network.share(engines.network, arrivals[0].image, noise.timesteps[0])
    plan = _coarse_plan(noise, np.asarray(rows), len(rows))
    shrunk = (arrival._replace(image=network.image(arrival.image)) for arrival in arrivals)
    contests = sorted(engines(plan, network).run(shrunk), key=lambda contest: contest.index)
    errors = np.stack([contest.errors for contest in contests]).astype(np.float32)
    return CoarseErrors(errors, np.asarray(rows, dtype=np.int64), network.factor, share)


def _coarse_plan(noise: ForwardNoise, rows: np.ndarray, steps: int) -> Plan:
    return Plan(noise, Steps(rows, np.ones(len(noise)), (steps,)), KeepBest())


@dataclasses.dataclass(frozen=True, eq=False)
class BestCoarse:
    """The screen of a coarse pass: the classes of least error at lower resolution go on.

    Attributes:
        noise: of the full budget.
        rows: of its steps, those of the pass.
        factor: by which height and width shrink.
        share: cost of a coarse evaluation, of a full one.
        cut: which classes go on, by minus their mean errors.
        miss: the chance that the winner is not among them.
        temperature: of the mean coarse errors.
        members: of the classes.
    """

    noise: ForwardNoise
    rows: np.ndarray
    factor: int
    share: float
    cut: Cut
    miss: float
    temperature: float
    members: Members

    def most(self, reaching: int | None) -> int | None:
        """The most classes that pass it; None: all of them may."""
        return self.cut.most(reaching)

    def most_cost(self, reaching: int) -> float:
        """Evaluations' worth of an image that so many classes reach."""
        return self.share * self.members.most_rows(reaching) * len(self.rows)

    def replay(self, calibration: Calibration, screened: Sequence[Screened]) -> list[Screened]:
        """What it would have made of each calibration image."""
        assert calibration.coarse is not None
        found = []
        for errors, image in zip(calibration.coarse.errors, screened, strict=True):
            if self.cut.decides(len(image.live)):
                taken = errors[: len(self.rows), image.live]
                image = self._pruned(image, taken, len(taken) * self.members.rows(image.live))
            found.append(image)
        return found

    def run(
        self, arrivals: Iterator[Arrival], engines: Engines, deadline: float | None
    ) -> Iterator[Arrival]:
        """Images with the classes that go on, in any order."""
        network = CoarseNetwork(engines.network, self.factor)
        originals: dict[int, Arrival] = {}
        passing: list[Arrival] = []

        def entering() -> Iterator[Arrival]:
            for arrival in arrivals:
                before = arrival.screened
                if before is not None and not self.cut.decides(len(before.live)):
                    passing.append(arrival)
                    continue
                originals[arrival.place] = arrival
                yield arrival._replace(image=network.image(arrival.image))

        plan = _coarse_plan(self.noise, self.rows, len(self.rows))
        engine = engines(plan, network, share=self.share)
        for contest in engine.run(entering(), deadline):
            while passing:
                yield passing.pop()
            original, image = originals.pop(contest.index), contest.screened
            if len(contest) == len(self.rows):
                taken = contest.evaluations - image.evaluations
                image = self._pruned(image, contest.errors, taken)
            yield original._replace(screened=image)
        yield from passing

    def _pruned(self, image: Screened, errors: np.ndarray, evaluations: int) -> Screened:
        """An image with the best classes by their errors [steps, R]."""
        scores = -errors.astype(np.float64).mean(0)
        image = image.keep(self.cut.staying(scores), self.miss, scores / self.temperature)
        return image._replace(coarse_evaluations=image.coarse_evaluations + evaluations)


def best_coarse(
    coarse: Coarse, basis: Basis, screened: Sequence[Screened], error: float
) -> BestCoarse | None:
    """The cheapest coarse pass that misses the winner as seldom as `error`.

    None where all classes without it are cheaper.

    Args:
        coarse: what the call asks for.
        basis: the full budget.
        screened: what precedes the pass, of each calibration image.
        error: the share of images whose winner may be missed.

    Raises:
        ValueError: where the calibration has no coarse errors of this factor, or of too few steps.
    """
    known, winners, later = basis.calibration.coarse, basis.winners, basis.later
    members = basis.members
    if known is None or known.factor != coarse.factor:
        raise ValueError(
            f"coarse: the calibration has no errors at 1/{coarse.factor} of the resolution; "
            f"call calibrate with coarse=gf.Coarse({coarse.factor})"
        )
    measured = known.errors.shape[1]
    if coarse.steps is not None and coarse.steps > measured:
        raise ValueError(
            f"steps of the coarse pass must be at most the {measured} of the calibration, "
            f"got {coarse.steps}"
        )
    reaching = np.array([members.rows(image.live) for image in screened])
    told = np.array([w in image.live for w, image in zip(winners, screened, strict=True)])
    cheapest, least = None, later * float(reaching.mean())
    if coarse.keep is not None:
        least = np.inf
    if not told.any():
        # The calibration says nothing of what is left.
        return None
    for steps in range(1, measured + 1):
        if coarse.steps not in (None, steps):
            continue
        mean_errors = known.errors[:, :steps].astype(np.float64).mean(1)
        scores = np.full(mean_errors.shape, -np.inf)
        for image, row, errors in zip(screened, scores, mean_errors, strict=True):
            row[image.live] = -errors[image.live]
        scores = scores[told]
        cut, miss = calibrated_cut(scores, winners[told], error, coarse.keep)
        passed = np.array([members.rows(np.flatnonzero(cut.staying(row))) for row in scores])
        worth = known.share * steps * reaching[told] + later * passed
        if worth.mean() < least:
            least = float(worth.mean())
            temperature = fit_temperature(torch.from_numpy(scores), torch.from_numpy(winners[told]))
            rows = known.rows[:steps]
            cheapest = BestCoarse(
                basis.noise, rows, known.factor, known.share, cut, miss, temperature, members
            )
    return cheapest
