"""Sinkhorn forward in Triton for many small balanced problems: several to a program, each in a few threads of a warp.

The iteration and its notation are those of sinkhorn.py. There a warp shares a problem: of a small one a thread has only some entries, and
most of an iteration is exchange between threads, and what every problem needs once. Here a thread holds all rows of some columns: a sum
over rows is its own, one over columns takes an exchange or three. As compiled that is fewer instructions for a problem, but also fewer
threads: it is for more problems than a GPU has room for.

Grid: x = 32 / LANES problems, a warp. Column j = c LANES + k of row i of problem p stands at [c, i, p LANES + k] of a
[BLOCK / LANES, BLOCK, 32] tile; what is of a row is at all k alike. Every tensor's last axis is the warp's 32 lanes, and memory is read
and written by flat tensors of that order, so that no version of Triton has to exchange anything between two layouts.
Traffic: cost is read four times for each K and once for the plan, all but the first time mostly from cache; each output is written once;
alpha and beta stand in scratch memory, [B, n + m] doubles, and u waits in f while K is made.
Invariants: each problem stops, and has its K made anew, by itself, whatever the others of its program do; those past the batch have no
mass. Padding, and rows and columns of zero mass, are 0 in K, u and v and -inf in the potentials, whatever stands in their cost. A maximum
of -inf is replaced by 0. A barrier parts what is written to scratch memory from its reading. Offsets into tensors are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scalings import excess, first_scaling, is_safe, log_of, scaling_of
from .variant import Variant

# Sides of the square tile that holds a problem: LANES.
TILES = {torch.float32: {8: 2, 16: 8}, torch.float64: {8: 8}}
# About two for each quarter of a large GPU's multiprocessors, below which threads would be wanting: reckoned, not measured.
FEWEST_PROGRAMS = 1024
# fp fusion is named because its default differs between versions of Triton
COMPILER_OPTIONS = {"num_warps": 1, "maxnreg": 255, "enable_fp_fusion": True}


def block(batch: int, n: int, m: int, dtype: torch.dtype) -> int | None:
    """The side of the tile, or None where one problem per program is to be preferred."""
    for size, LANES in TILES[dtype].items():
        if size >= max(n, m):
            return size if batch >= FEWEST_PROGRAMS * 32 // LANES else None
    return None


@triton.jit
def _flat(FOLD: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """(problem, row or column, k) of the entries of a [1, BLOCK, 32] or [FOLD, 1, 32] tensor, one after the other."""
    entry = tl.arange(0, FOLD * BLOCK * 32)
    problem = tl.program_id(0).to(tl.int64) * (32 // LANES) + entry % 32 // LANES
    k = entry % LANES
    index = entry // 32
    if BLOCK == 1:
        index = index * LANES + k
    return problem, index, k


@triton.jit
def _slice(space, there, step, LANES: tl.constexpr):
    """M of the columns of a step [1, BLOCK, 32], in double and 0 where nothing is there; space = (cost, n, m, -1 / epsilon)."""
    cost, n, m, minus_inverse_epsilon = space
    problem, i, k = _flat(1, there.shape[1], LANES)
    loaded = tl.load(cost + problem * n * m + (i * m + step * LANES + k), mask=tl.reshape(there, i.shape), other=0.0)
    return tl.reshape(loaded, there.shape).to(tl.float64) * minus_inverse_epsilon


@triton.jit
def _read(vectors, there, other, LANES: tl.constexpr):
    """What is of rows [1, BLOCK, 32] or columns [FOLD, 1, 32], other where nothing is there; vectors = (the first, stride of problems)."""
    pointer, stride = vectors
    problem, index, _ = _flat(there.shape[0], there.shape[1], LANES)
    loaded = tl.load(pointer + (problem * stride + index), mask=tl.reshape(there, index.shape), other=other)
    return tl.reshape(loaded, there.shape)


@triton.jit
def _write(vectors, value, there, LANES: tl.constexpr):
    pointer, stride = vectors
    problem, index, _ = _flat(there.shape[0], there.shape[1], LANES)
    tl.store(pointer + (problem * stride + index), tl.reshape(value, index.shape), mask=tl.reshape(there, index.shape))


@triton.jit
def _at(folded, step):
    """The columns [1, .., 32] of a step of what is of all of them."""
    fold = tl.arange(0, folded.shape[0])[:, None, None]
    return tl.sum(tl.where(fold == step, folded, 0.0), 0, keep_dims=True)  # unlike a maximum, a sum keeps NaN


@triton.jit
def _over_lanes(x, LANES: tl.constexpr, largest: tl.constexpr):
    """The sum or maximum over a problem's lanes, at each of them; x is [1, .., 32]."""
    if LANES > 1:
        split = tl.reshape(x, (x.shape[0], x.shape[1], 32 // LANES, LANES))
        if largest:
            split = tl.broadcast_to(tl.max(split, 3, keep_dims=True), split.shape)
        else:
            split = tl.broadcast_to(tl.sum(split, 3, keep_dims=True), split.shape)
        x = tl.reshape(split, x.shape)
    return x


@triton.jit
def _over_columns(tile, LANES: tl.constexpr):
    return _over_lanes(tl.sum(tile, 0, keep_dims=True), LANES, False)


@triton.jit
def _restart(space, again, K, a, b, u, alpha, beta, steps, LANES: tl.constexpr):
    """K after an iteration in the log domain of the problems `again`, a few columns at a time, with the potentials in alpha and beta;
    as it was of the others."""
    dtype: tl.constexpr = K.dtype
    fold = tl.arange(0, K.shape[0])[:, None, None]
    rows = _read(alpha, a > 0, float("-inf"), LANES) + tl.log(_read(u, a > 0, 1.0, LANES).to(tl.float64))
    columns = tl.full(b.shape, float("-inf"), tl.float64)
    for step in range(steps):
        column = _at(b, step)
        x = rows + _slice(space, (a > 0) & (column > 0), step, LANES)
        top = tl.max(x, 1, keep_dims=True)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp((x - top).to(dtype)), 1, keep_dims=True)
        new = tl.where(column > 0, log_of(column) - (top + tl.log(total.to(tl.float64))), float("-inf"))
        columns = tl.where(fold == step, new, columns)
    top = tl.full(a.shape, float("-inf"), tl.float64)
    for step in range(steps):
        M = _slice(space, (a > 0) & (_at(b, step) > 0), step, LANES)
        top = tl.maximum(top, _at(columns, step) + M)
    top = _over_lanes(top, LANES, True)
    top = tl.where(top == float("-inf"), 0.0, top)
    totals = tl.zeros(a.shape, dtype)
    for step in range(steps):
        M = _slice(space, (a > 0) & (_at(b, step) > 0), step, LANES)
        totals += tl.exp((_at(columns, step) + M - top).to(dtype))
    log_a = log_of(a)
    rows = log_a - (top + tl.log(_over_lanes(totals, LANES, False).to(tl.float64)))
    rows = tl.where(a > 0, rows - excess(log_a, dtype), float("-inf"))
    columns -= excess(log_of(b), dtype)
    _write(alpha, rows, again & (a > 0), LANES)
    _write(beta, columns, again & (b > 0), LANES)
    for step in range(steps):
        M = _slice(space, (a > 0) & (_at(b, step) > 0), step, LANES)
        made = tl.exp((rows + _at(columns, step) + M).to(dtype))
        K = tl.where((fold == step) & again, made, K)
    return K


@triton.jit(do_not_specialize=["batch", "n", "m", "max_iter", "check_every"])
def _sinkhorn_packed_kernel(
    cost,  # [B, n, m]
    a,  # [B, n], any strides
    b,  # [B, m], any strides
    plan,  # [B, n, m]
    f,  # [B, n]
    g,  # [B, m]
    transport_cost,  # [B]
    marginal_error,  # [B]
    n_iter,  # [B], int32
    absorbed,  # [B, n + m] of (alpha, beta), float64
    a_stride_b,
    a_stride_n,
    b_stride_b,
    b_stride_m,
    batch,
    n,
    m,
    max_iter,
    check_every,
    # A plain float would arrive as float32.
    epsilon: tl.float64,
    minus_inverse_epsilon: tl.float64,
    tol: tl.float64,  # below 0: never stop early
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    dtype: tl.constexpr = cost.dtype.element_ty
    FOLD: tl.constexpr = BLOCK // LANES
    epsilon = tl.full((), epsilon, tl.float64)
    tol = tl.full((), tol, dtype)
    steps = tl.cdiv(m, LANES)

    of_row, row, k = _flat(1, BLOCK, LANES)
    of_column, column, _ = _flat(FOLD, 1, LANES)
    in_rows, in_columns = (of_row < batch) & (row < n), (of_column < batch) & (column < m)
    space = (cost, n, m, tl.full((), minus_inverse_epsilon, tl.float64))
    a = tl.load(a + (of_row * a_stride_b + row.to(tl.int64) * a_stride_n), mask=in_rows, other=0.0)
    b = tl.load(b + (of_column * b_stride_b + column.to(tl.int64) * b_stride_m), mask=in_columns, other=0.0)
    a, b = tl.reshape(a, (1, BLOCK, 32)), tl.reshape(b, (FOLD, 1, 32))
    alpha, beta, waiting = (absorbed, n + m), (absorbed + n, n + m), (f, n)
    _write(alpha, log_of(a), a > 0, LANES)
    _write(beta, log_of(b), b > 0, LANES)
    tl.debug_barrier()
    u, v = tl.where(a > 0, tl.full(a.shape, 1.0, dtype), 0.0), tl.where(b > 0, tl.full(b.shape, 1.0, dtype), 0.0)
    K = tl.zeros((FOLD, BLOCK, 32), dtype)
    problem, _, lane = _flat(1, 1, LANES)
    running = (problem < batch)[None, None, :]
    error = tl.zeros((1, 1, 32), dtype)
    ran = tl.zeros((1, 1, 32), tl.int32)
    iteration = 0
    going = True
    while going:
        sums = tl.sum(K * u, 1, keep_dims=True)
        new_v = scaling_of(b, sums)
        # NaN makes every sum of the problem's rows NaN, and no scaling of theirs safe.
        new_v = tl.where(is_safe(b, sums, new_v), new_v, float("nan"))
        sums = _over_columns(K * new_v, LANES)
        new_u = scaling_of(a, sums)
        unsafe = tl.max(tl.where(is_safe(a, sums, new_u), 0, 1), 1, keep_dims=True) != 0
        again = unsafe & running
        taken = running & ~unsafe
        u, v = tl.where(taken, new_u, u), tl.where(taken, new_v, v)
        if tl.max(tl.where(again, 1, 0)) != 0:
            _write(waiting, u, a > 0, LANES)  # whose registers the restart needs
            tl.debug_barrier()
            K = _restart(space, again, K, a, b, waiting, alpha, beta, steps, LANES)
            tl.debug_barrier()  # alpha and beta have been written
            v = tl.where(again, first_scaling(b), v)
            u = tl.where(again, scaling_of(a, _over_columns(K * v, LANES)), _read(waiting, a > 0, 0.0, LANES))
        iteration += 1
        going = iteration < max_iter
        if ((iteration % check_every == 0) & (tol >= 0)) | ~going:
            off = _over_columns(tl.abs(v * tl.sum(K * u, 1, keep_dims=True) - b), LANES)
            error = tl.where(running, off, error)
            ran = tl.where(running, iteration, ran)
            running &= ~(error <= tol)
            going &= tl.max(tl.where(running, 1, 0)) != 0

    K *= v * u
    spent = tl.zeros((1, BLOCK, 32), tl.float64)
    for step in range(steps):
        M = _slice(space, (a > 0) & (_at(b, step) > 0), step, LANES)
        T = _at(K, step)
        spent += tl.where(T > 0, T * M, 0.0)
        at = step * LANES + k
        tl.store(plan + (of_row * n * m + (row * m + at)), tl.reshape(T, row.shape), mask=in_rows & (at < m))
    spent = -epsilon * _over_lanes(tl.sum(spent, 1, keep_dims=True), LANES, False)
    first = (problem < batch) & (lane == 0)
    tl.store(transport_cost + problem, tl.reshape(spent, (32,)).to(dtype), mask=first)
    tl.store(marginal_error + problem, tl.reshape(error, (32,)), mask=first)
    tl.store(n_iter + problem, tl.reshape(ran, (32,)), mask=first)
    phi = tl.where(a > 0, epsilon * (_read(alpha, a > 0, 0.0, LANES) + tl.log(u.to(tl.float64)) - log_of(a)), float("-inf")).to(dtype)
    tl.store(f + (of_row * n + row), tl.reshape(phi, row.shape), mask=in_rows & (k == 0))
    gamma = tl.where(b > 0, epsilon * (_read(beta, b > 0, 0.0, LANES) + tl.log(v.to(tl.float64)) - log_of(b)), float("-inf")).to(dtype)
    tl.store(g + (of_column * m + column), tl.reshape(gamma, column.shape), mask=in_columns)


def launch(
    cost: Tensor,  # [B, n, m], any strides
    a: Tensor,  # [B, n], any strides
    b: Tensor,  # [B, m], any strides
    outputs: tuple[Tensor, ...],  # plan, f, g, transport_cost, marginal_error, n_iter
    BLOCK: int,  # as block() says
    max_iter: int,
    check_every: int,
    numbers: tuple[float, float, float],  # epsilon, -1 / epsilon, tol
) -> None:
    """Fills the outputs, on the current device."""
    batch, n, m = cost.shape
    LANES = TILES[cost.dtype][BLOCK]
    _sinkhorn_packed_kernel[(triton.cdiv(batch, 32 // LANES),)](
        cost.contiguous(),
        a,
        b,
        *outputs,
        cost.new_empty(batch, n + m, dtype=torch.float64),
        *a.stride(),
        *b.stride(),
        batch,
        n,
        m,
        max_iter,
        check_every,
        *numbers,
        BLOCK=BLOCK,
        LANES=LANES,
        **COMPILER_OPTIONS,
    )


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for."""
    names = _sinkhorn_packed_kernel.arg_names
    tensors = names[: names.index("a_stride_b")]
    return [
        Variant(
            f"{str(dtype).removeprefix('torch.')} {BLOCK}",
            _sinkhorn_packed_kernel,
            dict.fromkeys(tensors, dtype) | {"n_iter": torch.int32, "absorbed": torch.float64},
            {"BLOCK": BLOCK, "LANES": LANES, "a_stride_n": 1, "b_stride_m": 1},
            COMPILER_OPTIONS,
        )
        for dtype, tiles in TILES.items()
        for BLOCK, LANES in tiles.items()
    ]
