"""The inner solver of gromov in Triton: IPOT or Sinkhorn on one linear cost in the log domain, a program's tile in registers.

Given N = -cost / epsilon [n, m] and a start H, step k is, with kN for IPOT and N for Sinkhorn,
    F_i = log a_i - logsumexp_j (kN_ij + H_j),  G_j = log b_j - logsumexp_i (kN_ij + F_i),
and the plan is exp(kN + F + G). The next H is G for Sinkhorn; for IPOT it is G and the step that G took, 2 G - (G before): the plan of
step k - 1, its column scalings with it, is what step k multiplies. So no plan is kept between steps, and nothing can underflow.

Potentials and exponents are in double, exponentials in the costs' dtype: kN grows with k, and its rounding would come back as large.
Invariants: where there is no mass, N is below every exponent, F and G are 0 and the plan is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gibbs(gain, columns, inside, column_alive, per_epsilon):
    """(N, H): gain / epsilon less the maxima of its rows, then of its columns, which would cost it digits. A term of i alone does
    not change the plan, one of j alone goes to the start, as -columns / epsilon does."""
    dtype: tl.constexpr = gain.dtype
    bound: tl.constexpr = 1e30 if dtype == tl.float32 else 1e200
    gain = tl.where(inside, gain, -bound)
    gain = tl.where(inside, gain - tl.max(gain, 1, keep_dims=True), -bound)
    top = tl.where(column_alive, tl.max(gain, 0, keep_dims=True), 0.0)
    scale = tl.minimum(per_epsilon, bound).to(dtype)
    N = tl.maximum((gain - top) * scale, -bound)
    start = (top.to(tl.float64) - columns.to(tl.float64)) * tl.minimum(per_epsilon, bound)
    return N, tl.where(column_alive, start, 0.0)


@triton.jit
def _logsumexp(N, power, potential, alive, axis: tl.constexpr):
    """Of power N + potential, along an axis; 0 where not alive."""
    logs = power * N.to(tl.float64) + potential
    top = tl.where(alive, tl.max(logs, axis, keep_dims=True), 0.0)
    total = tl.sum(tl.exp((logs - top).to(N.dtype)), axis, keep_dims=True)
    return top + tl.log(tl.where(alive, total, 1.0).to(tl.float64))


@triton.jit
def solve(N, start, a, b, steps, powers):
    """steps >= 1 of IPOT (powers) or of Sinkhorn from gibbs's result: the plan [BLOCK, BLOCK]; a [BLOCK, 1], b [1, BLOCK]."""
    log_a = tl.log(tl.where(a > 0, a, 1.0).to(tl.float64))
    log_b = tl.log(tl.where(b > 0, b, 1.0).to(tl.float64))
    H = start + tl.where(powers, 0.0, log_b)
    F, G = tl.zeros_like(log_a), tl.zeros_like(log_b)
    for step in range(steps):
        power = tl.where(powers, step + 1, 1).to(tl.float64)
        F = log_a - _logsumexp(N, power, H, a > 0, 1)
        before = G
        G = log_b - _logsumexp(N, power, F, b > 0, 0)
        H = tl.where(powers, 2 * G - before, G)
    power = tl.where(powers, steps, 1).to(tl.float64)
    return tl.exp((power * N.to(tl.float64) + (F + G)).to(N.dtype))
