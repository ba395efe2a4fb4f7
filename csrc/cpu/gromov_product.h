// Dense products of small matrices, for one instruction set (see each_set.h). Matrices are row-major in whole vectors: a stride
// is padded(columns), and what stands in the padding of a right factor comes out in the padding of the product.
#include "simd.h"

namespace {
namespace HELO_FAST_SET {

template <typename scalar, int lanes>
struct Pack {
  typedef scalar type __attribute__((vector_size(lanes * sizeof(scalar))));
};

// Rows come in blocks of four, columns in whole vectors.
constexpr int64_t padded_rows(int64_t count) { return (count + 3) / 4 * 4; }

template <typename scalar>
constexpr int64_t padded(int64_t count) {
  constexpr int64_t unit = Vectors<scalar>::lanes < 4 ? 4 : Vectors<scalar>::lanes;
  return (count + unit - 1) / unit * unit;
}

// v and w hold `groups` partial sums of 1/groups of their lanes each: all of them in one vector, by halving each.
template <int groups, typename vector, int... I>
inline vector combine(vector v, vector w, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I), half = lanes / groups / 2;
  return __builtin_shufflevector(v, w, (I / half < groups ? I / half * 2 * half + I % half : lanes + (I / half - groups) * 2 * half + I % half)...) +
         __builtin_shufflevector(
             v, w, (half + (I / half < groups ? I / half * 2 * half + I % half : lanes + (I / half - groups) * 2 * half + I % half))...);
}

// Halves each of four partial sums, until each is one lane.
template <typename scalar, int lanes, int... I>
inline void store_four(typename Pack<scalar, lanes>::type v, scalar* sums, std::integer_sequence<int, I...>) {
  constexpr int half = lanes / 8;
  if constexpr (lanes == 4)
    store(sums, v);
  else
    store_four<scalar, lanes / 2>(
        __builtin_shufflevector(v, v, (I / half * 2 * half + I % half)...) +
            __builtin_shufflevector(v, v, (I / half * 2 * half + I % half + half)...),
        sums, std::make_integer_sequence<int, lanes / 4>());
}

// sums[r] = the sum of v[r]'s lanes, r < 4.
template <typename scalar>
inline void sum_four(const typename Vectors<scalar>::full (&v)[4], scalar* sums) {
  constexpr int lanes = Vectors<scalar>::lanes;
  const auto all = std::make_integer_sequence<int, lanes>();
  if constexpr (lanes == 2) {
    store(sums, combine<1>(v[0], v[1], all));
    store(sums + 2, combine<1>(v[2], v[3], all));
  } else {
    store_four<scalar, lanes>(
        combine<2>(combine<1>(v[0], v[1], all), combine<1>(v[2], v[3], all), all), sums, std::make_integer_sequence<int, lanes / 2>());
  }
}

// The lanes' sum, or the largest, by halving.
template <bool sum, typename scalar, int lanes, int... I>
inline scalar fold(typename Pack<scalar, lanes>::type v, std::integer_sequence<int, I...>) {
  if constexpr (lanes == 2) {
    return sum ? v[0] + v[1] : v[0] > v[1] ? v[0] : v[1];
  } else {
    constexpr int half = lanes / 2;
    const auto low = __builtin_shufflevector(v, v, I...), high = __builtin_shufflevector(v, v, (I + half)...);
    return fold<sum, scalar, half>(sum ? low + high : low > high ? low : high, std::make_integer_sequence<int, half / 2>());
  }
}

template <typename scalar>
inline scalar sum_lanes(typename Vectors<scalar>::full v) {
  constexpr int lanes = Vectors<scalar>::lanes;
  return fold<true, scalar, lanes>(v, std::make_integer_sequence<int, lanes / 2>());
}

template <typename scalar>
inline scalar largest_lane(typename Vectors<scalar>::full v) {
  constexpr int lanes = Vectors<scalar>::lanes;
  return fold<false, scalar, lanes>(v, std::make_integer_sequence<int, lanes / 2>());
}

template <typename scalar, int rows, int vectors>
inline void product_tile(
    const scalar* left, int64_t left_stride, const scalar* right, int64_t right_stride, int64_t inner, scalar* out, int64_t out_stride) {
  using V = Vectors<scalar>;
  typename V::full sum[rows][vectors] = {};
  for (int64_t k = 0; k < inner; ++k) {
    typename V::full row[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) row[v] = load<typename V::full>(right + k * right_stride + v * V::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const scalar weight = left[i * left_stride + k];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[i][v] += weight * row[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(out + i * out_stride + v * V::lanes, sum[i][v]);
}

template <typename scalar, int vectors>
inline void product_panel(
    const scalar* left, int64_t left_stride, const scalar* right, int64_t right_stride, int64_t rows, int64_t inner, scalar* out,
    int64_t out_stride) {
  for (; rows >= 6; rows -= 6, left += 6 * left_stride, out += 6 * out_stride)
    product_tile<scalar, 6, vectors>(left, left_stride, right, right_stride, inner, out, out_stride);
  for (; rows >= 2; rows -= 2, left += 2 * left_stride, out += 2 * out_stride)
    product_tile<scalar, 2, vectors>(left, left_stride, right, right_stride, inner, out, out_stride);
  if (rows) product_tile<scalar, 1, vectors>(left, left_stride, right, right_stride, inner, out, out_stride);
}

// out [rows, columns] = left [rows, inner] right [inner, columns]; columns whole vectors. A panel of right's columns stays in cache
// while the rows of left pass by; six rows of it at a time make as many sums as there are registers.
template <typename scalar>
void product(
    const scalar* left, int64_t left_stride, const scalar* right, int64_t right_stride, int64_t rows, int64_t inner, int64_t columns,
    scalar* out, int64_t out_stride) {
  constexpr int64_t lanes = Vectors<scalar>::lanes;
  constexpr int widest = HELO_FAST_VECTOR_BYTES == 64 ? 4 : 2;  // 32 registers, or 16
  for (; columns >= widest * lanes; right += widest * lanes, out += widest * lanes, columns -= widest * lanes)
    product_panel<scalar, widest>(left, left_stride, right, right_stride, rows, inner, out, out_stride);
  if (columns == 3 * lanes) return product_panel<scalar, 3>(left, left_stride, right, right_stride, rows, inner, out, out_stride);
  if (columns == 2 * lanes) return product_panel<scalar, 2>(left, left_stride, right, right_stride, rows, inner, out, out_stride);
  if (columns == lanes) product_panel<scalar, 1>(left, left_stride, right, right_stride, rows, inner, out, out_stride);
}

// out [4, 4] = x y' of four rows each, width whole vectors.
template <typename scalar>
inline void inner_products_tile(const scalar* x, const scalar* y, int64_t width, scalar* out, int64_t out_stride) {
  using V = Vectors<scalar>;
  typename V::full sum[4][4] = {};
  for (int64_t k = 0; k < width; k += V::lanes) {
    typename V::full right[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) right[j] = load<typename V::full>(y + j * width + k);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto left = load<typename V::full>(x + i * width + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) sum_four<scalar>(sum[i], out + i * out_stride);
}

// out [n, m] = x y', n and m whole blocks of rows.
template <typename scalar>
void inner_products(const scalar* x, const scalar* y, int64_t n, int64_t m, int64_t width, scalar* out, int64_t stride) {
  for (int64_t i = 0; i < n; i += 4)
    for (int64_t j = 0; j < m; j += 4) inner_products_tile(x + i * width, y + j * width, width, out + i * stride + j, stride);
}

// out [n, n] = x x', to the bit symmetric.
template <typename scalar>
void gram(const scalar* x, int64_t n, int64_t width, scalar* out, int64_t stride) {
  for (int64_t i = 0; i < n; i += 4) {
    for (int64_t j = i; j < n; j += 4) inner_products_tile(x + i * width, x + j * width, width, out + i * stride + j, stride);
    for (int64_t j = i + 4; j < n; ++j)
      for (int64_t k = i; k < i + 4; ++k) out[j * stride + k] = out[k * stride + j];
  }
}

// to [columns, rows] = from'; its padding is 0.
template <typename scalar>
void transpose(const scalar* from, int64_t from_stride, int64_t rows, int64_t columns, scalar* to, int64_t to_stride) {
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) to[j * to_stride + i] = from[i * from_stride + j];
    for (int64_t i = rows; i < to_stride; ++i) to[j * to_stride + i] = 0;
  }
}

}  // namespace HELO_FAST_SET
}  // namespace
