"""The HeLo model, in the released and the paper preset."""

from .config import HeLoConfig
from .helo import HeLo, load_released

__all__ = ["HeLo", "HeLoConfig", "load_released"]
