"""One network that classifies and denoises scikit-learn's digits: Accelerate, several processes.

    torchrun --nproc-per-node 2 examples/accelerate_ddp.py    (or accelerate launch)

Shows accumulation and mixed precision. The lines marked NEW are what gradient alignment changes;
the aligner is made of what ``accelerator.prepare`` returns. In one process it is the same script.
Needs accelerate, diffusers and scikit-learn.
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDPMScheduler
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

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


def main(epochs: int, mixed_precision: str) -> None:
    accelerator = Accelerator(
        gradient_accumulation_steps=2,
        mixed_precision=mixed_precision,
        cpu=not torch.cuda.is_available(),
    )
    set_seed(0, device_specific=True)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    dataset = TensorDataset(images.float().reshape(-1, 1, 8, 8) / 8 - 1, labels)
    train, test = random_split(dataset, [1400, 397], torch.Generator().manual_seed(0))
    # Batches of 100 in all, of two micro-batches.
    train = DataLoader(train, batch_size=50 // accelerator.num_processes, shuffle=True)
    test = DataLoader(test, batch_size=100)
    scheduler = DDPMScheduler(prediction_type="sample")

    # Before the aligner, which must know DistributedDataParallel.
    model, train, test = accelerator.prepare(Network(), train, test)
    aligner = gf.GradientAligner(model)  # NEW
    # NEW, was: torch.optim.AdamW(model.parameters(), lr=3e-3), and
    # accelerator.clip_grad_norm_(model.parameters(), 1.0) before its step
    optimizer = gf.AlignedAdamW(model.parameters(), lr=3e-3, aligner=aligner, max_norm=1.0)
    optimizer = accelerator.prepare(optimizer)

    for epoch in range(epochs):
        for x, y in train:
            with accelerator.accumulate(model):
                t = torch.randint(1000, y.shape, device=y.device)
                x_t = scheduler.add_noise(x, torch.randn_like(x), t)
                logits, denoised = model(x, x_t, t, y)
                perception = F.cross_entropy(logits, y)
                generation = F.mse_loss(denoised, x)
                # NEW, was: accelerator.backward(0.7 * perception + 0.3 * generation)
                aligner.backward(perception, generation, backward=accelerator.backward)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.print(
            f"epoch {epoch + 1}: perception {perception.item():.3f}, "
            f"generation {generation.item():.3f}, "
            f"cosine of the gradients {aligner.stats.cosine.item():+.3f}"
        )
    correct = []
    with torch.no_grad():
        for x, y in test:
            correct.append(accelerator.gather_for_metrics(model(x).argmax(1) == y))
    accelerator.print(f"test accuracy {torch.cat(correct).float().mean():.3f}")
    accelerator.end_training()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    main(**vars(parser.parse_args()))
