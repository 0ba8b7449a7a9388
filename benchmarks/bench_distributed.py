"""A training step of several processes: alignment against the same passes without it.

    python -m genrep_fast.benchmarks.bench_distributed [--parameters 1e7] [--rows 256]

Two processes (--processes) of one thread each on this machine, which talk over gloo and the
loopback: what is measured is the work of a step and its copies, and a network only as fast as
memory. The model is a multilayer perceptron of so many parameters with two heads, on so many rows a
process (a row is to it what a token is to a transformer). A step is forward, two backward passes,
their reduction and the optimizer.

Providers without alignment, with `torch.optim.AdamW(fused=True)`:

- `sum`: one forward pass, two backward passes that add up, of which the second reduces, once a
  step, which is the least that DistributedDataParallel can do;
- `sum, two forwards`: a forward and a backward pass a loss, the second of which reduces both;
- `separate, two forwards`: likewise, and each reduces its own.

With alignment, and `AlignedAdamW`: each strategy of `GradientAligner`, in joint mode ("joint") and
with two forward passes. All must first agree, after two steps, with one process on the joined
batch. Steps of all providers alternate; ratios are medians over rounds.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import genrep_fast as gf

WIDTH = 1024
LEARNING_RATE = 1e-4
BASELINES = ("sum", "sum, two forwards", "separate, two forwards")
ALIGNED = tuple(
    f"{reduce}, {mode}"
    for reduce in ("no_sync", "sharded", "hook")
    for mode in ("joint", "two forwards")
)


class Network(nn.Module):
    """A trunk of square matrices and two heads; both losses of rows, or one."""

    def __init__(self, num_parameters: float):
        super().__init__()
        torch.manual_seed(0)
        depth = max(1, round(num_parameters / WIDTH**2) - 1)
        self.trunk = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, WIDTH // 2) for _ in range(2))

    def forward(self, x: Tensor, loss: int | None = None) -> Tensor | list[Tensor]:
        hidden = x
        for layer in self.trunk:
            hidden = hidden + torch.tanh(layer(hidden))
        # The other head adds a zero, so that DistributedDataParallel need not look for what is
        # unused.
        outputs = [head(hidden) for head in self.heads]
        zero = sum(0 * head.bias.sum() + 0 * head.weight.sum() for head in self.heads)
        losses = [outputs[0].square().mean() + zero, (outputs[1] - 1).abs().mean() + zero]
        return losses if loss is None else losses[loss]


class Baseline:
    """Passes that add up, without alignment."""

    def __init__(self, name: str, model: Network):
        self._name = name
        self._wrapped = DistributedDataParallel(model)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self, x: Tensor) -> None:
        self._optimizer.zero_grad()
        if self._name == "sum":
            with self._wrapped.no_sync():
                first, second = self._wrapped(x)
            (0.7 * first).backward(retain_graph=True)
            # What the wrapper's forward pass does outside of no_sync.
            self._wrapped.reducer._rebuild_buckets()
            self._wrapped.reducer.prepare_for_backward([])
            (0.3 * second).backward()
        else:
            skips = self._name.startswith("sum")
            with self._wrapped.no_sync() if skips else contextlib.nullcontext():
                (0.7 * self._wrapped(x, 0)).backward()
            if not skips:
                separate = [parameter.grad for parameter in self._wrapped.parameters()]
                self._optimizer.zero_grad()
            (0.3 * self._wrapped(x, 1)).backward()
            if not skips:
                torch._foreach_add_([p.grad for p in self._wrapped.parameters()], separate)
        self._optimizer.step()


class Aligned:
    """Passes that are aligned."""

    def __init__(self, name: str, model: Network):
        reduce, self._mode = name.split(", ")
        self._wrapped = DistributedDataParallel(model)
        self._aligner = gf.GradientAligner(self._wrapped, reduce=reduce)
        self._optimizer = gf.AlignedAdamW(
            model.parameters(), lr=LEARNING_RATE, aligner=self._aligner
        )

    def step(self, x: Tensor) -> None:
        self._optimizer.zero_grad()
        if self._mode == "joint":
            self._aligner.backward(*self._wrapped(x))
        else:
            for loss, name in enumerate(self._aligner.names):
                with self._aligner.collect(name):
                    self._wrapped(x, loss).backward()
        self._optimizer.step()


def rows_of(rank: int, number: int) -> Tensor:
    """Rows [number, WIDTH] of a process."""
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(rank))


def check(step: Callable[[Tensor], None], model: Network, is_aligned: bool, rows: int) -> None:
    """Raise ValueError unless two steps are those of one process on the joined batch."""
    size = dist.get_world_size()
    alone = Network(sum(p.numel() for p in model.parameters()))
    alone.load_state_dict(model.state_dict())
    if is_aligned:
        aligner = gf.GradientAligner(alone)
        optimizer: torch.optim.Optimizer = gf.AlignedAdamW(
            alone.parameters(), lr=LEARNING_RATE, aligner=aligner
        )
    else:
        optimizer = torch.optim.AdamW(alone.parameters(), lr=LEARNING_RATE)
    for _ in range(2):
        step(rows_of(dist.get_rank(), rows))
        losses = [alone(rows_of(rank, rows)) for rank in range(size)]
        first, second = (sum(of_loss) / size for of_loss in zip(*losses, strict=True))
        if is_aligned:
            for name, loss in zip(aligner.names, (first, second), strict=True):
                with aligner.collect(name):
                    loss.backward(retain_graph=loss is first)
        else:
            optimizer.zero_grad()
            (0.7 * first + 0.3 * second).backward()
        optimizer.step()
    vectors = [torch.nn.utils.parameters_to_vector(m.parameters()) for m in (model, alone)]
    error = ((vectors[0] - vectors[1]).norm() / vectors[1].norm()).item()
    if not error < 1e-5:
        raise ValueError(f"the parameters differ from those of one process by {error:.1e}")


def run_process(rank: int, arguments: argparse.Namespace, store: str) -> None:
    """Measure in one of the processes; the first one prints."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=arguments.processes
    )
    steps = {}
    for name in (*BASELINES, *ALIGNED):
        model = Network(arguments.parameters)
        provider = (Baseline if name in BASELINES else Aligned)(name, model)
        check(provider.step, model, name in ALIGNED, rows=8)
        steps[name] = provider.step
    x = rows_of(rank, arguments.rows)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.rounds + 1):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            step(x)
            dist.barrier()
            # The first round warms up.
            if number:
                times[name].append(time.perf_counter() - start)
    if rank == 0:
        size = sum(parameter.numel() for parameter in model.parameters())
        print_results(times, size, arguments)
    dist.destroy_process_group()


def print_results(times: dict[str, list[float]], size: int, arguments: argparse.Namespace) -> None:
    """Print medians, and ratios to the provider without alignment that runs the same passes."""
    print(
        f"{arguments.processes} processes, {size / 1e6:.1f} M parameters, "
        f"{arguments.rows} rows a process, {arguments.rounds} rounds\n\n"
        "| step | ms | ratio to `sum` of the same passes | to `separate` |\n"
        "| --- | --- | --- | --- |"
    )
    for name, own in times.items():
        plain = "sum, two forwards" if name.endswith("two forwards") else "sum"
        ratios = [
            statistics.median(a / b for a, b in zip(own, times[other], strict=True))
            for other in (plain, "separate, two forwards")
        ]
        second = f"{ratios[1]:.3f}" if name.endswith("two forwards") else ""
        print(f"| {name} | {1e3 * statistics.median(own):.0f} | {ratios[0]:.3f} | {second} |")


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--parameters", type=float, default=1e7)
    parser.add_argument("--rows", type=int, default=256, help="a process")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            run_process,
            args=(arguments, str(Path(folder) / "store")),
            nprocs=arguments.processes,
        )


if __name__ == "__main__":
    main()
