"""Averages of an AlignedAdamW against AveragedModel, EMAModel and plain arithmetic."""

import copy

import pytest
import torch
from averaged_runs import Expected, Network, Run, assert_close, compiled, copies
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_multi_avg_fn,
)

import genrep_fast as gf

# What follows


class TimmLike(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model).eval()


class WithDecay(nn.Module):
    """A holder with a buffer and a further module of its own."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model)
        self.register_buffer("decay", torch.tensor(0.9))
        self.criterion = nn.MSELoss()


class Holder:
    """Not a module, as timm's first ModelEma."""

    def __init__(self, model):
        self.module = copy.deepcopy(model)


HOLDERS = {
    "module": copy.deepcopy,
    "compiled": lambda model: compiled(copy.deepcopy(model)),
    "timm's": TimmLike,
    "timm's, compiled": lambda model: compiled(TimmLike(model)),
    "timm's of a compiled one": lambda model: TimmLike(compiled(model)),
    "timm's twice": lambda model: TimmLike(TimmLike(model)),
    "data parallel": lambda model: nn.DataParallel(copy.deepcopy(model)),
    "a holder with more": WithDecay,
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_module_in_whatever_holds_it(holder):
    run = Run(HOLDERS[holder], ema_decay=0.8)
    expected = Expected(run.network, 0.8)
    for seed in range(5):
        run.step(seed)
        expected.step(run.network)
    inner = run.ema
    while not isinstance(inner, Network):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    assert_close(
        {name: value.double() for name, value in inner.state_dict().items()}, expected.values
    )
    assert inner.norm.num_batches_tracked == 5
    assert run.optimizer.ema is run.ema


def test_a_module_whose_only_child_is_called_module():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Network()

        def forward(self, x):
            return self.module(x)

    run = Run(copy.deepcopy, Outer(), ema_decay=0.5)
    before = copies(run.ema)
    run.step(0)
    assert_close(
        copies(run.ema), [(a + b) / 2 for a, b in zip(before, copies(run.network), strict=True)]
    )


def test_a_compiled_submodule_in_either():
    network = Network()
    network.first = compiled(network.first)
    plain = Network()
    run = Run(lambda model: plain, network, ema_decay=0.5)
    run.step(0)
    assert_close(
        plain.first.weight.detach(),
        (Network().first.weight + network.first._orig_mod.weight).detach() / 2,
    )
    average = Network()
    average.first = compiled(average.first)
    run = Run(lambda model: average, ema_decay=0.5)
    run.step(0)
    assert_close(
        average.first._orig_mod.weight.detach(),
        (Network().first.weight + run.network.first.weight).detach() / 2,
    )


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("average", ["model", "wrapper", "averaged wrapper"])
def test_data_parallel_in_one_process(process_group, average):
    network = Network()
    network.unused.requires_grad_(False)
    wrapped = nn.parallel.DistributedDataParallel(compiled(network), find_unused_parameters=True)
    aligner = gf.GradientAligner(wrapped)
    ema = {
        "model": lambda: copy.deepcopy(network),
        "wrapper": lambda: copy.deepcopy(wrapped),
        "averaged wrapper": lambda: AveragedModel(wrapped, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    }[average]()
    optimizer = gf.AlignedAdamW(wrapped.parameters(), lr=0.05, aligner=aligner, ema=ema)
    theirs = AveragedModel(
        network, multi_avg_fn=get_ema_multi_avg_fn(0.999 if average != "averaged wrapper" else 0.5)
    )
    if average != "averaged wrapper":
        # A module has no first update that copies.
        theirs.n_averaged += 1
    for seed in range(3):
        inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
        for name, loss in zip(
            aligner.names, (lambda y: y.square().mean(), lambda y: y.abs().mean()), strict=True
        ):
            with aligner.collect(name):
                loss(wrapped(inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.update_parameters(network)
    assert_close(copies(ema), copies(theirs))
    assert_close(list(ema.buffers())[-1], list(network.buffers())[-1])


def test_tensors_may_be_strided_in_any_way():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 4, 3)).double()
    network[0].to(memory_format=torch.channels_last)

    def strange(model):
        first, *others = [parameter.detach() for parameter in model.parameters()]
        yield first.clone().contiguous()
        for other in others:
            yield torch.empty(*other.shape, 2, dtype=other.dtype)[..., 0].copy_(other)

    for average in (
        lambda model: list(strange(model)),
        lambda model: copy.deepcopy(model).to(memory_format=torch.channels_last),
    ):
        torch.manual_seed(0)
        model = copy.deepcopy(network)
        aligner = gf.GradientAligner(model)
        ema = average(model)
        optimizer = gf.AlignedAdamW(
            model.parameters(), lr=0.1, aligner=aligner, ema=ema, ema_decay=0.75
        )
        tensors = list(ema.parameters()) if isinstance(ema, nn.Module) else ema
        strides, expected = [tensor.stride() for tensor in tensors], copies(model)
        for seed in range(3):
            output = model(
                torch.randn(5, 2, 6, 6, generator=torch.Generator().manual_seed(seed)).double()[
                    ..., :4, :4
                ]
            )
            aligner.backward(output.mean(), output.square().mean())
            optimizer.step()
            optimizer.zero_grad()
            expected = [0.75 * a + 0.25 * b for a, b in zip(expected, copies(model), strict=True)]
        torch.testing.assert_close(
            [tensor.detach() for tensor in tensors], expected, rtol=1e-12, atol=1e-14
        )
        assert [tensor.stride() for tensor in tensors] == strides


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["tensors", "module", "AveragedModel"])
def test_float32_averages_of_half_precision_parameters_track_them(dtype, kind):
    network = Network(norm=False, dtype=dtype)
    network.unused.requires_grad_(False)
    average = {
        "tensors": lambda model: [parameter.detach().float() for parameter in model.parameters()],
        "module": lambda model: copy.deepcopy(model).float(),
        "AveragedModel": lambda model: AveragedModel(
            copy.deepcopy(model).float(), multi_avg_fn=get_ema_multi_avg_fn(0.999)
        ),
    }[kind]
    run = Run(average, network, **({} if kind == "AveragedModel" else {"ema_decay": 0.999}))
    tensors = run.ema if kind == "tensors" else list(run.ema.parameters())
    expected = [tensor.detach().double().clone() for tensor in tensors]
    for seed in range(100):
        run.step(seed)
        decay = 0.0 if kind == "AveragedModel" and seed == 0 else 0.999
        expected = [
            decay * a + (1 - decay) * b.double()
            for a, b in zip(expected, copies(network), strict=True)
        ]
    moved = max(
        (a - b.double()).abs().max()
        for a, b in zip(expected, copies(Network(norm=False, dtype=dtype)), strict=True)
    )
    assert moved > 0.01
    for tensor, value in zip(tensors, expected, strict=True):
        assert tensor.dtype == torch.float32
        assert (tensor - value).abs().max() < 1e-3 * moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_averages_are_refused_with_advice(dtype):
    network = Network(norm=False, dtype=dtype)
    aligner = gf.GradientAligner(network)
    diffusers = pytest.importorskip("diffusers.training_utils")
    shadows = diffusers.EMAModel(network.parameters())
    for ema in (copies(network), copy.deepcopy(network), AveragedModel(network), shadows):
        with pytest.raises(
            ValueError,
            match="must be float32 or float64, got torch.*keep averages of half-precision",
        ):
            gf.AlignedAdamW(network.parameters(), aligner=aligner, ema=ema)
    shadows.to(dtype=torch.float32)
    gf.AlignedAdamW(network.parameters(), aligner=aligner, ema=shadows)


def test_averages_that_are_converted_while_training():
    run = Run(copy.deepcopy, Network(norm=False), ema_decay=0.5)
    run.step(0)
    run.ema.double()
    before = copies(run.ema)
    run.step(1)
    torch.testing.assert_close(
        copies(run.ema),
        [(a + b.double()) / 2 for a, b in zip(before, copies(run.network), strict=True)],
    )
    run.ema.half()
    before, state = copies(run.network), copy.deepcopy(run.optimizer.state_dict())
    with pytest.raises(ValueError, match="must be float32 or float64, got torch.float16"):
        run.step(2)
    torch.testing.assert_close(copies(run.network), before, rtol=0, atol=0)
    torch.testing.assert_close(run.optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    run.ema.float()
    run.optimizer.zero_grad()
    run.step(2)


@pytest.mark.parametrize("assign", [True, False])
def test_averages_that_are_loaded_while_training(assign):
    run = Run(copy.deepcopy, ema_decay=0.5)
    run.step(0)
    loaded = {name: torch.zeros_like(value) for name, value in run.ema.state_dict().items()}
    run.ema.load_state_dict(loaded, assign=assign)
    run.step(1)
    assert_close(copies(run.ema), [parameter / 2 for parameter in copies(run.network)])
    assert_close(dict(run.ema.named_buffers()), dict(run.network.named_buffers()))


def test_another_average_between_two_steps():
    run = Run(copy.deepcopy, ema_decay=0.5)
    run.step(0)
    first, kept = run.ema, copies(run.ema)
    for other in (
        copy.deepcopy(run.network),
        [parameter.clone() for parameter in copies(run.network)],
        AveragedModel(run.network),
    ):
        run.optimizer.ema = other
        assert run.optimizer.ema is other
        before = [
            tensor.detach().clone()
            for tensor in (other if isinstance(other, list) else other.parameters())
        ]
        run.step(1)
        after = [
            tensor.detach() for tensor in (other if isinstance(other, list) else other.parameters())
        ]
        assert_close(after, [(a + b) / 2 for a, b in zip(before, copies(run.network), strict=True)])
    with pytest.raises(ValueError, match="ema must have 7 entries, got 1"):
        run.optimizer.ema = [torch.ones(3)]
    assert run.optimizer.ema is other
    run.optimizer.ema = None
    last = [parameter.clone() for parameter in copies(other)]
    run.step(2)
    torch.testing.assert_close(copies(other), last, rtol=0, atol=0)
    torch.testing.assert_close(copies(first), kept, rtol=0, atol=0)


# Buffers


def test_buffers_need_the_aligners_module():
    network = Network()
    aligner = gf.GradientAligner(network.named_parameters())
    with pytest.raises(
        ValueError, match=r"ema has buffers \(such as norm.running_mean\).*GradientAligner\(model\)"
    ):
        gf.AlignedAdamW(network.parameters(), aligner=aligner, ema=copy.deepcopy(network))
    without = Network(norm=False)
    gf.AlignedAdamW(
        without.parameters(),
        aligner=gf.GradientAligner(without.named_parameters()),
        ema=copy.deepcopy(without),
    )


def test_a_module_needs_names():
    network = Network(norm=False)
    with pytest.raises(
        ValueError, match="make the aligner from the model or from its named_parameters"
    ):
        gf.AlignedAdamW(
            network.parameters(),
            aligner=gf.GradientAligner(network.parameters()),
            ema=copy.deepcopy(network),
        )


def test_a_buffer_that_the_model_lacks_is_refused():
    network = Network()
    average = copy.deepcopy(network)
    average.register_buffer("extra", torch.ones(1))
    with pytest.raises(ValueError, match="ema has a buffer called extra"):
        gf.AlignedAdamW(network.parameters(), aligner=gf.GradientAligner(network), ema=average)


def test_buffers_of_every_kind():
    network = Network()
    network.register_buffer("table", torch.arange(4))
    network.register_buffer("mask", torch.tensor([True, False]), persistent=False)
    network.register_buffer("cache", torch.zeros(2))
    network.register_buffer("nothing", None)
    average = copy.deepcopy(network)
    # Shared by both.
    average.table = network.table
    run = Run(lambda model: average, network, ema_decay=0.9)
    network.table += 1
    network.mask.logical_not_()
    # As caches of positions grow.
    network.cache = torch.arange(5.0)
    run.step(0)
    assert average.table is network.table
    assert average.mask.tolist() == [False, True]
    assert average.cache.tolist() == [0, 1, 2, 3, 4] and average.cache is not network.cache
    assert average.norm.num_batches_tracked == 1


# A GradScaler's skipped steps

AVERAGES = {
    "tensors": lambda model: copies(model),
    "module": copy.deepcopy,
    "AveragedModel": AveragedModel,
    "AveragedModel with buffers": lambda model: AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True
    ),
}


def everything_in(ema):
    if isinstance(ema, list):
        return [tensor.clone() for tensor in ema]
    return [value.clone() for value in ema.state_dict().values()]


@pytest.mark.parametrize("kind", AVERAGES)
def test_a_skipped_step_leaves_averages_buffers_and_counters_alone(kind):
    run = Run(AVERAGES[kind])
    for steps in range(2):
        before = everything_in(run.ema)
        run.skipped_step(5)
        torch.testing.assert_close(everything_in(run.ema), before, rtol=0, atol=0)
        run.step(steps)
    if kind.startswith("AveragedModel"):
        assert run.ema.n_averaged == 2


# Frozen parameters

FOLLOWERS = {
    "module": (copy.deepcopy, lambda ema, network: None),
    "AveragedModel": (
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)),
        lambda ema, network: ema.update_parameters(network),
    ),
    "EMAModel": (
        lambda model: pytest.importorskip("diffusers.training_utils").EMAModel(
            model.parameters(), decay=0.9
        ),
        lambda ema, network: ema.step(network.parameters()),
    ),
}


@pytest.mark.parametrize("kind", ["AveragedModel", "EMAModel"])
def test_parameters_that_are_frozen_and_unfrozen(kind):
    make, update = FOLLOWERS[kind]
    network = Network()
    network.head.bias.requires_grad_(False)
    run = Run(make, network)
    theirs = copy.deepcopy(run.ema)
    for seed in range(24):
        if seed == 5:
            network.first.requires_grad_(False)
        if seed == 10:
            network.first.requires_grad_(True)
            network.head.bias.requires_grad_(True)
        if seed == 17:
            network.first.requires_grad_(False)
        if seed == 20:
            with torch.no_grad():
                network.first.weight.copy_(torch.zeros_like(network.first.weight))
        run.step(seed)
        update(theirs, network)
        ours, expected = (
            e.shadow_params if kind == "EMAModel" else copies(e) for e in (run.ema, theirs)
        )
        assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_average_of_a_module_goes_on_after_freezing():
    run = Run(copy.deepcopy, ema_decay=0.5)
    expected = Expected(run.network, 0.5)
    for seed in range(12):
        if seed == 3:
            run.network.first.requires_grad_(False)
        run.step(seed)
        expected.step(run.network)
    assert_close(
        {name: value.double() for name, value in run.ema.state_dict().items()}, expected.values
    )


def test_large_frozen_parts_are_copied_once():
    network = Network(norm=False)
    network.first.requires_grad_(False)
    run = Run(copy.deepcopy, network, ema_decay=0.5)
    with torch.no_grad():
        run.ema.first.weight += 1
    run.step(0)
    torch.testing.assert_close(run.ema.first.weight, network.first.weight, rtol=0, atol=0)
    versions = run.ema.first.weight._version, run.ema.first.bias._version
    for seed in range(3):
        run.step(seed)
    assert (run.ema.first.weight._version, run.ema.first.bias._version) == versions
    for tensor in (network.first.weight, run.ema.first.weight):
        with torch.no_grad():
            tensor += 1
        run.step(4)
        torch.testing.assert_close(run.ema.first.weight, network.first.weight, rtol=0, atol=0)


def test_a_frozen_part_that_both_networks_share():
    network = Network(norm=False)
    network.first.requires_grad_(False)
    average = copy.deepcopy(network)
    average.first = network.first
    run = Run(lambda model: average, network, ema_decay=0.5)
    before = copies(average.head)
    run.step(0)
    assert_close(
        copies(average.head),
        [(a + b) / 2 for a, b in zip(before, copies(network.head), strict=True)],
    )
    network.first.requires_grad_(True)
    kept = copies(network)
    with pytest.raises(
        ValueError,
        match="ema must hold a copy of first.weight, which is trained, got the parameter",
    ):
        run.step(1)
    torch.testing.assert_close(copies(network), kept, rtol=0, atol=0)


@pytest.mark.parametrize("average", [copies, copy.deepcopy])
def test_a_parameter_without_elements_has_an_average(average):
    network = Network()
    network.unused = nn.Parameter(torch.empty(0))
    run = Run(average, network, ema_decay=0.5)
    expected = Expected(network, 0.5)
    run.step(0)
    expected.step(network)
    averages = run.ema if isinstance(run.ema, list) else list(run.ema.parameters())
    for (name, _), found in zip(network.named_parameters(), averages, strict=True):
        assert_close(found.double(), expected.values[name])


def test_only_adapters_have_averages():
    network = Network(norm=False)
    network.first.requires_grad_(False)
    network.unused.requires_grad_(False)
    trained = [
        (name, parameter)
        for name, parameter in network.named_parameters()
        if parameter.requires_grad
    ]
    aligner = gf.GradientAligner(trained)
    average = copy.deepcopy(network)
    optimizer = gf.AlignedAdamW(
        [parameter for _, parameter in trained], aligner=aligner, ema=average, ema_decay=0.5
    )
    before = copies(average)
    output = network(torch.randn(16, 6))
    aligner.backward(output.mean(), output.square().mean())
    optimizer.step()
    assert_close(
        copies(average), [(a + b) / 2 for a, b in zip(before, copies(network), strict=True)]
    )


def test_groups_that_are_added_need_averages():
    network = Network(norm=False)
    aligner = gf.GradientAligner(network)
    average = copy.deepcopy(network)
    del average.head
    optimizer = gf.AlignedAdamW(
        [*network.first.parameters(), *network.norm.parameters()], aligner=aligner, ema=average
    )
    with pytest.raises(ValueError, match="ema must hold an average of head.weight, got none"):
        optimizer.add_param_group({"params": list(network.head.parameters())})
    assert len(optimizer.param_groups) == 1


# Memory, devices


def test_averages_have_memory_of_their_own():
    first, second = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3))
    aligner = gf.GradientAligner([first, second])
    own, flat = torch.zeros(3, 3), torch.zeros(20)
    refused = {
        "the parameter": ([first.detach(), own], "must be a copy of its parameter"),
        "the other": ([second.detach(), own], r"ema\[0\] overlaps params\[1\]"),
        "each other's": ([second.detach(), first.detach()], "overlaps"),
        "transposed": ([first.detach().t(), own], "overlaps"),
        "twice": ([own, own], r"ema\[[01]\] overlaps ema\[[01]\]"),
        "in part": (
            [flat[:9].view(3, 3), flat[8:17].view(3, 3)],
            r"ema\[[01]\] overlaps ema\[[01]\]",
        ),
        "through NumPy": (
            [torch.from_numpy(first.detach().numpy()), own],
            "ema.0. (overlaps|must be a copy)",
        ),
    }
    for ema, message in refused.values():
        with pytest.raises(ValueError, match=message):
            gf.AlignedAdamW([first, second], aligner=aligner, ema=ema)
    gf.AlignedAdamW(
        [first, second], aligner=aligner, ema=[flat[:9].view(3, 3), flat[9:18].view(3, 3)]
    )
    columns = torch.zeros(3, 6).split([3, 3], dim=1)
    gf.AlignedAdamW([first, second], aligner=aligner, ema=list(columns))
    # Parameters may lie in one buffer.
    buffer = torch.randn(12)
    parts = [nn.Parameter(buffer[:4]), nn.Parameter(buffer[4:8])]
    gf.AlignedAdamW(parts, aligner=gf.GradientAligner(parts), ema=[torch.zeros(4), torch.zeros(4)])
    with pytest.raises(ValueError, match="overlaps"):
        gf.AlignedAdamW(parts, aligner=gf.GradientAligner(parts), ema=[torch.zeros(4), buffer[2:6]])


def test_averages_may_be_part_of_the_aligners_module():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = Network(norm=False)
            self.average = copy.deepcopy(self.network).requires_grad_(False)

    both = Both()
    aligner = gf.GradientAligner(both)
    averages = list(both.average.parameters())
    optimizer = gf.AlignedAdamW(
        both.network.parameters(), aligner=aligner, ema=averages, ema_decay=0.5
    )
    before = copies(both.average)
    output = both.network(torch.randn(16, 6))
    aligner.backward(output.mean(), output.square().mean())
    optimizer.step()
    assert_close(
        copies(both.average),
        [(a + b) / 2 for a, b in zip(before, copies(both.network), strict=True)],
    )


def test_buffers_never_ask_the_device():
    # A fake tensor has no values: whatever would synchronise the host with the device raises.
    with FakeTensorMode(allow_non_fake_inputs=True):
        network, average = (
            nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)) for _ in range(2)
        )
        aligner = gf.GradientAligner(network)
        optimizer = gf.AlignedAdamW(
            network.parameters(), aligner=aligner, ema=average, max_norm=1.0
        )
        for scaled in (False, True, True):
            output = network(torch.ones(16, 6))
            aligner.backward(output.mean(), output.square().mean())
            if scaled:
                optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
            optimizer.step()


def test_averages_on_another_device_are_refused():
    network = Network(norm=False)
    aligner = gf.GradientAligner(network)
    for ema in (
        [p.detach().to("meta") for p in network.parameters()],
        copy.deepcopy(network).to("meta"),
    ):
        with pytest.raises(ValueError, match="must be on cpu like the other tensors, got meta"):
            gf.AlignedAdamW(network.parameters(), aligner=aligner, ema=ema)
    run = Run(copy.deepcopy, Network(norm=False))
    run.ema.to("meta")
    with pytest.raises(ValueError, match="must be on cpu like the other tensors, got meta"):
        run.step(0)


@pytest.mark.parametrize(
    "ema", [3, "average", {"a": torch.ones(2)}, torch.ones(2), (t for t in ())]
)
def test_other_things_are_no_averages(ema):
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(
        TypeError,
        match="ema must be tensors, a module, an AveragedModel or diffusers' EMAModel, got",
    ):
        gf.AlignedAdamW([parameter], aligner=gf.GradientAligner([parameter]), ema=ema)


def test_parameters_that_the_model_ties_are_tied_in_the_average():
    class Tied(nn.Module):
        def __init__(self, tied=True):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.output = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
            if tied:
                self.output.weight = self.embedding.weight

    model = Tied()
    aligner = gf.GradientAligner(model)
    with pytest.raises(ValueError, match="ema must tie output.weight to embedding.weight"):
        gf.AlignedAdamW(model.parameters(), aligner=aligner, ema=Tied(tied=False))
    average = copy.deepcopy(model)
    optimizer = gf.AlignedAdamW(model.parameters(), aligner=aligner, ema=average, ema_decay=0.5)
    before = average.output.weight.detach().clone()
    aligner.backward(model.embedding.weight.sum(), model.output.weight.square().sum())
    optimizer.step()
    assert_close(average.output.weight.detach(), (before + model.output.weight.detach()) / 2)
