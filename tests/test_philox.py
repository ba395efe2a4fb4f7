"""The mask layout: published vectors, the documented example, an integer-only twin, and statistics."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from helo_fast.ops.attention import philox

MASK = 0xFFFFFFFF
# Random123, kat_vectors, philox4x32 10
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def twin(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox 4x32-10 in Python's unbounded integers."""
    (a, b, c, d), (k, j) = counter, key
    for _ in range(10):
        p, r = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (r >> 32) ^ b ^ k, r & MASK, (p >> 32) ^ d ^ j, p & MASK
        k, j = (k + 0x9E3779B9) & MASK, (j + 0xBB67AE85) & MASK
    return a, b, c, d


def decide(seed: int, problem: int, row: int, column: int, drop_below: int, cut_below: int) -> tuple[bool, bool]:
    """The documented layout, one entry at a time: (dropped by DropKey, kept by dropout)."""
    key = seed & MASK, (seed >> 32) & MASK
    word = twin((column // 4, row, problem & MASK, problem >> 32), key)[column % 4]
    return (word & 0xFFFF) < drop_below, (word >> 16) >= cut_below


def grid(B: int, H: int) -> torch.Tensor:
    return philox.problems(range(B), range(H), H, torch.device("cpu"))


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_published_vectors(counter, key, expected):
    output = philox.philox4x32(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(word.item() for word in output) == expected
    assert twin(counter, key) == expected


def test_documented_example():
    output = philox.words(torch.tensor(2026), grid(2, 4), 5, 12)
    at = [word[1, 2, 3, 2].item() for word in output]
    assert at == [0x8533A8F3, 0xFD7F484D, 0xC3A1EBD0, 0x8B637DD9]
    assert all(f"{word:08x}" in philox.__doc__ for word in at)
    # column 9 compares 0x484d for DropKey and 0xfd7f for dropout: one level either side of the thresholds
    for p, dropped in ((0x484D, False), (0x484E, True)):
        assert philox.masks(torch.tensor(2026), grid(2, 4), 5, 12, p / 65536, 0.0)[0][1, 2, 3, 9].item() is dropped
    for p, kept in ((0xFD7F, True), (0xFD80, False)):
        assert philox.masks(torch.tensor(2026), grid(2, 4), 5, 12, 0.0, p / 65536)[1][1, 2, 3, 9].item() is kept


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize("problem", [0, 7, 2**32 - 1, 2**32 + 5, 2**40 + 3])
def test_masks_follow_the_layout_at_any_index(seed, problem):
    n, m = 3, 7
    drop, keep = philox.masks(torch.tensor(seed), torch.tensor([problem]), n, m, 0.3, 0.6)
    for row, column in itertools.product(range(n), range(m)):
        expected = decide(seed, problem, row, column, round(0.3 * 65536), round(0.6 * 65536))
        assert (drop[0, row, column].item(), keep[0, row, column].item()) == expected


def test_problem_index_is_64_bit():
    found = philox.problems(range(2**33, 2**33 + 2), range(3, 5), 8, torch.device("cpu"))
    assert found.tolist() == [[2**36 + 3, 2**36 + 4], [2**36 + 11, 2**36 + 12]]


def test_masks_do_not_depend_on_the_tiling_or_on_each_other():
    seed, H = torch.tensor(11), 3
    drop, keep = philox.masks(seed, grid(4, H), 6, 13, 0.5, 0.25)
    part = philox.problems(range(2, 4), range(1, 3), H, torch.device("cpu"))
    part_drop, part_keep = philox.masks(seed, part, 5, 9, 0.5, 0.25)
    assert torch.equal(part_drop, drop[2:, 1:, :5, :9]) and torch.equal(part_keep, keep[2:, 1:, :5, :9])
    alone, nothing = philox.masks(seed, grid(4, H), 6, 13, 0.5, 0.0)
    assert nothing is None and torch.equal(alone, drop)
    nothing, alone = philox.masks(seed, grid(4, H), 6, 13, 0.0, 0.25)
    assert nothing is None and torch.equal(alone, keep)


def test_probabilities_are_taken_to_16_bits():
    for p in (0.0, 1e-3, 0.1, 0.25, 0.5, 0.7, 0.999, 1.0):
        assert abs(philox.dropkey_threshold(p) / 65536 - p) <= 2**-17
    assert philox.dropkey_threshold(0.5) == philox.dropout_threshold(0.5) == 32768
    assert philox.dropkey_threshold(1.0) == 65536
    assert philox.dropout_threshold(1 - 1e-9) == 65535 and math.isfinite(philox.dropout_rescale(1 - 1e-9))
    # the rescale is that of the probability taken, which is not quite 0.1
    assert philox.dropout_rescale(0.1) == 65536 / (65536 - 6554) != 1 / 0.9
    assert philox.dropout_rescale(0.0) == philox.dropout_rescale(7e-6) == 1.0
    assert philox.masks(torch.tensor(1), grid(1, 1), 2, 2, 7e-6, 7e-6) == (None, None)
    assert philox.masks(torch.tensor(1), grid(2, 2), 9, 9, 1.0, 0.0)[0].all()


def assert_binomial(successes: int, trials: int, p: float) -> None:
    assert abs(successes - trials * p) <= 5 * math.sqrt(trials * p * (1 - p)), (successes / trials, p)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_rates(p):
    drop, keep = philox.masks(torch.tensor(99), grid(64, 4), 32, 36, p, p)
    assert_binomial(drop.sum().item(), drop.numel(), round(p * 65536) / 65536)
    assert_binomial((~keep).sum().item(), keep.numel(), round(p * 65536) / 65536)
    # each of the eight 16-bit lanes by itself
    for column in range(4):
        assert_binomial(drop[..., column::4].sum().item(), drop[..., column::4].numel(), p)
        assert_binomial((~keep[..., column::4]).sum().item(), drop[..., column::4].numel(), p)


def test_independence():
    """At p = 1/2 the exclusive or of independent masks is a fair coin: between masks, neighbours of every kind, and seeds."""
    drop, keep = philox.masks(torch.tensor(5), grid(64, 8), 32, 32, 0.5, 0.5)
    other_drop, other_keep = philox.masks(torch.tensor(6), grid(64, 8), 32, 32, 0.5, 0.5)
    high_drop, _ = philox.masks(torch.tensor(5 + 2**32), grid(64, 8), 32, 32, 0.5, 0.5)
    pairs = {"masks": (drop, keep), "seeds": (drop, other_drop), "dropout seeds": (keep, other_keep), "high seeds": (drop, high_drop)}
    for mask_name, mask in (("drop", drop), ("keep", keep)):
        for dim, dim_name in enumerate(("batch", "head", "row", "column")):
            for step in (1, 4):
                size = mask.shape[dim] - step
                pairs[f"{mask_name} {dim_name} {step}"] = (mask.narrow(dim, 0, size), mask.narrow(dim, step, size))
    for name, (x, y) in pairs.items():
        differing = (x ^ y).sum().item()
        assert abs(differing - x.numel() / 2) <= 2.5 * math.sqrt(x.numel()), name


def test_a_row_is_all_dropped_as_often_as_it_should():
    drop, _ = philox.masks(torch.tensor(8), grid(256, 4), 64, 4, 0.5, 0.0)
    assert_binomial(drop.all(-1).sum().item(), drop[..., 0].numel(), 1 / 16)
