"""sinkhorn's Triton kernels: values on a GPU or, in a process of its own, under Triton's interpreter (see test_triton.py)."""

import itertools

import pytest
import torch

from helo_fast import sinkhorn
from helo_fast.testing import SINKHORN_CASES, _problem, assert_close, hard_cost, hard_masses, layouts, poisoned_memory

DTYPES = (torch.float32, torch.float64)
VALUES = ("plan", "f", "g", "transport_cost", "marginal_error")
LARGE = {  # beyond the registers of one program
    "tall_and_large": _problem(2, 150, 140, max_iter=6, marginals=True),
    "wide": _problem(1, 9, 300, max_iter=4, marginals=True),
    "wide_until_tolerance": _problem(2, 70, 150, max_iter=40, tol=1e-2, tau_a=0.5),
}
SMALL = {  # of several problems to a program; 21 are no whole number of programs
    "several_programs": _problem(21, 8, 6, epsilon=0.03, max_iter=60, tol=1e-3, marginals=True),
    "several_programs_tiny_epsilon": _problem(5, 7, 8, epsilon=2e-4, max_iter=40),
}
CASES = {**SINKHORN_CASES, **LARGE, **SMALL}
STREAMED = [  # (kernel, case, dtype); stripes, float32 alone, make the same passes as rows
    *itertools.product(("rows", "stream"), ("rectangular", "tiny_epsilon", "unbalanced_tiny_epsilon", "zero_mass", "ragged"), DTYPES),
    *itertools.product(("stripes",), ("unbalanced_tiny_epsilon", "ragged"), DTYPES[:1]),
]
PACKED = [  # (case, dtype)
    *itertools.product((*SMALL, "single_row", "single_column", "one_by_one", "zero_mass"), DTYPES),
    *itertools.product(("tiny_epsilon", "large_epsilon", "large_cost", "one_iteration", "ragged"), DTYPES[:1]),
]


@pytest.fixture
def packed(monkeypatch):
    """Problems are solved several to a program, however few."""
    from helo_fast.kernels import sinkhorn, sinkhorn_packed

    monkeypatch.setattr(sinkhorn_packed, "FEWEST_PROGRAMS", 0)
    monkeypatch.setattr(sinkhorn, "block", None)  # which fails where one problem per program is launched


@pytest.fixture(params=("registers", "rows", "stripes", "stream"))
def kernel(request, monkeypatch):
    """Which forward kernel runs problems that any of them can."""
    from helo_fast.kernels import sinkhorn, sinkhorn_rows, sinkhorn_stripes

    for module in {"registers": (), "stream": (sinkhorn, sinkhorn_rows)}.get(request.param, (sinkhorn,)):
        monkeypatch.setattr(module, "block", lambda *size_and_dtype: None)
    monkeypatch.setattr(sinkhorn_stripes, "serves", lambda *size_and_dtype: request.param == "stripes")
    monkeypatch.setattr(sinkhorn_stripes, "PARTS", 8 if torch.cuda.is_available() else 2)  # the interpreter runs one after another
    return request.param


def arguments_of(case, dtype, device):
    arguments = CASES[case](dtype, device)
    if device == "cpu":  # the interpreter takes milliseconds an iteration
        arguments["max_iter"] = min(arguments.get("max_iter", 100), 60 if "tol" in arguments else 8)
        if case in ("square", "tiny_epsilon", "large_epsilon", "large_cost"):
            arguments["cost"] = arguments["cost"][:2]
    return arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", (*SINKHORN_CASES, *LARGE))
def test_kernel_values_against_float64(case, dtype, device_for):
    check_values(case, dtype, device_for("sinkhorn", "triton"))


@pytest.mark.parametrize("kernel, case, dtype", STREAMED, indirect=["kernel"], ids=str)
def test_streamed_values_against_float64(kernel, case, dtype, device_for):
    check_values(case, dtype, device_for("sinkhorn", "triton"))


@pytest.mark.parametrize("case, dtype", PACKED, ids=str)
def test_packed_values_against_float64(case, dtype, packed, device_for):
    check_values(case, dtype, device_for("sinkhorn", "triton"))


def test_packed_problems_are_each_solved_by_itself(packed, device_for):
    """Whatever the others of their program do, which stop earlier or later and have their kernel matrix made anew at other times."""
    device, options = device_for("sinkhorn", "triton"), {"epsilon": 0.01, "max_iter": 60, "tol": 1e-3, "backend": "triton"}
    cost = torch.rand(18, 8, 6, generator=torch.Generator().manual_seed(0)).to(device)
    cost *= torch.logspace(-2, 0, len(cost), device=device)[:, None, None]
    together = sinkhorn(cost, **options)
    assert together.n_iter.unique().numel() > 2, "the case should stop its problems at different iterations"
    for i in (0, 9, 15, 17):
        for one, all_of_them in zip(sinkhorn(cost[i], **options), together):
            assert torch.equal(one, all_of_them[i])


def test_packed_problems_of_any_strides(packed, device_for):
    device, generator = device_for("sinkhorn", "triton"), torch.Generator().manual_seed(0)
    cost, a, b = (torch.rand(2, *shape, generator=generator).to(device) for shape in ((7, 5), (7,), (5,)))
    a, b, options = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True), {"max_iter": 3, "backend": "triton"}
    expected = sinkhorn(cost, a, b, **options).plan
    for (name, cost_so), (_, a_so), (_, b_so) in zip(layouts(cost), layouts(a), layouts(b)):
        assert torch.equal(sinkhorn(cost_so, a_so, b_so, **options).plan, expected), name
    expanded = sinkhorn(cost[:1].expand(3, -1, -1), a[:1].expand(3, -1), b[:1].expand(3, -1), **options).plan
    assert torch.equal(expanded, expected[:1].expand(3, -1, -1))


def test_packed_problems_with_costs_beyond_all_others(packed, device_for):
    """Float32 has no digit left for what distinguishes them, where it holds a sum or a maximum of the whole exponent."""
    device, generator = device_for("sinkhorn", "triton"), torch.Generator().manual_seed(0)
    cost = torch.rand(5, 6, 7, generator=generator).to(device)
    cost[1, 2] = cost[2, :, 3] = 1e10
    cost[3] += 1e10
    cost[4, 1] -= 1e10
    result = sinkhorn(cost, max_iter=5, backend="triton")
    exact = sinkhorn(cost.double(), max_iter=5, backend="eager")
    assert result.f.isfinite().all() and result.g.isfinite().all()
    assert torch.allclose(result.plan.double(), exact.plan, rtol=1e-4, atol=1e-7)  # exponents of 1e11 in double are exact to 1e-5


def test_packed_problems_without_a_solution(packed, device_for):
    device, generator = device_for("sinkhorn", "triton"), torch.Generator().manual_seed(0)
    cost = torch.rand(6, 4, 5, generator=generator).to(device)
    expected = sinkhorn(cost, max_iter=5, backend="triton").plan
    cost[2, 1, 2], cost[4, 1] = torch.nan, torch.inf
    for max_iter in (1, 5):
        result, eager = (sinkhorn(cost, max_iter=max_iter, backend=backend) for backend in ("triton", "eager"))
        assert eager.plan[[2, 4]].isnan().any((1, 2)).all() and torch.equal(result.plan.isnan(), eager.plan.isnan())
        assert not result.converged[[2, 4]].any()
    assert torch.equal(result.plan[[0, 1, 3, 5]], expected[[0, 1, 3, 5]])


def test_packed_serves_many_small_balanced_problems():
    from helo_fast.kernels import sinkhorn_packed

    fewest = sinkhorn_packed.FEWEST_PROGRAMS
    assert (
        sinkhorn_packed.block(16 * fewest, 8, 3, torch.float32) == 8 and sinkhorn_packed.block(16 * fewest - 1, 8, 3, torch.float32) is None
    )
    assert sinkhorn_packed.block(4 * fewest, 3, 16, torch.float32) == 16 and sinkhorn_packed.block(2**20, 3, 17, torch.float32) is None
    assert sinkhorn_packed.block(4 * fewest, 8, 8, torch.float64) == 8 and sinkhorn_packed.block(2**20, 9, 8, torch.float64) is None


def check_values(case, dtype, device):
    arguments = arguments_of(case, dtype, device)
    exact_arguments = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    with poisoned_memory(device):
        actual = sinkhorn(**arguments, backend="triton")
    eager = sinkhorn(**arguments, backend="eager")
    exact = sinkhorn(**exact_arguments, backend="eager")
    for name in VALUES:
        assert_close(getattr(actual, name), getattr(exact, name), getattr(eager, name), f"{case} {name}")
    if case in ("zero_mass", "ragged"):
        assert torch.equal(actual.plan == 0, exact.plan == 0), "no mass is an exact zero"
    assert actual.n_iter.dtype == torch.int32 and actual.converged.dtype == torch.bool
    if dtype == torch.float64:
        assert torch.equal(actual.n_iter, exact.n_iter)
    else:  # rounding may move the stop by one check
        assert ((actual.n_iter - exact.n_iter).abs() <= 10).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_follows_potentials_that_no_scaling_could_hold(kernel, dtype, device_for):
    device, generator = device_for("sinkhorn", "triton"), torch.Generator().manual_seed(0)
    inputs = [hard_cost("blocks", 1, 9, 7, generator), *(hard_masses("spiky", 1, size, generator) for size in (9, 7))]
    moved = []
    for backend, kind in (("triton", dtype), ("eager", torch.float64), ("eager", dtype)):
        f = [sinkhorn(*(x.to(device, kind) for x in inputs), epsilon=1e-4, max_iter=count, backend=backend).f for count in (1, 30)]
        moved.append(f[1] - f[0])
    assert moved[1].abs().max() > 800e-4, "the case should move potentials by more than the exponent of a double holds"
    assert_close(*moved)


def test_kernel_reads_any_strides(kernel, device_for):
    arguments = SINKHORN_CASES["rectangular"](torch.float32, device_for("sinkhorn", "triton"))
    arguments = {k: v[:2] for k, v in arguments.items()}
    options = {"max_iter": 3, "backend": "triton"}
    expected = sinkhorn(**arguments, **options)
    inputs = [list(layouts(arguments[k])) for k in ("cost", "a", "b")]
    for (name, cost), (_, a), (_, b) in zip(*inputs):
        assert torch.allclose(sinkhorn(cost, a, b, **options).plan, expected.plan, atol=1e-7, rtol=0), name
    cost, a, b = (arguments[k][:1] for k in ("cost", "a", "b"))
    expanded = sinkhorn(cost.expand(3, -1, -1), a.expand(3, -1), b.expand(3, -1), **options).plan
    assert torch.allclose(expanded, expected.plan[:1].expand(3, -1, -1), atol=1e-7, rtol=0)


def test_kernel_offsets_are_64_bit(kernel, device_for, tmp_path):
    device, stride = device_for("sinkhorn", "triton"), 2**30
    size = 2 * stride + 4  # 8 GiB, of which three pages are touched
    if device == "cpu":  # a sparse file takes neither memory nor disk
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.float32)
    else:
        storage = torch.empty(size, device=device)
    cost = storage.as_strided((1, 3, 4), (0, stride, 1))  # row 2 begins 2**31 entries in
    cost.copy_(torch.rand(1, 3, 4, generator=torch.Generator().manual_seed(0)))
    far = sinkhorn(cost, max_iter=5, backend="triton").plan
    assert torch.equal(far, sinkhorn(cost.clone(), max_iter=5, backend="triton").plan)


def test_kernel_solves_each_problem_by_itself(device_for):
    arguments = arguments_of("until_tolerance", torch.float32, device_for("sinkhorn", "triton"))
    together = sinkhorn(**arguments, backend="triton")
    assert together.n_iter.unique().numel() > 1, "the case should stop its problems at different iterations"
    for i in (0, 5):
        alone = sinkhorn(**{**arguments, "cost": arguments["cost"][i]}, backend="triton")
        assert torch.equal(alone.plan, together.plan[i]) and alone.n_iter == together.n_iter[i]


def test_kernel_keeps_the_history(kernel, device_for):
    device = device_for("sinkhorn", "triton")
    arguments = arguments_of("until_tolerance", torch.float64, device)
    inputs = (
        arguments["cost"][[0, 5]],
        torch.full((2, 20), 1 / 20, device=device).double(),
        torch.full((2, 16), 1 / 16, device=device).double(),
    )
    options = (arguments["epsilon"], arguments["max_iter"], 1e-3, 10, None, None, "unrolled")
    with poisoned_memory(device):
        *_, n_iter, _, history = torch.ops.helo_fast.sinkhorn_fwd(*inputs, *options, "triton")
    *_, expected = torch.ops.helo_fast.sinkhorn_fwd(*inputs, *options, "eager")
    ran = torch.arange(arguments["max_iter"], device=device) < n_iter.unsqueeze(-1)
    assert n_iter.min() < arguments["max_iter"] and torch.allclose(history[ran], expected[ran], atol=1e-12) and (history[~ran] == 0).all()


@pytest.mark.parametrize("several", (False, True), ids=("one_to_a_program", "several_to_a_program"))
def test_kernel_masses_near_underflow(several, request, device_for):
    """Their scalings leave a part of them to the potentials."""
    if several:
        request.getfixturevalue("packed")
    device, generator = device_for("sinkhorn", "triton"), torch.Generator().manual_seed(0)
    cost, a, b = (torch.rand(2, *shape, generator=generator, dtype=torch.float64).to(device) for shape in ((6, 7), (6,), (7,)))
    a[:, 1], b[:, 3] = 1e-220, 1e-250
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    actual, expected = (sinkhorn(cost, a, b, max_iter=30, backend=backend) for backend in ("triton", "eager"))
    for name in ("f", "g"):
        assert torch.allclose(getattr(actual, name), getattr(expected, name), rtol=0, atol=1e-12), name


@pytest.mark.parametrize("gradient", ("implicit", "unrolled"))
def test_kernel_gradients_equal_eager(gradient, device_for):
    arguments = SINKHORN_CASES["zero_mass"](torch.float64, device_for("sinkhorn", "triton"))
    gradients = []
    for backend in ("triton", "eager"):
        leaves = [arguments[k].clone().requires_grad_() for k in ("cost", "a", "b")]
        result = sinkhorn(*leaves, max_iter=8, tau_b=1.5, gradient=gradient, backend=backend)
        result.plan.square().sum().add(result.transport_cost.sum()).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*gradients):
        assert torch.allclose(actual, expected, atol=1e-10)


def gradients_of(op, arguments, names, backend):
    """What the backward `op` makes of random gradients that reach the outputs named, of an eager forward: gradients of (cost, a, b)."""
    cost = arguments["cost"]
    masses = []
    for name, count, size in (("a", "n_rows", cost.shape[1]), ("b", "n_cols", cost.shape[2])):
        used = arguments.get(count, torch.full(cost.shape[:1], size, device=cost.device))
        uniform = (torch.arange(size, device=cost.device) < used[:, None]).to(cost.dtype) / used[:, None].to(cost.dtype)
        masses.append(arguments.get(name, uniform))
    options = {"epsilon": 0.1, "tau_a": None, "tau_b": None, "tol": None, "max_iter": 30, "check_every": 10} | arguments
    epsilon, taus = options["epsilon"], (options["tau_a"], options["tau_b"])
    kind = "unrolled" if "unrolled" in op else "implicit"
    forward = (epsilon, options["max_iter"], options["tol"], options["check_every"], *taus, kind, "eager")
    plan, f, g, transport_cost, _, n_iter, _, history = torch.ops.helo_fast.sinkhorn_fwd(cost, *masses, *forward)
    incoming = []
    for name, output in (("plan", plan), ("f", f), ("g", g), ("transport_cost", transport_cost)):
        generator = torch.Generator().manual_seed(output.dim())
        grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(cost)
        incoming.append(grad if name in names else None)
    stored = (history, n_iter) if kind == "unrolled" else ()
    return getattr(torch.ops.helo_fast, op)(cost, *masses, plan, *stored, *incoming, epsilon, *taus, backend)


def check_gradients(op, arguments, names, device, what):
    exact_arguments = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    with poisoned_memory(device):
        actual = gradients_of(op, arguments, names, "triton")
    eager = gradients_of(op, arguments, names, "eager")
    exact = gradients_of(op, exact_arguments, names, "eager")
    # Where the plan falls apart into pieces without a link, how the pieces' potentials move is rounding.
    compared = 1 if what in FALLS_APART else 3
    for leaf, ours, truth, theirs in list(zip(("cost", "a", "b"), actual, exact, eager))[:compared]:
        assert ours.isfinite().all()
        assert_close(ours, truth, theirs, f"{what} d {'+'.join(names)} / d {leaf}")


OUTPUTS = ("plan", "f", "g", "transport_cost")
FALLS_APART = ("tiny_epsilon", "large_cost")
GRADIENT_CASES = {
    **{case: build for case, build in SINKHORN_CASES.items() if case != "square"},
    "small_epsilon": _problem(1, 36, 36, epsilon=0.02, max_iter=250),
    "small_epsilon_wide": _problem(2, 20, 33, epsilon=0.02, max_iter=250, marginals=True),
    "largest": _problem(1, 130, 64, max_iter=50, epsilon=0.05, marginals=True),
    "too_large": _problem(1, 70, 70, max_iter=50, marginals=True),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GRADIENT_CASES)
def test_implicit_gradient_against_float64(case, dtype, device_for):
    device = device_for("sinkhorn", "triton")
    arguments = GRADIENT_CASES[case](dtype, device)
    for names in (("plan",), OUTPUTS) if case != "rectangular" else (("f",), ("g",), ("transport_cost",)):
        if not (case in FALLS_APART and "f" in names):
            check_gradients("sinkhorn_implicit_bwd", arguments, names, device, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in SINKHORN_CASES if case not in ("square", "tall")])  # which are PyTorch's: too large
def test_unrolled_gradient_against_float64(case, dtype, device_for):
    device = device_for("sinkhorn", "triton")
    arguments = SINKHORN_CASES[case](dtype, device)
    arguments["max_iter"] = min(arguments.get("max_iter", 100), 6)
    for names in (("plan",), OUTPUTS) if case != "rectangular" else (("f",), ("g",), ("transport_cost",)):
        check_gradients("sinkhorn_unrolled_bwd", arguments, names, device, case)


@pytest.mark.parametrize("op", ("sinkhorn_implicit_bwd", "sinkhorn_unrolled_bwd"))
def test_gradient_reads_any_strides(op, device_for):
    device = device_for("sinkhorn", "triton")
    for shape in ((7, 5), (5, 7)):
        arguments = _problem(2, *shape, max_iter=4, marginals=True)(torch.float64, device)
        expected = gradients_of(op, arguments, OUTPUTS, "triton")
        inputs = [list(layouts(arguments[k])) for k in ("cost", "a", "b")]
        for (name, cost), (_, a), (_, b) in zip(*inputs):
            actual = gradients_of(op, {**arguments, "cost": cost, "a": a, "b": b}, OUTPUTS, "triton")
            for ours, theirs in zip(actual, expected):
                assert torch.allclose(ours, theirs, rtol=0, atol=1e-12), name
        leaf = arguments["cost"].requires_grad_()
        plan = sinkhorn(leaf, max_iter=4, gradient=op.split("_")[1], backend="triton").plan
        for grad in (torch.ones(()).double().to(device).expand(2, *shape), torch.rand(2, *shape[::-1], device=device).double().mT):
            found = [torch.autograd.grad(plan, leaf, g, retain_graph=True)[0] for g in (grad, grad.contiguous())]
            assert torch.equal(*found)


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("last", (False, True))
def test_tiny_masses_get_the_implicit_gradient_of_the_converged_iterations(transposed, last, device_for):
    """Relative to its mass, the gradient of a row or column of next to none is as exact as that of any other."""
    device, generator = device_for("sinkhorn", "triton"), torch.Generator().manual_seed(2)
    cost, weight = torch.rand(1, 9, 7, generator=generator).double(), torch.randn(1, 9, 7, generator=generator).double()
    masses = [torch.rand(size, generator=generator).double() for size in (9, 7)]
    for mass in masses:
        mass[-1 if last else 0] = 1e-12
        mass /= mass.sum()
    if transposed:
        cost, weight, masses = cost.mT.contiguous(), weight.mT.contiguous(), masses[::-1]
    a, b = (mass.to(device).unsqueeze(0) for mass in masses)
    leaf = cost.to(device).requires_grad_()
    plan = sinkhorn(leaf, a, b, epsilon=1.0, max_iter=60, gradient="unrolled", backend="eager").plan
    weight = weight.to(device)
    expected = torch.autograd.grad(plan, leaf, weight)[0] / plan.detach()
    options = (weight, None, None, None, 1.0, None, None, "triton")
    actual = torch.ops.helo_fast.sinkhorn_implicit_bwd(leaf.detach(), a, b, plan.detach(), *options)[0] / plan.detach()
    assert (actual - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("sizes", ((4, 3), (3, 4)), ids=("rows", "columns"))
def test_a_side_without_any_mass(sizes, device_for):
    device, found = device_for("sinkhorn", "triton"), []
    masses = {4: torch.tensor([[0.0] * 4, [0.1, 0.2, 0.3, 0.4]]), 3: torch.tensor([[0.2, 0.0, 0.8], [0.2, 0.3, 0.5]])}
    cost = torch.rand(2, *sizes, generator=torch.Generator().manual_seed(0))
    for backend in ("triton", "eager"):
        leaves = [t.to(device).requires_grad_() for t in (cost, *(masses[size] for size in sizes))]
        result = sinkhorn(*leaves, tau_a=1.0, tau_b=0.5, max_iter=20, tol=1e-3, backend=backend)
        found.append((*result, *torch.autograd.grad((result.plan * (1 + cost.to(device))).sum() + result.f[1].sum(), leaves)))
    for actual, expected in zip(*found):
        assert torch.allclose(actual.double(), expected.double(), atol=1e-5) and not actual.isnan().any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, and too many problems for the interpreter")
def test_batch_beyond_65535():
    cost = torch.rand(70_001, 2, 3, device="cuda")
    result = sinkhorn(cost, max_iter=50, backend="triton")
    assert torch.allclose(result.plan[-2:], sinkhorn(cost[-2:], max_iter=50, backend="eager").plan, atol=1e-6)
    assert torch.allclose(result.plan.sum(-1), torch.full_like(result.plan.sum(-1), 1 / 2), atol=1e-6)
