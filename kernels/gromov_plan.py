"""The inner solver of gromov in Triton: IPOT or Sinkhorn on one linear cost, in a program's registers.

Given N = -cost / epsilon [n, m] and a start H (of Sinkhorn, less log b), step k is
    x = a / (P u), y = b / (P' x), where P = exp(k N) for IPOT and exp(N) for Sinkhorn; the plan is diag(x) P diag(y).
The next u is y for Sinkhorn, and y^2 / (y of the step before) for IPOT: the plan of step k - 1, its column scalings with it, is what
step k multiplies. So no plan is kept between steps.

K_ij = P_ij exp(phi_i + psi_j) stands for P: a step of IPOT multiplies it by A_ij = exp(N_ij + f_i + g_j), so that psi drifts by g, and no
exponential is left in a step. psi is log(y / b) and g its increment at the step that set them, f makes the largest entry of a row of A
1: the scalings that are left change little and K never grows. A step that meets a sum or a scaling outside [1 / range, range] is
done again by log-sum-exps in double: kN grows with k, and its rounding would come back as large. Its result sets psi, g, K and A anew.

Registers hold K and A; N waits in memory for a step that is done again. Of psi and g, in double, there are vectors alone.
Invariants: where there is no mass, N is below every exponent, K and the plan are 0, sums of K are replaced by 1 and no scaling is
unsafe for it. Masses may be as small as their dtype allows: scalings of columns are held over b, K over a and b.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gromov_costs import SLICE


@triton.jit
def again(value, iteration, never):
    """value, which the compiler cannot know: it would hold what is made from it in registers from one use to the next. never is below
    every iteration, which the compiler cannot know either."""
    return value + tl.where(iteration < never, 1, 0).to(value.dtype)


@triton.jit
def store_tile(matrix, index, n, m, values):
    """matrix = (pointer, strides of rows and columns: in 64 bits, unless the offsets in a problem fit in 32)."""
    pointer, stride_n, stride_m = matrix
    row, column = index[:, None], index[None, :]
    tl.store(pointer + (row * stride_n + column * stride_m), values, mask=(row < n) & (column < m))


@triton.jit
def load_entries(matrix, row, column, n, m, inside=True):
    pointer, stride_n, stride_m = matrix
    return tl.load(pointer + (row * stride_n + column * stride_m), mask=(row < n) & (column < m) & inside, other=0.0)


@triton.jit
def add_entries(total, matrix, scale, index, n, m, alive_n, alive_m):
    """total + scale matrix where alive_n [BLOCK, 1], alive_m [1, BLOCK], exact but for one rounding: a product with the identity, whose
    result is laid out as that of other products, as a load would not be."""
    dtype: tl.constexpr = total.dtype
    large: tl.constexpr = 1e30 if dtype == tl.float32 else 1e200
    for start in range(0, m, SLICE):
        k = start + tl.arange(0, SLICE)
        values = scale * load_entries(matrix, index[:, None], k[None, :], n, m, alive_n)
        values = tl.minimum(tl.maximum(values, -large), large)  # infinity would spoil its row
        identity = tl.where((k[:, None] == index[None, :]) & alive_m, 1.0, 0.0).to(dtype)
        total = tl.dot(values, identity, total, input_precision="ieee", out_dtype=dtype)
    return total


@triton.jit
def gibbs(gain, columns, inside, column_alive, per_epsilon):
    """(N, H): gain / epsilon less the maxima of its rows, then of its columns, which would cost it digits. A term of i alone does
    not change the plan, one of j alone goes to the start, as -columns / epsilon does."""
    dtype: tl.constexpr = gain.dtype
    large: tl.constexpr = 1e30 if dtype == tl.float32 else 1e200  # exp(-large) is 0 in any company
    gain = tl.where(inside, gain, -large)
    gain = tl.where(inside, gain - tl.max(gain, 1, keep_dims=True), -large)
    top = tl.where(column_alive, tl.max(gain, 0, keep_dims=True), 0.0)
    scale = tl.minimum(per_epsilon, large).to(dtype)
    N = tl.where(inside, tl.maximum((gain - top) * scale, -large), -large)
    start = (top.to(tl.float64) - columns.to(tl.float64)) * tl.minimum(per_epsilon, large)
    return N, tl.where(column_alive, start, 0.0)


@triton.jit
def _logarithm(mass):
    """In double, 0 of none."""
    return tl.log(tl.where(mass > 0, mass, 1.0).to(tl.float64))


@triton.jit
def _logsumexp(N, power, potential, alive, axis: tl.constexpr):
    """Of power N + potential, along an axis; 0 where not alive."""
    logs = power * N.to(tl.float64) + potential
    top = tl.where(alive, tl.max(logs, axis, keep_dims=True), 0.0)
    total = tl.sum(tl.exp((logs - top).to(N.dtype)), axis, keep_dims=True)
    return top + tl.log(tl.where(alive, total, 1.0).to(tl.float64))


@triton.jit
def _by_logarithms(N, H, before, a, b, step, powers):
    """(K, A, x, psi, g) of a step from its log u and its log y of the step before."""
    dtype: tl.constexpr = N.dtype
    large: tl.constexpr = 1e30 if dtype == tl.float32 else 1e200
    power = tl.where(powers, step, 1).to(tl.float64)
    log_b = _logarithm(b)
    F = _logarithm(a) - _logsumexp(N, power, H, a > 0, 1)
    G = log_b - _logsumexp(N, power, F, b > 0, 0)
    psi, g = G - log_b, tl.where(powers, G - before, 0.0)
    x = tl.where(a > 0, tl.maximum(a, 1 / large), 0.0)  # K_ij may be 1 / x_i
    K = tl.exp((power * N.to(tl.float64) + ((F - _logarithm(x)) + psi)).to(N.dtype))
    drift = N.to(tl.float64) + g
    A = tl.exp((drift - tl.max(drift, 1, keep_dims=True)).to(N.dtype))
    return K, tl.where(powers, A, 1.0), x, psi, g


@triton.jit
def _safe(value):
    limit: tl.constexpr = 1e10 if value.dtype == tl.float32 else 1e80
    return (value > 1 / limit) & (value < limit)


@triton.jit
def _all_safe(sizes):
    """Of values and their reciprocals. Their sum, unlike their maximum, is NaN where one of them is."""
    limit: tl.constexpr = 1e10 if sizes.dtype == tl.float32 else 1e80
    return tl.sum(sizes) < limit


@triton.jit
def _share(b, most):
    return tl.where(b > 0, b / most, 1.0)


@triton.jit
def _half_steps(K, u, a, a_pad, b_pad):
    """(x, K' x) for x = a / (K u): NaN if a row's sum is not safe, so that columns tell of rows too. Pads, 1 where there is no mass,
    cost less than a choice."""
    rows = tl.sum(K * u, 1, keep_dims=True) + a_pad
    x = tl.where(_safe(rows), a / rows, float("nan"))
    return x, tl.sum(K * x, 0, keep_dims=True) + b_pad


@triton.jit
def solve(N, start, N_at, potentials, index, n, m, a, b, steps, powers):
    """steps >= 1 of IPOT (powers) or of Sinkhorn from gibbs's result, N of which stands in memory at N_at too: the plan [BLOCK, BLOCK].
    a [BLOCK, 1], b [1, BLOCK]; potentials points to room for psi and g."""
    dtype: tl.constexpr = N.dtype
    large: tl.constexpr = 1e30 if dtype == tl.float32 else 1e200
    ones = tl.full(b.shape, 1.0, dtype)
    column = index[None, :]
    b_most, b_least = tl.max(b), tl.min(tl.where(b > 0, b, float("inf")))
    b_even = _safe(b_least / b_most)
    a_pad, b_pad = tl.where(a > 0, 0.0, 1.0).to(dtype), tl.where(b > 0, 0.0, 1.0).to(dtype)

    # The first step, where it can do without doubles.
    most = tl.max(tl.where(b > 0, start, float("-inf")), 1, keep_dims=True)
    K = tl.exp(N + tl.where(b > 0, start - most, 0.0).to(dtype))
    x, last = _half_steps(K, tl.where(powers, 1.0, b), a, a_pad, b_pad)
    v = 1.0 / last  # u / b
    safe = _all_safe(last + v)
    # Once they are needed, psi is start + log first, and g is psi.
    first = tl.where(powers, v, 1.0)
    tl.store(potentials + column, start, mask=column < m)
    base = 0
    # exp(N + f + g) is K itself with psi in it, but for a factor of its row.
    K *= first
    top = tl.where(powers & (a > 0), tl.max(K, 1, keep_dims=True), 1.0)
    K, x = K / top, x * top
    A = tl.where(powers, K, 1.0)
    # psi + g is 2 log(y / b) where u is y^2 / 1: one b is left over, here of size 1 at most.
    v, last = tl.where(powers, _share(b, b_most), v), tl.where(powers, 1.0, last)
    y_last = tl.where(powers, 1.0, v)  # y / b

    for step in range(1, steps + 1):
        sums, y, after = last, y_last, v
        if step > 1:
            K *= A
            x, sums = _half_steps(K, b * v, a, a_pad, b_pad)
            y = 1.0 / sums
            after = y * tl.where(powers, y * last, 1.0)
            safe = _all_safe((sums + y) + (sums * tl.where(powers, sums * y_last, 1.0) + after)) & (b_even | (step != 2) | (powers == 0))
        if not safe:
            tl.debug_barrier()  # what one thread writes, others read
            index_again, a_again, b_again = again(index, step, -steps), again(a, step, -steps), again(b, step, -steps)
            here = index_again[None, :]
            psi = tl.load(potentials + here, mask=here < m, other=0.0)
            g = tl.load(potentials + m + here, mask=here < m, other=0.0)
            log_b = _logarithm(b_again)
            if step == 1:
                H = psi + tl.where(powers, 0.0, log_b)
                before = log_b  # the start y = 1 counts as b: its share of the largest b makes up for it
            else:
                if base == 0:
                    psi += tl.log(first.to(tl.float64))
                    g = tl.where(powers, psi, 0.0)
                    base = 1
                H = psi + (step - base) * g + log_b + tl.where(powers & (step == 2), log_b, tl.log(v.to(tl.float64)))
                before = psi + (step - 1 - base) * g + log_b - tl.log(last.to(tl.float64))
            N_again = add_entries(tl.zeros_like(N), N_at, 1.0, index_again, n, m, a_again > 0, b_again > 0)
            N_again = tl.where((a_again > 0) & (b_again > 0), N_again, -large)
            K, A, x, psi, g = _by_logarithms(N_again, H, before, a_again, b_again, step, powers)
            tl.debug_barrier()  # they have been read
            tl.store(potentials + here, psi, mask=here < m)
            tl.store(potentials + m + here, g, mask=here < m)
            base = step
            sums, y = ones, ones
            after = tl.where(powers & (step == 1), _share(b_again, b_most), 1.0)
        last, y_last, v = sums, y, after
    return tl.where(K > 0, x * K * (b * y_last), 0.0)
