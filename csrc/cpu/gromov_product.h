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

// Columns come in whole vectors; where these are long, the last four or fewer may be a piece of 16 bytes, the tail.
template <typename scalar>
constexpr int64_t kTail = Vectors<scalar>::lanes == 16 ? Pieces<scalar>::width : 0;

template <typename scalar>
constexpr bool has_tail(int64_t columns) {
  const int64_t left = columns % Vectors<scalar>::lanes;
  return columns > left && 0 < left && left <= kTail<scalar>;
}

// body(a vector of zeros, j) for the vectors that columns [0, count) come in. No other column needs to hold anything.
template <typename scalar, typename Body>
HELO_FAST_INLINE void for_columns(int64_t count, const Body& body) {
  using V = Vectors<scalar>;
  const bool tail = has_tail<scalar>(count);
  const int64_t end = tail ? count - V::lanes : count;
  int64_t j = 0;
  for (; j < end; j += V::lanes) body(typename V::full{}, j);
  if constexpr (kTail<scalar> > 0)
    if (tail) body(typename V::piece{}, j);
}

template <typename scalar, size_t... i>
HELO_FAST_INLINE typename Vectors<scalar>::piece first_piece(typename Vectors<scalar>::full v, std::index_sequence<i...>) {
  return __builtin_shufflevector(v, v, int(i)...);
}

template <typename scalar>
HELO_FAST_INLINE typename Vectors<scalar>::piece first_piece(typename Vectors<scalar>::full v) {
  return first_piece<scalar>(v, std::make_index_sequence<Pieces<scalar>::width>());
}

// v and w hold `groups` partial sums of 1/groups of their lanes each: all of them in one vector, by halving each.
template <int groups, typename vector, int... I>
HELO_FAST_INLINE vector combine(vector v, vector w, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I), half = lanes / groups / 2;
  return __builtin_shufflevector(v, w, (I / half < groups ? I / half * 2 * half + I % half : lanes + (I / half - groups) * 2 * half + I % half)...) +
         __builtin_shufflevector(
             v, w, (half + (I / half < groups ? I / half * 2 * half + I % half : lanes + (I / half - groups) * 2 * half + I % half))...);
}

// Partial sums, 1/count of the lanes each, of `count` vectors in their order.
template <typename scalar, int count>
HELO_FAST_INLINE typename Vectors<scalar>::full combine_all(const typename Vectors<scalar>::full* v) {
  if constexpr (count == 1)
    return v[0];
  else
    return combine<count / 2>(
        combine_all<scalar, count / 2>(v), combine_all<scalar, count / 2>(v + count / 2),
        std::make_integer_sequence<int, Vectors<scalar>::lanes>());
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

// sums[r] = the sum of v[r]'s lanes, and of piece r of tail, r < 4.
template <typename scalar>
inline void sum_four(
    const typename Vectors<scalar>::full (&v)[4], scalar* sums,
    typename Vectors<scalar>::full tail = typename Vectors<scalar>::full{}) {
  constexpr int lanes = Vectors<scalar>::lanes;
  if constexpr (lanes == 2) {
    store(sums, combine_all<scalar, 2>(v));
    store(sums + 2, combine_all<scalar, 2>(v + 2));
  } else {
    auto all = combine_all<scalar, 4>(v);
    if constexpr (kTail<scalar> > 0) all += tail;
    store_four<scalar, lanes>(all, sums, std::make_integer_sequence<int, lanes / 2>());
  }
}

// The sum or the largest of the lanes of `lanes` of them, by halving down to `least`.
template <bool sum, typename scalar, int lanes, int least, int... I>
HELO_FAST_INLINE typename Pack<scalar, least>::type fold(typename Pack<scalar, lanes>::type v, std::integer_sequence<int, I...>) {
  if constexpr (lanes == least) {
    return v;
  } else {
    constexpr int half = lanes / 2;
    const auto low = __builtin_shufflevector(v, v, I...), high = __builtin_shufflevector(v, v, (I + half)...);
    return fold<sum, scalar, half, least>(sum ? low + high : larger(low, high), std::make_integer_sequence<int, half / 2>());
  }
}

// The sum or the largest of what is seen.
template <typename scalar, bool sum>
class Fold {
 public:
  using full = typename Vectors<scalar>::full;
  using piece = typename Vectors<scalar>::piece;
  explicit Fold(scalar neutral) : whole_(full{} + neutral), tail_(piece{} + neutral) {}
  template <typename vector>
  HELO_FAST_INLINE void see(vector v) {
    if constexpr (sizeof v == sizeof whole_)
      whole_ = sum ? whole_ + v : larger(v, whole_);
    else
      tail_ = sum ? tail_ + v : larger(v, tail_);
  }
  HELO_FAST_INLINE piece to_piece() const {
    constexpr int lanes = Vectors<scalar>::lanes, width = Pieces<scalar>::width;
    const piece v = fold<sum, scalar, lanes, width>(whole_, std::make_integer_sequence<int, lanes / 2>());
    return kTail<scalar> == 0 ? v : sum ? v + tail_ : larger(v, tail_);
  }
  HELO_FAST_INLINE scalar result() const {
    constexpr int width = Pieces<scalar>::width;
    const auto v = fold<sum, scalar, width, 2>(to_piece(), std::make_integer_sequence<int, width / 2>());
    return sum ? v[0] + v[1] : v[0] > v[1] ? v[0] : v[1];
  }

 private:
  full whole_;
  piece tail_;
};

template <typename scalar>
struct Sum : Fold<scalar, true> {
  Sum() : Fold<scalar, true>(0) {}
};

template <typename scalar>
struct Largest : Fold<scalar, false> {
  explicit Largest(scalar lowest) : Fold<scalar, false>(lowest) {}
};

template <typename scalar>
inline scalar sum_lanes(typename Vectors<scalar>::full v) {
  Sum<scalar> all;
  all.see(v);
  return all.result();
}

// Of rows x vectors, and a tail of each row.
template <typename scalar, int rows, int vectors, bool tail>
inline void product_tile(
    const scalar* left, int64_t left_stride, const scalar* right, int64_t right_stride, int64_t inner, scalar* out, int64_t out_stride) {
  using V = Vectors<scalar>;
  typename V::full sum[rows][vectors] = {};
  [[maybe_unused]] typename V::piece tail_sum[rows] = {};
  for (int64_t k = 0; k < inner; ++k) {
    typename V::full row[vectors];
    [[maybe_unused]] typename V::piece tail_row = {};
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) row[v] = load<typename V::full>(right + k * right_stride + v * V::lanes);
    if constexpr (tail) tail_row = load<typename V::piece>(right + k * right_stride + vectors * V::lanes);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const typename V::full weight = left[i * left_stride + k] - typename V::full{};  // in every lane
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sum[i][v] += weight * row[v];
      if constexpr (tail) tail_sum[i] += first_piece<scalar>(weight) * tail_row;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(out + i * out_stride + v * V::lanes, sum[i][v]);
    if constexpr (tail) store(out + i * out_stride + vectors * V::lanes, tail_sum[i]);
  }
}

template <typename scalar, int vectors, bool tail>
inline void product_panel(
    const scalar* left, int64_t left_stride, const scalar* right, int64_t right_stride, int64_t rows, int64_t inner, scalar* out,
    int64_t out_stride) {
  for (; rows >= 6; rows -= 6, left += 6 * left_stride, out += 6 * out_stride)
    product_tile<scalar, 6, vectors, tail>(left, left_stride, right, right_stride, inner, out, out_stride);
  for (; rows >= 2; rows -= 2, left += 2 * left_stride, out += 2 * out_stride)
    product_tile<scalar, 2, vectors, tail>(left, left_stride, right, right_stride, inner, out, out_stride);
  if (rows) product_tile<scalar, 1, vectors, tail>(left, left_stride, right, right_stride, inner, out, out_stride);
}

// out [rows, columns] = left [rows, inner] right [inner, columns]. A panel of right's columns stays in cache while the rows of left
// pass by; six rows of it at a time make as many sums as there are registers.
template <typename scalar>
void product(
    const scalar* left, int64_t left_stride, const scalar* right, int64_t right_stride, int64_t rows, int64_t inner, int64_t columns,
    scalar* out, int64_t out_stride) {
  constexpr int64_t lanes = Vectors<scalar>::lanes;
  constexpr int widest = HELO_FAST_VECTOR_BYTES == 64 ? 4 : 2;  // 32 registers, or 16
  const auto panel = [&](auto vectors, auto tail) {
    product_panel<scalar, vectors, tail>(left, left_stride, right, right_stride, rows, inner, out, out_stride);
    right += vectors * lanes, out += vectors * lanes, columns -= vectors * lanes;
  };
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  const std::integral_constant<int, 3> three;
  const std::integral_constant<int, widest> most;
  const std::true_type tailed;
  const std::false_type whole;
  while (columns >= widest * lanes) panel(most, whole);
  const bool tail = has_tail<scalar>(columns);
  if (columns > 3 * lanes) return tail ? panel(three, tailed) : panel(most, whole);
  if (columns > 2 * lanes) return tail ? panel(two, tailed) : panel(three, whole);
  if (columns > lanes) return tail ? panel(one, tailed) : panel(two, whole);
  if (columns > 0) panel(one, whole);
}

// out [rows] = matrix weights. Out has whole blocks of rows; matrix and weights are 0 in the padding of their columns.
template <typename scalar>
void product_with_vector(const scalar* matrix, int64_t stride, const scalar* weights, int64_t rows, scalar* out) {
  using full = typename Vectors<scalar>::full;
  for (int64_t i = 0; i < rows; i += 4, matrix += 4 * stride) {
    full sums[4] = {};
    for (int64_t j = 0; j < stride; j += Vectors<scalar>::lanes)
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) sums[r] += load<full>(matrix + r * stride + j) * load<full>(weights + j);
    sum_four<scalar>(sums, out + i);
  }
}

// out [4, 4] = x y' of four rows each, width whole vectors; out' too, unless it is null.
template <typename scalar>
inline void inner_products_tile(const scalar* x, const scalar* y, int64_t width, scalar* out, scalar* transposed, int64_t stride) {
  using V = Vectors<scalar>;
  typename V::full sum[16] = {};
  for (int64_t k = 0; k < width; k += V::lanes) {
    typename V::full right[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) right[j] = load<typename V::full>(y + j * width + k);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto left = load<typename V::full>(x + i * width + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[4 * i + j] += left * right[j];
    }
  }
  scalar block[16];
#pragma GCC unroll 8
  for (int k = 0; k < 16; k += V::lanes) store(block + k, Pieces<scalar>::lane_sums(sum + k));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) std::memcpy(out + i * stride, block + 4 * i, 4 * sizeof(scalar));
  if (!transposed) return;
  using four = typename Pack<scalar, 4>::type;
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) store(transposed + j * stride, four{block[j], block[4 + j], block[8 + j], block[12 + j]});
}

// out [n, m] = x y', n and m whole blocks of rows.
template <typename scalar>
void inner_products(const scalar* x, const scalar* y, int64_t n, int64_t m, int64_t width, scalar* out, int64_t stride) {
  for (int64_t i = 0; i < n; i += 4)
    for (int64_t j = 0; j < m; j += 4)
      inner_products_tile<scalar>(x + i * width, y + j * width, width, out + i * stride + j, nullptr, stride);
}

// out [n, n] = x x', to the bit symmetric.
template <typename scalar>
void gram(const scalar* x, int64_t n, int64_t width, scalar* out, int64_t stride) {
  for (int64_t i = 0; i < n; i += 4)
    for (int64_t j = i; j < n; j += 4)
      inner_products_tile<scalar>(x + i * width, x + j * width, width, out + i * stride + j, out + j * stride + i, stride);
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
