"""GradientAligner against `torch.autograd.grad` and `align_gradients`, through every way in which
gradients come about.
"""

import contextlib
import math

import pytest
import torch
import torch._dynamo.testing
from small_models import (
    GROUPINGS,
    NAMES,
    WEIGHTS,
    Model,
    aligned,
    assert_gradients,
    assert_stats,
    batch,
    by_block,
    collect_all,
    gradients_of,
    trained,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import genrep_fast as gf
from genrep_fast.alignment import tensor_grams

# Results


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("groups", GROUPINGS)
@pytest.mark.parametrize("joint", [True, False])
def test_equals_align_gradients(joint, groups, flat):
    model = Model()
    aligner = gf.GradientAligner(model, groups=groups, flat=flat)
    assert aligner.group_keys == GROUPINGS[groups][0]
    for seed in (1, 2):
        expected, expected_stats = aligned(model, groups, (seed,))
        if joint:
            stats = aligner.backward(*model(batch(seed)))
        else:
            collect_all(aligner, model, (seed,))
            stats = aligner.align()
        assert_gradients(model, expected)
        assert_stats(stats, expected_stats)
        assert stats is aligner.stats and stats.total_norm is None
        model.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_align_gradients_to_the_bit_in_every_dtype(dtype):
    model = Model(dtype)
    expected, _ = aligned(model, "tensor")
    gf.GradientAligner(model, groups="tensor").backward(*model(batch(dtype=dtype)))
    assert_gradients(model, expected, rtol=0, atol=0)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("order", ["ppgg", "pgpg", "ggpp", "gppgp"])
def test_micro_batches_add_up(order, flat):
    model = Model()
    aligner = gf.GradientAligner(model, groups="block", flat=flat)
    for _ in range(3):
        sums, counts = [[None] * 10, [None] * 10], [0, 0]
        for letter in order:
            loss = "pg".index(letter)
            counts[loss] += 1
            for t, gradient in enumerate(gradients_of(model, (counts[loss],))[loss]):
                if gradient is not None:
                    sums[loss][t] = gradient if sums[loss][t] is None else sums[loss][t] + gradient
            with aligner.collect(NAMES[loss]):
                model(batch(counts[loss]))[loss].backward()
        expected, expected_stats = gf.align_gradients(*sums, groups=GROUPINGS["block"][1])
        assert_stats(aligner.align(), expected_stats)
        assert_gradients(model, expected)
        model.zero_grad()


def test_three_losses_with_a_rule_of_ones_own():
    model = Model()

    def losses(x):
        return *model(x), model.trunk(x).sum()

    def rule(gram):
        assert gram.shape == (1, 3, 3) and gram.dtype == torch.float64
        return gram.sum(dim=2)

    aligner = gf.GradientAligner(model, names=("a", "b", "c"), weights=(1, 2, 3), rule=rule)
    stats = aligner.backward(*losses(batch()))
    rows = [
        torch.autograd.grad(loss, trained(model), allow_unused=True, retain_graph=True)
        for loss in losses(batch())
    ]
    matrix = gf.gram(*rows, groups=GROUPINGS["all"][1])
    torch.testing.assert_close(stats.coefficients, matrix.sum(dim=2))
    assert_gradients(
        model, gf.combine(rows, matrix.sum(dim=2), GROUPINGS["all"][1], weights=(1, 2, 3))
    )
    shared = [torch.cat([row[t].reshape(-1) for t in range(4)]) for row in rows]
    cosines = torch.stack(
        [torch.stack([torch.cosine_similarity(a, b, dim=0) for a in shared]) for b in shared]
    )
    torch.testing.assert_close(stats.cosine, cosines[None], rtol=1e-12, atol=1e-12)
    assert stats.alpha is None and stats.norms.shape == (1, 3)


def test_a_rule_by_name():
    model = Model()
    stats = gf.GradientAligner(model, groups=by_block, rule="pcgrad").backward(*model(batch()))
    p, g = gradients_of(model)
    for row, members in enumerate(([0, 1], [2, 3])):
        a, b = (torch.cat([rows[t].reshape(-1) for t in members]) for rows in (p, g))
        projected = [x - min(0.0, (x @ y / (y @ y)).item()) * y for x, y in ((a, b), (b, a))]
        result = torch.cat([trained(model)[t].grad.reshape(-1) for t in members])
        torch.testing.assert_close(result, sum(projected), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            stats.cosine[row], torch.cosine_similarity(a, b, dim=0), rtol=1e-12, atol=0
        )


def test_a_torchjd_weighting():
    aggregation = pytest.importorskip("torchjd.aggregation")
    model = Model()
    stats = gf.GradientAligner(model, groups=by_block, rule=aggregation.IMTLGWeighting()).backward(
        *model(batch())
    )
    expected = gf.gram(*gradients_of(model), groups=GROUPINGS[by_block][1])
    torch.testing.assert_close(
        stats.coefficients,
        torch.stack([aggregation.IMTLGWeighting()(matrix) for matrix in expected]),
    )


def test_weights_may_change_between_steps():
    model = Model()
    aligner = gf.GradientAligner(model, power=1.0)
    for weights in (WEIGHTS, (1.0, 0.5)):
        aligner.weights = weights
        expected, _ = aligned(model, weights=weights, power=1.0)
        aligner.backward(*model(batch()))
        assert_gradients(model, expected)
        aligner.zero_grad()


def test_weights_change_as_a_whole():
    aligner = gf.GradientAligner(Model())
    assert aligner.weights == WEIGHTS
    with pytest.raises(TypeError):
        aligner.weights[0] = 100.0


def test_a_nan_reaches_its_own_group_alone():
    model = Model()
    aligner = gf.GradientAligner(model, groups="block")
    with aligner.collect("perception"):
        model(batch())[0].backward()
        model.blocks[1].bias.grad[2] = math.nan
    with aligner.collect("generation"):
        model(batch())[1].backward()
    stats = aligner.align()
    assert stats.coefficients.isnan().any(dim=1).tolist() == [
        False,
        False,
        True,
        False,
        False,
        False,
    ]
    assert (
        not model.blocks[0].weight.grad.isnan().any() and model.blocks[1].weight.grad.isnan().all()
    )
    assert not model.perception.weight.grad.isnan().any()


# Clipping


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("groups", ["all", by_block])
@pytest.mark.parametrize("max_norm", [0.01, 100.0, math.inf])
def test_clipping_equals_clip_grad_norm(max_norm, groups, flat):
    model = Model()
    aligner = gf.GradientAligner(model, groups=groups, flat=flat)
    for _ in range(2):
        stats = aligner.backward(*model(batch()))
        coefficients = stats.coefficients
        total_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        expected = [parameter.grad for parameter in trained(model)]
        expected = [None if gradient is None else gradient.clone() for gradient in expected]
        model.zero_grad()
        collect_all(aligner, model)
        stats = aligner.align(max_norm=max_norm)
        torch.testing.assert_close(stats.total_norm, total_norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(stats.coefficients, coefficients, rtol=1e-12, atol=0)
        assert_gradients(model, expected)
        model.zero_grad()


# What happens to memory


def test_gradients_are_taken_over_and_written_in_place():
    model = Model()
    aligner = gf.GradientAligner(model)
    for _ in range(2):
        for loss, name in enumerate(aligner.names):
            with aligner.collect(name):
                model(batch())[loss].backward()
                if loss == 0:
                    first = {
                        parameter: parameter.grad
                        for parameter in trained(model)
                        if parameter.grad is not None
                    }
        aligner.align()
        for parameter, gradient in first.items():
            assert parameter.grad is gradient
        model.zero_grad()


SUMS = {  # of two parameters, to which autograd hands out views of one gradient
    "broadcast": lambda a, b: (a[None] + b[None]).reshape(-1, 30),
    "stack": lambda a, b: torch.stack([a, b]).sum(0),
    "view": lambda a, b: a.view(6, 5) + b.view(6, 5),
    "constant": lambda a, b: torch.ones(5, 6, dtype=a.dtype) + (a[None] + b[None]),
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("total", SUMS)
@pytest.mark.parametrize("micro_batches", [0, 1, 2])  # 0: joint
def test_gradients_that_share_memory(micro_batches, total, flat):
    a, b = parameters = [nn.Parameter(torch.randn(5, 6, dtype=torch.float64)) for _ in range(2)]
    aligner = gf.GradientAligner(parameters, groups="tensor", flat=flat)

    def losses():
        result = SUMS[total](a, b).sin().reshape(-1)
        return result @ torch.arange(30, dtype=a.dtype), result.cos().sum()

    gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses()]
    expected, _ = gf.align_gradients(*gradients, groups=[0, 1])
    if micro_batches:
        for _ in range(micro_batches):
            for loss, name in enumerate(NAMES):
                with aligner.collect(name):
                    losses()[loss].backward()
        aligner.align()
    else:
        aligner.backward(*losses())
    expected = [max(1, micro_batches) * gradient for gradient in expected]
    torch.testing.assert_close(
        [parameter.grad for parameter in parameters], expected, rtol=1e-12, atol=1e-12
    )


def test_only_gradients_that_overlap_are_copied():
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 2, 4, 3, 0)]
    buffers = [torch.arange(10.0), 1 - torch.arange(10.0)]
    places = [(2, 3), (0, 2), (5, 4), (7, 3), (6, 0)]  # the fourth overlaps the third
    expected, _ = gf.align_gradients(
        *[[buffer[start : start + size].clone() for start, size in places] for buffer in buffers]
    )
    aligner = gf.GradientAligner(parameters)
    for attempt in range(2):  # what a block that raised had taken is free again
        with contextlib.suppress(ValueError), aligner.collect("perception"):
            for parameter, (start, size) in zip(parameters, places, strict=True):
                parameter.grad = buffers[0][start : start + size]
            if attempt == 0:
                parameters[-1].grad = torch.zeros(0).to_sparse()
    with aligner.collect("generation"):
        for parameter, (start, size) in zip(parameters, places, strict=True):
            parameter.grad = buffers[1][start : start + size]
    aligner.align()
    torch.testing.assert_close([parameter.grad for parameter in parameters], expected)
    in_buffer = [
        parameter.grad.untyped_storage().data_ptr() == buffers[0].data_ptr()
        for parameter in parameters
    ]
    assert in_buffer[:4] == [True, True, True, False]


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_every_gradient_is_read_once_for_its_gram_matrix(max_norm, scaler, monkeypatch):
    model, sizes = Model(torch.float32), []
    compute = tensor_grams.gram_operator

    def counting(gradients, n, groups, num_groups):
        sizes.append(len(groups))
        return compute(gradients, n, groups, num_groups)

    monkeypatch.setattr(tensor_grams, "gram_operator", counting)
    optimizer = gf.AlignedAdamW(
        model.parameters(), aligner=gf.GradientAligner(model), max_norm=max_norm
    )
    # Whether a GradScaler is expected to look at .grad.
    optimizer.aligner.finish(scaler_used=scaler)
    optimizer.aligner.backward(*model(batch(dtype=torch.float32)))
    optimizer.step()
    # Nine parameters are reached and five of them shared, whose matrices say enough without
    # clipping and without a GradScaler.
    assert sum(sizes) == (9 if max_norm or scaler else 5)


def test_flat_gradients_are_neighbours_in_one_buffer():
    model = Model()
    aligner = gf.GradientAligner(model, groups=by_block, flat=True)
    pointers = []
    for _ in range(2):
        aligner.backward(*model(batch()))
        pointers.append([parameter.grad.data_ptr() for parameter in trained(model)[:8]])
        model.zero_grad()
    assert pointers[0] == pointers[1]
    # The parameter without a group is the last.
    sizes = [
        8 * parameter.numel()
        for parameter in (*trained(model)[:4], model.unused, *trained(model)[4:8])
    ]
    starts = [sum(sizes[:t]) for t in range(9)]
    assert [pointer - pointers[0][0] for pointer in pointers[0]] == [*starts[:4], *starts[5:]]


def test_flat_gram_matrices_follow_every_micro_batch():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    gradients = [
        [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0])],
        [torch.tensor([0.0, -1.0, 1.0]), torch.tensor([2.0, 1.0])],
    ]
    aligner = gf.GradientAligner(parameters, flat=True)
    # The optimizer checks for a GradScaler what was collected so far.
    optimizer = gf.AlignedAdamW(parameters, aligner=aligner)
    for batches in ((0, 1), (1,)):
        for name, side in zip(NAMES, gradients, strict=True):
            with aligner.collect(name):
                for t in batches:
                    parameters[t].grad = side[t].clone()
    optimizer.step()
    _, expected = gf.align_gradients(*[[first, 2 * second] for first, second in gradients])
    assert_stats(aligner.stats, expected)


def test_flat_keeps_strides_and_dtypes():
    shapes = {
        "half": ((4, 3, 2, 2), torch.bfloat16),
        "single": ((4, 3, 2, 2), torch.float32),
        "last": ((5,), torch.bfloat16),
    }
    parameters = {
        name: nn.Parameter(torch.randn(shape).to(dtype)) for name, (shape, dtype) in shapes.items()
    }
    parameters["single"].data = parameters["single"].data.to(memory_format=torch.channels_last)
    gradients = [[torch.randn_like(parameter) for parameter in parameters.values()] for _ in NAMES]
    expected, _ = gf.align_gradients(*gradients)
    aligner = gf.GradientAligner(parameters.items(), flat=True)
    for name, side in zip(NAMES, gradients, strict=True):
        with aligner.collect(name):
            for parameter, gradient in zip(parameters.values(), side, strict=True):
                parameter.grad = gradient
    aligner.align()
    for parameter, gradient in zip(parameters.values(), expected, strict=True):
        assert parameter.grad.stride() == parameter.stride()
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-6 if parameter.dtype == torch.float32 else 0, atol=0
        )


@pytest.fixture
def nan_filled_memory():
    """`torch.empty` returns NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_filled_memory")
def test_flat_buckets_that_are_rearranged():
    parameters = [nn.Parameter(torch.full((5,), 1.0 + t, dtype=torch.float64)) for t in range(3)]
    parameters[1].requires_grad_(False)
    aligner = gf.GradientAligner(parameters, flat=True)

    def losses():
        a, _, c = parameters
        return a.square().sum() + c.sin().sum(), a.cos().sum() + (a * c).sum()

    for _ in range(2):
        gradients = [
            torch.autograd.grad(loss, [parameters[0], parameters[2]], retain_graph=True)
            for loss in losses()
        ]
        expected, expected_stats = gf.align_gradients(*gradients)
        assert_stats(aligner.backward(*losses()), expected_stats)
        torch.testing.assert_close(
            [parameters[0].grad, parameters[2].grad], expected, rtol=1e-12, atol=1e-14
        )
        aligner.zero_grad()
        parameters[1].requires_grad_(True)  # and still not reached


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"),
    reason="this torch gives every gradient the dtype of its parameter",
)
def test_flat_gradients_of_another_dtype_than_their_parameter():
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    parameter.grad_dtype = torch.float32
    gradients = [torch.tensor([1.0, 1e-3, 1.001]), torch.tensor([1.0, 2.0, 3.0])]
    expected, _ = gf.align_gradients(*[[gradient] for gradient in gradients])
    aligner = gf.GradientAligner([parameter], flat=True)
    for name, gradient in zip(NAMES, gradients, strict=True):
        with aligner.collect(name):
            parameter.grad = gradient
    aligner.align()
    torch.testing.assert_close(parameter.grad, expected[0], rtol=0, atol=0)
    parameter.grad = parameter.grad_dtype = None  # any
    with (
        pytest.raises(
            ValueError,
            match=r"the gradient of params\[0\] must be torch.bfloat16 like its flat buffer, "
            "got torch.float32",
        ),
        aligner.collect("perception"),
    ):
        parameter.grad = gradients[0]


def test_the_graph_is_freed_by_the_last_pass():
    model = Model()
    losses = model(batch())
    gf.GradientAligner(model).backward(*losses)
    with pytest.raises(RuntimeError, match="second time"):
        losses[0].backward()


def test_no_hook_stays():
    model = Model()
    aligner = gf.GradientAligner(model)
    collect_all(aligner, model, (1, 2))
    with contextlib.suppress(ZeroDivisionError), aligner.collect("perception"):
        raise ZeroDivisionError
    assert not any(parameter._post_accumulate_grad_hooks for parameter in trained(model))


def test_never_asks_the_device():
    # A fake tensor has no values: whatever would synchronise the host with the device raises.
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = [nn.Parameter(torch.empty(size)) for size in (3, 5, 7)]
        for flat in (False, True):
            aligner = gf.GradientAligner(parameters, groups="tensor", flat=flat)
            for _ in range(2):
                a, b, c = parameters
                aligner.backward(a.sum() * b.sum(), b.square().sum() + c.sum() + a.sum())
                aligner.zero_grad()
                for name in aligner.names:
                    with aligner.collect(name):
                        sum(parameter.square().sum() for parameter in parameters).backward()
                aligner.align(max_norm=1.0)
                aligner.zero_grad()
