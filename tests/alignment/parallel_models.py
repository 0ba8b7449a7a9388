"""A model of two losses for several processes, and how it is trained there and in one process."""

import contextlib
import unittest.mock

import torch
import torch.distributed as dist
from small_models import NAMES, Model, batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import genrep_fast as gf


class ParallelModel(Model):
    """Two heads, and a parameter that the first loss reaches in the last process alone; the losses
    together, or that of a name.
    """

    def __init__(self, dtype=torch.float64):
        super().__init__(dtype)
        self.sometimes = nn.Parameter(torch.ones(7, dtype=dtype))

    def forward(self, x, name=None):
        perception, generation = super().forward(x)
        if len(x) == 3:
            perception = perception + (self.sometimes * x.mean(0)).square().sum()
        losses = (perception, generation)
        return losses if name is None else losses[NAMES.index(name)]


class SameReach(ParallelModel):
    """Both losses reach every parameter."""

    def forward(self, x, name=None):
        everything = sum(parameter.sum() for parameter in self.parameters())
        losses = [loss + 0 * everything for loss in super().forward(x)]
        return losses if name is None else losses[NAMES.index(name)]


def images(rank, size, step, dtype=torch.float64):
    """The images of a process: four, three of the last one."""
    return batch(1000 * step + rank, dtype)[: 3 if rank == size - 1 else 4]


@contextlib.contextmanager
def one_process():
    with unittest.mock.patch.object(dist, "get_world_size", return_value=1):
        yield


class Problem:
    """How a model is trained.

    `micro_batches` a step; `reached` whether both losses reach every parameter; the rest goes to
    the aligner and the optimizer.
    """

    def __init__(
        self,
        dtype=torch.float64,
        *,
        steps=50,
        micro_batches=1,
        reached=False,
        max_norm=None,
        averages=False,
        fused=True,
        **aligner_options,
    ):
        self.dtype, self.steps, self.micro_batches = dtype, steps, micro_batches
        self.reached, self.max_norm, self.averages = reached, max_norm, averages
        self.fused, self.aligner_options = fused, aligner_options

    def model(self):
        return (SameReach if self.reached else ParallelModel)(self.dtype)

    def trainer(self, model, params, **options):
        aligner = gf.GradientAligner(params, **self.aligner_options, **options)
        if not self.fused:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            return aligner, optimizer, None
        ema = self.model() if self.averages else None
        optimizer = gf.AlignedAdamW(
            model.parameters(),
            lr=1e-2,
            aligner=aligner,
            max_norm=self.max_norm,
            ema=ema,
            ema_decay=0.9,
        )
        return aligner, optimizer, ema

    def step(self, aligner, optimizer, mode="sequential"):
        if not self.fused and mode != "joint":
            aligner.align(self.max_norm)
        optimizer.step()
        optimizer.zero_grad()

    def alone(self, size):
        """Parameters, averages and last statistics of one process on the joined batch."""
        with one_process():
            model = self.model()
            aligner, optimizer, ema = self.trainer(model, model)
            for step in range(self.steps):
                for micro_batch in range(self.micro_batches):
                    number = self.micro_batches * step + micro_batch
                    losses = [model(images(rank, size, number, self.dtype)) for rank in range(size)]
                    means = [sum(of_name) / size for of_name in zip(*losses, strict=True)]
                    for name, loss in zip(NAMES, means, strict=True):
                        with aligner.collect(name):
                            loss.backward(retain_graph=name == NAMES[0])
                self.step(aligner, optimizer)
            return result(model, ema, aligner)

    def together(self, rank, size, mode, reduce, **wrapper_options):
        """The same in this process, which has its part of the batch.

        Modes are "joint", "sequential" and "sequential, one forward".
        """
        model = self.model()
        wrapped = DistributedDataParallel(model, **wrapper_options)
        aligner, optimizer, ema = self.trainer(model, wrapped, reduce=reduce)
        for step in range(self.steps):
            for micro_batch in range(self.micro_batches):
                number = self.micro_batches * step + micro_batch
                x = images(rank, size, number, self.dtype)
                is_last = micro_batch == self.micro_batches - 1
                # DistributedDataParallel allows one of the two.
                every = reduce == "hook" and wrapped.find_unused_parameters
                with contextlib.nullcontext() if is_last or every else wrapped.no_sync():
                    run_passes(mode, wrapped, x, aligner)
            self.step(aligner, optimizer, mode)
        return result(model, ema, aligner)


def run_passes(mode, wrapped, x, aligner):
    if mode == "joint":
        aligner.backward(*wrapped(x))
        return
    losses = wrapped(x) if mode != "sequential" else None
    for position, name in enumerate(NAMES):
        with aligner.collect(name):
            if losses is None:
                wrapped(x, name).backward()
            else:
                losses[position].backward(retain_graph=position == 0)


def result(model, ema, aligner):
    tensors = [parameter.detach() for parameter in model.parameters()]
    averages = [] if ema is None else [parameter.detach() for parameter in ema.parameters()]
    return tensors, averages, aligner.stats


def distance(one, other):
    """Relative distance of two lists of tensors."""
    vectors = [torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (one, other)]
    return ((vectors[0] - vectors[1]).norm() / vectors[1].norm()).item()
