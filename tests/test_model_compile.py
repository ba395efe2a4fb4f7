"""HeLo under torch.compile and under bfloat16 autocast."""

import pytest
import torch
from small_model import PRESETS, batch, build, embedding


@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16_autocast(preset):
    model, inputs, e = build(preset, dropkey=0.0).eval(), batch(), embedding(4, 7, 16)
    exact, _ = model.loss(*inputs, label_embedding=e)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(*inputs, label_embedding=e)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("preset", PRESETS)
def test_bfloat16_learns_as_float32(preset):
    """The loss curve under autocast lies nearer to float32's, of the same masks, than another seed's curve does."""

    def curve(seed, half):
        model, inputs = build(preset, rng="philox").train(), batch(64)
        torch.manual_seed(seed)  # of the masks
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        model.fit_correlation(inputs[-1])
        losses = []
        for _ in range(40):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss, parts = model.loss(*inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(parts["kl"].item() / 64)
        assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
        return torch.tensor(losses)

    exact, half, other = curve(0, False), curve(0, True), curve(1, False)
    assert exact[-10:].mean() < 0.9 * exact[:5].mean()  # it learns
    assert (half - exact).abs().mean() < (other - exact).abs().mean()
    assert abs(half[-10:].mean() - exact[-10:].mean()) < 0.05 * exact[-10:].mean()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_compiles_to_one_graph(preset, training):
    model = build(preset).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    predict, learned, gt = compiled(*batch())
    if preset == "paper" and not training:
        for actual, expected in zip((predict, learned, gt), model(*batch())):
            torch.testing.assert_close(actual, expected)
    predict.log().sum().backward()
    torch.testing.assert_close(predict.sum(-1), torch.ones(4))
    assert model.eeg_encoder.weight.grad.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_one_compiled_graph_serves_every_batch_size(preset, training):
    """fullgraph refuses a graph break, the stance a recompilation. (torch itself sets apart size 1, and sizes equal to a fixed one.)"""
    model = build(preset).train(training)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: model.loss(*inputs)[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for size, stance in ((11, "default"), (2, "fail_on_recompile"), (33, "fail_on_recompile"), (200, "fail_on_recompile")):
        with torch.compiler.set_stance(stance):
            loss = compiled(*batch(size))
        loss.backward()
        if preset == "paper" and not training:
            torch.testing.assert_close(loss, model.loss(*batch(size))[0])
