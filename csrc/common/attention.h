// lcd_attention for a team of lanes, forward and backward, a head of one batch item at a time:
//
//   s = (q k' + bias) scale, a dropped key's s = min(s, DROPPED);  w = softmax(s);  o = (keep * w) v rescale
//   dv = (keep * w)' do rescale;  ds = w * (keep * (do v') rescale - delta) scale;  dbias = ds;  dq = ds k;  dk = ds' q
//
// with delta = rowsum(do * o), which is rowsum(keep * w * (do v')) rescale / rowsum(w): the output is not read again. The last is 1,
// but for what the log-sum-exp of huge logits loses.
//
// q, k, v and do stand in shared memory, rows apart by an odd number of 16-byte pieces; logits and slopes stand in registers, a tile a
// lane (row_products.h), and on their way from one product to the next in the place of an operand that has been read: the weights in that
// of q, or transposed in that of v; ds transposed in that of v, and in that of do. Each operand is read once and each result written once.
//
// Matrices have zeros up to whole pieces, in columns and (where a product runs over them) in rows. What a tile has beyond, of rows or
// columns outside, is read from whatever stands there and selected away.
//
// Masks are decided four columns a call of Philox, each by the lane whose turn it is, while the operands are on their way: a byte a call.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/attention_problem.h"
#include "heads.h"
#include "philox.h"
#include "row_products.h"
#include "split.h"

namespace helo_fast {

struct AttentionBatch : AttentionArguments {
  const int64_t* seed_at;  // in the place of seed, where masked
};

template <typename scalar, typename Grid, typename Team>
class Attention {
 public:
  // memory: shared_bytes() of shared memory, aligned to 16 bytes.
  HELO_FAST_HD Attention(const AttentionBatch& x, bool backward, unsigned char* memory, Team& team)
      : x_(x), team_(team), n_(int(x.n)), m_(int(x.m)), d_(int(x.d)), backward_(backward), values_(reinterpret_cast<scalar*>(memory)),
        stride_(stride(x)), lse_(values_ + values(x, backward)),
        decisions_(memory + values(x, backward) * int64_t(sizeof(scalar)) + lse_bytes(x)), seed_(x.masked ? uint64_t(*x.seed_at) : 0) {
    for (int e = team.lane(); e < values(x, backward); e += Team::kLanes) values_[e] = 0;
    for (int e = team.lane(); e < n_ * kDecisionStride; e += Team::kLanes) decisions_[e] = kAllKept;
  }

  HELO_FAST_HD static int64_t shared_bytes(const AttentionArguments& x, bool backward) {
    return values(x, backward) * int64_t(sizeof(scalar)) + lse_bytes(x) + x.n * kDecisionStride;
  }

  // Of `blocks` teams, number `block` takes every blocks-th head, of fewer than 2^31.
  HELO_FAST_HD void forward_share(unsigned block, unsigned blocks) {
    const unsigned H = unsigned(x_.H), heads = unsigned(x_.B) * H;
    for (unsigned head = block; head < heads; head += blocks) forward(int(head / H), int(head % H));
  }

  // Likewise every blocks-th part of them (attention_problem.h), whose heads follow each other.
  HELO_FAST_HD void backward_share(unsigned block, unsigned blocks) {
    const unsigned b_parts = unsigned(x_.b_parts), h_parts = unsigned(x_.h_parts), heads = unsigned(x_.H) / h_parts;
    for (unsigned task = block; task < b_parts * h_parts; task += blocks) {
      const unsigned part = task / h_parts, each = unsigned(x_.B) / b_parts, more = unsigned(x_.B) % b_parts;
      const unsigned first = part * each + (part < more ? part : more), steps = (each + (part < more)) * heads;
      for (unsigned step = 0; step < steps; ++step) {
        const int b = int(first + step / heads), h_part = int(task % h_parts), h = h_part * int(heads) + int(step % heads);
        backward(b, h, int(part), h_part, step >= heads, x_.dbias_over_batch ? step > 0 : step % heads > 0);
      }
    }
  }

 private:
  using RowProducts = helo_fast::RowProducts<scalar, Grid>;
  using Matrix = typename RowProducts::Matrix;
  using Tile = typename RowProducts::Tile;
  using PieceTile = typename RowProducts::PieceTile;
  using Piece = typename RowProducts::Piece;
  static constexpr int kPiece = RowProducts::kPiece;
  static constexpr int kDecisionStride = 16;  // bytes a row: a call of Philox each
  static constexpr scalar kDropped = scalar(-999999995904.0);  // DROPPED of helo_fast/ops/attention/reference.py, whose rules these are
  static_assert(Grid::kMaxColumns <= kDecisionStride * kPhiloxColumns && Grid::kColumns % kPhiloxColumns == 0);
  enum Operand { kQ, kK, kV, kDo, kBias };  // in this order in memory

  HELO_FAST_HD static int most(int x, int y) { return x > y ? x : y; }
  HELO_FAST_HD static int stride(const AttentionArguments& x) { return RowProducts::stride(most(int(x.d), most(int(x.n), int(x.m)))); }
  // Of all matrices; with room behind for what the tiles read beyond them.
  HELO_FAST_HD static int values(const AttentionArguments& x, bool backward) {
    const int rows = (backward ? 2 : 1) * RowProducts::whole_pieces(int(x.n)) + 2 * RowProducts::whole_pieces(int(x.m));
    const int last = RowProducts::whole_pieces(int(backward ? x.n : x.m));
    const int beyond = most(0, most(Grid::kMaxRows, Grid::kMaxColumns) - last);
    const int bias = x.bias.data ? int(x.n) * RowProducts::stride(int(x.m)) : 0;
    return rows * stride(x) + most(bias, beyond * stride(x)) + RowProducts::kWidth;
  }
  HELO_FAST_HD static int lse_bytes(const AttentionArguments& x) {
    return RowProducts::whole_pieces(int(x.n)) * int(sizeof(scalar));
  }
  HELO_FAST_HD Matrix matrix(int which) const {
    const int n = RowProducts::whole_pieces(n_), m = RowProducts::whole_pieces(m_);
    const int row = which == kQ ? 0 : which == kK ? n : which == kV ? n + m : which == kDo || !backward_ ? n + 2 * m : 2 * (n + m);
    return {values_ + row * stride_, which == kBias ? RowProducts::stride(m_) : stride_};
  }
  HELO_FAST_HD void take_place() { products_.take_place(team_.lane()); }

  // The operands of a head; there after await_copies().
  HELO_FAST_HD void fetch(int b, int h) {
    HELO_FAST_ROLLED
    for (int which = kQ; which <= kBias; ++which) {
      const View x = which == kQ ? x_.q : which == kK ? x_.k : which == kV ? x_.v : which == kDo ? x_.grad_out : x_.bias;
      if (!x.data) continue;
      const int rows = which == kK || which == kV ? m_ : n_, columns = which == kBias ? m_ : d_;
      fetch_matrix(team_, x, b, h, rows, columns, matrix(which));
    }
  }

  HELO_FAST_HD void decide(int b, int h) {
    if (!x_.masked) return;
    const PhiloxKeys keys(seed_);
    const uint64_t problem = uint64_t(b) * uint64_t(x_.H) + uint64_t(h);
    HELO_FAST_ROLLED
    for (Walk walk(team_.lane(), Team::kLanes, (m_ + kPhiloxColumns - 1) / kPhiloxColumns); walk.row < n_; walk.advance()) {
      uint32_t words[kPhiloxColumns];
      philox_words(keys, problem, uint32_t(walk.row), uint32_t(walk.column), words);
      decisions_[walk.row * kDecisionStride + walk.column] = philox_decisions(words, x_.drop_below, x_.cut_below);
    }
  }

  // What was decided for this lane's columns of a row.
  class Decided {
   public:
    HELO_FAST_HD Decided(const unsigned char* row, int column) : row_(*reinterpret_cast<const Row*>(row)) {
      HELO_FAST_UNROLL
      for (uint32_t& word : row_.words) word >>= column / kPhiloxColumns * 8 + column % kPhiloxColumns;
    }
    HELO_FAST_HD bool drops(int t) const { return bit(t, 0); }
    HELO_FAST_HD bool keeps(int t) const { return bit(t, kPhiloxColumns); }

   private:
    struct alignas(16) Row {
      uint32_t words[kDecisionStride / 4];
    };
    // Of column `column` + kColumns t, whose byte is that much further.
    HELO_FAST_HD bool bit(int t, int further) const {
      const int byte = Grid::kColumns / kPhiloxColumns * t;
      return row_.words[byte / 4] >> (byte % 4 * 8 + further) & 1;
    }
    Row row_;
  };
  HELO_FAST_HD Decided decided(int i) const { return {decisions_ + (i < n_ ? i : 0) * kDecisionStride, products_.column(0)}; }

  // q k' + bias
  HELO_FAST_HD void find_logits(Tile& S) {
    take_place();
    products_.clear(S);
    products_.add(matrix(kQ), matrix(kK), RowProducts::whole_pieces(d_), S);
    if (x_.bias.data == nullptr) return;
    const Matrix bias = matrix(kBias);
    products_.for_tile([&](auto s, auto t, int i, int j) {
      if (i < n_ && j < m_) S[s][t] += bias(i, j);
    });
  }
  HELO_FAST_HD static scalar logit(scalar sum, scalar scale, bool dropped) {
    const scalar s = sum * scale;
    return dropped && s > kDropped ? kDropped : s;
  }

  // Over the lanes of a row.
  template <typename Operation>
  HELO_FAST_HD scalar over_row(scalar value, Operation operation) {
    HELO_FAST_UNROLL
    for (int mask = 1; mask < Grid::kColumns; mask *= 2) value = operation(value, team_.exchange(value, mask));
    return value;
  }

  // Row s of a tile to rows with adjacent columns, or transposed, up to whole pieces of the other side.
  template <bool transposed, typename Slot>
  HELO_FAST_HD void keep_row(Slot s, const Tile& tile, Matrix to) const {
    const int i = products_.row(s), m = RowProducts::whole_pieces(m_);
    if (i >= RowProducts::whole_pieces(n_)) return;
    unroll<Grid::kTileColumns>([&](auto t) {
      const int j = products_.column(t);
      if (j < m) (transposed ? to(j, i) : to(i, j)) = tile[s][t];
    });
  }
  template <bool transposed>
  HELO_FAST_HD void keep(const Tile& tile, Matrix to) {
    take_place();
    unroll<Grid::kTileRows>([&](auto s) { keep_row<transposed>(s, tile, to); });
  }

  HELO_FAST_HD void forward(int b, int h) {
    team_.sync();  // the head before has been read
    fetch(b, h);
    decide(b, h);
    team_.await_copies();
    Tile S;
    scalar factor[Grid::kTileRows];
    find_logits(S);
    team_.sync();  // q has been read
    weigh(b, h, S, factor);
    team_.sync();
    write_product(matrix(kQ), matrix(kV), m_, n_, x_.out, b, h, false, factor);
  }

  // Logits become weights, not yet divided by their sum, dropped ones 0, in the place of q. factor: what their product with v is to be
  // multiplied by.
  HELO_FAST_HD void weigh(int b, int h, Tile& S, scalar (&factor)[Grid::kTileRows]) {
    const scalar scale = scalar(x_.scale);
    scalar* lse = place<scalar>(x_.lse, b, h);
    take_place();
    unroll<Grid::kTileRows>([&](auto s) {
      const int i = products_.row(s), m = opaque(m_);
      const Decided masks = decided(i);
      scalar top = kDropped, total = 0;
      unroll<Grid::kTileColumns>([&](auto t) {
        S[s][t] = products_.column(t) < m ? logit(S[s][t], scale, masks.drops(t)) : scalar(-HUGE_VAL);
        top = Larger()(S[s][t], top);
      });
      top = over_row(top, Larger());
      unroll<Grid::kTileColumns>([&](auto t) {
        const scalar weight = std::exp(S[s][t] - top);
        total += weight;
        S[s][t] = masks.keeps(t) ? weight : scalar(0);  // a row with NaN has a NaN for a factor
      });
      total = over_row(total, Plus());
      factor[s] = scalar(x_.rescale) / (total == 0 ? scalar(1) : total);
      if (products_.is_first_column() && i < n_) {
        const bool flat = !(top > kDropped) && total != 0;
        lse[i * x_.lse.row] = flat ? kDropped * total : top + std::log(total);
      }
      keep_row<false>(s, S, matrix(kQ));
    });
  }

  // part, h_part: of the batch and of the heads, whose gradients of a shared query and bias are summed.
  HELO_FAST_HD void backward(int b, int h, int part, int h_part, bool add_dq, bool add_dbias) {
    team_.sync();  // the head before has been read
    fetch(b, h);
    decide(b, h);
    const scalar* lse = place<scalar>(x_.lse, b, h);
    for (int i = team_.lane(); i < n_; i += Team::kLanes) team_.template copy_in<int(sizeof(scalar))>(lse_ + i, lse + i * x_.lse.row);
    team_.await_copies();
    Tile W, dS;
    find_logits(W);
    products_.clear(dS);
    products_.add(matrix(kDo), matrix(kV), RowProducts::whole_pieces(d_), dS);
    team_.sync();  // v has been read
    find_slopes(W, dS);
    team_.sync();
    write_product(matrix(kV), matrix(kDo), n_, m_, x_.dv, b, h, false, nullptr);
    team_.sync();  // so have the weights and do
    keep<true>(dS, matrix(kV));
    keep<false>(dS, matrix(kDo));
    team_.sync();
    HELO_FAST_ROLLED
    for (int which = kQ; which <= kK; ++which) {
      const bool of_rows = which == kQ, add = x_.add_dq && of_rows;
      const View to = of_rows ? x_.dq : x_.dk;
      write_product(matrix(of_rows ? kDo : kV), matrix(of_rows ? kK : kQ), of_rows ? m_ : n_, of_rows ? n_ : m_, to, add ? part : b, h,
                    add && add_dq, nullptr);
    }
    if (x_.dbias.data) write_dbias(x_.dbias_over_batch ? part : b, x_.add_dbias ? h_part : h, x_.add_dbias && add_dbias);
  }

  // From q k' + bias and do v': keep * w * rescale, transposed in the place of v, and ds; 0 outside. A row without a kept key has equal
  // weights, and no slope.
  HELO_FAST_HD void find_slopes(Tile& W, Tile& dS) {
    take_place();
    unroll<Grid::kTileRows>([&](auto s) {
      const int i = products_.row(s), columns = opaque(i < n_ ? m_ : 0);  // inside
      const Decided masks = decided(i);
      const scalar lse = lse_[i < n_ ? i : 0];
      const bool flat = lse <= kDropped;
      const scalar base = flat ? kDropped : lse, each = flat ? kDropped / lse : scalar(1), rescale = scalar(x_.rescale);
      scalar delta = 0, total = 0;
      unroll<Grid::kTileColumns>([&](auto t) {
        const bool inside = products_.column(t) < columns;
        const scalar weight = std::exp(logit(W[s][t], scalar(x_.scale), masks.drops(t)) - base);
        W[s][t] = inside ? weight : scalar(0);
        dS[s][t] = inside ? dS[s][t] * (masks.keeps(t) ? rescale : scalar(0)) : scalar(0);
        delta += W[s][t] * dS[s][t];
        total += W[s][t];
      });
      total = over_row(total, Plus());
      delta = over_row(delta, Plus()) / (total == 0 ? scalar(1) : total);
      const scalar scale = flat ? scalar(0) : scalar(x_.scale);
      unroll<Grid::kTileColumns>([&](auto t) {
        const scalar slope = (dS[s][t] - delta) * W[s][t] * scale;
        dS[s][t] = products_.column(t) < columns ? slope : scalar(0);
        W[s][t] *= masks.keeps(t) ? rescale * each : scalar(0);
      });
      keep_row<true>(s, W, matrix(kV));
    });
  }

  // left right, of `length` products, to rows of a head, or onto what is there; times each row's factor, where there are any.
  HELO_FAST_HD void write_product(Matrix left, Matrix right, int length, int rows, const View& to, int b, int h, bool add,
                                  const scalar* factors) {
    HELO_FAST_ROLLED
    for (int first = 0; first < d_; first += RowProducts::kWidth) {
      PieceTile tile;
      take_place();
      products_.multiply(left, {right.data + first, stride_}, RowProducts::whole_pieces(length), tile);
      take_place();
      if (factors) {
        for_pieces([&](auto s, auto p, int, int) { tile[s][p] *= factors[s]; });
      }
      if (add) {
        const scalar* from = place<scalar>(to, b, h);
        for_pieces([&](auto s, auto p, int i, int c) {
          if (i < rows && first + c < d_) tile[s][p] += from[i * to.row + first + c];
        });
      }
      with_stored<scalar>(to.storage, [&](auto zero) { put(tile, place<decltype(zero)>(to, b, h), to.row, rows, first); });
    }
  }
  // body(s, p, row, column) for the entries of a lane's pieces.
  template <typename Body>
  HELO_FAST_HD void for_pieces(const Body& body) const {
    unroll<Grid::kTileRows>([&](auto s) {
      unroll<RowProducts::kPieces * kPiece>([&](auto p) { body(s, p, products_.row(s), products_.piece(p / kPiece) + p % kPiece); });
    });
  }

  // Columns are adjacent, as in all results.
  template <typename stored>
  HELO_FAST_HD void put(const PieceTile& tile, stored* to, int64_t row_stride, int rows, int first) {
    struct alignas(kPiece * sizeof(stored)) Stored {
      stored at[kPiece];
    };
    const bool aligned = d_ % kPiece == 0;  // and with it the rows of a result
    unroll<Grid::kTileRows>([&](auto s) {
      unroll<RowProducts::kPieces>([&](auto u) {
        const int i = products_.row(s), c = first + products_.piece(u);
        if (i >= rows || c >= d_) return;
        stored* there = to + i * row_stride + c;
        Stored values;
        HELO_FAST_UNROLL
        for (int p = 0; p < kPiece; ++p) values.at[p] = narrow(tile[s][u * kPiece + p], stored{});
        if (aligned) {
          team_.template copy_out<int(sizeof(Stored))>(there, &values);
        } else {
          HELO_FAST_UNROLL
          for (int p = 0; p < kPiece; ++p)
            if (c + p < d_) there[p] = values.at[p];
        }
      });
    });
  }

  // ds, which stands in the place of do, to the gradient of the bias, or onto what is there.
  HELO_FAST_HD void write_dbias(int b, int h, bool add) {
    const Matrix dS = matrix(kDo);
    with_stored<scalar>(x_.dbias.storage, [&](auto zero) {
      using stored = decltype(zero);
      stored* to = place<stored>(x_.dbias, b, h);
      Walk walk(team_.lane(), Team::kLanes, m_);
      HELO_FAST_ROLLED
      while (walk.row < n_) {
        stored* there[kLoadsAtOnce];
        scalar values[kLoadsAtOnce];
        HELO_FAST_UNROLL
        for (int a = 0; a < kLoadsAtOnce; ++a, walk.advance()) {
          there[a] = walk.row < n_ ? to + walk.row * x_.dbias.row + walk.column : nullptr;
          if (!there[a]) continue;
          values[a] = dS(walk.row, walk.column);
          if (add) values[a] += widen(*there[a]);
        }
        HELO_FAST_UNROLL
        for (int a = 0; a < kLoadsAtOnce; ++a)
          if (there[a]) *there[a] = narrow(values[a], stored{});
      }
    });
  }

  const AttentionBatch& x_;
  Team& team_;
  const int n_, m_, d_;
  const bool backward_;
  scalar* const values_;
  const int stride_;
  scalar* const lse_;               // [n]
  unsigned char* const decisions_;  // [n, kDecisionStride]
  const uint64_t seed_;
  RowProducts products_;
};

}  // namespace helo_fast
