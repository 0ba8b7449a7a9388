"""What every rank of test_sharded_parameters.py does: `python sharded_ranks.py RANK WORLD FOLDER`.

All runs on one process come first, before there is a process group. SHARDED_CHECKS=text in the
environment leaves those checks alone that have the text in their names.
"""

import contextlib
import copy
import datetime
import itertools
import os
import sys
import time
import unittest.mock
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_models import (
    WIDTH,
    Net,
    joined_batch,
    mesh_of,
    shard,
    shard_in_half_precision,
    share,
    split,
    split_and_shard,
)
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import genrep_fast as gf

STEPS = 50
# Of the checkpoint.
SAVED = 10
# Seconds of the process group.
TIMEOUT = 120


class Setting(NamedTuple):
    """How a run lies on processes, and how it trains."""

    # From a model and the number of processes to the model on DTensors.
    wrap: object = lambda net, world: shard(net, mesh_of(world, names=("data",)))
    joint: bool = True
    dtype: torch.dtype = torch.float64
    # How many processes see the same images.
    copies: int = 1
    groups: str = "all"
    rule: str = "genrep"
    max_norm: float | None = None
    averaged: bool = False

    def on_one_process(self):
        return self._replace(wrap=None, joint=True)


def hsdp(net, world):
    return shard(net, mesh_of(2, world // 2, names=("replicas", "shards")))


def split_over_all(net, world):
    return split(net, mesh_of(world, names=("tensor",)))


def split_over_two(net, world):
    return split_and_shard(net, mesh_of(world // 2, 2, names=("data", "tensor")))


def in_half_precision(net, world):
    return shard_in_half_precision(net, mesh_of(world, names=("data",)))


HSDP = Setting(hsdp)
SINGLE = torch.float32
SETTINGS = {
    2: {
        "joint, clipped": Setting(max_norm=0.3),
        "sequential, blocks, averages": Setting(joint=False, groups="block", averaged=True),
        "float32, joint, pcgrad": Setting(dtype=SINGLE, rule="pcgrad", groups="tensor"),
        "float32, sequential, clipped": Setting(joint=False, dtype=SINGLE, max_norm=0.3),
        "tensor parallel": Setting(split_over_all, copies=2, max_norm=0.3),
        "half precision": Setting(in_half_precision),
    },
    3: {
        "joint, blocks, clipped": Setting(groups="block", max_norm=0.3),
        "float32, sequential, averages": Setting(joint=False, dtype=SINGLE, averaged=True),
    },
    4: {
        "hsdp, sequential, blocks, clipped": HSDP._replace(
            joint=False, groups="block", max_norm=0.3
        ),
        "hsdp, float32, joint, pcgrad": HSDP._replace(dtype=SINGLE, rule="pcgrad"),
        "fsdp2 and tensor parallel": Setting(
            split_over_two, copies=2, groups="block", max_norm=0.3
        ),
    },
}


class Run(NamedTuple):
    """A model, what trains it, and statistics of its steps."""

    net: torch.nn.Module
    aligner: gf.GradientAligner
    optimizer: gf.AlignedAdamW
    average: torch.nn.Module | None
    stats: list


class Ranks:
    """This rank of `world`; `references` are the settings' runs on one process."""

    def __init__(self, rank, world, folder):
        self.rank, self.world, self.folder = rank, world, Path(folder)
        self.references = {}
        for setting in SETTINGS[world].values():
            alone = setting.on_one_process()
            if alone not in self.references:
                run = self.start(alone)
                self.train(run, alone, range(STEPS))
                self.references[alone] = run

    def start(self, setting, net=None, **options):
        net = net or Net(setting.dtype)
        average = copy.deepcopy(net) if setting.averaged else None
        if setting.wrap is not None:
            net = setting.wrap(net, self.world)
            average = None if average is None else setting.wrap(average, self.world)
        aligner = gf.GradientAligner(net, groups=setting.groups, rule=setting.rule, **options)
        optimizer = gf.AlignedAdamW(
            net.parameters(),
            lr=1e-2,
            aligner=aligner,
            max_norm=setting.max_norm,
            ema=average,
            ema_decay=0.9,
        )
        return Run(net, aligner, optimizer, average, [])

    def on_one_process(self, steps):
        setting = FSDP2.on_one_process()
        run = self.start(setting)
        with as_one_process():
            self.train(run, setting, range(steps))
        return run

    def share(self, batch, setting):
        if setting.wrap is None:
            return batch
        return share(batch, self.rank // setting.copies, self.world // setting.copies)

    def train(self, run, setting, steps):
        for step in steps:
            self.collect(run, self.share(joined_batch(step, setting.dtype), setting), setting.joint)
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.stats.append(run.aligner.stats)

    def collect(self, run, images, joint=True):
        if joint:
            run.aligner.backward(*run.net(images))
            return
        for position, name in enumerate(run.aligner.names):
            with run.aligner.collect(name):
                run.net(images)[position].backward()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def furthest(net, other):
    """The largest difference of a parameter relative to its largest element."""
    distances = []
    for one, expected in zip(net.parameters(), other.parameters(), strict=True):
        distance = (whole(one) - expected).abs().max() / expected.abs().max()
        distances.append(distance.item())
    return max(distances)


def check_setting(ranks, name):
    setting = SETTINGS[ranks.world][name]
    expected = ranks.references[setting.on_one_process()]
    run = ranks.start(setting)
    ranks.train(run, setting, range(STEPS))
    pairs = [(run.net, expected.net)]
    if setting.averaged:
        pairs.append((run.average, expected.average))
    distance = max(furthest(*pair) for pair in pairs)
    if ranks.rank == 0:
        print(f"{ranks.world} ranks, {name}: parameters {distance:.1e} apart")
    if name == "half precision":
        # bfloat16 rounds activations and weights by 2^-9, and Adam's first steps take a gradient's
        # sign, whatever its length.
        assert 1e-6 < distance < 0.2
        return
    assert distance < (1e-12 if setting.dtype == torch.float64 else 1e-6)
    # Norms show a replica that counts twice and a shard that counts alone.
    tolerance = {"rtol": 1e-9 if setting.dtype == torch.float64 else 1e-4, "atol": 1e-6}
    for one, other in zip(run.stats, expected.stats, strict=True):
        torch.testing.assert_close(one.norms, other.norms, **tolerance)
        torch.testing.assert_close(one.cosine, other.cosine, **tolerance)
        if setting.max_norm is not None:
            torch.testing.assert_close(one.total_norm, other.total_norm, **tolerance)
    # Of a tensor and of a state that are sharded, every process has a part.
    for parameter in run.net.parameters():
        state = run.optimizer.state[parameter]
        if isinstance(parameter, DTensor) and state:
            for key in ("exp_avg", "exp_avg_sq"):
                assert state[key].placements == parameter.placements
            assert type(state["step"]) is torch.Tensor and state["step"] == STEPS


FSDP2 = Setting()
TENSOR_PARALLEL = Setting(split_over_all, copies=2)


def gradients(net):
    """The ``.grad`` of all parameters, whole."""
    return [None if one.grad is None else whole(one.grad).clone() for one in net.parameters()]


def assert_same(gradients, others, rtol=1e-10):
    torch.testing.assert_close(gradients, others, rtol=rtol, atol=1e-12)


def raised(error, message):
    return pytest.raises(error, match=message)


def as_one_process():
    """What is not sharded is not reduced, either."""
    return unittest.mock.patch.object(dist, "get_world_size", return_value=1)


def aligned_on_one_process(images):
    """Gradients that `align` leaves."""
    net = Net()
    aligner = gf.GradientAligner(net)
    with as_one_process():
        aligner.backward(*net(images))
    return gradients(net)


def aligned(ranks, setting=FSDP2, net=None, **options):
    """A sharded model and an aligner that has no optimizer."""
    net = net or setting.wrap(Net(), ranks.world)
    return net, gf.GradientAligner(net, **options)


@contextlib.contextmanager
def counted_reductions():
    """A list of how many numbers every ``all_reduce`` that Python calls has sent."""
    sent = []
    all_reduce = dist.all_reduce

    def counting(tensor, *arguments, **options):
        sent.append(tensor.numel())
        return all_reduce(tensor, *arguments, **options)

    with unittest.mock.patch.object(dist, "all_reduce", counting):
        yield sent


def align_leaves_dtensors_in_place(ranks):
    images = joined_batch(0)
    expected = aligned_on_one_process(images)
    for flat, joint in itertools.product((False, True), repeat=2):
        net, aligner = aligned(ranks, flat=flat)
        pointers = {}
        if joint:
            aligner.backward(*net(ranks.share(images, FSDP2)))
        else:
            for position, name in enumerate(aligner.names):
                with aligner.collect(name):
                    net(ranks.share(images, FSDP2))[position].backward()
                    if position == 0:
                        pointers = {
                            one: one.grad.to_local().data_ptr()
                            for one in net.parameters()
                            if one.grad is not None
                        }
            aligner.align()
        assert_same(gradients(net), expected)
        for parameter in net.parameters():
            if parameter.grad is not None:
                assert parameter.grad.placements == parameter.placements
        if not flat:
            assert all(one.grad.to_local().data_ptr() == at for one, at in pointers.items())


def one_reduction_a_step_and_axis(ranks):
    """Of three doubles a tensor that the axis shards, and four more numbers."""
    settings = {2: (FSDP2, TENSOR_PARALLEL), 4: (HSDP, SETTINGS[4]["fsdp2 and tensor parallel"])}
    for setting in settings[ranks.world]:
        run = ranks.start(setting._replace(max_norm=None))
        sharded = [
            sum(
                isinstance(one, DTensor) and not one.placements[axis].is_replicate()
                for one in run.net.parameters()
                if isinstance(one, DTensor) and one.device_mesh.ndim > axis
            )
            for axis in range(2)
        ]
        ranks.collect(run, ranks.share(joined_batch(0), setting), joint=False)
        with counted_reductions() as sent:
            run.optimizer.step()
        # What is left for a GradScaler has computed those of the first step.
        run.optimizer.zero_grad()
        ranks.collect(run, ranks.share(joined_batch(0), setting), joint=False)
        with counted_reductions() as sent:
            run.optimizer.step()
        names = {
            one.device_mesh.mesh_dim_names
            for one in run.net.parameters()
            if isinstance(one, DTensor)
        }
        if ("data", "tensor") in names:
            on_data = sum(isinstance(one, DTensor) for one in run.net.parameters())
            on_both = [one for one in run.net.parameters() if one.device_mesh.ndim == 2]
            on_tensor = sum(not one.placements[1].is_replicate() for one in on_both)
            expected = [3 * on_data + 4, 3 * on_tensor + 4]
        else:
            expected = [3 * number + 4 for number in sharded if number]
        assert sorted(sent) == sorted(expected), (sent, expected)


def partial_gradients_are_added_up(ranks):
    """Those of norms of which every process sees a part of the tokens; whoever scales one by the
    number of processes gets what one process would get that scales it.
    """
    images = joined_batch(0)
    for factor in (1, 2):
        net, aligner = aligned(ranks, TENSOR_PARALLEL)
        alone = Net()
        expected = gf.GradientAligner(alone)
        for position, name in enumerate(aligner.names):
            with aligner.collect(name):
                net(images)[position].backward()
                gradient = net.blocks[1].norm.weight.grad
                assert gradient.placements[0].is_partial()
                gradient.mul_(factor)
            with as_one_process(), expected.collect(name):
                alone(images)[position].backward()
                alone.blocks[1].norm.weight.grad.mul_(factor)
        torch.testing.assert_close(aligner.align().norms, expected.align().norms)
        assert_same(gradients(net), gradients(alone))
        assert net.blocks[1].norm.weight.grad.placements == (Replicate(),)


def a_loss_reaches_a_whole_tensor(ranks):
    """Not one of its shards: a gradient that is None in one process counts as zeros there, and
    where it is None for all losses, all processes see that they differ.
    """
    images = ranks.share(joined_batch(0), FSDP2)
    results = []
    for missing in (False, True):
        net, aligner = aligned(ranks, groups="tensor")
        for position, name in enumerate(aligner.names):
            with aligner.collect(name):
                net(images)[position].backward()
                if position == 1 and ranks.rank == 1 and missing:
                    net.blocks[0].up.weight.grad = None
                elif position == 1 and ranks.rank == 1:
                    net.blocks[0].up.weight.grad.to_local().zero_()
        stats = aligner.align()
        results.append([*gradients(net), stats.norms, stats.cosine])
    assert_same(*results)
    assert all(results[0][-2][aligner.group_keys.index("rows")] > 0)
    net, aligner = aligned(ranks)
    for position, name in enumerate(aligner.names):
        with aligner.collect(name):
            net(images)[position].backward()
            if ranks.rank == 1:
                net.blocks[0].up.weight.grad = None
    with raised(RuntimeError, "the losses reached other parameters in this one"):
        aligner.align()


def processes_that_disagree_are_told(ranks):
    for option in (
        {"weights": (0.5, 0.5 + ranks.rank)},
        {"rule": ("genrep", "pcgrad")[ranks.rank]},
        {"power": 1.0 + ranks.rank},
    ):
        net, aligner = aligned(ranks, **option)
        for position, name in enumerate(aligner.names):
            with aligner.collect(name):
                net(ranks.share(joined_batch(0), FSDP2))[position].backward()
        with raised(RuntimeError, "names, weights, rule, power, groups or max_norm differ"):
            aligner.align()


def micro_batches_without_reduction(ranks):
    images = [ranks.share(joined_batch(step), FSDP2) for step in range(2)]
    expected_net, expected = aligned(ranks)
    net, aligner = aligned(ranks)

    def collect(name, number, *, reduce):
        net.set_requires_gradient_sync(reduce)
        with aligner.collect(name):
            net(images[number])[aligner.names.index(name)].backward()

    for position, name in enumerate(aligner.names):
        for number in range(2):
            with expected.collect(name):
                expected_net(images[number])[position].backward()
    expected.align()
    for attempt in range(2):
        if attempt == 0:
            collect("perception", 0, reduce=False)
            with raised(RuntimeError, "keeps gradients that it has not reduced"):
                collect("generation", 0, reduce=True)
            aligner.zero_grad()
        for name in aligner.names:
            collect(name, 0, reduce=False)
            if attempt == 0 and name == "generation":
                with raised(RuntimeError, "keeps gradients that it has not reduced"):
                    aligner.align()
                aligner.zero_grad()
                break
            collect(name, 1, reduce=True)
    aligner.align()
    assert_same(gradients(net), gradients(expected_net))
    aligner.zero_grad()
    # A pass that raised leaves what it kept, until zero_grad.
    net.set_requires_gradient_sync(False)
    with contextlib.suppress(KeyError), aligner.collect("perception"):
        net(images[0])[0].backward()
        raise KeyError
    aligner.zero_grad()
    for name in aligner.names:
        collect(name, 0, reduce=False)
        collect(name, 1, reduce=True)
    aligner.align()
    assert_same(gradients(net), gradients(expected_net))
    aligner.zero_grad()
    net.set_is_last_backward(False)
    with raised(RuntimeError, r"set_is_last_backward\(False\)"):
        collect("perception", 0, reduce=True)
    net.set_is_last_backward(True)


def plain_parameters_beside_shards(ranks):
    """Nobody averages their gradients under FSDP2."""
    images = joined_batch(0)
    expected = aligned_on_one_process(images)
    for averaged in (False, True):
        net = Net()
        mesh = mesh_of(ranks.world, names=("data",))
        fully_shard(net, mesh=mesh, ignored_params=set(net.generation.parameters()) | {net.rows})
        net, aligner = aligned(ranks, net=net)
        for position, name in enumerate(aligner.names):
            with aligner.collect(name):
                net(ranks.share(images, FSDP2))[position].backward()
                for parameter in (*net.generation.parameters(), net.rows):
                    if averaged and parameter.grad is not None:
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= ranks.world
        if averaged:
            aligner.align()
            assert_same(gradients(net), expected)
        else:
            with raised(RuntimeError, "FSDP2 does not average those of its ignored_params"):
                aligner.align()
    # One that a single loss reaches is compared, too, though it is not aligned.
    net = Net()
    mesh = mesh_of(ranks.world, names=("data",))
    fully_shard(net, mesh=mesh, ignored_params=set(net.generation.parameters()))
    net, aligner = aligned(ranks, net=net)
    with raised(RuntimeError, "FSDP2 does not average those of its ignored_params"):
        aligner.backward(*net(ranks.share(images, FSDP2)))


def writes_to_what_is_left_are_seen(ranks):
    images = ranks.share(joined_batch(0), FSDP2)

    def write(parameter):
        parameter.grad.mul_(2)

    def write_locally(parameter):
        parameter.grad.to_local().mul_(2)

    def replace(parameter):
        parameter.grad = parameter.grad * 2

    for change in (write, write_locally, replace):
        net, aligner = aligned(ranks)
        for position, name in enumerate(aligner.names):
            with aligner.collect(name):
                net(images)[position].backward()
        with torch.no_grad():
            change(net.blocks[1].down.weight)
        with raised(RuntimeError, "was written to, replaced or set to None"):
            aligner.align()
    net, aligner = aligned(ranks)
    for position, name in enumerate(aligner.names):
        with aligner.collect(name):
            net(images)[position].backward()
    net.zero_grad(set_to_none=False)
    with raised(RuntimeError, "dropped after they had been collected"):
        aligner.align()


def a_scaler_skips_in_all_processes(ranks):
    """Though one alone has what is not finite, and some have nothing of the smallest parameter."""
    run, plain = ranks.start(FSDP2), ranks.start(FSDP2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    images = ranks.share(joined_batch(0), FSDP2)

    def step(spoilt):
        for position, name in enumerate(run.aligner.names):
            with run.aligner.collect(name):
                scaler.scale(run.net(images)[position]).backward()
                if spoilt and position == 0 and ranks.rank == ranks.world - 1:
                    run.net.blocks[0].up.weight.grad.to_local()[0, 0] = torch.inf
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()

    before = [whole(one).clone() for one in run.net.parameters()]
    step(spoilt=True)
    assert scaler.get_scale() == 2.0**9
    assert all(map(torch.equal, before, [whole(one) for one in run.net.parameters()]))
    step(spoilt=False)
    assert scaler.get_scale() == 2.0**9
    ranks.collect(plain, images)
    plain.optimizer.step()
    one, other = ([whole(p) for p in each.net.parameters()] for each in (run, plain))
    assert_same(one, other)
    torch.testing.assert_close(run.aligner.stats.norms, plain.aligner.stats.norms)

    # Scales that print differently, as on each process's own GPU, are no disagreement.
    ranks.collect(plain, images)
    plain.optimizer.found_inf = torch.zeros(())
    plain.optimizer.grad_scale = torch.ones(
        (), dtype=(torch.float32, torch.float64)[ranks.rank % 2]
    )
    plain.optimizer.step()


def a_pass_before_the_step_does_not_outlive_it(ranks):
    """One without gradients leaves the root's whole parameters, which the step makes old."""
    run = ranks.start(FSDP2)
    for step in range(3):
        ranks.collect(run, ranks.share(joined_batch(step), FSDP2))
        with torch.no_grad():
            run.net(joined_batch(step))
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert furthest(run.net, ranks.on_one_process(3).net) < 1e-12


def a_process_may_hold_no_element_at_all(ranks):
    """Of a layer of one row, of which the first process has everything."""

    def train(net, part, parts):
        aligner = gf.GradientAligner(net, names=("one", "two", "three"), rule="config")
        optimizer = gf.AlignedAdamW(net.parameters(), lr=1e-2, aligner=aligner, max_norm=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        for step in range(4):
            outputs = net(share(joined_batch(step), part, parts))
            losses = outputs.square().mean(), outputs.abs().mean(), (outputs - 1).square().mean()
            if step == 1:
                losses = (losses[0] * torch.inf, *losses[1:])
            aligner.backward(*map(scaler.scale, losses))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return scaler.get_scale()

    torch.manual_seed(0)
    alone = torch.nn.Linear(WIDTH, 1).double()
    net = fully_shard(copy.deepcopy(alone), mesh=mesh_of(ranks.world, names=("data",)))
    assert all(one.to_local().numel() == 0 for one in net.parameters()) == (ranks.rank > 0)
    with as_one_process():
        scale = train(alone, 0, 1)
    assert train(net, ranks.rank, ranks.world) == scale == 2.0**3
    assert furthest(net, alone) < 1e-12


def averages_are_sharded_as_their_parameters(ranks):
    from diffusers.training_utils import EMAModel

    mesh = mesh_of(ranks.world, names=("data",))
    for kind in ("averaged model", "ema model", "teacher"):
        net = Net()
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        teacher = copy.deepcopy(net)
        shard(net, mesh)
        if kind == "averaged model":
            shard(average.module, mesh)
            source, tensors = average, list(average.module.parameters())
        elif kind == "ema model":
            source = EMAModel(net.parameters(), decay=0.9)
            tensors = source.shadow_params
        else:
            source = shard(teacher, mesh)
            tensors = list(teacher.parameters())
        aligner = gf.GradientAligner(net)
        optimizer = gf.AlignedAdamW(net.parameters(), aligner=aligner, ema=source)
        expected = [whole(one).clone() for one in net.parameters()]
        for step in range(3):
            aligner.backward(*net(ranks.share(joined_batch(step), FSDP2)))
            if kind == "teacher":
                # Leaves what FSDP2 has gathered for its root.
                with torch.no_grad():
                    teacher(joined_batch(step))
            decay = {"teacher": 0.999, "averaged model": 0.9 if step else 0.0}.get(kind)
            if kind == "ema model":
                decay = source.get_decay(source.optimization_step + 1)
            optimizer.step()
            optimizer.zero_grad()
            for average_of_one, parameter in zip(expected, net.parameters(), strict=True):
                average_of_one.lerp_(whole(parameter), 1 - decay)
        assert_same([whole(one) for one in tensors], expected)
        if kind == "teacher":
            with torch.no_grad():
                one = teacher(joined_batch(0))
            alone = Net()
            alone.load_state_dict({k: whole(v) for k, v in teacher.state_dict().items()})
            assert_same(one, alone(joined_batch(0)))
    with raised(ValueError, "ema.unused. must be a DTensor .* got a plain tensor"):
        gf.AlignedAdamW(net.parameters(), aligner=aligner, ema=Net())


def parameters_that_cannot_be_aligned(ranks):
    net = shard(Net(), mesh_of(ranks.world, names=("data",)))
    net(ranks.share(joined_batch(0), FSDP2))
    with raised(RuntimeError, r"fully_shard \(FSDP2\) gathers"):
        gf.GradientAligner(net)
    net.reshard()
    gf.GradientAligner(net)
    mesh = mesh_of(ranks.world, names=("data",))
    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()]).detach().requires_grad_()
    with raised(ValueError, r"params\[0\] must be sharded or replicated"):
        gf.GradientAligner([partial])
    other = init_device_mesh("cpu", (ranks.world,))
    elsewhere = DTensor.from_local(torch.ones(3), DeviceMesh("cpu", [0]), [Replicate()])
    if ranks.rank > 0:
        with raised(ValueError, r"params\[0\] must lie on this process too"):
            gf.GradientAligner([elsewhere.detach().requires_grad_()])
    whole_one = distribute_tensor(torch.ones(4), other, [Shard(0)]).requires_grad_()
    aligner = gf.GradientAligner([whole_one])
    grid = DeviceMesh("cpu", torch.arange(ranks.world)[None])
    gradient = distribute_tensor(torch.ones(4), grid, [Replicate(), Shard(0)])
    with (
        raised(ValueError, r"the gradient of params\[0\] must be a DTensor \(4,\)"),
        aligner.collect("perception"),
    ):
        whole_one.grad = gradient


def checkpoint(run):
    return {
        "model": get_model_state_dict(run.net),
        "optimizer": get_optimizer_state_dict(run.net, run.optimizer),
    }


def a_checkpoint_is_saved(ranks):
    run = ranks.start(FSDP2)
    ranks.train(run, FSDP2, range(SAVED))
    dcp.save(checkpoint(run), checkpoint_id=ranks.folder / "checkpoint")
    # In the same processes a plain state dict does.
    resumed = ranks.start(FSDP2)
    resumed.net.load_state_dict(run.net.state_dict())
    resumed.optimizer.load_state_dict(run.optimizer.state_dict())
    expected = ranks.on_one_process(SAVED + 5).net
    for each in (run, resumed):
        ranks.train(each, FSDP2, range(SAVED, SAVED + 5))
        assert furthest(each.net, expected) < 1e-12
    state = run.optimizer.state_dict()
    number = next(iter(state["state"]))
    state["state"][number]["exp_avg"] = whole(state["state"][number]["exp_avg"])
    with raised(ValueError, "exp_avg of rows must be a DTensor.*set_optimizer_state_dict"):
        run.optimizer.load_state_dict(state)


def a_checkpoint_of_two_processes_goes_on(ranks):
    setting = HSDP if ranks.world == 4 else FSDP2
    run = ranks.start(setting)
    states = checkpoint(run)
    # A parameter that no loss has reached has no state in the checkpoint, as with torch.optim.
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(states, checkpoint_id=ranks.folder / "checkpoint", planner=planner)
    set_model_state_dict(run.net, states["model"])
    set_optimizer_state_dict(run.net, run.optimizer, states["optimizer"])
    ranks.train(run, setting, range(SAVED, SAVED + 5))
    assert furthest(run.net, ranks.on_one_process(SAVED + 5).net) < 1e-12


def _killed(ranks, collect_first):
    """The others get an error at once, or when the time of the process group is over."""
    net, aligner = aligned(ranks)
    images = ranks.share(joined_batch(0), FSDP2)
    start = time.monotonic()
    if collect_first:
        for position, name in enumerate(aligner.names):
            with aligner.collect(name):
                net(images)[position].backward()
    losses = None if collect_first else net(images)
    dist.barrier()
    if ranks.rank == ranks.world - 1:
        os._exit(0)
    with pytest.raises(RuntimeError):
        aligner.align() if collect_first else aligner.backward(*losses)
    assert time.monotonic() - start < TIMEOUT


def a_rank_is_killed_in_backward(ranks):
    _killed(ranks, collect_first=False)


def a_rank_is_killed_in_align(ranks):
    _killed(ranks, collect_first=True)


CHECKS = {
    2: [
        align_leaves_dtensors_in_place,
        one_reduction_a_step_and_axis,
        partial_gradients_are_added_up,
        a_loss_reaches_a_whole_tensor,
        processes_that_disagree_are_told,
        micro_batches_without_reduction,
        plain_parameters_beside_shards,
        writes_to_what_is_left_are_seen,
        a_scaler_skips_in_all_processes,
        a_pass_before_the_step_does_not_outlive_it,
        a_process_may_hold_no_element_at_all,
        averages_are_sharded_as_their_parameters,
        parameters_that_cannot_be_aligned,
        a_checkpoint_is_saved,
        a_rank_is_killed_in_backward,
    ],
    3: [
        a_scaler_skips_in_all_processes,
        a_checkpoint_of_two_processes_goes_on,
        a_rank_is_killed_in_align,
    ],
    4: [one_reduction_a_step_and_axis, a_checkpoint_of_two_processes_goes_on],
}


def main(rank, world, folder):
    ranks = Ranks(rank, world, folder)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{world}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    checks = {name: lambda name=name: check_setting(ranks, name) for name in SETTINGS[world]}
    checks |= {check.__name__: lambda check=check: check(ranks) for check in CHECKS[world]}
    wanted = os.environ.get("SHARDED_CHECKS", "")
    for name, check in checks.items():
        if wanted in name:
            check()
            # One that was killed has passed all before.
            with (ranks.folder / f"passed-{world}-{rank}").open("a") as passed:
                print(name, file=passed)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
