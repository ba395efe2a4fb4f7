"""What the scaling iterations of sinkhorn.py and sinkhorn_packed.py do with a mass and the sum that it is divided by."""

import triton
import triton.language as tl

RANGE = tl.constexpr(1e8)


@triton.jit
def log_of(mass):
    """In double, -inf of 0."""
    return tl.where(mass > 0, tl.log(mass.to(tl.float64)), float("-inf"))


@triton.jit
def excess(log_mass, dtype: tl.constexpr):
    """log of what a mass near underflow leaves to its scaling, so that its sum neither overflows nor underflows; 0 of other masses."""
    LOWEST: tl.constexpr = -46.0 if dtype == tl.float32 else -455.0  # log of a sum that is_safe finds safe by far
    return tl.where(log_mass > float("-inf"), tl.minimum(log_mass - LOWEST, 0.0), 0.0)


@triton.jit
def first_scaling(mass):
    """exp(excess(log of the mass)), and 0 without mass."""
    return tl.minimum(mass * (9.496119420602448e19 if mass.dtype == tl.float32 else 4.017808803118279e197), 1.0)


@triton.jit
def scaling_of(mass, sums):
    return tl.where(mass > 0, mass / sums, 0.0)


@triton.jit
def is_safe(mass, sums, scaling):
    """Whether the scaling is within [1 / RANGE, RANGE] and the sums have lost nothing to underflow, or there is no mass."""
    TINY: tl.constexpr = 1e-22 if mass.dtype == tl.float32 else 1e-200
    return (sums > TINY) & (scaling >= 1 / RANGE) & (scaling <= RANGE) | ~(mass > 0)
