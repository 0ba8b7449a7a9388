"""GradientAligner through every way in which gradients come about."""

import gc
import math
import weakref

import pytest
import torch
import torch._dynamo.testing
from small_models import (
    GROUPINGS,
    NAMES,
    Model,
    aligned,
    assert_gradients,
    batch,
    collect_all,
    gradients_of,
    trained,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import genrep_fast as gf


def test_compiled_model():
    model = Model()
    aligner = gf.GradientAligner(model, groups="block")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for step in range(3):  # the passes differ in whether hooks are registered
        expected, _ = aligned(model, "block")
        if step == 2:
            collect_all(aligner, compiled_like(model, compiled))
            aligner.align()
        else:
            aligner.backward(*compiled(batch()))
        assert_gradients(model, expected, rtol=1e-10, atol=1e-12)
        model.zero_grad()
    assert counter.frame_count == 1


def compiled_like(model, compiled):
    """`compiled` with the attribute that `collect_all` reads."""

    def forward(x):
        return compiled(x)

    forward.unused = model.unused
    return forward


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    model = Model()

    def forward(x):
        # The first block twice: reentrant checkpoints deliver its gradient in two parts.
        x = x.requires_grad_()
        for block in (model.blocks[0], model.blocks[1], model.blocks[0]):
            x = checkpoint(
                lambda x, block=block: torch.tanh(block(x)), x, use_reentrant=use_reentrant
            )
        return model.perception(x).square().mean(), (model.generation(x) - 1).abs().mean()

    def plain(x):
        for block in (model.blocks[0], model.blocks[1], model.blocks[0]):
            x = torch.tanh(block(x))
        return model.perception(x).square().mean(), (model.generation(x) - 1).abs().mean()

    aligner = gf.GradientAligner(model, groups="block")
    for _ in range(2):
        for loss, name in enumerate(NAMES):
            with aligner.collect(name):
                forward(batch())[loss].backward()
        aligner.align()
        expected, _ = gf.align_gradients(
            *gradients_of(model, forward=plain), groups=GROUPINGS["block"][1]
        )
        assert_gradients(model, expected)
        model.zero_grad()


def test_autocast():
    model = Model(torch.float32)
    aligner = gf.GradientAligner(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch(dtype=torch.float32))
        with torch.autocast("cpu", enabled=False):
            expected, _ = gf.align_gradients(
                *[
                    torch.autograd.grad(loss, trained(model), allow_unused=True, retain_graph=True)
                    for loss in losses
                ]
            )
        aligner.backward(*losses)  # within autocast, too
    assert_gradients(model, expected, rtol=1e-6, atol=1e-8)
    assert model.blocks[0].weight.grad.dtype == torch.float32


def test_grad_scaler_sees_what_is_written():
    model = Model(torch.float32)
    expected, _ = aligned(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in trained(model)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    aligner = gf.GradientAligner(model)
    aligner.backward(
        *model(batch(dtype=torch.float32)),
        backward=lambda loss, retain_graph: scaler.scale(loss).backward(retain_graph=retain_graph),
    )
    scaler.step(optimizer)
    scaler.update()
    for parameter, start, gradient in zip(trained(model), before, expected, strict=True):
        torch.testing.assert_close(
            parameter.detach(), start if gradient is None else start - gradient
        )
    assert scaler.get_scale() == 1024.0


def test_the_users_backward_is_called_for_each_loss():
    model, calls = Model(), []

    def backward(loss, retain_graph):
        calls.append(retain_graph)
        loss.backward(retain_graph=retain_graph)

    gf.GradientAligner(model).backward(*model(batch()), backward=backward)
    assert calls == [True, False]


@pytest.mark.parametrize("flat", [False, True])
def test_gradients_set_by_hand(flat):
    parameter = nn.Parameter(torch.zeros(2, 3))
    a, b = torch.tensor([1.0, 2.0, 3.0]).expand(2, 3), torch.arange(6.0).reshape(3, 2).t()
    aligner = gf.GradientAligner([parameter], flat=flat)
    for name, gradient in zip(NAMES, (a, b), strict=True):
        with aligner.collect(name):
            parameter.grad = gradient
    aligner.align()
    torch.testing.assert_close(parameter.grad, gf.align_gradients([a], [b])[0][0])
    assert a[0].tolist() == [1, 2, 3]  # the expanded tensor was not written to


def test_an_aligner_that_is_gone_leaves_no_gradients_behind():
    model = Model()
    aligner = gf.GradientAligner(model)
    collect_all(aligner, model)
    gone = weakref.ref(aligner)
    gc.disable()
    try:
        del aligner
        assert gone() is None
    finally:
        gc.enable()


def test_gradients_made_under_inference_mode():
    parameter = nn.Parameter(torch.zeros(3))
    aligner = gf.GradientAligner([parameter])
    for name, value in zip(NAMES, (1.0, 2.0), strict=True):
        with aligner.collect(name):
            with torch.inference_mode():
                gradient = torch.full((3,), value)
            parameter.grad = gradient
    aligner.align()
    torch.testing.assert_close(parameter.grad, torch.full((3,), 0.7 + 2 * 0.3))


@pytest.mark.filterwarnings("ignore:Using backward.* with create_graph=True")
def test_create_graph():
    model = Model()
    aligner = gf.GradientAligner(model)
    expected, _ = aligned(model)
    aligner.backward(
        *model(batch()),
        backward=lambda loss, retain_graph: loss.backward(retain_graph=True, create_graph=True),
    )
    assert_gradients(model, expected)
    assert not model.blocks[0].weight.grad.requires_grad


def test_parameters_count_while_they_require_gradients():
    model = Model()
    model.blocks[1].requires_grad_(False)
    aligner = gf.GradientAligner(model, groups="block")
    assert aligner.group_keys == ["unused", "blocks.0", "perception", "generation", "extra.0"]
    expected, _ = gf.align_gradients(*gradients_of_shared(model), groups=[0, 0])
    stats = aligner.backward(*model(batch()))
    torch.testing.assert_close(
        [parameter.grad for parameter in model.blocks[0].parameters()],
        expected,
        rtol=1e-12,
        atol=1e-14,
    )
    assert model.blocks[1].weight.grad is None and len(stats.cosine) == 5
    model.zero_grad()
    model.blocks[1].requires_grad_(True)
    expected, _ = aligned(model, "block")
    stats = aligner.backward(*model(batch()))
    assert_gradients(model, expected)
    assert aligner.group_keys[5] == "blocks.1" and len(stats.cosine) == 6


def gradients_of_shared(model):
    return [
        torch.autograd.grad(loss, list(model.blocks[0].parameters()), retain_graph=True)
        for loss in model(batch())
    ]


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (
            ["transformer_blocks.3.attn.to_out.0.weight", "transformer_blocks.10.norm.bias"],
            ["transformer_blocks.3", "transformer_blocks.10"],
        ),
        (["pos_embed.proj.weight", "pos_embed.proj.bias", "token"], ["pos_embed.proj", "token"]),
        (["0.weight", "conv2.weight", "0.bias"], ["0", "conv2"]),
    ],
)
def test_blocks(names, keys):
    assert (
        gf.GradientAligner(
            [(name, nn.Parameter(torch.ones(1))) for name in names], groups="block"
        ).group_keys
        == keys
    )


def test_losses_that_reach_nothing():
    model = Model()
    aligner = gf.GradientAligner(model, groups="all")
    with aligner.collect("perception"):
        pass
    with aligner.collect("generation"):
        model(batch())[1].backward()
    stats = aligner.align(max_norm=math.inf)
    assert stats.cosine.tolist() == [0] and stats.norms.tolist() == [[0, 0]]
    expected = [None if gradient is None else 0.3 * gradient for gradient in gradients_of(model)[1]]
    assert_gradients(model, expected)
    model.zero_grad()
    for name in NAMES:
        with aligner.collect(name):
            pass
    with pytest.raises(
        RuntimeError,
        match=r"no loss reached any of the aligner's 11 parameters.*load_state_dict\(assign=True\)",
    ):
        aligner.align()
