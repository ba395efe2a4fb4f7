"""Where a launch runs."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Inside, launches go to the tensor's GPU, whichever is the current one; for a CPU tensor (the interpreter) it does nothing."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
