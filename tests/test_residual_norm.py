"""residual_norm: every back end against PyTorch with the same mask, custom-op rules, errors."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F

from helo_fast.ops.attention import philox
from helo_fast.ops.residual_norm import api, residual_norm
from helo_fast.testing import assert_close, layouts

BACKENDS = ["eager", "cpp"]  # a new back end joins every test here
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(5, 7, 128), (3, 13), (300, 4), (2, 1), (1, 300), (9,), (70000, 3)]


@pytest.fixture(params=BACKENDS)
def backend(request, device_for):
    device_for("residual_norm", request.param)
    return request.param


def make(shape=(6, 5, 12), dtype=torch.float64, parameters=None):
    """[x, y, weight, bias], leaves."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((shape, dtype), (shape, dtype), (shape[-1:], parameters or dtype), (shape[-1:], parameters or dtype))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(d).requires_grad_() for s, d in shapes]


def literal(x, y, weight, bias, p=0.0, seed=0, eps=1e-5):
    """The formula in PyTorch's own operations, with the mask that the documented layout drops."""
    _, keep = philox.masks(torch.tensor(seed), torch.tensor(0), x.shape[:-1].numel(), x.shape[-1], 0.0, p)
    dropped = y if keep is None else y * keep.view(y.shape).to(y.dtype) * philox.dropout_rescale(p)
    return F.layer_norm(x + dropped, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def gradients(output, inputs):
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, direction)]


def assert_all_close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_torch(backend, shape, p):
    inputs = make(shape)
    expected = gradients(literal(*inputs, p, seed=17, eps=1e-3), inputs)
    assert_all_close(gradients(residual_norm(*inputs, dropout_p=p, seed=17, eps=1e-3, backend=backend), inputs), expected)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype, parameters", [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)], ids=str)
def test_error_bound_per_dtype(backend, dtype, parameters, p):
    inputs = make((64, 36, 128), dtype, parameters)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = gradients(literal(*exact, p), exact)
    plain = gradients(literal(*inputs, p), inputs)
    ours = gradients(residual_norm(*inputs, dropout_p=p, seed=0, backend=backend), inputs)
    for actual, exact, eager in zip(ours, truth, plain, strict=True):
        assert_close(actual, exact, eager)


def test_layouts(backend):
    inputs = make()
    expected = gradients(residual_norm(*inputs, dropout_p=0.5, seed=1, backend=backend), inputs)
    for names_and_views in zip(*(layouts(t.detach()) for t in inputs[:2])):
        strided = [view.requires_grad_() for _, view in names_and_views] + inputs[2:]
        assert_all_close(gradients(residual_norm(*strided, dropout_p=0.5, seed=1, backend=backend), strided), expected)


def test_expanded_inputs_and_gradients(backend):
    x, y, weight, bias = make()
    shared = x.detach()[0].requires_grad_()
    output = residual_norm(shared.expand(y.shape), y, weight, bias, backend=backend)
    expected = literal(shared.expand(y.shape), y, weight, bias)
    inputs, constant = (shared, y, weight, bias), torch.tensor(0.5, dtype=torch.float64).expand(y.shape)
    assert_all_close(torch.autograd.grad(output, inputs, constant), torch.autograd.grad(expected, inputs, constant))


def test_empty_batch(backend):
    inputs = make((0, 5, 4))
    output = residual_norm(*inputs, dropout_p=0.5, backend=backend)
    assert output.shape == (0, 5, 4)
    assert not any(grad.any() for grad in torch.autograd.grad(output.sum(), inputs))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradcheck(backend, p):
    assert torch.autograd.gradcheck(lambda *x: residual_norm(*x, dropout_p=p, seed=2, backend=backend), make((3, 5)))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, dtype, p):
    inputs, seed = make(dtype=dtype), torch.tensor(3) if p else None
    torch.library.opcheck(torch.ops.helo_fast.residual_norm_fwd.default, (*inputs, seed, p, 1e-5, backend))
    x, y, weight, bias = (t.detach() for t in inputs)
    _, mean, rstd = torch.ops.helo_fast.residual_norm_fwd(x, y, weight, bias, seed, p, 1e-5, backend)
    backward = (torch.ones_like(x), x, y, weight, mean, rstd, seed, p, backend)
    torch.library.opcheck(torch.ops.helo_fast.residual_norm_bwd.default, backward)


@pytest.mark.parametrize("seed, p", [(None, 0.5), (torch.tensor(3), 0.0)])
def test_the_op_wants_a_seed_where_it_draws(seed, p):
    with pytest.raises(ValueError, match="a seed goes with a dropout_p above 0"):
        torch.ops.helo_fast.residual_norm_fwd(*(t.detach() for t in make()), seed, p, 1e-5, "")


def test_compiles_to_one_graph(backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: residual_norm(*x, dropout_p=0.5, seed=4, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (2, 3, 7):
        inputs = make((rows, 5, 12))
        assert_all_close(
            gradients(compiled(*inputs), inputs), gradients(residual_norm(*inputs, dropout_p=0.5, seed=4, backend=backend), inputs)
        )


def test_dropout_has_its_distribution(backend):
    """With x = 0 and eps large, the output is proportional to the dropped y less its row's mean."""
    y = torch.ones(2000, 512)
    torch.manual_seed(0)
    output = residual_norm(0 * y, y, torch.ones(512), torch.zeros(512), dropout_p=0.3, backend=backend)
    dropped = output < 0
    assert abs(dropped.float().mean().item() - 0.3) < 4 * (0.21 / y.numel()) ** 0.5
    assert (dropped.float().mean(0) - 0.3).abs().max() < 6 * (0.21 / 2000) ** 0.5  # no column is special
    assert (dropped.float().mean(1) - 0.3).abs().max() < 6 * (0.21 / 512) ** 0.5  # and no row
    again = residual_norm(0 * y, y, torch.ones(512), torch.zeros(512), dropout_p=0.3, backend=backend)
    assert not torch.equal(output, again)
    torch.manual_seed(0)
    assert torch.equal(output, residual_norm(0 * y, y, torch.ones(512), torch.zeros(512), dropout_p=0.3, backend=backend))


def test_bits_depend_neither_on_threads_nor_on_other_rows(backend):
    inputs = make((400, 9, 20), torch.float32)
    expected = gradients(residual_norm(*inputs, dropout_p=0.5, seed=5, backend=backend), inputs)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert all(map(torch.equal, expected, gradients(residual_norm(*inputs, dropout_p=0.5, seed=5, backend=backend), inputs)))
    finally:
        torch.set_num_threads(threads)
    few = [t[:3].detach() for t in inputs[:2]] + inputs[2:]
    assert torch.equal(residual_norm(*few, dropout_p=0.5, seed=5, backend=backend), expected[0][:3])


def test_autocast_casts_x_and_y(backend):
    inputs = make(dtype=torch.float32)
    half = [t.bfloat16() for t in inputs[:2]]
    expected = residual_norm(*half, *inputs[2:], dropout_p=0.5, seed=6, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        output = residual_norm(*inputs, dropout_p=0.5, seed=6, backend=backend)
        assert residual_norm(*make(), backend=backend).dtype == torch.float64
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)


def test_second_derivatives_are_refused(backend):
    inputs = make()
    (grad,) = torch.autograd.grad(residual_norm(*inputs, backend=backend).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="residual_norm has no second derivative"):
        grad.sum().backward()


ERRORS = [
    ({"x": [1.0]}, TypeError, r"residual_norm: x must be a tensor \[.., D\], got list; use torch.as_tensor\(x\)"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[.., D\], got \[\]; reshape it"),
    ({"y": torch.ones(2, 4)}, ValueError, r"y must be of x's shape, here \[2, 3\], got \[2, 4\]; reshape or slice it"),
    ({"y": torch.ones(2, 3).double()}, TypeError, r"y is torch.float64 but x is torch.float32; use y.to\(x.dtype\)"),
    ({"weight": torch.ones(4)}, ValueError, r"weight must be \[D\], here \[3\], got \[4\]"),
    ({"bias": torch.ones(3).bfloat16()}, TypeError, r"bias is torch.bfloat16 but x torch.float32; use bias.to\(x.dtype\)"),
    ({"bias": torch.ones(3, device="meta")}, ValueError, r"bias is on meta but x on cpu; use bias.to\(x.device\)"),
    ({"x": torch.ones(2, 0), "y": torch.ones(2, 0)}, ValueError, r"x has D = 0, got \[2, 0\]; D must be at least 1"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be a number in \[0, 1\), got 1.0"),
    ({"eps": 0.0}, ValueError, r"eps must be a finite number above 0, got 0.0"),
    ({"seed": 0.5}, TypeError, r"residual_norm: seed must be an int, an int64 tensor or None, got float; use int\(seed\)"),
    ({"backend": "fast"}, ValueError, r"unknown back end 'fast'; choose one of auto, eager"),
    ({"backend": "cuda"}, RuntimeError, r"residual_norm: back end 'cuda' was asked for and cannot serve: it has no kernel"),
]


@pytest.mark.parametrize("replaced, error, message", ERRORS)
def test_errors_name_the_argument_and_the_mend(replaced, error, message):
    arguments = {"x": torch.ones(2, 3), "y": torch.ones(2, 3), "weight": torch.ones(3), "bias": torch.zeros(3), **replaced}
    with pytest.raises(error, match=message):
        residual_norm(**arguments)


def test_documented():
    results = doctest.testmod(api)
    assert results.attempted > 0 and results.failed == 0
