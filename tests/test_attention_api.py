"""lcd_attention as PyTorch and its callers meet it: errors, custom-op rules, compile, autocast, what is saved."""

from __future__ import annotations

import contextlib
import doctest
import math

import pytest
import torch

import helo_fast
from helo_fast import _registry
from helo_fast.ops.attention import api, lcd_attention, reference

BACKENDS = ["eager", "cpp", "cuda"]  # a new back end joins every test here
P = {"dropkey_p": 0.5, "dropout_p": 0.3, "seed": 17}
BIASES = {"n m": (5, 6), "B n m": (3, 5, 6), "B 1 n m": (3, 1, 5, 6), "1 H n m": (1, 2, 5, 6), "B H n m": (3, 2, 5, 6)}


@pytest.fixture(params=BACKENDS)
def backend(request, device_for):
    """The back end's name, with the device it runs on as the default one."""
    device = device_for("lcd_attention", request.param)
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield request.param


def make(bias="B H n m", B=3, n=5, m=6, dtype=torch.float64):
    """[q, k, v, bias], leaves; H 2, d 4."""
    torch.manual_seed(0)
    shape = {3: B, 5: n, 6: m}
    shapes = [(B, 2, n, 4), (B, 2, m, 4), (B, 2, m, 4), [shape.get(s, s) for s in BIASES[bias]]]
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def gradients(output, inputs):
    return [output, *torch.autograd.grad(output.square().sum(), inputs)]


def tensors(**replaced):
    q, k, v, bias = (x.detach() for x in make(dtype=torch.float32))  # B 3, H 2, n 5, m 6, d 4
    return {"q": q, "k": k, "v": v, "bias": bias, **replaced}


ERRORS = [
    ({"q": [[1.0]]}, TypeError, r"lcd_attention: q must be a tensor .* got list; use torch.as_tensor\(q\)"),
    ({"k": torch.ones(3, 2, 6, 4, dtype=torch.int64)}, TypeError, r"k must be float32.* got torch.int64; use k.float\(\)"),
    ({"v": torch.ones(3, 2, 6, 4).double()}, TypeError, r"v is torch.float64 but q is torch.float32; use v.to\(q.dtype\)"),
    ({"bias": torch.ones(5, 6).half()}, TypeError, r"bias is torch.float16 but q is torch.float32; use bias.to\(q.dtype\)"),
    ({"k": torch.ones(3, 2, 6, 4, device="meta")}, ValueError, r"k is on meta but q on cpu; use k.to\(q.device\)"),
    ({"q": torch.ones(5, 4)}, ValueError, r"q must be \[B, H, n, d\].*got \[5, 4\]; reshape"),
    ({"q": torch.ones(2, 2, 5, 4)}, ValueError, r"q must be .* \[3, 2, 5, 4\] or \[1, 2, 5, 4\] or \[2, 5, 4\], got \[2, 2, 5, 4\]"),
    ({"q": torch.ones(3, 2, 5, 3)}, ValueError, r"q must be .* with k's B, H and d.*got \[3, 2, 5, 3\]"),
    ({"v": torch.ones(3, 2, 7, 4)}, ValueError, r"v must be of k's shape, here \[3, 2, 6, 4\], got \[3, 2, 7, 4\]"),
    ({"bias": torch.ones(6)}, ValueError, r"bias must be \[n, m\], \[B, n, m\].*got \[6\]"),
    ({"bias": torch.ones(2, 5, 6)}, ValueError, r"bias must be .*got \[2, 5, 6\]"),
    ({"bias": torch.ones(3, 2, 6, 5)}, ValueError, r"bias must be .*got \[3, 2, 6, 5\]"),
    ({"q": torch.ones(3, 2, 0, 4), "bias": None}, ValueError, r"q has n = 0, got \[3, 2, 0, 4\]; .* at least 1"),
    ({"k": torch.ones(3, 2, 0, 4), "v": torch.ones(3, 2, 0, 4), "bias": None}, ValueError, r"k has m = 0"),
    ({"q": torch.ones(3, 2, 5, 0), "k": torch.ones(3, 2, 6, 0), "v": torch.ones(3, 2, 6, 0)}, ValueError, r"q has d = 0"),
    ({"scale": math.nan}, ValueError, r"scale must be a finite number, got nan"),
    ({"scale": torch.tensor(1.0)}, TypeError, r"scale must be a Python number, got a tensor; use scale.item\(\)"),
    ({"dropkey_p": 1.5}, ValueError, r"dropkey_p must be a number in \[0, 1\], got 1.5"),
    ({"dropkey_p": -0.1}, ValueError, r"dropkey_p must be a number in \[0, 1\], got -0.1"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be a number in \[0, 1\), got 1.0"),
    ({"dropout_p": math.nan}, ValueError, r"dropout_p must be a number in \[0, 1\), got nan"),
    ({"seed": 0.5}, TypeError, r"seed must be an int, an int64 tensor or None, got float; use int\(seed\)"),
    ({"seed": 2**63}, ValueError, r"seed must fit int64, got 9223372036854775808; use seed % 2\*\*63"),
    ({"seed": torch.tensor(1.0)}, TypeError, r"seed must be an int or an int64 tensor, got a torch.float32 tensor"),
    ({"seed": torch.tensor([1, 2])}, ValueError, r"seed must hold one element, got \[2\]; index it"),
    ({"seed": torch.tensor(1, device="meta")}, ValueError, r"seed is on meta but q on cpu; use seed.to\(q.device\)"),
    ({"backend": "fast"}, ValueError, r"unknown back end 'fast'; choose one of auto, eager"),
]


@pytest.mark.parametrize("replaced, error, message", ERRORS)
def test_errors_name_the_argument_and_the_mend(replaced, error, message):
    with pytest.raises(error, match=message):
        lcd_attention(**tensors(**replaced))


@pytest.mark.parametrize("name", sorted(set(_registry.BACKENDS) - set(BACKENDS)))
def test_an_explicit_back_end_never_falls_back(name):
    with pytest.raises(RuntimeError, match=f"lcd_attention: back end '{name}' was asked for and cannot serve: .+"):
        lcd_attention(**tensors(), backend=name)


def test_the_op_wants_a_seed_where_it_draws():
    q, k, v, bias = (x.detach() for x in make())
    with pytest.raises(ValueError, match="seed is None but a probability is above 0"):
        torch.ops.helo_fast.lcd_attention_fwd(q, k, v, bias, None, 1.0, 0.5, 0.0, "")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", [None, "1 H n m", "B 1 n m"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, shared, bias, dtype):
    q, k, v, added = make(bias or "B H n m", dtype=dtype)
    q = q.detach()[:1].requires_grad_() if shared else q
    added = None if bias is None else added
    # What is compiled is the same in every dtype; shapes and dtypes of results are not.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    checks += ("test_aot_dispatch_dynamic",) * (dtype == torch.float32)
    for seed, *probabilities in ((torch.tensor(3), 0.5, 0.25), (None, 0.0, 0.0)):
        forward = (q, k, v, added, seed, 0.5, *probabilities, backend)
        torch.library.opcheck(torch.ops.helo_fast.lcd_attention_fwd.default, forward, test_utils=checks)
        out, lse = (x.detach() for x in torch.ops.helo_fast.lcd_attention_fwd(*forward))
        detached = [None if x is None else x.detach() for x in (q, k, v, added)]
        for bias_grad in {False, added is not None}:
            backward = (torch.ones_like(out), *detached, out, lse, seed, 0.5, *probabilities, bias_grad, backend)
            torch.library.opcheck(torch.ops.helo_fast.lcd_attention_bwd.default, backward, test_utils=checks)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", ["n m", "B n m"])
def test_compiles_to_one_graph(backend, shared, bias):
    options = {**P, "scale": 0.3, "backend": backend}
    torch._dynamo.reset()  # each case recompiles the same lambda
    compiled = torch.compile(lambda *x: lcd_attention(*x, **options), fullgraph=True, dynamic=True, backend="aot_eager")
    for B in (2, 3, 7):
        inputs = make(bias, B=B, dtype=torch.float32)
        inputs[0] = inputs[0][0].detach().requires_grad_() if shared else inputs[0]
        expected = gradients(lcd_attention(*inputs, **options), inputs)
        for a, e in zip(gradients(compiled(*inputs), inputs), expected, strict=True):
            torch.testing.assert_close(a, e)


def test_compiled_draws_follow_manual_seed(backend):
    inputs = make(n=20, m=20, dtype=torch.float32)
    # Inductor's cache on disk would bring back a graph with the strides that an earlier version of the op returned.
    options = {"fx_graph_cache": False}
    compiled = torch.compile(lambda *x: lcd_attention(*x, dropkey_p=0.5, backend=backend), fullgraph=True, options=options)
    torch.manual_seed(2)
    first, second = compiled(*inputs), compiled(*inputs)
    torch.manual_seed(2)
    assert torch.equal(first, compiled(*inputs)) and not torch.equal(first, second)


def test_autocast_casts_as_torch_does(backend):
    inputs = make(dtype=torch.float32)
    q, k, v, bias = inputs
    mixed = (q, k.bfloat16(), v, bias)
    expected = lcd_attention(*(x.bfloat16() for x in inputs), **P, backend=backend)
    device = torch.get_default_device().type
    with torch.autocast(device, torch.bfloat16):
        output = lcd_attention(*mixed, **P, backend=backend)
        grads = torch.autograd.grad(output.float().sum(), inputs)
        exact = [x.double() for x in inputs]
        assert lcd_attention(*exact, **P, backend=backend).dtype == torch.float64
        assert reference.lcd_attention(*inputs).dtype == torch.float32
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected.float().sum(), inputs)))
    with torch.autocast(device, torch.bfloat16):  # nothing inside is cast: in float64 it would show
        torch.testing.assert_close(lcd_attention(*exact, backend=backend), lcd_attention(*exact, backend="eager"))
        plain = reference.lcd_attention(*exact)
    torch.testing.assert_close(plain, lcd_attention(*exact, backend=backend))


def test_second_derivatives_are_refused(backend):
    inputs = make()
    (grad,) = torch.autograd.grad(lcd_attention(*inputs, backend=backend).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="lcd_attention has no second derivative"):
        grad.sum().backward()


def test_saves_nothing_of_n_by_m_but_the_bias(backend):
    inputs = make(n=50, m=60)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        lcd_attention(*inputs, **P, backend=backend)
    assert sorted(saved) == sorted([*(tuple(x.shape) for x in inputs), (3, 2, 50, 4), (3, 2, 50), ()])


def test_partial_gradients(backend):
    """Any subset of the inputs may need one."""
    expected = dict(enumerate(gradients(lcd_attention(*(x := make()), **P, backend=backend), x)[1:]))
    for needed in ([0], [1], [2], [3], [0, 3], [1, 2]):
        inputs = [x.detach().requires_grad_(i in needed) for i, x in enumerate(make())]
        wanted = [inputs[i] for i in needed]
        actual = gradients(lcd_attention(*inputs, **P, backend=backend), wanted)[1:]
        assert all(torch.equal(a, expected[i]) for i, a in zip(needed, actual, strict=True))
    assert not lcd_attention(*(x.detach() for x in make()), **P, backend=backend).requires_grad


def test_exported_and_documented():
    assert helo_fast.lcd_attention is lcd_attention
    results = doctest.testmod(api)
    assert results.attempted > 0 and results.failed == 0
