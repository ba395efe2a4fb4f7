"""lcd_attention: every back end against PyTorch, against plain autograd with the same masks, and at the edges."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import helo_fast
from helo_fast.ops.attention import lcd_attention, philox, reference

BACKENDS = ["eager", "cpp", "triton", "cuda"]  # a new back end joins every test here
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
BIASES = {
    "none": None,
    "n m": lambda B, H, n, m: (n, m),
    "B n m": lambda B, H, n, m: (B, n, m),
    "B 1 n m": lambda B, H, n, m: (B, 1, n, m),
    "B H n m": lambda B, H, n, m: (B, H, n, m),
    "1 H n m": lambda B, H, n, m: (1, H, n, m),
}
QUERIES = {"own": lambda B, H, n, d: (B, H, n, d), "shared": lambda B, H, n, d: (1, H, n, d), "shared 3d": lambda B, H, n, d: (H, n, d)}
P = {"dropkey_p": 0.5, "dropout_p": 0.3, "seed": 17}


@pytest.fixture(params=BACKENDS)
def backend(request, device_for):
    """The back end's name, with the device it runs on as the default one."""
    device = device_for("lcd_attention", request.param)
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield request.param


def make(B=3, H=2, n=5, m=6, d=4, bias="B H n m", query="own", dtype=torch.float64, seed=0):
    """[q, k, v] or [q, k, v, bias], leaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [QUERIES[query](B, H, n, d), (B, H, m, d), (B, H, m, d)] + ([BIASES[bias](B, H, n, m)] if bias != "none" else [])
    return [draw(s, generator).to(dtype).requires_grad_() for s in shapes]


def draw(shape, generator):
    """The same numbers on every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(torch.get_default_device())


def masks(B, H, n, m, dropkey_p=0.0, dropout_p=0.0, seed=0):
    """What the documented layout drops and how it multiplies, for the reference."""
    problem = philox.problems(range(B), range(H), H, torch.get_default_device())
    drop, keep = philox.masks(torch.tensor(seed), problem, n, m, dropkey_p, dropout_p)
    return {"drop": drop, "keep": None if keep is None else keep.double() * philox.dropout_rescale(dropout_p)}


def literal(q, k, v, bias=None, scale=None, drop=None, keep=None):
    """The formula as written, in the tensors' own dtype; all-dropped rows replaced by the constant uniform weights."""
    q = q if q.dim() == 4 else q[None]
    bias = bias[:, None] if bias is not None and bias.dim() == 3 else bias
    logits = (q @ k.transpose(-1, -2) + (0 if bias is None else bias)) * (scale or q.shape[-1] ** -0.5)
    if drop is not None:
        logits = torch.where(drop.all(-1, keepdim=True), 0.0, logits.masked_fill(drop, -math.inf))
    weights = logits.softmax(-1)
    return (weights if keep is None else weights * keep.to(weights.dtype)) @ v


def gradients(output, inputs, seed=1):
    direction = draw(output.shape, torch.Generator().manual_seed(seed)).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, direction)]


def assert_all_close(actual, expected, **tolerance):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("bias", BIASES)
def test_agrees_with_torch(backend, bias, query):
    inputs = make(bias=bias, query=query)
    q, k, v = inputs[:3]
    added = inputs[3] if bias != "none" else None
    added = added[:, None] if bias == "B n m" else added
    expected = F.scaled_dot_product_attention(q.expand(3, 2, 5, 4), k, v, None if added is None else added * 0.7, scale=0.7)
    assert_all_close(gradients(lcd_attention(*inputs, scale=0.7, backend=backend), inputs), gradients(expected, inputs))


@pytest.mark.parametrize("options", [{"dropkey_p": 0.5}, {"dropout_p": 0.3}, {"dropkey_p": 0.6, "dropout_p": 0.5}])
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("bias", BIASES)
def test_agrees_with_autograd_under_the_same_masks(backend, bias, query, options):
    inputs = make(m=3, bias=bias, query=query)  # three keys: many rows are all dropped
    expected = gradients(literal(*inputs, **masks(3, 2, 5, 3, seed=17, **options)), inputs)
    assert_all_close(gradients(lcd_attention(*inputs, seed=17, backend=backend, **options), inputs), expected)
    explicit = reference.lcd_attention(*inputs, **masks(3, 2, 5, 3, seed=17, **options))
    assert_all_close(gradients(explicit, inputs), expected)


SIZES = [
    (2, 1, 1, 1, 1),
    (1, 1, 4, 1, 3),
    (2, 3, 1, 7, 2),
    (1, 2, 3, 5, 256),
    (1, 1, 2, 4096, 2),
    (1, 1, 4096, 3, 1),
    (2, 4, 36, 36, 32),
    (70000, 1, 2, 3, 2),
]


@pytest.mark.parametrize("B, H, n, m, d", SIZES)
def test_sizes(backend, B, H, n, m, d):
    inputs = make(B, H, n, m, d)
    expected = gradients(literal(*inputs, **masks(B, H, n, m, **P)), inputs)
    assert_all_close(gradients(lcd_attention(*inputs, **P, backend=backend), inputs), expected)


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("bias", BIASES)
def test_empty_batch(backend, bias, query):
    inputs = make(B=0, bias=bias, query=query)
    output = lcd_attention(*inputs, **P, backend=backend)
    assert output.shape == (0, 2, 5, 4)
    for grad, x in zip(torch.autograd.grad(output.sum(), inputs), inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("piece", [1, 40, 100, 250])
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("bias", BIASES)
def test_eager_in_pieces(monkeypatch, bias, query, piece):
    inputs = make(B=5, H=3, n=5, m=6, bias=bias, query=query)
    expected = gradients(lcd_attention(*inputs, **P, backend="eager"), inputs)
    monkeypatch.setattr(reference, "PIECE", piece)
    assert_all_close(gradients(lcd_attention(*inputs, **P, backend="eager"), inputs), expected)


def transposed(x):
    return x.transpose(-2, -3).contiguous().transpose(-2, -3)


def sliced(x):
    """Every second entry of NaN-poisoned memory, past an offset."""
    memory = torch.full([2 * s + 1 for s in x.shape], math.nan, dtype=x.dtype)
    view = memory[tuple(slice(1, None, 2) for _ in x.shape)]
    return view.copy_(x)


@pytest.mark.parametrize("layout", [transposed, sliced])
def test_layouts(backend, layout):
    inputs = make()
    expected = gradients(lcd_attention(*inputs, **P, backend=backend), inputs)
    strided = [layout(x.detach()).requires_grad_() for x in inputs]
    assert_all_close(gradients(lcd_attention(*strided, **P, backend=backend), strided), expected)


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_joining_heads_copies_nothing(backend, dtype, query):
    """Output and gradients are views of the memory of [B, n, H, d]."""
    inputs = make(dtype=dtype, query=query)
    output, *grads = gradients(lcd_attention(*inputs, **P, backend=backend), inputs)
    for result in (output, *grads[:3]):
        assert result.transpose(-2, -3).is_contiguous()


def test_expanded_inputs_and_gradients(backend):
    q, k, v, bias = make(B=4)
    sources = [x[:1].detach().requires_grad_() for x in (q, k, v, bias)]
    expanded = lcd_attention(*(x.expand(4, *x.shape[1:]) for x in sources), **P, backend=backend)
    copied = lcd_attention(*(x.repeat(4, 1, 1, 1) for x in sources), **P, backend=backend)
    expected = [copied, *torch.autograd.grad(copied, sources, torch.full(copied.shape, 0.5, dtype=copied.dtype))]
    constant = torch.tensor(0.5, dtype=expanded.dtype).expand(expanded.shape)
    assert_all_close([expanded, *torch.autograd.grad(expanded, sources, constant)], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["none", "n m", "B H n m"])
def test_error_bound_per_dtype(backend, dtype, bias):
    """At most twice the error of the same-dtype formula in PyTorch, plus 1e-6."""
    inputs = make(B=4, H=2, n=36, m=36, d=32, bias=bias, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    drawn = masks(4, 2, 36, 36, **P)
    truth = gradients(literal(*exact, **drawn), exact)
    plain = gradients(literal(*inputs, **drawn), inputs)
    ours = gradients(lcd_attention(*inputs, **P, backend=backend), inputs)
    for t, p, o in zip(truth, plain, ours, strict=True):
        assert o.dtype == dtype
        assert (o.double() - t).abs().max() <= 2 * (p.double() - t).abs().max() + 1e-6


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("bias", ["none", "n m", "B 1 n m"])
def test_gradcheck(backend, bias, query):
    inputs = make(B=2, n=3, m=3, d=3, bias=bias, query=query)
    assert torch.autograd.gradcheck(lambda *x: lcd_attention(*x, **P, backend=backend), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_all_dropped(backend, dtype):
    inputs = make(dtype=dtype)
    output = lcd_attention(*inputs, dropkey_p=1.0, seed=0, backend=backend)
    torch.testing.assert_close(output, inputs[2].mean(-2, keepdim=True).expand_as(output))
    dq, dk, dv, dbias = torch.autograd.grad(output.sum(), inputs)
    assert not dq.any() and not dk.any() and not dbias.any()
    torch.testing.assert_close(dv, torch.full_like(dv, 5 / 6))


def test_released_gradient_is_that_of_adding_to_the_logits():
    inputs = make(m=3, dtype=torch.float32)
    drawn = masks(3, 2, 5, 3, **P)
    assert drawn["drop"].all(-1).any()
    q, k, v, bias = inputs
    logits = (q @ k.transpose(-1, -2) + bias) * 0.5 + drawn["drop"].float() * -1e12
    expected = gradients((logits.softmax(-1) * drawn["keep"].float()) @ v, inputs)
    actual = gradients(reference.lcd_attention(*inputs, **drawn, released_gradient=True), inputs)
    assert_all_close(actual, expected)
    unlike = gradients(reference.lcd_attention(*inputs, **drawn), inputs)
    assert torch.equal(unlike[0], actual[0]) and not torch.allclose(unlike[1], actual[1])


@pytest.mark.parametrize("masked", [-math.inf, torch.finfo(torch.float32).min])
def test_keys_masked_by_the_bias(backend, masked):
    q, k, v, _ = make(n=2, m=6)
    bias = torch.zeros(2, 6, dtype=torch.float64)
    bias[:, 4:] = masked
    inputs = [q, k, v, bias.requires_grad_()]
    short = [q, k[:, :, :4].detach().requires_grad_(), v[:, :, :4].detach().requires_grad_()]
    expected = gradients(lcd_attention(*short, backend=backend), short)
    actual = gradients(lcd_attention(*inputs, backend=backend), inputs)
    assert_all_close(actual[:2], expected[:2])
    assert_all_close([g[:, :, :4] for g in actual[2:4]], expected[2:])
    assert not actual[2][:, :, 4:].any() and not actual[3][:, :, 4:].any() and not actual[4][:, 4:].any()
    # all dropped: equal weights over the keys that the bias leaves
    dropped = lcd_attention(*inputs, dropkey_p=1.0, seed=0, backend=backend)
    torch.testing.assert_close(dropped, v[:, :, :4].mean(-2, keepdim=True).expand_as(dropped))
    # all masked: zeros, as torch has it, and no gradient
    inputs[3] = torch.full((2, 6), masked, dtype=torch.float64, requires_grad=True)
    for options in ({}, P):
        for result in gradients(lcd_attention(*inputs, **options, backend=backend), inputs):
            assert not result.any()
    assert not reference.lcd_attention(*inputs).any()
    explicit = reference.lcd_attention(q, k, v, bias, drop=torch.ones(2, 6, dtype=torch.bool))
    torch.testing.assert_close(explicit, dropped)


def test_seeds(backend):
    inputs = make(n=20, m=20)
    options = {"dropkey_p": 0.5, "dropout_p": 0.5, "backend": backend}
    first = gradients(lcd_attention(*inputs, seed=-7, **options), inputs)
    for seed in (-7, torch.tensor(-7), torch.tensor([-7])):
        assert all(map(torch.equal, first, gradients(lcd_attention(*inputs, seed=seed, **options), inputs)))
    assert not torch.equal(first[0], lcd_attention(*inputs, seed=-8, **options))
    torch.manual_seed(4)
    drawn, again = lcd_attention(*inputs, **options), lcd_attention(*inputs, **options)
    assert not torch.equal(drawn, again)
    torch.manual_seed(4)
    assert torch.equal(drawn, lcd_attention(*inputs, **options))
    state = torch.get_rng_state()
    lcd_attention(*inputs, backend=backend)
    lcd_attention(*inputs, seed=3, **options)
    assert torch.equal(state, torch.get_rng_state())


def test_checkpoint_replays_the_masks(backend):
    inputs = make()
    options = {"dropkey_p": 0.5, "dropout_p": 0.5, "backend": backend}
    torch.manual_seed(1)
    expected = gradients(lcd_attention(*inputs, **options), inputs)
    torch.manual_seed(1)
    replayed = gradients(checkpoint(lambda *x: lcd_attention(*x, **options), *inputs, use_reentrant=False), inputs)
    assert all(map(torch.equal, expected, replayed))


def test_choice_of_back_end(backend):
    inputs = make()
    expected = lcd_attention(*inputs, **P, backend=backend)
    with helo_fast.backend(backend):
        assert torch.equal(expected, lcd_attention(*inputs, **P))
