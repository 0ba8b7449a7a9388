"""The losses of GenRep (ICLR 2026): perception with distillation, semantic-driven generation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..coefficients.schedulers import scheduler_family
from ..coefficients.tables import StepCoefficients
from ..models import GenRep, GenRepOutput
from ..scoring.estimators import training_target


def perception_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    labelled: torch.Tensor,
    distillation: torch.Tensor | None,
    *,
    distillation_weight: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """L_percept = L_disc + λ·L_distil.

    Args:
        logits: [B, K] of the head.
        labels: int64 [B].
        labelled: bool [B], which of the labels L_disc may use.
        distillation: L_distil of the same logits (`Teacher.distillation_loss`), or None for no
            distillation.
        distillation_weight: λ.

    Returns:
        The loss, and its parts by name.
    """
    per_image = F.cross_entropy(logits, labels, reduction="none")
    discrimination = (per_image * labelled).sum() / labelled.sum().clamp(min=1)
    if distillation is None:
        return discrimination, {"discrimination": discrimination}
    loss = discrimination + distillation_weight * distillation
    return loss, {"discrimination": discrimination, "distillation": distillation}


def stratified_timesteps(
    batch: int, num_train_timesteps: int, device: torch.device
) -> torch.Tensor:
    """One uniform timestep from each of `batch` equal parts of the schedule, int64 [batch].

    A loss over them is less noisy than over independent ones.
    """
    positions = torch.arange(batch, device=device) + torch.rand(batch, device=device)
    return (positions * (num_train_timesteps / batch)).long()


class GenerationLoss(nn.Module):
    """L_genera = L_LDM + λ_r·L_rep_align + λ_v·L_vlb.

    Args:
        scheduler: DDPMScheduler of the chain that is trained.
        alignment_weight: λ_r.
        variance_weight: λ_v.

    Raises:
        TypeError: for a scheduler of another class, a flow's for example.
        ValueError: for one that clips, see `StepCoefficients.chain`.
    """

    std: torch.Tensor
    log_std_range: torch.Tensor
    noisy: torch.Tensor
    output: torch.Tensor
    exact_output: torch.Tensor

    def __init__(self, scheduler: Any, *, alignment_weight: float, variance_weight: float) -> None:
        super().__init__()
        if scheduler_family(scheduler) != "ddpm":
            found = type(scheduler).__name__
            raise TypeError(f"scheduler must be a DDPMScheduler, got {found}")
        self.scheduler = scheduler
        self.alignment_weight = alignment_weight
        self.variance_weight = variance_weight
        timesteps = torch.arange(scheduler.config.num_train_timesteps - 1, -1, -1)
        previous = timesteps - 1
        # Rows lie at t = T−1 … 0 in a chain; flipped, a row is found by its timestep.
        chain = StepCoefficients.chain(scheduler, timesteps, previous, variance="fixed_small")
        exact = StepCoefficients.chain(
            scheduler, timesteps, previous, variance="fixed_small", parameterization="sample"
        )
        large = StepCoefficients.chain(scheduler, timesteps, previous, variance="fixed_large")
        noisy, output, std = chain.step_tables().flip(1)
        exact_noisy, exact_output, _ = exact.step_tables().flip(1)
        # β̃ is 0 at t = 0; its neighbour stands in, as in Improved DDPM.
        std[0] = std[1]
        self.register_buffer("std", std)
        # The std that scores: the one that moves the chain is 0 at t = 0, whose logarithm would
        # make the bound infinite there.
        self.register_buffer("log_std_range", -0.5 * large.inv_var.flip(0).log() - std.log())
        self.register_buffer("noisy", noisy - exact_noisy)
        self.register_buffer("output", output)
        self.register_buffer("exact_output", exact_output)

    def forward(
        self,
        model: GenRep,
        x: torch.Tensor,
        labels: torch.Tensor,
        *,
        semantic: torch.Tensor | None = None,
        own: bool = False,
        modulate: bool = True,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Draw timesteps and noise and return the loss and its parts by name.

        Args:
            model: a GenRep, or its wrapper.
            x: clean latents [B, C, H, W].
            labels: int64 [B].
            semantic: x_sem [B, F, h, w] of the momentum network; None for plain diffusion, stage 0.
            own: modulate by the network's own features, as at inference; `semantic` then serves the
                alignment loss alone.
            modulate: semantic-driven generation.
        """
        steps = self.scheduler.config.num_train_timesteps
        timesteps = stratified_timesteps(len(x), steps, x.device)
        noise = torch.randn_like(x)
        x_t = self.scheduler.add_noise(x, noise, timesteps)
        given = None if own else semantic
        output: GenRepOutput = model(x_t, timesteps, labels, semantic=given, modulate=modulate)
        prediction = output.sample[:, : x.shape[1]]
        target = training_target(self.scheduler, x, noise, timesteps)
        diffusion = F.mse_loss(prediction.float(), target.float())
        loss = diffusion
        parts = {"diffusion": diffusion}
        driven = False
        if modulate and semantic is not None:
            driven = True
            cosine = F.cosine_similarity(output.features.float(), semantic.float(), dim=1)
            parts["representation_alignment"] = (1 - cosine).mean()
            loss = loss + self.alignment_weight * parts["representation_alignment"]
        # A learned variance is trained in every stage.
        learned_variance = output.sample.shape[1] > x.shape[1]
        if driven or learned_variance:
            parts["variational_bound"] = self._variational_bound(x, x_t, output, timesteps)
            loss = loss + self.variance_weight * parts["variational_bound"]
        return loss, parts

    def _variational_bound(
        self, x: torch.Tensor, x_t: torch.Tensor, output: GenRepOutput, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """KL( N(μ̃, σ²) ‖ N(μ, σ² e^{2s}) ) a dimension in nats.

        μ is detached: the bound trains s, the shift of log σ (and a learned variance).
        """

        def at(table: torch.Tensor) -> torch.Tensor:
            return table[timesteps][:, None, None, None]

        prediction = output.sample[:, : x.shape[1]].detach().float()
        # μ − μ̃.
        difference = at(self.noisy) * x_t + at(self.output) * prediction
        difference = difference - at(self.exact_output) * x
        shift = output.log_std_shift.float()[:, None, None, None]
        if self.scheduler.config.variance_type == "fixed_large":
            # The deviation that the shift modulates in `generate`.
            shift = shift + at(self.log_std_range)
        elif output.sample.shape[1] == 2 * x.shape[1]:
            fraction = (output.sample[:, x.shape[1] :].float() + 1) / 2
            shift = shift + fraction * at(self.log_std_range)
        ratio = (difference / at(self.std)) ** 2
        return (shift + ((1 + ratio) * (-2 * shift).exp() - 1) / 2).mean()
