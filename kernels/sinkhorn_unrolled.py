"""Sinkhorn's gradient through the iterations that ran in Triton, one program per problem, the whole problem in registers.

In scaled potentials phi = f / epsilon and gamma = g / epsilon, with M = -cost / epsilon, an iteration is
    gamma_j = -kappa_b log sum_i a_i exp(phi_i + M_ij),    phi_i = -kappa_a log sum_j b_j exp(gamma_j + M_ij);
its derivative is -kappa times a stochastic matrix: P_ij proportional to b_j exp(gamma_j + M_ij), of row sum 1, for the second, and
likewise Q_ij, of column sum 1, for the first. Walking back through the stored potentials, the adjoints pass through each of them,
    gamma_bar -= kappa_a P' phi_bar,    phi_bar = -kappa_b Q gamma_bar,
and every step adds -kappa phi_bar_i P_ij, or -kappa gamma_bar_j Q_ij, to the gradient of M.
P and Q of every iteration are K_ij = exp(A_i + B_j + M_ij), its columns or rows scaled by the exponential of what their potentials have
moved since K was made, then normalised: no exponentials of the tile, until a potential has moved by more than RANGE and K is made anew.

Grid: x = problem (B may exceed 65535). The tile is folded as in sinkhorn.py. Traffic: plan, cost and the incoming gradient are read
once, and cost again where K is made anew; the history is read once or twice, d_cost written once. All in double: the constant part of
an adjoint never decays, and rounding would add up over the iterations.
Invariants: rows and columns of zero mass, and padding, are 0 in K, whatever stands in their cost; their potentials count as 0. At A and
B as they are made, the rows of K have sum 1, or its columns, up to the rounding of the history. Offsets are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import device_guard
from .variant import Variant

FOLD = tl.constexpr(4)  # columns of a tile are folded as in sinkhorn.py
RANGE = tl.constexpr(200.0)  # K underflows at -708: what is lost, not even twice this can bring back
TILES = ((32, 32),)  # BLOCK_N, BLOCK_M; a larger one spills registers to memory


def tile_for(n: int, m: int) -> tuple[int, int] | None:
    """The smallest that holds an n x m problem, or None."""
    return next((tile for tile in TILES if n <= tile[0] and m <= tile[1]), None)


def compiler_options(BLOCK_N: int, BLOCK_M: int) -> dict[str, int | bool]:
    """Warps, so that a thread holds 4 entries of the tile."""
    # fp fusion is named because its default differs between versions of Triton
    return {"num_warps": BLOCK_N * BLOCK_M // 128, "num_stages": 1, "maxnreg": 255, "enable_fp_fusion": True}


@triton.jit
def _over_rows(x):
    return tl.sum(x, 1, keep_dims=True)


@triton.jit
def _over_columns(x):
    return tl.sum(tl.sum(x, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _matrix(matrix, problem, index):
    """Of matrix = (pointer, its strides), in double; index = (row, column, inside)."""
    pointer, stride_b, stride_n, stride_m = matrix
    row, column, inside = index
    at = pointer + problem * stride_b + row.to(tl.int64) * stride_n + column.to(tl.int64) * stride_m
    return tl.load(at, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _near(K, A, B, rows, columns, has_mass, cost, problem, index, minus_inverse_epsilon):
    """(K, A, B), made anew at (rows, columns) if these are far from A or B."""
    if tl.maximum(tl.max(tl.abs(rows - A)), tl.max(tl.abs(columns - B))) > RANGE:
        M = tl.reshape(_matrix(cost, problem, index) * minus_inverse_epsilon, K.shape)
        K = tl.where(has_mass[0] & has_mass[1], tl.exp(rows + columns + M), 0.0)
        A = rows
        B = columns
    return K, A, B


@triton.jit(
    do_not_specialize=[
        *("cost_stride_b", "cost_stride_n", "grad_stride_b", "grad_stride_n"),
        *("n", "m", "kept", "grad_columns", "cost_columns", "grad_f_count", "grad_g_count"),
    ]
)
def _sinkhorn_unrolled_kernel(
    cost,  # [B, n, m], any strides
    a,  # [B, n]
    b,  # [B, m]
    plan,  # [B, n, m]
    history,  # [B, kept, n + m] of (phi, gamma)
    n_iter,  # [B], int32
    grad_plan,  # [B, n, m], any strides
    grad_f,  # [B, n]
    grad_g,  # [B, m]
    grad_transport,  # [B]
    d_cost,  # [B, n, m]
    d_a,  # [B, n]
    d_b,  # [B, m]
    cost_stride_b,
    cost_stride_n,
    cost_stride_m,
    grad_stride_b,
    grad_stride_n,
    grad_stride_m,
    n,
    m,
    kept,
    grad_columns,  # what of grad_plan, grad_transport, grad_f and grad_g is read: m or n entries, or 0 where there is no such gradient
    cost_columns,
    grad_f_count,
    grad_g_count,
    # A plain float would arrive as float32.
    epsilon: tl.float64,
    kappa_a: tl.float64,
    kappa_b: tl.float64,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    K_COLUMNS: tl.constexpr = BLOCK_M // FOLD
    epsilon = tl.full((), epsilon, tl.float64)
    kappa_a = tl.full((), kappa_a, tl.float64)
    kappa_b = tl.full((), kappa_b, tl.float64)
    minus_inverse_epsilon = -1 / epsilon
    inverse_kappa_a = 1 / kappa_a
    inverse_kappa_b = 1 / kappa_b

    problem = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_N)[None, :, None]  # [1, BLOCK_N, 1]
    j = tl.arange(0, FOLD)[:, None, None] * K_COLUMNS + tl.arange(0, K_COLUMNS)[None, None, :]  # [FOLD, 1, BLOCK_M / FOLD]
    mass_a = tl.load(a + problem * n + i, mask=i < n, other=0.0).to(tl.float64)
    mass_b = tl.load(b + problem * m + j, mask=j < m, other=0.0).to(tl.float64)
    log_a = tl.where(mass_a > 0, tl.log(mass_a), 0.0)
    log_b = tl.where(mass_b > 0, tl.log(mass_b), 0.0)
    has_mass = (mass_a > 0, mass_b > 0)
    folded = tl.arange(0, FOLD * BLOCK_N)[:, None]
    row = folded % BLOCK_N  # [FOLD BLOCK_N, 1]
    column = folded // BLOCK_N * K_COLUMNS + tl.arange(0, K_COLUMNS)[None, :]  # [FOLD BLOCK_N, BLOCK_M / FOLD]
    inside = (row < n) & (column < m)
    cost = (cost, cost_stride_b, cost_stride_n, cost_stride_m)

    T = _matrix((plan, n.to(tl.int64) * m, m, 1), problem, (row, column, inside))
    grad_plan = (grad_plan, grad_stride_b, grad_stride_n, grad_stride_m)
    G = _matrix(grad_plan, problem, (row, column, (T > 0) & (column < grad_columns)))
    envelope = tl.load(grad_transport + problem, mask=cost_columns > 0, other=0.0).to(tl.float64)
    G += envelope * _matrix(cost, problem, (row, column, (T > 0) & (column < cost_columns)))
    W = tl.reshape(T * G, (FOLD, BLOCK_N, K_COLUMNS))
    d_M = W - epsilon * envelope * tl.reshape(T, W.shape)  # so that d_cost = -d_M / epsilon
    d_log_a = _over_columns(W)
    d_log_b = _over_rows(W)
    f_bar = tl.load(grad_f + problem * n + i, mask=(mass_a > 0) & (i < grad_f_count), other=0.0).to(tl.float64)
    g_bar = tl.load(grad_g + problem * m + j, mask=(mass_b > 0) & (j < grad_g_count), other=0.0).to(tl.float64)
    phi_bar = d_log_a + epsilon * f_bar
    gamma_bar = d_log_b + epsilon * g_bar

    index = (row, column, inside)
    K = tl.zeros_like(W)
    A = tl.full(log_a.shape, float("inf"), tl.float64)  # far from anything
    B = log_b
    iteration = tl.load(n_iter + problem)
    past = history + (problem * kept + iteration - 1) * (n + m)
    phi = tl.load(past + i, mask=(mass_a > 0) & (i < tl.where(iteration > 0, n, 0)), other=0.0).to(tl.float64)
    while iteration > 0:
        gamma = tl.load(past + n + j, mask=mass_b > 0, other=0.0).to(tl.float64)
        K, A, B = _near(K, A, B, phi * inverse_kappa_a, log_b + gamma, has_mass, cost, problem, index, minus_inverse_epsilon)
        v = tl.exp(log_b + gamma - B)
        total = _over_columns(K * v)
        flow = K * (v * tl.where(total > 0, -kappa_a * phi_bar / total, 0.0))
        d_M += flow
        arriving = _over_rows(flow)
        d_log_b += arriving
        gamma_bar += arriving

        past -= n + m
        phi = tl.load(past + i, mask=(mass_a > 0) & (i < tl.where(iteration > 1, n, 0)), other=0.0).to(tl.float64)  # from phi = 0
        K, A, B = _near(K, A, B, log_a + phi, gamma * inverse_kappa_b, has_mass, cost, problem, index, minus_inverse_epsilon)
        u = tl.exp(log_a + phi - A)
        total = _over_rows(K * u)
        flow = K * (u * tl.where(total > 0, -kappa_b * gamma_bar / total, 0.0))
        d_M += flow
        phi_bar = _over_columns(flow)
        d_log_a += phi_bar
        gamma_bar = tl.zeros_like(gamma_bar)
        iteration -= 1

    out = d_cost + problem * n * m + (row * m + column)
    tl.store(out, tl.reshape(d_M * minus_inverse_epsilon, (FOLD * BLOCK_N, K_COLUMNS)), mask=inside)
    tl.store(d_a + problem * n + i, tl.where(mass_a > 0, d_log_a / mass_a, 0.0), mask=i < n)
    tl.store(d_b + problem * m + j, tl.where(mass_b > 0, d_log_b / mass_b, 0.0), mask=j < m)


def sinkhorn_unrolled_bwd(
    cost: Tensor,  # [B, n, m], as is grad_plan of any strides; all else is made contiguous
    a: Tensor,  # [B, n]
    b: Tensor,  # [B, m]
    plan: Tensor,  # [B, n, m]
    history: Tensor,  # [B, max_iter, n + m]
    n_iter: Tensor,  # [B], int32
    grad_plan: Tensor | None,  # [B, n, m]
    grad_f: Tensor | None,  # [B, n]
    grad_g: Tensor | None,  # [B, m]
    grad_cost: Tensor | None,  # [B], of transport_cost
    epsilon: float,
    tau_a: float | None,
    tau_b: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_cost, d_a, d_b), as the reference, of a problem that fits a tile."""
    batch, n, m = plan.shape
    d_cost, d_a, d_b = plan.new_empty(batch, n, m), plan.new_empty(batch, n), plan.new_empty(batch, m)
    if batch == 0:
        return d_cost, d_a, d_b
    a, b, plan, history, n_iter = (t.contiguous() for t in (a, b, plan, history, n_iter))
    grad_f, grad_g, grad_cost = (t if t is None else t.contiguous() for t in (grad_f, grad_g, grad_cost))
    BLOCK_N, BLOCK_M = tile_for(n, m)
    with device_guard(plan):
        _sinkhorn_unrolled_kernel[(batch,)](
            cost,
            a,
            b,
            plan,
            history,
            n_iter,
            *(plan if t is None else t for t in (grad_plan, grad_f, grad_g, grad_cost)),
            d_cost,
            d_a,
            d_b,
            *cost.stride(),
            *(plan if grad_plan is None else grad_plan).stride(),
            n,
            m,
            history.shape[1],
            *(0 if t is None else count for t, count in ((grad_plan, m), (grad_cost, m), (grad_f, n), (grad_g, m))),
            epsilon,
            1.0 if tau_a is None else tau_a / (tau_a + epsilon),
            1.0 if tau_b is None else tau_b / (tau_b + epsilon),
            BLOCK_N=BLOCK_N,
            BLOCK_M=BLOCK_M,
            **compiler_options(BLOCK_N, BLOCK_M),
        )
    return d_cost, d_a, d_b


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for, of contiguous tensors."""
    names = _sinkhorn_unrolled_kernel.arg_names
    tensors = names[: names.index("cost_stride_b")]
    return [
        Variant(
            f"{str(dtype).removeprefix('torch.')} {BLOCK_N} x {BLOCK_M}",
            _sinkhorn_unrolled_kernel,
            dict.fromkeys(tensors, dtype) | {"n_iter": torch.int32},
            {"BLOCK_N": BLOCK_N, "BLOCK_M": BLOCK_M, "cost_stride_m": 1, "grad_stride_m": 1},
            compiler_options(BLOCK_N, BLOCK_M),
        )
        for dtype in (torch.float32, torch.float64)
        for BLOCK_N, BLOCK_M in TILES
    ]
