// Attention with a bias, DropKey and dropout, forward and backward, for one instruction set (see each_set.h).
//
//   s = (q k' + bias) scale, a dropped key's s = min(s, DROPPED);  w = softmax(s);  o = (keep * w) v rescale
//   dv = (keep * w)' do rescale;  ds = w * (keep * (do v') rescale - rowsum(do * o)) scale;  dbias = ds;  dq = ds k;  dk = ds' q
//
// The logits live in tiles of kTile x kTile, the whole problem where it fits one. Forward: for a block of rows, the columns pass by
// with a running maximum and sum. Backward: for a block of columns, the rows pass by; w is recomputed from the row log-sum-exp, masks
// from the seed. q, k, v and do are read where they lie when their rows are whole vectors, else from padded copies.
//
// Rows of a tile are padded to whole vectors. A padded logit is -inf, so that its weight is 0; padded columns of v and k are 0.
#include "simd.h"
// and on it
#include "philox.h"
#include "products.h"
#include "storage.h"

namespace {
namespace HELO_FAST_SET {

constexpr double kDropped = -999999995904.0;  // DROPPED of helo_fast/ops/attention/reference.py, whose rules these are

// A vector's lanes as unsigned integers: of their own width, and as many of 32 bits.
template <int bytes>
struct Unsigned;
template <>
struct Unsigned<4> {
  using type = uint32_t;
  typedef uint32_t full __attribute__((vector_size(HELO_FAST_VECTOR_BYTES)));
  using narrow = full;
};
template <>
struct Unsigned<8> {
  using type = uint64_t;
  typedef uint64_t full __attribute__((vector_size(HELO_FAST_VECTOR_BYTES)));
  typedef uint32_t narrow __attribute__((vector_size(HELO_FAST_VECTOR_BYTES / 2)));
};

template <typename scalar>
class Attention {
 public:
  using V = Vectors<scalar>;
  using full = typename V::full;
  using word = typename Unsigned<sizeof(scalar)>::type;
  using words = typename Unsigned<sizeof(scalar)>::full;
  static constexpr int64_t unit = V::lanes > 4 ? V::lanes : 4;  // transpose() works on fours

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

  // Rows [i0, i0 + kTile) of head (b, h).
  void forward(int64_t b, int64_t h, int64_t i0) {
    const int64_t rows = smaller(kTile, x_.n - i0);
    const Matrix<scalar> q = take(x_.q, b, h, i0, rows, x_.d, dp_, q_);
    for (int64_t i = 0; i < rows; ++i) top_[i] = scalar(kDropped), total_[i] = 0;
    for (int64_t j0 = 0; j0 < x_.m; j0 += kTile) {
      const int64_t columns = smaller(kTile, x_.m - j0);
      const Matrix<scalar> k = take(x_.k, b, h, j0, columns, x_.d, dp_, k_), v = take(x_.v, b, h, j0, columns, x_.d, dp_, v_);
      shape(rows, columns);
      transpose(k.data, k.stride, columns, dp_, kt_, width_);
      logits(b, h, i0, j0, q);
      if (j0 == 0)
        for (int64_t i = 0; i < rows; ++i) subtract_top(i, nullptr);
      else
        for (int64_t i = 0; i < rows; ++i) subtract_top(i, o_ + i * dp_);
      exponentiate();
      for (int64_t i = 0; i < rows; ++i) x_.masked ? sum_weights<true>(i) : sum_weights<false>(i);
      product<false>(s_, width_, v.data, v.stride, rows, columns, dp_, o_, dp_, j0 > 0);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const bool flat = !(top_[i] > scalar(kDropped)) && total_[i] != 0;
      bias_[i] = flat ? scalar(kDropped) * total_[i] : top_[i] + std::log(total_[i]);
      total_[i] = scalar(x_.rescale) / (total_[i] > 0 ? total_[i] : scalar(1));
    }
    put(o_, dp_, x_.out, b, h, i0, rows, x_.d, total_, false);
    put(bias_, 1, x_.lse, b, h, i0, rows, int64_t(1), static_cast<const scalar*>(nullptr), false);
  }

  // One head; gradients that are shared go to those of this part of the batch and (sum_h) of the heads.
  void backward(int64_t b, int64_t h, int64_t part, int64_t sum_h) {
    for (int64_t j0 = 0; j0 < x_.m; j0 += kTile) {
      const int64_t columns = smaller(kTile, x_.m - j0);
      const Matrix<scalar> k = take(x_.k, b, h, j0, columns, x_.d, dp_, k_), v = take(x_.v, b, h, j0, columns, x_.d, dp_, v_);
      for (int64_t i0 = 0; i0 < x_.n; i0 += kTile) {
        const int64_t rows = smaller(kTile, x_.n - i0);
        const Matrix<scalar> q = take(x_.q, b, h, i0, rows, x_.d, dp_, q_), go = take(x_.grad_out, b, h, i0, rows, x_.d, dp_, do_);
        shape(rows, columns);
        if (i0 == 0) {
          transpose(k.data, k.stride, columns, dp_, kt_, width_);
          transpose(v.data, v.stride, columns, dp_, vt_, width_);
        }
        if (j0 == 0) prepare_rows(b, h, i0, go);
        logits(b, h, i0, j0, q);
        for (int64_t i = 0; i < rows; ++i) {
          const scalar lse = lse_[i0 + i];
          subtract(i, lse <= scalar(kDropped) ? scalar(kDropped) : lse);
        }
        exponentiate();
        product<false>(go.data, go.stride, vt_, width_, rows, dp_, width_, ds_, width_, false);
        for (int64_t i = 0; i < rows; ++i) x_.masked ? slope<true>(i, i0 + i) : slope<false>(i, i0 + i);
        product<true>(s_, width_, go.data, go.stride, columns, rows, dp_, dv_, dp_, i0 > 0);
        product<true>(ds_, width_, q.data, q.stride, columns, rows, dp_, dk_, dp_, i0 > 0);
        product<false>(ds_, width_, k.data, k.stride, rows, columns, dp_, dq_ + i0 * dp_, dp_, j0 > 0);
        if (x_.dbias.data != nullptr) {
          View to = x_.dbias;
          to.data += j0 * (to.storage == Storage::float64 ? 8 : to.storage == Storage::float32 ? 4 : 2);
          put(ds_, width_, to, x_.dbias_over_batch ? part : b, x_.add_dbias ? sum_h : h, i0, rows, columns, none(), x_.add_dbias);
        }
      }
      put(dk_, dp_, x_.dk, b, h, j0, columns, x_.d, none(), false);
      put(dv_, dp_, x_.dv, b, h, j0, columns, x_.d, none(), false);
    }
    put(dq_, dp_, x_.dq, x_.add_dq ? part : b, h, int64_t(0), x_.n, x_.d, none(), x_.add_dq);
  }

 private:
  template <typename T>
  T* reserve(int64_t count) {
    T* p = reinterpret_cast<T*>(scratch_);
    scratch_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }

  static int64_t padded(int64_t count) { return (count + unit - 1) / unit * unit; }
  static int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
  static const scalar* none() { return nullptr; }

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

  void logits(int64_t b, int64_t h, int64_t i0, int64_t j0, const Matrix<scalar>& q) {
    product<false>(q.data, q.stride, kt_, width_, rows_, dp_, width_, s_, width_, false);
    if (x_.masked) philox(x_.seed, uint64_t(b * x_.H + h), block_, j0 / 4, row_, i0, rows_ * blocks_, random_);
    Matrix<scalar> bias{nullptr, 0};
    if (x_.bias.data != nullptr) {
      View from = x_.bias;
      from.data += j0 * from.column * (from.storage == Storage::float64 ? 8 : from.storage == Storage::float32 ? 4 : 2);
      bias = take(from, b, h, i0, rows_, columns_, width_, bias_);
    }
    for (int64_t i = 0; i < rows_; ++i) {
      const scalar* added = bias.data == nullptr ? nullptr : bias.data + i * bias.stride;
      x_.masked ? finish_logits<true>(i, added) : finish_logits<false>(i, added);
    }
  }

  template <bool masked>
  void finish_logits(int64_t i, const scalar* added) {
    scalar* s = s_ + i * width_;
    const full dropped = splat(kDropped), scale = splat(x_.scale), outside = splat(-HUGE_VAL);
    const words below = words{} + word(x_.drop_below);
    for (int64_t j = 0; j < width_; j += V::lanes) {
      full x = load<full>(s + j);
      if (added != nullptr) x += load<full>(added + j);
      x *= scale;
      if (masked) x = (((random(i, j) & word(0xffff)) < below) & (x > dropped)) ? dropped : x;
      store(s + j, (load<words>(inside_ + j) != word(0)) ? x : outside);
    }
  }

  template <typename Fold>
  static scalar fold(full x, const Fold& fold) {
    scalar lane[V::lanes];
    store(lane, x);
    for (int64_t step = V::lanes / 2; step > 0; step /= 2)
      for (int64_t l = 0; l < step; ++l) lane[l] = fold(lane[l], lane[l + step]);
    return lane[0];
  }

  void subtract(int64_t i, scalar base) {
    scalar* s = s_ + i * width_;
    for (int64_t j = 0; j < width_; j += V::lanes) store(s + j, load<full>(s + j) - base);
  }

  // Logits less the row's maximum so far; output and sum so far (where there are any) follow it.
  void subtract_top(int64_t i, scalar* output) {
    const scalar* s = s_ + i * width_;
    full most = full{} + top_[i];
    for (int64_t j = 0; j < width_; j += V::lanes) {
      const full x = load<full>(s + j);
      most = x > most ? x : most;
    }
    const scalar top = fold(most, [](scalar x, scalar y) { return x > y ? x : y; });
    subtract(i, top);
    if (output != nullptr && top > top_[i]) {
      const scalar factor = exp_vectorised(top_[i] - top);
      total_[i] *= factor;
      for (int64_t j = 0; j < dp_; j += V::lanes) store(output + j, load<full>(output + j) * factor);
    }
    top_[i] = top;
  }

  void exponentiate() {
    for (int64_t e = 0; e < rows_ * width_; ++e) s_[e] = exp_vectorised(s_[e]);
  }

  template <bool masked>
  void sum_weights(int64_t i) {
    scalar* s = s_ + i * width_;
    const words below = words{} + word(x_.cut_below);
    full total = {};
    for (int64_t j = 0; j < width_; j += V::lanes) {
      const full weight = load<full>(s + j);
      total += weight;
      if (masked) store(s + j, weight * (((random(i, j) >> 16) < below) ? full{} : splat(1)));
    }
    total_[i] += fold(total, [](scalar x, scalar y) { return x + y; });
  }

  // lse and rowsum(do * o) of a block of rows
  void prepare_rows(int64_t b, int64_t h, int64_t i0, const Matrix<scalar>& go) {
    const Matrix<scalar> out = take(x_.out, b, h, i0, rows_, x_.d, dp_, o_);
    for (int64_t i = 0; i < rows_; ++i) {
      const scalar *left = go.data + i * go.stride, *right = out.data + i * out.stride;
      full sum = {};
      for (int64_t j = 0; j < dp_; j += V::lanes) sum += load<full>(left + j) * load<full>(right + j);
      delta_[i0 + i] = fold(sum, [](scalar x, scalar y) { return x + y; });
      lse_[i0 + i] = *reinterpret_cast<const scalar*>(x_.lse.data + offset(x_.lse, b, h, i0 + i) * int64_t(sizeof(scalar)));
    }
  }

  // From weights and do v': keep * w * rescale into s_, ds into ds_. A flat row has equal weights (1 so far), and no slope.
  template <bool masked>
  void slope(int64_t i, int64_t row) {
    scalar *s = s_ + i * width_, *ds = ds_ + i * width_;
    const bool flat = lse_[row] <= scalar(kDropped);
    const scalar each = flat ? scalar(kDropped) / lse_[row] : scalar(1), scale = flat ? scalar(0) : scalar(x_.scale);
    const full delta = full{} + delta_[row], rescale = splat(x_.rescale);
    const words below = words{} + word(x_.cut_below);
    for (int64_t j = 0; j < width_; j += V::lanes) {
      const full weight = load<full>(s + j);
      const full keep = masked ? (((random(i, j) >> 16) < below) ? full{} : rescale) : rescale;
      store(s + j, weight * (keep * each));
      store(ds + j, (load<full>(ds + j) * keep - delta) * weight * scale);
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
};

template <typename scalar>
void attention_fwd(const AttentionArguments& x, int64_t begin, int64_t end, unsigned char* scratch) {
  Attention<scalar> attention(x, scratch);
  const int64_t row_blocks = (x.n + kTile - 1) / kTile;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t head = block / row_blocks;
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
      for (int64_t i = 0; i < heads; ++i) attention.backward(b, h * heads + i, part, h);
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
