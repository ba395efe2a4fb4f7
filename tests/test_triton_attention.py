"""lcd_attention's Triton kernels: values on a GPU or, in a process of its own, under Triton's interpreter (see test_triton.py)."""

from __future__ import annotations

import math

import pytest
import torch

from helo_fast.ops.attention import lcd_attention, philox
from helo_fast.testing import ATTENTION_BIASES, assert_attention_close, attention_inputs, attention_results, poisoned_memory

P = {"dropkey_p": 0.5, "dropout_p": 0.3, "seed": 17}


@pytest.fixture
def device(device_for):
    return device_for("lcd_attention", "triton")


# Every entry of the table of tiles; sides shorter and longer than a block; the widest d.
SIZES = [(1, 1, 1, 1, 1), (2, 2, 3, 17, 4), (1, 1, 36, 36, 32), (1, 1, 50, 5, 33), (1, 1, 3, 52, 100), (1, 1, 5, 3, 256)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, H, n, m, d", SIZES)
def test_values_against_float64(B, H, n, m, d, dtype, device):
    inputs, grad_out = attention_inputs(B, H, n, m, d, dtype=dtype, device=device)
    with poisoned_memory(device):
        assert_attention_close(inputs, grad_out, "triton", **P)


@pytest.mark.parametrize("bias, shared", [(bias, False) for bias in ATTENTION_BIASES] + [("none", True), ("n m", True), ("B H n m", True)])
@pytest.mark.parametrize("parts", [1, 4, 1024])
def test_sums_over_what_was_broadcast(bias, shared, parts, device, monkeypatch):
    """Everything in one part, a few heads or batch items in each, and a part for each head; halves too, where they are stored."""
    from helo_fast.kernels import attention_bwd

    monkeypatch.setattr(attention_bwd, "MOST_PARTS", parts)
    inputs, grad_out = attention_inputs(3, 2, 3, 5, 4, bias, shared, torch.float16 if parts == 4 else torch.float32, device)
    assert_attention_close(inputs, grad_out, "triton", **P)


@pytest.mark.parametrize("options", [{}, {"dropkey_p": 1.0, "seed": 0}, {"dropout_p": 0.5, "seed": -1}, {"scale": -0.7}, {"scale": 0.0}])
def test_options(options, device):
    inputs, grad_out = attention_inputs(1, 2, 5, 18, 6, dtype=torch.float32, device=device)
    assert_attention_close(inputs, grad_out, "triton", **options)


@pytest.mark.parametrize("n, m, seed", [(5, 7, 0), (5, 7, 0x123456789ABCDEF), (18, 34, -1)])
def test_masks_are_those_of_the_layout_bit_for_bit(n, m, seed, device):
    """Equal logits and v = 1: a weight shows in the output as 0, or as the rescale over the number of keys that its row keeps."""
    B, H, dropkey_p, dropout_p = 2, 2, 0.37, 0.41
    problems = philox.problems(range(B), range(H), H, torch.device(device))
    drop, keep = philox.masks(torch.tensor(seed, device=device), problems, n, m, dropkey_p, dropout_p)
    flat = drop.all(-1, keepdim=True)
    kept = torch.where(flat, m, (~drop).sum(-1, keepdim=True))
    expected = ((~drop | flat) & keep).float() * (philox.dropout_rescale(dropout_p) / kept)
    q, k = torch.zeros(B, H, n, m, device=device), torch.zeros(B, H, m, m, device=device)
    v = torch.eye(m, device=device).repeat(B, H, 1, 1).requires_grad_()
    out = lcd_attention(q, k, v, dropkey_p=dropkey_p, dropout_p=dropout_p, seed=seed, backend="triton")
    assert torch.equal(out != 0, expected != 0)
    torch.testing.assert_close(out, expected)
    (dv,) = torch.autograd.grad(out, v, torch.eye(n, m, device=device).expand(B, H, n, m))
    assert torch.equal(dv[..., :n] != 0, expected.mT != 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e12, -3e38])
def test_special_biases_as_in_the_reference(value, device):
    """One entry of row 0, more than a step of row 1, all of row 2."""
    (q, k, v, bias), grad_out = attention_inputs(1, 2, 4, 20, 4, dtype=torch.float32, device=device)
    with torch.no_grad():
        bias[:, :, 0, 2] = bias[:, :, 1, :17] = bias[:, :, 2] = value
    for options in ({}, P, {"dropkey_p": 1.0, "seed": 0}):
        actual, expected = (attention_results([q, k, v, bias], grad_out, name, **options) for name in ("triton", "eager"))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [lambda x: x.mT.contiguous().mT, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)])
def test_strided_inputs_and_incoming_gradients(layout, device):
    inputs, grad_out = attention_inputs(2, 3, 5, 7, 6, dtype=torch.float32, device=device)
    expected = attention_results(inputs, grad_out, "triton", **P)
    strided = [layout(x.detach()).requires_grad_() for x in inputs]
    assert not strided[0].is_contiguous()
    assert all(map(torch.equal, expected, attention_results(strided, layout(grad_out), "triton", **P)))


def test_expanded_inputs_and_incoming_gradients(device):
    inputs, _ = attention_inputs(2, 3, 5, 7, 6, dtype=torch.float32, device=device)
    expanded = [x.detach()[:1].expand_as(x).requires_grad_() for x in inputs]
    copied = [x.detach().clone().requires_grad_() for x in expanded]
    constant = torch.full((), 0.5, device=device).expand(2, 3, 5, 6)
    expected = attention_results(copied, constant.contiguous(), "triton", **P)
    assert all(map(torch.equal, expected, attention_results(expanded, constant, "triton", **P)))


def test_offsets_are_64_bit(device, tmp_path):
    stride = 2**31 + 16
    if device == "cpu":  # a sparse file takes neither memory nor disk
        storage = torch.from_file(str(tmp_path / "sparse"), shared=True, size=stride + 32, dtype=torch.float16)
    else:
        storage = torch.empty(stride + 32, device=device, dtype=torch.float16)
    (q, k, v), grad_out = attention_inputs(2, 1, 3, 5, 4, "none", dtype=torch.float16, device=device)
    far = storage.as_strided(k.shape, (stride, 1, 4, 1)).copy_(k.detach())  # batch item 1 begins past 2**31 entries
    assert far.stride(0) > 2**31
    expected = attention_results([q, k, v], grad_out, "triton", **P)
    assert all(map(torch.equal, expected, attention_results([q, far.requires_grad_(), v], grad_out, "triton", **P)))


@pytest.mark.parametrize("bias", ["n m", "B H n m"])
def test_empty_batch(bias, device):
    inputs, grad_out = attention_inputs(0, 2, 3, 4, 5, bias, True, torch.float32, device)
    output, dq, dk, dv, dbias = attention_results(inputs, grad_out, "triton", **P)
    assert output.shape == (0, 2, 3, 5) and dk.shape == dv.shape == (0, 2, 4, 5)
    assert dq.shape == (1, 2, 3, 5) and not dq.any() and dbias.shape == inputs[3].shape and not dbias.any()


def test_a_head_does_not_depend_on_its_batch_mates(device):
    (q, k, v, bias), _ = attention_inputs(3, 2, 5, 18, 4, dtype=torch.float32, device=device)
    together = lcd_attention(q, k, v, bias, backend="triton")
    assert torch.equal(lcd_attention(q[2:], k[2:], v[2:], bias[2:], backend="triton"), together[2:])


def test_joining_heads_copies_nothing(device):
    inputs, grad_out = attention_inputs(2, 3, 4, 5, 6, dtype=torch.bfloat16, device=device)
    for result in attention_results(inputs, grad_out, "triton", **P)[:4]:
        assert result.transpose(1, 2).is_contiguous()


def test_a_kernel_is_not_compiled_for_each_batch_size():
    """It is for each distance between rows: of q, k and v of their own, of heads joined, and of the three side by side in one tensor."""
    from helo_fast.kernels.attention_tile import readable

    B, H, n, d = 5, 2, 3, 4
    few = torch.rand(B, H, n, d), torch.rand(B, n, H, d).transpose(1, 2), torch.rand(B, n, 3, H, d)[:, :, 1].transpose(1, 2)
    assert all(readable(t) is t for t in few)
    by_sequence = torch.rand(n, B, H, d).permute(1, 2, 0, 3)
    copy = readable(by_sequence)
    assert copy.is_contiguous() and torch.equal(copy, by_sequence)


def test_opcheck(device):
    inputs, grad_out = attention_inputs(2, 1, 2, 3, 2, "n m", True, torch.float32, device)
    q, k, v, bias = inputs
    seed = torch.tensor(3, device=device)
    arguments = q, k, v, bias[None, None].detach().requires_grad_(), seed, 0.7, 0.5, 0.3, "triton"
    checks = "test_schema", "test_faketensor", "test_aot_dispatch_static"
    torch.library.opcheck(torch.ops.helo_fast.lcd_attention_fwd.default, arguments, test_utils=checks)


def test_refuses_by_name(device):
    q = torch.zeros(1, 1, 2, 257, device=device)
    with pytest.raises(RuntimeError, match="'triton' was asked for and cannot serve.*d may be 256 at most, got 257"):
        lcd_attention(q, q, q, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, and too many heads for the interpreter")
def test_batch_beyond_65535():
    inputs, grad_out = attention_inputs(70_001, 1, 2, 3, 2, dtype=torch.float32, device="cuda")
    assert_attention_close(inputs, grad_out, "triton", **P)
