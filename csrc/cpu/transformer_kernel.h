// A transformer layer in float32, forward and backward, for one instruction set (see each_set.h); on transformer_problem.h.
//
//   q, k, v = x Wq', x Wk', x Wv';  h = norm(x + attention(q, k, v));  out = norm(h + dropout(gelu(h W1' + b1) W2' + b2))
//
// A chunk of samples goes through the whole layer before the next one begins: what a step makes for the next is still in the
// second-level cache. The backward adds up the gradients of what all samples share by task, a range of chunks.
#include "simd.h"
// and on it
#include "products.h"

namespace {
namespace HELO_FAST_SET {

using Floats = Vectors<float>::full;

// exp(-u^2 / 2) and the normal distribution's Phi(u), by erfc(t) = exp(-t^2) s P(s) with t = |u| / sqrt(2), s = 1 / (1 + 0.3 t), where P is
// the polynomial of degree 8 of least largest relative error on t < 14: 4e-8, less than float32's rounding. No difference cancels.
struct Normal {
  Floats bell, below;
  HELO_FAST_INLINE explicit Normal(Floats u) {
    constexpr float terms[] = {-0.1266165943f, 0.4718262911f,  -0.4846918741f, 0.5170488394f, -0.07404909845f,
                               0.2063851275f,  0.1504688756f, 0.1704237182f,  0.1692047533f};
    const Floats s = 1.0f / (1.0f + 0.3f * 0.70710678f * (u < 0.0f ? -u : u));
    Floats p = Floats{} + terms[0];
#pragma GCC unroll 16
    for (size_t i = 1; i < sizeof(terms) / sizeof(float); ++i) p = p * s + terms[i];
    bell = exp_of_nonpositive<float>(-0.5f * u * u);
    const Floats tail = 0.5f * bell * (s * p);
    below = u < 0.0f ? tail : 1.0f - tail;
  }
};

class TransformerLayer {
 public:
  TransformerLayer(const TransformerArguments& x, unsigned char* scratch, bool backward)
      : x_(x), D_(x.width), F_(x.hidden), n_(x.tokens), part_(x.width, x.hidden) {
    const int64_t rows = x.samples * n_;
    const auto reserve = [&](int64_t entries) {
      float* p = reinterpret_cast<float*>(scratch);
      scratch += aligned(entries * int64_t(sizeof(float)));
      return p;
    };
    activated_ = reserve(rows * F_);
    if (x.sets == 2) gathered_ = reserve(rows * D_);
    if (backward) {
      d_x_ = reserve(rows * D_);
      d_inner_ = reserve(rows * F_);
      d_between_ = reserve(rows * D_);
      d_returned_ = reserve(rows * D_);
      d_projected_ = reserve(rows * 3 * D_);
    }
    scratch_ = scratch;
  }

  static int64_t scratch_bytes(const TransformerArguments& x, bool backward) {
    const int64_t rows = x.samples * x.tokens;
    const int64_t narrow = aligned(4 * rows * x.hidden), wide = aligned(4 * rows * x.width);
    const int64_t inside = backward ? 2 * narrow + 7 * wide : narrow + wide;
    const int64_t attention = x.attend->scratch_bytes(x.tokens, x.attention.d), norm = x.normalise->scratch_bytes(x.width);
    return inside + (attention > norm ? attention : norm);
  }

  void forward(int64_t chunk) {
    const Rows r = rows_of(chunk);
    const float* x = gather(r);
    float* projected = x_.projected + r.first * 3 * D_;
    product<false, kChain>(x, D_, x_.projections_t, 3 * D_, r.count, D_, 3 * D_, projected, 3 * D_);
    const AttentionArguments attention = attention_of(r);
    x_.attend->fwd(attention, 0, attention.B * attention.H * ((n_ + kTile - 1) / kTile), scratch_);
    ResidualNormArguments norm = norm_of(x_.first_norm, r);
    at(norm.x, x);
    x_.normalise->fwd(norm, 0, r.count, scratch_);
    const float* between = x_.between + r.first * D_;
    float *inner = x_.inner + r.first * F_, *returned = x_.returned + r.first * D_;
    fill(x_.b1, F_, r.count, inner);
    product<false, kChain>(between, D_, x_.w1_t, F_, r.count, D_, F_, inner, F_, true);
    for (int64_t i = 0; i < r.count * F_; i += kLanes) {
      const Floats u = load<Floats>(inner + i);
      store(activated_ + i, u * Normal(u).below);
    }
    fill(x_.b2, D_, r.count, returned);
    product<false, kChain>(activated_, F_, x_.w2_t, D_, r.count, F_, D_, returned, D_, true);
    x_.normalise->fwd(norm_of(x_.last_norm, r), 0, r.count, scratch_);
  }

  // parts: of the task; the first of its chunks sets them.
  void backward(int64_t chunk, float* parts, bool add) {
    const Rows r = rows_of(chunk);
    float *d_projections = parts, *d_w1 = d_projections + part_.projections, *d_w2 = d_w1 + part_.w1;
    float *d_b1 = d_w2 + part_.w2, *d_b2 = d_b1 + part_.b1;
    ResidualNormArguments norm = norm_of(x_.last_norm, r);
    at(norm.dx, d_between_);
    if (norm.masked) at(norm.dy, d_returned_);
    x_.normalise->bwd(norm, 0, kNormSlices, scratch_);
    const float* d_returned = norm.masked ? d_returned_ : d_between_;

    const float* inner = x_.inner + r.first * F_;
    product<false, kChain>(d_returned, D_, x_.w2, F_, r.count, D_, F_, d_inner_, F_);
    for (int64_t i = 0; i < r.count * F_; i += kLanes) {
      const Floats u = load<Floats>(inner + i);
      const Normal normal(u);
      store(activated_ + i, u * normal.below);
      store(d_inner_ + i, load<Floats>(d_inner_ + i) * (normal.below + u * (0.39894228f * normal.bell)));
    }
    product<true, kChain>(d_returned, D_, activated_, F_, D_, r.count, F_, d_w2, F_, add);
    sum_rows(d_returned, D_, r.count, d_b2, add);
    product<true, kChain>(d_inner_, F_, x_.between + r.first * D_, D_, F_, r.count, D_, d_w1, D_, add);
    sum_rows(d_inner_, F_, r.count, d_b1, add);
    product<false, kChain>(d_inner_, F_, x_.w1, D_, r.count, F_, D_, d_between_, D_, true);  // d_returned is read no more

    const float* x = gather(r);
    norm = norm_of(x_.first_norm, r);
    at(norm.x, x);
    at(norm.grad_out, d_between_);
    at(norm.dx, d_x_);
    x_.normalise->bwd(norm, 0, kNormSlices, scratch_);
    AttentionArguments attention = attention_of(r);
    at(attention.grad_out, d_x_);
    for (View* view : {&attention.dq, &attention.dk, &attention.dv})
      at(*view, d_projected_ + (view == &attention.dq ? 0 : view == &attention.dk ? D_ : 2 * D_));
    attention.b_parts = attention.B, attention.h_parts = attention.H;
    x_.attend->bwd(attention, 0, attention.B * attention.H, scratch_);
    product<true, kChain>(d_projected_, 3 * D_, x, D_, 3 * D_, r.count, D_, d_projections, D_, add);
    product<false, kChain>(d_projected_, 3 * D_, x_.projections, D_, r.count, 3 * D_, D_, d_x_, D_, true);
    for (int64_t sample = 0; sample < r.samples; ++sample)
      std::memcpy(of_sample(x_.dx, r.sample + sample), d_x_ + sample * n_ * D_, size_t(n_ * D_) * sizeof(float));
  }

 private:
  static constexpr int64_t kLanes = Vectors<float>::lanes, kChain = 64;
  struct Rows {
    int64_t chunk, sample, samples, first, count;
  };

  static int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  static void at(View& view, const float* data) { view.data = reinterpret_cast<unsigned char*>(const_cast<float*>(data)); }
  static void advance(View& view, int64_t entries) {
    if (view.data != nullptr) view.data += entries * int64_t(sizeof(float));
  }

  Rows rows_of(int64_t chunk) const {
    const int64_t sample = chunk * x_.samples, left = x_.batch - sample, samples = left < x_.samples ? left : x_.samples;
    return {chunk, sample, samples, sample * n_, samples * n_};
  }

  template <typename number>
  number* of_sample(number* const (&sets)[2], int64_t sample) const {
    return sets[sample % x_.sets] + sample / x_.sets * n_ * D_;
  }

  // The chunk's rows of x.
  const float* gather(const Rows& r) const {
    if (x_.sets == 1) return x_.x[0] + r.first * D_;
    for (int64_t sample = 0; sample < r.samples; ++sample)
      std::memcpy(gathered_ + sample * n_ * D_, of_sample(x_.x, r.sample + sample), size_t(n_ * D_) * sizeof(float));
    return gathered_;
  }

  AttentionArguments attention_of(const Rows& r) const {
    AttentionArguments a = x_.attention;
    a.B = r.samples;
    for (View* view : {&a.q, &a.k, &a.v, &a.out, &a.lse}) advance(*view, r.sample * view->batch);
    a.first_problem = r.sample * a.H;
    return a;
  }

  ResidualNormArguments norm_of(const ResidualNormArguments& whole, const Rows& r) const {
    ResidualNormArguments a = whole;
    a.rows = r.count;
    for (View* view : {&a.x, &a.y, &a.out, &a.grad_out}) advance(*view, r.first * D_);
    for (unsigned char** statistic : {&a.mean, &a.rstd}) *statistic += r.first * int64_t(sizeof(float));
    a.first_row = r.first;
    if (a.parts != nullptr) a.parts += r.chunk * kNormSlices * 2 * x_.normalise->padded(D_) * int64_t(sizeof(float));
    a.slices = kNormSlices;
    return a;
  }

  static void fill(const float* row, int64_t columns, int64_t rows, float* to) {
    for (int64_t i = 0; i < rows; ++i, to += columns)
      for (int64_t j = 0; j < columns; j += kLanes) store(to + j, load<Floats>(row + j));
  }

  const TransformerArguments& x_;
  int64_t D_, F_, n_;
  TransformerPart part_;
  unsigned char* scratch_;                                    // attention's and the norms', in turn
  float *activated_, *d_inner_;                               // of a chunk: [rows, F],
  float *gathered_, *d_x_, *d_between_, *d_returned_, *d_projected_;  // [rows, D], the last [rows, 3 D]
};

inline void transpose_weight(const float* from, int64_t rows, int64_t columns, float* to) {
  transpose(from, columns, rows, columns, to, rows);
}

inline void transformer_fwd(const TransformerArguments& x, int64_t begin, int64_t end, unsigned char* scratch) {
  TransformerLayer layer(x, scratch, false);
  for (int64_t chunk = begin; chunk < end; ++chunk) layer.forward(chunk);
}

inline void transformer_bwd(const TransformerArguments& x, int64_t begin, int64_t end, unsigned char* scratch) {
  TransformerLayer layer(x, scratch, true);
  const int64_t chunks = (x.batch + x.samples - 1) / x.samples, size = TransformerPart(x.width, x.hidden).size();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task * chunks / x.tasks;
    for (int64_t chunk = first; chunk < (task + 1) * chunks / x.tasks; ++chunk)
      layer.backward(chunk, x.parts + task * size, chunk > first);
  }
}

inline void transformer_sum(const TransformerArguments& x, int64_t first, float* total, int64_t begin, int64_t end) {
  const int64_t size = TransformerPart(x.width, x.hidden).size();
  const float* parts = x.parts + first;
  for (int64_t i = begin; i < end; ++i) total[i] = parts[i];
  for (int64_t task = 1; task < x.tasks; ++task)
    for (int64_t i = begin; i < end; ++i) total[i] += parts[task * size + i];
}

constexpr TransformerKernel transformer = {transpose_weight, transformer_fwd, transformer_bwd, transformer_sum,
                                           TransformerLayer::scratch_bytes};

}  // namespace HELO_FAST_SET
}  // namespace
