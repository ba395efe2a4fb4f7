"""What the package is measured against: other libraries, and the plain formulas under ordinary autograd.

Each answers what the operator answers, and the benchmarks hold it to that before they time it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import helo_fast
from helo_fast.model import HeLoConfig, helo
from helo_fast.ops.gromov import reference as gromov
from helo_fast.ops.sinkhorn import reference

DROPPED = -1e12  # what DropKey adds to a logit


def pot_sinkhorn(cost: Tensor, epsilon: float, max_iter: int, tol: float | None) -> Tensor:
    """POT's batched log-domain solver; its plan [B, n, m]. tol None runs all iterations.

    POT updates rows first and columns last: on the transposed problem (uniform marginals) its iterates are ours, so ``cost`` is
    [B, m, n] here and the plan's transpose is the answer.
    """
    from ot.batch import solve_batch  # slow to import, and only the dev extra brings it

    result = solve_batch(cost, epsilon, max_iter=max_iter, tol=-1 if tol is None else tol, method="log_sinkhorn", grad="detach")
    return result.plan.mT


def compiled_sinkhorn() -> Callable[[Tensor, float, int], Tensor]:
    """The eager reference under torch.compile: (cost, epsilon, max_iter) -> plan.

    The reference's iteration is compiled and called in a loop: unrolled whole, a hundred iterations take minutes to compile and
    run no faster.
    """

    @torch.compile(dynamic=False)
    def iteration(to_columns: Tensor, to_rows: Tensor, a: Tensor, b: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        gamma = reference._soft_transform(to_columns + phi.unsqueeze(-2), 1.0, b)
        return reference._soft_transform(to_rows + gamma.unsqueeze(-2), 1.0, a), gamma

    @torch.no_grad()
    def solve(cost: Tensor, epsilon: float, max_iter: int) -> Tensor:
        batch, n, m = cost.shape
        a, b = cost.new_full((batch, n), 1 / n), cost.new_full((batch, m), 1 / m)
        M, la, lb = reference._log_problem(cost, a, b, epsilon)
        to_columns, to_rows = (M + la.unsqueeze(-1)).mT.contiguous(), M + lb.unsqueeze(-2)
        phi = torch.zeros_like(a)
        for _ in range(max_iter):
            phi, gamma = iteration(to_columns, to_rows, a, b, phi)
        return reference._plan(M, la, lb, phi, gamma)

    return solve


def unrolled_sinkhorn(cost: Tensor, epsilon: float, max_iter: int) -> Tensor:
    """The log-domain iterations as one writes them, for autograd to differentiate: its graph keeps every one of them."""
    n, m = cost.shape[-2:]
    M = -cost / epsilon
    log_u = cost.new_zeros(cost.shape[:-1])  # [B, n]
    for _ in range(max_iter):
        log_v = -torch.logsumexp(M + log_u.unsqueeze(-1), -2) - math.log(m)
        log_u = -torch.logsumexp(M + log_v.unsqueeze(-2), -1) - math.log(n)
    return torch.exp(log_u.unsqueeze(-1) + M + log_v.unsqueeze(-2))


def naive_gromov(
    x: Tensor,  # [B, n, D]
    y: Tensor,  # [B, m, D]
    *,
    threshold_over: str,
    threshold: float = 0.1,
    beta: float = 0.1,
    outer_iter: int = 5,
    inner_iter: int = 20,
) -> Tensor:
    """The released solver as its formulas stand; autograd records every step."""
    C, D = (_thresholded_cost(tokens, threshold, threshold_over) for tokens in (x, y))
    (batch, n), m = C.shape[:2], D.shape[1]
    p, q = C.new_full((batch, n, 1), 1 / n), C.new_full((batch, m, 1), 1 / m)
    L = C.square() @ p + (D.square() @ q).mT  # [B, n, m]
    T = p @ q.mT
    for _ in range(outer_iter):
        A = torch.exp(-(L - 2 * C @ T @ D.mT) / beta)
        T, s = torch.ones_like(T), q
        for _ in range(inner_iter):
            R = A * T
            d = 1 / (n * (R @ s))
            s = 1 / (m * (R.mT @ d))
            T = d * R * s.mT
    return T


def compiled_gromov() -> Callable[[Tensor, Tensor], Tensor]:
    """The eager reference under torch.compile: (x, y) -> plan, thresholds over the batch, epsilon 0.1, 5 x 20 iterations.

    As in compiled_sinkhorn, the inner step is compiled and called in a loop.
    """

    @torch.compile(dynamic=False)
    def step(log_plan: Tensor, N: Tensor, log_s: Tensor) -> tuple[Tensor, Tensor]:
        n, m = N.shape[-2:]
        log_R = log_plan + N
        log_d = -math.log(n) - torch.logsumexp(log_R + log_s.unsqueeze(-2), -1)
        log_dR = log_R + log_d.unsqueeze(-1)
        log_s = -math.log(m) - torch.logsumexp(log_dR, -2)
        return log_dR + log_s.unsqueeze(-2), log_s

    @torch.no_grad()
    def solve(x: Tensor, y: Tensor) -> Tensor:
        a, b = (tokens.new_full(tokens.shape[:2], 1 / tokens.shape[1]) for tokens in (x, y))
        C, D = (gromov._token_cost(gromov._unit(tokens, mass)[0], mass, 0.1, True)[0] for tokens, mass in ((x, a), (y, b)))
        c, d = gromov._mean(C, a), gromov._mean(D, b)
        columns = ((D.square() - 2 * c * D) * b.unsqueeze(-2)).sum(-1)
        plan = a.unsqueeze(-1) * b.unsqueeze(-2)
        for _ in range(5):
            G = -2 * gromov._between(C - c, plan, (D - d).mT)
            G = G - G.amin(-1, keepdim=True)
            lowest = G.amin(-2)
            N, log_s, log_plan = (lowest.unsqueeze(-2) - G) / 0.1, -(columns + lowest) / 0.1, torch.zeros_like(G)
            for _ in range(20):
                log_plan, log_s = step(log_plan, N, log_s)
            plan = log_plan.exp()
        return plan

    return solve


def pot_entropic_gromov(cost_x: Tensor, cost_y: Tensor, epsilon: float, outer_iter: int, inner_iter: int) -> Tensor:
    """POT's entropic solver, problem by problem (it has no batched one); uniform marginals, every iteration run."""
    from ot.gromov import entropic_gromov_wasserstein

    options = {"epsilon": epsilon, "max_iter": outer_iter, "tol": 0, "numItermax": inner_iter, "stopThr": 0, "warn": False}
    return torch.stack([entropic_gromov_wasserstein(C, D, loss_fun="square_loss", **options) for C, D in zip(cost_x, cost_y)])


def _thresholded_cost(tokens: Tensor, threshold: float, threshold_over: str) -> Tensor:
    unit = F.normalize(tokens, dim=-1, eps=1e-12)
    cost = 1 - unit @ unit.mT
    over = (0, 1, 2) if threshold_over == "batch" else (1, 2)
    low, high = cost.amin(over, keepdim=True), cost.amax(over, keepdim=True)
    return F.relu(cost - (low + threshold * (high - low)))


def naive_attention(
    q: Tensor,  # [B, H, n, d]
    k: Tensor,  # [B, H, m, d]
    v: Tensor,  # [B, H, m, d]
    bias: Tensor | None,  # [n, m]
    dropkey_p: float,
    dropout_p: float,
    masks: tuple[Tensor, Tensor] | None = None,  # (dropped keys, kept weights) [B, H, n, m] in place of drawn ones
) -> Tensor:
    """Attention with DropKey and dropout as one writes it, masks drawn by torch."""
    logits = q @ k.mT
    if bias is not None:
        logits = logits + bias
    logits = logits * q.shape[-1] ** -0.5
    drop = torch.bernoulli(torch.full_like(logits, dropkey_p)) if masks is None else masks[0].to(logits)
    weights = torch.softmax(logits + DROPPED * drop, -1)
    weights = F.dropout(weights, dropout_p) if masks is None else weights * masks[1] / (1 - dropout_p)
    return weights @ v


@contextlib.contextmanager
def naive_transport() -> Iterator[None]:
    """Inside, HeLo runs on the eager back end and autograd records the transport solver, whose graph is then thrown away, as in
    released training."""

    def plan(config: HeLoConfig, x: Tensor, y: Tensor) -> Tensor:
        if config.transport == "gromov":
            return naive_gromov(
                x,
                y,
                threshold_over=config.threshold_over,
                threshold=config.threshold,
                beta=config.epsilon,
                outer_iter=config.gromov_outer_iterations,
                inner_iter=config.gromov_inner_iterations,
            ).detach()
        if config.transport == "sinkhorn":
            cost = 1 - F.normalize(x, dim=-1, eps=1e-12) @ F.normalize(y, dim=-1, eps=1e-12).mT
            return unrolled_sinkhorn(cost, config.epsilon, config.sinkhorn_iterations).detach()
        raise ValueError(f"naive_transport: transport {config.transport!r} has no naive version here; use 'gromov' or 'sinkhorn'")

    with helo_fast.backend("eager"), mock.patch.object(helo, "transport_plan", plan):
        yield
