"""HeLo's random numbers: the released code's order under the eager back end, and the choice of generator."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F

import helo_fast
from helo_fast.model import HeLo, HeLoConfig, layers

SIZES = dict(n_channels=3, dim_eeg=2, dim_gsr=4, dim_ppg=5, dim_video=6, feature_dim=16, hidden_size=8, heads=2, emotion_classes=7)


def build(preset: str, **overrides) -> HeLo:
    torch.manual_seed(0)
    return HeLo(HeLoConfig(**{**SIZES, "preset": preset, **overrides}))


def batch() -> list[torch.Tensor]:
    """eeg, gsr, ppg, video, labels."""
    generator = torch.Generator().manual_seed(4)
    return [*(torch.randn(4, width, generator=generator) for width in (6, 4, 5, 6)), torch.rand(4, 7, generator=generator).softmax(-1)]


def embedding(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("training", [True, False])
def test_released_random_order(monkeypatch, training):
    model, seen = build("released", depth=2, rng="torch").train(training), []
    attention = layers.attention_reference.lcd_attention

    def record(*arguments, drop, keep, **options):
        seen.append((drop, keep))
        return attention(*arguments, drop=drop, keep=keep, **options)

    monkeypatch.setattr(layers.attention_reference, "lcd_attention", record)
    torch.manual_seed(11)
    with helo_fast.backend("eager"):
        _, learned, _ = model(*batch())
    end = torch.get_rng_state()

    torch.manual_seed(11)
    torch.testing.assert_close(learned, layers.gram(torch.rand(4, 7, 16), -2))
    transformer = [(2, 6, 6), "feed-forward", (2, 6, 6), "feed-forward"]
    masks = iter(seen)
    for step in [(2, 3, 3), (2, 3, 3), *transformer, *transformer, (1, 7, 7)]:
        if step == "feed-forward":
            if training:
                F.dropout(torch.ones(4, 6, 16))
            continue
        heads, n, m = step
        drop, keep = next(masks)
        assert torch.equal(drop.flatten(0, 1), torch.bernoulli(torch.full((4 * heads, n, m), 0.5)).bool())
        if training:
            assert torch.equal(keep.flatten(0, 1), F.dropout(torch.ones(4 * heads, n, m)))
        else:
            assert keep is None
    assert next(masks, None) is None
    assert torch.equal(end, torch.get_rng_state())


def test_released_order_has_the_released_gradient():
    """Also in rows whose keys are all dropped, where softmax(logits - 1e12) has a slope though its value does not depend on the logits."""
    module = layers.MultiHeadAttention(HeLoConfig.released(**SIZES), 2).train()
    x, y = embedding(64, 3, 16), embedding(64, 2, 16)
    torch.manual_seed(8)
    with helo_fast.backend("eager"):
        result = module(x, y)

    torch.manual_seed(8)
    projected = module.linear_q(x), module.linear_k(y), module.linear_v(y)
    q, k, v = (t.view(64, -1, 2, 8).transpose(1, 2) for t in projected)
    logits = (q @ k.mT * 8**-0.5).flatten(0, 1)
    drop = torch.bernoulli(torch.full_like(logits, 0.5))
    assert drop.prod(-1).sum() > 50
    weights = F.dropout(torch.softmax(logits + drop * -1e12, -1)).view(64, 2, 3, 2)
    expected = F.layer_norm(x + (weights @ v).transpose(1, 2).flatten(2), (16,), module.layer_norm.weight, module.layer_norm.bias)
    torch.testing.assert_close(result, expected)
    for parameter in module.parameters():
        gradients = [torch.autograd.grad((t * t * x).sum(), parameter, retain_graph=True)[0] for t in (result, expected)]
        torch.testing.assert_close(*gradients)


def test_rng_choice(monkeypatch):
    inputs = batch()

    def predict(rng, seed=4):
        model = build("released", rng=rng)
        torch.manual_seed(seed)
        with helo_fast.backend("eager"):
            return model(*inputs)[0]

    assert torch.equal(predict("auto"), predict("torch"))
    assert torch.equal(predict("philox"), predict("philox"))
    assert not torch.equal(predict("philox"), predict("torch"))
    assert not torch.equal(predict("philox"), predict("philox", seed=5))
    other = types.SimpleNamespace(backend=types.SimpleNamespace(name="cpp"))
    monkeypatch.setattr(layers._registry, "resolve", lambda *a, **k: other)
    with pytest.raises(RuntimeError, match="rng='torch'.*'cpp' is in force"):
        layers.draws_with_torch("torch", inputs[0])
    assert not layers.draws_with_torch("auto", inputs[0])


def test_both_transformer_orders_compute_the_same(monkeypatch):
    model, inputs, e = build("released", depth=2, dropkey=0.0).eval(), batch(), embedding(4, 7, 16)
    at_once = model(*inputs, label_embedding=e)[0]
    monkeypatch.setattr("helo_fast.model.helo.rates", lambda *a: (1e-9, 0.0))
    with helo_fast.backend("eager"):
        one_after_the_other = model(*inputs, label_embedding=e)[0]
    torch.testing.assert_close(at_once, one_after_the_other)


@pytest.mark.parametrize("count", [None, 3])
def test_linear_maps_of_tokens_need_no_tokens(count):
    encoder, linear = layers.Encoder(5, 16, count).double(), torch.nn.Linear(16, 16, bias=False).double()
    features, parameters = torch.randn(40, 5, dtype=torch.float64), [*encoder.parameters(), *linear.parameters()]

    def through(rows):
        encoded = layers.Encoded(encoder, features[:rows])
        (result,) = encoded.through(linear.weight)
        return encoded, result, torch.autograd.grad(result.square().sum(), parameters)

    with helo_fast.backend("eager"):
        encoded, expected, gradients = through(40)
    assert encoded._tokens is not None and torch.equal(expected, linear(encoder(features)))
    encoded, composed, composed_gradients = through(40)
    assert encoded._tokens is None
    torch.testing.assert_close(composed, expected)
    torch.testing.assert_close(composed_gradients, gradients)
    assert through(4)[0]._tokens is not None  # too few rows for the product of the matrices to pay


def test_the_residual_connection_is_the_same_in_both_orders():
    """Away from the released order the operator runs, its mask from Philox; in that order torch's own layers."""
    torch.manual_seed(0)
    norm, x, y = torch.nn.LayerNorm(16), torch.randn(5, 16), torch.randn(3, 5, 16)
    torch.testing.assert_close(layers._add_and_norm(norm, x, y), norm(x + y))
    with helo_fast.backend("eager"):
        torch.manual_seed(0)
        ours = layers._add_and_norm(norm, x, y, 0.3, "torch")
        torch.manual_seed(0)
        assert torch.equal(ours, norm(x + F.dropout(y, 0.3)))
    assert not torch.equal(layers._add_and_norm(norm, x, y, 0.3), layers._add_and_norm(norm, x, y, 0.3))


def test_paper_sends_no_gradient_through_rows_that_are_dropped_entirely():
    gradients = {}
    for preset in ("paper", "released"):
        torch.manual_seed(2)
        module = layers.MultiHeadAttention(getattr(HeLoConfig, preset)(**{**SIZES, "dropout": 0.0}, rng="torch", dropkey=0.9999), 2).train()
        x, y = embedding(8, 3, 16), embedding(8, 2, 16)
        torch.manual_seed(8)
        with helo_fast.backend("eager"):
            module(x, y).square().mul(x).sum().backward()
        gradients[preset] = module.linear_q.weight.grad.abs().max()
    assert gradients["paper"] == 0 and gradients["released"] > 0
