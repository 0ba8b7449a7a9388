"""The step numbers of `AlignedAdamW`, which one operation counts on, beside those of
`torch.optim.AdamW`: whoever reads or writes one finds what it finds there.
"""

import copy

import pytest
import torch
from torch import nn

import genrep_fast as gf


def gradient(seed, size):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


class Pair:
    """Three parameters under AlignedAdamW, and copies of them under `torch.optim.AdamW`.

    Both losses have half the gradient, so that the aligned one is the sum.
    """

    def __init__(self):
        self.params = [nn.Parameter(gradient(size, size)) for size in (3, 5, 7)]
        self.copies = [nn.Parameter(parameter.detach().clone()) for parameter in self.params]
        self.aligner = gf.GradientAligner(self.params, weights=(1.0, 1.0), power=0.0)
        self.aligned = gf.AlignedAdamW(self.params, aligner=self.aligner)
        self.plain = torch.optim.AdamW(self.copies, foreach=False)

    def step(self, reached=(0, 1, 2)):
        for name in self.aligner.names:
            with self.aligner.collect(name):
                for index in reached:
                    grad = gradient(index, self.params[index].shape)
                    self.params[index].grad = grad / 2
        for index in reached:
            self.copies[index].grad = gradient(index, self.copies[index].shape)
        for optimizer in (self.aligned, self.plain):
            optimizer.step()
            optimizer.zero_grad()

    def steps(self, optimizer):
        params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return [optimizer.state[parameter]["step"] for parameter in params]

    def check(self, *expected):
        assert [step.item() for step in self.steps(self.aligned)] == list(expected)
        assert [step.item() for step in self.steps(self.plain)] == list(expected)
        torch.testing.assert_close(self.params, self.copies)


def test_parameters_that_losses_reach_at_times_are_counted_each_for_itself():
    pair = Pair()
    for reached in ((0, 1, 2), (1,), (1, 2), (0, 1, 2), (0, 1, 2), (2,)):
        pair.step(reached)
    pair.check(3, 5, 5)


@pytest.mark.parametrize("write", ["in place", "replaced"])
def test_a_step_that_somebody_sets_counts_from_there(write):
    pair = Pair()
    pair.step()
    for optimizer in (pair.aligned, pair.plain):
        parameter = optimizer.param_groups[0]["params"][1]
        if write == "in place":
            optimizer.state[parameter]["step"].fill_(40)
        else:
            optimizer.state[parameter]["step"] = torch.tensor(40.0)
    pair.step()
    pair.step()
    pair.check(3, 42, 3)


def test_loaded_steps_count_on():
    pair = Pair()
    pair.step()
    states = [copy.deepcopy(each.state_dict()) for each in (pair.aligned, pair.plain)]
    pair.step()
    pair.step()
    for optimizer, state in zip((pair.aligned, pair.plain), states, strict=True):
        optimizer.load_state_dict(state)
    pair.step()
    pair.check(2, 2, 2)


def test_a_state_dict_that_adamw_took_over_counts_one_step_a_parameter():
    pair = Pair()
    pair.step()
    pair.plain.load_state_dict(pair.aligned.state_dict())
    foreach = torch.optim.AdamW(pair.copies, foreach=True)
    foreach.load_state_dict(pair.aligned.state_dict())
    for index, parameter in enumerate(pair.copies):
        parameter.grad = gradient(index, parameter.shape)
    foreach.step()
    assert [step.item() for step in pair.steps(foreach)] == [2, 2, 2]


def test_a_skipped_step_is_not_counted():
    pair = Pair()
    pair.step()
    for name in pair.aligner.names:
        with pair.aligner.collect(name):
            for parameter in pair.params:
                parameter.grad = torch.ones_like(parameter)
    pair.aligned.grad_scale, pair.aligned.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    pair.aligned.step()
    pair.check(1, 1, 1)
