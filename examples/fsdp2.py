"""One network of two losses on FSDP2 or HSDP, whose checkpoint any number of processes resumes.

    torchrun --nproc_per_node 2 examples/fsdp2.py --epochs 2 --output_dir run
    torchrun --nproc_per_node 4 examples/fsdp2.py --epochs 4 --output_dir run --replicas 2

The second line goes on where the first one stopped, on two replicas of two shards each. The network
classifies and denoises scikit-learn's digits (needs scikit-learn), on GPUs with NCCL where there
are some and else on the CPU with gloo. The lines marked NEW are what gradient alignment changes.
"""

import argparse
import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import genrep_fast as gf


class Network(nn.Module):
    """A trunk with two heads: logits [N, 10] and clean images [N, 64] of noisy images [N, 64]."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.pixels = nn.Linear(64, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, width),
            )
            for _ in range(3)
        )
        self.to_logits = nn.Linear(width, 10)
        self.to_pixels = nn.Linear(width, 64)

    def forward(self, x):
        hidden = self.pixels(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.to_logits(hidden), self.to_pixels(hidden)


def shard(network: Network, mesh: DeviceMesh) -> None:
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def train(epochs: int, output_dir: Path, mesh: DeviceMesh) -> None:
    rank, world, device = dist.get_rank(), dist.get_world_size(), mesh.device_type
    # The same weights in all processes.
    torch.manual_seed(0)
    network = Network()
    # The teacher becomes a moving average of the network. FSDP2's modules cannot be copied.
    teacher = copy.deepcopy(network)
    shard(network, mesh)
    shard(teacher, mesh)
    # NEW: of sharded parameters, so made behind fully_shard.
    aligner = gf.GradientAligner(network)
    # NEW, was: torch.optim.AdamW(network.parameters(), lr=2e-3)
    optimizer = gf.AlignedAdamW(
        network.parameters(), lr=2e-3, aligner=aligner, max_norm=1.0, ema=teacher, ema_decay=0.99
    )

    def checkpoint() -> dict:
        return {
            "network": get_model_state_dict(network),
            "teacher": get_model_state_dict(teacher),
            "optimizer": get_optimizer_state_dict(network, optimizer),
        }

    # The metadata of a checkpoint is written last.
    saved = [int(path.parent.name) for path in output_dir.glob("*/.metadata")]
    first_epoch = max(saved, default=0)
    if saved:
        state = checkpoint()
        dcp.load(state, checkpoint_id=output_dir / str(first_epoch))
        set_model_state_dict(network, state["network"])
        set_model_state_dict(teacher, state["teacher"])
        set_optimizer_state_dict(network, optimizer, state["optimizer"])

    images, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(images, device=device).float() / 8 - 1
    labels = torch.as_tensor(labels, device=device)
    for epoch in range(first_epoch, epochs):
        generator = torch.Generator().manual_seed(epoch)
        noise = torch.randn(images.shape, generator=generator).to(device)
        # Batches of 96, of which every process has a part.
        for joined in torch.randperm(1200, generator=generator).to(device).split(96):
            batch = joined.chunk(world)[rank]
            logits, denoised = network(images[batch] + noise[batch])
            perception = F.cross_entropy(logits, labels[batch])
            generation = F.mse_loss(denoised, images[batch])

            # NEW, was: (0.7 * perception + 0.3 * generation).backward()
            aligner.backward(perception, generation)
            optimizer.step()
            optimizer.zero_grad()
        dcp.save(checkpoint(), checkpoint_id=output_dir / str(epoch + 1))
        with torch.no_grad():
            # By all processes, which gather the parameters.
            predicted = teacher(images[1200:])[0].argmax(1)
        accuracy = (predicted == labels[1200:]).float().mean()
        if rank == 0:
            print(
                f"epoch {epoch + 1}: perception {perception.item():.3f}, "
                f"generation {generation.item():.3f}, "
                f"cosine of the gradients {aligner.stats.cosine.item():+.3f}, "
                f"teacher's accuracy {accuracy:.3f}"
            )


def main(epochs: int, output_dir: Path, replicas: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    shards = dist.get_world_size() // replicas
    mesh = init_device_mesh(device, (replicas, shards), mesh_dim_names=("replicas", "shards"))
    train(epochs, output_dir, mesh if replicas > 1 else mesh["shards"])
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output_dir", type=Path, default=Path("fsdp2"))
    parser.add_argument("--replicas", type=int, default=1)
    main(**vars(parser.parse_args()))
