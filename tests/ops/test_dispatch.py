"""The choice of backend, with a second backend that exists for the test alone."""

import json
import threading
from pathlib import Path

import pytest
import torch

import genrep_fast as gf
from genrep_fast.dispatch import operators as operator_definitions
from genrep_fast.dispatch import selection
from genrep_fast.ops.alignment import gram_operator
from genrep_fast.ops.posterior import _posterior as posterior_operator


@pytest.fixture
def registry(monkeypatch):
    """The registry with nothing but the reference, restored after the test; no backend is insisted
    on.
    """
    monkeypatch.delenv("GENREP_FAST_BACKEND", raising=False)
    copies = {
        name: {"reference": by_backend["reference"]}
        for name, by_backend in selection._implementations.items()
    }
    monkeypatch.setattr(selection, "_implementations", copies)
    monkeypatch.setattr(
        selection,
        "_unavailable",
        {
            "cpu": "it was not built",
            "triton": "triton is not installed",
            "cuda": "it was not built",
        },
    )
    return selection


@pytest.fixture
def calls(registry):
    """The operators that a fake "cpu" backend, which holds `posterior` alone, has run."""
    ran = []

    def fake_posterior(log_likelihood, log_prior, temperature):
        ran.append("posterior")
        return torch.full_like(log_likelihood, 7.0)

    registry.register_implementation("posterior", "cpu", fake_posterior)
    return ran


SCORES = torch.tensor([[1.0, 2.0, 3.0]])


def test_the_reference_is_used_where_nothing_else_exists(registry):
    torch.testing.assert_close(gf.posterior(SCORES), SCORES.log_softmax(1))


def test_another_backend_changes_no_caller(calls):
    compiled = torch.compile(gf.posterior, fullgraph=True, backend="aot_eager")
    assert (gf.posterior(SCORES) == 7).all() and (compiled(SCORES) == 7).all()
    assert calls == ["posterior", "posterior"]
    # The backend does not hold this one.
    torch.testing.assert_close(gf.distillation_loss(SCORES, SCORES), torch.tensor(0.0))
    # float64 is the reference's.
    torch.testing.assert_close(gf.posterior(SCORES.double()), SCORES.double().log_softmax(1))


ALIGNMENT = ("gram", "group_gram", "alignment_coefficients", "tensor_coefficients", "combine")


@pytest.fixture
def alignment_calls(registry):
    """The alignment operators that a fake "cpu" backend, which holds all five, has run; each does
    what the reference does.
    """
    ran = []
    for name in ALIGNMENT:
        reference = registry._implementations[name]["reference"]
        registry.register_implementation(
            name,
            "cpu",
            lambda *args, name=name, reference=reference: ran.append(name) or reference(*args),
        )
    return ran


def test_float64_gram_matrices_of_float32_gradients_reach_every_backend(alignment_calls):
    with gf.use_backend("cpu"):
        gf.align_gradients([torch.ones(3), torch.ones(2)], [torch.ones(3), torch.ones(2)])
    assert alignment_calls == list(ALIGNMENT)


def test_one_float64_gradient_among_float32_ones_takes_the_reference(alignment_calls):
    gf.gram([torch.ones(3), torch.ones(3).double()], [torch.ones(3), torch.ones(3).double()])
    assert alignment_calls == []
    with (
        gf.use_backend("cpu"),
        pytest.raises(gf.BackendUnavailableError, match="float64 runs on the reference alone"),
    ):
        gf.gram([torch.ones(3), torch.ones(3).double()], [torch.ones(3), torch.ones(3).double()])


@pytest.mark.parametrize("insisted", [False, True])
def test_float64_behind_tensors_of_other_dtypes_takes_the_reference(insisted):
    # The kernels of the CPU look for it themselves.
    tiny = 1e-12
    p = [torch.ones(3), torch.ones(3).double() + tiny]
    g = [torch.ones(3), torch.ones(3).double()]
    if insisted and "cpu" in selection._implementations["gram"]:
        with (
            gf.use_backend("cpu"),
            pytest.raises(gf.BackendUnavailableError, match="gram in float64 runs on"),
        ):
            gf.gram(p, g)
        return
    result = gf.gram(p, g)[0, 0, 1]
    torch.testing.assert_close(result, result.new_tensor(6 + 3 * tiny), rtol=0, atol=2e-15)


def test_what_a_kernel_refuses_for_another_reason_stays_refused():
    if "cpu" not in selection._implementations["gram"]:
        pytest.skip("needs the C++ kernels")
    with pytest.raises(RuntimeError, match="groups must be between 0 and num_groups - 1"):
        gram_operator([torch.ones(3), torch.ones(3)], 2, [1], 1)
    strided = torch.ones(3, 2).T
    with pytest.raises(RuntimeError, match="groups must be between 0 and num_groups - 1"):
        gram_operator([strided, torch.ones(2, 3)], 2, [1], 1)


def test_use_backend_insists_and_nests(calls):
    with gf.use_backend("reference"):
        assert (gf.posterior(SCORES) != 7).all()
        with gf.use_backend("cpu"):
            assert (gf.posterior(SCORES) == 7).all()
        assert (gf.posterior(SCORES) != 7).all()
    assert (gf.posterior(SCORES) == 7).all()


def test_use_backend_ends_with_an_error_and_stays_in_its_thread(calls):
    with pytest.raises(KeyError), gf.use_backend("reference"):
        thread_results = []
        thread = threading.Thread(target=lambda: thread_results.append(gf.posterior(SCORES)))
        thread.start()
        thread.join()
        assert (thread_results[0] == 7).all()
        raise KeyError
    assert (gf.posterior(SCORES) == 7).all()


def test_the_environment_variable_insists(calls, monkeypatch):
    monkeypatch.setenv("GENREP_FAST_BACKEND", "reference")
    assert (gf.posterior(SCORES) != 7).all()
    with gf.use_backend("cpu"):  # the nearer wish wins
        assert (gf.posterior(SCORES) == 7).all()
    monkeypatch.setenv("GENREP_FAST_BACKEND", "triton")
    with pytest.raises(
        gf.BackendUnavailableError, match="'triton' was asked for, but triton is not installed"
    ):
        gf.posterior(SCORES)
    monkeypatch.setenv("GENREP_FAST_BACKEND", "fast")
    with pytest.raises(
        ValueError,
        match="GENREP_FAST_BACKEND must be one of reference, cpu, triton, cuda, got 'fast'",
    ):
        gf.posterior(SCORES)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (
            lambda: gf.distillation_loss(SCORES, SCORES),
            "'cpu' was asked for, but it does not implement distillation_loss",
        ),
        (
            lambda: gf.posterior(SCORES.double()),
            "'cpu' was asked for, but posterior in float64 runs on the reference alone",
        ),
    ],
)
def test_an_insisted_backend_that_cannot_run_says_why(calls, function, match):
    with gf.use_backend("cpu"), pytest.raises(gf.BackendUnavailableError, match=match):
        function()


def test_a_backend_of_another_device_says_why(registry):
    registry.register_implementation("posterior", "cuda", lambda *arguments: None)
    with (
        gf.use_backend("cuda"),
        pytest.raises(
            gf.BackendUnavailableError,
            match="'cuda' was asked for, but posterior got tensors on cpu",
        ),
    ):
        gf.posterior(SCORES)


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("cuda", gf.BackendUnavailableError, "'cuda' was asked for, but it was not built"),
        ("fast", ValueError, "backend must be one of reference, cpu, triton, cuda, got 'fast'"),
    ],
)
def test_use_backend_refuses_at_once(registry, name, error, match):
    with pytest.raises(error, match=match), gf.use_backend(name):
        pytest.fail("the block must not run")


def test_registering_for_an_unknown_backend_is_refused(registry):
    with pytest.raises(ValueError, match="backend must be one of"):
        registry.register_implementation("posterior", "fast", lambda: None)


def test_info(calls):
    info = gf.info()
    assert (info["genrep_fast"], info["torch"]) == (gf.__version__, torch.__version__)
    assert {"log_likelihood", "posterior", "distillation_loss", "score_update"} <= set(
        info["backends"]["reference"]["operators"]
    )
    cpu, triton = info["backends"]["cpu"], info["backends"]["triton"]
    assert (cpu["available"], cpu["operators"], cpu["reason"]) == (True, ["posterior"], None)
    assert triton == {
        "available": False,
        "operators": [],
        "reason": "triton is not installed",
        "build": None,
    }


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_is_off_inside_operators(registry, compiled):
    seen = []

    def watching(log_likelihood, log_prior, temperature):
        seen.append(torch.is_autocast_enabled("cpu"))
        return (log_likelihood @ log_likelihood.T @ log_likelihood).contiguous()

    registry.register_implementation("posterior", "cpu", watching)
    function = (
        torch.compile(gf.posterior, fullgraph=True, backend="aot_eager")
        if compiled
        else gf.posterior
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = function(SCORES)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False] and result.dtype == torch.float32


# The table of what was measured on GPUs


def test_the_fastest_backend_depends_on_the_largest_argument(monkeypatch):
    any_size = selection.FastestUpTo(None, "triton")
    table = {"gram": [any_size], "combine": [selection.FastestUpTo(100, "cuda"), any_size]}
    monkeypatch.setattr(selection, "_measured_on", lambda index: table)
    device = torch.device("cuda", 0)
    assert selection.fastest_measured("gram", device, (torch.ones(1000),)) == "triton"
    assert selection.fastest_measured("posterior", device, (torch.ones(1000),)) is None
    lists = [[torch.ones(40), None, torch.ones(60)], [torch.ones(40), torch.ones(61)]]
    assert selection.fastest_measured("combine", device, (lists[0], torch.ones(9), 2.0)) == "cuda"
    assert (
        selection.fastest_measured("combine", device, (lists[0], torch.ones(9), lists[1]))
        == "triton"
    )


def test_a_measured_backend_goes_first_where_it_is_there(calls, monkeypatch):
    monkeypatch.setitem(selection._PREFERENCE, "cpu", ("reference", "cpu"))
    reference = selection._implementations["posterior"]["reference"]
    assert selection.select_implementation("posterior", "cpu", False) is reference
    assert (
        selection.select_implementation("posterior", "cpu", False, "cpu")
        is selection._implementations["posterior"]["cpu"]
    )
    # It is not there.
    assert selection.select_implementation("posterior", "cpu", False, "triton") is reference
    assert selection.select_implementation("posterior", "cpu", True, "cpu") is reference  # float64
    with gf.use_backend("reference"):
        assert selection.select_implementation("posterior", "cpu", False, "cpu") is reference


NOT_MEASURED = {"group_gram", "tensor_coefficients"}  # on a GPU yet, where they run as CUDA C++


def test_the_committed_table_names_operators_and_backends():
    table = json.loads((Path(gf.__file__).parent / "gpu_backends.json").read_text())
    assert table
    for operators in table.values():
        assert set(operators) == set(operator_definitions.schemas) - NOT_MEASURED
        # It needs the bits of l that forward computed.
        assert operators["log_likelihood_backward"] == operators["log_likelihood"]
        for steps in operators.values():
            assert {backend for _, backend in steps} <= {"triton", "cuda"}
            *limits, last = [most for most, _ in steps]
            assert last is None and limits == sorted(limits)


def test_gradients_go_around_the_dispatcher():
    leaf = SCORES.clone().requires_grad_()
    weights = torch.tensor([[1.0, -2.0, 0.5]])
    around, through = gf.posterior(leaf), torch.ops.genrep_fast.posterior(leaf, None, 1.0)
    assert around.grad_fn.name() == "posteriorBackward"
    gradients = [torch.autograd.grad((weights * one).sum(), leaf)[0] for one in (around, through)]
    assert torch.equal(*gradients) and gradients[0].any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_program_has_differentiable_operators_under_their_names():
    traced = torch.jit.trace(gf.posterior, SCORES.clone().requires_grad_(), check_trace=False)
    assert "genrep_fast::posterior" in str(traced.graph)


def test_a_subclass_beside_a_plain_tensor_meets_the_operator_itself():
    seen = []

    class Recorded(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            seen.append(function.namespace)
            plain = [logits if type(arg) is cls else arg for arg in args]
            return function(*plain, **(kwargs or {}))

    logits = SCORES.log_softmax(1)
    prior = torch.Tensor._make_subclass(Recorded, logits)
    posterior_operator(SCORES.clone().requires_grad_(), prior, 1.0)
    assert "genrep_fast" in seen
