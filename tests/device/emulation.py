"""Lets the backend "cuda" run on the host, by the library that build_emulator.py compiles."""

from __future__ import annotations

import torch

from genrep_fast.dispatch import selection
from genrep_fast.dispatch.flat_memory import on_flat_memory
from genrep_fast.dispatch.operators import schemas

# A library that is collected takes its definitions with it.
_definitions: list[torch.library.Library] = []


def load(library: str) -> None:
    """Register the operators of ``_C_emulated.so`` as the backend "cuda" of tensors on the CPU."""
    namespace = "genrep_fast_cuda"
    definitions = torch.library.Library(namespace, "FRAGMENT")
    _definitions.append(definitions)
    for schema in schemas.values():
        definitions.define(schema)
    torch.ops.load_library(library)
    for name in schemas:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", "CPU"):
            kernel = getattr(getattr(torch.ops, namespace), name).default
            selection.register_implementation(name, "cuda", on_flat_memory(name, kernel))
    selection._PREFERENCE["cpu"] = (*selection._PREFERENCE["cpu"], "cuda")
