"""Files of prompts: the classes of a pipeline by name, each with one prompt or several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import read_json


def read_prompts(path: str) -> dict[str, list[str]]:
    """The prompts of each class, by its name, in the file's order.

    A text file has a class a line, ``prompt`` or ``name<TAB>prompt``; a name stands on as many
    lines as it has prompts. A file ``*.json`` holds an object of names, each with a prompt or a
    list of prompts.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: with `path` in it, for a damaged file, fewer than two classes, and a prompt that
            is empty or stands there twice.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"prompts: {path} does not exist or is not a file")
    if file.suffix.lower() == ".json":
        found = _of_json(path, read_json(file))
    else:
        found = _of_text(path, file)
    if len(found) < 2:
        raise ValueError(f"prompts: {path} must hold at least two classes, got {len(found)}")
    seen: set[str] = set()
    for name, prompts in found.items():
        for prompt in prompts:
            if not prompt.strip() or prompt in seen:
                wrong = "stands there twice" if prompt in seen else "is empty"
                raise ValueError(f"prompts: {path}: the prompt {prompt!r} of {name!r} {wrong}")
            seen.add(prompt)
    return found


def _of_text(path: str, file: Path) -> dict[str, list[str]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} must be text in UTF-8 ({error})") from error
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.strip():
            name, _, prompt = line.rpartition("\t")
            found.setdefault(name.strip() or prompt.strip(), []).append(prompt.strip())
    return found


def _of_json(path: str, content: Any) -> dict[str, list[str]]:
    wanted = f"prompts: {path} must hold an object of names, each with a prompt or a list of them"
    if not isinstance(content, dict):
        raise ValueError(f"{wanted}, got {type(content).__name__}")
    found = {}
    for name, prompts in content.items():
        listed = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"{wanted}, got {prompts!r} for {name!r}")
        if not all(isinstance(prompt, str) for prompt in listed):
            raise ValueError(f"{wanted}, got {prompts!r} for {name!r}")
        found[name] = listed
    return found
