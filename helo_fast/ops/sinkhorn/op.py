"""The torch.library ops behind sinkhorn: schema, fake and autograd, once for all back ends.

All tensors here are float32 or float64 with a batch dimension, as api.py prepares them; marginals of None are uniform.
"""

from __future__ import annotations

import torch

from ... import _registry
from .. import _library
from . import backends as _backends  # noqa: F401  (registers the adapters)
from .reference import marginals

_OPTIONS = "float epsilon, int max_iter, float? tol, int check_every, float? tau_a, float? tau_b"
_library.define(
    f"sinkhorn_fwd(Tensor cost, Tensor? a, Tensor? b, {_OPTIONS}, str gradient, str backend) "
    "-> (Tensor plan, Tensor f, Tensor g, Tensor transport_cost, Tensor marginal_error, Tensor n_iter, Tensor converged, Tensor history)"
)
_GRADS = "Tensor? grad_plan, Tensor? grad_f, Tensor? grad_g, Tensor? grad_cost, float epsilon, float? tau_a, float? tau_b, str backend"
_library.define(f"sinkhorn_implicit_bwd(Tensor cost, Tensor a, Tensor b, Tensor plan, {_GRADS}) -> (Tensor, Tensor, Tensor)")
_library.define(
    "sinkhorn_unrolled_bwd(Tensor cost, Tensor a, Tensor b, Tensor plan, Tensor history, Tensor n_iter, "
    f"{_GRADS}) -> (Tensor, Tensor, Tensor)"
)


@_library.implement("sinkhorn_fwd")
def _fwd(cost, a, b, epsilon, max_iter, tol, check_every, tau_a, tau_b, gradient, backend):
    kernel = _registry.resolve("sinkhorn", cost, backend).kernels["fwd"]
    return kernel(cost, a, b, epsilon, max_iter, tol, check_every, tau_a, tau_b, gradient == "unrolled")


@_library.fake("sinkhorn_fwd")
def _fwd_fake(cost, a, b, epsilon, max_iter, tol, check_every, tau_a, tau_b, gradient, backend):
    batch, n, m = cost.shape
    return (
        cost.new_empty(batch, n, m),
        cost.new_empty(batch, n),
        cost.new_empty(batch, m),
        cost.new_empty(batch),
        cost.new_empty(batch),
        cost.new_empty(batch, dtype=torch.int32),
        cost.new_empty(batch, dtype=torch.bool),
        cost.new_empty((batch, max_iter, n + m) if gradient == "unrolled" else (0,)),
    )


@_library.implement("sinkhorn_implicit_bwd")
def _implicit_bwd(cost, a, b, plan, grad_plan, grad_f, grad_g, grad_cost, epsilon, tau_a, tau_b, backend):
    kernel = _registry.resolve("sinkhorn", cost, backend).kernels["implicit_bwd"]
    return kernel(cost, a, b, plan, grad_plan, grad_f, grad_g, grad_cost, epsilon, tau_a, tau_b)


@_library.implement("sinkhorn_unrolled_bwd")
def _unrolled_bwd(cost, a, b, plan, history, n_iter, grad_plan, grad_f, grad_g, grad_cost, epsilon, tau_a, tau_b, backend):
    kernel = _registry.resolve("sinkhorn", cost, backend).kernels["unrolled_bwd"]
    return kernel(cost, a, b, plan, history, n_iter, grad_plan, grad_f, grad_g, grad_cost, epsilon, tau_a, tau_b)


@_library.fake("sinkhorn_implicit_bwd")
@_library.fake("sinkhorn_unrolled_bwd")
def _bwd_fake(cost, a, b, *rest):
    return cost.new_empty(cost.shape), a.new_empty(a.shape), b.new_empty(b.shape)


def _setup_context(ctx, inputs, output):
    cost, a, b, epsilon, _, _, _, tau_a, tau_b, gradient, backend = inputs
    plan, f, g, _, marginal_error, n_iter, converged, history = output
    diagnostics = marginal_error, n_iter, converged
    ctx.set_materialize_grads(False)
    if gradient == "implicit":
        ctx.mark_non_differentiable(*diagnostics)
        ctx.save_for_backward(cost, a, b, plan)
    elif gradient == "unrolled":
        ctx.mark_non_differentiable(*diagnostics, history)
        ctx.save_for_backward(cost, a, b, plan, history, n_iter)
    else:  # envelope
        ctx.mark_non_differentiable(plan, f, g, *diagnostics)
        ctx.save_for_backward(plan)
    ctx.options = (epsilon, tau_a, tau_b)
    ctx.gradient, ctx.backend = gradient, _registry.requested(backend)


def _backward(ctx, grad_plan, grad_f, grad_g, grad_cost, *_):
    rest = (None,) * 8
    if all(grad is None for grad in (grad_plan, grad_f, grad_g, grad_cost)):
        return None, None, None, *rest
    if ctx.gradient == "envelope":
        return grad_cost[:, None, None] * ctx.saved_tensors[0], None, None, *rest
    cost, a, b, *solution = ctx.saved_tensors
    inputs = (cost, *marginals(cost, a, b), *solution, grad_plan, grad_f, grad_g, grad_cost)
    d_cost, d_a, d_b = _library.call(f"sinkhorn_{ctx.gradient}_bwd", inputs, *ctx.options, ctx.backend)
    return d_cost, None if a is None else d_a, None if b is None else d_b, *rest


_library.autograd("sinkhorn_fwd", _backward, _setup_context)
_library.autocast_to_float32("sinkhorn_fwd")
_library.refuse_second_derivative("sinkhorn_implicit_bwd", "sinkhorn")
_library.refuse_second_derivative("sinkhorn_unrolled_bwd", "sinkhorn")
