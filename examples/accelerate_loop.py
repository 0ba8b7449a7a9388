"""One network that classifies and denoises scikit-learn's digits, with Accelerate.

Shows gradient accumulation, mixed precision and checkpoints. The lines marked NEW are what gradient
alignment changes. Needs accelerate, diffusers and scikit-learn, and runs in one process; for
several see docs/alignment.md.
"""

import argparse
from pathlib import Path

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
    """Class logits of clean images [N, 1, 8, 8], or clean images of noisy ones.

    Noisy images are those that come with timesteps [N] and labels [N].
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

    def forward(self, x, timesteps=None, labels=None):
        zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        time, label = (zeros, zeros + 10) if timesteps is None else (timesteps, labels)
        embedding = self.embed_time(time[:, None] / 1000) + self.embed_label(label)
        hidden = self.stem(x) + embedding[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        if timesteps is None:
            return self.classify(F.avg_pool2d(hidden, 2).flatten(1))
        return self.denoise(hidden)


def main(
    epochs: int,
    mixed_precision: str,
    output_dir: str | None,
    resume_from_checkpoint: str | None,
) -> None:
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision=mixed_precision)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    dataset = TensorDataset(images.float().reshape(-1, 1, 8, 8) / 8 - 1, labels)
    train, test = random_split(dataset, [1400, 397], torch.Generator().manual_seed(0))
    train = DataLoader(train, batch_size=50, shuffle=True)
    test = DataLoader(test, batch_size=100)
    scheduler = DDPMScheduler(prediction_type="sample")

    model = Network()
    aligner = gf.GradientAligner(model)  # NEW
    # NEW, was: torch.optim.AdamW(model.parameters(), lr=3e-3), and
    # accelerator.clip_grad_norm_(model.parameters(), 1.0) before its step
    optimizer = gf.AlignedAdamW(model.parameters(), lr=3e-3, aligner=aligner, max_norm=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * len(train) // 2)
    model, optimizer, train, test, schedule = accelerator.prepare(
        model, optimizer, train, test, schedule
    )
    first = 0
    if resume_from_checkpoint:
        accelerator.load_state(resume_from_checkpoint)
        first = int(resume_from_checkpoint.rpartition("-")[2])

    for epoch in range(first, epochs):
        for x, y in train:
            with accelerator.accumulate(model):
                t = torch.randint(1000, y.shape, device=y.device)
                x_t = scheduler.add_noise(x, torch.randn_like(x), t)
                perception = F.cross_entropy(model(x), y)
                generation = F.mse_loss(model(x_t, t, y), x)
                # NEW, was: accelerator.backward(0.7 * perception + 0.3 * generation)
                aligner.backward(perception, generation, backward=accelerator.backward)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        cosine, norm = aligner.stats.cosine.item(), aligner.stats.total_norm.item()
        (learning_rate,) = schedule.get_last_lr()
        accelerator.print(
            f"epoch {epoch + 1}: perception {perception.item():.3f}, "
            f"generation {generation.item():.3f}, cosine of the gradients {cosine:+.3f}, "
            f"norm {norm:.3f}, learning rate {learning_rate:.5f}"
        )
        if output_dir:
            accelerator.save_state(Path(output_dir) / f"epoch-{epoch + 1}")
    correct = []
    with torch.no_grad():
        for x, y in test:
            correct.append(accelerator.gather_for_metrics(model(x).argmax(1) == y))
    accelerator.print(f"test accuracy {torch.cat(correct).float().mean():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"), default="no")
    checkpoints = "where to keep a checkpoint of every epoch, epoch-1, epoch-2, …"
    parser.add_argument("--output_dir", help=checkpoints)
    parser.add_argument("--resume_from_checkpoint", help="one of them")
    main(**vars(parser.parse_args()))
