"""The torch.library ops behind residual_norm: schema, fake and autograd, once for all back ends.

x and y are [.., D] of one shape and dtype, weight and bias [D], seed is None where nothing is dropped, as api.py prepares them.
"""

from __future__ import annotations

import math

import torch

from ... import _registry
from .. import _library
from ..attention import philox
from ..attention.reference import compute_dtype
from . import backends as _backends  # noqa: F401  (registers the adapters)

_library.define(
    "residual_norm_fwd(Tensor x, Tensor y, Tensor weight, Tensor bias, Tensor? seed, float dropout_p, float eps, str backend) "
    "-> (Tensor out, Tensor mean, Tensor rstd)"
)
_library.define(
    "residual_norm_bwd(Tensor grad_out, Tensor x, Tensor y, Tensor weight, Tensor mean, Tensor rstd, Tensor? seed, float dropout_p, "
    "str backend) -> (Tensor dx, Tensor dy, Tensor dweight, Tensor dbias)"
)


def _kernel(name, x, seed, dropout_p, backend):
    if (seed is None) != (philox.dropout_threshold(dropout_p) == 0):
        raise ValueError(f"residual_norm: a seed goes with a dropout_p above 0 and with no other, got {dropout_p}; give both or neither")
    return _registry.resolve("residual_norm", x, backend).kernels[name]


@_library.implement("residual_norm_fwd")
def _fwd(x, y, weight, bias, seed, dropout_p, eps, backend):
    kernel = _kernel("fwd", x, seed, dropout_p, backend)
    return _library.without_autocast(kernel, x, y, weight, bias, seed, dropout_p, eps)


@_library.fake("residual_norm_fwd")
def _fwd_fake(x, y, weight, bias, seed, dropout_p, eps, backend):
    statistic = x.new_empty(math.prod(x.shape[:-1]), dtype=compute_dtype(x.dtype))
    return x.new_empty(x.shape), statistic, torch.empty_like(statistic)


@_library.implement("residual_norm_bwd")
def _bwd(grad_out, x, y, weight, mean, rstd, seed, dropout_p, backend):
    kernel = _kernel("bwd", x, seed, dropout_p, backend)
    return _library.without_autocast(kernel, grad_out, x, y, weight, mean, rstd, seed, dropout_p)


@_library.fake("residual_norm_bwd")
def _bwd_fake(grad_out, x, y, weight, mean, rstd, seed, dropout_p, backend):
    dy = y.new_empty(0 if seed is None else y.shape)
    return x.new_empty(x.shape), dy, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):
    x, y, weight, _, seed, ctx.dropout_p, _, backend = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, y, weight, mean, rstd, seed)
    ctx.backend = _registry.requested(backend)


def _backward(ctx, grad_out, *_):
    rest = (None,) * 4
    if grad_out is None:
        return None, None, None, None, *rest
    saved = ctx.saved_tensors  # once: a checkpoint gives them out no second time
    dx, dy, dweight, dbias = _library.call("residual_norm_bwd", (grad_out, *saved), ctx.dropout_p, ctx.backend)
    return dx, dx if saved[-1] is None else dy, dweight, dbias, *rest


_library.autograd("residual_norm_fwd", _backward, _setup_context)
_library.refuse_second_derivative("residual_norm_bwd", "residual_norm")
