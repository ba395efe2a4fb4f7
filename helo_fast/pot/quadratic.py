"""Gromov-Wasserstein transport with the interface of POT's ``ot.batch.solve_gromov_batch``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from . import _problem
from .result import Array, OTResult

_NAME = "solve_gromov_batch"
LOSSES = ("sqeuclidean", "l2", "kl")
GRADS = ("detach", "autodiff", "envelope")
_TINY = 1e-15  # added to what is within a logarithm, as POT does


def solve_gromov_batch(
    Ca: Array,
    Cb: Array,
    reg: float = 1e-2,
    a: Array | None = None,
    b: Array | None = None,
    loss: str = "sqeuclidean",
    symmetric: bool | None = None,
    M: Array | None = None,
    alpha: float | None = None,
    T_init: Array | None = None,
    max_iter: int = 50,
    tol: float = 1e-5,
    max_iter_inner: int = 50,
    tol_inner: float = 1e-5,
    grad: str = "envelope",
    logits: bool | None = None,
) -> OTResult:
    r"""(Fused) Gromov-Wasserstein transport of a batch of pairs of spaces: ``ot.batch.solve_gromov_batch`` on :func:`helo_fast.sinkhorn`.

    Looks for T >= 0 with T 1 = a and T' 1 = b of low cost (1 - alpha) <M, T> + alpha sum_ijkl l(Ca_ik, Cb_jl) T_ij T_kl, by proximal
    steps: T becomes the minimiser of <G(T), .> + reg KL(. || T), G the cost's gradient at T, found by Sinkhorn iterations.
    :func:`helo_fast.gromov_wasserstein` has other solvers (IPOT within, or an entropic objective), fused into one kernel.

    Args:
        Ca: ``[B, n, n]``, or ``[B, n, n, d]`` for vectors on the edges; NumPy arrays or tensors, as in :func:`solve_batch`.
        Cb: ``[B, m, m]`` or ``[B, m, m, d]``.
        reg: strength of the proximal term, in units of the cost, above 0.
        a: ``[B, n]``, ``[1, n]`` or ``[n]``, row marginal, non-negative; None is uniform.
        b: ``[B, m]``, ``[1, m]`` or ``[m]``, column marginal, of the same mass as ``a``; None is uniform.
        loss: "sqeuclidean" (or "l2"): |x - y|^2; "kl": sum y log(y / x) over vectors on the edges, which needs Cb with d.
        symmetric: whether Ca and Cb are symmetric in (i, k); None looks.
        M: ``[B, n, m]``, costs across, of the fused problem; with alpha.
        alpha: weight of the quadratic term, in [0, 1]; with M.
        T_init: ``[B, n, m]``, where to start; None is a b' / mass.
        max_iter: outer steps at most.
        tol: all problems stop once the step of each changed its plan's entries by less than this in the mean; 0 or below never.
        max_iter_inner: Sinkhorn iterations of a step at most.
        tol_inner: their ``tol``, as in :func:`solve_batch`; 0 or below runs max_iter_inner iterations.
        grad: "detach": no gradients. "envelope": of value, value_linear and value_quad, at fixed plan. "autodiff": of all outputs,
            through all iterations.
        logits: for "kl", whether Ca holds log x rather than x.

    Returns:
        OTResult: ``plan`` [B, n, m]; ``value`` [B]; ``value_linear`` [B] and ``value_quad`` [B], its terms with their weights;
        ``potentials`` ([B, n], [B, m]) of the last step; ``log``: "n_iter", the index of the last step, from 0, as in POT.

    Raises:
        ValueError: a wrong shape, device or value; M without alpha or alpha without M; another loss; marginals that are negative, NaN
            or of unequal mass.
        TypeError: an argument of the wrong type or dtype.

    Notes:
        At tol_inner <= 0 every output and gradient is POT's for the same max_iter, max_iter_inner and tol, to rounding; else to about
        tol_inner. Rows and columns without mass hold zeros (POT: NaN). ``tol`` stops the batch as one, as in POT, and each look at it
        waits for a GPU. Memory: O(B (n^2 + n m + m^2) d); "autodiff" multiplies this by the steps.

    Example:
        >>> import numpy as np
        >>> from helo_fast.pot import solve_gromov_batch
        >>> x = np.array([0.0, 1.0, 3.0])
        >>> C = abs(x[:, None] - x)[None]
        >>> order = [2, 0, 1]
        >>> solve_gromov_batch(C, C[:, order][:, :, order], reg=0.1).plan.argmax(-1)
        array([[1, 2, 0]])

    Source: Peyré, Cuturi, Solomon, "Gromov-Wasserstein Averaging of Kernel and Distance Matrices", ICML 2016; Xu, Luo, Zha, Carin,
    "Gromov-Wasserstein Learning for Graph Matching and Node Embedding", ICML 2019; the interface: POT, ``ot.batch``.
    """
    if loss not in LOSSES:
        raise ValueError(f"{_NAME}: loss must be 'sqeuclidean' (or 'l2') or 'kl', got {loss!r}")
    _checks.choice(_NAME, "grad", grad, GRADS)
    (Ca_, Cb_, a_, b_, M_, T), dtype, back = _problem.read(_NAME, Ca=Ca, Cb=Cb, a=a, b=b, M=M, T_init=T_init)
    if grad == "detach" or not torch.is_grad_enabled():
        Ca_, Cb_, a_, b_, M_, T = (t if t is None else t.detach() for t in (Ca_, Cb_, a_, b_, M_, T))
    batch, n, m = _sizes(Ca_, Cb_)
    for name, value in (("M", M_), ("T_init", T)):
        if value is not None and tuple(value.shape) != (batch, n, m):
            raise ValueError(f"{_NAME}: {name} must be [{batch}, {n}, {m}], got {_checks.shape_text(value)}; reshape or slice it")
    if (M is None) != (alpha is None):
        raise ValueError(
            f"{_NAME}: {'alpha' if M is None else 'M'} is given without {'M' if M is None else 'alpha'}; the fused problem needs both"
        )
    alpha = 1.0 if alpha is None else _checks.fraction(_NAME, "alpha", _problem.number(_NAME, "alpha", alpha), below_one=False)
    reg = _checks.positive(_NAME, "reg", _problem.number(_NAME, "reg", reg), "it is in units of the cost")
    max_iter = _checks.at_least(_NAME, "max_iter", max_iter, 1)
    max_iter_inner = _checks.at_least(_NAME, "max_iter_inner", max_iter_inner, 1)
    tol, tol_inner = _problem.tolerance(_NAME, "tol", tol), _problem.tolerance(_NAME, "tol_inner", tol_inner)
    a_, b_ = _problem.marginals(_NAME, a_, b_, Ca_, n, m, dtype)
    if symmetric is None:
        symmetric = all(torch.allclose(C, C.transpose(1, 2), atol=1e-10) for C in (Ca_, Cb_))
    terms = _Terms.of(Ca_, Cb_, loss, logits, symmetric)
    limits = (b is None, max_iter_inner, tol_inner)
    with torch.set_grad_enabled(grad == "autodiff" and torch.is_grad_enabled()):
        T, u, v, steps = _solve(terms, reg, a_, b_, M_, alpha, T, limits, max_iter, tol)
    value_quad = alpha * (terms.gradient(T, T.sum(-1), T.sum(-2)) * T).sum((-2, -1))
    value_linear = torch.zeros_like(value_quad) if M_ is None else (1 - alpha) * (M_ * T).sum((-2, -1))
    return OTResult(
        back(T), back(value_linear + value_quad), back(value_linear), (back(u), back(v)), {"n_iter": steps - 1}, back(value_quad)
    )


def _sizes(Ca: Tensor, Cb: Tensor) -> tuple[int, int, int]:
    """(B, n, m)."""
    for name, C, size in (("Ca", Ca, "n"), ("Cb", Cb, "m")):
        _checks.tensor(_NAME, name, C, (3, 4), f"[B, {size}, {size}] or [B, {size}, {size}, d]")
        if C.shape[1] != C.shape[2] or C.shape[1] == 0:
            raise ValueError(f"{_NAME}: {name} must be square, [B, {size}, {size}], and {size} at least 1, got {_checks.shape_text(C)}")
    if Cb.shape[0] != Ca.shape[0] or Cb.shape[3:] != Ca.shape[3:]:
        raise ValueError(f"{_NAME}: Cb must have Ca's batch size and d, got {_checks.shape_text(Cb)} beside {_checks.shape_text(Ca)}")
    return Ca.shape[0], Ca.shape[1], Cb.shape[1]


class _Terms(NamedTuple):
    """Of the loss l(x, y) = f1(x) + f2(y) - <h1(x), h2(y)>."""

    f1: Tensor | None  # [B, n, n]; None is 0
    f2: Tensor  # [B, m, m]
    h1: Tensor  # [B, d, n, n]
    h2: Tensor  # [B, d, m, m]
    symmetric: bool

    @staticmethod
    def of(Ca: Tensor, Cb: Tensor, loss: str, logits: bool | None, symmetric: bool) -> _Terms:
        if loss == "kl":
            if logits not in (True, False):
                raise ValueError(f"{_NAME}: logits must be True (Ca holds log x) or False (Ca holds x) with loss 'kl', got {logits!r}")
            if Cb.dim() != 4:
                raise ValueError(f"{_NAME}: Cb must be [B, m, m, d] with loss 'kl', got {_checks.shape_text(Cb)}; use Cb.unsqueeze(-1)")
            f1, f2 = None, (Cb * (Cb + _TINY).log()).sum(-1)
            h1, h2 = Ca if logits else (Ca + _TINY).log(), Cb
        else:
            f1, f2 = (C.square() if C.dim() == 3 else C.square().sum(-1) for C in (Ca, Cb))
            h1, h2 = 2 * Ca, Cb
        if not symmetric:
            f1, f2 = (f if f is None else (f + f.mT) / 2 for f in (f1, f2))
        h1, h2 = (h.unsqueeze(1) if h.dim() == 3 else h.movedim(-1, 1) for h in (h1, h2))
        return _Terms(f1, f2, h1, h2, symmetric)

    def gradient(self, T: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """sum_kl l(Ca_ik, Cb_jl) T_kl [B, n, m], T's marginals being a and b; asymmetric spaces: the mean of this and of its transpose."""
        product = (self.h1 @ T.unsqueeze(1) @ self.h2.mT).sum(1)
        if not self.symmetric:
            product = (product + (self.h1.mT @ T.unsqueeze(1) @ self.h2).sum(1)) / 2
        constant = (self.f2 @ b.unsqueeze(-1)).mT  # [B, 1, m]
        if self.f1 is not None:
            constant = constant + self.f1 @ a.unsqueeze(-1)
        return constant - product


def _solve(
    terms: _Terms,
    reg: float,
    a: Tensor,  # [B, n]
    b: Tensor,  # [B, m]
    M: Tensor | None,  # [B, n, m]
    alpha: float,
    T: Tensor | None,  # [B, n, m]
    limits: tuple,
    max_iter: int,
    tol: float | None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(T, u, v, steps that ran)."""
    if T is None:
        T = a.unsqueeze(-1) * b.unsqueeze(-2) / (a.sum(-1) * b.sum(-1)).sqrt()[:, None, None]
    log_T = (T + _TINY).log()
    inside = (a > 0).unsqueeze(-1) & (b > 0).unsqueeze(-2)
    for step in range(1, max_iter + 1):
        before = T
        G = 2 * alpha * terms.gradient(T, a, b)
        if M is not None:
            G = G + (1 - alpha) * M
        cost = torch.where(inside, G - reg * log_T, 0)
        T, u, v, _ = _problem.project(cost, reg, a, b, *limits, "unrolled" if cost.requires_grad else "none")
        log_T = torch.where(inside, u.unsqueeze(-1) + v.unsqueeze(-2) - cost / reg, 0)
        if tol is not None and T.numel() and bool((T - before).abs().mean((-2, -1)).max() < tol):
            return T, u, v, step
    return T, u, v, max_iter
