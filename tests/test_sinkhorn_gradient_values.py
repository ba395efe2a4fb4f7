"""sinkhorn's native gradients: against the eager float64 reference, every case, dtype, incoming gradient and layout."""

import pytest
import torch

from helo_fast import sinkhorn
from helo_fast.testing import SINKHORN_CASES, _problem, assert_close, layouts

BACKENDS = ("cpp",)
OUTPUTS = ("plan", "f", "g", "transport_cost")
INCOMING = (*((name,) for name in OUTPUTS), ("plan", "transport_cost"), OUTPUTS)
# The plan falls apart into pieces without a link that double precision sees: how the pieces' potentials move is then rounding.
FALLS_APART = ("tiny_epsilon", "large_cost")
SMALL_EPSILON = {
    "small_epsilon": _problem(3, 36, 36, epsilon=0.02, max_iter=250),
    "small_epsilon_wide": _problem(3, 20, 33, epsilon=0.02, max_iter=250, marginals=True),
}
CASES = {**SINKHORN_CASES, **SMALL_EPSILON}
LARGE = {  # solved by conjugate gradients
    "square": _problem(1, 600, 600, max_iter=60),
    "tall": _problem(2, 330, 280, max_iter=200, epsilon=0.05, marginals=True),
    "wide": _problem(2, 280, 330, max_iter=200, epsilon=0.05, marginals=True),
    "small_epsilon": _problem(1, 300, 300, max_iter=300, epsilon=0.01),
    "unbalanced": _problem(1, 270, 300, max_iter=50, tau_a=0.5, tau_b=2.0),
}


def exactly(arguments):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}


def incoming_gradient(output):
    """The same numbers for every dtype."""
    generator = torch.Generator().manual_seed(output.dim())
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)


def gradients_of_each(arguments, incoming, gradient, backend, layout=lambda tensor: tensor):
    """For each tuple of names in incoming, gradients of (cost, a, b), those given, with random ones arriving at the outputs named."""
    leaves = {k: v.clone().requires_grad_() for k, v in arguments.items() if k in ("cost", "a", "b")}
    result = sinkhorn(**{**arguments, **leaves}, gradient=gradient, backend=backend)
    found = []
    for names in incoming:
        outputs = [getattr(result, name) for name in names]
        arriving = [layout(incoming_gradient(output)) for output in outputs]
        found.append(torch.autograd.grad(outputs, list(leaves.values()), arriving, retain_graph=True))
    return found


def gradients(arguments, names, gradient, backend, layout=lambda tensor: tensor):
    return gradients_of_each(arguments, [names], gradient, backend, layout)[0]


def check(arguments, incoming, gradient, backend, what):
    actual, exact = (gradients_of_each(a, incoming, gradient, b) for a, b in ((arguments, backend), (exactly(arguments), "eager")))
    double = arguments["cost"].dtype == torch.float64  # the eager gradients are then the exact ones
    eager = exact if double else gradients_of_each(arguments, incoming, gradient, "eager")
    for names, *each in zip(incoming, actual, exact, eager):
        for leaf, ours, truth, theirs in zip(("cost", "a", "b"), *each):
            assert_close(ours, truth, theirs, f"{what} d {'+'.join(names)} / d {leaf}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gradient", ("implicit", "unrolled"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend, gradient, case, dtype, device_for):
    arguments = CASES[case](dtype, device_for("sinkhorn", backend))
    of_plan_alone = gradient == "implicit" and case in FALLS_APART
    incoming = [names for names in INCOMING if not (of_plan_alone and {"f", "g"} & set(names))]
    check(arguments, incoming, gradient, backend, case)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_problems(backend, case, dtype, device_for):
    check(LARGE[case](dtype, device_for("sinkhorn", backend)), [OUTPUTS], "implicit", backend, case)


@pytest.mark.parametrize("backend", ("eager", *BACKENDS))
def test_a_batch_of_large_problems_is_solved_as_each_alone(backend, device_for):
    """Also after the number of threads was set, which breaks torch's own solver of batches."""
    arguments = LARGE["tall"](torch.float64, device_for("sinkhorn", backend))
    torch.set_num_threads(torch.get_num_threads())
    together = gradients(arguments, ("plan",), "implicit", backend)
    grad = incoming_gradient(arguments["cost"])
    for i in range(len(grad)):
        leaf = arguments["cost"][i].clone().requires_grad_()
        plan = sinkhorn(**{**arguments, "cost": leaf, "a": arguments["a"][i], "b": arguments["b"][i]}, backend=backend).plan
        assert torch.allclose(torch.autograd.grad(plan, leaf, grad[i])[0], together[0][i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("last", (False, True))
def test_tiny_masses_get_the_gradient_of_the_converged_iterations(backend, transposed, last, device_for):
    """Relative to its mass, the gradient of a row or column of next to none is as exact as that of any other."""
    generator = torch.Generator().manual_seed(2)
    cost, weight = torch.rand(1, 9, 7, generator=generator).double(), torch.randn(1, 9, 7, generator=generator).double()
    masses = [torch.rand(size, generator=generator).double() for size in (9, 7)]
    for mass in masses:
        mass[-1 if last else 0] = 1e-12
        mass /= mass.sum()
    if transposed:
        cost, weight, masses = cost.mT.contiguous(), weight.mT.contiguous(), masses[::-1]
    device_for("sinkhorn", backend)
    found = []
    for gradient, name in (("implicit", backend), ("unrolled", "eager")):
        leaf = cost.clone().requires_grad_()
        plan = sinkhorn(leaf, *masses, epsilon=0.3, max_iter=600, gradient=gradient, backend=name).plan
        found.append(torch.autograd.grad(plan, leaf, weight)[0] / plan.detach())
    assert (found[0] - found[1]).abs().max() < 1e-9 * found[1].abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ("implicit", "unrolled"))
def test_layouts_of_costs_and_incoming_gradients(backend, gradient, device_for):
    arguments = SINKHORN_CASES["rectangular"](torch.float32, device_for("sinkhorn", backend))
    expected = gradients(arguments, OUTPUTS, gradient, backend)
    for number in range(3):  # contiguous, strided and offset; transposed exists for matrices alone

        def layout(tensor, number=number):
            found = [t for name, t in layouts(tensor) if name != "transposed"]
            return found[number]

        for ours, theirs in zip(gradients(arguments, OUTPUTS, gradient, backend, layout), expected):
            assert torch.equal(ours, theirs)
    for name, cost in layouts(arguments["cost"]):
        result = sinkhorn(cost.requires_grad_(), arguments["a"], arguments["b"], gradient=gradient, backend=backend)
        ours = torch.autograd.grad([getattr(result, k) for k in OUTPUTS], cost, [incoming_gradient(getattr(result, k)) for k in OUTPUTS])
        assert torch.equal(ours[0], expected[0]), name
    leaf = arguments["cost"].clone().requires_grad_()
    plan = sinkhorn(leaf, gradient=gradient, backend=backend).plan
    ones = torch.ones(3, 21, 8)
    for grad in (torch.ones(()).expand(3, 8, 21), ones.mT):
        assert torch.equal(
            torch.autograd.grad(plan, leaf, grad, retain_graph=True)[0],
            torch.autograd.grad(plan, leaf, grad.contiguous(), retain_graph=True)[0],
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ("implicit", "unrolled"))
@pytest.mark.parametrize("case", ("until_tolerance", "zero_mass", "unbalanced"))
def test_batch_mates_and_threads_do_not_matter(backend, gradient, case, device_for):
    arguments = SINKHORN_CASES[case](torch.float32, device_for("sinkhorn", backend))
    leaf = arguments.pop("cost").requires_grad_()
    threads = torch.get_num_threads()
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            plan = sinkhorn(leaf.repeat(40, 1, 1), **{k: v.repeat(40, 1) if k in "ab" else v for k, v in arguments.items()},
                            gradient=gradient, backend=backend).plan  # fmt: skip
            found.append(torch.autograd.grad(plan, leaf, incoming_gradient(plan))[0])
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(*found)
    together = sinkhorn(leaf, **arguments, gradient=gradient, backend=backend).plan
    grad = incoming_gradient(together)
    expected = torch.autograd.grad(together, leaf, grad)[0]
    for i in range(len(leaf)):
        alone = leaf[i].detach().requires_grad_()
        plan = sinkhorn(alone, **{k: v[i] if k in "ab" else v for k, v in arguments.items()}, gradient=gradient, backend=backend).plan
        assert torch.equal(torch.autograd.grad(plan, alone, grad[i])[0], expected[i])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ("implicit", "unrolled"))
def test_batch_beyond_65535(backend, gradient, device_for):
    device_for("sinkhorn", backend)
    cost = torch.rand(70_001, 2, 3, generator=torch.Generator().manual_seed(1))
    grads = []
    for leaf, name in ((cost, backend), (cost[-2:], "eager")):
        leaf = leaf.clone().requires_grad_()
        plan = sinkhorn(leaf, max_iter=20, gradient=gradient, backend=name).plan
        grads.append(torch.autograd.grad(plan[-2:].square().sum(), leaf)[0])
    assert torch.allclose(grads[0][-2:], grads[1], atol=1e-6) and (grads[0][:-2] == 0).all() and (grads[1] != 0).any()
