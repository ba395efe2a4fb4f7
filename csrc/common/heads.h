// Heads of [B, H, rows, columns] tensors of any strides and floating dtype, and the way from there to shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/view.h"
#include "half.h"
#include "row_products.h"

namespace helo_fast {

constexpr int kLoadsAtOnce = 4;  // on their way to a lane's registers

// Entries of a matrix in turn, row by row: a lane's.
struct Walk {
  HELO_FAST_HD Walk(int first, int step, int columns)
      : columns(columns), step_row(step / columns), step_column(step % columns), row(first / columns), column(first % columns) {}
  // Whether it goes on in a row further than step_row.
  HELO_FAST_HD bool advance() {
    row += step_row, column += step_column;
    const bool wraps = column >= columns;
    if (wraps) column -= columns, ++row;
    return wraps;
  }
  int columns, step_row, step_column, row, column;
};

// use(a value of the stored type), of a storage that is computed in scalar.
template <typename scalar, typename Use>
HELO_FAST_HD void with_stored(Storage storage, const Use& use) {
  if constexpr (sizeof(scalar) == 8) {
    use(double());
  } else {
    if (storage == Storage::float32)
      use(float());
    else if (storage == Storage::bfloat16)
      use(Bfloat());
    else
      use(Half());
  }
}

// Of a head.
template <typename stored>
HELO_FAST_HD stored* place(const View& x, int b, int h) {
  return reinterpret_cast<stored*>(x.data) + (b * x.batch + h * x.head);
}

// Where rows are whole pieces, aligned. Addresses go on by steps: a piece costs little more than its copy.
template <typename Team, typename stored, typename scalar>
HELO_FAST_HD void fetch_pieces(Team& team, const stored* from, int64_t row, int rows, int columns, SharedMatrix<scalar> to) {
  constexpr int kPiece = 16 / int(sizeof(scalar));
  struct alignas(16) Piece {
    scalar at[kPiece];
  };
  struct alignas(kPiece * sizeof(stored)) Stored {
    stored at[kPiece];
  };
  Walk walk(team.lane(), Team::kLanes, columns / kPiece);
  const stored* here = from + walk.row * row + walk.column * kPiece;
  scalar* there = &to(walk.row, walk.column * kPiece);
  const int64_t step = walk.step_row * row + walk.step_column * kPiece, wrap = step + row - columns;
  const int step_there = walk.step_row * to.stride + walk.step_column * kPiece, wrap_there = step_there + to.stride - columns;
  const auto advance = [&] {
    const bool wraps = walk.advance();
    here += wraps ? wrap : step;
    there += wraps ? wrap_there : step_there;
  };
  HELO_FAST_ROLLED
  while (walk.row < rows) {
    if constexpr (std::is_same_v<stored, scalar>) {
      team.template copy_in<16>(there, here);
      advance();
    } else {
      Stored loaded[kLoadsAtOnce];
      scalar* places[kLoadsAtOnce];
      HELO_FAST_UNROLL
      for (int a = 0; a < kLoadsAtOnce; ++a, advance()) {
        places[a] = walk.row < rows ? there : nullptr;
        if (places[a]) loaded[a] = *reinterpret_cast<const Stored*>(here);
      }
      HELO_FAST_UNROLL
      for (int a = 0; a < kLoadsAtOnce; ++a) {
        if (!places[a]) break;
        Piece piece;
        HELO_FAST_UNROLL
        for (int p = 0; p < kPiece; ++p) piece.at[p] = widen(loaded[a].at[p]);
        *reinterpret_cast<Piece*>(places[a]) = piece;
      }
    }
  }
}

template <typename Team, typename stored, typename scalar>
HELO_FAST_HD void fetch_entries(Team& team, const stored* from, const View& x, int rows, int columns, SharedMatrix<scalar> to) {
  constexpr int kPiece = 16 / int(sizeof(scalar));
  HELO_FAST_ROLLED
  for (Walk walk(team.lane(), Team::kLanes, (columns + kPiece - 1) / kPiece * kPiece); walk.row < rows; walk.advance()) {
    const stored* here = from + (walk.row * x.row + walk.column * x.column);
    scalar* there = &to(walk.row, walk.column);
    if (walk.column >= columns)
      *there = 0;
    else if constexpr (std::is_same_v<stored, scalar>)
      team.template copy_in<int(sizeof(scalar))>(there, here);
    else
      *there = widen(*here);
  }
}

// Rows of a head to shared memory, with zeros up to whole pieces; there after await_copies().
template <typename Team, typename scalar>
HELO_FAST_HD void fetch_matrix(Team& team, const View& x, int b, int h, int rows, int columns, SharedMatrix<scalar> to) {
  constexpr int kPiece = 16 / int(sizeof(scalar));
  with_stored<scalar>(x.storage, [&](auto zero) {
    using stored = decltype(zero);
    const stored* from = place<stored>(x, b, h);
    const bool whole = x.column == 1 && columns % kPiece == 0 && x.row % kPiece == 0;
    if (whole && reinterpret_cast<uintptr_t>(from) % (kPiece * sizeof(stored)) == 0)
      fetch_pieces(team, from, x.row, rows, columns, to);
    else
      fetch_entries(team, from, x, rows, columns, to);
  });
}

}  // namespace helo_fast
