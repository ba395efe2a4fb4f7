"""Who runs lcd_attention. Each adapter turns the op's arguments into one kernel call."""

from __future__ import annotations

from ... import _registry
from ..._registry import EAGER, Adapter
from . import reference

_registry.register(
    "lcd_attention",
    (Adapter(EAGER, {"fwd": reference.fwd, "bwd": reference.bwd}),),
    auto={"cpu": ("eager",), "cuda": ("eager",)},
)
