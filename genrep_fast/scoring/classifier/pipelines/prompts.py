"""The prompts of the classes: what they may be, and whether the pipeline can tell them apart."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from .adapter import Adapter


class Prompts(NamedTuple):
    """Checked prompts.

    Attributes:
        classes: of each class, one prompt or several.
        null: that stands for no class, or None.
    """

    classes: tuple[tuple[Any, ...], ...]
    null: str | None

    @property
    def flat(self) -> list[Any]:
        """All prompts, class by class."""
        return [prompt for prompts in self.classes for prompt in prompts]

    @property
    def digest(self) -> str:
        """Tells these prompts from others."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()

    def where(self, number: int) -> str:
        """The argument that holds a prompt of `flat`, or the null prompt, which follows."""
        for place, prompts in enumerate(self.classes):
            if number < len(prompts):
                return f"prompts[{place}]" if len(prompts) == 1 else f"prompts[{place}][{number}]"
            number -= len(prompts)
        return "null_prompt"


def check_prompts(prompts: Any, null_prompt: Any, adapter: Adapter) -> Prompts:
    """What `prompts` and `null_prompt` say.

    Raises:
        TypeError, ValueError: for what is no list of at least two classes, each a prompt or a list
            of prompts.
    """
    wanted = "prompts must be a list with a string, or a list of strings, for each class"
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        raise TypeError(f"{wanted}, got {type(prompts).__name__}")
    if len(prompts) < 2:
        raise ValueError(f"{wanted}, and two classes at least, got {len(prompts)}")
    classes = []
    for place, given in enumerate(prompts):
        name = f"prompts[{place}]"
        if isinstance(given, str | bytes) or not isinstance(given, Sequence):
            classes.append((adapter.check_prompt(given, name),))
            continue
        if not given:
            raise ValueError(f"{name} must hold a prompt, got none")
        classes.append(
            tuple(adapter.check_prompt(each, f"{name}[{row}]") for row, each in enumerate(given))
        )
    if null_prompt is not None:
        adapter.check_null_prompt(null_prompt)
    return Prompts(tuple(classes), null_prompt)


def check_tokens(pipe: Any, adapter: Adapter, prompts: Prompts) -> None:
    """Check that the pipeline reads each prompt to its end, and no two as the same.

    Warns:
        Where an encoder cuts a prompt that another one gets whole.

    Raises:
        ValueError: for a prompt that would be cut, and for prompts of the same tokens.
    """
    flat = prompts.flat + ([prompts.null] if prompts.null else [])
    read: list[tuple[Any, ...]] = [() for _ in flat]
    cut: dict[str, str] = {}
    for name, ids, limit, is_cut_silently in adapter.tokens(pipe, flat):
        for number, tokens in enumerate(ids):
            read[number] += (tuple(tokens),)
            if len(tokens) <= limit:
                continue
            where = prompts.where(number)
            found = f"{where} has {len(tokens)} tokens, of which pipe.{name} takes {limit}"
            if is_cut_silently:
                raise ValueError(f"{found}: shorten it")
            cut.setdefault(where, found)
    if cut:
        others = f" (and {len(cut) - 1} others)" if len(cut) > 1 else ""
        first = next(iter(cut.values()))
        warnings.warn(f"{first}{others}; another encoder reads it whole", stacklevel=4)
    _check_distinct(prompts, read)


def _check_distinct(prompts: Prompts, read: list[tuple[Any, ...]]) -> None:
    """Refuse classes of the same prompts, and a class that has one twice."""
    first = 0
    seen: dict[frozenset[Any], int] = {}
    for place, members in enumerate(prompts.classes):
        of_class = read[first : first + len(members)]
        first += len(members)
        if len(set(of_class)) < len(of_class):
            twice = next(row for row, each in enumerate(of_class) if each in of_class[:row])
            raise ValueError(
                f"prompts[{place}] must be distinct to the pipeline, got {members[twice]!r} twice"
            )
        other = seen.setdefault(frozenset(of_class), place)
        if other != place:
            raise ValueError(
                "prompts must tell the classes apart, but the pipeline reads the same in "
                f"prompts[{other}] and prompts[{place}]: {members[0]!r}"
            )
