"""How commands end: one line for all that cannot be done, exit statuses, and what Ctrl-C leaves."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from image_folders import save_classes
from PIL import Image
from tiny_runs import change_json, failure, resume, snapshot, train

import genrep_fast as gf
from genrep_fast import cli, endings, memory
from genrep_fast.endings import interrupts_after
from genrep_fast.files import replacing
from genrep_fast.training import Trainer


@pytest.fixture(autouse=True)
def interruptible():
    """What starts tests in the background may have SIGINT ignored, which processes inherit."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.fixture(scope="module")
def pipeline_folder(tiny_backbone, tmp_path_factory):
    from diffusers import DDPMScheduler

    folder = tmp_path_factory.mktemp("pipeline")
    model = gf.GenRep.from_backbone(tiny_backbone("dit"), 3, class_names=["ape", "bee", "cat"])
    scheduler = DDPMScheduler(clip_sample=False)
    gf.GenRepPipeline(model=model, scheduler=scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def damaged(pipeline_folder, tmp_path):
    return Path(shutil.copytree(pipeline_folder, tmp_path / "damaged"))


def command(*arguments, flags=(), **options):
    """A command in a process of its own."""
    line = [sys.executable, *flags, "-W", "ignore", "-m", "genrep_fast", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    environment.pop("PYTHONUNBUFFERED", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(line, env=environment, **{**pipes, **options})


def ended(process):
    """Exit status and standard error of a process that writes no traceback."""
    _, text = process.communicate(timeout=600)
    assert "Traceback" not in text and "Exception ignored" not in text, text
    return process.returncode, text


# Damaged configurations

BYTES = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[1, 2]",
    "a number": b"5",
    "null": b"null",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "no text": b'{"a": "\xff"}',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
}
FILES = ("model_index.json", "model/config.json", "scheduler/scheduler_config.json")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_configuration_of_a_pipeline_is_named(capsys, damaged, file):
    arguments = ("generate", "--checkpoint", damaged, "--labels", "1")
    content = (damaged / file).read_bytes()
    with_mark = b"\xef\xbb\xbf" + content
    twice = content.rstrip()[:-1] + b', "_class_name": "X"}'
    for name, data in {**BYTES, "a mark": with_mark, "a name twice": twice}.items():
        (damaged / file).write_bytes(data)
        assert str(damaged / file) in failure(capsys, *arguments), name


@pytest.mark.parametrize(
    ("file", "option", "value"),
    [
        ("model/config.json", "num_classes", "ten"),
        ("model/config.json", "num_classes", float("nan")),
        ("model/config.json", "num_classes", 10**30),
        ("model/config.json", "num_classes", -1),
        ("model/config.json", "num_classes", [3]),
        ("model/config.json", "pool_size", 10**6),
        ("model/config.json", "backbone_config", "someone/backbone"),
        ("model/config.json", "backbone_config", {}),
        ("model/config.json", "vae_config", "someone/vae"),
        ("model/config.json", "class_names", ["ape"]),
        ("model/config.json", "class_names", "ape"),
        ("model/config.json", "class_names", [1, 2, 3]),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**10),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "x"),
        ("scheduler/scheduler_config.json", "beta_schedule", "wavy"),
        ("model_index.json", "scheduler", ["os", "system"]),
    ],
)
def test_an_impossible_option_of_a_pipeline_is_one_line(capsys, damaged, file, option, value):
    change_json(damaged / file, **{option: value})
    line = failure(capsys, "generate", "--checkpoint", damaged, "--labels", "1")
    assert line.startswith("genrep generate: ") and str(damaged) in line


def test_layers_that_no_model_has_are_refused_before_they_are_built(capsys, damaged):
    path = damaged / "model" / "config.json"
    config = json.loads(path.read_text())
    config["backbone_config"]["num_layers"] = 10**6
    path.write_text(json.dumps(config))
    line = failure(capsys, "generate", "--checkpoint", damaged, "--labels", "1")
    assert "num_layers cannot be 1e+06" in line


@pytest.mark.parametrize("name", BYTES)
def test_a_damaged_configuration_of_a_run_is_named(capsys, copied, name):
    (copied / "config.json").write_bytes(BYTES[name])
    before = snapshot(copied)
    assert f"{copied / 'config.json'} is damaged" in failure(
        capsys, "train", "--resume", "--output", copied
    )
    assert snapshot(copied) == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch_size", [8]),
        ("seed", -1),
        ("seed", 2**64),
        ("learning_rate", float("inf")),
        ("gradient_weights", [float("nan"), 1.0]),
        ("gradient_weights", [1.0]),
        ("log_every", 0),
        ("output", None),
    ],
)
def test_an_impossible_option_of_a_run_is_named(capsys, copied, option, value):
    change_json(copied / "config.json", **{option: value})
    line = failure(capsys, "train", "--resume", "--output", copied)
    assert f"{copied / 'config.json'} is damaged" in line and option in line


def test_a_damaged_folder_of_a_backbone_or_a_scheduler_is_named(
    capsys, backbones, tmp_path, damaged
):
    backbone = Path(shutil.copytree(backbones / "dit", tmp_path / "backbone"))
    change_json(backbone / "config.json", num_attention_heads="two")
    scheduler = damaged / "scheduler"
    change_json(scheduler / "scheduler_config.json", beta_schedule="wavy")
    output = ("--output", tmp_path / "run")
    line = failure(capsys, "train", "--scheduler", scheduler, *output)
    assert f"scheduler: {scheduler}" in line and "wavy" in line
    assert f"backbone: {backbone} cannot be loaded" in failure(
        capsys, "train", "--backbone", backbone, *output
    )


# Sizes


@pytest.mark.parametrize("command", ["train", "evaluate", "generate"])
@pytest.mark.parametrize("seed", [-1, 2**64, 10**400])
def test_a_seed_of_more_than_64_bits_is_refused_before_anything_else(capsys, command, seed):
    needed = {"train": (), "generate": ("--labels", "0", "--checkpoint", "none")}
    arguments = needed.get(command, ("--checkpoint", "none"))
    assert "seed must lie in [0, 2**64), got " in failure(
        capsys, command, *arguments, "--seed", seed
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--image_size", 1_000_000), "one image of 1000000 × 1000000 would take"),
        (("train", "--teacher_chains", 10**9), "the teacher's bank would take"),
        (("train", "--teacher_steps", 10**4), "teacher_steps must be at most 1000"),
        (("generate", "--labels", "0", "--size", 10**6), "1000000 × 1000000 pixels would take"),
        (("generate", "--labels", *["0"] * 99, "--size", 20_000, "--grid"), "1 × 99 pictures of"),
        (("generate", "--labels", "0", "--num_inference_steps", 10**7), "must be at most 1000"),
        (("generate", "--labels", "0", "--size", 0), "size must be at least 1"),
        (("generate", "--labels", "0", "--batch_size", 0), "batch_size must be at least 1"),
        (("evaluate", "--samples_per_class", 10**8), "300000000 samples would take"),
        (("evaluate", "--elbo_steps", 10**7), "elbo_steps must be at most 1000"),
    ],
)
def test_what_cannot_fit_is_refused_with_numbers(
    capsys, monkeypatch, pipeline_folder, tmp_path, arguments, message
):
    monkeypatch.setattr(memory, "available_memory", lambda: 16 * 10**9)
    if arguments[0] != "train":
        arguments += ("--checkpoint", pipeline_folder)
    line = failure(capsys, *arguments, "--output", tmp_path / "out")
    assert message in line
    assert "would" not in message or "16 GB are available" in line
    assert not (tmp_path / "out").exists()


def test_a_batch_that_cannot_fit_is_refused(capsys, monkeypatch, tmp_path):
    """Batches hold no more images than there are: the digits have 1097."""
    monkeypatch.setattr(memory, "available_memory", lambda: 10**8)
    line = failure(capsys, "train", "--batch_size", 10**7, "--output", tmp_path / "run")
    assert "a training step on 1097 images of 1 × 8 × 8 would take" in line


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "not enough memory"),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. "
            ),
            "not enough memory: 8 bytes were wanted at once",
        ),
        (RecursionError("maximum depth"), "nested too deeply"),
        (OSError(28, "No space left on device", "file"), "No space left on device: 'file'"),
        (ValueError("\x1b[31mred\u202e\nname"), "\\x1b[31mred\\u202e name"),
        (ValueError("x" * 10**6), "…"),
    ],
)
def test_one_line_tells_every_failure(capsys, monkeypatch, error, message):
    def fail(json):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "info", fail)
    line = failure(capsys, "info")
    assert message in line and len(line) < 1100


def test_a_fault_of_the_program_is_none_of_the_user(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "info", lambda json: {}["missing"])
    with pytest.raises(KeyError):
        cli.main(["info"])


# Output that cannot be written


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("arguments", "flags"), [(["info"], []), (["info"], ["-u"]), (["info", "--help"], [])]
)
def test_a_full_standard_output_is_one_line(arguments, flags):
    with open("/dev/full", "w") as full:
        status, text = ended(command(*arguments, flags=flags, stdout=full))
    assert status == 2 and text.endswith("standard output: No space left on device\n")
    assert text.count("\n") == 1


def test_a_closed_standard_output_is_no_error():
    status, text = ended(command("info", preexec_fn=lambda: os.close(1)))
    assert (status, text) == (0, "")


# Bytes, less than what is written: of a picture, of config.json and of a tracker's events.
_LIMITS = {"generate": 60, "options": 60, "tracker": 1500}


@pytest.mark.parametrize("what", _LIMITS)
def test_a_file_that_does_not_fit_is_one_line(capsys, pipeline_folder, tmp_path, what):
    arguments = {
        "generate": ("generate", "--checkpoint", pipeline_folder, "--labels", "0"),
        "options": ("train",),
        "tracker": ("train", "--log_with", "tensorboard"),
    }[what]
    if arguments[0] == "train":
        arguments += ("--steps", "3", "--teacher", "none", "--batch_size", "8")
    else:
        arguments += ("--num_inference_steps", "1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMITS[what], limits[1]))
    try:
        line = failure(capsys, *arguments, "--output", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in line
    assert not [path for path in (tmp_path / "out").rglob("*.png")]


def test_files_of_safetensors_have_the_mode_of_others(finished):
    config, _ = finished
    usual = Path(config.output, "config.json").stat().st_mode
    weights = list(Path(config.output).rglob("*.safetensors"))
    assert len(weights) > 5 and {path.stat().st_mode for path in weights} == {usual}


def test_modes_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with replacing(tmp_path / "x") as unfinished:
            unfinished.touch(mode=0o600)
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


# Without docstrings


@pytest.mark.slow
def test_commands_explain_themselves_without_docstrings():
    program = (
        "from genrep_fast import cli\n"
        "for name in ('', *cli.COMMANDS):\n"
        "    try: cli.main([*name.split(), '--help'])\n"
        "    except SystemExit as end: assert end.code == 0, name\n"
        "    print('explained', name or 'genrep')\n"
    )
    run = subprocess.run([sys.executable, "-OO", "-c", program], capture_output=True, text=True)
    # Python drops assertions, too.
    assert run.stdout.count("explained") == 8 and "--help" in run.stdout, run.stderr


@pytest.mark.slow
def test_commands_run_without_docstrings(pipeline_folder, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    process = command(
        "classify",
        "--checkpoint",
        pipeline_folder,
        "--images",
        tmp_path / "x.png",
        flags=["-OO"],
    )
    output, text = process.communicate(timeout=600)
    # Transformers, which diffusers imports, prints that docstrings of its own are missing.
    lines = [line for line in output.splitlines() if not line.startswith("[ERROR] ")]
    assert process.returncode == 0 and lines[0].startswith(str(tmp_path / "x.png")), text


# Interruptions


def test_a_signal_waits_for_the_end_of_a_block():
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_after() as received:
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        done.append("block")
    assert done == ["block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_signal_does_not_wait():
    with pytest.raises(KeyboardInterrupt), interrupts_after():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal came too late")


def test_signals_that_nobody_handles_and_other_threads_are_left_alone():
    handlers = []
    before = signal.getsignal(signal.SIGTERM)
    with interrupts_after():
        handlers.append(signal.getsignal(signal.SIGTERM))

    def enter():
        with interrupts_after() as received:
            handlers.append(received)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [before, []]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_kept(tmp_path, number):
    options = ["--teacher", "none", "--batch_size", "8", "--evaluate", "false"]
    options += ["--steps", "100000", "--checkpoint_every", "3"]
    output = tmp_path / "a run"
    process = command("train", *options, "--output", output, start_new_session=True)
    deadline = time.monotonic() + 600
    while not list(output.glob("checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    status, text = ended(process)
    newest = sorted(path.name for path in output.glob("checkpoints/step-*"))[-1]
    assert status == endings.INTERRUPTED
    assert text == (
        f"genrep train: interrupted; the run is kept in '{output}' up to {newest}, "
        f"go on with: genrep train --resume --output '{output}'\n"
    )
    assert not (output / ".lock").exists()


@pytest.mark.slow
def test_a_signal_to_all_processes_leaves_the_workers_to_their_parent(tmp_path):
    save_classes(tmp_path / "images", {"ape": 20, "bee": 20})
    options = ["--teacher", "none", "--batch_size", "4", "--evaluate", "false"]
    options += ["--steps", "100000", "--checkpoint_every", "3", "--dataloader_num_workers", "2"]
    options += ["--data", f"folder:{tmp_path / 'images'}", "--image_size", "8"]
    output = tmp_path / "run"
    process = command("train", *options, "--output", output, start_new_session=True)
    deadline = time.monotonic() + 600
    while not list(output.glob("checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    status, text = ended(process)
    assert status == endings.INTERRUPTED
    assert (
        text.startswith("genrep train: interrupted; the run is kept in") and text.count("\n") == 1
    )


def test_an_interrupted_step_ends_with_a_checkpoint(make_config, tmp_path, monkeypatch):
    config = make_config(checkpoint_every=1000)
    original = Trainer._step

    def step(self, *arguments):
        if self.state.step == 4:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-0000003", "step-0000005"]
    resumed = resume(tmp_path / "run", config)
    whole = train(make_config(checkpoint_every=1000, output=str(tmp_path / "whole")))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters, whole.parameters, strict=True))


def test_a_command_that_is_interrupted_is_one_line(capsys, monkeypatch):
    def wait(json):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setitem(cli.COMMANDS, "info", wait)
    with pytest.raises(SystemExit) as end:
        cli.main(["info"])
    assert end.value.code == endings.INTERRUPTED
    assert capsys.readouterr().err == "genrep info: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_ablation_without_evaluations_is_refused_at_once(capsys, tmp_path):
    line = failure(
        capsys, "train", "--ablation", "--evaluate", "false", "--output", tmp_path / "run"
    )
    assert "evaluate must be True" in line and not (tmp_path / "run").exists()
