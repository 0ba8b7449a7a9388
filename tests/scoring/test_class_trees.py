"""A tree of classes: branches leave by representatives, and the confidence still holds."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import genrep_fast as gf
from genrep_fast.scoring.classifier.funnel import Funnel
from genrep_fast.scoring.classifier.progress import Progress
from genrep_fast.scoring.classifier.screening import Screened
from genrep_fast.scoring.classifier.tree import Branches, Judgement, Level, require_tree

# Pictures of three digits, each of 0, 1, 2.
K = 27
QUIET = {"progress": False}
SCHEDULER = DDPMScheduler(clip_sample=False)
DIGITS = 0.35 * torch.randn(3, 3, 1, 3, 6, generator=torch.Generator().manual_seed(0))
MEANS = torch.stack(
    [torch.cat([DIGITS[0, k // 9], DIGITS[1, k // 3 % 3], DIGITS[2, k % 3]], 1) for k in range(K)]
)
TREE = [[[9 * a + 3 * b + c for c in range(3)] for b in range(3)] for a in range(3)]


def denoiser(x_t, timesteps, labels):
    """Exact where class y is normal around MEANS[y] with the standard deviation ½."""
    alpha_bar = SCHEDULER.alphas_cumprod[timesteps][:, None, None, None]
    noise = x_t - alpha_bar.sqrt() * MEANS[labels]
    return (1 - alpha_bar).sqrt() * noise / (1 - 0.75 * alpha_bar)


def draw(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % K
    return MEANS[labels] + 0.5 * torch.randn(count, 1, 9, 6, generator=generator), labels


def new_classifier(**options):
    return gf.DiffusionClassifier(denoiser, SCHEDULER, K, **options)


@pytest.fixture(scope="module")
def classifier():
    found = new_classifier()
    found.calibrate(*draw(200, seed=2), steps=8, **QUIET)
    return found


def screen_of(classifier, **call):
    """What a call prepares."""
    strategy = call.pop("strategy", gf.Race())
    return classifier._prepare(strategy, 0.99, None, Funnel.of(K, **call)).screens


def test_most_classes_never_run_and_the_confidence_holds(classifier):
    x, _ = draw(270, seed=3)
    full = classifier(x, strategy="full", **QUIET)
    alone = classifier(x, **QUIET)
    result = classifier(x, tree=TREE, confidence=0.95, **QUIET)
    # 270 images at 5%: four standard deviations are 5.3%.
    assert (result.prediction == full.prediction).double().mean() > 0.95 - 0.053
    assert result.evaluations.double().mean() < 0.5 * alone.evaluations.double().mean()
    ran = result.steps > 0
    assert ran.sum(1).double().mean() < 6
    # Leaves stay with their branch: those of one parent leave together.
    of_parent = ran.view(-1, 9, 3)
    assert (of_parent.all(2) | ~of_parent.any(2)).all()
    posterior = result.posterior.double().exp()
    torch.testing.assert_close(posterior.sum(1), torch.ones(270).double(), rtol=0, atol=1e-6)
    assert result.posterior.isfinite().all()
    assert 0 < (posterior * ~ran).sum(1).max() <= 0.025 + 1e-6
    assert torch.equal(posterior.argmax(1), result.prediction)


def test_branches_leave_that_are_behind_by_the_margin(classifier):
    (screen,) = screen_of(classifier, tree=TREE).parts
    assert isinstance(screen, Branches)
    judgement = screen.judgement
    x, _ = draw(15, seed=4)
    result = classifier(x, tree=TREE, **QUIET)
    full = classifier(x, strategy="full", seed=0, **QUIET)
    # The same noise at the steps of the full budget gives the errors that the tree sees.
    other = new_classifier()
    other.calibrate(x, steps=8, seed=0, **QUIET)
    rows = screen.steps.order[: judgement.steps]
    weights = screen.steps.ordered_weights[: judgement.steps]
    errors = np.einsum("nsk,s->nk", other.calibration.errors[:, rows].astype(float), weights)
    errors /= weights.sum()
    for image in range(len(x)):
        live, evaluations = list(range(K)), 0
        for size in (9, 3):
            scores = {}
            for branch in sorted({label // size for label in live}):
                count = judgement.representatives
                places = [int((j + 0.5) * size / count) for j in range(count)]
                of_branch = [errors[image, branch * size + place] for place in sorted(set(places))]
                evaluations += len(of_branch) * judgement.steps
                scores[branch] = min(of_branch) if judgement.best else np.mean(of_branch)
            if len(scores) == 1:
                evaluations -= len(of_branch) * judgement.steps
                continue
            limit = min(scores.values()) + screen.margin
            live = [label for label in live if scores[label // size] <= limit]
        assert (result.steps[image] > 0).nonzero().flatten().tolist() == live
        assert result.evaluations[image] == evaluations + result.steps[image].sum()
    assert (full.prediction == result.prediction).double().mean() > 0.9


def test_a_branch_stays_as_long_as_it_is_behind_by_no_more_than_the_margin(classifier):
    (screen,) = screen_of(classifier, tree=TREE).parts
    live = np.array([1, 4, 10, 13, 19, 22])
    image = Screened.of_all(K)._replace(live=live)
    errors = np.array([[3.0, 5.0, 4.5, 4.5, 9.0, 3.5]])
    # By the mean the branches have 4, 4.5 and 6.25, by the best 3, 4.5 and 3.5.
    for best, margin, branches in (
        (False, 0.49, [0]),
        (False, 0.5, [0, 1]),
        (False, 2.25, [0, 1, 2]),
        (True, 0.5, [0, 2]),
        (True, 1.49, [0, 2]),
        (True, 1.5, [0, 1, 2]),
    ):
        judged = dataclasses.replace(screen, margin=margin, judgement=Judgement(2, 1, best))
        left = judged._pruned(judged.tree.parts[0], image, live, errors)
        assert sorted(set(left.live // 9)) == branches


@pytest.mark.parametrize("error", [0.02, 0.1])
def test_the_margin_is_an_order_statistic(classifier, error):
    funnel = Funnel.of(K, tree=TREE)
    basis = classifier._planner(classifier.calibration)._basis(gf.Full())
    (screen,) = funnel.screens(basis, error).parts
    passed = screen.replay(classifier.calibration, [Screened.of_all(K)] * 200)
    missed = [w not in image.live for w, image in zip(basis.winners, passed, strict=True)]
    # Of 200 images; pruning above can only bring the winner nearer.
    assert np.mean(missed) <= error
    assert screen.margin >= 0 and 0 < screen.miss <= error


def test_a_tree_after_candidates(classifier):
    def scorer(images):
        return -(images[:, None] - MEANS).square().flatten(2).sum(2)

    x, _ = draw(30, seed=5)
    candidates = gf.Candidates(scorer, keep=9)
    result = classifier(x, candidates=candidates, tree=TREE, **QUIET)
    ran = result.steps > 0
    chosen = torch.zeros(30, K, dtype=torch.bool).scatter(1, scorer(x).topk(9).indices, True)
    assert not (ran & ~chosen).any()
    assert ran.sum(1).double().mean() < 9
    assert (result.posterior.double().exp().sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("strategy", ["race", gf.Full(3), gf.Staged((3, 1), (2, 6))])
@pytest.mark.parametrize("batch_size", [3, 13])
def test_a_tree_does_not_depend_on_the_batch(classifier, strategy, batch_size):
    x, _ = draw(6, seed=6)
    expected = classifier(x, strategy=strategy, tree=TREE, **QUIET)
    other = new_classifier(batch_size=batch_size)
    other.calibration = classifier.calibration
    result = other(x.split(4), strategy=strategy, tree=TREE, **QUIET)
    for name in ("prediction", "steps", "evaluations"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    torch.testing.assert_close(result.posterior, expected.posterior, rtol=1e-4, atol=1e-4)


def test_estimates_count_the_tree(classifier):
    x, _ = draw(100, seed=7)
    for strategy in ("race", "full", gf.Full(5), gf.Staged((3, 1), (2, 6))):
        estimate = classifier.estimate(strategy=strategy, tree=TREE)
        found = classifier(x, strategy=strategy, tree=TREE, **QUIET).evaluations.double()
        assert estimate.evaluations == pytest.approx(found.mean().item(), rel=0.25)
        assert found.max() <= estimate.most


def test_dictionaries_and_uneven_trees(classifier):
    x, _ = draw(10, seed=8)
    expected = classifier(x, tree=TREE, **QUIET)
    as_dict = {
        f"{a}": {f"{b}": tuple(leaves) for b, leaves in enumerate(branch)}
        for a, branch in enumerate(TREE)
    }
    found = classifier(x, tree=as_dict, **QUIET)
    assert torch.equal(found.steps, expected.steps)
    uneven = {"one": 4, "some": range(4), "rest": [np.int64(5), [list(range(6, K))]]}
    result = classifier(x, tree=uneven, **QUIET)
    assert (result.steps > 0).any(1).all()
    tree = require_tree(uneven, K)
    assert tree.leaves == (4, 0, 1, 2, 3, *range(5, K))
    first = Level(tree, 0)
    assert first.branch[[4, 0, 3, 5, 26]].tolist() == [0, 1, 1, 2, 2]
    assert first.representatives(np.arange(K), 1).tolist() == [2, 4, 16]
    # One branch is left, or one class of each.
    assert first.representatives(np.array([0, 1, 2]), 1) is None
    assert first.representatives(np.array([0, 4, 20]), 4) is None


def test_a_tree_that_saves_nothing_is_left_out():
    # All classes are alike but for a few images' noise: no branch could leave.
    classifier = gf.DiffusionClassifier(
        lambda x, t, labels: x * (1 + 1e-6 * labels.view(-1, 1, 1, 1)), SCHEDULER, 4
    )
    x = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    classifier.calibrate(x, steps=2, **QUIET)
    alone = classifier(x, strategy="full", **QUIET)
    result = classifier(x, strategy="full", tree=[[0, 1], [2, 3]], **QUIET)
    assert result.evaluations.double().mean() <= alone.evaluations.double().mean()


def test_a_race_calibrates_itself_before_a_tree():
    x, _ = draw(50, seed=9)
    classifier = new_classifier()
    with pytest.warns(UserWarning, match="not calibrated"):
        result = classifier(x, tree=TREE, **QUIET)
    assert (result.steps[:32] == 24).all()
    assert (result.steps[32:] == 0).any(1).double().mean() > 0.5


def test_a_deadline_and_a_budget_before_a_tree(classifier):
    x, _ = draw(20, seed=10)
    late = classifier(x, tree=TREE, deadline=1e-9, **QUIET)
    assert (late.prediction == -1).all() and not late.decided.any()
    limited = classifier(x, strategy="full", tree=TREE, budget=12, **QUIET)
    assert (limited.evaluations <= 12).all()
    assert (limited.prediction >= 0).any() and not limited.decided.all()
    # Less than the tree alone takes.
    limited = classifier(x, strategy="full", tree=TREE, budget=4, **QUIET)
    assert (limited.evaluations <= 4).all() and (limited.prediction == -1).all()


@pytest.mark.parametrize("call", [{"tree": TREE}, {}])
def test_the_bar_counts_what_precedes_the_strategy(call, monkeypatch):
    told = []
    monkeypatch.setattr(Progress, "after_batch", lambda bar, evaluations: told.append(evaluations))
    found = new_classifier()
    x, _ = draw(60, seed=2)
    if call:
        found.calibrate(x, steps=4, **QUIET)
        told.clear()
        result = found(x, **call, **QUIET)
    else:
        # The race that calibrates itself has two parts, whose batches are counted alike.
        with pytest.warns(UserWarning, match="not calibrated"):
            result = found(x, **QUIET)
    assert min(told) > 0
    assert sum(told) == pytest.approx(result.cost.sum().item())


LOOP = [0]
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([[0, 1], [2]], r"name all 4 classes, it misses 3$"),
        ({"a": [0]}, r"name all 4 classes, it misses 1, 2, 3$"),
        ([[0, 1], [2, 3, 1]], r"name each class once, got 1 again at tree\[1\]\[2\]"),
        ([[0, 1], [2, 4]], r"name classes from 0 to 3, got 4 at tree\[1\]\[1\]"),
        ([[0, 1], [2, -1]], r"name classes from 0 to 3, got -1"),
        ([], "not have empty branches, got one at tree$"),
        ({}, "not have empty branches, got one at tree$"),
        ({"a": [0, 1], "b": {}}, r"not have empty branches, got one at tree\['b'\]"),
        ([[0, 1], [2, "3"]], r"name classes by their index, got '3' at tree\[1\]\[1\]"),
        ([[0, 1], [2, True]], r"name classes by their index, got True"),
        (
            [[0, 1], [2, 3.0]],
            r"be nested dictionaries, lists and class indices, got float at tree\[1\]\[1\]",
        ),
        ([[0, 1], None], r"be nested dictionaries, lists and class indices, got NoneType"),
        ("0123", "be nested dictionaries or lists of classes, got str"),
        (7, "be nested dictionaries or lists of classes, got int"),
        ([0, 1, 2, 3], "have branches of several classes, got a list of classes alone"),
        ([[[0, 1, 2, 3]]], "have branches of several classes"),
        (LOOP, "(not nest more than 64 levels|name each class once)"),
    ],
)
def test_trees_that_are_refused(tree, message):
    with pytest.raises((TypeError, ValueError), match=f"^tree must {message}"):
        require_tree(tree, 4)


def test_a_tree_needs_a_calibration():
    with pytest.raises(ValueError, match="tree needs a calibration; call calibrate first"):
        new_classifier()(draw(1)[0], strategy="full", tree=TREE, **QUIET)
