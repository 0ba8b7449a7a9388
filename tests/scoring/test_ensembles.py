"""Ensembles: classes of several prompts, whose errors are averaged."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import genrep_fast as gf
from genrep_fast.scoring.classifier.members import mean_errors, mean_outputs
from genrep_fast.scoring.classifier.pipelines.adapter import Adapter
from genrep_fast.scoring.classifier.pipelines.denoiser import PipelineDenoiser
from genrep_fast.scoring.classifier.pipelines.prompts import Prompts

QUIET = {"progress": False}


class GaussianEnsembles(Adapter):
    """Classes whose prompts each have a mean of their own; the exact denoiser of every prompt."""

    image_size = None

    def __init__(self, counts, spread, seed=0):
        generator = torch.Generator().manual_seed(seed)
        centers = 0.35 * torch.randn(len(counts), 1, 6, 6, generator=generator)
        around = spread * torch.randn(sum(counts), 1, 6, 6, generator=generator)
        self.classes = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        self.means = torch.cat([centers[self.classes] + around, torch.zeros(1, 1, 6, 6)])
        self.network = torch.nn.Identity()
        self.levels = DDPMScheduler(clip_sample=False)

    def draw(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(len(self.classes), (count,), generator=generator)
        noise = torch.randn(count, 1, 6, 6, generator=generator)
        return self.means[rows] + 0.5 * noise, self.classes[rows]

    def predict(self, x_t, timesteps, conditioning):
        alpha = self.levels.alphas_cumprod[timesteps][:, None, None, None]
        mean = self.means[conditioning["row"]]
        if x_t.shape[-1] < mean.shape[-1]:
            mean = torch.nn.functional.avg_pool2d(mean, 2)
        return (1 - alpha).sqrt() * (x_t - alpha.sqrt() * mean) / (1 - 0.75 * alpha)

    def classifier(self, **options):
        counts = torch.bincount(self.classes).tolist()
        prompts = Prompts(tuple((f"{place}",) * count for place, count in enumerate(counts)), "")
        rows = {"row": torch.arange(len(self.means))}
        denoiser = PipelineDenoiser(self, "Gaussian", prompts, rows)
        return gf.DiffusionClassifier(
            denoiser, self.levels, len(counts), null_class=len(counts), **options
        )


COUNTS = (1, 4, 2, 1, 3, 5)


@pytest.mark.parametrize("spread", [0.05, 0.15])
def test_a_race_of_ensembles_finds_the_full_budgets_winner(spread):
    data = GaussianEnsembles(COUNTS, spread)
    classifier = data.classifier(batch_size=200)
    classifier.calibrate(data.draw(64, seed=1)[0], steps=12, **QUIET)
    images, labels = data.draw(300, seed=2)
    full = classifier(images, strategy=gf.Full(12), **QUIET)
    race = classifier(images, confidence=0.99, **QUIET)
    assert (full.prediction == labels).float().mean() > 0.9
    assert (race.prediction == full.prediction).float().mean() >= 0.98
    assert full.evaluations.tolist() == [12 * (16 + 1)] * 300
    assert race.evaluations.float().mean() < 0.35 * 12 * 17
    # Rows of the network, not classes.
    rows = race.steps @ torch.tensor(COUNTS) + race.steps.max(1).values
    assert torch.equal(race.evaluations, rows)


def test_an_ensemble_costs_what_it_says():
    data = GaussianEnsembles(COUNTS, 0.1)
    classifier = data.classifier(batch_size=7)
    images = data.draw(5, seed=3)[0]
    staged = gf.Staged((2, 1), (2, 4))
    result = classifier(images, strategy=staged, **QUIET)
    # The two greatest ensembles, if those stay.
    assert classifier.estimate(strategy=staged).most == 2 * 17 + 2 * (9 + 1)
    rows = result.steps @ torch.tensor(COUNTS) + 4
    assert torch.equal(result.evaluations, rows)
    assert (result.evaluations <= 2 * 17 + 2 * 10).all()
    with pytest.raises(ValueError, match="at least 17 evaluations an image, one a prompt, got 16"):
        classifier(images, budget=16, **QUIET)
    for strategy in ("stratified", gf.Full(4)):
        limited = classifier(images, strategy=strategy, budget=40, **QUIET)
        assert limited.evaluations.tolist() == [34] * 5


@pytest.mark.parametrize("screen", [{"tree": [[0, 1], [2, 3], [4, 5]]}, {"coarse": gf.Coarse()}])
def test_estimates_count_the_prompts_of_what_precedes_a_strategy(screen):
    data = GaussianEnsembles(COUNTS, 0.1)
    classifier = data.classifier(batch_size=64)
    calibration = {name: value for name, value in screen.items() if name == "coarse"}
    classifier.calibrate(data.draw(100, seed=1)[0], steps=8, **calibration, **QUIET)
    images = data.draw(100, seed=2)[0]
    for strategy in ("full", gf.Stratified(3)):
        estimate = classifier.estimate(strategy=strategy, **screen)
        cost = classifier(images, strategy=strategy, **screen, **QUIET).cost
        assert cost.max() <= estimate.most
        assert estimate.evaluations == pytest.approx(cost.mean().item(), rel=0.06)


def test_outputs_of_an_ensemble_are_averaged_for_distances():
    counts = np.array([2, 1, 3])
    outputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([outputs[:2].mean(0), outputs[2], outputs[3:].mean(0)])
    torch.testing.assert_close(mean_outputs(outputs, counts), expected)
    torch.testing.assert_close(
        torch.from_numpy(mean_errors(outputs.T.double().numpy(), counts)), expected.T.double()
    )
