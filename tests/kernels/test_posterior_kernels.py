"""Posterior and distillation on every compiled backend, against the reference in float64."""

import itertools
import math

import pytest
import torch

from genrep_fast.reference import posterior as posterior_reference
from kernel_cases import (
    BF16,
    DEVICE,
    F16,
    F32,
    LAYOUTS,
    assert_accurate,
    assert_equal_bits,
    double,
    operators,
    prior_of,
    random,
)

pytestmark = [
    pytest.mark.usefixtures("backend"),
    # Of the interpreter, at infinities.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


PRIORS = [None, "shared", "own", "excludes"]
# [B, K, *loc]
SCORES = [
    (1, 1),
    (3, 2),
    (2, 1, 63),
    (2, 63, 2, 3),
    (1, 2003),
    (2, 5, 129),
    (0, 3),
    (0, 3, 5),
    (2, 3, 0),
]


@pytest.mark.parametrize("kind", PRIORS)
@pytest.mark.parametrize("shape", SCORES)
def test_posterior_and_distillation(shape, kind, interpreted):
    kinds = ("own",) if shape == (2, 63, 2, 3) else PRIORS[SCORES.index(shape) % 2 :: 2]
    if interpreted and kind not in kinds:
        pytest.skip("too slow in the interpreter: every shape has half of the priors")
    assert_bayes(
        3 * random(*shape, seed=1), 30 * random(*shape, seed=2), prior_of(kind, shape), 7.0
    )


@pytest.mark.parametrize("dtypes", list(itertools.product((F32, BF16, F16), repeat=2)))
def test_posterior_and_distillation_of_any_dtypes(dtypes, interpreted):
    shapes = [(3, 63), (2, 5, 17)]
    if interpreted:
        shapes.pop(dtypes[0] == dtypes[1])
    for shape in shapes:
        logits, likelihood = (
            scale * random(*shape, seed=seed) for seed, scale in ((1, 3.0), (2, 10.0))
        )
        assert_bayes(logits.to(dtypes[0]), likelihood.to(dtypes[1]), prior_of("shared", shape), 2.5)


@pytest.mark.parametrize("layout", ["transposed", "every other", "cropped", "batch inside"])
def test_posterior_and_distillation_of_any_strides(layout):
    logits, likelihood = (LAYOUTS[layout](random(3, 5, 7, 9, seed=seed)) for seed in (1, 2))
    assert_bayes(logits, likelihood, None, 1.0)
    assert_bayes(
        likelihood.contiguous(), logits, prior_of("own", (3, 5, 7, 9)).expand(3, 5, 1, 1), 1.0
    )


# Around what one thread, a warp and a block hold in registers, and beyond.
@pytest.mark.parametrize(
    "shape",
    [
        (5, 8),
        (5, 9),
        (3, 257),
        (2, 2049),
        (2, 20_011),
        (3, 64, 33),
        (2, 65, 7),
        (1, 300, 5),
        (1, 8193, 2, 2),
    ],
)
def test_posterior_and_distillation_of_many_classes(shape, compiled):
    logits, likelihood = random(*shape, seed=1), 5 * random(*shape, seed=2)
    assert_bayes(logits, likelihood, prior_of("shared", shape), 0.5)


def assert_bayes(logits, likelihood, prior, temperature):
    arguments = (logits, likelihood, prior, temperature)
    log_p, log_q = (
        posterior_reference.posterior(*double(arguments[1:])),
        logits.double().log_softmax(1),
    )
    # Of the divergence, [B, K, *loc].
    terms = torch.where(log_p == -math.inf, 0, log_p.exp() * (log_p.abs() + log_q.abs()))

    def compare(name, arguments, sizes):
        outputs = [getattr(operators, name)(*arguments)]
        outputs += [
            getattr(posterior_reference, name)(*values) for values in (arguments, double(arguments))
        ]
        outputs = [(values,) if isinstance(values, torch.Tensor) else values for values in outputs]
        for result, plain, exact, size in zip(*outputs, sizes, strict=True):
            infinite = exact.isinf()
            assert_equal_bits([result.double()[infinite]], [exact[infinite].double()])
            assert_accurate(
                name, *(values.masked_fill(infinite, 0) for values in (result, plain, exact)), size
            )

    compare("posterior", arguments[1:], [None])
    compare("distillation_loss", arguments, [terms.sum(1)])
    grad = random(logits.shape[0], *logits.shape[2:], seed=3)
    size = (log_p.exp() * terms.sum(1, keepdim=True) + terms) * grad.unsqueeze(1) / temperature
    for mask in ([True, True], [True, False], [False, True]):
        compare("distillation_loss_backward", (grad, *arguments, mask), [None, size])


EXTREMES = {  # logits, likelihood and prior of [K = 5]
    "one class is certain": ([0.0] * 5, [-3e5, 1e6, -1e6, 0.0, 1.0], None),
    "all are tied": ([2.0] * 5, [-123456.0] * 5, None),
    "two are tied": ([0.0] * 5, [-1e6, 7e5, -1e6, 7e5, 0.0], None),
    "the student is certain": ([0.0, -1e4, -1e4, -1e4, -1e4], [0.0] * 5, None),
    "both are certain of one": ([0.0, -1e4, -1e4, -1e4, -1e4], [0.0, -1e5, -1e5, -1e5, -1e5], None),
    "each is certain of another": (
        [0.0, -1e4, -1e4, -1e4, -1e4],
        [-1e5, 0.0, -1e5, -1e5, -1e5],
        None,
    ),
    "a class that neither has": (
        [0.0, 1.0, -math.inf, 0.5, 0.0],
        [1.0, 2.0, -math.inf, 0.0, 1.0],
        None,
    ),
    "a class that the prior excludes": (
        [0.0, 1.0, -math.inf, 0.5, 0.0],
        [1.0, 2.0, 1e6, 0.0, 1.0],
        [-1.0, -2.0, -math.inf, -1.0, -1.5],
    ),
    "a class that the student alone excludes": (
        [0.0, 1.0, -math.inf, 0.5, 0.0],
        [1.0, 2.0, 3.0, 0.0, 1.0],
        None,
    ),
    "a class that the teacher alone excludes": (
        [0.0, 1.0, 2.0, 0.5, 0.0],
        [1.0, 2.0, -math.inf, 0.0, 1.0],
        None,
    ),
    "only one is left": ([0.0, 1.0, 2.0, 0.5, 0.0], [-math.inf] * 3 + [-1e6, -math.inf], None),
    "none is left": ([0.0, 1.0, 2.0, 0.5, 0.0], [-math.inf] * 5, None),
    "a class beyond measure": ([0.0] * 5, [0.0, math.inf, 0.0, 0.0, 0.0], None),
    "a NaN of the teacher": ([0.0] * 5, [0.0, math.nan, 0.0, 0.0, 0.0], None),
    "a NaN of the student": ([0.0, math.nan, 0.0, 0.0, 0.0], [0.0] * 5, None),
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("spatial", [(), (3,)])
def test_extreme_posteriors(name, spatial, interpreted):
    """An extreme image, or location, between ordinary ones, which it must not touch."""
    if interpreted and not spatial:
        pytest.skip("too slow in the interpreter")
    logits, likelihood = random(3, 5, *spatial, seed=1), random(3, 5, *spatial, seed=2)
    prior = torch.zeros(3, 5, *[1] * len(spatial), device=DEVICE)
    middle = (1, slice(None), *[1] * len(spatial))
    grad = random(3, *spatial, seed=3)

    def run(operators):
        arguments = (logits, likelihood, prior if EXTREMES[name][2] else None, 1.0)
        backward = operators.distillation_loss_backward(grad, *arguments, [True, True])
        return (
            operators.posterior(*arguments[1:]),
            operators.distillation_loss(*arguments),
            *backward,
        )

    clean = run(operators)
    for tensor, row in zip((logits, likelihood, prior), EXTREMES[name], strict=True):
        if row is not None:
            tensor[middle if tensor is not prior else (1, slice(None), *[0] * len(spatial))] = (
                torch.tensor(row, device=DEVICE)
            )
    results, expected = run(operators), run(posterior_reference)
    print(
        *(
            result[middle if result.ndim == logits.ndim else (1, *middle[2:])].tolist()
            for result in results
        ),
        sep="\n",
    )
    for result, value, before in zip(results, expected, clean, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-6, equal_nan=True)
        if EXTREMES[name][2] is None:  # a prior is the same at every location
            keep = torch.ones_like(result, dtype=torch.bool)
            keep[middle if result.ndim == logits.ndim else (1, *middle[2:])] = False
            assert_equal_bits([result[keep]], [before[keep]])


@pytest.mark.parametrize("classes", [3, 16])
def test_a_temperature_beyond_float32(classes):
    likelihood = random(2, classes, seed=1)
    torch.testing.assert_close(
        operators.posterior(likelihood, None, 1e39), torch.full_like(likelihood, -math.log(classes))
    )
    assert (
        operators.distillation_loss(torch.zeros_like(likelihood), likelihood, None, 1e39)
        .abs()
        .max()
        < 1e-6
    )
