"""Every operator on every compiled backend that can run here, against the reference.

Without a GPU these are the C++ kernels, and the Triton kernels in Triton's interpreter (chosen in
conftest.py); with one, Triton and CUDA C++. Tensors are views of odd sizes into larger buffers,
whose surroundings must stay as they are.
"""

import math

import pytest
import torch

from genrep_fast.reference import alignment as alignment_reference
from genrep_fast.reference import optimizer as optimizer_reference

pytestmark = pytest.mark.usefixtures("backend")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# The second of 256 is unaligned, the last one is of several chunks.
SIZES = [1, 63, 0, 127, 129, 1009, 256, 256, 2 * 16384 + 5]
GROUPS = [0, 1, 1, -1, 3, 0, 0, 1, 3]  # group 2 is empty
NUM_GROUPS = 5
DTYPES = [
    (F32, F32),
    (BF16, BF16),
    (F16, F16),
    (F32, BF16),
    (BF16, F16),
    (F32, BF16, F16),
    (F32,) * 8,
]
operators = torch.ops.genrep_fast


def tensors(dtype, *, seed, scale=1.0, shift=0.0, sizes=SIZES):
    """Views into larger buffers, the first of each size aligned; the rest of the buffers must stay
    7.
    """
    generator = torch.Generator().manual_seed(seed)
    views = []
    for t, size in enumerate(sizes):
        first = 1 if size in sizes[:t] else 0
        buffer = torch.full((size + 65,), 7.0, dtype=dtype, device=DEVICE)
        view = buffer[first : first + size]
        view.copy_(scale * torch.randn(size, generator=generator, dtype=torch.float64) + shift)
        views.append(view)
    return views


def losses(dtypes, **options):
    return [
        tensor
        for i, dtype in enumerate(dtypes)
        for tensor in tensors(dtype, seed=i, shift=0.2 * i, **options)
    ]


def double(values):
    return [None if value is None else value.double() for value in values]


def copies(values):
    """Copies whose surroundings and alignment are those of the originals."""
    return [
        value._base.clone()[value.storage_offset() : value.storage_offset() + len(value)]
        for value in values
    ]


def assert_surroundings_untouched(values):
    for value in values:
        before, after = (
            value._base[: value.storage_offset()],
            value._base[value.storage_offset() + len(value) :],
        )
        assert (before == 7).all() and (after == 7).all()


def norm(values):
    return math.sqrt(sum(value.double().square().sum().item() for value in values))


def difference(results, exact):
    return norm(
        [result.double() - value.double() for result, value in zip(results, exact, strict=True)]
    )


def assert_accurate(name, results, plain, exact):
    """At most twice the error of the plain formula in the same dtype, and an eighth of a rounding,
    as it may be exact by chance.
    """
    error, plain_error = (
        difference(results, exact) / norm(exact),
        difference(plain, exact) / norm(exact),
    )
    bound = 2 * plain_error + torch.finfo(results[0].dtype).eps / 8
    print(f"{name}: error {error:.1e}, plain formula {plain_error:.1e}, bound {bound:.1e}")
    assert error <= bound


def assert_equal_bits(results, expected):
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result.view(torch.uint8), value.view(torch.uint8))


# Gram matrices

GRAM_GROUPS = [max(group, 0) for group in GROUPS]


def assert_gram(result, gradients, n, groups=GRAM_GROUPS, num_groups=NUM_GROUPS):
    expected = alignment_reference.gram(double(gradients), n, groups, num_groups)
    scale = expected.diagonal(dim1=1, dim2=2).sqrt()  # [G, n]
    error = (
        ((result - expected).abs() / (scale[:, :, None] * scale[:, None, :]))
        .nan_to_num(nan=0)
        .max()
        .item()
    )
    print(f"error {error:.1e}")
    assert result.dtype == torch.float64 and result.shape == expected.shape
    # Products of float32 are summed in float32 up to 16 at a time ("cpu", "cuda"), or in float64.
    assert error < 2e-7 and torch.equal(result == 0, expected == 0)
    assert torch.equal(result, result.mT)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_gram(dtypes):
    gradients = losses(dtypes)
    assert_gram(
        operators.gram(gradients, len(dtypes), GRAM_GROUPS, NUM_GROUPS), gradients, len(dtypes)
    )


def test_gram_of_tensors_that_differ_in_dtype_and_presence():
    T = len(SIZES)
    gradients = losses((F32, BF16, F16))
    gradients[T:] = [*gradients[2 * T :], *gradients[T : 2 * T]]
    gradients[3], gradients[T + 8], gradients[2 * T + 3] = gradients[T + 3].float(), None, None
    for t in (0, 1):
        gradients[t] = gradients[T + t] = None
    gradients[5] = gradients[T + 5] = gradients[2 * T + 5] = None  # no loss reaches it
    assert_gram(operators.gram(gradients, 3, GRAM_GROUPS, NUM_GROUPS), gradients, 3)


def test_gram_of_extreme_values():
    for dtype, value in ((BF16, 3e19), (F32, 1e-25), (F16, 6e4), (F32, 3e38), (F32, 1e-45)):
        gradients = [
            torch.full((300,), sign * value, dtype=dtype, device=DEVICE) for sign in (1, -1)
        ]
        square = gradients[0][0].double().item() ** 2
        expected = torch.tensor([[300.0, -300.0], [-300.0, 300.0]], dtype=torch.float64) * square
        torch.testing.assert_close(
            operators.gram(gradients, 2, [0], 1)[0].cpu(), expected, rtol=1e-14, atol=0
        )


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-25, 1e25])
def test_gram_of_blocks_of_other_sizes(value):
    # Blocks that need another treatment, or none, beside ordinary ones: label embeddings have many
    # rows of zeros.
    gradients = [tensor for tensor in losses((F32, F32), sizes=[9001])]
    gradients[0][100:5000], gradients[1][3000:9000] = value, 3 * value
    assert_gram(operators.gram(gradients, 2, [0], 1), gradients, 2, [0], 1)


def test_arguments_that_would_leave_memory_are_refused(backend):
    if backend == "triton":
        pytest.skip("its table of tensors holds no others")
    x, row = torch.ones(8, device=DEVICE), torch.ones(1, 2, dtype=torch.float64, device=DEVICE)
    for arguments in (
        ([x, x], row, [1], [0.5, 0.5], [x]),
        ([x, x], row, [-1], [], [x]),
        ([x, x], row.float(), [0], [], [x]),
        ([x, x], row, [0], [], [x[:4]]),
        ([x, x], row, [0], [], []),
        ([x, x[:4]], row, [0], [], [x]),
    ):
        with pytest.raises(RuntimeError):
            operators.combine(*arguments)
    with pytest.raises(RuntimeError, match="groups must be"):
        operators.gram([x, x], 2, [3], 1)
    with pytest.raises(RuntimeError, match="gram must be"):
        operators.alignment_coefficients(torch.ones(1, 2, 2, device=DEVICE), [0.7, 0.3], 2.0)


def test_a_nan_stays_in_its_group_and_in_its_gradient():
    p, g = ([torch.ones(100, device=DEVICE) for _ in range(3)] for _ in range(2))
    p[1][99] = math.nan
    g[2][3] = math.inf
    p[2] = None
    result = operators.gram([*p, *g], 2, [0, 1, 0], 2)
    assert result[0].tolist() == [[100, 100], [100, math.inf]]
    assert result[1].isnan().tolist() == [[True, True], [True, False]]


def test_gram_without_elements():
    empty = [torch.empty(0, device=DEVICE)] * 2
    assert operators.gram(empty, 2, [1], 3).tolist() == [[[0, 0], [0, 0]]] * 3


@pytest.mark.parametrize(
    "dtypes", [(F32, F32), (F32, BF16), (BF16, F16), (F32, F16, BF16), (F32, BF16, F32), (F32,) * 8]
)
def test_gram_is_zero_where_every_element_is_and_nowhere_else(dtypes, interpreted):
    # The last loss has one element that is not zero, the smallest of its dtype: among 10^5 that
    # are, or two chunks in the interpreter, and at the ends of small tensors.
    if interpreted and len(dtypes) == 8:
        pytest.skip("too slow in the interpreter")
    smallest = {F32: 1e-45, BF16: 2.0**-133, F16: 2.0**-24}[dtypes[-1]]
    largest, place = (20_003, 17_777) if interpreted else (100_003, 77_777)
    sizes, places = [largest, 5, 63, 63, 20_001], [place, 4, 0, 62, None]
    gradients = losses(dtypes, sizes=sizes)
    last = gradients[-len(sizes) :]
    for tensor, place in zip(last, places, strict=True):
        tensor.zero_()
        if place is not None:
            tensor[place] = -smallest
    squares = operators.gram(gradients, len(dtypes), list(range(len(sizes))), len(sizes)).diagonal(
        dim1=1, dim2=2
    )
    square = last[1][4].double().item() ** 2
    assert square > 0 and squares[:, -1].tolist() == [*[square] * 4, 0]
    assert (squares[:, :-1] > 0).all()


# Gram matrices of groups, and coefficients of tensors


def own_matrices(num_tensors, n):
    """Gram matrices [T, n, n] of tensors; some losses do not reach some of them, and some have a
    NaN or an infinity.
    """
    factors = torch.randn(
        num_tensors, n, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64
    )
    factors *= 10 ** torch.linspace(-3, 3, num_tensors, dtype=torch.float64)[:, None, None]
    for t, loss in enumerate(range(0, 3 * n)):
        factors[5 * t + 1, loss % n] = -0.0 if t % 2 else 0.0
    factors[2] = 0
    matrices = factors @ factors.mT
    matrices[3, 0, 0], matrices[4, n - 1, n - 1], matrices[6, n - 1, n - 1] = (
        5e-324,
        math.nan,
        math.inf,
    )
    matrices[7, 0, :] = matrices[7, :, 0] = math.nan
    matrices[7, n - 1, n - 1] = 0  # no part of its group, whatever the NaN
    matrices[8, 0, 0] = -0.0
    return matrices.to(DEVICE)


GROUPINGS = {  # a name -> groups of 120 tensors or more, number of groups
    "one": ([0] * 2500, 1),
    "few": ([(7 * t) % 9 - 1 for t in range(120)], 10),  # the last one is empty
    "several launches": ([t % 3 - 1 if t < 1900 else 5 for t in range(2500)], 7),
    "a tensor": (list(range(520)), 520),
    "empty ones between": ([130 * (t % 5) for t in range(120)], 560),
    "none": ([-1] * 120, 3),
    "no groups": ([-1] * 120, 0),
}


# Of the interpreter, inf - inf.
@pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning")
@pytest.mark.parametrize("name", GROUPINGS)
@pytest.mark.parametrize("n", [2, 3, 8])
def test_group_gram(n, name, interpreted):
    groups, num_groups = GROUPINGS[name]
    # A program a group: of many groups one number of losses stands for all.
    if interpreted and num_groups > 500 and n != 3:
        pytest.skip("too slow in the interpreter")
    if interpreted and name == "a tensor":
        groups, num_groups = groups[:130], 130
    grams = own_matrices(len(groups), n)
    expected = alignment_reference.group_gram(grams, groups, num_groups)
    result = operators.group_gram(grams, groups, num_groups)
    assert result.dtype == torch.float64 and result.shape == (num_groups, n, n)
    # Sums in another order: up to a rounding of the largest entry for each of the tensors.
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-6, equal_nan=True)
    assert torch.equal(result == 0, expected == 0)
    assert_equal_bits([result], [operators.group_gram(grams, groups, num_groups)])
    transposed = grams.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert_equal_bits([result], [operators.group_gram(transposed, groups, num_groups)])


@pytest.mark.parametrize("name", GROUPINGS)
@pytest.mark.parametrize("n", [2, 3, 8])
def test_tensor_coefficients(n, name):
    groups, num_groups = GROUPINGS[name]
    grams, coefficients = own_matrices(len(groups), n), random_coefficients(n, num_groups)
    if num_groups > 1:
        coefficients[1] = math.nan
    weights = [0.7 - 0.2 * i for i in range(n)]
    expected = alignment_reference.tensor_coefficients(coefficients, grams, groups, weights)
    for layout in (grams, grams.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        assert_equal_bits(
            [operators.tensor_coefficients(coefficients, layout, groups, weights)], [expected]
        )


def test_no_tensors():
    none = torch.empty(0, 3, 3, dtype=torch.float64, device=DEVICE)
    assert operators.group_gram(none, [], 2).tolist() == [[[0] * 3] * 3] * 2
    assert operators.group_gram(none, [], 0).shape == (0, 3, 3)
    assert operators.tensor_coefficients(random_coefficients(3), none, [], [1.0] * 3).shape == (
        0,
        3,
    )


def test_wrong_matrices_and_groups_are_refused(backend):
    grams = torch.ones(2, 2, 2, dtype=torch.float64, device=DEVICE)
    row, weights = torch.ones(1, 2, dtype=torch.float64, device=DEVICE), [0.5, 0.5]
    for groups in ([0, 1], [-2, 0]):
        with pytest.raises((RuntimeError, ValueError), match="groups must be"):
            operators.group_gram(grams, groups, 1)
        with pytest.raises((RuntimeError, ValueError), match="groups must be"):
            operators.tensor_coefficients(row, grams, groups, weights)
    if backend == "triton":
        return  # checks nothing else
    for arguments in (
        (grams.float(), [0, 0], 1),
        (grams[0], [0, 0], 1),
        (grams[:, :1], [0, 0], 1),
        (grams, [0], 1),
    ):
        with pytest.raises(RuntimeError):
            operators.group_gram(*arguments)
    for arguments in (
        (row.float(), grams, [0, 0], weights),
        (row[0], grams, [0, 0], weights),
        (row[:, :1], grams, [0, 0], weights),
        (row, grams.float(), [0, 0], weights),
        (row, grams, [0], weights),
        (row, grams, [0, 0], []),
        (row, grams, [0, 0], [1.0] * 3),
    ):
        with pytest.raises(RuntimeError):
            operators.tensor_coefficients(*arguments)


def combine_shared(gradients, n, groups, num_groups, weights, out):
    """Gradients as combined with coefficients of their groups, the sums of each row of the matrix
    over its trace; and the matrices.
    """
    num_tensors = len(groups)
    grams = operators.gram(gradients, n, list(range(num_tensors)), num_tensors)
    matrices = operators.group_gram(grams, groups, num_groups)
    coefficients = matrices.sum(2) / matrices.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    rows = operators.tensor_coefficients(coefficients, grams, groups, weights)
    operators.combine(gradients, rows, list(range(num_tensors)), [], out)
    return matrices


@pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning")
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F16), (F32, BF16, F16), (F32,) * 8])
def test_zeros_are_combined_as_if_they_were_missing(dtypes, interpreted):
    n, T = len(dtypes), len(SIZES)
    if interpreted and n == 8:
        pytest.skip("too slow in the interpreter")
    gradients, weights = losses(dtypes), [0.7 - 0.2 * i for i in range(n)]
    for i, t, value in ((0, 5, 0.0), (n - 1, 6, -0.0), (0, 7, 0.0), (n - 1, 7, 0.0), (0, 8, 0.0)):
        gradients[i * T + t].fill_(value)
    # Of a tensor without a group, and beside zeros.
    gradients[3][100] = gradients[(n - 1) * T + 8][-1] = math.nan
    # The third is empty.
    shared = [
        group if group >= 0 and t not in (2, 5, 6, 7, 8) else -1 for t, group in enumerate(GROUPS)
    ]
    out, expected = tensors(F32, seed=8, scale=math.nan), tensors(F32, seed=8, scale=math.nan)
    matrices = combine_shared(gradients, n, GROUPS, NUM_GROUPS, weights, out)
    counted = [t for t, group in enumerate(shared) if group >= 0]
    chosen = [gradients[i * T + t] for i in range(n) for t in counted]
    exact = alignment_reference.gram(chosen, n, [shared[t] for t in counted], NUM_GROUPS)
    torch.testing.assert_close(matrices, exact, rtol=2e-7, atol=2e-7 * exact.max().item())
    coefficients = exact.sum(2) / exact.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    alignment_reference.combine(gradients, coefficients, shared, weights, expected)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert not torch.cat(out[4:8]).isnan().any() and out[7].count_nonzero() == (
        0 if n == 2 else len(out[7])
    )
    assert_surroundings_untouched(out)


# Coefficients


# Of the interpreter, at zeros.
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("power", [0.0, 0.5, 2.0, 7.3])
@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, 0.0]])
def test_alignment_coefficients(weights, power):
    # More groups than a block holds.
    vectors = torch.randn(
        150, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    vectors *= 10 ** torch.linspace(-70, 70, 150, dtype=torch.float64)[:, None, None]
    vectors[3, 1] = vectors[4, 0] = vectors[5] = 0
    vectors[6, 1] = vectors[6, 0]
    vectors[7, 0, 0], vectors[8, 1, 0] = math.nan, math.inf
    gram = (vectors @ vectors.mT).to(DEVICE)
    for layout in (gram, gram.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        results = operators.alignment_coefficients(layout, weights, power)
        for result, expected in zip(
            results, alignment_reference.alignment_coefficients(layout, weights, power), strict=True
        ):
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_coefficients_of_opposite_gradients():
    # Rounding puts some of these cosines outside -1 to 1; the root of what is then negative would
    # be NaN.
    vector = torch.randn(200, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pairs = torch.stack([vector, -3.7 * vector], dim=1)
    gram = (pairs @ pairs.mT).to(DEVICE)
    squares, dot = gram.diagonal(dim1=1, dim2=2), gram[:, 0, 1]
    assert (dot / squares[:, 0].sqrt() / squares[:, 1].sqrt() < -1).any()
    coefficients, cosine, alpha = operators.alignment_coefficients(gram, [0.7, 0.3], 0.5)
    assert cosine.min() == -1 and alpha.min() == 0
    expected = torch.tensor([0.7 + 0.3 * 3.7, 0.3 + 0.7 / 3.7], dtype=torch.float64)
    # The root of a rounding error is 1e-8.
    torch.testing.assert_close(coefficients.cpu(), expected.expand(200, 2), rtol=1e-7, atol=0)


def test_no_groups():
    none = torch.empty(0, 2, 2, dtype=torch.float64, device=DEVICE)
    assert [len(result) for result in operators.alignment_coefficients(none, [0.7, 0.3], 2.0)] == [
        0,
        0,
        0,
    ]


# Combination


def random_coefficients(n, num_groups=NUM_GROUPS):
    """Coefficients [num_groups, n], not contiguous."""
    generator = torch.Generator().manual_seed(9)
    return torch.randn(n, num_groups, generator=generator, dtype=torch.float64).to(DEVICE).T


def assert_combined(gradients, n, out, num_groups=NUM_GROUPS, groups=GROUPS):
    coefficients, weights = random_coefficients(n, num_groups), [0.7 - 0.2 * i for i in range(n)]
    plain, exact = copies(out), double(out)
    alignment_reference.combine(gradients, coefficients, groups, weights, plain)
    alignment_reference.combine(double(gradients), coefficients, groups, weights, exact)
    operators.combine(gradients, coefficients, groups, weights, out)
    assert_surroundings_untouched(out)
    assert_accurate(f"{out[0].dtype}", out, plain, exact)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("out_dtype", [F32, BF16, F16])
def test_combine(dtypes, out_dtype):
    assert_combined(losses(dtypes), len(dtypes), tensors(out_dtype, seed=8, scale=math.nan))


def test_combine_of_tensors_that_differ_in_dtype_and_presence():
    gradients = losses((F32, BF16))
    gradients[1] = gradients[len(SIZES) + 8] = None
    gradients[3] = gradients[3].half()
    gradients[6][0] = math.nan
    out = tensors(F32, seed=8, scale=math.nan)
    out[4] = tensors(BF16, seed=8)[4]
    coefficients = random_coefficients(2)
    expected = copies(out)
    alignment_reference.combine(gradients, coefficients, GROUPS, [0.5, 0.25], expected)
    operators.combine(gradients, coefficients, GROUPS, [0.5, 0.25], out)
    for result, value in zip(out, expected, strict=True):
        torch.testing.assert_close(result, value, equal_nan=True)


@pytest.mark.parametrize("alias", [0, 1])
def test_out_may_be_an_input(alias):
    T = len(SIZES)
    gradients = losses((F32, F32))
    out = tensors(F32, seed=8, scale=math.nan)
    coefficients = random_coefficients(2)
    operators.combine(gradients, coefficients, GROUPS, [0.7, 0.3], out)
    operators.combine(
        gradients, coefficients, GROUPS, [0.7, 0.3], gradients[alias * T : (alias + 1) * T]
    )
    assert_equal_bits(gradients[alias * T : (alias + 1) * T], out)


def test_combine_without_weights_and_without_groups():
    p, g = torch.ones(10, device=DEVICE), torch.full((10,), 2.0, device=DEVICE)
    out = torch.full((10,), math.nan, device=DEVICE)
    # Not contiguous.
    transposed = torch.tensor([[3.0], [0.5]], dtype=torch.float64, device=DEVICE).T
    operators.combine([p, g], transposed, [0], [], [out])
    assert out.tolist() == [4] * 10
    operators.combine(
        [p, g], torch.empty(0, 2, dtype=torch.float64, device=DEVICE), [-1], [2.0, 0.25], [out]
    )
    assert out.tolist() == [2.5] * 10


# Optimizer step


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
def test_adamw_step(dtypes, param_dtype, state_dtype, emas):
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


# Memory that is not flat

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


# Repeated and captured


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


def test_flat_memory_and_a_list_of_whole_chunks_give_the_same_bits():
    flat = [
        torch.randn(4 * 16384, generator=torch.Generator().manual_seed(i)).to(DEVICE)
        for i in range(2)
    ]
    pieces = [piece for tensor in flat for piece in tensor.split(16384)]
    first, second = operators.gram(flat, 2, [0], 1), operators.gram(pieces, 2, [0] * 4, 1)
    assert_equal_bits([first], [second])


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
