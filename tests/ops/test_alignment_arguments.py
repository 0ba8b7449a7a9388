"""Arguments that the alignment functions refuse, among them outputs that share memory."""

import math

import pytest
import torch

import genrep_fast as gf

A, B = torch.ones(2), torch.ones(3)
ONE_ROW = torch.ones(1, 2)


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (
            lambda: gf.align_gradients([A], [A, A]),
            ValueError,
            r"generation must have 1 entries, got 2",
        ),
        (
            lambda: gf.align_gradients(A, [A]),
            TypeError,
            r"perception must be a list or a tuple, got Tensor",
        ),
        (
            lambda: gf.align_gradients([A], [[1.0, 2.0]]),
            TypeError,
            r"generation\[0\] must be a tensor, got list",
        ),
        (
            lambda: gf.align_gradients([1.0], [A]),
            TypeError,
            r"perception\[0\] must be a tensor, got float",
        ),
        (
            lambda: gf.align_gradients([B, A], [B, B]),
            ValueError,
            r"generation\[1\] must have shape \(2,\), got \(3,\)",
        ),
        (
            lambda: gf.align_gradients([A], [A.to_sparse()]),
            ValueError,
            r"generation\[0\] must be dense",
        ),
        (
            lambda: gf.align_gradients([A], [A.int()]),
            TypeError,
            r"generation\[0\] must be float32, .* got torch.int32",
        ),
        (
            lambda: gf.align_gradients([A.cfloat()], [A]),
            TypeError,
            r"perception\[0\] must be float32, .* got torch.complex64",
        ),
        (
            lambda: gf.align_gradients([A], [A.to("meta")]),
            ValueError,
            r"generation\[0\] must be on cpu .* got meta",
        ),
        (
            lambda: gf.align_gradients([A], [A], weights=(1.0,)),
            ValueError,
            r"weights must be 2 finite numbers",
        ),
        (
            lambda: gf.align_gradients([A], [A], weights=(1.0, math.inf)),
            ValueError,
            r"weights must be 2 finite numbers",
        ),
        (
            lambda: gf.align_gradients([A], [A], weights=0.7),
            TypeError,
            r"weights must be a sequence of numbers, got 0.7",
        ),
        (
            lambda: gf.align_gradients([A], [A], power=-1),
            ValueError,
            r"power must be finite and not negative, got -1",
        ),
        (
            lambda: gf.align_gradients([A], [A], power=math.nan),
            ValueError,
            r"power must be finite and not negative, got nan",
        ),
        (
            lambda: gf.align_gradients([A], [A], power="2"),
            TypeError,
            r"power must be a number, got str",
        ),
        (
            lambda: gf.align_gradients([A], [A], groups=[0, 0]),
            ValueError,
            r"groups must have 1 entries, got 2",
        ),
        (
            lambda: gf.align_gradients([A], [A], groups=[-1]),
            ValueError,
            r"groups\[0\] must not be negative, got -1",
        ),
        (
            lambda: gf.align_gradients([A], [A], groups=[0.0]),
            TypeError,
            r"groups\[0\] must be an int or None, got float",
        ),
        (
            lambda: gf.align_gradients([A], [A], groups=[True]),
            TypeError,
            r"groups\[0\] must be an int or None, got bool",
        ),
        (
            lambda: gf.align_gradients([A], [A], groups=[10**10]),
            ValueError,
            r"groups\[0\] must be below 1048576, got 10000000000",
        ),
        (
            lambda: gf.align_gradients([A], [A], groups=torch.zeros(1)),
            TypeError,
            r"groups must be a list or a tuple, got Tensor",
        ),
        (
            lambda: gf.align_gradients([A], [A], out=[A, A]),
            ValueError,
            r"out must have 1 entries, got 2",
        ),
        (
            lambda: gf.align_gradients([A], [A], out=[B]),
            ValueError,
            r"out\[0\] must have shape \(2,\), got \(3,\)",
        ),
        (
            lambda: gf.align_gradients([A], [A], out=[torch.ones(1).expand(2)]),
            ValueError,
            r"out\[0\] is written to and must not be",
        ),
        (lambda: gf.gram([A]), ValueError, r"gradients of 2 to 8 losses are needed, got 1"),
        (lambda: gf.gram(*[[A]] * 9), ValueError, r"gradients of 2 to 8 losses are needed, got 9"),
        (
            lambda: gf.gram([A], [A], [B]),
            ValueError,
            r"gradients\[2\]\[0\] must have shape \(2,\), got \(3,\)",
        ),
        (
            lambda: gf.combine(([A], [A]), torch.ones(2)),
            ValueError,
            r"coefficients must have shape \[1 groups or more, 2\], got \(2,\)",
        ),
        (
            lambda: gf.combine(([A], [A]), torch.ones(1, 3)),
            ValueError,
            r"coefficients must have shape .* got \(1, 3\)",
        ),
        (
            lambda: gf.combine(([A], [A]), ONE_ROW, [1]),
            ValueError,
            r"coefficients must have shape \[2 groups or more, 2\], got \(1, 2\)",
        ),
        (
            lambda: gf.combine(([A], [A]), ONE_ROW.int()),
            TypeError,
            r"coefficients must be float32, .* got torch.int32",
        ),
        (
            lambda: gf.combine(([A], [A]), ONE_ROW.to("meta")),
            ValueError,
            r"coefficients must be on cpu",
        ),
        (
            lambda: gf.combine(([A], [A]), [1.0, 1.0]),
            TypeError,
            r"coefficients must be a tensor, got list",
        ),
        (
            lambda: gf.combine(([A], [A]), ONE_ROW, [None]),
            ValueError,
            r"weights must be given where",
        ),
        (lambda: gf.combine(([A], [None]), ONE_ROW), ValueError, r"weights must be given where"),
        (
            lambda: gf.combine(([A], [A]), ONE_ROW, weights=[1.0]),
            ValueError,
            r"weights must be 2 finite numbers",
        ),
    ],
)
def test_wrong_arguments_raise(call, exception, message):
    with pytest.raises(exception, match=message):
        call()


def test_nothing_is_written_when_a_later_tensor_is_wrong():
    out = [torch.zeros(2), torch.zeros(2)]
    with pytest.raises(ValueError, match=r"out\[1\]"):
        gf.align_gradients([A, B], [A, B], out=out)
    assert out[0].tolist() == [0, 0]


# Outputs that share memory


def overlapping_outputs():
    """Name -> gradients of two losses, outputs, and the tensors that overlap."""
    p, g, flat = (
        [torch.ones(4), torch.full((4,), 10.0)],
        [torch.zeros(4), torch.zeros(4)],
        torch.arange(16.0),
    )
    square, rows = flat.view(4, 4), flat.view(4, 4).unbind(0)
    shared = torch.zeros(4)
    return {
        "exchanged": (p, g, [p[1], p[0]], r"out\[0\] overlaps perception\[1\]"),
        "another input": (p, g, [None, g[0]], r"out\[1\] overlaps generation\[0\]"),
        "shifted": (
            [flat[:5]],
            [torch.ones(5)],
            [flat[1:6]],
            r"out\[0\] overlaps perception\[0\]: unless it is exactly",
        ),
        "one output twice": (p, g, [shared, shared], r"out\[0\] overlaps out\[1\]"),
        "outputs in part": (p, g, [flat[:4], flat[3:7]], r"out\[0\] overlaps out\[1\]"),
        "transposed": (
            [square],
            [torch.ones(4, 4)],
            [square.T],
            r"out\[0\] overlaps perception\[0\]: unless",
        ),
        "a column of an input": (
            [square, rows[0]],
            [torch.ones(4, 4), p[0]],
            [None, square[:, 2]],
            r"out\[1\] overlaps perception\[0\]",
        ),
        "another dtype": (
            [flat[:4]],
            [torch.ones(4)],
            [flat.view(torch.bfloat16)[4:8]],
            r"out\[0\] overlaps perception\[0\]",
        ),
        "an input of one loss": (
            [None, p[1]],
            g,
            [p[1], None],
            r"out\[0\] overlaps perception\[1\]",
        ),
        "windows": (
            [torch.ones(3, 4)],
            [torch.ones(3, 4)],
            [flat.unfold(0, 4, 2)[:3]],
            r"out\[0\] is written to and must not overlap itself",
        ),
    }


@pytest.mark.parametrize("name", overlapping_outputs())
def test_outputs_that_share_memory_are_refused_before_anything_is_written(name):
    p, g, out, message = overlapping_outputs()[name]
    tensors = [tensor for tensor in (*p, *g, *out) if tensor is not None]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match=message):
        gf.align_gradients(p, g, out=out)
    message = message.replace("perception", r"gradients\[0\]").replace(
        "generation", r"gradients\[1\]"
    )
    with pytest.raises(ValueError, match=message):
        gf.combine((p, g), ONE_ROW, weights=(0.7, 0.3), out=out)
    torch.testing.assert_close(tensors, before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_coefficients_that_are_an_output_are_refused(dtype):
    coefficients = torch.ones(1, 2, dtype=dtype)
    with pytest.raises(ValueError, match=r"out\[0\] overlaps coefficients:"):
        gf.combine(([A], [A]), coefficients, out=[coefficients[0]])
    assert coefficients.tolist() == [[1, 1]]


def parts_of_a_buffer(kind, count):
    if kind == "columns":
        return torch.empty(7, count).unbind(1)
    if kind == "channels":
        return torch.empty(2, count, 3, 5).unbind(1)
    if kind == "steps":
        return [torch.empty(5 * count)[start::count] for start in range(count)]
    return torch.empty(count * 7).split(7)


@pytest.mark.parametrize("kind", ["columns", "channels", "steps", "pieces"])
def test_outputs_may_lie_between_the_inputs(kind):
    parts = parts_of_a_buffer(kind, 9)
    for seed, part in enumerate(parts):
        part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(seed)))
    p, g, out = parts[::3], parts[1::3], list(parts[2::3])
    expected, _ = gf.align_gradients(
        [tensor.clone() for tensor in p], [tensor.clone() for tensor in g]
    )
    results, _ = gf.align_gradients(p, g, out=out)
    assert all(result is tensor for result, tensor in zip(results, out, strict=True))
    torch.testing.assert_close(results, expected)


def test_out_may_be_views_in_the_place_of_both_inputs():
    p = [torch.arange(6.0).view(2, 3), torch.ones(3)]
    results, _ = gf.align_gradients(
        p, p, weights=(1.0, 1.0), power=0.0, out=[tensor.detach() for tensor in p]
    )
    torch.testing.assert_close(results, [2 * torch.arange(6.0).view(2, 3), torch.full((3,), 2.0)])
    assert results[0].data_ptr() == p[0].data_ptr()


def test_an_output_that_no_loss_reaches_may_be_anything():
    p = [torch.ones(3), None]
    assert gf.align_gradients(p, p, out=[p[0], p[0]])[0][1] is None
