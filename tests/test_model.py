"""HeLo: parameters, the behaviours in which its presets differ, losses, gradients, shapes and errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_model import PRESETS, batch, build, embedding

import helo_fast
from helo_fast.model import HeLoConfig, layers

# Parameters


def expected_shapes(c: HeLoConfig) -> dict[str, tuple[int, ...]]:
    C, D, K, hidden = c.n_channels, c.feature_dim, c.emotion_classes, c.hidden_size

    def linear(name, rows, columns):
        return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}

    def attention(name):
        weights = {f"{name}.linear_{x}.weight": (D, D) for x in "kvq"}
        return {**weights, f"{name}.layer_norm.weight": (D,), f"{name}.layer_norm.bias": (D,)}

    shapes = {
        **linear("eeg_encoder", D, c.dim_eeg),
        **linear("gsr_encoder", C * D, c.dim_gsr),
        **linear("ppg_encoder", C * D, c.dim_ppg),
        **attention("cross_attention"),
        **linear("projection", D, D),
        **linear("behavioral_encoder", 2 * C * D, c.dim_video),
    }
    for i in range(c.depth):
        layer = f"transformer_layer.{i}"
        norm = {f"{layer}.feed_forward.layer_norm.weight": (D,), f"{layer}.feed_forward.layer_norm.bias": (D,)}
        feed_forward = {**linear(f"{layer}.feed_forward.w1", hidden, D), **linear(f"{layer}.feed_forward.w2", D, hidden), **norm}
        shapes |= {**attention(f"{layer}.attention"), **feed_forward}
    if c.preset == "released":
        shapes |= linear("linear", K, K * D)
    shapes |= {**linear("fused_projection", K, 4 * C), **attention("lcd_cross_attention")}
    shapes |= {**linear("Classifier.0", D, K * D), **linear("Classifier.2", D, D), **linear("Classifier.4", K, D)}
    return shapes if c.preset == "released" else {"label_embedding": (K, D), **shapes}


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_names_and_shapes(preset, depth):
    model = build(preset, depth=depth)
    expected = expected_shapes(model.config)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == expected
    assert list(model.state_dict()) == list(expected)
    other = build(preset, seed=1, depth=depth)
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize("preset", PRESETS)
def test_construction_order_is_the_table_order(preset):
    model = build(preset, seed=3, depth=2)
    torch.manual_seed(3)
    state = model.state_dict()
    for name, shape in expected_shapes(model.config).items():
        if len(shape) == 1 or name == "label_embedding":
            continue  # biases are drawn with their weight, norms draw nothing, the embedding comes last
        drawn = torch.nn.Linear(shape[1], shape[0], bias=name.replace("weight", "bias") in state)
        assert torch.equal(state[name], drawn.weight), name
        if drawn.bias is not None:
            assert torch.equal(state[name.replace("weight", "bias")], drawn.bias), name
    if preset == "paper":
        assert torch.equal(state["label_embedding"], torch.rand(7, 16))


# The quirks: each preset's behaviour


def test_label_embedding_is_drawn_in_released_and_learned_in_paper():
    released, paper = build("released", dropkey=0.0).eval(), build("paper").eval()
    inputs = batch()
    first, second = released(*inputs)[1], released(*inputs)[1]
    assert first.shape == (4, 7, 7) and not torch.equal(first, second)
    torch.manual_seed(5)
    drawn = released(*inputs)[1]
    torch.manual_seed(5)
    torch.testing.assert_close(drawn, layers.gram(torch.rand(4, 7, 16), -2))
    assert torch.equal(paper(*inputs)[1], paper(*inputs)[1])
    loss, parts = paper.loss(*inputs)
    (from_alignment,) = torch.autograd.grad(parts["alignment"], paper.label_embedding, retain_graph=True)
    assert from_alignment.abs().max() > 0
    assert not released.loss(*inputs)[1]["alignment"].requires_grad


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_dropkey_in_evaluation(backend):
    inputs, e = batch(), embedding(4, 7, 16)
    with helo_fast.backend(backend):
        released = build("released").eval()
        assert not torch.equal(released(*inputs, label_embedding=e)[0], released(*inputs, label_embedding=e)[0])
        mended = build("released", dropkey_in_evaluation=False).eval()
        assert torch.equal(mended(*inputs, label_embedding=e)[0], mended(*inputs, label_embedding=e)[0])
        paper = build("paper").eval()
        assert torch.equal(paper(*inputs)[0], paper(*inputs)[0])
        paper.train()
        assert not torch.equal(paper(*inputs)[0], paper(*inputs)[0])


@pytest.mark.parametrize("preset", PRESETS)
def test_labels_are_optional(preset):
    model, inputs = build(preset, dropkey=0.0).eval(), batch()
    e = embedding(4, 7, 16)
    with_labels, without = model(*inputs, label_embedding=e), model(*inputs[:4], label_embedding=e)
    assert torch.equal(with_labels[0], without[0]) and without[2] is None
    assert with_labels[2].shape == ((4, 7, 7) if preset == "released" else (7, 7))
    torch.testing.assert_close(without[0].sum(-1), torch.ones(4))


def test_costs_are_thresholded_over_the_batch_in_released_only():
    inputs, e = batch(), embedding(4, 7, 16)

    def change(preset):
        model = build(preset, transport="gromov", dropkey=0.0).eval()
        alone = model(*(t[:1] for t in inputs), label_embedding=e[:1])[0]
        return (model(*inputs, label_embedding=e)[0][:1] - alone).abs().max()

    assert change("released") > 1e-5
    assert change("paper") < 1e-6


def test_transport_direction():
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    plan = torch.tensor([[[0.1, 0.4], [0.3, 0.2]]])
    torch.testing.assert_close(layers.transport(plan, x, "plan"), plan)
    torch.testing.assert_close(layers.transport(plan, x, "barycentric"), torch.tensor([[[0.25, 0.75], [2 / 3, 1 / 3]]]))
    assert layers.transport(torch.zeros_like(plan), x, "barycentric").isfinite().all()
    # the model carries its physiological tokens so
    for preset, scale in (("released", 1 / 6), ("paper", 1.0)):
        model, seen = build(preset, dropkey=0.0).eval(), []
        model.transformer_layer[0].register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(inputs[0]))
        model(*batch())
        physiological, _ = model.tokens(*batch()[:4])
        (carried,) = seen
        plan = model.transport_plan(*batch()[:4])
        torch.testing.assert_close(carried, layers.transport(plan, physiological, model.config.transport_map))
        torch.testing.assert_close(carried.sum(1), scale * physiological.sum(1), rtol=0.05, atol=0.05)


def test_correlations():
    inputs, e = batch(), embedding(4, 7, 16)
    released, paper = build("released", dropkey=0.0).eval(), build("paper").eval()
    _, learned, gt = released(*inputs, label_embedding=e)
    scaled = e / e.norm(dim=1, keepdim=True)
    torch.testing.assert_close(learned, scaled @ scaled.mT)
    labels = inputs[4]
    torch.testing.assert_close(gt, labels[:, :, None] * labels[:, None] / labels.square().sum(-1)[:, None, None])
    _, learned, gt = paper(*inputs)
    torch.testing.assert_close(learned, F.cosine_similarity(paper.label_embedding[:, None], paper.label_embedding[None], dim=-1))
    torch.testing.assert_close(gt, F.cosine_similarity(labels.mT[:, None], labels.mT[None], dim=-1))
    torch.testing.assert_close(learned.diagonal(), torch.ones(7))


def graph_nodes(loss: torch.Tensor) -> set[str]:
    found, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return {node.name() for node in found}


def test_no_graph_behind_the_plan_unless_asked_for():
    def solver_nodes(**options):
        return [n for n in graph_nodes(build(**options).loss(*batch())[0]) if "gromov" in n.lower() or "sinkhorn" in n.lower()]

    assert solver_nodes(preset="released") == [] == solver_nodes(preset="paper")
    assert solver_nodes(preset="paper", transport="gromov") == []
    assert len(solver_nodes(preset="paper", plan_gradient="implicit")) == 1


@pytest.mark.parametrize("transport", ["gromov", "sinkhorn", "fused"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_transport(preset, transport):
    model = build(preset, transport=transport)
    plan = model.eval().transport_plan(*batch()[:4])
    assert plan.shape == (4, 6, 6) and not plan.requires_grad
    torch.testing.assert_close(plan.sum((1, 2)), torch.ones(4), rtol=1e-3, atol=0)
    loss, _ = model.train().loss(*batch())
    loss.backward()
    for name, p in model.named_parameters():
        assert name.startswith("linear.") if p.grad is None else p.grad.isfinite().all(), name


# The paper preset's shared query


def test_learned_query_and_correlation_are_computed_once_for_the_batch(monkeypatch):
    calls = []
    attention = layers.lcd_attention
    monkeypatch.setattr(layers, "lcd_attention", lambda q, k, v, bias, **o: calls.append((q, k, bias)) or attention(q, k, v, bias, **o))
    build("paper", heads_lcd=2).eval()(*batch())
    q, k, bias = calls[-1]
    assert (q.shape, k.shape, bias.shape) == ((2, 7, 8), (4, 2, 7, 8), (7, 7))


def test_shared_and_repeated_embeddings_agree():
    model, e = build("paper", heads_lcd=2).eval(), embedding(7, 16)
    shared = model(*batch(), label_embedding=e)
    repeated = model(*batch(), label_embedding=e.expand(4, 7, 16))
    torch.testing.assert_close(shared[0], repeated[0])
    torch.testing.assert_close(shared[1].expand(4, 7, 7), repeated[1])


# Loss, gradients, devices of computation


@pytest.mark.parametrize("preset", PRESETS)
def test_loss_by_hand(preset):
    model, inputs, e = build(preset, dropkey=0.0, alignment_weight=2.5).eval(), batch(), embedding(4, 7, 16)
    predict, learned, gt = model(*inputs, label_embedding=e)
    loss, parts = model.loss(*inputs, label_embedding=e)
    labels = inputs[4]
    assert (labels == 0).any()
    kl = sum(p * math.log(p / q) for p, q in zip(labels.flatten().tolist(), predict.flatten().tolist()) if p > 0)
    assert math.isclose(parts["kl"].item(), kl, rel_tol=1e-5)
    torch.testing.assert_close(parts["alignment"], (learned - gt).square().mean())
    torch.testing.assert_close(loss, parts["kl"] + 2.5 * parts["alignment"])


def test_paper_loss_survives_an_underflowed_softmax():
    inputs = batch()
    for preset, finite in (("paper", True), ("released", False)):
        model = build(preset).eval()
        with torch.no_grad():
            model.Classifier[4].bias[0] = -300.0
        loss, _ = model.loss(*inputs)
        assert loss.isfinite().item() == finite
    assert (model(*inputs)[0][:, 0] == 0).all()


def test_implicit_plan_gradient_against_differences():
    model = build("paper", plan_gradient="implicit", sinkhorn_iterations=2000, epsilon=0.3).double().eval()
    inputs = batch(2, torch.float64)
    weight = model.behavioral_encoder.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(step):
        moved = {"behavioral_encoder.weight": weight.detach() + step * direction}
        return torch.func.functional_call(model, moved, (*inputs,))[0].log().sum()

    difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
    (gradient,) = torch.autograd.grad(model(*inputs)[0].log().sum(), weight)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-8)
    constant = build("paper", sinkhorn_iterations=2000, epsilon=0.3).double().eval()
    (gradient,) = torch.autograd.grad(constant(*inputs)[0].log().sum(), constant.behavioral_encoder.weight)
    assert not torch.isclose((gradient * direction).sum(), difference, rtol=1e-4, atol=0)


# Shapes


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_batch_sizes(preset, size):
    predict, learned, gt = build(preset)(*batch(size))
    per_sample = (size, 7, 7) if preset == "released" else (7, 7)
    assert (predict.shape, learned.shape, gt.shape) == ((size, 7), per_sample, per_sample)
    torch.testing.assert_close(predict.sum(-1), torch.ones(size))


def test_input_layouts():
    model = build("paper").eval()
    eeg, gsr, ppg, video, _ = batch()
    expected = model(eeg, gsr, ppg, video)[0]
    assert torch.equal(model(eeg.view(4, 3, 2), gsr.unsqueeze(1), ppg.unsqueeze(1), video)[0], expected)
    assert torch.equal(model(eeg.t().contiguous().t(), gsr, ppg, video)[0], expected)


@pytest.mark.parametrize(
    ("position", "value", "exception", "message"),
    [
        (0, torch.rand(4, 8), ValueError, r"eeg must be \[B, 6\] or \[B, 3, 2\], got \[4, 8\]; set n_channels and dim_eeg in HeLoConfig"),
        (0, torch.rand(4, 2, 3), ValueError, r"eeg must be .*got \[4, 2, 3\]"),
        (1, torch.rand(4, 3), ValueError, r"gsr must be \[B, 4\] or \[B, 1, 4\], got \[4, 3\]; set dim_gsr in HeLoConfig"),
        (2, torch.rand(3, 5), ValueError, "ppg has 3 rows but eeg has 4"),
        (3, torch.rand(4, 1, 6), ValueError, r"video must be \[B, 6\], got \[4, 1, 6\]"),
        (3, torch.rand(4, 6).double(), TypeError, r"video is torch.float64 but the model torch.float32; use video.to\(torch.float32\)"),
        (3, torch.ones(4, 6).long(), TypeError, "video must be float32"),
        (1, [[0.0] * 4] * 4, TypeError, "gsr must be a tensor"),
        (1, torch.rand(4, 4, device="meta"), ValueError, "gsr is on meta but the model on cpu"),
        (4, torch.rand(4, 6), ValueError, r"labels must be \[B, emotion_classes\], here \[4, 7\], got \[4, 6\]"),
        (4, torch.rand(4, 7, device="meta"), ValueError, "labels is on meta but the model on cpu"),
    ],
)
def test_bad_inputs(position, value, exception, message):
    inputs = batch()
    inputs[position] = value
    for function in (build("paper"), build("released").loss):
        with pytest.raises(exception, match=f"HeLo: {message}"):
            function(*inputs)


def test_bad_label_embedding_and_missing_labels():
    with pytest.raises(ValueError, match=r"label_embedding must be \[K, D\] or \[B, K, D\], here \[7, 16\] or \[4, 7, 16\], got \[7, 15\]"):
        build("paper")(*batch(), label_embedding=torch.rand(7, 15))
    with pytest.raises(TypeError, match=r"label_embedding is torch.float64 but the model torch.float32; use label_embedding.to"):
        build("paper")(*batch(), label_embedding=torch.rand(7, 16).double())
    with pytest.raises(ValueError, match="label_embedding is on meta but the model on cpu"):
        build("paper")(*batch(), label_embedding=torch.rand(7, 16, device="meta"))
    with pytest.raises(TypeError, match="labels are needed for the loss"):
        build("paper").loss(*batch()[:4], None)


@pytest.mark.parametrize("preset", ("released", "paper"))
def test_shapes_on_the_meta_device(preset):
    """As counters of operations and memory want it: nothing is computed."""
    with torch.device("meta"):
        model = helo_fast.HeLo(HeLoConfig(preset=preset))
        config = model.config
        inputs = [torch.rand(3, size) for size in (config.n_channels * config.dim_eeg, config.dim_gsr, config.dim_ppg, config.dim_video)]
        labels = torch.rand(3, config.emotion_classes)
    predict, *_ = model(*inputs)
    assert predict.is_meta and predict.shape == labels.shape
    model.loss(*inputs, labels)[0].backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == ({"linear.weight", "linear.bias"} if config.unused_linear else set())
