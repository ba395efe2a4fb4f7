"""Entropic optimal transport, batched, in the log domain."""

from .api import SinkhornResult, sinkhorn

__all__ = ["SinkhornResult", "sinkhorn"]
