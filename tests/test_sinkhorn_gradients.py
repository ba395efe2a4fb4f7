"""sinkhorn: gradients, torch.library contracts, compile, and the errors of bad input."""

import numpy
import pytest
import torch

import helo_fast
from helo_fast import sinkhorn
from helo_fast.testing import SINKHORN_CASES

BACKENDS = ("eager", "cpp")
TAUS = ((None, None), (1.0, None), (None, 0.5), (0.7, 2.0))


def free_of_constant(potential):
    """Balanced potentials are defined up to a constant: compare what is left without it."""
    return potential - potential.mean(-1, keepdim=True)


def solve(cost, logits_a, logits_b, gradient, tau_a, tau_b, backend, max_iter):
    result = sinkhorn(
        cost, logits_a.softmax(-1), logits_b.softmax(-1), epsilon=0.6, max_iter=max_iter, gradient=gradient, tau_a=tau_a, tau_b=tau_b,
        backend=backend,
    )  # fmt: skip
    balanced = gradient == "implicit" and tau_a is None and tau_b is None
    f, g = (free_of_constant(result.f), free_of_constant(result.g)) if balanced else (result.f, result.g)
    return result.plan, f, g, result.transport_cost


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("gradient", "max_iter"), (("implicit", 150), ("unrolled", 6)))
@pytest.mark.parametrize("taus", TAUS, ids=str)
@pytest.mark.parametrize("shape", ((5, 4), (3, 6)), ids=str)
def test_gradcheck(backend, gradient, max_iter, taus, shape, device_for):
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.rand(2, *size, dtype=torch.float64, generator=generator) for size in (shape, shape[:1], shape[1:])]
    device_for("sinkhorn", backend)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: solve(*x, gradient, *taus, backend, max_iter), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_implicit_is_the_limit_of_unrolled_and_of_autograd(backend, device_for):
    arguments = SINKHORN_CASES["rectangular"](torch.float64)
    cost, weight = arguments["cost"], torch.randn(3, 8, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    device_for("sinkhorn", backend)
    gradients = []
    for gradient in ("implicit", "unrolled"):
        leaf = cost.clone().requires_grad_()
        result = sinkhorn(leaf, arguments["a"], arguments["b"], epsilon=0.3, max_iter=800, gradient=gradient, backend=backend)
        (result.plan * weight).sum().backward()
        gradients.append(leaf.grad)
    leaf = cost.clone().requires_grad_()  # autograd through a log-domain loop written out here
    f, g = torch.zeros_like(arguments["a"]), None
    for _ in range(800):
        g = -0.3 * torch.logsumexp(arguments["a"].log()[..., None] + (f[..., None] - leaf) / 0.3, -2)
        f = -0.3 * torch.logsumexp(arguments["b"].log()[:, None] + (g[:, None] - leaf) / 0.3, -1)
    plan = arguments["a"][..., None] * arguments["b"][:, None] * torch.exp((f[..., None] + g[:, None] - leaf) / 0.3)
    (plan * weight).sum().backward()
    assert torch.allclose(gradients[0], leaf.grad, atol=1e-9)
    assert torch.allclose(gradients[1], leaf.grad, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_envelope_and_none(backend, device_for):
    cost = torch.rand(3, 5, 4, dtype=torch.float64, requires_grad=True)
    device_for("sinkhorn", backend)
    result = sinkhorn(cost, gradient="envelope", backend=backend)
    assert not result.plan.requires_grad and not result.f.requires_grad
    result.transport_cost.sum().backward()
    assert torch.equal(cost.grad, result.plan)
    assert not any(t.requires_grad for t in sinkhorn(cost, gradient="none", backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ("implicit", "unrolled"))
@pytest.mark.parametrize("case", ("zero_mass", "ragged", "tiny_epsilon", "unbalanced_tiny_epsilon", "single_row", "one_by_one"))
def test_gradients_stay_finite_and_zero_outside_the_mass(backend, gradient, case, device_for):
    device_for("sinkhorn", backend)
    arguments = SINKHORN_CASES[case](torch.float32)
    cost = arguments.pop("cost").requires_grad_()
    masses = [arguments[k].requires_grad_() for k in ("a", "b") if k in arguments]
    result = sinkhorn(cost, **arguments, gradient=gradient, backend=backend)
    (result.plan * torch.arange(result.plan.shape[-1])).sum().add(result.transport_cost.sum()).backward()
    for leaf in (cost, *masses):
        assert leaf.grad.isfinite().all()
    assert (cost.grad[result.plan == 0] == 0).all() or case.endswith("tiny_epsilon")
    if case == "zero_mass":
        assert masses[0].grad[0, 2] == 0 and masses[1].grad[1, 4] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_implicit_gradient_is_accurate_at_small_epsilon(backend, device_for):
    device_for("sinkhorn", backend)
    arguments = SINKHORN_CASES["square"](torch.float64)
    grads, weight = [], torch.randn(36, 36, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float64, torch.float32):
        cost = arguments["cost"].detach().to(dtype, copy=True).requires_grad_()
        (sinkhorn(cost, epsilon=0.02, max_iter=2000, backend=backend).plan * weight.to(dtype)).sum().backward()
        grads.append(cost.grad.double())
    assert (grads[0] - grads[1]).abs().max() < 2e-3 * grads[0].abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_incoming_gradients_of_any_layout(backend, device_for):
    device_for("sinkhorn", backend)
    cost = torch.rand(3, 6, 5, dtype=torch.float64, requires_grad=True)
    result = sinkhorn(cost, max_iter=500, backend=backend)
    expanded = torch.autograd.grad(result.plan, cost, torch.ones(1, 1, 1).double().expand(3, 6, 5), retain_graph=True)[0]
    dense = torch.autograd.grad(result.plan, cost, torch.ones(3, 6, 5).double(), retain_graph=True)[0]
    assert torch.equal(expanded, dense) and expanded.abs().max() < 1e-10  # the total mass cannot change
    poisoned = torch.full((3, 6, 10), float("nan"), dtype=torch.float64)
    poisoned[..., ::2] = 1
    assert torch.equal(torch.autograd.grad(result.plan, cost, poisoned[..., ::2])[0], dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend, device_for):
    device_for("sinkhorn", backend)
    for gradient in ("implicit", "unrolled"):
        cost = torch.rand(1, 3, 3, dtype=torch.float64, requires_grad=True)
        first = torch.autograd.grad((sinkhorn(cost, gradient=gradient, backend=backend).plan ** 2).sum(), cost, create_graph=True)[0]
        with pytest.raises(NotImplementedError, match="sinkhorn has no second derivative"):
            first.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("gradient", ("implicit", "unrolled", "envelope"))
def test_opcheck(gradient, dtype, backend, device_for):
    device_for("sinkhorn", backend)
    cost = torch.rand(2, 4, 3, dtype=dtype, requires_grad=True)
    a, b = torch.full((2, 4), 0.25, dtype=dtype), torch.full((2, 3), 1 / 3, dtype=dtype)
    torch.library.opcheck(torch.ops.helo_fast.sinkhorn_fwd.default, (cost, a, b, 0.1, 5, 1e-3, 2, None, None, gradient, backend))
    options = (0.1, 5, None, 2, None, None, "unrolled", backend)
    plan, f, g, _, _, n_iter, _, history = torch.ops.helo_fast.sinkhorn_fwd(cost.detach(), a, b, *options)
    grads = (torch.rand_like(plan), torch.rand_like(f), None, torch.rand(2, dtype=dtype), 0.1, None, 0.5, backend)
    torch.library.opcheck(torch.ops.helo_fast.sinkhorn_implicit_bwd.default, (cost.detach(), a, b, plan, *grads))
    torch.library.opcheck(torch.ops.helo_fast.sinkhorn_unrolled_bwd.default, (cost.detach(), a, b, plan, history, n_iter, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ("implicit", "unrolled"))
def test_compiles_to_one_graph(backend, gradient, device_for):
    device_for("sinkhorn", backend)

    def loss(cost, a):
        result = sinkhorn(cost, a, tol=1e-3, epsilon=0.2, gradient=gradient, backend=backend)
        return result.plan.square().sum() + result.f.sum() + result.converged.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (3, 5, 8):
        cost, a = torch.rand(batch, 6, 4, requires_grad=True), torch.full((6,), 1 / 6)
        expected = torch.autograd.grad(loss(cost, a), cost)[0]
        assert torch.allclose(torch.autograd.grad(compiled(cost, a), cost)[0], expected, atol=1e-6)


def test_autocast_solves_in_float32():
    cost = torch.rand(2, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = sinkhorn(cost)
    assert result.plan.dtype == torch.float32 and torch.equal(result.plan, sinkhorn(cost).plan)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    (
        (TypeError, "cost must be a tensor", lambda c: sinkhorn([[1.0]])),
        (TypeError, r"cost must be float32.*cost.float\(\)", lambda c: sinkhorn(c.long())),
        (ValueError, r"cost must be \[B, n, m\] or \[n, m\], got \[4\]", lambda c: sinkhorn(c[0, 0])),
        (ValueError, "cost has no rows", lambda c: sinkhorn(c[:, :0])),
        (ValueError, "cost has no columns", lambda c: sinkhorn(c[..., :0])),
        (ValueError, "epsilon must be a finite number above 0, got 0", lambda c: sinkhorn(c, epsilon=0)),
        (ValueError, "epsilon", lambda c: sinkhorn(c, epsilon=float("nan"))),
        (ValueError, "max_iter must be at least 1", lambda c: sinkhorn(c, max_iter=0)),
        (TypeError, "max_iter must be an int", lambda c: sinkhorn(c, max_iter=2.5)),
        (ValueError, "tol must be", lambda c: sinkhorn(c, tol=-1)),
        (ValueError, "tau_a must be", lambda c: sinkhorn(c, tau_a=-0.1)),
        (ValueError, "gradient must be one of 'implicit'", lambda c: sinkhorn(c, gradient="exact")),
        (ValueError, r"a must be .*got \[3\]", lambda c: sinkhorn(c, torch.rand(3))),
        (TypeError, "a is torch.float64 but cost is torch.float32", lambda c: sinkhorn(c, torch.rand(5).double())),
        (ValueError, r"a must be finite and non-negative, entry \[0, 1\]", lambda c: sinkhorn(c, torch.tensor([0.5, -0.1, 0.2, 0.2, 0.2]))),
        (ValueError, "b must be finite", lambda c: sinkhorn(c, b=torch.full((4,), float("nan")))),
        (ValueError, "equal mass, problem 0 has 2.5 and 1", lambda c: sinkhorn(c, torch.full((5,), 0.5))),
        (TypeError, "n_rows must be an integer tensor", lambda c: sinkhorn(c, n_rows=[5, 5])),
        (TypeError, r"got torch.complex64; use n_rows.long\(\)", lambda c: sinkhorn(c, n_rows=torch.ones(2, dtype=torch.complex64))),
        (TypeError, r"cost must be a dense tensor, got sparse_coo; use cost.to_dense\(\)", lambda c: sinkhorn(c.to_sparse())),
        (TypeError, "cost must be a dense tensor, got a nested tensor", lambda c: sinkhorn(torch.nested.nested_tensor([c[0], c[1, :3]]))),
        (ValueError, r"backend: unknown back end \['cpp'\]", lambda c: sinkhorn(c, backend=["cpp"])),
        (ValueError, r"n_cols must lie in 1..4, got 9", lambda c: sinkhorn(c, n_cols=torch.tensor([9, 1]))),
        (ValueError, r"n_rows must be .*\[2\], got \[3\]", lambda c: sinkhorn(c, n_rows=torch.tensor([1, 1, 1]))),
    ),
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.rand(2, 5, 4))


def test_numbers_may_be_numpys():
    cost = torch.rand(2, 5, 4)
    assert torch.equal(sinkhorn(cost, epsilon=numpy.float32(0.5)).plan, sinkhorn(cost, epsilon=0.5).plan)


def test_unequal_mass_is_allowed_when_unbalanced_and_checks_is_a_context():
    assert sinkhorn(torch.rand(2, 3, 3), torch.rand(3), tau_a=1.0).plan.isfinite().all()
    with helo_fast.checks(True):
        pass
