"""Names of classes and files, which are arbitrary text, as people and file systems can take them.

A leaf: every room may use it.
"""

from __future__ import annotations

import unicodedata

# Joiners, without which some scripts and emoji read otherwise.
_JOINERS = "\u200c\u200d"
_IN_FILE_NAMES = "-_."
# Of a file name's 255 bytes.
_SLUG_BYTES = 80


def printable(text: object) -> str:
    """`text` with escapes in place of what moves a cursor, colours a terminal or turns text around.

    Those are control characters, line breaks, bidirectional overrides and halves of surrogate
    pairs, which stand for bytes of file names that are no text.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if _is_plain(c) else c.encode("unicode_escape").decode() for c in text)


def _is_plain(character: str) -> bool:
    is_space = unicodedata.category(character) == "Zs"
    return character.isprintable() or is_space or character in _JOINERS


def shortened(text: object, length: int) -> str:
    """`printable(text)`, of at most `length` characters: the middle of a longer one is left out."""
    text = printable(text)
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}…{text[len(text) - end :]}"


def slug(text: str) -> str:
    """The part of a file name that tells `text`: letters, digits, ``-``, ``_`` and ``.`` alone.

    Neither the first nor the last character is a dot. It is empty where nothing is left.
    """
    kept = "".join(c if c.isalnum() or c in _IN_FILE_NAMES else "_" for c in text)
    cut = kept.encode("utf-8", "ignore")[:_SLUG_BYTES].decode("utf-8", "ignore")
    return cut.strip("._-")
