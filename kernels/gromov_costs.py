"""HeLo's cosine costs of tokens in Triton, one program per problem, and what gromov's kernels share.

    c_ij = 1 - <x_i, y_j> / (|x_i| |y_j|), norms at least 1e-12;  and within a space the extremes of c over pairs that have mass

Grid: x = problem (B may exceed 65535). Traffic: tokens are read twice (norms, then products) and c is written once: gromov.py cuts it
off at the threshold as it reads it, when the batch's extremes are known.
Products run over slices that are fetched in a loop's body, so that one slice's operands are dead before the next one's are read. float32
products are IEEE float32.
Invariants: tokens of zero mass are never read; they count as zero tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import device_guard

BLOCKS = {torch.float32: (32, 64), torch.float64: (32,)}  # sides of the tile that holds a problem: a larger one spills registers
NORM_FLOOR = tl.constexpr(1e-12)  # of a token, in its cosine cost
SLICE = tl.constexpr(16)  # of what a product sums over: the least that it takes


def block(n: int, m: int, dtype: torch.dtype) -> int | None:
    """The side of the tile that holds each matrix of an n x m problem, or None."""
    return next((size for size in BLOCKS[dtype] if size >= max(n, m)), None)


def compiler_options(BLOCK: int) -> dict[str, int | bool]:
    """Warps, so that a thread holds 8 or 16 entries of a tile."""
    # Registers and fp fusion are named because ptxas spills a little without the one, and versions of Triton differ in the other.
    return {"num_warps": BLOCK // 8, "num_stages": 1, "maxnreg": 255, "enable_fp_fusion": True}


@triton.jit
def load_mass(mass, index, size, stride):
    return tl.load(mass + index.to(tl.int64) * stride, mask=index < size, other=0.0)


@triton.jit
def cut_off(cost, cut):
    """relu(cost - cut); the cost where there is no threshold, cut -inf."""
    return tl.where(cut > float("-inf"), tl.maximum(cost - cut, 0.0), cost)


@triton.jit
def load_tokens(tokens, row, k, alive, width, stride_n, stride_d):
    return tl.load(tokens + row.to(tl.int64) * stride_n + k.to(tl.int64) * stride_d, mask=alive & (k < width), other=0.0)


@triton.jit
def inverse_norms(tokens, row, alive, width, stride_n, stride_d, BLOCK: tl.constexpr):
    """[BLOCK, 1]"""
    squares = tl.zeros((BLOCK, 1), tokens.dtype.element_ty)
    for start in range(0, width, SLICE):
        X = load_tokens(tokens, row, start + tl.arange(0, SLICE)[None, :], alive, width, stride_n, stride_d)
        squares += tl.sum(X * X, 1, keep_dims=True)
    return 1.0 / tl.maximum(tl.sqrt(squares), NORM_FLOOR)


@triton.jit(do_not_specialize=["n", "m", "width"])
def _cosine_kernel(
    x,  # [B, n, width], any strides
    y,  # [B, m, width]
    a,  # [B, n]
    b,  # [B, m]
    cost,  # [B, n, m]
    low,  # [B]
    high,  # [B]
    x_stride_b,
    x_stride_n,
    x_stride_d,
    y_stride_b,
    y_stride_m,
    y_stride_d,
    a_stride_b,
    a_stride_n,
    b_stride_b,
    b_stride_m,
    n,
    m,
    width,
    BLOCK: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    x += problem * x_stride_b
    y += problem * y_stride_b
    index = tl.arange(0, BLOCK)
    row, column = index[:, None], index[None, :]
    x_alive = load_mass(a + problem * a_stride_b, row, n, a_stride_n) > 0
    y_alive = load_mass(b + problem * b_stride_b, row, m, b_stride_m) > 0
    y_alive_across = load_mass(b + problem * b_stride_b, column, m, b_stride_m) > 0
    x_scale = inverse_norms(x, row, x_alive, width, x_stride_n, x_stride_d, BLOCK)
    y_scale = inverse_norms(y, row, y_alive, width, y_stride_m, y_stride_d, BLOCK)
    dtype: tl.constexpr = x.dtype.element_ty
    cosine = tl.zeros((BLOCK, BLOCK), dtype)
    for start in range(0, width, SLICE):
        k = start + tl.arange(0, SLICE)[None, :]
        X = load_tokens(x, row, k, x_alive, width, x_stride_n, x_stride_d) * x_scale
        Y = load_tokens(y, row, k, y_alive, width, y_stride_m, y_stride_d) * y_scale
        cosine = tl.dot(X, tl.trans(Y), cosine, input_precision="ieee", out_dtype=dtype)
    c = 1.0 - cosine
    tl.store(cost + problem * n * m + (row * m + column), c, mask=(row < n) & (column < m))
    inside = x_alive & y_alive_across
    tl.store(low + problem, tl.min(tl.where(inside, c, float("inf"))))
    tl.store(high + problem, tl.max(tl.where(inside, c, float("-inf"))))


def cosine_cost(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c [B, n, m], its least and its largest entry over pairs with mass [B]) of tokens [B, n, d], [B, m, d] and masses, any strides."""
    (batch, n), m = a.shape, b.shape[1]
    cost, low, high = x.new_empty(batch, n, m), x.new_empty(batch), x.new_empty(batch)
    BLOCK = block(n, m, x.dtype)
    strides = *x.stride(), *y.stride(), *a.stride(), *b.stride()
    with device_guard(x):
        options = compiler_options(BLOCK)
        _cosine_kernel[(batch,)](x, y, a, b, cost, low, high, *strides, n, m, x.shape[2], BLOCK=BLOCK, **options)
    return cost, low, high
