// Products of matrices in shared memory, rows with rows or with columns, over a grid of lanes (grid.h); each lane has its tile in the order
// of its entries.
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
  // Of a product of rows with columns a lane has as many rows, and pieces of adjacent columns.
  static constexpr int kPieces = 2, kWidth = Grid::kColumns * kPieces * kPiece;
  using PieceTile = scalar[Grid::kTileRows][kPieces * kPiece];
  struct alignas(16) Piece {
    scalar at[kPiece];
  };

  HELO_FAST_HD static int whole_pieces(int count) { return (count + kPiece - 1) / kPiece * kPiece; }
  HELO_FAST_HD static int stride(int count) { return (whole_pieces(count) / kPiece | 1) * kPiece; }

  // Anew in each phase, as in grid.h.
  HELO_FAST_HD void take_place(int lane) {
    lane = opaque(lane);
    row_ = lane / Grid::kColumns, column_ = lane % Grid::kColumns;
  }
  HELO_FAST_HD int row(int s) const { return row_ + Grid::kRows * s; }
  HELO_FAST_HD int column(int t) const { return column_ + Grid::kColumns * t; }
  HELO_FAST_HD int piece(int u) const { return (column_ + Grid::kColumns * u) * kPiece; }  // its first column
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

  // tile_ic = sum_k left_ik right_kc over kWidth columns c, k < length, a multiple of kPiece.
  HELO_FAST_HD void multiply(Matrix left, Matrix right, int length, PieceTile& tile) const {
    HELO_FAST_UNROLL
    for (int s = 0; s < Grid::kTileRows; ++s) {
      HELO_FAST_UNROLL
      for (int c = 0; c < kPieces * kPiece; ++c) tile[s][c] = 0;
    }
    HELO_FAST_ROLLED
    for (int k = 0; k < length; k += kPiece) {
      Piece down[Grid::kTileRows];
      HELO_FAST_UNROLL
      for (int s = 0; s < Grid::kTileRows; ++s) down[s] = *reinterpret_cast<const Piece*>(&left(row(s), k));
      HELO_FAST_UNROLL
      for (int p = 0; p < kPiece; ++p) {
        HELO_FAST_UNROLL
        for (int u = 0; u < kPieces; ++u) {
          const Piece across = *reinterpret_cast<const Piece*>(&right(k + p, piece(u)));
          HELO_FAST_UNROLL
          for (int s = 0; s < Grid::kTileRows; ++s) {
            HELO_FAST_UNROLL
            for (int c = 0; c < kPiece; ++c) tile[s][u * kPiece + c] += down[s].at[p] * across.at[c];
          }
        }
      }
    }
  }

 private:
  int row_ = 0, column_ = 0;
};

}  // namespace helo_fast
