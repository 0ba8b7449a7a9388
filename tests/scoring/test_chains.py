"""ReverseChain: what it calls at every step, and its steps against `reverse_step`.

The three that run it, ChainBank, ImageChainEstimator and GenRepPipeline, are tested against
diffusers' own steps.
"""

import pytest
import torch
from diffusers import DDPMScheduler

from genrep_fast import reverse_step
from genrep_fast.scoring.chains import (
    Prediction,
    ReverseChain,
    inference_scheduler,
    initial_noise,
)

SHAPE, SEED, CHAIN_IDS = (2, 3, 5), 2**64 - 3, torch.tensor([0, 7, 2**32 - 1])


def chain_of(variance_type="fixed_large", **options):
    scheduler = DDPMScheduler(clip_sample=False, variance_type=variance_type)
    scheduler = inference_scheduler(scheduler, 4)
    return ReverseChain.from_scheduler(scheduler, scheduler.timesteps, **options)


def start():
    return initial_noise(SEED, CHAIN_IDS, SHAPE).float()


def test_every_step_is_predicted_once_and_shown():
    shown, calls = [], []

    def progress(timesteps):
        for timestep in timesteps:
            yield timestep
            shown.append(timestep.item())

    def predict(row, timestep, x_t):
        calls.append((row, timestep.item(), len(shown), x_t.clone()))
        return Prediction(x_t.sin())

    chain = chain_of()
    end = chain.run(start(), predict, seed=SEED, chain_ids=CHAIN_IDS, progress=progress)
    assert shown == [750, 500, 250, 0] and len(chain) == 4
    assert [call[:3] for call in calls] == [(0, 750, 0), (1, 500, 1), (2, 250, 2), (3, 0, 3)]
    x_t = start()
    for row, _, _, given in calls:
        assert torch.equal(given, x_t)
        x_t, _ = reverse_step(
            x_t, x_t.sin(), chain.coefficients, row, seed=SEED, chain_ids=CHAIN_IDS
        )
    assert torch.equal(end, x_t)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_a_given_scale_and_a_learned_one_are_multiplied(learned, scaled):
    chain = chain_of("learned_range" if learned else "fixed_large", parameterization="mean")
    output = torch.cat([start(), start().tanh()], 1)
    mean, scale = start().cos(), torch.tensor([0.5, 1.0, 2.0])[:, None, None, None]
    given = []

    def predict(row, timestep, x_t):
        given.append(x_t)
        return Prediction(output, mean, scale if scaled else None)

    chain.run(start(), predict, seed=SEED, chain_ids=CHAIN_IDS)
    # The same noise, which nothing scales.
    plain, _ = reverse_step(start(), mean, chain.coefficients, 0, seed=SEED, chain_ids=CHAIN_IDS)
    expected = scale if scaled else torch.ones(3, 1, 1, 1)
    if learned:
        fraction = (start().tanh() + 1) / 2
        expected = expected * ((1 - fraction) * chain.log_variance_ratio[0] / 2).exp()
    torch.testing.assert_close(given[1] - mean, (plain - mean) * expected, rtol=1e-5, atol=1e-6)


def test_a_learned_variance_takes_the_place_of_the_given_one():
    chain = chain_of("learned_range", variance="fixed_small")
    assert torch.equal(chain.coefficients.std, chain_of("fixed_large").coefficients.std)
    assert (chain.log_variance_ratio < 0).all() and chain_of().log_variance_ratio is None


def test_the_schedulers_own_steps_stay():
    scheduler = DDPMScheduler()
    assert len(inference_scheduler(scheduler, 4).timesteps) == 4
    assert len(scheduler.timesteps) == 1000
