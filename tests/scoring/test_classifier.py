"""DiffusionClassifier over Gaussian classes, whose exact denoiser is known."""

import math
import time
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from scipy.stats import binom

import genrep_fast as gf
from genrep_fast.reference.reverse_step import chain_noise
from genrep_fast.scoring.classifier.contest import Contest, KeepBest, KnownVariance, Steps
from genrep_fast.scoring.classifier.engine import sketch, squared_distance
from genrep_fast.scoring.classifier.strategies import low_discrepancy_order

K = 6
SHAPE = (1, 6, 6)
QUIET = {"progress": False}


class GaussianClasses:
    """Data N(μ_y, s²·I) and what a perfect denoiser predicts of x_t = α·x + σ·ε."""

    std = 0.5

    def __init__(self, scheduler, num_classes=K, distance=0.35, seed=0):
        self.scheduler = scheduler
        self.num_classes = num_classes
        generator = torch.Generator().manual_seed(seed)
        self.means = distance * torch.randn(num_classes, *SHAPE, generator=generator)
        self.calls = []

    def draw(self, count, seed=1):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % self.num_classes
        noise = torch.randn(count, *SHAPE, generator=generator)
        return self.means[labels] + self.std * noise, labels

    def levels(self, timesteps):
        if hasattr(self.scheduler, "alphas_cumprod"):
            alpha_bar = self.scheduler.alphas_cumprod.double()[timesteps]
            alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        else:
            sigma = timesteps.double() / 1000
            alpha = 1 - sigma
        return (level.view(-1, 1, 1, 1) for level in (alpha, sigma))

    def __call__(self, x_t, timesteps, labels):
        self.calls.append(len(x_t))
        alpha, sigma = self.levels(timesteps)
        noisy, mean = x_t.double(), self.means.double()[labels % self.num_classes]
        noise = sigma * (noisy - alpha * mean) / (alpha**2 * self.std**2 + sigma**2)
        x = (noisy - sigma * noise) / alpha
        kind = self.scheduler.config.get("prediction_type", "flow")
        output = {
            "epsilon": noise,
            "sample": x,
            "v_prediction": alpha * noise - sigma * x,
            "flow": noise - x,
        }[kind]
        return output.to(x_t.dtype)


def ddpm(**options):
    return DDPMScheduler(clip_sample=False, **options)


def gaussian(**options):
    data = GaussianClasses(ddpm(), **options)
    return data, gf.DiffusionClassifier(data, data.scheduler, data.num_classes)


@pytest.fixture(scope="module")
def calibrated():
    data, classifier = gaussian(distance=0.55)
    classifier.calibrate(*data.draw(96, seed=2), steps=12, **QUIET)
    return data, classifier


def plain_loop(data, x, steps, seed=0, image_ids=None):
    """Mean errors [B, K] as a textbook writes them."""
    ids = torch.arange(len(x)) if image_ids is None else torch.tensor(image_ids)
    known = 1000
    total = torch.zeros(len(x), data.num_classes, dtype=torch.float64)
    for row in range(steps):
        timestep = int((row + 0.5) * known / steps)
        if isinstance(data.scheduler, FlowMatchEulerDiscreteScheduler):
            timestep = sorted(data.scheduler.timesteps.tolist())[timestep]
        t = torch.tensor([timestep])
        alpha, sigma = data.levels(t)
        noise = chain_noise(seed, ids, row, x.shape[1:])
        x_t = (alpha * x.double() + sigma * noise).to(x.dtype)
        kind = data.scheduler.config.get("prediction_type", "flow")
        target = {
            "epsilon": noise,
            "sample": x.double(),
            "v_prediction": alpha * noise - sigma * x.double(),
            "flow": noise - x.double(),
        }[kind]
        for label in range(data.num_classes):
            output = data(x_t, t.expand(len(x)), torch.full((len(x),), label))
            total[:, label] += (target - output.double()).square().flatten(1).sum(1) / steps
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "scheduler",
    [
        ddpm(),
        ddpm(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
        ddpm(prediction_type="sample"),
        DDIMScheduler(),
        FlowMatchEulerDiscreteScheduler(),
    ],
    ids=["epsilon", "v_prediction", "sample", "ddim", "flow"],
)
def test_full_is_a_plain_loop(scheduler, dtype):
    data = GaussianClasses(scheduler)
    x = data.draw(7)[0].to(dtype)
    classifier = gf.DiffusionClassifier(data, scheduler, K, batch_size=16)
    result = classifier(x, strategy=gf.Full(5), seed=3, **QUIET)
    expected = -plain_loop(data, x, 5, seed=3)
    torch.testing.assert_close(result.log_likelihood.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        result.posterior.double(),
        expected.log_softmax(1),
        rtol=1e-5,
        atol=1e-5 * expected.abs().max(),
    )
    assert torch.equal(result.prediction, expected.argmax(1))
    assert result.decided.all()
    assert (result.steps == 5).all() and (result.evaluations == 5 * K).all()
    best = expected.topk(2, 1).values
    torch.testing.assert_close(
        result.margin.double(), best[:, 0] - best[:, 1], rtol=1e-3, atol=1e-4
    )


def test_a_race_keeps_the_full_budgets_winner_for_a_few_evaluations(calibrated):
    data, classifier = calibrated
    x, labels = data.draw(150)
    full = classifier(x, strategy="full", **QUIET)
    race = classifier(x, labels=labels, **QUIET)
    assert race.evaluations.float().mean() < 4 * K
    assert (race.prediction == full.prediction).float().mean() >= 0.99
    assert (race.steps >= 1).all() and (race.steps <= 12).all()
    assert torch.equal(race.evaluations, race.steps.sum(1))
    # Survivors alone have taken as many steps as the predicted class.
    most = race.steps.gather(1, race.prediction[:, None])[:, 0]
    assert torch.equal(most, race.steps.amax(1))
    # At the end of the full budget its winner is known.
    assert race.decided.all()
    assert torch.equal(race.labels, labels)
    posterior = gf.posterior(race.evidence, temperature=race.temperature)
    assert torch.equal(race.posterior, posterior)
    assert torch.equal(race.evidence.amax(1), torch.zeros(150))
    assert (race.evidence.gather(1, race.prediction[:, None]) == 0).all()
    assert (race.standard_error.gather(1, race.prediction[:, None]) == 0).all()


def chance(z, distances, *, taken, weights, variance, correlation, profile):
    """That a class wins the full budget after so many steps, in Python's own arithmetic.

    Args:
        z, distances: Z and D of the steps that were taken.
        weights, variance, correlation, profile: w, s², C and D up to a factor, of all steps in
            their order.
    """
    seen, ahead = range(taken), range(taken, len(weights))
    sigma = [2 * math.sqrt(variance[s] * distances[s]) for s in seen]
    if max(sigma) == 0:
        return 0.5
    # The likelihood ratio of Σ Z / s².
    mean = sum(distances[s] / variance[s] for s in seen)
    spread = sum(
        sigma[i] * sigma[j] * correlation[i][j] / variance[i] / variance[j]
        for i in seen
        for j in seen
    )
    ratio = math.exp(-2 * mean * sum(z[s] / variance[s] for s in seen) / spread)
    # Σ w·Z of the remaining steps, given that of the former.
    scale = sum(weights[s] * distances[s] for s in seen)
    scale /= sum(weights[s] * profile[s] for s in seen)
    sigma += [2 * math.sqrt(variance[s] * scale * profile[s]) for s in ahead]
    sigma = [w * deviation for w, deviation in zip(weights, sigma, strict=True)]

    def covariance(some, others):
        return sum(sigma[i] * sigma[j] * correlation[i][j] for i in some for j in others)

    gap = sum(weights[s] * z[s] for s in seen)
    expected = sum(weights[s] * distances[s] for s in seen)
    to_come = sum(weights[s] * scale * profile[s] for s in ahead)
    slope = covariance(ahead, seen) / covariance(seen, seen)
    left = covariance(ahead, ahead) - slope * covariance(ahead, seen)

    def falls_behind(sign):
        end = gap + sign * to_come + slope * (gap - sign * expected)
        if left <= 0:
            return float(end < 0)
        return 0.5 * math.erfc(end / math.sqrt(2 * left))

    return min(ratio * falls_behind(-1), 1) + falls_behind(1)


@pytest.mark.parametrize("taken", [1, 3, 5])
def test_the_chance_of_a_class(taken):
    generator = np.random.default_rng(taken)
    mixed = generator.uniform(0, 1, (5, 5))
    known = {
        "weights": generator.uniform(0.2, 2, 5),
        "variance": generator.uniform(0.3, 2, 5),
        "correlation": 0.6 * np.eye(5) + 0.2 * (mixed + mixed.T),
        "profile": generator.uniform(0.5, 3, 5),
    }
    distances = generator.uniform(0.5, 6, (taken, 8))
    z = distances * generator.uniform(-0.2, 1.5, (taken, 8))
    # The leader is ahead.
    z *= np.sign(known["weights"][:taken].dot(z))
    rule = KnownVariance(
        9.0,
        known["weights"],
        2 * np.sqrt(known["variance"]),
        known["correlation"],
        known["correlation"],
        known["profile"],
    )
    found = np.exp(rule.log_chance(z, distances))
    expected = [chance(z[:, k], distances[:, k], taken=taken, **known) for k in range(8)]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-300)
    assert (taken == 5) == (max(expected) == 0)


def test_distances_to_a_new_leader_are_those_to_both():
    steps = Steps(np.arange(2), np.ones(2), (1, 2))
    contest = Contest(0, 0, None, 3)
    contest.add(np.array([[1.0, 2.0, 3.0]]), np.empty(0), steps)
    contest.add_distances(np.array([[0.0, 4.0, 5.0]]))
    contest.add(np.array([[9.0, 1.0, 3.0]]), np.empty(0), steps)
    contest.add_distances(np.array([[2.0, 0.0, 7.0]]))
    assert contest.leader == 1
    np.testing.assert_array_equal(contest.distances, [[4, 0, 9], [2, 0, 7]])
    contest.drop(np.array([True, False, False]), steps, KeepBest())
    np.testing.assert_array_equal(contest.distances, [[0, 9], [0, 7]])
    # Back again, they are exact.
    contest = Contest(0, 0, None, 2)
    for errors in ([1.0, 2.0], [5.0, 1.0], [0.0, 9.0]):
        contest.add(np.array([errors]), np.empty(0), Steps(np.arange(3), np.ones(3), (3,)))
        contest.add_distances(np.array([[3.0, 3.0]]) * (np.arange(2) != contest.leader))
    assert contest.leader == 0
    np.testing.assert_array_equal(contest.distances, [[0, 3], [0, 3], [0, 3]])


def brute_force_race(data, classifier, x, image_id, confidence=0.99, seed=0):
    """A race of one image, written without bookkeeping: its outputs are all computed."""
    calibration = classifier.calibration
    weights = calibration.weights("calibrated", calibration.timesteps)
    order = calibration.order("signal")
    rule = classifier._planner(calibration).plan(gf.Race(), confidence, None).rule
    known = {
        "weights": weights[order].tolist(),
        "variance": calibration.variance[order].tolist(),
        "correlation": calibration.correlation[np.ix_(order, order)].tolist(),
        "profile": rule.distances.tolist(),
    }
    errors, distances, leaders = [], [], []
    live, total = list(range(K)), torch.zeros(K, dtype=torch.float64)
    for taken, row in enumerate(order, 1):
        t = torch.tensor([int(calibration.timesteps[row])])
        alpha, sigma = data.levels(t)
        noise = chain_noise(seed, torch.tensor([image_id]), int(row), x.shape)
        x_t = (alpha * x.double() + sigma * noise).float()
        output = data(x_t.expand(K, -1, -1, -1), t.expand(K), torch.arange(K)).double().flatten(1)
        errors.append((noise.flatten(1) - output).square().sum(1).tolist())
        distances.append(torch.cdist(output, output).square().tolist())
        total += weights[row] * torch.tensor(errors[-1]).double()
        leader = min(live, key=lambda label: total[label].item())
        leaders.append(leader)
        for label in [label for label in live if label != leader]:
            to_leader = [
                of_step[then][label] + of_step[then][leader]
                for of_step, then in zip(distances, leaders, strict=True)
            ]
            z = [of_step[label] - of_step[leader] for of_step in errors]
            if chance(z, to_leader, taken=taken, **known) < math.exp(-rule.bound):
                live.remove(label)
        if len(live) == 1:
            break
    return leader, taken, len(live) == 1


def test_a_race_is_the_brute_force_race(calibrated):
    data, classifier = calibrated
    x, _ = data.draw(40, seed=5)
    result = classifier(x, **QUIET)
    for index in range(len(x)):
        expected = brute_force_race(data, classifier, x[index], index)
        found = (
            int(result.prediction[index]),
            int(result.steps[index].max()),
            bool(result.decided[index]),
        )
        assert found == expected


@pytest.mark.parametrize("strategy", ["race", gf.Full(3), gf.Staged((3, 1), (2, 6))])
@pytest.mark.parametrize("batch_size", [2, 37, 500])
def test_decisions_do_not_depend_on_the_batch(calibrated, strategy, batch_size):
    data, classifier = calibrated
    x, _ = data.draw(12, seed=6)
    expected = classifier(x, strategy=strategy, **QUIET)
    other = gf.DiffusionClassifier(data, data.scheduler, K, batch_size=batch_size)
    other.calibration = classifier.calibration
    for images in (x, x.split(5), iter([x[:1], x[1:1], x[1:]])):
        result = other(images, strategy=strategy, **QUIET)
        for name in ("prediction", "decided", "steps", "evaluations"):
            assert torch.equal(getattr(result, name), getattr(expected, name)), name
        torch.testing.assert_close(
            result.log_likelihood, expected.log_likelihood, rtol=1e-5, atol=0
        )


def test_an_images_noise_follows_from_its_id(calibrated):
    data, classifier = calibrated
    x, _ = data.draw(20, seed=7)
    whole = classifier(x, **QUIET)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = classifier(x[order], image_ids=order, **QUIET)
    assert torch.equal(shuffled.steps, whole.steps[order])
    torch.testing.assert_close(
        shuffled.log_likelihood, whole.log_likelihood[order], rtol=1e-5, atol=0
    )
    other = classifier(x, strategy="full", seed=1, **QUIET)
    same = classifier(x, strategy="full", **QUIET)
    assert not torch.allclose(other.log_likelihood, same.log_likelihood)


def test_batches_are_full_and_survivors_of_many_images_share_them(calibrated):
    data, classifier = calibrated
    x, _ = data.draw(300, seed=8)
    data.calls.clear()
    classifier(x, **QUIET)
    assert max(data.calls) == 64
    assert np.mean(data.calls) >= 0.8 * 64


def test_padded_batches_have_one_size(calibrated):
    data, classifier = calibrated
    x, _ = data.draw(10, seed=9)
    padded = gf.DiffusionClassifier(data, data.scheduler, K, batch_size=20, pad_to=32)
    padded.calibration = classifier.calibration
    data.calls.clear()
    result = padded(x, **QUIET)
    assert set(data.calls) == {32}
    assert torch.equal(result.steps, classifier(x, **QUIET).steps)


def test_padding_makes_a_networks_decisions_exact():
    unet = tiny_unet()
    scheduler = ddpm()
    x = torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    results = []
    for batch_size, images in ((8, x), (3, x.split(2)), (5, [x[:1], x[1:]])):
        classifier = gf.DiffusionClassifier(unet, scheduler, 4, batch_size=batch_size, pad_to=8)
        results.append(classifier(images, strategy=gf.Full(3), **QUIET))
    for result in results[1:]:
        assert torch.equal(result.log_likelihood, results[0].log_likelihood)


@pytest.mark.slow
def test_the_winner_is_dropped_as_rarely_as_stated():
    """1,000 races of close classes; calibrated on 100 images, at confidence 0.95."""
    data, classifier = gaussian(num_classes=5, distance=0.12)
    classifier.calibrate(data.draw(100, seed=2)[0], steps=6, **QUIET)
    x, _ = data.draw(1000, seed=3)
    full = classifier(x, strategy="full", **QUIET)
    race = classifier(x, confidence=0.95, **QUIET)
    assert race.evaluations.sum() < 0.7 * full.evaluations.sum()
    steps = race.steps.gather(1, full.prediction[:, None])[:, 0]
    dropped = int((steps < race.steps.amax(1)).sum())
    # More is seen with probability 0.001 where the stated error holds.
    assert dropped <= binom.ppf(0.999, 1000, 0.05)


@pytest.mark.parametrize("images", [8, 32])
def test_few_calibration_images_make_a_race_careful(images):
    data, classifier = gaussian(num_classes=5, distance=0.12)
    classifier.calibrate(data.draw(images, seed=4)[0], steps=6, **QUIET)
    x, _ = data.draw(400, seed=3)
    full = classifier(x, strategy="full", **QUIET)
    race = classifier(x, confidence=0.95, **QUIET)
    steps = race.steps.gather(1, full.prediction[:, None])[:, 0]
    assert int((steps < race.steps.amax(1)).sum()) <= binom.ppf(0.999, 400, 0.05)


def test_stronger_assumptions_cost_less(calibrated):
    data, classifier = calibrated
    x, _ = data.draw(60, seed=10)
    thresholds, evaluations = {}, {}
    for kind in ("none", "measured", "full"):
        race = gf.Race(correlation=kind)
        plan = classifier._planner(classifier.calibration).plan(race, 0.99, None)
        thresholds[kind] = plan.rule.correlation.sum()
        evaluations[kind] = classifier(x, strategy=race, **QUIET).evaluations.sum()
    assert thresholds["none"] < thresholds["measured"] < thresholds["full"]
    certain = classifier(x, confidence=0.999, **QUIET).evaluations.sum()
    assert certain > classifier(x, confidence=0.9, **QUIET).evaluations.sum()


def test_staged_keeps_the_best():
    data, classifier = gaussian()
    x, _ = data.draw(12)
    strategy = gf.Staged(keep=(3, 2, 1), steps=(2, 4, 9))
    result = classifier(x, strategy=strategy, **QUIET)
    assert torch.equal(result.steps.sort(1).values, torch.tensor([2, 2, 2, 4, 9, 9]).expand(12, 6))
    assert (result.evaluations == 2 * 6 + 2 * 3 + 5 * 2).all()
    assert result.decided.all()
    # The dropped keep their difference to the winner over the steps that both have.
    errors = torch.stack([full_errors(data, x, row, 9) for row in low_discrepancy_order(9)])
    for index in range(12):
        winner = result.prediction[index]
        for label in range(K):
            taken = int(result.steps[index, label])
            gap = (errors[:taken, index, label] - errors[:taken, index, winner]).mean()
            found = result.log_likelihood[index, winner] - result.log_likelihood[index, label]
            torch.testing.assert_close(found.double(), gap, rtol=1e-4, atol=1e-4)
        paired = errors[:, index] - errors[:, index, winner, None]
        stayed = result.steps[index] == 9
        expected = paired.std(0) / 3
        torch.testing.assert_close(
            result.standard_error[index, stayed].double(), expected[stayed], rtol=1e-4, atol=1e-5
        )


def full_errors(data, x, row, steps):
    """Errors [B, K] of one row of the grid of so many steps."""
    t = torch.tensor([int((row + 0.5) * 1000 / steps)])
    alpha, sigma = data.levels(t)
    noise = chain_noise(0, torch.arange(len(x)), int(row), x.shape[1:])
    x_t = (alpha * x.double() + sigma * noise).float()
    columns = [
        (noise - data(x_t, t.expand(len(x)), torch.full((len(x),), label)).double())
        .square()
        .flatten(1)
        .sum(1)
        for label in range(K)
    ]
    return torch.stack(columns, 1)


@pytest.mark.parametrize(
    "options", [{"budget": 2 * K + 1}, {"strategy": gf.Race(max_steps=2)}], ids=["budget", "steps"]
)
def test_what_ends_a_race_early_leaves_it_undecided(options):
    data, classifier = gaussian(distance=0.02)
    classifier.calibrate(data.draw(40)[0], **QUIET)
    x, _ = data.draw(30)
    full = classifier(x, strategy="full", **QUIET)
    result = classifier(x, **options, **QUIET)
    assert (result.evaluations <= 2 * K + 1).all()
    decided = result.decided
    assert 0 < decided.float().mean() < 0.6
    # By the steps that both have in common.
    assert torch.equal(result.prediction[decided], full.prediction[decided])
    assert not torch.equal(result.prediction, full.prediction)


def test_a_budget_ends_the_full_budget_undecided():
    data, classifier = gaussian(distance=0.02)
    x, _ = data.draw(10)
    full = classifier(x, strategy="full", budget=3 * K, **QUIET)
    assert (full.steps == 3).all() and not full.decided.any()
    stratified = classifier(x, strategy="stratified", budget=3 * K, **QUIET)
    assert (stratified.steps == 3).all() and stratified.decided.all()


def test_the_deadline_gives_back_what_there_is():
    data = GaussianClasses(ddpm())
    clock = torch.zeros(1)

    def slow(*arguments):
        clock.add_(1)
        import time

        time.sleep(0.05)
        return data(*arguments)

    classifier = gf.DiffusionClassifier(slow, data.scheduler, K, batch_size=K)
    x, labels = data.draw(50)
    result = classifier(x, strategy=gf.Full(1), deadline=0.3, labels=labels, **QUIET)
    known = result.evaluations > 0
    assert len(result) == 50 and 0 < known.sum() < 50
    assert torch.equal(result.decided, known)
    assert (result.prediction[~known] == -1).all()
    assert result.log_likelihood[~known].isnan().all()
    torch.testing.assert_close(
        result.posterior[~known].exp(), torch.full((int((~known).sum()), K), 1 / K)
    )
    with pytest.warns(UserWarning, match="deadline: the stream was left after"):
        partial = classifier(iter(x.split(1)), strategy=gf.Full(1), deadline=0.3, **QUIET)
    assert 0 < len(partial) < 50
    # Of no image anything is known.
    with (
        pytest.warns(UserWarning, match="left after 0 images"),
        pytest.raises(ValueError, match="over before the first image of the stream"),
    ):
        classifier(iter(x.split(1)), strategy=gf.Full(1), deadline=1e-9, **QUIET)


def test_no_batch_begins_when_the_deadline_passed_while_images_were_read():
    data = GaussianClasses(ddpm())
    calls = []

    def counting(*arguments):
        calls.append(arguments)
        return data(*arguments)

    classifier = gf.DiffusionClassifier(counting, data.scheduler, K, batch_size=4 * K)

    def slow_stream():
        for image in data.draw(4)[0].split(1):
            time.sleep(0.06)
            yield image

    with pytest.warns(UserWarning, match="deadline: the stream was left"):
        result = classifier(slow_stream(), strategy=gf.Full(1), deadline=0.1, **QUIET)
    assert calls == [] and not result.decided.any() and (result.prediction == -1).all()


def test_an_uncalibrated_race_calibrates_itself_and_says_so():
    data, classifier = gaussian()
    x, labels = data.draw(60)
    with pytest.warns(UserWarning, match="the first 32 images take the full budget of 144"):
        result = classifier(x, labels=labels, **QUIET)
    assert (result.evaluations[:32] == 24 * K).all()
    assert (result.evaluations[32:] < 24 * K).float().mean() > 0.5
    assert result.decided[:32].all()
    assert len(classifier.calibration.errors) == 32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier(x, **QUIET)


def test_few_images_take_the_full_budget_and_leave_no_calibration():
    data, classifier = gaussian()
    with pytest.warns(UserWarning, match="not calibrated"):
        result = classifier(data.draw(5)[0], **QUIET)
    assert (result.evaluations == 24 * K).all()
    assert classifier.calibration is None


def test_lift_over_the_null_class():
    data, classifier = gaussian()
    with_null = gf.DiffusionClassifier(data, data.scheduler, K, null_class=K)
    x, _ = data.draw(8)
    result = with_null(x, strategy=gf.Full(4), **QUIET)
    # The toy's null class is class 0.
    expected = result.log_likelihood - result.log_likelihood[:, :1]
    torch.testing.assert_close(result.lift, expected, rtol=1e-4, atol=1e-4)
    assert (result.evaluations == 4 * (K + 1)).all()
    plain = classifier(x, strategy=gf.Full(4), **QUIET)
    torch.testing.assert_close(result.log_likelihood, plain.log_likelihood)
    assert plain.lift is None
    with_null.calibrate(data.draw(60)[0], **QUIET)
    race = with_null(x, **QUIET)
    assert race.lift.isfinite().all()
    assert torch.equal(race.evaluations, race.steps.sum(1) + race.steps.amax(1))


def test_more_classes_than_a_batch_holds():
    """K = 200 in batches of 32, against batches of 512."""
    data = GaussianClasses(ddpm(), num_classes=200, distance=0.5)
    small = gf.DiffusionClassifier(data, data.scheduler, 200, batch_size=32)
    large = gf.DiffusionClassifier(data, data.scheduler, 200, batch_size=512)
    small.calibrate(data.draw(12)[0], steps=4, **QUIET)
    large.calibrate(data.draw(12)[0], steps=4, **QUIET)
    np.testing.assert_allclose(
        small.calibration.roots, large.calibration.roots, rtol=1e-4, atol=1e-4
    )
    x, _ = data.draw(20)
    first, second = small(x, **QUIET), large(x, **QUIET)
    assert torch.equal(first.steps, second.steps)
    assert torch.equal(first.prediction, second.prediction)
    assert first.evaluations.float().mean() < 0.75 * 4 * 200


def test_identical_classes_stay_undecided():
    data, classifier = gaussian()
    data.means[1] = data.means[0]
    classifier.calibrate(data.draw(60)[0], **QUIET)
    x, labels = data.draw(24)
    result = classifier(x, **QUIET)
    twins = labels < 2
    assert not result.decided[twins].any()
    assert (result.steps[twins][:, :2] == 24).all()
    assert result.decided[~twins].float().mean() > 0.8


def test_sketches_keep_distances():
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(20, 4, 32, 32, generator=generator)
    exact = (output - output[:1]).square().flatten(1).sum(1)
    found = sketch(output, 1024)
    assert found.shape == (20, 1024)
    estimate = (found - found[:1]).square().sum(1)
    assert ((estimate[1:] / exact[1:] - 1).abs() < 5 * (2 / 1024) ** 0.5).all()
    assert torch.equal(sketch(output, 4096), output.flatten(1))


def test_squared_distance_skips_a_learned_variance():
    output, target = torch.randn(5, 2, 3, 3), torch.randn(5, 1, 3, 3)
    expected = (output[:, :1] - target).square().flatten(1).sum(1)
    torch.testing.assert_close(squared_distance(output, target), expected)


def tiny_unet(**options):
    torch.manual_seed(0)
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8,),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "num_class_embeds": 5,
    }
    return UNet2DModel(**settings | options).train()


def tiny_dit():
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=4,
        norm_num_groups=2,
    )
    return model.train()


@pytest.mark.parametrize("build", [tiny_unet, tiny_dit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_diffusers_models_as_they_are(build, dtype):
    model = build().to(dtype)
    model.conv_in.eval() if hasattr(model, "conv_in") else model.pos_embed.eval()
    modes = [module.training for module in model.modules()]
    classifier = gf.DiffusionClassifier(model, ddpm(), 4, null_class=4)
    channels = model.config.in_channels
    x = torch.rand(3, channels, 8, 8) * 2 - 1
    result = classifier(x, strategy=gf.Full(2), **QUIET)
    assert [module.training for module in model.modules()] == modes
    assert result.posterior.shape == (3, 4) and result.lift.isfinite().all()
    assert result.posterior.dtype == torch.float32 and not result.posterior.requires_grad
    again = classifier(x, strategy=gf.Full(2), **QUIET)
    assert torch.equal(result.posterior, again.posterior)


def test_modes_come_back_after_an_error():
    model = tiny_unet()
    classifier = gf.DiffusionClassifier(model.forward, ddpm(), 5)
    with torch.no_grad():
        model.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="denoiser must return finite outputs, got NaN"):
        classifier(torch.zeros(1, 1, 8, 8), strategy=gf.Full(1), **QUIET)
    assert all(module.training for module in model.modules())


def test_inference_mode_and_results_outside_of_it(calibrated):
    data, classifier = calibrated
    x, _ = data.draw(40, seed=11)
    other = gf.DiffusionClassifier(data, data.scheduler, K)
    with torch.inference_mode():
        other.calibrate(x, **QUIET)
        inside = classifier(x, **QUIET)
    assert torch.equal(inside.steps, classifier(x, **QUIET).steps)
    assert other(x, **QUIET).decided.any()
    logits = torch.zeros(40, K, requires_grad=True)
    gf.distillation_loss(logits, classifier(x, **QUIET).log_likelihood).backward()
    assert logits.grad.abs().sum() > 0


def test_class_bias():
    data, classifier = gaussian()
    x, labels = data.draw(120)
    result = classifier(x, strategy=gf.Full(4), labels=labels, **QUIET)
    assert not result.class_bias().biased.any()
    # A class that swallows half of the images.
    prediction = torch.where(torch.arange(120) % 2 == 0, 3, labels)
    skewed = type(result)(**{**vars(result), "prediction": prediction})
    bias = skewed.class_bias()
    assert bias.biased[3] and bias.z[3] > 3
    assert int(bias.predicted.sum()) == 120
    assert type(result)(**{**vars(skewed), "labels": None}).class_bias().biased[3]
    with pytest.raises(ValueError, match="labels must be one an image"):
        result.class_bias(labels[:5])


@pytest.mark.parametrize("steps", [1, 2, 7, 24, 100])
def test_low_discrepancy_order_is_a_permutation_that_begins_spread_out(steps):
    order = low_discrepancy_order(steps)
    assert sorted(order) == list(range(steps))
    assert order[0] == steps // 2
