"""lcd_attention backward in Triton: weights are recomputed from the row log-sum-exp, masks from the seed.

    dv = (keep * w)' do rescale;  ds = w (keep * (do v') rescale - rowsum(do * o)) scale;  dbias = ds;  dq = ds k;  dk = ds' q

Two kernels. Rows: x = (part, block of rows); a program takes the heads of its part one after the other, writes rowsum(do * o) and dq,
and ds into the gradient of the bias. Columns: x = (batch, head, block of columns); it writes dk and dv.
What several heads add to is added up in a fixed order: a shared query in the registers of a part, a shared bias in the part's own sums
in memory, [n, m] in the compute dtype; torch adds up the parts. Their number depends on the shapes alone, so the bits do too.
Traffic: each kernel reads its side of q, do (and o) or k, v once, the other side and the bias once per block. No n x m tensor but the
bias, its gradient and the parts' sums.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .attention import variant
from .attention_tile import DROPPED, STEP, TILES, block, compiler_options, logits, precision, product, readable, rounded, strides, tile
from .device import device_guard
from .variant import Variant

MOST_PARTS = 1024  # that add to one gradient
MOST_SUMS = 1 << 24  # entries of their sums together, or one part's where that is more


@triton.jit
def _slopes(s, slope, lse, delta, scale, rescale, decided):
    """(keep * w rescale, ds) from the logits and do v'. A row without a kept key has equal weights and no slope."""
    flat = lse <= DROPPED
    w = tl.exp(s - tl.where(flat, DROPPED, lse))
    factor = rescale
    if decided is not None:
        factor = tl.where((decided & philox.KEPT) != 0, rescale, 0.0)
    ds = (slope * factor - delta) * w * tl.where(flat, 0.0, scale)
    return w * (factor * tl.where(flat, DROPPED / lse, 1.0)), ds


@triton.jit(do_not_specialize=["B", "H", "n", "m", "batches", "heads", "drop_below", "cut_below"])
def _bwd_rows_kernel(
    q,  # [B or 1, H, n, d]; rows contiguous, here and below
    k,  # [B, H, m, d]
    v,  # [B, H, m, d]
    bias,  # [B or 1, H or 1, n, m], or None
    seed,  # [1], int64, or None: no masks
    out,  # [B, H, n, d]
    lse,  # [B, H, n]
    grad_out,  # [B, H, n, d]
    dq,  # [B, n, H, d], or of a shared query the parts' sums [b_parts, n, H, d]
    dbias,  # [B or b_parts, h_parts, n, m], or None
    delta,  # [B, H, n]
    q_stride_b,
    q_stride_h,
    q_stride_n: tl.constexpr,
    k_stride_b,
    k_stride_h,
    k_stride_m: tl.constexpr,
    v_stride_b,
    v_stride_h,
    v_stride_m: tl.constexpr,
    bias_stride_b,
    bias_stride_h,
    bias_stride_n,
    out_stride_b,
    out_stride_h,
    out_stride_n: tl.constexpr,
    grad_stride_b,
    grad_stride_h,
    grad_stride_n: tl.constexpr,
    dq_stride_n: tl.constexpr,  # H d
    B,
    H,
    n,
    m,
    d,
    batches,  # of a part, at most
    heads,  # of a part: 1 or H
    scale: tl.float64,
    rescale: tl.float64,
    drop_below,
    cut_below,
    SHARED_QUERY: tl.constexpr,
    ADD_HEADS: tl.constexpr,  # the heads of a part add to one dbias
    ADD_BATCH: tl.constexpr,  # and so do its batch items
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype: tl.constexpr = lse.dtype.element_ty
    scale, rescale = tl.full((), scale, dtype), tl.full((), rescale, dtype)
    blocks = tl.cdiv(n, BLOCK)
    i0 = tl.program_id(0) % blocks * BLOCK
    part = (tl.program_id(0) // blocks).to(tl.int64)
    h_parts = H // heads
    b_part, h_part = part // h_parts, part % h_parts
    b_first, h_first = b_part * batches, h_part * heads
    key = tl.load(seed) if seed is not None else None

    i = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK_D)[None, :]
    in_dq = (i0 + i < n) & (c < d)
    for h in range(h_first, h_first + heads):
        dQ = tl.zeros((BLOCK, BLOCK_D), dtype)
        for b in range(b_first, tl.minimum(b_first + batches, B)):
            if not SHARED_QUERY:
                dQ = tl.zeros((BLOCK, BLOCK_D), dtype)
            head = b * H + h
            q_head = q + b * q_stride_b + h * q_stride_h
            k_head = k + b * k_stride_b + h * k_stride_h
            v_head = v + b * v_stride_b + h * v_stride_h
            out_head = out + b * out_stride_b + h * out_stride_h
            grad_head = grad_out + b * grad_stride_b + h * grad_stride_h
            bias_head = bias + b * bias_stride_b + h * bias_stride_h if bias is not None else None

            row_lse = tl.load(lse + head * n + i0 + i, mask=i0 + i < n, other=0.0)
            row_delta = tl.zeros((BLOCK, 1), dtype)
            for c0 in range(0, d, STEP):
                G = block(grad_head, grad_stride_n, i0, n, c0, d, BLOCK, STEP, "ieee")
                result = block(out_head, out_stride_n, i0, n, c0, d, BLOCK, STEP, "ieee")
                row_delta += tl.sum(G * result, 1, keep_dims=True)
            tl.store(delta + head * n + i0 + i, row_delta, mask=i0 + i < n)

            for j0 in range(0, m, STEP):
                s = product(q_head, q_stride_n, i0, n, k_head, k_stride_m, j0, m, d, dtype, PRECISION, BLOCK, STEP)
                slope = product(grad_head, grad_stride_n, i0, n, v_head, v_stride_m, j0, m, d, dtype, PRECISION, BLOCK, STEP)
                decided = philox.decisions(key, head, i0, j0, drop_below, cut_below, BLOCK, STEP) if seed is not None else None
                s = logits(s, bias_head, bias_stride_n, i0, j0, n, m, scale, decided)
                _, ds = _slopes(s, slope, row_lse, row_delta, scale, rescale, decided)
                if dbias is not None:
                    j = j0 + tl.arange(0, STEP)[None, :]
                    inside = (i0 + i < n) & (j < m)
                    at = dbias + (((b_part if ADD_BATCH else b) * h_parts + h_part) * n + i0) * m + (i * m + j)
                    total = ds
                    if ADD_HEADS or ADD_BATCH:
                        later = (h > h_first) | (b > b_first) if ADD_BATCH else h > h_first
                        total += tl.load(at, mask=(i0 + i < tl.where(later, n, 0)) & (j < m), other=0.0)
                    tl.store(at, total.to(dbias.dtype.element_ty), mask=inside)
                K = block(k_head, k_stride_m, j0, m, 0, d, STEP, BLOCK_D, PRECISION)
                dQ = tl.dot(rounded(ds, PRECISION), K, dQ, input_precision=PRECISION, out_dtype=dtype)
            if not SHARED_QUERY:
                tl.store(dq + (b * n + i0) * dq_stride_n + h * d + (i * dq_stride_n + c), dQ.to(dq.dtype.element_ty), mask=in_dq)
        if SHARED_QUERY:
            tl.store(dq + (b_part * n + i0) * dq_stride_n + h * d + (i * dq_stride_n + c), dQ, mask=in_dq)


@triton.jit(do_not_specialize=["H", "n", "m", "drop_below", "cut_below"])
def _bwd_columns_kernel(
    q,  # as above
    k,
    v,
    bias,
    seed,
    lse,
    delta,
    grad_out,
    dk,  # [B, m, H, d]
    dv,  # [B, m, H, d]
    q_stride_b,
    q_stride_h,
    q_stride_n: tl.constexpr,
    k_stride_b,
    k_stride_h,
    k_stride_m: tl.constexpr,
    v_stride_b,
    v_stride_h,
    v_stride_m: tl.constexpr,
    bias_stride_b,
    bias_stride_h,
    bias_stride_n,
    grad_stride_b,
    grad_stride_h,
    grad_stride_n: tl.constexpr,
    dk_stride_m: tl.constexpr,  # H d
    H,
    n,
    m,
    d,
    scale: tl.float64,
    rescale: tl.float64,
    drop_below,
    cut_below,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dtype: tl.constexpr = lse.dtype.element_ty
    scale, rescale = tl.full((), scale, dtype), tl.full((), rescale, dtype)
    blocks = tl.cdiv(m, BLOCK)
    j0 = tl.program_id(0) % blocks * BLOCK
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    q += b * q_stride_b + h * q_stride_h
    k += b * k_stride_b + h * k_stride_h
    v += b * v_stride_b + h * v_stride_h
    grad_out += b * grad_stride_b + h * grad_stride_h
    if bias is not None:
        bias += b * bias_stride_b + h * bias_stride_h
    key = tl.load(seed) if seed is not None else None

    dK = tl.zeros((BLOCK, BLOCK_D), dtype)
    dV = tl.zeros((BLOCK, BLOCK_D), dtype)
    for i0 in range(0, n, STEP):
        s = product(q, q_stride_n, i0, n, k, k_stride_m, j0, m, d, dtype, PRECISION, STEP, BLOCK)
        slope = product(grad_out, grad_stride_n, i0, n, v, v_stride_m, j0, m, d, dtype, PRECISION, STEP, BLOCK)
        decided = philox.decisions(key, head, i0, j0, drop_below, cut_below, STEP, BLOCK) if seed is not None else None
        s = logits(s, bias, bias_stride_n, i0, j0, n, m, scale, decided)
        i = i0 + tl.arange(0, STEP)[:, None]
        row_lse = tl.load(lse + head * n + i, mask=i < n, other=0.0)
        row_delta = tl.load(delta + head * n + i, mask=i < n, other=0.0)
        w, ds = _slopes(s, slope, row_lse, row_delta, scale, rescale, decided)
        G = block(grad_out, grad_stride_n, i0, n, 0, d, STEP, BLOCK_D, PRECISION)
        dV = tl.dot(tl.trans(rounded(w, PRECISION)), G, dV, input_precision=PRECISION, out_dtype=dtype)
        Q = block(q, q_stride_n, i0, n, 0, d, STEP, BLOCK_D, PRECISION)
        dK = tl.dot(tl.trans(rounded(ds, PRECISION)), Q, dK, input_precision=PRECISION, out_dtype=dtype)

    j = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK_D)[None, :]
    at = (b * m + j0) * dk_stride_m + h * d + (j * dk_stride_m + c)
    inside = (j0 + j < m) & (c < d)
    tl.store(dk + at, dK.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at, dV.to(dv.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Parts:
    """How the rows kernel shares out the heads: a part takes `batches` batch items, and one head (h_parts is H) or all."""

    batches: int
    b_parts: int
    h_parts: int

    @staticmethod
    def of(q: Tensor, bias: Tensor | None, B: int, m: int) -> Parts:
        _, H, n, d = q.shape
        shared_query = q.shape[0] != B
        over_batch, over_heads = bias is not None and bias.shape[0] != B, bias is not None and bias.shape[1] != H
        entries = n * m * (over_batch or over_heads) + n * d * shared_query
        most = max(1, min(MOST_PARTS, MOST_SUMS // max(entries, 1)))
        any_over_batch = shared_query or over_batch
        h_parts = 1 if over_heads and (H if any_over_batch else B * H) > most else H
        batches = math.ceil(B / max(1, most // h_parts)) if any_over_batch else 1
        return Parts(batches, math.ceil(B / batches), h_parts)


def lcd_attention_bwd(
    grad_out: Tensor,  # [B, H, n, d], any strides, as of the others
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    seed: Tensor | None,
    scale: float,
    drop_below: int,
    cut_below: int,
    rescale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(dq, dk, dv, dbias or None), as the reference: summed over whatever was broadcast; [B, H, n, d] in the memory of [B, n, H, d]."""
    (B, H, m, d), n = k.shape, q.shape[2]
    dk, dv = k.new_empty(B, m, H, d), v.new_empty(B, m, H, d)
    if B == 0:
        dq = q.new_zeros(q.shape[0], n, H, d)
        return *(t.transpose(1, 2) for t in (dq, dk, dv)), bias.new_zeros(bias.shape) if bias_grad else None
    shared_query, add_batch = q.shape[0] != B, bias_grad and bias.shape[0] != B
    add_heads = bias_grad and bias.shape[1] != H
    parts = Parts.of(q, bias if bias_grad else None, B, m)
    dq = q.new_empty(parts.b_parts, n, H, d, dtype=lse.dtype) if shared_query else q.new_empty(B, n, H, d)
    dbias = None
    if bias_grad:
        dbias_dtype = lse.dtype if add_batch or add_heads else bias.dtype
        dbias = bias.new_empty(parts.b_parts if add_batch else B, parts.h_parts, n, m, dtype=dbias_dtype)

    q, k, v, out, grad_out = (readable(t) for t in (q, k, v, out, grad_out))
    bias = None if bias is None else readable(bias)
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    read = *strides(q), *strides(k), *strides(v), *((0, 0, 0) if bias is None else strides(bias))
    chances = scale, rescale, drop_below, cut_below
    row_tile, column_tile = tile(n, d, q.dtype), tile(m, d, q.dtype)
    options = {"PRECISION": precision(q.dtype)}
    with device_guard(q):
        _bwd_rows_kernel[(parts.b_parts * parts.h_parts * math.ceil(n / row_tile["BLOCK"]),)](
            *(q, k, v, bias, seed, out, lse, grad_out, dq, dbias, delta),
            *(*read, *strides(out), *strides(grad_out), H * d),
            *(B, H, n, m, d, parts.batches, H // parts.h_parts, *chances),
            SHARED_QUERY=shared_query,
            ADD_HEADS=add_heads,
            ADD_BATCH=add_batch,
            **(options | row_tile | compiler_options(**row_tile, dtype=q.dtype)),
        )
        _bwd_columns_kernel[(B * H * math.ceil(m / column_tile["BLOCK"]),)](
            *(q, k, v, bias, seed, lse, delta, grad_out, dk, dv),
            *(*read, *strides(grad_out), H * d),
            *(H, n, m, d, *chances),
            **(options | column_tile | compiler_options(**column_tile, dtype=q.dtype)),
        )
    if shared_query:
        dq = dq.sum(0, keepdim=True).to(q.dtype)
    if bias_grad:
        dbias = dbias.sum_to_size(bias.shape).to(bias.dtype)
    return *(t.transpose(1, 2) for t in (dq, dk, dv)), dbias


def variants() -> list[Variant]:
    """Every entry of the table of tiles, with a bias shared by all heads. float16 compiles as bfloat16 does."""
    shared = {"SHARED_QUERY": False, "ADD_HEADS": True, "ADD_BATCH": True}
    return [
        variant(kernel, dtype, BLOCK, BLOCK_D, **constants)
        for kernel, constants in ((_bwd_rows_kernel, shared), (_bwd_columns_kernel, {}))
        for dtype, table in TILES.items()
        for BLOCK_D, BLOCKS in table.items()
        for BLOCK in BLOCKS
    ]
