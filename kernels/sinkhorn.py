"""Sinkhorn forward in Triton: the log-domain iteration, one program per problem, the whole problem in registers.

Problems too large for that are passed on to sinkhorn_stream.py.

    gamma_j = -kappa_b logsumexp_i(log a_i + phi_i + M_ij), then phi_i likewise over j; from phi = 0; M = -cost / epsilon.

Grid: x = problem (B may exceed 65535). Columns are folded: with K = BLOCK_M / FOLD, column j = c K + k of row i stands at [c, i, k]
of a [FOLD, BLOCK_N, K] tile. It is read and written as [FOLD BLOCK_N, K], of which lanes and warps fill consecutive rows: a thread
then holds FOLD columns of a few rows rather than one column of many, which takes a quarter of the registers for potentials and of
the shuffles. The order of the axes would follow that of cost in memory, so the rows of cost must be contiguous.
Traffic: cost, a and b are read once and each output is written once; shared memory holds partial reductions.
Invariants: padding, and rows and columns of zero mass, are -inf in M, log a, log b, phi and gamma, whatever stands in their cost.
A maximum of -inf is replaced by 0, and where -inf meets -inf all the same, the entry has no mass and its value is replaced.
Offsets into tensors are 64-bit.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sinkhorn_stream
from .device import device_guard
from .variant import Variant

FOLD = tl.constexpr(4)
SMALLEST_BLOCK = 16
LARGEST_BLOCK = 128
LARGEST_TILE = {torch.float32: 64 * 128, torch.float64: 64 * 64}  # a larger one spills registers to memory


def fits(n: int, m: int, dtype: torch.dtype) -> bool:
    """Whether the registers hold an n x m problem."""
    BLOCK_N, BLOCK_M = blocks(n, m)
    return max(BLOCK_N, BLOCK_M) <= LARGEST_BLOCK and BLOCK_N * BLOCK_M <= LARGEST_TILE[dtype]


def blocks(n: int, m: int) -> tuple[int, int]:
    """(BLOCK_N, BLOCK_M), the tile that holds an n x m problem."""
    return max(SMALLEST_BLOCK, triton.next_power_of_2(n)), max(SMALLEST_BLOCK, triton.next_power_of_2(m))


def compiler_options(BLOCK_N: int, BLOCK_M: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Warps, so that a thread holds 16 float32 or 8 float64 entries of the tile (16 of the largest), and the registers they may use.

    Without a bound of its own, ptxas spills a little in float64, and in float32 leaves no room for a second block.
    """
    num_warps = max(BLOCK_N * BLOCK_M // 512, 1)
    if dtype == torch.float64:
        num_warps = min(2 * num_warps, 8)
    # fp fusion is named because its default differs between versions of Triton
    return {"num_warps": num_warps, "maxnreg": 255 if dtype == torch.float64 else 128, "enable_fp_fusion": True}


@triton.jit
def _logsumexp(log_terms, over_rows: tl.constexpr):
    """(top, log of the sum of exp(log_terms - top)) over the rows, or over the columns, of a tile [FOLD, BLOCK_N, K]."""
    if over_rows:
        top = tl.max(log_terms, 1, keep_dims=True)
    else:
        top = tl.max(tl.max(log_terms, 0, keep_dims=True), 2, keep_dims=True)
    top = tl.where(top == float("-inf"), 0.0, top)
    terms = tl.exp(log_terms - top)
    if over_rows:
        total = tl.sum(terms, 1, keep_dims=True)
    else:
        total = tl.sum(tl.sum(terms, 0, keep_dims=True), 2, keep_dims=True)
    return top, tl.log(total)


@triton.jit
def _plan(M, log_column, log_row_marginal):
    """Each row's marginal, shared out in proportion to exp(log_column + M): the rounding of phi, which grows as epsilon shrinks,
    does not enter."""
    top, log_total = _logsumexp(log_column + M, False)
    share = tl.where(log_total > float("-inf"), log_row_marginal - log_total, float("-inf"))
    return tl.exp(log_column + M - top + share)


@triton.jit
def _marginal_error(plan, log_b, gamma, slope_b):
    """L1 distance of the column marginal from b exp(-slope_b gamma), which is b if balanced."""
    target = tl.where(log_b > float("-inf"), tl.exp(log_b - slope_b * gamma), 0.0)
    return tl.sum(tl.abs(tl.sum(plan, 1, keep_dims=True) - target))


@triton.jit(do_not_specialize=["n", "m", "max_iter", "check_every", "kept"])
def _sinkhorn_fwd_kernel(
    cost,  # [B, n, m], contiguous along m
    a,  # [B, n], any strides
    b,  # [B, m], any strides
    plan,  # [B, n, m]
    f,  # [B, n]
    g,  # [B, m]
    transport_cost,  # [B]
    marginal_error,  # [B]
    n_iter,  # [B], int32
    history,  # [B, kept, n + m] of (phi, gamma)
    cost_stride_b,
    cost_stride_n,
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
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    dtype: tl.constexpr = cost.dtype.element_ty
    K: tl.constexpr = BLOCK_M // FOLD
    epsilon = tl.full((), epsilon, dtype)
    tol = tl.full((), tol, dtype)
    kappa_a = tl.full((), kappa_a, dtype)
    kappa_b = tl.full((), kappa_b, dtype)
    slope_a = tl.full((), slope_a, dtype)
    slope_b = tl.full((), slope_b, dtype)

    problem = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)[None, :, None]  # [1, BLOCK_N, 1]
    j = tl.arange(0, FOLD)[:, None, None] * K + tl.arange(0, K)[None, None, :]  # [FOLD, 1, K]
    mass_a = tl.load(a + problem * a_stride_b + i.to(tl.int64) * a_stride_n, mask=i < n, other=0.0)
    mass_b = tl.load(b + problem * b_stride_b + j.to(tl.int64) * b_stride_m, mask=j < m, other=0.0)
    log_a = tl.where(mass_a > 0, tl.log(mass_a), float("-inf"))
    log_b = tl.where(mass_b > 0, tl.log(mass_b), float("-inf"))
    folded = tl.arange(0, FOLD * BLOCK_N)[:, None]
    row, column = folded % BLOCK_N, folded // BLOCK_N * K + tl.arange(0, K)[None, :]  # [FOLD BLOCK_N, 1], [FOLD BLOCK_N, K]
    in_tile = (row < n) & (column < m)
    C = tl.load(cost + problem * cost_stride_b + (row.to(tl.int64) * cost_stride_n + column), mask=in_tile, other=0.0)
    M = tl.reshape((C.to(tl.float64) * minus_inverse_epsilon).to(dtype), (FOLD, BLOCK_N, K))
    M = tl.where((mass_a > 0) & (mass_b > 0), M, float("-inf"))

    phi = tl.where(mass_a > 0, tl.zeros_like(mass_a), float("-inf"))
    gamma = tl.where(mass_b > 0, tl.zeros_like(mass_b), float("-inf"))
    iteration = 0
    running = max_iter > 0
    while running:
        top, log_total = _logsumexp(log_a + phi + M, True)
        gamma = tl.where(log_b > float("-inf"), -kappa_b * (top + log_total), float("-inf"))
        top, log_total = _logsumexp(log_b + gamma + M, False)
        phi = tl.where(log_a > float("-inf"), -kappa_a * (top + log_total), float("-inf"))
        if kept > 0:
            past = history + (problem * kept + iteration) * (n + m)
            tl.store(past + i, phi, mask=i < n)
            tl.store(past + n + j, gamma, mask=j < m)
        iteration += 1
        running = iteration < max_iter
        if running & (tol >= 0) & (iteration % check_every == 0):
            T = _plan(M, log_b + gamma, log_a - slope_a * phi)
            running = ~(_marginal_error(T, log_b, gamma, slope_b) <= tol)

    T = _plan(M, log_b + gamma, log_a - slope_a * phi)
    tl.store(plan + problem * n * m + (row * m + column), tl.reshape(T, (FOLD * BLOCK_N, K)), mask=in_tile)
    tl.store(f + problem * n + i, epsilon * phi, mask=i < n)
    tl.store(g + problem * m + j, epsilon * gamma, mask=j < m)
    tl.store(transport_cost + problem, tl.sum(tl.where(T > 0, -epsilon * M * T, 0.0)))
    tl.store(marginal_error + problem, _marginal_error(T, log_b, gamma, slope_b))
    tl.store(n_iter + problem, iteration)


def sinkhorn_fwd(
    cost: Tensor,  # [B, n, m], any strides
    a: Tensor,  # [B, n], any strides
    b: Tensor,  # [B, m], any strides
    epsilon: float,
    max_iter: int,
    tol: float | None,
    check_every: int,
    tau_a: float | None,
    tau_b: float | None,
    keep_history: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(plan, f, g, transport_cost, marginal_error, n_iter, history), as the reference; history is 0 past n_iter."""
    batch, n, m = cost.shape
    plan, f, g = cost.new_empty(batch, n, m), cost.new_empty(batch, n), cost.new_empty(batch, m)
    transport_cost, marginal_error = cost.new_empty(batch), cost.new_empty(batch)
    n_iter = cost.new_empty(batch, dtype=torch.int32)
    kept = max_iter if keep_history else 0
    history = cost.new_zeros(batch, kept, n + m)
    outputs = plan, f, g, transport_cost, marginal_error, n_iter, history
    if batch == 0:
        return outputs
    counts = n, m, max_iter, check_every, kept
    kappas = (1.0 if tau is None else tau / (tau + epsilon) for tau in (tau_a, tau_b))
    slopes = (0.0 if tau is None else epsilon / tau for tau in (tau_a, tau_b))
    numbers = epsilon, -1.0 / epsilon, -1.0 if tol is None else tol, *kappas, *slopes
    with device_guard(cost):
        if not fits(n, m, cost.dtype):
            sinkhorn_stream.launch(cost, a, b, outputs, counts, numbers)
            return outputs
        cost = cost if cost.stride(2) == 1 else cost.contiguous()
        BLOCK_N, BLOCK_M = blocks(n, m)
        _sinkhorn_fwd_kernel[(batch,)](
            cost,
            a,
            b,
            *outputs,
            *cost.stride()[:2],
            *a.stride(),
            *b.stride(),
            *counts,
            *numbers,
            BLOCK_N=BLOCK_N,
            BLOCK_M=BLOCK_M,
            **compiler_options(BLOCK_N, BLOCK_M, cost.dtype),
        )
    return outputs


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for."""
    names = _sinkhorn_fwd_kernel.arg_names
    outputs = names[: names.index("cost_stride_b")]
    found = []
    for dtype, BLOCK_N, BLOCK_M in itertools.product(LARGEST_TILE, *[[16, 32, 64, 128]] * 2):
        if BLOCK_N * BLOCK_M <= LARGEST_TILE[dtype]:
            found.append(
                Variant(
                    f"{str(dtype).removeprefix('torch.')} {BLOCK_N} x {BLOCK_M}",
                    _sinkhorn_fwd_kernel,
                    dict.fromkeys(outputs, dtype) | {"n_iter": torch.int32},
                    {"BLOCK_N": BLOCK_N, "BLOCK_M": BLOCK_M, "a_stride_n": 1, "b_stride_m": 1},
                    compiler_options(BLOCK_N, BLOCK_M, dtype),
                )
            )
    return found
