"""The parts of HeLo: attention with DropKey, the transformer layer, label correlations, transport between token sets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from .. import _registry
from .._torch_state import autocast_off
from ..ops import transformer
from ..ops.attention import reference as attention_reference
from ..ops.attention.api import lcd_attention
from ..ops.gromov.api import gromov_from_tokens
from ..ops.linear import linear, linears
from ..ops.residual_norm.api import residual_norm
from ..ops.sinkhorn.api import sinkhorn
from .config import HeLoConfig

NORM_FLOOR = 1e-12


def draws_with_torch(rng: str, tensor: Tensor) -> bool:
    """Whether masks come from torch's generator, in the released code's order (else from the operators' Philox).

    Raises:
        RuntimeError: rng is "torch", and what runs is not the eager back end, uncompiled.
    """
    if rng == "philox":
        return False
    # A compiled graph draws in an order of its own, and cannot see which back end is in force.
    name = "torch.compile" if torch.compiler.is_compiling() else _registry.resolve("lcd_attention", tensor).backend.name
    if rng == "torch" and name != "eager":
        raise RuntimeError(
            f"HeLo: rng='torch' draws masks in the released code's order, which only the eager back end can, and {name!r} is in force; "
            "run under helo_fast.backend('eager') or set HeLoConfig.rng to 'auto' or 'philox'"
        )
    return name == "eager"


def rates(config: HeLoConfig, training: bool) -> tuple[float, float]:
    """The rates of (DropKey, dropout) in force."""
    return config.dropkey if training or config.dropkey_in_evaluation else 0.0, config.dropout if training else 0.0


_has_any_global_hook = getattr(torch_module, "_has_any_global_hook", lambda: False)  # torch's own, not promised
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def unchanged(module: nn.Module, kind: type[nn.Module], **absent: None) -> bool:
    """Whether the module is what this package made, and nobody waits for its call: it may be computed from its parameters, without one.

    Keywords are attributes that are to be None, as in nn.Linear without a bias; other parameters are to be there.
    """
    return (
        type(module) is kind
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
        and not any(getattr(module, hooks) for hooks in _HOOKS)
        and not _has_any_global_hook()
        and all((parameter is None) == (name in absent) for name, parameter in module._parameters.items())
    )


class Linear(nn.Linear):
    """nn.Linear by :func:`helo_fast.ops.linear.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Encoder(Linear):
    """Features [.., in_features] to tokens [.., count, width]; without count, to one token [.., width]."""

    def __init__(self, in_features: int, width: int, count: int | None = None):
        super().__init__(in_features, width * (count or 1))
        self.shape = (width,) if count is None else (count, width)

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).unflatten(-1, self.shape)


class Encoded:
    """The tokens encoder(features), made once and only if asked for, and linear maps of them."""

    def __init__(self, encoder: Encoder, features: Tensor):
        self.encoder, self.features = encoder, features
        self._tokens: Tensor | None = None

    def tokens(self) -> Tensor:
        if self._tokens is None:
            self._tokens = self.encoder(self.features)
        return self._tokens

    def through(self, *weights: Tensor) -> tuple[Tensor, ...]:
        """linears(tokens(), *weights); by products of two matrices where that is less work, but on the eager back end, the reference."""
        encoder = self.encoder
        if not torch.compiler.is_compiling():  # a compiled graph serves every batch size, and cannot see which back end is in force
            rows, width = self.features.shape[:-1].numel(), encoder.shape[-1]
            less = rows * width > (rows + width) * encoder.in_features
            if not less or _registry.requested(None) == "eager" or not unchanged(encoder, Encoder):
                return linears(self.tokens(), *weights)
        # The bias goes with a further feature, 1.
        inner = torch.cat([encoder.weight, encoder.bias.unsqueeze(-1)], -1).unflatten(0, encoder.shape)  # [.., D, in_features + 1]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        composed = weight.expand(*inner.shape[:-2], -1, -1) @ inner
        mapped = linear(F.pad(self.features, (0, 1), value=1.0), composed.flatten(0, -2)).unflatten(-1, (*inner.shape[:-2], -1))
        return mapped.split([len(each) for each in weights], -1)


class MultiHeadAttention(nn.Module):
    """LayerNorm(x + softmax(dropkey((q k' + bias) scale)) v), with q from x, k and v from y; no biases, no output projection."""

    def __init__(self, config: HeLoConfig, heads: int):
        super().__init__()
        width = config.feature_dim
        self.linear_k = nn.Linear(width, width, bias=False)
        self.linear_v = nn.Linear(width, width, bias=False)
        self.linear_q = nn.Linear(width, width, bias=False)
        self.layer_norm = nn.LayerNorm(width)
        self.config = config
        self.heads = heads

    def forward(
        self,
        x: Tensor | Encoded,  # [B, n, D], or [n, D] shared by the batch
        *sources: Tensor | Encoded,  # each y [B, m, D]; x attends to one after the other, and the query is projected once
        bias: Tensor | None = None,  # [n, m] or [B, n, m], added before the scale
    ) -> Tensor:  # [B, len(sources) n, D]
        maps = self.linear_q, self.linear_k, self.linear_v
        if len(sources) == 1 and sources[0] is x:  # self-attention
            operands = [self._project(x, *maps)]
        else:
            (q,) = self._project(x, maps[0])  # [B, H, n, d] or [H, n, d]
            operands = [(q, *self._project(y, *maps[1:])) for y in sources]
        x = x.tokens() if isinstance(x, Encoded) else x
        results = [_add_and_norm(self.layer_norm, x, self._attend(*each, bias).transpose(1, 2).flatten(2)) for each in operands]
        return results[0] if len(results) == 1 else torch.cat(results, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(q.dtype)
        dropkey, dropout = rates(self.config, self.training)
        if (dropkey or dropout) and draws_with_torch(self.config.rng, q):
            drop, keep = _torch_masks((k.shape[0], self.heads, q.shape[-2], k.shape[-2]), dropkey, dropout, q.device)
            released = self.config.dropped_row_gradient
            return attention_reference.lcd_attention(q, k, v, bias, drop=drop, keep=keep, released_gradient=released)
        return lcd_attention(q, k, v, bias, dropkey_p=dropkey, dropout_p=dropout)

    def _project(self, x: Tensor | Encoded, *maps: nn.Linear) -> tuple[Tensor, ...]:
        """x weight' [.., n, D] as [.., H, n, d], for each map."""
        if all(unchanged(each, nn.Linear, bias=None) for each in maps):
            weights = [each.weight for each in maps]
            projected = x.through(*weights) if isinstance(x, Encoded) else linears(x, *weights)
        else:
            x = x.tokens() if isinstance(x, Encoded) else x
            projected = [each(x) for each in maps]
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for t in projected)


def _torch_masks(
    shape: tuple[int, int, int, int], dropkey: float, dropout: float, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """DropKey's and dropout's masks [B, H, n, m], drawn as the released code draws them: bernoulli of a full tensor, then F.dropout."""
    batch, heads, n, m = shape
    drop = torch.bernoulli(torch.full((batch * heads, n, m), dropkey, device=device)).bool().view(shape) if dropkey else None
    keep = F.dropout(torch.ones(batch * heads, n, m, device=device), dropout).view(shape) if dropout else None
    return drop, keep


def _add_and_norm(norm: nn.LayerNorm, x: Tensor, y: Tensor, p: float = 0.0, rng: str = "auto") -> Tensor:
    """norm(x + dropout(y)) [B, n, D]; x may be [n, D], shared by the batch."""
    # On a GPU torch.compile fuses the plain operations, and their dropout is torch's.
    if y.device.type != "cpu" or draws_with_torch(rng if p else "auto", y) or not unchanged(norm, nn.LayerNorm):
        return norm(x + F.dropout(y, p))
    return residual_norm(x.expand(y.shape), y, norm.weight, norm.bias, dropout_p=p, eps=norm.eps)


class FeedForward(nn.Module):
    """LayerNorm(x + dropout(w2(GELU(w1 x))))."""

    def __init__(self, config: HeLoConfig):
        super().__init__()
        self.w1 = Linear(config.feature_dim, config.hidden_size)
        self.w2 = Linear(config.hidden_size, config.feature_dim)
        self.layer_norm = nn.LayerNorm(config.feature_dim)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        _, dropout = rates(self.config, self.training)
        return _add_and_norm(self.layer_norm, x, self.w2(F.gelu(self.w1(x))), dropout, self.config.rng)


class TransformerLayer(nn.Module):
    """Self-attention, then feed-forward; in one piece where that is offered, and its parts are neither replaced nor hooked."""

    def __init__(self, config: HeLoConfig):
        super().__init__()
        self.attention = MultiHeadAttention(config, config.heads)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,  # [B, n, D]
        beside: Tensor | None = None,  # like x: a second set of tokens for each sample
    ) -> Tensor:  # [B, n, D], or [2 B, n, D]: of each sample both sets
        attention, feed_forward = self.attention, self.feed_forward
        parameters = self._parameters_of_one_piece()
        if parameters and transformer.serves(x, beside, *parameters):
            dropkey, dropout = rates(attention.config, attention.training)
            if dropkey or dropout:
                for part in (attention, feed_forward):
                    draws_with_torch(part.config.rng, x)  # raises where masks are to be torch's
            if rates(feed_forward.config, feed_forward.training)[1] == dropout:  # one piece has but one rate
                eps = attention.layer_norm.eps, feed_forward.layer_norm.eps
                options = {"heads": attention.heads, "dropkey_p": dropkey, "dropout_p": dropout, "eps": eps}
                return transformer.transformer_layer(x, beside, *parameters, **options)
        if beside is not None:
            x = torch.cat([x, beside], 1).view(2 * len(x), *x.shape[1:])
        return feed_forward(attention(x, x))

    def _parameters_of_one_piece(self) -> tuple[Tensor, ...]:
        """As transformer_layer takes them; none where a module that the composition would call is not as it was made."""
        attention, feed_forward = self.attention, self.feed_forward
        if torch.compiler.is_compiling() or not (unchanged(attention, MultiHeadAttention) and unchanged(feed_forward, FeedForward)):
            return ()
        maps = attention.linear_q, attention.linear_k, attention.linear_v
        first, w1, w2, last = attention.layer_norm, feed_forward.w1, feed_forward.w2, feed_forward.layer_norm
        if not (
            all(unchanged(each, nn.Linear, bias=None) for each in maps)
            and all(unchanged(each, Linear) for each in (w1, w2))
            and all(unchanged(each, nn.LayerNorm) for each in (first, last))
        ):
            return ()
        weights = [each.weight for each in maps]
        return *weights, first.weight, first.bias, w1.weight, w1.bias, w2.weight, w2.bias, last.weight, last.bias


def gram(x: Tensor, dim: int) -> Tensor:
    """x x' with x scaled to unit norm along dim: over its rows' entries (-1, cosine similarity of the rows) or over the rows (-2)."""
    with autocast_off(x.device):
        x = _to_unit_norm(x, dim)
        return x @ x.mT


def _to_unit_norm(x: Tensor, dim: int) -> Tensor:
    """F.normalize(x, dim=dim, eps=NORM_FLOOR), whose norm is slow on a CPU."""
    return x / x.square().sum(dim, keepdim=True).clamp(min=NORM_FLOOR**2).sqrt()


def transport_plan(config: HeLoConfig, x: Tensor, y: Tensor) -> Tensor:
    """The plan [B, n, m] between tokens x [B, n, D] and y [B, m, D], uniform marginals."""
    if config.plan_gradient == "none":
        x, y = x.detach(), y.detach()
    if config.transport == "sinkhorn":
        return sinkhorn(_cosine_cost(x, y), epsilon=config.epsilon, max_iter=config.sinkhorn_iterations, gradient=config.plan_gradient).plan
    return gromov_from_tokens(
        x,
        y,
        threshold=config.threshold,
        threshold_over=config.threshold_over,
        alpha=config.fused_alpha if config.transport == "fused" else 1.0,
        epsilon=config.epsilon,
        outer_iter=config.gromov_outer_iterations,
        inner_iter=config.gromov_inner_iterations,
    ).plan


def _cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """1 - cos(x_i, y_j), [B, n, m], at least in float32."""
    with autocast_off(x.device):
        x, y = (_to_unit_norm(t if t.dtype == torch.float64 else t.float(), -1) for t in (x, y))
        return 1 - x @ y.mT


def transport(plan: Tensor, x: Tensor, transport_map: str) -> Tensor:
    """x [B, n, D] carried over by the plan [B, n, m]: "barycentric" diag(1 / T'1) T' x [B, m, D]; "plan" T x (n = m)."""
    if transport_map == "plan":
        return plan.to(x.dtype) @ x
    mass = plan.sum(-2, keepdim=True).clamp(min=torch.finfo(plan.dtype).tiny)  # [B, 1, m]
    return (plan / mass).to(x.dtype).mT @ x
