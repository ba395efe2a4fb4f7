"""Who runs sinkhorn. Each adapter turns the op's arguments into one kernel call."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ... import _native, _registry
from ..._registry import CPP, CUDA, EAGER, TRITON, Adapter
from . import reference


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [tensor if tensor is None else tensor.contiguous() for tensor in tensors]


def _cpp_fwd(cost: Tensor, a: Tensor | None, b: Tensor | None, *options: object) -> tuple[Tensor, ...]:
    a, b = a if a is None else a.contiguous(), b if b is None else b.contiguous()
    return _native.cpu_op("sinkhorn_fwd")(cost.contiguous(), a, b, *options)


def _cpp_implicit_bwd(cost, a, b, plan, grad_plan, grad_f, grad_g, grad_cost, *options: object) -> tuple[Tensor, ...]:
    a, b, plan, grad_f, grad_g, grad_cost = _contiguous(a, b, plan, grad_f, grad_g, grad_cost)
    return _native.cpu_op("sinkhorn_implicit_bwd")(cost, a, b, plan, grad_plan, grad_f, grad_g, grad_cost, *options)


def _cpp_unrolled_bwd(cost, a, b, plan, history, n_iter, grad_plan, grad_f, grad_g, grad_cost, *options: object) -> tuple[Tensor, ...]:
    a, b, plan, history, n_iter, grad_f, grad_g, grad_cost = _contiguous(a, b, plan, history, n_iter, grad_f, grad_g, grad_cost)
    return _native.cpu_op("sinkhorn_unrolled_bwd")(cost, a, b, plan, history, n_iter, grad_plan, grad_f, grad_g, grad_cost, *options)


def _with_partners(kernel: Callable, cost: Tensor, a: Tensor | None, b: Tensor | None, *options: object) -> tuple[Tensor | None, ...]:
    """A GPU kernel's results, on problems in which mass without any partner counts as none: the kernel would find potentials of inf."""
    _, max_iter, tol, _, tau_a, tau_b, _ = options
    if tau_a is None and tau_b is None:  # both sides are of the same mass
        return kernel(cost, a, b, *options)
    a, given_b = reference.marginals(cost, a, b)
    a, b = reference.with_partners(a, given_b)
    *values, error, n_iter, _, history = kernel(cost, a, b, *options)
    alone = (given_b - b).sum(-1)
    error = error + alone
    return *values, error, torch.where(alone > 0, max_iter, n_iter).to(n_iter.dtype), reference.converged(error, tol), history


def _completed(outputs: tuple[Tensor, ...], epsilon: float, max_iter: int, tol: float | None, *rest: object) -> tuple[Tensor | None, ...]:
    """Triton's outputs as the reference's."""
    *values, n_iter, history = outputs
    keep_history = rest[-1]
    return *values, n_iter, reference.converged(values[-1], tol), history if keep_history else None


def _cuda_fwd(cost: Tensor, a: Tensor | None, b: Tensor | None, *options: object) -> tuple[Tensor, ...]:
    return torch.ops.helo_fast_cuda.sinkhorn_fwd(*_contiguous(cost, a, b), *options)


def _cuda_implicit_bwd(cost, a, b, plan, grad_plan, grad_f, grad_g, grad_cost, *options: object) -> tuple[Tensor, ...]:
    if max(plan.shape[1:]) > 64:  # the kernel keeps a problem in shared memory
        return reference.implicit_bwd(cost, a, b, plan, grad_plan, grad_f, grad_g, grad_cost, *options)
    a, b, plan, grad_f, grad_g, grad_cost = _contiguous(a, b, plan, grad_f, grad_g, grad_cost)
    return torch.ops.helo_fast_cuda.sinkhorn_implicit_bwd(cost, a, b, plan, grad_plan, grad_f, grad_g, grad_cost, *options)


def _triton_fwd(cost: Tensor, a: Tensor | None, b: Tensor | None, *options: object) -> tuple[Tensor | None, ...]:
    from ...kernels import sinkhorn as kernels  # imported here: triton is optional and slow to import

    return _completed(kernels.sinkhorn_fwd(cost, *reference.marginals(cost, a, b), *options), *options)


def _triton_implicit_bwd(cost: Tensor, *inputs_and_options: object) -> tuple[Tensor, ...]:
    from ...kernels import sinkhorn_implicit as kernels

    served = kernels.serves(*cost.shape[1:])  # larger systems are PyTorch's to solve, a kernel for each step
    return (kernels.sinkhorn_implicit_bwd if served else reference.implicit_bwd)(cost, *inputs_and_options)


def _triton_unrolled_bwd(cost: Tensor, *inputs_and_options: object) -> tuple[Tensor, ...]:
    from ...kernels import sinkhorn_unrolled as kernels

    served = kernels.tile_for(*cost.shape[1:]) is not None
    return (kernels.sinkhorn_unrolled_bwd if served else reference.unrolled_bwd)(cost, *inputs_and_options)


# The backwards as batched dense linear algebra and replays, which PyTorch runs on every device.
_BACKWARDS = {"implicit_bwd": reference.implicit_bwd, "unrolled_bwd": reference.unrolled_bwd}

_registry.register(
    "sinkhorn",
    (
        Adapter(EAGER, {"fwd": reference.fwd, **_BACKWARDS}),
        Adapter(CPP, {"fwd": _cpp_fwd, "implicit_bwd": _cpp_implicit_bwd, "unrolled_bwd": _cpp_unrolled_bwd}, _registry.only_on("cpu")),
        Adapter(
            TRITON,
            {
                "fwd": functools.partial(_with_partners, _triton_fwd),
                "implicit_bwd": _triton_implicit_bwd,
                "unrolled_bwd": _triton_unrolled_bwd,
            },
            _registry.triton_refuses,
        ),
        Adapter(
            CUDA,
            {"fwd": functools.partial(_with_partners, _cuda_fwd), **_BACKWARDS, "implicit_bwd": _cuda_implicit_bwd},
            _registry.cuda_refuses,
        ),
    ),
    # A GPU back end joins "cuda" with a results file from the hardware in benchmarks/results.
    auto={"cpu": ("cpp", "eager"), "cuda": ("eager",)},
)
