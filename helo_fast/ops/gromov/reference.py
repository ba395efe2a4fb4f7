"""Gromov-Wasserstein in plain PyTorch: the truth that every other back end must equal, forward and backward.

Notation: C = cost_x, D = cost_y, M = cost_xy, T the plan, r = T 1 and s = T' 1 its marginals. The objective is
    alpha sum_ijkl (C_ik - D_jl)^2 T_ij T_kl + (1 - alpha) <T, M>,
and its quadratic part is r' C^2 r + s' D^2 s - 2 <T, C T D'> (squares entry by entry): no 4-index tensor exists.

The solvers linearise it: G_ij = (C^2 a)_i + (D^2 b)_j - 2 (C T D')_ij. Rounding in G comes back inner_iter / epsilon times as
large, so costs enter the product less their means c and d. Nothing else changes: of C T D' that leaves terms of i alone and of
j alone, which sum with the squares to ((C^2 - 2 d C) r)_i and ((D^2 - 2 c D) s)_j (a constant aside). The plan is blind to the
second in Sinkhorn, whose plans have r = a, and to the first in IPOT, whose plans have s = b; the one that is left is constant.

Rows and columns of zero mass take no part: whatever stands in their costs or tokens is never read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..sinkhorn import reference as sinkhorn

NORM_FLOOR = 1e-12  # of a token, in its cosine cost


def fwd(
    cost_x: Tensor,  # [B, n, n]
    cost_y: Tensor,  # [B, m, m]
    a: Tensor,  # [B, n]
    b: Tensor,  # [B, m]
    cost_xy: Tensor | None,  # [B, n, m]
    alpha: float,
    method: str,
    epsilon: float,
    outer_iter: int,
    inner_iter: int,
    tol: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(plan, gw_cost, marginal_error, n_iter, converged)."""
    batch = a.shape[0]
    inside = _pairs(a > 0, b > 0)
    C = torch.where(_pairs(a > 0, a > 0), cost_x, 0)
    D = torch.where(_pairs(b > 0, b > 0), cost_y, 0)
    M = None if cost_xy is None else torch.where(inside, cost_xy, 0)
    c, d = _mean(C, a), _mean(D, b)  # [B, 1, 1]
    if method == "proximal":
        offset = ((D.square() - 2 * c * D) * b.unsqueeze(-2)).sum(-1)  # [B, m]
    else:  # the gradient of the objective, twice G where costs are symmetric
        offset = ((C.square() + C.mT.square() - 2 * d * (C + C.mT)) * a.unsqueeze(-2)).sum(-1)  # [B, n]
    if M is not None:
        offset = alpha * offset
    plan = a.unsqueeze(-1) * b.unsqueeze(-2)
    running = torch.ones(batch, dtype=torch.bool, device=a.device)
    n_iter = torch.full((batch,), outer_iter, dtype=torch.int32, device=a.device)
    change = torch.full((batch,), math.inf, dtype=a.dtype, device=a.device)
    for iteration in range(1, outer_iter + 1):
        G = -2 * _between(C - c, plan, (D - d).mT)
        if method == "entropic":
            G = G - 2 * _between((C - c).mT, plan, D - d)
        if M is not None:
            G = alpha * G + (1 - alpha) * M
        if method == "proximal":
            new = _ipot(G, offset, a, b, inside, epsilon, inner_iter)
        else:
            G = G + offset.unsqueeze(-1)
            new = sinkhorn.fwd(G, a, b, epsilon, inner_iter, None, inner_iter, None, None, False)[0]
        change = torch.where(running, (new - plan).abs().sum((-2, -1)), change)
        plan = torch.where(running[:, None, None], new, plan)
        if tol is not None and iteration < outer_iter:
            done = running & (change <= tol)
            n_iter = torch.where(done, iteration, n_iter).to(torch.int32)
            running = running & ~done
            if a.device.type == "cpu" and not bool(running.any()):  # reading it on a GPU would synchronise
                break
    marginal_error = (plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)
    bound = sinkhorn.CONVERGED_BY_DEFAULT if tol is None else tol
    converged = (change <= bound) & (marginal_error <= bound)
    return plan.contiguous(), _objective(C - d, D - d, M, plan, alpha), marginal_error, n_iter, converged


def _pairs(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.unsqueeze(-1) & columns.unsqueeze(-2)


def _mean(cost: Tensor, mass: Tensor) -> Tensor:
    """Of the pairs that have mass, [B, 1, 1]."""
    return cost.sum((-2, -1), keepdim=True) / (mass > 0).sum(-1).square().clamp(min=1)[:, None, None]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right. BLAS takes another route for a batch of one, which rounds otherwise: such a batch is paired with itself."""
    if left.shape[0] == 1:
        left, right = left.expand(2, -1, -1), right.expand(2, -1, -1)
        return torch.bmm(left, right)[:1]
    return torch.bmm(left, right)


def _between(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    return _product(_product(left, middle), right)


def _ipot(G: Tensor, columns: Tensor, a: Tensor, b: Tensor, inside: Tensor, beta: float, steps: int) -> Tensor:
    """The inexact proximal point iteration on G_ij + columns_j from a plan of ones, in the log domain.

    In the plain domain, from T = 1 and s = 1: R = exp(-(G + columns)/beta) T, d = a / (R s), s = b / (R' d), T = diag(d) R diag(s).
    A term of i alone changes d alone. A term of j alone changes s alone, its start included, by exp(-columns/beta): so it may
    all go to the start. This serves ``columns``, and the minima of G's rows and columns, which would cost it digits.
    """
    G = torch.where(inside, G, math.inf)
    G = torch.where(inside, G - G.amin(-1, keepdim=True), math.inf)
    lowest = torch.where(b > 0, G.amin(-2), 0)  # [B, m]
    N = torch.where(inside, (lowest.unsqueeze(-2) - G) / beta, -math.inf)
    la, lb = a.log(), b.log()
    log_plan = torch.where(inside, torch.zeros_like(N), -math.inf)
    log_s = -(columns + lowest) / beta
    for _ in range(steps):
        log_R = log_plan + N
        log_d = torch.where(a > 0, la - torch.logsumexp(log_R + log_s.unsqueeze(-2), -1), 0)
        log_dR = log_R + log_d.unsqueeze(-1)
        log_s = torch.where(b > 0, lb - torch.logsumexp(log_dR, -2), 0)
        log_plan = log_dR + log_s.unsqueeze(-2)
    return log_plan.exp()


def _objective(C: Tensor, D: Tensor, M: Tensor | None, plan: Tensor, alpha: float) -> Tensor:
    """At the plan's own marginals. It is blind to a constant added to both C and D."""
    r, s = plan.sum(-1), plan.sum(-2)
    squares = sum((cost.square() * mass.unsqueeze(-1) * mass.unsqueeze(-2)).sum((-2, -1)) for cost, mass in ((C, r), (D, s)))
    quadratic = (squares - 2 * (plan * _between(C, plan, D.mT)).sum((-2, -1))).clamp(min=0)  # below 0 by rounding alone
    return quadratic if M is None else alpha * quadratic + (1 - alpha) * (plan * M).sum((-2, -1))


def bwd(
    cost_x: Tensor,  # [B, n, n]
    cost_y: Tensor,  # [B, m, m]
    plan: Tensor,  # [B, n, m]
    grad_cost: Tensor,  # [B]
    alpha: float,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The objective's gradient at fixed plan with respect to cost_x, cost_y and, if fused, cost_xy (else an empty tensor)."""
    grad = grad_cost[:, None, None]
    r, s = plan.sum(-1), plan.sum(-2)
    C = torch.where(_pairs(r > 0, r > 0), cost_x, 0)
    D = torch.where(_pairs(s > 0, s > 0), cost_y, 0)
    weight = 2 * alpha * grad if fused else 2 * grad
    d_x = weight * (C * r.unsqueeze(-1) * r.unsqueeze(-2) - _between(plan, D, plan.mT))
    d_y = weight * (D * s.unsqueeze(-1) * s.unsqueeze(-2) - _between(plan.mT, C, plan))
    d_xy = (1 - alpha) * grad * plan if fused else plan.new_empty(0)
    return d_x.contiguous(), d_y.contiguous(), d_xy.contiguous()


def from_tokens_fwd(
    x: Tensor,  # [B, n, d]
    y: Tensor,  # [B, m, d]
    a: Tensor,  # [B, n]
    b: Tensor,  # [B, m]
    cost_xy: Tensor | None,  # [B, n, m]
    threshold: float,
    over_batch: bool,
    alpha: float,
    *options: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """fwd on the thresholded cosine costs of x and of y; alpha < 1 without cost_xy takes their cosine cost across."""
    unit_x, _ = _unit(x, a)
    unit_y, _ = _unit(y, b)
    cost_x, *_ = _token_cost(unit_x, a, threshold, over_batch)
    cost_y, *_ = _token_cost(unit_y, b, threshold, over_batch)
    if cost_xy is None and alpha < 1:
        cost_xy = 1 - _product(unit_x, unit_y.mT)
    return fwd(cost_x, cost_y, a, b, cost_xy, alpha, *options)


def _unit(tokens: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens of norm 1, their norms [B, n, 1] before the floor); tokens without mass are 0."""
    tokens = torch.where((mass > 0).unsqueeze(-1), tokens, 0)
    norm = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return tokens / norm.clamp(min=NORM_FLOOR), norm


def _token_cost(unit: Tensor, mass: Tensor, threshold: float, over_batch: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(relu(c - t), c, min c, max c), c = 1 - cos and t = min c + threshold (max c - min c); extremes over pairs with mass."""
    inside = _pairs(mass > 0, mass > 0)
    cosine_cost = 1 - _product(unit, unit.mT)
    low = torch.where(inside, cosine_cost, math.inf).amin((-2, -1), keepdim=True)  # [B, 1, 1]
    high = torch.where(inside, cosine_cost, -math.inf).amax((-2, -1), keepdim=True)
    if over_batch and unit.shape[0] > 0:
        low, high = low.amin(0, keepdim=True), high.amax(0, keepdim=True)  # [1, 1, 1]
    return (cosine_cost - (low + threshold * (high - low))).relu(), cosine_cost, low, high


def from_tokens_bwd(
    x: Tensor,  # [B, n, d]
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
    """The objective's gradient at fixed plan with respect to x, y and, if given, cost_xy (else an empty tensor)."""
    unit_x, norm_x = _unit(x, a)
    unit_y, norm_y = _unit(y, b)
    cost_x, *ends_x = _token_cost(unit_x, a, threshold, over_batch)
    cost_y, *ends_y = _token_cost(unit_y, b, threshold, over_batch)
    fused = cross_given or alpha < 1
    d_cost_x, d_cost_y, d_xy = bwd(cost_x, cost_y, plan, grad_cost, alpha, fused)
    d_unit_x = _token_cost_bwd(d_cost_x, unit_x, a, cost_x, *ends_x, threshold)
    d_unit_y = _token_cost_bwd(d_cost_y, unit_y, b, cost_y, *ends_y, threshold)
    if fused and not cross_given:
        d_unit_x, d_unit_y = d_unit_x - _product(d_xy, unit_y), d_unit_y - _product(d_xy.mT, unit_x)
        d_xy = plan.new_empty(0)
    return _unit_bwd(d_unit_x, unit_x, norm_x), _unit_bwd(d_unit_y, unit_y, norm_y), d_xy


def _token_cost_bwd(
    d_cost: Tensor, unit: Tensor, mass: Tensor, cost: Tensor, cosine_cost: Tensor, low: Tensor, high: Tensor, threshold: float
) -> Tensor:
    """Gradient of the unit tokens; the threshold's own goes to the pairs that are the extremes, in equal parts."""
    inside = _pairs(mass > 0, mass > 0)
    over = (0, 1, 2) if low.shape[0] < cost.shape[0] else (1, 2)  # a batch of one is the same either way
    d = torch.where(inside & (cost > 0), d_cost, 0)
    d_threshold = -d.sum(over, keepdim=True)
    for end, share in ((low, 1 - threshold), (high, threshold)):
        at_end = inside & (cosine_cost == end)
        d = d + torch.where(at_end, share * d_threshold / at_end.sum(over, keepdim=True).clamp(min=1), 0)
    return -_product(d + d.mT, unit)


def _unit_bwd(d_unit: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    along = torch.where(norm > NORM_FLOOR, (unit * d_unit).sum(-1, keepdim=True), 0)  # at the floor the norm is a constant
    return ((d_unit - along * unit) / norm.clamp(min=NORM_FLOOR)).contiguous()
