"""The public function: validates, fills in defaults, calls the op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _checks
from .. import _library
from . import op as _op  # noqa: F401  (defines torch.ops.helo_fast.sinkhorn_fwd)

_NAME = "sinkhorn"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
GRADIENTS = ("implicit", "unrolled", "envelope", "none")


class SinkhornResult(NamedTuple):
    """What :func:`sinkhorn` returns; without the leading B where cost had none."""

    plan: Tensor  # [B, n, m]
    f: Tensor  # [B, n], units of cost
    g: Tensor  # [B, m], units of cost
    transport_cost: Tensor  # [B], <plan, cost>
    marginal_error: Tensor  # [B], L1
    n_iter: Tensor  # [B], int32
    converged: Tensor  # [B], bool


def sinkhorn(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    epsilon: float = 0.1,
    max_iter: int = 100,
    tol: float | None = None,
    check_every: int = 10,
    tau_a: float | None = None,
    tau_b: float | None = None,
    n_rows: Tensor | None = None,
    n_cols: Tensor | None = None,
    gradient: str = "implicit",
    backend: str | None = None,
) -> SinkhornResult:
    r"""Entropic optimal transport of a batch of problems, in the log domain.

    Solves, for each problem, min over T >= 0 of <T, cost> + epsilon KL(T || a b'), with T 1 = a and T' 1 = b (balanced), or with
    penalties tau_a KL(T 1 || a) and tau_b KL(T' 1 || b) in place of either constraint (unbalanced). The solution is
    T_ij = a_i b_j exp((f_i + g_j - cost_ij) / epsilon). An iteration updates g from f, then f from g, starting at f = 0:
    the row marginals are exact at the end.

    Args:
        cost: ``[B, n, m]`` or ``[n, m]``; float32, float64, float16 or bfloat16 (halves are solved in float32). Any strides.
        a: ``[B, n]`` or ``[n]``, row marginal, non-negative; None is uniform (1/n each).
        b: ``[B, m]`` or ``[m]``, column marginal, of the same mass as ``a`` if balanced; None is uniform.
        epsilon: strength of the entropy, in units of cost, above 0.
        max_iter: iterations at most; exactly as many where ``tol`` is None.
        tol: a problem stops by itself once its ``marginal_error`` is at most this, whatever its batch-mates do.
        check_every: how often (in iterations) ``tol`` is checked.
        tau_a: strength of the row penalty, in units of cost; None is the hard constraint.
        tau_b: likewise for columns.
        n_rows: ``[B]`` integers, rows in use of each problem (ragged batch): the others count as zero mass, and their cost is not read.
        n_cols: ``[B]`` integers, columns in use.
        gradient: "implicit" differentiates plan, f, g and transport_cost with respect to cost, a and b through the fixed point (its
            error is of the order of ``marginal_error``); "unrolled" differentiates the iterations that ran, from their stored
            potentials; "envelope" gives transport_cost the plan as its gradient with respect to cost, and nothing else;
            "none" cuts the graph.
        backend: "eager", "cpp", "triton", "cuda"; None follows :func:`helo_fast.backend`.

    Returns:
        SinkhornResult: ``plan`` [B, n, m]; potentials ``f`` [B, n] and ``g`` [B, m] in units of cost; ``transport_cost`` [B], that is
            <plan, cost>; ``marginal_error`` [B], L1 distance of the column marginal from b (unbalanced: from b exp(-g / tau_b), its
            value at optimality); ``n_iter`` [B]; ``converged`` [B], marginal_error at most tol (1e-4 where tol is None).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value; negative or NaN marginals, or marginals of unequal mass (values are checked on
            the CPU, on a GPU under ``helo_fast.checks(True)``, and not inside ``torch.compile``).
        RuntimeError: the back end asked for cannot serve.

    Notes:
        Rows and columns of zero mass hold exact zeros in the plan, potentials of -inf and zero gradients.
        In balanced problems f and g are defined up to (f + c, g - c): "implicit" drops the part of an incoming gradient along it.
        Memory: O(B n m); "unrolled" adds O(B (n + m) max_iter). Second and forward-mode derivatives are refused.
        Potentials are those of POT's ``ot.bregman.sinkhorn_log(a, b, cost, epsilon)``: log_u = f / epsilon + log a and
        log_v = g / epsilon + log b, up to one constant moved from u to v; iterate for iterate, start POT at warmstart=(log a, 0).

    Example:
        >>> import torch
        >>> from helo_fast import sinkhorn
        >>> result = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), epsilon=0.1)
        >>> result.plan.round(decimals=3)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])

    Source: Cuturi, "Sinkhorn Distances", NeurIPS 2013; Chizat et al., "Scaling Algorithms for Unbalanced Optimal Transport
    Problems", Mathematics of Computation 2018; Peyré and Cuturi, "Computational Optimal Transport", sections 4.2 to 4.4.
    """
    _checks.tensor(_NAME, "cost", cost, (2, 3), "[B, n, m] or [n, m]")
    shape = cost.shape
    single = len(shape) == 2
    batch, n, m = (1, *shape) if single else shape
    if n == 0 or m == 0:
        raise ValueError(
            f"{_NAME}: cost has no {'rows' if n == 0 else 'columns'}, got {_checks.shape_text(cost)}; n and m must be at least 1"
        )
    epsilon = _checks.positive(_NAME, "epsilon", epsilon, "it is the entropy's strength in units of cost")
    max_iter = _checks.at_least(_NAME, "max_iter", max_iter, 1)
    check_every = _checks.at_least(_NAME, "check_every", check_every, 1)
    tol = None if tol is None else _checks.positive(_NAME, "tol", tol, "None runs max_iter iterations")
    tau_a = None if tau_a is None else _checks.positive(_NAME, "tau_a", tau_a, "None is the hard constraint")
    tau_b = None if tau_b is None else _checks.positive(_NAME, "tau_b", tau_b, "None is the hard constraint")
    _checks.choice(_NAME, "gradient", gradient, GRADIENTS)

    dtype = cost.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    solved = cost.unsqueeze(0) if single else cost
    if dtype != compute:
        solved = solved.to(compute)
    if a is not None or b is not None or n_rows is not None or n_cols is not None:  # else uniform, which the op knows
        given = a is not None or b is not None
        a = _marginal("a", a, "n_rows", n_rows, cost, batch, n, compute)
        b = _marginal("b", b, "n_cols", n_cols, cost, batch, m, compute)
        if given and _checks.reads_values(a):
            or_else = ", or give tau_a and tau_b for unbalanced transport"
            _checks.marginals(_NAME, a, b, balanced=tau_a is None and tau_b is None, dtype=dtype, or_else=or_else)
    if gradient == "none":
        solved, a, b = (t if t is None else t.detach() for t in (solved, a, b))
    options = (epsilon, max_iter, tol, check_every, tau_a, tau_b, gradient, backend or "")
    result = SinkhornResult(*_library.call("sinkhorn_fwd", (solved, a, b), *options)[:7])  # all but the history
    if dtype != compute:
        result = SinkhornResult(*(t.to(dtype) for t in result[:5]), result.n_iter, result.converged)
    return SinkhornResult(*(t.squeeze(0) for t in result)) if single else result


def _marginal(
    name: str, mass: Tensor | None, count_name: str, count: Tensor | None, cost: Tensor, batch: int, size: int, compute: torch.dtype
) -> Tensor:
    """The marginal as [B, size] in the compute dtype, zero past each problem's count."""
    inside = None
    if count is not None:
        inside = torch.arange(size, device=cost.device) < _count(count_name, count, cost, batch, size).unsqueeze(-1)  # [B, size]
    if mass is None:
        if inside is None:
            return torch.full((size,), 1.0 / size, dtype=compute, device=cost.device).expand(batch, size)
        return inside.to(compute) / count.clamp(min=1).unsqueeze(-1)
    _checks.tensor(_NAME, name, mass, (1, 2), f"[B, {'n' if name == 'a' else 'm'}] or [{'n' if name == 'a' else 'm'}]")
    _checks.like(_NAME, name, mass, "cost", cost)
    _checks.shape(_NAME, name, mass, ((batch, size), (size,)), "one mass per row" if name == "a" else "one mass per column")
    mass = mass.to(compute).expand(batch, size)
    return mass if inside is None else torch.where(inside, mass, 0)


def _count(name: str, count: object, cost: Tensor, batch: int, size: int) -> Tensor:
    if not isinstance(count, Tensor):
        raise TypeError(f"{_NAME}: {name} must be an integer tensor [B], got {type(count).__name__}; use torch.tensor({name})")
    if count.dtype not in _INTEGERS:
        raise TypeError(f"{_NAME}: {name} must be an integer tensor [B], got {count.dtype}; use {name}.long()")
    _checks.shape(_NAME, name, count, ((batch,),), "one count per problem")
    if count.device != cost.device:
        raise ValueError(f"{_NAME}: {name} is on {count.device} but cost on {cost.device}; use {name}.to(cost.device)")
    if _checks.reads_values(count) and bool(((count < 1) | (count > size)).any()):
        bad = count[(count < 1) | (count > size)][0].item()
        raise ValueError(f"{_NAME}: {name} must lie in 1..{size}, got {bad}; clamp it, or leave empty problems out of the batch")
    return count
