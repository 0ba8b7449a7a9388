"""The quick check of tensor lists: what is wrong with one tensor of many is never passed over."""

import pytest
import torch

import genrep_fast as gf
from genrep_fast.dispatch import list_checks
from genrep_fast.dispatch.list_checks import lists_fit

if not list_checks._kernels:
    pytest.skip("needs the C++ kernels", allow_module_level=True)

SHAPES = [(3,), (2, 5), (), (0, 4)]


class Subclass(torch.Tensor):
    pass


def fresh():
    return [torch.randn(shape) for shape in SHAPES]


def test_lists_without_a_fault_fit():
    out, p, g = fresh(), fresh(), fresh()
    assert lists_fit([out], [p, g], [torch.ones(1, 2, dtype=torch.float64)])
    assert lists_fit([], [p, p])
    assert lists_fit([p], [p, g])
    assert lists_fit([[tensor.view_as(tensor) for tensor in p]], [p, g])
    assert lists_fit([out], [[None, *p[1:]], g])
    assert lists_fit([[torch.nn.Parameter(tensor) for tensor in out]], [p, g])
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert lists_fit([out], [p, [tensor.to(dtype) for tensor in g]])


whole = torch.randn(40)
FAULTS = {
    "shape": lambda out, p, g: g.__setitem__(1, torch.randn(5, 2)),
    "same number of elements": lambda out, p, g: g.__setitem__(1, torch.randn(10)),
    "integers": lambda out, p, g: g.__setitem__(0, torch.ones(3, dtype=torch.int32)),
    "complex": lambda out, p, g: g.__setitem__(0, torch.ones(3, dtype=torch.complex64)),
    "strides": lambda out, p, g: g.__setitem__(1, torch.randn(5, 2).T),
    "expanded": lambda out, p, g: out.__setitem__(1, torch.randn(5).expand(2, 5)),
    "sparse": lambda out, p, g: g.__setitem__(0, torch.randn(3).to_sparse()),
    "meta": lambda out, p, g: g.__setitem__(0, torch.randn(3, device="meta")),
    "subclass": lambda out, p, g: g.__setitem__(0, torch.randn(3).as_subclass(Subclass)),
    "no tensor": lambda out, p, g: g.__setitem__(0, 1.0),
    "one output twice": lambda out, p, g: out.__setitem__(
        slice(0, 2), [whole[:3], whole[:10].view(2, 5)]
    ),
    "output over a gradient of another place": lambda out, p, g: out.__setitem__(
        0, g[1].view(-1)[7:]
    ),
    "output beside its gradient": lambda out, p, g: (
        out.__setitem__(0, whole[:3]),
        g.__setitem__(0, whole[1:4]),
    ),
    "output of another dtype in place": lambda out, p, g: out.__setitem__(
        0, g[0].view(torch.bfloat16)[:3]
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_is_found(fault):
    out, p, g = fresh(), fresh(), fresh()
    FAULTS[fault](out, p, g)
    assert not lists_fit([out], [p, g])


def test_another_tensor_that_is_written_over_is_found():
    out, p, g = fresh(), fresh(), fresh()
    table = torch.ones(1, 2, dtype=torch.float64)
    out[0] = table.view(torch.float32).view(-1)[:3]
    assert not lists_fit([out], [p, g], [table])
    with pytest.raises(ValueError, match=r"out\[0\] overlaps coefficients"):
        gf.combine([p, g], table, out=out)


def test_inside_transforms_nothing_is_known():
    seen = []

    def function(x):
        seen.append(lists_fit([], [[x], [x]]))
        return x.sum()

    torch.func.grad(function)(torch.ones(3))
    torch.func.vmap(function)(torch.ones(2, 3))
    assert seen == [False, False]
