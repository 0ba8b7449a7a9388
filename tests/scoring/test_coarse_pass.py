"""A coarse pass: the best classes at lower resolution go on, and the confidence still holds."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file, save_file

import genrep_fast as gf
from genrep_fast.scoring.classifier.calibration import CoarseErrors
from genrep_fast.scoring.classifier.coarse_network import CoarseNetwork
from genrep_fast.scoring.classifier.network import Network
from genrep_fast.scoring.classifier.progress import Progress

K = 16
QUIET = {"progress": False}
SCHEDULER = DDPMScheduler(clip_sample=False)
BLOCKS = 0.6 * torch.randn(K, 1, 4, 4, generator=torch.Generator().manual_seed(0))
# Half of what tells the classes apart is seen at half of the resolution.
MEANS = F.interpolate(BLOCKS, scale_factor=2) + 0.3 * torch.randn(
    K, 1, 8, 8, generator=torch.Generator().manual_seed(1)
)
VARIANCE = 0.25


class Denoiser:
    """Exact for normal classes around MEANS, at full and at half resolution."""

    def __init__(self):
        self.sizes = []

    def __call__(self, x_t, timesteps, labels):
        self.sizes += [x_t.shape[-1]] * len(x_t)
        factor = 8 // x_t.shape[-1]
        means, variance = F.avg_pool2d(MEANS, factor), VARIANCE / factor**2
        alpha_bar = SCHEDULER.alphas_cumprod[timesteps][:, None, None, None]
        noise = x_t - alpha_bar.sqrt() * means[labels]
        return (1 - alpha_bar).sqrt() * noise / (1 - alpha_bar + alpha_bar * variance)


def draw(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % K
    noise = torch.randn(count, 1, 8, 8, generator=generator)
    return MEANS[labels] + VARIANCE**0.5 * noise, labels


def new_classifier(**options):
    return gf.DiffusionClassifier(Denoiser(), SCHEDULER, K, **options)


@pytest.fixture(scope="module")
def classifier():
    found = new_classifier()
    found.calibrate(*draw(200, seed=2), coarse=True, steps=8, **QUIET)
    return found


def test_few_classes_go_on_and_the_confidence_holds(classifier):
    x, _ = draw(320, seed=3)
    full = classifier(x, strategy="full", **QUIET)
    alone = classifier(x, **QUIET)
    sizes = classifier._network.denoiser.sizes
    sizes.clear()
    result = classifier(x, coarse=True, confidence=0.95, **QUIET)
    # 320 images at 5%: four standard deviations are 4.9%.
    assert (result.prediction == full.prediction).double().mean() > 0.95 - 0.049
    assert result.coarse_share == 0.25
    assert sizes.count(4) == result.coarse_evaluations.sum()
    assert sizes.count(8) == result.evaluations.sum() == result.steps.sum()
    assert (result.coarse_evaluations % K == 0).all() and (result.coarse_evaluations > 0).all()
    expected = result.evaluations + result.coarse_evaluations / 4
    torch.testing.assert_close(result.cost, expected.double())
    assert result.cost.mean() < alone.cost.mean()
    assert torch.equal(alone.cost, alone.evaluations.double())
    ran = result.steps > 0
    assert len(ran.sum(1).unique()) == 1 and ran.sum(1)[0] < K
    posterior = result.posterior.double().exp()
    torch.testing.assert_close(posterior.sum(1), torch.ones(320).double(), rtol=0, atol=1e-6)
    assert 0 < (posterior * ~ran).sum(1).max() <= 0.025 + 1e-6
    assert result.log_likelihood[~ran].isnan().all() and result.posterior.isfinite().all()


def test_the_best_coarse_errors_go_on(classifier):
    x, _ = draw(20, seed=4)
    result = classifier(x, strategy="full", coarse=gf.Coarse(steps=3, keep=5), **QUIET)
    coarse = gf.DiffusionClassifier(Denoiser(), SCHEDULER, K)
    # The same images and noise at half resolution, in the order of the signal.
    small = coarse.calibrate(F.avg_pool2d(x, 2), steps=8, seed=0, **QUIET)
    rows = classifier.calibration.coarse.rows[:3]
    np.testing.assert_array_equal(rows, classifier.calibration.order("signal")[:3])
    best = np.argsort(small.errors[:, rows].astype(float).mean(1), axis=1)[:, :5]
    ran = torch.zeros(20, K, dtype=torch.bool).scatter(1, torch.from_numpy(best), True)
    assert torch.equal(result.steps > 0, ran)
    assert (result.coarse_evaluations == 3 * K).all()
    assert (result.evaluations == 5 * 8).all()


def test_candidates_and_a_tree_come_first(classifier):
    def scorer(images):
        return -(images[:, None] - MEANS).square().flatten(2).sum(2)

    classifier(draw(1)[0], candidates=gf.Candidates(scorer, keep=2), **QUIET)
    x, _ = draw(20, seed=5)
    tree = [list(range(start, start + 4)) for start in range(0, K, 4)]
    call = {"candidates": gf.Candidates(scorer, keep=10), "tree": tree}
    before = classifier(x, strategy=gf.Full(2), **call, **QUIET)
    pass_ = gf.Coarse(steps=1, keep=1)
    result = classifier(x, strategy=gf.Full(2), coarse=pass_, **call, **QUIET)
    ran = (before.steps > 0).sum(1)
    # The pass sees what they let through; one class needs none.
    assert torch.equal(result.coarse_evaluations, torch.where(ran > 1, ran, 0))
    assert not ((result.steps > 0) & (before.steps == 0)).any()
    assert ((result.steps > 0).sum(1) == 1).all()
    assert (result.posterior.double().exp().sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("batch_size", [3, 50])
def test_a_coarse_pass_does_not_depend_on_the_batch(classifier, batch_size):
    x, _ = draw(10, seed=6)
    expected = classifier(x, coarse=True, **QUIET)
    other = new_classifier(batch_size=batch_size, pad_to=64)
    other.calibration = classifier.calibration
    result = other(x.split(4), coarse=True, **QUIET)
    for name in ("prediction", "steps", "evaluations", "coarse_evaluations"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name


def test_estimates_count_the_pass(classifier):
    for strategy in ("race", "full", gf.Full(5)):
        estimate = classifier.estimate(strategy=strategy, coarse=True)
        found = classifier(draw(100, seed=7)[0], strategy=strategy, coarse=True, **QUIET).cost
        assert estimate.evaluations == pytest.approx(found.mean().item(), rel=0.2)
        assert found.max() <= estimate.most


def test_the_bar_counts_the_pass_by_its_share(classifier, monkeypatch):
    told = []
    monkeypatch.setattr(Progress, "after_batch", lambda bar, evaluations: told.append(evaluations))
    result = classifier(draw(40, seed=7)[0], coarse=True, **QUIET)
    assert (result.coarse_evaluations > 0).all()
    assert sum(told) == pytest.approx(result.cost.sum().item())


def test_a_pass_that_tells_nothing_is_left_out():
    def blind(x_t, timesteps, labels):
        denoiser = Denoiser()
        labels = labels if x_t.shape[-1] == 8 else torch.zeros_like(labels)
        return denoiser(x_t, timesteps, labels)

    classifier = gf.DiffusionClassifier(blind, SCHEDULER, K)
    classifier.calibrate(*draw(40, seed=8), coarse=True, steps=4, **QUIET)
    x, _ = draw(5, seed=9)
    result = classifier(x, coarse=True, **QUIET)
    assert (result.coarse_evaluations == 0).all() and (result.steps > 0).all()
    assert torch.equal(result.prediction, classifier(x, **QUIET).prediction)


def test_a_saved_pass_comes_back(classifier, tmp_path):
    classifier.save_pretrained(tmp_path)
    same = gf.DiffusionClassifier.from_pretrained(tmp_path, Denoiser())
    x, _ = draw(10, seed=10)
    first, second = (c(x, coarse=True, **QUIET) for c in (classifier, same))
    assert torch.equal(first.posterior, second.posterior)
    assert torch.equal(first.cost, second.cost)


def broken(name, value):
    def change(tensors):
        tensors[name] = value(tensors[name])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("coarse_rows"), "must come together"),
        (broken("coarse_errors", lambda t: t[:-1]), "coarse_errors must be float32"),
        (broken("coarse_errors", lambda t: t.double()), "coarse_errors must be float32"),
        (broken("coarse_errors", lambda t: -t), "coarse_errors must be finite"),
        (broken("coarse_errors", lambda t: t * math.nan), "coarse_errors must be finite"),
        (broken("coarse_rows", lambda t: t + 8), "coarse_rows must be distinct"),
        (broken("coarse_rows", lambda t: t * 0), "coarse_rows must be distinct"),
        (broken("coarse_cost", lambda t: t * 0), "coarse_cost must be a factor and a share"),
        (broken("coarse_cost", lambda t: t * math.nan), "coarse_cost must be a factor"),
    ],
)
def test_damaged_files_are_refused(classifier, tmp_path, change, message):
    classifier.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("calibration-*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{message}"):
        gf.DiffusionClassifier.from_pretrained(tmp_path, Denoiser())


def tiny_dit(**options):
    torch.manual_seed(0)
    settings = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 2,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": 4,
        "norm_num_groups": 2,
    }
    return DiTTransformer2DModel(**settings | options).eval()


def test_merged_tokens_are_means_of_their_neighbours():
    model = tiny_dit()
    network = CoarseNetwork(Network(model, None, 5, None, None), 2)
    x = torch.randn(3, 2, 8, 8)
    t, labels = torch.tensor([10, 500, 900]), torch.tensor([0, 1, 3])
    seen = []
    hooks = [
        block.register_forward_hook(lambda *a: seen.append(a)) for block in model.transformer_blocks
    ]
    with torch.no_grad():
        output = network(x, t, labels)
        tokens = model.pos_embed(x).unflatten(1, (4, 4))
        means = tokens.unflatten(1, (2, 2)).unflatten(3, (2, 2)).mean((2, 4)).flatten(1, 2)
        torch.testing.assert_close(seen[0][1][0], means)
        for hook in hooks:
            hook.remove()
        for block in model.transformer_blocks:
            means = block(means, timestep=t, class_labels=labels)
        grid = means.unflatten(1, (2, 2)).repeat_interleave(2, 1).repeat_interleave(2, 2)
        embedding = model.transformer_blocks[0].norm1.emb(t, labels, hidden_dtype=x.dtype)
        shift, scale = model.proj_out_1(F.silu(embedding)).chunk(2, dim=1)
        out = model.norm_out(grid.flatten(1, 2)) * (1 + scale[:, None]) + shift[:, None]
        patches = model.proj_out_2(out).reshape(3, 4, 4, 2, 2, -1)
        expected = torch.einsum("nhwpqc->nchpwq", patches).reshape(3, -1, 8, 8)
    assert output.shape == x.shape
    torch.testing.assert_close(output, expected[:, :2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("as_genrep", [False, True])
def test_a_dit_is_as_it_was_after_the_pass(as_genrep):
    model = tiny_dit()
    if as_genrep:
        model = gf.GenRep.from_backbone(model, 4)
    classifier = gf.DiffusionClassifier(model, SCHEDULER, 4)
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    before = classifier(x, strategy=gf.Full(2), **QUIET)
    classifier.calibrate(x, coarse=True, steps=3, **QUIET)
    share = classifier.calibration.coarse.share
    # Blocks take a quarter, or less of attention; embeddings and the output stay.
    assert 0.2 < share < 0.6
    result = classifier(x, strategy=gf.Full(2), coarse=gf.Coarse(steps=2, keep=2), **QUIET)
    assert (result.coarse_evaluations == 8).all() and (result.evaluations == 4).all()
    after = classifier(x, strategy=gf.Full(2, weights="uniform"), **QUIET)
    assert torch.equal(after.log_likelihood, before.log_likelihood)
    assert not any(
        part._forward_hooks for name, part in model.named_modules() if name.endswith("pos_embed")
    )


def test_hooks_are_gone_after_an_error():
    model = tiny_dit()
    network = CoarseNetwork(Network(model, None, 5, None, None), 3)
    with pytest.raises(ValueError, match="the 4 × 4 tokens .* multiples of the factor 3"):
        network(torch.randn(1, 2, 8, 8), torch.tensor([1]), torch.tensor([0]))
    assert not model.pos_embed._forward_hooks
    assert not model.transformer_blocks[-1]._forward_hooks


def test_hooks_that_do_not_run_are_noticed():
    model = tiny_dit()
    model.forward = lambda x_t, *_: x_t
    network = CoarseNetwork(Network(model, None, 5, None, None), 2)
    with pytest.raises(ValueError, match="coarse: tokens were not merged"):
        network(torch.randn(1, 2, 8, 8), torch.tensor([1]), torch.tensor([0]))


def test_a_unet_costs_a_quarter():
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
    )
    network = Network(model, None, 3, None, None)
    with torch.no_grad():
        share = CoarseNetwork(network, 2).share(network, torch.zeros(1, 16, 16), torch.tensor(5))
    assert 0.25 < share < 0.27


def test_what_is_refused(classifier):
    x, _ = draw(2)
    for options in ({"factor": 1}, {"steps": 0}, {"keep": 0}, {"steps": 5}):
        with pytest.raises(ValueError, match=next(iter(options))):
            gf.Coarse(**options)
    with pytest.raises(TypeError, match="factor must be an integer"):
        gf.Coarse(factor=2.0)
    for call in (classifier, classifier.calibrate):
        with pytest.raises(TypeError, match="coarse must be True or gf.Coarse, got 2"):
            call(x, coarse=2, **QUIET)
        with pytest.raises(ValueError, match="keep must be at most the 16 classes, got 17"):
            call(x, coarse=gf.Coarse(keep=17), **QUIET)
    with pytest.raises(ValueError, match=r"no errors at 1/4 of the resolution; call calibrate"):
        classifier(x, coarse=gf.Coarse(4), **QUIET)
    plain = new_classifier()
    for strategy in ("race", "full"):
        with pytest.raises(ValueError, match="coarse needs a calibration; call calibrate"):
            plain(x, strategy=strategy, coarse=True, **QUIET)
    plain.calibrate(draw(4)[0], steps=2, **QUIET)
    with pytest.raises(ValueError, match=r"no errors at 1/2 of the resolution"):
        plain(x, coarse=True, **QUIET)
    with pytest.raises(ValueError, match="multiples of the factor 3, got 8 × 8"):
        plain.calibrate(draw(4)[0], coarse=gf.Coarse(3), steps=2, **QUIET)
    plain.calibrate(draw(4)[0], coarse=True, steps=2, **QUIET)
    assert len(plain.calibration.coarse.rows) == 2
    with pytest.raises(ValueError, match="steps of the coarse pass must be at most the 2"):
        plain(x, coarse=gf.Coarse(steps=3), **QUIET)

    def of_one_size(x_t, timesteps, labels):
        return x_t * MEANS[labels]

    fixed = gf.DiffusionClassifier(of_one_size, SCHEDULER, K)
    with pytest.raises(ValueError, match="coarse: the denoiser does not take inputs of 4 × 4"):
        fixed.calibrate(draw(4)[0], coarse=True, steps=2, **QUIET)
    assert fixed.calibration is None


def test_coarse_errors_without_arrays_are_none():
    assert CoarseErrors.of_arrays({}, (3, 2, 4)) is None
