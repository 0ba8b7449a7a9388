"""A label hierarchy: whole branches leave, judged by some of their classes.

Hierarchical Diffusion Classifier compares the branches of a tree from the root down. Inner nodes
have no label of their own here, so that a branch is judged by representatives: classes that lie at
the same places in each branch, which differ in as little else as the tree allows.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .calibration import Calibration
from .contest import KeepBest, Steps
from .engine import Arrival, Engines, Plan
from .members import Members
from .noise import ForwardNoise
from .screening import Screened, miss_rate, upper_quantile

if TYPE_CHECKING:
    from .funnel import Basis

# Nesting beyond it is a list that holds itself.
_DEEPEST = 64
# Sets of classes whose representatives a level keeps.
_REMEMBERED = 1024
# Settings among which the calibration chooses.
_REPRESENTATIVES = (1, 2, 4)
_STEPS = (1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Tree:
    """A hierarchy over all K classes.

    Attributes:
        leaves: the classes in the tree's order, K of them.
        levels: from the root down, the branch of each class in the tree's order; the last level at
            which a branch holds several classes is the last one.
    """

    leaves: tuple[int, ...]
    levels: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def parts(self) -> list[Level]:
        """Its levels, from the root down."""
        return [Level(self, number) for number in range(len(self.levels))]


def require_tree(tree: Any, num_classes: int) -> Tree | None:
    """The tree of nested dictionaries and lists, whose leaves are classes.

    Raises:
        TypeError, ValueError: for another kind of node, an empty branch, a class that is missing,
            named twice or out of range, and a tree without branches.
    """
    if tree is None:
        return None
    if isinstance(tree, str) or not isinstance(tree, Mapping | Sequence):
        wanted = "nested dictionaries or lists of classes"
        raise TypeError(f"tree must be {wanted}, got {type(tree).__name__}")
    paths: dict[int, tuple[int, ...]] = {}
    for path, label in _leaves(tree, ()):
        if not 0 <= label < num_classes:
            raise ValueError(
                f"tree must name classes from 0 to {num_classes - 1}, got {label} at {_named(path)}"
            )
        if label in paths:
            raise ValueError(f"tree must name each class once, got {label} again at {_named(path)}")
        paths[label] = tuple(place for place, _ in path)
    missing = sorted(set(range(num_classes)) - set(paths))
    if missing:
        shown = ", ".join(map(str, missing[:5]))
        more = "" if len(missing) <= 5 else f" and {len(missing) - 5} more"
        raise ValueError(f"tree must name all {num_classes} classes, it misses {shown}{more}")
    levels = []
    for depth in itertools.count(1):
        branches = [path[:depth] for path in paths.values()]
        numbers = {branch: number for number, branch in enumerate(dict.fromkeys(branches))}
        if len(numbers) == num_classes:
            break
        if len(numbers) > 1:
            levels.append(tuple(numbers[branch] for branch in branches))
    if not levels:
        raise ValueError("tree must have branches of several classes, got a list of classes alone")
    return Tree(tuple(paths), tuple(levels))


def _leaves(node: Any, path: tuple) -> Iterator[tuple[tuple, int]]:
    """The classes below a node, with the places and names of the nodes above them."""
    if isinstance(node, bool | str | bytes):
        raise TypeError(f"tree must name classes by their index, got {node!r} at {_named(path)}")
    if isinstance(node, int | np.integer):
        yield path, int(node)
        return
    if isinstance(node, Mapping):
        children = list(node.items())
    elif isinstance(node, Sequence):
        children = list(enumerate(node))
    else:
        wanted = "dictionaries, lists and class indices"
        raise TypeError(
            f"tree must be nested {wanted}, got {type(node).__name__} at {_named(path)}"
        )
    if not children:
        raise ValueError(f"tree must not have empty branches, got one at {_named(path)}")
    if len(path) == _DEEPEST:
        raise ValueError(f"tree must not nest more than {_DEEPEST} levels, got one that does")
    for place, (name, child) in enumerate(children):
        yield from _leaves(child, (*path, (place, name)))


def _named(path: tuple) -> str:
    """Where a node lies, for people."""
    return "tree" + "".join(f"[{name!r}]" for _, name in path)


@dataclasses.dataclass(frozen=True)
class Judgement:
    """How branches are compared.

    Attributes:
        representatives: classes of a branch.
        steps: at which they are evaluated, the first ones of the strategy's order.
        best: whether a branch is as good as the best of them, not their mean.
    """

    representatives: int
    steps: int
    best: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Branches:
    """The screen of a tree: branches leave that are worse than the best one by a margin.

    Attributes:
        tree: of the classes.
        noise, steps: of the full budget, with the order of its timesteps.
        offsets: of its errors [S, K], or None.
        members: of the classes.
        judgement: how branches are compared.
        margin: of mean weighted errors.
        miss: the chance that the winner's branch leaves at any level.
    """

    tree: Tree
    noise: ForwardNoise
    steps: Steps
    offsets: np.ndarray | None
    members: Members
    judgement: Judgement
    margin: float
    miss: float

    def most(self, reaching: int | None) -> None:
        """It is not known beforehand how many classes pass."""

    def most_cost(self, reaching: int) -> float:
        """Evaluations of an image that so many classes reach, where no branch leaves."""
        representatives = self.judgement.representatives
        compared = (min(level.branches * representatives, reaching) for level in self.tree.parts)
        return self.judgement.steps * sum(map(self.members.most_rows, compared))

    def replay(self, calibration: Calibration, screened: Sequence[Screened]) -> list[Screened]:
        """What it would have made of each calibration image."""
        rows = self.steps.order[: self.judgement.steps]
        found = []
        for errors, image in zip(calibration.adjusted_errors, screened, strict=True):
            for level in self.tree.parts:
                chosen = level.representatives(image.live, self.judgement.representatives)
                if chosen is not None:
                    image = self._pruned(level, image, chosen, errors[rows][:, chosen])
                    taken = self.members.rows(chosen) * len(rows)
                    evaluations = image.evaluations + taken
                    image = image._replace(evaluations=evaluations)
            found.append(image)
        return found

    def run(
        self, arrivals: Iterator[Arrival], engines: Engines, deadline: float | None
    ) -> Iterator[Arrival]:
        """Images without the branches that left, in any order."""
        for level in self.tree.parts:
            arrivals = self._run_level(level, arrivals, engines, deadline)
        return arrivals

    def _run_level(
        self,
        level: Level,
        arrivals: Iterator[Arrival],
        engines: Engines,
        deadline: float | None,
    ) -> Iterator[Arrival]:
        compared: dict[int, Screened] = {}
        passing: deque[Arrival] = deque()

        def entering() -> Iterator[Arrival]:
            for arrival in arrivals:
                image = arrival.screened or Screened.of_all(len(self.tree.leaves))
                chosen = level.representatives(image.live, self.judgement.representatives)
                if chosen is None:
                    passing.append(arrival)
                    continue
                compared[arrival.place] = image
                yield arrival._replace(screened=image._replace(live=chosen))

        looks = (self.judgement.steps,)
        steps = dataclasses.replace(self.steps, looks=looks)
        plan = Plan(self.noise, steps, KeepBest(), engines.budget, offsets=self.offsets)
        for contest in engines(plan).run(entering(), deadline):
            while passing:
                yield passing.popleft()
            image = compared.pop(contest.index)
            image = image._replace(evaluations=contest.evaluations)
            if len(contest) == self.judgement.steps:
                image = self._pruned(level, image, contest.live, contest.errors)
            yield Arrival(contest.index, contest.image_id, contest.image, contest.scores, image)
        yield from passing

    def _pruned(
        self, level: Level, image: Screened, chosen: np.ndarray, errors: np.ndarray
    ) -> Screened:
        """An image without the branches that leave at a level.

        Args:
            level: of the tree.
            image: before it.
            chosen: the representatives, ascending [R].
            errors: of theirs [steps, R].
        """
        weights = self.steps.ordered_weights[: len(errors)]
        scores = level.scores(chosen, weights, errors, self.judgement.best)
        stays = scores - scores.min() <= self.margin
        staying = stays[level.branch[image.live]]
        return image.keep(staying, self.miss / len(self.tree.parts))


class Level:
    """A level of a tree.

    Attributes:
        branch: of each class, int64 [K].
        branches: their number.
    """

    def __init__(self, tree: Tree, number: int) -> None:
        leaves = np.array(tree.leaves)
        branch = np.array(tree.levels[number])
        self.branches = int(branch.max()) + 1
        self.branch = np.empty(len(leaves), dtype=np.int64)
        self.branch[leaves] = branch
        # Of a class among the leaves.
        self._place = np.empty(len(leaves), dtype=np.int64)
        self._place[leaves] = np.arange(len(leaves))
        self._known: dict[tuple[bytes, int], np.ndarray | None] = {}

    def representatives(self, live: np.ndarray, number: int) -> np.ndarray | None:
        """Classes that stand for the branches of the live ones, ascending, int64 [R].

        The same places of each branch, evenly spread. None where one branch is left, or where each
        of them has one class left: the strategy compares these.
        """
        key = (live.tobytes(), number)
        if key not in self._known:
            # Most images have the same classes left; those of the others need not pile up.
            if len(self._known) == _REMEMBERED:
                self._known.clear()
            self._known[key] = self._chosen(live, number)
        return self._known[key]

    def _chosen(self, live: np.ndarray, number: int) -> np.ndarray | None:
        ordered = live[np.argsort(self._place[live])]
        _, starts, sizes = np.unique(self.branch[ordered], return_index=True, return_counts=True)
        if len(sizes) == 1 or sizes.max() == 1:
            return None
        chosen = []
        for start, size in zip(starts, sizes, strict=True):
            taken = min(number, size)
            places = ((np.arange(taken) + 0.5) * size / taken).astype(np.int64)
            chosen.append(ordered[start + places])
        return np.sort(np.concatenate(chosen))

    def scores(
        self, chosen: np.ndarray, weights: np.ndarray, errors: np.ndarray, best: bool
    ) -> np.ndarray:
        """Mean weighted error of each branch, infinity of those without representatives."""
        error = weights.dot(errors.astype(np.float64)) / weights.sum()
        branch = self.branch[chosen]
        if best:
            scores = np.full(self.branches, np.inf)
            np.minimum.at(scores, branch, error)
            return scores
        counts = np.bincount(branch, minlength=self.branches)
        total = np.bincount(branch, error, self.branches)
        return np.where(counts > 0, total / np.maximum(counts, 1), np.inf)


def calibrated_branches(
    tree: Tree, basis: Basis, screened: Sequence[Screened], error: float
) -> Branches | None:
    """The cheapest screen of a tree that misses the winner as seldom as `error`.

    None where all classes without it are cheaper.

    Args:
        tree: of the classes.
        basis: the full budget.
        screened: what precedes the tree, of each calibration image.
        error: the share of images whose winner may be missed.
    """
    winners = basis.winners
    offsets = basis.calibration.offsets_at(basis.calibration.timesteps)
    cheapest = None
    least = float(np.mean([_evaluations(image, basis) for image in screened]))
    most_steps = len(basis.steps.order)
    for number, taken, best in itertools.product(_REPRESENTATIVES, _STEPS, (False, True)):
        if taken > most_steps or (best and number == 1):
            continue
        judgement = Judgement(number, taken, best)
        screen = Branches(
            tree, basis.noise, basis.steps, offsets, basis.members, judgement, np.inf, error
        )
        screen = _with_margin(screen, basis, screened, error)
        passed = screen.replay(basis.calibration, screened)
        evaluations = float(np.mean([_evaluations(image, basis) for image in passed]))
        if evaluations < least:
            missed = [w not in image.live for w, image in zip(winners, passed, strict=True)]
            miss = miss_rate(np.array(missed), error)
            cheapest, least = dataclasses.replace(screen, miss=miss), evaluations
    return cheapest


def _evaluations(image: Screened, basis: Basis) -> float:
    """That an image takes up to its end, about."""
    return image.evaluations + basis.later * basis.members.rows(image.live)


def _with_margin(
    screen: Branches, basis: Basis, screened: Sequence[Screened], error: float
) -> Branches:
    """The screen with a margin that keeps the winner's branch at all levels in most images.

    How far that branch is behind is measured without pruning at the levels above, which can only
    bring it nearer to the best one that is left.
    """
    judgement = screen.judgement
    rows = screen.steps.order[: judgement.steps]
    weights = screen.steps.ordered_weights[: judgement.steps]
    behind, ahead = [], []
    images = zip(basis.calibration.adjusted_errors, screened, basis.winners, strict=True)
    for errors, image, winner in images:
        if winner not in image.live:
            continue
        gaps = [0.0]
        for level in screen.tree.parts:
            chosen = level.representatives(image.live, judgement.representatives)
            if chosen is not None:
                scores = level.scores(chosen, weights, errors[rows][:, chosen], judgement.best)
                gaps.append(scores[level.branch[winner]] - scores.min())
                ahead.append(np.diff(np.sort(scores)[:2])[0])
        behind.append(max(gaps))
    if not ahead:
        return screen
    unit = float(np.mean(ahead))
    margin = upper_quantile(np.array(behind), error, unit)
    return dataclasses.replace(screen, margin=margin)
