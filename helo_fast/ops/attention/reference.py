"""Label-correlation-driven attention in plain PyTorch: the truth that every other back end must equal.

Notation: s = (q k' + bias) scale are the logits, w their softmax over keys after DropKey, o = (keep * w) v the output.

DropKey's rule, in every dtype and on every back end: a dropped key's logit becomes min(s, DROPPED). Where a row keeps a key, dropped ones
weigh exactly 0. Where it keeps none, its keys weigh exactly the same and its logits have no gradient. A key that the bias masks (its
logit below DROPPED, -inf included) never weighs more than a dropped one; a row of nothing but such keys weighs 0 throughout.
(Adding -1e12 to logits does the same in float32, but leaves about 1e-4 of their differences in float64.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..._torch_state import autocast_off
from . import philox

DROPPED = -999999995904.0  # the logit of a dropped key: -1e12, rounded to float32 so that float32 and float64 agree on it
PIECE = 1 << 22  # entries of n x m temporaries at a time, at least one head's

Piece = tuple[range, range]  # of the batch, of the heads


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_heads(like: Tensor, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [B, H, n, d] in the memory of [B, n, H, d], so that joining the heads copies nothing: the layout of all results."""
    B, H, n, d = shape
    return like.new_empty(B, n, H, d, dtype=dtype).transpose(1, 2)


def lcd_attention(
    q: Tensor,  # [B, H, n, d], or shared by the batch: [1, H, n, d] or [H, n, d]
    k: Tensor,  # [B, H, m, d]
    v: Tensor,  # [B, H, m, d]
    bias: Tensor | None = None,  # broadcasts: [n, m], [B, n, m] or [B, 1 or H, n, m]
    scale: float | None = None,  # None: d ** -0.5
    *,
    drop: Tensor | None = None,  # bool, broadcasts to [B, H, n, m]: DropKey drops where True
    keep: Tensor | None = None,  # floating, likewise: multiplies the weights; a dropout mask is 0 or 1 / (1 - p)
    released_gradient: bool = False,
) -> Tensor:  # [B, H, n, d], q's dtype
    """Attention with the masks given, under ordinary autograd.

    With ``released_gradient`` the logits of a row whose keys are all dropped have the gradient that autograd finds in
    ``softmax(logits - 1e12)``, as the released code trains with, though the output does not depend on them (finite biases only).
    """
    compute = compute_dtype(q.dtype)
    with autocast_off(q.device):
        bias = bias.unsqueeze(1) if bias is not None and bias.dim() == 3 else bias
        logits = _logits(q if q.dim() == 4 else q.unsqueeze(0), k, bias, q.shape[-1] ** -0.5 if scale is None else scale, compute)
        if drop is not None:
            dropped = logits.detach().clamp(max=DROPPED)
            logits = torch.where(drop, dropped + (logits - logits.detach()) if released_gradient else dropped, logits)
        if bias is None:
            weights = torch.softmax(logits, -1)
        else:
            masked = logits.detach().amax(-1, keepdim=True) < DROPPED
            weights = torch.softmax(logits.masked_fill(masked, 0), -1).masked_fill(masked, 0)
        if keep is not None:
            weights = weights * keep.to(compute)
        return torch.matmul(weights, v.to(compute)).to(q.dtype)


def fwd(
    q: Tensor,  # [B or 1, H, n, d]
    k: Tensor,  # [B, H, m, d]
    v: Tensor,  # [B, H, m, d]
    bias: Tensor | None,  # [B or 1, H or 1, n, m]
    seed: Tensor | None,  # int64, one element; needed where a probability is above 0
    scale: float,
    dropkey_p: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, n, d], lse [B, H, n]): lse is the row log-sum-exp, DROPPED times their number where only dropped keys are left, and
    -inf where none is: the weights are exp(s - lse), or (s == DROPPED) DROPPED / lse where lse is at most DROPPED."""
    B, H, m, _ = k.shape
    n, compute = q.shape[2], compute_dtype(q.dtype)
    out, lse = empty_heads(q, (B, H, n, q.shape[3])), q.new_empty(B, H, n, dtype=compute)
    for piece in _pieces(B, H, n * m):
        drop, keep = _masks(seed, piece, H, n, m, dropkey_p, dropout_p)
        logits = _masked_logits(q, k, bias, scale, compute, piece, drop)
        top = logits.amax(-1, keepdim=True).clamp(min=DROPPED)  # finite: a row of -inf has weights 0, not NaN
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        if keep is not None:
            weights *= keep
        weights *= philox.dropout_rescale(dropout_p) / torch.where(total > 0, total, 1)
        _part(out, piece).copy_(torch.matmul(weights, _part(v, piece).to(compute)))
        row = torch.where((top > DROPPED) | (total == 0), top + total.log(), DROPPED * total)
        _part(lse, piece).copy_(row.squeeze(-1))
    return out, lse


def bwd(
    grad_out: Tensor,  # [B, H, n, d]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    scale: float,
    dropkey_p: float,
    dropout_p: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbias or None), each of its input's shape and dtype, summed over whatever was broadcast, in a fixed order.

    dv = (keep * w)' do; ds = w * (keep * (do v') - rowsum(do * o)) scale; dbias = ds; dq = ds k; dk = ds' q.
    """
    B, H, m, _ = k.shape
    n, compute = q.shape[2], compute_dtype(q.dtype)
    dq, dk, dv = (empty_heads(t, t.shape, compute).zero_() for t in (q, k, v))
    dbias = torch.zeros(bias.shape, dtype=compute, device=bias.device) if bias_grad else None
    rescale = philox.dropout_rescale(dropout_p)
    for piece in _pieces(B, H, n * m):
        drop, keep = _masks(seed, piece, H, n, m, dropkey_p, dropout_p)
        logits = _masked_logits(q, k, bias, scale, compute, piece, drop)
        do, row = _part(grad_out, piece).to(compute), _part(lse, piece).unsqueeze(-1)
        flat = row <= DROPPED  # no key kept: equal weights, no slope
        weights = logits.sub_(torch.where(flat, DROPPED, row)).exp_()
        kept = weights if keep is None else weights * keep
        _part(dv, piece).copy_(torch.matmul(kept.transpose(-1, -2), do * torch.where(flat, DROPPED / row, 1) * rescale))
        slope = torch.matmul(do, _part(v, piece).to(compute).transpose(-1, -2))  # [b, h, n, m]
        if keep is not None:
            slope.mul_(keep).mul_(rescale)
        delta = (do * _part(out, piece)).sum(-1, keepdim=True)
        slope.sub_(delta).mul_(weights).mul_(torch.full_like(row, scale).masked_fill_(flat, 0))
        over_batch = "bhnm,bhmd->hnd" if q.shape[0] == 1 else "bhnm,bhmd->bhnd"
        _part(dq, piece).add_(torch.einsum(over_batch, slope, _part(k, piece).to(compute)))
        _part(dk, piece).copy_(torch.einsum("bhnm,bhnd->bhmd", slope, _part(q, piece).to(compute)))
        if dbias is not None:
            _part(dbias, piece).add_(slope.sum_to_size(_part(dbias, piece).shape))
    dbias = None if dbias is None else dbias.to(bias.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


def _pieces(B: int, H: int, size: int) -> Iterator[Piece]:
    """Slices of the batch and of the heads with at most PIECE entries, or one head's where that is more."""
    heads = max(1, min(H, PIECE // size))
    batches = max(1, PIECE // (size * heads)) if heads == H else 1
    for b in range(0, B, batches):
        for h in range(0, H, heads):
            yield range(b, min(B, b + batches)), range(h, min(H, h + heads))


def _part(t: Tensor, piece: Piece) -> Tensor:
    """The piece's view of a tensor that may be broadcast over the batch or the heads."""
    for dim, part in enumerate(piece):
        if t.shape[dim] != 1:
            t = t.narrow(dim, part.start, len(part))
    return t


def _masks(
    seed: Tensor | None, piece: Piece, H: int, n: int, m: int, dropkey_p: float, dropout_p: float
) -> tuple[Tensor | None, Tensor | None]:
    if seed is None:
        return None, None
    return philox.masks(seed, philox.problems(*piece, H, seed.device), n, m, dropkey_p, dropout_p)


def _masked_logits(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, compute: torch.dtype, piece: Piece, drop: Tensor | None
) -> Tensor:
    bias = None if bias is None else _part(bias, piece)
    logits = _logits(_part(q, piece), _part(k, piece), bias, scale, compute)
    return logits if drop is None else torch.where(drop, logits.clamp(max=DROPPED), logits)


def _logits(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, compute: torch.dtype) -> Tensor:
    """(q k' + bias) scale, [B, H, n, m]."""
    # einsum folds the batch into the columns where q is shared; matmul would write out a copy of q per batch item.
    logits = torch.einsum("bhnd,bhmd->bhnm", q.to(compute), k.to(compute))
    if bias is not None:
        logits = logits + bias.to(compute)
    return logits * scale
