"""helo-fast: batched optimal transport, biased attention, and the HeLo model of emotion-distribution learning."""

from . import pot
from ._checks import checks
from ._registry import backend, info
from .model import HeLo, HeLoConfig, load_released
from .ops.attention import lcd_attention
from .ops.gromov import GromovResult, gromov_from_tokens, gromov_wasserstein
from .ops.sinkhorn import SinkhornResult, sinkhorn

__version__ = "0.1.0"

__all__ = [
    "GromovResult",
    "HeLo",
    "HeLoConfig",
    "SinkhornResult",
    "backend",
    "checks",
    "gromov_from_tokens",
    "gromov_wasserstein",
    "info",
    "lcd_attention",
    "load_released",
    "pot",
    "sinkhorn",
]
