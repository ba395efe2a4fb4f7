"""sinkhorn against oracles that share none of its code: POT in float64, and a log-domain loop in extended precision.

Steepness is max|cost| / epsilon. Every oracle gets the numbers that the back end gets, rounded to its dtype beforehand.
"""

import functools

import numpy as np
import ot
import pytest
import torch

from helo_fast import sinkhorn
from helo_fast.testing import assert_close, hard_cost, hard_masses

BACKENDS = ("eager", "cpp")
DTYPES = (torch.float32, torch.float64)
VALUES = ("plan", "f", "g", "transport_cost", "marginal_error")


@pytest.fixture(params=BACKENDS)
def backend(request, device_for):
    device_for("sinkhorn", request.param)
    return request.param


def problem(batch, n, m, cost="uniform", a="uniform", b="uniform", scale=1.0, seed=0):
    """(cost, a, b) in float64, with digits that float32 holds."""
    generator = torch.Generator().manual_seed(seed)
    drawn = (
        scale * hard_cost(cost, batch, n, m, generator),
        hard_masses(a, batch, n, generator),
        hard_masses(b, batch, m, generator),
    )
    return tuple(t.float().double() for t in drawn)


def pot(cost, a, b, epsilon, max_iter):
    """VALUES of POT's iterates, by the map in sinkhorn's docstring."""
    solved = []
    for C, p, q in zip(cost, a, b):
        start = (p.log(), torch.zeros_like(q))
        options = {"numItermax": max_iter, "stopThr": 0, "log": True, "warn": False, "warmstart": start}
        plan, log = ot.bregman.sinkhorn_log(p, q, C, epsilon, **options)
        f, g = epsilon * (log["log_u"] - p.log()), epsilon * (log["log_v"] - q.log())
        solved.append((plan, f, g, (plan * C).sum(), (plan.sum(0) - q).abs().sum()))
    return dict(zip(VALUES, map(torch.stack, zip(*solved))))


def extended(cost, a, b, epsilon, max_iter, tau_a=None, tau_b=None):
    """VALUES of the iteration as the docstring writes it, in the longest float of numpy; every mass above 0."""
    cost, a, b = (t.numpy().astype(np.longdouble) for t in (cost, a, b))
    kappa_a, kappa_b = (1 if tau is None else tau / (np.longdouble(tau) + epsilon) for tau in (tau_a, tau_b))

    def soft(terms, axis):
        top = terms.max(axis, keepdims=True)
        return np.squeeze(top, axis) + np.log(np.exp(terms - top).sum(axis))

    f = np.zeros_like(a)
    for _ in range(max_iter):
        g = -kappa_b * epsilon * soft(np.log(a)[:, :, None] + (f[:, :, None] - cost) / epsilon, 1)
        f = -kappa_a * epsilon * soft(np.log(b)[:, None] + (g[:, None] - cost) / epsilon, 2)
    plan = a[:, :, None] * b[:, None] * np.exp((f[:, :, None] + g[:, None] - cost) / epsilon)
    target = b if tau_b is None else b * np.exp(-g / tau_b)
    values = plan, f, g, (plan * cost).sum((1, 2)), np.abs(plan.sum(1) - target).sum(1)
    with np.errstate(over="ignore"):
        return {name: torch.from_numpy(value.astype(np.float64)) for name, value in zip(VALUES, values)}


def check(backend, dtype, exact, cost, a, b, names=VALUES, **options):
    """Within the accuracy bound, and, so that the bound itself is good for something, eager within a priori ones."""
    given = [t.to(dtype) for t in (cost, a, b)]
    options |= {"gradient": "none"}
    eager = sinkhorn(*given, **options, backend="eager")
    actual = eager if backend == "eager" else sinkhorn(*given, **options, backend=backend)
    epsilon, highest = options["epsilon"], cost.abs().max().item()
    noise = torch.finfo(dtype).eps * (50 + 8 * highest / epsilon + options["max_iter"])
    drift = epsilon * options["max_iter"]  # potentials add up the rounding of all iterations
    units = {"plan": exact["plan"].max().item(), "f": drift, "g": drift, "transport_cost": highest, "marginal_error": 1}
    for name in names:
        worst = (getattr(eager, name).double() - exact[name]).abs().max().item()
        assert worst <= noise * units[name], f"eager {name}: error {worst:.3g}"
        assert_close(getattr(actual, name), exact[name], getattr(eager, name), name)
    assert (actual.plan >= 0).all() and (actual.n_iter == options["max_iter"]).all()


# (batch, n, m, steepness, iterations, options of problem)
GRID = {
    "one_entry": (8, 1, 1, 1e4, 5, {}),
    "one_row": (8, 1, 600, 1e4, 5, {"cost": "signed", "b": "geometric"}),
    "one_column": (8, 600, 1, 1e3, 5, {"cost": "signed", "a": "spiky"}),
    "flat": (8, 40, 33, 0.1, 50, {"a": "random"}),
    "smooth": (8, 36, 36, 1, 100, {"a": "random", "b": "random"}),
    "usual": (16, 36, 36, 10, 100, {"cost": "signed", "b": "random"}),
    "spiky_a": (8, 36, 36, 10, 100, {"a": "spiky"}),
    "spiky_b": (8, 36, 36, 10, 100, {"b": "spiky"}),
    "spiky_both": (8, 17, 64, 100, 200, {"cost": "squared_distance", "a": "spiky", "b": "spiky"}),
    "geometric_both": (8, 65, 9, 100, 200, {"a": "geometric", "b": "geometric"}),
    "six_decades": (8, 31, 40, 100, 200, {"cost": "six_decades", "a": "geometric", "b": "random"}),
    "six_decades_steep": (8, 40, 31, 1e4, 300, {"cost": "six_decades", "a": "random", "b": "spiky"}),
    "blocks": (8, 48, 48, 100, 300, {"cost": "blocks", "a": "random"}),
    "blocks_steep": (8, 24, 30, 1e4, 300, {"cost": "blocks", "b": "geometric"}),
    "steep": (8, 33, 33, 1e3, 300, {"cost": "signed", "a": "random", "b": "random"}),
    "steepest": (8, 24, 24, 1e4, 500, {"a": "random", "b": "geometric"}),
    "steepest_on_a_line": (8, 50, 30, 1e4, 300, {"cost": "squared_distance", "a": "geometric", "b": "geometric"}),
    "million": (8, 30, 30, 10, 100, {"scale": 1e6, "a": "random", "b": "random"}),
    "million_spiky": (8, 30, 17, 1e3, 300, {"scale": 1e6, "a": "spiky", "b": "spiky"}),
    "million_steepest": (8, 20, 36, 1e4, 300, {"scale": 1e6, "cost": "signed", "a": "geometric", "b": "random"}),
    "million_six_decades": (8, 36, 20, 100, 200, {"scale": 1e6, "cost": "six_decades", "a": "random"}),
    "millionth": (8, 30, 30, 100, 100, {"scale": 1e-6, "a": "random", "b": "spiky"}),
    "wide": (2, 3, 600, 100, 100, {"a": "random", "b": "geometric"}),
    "tall": (2, 600, 5, 1e3, 100, {"a": "spiky", "b": "random"}),
    "large": (2, 300, 257, 20, 40, {"a": "random", "b": "random"}),
    "largest": (1, 600, 600, 1e3, 20, {"a": "random", "b": "spiky"}),
}  # fmt: skip


@functools.cache
def solved_by_pot(case):
    """(problem, options, VALUES), once for all back ends and dtypes."""
    batch, n, m, steepness, max_iter, options = GRID[case]
    given = problem(batch, n, m, **options)
    how = {"epsilon": options.get("scale", 1.0) / steepness, "max_iter": max_iter}
    return given, how, pot(*given, **how)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRID)
def test_pot(backend, case, dtype):
    given, how, exact = solved_by_pot(case)
    check(backend, dtype, exact, *given, **how)


# (tau_a, tau_b) in units of cost
STRENGTHS = ((0.3, 0.3), (1e-3, 10.0), (1e3, 0.01), (None, 0.1), (1.0, None), (1e3, 1e3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masses", ("random", "spiky", "geometric"))
@pytest.mark.parametrize("taus", STRENGTHS, ids=str)
def test_unbalanced(backend, taus, masses, dtype):
    for steepness, kind in ((3, "signed"), (30, "uniform"), (1e3, "squared_distance")):
        cost, a, b = problem(8, 20, 13, cost=kind, a=masses, b=masses)
        options = {"epsilon": 1 / steepness, "max_iter": 40, "tau_a": taus[0], "tau_b": taus[1]}
        exact = extended(cost, a, b, **options)
        check(backend, dtype, exact, cost, a, b, names=("plan", "f", "g", "transport_cost"), **options)


@functools.cache
def drifting(kind):
    cost, a, b = problem(8, 24, 20, cost=kind, a="geometric", b="random")
    if kind == "squared_distance":
        cost = cost.sort(-1)[0]
    options = {"epsilon": 1e-3, "max_iter": 2000}
    exact = pot(cost, a, b, **options)
    early = pot(cost, a, b, epsilon=1e-3, max_iter=20)
    assert (exact["f"] - early["f"]).abs().max() > 20 * options["epsilon"]  # it is such a problem
    return (cost, a, b), options, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ("squared_distance", "blocks", "uniform"))
def test_scalings_that_drift_for_two_thousand_iterations(backend, kind, dtype):
    """From f = 0 the potentials have far to go in steps of epsilon: what a kernel absorbs now is out of range again later."""
    given, options, exact = drifting(kind)
    check(backend, dtype, exact, *given, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lift", (1.0, 30.0, 1e3), ids=str)
def test_rows_and_columns_far_from_all_others(backend, lift, dtype):
    """Their whole row, column, or all but one entry of the kernel underflows."""
    cost, a, b = problem(8, 18, 22, a="random", b="random")
    cost = cost / 50
    cost[:, 3] += lift  # a whole row
    cost[:, 11] -= lift
    cost[:, :, 5] += lift  # a whole column
    cost[:, 7, 1:] += lift  # all of a row but one entry
    cost[:, 1:, 9] += lift
    options = {"epsilon": 1e-2, "max_iter": 200}
    check(backend, dtype, pot(cost, a, b, **options), cost, a, b, **options)


@pytest.mark.parametrize("tol", (1e-2, 1e-4))
def test_mixed_difficulty_stops_where_the_oracle_does(backend, tol):
    """Epsilon spread over a thousandfold, by way of the costs' scale; each problem stops at the first check that passes."""
    cost, a, b = problem(9, 21, 17, cost="signed", a="random", b="random")
    cost = cost * torch.logspace(-3, 0, 9, dtype=torch.float64)[:, None, None]
    options = {"epsilon": 0.02, "max_iter": 400}
    result = sinkhorn(cost, a, b, **options, tol=tol, check_every=5, backend=backend)
    assert len(result.n_iter.unique()) >= 4
    for i, count in enumerate(result.n_iter.tolist()):
        one = cost[i : i + 1], a[i : i + 1], b[i : i + 1]
        there = pot(*one, options["epsilon"], count)
        for name in VALUES:
            assert torch.allclose(getattr(result, name)[i], there[name][0], rtol=0, atol=1e-11), name
        assert count == 400 or (count % 5 == 0 and there["marginal_error"] <= tol)
        assert count == 5 or pot(*one, options["epsilon"], (count - 1) // 5 * 5)["marginal_error"] > tol


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged(backend, dtype):
    cost, _, _ = problem(8, 40, 35)
    n_rows, n_cols = torch.tensor([40, 1, 17, 33, 16, 8, 39, 2]), torch.tensor([35, 35, 1, 32, 9, 16, 15, 2])
    options = {"epsilon": 0.02, "max_iter": 150, "n_rows": n_rows, "n_cols": n_cols}
    eager, actual = (sinkhorn(cost.to(dtype), **options, backend=name) for name in ("eager", backend))
    for i, (n, m) in enumerate(zip(n_rows.tolist(), n_cols.tolist())):
        uniform = torch.full((n,), 1 / n, dtype=torch.float64), torch.full((m,), 1 / m, dtype=torch.float64)
        exact = pot(cost[i : i + 1, :n, :m], *(mass.to(dtype).double()[None] for mass in uniform), 0.02, 150)
        for name, inside in (("plan", (slice(n), slice(m))), ("f", (slice(n),)), ("g", (slice(m),))):
            values = (getattr(result, name)[(i, *inside)] for result in (actual, eager))
            got, plain = values
            assert_close(got, exact[name][0], plain, f"{name} of problem {i}")
        assert (actual.plan[i, n:] == 0).all() and (actual.plan[i, :, m:] == 0).all()


@pytest.mark.parametrize("masses", ("uniform", "spiky", "geometric"))
@pytest.mark.parametrize("cost", ("uniform", "signed", "squared_distance", "six_decades", "blocks"))
@pytest.mark.parametrize("scale", (1.0, 1e6), ids=str)
def test_float32_at_the_least_epsilon_is_never_nan_nor_silently_zero(backend, cost, masses, scale):
    for n, m, max_iter in ((30, 30, 1), (17, 50, 100), (50, 17, 100)):
        C, a, b = (t.float() for t in problem(4, n, m, cost=cost, a=masses, b=masses, scale=scale))
        result = sinkhorn(C, a, b, epsilon=1e-4 * C.abs().max().item(), max_iter=max_iter, backend=backend)
        assert all(t.isfinite().all() for t in result[:5])
        assert torch.allclose(result.plan.double().sum(-1), a.double(), rtol=0.02, atol=0)  # each row, of mass 1e-12 too
        distance = (result.plan.double().sum(-2) - b.double()).abs().sum(-1)
        assert torch.allclose(distance, result.marginal_error.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tau_a", (None, 1.0), ids=str)
def test_kernel_entries_past_the_largest_number(backend, tau_a, dtype):
    """With tau_b small the column half-step leaves exp(-cost / epsilon) as it is, for the row half-step to mend."""
    lowest = -355.0 if dtype == torch.float32 else -1419.5
    cost = torch.tensor([[[lowest, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    options = {"epsilon": 1.0, "max_iter": 3, "tau_a": tau_a, "tau_b": 1e-3}
    exact = extended(cost, half, half, **options)
    if tau_a is None:
        check(backend, dtype, exact, cost, half, half, names=("plan", "f", "g"), **options)
    else:
        plan = sinkhorn(cost.to(dtype), **options, backend=backend).plan
        assert torch.equal(plan.isinf(), exact["plan"].to(dtype).isinf()) and (plan >= 0).all()


def test_sums_close_to_underflow_in_unbalanced_problems(backend):
    """A small kappa = tau / (tau + epsilon) keeps the scaling in range while the sum that it comes from has lost terms."""
    cost = torch.tensor([[[86.2, 86.4], [0.0, 0.0]]], dtype=torch.float64).float().double()
    half = torch.full((1, 2), 0.5, dtype=torch.float64)
    options = {"epsilon": 1.0, "max_iter": 1, "tau_a": 0.25}
    check(backend, torch.float32, extended(cost, half, half, **options), cost, half, half, **options)


def test_sums_close_to_underflow_by_a_tiny_mass(backend):
    """A row of mass 1e-30 is scaled by 6e7, which looks safe, from a sum that has lost terms."""
    cost = torch.tensor([[[17.2, 17.5], [0.0, 0.0]]], dtype=torch.float64).float().double()
    a = torch.tensor([[1e-30, 1.0]]).double()
    b = torch.full((1, 2), 0.5, dtype=torch.float64)
    options = {"epsilon": 1.0, "max_iter": 1}
    check(backend, torch.float32, pot(cost, a, b, **options), cost, a, b, **options)


def test_potentials_of_tiny_masses_at_a_large_epsilon(backend):
    """All costs are 0, so that f = g = 0 whatever the masses; the exponents of a column of mass 1e-12 lie near -28."""
    cost, a, b = problem(8, 5, 9, b="geometric")
    exact = pot(0 * cost, a, b, 10.0, 1)
    check(backend, torch.float32, exact, 0 * cost, a, b, epsilon=10.0, max_iter=1)


def test_marginal_error_with_a_weak_penalty(backend):
    """Its target b exp(-g / tau_b) multiplies the rounding of g by epsilon / tau_b."""
    cost, a, b = problem(8, 20, 13, a="random", b="random")
    options = {"epsilon": 1.0, "max_iter": 40, "tau_a": 1.0, "tau_b": 1e-3}
    check(backend, torch.float32, extended(cost, a, b, **options), cost, a, b, **options)
