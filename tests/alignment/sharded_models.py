"""A small model for one process, and the same one on DTensors: FSDP2, HSDP, tensor parallelism."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

IMAGES = 12  # of a joined batch, which 2, 3 and 4 processes share
TOKENS, WIDTH = 8, 6


class Block(nn.Module):
    """A residual branch whose widths neither two, three nor four processes share evenly."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Blocks that both losses reach, a head for each, one of them of a single row, a parameter that
    no loss reaches, one that both reach with zeros in most rows, and a frozen one.
    """

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.perception, self.generation = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 5)
        self.unused = nn.Parameter(torch.ones(5))
        self.rows = nn.Parameter(torch.randn(7, WIDTH))
        self.frozen = nn.Parameter(torch.full((WIDTH,), 0.5), requires_grad=False)
        self.to(dtype)

    def forward(self, x):  # [B, TOKENS, WIDTH]
        x = x + self.rows[0] * self.frozen
        for block in self.blocks:
            x = block(x)
        perception = self.perception(x + self.rows[5]).square().mean()
        return perception, (self.generation(x) - 1).abs().mean()


def joined_batch(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(IMAGES, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def share(batch, part, parts):
    """The images of one of so many processes."""
    return batch.chunk(parts)[part]


def shard(net, mesh, **options):
    """FSDP2, or HSDP on a mesh of two axes."""
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def shard_in_half_precision(net, mesh):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return shard(net, mesh, mp_policy=policy)


def split(net, mesh):
    """Tensor parallelism of the blocks, of which the norms see a part of the tokens each."""
    tokens = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1))
    for block in net.blocks:
        parallelize_module(block, mesh, {"norm": tokens})
        plan = {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Replicate()),
        }
        parallelize_module(block, mesh, plan)
    return net


def split_and_shard(net, mesh):
    """FSDP2 over the first axis of `mesh` of what tensor parallelism splits over the second one."""
    return shard(split(net, mesh["tensor"]), mesh["data"])


def mesh_of(*sizes, names):
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)
