"""residual_norm in Triton: LayerNorm(x + dropout(y)), forward and backward.

    s = x + keep y rescale;  h = (s - mean(s)) rstd, rstd = (var(s) + eps)^-1/2;  out = h weight + bias
    dh = do weight;  dx = (dh - mean(dh) - h mean(dh h)) rstd;  dy = dx keep rescale;  dweight = sum of do h;  dbias = sum of do

Grid: forward, x = block of ROWS rows; backward, x = part, which takes its blocks of rows one after the other. A tile is [ROWS, BLOCK_D];
rows wider than it (WIDE) pass by BLOCK_D columns at a time, once for each sum and once for the result, s and its mask made again.
Where D fits, these loops have one step, and the compiler keeps what they would read or make again.
Traffic: where D fits, each operand is read and each result written once.
dweight and dbias: a part's sums stay in registers or, where rows are wide, in its own [2, D] of memory; torch adds up the parts. Their
number depends on the shape alone, and so do the bits.
Invariants: outside of [rows, D], do and weight are 0. Masks are those of philox.py, of problem 0. Offsets of rows have 64 bits. D is a
compile-time constant (a model has few), so that a tile's addresses fold into one.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .device import device_guard
from .variant import Variant

BLOCKS_D = (128, 1024)
TILE = 2048  # entries
MOST_PARTS = 1024
MOST_SUMS = 1 << 24  # entries of the parts' sums together, or one part's where that is more


def tile(D: int) -> dict[str, int | bool]:
    BLOCK_D = next((size for size in BLOCKS_D if size >= D), BLOCKS_D[-1])
    return {"D": D, "ROWS": TILE // BLOCK_D, "BLOCK_D": BLOCK_D, "WIDE": D > BLOCK_D}


def compiler_options(dtype: torch.dtype) -> dict[str, int | bool]:
    """A thread holds 8 entries of a tile. Without a bound of its own, ptxas spills a little."""
    return {"num_warps": 8, "num_stages": 1, "maxnreg": 255 if dtype == torch.float64 else 128, "enable_fp_fusion": True}


@triton.jit
def _kept(key, first, c0, cut_below, rescale, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """What dropout multiplies the block at (first, c0) by: 0 or rescale."""
    row = first + tl.arange(0, ROWS)[:, None]
    w0, w1, w2, w3 = philox.words(key, tl.full((), 0, tl.int64), row, c0 // 4 + tl.arange(0, BLOCK_D // 4)[None, :])
    kept0, kept1 = philox.kept(w0, cut_below).to(tl.int8), philox.kept(w1, cut_below).to(tl.int8)
    kept2, kept3 = philox.kept(w2, cut_below).to(tl.int8), philox.kept(w3, cut_below).to(tl.int8)
    return tl.where(philox.by_column(kept0, kept1, kept2, kept3) != 0, rescale, 0.0)


@triton.jit
def _block(base, first, c0, rows, D: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The block at (first, c0) of a matrix [rows, D]; 0 outside."""
    i = tl.arange(0, ROWS)[:, None]
    c = c0 + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(base + first * D + (i * D + c), mask=(first + i < rows) & (c < D), other=0.0).to(dtype)


@triton.jit
def _store(base, x, first, c0, rows, D: tl.constexpr):
    i = tl.arange(0, x.shape[0])[:, None]
    c = c0 + tl.arange(0, x.shape[1])[None, :]
    tl.store(base + first * D + (i * D + c), x.to(base.dtype.element_ty), mask=(first + i < rows) & (c < D))


@triton.jit
def _summed(
    x, y, seed, first, c0, rows, cut_below, rescale, D: tl.constexpr, dtype: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """s in the block at (first, c0), 0 outside, and what dropout multiplied y by."""
    s = _block(x, first, c0, rows, D, dtype, ROWS, BLOCK_D)
    Y = _block(y, first, c0, rows, D, dtype, ROWS, BLOCK_D)
    factor = rescale
    if seed is not None:
        factor = _kept(tl.load(seed), first, c0, cut_below, rescale, ROWS, BLOCK_D)
    return s + Y * factor, factor


@triton.jit
def _per_column(base, c0, D: tl.constexpr, dtype: tl.constexpr, BLOCK_D: tl.constexpr):
    c = c0 + tl.arange(0, BLOCK_D)[None, :]
    return tl.load(base + c, mask=c < D, other=0.0).to(dtype)


@triton.jit(do_not_specialize=["rows", "cut_below"])
def _fwd_kernel(
    x,  # [rows, D]
    y,  # [rows, D]
    weight,  # [D]
    bias,  # [D]
    seed,  # [1], int64, or None: no dropout
    out,  # [rows, D]
    mean,  # [rows], in the compute dtype
    rstd,  # [rows]
    rows,
    # A plain float would arrive as float32.
    eps: tl.float64,
    rescale: tl.float64,
    cut_below,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    dtype: tl.constexpr = mean.dtype.element_ty
    eps, rescale = tl.full((), eps, dtype), tl.full((), rescale, dtype)
    first = tl.program_id(0).to(tl.int64) * ROWS
    width = D if WIDE else 1

    total = tl.zeros((ROWS, 1), dtype)
    for c0 in range(0, width, BLOCK_D):
        s, _ = _summed(x, y, seed, first, c0, rows, cut_below, rescale, D, dtype, ROWS, BLOCK_D)
        total += tl.sum(s, 1, keep_dims=True)
    average = total / D
    square = tl.zeros((ROWS, 1), dtype)
    for c0 in range(0, width, BLOCK_D):
        s, _ = _summed(x, y, seed, first, c0, rows, cut_below, rescale, D, dtype, ROWS, BLOCK_D)
        centred = tl.where(c0 + tl.arange(0, BLOCK_D)[None, :] < D, s - average, 0.0)
        square += tl.sum(centred * centred, 1, keep_dims=True)
    inverse = 1.0 / tl.sqrt(square / D + eps)
    for c0 in range(0, width, BLOCK_D):
        s, _ = _summed(x, y, seed, first, c0, rows, cut_below, rescale, D, dtype, ROWS, BLOCK_D)
        result = (s - average) * inverse * _per_column(weight, c0, D, dtype, BLOCK_D) + _per_column(bias, c0, D, dtype, BLOCK_D)
        _store(out, result, first, c0, rows, D)
    i = first + tl.arange(0, ROWS)[:, None]
    tl.store(mean + i, average, mask=i < rows)
    tl.store(rstd + i, inverse, mask=i < rows)


@triton.jit(do_not_specialize=["rows", "rows_per_part", "cut_below"])
def _bwd_kernel(
    grad_out,  # [rows, D]
    x,  # [rows, D]
    y,  # [rows, D]
    weight,  # [D]
    mean,  # [rows]
    rstd,  # [rows]
    seed,  # [1], int64, or None
    dx,  # [rows, D]
    dy,  # [rows, D], or None: dx
    sums,  # [parts, 2, D] of do h and of do, in the compute dtype
    rows,
    rows_per_part,  # a multiple of ROWS
    rescale: tl.float64,
    cut_below,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    dtype: tl.constexpr = mean.dtype.element_ty
    rescale = tl.full((), rescale, dtype)
    part = tl.program_id(0).to(tl.int64)
    start = part * rows_per_part
    width = D if WIDE else 1
    sums += part * 2 * D
    c = tl.arange(0, BLOCK_D)[None, :]

    along_h = tl.zeros((ROWS, BLOCK_D), dtype)
    along_1 = tl.zeros((ROWS, BLOCK_D), dtype)
    for first in range(start, tl.minimum(start + rows_per_part, rows), ROWS):
        i = first + tl.arange(0, ROWS)[:, None]
        average = tl.load(mean + i, mask=i < rows, other=0.0)
        inverse = tl.load(rstd + i, mask=i < rows, other=0.0)
        shift = tl.zeros((ROWS, 1), dtype)
        slope = tl.zeros((ROWS, 1), dtype)
        for c0 in range(0, width, BLOCK_D):
            s, _ = _summed(x, y, seed, first, c0, rows, cut_below, rescale, D, dtype, ROWS, BLOCK_D)
            G = _block(grad_out, first, c0, rows, D, dtype, ROWS, BLOCK_D)
            dh = G * _per_column(weight, c0, D, dtype, BLOCK_D)
            shift += tl.sum(dh, 1, keep_dims=True)
            slope += tl.sum(dh * ((s - average) * inverse), 1, keep_dims=True)
        shift, slope = shift / D, slope / D
        for c0 in range(0, width, BLOCK_D):
            s, factor = _summed(x, y, seed, first, c0, rows, cut_below, rescale, D, dtype, ROWS, BLOCK_D)
            G = _block(grad_out, first, c0, rows, D, dtype, ROWS, BLOCK_D)
            h = (s - average) * inverse
            dX = (G * _per_column(weight, c0, D, dtype, BLOCK_D) - shift - h * slope) * inverse
            _store(dx, dX, first, c0, rows, D)
            if dy is not None:
                _store(dy, dX * factor, first, c0, rows, D)
            if WIDE:
                before = tl.where(first > start, D, 0)
                old_h = tl.load(sums + c0 + c, mask=c0 + c < before, other=0.0)
                old_1 = tl.load(sums + D + c0 + c, mask=c0 + c < before, other=0.0)
                tl.store(sums + c0 + c, old_h + tl.sum(G * h, 0, keep_dims=True), mask=c0 + c < D)
                tl.store(sums + D + c0 + c, old_1 + tl.sum(G, 0, keep_dims=True), mask=c0 + c < D)
            else:
                along_h += G * h
                along_1 += G
        if WIDE:
            tl.debug_barrier()  # what one thread has added, another may read
    if not WIDE:
        tl.store(sums + c, tl.sum(along_h, 0, keep_dims=True), mask=c < D)
        tl.store(sums + D + c, tl.sum(along_1, 0, keep_dims=True), mask=c < D)


def residual_norm_fwd(
    x: Tensor,  # [.., D], any strides: copied unless contiguous
    y: Tensor,  # [.., D], likewise
    weight: Tensor,  # [D]
    bias: Tensor,  # [D]
    seed: Tensor | None,  # int64, one element; None: nothing is dropped
    eps: float,
    cut_below: int,  # T(dropout_p) of helo_fast/ops/attention/philox.py
    rescale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [.., D], mean [rows], rstd [rows]), as the reference."""
    D = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    out = x.new_empty(x.shape)
    mean = x.new_empty(rows, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    rstd = torch.empty_like(mean)
    if rows == 0:
        return out, mean, rstd
    tiles = tile(D)
    x, y, weight, bias = (t.contiguous() for t in (x, y, weight, bias))
    with device_guard(x):
        _fwd_kernel[(math.ceil(rows / tiles["ROWS"]),)](
            *(x, y, weight, bias, seed, out, mean, rstd, rows, eps, rescale, cut_below), **tiles, **compiler_options(x.dtype)
        )
    return out, mean, rstd


def residual_norm_bwd(
    grad_out: Tensor,  # [.., D], any strides: copied unless contiguous, as are x and y
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    mean: Tensor,  # [rows]
    rstd: Tensor,
    seed: Tensor | None,
    cut_below: int,
    rescale: float,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(dx, dy or None where it equals dx, dweight, dbias), as the reference."""
    D = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    dx, dy = x.new_empty(x.shape), None if seed is None else y.new_empty(y.shape)
    if rows == 0:
        return dx, dy, weight.new_zeros(D), weight.new_zeros(D)
    tiles = tile(D)
    blocks = math.ceil(rows / tiles["ROWS"])
    blocks_per_part = math.ceil(blocks / max(1, min(MOST_PARTS, MOST_SUMS // (2 * D))))
    parts = math.ceil(blocks / blocks_per_part)
    sums = mean.new_empty(parts, 2, D)
    grad_out, x, y, weight, mean, rstd = (t.contiguous() for t in (grad_out, x, y, weight, mean, rstd))
    with device_guard(x):
        _bwd_kernel[(parts,)](
            *(grad_out, x, y, weight, mean, rstd, seed, dx, dy, sums),
            *(rows, blocks_per_part * tiles["ROWS"], rescale, cut_below),
            **(tiles | compiler_options(x.dtype)),
        )
    dweight, dbias = (sums[:, k].sum(0).to(weight.dtype) for k in (0, 1))
    return dx, dy, dweight, dbias


def variants() -> list[Variant]:
    """Every tile, with dropout; halves with float32 parameters. float16 compiles as bfloat16 does."""
    found = []
    for kernel in (_fwd_kernel, _bwd_kernel):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            compute = torch.float64 if dtype == torch.float64 else torch.float32
            types = dict.fromkeys(("x", "y", "out", "grad_out", "dx", "dy"), dtype) | {"seed": torch.int64}
            types |= dict.fromkeys(("weight", "bias", "mean", "rstd", "sums"), compute)
            pointers = {name: types[name] for name in kernel.arg_names if name in types}
            for D in (*BLOCKS_D, BLOCKS_D[-1] + 1):
                name = f"{kernel.__name__.strip('_')} {str(dtype).removeprefix('torch.')} {'wide' if D > BLOCKS_D[-1] else D}"
                found.append(Variant(name, kernel, pointers, tile(D), compiler_options(dtype)))
    return found
