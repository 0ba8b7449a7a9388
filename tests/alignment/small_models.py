"""Small models of two losses, and what their gradients are to be."""

import torch
import torch._dynamo.testing
from torch import nn

import genrep_fast as gf

NAMES = ("perception", "generation")
WEIGHTS = (0.7, 0.3)


class Model(nn.Module):
    """Two shared blocks, a head for each loss, a parameter that no loss reaches, an empty one, and
    a frozen one.
    """

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(7, 7), nn.Linear(7, 7)])
        self.perception = nn.Linear(7, 3)
        self.generation = nn.Linear(7, 5)
        self.unused = nn.Parameter(torch.ones(3))
        self.extra = nn.ParameterList([torch.empty(0)])
        self.frozen = nn.Parameter(torch.ones(7), requires_grad=False)
        self.to(dtype)

    def trunk(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x)) * self.frozen
        return x + self.extra[0].sum()

    def forward(self, x):
        features = self.trunk(x)
        return self.perception(features).square().mean(), (
            self.generation(features) - 1
        ).abs().mean()


def batch(seed=1, dtype=torch.float64):
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def by_block(name):
    return name.split(".")[1] if name.startswith("blocks.") else None


LAYERS = ("blocks.0", "blocks.1", "perception", "generation")
GROUPINGS = {  # keys, and a row for each of: two parameters of every layer, unused, empty
    "all": (["all"], [0] * 10),
    "tensor": (
        [
            "unused",
            *(f"{layer}.{name}" for layer in LAYERS for name in ("weight", "bias")),
            "extra.0",
        ],
        [*range(1, 9), 0, 9],
    ),
    "block": (["unused", *LAYERS, "extra.0"], [1, 1, 2, 2, 3, 3, 4, 4, 0, 5]),
    by_block: (["0", "1"], [0, 0, 1, 1, None, None, None, None, None, None]),
}


def trained(model):
    """Parameters in the order of the rows of GROUPINGS."""
    modules = (*model.blocks, model.perception, model.generation)
    return [parameter for module in modules for parameter in module.parameters()] + [
        model.unused,
        model.extra[0],
    ]


def gradients_of(model, seeds=(1,), forward=None):
    """Lists of the two losses' gradients, added up over batches."""
    sums = [[None] * 10, [None] * 10]
    for seed in seeds:
        for loss, total in zip(
            (forward or model)(batch(seed, model.unused.dtype)), sums, strict=True
        ):
            for t, gradient in enumerate(
                torch.autograd.grad(loss, trained(model), allow_unused=True, retain_graph=True)
            ):
                if gradient is not None:
                    total[t] = gradient if total[t] is None else total[t] + gradient
    return sums


def aligned(model, groups="all", seeds=(1,), **options):
    return gf.align_gradients(*gradients_of(model, seeds), groups=GROUPINGS[groups][1], **options)


def assert_gradients(model, expected, **tolerance):
    for parameter, gradient in zip(trained(model), expected, strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(
                parameter.grad, gradient, **tolerance or {"rtol": 1e-12, "atol": 1e-14}
            )
    assert model.frozen.grad is None


def assert_stats(stats, expected):
    for name in ("cosine", "alpha", "norms", "coefficients"):
        torch.testing.assert_close(
            getattr(stats, name), getattr(expected, name), rtol=1e-12, atol=1e-14
        )


def collect_all(aligner, model, seeds=(1,)):
    """One loss after the other, each with a forward pass of its own."""
    for seed in seeds:
        for position, name in enumerate(aligner.names):
            with aligner.collect(name):
                model(batch(seed, model.unused.dtype))[position].backward()
