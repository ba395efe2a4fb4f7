"""Sinkhorn in plain PyTorch: the truth that every other back end must equal, forward and both backwards.

Notation: phi = f / epsilon and gamma = g / epsilon are scaled potentials, M = -cost / epsilon, la = log a, lb = log b;
T = exp(la_i + lb_j + phi_i + gamma_j + M_ij). kappa = tau / (tau + epsilon), which is 1 for a hard marginal.
Rows and columns of zero mass take no part: their entries of M, la and lb are -inf.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CONVERGED_BY_DEFAULT = 1e-4  # L1 marginal error that counts as converged where no tol is given


def marginals(cost: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """(a [B, n], b [B, m]), uniform where None."""
    batch, n, m = cost.shape
    return cost.new_full((batch, n), 1 / n) if a is None else a, cost.new_full((batch, m), 1 / m) if b is None else b


def with_partners(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Masses [B, n] and [B, m], 0 where the other side has none at all: such an unbalanced problem moves nothing."""
    both = (a > 0).any(-1, keepdim=True) & (b > 0).any(-1, keepdim=True)
    return torch.where(both, a, 0), torch.where(both, b, 0)


def _log_problem(cost: Tensor, a: Tensor, b: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """(M, la, lb), with -inf wherever mass is zero (so that whatever stands in padding is never read)."""
    inside = (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2)
    return torch.where(inside, -cost / epsilon, -math.inf), a.log(), b.log()


def _damping(tau: float | None, epsilon: float) -> float:
    return 1.0 if tau is None else tau / (tau + epsilon)


def _soft_transform(log_terms: Tensor, damping: float, mass: Tensor) -> Tensor:
    """-damping * logsumexp over the last axis, and -inf where there is no mass."""
    return torch.where(mass > 0, -damping * torch.logsumexp(log_terms, -1), -math.inf)


def fwd(
    cost: Tensor,  # [B, n, m]
    a: Tensor | None,  # [B, n]
    b: Tensor | None,  # [B, m]
    epsilon: float,
    max_iter: int,
    tol: float | None,
    check_every: int,
    tau_a: float | None,
    tau_b: float | None,
    keep_history: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """(plan, f, g, transport_cost, marginal_error, n_iter, converged, history [B, max_iter, n + m] of (phi, gamma) if kept)."""
    batch, n, m = cost.shape
    a, given_b = marginals(cost, a, b)
    a, b = with_partners(a, given_b)
    alone = (given_b - b).sum(-1)  # [B], the mass that finds no partner
    M, la, lb = _log_problem(cost, a, b, epsilon)
    to_columns = (M + la.unsqueeze(-1)).mT.contiguous()  # [B, m, n]: sums then run along the last axis, which torch does fastest
    to_rows = M + lb.unsqueeze(-2)  # [B, n, m]
    kappa_a, kappa_b = _damping(tau_a, epsilon), _damping(tau_b, epsilon)
    slope_b = 0.0 if tau_b is None else epsilon / tau_b
    phi = torch.where(a > 0, torch.zeros_like(a), -math.inf)  # [B, n]
    gamma = torch.where(b > 0, torch.zeros_like(b), -math.inf)  # [B, m]
    running = torch.ones(batch, dtype=torch.bool, device=cost.device)
    n_iter = torch.full((batch,), max_iter, dtype=torch.int32, device=cost.device)
    history = cost.new_zeros(batch, max_iter, n + m) if keep_history else None
    for iteration in range(1, max_iter + 1):
        new_gamma = _soft_transform(to_columns + phi.unsqueeze(-2), kappa_b, b)
        new_phi = _soft_transform(to_rows + new_gamma.unsqueeze(-2), kappa_a, a)
        gamma = torch.where(running.unsqueeze(-1), new_gamma, gamma)
        phi = torch.where(running.unsqueeze(-1), new_phi, phi)
        if keep_history:
            history[:, iteration - 1] = torch.cat([phi, gamma], -1)
        if tol is not None and (iteration % check_every == 0) and iteration < max_iter:
            plan = _plan(M, la, lb, phi, gamma)
            done = running & (_marginal_error(plan, b, gamma, slope_b) + alone <= tol)
            n_iter = torch.where(done, iteration, n_iter).to(torch.int32)
            running = running & ~done
            if cost.device.type == "cpu" and not bool(running.any()):  # reading it on a GPU would synchronise
                break
    plan = _plan(M, la, lb, phi, gamma)
    transport_cost = torch.where(plan > 0, plan * cost, 0).sum((-2, -1))
    marginal_error = _marginal_error(plan, b, gamma, slope_b) + alone
    return plan, epsilon * phi, epsilon * gamma, transport_cost, marginal_error, n_iter, converged(marginal_error, tol), history


def converged(marginal_error: Tensor, tol: float | None) -> Tensor:
    return marginal_error <= (CONVERGED_BY_DEFAULT if tol is None else tol)


def _plan(M: Tensor, la: Tensor, lb: Tensor, phi: Tensor, gamma: Tensor) -> Tensor:
    return torch.exp((la + phi).unsqueeze(-1) + (lb + gamma).unsqueeze(-2) + M)


def _marginal_error(plan: Tensor, b: Tensor, gamma: Tensor, slope_b: float) -> Tensor:
    """L1 distance of the column marginal from the one that optimality asks for: b, or b exp(-g / tau_b) if unbalanced."""
    target = torch.where(b > 0, b * torch.exp(-slope_b * gamma), 0) if slope_b else b
    return (plan.sum(-2) - target).abs().sum(-1)


def implicit_bwd(
    cost: Tensor,  # [B, n, m]
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
    """Gradients of (cost, a, b) through the fixed point.

    With x, y the adjoints of the log scalings, the optimality conditions give the symmetric system
        (1 + lambda_a) r_i x_i + sum_j T_ij y_j = w_i,    sum_i T_ij x_i + (1 + lambda_b) s_j y_j = z_j,
    r = T 1, s = T' 1, lambda = epsilon / tau (0 if balanced), solved in float64 by eliminating x. What is left is a graph
    Laplacian plus a non-negative diagonal: its diagonal is summed from its off-diagonals, so nothing cancels.
    In the balanced case it is singular along the constant (f + c, g - c): that direction is projected out.
    """
    dtype = cost.dtype
    cost, a, b, T = (t.double() for t in (cost, a, b, plan))
    cost = torch.where(T > 0, cost, 0)
    lambda_a = 0.0 if tau_a is None else epsilon / tau_a
    lambda_b = 0.0 if tau_b is None else epsilon / tau_b
    G = torch.zeros_like(T) if grad_plan is None else grad_plan.double()
    if grad_cost is not None:
        G = G + grad_cost.double()[:, None, None] * cost
    W = torch.where(T > 0, G * T, 0)
    f_bar = torch.zeros_like(a) if grad_f is None else torch.where(a > 0, grad_f.double(), 0)
    g_bar = torch.zeros_like(b) if grad_g is None else torch.where(b > 0, grad_g.double(), 0)
    w = W.sum(-1) + epsilon * f_bar  # [B, n]
    z = W.sum(-2) + epsilon * g_bar  # [B, m]
    x, y = _solve_optimality(T, w, z, lambda_a, lambda_b)
    d_cost = (T * (x.unsqueeze(-1) + y.unsqueeze(-2)) - W) / epsilon
    if grad_cost is not None:
        d_cost = d_cost + grad_cost.double()[:, None, None] * T
    d_a = torch.where(a > 0, ((1 + lambda_a) * T.sum(-1) * x - epsilon * f_bar) / a, 0)
    d_b = torch.where(b > 0, ((1 + lambda_b) * T.sum(-2) * y - epsilon * g_bar) / b, 0)
    return d_cost.to(dtype), d_a.to(dtype), d_b.to(dtype)


def _solve_optimality(T: Tensor, w: Tensor, z: Tensor, lambda_a: float, lambda_b: float) -> tuple[Tensor, Tensor]:
    """(x [B, n], y [B, m]) of the system above; zero where a row or column holds no mass."""
    if T.shape[-1] > T.shape[-2]:  # eliminate the longer side
        y, x = _solve_optimality(T.mT, z, w, lambda_b, lambda_a)
        return x, y
    r, s = T.sum(-1), T.sum(-2)
    rows, columns = r > 0, s > 0
    inverse_r = torch.where(rows, 1 / ((1 + lambda_a) * r), 0)
    coupling = T.mT @ (T * inverse_r.unsqueeze(-1))  # [B, m, m]
    coupling.diagonal(dim1=-2, dim2=-1).zero_()
    diagonal = coupling.sum(-1) + (lambda_b + lambda_a / (1 + lambda_a)) * s
    scale = diagonal.amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    system = -coupling
    if lambda_a == 0 and lambda_b == 0:  # pin the constant direction, which the right-hand side does not meet
        system = system + (scale / columns.sum(-1, keepdim=True).clamp(min=1) * columns).unsqueeze(-1) * columns.unsqueeze(-2)
        w, z = _without_constant(w, z, rows, columns)
    diagonal = torch.where(columns, diagonal + 1e-15 * scale, 1)  # a column alone in its component still needs a pivot
    system = system + torch.diag_embed(diagonal)
    right = torch.where(columns, z - (T.mT @ (inverse_r * w).unsqueeze(-1)).squeeze(-1), 0)
    y = _solve_each(system, right)
    y = torch.where(columns, y, 0)
    x = inverse_r * (w - (T @ y.unsqueeze(-1)).squeeze(-1))
    return x, y


def _solve_each(system: Tensor, right: Tensor) -> Tensor:
    """Solutions [B, m] of dense systems [B, m, m]. On the CPU, larger ones go to LAPACK one by one: torch factors a batch of them
    concurrently, which after torch.set_num_threads gives wrong results without an error (pytorch/pytorch#142815, at m of 150 and more)."""
    if system.device.type == "cpu" and system.shape[-1] > 64 and len(system) > 1:
        return torch.stack([torch.linalg.solve_ex(matrix, vector)[0] for matrix, vector in zip(system, right)])
    return torch.linalg.solve_ex(system, right)[0]


def _without_constant(w: Tensor, z: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(w, z) less its component along (1, -1), to which the potentials are blind."""
    count = (rows.sum(-1) + columns.sum(-1)).clamp(min=1)
    excess = ((w.sum(-1) - z.sum(-1)) / count).unsqueeze(-1)
    return torch.where(rows, w - excess, 0), torch.where(columns, z + excess, 0)


def unrolled_bwd(
    cost: Tensor,  # [B, n, m]
    a: Tensor,  # [B, n]
    b: Tensor,  # [B, m]
    plan: Tensor,  # [B, n, m]
    history: Tensor,  # [B, max_iter, n + m]
    n_iter: Tensor,  # [B]
    grad_plan: Tensor | None,
    grad_f: Tensor | None,
    grad_g: Tensor | None,
    grad_cost: Tensor | None,
    epsilon: float,
    tau_a: float | None,
    tau_b: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact derivative of the iterations that ran: each is rebuilt from its stored potentials and reversed."""
    n = cost.shape[-2]
    a, b = with_partners(a, b)
    M, la, lb = _log_problem(cost, a, b, epsilon)
    kappa_a, kappa_b = _damping(tau_a, epsilon), _damping(tau_b, epsilon)
    start = torch.where(a > 0, torch.zeros_like(a), -math.inf)
    T = plan
    G = torch.zeros_like(T) if grad_plan is None else grad_plan
    d_cost = torch.zeros_like(cost)
    if grad_cost is not None:
        G = G + grad_cost[:, None, None] * torch.where(T > 0, cost, 0)
        d_cost = grad_cost[:, None, None] * T
    W = torch.where(T > 0, G * T, 0)
    d_M, d_la, d_lb = W, W.sum(-1), W.sum(-2)
    phi_bar = W.sum(-1) + (0 if grad_f is None else torch.where(a > 0, epsilon * grad_f, 0))
    gamma_bar = W.sum(-2) + (0 if grad_g is None else torch.where(b > 0, epsilon * grad_g, 0))
    for iteration in range(history.shape[1], 0, -1):
        ran = (iteration <= n_iter).unsqueeze(-1)  # [B, 1]
        gamma = history[:, iteration - 1, n:]
        before = history[:, iteration - 2, :n] if iteration > 1 else start
        # phi = -kappa_a logsumexp_j(lb + gamma + M): its weights over j are a softmax
        flow = phi_bar.unsqueeze(-1) * torch.softmax(_rows_with_mass((lb + gamma).unsqueeze(-2) + M, a, -1), -1)
        flow = torch.where(ran.unsqueeze(-1), -kappa_a * flow, 0)
        d_M, d_lb = d_M + flow, d_lb + flow.sum(-2)
        new_gamma_bar = gamma_bar + flow.sum(-2)
        # gamma = -kappa_b logsumexp_i(la + before + M)
        flow = new_gamma_bar.unsqueeze(-2) * torch.softmax(_rows_with_mass((la + before).unsqueeze(-1) + M, b, -2), -2)
        flow = torch.where(ran.unsqueeze(-1), -kappa_b * flow, 0)
        d_M, d_la = d_M + flow, d_la + flow.sum(-1)
        phi_bar = torch.where(ran, flow.sum(-1), phi_bar)
        gamma_bar = torch.where(ran, torch.zeros_like(gamma_bar), gamma_bar)
    d_a = torch.where(a > 0, d_la / a, 0)
    d_b = torch.where(b > 0, d_lb / b, 0)
    return d_cost - d_M / epsilon, d_a, d_b


def _rows_with_mass(logits: Tensor, mass: Tensor, dim: int) -> Tensor:
    """Logits with 0 in place of slices that are all -inf (no mass), whose softmax would be NaN; their incoming gradient is 0."""
    return torch.where((mass > 0).unsqueeze(dim), logits, 0)
