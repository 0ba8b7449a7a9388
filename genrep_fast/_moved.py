"""Modules of 0.1.0, and of what came after it, under their old names for one release.

Each import of one warns.

``import genrep_fast.chain_bank``, ``from genrep_fast.chain_bank import ChainBank`` and pickles that
name such modules get what is in the new ones.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Where the names of a module are now: in several modules, the first one that has a name.
MOVED = {
    "aligned_adamw": ("alignment.aligned_adamw",),
    "backends": ("dispatch.selection", "dispatch.report", "dispatch.operators"),
    "chain_bank": ("scoring.chain_bank", "scoring.chain_settings"),
    "estimators": ("scoring.estimators",),
    "evaluation.classifier": ("evaluation.judge",),
    "evaluation.figures": ("reporting.figures",),
    "evaluation.report": ("reporting.html",),
    "genrep_weighting": ("alignment.torchjd",),
    "gradient_aligner": ("alignment.aligner",),
    "posterior_scorer": ("scoring.scorer",),
    "rules": ("alignment.rules",),
    "training.progress": ("reporting.terminal",),
}
_PACKAGE = __name__.partition(".")[0]


def forward(old: str, homes: Sequence[str], **renamed: str) -> Callable[[str], object]:
    """A ``__getattr__`` for the module `old`, whose names are in `homes`, some under new names.

    Getting a name warns.
    """

    def get(name: str) -> object:
        new = renamed.get(name, name)
        for home in () if name.startswith("__") else homes:
            # Not getattr, which may be this function.
            found = vars(import_module(f"{_PACKAGE}.{home}"))
            if new in found:
                _warn(f"{old}.{name}", f"{_PACKAGE}.{home}.{new}")
                return found[new]
        raise AttributeError(f"module {old!r} has no attribute {name!r}")

    return get


def _warn(old: str, new: str) -> None:
    message = f"{old} has moved to {new}; the old name goes with the next release"
    # Of whoever asked for the name; Python leaves its own import system out.
    warnings.warn(message, DeprecationWarning, stacklevel=3)


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of `MOVED` where nothing else does."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == _PACKAGE and old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        homes = MOVED[module.__name__.partition(".")[2]]
        _warn(module.__name__, " and ".join(f"{_PACKAGE}.{home}" for home in homes))
        # Silent: the import has warned.
        for home in reversed(homes):
            found = vars(import_module(f"{_PACKAGE}.{home}"))
            names = {name: value for name, value in found.items() if not name.startswith("__")}
            vars(module).update(names)


sys.meta_path.append(_Finder())
