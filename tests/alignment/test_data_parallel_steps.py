"""What happens in single steps of several processes: scaled and half-precision gradients, groups of
processes, what is sent, what is refused, and processes that end.
"""

import copy
import dataclasses
import datetime
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist
from parallel_models import ParallelModel, Problem, SameReach, distance, images, one_process, result
from small_models import NAMES
from test_data_parallel import check_same_everywhere
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import genrep_fast as gf
from genrep_fast.alignment.data_parallel import sharded

STRATEGIES = (
    ("no_sync", {}),
    ("sharded", {}),
    ("hook", {"find_unused_parameters": True}),
)


def expect(error, message, call, *arguments, **options):
    """That a call raises `error`, whose text matches `message`."""
    with pytest.raises(error, match=message):
        call(*arguments, **options)


def check_scaler(rank):
    """A value that is not finite in one process: none takes the step, and all scales halve."""
    for reduce, options in STRATEGIES:
        scales = []
        for alone in (True, False):
            model = ParallelModel(torch.float32)
            wrapped = DistributedDataParallel(model, **options)
            source, strategy = (model, "auto") if alone else (wrapped, reduce)
            aligner = gf.GradientAligner(source, reduce=strategy)
            optimizer = gf.AlignedAdamW(
                model.parameters(), lr=1e-2, aligner=aligner, max_norm=0.05, ema=ParallelModel()
            )
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
            for step in range(8):
                factors = [torch.inf if step in (0, 4) and one == 1 else 1.0 for one in range(2)]
                before = [parameter.clone() for parameter in model.parameters()]
                if alone:
                    with one_process():
                        pairs = [model(images(one, 2, step, torch.float32)) for one in range(2)]
                        for name, pair in zip(NAMES, zip(*pairs, strict=True), strict=True):
                            loss = sum(a * b for a, b in zip(factors, pair, strict=True)) / 2
                            with aligner.collect(name):
                                scaler.scale(loss).backward(retain_graph=name == NAMES[0])
                        scaler.step(optimizer)
                else:
                    losses = wrapped(images(rank, 2, step, torch.float32))
                    scaled = (scaler.scale(factors[rank] * loss) for loss in losses)
                    aligner.backward(*scaled)
                    scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                scales.append(scaler.get_scale())
                stays = all(map(torch.equal, before, model.parameters()))
                assert stays == (step in (0, 4))
            parameters = [parameter.detach() for parameter in model.parameters()]
            if alone:
                expected = parameters
        assert scales[:8] == scales[8:] and len(set(scales)) > 1
        assert distance(parameters, expected) < 1e-6


def check_late_scaler(rank):
    """Behind steps without a scaler, scales that fell apart are noticed."""
    model = ParallelModel()
    wrapped = DistributedDataParallel(model)
    aligner = gf.GradientAligner(wrapped)
    optimizer = gf.AlignedAdamW(model.parameters(), aligner=aligner)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(factor, scale):
        losses = [scale(factor * loss) for loss in wrapped(images(rank, 2, 0))]
        aligner.backward(*losses)

    step(1.0, lambda loss: loss)
    optimizer.step()
    optimizer.zero_grad()
    before = [parameter.clone() for parameter in model.parameters()]
    step(torch.inf if rank else 1.0, scaler.scale)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert all(map(torch.equal, before, model.parameters()))
    step(1.0, scaler.scale)
    expect(RuntimeError, "disagree on the scale", scaler.step, optimizer)


def check_several_wrappers(rank):
    """Two models, each in a wrapper of its own, with one aligner."""

    def models():
        torch.manual_seed(0)
        return nn.Linear(7, 5).double(), nn.Linear(5, 3).double()

    def run(first, second, aligner, forward):
        optimizer = gf.AlignedAdamW([*first.parameters(), *second.parameters()], aligner=aligner)
        for step in range(3):
            losses = []
            for one in forward(step):
                features = torch.tanh(first(one))
                losses.append((second(features).square().mean(), features.mean()))
            aligner.backward(*(sum(of_loss) / len(losses) for of_loss in zip(*losses, strict=True)))
            optimizer.step()
        return [parameter.detach() for parameter in (*first.parameters(), *second.parameters())]

    def params(first, second):
        return [*first.named_parameters("first"), *second.named_parameters("second")]

    with one_process():
        first, second = models()
        aligner = gf.GradientAligner(params(first, second))
        expected = run(
            first, second, aligner, lambda step: [images(one, 2, step) for one in range(2)]
        )
    wrappers = [DistributedDataParallel(model) for model in models()]
    aligner = gf.GradientAligner(params(*wrappers), process_group=dist.group.WORLD)
    found = run(*wrappers, aligner, lambda step: [images(rank, 2, step)])
    assert distance(found, expected) < 1e-12


class Weights(nn.Module):
    """Two losses whose gradients are large for float16."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.full((5,), 0.01, dtype=dtype))

    def forward(self, x):
        return [(self.weight * 40000 * row).sum() for row in x]


def check_half_precision(rank):
    """Gradients of bfloat16 and float16, which are large enough to overflow if they were added."""
    for dtype in (torch.bfloat16, torch.float16):
        for reduce, options in STRATEGIES:
            model = Weights(dtype)
            wrapped = DistributedDataParallel(model, **options)
            x = torch.ones(2, 5, dtype=dtype)
            # The processes' gradients cancel in one place.
            x[1, 0] = 2 * rank - 1
            stats = gf.GradientAligner(wrapped, reduce=reduce).backward(*wrapped(x))
            first, second = torch.full((5,), 40000.0), torch.full((5,), 40000.0)
            second[0] = 0
            expected, alone = gf.align_gradients([first], [second])
            torch.testing.assert_close(model.weight.grad.float(), expected[0], rtol=1e-2, atol=1)
            torch.testing.assert_close(stats.norms, alone.norms, rtol=1e-2, atol=0)


def check_converted_model(rank):
    """A model that is converted between two steps is averaged in its new dtype."""
    for reduce in ("no_sync", "sharded"):
        model = SameReach()
        wrapped = DistributedDataParallel(model)
        aligner = gf.GradientAligner(wrapped, reduce=reduce)
        aligner.backward(*wrapped(images(rank, 2, 0)))
        before = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        model.zero_grad()
        model.float()
        aligner.backward(*wrapped(images(rank, 2, 0, torch.float32)))
        after = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        assert all(gradient.dtype == torch.float32 for gradient in after)
        assert distance([gradient.double() for gradient in after], before) < 1e-6


def check_groups(rank):
    """A model without a wrapper, whose gradients are averaged over a group of processes."""
    group = dist.new_group([0, 1])
    expected, _, stats = Problem(steps=3).alone(2)
    for reduce in ("auto", "sharded"):
        model = ParallelModel()
        aligner = gf.GradientAligner(model, process_group=group, reduce=reduce)
        optimizer = gf.AlignedAdamW(model.parameters(), lr=1e-2, aligner=aligner)
        for step in range(3):
            aligner.backward(*model(images(rank, 2, step)))
            optimizer.step()
        found = result(model, None, aligner)
        assert distance(found[0], expected) < 1e-12
        torch.testing.assert_close(found[2].norms, stats.norms, rtol=1e-12, atol=1e-14)


class Counted:
    """Counts the bytes that collectives of torch.distributed send from each process."""

    # Of the whole tensor: what each process sends of it, in halves of an all-reduce.
    CALLS = (
        (dist, "all_reduce", 2),
        (dist, "all_to_all_single", 1),
        (sharded, "_reduce_scatter", 1),
        (sharded, "_all_gather", 1),
    )

    def __init__(self, monkeypatch):
        self.all_reduces = 0.0  # in bytes
        for module, name, halves in self.CALLS:
            monkeypatch.setattr(module, name, self._counting(getattr(module, name), halves))

    def _counting(self, call, halves):
        def counting(*arguments, **options):
            tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
            self.all_reduces += halves / 2 * max(tensor.nbytes for tensor in tensors)
            return call(*arguments, **options)

        return counting


def check_bytes(rank):
    """Shards send three quarters of two all-reduces, and three doubles a tensor; the processes'
    agreement is two bytes a tensor.
    """
    for reduce, options in STRATEGIES:
        model = SameReach(torch.float32)
        wrapped = DistributedDataParallel(model, **options)
        aligner = gf.GradientAligner(wrapped, reduce=reduce)
        optimizer = gf.AlignedAdamW(model.parameters(), aligner=aligner)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with pytest.MonkeyPatch.context() as monkeypatch:
            counted = Counted(monkeypatch)
            for step in range(4):
                counted.all_reduces = 0
                aligner.backward(*wrapped(images(rank, 2, step, torch.float32)))
                optimizer.step()
        one_all_reduce = sum(parameter.numel() * 4 for parameter in parameters)
        agreement = 1 + 8 * 5 + 2 * len(aligner.parameters)
        gram = 3 * 8 * len(parameters)
        if reduce == "sharded":
            # A float32 of padding, which the number of processes makes of an odd length.
            assert counted.all_reduces <= 1.5 * (one_all_reduce + 4) + gram + agreement
        else:
            assert counted.all_reduces <= 2.0 * one_all_reduce + (
                agreement if reduce == "no_sync" else 0
            )
        assert counted.all_reduces >= 1.5 * one_all_reduce


@dataclasses.dataclass
class Losses:
    perception: torch.Tensor
    generation: torch.Tensor


class ReturnsDataclass(SameReach):
    def forward(self, x, name=None):
        return Losses(*super().forward(x))


def check_other_losses(rank):
    """A loss beside the aligner's is refused where it would not be averaged."""
    model = SameReach()
    wrapped = DistributedDataParallel(model)
    x = images(rank, 2, 0)
    wrapped(x)[0].backward()
    expected = [
        parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad
    ]
    model.zero_grad()

    def is_averaged():
        model.zero_grad()
        wrapped(x)[0].backward()
        found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        return distance(found, expected) < 1e-12

    aligner = gf.GradientAligner(wrapped)
    expect(RuntimeError, r'ran outside of the aligner.*reduce="hook"', wrapped(x)[0].backward)
    of_dataclass = DistributedDataParallel(ReturnsDataclass())
    aligner_of_dataclass = gf.GradientAligner(of_dataclass)
    losses = of_dataclass(x)
    expect(RuntimeError, "ran outside of the aligner", losses.perception.backward)
    aligner_of_dataclass.zero_grad()
    with torch.no_grad():
        wrapped(x)
    inputs = x.clone().requires_grad_()
    (of_inputs,) = torch.autograd.grad(wrapped(inputs)[0], inputs)
    assert of_inputs.any()
    assert wrapped.require_backward_grad_sync
    # A copy is nobody's.
    copied = copy.deepcopy(wrapped)
    copied(x)[0].backward()
    del aligner
    assert is_averaged()
    aligner = gf.GradientAligner(wrapped, reduce="hook")
    assert is_averaged()
    model.zero_grad()
    aligner.backward(*wrapped(x))
    del aligner
    assert is_averaged()


def check_static_graph_afterwards(rank):
    """Without an aligner a static graph is averaged, or refused where its first pass is missing."""
    x = images(rank, 2, 0)
    for plain_passes in (2, 0):
        wrapped = DistributedDataParallel(model := SameReach(), static_graph=True)
        for _ in range(plain_passes):
            wrapped(x)[0].backward()
            model.zero_grad()
        aligner = gf.GradientAligner(wrapped)
        aligner.backward(*wrapped(x))
        del aligner
        model.zero_grad()
        with torch.no_grad():
            wrapped(x)
        if not plain_passes:
            expect(RuntimeError, "make a new DistributedDataParallel", wrapped, x)
            continue
        for _ in range(2):
            wrapped(x)[0].backward()
            found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
            check_same_everywhere(found)
            model.zero_grad()


def check_clipping_in_a_block(rank):
    """What a block does to the averaged gradients counts, under the hook that knew them before."""
    for as_view in (False, True):
        model = SameReach()
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=as_view)
        aligner = gf.GradientAligner(wrapped, reduce="hook")
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for step in range(2):
            model.zero_grad()
            clipped = []
            for name in NAMES:
                with aligner.collect(name):
                    wrapped(images(rank, 2, step), name).backward()
                    torch.nn.utils.clip_grad_norm_(parameters, 1e-3)
                    clipped.append([parameter.grad.clone() for parameter in parameters])
            stats = aligner.align()
            expected, alone = gf.align_gradients(*clipped)
            torch.testing.assert_close(stats.norms[0], alone.norms[0])
            assert distance([parameter.grad for parameter in parameters], expected) < 1e-12


class Strided(nn.Module):
    """A convolution of channels_last and a transposed matrix, which both losses reach."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 4, 3)
        self.matrix = nn.Parameter(torch.randn(4, 5).t())
        self.double().to(memory_format=torch.channels_last)

    def forward(self, x):
        hidden = torch.tanh(self.convolution(x)).mean((2, 3)) @ self.matrix.t()
        return hidden.square().mean(), (hidden - 1).abs().mean()


def check_strides(rank):
    """Gradients of parameters that are not contiguous, such as channels_last."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 5, 5, generator=generator, dtype=torch.float64)
    alone = Strided()
    aligner = gf.GradientAligner(alone, groups="tensor")
    with one_process():
        stats = aligner.backward(
            *(sum(pair) / 2 for pair in zip(*map(alone, x.unbind()), strict=True))
        )
    for reduce, options in STRATEGIES:
        wrapped = DistributedDataParallel(model := Strided(), **options)
        aligner = gf.GradientAligner(wrapped, groups="tensor", reduce=reduce)
        found = aligner.backward(*wrapped(x[rank]))
        torch.testing.assert_close(found.cosine, stats.cosine)
        gradients = [[one.grad for one in each.parameters()] for each in (model, alone)]
        assert distance(*gradients) < 1e-12


def check_hook_is_used(rank):
    """Gram matrices of the hook are those that the step uses."""
    model = SameReach()
    wrapped = DistributedDataParallel(model)
    aligner = gf.GradientAligner(wrapped, reduce="hook")
    optimizer = gf.AlignedAdamW(model.parameters(), aligner=aligner, max_norm=1.0)
    grams = aligner._coefficients.tensor_grams
    computed = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(grams, "compute", lambda tensors, of: computed.extend(tensors))
        for step in range(3):
            aligner.backward(*wrapped(images(rank, 2, step)))
            optimizer.step()
    assert computed == []


def check_refusals(rank):
    make, model, x = gf.GradientAligner, ParallelModel(), images(rank, 2, 0)
    expect(ValueError, "reduce must be one of auto, hook", make, model, reduce="ring")
    expect(ValueError, "or a process_group", make, model, reduce="sharded")
    expect(TypeError, "process_group must be", make, model, process_group=2)
    needs = "needs params to be a DistributedDataParallel"
    expect(ValueError, needs, make, model, reduce="hook", process_group=dist.group.WORLD)
    wrapped = DistributedDataParallel(model)
    other_group = dist.new_group([0, 1])
    expect(ValueError, "must be that of", make, wrapped, process_group=other_group)

    aligner = gf.GradientAligner(wrapped, reduce="hook")
    expect(RuntimeError, "perception does not reach every parameter", aligner.backward, *wrapped(x))

    wrapped = DistributedDataParallel(SameReach())
    aligner = gf.GradientAligner(wrapped, reduce="hook")
    with wrapped.no_sync():
        for name in NAMES:
            with aligner.collect(name):
                wrapped(x, name).backward()
    expect(RuntimeError, "pass of perception, generation was not averaged", aligner.align)
    aligner.zero_grad()

    wrapped = DistributedDataParallel(ParallelModel(), find_unused_parameters=True)
    aligner = gf.GradientAligner(wrapped, reduce="hook")
    with wrapped.no_sync():
        expect(RuntimeError, "no_sync cannot be used with", aligner.backward, *wrapped(x))

    for reduce in ("no_sync", "hook"):
        wrapped = DistributedDataParallel(SameReach())
        wrapped.register_comm_hook(None, fp16_compress_hook)
        expect(
            ValueError, "without a communication hook", gf.GradientAligner, wrapped, reduce=reduce
        )
        wrapped = DistributedDataParallel(SameReach())
        aligner = gf.GradientAligner(wrapped, reduce=reduce)
        with Join([wrapped]):
            expect(RuntimeError, "Join shadows one reduction", run_step, aligner, wrapped, x)
    wrapped = DistributedDataParallel(SameReach(), static_graph=True)
    expect(ValueError, "without static_graph", gf.GradientAligner, wrapped, reduce="hook")


def run_step(aligner, wrapped, x):
    aligner.backward(*wrapped(x))


def check_disagreement(rank):
    """Processes that do not do the same all say so."""
    x = images(rank, 2, 0)
    for options, message in (
        ({"rule": "pcgrad" if rank else "genrep", "weights": (1.0, 1.0)}, "disagree on names"),
        ({"weights": (1.0, rank)}, "disagree on weights"),
        ({"power": 1.0 + rank}, "disagree on names of losses, rule, power"),
    ):
        wrapped = DistributedDataParallel(ParallelModel())
        aligner = gf.GradientAligner(wrapped, **options)
        expect(RuntimeError, message, aligner.backward, *wrapped(x))
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    aligner = gf.GradientAligner(
        list(model[0].parameters()) if rank else model, process_group=dist.group.WORLD
    )
    losses = model[0](torch.ones(2)).sum(), model[0](torch.ones(2)).square().sum()
    expect(RuntimeError, "disagree on the parameters", aligner.backward, *losses)

    # One process raises before the step: the other does not wait, and both can start over.
    wrapped = DistributedDataParallel(model := ParallelModel())
    aligner = gf.GradientAligner(wrapped)
    optimizer = gf.AlignedAdamW(model.parameters(), aligner=aligner)
    before = [parameter.clone() for parameter in model.parameters()]
    collect(aligner, wrapped, x, 0)
    if rank:
        expect(RuntimeError, "no gradients of generation", optimizer.step)
    else:
        # Which looks for overflow in all processes.
        expect(RuntimeError, "another process raised", collect, aligner, wrapped, x, 1)
    assert all(map(torch.equal, before, model.parameters()))
    aligner.zero_grad()
    aligner.backward(*wrapped(x))
    optimizer.step()
    assert not all(map(torch.equal, before, model.parameters()))


def collect(aligner, wrapped, x, loss):
    with aligner.collect(NAMES[loss]):
        wrapped(x)[loss].backward()


def check_step_that_raises(rank):
    """A step that raises behind the average is started over."""
    wrapped = DistributedDataParallel(model := ParallelModel())
    aligner = gf.GradientAligner(wrapped)
    few = [*model.blocks.parameters()]
    optimizer = gf.AlignedAdamW(few, aligner=aligner)
    x = images(rank, 2, 0)
    aligner.backward(*wrapped(x))
    expect(RuntimeError, "is in no parameter group", optimizer.step)
    expect(RuntimeError, "start it over with zero_grad", optimizer.step)
    expect(RuntimeError, "start it over with zero_grad", aligner.backward, *wrapped(x))
    optimizer.zero_grad()
    optimizer.add_param_group(
        {"params": [p for p in model.parameters() if all(p is not q for q in few)]}
    )
    aligner.backward(*wrapped(x))
    optimizer.step()


CHECKS = (
    check_scaler,
    check_late_scaler,
    check_several_wrappers,
    check_half_precision,
    check_converted_model,
    check_groups,
    check_bytes,
    check_other_losses,
    check_static_graph_afterwards,
    check_clipping_in_a_block,
    check_strides,
    check_hook_is_used,
    check_refusals,
    check_disagreement,
    check_step_that_raises,
)


@pytest.mark.slow
def test_single_steps_of_two_processes(two_processes):
    two_processes(__file__)


@pytest.mark.slow
def test_no_process_waits_for_one_that_ended(run_ranks):
    run_ranks(__file__, 3, "ending")


class Ending(torch.autograd.Function):
    """Ends the process in a backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        os._exit(0)


def run_until_another_ends(rank):
    """Process 1 ends in a backward pass, process 2 in align; process 0 shares a group with each."""
    timeout = datetime.timedelta(seconds=20)
    # All processes make every group.
    groups = [dist.new_group([0, other], timeout=timeout) for other in (1, 2)]
    for other, reduce in ((1, "hook"), (2, "sharded")):
        if rank not in (0, other):
            continue
        wrapped = DistributedDataParallel(SameReach(), process_group=groups[other - 1])
        aligner = gf.GradientAligner(wrapped, reduce=reduce)
        losses = list(wrapped(images(rank, 2, 0)))
        if rank == 1:
            losses[1] = Ending.apply(losses[1])
        if rank == 2:
            aligner._parallel.average = lambda *arguments: os._exit(0)
        start = time.monotonic()
        expect(RuntimeError, "(?i)connection|timed out|timeout", aligner.backward, *losses)
        assert time.monotonic() - start < 120


if __name__ == "__main__":
    rank, store = int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    size = 3 if "ending" in sys.argv else 2
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    if size == 3:
        run_until_another_ends(rank)
        os._exit(0)
    for check in CHECKS:
        start = time.monotonic()
        check(rank)
        print(check.__name__, time.monotonic() - start, flush=True)
    dist.destroy_process_group()
