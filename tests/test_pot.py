"""helo_fast.pot beside POT's own ot.batch: the same calls, values and gradients."""

import inspect
import math

import numpy as np
import pytest
import torch

import helo_fast
from helo_fast.pot import OTResult, solve_batch
from helo_fast.testing import assert_close

ot = pytest.importorskip("ot", reason="POT is not installed: pip install pot")
batch = pytest.importorskip("ot.batch", reason="this POT has no ot.batch: pip install --upgrade pot")

B, N, M_ = 3, 7, 5
EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64, the same iterates


def problem(dtype=torch.float64, grad=False, given=True):
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(B, N, M_, generator=generator, dtype=torch.float64)
    masses = [torch.rand(B, size, generator=generator, dtype=torch.float64) + 0.1 for size in (N, M_)]
    a, b = (mass / mass.sum(-1, keepdim=True) for mass in masses) if given else (None, None)
    return [t if t is None else t.to(dtype).requires_grad_(grad) for t in (cost, a, b)]


def both(name, *arguments, **options):
    return [getattr(module, name)(*arguments, **options) for module in (helo_fast.pot, batch)]


def fields(result):
    names = ("plan", "value", "value_linear", "value_quad", "potential_a", "potential_b")
    return {name: getattr(result, name) for name in names if getattr(result, name) is not None}


def assert_same(ours, theirs, **bounds):
    ours, theirs = fields(ours), fields(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert type(ours[name]) is type(theirs[name])
        torch.testing.assert_close(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name]), **bounds, msg=lambda m, n=name: f"{n}: {m}")


def gradients(value, inputs, seed=1):
    """Of a fixed random functional of a result's field; zeros where nothing depends on an input; None where nothing has a graph."""
    if not value.requires_grad:
        return None
    weight = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=value.dtype)
    return torch.autograd.grad(value, inputs, weight, allow_unused=True, materialize_grads=True, retain_graph=True)


def assert_same_gradients(ours, theirs, inputs, names):
    for name in names:
        own, their = (gradients(getattr(result, name), inputs) for result in (ours, theirs))
        assert (own is None) == (their is None), name
        for mine, its in zip(own or (), their or ()):
            torch.testing.assert_close(mine, its, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ("solve_batch", "solve_gromov_batch"))
def test_signatures_are_pots(name):
    def shape(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    assert shape(getattr(helo_fast.pot, name)) == shape(getattr(batch, name))


def test_result_has_pots_fields():
    for_one_problem = {"a_to_b", "b_to_a", "citation"}
    theirs = {name for name in dir(ot.utils.OTResult) if not name.startswith("_")} - for_one_problem
    result = solve_batch(problem()[0], 0.1)
    assert isinstance(result, OTResult) and theirs <= set(dir(result))
    assert (result.lazy_plan, result.sparse_plan, result.status, result.value_quad) == (None,) * 4
    assert result.marginal_a.shape == (B, N) and result.marginals[1].shape == (B, M_)
    torch.testing.assert_close(result.marginal_a, torch.full_like(result.marginal_a, 1 / N), atol=1e-5, rtol=0)
    assert "plan=Tensor(shape=(3, 7, 5))" in repr(result)


@pytest.mark.parametrize("given", (True, False), ids=("marginals", "uniform"))
@pytest.mark.parametrize("reg_type", ("entropy", "kl"))
@pytest.mark.parametrize("method", ("auto", "log_sinkhorn", "sinkhorn"))
@pytest.mark.parametrize("max_iter", (1, 2, 30))
def test_iterates_are_pots(method, reg_type, given, max_iter):
    cost, a, b = problem(given=given)
    ours, theirs = both("solve_batch", cost, 0.1, a, b, max_iter=max_iter, tol=0, method=method, reg_type=reg_type, grad="detach")
    assert_same(ours, theirs, **EXACT)
    assert ours.log["n_iter"] == theirs.log["n_iter"] == max_iter - 1


@pytest.mark.parametrize("reg_type", ("entropy", "kl"))
@pytest.mark.parametrize("method", ("log_sinkhorn", "sinkhorn"))
@pytest.mark.parametrize("grad", ("detach", "envelope", "autodiff", "last_step"))
@pytest.mark.parametrize("given", (True, False), ids=("marginals", "uniform"))
def test_gradients_are_pots(grad, method, reg_type, given):
    inputs = [t for t in problem(grad=True, given=given) if t is not None]
    ours, theirs = both("solve_batch", inputs[0], 0.1, *inputs[1:], max_iter=7, tol=0, method=method, reg_type=reg_type, grad=grad)
    assert_same(ours, theirs, **EXACT)
    names = ["plan", "value", "value_linear"]
    if grad in ("autodiff", "last_step"):
        names += ["potential_a", "potential_b"]
    assert ours.value.requires_grad == (grad != "detach") and ours.plan.requires_grad == (grad in ("autodiff", "last_step"))
    if grad != "detach":  # POT's "kl" value keeps the graph of a b' even then
        assert_same_gradients(ours, theirs, inputs, names)


def test_implicit_gradients_are_those_of_autodiff_at_convergence():
    inputs = problem(grad=True)
    implicit, autodiff = (solve_batch(inputs[0], 0.2, *inputs[1:], max_iter=400, tol=0, grad=grad) for grad in ("implicit", "autodiff"))
    cost, a, b = inputs
    for name in ("plan", "value", "value_linear"):
        own, other = (gradients(getattr(result, name), inputs) for result in (implicit, autodiff))
        torch.testing.assert_close(own[0], other[0], rtol=1e-6, atol=1e-9)
        for mine, its in zip(own[1:], other[1:]):  # marginals of equal mass: a gradient's constant part is nobody's
            torch.testing.assert_close(mine - mine.mean(-1, keepdim=True), its - its.mean(-1, keepdim=True), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ("numpy", "torch"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_kinds_and_dtypes_at_pots_defaults(kind, dtype):
    arrays = [t.numpy() if kind == "numpy" else t for t in problem(dtype)]
    ours, theirs = both("solve_batch", arrays[0], 0.05, *arrays[1:])
    assert_same(ours, theirs, rtol=0, atol=3e-3)  # potentials are in units of reg
    torch.testing.assert_close(torch.as_tensor(ours.plan), torch.as_tensor(theirs.plan), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.as_tensor(ours.value), torch.as_tensor(theirs.value), rtol=0, atol=1e-5)
    assert ours.log["converged"].all() and (ours.log["marginal_error"] <= 1e-5).all()
    error = np.linalg.norm(np.asarray(ours.marginal_a) - np.asarray(arrays[1]), axis=-1)
    assert (error <= 1e-5 + 1e-7).all()  # POT's own criterion


@pytest.mark.parametrize("given", (True, False), ids=("marginals", "uniform"))
@pytest.mark.parametrize("reg_type", ("entropy", "kl"))
@pytest.mark.parametrize("reg", (1e-3, 1e-2, 1.0, 100.0))
def test_float32_is_as_accurate_as_pots(reg, reg_type, given):
    arguments, options = problem(given=given), {"max_iter": 100, "tol": 0, "reg_type": reg_type}
    exact = batch.solve_batch(arguments[0], reg, *arguments[1:], **options)
    ours, theirs = both("solve_batch", *(arguments[0].float(), reg), *(t if t is None else t.float() for t in arguments[1:]), **options)
    for name in ("plan", "value", "value_linear"):
        assert_close(getattr(ours, name), getattr(exact, name), getattr(theirs, name), what=name)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_halves_are_solved_in_float32(dtype):
    cost, a, b = problem(dtype)
    result = solve_batch(cost, 0.1, a, b)
    exact = solve_batch(cost.double(), 0.1, a.double(), b.double() * a.double().sum(-1, keepdim=True) / b.double().sum(-1, keepdim=True))
    assert result.plan.dtype == result.value.dtype == result.potential_a.dtype == dtype
    torch.testing.assert_close(result.plan.double(), exact.plan, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_mixed_precisions_promote_as_in_pot():
    cost, a, b = problem()
    ours, theirs = both("solve_batch", cost.float(), 0.1, a, b, max_iter=5, tol=0)
    assert ours.plan.dtype == theirs.plan.dtype == torch.float64
    torch.testing.assert_close(ours.plan, theirs.plan, rtol=0, atol=1e-6)  # POT divides M by reg in float32


def test_marginals_broadcast_and_numpy_views_are_read():
    cost, a, b = (t.numpy() for t in problem())
    a, b = a[0], b[:1]
    full = solve_batch(cost, 0.1, np.repeat(a[None], B, 0), np.repeat(b, B, 0))
    np.testing.assert_array_equal(solve_batch(cost, 0.1, a, b).plan, full.plan)
    shared, theirs = both("solve_batch", cost[:1], 0.1, np.repeat(a[None], B, 0), problem()[2].numpy(), max_iter=9, tol=0)
    assert_same(shared, theirs, **EXACT)
    views = [np.broadcast_to(t, (B, *t.shape[-1:])) for t in (a, b)]
    flipped = solve_batch(cost[:, ::-1], 0.1, views[0][:, ::-1], views[1])
    np.testing.assert_allclose(flipped.plan[:, ::-1], full.plan, atol=1e-12)


def test_zero_mass_and_empty_batches():
    cost, a, b = problem()
    a[0, 0], b[1, 2] = 0, 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    for reg_type in ("entropy", "kl"):
        inputs = [t.clone().requires_grad_() for t in (cost, a, b)]
        for grad in ("envelope", "autodiff", "last_step", "implicit"):
            result = solve_batch(inputs[0], 0.1, *inputs[1:], max_iter=40, tol=0, reg_type=reg_type, grad=grad)
            assert result.plan[0, 0].abs().max() == 0 and result.plan[1, :, 2].abs().max() == 0
            assert result.potential_a[0, 0] == -math.inf and result.value.isfinite().all()
            found = torch.autograd.grad(result.value.sum(), inputs, allow_unused=True)
            assert all(grad is None or grad.isfinite().all() for grad in found)
    empty = solve_batch(cost[:0], 0.1, a[:0], b[:0])
    assert empty.plan.shape == (0, N, M_) and empty.value.shape == (0,)


def test_back_ends_are_chosen_as_everywhere():
    cost = problem(torch.float32)[0]
    with helo_fast.backend("eager"):
        plain = solve_batch(cost, 0.1, tol=0, max_iter=20)
    torch.testing.assert_close(solve_batch(cost, 0.1, tol=0, max_iter=20).plan, plain.plan, rtol=0, atol=1e-6)
    with helo_fast.backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was asked for and cannot serve"):
        solve_batch(cost, 0.1)


COST, A, BB = problem()
BAD = {
    "proximal": ({"method": "proximal"}, ValueError, "method is 'proximal'.*ot.batch.solve_batch"),
    "no reg": ({"reg": None}, ValueError, "reg None.*give reg > 0"),
    "zero reg": ({"reg": 0.0}, ValueError, "reg 0.0"),
    "negative reg": ({"reg": -1.0}, ValueError, "reg must be a finite number above 0"),
    "reg per problem": ({"reg": torch.ones(B)}, TypeError, "reg must be one number"),
    "method": ({"method": "greenkhorn"}, ValueError, "method must be one of"),
    "reg_type": ({"reg_type": "l2"}, ValueError, "reg_type must be one of 'kl', 'entropy'"),
    "grad": ({"grad": "exact"}, ValueError, "grad must be one of"),
    "max_iter": ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
    "tol": ({"tol": "small"}, TypeError, "tol must be one number"),
    "two dimensions": ({"M": COST[0]}, ValueError, r"M must be \[B, n, m\]"),
    "no columns": ({"M": COST[:, :, :0], "b": None}, ValueError, "M is empty"),
    "a list": ({"M": COST.tolist()}, TypeError, "M must be a NumPy array or a tensor, got list"),
    "mixed kinds": ({"a": A.numpy()}, TypeError, "a is a ndarray but M a Tensor"),
    "integers": ({"M": (9 * COST).long()}, TypeError, "M must be a floating tensor"),
    "NumPy integers": ({"M": (9 * COST.numpy()).astype(int), "a": None, "b": None}, TypeError, "M must be float16, float32 or float64"),
    "shape of a": ({"a": A[:, :-1]}, ValueError, r"a must be \[3, 7\], \[1, 7\] or \[7\], got \[3, 6\]"),
    "negative": ({"b": -BB}, ValueError, "b must be finite and non-negative"),
    "unequal mass": ({"a": 2 * A}, ValueError, "a and b must have equal mass"),
}


@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(changes, error, message):
    arguments = {"M": COST, "reg": 0.1, "a": A, "b": BB} | changes
    with pytest.raises(error, match=f"solve_batch: .*{message}|solve_batch: {message}"):
        solve_batch(**arguments)
