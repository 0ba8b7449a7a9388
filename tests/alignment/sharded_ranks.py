"""What every rank of test_sharded_parameters.py does: `python sharded_ranks.py RANK WORLD FOLDER`.

All runs on one process come first, before there is a process group.
"""

import copy
import datetime
import itertools
import json
import os
import sys
import traceback
import unittest.mock
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded_models import (
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
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import genrep_fast as gf

STEPS = 50
TIMEOUT = 20


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
SETTINGS = {
    2: {
        "joint": Setting(),
        "sequential": Setting(joint=False),
        "float32 joint": Setting(dtype=torch.float32),
        "float32 sequential": Setting(joint=False, dtype=torch.float32),
        "clipped": Setting(max_norm=0.3),
        "blocks": Setting(joint=False, groups="block"),
        "pcgrad": Setting(rule="pcgrad", groups="tensor"),
        "averages": Setting(joint=False, averaged=True),
        "tensor parallel": Setting(split_over_all, copies=2, max_norm=0.3),
        "half precision": Setting(in_half_precision),
    },
    3: {
        "joint, blocks": Setting(groups="block", max_norm=0.3),
        "float32 sequential, averages": Setting(joint=False, dtype=torch.float32, averaged=True),
    },
    4: {
        "hsdp": HSDP,
        "hsdp sequential, blocks": HSDP._replace(joint=False, groups="block", max_norm=0.3),
        "hsdp float32, pcgrad": HSDP._replace(dtype=torch.float32, rule="pcgrad"),
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


def main(rank, world, folder):
    ranks = Ranks(rank, world, folder)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{world}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    results = {}
    for name in chosen(SETTINGS[world]):
        results[name] = run_check(lambda name=name: check_setting(ranks, name))
        if results[name] != "":
            break
    else:
        for check in CHECKS[world]:
            results[check.__name__] = run_check(lambda check=check: check(ranks))
            if results[check.__name__] != "":
                break
    print(json.dumps(results))
    (ranks.folder / f"results{world}-{rank}.json").write_text(json.dumps(results))


def chosen(names):
    """The names, or those that the environment asks for, to try some of them alone."""
    wanted = os.environ.get("CHECKS")
    return names if wanted is None else [name for name in names if wanted in name]


def run_check(check):
    try:
        check()
    except BaseException:
        return traceback.format_exc()
    return ""


CHECKS = {2: [], 3: [], 4: []}

if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
