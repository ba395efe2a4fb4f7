// Which team solves which gromov problems: the smallest grid that they fit.
#pragma once

#include "gromov_tokens.h"

namespace helo_fast {

// In float32 one warp to 36 tokens, four beyond; in float64, which is seldom in a hurry, eight.
using GromovGrid16 = Grid<8, 4, 2, 4>;
using GromovGrid36 = Grid<8, 4, 5, 9>;
using GromovGrid64 = Grid<16, 8, 4, 8>;
using GromovGrid64Double = Grid<16, 16, 4, 4>;

// call(Grid()) with the grid for the size; false where there is none.
template <typename scalar, typename Call>
bool with_gromov_grid(int64_t n, int64_t m, const Call& call) {
  const auto try_grid = [&](auto grid) {
    using Grid = decltype(grid);
    const bool found = n <= Grid::kMaxRows && n <= Grid::kMaxColumns && m <= Grid::kMaxRows && m <= Grid::kMaxColumns;
    if (found) call(grid);
    return found;
  };
  if constexpr (sizeof(scalar) == 8)
    return try_grid(GromovGrid64Double());
  else
    return try_grid(GromovGrid16()) || try_grid(GromovGrid36()) || try_grid(GromovGrid64());
}

}  // namespace helo_fast
