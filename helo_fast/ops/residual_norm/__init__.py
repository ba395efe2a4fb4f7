"""A residual connection with dropout, normalised."""

from .api import residual_norm

__all__ = ["residual_norm"]
