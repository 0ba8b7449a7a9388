"""The definition of operators: schema, fake, autograd and reference in one place.

Also the way around PyTorch's dispatcher.

Every operator is defined once, as ``torch.ops.genrep_fast.<name>`` (`define_operator`), with its
plain-PyTorch reference. Other backends add themselves with `register_implementation`; callers never
name one: `genrep_fast.dispatch.selection` picks it at each call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from .flat_memory import RefusingKernel
from .selection import (
    fastest_measured,
    register_implementation,
    require_reference,
    select_implementation,
)

_OLDEST_TORCH = "2.11"


def _major_minor(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


if _major_minor(torch.__version__) < _major_minor(_OLDEST_TORCH):
    raise ImportError(
        f"genrep_fast needs torch {_OLDEST_TORCH} or newer, this is torch {torch.__version__}"
    )

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)

# Operator -> schema, as given to `define_operator`.
schemas: dict[str, str] = {}

# A fragment, so that an import that failed halfway can be tried again.
_library = torch.library.Library("genrep_fast", "FRAGMENT")


def define_operator(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    dtype_from: tuple[int, ...] = (0,),
    vmap: bool = True,
) -> Callable[..., Any]:
    """Define ``genrep_fast::<schema>`` once: schema, fake, autograd, first implementation.

    That implementation is `reference`.

    Args:
        schema: the operator's schema without the namespace, e.g.
            ``"gram(Tensor[] gradients, int n) -> Tensor"``.
        reference: plain-PyTorch function with the schema's arguments; the operator's definition.
        fake: function of the same arguments that returns empty outputs of the right shape, dtype
            and device.
        backward: ``backward(ctx, *grads)`` as `torch.library.register_autograd` wants it; None
            where no gradient flows.
        setup_context: ``setup_context(ctx, inputs, output)``, required with `backward`.
        dtype_from: positions of the tensor arguments whose dtype decides: where one of their
            tensors is float64, the reference runs.
        vmap: whether `torch.func.vmap` can map `reference`, which writes to no tensor then that may
            be one for all examples.

    Returns:
        The operator: a function of the overload's positional arguments that calls
        ``torch.ops.genrep_fast.<name>.default``, or goes around the dispatcher where neither
        autograd nor tracing needs it. Inside a transform of `torch.func` and in forward-mode
        differentiation it is `reference`, whose operations PyTorch transforms one by one.
    """
    name = schema.partition("(")[0]
    schemas[name] = schema
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    register_implementation(name, "reference", reference)

    on_backend = _on_selected_backend(name, dtype_from)
    _library.impl(name, on_backend, "CompositeExplicitAutograd")
    torch.library.register_fake(f"genrep_fast::{name}", _on_one_device(name, fake), lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"genrep_fast::{name}", backward, setup_context=setup_context, lib=_library
        )
    overload = getattr(torch.ops.genrep_fast, name).default
    differentiable = None
    if backward is not None and setup_context is not None:
        differentiable = _autograd_function(name, on_backend, setup_context, backward)

    def call(*args: Any) -> Any:
        # The dispatcher, and autograd's part in Python, take longer than a small operator: only
        # tracing and gradients need them.
        if in_function_transform():
            if not vmap and _in_vmap():
                raise RuntimeError(
                    f"{name} cannot run inside torch.func.vmap: call it outside, "
                    "for one example after the other"
                )
            # A traced program has no backend of its own: what it holds is compiled.
            if not torch.compiler.is_compiling():
                require_reference(name)
            return reference(*args)
        if _is_traced(args):
            return overload(*args)
        if differentiable is None or not (
            torch.is_grad_enabled() and any(map(requires_grad, args))
        ):
            return on_backend(*args)
        if torch.jit.is_tracing() or not all(map(_is_plain, args)):
            return overload(*args)
        return differentiable.apply(*args)

    return call


def _on_one_device(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, which refuses tensors on several devices, as kernels do.

    PyTorch's dispatcher takes a call for one without values where any tensor has none.
    """

    @functools.wraps(fake)
    def checked(*args: Any, **kwargs: Any) -> Any:
        devices = sorted({tensor.device.type for tensor in _tensors((*args, *kwargs.values()))})
        if len(devices) > 1:
            raise RuntimeError(
                f"{name} wants all tensors on one device, got {' and '.join(devices)}"
            )
        return fake(*args, **kwargs)

    return checked


def _autograd_function(
    name: str,
    on_backend: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> type[torch.autograd.Function]:
    """What `torch.library.register_autograd` makes of the operator `name`, but for the dispatcher.

    The dispatcher's part takes longer than a small operator.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = on_backend(*args)
        setup_context(ctx=ctx, inputs=args, output=output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), members)


def _on_selected_backend(name: str, dtype_from: tuple[int, ...]) -> Callable[..., Any]:
    """The operator `name` on the backend that is selected at each call."""

    def on_backend(*args: Any, **kwargs: Any) -> Any:
        arguments = (*args, *kwargs.values()) if kwargs else args
        first = _first_tensor(arguments)
        device_type = first.device.type
        fastest = None
        if device_type == "cuda":
            fastest = fastest_measured(name, first.device, arguments)
        implementation = select_implementation(name, device_type, False, fastest)
        if isinstance(implementation, RefusingKernel) and first.dtype is not torch.float64:
            try:
                return _call_without_autocast(device_type, implementation, args, kwargs)
            except RuntimeError:
                if not _hold_float64(arguments, dtype_from):
                    raise
        elif not _hold_float64(arguments, dtype_from):
            return _call_without_autocast(device_type, implementation, args, kwargs)
        implementation = select_implementation(name, device_type, True, fastest)
        return _call_without_autocast(device_type, implementation, args, kwargs)

    return on_backend


def _call_without_autocast(
    device_type: str, implementation: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """``implementation(*args, **kwargs)``, whose matrix products autocast would run in bfloat16."""
    # Of tensors without values PyTorch knows no autocast.
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return implementation(*args, **kwargs)
    with torch.autocast(device_type, enabled=False):
        return implementation(*args, **kwargs)


def in_function_transform() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, is under way."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _in_vmap() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


def _is_traced(arguments: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return type(_first_tensor(arguments)) not in _PLAIN_TENSORS


def requires_grad(argument: Any) -> bool:
    """Whether `argument` is a tensor that requires a gradient."""
    return isinstance(argument, torch.Tensor) and argument.requires_grad


def _is_plain(argument: Any) -> bool:
    return not isinstance(argument, torch.Tensor) or type(argument) in _PLAIN_TENSORS


def _tensors(arguments: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    """Those of the arguments and of the lists among them."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        for value in argument if isinstance(argument, (list, tuple)) else ():
            if isinstance(value, torch.Tensor):
                yield value


def _first_tensor(arguments: tuple[Any, ...]) -> torch.Tensor:
    for tensor in _tensors(arguments):
        return tensor
    raise ValueError("an operator needs at least one tensor, got none")


def _hold_float64(arguments: tuple[Any, ...], positions: tuple[int, ...]) -> bool:
    """Whether a tensor of the arguments at `positions` is float64."""
    for position in positions:
        argument = arguments[position]
        if isinstance(argument, torch.Tensor):
            if argument.dtype == torch.float64:
                return True
            continue
        tensors = argument if isinstance(argument, (list, tuple)) else (argument,)
        if torch.float64 in [tensor.dtype for tensor in tensors if tensor is not None]:
            return True
    return False
