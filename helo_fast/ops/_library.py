"""The one torch.library namespace of this package, and the few verbs that the ops are declared with."""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("helo_fast", "DEF")


def define(schema: str) -> None:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def implement(name: str) -> Callable:
    """Register the decorated function for every device."""

    def decorate(function: Callable) -> Callable:
        _library.impl(name, function, "CompositeExplicitAutograd")
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
    device = next((t.device.type for t in tensors if isinstance(t, torch.Tensor)), "cpu")
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)
