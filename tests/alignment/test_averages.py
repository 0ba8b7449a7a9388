"""Averages of an AlignedAdamW against AveragedModel, EMAModel and plain arithmetic."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

import genrep_fast as gf


class Network(nn.Module):
    """A layer, a norm, a head, and a parameter that no loss reaches."""

    def __init__(self, norm=True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)
        self.unused = nn.Parameter(torch.ones(3))
        self.to(dtype)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.first(x))))


class Run:
    """A network with an AlignedAdamW; `average` makes what follows from the network."""

    def __init__(self, average, network=None, **options):
        self.network = Network() if network is None else network
        self.aligner = gf.GradientAligner(self.network)
        self.ema = average(self.network)
        self.optimizer = gf.AlignedAdamW(
            [parameter for parameter in self.network.parameters()],
            lr=0.05,
            aligner=self.aligner,
            ema=self.ema,
            **options,
        )

    def backward(self, seed, scale=1.0):
        parameter = next(self.network.parameters())
        inputs = 3 * torch.randn(16, 6, generator=torch.Generator().manual_seed(seed)) + 5
        output = self.network(inputs.to(parameter.dtype))
        self.aligner.backward(output.square().mean() * scale, (output - 1).abs().mean() * scale)

    def step(self, seed):
        self.backward(seed)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skipped_step(self, seed):
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        self.backward(seed, float("inf"))
        scaler.scale(torch.ones(()))
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad()


def copies(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_close(one, other, rtol=2e-6, atol=2e-7):
    torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


# What follows


class Expected:
    """An average of every parameter and buffer by hand."""

    def __init__(self, network, decay):
        self.decay = decay
        self.values = {name: value.double() for name, value in state_of(network).items()}

    def step(self, network):
        parameters = dict(network.named_parameters())
        for name, value in network.state_dict().items():
            kept = self.decay if name in parameters else 0.0
            self.values[name] = kept * self.values[name] + (1 - kept) * value.double()


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


def compiled(model):
    return torch.compile(model, backend="eager")


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


# PyTorch's AveragedModel

RULES = {
    "default": {},
    "ema": {"avg_fn": get_ema_avg_fn(0.9)},
    "ema of lists": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "mean": {"avg_fn": get_swa_avg_fn()},
    "mean of lists": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "function": {"avg_fn": lambda average, parameter, count: 0.3 * average + 0.7 * parameter},
    "in place": {
        "avg_fn": lambda average, parameter, count: average.mul_(0.3).add_(parameter, alpha=0.7)
    },
    "warm-up": {
        "avg_fn": lambda average, parameter, count: torch.lerp(
            parameter, average, float((1 + count) / (10 + count))
        )
    },
}


# Of these PyTorch's own update fails where it meets integer buffers.
FLOATING = ["mean of lists", "warm-up", "in place"]
UPDATES = [(rule, False) for rule in RULES] + [
    (rule, True) for rule in RULES if rule not in FLOATING
]


@pytest.mark.parametrize(("rule", "use_buffers"), UPDATES)
def test_an_averaged_model_equals_its_own_update(rule, use_buffers):
    options = {**RULES[rule], "use_buffers": use_buffers}
    run = Run(lambda model: AveragedModel(model, **options))
    # Something else than the model: the first update copies.
    with torch.no_grad():
        for parameter in run.ema.parameters():
            parameter += 7
    theirs = copy.deepcopy(run.ema)
    for seed in range(20):
        run.step(seed)
        theirs.update_parameters(run.network)
        if seed == 0:
            torch.testing.assert_close(copies(run.ema), copies(run.network), rtol=0, atol=0)
    assert run.ema.n_averaged == theirs.n_averaged == 20
    assert_close(run.ema.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", FLOATING)
def test_integer_buffers_with_a_rule_that_takes_none(rule):
    run = Run(lambda model: AveragedModel(model, **RULES[rule], use_buffers=True))
    for seed in range(4):
        run.step(seed)
    assert run.ema.n_averaged == 4
    assert 1 <= run.ema.module.norm.num_batches_tracked <= 4


def test_an_averaged_model_is_saved_and_resumed():
    def averaged(model):
        return AveragedModel(model)

    straight, first, resumed = Run(averaged), Run(averaged), Run(averaged)
    for seed in range(6):
        straight.step(seed)
    for seed in range(3):
        first.step(seed)
    saved = copy.deepcopy(
        [first.network.state_dict(), first.optimizer.state_dict(), first.ema.state_dict()]
    )
    resumed.step(9)
    resumed.network.load_state_dict(saved[0])
    resumed.optimizer.load_state_dict(saved[1])
    resumed.ema.load_state_dict(saved[2])
    assert resumed.ema.n_averaged == 3
    for seed in range(3, 6):
        resumed.step(seed)
    torch.testing.assert_close(resumed.ema.state_dict(), straight.ema.state_dict(), rtol=0, atol=0)


def test_an_averaged_model_of_a_compiled_model():
    network = Network()
    run = Run(
        lambda model: compiled(AveragedModel(compiled(model), avg_fn=get_ema_avg_fn(0.5))), network
    )
    theirs = AveragedModel(network, avg_fn=get_ema_avg_fn(0.5))
    for seed in range(4):
        run.step(seed)
        theirs.update_parameters(network)
    assert run.ema._orig_mod.n_averaged == 4
    assert_close(copies(run.ema), copies(theirs))


def test_updates_of_the_averaged_model_by_hand_count():
    run = Run(AveragedModel)
    theirs = copy.deepcopy(run.ema)
    for seed in range(4):
        run.step(seed)
        theirs.update_parameters(run.network)
        if seed == 1:
            run.ema.update_parameters(run.network)
            theirs.update_parameters(run.network)
    assert run.ema.n_averaged == 5
    assert_close(run.ema.state_dict(), theirs.state_dict())


def test_a_decay_that_is_given_wins():
    run = Run(lambda model: AveragedModel(model, avg_fn=get_ema_avg_fn(0.9)), ema_decay=0.25)
    expected = Expected(run.network, 0.25)
    for seed in range(3):
        run.step(seed)
        expected.step(run.network)
    assert_close(
        {name: value.double() for name, value in run.ema.module.state_dict().items()},
        expected.values,
    )
    assert run.ema.n_averaged == 3
    run.optimizer.ema_decay = None
    theirs = copy.deepcopy(run.ema)
    run.step(3)
    theirs.update_parameters(run.network)
    assert_close(run.ema.state_dict(), theirs.state_dict())


def test_a_rule_that_is_no_mean_is_refused_before_anything_changes():
    run = Run(
        lambda model: AveragedModel(
            model, avg_fn=lambda average, parameter, count: torch.maximum(average, parameter)
        )
    )
    run.step(0)
    before = copies(run.network)
    with pytest.raises(
        ValueError, match="which is no weighted mean of average and parameter: pass ema_decay"
    ):
        run.step(1)
    torch.testing.assert_close(copies(run.network), before, rtol=0, atol=0)
    run.optimizer.zero_grad()
    run.optimizer.ema_decay = 0.5
    run.step(1)


# diffusers' EMAModel

SETTINGS = {
    "default": {},
    "decay": {"decay": 0.9},
    "warm-up": {"use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75},
    "at least": {"decay": 0.8, "min_decay": 0.5},
    "later": {"update_after_step": 5, "decay": 0.5},
    "foreach": {"foreach": True, "use_ema_warmup": True},
}


def ema_model(**options):
    return pytest.importorskip("diffusers.training_utils").EMAModel, options


@pytest.mark.parametrize("name", SETTINGS)
def test_an_ema_model_equals_its_own_step(name):
    ema_class, options = ema_model(**SETTINGS[name])
    run = Run(lambda model: ema_class(model.parameters(), **options))
    theirs = ema_class(Network().parameters(), **options)
    for seed in range(30):
        run.step(seed)
        theirs.step(run.network.parameters())
        assert run.ema.cur_decay_value == theirs.cur_decay_value
    assert run.ema.optimization_step == 30
    assert_close(run.ema.shadow_params, theirs.shadow_params, rtol=1e-5, atol=1e-6)


def test_an_ema_model_that_is_loaded_stored_and_converted_while_training():
    ema_class, options = ema_model(decay=0.7)
    run = Run(lambda model: ema_class(model.parameters(), **options))
    theirs = ema_class(Network().parameters(), **options)

    def steps(seeds):
        for seed in seeds:
            run.step(seed)
            theirs.step(run.network.parameters())
        assert_close(run.ema.shadow_params, theirs.shadow_params, rtol=1e-5, atol=1e-6)

    steps(range(3))
    saved = copy.deepcopy(run.ema.state_dict())
    steps(range(3, 6))
    for ema in (run.ema, theirs):
        ema.load_state_dict(saved)
    assert run.ema.optimization_step == 3
    steps(range(6, 9))
    # An evaluation with the averages.
    before = copies(run.network)
    run.ema.store(run.network.parameters())
    run.ema.copy_to(run.network.parameters())
    torch.testing.assert_close(copies(run.network), run.ema.shadow_params, rtol=0, atol=0)
    run.ema.restore(run.network.parameters())
    torch.testing.assert_close(copies(run.network), before, rtol=0, atol=0)
    steps(range(9, 12))
    run.ema.to(dtype=torch.float64)
    theirs.to(dtype=torch.float64)
    steps(range(12, 15))
    assert run.ema.shadow_params[0].dtype == torch.float64
    run.ema.to(dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"ema.shadow_params\[0\] must be float32 or float64, got torch.bfloat16"
    ):
        run.step(15)


def test_an_ema_model_in_every_order():
    ema_class, _ = ema_model()
    for kind in ("model", "trained", "optimizer"):
        network = Network()
        network.first.weight.requires_grad_(False)
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        order = [
            network.head.bias,
            network.head.weight,
            network.first.bias,
            *network.norm.parameters(),
        ]
        ema = ema_class(
            {"model": list(network.parameters()), "trained": trained, "optimizer": order}[kind],
            decay=0.5,
        )
        theirs = copy.deepcopy(ema)
        aligner = gf.GradientAligner(network)
        optimizer = gf.AlignedAdamW(order, lr=0.05, aligner=aligner, ema=ema)
        for seed in range(6):
            output = network(torch.randn(16, 6, generator=torch.Generator().manual_seed(seed)))
            aligner.backward(output.mean(), output.square().mean())
            optimizer.step()
            optimizer.zero_grad()
            theirs.step(
                {"model": list(network.parameters()), "trained": trained, "optimizer": order}[kind]
            )
        assert_close(ema.shadow_params, theirs.shadow_params, rtol=1e-5, atol=1e-6)


def test_orders_that_cannot_be_told_apart_are_refused():
    ema_class, _ = ema_model()
    network = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    order = [network[1].weight, network[0].weight]
    aligner = gf.GradientAligner(network)
    # Values tell.
    gf.AlignedAdamW(order, aligner=aligner, ema=ema_class(order))
    gf.AlignedAdamW(order, aligner=aligner, ema=ema_class(network.parameters()))
    ema = ema_class(order)
    ema.shadow_params = [tensor + 1 for tensor in ema.shadow_params]
    with pytest.raises(ValueError, match="differ in their order alone"):
        gf.AlignedAdamW(order, aligner=aligner, ema=ema)
    with pytest.raises(ValueError, match="must have the shapes of the aligner's 2 parameters"):
        gf.AlignedAdamW(order, aligner=aligner, ema=ema_class(order[:1]))


def test_a_skipped_step_leaves_an_ema_model_alone():
    ema_class, _ = ema_model()
    run = Run(lambda model: ema_class(model.parameters(), decay=0.5))
    run.step(0)
    before = copy.deepcopy(run.ema.state_dict())
    run.skipped_step(1)
    assert run.ema.optimization_step == before["optimization_step"]
    torch.testing.assert_close(run.ema.shadow_params, before["shadow_params"], rtol=0, atol=0)


def test_an_ema_model_and_a_decay_that_is_given():
    ema_class, _ = ema_model()
    run = Run(lambda model: ema_class(model.parameters(), decay=0.5), ema_decay=0.75)
    expected = Expected(run.network, 0.75)
    for seed in range(3):
        run.step(seed)
        expected.step(run.network)
    names = [name for name, _ in run.network.named_parameters()]
    values = [expected.values[name] for name in names]
    assert_close([tensor.double() for tensor in run.ema.shadow_params], values)
    assert run.ema.cur_decay_value == 0.75 and run.ema.optimization_step == 3


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
