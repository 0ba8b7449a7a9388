"""Bayes' rule and the distillation loss against torch.distributions, their gradients, the fitted
temperature, and what they refuse.
"""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.distributions import Categorical, kl_divergence

import genrep_fast as gf

OPS = torch.ops.genrep_fast


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


PRIORS = [
    None,
    torch.tensor([0.2, 0.5, 0.3]).log().double(),
    random(2, 3).log_softmax(1),
    random(1, 3).log_softmax(1),
]


@pytest.mark.parametrize("spatial", [(), (2, 5)])
@pytest.mark.parametrize("prior", PRIORS)
def test_posterior_evidence_and_loss_equal_torch_distributions(prior, spatial):
    likelihood, logits = 30 * random(2, 3, *spatial, seed=1), 5 * random(2, 3, *spatial, seed=2)
    per_image = (
        torch.full((1, 3), -math.log(3), dtype=torch.float64)
        if prior is None
        else prior.reshape(-1, 3)
    )
    rows = likelihood.movedim(1, -1)  # [B, *spatial, K]
    log_prior = per_image.reshape(-1, *[1] * len(spatial), 3)
    teacher = Categorical(logits=rows / 7.5 + log_prior)
    divergence = kl_divergence(teacher, Categorical(logits=logits.movedim(1, -1)))

    posterior = gf.posterior(likelihood, log_prior=prior, temperature=7.5)
    torch.testing.assert_close(posterior.movedim(1, -1), teacher.logits)
    torch.testing.assert_close(
        gf.log_evidence(likelihood, log_prior=prior).exp(), (rows.exp() * log_prior.exp()).sum(-1)
    )
    options = {"log_prior": prior, "temperature": 7.5}
    torch.testing.assert_close(
        gf.distillation_loss(logits, likelihood, reduction="none", **options), divergence
    )
    torch.testing.assert_close(
        gf.distillation_loss(logits, likelihood, reduction="mean", **options), divergence.mean()
    )
    torch.testing.assert_close(
        gf.distillation_loss(logits, likelihood, **options), divergence.sum() / 2
    )


@pytest.mark.parametrize("prior", PRIORS)
def test_posterior_evidence_and_loss_gradients(prior):
    tensors = [random(2, 3, 2, seed=seed).requires_grad_() for seed in (1, 2)]
    assert torch.autograd.gradcheck(
        lambda a, b: gf.distillation_loss(a, b, log_prior=prior, temperature=0.7, reduction="none"),
        tensors,
    )
    prior = prior if prior is None else prior.detach().clone().requires_grad_()
    arguments = tensors[:1] if prior is None else [tensors[0], prior]
    assert torch.autograd.gradcheck(
        lambda a, b=None: gf.posterior(a, log_prior=b, temperature=0.7), arguments
    )
    assert torch.autograd.gradcheck(lambda a, b=None: gf.log_evidence(a, log_prior=b), arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_posterior_and_loss_of_low_precision_inputs(dtype):
    logits, likelihood = (random(5, 7, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))
    posterior, loss = gf.posterior(likelihood), gf.distillation_loss(logits, likelihood)
    assert posterior.dtype == loss.dtype == gf.log_evidence(likelihood).dtype == torch.float32
    torch.testing.assert_close(
        posterior.double(), likelihood.double().log_softmax(1), rtol=1e-6, atol=1e-6
    )
    expected = kl_divergence(
        Categorical(logits=likelihood.double()), Categorical(logits=logits.double())
    ).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    (posterior.sum() + loss).backward()
    assert likelihood.grad.dtype == logits.grad.dtype == dtype


@pytest.mark.parametrize("classes", [1, 2, 127])
def test_extreme_posteriors(classes):
    tied = torch.full((1, classes), -1e6)
    torch.testing.assert_close(gf.posterior(tied), torch.full((1, classes), -math.log(classes)))
    torch.testing.assert_close(
        gf.distillation_loss(torch.zeros(1, classes), tied), torch.tensor(0.0), atol=1e-6, rtol=0
    )

    one_hot = torch.full((1, classes), -1e6)
    one_hot[0, -1] = 0
    posterior = gf.posterior(one_hot)
    assert posterior[0, -1] == 0 and (posterior[0, :-1] == -1e6).all()
    student = one_hot.flip(1).requires_grad_()  # certain of the wrong class: q = 0 where p = 1
    likelihood = one_hot.clone().requires_grad_()
    loss = gf.distillation_loss(student, likelihood)
    loss.backward()
    assert loss == (0 if classes == 1 else 1e6)
    expected = torch.zeros(1, classes)
    expected[0, 0] += 1
    expected[0, -1] -= 1
    torch.testing.assert_close(student.grad, expected)
    assert (likelihood.grad == 0).all()


def test_impossible_classes_get_no_posterior_and_no_gradient():
    likelihood, logits = random(2, 3).requires_grad_(), random(2, 3, seed=1).requires_grad_()
    prior = torch.tensor([0.5, 0.0, 0.5]).log().double()
    assert (gf.posterior(likelihood, log_prior=prior)[:, 1] == -math.inf).all()
    loss = gf.distillation_loss(logits, likelihood, log_prior=prior, reduction="none")
    torch.testing.assert_close(
        loss,
        kl_divergence(
            Categorical(logits=likelihood + prior.clamp(min=-1e9)), Categorical(logits=logits)
        ),
    )
    loss.sum().backward()
    assert (
        likelihood.grad.isfinite().all()
        and logits.grad.isfinite().all()
        and (likelihood.grad[:, 1] == 0).all()
    )


def test_an_empty_batch_has_no_loss():
    logits = torch.zeros(0, 3, requires_grad=True)
    for reduction in ("batchmean", "mean"):
        assert gf.distillation_loss(logits, torch.zeros(0, 3), reduction=reduction) == 0
    assert gf.distillation_loss(logits, torch.zeros(0, 3), reduction="none").shape == (0,)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 250.0])
@pytest.mark.parametrize("spatial", [(), (3,)])
def test_fit_temperature_minimises_the_negative_log_likelihood(temperature, spatial):
    torch.manual_seed(0)
    prior = torch.tensor([0.2, 0.5, 0.3]).log()
    likelihood = temperature * 3 * torch.randn(2000, 3, *spatial) - 1e4
    shaped = prior.reshape(3, *[1] * len(spatial))
    labels = Categorical(logits=(likelihood / temperature + shaped).movedim(1, -1)).sample()

    def negative_log_likelihood(log_temperature):
        rows = (likelihood.double() / math.exp(log_temperature) + shaped.double()).movedim(1, -1)
        return -Categorical(logits=rows).log_prob(labels).mean().item()

    best = minimize_scalar(
        negative_log_likelihood,
        bounds=(math.log(temperature) - 3, math.log(temperature) + 3),
        options={"xatol": 1e-9},
    )
    fitted = gf.fit_temperature(likelihood, labels, log_prior=prior)
    assert isinstance(fitted, float)
    assert fitted == pytest.approx(math.exp(best.x), rel=1e-4)
    assert fitted == pytest.approx(temperature, rel=0.1)


@pytest.mark.parametrize("separable", [False, True])
def test_fit_temperature_ignores_classes_that_cannot_be(separable):
    likelihood = 10 * random(50, 3)
    labels = (likelihood if separable else likelihood + 10 * random(50, 3, seed=1)).argmax(1)
    expected = gf.fit_temperature(likelihood, labels)
    unlikely = torch.cat((likelihood, torch.full((50, 1), -math.inf)), 1)
    assert gf.fit_temperature(unlikely, labels) == pytest.approx(expected)
    excluded = torch.cat((likelihood, torch.full((50, 1), 1e3)), 1)
    assert gf.fit_temperature(
        excluded, labels, log_prior=torch.tensor([1.0, 1.0, 1.0, 0.0]).log()
    ) == pytest.approx(expected)


def test_fit_temperature_without_a_minimum():
    likelihood = 100 * random(50, 4)
    labels = likelihood.argmax(1)
    fitted = gf.fit_temperature(likelihood, labels)  # separable: half a nat above the limit 0
    assert -gf.posterior(likelihood, temperature=fitted).gather(
        1, labels[:, None]
    ).sum() == pytest.approx(0.5, rel=1e-6)
    wrong = gf.fit_temperature(likelihood, likelihood.argmin(1))
    torch.testing.assert_close(
        gf.posterior(likelihood, temperature=wrong).exp(),
        torch.full((50, 4), 0.25).double(),
        rtol=1e-6,
        atol=0,
    )
    assert gf.fit_temperature(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64)) == 1.0


ROWS = random(2, 3)


@pytest.mark.parametrize(
    ("likelihood", "labels", "prior", "error", "match"),
    [
        (
            ROWS,
            torch.tensor([0, 3]),
            None,
            ValueError,
            r"labels must lie in 0\.\.\.2, got 0\.\.\.3",
        ),
        (ROWS, torch.tensor([-1, 0]), None, ValueError, "labels must lie"),
        (ROWS, torch.tensor([0, 1, 2]), None, ValueError, r"labels must be \(2,\)"),
        (
            ROWS,
            torch.tensor([0.0, 1.0]),
            None,
            TypeError,
            "labels must be a tensor of integers, got torch.float32",
        ),
        (ROWS, [0, 1], None, TypeError, "labels must be a tensor, got list"),
        (
            ROWS[:0],
            torch.tensor([], dtype=torch.int64),
            None,
            ValueError,
            "labels must hold at least one",
        ),
        (ROWS * math.nan, torch.tensor([0, 1]), None, ValueError, "log_likelihood must not be NaN"),
        (
            -ROWS.abs() * math.inf,
            torch.tensor([0, 1]),
            None,
            ValueError,
            "log_likelihood must be finite at the labels",
        ),
        (
            ROWS,
            torch.tensor([0, 1]),
            torch.tensor([1.0, 0.0, 0.0]).log(),
            ValueError,
            "log_prior must be finite at the labels",
        ),
    ],
)
def test_fit_temperature_refuses(likelihood, labels, prior, error, match):
    with pytest.raises(error, match=match):
        gf.fit_temperature(likelihood, labels, log_prior=prior)


@pytest.mark.parametrize(
    "function",
    [
        gf.posterior,
        gf.log_evidence,
        lambda *args, **kwargs: gf.distillation_loss(ROWS, *args, **kwargs),
    ],
)
@pytest.mark.parametrize(
    ("likelihood", "options", "error", "match"),
    [
        (torch.zeros(3), {}, ValueError, r"log_likelihood must be \[B, K, \*spatial\]"),
        (torch.zeros(2, 0), {}, ValueError, "at least one class"),
        (torch.zeros(2, 3, dtype=torch.int64), {}, TypeError, "log_likelihood must be float32"),
        (
            ROWS,
            {"log_prior": torch.zeros(2)},
            ValueError,
            r"log_prior must be \[3\] or \[2, 3\], got \(2,\)",
        ),
        (ROWS, {"log_prior": torch.zeros(3, 3)}, ValueError, "log_prior must be"),
        (
            ROWS,
            {"log_prior": torch.zeros(3, device="meta")},
            ValueError,
            "log_prior must be on cpu.*got meta",
        ),
        (ROWS, {"log_prior": [0.0, 0.0, 0.0]}, TypeError, "log_prior must be a tensor, got list"),
    ],
)
def test_bayes_refuses(function, likelihood, options, error, match):
    with pytest.raises(error, match=match):
        function(likelihood, **options)


@pytest.mark.parametrize(
    ("logits", "options", "error", "match"),
    [
        (
            ROWS,
            {"temperature": 0.0},
            ValueError,
            "temperature must be positive and finite, got 0.0",
        ),
        (
            ROWS,
            {"temperature": torch.tensor(1.0)},
            TypeError,
            "temperature must be a number, got Tensor",
        ),
        (
            ROWS[:1],
            {},
            ValueError,
            r"student_logits must have log_likelihood's shape \(2, 3\), got \(1, 3\)",
        ),
        (ROWS.to("meta"), {}, ValueError, "student_logits must be on cpu.*got meta"),
        (ROWS, {"reduction": "sum"}, ValueError, "reduction must be .* got 'sum'"),
        (
            ROWS,
            {"log_prior": torch.zeros(3, requires_grad=True)},
            ValueError,
            "log_prior carries no gradient",
        ),
    ],
)
def test_distillation_loss_refuses(logits, options, error, match):
    with pytest.raises(error, match=match):
        gf.distillation_loss(logits, ROWS, **options)


def operator_calls():
    """Every operator with arguments that reach all of its branches."""
    prior = random(1, 3)
    grad, logits, likelihood = (random(2, 3, seed=seed) for seed in (4, 5, 6))
    return {
        "posterior": (OPS.posterior, (likelihood.requires_grad_(), prior.requires_grad_(), 2.0)),
        "distillation_loss": (
            OPS.distillation_loss,
            (logits.requires_grad_(), likelihood, prior.detach(), 2.0),
        ),
        "distillation_loss_backward": (
            OPS.distillation_loss_backward,
            (
                grad[:, 0].contiguous(),
                logits.detach(),
                likelihood.detach(),
                None,
                2.0,
                [True, False],
            ),
        ),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name):
    operator, arguments = operator_calls()[name]
    torch.library.opcheck(operator.default, arguments)
