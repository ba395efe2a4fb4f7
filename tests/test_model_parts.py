"""HeLo's parts hooked, replaced, pruned, compiled or in a mode of their own: fast paths skip only what nobody waits for."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from helo_fast import HeLo, HeLoConfig, backend
from helo_fast.model.layers import TransformerLayer

SIZES = dict(n_channels=4, dim_eeg=2, dim_gsr=4, dim_ppg=5, dim_video=6, feature_dim=32, hidden_size=16, heads=2, emotion_classes=5)
LARGE = 192  # samples, from which encoders and their maps become one product
PARTS = (
    "eeg_encoder",
    "gsr_encoder",
    "ppg_encoder",
    "cross_attention",
    "cross_attention.linear_q",
    "cross_attention.linear_k",
    "cross_attention.layer_norm",
    "projection",
    "behavioral_encoder",
    "transformer_layer.0",
    "transformer_layer.0.attention",
    "transformer_layer.0.attention.linear_v",
    "transformer_layer.0.attention.layer_norm",
    "transformer_layer.0.feed_forward",
    "transformer_layer.0.feed_forward.w1",
    "transformer_layer.0.feed_forward.layer_norm",
    "fused_projection",
    "lcd_cross_attention.linear_q",
    "Classifier.0",
)
LINEAR = tuple(part for part in PARTS if part.rpartition(".")[2] in ("gsr_encoder", "linear_q", "linear_v", "w1", "fused_projection"))


@pytest.fixture(autouse=True)
def _cpp(device_for):
    device_for("lcd_attention", "cpp")


def build(**fields):
    torch.manual_seed(0)
    return HeLo(HeLoConfig.paper(**{**SIZES, "dropkey": 0.0, "dropout": 0.0, **fields}))


def inputs(samples=3):
    generator = torch.Generator().manual_seed(1)
    shapes = (4, 2), (4,), (5,), (6,)
    return [torch.rand(samples, *shape, generator=generator) for shape in shapes]


def close(actual, expected):
    return torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_called_where_somebody_waits_for_it(part):
    model, x, seen = build(), inputs(LARGE), []
    expected, module = model(*x)[0], model.get_submodule(part)
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append(1))
    assert close(model(*x)[0], expected) and seen
    handle.remove()

    seen.clear()
    module.compile(backend=lambda graph, inputs: graph.forward)
    module._compiled_call_impl = lambda *a, call=module._call_impl, **k: seen.append(1) or call(*a, **k)
    assert close(model(*x)[0], expected) and seen
    module._compiled_call_impl = None

    forward = module.forward
    module.forward = lambda *a, **k: -forward(*a, **k)
    with backend("eager"):
        negated = model(*x)[0]
    assert close(model(*x)[0], negated) and not close(negated, expected)
    del module.forward

    class Negative(type(module)):
        def forward(self, *a, **k):
            return -super().forward(*a, **k)

    module.__class__ = Negative
    assert close(model(*x)[0], negated) and close(model(*(t[:2] for t in x))[0], negated[:2])


def test_hooks_of_all_modules_are_called():
    model, seen = build(), set()
    names = {module: name for name, module in model.named_modules()}
    handle = register_module_forward_hook(lambda module, inputs, output: seen.add(names.get(module)))
    try:
        model(*inputs(LARGE))
    finally:
        handle.remove()
    containers = {"transformer_layer"}  # has no forward
    assert seen == set(names.values()) - containers


@pytest.mark.parametrize("part", LINEAR)
def test_a_pruned_part_trains_on(part):
    model, x = build(), inputs(LARGE)
    prune.random_unstructured(model.get_submodule(part), "weight", 0.5)
    before = model.get_submodule(part).weight_orig.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(*x)[0][:, 0].sum().backward()
        optimizer.step()
    module = model.get_submodule(part)
    changed = module.weight_orig != before
    assert changed.any() and not changed[module.weight_mask == 0].any()


def test_a_linear_map_of_another_shape_of_parameters_is_called():
    model, x = build(), inputs()
    model.transformer_layer[0].attention.linear_q = nn.Linear(32, 32)  # has a bias
    model.transformer_layer[0].feed_forward.w1.register_parameter("bias", None)
    model.transformer_layer[0].feed_forward.layer_norm = nn.LayerNorm(32, bias=False)
    model.fused_projection = nn.Linear(16, 5, bias=False)
    predicted = model(*x)[0]
    with backend("eager"):
        assert close(predicted, model(*x)[0])


def test_each_part_is_in_a_mode_of_its_own():
    torch.manual_seed(0)
    layer, x = TransformerLayer(HeLoConfig.paper(feature_dim=32, hidden_size=16, heads=2, dropkey=0.3, dropout=0.3)), torch.randn(2, 5, 32)
    layer.eval()
    layer.feed_forward.train()
    assert not torch.equal(layer(x), layer(x))
    layer.train()
    layer.feed_forward.eval()
    layer.attention.eval()
    assert torch.equal(layer(x), layer(x))


def test_projection_is_changed_in_place_by_a_hook():
    model, x = build(feature_dim=128), inputs(512)  # large enough for oneDNN
    model.projection.register_forward_hook(lambda module, inputs, output: output.mul_(2))
    predicted = model(*x)[0]
    predicted.sum().backward()
    with backend("eager"):
        assert close(predicted, model(*x)[0])


@pytest.mark.parametrize("depth", (0, 1, 2))
@pytest.mark.parametrize("preset", ("paper", "released"))
def test_every_depth(preset, depth):
    torch.manual_seed(0)
    model, x = HeLo(HeLoConfig(preset=preset, depth=depth, **SIZES)), inputs()
    loss, _ = model.loss(*x, torch.full((3, 5), 0.2))
    loss.backward()
    assert loss.isfinite() and model.projection.weight.grad.isfinite().all()


@pytest.mark.parametrize("preset", ("paper", "released"))
def test_a_checkpointed_loss_has_the_same_gradients(preset):
    torch.manual_seed(0)
    model, x = HeLo(HeLoConfig(preset=preset, **SIZES)), [*inputs(), torch.full((3, 5), 0.2)]
    found = []
    for run in (model.loss, lambda *x: checkpoint(model.loss, *x, use_reentrant=False)):
        torch.manual_seed(1)
        model.zero_grad()
        run(*x)[0].backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(found[0]) > 20 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
