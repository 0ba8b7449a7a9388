"""What a PosteriorScorer compares: classes of equal numbers of steps, pairs of classes, and the
images of one batch alone.
"""

import copy
import math
import pickle
import random
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

import genrep_fast as gf

REDUCTIONS = ("mixture", "mean")
BATCH, CLASSES, STEPS, SHAPE = 2, 4, 6, (2, 3)
INFINITE = -math.inf


def tables(steps):
    one = torch.ones(steps, dtype=torch.float64)
    return gf.StepCoefficients(data=one, noisy=0 * one, output=-one, inv_var=one, log_norm=0 * one)


def example(seed=0):
    """x and outputs whose errors are common to all classes, but for a hundredth."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((BATCH, *SHAPE), (BATCH, 1, STEPS, *SHAPE), (BATCH, CLASSES, STEPS, *SHAPE))
    x, common, own = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    return x, common + 0.02 * own


def feed(scorer, chunks, data=None, **keywords):
    """Update with chunks (classes, steps) of `example`."""
    x, output = example() if data is None else data
    for classes, steps in chunks:
        chosen = output if classes is None else output[:, classes]
        scorer.update(x, chosen[:, :, steps], tables(len(steps)), classes=classes, **keywords)
    return scorer


def steps_of(per_location):
    """[B, K, S, *loc] of `example`, computed apart."""
    x, output = example()
    squares = (x[:, None, None] - output).square()
    return -0.5 * squares.sum(3 if per_location else (3, 4))


def paired_error(steps, reduction, leader):
    """Standard error of L_k − L_leader from all steps; leader [B, 1, *loc]."""
    count = steps.shape[2]
    index = leader.unsqueeze(2).expand(-1, 1, *steps.shape[2:])
    if reduction == "mean":
        return (steps - steps.gather(1, index)).std(2) / math.sqrt(count)
    weights = steps.softmax(2)
    return (weights - weights.gather(1, index)).square().sum(2).sqrt()


def step_chunks(seed):
    """All steps of all classes, in random pieces, orders and orders of classes."""
    generator = random.Random(seed)
    steps = generator.sample(range(STEPS), STEPS)
    cut = generator.randint(1, STEPS - 1)
    orders = [generator.sample(range(CLASSES), CLASSES) for _ in range(2)]
    return [(orders[0], steps[:cut]), (orders[1], steps[cut:])]


# Classes of unequal numbers of steps


@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_class_of_fewer_steps_is_not_ranked(reduction, per_location):
    scorer = gf.PosteriorScorer(CLASSES, reduction=reduction, per_location=per_location)
    feed(scorer, [(None, [0]), ([3, 1], [1, 2])])
    posterior = scorer.posterior(temperature=2.0)
    assert (posterior[:, [0, 2]] == INFINITE).all()
    alone = gf.posterior(scorer.log_likelihood()[:, [1, 3]], temperature=2.0)
    torch.testing.assert_close(posterior[:, [1, 3]], alone)
    torch.testing.assert_close(scorer.posterior(temperature=2.0, classes=[3, 1]), alone.flip(1))


def test_the_best_class_of_every_step_wins_when_cheaper_steps_were_seen_by_a_pruned_one():
    scorer = gf.PosteriorScorer(3, reduction="mean")
    x, one = torch.zeros(1, 1), torch.ones(1)
    elbo = gf.StepCoefficients(
        data=0 * one, noisy=0 * one, output=one, inv_var=one, log_norm=0 * one
    )
    for cost, kept in ((1.0, [0, 1, 2]), (2.0, [1, 2]), (4.0, [1, 2])):
        output = torch.tensor([cost * (1 + 0.5 * (2 - label)) for label in kept]).sqrt()
        scorer.update(x, output.reshape(1, -1, 1, 1), elbo, classes=kept)
    # By averages over different steps class 0 would win.
    assert scorer.log_likelihood().argmax() == 0
    assert scorer.posterior().argmax() == 2
    # Among the classes asked for the same rule holds.
    assert scorer.posterior(classes=[0, 1])[0].tolist() == [INFINITE, 0.0]


@pytest.mark.parametrize("classes", [[2, 0], torch.tensor([2, 0]), (np.int64(2), np.int64(0))])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_queries_are_in_the_order_of_classes(reduction, classes):
    scorer = gf.PosteriorScorer(CLASSES, reduction=reduction, paired=True)
    feed(scorer, [(None, [0, 1, 2])])
    for query in ("log_likelihood", "effective_components", "standard_error"):
        everything = getattr(scorer, query)()
        torch.testing.assert_close(getattr(scorer, query)(classes=classes), everything[:, [2, 0]])
    expected = gf.posterior(scorer.log_likelihood()[:, [2, 0]])
    torch.testing.assert_close(scorer.posterior(classes=classes), expected)
    pair = scorer.paired_standard_error(classes=classes)
    assert pair.shape == (BATCH, 2) and (pair.min(1).values == 0).all()


@pytest.mark.parametrize("rows", [(), (1,), (BATCH,)])
def test_a_prior_is_of_all_classes(rows):
    prior = torch.randn(*rows, CLASSES, dtype=torch.float64)
    scorer = feed(gf.PosteriorScorer(CLASSES), [(None, [0])])
    likelihood = scorer.log_likelihood()[:, [3, 1]]
    expected = gf.posterior(likelihood, log_prior=prior[..., [3, 1]])
    torch.testing.assert_close(scorer.posterior(prior, classes=[3, 1]), expected)
    with pytest.raises(ValueError, match="log_prior must hold all 4 classes .* got"):
        scorer.posterior(prior[..., :2], classes=[3, 1])


def test_counts_add_up_in_merged_scorers():
    one, other = gf.PosteriorScorer(CLASSES), gf.PosteriorScorer(CLASSES)
    feed(one, [(None, [0]), ([1, 2], [1])])
    feed(other, [([0, 1, 2], [2]), ([0], [3])])
    one.merge(other)
    assert (one.posterior()[0] == INFINITE).tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("classes", "error", "match"),
    [
        ([], ValueError, "classes must hold at least one class"),
        ([4], ValueError, r"classes must lie in 0\.\.\.3"),
        ([1, 1], ValueError, "classes must be distinct"),
        ([True, 0], TypeError, "classes must be ints"),
        ([0.0], TypeError, "classes must be ints"),
        ("01", TypeError, "classes must be a sequence of ints"),
        (np.arange(2), TypeError, "classes must be a sequence of ints"),
        (torch.ones(2), TypeError, "classes must be int64"),
        (torch.arange(2, device="meta"), ValueError, "classes must have values"),
    ],
)
@pytest.mark.parametrize("query", ["log_likelihood", "posterior", "paired_standard_error"])
def test_queries_refuse_classes(query, classes, error, match):
    scorer = feed(gf.PosteriorScorer(CLASSES, paired=True), [(None, [0])])
    with pytest.raises(error, match=match):
        getattr(scorer, query)(classes=classes)


# Pairs of classes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_paired_standard_error_is_that_of_all_steps(reduction, per_location, seed):
    options = {"reduction": reduction, "per_location": per_location}
    scorer = feed(gf.PosteriorScorer(CLASSES, **options, paired=True), step_chunks(seed))
    leader = scorer.log_likelihood().argmax(1, keepdim=True)
    expected = paired_error(steps_of(per_location), reduction, leader)
    torch.testing.assert_close(scorer.paired_standard_error(), expected, rtol=1e-9, atol=1e-12)
    assert (scorer.paired_standard_error().gather(1, leader) == 0).all()
    # The state is that of a scorer without pairs.
    plain = feed(gf.PosteriorScorer(CLASSES, **options), step_chunks(seed))
    for query in ("log_likelihood", "standard_error", "effective_components"):
        torch.testing.assert_close(getattr(scorer, query)(), getattr(plain, query)())


def test_common_noise_drops_out_of_the_difference():
    scorer = feed(gf.PosteriorScorer(CLASSES, reduction="mean", paired=True), [(None, range(6))])
    paired = scorer.paired_standard_error()
    assert (paired < 0.2 * scorer.standard_error()).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_pairs_of_merged_scorers_are_those_of_one(reduction):
    def scorer(chunks):
        return feed(gf.PosteriorScorer(CLASSES, reduction=reduction, paired=True), chunks)

    left, right = scorer([(None, [0, 3])]), scorer([(None, [1]), ([2, 3, 0, 1], [5])])
    left.merge(right)
    empty = scorer([])
    empty.merge(left)
    whole = scorer([(None, [0, 3, 1, 5])])
    for merged in (left, empty):
        error = merged.paired_standard_error()
        torch.testing.assert_close(error, whole.paired_standard_error())
    left.reset()
    feed(left, [(None, [2, 4])])
    alone = scorer([(None, [2, 4])])
    torch.testing.assert_close(left.paired_standard_error(), alone.paired_standard_error())


def test_classes_that_did_not_share_their_steps_have_no_paired_error():
    scorer = gf.PosteriorScorer(CLASSES, reduction="mean", paired=True)
    feed(scorer, [(None, [0]), ([0, 1], [1]), ([2, 3], [1])])
    errors = scorer.paired_standard_error()
    leader = scorer.log_likelihood().argmax(1)
    for image in range(BATCH):
        together = {0, 1} if leader[image] in (0, 1) else {2, 3}
        finite = errors[image].isfinite().nonzero().flatten().tolist()
        assert set(finite) == together
    # Pruned ones are left out of the comparison.
    scorer = gf.PosteriorScorer(CLASSES, reduction="mean", paired=True)
    feed(scorer, [(None, [0, 1]), ([1, 3], [2])])
    errors = scorer.paired_standard_error()
    assert errors[:, [0, 2]].isnan().all() and errors[:, [1, 3]].isfinite().all()
    index = scorer.log_likelihood(classes=[1, 3]).argmax(1, keepdim=True)
    expected = paired_error(steps_of(False)[:, [1, 3], :3], "mean", index)
    torch.testing.assert_close(scorer.paired_standard_error(classes=[1, 3]), expected)


def test_one_step_has_no_paired_error_and_pairs_must_be_asked_for():
    scorer = feed(gf.PosteriorScorer(CLASSES, paired=True), [(None, [0])])
    assert scorer.paired_standard_error().isnan().all()
    with pytest.raises(RuntimeError, match=r"PosteriorScorer\(\.\.\., paired=True\)"):
        feed(gf.PosteriorScorer(CLASSES), [(None, [0, 1])]).paired_standard_error()
    with pytest.raises(ValueError, match="other must have paired True, got False"):
        scorer.merge(gf.PosteriorScorer(CLASSES))
    for name in ("paired", "per_location"):
        with pytest.raises(TypeError, match=f"{name} must be True or False, got 'yes'"):
            gf.PosteriorScorer(CLASSES, **{name: "yes"})


def test_nan_reaches_the_pairs_of_its_own_class_alone():
    x, output = example()
    output[0, 2, 1] = math.nan
    scorer = gf.PosteriorScorer(CLASSES, reduction="mean", paired=True)
    feed(scorer, [(None, range(STEPS))], data=(x, output))
    errors = scorer.paired_standard_error(classes=[0, 1, 3])
    assert errors.isfinite().all()
    assert scorer.paired_standard_error()[1].isfinite().all()


# Batches


def test_another_batch_without_reset_is_refused():
    scorer = feed(gf.PosteriorScorer(CLASSES), [(None, [0])])
    before = scorer.log_likelihood()
    with pytest.raises(ValueError, match=r"x must be the images seen so far.*call reset\(\)"):
        feed(scorer, [(None, [1])], data=example(1))
    torch.testing.assert_close(scorer.log_likelihood(), before, rtol=0, atol=0)
    scorer.reset()
    feed(scorer, [(None, [1])], data=example(1))


def test_a_batch_written_over_in_place_is_refused():
    x, output = example()
    scorer = feed(gf.PosteriorScorer(CLASSES), [(None, [0])], data=(x, output))
    x.copy_(x.clone())
    feed(scorer, [(None, [1])], data=(x, output))
    x.copy_(x.flip(0))
    with pytest.raises(ValueError, match="x must be the images seen so far"):
        feed(scorer, [(None, [2])], data=(x, output))


def test_a_buffer_of_numpy_that_is_filled_again_is_refused():
    x, output = example()
    buffer = x.numpy().copy()
    scorer = feed(
        gf.PosteriorScorer(CLASSES), [(None, [0])], data=(torch.from_numpy(buffer), output)
    )
    feed(scorer, [(None, [1])], data=(torch.from_numpy(buffer), output))
    buffer[:] = buffer[::-1].copy()
    with pytest.raises(ValueError, match="x must be the images seen so far"):
        feed(scorer, [(None, [2])], data=(torch.from_numpy(buffer), output))


def test_memory_that_the_next_batch_gets_again_is_no_proof():
    scorer = gf.PosteriorScorer(CLASSES)
    output = example()[1]
    for number in range(3):
        x = torch.full((BATCH, *SHAPE), float(number), dtype=torch.float64)
        if number == 0:
            feed(scorer, [(None, [0])], data=(x, output))
        else:
            with pytest.raises(ValueError, match="x must be"):
                feed(scorer, [(None, [0])], data=(x, output))
        del x


def test_the_same_images_in_other_tensors_are_welcome():
    x, output = example()
    x[0, 0, 0] = math.nan
    scorer = gf.PosteriorScorer(CLASSES)
    images = [x, x.clone(), x[:], x.mT.contiguous().mT, x.detach().requires_grad_(), x * 1]
    with torch.inference_mode():
        images.append(x.clone())
    for step, same in enumerate(images):
        feed(scorer, [(None, [step % STEPS])], data=(same, output))
    assert scorer._count.tolist() == [len(images)] * CLASSES


def test_a_batch_id_tells_batches():
    scorer = feed(gf.PosteriorScorer(CLASSES), [(None, [0])], batch_id=7)
    # Computed again, with other last bits.
    x, output = example()
    feed(scorer, [(None, [1])], data=(x + 1e-9, output), batch_id=7)
    for other in (8, None, "7"):
        with pytest.raises(ValueError, match=r"batch_id must be 7 .*reset\(\)"):
            feed(scorer, [(None, [2])], batch_id=other)
    with pytest.raises(TypeError, match="batch_id must be .*hashable value, got Tensor"):
        feed(scorer, [(None, [2])], batch_id=torch.tensor(7))
    with pytest.raises(TypeError, match="batch_id must be .*hashable value, got list"):
        feed(scorer, [(None, [2])], batch_id=[7])
    assert scorer._count.tolist() == [2] * CLASSES
    scorer.reset()
    feed(scorer, [(None, [2])], batch_id=8)


def test_scorers_of_other_batches_are_not_merged():
    scorer = feed(gf.PosteriorScorer(CLASSES), [(None, [0])])
    with pytest.raises(ValueError, match="other must have seen the same images"):
        scorer.merge(feed(gf.PosteriorScorer(CLASSES), [(None, [1])], data=example(1)))
    named = feed(gf.PosteriorScorer(CLASSES), [(None, [1])], batch_id="a")
    with pytest.raises(ValueError, match="other must have the batch_id None"):
        scorer.merge(named)
    empty = gf.PosteriorScorer(CLASSES)
    empty.merge(named)
    with pytest.raises(ValueError, match="batch_id must be 'a'"):
        feed(empty, [(None, [0])])
    assert scorer._count.tolist() == [1] * CLASSES


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copied_scorer_goes_on(again):
    scorer = feed(gf.PosteriorScorer(CLASSES, paired=True), [(None, [0])])
    other = feed(again(scorer), [(None, [1, 2])])
    whole = feed(scorer, [(None, [1, 2])])
    torch.testing.assert_close(other.paired_standard_error(), whole.paired_standard_error())


# Two processes.


def run_rank(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    shares = ([(None, [0, 1]), ([1, 3], [5])], [([3, 2, 0, 1], [2, 3, 4])])
    for reduction in REDUCTIONS:
        for chunks in (shares, (shares[0], [])):
            options = {"reduction": reduction, "paired": True}
            scorer = feed(gf.PosteriorScorer(CLASSES, **options), chunks[rank])
            scorer.all_reduce()
            single = feed(gf.PosteriorScorer(CLASSES, **options), [*chunks[0], *chunks[1]])
            assert (scorer.posterior()[:, [0, 2]] == INFINITE).all()
            for query in ("posterior", "paired_standard_error"):
                expected = getattr(single, query)()
                torch.testing.assert_close(getattr(scorer, query)(), expected, equal_nan=True)
    scorer = feed(gf.PosteriorScorer(CLASSES), [(None, [0])], batch_id=rank)
    with pytest.raises(ValueError, match="all processes must score the same"):
        scorer.all_reduce()
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_reduce_compares_as_one_process(two_processes):
    two_processes(__file__)


if __name__ == "__main__":
    run_rank(int(sys.argv[2]), sys.argv[3])
