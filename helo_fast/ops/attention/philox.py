"""Which keys DropKey drops and which weights dropout drops: the layout that every back end reproduces bit for bit.

One Philox 4x32-10 call decides both masks of four adjacent columns of one row:

| input       | value                                          |
|-------------|------------------------------------------------|
| key 0, 1    | low, high 32 bits of the seed (int64, two's complement) |
| counter 0   | column // 4                                    |
| counter 1   | row                                            |
| counter 2, 3 | low, high 32 bits of batch * H + head (64-bit) |

| output                                   | decides                                           |
|------------------------------------------|---------------------------------------------------|
| word w, bits 0 to 15, below T(dropkey_p) | DropKey drops column 4 (column // 4) + w          |
| word w, bits 16 to 31, below T(dropout_p) | dropout drops the weight of the same column       |

T(p) = round(65536 p), at most 65535 for dropout: a probability is taken to the nearest multiple of 2^-16, at most 2^-17 = 7.7e-6 away
(0.5 exactly; a dropout above 1 - 2^-17, up to 2^-16 away). Dropout rescales by the probability taken, 65536 / (65536 - T), so that the
weights keep their expectation exactly. Kernels are given T and the rescale, never p. Both masks come from one call whether or not both
are in use: a mask depends neither on the other's probability, nor on the tiling, nor on n or m.

Why so: the ten rounds are most of a mask's cost, so that 16 bits per decision (a quarter of a call per entry for both masks) halve it
against 32; a mask is a compare of packed 16-bit lanes; blocks of four make the row's bits contiguous where m is a multiple of 4; and
since row and column sit in words that do not mix at once, most of the first two rounds is shared by a row or by a column block.

Worked example: seed 2026, H = 4, batch 1, head 2, row 3, column 9 is counter (2, 3, 6, 0), key (2026, 0), hence the words
8533a8f3 fd7f484d c3a1ebd0 8b637dd9; column 9 is word 1: DropKey compares 0x484d and dropout 0xfd7f.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 1 << 16  # a decision reads 16 bits
COLUMNS_PER_CALL = 4
_ROUNDS = 10
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def dropkey_threshold(p: float) -> int:
    """T such that a key is dropped where its 16 bits are below T; 0 to 65536."""
    return round(p * LEVELS)


def dropout_threshold(p: float) -> int:
    """Likewise for a weight; at most 65535, so that the rescaling stays finite."""
    return min(round(p * LEVELS), LEVELS - 1)


def dropout_rescale(p: float) -> float:
    """What the kept weights are multiplied by: 1 / (1 - the probability taken)."""
    return LEVELS / (LEVELS - dropout_threshold(p))


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Ten rounds on int64 tensors that hold 32-bit words: four counter words, two key words (all broadcast) to four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Products wrap modulo 2^64; the shift is arithmetic, so that high halves need the mask.
        p0, p1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ (c1 ^ k0)) & _LOW, p1 & _LOW, ((p0 >> 32) ^ (c3 ^ k1)) & _LOW, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def words(seed: Tensor, problem: Tensor, n: int, m: int) -> tuple[Tensor, ...]:
    """The four output words of every call, each ``[*problem.shape, n, ceil(m / 4)]``; ``problem`` holds batch * H + head (int64)."""
    blocks = -(-m // COLUMNS_PER_CALL)
    problem = problem[..., None, None]
    row = torch.arange(n, device=problem.device).unsqueeze(-1)
    column = torch.arange(blocks, device=problem.device)
    key = seed.reshape(())
    return philox4x32((column, row, problem & _LOW, (problem >> 32) & _LOW), (key & _LOW, (key >> 32) & _LOW))


def problems(batches: range, heads: range, H: int, device: torch.device) -> Tensor:
    """batch * H + head of a slice of the batch and of the heads, [len(batches), len(heads)], in 64 bits."""
    batch = torch.arange(batches.start, batches.stop, device=device)
    return batch.unsqueeze(-1) * H + torch.arange(heads.start, heads.stop, device=device)


def masks(seed: Tensor, problem: Tensor, n: int, m: int, dropkey_p: float, dropout_p: float) -> tuple[Tensor | None, Tensor | None]:
    """(dropped keys, kept weights), boolean ``[*problem.shape, n, m]``; None for a mask whose probability is taken as 0."""
    drop_below, cut_below = dropkey_threshold(dropkey_p), dropout_threshold(dropout_p)
    if drop_below == 0 and cut_below == 0:
        return None, None
    output = words(seed, problem, n, m)

    def by_column(decisions: list[Tensor]) -> Tensor:
        return torch.stack(decisions, -1).flatten(-2)[..., :m]

    drop = by_column([(word & (LEVELS - 1)) < drop_below for word in output]) if drop_below else None
    keep = by_column([(word >> 16) >= cut_below for word in output]) if cut_below else None
    return drop, keep
