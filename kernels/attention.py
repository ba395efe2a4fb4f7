"""lcd_attention forward in Triton: softmax(dropkey((q k' + bias) scale)) v with dropout on the weights, and each row's log-sum-exp.

    s = (q k' + bias) scale, a dropped key's s = min(s, DROPPED);  w = exp(s - max s);  out = (keep * w) v rescale / sum(w)

Grid: x = (batch, head, block of rows), rows fastest. The columns pass by with a running maximum, which starts at DROPPED, and sum.
Traffic: q is read and out and lse are written once; k, v and bias once per block of rows. No n x m tensor but the bias.
Invariants: rows and columns outside have logits of -inf, hence weights of 0. Masks are those of philox.py, whatever the tiling.
Row strides are compile-time constants (a model has few), so that a tile's addresses fold into one; other offsets have 64 bits.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .attention_tile import DROPPED, STEP, TILES, block, compiler_options, logits, precision, product, readable, rounded, strides, tile
from .device import device_guard
from .variant import Variant


@triton.jit(do_not_specialize=["H", "n", "m", "drop_below", "cut_below"])
def _fwd_kernel(
    q,  # [B or 1, H, n, d]; rows contiguous, here and below
    k,  # [B, H, m, d]
    v,  # [B, H, m, d]
    bias,  # [B or 1, H or 1, n, m], or None
    seed,  # [1], int64, or None: no masks
    out,  # [B, n, H, d]
    lse,  # [B, H, n], in the compute dtype
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
    out_stride_n: tl.constexpr,  # H d
    H,
    n,
    m,
    d,
    # A plain float would arrive as float32.
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
    blocks = tl.cdiv(n, BLOCK)
    i0 = tl.program_id(0) % blocks * BLOCK
    head = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = head // H, head % H
    q += b * q_stride_b + h * q_stride_h
    k += b * k_stride_b + h * k_stride_h
    v += b * v_stride_b + h * v_stride_h
    if bias is not None:
        bias += b * bias_stride_b + h * bias_stride_h
    key = tl.load(seed) if seed is not None else None

    top = tl.full((BLOCK, 1), DROPPED, dtype)
    total = tl.zeros((BLOCK, 1), dtype)
    result = tl.zeros((BLOCK, BLOCK_D), dtype)
    for j0 in range(0, m, STEP):
        s = product(q, q_stride_n, i0, n, k, k_stride_m, j0, m, d, dtype, PRECISION, BLOCK, STEP)
        decided = philox.decisions(key, head, i0, j0, drop_below, cut_below, BLOCK, STEP) if seed is not None else None
        s = logits(s, bias, bias_stride_n, i0, j0, n, m, scale, decided)
        before = top
        top = tl.maximum(top, tl.max(s, 1, keep_dims=True))
        w = tl.exp(s - top)
        fade = tl.exp(before - top)
        total = total * fade + tl.sum(w, 1, keep_dims=True)
        if seed is not None:
            w = tl.where((decided & philox.KEPT) != 0, w, 0.0)
        V = block(v, v_stride_m, j0, m, 0, d, STEP, BLOCK_D, PRECISION)
        result = tl.dot(rounded(w, PRECISION), V, result * fade, input_precision=PRECISION, out_dtype=dtype)

    result *= rescale / tl.where(total == 0, 1.0, total)  # NaN stays
    i = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, BLOCK_D)[None, :]
    at = out + (b * n + i0) * out_stride_n + h * d + (i * out_stride_n + c)
    tl.store(at, result.to(out.dtype.element_ty), mask=(i0 + i < n) & (c < d))
    row = tl.where((top > DROPPED) | (total == 0), top + tl.log(total), DROPPED * total)
    tl.store(lse + head * n + i0 + i, row, mask=i0 + i < n)


def lcd_attention_fwd(
    q: Tensor,  # [B or 1, H, n, d], any strides
    k: Tensor,  # [B, H, m, d], any strides
    v: Tensor,  # [B, H, m, d], any strides
    bias: Tensor | None,  # [B or 1, H or 1, n, m], any strides
    seed: Tensor | None,  # int64, one element; None: nothing is dropped
    scale: float,
    drop_below: int,  # T(dropkey_p) and T(dropout_p) of helo_fast/ops/attention/philox.py
    cut_below: int,
    rescale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, H, n, d] in the memory of [B, n, H, d], lse [B, H, n]), as the reference."""
    (B, H, m, d), n = k.shape, q.shape[2]
    out = q.new_empty(B, n, H, d)
    lse = q.new_empty(B, H, n, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    if B == 0:
        return out.transpose(1, 2), lse
    q, k, v = readable(q), readable(k), readable(v)
    bias = None if bias is None else readable(bias)
    tiles = tile(n, d, q.dtype)
    with device_guard(q):
        _fwd_kernel[(B * H * math.ceil(n / tiles["BLOCK"]),)](
            q,
            k,
            v,
            bias,
            seed,
            out,
            lse,
            *strides(q),
            *strides(k),
            *strides(v),
            *((0, 0, 0) if bias is None else strides(bias)),
            H * d,
            H,
            n,
            m,
            d,
            scale,
            rescale,
            drop_below,
            cut_below,
            PRECISION=precision(q.dtype),
            **tiles,
            **compiler_options(**tiles, dtype=q.dtype),
        )
    return out.transpose(1, 2), lse


def variant(kernel: triton.JITFunction, dtype: torch.dtype, BLOCK: int, BLOCK_D: int, **constants: object) -> Variant:
    """A compilation with a bias and masks, of four heads side by side in memory."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    types = dict.fromkeys(("q", "k", "v", "bias", "out", "grad_out", "dq", "dk", "dv"), dtype)
    types |= {"seed": torch.int64, "lse": compute, "delta": compute, "dbias": compute}
    rows = [name for name in kernel.arg_names if name.endswith(("stride_n", "stride_m")) and not name.startswith("bias")]
    return Variant(
        f"{kernel.__name__.strip('_')} {str(dtype).removeprefix('torch.')} {BLOCK} x {BLOCK_D}",
        kernel,
        {name: types[name] for name in kernel.arg_names if name in types},
        {"BLOCK": BLOCK, "BLOCK_D": BLOCK_D, "PRECISION": precision(dtype), **dict.fromkeys(rows, 4 * BLOCK_D), **constants},
        compiler_options(BLOCK, BLOCK_D, dtype),
    )


def variants() -> list[Variant]:
    """Every entry of the table of tiles. float16 compiles as bfloat16 does."""
    return [
        variant(_fwd_kernel, dtype, BLOCK, BLOCK_D)
        for dtype, table in TILES.items()
        for BLOCK_D, BLOCKS in table.items()
        for BLOCK in BLOCKS
    ]
