"""One network that classifies and denoises scikit-learn's digits: Lightning, several processes.

    torchrun --nproc-per-node 2 examples/lightning_ddp.py

Without torchrun Lightning starts the processes. The lines marked NEW are what gradient alignment
changes; the aligner is made of ``self.trainer.model``, which is the module in
DistributedDataParallel, or the module itself in one process. Needs lightning, diffusers and
scikit-learn.
"""

import argparse
import os

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import genrep_fast as gf


class DigitsModule(L.LightningModule):
    """A convolutional trunk with two heads: images [N, 1, 8, 8], timesteps [N], labels [N].

    Label 10 stands for no class.
    """

    def __init__(self, width: int = 32, learning_rate: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False  # NEW
        self.scheduler = DDPMScheduler(prediction_type="sample")
        self.embed_time = nn.Linear(1, width)
        self.embed_label = nn.Embedding(11, width)
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(4)
        )
        self.to_logits = nn.Linear(width * 16, 10)
        self.to_pixels = nn.Conv2d(width, 1, 3, padding=1)

    def trunk(self, x, timesteps, labels):
        embedding = self.embed_time(timesteps[:, None] / 1000) + self.embed_label(labels)
        hidden = self.stem(x) + embedding[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden

    def classify(self, x):
        timesteps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        hidden = self.trunk(x, timesteps, timesteps + 10)
        return self.to_logits(F.avg_pool2d(hidden, 2).flatten(1))

    def configure_optimizers(self):
        # NEW, was: torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate).
        # The aligner is the optimizer's and no attribute of the module: modules are copied, by
        # WeightAveraging for one, and an aligner, which belongs to its parameters, cannot be.
        optimizer = gf.AlignedAdamW(
            self.parameters(),
            lr=self.hparams.learning_rate,
            aligner=gf.GradientAligner(self.trainer.model),
            max_norm=1.0,
        )
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)]

    def training_step(self, batch, batch_idx):
        x, y = batch
        t = torch.randint(1000, y.shape, device=self.device)
        perception = F.cross_entropy(self.classify(x), y)
        x_t = self.scheduler.add_noise(x, torch.randn_like(x), t)
        generation = F.mse_loss(self.to_pixels(self.trunk(x_t, t, y)), x)

        optimizer = self.optimizers()
        # NEW, was: return 0.7 * perception + 0.3 * generation.
        # The rest of the step was the Trainer's.
        optimizer.aligner.backward(perception, generation, backward=self.manual_backward)
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()
        cosine = optimizer.aligner.stats.cosine.mean()
        losses = {"perception": perception, "generation": generation}
        self.log_dict({**losses, "cosine": cosine}, prog_bar=True, sync_dist=True)

    def test_step(self, batch, batch_idx):
        x, y = batch
        accuracy = (self.classify(x).argmax(1) == y).float().mean()
        self.log("test_accuracy", accuracy, sync_dist=True)


def main(epochs: int) -> None:
    L.seed_everything(0)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    dataset = TensorDataset(images.float().reshape(-1, 1, 8, 8) / 8 - 1, labels)
    train, test = random_split(dataset, [1400, 397])
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 2))
    trainer = L.Trainer(
        max_epochs=epochs,
        strategy="ddp",
        devices=devices,
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=10,
    )
    module = DigitsModule()
    trainer.fit(module, DataLoader(train, batch_size=100 // devices, shuffle=True))
    if trainer.is_global_zero:
        print({name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()})
    trainer.test(module, DataLoader(test, batch_size=100))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    main(**vars(parser.parse_args()))
