"""Triton kernels: values on a GPU or, in a process of its own, under Triton's interpreter; registers and shared memory without a GPU."""

import contextlib
import itertools
import os
import re
import subprocess
import sys

import pytest
import torch

from helo_fast import _registry, sinkhorn
from helo_fast.testing import SINKHORN_CASES, assert_close, layouts

pytest.importorskip("triton", reason='triton is not installed: pip install "helo-fast[triton]"')

DTYPES = (torch.float32, torch.float64)
VALUES = ("plan", "f", "g", "transport_cost", "marginal_error")
CASES = [case for case in SINKHORN_CASES if case != "tall"]  # 130 rows are refused: test_kernel_refuses_by_name
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may use on sm_80 and sm_90


def arguments_of(case, dtype, device):
    arguments = SINKHORN_CASES[case](dtype, device)
    if device == "cpu":  # the interpreter takes milliseconds an iteration
        arguments["max_iter"] = min(arguments.get("max_iter", 100), 60 if "tol" in arguments else 12)
    return arguments


@contextlib.contextmanager
def poisoned_memory(device):
    """torch.empty gives NaN and the largest integers: an output that is not written in full shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=device).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_kernel_values_against_float64(case, dtype, device_for):
    device = device_for("sinkhorn", "triton")
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
def test_kernel_reads_any_strides(dtype, device_for):
    arguments = SINKHORN_CASES["rectangular"](dtype, device_for("sinkhorn", "triton"))
    options = {"max_iter": 5, "backend": "triton"}
    expected = sinkhorn(**arguments, **options)
    inputs = [list(layouts(arguments[k])) for k in ("cost", "a", "b")]
    for (name, cost), (_, a), (_, b) in zip(*inputs):
        assert torch.allclose(sinkhorn(cost, a, b, **options).plan, expected.plan, atol=1e-7, rtol=0), name
    cost, a, b = (arguments[k][:1] for k in ("cost", "a", "b"))
    expanded = sinkhorn(cost.expand(3, -1, -1), a.expand(3, -1), b.expand(3, -1), **options).plan
    assert torch.allclose(expanded, expected.plan[:1].expand(3, -1, -1), atol=1e-7, rtol=0)


def test_kernel_offsets_are_64_bit(device_for, tmp_path):
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


def test_kernel_keeps_the_history(device_for):
    device = device_for("sinkhorn", "triton")
    arguments = arguments_of("until_tolerance", torch.float64, device)
    inputs = arguments["cost"], torch.full((6, 20), 1 / 20, device=device).double(), torch.full((6, 16), 1 / 16, device=device).double()
    options = (arguments["epsilon"], arguments["max_iter"], 1e-3, 10, None, None, "unrolled")
    with poisoned_memory(device):
        *_, n_iter, _, history = torch.ops.helo_fast.sinkhorn_fwd(*inputs, *options, "triton")
    *_, expected = torch.ops.helo_fast.sinkhorn_fwd(*inputs, *options, "eager")
    ran = torch.arange(arguments["max_iter"], device=device) < n_iter.unsqueeze(-1)
    assert n_iter.min() < arguments["max_iter"] and torch.allclose(history[ran], expected[ran], atol=1e-12) and (history[~ran] == 0).all()


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


def test_kernel_refuses_by_name(device_for, monkeypatch):
    device = device_for("sinkhorn", "triton")
    for shape, dtype in (((1, 129, 3), torch.float32), ((1, 128, 65), torch.float32), ((1, 64, 65), torch.float64)):
        cost = torch.rand(shape, dtype=dtype, device=device)
        with pytest.raises(RuntimeError, match=f"'triton' was asked for and cannot serve.*registers.*got {shape[1]} x {shape[2]}"):
            sinkhorn(cost, backend="triton")
        monkeypatch.setitem(_registry._auto, "sinkhorn", {device: ("triton", "eager")})
        assert _registry.auto_choice("sinkhorn", cost) == "eager"
    assert _registry.auto_choice("sinkhorn", cost[:, :, :64]) == "triton"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, and too many problems for the interpreter")
def test_batch_beyond_65535():
    cost = torch.rand(70_001, 2, 3, device="cuda")
    result = sinkhorn(cost, max_iter=50, backend="triton")
    assert torch.allclose(result.plan[-2:], sinkhorn(cost[-2:], max_iter=50, backend="eager").plan, atol=1e-6)
    assert torch.allclose(result.plan.sum(-1), torch.full_like(result.plan.sum(-1), 1 / 2), atol=1e-6)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's")
def test_under_the_interpreter():
    """Runs this file's test_kernel_* on the CPU in a child: Triton reads TRITON_INTERPRET once, when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = ["-q", "-k", "test_kernel", "--require-backend", "triton", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, *options], env=environment, capture_output=True, text=True, timeout=500
    )
    assert child.returncode == 0, f"{child.stdout}\n{child.stderr}"
    passed = re.search(r"(\d+) passed", child.stdout)
    assert passed and int(passed[1]) >= 2 * len(CASES) and "skipped" not in child.stdout, child.stdout


def test_triton_is_imported_only_when_it_runs():
    script = "import sys, torch; before = 'triton' in sys.modules; import helo_fast; helo_fast.sinkhorn(torch.rand(2, 3, 3)); "
    script += "assert ('triton' in sys.modules) == before, 'helo_fast imported triton'"
    subprocess.run([sys.executable, "-c", script], check=True)


def compiled(arch, dtype, BLOCK_N, BLOCK_M):
    """The kernel for sm_<arch>, as the launcher has it compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from helo_fast.kernels import sinkhorn as kernels

    kernel = kernels._sinkhorn_fwd_kernel
    pointers = kernel.arg_names[: kernel.arg_names.index("cost_stride_b")]
    constants = {"BLOCK_N": BLOCK_N, "BLOCK_M": BLOCK_M, "a_stride_n": 1, "b_stride_m": 1}
    signature = {parameter.name: parameter.annotation_type or "i32" for parameter in kernel.params}
    signature |= dict.fromkeys(pointers, {4: "*fp32", 8: "*fp64"}[dtype.itemsize]) | {"n_iter": "*i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=kernels.compiler_options(BLOCK_N, BLOCK_M, dtype))


def resources(cubin, folder):
    """(registers, bytes of stack, bytes of local memory) of a compiled kernel; what it spills is in the last two."""
    from triton import knobs

    (folder / "kernel.cubin").write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(folder / "kernel.cubin")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed.stdout + printed.stderr)
    assert found, f"cuobjdump prints no resource usage:\n{printed.stdout}{printed.stderr}"
    return tuple(map(int, found.groups()))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_tile_compiles_without_spills(arch, dtype, tmp_path):
    from helo_fast.kernels import sinkhorn as kernels

    spills, count = [], 0
    for BLOCK_N, BLOCK_M in itertools.product((16, 32, 64, 128, 256), repeat=2):
        if kernels.refuses(torch.empty(1, BLOCK_N, BLOCK_M, dtype=dtype, device="meta")) is not None:
            continue
        kernel = compiled(arch, dtype, BLOCK_N, BLOCK_M)
        registers, stack, local = resources(kernel.asm["cubin"], tmp_path)
        warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
        line = f"{BLOCK_N} x {BLOCK_M}: {warps} warps, {registers} registers, {stack + local} bytes spilled, {shared} bytes shared"
        print(f"sm_{arch} {dtype} {line}")
        count += 1
        if stack or local or shared > SHARED_MEMORY[arch]:
            spills.append(line)
    assert count >= 13 and not spills, "\n".join(spills)
