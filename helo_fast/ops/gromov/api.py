"""The public functions: validate, fill in defaults, call the ops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _checks
from .. import _library
from . import op as _op  # noqa: F401  (defines torch.ops.helo_fast.gromov_*)

METHODS = ("proximal", "entropic")
THRESHOLDS = ("sample", "batch")


class GromovResult(NamedTuple):
    """What :func:`gromov_wasserstein` and :func:`gromov_from_tokens` return."""

    plan: Tensor  # [B, n, m]
    gw_cost: Tensor  # [B], the objective without any entropy
    marginal_error: Tensor  # [B], L1, rows and columns
    n_iter: Tensor  # [B], int32, outer iterations
    converged: Tensor  # [B], bool


def gromov_wasserstein(
    cost_x: Tensor,
    cost_y: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    cost_xy: Tensor | None = None,
    alpha: float = 1.0,
    method: str = "proximal",
    epsilon: float = 0.1,
    outer_iter: int = 5,
    inner_iter: int = 20,
    tol: float | None = None,
    backend: str | None = None,
) -> GromovResult:
    r"""Gromov-Wasserstein transport (square loss) of a batch of pairs of spaces, plain or fused.

    Looks, for each problem, for a plan T >= 0 with T 1 = a and T' 1 = b of low cost

        gw_cost = alpha sum_ijkl (cost_x_ik - cost_y_jl)^2 T_ij T_kl + (1 - alpha) sum_ij cost_xy_ij T_ij.

    From T = a b', each outer iteration takes a linear cost G(T) and solves a transport problem with it. L_ij is
    sum_k cost_x_ik^2 a_k + sum_l cost_y_jl^2 b_l:

    * "proximal": G = alpha (L - 2 cost_x T cost_y') + (1 - alpha) cost_xy, then ``inner_iter`` steps of IPOT at beta = epsilon from a
      plan of ones: R = exp(-G/epsilon) T; d = a / (R s); s = b / (R' d); T = diag(d) R diag(s).
    * "entropic": G = alpha 2 (L - 2 cost_x T cost_y') + (1 - alpha) cost_xy (for asymmetric costs the mean of this and of its value
      at the transposed costs: the gradient of gw_cost), then ``inner_iter`` Sinkhorn iterations with entropy epsilon.

    Args:
        cost_x: ``[B, n, n]``, costs within the first space; float32, float64, float16 or bfloat16 (halves are solved in float32).
            Any strides; negative entries allowed.
        cost_y: ``[B, m, m]``, costs within the second, in the units of cost_x.
        a: ``[B, n]`` or ``[n]``, marginal of the first space, non-negative; None is uniform (1/n each).
        b: ``[B, m]`` or ``[m]``, marginal of the second, of the same mass as ``a``; None is uniform.
        cost_xy: ``[B, n, m]``, costs across, in squared units of cost_x; needed where alpha < 1, of no weight at alpha = 1.
        alpha: share of the Gromov term, in [0, 1].
        method: "proximal" or "entropic".
        epsilon: IPOT's beta, or the entropy's strength; above 0, in squared units of cost_x.
        outer_iter: outer iterations at most; exactly as many where ``tol`` is None.
        inner_iter: steps of the inner solver, always all of them.
        tol: a problem stops by itself once an outer iteration moves its plan by at most this (L1 norm), whatever its batch-mates do.
        backend: "eager", "cpp", "triton", "cuda"; None follows :func:`helo_fast.backend`.

    Returns:
        GromovResult: ``plan`` [B, n, m]; ``gw_cost`` [B], the cost above at the plan's own marginals; ``marginal_error`` [B], L1 distance
        of the row marginal from a plus that of the column marginal from b (the inner solver leaves one of them exact);
        ``n_iter`` [B], outer iterations run; ``converged`` [B], whether the last outer iteration moved the plan by at most tol
        and marginal_error is at most tol (1e-4 where tol is None).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value; cost_xy missing; negative or NaN marginals, or marginals of unequal mass (checked
            on the CPU, elsewhere under ``helo_fast.checks(True)``).
        RuntimeError: the back end asked for cannot serve, or a second derivative is asked for (as NotImplementedError).

    Notes:
        Gradients: gw_cost has its envelope gradient (its derivative at fixed plan) with respect to cost_x, cost_y and cost_xy, and none
        with respect to a and b. plan and the diagnostics carry none. Second and forward-mode derivatives are refused.
        The problem is not convex: both methods look for a local solution. "proximal" restarts each inner problem from a plan of ones and
        may come to alternate between plans where epsilon is small: ``converged`` tells.
        Rows and columns of zero mass hold exact zeros in the plan, and their costs are not read.
        Computed in the log domain: no epsilon gives NaN while the squared costs are finite in the computing dtype.
        Memory: O(B (n^2 + n m + m^2)), whatever the iterations. A result does not depend on its batch-mates.
        "entropic" is POT's ``ot.gromov.entropic_gromov_wasserstein`` and, fused, ``entropic_fused_gromov_wasserstein`` (solver="PGD"),
        iterate for iterate where a is uniform (POT's inner solver starts from a uniform scaling, this one from a).

    Example:
        >>> import torch
        >>> from helo_fast import gromov_wasserstein
        >>> points = torch.tensor([[0.0, 1.0, 3.0]])
        >>> cost = (points.unsqueeze(-1) - points.unsqueeze(-2)).abs()
        >>> order = torch.tensor([2, 0, 1])
        >>> result = gromov_wasserstein(cost, cost[:, order][:, :, order], epsilon=0.5)
        >>> result.plan.round(decimals=3)[0]
        tensor([[0.0000, 0.3330, 0.0000],
                [0.0000, 0.0000, 0.3330],
                [0.3330, 0.0000, 0.0000]])

    Source: "entropic": Peyré, Cuturi, Solomon, "Gromov-Wasserstein Averaging of Kernel and Distance Matrices", ICML 2016. "proximal":
    Xie, Wang, Wang, Zha, "A Fast Proximal Point Method for Computing Exact Wasserstein Distance", UAI 2019, as the inner solver of
    HeLo (Zheng et al., ACM MM 2025). Fused: Vayer et al., "Optimal Transport for Structured Data", ICML 2019.
    """
    name = "gromov_wasserstein"
    batch, n = _square(name, "cost_x", cost_x, "n")
    batch_y, m = _square(name, "cost_y", cost_y, "m")
    _checks.like(name, "cost_y", cost_y, "cost_x", cost_x)
    _checks.shape(name, "cost_y", cost_y, ((batch, m, m),), "of cost_x's batch size")
    _solver(name, alpha, method, tol)
    if cost_xy is None and alpha < 1:
        raise ValueError(f"{name}: alpha is {alpha} but cost_xy is None; give cost_xy [B, n, m], or alpha=1 for no cross cost")
    a, b, compute = _marginals(name, a, b, "cost_x", cost_x, n, m)
    result = _library.call(
        "gromov_wasserstein_fwd",
        (_cast(cost_x, compute), _cast(cost_y, compute), a, b, _cross(name, cost_xy, "cost_x", cost_x, (batch, n, m), compute)),
        float(alpha),
        method,
        _checks.positive(name, "epsilon", epsilon, "it is in squared units of cost_x"),
        _checks.at_least(name, "outer_iter", outer_iter, 1),
        _checks.at_least(name, "inner_iter", inner_iter, 1),
        tol,
        backend or "",
    )
    return _result(result, cost_x.dtype)


def gromov_from_tokens(
    x: Tensor,
    y: Tensor,
    *,
    threshold: float = 0.1,
    threshold_over: str = "sample",
    a: Tensor | None = None,
    b: Tensor | None = None,
    cost_xy: Tensor | None = None,
    alpha: float = 1.0,
    method: str = "proximal",
    epsilon: float = 0.1,
    outer_iter: int = 5,
    inner_iter: int = 20,
    tol: float | None = None,
    backend: str | None = None,
) -> GromovResult:
    r"""Gromov-Wasserstein transport between two sets of tokens, on HeLo's thresholded cosine costs.

    :func:`gromov_wasserstein` with cost_x_ij = relu(c_ij - t), where c_ij = 1 - cos(x_i, x_j) (norms are at least 1e-12) and
    t = min c + threshold (max c - min c); cost_y likewise from y.

    Args:
        x: ``[B, n, D]``, tokens of the first space; float32, float64, float16 or bfloat16 (halves are computed in float32). Any strides.
        y: ``[B, m, D]``, tokens of the second.
        threshold: where between the smallest and the largest cosine cost costs become zero, in [0, 1].
        threshold_over: "sample" takes min and max over each problem; "batch" over the whole batch (the released HeLo), so that a result
            depends on its batch-mates.
        a: ``[B, n]`` or ``[n]``, as in :func:`gromov_wasserstein`. Tokens of zero mass are not read, nor do they count in min and max.
        b: ``[B, m]`` or ``[m]``, likewise.
        cost_xy: ``[B, n, m]``, costs across; None with alpha < 1 is 1 - cos(x_i, y_j), without a threshold.
        alpha, method, epsilon, outer_iter, inner_iter, tol, backend: as in :func:`gromov_wasserstein`.

    Returns:
        GromovResult: as :func:`gromov_wasserstein`.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`gromov_wasserstein`.

    Notes:
        Gradients: gw_cost has its envelope gradient (at fixed plan, through the costs and their thresholds) with respect to x, y and
        cost_xy. plan and the diagnostics carry none. Second and forward-mode derivatives are refused.
        Memory: "eager", "triton" and the backward hold the cost matrices, O(B (n^2 + n m + m^2)); the forward of "cpp" and "cuda" the plan
            alone.

    Example:
        >>> import torch
        >>> from helo_fast import gromov_from_tokens
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-0.6, 0.8]]])
        >>> result = gromov_from_tokens(x, x)
        >>> result.plan.argmax(-1)
        tensor([[0, 1, 2]])

    Source: Zheng et al., "HeLo: Heterogeneous Multi-Modal Fusion with Label Correlation for Emotion Distribution Learning",
    ACM MM 2025; the solvers as :func:`gromov_wasserstein`.
    """
    name = "gromov_from_tokens"
    batch, n, width = _tokens(name, "x", x, "n")
    _, m, _ = _tokens(name, "y", y, "m")
    _checks.like(name, "y", y, "x", x)
    _checks.shape(name, "y", y, ((batch, m, width),), "of x's batch size and D")
    threshold = _checks.fraction(name, "threshold", threshold, below_one=False)
    _checks.choice(name, "threshold_over", threshold_over, THRESHOLDS)
    _solver(name, alpha, method, tol)
    a, b, compute = _marginals(name, a, b, "x", x, n, m)
    result = _library.call(
        "gromov_from_tokens_fwd",
        (_cast(x, compute), _cast(y, compute), a, b, _cross(name, cost_xy, "x", x, (batch, n, m), compute)),
        threshold,
        threshold_over == "batch",
        float(alpha),
        method,
        _checks.positive(name, "epsilon", epsilon, "cosine costs lie in [0, 2]"),
        _checks.at_least(name, "outer_iter", outer_iter, 1),
        _checks.at_least(name, "inner_iter", inner_iter, 1),
        tol,
        backend or "",
    )
    return _result(result, x.dtype)


def _square(op: str, name: str, cost: Tensor, size: str) -> tuple[int, int]:
    """(B, n) of a batch of square matrices."""
    _checks.tensor(op, name, cost, (3,), f"[B, {size}, {size}]")
    if cost.shape[1] != cost.shape[2]:
        raise ValueError(f"{op}: {name} must be square, [B, {size}, {size}], got {_checks.shape_text(cost)}; a cost across goes to cost_xy")
    if cost.shape[1] == 0:
        raise ValueError(f"{op}: {name} is empty, got {_checks.shape_text(cost)}; {size} must be at least 1")
    return cost.shape[0], cost.shape[1]


def _tokens(op: str, name: str, tokens: Tensor, size: str) -> tuple[int, int, int]:
    _checks.tensor(op, name, tokens, (3,), f"[B, {size}, D]")
    if 0 in tokens.shape[1:]:
        raise ValueError(f"{op}: {name} is empty, got {_checks.shape_text(tokens)}; {size} and D must be at least 1")
    return tuple(tokens.shape)


def _solver(op: str, alpha: float, method: str, tol: float | None) -> None:
    _checks.fraction(op, "alpha", alpha, below_one=False)
    _checks.choice(op, "method", method, METHODS)
    if tol is not None:
        _checks.positive(op, "tol", tol, "None runs outer_iter iterations")


def _cross(
    op: str, cost_xy: Tensor | None, reference_name: str, reference: Tensor, shape: tuple[int, int, int], compute: torch.dtype
) -> Tensor | None:
    if cost_xy is None:
        return None
    _checks.tensor(op, "cost_xy", cost_xy, (3,), "[B, n, m]")
    _checks.like(op, "cost_xy", cost_xy, reference_name, reference)
    _checks.shape(op, "cost_xy", cost_xy, (shape,), "[B, n, m]")
    return _cast(cost_xy, compute)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # what has nothing to do still takes a microsecond


def _marginals(
    op: str, a: Tensor | None, b: Tensor | None, reference_name: str, reference: Tensor, n: int, m: int
) -> tuple[Tensor, Tensor, torch.dtype]:
    """(a [B, n], b [B, m]) in the compute dtype, and that dtype."""
    compute = torch.float64 if reference.dtype == torch.float64 else torch.float32
    batch = reference.shape[0]
    masses = []
    for name, mass, size, symbol in (("a", a, n, "n"), ("b", b, m, "m")):
        if mass is None:
            masses.append(torch.full((batch, size), 1.0 / size, dtype=compute, device=reference.device))
        else:
            _checks.tensor(op, name, mass, (1, 2), f"[B, {symbol}] or [{symbol}]")
            _checks.like(op, name, mass, reference_name, reference)
            _checks.shape(op, name, mass, ((batch, size), (size,)), f"[B, {symbol}] or [{symbol}]")
            masses.append(mass.to(compute).expand(batch, size))
    given, (a, b) = a is not None or b is not None, masses
    if given and _checks.reads_values(a):
        _checks.marginals(op, a, b, balanced=True, dtype=reference.dtype)
    return a, b, compute


def _result(outputs: tuple[Tensor, ...], dtype: torch.dtype) -> GromovResult:
    plan, gw_cost, marginal_error, n_iter, converged = outputs
    return GromovResult(_cast(plan, dtype), _cast(gw_cost, dtype), _cast(marginal_error, dtype), n_iter, converged)
