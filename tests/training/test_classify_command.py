"""`genrep classify` and `genrep calibrate` with denoisers, of checkpoints and of pipelines."""

import json
import pickle
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from tiny_runs import failure

import genrep_fast as gf
from genrep_fast import cli, endings, pictures
from genrep_fast.commands import classifiers
from genrep_fast.commands.prompts import read_prompts

CLASSES = ("ape", "bee", "cat")


@pytest.fixture(scope="module")
def checkpoint(tiny_backbone, tmp_path_factory):
    """A GenRep of three classes that was not trained."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = gf.GenRep.from_backbone(tiny_backbone("unet"), 3, class_names=list(CLASSES))
    scheduler = DDPMScheduler(clip_sample=False)
    gf.GenRepPipeline(model=model, scheduler=scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Four grey images a class, in folders of their names."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir()
        for number in range(4):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def calibration(checkpoint, photos, tmp_path_factory):
    """What `genrep calibrate` wrote."""
    folder = tmp_path_factory.mktemp("calibration")
    arguments = ["--checkpoint", checkpoint, "--images", photos, "--labels", "--steps", 4]
    command("calibrate", *arguments, "--output", folder)
    return folder


def command(*arguments):
    cli.main(list(map(str, arguments)))


def lines_of(capsys, *arguments):
    """Fields of the lines on standard output, and standard error."""
    capsys.readouterr()
    command(*arguments)
    output, said = capsys.readouterr()
    return [line.split("\t") for line in output.splitlines()], said


def paths_of(photos):
    return [str(photos / name / f"{number}.png") for name in CLASSES for number in range(4)]


def denoising(checkpoint, photos, *options):
    return ["classify", "--checkpoint", checkpoint, "--images", photos, *options]


# A checkpoint's denoiser


def test_a_strategy_classifies_by_the_denoiser(checkpoint, photos, capsys):
    lines, said = lines_of(capsys, *denoising(checkpoint, photos, "--strategy", "stratified"))
    pipeline = gf.GenRepPipeline.from_pretrained(checkpoint)
    images = [pictures.prepared(path, (1, 8, 8)).pixels for path in paths_of(photos)]
    classifier = gf.DiffusionClassifier(pipeline.model.denoise, pipeline.scheduler, 3)
    expected = classifier(torch.stack(images), strategy="stratified", progress=False)
    assert [line[0] for line in lines] == paths_of(photos)
    assert [line[1] for line in lines] == [CLASSES[label] for label in expected.prediction]
    assert [line[3] for line in lines] == ["24"] * 12
    probabilities = torch.tensor([float(line[2]) for line in lines])
    torch.testing.assert_close(probabilities, expected.posterior.amax(1).exp(), atol=1e-3, rtol=0)
    assert said == ""
    # The head stays the default.
    by_head, _ = lines_of(capsys, *denoising(checkpoint, photos))
    assert {len(line) for line in by_head} == {3}


def test_a_calibrated_race_writes_a_folder_and_goes_on(
    checkpoint, photos, calibration, tmp_path, capsys
):
    options = ["--strategy", "race", "--calibration", calibration, "--labels"]
    output = tmp_path / "results"
    plain, _ = lines_of(capsys, *denoising(checkpoint, photos, *options))
    lines, said = lines_of(capsys, *denoising(checkpoint, photos, *options, "--output", output))
    assert [line[:2] for line in lines] == [line[:2] for line in plain]
    assert f"wrote {output}: classification.json, parts/\n" in said
    result = gf.SavedResults(output).load()
    right = int((result.prediction == torch.arange(3).repeat_interleave(4)).sum())
    assert f"accuracy {right / 12:.1%} (" in said
    assert result.names == paths_of(photos)
    settings = json.loads((output / "classification.json").read_text())
    assert settings["denoiser"]["loaded_from"].startswith(str(checkpoint))
    assert settings["denoiser"]["parameters"] and settings["pad_to"] == settings["batch_size"]
    again, _ = lines_of(capsys, *denoising(checkpoint, photos, *options, "--output", output))
    assert again == lines
    # Fewer images than the folder holds.
    fewer = denoising(checkpoint, photos / "ape", *options, "--output", output)
    assert lines_of(capsys, *fewer)[0] == lines[:4]
    for changed, told in (
        (["--seed", 1], "seed is 0 there and 1 here"),
        (["--confidence", 0.9], "confidence is 0.99 there and 0.9 here"),
    ):
        line = failure(
            capsys, *denoising(checkpoint, photos, *options, *changed, "--output", output)
        )
        assert line.startswith(f"genrep classify: output: {output} holds") and told in line


def test_an_interrupted_classification_is_kept(checkpoint, photos, tmp_path, capsys, monkeypatch):
    options = ["--strategy", "full", "--batch_size", 24, "--output", tmp_path / "a b"]
    original, read = pictures.prepared, []

    def prepared(*arguments):
        read.append(arguments)
        if len(read) == 18:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(pictures, "prepared", prepared)
    with pytest.raises(SystemExit) as end:
        command(*denoising(checkpoint, photos, photos / "bee", photos / "cat", *options))
    assert end.value.code == endings.INTERRUPTED
    assert capsys.readouterr().err == (
        "genrep classify: interrupted; what has finished is kept in "
        f"'{tmp_path / 'a b'}', the same command goes on\n"
    )
    assert len(gf.SavedResults(tmp_path / "a b")) > 0
    read.clear()
    read += range(17)
    with pytest.raises(SystemExit):
        command(*denoising(checkpoint, photos, *options[:-1], tmp_path / "c"))
    assert capsys.readouterr().err == "genrep classify: interrupted; nothing has finished\n"
    assert not (tmp_path / "c").exists()


def test_calibrate_tells_what_it_found(checkpoint, photos, calibration, tmp_path, capsys):
    arguments = ["--checkpoint", checkpoint, "--images", photos / "ape", photos / "bee"]
    command("calibrate", *arguments, "--steps", 3, "--output", tmp_path / "c")
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("calibration on 8 images, 3 timesteps, 3 classes: s²")
    assert told[1] == f"wrote {tmp_path / 'c'}: classifier.json"
    saved = gf.DiffusionClassifier.from_pretrained(calibration, lambda x, t, y: x)
    assert saved.calibration.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "checkpoint or pipeline must be given, got neither"),
        (
            ["--checkpoint", "a", "--pipeline", "b"],
            "checkpoint or pipeline must be given, got both",
        ),
        (["--pipeline", "a"], "pipeline and prompts must be given together"),
        (["--checkpoint", "a", "--prompts", "b"], "pipeline and prompts must be given together"),
        (["--checkpoint", "a", "--output", "b"], "output needs --strategy: the head has none"),
        (["--checkpoint", "a", "--calibration", "b"], "calibration needs --strategy"),
        (["--checkpoint", "a", "--candidates", "b"], "candidates needs --strategy"),
        (["--checkpoint", "a", "--dtype", "float16"], "dtype is that of a pipeline"),
        (["--checkpoint", "a", "--device", "quantum"], "device: 'quantum' cannot be used"),
        (["--checkpoint", "a", "--batch_size", "0"], "batch_size must be at least 1"),
        (["--checkpoint", "a", "--seed", "-1"], "seed must lie in"),
        (["--pipeline", "a", "--prompts", "no.txt"], "prompts: no.txt does not exist"),
    ],
)
def test_arguments_that_do_not_go_together_are_one_line(capsys, options, message):
    assert message in failure(capsys, "classify", "--images", "x.png", *options)


def test_calibrations_of_others_are_refused(checkpoint, photos, calibration, tmp_path, capsys):
    def refused(folder, *options):
        race = ["--strategy", "race", *options, "--calibration", folder]
        return failure(capsys, *denoising(checkpoint, photos, *race))

    assert f"calibration: {tmp_path} holds no classifier.json" in refused(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(calibration, other)
    settings = json.loads((other / "classifier.json").read_text())
    settings["scheduler"]["beta_start"] = 0.0002
    (other / "classifier.json").write_text(json.dumps(settings))
    assert "scheduler.beta_start is 0.0002 there and 0.0001 here" in refused(other)
    settings["calibration"] = None
    (other / "classifier.json").write_text(json.dumps(settings))
    assert f"calibration: {other} holds a classifier that was not calibrated" in refused(other)
    four = gf.DiffusionClassifier(
        lambda x, t, y: x * y.view(-1, 1, 1, 1), DDPMScheduler(clip_sample=False), 4
    )
    four.calibrate(torch.rand(3, 1, 4, 4), steps=2, progress=False)
    four.save_pretrained(tmp_path / "four")
    assert "must be of 3 classes, got 4" in refused(tmp_path / "four")
    uncalibrated = denoising(checkpoint, photos, "--strategy", "race")
    line = failure(capsys, *uncalibrated, "--output", tmp_path / "o")
    assert "output: a race needs --calibration" in line and not (tmp_path / "o").exists()


# Images


def test_images_are_files_folders_and_patterns(photos, tmp_path, monkeypatch):
    assert pictures.image_paths([str(photos)]) == paths_of(photos)
    pattern = str(photos / "*" / "[12].png")
    assert pictures.image_paths([pattern, "x.png"]) == [
        *(str(photos / name / f"{number}.png") for name in CLASSES for number in (1, 2)),
        "x.png",
    ]
    assert pictures.image_paths([str(photos / "**" / "3.png")]) == paths_of(photos)[3::4]
    # A file's own name is no pattern.
    (tmp_path / "a[1].png").touch()
    monkeypatch.chdir(tmp_path)
    assert pictures.image_paths(["a[1].png"]) == ["a[1].png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="images: folder empty holds no image"):
        pictures.image_paths(["empty"])
    with pytest.raises(ValueError, match=r"images: no file matches \*.jpg"):
        pictures.image_paths(["*.jpg"])


def test_labels_are_the_names_of_folders(photos, capsys, checkpoint):
    assert pictures.folder_labels(paths_of(photos), CLASSES) == [0] * 4 + [1] * 4 + [2] * 4
    with pytest.raises(ValueError, match=r'"bee" is no class index .*the folder of .*bee/0.png'):
        pictures.folder_labels(paths_of(photos), ("ape", "cow", "cat"))
    with pytest.raises(ValueError, match='2 classes are named "ape"'):
        pictures.folder_labels(paths_of(photos), ("ape", "ape", "cat"))
    lines, said = lines_of(capsys, *denoising(checkpoint, photos, "--labels"))
    right = sum(line[1] in line[0] for line in lines)
    assert said.startswith(f"genrep classify: accuracy {right / 12:.1%} (")


# Prompts


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "a photo of a cat\n\n dog \n", {"a photo of a cat": None, "dog": None}),
        ("a.txt", "\ufeffcat\ta cat\ndog\ta dog\ncat\tkitten\n", {"cat": ["a cat", "kitten"]}),
        ("a.tsv", "cat\ta cat\r\nplain\r\n", {"cat": ["a cat"], "plain": None}),
        ("a.json", '{"cat": "a cat", "dog": ["a dog", "puppy"]}', {"dog": ["a dog", "puppy"]}),
    ],
)
def test_prompts_are_text_or_json(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    found = read_prompts(str(tmp_path / name))
    for key, prompts in expected.items():
        assert found[key] == (prompts or [key])
    assert len(found) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"cat\n", "must hold at least two classes, got 1"),
        ("a.txt", b"", "must hold at least two classes, got 0"),
        ("a.txt", b"cat\ndog\ncat\n", "the prompt 'cat' of 'cat' stands there twice"),
        ("a.txt", b"cat\tx\ndog\tx\n", "the prompt 'x' of 'dog' stands there twice"),
        ("a.txt", b"cat\t\ndog\n", "the prompt '' of 'cat' is empty"),
        ("a.txt", b"\xff\xfe", "must be text in UTF-8"),
        ("a.json", b"{", "is damaged"),
        ("a.json", b'["cat", "dog"]', "must hold an object of names, .* got list"),
        ("a.json", b'{"cat": 1, "dog": "d"}', "got 1 for 'cat'"),
        ("a.json", b'{"cat": [], "dog": "d"}', r"got \[\] for 'cat'"),
        ("a.json", b'{"cat": ["c", 2], "dog": "d"}', r"got \['c', 2\] for 'cat'"),
        ("a.json", b'{"cat": "c", "cat": "d"}', "it says 'cat' twice"),
    ],
)
def test_other_prompts_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_prompts(str(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)


# Pipelines of diffusers


@pytest.fixture
def pipeline_folder(tmp_path):
    """A pipeline of diffusers with one network."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def change_index(folder, **values):
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | values))


def test_a_folder_of_a_pipeline_is_loaded(pipeline_folder):
    pipe = classifiers.load_diffusers_pipeline(str(pipeline_folder), "float16")
    assert isinstance(pipe, DDPMPipeline) and pipe.unet.dtype == torch.float16
    assert (
        classifiers.load_diffusers_pipeline(str(pipeline_folder), None).unet.dtype == torch.float32
    )


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """The folder of a tiny StableDiffusionPipeline."""
    pytest.importorskip("transformers")
    import tiny_pipelines

    folder = tmp_path_factory.mktemp("stable_diffusion")
    tiny_pipelines.save_pipeline("StableDiffusionPipeline", folder)
    return folder


@pytest.mark.slow
def test_a_pipeline_classifies_by_prompts(stable_diffusion, checkpoint, photos, tmp_path, capsys):
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"ape": "an ape", "bee": ["a bee", "bees"], "cat": "a cat"}')
    source = ["--pipeline", stable_diffusion, "--prompts", prompts, "--images", photos]
    lines, said = lines_of(capsys, "classify", *source, "--strategy", "stratified")
    pipe = classifiers.load_diffusers_pipeline(str(stable_diffusion), None)
    by_prompts = gf.DiffusionClassifier.from_pipeline(
        pipe, ["an ape", ["a bee", "bees"], "a cat"], null_prompt=None
    )
    assert by_prompts.image_size == (16, 16)
    images = [pictures.prepared(path, (3, 16, 16)).pixels for path in paths_of(photos)]
    expected = by_prompts(torch.stack(images), strategy="stratified", progress=False)
    assert [line[1] for line in lines] == [CLASSES[label] for label in expected.prediction]
    # Four prompts at eight steps.
    assert {line[3] for line in lines} == {"32"} and said == ""
    calibrate = ["calibrate", *source, "--steps", 3, "--output", tmp_path / "c"]
    assert len(lines_of(capsys, *calibrate)[0]) == 2
    race = ["--calibration", tmp_path / "c", "--output", tmp_path / "o"]
    raced, _ = lines_of(capsys, "classify", *source, *race)
    settings = gf.SavedResults(tmp_path / "o").settings
    assert settings["denoiser"]["class"] == "StableDiffusionPipeline"
    assert settings["denoiser"]["prompts"] == [["an ape"], ["a bee", "bees"], ["a cat"]]
    assert settings["strategy"]["name"] == "Race" and settings["vae"]["parameters"]
    assert lines_of(capsys, "classify", *source, *race)[0] == raced
    prompts.write_text('{"ape": "an ape", "bee": ["a bee", "bugs"], "cat": "a cat"}')
    line = failure(capsys, "classify", *source, *race[:2])
    assert f"calibration: {tmp_path / 'c'} is of another denoiser, or of other prompts" in line
    line = failure(capsys, "classify", *source, "--strategy", "full", *race[2:])
    assert "holds images of other settings" in line and "denoiser." in line
    line = failure(capsys, "classify", *source, "--strategy", "full", "--candidates", checkpoint)
    wanted = (
        "must look at what the denoiser gets, pixels or latents of 4 channels, got a model of 1"
    )
    assert f"candidates: {checkpoint} {wanted}" in line


@pytest.mark.slow
def test_a_pipeline_in_half_precision(stable_diffusion, photos, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("an ape\na bee\na cat\n")
    source = ["--pipeline", stable_diffusion, "--prompts", tmp_path / "prompts.txt"]
    options = ["--images", photos / "ape", "--dtype", "bfloat16", "--strategy", "full"]
    lines, _ = lines_of(capsys, "classify", *source, *options, "--output", tmp_path / "o")
    assert len(lines) == 4
    assert gf.SavedResults(tmp_path / "o").settings["dtype"] == "torch.bfloat16"


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was read",)


def with_pickle(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with open(folder / "unet" / "diffusion_pytorch_model.bin", "wb") as file:
        pickle.dump(Bomb(), file)


def with_code(name):
    def add(folder):
        path = folder / name
        path.write_text("raise SystemExit('code was run')")

    return add


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "holds no pipeline"),
        (lambda folder: (folder / "model_index.json").write_text("["), "is damaged"),
        (lambda folder: (folder / "model_index.json").write_text("[]"), "it holds no object"),
        (lambda folder: change_index(folder, _class_name=["own", "Own"]), r"got \['own', 'Own'\]"),
        (lambda folder: change_index(folder, _class_name="utils"), "got 'utils'"),
        (lambda folder: change_index(folder, _class_name="UNet2DModel"), "got 'UNet2DModel'"),
        (
            lambda folder: change_index(folder, _class_name="GenRepPipeline"),
            "pass it as --checkpoint",
        ),
        (
            lambda folder: change_index(folder, unet=["os", "system"]),
            "unet must be of diffusers or",
        ),
        (with_code("None.py"), "holds code, which is not run: .*None.py"),
        (with_code("unet/diffusers.py"), "holds code, which is not run: .*diffusers.py"),
        (with_pickle, "no file named diffusion_pytorch_model.safetensors found in .*/unet"),
        (lambda folder: (folder / "unet/config.json").write_text("{"), "unet/config.json' is not"),
        (lambda folder: shutil.rmtree(folder / "unet"), "no file named config.json found in"),
    ],
)
def test_unsafe_and_damaged_pipelines_are_one_line(
    pipeline_folder, photos, tmp_path, capsys, damage, message
):
    (tmp_path / "prompts.txt").write_text("ape\nbee\n")
    damage(pipeline_folder)
    options = ["--pipeline", pipeline_folder, "--prompts", tmp_path / "prompts.txt"]
    capsys.readouterr()
    line = failure(capsys, "classify", *options, "--images", photos)
    assert line.startswith("genrep classify: ")
    assert re.search(message, line)


def test_a_pipeline_that_does_not_say_its_size(stable_diffusion, photos, tmp_path, capsys):
    folder = shutil.copytree(stable_diffusion, tmp_path / "pipe")
    config = folder / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": None}))
    (tmp_path / "prompts.txt").write_text("ape\nbee\n")
    options = ["--pipeline", folder, "--prompts", tmp_path / "prompts.txt"]
    line = failure(capsys, "classify", *options, "--images", photos)
    assert "pipeline: its network's configuration has no sample_size" in line
