"""sinkhorn: values against float64 and POT, every back end, dtype, case and layout."""

import math
from types import SimpleNamespace

import ot
import pytest
import torch

import helo_fast
from helo_fast import _registry, sinkhorn
from helo_fast.testing import SINKHORN_CASES, assert_close, layouts

BACKENDS = ("eager", "cpp", "cuda")  # triton runs under the interpreter in a process of its own: test_triton.py
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
VALUES = ("plan", "f", "g", "transport_cost", "marginal_error")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SINKHORN_CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_against_float64(backend, case, dtype, device_for):
    if dtype in (torch.bfloat16, torch.float16) and case in ("large_cost", "tiny_epsilon", "unbalanced_tiny_epsilon", "until_tolerance"):
        dtype = torch.float32  # the inputs themselves would not survive the rounding
    arguments = SINKHORN_CASES[case](dtype, device_for("sinkhorn", backend))
    exact_arguments = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    actual = sinkhorn(**arguments, backend=backend)
    eager = sinkhorn(**arguments, backend="eager")
    exact = sinkhorn(**exact_arguments, backend="eager")
    for name in VALUES:
        assert_close(getattr(actual, name), getattr(exact, name), getattr(eager, name), f"{case} {name}")
    assert actual.n_iter.dtype == torch.int32 and actual.converged.dtype == torch.bool
    if dtype == torch.float64:
        assert torch.equal(actual.n_iter, exact.n_iter)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_expanded_inputs(backend, device_for):
    arguments = SINKHORN_CASES["rectangular"](torch.float32, device_for("sinkhorn", backend))
    expected = sinkhorn(**arguments, backend=backend)
    for (name, cost), (_, a), (_, b) in zip(*(layouts(arguments[k]) for k in ("cost", "a", "b"))):
        plan = sinkhorn(cost, a, b, backend=backend).plan
        assert torch.allclose(plan, expected.plan, atol=0 if backend == "cpp" else 1e-7, rtol=0), name  # torch sums by layout
    shared_mass = sinkhorn(arguments["cost"][:1].expand(3, -1, -1), arguments["a"][0], arguments["b"][0], backend=backend)
    alone = sinkhorn(arguments["cost"][0], arguments["a"][0], arguments["b"][0], backend=backend)
    assert torch.allclose(shared_mass.plan[2], alone.plan, atol=1e-7, rtol=0)


@pytest.mark.parametrize("backend", ("eager", "cpp"))
def test_batch_mates_and_threads_do_not_matter(backend, device_for):
    arguments = SINKHORN_CASES["until_tolerance"](torch.float32, device_for("sinkhorn", backend))
    together = sinkhorn(**arguments, backend=backend)
    cost = arguments.pop("cost")
    alone = [sinkhorn(c, **arguments, backend=backend) for c in cost]
    for i, single in enumerate(alone):
        assert torch.equal(single.n_iter, together.n_iter[i])
        # eager's batched reductions may round differently at another batch size; the native kernel may not
        assert torch.allclose(single.plan, together.plan[i], atol=0 if backend == "cpp" else 1e-7, rtol=0)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(sinkhorn(cost, **arguments, backend=backend).plan, together.plan)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_beyond_65535(backend, device_for):
    cost = torch.rand(70_001, 2, 3, device=device_for("sinkhorn", backend))
    result = sinkhorn(cost, max_iter=50, backend=backend)
    last = sinkhorn(cost[-2:], max_iter=50, backend="eager")
    assert torch.allclose(result.plan[-2:], last.plan, atol=1e-6)
    assert torch.allclose(result.plan.sum(-1), torch.full_like(result.plan.sum(-1), 1 / 2), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_mass_gives_exact_zeros(backend, device_for):
    arguments = SINKHORN_CASES["zero_mass"](torch.float32, device_for("sinkhorn", backend))
    result = sinkhorn(**arguments, backend=backend)
    assert (result.plan[0, 2] == 0).all() and (result.plan[1, :, 4] == 0).all() and result.plan.isfinite().all()
    assert result.f[0, 2] == -math.inf and result.g[1, 4] == -math.inf
    assert torch.allclose(result.plan.sum(-1), arguments["a"], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ("implicit", "unrolled"))
@pytest.mark.parametrize("taus", ((1.0, 1.0), (None, 1.0), (1.0, None)), ids=str)
def test_a_side_without_any_mass(taus, gradient, backend, device_for):
    """Unbalanced: nothing is moved, and the potentials of the other side are those of no mass too."""
    cost = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)).to(device_for("sinkhorn", backend))
    some = {4: torch.tensor([[0.0] * 4, [0.1, 0.2, 0.3, 0.4]]), 3: torch.tensor([[0.2, 0.0, 0.8], [0.2, 0.3, 0.5]])}
    for sizes in ((4, 3), (3, 4)):  # without rows, and without columns
        C = (cost if sizes == (4, 3) else cost.mT.contiguous()).detach().requires_grad_()
        a, b = (some[size].to(cost.device).requires_grad_() for size in sizes)
        result = sinkhorn(C, a, b, tau_a=taus[0], tau_b=taus[1], gradient=gradient, backend=backend)
        assert (result.plan[0] == 0).all() and (result.f[0] == -math.inf).all() and (result.g[0] == -math.inf).all()
        assert result.transport_cost[0] == 0 and result.marginal_error[0].isfinite() and result.plan[1].sum() > 0.1
        grads = torch.autograd.grad((result.plan * (1 + C.detach())).sum() + result.transport_cost.sum(), (C, a, b))
        assert all(grad.isfinite().all() for grad in grads) and (grads[0][0] == 0).all() and (grads[0][1] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", (7, 40))
def test_infinite_cost_forbids_a_pair(m, backend, device_for):
    cost = torch.rand(2, 9, m, generator=torch.Generator().manual_seed(m))
    cost[0, 2, 3] = cost[1, :3, 0] = cost[1, 8, m - 1] = math.inf
    result = sinkhorn(cost.to(device_for("sinkhorn", backend)), backend=backend)
    exact = sinkhorn(cost.double(), backend="eager")
    assert torch.equal(result.plan.cpu() == 0, cost.isinf())
    for name in ("plan", "f", "g", "transport_cost"):
        torch.testing.assert_close(getattr(result, name).cpu().double(), getattr(exact, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ("eager", "cpp"))
def test_ragged_equals_each_problem_alone(backend, device_for):
    arguments = SINKHORN_CASES["ragged"](torch.float64, device_for("sinkhorn", backend))
    result = sinkhorn(**arguments, backend=backend)
    for i, (n, m) in enumerate(zip(arguments["n_rows"], arguments["n_cols"])):
        alone = sinkhorn(arguments["cost"][i, :n, :m], backend=backend)
        assert torch.allclose(result.plan[i, :n, :m], alone.plan, atol=1e-12)
        assert (result.plan[i, n:] == 0).all() and (result.plan[i, :, m:] == 0).all()


@pytest.mark.parametrize("backend", ("eager", "cpp"))
@pytest.mark.parametrize("epsilon", (0.02, 0.1, 1.0))
def test_equals_pot(backend, epsilon, device_for):
    arguments = SINKHORN_CASES["rectangular"](torch.float64, device_for("sinkhorn", backend))
    ours = sinkhorn(**arguments, epsilon=epsilon, max_iter=30, backend=backend)
    for i in range(len(ours.plan)):
        a, b, cost = arguments["a"][i], arguments["b"][i], arguments["cost"][i]
        plan, log = ot.bregman.sinkhorn_log(
            a, b, cost, epsilon, numItermax=30, stopThr=0, log=True, warn=False, warmstart=(a.log(), torch.zeros_like(b))
        )
        assert torch.allclose(ours.plan[i], plan, atol=1e-12)
        # the map of the docstring, both ways
        assert torch.allclose(ours.f[i] / epsilon + a.log(), log["log_u"], atol=1e-9)
        assert torch.allclose(ours.g[i] / epsilon + b.log(), log["log_v"], atol=1e-9)
        assert torch.allclose(epsilon * (log["log_u"] - a.log()), ours.f[i], atol=1e-9)
        assert torch.allclose(epsilon * (log["log_v"] - b.log()), ours.g[i], atol=1e-9)


@pytest.mark.parametrize("backend", ("eager", "cpp"))
def test_unbalanced_equals_pot(backend, device_for):
    arguments = SINKHORN_CASES["unbalanced"](torch.float64, device_for("sinkhorn", backend))
    arguments.update(tau_a=0.7, tau_b=0.7, max_iter=3000)
    ours = sinkhorn(**arguments, backend=backend)
    for i in range(len(ours.plan)):
        plan = ot.unbalanced.sinkhorn_unbalanced(
            arguments["a"][i], arguments["b"][i], arguments["cost"][i], 0.1, 0.7, reg_type="kl", numItermax=5000, stopThr=1e-14
        )
        assert torch.allclose(ours.plan[i], plan, atol=1e-9)
    assert bool((ours.marginal_error < 1e-10).all())


@pytest.mark.parametrize("backend", ("eager", "cpp"))
def test_closed_forms(backend, device_for):
    device_for("sinkhorn", backend)
    two = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double(), epsilon=0.3, backend=backend)
    stay = 0.5 / (1 + math.exp(-1 / 0.3))
    assert torch.allclose(two.plan, torch.tensor([[stay, 0.5 - stay], [0.5 - stay, stay]]).double(), atol=1e-12)
    a, b = torch.tensor([0.2, 0.8], dtype=torch.float64), torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    flat = sinkhorn(torch.full((2, 3), 7.0).double(), a, b, backend=backend)
    assert torch.allclose(flat.plan, a[:, None] * b, atol=1e-14) and abs(flat.transport_cost - 7) < 1e-12


@pytest.mark.parametrize("backend", ("eager", "cpp"))
def test_tolerance_stops_each_problem_by_itself(backend, device_for):
    cost = torch.rand(2, 15, 15, dtype=torch.float64) * torch.tensor([0.1, 1.5], dtype=torch.float64)[:, None, None]
    device_for("sinkhorn", backend)
    result = sinkhorn(cost, tol=1e-6, max_iter=2000, check_every=5, backend=backend)
    assert result.n_iter[0] < result.n_iter[1] and (result.n_iter % 5 == 0).all()
    assert (result.marginal_error <= 1e-6).all() and result.converged.all()
    hopeless = sinkhorn(cost[1], tol=1e-12, max_iter=5, backend=backend)
    assert hopeless.n_iter == 5 and not hopeless.converged


@pytest.mark.parametrize("backend", ("cpp", "cuda"))
@pytest.mark.parametrize("size", ((6, 7), (9, 70)), ids=str)
def test_costs_beyond_all_others(size, backend, device_for):
    """Float32 has no digit left for what distinguishes them, where it holds the whole exponent."""
    cost = torch.rand(5, *size, generator=torch.Generator().manual_seed(0)).to(device_for("sinkhorn", backend))
    cost[1, 2] = cost[2, :, 3] = 1e10
    cost[3] += 1e10
    cost[4, 1] -= 1e10
    actual = sinkhorn(cost, max_iter=5, backend=backend)
    exact = sinkhorn(cost.double(), max_iter=5, backend="eager")
    assert actual.f.isfinite().all() and actual.g.isfinite().all()
    assert torch.allclose(actual.plan.double(), exact.plan, rtol=1e-4, atol=1e-7)  # exponents of 1e11 in double are exact to 1e-5


@pytest.mark.parametrize("size", ((30, 41), (200, 300)), ids=str)
def test_uniform_masses_do_not_move_the_potentials(size, device_for):
    """Rounded to float32, their sums differ: f would grow by as much at every iteration, and g fall."""
    cost = torch.rand(2, *size, generator=torch.Generator().manual_seed(0)).to(device_for("sinkhorn", "cpp"))
    epsilon = 0.2
    actual = sinkhorn(cost, epsilon=epsilon, max_iter=2000, backend="cpp")
    exact = sinkhorn(cost.double(), epsilon=epsilon, max_iter=2000, backend="cpp")
    for name in ("f", "g"):
        assert (getattr(actual, name) - getattr(exact, name)).abs().max() < 2e-6 * epsilon, name


@pytest.mark.parametrize("backend", ("eager", "cpp"))
def test_epsilon_of_1e_4_of_the_cost_in_float32(backend, device_for):
    cost = torch.rand(4, 24, 24, generator=torch.Generator().manual_seed(5)) * 3
    device_for("sinkhorn", backend)
    arguments = {"epsilon": 3e-4, "max_iter": 500}
    exact = sinkhorn(cost.double(), **arguments, backend="eager")
    actual, eager = sinkhorn(cost, **arguments, backend=backend), sinkhorn(cost, **arguments, backend="eager")
    assert actual.plan.isfinite().all() and torch.allclose(actual.plan.sum(-1), torch.full((4, 24), 1 / 24), rtol=1e-3)
    assert_close(actual.plan, exact.plan, eager.plan, "plan")


@pytest.mark.parametrize(
    "name, capability, kilobytes, reason",
    (
        ("A100", (8, 0), 163, None),
        ("H200", (9, 0), 227, None),
        ("T4", (7, 5), 64, "it needs compute capability 8.0 and 163 KB of shared memory for a block; T4 has 7.5 and 64 KB"),
        ("L4", (8, 9), 99, "it needs compute capability 8.0 and 163 KB of shared memory for a block; L4 has 8.9 and 99 KB"),
    ),
)
def test_devices_without_room_for_the_cuda_kernels(name, capability, kilobytes, reason, monkeypatch):
    device = SimpleNamespace(name=name, major=capability[0], minor=capability[1], shared_memory_per_block_optin=kilobytes * 1024)
    for function, value in (("get_device_properties", device), ("is_available", True), ("device_count", 1)):
        monkeypatch.setattr(torch.cuda, function, lambda *_, value=value: value)
    monkeypatch.setattr(_registry._native, "missing", lambda extension: None)
    _registry._device_refuses.cache_clear()
    try:
        assert _registry.CUDA.unavailable() == reason
        assert _registry.cuda_refuses(SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))) == reason
    finally:
        _registry._device_refuses.cache_clear()


def test_backend_choice(monkeypatch):
    cost = torch.rand(2, 3, 4)
    with pytest.raises(ValueError, match="unknown back end 'fast'"):
        sinkhorn(cost, backend="fast")
    with pytest.raises(ValueError, match="HELO_FAST_BACKEND.*nonsense"):
        monkeypatch.setenv("HELO_FAST_BACKEND", "nonsense")
        sinkhorn(cost)
    monkeypatch.delenv("HELO_FAST_BACKEND")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="'cuda' was asked for and cannot serve"), helo_fast.backend("cuda"):
            sinkhorn(cost)
        with helo_fast.backend("cuda"):  # the argument beats the context
            assert sinkhorn(cost, backend="eager").plan.shape == (2, 3, 4)
