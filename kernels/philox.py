"""Philox 4x32-10 in Triton, in the layout of helo_fast/ops/attention/philox.py: one call decides both masks of four adjacent columns.

A tile's words are computed a call per four columns; only the decisions, a byte per entry, are then spread over the columns. What depends
on the row or on the column alone stays a vector: most of the first two rounds. Integers throughout: the bits are the same on every
device and at every tiling.
"""

from __future__ import annotations

import triton
import triton.language as tl

DROPPED = tl.constexpr(1)  # in a decision: DropKey drops the key
KEPT = tl.constexpr(2)  # and dropout keeps the weight


@triton.jit
def words(seed, problem, row, block):
    """The four words of every call: seed and problem (batch * H + head) are int64 scalars, row and block (column // 4) broadcast."""
    c0, c1 = block.to(tl.uint32), row.to(tl.uint32)
    c2, c3 = problem.to(tl.uint32), (problem >> 32).to(tl.uint32)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1, p0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def by_column(w0, w1, w2, w3):
    """What belongs to the four words of each call, [.., blocks], in the order of their columns: [.., 4 blocks]."""
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def kept(word, cut_below):
    """Whether dropout keeps the weight: its bits are not below T(dropout_p)."""
    return (word >> 16).to(tl.int32) >= cut_below


@triton.jit
def _decision(word, drop_below, cut_below):
    dropped = (word & 0xFFFF).to(tl.int32) < drop_below
    return tl.where(dropped, DROPPED, 0).to(tl.int8) | tl.where(kept(word, cut_below), KEPT, 0).to(tl.int8)


@triton.jit
def decisions(seed, problem, i0, j0, drop_below, cut_below, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Both masks of the tile at row i0 and column j0 (a multiple of 4), as DROPPED | KEPT: int8 [ROWS, COLUMNS]."""
    row = i0 + tl.arange(0, ROWS)[:, None]
    block = j0 // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    w0, w1, w2, w3 = words(seed, problem, row, block)
    return by_column(
        _decision(w0, drop_below, cut_below),
        _decision(w1, drop_below, cut_below),
        _decision(w2, drop_below, cut_below),
        _decision(w3, drop_below, cut_below),
    )
