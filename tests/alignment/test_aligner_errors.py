"""What GradientAligner refuses, and what it does after a pass that raised."""

import copy
import math
import pickle

import pytest
import torch
import torch._dynamo.testing
from small_models import NAMES, Model, aligned, assert_gradients, batch, collect_all
from torch import nn

import genrep_fast as gf


def assert_works(aligner, model):
    expected, _ = aligned(model)
    aligner.backward(*model(batch()))
    assert_gradients(model, expected)


def test_a_pass_that_raises_is_dropped():
    model = Model()
    aligner = gf.GradientAligner(model)
    expected, _ = aligned(model)
    with aligner.collect("perception"):
        model(batch())[0].backward()
    with pytest.raises(ZeroDivisionError), aligner.collect("generation"):
        model(batch(2))[1].backward()
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="no gradients of generation"):
        aligner.align()
    with aligner.collect("generation"):
        model(batch())[1].backward()
    aligner.align()
    assert_gradients(model, expected)


@pytest.mark.parametrize("flat", [False, True])
def test_a_model_converted_after_the_collection_is_named(flat):
    model = Model(torch.float32)
    aligner = gf.GradientAligner(model, flat=flat)
    collect_all(aligner, model)
    model.double()
    message = r"the collected gradient of \S+ is torch.float32 .* takes torch.float64 .* converted"
    with pytest.raises(RuntimeError, match=message):
        aligner.align()


def test_a_later_micro_batch_that_raises_ends_the_step():
    model = Model()
    aligner = gf.GradientAligner(model)
    collect_all(aligner, model)
    with pytest.raises(ZeroDivisionError), aligner.collect("perception"):
        model(batch(2))[0].backward()
        raise ZeroDivisionError
    for call in (aligner.align, aligner.collect("perception").__enter__):
        with pytest.raises(RuntimeError, match=r"start the step over with zero_grad\(\)"):
            call()
    aligner.zero_grad()
    assert_works(aligner, model)


def test_a_joint_backward_that_raises_leaves_nothing():
    model = Model()
    aligner = gf.GradientAligner(model)
    loss, _ = model(batch())
    with pytest.raises(RuntimeError, match="does not require grad"):
        aligner.backward(loss, torch.zeros(()))
    assert_works(aligner, model)


def test_a_joint_backward_that_raises_after_micro_batches_ends_the_step():
    model = Model()
    aligner = gf.GradientAligner(model)
    with aligner.collect("perception"):
        model(batch())[0].backward()
    with pytest.raises(ValueError, match="losses must be one for each"):
        aligner.backward(torch.zeros(()))
    with aligner.collect("perception"):  # nothing had been changed
        pass
    loss, _ = model(batch(2))
    with pytest.raises(RuntimeError, match="does not require grad"):
        aligner.backward(loss, torch.zeros(()))
    with pytest.raises(RuntimeError, match=r"start the step over with zero_grad\(\)"):
        aligner.align()


def test_a_held_gradient_is_named():
    model = Model()
    aligner = gf.GradientAligner(model)
    aligner.backward(*model(batch()))
    with pytest.raises(
        RuntimeError,
        match=r"blocks\.0\.weight holds a \.grad already.*"
        r"zero_grad\(set_to_none=True\).*AlignedAdamW",
    ):
        aligner.backward(*model(batch()))
    unnamed = gf.GradientAligner(model.parameters())
    with (
        pytest.raises(RuntimeError, match=r"params\[2\] holds a \.grad already"),
        unnamed.collect("perception"),
    ):
        pass


def test_blocks_of_collect_do_not_nest():
    aligner = gf.GradientAligner(Model())
    with (
        aligner.collect("perception"),
        pytest.raises(
            RuntimeError,
            match=r"collect\('generation'\) inside the block that collects 'perception'",
        ),
        aligner.collect("generation"),
    ):
        pass


def test_a_sparse_gradient_is_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    aligner = gf.GradientAligner(embedding)
    with (
        pytest.raises(
            ValueError, match="the gradient of weight must be dense, got layout torch.sparse_coo"
        ),
        aligner.collect("perception"),
    ):
        embedding(torch.tensor([1, 2])).sum().backward()
    assert embedding.weight.grad is None


def test_memory_that_is_written_again_is_refused():
    parameter = nn.Parameter(torch.zeros(3))
    buffer = torch.ones(3)  # as a replayed graph writes to
    aligner = gf.GradientAligner([("a", parameter)])
    with aligner.collect("perception"):
        parameter.grad = buffer
    for name in NAMES:
        with (
            pytest.raises(
                ValueError, match="the gradient of a lies where one that was collected before does"
            ),
            aligner.collect(name),
        ):
            parameter.grad = buffer
        if name == "perception":
            aligner.zero_grad()
            with aligner.collect("perception"):
                parameter.grad = buffer


def test_joint_mode_is_refused_where_processes_share_the_work(monkeypatch):
    model = Model()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(
        RuntimeError, match=r"2 processes.*aligner\.collect\(name\).*aligner\.align\(\)"
    ):
        gf.GradientAligner(model).backward(*model(batch()))


@pytest.mark.parametrize("flat", [False, True])
def test_gradients_are_left_alone_until_other_processes_averaged_them(flat, monkeypatch):
    model = Model()
    aligner = gf.GradientAligner(model, flat=flat)
    expected, _ = aligned(model, seeds=(1, 2))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for seed in (1, 2):
        for loss, name in enumerate(NAMES):
            with aligner.collect(name):
                model(batch(seed))[loss].backward()
                assert model.blocks[0].weight.grad is not None
    aligner.align()
    assert_gradients(model, expected)


def test_flat_refuses_a_parameter_in_the_middle_of_a_step():
    model = Model()
    model.blocks[1].requires_grad_(False)
    aligner = gf.GradientAligner(model, flat=True)
    with aligner.collect("perception"):
        model(batch())[0].backward()
    model.blocks[1].requires_grad_(True)
    with (
        pytest.raises(
            RuntimeError, match=r"blocks\.1\..* began to require a gradient within a step"
        ),
        aligner.collect("generation"),
    ):
        model(batch())[1].backward()


def test_a_parameter_may_begin_to_require_a_gradient_within_a_block():
    # A plain sum would be another one.
    conflicting = torch.tensor([-2.0, 1.0])
    parameter = nn.Parameter(torch.ones(2), requires_grad=False)
    aligner = gf.GradientAligner([parameter])
    with aligner.collect("perception"):
        parameter.requires_grad_(True)
        parameter.sum().backward()
    parameter.requires_grad_(False)
    with aligner.collect("generation"):
        parameter.requires_grad_(True)
        (conflicting * parameter).sum().backward()
    aligner.align()
    expected, _ = gf.align_gradients([torch.ones(2)], [conflicting])
    torch.testing.assert_close(parameter.grad, expected[0])


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_aligner_is_not_copied(duplicate):
    with pytest.raises(TypeError, match=r"cannot be copied or pickled: save state_dict\(\)"):
        duplicate(gf.GradientAligner(Model()))


def aligner_of(params=None, **options):
    return gf.GradientAligner(
        [nn.Parameter(torch.ones(2))] if params is None else params, **options
    )


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda: aligner_of([]), ValueError, "params must hold at least one parameter, got none"),
        (lambda: aligner_of(torch.ones(2)), TypeError, "params must be .* or a module, got Tensor"),
        (lambda: aligner_of(3), TypeError, "params must be .* or a module, got int"),
        (lambda: aligner_of([1.0]), TypeError, r"params\[0\] must be a parameter, got float"),
        (lambda: aligner_of([("a", None)]), TypeError, "a must be a parameter, got NoneType"),
        (
            lambda: aligner_of([torch.ones(2, requires_grad=True) * 2]),
            ValueError,
            r"params\[0\] must be a leaf tensor",
        ),
        (
            lambda: aligner_of([nn.Parameter(torch.ones(2))] * 2),
            ValueError,
            "params must be different tensors",
        ),
        (
            lambda: aligner_of([nn.Parameter(torch.ones(2, dtype=torch.cfloat))]),
            TypeError,
            "must be float32, .* got torch.complex64",
        ),
        (
            lambda: aligner_of(
                [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))]
            ),
            ValueError,
            r"params\[1\] must be on cpu like the first parameter, got meta",
        ),
        (
            lambda: aligner_of(names=("a",)),
            ValueError,
            r"names must be 2 to 8 different ones, got \('a',\)",
        ),
        (lambda: aligner_of(names=("a", "a")), ValueError, "names must be 2 to 8 different ones"),
        (
            lambda: aligner_of(names="ab"),
            TypeError,
            "names must be a sequence of strings, got 'ab'",
        ),
        (lambda: aligner_of(names=2), TypeError, "names must be a sequence of strings, got 2"),
        (lambda: aligner_of(names=("a", "b", "c")), ValueError, "'genrep' takes 2 losses, got 3"),
        (
            lambda: aligner_of(names=("a", "b", "c"), rule="config", weights=(1, 1)),
            ValueError,
            "weights must be 3 finite numbers",
        ),
        (lambda: aligner_of(weights=(1.0,)), ValueError, "weights must be 2 finite numbers"),
        (
            lambda: aligner_of(power=-1.0),
            ValueError,
            "power must be finite and not negative, got -1.0",
        ),
        (
            lambda: aligner_of(rule="genrap"),
            ValueError,
            "rule must be one of genrep, .* got 'genrap'",
        ),
        (
            lambda: aligner_of(names=("a", "b", "c"), weights=(1, 1, 1)),
            ValueError,
            "'genrep' takes 2 losses, got 3",
        ),
        (lambda: aligner_of(groups="layer"), ValueError, "groups must be \"all\", .* got 'layer'"),
        (lambda: aligner_of(groups="block"), ValueError, "params must be named for groups='block'"),
        (
            lambda: aligner_of(groups=lambda name: None),
            ValueError,
            "params must be named for groups=",
        ),
        (
            lambda: gf.GradientAligner(nn.Linear(1, 1), groups=list),
            TypeError,
            "groups must return a hashable key or None, got list for weight",
        ),
        (
            lambda: aligner_of().backward(torch.ones(())),
            ValueError,
            "losses must be one for each of perception, generation, got 1",
        ),
        (
            lambda: aligner_of().backward(torch.ones(()), None),
            TypeError,
            "the loss generation must be a tensor, got NoneType",
        ),
        (
            lambda: aligner_of().backward(torch.ones(2), torch.ones(())),
            ValueError,
            r"the loss perception must have one element, got shape \(2,\)",
        ),
        (
            lambda: aligner_of().collect("classes").__enter__(),
            ValueError,
            "name must be one of perception, generation, got 'classes'",
        ),
        (
            lambda: aligner_of().align(),
            RuntimeError,
            "no gradients of perception, generation to align",
        ),
        (lambda: aligner_of().align(max_norm="1"), TypeError, "max_norm must be a number, got str"),
        (
            lambda: aligner_of().align(max_norm=0.0),
            ValueError,
            "max_norm must be positive or None, got 0.0",
        ),
        (
            lambda: aligner_of().align(max_norm=math.nan),
            ValueError,
            "max_norm must be positive or None, got nan",
        ),
    ],
)
def test_wrong_arguments_raise(call, exception, message):
    with pytest.raises(exception, match=message):
        call()
