"""Who runs lcd_attention. Each adapter turns the op's arguments into one kernel call."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _registry
from ..._registry import CPP, EAGER, Adapter
from . import philox, reference


def _drawn(dropkey_p: float, dropout_p: float) -> tuple[int, int, float]:
    """The probabilities as kernels take them: two thresholds and the rescale."""
    return philox.dropkey_threshold(dropkey_p), philox.dropout_threshold(dropout_p), philox.dropout_rescale(dropout_p)


def _cpp_fwd(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seed: Tensor | None, scale: float, dropkey_p: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    return torch.ops.helo_fast_cpu.lcd_attention_fwd(q, k, v, bias, seed, scale, *_drawn(dropkey_p, dropout_p))


def _cpp_bwd(*arguments: object) -> tuple[Tensor, ...]:
    *tensors, scale, dropkey_p, dropout_p, bias_grad = arguments
    return torch.ops.helo_fast_cpu.lcd_attention_bwd(*tensors, scale, *_drawn(dropkey_p, dropout_p), bias_grad)


_registry.register(
    "lcd_attention",
    (
        Adapter(EAGER, {"fwd": reference.fwd, "bwd": reference.bwd}),
        Adapter(CPP, {"fwd": _cpp_fwd, "bwd": _cpp_bwd}, _registry.only_on("cpu")),
    ),
    auto={"cpu": ("cpp", "eager"), "cuda": ("eager",)},
)
