"""Who serves gromov: an adapter per back end from the op's arguments to a kernel call."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _registry
from ..._registry import CPP, EAGER, Adapter
from . import reference


def _cpp(kernel: str):
    def call(*arguments: object) -> tuple[Tensor, ...]:
        contiguous = [value.contiguous() if isinstance(value, Tensor) else value for value in arguments]
        return getattr(torch.ops.helo_fast_cpu, kernel)(*contiguous)

    return call


_EAGER = {
    "fwd": reference.fwd,
    "from_tokens_fwd": reference.from_tokens_fwd,
    "bwd": reference.bwd,
    "from_tokens_bwd": reference.from_tokens_bwd,
}
_CPP = {
    "fwd": _cpp("gromov_wasserstein_fwd"),
    "from_tokens_fwd": _cpp("gromov_from_tokens_fwd"),
    "bwd": _cpp("gromov_wasserstein_bwd"),
    "from_tokens_bwd": _cpp("gromov_from_tokens_bwd"),
}

_registry.register(
    "gromov",
    (Adapter(EAGER, _EAGER), Adapter(CPP, _CPP, _registry.only_on("cpu"))),
    auto={"cpu": ("cpp", "eager"), "cuda": ("eager",)},
)
