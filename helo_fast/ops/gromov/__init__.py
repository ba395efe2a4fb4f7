"""Gromov-Wasserstein transport between two spaces, batched, plain or fused, from cost matrices or from tokens."""

from .api import GromovResult, gromov_from_tokens, gromov_wasserstein

__all__ = ["GromovResult", "gromov_from_tokens", "gromov_wasserstein"]
