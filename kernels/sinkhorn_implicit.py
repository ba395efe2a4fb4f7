"""Sinkhorn's gradient through the fixed point in Triton, one program per problem.

T is the plan, r = T 1, s = T' 1, lambda = epsilon / tau (0 if balanced), W the incoming gradient times T. The optimality conditions
give a symmetric system for the adjoints x, y of the log scalings,
    (1 + lambda_a) r_i x_i + sum_j T_ij y_j = w_i = sum_j W_ij + epsilon f_bar_i,    and likewise for columns;
its solution makes d_cost = (T (x + y) - W) / epsilon. "near" is the shorter of rows and columns, "far" the longer. Eliminating far
leaves the Laplacian of a graph on near: conductances c_jk = sum_i T_ij T_ik / ((1 + lambda) r_i) and, to the ground, e_j >= 0. It is
solved node by node, by additions of non-negative numbers alone: nothing cancels, however badly conditioned the system is.

Balanced problems do not see the constant (x + c, y - c): it is projected out of the right-hand side, and near has mean 0 in the
solution. A part of the graph without a link to the rest is grounded at one of its nodes.

Grid: x = problem (B may exceed 65535). Traffic: plan and incoming gradient are read twice, STEP entries of far at a time, and d_cost is
written once; the Laplacian [NEAR, NEAR] stays in registers. All in double: weak links between parts of the plan decide x and y.
Invariants: padding, and rows and columns without mass, are 0 in T, whatever stands in their cost and gradients. Offsets are 64-bit.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import device_guard
from .variant import Variant

STEP = tl.constexpr(16)
NO_LINK = tl.constexpr(1e-15)  # of a node's mass: a conductance below is rounding
SIZES = (16, 32, 64)  # of near


def serves(n: int, m: int) -> bool:
    """Whether the shorter side's Laplacian fits the registers."""
    return min(n, m) <= SIZES[-1]


def compiler_options(NEAR: int) -> dict[str, int | bool]:
    """Warps, so that a thread holds 8 or 16 entries of the Laplacian. The registers are bounded by name: ptxas, left alone, spills a
    little to fit in another block."""
    return {"num_warps": max(NEAR * NEAR // 512, 1), "num_stages": 1, "maxnreg": 255, "enable_fp_fusion": True}


@triton.jit
def _chunk(matrix, problem, i, j, inside):
    """[STEP, NEAR] of matrix = (pointer, strides of batch, far and near), in double; 0 where not inside."""
    pointer, stride_b, stride_far, stride_near = matrix
    at = pointer + problem * stride_b + i.to(tl.int64) * stride_far + j.to(tl.int64) * stride_near
    return tl.load(at, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _plan_and_gradient(plan, grad_plan, grad_columns, cost, grad_transport, cost_columns, problem, i, j, inside):
    """T, and the gradient that reaches it, directly and through transport_cost = <T, cost>: 0 where T is. Of grad_plan and cost as many
    columns are read as is said: all or none."""
    T = _chunk(plan, problem, i, j, inside)
    G = _chunk(grad_plan, problem, i, j, (T > 0) & (j < grad_columns))
    return T, G + grad_transport * _chunk(cost, problem, i, j, (T > 0) & (j < cost_columns))


@triton.jit
def _solve(links, ground, right, mass, size, NEAR: tl.constexpr):
    """y [NEAR, 1] from conductances [NEAR, NEAR], whose diagonal is not read, and ground, right-hand side and mass [NEAR, 1].

    Takes the nodes out one by one, a star becomes a mesh: c_jk += c_ji c_ik / d_i, and so with ground and right-hand side; d_i is the
    sum of all that leads from i. A node that is out keeps its right-hand side and links over d_i, and takes part in the same way.
    """
    j = tl.arange(0, NEAR)[:, None]
    k = tl.arange(0, NEAR)[None, :]
    # The last node takes up what rounding left of the others' right-hand sides: it must not be one of next to no mass.
    heaviest = tl.min(tl.where(mass == tl.max(mass), j, NEAR))
    turn_j = tl.where(j == heaviest, size - 1, tl.where(j == size - 1, heaviest, j))
    turn_k = tl.where(k == heaviest, size - 1, tl.where(k == size - 1, heaviest, k))
    for turn in range(size):
        its = turn_j == turn
        row = tl.sum(tl.where(its, links, 0.0), 0, keep_dims=True)  # [1, NEAR]
        row = tl.where(turn_k > turn, row, 0.0)
        column = tl.sum(tl.where(turn_k == turn, links, 0.0), 1, keep_dims=True)  # [NEAR, 1]
        its_ground = tl.sum(tl.where(its, ground, 0.0))
        pivot = its_ground + tl.sum(row)
        inverse = tl.where(pivot > NO_LINK * tl.sum(tl.where(its, mass, 0.0)), 1 / pivot, 0.0)
        column = tl.where(its, inverse, column * inverse)
        links = tl.where(its, 0.0, links) + column * row
        ground += column * its_ground
        its_right = tl.sum(tl.where(its, right, 0.0))
        right = tl.where(its, 0.0, right) + column * its_right
    return right


@triton.jit(
    do_not_specialize=[
        *("cost_stride_b", "cost_stride_far", "grad_stride_b", "grad_stride_far"),
        *("stride_far", "far", "near", "grad_columns", "cost_columns", "grad_far_count", "grad_near_count"),
    ]
)
def _sinkhorn_implicit_kernel(
    cost,  # [B, n, m], any strides
    mass_far,  # [B, far], a or b
    mass_near,  # [B, near]
    plan,  # [B, n, m]
    grad_plan,  # [B, n, m], any strides
    grad_far,  # [B, far], of f or g
    grad_near,  # [B, near]
    grad_transport,  # [B]
    d_cost,  # [B, n, m]
    d_far,  # [B, far]
    d_near,  # [B, near]
    cost_stride_b,
    cost_stride_far,
    cost_stride_near,
    grad_stride_b,
    grad_stride_far,
    grad_stride_near,
    stride_far,  # of plan and d_cost
    stride_near,
    far,
    near,
    grad_columns,  # what of grad_plan, cost, grad_far and grad_near is read: near or far entries, or 0 where there is no such gradient
    cost_columns,
    grad_far_count,
    grad_near_count,
    # A plain float would arrive as float32.
    epsilon: tl.float64,
    lambda_far: tl.float64,
    lambda_near: tl.float64,
    NEAR: tl.constexpr,
):
    epsilon = tl.full((), epsilon, tl.float64)
    lambda_far = tl.full((), lambda_far, tl.float64)
    lambda_near = tl.full((), lambda_near, tl.float64)
    balanced = (lambda_far == 0) & (lambda_near == 0)

    problem = tl.program_id(0).to(tl.int64)
    size = far.to(tl.int64) * near
    plan = (plan, size, stride_far, stride_near)
    cost = (cost, cost_stride_b, cost_stride_far, cost_stride_near)
    grad_plan = (grad_plan, grad_stride_b, grad_stride_far, grad_stride_near)
    envelope = tl.load(grad_transport + problem, mask=cost_columns > 0, other=0.0).to(tl.float64)
    step = tl.arange(0, STEP)[:, None]
    j = tl.arange(0, NEAR)[None, :]

    links = tl.zeros((NEAR, NEAR), tl.float64)
    mass = tl.zeros((1, NEAR), tl.float64)
    right = tl.zeros((1, NEAR), tl.float64)
    reach = tl.zeros((1, NEAR), tl.float64)  # sum_i T_ij / ((1 + lambda) r_i)
    excess = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.float64)
    for i0 in range(0, far, STEP):
        i = i0 + step
        inside = (i < far) & (j < near)
        T, G = _plan_and_gradient(plan, grad_plan, grad_columns, cost, envelope, cost_columns, problem, i, j, inside)
        far_mass = tl.sum(T, 1, keep_dims=True)  # [STEP, 1]
        f_bar = tl.load(grad_far + problem * far + i, mask=(far_mass > 0) & (i < grad_far_count), other=0.0).to(tl.float64)
        weight = tl.where(far_mass > 0, 1 / ((1 + lambda_far) * far_mass), 0.0)
        far_right = tl.sum(T * G, 1, keep_dims=True) + epsilon * f_bar
        mass += tl.sum(T, 0, keep_dims=True)
        right += tl.sum(T * (G - weight * far_right), 0, keep_dims=True)
        reach += tl.sum(T * weight, 0, keep_dims=True)
        excess += tl.sum(epsilon * f_bar)
        count += tl.sum((far_mass > 0).to(tl.float64))
        share = T * tl.sqrt(weight)
        links = tl.dot(tl.trans(share), share, links, input_precision="ieee", out_dtype=tl.float64)

    g_bar = tl.load(grad_near + problem * near + j, mask=(mass > 0) & (j < grad_near_count), other=0.0).to(tl.float64)
    right += epsilon * g_bar
    near_count = tl.sum((mass > 0).to(tl.float64))
    # Less the component along (1, -1). W itself has none, and the rounding of its sums stays where it is: shared out equally, it would
    # be large beside a tiny mass.
    excess = tl.where(balanced, (excess - tl.sum(epsilon * g_bar)) / tl.maximum(count + near_count, 1.0), 0.0)
    right += tl.where(mass > 0, excess * (1 + reach), 0.0)
    ground = (lambda_near + lambda_far / (1 + lambda_far)) * mass
    y = tl.trans(_solve(links, tl.trans(ground), tl.trans(right), tl.trans(mass), near, NEAR))
    y -= tl.where(balanced, tl.sum(tl.where(mass > 0, y, 0.0)) / tl.maximum(near_count, 1.0), 0.0)

    at = mass_near + problem * near + j
    b = tl.load(at, mask=j < near, other=0.0).to(tl.float64)
    d_b = tl.where(b > 0, ((1 + lambda_near) * mass * y - epsilon * g_bar) / b, 0.0)
    tl.store(d_near + problem * near + j, d_b, mask=j < near)
    for i0 in range(0, far, STEP):
        i = i0 + step
        inside = (i < far) & (j < near)
        T, G = _plan_and_gradient(plan, grad_plan, grad_columns, cost, envelope, cost_columns, problem, i, j, inside)
        far_mass = tl.sum(T, 1, keep_dims=True)
        f_bar = tl.load(grad_far + problem * far + i, mask=(far_mass > 0) & (i < grad_far_count), other=0.0).to(tl.float64)
        weight = tl.where(far_mass > 0, 1 / ((1 + lambda_far) * far_mass), 0.0)
        far_right = tl.sum(T * G, 1, keep_dims=True) + epsilon * f_bar - excess
        x = weight * (far_right - tl.sum(T * y, 1, keep_dims=True))
        dC = T * ((x + y - G) / epsilon + envelope)
        out = d_cost + problem * size + i.to(tl.int64) * stride_far + j.to(tl.int64) * stride_near
        tl.store(out, dC, mask=inside)
        a = tl.load(mass_far + problem * far + i, mask=i < far, other=0.0).to(tl.float64)
        d_a = tl.where(a > 0, ((1 + lambda_far) * far_mass * x - epsilon * f_bar) / a, 0.0)
        tl.store(d_far + problem * far + i, d_a, mask=i < far)


def sinkhorn_implicit_bwd(
    cost: Tensor,  # [B, n, m], as is grad_plan of any strides; all else is made contiguous
    a: Tensor,  # [B, n]
    b: Tensor,  # [B, m]
    plan: Tensor,  # [B, n, m]
    grad_plan: Tensor | None,  # [B, n, m]
    grad_f: Tensor | None,  # [B, n]
    grad_g: Tensor | None,  # [B, m]
    grad_cost: Tensor | None,  # [B], of transport_cost
    epsilon: float,
    tau_a: float | None,
    tau_b: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_cost, d_a, d_b), as the reference."""
    batch, n, m = plan.shape
    d_cost, d_a, d_b = plan.new_empty(batch, n, m), plan.new_empty(batch, n), plan.new_empty(batch, m)
    if batch == 0:
        return d_cost, d_a, d_b
    a, b, plan, grad_f, grad_g, grad_cost = (t if t is None else t.contiguous() for t in (a, b, plan, grad_f, grad_g, grad_cost))
    sides = [(a, grad_f, d_a, 0.0 if tau_a is None else epsilon / tau_a), (b, grad_g, d_b, 0.0 if tau_b is None else epsilon / tau_b)]
    matrices = [t.mT if m > n else t for t in (cost, plan if grad_plan is None else grad_plan, plan)]  # [B, far, near]
    (mass_far, grad_far, d_far, lambda_far), (mass_near, grad_near, d_near, lambda_near) = reversed(sides) if m > n else sides
    far, near = matrices[0].shape[1:]
    NEAR = max(SIZES[0], triton.next_power_of_2(near))
    with device_guard(plan):
        _sinkhorn_implicit_kernel[(batch,)](
            cost,
            mass_far,
            mass_near,
            plan,
            *(plan if t is None else t for t in (grad_plan, grad_far, grad_near, grad_cost)),
            d_cost,
            d_far,
            d_near,
            *matrices[0].stride(),
            *matrices[1].stride(),
            *matrices[2].stride()[1:],
            far,
            near,
            *(0 if t is None else count for t, count in ((grad_plan, near), (grad_cost, near), (grad_far, far), (grad_near, near))),
            epsilon,
            lambda_far,
            lambda_near,
            NEAR=NEAR,
            **compiler_options(NEAR),
        )
    return d_cost, d_a, d_b


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for, of contiguous tensors whose rows are the longer side."""
    names = _sinkhorn_implicit_kernel.arg_names
    tensors = names[: names.index("cost_stride_b")]
    return [
        Variant(
            f"{str(dtype).removeprefix('torch.')} {NEAR}",
            _sinkhorn_implicit_kernel,
            dict.fromkeys(tensors, dtype),
            {"NEAR": NEAR, "cost_stride_near": 1, "grad_stride_near": 1, "stride_near": 1},
            compiler_options(NEAR),
        )
        for dtype, NEAR in itertools.product((torch.float32, torch.float64), SIZES)
    ]
