"""gromov_wasserstein: what holds for every pair of spaces, tried on random ones of any shape."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helo_fast import gromov_wasserstein
from helo_fast.testing import MASSES, hard_masses

BACKENDS = ("eager", "cpp")
DTYPES = (torch.float32, torch.float64)
METHODS = ("proximal", "entropic")
SIZES = (1, 2, 3, 4, 7, 8, 9, 16, 17, 33)  # around the widths of vectors

every_pair = settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=BACKENDS)
def backend(request, device_for):
    device_for("gromov", request.param)
    return request.param


def space(kind, batch, size, generator):
    """[batch, size, size]: distances of points in a plane, or any symmetric or asymmetric numbers."""
    if kind == "points":
        points = torch.randn(batch, size, 2, generator=generator, dtype=torch.float64)
        return torch.cdist(points, points)
    cost = torch.rand(batch, size, size, generator=generator, dtype=torch.float64)
    return cost + cost.mT if kind == "symmetric" else cost


@st.composite
def pairs(draw, dtypes=DTYPES, methods=METHODS, alphas=(1.0, 0.5, 0.0), masses=MASSES, powers=(-1.5, 1), batches=(1, 4)):
    """Keyword arguments of gromov_wasserstein."""
    batch, n, m = draw(st.integers(*batches)), draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind, alpha, dtype = draw(st.sampled_from(("points", "symmetric", "any"))), draw(st.sampled_from(alphas)), draw(st.sampled_from(dtypes))
    arguments = {"cost_x": space(kind, batch, n, generator), "cost_y": space(kind, batch, m, generator)}
    if alpha < 1:
        arguments["cost_xy"] = torch.rand(batch, n, m, generator=generator, dtype=torch.float64)
    for name, size in (("a", n), ("b", m)):
        arguments[name] = hard_masses(draw(st.sampled_from(masses)), batch, size, generator)
    arguments = {k: v.to(dtype) for k, v in arguments.items()}
    options = {"method": draw(st.sampled_from(methods)), "epsilon": 10.0 ** draw(st.floats(*powers)), "alpha": alpha}
    return arguments | options | {"outer_iter": draw(st.integers(1, 5)), "inner_iter": draw(st.sampled_from((1, 5, 20)))}


def solve(backend, arguments, **changes):
    return gromov_wasserstein(**(arguments | changes), backend=backend)


@given(arguments=pairs())
@every_pair
def test_one_marginal_is_exact_and_the_error_is_of_the_other(backend, arguments):
    result = solve(backend, arguments)
    plan, a, b = result.plan.double(), arguments["a"].double(), arguments["b"].double()
    assert (plan >= 0).all() and all(t.isfinite().all() for t in (result.plan, result.gw_cost, result.marginal_error))
    rounding = 1e-4 if arguments["cost_x"].dtype == torch.float32 else 1e-12
    rows, columns = plan.sum(-1) - a, plan.sum(-2) - b
    met, mass = (rows, a) if arguments["method"] == "entropic" else (columns, b)  # the one that the last half-step serves
    assert (met.abs() <= rounding * mass + 1e-20).all()
    assert torch.allclose(rows.abs().sum(-1) + columns.abs().sum(-1), result.marginal_error.double(), rtol=1e-4, atol=rounding)
    assert (result.gw_cost >= 0).all()


@given(arguments=pairs(methods=("entropic",), masses=("uniform", "random"), powers=(-0.3, 1)))
@every_pair
def test_entropic_meets_both_marginals(backend, arguments):
    result = solve(backend, arguments, inner_iter=500)
    assert (result.marginal_error < (1e-4 if arguments["cost_x"].dtype == torch.float32 else 1e-6)).all()


@given(arguments=pairs(dtypes=(torch.float64,)), seed=st.integers(0, 99))
@every_pair
def test_permuted_spaces_permute_the_plan(backend, arguments, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(arguments[k].shape[1], generator=generator) for k in ("a", "b"))
    moved = {"cost_x": arguments["cost_x"][:, rows][:, :, rows], "cost_y": arguments["cost_y"][:, columns][:, :, columns]}
    moved |= {"a": arguments["a"][:, rows], "b": arguments["b"][:, columns]}
    if "cost_xy" in arguments:
        moved["cost_xy"] = arguments["cost_xy"][:, rows][:, :, columns]
    result, other = solve(backend, arguments), solve(backend, arguments, **moved)
    assert torch.allclose(other.plan, result.plan[:, rows][:, :, columns], rtol=0, atol=1e-9)
    assert torch.allclose(other.gw_cost, result.gw_cost, rtol=1e-7, atol=1e-10)


@given(arguments=pairs(dtypes=(torch.float64,), alphas=(1.0,)), seed=st.integers(0, 99))
@every_pair
def test_an_isometric_copy_is_the_same_space(backend, arguments, seed):
    """A permuted copy beside the original: the plan between them is the permuted plan of the space with itself, at the same cost."""
    order = torch.randperm(arguments["a"].shape[1], generator=torch.Generator().manual_seed(seed))
    cost, mass = arguments["cost_x"], arguments["a"]
    itself = solve(backend, arguments, cost_y=cost, b=mass)
    copy = solve(backend, arguments, cost_y=cost[:, order][:, :, order], b=mass[:, order])
    assert torch.allclose(copy.plan, itself.plan[:, :, order], rtol=0, atol=1e-9)
    assert torch.allclose(copy.gw_cost, itself.gw_cost, rtol=1e-7, atol=1e-10)


@given(arguments=pairs(dtypes=(torch.float64,)), power=st.integers(-4, 4))
@every_pair
def test_scaling(backend, arguments, power):
    """Costs within by s, costs across and epsilon by s^2: the same plan, and s^2 times the cost; to the bit for a power of two."""
    factor = 2.0**power
    scaled = {k: arguments[k] * factor for k in ("cost_x", "cost_y")} | {"epsilon": arguments["epsilon"] * factor**2}
    if "cost_xy" in arguments:
        scaled["cost_xy"] = arguments["cost_xy"] * factor**2
    result, other = solve(backend, arguments), solve(backend, arguments, **scaled)
    assert torch.equal(other.plan, result.plan) and torch.equal(other.gw_cost, result.gw_cost * factor**2)


@given(arguments=pairs(batches=(2, 4)))
@every_pair
def test_batch_mates_do_not_matter(backend, arguments):
    together = solve(backend, arguments)
    for i in range(len(together.plan)):
        one = {k: v[i : i + 1] for k, v in arguments.items() if isinstance(v, torch.Tensor)}
        for name, value in solve(backend, arguments, **one)._asdict().items():
            expected = getattr(together, name)[i]
            if backend == "eager" and value.dtype.is_floating_point:  # torch rounds sums by the batch's size
                assert torch.allclose(value[0], expected, rtol=1e-3, atol=1e-5 if value.dtype == torch.float32 else 1e-10), name
            elif backend != "eager":
                assert torch.equal(value[0], expected), name


@given(arguments=pairs(batches=(3, 6)))
@settings(every_pair, max_examples=12)
def test_threads_do_not_matter(backend, arguments):
    arguments |= {"outer_iter": 2} if backend == "eager" else {}  # torch's threads wake up for each of its ops
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(solve(backend, arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*values) for values in zip(*results))


@given(arguments=pairs(dtypes=(torch.float64,), methods=("entropic",), masses=("uniform", "random"), powers=(0, 1)))
@every_pair
def test_swapping_the_spaces_transposes_the_entropic_plan(backend, arguments):
    """Once the inner problem has converged: it ends on rows. The proximal one starts from ones in its columns and is not symmetric."""
    swapped = {"cost_x": arguments["cost_y"], "cost_y": arguments["cost_x"], "a": arguments["b"], "b": arguments["a"]}
    if "cost_xy" in arguments:
        swapped["cost_xy"] = arguments["cost_xy"].mT
    options = {"inner_iter": 300, "outer_iter": 3}
    result, other = solve(backend, arguments, **options), solve(backend, arguments, **swapped, **options)
    assert torch.allclose(other.plan.mT, result.plan, rtol=0, atol=1e-8)
    assert torch.allclose(other.gw_cost, result.gw_cost, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("alpha", (1.0, 0.5))
@pytest.mark.parametrize("shape", ((0, 1, 1), (0, 4, 3), (0, 1, 5)), ids=str)
def test_empty_batch(backend, shape, alpha, method):
    batch, n, m = shape
    cost_xy = torch.empty(shape) if alpha < 1 else None
    result = gromov_wasserstein(torch.empty(0, n, n), torch.empty(0, m, m), cost_xy=cost_xy, alpha=alpha, method=method, backend=backend)
    assert result.plan.shape == shape and all(t.shape == (0,) for t in result[1:])
