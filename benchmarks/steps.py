"""The two pieces of work that are both timed and weighed: sinkhorn's gradient, and one training step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

import helo_fast
from helo_fast import HeLo, HeLoConfig

from . import peers

EPSILON, MAX_ITER = 0.1, 100


def random_cost(batch: int, n: int, m: int, device: str = "cpu") -> Tensor:
    """U(0, 2), [B, n, m]."""
    return 2 * torch.rand(batch, n, m, generator=torch.Generator().manual_seed(n)).to(device)


def sinkhorn_gradient(member: str, batch: int, n: int, device: str = "cpu") -> Callable[[], Tensor]:
    """Forward and backward of <plan, G>: d/dcost [B, n, n]. ``member`` is a back end (implicit) or "unrolled autograd"."""
    cost = random_cost(batch, n, n, device).requires_grad_()
    G = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(1)).to(device)

    def step() -> Tensor:
        if member == "unrolled autograd":
            plan = peers.unrolled_sinkhorn(cost, EPSILON, MAX_ITER)
        else:
            plan = helo_fast.sinkhorn(cost, epsilon=EPSILON, max_iter=MAX_ITER, gradient="implicit", backend=member).plan
        return torch.autograd.grad(plan, cost, G)[0]

    return step


class TrainingStep:
    """Zeroed gradients, forward, loss and backward of HeLo at its default sizes.

    Args:
        preset: "released" or "paper".
        member: a back end or "auto"; "naive" (eager, with the solver's autograd graph built); "compile" (eager under torch.compile);
            each with " bfloat16" for autocast.
        batch: B.
        overrides: HeLoConfig fields.
    """

    def __init__(
        self, preset: str, member: str, batch: int, device: str = "cpu", *, dtype: torch.dtype = torch.float32, **overrides: object
    ):
        self.config = getattr(HeLoConfig, preset)(**overrides)
        self.member, _, half = member.partition(" ")
        self.half = bool(half)
        torch.manual_seed(0)
        self.model = HeLo(self.config).train().to(device, dtype)
        c = self.config
        generator = torch.Generator().manual_seed(1)
        shapes = ((c.n_channels, c.dim_eeg), (c.dim_gsr,), (c.dim_ppg,), (c.dim_video,))
        inputs = [torch.randn(batch, *shape, generator=generator) for shape in shapes]
        labels = torch.randn(batch, c.emotion_classes, generator=generator).softmax(-1)
        self.batch = [t.to(device, dtype) for t in (*inputs, labels)]
        embedding = torch.rand(batch, c.emotion_classes, c.feature_dim, generator=generator)
        self.label_embedding = None if c.learned_label_embedding else embedding.to(device, dtype)  # for answer(): draws depend on the dtype
        self.model.fit_correlation(self.batch[-1])
        # fallback_random: the seeds of torch's own generator, so that the answer can be compared.
        self.loss = (
            torch.compile(self.model.loss, dynamic=False, options={"fallback_random": True})
            if self.member == "compile"
            else self.model.loss
        )

    def __call__(self) -> Tensor:
        return self._step()

    def answer(self) -> tuple[Tensor, Tensor]:
        """(loss, all gradients in one vector) with the masks of one seed."""
        torch.manual_seed(2)
        loss = self._step(label_embedding=self.label_embedding)
        return loss.detach(), torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])

    def _step(self, **options: Tensor | None) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        backend = "eager" if self.member == "compile" else self.member
        transport = peers.naive_transport() if self.member == "naive" else helo_fast.backend(backend)
        device = self.batch[0].device.type
        autocast = torch.autocast(device, torch.bfloat16) if self.half else contextlib.nullcontext()
        with transport, autocast:
            loss, _ = self.loss(*self.batch, **options)
        loss.backward()  # each op's backward runs on the back end of its forward
        return loss
