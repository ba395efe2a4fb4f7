"""sinkhorn: forward, until a tolerance, and forward with the implicit backward; beside POT, torch.compile and unrolled autograd."""

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
from .steps import EPSILON, MAX_ITER, random_cost, sinkhorn_gradient

TOL, TOL_MAX_ITER = 1e-4, 2000


class Case(NamedTuple):
    batch: int
    n: int
    device: str = "cpu"
    what: str = "fwd"
    threads: int | None = None

    @property
    def group(self) -> str:
        threads = f" threads {self.threads}" if self.threads else ""
        return f"sinkhorn {self.what} B{self.batch} n{self.n}{threads}{' cuda' if self.device == 'cuda' else ''}"


SIZES = {"cpu": ((1024, 36), (64, 128), (8, 512)), "cuda": ((8192, 36), (256, 256), (16, 1024))}
FORWARD = [
    (Case(*size, device), member)
    for device in harness.DEVICES
    for size in SIZES[device]
    for member in (*harness.backends(device), "pot", "compile")
]
GRADIENT = [
    (Case(1024, 36, device, "fwd+bwd"), member) for device in harness.DEVICES for member in (*harness.backends(device), "unrolled autograd")
]
TOLERANCE = [(Case(1024, 36, device, "tol 1e-4"), member) for device in harness.DEVICES for member in (*harness.backends(device), "pot")]
SCALING = [
    (Case(batch, n, "cpu", "scaling", threads), "auto")
    for batch, n in (*((4**k, 36) for k in range(9)), *((4**k, 1024 >> k) for k in range(9)))
    for threads in (1, 2)
]


@cache
def ends(case: Case) -> Tensor:
    """Which problems are compared with float64: the first and the last 64 (a result does not depend on its batch-mates)."""
    order = torch.arange(case.batch)
    return order if case.batch <= 128 else torch.cat([order[:64], order[-64:]])


@cache
def forward_truth(case: Case) -> tuple[Tensor, Tensor]:
    """(float64, eager float32) plans of those problems."""
    cost = random_cost(case.batch, case.n, case.n)[ends(case)].to(case.device)
    options = {"epsilon": EPSILON, "max_iter": MAX_ITER, "backend": "eager", "gradient": "none"}
    return helo_fast.sinkhorn(cost.double(), **options).plan, helo_fast.sinkhorn(cost, **options).plan


@pytest.mark.parametrize("case, member", FORWARD, ids=harness.identify)
def test_forward(bench, case, member):
    cost = random_cost(case.batch, case.n, case.n, case.device)
    if member == "pot":
        pytest.importorskip("ot", reason="POT is not installed: pip install pot")
        transposed = cost.mT.contiguous()

        def solve():
            return peers.pot_sinkhorn(transposed, EPSILON, MAX_ITER, None)
    elif member == "compile":
        compiled = peers.compiled_sinkhorn()

        def solve():
            return compiled(cost, EPSILON, MAX_ITER)

        try:
            solve()
        except BackendCompilerFailed as error:
            pytest.skip(f"torch.compile cannot build here: {str(error).splitlines()[0]}")
    else:
        bench.serve("sinkhorn", member)

        def solve():
            return helo_fast.sinkhorn(cost, epsilon=EPSILON, max_iter=MAX_ITER, backend=member).plan

    assert_close(solve()[ends(case)], *forward_truth(case), what=member)
    bench.note(multiply_adds=2 * case.batch * case.n**2 * MAX_ITER)  # K v and K' u: n m of each, at every iteration
    bench.time(solve)


@cache
def gradient_truth(case: Case, gradient: str) -> tuple[Tensor, Tensor]:
    """(float64, eager float32) gradients of <plan, G> with respect to cost, on the problems compared."""
    G = torch.randn(case.batch, case.n, case.n, generator=torch.Generator().manual_seed(1))[ends(case)].to(case.device)
    results = []
    for dtype in (torch.float64, torch.float32):
        cost = random_cost(case.batch, case.n, case.n)[ends(case)].to(case.device, dtype).requires_grad_()
        plan = helo_fast.sinkhorn(cost, epsilon=EPSILON, max_iter=MAX_ITER, gradient=gradient, backend="eager").plan
        results.append(torch.autograd.grad(plan, cost, G.to(dtype))[0])
    return results[0], results[1]


@pytest.mark.parametrize("case, member", GRADIENT, ids=harness.identify)
def test_gradient(bench, case, member):
    if member in harness.backends(case.device):
        bench.serve("sinkhorn", member)
    step = sinkhorn_gradient(member, case.batch, case.n, case.device)
    exact, eager = gradient_truth(case, "unrolled" if member == "unrolled autograd" else "implicit")
    assert_close(step()[ends(case)], exact, eager, what=member)
    bench.weigh("sinkhorn", member, case.batch, case.n)
    bench.note(multiply_adds=2 * case.batch * case.n**2 * MAX_ITER)  # the forward's alone
    bench.time(step)


@cache
def mixed_costs(case: Case) -> Tensor:
    """Costs for which epsilon 0.1 is what 0.02 to 2 is for U(0, 2): from a thousand iterations to ten, in random order."""
    generator = torch.Generator().manual_seed(3)
    exponents = torch.linspace(0, 2, case.batch)[torch.randperm(case.batch, generator=generator)]
    return random_cost(case.batch, case.n, case.n, case.device) * (5 * 10**-exponents).to(case.device)[:, None, None]


@pytest.mark.parametrize("case, member", TOLERANCE, ids=harness.identify)
def test_until_tolerance(bench, case, member):
    cost = mixed_costs(case)
    options = {"epsilon": EPSILON, "max_iter": TOL_MAX_ITER, "tol": TOL}
    if member == "pot":
        pytest.importorskip("ot", reason="POT is not installed: pip install pot")
        transposed = cost.mT.contiguous()

        def solve():
            return peers.pot_sinkhorn(transposed, EPSILON, TOL_MAX_ITER, TOL)

        error = (solve().sum(-2) - 1 / case.n).norm(dim=-1)  # POT's tolerance is on the L2 norm, easier than this package's L1
        assert bool((error <= TOL).all())
    else:
        bench.serve("sinkhorn", member)

        def solve():
            return helo_fast.sinkhorn(cost, **options, backend=member)

        result = solve()
        assert bool(result.converged.all()) and bool((result.marginal_error <= TOL).all())
        exact, eager = (helo_fast.sinkhorn(c[ends(case)], **options, backend="eager") for c in (cost.double(), cost))
        # Rounding may carry a marginal error across tol at a check: the others must agree.
        same = (result.n_iter[ends(case)] == exact.n_iter) & (eager.n_iter == exact.n_iter)
        assert same.float().mean() >= 0.9
        assert_close(result.plan[ends(case)][same], exact.plan[same], eager.plan[same], what=member)
        bench.note(multiply_adds=2 * case.n**2 * int(result.n_iter.sum()))
    bench.time(solve)


@pytest.mark.large
@pytest.mark.parametrize("case, member", SCALING, ids=harness.identify)
def test_scaling(bench, case, member):
    cost = random_cost(case.batch, case.n, case.n, case.device)
    bench.note(batch=case.batch, n=case.n, threads=case.threads)

    def solve():
        return helo_fast.sinkhorn(cost, epsilon=EPSILON, max_iter=MAX_ITER, backend=member).plan

    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        assert_close(solve()[ends(case)], *forward_truth(case), what=member)
        bench.time(solve)
    finally:
        torch.set_num_threads(before)
