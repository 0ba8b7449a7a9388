"""Gradient alignment against an explicit parallel/orthogonal decomposition, exact sums and plain
loops.
"""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import genrep_fast as gf
from genrep_fast.reference import alignment as reference

WEIGHTS, POWER = (0.7, 0.3), 2.0
SHAPES = [(1,), (63,), (), (127, 1), (0,), (7, 19), (129,), (2, 3, 5), (1009,)]
GROUPS = [0, 1, 1, None, 2, 0, 1, 2, None]


def random_gradients(shapes=SHAPES, *, seed, dtype=torch.float64, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(shape, generator=generator, dtype=torch.float64) + shift).to(dtype)
        for shape in shapes
    ]


def gradient_pair(shapes=SHAPES, **options):
    return random_gradients(shapes, seed=1, **options), random_gradients(
        shapes, seed=2, shift=0.3, **options
    )


def flatten(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def decomposed(p, g, weights=WEIGHTS, power=POWER):
    """The method as it is told: project, damp by rho, recombine; in the dtype of the vectors p and
    g.
    """
    rho = ((1 + torch.nn.functional.cosine_similarity(p, g, dim=0)) / 2) ** power

    def damped(a, b):
        parallel = (a @ b) / (b @ b) * b
        return (a - parallel) + rho * parallel

    return weights[0] * damped(p, g) + weights[1] * damped(g, p)


def relative_error(result, expected):
    expected = expected.double()
    return ((result.double() - expected).norm() / expected.norm()).item()


# Results


@pytest.mark.parametrize("power", [0, 0.5, 2.0, 7.0])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 0.0), (2.0, 5.0)])
@pytest.mark.parametrize("sign", [1, -1])
def test_equals_the_decomposition(weights, power, sign):
    p, g = gradient_pair()
    g = [sign * tensor for tensor in g]
    aligned, stats = gf.align_gradients(p, g, weights=weights, power=power)
    assert [tensor.shape for tensor in aligned] == [tensor.shape for tensor in p]
    assert (
        relative_error(flatten(aligned), decomposed(flatten(p), flatten(g), weights, power)) < 1e-12
    )
    cosine = flatten(p) @ flatten(g) / flatten(p).norm() / flatten(g).norm()
    torch.testing.assert_close(stats.cosine, cosine[None], rtol=1e-12, atol=0)
    torch.testing.assert_close(stats.alpha, ((1 + cosine[None]) / 2) ** power, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        stats.norms, torch.stack([flatten(p).norm(), flatten(g).norm()])[None], rtol=1e-12, atol=0
    )


def test_groups_are_aligned_apart_and_the_rest_is_summed():
    p, g = gradient_pair()
    p[5], g[7], p[8] = None, None, None  # one-sided tensors, the last one without a group
    aligned, stats = gf.align_gradients(p, g, groups=GROUPS)
    for group in range(3):
        members = [t for t, index in enumerate(GROUPS) if index == group and t not in (5, 7)]
        vectors = [flatten([tensors[t] for t in members]) for tensors in (p, g, aligned)]
        if len(vectors[0]) == 0:
            assert stats.norms[group].tolist() == [0, 0] and stats.coefficients[
                group
            ].tolist() == list(WEIGHTS)
            continue
        assert relative_error(vectors[2], decomposed(*vectors[:2])) < 1e-12
        mixture = (
            stats.coefficients[group, 0] * vectors[0] + stats.coefficients[group, 1] * vectors[1]
        )
        assert relative_error(vectors[2], mixture) < 1e-12
    torch.testing.assert_close(aligned[3], 0.7 * p[3] + 0.3 * g[3], rtol=1e-14, atol=0)
    for t, expected in ((5, 0.3 * g[5]), (7, 0.7 * p[7]), (8, 0.3 * g[8])):
        torch.testing.assert_close(aligned[t], expected, rtol=0, atol=0)


@pytest.mark.parametrize("groups", [[0, 1, 2], [2, 0, 1], [1, None, 0], [0, 2, 3]])
def test_a_tensor_that_is_a_group_of_its_own_is_aligned_as_if_alone(groups):
    p, g = gradient_pair([(7,), (2, 3), (5,)])
    # One loss does not reach it.
    g[2] = torch.zeros_like(p[2])
    aligned, stats = gf.align_gradients(p, g, weights=WEIGHTS, groups=groups)
    for t, group in enumerate(groups):
        if group is None:
            torch.testing.assert_close(aligned[t], WEIGHTS[0] * p[t] + WEIGHTS[1] * g[t])
            continue
        alone, of_alone = gf.align_gradients(p[t : t + 1], g[t : t + 1], weights=WEIGHTS)
        torch.testing.assert_close(aligned[t], alone[0], rtol=0, atol=0)
        torch.testing.assert_close(stats.coefficients[group], of_alone.coefficients[0])


def test_each_part_orthogonal_to_the_other_gradient_is_kept():
    p, g = (flatten(tensors) for tensors in gradient_pair())
    for kept, other, weights in ((p, g, (1, 0)), (g, p, (0, 1))):
        (aligned,), stats = gf.align_gradients([p], [g], weights=weights)
        assert (
            abs((aligned @ other - stats.alpha[0] * (kept @ other)).item())
            < 1e-12 * (kept.norm() * other.norm()).item()
        )
        (orthogonal,), _ = gf.align_gradients([p], [g], weights=weights, power=1e4)  # rho = 0
        assert abs((orthogonal @ other).item()) < 1e-12 * (orthogonal.norm() * other.norm()).item()


@pytest.mark.parametrize(
    ("generation", "cosine", "alpha", "expected"),
    [
        ([6.0, 8.0], 1, 1, [3.9, 5.2]),  # parallel: the weighted sum
        ([-6.0, -8.0], -1, 0, [0.0, 0.0]),  # opposite: nothing but parallel parts, all damped away
        ([-4.0, 3.0], 0, 0.25, [0.9, 3.7]),  # orthogonal: nothing to damp
        ([0.0, 0.0], 0, 0.25, [2.1, 2.8]),  # zero: the weighted sum
    ],
)
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e15])
def test_special_directions(generation, cosine, alpha, expected, scale):
    p, g, expected = (
        torch.tensor(vector, dtype=torch.float64) for vector in ([3, 4], generation, expected)
    )
    p, g = p * scale, g * scale
    for first, second, weights in ((p, g, WEIGHTS), (g, p, WEIGHTS[::-1])):
        (aligned,), stats = gf.align_gradients([first], [second], weights=weights)
        torch.testing.assert_close(aligned / scale, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stats.cosine.item(), float(cosine), rtol=0, atol=1e-15)
        torch.testing.assert_close(stats.alpha.item(), float(alpha), rtol=0, atol=1e-15)


@pytest.mark.parametrize("scale", [1e-100, 1e-10, 1e15, 1e100])
def test_coefficients_do_not_change_when_both_gradients_are_scaled(scale):
    p, g = gradient_pair()
    _, stats = gf.align_gradients(p, g)
    _, scaled = gf.align_gradients(
        [scale * tensor for tensor in p], [scale * tensor for tensor in g]
    )
    torch.testing.assert_close(scaled.coefficients, stats.coefficients, rtol=1e-12, atol=0)


def test_both_gradients_zero_give_zero():
    zeros = [torch.zeros(5)]
    (aligned,), stats = gf.align_gradients(zeros, zeros)
    assert aligned.tolist() == [0] * 5
    assert stats.coefficients.tolist() == [list(WEIGHTS)] and stats.cosine.tolist() == [0]


def test_a_nan_reaches_its_own_group_alone():
    p, g = [torch.ones(3), torch.ones(3)], [torch.ones(3), torch.tensor([1.0, math.nan, 1.0])]
    aligned, stats = gf.align_gradients(p, g, groups=[0, 1])
    assert aligned[0].tolist() == [1] * 3
    assert aligned[1].isnan().all() and stats.coefficients.isnan().tolist() == [
        [False] * 2,
        [True] * 2,
    ]


def test_parallel_gradients_never_leave_the_range_of_the_cosine():
    # Rounding puts the cosine of some of these a few 1e-16 outside -1 to 1; a fractional power of
    # what is then negative would be NaN.
    p = random_gradients([(3,)] * 200, seed=3)
    _, stats = gf.align_gradients(
        p, [-3.7 * tensor for tensor in p], power=0.5, groups=list(range(200))
    )
    assert stats.cosine.min() >= -1 and not stats.alpha.isnan().any()


def test_norm_of_the_result_follows_from_the_gram_matrix():
    p, g = gradient_pair()
    aligned, stats = gf.align_gradients(p, g)
    c, matrix = stats.coefficients[0], gf.gram(p, g)[0]
    torch.testing.assert_close((c @ matrix @ c).sqrt(), flatten(aligned).norm(), rtol=1e-12, atol=0)


# Losses that do not reach a tensor

REACHED_GROUPS = [0, 0, 0, 1, 1, 1, None, 0, 1, 2]
REACHED_SHAPES = [(5,), (63,), (7, 3), (129,), (1,), (4, 5), (9,), (11,), (2, 2), (6,)]
UNREACHED = {  # losses -> tensors that they do not reach; tensor 9 is its group's only one
    (0,): [1, 9],
    (1,): [3, 6],
    (0, 1): [7],
}


def with_unreached(gradients, replace):
    """The gradients of losses, those of UNREACHED replaced; a third loss and further ones reach
    everything but tensor 2.
    """
    gradients = [list(tensors) for tensors in gradients]
    for losses, indices in UNREACHED.items():
        for loss in losses:
            for t in indices:
                gradients[loss][t] = replace(gradients[loss][t])
    for tensors in gradients[2:]:
        tensors[2] = replace(tensors[2])
    return gradients


def negative_zeros(tensor):
    return -torch.zeros_like(tensor)


@pytest.mark.parametrize(
    "replace", [torch.zeros_like, negative_zeros], ids=["zeros", "negative zeros"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_are_as_good_as_none(dtype, replace):
    pair = gradient_pair(REACHED_SHAPES, dtype=dtype)
    zeros, missing = with_unreached(pair, replace), with_unreached(pair, lambda tensor: None)
    aligned, stats = gf.align_gradients(*zeros, groups=REACHED_GROUPS)
    expected, expected_stats = gf.align_gradients(*missing, groups=REACHED_GROUPS)
    torch.testing.assert_close(vars(stats), vars(expected_stats), rtol=1e-15, atol=0)
    for t, (result, value) in enumerate(zip(aligned, expected, strict=True)):
        if t in UNREACHED[0, 1]:
            assert result.dtype == dtype and result.count_nonzero() == 0 and value is None
        else:
            torch.testing.assert_close(result, value, rtol=0, atol=0)
    # What the shared tensors alone say.
    p, g = (flatten([tensors[t].double() for t in (4, 5, 8)]) for tensors in pair)
    cosine = p @ g / p.norm() / g.norm()
    torch.testing.assert_close(stats.cosine[1], cosine, rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.norms[1], torch.stack([p.norm(), g.norm()]), rtol=1e-6, atol=0)
    result = flatten([aligned[t] for t in (4, 5, 8)])
    assert relative_error(result, decomposed(p, g)) < 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        aligned[3], (0.7 * pair[0][3].double()).to(dtype), rtol=torch.finfo(dtype).eps, atol=0
    )
    # Nothing of it is shared.
    assert stats.norms[2].tolist() == [0, 0] and stats.coefficients[2].tolist() == list(WEIGHTS)


@pytest.mark.parametrize("value", [5e-324, 1e-170])
def test_a_float64_gradient_whose_square_vanishes_is_reached(value):
    tiny = torch.zeros(1000, dtype=torch.float64)
    tiny[777] = -value
    with gf.use_backend("reference"):
        matrices = torch.ops.genrep_fast.gram([tiny, 0 * tiny, tiny + 1, tiny + 1], 2, [0, 1], 2)
    assert (matrices[0].diagonal() > 0).all() and matrices[1].diagonal().tolist() == [0, 1000]
    (aligned, _), stats = gf.align_gradients([tiny, 0 * tiny], [tiny + 1, tiny + 1])
    assert stats.norms[0, 0] > 0 and stats.norms[0, 1] == pytest.approx(math.sqrt(1000))
    torch.testing.assert_close(aligned, torch.full_like(aligned, 0.3), rtol=1e-12, atol=0)


def test_a_nan_does_not_spread_to_tensors_that_one_loss_reaches():
    p = [torch.tensor([1.0, math.nan]), torch.zeros(2), torch.tensor([math.inf, 1.0])]
    g = [torch.ones(2), torch.ones(2), torch.zeros(2)]
    aligned, stats = gf.align_gradients(p, g)
    assert aligned[0].isnan().all() and stats.norms.isnan().tolist() == [[True, False]]
    torch.testing.assert_close(
        aligned[1:], [torch.tensor([0.3, 0.3]), torch.tensor([math.inf, 0.7])]
    )


def test_gram_and_combine_take_zeros_as_they_are():
    p, g = [torch.zeros(3), torch.ones(3)], [torch.ones(3), torch.ones(3)]
    assert gf.gram(p, g).tolist() == [[[3, 3], [3, 6]]]
    results = gf.combine((p, g), torch.tensor([[2.0, 5.0]]))
    assert [result.tolist() for result in results] == [[5] * 3, [7] * 3]


@pytest.mark.parametrize("n", range(2, 9))
@pytest.mark.parametrize("backend", ["reference", None])
def test_matrices_of_groups_and_coefficients_of_tensors_equal_loops(n, backend):
    gradients = with_unreached(
        [random_gradients(REACHED_SHAPES, seed=i, shift=0.2 * i) for i in range(n)],
        torch.zeros_like,
    )
    gradients[n - 1][0][2] = math.nan
    groups = [-1 if group is None else group for group in REACHED_GROUPS]
    groups[4] = -1  # a shared tensor without a group
    shared = [t for t in range(10) if all(tensors[t].count_nonzero() for tensors in gradients)]
    assert shared == ([0, 2, 4, 5, 8] if n == 2 else [0, 4, 5, 8])
    grams = torch.stack(
        [
            torch.tensor([[(a[t] * b[t]).sum() for b in gradients] for a in gradients])
            for t in range(10)
        ]
    )
    coefficients, weights = (
        torch.randn(4, n, dtype=torch.float64),
        [0.7 - 0.2 * i for i in range(n)],
    )
    backends = gf.use_backend(backend) if backend else nullcontext()
    with backends:
        matrices = torch.ops.genrep_fast.group_gram(grams, groups, 4)
        rows = torch.ops.genrep_fast.tensor_coefficients(coefficients, grams, groups, weights)
    for group in range(4):
        counted = [t for t in shared if groups[t] == group]
        for i in range(n):
            for j in range(n):
                exact = math.fsum(grams[t, i, j].item() for t in counted)
                assert matrices[group, i, j].item() == pytest.approx(
                    exact, rel=1e-12, abs=1e-12, nan_ok=True
                )
    expected = [
        coefficients[group].tolist() if t in shared and group >= 0 else weights
        for t, group in enumerate(groups)
    ]
    assert rows.tolist() == expected


# Gram matrices and sums of n gradients


@pytest.mark.parametrize("n", range(2, 9))
def test_gram_equals_inner_products(n):
    gradients = [random_gradients(seed=i, shift=0.1 * i) for i in range(n)]
    gradients[1][4] = None  # leaves tensor 4 out for every loss
    matrices = gf.gram(*gradients, groups=GROUPS)
    assert matrices.shape == (3, n, n) and matrices.dtype == torch.float64
    for group in range(3):
        members = [t for t, index in enumerate(GROUPS) if index == group and t != 4]
        for i in range(n):
            for j in range(n):
                products = [(gradients[i][t] * gradients[j][t]).sum().item() for t in members]
                assert matrices[group, i, j].item() == pytest.approx(
                    math.fsum(products), rel=1e-12, abs=1e-12
                )


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
    ],
)
def test_reference_gram_is_exact_to_float64_rounding(dtypes):
    p, g = (
        random_gradients([(100_003,)], seed=i, shift=0.1, dtype=dtype)[0]
        for i, dtype in enumerate(dtypes)
    )
    with gf.use_backend("reference"):
        matrix = gf.gram([p], [g])[0]
    assert torch.equal(matrix, matrix.T)
    for entry, (a, b) in zip(
        (matrix[0, 0], matrix[0, 1], matrix[1, 1]), ((p, p), (p, g), (g, g)), strict=True
    ):
        # Products of float32 numbers are exact in float64, and fsum rounds once.
        exact = math.fsum((a.double() * b.double()).tolist())
        scale = (a.double().norm() * b.double().norm()).item()
        assert abs(entry.item() - exact) < 1e-13 * scale


def test_gram_of_large_values_does_not_overflow():
    large = torch.full((3,), 3e19, dtype=torch.bfloat16)
    expected = 3 * large[0].double() ** 2
    assert gf.gram([large], [-large])[0].tolist() == [[expected, -expected], [-expected, expected]]


@pytest.mark.parametrize("n", range(2, 9))
def test_combine_equals_loops(n):
    gradients = [random_gradients(seed=i) for i in range(n)]
    gradients[0][6] = gradients[n - 1][2] = None
    coefficients, weights = (
        torch.randn(3, n, dtype=torch.float64),
        [0.5 - 0.3 * i for i in range(n)],
    )
    unwritten = [torch.full(shape, math.nan, dtype=torch.float64) for shape in SHAPES]
    results = gf.combine(gradients, coefficients, GROUPS, weights=weights, out=unwritten)
    for t, result in enumerate(results):
        plain = GROUPS[t] is None or t in (2, 6)
        row = weights if plain else coefficients[GROUPS[t]].tolist()
        expected = torch.zeros(SHAPES[t], dtype=torch.float64)
        for weight, tensors in zip(row, gradients, strict=True):
            if tensors[t] is not None:
                expected += weight * tensors[t]
        torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


def test_combine_without_groups_takes_the_first_row():
    p, g = gradient_pair()
    for result, a, b in zip(
        gf.combine((p, g), torch.tensor([[2.0, -1.0], [9.0, 9.0]])), p, g, strict=True
    ):
        torch.testing.assert_close(result, 2 * a - b, rtol=1e-14, atol=1e-14)


# Where results go, and in which dtype


@pytest.mark.parametrize("alias", ["perception", "generation", "new"])
def test_out_may_be_an_input(alias):
    pairs = gradient_pair(dtype=torch.float32)
    pairs[0][3] = pairs[1][5] = pairs[0][8] = pairs[1][8] = None
    expected, _ = gf.align_gradients(*pairs, groups=GROUPS)
    p, g = ([None if tensor is None else tensor.clone() for tensor in tensors] for tensors in pairs)
    out = {
        "perception": p,
        "generation": g,
        "new": [torch.full(shape, math.nan) for shape in SHAPES],
    }[alias]
    results, _ = gf.align_gradients(p, g, groups=GROUPS, out=out)
    for t in range(len(SHAPES)):
        if t == 8:
            assert results[t] is None and expected[t] is None
        else:
            assert out[t] is None or results[t] is out[t]
            torch.testing.assert_close(results[t], expected[t], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (None, torch.float16, torch.float16),
    ],
)
def test_dtype_of_the_result_is_promoted(first, second, expected):
    p = [None if first is None else torch.ones(3, dtype=first)]
    g = [torch.ones(3, dtype=second)]
    (result,), stats = gf.align_gradients(p, g)
    assert result.dtype == expected
    assert {tensor.dtype for tensor in vars(stats).values()} == {torch.float64}
    (result,), _ = gf.align_gradients(p, g, out=[torch.empty(3, dtype=torch.bfloat16)])
    assert result.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 63, 127, 129, 1000, 10_007])
def test_error_is_at_most_twice_that_of_the_plain_formula(dtype, size):
    p, g = (tensors[0] for tensors in gradient_pair([(size,)], dtype=dtype))
    exact = decomposed(p.double(), g.double())
    scale = (
        p.double().norm() + g.double().norm()
    ).item()  # one element: the gradients may be opposite, and the result zero
    (aligned,), _ = gf.align_gradients([p], [g])
    error, plain_error = (
        (result.double() - exact).norm().item() / scale for result in (aligned, decomposed(p, g))
    )
    bound = 2 * plain_error + torch.finfo(dtype).eps / 8  # the plain formula may be exact by chance
    print(f"{dtype}, {size}: error {error:.1e}, plain formula {plain_error:.1e}, bound {bound:.1e}")
    assert error <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    p, g = gradient_pair(dtype=dtype)
    wide, _ = gf.align_gradients([tensor.float() for tensor in p], [tensor.float() for tensor in g])
    aligned, _ = gf.align_gradients(p, g)
    torch.testing.assert_close(aligned, [tensor.to(dtype) for tensor in wide], rtol=0, atol=0)


def test_strides_do_not_matter():
    base = random_gradients([(6, 10), (10, 6), (4, 3, 2, 2)], seed=4)
    p = [
        base[0][::2, 1::3],
        base[1].t(),
        base[2].to(memory_format=torch.channels_last),
        torch.tensor(2.0).expand(5),
    ]
    g = [tensor.flip(0).clone(memory_format=torch.contiguous_format) for tensor in p]
    strided = torch.full((3, 6), math.nan, dtype=torch.float64)[:, ::2]
    results, stats = gf.align_gradients(p, g, out=[strided, None, None, None])
    dense, dense_stats = gf.align_gradients([tensor.contiguous() for tensor in p], g)
    torch.testing.assert_close(results, dense, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(stats.coefficients, dense_stats.coefficients, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("gradients", "groups", "num_groups"),
    [([], None, 1), ([], [], 0), ([None, None], None, 1), ([None], [2], 3)],
)
def test_nothing_to_align(gradients, groups, num_groups):
    aligned, stats = gf.align_gradients(gradients, gradients, groups=groups)
    assert aligned == [None] * len(gradients)
    assert stats.coefficients.tolist() == [list(WEIGHTS)] * num_groups
    assert gf.gram(gradients, gradients, groups=groups).tolist() == [[[0, 0], [0, 0]]] * num_groups
    assert gf.combine((gradients, gradients), stats.coefficients, groups) == aligned


def test_no_gradient_is_recorded():
    p, g = ([torch.ones(3, requires_grad=True)] for _ in range(2))
    (aligned,), stats = gf.align_gradients(p, g)
    assert (
        not aligned.requires_grad
        and not stats.coefficients.requires_grad
        and not gf.gram(p, g).requires_grad
    )
    assert gf.align_gradients(p, g, out=p)[0][0] is p[0] and p[0].is_leaf


# Operators


def operator_arguments():
    p, g = gradient_pair([(3,), (2, 2)], dtype=torch.float32)
    return {
        "gram": ([*p, *g], 2, [1, 0], 2),
        "group_gram": (torch.stack([gf.gram(p, g)[0], torch.zeros(2, 2).double()]), [1, -1], 3),
        "alignment_coefficients": (gf.gram(p, g), [0.7, 0.3], 2.0),
        "tensor_coefficients": (
            torch.ones(1, 2, dtype=torch.float64),
            torch.cat([gf.gram(p, g)] * 3),
            [0, -1, 0],
            [0.7, 0.3],
        ),
        "combine": (
            [*p, None, g[1]],
            torch.ones(1, 2, dtype=torch.float64),
            [-1, 0],
            [0.7, 0.3],
            [torch.empty(3), torch.empty(2, 2)],
        ),
    }


@pytest.mark.parametrize("name", operator_arguments())
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.genrep_fast, name).default, operator_arguments()[name])


@pytest.mark.parametrize("name", operator_arguments())
def test_the_reference_never_asks_the_device(name):
    # A fake tensor has no values: whatever would synchronise the host with the device raises.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = torch.utils._pytree.tree_map_only(
            torch.Tensor, mode.from_tensor, operator_arguments()[name]
        )
        getattr(reference, name)(*arguments)


def test_alignment_never_asks_the_device():
    with FakeTensorMode() as mode:
        p, g = (
            [mode.from_tensor(tensor) for tensor in tensors]
            for tensors in gradient_pair(dtype=torch.float32)
        )
        p[0] = None
        aligned, stats = gf.align_gradients(p, g, groups=GROUPS)
    assert [tensor.shape for tensor in aligned] == [torch.Size(shape) for shape in SHAPES]
    assert stats.coefficients.shape == (3, 2)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(backend):
    p, g = gradient_pair(SHAPES[:4], dtype=torch.float32)
    p[1] = None
    g[0] = torch.zeros_like(g[0])
    aligned, stats = gf.align_gradients(p, g, groups=GROUPS[:4])

    @partial(torch.compile, fullgraph=True, backend=backend)
    def in_place(p, g):
        results, stats = gf.align_gradients(p, g, groups=GROUPS[:4], out=p)
        return [2 * result for result in results], stats

    buffers = [None if tensor is None else tensor.clone() for tensor in p]
    doubled, compiled_stats = in_place(buffers, g)
    torch.testing.assert_close(doubled, [2 * tensor for tensor in aligned])
    torch.testing.assert_close(vars(compiled_stats), vars(stats))
    torch.testing.assert_close([buffers[0], *buffers[2:]], [aligned[0], *aligned[2:]])


@pytest.mark.slow
def test_compiles_with_weights_and_power_that_vary():
    p, g = gradient_pair(dtype=torch.float32)
    compiled = torch.compile(
        lambda weight, power: gf.align_gradients(p, g, weights=(weight, 1 - weight), power=power)[
            0
        ],
        fullgraph=True,
        backend="aot_eager",
    )
    for weight, power in ((0.7, 2.0), (0.6, 2.0), (0.5, 1.0), (0.5, 3.0)):
        torch.testing.assert_close(
            compiled(weight, power),
            gf.align_gradients(p, g, weights=(weight, 1 - weight), power=power)[0],
        )


def test_autocast_changes_nothing():
    p, g = gradient_pair(dtype=torch.float32)
    expected, expected_stats = gf.align_gradients(p, g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        aligned, stats = gf.align_gradients(p, g)
    torch.testing.assert_close(aligned, expected, rtol=0, atol=0)
    torch.testing.assert_close(vars(stats), vars(expected_stats), rtol=0, atol=0)
