"""The torch.library ops behind lcd_attention: schema, fake and autograd, once for all back ends.

q is [B or 1, H, n, d], bias [B or 1, H or 1, n, m], all of one dtype, as api.py prepares them; strides are any.
Results [B, H, n, d] lie in memory as [B, n, H, d] (``reference.empty_heads``).
"""

from __future__ import annotations

from torch import Tensor

from ... import _registry
from .. import _library
from . import backends as _backends  # noqa: F401  (registers the adapters)
from . import philox
from .reference import compute_dtype, empty_heads

_OPTIONS = "float scale, float dropkey_p, float dropout_p"
_library.define(
    f"lcd_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? seed, {_OPTIONS}, str backend) -> (Tensor out, Tensor lse)"
)
_library.define(
    "lcd_attention_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, Tensor? seed, "
    f"{_OPTIONS}, bool bias_grad, str backend) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"
)


def _kernel(name: str, q: Tensor, seed: Tensor | None, dropkey_p: float, dropout_p: float, backend: str):
    if seed is None and (philox.dropkey_threshold(dropkey_p) or philox.dropout_threshold(dropout_p)):
        raise ValueError("lcd_attention: seed is None but a probability is above 0; give an int64 tensor with one element")
    return _registry.resolve("lcd_attention", q, backend).kernels[name]


@_library.implement("lcd_attention_fwd")
def _fwd(q, k, v, bias, seed, scale, dropkey_p, dropout_p, backend):
    kernel = _kernel("fwd", q, seed, dropkey_p, dropout_p, backend)
    return _library.without_autocast(kernel, q, k, v, bias, seed, scale, dropkey_p, dropout_p)


@_library.fake("lcd_attention_fwd")
def _fwd_fake(q, k, v, bias, seed, scale, dropkey_p, dropout_p, backend):
    B, H, n, d = k.shape[0], k.shape[1], q.shape[2], q.shape[3]
    return empty_heads(q, (B, H, n, d)), q.new_empty(B, H, n, dtype=compute_dtype(q.dtype))


@_library.implement("lcd_attention_bwd")
def _bwd(grad_out, q, k, v, bias, out, lse, seed, scale, dropkey_p, dropout_p, bias_grad, backend):
    kernel = _kernel("bwd", q, seed, dropkey_p, dropout_p, backend)
    arguments = (grad_out, q, k, v, bias, out, lse, seed, scale, dropkey_p, dropout_p, bias_grad)
    return _library.without_autocast(kernel, *arguments)


@_library.fake("lcd_attention_bwd")
def _bwd_fake(grad_out, q, k, v, bias, out, lse, seed, scale, dropkey_p, dropout_p, bias_grad, backend):
    dbias = q.new_empty(bias.shape if bias_grad else (0,))
    return empty_heads(q, q.shape), empty_heads(k, k.shape), empty_heads(v, v.shape), dbias


def _setup_context(ctx, inputs, output):
    q, k, v, bias, seed, scale, dropkey_p, dropout_p, backend = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bias, out, lse, seed)
    ctx.options = (scale, dropkey_p, dropout_p)
    ctx.backend = _registry.requested(backend)


def _backward(ctx, grad_out, _):
    rest = (None,) * 5
    if grad_out is None:
        return None, None, None, None, *rest
    bias_grad = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = _library.call("lcd_attention_bwd", (grad_out, *ctx.saved_tensors), *ctx.options, bias_grad, ctx.backend)
    return dq, dk, dv, dbias if bias_grad else None, *rest


_library.autograd("lcd_attention_fwd", _backward, _setup_context)
_library.refuse_second_derivative("lcd_attention_bwd", "lcd_attention")
