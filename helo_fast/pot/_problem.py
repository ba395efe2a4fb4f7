"""What both solvers share: arrays in and out, marginals, and the projection onto them in POT's order."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from ..ops.sinkhorn import SinkhornResult, sinkhorn
from .result import Array

_NUMPY = (np.float16, np.float32, np.float64)


def read(op: str, **arrays: Array | None) -> tuple[list[Tensor | None], torch.dtype, Callable[[Tensor], Array]]:
    """The arrays as tensors of one dtype that sinkhorn computes in, their own dtype, and the way back to it and to the inputs' kind.

    As in POT, arrays are all NumPy's or all tensors, and mixed precisions promote to the widest.
    """
    given = {name: value for name, value in arrays.items() if value is not None}
    first = next(iter(given))
    from_numpy = isinstance(given[first], np.ndarray)
    for name, value in given.items():
        if not isinstance(value, (np.ndarray, Tensor)):
            raise TypeError(f"{op}: {name} must be a NumPy array or a tensor, got {type(value).__name__}; use np.asarray({name})")
        if isinstance(value, np.ndarray) != from_numpy:
            kinds = f"{name} is a {type(value).__name__} but {first} a {type(given[first]).__name__}"
            raise TypeError(f"{op}: {kinds}; give NumPy arrays alone, or tensors alone (torch.as_tensor({name}))")
        if from_numpy:
            if value.dtype not in _NUMPY:
                raise TypeError(f"{op}: {name} must be float16, float32 or float64, got {value.dtype}; use {name}.astype(np.float64)")
            given[name] = torch.from_numpy(np.require(value, requirements="CW"))
        elif value.dtype not in _checks.FLOATING:
            raise TypeError(f"{op}: {name} must be a floating tensor, got {value.dtype}; use {name}.float()")
        elif value.device != given[first].device:
            raise ValueError(
                f"{op}: {name} is on {value.device} but {first} on {given[first].device}; use {name}.to({first}.device)",
            )
    dtype = reduce(torch.promote_types, (value.dtype for value in given.values()))
    compute = torch.float64 if dtype == torch.float64 else torch.float32

    def back(value: Tensor) -> Array:
        value = value.to(dtype) if value.dtype.is_floating_point else value
        return value.numpy() if from_numpy else value

    return [given[name].to(compute) if name in given else None for name in arrays], dtype, back


def marginals(op: str, a: Tensor | None, b: Tensor | None, like: Tensor, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As [B, n] and [B, m], of equal mass; None is uniform."""
    batch = like.shape[0]
    masses = []
    for name, mass, size in (("a", a, n), ("b", b, m)):
        if mass is None:
            mass = like.new_full((size,), 1 / size)
        elif tuple(mass.shape) not in ((batch, size), (1, size), (size,)):
            accepted = f"[{batch}, {size}], [1, {size}] or [{size}]"
            raise ValueError(f"{op}: {name} must be {accepted}, got {_checks.shape_text(mass)}; reshape or slice it")
        masses.append(mass.expand(batch, size))
    given, (a, b) = a is not None or b is not None, masses
    if given and _checks.reads_values(a):
        _checks.marginals(op, a, b, balanced=True, dtype=dtype)
    if given and dtype in (torch.float16, torch.bfloat16):  # equal to half precision only
        b = b * (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True))
    return a, b


def number(op: str, name: str, value: object) -> float:
    """A Python or NumPy number, or a tensor of one element, as a float."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{op}: {name} must be one number for the whole batch, got {value!r}; solve each value of it by itself") from None


def tolerance(op: str, name: str, value: object) -> float | None:
    """None where it is 0 or below: every iteration runs."""
    value = number(op, name, value)
    return value if value > 0 else None


def log_mass(mass: Tensor) -> Tensor:
    """log(mass), and 0 (with gradient 0) where there is none."""
    return torch.where(mass > 0, mass, 1).log()


def dot(mass: Tensor, potential: Tensor) -> Tensor:
    """Their products' sum, [B]; a potential of -inf stands where there is no mass."""
    return (mass * torch.where(potential > -math.inf, potential, 0)).sum(-1)


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def project(
    cost: Tensor,  # [B, n, m]
    reg: float,
    a: Tensor,  # [B, n]
    b: Tensor,  # [B, m]
    uniform: bool,  # b is
    max_iter: int,
    tol: float | None,
    gradient: str,
) -> tuple[Tensor, Tensor, Tensor, SinkhornResult]:
    """(T, u, v, result): T = exp(u_i + v_j - cost_ij / reg) with marginals a and b; result is sinkhorn's on the transpose.

    POT starts at v = 0, updates u from v and then v from u. sinkhorn ends with its rows, so it gets the transposed problem; and it
    starts at f = 0, that is v = log b: b in the cost takes that away, but where b is uniform it is one constant, which no plan sees.
    """
    log_a, log_b = log_mass(a), log_mass(b)
    shifted = cost if uniform else cost + reg * log_b.unsqueeze(-2)
    columns = None if uniform else b
    result = sinkhorn(shifted.mT, columns, a, epsilon=reg, max_iter=max_iter, tol=tol, gradient=gradient)
    u = result.g / reg + log_a
    if uniform:
        u = u + log_b[:, :1]
    return result.plan.mT, u, result.f / reg, result
