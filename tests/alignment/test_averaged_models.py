"""Averages as PyTorch's AveragedModel and diffusers' EMAModel."""

import copy

import pytest
import torch
from averaged_runs import Expected, Network, Run, assert_close, compiled, copies
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

import genrep_fast as gf

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
