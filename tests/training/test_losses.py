"""The losses against explicit sums and torch's own divergences."""

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_runs import NUM_CLASSES
from torch.distributions import Normal, kl_divergence

import genrep_fast as gf
from genrep_fast.training import losses
from genrep_fast.training.losses import GenerationLoss, perception_loss, stratified_timesteps


@pytest.mark.parametrize("batch", [1, 7, 128])
def test_timesteps_are_stratified(batch):
    for _ in range(20):
        timesteps = stratified_timesteps(batch, 1000, torch.device("cpu"))
        assert timesteps.dtype == torch.int64
        assert ((timesteps + 1) * batch > torch.arange(batch) * 1000).all() and (
            timesteps * batch < (torch.arange(batch) + 1) * 1000
        ).all()


@pytest.mark.parametrize("labelled", [[True, False, True, True, False], [False] * 5])
def test_perception_loss_equals_an_explicit_sum(labelled):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (
        torch.randn(5, 4, generator=generator),
        30 * torch.randn(5, 4, generator=generator),
    )
    labels = torch.tensor([3, 1, 0, 2, 2])
    distillation = gf.distillation_loss(logits, teacher, temperature=20.0)
    loss, parts = perception_loss(
        logits, labels, torch.tensor(labelled), distillation, distillation_weight=0.6
    )
    student = logits.double().log_softmax(1)
    target = (teacher.double() / 20).softmax(1)
    losses_of_labelled = [-student[i, labels[i]].item() for i in range(5) if labelled[i]]
    discrimination = sum(losses_of_labelled) / max(len(losses_of_labelled), 1)
    distillation = (target * (target.log() - student)).sum().item() / 5
    assert parts["discrimination"].item() == pytest.approx(discrimination, abs=1e-6)
    assert parts["distillation"].item() == pytest.approx(distillation, abs=1e-6)
    assert loss.item() == pytest.approx(discrimination + 0.6 * distillation, abs=1e-6)


TIMESTEPS = torch.tensor([0, 1, 2, 250, 700, 998, 999])


def variational_bound(
    tiny_model, monkeypatch, learned, prediction_type, own=False, variance_type="fixed_small"
):
    """The loss's own value with known timesteps and noise, and all that it was made of."""
    model = tiny_model("unet", active=True, **({"out_channels": 2} if learned else {}))
    torch.nn.init.constant_(model.log_std_modulation[-1].bias, -0.4)
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(7, 1, 8, 8, generator=generator) * 2 - 1
    labels = torch.arange(7) % NUM_CLASSES
    semantic = model.frozen_copy().semantic_features(x)
    scheduler = DDPMScheduler(
        clip_sample=False, prediction_type=prediction_type, variance_type=variance_type
    )
    loss = GenerationLoss(scheduler, alignment_weight=0.0, variance_weight=1.0)
    monkeypatch.setattr(losses, "stratified_timesteps", lambda *_: TIMESTEPS)
    torch.manual_seed(6)
    _, parts = loss(model, x, labels, semantic=semantic, own=own)
    torch.manual_seed(6)
    x_t = loss.scheduler.add_noise(x, torch.randn_like(x), TIMESTEPS)
    return (
        model,
        x,
        x_t,
        model(x_t, TIMESTEPS, labels, semantic=semantic),
        parts["variational_bound"],
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_variational_bound_is_the_divergence_of_the_reverse_steps(
    tiny_model, monkeypatch, variance, prediction_type
):
    """Against torch's KL of the two normal distributions, whose means and variances are diffusers'
    own, at every kind of timestep.
    """
    fixed = "fixed_large" if variance == "fixed_large" else "fixed_small"
    _, x, x_t, output, actual = variational_bound(
        tiny_model, monkeypatch, variance == "learned", prediction_type, variance_type=fixed
    )
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: torch.zeros(())
    )
    denoised = DDPMScheduler(clip_sample=False, prediction_type=prediction_type)
    exact = DDPMScheduler(clip_sample=False, prediction_type="sample")
    total = 0.0
    for i, timestep in enumerate(TIMESTEPS.tolist()):
        true_mean = exact.step(x[i].double(), timestep, x_t[i].double()).prev_sample
        mean = denoised.step(
            output.sample[i, :1].detach().double(), timestep, x_t[i].double()
        ).prev_sample
        small = exact._get_variance(max(timestep, 1)).double().sqrt()  # that of t = 0 is zero
        log_std = small.log() + output.log_std_shift[i].detach().double()
        large = exact._get_variance(timestep, variance_type="fixed_large").double().sqrt()
        if variance == "learned":
            log_std = (
                log_std + (output.sample[i, 1:].detach().double() + 1) / 2 * (large / small).log()
            )
        elif variance == "fixed_large":
            log_std = log_std + (large / small).log()
        divergence = kl_divergence(Normal(true_mean, small), Normal(mean, log_std.exp()))
        total += divergence.mean().item() / len(TIMESTEPS)
    assert actual.item() == pytest.approx(total, rel=2e-4)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_variational_bound_trains_the_variance_alone(tiny_model, monkeypatch, learned, own):
    model, *_, bound = variational_bound(tiny_model, monkeypatch, learned, "epsilon", own)
    bound.backward()
    assert all(parameter.grad.any() for parameter in model.log_std_modulation.parameters())
    if learned:
        of_mean, of_variance = (model.backbone.conv_out.weight.grad[channel] for channel in (0, 1))
        assert not of_mean.any() and of_variance.any()
        mean_rows, variance_rows = model.mean_modulation.weight.grad.chunk(2)
        assert not mean_rows.any() and variance_rows.any()
    else:
        others = [*model.backbone.parameters(), *model.mean_modulation.parameters()]
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in others)
