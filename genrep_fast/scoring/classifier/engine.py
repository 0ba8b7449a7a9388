"""Runs images through a strategy: rows of many images, classes and steps fill each batch."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...coefficients.tables import StepCoefficients
from ...ops.scoring import log_likelihood
from .contest import Contest, Rule, Steps
from .members import Members, mean_errors, mean_outputs
from .network import Network
from .noise import ForwardNoise
from .screening import Screened

# Numbers of an output that its distances to others are measured by.
SKETCH = 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """A strategy that is ready to run.

    Attributes:
        noise: of its steps.
        steps, rule: which steps, and which classes leave.
        budget: evaluations an image, or None.
        sketch: numbers of an output that are kept until all rows up to the image's next look have
            been evaluated, for the distances to its leader; 0 where none are asked for.
        offsets: taken off the errors of each class at each row of the noise's tables, [S, K].
    """

    noise: ForwardNoise
    steps: Steps
    rule: Rule
    budget: int | None = None
    sketch: int = 0
    offsets: np.ndarray | None = None


class Arrival(NamedTuple):
    """An image that joins.

    Attributes:
        place: in the call.
        image_id: of its noise.
        image: [C, *spatial].
        scores: of the candidates, float64 [K], or None.
        screened: what precedes the strategy; None: every class is compared.
    """

    place: int
    image_id: int
    image: Tensor
    scores: np.ndarray | None = None
    screened: Screened | None = None


@dataclasses.dataclass(eq=False)
class _Stage:
    """The steps of an image up to its next look, whose rows wait for the network.

    A row is a step and a label; the labels are those of the live classes, `counts` of each, then
    of the null class.
    """

    contest: Contest
    steps: range
    labels: np.ndarray
    counts: np.ndarray
    errors: np.ndarray
    missing: int
    sketches: list[Tensor] = dataclasses.field(default_factory=list)


class _Segment(NamedTuple):
    """Rows start … stop − 1 of a stage."""

    stage: _Stage
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


class Engine:
    """Evaluates a plan.

    Args:
        network: in eval mode, see `Network.evaluating`.
        plan: what to evaluate.
        members: the labels of the K classes and of the null class.
        batch_size: rows of a batch, an evaluation each.
        pad_to: rows to which every batch is filled up, or None.
        seed: of the noise.
        share: cost of an evaluation, of a full one.
        after_batch: called with the full evaluations' worth of every batch, when what it finished
            has been given out.

    Attributes:
        batches, rows: that went through the network, padding not counted.
        late: whether the deadline is over; images that are given back since are cut off.
    """

    def __init__(
        self,
        network: Network,
        plan: Plan,
        members: Members,
        *,
        batch_size: int,
        pad_to: int | None,
        seed: int,
        share: float = 1.0,
        after_batch: Callable[[float], None] | None = None,
    ) -> None:
        self.batches = 0
        self.rows = 0
        self.late = False
        self._network = network
        self._plan = plan
        self._members = members
        self._batch_size = batch_size
        self._pad_to = pad_to
        self._seed = seed
        self._share = share
        self._after_batch = after_batch
        self._waiting: deque[_Segment] = deque()
        self._waiting_rows = 0
        self._in_flight: dict[int, Contest] = {}

    def run(self, arrivals: Iterator[Arrival], deadline: float | None = None) -> Iterator[Contest]:
        """Images as they finish, in any order.

        Args:
            arrivals: read one by one, when there is room in a batch.
            deadline: of `time.monotonic`; no batch begins after it. Images that are under way are
                then given back as they are, and no other is read.
        """
        arriving = True
        while True:
            self.late = _is_over(deadline)
            while arriving and not self.late and self._waiting_rows < self._batch_size:
                arrival = next(arrivals, None)
                # Waiting for it takes time, too.
                self.late = _is_over(deadline)
                arriving = arrival is not None
                if arrival is None:
                    break
                contest = self._contest(arrival)
                if self._affordable(contest):
                    self._join(contest)
                else:
                    yield contest
            if self.late or not self._waiting:
                yield from self._in_flight.values()
                return
            segments = self._take()
            contests = [stage.contest for stage in self._evaluate(segments)]
            self._drop_classes(contests)
            for contest in contests:
                if self._goes_on(contest):
                    self._join(contest)
                else:
                    del self._in_flight[contest.index]
                    yield contest
            if self._after_batch is not None:
                self._after_batch(self._share * sum(segment.rows for segment in segments))

    def _contest(self, arrival: Arrival) -> Contest:
        place, image_id, image, scores, screened = arrival
        return Contest(place, image_id, image, len(self._members.counts), scores, screened)

    def _join(self, contest: Contest) -> None:
        """Put the rows up to the next look in front of the queue."""
        steps, taken = self._plan.steps, len(contest)
        look = next(look for look in steps.looks if look > taken)
        labels, counts = self._members.labels_of(contest.live)
        end = taken + min(look - taken, self._affordable(contest))
        rows = (end - taken) * len(labels)
        errors = np.empty((end - taken, len(labels)))
        stage = _Stage(contest, range(taken, end), labels, counts, errors, rows)
        self._waiting.appendleft(_Segment(stage, 0, rows))
        self._waiting_rows += rows
        self._in_flight[contest.index] = contest

    def _drop_classes(self, contests: list[Contest]) -> None:
        """Let classes leave where it is time."""
        steps, rule = self._plan.steps, self._plan.rule
        looking = [contest for contest in contests if len(contest) in steps.looks]
        for contest, leaving in zip(looking, rule.leaving(looking, steps), strict=True):
            contest.drop(leaving, steps, rule)

    def _goes_on(self, contest: Contest) -> bool:
        """Whether another step follows."""
        plan = self._plan
        if plan.rule.ended(contest, plan.steps) or len(contest) == plan.steps.looks[-1]:
            return False
        return self._affordable(contest) > 0

    def _affordable(self, contest: Contest) -> int:
        """Steps that the budget still allows."""
        if self._plan.budget is None:
            return len(self._plan.steps.order)
        rows = self._members.rows(contest.live)
        return max(self._plan.budget - contest.evaluations, 0) // rows

    def _take(self) -> list[_Segment]:
        """The rows of the next batch."""
        taken: list[_Segment] = []
        room = self._batch_size
        while room and self._waiting:
            segment = self._waiting.popleft()
            if segment.rows > room:
                cut = segment.start + room
                self._waiting.appendleft(segment._replace(start=cut))
                segment = segment._replace(stop=cut)
            taken.append(segment)
            room -= segment.rows
        self._waiting_rows -= self._batch_size - room
        return taken

    def _evaluate(self, segments: list[_Segment]) -> list[_Stage]:
        """Run a batch through the network; the stages that it completes."""
        output, target = self._predict(segments)
        errors = squared_distance(output, target)
        sketches = None
        if self._plan.sketch:
            sketches = sketch(output[:, : target.shape[1]], self._plan.sketch)
        found = errors.cpu().double().numpy()
        if not np.isfinite(found).all():
            self._refuse_output(segments, int((~np.isfinite(found)).argmax()))
        rounding = torch.finfo(output.dtype).eps
        completed, first = [], 0
        for segment in segments:
            stage, last = segment.stage, first + segment.rows
            stage.errors.flat[segment.start : segment.stop] = found[first:last]
            if sketches is not None:
                stage.sketches.append(sketches[first:last])
            stage.missing -= segment.rows
            stage.contest.evaluations += segment.rows
            stage.contest.rounding = rounding
            if stage.missing == 0:
                completed.append(stage)
            first = last
        self.batches += 1
        self.rows += first
        for stage in completed:
            live = stage.contest.live
            of_class = mean_errors(stage.errors, stage.counts)
            errors_of_null = of_class[:, len(live) :].reshape(-1)
            of_live = of_class[:, : len(live)]
            if self._plan.offsets is not None:
                rows = self._plan.steps.order[list(stage.steps)]
                of_live = of_live - self._plan.offsets[np.ix_(rows, live)]
            stage.contest.add(of_live, errors_of_null, self._plan.steps)
        self._measure(completed)
        return completed

    def _predict(self, segments: list[_Segment]) -> tuple[Tensor, Tensor]:
        """Model output and training target of the batch's rows, both [N, ...]."""
        images: list[Tensor] = []
        ids: list[int] = []
        table_rows: list[int] = []
        places, labels = [], []
        order = self._plan.steps.order
        for stage, start, stop in segments:
            step, column = np.divmod(np.arange(start, stop), len(stage.labels))
            # The noisy inputs of a step are made once, for all of its classes.
            places.append(step - step[0] + len(images))
            labels.append(stage.labels[column])
            for number in range(step[0], step[-1] + 1):
                images.append(stage.contest.image)
                ids.append(stage.contest.image_id)
                table_rows.append(order[stage.steps[number]])
        device = images[0].device
        place, label, row, image_id = (
            torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)
            for values in (np.concatenate(places), np.concatenate(labels), table_rows, ids)
        )
        dtype = self._network.dtype(images[0])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        noise = self._plan.noise.to(device)
        x_t, target = noise.draw(torch.stack(images), row, image_id, self._seed, wide)
        count = len(place)
        if self._pad_to is not None:
            fill = self._pad_to - count
            place, label = (torch.cat([part, part[-1:].expand(fill)]) for part in (place, label))
        timesteps = noise.timesteps[row]
        output = self._network(x_t.to(dtype)[place], timesteps[place], label)
        if torch.float64 in (wide, output.dtype):
            output = output.to(wide)
        return output[:count], target[place[:count]]

    def _measure(self, completed: list[_Stage]) -> None:
        """Give every contest D to its leader."""
        if not self._plan.sketch or not completed:
            return
        leaders, counts, first = [], [], 0
        for stage in completed:
            columns = len(stage.counts)
            cells = np.arange(len(stage.steps) * columns)
            leaders.append(first + cells - cells % columns + stage.contest.leader)
            counts.append(np.tile(stage.counts, len(stage.steps)))
            first += len(cells)
        sketches = torch.cat([part for stage in completed for part in stage.sketches])
        sketches = mean_outputs(sketches, np.concatenate(counts))
        leader = torch.from_numpy(np.concatenate(leaders)).to(sketches.device)
        distances = squared_distance(sketches, sketches[leader])
        found = distances.clamp(min=0).cpu().double().numpy()
        first = 0
        for stage in completed:
            last = first + len(stage.steps) * len(stage.counts)
            of_stage = found[first:last].reshape(len(stage.steps), -1)
            stage.contest.add_distances(of_stage[:, : len(stage.contest.live)])
            first = last

    def _refuse_output(self, segments: list[_Segment], row: int) -> None:
        for stage, start, stop in segments:
            if row < stop - start:
                step, column = divmod(start + row, len(stage.labels))
                table_row = self._plan.steps.order[stage.steps[step]]
                timestep = self._plan.noise.timesteps[int(table_row)].item()
                place = int(np.repeat(np.arange(len(stage.counts)), stage.counts)[column])
                live = stage.contest.live
                name = f"class {live[place]}" if place < len(live) else "the null class"
                raise ValueError(
                    "denoiser must return finite outputs, got NaN or infinity for the image with "
                    f"id {stage.contest.image_id} under {name} at timestep {timestep}"
                )
            row -= stop - start


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline


@dataclasses.dataclass(frozen=True)
class Engines:
    """Makes engines of the same settings, see `Engine`.

    Attributes:
        budget: evaluations an image, or None; a plan without one may take it over.
    """

    network: Network
    members: Members
    batch_size: int
    pad_to: int | None
    seed: int
    budget: int | None = None
    after_batch: Callable[[float], None] | None = None

    def __call__(
        self,
        plan: Plan,
        network: Network | None = None,
        *,
        with_null: bool = False,
        share: float = 1.0,
    ) -> Engine:
        """An engine of a plan; `network` takes the place of the common one."""
        return Engine(
            network or self.network,
            plan,
            self.members if with_null else self.members.without_null(),
            batch_size=self.batch_size,
            pad_to=self.pad_to,
            seed=self.seed,
            share=share,
            after_batch=self.after_batch,
        )


def squared_distance(output: Tensor, target: Tensor) -> Tensor:
    """‖target − output‖² of each row, [N].

    Args:
        output: [N, C', *spatial]; channels beyond C are skipped.
        target: [N, C, *spatial], float32 or float64.
    """
    table = _difference_table(target.device, target.dtype)
    # One class and one step a row.
    scores = log_likelihood(
        target, output[:, None, None], table, target[:, None, None], reduction="mean"
    )
    return -scores[:, 0]


@functools.lru_cache(maxsize=16)
def _difference_table(device: torch.device, dtype: torch.dtype) -> StepCoefficients:
    """Of the residual target − output, without a normalisation."""
    with torch.inference_mode(False):
        zero, one = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
        table = StepCoefficients(data=zero, noisy=one, output=-one, inv_var=2 * one, log_norm=zero)
        return table.to(device)


def sketch(output: Tensor, size: int) -> Tensor:
    """Numbers whose squared distances are those of the outputs, [N, ≤ size] float32 or float64.

    The elements themselves where they are no more than `size`. Else sums, with random signs, of
    as many groups of elements: their squared distances have the right mean and a relative standard
    deviation of √(2 / size) at most.
    """
    flat = output.flatten(1)
    if flat.dtype != torch.float64:
        flat = flat.float()
    elements = flat.shape[1]
    if elements <= size:
        return flat
    # Of the number of elements alone: images are compared by the same groups in every batch.
    generator = torch.Generator().manual_seed(elements)
    order = torch.randperm(elements, generator=generator).to(flat.device)
    signs = torch.randint(0, 2, (elements,), generator=generator).to(flat) * 2 - 1
    groups = (torch.arange(elements) % size).to(flat.device)
    sums = flat.new_zeros(len(flat), size)
    return sums.index_add_(1, groups, flat[:, order] * signs)
