"""The command `genrep`: train, evaluate, classify, generate, bench, info."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .dispatch.report import info as backend_info
from .extras import advice
from .training.config import STAGES, SavedData, TrainingConfig, saved_data

if TYPE_CHECKING:
    from .models import GenRepPipeline


def main(arguments: list[str] | None = None) -> None:
    """Run `genrep`; bad input ends with one line on standard error and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name = "genrep"
    try:
        # `info` tells what is missing, so it has to run where that is.
        parse = _parse_info if arguments[:1] == ["info"] else _parse
        command, options = parse(arguments)
        name = f"genrep {command}"
        COMMANDS[command](**options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `genrep info | head` has. Python flushes
        # standard output once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as error:
        _end(name, advice(_asked_for(arguments), error) or error)
    except (
        ValueError,
        TypeError,
        OSError,
        ImportError,
        ArithmeticError,
        RuntimeError,
        argparse.ArgumentError,
    ) as error:
        _end(name, error)


def _end(name: str, reason: object) -> NoReturn:
    print(f"{name}: {' '.join(str(reason).split())}", file=sys.stderr)
    sys.exit(2)


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
    if ablation:
        from .training.ablation import run_ablation

        run_ablation(config, seeds)
    else:
        from .training.run import train_and_evaluate

        train_and_evaluate(config)


def evaluate(
    checkpoint: str,
    data: str | None = None,
    output: str | None = None,
    elbo_steps: int = 32,
    samples_per_class: int = 50,
    seed: int = 0,
) -> None:
    """Evaluate a trained pipeline: metrics.json, figures and report.html.

    Args:
        checkpoint: folder of the pipeline, or of the run that holds it.
        data: as of `genrep train`; that of the run where not given.
        output: folder for the results; `evaluation` in the checkpoint's where not given.
        elbo_steps: timesteps that the generative posterior scores.
        samples_per_class: generated images a class.
        seed: of the noise.
    """
    from .data import load_data
    from .evaluation import EvaluationSettings
    from .evaluation import evaluate as run_evaluation
    from .files import only_writer
    from .reporting.terminal import console, evaluation_progress, reading_progress
    from .training.run import result_table
    from .training.state import read_history

    pipeline = _load_pipeline(checkpoint)
    trained_on = saved_data(Path(checkpoint)) or SavedData()
    with reading_progress() as reading:
        splits = load_data(
            data or trained_on.name,
            image_size=pipeline.model.image_shape[1],
            split=trained_on.split,
            record=trained_on.record,
            progress=reading,
        )
    settings = EvaluationSettings(
        elbo_steps=elbo_steps, samples_per_class=samples_per_class, seed=seed
    )
    log = Path(checkpoint) / "history.jsonl"
    history = read_history(log) if log.is_file() else None
    folder = Path(output or Path(checkpoint) / "evaluation")
    with only_writer(folder), evaluation_progress() as progress:
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
    console.print(f"wrote {folder}: metrics.json, report.html, figures/")


def classify(checkpoint: str, images: list[str]) -> None:
    """Print the most probable class of each image, with its probability, one line an image.

    Args:
        checkpoint: folder of the pipeline, or of the run that holds it.
    """
    from PIL import Image, UnidentifiedImageError

    pipeline = _load_pipeline(checkpoint)
    opened = []
    for path in images:
        try:
            opened.append(Image.open(path))
            opened[-1].load()
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"images: {path} cannot be read as an image ({error})") from error
    probabilities = pipeline(opened).probabilities
    names = pipeline.model.config.class_names
    if not names:
        names = [str(label) for label in range(probabilities.shape[1])]
    for path, row in zip(images, probabilities, strict=True):
        print(f"{path}\t{names[row.argmax()]}\t{row.max():.4f}")


def generate(
    checkpoint: str,
    labels: list[int],
    output: str = "generated",
    num_inference_steps: int = 50,
    seed: int = 0,
    size: int | None = None,
) -> None:
    """Generate one PNG a label.

    Args:
        checkpoint: folder of the pipeline, or of the run that holds it.
        output: folder for the PNGs.
        num_inference_steps: length of the reverse chain.
        seed: of the noise.
        size: side of the PNGs in pixels; the model's own where not given.
    """
    pipeline = _load_pipeline(checkpoint)
    pictures = pipeline.generate(labels, num_inference_steps=num_inference_steps, seed=seed).images
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for index, (label, picture) in enumerate(zip(labels, pictures, strict=True)):
        path = folder / f"{index:04d}-class-{label}.png"
        if size is not None:
            picture = picture.resize((size, size), resample=0)
        picture.save(path)
        print(path)


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
    "generate": {"labels": {"nargs": "+", "type": int, "required": True, "help": "class indices"}},
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


def _load_pipeline(checkpoint: str) -> GenRepPipeline:
    from diffusers.utils.logging import disable_progress_bar

    from .models import GenRepPipeline

    # Loading takes no time.
    disable_progress_bar()
    folder = Path(checkpoint)
    # The output folder of a run holds it.
    if (folder / "model" / "model_index.json").is_file():
        folder = folder / "model"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"checkpoint: {checkpoint} holds no trained pipeline (no model_index.json)"
        )
    return GenRepPipeline.from_pretrained(folder)
