"""Saved DiffusionClassifiers: what comes back, and damaged folders."""

import json
import os
import re

import numpy as np
import pytest
import tiny_pipelines
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file

import genrep_fast as gf
from genrep_fast.scoring.classifier import file as classifier_file

QUIET = {"progress": False}


def denoiser(x_t, timesteps, labels):
    return x_t * (1 + labels.view(-1, 1, 1, 1)) / 3


def calibrated(scheduler=None, labels=None):
    scheduler = scheduler or DDPMScheduler(clip_sample=False, beta_schedule="squaredcos_cap_v2")
    classifier = gf.DiffusionClassifier(denoiser, scheduler, 3, null_class=3)
    generator = torch.Generator().manual_seed(0)
    classifier.calibrate(torch.rand(8, 1, 4, 4, generator=generator), labels, steps=4, **QUIET)
    return classifier


@pytest.fixture
def folder(tmp_path):
    calibrated(labels=torch.arange(8) % 3).save_pretrained(tmp_path)
    return tmp_path


def calibration_file(folder):
    (file,) = folder.glob("calibration-*.safetensors")
    return file


@pytest.mark.parametrize("scheduler", [None, FlowMatchEulerDiscreteScheduler(shift=2.0)])
@pytest.mark.parametrize("labels", [None, torch.arange(8) % 3])
def test_a_saved_classifier_decides_the_same(tmp_path, scheduler, labels):
    classifier = calibrated(scheduler, labels)
    classifier.save_pretrained(tmp_path / "deep" / "folder")
    loaded = gf.DiffusionClassifier.from_pretrained(tmp_path / "deep" / "folder", denoiser)
    x = torch.rand(5, 1, 4, 4)
    first, second = classifier(x, **QUIET), loaded(x, **QUIET)
    for name, value in vars(first).items():
        other = getattr(second, name)
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name
    assert type(loaded.scheduler) is type(classifier.scheduler)
    assert (loaded.calibration.labels is None) == (labels is None)


def test_one_without_a_calibration_replaces_one_with(folder):
    (folder / "notes.txt").write_text("kept")
    gf.DiffusionClassifier(denoiser, DDPMScheduler(), 5).save_pretrained(folder)
    loaded = gf.DiffusionClassifier.from_pretrained(folder, denoiser, batch_size=7)
    assert (loaded.num_classes, loaded.calibration, loaded.batch_size) == (5, None, 7)
    assert sorted(os.listdir(folder)) == ["classifier.json", "notes.txt"]


def test_a_failed_save_leaves_the_old_classifier(folder, monkeypatch):
    before = gf.DiffusionClassifier.from_pretrained(folder, denoiser)
    write = classifier_file.write_atomically

    def full_disk(path, content):
        if path.name == "classifier.json":
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(classifier_file, "write_atomically", full_disk)
    with pytest.raises(OSError, match="No space left"):
        calibrated(FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)
    after = gf.DiffusionClassifier.from_pretrained(folder, denoiser)
    np.testing.assert_array_equal(after.calibration.errors, before.calibration.errors)


def test_a_scheduler_of_ones_own_may_be_given(folder):
    scheduler = DDPMScheduler(clip_sample=False)
    loaded = gf.DiffusionClassifier.from_pretrained(folder, denoiser, scheduler=scheduler)
    assert loaded.scheduler is scheduler
    with pytest.raises(ValueError, match="timesteps must be the scheduler's"):
        flow = FlowMatchEulerDiscreteScheduler()
        gf.DiffusionClassifier.from_pretrained(folder, denoiser, scheduler=flow)


def test_a_folder_without_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="classifier.json does not exist"):
        gf.DiffusionClassifier.from_pretrained(tmp_path, denoiser)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"num_classes": "3"}, "num_classes must be an integer"),
        ({"num_classes": 4}, r"errors must be \[N, S, 4\]"),
        ({"null_class": 1.5}, "null_class must be an integer"),
        ({"parameterization": 3}, "parameterization must be a word"),
        ({"format": 2}, "format must be 1, got 2"),
        ({"scheduler": {"_class_name": "os"}}, "scheduler 'os' is none of diffusers"),
        ({"scheduler": {"_class_name": "UNet2DModel"}}, "is none of diffusers"),
        ({"scheduler": 3}, "scheduler must be a configuration"),
        (
            {"scheduler": {"_class_name": "DDPMScheduler", "beta_schedule": "none"}},
            "DDPMScheduler refuses its configuration",
        ),
        ({"calibration": "../other.safetensors"}, "calibration must name a file of the folder"),
        ({"calibration": "gone.safetensors"}, "gone.safetensors is missing"),
    ],
)
def test_damaged_settings_name_the_file(folder, change, message):
    file = folder / "classifier.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message) as caught:
        gf.DiffusionClassifier.from_pretrained(folder, denoiser)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', "\x00"])
def test_other_settings_name_the_file(folder, content):
    (folder / "classifier.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(folder / "classifier.json"))):
        gf.DiffusionClassifier.from_pretrained(folder, denoiser)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("errors", lambda t: t.double(), "errors must be torch.float32"),
        ("errors", lambda t: t[:1], "roots must be|labels must be|errors"),
        ("errors", lambda t: t * float("nan"), "errors must be finite"),
        ("roots", lambda t: t - 100, "roots must be finite and not negative"),
        ("roots", lambda t: t[:, :2].clone(), "roots must be torch.float32"),
        ("roots", lambda t: t * 0, "denoiser must depend on its labels|roots"),
        ("timesteps", lambda t: t.flip(0), "timesteps must be the scheduler's"),
        ("labels", lambda t: t + 2, r"labels must lie in \[0, 3\)"),
        ("labels", lambda t: None, None),
        ("roots", lambda t: None, "it must hold errors, roots, timesteps"),
    ],
)
def test_damaged_calibrations_name_the_file(folder, name, change, message):
    file = calibration_file(folder)
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file({key: value for key, value in tensors.items() if value is not None}, file)
    if message is None:
        assert gf.DiffusionClassifier.from_pretrained(folder, denoiser).calibration.labels is None
        return
    with pytest.raises(ValueError, match=message) as caught:
        gf.DiffusionClassifier.from_pretrained(folder, denoiser)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_calibrations_name_the_file(folder, size):
    file = calibration_file(folder)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{re.escape(str(file))} is truncated"):
        gf.DiffusionClassifier.from_pretrained(folder, denoiser)


def test_a_calibration_of_other_timesteps_is_refused(folder):
    file = calibration_file(folder)
    tensors = load_file(file)
    tensors["timesteps"] = tensors["timesteps"] + 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match="timesteps must be the scheduler's"):
        gf.DiffusionClassifier.from_pretrained(folder, denoiser)


def test_classes_of_a_pipeline_may_be_numbers(tmp_path):
    pipe = tiny_pipelines.dit()
    classifier = gf.DiffusionClassifier.from_pipeline(pipe, [1, (2, 3)], null_prompt=None)
    classifier.save_pretrained(tmp_path)
    for same in (np.array([[1], [2, 3]], dtype=object), [np.int64(1), [2, 3]]):
        loaded = gf.DiffusionClassifier.from_pretrained(tmp_path, pipe=pipe, prompts=list(same))
        assert loaded.prompts == ((1,), (2, 3)) and loaded.null_class is None
    with pytest.raises(ValueError, match="prompts must be those of the saved classifier"):
        gf.DiffusionClassifier.from_pretrained(tmp_path, pipe=pipe, prompts=[1, 2])
