"""The public function: validates, fills in defaults, calls the op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import _checks
from .. import _library
from . import op as _op  # noqa: F401  (defines torch.ops.helo_fast.lcd_attention_fwd)
from . import philox

_NAME = "lcd_attention"
_BIAS_SHAPES = "[n, m], [B, n, m], [B, 1, n, m] or [B, H, n, m]"


def lcd_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropkey_p: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Attention with a bias on the logits, DropKey before the softmax and dropout after it.

    Computes dropout(softmax(dropkey((q k' + bias) scale))) v: HeLo's label-correlation-driven attention where bias is a label
    correlation, ordinary multi-head attention where it is None. The bias is added before the scale.

    Args:
        q: ``[B, H, n, d]``; or ``[1, H, n, d]`` or ``[H, n, d]``, one query shared by the batch and never expanded in memory.
            float32, float64, float16 or bfloat16 (halves are computed in float32). Any strides, also of the others.
        k: ``[B, H, m, d]``.
        v: ``[B, H, m, d]``.
        bias: ``[n, m]``, ``[B, n, m]`` or ``[B, 1 or H, n, m]`` (B may be 1), in units of q k'; -inf masks a key. None adds nothing.
        scale: multiplies (q k' + bias); None is d ** -0.5.
        dropkey_p: probability, 0 to 1, that a logit is dropped, independently per batch item, head, query and key. A row whose keys
            are all dropped is the plain mean of their values.
        dropout_p: probability, in [0, 1), that a weight is dropped after the softmax; the kept ones are scaled by 1 / (1 - dropout_p).
        seed: int64 value, or int64 tensor with one element on q's device, that fixes both masks. None draws one on q's device from
            torch's default generator (``torch.manual_seed`` governs it), and only where a probability is above 0.
        backend: "eager", "cpp", "triton", "cuda"; None follows :func:`helo_fast.backend`.

    Returns:
        Tensor: ``[B, H, n, d]`` in q's dtype; under autocast, in autocast's dtype (float64 stays), to which all inputs are cast
        as for ``torch.nn.functional.scaled_dot_product_attention``. It lies in memory as ``[B, n, H, d]``, and so do the gradients
        of q, k and v: ``out.transpose(1, 2).flatten(2)`` copies nothing, nor does the way back.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value.
        RuntimeError: the back end asked for cannot serve.

    Notes:
        Gradients: q, k, v and bias, each summed over whatever it was broadcast over; deterministic; second and forward-mode derivatives
        are refused. The logits of a row whose keys are all dropped have none, as the output does not depend on them (in float64 too:
        the rule is explicit, not an addition of -1e12). A key masked by the bias never weighs more than a dropped one, and a row whose
        keys are all masked gives zeros.
        Masks are Philox 4x32-10 in the layout of ``helo_fast/ops/attention/philox.py``: the same seed gives the same masks, bit for
        bit, on every back end, at every tiling, forward and backward. Probabilities are taken to the nearest multiple of 2^-16, and
        dropout scales by that of the probability taken, so that the weights keep their expectation.
        Saved for backward: q, k, v, bias, the output, the row log-sum-exp and the seed. Back ends: eager holds n x m temporaries for
        a few heads at a time (at most about 4 million entries, or one head's); cpp holds 64 x 64 tiles, and where the bias or the query
        is shared up to 64 partial sums of its gradient (at most 16 million entries, or one sum's), so that the bits do not depend on
        the number of threads; cuda holds heads in shared memory, and up to 8192 such sums.

    Example:
        >>> import torch
        >>> from helo_fast import lcd_attention
        >>> q, k, v = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 3, 4), torch.eye(3, 4).view(1, 1, 3, 4)
        >>> bias = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
        >>> lcd_attention(q, k, v, bias).round(decimals=3)
        tensor([[[[0.3330, 0.3330, 0.3330, 0.0000],
                  [0.9780, 0.0110, 0.0110, 0.0000]]]])

    Source: Zheng et al., "HeLo", ACM MM 2025, section 3.4; DropKey: Li et al., "DropKey for Vision Transformer", CVPR 2023.
    """
    q, k, v, bias = _library.cast_by_autocast(q, k, v, bias)
    B, H, n, m = _check_tensors(q, k, v)
    bias = None if bias is None else _check_bias(bias, q, B, H, n, m)
    scale = q.shape[-1] ** -0.5 if scale is None else _finite("scale", scale)
    dropkey_p = _checks.fraction(_NAME, "dropkey_p", dropkey_p, below_one=False)
    dropout_p = _checks.fraction(_NAME, "dropout_p", dropout_p)
    seed = _checks.seed(_NAME, seed, "q", q)
    if philox.dropkey_threshold(dropkey_p) == 0 and philox.dropout_threshold(dropout_p) == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (), device=q.device)
    q = q if q.dim() == 4 else q.unsqueeze(0)
    return _library.call("lcd_attention_fwd", (q, k, v, bias, seed), scale, dropkey_p, dropout_p, backend or "")[0]


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """(B, H, n, m)"""
    _checks.tensor(_NAME, "q", q, (3, 4), "[B, H, n, d], [1, H, n, d] or [H, n, d]")
    _checks.tensor(_NAME, "k", k, (4,), "[B, H, m, d]")
    _checks.tensor(_NAME, "v", v, (4,), "[B, H, m, d]")
    _checks.like(_NAME, "k", k, "q", q)
    _checks.like(_NAME, "v", v, "q", q)
    B, H, m, d = k.shape
    n = q.shape[-2]
    q_hint = "[B, H, n, d], or [1, H, n, d] or [H, n, d] to share it, with k's B, H and d"
    _checks.shape(_NAME, "q", q, ((B, H, n, d), (1, H, n, d), (H, n, d)), q_hint)
    _checks.shape(_NAME, "v", v, ((B, H, m, d),), "of k's shape")
    for name, size, owner, tensor in (("H", H, "k", k), ("n", n, "q", q), ("m", m, "k", k), ("d", d, "q", q)):
        if size == 0:
            raise ValueError(f"{_NAME}: {owner} has {name} = 0, got {_checks.shape_text(tensor)}; H, n, m and d must be at least 1")
    return B, H, n, m


def _check_bias(bias: Tensor, q: Tensor, B: int, H: int, n: int, m: int) -> Tensor:
    """The bias as [B or 1, H or 1, n, m]."""
    _checks.tensor(_NAME, "bias", bias, (2, 3, 4), _BIAS_SHAPES)
    _checks.like(_NAME, "bias", bias, "q", q)
    accepted = ((n, m), (B, n, m), (B, 1, n, m), (B, H, n, m), (1, n, m), (1, 1, n, m), (1, H, n, m))
    _checks.shape(_NAME, "bias", bias, accepted, f"{_BIAS_SHAPES} (B may be 1)")
    if bias.dim() == 2:
        bias = bias.unsqueeze(0)
    return bias.unsqueeze(1) if bias.dim() == 3 else bias


def _finite(name: str, value: object) -> float:
    if isinstance(value, Tensor):
        raise TypeError(f"{_NAME}: {name} must be a Python number, got a tensor; use {name}.item()")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise ValueError(f"{_NAME}: {name} must be a finite number, got {value!r}; None is d ** -0.5")
    return float(value)
