"""How far the backward passes of a step are, and what stands in the way of the step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class Passes:
    """The passes of one step, loss by loss.

    Attributes:
        counts: for each loss, how many of its blocks have ended.
        collecting: the loss whose block is running; None between blocks.
        broken: whether gradients of a pass that raised have been added to others.
        dropped: whether something else than the step dropped what had been collected.
        averaged: whether the gradients are those of all processes, as a step that did not end made
            them.
    """

    def __init__(self, names: Sequence[str]):
        self._names = names
        self.collecting: int | None = None
        self.clear()

    def clear(self) -> None:
        """Begin a new step; a block that is running goes on."""
        self.counts = [0] * len(self._names)
        self.broken = False
        self.dropped = False
        self.averaged = False

    @property
    def empty(self) -> bool:
        """Whether nothing has been collected."""
        return not any(self.counts) and not self.broken

    def others_are_complete(self, loss: int) -> bool:
        """Whether all losses but `loss` have been collected."""
        return all(count for other, count in enumerate(self.counts) if other != loss)

    def check_losses(self, losses: Sequence[Tensor]) -> None:
        """Raise TypeError or ValueError unless there is a tensor of one element for each name."""
        if len(losses) != len(self._names):
            raise ValueError(
                f"losses must be one for each of {', '.join(self._names)}, got {len(losses)}"
            )
        for name, loss in zip(self._names, losses, strict=True):
            if not isinstance(loss, Tensor):
                raise TypeError(f"the loss {name} must be a tensor, got {type(loss).__name__}")
            if loss.numel() != 1:
                raise ValueError(
                    f"the loss {name} must have one element, got shape {tuple(loss.shape)}"
                )

    def check_outside(self, call: str) -> None:
        """Raise RuntimeError for a `call` inside a block."""
        if self.collecting is not None:
            block = f"the block that collects {self._names[self.collecting]!r}"
            why = f"{call} inside {block}, which takes .grad over when it ends"
            raise RuntimeError(f"{why}: call it behind the block")

    def check_whole(self) -> None:
        """Raise RuntimeError where gradients of a pass that raised are among the others."""
        if self.broken:
            raise RuntimeError(
                "a pass raised after others of this step: start the step over with zero_grad()"
            )
        if self.averaged:
            raise RuntimeError(
                "the step raised after it had averaged the gradients of all processes: "
                "start it over with zero_grad()"
            )

    def check_complete(self) -> None:
        """Raise RuntimeError where a loss has not been collected."""
        self.check_whole()
        counts = zip(self._names, self.counts, strict=True)
        missing = [name for name, count in counts if not count]
        if missing and self.dropped:
            raise RuntimeError(
                f"no gradients of {', '.join(missing)} to align: they were dropped after they had "
                "been collected, by zero_grad or whatever else emptied .grad"
            )
        if missing:
            raise RuntimeError(
                f"no gradients of {', '.join(missing)} to align: "
                "run its backward pass inside `with aligner.collect(name):`"
            )
