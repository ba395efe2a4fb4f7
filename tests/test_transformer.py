"""The transformer layer in one piece: values and gradients against the composition in float64, its masks, and where it is composed."""

import pytest
import torch

from helo_fast import HeLoConfig, _registry, backend
from helo_fast.model.layers import TransformerLayer
from helo_fast.ops import transformer
from helo_fast.testing import assert_close

# (samples, tokens, width, hidden, heads, DropKey, dropout, two sets of tokens)
CASES = [
    (5, 36, 128, 64, 4, 0.5, 0.5, True),
    (7, 18, 32, 16, 2, 0.3, 0.0, False),  # the last chunk is smaller than the others
    (2, 70, 64, 48, 4, 0.0, 0.4, True),  # more tokens than a tile of attention has
    (1, 1, 16, 16, 1, 0.0, 0.0, False),
    (3, 200, 16, 32, 2, 0.0, 0.0, False),  # a sample has more rows than a chunk is meant to
    (40, 36, 32, 16, 4, 0.5, 0.5, True),  # several chunks a task
]


@pytest.fixture(autouse=True)
def _cpp(device_for):
    device_for("lcd_attention", "cpp")


@pytest.fixture
def calls(monkeypatch):
    """Those of the layer in one piece, counted."""
    found, original = [], transformer.transformer_layer
    monkeypatch.setattr(transformer, "transformer_layer", lambda *a, **k: found.append(1) or original(*a, **k))
    return found


def make(samples, tokens, width, hidden, heads, dropkey, dropout, two, dtype=torch.float32, scale=1.0, **fields):
    """(layer, the sets of tokens); the same numbers in every dtype."""
    torch.manual_seed(0)
    config = HeLoConfig.paper(
        feature_dim=width, hidden_size=hidden, heads=heads, dropkey=dropkey, dropout=dropout, **{"rng": "philox", **fields}
    )
    layer = TransformerLayer(config).train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (scale if parameter.dim() == 1 else scale * parameter.shape[-1] ** -0.5))
    return layer.to(dtype), [torch.randn(samples, tokens, width).to(dtype) for _ in range(1 + two)]


def results(layer, sets, seed=3):
    """The output, and the gradients of the sets and of the parameters, under the masks of one seed; by name."""
    sets = [t.detach().clone().requires_grad_() for t in sets]
    torch.manual_seed(seed)
    out = layer(*sets)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    gradients = torch.autograd.grad(out, [*sets, *layer.parameters()], weights)
    names = ["x", "beside"][: len(sets)] + [name for name, _ in layer.named_parameters()]
    return {"out": out.detach(), **dict(zip(names, gradients))}


def compare(case, **options):
    actual = results(*make(*case, **options))
    with backend("eager"):
        eager, exact = (results(*make(*case, dtype=dtype, **options)) for dtype in (torch.float32, torch.float64))
    for name, value in actual.items():
        assert_close(value, exact[name], eager[name], name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpp_against_the_composition_in_float64(case, calls):
    compare(case)
    assert len(calls) == 1, "the reference is composed"


@pytest.mark.parametrize("scale", (0.01, 8.0))
def test_cpp_where_gelu_is_nearly_linear_or_saturated(scale, calls):
    compare(CASES[2], scale=scale)
    assert calls


def test_cpp_masks_leave_the_generator_where_the_composition_does():
    layer, sets = make(*CASES[0])
    states = []
    for name in ("cpp", "eager"):
        with backend(name):
            results(layer, sets)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_cpp_bits_do_not_depend_on_the_threads(calls):
    layer, sets = make(*CASES[-1])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(layer, sets))
    finally:
        torch.set_num_threads(before)
    assert len(calls) == 3
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name


@pytest.mark.parametrize("layout", ("transposed", "every second"))
def test_cpp_takes_any_strides(layout, calls):
    layer, (x, beside) = make(*CASES[2])
    expected = results(layer, (x, beside))["out"]
    strided = x.mT.contiguous().mT if layout == "transposed" else torch.stack([x, x], -1).flatten(-2)[..., ::2]
    assert not strided.is_contiguous() and len(calls) == 1
    torch.manual_seed(3)
    assert torch.equal(layer(strided, beside), expected) and len(calls) == 2


def test_cpp_infinite_and_undefined_tokens_spoil_their_sample_alone():
    layer, (x,) = make(*CASES[1])
    clean = results(layer, (x,))["out"]
    for value in (float("inf"), float("nan")):
        x[4, 0, 0] = value
        torch.manual_seed(3)
        out = layer(x)
        assert out[4].isnan().any() and torch.equal(out[:4], clean[:4]) and torch.equal(out[5:], clean[5:])


def test_evaluation_draws_nothing_and_needs_no_graph(calls):
    layer, sets = make(*CASES[0])
    layer.eval()
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = layer(*sets), layer(*sets)
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state) and len(calls) == 2


def test_second_derivative_is_refused():
    layer, (x,) = make(*CASES[1])
    (dx,) = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_torch_masks_are_refused_as_by_the_composition():
    layer, sets = make(*CASES[0], rng="torch")
    with pytest.raises(RuntimeError, match="rng='torch' draws masks in the released code's order"):
        layer(*sets)


def test_elsewhere_it_is_composed(calls):
    layer, sets = make(*CASES[0][:5], 0.0, 0.0, True)
    expected = results(layer, sets)["out"]
    assert calls.pop()
    with backend("eager"):
        assert torch.allclose(layer(*sets), expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(layer(*sets).float(), expected, rtol=0.1, atol=0.1)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*sets), expected, rtol=1e-4, atol=1e-5)
    mapped = torch.func.vmap(lambda x: layer(x), randomness="different")(torch.stack(sets))
    assert torch.allclose(mapped.transpose(0, 1).flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    empty = layer(*(t[:0] for t in sets))
    assert empty.shape == (0, *sets[0].shape[1:])
    layer.double()
    assert torch.allclose(layer(*(t.double() for t in sets)), expected.double(), rtol=1e-4, atol=1e-5)
    odd, (x,) = make(3, 5, 24, 16, 2, 0.0, 0.0, False)
    with backend("eager"):
        reference = odd(x)
    assert torch.allclose(odd(x), reference, rtol=1e-4, atol=1e-5)
    assert not calls


@pytest.mark.parametrize("part", ("attention", "feed_forward", "feed_forward.w1", "feed_forward.w2"))
def test_parts_that_are_hooked_or_replaced_are_called(part, calls):
    layer, sets = make(*CASES[0][:5], 0.0, 0.0, True)
    expected, seen = layer(*sets), []
    assert calls.pop()
    module = layer.get_submodule(part)
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(1))
    assert torch.allclose(layer(*sets), expected, rtol=1e-4, atol=1e-5) and seen and not calls
    handle.remove()

    class Negative(type(module)):
        def forward(self, *inputs):
            return -super().forward(*inputs)

    module.__class__ = Negative
    assert not torch.allclose(layer(*sets), expected, rtol=1e-1, atol=1e-1) and not calls


def test_a_part_of_another_kind_is_called(calls):
    layer, sets = make(*CASES[0][:5], 0.0, 0.0, True)
    expected = layer(*sets)
    assert calls.pop()
    layer.feed_forward.w2 = torch.nn.Sequential(layer.feed_forward.w2)  # has no weight of its own
    assert torch.allclose(layer(*sets), expected, rtol=1e-4, atol=1e-5) and not calls
    layer.feed_forward = torch.nn.Sequential(layer.feed_forward)  # has no w1 or w2
    layer.attention.layer_norm = torch.nn.Sequential(layer.attention.layer_norm)
    assert torch.allclose(layer(*sets), expected, rtol=1e-4, atol=1e-5) and not calls
    layer.attention = torch.nn.Bilinear(128, 128, 128)
    assert layer(*sets).shape == expected.shape and not calls


def test_wrong_shapes_are_left_to_the_parts_to_name(calls):
    layer, (x, beside) = make(*CASES[0])
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer(x, beside[:, :, :64])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(x[:, :, :64], beside[:, :, :64])
    layer.feed_forward.w2.bias = torch.nn.Parameter(torch.zeros(16))
    with pytest.raises(RuntimeError, match="size"):
        layer(x, beside)
    assert not calls


def test_a_missing_extension_asked_for_by_name_is_an_error(monkeypatch):
    layer, sets = make(*CASES[0])
    monkeypatch.setattr(_registry._native, "missing", lambda name: "it is not built")
    with backend("cpp"), pytest.raises(RuntimeError, match="it is not built"):
        layer(*sets)
