"""The one torch.library namespace of this package, the few verbs that the ops are declared with, and the way to call them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._torch_state import autocast_off, goes_straight, has_tangent

try:  # torch's own, not promised: without one of them every call takes the dispatcher
    from torch._C import _AutoDispatchBelowAutograd
    from torch.autograd import _profiler_enabled
except ImportError:
    _profiler_enabled = None

_library = torch.library.Library("helo_fast", "DEF")
_implementations: dict[str, Callable] = {}
_functions: dict[str, type[torch.autograd.Function]] = {}


def define(schema: str) -> None:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(name: str) -> Callable:
    """Register the decorated function for every device. A result may be None: a schema has no optional results, so that by way of the
    dispatcher it is an empty tensor [0]."""

    def decorate(function: Callable) -> Callable:
        def dispatched(*arguments: object) -> tuple[Tensor, ...]:
            return tuple(arguments[0].new_empty(0) if result is None else result for result in function(*arguments))

        _library.impl(name, dispatched, "CompositeExplicitAutograd")
        _implementations[name] = function
        return function

    return decorate


def fake(name: str) -> Callable:
    """Register the decorated function as the shape inference of ``name``; it returns it, so that decorators stack."""

    def decorate(function: Callable) -> Callable:
        torch.library.register_fake(f"helo_fast::{name}", function, lib=_library)
        return function

    return decorate


def autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    torch.library.register_autograd(f"helo_fast::{name}", backward, setup_context=setup_context, lib=_library)

    def forward(ctx, *arguments):
        output = _below_autograd(name, *arguments)
        setup_context(ctx, arguments, output)
        return output

    _functions[name] = type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


def refuse_second_derivative(name: str, operator: str) -> None:
    def backward(ctx, *grads):
        raise NotImplementedError(
            f"{operator} has no second derivative; call backward without create_graph, or differentiate a composition of torch ops"
        )

    autograd(name, backward, lambda ctx, inputs, output: None)


def autocast_to_float32(name: str) -> None:
    """Under autocast, run in float32 (half-precision inputs are widened)."""
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(f"helo_fast::{name}", device, torch.float32, lib=_library)


def cast_by_autocast(*tensors: object) -> tuple:
    """What torch does to the inputs of scaled_dot_product_attention under autocast; anything but tensors is left to the checks."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    if device == "meta" or not torch.is_autocast_enabled(device):  # torch does not answer for meta
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def without_autocast(kernel: Callable, tensor: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    """kernel(tensor, *arguments), whose products autocast would otherwise turn into halves."""
    if tensor.is_meta or not torch.is_autocast_enabled(tensor.device.type):
        return kernel(tensor, *arguments)
    with autocast_off(tensor.device):
        return kernel(tensor, *arguments)


def call(name: str, tensors: tuple[Tensor | None, ...], *options: object) -> tuple[Tensor, ...]:
    """torch.ops.helo_fast.<name>(*tensors, *options), straight to the implementation where the dispatcher has nothing to do on the way.

    For an op written in Python the dispatcher takes several times as long as a small kernel, and its autograd wrapper longer still.
    A profiler is to see the op. A forward-mode derivative is refused: the dispatcher would drop it without a word.
    """
    if not goes_straight(tensors) or _profiler_enabled is None or _profiler_enabled():
        if has_tangent(tensors):
            raise NotImplementedError(f"{name} has no forward-mode derivative; use reverse mode (backward, torch.func.vjp), or detach")
        return getattr(torch.ops.helo_fast, name)(*tensors, *options)
    if not torch.is_grad_enabled():
        return _below_autograd(name, *tensors, *options)
    for x in tensors:
        if x is not None and x.requires_grad:
            return _functions[name].apply(*tensors, *options)
    return _implementations[name](*tensors, *options)


def _below_autograd(name: str, *arguments: object) -> tuple[Tensor, ...]:
    """The implementation as the dispatcher runs it: no graph is recorded, and no result is a view that was made without one."""
    with _AutoDispatchBelowAutograd():
        return _implementations[name](*arguments)
