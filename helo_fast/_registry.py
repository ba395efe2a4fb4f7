"""Back ends: which exist, which can serve a call, and which one does.

An operator's ``backends.py`` calls :func:`register` once per back end; the operator's ``torch.library`` op calls
:func:`resolve` each time it runs. An explicit choice never falls back: it serves or it raises with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from . import _native

ENVIRONMENT_VARIABLE = "HELO_FAST_BACKEND"
AUTO = "auto"
try:  # os.environ's own dict, not promised: os.environ raises and catches at every look for what is not set, for most of a microsecond
    _environment, _key = os.environ._data, os.environ.encodekey(ENVIRONMENT_VARIABLE)
except AttributeError:
    _environment, _key = os.environ, ENVIRONMENT_VARIABLE


@dataclass(frozen=True)
class Backend:
    """One way of running operators, and the reason why it cannot run here (None where it can)."""

    name: str
    unavailable: Callable[[], str | None]


@dataclass(frozen=True)
class Adapter:
    """One operator on one back end: its kernels by name, and the reason why it refuses a tensor (None to accept)."""

    backend: Backend
    kernels: Mapping[str, Callable]
    refuses: Callable[[torch.Tensor], str | None] = lambda tensor: None


def only_on(device: str) -> Callable[[torch.Tensor], str | None]:
    """The ``refuses`` of a back end for one type of device."""
    is_on = operator.attrgetter(f"is_{device}")  # cheaper than the device's type, at every call
    return lambda tensor: None if is_on(tensor) else f"it runs on {device} tensors, got {tensor.device.type}"


LEAST_CAPABILITY, LEAST_SHARED = (8, 0), 163 * 1024  # of a device for csrc/cuda: an A100's


def cuda_refuses(tensor: torch.Tensor) -> str | None:
    """The ``refuses`` of the kernels in csrc/cuda."""
    return _device_refuses(tensor.device.index) if tensor.is_cuda else f"it runs on cuda tensors, got {tensor.device.type}"


@functools.cache
def _device_refuses(index: int) -> str | None:
    device = torch.cuda.get_device_properties(index)
    capability, shared = (device.major, device.minor), device.shared_memory_per_block_optin
    if capability >= LEAST_CAPABILITY and shared >= LEAST_SHARED:
        return None
    needs = f"compute capability {'.'.join(map(str, LEAST_CAPABILITY))} and {LEAST_SHARED >> 10} KB of shared memory for a block"
    return f"it needs {needs}; {device.name} has {'.'.join(map(str, capability))} and {shared >> 10} KB"


def triton_refuses(tensor: torch.Tensor) -> str | None:
    """The ``refuses`` of Triton's kernels where any shape is served."""
    if tensor.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "it runs on cuda tensors, got cpu (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"


def _triton_unavailable() -> str | None:
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed: pip install "helo-fast[triton]"'
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return None if torch.cuda.is_available() else "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"


def _cuda_unavailable() -> str | None:
    missing = _native.missing("_C_cuda")
    if missing or not torch.cuda.is_available():
        return missing or "no CUDA device is visible to torch"
    reasons = map(_device_refuses, range(torch.cuda.device_count()))  # as far as need be: this is asked at every call
    first = next(reasons)
    return None if first is None or None in reasons else first


EAGER = Backend("eager", lambda: None)
CPP = Backend("cpp", lambda: _native.missing("_C"))
TRITON = Backend("triton", _triton_unavailable)
CUDA = Backend("cuda", _cuda_unavailable)
BACKENDS = {b.name: b for b in (EAGER, CPP, TRITON, CUDA)}

_adapters: dict[str, dict[str, Adapter]] = {}
_auto: dict[str, dict[str, tuple[str, ...]]] = {}
_forced: ContextVar[str | None] = ContextVar("helo_fast_backend", default=None)


def register(op: str, adapters: tuple[Adapter, ...], auto: Mapping[str, tuple[str, ...]]) -> None:
    """Declare who serves ``op``, and per device type the order in which ``auto`` tries them."""
    _adapters[op] = {adapter.backend.name: adapter for adapter in adapters}
    _auto[op] = dict(auto)


def _validate(name: str, source: str) -> str:
    if not isinstance(name, str) or (name != AUTO and name not in BACKENDS):
        raise ValueError(f"{source}: unknown back end {name!r}; choose one of {', '.join((AUTO, *BACKENDS))}")
    return name


def requested(backend: str | None) -> str:
    """The name in force: argument over ``with backend(...)`` over the environment variable over ``auto``."""
    if backend:
        return _validate(backend, "backend")
    forced = _forced.get()
    if forced is not None:
        return forced
    if _key not in _environment:
        return AUTO
    return _validate(os.environ[ENVIRONMENT_VARIABLE] or AUTO, ENVIRONMENT_VARIABLE)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose the back end of every operator called inside the ``with`` block (on this thread).

    Args:
        name: "eager", "cpp", "triton", "cuda" or "auto".

    Raises:
        ValueError: the name is unknown. A known back end that cannot serve raises where an operator is called.

    Example:
        >>> import torch, helo_fast
        >>> with helo_fast.backend("eager"):
        ...     plan = helo_fast.sinkhorn(torch.rand(3, 4)).plan
    """
    token = _forced.set(_validate(name, "backend"))
    try:
        yield
    finally:
        _forced.reset(token)


def _refusal(op: str, name: str, tensor: torch.Tensor) -> str | None:
    adapter = _adapters[op].get(name)
    if adapter is None:
        return f"it has no kernel for {op}; those that do: {', '.join(_adapters[op])}"
    return adapter.backend.unavailable() or adapter.refuses(tensor)


def resolve(op: str, tensor: torch.Tensor, backend: str | None = None) -> Adapter:
    """The adapter that serves ``op`` on ``tensor`` (its device and dtype decide).

    Raises:
        RuntimeError: a back end asked for by name cannot serve; the message holds the reason.
    """
    name = requested(backend)
    if name == AUTO:
        return _adapters[op][auto_choice(op, tensor)]
    reason = _refusal(op, name, tensor)
    if reason is not None:
        raise RuntimeError(f"{op}: back end {name!r} was asked for and cannot serve: {reason}")
    return _adapters[op][name]


def auto_choice(op: str, tensor: torch.Tensor) -> str:
    """The name that ``auto`` picks for ``op`` on ``tensor``."""
    for name in _auto[op].get("cpu" if tensor.is_cpu else tensor.device.type, ()):  # a device's type takes longer to ask for
        if _refusal(op, name, tensor) is None:
            return name
    return EAGER.name


def describe() -> dict:
    """What :func:`info` prints, as data."""
    from . import __version__

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = None
    return {
        "version": __version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "backends": {b.name: b.unavailable() or "available" for b in BACKENDS.values()},
        "cpu": f"{torch.backends.cpu.get_cpu_capability()} in torch, {_native.cpu_capability() or 'nothing native'} in helo_fast",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "auto": {op: {d: auto_choice(op, torch.empty(0, device=d)) for d in devices} for op in _adapters},
    }


def info() -> None:
    """Print versions, every back end (available, or why not), the CPU and GPU in use, and what ``auto`` picks per op."""
    facts = describe()
    print(f"helo-fast {facts['version']}  (torch {facts['torch']}, triton {facts['triton'] or 'not installed'})")
    print(f"CPU: {facts['cpu']}; {facts['threads']} threads")
    print(f"GPU: {facts['gpu'] or 'none visible to torch'}")
    print("back ends:")
    for name, state in facts["backends"].items():
        print(f"  {name:7} {state}")
    print("auto picks:")
    for op, choice in facts["auto"].items():
        print(f"  {op:20} " + ", ".join(f"{name} on {device}" for device, name in choice.items()))
