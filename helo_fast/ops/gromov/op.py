"""The torch.library ops behind gromov_wasserstein and gromov_from_tokens: schema, fake and autograd, once for all back ends.

All tensors here are float32 or float64 with a batch dimension, as api.py prepares them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _registry
from .. import _library
from . import backends as _backends  # noqa: F401  (registers the adapters)

_SOLVER = "float alpha, str method, float epsilon, int outer_iter, int inner_iter, float? tol, str backend"
_RESULT = "(Tensor plan, Tensor gw_cost, Tensor marginal_error, Tensor n_iter, Tensor converged)"
_library.define(f"gromov_wasserstein_fwd(Tensor cost_x, Tensor cost_y, Tensor a, Tensor b, Tensor? cost_xy, {_SOLVER}) -> {_RESULT}")
_library.define(
    "gromov_from_tokens_fwd(Tensor x, Tensor y, Tensor a, Tensor b, Tensor? cost_xy, float threshold, bool over_batch, "
    f"{_SOLVER}) -> {_RESULT}"
)
_library.define(
    "gromov_wasserstein_bwd(Tensor cost_x, Tensor cost_y, Tensor plan, Tensor grad_cost, float alpha, bool fused, str backend) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "gromov_from_tokens_bwd(Tensor x, Tensor y, Tensor a, Tensor b, Tensor plan, Tensor grad_cost, float threshold, bool over_batch, "
    "float alpha, bool cross_given, str backend) -> (Tensor, Tensor, Tensor)"
)


def _run(kernel: str, backend: str, tensor: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    return _library.without_autocast(_registry.resolve("gromov", tensor, backend).kernels[kernel], tensor, *arguments)


@_library.implement("gromov_wasserstein_fwd")
def _fwd(cost_x, cost_y, a, b, cost_xy, alpha, method, epsilon, outer_iter, inner_iter, tol, backend):
    return _run("fwd", backend, cost_x, cost_y, a, b, cost_xy, alpha, method, epsilon, outer_iter, inner_iter, tol)


@_library.implement("gromov_from_tokens_fwd")
def _from_tokens_fwd(x, y, a, b, cost_xy, threshold, over_batch, alpha, method, epsilon, outer_iter, inner_iter, tol, backend):
    solver = (alpha, method, epsilon, outer_iter, inner_iter, tol)
    return _run("from_tokens_fwd", backend, x, y, a, b, cost_xy, threshold, over_batch, *solver)


@_library.fake("gromov_wasserstein_fwd")
@_library.fake("gromov_from_tokens_fwd")
def _fwd_fake(x, y, a, b, *rest):
    (batch, n), m = a.shape, b.shape[1]
    return (
        x.new_empty(batch, n, m),
        x.new_empty(batch),
        x.new_empty(batch),
        x.new_empty(batch, dtype=torch.int32),
        x.new_empty(batch, dtype=torch.bool),
    )


@_library.implement("gromov_wasserstein_bwd")
def _bwd(cost_x, cost_y, plan, grad_cost, alpha, fused, backend):
    return _run("bwd", backend, cost_x, cost_y, plan, grad_cost, alpha, fused)


@_library.implement("gromov_from_tokens_bwd")
def _from_tokens_bwd(x, y, a, b, plan, grad_cost, threshold, over_batch, alpha, cross_given, backend):
    return _run("from_tokens_bwd", backend, x, y, a, b, plan, grad_cost, threshold, over_batch, alpha, cross_given)


@_library.fake("gromov_wasserstein_bwd")
def _bwd_fake(cost_x, cost_y, plan, grad_cost, alpha, fused, backend):
    return cost_x.new_empty(cost_x.shape), cost_y.new_empty(cost_y.shape), plan.new_empty(plan.shape if fused else (0,))


@_library.fake("gromov_from_tokens_bwd")
def _from_tokens_bwd_fake(x, y, a, b, plan, grad_cost, threshold, over_batch, alpha, cross_given, backend):
    return x.new_empty(x.shape), y.new_empty(y.shape), plan.new_empty(plan.shape if cross_given else (0,))


def _setup_context(ctx, inputs, output):
    cost_x, cost_y, _, _, cost_xy, alpha, *_, backend = inputs
    plan, _, *diagnostics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(plan, *diagnostics)
    ctx.save_for_backward(cost_x, cost_y, plan)
    ctx.options = (alpha, cost_xy is not None, _registry.requested(backend))


def _backward(ctx, _, grad_cost, *__):
    rest = (None,) * 7
    if grad_cost is None:
        return None, None, None, None, None, *rest
    d_x, d_y, d_xy = _library.call("gromov_wasserstein_bwd", (*ctx.saved_tensors, grad_cost), *ctx.options)
    return d_x, d_y, None, None, d_xy if ctx.options[1] else None, *rest


def _from_tokens_setup_context(ctx, inputs, output):
    x, y, a, b, cost_xy, threshold, over_batch, alpha, *_, backend = inputs
    plan, _, *diagnostics = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(plan, *diagnostics)
    ctx.save_for_backward(x, y, a, b, plan)
    ctx.options = (threshold, over_batch, alpha, cost_xy is not None, _registry.requested(backend))


def _from_tokens_backward(ctx, _, grad_cost, *__):
    rest = (None,) * 9
    if grad_cost is None:
        return None, None, None, None, None, *rest
    d_x, d_y, d_xy = _library.call("gromov_from_tokens_bwd", (*ctx.saved_tensors, grad_cost), *ctx.options)
    return d_x, d_y, None, None, d_xy if ctx.options[3] else None, *rest


_library.autograd("gromov_wasserstein_fwd", _backward, _setup_context)
_library.autograd("gromov_from_tokens_fwd", _from_tokens_backward, _from_tokens_setup_context)
_library.refuse_second_derivative("gromov_wasserstein_bwd", "gromov_wasserstein")
_library.refuse_second_derivative("gromov_from_tokens_bwd", "gromov_from_tokens")
