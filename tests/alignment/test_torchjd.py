"""GenRepWeighting, the alignment as a weighting of TorchJD."""

import subprocess
import sys

import pytest
import torch
from jacobians import assert_close, named, random_jacobians

import genrep_fast as gf

torchjd = pytest.importorskip("torchjd.aggregation")
from torchjd.autojac import backward, jac_to_grad  # noqa: E402

from genrep_fast.alignment.torchjd import GenRepWeighting  # noqa: E402


@pytest.mark.parametrize(("weights", "power"), [((0.7, 0.3), 2.0), ((1, 2), 0.5)])
def test_genrep_weighting_in_torchjds_aggregator(weights, power):
    for matrix in random_jacobians(20, 2):
        expected, _ = gf.align_gradients([matrix[0]], [matrix[1]], weights=weights, power=power)
        result = torchjd.GramianWeightedAggregator(GenRepWeighting(weights, power))(matrix)
        assert_close(result[None], expected[0][None], matrix.norm(), 1e-14)


def test_genrep_weighting_in_torchjds_backward():
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    losses = [layer(torch.randn(7, 5)).square().mean(), layer(torch.randn(7, 5)).sum()]
    gradients = [
        torch.autograd.grad(loss, list(layer.parameters()), retain_graph=True) for loss in losses
    ]
    expected, _ = gf.align_gradients(*gradients)
    backward(losses)
    jac_to_grad(layer.parameters(), torchjd.GramianWeightedAggregator(GenRepWeighting()))
    for parameter, gradient in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_genrep_weighting_keeps_the_dtype(dtype):
    gramian = torch.tensor([[2.0, -1.0], [-1.0, 4.0]], dtype=dtype, requires_grad=True)
    weights = GenRepWeighting()(gramian)
    assert weights.dtype == dtype and weights.shape == (2,) and not weights.requires_grad
    expected = named("genrep")(gramian.detach().double()[None])[0]
    torch.testing.assert_close(weights, expected.to(dtype), rtol=0, atol=0)


def test_genrep_weighting_tells_what_it_is():
    assert repr(GenRepWeighting()) == "GenRepWeighting(weights=(0.7, 0.3), power=2.0)"
    with pytest.raises(ValueError, match=r"gramian must have shape \(2, 2\), got \(3, 3\)"):
        GenRepWeighting()(torch.eye(3))


@pytest.mark.slow
def test_torchjd_stays_optional():
    """Neither the package nor a rule imports TorchJD; GenRepWeighting says what is missing where it
    is not installed.
    """
    script = """
import sys, torch
from genrep_fast.alignment.rules import resolve_rule
rule = resolve_rule(lambda gram: gram[:, 0], (0.7, 0.3), 2.0, 2)
rule(torch.eye(2)[None].double(), torch.float32)
assert not any(name.startswith("torchjd") for name in sys.modules)
sys.modules["torchjd"] = None
try:
    import genrep_fast.alignment.torchjd
except ImportError as error:
    assert "pip install 'torchjd>=0.18'" in str(error)
else:
    raise AssertionError("no ImportError")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=600)
