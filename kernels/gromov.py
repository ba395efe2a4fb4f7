"""gromov's forward in Triton: one program per problem, what the inner solver multiplies in registers.

From T = a b', each iteration solves (gromov_plan.py) a transport problem on the linear cost
    G_ij = columns_j - 2 (C T D')_ij, columns_j = sum_l (D_jl^2 - 2 c D_jl) b_l,   costs in the product less their means c and d:
helo_fast/ops/gromov/reference.py says why. IPOT meets the column marginal last, Sinkhorn the row marginal: "entropic" is solved with
x and y exchanged, by its launcher, and needs C' T D besides where costs may be asymmetric.

Tokens: their cosine costs (gromov_costs.py) are written to memory first and cut off at the threshold, relu(c - t) with
t = low + threshold (high - low), as they are read.
C T D' is two products over slices that are fetched from memory in a loop's body; C T is written there in between. float32 products are
IEEE float32.
Grid: x = problem (B may exceed 65535). Scratch: n n + m m + n m + m entries and 2 m doubles a problem, for the costs less their means, for
C T and later N, for columns, psi and g; a problem's program comes back to it while it is in cache. Traffic beyond the caches: costs
are read thrice, scratch and the plan are written once or a few times.
Invariants: rows and columns of zero mass are never read; their costs are 0 and their plan is an exact 0. Offsets between problems and
of tensors that are given are 64-bit. A barrier stands between what threads write to memory and what others read there, both ways.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gromov_costs
from .device import device_guard
from .gromov_costs import BLOCKS, SLICE, block, cosine_cost, cut_off, load_mass
from .gromov_plan import add_entries, again, gibbs, load_entries, solve, store_tile
from .variant import Variant


def compiler_options(BLOCK: int, dtype: torch.dtype) -> dict[str, int | bool]:
    """Warps, so that a thread holds 16 entries of the largest tile, 4 x 4, which sums along both axes suit, 8 of a smaller one, and 4 in
    float64."""
    return gromov_costs.compiler_options(BLOCK) | ({"num_warps": 8} if dtype == torch.float64 else {})


@triton.jit
def _cost(space, index):
    """(a cost [BLOCK, BLOCK], 0 where there is no mass, where there is). space = (pointer, strides of rows and columns, mass, its
    stride, size, threshold t or -inf where there is none)."""
    cost, stride_i, stride_j, mass, stride, size, cut = space
    i, j = index[:, None], index[None, :]
    inside = (load_mass(mass, i, size, stride) > 0) & (load_mass(mass, j, size, stride) > 0)
    c = tl.load(cost + i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j, mask=inside, other=0.0)
    return tl.where(inside, cut_off(c, cut), 0.0), inside


@triton.jit
def _transposed(matrix):
    pointer, stride_i, stride_j = matrix
    return pointer, stride_j, stride_i


@triton.jit
def _keep(space, at, index):
    """Writes a cost less its mean over the pairs that have mass, of those pairs, and returns the mean."""
    cost, stride_i, stride_j, mass, stride, size, cut = space
    c, inside = _cost(space, index)
    count = tl.sum((load_mass(mass, index, size, stride) > 0).to(tl.int32)).to(c.dtype)
    mean = tl.sum(c) / tl.maximum(count * count, 1.0)
    store_tile(at, index, size, size, tl.where(inside, c - mean, 0.0))
    return mean


@triton.jit
def _add_between(total, C_at, T_at, D_at, P_at, n, m, index):
    """total + C T D'; C T passes through memory, at P_at."""
    dtype: tl.constexpr = total.dtype
    down, across = index[:, None], index[None, :]
    product = tl.zeros_like(total)
    for start in range(0, n, SLICE):
        k = start + tl.arange(0, SLICE)
        C = load_entries(C_at, down, k[None, :], n, n)
        T = load_entries(T_at, k[:, None], across, n, m)
        product = tl.dot(C, T, product, input_precision="ieee", out_dtype=dtype)
    tl.debug_barrier()  # what stood there has been read
    store_tile(P_at, index, n, m, product)
    tl.debug_barrier()  # what one thread writes, others read
    for start in range(0, m, SLICE):
        k = start + tl.arange(0, SLICE)[None, :]
        P = load_entries(P_at, down, k, n, m)
        D = load_entries(D_at, down, k, m, m)
        total = tl.dot(P, tl.trans(D), total, input_precision="ieee", out_dtype=dtype)
    return total


@triton.jit(do_not_specialize=["n", "m", "outer_iter", "inner_iter", "powers", "fused", "from_tokens"])
def _gromov_fwd_kernel(
    x,  # [B, n, n] costs, any strides, as of all others
    y,  # [B, m, m]
    a,  # [B, n]
    b,  # [B, m]
    cross,  # [B, n, m] if fused
    low_x,  # [B], or of stride 0, if from_tokens
    high_x,
    low_y,
    high_y,
    scratch,  # [B, n n + m m + n m + m]
    potentials,  # [B, 2, m], float64
    plan,  # [B, n, m]
    gw_cost,  # [B]
    marginal_error,  # [B]
    n_iter,  # [B], int32
    converged,  # [B], bool
    x_stride_b,
    x_stride_n,
    x_stride_k,
    y_stride_b,
    y_stride_m,
    y_stride_l,
    a_stride_b,
    a_stride_n,
    b_stride_b,
    b_stride_m,
    cross_stride_b,
    cross_stride_n,
    cross_stride_m,
    end_stride_b,
    plan_stride_b,
    plan_stride_n,
    plan_stride_m,
    n,
    m,
    outer_iter,
    inner_iter,
    powers,  # 1 for IPOT, 0 for Sinkhorn
    fused,
    from_tokens,  # costs are symmetric, and cut off at the threshold
    # A plain float would arrive as float32.
    threshold: tl.float64,
    alpha: tl.float64,
    per_epsilon: tl.float64,
    tol: tl.float64,  # below 0: never stop early
    bound: tl.float64,  # of the change and the marginal error that count as converged
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = x.dtype.element_ty
    threshold = tl.full((), threshold, dtype)
    tol = tl.full((), tol, dtype)
    bound = tl.full((), bound, dtype)
    cross_weight = tl.full((), 1.0 - alpha, dtype)
    alpha = tl.full((), alpha, dtype)
    powers = powers != 0
    one_product = powers | (from_tokens != 0)  # Sinkhorn's G has another, C' T D
    weight = tl.where(powers, alpha, tl.where(from_tokens != 0, 2 * alpha, alpha))

    problem = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    row, column = index[:, None], index[None, :]
    cross += problem * cross_stride_b
    plan += problem * plan_stride_b
    a += problem * a_stride_b
    b += problem * b_stride_b
    cut_x, cut_y = tl.full((), float("-inf"), dtype), tl.full((), float("-inf"), dtype)
    if from_tokens != 0:
        end = problem * end_stride_b
        bottom, top = tl.load(low_x + end), tl.load(high_x + end)
        cut_x = bottom + threshold * (top - bottom)
        bottom, top = tl.load(low_y + end), tl.load(high_y + end)
        cut_y = bottom + threshold * (top - bottom)
    zero = tl.full((), 0.0, dtype)
    X = (x + problem * x_stride_b, x_stride_n, x_stride_k, a, a_stride_n, n, cut_x)
    Y = (y + problem * y_stride_b, y_stride_m, y_stride_l, b, b_stride_m, m, cut_y)
    scratch += problem * (n * n + m * m + n * m + m)
    C_at, D_at = (scratch, n, 1), (scratch + n * n, m, 1)
    N_at = (scratch + n * n + m * m, m, 1)  # of N, and of halves of products
    columns_at = scratch + n * n + m * m + n * m
    potentials += problem * 2 * m
    T_at = (plan, plan_stride_n, plan_stride_m)
    cross_at = (cross, cross_stride_n.to(tl.int64), cross_stride_m.to(tl.int64))
    c, d = _keep(X, C_at, index), _keep(Y, D_at, index)
    D, _ = _cost(Y, index)  # [j, l]
    b_across = load_mass(b, column, m, b_stride_m)
    columns = tl.sum(D * (D - 2 * c) * b_across, 1)
    if not one_product:
        columns += tl.sum(D * (D - 2 * c) * tl.trans(b_across), 0)
    tl.store(columns_at + index, columns, mask=index < m)
    store_tile(T_at, index, n, m, load_mass(a, row, n, a_stride_n) * b_across)
    tl.debug_barrier()
    change = zero
    iteration = 0
    running = True
    while running:
        here = again(index, iteration, -inner_iter)
        gain = _add_between(tl.zeros((BLOCK, BLOCK), dtype), C_at, T_at, D_at, N_at, n, m, here)
        if not one_product:
            gain = _add_between(gain, _transposed(C_at), T_at, _transposed(D_at), N_at, n, m, here)
        mass_a, mass_b = load_mass(a, here[:, None], n, a_stride_n), load_mass(b, here[None, :], m, b_stride_m)
        gain *= 2 * weight
        if fused != 0:
            gain = add_entries(gain, cross_at, -cross_weight, here, n, m, mass_a > 0, mass_b > 0)
        linear_part = tl.load(columns_at + here[None, :], mask=here[None, :] < m, other=0.0)
        N, start = gibbs(gain, weight * linear_part, (mass_a > 0) & (mass_b > 0), mass_b > 0, per_epsilon)
        tl.debug_barrier()  # half a product has been read
        store_tile(N_at, here, n, m, N)
        tl.debug_barrier()
        T = solve(N, start, N_at, potentials, here, n, m, mass_a, mass_b, inner_iter, powers)
        iteration += 1
        here = again(index, iteration, -inner_iter)
        change = tl.sum(tl.abs(T - load_entries(T_at, here[:, None], here[None, :], n, m)))
        running = (iteration < outer_iter) & ((tol < 0) | (change > tol))
        tl.debug_barrier()  # the last plan has been read
        store_tile(T_at, here, n, m, T)
        tl.debug_barrier()  # what one thread writes, others read

    index = again(index, iteration, -inner_iter)
    row, column = index[:, None], index[None, :]
    T = load_entries(T_at, row, column, n, m)
    mass_a, mass_b = load_mass(a, row, n, a_stride_n), load_mass(b, column, m, b_stride_m)
    r, s = tl.sum(T, 1, keep_dims=True), tl.sum(T, 0, keep_dims=True)
    error = tl.sum(tl.abs(r - mass_a)) + tl.sum(tl.abs(s - mass_b))
    inside = (mass_a > 0) & (load_mass(a, column, n, a_stride_n) > 0)
    C = tl.where(inside, load_entries(C_at, row, column, n, n) + (c - d), 0.0)  # blind to what both lose
    quadratic = tl.sum(C * C * r * tl.trans(r))
    D = load_entries(D_at, row, column, m, m)
    quadratic += tl.sum(D * D * s * tl.trans(s))
    product = _add_between(tl.zeros((BLOCK, BLOCK), dtype), C_at, T_at, D_at, N_at, n, m, index)
    product += (c - d) * tl.sum(D * s, 1)[None, :]  # X has lost c
    quadratic = tl.maximum(quadratic - 2 * tl.sum(T * product), 0.0)
    linear = zero
    if fused != 0:
        linear = tl.sum(T * tl.where(T > 0, load_entries(cross_at, row, column, n, m), 0.0))
    tl.store(gw_cost + problem, alpha * quadratic + cross_weight * linear)
    tl.store(marginal_error + problem, error)
    tl.store(n_iter + problem, iteration)
    tl.store(converged + problem, (change <= bound) & (error <= bound))


def gromov_fwd(
    x: Tensor,  # [B, n, n] costs, or [B, n, d] tokens, any strides, as of all others
    y: Tensor,  # [B, m, m] or [B, m, d]
    a: Tensor,  # [B, n]
    b: Tensor,  # [B, m]
    cost_xy: Tensor | None,  # [B, n, m]
    tokens: tuple[float, bool] | None,  # (threshold, whether it is over the batch); None: x and y are costs
    alpha: float,
    method: str,
    epsilon: float,
    outer_iter: int,
    inner_iter: int,
    tol: float | None,
    converged_at: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(plan, gw_cost, marginal_error, n_iter, converged), as the reference."""
    (batch, n), m = a.shape, b.shape[1]
    plan, gw_cost, marginal_error = x.new_empty(batch, n, m), x.new_empty(batch), x.new_empty(batch)
    n_iter, converged = x.new_empty(batch, dtype=torch.int32), x.new_empty(batch, dtype=torch.bool)
    outputs = plan, gw_cost, marginal_error, n_iter, converged
    if batch == 0:
        return outputs
    ends, end_stride = (gw_cost,) * 4, 0  # never read
    if tokens is not None:
        if cost_xy is None and alpha < 1:
            cost_xy, *_ = cosine_cost(x, y, a, b)
        x, *ends_x = cosine_cost(x, x, a, a)
        y, *ends_y = cosine_cost(y, y, b, b)
        ends, end_stride = (*ends_x, *ends_y), 1
        if tokens[1]:
            ends, end_stride = [end.amax() if k % 2 else end.amin() for k, end in enumerate(ends)], 0
    written, cross = plan, cost_xy
    if method == "entropic":
        x, y, a, b, ends, written, cross = y, x, b, a, (*ends[2:], *ends[:2]), plan.mT, None if cross is None else cross.mT
    scratch = x.new_empty(batch, n * n + m * m + n * m + b.shape[1])
    potentials = x.new_empty(batch, 2, b.shape[1], dtype=torch.float64)
    BLOCK = block(n, m, x.dtype)
    with device_guard(x):
        _gromov_fwd_kernel[(batch,)](
            *(x, y, a, b, written if cross is None else cross, *ends, scratch, potentials, written, *outputs[1:]),
            *(*x.stride(), *y.stride(), *a.stride(), *b.stride()),
            *((0, 0, 0) if cross is None else cross.stride()),
            *(end_stride, *written.stride()),
            *(a.shape[1], b.shape[1], outer_iter, inner_iter),
            *(int(method == "proximal"), int(cross is not None), int(tokens is not None)),
            0.0 if tokens is None else tokens[0],
            1.0 if cross is None else alpha,
            1.0 / epsilon,
            -1.0 if tol is None else tol,
            converged_at,
            BLOCK=BLOCK,
            **compiler_options(BLOCK, x.dtype),
        )
    return outputs


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for, of contiguous tensors."""
    types = {"potentials": torch.float64, "n_iter": torch.int32, "converged": torch.bool}
    found = []
    for kernel in (_gromov_fwd_kernel, gromov_costs._cosine_kernel):
        names = kernel.arg_names
        tensors = names[: names.index("x_stride_b")]
        ones = {name: 1 for name in ("x_stride_k", "y_stride_l", "x_stride_d", "y_stride_d", "a_stride_n", "b_stride_m") if name in names}
        for dtype, sizes in BLOCKS.items():
            for BLOCK in sizes:
                name = f"{kernel.__name__.strip('_')} {str(dtype).removeprefix('torch.')} {BLOCK}"
                pointers = {name: types.get(name, dtype) for name in tensors}
                options = compiler_options(BLOCK, dtype) if kernel is _gromov_fwd_kernel else gromov_costs.compiler_options(BLOCK)
                found.append(Variant(name, kernel, pointers, ones | {"BLOCK": BLOCK}, options))
    return found
