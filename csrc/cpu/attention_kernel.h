// Attention with a bias, DropKey and dropout, forward and backward, for one instruction set (see each_set.h).
//
//   s = (q k' + bias) scale, a dropped key's s = min(s, DROPPED);  w = softmax(s);  o = (keep * w) v rescale
//   dv = (keep * w)' do rescale;  ds = w * (keep * (do v') rescale - rowsum(do * o)) scale;  dbias = ds;  dq = ds k;  dk = ds' q
//
// The logits live in tiles of kTile x kTile, the whole problem where it fits one. Forward: for a block of rows, the columns pass by
// with a running maximum and sum. Backward: for a block of columns, the rows pass by; w is recomputed from the row log-sum-exp, masks
// from the seed. Operands are read where they lie when their rows are whole vectors, else from copies padded with 0, and results are
// likewise computed where they lie. Rows of a tile are padded to whole vectors: what stands in the padding is left out of a row's
// maximum and sum, and no product reads it.
#include "simd.h"
// and on it
#include "products.h"
#include "philox.h"
#include "storage.h"
// and on that
#include "look_ahead.h"

namespace {
namespace HELO_FAST_SET {

constexpr double kDropped = -999999995904.0;  // DROPPED of helo_fast/ops/attention/reference.py, whose rules these are

template <typename scalar>
class Attention {
 public:
  using V = Vectors<scalar>;
  using full = typename V::full;
  using word = typename Unsigned<sizeof(scalar)>::type;
  using words = typename Unsigned<sizeof(scalar)>::full;

  Attention(const AttentionArguments& x, unsigned char* scratch) : x_(x), scratch_(scratch), dp_(padded(x.d)) {
    for (scalar** p : {&q_, &k_, &v_, &o_, &do_, &dk_, &dv_}) *p = reserve<scalar>(kTile * dp_);
    for (scalar** p : {&kt_, &vt_}) *p = reserve<scalar>(dp_ * kTile);
    for (scalar** p : {&s_, &ds_, &bias_}) *p = reserve<scalar>(kTile * kTile);
    for (scalar** p : {&top_, &total_}) *p = reserve<scalar>(kTile);
    for (scalar** p : {&lse_, &delta_}) *p = reserve<scalar>(x.n);
    dq_ = reserve<scalar>(x.n * dp_);
    inside_ = reserve<word>(kTile);
    for (uint32_t** p : {&block_, &row_}) *p = reserve<uint32_t>(kTile * kTile / 4 + kPhiloxCalls);
    random_ = reserve<uint32_t>(kTile * kTile + 4 * kPhiloxCalls + kTile);
  }

  static int64_t scratch_bytes(int64_t n, int64_t d) {
    const int64_t dp = padded(d);
    return (9 * kTile * dp + n * dp + 3 * kTile * kTile + 3 * kTile + 2 * n) * int64_t(sizeof(scalar)) +
           (kTile * kTile / 2 + 2 * kPhiloxCalls + kTile * kTile + 4 * kPhiloxCalls + kTile) * 4 + 24 * 64;
  }

  // What of the head to come is to be asked for between the rows of this one.
  void look_ahead(int64_t head, bool backward) {
    ahead_.clear();
    if (head >= x_.B * x_.H || x_.n > kTile || x_.m > 2 * kTile) return;
    const auto rows = [&](const View& x, int64_t count, bool always) {
      if (always || x.row != x_.d) ahead_.add(x, head / x_.H, head % x_.H, count, x_.d);
    };
    // Rows without gaps the processor foresees where they are all that is read, but not among the backward's eight operands.
    for (const View* x : {&x_.k, &x_.v}) rows(*x, x_.m, backward);
    rows(x_.q, x_.n, backward);
    rows(x_.out, x_.n, true);
    if (!backward) return;
    rows(x_.grad_out, x_.n, true);
    if (!x_.add_dq) rows(x_.dq, x_.n, true);
    for (const View* x : {&x_.dk, &x_.dv}) rows(*x, x_.m, true);
  }

  // Rows [i0, i0 + kTile) of head (b, h).
  void forward(int64_t b, int64_t h, int64_t i0) {
    const int64_t rows = least(kTile, x_.n - i0);
    const Matrix<scalar> q = take(x_.q, b, h, i0, rows, x_.d, dp_, q_);
    const Place<scalar> o = place(x_.out, b, h, i0, o_);
    for (int64_t i = 0; i < rows; ++i) top_[i] = scalar(kDropped), total_[i] = 0;
    for (int64_t j0 = 0; j0 < x_.m; j0 += kTile) {
      const int64_t columns = least(kTile, x_.m - j0);
      const Matrix<scalar> k = take(x_.k, b, h, j0, columns, x_.d, dp_, k_), v = take(x_.v, b, h, j0, columns, x_.d, dp_, v_);
      shape(rows, columns);
      transpose(k.data, k.stride, columns, dp_, kt_, width_);
      product<false>(q.data, q.stride, kt_, width_, rows, x_.d, columns, s_, width_);
      const Matrix<scalar> bias = prepare_logits(b, h, i0, j0);
      for (int64_t i = 0; i < rows; ++i) {
        ahead_.fetch(i, rows);
        const scalar* added = bias.data == nullptr ? nullptr : bias.data + i * bias.stride;
        const scalar top = x_.masked ? finish_logits<true>(i, added) : finish_logits<false>(i, added);
        if (j0 > 0 && top > top_[i]) rescale(i, exp_vectorised(top_[i] - top), o);
        top_[i] = top;
      }
      for (int64_t i = 0; i < rows; ++i) total_[i] += x_.masked ? weigh<true>(i) : weigh<false>(i);
      const bool last = j0 + columns == x_.m;
      if (last) finish_rows(b, h, i0);
      product<false>(s_, width_, v.data, v.stride, rows, columns, x_.d, o.data, o.stride, j0 > 0, last ? total_ : nullptr);
    }
    if (o.data == o_) put(o_, dp_, x_.out, b, h, i0, rows, x_.d, false);
  }

  // One head; gradients that are shared go to those of this part of the batch and (sum_h) of the heads.
  void backward(int64_t b, int64_t h, int64_t part, int64_t sum_h) {
    const Place<scalar> dq = place(x_.dq, x_.add_dq ? part : b, h, 0, dq_);
    const bool dq_adds = x_.add_dq && dq.data != dq_;
    for (int64_t j0 = 0; j0 < x_.m; j0 += kTile) {
      const int64_t columns = least(kTile, x_.m - j0);
      const Matrix<scalar> k = take(x_.k, b, h, j0, columns, x_.d, dp_, k_), v = take(x_.v, b, h, j0, columns, x_.d, dp_, v_);
      const Place<scalar> dk = place(x_.dk, b, h, j0, dk_), dv = place(x_.dv, b, h, j0, dv_);
      for (int64_t i0 = 0; i0 < x_.n; i0 += kTile) {
        const int64_t rows = least(kTile, x_.n - i0);
        const Matrix<scalar> q = take(x_.q, b, h, i0, rows, x_.d, dp_, q_), go = take(x_.grad_out, b, h, i0, rows, x_.d, dp_, do_);
        shape(rows, columns);
        if (i0 == 0) {
          transpose(k.data, k.stride, columns, dp_, kt_, width_);
          transpose(v.data, v.stride, columns, dp_, vt_, width_);
        }
        if (j0 == 0) prepare_rows(b, h, i0, go);
        product<false>(q.data, q.stride, kt_, width_, rows, x_.d, columns, s_, width_);
        product<false>(go.data, go.stride, vt_, width_, rows, x_.d, columns, ds_, width_);
        const Matrix<scalar> bias = prepare_logits(b, h, i0, j0);
        for (int64_t i = 0; i < rows; ++i) {
          ahead_.fetch(i, rows);
          const scalar* added = bias.data == nullptr ? nullptr : bias.data + i * bias.stride;
          x_.masked ? slope<true>(i, i0 + i, added) : slope<false>(i, i0 + i, added);
        }
        product<true>(s_, width_, go.data, go.stride, columns, rows, x_.d, dv.data, dv.stride, i0 > 0);
        product<true>(ds_, width_, q.data, q.stride, columns, rows, x_.d, dk.data, dk.stride, i0 > 0);
        product<false>(ds_, width_, k.data, k.stride, rows, columns, x_.d, dq.data + i0 * dq.stride, dq.stride, j0 > 0 || dq_adds);
        if (x_.dbias.data != nullptr) {
          View to = x_.dbias;
          to.data += j0 * stored_bytes(to.storage);
          put(ds_, width_, to, x_.dbias_over_batch ? part : b, x_.add_dbias ? sum_h : h, i0, rows, columns, x_.add_dbias);
        }
      }
      if (dk.data == dk_) put(dk_, dp_, x_.dk, b, h, j0, columns, x_.d, false);
      if (dv.data == dv_) put(dv_, dp_, x_.dv, b, h, j0, columns, x_.d, false);
    }
    if (dq.data == dq_) put(dq_, dp_, x_.dq, x_.add_dq ? part : b, h, int64_t(0), x_.n, x_.d, x_.add_dq);
  }

 private:
  template <typename T>
  T* reserve(int64_t count) {
    T* p = reinterpret_cast<T*>(scratch_);
    scratch_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }

  static int64_t padded(int64_t count) { return (count + V::lanes - 1) / V::lanes * V::lanes; }
  static int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

  // The random words of the columns that a vector of logits from s covers.
  words random(int64_t i, int64_t j) const {
    return __builtin_convertvector(load<typename Unsigned<sizeof(scalar)>::narrow>(random_ + 4 * i * blocks_ + j), words);
  }

  static full splat(double value) { return full{} + scalar(value); }

  // The tile's size from here on: which lanes are columns, and which calls of Philox make its words.
  void shape(int64_t rows, int64_t columns) {
    if (rows == rows_ && columns == columns_) return;
    rows_ = rows;
    columns_ = columns;
    width_ = padded(columns);
    blocks_ = (columns + 3) / 4;
    for (int64_t j = 0; j < width_; ++j) inside_[j] = j < columns ? ~word(0) : 0;
    int64_t call = 0;
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < blocks_; ++c, ++call) block_[call] = uint32_t(c), row_[call] = uint32_t(i);
    for (int64_t more = 0; more < kPhiloxCalls; ++more) block_[call + more] = row_[call + more] = 0;
  }

  // Where rows of a result are computed: where they will lie, if whole vectors can be written there, else in buffer.
  Place<scalar> place(const View& x, int64_t b, int64_t h, int64_t row, scalar* buffer) const {
    const bool stored = x.storage == (sizeof(scalar) == 8 ? Storage::float64 : Storage::float32);
    if (!stored || Tail<scalar>::padded(x_.d) != x_.d) return {buffer, dp_};
    return {reinterpret_cast<scalar*>(x.data) + offset(x, b, h, row), x.row};
  }

  // The random words of the tile, and the bias.
  Matrix<scalar> prepare_logits(int64_t b, int64_t h, int64_t i0, int64_t j0) {
    if (x_.masked) philox(x_.seed, uint64_t(x_.first_problem + b * x_.H + h), block_, j0 / 4, row_, i0, rows_ * blocks_, random_);
    if (x_.bias.data == nullptr) return {nullptr, 0};
    View from = x_.bias;
    from.data += j0 * from.column * stored_bytes(from.storage);
    return take(from, b, h, i0, rows_, columns_, width_, bias_);
  }

  // Vector j of row i of the logits, from that of q k'.
  template <bool masked>
  HELO_FAST_INLINE full logits(int64_t i, int64_t j, const scalar* added) const {
    full x = load<full>(s_ + i * width_ + j);
    if (added != nullptr) x += load<full>(added + j);
    x *= splat(x_.scale);
    if (masked) x = (random(i, j) & word(0xffff)) < words{} + word(x_.drop_below) ? smaller(splat(kDropped), x) : x;
    return x;
  }

  // What dropout multiplies that vector's weights by.
  HELO_FAST_INLINE full keep(int64_t i, int64_t j, scalar kept) const {
    return random(i, j) < words{} + (word(x_.cut_below) << 16) ? full{} : full{} + kept;
  }

  // The row's logits, and its maximum so far.
  template <bool masked>
  scalar finish_logits(int64_t i, const scalar* added) {
    full most = full{} + top_[i];
    for (int64_t j = 0; j < width_; j += V::lanes) {
      full x = logits<masked>(i, j, added);
      if (j + V::lanes > columns_) x = load<words>(inside_ + j) != word(0) ? x : splat(-HUGE_VAL);
      store(s_ + i * width_ + j, x);
      most = larger(x, most);
    }
    return max_of<scalar>(most);
  }

  // Output and sum so far follow the maximum.
  void rescale(int64_t i, scalar factor, const Place<scalar>& o) {
    total_[i] *= factor;
    for (int64_t j = 0; j < x_.d; ++j) o.data[i * o.stride + j] *= factor;
  }

  // The row's weights; returns their sum before dropout.
  template <bool masked>
  scalar weigh(int64_t i) {
    scalar* s = s_ + i * width_;
    full total = {};
    for (int64_t j = 0; j < width_; j += V::lanes) {
      const full weight = exp_of_nonpositive<scalar>(load<full>(s + j) - top_[i]);
      total += weight;
      store(s + j, masked ? weight * keep(i, j, scalar(1)) : weight);
    }
    return sum_of<scalar>(total);
  }

  // lse goes out; total_ becomes what the output's rows are to be multiplied by.
  void finish_rows(int64_t b, int64_t h, int64_t i0) {
    scalar* lse = reinterpret_cast<scalar*>(x_.lse.data) + offset(x_.lse, b, h, i0);
    for (int64_t i = 0; i < rows_; ++i) {
      const bool flat = !(top_[i] > scalar(kDropped)) && total_[i] != 0;
      lse[i] = flat ? scalar(kDropped) * total_[i] : top_[i] + std::log(total_[i]);
      total_[i] = scalar(x_.rescale) / (total_[i] > 0 ? total_[i] : scalar(1));
    }
  }

  // lse and rowsum(do * o) of a block of rows
  void prepare_rows(int64_t b, int64_t h, int64_t i0, const Matrix<scalar>& go) {
    const Matrix<scalar> out = take(x_.out, b, h, i0, rows_, x_.d, dp_, o_);
    for (int64_t i = 0; i < rows_; ++i) {
      const scalar *left = go.data + i * go.stride, *right = out.data + i * out.stride;
      full sum = {};
      for (int64_t j = 0; j < dp_; j += V::lanes) sum += load<full>(left + j) * load<full>(right + j);
      delta_[i0 + i] = sum_of<scalar>(sum);
      lse_[i0 + i] = *reinterpret_cast<const scalar*>(x_.lse.data + offset(x_.lse, b, h, i0 + i) * int64_t(sizeof(scalar)));
    }
  }

  // From q k' and do v': keep * w * rescale into s_, ds into ds_. A flat row has equal weights (1 so far), and no slope.
  template <bool masked>
  void slope(int64_t i, int64_t row, const scalar* added) {
    const bool flat = lse_[row] <= scalar(kDropped);
    const scalar base = flat ? scalar(kDropped) : lse_[row];
    const scalar each = flat ? scalar(kDropped) / lse_[row] : scalar(1), scale = flat ? scalar(0) : scalar(x_.scale);
    const scalar kept = scalar(x_.rescale), delta = delta_[row];
    for (int64_t j = 0; j < width_; j += V::lanes) {
      const full weight = exp_of_nonpositive<scalar>(logits<masked>(i, j, added) - base);
      const full factor = masked ? keep(i, j, kept) : full{} + kept;
      scalar* ds = ds_ + i * width_ + j;
      store(ds, (load<full>(ds) * factor - delta) * weight * scale);
      store(s_ + i * width_ + j, weight * (factor * each));
    }
  }

  const AttentionArguments& x_;
  unsigned char* scratch_;
  int64_t dp_;                                                   // d padded
  int64_t rows_ = 0, columns_ = 0, width_ = 0, blocks_ = 0;      // of the tile; padded columns; calls of Philox per row
  scalar *q_, *k_, *v_, *o_, *do_, *dk_, *dv_;                   // [kTile, dp]
  scalar *kt_, *vt_;                                             // [dp, width]
  scalar *s_, *ds_, *bias_;                                      // [rows, width]
  scalar *top_, *total_;                                         // [rows]
  scalar *lse_, *delta_, *dq_;                                   // [n], [n], [n, dp]
  word* inside_;                                                 // [width]
  uint32_t *block_, *row_, *random_;                             // [rows, blocks], [rows, blocks], [rows, 4 blocks]
  LookAhead ahead_;
};

template <typename scalar>
void attention_fwd(const AttentionArguments& x, int64_t begin, int64_t end, unsigned char* scratch) {
  Attention<scalar> attention(x, scratch);
  const int64_t row_blocks = (x.n + kTile - 1) / kTile;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t head = block / row_blocks;
    attention.look_ahead(head + 1, false);
    attention.forward(head / x.H, head % x.H, block % row_blocks * kTile);
  }
}

template <typename scalar>
void attention_bwd(const AttentionArguments& x, int64_t begin, int64_t end, unsigned char* scratch) {
  Attention<scalar> attention(x, scratch);
  const int64_t heads = x.H / x.h_parts;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task / x.h_parts, h = task % x.h_parts;
    for (int64_t b = part * x.B / x.b_parts; b < (part + 1) * x.B / x.b_parts; ++b)
      for (int64_t i = 0; i < heads; ++i) {
        attention.look_ahead(b * x.H + h * heads + i + 1, true);
        attention.backward(b, h * heads + i, part, h);
      }
  }
}

template <typename scalar>
void attention_sum(const AttentionSums& x, int64_t begin, int64_t end) {
  constexpr int64_t most = 256;  // entries at a time: their sums stay in the first cache while the parts pass by
  typed(scalar(), x.storage, x.total, [&](auto* total) {
    using stored = decltype(narrow(scalar(), *total));
    for (int64_t first = begin, count; first < end; first += count) {
      const int64_t slot = first / x.size, entry = first % x.size, b = slot / x.heads, h = slot % x.heads;
      count = x.size - entry < end - first ? x.size - entry : end - first;
      count = count < most ? count : most;
      scalar sum[most] = {};
      for (int64_t p = x.batches == 1 ? 0 : b; p < (x.batches == 1 ? x.b_parts : b + 1); ++p)
        for (int64_t r = x.heads == 1 ? 0 : h; r < (x.heads == 1 ? x.h_parts : h + 1); ++r) {
          const scalar* part = reinterpret_cast<const scalar*>(x.parts) + (p * x.h_parts + r) * x.size + entry;
          for (int64_t e = 0; e < count; ++e) sum[e] += part[e];
        }
      for (int64_t e = 0; e < count; ++e) total[first + e] = narrow(sum[e], stored{});
    }
  });
}

template <typename scalar>
constexpr AttentionKernel attention = {attention_fwd<scalar>, attention_bwd<scalar>, attention_sum<scalar>,
                                       Attention<scalar>::scratch_bytes};

}  // namespace HELO_FAST_SET
}  // namespace
