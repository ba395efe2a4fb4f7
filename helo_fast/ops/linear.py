"""Linear maps as the model calls them: several of one input as one product, by the library that is fastest at it.

Not an operator with back ends: torch multiplies in every case. In float32 on the CPU its default (MKL, where it is built with it) is
slower than oneDNN, which torch carries too, for many rows and small matrices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _registry
from .._torch_state import goes_straight

try:  # torch's own, not promised: what its compiler calls for a linear map
    _onednn = torch.ops.mkldnn._linear_pointwise.default
except (AttributeError, RuntimeError):
    _onednn = None

LEAST_WORK = 1 << 24  # multiply-adds below which the call itself is what counts


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias: [.., K], [N, K], [N] to [.., N]."""
    if not _one_product(x, weight, bias):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, bias, weight)[0]


def linears(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x weight' for each: [.., K], each [N, K] to [.., N]; the results may be views of one tensor."""
    if not _one_product(x, *weights):
        return tuple(F.linear(x, weight) for weight in weights)
    return _Linear.apply(x, None, *weights)


def _one_product(x: Tensor, *others: Tensor | None) -> bool:
    """Whether oneDNN is to do it, in float32 on the CPU and not for the eager back end, the reference."""
    return (
        not torch.compiler.is_compiling()
        and _onednn is not None
        and x.is_cpu
        and x.dtype == torch.float32
        and x.numel() * sum(t.shape[0] for t in others if t is not None and t.dim() == 2) >= LEAST_WORK
        and goes_straight((x, *others))
        and _registry.requested(None) != _registry.EAGER.name
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        y = _onednn(x, weight, bias, "none", [], "").data  # else a view, which could not be changed in place
        return (y,) if len(weights) == 1 else y.split([w.shape[0] for w in weights], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        needs_x, needs_bias, *needs_weights = ctx.needs_input_grad
        d_x = None
        if needs_x:
            d_x = _onednn(rows[0], weights[0].t(), None, "none", [], "")
            for grad, weight in zip(rows[1:], weights[1:]):
                d_x.addmm_(grad, weight)
            d_x = d_x.view(x.shape)
        d_bias = rows[0].sum(0) if needs_bias else None
        columns = x.reshape(-1, x.shape[-1])
        return d_x, d_bias, *(grad.t() @ columns if needed else None for grad, needed in zip(rows, needs_weights))
