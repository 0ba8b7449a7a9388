"""Backbones, options and a finished run that the tests of training share."""

import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from tiny_runs import NEWEST, four_steps, train

from genrep_fast.training import TrainingConfig


def reset_accelerator_state():
    """Accelerate keeps one state a process, whatever precision and accumulation the next run asks
    for.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerator_state():
    yield
    reset_accelerator_state()


@pytest.fixture(scope="session")
def backbones(tiny_backbone, tiny_vae, tmp_path_factory):
    """Folders of backbones and of a VAE, as diffusers writes them."""
    root = tmp_path_factory.mktemp("backbones")
    tiny_backbone("unet").save_pretrained(root / "unet")
    tiny_backbone("dit").save_pretrained(root / "dit")
    tiny_backbone("dit", out_channels=2).save_pretrained(root / "learned dit")
    tiny_backbone("dit", channels=4, out_channels=8).save_pretrained(root / "latent dit")
    tiny_vae().save_pretrained(root / "vae")
    return root


@pytest.fixture
def make_config(backbones, tmp_path):
    def make(**options):
        defaults = {
            "output": str(tmp_path / "run"),
            "backbone": str(backbones / "dit"),  # a fifth of the UNet's time
            "diffusion_steps": 3,
            "perception_steps": 2,
            "joint_steps": 4,
            "batch_size": 8,
            "teacher_chains": 4,
            "teacher_steps": 4,
            "teacher_refresh": 2,
            "checkpoint_every": 2,
            "log_every": 1,
            "evaluate": False,
        }
        return TrainingConfig(**{**defaults, **options})

    return make


@pytest.fixture(scope="session")
def finished(backbones, tmp_path_factory):
    """The options of a finished run of four steps, and its parameters."""
    config = four_steps(tmp_path_factory.mktemp("finished") / "run", backbones / "dit")
    parameters = [parameter.detach().clone() for parameter in train(config).parameters]
    reset_accelerator_state()
    return config, parameters


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run elsewhere."""
    return Path(shutil.copytree(finished[0].output, tmp_path / "run"))


@pytest.fixture
def newest(copied):
    return copied / "checkpoints" / NEWEST
