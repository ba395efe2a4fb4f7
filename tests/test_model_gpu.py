"""The whole training step on a GPU: nothing waits for it, a CUDA graph replays it, bfloat16 learns."""

import pytest
import torch

from benchmarks import gpu_steps
from benchmarks.steps import TrainingStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
MEMBERS = (*gpu_steps.ORDERS["cuda"], "eager")


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("preset", ("released", "paper"))
@pytest.mark.parametrize("half", ("", " bfloat16"), ids=("float32", "bfloat16"))
def test_a_step_does_not_synchronise(preset, half, member):
    step = TrainingStep(preset, f"auto{half}", 5, "cuda")
    with gpu_steps.auto_order(member, "cuda"):
        first = step()  # what is made once, is made here
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert first.isfinite() and second.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in step.model.parameters())


@pytest.mark.parametrize("member", MEMBERS)
def test_a_graph_replays_the_step(member):
    with gpu_steps.auto_order(member, "cuda"):
        step = TrainingStep("released", "auto", 5, "cuda")
        gpu_steps.graph(step, compared=True)  # raises where the loss or the gradients are not those of the step run plainly


@pytest.mark.parametrize("member", MEMBERS)
def test_bfloat16_is_close_to_float32(member):
    with gpu_steps.auto_order(member, "cuda"):
        losses = [TrainingStep("paper", f"auto{half}", 64, "cuda", dropout=0.0, rng="philox").answer()[0] for half in ("", " bfloat16")]
    torch.testing.assert_close(losses[1].float(), losses[0], rtol=0.02, atol=0)
