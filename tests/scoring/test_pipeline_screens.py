"""Candidates, trees and the coarse pass before the classes of a pipeline."""

import pytest
import tiny_pipelines
import torch

import genrep_fast as gf

pytest.importorskip("transformers")

QUIET = {"progress": False}
MEMBERS = torch.tensor([1, 2, 1, 1])


@pytest.mark.parametrize(
    ("family", "prompts"),
    [
        ("StableDiffusionXLPipeline", ["a cat", ["a dog", "sun"], "a sea", "bed"]),
        ("PixArtSigmaPipeline", ["a cat", ["a dog", "sun"], "a sea", "bed"]),
        ("DiTPipeline", [0, [1, 2], 3, 4]),
    ],
)
def test_what_precedes_a_race_of_a_pipeline(family, prompts, tmp_path):
    tiny_pipelines.save_pipeline(family, tmp_path)
    pipe = tiny_pipelines.load_pipeline(tmp_path)
    classifier = gf.DiffusionClassifier.from_pipeline(pipe, prompts)
    images = 2 * torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 1

    def scorer(latents):
        assert latents.shape[1:] == (4, 8, 8)
        return latents.mean((2, 3))

    classifier.calibrate(images, steps=4, candidates=scorer, coarse=True, **QUIET)
    assert 0 < classifier.calibration.coarse.share < 1
    best = gf.Candidates(scorer, keep=3)
    result = classifier(images[:3], candidates=best, coarse=gf.Coarse(keep=2), **QUIET)
    assert ((result.steps > 0).sum(1) == 2).all()
    # Rows of the network, one a prompt, and the null prompt.
    rows = result.steps @ MEMBERS + result.steps.max(1).values
    assert torch.equal(result.evaluations, rows)
    saved = classifier(
        images[:3], candidates=best, coarse=gf.Coarse(keep=2), output=tmp_path / "results", **QUIET
    ).load()
    for name in ("prediction", "posterior", "evidence", "log_likelihood", "steps", "cost"):
        one, other = getattr(result, name), getattr(saved, name)
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    pruned = classifier(images[:3], tree=[[0, 1], [2, 3]], **QUIET)
    assert torch.allclose(pruned.posterior.exp().sum(1), torch.ones(3))
