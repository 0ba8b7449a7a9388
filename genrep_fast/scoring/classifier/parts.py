"""A part of an output folder: rows of classified images, as Parquet or as CSV.

A row is an image. What there is of every class is a list of K numbers in Parquet, and K numbers
separated by spaces in one field of CSV.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...names import printable
from .result import ClassifierResult

Columns = dict[str, Any]
# [n], and [n, K]. `name` is the last column, since it alone may hold anything.
_NUMBERS = {
    "image_id": np.int64,
    "label": np.int64,
    "prediction": np.int64,
    "decided": np.bool_,
    "evaluations": np.int64,
    "coarse_evaluations": np.int64,
    "margin": np.float32,
}
_OF_CLASSES = {
    "log_posterior": np.float32,
    "evidence": np.float32,
    "log_likelihood": np.float32,
    "standard_error": np.float32,
    "steps": np.int64,
    "lift": np.float32,
}
_TEXTS = ("digest", "name")
# Columns that tell which images have finished.
TOLD = ("image_id", "label", "prediction", "evaluations", "digest")
# Of an image whose label is not known.
NO_LABEL = -1
# Numbers of a part, so that it may be written again and again while it grows.
_NUMBERS_OF_A_PART = 2**20
_MOST_ROWS = 4096


class Part(NamedTuple):
    """Rows of images.

    Attributes:
        result: of the images, on the CPU, with ids and names.
        labels: int64 [n], `NO_LABEL` where there is none.
        digests: of the images' content.
    """

    result: ClassifierResult
    labels: np.ndarray
    digests: list[str]

    def columns(self) -> Columns:
        """By name, as a file has them."""
        result, count = self.result, len(self.result)
        assert result.image_ids is not None
        columns: Columns = {
            "image_id": result.image_ids,
            "label": self.labels,
            "prediction": result.prediction,
            "decided": result.decided,
            "evaluations": result.evaluations,
            "coarse_evaluations": result.coarse_evaluations,
            "margin": result.margin,
            "log_posterior": result.posterior,
            "evidence": result.evidence,
            "log_likelihood": result.log_likelihood,
            "standard_error": result.standard_error,
            "steps": result.steps,
        }
        if result.lift is not None:
            columns["lift"] = result.lift
        arrays: Columns = {name: np.asarray(column) for name, column in columns.items()}
        names = [None] * count if result.names is None else result.names
        arrays["digest"] = self.digests
        arrays["name"] = [None if name is None else printable(name) for name in names]
        return arrays

    @classmethod
    def of_columns(cls, columns: Columns, temperature: float, coarse_share: float) -> Part:
        """The part that has these columns."""
        tensors = {
            name: torch.from_numpy(column)
            for name, column in columns.items()
            if isinstance(column, np.ndarray)
        }
        names, labels = columns["name"], columns["label"]
        known_labels = None if (labels == NO_LABEL).any() else tensors["label"]
        known_names = None if all(name is None for name in names) else names
        result = ClassifierResult(
            prediction=tensors["prediction"],
            decided=tensors["decided"],
            posterior=tensors["log_posterior"],
            evidence=tensors["evidence"],
            log_likelihood=tensors["log_likelihood"],
            steps=tensors["steps"],
            evaluations=tensors["evaluations"],
            margin=tensors["margin"],
            standard_error=tensors["standard_error"],
            lift=tensors.get("lift"),
            temperature=temperature,
            coarse_evaluations=tensors["coarse_evaluations"],
            coarse_share=coarse_share,
            labels=known_labels,
            image_ids=tensors["image_id"],
            names=known_names,
        )
        return cls(result, labels, columns["digest"])


class Layout(NamedTuple):
    """What the rows of a folder are like.

    Attributes:
        num_classes: K.
        has_lift: whether there was a null class.
        kind: "parquet" or "csv".
    """

    num_classes: int
    has_lift: bool
    kind: str

    @property
    def most_rows(self) -> int:
        """Of a part."""
        return min(max(_NUMBERS_OF_A_PART // (6 * self.num_classes), 1), _MOST_ROWS)

    @property
    def names(self) -> list[str]:
        """Of the columns, in their order."""
        of_classes = [name for name in _OF_CLASSES if name != "lift" or self.has_lift]
        return [*_NUMBERS, *of_classes, *_TEXTS]

    def encoded(self, columns: Columns) -> bytes:
        """The content of a file."""
        write = _parquet if self.kind == "parquet" else _csv
        return write({name: columns[name] for name in self.names})

    def read(self, path: Path, names: Collection[str] | None = None) -> Columns:
        """The columns of a file, all of them or those of these names.

        Raises:
            ValueError: with `path` in it, where it is damaged or another kind of file.
        """
        wanted = [name for name in self.names if names is None or name in names]
        read = _read_parquet if self.kind == "parquet" else _read_csv
        try:
            if not path.is_file():
                raise ValueError("it is not a file")
            columns = read(path, self, wanted)
            self._check(columns)
        except ModuleNotFoundError:
            raise
        # What a reader raises depends on where a file is broken.
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(
                f"{path} is damaged or no part of this folder ({reason}); "
                "remove it, and its images are evaluated again"
            ) from error
        return columns

    def _check(self, columns: Columns) -> None:
        ids, label = columns["image_id"], columns["label"]
        prediction = columns["prediction"]
        if ((ids < 0) | (ids >= 2**32)).any() or len(np.unique(ids)) < len(ids):
            raise ValueError("image_id must be distinct integers in [0, 2**32)")
        for name, values in (("label", label), ("prediction", prediction)):
            if ((values < -1) | (values >= self.num_classes)).any():
                raise ValueError(f"{name} must lie in [0, {self.num_classes})")
        if not all(re.fullmatch("[0-9a-f]{16}", digest) for digest in columns["digest"]):
            raise ValueError("digest must be 16 hexadecimal digits")


def preferred_kind() -> str:
    """Parquet where pyarrow is installed, else CSV."""
    try:
        import pyarrow.parquet  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        return "csv"
    return "parquet"


def _parquet(columns: Columns) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {}
    for name, column in columns.items():
        if name in _OF_CLASSES:
            flat = pa.array(column.reshape(-1))
            arrays[name] = pa.FixedSizeListArray.from_arrays(flat, column.shape[1])
        elif name == "label":
            arrays[name] = pa.array(column, mask=column == NO_LABEL)
        else:
            arrays[name] = pa.array(column, pa.string() if name in _TEXTS else None)
    sink = pa.BufferOutputStream()
    # Each number is another one: a dictionary of them would be of no use.
    pq.write_table(pa.table(arrays), sink, use_dictionary=False, write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def _read_parquet(path: Path, layout: Layout, wanted: list[str]) -> Columns:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ModuleNotFoundError(
            f"output: {path.parent} holds Parquet, which needs pyarrow: "
            'pip install "genrep_fast[parquet]"',
            name="pyarrow",
        ) from error
    with open(path, "rb") as file:
        opened = pq.ParquetFile(file, page_checksum_verification=True)
        schema = opened.schema_arrow
        if schema.names != layout.names:
            raise ValueError(f"its columns are {', '.join(schema.names)}")
        for name in set(_OF_CLASSES).intersection(schema.names):
            if getattr(schema.field(name).type, "list_size", None) != layout.num_classes:
                raise ValueError(f"{name} must have {layout.num_classes} numbers an image")
        table = opened.read(columns=wanted)
    columns: Columns = {}
    for name in wanted:
        array = table[name].combine_chunks()
        if name in _OF_CLASSES:
            flat = array.flatten().to_numpy(zero_copy_only=False)
            columns[name] = _typed(flat, _OF_CLASSES[name]).reshape(-1, array.type.list_size)
        elif name in _TEXTS:
            columns[name] = array.to_pylist()
        else:
            if name == "label":
                array = array.fill_null(NO_LABEL)
            columns[name] = _typed(array.to_numpy(zero_copy_only=False), _NUMBERS[name])
    return columns


def _typed(array: np.ndarray, dtype: Any) -> np.ndarray:
    if array.dtype != dtype:
        raise ValueError(f"a column must be of {np.dtype(dtype)}, got {array.dtype}")
    # What pyarrow gives out is read-only.
    return array.copy()


def _csv(columns: Columns) -> bytes:
    texts: list[list[str]] = []
    for name, column in columns.items():
        if name in _OF_CLASSES:
            one = _number_format(_OF_CLASSES[name])
            texts.append([" ".join([one % number for number in row]) for row in column.tolist()])
        elif name == "label":
            texts.append(["" if label == NO_LABEL else str(label) for label in column.tolist()])
        elif name == "name":
            texts.append(["" if text is None else _quoted(text) for text in column])
        elif name == "digest":
            texts.append(column)
        else:
            texts.append([_number_format(_NUMBERS[name]) % value for value in column.tolist()])
    lines = [",".join(columns), *map(",".join, zip(*texts, strict=True))]
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")


def _number_format(dtype: Any) -> str:
    """Nine digits are those that tell any two numbers of float32 apart."""
    return "%.9g" if dtype is np.float32 else "%d"


def _quoted(text: str) -> str:
    doubled = text.replace('"', '""')
    return f'"{doubled}"'


def _read_csv(path: Path, layout: Layout, wanted: list[str]) -> Columns:
    text = path.read_text(encoding="utf-8")
    header, *lines = text.split("\n")
    if header.split(",") != layout.names or lines[-1:] != [""]:
        raise ValueError("it is cut off, or has other columns")
    rows = [line.split(",", len(layout.names) - 1) for line in lines[:-1]]
    if not rows or {len(row) for row in rows} != {len(layout.names)}:
        raise ValueError("it has rows of another length, or none")
    columns: Columns = {}
    texts = zip(layout.names, zip(*rows, strict=True), strict=True)
    for name, column in texts:
        if name in _OF_CLASSES and {cell.count(" ") for cell in column} != {layout.num_classes - 1}:
            raise ValueError(f"{name} must have {layout.num_classes} numbers an image")
        if name not in wanted:
            continue
        if name in _OF_CLASSES:
            numbers = [cell.split(" ") for cell in column]
            columns[name] = np.array(numbers, dtype=_OF_CLASSES[name])
        elif name == "name":
            columns[name] = [_unquoted(cell) for cell in column]
        elif name == "digest":
            columns[name] = list(column)
        elif name == "label":
            columns[name] = np.array([int(cell or NO_LABEL) for cell in column])
        else:
            # "0" and "1" would both be true as text.
            read: Callable[[str], Any] = float if name == "margin" else int
            columns[name] = np.array([read(cell) for cell in column]).astype(_NUMBERS[name])
    return columns


def _unquoted(cell: str) -> str | None:
    if cell == "":
        return None
    if not re.fullmatch('"(?:[^"]|"")*"', cell):
        raise ValueError(f"name must stand in quotation marks, got {cell[:50]!r}")
    return cell[1:-1].replace('""', '"')
