"""Candidates: a scorer's best classes go on to the strategy, and the confidence still holds."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import nn

import genrep_fast as gf
from genrep_fast.scoring.classifier.screening import (
    Cut,
    Screened,
    calibrated_cut,
    miss_rate,
    upper_quantile,
)

K = 20
SHAPE = (1, 6, 6)
QUIET = {"progress": False}
SCHEDULER = DDPMScheduler(clip_sample=False)
MEANS = 0.5 * torch.randn(K, *SHAPE, generator=torch.Generator().manual_seed(0))


def denoiser(x_t, timesteps, labels):
    """Exact where class y is normal around MEANS[y] with the standard deviation ½."""
    alpha_bar = SCHEDULER.alphas_cumprod[timesteps][:, None, None, None]
    noise = x_t - alpha_bar.sqrt() * MEANS[labels]
    return (1 - alpha_bar).sqrt() * noise / (1 - 0.75 * alpha_bar)


def draw(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % K
    return MEANS[labels] + 0.5 * torch.randn(count, *SHAPE, generator=generator), labels


def likelihood(x):
    return -2 * (x[:, None] - MEANS).square().flatten(2).sum(2)


def blurred(x):
    """A worse scorer: it sees the first row alone."""
    return -2 * (x[:, None, :, :1] - MEANS[:, :, :1]).square().flatten(2).sum(2)


def new_classifier(**options):
    return gf.DiffusionClassifier(denoiser, SCHEDULER, K, **options)


@pytest.fixture(scope="module")
def classifier():
    found = new_classifier()
    found.calibrate(*draw(200, seed=2), candidates=blurred, steps=8, **QUIET)
    return found


@pytest.mark.parametrize("strategy", ["race", "full", gf.Stratified(3), gf.Staged((3, 1), (2, 4))])
def test_the_best_candidates_are_compared_as_ever(classifier, strategy):
    x, _ = draw(30, seed=3)
    everything = classifier(x, strategy=strategy, **QUIET)
    result = classifier(x, strategy=strategy, candidates=gf.Candidates(blurred, keep=4), **QUIET)
    ran = torch.zeros(30, K, dtype=torch.bool)
    ran.scatter_(1, blurred(x).topk(4).indices, True)
    assert torch.equal(result.steps > 0, ran)
    assert torch.equal(result.evaluations, result.steps.sum(1))
    assert ran.gather(1, result.prediction[:, None]).all()
    for name in ("log_likelihood", "standard_error"):
        assert getattr(result, name)[~ran].isnan().all(), name
        assert getattr(result, name)[ran].isfinite().all(), name
    if strategy in ("full", gf.Stratified(3)):
        assert torch.equal(result.log_likelihood[ran], everything.log_likelihood[ran])
        best = everything.log_likelihood.masked_fill(~ran, -torch.inf)
        assert torch.equal(result.prediction, best.argmax(1))
        top = best.topk(2, 1).values
        torch.testing.assert_close(result.margin, top[:, 0] - top[:, 1])


@pytest.mark.parametrize("strategy", ["race", "full"])
def test_the_posterior_leaves_the_others_what_calibration_images_do(classifier, strategy):
    x, _ = draw(30, seed=4)
    result = classifier(x, strategy=strategy, candidates=gf.Candidates(blurred, keep=3), **QUIET)
    posterior = result.posterior.double().exp()
    torch.testing.assert_close(posterior.sum(1), torch.ones(30).double(), rtol=0, atol=1e-6)
    assert result.posterior.isfinite().all() and result.evidence.isfinite().all()
    gone = result.steps == 0
    winners = classifier.calibration.full_winners("calibrated")
    scores = torch.from_numpy(classifier.calibration.scores)
    order = scores.argsort(1, descending=True)[:, :3]
    missed = int((order != torch.from_numpy(winners)[:, None]).all(1).sum())
    assert missed > 5
    left = (posterior * gone).sum(1)
    torch.testing.assert_close(left, torch.full((30,), (missed + 1) / 202).double())
    # In proportion to the scores.
    spread = blurred(x).double().masked_fill(~gone, -torch.inf).softmax(1)
    torch.testing.assert_close(posterior * gone, left[:, None] * spread, rtol=1e-5, atol=1e-12)
    again = gf.posterior(result.evidence, temperature=result.temperature)
    torch.testing.assert_close(again, result.posterior, rtol=1e-4, atol=1e-4)
    assert torch.equal(result.posterior.argmax(1), result.prediction)


def test_as_many_go_on_as_the_calibration_asks_for(classifier):
    """The best ones, or those within a margin, whichever are fewer on the calibration images."""
    winners = classifier.calibration.full_winners("calibrated")
    scores = classifier.calibration.scores.astype(float)
    own = scores[np.arange(200), winners][:, None]
    ranks = np.sort((scores >= own).sum(1))
    behind = np.sort(scores.max(1) - own[:, 0])
    x, _ = draw(100, seed=5)
    of_images = blurred(x).double()
    below = of_images.max(1, keepdim=True).values - of_images
    counts = {}
    # Alone, the candidates may miss 1 - confidence; half of that before a race.
    for strategy, error in (("full", 0.1), ("race", 0.05)):
        place = math.ceil(201 * (1 - error)) - 1
        within = (scores.max(1, keepdims=True) - scores <= behind[place]).sum()
        assert within < 200 * ranks[place]
        result = classifier(x, strategy=strategy, candidates=blurred, confidence=0.9, **QUIET)
        counts[strategy] = int((result.steps > 0).sum())
        assert torch.equal(result.steps > 0, below <= behind[place])
        assert classifier.calibration.scores.shape == (200, K)
    assert counts["race"] > counts["full"]


def test_the_best_ones_go_on_where_a_margin_lets_more_through():
    # Scores that say nothing but their order.
    generator = np.random.default_rng(0)
    winners = generator.integers(0, 9, 400)
    scores = np.zeros((400, 9))
    for row, winner in zip(scores, winners, strict=True):
        order = generator.permutation(np.delete(np.arange(9), winner))
        rank = generator.integers(0, 3)
        order = np.insert(order, rank, winner)
        row[order] = 10 ** generator.uniform(0, 3) - np.arange(9) * 10 ** generator.uniform(-3, 3)
    cut, miss = calibrated_cut(scores, winners, 0.01)
    assert cut == Cut(3) and 0 < miss <= 0.01
    staying = cut.staying(np.array([3.0, -np.inf, 5.0, 1.0, 4.0]))
    assert staying.tolist() == [True, False, True, False, True]
    assert Cut(5, 1.0).staying(np.array([3.0, 4.0, 5.0, -np.inf])).tolist() == [
        False,
        True,
        True,
        False,
    ]


def test_the_confidence_holds_with_candidates_before_a_race(classifier):
    x, _ = draw(600, seed=6)
    full = classifier(x, strategy="full", **QUIET)
    race = classifier(x, candidates=blurred, confidence=0.95, **QUIET)
    # 600 images at 5%: four standard deviations are 3.6%.
    assert (race.prediction == full.prediction).double().mean() > 0.95 - 0.036
    assert race.evaluations.double().mean() < K


def test_fewer_calibration_images_let_more_classes_through():
    images, labels = draw(400, seed=7)
    x, _ = draw(1, seed=8)
    kept = []
    for count in (8, 32, 400):
        classifier = new_classifier()
        classifier.calibrate(
            images[:count], labels[:count], candidates=likelihood, steps=4, **QUIET
        )
        result = classifier(x, strategy="full", candidates=likelihood, **QUIET)
        kept.append(int((result.steps > 0).sum()))
    assert kept[0] > kept[1] >= kept[2] >= 1
    assert kept[0] < K


def test_the_quantile_is_an_order_statistic_where_there_are_enough_values():
    values = np.arange(99.0)
    assert upper_quantile(values, 0.05, 1.0) == 94
    assert upper_quantile(values, 0.01, 1.0) == 98
    # Below 1 / (N + 1) no value of the sample will do.
    assert upper_quantile(values, 0.009, 1.0) > 98
    generator = np.random.default_rng(0)
    missed = [
        generator.exponential() > upper_quantile(generator.exponential(size=39), 0.05, 1.0)
        for _ in range(4000)
    ]
    # 0.05, four standard deviations are 0.014.
    assert 0.036 < np.mean(missed) < 0.064
    beyond = [upper_quantile(np.zeros(count), 0.001, 1.0) for count in (4, 16, 64, 256)]
    assert beyond == sorted(beyond, reverse=True) and beyond[-1] > 0
    assert miss_rate(np.zeros(98, dtype=bool)) == 0.01
    assert miss_rate(np.zeros(8, dtype=bool), 0.03) == 0.03


def test_classes_that_leave_one_after_the_other_share_what_is_left():
    screened = Screened.of_all(4)
    first = screened.keep(np.array([True, False, True, True]), 0.1)
    second = first.keep(
        np.array([True, False, False]), 0.2, np.array([0.0, -math.inf, math.log(3)])
    )
    np.testing.assert_array_equal(second.live, [0])
    mass = np.exp(second.log_mass)
    assert mass[0] == 0
    np.testing.assert_allclose([mass[1], mass[2] + mass[3]], [0.1, 0.9 * 0.2])
    # What is ruled out keeps a chance that is no more than the others'.
    assert 0 < mass[2] < 1e-15 * mass[3]
    equal = screened.keep(np.array([True, True, False, False]), 0.1, np.full(4, -math.inf))
    np.testing.assert_allclose(np.exp(equal.log_mass), [0, 0, 0.05, 0.05])
    assert first.keep(np.ones(3, dtype=bool), 0.5) is first


def test_one_candidate_is_evaluated_once(classifier):
    x, _ = draw(10, seed=9)
    result = classifier(x, candidates=gf.Candidates(likelihood, keep=1), **QUIET)
    assert torch.equal(result.prediction, likelihood(x).argmax(1))
    assert (result.evaluations == 1).all() and result.decided.all()
    assert result.margin.isnan().all()


def test_classes_that_are_ruled_out_never_run(classifier):
    x, labels = draw(10, seed=10)

    def two(images):
        scores = torch.full((len(images), K), -torch.inf)
        return scores.index_fill(1, torch.tensor([3, 8]), 0.0)

    result = classifier(x, strategy="full", candidates=gf.Candidates(two, keep=5), **QUIET)
    assert torch.equal((result.steps > 0).nonzero()[:, 1].unique(), torch.tensor([3, 8]))
    assert ((result.steps > 0).sum(1) == 2).all()
    assert result.posterior.isfinite().all()


def test_a_null_class_and_a_budget(classifier):
    nulled = new_classifier(null_class=K)
    nulled._network.denoiser = lambda x_t, t, labels: denoiser(x_t, t, labels % K)
    x, _ = draw(5, seed=11)
    candidates = gf.Candidates(likelihood, keep=3)
    result = nulled(x, strategy="stratified", candidates=candidates, budget=9, **QUIET)
    assert (result.evaluations == 8).all()
    assert result.lift[result.steps > 0].isfinite().all()
    assert result.lift[result.steps == 0].isnan().all()
    with pytest.raises(ValueError, match="budget must be at least 4 evaluations"):
        nulled(x, strategy="full", candidates=candidates, budget=3, **QUIET)
    with pytest.raises(ValueError, match="budget must be at least 3 evaluations"):
        classifier(x, candidates=candidates, budget=2, **QUIET)


def test_estimates_count_candidates(classifier):
    alone = classifier.estimate(10)
    candidates = gf.Candidates(blurred, keep=4)
    before = classifier.estimate(10, candidates=candidates)
    assert before.most == 4 * 8 and before.evaluations < alone.evaluations
    found = classifier(draw(200, seed=12)[0], candidates=candidates, **QUIET).evaluations
    assert before.evaluations == pytest.approx(found.double().mean().item(), rel=0.2)
    assert classifier.estimate(strategy=gf.Full(5), candidates=candidates).evaluations == 20


@pytest.mark.parametrize("batch_size", [3, 64])
def test_candidates_do_not_depend_on_the_batch(classifier, batch_size):
    x, _ = draw(23, seed=13)
    expected = classifier(x, candidates=blurred, **QUIET)
    other = new_classifier(batch_size=batch_size)
    other.calibration = classifier.calibration
    for images in (x, x.split(7)):
        result = other(images, candidates=blurred, **QUIET)
        assert torch.equal(result.prediction, expected.prediction)
        assert torch.equal(result.steps, expected.steps)
        torch.testing.assert_close(result.posterior, expected.posterior, rtol=1e-4, atol=1e-4)


def test_a_race_calibrates_itself_with_its_candidates():
    classifier = new_classifier()
    x, _ = draw(60, seed=14)
    with pytest.warns(UserWarning, match="not calibrated"):
        result = classifier(x, candidates=likelihood, **QUIET)
    assert (result.steps[:32] == 24).all()
    assert (result.steps[32:] == 0).any(1).all()
    np.testing.assert_allclose(classifier.calibration.scores, likelihood(x[:32]), rtol=1e-6)


def test_saved_scores_come_back(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    same = gf.DiffusionClassifier.from_pretrained(tmp_path, denoiser)
    x, _ = draw(20, seed=15)
    first, second = (c(x, candidates=blurred, **QUIET) for c in (classifier, same))
    assert torch.equal(first.steps, second.steps)
    assert torch.equal(first.posterior, second.posterior)


def small_unet(num_classes):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        num_class_embeds=num_classes,
    )


def test_a_genrep_is_its_own_scorer():
    model = gf.GenRep.from_backbone(small_unet(5), 5).train()
    classifier = gf.DiffusionClassifier(model.denoise, SCHEDULER, 5)
    x = torch.rand(6, 1, 8, 8) * 2 - 1
    found = [
        classifier(x, strategy=gf.Full(1), candidates=gf.Candidates(scorer, keep=2), **QUIET)
        for scorer in (model, model.perceive, lambda x: SimpleNamespace(logits=model.perceive(x)))
    ]
    expected = model.perceive(x).topk(2).indices
    for result in found:
        assert torch.equal(result.steps > 0, torch.zeros(6, 5).scatter(1, expected, 1) > 0)
    assert model.training


def test_a_scorer_runs_in_eval_mode_and_gets_its_mode_back(classifier):
    class Head(nn.Module):
        def forward(self, images):
            assert not self.training and not torch.is_grad_enabled()
            return likelihood(images)

    head = Head().train()
    classifier(draw(3)[0], candidates=gf.Candidates(head, keep=2), **QUIET)
    assert head.training


def scores_of(value):
    return lambda images: torch.full((len(images), K), value)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (lambda x: torch.zeros(len(x), 3), r"must give scores \[4, 20\], .* got \[4, 3\]"),
        (lambda x: torch.zeros(K), r"must give scores \[4, 20\], .* got \[20\]"),
        (lambda x: [0.0] * K, "must give a tensor of scores, got list"),
        (scores_of(math.nan), "must give scores below infinity, got NaN or infinity"),
        (scores_of(math.inf), "must give scores below infinity, got NaN or infinity"),
        (scores_of(-math.inf), "must leave a class to each image, got scores of -inf for all"),
    ],
)
def test_scores_that_are_refused(classifier, scorer, message):
    with pytest.raises((TypeError, ValueError), match=f"candidates {message}"):
        classifier(draw(4)[0], candidates=gf.Candidates(scorer, keep=2), **QUIET)


def test_arguments_that_are_refused(classifier):
    x, _ = draw(2)
    for keep in (0, -1, 1.5, True):
        with pytest.raises((TypeError, ValueError), match="keep must be"):
            gf.Candidates(likelihood, keep=keep)
    with pytest.raises(ValueError, match="keep must be at most the 20 classes, got 21"):
        classifier(x, candidates=gf.Candidates(likelihood, keep=21), **QUIET)
    with pytest.raises(TypeError, match="scorer must be a function of images or a GenRep, got int"):
        gf.Candidates(5)
    for call in (classifier, classifier.calibrate):
        with pytest.raises(TypeError, match="candidates must be a function of images, .* got list"):
            call(x, candidates=[1, 2], **QUIET)
    plain = new_classifier()
    without = "candidates: the calibration has no scores of them; call calibrate with candidates"
    with pytest.raises(ValueError, match=without):
        plain(x, strategy="full", candidates=likelihood, **QUIET)
    plain.calibrate(draw(4)[0], steps=2, **QUIET)
    with pytest.raises(ValueError, match=without):
        plain(x, candidates=likelihood, **QUIET)
    with pytest.raises(ValueError, match=without):
        plain.estimate(candidates=likelihood)
