"""Models as users wrap them: names without the wrappers' prefixes, and data parallelism that
reduces but one backward pass.
"""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import genrep_fast as gf

NAMES = ["trunk.weight", "trunk.bias", "first.weight", "first.bias", "second.weight", "second.bias"]


class Net(nn.Module):
    """A trunk that both losses reach and a head for each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 6)

    def forward(self, x):
        features = torch.tanh(self.trunk(x))
        return self.first(features).square().mean(), (self.second(features) - x).square().mean()


class NetOfNames(nn.Module):
    """A model of one's own whose only child is called module."""

    def __init__(self):
        super().__init__()
        self.module = Net()


@contextlib.contextmanager
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def compiled(net):
    return torch.compile(net, backend="eager")


def with_a_compiled_part(net):
    net.trunk = compiled(net.trunk)
    return net


WRAPPERS = {
    "none": lambda net: net,
    "compiled": compiled,
    "a compiled part": with_a_compiled_part,
    "ddp": DistributedDataParallel,
    "ddp of compiled": lambda net: DistributedDataParallel(compiled(net)),
    "compiled ddp": lambda net: compiled(DistributedDataParallel(net)),
    "data parallel": DataParallel,
    "averaged": AveragedModel,
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_are_those_of_the_model(wrapper, named):
    with one_process():
        wrapped = WRAPPERS[wrapper](Net())
        aligner = gf.GradientAligner(
            wrapped.named_parameters() if named else wrapped,
            groups=lambda name: name.startswith("trunk.") or None,
        )
        assert aligner.parameter_names == NAMES
        assert aligner.group_keys == [True]
        assert gf.GradientAligner(wrapped, groups="block").group_keys == [
            "trunk",
            "first",
            "second",
        ]


def test_a_child_called_module_is_a_part_of_the_name():
    assert gf.GradientAligner(NetOfNames()).parameter_names == [f"module.{name}" for name in NAMES]


def test_names_of_lightning_fabric():
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    assert gf.GradientAligner(fabric.setup_module(Net())).parameter_names == NAMES


@pytest.mark.parametrize("find_unused_parameters", [False, True])
@pytest.mark.parametrize("built_from", ["model", "parameters"])
@pytest.mark.parametrize("fused", [False, True])
def test_joint_mode_is_refused_under_ddp_in_one_process(fused, built_from, find_unused_parameters):
    with one_process():
        net = Net()
        wrapped = DistributedDataParallel(net, find_unused_parameters=find_unused_parameters)
        aligner = gf.GradientAligner(
            {"model": net, "parameters": list(net.parameters())}[built_from]
        )
        optimizer = gf.AlignedAdamW(net.parameters(), aligner=aligner) if fused else None
        losses = wrapped(torch.ones(2, 6))
        last_call = r"optimizer\.step\(\)" if fused else r"aligner\.align\(\)"
        message = (
            "DistributedDataParallel reduces but one, and 1 process is running.*"
            rf"aligner\.collect\(name\).*{last_call}"
        )
        with pytest.raises(
            RuntimeError, match=f"{message}.*find_unused_parameters=True.*sync_each_batch=True"
        ):
            aligner.backward(*losses)
        assert all(parameter.grad is None for parameter in net.parameters())
        assert optimizer is None or not optimizer.state


@pytest.mark.parametrize("reduce", ["auto", "sharded", "hook"])
def test_joint_mode_of_a_wrapper_in_one_process(reduce):
    net, other = Net(), Net()
    gf.GradientAligner(other).backward(*other(torch.ones(2, 6)))
    with one_process():
        wrapped = DistributedDataParallel(net, find_unused_parameters=reduce == "hook")
        aligner = gf.GradientAligner(wrapped, reduce=reduce)
        for _ in range(2):
            net.zero_grad()
            aligner.backward(*wrapped(torch.ones(2, 6)))
    torch.testing.assert_close(
        [p.grad for p in net.parameters()], [p.grad for p in other.parameters()]
    )


def test_joint_mode_without_ddp_in_one_process_of_a_group():
    net, other = Net(), Net()
    expected = gf.GradientAligner(other)
    expected.backward(*other(torch.ones(2, 6)))
    with one_process():
        DistributedDataParallel(Net())  # of another model
        gf.GradientAligner(net).backward(*net(torch.ones(2, 6)))
    torch.testing.assert_close(
        [p.grad for p in net.parameters()], [p.grad for p in other.parameters()]
    )


def test_the_message_for_two_processes_names_what_helps(monkeypatch):
    net = Net()
    aligner = gf.GradientAligner(net)
    optimizer = gf.AlignedAdamW(net.parameters(), aligner=aligner)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(
        RuntimeError,
        match=r"2 processes are .* optimizer\.step\(\).*"
        "find_unused_parameters=True.*sync_each_batch=True",
    ):
        aligner.backward(*net(torch.ones(2, 6)))
    assert not optimizer.state


def test_names_are_those_of_the_model_under_fsdp2():
    """More about it is in test_sharded_parameters.py."""
    with one_process():
        net = fully_shard(Net(), mesh=init_device_mesh("cpu", (1,)))
        assert gf.GradientAligner(net).parameter_names == NAMES
        with pytest.raises(ValueError, match="take no DistributedDataParallel, no process_group"):
            gf.GradientAligner(net, reduce="sharded")


def test_local_parts_of_ddp_over_tensor_parallelism_are_refused():
    with one_process():
        net = fully_shard(Net(), mesh=init_device_mesh("cpu", (1,)))
        _pre_dp_module_transform(net)
        with pytest.raises(RuntimeError, match="local parts of DTensors"):
            gf.GradientAligner(net)


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_flat_shards_of_fsdp1_are_refused(before, use_orig_params):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = Net()
        aligner = gf.GradientAligner(net) if before else None
        wrapped = FullyShardedDataParallel(
            net, use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        if not before:
            with pytest.raises(RuntimeError, match="flat shards of FullyShardedDataParallel"):
                gf.GradientAligner(wrapped)
        elif use_orig_params:
            with (
                pytest.raises(RuntimeError, match="flat shards of FullyShardedDataParallel"),
                aligner.collect("perception"),
            ):
                pass
        else:
            for name in aligner.names:
                with aligner.collect(name):
                    wrapped(torch.ones(2, 6))[aligner.names.index(name)].backward()
            with pytest.raises(
                RuntimeError, match="not among the aligner's parameters|no loss reached any"
            ):
                aligner.align()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        ("genrep", (0.7, 0.3)),
        ("pcgrad", (1.0, 1.0)),
        ("config", (1.0, 1.0)),
        (lambda gram: gram[:, 0], (1.0, 1.0)),
    ],
)
def test_default_weights_are_those_of_the_rules_paper(rule, weights):
    net = Net()
    aligner = gf.GradientAligner(net, rule=rule)
    assert aligner.weights == weights
    losses = net(torch.ones(2, 6))
    plain = [
        torch.autograd.grad(loss, head.weight, retain_graph=True)[0]
        for loss, head in zip(losses, (net.first, net.second), strict=True)
    ]
    aligner.backward(*losses)
    torch.testing.assert_close(
        [net.first.weight.grad, net.second.weight.grad],
        [w * g for w, g in zip(weights, plain, strict=True)],
    )
