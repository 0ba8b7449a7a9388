"""Outputs of blocks under torch.compile, threads, copies, pickles and gradient checkpointing."""

import copy
import pickle
import threading

import pytest
import torch
import torch._dynamo.testing
from diffusers import DDIMScheduler

from genrep_fast.models import GenRep, GenRepPipeline
from genrep_fast.models.backbones import run_backbone

KINDS = ("unet", "dit")
X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(model, call=None):
    """What a model says in every way; `call` takes the place of its forward."""
    call = model if call is None else call
    values = [model.perceive(X), model.semantic_features(X)]
    for modulate in (True, False):
        output = call(X, torch.tensor([5, 700]), LABELS, modulate=modulate)
        values += [output.sample, output.features]
    return [*values, model.perceive(X)]


def assert_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def compile_backbone(model, **options):
    model.backbone = torch.compile(model.backbone, **options)
    return model


def compile_backbone_in_place(model, **options):
    model.backbone.compile(**options)
    return model


def compile_in_place(model, **options):
    model.compile(**options)
    return model


def compile_blocks(model, **options):
    for name in ("mid_block", "up_blocks", "transformer_blocks"):
        blocks = getattr(model.backbone, name, None)
        if isinstance(blocks, torch.nn.ModuleList):
            for index in range(len(blocks)):
                blocks[index] = torch.compile(blocks[index], **options)
        elif blocks is not None:
            setattr(model.backbone, name, torch.compile(blocks, **options))
    return model


WAYS = {
    "backbone": compile_backbone,
    "backbone in place": compile_backbone_in_place,
    "model in place": compile_in_place,
    "model": torch.compile,
    "blocks": compile_blocks,
}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "kind"), [("backbone", "unet"), *((way, "dit") for way in WAYS)])
def test_compiled_models_show_their_blocks(tiny_model, kind, way):
    model = tiny_model(kind, active=True)
    expected = results(model)
    compiled = WAYS[way](model, backend="eager", fullgraph=True)
    for _ in range(2):
        assert_same(results(compiled), expected)
    assert_same(results(compiled.train().eval()), expected)


def test_one_graph_serves_perception_and_generation(tiny_model):
    counter = torch._dynamo.testing.CompileCounter()
    model = compile_backbone(tiny_model("dit"), backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            model.perceive(X)
            model.semantic_features(X)
            model(X, torch.tensor([5, 700]), LABELS)
    assert counter.frame_count <= 2  # labels of the null class are an expanded tensor


@pytest.mark.slow
def test_compiled_gradients_reach_the_blocks(tiny_model):
    model = tiny_model("dit").train()
    model.perceive(X).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compile_backbone_in_place(model, backend="aot_eager").perceive(X).square().sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_backbone_is_saved_copied_and_loaded(tiny_model, tmp_path):
    plain = tiny_model("dit", active=True)
    expected, names = results(plain), plain.state_dict().keys()
    groups = plain.alignment_groups()
    model = compile_backbone(copy.deepcopy(plain), backend="eager")
    assert_same(results(model), expected)
    assert model.state_dict().keys() == names and model.alignment_groups() == groups
    model.save_pretrained(tmp_path)
    assert_same(results(GenRep.from_pretrained(tmp_path)), expected)
    assert_same(results(model.frozen_copy()), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(plain.state_dict())
    assert_same(results(model), expected)
    whole = torch.compile(plain, backend="eager")
    assert {name.removeprefix("_orig_mod.") for name in whole.state_dict()} == set(names)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["model", "backbone"])
def test_a_pipeline_of_compiled_models(tiny_model, tmp_path, way):
    model = tiny_model("dit", active=True)
    pipeline = GenRepPipeline(model=model, scheduler=DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "output_type": "pt"}
    logits, images = pipeline(X).logits, pipeline.generate([0, 2], **options).images
    pipeline.model = WAYS[way](model.train(), backend="eager")
    torch.testing.assert_close(pipeline(X).logits, logits)
    torch.testing.assert_close(pipeline.generate([0, 2], **options).images, images)
    assert model.training and all(module.training for module in model.modules())
    pipeline.save_pretrained(tmp_path)
    torch.testing.assert_close(GenRepPipeline.from_pretrained(tmp_path)(X).logits, logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles_show_their_own_blocks(tiny_model, copied):
    model = tiny_model("unet", active=True)
    expected = results(model)
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.perceive(X)
    assert_same(results(other), expected)
    hooks = [len(module._forward_hooks) for module in other.backbone.modules()]
    assert max(hooks) == 1


def test_threads_do_not_see_each_others_blocks(tiny_model):
    model = tiny_model("dit")
    inputs = [torch.randn(2, 1, 8, 8) for _ in range(4)]
    expected = [model.perceive(x) for x in inputs]
    wrong = []

    def work(index):
        for _ in range(40):
            if not torch.equal(model.perceive(inputs[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_the_same(tiny_model, kind):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(kind).train()
        if checkpointing:
            model.backbone.enable_gradient_checkpointing()
        features = model.semantic_features(X)
        (model.perceive(X).square().sum() + features.square().sum()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-6)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.scale, "rest"


class Twice(torch.nn.Module):
    """A backbone whose block returns a tuple and runs twice."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x, timesteps, class_labels, return_dict):
        return (self.block(self.block(x)[0])[0] + 1,)


def test_blocks_may_return_tuples_and_run_twice():
    backbone = Twice()
    sample, (features,) = run_backbone(backbone, X, torch.zeros(2), LABELS, ["block"])
    assert torch.equal(features, 4 * X) and torch.equal(sample, 4 * X + 1)
    assert features.requires_grad


@pytest.mark.slow
def test_a_backbone_that_was_compiled_before_is_named(tiny_model, tiny_backbone):
    model = tiny_model("dit")
    compiled = torch.compile(tiny_backbone("dit"), backend="eager")
    compiled(X, torch.zeros(2, dtype=torch.int64), class_labels=LABELS, return_dict=False)
    model.backbone = compiled
    with torch.no_grad(), pytest.raises(RuntimeError, match="compile it afterwards"):
        compiled(X, model._timesteps(X, 0), class_labels=LABELS, return_dict=False)
        model.perceive(X)


def test_nothing_is_kept_after_a_call_or_an_error(tiny_model):
    model = tiny_model("unet")
    model.perceive(X)
    with pytest.raises(RuntimeError):
        model.perceive(torch.zeros(2, 5, 8, 8))
    model.backbone(X, torch.zeros(2, dtype=torch.int64), class_labels=LABELS)
    for name in model.config.perception_blocks:
        (hook,) = model.backbone.get_submodule(name)._forward_hooks.values()
        assert hook.outputs.of_thread.value is None
