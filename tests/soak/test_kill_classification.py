"""A classification that is killed again and again, and goes on, ends with the bits of one that was
not.
"""

import dataclasses
import random

import numpy as np
import pytest
import soak_share
import torch
from PIL import Image
from training_process import Death, run

import genrep_fast as gf

K = 3
# Of the acceptance; fewer among all tests.
IMAGES = 40 if soak_share.seed is None else 1000


@pytest.fixture(scope="module")
def arguments(tiny_backbone, tmp_path_factory):
    """Of a race over a folder of images."""
    from diffusers import DDPMScheduler

    root = tmp_path_factory.mktemp("classification")
    model = gf.GenRep.from_backbone(tiny_backbone("unet", K), K)
    scheduler = DDPMScheduler(clip_sample=False)
    gf.GenRepPipeline(model=model, scheduler=scheduler).save_pretrained(root / "model")
    generator = np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(IMAGES):
        pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{number:04d}.png")
    source = ["--checkpoint", str(root / "model"), "--images", str(root / "images")]
    calibration = ["--images", *[str(root / "images" / f"{number:04d}.png") for number in range(8)]]
    calibrate = ["calibrate", *source[:2], *calibration, "--steps", "6"]
    assert run([*calibrate, "--output", str(root / "calibration")]) == 0
    options = ["--strategy", "race", "--calibration", str(root / "calibration")]
    return ["classify", *source, *options, "--batch_size", "64"]


@pytest.fixture(scope="module")
def unbroken(arguments, tmp_path_factory):
    """What a classification gives that nobody killed."""
    output = tmp_path_factory.mktemp("unbroken") / "results"
    assert run([*arguments, "--output", str(output)]) == 0
    return gf.SavedResults(output).load()


def deaths(seed):
    """Where one process after the other dies."""
    generator = random.Random(seed)
    if soak_share.seed is None:
        # Of the first ones, which there are however seldom parts are written.
        return [Death("event", generator.randint(3, 8)) for _ in range(2)]
    most = {"event": 25, "size": 100_000, "time": 6_000}
    kinds = generator.choices(list(most), (4, 1, 2), k=generator.randint(3, 12))
    return [Death(kind, generator.randint(1, most[kind])) for kind in kinds]


@pytest.mark.slow
@pytest.mark.parametrize("seed", soak_share.seeds(1, 4))
def test_a_killed_classification_ends_with_the_same_bits(arguments, unbroken, tmp_path, seed):
    output = tmp_path / "results"
    killed = 0
    finished = 0
    for death in deaths(seed):
        status = run([*arguments, "--output", str(output)], death)
        killed += status != 0
        if (output / "classification.json").exists():
            # What is there is whole, and nothing that was there is lost.
            kept = len(gf.SavedResults(output))
            assert kept >= finished
            finished = kept
        print(f"{death} -> {status}, {finished} images")
    assert run([*arguments, "--output", str(output)]) == 0
    assert killed or soak_share.seed is not None
    found = gf.SavedResults(output).load()
    assert len(found) == IMAGES
    for field in dataclasses.fields(found):
        own, other = getattr(found, field.name), getattr(unbroken, field.name)
        if isinstance(own, torch.Tensor):
            assert torch.equal(own.nan_to_num(7), other.nan_to_num(7)), field.name
        else:
            assert own == other, field.name
    left = sorted(path.name for path in output.iterdir())
    assert left == ["classification.json", "parts"]
    assert all(path.name.startswith("part-") for path in (output / "parts").iterdir())
