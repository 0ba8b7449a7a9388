"""Random walks over `GradientAligner` and `AlignedAdamW` beside a plain model of both.

Whatever the walk does between two steps, parameters, moments, counters and averages keep their
bits; a step moves them as `plain_alignment` says, or raises and moves nothing.
"""

import contextlib
import copy
import io
import pickle

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from plain_alignment import Place, adamw, combine, rounding
from soak_share import examples
from torch import nn

import genrep_fast as gf

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
SEEDS = st.integers(0, 7)
# What a loss reaches.
VARIANTS = ("all", "all", "all", "head", "trunk", "zeros", "negated", "nothing")


class Model(nn.Module):
    """Two shared blocks, a head a loss, a parameter that no loss reaches, and an empty one."""

    def __init__(self, losses, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, 3)])
        self.heads = nn.ModuleList([nn.Linear(3, 2) for _ in range(losses)])
        self.unused = nn.Parameter(torch.ones(2))
        self.empty = nn.Parameter(torch.empty(0))
        self.to(dtype)

    def loss(self, number, seed, variant):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 3, generator=generator, dtype=F64).to(self.unused.dtype)
        if variant == "nothing":
            return x.clone().requires_grad_().sum()
        for block in self.blocks:
            x = torch.tanh(block(x))
        if variant == "trunk":
            return x.square().mean() * (number + 1)
        if variant == "negated":
            return -self.heads[0](x).square().mean()
        output = self.heads[number](x.detach() if variant == "head" else x)
        value = output.square().mean() if number == 0 else (output - number).abs().mean()
        if variant == "zeros":
            others = (parameter.sum() for head in self.heads for parameter in head.parameters())
            value = value + 0 * sum(others)
        return value


def by_kind(name):
    """Groups across blocks; heads are in none."""
    return name.rpartition(".")[2] if name.startswith("blocks") else None


KEYS = {
    "all": lambda index, name: "all",
    "tensor": lambda index, name: name,
    "block": lambda index, name: name.rpartition(".")[0] or name,
    by_kind: lambda index, name: by_kind(name),
}


def own_rule(grams):
    return 1 / grams.diagonal(dim1=1, dim2=2).sqrt()


ALIGNERS = st.fixed_dictionaries(
    {
        "rule": st.sampled_from(("genrep", "genrep", "pcgrad", "mgda", "nash_mtl", "own")),
        "losses": st.sampled_from((2, 2, 3)),
        "power": st.sampled_from((0.0, 1.0, 2.0, 3.5)),
        "groups": st.sampled_from(list(KEYS)),
        "flat": st.booleans(),
        "dtype": st.sampled_from((F32, F32, BF16, F64)),
        "backend": st.sampled_from((None, "reference")),
    }
)
OPTIMIZERS = st.fixed_dictionaries(
    {
        "ema": st.sampled_from((None, "tensors", "module")),
        "ema_decay": st.sampled_from((None, 0.0, 0.5, 0.99, 1.0)),
        "max_norm": st.sampled_from((None, 0.05, 1e3, float("inf"))),
        "eps": st.sampled_from((1e-8, 1e-3)),
        "betas": st.sampled_from(((0.9, 0.999), (0.0, 0.5))),
        "later": st.sampled_from((False, False, True)),
    }
)


class Collecting(RuleBasedStateMachine):
    """What both walks do before a step; `grads` are the plain model's gradients."""

    def prepare(self, options):
        self.n = 3 if options["rule"] == "own" and options["losses"] == 3 else 2
        self.options = options
        self.names = ("perception", "generation", "third")[: self.n]
        self.model = Model(self.n, options["dtype"])
        self.forget()
        self.make_aligner()
        self.known = set()
        self.weights = list(self.aligner.weights)

    def make_aligner(self):
        rule = own_rule if self.options["rule"] == "own" else self.options["rule"]
        self.aligner = gf.GradientAligner(
            self.model,
            names=self.names,
            power=self.options["power"],
            groups=self.options["groups"],
            rule=rule,
            flat=self.options["flat"],
        )

    def forget(self):
        self.grads = [[None] * len(self.parameters) for _ in range(self.n)]
        self.counts = [0] * self.n
        self.broken = self.tampered = False

    @property
    def parameters(self):
        return list(self.model.parameters())

    @property
    def clean(self):
        return not (self.broken or self.tampered or self.occupied)

    # Whether .grad holds an aligned gradient.
    occupied = False

    def backend(self):
        if self.options["backend"] is None or self.options["dtype"] == F64:
            return contextlib.nullcontext()
        return gf.use_backend(self.options["backend"])

    def variant_of(self, variant):
        # Opposite gradients have no stable direction under the other rules.
        if variant == "negated" and self.options["rule"] not in ("genrep", "pcgrad"):
            return "all"
        return variant

    def gradients_of(self, loss):
        trained = [i for i, parameter in enumerate(self.parameters) if parameter.requires_grad]
        inputs = [self.parameters[i] for i in trained]
        values = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=False)
        return dict(zip(trained, values, strict=True))

    def add(self, number, gradients):
        for index, gradient in gradients.items():
            earlier = self.grads[number][index]
            if gradient is not None:
                total = gradient if earlier is None else earlier + gradient
                self.grads[number][index] = total.detach()
        self.counts[number] += 1

    def refused(self, call, kinds=RuntimeError):
        with pytest.raises(kinds):
            call()

    @rule(
        number=st.integers(0, 2),
        seeds=st.lists(SEEDS, min_size=1, max_size=2),
        variant=st.sampled_from(VARIANTS),
    )
    def collect(self, number, seeds, variant):
        number %= self.n
        variant = self.variant_of(variant)
        loss = sum(self.model.loss(number, seed, variant) for seed in seeds)
        if not loss.requires_grad:
            return
        name = self.names[number]
        if not self.clean:
            self.refused(lambda: self.aligner.collect(name).__enter__())
            self.zero_grad("aligner")
            return
        expected = self.gradients_of(sum(self.model.loss(number, seed, variant) for seed in seeds))
        with self.backend(), self.aligner.collect(name):
            loss.backward()
        self.add(number, expected)

    def complete(self, seed, variant="all"):
        """Collect what a step lacks."""
        if not self.clean:
            self.zero_grad("aligner")
        for number in range(self.n):
            if not self.counts[number]:
                self.collect(number, [seed + number], variant if number == 0 else "all")

    @rule(seed=SEEDS, number=st.integers(0, 1))
    def empty_within_a_block(self, seed, number):
        if not self.clean or not self.model.loss(number, seed, "all").requires_grad:
            return
        loss = self.model.loss(number, seed, "all")
        expected = self.gradients_of(self.model.loss(number, seed, "all"))
        with self.aligner.collect(self.names[number]):
            self.aligner.zero_grad()
            loss.backward()
        self.forget()
        self.add(number, expected)

    @rule(seed=SEEDS, number=st.integers(0, 1))
    def a_block_that_raises(self, seed, number):
        if not self.clean or not self.model.loss(number, seed, "all").requires_grad:
            return
        with pytest.raises(ZeroDivisionError), self.aligner.collect(self.names[number]):
            self.model.loss(number, seed, "all").backward()
            raise ZeroDivisionError
        self.broken = self.counts[number] > 0

    @rule(how=st.sampled_from(("aligner", "model", "zeros")))
    def zero_grad(self, how):
        # Zeros do not make up for a .grad that was replaced, and what an align() or a pass that
        # raised has left is for the aligner to forget.
        if how == "zeros" and self.tampered or self.broken or self.occupied:
            how = "aligner"
        if how == "aligner":
            self.aligner.zero_grad()
        else:
            self.model.zero_grad(set_to_none=how == "model")
            if not any(self.shown()):
                # Passes that reached nothing have left nothing that could be dropped.
                return
        self.occupied = False
        self.forget()

    def shown(self):
        return [any(g is not None for g in column) for column in zip(*self.grads, strict=True)]

    @rule(how=st.sampled_from(("write", "replace", "remove")))
    def tamper(self, how):
        """What was collected is changed behind the aligner's back, which it must notice."""
        held = [p for p in self.parameters if p.grad is not None and p.grad.any()]
        if not self.clean or len(held) < 2:
            return
        if how == "write":
            held[0].grad.mul_(2)
        else:
            held[0].grad = held[0].grad.clone() if how == "replace" else None
        self.tampered = True

    @rule(index=st.integers(0, 9), requires_grad=st.booleans())
    def freeze(self, index, requires_grad):
        # Flat buffers are made for what requires gradients at the first block of a step.
        if self.options["flat"] and any(self.counts):
            return
        self.parameters[index % len(self.parameters)].requires_grad_(requires_grad)

    @rule(data=st.data())
    def change_weights(self, data):
        weights = data.draw(
            st.lists(st.sampled_from((0.0, 0.3, 0.7, 1.0, 2.0)), min_size=self.n, max_size=self.n)
        )
        self.aligner.weights = weights
        self.weights = weights

    def missing(self):
        """Why a step cannot be taken now: any truth."""
        return not all(self.counts) or self.broken or self.tampered or not any(self.shown())

    def combined(self, max_norm):
        named = list(self.model.named_parameters())
        key_of = KEYS[self.options["groups"]]
        keys = [key_of(index, name) for index, (name, _) in enumerate(named)]
        combined = combine(
            self.grads,
            keys,
            self.options["rule"],
            self.weights,
            self.options["power"],
            max_norm,
            self.options["dtype"],
        )
        return combined

    def check_statistics(self, combined, max_norm):
        stats, keys = self.aligner.stats, self.aligner.group_keys
        for key, (values, errors) in combined.coefficients.items():
            found = stats.coefficients[keys.index(key)]
            for value, expected, error in zip(found.tolist(), values, errors, strict=True):
                assert abs(value - expected) <= error, (key, value, expected, error)
        if max_norm is not None:
            total, error = combined.total_norm
            assert abs(stats.total_norm.item() - total) <= error + 1e-12 * total


def assert_within(name, found, expected, error):
    difference = (found.double() - expected).abs()
    worst = (difference - error).max().item() if found.numel() else -1.0
    assert worst <= 0, f"{name}: {found.tolist()} is not {expected.tolist()} by {error.tolist()}"


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


class AligningWalk(Collecting):
    """An aligner alone, which writes to .grad."""

    @initialize(options=ALIGNERS)
    def begin(self, options):
        self.prepare(options)

    @rule(max_norm=st.sampled_from((None, None, 0.05, 1e3)), seed=st.none() | SEEDS)
    def align(self, max_norm, seed):
        if seed is not None:
            self.complete(seed)
        if self.missing() or self.occupied:
            self.refused(lambda: self.aligner.align(max_norm))
            return
        combined = self.combined(max_norm)
        with self.backend():
            self.aligner.align(max_norm)
        self.check_statistics(combined, max_norm)
        for index, parameter in enumerate(self.parameters):
            if index not in combined.gradients:
                assert parameter.grad is None
                continue
            gradient, error, _ = combined.gradients[index]
            error = error + rounding(gradient, parameter.dtype)
            assert_within(f"gradient {index}", parameter.grad, gradient, error)
        self.forget()
        self.occupied = True

    @rule(seeds=st.lists(SEEDS, min_size=3, max_size=3))
    def backward(self, seeds):
        losses = [self.model.loss(i, seeds[i], "all") for i in range(self.n)]
        if not all(loss.requires_grad for loss in losses):
            return
        if not self.clean:
            self.refused(lambda: self.aligner.backward(*losses))
            return
        for number, seed in enumerate(seeds[: self.n]):
            self.add(number, self.gradients_of(self.model.loss(number, seed, "all")))
        combined = self.combined(None)
        with self.backend():
            self.aligner.backward(*losses)
        self.check_statistics(combined, None)
        self.forget()
        self.occupied = True


class TrainingWalk(Collecting):
    """An aligner with its optimizer."""

    @initialize(options=ALIGNERS, choice=OPTIMIZERS)
    def begin(self, options, choice):
        self.prepare(options)
        self.choice = choice
        named = self.model.named_parameters()
        self.places = [Place(value.detach().clone(), name=name) for name, value in named]
        self.ema, self.decay, self.max_norm = None, choice["ema_decay"], choice["max_norm"]
        parts = self.parts()
        # Averages that are tensors cannot grow.
        later = choice["later"] and choice["ema"] != "tensors"
        self.in_optimizer = list(parts if later else [*parts, "last"])
        if choice["ema"] == "module":
            self.ema = copy.deepcopy(self.model)
            if options["dtype"] == BF16:
                self.ema.float()
        if choice["ema"] == "tensors":
            self.ema = [parameter.detach().clone() for parameter in self.ordered()]
            if options["dtype"] == BF16:
                self.ema = [tensor.float() for tensor in self.ema]
        self.make_optimizer()
        for index, average in self.averages().items():
            self.places[index].average = average.detach().clone()

    def parts(self):
        """Parameters of the optimizer's groups by name, without the last."""
        return {"blocks": list(self.model.blocks.parameters()), "heads": self.heads()[:-2]}

    def heads(self):
        others = [self.model.unused, self.model.empty]
        return [*others, *self.model.heads.parameters()]

    def groups(self):
        parts = {**self.parts(), "last": self.heads()[-2:]}
        return [{"params": parts[name]} for name in self.in_optimizer]

    def ordered(self):
        return [parameter for group in self.groups() for parameter in group["params"]]

    def make_optimizer(self):
        self.optimizer = gf.AlignedAdamW(
            self.groups(),
            lr=0.01,
            betas=self.choice["betas"],
            eps=self.choice["eps"],
            aligner=self.aligner,
            ema=self.ema,
            ema_decay=self.decay,
            max_norm=self.max_norm,
        )

    def averages(self):
        if self.ema is None:
            return {}
        if isinstance(self.ema, nn.Module):
            return dict(enumerate(self.ema.parameters()))
        indices = {id(parameter): index for index, parameter in enumerate(self.parameters)}
        return {indices[id(p)]: tensor for p, tensor in zip(self.ordered(), self.ema, strict=True)}

    @invariant()
    def nothing_moves_between_steps(self):
        averages = self.averages()
        for index, (parameter, place) in enumerate(zip(self.parameters, self.places, strict=True)):
            assert same_bits(parameter.detach(), place.value), f"{place.name} has changed"
            state = self.optimizer.state.get(parameter, {})
            assert bool(state) == (place.moments is not None), f"the state of {place.name}"
            if state:
                assert state["step"].item() == place.step
                assert same_bits(state["exp_avg"], place.moments[0]), f"exp_avg of {place.name}"
                assert same_bits(state["exp_avg_sq"], place.moments[1]), f"of {place.name}"
            if place.average is not None:
                assert same_bits(averages[index].detach(), place.average), f"ema of {place.name}"

    @rule(seed=st.none() | SEEDS, variant=st.sampled_from(VARIANTS), closure=st.booleans())
    def step(self, seed, variant, closure):
        if seed is not None:
            self.complete(seed, variant)
        if self.missing() or self.reaches_a_stranger():
            self.refused(self.optimizer.step)
            return
        with self.backend():
            self.take_step(lambda: self.optimizer.step((lambda: 7) if closure else None))
        self.forget()

    @rule(seeds=st.lists(SEEDS, min_size=1, max_size=4), variant=st.sampled_from(VARIANTS))
    def train(self, seeds, variant):
        """Ordinary steps, one after the other."""
        for seed in seeds:
            self.step(seed, variant, False)

    def reaches_a_stranger(self):
        known = {id(parameter) for parameter in self.ordered()}
        reached = zip(self.parameters, self.shown(), strict=True)
        return any(id(parameter) not in known for parameter, is_reached in reached if is_reached)

    def take_step(self, step):
        """A step that must go as the plain model's."""
        combined = self.combined(self.max_norm)
        group_of = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        expected = {}
        for index, gradient in combined.gradients.items():
            group = group_of[id(self.parameters[index])]
            expected[index] = adamw(self.places[index], *gradient, group)
        step()
        self.check_statistics(combined, self.max_norm)
        for index, (values, errors) in expected.items():
            parameter, place = self.parameters[index], self.places[index]
            state = self.optimizer.state[parameter]
            found = (parameter.detach(), state["exp_avg"], state["exp_avg_sq"])
            names = (place.name, f"exp_avg of {place.name}", f"exp_avg_sq of {place.name}")
            for name, *compared in zip(names, found, values, errors, strict=True):
                assert_within(name, *compared)
            place.value, *moments = (tensor.clone() for tensor in found)
            place.moments, place.step = tuple(moments), place.step + 1
            assert state["step"].item() == place.step
        self.follow()

    def follow(self):
        """Check the averages after a step, and take them over."""
        decay = 0.999 if self.decay is None else self.decay
        for index, average in self.averages().items():
            place, parameter = self.places[index], self.parameters[index]
            value, before = place.value.double(), place.average.double()
            kept = decay if parameter.requires_grad or place.moments is not None else 0.0
            expected = kept * before + (1 - kept) * value
            error = 4 * torch.finfo(average.dtype).eps * (before.abs() + value.abs())
            if kept == 0:
                error = torch.zeros_like(error)
            assert_within(f"ema of {place.name}", average.detach(), expected, error)
            place.average = average.detach().clone()

    @precondition(lambda self: self.options["dtype"] == F32)
    @rule(seeds=st.lists(SEEDS, min_size=3, max_size=3), overflow=st.booleans(), data=st.data())
    def step_with_a_scaler(self, seeds, overflow, data):
        """A whole step under a GradScaler, which leaves it out where a gradient is not finite."""
        losses = [self.model.loss(i, seeds[i], "all") for i in range(self.n)]
        if "last" not in self.in_optimizer or not all(loss.requires_grad for loss in losses):
            return
        self.zero_grad("aligner")
        scaler = torch.amp.GradScaler("cpu", init_scale=data.draw(st.sampled_from((1.0, 1024.0))))
        spoiled = data.draw(st.integers(0, self.n - 1)) if overflow else None
        with self.backend():
            for number, loss in enumerate(losses):
                expected = self.gradients_of(self.model.loss(number, seeds[number], "all"))
                factor = float("inf") if number == spoiled else 1.0
                with self.aligner.collect(self.names[number]):
                    scaler.scale(loss * factor).backward()
                self.add(number, expected)
            if overflow:
                scaler.step(self.optimizer)
                self.begin_states()
            else:
                self.take_step(lambda: scaler.step(self.optimizer))
            scaler.update()
        self.forget()

    def begin_states(self):
        """A step that was left out gives what it would have moved a state that has not begun."""
        for place, is_reached in zip(self.places, self.shown(), strict=True):
            if is_reached and place.moments is None:
                place.moments = (torch.zeros_like(place.value),) * 2

    @rule(seeds=st.lists(SEEDS, min_size=3, max_size=3), failing=st.integers(-1, 2))
    def backward(self, seeds, failing):
        """Both losses over one graph; the loss `failing` raises, if there is one."""
        losses = [self.model.loss(i, seeds[i], "all") for i in range(self.n)]
        if not all(loss.requires_grad for loss in losses):
            return
        if not self.clean:
            self.refused(lambda: self.aligner.backward(*losses))
            return
        expected = [self.gradients_of(self.model.loss(i, seeds[i], "all")) for i in range(self.n)]

        def run(loss, retain_graph):
            if failing < self.n and loss is losses[failing] and failing >= 0:
                raise ZeroDivisionError
            loss.backward(retain_graph=retain_graph)

        if not 0 <= failing < self.n:
            assert self.aligner.backward(*losses, backward=run) is None
            for number, gradients in enumerate(expected):
                self.add(number, gradients)
            return
        self.refused(lambda: self.aligner.backward(*losses, backward=run), ZeroDivisionError)
        if not any(self.counts):
            self.forget()
        else:
            self.broken = failing > 0 or self.counts[failing] > 0

    @rule(
        lr=st.sampled_from((0.0, 1e-3, 0.1, torch.tensor(0.03))),
        weight_decay=st.sampled_from((0.0, 0.01, 1.0)),
        place=st.integers(0, 2),
    )
    def change_hyperparameters(self, lr, weight_decay, place):
        group = self.optimizer.param_groups[place % len(self.optimizer.param_groups)]
        group["lr"], group["weight_decay"] = lr, weight_decay

    @rule(
        max_norm=st.sampled_from((None, 0.05, 1e3)),
        decay=st.sampled_from((None, 0.0, 0.5, 1.0)),
    )
    def change_attributes(self, max_norm, decay):
        self.optimizer.max_norm, self.optimizer.ema_decay = max_norm, decay
        self.max_norm, self.decay = max_norm, decay

    @rule(index=st.integers(0, 9), value=st.sampled_from((-0.5, 0.25)))
    def edit_a_parameter(self, index, value):
        index %= len(self.places)
        with torch.no_grad():
            self.parameters[index].add_(value)
        self.places[index].value = self.parameters[index].detach().clone()

    @precondition(lambda self: "last" not in self.in_optimizer)
    @rule()
    def add_param_group(self):
        self.refused(
            lambda: self.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
            ValueError,
        )
        self.in_optimizer.append("last")
        self.optimizer.add_param_group(self.groups()[-1])

    @rule(through_adamw=st.booleans(), new_model=st.sampled_from((None, "copied", "pickled")))
    def save_and_load(self, through_adamw, new_model):
        """The state goes through a file into a new optimizer, of the same model or of a copy."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        if through_adamw:
            adamw = torch.optim.AdamW(self.groups())
            adamw.load_state_dict(state)
            state = adamw.state_dict()
        self.model.zero_grad()
        if new_model == "copied":
            self.model, self.ema = copy.deepcopy((self.model, self.ema))
        if new_model == "pickled":
            self.model, self.ema = pickle.loads(pickle.dumps((self.model, self.ema)))
        self.occupied = False
        self.forget()
        weights = self.weights
        self.make_aligner()
        self.aligner.weights = weights
        self.make_optimizer()
        self.optimizer.load_state_dict(state)

    @rule(
        mistake=st.sampled_from(
            ("lr", "betas", "name", "copy", "deepcopy", "pickle", "missing", "shape", "negative")
            + ("step", "lr of a state", "groups")
        )
    )
    def a_mistake(self, mistake):
        """What is refused, and must change nothing."""
        if mistake in ("lr", "betas"):
            group = self.optimizer.param_groups[-1]
            good, group[mistake] = group[mistake], {"lr": -1.0, "betas": (0.9, 1.0)}[mistake]
            self.refused(self.optimizer.step, (ValueError, RuntimeError))
            group[mistake] = good
        elif mistake == "name":
            self.refused(lambda: self.aligner.collect("other").__enter__(), ValueError)
        elif mistake in ("copy", "deepcopy", "pickle"):
            make = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": pickle.dumps}[mistake]
            for each in (self.optimizer, self.aligner):
                self.refused(lambda each=each: make(each), TypeError)
        else:
            self.load_a_damaged_state(mistake)

    def load_a_damaged_state(self, damage):
        state = copy.deepcopy(self.optimizer.state_dict())
        trained = [values for values in state["state"].values() if values["exp_avg"].numel()]
        if damage == "groups":
            state["param_groups"].append(state["param_groups"][0])
        elif damage == "lr of a state":
            state["param_groups"][-1]["lr"] = -1.0
        elif not trained:
            return
        elif damage == "missing":
            del trained[-1]["exp_avg_sq"]
        elif damage == "shape":
            trained[-1]["exp_avg"] = torch.zeros(7)
        elif damage == "negative":
            trained[-1]["exp_avg_sq"] = -torch.ones_like(trained[-1]["exp_avg_sq"])
        else:
            trained[-1]["step"] = torch.tensor(float("nan"))
        self.refused(lambda: self.optimizer.load_state_dict(state), ValueError)


@pytest.mark.parametrize("walk", [AligningWalk, TrainingWalk])
def test_the_aligner_walks_beside_the_plain_model(walk):
    run_state_machine_as_test(walk, settings=examples(12, 120, stateful_step_count=30))
