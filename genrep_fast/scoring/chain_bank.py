"""A bank of class chains: kept steps of reverse chains, run once and scored against many batches.

p(x|y) ≈ (1/S) Σ_s N(x; center[y, s], σ_s² I) over S = chains · kept steps (GenRep's class chains).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_at_least, check_floating, check_integer
from ..coefficients.tables import StepCoefficients
from ..coefficients.transitions import ReverseTransition, normal_tables, reverse_transition
from ..dispatch.operators import in_function_transform
from ..dispatch.selection import select_implementation
from ..ops.scoring import log_likelihood
from ..reference import scoring as reference
from .chain_bank_file import BankContents, read_bank, write_bank
from .chain_settings import ChainSettings, check_bank_device, check_centers, run_dtype
from .chains import (
    Denoiser,
    Prediction,
    ReverseChain,
    check_denoiser,
    inference_scheduler,
    initial_noise,
    network_output,
)

# Residuals [b, k, S, D] that the reference, which writes them out, gets at once: 16 MiB in float64,
# and a handful of temporaries like it.
_REFERENCE_ELEMENTS = 2**21


class ChainBank:
    """Kept steps of reverse chains of every class; made by `build` or `load`.

    Attributes:
        centers: [K, S, *sample_shape], chain by chain.
        std: [S] float32 (float64 for a float64 bank), the deviations that score, floor included.
        evaluations: samples that went through the network so far, once a step.
    """

    # What it keeps is for training as well, wherever it is made.
    @torch.inference_mode(False)
    def __init__(
        self,
        centers: Tensor,
        chain: ReverseChain,
        transition: ReverseTransition,
        settings: ChainSettings,
        drawn: int = 0,
        evaluations: int = 0,
    ) -> None:
        self.centers = centers
        self.settings = settings
        self.evaluations = evaluations
        self._chain = chain.to(centers.device)
        self._transition = transition
        self._drawn = drawn
        self._kept = range(settings.burn_in, len(chain), settings.thin)
        std = transition.score_std[list(self._kept)].clamp(min=float(settings.sigma_floor))
        self.std = std.repeat(settings.chains).to(centers.device, run_dtype(centers.dtype))
        inv_var, log_norm = normal_tables(self.std.double())
        one = torch.ones_like(inv_var)
        scores = StepCoefficients(
            data=one, noisy=0 * one, output=-one, inv_var=inv_var, log_norm=log_norm
        )
        self._scores = {dtype: scores.to(dtype=dtype) for dtype in (torch.float32, torch.float64)}

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        denoiser: Denoiser,
        scheduler: Any,
        num_classes: int,
        sample_shape: Sequence[int],
        *,
        num_inference_steps: int,
        chains: int = 32,
        burn_in: int = 50,
        thin: int = 2,
        center: str = "mean",
        sigma_floor: float = 0.0,
        seed: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        variance: str | None = None,
        eta: float = 0.0,
        batch_size: int = 512,
    ) -> ChainBank:
        """Run `chains` reverse chains a class; keep every `thin`-th step after the first `burn_in`.

        A chain starts from pure noise.
        The paper (GenRep, ICLR 2026) runs one chain of 200 or 250 DDPM steps with the other
        defaults. The bank holds K · chains · ⌈(num_inference_steps − burn_in) / thin⌉ samples.

        Args:
            denoiser: ``denoiser(x_t, timesteps, labels) -> model output``: [N, C, *spatial]
                (float64 for a float64 bank, else float32), [N] of the dtype of
                ``scheduler.timesteps``, int64 [N] -> [N, C', *spatial] with C' ≥ C, an output of
                diffusers' models with that as its ``sample``, or a tuple that begins with it.
                Called without gradients; put a module in eval mode.
            scheduler: diffusers' DDPMScheduler, DDIMScheduler or FlowMatchEulerDiscreteScheduler; a
                copy of it is set to `num_inference_steps`. One with ``clip_sample=True`` runs
                clipped; one with ``variance_type="learned_range"`` runs with the variances that the
                network gives and scores with `variance`.
            num_classes: K.
            sample_shape: (C, *spatial) of one sample.
            num_inference_steps: of a chain.
            chains: a class, each with noise of its own.
            burn_in, thin: steps dropped at the beginning of a chain, and the distance of those
                kept.
            center: what is kept of a step, its "mean" or the predicted clean "sample".
            sigma_floor, variance, eta: as in `StepCoefficients.chain`.
            seed: in [0, 2⁶⁴); chain c of class y draws its noise with the chain id y·chains + c.
            dtype, device: of the kept centres; None is float32.
            batch_size: chains that go through the network together.

        Raises:
            TypeError, ValueError: for arguments out of range, settings that keep no step, a kept
                step that cannot be scored, and as `StepCoefficients.chain`; before the network is
                called.
        """
        check_denoiser(denoiser)
        dtype = torch.float32 if dtype is None else dtype
        check_at_least(1, num_inference_steps=num_inference_steps, batch_size=batch_size)
        settings = ChainSettings(
            chains, burn_in, thin, center, sigma_floor, seed, _clip_range(scheduler)
        )
        settings.check(num_inference_steps)
        settings = settings.of_python()
        chains = settings.chains
        check_centers(dtype, num_classes, sample_shape)
        check_bank_device(device)
        settings.check_drawn(chains, num_classes)
        scheduler = inference_scheduler(scheduler, num_inference_steps)
        timesteps = scheduler.timesteps.cpu()
        transition = reverse_transition(scheduler, timesteps, variance=variance, eta=eta)
        # The mean is computed here, clipped or not, so that the step gets it ready made.
        as_mean: dict[str, Any] = {
            "parameterization": "mean",
            "eta": eta,
            "sigma_floor": sigma_floor,
            "dtype": run_dtype(dtype),
        }
        scored = StepCoefficients.chain(scheduler, timesteps, variance=variance, **as_mean)
        kept = range(burn_in, len(timesteps), thin)
        for row in kept:
            scored.require_scorable(row)
        chain = ReverseChain.from_scheduler(scheduler, timesteps, variance=variance, **as_mean)
        sizes = (num_classes, chains * len(kept), *sample_shape)
        with torch.inference_mode(False):
            centers = torch.empty(sizes, dtype=dtype, device=device)
        bank = cls(centers, chain, transition, settings)
        bank._replace(bank._draw(denoiser, chains, batch_size), chains)
        return bank

    @torch.no_grad()
    def refresh(self, denoiser: Denoiser, *, chains: int = 1, batch_size: int = 512) -> None:
        """Replace the oldest `chains` chains of every class by new ones, in turn.

        Each new chain has noise of its own. A bank that was saved and loaded continues with the
        same noise as one that was not.

        Args:
            denoiser, batch_size: as in `build`.
            chains: from 1 to the bank's number of chains.

        Raises:
            TypeError, ValueError: for a number out of range, a bank whose 2³² chain ids are used
                up, or a denoiser whose output does not fit; the bank is unchanged then.
        """
        check_integer(chains, "chains")
        chains = int(chains)
        if not 1 <= chains <= self.settings.chains:
            raise ValueError(
                f"chains must be between 1 and the bank's {self.settings.chains}, got {chains}"
            )
        check_at_least(1, batch_size=batch_size)
        check_denoiser(denoiser)
        self.settings.check_drawn(self._drawn + chains, len(self.centers))
        # All of them before the first is written: a network that fails leaves the bank as it is.
        self._replace(list(self._draw(denoiser, chains, batch_size)), chains)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """Log of the mixture of every class's centres, log (1/S) Σ_s N(x; center, σ_s² I), in nats.

        Differentiable in x.

        Args:
            x: [B, *sample_shape], floating point, on the bank's device.

        Returns:
            [B, K] float32 (float64 where x or the bank is). A kernel reads the bank as it is kept;
            the reference, which computes in float64, gets an image and a class at a time where they
            are large.

        Raises:
            TypeError, ValueError: for a wrong dtype, shape or device.
        """
        check_floating(x, "x")
        if x.ndim == 0 or x.shape[1:] != self.centers.shape[2:]:
            sizes = ", ".join(map(str, self.centers.shape[2:]))
            raise ValueError(f"x must be [B, {sizes}], got {tuple(x.shape)}")
        if x.device != self.centers.device:
            raise ValueError(
                f"x must be on the bank's device {self.centers.device}, got {x.device}"
            )
        if reference.accumulation_dtype(x, self.centers) == torch.float64:
            x = x.double()
        if _runs_on_the_reference(x):
            return self._log_likelihood_in_parts(x)
        return log_likelihood(x, self.centers, self._scores[torch.float32])

    def save(self, path: str | os.PathLike) -> None:
        """Write the bank to one safetensors file.

        A file that was there is replaced as a whole or not at all.
        """
        contents = BankContents(
            self.centers,
            self._chain,
            self._transition,
            self.settings,
            self._drawn,
            self.evaluations,
        )
        write_bank(path, contents)

    @classmethod
    def load(cls, path: str | os.PathLike, device: torch.device | str = "cpu") -> ChainBank:
        """Read a bank that `save` wrote, bit by bit, onto `device`.

        On the CPU its centres stay in the file, mapped into memory. Nothing in the file is trusted:
        settings and tensors are checked against each other before anything is allocated. The
        centres' values are not, as a chain that diverged holds infinities or NaN in its own class,
        and the bank that was saved works with them.

        Raises:
            FileNotFoundError: where there is no such file.
            ValueError: where it is truncated or not a chain bank; the message names what does not
                fit. Also for a device that is not there.
        """
        return cls(*read_bank(path, device))

    def _log_likelihood_in_parts(self, x: Tensor) -> Tensor:
        """`log_likelihood`, from `_REFERENCE_ELEMENTS` residuals of images and classes at once."""
        dtype, elements = reference.accumulation_dtype(x), max(self.centers[0].numel(), 1)
        classes = min(max(_REFERENCE_ELEMENTS // elements, 1), len(self.centers))
        images = max(_REFERENCE_ELEMENTS // (elements * classes), 1)

        def score(part: Tensor, centers: Tensor) -> Tensor:
            if dtype == torch.float64:
                centers = centers.to(dtype)
            return log_likelihood(part, centers, self._scores[dtype])

        rows = []
        for part in x.split(images):
            scores = [score(part, group) for group in self.centers.split(classes)]
            rows.append(torch.cat(scores, 1))
        return torch.cat(rows)

    def _draw(
        self, denoiser: Denoiser, chains: int, batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The next `chains` chains of every class, a batch at a time.

        Yields:
            Their labels [N], their places among the class's chains [N] and centres [N, kept, ...].
        """
        device, num_classes = self.centers.device, len(self.centers)
        # Counts every chain of a class ever drawn.
        number = torch.arange(self._drawn, self._drawn + chains, device=device)
        slots, generation = number % self.settings.chains, number // self.settings.chains
        labels = torch.arange(num_classes, device=device)[:, None]  # [K, 1]
        # No id is used twice.
        family = generation * num_classes + labels
        chain_ids = family * self.settings.chains + slots  # [K, chains]
        rows = (
            tensor.expand_as(chain_ids).flatten().split(batch_size)
            for tensor in (labels, slots, chain_ids)
        )
        for batch_labels, batch_slots, batch_ids in zip(*rows, strict=True):
            yield batch_labels, batch_slots, self._run(denoiser, batch_labels, batch_ids)

    def _replace(self, drawn: Iterable[tuple[Tensor, Tensor, Tensor]], chains: int) -> None:
        # A view, [K, chains, kept, *sample_shape].
        by_chain = self.centers.unflatten(1, (self.settings.chains, -1))
        for labels, slots, centers in drawn:
            by_chain[labels, slots] = centers
        self._drawn += chains
        self.evaluations += len(self.centers) * chains * len(self._chain)

    def _run(self, denoiser: Denoiser, labels: Tensor, chain_ids: Tensor) -> Tensor:
        """Kept centres [N, kept, *sample_shape] of N whole chains from pure noise."""
        shape, settings = self.centers.shape[2:], self.settings
        kept = []

        def predict(row: int, timestep: Tensor, x_t: Tensor) -> Prediction:
            timesteps = timestep.to(x_t.device).expand(len(x_t))
            output = network_output(denoiser, x_t, timesteps, labels).to(x_t.dtype)
            sample, mean = self._sample_and_mean(row, x_t, output[:, : shape[0]])
            if row in self._kept:
                center = mean if settings.center == "mean" else sample
                kept.append(center.to(self.centers.dtype))
            return Prediction(output, mean)

        start = initial_noise(settings.seed, chain_ids, shape).to(run_dtype(self.centers.dtype))
        self._chain.run(start, predict, seed=settings.seed, chain_ids=chain_ids)
        return torch.stack(kept, 1)

    def _sample_and_mean(self, row: int, x_t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The clean sample, clipped where the scheduler clips, and the mean of the step from it."""
        step = ReverseTransition(*(table[row] for table in self._transition))
        sample = step.sample_noisy * x_t + step.sample_output * output
        if self.settings.clip_range is not None:
            limit = float(self.settings.clip_range)
            sample = sample.clamp(-limit, limit)
        return sample, step.mean_sample * sample + step.mean_noisy * x_t + step.mean_output * output


def _runs_on_the_reference(x: Tensor) -> bool:
    """Whether the reference scores x, and no kernel.

    The reference writes out the residual of every image, class and step.
    """
    if x.dtype == torch.float64 or torch.compiler.is_compiling():
        return x.dtype == torch.float64
    if in_function_transform():
        return True
    selected = select_implementation("log_likelihood", x.device.type, float64=False)
    return selected is reference.log_likelihood


def _clip_range(scheduler: Any) -> float | None:
    """Range to which the scheduler clips x̂0, None where it does not clip."""
    if not hasattr(scheduler, "config"):
        raise TypeError(f"scheduler must be one of diffusers, got {type(scheduler).__name__}")
    if scheduler.config.get("thresholding", False):
        raise ValueError(
            "scheduler has thresholding=True, which a bank cannot run: set thresholding=False"
        )
    if not scheduler.config.get("clip_sample", False):
        return None
    return scheduler.config.clip_sample_range
