"""What torch has around a call: whether something would see or change it on its way, and whether its tensors have values to read."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import has_torch_function

try:  # torch's own, not promised: without one of them every call takes the dispatcher
    from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled, _is_tracing, _len_torch_dispatch_stack

    forward_ad._current_level  # noqa: B018
    _KNOWN = True
except (ImportError, AttributeError):
    _KNOWN = False

_PLAIN = (Tensor, Parameter)


def goes_straight(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether torch's dispatcher has nothing to do for a function of these tensors but autograd: no compiler, mode, transform, tracer
    or autocast would see the call or change it, and each tensor is no more than its memory."""
    if (
        torch.compiler.is_compiling()
        or not _KNOWN
        or has_torch_function(tensors)
        or _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _is_any_autocast_enabled()
        or _is_tracing()
    ):
        return False
    for x in tensors:
        if x is not None and (type(x) not in _PLAIN or not (x.is_cpu or x.is_cuda) or x.is_neg()):
            return False
    return True


def has_values(tensor: Tensor) -> bool:
    """Whether Python may branch on what the tensor holds: not while a graph is traced, under vmap, or where it is a stand-in."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return False
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:  # FakeTensor, ...
        return False
    return not (_KNOWN and (_len_torch_dispatch_stack() or _are_functorch_transforms_active()))


def autocast_off(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, products are of the dtype of their operands. (torch knows no autocast for the meta device, and refuses.)"""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def has_tangent(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether one of them carries a forward-mode derivative."""
    if torch.compiler.is_compiling() or not _KNOWN or forward_ad._current_level < 0:
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors)
