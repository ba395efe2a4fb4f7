"""Who runs residual_norm. Each adapter turns the op's arguments into one kernel call."""

from __future__ import annotations

from torch import Tensor

from ... import _native, _registry
from ..._registry import CPP, EAGER, TRITON, Adapter
from ..attention import philox
from . import reference


def _cpp_fwd(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None, dropout_p: float, eps: float) -> tuple[Tensor, ...]:
    tensors = (t.contiguous() for t in (x, y, weight, bias))
    return _native.cpu_op("residual_norm_fwd")(*tensors, seed, eps, *_drawn(dropout_p))


def _cpp_bwd(*arguments: object) -> tuple[Tensor, ...]:
    *tensors, mean, rstd, seed, dropout_p = arguments
    dx, dy, dweight, dbias = _native.cpu_op("residual_norm_bwd")(*(t.contiguous() for t in tensors), mean, rstd, seed, *_drawn(dropout_p))
    return dx, dy if seed is not None else None, dweight, dbias


def _triton_fwd(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None, dropout_p: float, eps: float
) -> tuple[Tensor, ...]:
    from ...kernels import residual_norm as kernels  # imported here: triton is optional and slow to import

    return kernels.residual_norm_fwd(x, y, weight, bias, seed, eps, *_drawn(dropout_p))


def _triton_bwd(*arguments: object) -> tuple[Tensor, ...]:
    from ...kernels import residual_norm as kernels

    *tensors, dropout_p = arguments
    return kernels.residual_norm_bwd(*tensors, *_drawn(dropout_p))


def _drawn(dropout_p: float) -> tuple[int, float]:
    """The probability as kernels take it: a threshold and the rescale."""
    return philox.dropout_threshold(dropout_p), philox.dropout_rescale(dropout_p)


_registry.register(
    "residual_norm",
    (
        Adapter(EAGER, {"fwd": reference.fwd, "bwd": reference.bwd}),
        Adapter(CPP, {"fwd": _cpp_fwd, "bwd": _cpp_bwd}, _registry.only_on("cpu")),
        Adapter(TRITON, {"fwd": _triton_fwd, "bwd": _triton_bwd}, _registry.triton_refuses),
    ),
    # A GPU back end joins "cuda" with a results file from the hardware in benchmarks/results.
    auto={"cpu": ("cpp", "eager"), "cuda": ("eager",)},
)
