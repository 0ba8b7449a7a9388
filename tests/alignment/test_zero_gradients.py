"""A loss that hands a parameter a gradient of zeros does not reach it: in every way in which
autograd makes zeros of None.
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import genrep_fast as gf
from genrep_fast.alignment.rules import RULES

WEIGHTS = (0.7, 0.3)


class Both(torch.autograd.Function):
    """Both heads as one function of two outputs, which gets zeros for the output that a loss does
    not use.
    """

    @staticmethod
    def forward(ctx, features, first, second):
        ctx.save_for_backward(features, first, second)
        return features @ first.T, features @ second.T

    @staticmethod
    def backward(ctx, grad_first, grad_second):
        features, first, second = ctx.saved_tensors
        return (
            grad_first @ first + grad_second @ second,
            grad_first.T @ features,
            grad_second.T @ features,
        )


class Net(nn.Module):
    """A trunk and a head for each of two losses."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(6, 5)
        self.first = nn.Linear(5, 3, bias=False)
        self.second = nn.Linear(5, 6, bias=False)
        self.to(dtype)

    def heads(self, features):
        return self.first(features), self.second(features)

    def forward(self, x):
        return self.heads(torch.tanh(self.trunk(x)))


def plain(net, x):
    return net(x)


def compiled(net, x):
    return torch.compile(net, backend="aot_eager", fullgraph=True)(x)


def reentrant_checkpoint(net, x):
    return checkpoint(net.heads, torch.tanh(net.trunk(x)), use_reentrant=True)


def slices(net, x):
    outputs = torch.cat(net(x), dim=1)
    return outputs[:, :3], outputs[:, 3:]


def function_of_two_outputs(net, x):
    return Both.apply(torch.tanh(net.trunk(x)), net.first.weight, net.second.weight)


def sum_of_everything(net, x):
    nothing = 0 * sum(parameter.sum() for parameter in net.parameters())
    return [output + nothing for output in net(x)]


def negative_zeros(net, x):
    nothing = -0.0 * sum(parameter.sum() for parameter in net.parameters())
    return [output + nothing for output in net(x)]


def masked(net, x):
    first, second = net(x)
    return first + torch.zeros(len(x), 1) * second.sum(1, keepdim=True), second + first.sum() * 0


def scripted(net, x):
    with torch.no_grad():
        module = torch.jit.trace(net, x)
    return module(x)


WAYS = [
    plain,
    compiled,
    reentrant_checkpoint,
    slices,
    function_of_two_outputs,
    sum_of_everything,
    negative_zeros,
    masked,
    scripted,
]


def losses_of(outputs, x):
    first, second = outputs
    return first.square().mean(), (second - x).square().mean() * 3


def batch(seed=0, dtype=torch.float32):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expected_gradients(net, x, rule="genrep", weights=None, groups="all"):
    """With `torch.autograd.grad`, which says None; by the definition of GenRep, else with the
    rule's weights of the trunk alone.
    """
    parameters = list(net.parameters())
    first, second = (
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for loss in losses_of(net(x), x)
    )
    weights = weights or (WEIGHTS if rule == "genrep" else (1.0, 1.0))
    shared = [t for t in range(len(parameters)) if first[t] is not None and second[t] is not None]
    rows = {}
    for members in [shared] if groups == "all" else [[t] for t in shared]:
        aligner = gf.GradientAligner(
            [nn.Parameter(parameters[t].detach().clone()) for t in members],
            rule=rule,
            weights=weights,
        )
        for name, side in zip(aligner.names, (first, second), strict=True):
            with aligner.collect(name):
                for parameter, t in zip(aligner.parameters, members, strict=True):
                    parameter.grad = side[t].clone()
        aligner.align()
        rows |= {
            t: parameter.grad for t, parameter in zip(members, aligner.parameters, strict=True)
        }
    for t in range(len(parameters)):
        if t not in rows:
            rows[t] = weights[1] * second[t] if first[t] is None else weights[0] * first[t]
    return [rows[t] for t in range(len(parameters))]


def assert_close(results, expected):
    torch.testing.assert_close(results, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("groups", "flat"), [("all", False), ("tensor", True)])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_what_the_plain_model_gives(way, groups, flat):
    net, x = Net(), batch()
    expected = expected_gradients(net, x, groups=groups)
    aligner = gf.GradientAligner(net, groups=groups, flat=flat)
    stats = aligner.backward(*losses_of(way(net, x), x))
    assert_close([parameter.grad for parameter in net.parameters()], expected)
    alone = gf.GradientAligner(Net(), groups=groups)
    reference = alone.backward(*losses_of(alone.module(x), x))
    for name in ("cosine", "alpha", "norms", "coefficients"):
        torch.testing.assert_close(
            getattr(stats, name), getattr(reference, name), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("groups", ["all", "tensor"])
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule, groups):
    net, x = Net(), batch()
    expected = expected_gradients(net, x, rule=rule, groups=groups)
    gf.GradientAligner(net, rule=rule, groups=groups).backward(*losses_of(slices(net, x), x))
    assert_close([parameter.grad for parameter in net.parameters()], expected)


def test_a_rule_of_ones_own_sees_shared_tensors_alone():
    net, x, seen = Net(), batch(), []

    def rule(gram):
        seen.append(gram)
        return torch.ones(gram.shape[:2], dtype=gram.dtype)

    for way in (plain, slices):
        gf.GradientAligner(net, rule=rule).backward(*losses_of(way(net, x), x))
        net.zero_grad()
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("max_norm", [None, 0.01])
@pytest.mark.parametrize("flat", [False, True])
def test_the_fused_step_is_the_one_of_the_plain_model(flat, max_norm):
    results = []
    for way in (plain, slices):
        net = Net()
        aligner = gf.GradientAligner(net, flat=flat)
        optimizer = gf.AlignedAdamW(net.parameters(), lr=0.01, aligner=aligner, max_norm=max_norm)
        for step in range(3):
            x = batch(step)
            aligner.backward(*losses_of(way(net, x), x))
            optimizer.step()
            optimizer.zero_grad()
        results.append(([parameter.detach() for parameter in net.parameters()], aligner.stats))
    (eager, eager_stats), (sliced, sliced_stats) = results
    torch.testing.assert_close(sliced, eager, rtol=1e-5, atol=1e-6)
    if max_norm is not None:
        torch.testing.assert_close(
            sliced_stats.total_norm, eager_stats.total_norm, rtol=1e-5, atol=0
        )


def test_micro_batches_of_which_some_reach_a_tensor():
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    aligner = gf.GradientAligner(parameters, groups="tensor")
    zero, one = torch.zeros(3), torch.tensor([1.0, 2.0, -1.0])
    for first, second in ((zero, zero), (one, zero)):
        for name, gradients in zip(aligner.names, ((one, one), (first, second)), strict=True):
            with aligner.collect(name):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient.clone()
    aligner.align()
    # Of the sums, 2 one and one, and 2 one and zero: equal directions are added with their weights.
    torch.testing.assert_close(
        [parameter.grad for parameter in parameters], [(0.7 * 2 + 0.3) * one, 0.7 * 2 * one]
    )


def test_both_zero_steps_as_adamw_does_with_a_zero_gradient():
    x = torch.ones(3)
    ours, theirs = nn.Parameter(x.clone()), nn.Parameter(x.clone())
    optimizer = gf.AlignedAdamW(
        [ours], lr=0.1, weight_decay=0.5, aligner=gf.GradientAligner([ours])
    )
    plain_optimizer = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.5)
    for factor in (1.0, 0.0, 0.0):
        optimizer.aligner.backward((factor * ours).sum(), (2 * factor * ours).sum())
        optimizer.step()
        theirs.grad = torch.full_like(theirs, factor * (0.7 + 2 * 0.3))
        plain_optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert optimizer.state[ours]["step"].item() == 3


def test_three_losses_of_which_one_gives_zeros():
    parameters = [nn.Parameter(torch.zeros(4)) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    gradients = [[torch.randn(4, generator=generator) for _ in parameters] for _ in range(3)]
    gradients[2][1] = torch.zeros(4)
    aligner = gf.GradientAligner(
        parameters, names=("a", "b", "c"), rule="config", weights=(1.0, 2.0, 3.0)
    )
    for name, side in zip(aligner.names, gradients, strict=True):
        with aligner.collect(name):
            for parameter, gradient in zip(parameters, side, strict=True):
                parameter.grad = gradient.clone()
    stats = aligner.align()
    alone = [torch.stack([side[0] for side in gradients])]
    torch.testing.assert_close(stats.norms[0], alone[0].double().norm(dim=1))
    torch.testing.assert_close(parameters[1].grad, gradients[0][1] + 2 * gradients[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [1, 1000, 20_000])
def test_one_tiny_element_reaches(size, dtype):
    smallest = {
        torch.float32: 1e-45,
        torch.bfloat16: 1e-40,
        torch.float16: 6e-8,
        torch.float64: 5e-324,
    }[dtype]
    reached, unreached = [nn.Parameter(torch.zeros(size, dtype=dtype)) for _ in range(2)]
    tiny = torch.zeros(size, dtype=dtype)
    tiny[size // 2] = smallest
    assert tiny.any()
    aligner = gf.GradientAligner(
        [reached, unreached], groups="tensor", rule="pcgrad", weights=(5.0, 5.0)
    )
    for name, gradients in zip(
        aligner.names, ((torch.ones_like(tiny),) * 2, (tiny, torch.zeros_like(tiny))), strict=True
    ):
        with aligner.collect(name):
            for parameter, gradient in zip((reached, unreached), gradients, strict=True):
                parameter.grad = gradient.clone()
    aligner.align()
    # Shared tensors take PCGrad's sum, the others the weights that were asked for.
    assert reached.grad[0].item() == 1 and unreached.grad[0].item() == 5
