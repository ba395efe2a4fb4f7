"""A small HeLo of either preset, and inputs for it."""

import torch
import torch.nn.functional as F

from helo_fast.model import HeLo, HeLoConfig

SIZES = dict(n_channels=3, dim_eeg=2, dim_gsr=4, dim_ppg=5, dim_video=6, feature_dim=16, hidden_size=8, heads=2, emotion_classes=7)
PRESETS = ("paper", "released")


def config(preset: str, **overrides) -> HeLoConfig:
    return HeLoConfig(**{**SIZES, "preset": preset, **overrides})


def build(preset: str, seed: int = 0, **overrides) -> HeLo:
    torch.manual_seed(seed)
    return HeLo(config(preset, **overrides))


def batch(size: int = 4, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """eeg, gsr, ppg, video, labels (with zeros)."""
    generator = torch.Generator().manual_seed(size)
    inputs = [torch.randn(size, width, generator=generator, dtype=dtype) for width in (6, 4, 5, 6)]
    labels = F.normalize(torch.rand(size, 7, generator=generator, dtype=dtype).sub(0.4).clamp(min=0) + torch.eye(7, dtype=dtype)[0], p=1)
    return [*inputs, labels]


def embedding(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(9))
