"""The same run with AlignedAdamW and with torch.optim.AdamW."""

import io

import torch
from torch import nn

import genrep_fast as gf

FLAGS = {
    "foreach",
    "capturable",
    "fused",
    "maximize",
    "differentiable",
    "amsgrad",
    "decoupled_weight_decay",
}


class Run:
    """A small model with AlignedAdamW, or `torch.optim.AdamW` on the sum of the losses."""

    def __init__(self, kind, params=None, dtype=torch.float64, model=None, **options):
        torch.manual_seed(0)
        self.model = Model().to(dtype) if model is None else model
        arguments = self.model.parameters() if params is None else params(self.model)
        if kind == "aligned":
            self.aligner = gf.GradientAligner(self.model, weights=(1.0, 1.0), power=0.0)
            self.optimizer = gf.AlignedAdamW(arguments, aligner=self.aligner, **options)
        else:
            self.optimizer = torch.optim.AdamW(arguments, **options)
            self.aligner = None

    def backward(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        dtype = self.model.trunk.weight.dtype
        inputs = torch.randn(8, 5, generator=generator, dtype=torch.float64).to(dtype)
        hidden = torch.tanh(self.model.trunk(inputs))
        losses = self.model.head(hidden).square().mean(), (hidden.sum(1) - 1).abs().mean()
        if self.aligner is None:
            sum(losses).backward()
        else:
            self.aligner.backward(*losses)
        return sum(losses)

    def step(self, seed=0):
        self.backward(seed)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parameters(self):
        return [parameter.detach().clone() for parameter in self.model.parameters()]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)


def both(*args, **kwargs):
    return Run("aligned", *args, **kwargs), Run("torch", *args, **kwargs)


def assert_same(one, other, **tolerance):
    tolerance = {"rtol": 1e-10, "atol": 1e-12, **tolerance}
    torch.testing.assert_close(one.parameters(), other.parameters(), **tolerance)
    ours, theirs = one.optimizer.state_dict(), other.optimizer.state_dict()
    assert ours["state"].keys() == theirs["state"].keys()
    torch.testing.assert_close(dict(ours["state"]), dict(theirs["state"]), **tolerance)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def two_groups(model, **second):
    return [
        {"params": list(model.trunk.parameters())},
        {"params": list(model.head.parameters()), **second},
    ]
