"""The public function: validates, fills in defaults, calls the op."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _checks
from .. import _library
from ..attention import philox
from . import op as _op  # noqa: F401  (defines torch.ops.helo_fast.residual_norm_fwd)

_NAME = "residual_norm"


def residual_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""A residual connection, dropped out and normalised: LayerNorm(x + dropout(y)) over the last dimension.

    Args:
        x: ``[.., D]``, float32, float64, float16 or bfloat16 (halves are computed in float32). Any strides, also of the others.
        y: like ``x``.
        weight: ``[D]``, of x's dtype, or float32 where that is a half.
        bias: like ``weight``.
        dropout_p: probability, in [0, 1), that an entry of y is dropped; the kept ones are scaled by 1 / (1 - dropout_p).
        eps: added to the variance, above 0.
        seed: int64 value, or int64 tensor with one element on x's device, that fixes the mask. None draws one on x's device from
            torch's default generator (``torch.manual_seed`` governs it), and only where the probability is above 0.
        backend: "eager", "cpp", "triton", "cuda"; None follows :func:`helo_fast.backend`.

    Returns:
        Tensor: ``[.., D]`` in x's dtype; under autocast, in autocast's dtype (float64 stays), to which x and y are cast.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or value.
        RuntimeError: the back end asked for cannot serve.

    Notes:
        Gradients: x, y, weight and bias; deterministic; second and forward-mode derivatives are refused. Saved for backward: x, y,
        weight, mean and reciprocal deviation of each row, the seed. The mask is dropout's of ``helo_fast/ops/attention/philox.py``, x
        taken as a matrix [rows, D] of problem 0: the same bits on every back end, forward and backward, whatever the number of threads.

    Example:
        >>> import torch
        >>> from helo_fast.ops.residual_norm import residual_norm
        >>> x = torch.tensor([[1.0, 2.0, 3.0]])
        >>> residual_norm(x, x, torch.ones(3), torch.zeros(3)).round(decimals=3)
        tensor([[-1.2250,  0.0000,  1.2250]])

    Source: Ba, Kiros and Hinton, "Layer Normalization", 2016; Vaswani et al., "Attention Is All You Need", NeurIPS 2017, section 3.1.
    """
    x, y = _library.cast_by_autocast(x, y)
    _check_tensors(x, y, weight, bias)
    dropout_p = _checks.fraction(_NAME, "dropout_p", dropout_p)
    eps = _checks.positive(_NAME, "eps", eps)
    seed = _checks.seed(_NAME, seed, "x", x)
    if philox.dropout_threshold(dropout_p) == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(2**63 - 1, (), device=x.device)
    return _library.call("residual_norm_fwd", (x, y, weight, bias, seed), dropout_p, eps, backend or "")[0]


def _check_tensors(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> None:
    any_dimensions = range(1, 65)
    _checks.tensor(_NAME, "x", x, any_dimensions, "[.., D]")
    _checks.tensor(_NAME, "y", y, any_dimensions, "of x's shape")
    _checks.like(_NAME, "y", y, "x", x)
    _checks.shape(_NAME, "y", y, (tuple(x.shape),), "of x's shape")
    if x.shape[-1] == 0:
        raise ValueError(f"{_NAME}: x has D = 0, got {_checks.shape_text(x)}; D must be at least 1")
    for name, value in (("weight", weight), ("bias", bias)):
        _checks.tensor(_NAME, name, value, (1,), "[D]")
        _checks.shape(_NAME, name, value, ((x.shape[-1],),), "[D]")
        if value.device != x.device:
            raise ValueError(f"{_NAME}: {name} is on {value.device} but x on {x.device}; use {name}.to(x.device)")
        if value.dtype != x.dtype and not (value.dtype == torch.float32 and x.dtype != torch.float64):
            raise TypeError(f"{_NAME}: {name} is {value.dtype} but x {x.dtype}; use {name}.to(x.dtype)")
