"""What attention's kernels share: the table of tiles, how operands are read and rounded, the logits of a tile.

A program holds BLOCK rows (of the forward, of dq) or columns (of dk and dv) of a head; the other side passes by STEP at a time, and so do
the slices of d over which q k' is summed. Small steps keep registers for the results: what a product takes is fetched in a loop's body,
so that one product's operands are dead before the next one's are read.

Precision: float64 and, unless torch allows TF32, float32 are multiplied as such. Halves are exact in TF32, whose tensor cores add up in
float32; the weights and slopes that meet them are rounded to its 11 bits, which have float32's range.
No tile has the 64 rows for which Triton would choose Hopper's wgmma: chains of small products on it are known to read outside shared
memory in Triton 3.6 and 3.7.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox

DROPPED = tl.constexpr(-999999995904.0)  # DROPPED of helo_fast/ops/attention/reference.py, whose rules these are
STEP = tl.constexpr(16)  # the least that a product takes in any dimension
LONG = 48  # up to here, smaller blocks waste less
LARGEST_STRIDE = 1 << 24  # of rows, so that offsets within a tile have 32 bits

# dtype -> BLOCK_D -> BLOCKs. Halves share a table, and so does float32 where torch allows TF32.
TILES = {
    torch.float32: {32: (16, 32), 64: (32,), 128: (16,), 256: (16,)},
    torch.bfloat16: {32: (16, 32), 64: (32,), 128: (16,), 256: (16,)},
    torch.float64: {64: (16,), 256: (16,)},
}


def tile(count: int, d: int, dtype: torch.dtype) -> dict[str, int]:
    """BLOCK and BLOCK_D for a side of count rows or columns."""
    table = TILES.get(dtype, TILES[torch.bfloat16])
    BLOCK_D = min(size for size in table if size >= d)
    return {"BLOCK": table[BLOCK_D][-1] if count > LONG else table[BLOCK_D][0], "BLOCK_D": BLOCK_D}


def precision(dtype: torch.dtype) -> str:
    """How products are computed, as tl.dot names it."""
    if dtype == torch.float64 or (dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"):
        return "ieee"
    return "tf32"


def compiler_options(BLOCK: int, BLOCK_D: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Warps, so that a thread holds 16 entries of a result (in float64 8, or 16 of the widest)."""
    num_warps = min(BLOCK * BLOCK_D // (256 if dtype == torch.float64 else 512), 8)
    # maxnreg and fp fusion are named because ptxas spills a little without the one, and versions of Triton differ in the other.
    return {"num_warps": num_warps, "num_stages": 1, "maxnreg": 255, "enable_fp_fusion": True}


def readable(t: Tensor) -> Tensor:
    """t, or a copy where its rows are not contiguous, lie too far apart, or so that the batch decides how far: a kernel is compiled for
    each distance between rows."""
    every_batch = [t.shape[-1], *(count * t.shape[1] * t.shape[-1] for count in (1, 2, 3))]  # of heads alone, or joined, as q, k, v may be
    row = t.stride(-2)
    return t if t.stride(-1) == 1 and row < LARGEST_STRIDE and (row in every_batch or t.shape[-2] == 1) else t.contiguous()


def strides(t: Tensor) -> list[int]:
    """Of batch, head and row; 0 where there is but one, be it shared."""
    return [0 if size == 1 else stride for size, stride in zip(t.shape[:3], t.stride()[:3])]


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """An operand, rounded to what its product takes; tensor cores would cut it."""
    if PRECISION == "tf32":
        bits = (x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # NaN would overflow
    else:
        return x


@triton.jit
def block(base, stride, first, count, c0, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr):
    """The block at (first, c0) of a matrix [count, d] as an operand; 0 outside."""
    i = tl.arange(0, ROWS)[:, None]
    c = c0 + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(base + tl.cast(first, tl.int64) * stride + (i * stride + c), mask=(first + i < count) & (c < d), other=0.0)
    if x.dtype == tl.float64:
        return x
    elif x.dtype == tl.float32:
        return rounded(x, PRECISION)
    else:
        return x.to(tl.float32)


@triton.jit
def product(
    x,  # [n, d]
    x_stride,
    i0,
    n,
    y,  # [m, d]
    y_stride,
    j0,
    m,
    d,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The tile of x y' at (i0, j0)."""
    total = tl.zeros((ROWS, COLUMNS), dtype)
    for c0 in range(0, d, STEP):
        X = block(x, x_stride, i0, n, c0, d, ROWS, STEP, PRECISION)
        Y = block(y, y_stride, j0, m, c0, d, COLUMNS, STEP, PRECISION)
        total = tl.dot(X, tl.trans(Y), total, input_precision=PRECISION, out_dtype=dtype)
    return total


@triton.jit
def logits(s, bias, bias_stride, i0, j0, n, m, scale, decided):
    """(q k' + bias) scale after DropKey, from the tile of q k' at (i0, j0); -inf outside."""
    i = tl.arange(0, s.shape[0])[:, None]
    j = tl.arange(0, s.shape[1])[None, :]
    inside = (i0 + i < n) & (j0 + j < m)
    if bias is not None:
        at = bias + tl.cast(i0, tl.int64) * bias_stride + (i * bias_stride + (j0 + j))
        s += tl.load(at, mask=inside, other=0.0).to(s.dtype)
    s *= scale
    if decided is not None:
        s = tl.where(((decided & philox.DROPPED) != 0) & (s > DROPPED), DROPPED, s)
    return tl.where(inside, s, float("-inf"))
