"""Random walks over `PosteriorScorer` and `ChainBank` beside plain models of them.

The plain scorer keeps every log-likelihood that it has seen, in float64, with the bound of its
error. The plain bank is one that is never saved, copied or drawn in other batches.
"""

import copy
import math
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from soak_share import examples

import genrep_fast as gf
from kernel_cases import LAYOUTS

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
BATCH, CLASSES, STEPS, CHANNELS, SPATIAL = 2, 4, 9, 3, (2, 5)
SCORERS = 3
STEP_LISTS = st.lists(st.integers(0, STEPS - 1), max_size=6)


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def step_tables():
    rising = torch.linspace(0, 1, STEPS, dtype=F64)
    return {
        "data": 1.2 - 0.4 * rising,
        "noisy": 0.3 * rising - 0.6,
        "output": rising - 1.5,
        "inv_var": 0.3 + 0.2 * rising,
        "log_norm": -0.5 - rising,
    }


class ScorerWalk(RuleBasedStateMachine):
    """A few scorers of the same images, which are updated, merged, copied and reset."""

    @initialize(
        reduction=st.sampled_from(("mixture", "mean")),
        per_location=st.booleans(),
        dtype=st.sampled_from((F64, F32, BF16, F16)),
        needs_noisy=st.booleans(),
    )
    def begin(self, reduction, per_location, dtype, needs_noisy):
        self.options = {"reduction": reduction, "per_location": per_location}
        self.dtype = dtype
        self.tables = step_tables()
        if not needs_noisy:
            self.tables["noisy"] = torch.zeros(STEPS, dtype=F64)
        if dtype != F64:
            self.tables = {name: table.float() for name, table in self.tables.items()}
        self.x = normal(1, BATCH, CHANNELS, *SPATIAL).to(dtype)
        # Of images apart, or shared by the batch.
        self.outputs = [
            normal(2, BATCH, CLASSES, STEPS, CHANNELS + 1, *SPATIAL).to(dtype),
            normal(3, 1, CLASSES, STEPS, CHANNELS, *SPATIAL).to(dtype),
        ]
        self.noisy = normal(4, BATCH, CLASSES, STEPS, CHANNELS, *SPATIAL).to(dtype)
        self.needs_noisy = needs_noisy
        self.scorers = [gf.PosteriorScorer(CLASSES, **self.options) for _ in range(SCORERS)]
        self.seen = [[[] for _ in range(CLASSES)] for _ in range(SCORERS)]
        self.used = [False] * SCORERS

    def likelihoods(self, output, noisy, steps):
        """Log-likelihoods [B, K, S, *loc] in float64, and bounds of their errors."""
        tables = [table.double()[steps] for table in self.tables.values()]
        a, b, c, v, n = (table.view(-1, *[1] * (1 + len(SPATIAL))) for table in tables)
        terms = [a * self.x.double()[:, None, None], c * output.double()[:, :, :, :CHANNELS]]
        if noisy is not None:
            terms.append(b * noisy.double())
        residual = sum(terms)
        size = sum(term.abs() for term in terms)
        axes = (3,) if self.options["per_location"] else (3, 4, 5)
        count = CHANNELS * (1 if self.options["per_location"] else math.prod(SPATIAL))
        values = (-0.5 * v * residual.square() + n).sum(axes)
        added = (0.5 * v * residual.abs() * (residual.abs() + 8 * size) + n.abs()).sum(axes)
        unit = torch.finfo(F64 if self.dtype == F64 else F32).eps / 2
        return values, (count + 8) * unit * added

    @rule(
        number=st.integers(0, SCORERS - 1),
        steps=STEP_LISTS,
        classes=st.none() | st.lists(st.integers(0, CLASSES - 1), unique=True, max_size=CLASSES),
        kind=st.integers(0, 1),
        layout=st.sampled_from(sorted(LAYOUTS)),
        shared=st.tuples(*[st.booleans()] * 3),
        as_tensor=st.booleans(),
    )
    def update(self, number, steps, classes, kind, layout, shared, as_tensor):
        chosen = list(range(CLASSES)) if classes is None else classes
        output = self.outputs[kind][:, chosen][:, :, steps]
        noisy = None
        if self.needs_noisy:
            noisy = self.noisy[:, chosen][:, :, steps]
            for axis, is_shared in enumerate(shared):
                noisy = noisy[(slice(None),) * axis + (slice(0, 1),)] if is_shared else noisy
        moved = output if output.numel() == 0 else LAYOUTS[layout](output)
        rows = gf.StepCoefficients(**{name: each[steps] for name, each in self.tables.items()})
        index = torch.tensor(chosen, dtype=torch.int64) if as_tensor and classes else classes
        self.scorers[number].update(self.x, moved, rows, noisy, classes=index)
        self.used[number] = True
        values, errors = self.likelihoods(output, noisy, steps)
        for place, label in enumerate(chosen):
            for step in range(len(steps)):
                row = (values[:, place, step], errors[:, place, step])
                self.seen[number][label].append(row)

    @rule(one=st.integers(0, SCORERS - 1), other=st.integers(0, SCORERS - 1))
    def merge(self, one, other):
        if one == other:
            return
        self.scorers[one].merge(self.scorers[other])
        self.used[one] = self.used[one] or self.used[other]
        for own, added in zip(self.seen[one], self.seen[other], strict=True):
            own.extend(added)

    @rule(number=st.integers(0, SCORERS - 1))
    def reset(self, number):
        self.scorers[number].reset()
        self.seen[number] = [[] for _ in range(CLASSES)]

    @rule(one=st.integers(0, SCORERS - 1), other=st.integers(0, SCORERS - 1), how=st.booleans())
    def take_a_copy(self, one, other, how):
        scorer = self.scorers[one]
        copied = copy.deepcopy(scorer) if how else pickle.loads(pickle.dumps(scorer))
        self.scorers[other], self.used[other] = copied, self.used[one]
        self.seen[other] = [list(rows) for rows in self.seen[one]]

    @rule(number=st.integers(0, SCORERS - 1), mistake=st.integers(0, 4))
    def a_mistake(self, number, mistake):
        """What is refused, and must change nothing."""
        rows = gf.StepCoefficients(**{name: each[:2] for name, each in self.tables.items()})
        output, noisy = self.outputs[0][:, :, :2], self.noisy[:, :, :2]
        if mistake == 4:
            with pytest.raises(ValueError):
                self.scorers[number].merge(gf.PosteriorScorer(CLASSES + 1, **self.options))
            return
        arguments = [
            (self.x, output[:, :, :1], rows, noisy, None),
            (self.x, output, rows, noisy, [0, 0, 1, 2]),
            (self.x, output, rows, noisy, [0, 1, 2, CLASSES]),
            (self.x, output[:, :2], rows, noisy[:, :2], None),
        ][mistake]
        with pytest.raises(ValueError):
            self.scorers[number].update(*arguments)

    @invariant()
    def queries_are_those_of_everything_seen(self):
        for scorer, seen, used in zip(self.scorers, self.seen, self.used, strict=True):
            # Classes of other numbers of steps are not comparable.
            counts = {len(rows) for rows in seen}
            if not used or len(counts) > 1 or counts == {0}:
                continue
            found = (
                scorer.log_likelihood(),
                scorer.effective_components(),
                scorer.standard_error(),
            )
            for label, rows in enumerate(seen):
                self.compare([tensor[:, label] for tensor in found], rows)

    def compare(self, found, rows):
        values, errors = (torch.stack(column) for column in zip(*rows, strict=True))
        n, worst = len(values), errors.amax(0)
        # Queries of what was float32 are rounded to it.
        unit = torch.finfo(F64 if self.dtype == F64 else F32).eps
        if self.options["reduction"] == "mean":
            likelihood = values.mean(0)
            components = torch.full_like(likelihood, n)
            spread = (values - likelihood).square().sum(0)
            error = ((spread.sqrt() + 2 * math.sqrt(n) * worst).square() - spread).clamp(min=0)
            of_components = torch.zeros_like(error)
            scale = n * (n - 1)
        else:
            likelihood = values.logsumexp(0) - math.log(n)
            weights = (values - values.amax(0)).exp()
            components = weights.sum(0).square() / weights.square().sum(0)
            spread = (weights.square().sum(0) / weights.sum(0).square() - 1 / n).clamp(min=0)
            # Each weight is known up to a factor of exp(±2 worst).
            relative = 5 * worst + 64 * unit
            of_components, error, scale = relative * components, relative * (spread + 1 / n), 1
        tiny = 1e-12 * (1 + likelihood.abs())
        assert_near("likelihood", found[0], likelihood, worst + unit * likelihood.abs() + tiny)
        assert_near("components", found[1], components, of_components + 2 * unit * components)
        if n < 2:
            assert found[2].isnan().all()
            return
        expected = (spread / scale).sqrt()
        larger = ((spread + error) / scale).sqrt() - expected
        smaller = expected - ((spread - error).clamp(min=0) / scale).sqrt()
        bound = torch.maximum(larger, smaller) + 2 * unit * expected + 1e-7 * tiny.sqrt()
        assert_near("standard error", found[2], expected, bound)


def assert_near(name, found, expected, bound):
    worst = ((found.double() - expected).abs() - bound).max().item()
    assert worst <= 0, f"{name}: {found.tolist()} is not {expected.tolist()} by {bound.tolist()}"


def denoiser(x, timesteps, labels):
    y, t = (values.to(x.dtype).reshape(-1, 1, 1) for values in (labels, timesteps))
    return torch.sin(x + y) + 0.2 * x * (1 + t / 1000)


class BankWalk(RuleBasedStateMachine):
    """A bank that goes through files and copies, beside one that is only refreshed."""

    @initialize(
        dtype=st.sampled_from((F64, F32, BF16)),
        center=st.sampled_from(("mean", "sample")),
        chains=st.integers(1, 4),
        seed=st.integers(0, 2**64 - 1),
        batch_size=st.integers(1, 9),
    )
    def begin(self, dtype, center, chains, seed, batch_size):
        scheduler = DDPMScheduler(clip_sample=False, variance_type="fixed_large")
        options = {"num_inference_steps": 6, "chains": chains, "burn_in": 2, "thin": 2}
        options |= {"seed": seed, "dtype": dtype, "center": center}
        arguments = (denoiser, scheduler, 3, (2, 5))
        self.bank = gf.ChainBank.build(*arguments, **options, batch_size=batch_size)
        self.plain = gf.ChainBank.build(*arguments, **options)

    @rule(chains=st.integers(1, 4), batch_size=st.integers(1, 9))
    def refresh(self, chains, batch_size):
        chains = min(chains, self.plain.settings.chains)
        self.bank.refresh(denoiser, chains=chains, batch_size=batch_size)
        self.plain.refresh(denoiser, chains=chains)

    @rule(how=st.sampled_from(("file", "file", "copy", "pickle")))
    def replace(self, how):
        if how == "copy":
            self.bank = copy.deepcopy(self.bank)
        elif how == "pickle":
            self.bank = pickle.loads(pickle.dumps(self.bank))
        else:
            with tempfile.TemporaryDirectory() as folder:
                self.bank.save(Path(folder, "bank"))
                self.bank = gf.ChainBank.load(Path(folder, "bank"))

    @precondition(lambda self: hasattr(self, "bank"))
    @rule(chains=st.sampled_from((0, -1, 5, 2.5)))
    def a_mistake(self, chains):
        with pytest.raises((TypeError, ValueError)):
            self.bank.refresh(denoiser, chains=chains)

    @rule()
    def a_network_that_fails(self):
        def failing(x, timesteps, labels):
            if timesteps[0] < 500:
                raise ZeroDivisionError
            return denoiser(x, timesteps, labels)

        with pytest.raises(ZeroDivisionError):
            self.bank.refresh(failing, batch_size=2)

    @invariant()
    def both_are_the_same(self):
        assert self.bank.settings == self.plain.settings
        assert self.bank.evaluations == self.plain.evaluations
        assert torch.equal(self.bank.centers, self.plain.centers)
        assert torch.equal(self.bank.std, self.plain.std)

    @rule(seed=st.integers(0, 3))
    def score(self, seed):
        x = normal(seed, 2, 2, 5).to(F64 if self.bank.centers.dtype == F64 else F32)
        centers, std = self.plain.centers.double(), self.plain.std.double()
        residual = x.double()[:, None, None] - centers  # [B, K, S, *sample]
        squares = residual.square().sum((3, 4)) / std.square()
        steps = -0.5 * squares - 10 * (std.log() + 0.5 * math.log(2 * math.pi))
        expected = steps.logsumexp(2) - math.log(len(std))
        rtol = 1e-12 if x.dtype == F64 else 2e-6
        # The largest term of a likelihood, which may cancel against the norm.
        size = (squares.amin(2) + 10 * std.log().abs().max() + 10).max().item()
        found = self.bank.log_likelihood(x).double()
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * size)


@pytest.mark.parametrize("walk", [ScorerWalk, BankWalk])
def test_scorer_and_bank_walk_beside_plain_models(walk):
    run_state_machine_as_test(walk, settings=examples(15, 60, stateful_step_count=25))
