"""The CUDA kernels of Sinkhorn without a GPU: csrc/common compiled for the host, its lanes taking turns, against float64.

What differs on the GPU is csrc/cuda: how lanes are threads (team.h), and the launches.
"""

import pytest
import torch

from helo_fast.ops.sinkhorn import reference
from helo_fast.testing import COSTS, MASSES, SINKHORN_CASES, assert_close, hard_cost, hard_masses

SOURCES = ("split", "sinkhorn", "sinkhorn_gradient")
DTYPES = (torch.float32, torch.float64)
FLAGS = ("plain", "sanitized")


def solve(program, cost, a, b, options, history=False, kernel="registers", blocks=2, shift=0):
    """What reference.fwd returns, from the host's program."""
    epsilon, max_iter, tol, check_every, *taus = options
    batch, n, m = cost.shape
    kept = max_iter if history else 0
    damping = [1.0 if tau is None else tau / (tau + epsilon) for tau in taus]
    sizes = torch.tensor([batch, n, m, kept, max_iter, check_every, a is None, blocks, shift])
    numbers = [epsilon, -1 if tol is None else tol, *damping, 0 if taus[1] is None else epsilon / taus[1]]
    numbers = torch.tensor([*numbers, reference.CONVERGED_BY_DEFAULT if tol is None else tol], dtype=torch.float64)
    shapes = [(batch, n, m), (batch, n), (batch, m), (batch,), (batch,), (batch, kept, n + m)]
    wanted = [*((shape, cost.dtype) for shape in shapes), ((batch,), torch.int32), ((batch,), torch.bool)]
    values = program((cost.dtype, kernel), (sizes, numbers, cost, *(() if a is None else (a, b))), wanted)
    return *values[:5], *values[6:], values[5]


@pytest.mark.parametrize("flags", FLAGS)
def test_split(flags, programs):
    """Teams of 2 to 128 lanes: the sums over peers, and what their owners hand back."""
    (mistakes,) = programs("split", flags)((), (), [((4, 5), torch.int32)])
    assert not mistakes.any(), mistakes


OPTIONS = {"epsilon": 0.1, "max_iter": 100, "tol": None, "check_every": 10, "tau_a": None, "tau_b": None}


def compare(program, cost, a, b, what, history=False, kernel="registers", shift=0, **given):
    """The program's answer, held to twice the error of eager PyTorch in the same dtype; and the exact one."""
    options = tuple((OPTIONS | given).values())
    actual = solve(program, cost, a, b, options, history, kernel, shift=shift)
    eager = reference.fwd(cost, a, b, *options, history)
    exact = reference.fwd(*(None if t is None else t.double() for t in (cost, a, b)), *options, history)
    for name, value, theirs, truth in zip(("plan", "f", "g", "transport_cost", "marginal_error"), actual, eager, exact):
        assert_close(value, truth, theirs, f"{what} {name}")
    assert torch.equal(actual[6], reference.converged(actual[4], given.get("tol"))), what
    if history:
        assert_close(actual[7], exact[7], eager[7], f"{what} history")
    return actual, exact


def arguments_of(case, dtype):
    """(cost, a, b, options) of a named case, as api.py hands them to the op."""
    arguments = SINKHORN_CASES[case](dtype)
    cost, a, b = (arguments.pop(name, None) for name in ("cost", "a", "b"))
    counts = [arguments.pop(name, None) for name in ("n_rows", "n_cols")]
    if counts[0] is not None:
        a, b = ((torch.arange(size) < count[:, None]).to(dtype) / count[:, None] for size, count in zip(cost.shape[1:], counts))
    return cost, a, b, arguments


def test_uniform_masses_do_not_move_the_potentials(programs):
    """Rounded to float32, their sums differ: f would grow by as much at every iteration, and g fall."""
    cost = torch.rand(1, 30, 41, generator=torch.Generator().manual_seed(0))
    options = tuple((OPTIONS | {"max_iter": 1000}).values())
    actual = solve(programs("sinkhorn", "plain"), cost, None, None, options)
    exact = reference.fwd(cost.double(), None, None, *options, False)
    for value, truth, slack in zip(actual[:5], exact, (1e-8, 3e-7, 3e-7, 1e-6, 1e-6)):
        assert (value - truth).abs().max() < slack


@pytest.mark.parametrize("kernel", ("registers", "streaming"))
def test_costs_beyond_all_others(kernel, programs):
    """Float32 has no digit left for what distinguishes them, where it holds the whole exponent."""
    cost = torch.rand(5, 6, 7, generator=torch.Generator().manual_seed(0))
    cost[1, 2] = cost[2, :, 3] = 1e10
    cost[3] += 1e10
    cost[4, 1] -= 1e10
    options = tuple((OPTIONS | {"max_iter": 5}).values())
    actual = solve(programs("sinkhorn", "plain"), cost, None, None, options, kernel=kernel)
    exact = reference.fwd(cost.double(), None, None, *options, False)
    assert actual[1].isfinite().all() and actual[2].isfinite().all()
    assert torch.allclose(actual[0].double(), exact[0], rtol=1e-4, atol=1e-7)  # exponents of 1e11 in double are exact to 1e-5


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", ("registers", "streaming"))
def test_sinkhorn_cases(kernel, dtype, flags, programs):
    program = programs("sinkhorn", flags)
    for case in SINKHORN_CASES:
        cost, a, b, options = arguments_of(case, dtype)
        if kernel == "registers" and max(cost.shape[1:]) > 64:
            continue
        if flags == "sanitized":
            options["max_iter"] = min(options.get("max_iter", 100), 20)
        actual, exact = compare(program, cost, a, b, case, kernel=kernel, **options)
        if case in ("zero_mass", "ragged"):
            assert torch.equal(actual[0] == 0, exact[0] == 0), "no mass is an exact zero"
        if dtype == torch.float64:
            assert torch.equal(actual[5], exact[5]), case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinkhorn_every_size(dtype, programs):
    """Every grid of lanes, full and with a remainder; uniform and given masses; problems that begin on odd addresses."""
    program = programs("sinkhorn", "plain")
    sizes = ((1, 1), (16, 16), (17, 3), (3, 17), (32, 32), (33, 30), (36, 36), (40, 36), (40, 35), (37, 64), (64, 37), (63, 61), (64, 64))
    for n, m in sizes:
        generator = torch.Generator().manual_seed(n * 100 + m)
        cost = 2 * torch.rand(2, n, m, generator=generator, dtype=torch.float64).to(dtype)
        a, b = (hard_masses("random", 2, size, generator).to(dtype) for size in (n, m))
        compare(program, cost, None, None, f"{n} x {m}", max_iter=15, shift=1)
        compare(program, cost, a, b, f"{n} x {m}", max_iter=15)
        compare(program, cost, a, b, f"{n} x {m} soft", max_iter=8, tau_a=0.7, tau_b=2.0, history=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", COSTS)
def test_sinkhorn_hard_problems(kind, dtype, programs):
    """Small epsilon, masses down to 1e-12: scalings leave their range at every iteration."""
    program = programs("sinkhorn", "plain")
    generator = torch.Generator().manual_seed(len(kind))
    for masses in MASSES:
        for n, m in ((12, 9), (36, 33)):
            cost = hard_cost(kind, 2, n, m, generator).to(dtype)
            a, b = (hard_masses(masses, 2, size, generator).to(dtype) for size in (n, m))
            for epsilon in (1e-4, 3e-3, 0.3):
                compare(program, cost, a, b, f"{kind} {masses} {n} x {m} at {epsilon}", epsilon=epsilon, max_iter=40)
            compare(program, cost, a, b, f"{kind} {masses} {n} x {m} soft", epsilon=2e-3, max_iter=20, tau_a=0.05, tau_b=1.0)


@pytest.mark.parametrize("kernel", ("registers", "streaming"))
def test_sinkhorn_problems_are_apart(kernel, programs):
    """The share of a block changes nothing: not another problem's masses, nor when it stops."""
    program = programs("sinkhorn", "plain")
    cost, a, b, given = arguments_of("until_tolerance", torch.float32)
    options = tuple((OPTIONS | given).values())
    together = solve(program, cost, a, b, options, True, kernel, blocks=1)
    assert together[5].unique().numel() > 1, "the case should stop its problems at different iterations"
    past = torch.arange(options[1]) >= together[5].unsqueeze(-1)
    assert (together[7][past] == 0).all() and (together[7][~past] != 0).any(-1).all()
    for blocks in (2, 6, 9):
        for one, other in zip(together, solve(program, cost, a, b, options, True, kernel, blocks=blocks)):
            assert torch.equal(one, other), blocks


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", ("registers", "streaming"))
def test_sinkhorn_masses_near_underflow(kernel, dtype, programs):
    """Down to the smallest number above zero: each such row and column gets its mass, and nobody else notices."""
    program = programs("sinkhorn", "plain")
    generator = torch.Generator().manual_seed(3)
    cost = torch.rand(2, 9, 7, generator=generator, dtype=torch.float64).to(dtype)
    a, b = (hard_masses("random", 2, size, generator).to(dtype) for size in (9, 7))
    smallest = torch.finfo(dtype).smallest_normal
    for mass in (a, b):
        mass[0, 0], mass[1, 2], mass[1, 3] = smallest * 1e3, smallest, smallest * torch.finfo(dtype).eps
    for epsilon in (0.3, 1e-2):
        actual, _ = compare(program, cost, a, b, f"at {epsilon}", kernel=kernel, epsilon=epsilon, max_iter=50)
        torch.testing.assert_close(actual[0].sum(-1) / a, torch.ones_like(a), rtol=0.02, atol=0)
        compare(program, cost, a, b, f"soft at {epsilon}", kernel=kernel, epsilon=epsilon, max_iter=30, tau_a=0.5, tau_b=1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", ("registers", "streaming"))
def test_sinkhorn_forbidden_pairs(kernel, dtype, programs):
    """An infinite cost moves nothing, and transport_cost stays finite."""
    cost = torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    cost[0, 2, 3] = cost[1, :3, 0] = torch.inf
    actual, exact = compare(programs("sinkhorn", "plain"), cost, None, None, "infinite", kernel=kernel, epsilon=0.05)
    assert torch.equal(actual[0] == 0, cost.isinf()) and exact[3].isfinite().all()


@pytest.mark.parametrize("kernel", ("registers", "streaming"))
def test_sinkhorn_without_any_mass(kernel, programs):
    program = programs("sinkhorn", "plain")
    a, b = torch.rand(3, 5), torch.rand(3, 4)
    a[0], b[1], b[2] = 0, 0, 0.25
    cost = torch.rand(3, 5, 4)
    plan, f, g, transport_cost, error, n_iter, converged, _ = solve(program, cost, a, b, tuple(OPTIONS.values()), kernel=kernel, blocks=1)
    assert (plan[:2] == 0).all() and f[:2].isneginf().all() and g[:2].isneginf().all() and (transport_cost[:2] == 0).all()
    assert torch.allclose(error[:2], b[:2].sum(-1)) and (n_iter == 100).all() and converged[:2].tolist() == [False, True]
    assert torch.allclose(plan[2].sum(-1), a[2], atol=1e-6), "the problem after them"


def differentiate(program, cost, a, b, plan, grads, options, blocks=2):
    """What reference.implicit_bwd returns, from the host's program; cost and grad_plan arrive there transposed in memory."""
    epsilon, *taus = options
    grad_plan, *others = grads
    sizes = torch.tensor([*plan.shape, blocks, *(g is not None for g in grads)])
    numbers = torch.tensor([epsilon, *(0.0 if tau is None else epsilon / tau for tau in taus)], dtype=torch.float64)
    given = (cost.mT, None if grad_plan is None else grad_plan.mT, a, b, plan, *others)
    given = (sizes, numbers, *(t for t in given if t is not None))
    return program((cost.dtype,), given, [(t.shape, cost.dtype) for t in (cost, a, b)])


def compare_gradients(program, cost, a, b, what, every_incoming, **given):
    options, leaves = OPTIONS | given, ("cost", "a", "b") if a is not None else ("cost",)
    problems = []
    for dtype in (cost.dtype, torch.float64):
        inputs = [t.to(dtype) for t in (cost, *reference.marginals(cost, a, b))]
        problems.append((*inputs, reference.fwd(*inputs, *options.values(), False)[0]))
    rest = tuple(options[name] for name in ("epsilon", "tau_a", "tau_b"))
    for incoming in every_incoming:
        generator = torch.Generator().manual_seed(0)
        shapes = {"plan": cost.shape, "f": cost.shape[:2], "g": cost.shape[::2], "transport_cost": cost.shape[:1]}
        grads = {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(cost.dtype) for name, shape in shapes.items()}
        grads = [grads[name] if name in incoming else None for name in grads]
        exact_grads = [grad if grad is None else grad.double() for grad in grads]
        actual = differentiate(program, *problems[0], grads, rest)
        eager = reference.implicit_bwd(*problems[0], *grads, *rest)
        exact = reference.implicit_bwd(*problems[1], *exact_grads, *rest)
        for name, value, theirs, truth in zip(leaves, actual, eager, exact):
            assert_close(value, truth, theirs, f"{what} d {'+'.join(incoming)} / d {name}")


INCOMING = (("plan",), ("f",), ("g",), ("transport_cost",), ("plan", "f", "g", "transport_cost"))
# The plan falls apart into pieces without a link that double precision sees: how the pieces' potentials move is then rounding.
FALLS_APART = ("tiny_epsilon", "large_cost")


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinkhorn_gradient_cases(dtype, flags, programs):
    program = programs("sinkhorn_gradient", flags)
    incoming = INCOMING if flags == "plain" else (("plan", "transport_cost"), *INCOMING[-1:])
    for case in SINKHORN_CASES:
        cost, a, b, options = arguments_of(case, dtype)
        if max(cost.shape[1:]) > 64:
            continue
        blind = {"f", "g"} if case in FALLS_APART else set()
        compare_gradients(program, cost, a, b, case, [names for names in incoming if not blind & set(names)], **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinkhorn_gradient_every_shape(dtype, programs):
    program = programs("sinkhorn_gradient", "plain")
    for n, m in ((64, 64), (61, 64), (64, 62), (1, 64), (33, 30), (36, 36)):
        generator = torch.Generator().manual_seed(n * 100 + m)
        cost = torch.rand(2, n, m, generator=generator, dtype=torch.float64).to(dtype)
        a, b = (hard_masses("random", 2, size, generator).to(dtype) for size in (n, m))
        compare_gradients(program, cost, a, b, f"{n} x {m}", INCOMING[-1:])
        compare_gradients(program, cost, a, b, f"{n} x {m} soft", INCOMING[-1:], tau_b=0.5)


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("last", (False, True))
def test_sinkhorn_gradient_of_tiny_masses(transposed, last, programs):
    """Relative to its mass, the gradient of a row or column of next to none is that of the converged iterations."""
    generator = torch.Generator().manual_seed(2)
    cost, weight = torch.rand(2, 1, 9, 7, generator=generator, dtype=torch.float64)
    a, b = (torch.rand(1, size, generator=generator, dtype=torch.float64) for size in (9, 7))
    for mass in (a, b):
        mass[:, -1 if last else 0] = 1e-12
        mass /= mass.sum()
    if transposed:
        cost, weight, a, b = cost.mT.contiguous(), weight.mT.contiguous(), b, a
    plan, *_, n_iter, _, history = reference.fwd(cost, a, b, 0.3, 600, None, 10, None, None, True)
    grads = (weight, None, None, None)
    actual, *_ = differentiate(programs("sinkhorn_gradient", "plain"), cost, a, b, plan, grads, (0.3, None, None))
    exact, *_ = reference.unrolled_bwd(cost, a, b, plan, history, n_iter, *grads, 0.3, None, None)
    assert (actual / plan - exact / plan).abs().max() < 1e-9 * (exact / plan).abs().max()
