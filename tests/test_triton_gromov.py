"""gromov's Triton kernels: values on a GPU or, in a process of its own, under Triton's interpreter (see test_triton.py)."""

from __future__ import annotations

import math
import os

import pytest
import torch

from helo_fast import gromov_from_tokens, gromov_wasserstein
from helo_fast.testing import assert_close, layouts, poisoned_memory

DTYPES = (torch.float32, torch.float64)
METHODS = ("proximal", "entropic")
VALUES = ("plan", "gw_cost", "marginal_error")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FEW = {"outer_iter": 2, "inner_iter": 5}  # the interpreter takes milliseconds a step


@pytest.fixture
def device(device_for):
    return device_for("gromov", "triton")


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masses(batch, size, seed):
    """k / 256, exact in every dtype."""
    draws = torch.randint(size, (batch, 256 - size), generator=torch.Generator().manual_seed(seed))
    return (1 + torch.zeros(batch, size, dtype=torch.int64).scatter_add_(1, draws, torch.ones_like(draws))).double() / 256


def costs(n, m, batch=2, asymmetric=False):
    C, D = random(batch, n, n, seed=n), random(batch, m, m, seed=m + 1)
    if not asymmetric:
        C, D = C + C.mT, D + D.mT
    return {"cost_x": C, "cost_y": D, "a": masses(batch, n, 2), "b": masses(batch, m, 3)}


def tokens(n, m, batch=2, width=19):
    x, y = random(batch, n, width, seed=n) - 0.3, random(batch, m, width, seed=m + 1) - 0.3
    return {"x": x, "y": y, "a": masses(batch, n, 2), "b": masses(batch, m, 3)}


def cast(arguments, dtype, device):
    return {k: v.to(device, dtype) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def compare(function, arguments, dtype, device, what="", **options):
    """The kernel's answer, held to twice the error of eager PyTorch in the same dtype; and the exact one."""
    options = FEW | options
    given = cast(arguments, dtype, device)
    with poisoned_memory(device):
        actual = function(**given, **options, backend="triton")
    eager = function(**given, **options, backend="eager")
    exact = function(**cast(given, torch.float64, device), **options, backend="eager")
    for name in VALUES:
        assert_close(getattr(actual, name), getattr(exact, name), getattr(eager, name), f"{what} {name}")
    assert actual.n_iter.dtype == torch.int32 and actual.converged.dtype == torch.bool
    if dtype == torch.float64:
        assert torch.equal(actual.n_iter, exact.n_iter) and torch.equal(actual.converged, exact.converged)
    return actual, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n, m", [(1, 1), (7, 5), (5, 32), (36, 33)])
def test_costs_against_float64(n, m, method, dtype, device):
    """Beyond 32 in float64, PyTorch serves."""
    compare(gromov_wasserstein, costs(n, m), dtype, device, method=method)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_fused_and_asymmetric_costs(method, dtype, device):
    arguments = costs(7, 9, asymmetric=True)
    compare(gromov_wasserstein, arguments, dtype, device, "asymmetric", method=method)
    arguments["cost_xy"] = random(2, 7, 9, seed=5)
    for alpha in (0.4, 1.0):
        compare(gromov_wasserstein, arguments, dtype, device, f"fused {alpha}", method=method, alpha=alpha)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("over", ("sample", "batch"))
def test_tokens_against_float64(over, method, dtype, device):
    for n, m in ((6, 9), (30, 17)):
        compare(gromov_from_tokens, tokens(n, m), dtype, device, f"{n} x {m}", method=method, threshold_over=over)
    for threshold in (0.0, 1.0):
        compare(gromov_from_tokens, tokens(6, 9), dtype, device, f"at {threshold}", method=method, threshold=threshold, threshold_over=over)


@pytest.mark.parametrize("method", METHODS)
def test_tokens_with_their_cost_across(method, device):
    arguments = tokens(6, 9)
    compare(gromov_from_tokens, arguments, torch.float64, device, "cosine", method=method, alpha=0.3)
    arguments["cost_xy"] = random(2, 6, 9, seed=5)
    compare(gromov_from_tokens, arguments, torch.float64, device, "given", method=method, alpha=0.3)


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_tile(method, device):
    compare(gromov_from_tokens, tokens(36, 64, batch=1), torch.float32, device, method=method, inner_iter=10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("epsilon", (1e-3, 0.02))
def test_small_epsilon(epsilon, method, dtype, device):
    """Scalings leave their range, so that steps are done anew by log-sum-exps."""
    arguments = costs(8, 6, batch=3)
    compare(gromov_wasserstein, arguments, dtype, device, method=method, epsilon=epsilon, inner_iter=20)


@pytest.mark.parametrize("method", METHODS)
def test_steps_done_anew_by_logarithms(method, device, monkeypatch):
    """Some steps are, and K is made from them: else each step after them would be done anew too."""
    from helo_fast.kernels import gromov_plan as kernels

    counted, by_logarithms = [], kernels._by_logarithms

    def count(*arguments):
        counted.append(1)
        return by_logarithms(*arguments)

    if INTERPRETED:  # a GPU's code calls nothing
        monkeypatch.setattr(kernels, "_by_logarithms", count)
    for name, epsilon, fewest, most in (("easy", 0.5, 0, 0), ("hard", 1e-3, 1, 10)):
        counted.clear()
        compare(gromov_wasserstein, costs(8, 6, batch=1), torch.float32, device, name, method=method, epsilon=epsilon, inner_iter=20)
        assert not INTERPRETED or fewest <= len(counted) <= most, f"{name}: {len(counted)} of 40 steps"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_masses_of_any_size(method, dtype, device):
    arguments = costs(6, 5)
    for mass in ("a", "b"):
        for at, size in ((0, 1e-36), (1, 1e-20), (2, 1e-9)):
            arguments[mass][:, 3] += arguments[mass][:, at] - size
            arguments[mass][:, at] = size
    for epsilon in (0.1, 0.01):
        compare(gromov_wasserstein, arguments, dtype, device, f"{epsilon}", method=method, epsilon=epsilon)


@pytest.mark.parametrize("method", METHODS)
def test_no_mass_is_an_exact_zero_and_never_read(method, device):
    for function, arguments in ((gromov_wasserstein, costs(7, 5)), (gromov_from_tokens, tokens(7, 5))):
        names = ("cost_x", "cost_y") if function is gromov_wasserstein else ("x", "y")
        for name, mass, at in ((names[0], "a", 2), (names[1], "b", 4)):
            arguments[mass][:, 1] += arguments[mass][:, at]
            arguments[mass][:, at] = 0
            arguments[name][:, at] = math.nan
            if function is gromov_wasserstein:
                arguments[name][:, :, at] = math.nan
        actual, exact = compare(function, arguments, torch.float64, device, method=method)
        assert torch.equal(actual.plan == 0, exact.plan == 0) and (actual.plan[:, 2] == 0).all() and (actual.plan[:, :, 4] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_problems_stop_by_themselves(dtype, device):
    arguments = costs(6, 6, batch=4)
    arguments["cost_y"][1:3] *= 0.03  # next to no structure: at rest after a step or two
    options = {"tol": 1e-4, "outer_iter": 8, "inner_iter": 10}
    actual, _ = compare(gromov_wasserstein, arguments, dtype, device, **options)
    assert actual.n_iter.unique().numel() > 1, "the case should stop its problems at different iterations"
    for i in (0, 2):
        alone = {k: v[i : i + 1] for k, v in cast(arguments, dtype, device).items()}
        assert torch.equal(gromov_wasserstein(**alone, **options, backend="triton").plan[0], actual.plan[i])


def test_any_strides(device):
    arguments = cast(costs(5, 7) | {"cost_xy": random(2, 5, 7, seed=5)}, torch.float32, device)
    options = FEW | {"alpha": 0.5, "backend": "triton"}
    expected = gromov_wasserstein(**arguments, **options).plan
    for views in zip(*(layouts(t) for t in arguments.values())):
        strided = dict(zip(arguments, (view for _, view in views)))
        assert torch.allclose(gromov_wasserstein(**strided, **options).plan, expected, rtol=0, atol=1e-7)
    one = {k: v[:1] for k, v in arguments.items()}
    expanded = gromov_wasserstein(**{k: v.expand(3, *v.shape[1:]) for k, v in one.items()}, **options).plan
    assert torch.equal(expanded, gromov_wasserstein(**one, **options).plan.expand(3, -1, -1))


def test_empty_batch_and_half_precision(device):
    result = gromov_from_tokens(torch.rand(0, 3, 4, device=device), torch.rand(0, 5, 4, device=device), backend="triton")
    assert result.plan.shape == (0, 3, 5) and result.gw_cost.shape == (0,)
    x, y = (random(2, n, 8, seed=n).to(device, torch.bfloat16) for n in (4, 5))
    half = gromov_from_tokens(x, y, **FEW, backend="triton")
    assert half.plan.dtype == torch.bfloat16
    torch.testing.assert_close(half.plan, gromov_from_tokens(x, y, **FEW, backend="eager").plan)


def gradients(function, arguments, dtype, device, backend, **options):
    """Of every tensor but the masses."""
    leaves = cast(arguments, dtype, device)
    inputs = [leaf.requires_grad_() for name, leaf in leaves.items() if name not in "ab"]
    gw_cost = function(**leaves, **FEW, **options, backend=backend).gw_cost
    return torch.autograd.grad((gw_cost * torch.arange(1, len(gw_cost) + 1, device=device)).sum(), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", (0.4, 1.0))
@pytest.mark.parametrize("n, m", [(1, 1), (7, 20), (36, 5)])
def test_gradients_of_costs(n, m, alpha, dtype, device):
    """Beyond 32 in float64, PyTorch serves."""
    arguments = costs(n, m, asymmetric=True) | {"cost_xy": random(2, n, m, seed=5)}
    with poisoned_memory(device):
        actual = gradients(gromov_wasserstein, arguments, dtype, device, "triton", alpha=alpha)
    eager = gradients(gromov_wasserstein, arguments, dtype, device, "eager", alpha=alpha)
    exact = gradients(gromov_wasserstein, cast(arguments, dtype, device), torch.float64, device, "eager", alpha=alpha)
    for name, *values in zip(("cost_x", "cost_y", "cost_xy"), actual, exact, eager):
        assert_close(*values, name)


def test_gradients_where_there_is_no_mass(device):
    arguments = costs(7, 5)
    for cost, mass, at in (("cost_x", "a", 2), ("cost_y", "b", 4)):
        arguments[mass][:, 1] += arguments[mass][:, at]
        arguments[mass][:, at] = 0
        arguments[cost][:, at] = arguments[cost][:, :, at] = math.nan
    d_x, d_y = gradients(gromov_wasserstein, arguments, torch.float64, device, "triton")
    assert (d_x[:, 2] == 0).all() and (d_x[:, :, 2] == 0).all() and (d_y[:, 4] == 0).all() and (d_y[:, :, 4] == 0).all()
    expected = gradients(gromov_wasserstein, arguments, torch.float64, device, "eager")
    torch.testing.assert_close((d_x, d_y), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("over", ("sample", "batch"))
@pytest.mark.parametrize("n, m", [(7, 20), (36, 5)])
def test_gradients_of_tokens(n, m, over, dtype, device):
    """Beyond 32 in float64, PyTorch serves."""
    arguments = tokens(n, m)
    for alpha, threshold in ((1.0, 0.1), (0.3, 0.6)):
        options = {"threshold_over": over, "alpha": alpha, "threshold": threshold}
        with poisoned_memory(device):
            actual = gradients(gromov_from_tokens, arguments, dtype, device, "triton", **options)
        eager = gradients(gromov_from_tokens, arguments, dtype, device, "eager", **options)
        exact = gradients(gromov_from_tokens, cast(arguments, dtype, device), torch.float64, device, "eager", **options)
        for name, *values in zip("xy", actual, exact, eager):
            assert_close(*values, f"{name}, {options}")


@pytest.mark.parametrize("over", ("sample", "batch"))
def test_gradients_of_tokens_with_a_given_cost_across(over, device):
    arguments = tokens(4, 5) | {"cost_xy": random(2, 4, 5, seed=5)}
    options = {"threshold_over": over, "alpha": 0.3}
    actual, expected = (gradients(gromov_from_tokens, arguments, torch.float64, device, name, **options) for name in ("triton", "eager"))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("over", ("sample", "batch"))
def test_gradients_of_tokens_without_mass_or_length(over, device):
    arguments = tokens(6, 5)
    for tensor, mass, at in (("x", "a", 2), ("y", "b", 4)):
        arguments[mass][:, 1] += arguments[mass][:, at]
        arguments[mass][:, at] = 0
        arguments[tensor][:, at] = math.nan
        arguments[tensor][:, 0] = 0  # at the floor of norms
    options = {"threshold_over": over, "alpha": 0.3}
    d_x, d_y = gradients(gromov_from_tokens, arguments, torch.float64, device, "triton", **options)
    assert (d_x[:, 2] == 0).all() and (d_y[:, 4] == 0).all() and (d_x[:, 0] != 0).any()
    torch.testing.assert_close((d_x, d_y), gradients(gromov_from_tokens, arguments, torch.float64, device, "eager", **options))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, and too many problems for the interpreter")
def test_batch_beyond_65535():
    x, y = torch.rand(70_001, 2, 4, device="cuda"), torch.rand(70_001, 3, 4, device="cuda")
    actual, expected = (gromov_from_tokens(x, y, backend=name).plan for name in ("triton", "eager"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
