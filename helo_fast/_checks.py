"""Argument validators. One style: what is wrong with which argument, what was given, what is accepted, how to mend it."""

from __future__ import annotations

import math
import numbers

import torch

from ._torch_state import has_values

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_MASS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
_always = False


class checks:
    """Switch the value checks that need a host synchronisation (NaN or negative marginals, unequal mass) on or off for CUDA.

    They always run on the CPU. A plain call lasts; as a context manager the previous state returns at the end.

    Args:
        enabled: check values on every device.

    Example:
        >>> import helo_fast
        >>> with helo_fast.checks(True):
        ...     pass
    """

    def __init__(self, enabled: bool = True):
        global _always
        self._previous, _always = _always, bool(enabled)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception: object) -> None:
        global _always
        _always = self._previous


def reads_values(tensor: torch.Tensor) -> bool:
    """Whether value checks may run on this tensor: where it has values, and reading them does not synchronise."""
    return (tensor.is_cpu or _always) and has_values(tensor)


def shape_text(tensor: torch.Tensor) -> str:
    return "[" + ", ".join(str(s) for s in tensor.shape) + "]"


def tensor(op: str, name: str, value: object, ndims: tuple[int, ...], shape_hint: str) -> torch.Tensor:
    """A floating tensor with one of the given numbers of dimensions."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor {shape_hint}, got {type(value).__name__}; use torch.as_tensor({name})")
    if value.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, float64, float16 or bfloat16, got {value.dtype}; use {name}.float()")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(
            f"{op}: {name} must be a dense tensor, got {kind}; use {name}.to_{'padded_tensor(0)' if value.is_nested else 'dense()'}"
        )
    if value.dim() not in ndims:
        raise ValueError(f"{op}: {name} must be {shape_hint}, got {shape_text(value)}; reshape it")
    return value


def like(op: str, name: str, value: torch.Tensor, reference_name: str, reference: torch.Tensor) -> None:
    """Same dtype and device as the reference tensor."""
    if value.dtype != reference.dtype:
        raise TypeError(f"{op}: {name} is {value.dtype} but {reference_name} is {reference.dtype}; use {name}.to({reference_name}.dtype)")
    if value.device != reference.device:
        raise ValueError(
            f"{op}: {name} is on {value.device} but {reference_name} on {reference.device}; use {name}.to({reference_name}.device)"
        )


def shape(op: str, name: str, value: torch.Tensor, accepted: tuple[tuple[int, ...], ...], shape_hint: str) -> None:
    """One of the accepted shapes, exactly."""
    if tuple(value.shape) not in accepted:
        wanted = " or ".join("[" + ", ".join(str(s) for s in a) + "]" for a in accepted)
        raise ValueError(f"{op}: {name} must be {shape_hint}, here {wanted}, got {shape_text(value)}; reshape or slice it")


def positive(op: str, name: str, value: float, hint: str = "") -> float:
    if type(value) is float and 0 < value < math.inf:  # at once, for the time of small calls; plain, so that torch.compile traces it
        return value
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a Python number, got a tensor; use {name}.item()")
    if isinstance(value, (int, float, numbers.Real)) and 0 < value < math.inf:  # NumPy's are numbers.Real
        return float(value)
    raise ValueError(f"{op}: {name} must be a finite number above 0, got {value!r}{'; ' + hint if hint else ''}")


def at_least(op: str, name: str, value: int, least: int) -> int:
    if type(value) is int and value >= least:
        return value
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {value!r}; use int({name})")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, got {value}; raise it")
    return value


def fraction(op: str, name: str, value: float, *, below_one: bool = True) -> float:
    """A number in [0, 1) (or [0, 1])."""
    top = "[0, 1)" if below_one else "[0, 1]"
    if not isinstance(value, (int, float)) or not (0 <= value < 1 or (value == 1 and not below_one)):
        raise ValueError(f"{op}: {name} must be a number in {top}, got {value!r}; clip it")
    return float(value)


def seed(op: str, value: object, reference_name: str, reference: torch.Tensor) -> torch.Tensor | None:
    """An int64 value, or tensor with one element on the reference's device, as such a tensor; None stays."""
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{op}: seed must be an int or an int64 tensor, got a {value.dtype} tensor; use seed.long()")
        if value.numel() != 1:
            raise ValueError(f"{op}: seed must hold one element, got {shape_text(value)}; index it")
        if value.device != reference.device:
            raise ValueError(
                f"{op}: seed is on {value.device} but {reference_name} on {reference.device}; use seed.to({reference_name}.device)"
            )
        return value
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: seed must be an int, an int64 tensor or None, got {type(value).__name__}; use int(seed)")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: seed must fit int64, got {value}; use seed % 2**63")
    return torch.full((), value, dtype=torch.int64, device=reference.device)


def choice(op: str, name: str, value: str, accepted: tuple[str, ...]) -> str:
    if value not in accepted:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")
    return value


def marginals(op: str, a: torch.Tensor, b: torch.Tensor, balanced: bool, dtype: torch.dtype, or_else: str = "") -> None:
    """Finite, non-negative, and of equal mass (to the precision they were given in) where balanced. Reads values: see reads_values()."""
    for name, mass in (("a", a), ("b", b)):
        if mass.numel() and not bool(((mass >= 0) & (mass < math.inf)).all()):
            bad = ((mass >= 0) & (mass < math.inf)).logical_not().nonzero()[0].tolist()
            raise ValueError(
                f"{op}: {name} must be finite and non-negative, entry {bad} is {mass[tuple(bad)].item()}; use {name}.clamp(min=0)"
            )
    if balanced and a.numel():
        mass_a, mass_b = a.sum(-1), b.sum(-1)
        unequal = (mass_a - mass_b).abs() > _MASS_TOLERANCE[dtype] * torch.maximum(mass_a, mass_b)
        if bool(unequal.any()):
            i = int(unequal.nonzero()[0])
            raise ValueError(
                f"{op}: a and b must have equal mass, problem {i} has {mass_a[i].item():.6g} and {mass_b[i].item():.6g}; "
                f"divide each by its sum{or_else}"
            )
