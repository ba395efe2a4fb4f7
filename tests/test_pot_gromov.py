"""helo_fast.pot.solve_gromov_batch beside POT's own."""

import numpy as np
import pytest
import torch

from helo_fast.pot import solve_batch, solve_gromov_batch
from helo_fast.testing import assert_close

from .test_pot import EXACT, M_, B, N, assert_same, assert_same_gradients, both

REG = 0.1


def spaces(dtype=torch.float64, symmetric=True, width=None, given=True, fused=False, grad=False):
    generator = torch.Generator().manual_seed(2)

    def cost(size):
        C = torch.rand(B, size, size, *([width] if width else []), generator=generator, dtype=torch.float64) + 0.05
        return (C + C.transpose(1, 2)) / 2 if symmetric else C

    arguments = {"Ca": cost(N), "Cb": cost(M_)}
    if given:
        masses = [torch.rand(B, size, generator=generator, dtype=torch.float64) + 0.1 for size in (N, M_)]
        arguments |= {name: mass / mass.sum(-1, keepdim=True) for name, mass in zip("ab", masses)}
    if fused:
        arguments["M"] = torch.rand(B, N, M_, generator=generator, dtype=torch.float64)
    arguments = {name: value.to(dtype).requires_grad_(grad) for name, value in arguments.items()}
    return arguments | ({"alpha": 0.3} if fused else {})


def pair(arguments, **options):
    return both("solve_gromov_batch", **arguments, reg=REG, **options)


@pytest.mark.parametrize("fused", (False, True), ids=("plain", "fused"))
@pytest.mark.parametrize("given", (False, True), ids=("uniform", "marginals"))
@pytest.mark.parametrize("symmetric", (True, False), ids=("symmetric", "asymmetric"))
@pytest.mark.parametrize("width", (None, 2), ids=("scalars", "vectors"))
def test_iterates_are_pots(width, symmetric, given, fused):
    ours, theirs = pair(
        spaces(symmetric=symmetric, width=width, given=given, fused=fused), max_iter=4, max_iter_inner=11, tol_inner=0, tol=0
    )
    assert_same(ours, theirs, **EXACT)
    assert ours.log["n_iter"] == theirs.log["n_iter"] == 3


@pytest.mark.parametrize("symmetric", (None, True, False))
def test_symmetric_is_found_or_believed(symmetric):
    ours, theirs = pair(spaces(symmetric=False), symmetric=symmetric, max_iter=3, max_iter_inner=5, tol_inner=0)
    assert_same(ours, theirs, **EXACT)


@pytest.mark.parametrize("logits", (True, False))
def test_kl_loss(logits):
    arguments = spaces(width=3)
    if logits:
        arguments["Ca"] = arguments["Ca"].log()
    ours, theirs = pair(arguments, loss="kl", logits=logits, max_iter=3, max_iter_inner=5, tol_inner=0)
    assert_same(ours, theirs, **EXACT)


@pytest.mark.parametrize("grad", ("detach", "envelope", "autodiff"))
@pytest.mark.parametrize("fused", (False, True), ids=("plain", "fused"))
@pytest.mark.parametrize("symmetric", (True, False), ids=("symmetric", "asymmetric"))
def test_gradients_are_pots(symmetric, fused, grad):
    arguments = spaces(symmetric=symmetric, fused=fused, grad=True)
    ours, theirs = pair(arguments, symmetric=symmetric, max_iter=3, max_iter_inner=6, tol_inner=0, tol=0, grad=grad)
    assert_same(ours, theirs, **EXACT)
    assert ours.value.requires_grad == (grad != "detach") and ours.plan.requires_grad == (grad == "autodiff")
    inputs = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    names = ["value", "value_quad", *(["value_linear"] if fused else [])]
    names += ["plan", "potential_a", "potential_b"] if grad == "autodiff" else []
    assert_same_gradients(ours, theirs, inputs, names)


@pytest.mark.parametrize("kind", ("numpy", "torch"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_kinds_and_dtypes_at_pots_defaults(kind, dtype):
    arguments = {name: t.numpy() if kind == "numpy" else t for name, t in spaces(dtype).items()}
    ours, theirs = both("solve_gromov_batch", **arguments)
    assert type(ours.plan) is type(theirs.plan) and ours.plan.dtype == theirs.plan.dtype
    np.testing.assert_allclose(ours.plan, theirs.plan, atol=2e-3)  # 50 steps at a tenth of the entropy amplify the inner tolerance
    np.testing.assert_allclose(ours.value, theirs.value, atol=1e-4)


@pytest.mark.parametrize("reg", (1e-2, 0.1, 10.0))
def test_float32_is_as_accurate_as_pots(reg):
    options = {"reg": reg, "max_iter": 5, "tol": 0, "max_iter_inner": 20, "tol_inner": 0}
    exact = both("solve_gromov_batch", **spaces(), **options)[1]
    ours, theirs = both("solve_gromov_batch", **spaces(torch.float32), **options)
    for name in ("plan", "value", "value_quad"):
        assert_close(getattr(ours, name), getattr(exact, name), getattr(theirs, name), what=name)


def test_start_and_stop():
    arguments = spaces()
    start = solve_batch(torch.rand(B, N, M_, generator=torch.Generator().manual_seed(3)).double(), 0.2, arguments["a"], arguments["b"]).plan
    ours, theirs = pair(arguments, T_init=start, max_iter=3, max_iter_inner=5, tol_inner=0)
    assert_same(ours, theirs, **EXACT)
    ours, theirs = pair(arguments, tol=1e-3, max_iter=50, tol_inner=0, max_iter_inner=30)
    assert 0 < ours.log["n_iter"] == theirs.log["n_iter"] < 49
    assert_same(ours, theirs, rtol=1e-6, atol=1e-9)


def test_zero_mass_rows_hold_zeros():
    arguments = spaces(grad=True)
    with torch.no_grad():
        arguments["a"][0, 1], arguments["b"][2, 3] = 0, 0
        for name in "ab":
            arguments[name] /= arguments[name].sum(-1, keepdim=True)
    result = solve_gromov_batch(**arguments, reg=REG, max_iter=3, grad="autodiff")
    assert result.plan[0, 1].abs().max() == 0 and result.plan[2, :, 3].abs().max() == 0
    found = torch.autograd.grad(result.value.sum(), list(arguments.values()))
    assert result.value.isfinite().all() and all(grad.isfinite().all() for grad in found)


GIVEN = spaces(fused=True)
BAD = {
    "loss": ({"loss": "l1"}, ValueError, "loss must be 'sqeuclidean'"),
    "grad": ({"grad": "last_step"}, ValueError, "grad must be one of 'detach', 'autodiff', 'envelope'"),
    "M alone": ({"alpha": None}, ValueError, "M is given without alpha"),
    "alpha alone": ({"M": None}, ValueError, "alpha is given without M"),
    "alpha": ({"alpha": 1.5}, ValueError, r"alpha must be a number in \[0, 1\]"),
    "reg": ({"reg": 0}, ValueError, "reg must be a finite number above 0"),
    "shape of M": ({"M": GIVEN["M"][:, :-1]}, ValueError, r"M must be \[3, 7, 5\]"),
    "shape of T_init": ({"T_init": GIVEN["M"].mT}, ValueError, "T_init must be"),
    "not square": ({"Ca": GIVEN["M"]}, ValueError, "Ca must be square"),
    "batch sizes": ({"Cb": GIVEN["Cb"][:2]}, ValueError, "Cb must have Ca's batch size"),
    "logits": ({"loss": "kl"}, ValueError, "logits must be True"),
    "kl of scalars": ({"loss": "kl", "logits": False}, ValueError, r"Cb must be \[B, m, m, d\]"),
    "kind": ({"Cb": GIVEN["Cb"].numpy()}, TypeError, "Cb is a ndarray but Ca a Tensor"),
    "mass": ({"a": 3 * GIVEN["a"]}, ValueError, "a and b must have equal mass"),
    "max_iter_inner": ({"max_iter_inner": 0}, ValueError, "max_iter_inner must be at least 1"),
}


@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=f"solve_gromov_batch: {message}"):
        solve_gromov_batch(**GIVEN | changes)
