"""What every benchmark uses: the members of a group, the environment, and timing within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

from helo_fast import _registry

from . import memory

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
OPS = ("sinkhorn", "gromov", "lcd_attention")
# Triton's interpreter is for tests: on a CPU its time says nothing.
_NOT_TIMED = {"cpu": ("triton", "cuda"), "cuda": ("cpp",)}
MIN_ROUNDS, MAX_ROUNDS = 3, 100


def backends(device: str) -> tuple[str, ...]:
    """The back ends whose time counts on a device; :meth:`Bench.serve` skips those that cannot serve an operator, with the reason."""
    return tuple(name for name in _registry.BACKENDS if name not in _NOT_TIMED[device])


def refusal(op: str, name: str, device: str) -> str | None:
    return _registry._refusal(op, name, torch.empty(0, device=device))


def environment() -> dict[str, object]:
    """What a time depends on, as JSON values."""
    facts = _registry.describe()
    try:
        pot = version("pot")
    except PackageNotFoundError:
        pot = None
    return {
        "helo_fast": facts["version"],
        "torch": facts["torch"],
        "triton": facts["triton"],
        "pot": pot,
        "threads": facts["threads"],
        "cpu": facts["cpu"],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": facts["gpu"],
        "backends": facts["backends"],
        "auto": facts["auto"],
    }


class Bench:
    """One member of one group: says who it is, then times a function whose answer was checked."""

    def __init__(self, benchmark, device: str, seconds: float):
        self.benchmark = benchmark
        self.device = device
        self.seconds = seconds

    def note(self, **facts: object) -> None:
        """Into the result's extra_info."""
        self.benchmark.extra_info.update(facts)

    def serve(self, op: str, name: str) -> None:
        """Back end ``name`` is this member; skips with the reason where it cannot serve ``op``."""
        reason = refusal(op, name, self.device)
        if reason is not None:
            pytest.skip(reason)
        self.note(backend=True, auto=_registry.auto_choice(op, torch.empty(0, device=self.device)))

    def weigh(self, work: str, *arguments: object) -> None:
        """Note the peak memory of :mod:`benchmarks.memory`'s ``work`` for this member, or why there is none."""
        reason = memory.unavailable(self.device)
        if reason is None:
            self.note(peak_bytes=memory.peak_bytes(work, *arguments, self.device))
        else:
            self.note(no_peak=reason)

    def time(self, function: Callable[[], object], *, iterations: int = 1) -> None:
        """As many rounds as fit ``self.seconds``, between MIN_ROUNDS and MAX_ROUNDS, after a warm-up (two where it is fast); on a GPU
        each is waited for. Without any seconds, one round and no warm-up: the answer was checked before, and the time is no matter."""

        def run() -> None:
            function()
            if self.device == "cuda":
                torch.cuda.synchronize()

        if not self.seconds:
            return self.benchmark.pedantic(run, iterations=iterations)
        start = time.perf_counter()
        for _ in range(iterations):
            run()
        once = time.perf_counter() - start
        rounds = min(max(int(self.seconds / once), MIN_ROUNDS), MAX_ROUNDS)
        self.benchmark.pedantic(run, rounds=rounds, iterations=iterations, warmup_rounds=int(once < self.seconds / MIN_ROUNDS))


def identify(value: object) -> str:
    """A parameter's name in a test's id."""
    return getattr(value, "group", None) or str(value)
