"""Sinkhorn forward in Triton, one program per problem, the whole problem in registers: scaling iterations with absorbed potentials.

Problems too large for that are passed on to sinkhorn_rows.py, the largest to sinkhorn_stripes.py, or, where not even a row fits the
registers, to sinkhorn_stream.py; many small ones to sinkhorn_packed.py.

    gamma_j = -kappa_b logsumexp_i(log a_i + phi_i + M_ij), then phi_i likewise over j; from phi = 0; M = -cost / epsilon.

The plan is diag(u) K diag(v) with K_ij = exp(alpha_i + beta_j + M_ij). v = b / (K' u), then u = a / (K v): multiply-adds without
exponentials (a soft marginal has one for each row or column). alpha and beta are the potentials with the logs of the masses when K was
made, in double; log u and log v, what they have moved by since. An iteration in which a scaling leaves [1 / RANGE, RANGE], or a sum may
have lost something to underflow, is thrown away and done in the log domain, from the costs in memory, and K is made anew from its
potentials. So is the first, whose K is 0.

Grid: x = problem (B may exceed 65535). Columns are folded: with LANES lanes across, column j = c LANES + k of row i stands at [c, i, k]
of a [BLOCK / LANES, BLOCK, LANES] tile, of which a warp's lanes fill the last axes: a thread holds some columns of some rows, rather than
one column of all, and a reduction over either is mostly its own additions. What is loaded has no axes of 1 then: else some versions of
Triton (3.6) would lay out all of the tile as they lay out a load.
Traffic: cost is read four times for each K and once for the plan, all but the first time mostly from cache; each output is written once;
alpha and beta stand in scratch memory, [B, n + m] doubles. Shared memory holds partial reductions where a program has several warps.
Invariants: padding, and rows and columns of zero mass, are 0 in K, u and v and -inf in the potentials, whatever stands in their cost.
A maximum of -inf is replaced by 0. Barriers part what threads write from what others read. Offsets into tensors are 64-bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sinkhorn_packed, sinkhorn_rows, sinkhorn_stream, sinkhorn_stripes
from .device import device_guard
from .scalings import excess, first_scaling, is_safe, log_of, scaling_of
from .variant import Variant

# Sides of the square tile that holds a problem: (LANES, warps).
TILES = {
    torch.float32: {16: (4, 1), 32: (4, 1), 64: (8, 2), 128: (16, 8)},
    torch.float64: {16: (4, 1), 32: (4, 1), 64: (8, 8)},
}


def block(n: int, m: int, dtype: torch.dtype) -> int | None:
    """The side of the tile that holds an n x m problem, or None."""
    return next((size for size in TILES[dtype] if size >= max(n, m)), None)


def compiler_options(BLOCK: int, dtype: torch.dtype) -> dict[str, int | bool]:
    # fp fusion is named because its default differs between versions of Triton
    return {"num_warps": TILES[dtype][BLOCK][1], "maxnreg": 255, "enable_fp_fusion": True}


@triton.jit
def _load(vector, stride, size, index, other):
    """Rows [1, BLOCK, 1] or columns [FOLD, 1, LANES], whichever index is of."""
    if index.shape[1] == 1:
        k = tl.arange(0, index.shape[0])[:, None] * index.shape[2] + tl.arange(0, index.shape[2])[None, :]
        loaded = tl.load(vector + k.to(tl.int64) * stride, mask=k < size, other=other)[:, None, :]
    else:
        k = tl.arange(0, index.shape[1])
        loaded = tl.load(vector + k.to(tl.int64) * stride, mask=k < size, other=other)[None, :, None]
    return loaded


@triton.jit
def _over(tile, over_rows: tl.constexpr):
    """Sums over the rows, or over the columns, of a tile."""
    if over_rows:
        sums = tl.sum(tile, 1, keep_dims=True)
    else:
        sums = tl.sum(tl.sum(tile, 0, keep_dims=True), 2, keep_dims=True)
    return sums


@triton.jit
def _rescale(mass, sums, kappa, absorbed, potential, index, size):
    """(this side's scaling from its sums, whether it is safe); where the marginal is soft, the new potential is stored too:
    the log of the scaling, rounded, would be too coarse."""
    dtype: tl.constexpr = mass.dtype
    scaling = scaling_of(mass, sums)
    if kappa != 1:
        log_ratio = tl.log(sums) - _load(absorbed, 1, size, index, 0.0).to(dtype)
        scaling *= tl.where(mass > 0, tl.exp((1 - kappa).to(dtype) * log_ratio), 0.0)
        tl.store(potential + index, tl.where(mass > 0, -kappa.to(dtype) * log_ratio, float("-inf")), mask=index < size)
    return scaling, is_safe(mass, sums, scaling)


@triton.jit
def _slice(space, step, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """(M of the columns of a step [1, BLOCK, LANES], in double and 0 where there is no mass, the columns [1, 1, LANES], their mass)."""
    cost, stride_n, stride_m, a, a_stride, n, b, b_stride, m, minus_inverse_epsilon = space
    i, j = tl.arange(0, BLOCK)[:, None].to(tl.int64), (step * LANES + tl.arange(0, LANES)[None, :]).to(tl.int64)
    rows = tl.load(a + i * a_stride, mask=i < n, other=0.0)
    columns = tl.load(b + j * b_stride, mask=j < m, other=0.0)
    C = tl.load(cost + (i * stride_n + j * stride_m), mask=(rows > 0) & (columns > 0), other=0.0)[None, :, :]
    index = step * LANES + tl.arange(0, LANES)[None, None, :]
    return C.to(tl.float64) * minus_inverse_epsilon, index, columns[None, :, :]


@triton.jit
def _restart(space, K, a, u, alpha, beta, f, g, kappa_a, kappa_b, i, n, BLOCK: tl.constexpr, LANES: tl.constexpr):
    """K after an iteration in the log domain, a few columns at a time; the potentials are in alpha and beta, and in f and g where a
    marginal is soft."""
    dtype: tl.constexpr = space[0].dtype.element_ty
    m = space[8]
    steps = tl.cdiv(m, LANES)
    rows = tl.where(a > 0, _load(alpha, 1, n, i, 0.0) + tl.log(u.to(tl.float64)), float("-inf"))
    for step in range(steps):
        M, j, b = _slice(space, step, BLOCK, LANES)
        x = rows + M
        top = tl.max(x, 1, keep_dims=True)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp((x - top).to(dtype)), 1, keep_dims=True)
        gamma = tl.where(b > 0, -kappa_b * (top + tl.log(total.to(tl.float64))), float("-inf"))
        tl.store(beta + j, gamma + log_of(b), mask=j < m)
        if kappa_b != 1:
            tl.store(g + j, gamma.to(dtype), mask=j < m)
    tl.debug_barrier()
    tops = tl.full((1, i.shape[1], LANES), float("-inf"), tl.float64)
    for step in range(steps):
        M, j, b = _slice(space, step, BLOCK, LANES)
        tops = tl.maximum(tops, tl.load(beta + j, mask=j < m, other=float("-inf")) + M)
    top = tl.max(tops, 2, keep_dims=True)
    top = tl.where(top == float("-inf"), 0.0, top)
    totals = tl.zeros((1, i.shape[1], LANES), dtype)
    for step in range(steps):
        M, j, b = _slice(space, step, BLOCK, LANES)
        totals += tl.exp((tl.load(beta + j, mask=j < m, other=float("-inf")) + M - top).to(dtype))
    phi = -kappa_a * (top + tl.log(tl.sum(totals, 2, keep_dims=True).to(tl.float64)))
    phi = tl.where(a > 0, phi, float("-inf"))
    log_a = log_of(a)
    rows = phi + log_a - excess(log_a, dtype)
    tl.store(alpha + i, rows, mask=i < n)
    if kappa_a != 1:
        tl.store(f + i, phi.to(dtype), mask=i < n)
    fold = tl.arange(0, K.shape[0])[:, None, None]
    for step in range(steps):
        M, j, b = _slice(space, step, BLOCK, LANES)
        columns = tl.load(beta + j, mask=j < m, other=float("-inf")) - excess(log_of(b), dtype)
        K = tl.where(fold == step, tl.exp((rows + columns + M).to(dtype)), K)
        tl.debug_barrier()  # beta has been read
        tl.store(beta + j, columns, mask=j < m)
    tl.debug_barrier()
    return K


@triton.jit
def _write_potential(out, scaling, index, mass, stride, size, unit, kappa, absorbed, potential, BLOCK: tl.constexpr):
    """unit times phi or gamma; a lane takes its own share of them, through memory."""
    k = tl.arange(0, BLOCK)
    if kappa == 1:
        tl.store(out + index, scaling, mask=index < size)
    tl.debug_barrier()
    mass = tl.load(mass + k.to(tl.int64) * stride, mask=k < size, other=0.0)
    if kappa == 1:
        moved = tl.load(out + k, mask=k < size, other=1.0).to(tl.float64)
        result = tl.load(absorbed + k, mask=k < size, other=0.0) + tl.log(moved) - log_of(mass)
    else:
        result = tl.load(potential + k, mask=k < size, other=0.0).to(tl.float64)
    tl.debug_barrier()  # all of them have been read
    tl.store(out + k, tl.where(mass > 0, unit * result, float("-inf")).to(mass.dtype), mask=k < size)


@triton.jit
def _marginal_error(K, u, v, b, kappa_b, slope_b, g, j, m):
    """L1 distance of the column marginal from b exp(-slope_b gamma), which is b if balanced."""
    target = b
    if kappa_b != 1:
        gamma = _load(g, 1, m, j, 0.0)
        target = tl.where(b > 0, b * tl.exp(-slope_b * gamma), 0.0)
    return tl.sum(tl.abs(v * _over(K * u, True) - target))


@triton.jit(do_not_specialize=["cost_stride_b", "cost_stride_n", "cost_stride_m", "n", "m", "max_iter", "check_every", "kept"])
def _sinkhorn_fwd_kernel(
    cost,  # [B, n, m], any strides
    a,  # [B, n], any strides
    b,  # [B, m], any strides
    plan,  # [B, n, m]
    f,  # [B, n]
    g,  # [B, m]
    transport_cost,  # [B]
    marginal_error,  # [B]
    n_iter,  # [B], int32
    history,  # [B, kept, n + m] of (phi, gamma)
    absorbed,  # [B, n + m] of (alpha, beta), float64
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
    slope_b: tl.float64,  # epsilon / tau_b, 0 if balanced
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    dtype: tl.constexpr = cost.dtype.element_ty
    FOLD: tl.constexpr = BLOCK // LANES
    epsilon = tl.full((), epsilon, tl.float64)
    tol = tl.full((), tol, dtype)
    kappa_a = tl.full((), kappa_a, tl.float64)
    kappa_b = tl.full((), kappa_b, tl.float64)
    slope_b = tl.full((), slope_b, dtype)

    problem = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)[None, :, None]  # [1, BLOCK, 1]
    fold = tl.arange(0, FOLD)[:, None, None]
    j = fold * LANES + tl.arange(0, LANES)[None, None, :]  # [FOLD, 1, LANES]
    cost += problem * cost_stride_b
    rows = a + problem * a_stride_b
    columns = b + problem * b_stride_b
    scale = tl.full((), minus_inverse_epsilon, tl.float64)
    space = (cost, cost_stride_n, cost_stride_m, rows, a_stride_n, n, columns, b_stride_m, m, scale)
    a, b = _load(rows, a_stride_n, n, i, 0.0), _load(columns, b_stride_m, m, j, 0.0)
    f += problem * n
    g += problem * m
    alpha = absorbed + problem * (n + m)
    beta = alpha + n
    tl.store(alpha + i, log_of(a), mask=i < n)
    tl.store(beta + j, log_of(b), mask=j < m)
    tl.debug_barrier()

    u = tl.where(a > 0, tl.full(a.shape, 1.0, dtype), 0.0)
    v = tl.where(b > 0, tl.full(b.shape, 1.0, dtype), 0.0)
    K = tl.zeros((FOLD, BLOCK, LANES), dtype)
    iteration = 0
    error = tl.full((), 0.0, dtype)
    running = True
    while running:
        new_v, safe = _rescale(b, _over(K * u, True), kappa_b, beta, g, j, m)
        new_v = tl.where(safe, new_v, float("nan"))  # which makes every sum of the rows NaN, and no scaling of theirs safe
        new_u, safe = _rescale(a, _over(K * new_v, False), kappa_a, alpha, f, i, n)
        unsafe = tl.max(tl.max(tl.max(tl.where(safe, 0, 1), 0), 1), 0)
        if unsafe != 0:
            K = _restart(space, K, a, u, alpha, beta, f, g, kappa_a, kappa_b, i, n, BLOCK, LANES)
            u, v = first_scaling(a), first_scaling(b)
            if kappa_a == 1:
                u = scaling_of(a, _over(K * v, False))
        else:
            u = new_u
            v = new_v
        if kept > 0:
            past = history + (problem * kept + iteration) * (n + m)
            _write_potential(past, u, i, rows, a_stride_n, n, 1.0, kappa_a, alpha, f, BLOCK)
            _write_potential(past + n, v, j, columns, b_stride_m, m, 1.0, kappa_b, beta, g, BLOCK)
        iteration += 1
        running = iteration < max_iter
        if ((iteration % check_every == 0) & (tol >= 0)) | ~running:
            tl.debug_barrier()  # g has been written
            error = _marginal_error(K, u, v, b, kappa_b, slope_b, g, j, m)
            running &= ~(error <= tol)

    K *= v * u
    spent = tl.zeros((1, BLOCK, LANES), tl.float64)
    for step in range(tl.cdiv(m, LANES)):
        M, at, _ = _slice(space, step, BLOCK, LANES)
        T = tl.sum(tl.where(fold == step, K, 0.0), 0, keep_dims=True)
        spent += tl.where(T > 0, T * M, 0.0)
        tl.store(plan + problem * n * m + (i * m + at), T, mask=(i < n) & (at < m))
    tl.store(transport_cost + problem, (-epsilon * tl.sum(spent)).to(dtype))
    tl.store(marginal_error + problem, error)
    tl.store(n_iter + problem, iteration)
    _write_potential(f, u, i, rows, a_stride_n, n, epsilon, kappa_a, alpha, f, BLOCK)
    _write_potential(g, v, j, columns, b_stride_m, m, epsilon, kappa_b, beta, g, BLOCK)


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
        plain = tau_a is None and tau_b is None and not keep_history
        if plain and (BLOCK := sinkhorn_packed.block(batch, n, m, cost.dtype)) is not None:
            sinkhorn_packed.launch(cost, a, b, outputs[:-1], BLOCK, max_iter, check_every, numbers[:3])
            return outputs
        BLOCK = block(n, m, cost.dtype)
        if BLOCK is None:
            larger = sinkhorn_stream if sinkhorn_rows.block(m, cost.dtype) is None else sinkhorn_rows
            larger = sinkhorn_stripes if sinkhorn_stripes.serves(n, m, cost.dtype) else larger
            larger.launch(cost, a, b, outputs, counts, numbers)
            return outputs
        _sinkhorn_fwd_kernel[(batch,)](
            cost,
            a,
            b,
            *outputs,
            cost.new_empty(batch, n + m, dtype=torch.float64),
            *cost.stride(),
            *a.stride(),
            *b.stride(),
            *counts,
            *numbers[:-2],
            numbers[-1],
            BLOCK=BLOCK,
            LANES=TILES[cost.dtype][BLOCK][0],
            **compiler_options(BLOCK, cost.dtype),
        )
    return outputs


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for."""
    names = _sinkhorn_fwd_kernel.arg_names
    tensors = names[: names.index("cost_stride_b")]
    return [
        Variant(
            f"{str(dtype).removeprefix('torch.')} {BLOCK}",
            _sinkhorn_fwd_kernel,
            dict.fromkeys(tensors, dtype) | {"n_iter": torch.int32, "absorbed": torch.float64},
            {"BLOCK": BLOCK, "LANES": LANES, "a_stride_n": 1, "b_stride_m": 1},
            compiler_options(BLOCK, dtype),
        )
        for dtype, tiles in TILES.items()
        for BLOCK, (LANES, _) in tiles.items()
    ]
