"""The six metrics of emotion distribution learning, as functions and as torchmetrics.

With a label distribution p and a prediction q over K emotions: Chebyshev max|p - q|; Clark
sqrt(sum ((p - q) / (p + q))^2); Canberra sum |p - q| / (p + q); KL sum p ln(p / q); cosine; intersection sum min(p, q).
Clark and Canberra are not divided by K (or its root). Lower is better for the first four. Source: Geng, "Label
Distribution Learning", IEEE TKDE 2016.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

KL_FLOOR = torch.finfo(torch.float32).eps


def chebyshev(p: Tensor, q: Tensor) -> Tensor:
    """Largest absolute difference: p, q [..., K] -> [...]."""
    return (p - q).abs().amax(dim=-1)


def _relative(p: Tensor, q: Tensor) -> Tensor:
    total = p + q
    return torch.where(total > 0, (p - q).abs() / torch.where(total > 0, total, 1), 0)  # 0/0 counts 0


def clark(p: Tensor, q: Tensor) -> Tensor:
    """Root of the sum of squared relative differences, a 0/0 term being 0: p, q [..., K] -> [...]."""
    return _relative(p, q).square().sum(dim=-1).sqrt()


def canberra(p: Tensor, q: Tensor) -> Tensor:
    """Sum of relative differences, a 0/0 term being 0: p, q [..., K] -> [...]."""
    return _relative(p, q).sum(dim=-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the prediction q from the label p in nats: p, q [..., K] -> [...].

    q is floored at the float32 epsilon (whatever its dtype); a term with p = 0 is 0.
    """
    return (torch.xlogy(p, p) - torch.xlogy(p, q.clamp_min(KL_FLOOR))).sum(dim=-1)


def cosine(p: Tensor, q: Tensor) -> Tensor:
    """Cosine of the angle between p and q: [..., K] -> [...]."""
    return torch.nn.functional.cosine_similarity(p, q, dim=-1, eps=1e-12)


def intersection(p: Tensor, q: Tensor) -> Tensor:
    """Common mass, sum min(p, q): p, q [..., K] -> [...]."""
    return torch.minimum(p, q).sum(dim=-1)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "chebyshev": chebyshev,
    "clark": clark,
    "canberra": canberra,
    "kl": kl,
    "cosine": cosine,
    "intersection": intersection,
}
"""The metrics by the names that logs and reports use."""

HIGHER_IS_BETTER: frozenset[str] = frozenset({"cosine", "intersection"})


class DistributionMetric(Metric):
    """Mean over all samples of one of ``FUNCTIONS``, in float64, summed over processes.

    ``update`` takes ``preds`` and ``target`` by name only: torchmetrics puts the prediction first, the formulas the
    label, and KL tells them apart.
    """

    name: str
    full_state_update = False
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, *, preds: Tensor, target: Tensor) -> None:
        """Adds a batch.

        Args:
            preds: [B, K] predicted distributions q.
            target: [B, K] label distributions p.

        Raises:
            ValueError: the shapes differ or are not [B, K].
        """
        if preds.ndim != 2 or preds.shape != target.shape:
            raise ValueError(f"{self.name}: preds and target: expected two [B, K], got {tuple(preds.shape)} and {tuple(target.shape)}")
        self.total += FUNCTIONS[self.name](target.double(), preds.double()).sum()
        self.count += len(preds)

    def compute(self) -> Tensor:
        """The mean, a float64 scalar; NaN before the first update."""
        return self.total / self.count


class Chebyshev(DistributionMetric):
    """Mean ``chebyshev`` distance."""

    name = "chebyshev"
    higher_is_better = False


class Clark(DistributionMetric):
    """Mean ``clark`` distance."""

    name = "clark"
    higher_is_better = False


class Canberra(DistributionMetric):
    """Mean ``canberra`` distance."""

    name = "canberra"
    higher_is_better = False


class KL(DistributionMetric):
    """Mean ``kl`` divergence of preds from target, in nats."""

    name = "kl"
    higher_is_better = False


class Cosine(DistributionMetric):
    """Mean ``cosine`` similarity."""

    name = "cosine"
    higher_is_better = True


class Intersection(DistributionMetric):
    """Mean ``intersection`` similarity."""

    name = "intersection"
    higher_is_better = True


def emotion_metrics() -> MetricCollection:
    """The six metrics, keyed as ``FUNCTIONS``.

    Example:
        >>> metrics = emotion_metrics()
        >>> metrics.update(preds=torch.tensor([[0.5, 0.5]]), target=torch.tensor([[0.25, 0.75]]))
        >>> {name: round(float(value), 4) for name, value in metrics.compute().items()}["kl"]
        0.1308
    """
    classes = (Chebyshev, Clark, Canberra, KL, Cosine, Intersection)
    # No compute groups: torchmetrics forms them from states that are equal after one batch, and after a perfect batch
    # Chebyshev, Clark, Canberra and KL are all 0 and would be one for good.
    return MetricCollection({metric.name: metric() for metric in classes}, compute_groups=False)
