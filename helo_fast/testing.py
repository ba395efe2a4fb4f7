"""What tests and benchmarks share: the accuracy bound, memory layouts, and the named cases of each operator."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

ABSOLUTE_SLACK = 1e-6  # the bound is twice the error of eager PyTorch in the same dtype, plus this
_ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def shared_folder() -> Path:
    """Where the released model's numbers and the recordings lie: HELO_FAST_SHARED, by default ``../shared`` beside the checkout."""
    return Path(os.environ.get("HELO_FAST_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def assert_close(actual: Tensor, exact: Tensor, eager: Tensor, what: str = "") -> None:
    """``actual`` is at most twice as far from ``exact`` (float64) as ``eager`` in the same dtype, plus 1e-6 and half-precision rounding.

    Entries that are infinite in ``exact`` must be so in ``actual``; NaN never passes.
    """
    assert actual.dtype == eager.dtype and actual.shape == exact.shape, (what, actual.dtype, eager.dtype, actual.shape, exact.shape)
    finite = exact.isfinite()
    assert torch.equal(actual[~finite].double(), exact[~finite].double()), f"{what}: infinities differ"
    actual_error = (actual.double() - exact.double())[finite].abs()
    eager_error = (eager.double() - exact.double())[finite].abs()
    scale = exact.double()[finite].abs().max() if finite.any() else exact.new_zeros(())
    bound = 2 * (eager_error.max() if eager_error.numel() else 0) + ABSOLUTE_SLACK + _ROUNDING[actual.dtype] * scale
    worst = actual_error.max() if actual_error.numel() else actual_error.new_zeros(())
    assert bool(worst <= bound), f"{what}: error {worst:.3g} against the float64 reference, at most {bound:.3g} allowed"


def layouts(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values as contiguous, strided (every second entry of a NaN-filled buffer), transposed and offset tensors."""
    yield "contiguous", tensor.contiguous()
    poisoned = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
    poisoned[..., ::2] = tensor
    yield "strided", poisoned[..., ::2]
    if tensor.dim() > 1:
        yield "transposed", tensor.mT.contiguous().mT
    flat = tensor.new_full((tensor.numel() + 3,), float("nan"))
    flat[3:] = tensor.reshape(-1)
    yield "offset", flat[3:].view(tensor.shape)


@contextlib.contextmanager
def poisoned_memory(device: str = "cpu") -> Iterator[None]:
    """Inside, torch.empty gives NaN and the largest integers: an output that is not written in full shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=device).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def _problem(
    batch: int, n: int, m: int, scale: float = 2.0, marginals: bool = False, **options: object
) -> Callable[[torch.dtype, str], dict]:
    def build(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
        generator = torch.Generator().manual_seed(1000 * n + m)
        arguments: dict = {"cost": scale * torch.rand(batch, n, m, generator=generator, dtype=torch.float64), **options}
        if marginals:
            for name, size in (("a", n), ("b", m)):
                total = 256 if size <= 64 else 1024  # masses k / total of sum 1 are exact in every dtype
                draws = torch.randint(size, (batch, total - size), generator=generator)
                counts = 1 + torch.zeros(batch, size, dtype=torch.int64).scatter_add_(1, draws, torch.ones_like(draws))
                arguments[name] = counts.double() / total
        return {k: v.to(device, dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}

    return build


def _zero_mass(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
    arguments = _problem(3, 7, 5, marginals=True)(torch.float64, "cpu")
    for name, problem, empty, heir in (("a", 0, 2, 3), ("a", 1, 0, 1), ("b", 1, 4, 0)):
        arguments[name][problem, heir] += arguments[name][problem, empty]
        arguments[name][problem, empty] = 0
    arguments["cost"][0, 2] = float("nan")  # never read
    return {k: v.to(device, dtype) for k, v in arguments.items()}


def _ragged(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict:
    arguments = _problem(4, 9, 12)(torch.float64, "cpu")
    n_rows, n_cols = torch.tensor([9, 1, 4, 6]), torch.tensor([12, 5, 1, 7])
    for i in range(4):
        arguments["cost"][i, n_rows[i] :] = float("nan")
        arguments["cost"][i, :, n_cols[i] :] = float("nan")
    return {"cost": arguments["cost"].to(device, dtype), "n_rows": n_rows.to(device), "n_cols": n_cols.to(device)}


# name -> build(dtype, device) -> keyword arguments of sinkhorn
SINKHORN_CASES: dict[str, Callable[..., dict]] = {
    "square": _problem(5, 36, 36),
    "rectangular": _problem(3, 8, 21, marginals=True),
    "tall": _problem(2, 130, 3, marginals=True),
    "single_row": _problem(4, 1, 6),
    "single_column": _problem(4, 6, 1),
    "one_by_one": _problem(3, 1, 1),
    "empty_batch": _problem(0, 4, 5),
    "tiny_epsilon": _problem(3, 12, 10, epsilon=2e-4, max_iter=300),
    "large_epsilon": _problem(3, 12, 10, epsilon=20.0),
    "large_cost": _problem(3, 9, 9, scale=1e6, epsilon=1e3),
    "one_iteration": _problem(3, 9, 7, max_iter=1, marginals=True),
    "until_tolerance": _problem(6, 20, 16, tol=1e-3, max_iter=200, epsilon=0.05),
    "unbalanced": _problem(3, 11, 8, tau_a=0.5, tau_b=2.0, marginals=True),
    "half_unbalanced": _problem(3, 8, 11, tau_b=0.3, marginals=True),
    "unbalanced_tiny_epsilon": _problem(2, 8, 8, tau_a=0.5, tau_b=0.5, epsilon=1e-3),
    "zero_mass": _zero_mass,
    "ragged": _ragged,
}

MASSES = ("uniform", "random", "spiky", "geometric")
COSTS = ("uniform", "signed", "squared_distance", "six_decades", "blocks")


def hard_masses(kind: str, batch: int, size: int, generator: torch.Generator) -> Tensor:
    """[batch, size] of sum 1, float64: "spiky" and "geometric" go down to 1e-12."""
    if kind == "uniform":
        mass = torch.ones(batch, size, dtype=torch.float64)
    else:
        mass = torch.rand(batch, size, generator=generator, dtype=torch.float64) + 0.1
    if kind == "spiky":
        mass = mass * torch.where(torch.rand(batch, size, generator=generator) < 0.6, 1e-12, 1.0)
    elif kind == "geometric":
        mass = mass * 10 ** (-12 * torch.rand(batch, size, generator=generator, dtype=torch.float64))
    if kind in ("spiky", "geometric"):
        mass[:, size // 2] = 1
    return mass / mass.sum(-1, keepdim=True)


def hard_cost(kind: str, batch: int, n: int, m: int, generator: torch.Generator) -> Tensor:
    """[batch, n, m] of size 1, float64 with float32 digits: "six_decades" spans 1e-6 to 1, "blocks" is 0 or 1 and a little noise."""
    cost = torch.rand(batch, n, m, generator=generator, dtype=torch.float64)
    if kind == "signed":
        cost = 2 * cost - 1
    elif kind == "squared_distance":
        points = torch.rand(batch, n + m, 1, generator=generator, dtype=torch.float64)
        cost = (points[:, :n] - points[:, n:].mT).square()
    elif kind == "six_decades":
        cost = 10 ** (-6 * cost)
    elif kind == "blocks":
        cost = 0.01 * cost + (torch.arange(n).unsqueeze(-1) % 3 != torch.arange(m) % 3)
    return cost.float().double()


ATTENTION_BIASES = {  # name -> shape of lcd_attention's bias, or None
    "none": lambda B, H, n, m: None,
    "n m": lambda B, H, n, m: (n, m),
    "B 1 n m": lambda B, H, n, m: (B, 1, n, m),
    "1 H n m": lambda B, H, n, m: (1, H, n, m),
    "B H n m": lambda B, H, n, m: (B, H, n, m),
}


def attention_inputs(
    B: int,
    H: int,
    n: int,
    m: int,
    d: int,
    bias: str = "B H n m",
    shared: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device | None = None,
) -> tuple[list[Tensor], Tensor]:
    """([q, k, v] or [q, k, v, bias], leaves; the incoming gradient [B, H, n, d]). With ``shared``, q is [1, H, n, d].

    The same numbers on every device; None is the default one.
    """
    device = torch.get_default_device() if device is None else device
    generator = torch.Generator().manual_seed(n + 7 * m + 31 * d)
    shapes = [(1 if shared else B, H, n, d), (B, H, m, d), (B, H, m, d), ATTENTION_BIASES[bias](B, H, n, m), (B, H, n, d)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype) for s in shapes if s is not None]
    return [t.requires_grad_() for t in tensors[:-1]], tensors[-1]


def attention_results(inputs: list[Tensor], grad_out: Tensor, backend: str, **options: object) -> list[Tensor]:
    """lcd_attention's output and the gradients of its inputs."""
    from .ops.attention import lcd_attention

    out = lcd_attention(*inputs, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def assert_attention_close(inputs: list[Tensor], grad_out: Tensor, backend: str, **options: object) -> None:
    """lcd_attention on ``backend``: output and gradients as :func:`assert_close`."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = attention_results(exact, grad_out.double(), "eager", **options)
    eager = attention_results(inputs, grad_out, "eager", **options)
    actual = attention_results(inputs, grad_out, backend, **options)
    for name, a, t, e in zip(("output", "dq", "dk", "dv", "dbias"), actual, truth, eager):
        assert_close(a, t, e, name)
