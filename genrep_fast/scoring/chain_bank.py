"""A bank of class chains: kept steps of reverse chains, run once and scored against many batches.

p(x|y) ≈ (1/S) Σ_s N(x; center[y, s], σ_s² I) over S = chains · kept steps (GenRep's class chains).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..coefficients.tables import StepCoefficients
from ..coefficients.transitions import (
    ReverseKernel,
    check_sigma_floor,
    learned_log_variance_ratio,
    learned_std_scale,
    normal_tables,
    reverse_kernel,
)
from ..dispatch.selection import select_implementation
from ..files import replacing
from ..ops.reverse_step import reverse_step
from ..ops.scoring import log_likelihood
from ..reference import scoring as reference
from ..reference.reverse_step import INITIAL_ROW, chain_noise

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]

# Residuals [b, k, S, D] that the reference, which writes them out, gets at once: 16 MiB in float64,
# and a handful of temporaries like it.
_REFERENCE_ELEMENTS = 2**21
_COEFFICIENTS = tuple(field.name for field in dataclasses.fields(StepCoefficients) if field.init)
_CENTER_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_TIMESTEP_DTYPES = (torch.int64, torch.int32, torch.float32, torch.float64)

# Of a file's metadata, which holds a dozen numbers.
_METADATA_CHARACTERS = 2**16


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


class ChainBank:
    """Kept steps of reverse chains of every class; made by `build` or `load`.

    Attributes:
        centers: [K, S, *sample_shape], chain by chain.
        std: [S] float32 (float64 for a float64 bank), the deviations that score, floor included.
        evaluations: samples that went through the network so far, once a step.
    """

    def __init__(
        self,
        centers: Tensor,
        timesteps: Tensor,
        kernel: ReverseKernel,
        coefficients: StepCoefficients,
        settings: ChainSettings,
        log_variance_ratio: Tensor | None = None,
        drawn: int = 0,
        evaluations: int = 0,
    ):
        self.centers = centers
        self.settings = settings
        self.evaluations = evaluations
        self._timesteps = timesteps
        self._kernel = kernel
        self._log_variance_ratio = log_variance_ratio
        self._drawn = drawn
        self._coefficients = coefficients.to(centers.device)
        self._kept = range(settings.burn_in, len(timesteps), settings.thin)
        std = kernel.score_std[list(self._kept)].clamp(min=float(settings.sigma_floor))
        self.std = std.repeat(settings.chains).to(centers.device, _run_dtype(centers.dtype))
        inv_var, log_norm = normal_tables(self.std.double())
        one = torch.ones_like(inv_var)
        scores = StepCoefficients(
            data=one, noisy=0 * one, output=-one, inv_var=inv_var, log_norm=log_norm
        )
        self._scores = {dtype: scores.to(dtype=dtype) for dtype in (torch.float32, torch.float64)}

    @classmethod
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
                ``scheduler.timesteps``, int64 [N] -> [N, C', *spatial] with C' ≥ C. Called without
                gradients; put a module in eval mode.
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
        dtype = torch.float32 if dtype is None else dtype
        _require_at_least(1, num_inference_steps=num_inference_steps, batch_size=batch_size)
        settings = ChainSettings(
            chains, burn_in, thin, center, sigma_floor, seed, _clip_range(scheduler)
        )
        _check_settings(settings, num_inference_steps)
        _check_centers(dtype, num_classes, tuple(sample_shape))
        _check_drawn(chains, settings, num_classes)
        scheduler = copy.deepcopy(scheduler)
        scheduler.set_timesteps(num_inference_steps)
        timesteps = scheduler.timesteps.cpu()
        kernel = reverse_kernel(scheduler, timesteps, variance=variance, eta=eta)
        # The mean is computed here, clipped or not, so that the step gets it ready made.
        as_mean = {
            "parameterization": "mean",
            "eta": eta,
            "sigma_floor": sigma_floor,
            "dtype": _run_dtype(dtype),
        }
        coefficients = StepCoefficients.chain(scheduler, timesteps, variance=variance, **as_mean)
        kept = range(burn_in, len(timesteps), thin)
        for row in kept:
            coefficients.require_scorable(row)
        log_variance_ratio = learned_log_variance_ratio(scheduler, timesteps)
        if log_variance_ratio is not None:
            # The learned standard deviation is a multiple of this one, which is zero nowhere but in
            # the step that adds no noise.
            coefficients = StepCoefficients.chain(
                scheduler, timesteps, variance="fixed_large", **as_mean
            )
        centers = torch.empty(
            num_classes, chains * len(kept), *sample_shape, dtype=dtype, device=device
        )
        bank = cls(centers, timesteps, kernel, coefficients, settings, log_variance_ratio)
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
        if not 1 <= chains <= self.settings.chains:
            raise ValueError(
                f"chains must be between 1 and the bank's {self.settings.chains}, got {chains}"
            )
        _require_at_least(1, batch_size=batch_size)
        _check_drawn(self._drawn + chains, self.settings, len(self.centers))
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
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, got {found}")
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
        # Where running and scoring have the same deviation it is one tensor, which safetensors
        # refuses to write twice.
        kernel = {name: table.clone() for name, table in self._kernel._asdict().items()}
        tensors = {"centers": self.centers, "timesteps": self._timesteps, **kernel}
        if self._log_variance_ratio is not None:
            tensors["log_variance_ratio"] = self._log_variance_ratio
        tensors |= {
            f"coefficients.{name}": getattr(self._coefficients, name) for name in _COEFFICIENTS
        }
        state = {
            "settings": dataclasses.asdict(self.settings),
            "drawn": self._drawn,
            "evaluations": self.evaluations,
        }
        with replacing(Path(path)) as unfinished:
            save_file(tensors, unfinished, metadata={"chain_bank": json.dumps(state)})

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
        _check_device(device)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise
        # What the reader raises depends on where a file is broken.
        except Exception as error:
            _refuse(path, error)
        try:
            parts = _parts_of_a_bank(metadata, tensors)
        except (TypeError, ValueError, RecursionError) as error:
            _refuse(path, error)
        centers, *rest = parts
        return cls(centers.to(device), *rest)

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
        self.evaluations += len(self.centers) * chains * len(self._timesteps)

    def _run(self, denoiser: Denoiser, labels: Tensor, chain_ids: Tensor) -> Tensor:
        """Kept centres [N, kept, *sample_shape] of N whole chains from pure noise."""
        shape = self.centers.shape[2:]
        noise = chain_noise(self.settings.seed, chain_ids, INITIAL_ROW, shape)
        x_t = noise.to(_run_dtype(self.centers.dtype))
        kept = []
        for row, timestep in enumerate(self._timesteps):
            output = denoiser(x_t, timestep.to(x_t.device).expand(len(x_t)), labels).to(x_t.dtype)
            prediction = output[:, : shape[0]]
            if prediction.shape != x_t.shape:
                wanted = f"{tuple(x_t.shape)} up to further channels"
                raise ValueError(f"denoiser must return {wanted}, got {tuple(output.shape)}")
            sample, mean = self._predict(row, x_t, prediction)
            if row in self._kept:
                center = mean if self.settings.center == "mean" else sample
                kept.append(center.to(self.centers.dtype))
            std_scale = None
            if self._log_variance_ratio is not None:
                std_scale = learned_std_scale(output, shape[0], self._log_variance_ratio[row])
            x_t, _ = reverse_step(
                x_t,
                mean,
                self._coefficients,
                row,
                seed=self.settings.seed,
                chain_ids=chain_ids,
                std_scale=std_scale,
            )
        return torch.stack(kept, 1)

    def _predict(self, row: int, x_t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The clean sample, clipped where the scheduler clips, and the mean of the step from it."""
        step = ReverseKernel(*(table[row] for table in self._kernel))
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
    selected = select_implementation("log_likelihood", x.device.type, float64=False)
    return selected is reference.log_likelihood


def _check_device(device: torch.device | str) -> None:
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


def _refuse(path: str | os.PathLike, error: Exception) -> NoReturn:
    """Raise ValueError with one line, of limited length, that says why `path` is no bank."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if len(reason) > 300:
        reason = f"{reason[:300]} …"
    raise ValueError(f"{path} is truncated or not a chain bank: {reason}") from error


def _parts_of_a_bank(metadata: dict[str, str], tensors: dict[str, Tensor]) -> tuple:
    """The arguments of `ChainBank` from a file's metadata and tensors.

    Raises:
        TypeError, ValueError: for what `ChainBank.save` cannot have written; the message names the
            field.
    """
    state = _read_state(metadata)
    names = ["centers", "timesteps", *ReverseKernel._fields]
    names += [f"coefficients.{name}" for name in _COEFFICIENTS]
    if "log_variance_ratio" in tensors:
        names.append("log_variance_ratio")
    _require_keys("tensors", tensors, names)
    settings = _read_settings(state["settings"])
    centers, timesteps = tensors["centers"], tensors["timesteps"]
    _check_timesteps(timesteps)
    steps = len(timesteps)
    _check_settings(settings, steps)
    if centers.ndim < 3:
        raise ValueError(f"centers must be [K, S, *sample_shape], got shape {tuple(centers.shape)}")
    num_classes, num_centers, *sample_shape = centers.shape
    try:
        _check_centers(centers.dtype, num_classes, tuple(sample_shape))
    except (TypeError, ValueError) as error:
        found = f"centers {centers.dtype} of shape {tuple(centers.shape)}"
        raise ValueError(f"{found}: {error}") from error
    kept = len(range(settings.burn_in, steps, settings.thin))
    if num_centers != settings.chains * kept:
        wanted = f"{settings.chains} chains of {kept} kept steps a class, as the settings say"
        raise ValueError(f"centers must hold {wanted}, got {num_centers} centres")
    kernel, tables, ratio = _read_tables(tensors, settings, steps)
    drawn, evaluations = state["drawn"], state["evaluations"]
    _check_counts(drawn, evaluations, settings, num_classes, steps)
    coefficients = StepCoefficients(**tables)
    return centers, timesteps, kernel, coefficients, settings, ratio, drawn, evaluations


def _read_state(metadata: dict[str, str]) -> dict[str, Any]:
    """The dictionary that `ChainBank.save` writes into the metadata, with its three keys."""
    if "chain_bank" not in metadata:
        raise ValueError("the metadata must hold chain_bank, got none")
    text = metadata["chain_bank"]
    if len(text) > _METADATA_CHARACTERS:
        most = f"at most {_METADATA_CHARACTERS} characters of metadata"
        raise ValueError(f"chain_bank must have {most}, got {len(text)}")

    def no_number(constant: str) -> NoReturn:
        raise ValueError(f"chain_bank must hold finite numbers, got {constant}")

    try:
        state = json.loads(text, parse_constant=no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"chain_bank must be JSON, got {text[:40]!r} ({error})") from error
    _require_keys("chain_bank", state, ["settings", "drawn", "evaluations"])
    return state


def _read_settings(settings: Any) -> ChainSettings:
    _require_keys("settings", settings, [field.name for field in dataclasses.fields(ChainSettings)])
    return ChainSettings(**settings)


def _read_tables(
    tensors: dict[str, Tensor], settings: ChainSettings, steps: int
) -> tuple[ReverseKernel, dict[str, Tensor], Tensor | None]:
    """The kernel, the coefficients by name and the log variance ratio, each checked."""
    kernel = ReverseKernel(**{name: tensors[name] for name in ReverseKernel._fields})
    tables = {name: tensors[f"coefficients.{name}"] for name in _COEFFICIENTS}
    ratio = tensors.get("log_variance_ratio")
    for name, table in kernel._asdict().items():
        _check_table(name, table, steps, torch.float64)
    dtype = _run_dtype(tensors["centers"].dtype)
    for name, table in tables.items():
        may_be_infinite = name in ("inv_var", "log_norm")
        _check_table(f"coefficients.{name}", table, steps, dtype, may_be_infinite)
    if ratio is not None:
        _check_table("log_variance_ratio", ratio, steps, torch.float64)
    _check_kernel(kernel, settings)
    _check_coefficients(tables, kernel, settings, ratio)
    return kernel, tables, ratio


def _check_counts(
    drawn: int, evaluations: int, settings: ChainSettings, num_classes: int, steps: int
) -> None:
    """Raise TypeError or ValueError for numbers that no bank with these settings has counted."""
    _require_at_least(0, drawn=drawn, evaluations=evaluations)
    if drawn < settings.chains:
        raise ValueError(
            f"drawn must be at least the number of chains, {settings.chains}, got {drawn}"
        )
    _check_drawn(drawn, settings, num_classes)
    expected = num_classes * drawn * steps
    if evaluations != expected:
        wanted = f"{expected}, of {drawn} chains a class that were drawn"
        raise ValueError(f"evaluations must be {wanted}, got {evaluations}")


def _require_keys(what: str, given: Any, names: Sequence[str]) -> None:
    if not isinstance(given, dict):
        raise TypeError(f"{what} must be a dictionary, got {type(given).__name__}")
    missing = [name for name in names if name not in given]
    surplus = [name for name in given if name not in names]
    if missing:
        raise ValueError(f"{what} must hold {', '.join(missing)}, got none")
    if surplus:
        found = ", ".join(map(repr, surplus))
        raise ValueError(f"{what} must hold nothing but a bank's, got {found}")


def _check_settings(settings: ChainSettings, steps: int) -> None:
    """Raise TypeError or ValueError for settings with which no chain of `steps` steps can run."""
    _require_at_least(1, chains=settings.chains, thin=settings.thin)
    _require_at_least(0, burn_in=settings.burn_in, seed=settings.seed)
    if settings.burn_in >= steps:
        raise ValueError(
            f"burn_in must be less than num_inference_steps, {steps}, got {settings.burn_in}: "
            "no step would be kept"
        )
    if settings.seed >= 2**64:
        raise ValueError(f"seed must be less than 2**64, got {settings.seed}")
    if settings.center not in ("mean", "sample"):
        raise ValueError(f'center must be "mean" or "sample", got {settings.center!r}')
    check_sigma_floor(settings.sigma_floor)
    clip_range = settings.clip_range
    if clip_range is None:
        return
    if isinstance(clip_range, bool) or not isinstance(clip_range, (int, float)):
        raise TypeError(f"clip_range must be a number or None, got {clip_range!r}")
    if not 0 < clip_range <= torch.finfo(torch.float32).max:
        raise ValueError(f"clip_range must be finite and positive, got {clip_range!r}")


def _check_centers(dtype: torch.dtype, num_classes: int, sample_shape: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError for centres that no bank has."""
    if dtype not in _CENTER_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    _require_at_least(1, num_classes=num_classes)
    if not sample_shape:
        raise ValueError("sample_shape must be (C, *spatial), got ()")
    if not all(isinstance(size, int) and size > 0 for size in sample_shape):
        raise ValueError(f"sample_shape must hold positive integers, got {sample_shape}")


def _check_drawn(drawn: int, settings: ChainSettings, num_classes: int) -> None:
    """Raise ValueError where `drawn` chains of every class need more than the 2³² chain ids."""
    generations = -(-drawn // settings.chains)
    if generations * num_classes * settings.chains > 2**32:
        raise ValueError(
            f"the chains drawn so far, {drawn} for each of {num_classes} classes, "
            "need more than 2**32 chain ids: build a new bank"
        )


def _check_timesteps(timesteps: Tensor) -> None:
    if timesteps.dtype not in _TIMESTEP_DTYPES or timesteps.ndim != 1:
        found = f"{timesteps.dtype} of shape {tuple(timesteps.shape)}"
        raise ValueError(f"timesteps must be numbers [steps], got {found}")
    if not (timesteps.isfinite() & (timesteps >= 0)).all():
        raise ValueError("timesteps must be finite and not negative")
    if (timesteps.diff() > 0).any():
        raise ValueError("timesteps must not increase")


def _check_table(
    name: str, table: Tensor, steps: int, dtype: torch.dtype, may_be_infinite: bool = False
) -> None:
    if table.dtype != dtype or table.shape != (steps,):
        found = f"{table.dtype} of shape {tuple(table.shape)}"
        raise ValueError(f"{name} must be {dtype} [{steps}], got {found}")
    valid = ~table.isnan() if may_be_infinite else table.isfinite()
    if not valid.all():
        raise ValueError(f"{name} must be finite, got {table[~valid][0].item()}")


def _check_kernel(kernel: ReverseKernel, settings: ChainSettings) -> None:
    """Raise ValueError for standard deviations that do not move or cannot score the chains."""
    if (kernel.score_std < 0).any():
        raise ValueError(f"score_std must not be negative, got {kernel.score_std.min().item()}")
    if not ((kernel.std == 0) | (kernel.std == kernel.score_std)).all():
        raise ValueError("std must be 0 or score_std at every step")
    kept = kernel.score_std[settings.burn_in :: settings.thin]
    kept = kept.clamp(min=float(settings.sigma_floor))
    inv_var, _ = normal_tables(kept)
    if inv_var.isinf().any():
        raise ValueError(
            "score_std of a kept step must be large enough to score, "
            f"got {kept.min().item()} with sigma_floor included"
        )


def _check_coefficients(
    tables: dict[str, Tensor],
    kernel: ReverseKernel,
    settings: ChainSettings,
    log_variance_ratio: Tensor | None,
) -> None:
    """Raise ValueError for tables that are not those of steps whose mean is given.

    See `StepCoefficients.chain`, parameterization="mean".
    """
    constants = {"data": 1, "noisy": 0, "output": -1, "mean_noisy": 0, "mean_output": 1}
    for name, value in constants.items():
        if (tables[name] != value).any():
            wanted = f"{value} at every step, the mean being given"
            raise ValueError(f"coefficients.{name} must be {wanted}")
    std, score_std, scored = tables["std"].double(), kernel.score_std, slice(None)
    rounding = 8 * torch.finfo(tables["std"].dtype).eps
    if log_variance_ratio is None:
        fits = tables["std"] == kernel.std.to(tables["std"].dtype)
    else:
        if (log_variance_ratio > 0).any():
            largest = log_variance_ratio.max().item()
            raise ValueError(f"log_variance_ratio must not be positive, got {largest}")
        # The larger of the two deviations between which the network chooses; the kernel has either
        # of them.
        smaller = std * (log_variance_ratio / 2).exp()
        fits = (kernel.std - std).abs() <= rounding * std
        fits |= (kernel.std - smaller).abs() <= rounding * smaller
        # The step that adds no noise has a scoring deviation that is kept nowhere else.
        score_std, scored = std, std > 0
    if not fits.all():
        raise ValueError(
            "coefficients.std must be the kernel's std at every step, "
            "or what log_variance_ratio makes of it"
        )
    expected = normal_tables(score_std.clamp(min=float(settings.sigma_floor)))
    for name, table in zip(("inv_var", "log_norm"), expected, strict=True):
        found = tables[name].double()[scored]
        if not torch.allclose(found, table[scored], rtol=rounding, atol=rounding):
            raise ValueError(
                f"coefficients.{name} must follow from score_std and sigma_floor at every step"
            )


def _clip_range(scheduler: Any) -> float | None:
    """Range to which the scheduler clips x̂0, None where it does not clip."""
    if scheduler.config.get("thresholding", False):
        raise ValueError(
            "scheduler has thresholding=True, which a bank cannot run: set thresholding=False"
        )
    if not scheduler.config.get("clip_sample", False):
        return None
    return scheduler.config.clip_sample_range


def _require_at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _run_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
