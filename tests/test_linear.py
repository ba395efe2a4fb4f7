"""Linear maps by oneDNN: values and gradients against float64, and where torch's own way is taken."""

import pytest
import torch
import torch.nn.functional as F

from helo_fast import backend
from helo_fast.ops import linear as module
from helo_fast.ops.linear import linear, linears
from helo_fast.testing import assert_close

SHAPES = [(512, 300, 128, (128, 128, 128)), (4700, 1, 64, (60,)), (9, 1100, 33, (7, 64, 1))]


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """Its calls, counted."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    assert module._onednn is not None, "torch has oneDNN, but no longer under the name that is called"
    calls, original = [], module._onednn
    monkeypatch.setattr(module, "_onednn", lambda *arguments: calls.append(1) or original(*arguments))
    return calls


def make(batch, rows, K, sizes, dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(batch)
    x, *weights = (torch.randn(shape, generator=generator) for shape in ((batch, rows, K), *((N, K) for N in sizes)))
    grads = [torch.randn(batch, rows, N, generator=generator) for N in sizes]
    given = [x, *weights, *([torch.randn(sizes[0], generator=generator)] if bias else [])]
    return [t.to(dtype).requires_grad_() for t in given], [g.to(dtype) for g in grads]


def results(function, inputs, grads):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return *outputs, *torch.autograd.grad(outputs, inputs, grads)


def plain(x, *weights):
    return tuple(F.linear(x, weight) for weight in weights)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_several_maps_against_float64(shape, onednn):
    actual = results(linears, *make(*shape))
    assert onednn
    eager, exact = results(plain, *make(*shape)), results(plain, *make(*shape, dtype=torch.float64))
    for name, *values in zip(range(len(exact)), actual, exact, eager):
        assert_close(*values, f"result {name}")


@pytest.mark.parametrize("layout", ("contiguous", "transposed", "expanded"))
def test_one_map_with_a_bias(layout, onednn):
    (x, weight, bias), grads = make(400, 40, 64, (32,), bias=True)
    with torch.no_grad():
        x = {"contiguous": x, "transposed": x.mT.contiguous().mT, "expanded": x[:1].expand(400, -1, -1)}[layout].requires_grad_()
    actual, expected = (results(f, (x, weight, bias), grads) for f in (linear, F.linear))
    assert onednn
    for a, e in zip(actual, expected):
        assert a.shape == e.shape and torch.allclose(a, e, rtol=1e-4, atol=1e-3 * e.abs().max().item())


def test_only_the_gradients_asked_for():
    (x, first, second), grads = make(*SHAPES[0][:3], (128, 128))
    first.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(linears(x, first, second), first, grads)
    (d_second,) = torch.autograd.grad(linears(x.detach(), first, second), second, grads)
    assert torch.allclose(d_second, torch.einsum("brn,brk->nk", grads[1], x), rtol=1e-3, atol=1e-2)


def test_second_derivative_is_refused():
    (x, weight), _ = make(*SHAPES[1])
    (d_x,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_x.sum().backward()


def test_elsewhere_torch_does_it(onednn):
    (x, weight), _ = make(*SHAPES[1])
    ways = {
        "the reference": lambda: backend("eager"),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    for name, context in ways.items():
        with context():
            assert torch.equal(linear(x, weight), F.linear(x, weight)), name
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert torch.equal(linear(x[:2], weight), F.linear(x[:2], weight)), "too little work"
    gradient = torch.func.grad(lambda weight: linear(x, weight).sum())(weight.detach())
    assert torch.allclose(gradient, x.sum((0, 1)).expand_as(weight), rtol=1e-3, atol=1e-2)
    compiled = torch.compile(linear, fullgraph=True, backend="eager")(x, weight)
    assert torch.equal(compiled, F.linear(x, weight))
    assert not onednn


def test_without_onednn_torch_does_it(monkeypatch):
    monkeypatch.setattr(module, "_onednn", None)
    (x, weight), _ = make(*SHAPES[1])
    assert torch.equal(linear(x, weight), F.linear(x, weight))
