"""GradientAligner under DistributedDataParallel."""

import contextlib
import sys
import unittest.mock

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from small_models import NAMES, Model, assert_gradients, batch, trained
from torch.nn.parallel import DistributedDataParallel

import genrep_fast as gf

# Two processes share the images of every micro-batch. DistributedDataParallel averages in every
# pass; or, without parameters that a loss does not reach (which it then refuses), in that of the
# last micro-batch alone.


class OneLoss(Model):
    """The losses one at a time, so that each has a forward pass of its own; with `touch_all` both
    reach every parameter.
    """

    def __init__(self, touch_all):
        super().__init__()
        self.touch_all = touch_all

    def forward(self, x, name):
        loss = super().forward(x)[NAMES.index(name)]
        return (
            loss + 0 * sum(parameter.sum() for parameter in self.parameters())
            if self.touch_all
            else loss
        )


def run_rank(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for flat, no_sync in ((False, False), (True, False), (False, True), (True, True)):
        model = OneLoss(touch_all=no_sync)
        wrapped = DistributedDataParallel(model, find_unused_parameters=not no_sync)
        aligner, alone = (
            gf.GradientAligner(model, flat=flat),
            gf.GradientAligner(expected := OneLoss(touch_all=no_sync)),
        )
        for _ in range(2):
            for micro_batch in range(3):
                for name in NAMES:
                    skip = (
                        wrapped.no_sync()
                        if no_sync and micro_batch < 2
                        else contextlib.nullcontext()
                    )
                    with skip, aligner.collect(name):
                        wrapped(batch(2 * micro_batch + rank), name).backward()
                    for other in range(2):
                        with (
                            unittest.mock.patch.object(dist, "get_world_size", return_value=1),
                            alone.collect(name),
                        ):
                            (expected(batch(2 * micro_batch + other), name) / 2).backward()
            torch.testing.assert_close(aligner.align().cosine, alone.align().cosine)
            assert_gradients(model, [parameter.grad for parameter in trained(expected)])
            aligner.zero_grad()
            alone.zero_grad()
    dist.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_gradients_are_those_of_one_process(two_processes):
    two_processes(__file__)


if __name__ == "__main__":
    run_rank(int(sys.argv[2]), sys.argv[3])
