"""What the solvers return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import Tensor

Array: TypeAlias = np.ndarray | Tensor


@dataclass(frozen=True, repr=False)
class OTResult:
    """The result of a batch of problems: NumPy arrays or tensors, as the inputs were.

    Source: the fields of ``ot.utils.OTResult`` (Flamary et al., "POT: Python Optimal Transport", JMLR 2021).
    """

    plan: Array  # [B, n, m]
    value: Array  # [B], regularisation included
    value_linear: Array  # [B]
    potentials: tuple[Array, Array]  # ([B, n], [B, m])
    log: dict  # "n_iter", and what the solver says of it
    value_quad: Array | None = None  # [B], of Gromov-Wasserstein
    sparse_plan: None = None  # plans are dense
    lazy_plan: None = None
    status: None = None

    @property
    def potential_a(self) -> Array:
        """The first potential, [B, n]."""
        return self.potentials[0]

    @property
    def potential_b(self) -> Array:
        """The second potential, [B, m]."""
        return self.potentials[1]

    @property
    def marginal_a(self) -> Array:
        """The plans' row sums, [B, n], near a. (POT's class is made for one problem: of a batch it sums another axis.)"""
        return self.plan.sum(-1)

    @property
    def marginal_b(self) -> Array:
        """The plans' column sums, [B, m], near b."""
        return self.plan.sum(-2)

    @property
    def marginals(self) -> tuple[Array, Array]:
        """Both."""
        return self.marginal_a, self.marginal_b

    def __repr__(self) -> str:
        kind = type(self.plan).__name__
        return f"OTResult(value={self.value},value_linear={self.value_linear},plan={kind}(shape={tuple(self.plan.shape)}))"
