"""The gradient of gromov_from_tokens' cost at fixed plan in Triton, one program per problem and space.

    c_ij = 1 - <u_i, u_j>, u = x / |x|;  C = relu(c - t), t = low + threshold (high - low), the extremes of c over pairs that have mass
    d_ij = dC_ij where C_ij > 0, and -sum(dC) (1 - threshold) of it in equal parts where c is lowest, threshold where it is highest
    du = -(d + d') u - dM v;  dx = (du - <u, du> u) / |x|

dC is gromov_bwd.py's; M the fused cost across to the other space's unit tokens v, where it is theirs. One kernel sums what the
threshold's share needs, for the batch to add up where the extremes are over it, the other one makes dx.
Grid: x = problem (B may exceed 65535). Traffic: c and dC are read twice, tokens thrice, mostly from cache; dx is written once.
float32 products are IEEE float32.
Invariants: tokens of zero mass are never read, and get a gradient of 0. Offsets between problems are 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import device_guard
from .gromov_bwd import gromov_bwd
from .gromov_costs import BLOCKS, NORM_FLOOR, SLICE, block, compiler_options, cosine_cost, inverse_norms, load_mass, load_tokens
from .variant import Variant


@triton.jit
def _slopes(cost, low, high, cut, slope, mass, mass_stride_n, n, end, problem, BLOCK: tl.constexpr):
    """dC where C > 0, and where c is lowest and highest, of pairs that have mass."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (load_mass(mass, i, n, mass_stride_n) > 0) & (load_mass(mass, j, n, mass_stride_n) > 0)
    at = problem * n * n + (i * n + j)
    c = tl.load(cost + at, mask=inside, other=0.0)
    d = tl.load(slope + at, mask=inside & (c - tl.load(cut + end) > 0), other=0.0)
    return d, inside & (c == tl.load(low + end)), inside & (c == tl.load(high + end))


@triton.jit(do_not_specialize=["n"])
def _threshold_kernel(
    mass,  # [B, n], any strides
    cost,  # [B, n, n], c
    low,  # [B], or of stride 0
    high,
    cut,  # t
    slope,  # [B, n, n], dC
    sums,  # [B, 3]: of d, and the numbers of pairs at the extremes
    mass_stride_b,
    mass_stride_n,
    end_stride_b,
    n,
    BLOCK: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    mass += problem * mass_stride_b
    d, lowest, highest = _slopes(cost, low, high, cut, slope, mass, mass_stride_n, n, problem * end_stride_b, problem, BLOCK)
    tl.store(sums + problem * 3, tl.sum(d))
    tl.store(sums + problem * 3 + 1, tl.sum(lowest.to(d.dtype)))
    tl.store(sums + problem * 3 + 2, tl.sum(highest.to(d.dtype)))


@triton.jit
def _d_unit(x, v, pairs, across, row, k, alive, v_alive, scale, v_scale, width, x_n, x_d, v_m, v_d, fused):
    """(u, du) of columns k."""
    dtype: tl.constexpr = pairs.dtype
    u = load_tokens(x, row, k, alive, width, x_n, x_d) * scale
    total = tl.dot(pairs, u, input_precision="ieee", out_dtype=dtype)
    if fused != 0:
        total = tl.dot(across, load_tokens(v, row, k, v_alive, width, v_m, v_d) * v_scale, total, input_precision="ieee", out_dtype=dtype)
    return u, -total


@triton.jit(do_not_specialize=["n", "m", "width", "fused"])
def _tokens_bwd_kernel(
    x,  # [B, n, width], any strides, as of all that have some
    mass,  # [B, n]
    cost,  # [B, n, n], c
    low,  # [B], or of stride 0
    high,
    cut,  # t
    slope,  # [B, n, n], dC
    sums,  # [B, 3], or of stride 0
    v,  # [B, m, width], the other space's tokens, if fused
    v_mass,  # [B, m]
    d_across,  # [B, n, m]
    d_x,  # [B, n, width]
    x_stride_b,
    x_stride_n,
    x_stride_d,
    mass_stride_b,
    mass_stride_n,
    end_stride_b,
    sums_stride_b,
    v_stride_b,
    v_stride_m,
    v_stride_d,
    v_mass_stride_b,
    v_mass_stride_m,
    d_across_stride_b,
    d_across_stride_n,
    d_across_stride_m,
    n,
    m,
    width,
    fused,
    threshold: tl.float64,  # a plain float would arrive as float32
    BLOCK: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = x.dtype.element_ty
    index = tl.arange(0, BLOCK)
    row, column = index[:, None], index[None, :]
    x += problem * x_stride_b
    mass += problem * mass_stride_b
    v += problem * v_stride_b
    v_mass += problem * v_mass_stride_b
    alive = load_mass(mass, row, n, mass_stride_n) > 0
    d, lowest, highest = _slopes(cost, low, high, cut, slope, mass, mass_stride_n, n, problem * end_stride_b, problem, BLOCK)
    share = tl.full((), threshold, dtype)
    sums += problem * sums_stride_b
    total = -tl.load(sums)
    d += tl.where(lowest, (1.0 - share) * total / tl.maximum(tl.load(sums + 1), 1.0), 0.0)
    d += tl.where(highest, share * total / tl.maximum(tl.load(sums + 2), 1.0), 0.0)
    pairs = d + tl.trans(d)
    scale = inverse_norms(x, row, alive, width, x_stride_n, x_stride_d, BLOCK)
    v_alive, v_scale, across = row < 0, tl.zeros((BLOCK, 1), dtype), tl.zeros((BLOCK, BLOCK), dtype)
    if fused != 0:
        v_alive = load_mass(v_mass, row, m, v_mass_stride_m) > 0
        v_scale = inverse_norms(v, row, v_alive, width, v_stride_m, v_stride_d, BLOCK)
        at = d_across + problem * d_across_stride_b + row * d_across_stride_n + column * d_across_stride_m
        across = tl.load(at, mask=(row < n) & (column < m), other=0.0)
    along = tl.zeros((BLOCK, 1), dtype)
    for start in range(0, width, SLICE):
        k = start + tl.arange(0, SLICE)[None, :]
        u, du = _d_unit(
            *(x, v, pairs, across, row, k, alive, v_alive, scale, v_scale),
            *(width, x_stride_n, x_stride_d, v_stride_m, v_stride_d, fused),
        )
        along += tl.sum(u * du, 1, keep_dims=True)
    along = tl.where(scale < 0.999999 / NORM_FLOOR, along, 0.0)  # at the floor the norm is a constant
    for start in range(0, width, SLICE):
        k = start + tl.arange(0, SLICE)[None, :]
        u, du = _d_unit(
            *(x, v, pairs, across, row, k, alive, v_alive, scale, v_scale),
            *(width, x_stride_n, x_stride_d, v_stride_m, v_stride_d, fused),
        )
        tl.store(d_x + problem * n * width + row * width + k, (du - along * u) * scale, mask=(row < n) & (k < width))


def gromov_tokens_bwd(
    x: Tensor,  # [B, n, d], any strides, as of all others
    y: Tensor,  # [B, m, d]
    a: Tensor,  # [B, n]
    b: Tensor,  # [B, m]
    plan: Tensor,  # [B, n, m]
    grad_cost: Tensor,  # [B]
    threshold: float,
    over_batch: bool,
    alpha: float,
    cross_given: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_x, d_y, d_xy), as the reference: d_xy is empty unless a cost across was given."""
    if plan.shape[0] == 0:
        return x.new_empty(x.shape), y.new_empty(y.shape), plan.new_empty(plan.shape if cross_given else (0,))
    cost_x, *ends_x = cosine_cost(x, x, a, a)
    cost_y, *ends_y = cosine_cost(y, y, b, b)
    if over_batch:
        ends_x, ends_y = ((low.amin(0, keepdim=True), high.amax(0, keepdim=True)) for low, high in (ends_x, ends_y))
    cut_x, cut_y = (low + threshold * (high - low) for low, high in (ends_x, ends_y))
    fused = cross_given or alpha < 1
    d_cost_x, d_cost_y, d_xy = gromov_bwd(cost_x, cost_y, plan, grad_cost, alpha, fused, (cut_x, cut_y))
    across = fused and not cross_given
    d_x = _space_bwd(x, a, cost_x, (*ends_x, cut_x), d_cost_x, threshold, over_batch, (y, b, d_xy) if across else None)
    d_y = _space_bwd(y, b, cost_y, (*ends_y, cut_y), d_cost_y, threshold, over_batch, (x, a, d_xy.mT) if across else None)
    return d_x, d_y, d_xy if cross_given else plan.new_empty(0)


def _space_bwd(
    x: Tensor,
    mass: Tensor,
    cost: Tensor,
    ends: tuple[Tensor, Tensor, Tensor],  # extremes and threshold, [B], or one each if over_batch
    slope: Tensor,
    threshold: float,
    over_batch: bool,
    across: tuple[Tensor, Tensor, Tensor] | None,  # the other space's tokens and masses, and the gradient [B, n, m] of the cost across
) -> Tensor:
    batch, n, width = x.shape
    sums, d_x = x.new_empty(batch, 3), x.new_empty(x.shape)
    end_stride = 0 if over_batch else 1
    BLOCK = block(n, across[0].shape[1] if across else n, x.dtype)
    options = {"BLOCK": BLOCK, **compiler_options(BLOCK)}
    with device_guard(x):
        _threshold_kernel[(batch,)](mass, cost, *ends, slope, sums, *mass.stride(), end_stride, n, **options)
        if over_batch:
            sums = sums.sum(0, keepdim=True)
        v, v_mass, d_across = across or (x, mass, cost)
        _tokens_bwd_kernel[(batch,)](
            *(x, mass, cost, *ends, slope, sums, v, v_mass, d_across, d_x),
            *(*x.stride(), *mass.stride(), end_stride, 0 if over_batch else 3),
            *(*v.stride(), *v_mass.stride(), *d_across.stride()),
            *(n, v.shape[1], width, int(across is not None), threshold),
            **options,
        )
    return d_x


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for, of contiguous tensors."""
    found = []
    for kernel in (_threshold_kernel, _tokens_bwd_kernel):
        names = kernel.arg_names
        tensors = names[: next(k for k, name in enumerate(names) if "_stride_" in name)]
        ones = {name: 1 for name in ("x_stride_d", "mass_stride_n", "v_stride_d", "v_mass_stride_m", "d_across_stride_m") if name in names}
        for dtype, sizes in BLOCKS.items():
            for BLOCK in sizes:
                name = f"{kernel.__name__.strip('_')} {str(dtype).removeprefix('torch.')} {BLOCK}"
                found.append(Variant(name, kernel, dict.fromkeys(tensors, dtype), ones | {"BLOCK": BLOCK}, compiler_options(BLOCK)))
    return found
