"""The compiled extensions: loaded at first use; where one is missing, the reason."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

_BUILD_HINT = "it was not built at install time: install a C++17 compiler and run `pip install --force-reinstall --no-deps .` again"
_CUDA_BUILD_HINT = (
    "it was not built at install time: put nvcc on PATH (or set CUDA_HOME) and reinstall with HELO_FAST_CUDA=1, which shows what fails"
)


@functools.cache
def missing(name: str) -> str | None:
    """None once ``helo_fast.<name>`` ("_C" or "_C_cuda") is loaded and its ops are registered, else why it is not."""
    try:
        importlib.import_module(f"helo_fast.{name}")
    except ModuleNotFoundError:
        return f"helo_fast.{name} is missing: {_CUDA_BUILD_HINT if name == '_C_cuda' else _BUILD_HINT}"
    except ImportError as error:
        return f"helo_fast.{name} does not load: {error}"
    return None


@functools.cache
def cpu_op(name: str) -> Callable:
    """The op of the CPU extension, once it is loaded, as torch's dispatcher takes it: by way of its overloads a call takes longer."""
    import torch

    overload = getattr(torch.ops.helo_fast_cpu, name).default
    return getattr(overload, "_op", overload)


def cpu_capability() -> str | None:
    """The instruction set that the CPU kernels use, or None without the extension."""
    return None if missing("_C") else cpu_op("cpu_capability")()
