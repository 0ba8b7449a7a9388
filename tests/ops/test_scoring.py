"""Likelihood against torch.distributions, its gradients, what it refuses, and what torch.compile
makes of it with posterior and loss.
"""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import genrep_fast as gf

OPS = torch.ops.genrep_fast
REDUCTIONS = ("mixture", "mean")
# B, K, S, C, extra channels, spatial
SIZES = [
    (1, 1, 1, 1, 0, ()),
    (2, 3, 5, 2, 0, (3, 4)),
    (3, 2, 63, 1, 1, (13,)),
    (2, 1, 2, 127, 2, ()),
    (1, 20011, 3, 1, 0, ()),
    (1, 1, 2, 3, 0, (101, 37)),
]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def chain_coefficients(steps, dtype=torch.float64):
    """r = x - (0.5 x_t + c o), std between 0.5 and 2"""
    spread = torch.linspace(0.5, 2, steps, dtype=torch.float64)
    tables = {
        "data": torch.ones(steps),
        "noisy": torch.full((steps,), -0.5),
        "output": -spread.flip(0),
        "inv_var": 1 / spread**2,
        "log_norm": -0.5 * torch.log(2 * math.pi * spread**2),
    }
    return gf.StepCoefficients(**{name: table.to(dtype) for name, table in tables.items()})


def inputs(batch, classes, steps, channels, extra=0, spatial=(), dtype=torch.float64):
    x = random(batch, channels, *spatial, seed=1, dtype=dtype)
    model_output = random(batch, classes, steps, channels + extra, *spatial, seed=2, dtype=dtype)
    x_t = random(batch, 1, steps, channels, *spatial, seed=3, dtype=dtype)
    return x, model_output, x_t


def small_chunk(dtype=torch.float64, requires_grad=False):
    tensors = [
        tensor.requires_grad_(requires_grad) for tensor in inputs(2, 3, 4, 2, 1, (3,), dtype=dtype)
    ]
    return (*tensors, chain_coefficients(4))


def distribution_log_likelihood(x, model_output, x_t, steps, reduction, per_location):
    """The chain's Gaussian kernels as torch.distributions, computed in x's dtype."""
    std = torch.linspace(0.5, 2, steps, dtype=torch.float64)
    per_step = [
        tensor.to(x.dtype).reshape(steps, *[1] * (x.ndim - 1)) for tensor in (std, std.flip(0))
    ]
    mean = 0.5 * x_t + per_step[1] * model_output[:, :, :, : x.shape[1]]  # [B, K, S, C, *spatial]
    x = x[:, None].expand(-1, mean.shape[1], *[-1] * (x.ndim - 1))
    scale = per_step[0].expand_as(mean)
    if per_location:
        mean, scale, x = mean.movedim(3, -1), scale.movedim(3, -1), x.movedim(2, -1)
        mean, scale = mean.movedim(2, -2), scale.movedim(2, -2)  # [B, K, *spatial, S, C]
        kernels = Independent(Normal(mean, scale), 1)
    else:
        kernels = Independent(Normal(mean, scale), mean.ndim - 3)
    if reduction == "mean":
        return kernels.log_prob(x.unsqueeze(-2) if per_location else x.unsqueeze(2)).mean(-1)
    return MixtureSameFamily(
        Categorical(logits=torch.zeros(kernels.batch_shape, dtype=x.dtype)), kernels
    ).log_prob(x)


@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_log_likelihood_equals_torch_distributions(size, reduction, per_location):
    x, model_output, x_t = inputs(*size)
    got = gf.log_likelihood(
        x,
        model_output,
        chain_coefficients(size[2]),
        x_t,
        reduction=reduction,
        per_location=per_location,
    )
    torch.testing.assert_close(
        got,
        distribution_log_likelihood(x, model_output, x_t, size[2], reduction, per_location),
        rtol=1e-10,
        atol=0,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shared_class_chains_equal_the_same_chains_for_every_image(reduction):
    x, model_output, _ = inputs(3, 4, 5, 2, 0, (3,))
    coefficients, x_t = chain_coefficients(5), random(4, 5, 2, 3)
    shared = gf.log_likelihood(x, model_output[0], coefficients, x_t, reduction=reduction)
    expanded = gf.log_likelihood(
        x,
        model_output[:1].expand(3, -1, -1, -1, -1),
        coefficients,
        x_t.expand(3, -1, -1, -1, -1),
        reduction=reduction,
    )
    torch.testing.assert_close(shared, expanded, rtol=0, atol=0)
    assert shared.shape == (3, 4)


def test_locations_of_the_mean_add_up_to_the_image():
    x, model_output, x_t, coefficients = small_chunk()
    image = gf.log_likelihood(x, model_output, coefficients, x_t, reduction="mean")
    locations = gf.log_likelihood(
        x, model_output, coefficients, x_t, reduction="mean", per_location=True
    )
    torch.testing.assert_close(locations.sum(-1), image)


def test_one_class_of_outputs_serves_every_class_of_targets():
    x, model_output, _, coefficients = small_chunk()
    x_t = random(1, 5, 1, 2, 3)
    got = gf.log_likelihood(x, model_output[:, :1], coefficients, x_t)
    expected = gf.log_likelihood(
        x, model_output[:, :1].expand(-1, 5, -1, -1, -1), coefficients, x_t.expand(2, -1, 4, -1, -1)
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def strided(tensor):
    return tensor.movedim(-1, 0).contiguous().movedim(0, -1).detach().requires_grad_()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_strided_inputs_give_the_contiguous_result(reduction):
    x, model_output, x_t = inputs(2, 3, 4, 2, 0, (3, 5))
    coefficients = chain_coefficients(4)
    arguments = (
        strided(x),
        strided(model_output),
        strided(x_t),
        coefficients.tables,
        reduction,
        True,
    )
    torch.library.opcheck(OPS.log_likelihood.default, arguments)
    likelihood, remainder = OPS.log_likelihood(*arguments)
    expected = gf.log_likelihood(
        x, model_output, coefficients, x_t, reduction=reduction, per_location=True
    )
    torch.testing.assert_close(likelihood, expected)
    detached = [
        argument.detach() if isinstance(argument, torch.Tensor) else argument
        for argument in arguments
    ]
    grads = (strided(likelihood).detach(), likelihood.detach(), remainder.detach())
    torch.library.opcheck(
        OPS.log_likelihood_backward.default, (*grads, *detached, [True, True, True])
    )


def test_strided_likelihoods_pass_opcheck():
    likelihood = random(2, 3, 3, 5)
    logits, scores = strided(-likelihood), strided(likelihood)
    torch.library.opcheck(OPS.posterior.default, (scores, None, 1.0))
    torch.library.opcheck(OPS.distillation_loss.default, (logits, scores, None, 1.0))
    grad = strided(likelihood[:, 0]).detach()
    torch.library.opcheck(
        OPS.distillation_loss_backward.default,
        (grad, logits.detach(), scores.detach(), None, 1.0, [True, True]),
    )


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_inputs(shape):
    batch, classes, steps = shape
    x, model_output, x_t = (
        tensor.requires_grad_() for tensor in inputs(batch, classes, steps, 2, 0, (3,))
    )
    got = gf.log_likelihood(x, model_output, chain_coefficients(steps), x_t)
    assert got.shape == (batch, classes)
    assert (got == -math.inf).all()
    got.sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_likelihood_dtypes(dtype):
    x, model_output, x_t, coefficients = small_chunk(dtype, requires_grad=True)
    got = gf.log_likelihood(x, model_output, coefficients, x_t)
    got.sum().backward()
    assert got.dtype == torch.float32
    assert {x.grad.dtype, model_output.grad.dtype, x_t.grad.dtype} == {dtype}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 129, 1009])
def test_low_precision_error_is_at_most_twice_the_naive_one(channels, dtype, reduction):
    low = inputs(3, 4, 7, channels, dtype=dtype)
    exact = distribution_log_likelihood(*(tensor.double() for tensor in low), 7, reduction, False)
    naive = (
        (distribution_log_likelihood(*low, 7, reduction, False).double() - exact).abs().max().item()
    )
    error = (
        (
            gf.log_likelihood(
                low[0], low[1], chain_coefficients(7), low[2], reduction=reduction
            ).double()
            - exact
        )
        .abs()
        .max()
        .item()
    )
    tolerance = 2 * naive + 1e-6
    errors = f"worst error {error:.3g} nats, tolerance {tolerance:.3g}"
    print(f"{dtype}, {channels} channels, {reduction}: {errors}")
    assert error <= tolerance


@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_log_likelihood_gradients(reduction, per_location):
    x, model_output, x_t, coefficients = small_chunk(requires_grad=True)

    def run(*tensors):
        return gf.log_likelihood(
            tensors[0],
            tensors[1],
            coefficients,
            tensors[2],
            reduction=reduction,
            per_location=per_location,
        )

    assert torch.autograd.gradcheck(run, (x, model_output, x_t))
    shared = (
        x,
        model_output[0, :, :, :2].detach().requires_grad_(),
        x_t[:1, :, :1].detach().requires_grad_(),
    )
    assert torch.autograd.gradcheck(run, shared)


def test_only_the_gradients_asked_for_are_computed():
    x, model_output, x_t, coefficients = small_chunk()
    arguments = (x, model_output, x_t, coefficients.tables, "mixture", False)
    gradients = OPS.log_likelihood_backward(
        random(2, 3), *OPS.log_likelihood(*arguments), *arguments, [False, True, False]
    )
    assert [gradient.numel() for gradient in gradients] == [0, model_output.numel(), 0]
    gradients = OPS.distillation_loss_backward(
        random(2), random(2, 3), random(2, 3), None, 1.0, [True, False]
    )
    assert [gradient.numel() for gradient in gradients] == [6, 0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_stays_in_its_image_and_class(reduction):
    x, model_output, x_t, coefficients = small_chunk()
    model_output[1, 2, 0, 0, 0] = math.nan
    model_output.requires_grad_()
    x.requires_grad_()
    likelihood = gf.log_likelihood(x, model_output, coefficients, x_t, reduction=reduction)
    expected = torch.zeros(2, 3, dtype=torch.bool)
    expected[1, 2] = True
    assert torch.equal(likelihood.isnan(), expected)
    likelihood.sum().backward(retain_graph=True)
    assert torch.equal(model_output.grad.isnan().flatten(2).any(2), expected)
    assert torch.equal(x.grad.isnan().flatten(1).any(1), expected.any(1))

    model_output.grad = None
    logits = random(2, 3).requires_grad_()
    loss = gf.distillation_loss(logits, likelihood, reduction="none")
    assert loss.isnan().tolist() == gf.posterior(likelihood)[:, 0].isnan().tolist() == [False, True]
    gf.distillation_loss(logits, likelihood).backward()
    assert logits.grad.isnan().all(1).tolist() == [False, True]
    assert model_output.grad.isnan().flatten(1).any(1).tolist() == [False, True]


def test_steps_without_likelihood_pass_no_gradient():
    x, model_output, x_t, coefficients = small_chunk(torch.float32)
    model_output[0, 0] = 1e30  # the square overflows: -inf at every step
    model_output[0, 1, 2] = -math.inf  # at one step
    model_output.requires_grad_()
    likelihood = gf.log_likelihood(x, model_output, coefficients, x_t)
    assert likelihood[0, 0] == -math.inf and likelihood.flatten()[1:].isfinite().all()
    likelihood.sum().backward()
    assert (model_output.grad[0, 0] == 0).all() and (model_output.grad[0, 1, 2] == 0).all()
    assert model_output.grad.isfinite().all() and (model_output.grad[0, 1, 0, :2] != 0).all()


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        (
            {"x": torch.zeros(2, 2, 3, dtype=torch.int64)},
            TypeError,
            "x must be float32.*got torch.int64",
        ),
        (
            {"x": torch.zeros(2, 2, 3)},
            TypeError,
            "model_output must be float64 if and only if x is",
        ),
        ({"x": torch.zeros(2).double()}, ValueError, r"x must be \[B, C, \*spatial\], got \(2,\)"),
        (
            {"x": torch.zeros(2, 2, 3, device="meta").double()},
            ValueError,
            "model_output must be on meta.*got cpu",
        ),
        ({"x_t": None}, ValueError, "x_t must be given"),
        ({"coefficients": 1}, TypeError, "coefficients must be StepCoefficients, got int"),
        ({"reduction": "sum"}, ValueError, "reduction must be .* got 'sum'"),
    ],
)
def test_log_likelihood_refuses(changed, error, match):
    names = ("x", "model_output", "x_t", "coefficients")
    arguments = dict(zip(names, small_chunk(), strict=True)) | changed
    with pytest.raises(error, match=match):
        gf.log_likelihood(**arguments)


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("model_output", (3, 4, 2), "model_output must have x's 3 axes and 2 more"),
        ("model_output", (3, 3, 4, 2, 3), "model_output must have x's batch size 2 or 1, got 3"),
        (
            "model_output",
            (2, 3, 5, 2, 3),
            "model_output must have the coefficients' 4 steps, got 5",
        ),
        ("model_output", (2, 3, 4, 1, 3), "model_output must have at least x's 2 channels, got 1"),
        (
            "model_output",
            (2, 3, 4, 2, 4),
            r"model_output must have x's spatial shape \(3,\), got \(4,\)",
        ),
        ("x_t", (2, 2, 4, 2, 3), "x_t must have model_output's 3 classes or 1, got 2"),
        ("x_t", (2, 3, 2, 2, 3), "x_t must have 1 step or the coefficients' 4, got 2"),
        ("x_t", (2, 3, 4, 3, 3), "x_t must have x's 2 channels, got 3"),
    ],
)
def test_log_likelihood_refuses_shapes(name, shape, match):
    test_log_likelihood_refuses({name: random(*shape)}, ValueError, match)


def test_the_mean_of_no_steps_is_refused():
    x, model_output, x_t = inputs(2, 3, 0, 2)
    with pytest.raises(ValueError, match="at least one step"):
        gf.log_likelihood(x, model_output, chain_coefficients(0), x_t, reduction="mean")


def test_steps_that_cannot_be_scored_are_refused():
    one = torch.ones(1)
    coefficients = gf.StepCoefficients(
        data=one, noisy=0 * one, output=-one, inv_var=one / 0, log_norm=one
    )
    with pytest.raises(ValueError, match="cannot be scored"):
        gf.log_likelihood(torch.zeros(2, 3), torch.zeros(2, 4, 1, 3), coefficients)


def operator_calls():
    """Every operator with arguments that reach all of its branches."""
    x, model_output, x_t, coefficients = small_chunk()
    chunk = (x, model_output, x_t, coefficients.tables)
    grad, calls = random(2, 3, seed=4), {}
    for reduction in REDUCTIONS:
        differentiable = tuple(tensor.detach().clone().requires_grad_() for tensor in chunk[:3])
        calls[f"log_likelihood-{reduction}"] = (
            OPS.log_likelihood,
            (*differentiable, coefficients.tables, reduction, reduction == "mean"),
        )
        calls[f"log_likelihood_backward-{reduction}"] = (
            OPS.log_likelihood_backward,
            (
                grad,
                *OPS.log_likelihood(*chunk, reduction, False),
                *chunk,
                reduction,
                False,
                [True, reduction == "mean", True],
            ),
        )
        state = random(3 if reduction == "mixture" else 2, 2, 5).abs()
        classes = torch.tensor([4, 0, 2])
        calls[f"score_update-{reduction}"] = (
            OPS.score_update,
            (*chunk, classes, reduction, False, torch.ones(5, dtype=torch.int64), state),
        )
    return calls


@pytest.mark.parametrize("name", operator_calls())
def test_opcheck(name):
    operator, arguments = operator_calls()[name]
    torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize(
    ("backend", "reduction"),
    [
        ("aot_eager", "mixture"),
        ("aot_eager", "mean"),
        pytest.param("inductor", "mixture", marks=pytest.mark.slow),
    ],
)
def test_the_whole_way_compiles_without_a_graph_break(backend, reduction):
    x, model_output, x_t, coefficients = small_chunk(torch.float32)
    per_location = reduction == "mean"
    logits = random(2, 3, *(x.shape[2:] if per_location else ()), dtype=torch.float32)
    prior = torch.tensor([0.2, 0.5, 0.3]).log()

    def loss(model_output, logits):
        likelihood = gf.log_likelihood(
            x, model_output, coefficients, x_t, reduction=reduction, per_location=per_location
        )
        evidence, posterior = gf.log_evidence(likelihood), gf.posterior(likelihood, log_prior=prior)
        return (
            gf.distillation_loss(logits, likelihood, log_prior=prior, temperature=3.0)
            + evidence.mean()
            + posterior.mean()
        )

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=backend)):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (model_output, logits)]
        value = function(*leaves)
        value.backward()
        results.append((value.detach(), *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(*results)


def test_a_missing_x_t_is_asserted_in_compiled_code():
    x, model_output, _, coefficients = small_chunk()
    compiled = torch.compile(gf.log_likelihood, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="x_t must be given"):
        compiled(x, model_output, coefficients)


def test_autocast_changes_nothing():
    x, model_output, x_t, coefficients = small_chunk(torch.float32, requires_grad=True)

    def run():
        likelihood = gf.log_likelihood(x, model_output, coefficients, x_t)
        loss = gf.distillation_loss(random(2, 3, dtype=torch.float32), likelihood)
        return (
            likelihood,
            gf.posterior(likelihood),
            loss,
            *torch.autograd.grad(loss, (x, model_output, x_t)),
        )

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
