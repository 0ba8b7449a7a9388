"""What the optional installation brings, and the sentence that names it where it is missing."""

from __future__ import annotations

INSTALL = 'pip install "genrep_fast[train]"'

# Top-level modules of the packages in the extra `train` of pyproject.toml.
MODULES = (
    "accelerate",
    "diffusers",
    "jinja2",
    "jsonargparse",
    "matplotlib",
    "PIL",
    "rich",
    "sklearn",
    "torchmetrics",
)


def advice(what: str, error: ImportError) -> str | None:
    """The sentence that tells how to install what `what` needs.

    None where `error` is not about a module of the extra.
    """
    module = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or module not in MODULES:
        return None
    return f"{what} needs {module}, which comes with: {INSTALL}"
