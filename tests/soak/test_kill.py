"""A training run that is killed again and again, and resumed, ends with the bits of one that was
not.
"""

import random

import pytest
import soak_share
from safetensors.torch import load_file
from tiny_runs import history_file, without_times
from training_process import Death, run

from genrep_fast.training.checkpoints import newest_checkpoint, read_checkpoint


@pytest.fixture(scope="module")
def options(tiny_backbone, tmp_path_factory):
    """Of a run of eight steps with four checkpoints."""
    backbone = tmp_path_factory.mktemp("backbone")
    tiny_backbone("dit", 10).save_pretrained(backbone)
    options = {
        "backbone": str(backbone),
        "diffusion_steps": 2,
        "perception_steps": 2,
        "joint_steps": 4,
        "batch_size": 4,
        "teacher_chains": 2,
        "teacher_steps": 3,
        "teacher_refresh": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "evaluate": "false",
    }
    return [text for name, value in options.items() for text in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def unbroken(options, tmp_path_factory):
    """The folder of a run that nobody killed."""
    output = tmp_path_factory.mktemp("unbroken") / "run"
    assert run(["train", "--output", str(output), *options]) == 0
    return output


def deaths(seed):
    """Where one process after the other dies; a whole run has 130 events and takes two seconds."""
    if soak_share.seed is None:
        return [Death("manifest", 3)]  # before the last file of a checkpoint
    generator = random.Random(seed)
    most = {"event": 140, "manifest": 8, "size": 200_000, "time": 3000}
    kinds = generator.choices(list(most), (3, 1, 1, 1), k=generator.randint(1, 6))
    return [Death(kind, generator.randint(1, most[kind])) for kind in kinds]


def assert_same_run(output, unbroken):
    for path in sorted((unbroken / "model").rglob("*")):
        if path.is_file():
            found = (output / path.relative_to(unbroken)).read_bytes()
            assert found == path.read_bytes(), f"{path.name} differs"
    rows, expected = (without_times(history_file(folder)) for folder in (output, unbroken))
    assert rows == expected
    for name in ("model", "optimizer", "averages", "momentum", "teacher"):
        own, other = (
            load_file(newest_checkpoint(folder) / f"{name}.safetensors")
            for folder in (output, unbroken)
        )
        assert own.keys() == other.keys()
        assert all(own[key].equal(other[key]) for key in own), f"{name} differs"


def assert_only_whole_checkpoints(output):
    for folder in (output / "checkpoints").glob("step-*"):
        read_checkpoint(folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", soak_share.seeds(1, 6))
def test_a_killed_run_ends_with_the_same_bits(options, unbroken, tmp_path, seed):
    output = tmp_path / "run"
    arguments = ["train", "--output", str(output), *options, "--resume"]
    for death in deaths(seed):
        status = run(arguments, death)
        assert_only_whole_checkpoints(output)
        print(f"{death} -> {status}, newest {newest_checkpoint(output)}")
    assert run(arguments) == 0
    assert_same_run(output, unbroken)
    for folder in (".", "checkpoints"):
        left, expected = (
            sorted(path.name for path in (root / folder).iterdir()) for root in (output, unbroken)
        )
        assert left == expected
