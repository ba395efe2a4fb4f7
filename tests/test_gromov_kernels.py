"""The compiled gromov kernels against eager in float64: every option together, every size of vector, small epsilon, threads."""

import itertools
import math

import pytest
import torch

from helo_fast import gromov_from_tokens, gromov_wasserstein
from helo_fast.testing import assert_close

BACKENDS = ("cpp", "cuda")
VALUES = ("plan", "gw_cost", "marginal_error")


@pytest.fixture(params=BACKENDS)
def backend(request, device_for):
    with torch.device(device_for("gromov", request.param)):
        yield request.param


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu").to(torch.empty(0).device)


def masses(batch, size, seed, empty):
    """Of sum 1 exactly, in sixteenths of a row's own; every third entry of problem 0 empty."""
    mass = 1 + (15 * random(batch, size, seed=seed)).floor()
    if empty:
        mass[0, ::3] = 0
        mass[0, 1 % size] += size == 1
    return mass / mass.sum(-1, keepdim=True)


def check(function, backend, double, dtype=torch.float32):
    single = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in double.items()}
    exact = function(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in single.items()}, backend="eager")
    eager, actual = exact if dtype == torch.float64 else function(**single, backend="eager"), function(**single, backend=backend)
    assert torch.equal(actual.n_iter, eager.n_iter) or double.get("tol") is not None
    same = (actual.n_iter == exact.n_iter) & (eager.n_iter == exact.n_iter)  # rounding may carry a change across tol
    assert same.double().mean() >= 0.7
    for name in VALUES:
        assert_close(getattr(actual, name)[same], getattr(exact, name)[same], getattr(eager, name)[same], f"{dtype} {name}")
    assert (actual.plan[exact.plan.sum(-1) == 0] == 0).all() and (actual.plan.mT[exact.plan.sum(-2) == 0] == 0).all()
    return actual, exact


@pytest.mark.parametrize("epsilon", (1.0, 0.05, 1e-3))
@pytest.mark.parametrize("method", ("proximal", "entropic"))
def test_options_together(backend, method, epsilon):
    for alpha, empty, symmetric, (n, m) in itertools.product((1.0, 0.4, 0.0), (False, True), (False, True), ((9, 14), (14, 9))):
        C, D = random(4, n, n, seed=n), random(4, m, m, seed=m)
        if symmetric:
            C, D = C + C.mT, D + D.mT
        arguments = {"cost_x": C, "cost_y": D, "a": masses(4, n, 1, empty), "b": masses(4, m, 2, empty), "alpha": alpha}
        arguments |= {"method": method, "epsilon": epsilon, "cost_xy": random(4, n, m, seed=5), "outer_iter": 2}
        actual, exact = check(gromov_wasserstein, backend, arguments, torch.float64)
        assert torch.allclose(actual.plan, exact.plan, rtol=0, atol=1e-8)
        if epsilon > 1e-3:  # where the plan is not decided by rounding
            check(gromov_wasserstein, backend, arguments)
        tokens = {k: v for k, v in arguments.items() if k not in ("cost_x", "cost_y")}
        tokens |= {"x": random(4, n, 5, seed=7) - 0.5, "y": random(4, m, 5, seed=8) - 0.5}
        for over, given in itertools.product(("sample", "batch"), (True, False)):
            if not given:
                tokens.pop("cost_xy", None)
            check(gromov_from_tokens, backend, tokens | {"threshold_over": over, "threshold": 0.3}, torch.float64)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("method", ("proximal", "entropic"))
def test_every_vector_length(backend, method, dtype):
    """Each count of vectors and each remainder, of rows, columns and width."""
    for size in (*range(1, 20), 31, 33, 36, 47, 49, 64, 65, 81):
        x, y = random(2, size, 1 + size % 37, seed=size) - 0.5, random(2, 1 + 80 % size, 1 + size % 37, seed=size + 1) - 0.5
        for left, right in ((x, y), (y, x)):
            check(gromov_from_tokens, backend, {"x": left, "y": right, "method": method, "alpha": 0.8, "epsilon": 0.2}, dtype)


@pytest.mark.parametrize("method", ("proximal", "entropic"))
def test_large(backend, method):
    check(
        gromov_from_tokens,
        backend,
        {"x": random(1, 620, 40) - 0.5, "y": random(1, 300, 40, seed=1) - 0.5, "method": method, "outer_iter": 2},
    )


@pytest.mark.parametrize("method", ("proximal", "entropic"))
def test_small_epsilon(backend, method):
    """Where float32 decides nothing of the plan's order: one outer iteration, on costs that float32 holds exactly."""
    C, D = ((64 * random(6, size, size, seed=size)).round() / 64 for size in (12, 16))
    M = (64 * random(6, 12, 16, seed=3)).round() / 64
    spread = {"a": masses(6, 12, 3, True), "b": masses(6, 16, 4, True)}
    for epsilon, given in itertools.product((1e-2, 1e-3, 1e-4), ({}, spread)):
        arguments = {"cost_x": C, "cost_y": D, "cost_xy": M, "alpha": 0.3, "epsilon": epsilon, "method": method, "outer_iter": 1, **given}
        check(gromov_wasserstein, backend, arguments)
        actual, exact = check(gromov_wasserstein, backend, arguments | {"outer_iter": 3}, torch.float64)
        assert torch.allclose(actual.plan, exact.plan, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("method", ("proximal", "entropic"))
def test_extremes_are_finite(backend, method, dtype):
    """Any epsilon; masses that differ by many orders; costs of any size; tokens that are zero."""
    C, D = (random(3, size, size, seed=size).to(dtype) for size in (7, 5))
    a = torch.tensor([1.0, 1e-30, 1e-20, 1e-10, 0, 1e-7, 1e-34], dtype=dtype)
    b = torch.tensor([1e-33, 1.0, 1e-12, 0, 1e-25], dtype=dtype)
    for epsilon, scale in itertools.product((1e-300, 1e-40, 1e-6, 1e6, 1e300), (1e-15, 1.0, 1e15)):
        for given in ({}, {"a": a, "b": b}, {"a": a / 1e3, "b": b / 1e3}):
            result = gromov_wasserstein(C * scale, D * scale, **given, epsilon=epsilon, method=method, backend=backend)
            assert result.plan.isfinite().all() and result.gw_cost.isfinite().all() and (result.plan >= 0).all()
            last, mass = (-2, given.get("b", 1 / 5)) if method == "proximal" else (-1, given.get("a", 1 / 7))
            assert (result.plan.sum(last) - mass).abs().max() < 1e-5
    zero = gromov_from_tokens(torch.zeros(2, 4, 3, dtype=dtype), C[:2, :5, :3], method=method, backend=backend)
    assert zero.plan.isfinite().all() and abs(zero.plan.sum().item() - 2) < 1e-5
    nothing = gromov_wasserstein(C, D, torch.zeros(7, dtype=dtype), torch.zeros(5, dtype=dtype), method=method, tol=1e-3, backend=backend)
    expected = gromov_wasserstein(C, D, torch.zeros(7, dtype=dtype), torch.zeros(5, dtype=dtype), method=method, tol=1e-3, backend="eager")
    assert all(torch.equal(got, want) for got, want in zip(nothing, expected))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("empty", (False, True))
def test_gradients(backend, empty, dtype):
    """Of costs and of tokens, over every vector length; the plan is eager's, so that the derivatives alone differ."""
    ops, weight = torch.ops.helo_fast, random(3, seed=9)
    for n, m, width in ((1, 1, 1), (3, 5, 3), (7, 4, 16), (17, 33, 40), (36, 36, 128), (65, 12, 5)):
        a, b = masses(3, n, 1, empty), masses(3, m, 2, empty)
        C, D, M, plan = random(3, n, n), random(3, m, m, seed=1), random(3, n, m, seed=2), a.unsqueeze(-1) * b.unsqueeze(-2)
        plan = plan * (0.5 + M)
        x, y = random(3, n, width, seed=3) - 0.4, random(3, m, width, seed=4) - 0.4
        if empty and n > 1:
            C[0, 0] = D[0, :, 0] = x[0, 0] = math.nan  # without mass, never read
        calls = [(ops.gromov_wasserstein_bwd, (C, D, plan, weight, alpha, fused)) for alpha, fused in ((1.0, False), (0.3, True))]
        for over, alpha, given in itertools.product((False, True), (1.0, 0.3), (False, True)):
            calls.append((ops.gromov_from_tokens_bwd, (x, y, a, b, plan, weight, 0.3, over, alpha, given)))
        for op, arguments in calls:
            cast = tuple(v.to(dtype) if isinstance(v, torch.Tensor) else v for v in arguments)
            exact = op(*(v.double() if isinstance(v, torch.Tensor) else v for v in cast), "eager")
            rounded = exact if dtype == torch.float64 else op(*cast, "eager")
            for actual, wanted, eager in zip(op(*cast, backend), exact, rounded):
                assert_close(actual, wanted, eager, f"{op} {n} {m}")
                assert dtype == torch.float32 or torch.allclose(actual, wanted, rtol=0, atol=1e-12)


def test_gradient_of_a_zero_token(backend):
    x, y, weight = random(2, 5, 4) - 0.4, random(2, 6, 4, seed=1) - 0.4, random(2, seed=2)
    x[0, 1] = 0  # its norm stands at the floor of 1e-12: a gradient of size 1e12
    a, b = masses(2, 5, 1, False), masses(2, 6, 2, False)
    arguments = (x, y, a, b, a.unsqueeze(-1) * b.unsqueeze(-2), weight, 0.3, False, 0.5, False)
    actual, exact = (torch.ops.helo_fast.gromov_from_tokens_bwd(*arguments, name)[0] for name in (backend, "eager"))
    assert exact.abs().max() > 1e6
    assert torch.allclose(actual[0, 1], exact[0, 1], rtol=0, atol=1e-12 * exact.abs().max().item())
    actual[0, 1] = exact[0, 1]
    assert torch.allclose(actual, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("over", ("sample", "batch"))
def test_threads_do_not_matter(backend, over):
    x, y = (random(200, size, 16, seed=size).float() - 0.5 for size in (12, 9))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, y)]
            result = gromov_from_tokens(*leaves, epsilon=0.02, threshold_over=over, backend=backend)
            results.append((*result, *torch.autograd.grad(result.gw_cost.sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for other in results[1:] for one, other in zip(results[0], other))
    assert math.isfinite(results[0][1].sum())
