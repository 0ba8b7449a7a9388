"""The operators: schema, checks and public functions.

Importing this package defines all of them, then adds the backends that can run.
"""

from ..dispatch.libraries import register_backends
from . import alignment, optimizer, posterior, reverse_step, scoring  # noqa: F401

register_backends()
