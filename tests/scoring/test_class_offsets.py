"""Offsets of classes that win too often: fitted with shrinkage, applied by every strategy."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import genrep_fast as gf
from genrep_fast.scoring.classifier.contest import Steps
from genrep_fast.scoring.classifier.offsets import fit_offsets

K = 8
SHAPE = (1, 6, 6)
QUIET = {"progress": False}
SCHEDULER = DDPMScheduler(clip_sample=False)
MEANS = 0.3 * torch.randn(K, *SHAPE, generator=torch.Generator().manual_seed(0))
# In a direction of its own, what every class but the first errs by.
SHIFT = torch.nn.functional.normalize(
    torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).flatten(), dim=0
).view(SHAPE)


class Denoiser:
    """Exact where class y is normal around MEANS[y], but for a constant error of most classes."""

    def __init__(self, error):
        self.error = error
        self.calls = 0

    def __call__(self, x_t, timesteps, labels):
        self.calls += 1
        alpha_bar = SCHEDULER.alphas_cumprod[timesteps][:, None, None, None]
        noise = x_t - alpha_bar.sqrt() * MEANS[labels]
        scale = (1 - alpha_bar).sqrt() / (1 - 0.75 * alpha_bar)
        wrong = self.error * (labels != 0)[:, None, None, None] * alpha_bar.sqrt()
        return scale * (noise + wrong * SHIFT)


def draw(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % K
    return MEANS[labels] + 0.5 * torch.randn(count, *SHAPE, generator=generator), labels


def calibrated(error, offsets, count=160):
    classifier = gf.DiffusionClassifier(Denoiser(error), SCHEDULER, K)
    classifier.calibrate(*draw(count, seed=2), steps=8, offsets=offsets, **QUIET)
    return classifier


@pytest.fixture(scope="module")
def biased():
    return calibrated(2.0, False), calibrated(2.0, "auto")


TREE = [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    "call",
    [
        {"strategy": "full"},
        {"strategy": gf.Full(5)},
        {"strategy": "race"},
        {"strategy": gf.Staged((4, 1), (2, 8))},
        {"strategy": "race", "tree": TREE},
        {
            "strategy": "race",
            "candidates": gf.Candidates(
                lambda x: -(x[:, None] - MEANS).square().flatten(2).sum(2), keep=5
            ),
        },
    ],
    ids=lambda call: " ".join(map(str, call.values()))[:20],
)
def test_every_strategy_applies_them(biased, call):
    plain, adjusted = biased
    x, labels = draw(160, seed=3)
    wrong = plain(x, labels=labels, **call, **QUIET)
    right = adjusted(x, labels=labels, **call, **QUIET)
    assert wrong.class_bias().biased[0]
    assert not right.class_bias().biased[0]
    correct = [(result.prediction == labels).double().mean() for result in (wrong, right)]
    assert correct[1] > correct[0] + 0.05


def test_offsets_are_added_to_the_log_likelihood_of_the_full_budget(biased):
    plain, adjusted = biased
    offsets = torch.from_numpy(adjusted.calibration.offsets)
    assert abs(offsets.mean()) < 1e-9 and offsets.argmin() == 0
    x, _ = draw(10, seed=4)
    before, after = (classifier(x, strategy="full", **QUIET) for classifier in biased)
    difference = after.log_likelihood.double() - before.log_likelihood.double()
    torch.testing.assert_close(difference, offsets.expand(10, K), rtol=1e-3, atol=1e-5)


def test_a_race_keeps_the_winner_of_the_full_budget_with_offsets(biased):
    _, adjusted = biased
    x, _ = draw(240, seed=5)
    full = adjusted(x, strategy="full", **QUIET)
    race = adjusted(x, confidence=0.95, **QUIET)
    # 240 images at 5%: four standard deviations are 5.6%.
    assert (race.prediction == full.prediction).double().mean() > 0.95 - 0.056
    assert race.evaluations.double().mean() < 0.8 * full.evaluations.double().mean()
    assert race.decided.all()


def test_the_bound_of_the_race_is_that_of_adjusted_errors(biased):
    _, adjusted = biased
    known = adjusted.calibration
    weights = known.weights("calibrated", known.timesteps)
    steps = Steps(known.order("signal"), weights, tuple(range(1, 9)))
    rule = known.rule("measured", steps, 0.99)
    taken = known.offsets_at(known.timesteps)
    np.testing.assert_allclose(weights.dot(taken) / weights.sum(), known.offsets, rtol=1e-9)
    plain = dataclasses.replace(known, errors=known.errors - taken, offsets=None)
    expected = plain._furthest_risen(rule, steps)
    np.testing.assert_allclose(known._furthest_risen(rule, steps), expected, rtol=1e-6)
    raw = dataclasses.replace(known, offsets=None)._furthest_risen(rule, steps)
    assert not np.allclose(raw, expected, rtol=0.01)


def test_they_are_fitted_where_they_help_alone():
    assert calibrated(0.0, "auto").calibration.offsets is None
    always = calibrated(0.0, True).calibration.offsets
    assert always is not None and np.abs(always).max() > 0
    assert calibrated(2.0, False).calibration.offsets is None
    x, labels = draw(160, seed=6)
    right = calibrated(0.0, False)(x, strategy="full", **QUIET)
    forced = calibrated(0.0, True)(x, strategy="full", **QUIET)
    accuracy = [(result.prediction == labels).double().mean() for result in (right, forced)]
    # Shrinkage holds offsets that nothing asks for near 0.
    assert accuracy[1] > accuracy[0] - 0.04


def test_few_images_give_small_offsets():
    generator = np.random.default_rng(0)
    true = np.array([2.0, 0, 0, 0])
    size = {}
    for count in (8, 2000):
        labels = np.arange(count) % 4
        scores = generator.normal(size=(count, 4)) + 2 * np.eye(4)[labels]
        fit = fit_offsets(scores - true, labels)
        size[count] = fit.offsets[0] - fit.offsets[1:].mean()
        assert abs(fit.offsets.mean()) < 1e-12
    assert size[2000] == pytest.approx(2, rel=0.15)
    assert abs(size[8]) < size[2000] + 1
    assert fit.helps and fit.gain > 0
    # The scale of L does not matter.
    other = fit_offsets(1e4 * (scores - true), labels)
    np.testing.assert_allclose(other.offsets, 1e4 * fit.offsets, rtol=1e-3, atol=1)


def test_offsets_are_saved(biased, tmp_path):
    _, adjusted = biased
    adjusted.save_pretrained(tmp_path)
    same = gf.DiffusionClassifier.from_pretrained(tmp_path, Denoiser(2.0))
    np.testing.assert_array_equal(same.calibration.offsets, adjusted.calibration.offsets)
    x, _ = draw(5, seed=7)
    assert torch.equal(same(x, **QUIET).posterior, adjusted(x, **QUIET).posterior)


def test_what_is_refused():
    classifier = gf.DiffusionClassifier(Denoiser(0.0), SCHEDULER, K)
    images, labels = draw(6)
    with pytest.raises(ValueError, match="offsets must be True, False or 'auto', got 'always'"):
        classifier.calibrate(images, labels, offsets="always", **QUIET)
    with pytest.raises(ValueError, match="offsets need labels, got none"):
        classifier.calibrate(images, steps=2, offsets=True, **QUIET)
    assert classifier._network.denoiser.calls == 0
    with pytest.raises(ValueError, match="offsets need at least 5 labelled images, got 4"):
        classifier.calibrate(images[:4], labels[:4], steps=2, offsets=True, **QUIET)
    assert classifier.calibration is None
