"""Sinkhorn forward in Triton for large problems: the passes of sinkhorn_rows.py with several programs per problem, an iteration a launch.

Each program has a stripe of rows. In a launch it adds up the column sums that all programs of its problem left in the last one, makes gamma
of them as sinkhorn_rows.py does, and from that its rows' phi and their part of the plan's column sums. What a launch reads and what it
writes are two buffers that change places, the iteration after which a problem met its tolerance among them: its others are then left
alone.

Grid: x = problem, then stripe. There are PARTS stripes to a problem whatever the batch, so that a result does not depend on its
batch-mates. Traffic: cost is read once an iteration and once at the end; each program reads PARTS rows of column sums.
Invariants: as sinkhorn_rows.py. Programs of a problem decide alike, from the same numbers added up in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sinkhorn_rows import LN_2, TILES, _error, _next, _rows, _space, _stripe, _with_mass, compiler_options
from .variant import Variant

BLOCK, DTYPE, PARTS = 1024, torch.float32, 8
LEAST = 2**19  # entries of a problem that is worth several programs


def serves(n: int, m: int, dtype: torch.dtype) -> bool:
    return dtype == DTYPE and 256 < m <= BLOCK and n * m >= LEAST


@triton.jit
def _problem(
    cost,
    a,
    b,
    strides,
    n,
    m,
    minus_inverse_epsilon,
    kappa_a,
    kappa_b,
    slope_a,
    slope_b,
    tol,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(problem, first and last row of the stripe, space as _stripe takes it, columns j, their mass, numbers in the costs' dtype)."""
    dtype: tl.constexpr = cost.dtype.element_ty
    cost_stride_b, cost_stride_n, cost_stride_m, a_stride_b, a_stride_n, b_stride_b, b_stride_m = strides
    problem = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    a += problem * a_stride_b
    space = _space(cost + problem * cost_stride_b, cost_stride_n, cost_stride_m, a, a_stride_n, n, m, minus_inverse_epsilon)
    j = tl.arange(0, COLUMNS // LANES)[:, None, None] * LANES + tl.arange(0, LANES)[None, None, :]
    b = tl.load(b + problem * b_stride_b + j.to(tl.int64) * b_stride_m, mask=j < m, other=0.0)
    size = tl.cdiv(n, PARTS)
    numbers = (
        tl.full((), kappa_a, dtype),
        tl.full((), kappa_b, dtype),
        tl.full((), slope_a, dtype),
        tl.full((), slope_b, dtype),
        tl.full((), tol, dtype),
    )
    return problem, part, part * size, tl.minimum(part * size + size, n), space, j, b, numbers


@triton.jit
def _stripe_of(space, start, stop, b, j, ROWS: tl.constexpr):
    """As _stripe, of this program's rows alone."""
    cost, stride_n, stride_m, a, a_stride, n, m, scale, rest = space
    return _stripe((cost, stride_n, stride_m, a, a_stride, stop, m, scale, rest), start, b, j, ROWS)


@triton.jit
def _column_sums(sums, problem, j, m, PARTS: tl.constexpr):
    """Of all programs of a problem."""
    total = tl.zeros(j.shape, sums.dtype.element_ty)
    for part in range(PARTS):
        total += tl.load(sums + (problem * PARTS + part) * m + j, mask=j < m, other=0.0)
    return total


@triton.jit(do_not_specialize=["cost_stride_b", "cost_stride_n", "n", "m", "iteration", "check_every", "kept"])
def _sinkhorn_stripes_kernel(
    cost,  # [B, n, m], any strides
    a,  # [B, n], any strides
    b,  # [B, m], any strides
    stopped,  # [B], int32, as of the last launch: 0 where the problem has not met its tolerance
    phi,  # [B, n]
    gamma,  # [B, m]
    sums,  # [B, PARTS, m], 0 before the first
    new_stopped,
    new_phi,
    new_gamma,
    new_sums,
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
    iteration,  # from 1
    check_every,
    kept,
    # A plain float would arrive as float32.
    minus_inverse_epsilon: tl.float64,
    tol: tl.float64,  # below 0: never stop early
    kappa_a: tl.float64,
    kappa_b: tl.float64,
    slope_a: tl.float64,
    slope_b: tl.float64,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    dtype: tl.constexpr = cost.dtype.element_ty
    strides = cost_stride_b, cost_stride_n, cost_stride_m, a_stride_b, a_stride_n, b_stride_b, b_stride_m
    problem, part, first, stop, space, j, b, numbers = _problem(
        cost, a, b, strides, n, m, minus_inverse_epsilon, kappa_a, kappa_b, slope_a, slope_b, tol, COLUMNS, LANES, PARTS
    )
    kappa_a, kappa_b, slope_a, slope_b, tol = numbers
    after = tl.load(stopped + problem)
    running = after == 0
    if running:
        total = _column_sums(sums, problem, j, m, PARTS)
        potential = tl.load(gamma + problem * m + j, mask=j < m, other=0.0)
        if (tol >= 0) & (iteration > 1) & ((iteration - 1) % check_every == 0):
            running = ~(_error(total, b, potential, slope_b) <= tol)
            after = tl.where(running, 0, iteration - 1)
        if running:
            potential = _next(space, phi + problem * n, potential, total, b, j, kappa_b, ROWS)
            beta = _with_mass(b, potential)
            past = history + (problem * kept + iteration - 1) * (n + m)
            if part == 0:
                tl.store(new_gamma + problem * m + j, potential, mask=j < m)
                if kept > 0:
                    tl.store(past + n + j, potential * LN_2, mask=j < m)
            moved = tl.zeros((COLUMNS // LANES, ROWS, LANES), dtype)
            for start in range(first, stop, ROWS):
                i, mass, M, _ = _stripe_of(space, start, stop, b, j, ROWS)
                row_potential, T = _rows(M, mass, beta, kappa_a, slope_a)
                moved += T
                tl.store(new_phi + problem * n + i, row_potential, mask=i < stop)
                if kept > 0:
                    tl.store(past + i, row_potential * LN_2, mask=i < stop)
            tl.store(new_sums + (problem * PARTS + part) * m + j, tl.sum(moved, 1, keep_dims=True), mask=j < m)
    if part == 0:
        tl.store(new_stopped + problem, after)


@triton.jit(do_not_specialize=["cost_stride_b", "cost_stride_n", "n", "m", "max_iter"])
def _sinkhorn_stripes_end_kernel(
    cost,  # [B, n, m], any strides
    a,  # [B, n], any strides
    b,  # [B, m], any strides
    stopped,  # [B], int32, as of the last launch
    phi,  # [2, B, n]: after iterations of even and of odd number
    gamma,  # [2, B, m]
    sums,  # [2, B, PARTS, m]
    plan,  # [B, n, m]
    f,  # [B, n]
    g,  # [B, m]
    spent,  # [B, PARTS]
    marginal_error,  # [B]
    n_iter,  # [B], int32
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
    epsilon: tl.float64,
    minus_inverse_epsilon: tl.float64,
    kappa_a: tl.float64,
    kappa_b: tl.float64,
    slope_a: tl.float64,
    slope_b: tl.float64,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
):
    dtype: tl.constexpr = cost.dtype.element_ty
    strides = cost_stride_b, cost_stride_n, cost_stride_m, a_stride_b, a_stride_n, b_stride_b, b_stride_m
    problem, part, first, stop, space, j, b, numbers = _problem(
        cost, a, b, strides, n, m, minus_inverse_epsilon, kappa_a, kappa_b, slope_a, slope_b, 0.0, COLUMNS, LANES, PARTS
    )
    kappa_a, kappa_b, slope_a, slope_b, _ = numbers
    unit = (tl.full((), epsilon, tl.float64) * LN_2).to(dtype)
    batch = tl.num_programs(0) // PARTS
    iterations = tl.load(stopped + problem)
    iterations = tl.where(iterations > 0, iterations, max_iter)
    at = (iterations % 2) * batch + problem
    potential = tl.load(gamma + at * m + j, mask=j < m, other=0.0)
    beta = _with_mass(b, potential)
    moved = tl.zeros((COLUMNS // LANES, ROWS, LANES), dtype)
    for start in range(first, stop, ROWS):
        i, mass, M, C = _stripe_of(space, start, stop, b, j, ROWS)
        row_potential, T = _rows(M, mass, beta, kappa_a, slope_a)
        moved += tl.where(T > 0, T * C, 0.0)
        tl.store(plan + problem * n * m + (i.to(tl.int64) * m + j), T, mask=(i < stop) & (j < m))
        tl.store(f + problem * n + i, unit * row_potential, mask=i < stop)
    tl.store(spent + problem * PARTS + part, tl.sum(tl.sum(tl.sum(moved, 0), 1), 0))
    if part == 0:
        tl.store(g + problem * m + j, unit * potential, mask=j < m)
        tl.store(marginal_error + problem, _error(_column_sums(sums, at, j, m, PARTS), b, potential, slope_b))
        tl.store(n_iter + problem, iterations)


def _constants() -> dict[str, int]:
    ROWS, LANES, *_ = TILES[DTYPE][BLOCK]
    return {"COLUMNS": BLOCK, "ROWS": ROWS, "LANES": LANES, "PARTS": PARTS}


def launch(cost: Tensor, a: Tensor, b: Tensor, outputs: tuple[Tensor, ...], counts: tuple[int, ...], numbers: tuple[float, ...]) -> None:
    """Arguments as the register kernel's in sinkhorn.py."""
    plan, f, g, transport_cost, marginal_error, n_iter, history = outputs
    n, m, max_iter, check_every, kept = counts
    epsilon, minus_inverse_epsilon, tol, *rest = numbers
    batch, parts = cost.shape[0], PARTS
    stopped = n_iter.new_zeros(2, batch)
    phi, gamma = cost.new_zeros(2, batch, n), cost.new_zeros(2, batch, m)
    sums, spent = cost.new_zeros(2, batch, parts, m), cost.new_empty(batch, parts)
    strides = *cost.stride(), *a.stride(), *b.stride()
    options = {**_constants(), **compiler_options(BLOCK, DTYPE)}
    for iteration in range(1, max_iter + 1):
        old, new = (iteration - 1) % 2, iteration % 2
        buffers = [buffer[side] for side in (old, new) for buffer in (stopped, phi, gamma, sums)]
        _sinkhorn_stripes_kernel[(batch * parts,)](
            *(cost, a, b, *buffers, history, *strides, n, m, iteration, check_every, kept, minus_inverse_epsilon, tol, *rest),
            **options,
        )
    _sinkhorn_stripes_end_kernel[(batch * parts,)](
        *(cost, a, b, stopped[max_iter % 2], phi, gamma, sums, plan, f, g, spent, marginal_error, n_iter, *strides, n, m, max_iter),
        *(epsilon, minus_inverse_epsilon, *rest),
        **options,
    )
    torch.sum(spent, 1, out=transport_cost)


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for, of contiguous tensors."""
    found = []
    for kernel in (_sinkhorn_stripes_kernel, _sinkhorn_stripes_end_kernel):
        names = kernel.arg_names
        tensors = dict.fromkeys(names[: names.index("cost_stride_b")], DTYPE)
        tensors |= dict.fromkeys(tensors.keys() & {"stopped", "new_stopped", "n_iter"}, torch.int32)
        constants = {**_constants(), "cost_stride_m": 1, "a_stride_n": 1, "b_stride_m": 1}
        found.append(Variant(f"{kernel.__name__.strip('_')} float32 1024", kernel, tensors, constants, compiler_options(BLOCK, DTYPE)))
    return found
