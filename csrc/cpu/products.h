// Matrix products of a few hundred rows and columns, for one instruction set (see each_set.h); on simd.h.
//
// A tile of up to 8 x 3 vectors of the result (4 x 3 where there are 16 registers) stays in registers while the depth passes by: a
// step loads a row of vectors of b and broadcasts a column of a.

namespace {
namespace HELO_FAST_SET {

template <typename scalar, bool transposed, int rows, int vectors>
inline void product_tile(const scalar* a, int64_t a_stride, const scalar* b, int64_t b_stride, int64_t depth, scalar* out,
                         int64_t out_stride, bool add) {
  using full = typename Vectors<scalar>::full;
  constexpr int64_t lanes = Vectors<scalar>::lanes;
  full sum[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    full row[vectors];
#pragma GCC unroll 8
    for (int c = 0; c < vectors; ++c) row[c] = load<full>(b + k * b_stride + c * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const scalar weight = transposed ? a[k * a_stride + r] : a[r * a_stride + k];
#pragma GCC unroll 8
      for (int c = 0; c < vectors; ++c) sum[r][c] += weight * row[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < vectors; ++c) {
      scalar* to = out + r * out_stride + c * lanes;
      store(to, add ? sum[r][c] + load<full>(to) : sum[r][c]);
    }
}

template <typename scalar, bool transposed, int vectors>
void product_panel(const scalar* a, int64_t a_stride, const scalar* b, int64_t b_stride, int64_t rows, int64_t depth, scalar* out,
                   int64_t out_stride, bool add) {
  constexpr int most = HELO_FAST_VECTOR_BYTES == 64 ? 8 : 4;
  const int64_t next = transposed ? 1 : a_stride;
  for (; rows >= most; rows -= most, a += most * next, out += most * out_stride)
    product_tile<scalar, transposed, most, vectors>(a, a_stride, b, b_stride, depth, out, out_stride, add);
  if (rows >= 4) {
    product_tile<scalar, transposed, 4, vectors>(a, a_stride, b, b_stride, depth, out, out_stride, add);
    rows -= 4, a += 4 * next, out += 4 * out_stride;
  }
  for (; rows > 0; --rows, a += next, out += out_stride)
    product_tile<scalar, transposed, 1, vectors>(a, a_stride, b, b_stride, depth, out, out_stride, add);
}

// out [rows, columns] = (or, with add, +=) a b, with a [rows, depth], or its transpose [depth, rows], and b [depth, columns]; columns
// is a whole number of vectors. Sums are of sums of kDepth products: a single chain would round worse than other libraries do.
constexpr int64_t kDepth = 32;

template <bool transposed, typename scalar>
void product(const scalar* a, int64_t a_stride, const scalar* b, int64_t b_stride, int64_t rows, int64_t depth, int64_t columns,
             scalar* out, int64_t out_stride, bool add) {
  constexpr int64_t lanes = Vectors<scalar>::lanes;
  for (int64_t left = columns / lanes, vectors; left > 0; left -= vectors, b += vectors * lanes, out += vectors * lanes) {
    vectors = left == 4 || left == 2 ? 2 : left < 3 ? 1 : 3;  // 4 is 2 + 2
    const auto panel = vectors == 3   ? product_panel<scalar, transposed, 3>
                       : vectors == 2 ? product_panel<scalar, transposed, 2>
                                      : product_panel<scalar, transposed, 1>;
    for (int64_t k = 0; k < depth; k += kDepth)
      panel(a + k * (transposed ? a_stride : 1), a_stride, b + k * b_stride, b_stride, rows, depth - k < kDepth ? depth - k : kDepth, out,
            out_stride, add || k > 0);
  }
}

// to [columns, stride] = the transpose of from [rows, columns]; columns is a multiple of 4, stride one and at least rows. What of to
// is past rows holds nothing of meaning.
template <typename scalar>
void transpose(const scalar* from, int64_t from_stride, int64_t rows, int64_t columns, scalar* to, int64_t stride) {
  typedef scalar quad __attribute__((vector_size(4 * sizeof(scalar))));
  for (int64_t i = 0; i < stride; i += 4) {
    const scalar* row[4];
    for (int64_t r = 0; r < 4; ++r) row[r] = from + (i + r < rows ? i + r : rows - 1) * from_stride;
    for (int64_t j = 0; j < columns; j += 4) {
      quad x[4], y[4];
      for (int64_t r = 0; r < 4; ++r) std::memcpy(&x[r], row[r] + j, sizeof x[r]);
      const quad low = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5), high = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7);
      const quad low2 = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5), high2 = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
      y[0] = __builtin_shufflevector(low, low2, 0, 1, 4, 5);
      y[1] = __builtin_shufflevector(low, low2, 2, 3, 6, 7);
      y[2] = __builtin_shufflevector(high, high2, 0, 1, 4, 5);
      y[3] = __builtin_shufflevector(high, high2, 2, 3, 6, 7);
      for (int64_t r = 0; r < 4; ++r) std::memcpy(to + (j + r) * stride + i, &y[r], sizeof y[r]);
    }
  }
}

}  // namespace HELO_FAST_SET
}  // namespace
