"""GradientAligner against `torch.autograd.grad` and `align_gradients`, through every way in which
gradients come about.
"""

import contextlib
import copy
import gc
import math
import pickle
import sys
import unittest.mock
import weakref

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import genrep_fast as gf
from genrep_fast.alignment import tensor_grams

NAMES = ("perception", "generation")
WEIGHTS = (0.7, 0.3)


class Model(nn.Module):
    """Two shared blocks, a head for each loss, a parameter that no loss reaches, an empty one, and
    a frozen one.
    """

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(7, 7), nn.Linear(7, 7)])
        self.perception = nn.Linear(7, 3)
        self.generation = nn.Linear(7, 5)
        self.unused = nn.Parameter(torch.ones(3))
        self.extra = nn.ParameterList([torch.empty(0)])
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)
        self.to(dtype)

    def trunk(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x)) * self.frozen
        return x + self.extra[0].sum()

    def forward(self, x):
        features = self.trunk(x)
        return self.perception(features).square().mean(), (
            self.generation(features) - 1
        ).abs().mean()


def batch(seed=1, dtype=torch.float64):
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def by_block(name):
    return name.split(".")[1] if name.startswith("blocks.") else None


LAYERS = ("blocks.0", "blocks.1", "perception", "generation")
GROUPINGS = {  # keys, and a row for each of: two parameters of every layer, unused, empty
    "all": (["all"], [0] * 10),
    "tensor": (
        [
            "unused",
            *(f"{layer}.{name}" for layer in LAYERS for name in ("weight", "bias")),
            "extra.0",
        ],
        [*range(1, 9), 0, 9],
    ),
    "block": (["unused", *LAYERS, "extra.0"], [1, 1, 2, 2, 3, 3, 4, 4, 0, 5]),
    by_block: (["0", "1"], [0, 0, 1, 1, None, None, None, None, None, None]),
}


def trained(model):
    """Parameters in the order of the rows of GROUPINGS."""
    modules = (*model.blocks, model.perception, model.generation)
    return [parameter for module in modules for parameter in module.parameters()] + [
        model.unused,
        model.extra[0],
    ]


def gradients_of(model, seeds=(1,), forward=None):
    """Lists of the two losses' gradients, added up over batches."""
    sums = [[None] * 10, [None] * 10]
    for seed in seeds:
        for loss, total in zip(
            (forward or model)(batch(seed, model.unused.dtype)), sums, strict=True
        ):
            for t, gradient in enumerate(
                torch.autograd.grad(loss, trained(model), allow_unused=True, retain_graph=True)
            ):
                if gradient is not None:
                    total[t] = gradient if total[t] is None else total[t] + gradient
    return sums


def aligned(model, groups="all", seeds=(1,), **options):
    return gf.align_gradients(*gradients_of(model, seeds), groups=GROUPINGS[groups][1], **options)


def assert_gradients(model, expected, **tolerance):
    for parameter, gradient in zip(trained(model), expected, strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(
                parameter.grad, gradient, **tolerance or {"rtol": 1e-12, "atol": 1e-14}
            )
    assert model.frozen.grad is None


def assert_stats(stats, expected):
    for name in ("cosine", "alpha", "norms", "coefficients"):
        torch.testing.assert_close(
            getattr(stats, name), getattr(expected, name), rtol=1e-12, atol=1e-14
        )


def collect_all(aligner, model, seeds=(1,)):
    """One loss after the other, each with a forward pass of its own."""
    for seed in seeds:
        for position, name in enumerate(aligner.names):
            with aligner.collect(name):
                model(batch(seed, model.unused.dtype))[position].backward()


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


# Ways in which gradients come about


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


# What goes wrong


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
    expected, _ = aligned(model)
    aligner.backward(*model(batch()))
    assert_gradients(model, expected)


def test_a_joint_backward_that_raises_leaves_nothing():
    model = Model()
    aligner = gf.GradientAligner(model)
    loss, _ = model(batch())
    with pytest.raises(RuntimeError, match="does not require grad"):
        aligner.backward(loss, torch.zeros(()))
    expected, _ = aligned(model)
    aligner.backward(*model(batch()))
    assert_gradients(model, expected)


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
    parameter = nn.Parameter(torch.ones(2), requires_grad=False)
    aligner = gf.GradientAligner([parameter])
    with aligner.collect("perception"):
        parameter.requires_grad_(True)
        parameter.sum().backward()
    parameter.requires_grad_(False)
    with aligner.collect("generation"):
        parameter.requires_grad_(True)
        (2 * parameter).sum().backward()
    aligner.align()
    expected, _ = gf.align_gradients([torch.ones(2)], [2 * torch.ones(2)])
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


# Two processes share the images of every micro-batch. DistributedDataParallel averages in every
# pass; or, without parameters that a loss does not reach (which it then refuses), in that of the
# last micro-batch alone.


class OneLoss(Model):
    """The losses one at a time, so that each has a forward pass of its own; with `touch_all` both
    reach every parameter.
    """

    def __init__(self, touch_all):
        super().__init__()
        self.touch_all = touch_all

    def forward(self, x, name):
        loss = super().forward(x)[NAMES.index(name)]
        return (
            loss + 0 * sum(parameter.sum() for parameter in self.parameters())
            if self.touch_all
            else loss
        )


def run_rank(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for flat, no_sync in ((False, False), (True, False), (False, True), (True, True)):
        model = OneLoss(touch_all=no_sync)
        wrapped = DistributedDataParallel(model, find_unused_parameters=not no_sync)
        aligner, alone = (
            gf.GradientAligner(model, flat=flat),
            gf.GradientAligner(expected := OneLoss(touch_all=no_sync)),
        )
        for _ in range(2):
            for micro_batch in range(3):
                for name in NAMES:
                    skip = (
                        wrapped.no_sync()
                        if no_sync and micro_batch < 2
                        else contextlib.nullcontext()
                    )
                    with skip, aligner.collect(name):
                        wrapped(batch(2 * micro_batch + rank), name).backward()
                    for other in range(2):
                        with (
                            unittest.mock.patch.object(dist, "get_world_size", return_value=1),
                            alone.collect(name),
                        ):
                            (expected(batch(2 * micro_batch + other), name) / 2).backward()
            torch.testing.assert_close(aligner.align().cosine, alone.align().cosine)
            assert_gradients(model, [parameter.grad for parameter in trained(expected)])
            aligner.zero_grad()
            alone.zero_grad()
    dist.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_gradients_are_those_of_one_process(two_processes):
    two_processes(__file__)


if __name__ == "__main__":
    run_rank(int(sys.argv[2]), sys.argv[3])
