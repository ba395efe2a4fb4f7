"""gromov_wasserstein and gromov_from_tokens: values against the plain formula, POT and the released model, and gradients."""

import math

import numpy as np
import ot
import pytest
import torch

from helo_fast import gromov_from_tokens, gromov_wasserstein
from helo_fast.testing import assert_close, layouts

BACKENDS = ("eager", "cpp", "cuda")  # triton runs under the interpreter in a process of its own: test_triton.py
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
METHODS = ("proximal", "entropic")
VALUES = ("plan", "gw_cost", "marginal_error")


@pytest.fixture(params=BACKENDS)
def backend(request, device_for):
    """A back end's name, with its device as torch's default."""
    with torch.device(device_for("gromov", request.param)):
        yield request.param


def random(*shape, seed=0, dtype=torch.float64):
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu")
    return values.to(torch.empty(0).device, dtype)


def spaces(batch=3, n=7, m=5, dtype=torch.float64, **options):
    """Symmetric costs within, costs across (of weight 0.4) and marginals whose masses are exact in every dtype."""
    cost_x, cost_y = (random(batch, size, size, seed=size) for size in (n, m))
    arguments = {"cost_x": cost_x + cost_x.mT, "cost_y": cost_y + cost_y.mT, "cost_xy": random(batch, n, m, seed=1), "alpha": 0.6}
    for name, size in (("a", n), ("b", m)):
        mass = torch.full((batch, size), 1 / 64, dtype=torch.float64)
        mass[:, size // 2] += 1 - size / 64
        arguments[name] = mass
    return {k: v.to(dtype) for k, v in arguments.items() if isinstance(v, torch.Tensor)} | {"alpha": 0.6} | options


def double(arguments):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


def token_cost(x, threshold=0.1, over=(-2, -1)):
    unit = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    c = 1 - unit @ unit.mT
    low, high = c.amin(over, keepdim=True), c.amax(over, keepdim=True)
    return (c - (low + threshold * (high - low))).relu()


def plain_proximal(C, D, a=None, b=None, cost_xy=0.0, alpha=1.0, epsilon=0.1, outer_iter=5, inner_iter=20):
    """The released solver, as its formulas stand."""
    batch, n, m = len(C), C.shape[-1], D.shape[-1]
    p = (C.new_full((batch, n), 1 / n) if a is None else a).unsqueeze(-1)
    q = (C.new_full((batch, m), 1 / m) if b is None else b).unsqueeze(-1)
    T = p @ q.mT
    for _ in range(outer_iter):
        G = alpha * (C.square() @ p + (D.square() @ q).mT - 2 * C @ T @ D.mT) + (1 - alpha) * cost_xy
        T, s = torch.ones_like(T), torch.full_like(q, 1 / m)
        for _ in range(inner_iter):
            R = torch.exp(-G / epsilon) * T
            d = p / (R @ s)
            s = q / (R.mT @ d)
            T = d * R * s.mT
    return T


def objective(C, D, T, cost_xy=0.0, alpha=1.0):
    square = (C[:, :, None, :, None] - D[:, None, :, None, :]).square()  # [B, i, j, k, l]
    return alpha * torch.einsum("bijkl,bij,bkl->b", square, T, T) + (1 - alpha) * (T * cost_xy).sum((-2, -1))


def relative_error(plan, exact):
    return (plan.double() - exact).abs().amax((-2, -1)) / exact.amax((-2, -1))


@pytest.mark.parametrize("case", range(5))
def test_golden(backend, case, shared):
    golden = np.load(shared / "golden" / "gromov.npz")
    x, y, flow = (torch.as_tensor(golden[f"{case}.{k}"]) for k in ("x", "y", "flow"))
    names = {"epsilon": "beta", "outer_iter": "outer", "inner_iter": "inner"}
    options = {k: golden[f"{case}.{v}"].item() for k, v in names.items()}
    plan = gromov_from_tokens(x, y, threshold_over="batch", backend=backend, **options).plan
    assert (plan - flow).abs().max() <= 1e-3 * flow.max()
    whole = (-3, -2, -1)
    exact = plain_proximal(token_cost(x.double(), over=whole), token_cost(y.double(), over=whole), **options)
    plain = plain_proximal(token_cost(x, over=whole), token_cost(y, over=whole), **options)
    assert relative_error(plan, exact).max() <= 2 * relative_error(plain, exact).max() + 1e-6
    doubles = gromov_from_tokens(x.double(), y.double(), threshold_over="batch", backend=backend, **options).plan
    assert relative_error(doubles, exact).max() < 1e-10


@pytest.mark.parametrize("epsilon", (0.05, 0.3, 2.0))
def test_proximal_is_the_plain_formula(backend, epsilon):
    arguments = spaces(epsilon=epsilon)
    arguments |= {k: v + 0.2 * random(*v.shape, seed=3) for k, v in arguments.items() if k in ("cost_x", "cost_y")}  # asymmetric
    for alpha in (0.0, 0.6, 1.0):
        arguments["alpha"] = alpha
        plain = {("C" if k == "cost_x" else "D" if k == "cost_y" else k): v for k, v in arguments.items()}
        result, exact = gromov_wasserstein(**arguments, backend=backend), plain_proximal(**plain)
        assert relative_error(result.plan, exact).max() < 1e-10
        value = objective(arguments["cost_x"], arguments["cost_y"], result.plan, arguments["cost_xy"], alpha)
        assert torch.allclose(result.gw_cost, value, atol=1e-12)


@pytest.mark.parametrize("epsilon", (0.02, 0.1))
def test_float32_error_is_at_most_twice_the_plain_formulas(backend, epsilon):
    C, D = (token_cost(random(64, size, 16, seed=size, dtype=torch.float32) - 0.5) for size in (12, 9))
    exact = plain_proximal(C.double(), D.double(), epsilon=epsilon)
    plain = relative_error(plain_proximal(C, D, epsilon=epsilon), exact)
    ours = relative_error(gromov_wasserstein(C, D, epsilon=epsilon, backend=backend).plan, exact)
    for share in (0.25, 0.5, 0.75):  # single problems differ by luck
        assert ours.quantile(share) <= 2 * plain.quantile(share) + 1e-6


@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize("uniform", (True, False))
def test_entropic_equals_pot(backend, uniform, symmetric):
    arguments = spaces(method="entropic", epsilon=0.3, outer_iter=4, inner_iter=3 if uniform else 500)
    if uniform:  # else POT starts elsewhere, and only what converged can agree
        arguments["a"], arguments["b"] = None, None
    if not symmetric:
        arguments |= {k: arguments[k] + 0.3 * random(*arguments[k].shape, seed=9) for k in ("cost_x", "cost_y")}
    fused = gromov_wasserstein(**arguments, backend=backend)
    pure = gromov_wasserstein(**(arguments | {"alpha": 1.0, "cost_xy": None}), backend=backend)
    pot = {"epsilon": 0.3, "max_iter": 4, "tol": 0, "numItermax": arguments["inner_iter"], "stopThr": 0, "warn": False}
    for i in range(3):
        C, D, M = (arguments[k][i].cpu().numpy() for k in ("cost_x", "cost_y", "cost_xy"))
        p, q = (None, None) if uniform else (arguments["a"][i].cpu().numpy(), arguments["b"][i].cpu().numpy())
        expected = ot.gromov.entropic_gromov_wasserstein(C, D, p, q, "square_loss", **pot)
        assert np.allclose(pure.plan[i].cpu(), expected, atol=1e-10)
        expected, log = ot.gromov.entropic_fused_gromov_wasserstein(M, C, D, p, q, "square_loss", alpha=0.6, log=True, **pot)
        assert np.allclose(fused.plan[i].cpu(), expected, atol=1e-10)
        if symmetric and not uniform:  # POT's value takes the marginals for met
            assert abs(fused.gw_cost[i].item() - log["fgw_dist"]) < 1e-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", ((3, 7, 5), (2, 1, 4), (2, 4, 1), (3, 1, 1), (0, 3, 4), (2, 20, 33)), ids=str)
def test_values_against_float64(backend, shape, method, dtype):
    arguments = spaces(*shape, dtype=dtype, method=method, epsilon=0.3)
    tokens = {k: v for k, v in arguments.items() if k not in ("cost_x", "cost_y", "cost_xy")}
    tokens |= {k: random(shape[0], size, 6, seed=size, dtype=dtype) - 0.5 for k, size in (("x", shape[1]), ("y", shape[2]))}
    for function, given in ((gromov_wasserstein, arguments), (gromov_from_tokens, tokens)):
        exact = function(**double(given), backend="eager")
        eager, actual = function(**given, backend="eager"), function(**given, backend=backend)
        for name in VALUES:
            assert_close(getattr(actual, name), getattr(exact, name), getattr(eager, name), f"{function.__name__} {name}")
            half = 0.02 if dtype in (torch.bfloat16, torch.float16) else 2e-4
            assert torch.allclose(getattr(actual, name).double(), getattr(exact, name), atol=half), name
        assert actual.plan.shape == shape and actual.n_iter.dtype == torch.int32 and actual.converged.dtype == torch.bool


def test_isometric_spaces_are_matched(backend):
    points = torch.linspace(0, 2, 6, dtype=torch.float64).exp().expand(2, 6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    cost = (points.unsqueeze(-1) - points.unsqueeze(-2)).abs()
    result = gromov_wasserstein(cost, cost[:, order][:, :, order], epsilon=0.5, outer_iter=20, inner_iter=100, tol=1e-9, backend=backend)
    assert torch.allclose(result.plan, torch.eye(6).double()[:, order] / 6, atol=1e-9)
    assert (result.gw_cost < 1e-9).all() and result.converged.all() and (result.n_iter < 20).all()


@pytest.mark.parametrize("method", METHODS)
def test_zero_mass_is_as_if_absent(backend, method):
    arguments = spaces(method=method, epsilon=0.3)
    arguments["a"][:, 3] += arguments["a"][:, 0]
    arguments["a"][:, 0] = 0
    x, y = random(3, 7, 4, seed=5) - 0.5, random(3, 5, 4, seed=6) - 0.5
    rest = {k: v[:, 1:] if k in ("a", "cost_xy") else v[:, 1:, 1:] if k == "cost_x" else v for k, v in arguments.items() if k != "alpha"}
    for name, index in (("cost_x", (slice(None), 0)), ("cost_x", (slice(None), slice(None), 0)), ("cost_xy", (slice(None), 0))):
        arguments[name][index] = math.nan  # never read
    x[:, 0] = math.nan
    leaves = [arguments["cost_x"].requires_grad_(), x.requires_grad_()]
    both = gromov_wasserstein(**arguments, backend=backend), gromov_wasserstein(**(rest | {"alpha": 0.6}), backend=backend)
    options = {"method": method, "epsilon": 0.3, "alpha": 0.6, "b": arguments["b"], "backend": backend}
    tokens = gromov_from_tokens(x, y, a=arguments["a"], **options), gromov_from_tokens(x[:, 1:], y, a=rest["a"], **options)
    for whole, part in (both, tokens):
        assert (whole.plan[:, 0] == 0).all() and torch.allclose(whole.plan[:, 1:], part.plan, atol=1e-12)
        assert torch.allclose(whole.gw_cost, part.gw_cost, atol=1e-12)
        whole.gw_cost.sum().backward()
    assert all(leaf.grad.isfinite().all() and (leaf.grad[:, 0] == 0).all() for leaf in leaves)


@pytest.mark.parametrize("method", METHODS)
def test_small_epsilon_is_never_nan(backend, method):
    x, y = (random(4, size, 8, seed=size, dtype=torch.float32) - 0.5 for size in (12, 20))
    for epsilon, slack in ((1e-2, 1e-5), (1e-4, 1e-4), (1e-6, 5e-3)):
        result = gromov_from_tokens(x, y, method=method, epsilon=epsilon, backend=backend)
        assert result.plan.isfinite().all() and result.gw_cost.isfinite().all()
        exact = (result.plan.sum(-2) - 1 / 20) if method == "proximal" else (result.plan.sum(-1) - 1 / 12)
        assert exact.abs().max() < slack  # the marginal that the inner solver meets last


@pytest.mark.parametrize("method", METHODS)
def test_batches(backend, method):
    """Neither batch-mates nor the batch's size (65 536 and more, one) matter, to the bit; threshold_over="batch" is the exception."""
    x, y = random(70_001, 2, 3, dtype=torch.float32) - 0.5, random(70_001, 3, 3, seed=1, dtype=torch.float32) - 0.5
    result = gromov_from_tokens(x, y, method=method, inner_iter=5, backend=backend)
    for part in (slice(70_000, None), slice(65_530, 65_540)):
        for all_of_them, some in zip(result, gromov_from_tokens(x[part], y[part], method=method, inner_iter=5, backend=backend)):
            assert torch.equal(all_of_them[part], some)
    x, y = random(9, 6, 3) - 0.5, random(9, 5, 3, seed=1) - 0.5
    together, alone = (gromov_from_tokens(x[:k], y[:k], threshold_over="batch", backend=backend) for k in (9, 1))
    assert (together.gw_cost[0] - alone.gw_cost[0]).abs() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_tolerance_stops_each_problem_by_itself(backend, method):
    scale = torch.tensor([0.1, 0.2, 0.3]).double()[:, None, None]
    arguments = {"method": method, "epsilon": 0.5, "inner_iter": 200, "backend": backend}
    C, D = random(3, 8, 8) * scale, random(3, 6, 6, seed=2) * scale
    result = gromov_wasserstein(C, D, tol=1e-6, outer_iter=300, **arguments)
    assert len(result.n_iter.unique()) > 1 and (result.n_iter < 300).all()
    assert torch.equal(result.converged, result.marginal_error <= 1e-6) and result.converged.any()
    for i, n_iter in enumerate(result.n_iter.tolist()):
        exactly = gromov_wasserstein(C[i : i + 1], D[i : i + 1], outer_iter=n_iter, **arguments)
        assert torch.allclose(exactly.plan[0], result.plan[i], rtol=0, atol=1e-10)
    short = gromov_wasserstein(C, D, tol=1e-6, outer_iter=1, **arguments)
    assert (short.n_iter == 1).all() and not short.converged.any()


def test_permutation_equivariance_and_layouts(backend):
    arguments = spaces(epsilon=0.3)
    order = torch.tensor([4, 0, 6, 2, 1, 3, 5])
    permuted = arguments | {k: arguments[k][:, order] for k in ("a", "cost_xy")}
    permuted["cost_x"] = arguments["cost_x"][:, order][:, :, order]
    expected = gromov_wasserstein(**arguments, backend=backend)
    assert torch.allclose(gromov_wasserstein(**permuted, backend=backend).plan, expected.plan[:, order], atol=1e-12)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            for layout, same in layouts(value):
                plan = gromov_wasserstein(**(arguments | {name: same}), backend=backend).plan
                assert torch.allclose(plan, expected.plan, rtol=0, atol=1e-13), (name, layout)
    expanded = {k: v[0] if k in "ab" else v[:1].expand(2, -1, -1) if k != "alpha" else v for k, v in spaces().items()}
    assert torch.allclose(gromov_wasserstein(**expanded, epsilon=0.3, backend=backend).plan[1], expected.plan[0], atol=1e-13)


@pytest.mark.parametrize("alpha", (1.0, 0.6))
def test_gradient_is_the_envelope(backend, alpha):
    """Against autograd of the objective, written with its four indices, at the plan that came back."""
    arguments = spaces(epsilon=0.3, alpha=alpha)
    leaves = [(arguments[k] + 0.2 * random(*arguments[k].shape, seed=3)).requires_grad_() for k in ("cost_x", "cost_y", "cost_xy")]
    arguments |= dict(zip(("cost_x", "cost_y", "cost_xy"), leaves))
    result = gromov_wasserstein(**arguments, backend=backend)
    assert not any(t.requires_grad for t in (result.plan, result.marginal_error, result.converged))
    weight = torch.tensor(1.7, dtype=torch.float64).expand(3)  # an expanded incoming gradient
    actual = torch.autograd.grad(result.gw_cost, leaves, weight)
    expected = torch.autograd.grad(objective(leaves[0], leaves[1], result.plan, leaves[2], alpha), leaves, weight)
    assert all(torch.allclose(got, want, atol=1e-12) for got, want in zip(actual, expected))


@pytest.mark.parametrize("over", ("sample", "batch"))
@pytest.mark.parametrize("alpha", (1.0, 0.6))
def test_gradient_of_tokens_is_the_envelope(backend, alpha, over):
    x, y, cost_xy = (t.requires_grad_() for t in (random(3, 6, 4) - 0.5, random(3, 5, 4, seed=1) - 0.5, random(3, 6, 5, seed=2)))
    dims = (-2, -1) if over == "sample" else (-3, -2, -1)
    weight = random(3, 2, seed=3)[:, 0]  # a strided incoming gradient
    for given in (None, cost_xy):
        leaves = (x, y) if given is None else (x, y, cost_xy)
        result = gromov_from_tokens(x, y, cost_xy=given, alpha=alpha, threshold_over=over, backend=backend)
        M = 1 - torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).mT if given is None else given
        value = objective(token_cost(x, over=dims), token_cost(y, over=dims), result.plan, M, alpha)
        assert torch.allclose(result.gw_cost, value, atol=1e-12)
        actual, expected = (torch.autograd.grad(v, leaves, weight) for v in (result.gw_cost, value))
        assert all(torch.allclose(got, want, atol=1e-11) for got, want in zip(actual, expected))
