"""The operators at the sizes that GPU targets are set for: right answers first, then times by CUDA events, floors and peak memory.

Members: the package's back ends (eager among them), POT's sinkhorn on the same device, FlexAttention without DropKey and dropout, and
the plain formulas under torch.compile. A floor is what the arithmetic or the unavoidable memory traffic alone would take.
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import helo_fast
from helo_fast import _registry
from helo_fast.ops.attention import philox
from helo_fast.ops.residual_norm import residual_norm
from helo_fast.testing import assert_close

from . import peers
from .steps import EPSILON, MAX_ITER, random_cost

P, SEED = 0.5, 2026  # of DropKey and dropout
COMPARED = 128  # problems of a batch, its first and last, of independent ones
PEER_TOLERANCE = 1e-3  # of the largest value, for other libraries


@dataclass
class Case:
    """One operator at one size. ``run(backend, dtype)`` gives a function without arguments, whose answers the members are held to."""

    name: str
    op: str
    flops: float
    bytes: float
    run: Callable[[str, torch.dtype], Callable[[], tuple[Tensor, ...]]]
    compared: Callable[[Tensor], Tensor] = lambda answer: answer
    peers: dict[str, Callable[[], Callable[[], tuple[Tensor, ...]]]] = field(default_factory=dict)  # by name; raises where it cannot run

    def truth(self) -> list[tuple[Tensor, Tensor]]:
        """(float64, eager float32) of each answer."""
        exact, eager = (self.run("eager", dtype)() for dtype in (torch.float64, torch.float32))
        return [(self.compared(x), self.compared(y)) for x, y in zip(exact, eager)]


class Unmeasured(Exception):
    """Why a member that is not the package's own gives no time."""


def cases(device: str, quick: bool) -> Iterator[Case]:
    """Made one at a time: some fill gigabytes."""
    for batch, n in ((4, 9),) if quick else ((8192, 36), (256, 256), (16, 1024)):
        yield sinkhorn(batch, n, device)
    for batch, n, width in ((16, 9, 16),) if quick else ((128, 36, 128), (8192, 36, 128)):
        yield gromov(batch, n, width, device)
    yield attention(*((2, 2, 9, 8) if quick else (8192, 4, 36, 32)), device)
    yield norm(*((24, 16) if quick else (8192 * 36, 128)), device)
    yield replace(sinkhorn(*((5, 8) if quick else (65536, 8)), device), peers={})  # back ends alone, and last: no target needs it


def sinkhorn(batch: int, n: int, device: str) -> Case:
    cost = random_cost(batch, n, n, device)
    problems = torch.arange(batch, device=device)
    problems = problems if batch <= COMPARED else torch.cat([problems[: COMPARED // 2], problems[-COMPARED // 2 :]])

    def run(backend: str, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        typed = cost.to(dtype)
        return lambda: (helo_fast.sinkhorn(typed, epsilon=EPSILON, max_iter=MAX_ITER, gradient="none", backend=backend).plan,)

    def pot() -> Callable[[], tuple[Tensor, ...]]:
        if importlib.util.find_spec("ot") is None:
            raise Unmeasured("POT is not installed: pip install pot")
        transposed = cost.mT.contiguous()
        return lambda: (peers.pot_sinkhorn(transposed, EPSILON, MAX_ITER, None),)

    def compiled() -> Callable[[], tuple[Tensor, ...]]:
        solve = peers.compiled_sinkhorn()
        return lambda: (solve(cost, EPSILON, MAX_ITER),)

    flops, traffic = 4 * batch * n**2 * MAX_ITER, 4 * 2 * batch * n**2
    others = {"pot": pot, "compile": compiled}
    return Case(f"sinkhorn B{batch} n{n}", "sinkhorn", flops, traffic, run, lambda plan: plan[problems], others)


def gromov(batch: int, n: int, width: int, device: str) -> Case:
    """Thresholds over the batch, as in released training."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(batch, n, width, generator=generator).to(device) for _ in range(2))

    def run(backend: str, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        tokens = x.to(dtype), y.to(dtype)
        return lambda: (helo_fast.gromov_from_tokens(*tokens, threshold_over="batch", backend=backend).plan,)

    def compiled() -> Callable[[], tuple[Tensor, ...]]:
        solve = peers.compiled_gromov()
        return lambda: (solve(x, y),)

    # The two costs; then five times two products and twenty times K v and K' u.
    flops = batch * (2 * 2 * n**2 * width + 5 * (2 * 2 * n**3 + 20 * 4 * n**2))
    traffic = 4 * batch * (2 * n * width + n**2)
    return Case(f"gromov_from_tokens B{batch} n{n} D{width}", "gromov", flops, traffic, run, peers={"compile": compiled})


def attention(batch: int, heads: int, n: int, d: int, device: str) -> Case:
    """Forward and backward, with DropKey and dropout."""
    generator = torch.Generator().manual_seed(0)
    *inputs, grad_out = (torch.randn(batch, heads, n, d, generator=generator).to(device) for _ in range(4))

    def step(function: Callable[..., Tensor], dtype: torch.dtype = torch.float32) -> Callable[[], tuple[Tensor, ...]]:
        leaves, incoming = [t.detach().to(dtype).requires_grad_() for t in inputs], grad_out.to(dtype)

        def forward_backward() -> tuple[Tensor, ...]:
            out = function(*leaves)
            return out.detach(), *torch.autograd.grad(out, leaves, incoming)

        return forward_backward

    def run(backend: str, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        options = {"dropkey_p": P, "dropout_p": P, "seed": SEED, "backend": backend}
        return step(lambda q, k, v: helo_fast.lcd_attention(q, k, v, **options), dtype)

    def flex() -> Callable[[], tuple[Tensor, ...]]:
        if device == "cpu":
            raise Unmeasured("FlexAttention has no backward on a CPU")
        from torch.nn.attention.flex_attention import flex_attention

        function = step(torch.compile(flex_attention, dynamic=False))
        plain = step(lambda q, k, v: helo_fast.lcd_attention(q, k, v, backend="eager"))
        for actual, expected in zip(function(), plain()):
            check_peer(actual, expected)
        return function

    def compiled() -> Callable[[], tuple[Tensor, ...]]:
        """Masks drawn by torch; the formula is held to the truth with masks given."""
        naive = torch.compile(peers.naive_attention, dynamic=False)
        problems = philox.problems(range(batch), range(heads), heads, torch.device(device))
        masks = philox.masks(torch.tensor(SEED, device=device), problems, n, n, P, P)
        given = step(lambda q, k, v: naive(q, k, v, None, P, P, masks))()
        for actual, expected in zip(given, run("eager", torch.float32)()):
            check_peer(actual, expected)
        return step(lambda q, k, v: naive(q, k, v, None, P, P))

    tensor = batch * heads * n * d
    # Two products forward, five backward. Forward: q, k, v, out; backward: those and grad_out read, dq, dk, dv written.
    flops, traffic = 2 * 7 * tensor * n, 4 * 12 * tensor
    return Case(
        f"lcd_attention B{batch} H{heads} n{n} d{d}", "lcd_attention", flops, traffic, run, peers={"flex": flex, "compile": compiled}
    )


def norm(rows: int, width: int, device: str) -> Case:
    """Forward and backward, with dropout."""
    generator = torch.Generator().manual_seed(0)
    x, y, grad_out = (torch.randn(rows, width, generator=generator).to(device) for _ in range(3))
    weight, bias = (torch.rand(width, generator=generator).to(device) for _ in range(2))

    def run(backend: str, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
        leaves, incoming = [t.detach().to(dtype).requires_grad_() for t in (x, y, weight, bias)], grad_out.to(dtype)

        def forward_backward() -> tuple[Tensor, ...]:
            out = residual_norm(*leaves, dropout_p=P, seed=SEED, backend=backend)
            return out.detach(), *torch.autograd.grad(out, leaves, incoming)

        return forward_backward

    # Forward: x, y, out; backward: x, y, grad_out, dx, dy.
    return Case(f"residual_norm {rows} x {width}", "residual_norm", 20 * rows * width, 4 * 8 * rows * width, run)


# Peers whose answer is not the operator's on the same inputs hold themselves to what it should be.
_HELD_TO_THE_TRUTH = {("sinkhorn", "pot"), ("sinkhorn", "compile"), ("gromov", "compile")}


def check_peer(actual: Tensor, expected: Tensor) -> None:
    error, scale = (actual.double() - expected.double()).abs().max().item(), expected.abs().max().item()
    if not error <= PEER_TOLERANCE * scale:
        raise Unmeasured(f"its answer is off by {error:.3g} where the largest value is {scale:.3g}")


def own_members(case: Case, device: str) -> dict[str, str | None]:
    """The package's back ends for a device, and why one does not serve; eager last."""
    names = ("triton", "cuda", "eager") if device == "cuda" else ("cpp", "eager")
    return {name: _registry._refusal(case.op, name, torch.empty(0, device=device)) for name in names}


def measure(case: Case, device: str, bounds: dict[str, float], seconds: float, quick: bool) -> Iterator[dict]:
    """A row for each member: times, or the reason for none; a failure of the package's own is marked as such."""
    floor_ms = 1e3 * max(case.flops / bounds["flops"], case.bytes / bounds["bytes"])
    truth = case.truth()

    def timed(function: Callable[[], object]) -> dict:
        peak = peak_bytes(function, device)
        times = time_ms(function, device, seconds)
        return {**times, "peak_bytes": peak, "floor_ms": floor_ms, "over_floor": times["median_ms"] / floor_ms}

    for member, refusal in own_members(case, device).items():
        row = {"case": case.name, "member": member}
        if refusal is not None:
            yield row | {"reason": refusal}
            continue
        try:
            function = case.run(member, torch.float32)
            for i, (actual, (exact, eager)) in enumerate(zip(function(), truth)):
                assert_close(case.compared(actual), exact, eager, f"answer {i}")
            yield row | timed(function)
        except Exception as error:
            yield row | failure(error)
    for member, build in case.peers.items():
        row = {"case": case.name, "member": member}
        try:
            if quick and member in ("compile", "flex"):
                raise Unmeasured("a quick run compiles nothing")
            function = build()
            if (case.op, member) in _HELD_TO_THE_TRUTH:
                for actual, (exact, _) in zip(function(), truth):
                    check_peer(case.compared(actual), exact)
            yield row | timed(function)
        except Exception as error:
            yield row | {"reason": str(error) if isinstance(error, Unmeasured) else brief(error)}


def failure(error: Exception) -> dict:
    return {"failed": True, "reason": brief(error)}


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def time_ms(function: Callable[[], object], device: str, seconds: float) -> dict:
    """Milliseconds a call: the median of up to a hundred rounds, each of as many calls as take two milliseconds, after a warm-up."""
    function()
    start = _now(device)
    for _ in range(2):
        function()
    once = (_now(device) - start) / 2
    calls = min(max(int(2e-3 / once), 1), 100)
    rounds = min(max(int(seconds / (calls * once)), 3), 100)
    if device == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for begin, end in events:
            begin.record()
            for _ in range(calls):
                function()
            end.record()
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) / calls for begin, end in events]
    else:
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times.append(1e3 * (time.perf_counter() - start) / calls)
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_ms": median, "quartiles_ms": [low, high], "rounds": rounds, "calls_a_round": calls}


def peak_bytes(function: Callable[[], object], device: str) -> int | None:
    """What a call takes of the GPU's memory at most, its answers included; None on a CPU."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ceilings(device: str) -> dict[str, float | str]:
    """What bounds every time here: float32 operations a second, and bytes a second of a large copy."""
    source = torch.ones(2**28 if device == "cuda" else 2**22, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * 4 * source.numel() / (1e-3 * time_ms(lambda: target.copy_(source), device, 0.2)["median_ms"])
    if device == "cuda":
        clock = _maximum_clock()
        if clock is not None:
            properties = torch.cuda.get_device_properties(0)
            lanes = 64 if (properties.major, properties.minor) == (8, 0) else 128
            flops = 2.0 * lanes * properties.multi_processor_count * clock
            how = f"{lanes} multiply-adds a cycle, {properties.multi_processor_count} multiprocessors, {clock / 1e6:.0f} MHz at most"
            return {"flops": flops, "bytes": bandwidth, "how": how}
    size = 4096 if device == "cuda" else 512
    x = torch.ones(size, size, device=device)
    flops = 2 * size**3 / (1e-3 * time_ms(lambda: x @ x, device, 0.2)["median_ms"])
    return {"flops": flops, "bytes": bandwidth, "how": f"the rate of a {size}^3 product"}


def _maximum_clock() -> float | None:
    """Hertz, of the multiprocessors."""
    command = ("nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0")
    try:
        return 1e6 * float(subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None
