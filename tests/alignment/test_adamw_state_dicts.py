"""State dicts of AlignedAdamW and torch.optim.AdamW, which load each other's."""

import copy
import itertools
import math

import numpy
import pytest
import torch
from drop_in_runs import FLAGS, Model, Run, assert_same, through_a_file, two_groups

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
