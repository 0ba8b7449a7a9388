"""What a bank's chains are run with, and what no bank can have."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence

import torch

from ..checks import DTYPES, check_at_least, check_choice
from ..coefficients.transitions import check_sigma_floor


@dataclasses.dataclass(frozen=True)
class ChainSettings:
    """How a bank's chains are run, as in `ChainBank.build`.

    `clip_range` is the scheduler's, None where it does not clip.
    """

    chains: int
    burn_in: int
    thin: int
    center: str
    sigma_floor: float
    seed: int
    clip_range: float | None

    def check(self, steps: int) -> None:
        """Raise TypeError or ValueError where no chain of `steps` steps can run with them."""
        check_at_least(1, chains=self.chains, thin=self.thin)
        check_at_least(0, burn_in=self.burn_in, seed=self.seed)
        if self.burn_in >= steps:
            raise ValueError(
                f"burn_in must be less than num_inference_steps, {steps}, got {self.burn_in}: "
                "no step would be kept"
            )
        if self.seed >= 2**64:
            raise ValueError(f"seed must be less than 2**64, got {self.seed}")
        check_choice(self.center, "center", ("mean", "sample"))
        check_sigma_floor(self.sigma_floor)
        clip_range = self.clip_range
        if clip_range is None:
            return
        if isinstance(clip_range, bool) or not isinstance(clip_range, (int, float)):
            raise TypeError(f"clip_range must be a number or None, got {clip_range!r}")
        if not 0 < clip_range <= torch.finfo(torch.float32).max:
            raise ValueError(f"clip_range must be finite and positive, got {clip_range!r}")

    def of_python(self) -> ChainSettings:
        """The same in Python's own numbers, which JSON holds where it holds none of NumPy's."""
        return dataclasses.replace(
            self,
            chains=int(self.chains),
            burn_in=int(self.burn_in),
            thin=int(self.thin),
            sigma_floor=float(self.sigma_floor),
            seed=int(self.seed),
        )

    def check_drawn(self, drawn: int, num_classes: int) -> None:
        """Raise ValueError where `drawn` chains of every class need more than the 2³² chain ids."""
        generations = -(-drawn // self.chains)
        if generations * num_classes * self.chains > 2**32:
            raise ValueError(
                f"the chains drawn so far, {drawn} for each of {num_classes} classes, "
                "need more than 2**32 chain ids: build a new bank"
            )


def check_centers(dtype: torch.dtype, num_classes: int, sample_shape: Sequence[int]) -> None:
    """Raise TypeError or ValueError for centres that no bank has."""
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    check_at_least(1, num_classes=num_classes)
    if not isinstance(sample_shape, Sequence) or isinstance(sample_shape, str):
        wanted = "a sequence of integers, (C, *spatial)"
        raise TypeError(f"sample_shape must be {wanted}, got {type(sample_shape).__name__}")
    if not sample_shape:
        raise ValueError("sample_shape must be (C, *spatial), got ()")
    for size in sample_shape:
        is_integer = isinstance(size, numbers.Integral) and not isinstance(size, bool)
        if not is_integer or size <= 0:
            raise ValueError(f"sample_shape must hold positive integers, got {sample_shape}")


def check_bank_device(device: torch.device | str) -> None:
    """Raise ValueError for a device that is not there, or that holds no values."""
    try:
        torch.empty(0, device=device)
    # torch has errors of several types for this, AssertionError among them.
    except Exception as error:
        reason = " ".join(str(error).split())
        message = f"device must be one that this torch can use, got {device!r}: {reason}"
        raise ValueError(message) from error
    if torch.device(device).type == "meta":
        raise ValueError(f"device must hold values, got {device!r}")


def run_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the chains of a bank run in whose centres are kept in `dtype`: float32, or float64."""
    return torch.promote_types(dtype, torch.float32)
