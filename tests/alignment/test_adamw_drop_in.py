"""AlignedAdamW where `torch.optim.AdamW` stood: what PyTorch tests of its optimizers.

With the power 0 and weights of 1 the aligned gradient is that of the sum of both losses, so that
`torch.optim.AdamW` on that sum says what is expected. Of what PyTorch tests, four things do not
apply: deep copies and pickles of an optimizer, which belongs to its aligner; sparse and complex
gradients and a step without any, which are errors here; several devices in one optimizer; and
`maximize`, `amsgrad` and `differentiable`, which are refused.
"""

import copy
import functools
import gc
import re
import warnings
import weakref

import numpy
import pytest
import torch
from drop_in_runs import FLAGS, Model, Run, assert_same, both, two_groups
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import genrep_fast as gf

# Keywords

ACCEPTED = [
    {},
    {"lr": 0.01},
    {"weight_decay": 0.1},
    {"weight_decay": 0},
    {"eps": 1e-6, "betas": (0.5, 0.9)},
    {"betas": [0.5, 0.9]},
    {"foreach": True},
    {"foreach": False},
    {"foreach": None},
    {"fused": True},
    {"fused": False},
    {"fused": None},
    {"capturable": False},
    {"amsgrad": False, "maximize": False, "differentiable": False},
    {"lr": torch.tensor(0.01)},
    {"lr": torch.tensor([0.01])},
    {"lr": torch.tensor([[0.01]], dtype=torch.float64)},
    {"lr": torch.tensor(0.01, dtype=torch.float64), "fused": True},
    {"lr": numpy.float64(0.01)},
    {"lr": numpy.float32(0.01)},
    {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.9), torch.tensor(0.99))},
    {"lr": torch.tensor(0.01), "betas": (torch.tensor([[[0.9]]]), torch.tensor([[0.99]]))},
    {"betas": (torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64))},
]


@pytest.mark.parametrize("options", ACCEPTED)
def test_keywords_that_adamw_takes(options):
    ours, theirs = both(**options)
    for seed in range(3):
        ours.step(seed)
        theirs.step(seed)
    assert_same(ours, theirs, rtol=1e-6, atol=1e-9)
    assert FLAGS <= ours.optimizer.param_groups[0].keys() == theirs.optimizer.param_groups[0].keys()
    assert ours.optimizer.defaults.keys() == theirs.optimizer.defaults.keys()


@pytest.mark.parametrize(
    "options",
    [{"capturable": True}, {"capturable": True, "foreach": True, "lr": torch.tensor(0.01)}],
)
def test_capturable_is_accepted_where_adamw_wants_a_gpu(options):
    ours, theirs = Run("aligned", **options), Run("torch", **{"lr": options.get("lr", 1e-3)})
    for seed in range(3):
        ours.step(seed)
        theirs.step(seed)
    assert_same(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("flag", ["amsgrad", "maximize", "differentiable"])
def test_keywords_that_change_the_result_are_refused(flag):
    with pytest.raises(
        ValueError, match=f"AlignedAdamW does not implement {flag}, got {flag}=True"
    ):
        Run("aligned", **{flag: True})


def test_positional_arguments_stand_where_those_of_adamw_do():
    model = Model()
    optimizer = gf.AlignedAdamW(
        model.parameters(), 0.1, (0.5, 0.6), 1e-3, 0.2, False, aligner=gf.GradientAligner(model)
    )
    expected = torch.optim.AdamW(model.parameters(), 0.1, (0.5, 0.6), 1e-3, 0.2, False)
    ours, theirs = (
        {k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (optimizer, expected)
    )
    assert ours == theirs


def test_a_learning_rate_on_another_device_is_refused():
    with pytest.raises(ValueError, match="lr must be on cpu or on the CPU, got meta"):
        Run("aligned", lr=torch.tensor(0.01, device="meta"))


def test_complex_parameters_are_refused():
    with pytest.raises(
        TypeError, match="must be float32, bfloat16, float16 or float64, got torch.complex64"
    ):
        gf.GradientAligner([nn.Parameter(torch.ones(2, dtype=torch.complex64))])


@pytest.mark.parametrize(
    ("params", "exception", "message"),
    [
        (lambda a, b: a, TypeError, "params argument given to the optimizer should be an iterable"),
        (lambda a, b: [], ValueError, "optimizer got an empty parameter list"),
        (
            lambda a, b: [{"params": a}, {"params": a}],
            ValueError,
            "appear in more than one parameter group",
        ),
        (
            lambda a, b: [("a", a), b],
            ValueError,
            "all optimizer params should be with/without names",
        ),
        (lambda a, b: [{"params": [a]}, {"params": [("b", b)]}], ValueError, "with/without names"),
        (lambda a, b: [{"params": {a, b}}], TypeError, "ordered collections"),
        (lambda a, b: [a, "b"], TypeError, "optimizer can only optimize Tensors"),
        (lambda a, b: [a.square()], ValueError, "can't optimize a non-leaf Tensor"),
    ],
)
def test_parameters_that_adamw_refuses(params, exception, message):
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    for make in (
        torch.optim.AdamW,
        functools.partial(gf.AlignedAdamW, aligner=gf.GradientAligner([a, b])),
    ):
        with pytest.raises(exception, match=message):
            make(params(a, b))


def test_a_parameter_twice_in_a_group_is_refused():
    # torch.optim.AdamW warns that this will be an error.
    a = nn.Parameter(torch.ones(2))
    with (
        pytest.warns(UserWarning, match="duplicate parameters"),
        pytest.raises(ValueError, match="got one of them twice"),
    ):
        gf.AlignedAdamW([a, a], aligner=gf.GradientAligner([a]))


def test_an_optimizer_can_be_printed():
    ours, theirs = both(two_groups)
    assert repr(ours.optimizer).replace("AlignedAdamW", "AdamW") == repr(theirs.optimizer)


# Parameter groups


@pytest.mark.parametrize(
    ("second", "options"),
    [
        ({"lr": 0.1}, {}),
        ({"lr": 0.1}, {"lr": 0.01}),
        ({}, {"lr": 0.01}),
        ({"weight_decay": 0.5}, {"weight_decay": 0.1}),
        ({"betas": (0.1, 0.2), "eps": 1e-3}, {}),
        (
            {"lr": torch.tensor(0.1, dtype=torch.float64)},
            {"lr": torch.tensor(0.01, dtype=torch.float64)},
        ),
    ],
)
def test_parameter_groups(second, options):
    ours, theirs = both(functools.partial(two_groups, **second), **options)
    for seed in range(4):
        ours.step(seed)
        theirs.step(seed)
    assert_same(ours, theirs)


def test_groups_are_added_while_training():
    ours, theirs = both(lambda model: model.trunk.parameters())
    for run in (ours, theirs):
        run.model.head.requires_grad_(False)
        run.step(0)
        run.model.head.requires_grad_(True)
        run.optimizer.add_param_group({"params": list(run.model.head.parameters()), "lr": 0.5})
        run.step(1)
        run.step(2)
    assert_same(ours, theirs)
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        ours.optimizer.add_param_group({"params": list(ours.model.head.parameters())})
    assert len(ours.optimizer.param_groups) == 2


def test_groups_that_users_rearrange():
    ours, theirs = both(two_groups)
    for run in (ours, theirs):
        run.step(0)
        first, second = run.optimizer.param_groups
        first["params"].extend(second["params"])
        del run.optimizer.param_groups[1]
        run.optimizer.param_groups[0]["lr"] = 0.1
        run.step(1)
    assert_same(ours, theirs)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_implementation_of_adamw_is_equalled(dtype, foreach):
    ours, theirs = (
        Run("aligned", dtype=dtype, lr=0.01, foreach=foreach),
        Run("torch", dtype=dtype, lr=0.01, foreach=foreach),
    )
    for seed in range(7):
        ours.step(seed)
        theirs.step(seed)
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {}
    assert_same(ours, theirs, **tolerance)


def test_parameters_that_are_not_contiguous():
    def make():
        torch.manual_seed(0)
        model = Model().double()
        model.trunk.weight = nn.Parameter(torch.randn(5, 4, 2, dtype=torch.float64)[..., 0].t())
        model.head.bias = nn.Parameter(torch.randn(3, 3, dtype=torch.float64)[:, 1])
        return model

    ours, theirs = Run("aligned", model=make(), lr=0.1), Run("torch", model=make(), lr=0.1)
    assert not ours.model.trunk.weight.is_contiguous() and not ours.model.head.bias.is_contiguous()
    for seed in range(4):
        ours.step(seed)
        theirs.step(seed)
    assert_same(ours, theirs)


def test_gradients_are_not_written_to():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    aligner = gf.GradientAligner(parameters)
    optimizer = gf.AlignedAdamW(parameters, aligner=aligner, max_norm=0.1)
    given = {
        name: [torch.full((3,), value), torch.full((2,), value)]
        for name, value in zip(aligner.names, (2.0, 3.0), strict=True)
    }
    for name, gradients in given.items():
        with aligner.collect(name):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
    optimizer.step()
    assert [gradient[0].item() for gradient in given["perception"]] == [2, 2]
    assert [gradient[0].item() for gradient in given["generation"]] == [3, 3]


def test_the_loss_falls():
    for options in ({"lr": 0.05}, {"lr": torch.tensor(0.05)}):
        run = Run("aligned", **options)
        first = run.backward(0).item()
        run.optimizer.zero_grad()
        for _ in range(50):
            run.step(0)
        assert run.backward(0).item() < 0.5 * first


def test_an_overflow_is_skipped_as_by_the_fused_adamw():
    ours, theirs = both(dtype=torch.float32)
    for run in (ours, theirs):
        run.step(0)
    before = ours.parameters()
    ours.backward(1)
    ours.optimizer.grad_scale, ours.optimizer.found_inf = torch.ones(()), torch.ones(())
    ours.optimizer.step()
    torch.testing.assert_close(ours.parameters(), before, rtol=0, atol=0)
    del ours.optimizer.grad_scale, ours.optimizer.found_inf
    ours.optimizer.zero_grad()
    for run in (ours, theirs):
        run.step(2)
    assert_same(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_graph_from_before_the_step_is_stale_afterwards():
    run = Run("aligned")
    loss = run.model.head(run.model.trunk(torch.ones(1, 5, dtype=torch.float64))).sum()
    run.step(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_optimizer_does_not_live_on():
    run = Run("aligned")
    run.step(0)
    run.optimizer.state_dict()
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    reference = weakref.ref(run.optimizer)
    del run
    gc.collect()
    assert reference() is None


# Hooks


def test_step_hooks_run_in_order():
    run, calls = Run("aligned"), []
    optimizer = run.optimizer
    handles = [
        register_optimizer_step_pre_hook(lambda *a: calls.append("global pre")),
        register_optimizer_step_post_hook(lambda *a: calls.append("global post")),
        optimizer.register_step_pre_hook(lambda *a: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *a: calls.append("post")),
    ]
    run.backward(0)
    optimizer.step()
    for handle in handles:
        handle.remove()
    run.step(1)
    assert calls == ["global pre", "pre", "post", "global post"]


def test_a_step_pre_hook_may_change_the_arguments():
    run, seen = Run("aligned"), []
    run.optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: ((optimizer, lambda: run.backward(3)), {})
    )
    run.optimizer.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(len(args)))
    assert run.optimizer.step().item() == Run("torch").backward(3).item()
    assert seen == [2]


def test_state_dict_hooks():
    run = Run("aligned")
    run.step(0)
    optimizer, calls = run.optimizer, []
    optimizer.register_state_dict_pre_hook(lambda optimizer: calls.append("pre"))
    optimizer.register_state_dict_post_hook(
        lambda optimizer, state_dict: calls.append(state_dict["state"][0]["step"].device.type)
    )

    def rename(optimizer, state_dict):
        return {"groups": state_dict["param_groups"], "moments": state_dict["state"]}

    handle = optimizer.register_state_dict_post_hook(rename)
    assert optimizer.state_dict().keys() == {"groups", "moments"}
    assert calls == ["pre", "cpu"]
    handle.remove()
    assert optimizer.state_dict().keys() == {"state", "param_groups"}
    assert len(optimizer._optimizer_state_dict_post_hooks) == 1


def test_load_state_dict_hooks_repair_what_is_loaded():
    source, target = Run("aligned"), Run("aligned", lr=0.5)
    source.step(0)
    broken = copy.deepcopy(source.optimizer.state_dict())
    broken["groups"] = broken.pop("param_groups")
    for state in broken["state"].values():
        state["mean"] = state.pop("exp_avg")
    calls = []

    def repair(optimizer, state_dict):
        calls.append("second")
        state = {
            number: {"exp_avg" if key == "mean" else key: value for key, value in values.items()}
            for number, values in state_dict["state"].items()
        }
        return {"state": state, "param_groups": state_dict["groups"]}

    target.optimizer.register_load_state_dict_pre_hook(repair)
    target.optimizer.register_load_state_dict_pre_hook(
        lambda *a: calls.append("first"), prepend=True
    )
    target.optimizer.register_load_state_dict_post_hook(
        lambda optimizer: calls.append(f"post {optimizer.param_groups[0]['lr']}")
    )
    target.optimizer.load_state_dict(broken)
    assert calls == ["first", "second", "post 0.001"]
    assert "groups" in broken
    target.model.load_state_dict(source.model.state_dict())
    source.step(1)
    target.step(1)
    assert_same(target, source, rtol=0, atol=0)


def test_a_pre_hook_may_change_the_dictionary_in_place():
    source, target = Run("aligned", lr=0.25), Run("aligned")

    def halve(optimizer, state_dict):
        state_dict["param_groups"] = [
            {**group, "lr": group["lr"] / 2} for group in state_dict["param_groups"]
        ]

    target.optimizer.register_load_state_dict_pre_hook(halve)
    target.optimizer.load_state_dict(source.optimizer.state_dict())
    assert target.optimizer.param_groups[0]["lr"] == 0.125


# Schedules

SCHEDULES = {
    "StepLR": lambda o: [lr_scheduler.StepLR(o, 2, 0.5)],
    "LambdaLR": lambda o: [
        lr_scheduler.LambdaLR(o, [lambda step: 0.9**step, lambda step: 0.5**step])
    ],
    "MultiplicativeLR": lambda o: [lr_scheduler.MultiplicativeLR(o, lambda step: 0.8)],
    "MultiStepLR": lambda o: [lr_scheduler.MultiStepLR(o, [1, 3])],
    "CosineAnnealingLR": lambda o: [lr_scheduler.CosineAnnealingLR(o, 4)],
    "CosineAnnealingWarmRestarts": lambda o: [lr_scheduler.CosineAnnealingWarmRestarts(o, 2)],
    "ExponentialLR": lambda o: [lr_scheduler.ExponentialLR(o, 0.5)],
    "PolynomialLR": lambda o: [lr_scheduler.PolynomialLR(o, 4)],
    "OneCycleLR": lambda o: [lr_scheduler.OneCycleLR(o, [0.1, 0.2], total_steps=8)],
    "CyclicLR": lambda o: [lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2)],
    "ReduceLROnPlateau": lambda o: [lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0)],
    "SWALR": lambda o: [torch.optim.swa_utils.SWALR(o, 0.05)],
    "two": lambda o: [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 2)],
    "ChainedScheduler": lambda o: [
        lr_scheduler.ChainedScheduler(
            [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.ConstantLR(o)], o
        )
    ],
    "SequentialLR": lambda o: [
        lr_scheduler.SequentialLR(
            o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
        )
    ],
}


@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02, dtype=torch.float64)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name, lr):
    runs = [
        Run(kind, lambda model: two_groups(model, lr=copy.deepcopy(lr)), lr=copy.deepcopy(lr))
        for kind in ("aligned", "torch")
    ]
    rates = []
    for run in runs:
        with warnings.catch_warnings():
            # Some schedules warn of how they call each other.
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            schedules = SCHEDULES[name](run.optimizer)
        rates.append([])
        for seed in range(6):
            run.step(seed)
            for schedule in schedules:
                schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates[-1].append(
                [
                    (float(group["lr"]), *map(float, group["betas"]))
                    for group in run.optimizer.param_groups
                ]
            )
    assert rates[0] == rates[1]
    assert len({rate[0][0] for rate in rates[0]}) > 1
    assert_same(*runs)


def test_a_step_before_the_schedules_is_seen():
    run = Run("aligned")
    schedule = lr_scheduler.ExponentialLR(run.optimizer, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.step(0)
        schedule.step()
    assert re.match("0.0005", str(run.optimizer.param_groups[0]["lr"]))
