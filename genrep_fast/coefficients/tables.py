"""Step coefficients: five tables that turn a denoiser's raw output into a log-likelihood.

They are read once from a diffusers scheduler. For a scored step s the residual is r = data·x +
noisy·x_s + output·o and its log-likelihood Σ(−½·inv_var·r² + log_norm). Everything is computed in
float64 and rounded once.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import DTYPES, INTEGERS, check_choice, check_dense, check_number
from .forward_process import ForwardProcess, forward_process
from .schedulers import refuse_clipping
from .transitions import (
    SMALLEST_STD,
    ReverseTransition,
    check_sigma_floor,
    normal_tables,
    reverse_transition,
)

# Rows of `StepCoefficients.tables`.
_TABLES = ("data", "noisy", "output", "inv_var", "log_norm")
_MEAN_TABLES = ("mean_noisy", "mean_output", "std")


@dataclasses.dataclass(frozen=True, eq=False)
class StepCoefficients:
    """Tables of S scored steps, each [S], of one dtype (float32 or float64) and on one device.

    Args:
        data, noisy, output: the residual r = data·x + noisy·x_s + output·o; finite.
        inv_var: v ≥ 0 of −½·v·r². Infinity marks a step that can be run but not scored.
        log_norm: the normalisation per element, −½ log 2πσ² for a chain, 0 for an evidence lower
            bound.
        mean_noisy, mean_output, std: a chain's own step x′ = mean_noisy·x_s + mean_output·o +
            std·z; all three or none. std may be 0.

    Attributes:
        tables: all of them as one tensor, [5, S] or with a chain's own step [8, S], in the order
            above; the tables are its rows.
        unscorable: rows whose standard deviation is too small to score.
        needs_noisy: whether any residual contains x_s.

    Raises:
        TypeError: for anything but floating-point tensors of one dtype.
        ValueError: for tables that differ in length or device, are sparse or require a gradient,
            which they would not get, or hold values outside their range; the message names the
            table.
    """

    data: Tensor
    noisy: Tensor
    output: Tensor
    inv_var: Tensor
    log_norm: Tensor
    mean_noisy: Tensor | None = None
    mean_output: Tensor | None = None
    std: Tensor | None = None
    tables: Tensor = dataclasses.field(init=False, repr=False)
    _scoring_tables: Tensor = dataclasses.field(init=False, repr=False)
    unscorable: tuple[int, ...] = dataclasses.field(init=False)
    needs_noisy: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        given = [name for name in _MEAN_TABLES if getattr(self, name) is not None]
        if given and len(given) < len(_MEAN_TABLES):
            raise ValueError(
                f"{', '.join(_MEAN_TABLES)} must be given together, got only {', '.join(given)}"
            )
        for name in (*_TABLES, *given):
            _check_table(name, getattr(self, name), like=self.data)
        for name in ("data", "noisy", "output", *given):
            if not getattr(self, name).isfinite().all():
                raise ValueError(f"{name} must be finite, got {getattr(self, name).tolist()}")
        if not (self.inv_var >= 0).all():
            raise ValueError(f"inv_var must not be negative or NaN, got {self.inv_var.tolist()}")
        finite = self.inv_var.isfinite()
        if not self.log_norm[finite].isfinite().all():
            raise ValueError(f"log_norm must be finite, got {self.log_norm.tolist()}")
        if self.std is not None and not (self.std >= 0).all():
            raise ValueError(f"std must not be negative, got {self.std.tolist()}")
        with torch.no_grad():
            tables = torch.stack([getattr(self, name) for name in (*_TABLES, *given)])
        self._set_tables(tables)
        # Kept in Python, so that no call has to ask the device.
        object.__setattr__(self, "unscorable", tuple((~finite).nonzero().flatten().tolist()))
        object.__setattr__(self, "needs_noisy", bool((self.noisy != 0).any()))

    def __len__(self) -> int:
        return self.data.shape[0]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> StepCoefficients:
        """The same tables on another device or in another dtype (float32 or float64).

        Returns itself where nothing changes.
        """
        tables = self.tables.to(device, dtype)
        if tables is self.tables:
            return self
        if dtype not in (None, self.tables.dtype):
            return StepCoefficients(*tables)
        # Values that were checked once are not read again: on a device that would wait for it a
        # dozen times.
        moved = copy.copy(self)
        moved._set_tables(tables)
        return moved

    def __getstate__(self) -> dict[str, Any]:
        # The rows are views of `tables`, of which pickle would write the whole for each.
        names = ("tables", "unscorable", "needs_noisy")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "tables" not in state:
            # As 0.1 pickled them.
            self.__init__(*(state[name] for name in (*_TABLES, *_MEAN_TABLES)))  # type: ignore[misc]
            return
        for name in ("unscorable", "needs_noisy"):
            object.__setattr__(self, name, state[name])
        self._set_tables(state["tables"])

    def _set_tables(self, tables: Tensor) -> None:
        if tables.is_inference():
            # Those of inference mode could not be saved for a backward pass.
            with torch.inference_mode(False):
                tables = tables.clone()
        object.__setattr__(self, "tables", tables)
        # Kept, because every call of a scoring operator asks for it.
        object.__setattr__(self, "_scoring_tables", tables[: len(_TABLES)])
        for name, table in zip((*_TABLES, *_MEAN_TABLES), tables, strict=False):
            object.__setattr__(self, name, table)

    def scoring_tables(self, dtype: torch.dtype) -> Tensor:
        """The rows of `tables` that score, [5, S] in `dtype`.

        A view where they have that dtype already.
        """
        tables = self._scoring_tables
        # `to` takes a microsecond even where nothing changes.
        return tables if tables.dtype == dtype else tables.to(dtype)

    def step_tables(self) -> Tensor:
        """The rows of `tables` that move a chain, [3, S]: mean_noisy, mean_output and std.

        Raises ValueError where there are none.
        """
        self.require_step()
        return self.tables[len(_TABLES) :]

    def require_step(self) -> None:
        """Raise ValueError where there are no tables that move a chain."""
        if self.std is None:
            raise ValueError(
                f"coefficients have no step of their own ({', '.join(_MEAN_TABLES)}): "
                "build them with StepCoefficients.chain"
            )

    def require_scorable(self, step: int | None = None) -> None:
        """Raise ValueError where a row has too small a standard deviation.

        Reads nothing from the device. `step` is the row; None: any row.
        """
        refused = [row for row in self.unscorable if step is None or row == step]
        if refused:
            raise ValueError(
                f"coefficients: rows {refused} have a standard deviation of at most "
                f"{SMALLEST_STD} and cannot be scored; pass a sigma_floor, "
                "or leave these steps out"
            )

    @classmethod
    def chain(
        cls,
        scheduler: Any,
        timesteps: Tensor | Sequence[float],
        previous_timesteps: Tensor | Sequence[float] | None = None,
        *,
        parameterization: str | None = None,
        variance: str | None = None,
        eta: float = 0.0,
        center: str = "mean",
        sigma_floor: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> StepCoefficients:
        """Tables that run a reverse chain and score an image under its kernels N(mean, σ² I).

        Score it as a "mixture" (`log_likelihood`).

        Args:
            scheduler: diffusers' DDPMScheduler, DDIMScheduler or FlowMatchEulerDiscreteScheduler;
                it is only read.
            timesteps: [S] scored timesteps; the tables lie on their device where this is a tensor,
                else on the CPU.
            previous_timesteps: [S] where each step leads; negative is the scheduler's final noise
                level. None: the successors in ``scheduler.timesteps``.
            parameterization: what the denoiser's output is, by diffusers' names too
                ("flow_prediction" is "flow"); None reads the scheduler's prediction type. "mean":
                it already is the mean.
            variance: "fixed_small" or "fixed_large" (DDPM alone); None reads the scheduler's
                variance type. Needed where that is learned.
            eta: DDIM's noise, 0 to 1.
            center: what an image is compared with: the kernel's "mean", or the predicted clean
                "sample". Never changes how the chain moves.
            sigma_floor: smallest standard deviation that scores, 0 for none. Never changes how the
                chain moves.
            dtype: float32 or float64.

        Raises:
            TypeError: for another scheduler, or timesteps that are not numbers of the right kind.
            ValueError: for a combination that the scheduler does not support, for clipping
                schedulers unless `parameterization` is "mean", and for timesteps that the scheduler
                does not have.

        Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Lipman et al. 2023 (flow matching).
        """
        _check_center(center, parameterization)
        check_sigma_floor(sigma_floor)
        check_number(eta, "eta")
        if parameterization != "mean":
            refuse_clipping(scheduler)
        step = reverse_transition(
            scheduler,
            timesteps,
            parameterization=parameterization,
            variance=variance,
            eta=eta,
            previous_timesteps=previous_timesteps,
        )
        return cls(**_rounded(_chain_tables(step, center, sigma_floor), timesteps, dtype))

    @classmethod
    def elbo(
        cls,
        scheduler: Any,
        timesteps: Tensor | Sequence[float],
        *,
        parameterization: str | None = None,
        input: str = "target",
        space: str = "native",
        weight: str | Tensor | Sequence[float] = "uniform",
        dtype: torch.dtype = torch.float32,
    ) -> StepCoefficients:
        """Tables of the evidence lower bound −(1/S) Σ_s w_s‖target − o‖² of a diffusion classifier.

        It holds up to a constant that all classes share. Score it with ``reduction="mean"``
        (`log_likelihood`, `PosteriorScorer`), which is not the default.

        Args:
            scheduler: any of diffusers' schedulers that has noise levels (`forward_process`); it is
                only read, and ``clip_sample`` does not matter.
            timesteps, dtype: as in `chain`.
            parameterization: what the denoiser predicts, hence what the target is, by the
                scheduler's name for it; None reads the scheduler's prediction type.
            input: "target" where the training target (noise, velocity, flow) takes the place of
                x_s; "noisy" where x_s itself is given, what the denoiser takes: some schedulers'
                ``add_noise`` needs their ``scale_model_input`` to give it.
            space: "native" measures the error of what the denoiser predicts, "epsilon" that of the
                noise it implies.
            weight: "uniform" (w ≡ 1), or [S] weights w_s ≥ 0.

        Raises:
            TypeError, ValueError: as `forward_process`.

        Li et al., ICCV 2023 (Diffusion Classifier).
        """
        check_choice(input, "input", ("target", "noisy"))
        check_choice(space, "space", ("native", "epsilon"))
        process = forward_process(scheduler, timesteps, parameterization=parameterization)
        tables = elbo_tables(process, input=input, space=space, weight=weight)
        return cls(**_rounded(tables, timesteps, dtype))


def elbo_tables(
    process: ForwardProcess,
    *,
    input: str = "target",
    space: str = "native",
    weight: str | Tensor | Sequence[float] = "uniform",
) -> dict[str, Tensor]:
    """The five tables of `StepCoefficients.elbo`, each [S] float64, of a forward process."""
    parameterization, sign = process.parameterization, process.target_sign
    # Of data of unit variance.
    alpha, sigma = process.alpha / process.data_scale, process.sigma
    inv_var = 2 * _require_weights(weight, len(alpha))
    factor = torch.ones_like(alpha)
    if space == "epsilon":
        factor = _epsilon_factor(parameterization, alpha, sigma)
    if input == "target":
        data, noisy, output = _error_of_target(parameterization, alpha)
        inv_var = inv_var * factor**2
    else:
        data, noisy, output = _error_of_noisy(parameterization, alpha, sigma)
        data = factor * (sign * process.data_scale * data)
        noisy = factor * (sign * noisy)
        output = factor * output
    return {
        "data": data,
        "noisy": noisy,
        "output": output,
        "inv_var": inv_var,
        "log_norm": torch.zeros_like(alpha),
    }


def _check_center(center: str, parameterization: str | None) -> None:
    check_choice(center, "center", ("mean", "sample"))
    if parameterization == "mean" and center != "mean":
        raise ValueError(
            'center must be "mean" where parameterization is "mean": the clean sample is not known'
        )


def _chain_tables(step: ReverseTransition, center: str, sigma_floor: float) -> dict[str, Tensor]:
    mean_noisy = step.mean_noisy + step.mean_sample * step.sample_noisy
    mean_output = step.mean_output + step.mean_sample * step.sample_output
    scored_noisy = mean_noisy
    scored_output = mean_output
    if center == "sample":
        scored_noisy = step.sample_noisy
        scored_output = step.sample_output
    inv_var, log_norm = normal_tables(step.score_std.clamp(min=sigma_floor))
    return {
        "data": torch.ones_like(step.std),
        "noisy": -scored_noisy,
        "output": -scored_output,
        "inv_var": inv_var,
        "log_norm": log_norm,
        "mean_noisy": mean_noisy,
        "mean_output": mean_output,
        "std": step.std,
    }


def _epsilon_factor(parameterization: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The error of the implied noise over that of the output."""
    if parameterization == "epsilon":
        return torch.ones_like(alpha)
    if parameterization == "sample":
        return -alpha / sigma
    # The velocity of "v_prediction" and "flow".
    return alpha


def _error_of_target(parameterization: str, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """data, noisy and output of target − o, where the target takes the place of x_s."""
    zero = torch.zeros_like(alpha)
    one = torch.ones_like(alpha)
    # The target is x itself.
    if parameterization == "sample":
        return one, zero, -one
    return zero, one, -one


def _error_of_noisy(
    parameterization: str, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """data, noisy and output of target − o, with the target's parts in x and x_s."""
    zero = torch.zeros_like(alpha)
    one = torch.ones_like(alpha)
    if parameterization == "sample":
        return one, zero, -one
    if parameterization == "epsilon":
        return -alpha / sigma, one / sigma, -one
    if parameterization == "v_prediction":
        return -one / sigma, alpha / sigma, -one
    # Flow.
    return -one / sigma, one / sigma, -one


def _require_weights(weight: str | Tensor | Sequence[float], length: int) -> Tensor:
    if isinstance(weight, str):
        if weight != "uniform":
            raise ValueError(f'weight must be "uniform" or a weight for each step, got {weight!r}')
        return torch.ones(length, dtype=torch.float64)
    if isinstance(weight, Tensor):
        if weight.dtype not in (*DTYPES, *INTEGERS):
            raise TypeError(f"weight must be numbers, got {weight.dtype}")
        if weight.is_meta:
            raise ValueError("weight must have values, got a tensor on the device meta")
    try:
        weight = torch.as_tensor(weight, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        wanted = '"uniform" or a weight for each step'
        raise TypeError(f"weight must be {wanted}, got {type(weight).__name__}") from error
    check_dense(weight, "weight")
    if weight.requires_grad:
        raise ValueError("weight must not require a gradient, which tables lack: detach it")
    if weight.shape != (length,) or not ((weight >= 0) & weight.isfinite()).all():
        raise ValueError(
            f"weight must hold {length} finite numbers that are not negative, got {weight.tolist()}"
        )
    return weight


def _rounded(tables: dict[str, Tensor], timesteps: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype!r}")
    device = timesteps.device if isinstance(timesteps, Tensor) else "cpu"
    return {name: table.to(device, dtype) for name, table in tables.items()}


def _check_table(name: str, table: Any, like: Tensor) -> None:
    if isinstance(table, Tensor):
        check_dense(table, name)
    got = table.dtype if isinstance(table, Tensor) else type(table).__name__
    if got not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be a float32 or float64 tensor, got {got}")
    if table.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of data, {like.dtype}, got {table.dtype}")
    if table.ndim != 1 or table.shape != like.shape:
        raise ValueError(
            f"{name} must have one dimension and the length of data, {tuple(like.shape)}, "
            f"got shape {tuple(table.shape)}"
        )
    if table.device != like.device:
        raise ValueError(f"{name} must lie where data does, on {like.device}, got {table.device}")
    if table.requires_grad:
        raise ValueError(
            f"{name} must not require a gradient, which tables do not carry: detach it"
        )
    if table.is_meta:
        raise ValueError(f"{name} must have values, got a tensor on the device meta")
