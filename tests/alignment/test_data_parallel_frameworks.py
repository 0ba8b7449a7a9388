"""Aligner and optimizer under Accelerate, Lightning's Trainer and Fabric in two processes give what
one process gives on the joined batch.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from parallel_models import ParallelModel, Problem, distance, images, one_process
from small_models import NAMES

import genrep_fast as gf

STEPS = 3


def check(parameters, expected):
    assert distance([parameter.detach() for parameter in parameters], expected) < 1e-12


def check_fabric(rank, expected):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    for reduce in ("no_sync", "sharded"):
        model = fabric.setup_module(ParallelModel())
        aligner = gf.GradientAligner(model, reduce=reduce)
        optimizer = gf.AlignedAdamW(model.parameters(), lr=1e-2, aligner=aligner)
        optimizer = fabric.setup_optimizers(optimizer)
        for step in range(STEPS):
            aligner.backward(*model(images(rank, 2, step)), backward=fabric.backward)
            optimizer.step()
            optimizer.zero_grad()
        check(model.parameters(), expected)


def check_accelerate(rank):
    """Two micro-batches a step, whose losses Accelerate divides by two."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    model = accelerator.prepare(ParallelModel())
    aligner = gf.GradientAligner(model)
    optimizer = gf.AlignedAdamW(model.parameters(), lr=1e-2, aligner=aligner)
    optimizer = accelerator.prepare(optimizer)
    for step in range(2 * STEPS):
        with accelerator.accumulate(model):
            losses = model(images(rank, 2, step))
            aligner.backward(*losses, backward=accelerator.backward)
            optimizer.step()
            optimizer.zero_grad()

    alone = ParallelModel()
    aligner = gf.GradientAligner(alone)
    optimizer = gf.AlignedAdamW(alone.parameters(), lr=1e-2, aligner=aligner)
    with one_process():
        for step in range(2 * STEPS):
            pairs = [alone(images(rank, 2, step)) for rank in range(2)]
            aligner.backward(*(sum(of_loss) / 4 for of_loss in zip(*pairs, strict=True)))
            if step % 2:
                optimizer.step()
    check(model.parameters(), [parameter.detach() for parameter in alone.parameters()])


def check_lightning(expected):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, reduce, joint):
            super().__init__()
            self.automatic_optimization = False
            self.model = ParallelModel()
            self.reduce, self.joint = reduce, joint

        def configure_optimizers(self):
            aligner = gf.GradientAligner(self.trainer.model, reduce=self.reduce)
            return gf.AlignedAdamW(self.parameters(), lr=1e-2, aligner=aligner)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            aligner = optimizer.aligner
            x = images(self.global_rank, 2, batch_idx)
            if self.joint:
                aligner.backward(*self.model(x), backward=self.manual_backward)
            else:
                for name in NAMES:
                    with aligner.collect(name):
                        self.manual_backward(self.model(x, name))
            optimizer.step()
            optimizer.zero_grad()

    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    for reduce, joint, strategy in (
        ("auto", True, "ddp"),
        ("sharded", False, "ddp"),
        ("hook", True, "ddp_find_unused_parameters_true"),
        ("hook", False, "ddp_find_unused_parameters_true"),
    ):
        module = Module(reduce, joint)
        trainer = lightning.Trainer(
            accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, max_steps=STEPS, **quiet
        )
        trainer.fit(module, torch.utils.data.DataLoader(range(2 * STEPS)))
        check(module.model.parameters(), expected)


@pytest.mark.slow
def test_frameworks_in_two_processes():
    pytest.importorskip("accelerate")
    pytest.importorskip("lightning")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    # Accelerate makes the group of processes for all of them.
    check_accelerate(rank)
    expected, _, _ = Problem(steps=STEPS).alone(2)
    check_fabric(rank, expected)
    check_lightning(expected)
    dist.destroy_process_group()
