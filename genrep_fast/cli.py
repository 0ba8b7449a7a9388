"""The command `genrep`: how its line is read, and how it ends."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NoReturn

from .commands import ARGUMENTS, COMMANDS
from .endings import (
    INTERRUPTED,
    end,
    flush_output,
    ignore_interrupts,
    print_all_text,
    termination_as_interrupt,
)
from .extras import advice


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
    parser = _InfoParser(
        prog="genrep info", description=_summary(COMMANDS["info"]), allow_abbrev=False
    )
    for argument, keywords in ARGUMENTS["info"].items():
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
        explicit = ARGUMENTS[name]
        # Of `train`, those of TrainingConfig too.
        subparser.add_function_arguments(command, skip=set(explicit))
        for argument, keywords in explicit.items():
            subparser.add_argument(f"--{argument}", **keywords)
        subcommands.add_subcommand(name, subparser, help=summary)
    parsed = parser.parse_args(arguments)
    return parsed.subcommand, parsed[parsed.subcommand].as_dict()
