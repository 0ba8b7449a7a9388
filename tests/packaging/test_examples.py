"""The scripts of examples/ run, learn, and resume; their way of using other frameworks holds with
mixed precision and checkpoints.
"""

import copy
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run_example(monkeypatch, capsys, tmp_path):
    """A function that runs a script with these arguments, as from a shell, and returns what it
    printed.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # Lightning sets it for good

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def printed(name, output):
    return [float(value) for value in re.findall(rf"{name} ([-+.\d]+)", output)]


def assert_learns(output):
    for loss in ("perception", "generation"):
        values = printed(loss, output)
        assert len(values) == 3 and values[-1] < 0.8 * values[0]
    assert all(-1 <= cosine <= 1 for cosine in printed("gradients", output))
    assert printed("test accuracy", output)[0] > 0.7


def test_plain_pytorch(run_example):
    output = run_example("plain_pytorch.py", "--epochs", 3)
    assert_learns(output)
    assert printed("teacher's accuracy", output)[-1] > 0.15  # of 10 classes, and on its way up


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate(mixed_precision, run_example, accelerate):
    assert_learns(
        run_example("accelerate_loop.py", "--epochs", 3, "--mixed_precision", mixed_precision)
    )


def test_accelerate_resumes(run_example, accelerate):
    whole = run_example("accelerate_loop.py", "--epochs", 2, "--output_dir", "run").splitlines()
    resumed = run_example(
        "accelerate_loop.py", "--epochs", 2, "--resume_from_checkpoint", "run/epoch-1"
    ).splitlines()
    assert len(resumed) == 2 and resumed == whole[-2:]


def test_lightning(run_example):
    pytest.importorskip("lightning")
    output = run_example("lightning_module.py", "--epochs", 3)
    (perception,), (generation,) = (
        re.findall(rf"'{loss}': ([.\d]+)", output) for loss in ("perception", "generation")
    )
    assert float(perception) < 0.5 and float(generation) < 0.4  # 2.3 and 0.8 before training
    assert float(re.search(r"test_accuracy\W+([.\d]+)", output)[1]) > 0.7


def test_zero_shot_classification(run_example, tmp_path):
    pytest.importorskip("transformers", minversion="5")
    from tiny_pipelines import save_pipeline

    save_pipeline("StableDiffusionPipeline", tmp_path / "pipeline")
    pictures = [tmp_path / f"{name}.png" for name in ("one", "two")]
    for shade, path in enumerate(pictures):
        Image.new("RGB", (40 + shade, 30), (200, 90 * shade, 20)).save(path)
    output = run_example(
        "zero_shot_classification.py",
        tmp_path / "pipeline",
        *pictures,
        "--prompts",
        "a cat",
        "a dog",
        "--steps",
        2,
    )
    for path in pictures:
        assert re.search(rf"^{path}: a (cat|dog) \(\d+\.\d%\)$", output, re.M)


@pytest.fixture
def run_in_two_processes(tmp_path):
    """A function that runs a script under torchrun, and returns what it printed."""

    def run(script, *arguments, processes=2):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", processes, EXAMPLES / script, *arguments]
        done = subprocess.run(
            list(map(str, command)),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("ddp.py", ["--reduce", "sharded"]), ("accelerate_ddp.py", ["--mixed_precision", "bf16"])],
)
def test_data_parallel(script, arguments, run_in_two_processes):
    assert_learns(run_in_two_processes(script, "--epochs", 3, *arguments))


def test_lightning_data_parallel(run_in_two_processes):
    pytest.importorskip("lightning")
    output = run_in_two_processes("lightning_ddp.py", "--epochs", 3)
    assert float(re.search(r"'perception': ([.\d]+)", output)[1]) < 0.5
    assert float(re.search(r"test_accuracy\W+([.\d]+)", output)[1]) > 0.7


def test_fsdp2_resumes_with_another_number_of_processes(run_in_two_processes):
    output = run_in_two_processes("fsdp2.py", "--epochs", 3)
    output += run_in_two_processes("fsdp2.py", "--epochs", 4, processes=1)
    starts = [line.split(":")[0] for line in output.splitlines()]
    assert starts == [f"epoch {epoch}" for epoch in (1, 2, 3, 4)]
    assert all(-1 <= cosine <= 1 for cosine in printed("gradients", output))
    losses, accuracies = printed("generation", output), printed("accuracy", output)
    assert losses[-1] < 1.1 * losses[-2] and losses[-1] < 0.8 * losses[0]
    assert accuracies[-1] > max(0.7, accuracies[-2] - 0.05)


@pytest.fixture
def lightning_fit(tmp_path):
    """A function that trains a module of the Lightning example on random images; returns the
    trainer and the module.
    """
    lightning = pytest.importorskip("lightning")
    module_class = runpy.run_path(str(EXAMPLES / "lightning_module.py"))["DigitsModule"]
    generator = torch.Generator().manual_seed(0)
    images, labels = (
        torch.randn(100, 1, 8, 8, generator=generator),
        torch.randint(10, (100,), generator=generator),
    )
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, labels), batch_size=50
    )

    def fit(epochs, *, ckpt_path=None, **options):
        torch.manual_seed(0)
        module = module_class()
        quiet = {
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        }
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=epochs, default_root_dir=tmp_path, **quiet, **options
        )
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        return trainer, module

    return fit


def flat(module):
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


def test_lightning_with_a_scaler(lightning_fit):
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Scaled(MixedPrecision):
        def autocast_context_manager(self):
            return torch.autocast("cpu", enabled=False)  # so that only the scaling differs

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    (_, scaled), (_, plain) = (
        lightning_fit(2, plugins=[Scaled("16-mixed", "cpu", scaler)]),
        lightning_fit(2),
    )
    torch.testing.assert_close(flat(scaled), flat(plain), rtol=1e-4, atol=1e-5)


def test_lightning_resumes(lightning_fit, tmp_path):
    trainer, module = lightning_fit(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = lightning_fit(1, ckpt_path=tmp_path / "one.ckpt")  # nothing is left to do
    for one, other in zip(trainer.optimizers, resumed.optimizers, strict=True):
        one, other = one.state_dict()["state"], other.state_dict()["state"]
        assert one.keys() == other.keys() and len(one) > 0
        for number in one:
            for name in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(one[number][name], other[number][name])
    assert resumed.global_step == 2
    # No aligner holds on to a module that was trained.
    assert torch.equal(flat(copy.deepcopy(module)), flat(module))
