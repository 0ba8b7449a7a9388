"""PosteriorScorer: streaming equals one call, whatever the chunks, their order, the number of
states and of processes.
"""

import itertools
import math
import random
import sys

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import genrep_fast as gf
from genrep_fast.scoring import class_lists
from genrep_fast.scoring import scorer as posterior_scorer

REDUCTIONS = ("mixture", "mean")
LOCATIONS = (False, True)
BATCH, CLASSES, STEPS, SHAPE = 2, 5, 7, (3, 4)  # SHAPE: C, location


def coefficients(steps, smallest=0.5):
    std = torch.linspace(smallest, 2, max(steps, 1), dtype=torch.float64)[:steps]
    log_norm = -0.5 * torch.log(2 * math.pi * std**2)
    tables = {
        "data": torch.ones(steps),
        "noisy": -std,
        "output": -std.flip(0),
        "inv_var": 1 / std**2,
        "log_norm": log_norm,
    }
    return gf.StepCoefficients(**{name: table.double() for name, table in tables.items()})


def rows(tables, steps):
    names = ("data", "noisy", "output", "inv_var", "log_norm")
    return gf.StepCoefficients(**{name: getattr(tables, name)[steps] for name in names})


def example(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((BATCH, *SHAPE), (BATCH, CLASSES, STEPS, *SHAPE), (BATCH, 1, STEPS, *SHAPE))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def feed(scorer, chunks, dtype=torch.float64):
    """Update with the given (classes, steps) of the example; steps and classes are lists, classes
    None for all.
    """
    x, model_output, x_t = example(dtype)
    tables = coefficients(STEPS)
    for classes, steps in chunks:
        chunk = (
            model_output[:, :, steps] if classes is None else model_output[:, classes][:, :, steps]
        )
        scorer.update(x, chunk, rows(tables, steps), x_t[:, :, steps], classes=classes)
    return scorer


def one_shot(reduction, per_location=False, steps=slice(None)):
    x, model_output, x_t = example()
    tables = rows(coefficients(STEPS), steps)
    return gf.log_likelihood(
        x,
        model_output[:, :, steps],
        tables,
        x_t[:, :, steps],
        reduction=reduction,
        per_location=per_location,
    )


def step_log_likelihoods(per_location):
    """[B, K, S, *loc], each step alone"""
    return torch.stack([one_shot("mean", per_location, [step]) for step in range(STEPS)], 2)


def random_chunks(seed):
    """All steps and classes in random pieces and a random order."""
    generator = random.Random(seed)

    def pieces(length):
        order = generator.sample(range(length), length)
        cuts = sorted(generator.sample(range(1, length), generator.randint(0, 3)))
        return [order[start:stop] for start, stop in itertools.pairwise([0, *cuts, length])]

    chunks = [(classes, steps) for classes in pieces(CLASSES) for steps in pieces(STEPS)]
    return generator.sample(chunks, len(chunks))


def queries(scorer):
    return (
        scorer.log_likelihood(),
        scorer.effective_components(),
        scorer.standard_error(),
        scorer.posterior(temperature=3.0),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("per_location", LOCATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_random_chunks_equal_one_call(reduction, per_location, seed):
    scorer = feed(
        gf.PosteriorScorer(CLASSES, reduction=reduction, per_location=per_location),
        random_chunks(seed),
    )
    expected = one_shot(reduction, per_location)
    torch.testing.assert_close(scorer.log_likelihood(), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        scorer.posterior(temperature=3.0), gf.posterior(expected, temperature=3.0)
    )


@pytest.mark.parametrize("per_location", LOCATIONS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_effective_components_and_standard_error(reduction, per_location):
    scorer = feed(
        gf.PosteriorScorer(CLASSES, reduction=reduction, per_location=per_location),
        random_chunks(0),
    )
    steps = step_log_likelihoods(per_location)
    if reduction == "mean":
        components = torch.full_like(steps[:, :, 0], STEPS)
        error = steps.std(2) / math.sqrt(STEPS)
    else:
        weights = steps.softmax(2)
        components = 1 / weights.square().sum(2)
        error = (weights.square().sum(2) - 1 / STEPS).sqrt()
    torch.testing.assert_close(scorer.effective_components(), components)
    torch.testing.assert_close(scorer.standard_error(), error)


def test_the_standard_error_is_that_of_repeated_draws():
    """Delta method: the spread of L over independent sets of steps, within 3 % for 4000 sets of 400
    nearly even steps.
    """
    generator = torch.Generator().manual_seed(0)
    sets, steps = 4000, 400
    one = torch.ones(steps, dtype=torch.float64)
    tables = gf.StepCoefficients(
        data=0 * one, noisy=0 * one, output=one, inv_var=one, log_norm=0 * one
    )
    scorer = gf.PosteriorScorer(1)
    scorer.update(
        torch.zeros(sets, 1).double(),
        torch.randn(sets, 1, steps, 1, generator=generator, dtype=torch.float64),
        tables,
    )
    assert scorer.standard_error().mean().item() == pytest.approx(
        scorer.log_likelihood().std().item(), rel=0.03
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_merge_is_associative_and_keeps_the_other(reduction):
    chunks = [([0, 3], [0, 1]), ([1, 2, 4], [2]), ([0], [3, 4, 5]), ([4, 1], [5, 6])]

    def scorers():
        parts = [
            feed(gf.PosteriorScorer(CLASSES, reduction=reduction), [chunk]) for chunk in chunks
        ]
        return [*parts, gf.PosteriorScorer(CLASSES, reduction=reduction)]

    left = scorers()
    for other in left[1:]:
        left[0].merge(other)
    right = scorers()
    for index in reversed(range(4)):
        right[index].merge(right[index + 1])
    empty = gf.PosteriorScorer(CLASSES, reduction=reduction)
    empty.merge(left[0])
    everything = feed(gf.PosteriorScorer(CLASSES, reduction=reduction), chunks)
    for scorer in (left[0], right[0], empty):
        torch.testing.assert_close(queries(scorer), queries(everything), equal_nan=True)
    torch.testing.assert_close(queries(left[2]), queries(scorers()[2]), equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_classes_with_different_counts(reduction):
    counts = (0, 1, 2, 4, 7)
    scorer = gf.PosteriorScorer(CLASSES, reduction=reduction)
    feed(
        scorer, [(torch.tensor([index]), list(range(count))) for index, count in enumerate(counts)]
    )
    likelihood = scorer.log_likelihood()
    for index, count in enumerate(counts[1:], start=1):
        torch.testing.assert_close(
            likelihood[:, index], one_shot(reduction, steps=list(range(count)))[:, index]
        )
    assert (likelihood[:, 0] == -math.inf).all() and (scorer.posterior()[:, 0] == -math.inf).all()
    assert (scorer.effective_components()[:, :2] == torch.tensor([0.0, 1.0])).all()
    assert torch.equal(
        scorer.standard_error().isnan(), torch.tensor([[True, True, False, False, False]] * BATCH)
    )


@pytest.mark.parametrize("classes", [[3, 0], torch.tensor([3, 0])])
def test_classes_as_list_and_as_tensor(classes):
    x, model_output, x_t = example()
    scorer = gf.PosteriorScorer(CLASSES)
    scorer.update(x, model_output[:, [3, 0]], coefficients(STEPS), x_t, classes=classes)
    expected = one_shot("mixture")
    expected[:, [1, 2, 4]] = -math.inf
    torch.testing.assert_close(scorer.log_likelihood(), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_extreme_steps(reduction):
    """A step without likelihood, gaps of 1e6 nats and NaN, chunk by chunk, as in one call; NaN
    stays in its entry.
    """
    output = torch.zeros(1, 4, 3, 1)
    output[0, 0] = torch.tensor([[0.0], [1500.0], [1.0]])  # a gap of 1.1e6 nats
    output[0, 1] = torch.tensor([[1e30], [1.0], [1e30]])  # squares overflow: -inf
    output[0, 2] = 1e30
    output[0, 3, 1] = math.nan
    one = torch.ones(3)
    tables = gf.StepCoefficients(
        data=one, noisy=0 * one, output=-one, inv_var=one, log_norm=0 * one
    )
    scorer = gf.PosteriorScorer(4, reduction=reduction)
    for step in range(3):
        scorer.update(torch.zeros(1, 1), output[:, :, [step]], rows(tables, [step]))
    expected = gf.log_likelihood(torch.zeros(1, 1), output, tables, reduction=reduction)
    torch.testing.assert_close(scorer.log_likelihood(), expected, equal_nan=True)
    assert expected.isnan().tolist() == [[False, False, False, True]]


def test_low_precision_chunks_keep_a_float64_state():
    for dtype in (torch.float32, torch.bfloat16):
        scorer = feed(gf.PosteriorScorer(CLASSES), random_chunks(1), dtype)
        assert scorer.log_likelihood().dtype == torch.float32
        x, model_output, x_t = example(dtype)
        torch.testing.assert_close(
            scorer.log_likelihood(), gf.log_likelihood(x, model_output, coefficients(STEPS), x_t)
        )
    scorer.merge(feed(gf.PosteriorScorer(CLASSES), random_chunks(1)))
    assert scorer.log_likelihood().dtype == torch.float64


def test_the_spread_of_a_long_float32_chunk():
    """Steps near -1e4 nats that differ by 0.01: in float32 the mean of a chunk alone would be 1e-3
    off.
    """
    output = 141 + 1e-4 * torch.randn(1, 1, 1009, 1, generator=torch.Generator().manual_seed(0))
    one = torch.ones(1009)
    scorer = gf.PosteriorScorer(1, reduction="mean")
    scorer.update(
        torch.zeros(1, 1),
        output,
        gf.StepCoefficients(data=one, noisy=0 * one, output=one, inv_var=one, log_norm=0 * one),
    )
    steps = (-0.5 * output.square()).double().flatten()
    torch.testing.assert_close(
        scorer.standard_error().item(), steps.std().item() / math.sqrt(1009), rtol=1e-6, atol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_twenty_thousand_updates_lose_nothing(reduction):
    """Against the float64 sum of the same float32 steps; class 1's terms are 1e4 nats from 0, where
    float32 sums lose them.
    """
    updates = 20_000
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(updates, 1, 2, 1, 1, generator=generator) + torch.tensor(
        [0.0, 141.0]
    ).reshape(2, 1, 1)
    scorer = gf.PosteriorScorer(2, reduction=reduction)
    one = torch.ones(1)
    x, tables = (
        torch.zeros(1, 1),
        gf.StepCoefficients(data=0 * one, noisy=0 * one, output=one, inv_var=one, log_norm=0 * one),
    )
    for step in range(updates):
        scorer.update(x, output[step], tables)
    steps = (-0.5 * output.square()).double().reshape(updates, 2)
    expected = steps.mean(0) if reduction == "mean" else steps.logsumexp(0) - math.log(updates)
    error = (
        (
            scorer._state[0]
            if reduction == "mean"
            else scorer._state[0] + scorer._state[1].log() - math.log(updates)
        )
        / expected
        - 1
    ).abs()
    print(f"{reduction}: relative error {error.max().item():.3g}, tolerance 1e-6")
    assert error.max() < 1e-6
    torch.testing.assert_close(scorer.log_likelihood()[0].double(), expected, rtol=1e-6, atol=0)


def distances(x, output, std):
    """Log-likelihoods of N(x; o, std² I), float64 [B, K, S], for x [B, D], o [K, S, D], std [S]"""
    squares = (x.double()[:, None, None] - output.double()).square().sum(-1)
    return -0.5 * squares / std**2 - x.shape[1] * (std.log() + 0.5 * math.log(2 * math.pi))


@pytest.mark.parametrize(("classes", "steps"), [(20_000, 3), (3, 1000)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_many_classes_and_many_steps(reduction, classes, steps):
    generator = torch.Generator().manual_seed(0)
    x, output = (
        torch.randn(2, 5, generator=generator),
        torch.randn(classes, steps, 5, generator=generator),
    )
    std = torch.linspace(0.3, 3, steps, dtype=torch.float64)
    one = torch.ones_like(std)
    tables = {
        "data": one,
        "noisy": 0 * one,
        "output": -one,
        "inv_var": 1 / std**2,
        "log_norm": -(std.log() + 0.5 * math.log(2 * math.pi)),
    }
    scorer = gf.PosteriorScorer(classes, reduction=reduction)
    half = classes // 2
    for labels in (list(range(half, classes)), torch.arange(half)):
        for chunk in torch.arange(steps).split(400):
            part = gf.StepCoefficients(
                **{name: table[chunk].float() for name, table in tables.items()}
            )
            scorer.update(x, output[labels][:, chunk], part, classes=labels)
    expected = distances(x, output, std)
    expected = expected.mean(2) if reduction == "mean" else expected.logsumexp(2) - math.log(steps)
    torch.testing.assert_close(scorer.log_likelihood().double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        scorer.posterior().double().exp(), expected.softmax(1), rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize(
    ("centers", "expected"),
    [
        ([0.0, 1500.0, 2000.0, 2500.0], [1, 0, 0, 0]),  # gaps of more than 1e6 nats
        ([1500.0, 2000.0, 1500.0, 1500.0], [1 / 3, 0, 1 / 3, 1 / 3]),  # tied at -1e6 nats
        ([7.0, 7.0, 7.0, 7.0], [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
    ],
)
def test_one_hot_tied_and_uniform_posteriors(centers, expected):
    one = torch.ones(2)
    tables = gf.StepCoefficients(
        data=one, noisy=0 * one, output=-one, inv_var=one, log_norm=0 * one
    )
    scorer = gf.PosteriorScorer(4)
    scorer.update(torch.zeros(1, 1), torch.tensor(centers).reshape(4, 1, 1).expand(4, 2, 1), tables)
    torch.testing.assert_close(
        scorer.posterior().exp(), torch.tensor([expected], dtype=torch.float32)
    )
    excluded = scorer.posterior(log_prior=torch.tensor([-math.inf, 0, 0, 0])).exp()
    assert excluded[0, 0] == 0 and excluded.sum().item() == pytest.approx(1)


def test_nan_reaches_the_posterior_of_its_own_image_alone():
    x, model_output, x_t = example(torch.float32)
    model_output[1, 2, 3] = math.nan
    scorer = gf.PosteriorScorer(CLASSES)
    scorer.update(x, model_output, coefficients(STEPS), x_t)
    likelihood, clean = scorer.log_likelihood(), one_shot("mixture").float()
    assert likelihood.isnan().nonzero().tolist() == [[1, 2]]
    torch.testing.assert_close(likelihood[~likelihood.isnan()], clean[~likelihood.isnan()])
    assert scorer.posterior()[1].isnan().all() and scorer.posterior()[0].isfinite().all()


class RecordedOperators(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(function.overloadpacket._qualified_op_name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("classes", [None, [4, 0, 2, 1, 3], torch.arange(CLASSES)])
@pytest.mark.parametrize("shared", [False, True])
def test_a_repeated_update_calls_the_kernel_and_nothing_else(monkeypatch, classes, shared):
    """Nothing else that a CUDA graph could not capture or that a device would have to be waited
    for.
    """
    x, model_output, x_t = example(torch.float32)
    chunks = [
        gf.StepCoefficients(*coefficients(STEPS).scoring_tables(torch.float32)) for _ in range(2)
    ]
    scorer = gf.PosteriorScorer(CLASSES)
    model_output, x_t = (model_output[0], x_t[0]) if shared else (model_output, x_t)
    scorer.update(x, model_output, chunks[0], x_t, classes)
    monkeypatch.setattr(posterior_scorer, "chunk_arguments", None)
    with RecordedOperators() as recorded:
        scorer.update(x, model_output, chunks[1], x_t, classes)
    assert [name for name in recorded.names if name != "aten::unsqueeze"] == [
        "genrep_fast::score_update"
    ]


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"x": example(torch.bfloat16)[0].double()}, TypeError, "float64 if and only if"),
        ({"x": example(torch.float32)[0].tolist()}, TypeError, "x must be a tensor, got list"),
        ({"model_output": example(torch.float32)[1][:, :4]}, ValueError, "all 5 classes"),
        (
            {"model_output": example(torch.float32)[1].to("meta")},
            ValueError,
            "model_output must be on cpu",
        ),
        ({"x_t": None}, ValueError, "x_t must be given"),
        ({"x_t": example(torch.float32)[2].long()}, TypeError, "x_t must be float32"),
        ({"coefficients": None}, TypeError, "coefficients must be StepCoefficients"),
        (
            {"coefficients": coefficients(STEPS - 1)},
            ValueError,
            "model_output must have the coefficients' 6 steps",
        ),
        (
            {"coefficients": coefficients(STEPS, smallest=0.0)},
            ValueError,
            r"rows \[0\] .* cannot be scored",
        ),
        (
            {"coefficients": coefficients(STEPS).to("meta")},
            ValueError,
            "coefficients must be on cpu",
        ),
    ],
)
def test_an_update_unlike_the_one_before_is_checked(changed, error, match):
    arguments = dict(zip(("x", "model_output", "x_t"), example(torch.float32), strict=True)) | {
        "coefficients": coefficients(STEPS)
    }
    scorer = gf.PosteriorScorer(CLASSES)
    for _ in range(2):
        scorer.update(**arguments)
        with pytest.raises(error, match=match):
            scorer.update(**arguments | changed)


def test_a_tensor_of_classes_is_checked_again_when_it_has_changed():
    x, model_output, x_t = example()
    classes = torch.arange(CLASSES)
    scorer = gf.PosteriorScorer(CLASSES)
    scorer.update(x, model_output, coefficients(STEPS), x_t, classes)
    classes[0] = CLASSES
    for given in (classes, classes.clone()):
        with pytest.raises(ValueError, match="classes must lie in"):
            scorer.update(x, model_output, coefficients(STEPS), x_t, given)
    with torch.inference_mode():
        classes = torch.arange(CLASSES).flip(0)
        scorer.update(x, model_output, coefficients(STEPS), x_t, classes)
        classes[0] = 0
        with pytest.raises(ValueError, match="classes must be distinct"):
            scorer.update(x, model_output, coefficients(STEPS), x_t, classes)


def test_lists_of_classes_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(class_lists, "_KEPT_CLASS_LISTS", 3)
    scorer = feed(
        gf.PosteriorScorer(CLASSES),
        [(list(labels), [0]) for labels in itertools.permutations(range(CLASSES), 2)],
    )
    assert len(scorer._classes._kept) <= 3
    torch.testing.assert_close(scorer._count, torch.full((CLASSES,), 2 * (CLASSES - 1)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reset_starts_anew_in_the_same_memory(reduction):
    scorer = gf.PosteriorScorer(CLASSES, reduction=reduction)
    scorer.reset()
    feed(scorer, random_chunks(2))
    memory = scorer._state.data_ptr(), scorer._count.data_ptr()
    scorer.reset()
    assert (scorer.log_likelihood() == -math.inf).all()
    feed(scorer, [(None, [1, 4])])
    torch.testing.assert_close(scorer.log_likelihood(), one_shot(reduction, steps=[1, 4]))
    assert (scorer._state.data_ptr(), scorer._count.data_ptr()) == memory


def test_reset_forgets_float64():
    scorer = gf.PosteriorScorer(CLASSES)
    feed(scorer, random_chunks(2))
    scorer._dtype = torch.float64
    scorer.reset()
    assert scorer.log_likelihood().dtype == torch.float32


def test_kept_lists_of_classes_are_of_ints_alone():
    x, output = torch.zeros(1, 2), torch.zeros(1, 3, 1, 2)
    tables = torch.ones(1)
    coefficients = gf.StepCoefficients(
        data=tables, noisy=0 * tables, output=-tables, inv_var=tables, log_norm=tables
    )
    scorer = gf.PosteriorScorer(3)
    scorer.update(x, output, coefficients, classes=[0, 1, 2])
    for classes in ([0.0, 1.0, 2.0], [False, True, 2], [[0], [1], [2]], 3):
        with pytest.raises(TypeError, match="classes must be"):
            scorer.update(x, output, coefficients, classes=classes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_captures_updates():
    x, model_output, x_t = (tensor.cuda() for tensor in example(torch.float32))
    tables = coefficients(STEPS).to("cuda", torch.float32)
    chunks = [
        (labels, model_output[:, labels].contiguous())
        for labels in ([4, 0, 2], torch.tensor([1, 3], device="cuda"))
    ]
    scorer = gf.PosteriorScorer(CLASSES)

    def score():
        scorer.reset()
        for labels, chunk in chunks:
            scorer.update(x, chunk, tables, x_t, labels)
        return scorer.posterior(temperature=3.0)

    score()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = score()
    x.copy_(x.flip(0))
    graph.replay()
    expected = gf.posterior(gf.log_likelihood(x, model_output, tables, x_t), temperature=3.0)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_the_state_is_small_and_carries_no_gradient():
    x, model_output, x_t = (tensor.requires_grad_() for tensor in example())
    scorer = gf.PosteriorScorer(CLASSES)
    scorer.update(x, model_output, coefficients(STEPS), x_t)
    assert not any(result.requires_grad for result in queries(scorer))
    assert scorer._state.numel() == 3 * BATCH * CLASSES


def test_an_empty_chunk_and_an_empty_batch():
    scorer = feed(gf.PosteriorScorer(CLASSES), [([], [0, 1]), (None, [])])
    assert (scorer.log_likelihood() == -math.inf).all()
    scorer = gf.PosteriorScorer(CLASSES)
    scorer.update(
        torch.zeros(0, 3), torch.zeros(CLASSES, 2, 3), coefficients(2), torch.zeros(1, 1, 2, 3)
    )
    assert scorer.posterior().shape == (0, CLASSES)


def test_prior_and_temperature_reach_the_posterior():
    prior = torch.linspace(-3, 0, CLASSES, dtype=torch.float64)
    scorer = feed(gf.PosteriorScorer(CLASSES), [(None, [0, 1])])
    expected = gf.posterior(scorer.log_likelihood(), log_prior=prior, temperature=0.5)
    torch.testing.assert_close(scorer.posterior(prior, 0.5), expected)


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        (
            {"x": torch.zeros(3, *SHAPE).double(), "model_output": example()[1][0], "x_t": None},
            ValueError,
            "x_t must be given",
        ),
        (
            {
                "x": torch.zeros(3, *SHAPE).double(),
                "model_output": example()[1][0],
                "x_t": example()[2][:1],
            },
            ValueError,
            r"\(2, 5\), got \(3, 5\)",
        ),
        (
            {"model_output": example()[1][:, :4]},
            ValueError,
            "all 5 classes where classes is None, got 4",
        ),
        ({"classes": [0, 1, 2, 3]}, ValueError, r"classes must be \[5\] .* got \(4,\)"),
        (
            {"classes": [0, 1, 2, 3, 5]},
            ValueError,
            r"classes must lie in 0\.\.\.4, got \[0, 1, 2, 3, 5\]",
        ),
        ({"classes": [0, 1, 2, 3, -1]}, ValueError, "classes must lie in"),
        ({"classes": torch.tensor([0, 1, 2, 2, 4])}, ValueError, "classes must be distinct, got"),
        (
            {"classes": torch.tensor([0.0, 1, 2, 3, 4])},
            TypeError,
            "classes must be int64, got torch.float32",
        ),
        ({"classes": [0, 1, 2, 3, 4.0]}, TypeError, "classes must be ints"),
        ({"x_t": example()[2][:, :, :2]}, ValueError, "x_t must have 1 step"),
    ],
)
def test_update_refuses_and_keeps_the_state(changed, error, match):
    scorer = feed(gf.PosteriorScorer(CLASSES), random_chunks(0))
    before = queries(scorer)
    arguments = (
        dict(zip(("x", "model_output", "x_t"), example(), strict=True))
        | {"coefficients": coefficients(STEPS)}
        | changed
    )
    with pytest.raises(error, match=match):
        scorer.update(**arguments)
    torch.testing.assert_close(queries(scorer), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an integer, got 2.0"),
        ({"num_classes": True}, TypeError, "num_classes must be an integer, got True"),
        ({"num_classes": 2, "reduction": "max"}, ValueError, "reduction must be .* got 'max'"),
    ],
)
def test_construction_refuses(arguments, error, match):
    with pytest.raises(error, match=match):
        gf.PosteriorScorer(**arguments)


@pytest.mark.parametrize(
    ("other", "error", "match"),
    [
        (None, TypeError, "other must be a PosteriorScorer, got NoneType"),
        (gf.PosteriorScorer(4), ValueError, "num_classes 5, got 4"),
        (
            gf.PosteriorScorer(CLASSES, reduction="mean"),
            ValueError,
            "reduction 'mixture', got 'mean'",
        ),
        (
            gf.PosteriorScorer(CLASSES, per_location=True),
            ValueError,
            "per_location False, got True",
        ),
    ],
)
def test_merge_refuses(other, error, match):
    with pytest.raises(error, match=match):
        feed(gf.PosteriorScorer(CLASSES), [(None, [0])]).merge(other)


def test_merging_other_images_is_refused():
    other = gf.PosteriorScorer(CLASSES)
    other.update(
        torch.zeros(3, 1), torch.zeros(CLASSES, 1, 1), coefficients(1), torch.zeros(1, 1, 1, 1)
    )
    with pytest.raises(
        ValueError, match=r"other must fit the images seen so far.*\(2, 5\), got \(3, 5\)"
    ):
        feed(gf.PosteriorScorer(CLASSES), [(None, [0])]).merge(other)


@pytest.mark.parametrize(
    "query", ["log_likelihood", "posterior", "effective_components", "standard_error"]
)
def test_queries_before_the_first_update_are_refused(query):
    with pytest.raises(RuntimeError, match="call update first"):
        getattr(gf.PosteriorScorer(2), query)()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_update_compiles_without_a_graph_break(backend):
    x, model_output, x_t = example(torch.float32)
    chunk = (x, model_output, x_t, coefficients(STEPS).scoring_tables(torch.float32))

    def update(count, state):
        torch.ops.genrep_fast.score_update(*chunk, None, "mixture", False, count, state)
        return state[0] + state[1].log()

    results = []
    for function in (update, torch.compile(update, fullgraph=True, backend=backend)):
        scorer = feed(gf.PosteriorScorer(CLASSES), [([1], [0])])
        results.append((function(scorer._count, scorer._state), scorer._count, scorer._state))
    torch.testing.assert_close(*results)


# Two processes. Rank 0 sees two chunks, rank 1 one; then rank 1 alone nothing, then nobody
# anything.
SHARES = ([(None, [0, 1]), ([0, 3], [2, 3])], [([1, 0, 4], [4, 5, 6])])


def run_rank(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for reduction, per_location in itertools.product(REDUCTIONS, LOCATIONS):
        options = {"reduction": reduction, "per_location": per_location}
        for shares in (SHARES, (SHARES[0], [])):
            scorer = feed(gf.PosteriorScorer(CLASSES, **options), shares[rank])
            scorer.all_reduce()
            single = feed(gf.PosteriorScorer(CLASSES, **options), [*shares[0], *shares[1]])
            torch.testing.assert_close(queries(scorer), queries(single), equal_nan=True)
    empty = gf.PosteriorScorer(CLASSES)
    empty.all_reduce()
    assert empty._state is None
    with pytest.raises(ValueError, match="all processes must score the same classes"):
        gf.PosteriorScorer(CLASSES + rank).all_reduce()
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_reduce_equals_one_process(two_processes):
    two_processes(__file__)


if __name__ == "__main__":
    run_rank(int(sys.argv[2]), sys.argv[3])
