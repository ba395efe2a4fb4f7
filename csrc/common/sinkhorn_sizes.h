// Which team solves which sizes in registers: the smallest grid that a problem fits.
#pragma once

#include "sinkhorn_registers.h"

namespace helo_fast {

// In float32 one warp; in float64, which is seldom in a hurry, few grids, so that there is less to compile.
using Grid16 = Grid<8, 4, 2, 4>;
using Grid32 = Grid<8, 4, 4, 8>;
using Grid40 = Grid<8, 4, 5, 9>;
using Grid64 = Grid<8, 4, 8, 16>;
using Grid64OfWarps = Grid<16, 8, 4, 8>;

template <typename Grid>
bool fits(int64_t n, int64_t m) {
  return n <= Grid::kMaxRows && m <= Grid::kMaxColumns;
}

// Whether a solver has to know soft marginals or to keep a history.
template <typename scalar>
bool is_general(const SinkhornBatch<scalar>& x) {
  return x.kept > 0 || x.kappa_a != 1 || x.kappa_b != 1;
}

// call(Grid()) with the grid for the size; false where there is none.
template <typename scalar, typename Call>
bool with_grid(int64_t n, int64_t m, const Call& call) {
  const auto try_grid = [&](auto grid) {
    const bool found = fits<decltype(grid)>(n, m);
    if (found) call(grid);
    return found;
  };
  if constexpr (sizeof(scalar) == 8)
    return try_grid(Grid16()) || try_grid(Grid64OfWarps());
  else
    return try_grid(Grid16()) || try_grid(Grid32()) || try_grid(Grid40()) || try_grid(Grid64());
}

}  // namespace helo_fast
