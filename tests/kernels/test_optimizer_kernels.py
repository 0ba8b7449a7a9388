"""The optimizer step on every compiled backend, against the reference.

Also what it shares with alignment: layouts of memory, threads, and capture in a CUDA graph.
"""

import math

import pytest
import torch

from genrep_fast.reference import alignment as alignment_reference
from genrep_fast.reference import optimizer as optimizer_reference
from tensor_list_cases import (
    BF16,
    DEVICE,
    F16,
    F32,
    GRAM_GROUPS,
    GROUPS,
    NUM_GROUPS,
    SIZES,
    assert_accurate,
    assert_equal_bits,
    assert_gram,
    assert_surroundings_untouched,
    copies,
    double,
    long_list,
    losses,
    operators,
    random_coefficients,
    tensors,
)

pytestmark = pytest.mark.usefixtures("backend")


def optimizer_arguments(
    dtypes,
    param_dtype=F32,
    state_dtype=F32,
    *,
    emas=True,
    steps=None,
    lr=0.1,
    beta1=0.9,
    ema_decay=0.99,
    found_inf=None,
):
    state = (
        tensors(param_dtype, seed=10),
        tensors(state_dtype, seed=11, scale=0.1),
        [view.square_() for view in tensors(state_dtype, seed=12, scale=0.1)],
        tensors(state_dtype, seed=13) if emas else [],
    )
    if steps is None:
        steps = [torch.tensor(float(t + 1)) for t in range(len(SIZES))]
    lr = lr if isinstance(lr, torch.Tensor) else torch.tensor(lr, dtype=torch.float64)
    rest = (
        GROUPS,
        [0.7 - 0.2 * i for i in range(len(dtypes))],
        steps,
        lr,
        beta1,
        0.999,
        1e-8,
        0.05,
        ema_decay,
        found_inf,
    )
    return *state, losses(dtypes), random_coefficients(len(dtypes)), *rest


def with_state(arguments, state):
    return *state, *arguments[4:]


STATE = ("params", "exp_avgs", "exp_avg_sqs", "emas")


def assert_stepped(arguments):
    plain = with_state(arguments, [copies(values) for values in arguments[:4]])
    exact = with_state(
        (*arguments[:4], double(arguments[4]), *arguments[5:]),
        [double(values) for values in arguments[:4]],
    )
    optimizer_reference.adamw_step(*plain)
    optimizer_reference.adamw_step(*exact)
    operators.adamw_step(*arguments)
    for i, name in enumerate(STATE):
        if arguments[i]:
            assert_surroundings_untouched(arguments[i])
            assert_accurate(f"{name}, {arguments[i][0].dtype}", arguments[i], plain[i], exact[i])


@pytest.mark.parametrize("emas", [True, False])
@pytest.mark.parametrize(
    ("dtypes", "param_dtype", "state_dtype"),
    [
        ((F32, F32), F32, F32),
        ((BF16, BF16), BF16, BF16),
        ((F16, F16), F16, F32),
        ((F32, BF16), BF16, F32),
        ((F32, BF16, F16), F32, F32),
        ((F32,) * 8, F32, F32),
    ],
)
def test_adamw_step(dtypes, param_dtype, state_dtype, emas, interpreted):
    if interpreted and not emas and state_dtype == F32 and dtypes != (F32, F32):
        pytest.skip("too slow in the interpreter")
    arguments = optimizer_arguments(dtypes, param_dtype, state_dtype, emas=emas)
    assert_stepped(arguments)


@pytest.mark.parametrize(
    "options",
    [
        {
            "steps": [
                torch.tensor(3, dtype=dtype) for dtype in (F32, torch.float64) for _ in range(5)
            ][: len(SIZES)]
        },
        {"steps": [torch.tensor(2.0, device=DEVICE)] * len(SIZES)},
        {"steps": [torch.tensor(2.0, device=DEVICE)] * 3 + [torch.tensor(2.0)] * (len(SIZES) - 3)},
        {"lr": torch.tensor(0.1, device=DEVICE)},
        {
            "lr": torch.tensor(0.1, device=DEVICE),
            "steps": [torch.tensor(2.0, device=DEVICE)] * len(SIZES),
        },
        {"beta1": 0.0, "ema_decay": 0.0},
        {"beta1": 0.3, "ema_decay": 1.0},
        {"found_inf": torch.zeros(1, device=DEVICE)},
    ],
)
def test_adamw_step_takes_scalars_of_any_kind(options):
    arguments = optimizer_arguments((F32, F32), **options)
    assert_stepped(arguments)
    if options.get("ema_decay") == 0.0:
        assert_equal_bits(arguments[3], arguments[0])


@pytest.mark.parametrize("found_inf", [1.0, math.nan])
def test_nothing_is_written_where_an_infinity_was_found(found_inf):
    arguments = optimizer_arguments((F32, F32), found_inf=torch.tensor([found_inf], device=DEVICE))
    before = [copies(values) for values in arguments[:4]]
    operators.adamw_step(*arguments)
    for results, values in zip(arguments[:4], before, strict=True):
        assert_equal_bits(results, values)


def test_the_average_follows_the_parameter_as_stored():
    arguments = optimizer_arguments((BF16, BF16), BF16, F32, ema_decay=0.0)
    operators.adamw_step(*arguments)
    assert_equal_bits(arguments[3], [param.float() for param in arguments[0]])


LAYOUTS = {
    "transposed": lambda values: values.clone().T.contiguous().T,
    "every other": lambda values: torch.stack([values, torch.full_like(values, 7.0)], dim=-1)[
        ..., 0
    ],
    "contiguous": lambda values: values.clone(),
}


@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("first", LAYOUTS)
def test_any_strides(first, second):
    p, g, *state = (
        torch.randn(6, 11, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(6)
    )
    state[2] = state[2].square()
    a, b = LAYOUTS[first](p), LAYOUTS[second](g)
    coefficients = random_coefficients(2, 1)
    assert_gram(operators.gram([a, b], 2, [0], 1), [p, g], 2, [0], 1)
    out, expected = LAYOUTS[second](torch.full_like(p, math.nan)), torch.empty_like(p)
    alignment_reference.combine([p, g], coefficients, [0], [], [expected])
    version = out._version
    operators.combine([a, b], coefficients, [0], [], [out])
    torch.testing.assert_close(out, expected)
    assert out._version > version  # autograd notices
    results = [
        LAYOUTS[name](values)
        for name, values in zip((first, second, first, second), state, strict=True)
    ]
    rest = (
        [p, g],
        coefficients,
        [0],
        [],
        [torch.ones(())],
        torch.tensor(0.1),
        0.9,
        0.99,
        1e-8,
        0.1,
        0.9,
        None,
    )
    optimizer_reference.adamw_step(*([value] for value in state), *rest)
    operators.adamw_step(*([value] for value in results), [a, b], *rest[1:])
    torch.testing.assert_close(results, state, rtol=1e-5, atol=1e-6)


def test_same_bits_every_time():
    gradients = losses((F32, BF16))
    first = operators.gram(gradients, 2, GRAM_GROUPS, NUM_GROUPS)
    arguments = optimizer_arguments((F32, BF16))
    again = with_state(arguments, [copies(values) for values in arguments[:4]])
    operators.adamw_step(*arguments)
    operators.adamw_step(*again)
    assert_equal_bits([first], [operators.gram(gradients, 2, GRAM_GROUPS, NUM_GROUPS)])
    moved = [torch.cat([gradient[:1], gradient])[1:] for gradient in gradients]  # another alignment
    assert_equal_bits([first], [operators.gram(moved, 2, GRAM_GROUPS, NUM_GROUPS)])
    for results, values in zip(arguments[:4], again[:4], strict=True):
        assert_equal_bits(results, values)


@pytest.mark.parametrize("n", [2, 3])
def test_number_of_threads_does_not_change_a_bit(n, backend):
    if backend != "cpu":
        pytest.skip("of the CPU alone")
    gradients = losses((F32, BF16, F32)[:n], sizes=[70_001, 5, 40_000])
    results = []
    previous = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        state = [tensors(F32, seed=seed, sizes=[70_001, 5, 40_000]) for seed in (10, 11, 12, 13)]
        state[2] = [value.square_() for value in state[2]]
        gram = operators.gram(gradients, n, [0, 1, 0], 2)
        operators.adamw_step(
            *state,
            gradients,
            random_coefficients(n),
            [0, 1, -1],
            [0.5] * n,
            [torch.ones(())] * 3,
            torch.tensor(0.1),
            0.9,
            0.99,
            1e-8,
            0.1,
            0.9,
            None,
        )
        results.append([gram, *(value for values in state for value in values)])
    torch.set_num_threads(previous)
    assert_equal_bits(results[0], results[1])
    assert_equal_bits(results[0], results[2])


def long_list_arguments(length, n):
    """Arguments of a step of `length` tensors with a float32 state, and with a float64 one."""

    def arguments(dtype):
        generator = torch.Generator().manual_seed(1)
        sizes, gradients = long_list(length, n)
        draw = lambda size: torch.rand(size, generator=generator).to(DEVICE, dtype)  # noqa: E731
        state = [[draw(size) for size in sizes] for _ in range(4)]
        rest = (
            random_coefficients(n),
            [t % (NUM_GROUPS + 1) - 1 for t in range(len(sizes))],
            [0.5] * n,
            [torch.tensor(float(t % 5 + 1)) for t in range(len(sizes))],
            torch.tensor(0.1, dtype=torch.float64),
        )
        return *state, gradients, *rest, 0.9, 0.999, 1e-8, 0.05, 0.99, None

    return arguments(F32), arguments(torch.float64)


@pytest.mark.parametrize(
    ("n", "length"),
    [(2, 42), (2, 43), (2, 354), (2, 355), (3, 36), (3, 37), (3, 302), (8, 27), (8, 28), (8, 233)],
)
def test_adamw_step_of_long_lists(n, length, compiled):
    arguments, exact = long_list_arguments(length, n)
    optimizer_reference.adamw_step(*exact)
    operators.adamw_step(*arguments)
    for results, values in zip(arguments[:4], exact[:4], strict=True):
        for result, value in zip(results, values, strict=True):
            torch.testing.assert_close(result, value.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("length", "launches"), [(42, 1), (43, 1), (192, 1), (354, 1), (355, 2)])
def test_a_step_of_a_list_is_one_launch(length, launches, recorded_launches):
    lists = [[torch.ones(4, device=DEVICE) for _ in range(length)] for _ in range(4)]
    rest = random_coefficients(2), [0] * length, [], [torch.ones(())] * length, torch.tensor(0.1)
    with recorded_launches() as recorded:
        operators.adamw_step(*lists, lists[0] * 2, *rest, 0.9, 0.999, 1e-8, 0.05, 0.99, None)
    assert [launch.blocks for launch in recorded] == [min(length, 354), 1][:launches]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_step_can_be_replayed():
    steps = [torch.ones((), device=DEVICE) for _ in SIZES]
    arguments = list(
        optimizer_arguments((F32, BF16), steps=steps, lr=torch.tensor(0.1, device=DEVICE))
    )
    gradients = arguments[4]
    gradients[5].zero_()
    arguments[6] = list(range(len(SIZES)))  # rows of the coefficients

    def step(gram, group_gram, coefficients_of, tensor_coefficients, update):
        grams = gram(gradients, 2, list(range(len(SIZES))), len(SIZES))
        coefficients = coefficients_of(group_gram(grams, GROUPS, NUM_GROUPS), [0.7, 0.3], 2.0)[0]
        arguments[5] = tensor_coefficients(coefficients, grams, GROUPS, [0.7, 0.3])
        update(*arguments)

    names = ("gram", "group_gram", "alignment_coefficients", "tensor_coefficients")
    kernels = (*(getattr(operators, name) for name in names), operators.adamw_step)
    initial = [copies(values) for values in arguments[:4]]
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*kernels)  # compiles
    finally:
        torch.cuda.set_sync_debug_mode(previous)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*kernels)
    state = arguments[:4]
    for values, originals in zip(state, initial, strict=True):
        for value, original in zip(values, originals, strict=True):
            value.copy_(original)
    for gradient in gradients:
        gradient.neg_()
    for count in steps:
        count.add_(1)
    graph.replay()
    arguments[:4] = initial
    step(*(getattr(alignment_reference, name) for name in names), optimizer_reference.adamw_step)
    for results, values in zip(state, initial, strict=True):
        torch.testing.assert_close(results, values, rtol=1e-5, atol=1e-6)
