"""Entropic transport with the interface of POT's ``ot.batch.solve_batch``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks
from ..ops.sinkhorn import SinkhornResult
from . import _problem
from .result import Array, OTResult

_NAME = "solve_batch"
METHODS = ("auto", "log_sinkhorn", "sinkhorn")
REG_TYPES = ("kl", "entropy")
GRADS = ("detach", "autodiff", "last_step", "envelope", "implicit")


def solve_batch(
    M: Array,
    reg: float | None = None,
    a: Array | None = None,
    b: Array | None = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
) -> OTResult:
    r"""Entropic optimal transport of a batch of problems: ``ot.batch.solve_batch`` on :func:`helo_fast.sinkhorn`.

    min over T >= 0 of <T, M> + reg R(T), with T 1 = a and T' 1 = b; R is sum T log T ("entropy") or sum T log(T / (a b')) ("kl").

    Args:
        M: ``[B, n, m]`` or ``[1, n, m]``, costs; NumPy arrays or tensors, float32, float64 or float16 (tensors also bfloat16). Halves are
            solved in float32.
        reg: strength of the regularisation, in units of M, above 0. POT's default, None, asks for its proximal method: see Raises.
        a: ``[B, n]``, ``[1, n]`` or ``[n]``, row marginal, non-negative; None is uniform.
        b: ``[B, m]``, ``[1, m]`` or ``[m]``, column marginal, of the same mass as ``a``; None is uniform.
        max_iter: iterations at most, each of the rows, then of the columns, whose marginals are exact at the end.
        tol: a problem stops by itself once the L1 distance of its row marginal from a is at most tol (checked every 10 iterations);
            0 or below runs max_iter iterations.
        method: "auto" and "log_sinkhorn" are the same; so is "sinkhorn", but its ``potentials`` are the scalings exp(u) and exp(v).
        inner_iter: of the proximal method; not read here, as in POT.
        inner_reg: likewise.
        reg_type: "entropy" or "kl". It changes ``value`` alone: the plans are the same.
        grad: what carries a gradient (tensors only). "detach": nothing. "envelope": value and value_linear, at fixed plan. "autodiff":
            plan, potentials, value, value_linear, through the iterations that ran. "last_step": the same, through one more iteration;
            as in POT, T = exp(u_i + v_j - M_ij / reg) then depends on M by u and v alone. "implicit" (not in POT): as "autodiff",
            but through the fixed point, with no iteration stored.

    Returns:
        OTResult: ``plan`` [B, n, m]; ``value`` [B], regularisation included; ``value_linear`` [B], <T, M>; ``potentials`` (u [B, n],
        v [B, m]) with T = exp(u_i + v_j - M_ij / reg), without units; ``log``: "n_iter" (the index of the last iteration of the slowest
        problem, from 0, as in POT), and per problem "iterations", "marginal_error" (L1) and "converged".

    Raises:
        ValueError: method "proximal", or reg None or 0, which select it: use ``ot.batch.solve_batch``, or ``ot.solve`` for exact plans.
            A wrong shape, device or value; marginals that are negative, NaN or of unequal mass.
        TypeError: an argument of the wrong type or dtype.

    Notes:
        At tol <= 0 every output and gradient is POT's for the same max_iter, to rounding. At tol > 0 it is POT's to that tolerance: POT
        stops the whole batch at once, on the largest L2 distance, which L1 bounds from above; so a result here does not depend on its
        batch-mates and meets POT's tolerance. Rows and columns without mass hold zeros (POT: NaN in the "kl" value).
        Memory: O(B n m); "autodiff" adds O(B (n + m) max_iter) where POT adds O(B n m max_iter). Second derivatives are refused.
        At tol > 0 log's "n_iter" waits for a GPU; nothing else does.

    Example:
        >>> import numpy as np
        >>> from helo_fast.pot import solve_batch
        >>> M = np.array([[[0.0, 1.0], [1.0, 0.0]]])
        >>> solve_batch(M, reg=0.1).plan.round(3)
        array([[[0.5, 0. ],
                [0. , 0.5]]])

    Source: Cuturi, "Sinkhorn Distances", NeurIPS 2013; the interface: POT (Flamary et al., JMLR 2021), ``ot.batch``.
    """
    reg = None if reg is None else _problem.number(_NAME, "reg", reg)
    if method == "proximal" or (method == "auto" and (reg is None or reg == 0)):
        asked = f"method is {method!r}" + ("" if method == "proximal" else f" and reg {reg!r}")
        raise ValueError(
            f"{_NAME}: {asked}, which asks for POT's proximal method: not served here; give reg > 0, "
            "or use ot.batch.solve_batch (ot.solve for an exact plan) of POT"
        )
    _checks.choice(_NAME, "method", method, METHODS)
    _checks.choice(_NAME, "reg_type", reg_type, REG_TYPES)
    _checks.choice(_NAME, "grad", grad, GRADS)
    (M_, a_, b_), dtype, back = _problem.read(_NAME, M=M, a=a, b=b)
    _checks.tensor(_NAME, "M", M_, (3,), "[B, n, m]")
    if 0 in M_.shape[1:]:
        raise ValueError(f"{_NAME}: M is empty, got {_checks.shape_text(M_)}; n and m must be at least 1")
    reg = _checks.positive(_NAME, "reg", reg, "it is in units of M")
    max_iter = _checks.at_least(_NAME, "max_iter", max_iter, 1)
    if M_.shape[0] == 1:  # one cost for a batch of marginals
        M_ = M_.expand(max([1, *(mass.shape[0] for mass in (a_, b_) if mass is not None and mass.dim() == 2)]), -1, -1)
    a_, b_ = _problem.marginals(_NAME, a_, b_, M_, *M_.shape[1:], dtype)
    limits = (b is None, max_iter, _problem.tolerance(_NAME, "tol", tol))

    if grad == "detach" or not torch.is_grad_enabled():
        M_, a_, b_ = M_.detach(), a_.detach(), b_.detach()
    solve = _last_step if grad == "last_step" else _envelope if grad in ("detach", "envelope") else _through
    plan, u, v, value_linear, entropy, result = solve(M_, reg, a_, b_, limits, grad)
    value = value_linear + reg * (_divergence(plan, a_, b_) if reg_type == "kl" else entropy)
    if method == "sinkhorn":
        u, v = u.exp(), v.exp()
    log = {
        "n_iter": _last_index(result, max_iter, limits[-1]),
        "iterations": back(result.n_iter),
        "marginal_error": back(result.marginal_error.detach()),
        "converged": back(result.converged),
    }
    return OTResult(back(plan), back(value), back(value_linear), (back(u), back(v)), log)


def _last_index(result: SinkhornResult, max_iter: int, tol: float | None) -> int:
    if tol is None or result.n_iter.numel() == 0:
        return max_iter - 1
    return int(result.n_iter.max()) - 1


# Each solver returns (plan, u, v, <T, M>, <T, log T>, sinkhorn's result).


def _envelope(M: Tensor, reg: float, a: Tensor, b: Tensor, limits: tuple, grad: str) -> tuple:
    """No gradient but that of <T, M> at fixed plan."""
    a, b, fixed = a.detach(), b.detach(), M.detach()
    if limits[0]:
        plan, u, v, result = _problem.project(M, reg, a, b, *limits, "envelope" if M.requires_grad else "none")
    else:
        plan, u, v, result = _problem.project(fixed, reg, a, b, *limits, "none")
    value_linear = _linear(plan, M, result, limits[0])
    return plan, u, v, value_linear, _entropy(plan, u, v, b, value_linear.detach() / reg), result


def _through(M: Tensor, reg: float, a: Tensor, b: Tensor, limits: tuple, grad: str) -> tuple:
    """Gradients of everything, by "autodiff" or "implicit"."""
    gradient = {"autodiff": "unrolled", "implicit": "implicit"}[grad] if _problem.wants_gradient(M, a, b) else "none"
    plan, u, v, result = _problem.project(M, reg, a, b, *limits, gradient)
    value_linear = _linear(plan, M, result, limits[0])
    return plan, u, v, value_linear, _entropy(plan, u, v, b, value_linear / reg), result


def _last_step(M: Tensor, reg: float, a: Tensor, b: Tensor, limits: tuple, grad: str) -> tuple:
    """One more iteration, with gradients. As in POT, M is a constant in T = exp(u + v - M / reg) and before; a and b are not."""
    fixed = M.detach()
    *_, v, result = _problem.project(fixed, reg, a, b, *limits, "unrolled" if _problem.wants_gradient(a, b) else "none")
    K = -M / reg
    u = torch.where(a > 0, _problem.log_mass(a) - torch.logsumexp(K + v.unsqueeze(-2), -1), -math.inf)
    v = torch.where(b > 0, _problem.log_mass(b) - torch.logsumexp(K + u.unsqueeze(-1), -2), -math.inf)
    plan = (u.unsqueeze(-1) + v.unsqueeze(-2) - fixed / reg).exp()
    entropy = _entropy(plan, u, v, plan.sum(-2), (plan * fixed).sum((-2, -1)) / reg)
    return plan, u, v, (plan * M).sum((-2, -1)), entropy, result


def _linear(plan: Tensor, M: Tensor, result: SinkhornResult, solved_as_given: bool) -> Tensor:
    """<T, M>; what has no mass is not read."""
    return result.transport_cost if solved_as_given else (plan * torch.where(plan > 0, M, 0)).sum((-2, -1))


def _entropy(plan: Tensor, u: Tensor, v: Tensor, columns: Tensor, scaled_cost: Tensor) -> Tensor:
    """<T, log T>, log T being u_i + v_j - M_ij / reg: no other array of the plan's size is needed."""
    return _problem.dot(plan.sum(-1), u) + _problem.dot(columns, v) - scaled_cost


def _divergence(plan: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """<T, log(T / (a b'))>. By potentials, as above, a large reg would cost it its digits."""
    product = a.unsqueeze(-1) * b.unsqueeze(-2)
    ratio = plan / torch.where(product > 0, product, 1)
    return (plan * torch.where(ratio > 0, ratio, 1).log()).sum((-2, -1))
