"""Gram matrices, coefficients and combination on every compiled backend, against the reference."""

import math

import pytest
import torch

from genrep_fast.reference import alignment as alignment_reference
from tensor_list_cases import (
    BF16,
    DEVICE,
    DTYPES,
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


@pytest.mark.parametrize("dtypes", DTYPES)
def test_gram(dtypes, interpreted):
    n, groups, sizes = len(dtypes), GRAM_GROUPS, SIZES
    if interpreted and n == 8:
        groups, sizes = [0, 1, 1], [63, 0, 8192 + 5]
    gradients = losses(dtypes, sizes=sizes)
    result = operators.gram(gradients, n, groups, NUM_GROUPS)
    assert_gram(result, gradients, n, groups)


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
    # A program a group: of many groups, or blocks, one number of losses stands for all.
    if interpreted and (num_groups > 500 or name == "several launches") and n != 3:
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


def test_flat_memory_and_a_list_of_whole_chunks_give_the_same_bits():
    flat = [
        torch.randn(4 * 16384, generator=torch.Generator().manual_seed(i)).to(DEVICE)
        for i in range(2)
    ]
    pieces = [piece for tensor in flat for piece in tensor.split(16384)]
    first, second = operators.gram(flat, 2, [0], 1), operators.gram(pieces, 2, [0] * 4, 1)
    assert_equal_bits([first], [second])


# Tensors of one launch on CUDA, of the kernels for short lists and of those for long ones, and one
# more.
LONG = {2: (88, 89, 740, 741, 829), 3: (65, 66, 542, 543), 8: (42, 43, 354, 355)}
LONG_GRAM = {2: (108, 109, 904, 905), 3: (75, 76, 627), 8: (46, 47, 388)}


@pytest.mark.parametrize(("n", "length"), [(n, length) for n in LONG for length in LONG[n]])
def test_combine_of_long_lists(n, length, compiled):
    sizes, gradients = long_list(length, n)
    coefficients, weights = random_coefficients(n), [0.7 - 0.2 * i for i in range(n)]
    groups = [t % (NUM_GROUPS + 1) - 1 for t in range(len(sizes))]
    out, expected = (
        [
            torch.full((size,), math.nan, device=DEVICE, dtype=F16 if t % 4 == 0 else F32)
            for t, size in enumerate(sizes)
        ]
        for _ in range(2)
    )
    alignment_reference.combine(gradients, coefficients, groups, weights, expected)
    operators.combine(gradients, coefficients, groups, weights, out)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("n", "length"), [(n, length) for n in LONG_GRAM for length in LONG_GRAM[n]]
)
def test_gram_of_long_lists(n, length, compiled):
    sizes, gradients = long_list(length, n)
    groups = [t % NUM_GROUPS for t in range(len(sizes))]
    assert_gram(operators.gram(gradients, n, groups, NUM_GROUPS), gradients, n, groups)


@pytest.mark.parametrize(
    ("length", "launches"), [(88, 1), (89, 1), (192, 1), (740, 1), (741, 2), (829, 2)]
)
def test_a_list_is_one_launch(length, launches, recorded_launches):
    x = torch.ones(4, device=DEVICE)
    row, zeros = torch.ones(1, 2, dtype=torch.float64, device=DEVICE), [0] * length
    with recorded_launches() as recorded:
        operators.combine([x] * 2 * length, row, zeros, [], [x.clone() for _ in zeros])
    assert [launch.blocks for launch in recorded] == [min(length, 740), length - 740][:launches]


@pytest.mark.parametrize(("length", "launches"), [(108, 1), (109, 1), (905, 2)])
def test_gram_of_a_list_is_one_launch(length, launches, recorded_launches):
    x = torch.ones(4, device=DEVICE)
    with recorded_launches() as recorded:
        operators.gram([x] * 2 * length, 2, [0] * length, 1)
    assert [launch.blocks for launch in recorded[:-1]] == [min(length, 904), 1][:launches]
    assert recorded[-1].kernel == "alignment_gram_reduction_kernel" and recorded[-1].blocks == 1
