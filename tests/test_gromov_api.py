"""gromov_wasserstein and gromov_from_tokens: torch.library contracts, compile, autocast, and the errors of bad input."""

import math
import re

import pytest
import torch

import helo_fast
from helo_fast import _registry, gromov_from_tokens, gromov_wasserstein

SOLVER = ("proximal", 0.2, 2, 3, None)


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_second_derivatives_are_refused():
    for function in (gromov_wasserstein, gromov_from_tokens):
        leaf = random(2, 4, 4).requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf, random(2, 4, 4, seed=1)).gw_cost.sum(), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match=f"{function.__name__} has no second derivative"):
            gradient.sum().backward()


@pytest.mark.parametrize("backend", ("eager", "cpp"))
@pytest.mark.parametrize("fused", (False, True))
def test_opcheck(device_for, backend, fused):
    device_for("gromov", backend)
    ops = torch.ops.helo_fast
    C, D, M, x, y = (random(2, *s, seed=i).requires_grad_() for i, s in enumerate(((4, 4), (3, 3), (4, 3), (4, 6), (3, 6))))
    a, b, plan, grad = torch.full((2, 4), 0.25).double(), torch.full((3,), 1 / 3).double().expand(2, 3), random(2, 4, 3) / 12, random(2)
    M = M if fused else None
    solver = (0.6 if fused else 1.0, *SOLVER, backend)
    torch.library.opcheck(ops.gromov_wasserstein_fwd.default, (C, D, a, b, M, *solver))
    torch.library.opcheck(ops.gromov_from_tokens_fwd.default, (x, y, a, b, M, 0.1, fused, *solver))
    C, D, x, y = (t.detach() for t in (C, D, x, y))
    torch.library.opcheck(ops.gromov_wasserstein_bwd.default, (C, D, plan, grad, 0.6, fused, backend))
    torch.library.opcheck(ops.gromov_from_tokens_bwd.default, (x, y, a, b, plan, grad, 0.1, True, 0.6, fused, backend))


@pytest.mark.parametrize("function", (gromov_wasserstein, gromov_from_tokens))
def test_compiles_to_one_graph(function):
    def loss(x, y, cost_xy, a):
        result = function(x, y, a=a, cost_xy=cost_xy, alpha=0.5, tol=1e-3)
        return result.gw_cost.sum(), result.plan

    leaves = [random(2, 5, 5, seed=i).float().requires_grad_() for i in range(3)]
    a = torch.full((5,), 0.2)
    value, plan = loss(*leaves, a)
    compiled_value, compiled_plan = torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves, a)
    assert torch.equal(plan, compiled_plan)
    for got, want in zip(torch.autograd.grad(compiled_value, leaves), torch.autograd.grad(value, leaves)):
        assert torch.allclose(got, want, atol=1e-7)


def test_autocast_does_not_reach_inside():
    x, y = torch.randn(2, 6, 8), torch.randn(2, 5, 8)
    expected = gromov_from_tokens(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gromov_from_tokens(x, y).plan, expected.plan)


def test_a_back_end_that_cannot_serve_says_why():
    x = torch.rand(1, 3, 2)
    reasons = {name: _registry._refusal("gromov", name, x) for name in ("cpp", "triton", "cuda")}
    assert reasons["cuda"] is not None  # the tensor lies on the CPU
    for name, reason in reasons.items():
        if reason is not None:
            message = re.escape(f"gromov: back end '{name}' was asked for and cannot serve: {reason}")
            with pytest.raises(RuntimeError, match=message):
                gromov_from_tokens(x, x, backend=name)
            with pytest.raises(RuntimeError, match=message), helo_fast.backend(name):
                gromov_wasserstein(x @ x.mT, x @ x.mT)


COST, COST_Y, ACROSS = torch.ones(2, 4, 4), torch.ones(2, 3, 3), torch.ones(2, 4, 3)
UNIFORM = torch.full((2, 4), 0.25)
WRONG = (
    ({"cost_x": [[1.0]]}, TypeError, "cost_x must be a tensor .*got list; use torch.as_tensor"),
    ({"cost_x": COST.int()}, TypeError, "cost_x must be float32.*got torch.int32; use cost_x.float"),
    ({"cost_x": COST[0]}, ValueError, r"cost_x must be \[B, n, n\], got \[4, 4\]; reshape"),
    ({"cost_x": ACROSS}, ValueError, r"cost_x must be square.*got \[2, 4, 3\]; a cost across goes to cost_xy"),
    ({"cost_x": COST[:, :0, :0]}, ValueError, "cost_x is empty.*n must be at least 1"),
    ({"cost_y": COST_Y[:1]}, ValueError, r"cost_y must be of cost_x's batch size, here \[2, 3, 3\], got \[1, 3, 3\]"),
    ({"cost_y": COST_Y.double()}, TypeError, "cost_y is torch.float64 but cost_x is torch.float32; use cost_y.to"),
    ({"cost_y": COST_Y.to("meta")}, ValueError, "cost_y is on meta but cost_x on cpu; use cost_y.to"),
    ({"cost_xy": ACROSS.mT, "alpha": 0.5}, ValueError, r"cost_xy must be \[B, n, m\], here \[2, 4, 3\], got \[2, 3, 4\]"),
    ({"cost_xy": ACROSS.double(), "alpha": 0.5}, TypeError, "cost_xy is torch.float64"),
    ({"alpha": 0.5}, ValueError, r"alpha is 0.5 but cost_xy is None; give cost_xy \[B, n, m\], or alpha=1"),
    ({"alpha": 1.5}, ValueError, r"alpha must be a number in \[0, 1\], got 1.5; clip"),
    ({"method": "exact"}, ValueError, "method must be one of 'proximal', 'entropic', got 'exact'"),
    ({"epsilon": 0.0}, ValueError, "epsilon must be a finite number above 0, got 0.0; it is in squared units of cost_x"),
    ({"outer_iter": 0}, ValueError, "outer_iter must be at least 1, got 0"),
    ({"inner_iter": 2.5}, TypeError, "inner_iter must be an int, got 2.5"),
    ({"tol": -1.0}, ValueError, "tol must be a finite number above 0, got -1.0; None runs outer_iter"),
    ({"a": UNIFORM[:, :3]}, ValueError, r"a must be \[B, n\] or \[n\], here \[2, 4\] or \[4\], got \[2, 3\]"),
    ({"a": UNIFORM.double()}, TypeError, "a is torch.float64 but cost_x is torch.float32"),
    ({"a": -UNIFORM}, ValueError, r"a must be finite and non-negative, entry \[0, 0\] is -0.25"),
    ({"a": UNIFORM * math.nan}, ValueError, "a must be finite and non-negative"),
    ({"a": 2 * UNIFORM}, ValueError, "a and b must have equal mass, problem 0 has 2 and 1; divide each by its sum"),
    ({"backend": "fast"}, ValueError, "unknown back end 'fast'"),
)
TOKENS_WRONG = (
    ({"x": ACROSS[:, :0]}, ValueError, r"x is empty, got \[2, 0, 3\]; n and D must be at least 1"),
    ({"y": ACROSS[:, :, :2]}, ValueError, r"y must be of x's batch size and D, here \[2, 4, 3\], got \[2, 4, 2\]"),
    ({"y": ACROSS.half()}, TypeError, "y is torch.float16 but x is torch.float32"),
    ({"threshold": -0.1}, ValueError, r"threshold must be a number in \[0, 1\], got -0.1"),
    ({"threshold_over": "all"}, ValueError, "threshold_over must be one of 'sample', 'batch', got 'all'"),
    ({"b": 3 * UNIFORM}, ValueError, "a and b must have equal mass, problem 0 has 1 and 3"),
    ({"method": 3}, ValueError, "method must be one of"),
)


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=lambda v: next(iter(v)) if isinstance(v, dict) else None)
def test_errors(change, error, message):
    with pytest.raises(error, match=f"{'' if 'backend' in change else 'gromov_wasserstein: '}{message}"):
        gromov_wasserstein(**({"cost_x": COST, "cost_y": COST_Y} | change))


@pytest.mark.parametrize(("change", "error", "message"), TOKENS_WRONG, ids=lambda v: next(iter(v)) if isinstance(v, dict) else None)
def test_errors_of_tokens(change, error, message):
    with pytest.raises(error, match=f"gromov_from_tokens: {message}"):
        gromov_from_tokens(**({"x": ACROSS, "y": ACROSS} | change))
