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
import io
import itertools
import math
import re
import warnings
import weakref

import numpy
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import genrep_fast as gf

FLAGS = {
    "foreach",
    "capturable",
    "fused",
    "maximize",
    "differentiable",
    "amsgrad",
    "decoupled_weight_decay",
}


class Run:
    """A small model with AlignedAdamW, or `torch.optim.AdamW` on the sum of the losses."""

    def __init__(self, kind, params=None, dtype=torch.float64, model=None, **options):
        torch.manual_seed(0)
        self.model = Model().to(dtype) if model is None else model
        arguments = self.model.parameters() if params is None else params(self.model)
        if kind == "aligned":
            self.aligner = gf.GradientAligner(self.model, weights=(1.0, 1.0), power=0.0)
            self.optimizer = gf.AlignedAdamW(arguments, aligner=self.aligner, **options)
        else:
            self.optimizer = torch.optim.AdamW(arguments, **options)
            self.aligner = None

    def backward(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        dtype = self.model.trunk.weight.dtype
        inputs = torch.randn(8, 5, generator=generator, dtype=torch.float64).to(dtype)
        hidden = torch.tanh(self.model.trunk(inputs))
        losses = self.model.head(hidden).square().mean(), (hidden.sum(1) - 1).abs().mean()
        if self.aligner is None:
            sum(losses).backward()
        else:
            self.aligner.backward(*losses)
        return sum(losses)

    def step(self, seed=0):
        self.backward(seed)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parameters(self):
        return [parameter.detach().clone() for parameter in self.model.parameters()]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)


def both(*args, **kwargs):
    return Run("aligned", *args, **kwargs), Run("torch", *args, **kwargs)


def assert_same(one, other, **tolerance):
    tolerance = {"rtol": 1e-10, "atol": 1e-12, **tolerance}
    torch.testing.assert_close(one.parameters(), other.parameters(), **tolerance)
    ours, theirs = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    torch.testing.assert_close(dict(ours["state"]), dict(theirs["state"]), **tolerance)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def two_groups(model, **second):
    return [
        {"params": list(model.trunk.parameters())},
        {"params": list(model.head.parameters()), **second},
    ]


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


# State dicts


@pytest.mark.parametrize("params", [None, two_groups])
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01), torch.tensor([0.01])])
@pytest.mark.parametrize("weights_only", [True, False])
def test_a_state_dict_continues_the_run(params, lr, weights_only):
    source, target = Run("aligned", params, lr=lr), Run("aligned", params, lr=0.7, weight_decay=0.3)
    for seed in range(2):
        source.step(seed)
    state_dict = source.optimizer.state_dict()
    target.optimizer.load_state_dict(
        through_a_file(state_dict) if weights_only else copy.deepcopy(state_dict)
    )
    target.model.load_state_dict(source.model.state_dict())
    for seed in range(2, 4):
        source.step(seed)
        target.step(seed)
    assert_same(target, source, rtol=0, atol=0)
    torch.testing.assert_close(target.optimizer.param_groups[0]["lr"], lr)


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
def test_optimizers_share_nothing_after_loading(lr):
    source, target = Run("aligned", lr=lr), Run("aligned", lr=lr)
    source.step(0)
    # Not a copy: what torch.optim.AdamW would share.
    target.optimizer.load_state_dict(source.optimizer.state_dict())
    target.model.load_state_dict(source.model.state_dict())
    before = [
        {key: value.clone() for key, value in state.items()}
        for state in source.optimizer.state.values()
    ]
    for seed in range(3):
        target.step(seed)
    after = [dict(state) for state in source.optimizer.state.values()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    if isinstance(lr, torch.Tensor):
        assert target.optimizer.param_groups[0]["lr"] is not source.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("kinds", list(itertools.product(["aligned", "torch"], repeat=2)))
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_a_state_is_loaded_in_the_parameters_dtype(kinds, dtypes):
    source, target = Run(kinds[0], dtype=dtypes[0]), Run(kinds[1], dtype=dtypes[1])
    source.step(0)
    target.optimizer.load_state_dict(source.optimizer.state_dict())
    for parameter, state in target.optimizer.state.items():
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == parameter.dtype == dtypes[1]
        assert state["step"].dtype == torch.float32 and state["step"].item() == 1
    target.step(1)


def test_an_old_state_dict_without_the_newer_flags():
    source, target = Run("torch", lr=0.02), Run("aligned")
    source.step(0)
    old = copy.deepcopy(source.optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in FLAGS:
            del group[flag]
    for state in old["state"].values():
        state["step"] = int(state["step"])
    target.optimizer.load_state_dict(old)
    target.model.load_state_dict(source.model.state_dict())
    source.step(1)
    target.step(1)
    assert_same(target, source)
    assert target.optimizer.param_groups[0].keys() == source.optimizer.param_groups[0].keys()


def test_a_state_in_another_memory_format():
    runs = []
    for transposed in (False, True):
        run = Run("aligned")
        run.step(0)
        state_dict = copy.deepcopy(run.optimizer.state_dict())
        if transposed:
            for state in (state_dict["state"][0], state_dict["state"][2]):
                state.update(
                    {key: state[key].t().contiguous().t() for key in ("exp_avg", "exp_avg_sq")}
                )
        run.optimizer.load_state_dict(state_dict)
        run.step(1)
        runs.append(run)
    assert not runs[1].optimizer.state[runs[1].model.trunk.weight]["exp_avg"].is_contiguous()
    assert_same(*runs)


@pytest.mark.parametrize(
    "step",
    [
        3,
        3.0,
        numpy.int64(3),
        torch.tensor(3),
        torch.tensor([3.0]),
        torch.tensor(3, dtype=torch.float64),
    ],
)
def test_counters_of_other_types(step):
    run = Run("aligned")
    run.step(0)
    state_dict = copy.deepcopy(run.optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = step
    run.optimizer.load_state_dict(state_dict)
    run.step(1)
    assert [state["step"].item() for state in run.optimizer.state.values()] == [4] * 4


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"foreach": None}])
def test_flags_of_a_state_dict_that_was_saved_with_others(flags):
    source, target = Run("torch", **flags), Run("aligned")
    source.step(0)
    target.optimizer.load_state_dict(through_a_file(source.optimizer.state_dict()))
    back = Run("torch")
    back.optimizer.load_state_dict(through_a_file(target.optimizer.state_dict()))
    for run in (target, back):
        run.model.load_state_dict(source.model.state_dict())
    for run in (source, target, back):
        run.step(1)
    assert_same(target, source)
    assert_same(back, source)


def named(model):
    return model.named_parameters()


def renamed(model):
    return [(f"other.{name}", parameter) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("params", list(itertools.product([None, named, renamed], repeat=2)))
@pytest.mark.parametrize(
    "kinds", [("aligned", "torch"), ("torch", "aligned"), ("aligned", "aligned")]
)
def test_named_parameters_and_their_state_dicts(kinds, params):
    source, target = Run(kinds[0], params[0]), Run(kinds[1], params[1])
    expected = Run("torch", params[1])
    source.step(0)
    # Copies, which torch.optim.AdamW does not make.
    target.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))
    expected.optimizer.load_state_dict(copy.deepcopy(source.optimizer.state_dict()))
    assert target.optimizer.param_groups[0].get("param_names") == expected.optimizer.param_groups[
        0
    ].get("param_names")
    target.model.load_state_dict(source.model.state_dict())
    source.step(1)
    target.step(1)
    assert_same(target, source)


def test_state_that_belongs_to_no_parameter_is_kept():
    run = Run("aligned", params=lambda model: model.parameters())
    run.optimizer.state["note"] = {"epoch": 3}
    run.step(0)
    state_dict = run.optimizer.state_dict()
    assert state_dict["state"]["note"] == {"epoch": 3}
    other = Run("aligned")
    other.optimizer.ema = copy.deepcopy(other.model)
    other.optimizer.load_state_dict(state_dict)
    other.step(1)
    assert other.optimizer.state["note"] == {"epoch": 3}


def test_a_state_dict_of_adam_without_weight_decay():
    model = Model()
    source, target = torch.optim.Adam(model.parameters(), lr=0.3), Run("aligned")
    target.optimizer.load_state_dict(source.state_dict())
    group = target.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["decoupled_weight_decay"]) == (0.3, 0, True)


def changed(key, value, number=1):
    def change(state_dict):
        if value is None:
            del state_dict["state"][number][key]
        else:
            state_dict["state"][number][key] = value

    return change


def regrouped(key, value):
    def change(state_dict):
        if value is None:
            del state_dict["param_groups"][1][key]
        else:
            state_dict["param_groups"][1][key] = value

    return change


def without_a_group(state_dict):
    state_dict["param_groups"].pop()


def with_a_smaller_group(state_dict):
    state_dict["param_groups"][1]["params"].pop()


REFUSED = {
    "no exp_avg": (
        changed("exp_avg", None),
        "state_dict must have exp_avg for trunk.bias, got step, exp_avg_sq",
    ),
    "no exp_avg_sq": (
        changed("exp_avg_sq", None),
        "state_dict must have exp_avg_sq for trunk.bias",
    ),
    "no step": (changed("step", None), "state_dict must have step for trunk.bias"),
    "step -1": (
        changed("step", torch.tensor(-1.0)),
        "step of trunk.bias must be a whole number, not negative, got -1",
    ),
    "step NaN": (
        changed("step", torch.tensor(math.nan)),
        "step of trunk.bias must be a whole number, not negative, got nan",
    ),
    "step inf": (
        changed("step", math.inf),
        "step of trunk.bias must be a whole number, not negative, got inf",
    ),
    "step 1.5": (
        changed("step", 1.5),
        "step of trunk.bias must be a whole number, not negative, got 1.5",
    ),
    "step text": (
        changed("step", "2"),
        "step of trunk.bias must be a whole number, not negative, got 2",
    ),
    "two steps": (
        changed("step", torch.ones(2)),
        r"step of trunk.bias must have one element, got shape \(2,\)",
    ),
    "negative": (
        changed("exp_avg_sq", -torch.ones(4)),
        "exp_avg_sq of trunk.bias must not be negative, got -1.0",
    ),
    "shape": (
        changed("exp_avg", torch.ones(5)),
        r"exp_avg of trunk.bias must have shape \(4,\), got \(5,\)",
    ),
    "a scalar": (
        changed("exp_avg_sq", torch.tensor(1.0)),
        r"exp_avg_sq of trunk.bias must have shape \(4,\), got \(\)",
    ),
    "dtype": (
        changed("exp_avg", torch.ones(4, dtype=torch.int64)),
        "exp_avg of trunk.bias must be float32, .*, got torch.int64",
    ),
    "complex": (
        changed("exp_avg_sq", torch.ones(4) * 1j),
        "exp_avg_sq of trunk.bias must be float32, .*, got torch.complex64",
    ),
    "a list": (changed("exp_avg", [0.0] * 4), "exp_avg of trunk.bias must be a tensor, got list"),
    "sparse": (
        changed("exp_avg", torch.zeros(4).to_sparse()),
        "exp_avg of trunk.bias must be dense",
    ),
    "meta": (
        changed("exp_avg_sq", torch.ones(4, device="meta")),
        "exp_avg_sq of trunk.bias must have values",
    ),
    "step on meta": (
        changed("step", torch.ones((), device="meta")),
        "step of trunk.bias must have values",
    ),
    "amsgrad's state": (
        changed("max_exp_avg_sq", torch.ones(4)),
        "does not implement amsgrad, got max_exp_avg_sq for trunk.bias",
    ),
    "no lr": (regrouped("lr", None), "state_dict must have lr in every parameter group"),
    "no betas": (regrouped("betas", None), "state_dict must have betas in every parameter group"),
    "no eps": (regrouped("eps", None), "state_dict must have eps in every parameter group"),
    "no weight_decay": (
        regrouped("weight_decay", None),
        "state_dict must have weight_decay in every parameter group",
    ),
    "no params": (
        regrouped("params", None),
        "state_dict must have params in every parameter group",
    ),
    "lr": (regrouped("lr", -0.1), "lr must be finite and not negative, got -0.1"),
    "lr NaN": (regrouped("lr", math.nan), "lr must be finite and not negative, got nan"),
    "lr text": (regrouped("lr", "0.1"), "lr must be a number, got str"),
    "lr of two": (regrouped("lr", torch.ones(2)), "lr must have one element"),
    "betas": (regrouped("betas", (0.9, 1.0)), r"betas must be two numbers in \[0, 1\)"),
    "one beta": (regrouped("betas", (0.9,)), "betas must be two numbers"),
    "betas text": (regrouped("betas", "ab"), "betas must be two numbers"),
    "eps": (regrouped("eps", -1e-8), "eps must be finite and not negative"),
    "weight_decay": (
        regrouped("weight_decay", math.inf),
        "weight_decay must be finite and not negative",
    ),
    "amsgrad": (regrouped("amsgrad", True), "AlignedAdamW does not implement amsgrad"),
    "maximize": (regrouped("maximize", True), "AlignedAdamW does not implement maximize"),
    "differentiable": (
        regrouped("differentiable", True),
        "AlignedAdamW does not implement differentiable",
    ),
    "Adam": (regrouped("decoupled_weight_decay", False), "AlignedAdamW decouples weight decay"),
    "a group less": (without_a_group, "different number of parameter groups"),
    "a smaller group": (with_a_smaller_group, "doesn't match the size of optimizer's group"),
    "no groups": (
        lambda state_dict: state_dict.pop("param_groups"),
        "state_dict must have param_groups, got state",
    ),
    "no state": (
        lambda state_dict: state_dict.pop("state"),
        "state_dict must have state, got param_groups",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_state_dict_that_does_not_fit_changes_nothing(case):
    change, message = REFUSED[case]
    run = Run("aligned", two_groups, lr=0.02)
    run.step(0)
    optimizer, calls = run.optimizer, []
    optimizer.register_load_state_dict_pre_hook(lambda *a: calls.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda *a: calls.append("post"))
    hooks = [dict(value) for name, value in vars(optimizer).items() if name.endswith("_hooks")]
    before = copy.deepcopy(optimizer.state_dict()), run.parameters(), list(optimizer.param_groups)
    state_dict = copy.deepcopy(before[0])
    for group in state_dict["param_groups"]:
        group["lr"] = 0.5
    change(state_dict)
    kept = copy.deepcopy(state_dict)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    assert calls == ["pre"]
    assert repr(state_dict) == repr(kept)
    torch.testing.assert_close(run.parameters(), before[1], rtol=0, atol=0)
    after = optimizer.state_dict()
    assert after["param_groups"] == before[0]["param_groups"]
    assert all(one is other for one, other in zip(optimizer.param_groups, before[2], strict=True))
    torch.testing.assert_close(after["state"], before[0]["state"], rtol=0, atol=0)
    assert hooks == [
        dict(value) for name, value in vars(optimizer).items() if name.endswith("_hooks")
    ]
    run.step(1)


def test_a_state_dict_of_amsgrad_is_refused():
    source = Run("torch", amsgrad=True)
    source.step(0)
    with pytest.raises(ValueError, match="AlignedAdamW does not implement amsgrad"):
        Run("aligned").optimizer.load_state_dict(source.optimizer.state_dict())


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
