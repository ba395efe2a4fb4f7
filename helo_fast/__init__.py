"""helo-fast: batched optimal transport, biased attention, and the HeLo model of emotion-distribution learning."""

from ._checks import checks
from ._registry import backend, info
from .ops.sinkhorn import SinkhornResult, sinkhorn

__version__ = "0.1.0"

__all__ = ["SinkhornResult", "backend", "checks", "info", "sinkhorn"]
