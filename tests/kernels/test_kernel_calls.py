"""Scoring, posterior and the reverse step as calls: threads, autocast, compilation, memory."""

import ctypes
import functools
import itertools
import re
from pathlib import Path

import pytest
import torch

import genrep_fast as gf
from kernel_cases import (
    ALL,
    BF16,
    DEVICE,
    HAS_GPU,
    REDUCTIONS,
    STEPS,
    assert_equal_bits,
    chunk,
    operators,
    prior_of,
    random,
    reverse_step_arguments,
    state_of,
    tables,
)

pytestmark = [
    pytest.mark.usefixtures("backend"),
    # Of the interpreter, at infinities.
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
]


def scoring_call(name, shared, reduction, per_location):
    """An operator that reads a chunk of several tiles, and its arguments."""
    if shared:
        x, _, x_t, columns = chunk(19, 5, 6, 4, 0, (16, 17), x_t_axes=None)
        arguments = x, random(1, 5, 6, 4, 16, 17, seed=4), x_t, columns, reduction, per_location
    else:
        arguments = (
            *chunk(3, 5, 6, 4, 1, (16, 17), x_t_axes=(None, None, None)),
            reduction,
            per_location,
        )
    if name == "log_likelihood_backward":
        outputs = operators.log_likelihood(*arguments)
        arguments = (
            random(*outputs[0].shape, seed=9),
            *outputs,
            *arguments,
            [True, True, not shared],
        )
    elif name == "score_update":
        classes = torch.tensor([6, 0, 3, 7, 2], device=DEVICE)
        arguments = (
            *arguments[:-2],
            classes,
            reduction,
            per_location,
            *state_of(len(arguments[0]), 8, (16, 17), reduction, per_location),
        )
    return getattr(operators, name), arguments


def bayes_call(name):
    logits, likelihood, grad = (
        random(5, 10, 129, seed=1),
        random(5, 10, 129, seed=2),
        random(5, 129, seed=3),
    )
    prior = prior_of("own", (5, 10, 129))
    arguments = {
        "posterior": (likelihood, prior, 2.0),
        "distillation_loss": (logits, likelihood, prior, 2.0),
        "distillation_loss_backward": (grad, logits, likelihood, prior, 2.0, [True, True]),
    }
    return getattr(operators, name), arguments[name]


def reverse_step_call():
    return operators.reverse_step, reverse_step_arguments(
        (5, 4, 33, 65), std_scale=random(5, 1, 1, 1, seed=4).exp()
    )


CALLS = {  # every operator: functions that return it and its arguments
    **{
        ", ".join(
            (
                name,
                f"{'shared' if shared else 'own'} centres",
                reduction,
                "locations" if per_location else "images",
            )
        ): functools.partial(scoring_call, name, shared, reduction, per_location)
        for name in ("log_likelihood", "log_likelihood_backward", "score_update")
        for shared, reduction, per_location in itertools.product(
            (False, True), REDUCTIONS, (False, True)
        )
    },
    **{
        name: functools.partial(bayes_call, name)
        for name in ("posterior", "distillation_loss", "distillation_loss_backward")
    },
    "reverse_step": reverse_step_call,
}


LEFT_OUT = [
    name
    for name in CALLS
    if "locations" in name or "shared centres, mixture" in name or "own centres, mean" in name
]


def outcome(name):
    """What a call returns, or what it leaves in the state that it changes."""
    operator, arguments = CALLS[name]()
    results = operator(*arguments)
    if results is None:
        return arguments[-2:]
    return (results,) if isinstance(results, torch.Tensor) else results


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_every_time_and_for_any_number_of_threads(name, backend, compiled):
    expected = outcome(name)
    previous = torch.get_num_threads()
    for threads in (1, 2, 3) if backend == "cpu" else (1,):
        torch.set_num_threads(threads)
        try:
            assert_equal_bits(outcome(name), expected)
        finally:
            torch.set_num_threads(previous)


@pytest.mark.parametrize("name", CALLS)
def test_autocast_changes_nothing(name, compiled):
    expected = outcome(name)
    with torch.autocast(DEVICE.type, dtype=BF16):
        assert_equal_bits(outcome(name), expected)


# What it checks is the operators' definitions, which are the same for every tile.
@pytest.mark.parametrize("name", [name for name in CALLS if name not in LEFT_OUT])
def test_opcheck(name, compiled):
    operator, arguments = CALLS[name]()
    arguments = tuple(
        value.requires_grad_() if needs_gradient(name, value) else value for value in arguments
    )
    torch.library.opcheck(operator.default, arguments)


def needs_gradient(name, value):
    differentiable = name.startswith(("log_likelihood,", "posterior"))
    return (
        differentiable
        and isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.ndim > 1
    )


def test_the_whole_way_compiles_without_a_graph_break(compiled):
    x, model_output, x_t, columns = chunk(2, 3, 4, 2, 1, (5,))
    coefficients = gf.StepCoefficients(*columns)
    logits = random(2, 3, seed=5)

    def run(model_output, logits):
        likelihood = gf.log_likelihood(x, model_output, coefficients, x_t)
        return gf.distillation_loss(logits, likelihood, temperature=3.0), gf.posterior(likelihood)

    torch._dynamo.reset()
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.detach().requires_grad_() for tensor in (model_output, logits)]
        loss, posterior = function(*leaves)
        results.append([loss, posterior, *torch.autograd.grad(loss, leaves)])
    assert_equal_bits(
        [value.detach() for value in results[1]], [value.detach() for value in results[0]]
    )


def test_arguments_that_would_leave_memory_are_refused(backend):
    if backend == "triton":
        pytest.skip("its launchers are Python, behind the same checks of the public functions")
    x, model_output, x_t, columns = chunk(2, 3, 4, 2, 1, (5,))
    options = ("mixture", False)
    grad = torch.ones(2, 3, device=DEVICE)
    for arguments in (
        (x, model_output[:, :, :, :1], x_t, columns),
        (x, model_output[..., :4], x_t, columns),
        (x, model_output, x_t[:, :, :3], columns),
        (x, model_output, x_t, columns[:, :3]),
        (x, model_output, x_t, columns[:4]),
        (x, model_output, x_t, columns.t().contiguous().t()),
        (x, model_output, x_t, columns.double()),
        (x[:1], model_output, x_t, columns),
    ):
        with pytest.raises(RuntimeError):
            operators.log_likelihood(*arguments, *options)
        with pytest.raises(RuntimeError):
            operators.log_likelihood_backward(grad, grad, grad, *arguments, *options, list(ALL))
        with pytest.raises(RuntimeError):
            operators.score_update(*arguments, None, *options, *state_of(2, 3, (), *options))
    arguments = (x, model_output, x_t, columns)
    with pytest.raises(RuntimeError):
        operators.log_likelihood_backward(grad[:1], grad, grad, *arguments, *options, list(ALL))
    with pytest.raises(RuntimeError):
        operators.score_update(*arguments, None, *options, *state_of(2, 4, (), *options))
    with pytest.raises(RuntimeError):
        operators.score_update(*arguments, None, *options, *state_of(1, 3, (), *options))
    with pytest.raises(RuntimeError):
        operators.distillation_loss(grad, grad[:1], None, 1.0)
    with pytest.raises(RuntimeError):
        operators.posterior(grad, torch.zeros(1, 4, device=DEVICE), 1.0)
    arguments = reverse_step_arguments((3, 4, 5))
    for position, value in (
        (1, arguments[1][:, :3]),
        (2, arguments[2][:7]),
        (2, arguments[2].double()),
        (2, arguments[2][:, ::2]),
        (3, STEPS),
        (3, -1),
        (5, arguments[5][:2]),
        (6, arguments[6][:2]),
    ):
        with pytest.raises(RuntimeError):
            operators.reverse_step(*arguments[:position], value, *arguments[position + 1 :])


def peak_bytes(function):
    """Most memory that `function` holds beside what was there before it."""
    if HAS_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    def resident(name):
        return 1024 * int(
            re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
        )

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be taken again
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux and glibc")
@pytest.mark.parametrize("case", ["bank", "forward", "backward", "update"])
def test_memory_does_not_hold_steps(case, compiled):
    """One more number for each image, class and step would be 6 MB (bank) or 3.2 MB, for each
    element far more.
    """
    if case == "bank":
        batch, classes, steps = 64, 10, 2400
        arguments = (
            random(batch, 64, seed=1),
            random(1, classes, steps, 64, seed=2),
            None,
            tables(steps, 64),
        )
    else:
        batch, classes, steps = 2, 400, 1000
        output = random(batch, classes, steps, 9, seed=2)
        arguments = (random(batch, 9, seed=1), output, None, tables(steps, 9))
    outputs = operators.log_likelihood(*arguments, "mixture", False)
    state = state_of(batch, classes, (), "mixture", False)

    def run():
        if case == "backward":
            operators.log_likelihood_backward(
                outputs[0], *outputs, *arguments, "mixture", False, [False, True, False]
            )
        elif case == "update":
            operators.score_update(*arguments, None, "mixture", False, *state)
        else:
            operators.log_likelihood(*arguments, "mixture", False)

    run()  # what a process allocates once
    extra = peak_bytes(run) - (output.nbytes if case == "backward" else 0)
    print(f"{extra} bytes beyond the gradient" if case == "backward" else f"{extra} bytes")
    assert extra <= 2 * batch * classes * 8 + 2**20


@pytest.mark.parametrize("name", [name for name in CALLS if name not in LEFT_OUT])
def test_tensors_on_two_devices(name):
    operator, arguments = CALLS[name]()
    for position, tensor in enumerate(arguments):
        if isinstance(tensor, torch.Tensor):
            moved = list(arguments)
            moved[position] = tensor.to("cpu" if HAS_GPU else "meta")
            with pytest.raises((RuntimeError, ValueError), match="device|cpu|CPU"):
                operator(*moved)
