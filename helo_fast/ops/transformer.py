"""A transformer layer as the model calls it: in one piece, which on the CPU keeps what a step makes for the next in the cache.

Not an operator with back ends: it is what lcd_attention, residual_norm and torch's linear maps compose, and where it does not serve,
the model composes them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _native, _registry
from .._torch_state import goes_straight
from .attention import philox

UNIT = 16  # of which D and F are to be multiples


def serves(x: Tensor, beside: Tensor | None, *parameters: Tensor | None) -> bool:
    """Whether transformer_layer can: in float32 on the CPU, uncompiled, where the back end in force is "cpp".

    Args:
        x, beside, parameters: as transformer_layer takes them; where a shape is none of its own, or a parameter None, the parts have to
            say so.
    """
    tensors = (x, *parameters) if beside is None else (x, beside, *parameters)
    if any(t is None for t in parameters):
        return False
    if not goes_straight(tensors) or not all(t.is_cpu and t.dtype == torch.float32 for t in tensors):
        return False
    if x.dim() != 3 or x.numel() == 0 or (beside is not None and beside.shape != x.shape):
        return False
    D, F = x.shape[-1], parameters[5].shape[0]
    shapes = (*[(D, D)] * 3, (D,), (D,), (F, D), (F,), (D, F), (D,), (D,), (D,))
    return (
        D % UNIT == 0
        and F % UNIT == 0
        and all(t.shape == shape for t, shape in zip(parameters, shapes))
        and all(_registry.resolve(op, x).backend is _registry.CPP for op in ("lcd_attention", "residual_norm"))
    )


def transformer_layer(
    x: Tensor,
    beside: Tensor | None,
    *parameters: Tensor,
    heads: int,
    dropkey_p: float = 0.0,
    dropout_p: float = 0.0,
    eps: tuple[float, float] = (1e-5, 1e-5),
) -> Tensor:
    """h = norm1(x + attention(x wq', x wk', x wv')); norm2(h + dropout(gelu(h w1' + b1) w2' + b2)).

    Masks are those of lcd_attention and residual_norm, called one after the other, from the same numbers of torch's generator.

    Args:
        x: ``[B, n, D]``; serves() has to hold.
        beside: like x: a second set of tokens for each sample, which does not see the first. None: there is none.
        parameters: wq, wk, wv ``[D, D]``; norm1's weight and bias ``[D]``; w1 ``[F, D]``, b1 ``[F]``, w2 ``[D, F]``, b2 ``[D]``; norm2's
            weight and bias ``[D]``.
        heads: H, which divides D.
        dropkey_p, dropout_p: of the attention; dropout_p also of the feed-forward map's result.
        eps: of the two norms.

    Returns:
        Tensor: ``[B, n, D]``, with beside ``[2 B, n, D]``: of each sample both sets. Gradients: x, beside and the parameters;
        deterministic, whatever the number of threads.
    """
    drop_below, cut_below = philox.dropkey_threshold(dropkey_p), philox.dropout_threshold(dropout_p)
    attention_seed = torch.randint(2**63 - 1, ()) if drop_below or cut_below else None
    dropout_seed = torch.randint(2**63 - 1, ()) if cut_below else None
    drawn = drop_below, cut_below, philox.dropout_rescale(dropout_p)
    return _TransformerLayer.apply((attention_seed, dropout_seed), heads, eps, drawn, x, beside, *parameters)


class _TransformerLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, seeds, heads: int, eps: tuple[float, float], drawn: tuple[int, int, float], *tensors: Tensor | None) -> Tensor:
        tensors = tuple(t if t is None else t.contiguous() for t in tensors)
        x, beside, wq, wk, wv, norm1, _, w1, _, w2, _, norm2, _ = tensors
        scale = (x.shape[-1] // heads) ** -0.5
        out, *saved = _native.cpu_op("transformer_layer_fwd")(*tensors, *seeds, heads, scale, *eps, *drawn)
        ctx.save_for_backward(x, beside, wq, wk, wv, norm1, w1, w2, norm2, *saved)
        ctx.seeds, ctx.options = seeds, (heads, scale, *drawn)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives them out no second time
        arguments = grad_out.contiguous(), *saved, *ctx.seeds, *ctx.options
        dx, d_beside, *d_parameters = _native.cpu_op("transformer_layer_bwd")(*arguments)
        return None, None, None, None, dx, None if saved[1] is None else d_beside, *d_parameters
