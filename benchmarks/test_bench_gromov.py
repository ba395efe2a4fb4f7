"""gromov_from_tokens beside the released solver with autograd recording its steps; the entropic method beside POT."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import helo_fast
from helo_fast.testing import assert_close

from . import harness, peers


class Case(NamedTuple):
    batch: int
    n: int
    width: int
    device: str = "cpu"

    @property
    def group(self) -> str:
        return f"gromov_from_tokens B{self.batch} n{self.n} D{self.width}{' cuda' if self.device == 'cuda' else ''}"


BATCHES = {"cpu": (128,), "cuda": (128, 8192)}
FROM_TOKENS = [
    (Case(batch, 36, 128, device), member)
    for device in harness.DEVICES
    for batch in BATCHES[device]
    for member in (*harness.backends(device), "naive", "compile")
]


class EntropicCase(NamedTuple):
    batch: int
    n: int
    device: str = "cpu"

    @property
    def group(self) -> str:
        return f"gromov entropic B{self.batch} n{self.n}{' cuda' if self.device == 'cuda' else ''}"


ENTROPIC = [(EntropicCase(16, 36, device), member) for device in harness.DEVICES for member in (*harness.backends(device), "pot")]


@cache
def tokens(case: Case) -> tuple[Tensor, Tensor]:
    """N(0, 1), x and y [B, n, D]."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.n, case.width)
    return tuple(torch.randn(*shape, generator=generator).to(case.device) for _ in range(2))


@cache
def truth(case: Case) -> tuple[Tensor, Tensor]:
    """(float64, eager float32) plans, thresholds over the batch as in released training."""
    x, y = tokens(case)
    exact = helo_fast.gromov_from_tokens(x.double(), y.double(), threshold_over="batch", backend="eager").plan
    return exact, helo_fast.gromov_from_tokens(x, y, threshold_over="batch", backend="eager").plan


@pytest.mark.parametrize("case, member", FROM_TOKENS, ids=harness.identify)
def test_from_tokens(bench, case, member):
    x, y = tokens(case)
    if member == "naive":
        exact = truth(case)[0]
        # The same algorithm to float64's rounding, which its twenty steps at beta 0.1 amplify; in float32 it is as far off as it is.
        torch.testing.assert_close(peers.naive_gromov(x.double(), y.double(), threshold_over="batch"), exact, rtol=1e-8, atol=1e-12)
        x, y = (t.clone().requires_grad_() for t in (x, y))

        def solve():
            return peers.naive_gromov(x, y, threshold_over="batch")

        assert solve().grad_fn is not None
    elif member == "compile":
        compiled = peers.compiled_gromov()

        def solve():
            return compiled(x, y)

        try:
            solve()
        except BackendCompilerFailed as error:
            pytest.skip(f"torch.compile cannot build here: {str(error).splitlines()[0]}")
        assert_close(solve(), *truth(case), what=member)
    else:
        bench.serve("gromov", member)

        def solve():
            return helo_fast.gromov_from_tokens(x, y, threshold_over="batch", backend=member).plan

        assert_close(solve(), *truth(case), what=member)
    bench.time(solve)


@cache
def spaces(case: EntropicCase) -> tuple[Tensor, Tensor]:
    """Distances of N(0, 1) points in three dimensions, over their mean."""
    generator = torch.Generator().manual_seed(0)
    costs = (torch.cdist(p, p) for p in (torch.randn(case.batch, case.n, 3, generator=generator) for _ in range(2)))
    return tuple((cost / cost.mean()).to(case.device) for cost in costs)


@pytest.mark.parametrize("case, member", ENTROPIC, ids=harness.identify)
def test_entropic(bench, case, member):
    costs, options = spaces(case), {"epsilon": 0.3, "outer_iter": 5, "inner_iter": 20}
    exact, eager = (
        helo_fast.gromov_wasserstein(*c, **options, method="entropic", backend="eager").plan for c in ([t.double() for t in costs], costs)
    )
    if member == "pot":
        pytest.importorskip("ot", reason="POT is not installed: pip install pot")

        def solve():
            return peers.pot_entropic_gromov(*costs, **options)

        doubles = peers.pot_entropic_gromov(*(t.double() for t in costs), **options)
        torch.testing.assert_close(doubles, exact, rtol=1e-6, atol=1e-9)
    else:
        bench.serve("gromov", member)

        def solve():
            return helo_fast.gromov_wasserstein(*costs, **options, method="entropic", backend=member).plan

        assert_close(solve(), exact, eager, what=member)
    bench.time(solve)
