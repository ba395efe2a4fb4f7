"""sinkhorn: what holds for every problem, tried on hard ones: tiny epsilon, masses of 1e-12 and 0, costs over six decades, any shape."""

import math

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from helo_fast import sinkhorn
from helo_fast.testing import COSTS, MASSES, hard_cost, hard_masses

BACKENDS = ("eager", "cpp")
DTYPES = (torch.float32, torch.float64)
SIZES = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 40, 65)  # around the widths of vectors
TAUS = st.none() | st.floats(-3, 3).map(lambda power: 10.0**power)

every_problem = settings(derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=BACKENDS)
def backend(request, device_for):
    device_for("sinkhorn", request.param)
    return request.param


@st.composite
def problems(
    draw, dtypes=DTYPES, powers=(-4, 1), scales=(1e-3, 1.0, 1e6), taus=TAUS, holes=True, batches=(1, 4), costs=COSTS, masses=MASSES
):
    """Keyword arguments of sinkhorn: a batch whose problems differ a thousandfold in difficulty."""
    batch, n, m = draw(st.integers(*batches)), draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale, dtype = draw(st.sampled_from(scales)), draw(st.sampled_from(dtypes))
    difficulty = 10 ** (-3 * torch.rand(batch, 1, 1, generator=generator, dtype=torch.float64))
    difficulty[:1] = 1
    arguments = {"cost": scale * difficulty * hard_cost(draw(st.sampled_from(costs)), batch, n, m, generator)}
    for name, size in (("a", n), ("b", m)):
        mass = hard_masses(draw(st.sampled_from(masses)), batch, size, generator)
        if holes and size > 2 and draw(st.booleans()):
            mass[:, ::3] = 0
            mass /= mass.sum(-1, keepdim=True)
        arguments[name] = mass
    arguments = {k: v.to(dtype) for k, v in arguments.items()}
    power = draw(st.floats(*powers))
    arguments |= {"epsilon": scale * 10.0**power, "max_iter": draw(st.sampled_from((1, 3, 10, 60)))}
    return arguments | {"tau_a": draw(taus), "tau_b": draw(taus), "gradient": "none"}


def balanced(**options):
    return problems(taus=st.none(), **options)


def solve(backend, arguments, **changes):
    return sinkhorn(**(arguments | changes), backend=backend)


def rounding(backend, arguments):
    """Relative error of one entry of the plan: eager adds up potentials of size max|cost| / epsilon, cpp only what it exponentiates."""
    ulp = torch.finfo(arguments["cost"].dtype).eps
    steepness = arguments["cost"].abs().amax().item() / arguments["epsilon"] if arguments["cost"].numel() else 0
    return ulp * (100 + (8 * steepness if backend == "eager" else 0))


def tiny(arguments):
    """What may underflow, in plans of mass 1."""
    return 1e-20 if arguments["cost"].dtype == torch.float32 else 1e-280


def is_in_range(arguments):
    """Whether the answer is: where marginals are soft and costs far below 0, mass is worth making, beyond all numbers of a dtype."""
    exact = solve("eager", {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    spent = exact.plan * (1 + arguments["cost"].abs().double())
    return bool((spent.sum((-2, -1)) < 0.1 * torch.finfo(arguments["cost"].dtype).max).all())


@given(arguments=problems())
@every_problem
def test_finite_non_negative_and_zero_without_mass(backend, arguments):
    assume(is_in_range(arguments))
    result = solve(backend, arguments)
    rows, columns = arguments["a"] > 0, arguments["b"] > 0
    inside = rows.unsqueeze(-1) & columns.unsqueeze(-2)
    assert result.plan.isfinite().all() and (result.plan >= 0).all() and (result.plan[~inside] == 0).all()
    for potential, mass in ((result.f, rows), (result.g, columns)):
        assert potential[mass].isfinite().all() and (potential[~mass] == -math.inf).all()
    assert result.transport_cost.isfinite().all() and (result.marginal_error >= 0).all()
    assert (result.n_iter == arguments["max_iter"]).all()


@given(arguments=balanced())
@every_problem
def test_rows_are_exact_and_columns_within_marginal_error(backend, arguments):
    result = solve(backend, arguments)
    plan, a, b = result.plan.double(), arguments["a"].double(), arguments["b"].double()
    relative = rounding(backend, arguments)
    assert torch.allclose(plan.sum(-1), a, rtol=relative, atol=tiny(arguments))  # entry by entry: a mass of 1e-12 as exactly as one of 1
    distance = (plan.sum(-2) - b).abs().sum(-1)
    assert torch.allclose(distance, result.marginal_error.double(), rtol=1e-5, atol=relative)
    spent = plan * arguments["cost"].double()
    assert ((result.transport_cost - spent.sum((-2, -1))).abs() <= 1e-6 * spent.abs().sum((-2, -1))).all()


@given(arguments=problems(dtypes=(torch.float64,)))
@every_problem
def test_plan_is_what_the_potentials_say(backend, arguments):
    result = solve(backend, arguments)
    scaled = (result.f.unsqueeze(-1) + result.g.unsqueeze(-2) - arguments["cost"]) / arguments["epsilon"]
    plan = arguments["a"].unsqueeze(-1) * arguments["b"].unsqueeze(-2) * scaled.exp()
    # f and g come rounded, epsilon times less exact than the plan
    size = max(t[t.isfinite()].abs().amax().item() for t in (result.f, result.g)) + arguments["cost"].abs().amax().item()
    relative = 1e-15 * (100 + 8 * size / arguments["epsilon"])
    assert torch.allclose(result.plan, plan, rtol=relative, atol=tiny(arguments))


@given(arguments=balanced(dtypes=(torch.float64,), scales=(1.0,)), seed=st.integers(0, 99))
@every_problem
def test_constants_of_columns_drop_out_at_every_iteration(backend, arguments, seed):
    """f starts at 0, so that a constant of a row matters to the iterates; one of a column goes into g at once."""
    arguments["cost"] = (arguments["cost"] * 2**20).round() / 2**20  # so that adding whole numbers is exact
    m = arguments["cost"].shape[-1]
    constant = torch.randint(-8, 8, (m,), generator=torch.Generator().manual_seed(seed)).double()
    moved, result = solve(backend, arguments, cost=arguments["cost"] + constant), solve(backend, arguments)
    relative = 1e-15 * (200 + 100 / arguments["epsilon"])
    assert torch.allclose(moved.plan, result.plan, rtol=relative, atol=1e-15)
    assert torch.allclose(moved.g, result.g + constant, rtol=0, atol=1e-13 * (10 + arguments["epsilon"] * 60))


@given(arguments=balanced(dtypes=(torch.float64,), scales=(1.0,), powers=(-0.5, 1)), seed=st.integers(0, 99))
@every_problem
def test_constants_of_rows_and_columns_drop_out_at_convergence(backend, arguments, seed):
    _, n, m = arguments["cost"].shape
    generator = torch.Generator().manual_seed(seed)
    constant = torch.randn(n, 1, generator=generator).double() + torch.randn(m, generator=generator).double()
    ends = [solve(backend, arguments, cost=cost, max_iter=1000, tol=1e-13) for cost in (arguments["cost"], arguments["cost"] + constant)]
    assert torch.allclose(ends[0].plan, ends[1].plan, rtol=0, atol=1e-9)
    assert all((end.marginal_error < 1e-10).all() for end in ends)


@given(arguments=problems(), seed=st.integers(0, 99))
@every_problem
def test_permuted_rows_and_columns_permute_the_result(backend, arguments, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=generator) for size in arguments["cost"].shape[1:])
    permuted = {"cost": arguments["cost"][:, rows][:, :, columns], "a": arguments["a"][:, rows], "b": arguments["b"][:, columns]}
    result, moved = solve(backend, arguments), solve(backend, arguments, **permuted)
    relative = 20 * rounding("eager", arguments) * math.sqrt(arguments["max_iter"])
    expected = result.plan[:, rows][:, :, columns]
    assert torch.allclose(moved.plan, expected, rtol=relative, atol=relative * result.plan.amax().item() + tiny(arguments))


@given(arguments=problems(scales=(1.0,)), power=st.integers(-12, 12))
@every_problem
def test_scaling_cost_and_epsilon_scales_the_potentials_alone(backend, arguments, power):
    """By powers of two, which round nothing: to the bit."""
    factor = 2.0**power
    scaled = {k: None if arguments[k] is None else arguments[k] * factor for k in ("cost", "epsilon", "tau_a", "tau_b")}
    result, other = solve(backend, arguments), solve(backend, arguments, **scaled)
    assert torch.equal(other.plan, result.plan) and torch.equal(other.marginal_error, result.marginal_error)
    for name in ("f", "g", "transport_cost"):
        assert torch.equal(getattr(other, name), getattr(result, name) * factor), name


@given(arguments=problems(batches=(2, 5)), tol=st.none() | st.sampled_from((1e-1, 1e-3, 1e-6)))
@every_problem
def test_batch_mates_do_not_matter(backend, arguments, tol):
    if backend == "eager":
        tol = None  # its batched sums round by the batch's size, and an error that is just below tol may then end above
    arguments |= {"tol": tol, "check_every": 3, "max_iter": 30}
    together = solve(backend, arguments)
    backwards = solve(backend, arguments, **{k: arguments[k].flip(0) for k in ("cost", "a", "b")})
    for i in range(len(together.plan)):
        one = {k: arguments[k][i : i + 1] for k in ("cost", "a", "b")}
        alone = solve(backend, arguments, **one)
        for name, value in together._asdict().items():
            for other in (getattr(alone, name)[0], getattr(backwards, name).flip(0)[i]):
                if backend == "cpp":
                    assert torch.equal(value[i], other), name
                elif name == "plan":
                    size = 20 * rounding(backend, arguments) * value.amax().item()
                    assert torch.allclose(value[i], other, rtol=0, atol=size + tiny(arguments))


@given(arguments=problems(batches=(3, 8)), tol=st.none() | st.sampled_from((1e-2, 1e-5)))
@every_problem
def test_threads_do_not_matter(backend, arguments, tol):
    arguments |= {"tol": tol, "max_iter": 100 if backend == "cpp" else 5}  # torch's threads wake up for each of eager's sums
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(solve(backend, arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*values) for values in zip(*results))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((1, 256, 256), (1, 70, 1000), (1, 1031, 67), (3, 300, 220)), ids=str)
def test_threads_do_not_matter_to_large_problems(shape, dtype, device_for):
    """Where the problems are fewer than the threads, the kernel may cut each of them; alone or in a batch, the bits stay."""
    device_for("sinkhorn", "cpp")
    generator = torch.Generator().manual_seed(0)
    a, b = (hard_masses("geometric", shape[0], size, generator).to(dtype) for size in shape[1:])
    cost = hard_cost("signed", *shape, generator).to(dtype)
    arguments = {"cost": cost, "a": a, "b": b, "epsilon": 0.01, "max_iter": 12, "gradient": "none"}
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            together = solve("cpp", arguments)
            alone = solve("cpp", arguments, **{k: arguments[k][-1:] for k in ("cost", "a", "b")})
            results.append(together)
            assert all(torch.equal(whole[-1:], last) for whole, last in zip(together, alone))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for result in results[1:] for first, other in zip(results[0], result))


@given(arguments=problems(powers=(-2, 1)), tol=st.sampled_from((1e-2, 1e-4)), every=st.sampled_from((1, 4, 7)))
@every_problem
def test_tolerance_only_decides_when_to_stop(backend, arguments, tol, every):
    arguments |= {"max_iter": 50}
    result = solve(backend, arguments, tol=tol, check_every=every)
    assert torch.equal(result.converged, result.marginal_error <= tol)
    for i, count in enumerate(result.n_iter.tolist()):
        one = {k: arguments[k][i : i + 1] for k in ("cost", "a", "b")}
        exactly = solve(backend, arguments, **one, max_iter=count)
        slack = 0 if backend == "cpp" else 20 * rounding(backend, arguments)
        assert torch.allclose(exactly.plan[0], result.plan[i], rtol=0, atol=slack)
        assert count == 50 or (count % every == 0 and result.converged[i])
        if backend == "cpp" and count > every:  # the checks before it found more
            last = (count - 1) // every * every
            assert solve(backend, arguments, **one, max_iter=last).marginal_error > tol


@given(arguments=balanced(dtypes=(torch.float64,), holes=False), factor=st.sampled_from((1e-3, 7.0, 1e4)))
@every_problem
def test_mass_scales_the_plan(backend, arguments, factor):
    heavier = solve(backend, arguments, a=factor * arguments["a"], b=factor * arguments["b"])
    expected = factor * solve(backend, arguments).plan
    relative = 100 * rounding("eager", arguments)
    assert torch.allclose(heavier.plan, expected, rtol=relative, atol=relative * expected.amax().item())


@given(arguments=problems(dtypes=(torch.float64,), batches=(1, 3)))
@every_problem
def test_rows_and_columns_without_mass_are_as_if_absent(backend, arguments):
    """Also at NaN costs, and at the end of a ragged problem."""
    batch, n, m = arguments["cost"].shape
    wide = torch.full((batch, 2 * n + 3, 2 * m + 3), math.nan, dtype=torch.float64)
    a, b = wide.new_zeros(batch, 2 * n + 3), wide.new_zeros(batch, 2 * m + 3)
    wide[:, 1 : 2 * n : 2, 1 : 2 * m : 2], a[:, 1 : 2 * n : 2], b[:, 1 : 2 * m : 2] = (arguments[k] for k in ("cost", "a", "b"))
    ragged = torch.full((batch, n + 5, m + 2), math.nan, dtype=torch.float64)
    ragged[:, :n, :m] = arguments["cost"]
    ends = [torch.nn.functional.pad(arguments[k], (0, extra), value=0.5) for k, extra in (("a", 5), ("b", 2))]
    counts = {"n_rows": torch.full((batch,), n), "n_cols": torch.full((batch,), m)}
    result = solve(backend, arguments)
    spread = solve(backend, arguments, cost=wide, a=a, b=b)
    padded = solve(backend, arguments, cost=ragged, a=ends[0], b=ends[1], **counts)
    relative = 20 * rounding("eager", arguments)
    for plan in (spread.plan[:, 1 : 2 * n : 2, 1 : 2 * m : 2], padded.plan[:, :n, :m]):
        assert torch.allclose(plan, result.plan, rtol=relative, atol=relative * result.plan.amax().item())
    for other in (spread, padded):
        assert torch.allclose(other.plan.sum((-2, -1)), result.plan.sum((-2, -1)), rtol=relative, atol=0)  # nothing elsewhere
        assert torch.allclose(other.transport_cost, result.transport_cost, rtol=1e-6, atol=relative * arguments["cost"].abs().amax().item())


@given(
    size=st.sampled_from(SIZES),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(MASSES),
    power=st.floats(-4, 1),
    seed=st.integers(0, 99),
)
@every_problem
def test_one_row_or_one_column_has_one_plan(backend, size, dtype, kind, power, seed):
    generator = torch.Generator().manual_seed(seed)
    cost = hard_cost("signed", 2, 1, size, generator).to(dtype)
    mass = hard_masses(kind, 2, size, generator).to(dtype)
    total = mass.sum(-1, keepdim=True)
    arguments = {"cost": cost, "epsilon": 10.0**power}
    row = sinkhorn(cost, total, mass, epsilon=10.0**power, backend=backend)
    column = sinkhorn(cost.mT, mass, total, epsilon=10.0**power, backend=backend)
    assert torch.allclose(row.plan[:, 0], mass, rtol=rounding(backend, arguments), atol=0)
    assert torch.allclose(column.plan[..., 0], mass, rtol=rounding(backend, arguments), atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((0, 1, 1), (0, 3, 5), (0, 40, 1)), ids=str)
@pytest.mark.parametrize("options", ({}, {"tol": 1e-3}, {"tau_a": 1.0, "tau_b": 0.1}, {"gradient": "unrolled"}), ids=str)
def test_empty_batch(backend, shape, options, dtype):
    result = sinkhorn(torch.empty(shape, dtype=dtype), backend=backend, **options)
    assert result.plan.shape == shape and result.f.shape == shape[:2] and result.g.shape == (0, shape[2])
    assert all(t.shape == (0,) for t in result[3:]) and result.plan.dtype == dtype
