"""residual_norm's Triton kernels: values on a GPU or, in a process of its own, under Triton's interpreter (see test_triton.py)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from helo_fast.ops.attention import philox
from helo_fast.ops.residual_norm import residual_norm
from helo_fast.testing import assert_close, layouts, poisoned_memory

SHAPES = [(2, 1), (3, 13), (9,), (5, 7, 128), (70, 4), (3, 300), (4, 1030)]  # one tile of each width, rows wider than a tile
DTYPES = [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)]


@pytest.fixture
def device(device_for):
    return device_for("residual_norm", "triton")


def make(shape, device, dtype=torch.float32, parameters=None):
    """([x, y, weight, bias], leaves; the incoming gradient)"""
    generator = torch.Generator().manual_seed(0)
    shapes = [(shape, dtype)] * 2 + [(shape[-1:], parameters or dtype)] * 2 + [(shape, dtype)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(device, d) for s, d in shapes]
    return [t.requires_grad_() for t in tensors[:-1]], tensors[-1]


def literal(x, y, weight, bias, p):
    """The formula in PyTorch's own operations, with the mask that the documented layout drops."""
    seed, problem = (torch.tensor(value, device=x.device) for value in (17, 0))
    _, keep = philox.masks(seed, problem, x.shape[:-1].numel(), x.shape[-1], 0.0, p)
    dropped = y if keep is None else y * keep.view(y.shape).to(y.dtype) * philox.dropout_rescale(p)
    return F.layer_norm(x + dropped, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), 1e-3)


def results(inputs, grad_out, p, function=None):
    out = function(*inputs, p) if function else residual_norm(*inputs, dropout_p=p, seed=17, eps=1e-3, backend="triton")
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


@pytest.mark.parametrize("dtype, parameters, p", [(*DTYPES[1], 0.0), *((*dtypes, 0.3) for dtypes in DTYPES)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_against_float64(shape, dtype, parameters, p, device):
    inputs, grad_out = make(shape, device, dtype, parameters)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with poisoned_memory(device):
        actual = results(inputs, grad_out, p)
    truth, eager = results(exact, grad_out.double(), p, literal), results(inputs, grad_out, p, literal)
    for name, a, t, e in zip(("out", "dx", "dy", "dweight", "dbias"), actual, truth, eager, strict=True):
        assert_close(a, t, e, name)


@pytest.mark.parametrize("shape", [(70, 5), (3, 1030)], ids=str)
def test_parts_add_up(shape, device, monkeypatch):
    """The same sums, in one part or several, and the same bits each time."""
    from helo_fast.kernels import residual_norm as kernels

    inputs, grad_out = make(shape, device, torch.float64)
    expected = results(inputs, grad_out, 0.3, literal)
    for parts in (1, 2, 1024):
        monkeypatch.setattr(kernels, "MOST_PARTS", parts)
        actual = results(inputs, grad_out, 0.3)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
        assert all(map(torch.equal, actual, results(inputs, grad_out, 0.3)))


def test_mask_is_that_of_the_layout_bit_for_bit(device):
    """Where x is 0 and y is 1, an output is below the row's mean, here 0, where y is dropped."""
    rows, D, p = 20, 37, 0.4
    y = torch.ones(rows, D, device=device)
    out = residual_norm(0 * y, y, torch.ones(D, device=device), torch.zeros(D, device=device), dropout_p=p, seed=-5, backend="triton")
    seed, problem = (torch.tensor(value, device=device) for value in (-5, 0))
    _, keep = philox.masks(seed, problem, rows, D, 0.0, p)
    assert torch.equal(out > 0, keep)


def test_strided_and_expanded_inputs_and_gradients(device):
    inputs, grad_out = make((3, 5, 12), device)
    expected = results(inputs, grad_out, 0.5)
    for (name, x), (_, y), (_, grad) in zip(*(layouts(t.detach()) for t in (*inputs[:2], grad_out))):
        strided = [x.requires_grad_(), y.requires_grad_(), *inputs[2:]]
        assert all(map(torch.equal, expected, results(strided, grad, 0.5))), name
    expanded = [inputs[0].detach()[:1].expand(3, 5, 12).requires_grad_(), *inputs[1:]]
    copied = [expanded[0].detach().clone().requires_grad_(), *inputs[1:]]
    constant = torch.tensor(0.5, device=device).expand(3, 5, 12)
    assert all(map(torch.equal, results(copied, constant.contiguous(), 0.5), results(expanded, constant, 0.5)))


def test_empty_batch(device):
    inputs, grad_out = make((0, 5, 4), device)
    out, dx, dy, dweight, dbias = results(inputs, grad_out, 0.5)
    assert out.shape == dx.shape == dy.shape == (0, 5, 4) and not dweight.any() and not dbias.any()


def test_opcheck(device):
    inputs, _ = make((2, 3), device)
    arguments = (*inputs, torch.tensor(3, device=device), 0.5, 1e-5, "triton")
    checks = "test_schema", "test_faketensor", "test_aot_dispatch_static"
    torch.library.opcheck(torch.ops.helo_fast.residual_norm_fwd.default, arguments, test_utils=checks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, and too many blocks for the interpreter")
def test_blocks_beyond_65535():
    inputs, grad_out = make((70_001 * 64, 3), "cuda", torch.float64)
    for a, e in zip(results(inputs, grad_out, 0.3), results(inputs, grad_out, 0.3, literal), strict=True):
        torch.testing.assert_close(a, e)
