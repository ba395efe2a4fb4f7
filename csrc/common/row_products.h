// Products of rows with rows of matrices in shared memory, over a grid of lanes (grid.h); each lane has its tile in the order of its entries.
//
// Operands are read 16 bytes at a time. Rows are an odd number of such pieces apart, which meets all banks.
#pragma once

#include "grid.h"

namespace helo_fast {

template <typename scalar>
struct SharedMatrix {
  scalar* data;
  int stride;
  HELO_FAST_HD scalar& operator()(int i, int j) const { return data[i * stride + j]; }
};

template <typename scalar, typename Grid>
class RowProducts {
 public:
  using Matrix = SharedMatrix<scalar>;
  using Tile = scalar[Grid::kTileRows][Grid::kTileColumns];
  static constexpr int kPiece = 16 / int(sizeof(scalar));  // entries of 16 bytes

  HELO_FAST_HD static int whole_pieces(int count) { return (count + kPiece - 1) / kPiece * kPiece; }
  HELO_FAST_HD static int stride(int count) { return (whole_pieces(count) / kPiece | 1) * kPiece; }

  // Anew in each phase, as in grid.h.
  HELO_FAST_HD void take_place(int lane) {
    lane = opaque(lane);
    row_ = lane / Grid::kColumns, column_ = lane % Grid::kColumns;
  }
  HELO_FAST_HD int row(int s) const { return row_ + Grid::kRows * s; }
  HELO_FAST_HD int column(int t) const { return column_ + Grid::kColumns * t; }
  HELO_FAST_HD bool is_first_column() const { return column_ == 0; }

  // body(s, t, i, j) over this lane's tile.
  template <typename Body>
  HELO_FAST_HD void for_tile(const Body& body) const {
    unroll<Grid::kTileRows>([&](auto s) { unroll<Grid::kTileColumns>([&](auto t) { body(s, t, row(s), column(t)); }); });
  }

  HELO_FAST_HD void clear(Tile& tile) const {
    for_tile([&](auto s, auto t, int, int) { tile[s][t] = 0; });
  }

  // tile_ij += sum_k left_ik right_jk, k < length, a multiple of kPiece.
  HELO_FAST_HD void add(Matrix left, Matrix right, int length, Tile& tile) const {
    HELO_FAST_ROLLED
    for (int k = 0; k < length; k += kPiece) {
      Piece down[Grid::kTileRows];
      HELO_FAST_UNROLL
      for (int s = 0; s < Grid::kTileRows; ++s) down[s] = *reinterpret_cast<const Piece*>(&left(row(s), k));
      HELO_FAST_UNROLL
      for (int t = 0; t < Grid::kTileColumns; ++t) {
        const Piece across = *reinterpret_cast<const Piece*>(&right(column(t), k));
        HELO_FAST_UNROLL
        for (int s = 0; s < Grid::kTileRows; ++s) {
          HELO_FAST_UNROLL
          for (int p = 0; p < kPiece; ++p) tile[s][t] += down[s].at[p] * across.at[p];
        }
      }
    }
  }

 private:
  struct alignas(16) Piece {
    scalar at[kPiece];
  };

  int row_ = 0, column_ = 0;
};

}  // namespace helo_fast
