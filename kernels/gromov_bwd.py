"""The gradient of gromov_wasserstein's cost at fixed plan in Triton, one program per problem.

    d_x_ik = w (C_ik r_i r_k - (T D T')_ik),  d_y_jl = w (D_jl s_j s_l - (T' C T)_jl),  d_xy = (1 - alpha) grad T,
    w = 2 alpha grad;  T the plan, r = T 1 and s = T' 1 its marginals, C = cost_x, D = cost_y;  alpha = 1 unless fused.

Grid: x = problem (B may exceed 65535). Traffic: each gradient is written once; costs are read twice and the plan 2 (2 + BLOCK / SLICE)
times, mostly from cache. A product of three sums over slices of the product of the first two, which no memory holds. float32 products
are IEEE float32.
Invariants: costs of rows and columns that the plan leaves empty are never read and get a gradient of 0. Offsets are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import device_guard
from .gromov_costs import BLOCKS, SLICE, block, compiler_options, cut_off
from .variant import Variant


@triton.jit
def _load(matrix, i, j, stride_i, stride_j, mask):
    return tl.load(matrix + i.to(tl.int64) * stride_i + j.to(tl.int64) * stride_j, mask=mask, other=0.0)


@triton.jit
def _space_bwd(space, other_space, plan, plan_i, plan_j, grad, n, m, weight, BLOCK: tl.constexpr):
    """grad [n, n] = weight (cost r r' - T other T') for T = plan [n, m] and other [m, m]. A space = (pointer to costs, strides of rows
    and columns, threshold or -inf where there is none)."""
    cost, cost_i, cost_k, cut = space
    other, other_j, other_q, other_cut = other_space
    dtype: tl.constexpr = plan.dtype.element_ty
    index = tl.arange(0, BLOCK)
    down, across = index[:, None], index[None, :]
    total = tl.zeros((BLOCK, BLOCK), dtype)
    for start in range(0, m, SLICE):
        q = start + tl.arange(0, SLICE)[None, :]
        T_q = _load(plan, down, q, plan_i, plan_j, (down < n) & (q < m))
        q_alive = tl.sum(T_q, 0, keep_dims=True) > 0
        middle = tl.zeros((BLOCK, SLICE), dtype)  # (T other) [n, q]
        for first in range(0, m, SLICE):
            j = first + tl.arange(0, SLICE)[None, :]
            T_j = _load(plan, down, j, plan_i, plan_j, (down < n) & (j < m))
            j_alive = tl.sum(T_j, 0, keep_dims=True) > 0
            D = cut_off(_load(other, tl.trans(j), q, other_j, other_q, tl.trans(j_alive) & q_alive), other_cut)
            middle = tl.dot(T_j, D, middle, input_precision="ieee", out_dtype=dtype)
        total = tl.dot(middle, tl.trans(T_q), total, input_precision="ieee", out_dtype=dtype)
    r = tl.zeros((BLOCK, 1), dtype)
    for start in range(0, m, SLICE):
        j = start + tl.arange(0, SLICE)[None, :]
        r += tl.sum(_load(plan, down, j, plan_i, plan_j, (down < n) & (j < m)), 1, keep_dims=True)
    r_across = tl.trans(r)
    C = cut_off(_load(cost, down, across, cost_i, cost_k, (r > 0) & (r_across > 0)), cut)
    tl.store(grad + down * n + across, weight * (C * r * r_across - total), mask=(down < n) & (across < n))


@triton.jit(do_not_specialize=["n", "m", "fused", "from_tokens"])
def _gromov_bwd_kernel(
    x,  # [B, n, n] costs, any strides
    y,  # [B, m, m]
    plan,  # [B, n, m], contiguous, as the results
    grad_cost,  # [B], any stride
    cut_x,  # [B], or of stride 0, if from_tokens
    cut_y,
    d_x,  # [B, n, n]
    d_y,  # [B, m, m]
    d_xy,  # [B, n, m] if fused
    x_stride_b,
    x_stride_n,
    x_stride_k,
    y_stride_b,
    y_stride_m,
    y_stride_l,
    grad_stride_b,
    cut_stride_b,
    n,
    m,
    fused,
    from_tokens,
    alpha: tl.float64,  # a plain float would arrive as float32
    BLOCK: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    grad = tl.load(grad_cost + problem * grad_stride_b)
    cross_weight = tl.full((), 1.0 - alpha, grad.dtype) * grad
    weight = tl.full((), 2.0 * alpha, grad.dtype) * grad
    x += problem * x_stride_b
    y += problem * y_stride_b
    plan += problem * n * m
    d_x += problem * n * n
    d_y += problem * m * m
    at_x, at_y = tl.full((), float("-inf"), grad.dtype), tl.full((), float("-inf"), grad.dtype)
    if from_tokens != 0:
        at_x, at_y = tl.load(cut_x + problem * cut_stride_b), tl.load(cut_y + problem * cut_stride_b)
    X, Y = (x, x_stride_n, x_stride_k, at_x), (y, y_stride_m, y_stride_l, at_y)
    _space_bwd(X, Y, plan, m, 1, d_x, n, m, weight, BLOCK)
    _space_bwd(Y, X, plan, 1, m, d_y, m, n, weight, BLOCK)
    if fused != 0:
        row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
        inside, at = (row < n) & (column < m), row * m + column
        tl.store(d_xy + problem * n * m + at, cross_weight * tl.load(plan + at, mask=inside, other=0.0), mask=inside)


def gromov_bwd(
    cost_x: Tensor,  # [B, n, n], any strides
    cost_y: Tensor,  # [B, m, m], any strides
    plan: Tensor,  # [B, n, m]
    grad_cost: Tensor,  # [B], any stride
    alpha: float,
    fused: bool,
    cuts: tuple[Tensor, Tensor] | None = None,  # thresholds [B], or one, of costs that are tokens' cosine costs
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_x, d_y, d_xy), as the reference: d_xy is empty unless fused."""
    batch, n, m = plan.shape
    d_x, d_y = plan.new_empty(batch, n, n), plan.new_empty(batch, m, m)
    d_xy = plan.new_empty(plan.shape if fused else (0,))
    if batch == 0:
        return d_x, d_y, d_xy
    plan = plan.contiguous()  # as the forward gave it
    BLOCK = block(n, m, plan.dtype)
    strides = *cost_x.stride(), *cost_y.stride(), *grad_cost.stride()
    with device_guard(plan):
        _gromov_bwd_kernel[(batch,)](
            *(cost_x, cost_y, plan, grad_cost, *(cuts or (plan, plan)), d_x, d_y, d_xy if fused else plan),
            *(*strides, int(cuts is not None and cuts[0].numel() > 1)),
            *(n, m, int(fused), int(cuts is not None), alpha if fused else 1.0),
            BLOCK=BLOCK,
            **compiler_options(BLOCK),
        )
    return d_x, d_y, d_xy


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for, of contiguous tensors."""
    names = _gromov_bwd_kernel.arg_names
    tensors = names[: names.index("x_stride_b")]
    ones = dict.fromkeys(("x_stride_k", "y_stride_l", "grad_stride_b"), 1)
    return [
        Variant(
            f"gromov_bwd_kernel {str(dtype).removeprefix('torch.')} {BLOCK}",
            _gromov_bwd_kernel,
            dict.fromkeys(tensors, dtype),
            ones | {"BLOCK": BLOCK},
            compiler_options(BLOCK),
        )
        for dtype, sizes in BLOCKS.items()
        for BLOCK in sizes
    ]
