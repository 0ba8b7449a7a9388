"""Transforms of torch.func, and forward-mode differentiation, through the operators."""

import pytest
import torch
from torch.autograd import forward_ad

import genrep_fast as gf

B, K, S, C = 3, 4, 5, 2


def cases():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, C, 2, generator=generator)
    output = torch.randn(B, K, S, C, 2, generator=generator)
    logits, scores = torch.randn(2, B, K, generator=generator)
    one = torch.ones(S)
    tables = gf.StepCoefficients(
        data=one, noisy=0.5 * one, output=-one, inv_var=one, log_norm=0 * one
    )
    return {
        "distillation_loss": (lambda value: gf.distillation_loss(value, scores), logits),
        "its teacher": (lambda value: gf.distillation_loss(logits, value), scores),
        "posterior": (lambda value: gf.posterior(value, temperature=2.0).square().sum(), scores),
        "log_evidence": (lambda value: gf.log_evidence(value).sum(), scores),
        "mixture": (lambda value: gf.log_likelihood(value, output, tables, output).sum(), x),
        "mean": (
            lambda value: gf.log_likelihood(x, value, tables, value, reduction="mean").sum(),
            output,
        ),
    }


NAMES = list(cases())


def gradient(function, value):
    value = value.clone().requires_grad_()
    return torch.autograd.grad(function(value), value)[0]


@pytest.mark.parametrize("name", NAMES)
def test_grad_and_jvp_are_the_gradient(name):
    function, value = cases()[name]
    expected = gradient(function, value)
    torch.testing.assert_close(torch.func.grad(function)(value), expected)
    torch.testing.assert_close(torch.func.jacrev(function)(value), expected)
    tangent = torch.ones_like(value)
    _, derivative = torch.func.jvp(function, (value,), (tangent,))
    # A tangent that an operator does not know would be zero without a word.
    torch.testing.assert_close(derivative, expected.sum(), rtol=1e-4, atol=1e-4)
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(value, tangent))
        tangent = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, expected.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop(name):
    function, value = cases()[name]
    values = torch.stack([value, 2 * value])
    expected = torch.stack([function(one) for one in values])
    torch.testing.assert_close(torch.func.vmap(function)(values), expected)
    gradients = torch.stack([gradient(function, one) for one in values])
    per_example = torch.func.vmap(torch.func.grad(function))(values)
    torch.testing.assert_close(per_example, gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_hessians_agree(name):
    function, value = cases()[name]
    expected = torch.autograd.functional.hessian(function, value)
    torch.testing.assert_close(torch.func.hessian(function)(value), expected, rtol=1e-4, atol=1e-5)
    vectorized = torch.autograd.functional.hessian(function, value, vectorize=True)
    torch.testing.assert_close(vectorized, expected, rtol=1e-4, atol=1e-5)


def test_transforms_compile():
    function, value = cases()["distillation_loss"]
    compiled = torch.compile(torch.func.grad(function), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(value), gradient(function, value))


def test_functional_call_of_a_student():
    student = torch.nn.Linear(5, K)
    inputs, scores = torch.randn(B, 5), torch.randn(B, K)

    def loss(parameters, inputs, scores):
        return gf.distillation_loss(torch.func.functional_call(student, parameters, inputs), scores)

    parameters = {name: value.detach() for name, value in student.named_parameters()}
    gradients = torch.func.grad(loss)(parameters, inputs, scores)
    gf.distillation_loss(student(inputs), scores).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    one_by_one = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    per_image = one_by_one(parameters, inputs[:, None], scores[:, None])
    torch.testing.assert_close(per_image["bias"].mean(0), student.bias.grad)


def test_a_bank_is_transformed():
    diffusers = pytest.importorskip("diffusers")
    bank = gf.ChainBank.build(
        lambda x, t, y: 0.1 * x,
        diffusers.DDPMScheduler(10, clip_sample=False),
        K,
        (C, 2),
        num_inference_steps=4,
        chains=1,
        burn_in=0,
        thin=1,
        sigma_floor=0.3,
        seed=0,
    )
    x = torch.randn(B, C, 2)

    def total(x):
        return bank.log_likelihood(x).sum()

    torch.testing.assert_close(torch.func.grad(total)(x), gradient(total, x))
    both = torch.func.vmap(bank.log_likelihood)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(both[1], bank.log_likelihood(2 * x))


def test_reverse_step_in_vmap_draws_the_same_noise():
    one = torch.ones(S)
    tables = gf.StepCoefficients(
        data=one,
        noisy=0 * one,
        output=-one,
        inv_var=one,
        log_norm=0 * one,
        mean_noisy=one,
        mean_output=one,
        std=one,
    )
    x, ids = torch.randn(2, B, C), torch.arange(2 * B).reshape(2, B)

    def step(x, ids, scale):
        return gf.reverse_step(x, x, tables, 1, seed=3, chain_ids=ids, std_scale=scale)[0]

    scale = torch.tensor([[1.0], [2.0]])
    mapped = torch.func.vmap(step)(x, ids, scale)
    torch.testing.assert_close(mapped[1], step(x[1], ids[1], scale[1]))
    with pytest.raises(ValueError, match="std_scale must be positive"):
        torch.func.vmap(step)(x, ids, -scale)


def update(x):
    one = torch.ones(1)
    tables = gf.StepCoefficients(
        data=one, noisy=0 * one, output=-one, inv_var=one, log_norm=0 * one
    )
    gf.PosteriorScorer(K).update(x, torch.zeros(K, 1, C), tables)
    return x


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: gf.gram([x], [x]), "gram"),
        (lambda x: gf.align_gradients([x], [x])[0][0], "gram"),
        (lambda x: gf.combine([[x], [x]], torch.ones(1, 2))[0], "combine"),
        (update, "score_update"),
        (lambda x: gf.fit_temperature(x, torch.zeros(B, dtype=torch.int64)), "fit_temperature"),
    ],
)
def test_what_vmap_cannot_map_says_so(function, name):
    with pytest.raises(RuntimeError, match=rf"{name} .*call it outside"):
        torch.func.vmap(function)(torch.randn(2, B, C))


def test_a_backend_that_was_insisted_on_is_not_replaced_in_silence():
    function, value = cases()["posterior"]
    with gf.use_backend("reference"):
        torch.testing.assert_close(torch.func.grad(function)(value), gradient(function, value))
    with (
        gf.use_backend("cpu"),
        pytest.raises(gf.BackendUnavailableError, match="'cpu' was asked for, but posterior runs"),
    ):
        torch.func.grad(function)(value)
