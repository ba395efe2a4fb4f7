"""lcd_attention, forward and backward, with DropKey and dropout; beside plain PyTorch with masks drawn by torch."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import helo_fast
from helo_fast.ops.attention import philox
from helo_fast.testing import assert_close

from . import harness, peers

DROPKEY, DROPOUT, SEED = 0.5, 0.5, 2026


class Case(NamedTuple):
    batch: int
    bias: bool
    heads: int = 4
    n: int = 36
    d: int = 32
    device: str = "cpu"

    @property
    def group(self) -> str:
        bias = " bias" if self.bias else ""
        return f"lcd_attention fwd+bwd B{self.batch} H{self.heads} n{self.n} d{self.d}{bias}{' cuda' if self.device == 'cuda' else ''}"


BATCHES = {"cpu": 128, "cuda": 8192}
ATTENTION = [
    (Case(BATCHES[device], bias, device=device), member)
    for device in harness.DEVICES
    for bias in (False, True)
    for member in (*harness.backends(device), "naive")
]


@cache
def inputs(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """(q, k, v [B, H, n, d] and, in half of the cases, a bias [n, n]; all with gradients), incoming gradient."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, case.heads, case.n, case.d)
    shapes = [shape] * 3 + [(case.n, case.n)] * case.bias
    tensors = [torch.randn(*s, generator=generator).to(case.device, dtype).requires_grad_() for s in shapes]
    return tensors, torch.randn(*shape, generator=generator).to(case.device, dtype)


def results(case: Case, dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
    """(output, gradients of q, k, v and the bias) with the masks of SEED."""
    tensors, grad_out = inputs(case, dtype)
    out = helo_fast.lcd_attention(*tensors, dropkey_p=DROPKEY, dropout_p=DROPOUT, seed=SEED, backend=backend)
    return out.detach(), *torch.autograd.grad(out, tensors, grad_out)


@cache
def truth(case: Case) -> list[tuple[Tensor, Tensor]]:
    """(float64, eager float32) of each of results()."""
    return list(zip(results(case, torch.float64, "eager"), results(case, torch.float32, "eager")))


@pytest.mark.parametrize("case, member", ATTENTION, ids=harness.identify)
def test_forward_backward(bench, case, member):
    tensors, grad_out = inputs(case, torch.float32)
    if member == "naive":

        def step(tensors=tensors, grad_out=grad_out, masks=None):
            q, k, v, bias = (*tensors, None)[:4]
            out = peers.naive_attention(q, k, v, bias, DROPKEY, DROPOUT, masks)
            return out.detach(), *torch.autograd.grad(out, tensors, grad_out)

        problems = philox.problems(range(case.batch), range(case.heads), case.heads, torch.device(case.device))
        masks = philox.masks(torch.tensor(SEED, device=case.device), problems, case.n, case.n, DROPKEY, DROPOUT)
        # In float64, adding -1e12 to a dropped logit leaves it out exactly as long as its row keeps a key.
        for actual, (exact, _) in zip(step(*inputs(case, torch.float64), masks), truth(case)):
            torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-9)
    else:
        bench.serve("lcd_attention", member)

        def step():
            return results(case, torch.float32, member)

        for name, actual, (exact, eager) in zip(("output", "dq", "dk", "dv", "dbias"), step(), truth(case)):
            assert_close(actual, exact, eager, what=f"{member} {name}")
    bench.time(step)
