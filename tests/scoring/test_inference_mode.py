"""What is made inside torch.inference_mode works outside of it, and the other way round."""

import copy

import pytest
import torch
from diffusers import DDPMScheduler

import genrep_fast as gf

B, K, S, C = 2, 3, 2, 2


def tables():
    one = torch.ones(S)
    return gf.StepCoefficients(data=one, noisy=0 * one, output=-one, inv_var=one, log_norm=0 * one)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("reduction", ["mixture", "mean"])
def test_a_scorer(reduction, paired):
    x, output = torch.randn(B, C), torch.randn(B, K, S, C)
    scorer = gf.PosteriorScorer(K, reduction=reduction, paired=paired)
    for outer in (True, False, True):
        with torch.inference_mode(outer):
            scorer.update(x.clone(), output.clone(), tables(), classes=[0, 1, 2])
            scorer.posterior(classes=[2, 0])
        scorer.update(x, output, tables())
        with torch.inference_mode():
            merged = gf.PosteriorScorer(K, reduction=reduction, paired=paired)
            merged.merge(scorer)
        merged.update(x, output, tables())
        expected = gf.log_likelihood(x, output, tables(), reduction=reduction)
        torch.testing.assert_close(merged.log_likelihood(), expected)
        scorer.reset()


def test_a_bank(tmp_path):
    def denoiser(x, timesteps, labels):
        return 0.1 * x

    with torch.inference_mode():
        built = gf.ChainBank.build(
            denoiser,
            DDPMScheduler(10, clip_sample=False),
            K,
            (C,),
            num_inference_steps=4,
            chains=2,
            burn_in=0,
            thin=1,
            sigma_floor=0.3,
            seed=0,
        )
        built.save(tmp_path / "bank")
        loaded = gf.ChainBank.load(tmp_path / "bank")
    for bank in (built, loaded):
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(B, C, dtype=dtype, requires_grad=True)
            bank.log_likelihood(x).sum().backward()
            assert x.grad.isfinite().all()
        bank.refresh(denoiser)
        with torch.inference_mode():
            bank.refresh(denoiser)
        bank.refresh(denoiser)
        assert not bank.centers.requires_grad


def collect(model, aligner):
    for name in aligner.names:
        with aligner.collect(name):
            model(torch.ones(1, 2)).square().sum().backward()


@pytest.mark.parametrize("flat", [False, True])
def test_an_optimizer(flat):
    model = torch.nn.Linear(2, 2)
    with torch.inference_mode():
        aligner = gf.GradientAligner(model, flat=flat)
        optimizer = gf.AlignedAdamW(model.parameters(), aligner=aligner)
    collect(model, aligner)
    with torch.inference_mode():
        optimizer.step()
    collect(model, aligner)
    optimizer.step()
    with torch.inference_mode():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    collect(model, aligner)
    optimizer.step()
    for state in optimizer.state.values():
        assert not any(value.is_inference() for value in state.values())


def test_parameters_of_inference_mode_cannot_be_trained():
    with torch.inference_mode():
        model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="weight was made under torch.inference_mode"):
        gf.GradientAligner(model)
    # As a frozen part of a model it may be there.
    joined = torch.nn.ModuleList([model.requires_grad_(False), torch.nn.Linear(2, 2)])
    assert len(gf.GradientAligner(joined).parameters) == 4
