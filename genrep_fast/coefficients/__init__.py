from __future__ import annotations

from .._moved import forward

__getattr__ = forward(
    __name__,
    ("coefficients.transitions", "coefficients.tables"),
    ReverseKernel="ReverseTransition",
    reverse_kernel="reverse_transition",
)
