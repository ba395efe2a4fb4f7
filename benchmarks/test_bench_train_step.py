"""One training step of HeLo, its peak memory beside it; and the matrix product that calibrates all of them."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from helo_fast import _registry
from helo_fast._allocator import keep_freed_memory
from helo_fast.testing import assert_close

from . import harness
from .steps import TrainingStep

HALF = " bfloat16"  # a member under autocast


class Case(NamedTuple):
    preset: str
    batch: int
    device: str = "cpu"

    @property
    def group(self) -> str:
        return f"train step {self.preset} B{self.batch}{' cuda' if self.device == 'cuda' else ''}"


class Product(NamedTuple):
    size: int = 2048
    device: str = "cpu"

    @property
    def group(self) -> str:
        return f"matmul {self.size}{' cuda' if self.device == 'cuda' else ''}"


BATCHES = {"cpu": (128,), "cuda": (128, 8192)}
SIZES = (32, 128, 512, 2048)  # of the large run
FORCED = {device: [name for name in harness.backends(device) if name != "cpp"] for device in harness.DEVICES}
TRAINING = [
    (Case(preset, batch, device), member)
    for device in harness.DEVICES
    for preset in ("released", "paper")
    for batch in BATCHES[device]
    for member in ("auto", *FORCED[device], "naive", "auto" + HALF)
]
BY_SIZE = [
    (Case(preset, batch), member)
    for preset in ("released", "paper")
    for batch in SIZES
    for member in ("auto", "eager", "compile", "auto" + HALF)
    if batch not in BATCHES["cpu"] or member == "compile"
]
PRODUCT = [(Product(device=device), "torch") for device in harness.DEVICES]


@pytest.fixture(autouse=True, scope="module")
def as_training_runs():
    """Every member alike. The last file of the run, as there is no way back."""
    keep_freed_memory()


def step_for(case: Case, member: str, **overrides) -> TrainingStep:
    return TrainingStep(case.preset, member, case.batch, case.device, **overrides)


@cache
def answer(case: Case, member: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(loss, gradients) with masks by Philox, which are the same on every back end and in every dtype."""
    # On a GPU the feed-forward layers' dropout is torch's, whose draws differ between dtypes.
    overrides = {"dropout": 0.0} if case.device == "cuda" else {}
    return step_for(case, member, dtype=dtype, rng="philox", **overrides).answer()


@pytest.mark.parametrize("case, member", TRAINING, ids=harness.identify)
def test_training_step(bench, case, member):
    measure(bench, case, member)


@pytest.mark.large
@pytest.mark.parametrize("case, member", BY_SIZE, ids=harness.identify)
def test_training_step_by_batch_size(bench, case, member):
    measure(bench, case, member)


def measure(bench, case, member):
    """The member's answer against the reference's, its peak memory, its time."""
    backend, _, half = member.partition(" ")
    if half and case.device == "cpu" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("the CPU has neither AVX512-BF16 nor AMX")
    if backend in _registry.BACKENDS:
        for op in harness.OPS:
            bench.serve(op, backend)
    bench.note(backend=backend not in ("naive", "compile"), auto="auto")
    if backend == "naive":
        # The same mathematics: compared in float64, since in float32 the plain-domain solver amplifies rounding.
        for actual, exact in zip(answer(case, member, torch.float64), answer(case, "eager", torch.float64)):
            torch.testing.assert_close(actual, exact, rtol=1e-7, atol=1e-9 * exact.abs().max().item())
    else:
        truth = zip(answer(case, "eager", torch.float64), answer(case, "eager" + (HALF if half else "")))
        for what, actual, (exact, eager) in zip(("loss", "gradient"), answer(case, member), truth):
            if what == "loss":  # one number, of which eager's error may be next to nothing by chance: the gradients hold the bound
                torch.testing.assert_close(actual.double(), exact, rtol=2**-8 if half else 1e-6, atol=0)
            elif member == "compile":  # a peer; in a large batch some unit is so near to ReLU's kink that rounding decides on its side
                assert (actual.double() - exact).norm() <= 3e-3 * exact.norm(), f"{member} {what}"
            else:
                assert_close(actual, exact, eager, what=f"{member} {what}")
    bench.weigh(case.preset, member, case.batch)
    bench.time(step_for(case, member))


@pytest.mark.parametrize("case, member", PRODUCT, ids=harness.identify)
def test_calibration(bench, case, member):
    x, y = torch.randn(2, case.size, case.size, generator=torch.Generator().manual_seed(0)).to(case.device)
    torch.testing.assert_close((x @ y)[:8].double(), x[:8].double() @ y.double(), rtol=1e-3, atol=1e-3)
    bench.note(multiply_adds=case.size**3)
    bench.time(lambda: x @ y)
