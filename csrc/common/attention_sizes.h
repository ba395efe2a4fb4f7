// Which team serves which attention problems: the smallest grid that they fit.
#pragma once

#include "attention.h"

namespace helo_fast {

// In float32 one warp to 36 rows and columns, four beyond; in float64, which is seldom in a hurry, eight.
using AttentionGrid20 = Grid<8, 4, 3, 5>;
using AttentionGrid36 = Grid<8, 4, 5, 9>;
using AttentionGrid64 = Grid<16, 8, 4, 8>;
using AttentionGrid64Double = Grid<16, 16, 4, 4>;

// Rows and columns, and the head dimension, that shared memory suffices for; helo_fast/ops/attention/backends.py asks for no more.
template <typename scalar>
constexpr int64_t kMostAttentionSide = sizeof(scalar) == 8 ? 56 : 64;
template <typename scalar>
constexpr int64_t kMostAttentionDim = sizeof(scalar) == 8 ? 64 : 128;

// call(Grid()) with the grid for the size; false where there is none.
template <typename scalar, typename Call>
bool with_attention_grid(int64_t n, int64_t m, int64_t d, const Call& call) {
  const auto try_grid = [&](auto grid) {
    using Grid = decltype(grid);
    const bool found = n <= Grid::kMaxRows && m <= Grid::kMaxRows && m <= Grid::kMaxColumns;
    if (found) call(grid);
    return found;
  };
  if (n > kMostAttentionSide<scalar> || m > kMostAttentionSide<scalar> || d > kMostAttentionDim<scalar>) return false;
  if constexpr (sizeof(scalar) == 8)
    return try_grid(AttentionGrid64Double());
  else
    return try_grid(AttentionGrid20()) || try_grid(AttentionGrid36()) || try_grid(AttentionGrid64());
}

}  // namespace helo_fast
