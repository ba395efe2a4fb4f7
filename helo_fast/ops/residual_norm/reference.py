"""LayerNorm(x + dropout(y)) in plain PyTorch: the truth that every other back end must equal.

Notation: s = x + keep y rescale, h = (s - mean(s)) rstd with rstd = (var(s) + eps)^-1/2, out = h weight + bias.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import philox
from ..attention.reference import compute_dtype


def fwd(
    x: Tensor,  # [.., D]
    y: Tensor,  # [.., D]
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    seed: Tensor | None,  # int64, one element; needed where the probability is above 0
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [.., D], mean [rows], rstd [rows]), the last two in the compute dtype."""
    summed = _summed(x, y, _kept(y, seed, dropout_p))
    mean = summed.mean(-1, keepdim=True)
    rstd = ((summed - mean).square().mean(-1, keepdim=True) + eps).rsqrt()
    out = (summed - mean) * rstd * weight.to(summed.dtype) + bias.to(summed.dtype)
    return out.to(x.dtype), mean.flatten(), rstd.flatten()


def bwd(
    grad_out: Tensor,  # [.., D]
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(dx, dy or None where it equals dx, dweight, dbias).

    dh = do weight;  dx = (dh - mean(dh) - h mean(dh h)) rstd;  dy = dx keep rescale;  dweight = sum of do h;  dbias = sum of do.
    """
    kept = _kept(y, seed, dropout_p)
    mean, rstd = (t.view(*x.shape[:-1], 1) for t in (mean, rstd))
    h = (_summed(x, y, kept) - mean) * rstd
    grad = grad_out.to(h.dtype)
    dh = grad * weight.to(h.dtype)
    dx = (dh - dh.mean(-1, keepdim=True) - h * (dh * h).mean(-1, keepdim=True)) * rstd
    dweight, dbias = (t.reshape(-1, t.shape[-1]).sum(0).to(weight.dtype) for t in (grad * h, grad))
    return dx.to(x.dtype), None if kept is None else (dx * kept).to(y.dtype), dweight, dbias


def _kept(y: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor | None:
    """What dropout multiplies y by: 0 or the rescale, as y's shape; None where it is 1 throughout."""
    if seed is None:
        return None
    problem = torch.zeros((), dtype=torch.int64, device=y.device)
    rows = y.shape[:-1].numel()
    _, keep = philox.masks(seed, problem, rows, y.shape[-1], 0.0, dropout_p)
    return None if keep is None else keep.view(y.shape).to(compute_dtype(y.dtype)) * philox.dropout_rescale(dropout_p)


def _summed(x: Tensor, y: Tensor, kept: Tensor | None) -> Tensor:
    compute = compute_dtype(x.dtype)
    y = y.to(compute)
    return x.to(compute) + (y if kept is None else y * kept)
