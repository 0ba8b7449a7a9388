"""Images that are no squares: backbones, batches, pictures, and commands over strings of digits."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from tiny_runs import failure, make_splits, train

import genrep_fast as gf
from genrep_fast import cli
from genrep_fast.data import DataSplits, ImageDataset, load_data
from genrep_fast.models.backbones import build_backbone
from genrep_fast.training import TrainingConfig
from genrep_fast.training.batches import seeded_loader
from genrep_fast.training.networks import build_model


def wide_splits(height=8, width=24, channels=1):
    """Three classes of images that are their column's number, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    ramp = torch.linspace(-0.9, 0.9, width).expand(channels, height, width)

    def split(count):
        labels = torch.arange(count) % 3
        noise = 0.01 * torch.randn(count, channels, height, width, generator=generator)
        return ImageDataset((ramp + noise) * (1 - 0.2 * labels).view(-1, 1, 1, 1), labels)

    shape = (channels, height, width)
    return DataSplits(split(24), split(9), split(9), ("ape", "bee", "cat"), shape)


@pytest.mark.parametrize("size", [(8, 24), [8, 16], 9, None])
def test_a_dit_of_no_square_of_patches_is_refused(tiny_backbone, size):
    config = {**dict(tiny_backbone("dit").config), "_class_name": "DiTTransformer2DModel"}
    with pytest.raises(ValueError, match=r"one side of a square and a multiple of its patch_size"):
        build_backbone({**config, "sample_size": size})


@pytest.mark.parametrize("shape", [(4, 16), (8, 24), (16, 4), (9, 9)])
def test_a_dit_refuses_inputs_of_which_it_would_mix_the_patches(tiny_model, shape):
    model = tiny_model("dit")
    x = torch.zeros(4, 1, *shape)
    labels = torch.zeros(4, dtype=torch.int64)
    told = "takes squares whose side is a multiple of 2, got {} × {}".format(*shape)
    for call in (
        lambda: model(x, 5, labels),
        lambda: model.perceive(x),
        lambda: model.semantic_features(x),
    ):
        with pytest.raises(ValueError, match=told):
            call()
    # Squares of another size are none of its business.
    assert model.perceive(torch.zeros(4, 1, 16, 16)).shape == (4, 3)


def test_a_run_of_a_dit_on_rectangles_ends_with_one_sentence(backbones, tmp_path, capsys):
    line = failure(
        capsys,
        "train",
        "--data",
        "digit-strings:3",
        "--backbone",
        backbones / "dit",
        "--output",
        tmp_path / "run",
    )
    # Before that its number of classes does not fit.
    assert "num_classes must be the backbone's num_embeds_ada_norm = 3, got 1000" in line
    config = TrainingConfig(output=str(tmp_path / "run"), backbone=str(backbones / "dit"))
    with pytest.raises(
        ValueError, match=r"squares alone, so a UNet2DModel with sample_size=\(8, 24\) is wanted"
    ):
        build_model(config, wide_splits())
    config = TrainingConfig(output=str(tmp_path / "run"), backbone=str(backbones / "unet"))
    with pytest.raises(ValueError, match=r"\[1, 8, 8\]; a UNet2DModel with sample_size=\(8, 24\)"):
        build_model(config, wide_splits())
    with pytest.raises(ValueError, match="see image_size"):
        build_model(config, make_splits(side=16))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("height", "width"), [(8, 16), (8, 24), (24, 8)])
def test_wide_images_are_cropped_and_flipped(height, width):
    splits = wide_splits(height, width)
    config = TrainingConfig(random_crop=True, random_flip=True, batch_size=24, steps=8)
    for images, _, _ in seeded_loader(config, splits.train, start=0):
        assert images.shape == (24, 1, height, width)
        slopes = images[:, 0].mean(1).diff(dim=1).mean(1)
        # The ramp runs to the right in some and to the left in others, and is no steeper.
        assert (slopes > 0).any() and (slopes < 0).any()
        assert slopes.abs().max() <= 1.8 / (width - 1)


@pytest.mark.parametrize("shape", [(8, 16), (8, 24), (24, 8)])
def test_a_unet_has_maps_of_its_inputs_shape(tiny_model, shape):
    model = tiny_model("unet", active=True, sample_size=shape)
    assert model.sample_shape == model.image_shape == (1, *shape)
    x = torch.randn(2, 1, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2])
    semantic = model.semantic_features(x)
    # The shape of the block, half of the input's at most.
    assert semantic.shape[2] * shape[1] == semantic.shape[3] * shape[0]
    output = model(x, 10, labels, semantic=semantic)
    assert output.sample.shape == x.shape and model.perceive(x).shape == (2, 3)
    # One image does not depend on the other: nothing is mixed up between rows and batch.
    alone = model(x[:1], 10, labels[:1], semantic=semantic[:1]).sample
    torch.testing.assert_close(output.sample[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def strings(tmp_path_factory, tiny_backbone):
    """The folder of a run of four steps over digit-strings:3 with a teacher's bank, evaluated."""
    root = tmp_path_factory.mktemp("strings")
    tiny_backbone("unet", 1000, sample_size=(8, 24)).save_pretrained(root / "backbone")
    options = {
        "data": "digit-strings:3",
        "backbone": root / "backbone",
        "steps": 4,
        "batch_size": 8,
        "teacher_chains": 1,
        "teacher_steps": 1,
        "sample_every": 4,
        "evaluate": "false",
        "output": root / "run",
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    cli.main(["train", *arguments])
    return root / "run"


def test_a_run_over_strings_leaves_a_pipeline_of_their_shape_and_names(strings):
    pipeline = gf.GenRepPipeline.from_pretrained(strings / "model")
    assert pipeline.model.image_shape == (1, 8, 24)
    assert pipeline.model.class_names[:2] == ["000", "001"]
    assert pipeline.model.class_names[-1] == "999"
    config = json.loads((strings / "config.json").read_text())
    assert config["data"] == "digit-strings:3"
    # Four images of twenty classes.
    pictures = [Image.open(path).size for path in (strings / "samples").iterdir()]
    assert pictures == [(4 * 24, 20 * 8)]


def test_generate_takes_names_of_strings_and_keeps_their_shape(strings, tmp_path, capsys):
    arguments = ["generate", "--checkpoint", str(strings), "--num_inference_steps", "2"]
    labels = ["007", "07", "7", "999"]
    capsys.readouterr()
    cli.main([*arguments, "--output", str(tmp_path / "a"), "--labels", *labels, "--grid"])
    output, said = capsys.readouterr()
    names = [line.rsplit("/", 1)[1] for line in output.splitlines()]
    assert said == "" and names == [
        "0000-class-7-007.png",
        "0001-class-7-007.png",
        "0002-class-7-007.png",
        "0003-class-999.png",
        "grid.png",
    ]
    small = np.asarray(Image.open(tmp_path / "a" / names[0]))
    assert small.shape == (8, 24)
    assert Image.open(tmp_path / "a" / "grid.png").size == (3 * 24, 2 * 8)
    cli.main([*arguments, "--output", str(tmp_path / "b"), "--labels", *labels, "--size", "16"])
    large = np.asarray(Image.open(tmp_path / "b" / names[0]))
    assert np.array_equal(large, small.repeat(2, 0).repeat(2, 1))


def test_classify_says_what_it_does_not_see(strings, tmp_path, capsys):
    string = ((load_data("digit-strings:3").test.images[0, 0] + 1) * 127.5).numpy().astype(np.uint8)
    fitting = Image.fromarray(string)
    files = {
        "own.png": fitting,
        "larger.png": fitting.resize((240, 80)),
        "square.png": Image.new("L", (24, 24), 90),
        "tall.png": Image.new("RGB", (24, 240), (9, 9, 9)),
    }
    for name, image in files.items():
        image.save(tmp_path / name)
    turned = Image.Exif()
    # Stored on its side: upright it is as wide as the model's.
    turned[0x0112] = 6
    fitting.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=turned)

    def classify(*names):
        arguments = [str(tmp_path / name) for name in names]
        cli.main(["classify", "--checkpoint", str(strings), "--images", *arguments])
        output, said = capsys.readouterr()
        assert len(output.splitlines()) == len(names)
        assert all(re.fullmatch(r"\d{3}", line.split("\t")[1]) for line in output.splitlines())
        return said

    capsys.readouterr()
    assert classify("own.png", "larger.png", "turned.jpg") == ""
    said = classify("own.png", "square.png", "tall.png")
    assert said == (
        "genrep classify: images are cropped to the model's shape, 24 pixels across and 8 down: "
        f"33% of {tmp_path / 'square.png'} is seen, and little of 1 more\n"
    )


def test_evaluate_refuses_images_of_another_shape(strings, tmp_path, capsys, tiny_backbone):
    folder = tmp_path / "images"
    for place, name in enumerate(("ape", "bee", "cat")):
        (folder / name).mkdir(parents=True)
        for index in range(6):
            Image.new("L", (8, 8), 10 * index + place).save(folder / name / f"{index}.png")
    network = tiny_backbone("unet", sample_size=(8, 24))
    model = gf.GenRep.from_backbone(network, 3, class_names=["ape", "bee", "cat"])
    pipeline = gf.GenRepPipeline(model=model, scheduler=DDPMScheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    arguments = ["--checkpoint", tmp_path / "model", "--data", f"folder:{folder}"]
    with pytest.raises(SystemExit) as end:
        cli.main(["evaluate", *map(str, arguments), "--output", str(tmp_path / "out")])
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert "must have images of the model's [1, 8, 24], got [1, 8, 8]" in line


@pytest.mark.slow
@pytest.mark.parametrize("vae", [False, True])
def test_every_stage_trains_on_wide_images(tmp_path, tiny_backbone, tiny_vae, vae):
    channels, scale = (4, 2) if vae else (1, 1)
    network = tiny_backbone("unet", channels=channels, sample_size=(8, 24))
    network.save_pretrained(tmp_path / "backbone")
    tiny_vae().save_pretrained(tmp_path / "vae")
    config = TrainingConfig(
        output=str(tmp_path / "run"),
        backbone=str(tmp_path / "backbone"),
        vae=str(tmp_path / "vae") if vae else None,
        diffusion_steps=1,
        perception_steps=1,
        joint_steps=1,
        batch_size=8,
        teacher_chains=2,
        teacher_steps=2,
        random_crop=True,
        evaluate=False,
    )
    splits = wide_splits(8 * scale, 24 * scale, channels=3 if vae else 1)
    trainer = train(config, splits)
    assert trainer.model.image_shape == (3 if vae else 1, 8 * scale, 24 * scale)
    pipeline = gf.GenRepPipeline.from_pretrained(tmp_path / "run" / "model")
    image = pipeline.generate([1], num_inference_steps=2).images[0]
    assert image.size == (24 * scale, 8 * scale)
