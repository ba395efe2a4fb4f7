"""lcd_attention where kernels differ from the formula: tiles, masks bit for bit, reductions in a fixed order, conversions."""

from __future__ import annotations

import math

import pytest
import torch

from helo_fast.ops.attention import lcd_attention, philox
from helo_fast.testing import ATTENTION_BIASES, assert_attention_close, attention_inputs, attention_results, poisoned_memory

BACKENDS = ["cpp", "cuda"]  # what is not the reference; a new back end joins every test here
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
P = {"dropkey_p": 0.5, "dropout_p": 0.3, "seed": 17}


@pytest.fixture(params=BACKENDS)
def backend(request, device_for):
    with torch.device(device_for("lcd_attention", request.param)):
        yield request.param


def columns(backend):
    """More than one tile; on cuda, whose kernels take one, less: beyond are PyTorch's operations, whose bits vary."""
    return 36 if backend == "cuda" else 70


SIZES = [
    (1, 1, 1, 1, 1),
    (3, 2, 1, 3, 8),
    (2, 2, 3, 1, 100),
    (2, 4, 36, 36, 32),
    (2, 1, 64, 64, 32),
    (2, 1, 64, 65, 8),
    (1, 2, 65, 64, 100),
    (2, 1, 200, 3, 256),
    (1, 2, 3, 200, 256),
    (1, 1, 200, 1000, 8),
    (1, 1, 1000, 65, 32),
    (1, 1, 1000, 1000, 8),
    (3, 1, 200, 64, 1),
]


# Not the halves of many tiles: conversions do not depend on their number.
@pytest.mark.parametrize(
    "B, H, n, m, d, dtype", [(*size, t) for size in SIZES for t in DTYPES if t.itemsize > 2 or size[2] * size[3] <= 20000]
)
def test_tiles(backend, B, H, n, m, d, dtype):
    assert_attention_close(*attention_inputs(B, H, n, m, d, dtype=dtype), backend, **P)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", ATTENTION_BIASES)
@pytest.mark.parametrize("B, H, n, m", [(100, 3, 5, 6), (2, 70, 3, 4), (1, 3, 70, 80), (3, 1, 70, 80), (70, 2, 66, 65)])
def test_sums_over_what_was_broadcast(backend, B, H, n, m, bias, shared):
    """More heads than tasks that add to one gradient, fewer, and one of either; one tile and several."""
    assert_attention_close(*attention_inputs(B, H, n, m, 5, bias, shared, torch.float32), backend, **P)


@pytest.mark.parametrize("layout", [lambda x: x.mT.contiguous().mT, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs_and_incoming_gradients(backend, layout, dtype):
    inputs, grad_out = attention_inputs(2, 3, 36, columns(backend), 32, dtype=dtype)
    expected = attention_results(inputs, grad_out, backend, **P)
    strided = [layout(x.detach()).requires_grad_() for x in inputs]
    assert not strided[0].is_contiguous()
    assert all(map(torch.equal, expected, attention_results(strided, layout(grad_out), backend, **P)))


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 0x123456789ABCDEF])
@pytest.mark.parametrize("n, m", [(1, 1), (5, 7), (36, 36), (70, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_are_those_of_the_layout_bit_for_bit(backend, dtype, n, m, seed):
    """Equal logits and v = 1: a weight shows in the output as 0, or as the rescale over the number of keys that its row keeps."""
    B, H, dropkey_p, dropout_p = 3, 2, 0.37, 0.41
    problem = philox.problems(range(B), range(H), H, torch.get_default_device())
    drop, keep = philox.masks(torch.tensor(seed), problem, n, m, dropkey_p, dropout_p)
    flat = drop.all(-1, keepdim=True)
    kept = torch.where(flat, m, (~drop).sum(-1, keepdim=True))
    expected = ((~drop | flat) & keep).to(dtype) * (philox.dropout_rescale(dropout_p) / kept)
    q, k, v = torch.zeros(B, H, n, m, dtype=dtype), torch.zeros(B, H, m, m, dtype=dtype), torch.eye(m, dtype=dtype).expand(B, H, m, m)
    v = v.clone().requires_grad_()
    out = lcd_attention(q, k, v, dropkey_p=dropkey_p, dropout_p=dropout_p, seed=seed, backend=backend)
    assert torch.equal(out != 0, expected != 0)
    torch.testing.assert_close(out, expected.to(dtype))
    if n <= m:  # the gradient of v repeats the weights, transposed, where the incoming one is the identity
        (dv,) = torch.autograd.grad(out, v, torch.eye(n, m, dtype=dtype).expand(B, H, n, m))
        assert torch.equal(dv[..., :n] != 0, expected.mT != 0)


def test_thresholds_reach_their_ends(backend):
    """DropKey at 1 drops every key, dropout just below 1 keeps one weight in 65,536."""
    v = torch.eye(256).expand(40, 2, 256, 256)
    q = k = torch.zeros(40, 2, 256, 256)
    torch.testing.assert_close(lcd_attention(q, k, v, dropkey_p=1.0, seed=0, backend=backend), torch.full_like(q, 1 / 256))
    kept = lcd_attention(q, k, v, dropout_p=1 - 1e-9, seed=3, backend=backend)
    _, keep = philox.masks(torch.tensor(3), philox.problems(range(40), range(2), 2, torch.get_default_device()), 256, 256, 0.0, 1 - 1e-9)
    torch.testing.assert_close(kept, keep * 256.0)
    assert keep.any()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bias", ATTENTION_BIASES)
@pytest.mark.parametrize("B, H, n, m", [(37, 4, 36, 36), (3, 2, 130, 70)])
def test_bits_do_not_depend_on_the_run_or_on_threads(backend, B, H, n, m, bias, shared):
    inputs, grad_out = attention_inputs(B, H, n, m, 16, bias, shared, torch.float32)
    expected = attention_results(inputs, grad_out, backend, **P)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, expected, attention_results(inputs, grad_out, backend, **P)))
    finally:
        torch.set_num_threads(before)


def test_a_head_does_not_depend_on_its_batch_mates(backend):
    (q, k, v, bias), _ = attention_inputs(9, 3, 36, columns(backend), 32, dtype=torch.float32)
    together = lcd_attention(q, k, v, bias, backend=backend)
    assert torch.equal(lcd_attention(q[4:5], k[4:5], v[4:5], bias[4:5], backend=backend), together[4:5])


@pytest.mark.parametrize("bias", ATTENTION_BIASES)
def test_poisoned_memory(backend, bias):
    """What is allocated without being cleared starts as NaN here, and does not show."""
    inputs, grad_out = attention_inputs(3, 2, 5, columns(backend), 7, bias, True, torch.float32)
    expected = attention_results(inputs, grad_out, backend, **P)
    with poisoned_memory():
        assert all(map(torch.equal, expected, attention_results(inputs, grad_out, backend, **P)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e12, -3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [6, 70])
def test_special_biases_as_in_the_reference(backend, m, dtype, value):
    """One entry of row 0, one tile's worth of row 1, all of row 2."""
    (q, k, v, bias), grad_out = attention_inputs(2, 2, 5, m, 4, dtype=dtype)
    with torch.no_grad():
        bias[:, :, 0, 2] = bias[:, :, 1, :64] = bias[:, :, 2] = value
    for options in ({}, P, {"dropkey_p": 1.0, "seed": 0}):
        actual, expected = (attention_results([q, k, v, bias], grad_out, name, **options) for name in (backend, "eager"))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 1e-30, 40.0])
def test_any_scale(backend, scale):
    assert_attention_close(*attention_inputs(2, 2, 7, columns(backend), 9, dtype=torch.float32), backend, scale=scale, **P)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_of_every_half(backend, dtype):
    """With one key of weight 1, the output is v; with dropout, v times the rescale, rounded as torch rounds."""
    v = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(512, 1, 1, 128)
    zero = torch.zeros_like(v)
    torch.testing.assert_close(lcd_attention(zero, zero, v, backend=backend), v, rtol=0, atol=0, equal_nan=True)
    dropout_p = 0.01
    out = lcd_attention(zero, zero, v, dropout_p=dropout_p, seed=1, backend=backend)
    _, keep = philox.masks(torch.tensor(1), philox.problems(range(512), range(1), 1, torch.get_default_device()), 1, 1, 0.0, dropout_p)
    expected = (v.float() * keep * philox.dropout_rescale(dropout_p)).to(dtype)
    assert keep.float().mean() > 0.9
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
