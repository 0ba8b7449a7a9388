"""What a user sees of a run: a live progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Names of classes and folders are no markup.
console = Console(markup=False, emoji=False)

_LINES_PER_STAGE = 10
# At least, where each part of it has one.
_LINES_PER_EVALUATION = 10
_SHOWN = ("generation", "perception", "cosine", "alpha")


def wall_clock(device: torch.device) -> float:
    """Seconds, read once the device has done all that it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Stopwatch:
    """Seconds spent in its ``with`` blocks.

    On a GPU those between events in its stream, so that nothing waits for it before they are read.

    Args:
        device: where the timed work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        # Those on a GPU that were not read yet.
        self._blocks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            self._start_event = self._event()
        else:
            self._start_time = wall_clock(self.device)

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            self._blocks.append((self._start_event, self._event()))
        else:
            self._seconds += wall_clock(self.device) - self._start_time

    @property
    def seconds(self) -> float:
        """Sum over all blocks; waits for the device where one of them may not be done."""
        for start, end in self._blocks:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._blocks.clear()
        return self._seconds

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._seconds = value
        self._blocks.clear()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class StageProgress:
    """Progress of one stage, from step `start` to step `end` of the run; a context manager."""

    def __init__(self, stage: str, start: int, end: int, length: int) -> None:
        self.stage = stage
        self.length = length
        self.first = end - length
        self.printed = 0
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(
            *columns,
            TextColumn("{task.fields[metrics]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(
            f"{stage:10}", total=length, completed=start - self.first, metrics=""
        )

    def __enter__(self) -> StageProgress:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def update(self, step: int, row: dict[str, float]) -> None:
        """Show the newest row of the history."""
        done = step - self.first
        metrics = "  ".join(f"{name} {row[name]:.3f}" for name in _SHOWN if name in row)
        self.progress.update(self.task, completed=done, metrics=metrics)
        every = max(self.length // _LINES_PER_STAGE, 1)
        due = done // every != self.printed // every or done == self.length
        if due and not console.is_terminal:
            console.print(f"{self.stage:10} {done:6d}/{self.length}  {metrics}")
        self.printed = done


@contextlib.contextmanager
def evaluation_progress() -> Iterator[Callable[[str, float], None]]:
    """A progress bar for `evaluate`.

    Yields:
        The function that `evaluate` calls with what it does and how far it is.
    """
    columns = (
        TextColumn("{task.description:35}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluation", total=1.0)
        said = ("", 0)

        def update(what: str, fraction: float) -> None:
            nonlocal said
            progress.update(task, description=what, completed=fraction)
            now = (what, int(fraction * _LINES_PER_EVALUATION))
            if not console.is_terminal and now != said:
                console.print(f"evaluation {fraction:4.0%}  {what}")
            said = now

        yield update


@contextlib.contextmanager
def reading_progress() -> Iterator[Callable[[int, int], None]]:
    """A progress line for `load_data`, on a terminal alone, once there is something to read.

    Yields:
        The function that `load_data` calls with the number of files that were read, and of all.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=None, visible=False)

        def update(done: int, total: int) -> None:
            # As often as one can see it.
            if done % 64 == 0 or done == total:
                read = f"reading {done:,} of {total:,} files"
                progress.update(task, description=read, completed=done, total=total, visible=True)

        yield update
