"""Every tensor argument of every public function, replaced by what no operator takes: one error
that names the argument, before PyTorch's dispatcher sees it.
"""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch.masked import masked_tensor

import genrep_fast as gf

B, K, S, C = 2, 3, 2, 2
ONE = torch.ones(S)
TABLES = {"data": ONE, "noisy": ONE / 2, "output": -ONE, "inv_var": ONE, "log_norm": 0 * ONE}
MOVES = {"mean_noisy": ONE, "mean_output": ONE, "std": ONE}


def chunk():
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(B, C, 2, generator=generator),
        "model_output": torch.randn(B, K, S, C, 2, generator=generator),
        "coefficients": gf.StepCoefficients(**TABLES),
        "x_t": torch.randn(B, 1, S, C, 2, generator=generator),
    }


def bank():
    return gf.ChainBank.build(
        lambda x, t, y: 0.1 * x,
        DDPMScheduler(10, clip_sample=False),
        K,
        (C, 2),
        num_inference_steps=4,
        chains=1,
        burn_in=0,
        thin=1,
        sigma_floor=0.3,
        seed=0,
    )


def pair(function, **arguments):
    """A function of two lists of gradients with one entry of them replaced."""
    perception, generation = arguments["perception[0]"], arguments["generation[0]"]
    return function([perception, torch.ones(3)], [generation, torch.ones(3)])


def update(**arguments):
    gf.PosteriorScorer(K).update(**arguments)


def update_again(**arguments):
    scorer = gf.PosteriorScorer(K)
    scorer.update(**chunk())
    scorer.update(**arguments)


GRADIENTS = {"perception[0]": torch.ones(4), "generation[0]": torch.ones(4)}
SCORES = {"log_likelihood": torch.zeros(B, K), "log_prior": torch.zeros(K)}
STEP = {
    "x_t": torch.ones(B, C),
    "model_output": torch.ones(B, C),
    "coefficients": gf.StepCoefficients(**TABLES, **MOVES),
    "step": 0,
    "seed": 0,
    "chain_ids": torch.arange(B),
    "x": torch.ones(B, C),
    "std_scale": torch.ones(B, C),
}
FUNCTIONS = {
    "log_likelihood": (gf.log_likelihood, chunk()),
    "posterior": (gf.posterior, SCORES),
    "log_evidence": (gf.log_evidence, SCORES),
    "distillation_loss": (
        gf.distillation_loss,
        {"student_logits": torch.zeros(B, K), **SCORES},
    ),
    "fit_temperature": (gf.fit_temperature, {"labels": torch.arange(B), **SCORES}),
    "reverse_step": (gf.reverse_step, STEP),
    "align_gradients": (lambda **given: pair(gf.align_gradients, **given), GRADIENTS),
    "out": (
        lambda **given: gf.align_gradients([torch.ones(4)], [torch.ones(4)], out=[given["out[0]"]]),
        {"out[0]": torch.ones(4)},
    ),
    "gram": (
        lambda **given: gf.gram(*[[one] for one in given.values()]),
        {"gradients[0][0]": torch.ones(4), "gradients[1][0]": torch.ones(4)},
    ),
    "combine": (
        lambda **given: gf.combine(
            [[given["gradients[0][0]"]], [torch.ones(4)]], given["coefficients"]
        ),
        {"gradients[0][0]": torch.ones(4), "coefficients": torch.ones(1, 2)},
    ),
    "update": (update, {**chunk(), "classes": torch.arange(K)}),
    "a second update": (update_again, {**chunk(), "classes": torch.arange(K)}),
    "ChainBank": (lambda x: bank().log_likelihood(x), {"x": torch.ones(B, C, 2)}),
    "StepCoefficients": (gf.StepCoefficients, {**TABLES, **MOVES}),
    "elbo": (
        lambda **given: gf.StepCoefficients.elbo(DDPMScheduler(10), **given),
        {"timesteps": torch.arange(2), "weight": ONE},
    ),
    "lr": (
        lambda lr: gf.AlignedAdamW(
            [one := torch.nn.Parameter(ONE)], lr=lr, aligner=gf.GradientAligner([one])
        ),
        {"lr": torch.tensor(0.1)},
    ),
}
# A missing one may be meant.
OPTIONAL = ("log_prior", "x_t", "classes", "std_scale", "x", "[0]")

KINDS = {
    "None": lambda tensor: None,
    "string": lambda tensor: "abc",
    "array": lambda tensor: tensor.numpy(),
    "dtype": lambda tensor: torch.float32,
    "module": lambda tensor: torch.nn.Linear(1, 1),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "bool": lambda tensor: tensor.bool(),
    "float8": lambda tensor: tensor.float().to(torch.float8_e4m3fn),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8),
    "coo": lambda tensor: tensor.to_sparse(),
    "csr": lambda tensor: torch.ones(2, 2).to_sparse_csr(),
    "mkldnn": lambda tensor: tensor.float().to_mkldnn(),
    "nested": lambda tensor: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda tensor: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
    "masked": lambda tensor: masked_tensor(tensor.clone(), torch.ones_like(tensor).bool()),
    "lazy": lambda tensor: torch.nn.UninitializedParameter(),
    "meta": lambda tensor: tensor.to("meta"),
}
# The Python function knows what these are, or they are sane.
LEGITIMATE = {
    ("elbo", "array"),
    ("lr", "meta"),
    ("lr", "mkldnn"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_error_names_the_argument(function, kind):
    call, arguments = FUNCTIONS[function]
    tensors = [name for name in arguments if name not in ("step", "seed")]
    for name in tensors:
        value = arguments[name]
        if (function, kind) in LEGITIMATE:
            continue
        given = KINDS[kind](value if isinstance(value, torch.Tensor) else ONE)
        if given is None and name.endswith(OPTIONAL):
            continue
        moves_less = function == "StepCoefficients" and given is None and name in MOVES
        with pytest.raises((TypeError, ValueError)) as caught:
            call(**{**arguments, name: given})
        message = str(caught.value)
        assert "\n" not in message
        if kind == "meta":
            # Of two devices the argument is named that lies on another one than those before it.
            wanted = ("be on", "lie where", "have values", "be StepCoefficients")
            assert any(f"must {one}" in message for one in wanted), message
        else:
            names = ("mean_noisy", name) if moves_less else (name,)
            assert message.startswith(names), (name, message)


def test_tensors_without_values_have_results_without_values():
    given = {name: one.to("meta") for name, one in chunk().items()}
    given["x"].requires_grad_()
    scores = gf.log_likelihood(**given)
    assert scores.is_meta and scores.shape == (B, K)
    scores.sum().backward()
    assert given["x"].grad.shape == (B, C, 2)
    assert gf.posterior(scores).is_meta and gf.log_evidence(scores).shape == (B,)
    assert gf.distillation_loss(scores, scores.detach()).shape == ()
    gradients = [torch.ones(4, device="meta")]
    assert gf.align_gradients(gradients, gradients)[0][0].is_meta
    assert gf.gram(gradients, gradients).shape == (1, 2, 2)
    tensors = {name: one.to("meta") for name, one in STEP.items() if not isinstance(one, int)}
    moved = {**STEP, **tensors}
    assert [one.is_meta for one in gf.reverse_step(**moved)] == [True, True]
    scorer = gf.PosteriorScorer(K, paired=True)
    scorer.update(**{name: one.detach() if name == "x" else one for name, one in given.items()})
    assert scorer.posterior(classes=[2, 0]).shape == (B, 2)


@pytest.mark.parametrize("number", [np.float32(2), np.float64(2), np.int64(2), np.float16(2)])
def test_numpy_scalars_are_numbers(number):
    scores, a = torch.randn(B, K), torch.randn(4)
    expected = gf.posterior(scores, temperature=2.0)
    assert torch.equal(gf.posterior(scores, temperature=number), expected)
    plain = gf.align_gradients([a], [a.flip(0)], weights=(2.0, 1.0), power=2.0)[0][0]
    given = gf.align_gradients([a], [a.flip(0)], weights=(number, 1), power=number)[0][0]
    assert torch.equal(given, plain)
    assert gf.GradientAligner([torch.nn.Parameter(a)], weights=[number, 1]).weights == (2.0, 1.0)


@pytest.mark.parametrize("value", [True, np.array(2.0), torch.tensor(2.0), "2", None, 2j])
def test_what_is_no_number_is_named(value):
    scores, a = torch.zeros(B, K), torch.ones(4)
    with pytest.raises(TypeError, match="temperature must be a number, got"):
        gf.posterior(scores, temperature=value)
    with pytest.raises(TypeError, match="power must be a number, got"):
        gf.align_gradients([a], [a], power=value)
    with pytest.raises(TypeError, match="weights must be a sequence of numbers, got"):
        gf.align_gradients([a], [a], weights=[value, 1.0])
    with pytest.raises(TypeError, match="max_norm must be a number, got"):
        parameter = torch.nn.Parameter(a)
        gf.AlignedAdamW(
            [parameter], aligner=gf.GradientAligner([parameter]), max_norm=value or "none"
        )


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: gf.gram(None, [ONE]), r"gradients\[0\] must be a list or a tuple, got NoneType"),
        (lambda: gf.gram((one for one in [ONE]), [ONE]), r"gradients\[0\] .* got generator"),
        (lambda: gf.combine(None, torch.ones(1, 2)), "gradients must be a list .* got NoneType"),
        (lambda: gf.log_likelihood(**chunk(), per_location="no"), "per_location must be True or"),
        (lambda: gf.ChainBank.load(None), "path must be a string or a path, got NoneType"),
        (lambda: bank().save(3), "path must be a string or a path, got int"),
        (lambda: bank().refresh(None), "denoiser must be callable, got NoneType"),
        (lambda: gf.GradientAligner([torch.nn.Parameter(ONE)], flat="no"), "flat must be True or"),
        (
            lambda: gf.AlignedAdamW(None, aligner=gf.GradientAligner([torch.nn.Parameter(ONE)])),
            "params must be parameters, .* got NoneType",
        ),
        (
            lambda: gf.StepCoefficients.elbo(DDPMScheduler(10), [1], dtype="float32"),
            "dtype must be float32 or float64, got 'float32'",
        ),
    ],
)
def test_other_arguments_of_wrong_types(call, match):
    with pytest.raises(TypeError, match=match):
        call()


def test_groups_and_steps_of_numpy():
    a = torch.randn(4)
    grams = gf.gram([a, a], [a, a], groups=[np.int64(1), None])
    assert torch.equal(grams, gf.gram([a, a], [a, a], groups=[1, None]))
    step = {**STEP, "step": np.int64(1), "seed": np.uint64(2**63)}
    expected = gf.reverse_step(**{**STEP, "step": 1, "seed": 2**63})
    assert all(map(torch.equal, gf.reverse_step(**step), expected))
