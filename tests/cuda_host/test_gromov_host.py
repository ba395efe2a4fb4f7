"""The CUDA kernels of gromov_from_tokens without a GPU: csrc/common compiled for the host, its lanes taking turns, against float64."""

import math

import pytest
import torch

from helo_fast.ops.gromov import reference
from helo_fast.testing import MASSES, assert_close, hard_masses

SOURCES = ("gromov",)
DTYPES = (torch.float32, torch.float64)
FLAGS = ("plain", "sanitized")
METHODS = ("proximal", "entropic")
OPTIONS = {"threshold": 0.1, "over_batch": False, "alpha": 1.0, "method": "proximal", "epsilon": 0.1, "outer_iter": 3, "inner_iter": 20}


def tokens(n, m, width=19, batch=2, masses="random", dtype=torch.float32, seed=0):
    """(x, y, a, b)"""
    generator = torch.Generator().manual_seed(1000 * n + m + seed)
    drawn = [torch.randn(batch, size, width, generator=generator, dtype=torch.float64) for size in (n, m)]
    return [t.to(dtype) for t in (*drawn, *(hard_masses(masses, batch, size, generator) for size in (n, m)))]


def solve(program, x, y, a, b, cost_xy, options, tol, blocks=2, shift=0):
    """What reference.from_tokens_fwd returns, from the host's program."""
    (batch, n), m = a.shape, b.shape[1]
    threshold, over_batch, alpha, method, epsilon, outer_iter, inner_iter = options
    sizes = (batch, n, m, x.shape[2], outer_iter, inner_iter, method == "entropic", over_batch, cost_xy is not None, blocks, shift)
    numbers = [alpha, threshold, epsilon, -1 if tol is None else tol, 1e-4 if tol is None else tol]
    given = (x, y, a, b, *(() if cost_xy is None else (cost_xy,)))
    wanted = [((batch, n, m), x.dtype), *((((batch,), dtype)) for dtype in (x.dtype, x.dtype, torch.int32, torch.bool))]
    return program((x.dtype,), (torch.tensor(sizes), torch.tensor(numbers, dtype=torch.float64), *given), wanted)


def compare(program, x, y, a, b, what, cost_xy=None, tol=None, shift=0, **given):
    """The program's answer, held to twice the error of eager PyTorch in the same dtype; and the exact one."""
    options = tuple((OPTIONS | given).values())
    inputs = (x, y, a, b, cost_xy)
    actual = solve(program, *inputs, options, tol, shift=shift)
    eager = reference.from_tokens_fwd(*inputs, *options, tol)
    exact = reference.from_tokens_fwd(*(None if t is None else t.double() for t in inputs), *options, tol)
    for name, value, theirs, truth in zip(("plan", "gw_cost", "marginal_error"), actual, eager, exact):
        assert_close(value, truth, theirs, f"{what} {name}")
    assert torch.equal(actual[3], exact[3]) and torch.equal(actual[4], exact[4]), what
    return actual, exact


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_size(method, dtype, programs):
    """Every grid of lanes, full and with a remainder; every alignment of the tokens."""
    program = programs("gromov", "plain")
    for n, m in ((1, 1), (3, 16), (16, 16), (17, 5), (36, 36), (36, 33), (2, 36), (37, 40), (64, 64), (63, 3)):
        width = {16: 64, 36: 128, 33: 68}.get(m, 19)
        compare(program, *tokens(n, m, width, dtype=dtype), f"{n} x {m}", method=method, shift=m % 3)
    largest = {torch.float32: 64, torch.float64: 54}[dtype]  # with a cost across: five matrices in shared memory, the most of all
    compare(program, *tokens(largest, largest, dtype=dtype, batch=1), "largest", method=method, alpha=0.5)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_options(method, dtype, flags, programs):
    """Thresholds over a problem or the batch, costs across that are given or the tokens' own."""
    program = programs("gromov", flags)
    quick = flags == "sanitized" or dtype == torch.float64  # whose team is large
    for n, m in ((7, 9),) if quick else ((7, 9), (20, 36), (40, 5)):
        problem = tokens(n, m, batch=3, dtype=dtype)
        cost_xy = torch.rand(len(problem[0]), n, m, generator=torch.Generator().manual_seed(m), dtype=torch.float64).to(dtype)
        for over_batch in (False, True):
            for threshold in (0.3,) if quick else (0.0, 0.3, 1.0):
                what = f"{n} x {m} at {threshold}, {over_batch}"
                compare(program, *problem, what, method=method, threshold=threshold, over_batch=over_batch)
            for alpha in (0.4,) if quick else (0.0, 0.4):
                compare(program, *problem, f"{n} x {m} cosine", method=method, alpha=alpha, over_batch=over_batch)
                compare(program, *problem, f"{n} x {m} given", cost_xy, method=method, alpha=alpha, over_batch=over_batch)
        compare(program, *problem, f"{n} x {m} without weight", cost_xy, method=method)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masses", MASSES)
def test_hard_problems(masses, dtype, programs):
    """Small epsilon and masses of next to nothing: steps are done again by log-sum-exps. Several problems, as the error of one is luck."""
    program = programs("gromov", "plain")
    for method in METHODS:
        for n, m in ((8, 6), (36, 33)):
            problem = tokens(n, m, batch=8, masses=masses, dtype=dtype)
            for epsilon in (1e-3, 0.02):
                compare(program, *problem, f"{method} {n} x {m} at {epsilon}", method=method, epsilon=epsilon)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("method", METHODS)
def test_no_mass_is_an_exact_zero_and_never_read(method, flags, programs):
    program = programs("gromov", flags)
    x, y, a, b = tokens(7, 5, batch=4, dtype=torch.float64)
    for token, mass, at in ((x, a, 2), (y, b, 4)):
        mass[:, 1] += mass[:, at]
        mass[:, at] = 0
        token[:, at] = math.nan
    actual, exact = compare(program, x, y, a, b, "holes", method=method, alpha=0.5)
    assert (actual[0][:, 2] == 0).all() and (actual[0][:, :, 4] == 0).all() and (actual[0] > 0).any()
    a[0] = b[0] = 0
    actual = solve(program, torch.zeros_like(x), y, a, b, None, tuple((OPTIONS | {"method": method}).values()), None)
    assert (actual[0][0] == 0).all() and actual[1][0] == actual[2][0] == 0 and actual[3].tolist() == [3] * 4 and actual[4][0]
    compare(program, torch.zeros_like(x[1:]), y[1:], a[1:], b[1:], "zero tokens", method=method)


@pytest.mark.parametrize("over_batch", (False, True))
def test_problems_are_apart(over_batch, programs):
    """The share of a block changes nothing: not another problem's masses, nor when it stops."""
    program = programs("gromov", "plain")
    x, y, a, b = tokens(9, 7, batch=6)
    y[::2] = y[::2, :1] + 0.05 * y[::2]  # next to no structure: at rest after a step or two
    options = tuple((OPTIONS | {"over_batch": over_batch, "outer_iter": 8}).values())
    together = solve(program, x, y, a, b, None, options, 1e-3, blocks=1)
    assert together[3].unique().numel() > 1, "the case should stop its problems at different iterations"
    for blocks in (2, 5, 6):
        for one, other in zip(together, solve(program, x, y, a, b, None, options, 1e-3, blocks=blocks)):
            assert torch.equal(one, other), blocks
