// Philox 4x32-10 and what its bits decide, in the layout of helo_fast/ops/attention/philox.py. cpu/philox.h makes the same words by
// vectors.
#pragma once

#include <cstdint>

#include "hd.h"

namespace helo_fast {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53, kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9, kPhiloxWeyl1 = 0xBB67AE85;
constexpr int kPhiloxColumns = 4;  // of a row, that one call decides for: a word each

// The keys of all rounds: a fifth of a call, if every call were to add them up.
struct PhiloxKeys {
  HELO_FAST_HD explicit PhiloxKeys(uint64_t seed) {
    HELO_FAST_UNROLL
    for (int round = 0; round < kPhiloxRounds; ++round) {
      first[round] = uint32_t(opaque(int(uint32_t(seed) + uint32_t(round) * kPhiloxWeyl0)));
      second[round] = uint32_t(opaque(int(uint32_t(seed >> 32) + uint32_t(round) * kPhiloxWeyl1)));
    }
  }
  uint32_t first[kPhiloxRounds], second[kPhiloxRounds];
};

// The words of columns 4 block, ... 4 block + 3 of a row; problem is batch * H + head.
HELO_FAST_HD void philox_words(const PhiloxKeys& keys, uint64_t problem, uint32_t row, uint32_t block, uint32_t (&words)[kPhiloxColumns]) {
  uint32_t c0 = block, c1 = row, c2 = uint32_t(problem), c3 = uint32_t(problem >> 32);
  HELO_FAST_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t(c0) * kPhiloxMultiplier0, p1 = uint64_t(c2) * kPhiloxMultiplier1;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ keys.first[round];
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ keys.second[round];
    c3 = uint32_t(p0);
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Whether DropKey drops a word's column, and whether dropout keeps its weight; the thresholds are T(dropkey_p) and T(dropout_p).
HELO_FAST_HD bool is_dropped(uint32_t word, uint32_t drop_below) { return (word & 0xffff) < drop_below; }
HELO_FAST_HD bool is_kept(uint32_t word, uint32_t cut_below) { return word >> 16 >= cut_below; }

// Of a call's four columns: bits 0 to 3 the dropped keys, bits 4 to 7 the kept weights.
constexpr uint8_t kAllKept = 0xf0;
HELO_FAST_HD uint8_t philox_decisions(const uint32_t (&words)[kPhiloxColumns], uint32_t drop_below, uint32_t cut_below) {
  unsigned bits = 0;
  HELO_FAST_UNROLL
  for (int w = 0; w < kPhiloxColumns; ++w) {
    bits |= unsigned(is_dropped(words[w], drop_below)) << w;
    bits |= unsigned(is_kept(words[w], cut_below)) << (kPhiloxColumns + w);
  }
  return uint8_t(bits);
}

}  // namespace helo_fast
