"""README.md and docs/: their Python runs, their `genrep` commands parse, their links lead
somewhere.
"""

import dataclasses
import functools
import re
import shlex
from pathlib import Path

import pytest

from genrep_fast import cli
from genrep_fast.benchmarks.report import written_tables
from genrep_fast.training.config import TrainingConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
OPTIONS = (
    r"(genrep (?:train|evaluate|classify|generate|bench|info)(?: [^`#\n]*)? --(?!help)[^`#\n]*)"
)
COMMAND_LINES = sorted(
    {line.strip() for page in PAGES for line in re.findall(OPTIONS, page.read_text())}
)


def name(page: Path) -> str:
    return page.name


def blocks(page: Path, language: str) -> str:
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(page, "python"), page.name, "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_parse(line, monkeypatch):
    called = []
    subcommand, *options = shlex.split(line)[1:]

    @functools.wraps(cli.COMMANDS[subcommand])
    def record(**arguments):
        called.append(arguments)

    monkeypatch.setitem(cli.COMMANDS, subcommand, record)
    cli.main([subcommand, *options])
    assert len(called) == 1


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    targets = [
        target for target in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in target
    ]
    assert [
        target for target in targets if not (page.parent / target.partition("#")[0]).exists()
    ] == []


def test_every_training_option_is_explained():
    explained = set(re.findall(r"--(\w+)", (ROOT / "docs/training.md").read_text()))
    assert {field.name for field in dataclasses.fields(TrainingConfig)} <= explained


def test_tables_are_those_of_the_committed_results():
    pages = [page for page in PAGES if "<!-- table: " in page.read_text()]
    assert {page.name for page in pages} >= {"README.md", "alignment.md", "scoring.md"}
    for page in pages:
        assert written_tables(page.read_text(), ROOT / "benchmarks/results") == page.read_text()
        assert (
            "<!-- table: " in page.read_text()
            and "| --- |" in page.read_text().partition("<!-- table: ")[2]
        )
