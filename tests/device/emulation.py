"""Lets the backend "cuda" run on the host, by the library that build_emulator.py compiles."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from genrep_fast.dispatch import selection
from genrep_fast.dispatch.flat_memory import on_flat_memory
from genrep_fast.dispatch.operators import schemas

# A library that is collected takes its definitions with it.
_definitions: list[torch.library.Library] = []


class Launch(NamedTuple):
    """One launch of a kernel, whose name is what the source launches."""

    kernel: str
    blocks: int
    threads: int


@contextmanager
def recorded_launches(library: str) -> Iterator[list[Launch]]:
    """Yields a list that holds the launches of the block once it has ended."""
    emulated = ctypes.CDLL(library)
    emulated.emulator_launches.restype = ctypes.c_char_p
    launches: list[Launch] = []
    emulated.emulator_record(True)
    try:
        yield launches
        for line in emulated.emulator_launches().decode().splitlines():
            kernel, blocks, threads = line.split("\t")
            launches.append(Launch(kernel, int(blocks), int(threads)))
    finally:
        emulated.emulator_record(False)


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
