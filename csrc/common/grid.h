// A matrix over a grid of lanes: who holds which entries, and what a lane knows of the rows and columns that it shares with others.
//
// Lanes form a grid of kRows x kColumns; lane (r, c) holds entries of kTileRows rows r + kRows s and kTileColumns columns c + kColumns s.
// Row sums are shared by the lanes of equal r, column sums by those of equal c (split.h, which also orders the entries in a tile).
#pragma once

#include "split.h"

namespace helo_fast {

template <int rows, int columns, int tile_rows, int tile_columns>
struct Grid {
  static constexpr int kRows = rows, kColumns = columns, kTileRows = tile_rows, kTileColumns = tile_columns;
  static constexpr int kLanes = rows * columns, kMaxRows = rows * tile_rows, kMaxColumns = columns * tile_columns;
  static constexpr int kStride = (kMaxColumns + 31) / 32 * 32;
};

// Rows or columns: what this lane owns, and the scalings of its tile.
template <typename scalar, int tile, int peers, int peer_stride, int step>
struct Side {
  using Split = helo_fast::Split<tile, peers, peer_stride>;
  static constexpr int kTile = tile, kOwned = Split::kOwned;
  template <typename Slot>
  HELO_FAST_HD int at(Slot slot) const {
    return place + step * Split::entry(slot, peer);
  }
  // Whether the k-th owned entry has mass, and is this lane's to write and to count.
  template <typename Slot>
  HELO_FAST_HD bool holds(int k, Slot slot) const {
    return empty[k] == 0 && Split::counts(slot, peer);
  }

  int place, peer;
  scalar mass[kOwned], empty[kOwned], sums[kOwned], owned[kOwned], scaling[kTile];
};

template <typename scalar, typename Grid>
using RowsOf = Side<scalar, Grid::kTileRows, Grid::kColumns, 1, Grid::kRows>;
template <typename scalar, typename Grid>
using ColumnsOf = Side<scalar, Grid::kTileColumns, Grid::kRows, Grid::kColumns, Grid::kColumns>;

// Where a lane stands. The compiler does not know it: what one phase makes of it does not wait in registers for the next.
template <typename Grid, typename Rows, typename Columns>
HELO_FAST_HD void take_place(int lane, Rows& rows, Columns& columns) {
  lane = opaque(lane);
  rows.place = columns.peer = lane / Grid::kColumns;
  columns.place = rows.peer = lane % Grid::kColumns;
}

// One side's sums of K times the other side's scaling.
template <bool of_rows, typename Team, typename scalar, int rows, int columns, typename Mine, typename Other>
HELO_FAST_HD void sum_products(Team& team, const scalar (&K)[rows][columns], Mine& mine, const Other& other) {
  scalar parts[Mine::kTile];
  HELO_FAST_UNROLL
  for (int s = 0; s < Mine::kTile; ++s) {
    parts[s] = 0;
    HELO_FAST_UNROLL
    for (int t = 0; t < Other::kTile; ++t) parts[s] += (of_rows ? K[s][t] : K[t][s]) * other.scaling[t];
  }
  Mine::Split::reduce(team, parts, mine.sums, Plus());
  Mine::Split::for_owned([&](int k, auto) { mine.sums[k] += mine.empty[k]; });
}

// mass / sum to two ulps, of a sum that is far from underflow: the division that is right to the last bit costs as much as the sum.
HELO_FAST_HD double quotient(double mass, double sum) { return mass / sum; }
HELO_FAST_HD float quotient(float mass, float sum) {
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(sum));
  return mass * inverse;
#else
  return mass / sum;
#endif
}

}  // namespace helo_fast
