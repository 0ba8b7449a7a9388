"""The command `genrep`: train, evaluate, classify, generate, bench, info."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .checks import check_at_least, check_not_negative, check_seed
from .dispatch.report import info as backend_info
from .endings import (
    INTERRUPTED,
    end,
    flush_output,
    ignore_interrupts,
    print_all_text,
    termination_as_interrupt,
)
from .extras import advice
from .files import only_writer
from .memory import require_memory
from .names import printable, shortened
from .training.config import STAGES, SavedData, TrainingConfig, saved_data

if TYPE_CHECKING:
    from .models import GenRep

# Images that pass through a network at once.
_BATCH_SIZE = 64
# Of a class's name: any folder's fits.
_LONGEST_NAME = 255
# Tensors of all samples that an evaluation holds at a time, at least.
_COPIES_OF_SAMPLES = 3


def main(arguments: list[str] | None = None) -> None:
    """Run `genrep`; bad input ends with one line on standard error and exit status 2.

    So does a full disk or too little memory. Ctrl-C and SIGTERM end with one line and exit status
    130. Anything else that fails is a fault of the program, which its traceback tells.
    """
    is_process = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    print_all_text()
    name = "genrep"
    try:
        with termination_as_interrupt():
            # `info` tells what is missing, so it has to run where that is.
            parse = _parse_info if arguments[:1] == ["info"] else _parse
            command, options = parse(arguments)
            name = f"genrep {command}"
            if command != "info":
                # Libraries ask for it when they are imported, and say less of a full disk.
                tempfile.gettempdir()
            COMMANDS[command](**options)
        _finish(name)
    except KeyboardInterrupt as error:
        if is_process:
            ignore_interrupts()
        end(name, str(error) or "interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `genrep info | head` has.
        flush_output()
        sys.exit(1)
    except SystemExit:
        # Of --help, for example.
        _finish(name)
        raise
    except ModuleNotFoundError as error:
        end(name, advice(_asked_for(arguments), error) or error)
    except (
        ValueError,
        TypeError,
        OSError,
        ImportError,
        ArithmeticError,
        MemoryError,
        RuntimeError,
        argparse.ArgumentError,
    ) as error:
        end(name, error)


def _finish(name: str) -> None:
    """Have all output written before Python ends, which would tell a failure by a traceback."""
    error = flush_output()
    if isinstance(error, BrokenPipeError):
        sys.exit(1)
    if error is not None:
        end(name, error)


def _asked_for(arguments: list[str]) -> str:
    """The command as the user called it."""
    if arguments and arguments[0] in COMMANDS:
        return arguments[0]
    return "every command but info"


class _InfoParser(argparse.ArgumentParser):
    """Raises in place of printing a usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse_info(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command `info` and its options, by the standard library alone."""
    parser = _InfoParser(prog="genrep info", description=_summary(info), allow_abbrev=False)
    for argument, keywords in _EXPLICIT_ARGUMENTS["info"].items():
        parser.add_argument(f"--{argument}", **keywords)
    return "info", vars(parser.parse_args(arguments[1:]))


def _summary(command: Callable[..., None]) -> str:
    """The first line of a command's docstring; its name where Python dropped that."""
    return (command.__doc__ or command.__name__).partition("\n")[0]


def _parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """A command and its options."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="genrep",
        description="Diffusion models that perceive and generate.",
        exit_on_error=False,
    )
    subcommands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        summary = _summary(command)
        subparser = ArgumentParser(description=summary)
        explicit = _EXPLICIT_ARGUMENTS.get(name, {})
        # Of `train`, those of TrainingConfig too.
        subparser.add_function_arguments(command, skip=set(explicit))
        for argument, keywords in explicit.items():
            subparser.add_argument(f"--{argument}", **keywords)
        subcommands.add_subcommand(name, subparser, help=summary)
    parsed = parser.parse_args(arguments)
    return parsed.subcommand, parsed[parsed.subcommand].as_dict()


def train(ablation: bool = False, seeds: int = 3, **options: Any) -> None:
    """Train a GenRep in three stages, evaluate it and write a report.

    Args:
        seeds: of the ablation.
    """
    config = TrainingConfig(**options)
    try:
        if ablation:
            from .training.ablation import run_ablation

            run_ablation(config, seeds)
        else:
            from .training.run import train_and_evaluate

            train_and_evaluate(config)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_kept(config, ablation)) from error


def _kept(config: TrainingConfig, ablation: bool) -> str:
    """What an interrupted run leaves, and how it goes on."""
    from .training.checkpoints import newest_checkpoint

    output = shlex.quote(config.output)
    if ablation:
        return f"interrupted; what is complete is kept in {output}, the same command goes on"
    newest = newest_checkpoint(Path(config.output))
    if newest is None:
        return f"interrupted before the first step; nothing is kept in {output}"
    kept = f"interrupted; the run is kept in {output} up to {newest.name}"
    return f"{kept}, go on with: genrep train --resume --output {output}"


def evaluate(
    checkpoint: str,
    data: str | None = None,
    output: str | None = None,
    elbo_steps: int | None = None,
    samples_per_class: int | None = None,
    scored_images: int | None = None,
    seed: int = 0,
) -> None:
    """Evaluate a trained pipeline: metrics.json, figures and report.html.

    Args:
        checkpoint: folder of the pipeline, or of the run that holds it.
        data: as of `genrep train`; that of the run where not given.
        output: folder for the results; `evaluation` in the checkpoint's where not given.
        elbo_steps: timesteps that the generative posterior scores; 32, or 8 with more than 25
            classes, where not given.
        samples_per_class: generated images a class; 50, or 5,000 for all of more than 100 classes,
            where not given.
        scored_images: test images, and as many calibration images, whose generative posterior is
            measured, a network evaluation a class and step; all, or with more than 25 classes as
            many as make two million evaluations, where not given.
        seed: of the noise.
    """
    from . import pictures
    from .data import load_data
    from .evaluation import check_splits, described, settings_for
    from .evaluation import evaluate as run_evaluation
    from .reporting.terminal import console, evaluation_progress, reading_progress
    from .training.run import result_table
    from .training.state import read_history

    check_seed(seed)
    pipeline = pictures.load_pipeline(checkpoint)
    settings = settings_for(
        pipeline.model.config.num_classes,
        elbo_steps=elbo_steps,
        samples_per_class=samples_per_class,
        scored_images=scored_images,
        seed=seed,
    )
    pictures.check_steps(pipeline, elbo_steps=settings.elbo_steps)
    _check_samples_fit(pipeline.model, settings.samples_per_class)
    trained_on = saved_data(Path(checkpoint)) or SavedData()
    log = Path(checkpoint) / "history.jsonl"
    history = read_history(log) if log.is_file() else None
    with reading_progress() as reading:
        splits = load_data(
            data or trained_on.name,
            image_size=pipeline.model.image_shape[1],
            split=trained_on.split,
            record=trained_on.record,
            progress=reading,
        )
    folder = Path(output or Path(checkpoint) / "evaluation")
    with only_writer(folder):
        check_splits(pipeline.model, splits)
        console.print(described(settings, splits), highlight=False)
        with evaluation_progress() as progress:
            metrics = run_evaluation(
                pipeline.model,
                pipeline.scheduler,
                splits,
                folder,
                settings=settings,
                history=history,
                stages=STAGES,
                progress=progress,
            )
    console.print(result_table(metrics))
    console.print(f"wrote {printable(folder)}: metrics.json, report.html, figures/")


def _check_samples_fit(model: GenRep, samples_per_class: int) -> None:
    channels, height, width = model.image_shape
    count = samples_per_class * model.config.num_classes
    # In float32.
    needed = _COPIES_OF_SAMPLES * 4 * count * channels * height * width
    require_memory("samples_per_class", needed, f"{count} samples")


def classify(checkpoint: str, images: list[str]) -> None:
    """Print the most probable class of each image, with its probability, one line an image.

    Images are resized and cropped to the centre, as in training.

    Args:
        checkpoint: folder of the pipeline, or of the run that holds it.
    """
    import torch

    from . import pictures

    pipeline = pictures.load_pipeline(checkpoint)
    names = pipeline.model.class_names
    pictures.check_network_fits(pipeline.model, "images", min(len(images), _BATCH_SIZE))
    rows: list[torch.Tensor] = []
    seen: list[float] = []
    for start in range(0, len(images), _BATCH_SIZE):
        batch = [
            pictures.prepared(path, pipeline.model) for path in images[start : start + _BATCH_SIZE]
        ]
        rows += list(pipeline(torch.stack([image.pixels for image in batch])).probabilities)
        seen += [image.seen for image in batch]
    remark = pictures.cropping(seen, images, pipeline.model)
    if remark is not None:
        print(f"genrep classify: {printable(remark)}", file=sys.stderr)
    for path, row in zip(images, rows, strict=True):
        name = shortened(names[row.argmax()], _LONGEST_NAME)
        print(f"{printable(path)}\t{name}\t{row.max():.4f}")


def generate(
    checkpoint: str,
    labels: list[str],
    output: str = "generated",
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    seed: int = 0,
    size: int | None = None,
    batch_size: int = _BATCH_SIZE,
    grid: bool = False,
) -> None:
    """Generate one PNG a label.

    Args:
        checkpoint: folder of the pipeline, or of the run that holds it.
        output: folder for the PNGs.
        num_inference_steps: length of the reverse chain.
        guidance_scale: of classifier-free guidance against the null class; 1 for none.
        seed: of the noise.
        size: shorter side of the PNGs in pixels; the model's own where not given.
        batch_size: images that are drawn at once; no image depends on it.
    """
    from . import pictures

    check_at_least(1, num_inference_steps=num_inference_steps, batch_size=batch_size)
    check_not_negative(guidance_scale, "guidance_scale")
    check_seed(seed)
    pipeline = pictures.load_pipeline(checkpoint)
    names = pipeline.model.class_names
    indices, remarks = pictures.class_indices(labels, names)
    sides = pictures.picture_size(size, pipeline.model.image_shape, indices, grid)
    pictures.check_network_fits(pipeline.model, "batch_size", min(len(indices), batch_size))
    pictures.check_steps(pipeline, num_inference_steps=num_inference_steps)
    for remark in remarks:
        print(f"genrep generate: {printable(remark)}", file=sys.stderr)
    options = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
    }
    folder = Path(output)
    together = []
    with only_writer(folder):
        for position, picture in enumerate(
            pictures.drawn(pipeline, indices, batch_size, **options)
        ):
            label = indices[position]
            path = folder / pictures.file_name(position, label, names[label])
            if size is not None:
                picture = picture.resize(sides, resample=0)
            pictures.save(picture, path)
            print(printable(path), flush=True)
            if grid:
                together.append(picture)
        if grid:
            path = folder / pictures.GRID
            pictures.save(pictures.grid_of(together, indices), path)
            print(printable(path))


def bench(
    suite: list[str] | None = None,
    case: str | None = None,
    quick: bool = False,
    seconds: float | None = None,
    threads: int | None = None,
    cold: bool = False,
    output: str = "runs/bench",
    against: str | None = None,
    rounds: int = 5,
) -> None:
    """Measure the operators and a whole training step beside other implementations.

    Those are eager, compiled and other packages' ones.

    Args:
        case: pattern of the cases' names, e.g. 'latent*'; those of a quick or a full run where not
            given.
        seconds: for the times of a case; 3, or 0.5 with --quick, where not given.
        threads: of torch; its own choice where not given.
        output: folder for report.html, table.md, bench.json, bench.csv and the pictures.
        against: commit with which the sources as they are get compared; with exit status 1 where
            something got slower.
        rounds: of the comparison, a process a commit each.
    """
    from .benchmarks import suite as benchmarks
    from .reporting.terminal import console

    suites = suite or benchmarks.SUITES
    # What cannot be found is told before anything is measured.
    benchmarks.find_cases(suites, case, quick)
    options = {
        "suites": suites,
        "pattern": case,
        "quick": quick,
        "seconds": seconds,
        "threads": threads,
        "cold": cold,
    }
    if against is None:
        _measure(options, Path(output))
        return
    from .benchmarks.against import compare

    _print_comparison(compare(against, options, rounds=rounds, progress=console.print))


def _measure(options: dict[str, Any], folder: Path) -> None:
    """Run the benchmarks and write their report; exit with 1 where a kernel of ours failed."""
    from .benchmarks import suite as benchmarks
    from .benchmarks.report import table, write
    from .reporting.terminal import console

    def keep(results: dict[str, Any]) -> None:
        write(results, folder, complete=False)
        row = results["rows"][-1]
        console.print(f"measured {row['suite'].replace('_', ' ')}: {row['case']}", highlight=False)

    console.print("checks every case first, and what memory it needs")
    results = benchmarks.run(**options, progress=keep)
    written = ", ".join(map(str, write(results, folder)))
    print(f"\n{table(results)}\nwrote {written}")
    ours = [row for row in results["rows"] if row["role"] in ("ours", "variant")]
    if any("failure" in row for row in ours):
        sys.exit(1)


def _print_comparison(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        change = f"{row['ratio']:7.3f}" if "ratio" in row else " " * 7
        print(f"{row['verdict']:8}{change}  {row['suite']}: {row['case']}: {row['provider']}")
    if any(row["verdict"] == "slower" for row in rows):
        sys.exit(1)


def info(json: bool = False) -> None:
    """Tell versions and backends: what is there, and why the rest is not."""
    found = backend_info()
    if json:
        print(dumps(found, indent=2))
        return
    for name in ("genrep_fast", "torch", "cuda", "triton", "python", "platform"):
        print(f"{name:12} {found[name] or 'none'}")
    built = dict(found["built"] or {})
    built.pop("libraries", None)
    told = "; ".join(f"{key} {value}" for key, value in built.items())
    print(f"{'built':12} {told if found['built'] else 'nothing'}")
    for name, backend in found["backends"].items():
        state = f"not available: {backend['reason']}"
        if backend["available"]:
            state = f"{len(backend['operators'])} operators"
        print(f"{name:12} {state}")
    print(f"{'reproduce':12} {found['reproduce']}")


# Flags and lists as shells have them; the rest follows from the signatures.
_EXPLICIT_ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "train": {
        "ablation": {
            "action": "store_true",
            "help": "run the five rows of the paper's ablation, each with as many seeds, "
            "and write the table",
        },
        "resume": {
            "action": "store_true",
            "help": "go on from the newest checkpoint in the output folder, "
            "with the options of its run; start where there is none",
        },
    },
    "classify": {"images": {"nargs": "+", "required": True, "help": "image files"}},
    "generate": {
        "labels": {
            "nargs": "+",
            "required": True,
            "help": "class indices, or classes' names; 07 is a name where a class has it",
        },
        "grid": {
            "action": "store_true",
            "help": "write grid.png, too: all pictures in one, a class a row; "
            "more than 20 rows stand in blocks side by side",
        },
    },
    "bench": {
        "suite": {
            "nargs": "+",
            "help": "of alignment, optimizer, scoring, chain_bank, reverse_step, training_step "
            "and operators; all of them where not given",
        },
        "quick": {"action": "store_true", "help": "few cases, in a few minutes"},
        "cold": {
            "action": "store_true",
            "help": "on a CPU, let the C library give freed memory back; "
            "else it keeps it, as PyTorch does on a GPU",
        },
    },
    "info": {"json": {"action": "store_true", "help": "print JSON"}},
}

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "evaluate": evaluate,
    "classify": classify,
    "generate": generate,
    "bench": bench,
    "info": info,
}
