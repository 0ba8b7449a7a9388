"""Options of a run: which are refused, which are taken from the run that is resumed, and which
data fit a backbone.
"""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_runs import make_splits

from genrep_fast.training import Trainer, TrainingConfig


def test_a_used_output_folder_is_refused(finished):
    config, _ = finished
    before = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")}
    with pytest.raises(ValueError, match=r"output: .* holds a run already; pass --resume"):
        Trainer(config, make_splits())
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")} == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed", 5),
        ("batch_size", 9),
        ("gradient_weights", (0.5, 0.5)),
        ("teacher", "elbo"),
        ("vae", "elsewhere"),
    ],
)
def test_resuming_with_another_option_names_it(finished, option, value):
    config, _ = finished
    assert dataclasses.replace(config, resume=True).resumed() == dataclasses.replace(
        config, resume=True
    )
    with pytest.raises(ValueError, match=rf"{option} is .* now, but .*config.json says"):
        dataclasses.replace(config, resume=True, **{option: value}).resumed()


def test_resuming_takes_the_options_that_were_not_given_from_the_run(finished):
    config, _ = finished
    resumed = TrainingConfig(output=config.output, resume=True).resumed()
    assert resumed == dataclasses.replace(config, resume=True)
    fresh = TrainingConfig(output=config.output + " elsewhere", resume=True)
    assert fresh.resumed() == fresh


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"joint_steps": -1}, "joint_steps must not be negative, got -1"),
        ({"momentum": 1.5}, "momentum must be between 0 and 1, got 1.5"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"labelled_per_class": 0}, "labelled_per_class must be at least 1, got 0"),
        ({"diffusion_steps": 0, "perception_steps": 0, "joint_steps": 0}, "must not all be 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**options)


def test_steps_are_shared_out_in_the_ratio_of_the_stages():
    config = TrainingConfig(steps=41, diffusion_steps=200, perception_steps=50, joint_steps=150)
    assert config.stage_steps == (20, 5, 16) and config.scale == pytest.approx(41 / 400)
    assert TrainingConfig(steps=10**6).scale == 1


@pytest.mark.parametrize(
    ("options", "splits", "message"),
    [
        (
            {"backbone": "unet"},
            (1, 10),
            r"data: images \[1, 10, 10\] give inputs \[1, 10, 10\], "
            r"the backbone wants \[1, 8, 8\]; see image_size",
        ),
        ({"backbone": "unet"}, (3, 8), r"the backbone wants \[1, 8, 8\]"),
        ({"backbone": None}, (1, 9), "image_size must be even, got 9 × 9"),
        (
            {"backbone": None, "vae": "vae"},
            (1, 8),
            "vae: a latent model needs a backbone, got none",
        ),
    ],
)
def test_data_that_does_not_fit_the_backbone_is_refused(
    make_config, backbones, options, splits, message
):
    folders = {name: value and str(backbones / value) for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        Trainer(make_config(**folders), make_splits(*splits))


def test_missing_folders_are_named(make_config, tmp_path):
    for name in ("backbone", "scheduler"):
        with pytest.raises(FileNotFoundError, match=f"{name}: .*missing"):
            Trainer(make_config(**{name: str(tmp_path / "missing")}), make_splits())


def test_more_than_one_process_is_refused(make_config):
    with pytest.raises(RuntimeError, match="training runs in one process, got 2"):
        Trainer(make_config(), make_splits(), accelerator=SimpleNamespace(num_processes=2))
