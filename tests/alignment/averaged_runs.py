"""Training runs that keep averages, and a network to train."""

import torch
from torch import nn

import genrep_fast as gf


class Network(nn.Module):
    """A layer, a norm, a head, and a parameter that no loss reaches."""

    def __init__(self, norm=True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)
        self.unused = nn.Parameter(torch.ones(3))
        self.to(dtype)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.first(x))))


class Run:
    """A network with an AlignedAdamW; `average` makes what follows from the network."""

    def __init__(self, average, network=None, **options):
        self.network = Network() if network is None else network
        self.aligner = gf.GradientAligner(self.network)
        self.ema = average(self.network)
        self.optimizer = gf.AlignedAdamW(
            [parameter for parameter in self.network.parameters()],
            lr=0.05,
            aligner=self.aligner,
            ema=self.ema,
            **options,
        )

    def backward(self, seed, scale=1.0):
        parameter = next(self.network.parameters())
        inputs = 3 * torch.randn(16, 6, generator=torch.Generator().manual_seed(seed)) + 5
        output = self.network(inputs.to(parameter.dtype))
        self.aligner.backward(output.square().mean() * scale, (output - 1).abs().mean() * scale)

    def step(self, seed):
        self.backward(seed)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def skipped_step(self, seed):
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        self.backward(seed, float("inf"))
        scaler.scale(torch.ones(()))
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad()


def copies(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_close(one, other, rtol=2e-6, atol=2e-7):
    torch.testing.assert_close(one, other, rtol=rtol, atol=atol)


class Expected:
    """An average of every parameter and buffer by hand."""

    def __init__(self, network, decay):
        self.decay = decay
        self.values = {name: value.double() for name, value in state_of(network).items()}

    def step(self, network):
        parameters = dict(network.named_parameters())
        for name, value in network.state_dict().items():
            kept = self.decay if name in parameters else 0.0
            self.values[name] = kept * self.values[name] + (1 - kept) * value.double()


def compiled(model):
    return torch.compile(model, backend="eager")
