"""Sinkhorn forward in Triton for problems beyond the registers whose rows fit them: one pass over cost an iteration.

    gamma_j = -kappa_b log2sumexp2_i(log2 a_i + phi_i + M_ij), then phi_i likewise over j; from phi = 0; M = -cost log2(e) / epsilon.

A pass takes a stripe of rows at a time: with beta = log2 b + gamma, p_ij = exp2(beta_j + M_ij - top_i) and its row sums give phi_i, and,
times the row's marginal over its sum, the plan. The plan's column sums s, added up on the way, give the next gamma_j + log2 (b_j / s_j):
one exponential an entry and iteration. Where a column sum may have lost something to underflow, or overflows, and at the start, gamma
is computed from phi in a pass of its own, with each column's maximum.

Grid: x = problem (B may exceed 65535). A row is folded over one warp or four, column j = c LANES + k at [c, i, k] of a
[BLOCK / LANES, ROWS, LANES] tile, so that few threads share a row's sum; column sums are added up in registers and exchanged once a
pass. Traffic: cost is read once an iteration and once at the end, when the plan is written; f holds phi meanwhile.
Invariants: rows and columns of zero mass, and padding, are -inf in the potentials and 0 in the plan, whatever stands in their cost; an
infinite cost is -inf in M. A maximum of -inf is replaced by 0. Offsets into tensors are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variant import Variant

# Columns at most: (ROWS, LANES, warps, registers a thread)
TILES = {torch.float32: {256: (16, 32, 8, 128), 1024: (4, 128, 16, 128)}, torch.float64: {256: (8, 32, 8, 255)}}
LN_2 = tl.constexpr(0.6931471805599453)


def block(m: int, dtype: torch.dtype) -> int | None:
    """The columns of the tile that holds rows of m, or None."""
    return next((size for size in TILES[dtype] if size >= m), None)


def compiler_options(BLOCK: int, dtype: torch.dtype) -> dict[str, int | bool]:
    # fp fusion is named because its default differs between versions of Triton
    *_, warps, registers = TILES[dtype][BLOCK]
    return {"num_warps": warps, "num_stages": 1, "maxnreg": registers, "enable_fp_fusion": True}


@triton.jit
def _log2(mass):
    return tl.where(mass > 0, tl.log2(mass), float("-inf"))


@triton.jit
def _space(cost, cost_stride_n, cost_stride_m, a, a_stride_n, n, m, minus_inverse_epsilon):
    """What _stripe reads, of one problem: -log2(e) / epsilon comes as a sum of two, so that M is rounded once or so."""
    dtype: tl.constexpr = cost.dtype.element_ty
    scale = tl.full((), minus_inverse_epsilon, tl.float64) / LN_2
    rest = (scale - scale.to(dtype).to(tl.float64)).to(dtype)
    return cost, cost_stride_n, cost_stride_m, a, a_stride_n, n, m, scale.to(dtype), rest


@triton.jit
def _stripe(space, start, b, j, ROWS: tl.constexpr):
    """(rows [1, ROWS, 1], their mass, M, cost) of a stripe; cost is 0 where there is no mass."""
    cost, stride_n, stride_m, a, a_stride, n, m, scale, rest = space
    i = start + tl.arange(0, ROWS)[None, :, None]
    mass = tl.load(a + i.to(tl.int64) * a_stride, mask=i < n, other=0.0)
    # Loaded in two dimensions: this decides which warps the rows of the tile go to, for all versions of Triton alike.
    FOLD: tl.constexpr = j.shape[0]
    LANES: tl.constexpr = j.shape[2]
    k = tl.arange(0, FOLD * ROWS)[:, None]
    row, column = start + k % ROWS, k // ROWS * LANES + tl.arange(0, LANES)[None, :]
    C = tl.load(cost + (row.to(tl.int64) * stride_n + column.to(tl.int64) * stride_m), mask=(row < n) & (column < m), other=0.0)
    C = tl.where((mass > 0) & (b > 0), tl.reshape(C, (FOLD, ROWS, LANES)), 0.0)
    return i, mass, tl.where(C == float("inf"), float("-inf"), C * scale + C * rest), C


@triton.jit
def _rows(M, mass, beta, kappa_a, slope_a):
    """(phi, plan) of a stripe."""
    x = beta + M
    top = tl.max(tl.max(x, 0, keep_dims=True), 2, keep_dims=True)
    top = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(x - top)
    total = tl.sum(tl.sum(p, 0, keep_dims=True), 2, keep_dims=True)
    phi = -kappa_a * (top + tl.log2(total))
    weight = mass / total
    if slope_a != 0:
        weight = mass * tl.exp2(-slope_a * phi - tl.log2(total))
    alive = (mass > 0) & (total > 0)
    return tl.where(mass > 0, phi, float("-inf")), p * tl.where(alive, weight, 0.0)


@triton.jit
def _log2sumexp2(space, phi, b, j, ROWS: tl.constexpr):
    """Of log2 a + phi + M over the rows, for each column."""
    n = space[5]
    top = tl.full((j.shape[0], ROWS, j.shape[2]), float("-inf"), b.dtype)
    total = tl.zeros_like(top)
    for start in range(0, n, ROWS):
        i, mass, M, _ = _stripe(space, start, b, j, ROWS)
        x = tl.where(mass > 0, _log2(mass) + tl.load(phi + i, mask=i < n, other=0.0), float("-inf")) + M
        new = tl.maximum(top, x)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.exp2(x - safe)
        top = new
    most = tl.max(top, 1, keep_dims=True)
    most = tl.where(most == float("-inf"), 0.0, most)
    return most + tl.log2(tl.sum(total * tl.exp2(top - most), 1, keep_dims=True))


@triton.jit
def _next(space, phi, gamma, sums, b, j, kappa_b, ROWS: tl.constexpr):
    """gamma from the plan's column sums; from phi, in a pass of its own, where one may have lost something to underflow, or overflows."""
    TINY: tl.constexpr = 1e-22 if b.dtype == tl.float32 else 1e-200  # sums above it have lost nothing to underflow
    lost = tl.max(tl.max(tl.max(tl.where((b > 0) & ~((sums > TINY) & (sums < 1 / TINY)), 1, 0), 0), 1), 0)
    if lost != 0:
        tl.debug_barrier()  # phi has been written
        gamma = -kappa_b * _log2sumexp2(space, phi, b, j, ROWS)
        tl.debug_barrier()  # and read
    elif kappa_b != 1:
        gamma = -kappa_b * (tl.log2(sums) - (_log2(b) + gamma))
    else:
        gamma += tl.log2(b / sums)
    return tl.where(b > 0, gamma, float("-inf"))


@triton.jit
def _with_mass(b, gamma):
    return tl.where(b > 0, _log2(b) + gamma, float("-inf"))


@triton.jit
def _error(sums, b, gamma, slope_b):
    """L1 distance of the column marginal from b exp2(-slope_b gamma), which is b if balanced."""
    target = tl.where(b > 0, b * tl.exp2(-slope_b * gamma), 0.0)
    return tl.sum(tl.sum(tl.sum(tl.abs(sums - target), 0), 1), 0)


@triton.jit(do_not_specialize=["cost_stride_b", "cost_stride_n", "n", "m", "max_iter", "check_every", "kept"])
def _sinkhorn_rows_kernel(
    cost,  # [B, n, m], any strides
    a,  # [B, n], any strides
    b,  # [B, m], any strides
    plan,  # [B, n, m]
    f,  # [B, n]
    g,  # [B, m]
    transport_cost,  # [B]
    marginal_error,  # [B]
    n_iter,  # [B], int32
    history,  # [B, kept, n + m] of (phi, gamma), natural
    cost_stride_b,
    cost_stride_n,
    cost_stride_m,
    a_stride_b,
    a_stride_n,
    b_stride_b,
    b_stride_m,
    n,
    m,
    max_iter,
    check_every,
    kept,  # iterations that history has room for: max_iter or 0
    # A plain float would arrive as float32.
    epsilon: tl.float64,
    minus_inverse_epsilon: tl.float64,
    tol: tl.float64,  # below 0: never stop early
    kappa_a: tl.float64,
    kappa_b: tl.float64,
    slope_a: tl.float64,  # epsilon / tau_a, 0 if balanced
    slope_b: tl.float64,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    dtype: tl.constexpr = cost.dtype.element_ty
    unit = (tl.full((), epsilon, tl.float64) * LN_2).to(dtype)
    epsilon = tl.full((), epsilon, dtype)
    tol = tl.full((), tol, dtype)
    kappa_a = tl.full((), kappa_a, dtype)
    kappa_b = tl.full((), kappa_b, dtype)
    slope_a = tl.full((), slope_a, dtype)
    slope_b = tl.full((), slope_b, dtype)

    problem = tl.program_id(0).to(tl.int64)
    a += problem * a_stride_b
    space = _space(cost + problem * cost_stride_b, cost_stride_n, cost_stride_m, a, a_stride_n, n, m, minus_inverse_epsilon)
    f += problem * n
    g += problem * m
    plan += problem * n * m
    j = tl.arange(0, BLOCK // LANES)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]  # [BLOCK / LANES, 1, LANES]
    b = tl.load(b + problem * b_stride_b + j.to(tl.int64) * b_stride_m, mask=j < m, other=0.0)
    for start in range(0, n, ROWS):
        i = start + tl.arange(0, ROWS)[None, :, None]
        tl.store(f + i, tl.zeros((1, ROWS, 1), dtype), mask=i < n)

    gamma = tl.where(b > 0, tl.zeros_like(b), float("-inf"))
    sums = tl.zeros_like(b)
    error = tl.full((), 0.0, dtype)
    iteration = 0
    running = True
    while running:
        gamma = _next(space, f, gamma, sums, b, j, kappa_b, ROWS)
        beta = _with_mass(b, gamma)
        past = history + (problem * kept + iteration) * (n + m)
        if kept > 0:
            tl.store(past + n + j, gamma * LN_2, mask=j < m)
        moved = tl.zeros((BLOCK // LANES, ROWS, LANES), dtype)
        for start in range(0, n, ROWS):
            i, mass, M, _ = _stripe(space, start, b, j, ROWS)
            phi, T = _rows(M, mass, beta, kappa_a, slope_a)
            moved += T
            tl.store(f + i, phi, mask=i < n)
            if kept > 0:
                tl.store(past + i, phi * LN_2, mask=i < n)
        sums = tl.sum(moved, 1, keep_dims=True)
        iteration += 1
        running = iteration < max_iter
        if ((iteration % check_every == 0) & (tol >= 0)) | ~running:
            error = _error(sums, b, gamma, slope_b)
            running &= ~(error <= tol)

    tl.debug_barrier()  # f is written again
    spent = tl.zeros((BLOCK // LANES, ROWS, LANES), dtype)
    beta = _with_mass(b, gamma)
    for start in range(0, n, ROWS):
        i, mass, M, C = _stripe(space, start, b, j, ROWS)
        phi, T = _rows(M, mass, beta, kappa_a, slope_a)
        spent += tl.where(T > 0, T * C, 0.0)
        tl.store(plan + (i.to(tl.int64) * m + j), T, mask=(i < n) & (j < m))
        tl.store(f + i, unit * phi, mask=i < n)
    tl.store(g + j, unit * gamma, mask=j < m)
    tl.store(transport_cost + problem, tl.sum(tl.sum(tl.sum(spent, 0), 1), 0))
    tl.store(marginal_error + problem, error)
    tl.store(n_iter + problem, iteration)


def launch(cost: Tensor, a: Tensor, b: Tensor, outputs: tuple[Tensor, ...], counts: tuple[int, ...], numbers: tuple[float, ...]) -> None:
    """Arguments as the register kernel's in sinkhorn.py."""
    BLOCK = block(cost.shape[2], cost.dtype)
    _sinkhorn_rows_kernel[(cost.shape[0],)](
        cost,
        a,
        b,
        *outputs,
        *cost.stride(),
        *a.stride(),
        *b.stride(),
        *counts,
        *numbers,
        BLOCK=BLOCK,
        ROWS=TILES[cost.dtype][BLOCK][0],
        LANES=TILES[cost.dtype][BLOCK][1],
        **compiler_options(BLOCK, cost.dtype),
    )


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for, of contiguous tensors."""
    names = _sinkhorn_rows_kernel.arg_names
    tensors = names[: names.index("cost_stride_b")]
    return [
        Variant(
            f"{str(dtype).removeprefix('torch.')} {BLOCK}",
            _sinkhorn_rows_kernel,
            dict.fromkeys(tensors, dtype) | {"n_iter": torch.int32},
            {"BLOCK": BLOCK, "ROWS": ROWS, "LANES": LANES, "cost_stride_m": 1, "a_stride_n": 1, "b_stride_m": 1},
            compiler_options(BLOCK, dtype),
        )
        for dtype, tiles in TILES.items()
        for BLOCK, (ROWS, LANES, *_) in tiles.items()
    ]
