"""Attention with a bias on the logits, DropKey and dropout."""

from .api import lcd_attention

__all__ = ["lcd_attention"]
