"""What a folder holds of classified images, read as it is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...memory import require_memory
from .output_folder import layout_of, part_files, read_settings
from .parts import TOLD, Columns, Part
from .result import ClassifierResult


class SavedResults:
    """Images that a `DiffusionClassifier` has classified into a folder; a part of them at a time.

    A folder may be read while it is written: what its parts hold then is whole.

    Args:
        folder: that was the ``output`` of a call.

    Attributes:
        folder: its path.
        settings: what the results depend on, as ``classification.json`` has it.

    Raises:
        FileNotFoundError: where nothing was classified into the folder.
        ValueError: where it is damaged; the message names the file.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.settings = read_settings(self.folder)
        self._layout = layout_of(self.settings)

    def __len__(self) -> int:
        """Images that have finished."""
        return sum(len(self._layout.read(path, TOLD)["image_id"]) for path in self._paths())

    def __iter__(self) -> Iterator[ClassifierResult]:
        """Parts, in the order in which their images finished, on the CPU."""
        for path in self._paths():
            yield self._part(path).result

    def load(self) -> ClassifierResult:
        """All images in the order of their ids, on the CPU.

        Raises:
            MemoryError: where they do not fit.
            ValueError: where a part is damaged, and where no image has finished.
        """
        count = len(self)
        if not count:
            raise ValueError(f"folder: no image has finished in {self.folder}")
        # Five or six fields of every class, one of them int64, and as much while they are sorted.
        needed = 2 * 4 * 7 * count * self._layout.num_classes
        require_memory("folder", needed, f"the results of {count:,} images")
        columns = [self._layout.read(path) for path in self._paths()]
        order = np.argsort(np.concatenate([found["image_id"] for found in columns]))
        joined: Columns = {}
        for name in self._layout.names:
            values = [found.pop(name) for found in columns]
            if isinstance(values[0], np.ndarray):
                joined[name] = np.concatenate(values)[order]
            else:
                texts = [text for of_part in values for text in of_part]
                joined[name] = [texts[place] for place in order]
        return self._of_columns(joined).result

    def _paths(self) -> list[Path]:
        return part_files(self.folder, self._layout.kind)

    def _part(self, path: Path) -> Part:
        return self._of_columns(self._layout.read(path))

    def _of_columns(self, columns: Columns) -> Part:
        return Part.of_columns(columns, self.settings["temperature"], self.settings["coarse_share"])
