"""Sinkhorn forward in Triton for problems of any size: the log-domain iteration of sinkhorn.py, one program per problem, cost by tiles.

    gamma_j = -kappa_b logsumexp_i(log a_i + phi_i + M_ij), then phi_i likewise over j; from phi = 0; M = -cost / epsilon.

Grid: x = problem (B may exceed 65535). Traffic: an iteration reads cost twice, a check or the end reads it twice and writes plan, whose
column sums are then read back. f and g hold phi and gamma until the end: barriers part the program's writes from its reads.
Invariants: rows and columns of zero mass are -inf in log a, log b, phi and gamma, whatever stands in their cost, and so is padding where
it is read. A maximum of -inf is replaced by 0, and where -inf meets -inf all the same, the entry has no mass and its value is replaced.
Offsets into tensors are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .variant import Variant

TILES = {torch.float32: (32, 128), torch.float64: (32, 64)}  # ROWS, COLUMNS


def compiler_options() -> dict[str, int | bool]:
    # fp fusion is named because its default differs between versions of Triton
    return {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}


@triton.jit
def _tile(problem, i, j):
    """M at rows i [ROWS, 1] and columns j [1, COLUMNS], 0 outside; -1 / epsilon comes as a sum of two, so that M is rounded once or so."""
    cost, stride_n, stride_m, n, m, scale, rest = problem
    C = tl.load(cost + (i.to(tl.int64) * stride_n + j.to(tl.int64) * stride_m), mask=(i < n) & (j < m), other=0.0)
    return C * scale + C * rest


@triton.jit
def _add(top, total, x):
    """(top, total) of a running sum of exponentials, total exp(top), and of x [OUT, IN] along its second axis."""
    new = tl.maximum(top, tl.max(x, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(top - safe) + tl.sum(tl.exp(x - safe[:, None]), 1)


@triton.jit
def _with_mass(potential, log_mass, index, count):
    """potential + log_mass; -inf outside."""
    return tl.load(potential + index, mask=index < count, other=0.0) + tl.load(log_mass + index, mask=index < count, other=float("-inf"))


@triton.jit
def _logsumexp(problem, potential, log_mass, o, OVER_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(top, total) over all rows, at columns o; or over all columns, at rows o."""
    count = problem[3] if OVER_ROWS else problem[4]
    top = tl.full(o.shape, float("-inf"), problem[5].dtype)
    total = tl.zeros_like(top)
    for s0 in range(0, count, ROWS if OVER_ROWS else COLUMNS):
        s = s0 + tl.arange(0, ROWS if OVER_ROWS else COLUMNS)
        terms = _with_mass(potential, log_mass, s, count)[None, :]
        M = tl.trans(_tile(problem, s[:, None], o[None, :])) if OVER_ROWS else _tile(problem, o[:, None], s[None, :])
        top, total = _add(top, total, tl.where(terms > float("-inf"), terms + M, float("-inf")))
    return tl.where(top == float("-inf"), 0.0, top), total


@triton.jit
def _transform(problem, potential, log_mass, out, log_out, kappa, past, OVER_ROWS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The potential of columns from that of rows, or of rows from that of columns; past = (pointer, 1 or 0: whether there
    too)."""
    count = problem[4] if OVER_ROWS else problem[3]
    for o0 in range(0, count, COLUMNS if OVER_ROWS else ROWS):
        o = o0 + tl.arange(0, COLUMNS if OVER_ROWS else ROWS)
        top, total = _logsumexp(problem, potential, log_mass, o, OVER_ROWS, ROWS, COLUMNS)
        mass = tl.load(log_out + o, mask=o < count, other=float("-inf"))
        result = tl.where(mass > float("-inf"), -kappa * (top + tl.log(total)), float("-inf"))
        tl.store(out + o, result, mask=o < count)
        tl.store(past[0] + o, result, mask=o < count * past[1])
    tl.debug_barrier()


@triton.jit
def _write_plan(problem, phi, log_a, gamma, log_b, slope_a, plan, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """<plan, M>. Each row's marginal is shared out in proportion to exp(log b + gamma + M): the rounding of phi, which grows as epsilon
    shrinks, does not enter."""
    n, m = problem[3], problem[4]
    spent = tl.zeros((), problem[5].dtype)
    for i0 in range(0, n, ROWS):
        i = i0 + tl.arange(0, ROWS)
        top, total = _logsumexp(problem, gamma, log_b, i, False, ROWS, COLUMNS)
        mass = tl.load(log_a + i, mask=i < n, other=float("-inf"))
        share = mass - slope_a * tl.load(phi + i, mask=i < n, other=0.0) - tl.log(total)
        share = tl.where((mass > float("-inf")) & (total > 0), share, float("-inf"))
        for j0 in range(0, m, COLUMNS):
            j = j0 + tl.arange(0, COLUMNS)
            M = _tile(problem, i[:, None], j[None, :])
            terms = _with_mass(gamma, log_b, j, m)[None, :]
            held = (share[:, None] > float("-inf")) & (terms > float("-inf"))
            T = tl.where(held, tl.exp(terms + M - top[:, None] + share[:, None]), 0.0)
            spent += tl.sum(tl.where(T > 0, M * T, 0.0))
            tl.store(plan + (i[:, None].to(tl.int64) * m + j[None, :]), T, mask=(i[:, None] < n) & (j[None, :] < m))
    tl.debug_barrier()
    return spent


@triton.jit
def _marginal_error(plan, gamma, log_b, slope_b, n, m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """L1 distance of the column marginal from b exp(-slope_b gamma), which is b if balanced."""
    dtype: tl.constexpr = plan.dtype.element_ty
    error = tl.zeros((), dtype)
    for j0 in range(0, m, COLUMNS):
        j = j0 + tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS,), dtype)
        for i0 in range(0, n, ROWS):
            i = (i0 + tl.arange(0, ROWS))[:, None]
            total += tl.sum(tl.load(plan + (i.to(tl.int64) * m + j[None, :]), mask=(i < n) & (j[None, :] < m), other=0.0), 0)
        mass = tl.load(log_b + j, mask=j < m, other=float("-inf"))
        target = tl.exp(mass - slope_b * tl.load(gamma + j, mask=j < m, other=0.0))
        error += tl.sum(tl.abs(total - tl.where(mass > float("-inf"), target, 0.0)))
    return error


@triton.jit
def _scale(potential, count, epsilon, BLOCK: tl.constexpr):
    for o0 in range(0, count, BLOCK):
        o = o0 + tl.arange(0, BLOCK)
        values = epsilon * tl.load(potential + o, mask=o < count)
        tl.debug_barrier()  # threads may hold an entry in common
        tl.store(potential + o, values, mask=o < count)


@triton.jit(do_not_specialize=["cost_stride_b", "cost_stride_n", "n", "m", "max_iter", "check_every", "kept"])
def _sinkhorn_stream_kernel(
    cost,  # [B, n, m], any strides
    log_a,  # [B, n]
    log_b,  # [B, m]
    plan,  # [B, n, m]
    f,  # [B, n]
    g,  # [B, m]
    transport_cost,  # [B]
    marginal_error,  # [B]
    n_iter,  # [B], int32
    history,  # [B, kept, n + m] of (phi, gamma)
    cost_stride_b,
    cost_stride_n,
    cost_stride_m,
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = cost.dtype.element_ty
    scale = tl.full((), minus_inverse_epsilon, tl.float64)
    epsilon = tl.full((), epsilon, dtype)
    tol = tl.full((), tol, dtype)
    kappa_a = tl.full((), kappa_a, dtype)
    kappa_b = tl.full((), kappa_b, dtype)
    slope_a = tl.full((), slope_a, dtype)
    slope_b = tl.full((), slope_b, dtype)
    rest = (scale - scale.to(dtype).to(tl.float64)).to(dtype)

    index = tl.program_id(0).to(tl.int64)
    problem = (cost + index * cost_stride_b, cost_stride_n, cost_stride_m, n, m, scale.to(dtype), rest)
    log_a += index * n
    log_b += index * m
    phi = f + index * n
    gamma = g + index * m
    plan += index * n * m
    keeps = tl.minimum(kept, 1)

    for i0 in range(0, n, ROWS):
        i = i0 + tl.arange(0, ROWS)
        mass = tl.load(log_a + i, mask=i < n, other=float("-inf"))
        tl.store(phi + i, tl.where(mass > float("-inf"), 0.0, float("-inf")), mask=i < n)
    tl.debug_barrier()
    iteration = 0
    running = max_iter > 0
    while running:
        past = history + (index * kept + iteration) * (n + m)
        _transform(problem, phi, log_a, gamma, log_b, kappa_b, (past + n, keeps), True, ROWS, COLUMNS)
        _transform(problem, gamma, log_b, phi, log_a, kappa_a, (past, keeps), False, ROWS, COLUMNS)
        iteration += 1
        running = iteration < max_iter
        if running & (tol >= 0) & (iteration % check_every == 0):
            _write_plan(problem, phi, log_a, gamma, log_b, slope_a, plan, ROWS, COLUMNS)
            running = ~(_marginal_error(plan, gamma, log_b, slope_b, n, m, ROWS, COLUMNS) <= tol)
            tl.debug_barrier()

    spent = _write_plan(problem, phi, log_a, gamma, log_b, slope_a, plan, ROWS, COLUMNS)
    tl.store(transport_cost + index, -epsilon * spent)
    tl.store(marginal_error + index, _marginal_error(plan, gamma, log_b, slope_b, n, m, ROWS, COLUMNS))
    tl.store(n_iter + index, iteration)
    tl.debug_barrier()
    _scale(phi, n, epsilon, ROWS)
    _scale(gamma, m, epsilon, COLUMNS)


def launch(cost: Tensor, a: Tensor, b: Tensor, outputs: tuple[Tensor, ...], counts: tuple[int, ...], numbers: tuple[float, ...]) -> None:
    """Arguments as the register kernel's in sinkhorn.py. Scratch: the logarithms of a and b."""
    ROWS, COLUMNS = TILES[cost.dtype]
    _sinkhorn_stream_kernel[(cost.shape[0],)](
        cost,
        a.log().contiguous(),
        b.log().contiguous(),
        *outputs,
        *cost.stride(),
        *counts,
        *numbers,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        **compiler_options(),
    )


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for, of contiguous tensors."""
    names = _sinkhorn_stream_kernel.arg_names
    tensors = names[: names.index("cost_stride_b")]
    return [
        Variant(
            str(dtype).removeprefix("torch."),
            _sinkhorn_stream_kernel,
            dict.fromkeys(tensors, dtype) | {"n_iter": torch.int32},
            {"ROWS": ROWS, "COLUMNS": COLUMNS, "cost_stride_m": 1},
            compiler_options(),
        )
        for dtype, (ROWS, COLUMNS) in TILES.items()
    ]
