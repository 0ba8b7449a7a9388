"""One network that classifies and denoises scikit-learn's digits, in several processes.

    torchrun --nproc-per-node 2 examples/ddp.py

The lines marked NEW are what gradient alignment changes in a script for DistributedDataParallel.
One forward pass of the wrapper gives both losses. Needs diffusers and scikit-learn.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DDPMScheduler
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split

import genrep_fast as gf


class Network(nn.Module):
    """Class logits of clean images [N, 1, 8, 8], and clean images of noisy ones.

    Noisy images come with timesteps [N] and labels [N].
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.embed_time = nn.Linear(1, width)
        # Label 10 stands for no class.
        self.embed_label = nn.Embedding(11, width)
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(4)
        )
        self.classify = nn.Linear(width * 16, 10)
        self.denoise = nn.Conv2d(width, 1, 3, padding=1)

    def trunk(self, x, timesteps, labels):
        embedding = self.embed_time(timesteps[:, None] / 1000) + self.embed_label(labels)
        hidden = self.stem(x) + embedding[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden

    def forward(self, clean, noisy=None, timesteps=None, labels=None):
        zeros = torch.zeros(len(clean), dtype=torch.int64, device=clean.device)
        hidden = self.trunk(clean, zeros, zeros + 10)
        logits = self.classify(F.avg_pool2d(hidden, 2).flatten(1))
        if noisy is None:
            return logits
        return logits, self.denoise(self.trunk(noisy, timesteps, labels))


def main(epochs: int, reduce: str) -> None:
    has_gpu = torch.cuda.is_available()
    # torchrun sets the environment from which this reads rank and world size.
    dist.init_process_group("nccl" if has_gpu else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if has_gpu else "cpu"
    torch.manual_seed(rank)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    dataset = TensorDataset(images.float().reshape(-1, 1, 8, 8) / 8 - 1, labels)
    train, test = random_split(dataset, [1400, 397], torch.Generator().manual_seed(0))
    sampler = DistributedSampler(train)
    # Batches of 100 in all.
    loader = DataLoader(train, batch_size=100 // dist.get_world_size(), sampler=sampler)
    scheduler = DDPMScheduler(prediction_type="sample")

    # DistributedDataParallel sends the first process's parameters to all.
    model = DistributedDataParallel(Network().to(device))
    # NEW: made of the wrapper, it averages the gradients of both losses itself.
    aligner = gf.GradientAligner(model, reduce=reduce)
    # NEW, was: torch.optim.AdamW(model.parameters(), lr=3e-3), and
    # torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) before its step
    optimizer = gf.AlignedAdamW(model.parameters(), lr=3e-3, aligner=aligner, max_norm=1.0)

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            x, y = (tensor.to(device) for tensor in batch)
            t = torch.randint(1000, y.shape, device=device)
            x_t = scheduler.add_noise(x, torch.randn_like(x), t)
            logits, denoised = model(x, x_t, t, y)
            perception = F.cross_entropy(logits, y)
            generation = F.mse_loss(denoised, x)
            # NEW, was: (0.7 * perception + 0.3 * generation).backward()
            aligner.backward(perception, generation)
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0:
            cosine = aligner.stats.cosine.item()
            print(
                f"epoch {epoch + 1}: perception {perception.item():.3f}, "
                f"generation {generation.item():.3f}, cosine of the gradients {cosine:+.3f}"
            )
    if rank == 0:
        x, y = (torch.stack(column).to(device) for column in zip(*test, strict=True))
        with torch.no_grad():
            accuracy = (model.module(x).argmax(1) == y).float().mean()
        print(f"test accuracy {accuracy:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--reduce", choices=("auto", "no_sync", "sharded"), default="auto")
    main(**vars(parser.parse_args()))
