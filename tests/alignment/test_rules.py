"""Aggregation rules against TorchJD, against the equations that define them, and on degenerate Gram
matrices.
"""

import importlib
import re

import numpy as np
import pytest
import torch
from jacobians import POWER, WEIGHTS, assert_close, named, random_jacobians
from scipy.optimize import nnls

import genrep_fast as gf
from genrep_fast.alignment import rules
from genrep_fast.alignment.rules import (
    RULES,
    eigenvalue_tolerance,
    least_accurate_dtype,
    resolve_rule,
)

torchjd = pytest.importorskip("torchjd.aggregation")
from torchjd.linalg import DualConeProjector  # noqa: E402

from genrep_fast.alignment.torchjd import GenRepWeighting  # noqa: E402

ANY_N = ("imtl_g", "aligned_mtl", "config")
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CASES = [*((name, 2) for name in RULES), *((name, 5) for name in ANY_N)]
EQUAL_TO_TORCHJD = [name for name in RULES if name not in ("genrep", "nash_mtl")]
# imtl_g too, but for opposite gradients.
NON_CONFLICTING = ["pcgrad", "upgrad", "dualproj", "mgda", "nash_mtl", "config"]


class Projector(DualConeProjector):
    """min |J^T v| over v >= u by SciPy's non-negative least squares; TorchJD's own needs quadprog
    and regularises.
    """

    def __call__(self, U, G):
        eigenvalues, eigenvectors = np.linalg.eigh(G.numpy())
        factor = np.sqrt(eigenvalues.clip(0))[:, None] * eigenvectors.T  # factor^T factor = G
        rows = [row + nnls(factor, -factor @ row)[0] for row in U.numpy().reshape(-1, len(G))]
        return torch.from_numpy(np.stack(rows)).reshape(U.shape)


TORCHJD = {
    "pcgrad": torchjd.PCGradWeighting,
    "upgrad": lambda: torchjd.UPGradWeighting(projector=Projector()),
    "dualproj": lambda: torchjd.DualProjWeighting(projector=Projector()),
    "mgda": torchjd.MGDAWeighting,
    "imtl_g": torchjd.IMTLGWeighting,
    "aligned_mtl": torchjd.AlignedMTLWeighting,
}


# Rows that are small integers: their Gram matrices, and whether those are singular, are exact.
DEGENERATE = {
    "zero": [[0, 0], [0, 0]],
    "first zero": [[0, 0], [3, 4]],
    "second zero": [[3, 4], [0, 0]],
    "equal": [[3, 4], [3, 4]],
    "parallel": [[3, 4], [6, 8]],
    "opposite": [[3, 4], [-6, -8]],
    "opposite and longer": [[-9, -12], [3, 4]],
    "opposite and as long": [[3, 4], [-3, -4]],
    "orthogonal": [[3, 4], [-4, 3]],
}


def jacobian(kind):
    return torch.tensor(DEGENERATE[kind], dtype=torch.float64)


def dependent_jacobians(rows, columns, rank, *, kind, count=20):
    """[count, rows, columns] of this rank; "stationary" ones have a positive combination of rows,
    or of half of them, that is zero.
    """
    generator = torch.Generator().manual_seed(rank)
    left = torch.randn(count, rows, rank, generator=generator, dtype=torch.float64)
    v = torch.rand(count, rows, 1, generator=generator, dtype=torch.float64) + 0.1
    if kind == "weakly stationary":
        v[:, rows // 2 :] = 0
    if kind != "random":
        left = left - v @ (v.mT @ left) / (v.mT @ v)
    return left @ torch.randn(count, rank, columns, generator=generator, dtype=torch.float64)


def gram(jacobians):
    return jacobians @ jacobians.mT


def aggregate(name, jacobians):
    return (named(name, jacobians.shape[1])(gram(jacobians))[:, None] @ jacobians)[:, 0]


def torchjd_aggregate(name, jacobians):
    aggregator = (
        torchjd.ConFIG() if name == "config" else torchjd.GramianWeightedAggregator(TORCHJD[name]())
    )
    return torch.stack([aggregator(matrix) for matrix in jacobians])


def assert_is_torchjds(name, jacobians, tolerance):
    """The error of an aggregate is relative to its parts, sum_i |w_i| |g_i|, which can be much
    larger.
    """
    weights = named(name, jacobians.shape[1])(gram(jacobians))
    scale = ((1 + weights.abs()) * jacobians.norm(dim=2)).sum(dim=1)
    assert_close(aggregate(name, jacobians), torchjd_aggregate(name, jacobians), scale, tolerance)


# Against TorchJD


@pytest.mark.parametrize("name", EQUAL_TO_TORCHJD)
def test_aggregate_is_torchjds(name):
    assert_is_torchjds(name, random_jacobians(300, 2), 1e-12)


@pytest.mark.parametrize("n", [3, 4, 5, 8])
@pytest.mark.parametrize("name", ANY_N)
def test_aggregate_is_torchjds_for_many_losses(name, n):
    assert_is_torchjds(name, random_jacobians(50, n, 13), 1e-10)


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("name", EQUAL_TO_TORCHJD)
def test_aggregate_of_degenerate_matrices_is_torchjds(name, kind):
    # Where gradients are opposite, ConFIG's direction vanishes; TorchJD makes 3e-8 of the rounding
    # error that is left.
    assert_is_torchjds(name, jacobian(kind)[None], 1e-7 if name == "config" else 1e-13)


@pytest.mark.parametrize("kind", ["random", "strongly stationary", "weakly stationary"])
@pytest.mark.parametrize("shape", [(4, 3, 1), (4, 3, 2), (4, 3, 3), (7, 13, 2), (8, 11, 5)])
@pytest.mark.parametrize("name", ANY_N)
def test_aggregate_of_dependent_gradients_is_torchjds(name, shape, kind):
    assert_is_torchjds(
        name, dependent_jacobians(*shape, kind=kind), 1e-7 if name == "config" else 1e-10
    )


# Against the equations that define the rules


def test_pcgrad_is_twice_upgrad():
    matrices = gram(random_jacobians(50, 2))
    assert torch.equal(named("pcgrad")(matrices), 2 * named("upgrad")(matrices))


def test_mgda_is_the_shortest_convex_combination():
    jacobians = random_jacobians(200, 2)
    weights = named("mgda")(gram(jacobians))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(200, dtype=torch.float64))
    share = torch.linspace(0, 1, 1001, dtype=torch.float64)
    combinations = torch.stack([share, 1 - share], dim=1) @ jacobians  # [200, 1001, 7]
    assert (
        aggregate("mgda", jacobians).norm(dim=1)
        <= combinations.norm(dim=2).amin(dim=1) * (1 + 1e-12)
    ).all()


def test_nash_mtl_solves_the_bargaining_equations():
    jacobians = random_jacobians(200, 2)
    matrices = gram(jacobians)
    weights = named("nash_mtl")(matrices)
    torch.testing.assert_close(
        (matrices @ weights[:, :, None])[:, :, 0] * weights,
        torch.ones_like(weights),
        rtol=0,
        atol=1e-11,
    )


def test_imtl_g_of_two_has_equal_projections():
    jacobians = random_jacobians(200, 2)
    norms = jacobians.norm(dim=2)
    expected = norms.flip(1) / norms.sum(dim=1, keepdim=True)
    torch.testing.assert_close(named("imtl_g")(gram(jacobians)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_config_has_equal_cosines_and_the_sum_of_the_projections_as_length(n):
    jacobians = random_jacobians(50, n, 13)
    result = aggregate("config", jacobians)
    length = result.norm(dim=1, keepdim=True)
    projections = (jacobians @ result[:, :, None])[:, :, 0] / length  # [50, n]
    cosines = projections / jacobians.norm(dim=2)
    torch.testing.assert_close(cosines, cosines[:, :1].expand_as(cosines), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(length, projections.sum(dim=1, keepdim=True))
    if n == 2:
        norms = jacobians.norm(dim=2)
        torch.testing.assert_close(
            named("config")(gram(jacobians)), norms.sum(dim=1, keepdim=True) / (2 * norms)
        )


@pytest.mark.parametrize("n", [2, 5])
def test_aligned_mtl_averages_gradients_of_equal_principal_components(n):
    """The transformed gradients, of which the rule takes the mean, are orthogonal and as long as
    the smallest singular value.
    """
    jacobians = random_jacobians(50, n, 13)
    left, singular, right = torch.linalg.svd(jacobians, full_matrices=False)
    expected = (singular[:, -1:, None] * left @ right).mean(dim=1)
    assert_close(aggregate("aligned_mtl", jacobians), expected, jacobians.norm(dim=(1, 2)), 1e-12)


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("pcgrad", "zero", [1, 1]),
        ("upgrad", "first zero", [0.5, 0.5]),
        ("dualproj", "second zero", [0.5, 0.5]),
        ("mgda", "zero", [0.5, 0.5]),
        ("mgda", "first zero", [1, 0]),
        ("mgda", "equal", [0.5, 0.5]),
        ("nash_mtl", "zero", [0, 0]),
        ("nash_mtl", "first zero", [0, 0.2]),
        ("nash_mtl", "second zero", [0.2, 0]),
        ("nash_mtl", "equal", [0.2 / 2**0.5, 0.2 / 2**0.5]),
        ("nash_mtl", "opposite", [0, 0]),
        ("imtl_g", "zero", [0, 0]),
        ("imtl_g", "first zero", [0, 1]),
        ("imtl_g", "parallel", [1 / 3, 2 / 3]),
        ("imtl_g", "opposite", [-1, 2]),
        ("imtl_g", "opposite and as long", [0, 0]),
        ("aligned_mtl", "zero", [0.5, 0.5]),
        ("aligned_mtl", "first zero", [0, 0.5]),
        ("config", "zero", [0, 0]),
        ("config", "first zero", [0, 1]),
        ("config", "opposite", [0, 0]),
    ],
)
def test_weights_of_degenerate_matrices(name, kind, expected):
    weights = named(name)(gram(jacobian(kind)[None]))
    torch.testing.assert_close(
        weights, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=1e-15
    )


# Gradients of lower precision

LOW = [torch.float32, torch.bfloat16, torch.float16]
# With factors of which float16 holds none but 1.
SCALED_LOW = [
    (torch.float32, 1e-10),
    (torch.float32, 1e15),
    (torch.bfloat16, 1e-10),
    (torch.bfloat16, 1e15),
    *((dtype, 1.0) for dtype in LOW),
]
RANKED = ["imtl_g", "aligned_mtl", "config"]


def pair(angle, sign, length, *, seed=0):
    """Two gradients [2, 1009] float64 at `angle` to each other or, for a `sign` of -1, to
    opposition; the second is `length` as long.
    """
    generator = torch.Generator().manual_seed(seed)
    first, other = torch.randn(2, 1009, generator=generator, dtype=torch.float64)
    other = other - first * (first @ other) / (first @ first)
    other = other * (first.norm() / other.norm())
    return torch.stack([first, length * (sign * np.cos(angle) * first + np.sin(angle) * other)])


def rounded_weights(name, jacobian, dtype):
    """The rule's weights [n] of the rows [n, columns] in `dtype`, whose inner products are taken as
    an aligner takes them.
    """
    rows = list(jacobian.to(dtype))
    return named(name, len(rows), least_accurate_dtype(rows))(gf.gram(*[[row] for row in rows]))[0]


def relative_error(weights, jacobian, expected):
    """Of an aggregate, relative to its parts and to the gradients."""
    norms = jacobian.norm(dim=1)
    return ((weights @ jacobian - expected).norm() / (weights.abs() @ norms + norms.mean())).item()


def angle_to_dependence(jacobian, sign):
    units = jacobian / jacobian.norm(dim=1, keepdim=True)
    return 2 * np.arcsin((units[1] - sign * units[0]).norm().item() / 2)


@pytest.mark.parametrize(("sign", "length"), [(1, 1), (-1, 1e-2)])
@pytest.mark.parametrize(("dtype", "scale"), SCALED_LOW)
@pytest.mark.parametrize("name", [name for name in RULES if name != "genrep"])
def test_angles_from_a_hundred_millionth_to_a_tenth(name, dtype, scale, sign, length):
    """Rank one below the tolerance, TorchJD's result from 1e-2 on, finite and bounded between."""
    negligible_angle = (2 * eigenvalue_tolerance(dtype, 2)) ** 0.5
    worst = {"dependent": 0.0, "independent": 0.0}
    for angle in 10 ** np.arange(-8, -0.9, 0.5):
        jacobian = pair(angle, sign, length) * scale
        weights, rounded = rounded_weights(name, jacobian, dtype), jacobian.to(dtype).double()
        assert weights.isfinite().all()
        norms, actual_angle = rounded.norm(dim=1), angle_to_dependence(rounded, sign)
        if actual_angle < 0.95 * negligible_angle:
            # Of the mathematical gradients, along their direction.
            line = torch.tensor([1, sign * length], dtype=torch.float64)
            expected = named(name)((line[:, None] * line)[None] * norms[0] ** 2)[0]
            error, kind = relative_error(weights, rounded, expected @ rounded), "dependent"
        elif actual_angle >= 1e-2 and name != "nash_mtl":
            # TorchJD's IMTL-G takes the weights' sum for zero where the gradients are long.
            expected = torchjd_aggregate(name, rounded[None] / norms[0])[0] * norms[0]
            error, kind = relative_error(weights, rounded, expected), "independent"
        else:
            bound = (
                1 / eigenvalue_tolerance(dtype, 2) ** 0.5 if name == "nash_mtl" else 2 * norms.sum()
            )
            assert (weights @ rounded).norm() <= bound
            continue
        worst[kind] = max(worst[kind], error)
    # An aggregate that is continuous moves by as much as the gradients: imtl_g and aligned_mtl do
    # not, their rank-one result is another.
    bounds = {"dependent": 2e-3, "independent": 2e-5}
    print(f"{name}, {dtype}, {worst}, {bounds=}")
    assert all(worst[kind] <= bounds[kind] for kind in worst)


@pytest.mark.parametrize("rule", ["imtl_g", "aligned_mtl", "config", "nash_mtl"])
@pytest.mark.parametrize("factor", [1 / 3, 1.0, -3.0])
@pytest.mark.parametrize("dtype", LOW)
def test_an_aligner_gives_parallel_gradients_the_result_of_rank_one(rule, factor, dtype):
    line = torch.tensor([1, factor], dtype=torch.float64)
    for seed in range(5):
        gradient = torch.randn(1000, generator=torch.Generator().manual_seed(seed)).to(dtype)
        parameter = torch.nn.Parameter(torch.zeros(1000, dtype=dtype))
        gf.GradientAligner([parameter], rule=rule).backward(
            (parameter * gradient).sum(), (parameter * gradient * factor).sum()
        )
        norm = gradient.double().norm()
        share = named(rule)((line[:, None] * line)[None] * norm**2)[0] @ line
        error = (
            (parameter.grad.double() - share * gradient.double()).norm()
            / (norm * max(share.abs().item(), 1 / norm.item()))
        ).item()
        assert error <= 4 * torch.finfo(dtype).eps


def test_the_least_accurate_gradient_decides(monkeypatch):
    seen = []
    monkeypatch.setitem(
        rules._OF_TWO,
        "mgda",
        lambda gram, dtype: seen.append(dtype) or gram.new_ones(gram.shape[:2]),
    )
    parameters = [
        torch.nn.Parameter(torch.ones(3, dtype=dtype))
        for dtype in (torch.float64, torch.bfloat16, torch.float32)
    ]
    for count in (1, 3):
        chosen = parameters[:count]
        for parameter in chosen:
            parameter.grad = None
        aligner = gf.GradientAligner(chosen, rule="mgda")
        aligner.backward(
            *(
                sum(parameter.double().square().sum() * factor for parameter in chosen)
                for factor in (1, 2)
            )
        )
    assert seen == [torch.float64, torch.bfloat16]
    assert least_accurate_dtype([None, torch.ones(1), torch.ones(1).half()]) == torch.float16
    assert least_accurate_dtype([]) == torch.float64


@pytest.mark.parametrize(
    ("n", "kind"),
    [(8, "sum"), (3, "parallel"), (3, "opposite"), (8, "sum and parallel"), (3, "all parallel")],
)
@pytest.mark.parametrize(("dtype", "scale"), SCALED_LOW)
@pytest.mark.parametrize("name", RANKED)
def test_dependent_gradients_of_lower_precision_are_dependent(name, dtype, scale, n, kind):
    for seed in range(2):
        jacobian = random_jacobians(1, n, 1009, seed=seed)[0] / 100
        if kind.startswith("sum"):
            jacobian[2] = jacobian[0] + jacobian[1]
        if kind.endswith("parallel"):
            jacobian[n - 1] = jacobian[0] / 3
        if kind == "opposite":
            jacobian[n - 1] = -jacobian[0] / 3
        if kind == "all parallel":
            jacobian = jacobian[:1] * torch.arange(1, n + 1, dtype=torch.float64)[:, None] / 3
        error = relative_error(
            rounded_weights(name, jacobian * scale, dtype),
            jacobian,
            torchjd_aggregate(name, jacobian[None])[0],
        )
        assert error <= 4 * torch.finfo(dtype).eps, f"{error:.1e}"


@pytest.mark.parametrize("n", [3, 5, 8])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", RANKED)
def test_a_pair_at_a_small_angle_among_others_is_independent(name, dtype, n):
    jacobian = random_jacobians(1, n, 1009, seed=n)[0]
    jacobian[:2] = pair(1.5e-2, 1, 0.5) * 10
    rounded = jacobian.to(dtype).double()
    error = relative_error(
        rounded_weights(name, jacobian, dtype), rounded, torchjd_aggregate(name, rounded[None])[0]
    )
    assert error <= 1e-4, f"{error:.1e}"


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", RANKED)
def test_a_short_gradient_keeps_its_direction(name, dtype):
    jacobians = torch.eye(2, 7, dtype=torch.float64)[None] * torch.tensor([[1.0], [1e-6]])
    torch.testing.assert_close(
        named(name, dtype=dtype)(gram(jacobians)), named(name)(gram(jacobians)), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", ["zero", "first zero", "second zero"])
@pytest.mark.parametrize("name", RULES)
def test_zero_gradients_of_lower_precision(name, kind, dtype):
    matrices = gram(jacobian(kind)[None])
    torch.testing.assert_close(
        named(name, dtype=dtype)(matrices), named(name)(matrices), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("name", "n"), CASES)
def test_independent_gradients_do_not_depend_on_the_dtype(name, n, dtype):
    matrices = gram(random_jacobians(50, n, 13))
    torch.testing.assert_close(
        named(name, n, dtype)(matrices), named(name, n)(matrices), rtol=1e-8, atol=1e-10
    )


# Properties


@pytest.mark.parametrize("scale", [1e-10, 1e5, 1e15])
@pytest.mark.parametrize("name", [name for name in RULES if name != "nash_mtl"])
def test_weights_do_not_depend_on_a_common_scale(name, scale):
    jacobians = torch.cat(
        [random_jacobians(50, 2, 2), torch.stack([jacobian(kind) for kind in DEGENERATE])]
    )
    weights, scaled = named(name)(gram(jacobians)), named(name)(scale**2 * gram(jacobians))
    assert scaled.isfinite().all()
    torch.testing.assert_close(scaled, weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-10, 1e3, 1e5, 1e10, 1e15])
def test_nash_mtl_is_inverse_to_a_common_scale(scale):
    matrices = gram(random_jacobians(50, 2))
    torch.testing.assert_close(
        scale * named("nash_mtl")(scale**2 * matrices),
        named("nash_mtl")(matrices),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("scale", [1e-70, 1e-12, 1e12, 1e70])
@pytest.mark.parametrize("name", RULES)
def test_gradients_of_very_different_norms(name, scale):
    jacobians = random_jacobians(50, 2) * torch.tensor([[1.0], [scale]], dtype=torch.float64)
    result = aggregate(name, jacobians)
    assert result.isfinite().all()
    assert (result.norm(dim=1) <= 10 * jacobians.norm(dim=(1, 2)).clamp(min=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "n"), CASES)
def test_permutation_of_the_losses(name, n, dtype):
    jacobians = random_jacobians(30, n, 11)
    if n == 2:
        degenerate = torch.stack([jacobian(kind) for kind in DEGENERATE])
        jacobians = torch.cat([jacobians, torch.nn.functional.pad(degenerate, (0, 9))])
    order = torch.arange(n).roll(1)
    weights = WEIGHTS[::-1] if name == "genrep" else WEIGHTS
    permuted = resolve_rule(name, weights, POWER, n)(gram(jacobians[:, order]), dtype)
    torch.testing.assert_close(
        permuted, named(name, n, dtype)(gram(jacobians))[:, order], rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("name", NON_CONFLICTING)
def test_no_loss_increases_along_the_aggregate(name):
    jacobians = torch.cat(
        [random_jacobians(500, 2, 2), torch.stack([jacobian(kind) for kind in DEGENERATE])]
    )
    result = aggregate(name, jacobians)
    products = (jacobians @ result[:, :, None])[:, :, 0]  # [509, 2]
    assert (
        products >= -1e-12 * jacobians.norm(dim=2) * (1 + jacobians.norm(dim=(1, 2)))[:, None]
    ).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "n"), CASES)
def test_a_non_finite_matrix_stays_alone(name, n, value, dtype):
    matrices = gram(random_jacobians(3, n))
    expected = named(name, n, dtype)(matrices)
    matrices[1] = value
    weights = named(name, n, dtype)(matrices)
    assert torch.equal(weights[::2], expected[::2])
    assert weights[1].isnan().all() or value == torch.inf


# No synchronisation, no graph break


# A dtype decides upon a number, the tolerance: one stands for all but for the longest rule.
COMPILED = [(name, 2, torch.float32) for name in RULES]
COMPILED += [("config", 2, torch.float64), ("config", 2, torch.bfloat16)]


@pytest.mark.parametrize(
    ("name", "n", "dtype"),
    [*COMPILED, pytest.param("config", 3, torch.float32, marks=pytest.mark.slow)],
)
def test_compiles_without_a_graph_break(name, n, dtype):
    matrices = gram(random_jacobians(4, n))
    torch._dynamo.reset()
    compiled = torch.compile(named(name, n, dtype), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(matrices), named(name, n, dtype)(matrices), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize(
    ("name", "n", "dtype"), [*COMPILED, *((name, 3, torch.float32) for name in ANY_N)]
)
def test_reads_no_value_on_the_host(name, n, dtype):
    """A meta tensor has no values: whoever asks for one fails, and so does a constant made on
    another device.
    """
    weights = named(name, n, dtype)(torch.empty(5, n, n, dtype=torch.float64, device="meta"))
    assert weights.shape == (5, n) and weights.dtype == torch.float64


@pytest.mark.parametrize(("name", "n"), CASES)
def test_autocast_and_no_groups(name, n):
    matrices = gram(random_jacobians(4, n))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = named(name, n)(matrices)
    assert torch.equal(weights, named(name, n)(matrices))
    assert named(name, n)(matrices[:0]).shape == (0, n)


# Callables and TorchJD's weightings


@pytest.mark.parametrize(
    ("weighting", "n"),
    [
        *((build, n) for build in TORCHJD.values() for n in (2, 4)),
        (torchjd.MeanWeighting, 3),
        (torchjd.SumWeighting, 3),
        (torchjd.RandomWeighting, 3),
        (lambda: torchjd.ConstantWeighting(torch.tensor([0.5, 2.0])), 2),
        (lambda: torchjd.KrumWeighting(n_byzantine=1), 5),
        (lambda: torchjd.FairGradWeighting(alpha=1.0), 3),
        (GenRepWeighting, 2),
    ],
)
def test_a_torchjd_weighting_gives_its_own_weights(weighting, n):
    matrices = gram(random_jacobians(3, n))
    inputs = []
    rule = weighting()
    rule.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    torch.manual_seed(0)
    weights = resolve_rule(rule, WEIGHTS, POWER, n)(matrices, torch.float32)
    torch.manual_seed(0)
    expected = torch.stack([weighting()(matrix) for matrix in matrices])
    assert weights.dtype == torch.float64
    assert torch.equal(weights, expected.double())
    assert all(torch.equal(matrix, given) for matrix, given in zip(matrices, inputs, strict=True))


def test_a_weighting_of_no_groups():
    matrices = torch.empty(0, 3, 3, dtype=torch.float64)
    assert named(torchjd.MeanWeighting(), 3)(matrices).shape == (0, 3)


def test_a_stateful_weighting_keeps_its_state():
    matrices = gram(random_jacobians(4, 2))
    rule = named(torchjd.GradVacWeighting())
    torch.manual_seed(0)
    weights = torch.cat([rule(matrix[None]) for matrix in matrices])
    torch.manual_seed(0)
    weighting = torchjd.GradVacWeighting()
    assert torch.equal(weights, torch.stack([weighting(matrix) for matrix in matrices]))
    assert not torch.equal(weights[3], torchjd.GradVacWeighting()(matrices[3]))


@pytest.mark.parametrize(
    "weighting", [torchjd.GradVacWeighting(), torchjd.CRMOGMWeighting(torchjd.MGDAWeighting())]
)
def test_a_state_is_not_shared_by_groups(weighting):
    with pytest.raises(
        ValueError, match=f"{type(weighting).__name__} keeps a state .* 2 groups would mix up"
    ):
        named(weighting)(gram(random_jacobians(2, 2)))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (torchjd.MGDA(), r"such as MGDAWeighting\(\), got the aggregator MGDA"),
        (torchjd.ConFIG(), 'here rule="config", got the aggregator ConFIG'),
        (torchjd.GradDrop(), "got the aggregator GradDrop, which needs the gradients"),
        (torchjd.ExcessMTL(1), "got the aggregator ExcessMTL, which needs the gradients"),
        (
            torchjd.GramianWeightedAggregator(GenRepWeighting()),
            r"such as the aggregator's \.gramian_weighting, "
            "got the aggregator GramianWeightedAggregator",
        ),
        (torchjd.ExcessMTLWeighting(), "got ExcessMTLWeighting, which needs the gradients"),
        (
            torchjd.CRMOGMWeighting(torchjd.ExcessMTLWeighting()),
            "got CRMOGMWeighting, which needs the gradients",
        ),
        (None, "rule must be a name, a callable or a TorchJD Weighting, got NoneType"),
    ],
)
def test_rules_of_a_wrong_type(rule, message):
    with pytest.raises(TypeError, match=message):
        resolve_rule(rule, WEIGHTS, POWER, 2)


AGGREGATORS = [
    name
    for name in torchjd.__all__
    if issubclass(getattr(torchjd, name), torchjd.Aggregator) and not name.endswith("Aggregator")
]


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_advice_for_every_aggregator_can_be_followed(name):
    """What the message names exists, and is a rule that gives weights."""
    kind = getattr(torchjd, name)
    # Neither the solvers nor the arguments matter to what the aggregator is.
    aggregator = kind.__new__(kind)
    torch.nn.Module.__init__(aggregator)
    if issubclass(kind, torchjd.WeightedAggregator):
        aggregator.weighting = torch.nn.Identity()
    if issubclass(kind, torchjd.GramianWeightedAggregator):
        aggregator.gramian_weighting = torch.nn.Identity()
    with pytest.raises(TypeError, match=f"got the aggregator {name}") as error:
        named(aggregator)
    message = str(error.value)
    if "needs the gradients" in message:
        assert name in ("ExcessMTL", "GradDrop", "TrimmedMean")
        return
    if rule := re.search(r'rule="(\w+)"', message):
        weights = named(rule[1])(gram(random_jacobians(1, 2)))
    else:
        advised = re.search(r"such as (\w+)\(\)", message)[1]
        assert advised in torchjd.__all__
        arguments = {
            "KrumWeighting": (1,),
            "ConstantWeighting": (torch.ones(5, dtype=torch.float64),),
            "FairGradWeighting": (1.0,),
        }
        try:
            weighting = getattr(torchjd, advised)(*arguments.get(advised, ()))
        except (ImportError, TypeError):  # a solver, or an argument, is missing
            return
        weights = named(weighting, 5)(gram(random_jacobians(1, 5)))
    assert weights.shape[0] == 1 and weights.isfinite().all()


def test_a_private_weighting_is_answered_with_the_rule():
    kind = importlib.import_module("torchjd.aggregation._nash_mtl")._NashMTLWeighting
    weighting = kind.__new__(kind)
    torch.nn.Module.__init__(weighting)
    with pytest.raises(
        TypeError,
        match="got _NashMTLWeighting, which needs the gradients; "
        'for two losses there is rule="nash_mtl"',
    ):
        named(weighting)


def test_a_callable_gets_all_matrices_and_gives_float64():
    matrices = gram(random_jacobians(3, 4))
    weights = named(lambda gram: gram.diagonal(dim1=1, dim2=2).float(), 4)(matrices)
    assert torch.equal(weights, matrices.diagonal(dim1=1, dim2=2).float().double())


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (torch.ones(3, 3), ValueError, r"weights of shape \(3, 2\), got \(3, 3\)"),
        (torch.ones(2), ValueError, r"weights of shape \(3, 2\), got \(2,\)"),
        (torch.ones(3, 2, device="meta"), ValueError, "weights on cpu, got meta"),
        ([0.5, 0.5], TypeError, "rule must return a tensor, got list"),
    ],
)
def test_bad_results_of_a_callable(result, error, message):
    with pytest.raises(error, match=message):
        named(lambda gram: result)(gram(random_jacobians(3, 2)))


@pytest.mark.parametrize("name", ["PCGrad", "imtl-g", ""])
def test_an_unknown_name_lists_the_names(name):
    with pytest.raises(ValueError, match=f"rule must be one of {', '.join(RULES)}, got '{name}'"):
        resolve_rule(name, WEIGHTS, POWER, 2)


@pytest.mark.parametrize("name", [name for name in RULES if name not in ANY_N])
def test_rules_of_two_losses_refuse_more(name):
    with pytest.raises(
        ValueError, match=f"rule '{name}' takes 2 losses, got 3; imtl_g, aligned_mtl, config"
    ):
        resolve_rule(name, (0.7, 0.2, 0.1), POWER, 3)


@pytest.mark.parametrize(
    ("weights", "power", "error", "message"),
    [
        ((0.7, 0.2, 0.1), 2.0, ValueError, "weights must be 2 finite numbers"),
        ((0.7, torch.inf), 2.0, ValueError, "weights must be 2 finite numbers"),
        ("73", 2.0, TypeError, "weights must be a sequence of numbers"),
        (WEIGHTS, -1.0, ValueError, "power must be finite and not negative, got -1.0"),
        (WEIGHTS, torch.nan, ValueError, "power must be finite and not negative, got nan"),
        (WEIGHTS, "2", TypeError, "power must be a number, got str"),
    ],
)
@pytest.mark.parametrize(
    "build", [lambda weights, power: resolve_rule("genrep", weights, power, 2), GenRepWeighting]
)
def test_bad_weights_and_powers(build, weights, power, error, message):
    with pytest.raises(error, match=message):
        build(weights, power)
