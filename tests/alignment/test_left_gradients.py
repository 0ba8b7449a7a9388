"""What happens to ``.grad`` inside the blocks of `collect`, between them, and before the step: it
counts, is dropped, or is an error.
"""

import contextlib

import pytest
import torch
from torch import nn

import genrep_fast as gf

NAMES = ("perception", "generation")


class Net(nn.Module):
    """A trunk that both losses reach and a head for each; `width` makes it small or larger than any
    batch of Gram matrices.
    """

    def __init__(self, width=7):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(6, width)
        self.middle = nn.Linear(width, width)
        self.first = nn.Linear(width, 3)
        self.second = nn.Linear(width, 6)

    def forward(self, x):
        features = torch.tanh(self.middle(torch.tanh(self.trunk(x))))
        return self.first(features).square().mean(), (self.second(features) - x).square().mean()


def batch(seed=0):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


def gradients_of(net, seed=0):
    """For each loss, the gradients of all parameters, None where it does not reach one."""
    return [
        [None if gradient is None else gradient.clone() for gradient in gradients]
        for gradients in (
            torch.autograd.grad(loss, list(net.parameters()), retain_graph=True, allow_unused=True)
            for loss in net(batch(seed))
        )
    ]


def assert_aligned(net, gradients):
    expected, _ = gf.align_gradients(*gradients)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


def collect(aligner, net, seed=0, names=NAMES):
    for name in names:
        with aligner.collect(name):
            net(batch(seed))[NAMES.index(name)].backward()


# Inside a block: what it leaves in .grad counts


def clip_norm(parameters):
    nn.utils.clip_grad_norm_(parameters, 1e-3)


def clip_value(parameters):
    nn.utils.clip_grad_value_(parameters, 1e-3)


def scale(parameters):
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)


def scale_data(parameters):
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.data.mul_(0.25)


def replace(parameters):
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = -parameter.grad


def drop_one(parameters):
    next(iter(parameters)).grad = None


EDITS = [clip_norm, clip_value, scale, scale_data, replace, drop_one]


def edited(gradients, edit):
    """`gradients` of one loss after `edit`."""
    parameters = [
        nn.Parameter(torch.zeros(1) if gradient is None else torch.zeros_like(gradient))
        for gradient in gradients
    ]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()
    edit(parameters)
    return [parameter.grad for parameter in parameters]


def added(one, other):
    if one is None or other is None:
        return other if one is None else one
    return one + other


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    ("width", "micro_batches", "flat"),
    [(7, 1, False), (7, 3, False), (7, 2, True), (2100, 1, False)],
)
def test_what_a_block_does_to_grad_counts(width, micro_batches, flat, edit):
    net = Net(width)
    aligner = gf.GradientAligner(net, flat=flat)
    for _ in range(2):
        sums = [[None] * 8, [None] * 8]
        for seed in range(micro_batches):
            plain = gradients_of(net, seed)
            for loss, name in enumerate(NAMES):
                sums[loss] = [
                    added(a, b) for a, b in zip(sums[loss], edited(plain[loss], edit), strict=True)
                ]
                with aligner.collect(name):
                    net(batch(seed))[loss].backward()
                    for parameter, gradient in zip(net.parameters(), plain[loss], strict=True):
                        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
                    edit(list(net.parameters()))
        aligner.align()
        assert_aligned(net, sums)
        net.zero_grad()


def test_what_was_collected_can_be_read_until_the_next_block():
    net = Net()
    aligner = gf.GradientAligner(net)
    plain = gradients_of(net)
    for loss, name in enumerate(NAMES):
        collect(aligner, net, names=[name])
        for parameter, gradient in zip(net.parameters(), plain[loss], strict=True):
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)
    aligner.align()
    assert_aligned(net, plain)


# Between blocks: a batch is dropped


def by_optimizer(set_to_none):
    return lambda net, aligner: torch.optim.SGD(net.parameters(), 0.1).zero_grad(
        set_to_none=set_to_none
    )


def by_hand(net, aligner):
    for parameter in net.parameters():
        parameter.grad = None


DROPS = {
    "optimizer": by_optimizer(True),
    "optimizer, zeros": by_optimizer(False),
    "model": lambda net, aligner: net.zero_grad(),
    "model, zeros": lambda net, aligner: net.zero_grad(set_to_none=False),
    "by hand": by_hand,
    "aligner": lambda net, aligner: aligner.zero_grad(),
}
BEFORE = {
    "one loss": lambda aligner, net: collect(aligner, net, 5, ["perception"]),
    "the other loss": lambda aligner, net: collect(aligner, net, 5, ["generation"]),
    "both losses": lambda aligner, net: collect(aligner, net, 5),
    "a batch and a half": lambda aligner, net: (
        collect(aligner, net, 5),
        collect(aligner, net, 6, ["perception"]),
    ),
    "two batches": lambda aligner, net: (collect(aligner, net, 5), collect(aligner, net, 6)),
}


@pytest.mark.parametrize(
    ("before", "flat"), [*((before, False) for before in BEFORE), ("a batch and a half", True)]
)
@pytest.mark.parametrize("drop", DROPS)
def test_a_dropped_batch_does_not_join_the_next(drop, before, flat):
    net = Net()
    aligner = gf.GradientAligner(net, flat=flat)
    BEFORE[before](aligner, net)
    DROPS[drop](net, aligner)
    for parameter in net.parameters():  # zeros are in the way of the next block, as they are of any
        parameter.grad = None
    collect(aligner, net)
    aligner.align()
    assert_aligned(net, gradients_of(net))


@pytest.mark.parametrize("drop", [drop for drop in DROPS if "zeros" in drop])
def test_zeros_are_taken_away(drop):
    net = Net()
    aligner = gf.GradientAligner(net)
    collect(aligner, net, 5, ["perception"])
    DROPS[drop](net, aligner)
    collect(aligner, net)
    aligner.align()
    assert_aligned(net, gradients_of(net))


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("drop", DROPS)
def test_a_dropped_batch_does_not_join_the_next_step_of_the_fused_optimizer(drop, before):
    results = []
    for dropped in (True, False):
        net = Net()
        aligner = gf.GradientAligner(net)
        optimizer = gf.AlignedAdamW(net.parameters(), lr=0.1, aligner=aligner)
        if dropped:
            BEFORE[before](aligner, net)
            DROPS[drop](net, aligner)
        aligner.backward(*net(batch()))
        optimizer.step()
        results.append([parameter.detach() for parameter in net.parameters()])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("drop", DROPS)
def test_align_after_a_drop_says_so(drop):
    net = Net()
    aligner = gf.GradientAligner(net)
    collect(aligner, net)
    DROPS[drop](net, aligner)
    message = (
        "to align: run its backward pass"
        if drop == "aligner"
        else "to align: they were dropped after they had been collected"
    )
    with pytest.raises(RuntimeError, match=message):
        aligner.align()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_drop_of_a_part_is_refused(set_to_none):
    net = Net()
    aligner = gf.GradientAligner(net)
    collect(aligner, net, names=["perception"])
    torch.optim.SGD(net.trunk.parameters(), 0.1).zero_grad(set_to_none=set_to_none)
    for call in (lambda: collect(aligner, net), lambda: aligner.backward(*net(batch()))):
        with pytest.raises(
            RuntimeError,
            match=r"a \.grad was written to, replaced or set to None .* "
            r"start the step over with zero_grad\(\)",
        ):
            call()
    aligner.zero_grad()
    aligner.backward(*net(batch()))
    assert_aligned(net, gradients_of(net))


# Before the step: whatever is done to .grad would be ignored


def add_a_third_loss(parameters):
    (1e-2 * sum(parameter.square().sum() for parameter in parameters)).backward()


def set_one(parameters):
    parameter = list(parameters)[-1]
    parameter.grad = torch.ones_like(parameter)


def scale_data_of_matrices(parameters):
    for parameter in parameters:
        if parameter.grad is not None and parameter.ndim > 1:
            parameter.grad.data.mul_(0.5)


def center_data(parameters):
    for parameter in parameters:
        if parameter.grad is not None and parameter.ndim > 1:
            parameter.grad.data.sub_(parameter.grad.mean(dim=1, keepdim=True))


def set_none(parameters):
    for parameter in parameters:
        parameter.grad = None


def replace_with_a_copy(parameters):
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


TOUCHES = [
    clip_norm,
    clip_value,
    scale,
    scale_data,
    replace,
    replace_with_a_copy,
    set_none,
    add_a_third_loss,
    set_one,
    drop_one,
    scale_data_of_matrices,
    center_data,
]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("touch", TOUCHES)
def test_the_fused_step_refuses_a_grad_that_was_touched(touch, scaled):
    net = Net()
    aligner = gf.GradientAligner(net)
    optimizer = gf.AlignedAdamW(net.parameters(), lr=0.1, aligner=aligner)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
    aligner.backward(*(scaler.scale(loss) for loss in net(batch())))
    touch(list(net.parameters()))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    # A GradScaler itself refuses to go on where no gradient is left.
    with pytest.raises((RuntimeError, AssertionError), match=r"\.grad|No inf checks|dropped"):
        scaler.step(optimizer)
    torch.testing.assert_close(
        [parameter.detach() for parameter in net.parameters()], before, rtol=0, atol=0
    )
    assert not optimizer.state


@pytest.mark.parametrize(
    "touch", [scale, scale_data, scale_data_of_matrices, center_data, replace, drop_one, set_one]
)
def test_align_refuses_a_grad_that_was_touched(touch):
    net = Net()
    aligner = gf.GradientAligner(net)
    collect(aligner, net)
    if touch is set_one:
        net.unknown = nn.Parameter(torch.zeros(1))
    touch(list(net.parameters()))
    with pytest.raises(RuntimeError, match="grad|a loss reached unknown"):
        aligner.align()


@pytest.mark.parametrize("steps", [1, 3])
def test_a_step_under_a_scaler_after_it_looked_for_infinities(steps):
    net = Net()
    aligner = gf.GradientAligner(net)
    optimizer = gf.AlignedAdamW(net.parameters(), lr=0.1, aligner=aligner)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed in range(steps):
        aligner.backward(*(scaler.scale(loss) for loss in net(batch(seed))))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.state[net.trunk.weight]["step"].item() == steps


# Parameters that are not the aligner's


def test_parameters_that_were_replaced():
    net = Net()
    aligner = gf.GradientAligner(net)
    unnamed = gf.GradientAligner(list(net.parameters()))
    net.load_state_dict(
        {name: tensor.clone() for name, tensor in net.state_dict().items()}, assign=True
    )
    with pytest.raises(
        RuntimeError,
        match=r"a loss reached trunk\.weight, which is not among .* load_state_dict\(assign=True\)",
    ):
        aligner.backward(*net(batch()))
    net.zero_grad()
    with pytest.raises(
        RuntimeError,
        match="no loss reached any of the aligner's 8 parameters: .* "
        r"load_state_dict\(assign=True\)",
    ):
        unnamed.backward(*net(batch()))


@pytest.mark.parametrize("fused", [False, True])
def test_parameters_that_joined_the_module(fused):
    net = Net()
    aligner = gf.GradientAligner(net)
    optimizer = gf.AlignedAdamW(net.parameters(), aligner=aligner) if fused else None
    aligner.backward(*net(batch()))
    aligner.zero_grad()
    net.first = nn.Sequential(net.first, nn.Linear(3, 3))
    with pytest.raises(
        RuntimeError,
        match=r"a loss reached first\.1\.weight, which is not among the aligner's parameters: "
        "it joined",
    ):
        aligner.backward(*net(batch()))
        optimizer.step()
    # One that no loss reaches is no concern of ours.
    net = Net()
    aligner = gf.GradientAligner(net)
    net.adapter = nn.Linear(2, 2)
    aligner.backward(*net(batch()))


def test_a_block_that_raises_leaves_what_was_collected_before():
    net = Net()
    aligner = gf.GradientAligner(net)
    collect(aligner, net, names=["perception"])
    with contextlib.suppress(ZeroDivisionError), aligner.collect("generation"):
        raise ZeroDivisionError
    net.zero_grad()
    collect(aligner, net, 3)
    aligner.align()
    assert_aligned(net, gradients_of(net, 3))


# Inside a block: calls that belong behind it


def joint(net, aligner):
    aligner.backward(*net(batch(1)))


def alone(net, aligner):
    aligner.align()


@pytest.mark.parametrize("call", [joint, alone])
@pytest.mark.parametrize("before", [0, 1])
def test_a_call_that_belongs_behind_the_block_is_refused_in_it(call, before):
    net = Net()
    aligner = gf.GradientAligner(net)
    for _ in range(before):
        collect(aligner, net)
    message = r"inside the block that collects 'perception', .* call it behind the block"
    with pytest.raises(RuntimeError, match=message), aligner.collect("perception"):
        net(batch(1))[0].backward()
        call(net, aligner)
    aligner.zero_grad()
    collect(aligner, net)
    aligner.align()
    assert_aligned(net, gradients_of(net))


def test_a_step_in_a_block_is_refused():
    net = Net()
    aligner = gf.GradientAligner(net)
    optimizer = gf.AlignedAdamW(net.parameters(), aligner=aligner)
    collect(aligner, net)
    message = "step inside the block that collects 'generation'"
    with pytest.raises(RuntimeError, match=message), aligner.collect("generation"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("before", [0, 1])
def test_a_block_that_ends_with_zero_grad_collected_nothing(before):
    net = Net()
    aligner = gf.GradientAligner(net)
    for _ in range(before):
        collect(aligner, net, 5)
    with aligner.collect("perception"):
        net(batch(1))[0].backward()
        aligner.zero_grad()
    collect(aligner, net, names=["generation"])
    with pytest.raises(
        RuntimeError, match="no gradients of perception to align: they were dropped"
    ):
        aligner.align()
    collect(aligner, net, names=["perception"])
    aligner.align()
    assert_aligned(net, gradients_of(net))


def test_a_block_that_begins_with_zero_grad_counts():
    net = Net()
    aligner = gf.GradientAligner(net)
    collect(aligner, net, 5)
    with aligner.collect("perception"):
        aligner.zero_grad()
        net(batch())[0].backward()
    collect(aligner, net, names=["generation"])
    aligner.align()
    assert_aligned(net, gradients_of(net))


@pytest.mark.parametrize("scaled", [False, True])
def test_scaling_shows_on_a_gradient_of_zeros(scaled):
    net = Net()
    # The smallest tensor, of which .grad holds a copy, and one that no loss moves.
    net.shift = nn.Parameter(torch.zeros(1))
    aligner = gf.GradientAligner(net)
    optimizer = gf.AlignedAdamW(net.parameters(), lr=0.1, aligner=aligner)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    perception, generation = net(batch())
    aligner.backward(scaler.scale(perception + 0 * net.shift.sum()), scaler.scale(generation))
    scale_data(net.parameters())
    with pytest.raises(RuntimeError, match=r"a \.grad was written to"):
        scaler.step(optimizer)
    assert not optimizer.state
