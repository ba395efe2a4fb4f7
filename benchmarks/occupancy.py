"""Theoretical occupancy: how many blocks of a kernel a multiprocessor holds at once, and what limits them.

Registers are given to warps in units of 256, and each of a multiprocessor's four partitions has a quarter of them; shared memory to
blocks in units of 128 bytes, with 1 KiB of the system's own a block.
Source: NVIDIA, "CUDA C++ Programming Guide", technical specifications per compute capability, and the tuning guides for Ampere, Hopper
and Blackwell.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
PARTITIONS, REGISTER_UNIT, SHARED_UNIT, SHARED_RESERVED = 4, 256, 128, 1024
KIB = 1024


@dataclass(frozen=True)
class Limits:
    """Of one architecture: for a multiprocessor, and for a block on it."""

    shared: int  # bytes a multiprocessor
    shared_block: int  # bytes a block
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    threads_block: int = 1024


LIMITS = {80: Limits(164 * KIB, 163 * KIB), 90: Limits(228 * KIB, 227 * KIB), 100: Limits(228 * KIB, 227 * KIB)}  # by sm_<number>


@dataclass(frozen=True)
class Occupancy:
    blocks: int  # a multiprocessor
    warps: int
    share: float  # of the warps that it can hold
    limit: str  # "registers", "shared memory", "warps" or "blocks"


def occupancy(architecture: int, registers: int, shared: int, threads: int) -> Occupancy:
    """Of a kernel with ``registers`` a thread, ``shared`` bytes and ``threads`` a block; no blocks where one alone does not fit.

    Raises:
        KeyError: the limits of sm_<architecture> are not in LIMITS.
    """
    limits = LIMITS[architecture]
    warps = _round_up(threads, WARP) // WARP
    if threads > limits.threads_block:
        return Occupancy(0, 0, 0.0, "threads")
    if shared > limits.shared_block:
        return Occupancy(0, 0, 0.0, "shared memory")
    a_warp = _round_up(max(registers, 1) * WARP, REGISTER_UNIT)
    resident = limits.registers // PARTITIONS // a_warp * PARTITIONS  # warps
    blocks = {
        "registers": resident // warps,
        "shared memory": limits.shared // _round_up(shared + SHARED_RESERVED, SHARED_UNIT),
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
    }
    limit = min(blocks, key=blocks.get)
    return Occupancy(blocks[limit], blocks[limit] * warps, blocks[limit] * warps / limits.warps, limit)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
