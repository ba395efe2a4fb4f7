// Matrix products of operands that lie in the cache, and sums of rows, for one instruction set (see each_set.h); on simd.h.
//
// A tile of up to 8 x 3 vectors of the result (4 x 3 where there are 16 registers) stays in registers while the depth passes by: a
// step loads a row of vectors of b and broadcasts a column of a. The last vector may be a half, where a half is cheaper.

namespace {
namespace HELO_FAST_SET {

template <typename scalar>
struct Tail {  // what columns are rounded up to
  static constexpr bool halves = sizeof(scalar) == 4 && HELO_FAST_VECTOR_BYTES > 16;
  static constexpr int64_t unit = Vectors<scalar>::lanes / (halves ? 2 : 1);
  static constexpr int64_t padded(int64_t columns) { return (columns + unit - 1) / unit * unit; }
};

template <typename scalar>
struct ProductArguments {
  const scalar* a;
  int64_t a_stride;
  const scalar* b;
  int64_t b_stride, depth;
  scalar* out;
  int64_t out_stride;
  bool add;
  const scalar* factors;  // null, or one for each row
};

template <typename scalar, bool transposed, int rows, int vectors, bool half>
inline void product_tile(const ProductArguments<scalar>& x, int64_t row) {
  using full = typename Vectors<scalar>::full;
  constexpr int64_t lanes = Vectors<scalar>::lanes;
  full sum[rows][vectors + 1] = {};
  HalfOfFloats half_sum[rows] = {};
  const scalar *a = x.a + row * (transposed ? 1 : x.a_stride), *b = x.b;
  const int64_t a_stride = x.a_stride, b_stride = x.b_stride, next = transposed ? a_stride : 1;
  for (int64_t k = x.depth; k > 0; --k, a += next, b += b_stride) {
    full line[vectors + 1];
    HalfOfFloats half_line;
#pragma GCC unroll 8
    for (int c = 0; c < vectors; ++c) line[c] = load<full>(b + c * lanes);
    if constexpr (half) half_line = load<HalfOfFloats>(b + vectors * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const scalar weight = a[r * (transposed ? 1 : a_stride)];
#pragma GCC unroll 8
      for (int c = 0; c < vectors; ++c) sum[r][c] += weight * line[c];
      if constexpr (half) half_sum[r] += weight * half_line;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
    scalar* to = x.out + (row + r) * x.out_stride;
    const scalar factor = x.factors ? x.factors[row + r] : scalar(1);
#pragma GCC unroll 8
    for (int c = 0; c < vectors; ++c)
      store(to + c * lanes, (x.add ? sum[r][c] + load<full>(to + c * lanes) : sum[r][c]) * factor);
    if constexpr (half) {
      to += vectors * lanes;
      store(to, (x.add ? half_sum[r] + load<HalfOfFloats>(to) : half_sum[r]) * factor);
    }
  }
}

template <typename scalar, bool transposed, int vectors, bool half>
void product_panel(const ProductArguments<scalar>& x, int64_t rows) {
  constexpr int most = HELO_FAST_VECTOR_BYTES == 64 ? 8 : 4;
  int64_t row = 0;
  for (; row + most <= rows; row += most) product_tile<scalar, transposed, most, vectors, half>(x, row);
  if (row + 4 <= rows) product_tile<scalar, transposed, 4, vectors, half>(x, row), row += 4;
  if (row + 2 <= rows) product_tile<scalar, transposed, 2, vectors, half>(x, row), row += 2;
  if (row < rows) product_tile<scalar, transposed, 1, vectors, half>(x, row);
}

// out [rows, columns] = (or, with add, +=) a b, with a [rows, depth], or its transpose [depth, rows], and b [depth, columns]; then
// each row times its factor. Columns are rounded up to Tail's unit. Sums are of sums of `chain` products, where there are more than half
// again as many: a single chain would round worse than other libraries do.
template <bool transposed, int64_t chain = 32, typename scalar>
void product(const scalar* a, int64_t a_stride, const scalar* b, int64_t b_stride, int64_t rows, int64_t depth, int64_t columns,
             scalar* out, int64_t out_stride, bool add = false, const scalar* factors = nullptr) {
  using T = Tail<scalar>;
  constexpr int64_t lanes = Vectors<scalar>::lanes, most = 3;
  const int64_t at_once = depth > chain + chain / 2 ? chain : depth;
  for (int64_t left = T::padded(columns), width; left > 0; left -= width, b += width, out += width) {
    const int64_t vectors = (left + lanes - 1) / lanes, groups = (vectors + most - 1) / most, here = (vectors + groups - 1) / groups;
    width = here * lanes < left ? here * lanes : left;
    auto panel = here == 3   ? product_panel<scalar, transposed, 3, false>
                 : here == 2 ? product_panel<scalar, transposed, 2, false>
                             : product_panel<scalar, transposed, 1, false>;
    if constexpr (T::halves)
      if (width < here * lanes)
        panel = here == 3   ? product_panel<scalar, transposed, 2, true>
                : here == 2 ? product_panel<scalar, transposed, 1, true>
                            : product_panel<scalar, transposed, 0, true>;
    for (int64_t k = 0; k < depth; k += at_once) {
      const bool last = depth - k <= at_once;
      panel({a + k * (transposed ? a_stride : 1), a_stride, b + k * b_stride, b_stride, last ? depth - k : at_once, out, out_stride,
             add || k > 0, last ? factors : nullptr},
            rows);
    }
  }
}

// to [columns] = (or, with add, +=) the sum of the rows of from; by eight sums, which round less than one. columns is a whole number of
// vectors.
template <typename scalar>
void sum_rows(const scalar* from, int64_t columns, int64_t rows, scalar* to, bool add) {
  using full = typename Vectors<scalar>::full;
  for (int64_t j = 0; j < columns; j += Vectors<scalar>::lanes) {
    full sums[8] = {};
    for (int64_t i = 0; i < rows; ++i) sums[i % 8] += load<full>(from + i * columns + j);
    for (int64_t apart = 4; apart > 0; apart /= 2)
      for (int64_t s = 0; s < apart; ++s) sums[s] += sums[s + apart];
    store(to + j, add ? load<full>(to + j) + sums[0] : sums[0]);
  }
}

// to [columns, stride] = the transpose of from [rows, columns]; columns and stride are whole numbers of vectors, stride at least rows.
// What of to is past rows holds nothing of meaning.
template <typename scalar>
void transpose(const scalar* from, int64_t from_stride, int64_t rows, int64_t columns, scalar* to, int64_t stride) {
  using P = Pieces<scalar>;
  using full = typename Vectors<scalar>::full;
  for (int64_t i = 0; i < stride; i += P::lanes)
    for (int64_t j = 0; j < columns; j += P::lanes) {
      full x[P::width][P::count];
#pragma GCC unroll 4
      for (int64_t r = 0; r < P::width; ++r) {
#pragma GCC unroll 4
        for (int64_t p = 0; p < P::count; ++p) {
          const int64_t row = i + r + p * P::width;
          x[r][p] = load<full>(from + (row < rows ? row : rows - 1) * from_stride + j);
        }
        P::transpose_pieces(x[r]);  // now x[r][p] is columns j + p width, ... of rows i + r, i + r + width, ...
      }
#pragma GCC unroll 4
      for (int64_t p = 0; p < P::count; ++p) {
        full y[P::width];
#pragma GCC unroll 4
        for (int64_t r = 0; r < P::width; ++r) y[r] = x[r][p];
        P::transpose_within(y);
#pragma GCC unroll 4
        for (int64_t c = 0; c < P::width; ++c) store(to + (j + p * P::width + c) * stride + i, y[c]);
      }
    }
}

}  // namespace HELO_FAST_SET
}  // namespace
