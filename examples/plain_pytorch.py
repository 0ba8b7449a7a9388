"""One network that classifies and denoises scikit-learn's digits, in a plain PyTorch loop.

Needs diffusers and scikit-learn. The lines marked NEW are what gradient alignment changes. The
perception loss shows posterior scoring besides: the classifier learns from labels and from the
denoiser, whose error under each class is a Monte Carlo estimate of log p(x|y).
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from sklearn.datasets import load_digits
from torch import nn

import genrep_fast as gf


class Network(nn.Module):
    """A trunk with two heads over images [N, 64], their timesteps [N] and labels [N].

    Label 10 stands for no class.
    """

    def __init__(self, width: int = 256):
        super().__init__()
        self.pixels = nn.Linear(64, width)
        self.time = nn.Linear(1, width)
        self.label = nn.Embedding(11, width)
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

    def trunk(self, x, timesteps, labels):
        hidden = self.pixels(x) + self.time(timesteps[:, None] / 1000) + self.label(labels)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return hidden

    def classify(self, x):
        timesteps = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return self.to_logits(self.trunk(x, timesteps, timesteps + 10))

    def denoise(self, x_t, timesteps, labels):
        return self.to_pixels(self.trunk(x_t, timesteps, labels))


@torch.no_grad()
def log_likelihood(network, scheduler, x, timesteps):
    """log p(x|y) [N, 10] of images [N, 64], from the error of denoising them under every class."""
    scorer = gf.PosteriorScorer(num_classes=10, reduction="mean")
    labels = torch.arange(10, device=x.device).repeat(len(x))
    for timestep in timesteps:
        x_t = scheduler.add_noise(x, torch.randn_like(x), timestep.expand(len(x)))
        # The same noise for all classes.
        x_t = x_t.repeat_interleave(10, 0)
        output = network.denoise(x_t, timestep.expand(len(x_t)), labels)
        output = output.unflatten(0, (len(x), 10, 1))  # [N, K, 1 step, 64]
        scorer.update(x, output, gf.StepCoefficients.elbo(scheduler, timestep[None]))
    return scorer.log_likelihood()


def main(epochs: int) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(images, device=device).float() / 8 - 1
    labels = torch.as_tensor(labels, device=device)
    train, calibration, test = torch.randperm(len(images), device=device).split([1200, 200, 397])
    scheduler = DDPMScheduler(prediction_type="sample")
    timesteps = torch.arange(100, 900, 200, device=device)

    network = Network().to(device)
    # The teacher becomes a moving average of the network.
    teacher = copy.deepcopy(network)
    aligner = gf.GradientAligner(network)  # NEW
    # NEW, was: torch.optim.AdamW(network.parameters(), lr=2e-3)
    optimizer = gf.AlignedAdamW(
        network.parameters(), lr=2e-3, aligner=aligner, ema=teacher, ema_decay=0.99
    )

    # A teacher that has learned nothing calls all classes equally likely.
    temperature = 1e6
    for epoch in range(epochs):
        for batch in train[torch.randperm(len(train), device=device)].split(100):
            x, y = images[batch], labels[batch]
            t = torch.randint(1000, batch.shape, device=device)
            logits = network.classify(x)
            scores = log_likelihood(teacher, scheduler, x, timesteps)
            distillation = gf.distillation_loss(logits, scores, temperature=temperature)
            perception = F.cross_entropy(logits, y) + 0.3 * distillation
            x_t = scheduler.add_noise(x, torch.randn_like(x), t)
            generation = F.mse_loss(network.denoise(x_t, t, y), x)

            # NEW, was: (0.7 * perception + 0.3 * generation).backward()
            aligner.backward(perception, generation)
            optimizer.step()
            optimizer.zero_grad()
        scores = log_likelihood(teacher, scheduler, images[calibration], timesteps)
        temperature = gf.fit_temperature(scores, labels[calibration])
        accuracy = (scores.argmax(1) == labels[calibration]).float().mean()
        cosine = aligner.stats.cosine.item()
        print(
            f"epoch {epoch + 1}: perception {perception.item():.3f}, "
            f"generation {generation.item():.3f}, cosine of the gradients {cosine:+.3f}, "
            f"teacher's accuracy {accuracy:.3f}"
        )
    with torch.no_grad():
        predicted = network.classify(images[test]).argmax(1)
    print(f"test accuracy {(predicted == labels[test]).float().mean():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    main(**vars(parser.parse_args()))
