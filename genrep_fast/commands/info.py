"""`genrep info`."""

from __future__ import annotations

from json import dumps
from typing import Any

from ..dispatch.report import info as backend_info

ARGUMENTS: dict[str, dict[str, Any]] = {"json": {"action": "store_true", "help": "print JSON"}}


def info(json: bool = False) -> None:
    """Tell versions and backends: what is there, and why the rest is not."""
    found = backend_info()
    if json:
        print(dumps(found, indent=2))
        return
    for name in ("genrep_fast", "torch", "cuda", "triton", "python", "platform"):
        print(f"{name:12} {found[name] or 'none'}")
    built = dict(found["built"] or {})
    built.pop("libraries", None)
    told = "; ".join(f"{key} {value}" for key, value in built.items())
    print(f"{'built':12} {told if found['built'] else 'nothing'}")
    for name, backend in found["backends"].items():
        state = f"not available: {backend['reason']}"
        if backend["available"]:
            state = f"{len(backend['operators'])} operators"
        print(f"{name:12} {state}")
    print(f"{'reproduce':12} {found['reproduce']}")
