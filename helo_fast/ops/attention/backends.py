"""Who runs lcd_attention. Each adapter turns the op's arguments into one kernel call."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native, _registry
from ..._registry import CPP, CUDA, EAGER, TRITON, Adapter
from . import philox, reference


def _drawn(dropkey_p: float, dropout_p: float) -> tuple[int, int, float]:
    """The probabilities as kernels take them: two thresholds and the rescale."""
    return philox.dropkey_threshold(dropkey_p), philox.dropout_threshold(dropout_p), philox.dropout_rescale(dropout_p)


def _cpp_fwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: Tensor | None, scale: float, dropkey_p: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    return _native.cpu_op("lcd_attention_fwd")(q, k, v, bias, seed, scale, *_drawn(dropkey_p, dropout_p))


def _cpp_bwd(*arguments: object) -> tuple[Tensor, ...]:
    *tensors, scale, dropkey_p, dropout_p, bias_grad = arguments
    return _native.cpu_op("lcd_attention_bwd")(*tensors, scale, *_drawn(dropkey_p, dropout_p), bias_grad)


def _triton_fwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: Tensor | None, scale: float, dropkey_p: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    from ...kernels import attention as kernels  # imported here: triton is optional and slow to import

    return kernels.lcd_attention_fwd(q, k, v, bias, seed, scale, *_drawn(dropkey_p, dropout_p))


def _triton_bwd(*arguments: object) -> tuple[Tensor, ...]:
    from ...kernels import attention_bwd as kernels

    *tensors, scale, dropkey_p, dropout_p, bias_grad = arguments
    return kernels.lcd_attention_bwd(*tensors, scale, *_drawn(dropkey_p, dropout_p), bias_grad)


def _triton_refuses(q: Tensor) -> str | None:
    if q.dim() == 4 and q.shape[-1] > 256:
        return f"it holds whole rows in registers: d may be 256 at most, got {q.shape[-1]}"
    return _registry.triton_refuses(q)


def _cuda_holds(q: Tensor, k: Tensor) -> bool:
    """Whether a head fits in shared memory, and the number of heads in 32 bits."""
    most, most_d = (56, 64) if q.dtype == torch.float64 else (64, 128)
    return max(q.shape[2], k.shape[2]) <= most and q.shape[3] <= most_d and k.shape[0] * k.shape[1] < 2**31


def _cuda_fwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: Tensor | None, scale: float, dropkey_p: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    if not _cuda_holds(q, k):  # larger heads are PyTorch's
        return reference.fwd(q, k, v, bias, seed, scale, dropkey_p, dropout_p)
    return torch.ops.helo_fast_cuda.lcd_attention_fwd(q, k, v, bias, seed, scale, *_drawn(dropkey_p, dropout_p))


def _cuda_bwd(*arguments: object) -> tuple[Tensor | None, ...]:
    grad_out, q, k, v, bias, _out, lse, seed, scale, dropkey_p, dropout_p, bias_grad = arguments
    if not _cuda_holds(q, k):
        return reference.bwd(*arguments)
    tensors = (grad_out, q, k, v, bias, lse, seed)
    dq, dk, dv, dbias = torch.ops.helo_fast_cuda.lcd_attention_bwd(*tensors, scale, *_drawn(dropkey_p, dropout_p), bias_grad)
    # What is shared comes in parts.
    if q.shape[0] != k.shape[0]:
        dq = dq.transpose(1, 2).sum(0, keepdim=True).to(q.dtype).transpose(1, 2)
    return dq, dk, dv, dbias.sum_to_size(bias.shape).to(bias.dtype) if bias_grad else None


_registry.register(
    "lcd_attention",
    (
        Adapter(EAGER, {"fwd": reference.fwd, "bwd": reference.bwd}),
        Adapter(CPP, {"fwd": _cpp_fwd, "bwd": _cpp_bwd}, _registry.only_on("cpu")),
        Adapter(TRITON, {"fwd": _triton_fwd, "bwd": _triton_bwd}, _triton_refuses),
        Adapter(CUDA, {"fwd": _cuda_fwd, "bwd": _cuda_bwd}, _registry.cuda_refuses),
    ),
    # A GPU back end joins "cuda" with a results file from the hardware in benchmarks/results.
    auto={"cpu": ("cpp", "eager"), "cuda": ("eager",)},
)
