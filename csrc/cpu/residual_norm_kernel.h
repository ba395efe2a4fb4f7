// LayerNorm(x + dropout(y)), forward and backward, for one instruction set (see each_set.h).
//
//   s = x + keep y rescale;  h = (s - mean(s)) rstd, rstd = (var(s) + eps)^-1/2;  out = h weight + bias
//   dh = do weight;  dx = (dh - mean(dh) - h mean(dh h)) rstd;  dy = dx keep rescale;  dweight = sum of do h;  dbias = sum of do
//
// A row at a time: read once, written once, in between in the first-level cache. The backward makes s and the mask again.
// Rows are padded to whole vectors with zeros, which mean and variance leave out.
#include "simd.h"
// and on it
#include "philox.h"
#include "products.h"
#include "storage.h"

namespace {
namespace HELO_FAST_SET {

template <typename scalar>
class ResidualNorm {
 public:
  using full = typename Vectors<scalar>::full;
  using word = typename Unsigned<sizeof(scalar)>::type;
  using words = typename Unsigned<sizeof(scalar)>::full;
  static constexpr int64_t lanes = Vectors<scalar>::lanes;

  ResidualNorm(const ResidualNormArguments& x, unsigned char* scratch) : x_(x), scratch_(scratch), width_(padded(x.width)) {
    for (scalar** p : {&weight_, &bias_, &s_, &y_, &go_, &result_}) *p = reserve<scalar>(width_);
    for (uint32_t** p : {&block_, &zero_}) *p = reserve<uint32_t>(width_ / 4 + kPhiloxCalls);
    random_ = reserve<uint32_t>(width_ + 4 * kPhiloxCalls);
    inside_ = reserve<scalar>(width_);
    sums_ = reserve<scalar>(2 * width_);
    for (int64_t c = 0; c < width_ / 4 + kPhiloxCalls; ++c) block_[c] = uint32_t(c), zero_[c] = 0;
    for (int64_t j = 0; j < width_; ++j) inside_[j] = j < x.width;
    weight_ = const_cast<scalar*>(take(x.weight, 0, 0, 0, 1, x.width, width_, weight_).data);
    if (x.bias.data != nullptr) bias_ = const_cast<scalar*>(take(x.bias, 0, 0, 0, 1, x.width, width_, bias_).data);
  }

  static int64_t padded(int64_t width) { return (width + kUnit - 1) / kUnit * kUnit; }
  static int64_t scratch_bytes(int64_t width) {
    const int64_t wide = padded(width);
    return 9 * wide * int64_t(sizeof(scalar)) + (wide / 2 + 2 * kPhiloxCalls + wide + 4 * kPhiloxCalls) * 4 + 16 * 64;
  }

  void forward(int64_t row) {
    const Matrix<scalar> x = take(x_.x, 0, 0, row, 1, x_.width, width_, s_), y = take(x_.y, 0, 0, row, 1, x_.width, width_, y_);
    draw(row);
    full total = {}, square = {};
    for (int64_t j = 0; j < width_; j += lanes) {
      const full s = load<full>(x.data + j) + kept(load<full>(y.data + j), j);
      store(s_ + j, s);
      total += s;
    }
    const scalar mean = sum_of<scalar>(total) / scalar(x_.width);
    for (int64_t j = 0; j < width_; j += lanes) {
      const full centred = (load<full>(s_ + j) - mean) * load<full>(inside_ + j);
      square += centred * centred;
    }
    const scalar rstd = scalar(1) / std::sqrt(sum_of<scalar>(square) / scalar(x_.width) + scalar(x_.eps));
    scalar* out = place(x_.out, row);
    for (int64_t j = 0; j < width_; j += lanes)
      store(out + j, (load<full>(s_ + j) - mean) * rstd * load<full>(weight_ + j) + load<full>(bias_ + j));
    reinterpret_cast<scalar*>(x_.mean)[row] = mean;
    reinterpret_cast<scalar*>(x_.rstd)[row] = rstd;
    finish(out, x_.out, row);
  }

  // parts: sums of do h and of do.
  void backward(int64_t row, scalar* parts) {
    const Matrix<scalar> x = take(x_.x, 0, 0, row, 1, x_.width, width_, s_), y = take(x_.y, 0, 0, row, 1, x_.width, width_, y_);
    draw(row);
    const scalar mean = reinterpret_cast<const scalar*>(x_.mean)[row], rstd = reinterpret_cast<const scalar*>(x_.rstd)[row];
    const scalar* go = take(x_.grad_out, 0, 0, row, 1, x_.width, width_, go_).data;
    full total = {}, along = {};
    for (int64_t j = 0; j < width_; j += lanes) {
      const full h = (load<full>(x.data + j) + kept(load<full>(y.data + j), j) - mean) * rstd;
      const full g = load<full>(go + j), dh = g * load<full>(weight_ + j);
      store(s_ + j, h);
      total += dh;
      along += dh * h;
      store(parts + j, load<full>(parts + j) + g * h);
      store(parts + width_ + j, load<full>(parts + width_ + j) + g);
    }
    const scalar shift = sum_of<scalar>(total) / scalar(x_.width), slope = sum_of<scalar>(along) / scalar(x_.width);
    scalar *dx = place(x_.dx, row), *dy = x_.dy.data == nullptr ? nullptr : place(x_.dy, row, y_);
    for (int64_t j = 0; j < width_; j += lanes) {
      const full d = (load<full>(go + j) * load<full>(weight_ + j) - shift - load<full>(s_ + j) * slope) * rstd;
      store(dx + j, d);
      if (dy != nullptr) store(dy + j, kept(d, j));
    }
    finish(dx, x_.dx, row);
    if (dy != nullptr) finish(dy, x_.dy, row);
  }

  // dweight and dbias: the sums of the slices' parts.
  void sum() {
    sum_rows(reinterpret_cast<const scalar*>(x_.parts), 2 * width_, x_.slices, sums_, false);
    put(sums_, width_, x_.dweight, 0, 0, int64_t(0), 1, x_.width, false);
    put(sums_ + width_, width_, x_.dbias, 0, 0, int64_t(0), 1, x_.width, false);
  }

 private:
  static constexpr int64_t kUnit = lanes > 4 ? lanes : 4;  // whole vectors, and whole calls of Philox

  template <typename T>
  T* reserve(int64_t count) {
    T* p = reinterpret_cast<T*>(scratch_);
    scratch_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }

  // The random words of a row.
  void draw(int64_t row) {
    if (!x_.masked) return;
    const int64_t drawn = x_.first_row + row;
    philox(x_.seed, uint64_t(drawn) >> 32, block_, 0, zero_, drawn, width_ / 4, random_);
  }

  // Vector j of a row of y, or of its gradient, after dropout.
  HELO_FAST_INLINE full kept(full y, int64_t j) const {
    if (!x_.masked) return y;
    const auto random = __builtin_convertvector(load<typename Unsigned<sizeof(scalar)>::narrow>(random_ + j), words);
    return y * (random < words{} + (word(x_.cut_below) << 16) ? full{} : full{} + scalar(x_.rescale));
  }

  // Where a row of a result is computed: where it will lie, if whole vectors can be written there, else in a buffer, which finish copies.
  scalar* place(const View& x, int64_t row, scalar* buffer) const {
    const bool stored = x.storage == (sizeof(scalar) == 8 ? Storage::float64 : Storage::float32);
    return stored && x_.width == width_ ? reinterpret_cast<scalar*>(x.data) + offset(x, 0, 0, row) : buffer;
  }
  scalar* place(const View& x, int64_t row) const { return place(x, row, result_); }
  void finish(const scalar* computed, const View& x, int64_t row) {
    if (computed == result_ || computed == y_) put(computed, width_, x, 0, 0, row, 1, x_.width, false);
  }

  const ResidualNormArguments& x_;
  unsigned char* scratch_;
  int64_t width_;                                            // padded
  scalar *weight_, *bias_, *s_, *y_, *go_, *result_, *inside_;  // [width]; inside_ is 1 in columns, 0 in the padding
  scalar* sums_;                                             // [2 width]
  uint32_t *block_, *zero_, *random_;                        // of the calls of Philox
};

template <typename scalar>
void residual_norm_fwd(const ResidualNormArguments& x, int64_t begin, int64_t end, unsigned char* scratch) {
  ResidualNorm<scalar> norm(x, scratch);
  for (int64_t row = begin; row < end; ++row) norm.forward(row);
}

template <typename scalar>
void residual_norm_bwd(const ResidualNormArguments& x, int64_t begin, int64_t end, unsigned char* scratch) {
  ResidualNorm<scalar> norm(x, scratch);
  const int64_t wide = norm.padded(x.width);
  for (int64_t slice = begin; slice < end; ++slice) {
    scalar* parts = reinterpret_cast<scalar*>(x.parts) + slice * 2 * wide;
    for (int64_t j = 0; j < 2 * wide; ++j) parts[j] = 0;
    for (int64_t row = slice * x.rows / x.slices; row < (slice + 1) * x.rows / x.slices; ++row) norm.backward(row, parts);
  }
}

template <typename scalar>
void residual_norm_sum(const ResidualNormArguments& x, unsigned char* scratch) {
  ResidualNorm<scalar>(x, scratch).sum();
}

template <typename scalar>
constexpr ResidualNormKernel residual_norm = {residual_norm_fwd<scalar>, residual_norm_bwd<scalar>, residual_norm_sum<scalar>,
                                              ResidualNorm<scalar>::scratch_bytes, ResidualNorm<scalar>::padded};

}  // namespace HELO_FAST_SET
}  // namespace
