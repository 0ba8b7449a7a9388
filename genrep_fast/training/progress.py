"""What a user sees while a stage trains: a live progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()

_LINES_PER_STAGE = 10
_SHOWN = ("generation", "perception", "cosine", "alpha")


def wall_clock(device: torch.device) -> float:
    """Seconds, read once the device has done all that it was asked for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class StageProgress:
    """Progress of one stage, from step `start` to step `end` of the run; a context manager."""

    def __init__(self, stage: str, start: int, end: int, length: int):
        self.stage, self.length, self.first, self.printed = stage, length, end - length, 0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[metrics]}"), console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task(f"{stage:10}", total=length, completed=start - self.first, metrics="")

    def __enter__(self) -> StageProgress:
        self.progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self.progress.stop()

    def update(self, step: int, row: dict) -> None:
        """Show the newest row of the history."""
        done = step - self.first
        metrics = "  ".join(f"{name} {row[name]:.3f}" for name in _SHOWN if name in row)
        self.progress.update(self.task, completed=done, metrics=metrics)
        every = max(self.length // _LINES_PER_STAGE, 1)
        if not console.is_terminal and (done // every != self.printed // every or done == self.length):
            console.print(f"{self.stage:10} {done:6d}/{self.length}  {metrics}")
        self.printed = done


@contextlib.contextmanager
def evaluation_progress() -> Iterator[Callable[[str, float], None]]:
    """A progress bar for `evaluate`, as the function that it calls with what it does and how far it is."""
    columns = (
        TextColumn("{task.description:35}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluation", total=1.0)
        said = None

        def update(what: str, fraction: float) -> None:
            nonlocal said
            progress.update(task, description=what, completed=fraction)
            if not console.is_terminal and what != said:
                console.print(f"evaluation {fraction:4.0%}  {what}")
            said = what

        yield update
