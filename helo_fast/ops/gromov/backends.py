"""Who serves gromov: an adapter per back end from the op's arguments to a kernel call."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native, _registry
from ..._registry import CPP, CUDA, EAGER, TRITON, Adapter
from ..sinkhorn.reference import CONVERGED_BY_DEFAULT
from . import reference


def _cpp(kernel: str):
    def call(*arguments: object) -> tuple[Tensor, ...]:
        contiguous = [value.contiguous() if isinstance(value, Tensor) else value for value in arguments]
        return _native.cpu_op(kernel)(*contiguous)

    return call


def _triton_fwd(x: Tensor, y: Tensor, a: Tensor, b: Tensor, cost_xy: Tensor | None, *solver: object) -> tuple[Tensor, ...]:
    from ...kernels import gromov as kernels  # imported here: triton is optional and slow to import

    if kernels.block(a.shape[1], b.shape[1], x.dtype) is None:  # larger problems are PyTorch's, a kernel for each step
        return reference.fwd(x, y, a, b, cost_xy, *solver)
    return kernels.gromov_fwd(x, y, a, b, cost_xy, None, *solver, _converged_at(*solver))


def _triton_from_tokens_fwd(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, cost_xy: Tensor | None, threshold: float, over_batch: bool, *solver: object
) -> tuple[Tensor, ...]:
    from ...kernels import gromov as kernels

    if kernels.block(a.shape[1], b.shape[1], x.dtype) is None:
        return reference.from_tokens_fwd(x, y, a, b, cost_xy, threshold, over_batch, *solver)
    return kernels.gromov_fwd(x, y, a, b, cost_xy, (threshold, over_batch), *solver, _converged_at(*solver))


def _triton_bwd(cost_x: Tensor, cost_y: Tensor, plan: Tensor, *grad_and_options: object) -> tuple[Tensor, ...]:
    from ...kernels import gromov_bwd as kernels

    served = kernels.block(plan.shape[1], plan.shape[2], plan.dtype) is not None
    return (kernels.gromov_bwd if served else reference.bwd)(cost_x, cost_y, plan, *grad_and_options)


def _triton_from_tokens_bwd(x: Tensor, y: Tensor, a: Tensor, b: Tensor, plan: Tensor, *grad_and_options: object) -> tuple[Tensor, ...]:
    from ...kernels import gromov_tokens_bwd as kernels

    served = kernels.block(plan.shape[1], plan.shape[2], plan.dtype) is not None
    return (kernels.gromov_tokens_bwd if served else reference.from_tokens_bwd)(x, y, a, b, plan, *grad_and_options)


def _cuda_from_tokens_fwd(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, cost_xy: Tensor | None, threshold: float, over_batch: bool, *solver: object
) -> tuple[Tensor, ...]:
    largest = 64 if x.dtype == torch.float32 else 54  # the kernel keeps a problem in shared memory
    if max(a.shape[1], b.shape[1]) > largest:
        return reference.from_tokens_fwd(x, y, a, b, cost_xy, threshold, over_batch, *solver)
    tensors = (tensor if tensor is None else tensor.contiguous() for tensor in (x, y, a, b, cost_xy))
    return torch.ops.helo_fast_cuda.gromov_from_tokens_fwd(*tensors, threshold, over_batch, *solver)


def _converged_at(*solver: object) -> float:
    tol = solver[-1]
    return CONVERGED_BY_DEFAULT if tol is None else tol


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
_TRITON = {"fwd": _triton_fwd, "from_tokens_fwd": _triton_from_tokens_fwd, "bwd": _triton_bwd, "from_tokens_bwd": _triton_from_tokens_bwd}
_CUDA = {**_EAGER, "from_tokens_fwd": _cuda_from_tokens_fwd}  # the gromov of HeLo's fusion; of given costs, PyTorch's

_registry.register(
    "gromov",
    (
        Adapter(EAGER, _EAGER),
        Adapter(CPP, _CPP, _registry.only_on("cpu")),
        Adapter(TRITON, _TRITON, _registry.triton_refuses),
        Adapter(CUDA, _CUDA, _registry.cuda_refuses),
    ),
    # A GPU back end joins "cuda" with a results file from the hardware in benchmarks/results.
    auto={"cpu": ("cpp", "eager"), "cuda": ("eager",)},
)
