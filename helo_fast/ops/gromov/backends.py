"""Who serves gromov: an adapter per back end from the op's arguments to a kernel call."""

from __future__ import annotations

from ... import _registry
from ..._registry import EAGER, Adapter
from . import reference

# The backwards are a few batched products, which PyTorch runs on every device.
_BACKWARDS = {"bwd": reference.bwd, "from_tokens_bwd": reference.from_tokens_bwd}

_registry.register(
    "gromov",
    (Adapter(EAGER, {"fwd": reference.fwd, "from_tokens_fwd": reference.from_tokens_fwd, **_BACKWARDS}),),
    auto={"cpu": ("eager",), "cuda": ("eager",)},
)
