"""The fused optimizer step against `torch.optim.AdamW` on the aligned gradient and a separate
moving average.
"""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import genrep_fast as gf
from genrep_fast.ops import optimizer as ops
from genrep_fast.reference import optimizer as reference

SHAPES = [(1,), (63,), (), (0,), (7, 19), (129,), (2, 3, 5)]
GROUPS = [0, 1, 1, 0, None, 0, 1]
WEIGHTS = [0.7, 0.3]
OPTIONS = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
EMA_DECAY = 0.9


def random_tensors(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES
    ]


def new_state(params):
    return {
        "exp_avgs": [torch.zeros_like(param) for param in params],
        "exp_avg_sqs": [torch.zeros_like(param) for param in params],
        "emas": [param.clone() for param in params],
        "steps": [torch.zeros(()) for _ in params],
    }


def take_step(params, gradients, state, lr, reached, **options):
    """Align and step, the counters of the tensors `reached` advanced as an optimizer does."""
    for t in reached:
        state["steps"][t] += 1
    coefficients = gf.align_gradients(*gradients, groups=GROUPS)[1].coefficients
    ops.adamw_step(
        params,
        gradients,
        coefficients,
        GROUPS,
        weights=WEIGHTS,
        lr=lr,
        ema_decay=EMA_DECAY,
        **state,
        **OPTIONS,
        **options,
    )


def expected_steps(params, gradients_of_steps, rates, dtype, **options):
    """The same steps as separate operations in `dtype`; parameters, their averages, and the states
    of the optimizer.
    """
    params = [torch.nn.Parameter(param.to(dtype)) for param in params]
    emas = [param.detach().clone() for param in params]
    optimizer = torch.optim.AdamW(params, lr=1.0, **OPTIONS, **options)
    for gradients, rate in zip(gradients_of_steps, rates, strict=True):
        aligned, _ = gf.align_gradients(*gradients, groups=GROUPS)
        for param, gradient in zip(params, aligned, strict=True):
            param.grad = None if gradient is None else gradient.to(dtype)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        with torch.no_grad():
            for ema, param in zip(emas, params, strict=True):
                if param.grad is not None:
                    ema.lerp_(param, 1 - EMA_DECAY)
    return [param.detach() for param in params], emas, [optimizer.state[param] for param in params]


def gradients_of_steps(num_steps, dtype=torch.float64):
    steps = [
        (random_tensors(2 * i, dtype), random_tensors(2 * i + 1, dtype))
        for i in range(1, num_steps + 1)
    ]
    steps[1][0][1] = steps[2][1][4] = None  # one-sided
    steps[1][0][5] = steps[1][1][5] = None  # not reached: no step for this tensor
    return steps


def reached_by(pair):
    return [
        t
        for t, gradients in enumerate(zip(*pair, strict=True))
        if any(gradient is not None for gradient in gradients)
    ]


@pytest.mark.parametrize("rate_type", [float, torch.tensor])
def test_equals_adamw_on_the_aligned_gradient(rate_type):
    gradients = gradients_of_steps(7)
    rates = [10 ** -(1 + i / 3) for i in range(7)]
    initial = random_tensors(0)
    params = [param.clone() for param in initial]
    state = new_state(params)
    for pair, rate in zip(gradients, rates, strict=True):
        take_step(params, pair, state, rate_type(rate), reached_by(pair))
    # A learning rate that is a float32 tensor is what its float64 value says.
    expected_params, expected_emas, expected_state = expected_steps(
        initial, gradients, [float(rate_type(rate)) for rate in rates], torch.float64, foreach=False
    )
    for t in range(len(SHAPES)):
        assert state["steps"][t].item() == expected_state[t]["step"].item() == (6 if t == 5 else 7)
        for result, expected in (
            (params[t], expected_params[t]),
            (state["emas"][t], expected_emas[t]),
            (state["exp_avgs"][t], expected_state[t]["exp_avg"]),
            (state["exp_avg_sqs"][t], expected_state[t]["exp_avg_sq"]),
        ):
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-14)


def test_without_averages():
    params, (gradients,) = random_tensors(0), gradients_of_steps(3)[:1]
    with_averages = [param.clone() for param in params]
    take_step(with_averages, gradients, new_state(params), 0.1, range(len(SHAPES)))
    take_step(params, gradients, {**new_state(params), "emas": None}, 0.1, range(len(SHAPES)))
    torch.testing.assert_close(params, with_averages, rtol=0, atol=0)


def test_a_tensor_without_gradient_is_left_alone():
    params, state = [torch.ones(3)], new_state([torch.ones(3)])
    state["emas"][0] += 1
    take = {"weights": WEIGHTS, "lr": 0.1, **state}
    ops.adamw_step(params, [[None], [None]], torch.ones(1, 2), **take)
    assert (
        params[0].tolist() == [1] * 3
        and state["emas"][0].tolist() == [2] * 3
        and state["exp_avgs"][0].tolist() == [0] * 3
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_that_of_adamw_in_the_same_dtype(dtype):
    gradients = gradients_of_steps(5, dtype)
    initial = random_tensors(0, dtype)
    rates = [0.1] * 5
    params = [param.clone() for param in initial]
    state = new_state(params)
    for pair in gradients:
        take_step(params, pair, state, 0.1, reached_by(pair))
    doubled = [
        [[None if tensor is None else tensor.double() for tensor in side] for side in pair]
        for pair in gradients
    ]
    exact, exact_emas, _ = expected_steps(initial, doubled, rates, torch.float64, foreach=False)
    plain, plain_emas, _ = expected_steps(initial, gradients, rates, dtype, foreach=False)
    for name, results, plains, exacts in (
        ("parameter", params, plain, exact),
        ("average", state["emas"], plain_emas, exact_emas),
    ):
        error, plain_error = (
            torch.cat(
                [(a.double() - b).reshape(-1) for a, b in zip(tensors, exacts, strict=True)]
            ).norm()
            for tensors in (results, plains)
        )
        print(f"{dtype}, {name}: error {error:.1e}, separate operations {plain_error:.1e}")
        assert 0 < error <= 2 * plain_error


@pytest.mark.parametrize(
    ("param_dtype", "state_dtype", "gradient_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16),
        (torch.float64, torch.float32, torch.float32),
    ],
)
def test_dtypes_may_differ(param_dtype, state_dtype, gradient_dtype):
    params, gradient = (
        [torch.ones(5, dtype=param_dtype)],
        [torch.tensor([-1.0, -0.5, 0.25, 0.5, 1.0], dtype=gradient_dtype)],
    )
    state = new_state([torch.ones(5, dtype=state_dtype)])
    state["steps"][0] += 1
    ops.adamw_step(
        params,
        [gradient, gradient],
        torch.full((1, 2), 0.5),
        lr=0.125,
        eps=0.0,
        weight_decay=0.0,
        **state,
    )
    # The first step moves every element by lr.
    torch.testing.assert_close(
        params[0], torch.tensor([1.125, 1.125, 0.875, 0.875, 0.875], dtype=param_dtype)
    )
    torch.testing.assert_close(state["exp_avgs"][0], 0.1 * gradient[0].to(state_dtype))
    torch.testing.assert_close(state["emas"][0], 0.999 + 0.001 * params[0].to(state_dtype))


@pytest.mark.parametrize(
    "change",
    [
        {"lr": torch.tensor([0.125])},
        {"lr": torch.tensor([[0.125]], dtype=torch.float64)},
        {"betas": (torch.tensor(0.5), torch.tensor([[0.75]]))},
        {"betas": [0.5, torch.tensor(0.75, dtype=torch.float64)]},
    ],
)
def test_hyperparameters_may_be_tensors_of_one_element(change):
    results = []
    for options in ({}, change):
        params, state = [torch.ones(5)], new_state([torch.ones(5)])
        state["steps"][0] += 1
        arguments = {"lr": 0.125, "betas": (0.5, 0.75), **options}
        ops.adamw_step(params, [[torch.arange(5.0)]] * 2, torch.ones(1, 2), **arguments, **state)
        results.append((params, state))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_strided_parameters_are_updated_in_place():
    base = torch.ones(4, 6, dtype=torch.float64)
    gradient = torch.arange(9.0, dtype=torch.float64).reshape(3, 3).t()
    param = base[1:, ::2]
    dense, state, dense_state = param.clone(), new_state([param]), new_state([param])
    for target, moments in ((param, state), (dense, dense_state)):
        moments["steps"][0] += 1
        ops.adamw_step([target], [[gradient], [gradient]], torch.ones(1, 2), lr=0.1, **moments)
    torch.testing.assert_close(base[1:, ::2], dense, rtol=0, atol=0)
    assert base[0].tolist() == [1] * 6 and (base[:, 1::2] == 1).all() and (dense != 1).any()


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_found_inf_decides_whether_anything_changes(dtype, shape):
    gradients = gradients_of_steps(3, dtype)[0]
    gradients[1][3] = torch.full_like(gradients[1][3], math.nan)
    gradients[0][4][0] = math.inf
    results = {}
    for found in (None, 0.0, 1.0, 2.0):  # the sum over several devices may be 2
        params, state = random_tensors(0, dtype), new_state(random_tensors(0, dtype))
        take_step(
            params,
            gradients,
            state,
            0.1,
            reached_by(gradients),
            found_inf=None if found is None else torch.full(shape, found),
        )
        results[found] = [params, *(state[name] for name in ("exp_avgs", "exp_avg_sqs", "emas"))]
    torch.testing.assert_close(results[0.0], results[None], rtol=0, atol=0, equal_nan=True)
    zeros, initial = [torch.zeros(shape, dtype=dtype) for shape in SHAPES], random_tensors(0, dtype)
    for found in (1.0, 2.0):
        torch.testing.assert_close(results[found], [initial, zeros, zeros, initial], rtol=0, atol=0)
    assert results[None][0][4].isnan().any() and not torch.equal(results[None][0][5], initial[5])


# Wrong arguments


@pytest.mark.parametrize(
    ("change", "exception", "message"),
    [
        (
            {"params": [torch.ones(4)]},
            ValueError,
            r"params\[0\] must have shape \(3,\), got \(4,\)",
        ),
        ({"params": []}, ValueError, r"params must have 1 entries, got 0"),
        (
            {"params": [torch.ones(1).expand(3)]},
            ValueError,
            r"params\[0\] is written to and must not be an expanded tensor",
        ),
        (
            {"params": [torch.ones(3, device="meta")]},
            ValueError,
            r"params\[0\] must be on cpu .* got meta",
        ),
        (
            {"exp_avgs": [torch.ones(3).int()]},
            TypeError,
            r"exp_avgs\[0\] must be float32, .* got torch.int32",
        ),
        ({"exp_avg_sqs": [None]}, TypeError, r"exp_avg_sqs\[0\] must be a tensor, got NoneType"),
        ({"emas": [torch.ones(2)]}, ValueError, r"emas\[0\] must have shape \(3,\), got \(2,\)"),
        ({"steps": [torch.ones(1)]}, ValueError, r"steps\[0\] must have shape \(\), got \(1,\)"),
        ({"steps": [1]}, TypeError, r"steps\[0\] must be a tensor, got int"),
        ({"lr": torch.ones(2)}, ValueError, r"lr must have one element, got shape \(2,\)"),
        (
            {"lr": torch.ones((), device="meta")},
            ValueError,
            r"lr must be on cpu or on the CPU, got meta",
        ),
        ({"lr": -0.1}, ValueError, r"lr must be finite and not negative, got -0.1"),
        ({"lr": math.nan}, ValueError, r"lr must be finite and not negative, got nan"),
        ({"lr": torch.tensor(-0.1)}, ValueError, r"lr must be finite and not negative, got -0.1"),
        (
            {"betas": (0.9, 1.0)},
            ValueError,
            r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)",
        ),
        ({"betas": (0.9, torch.ones(2))}, TypeError, "betas must be two numbers, got"),
        ({"betas": (0.9, torch.tensor(1.0))}, ValueError, r"betas must be two numbers in \[0, 1\)"),
        (
            {"betas": (0.9, torch.tensor(0.9, device="meta"))},
            TypeError,
            "betas must be two numbers, got",
        ),
        ({"betas": (0.9,)}, ValueError, r"betas must be two numbers in \[0, 1\)"),
        ({"lr": torch.tensor([-0.1])}, ValueError, r"lr must be finite and not negative, got -0.1"),
        ({"lr": torch.tensor(1)}, TypeError, r"lr must be float32, .* got torch.int64"),
        ({"eps": -1e-8}, ValueError, r"eps must be finite and not negative, got -1e-08"),
        (
            {"weight_decay": math.inf},
            ValueError,
            r"weight_decay must be finite and not negative, got inf",
        ),
        (
            {"found_inf": torch.zeros(2)},
            ValueError,
            r"found_inf must have one element, got shape \(2,\)",
        ),
        (
            {"found_inf": torch.tensor(False)},
            TypeError,
            r"found_inf must be float32, .* got torch.bool",
        ),
        (
            {"found_inf": torch.zeros((), device="meta")},
            ValueError,
            r"found_inf must be on cpu .* got meta",
        ),
        ({"found_inf": 0.0}, TypeError, r"found_inf must be a tensor, got float"),
        ({"ema_decay": 1.5}, ValueError, r"ema_decay must be between 0 and 1, got 1.5"),
        ({"gradients": [[torch.ones(3)], [None]]}, ValueError, r"weights must be given where"),
        (
            {"coefficients": torch.ones(1, 3)},
            ValueError,
            r"coefficients must have shape \[1 groups or more, 2\], got \(1, 3\)",
        ),
    ],
)
def test_wrong_arguments_raise_before_anything_is_written(change, exception, message):
    param = torch.ones(3)
    arguments = {
        "params": [param],
        "gradients": [[torch.ones(3)]] * 2,
        "coefficients": torch.ones(1, 2),
        "lr": 0.1,
        **new_state([param]),
    }
    with pytest.raises(exception, match=message):
        ops.adamw_step(**{**arguments, **change})
    assert param.tolist() == [1] * 3 and arguments["exp_avgs"][0].tolist() == [0] * 3


@pytest.mark.parametrize(
    ("overlap", "message"),
    [
        (lambda a: {"emas": [a["params"][1], a["emas"][1]]}, r"params\[1\] overlaps emas\[0\]"),
        (lambda a: {"emas": a["params"]}, r"params\[0\] overlaps emas\[0\]"),
        (lambda a: {"emas": [a["params"][0].T, a["emas"][1]]}, r"params\[0\] overlaps emas\[0\]"),
        (lambda a: {"emas": [a["emas"][0]] * 2}, r"emas\[0\] overlaps emas\[1\]"),
        (lambda a: {"params": [a["params"][0]] * 2}, r"params\[0\] overlaps params\[1\]"),
        (lambda a: {"exp_avg_sqs": a["exp_avgs"]}, r"exp_avgs\[0\] overlaps exp_avg_sqs\[0\]"),
        (lambda a: {"exp_avgs": a["gradients"][0]}, r"exp_avgs\[0\] overlaps gradients\[0\]\[0\]"),
        (
            lambda a: {"gradients": [a["gradients"][0], [None, a["params"][0]]]},
            r"params\[0\] overlaps gradients\[1\]\[1\]",
        ),
        (
            lambda a: {"steps": [a["steps"][0], a["params"][1][2, 2]]},
            r"params\[1\] overlaps steps\[1\]",
        ),
        (lambda a: {"lr": a["exp_avgs"][0][0, 0]}, r"exp_avgs\[0\] overlaps lr"),
        (lambda a: {"found_inf": a["emas"][1][0, 0]}, r"emas\[1\] overlaps found_inf"),
        (
            lambda a: {"emas": [torch.zeros(6).as_strided((3, 3), (1, 1)), a["emas"][1]]},
            r"emas\[0\] is written to and must not overlap",
        ),
    ],
)
def test_tensors_that_share_memory_are_refused_before_anything_is_written(overlap, message):
    params = [torch.arange(9.0).view(3, 3), torch.full((3, 3), 2.0)]
    gradients = [[torch.ones(3, 3) for _ in params] for _ in range(2)]
    arguments = {
        "params": params,
        "gradients": gradients,
        "coefficients": torch.ones(1, 2),
        "weights": WEIGHTS,
        "lr": 0.1,
    }
    arguments |= new_state(params)
    arguments |= overlap(arguments)
    written = [
        tensor
        for name in ("params", "exp_avgs", "exp_avg_sqs", "emas")
        for tensor in arguments[name]
    ]
    before = [tensor.clone() for tensor in written]
    with pytest.raises(ValueError, match=message):
        ops.adamw_step(**arguments)
    torch.testing.assert_close(written, before, rtol=0, atol=0)


def test_parts_of_one_buffer_and_unreached_tensors_are_no_overlap():
    columns = torch.rand(5, 8).unbind(1)
    state = {
        "exp_avgs": columns[2:4],
        "exp_avg_sqs": columns[4:6],
        "emas": columns[6:],
        "steps": [torch.ones(())] * 2,
    }
    gradients = [[torch.ones(5), None]] * 2
    copies = {name: [tensor.clone() for tensor in tensors] for name, tensors in state.items()}
    results = []
    for params, tensors in (
        (list(columns[:2]), state),
        ([column.clone() for column in columns[:2]], copies),
    ):
        ops.adamw_step(params, gradients, torch.ones(1, 2), lr=0.1, **tensors)
        results.append([*params, *tensors["exp_avgs"], *tensors["exp_avg_sqs"], *tensors["emas"]])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    unreached = {name: [tensors[0], tensors[0]] for name, tensors in copies.items()}
    ops.adamw_step([results[1][0]] * 2, gradients, torch.ones(1, 2), lr=0.1, **unreached)


# Operator


def operator_arguments(with_emas=True):
    params, p, g = (
        [torch.full((3,), value), torch.full((2, 2), value)] for value in (1.0, 2.0, 3.0)
    )
    p[1] = None
    state = new_state(params)
    emas = state["emas"] if with_emas else []
    coefficients, steps = torch.ones(1, 2, dtype=torch.float64), [torch.ones(())] * 2
    lists = (
        params,
        state["exp_avgs"],
        state["exp_avg_sqs"],
        emas,
        [*p, *g],
        coefficients,
        [0, -1],
        WEIGHTS,
        steps,
    )
    found_inf = torch.zeros(()) if with_emas else None
    return *lists, torch.tensor(0.1), 0.9, 0.999, 1e-8, 0.01, EMA_DECAY, found_inf


@pytest.mark.parametrize("with_emas", [True, False])
def test_opcheck(with_emas):
    torch.library.opcheck(torch.ops.genrep_fast.adamw_step.default, operator_arguments(with_emas))


def test_the_reference_never_asks_the_device():
    # A fake tensor has no values: whatever would synchronise the host with the device raises.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        reference.adamw_step(
            *torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, operator_arguments())
        )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend):
    gradients = gradients_of_steps(3, torch.float32)[2]
    results = []
    for wrap in (
        lambda function: function,
        lambda function: torch.compile(function, fullgraph=True, backend=backend),
    ):
        params = random_tensors(0, torch.float32)
        state = new_state(params)
        wrap(take_step)(params, gradients, state, 0.1, range(len(SHAPES)))
        results.append((params, *state.values()))
    torch.testing.assert_close(results[1], results[0])
