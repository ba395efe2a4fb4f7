// Vectors for one instruction set, by the compilers' vector extensions (GCC and clang, any processor): no intrinsics.
//
// Included once per instruction set by each_set.h, which defines HELO_FAST_SET (a namespace) and HELO_FAST_VECTOR_BYTES: so it has
// no include guard, and neither have the kernels on it.

namespace {
namespace HELO_FAST_SET {

template <typename scalar>
struct Vectors {
  typedef scalar full __attribute__((vector_size(HELO_FAST_VECTOR_BYTES)));
  typedef scalar half __attribute__((vector_size(HELO_FAST_VECTOR_BYTES / 2)));
  static constexpr int64_t lanes = HELO_FAST_VECTOR_BYTES / sizeof(scalar);
  static constexpr int64_t unit = lanes / 2;  // rows are padded to whole halves
};

// From and to any address: a plain dereference would promise the vector's own alignment.
template <typename vector, typename scalar>
inline vector load(const scalar* p) {
  vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename vector, typename scalar>
inline void store(scalar* p, vector v) {
  std::memcpy(p, &v, sizeof v);
}

template <typename to, typename from>
inline to bits(from x) {
  static_assert(sizeof(to) == sizeof(from), "");
  to y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// exp for arguments up to 88, without branches, so that loops over it vectorise; 0 below the normal numbers. 2 ulp.
// x = k ln 2 + r: 2^k goes into the exponent, e^r is a polynomial; adding and subtracting 1.5 * 2^mantissa rounds to whole k.
inline float exp_vectorised(float x) {
  const float low = x < -87.0f ? -87.0f : x;
  const float shifted = low * 1.44269504f + 12582912.0f;
  const float k = shifted - 12582912.0f;
  const float r = (low - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const float scale = bits<float>((bits<int32_t>(shifted) << 23) + 0x3f800000);
  return x < -87.0f ? 0.0f : p * scale;
}

inline double exp_vectorised(double x) {
  const double low = x < -700.0 ? -700.0 : x;
  const double shifted = low * 1.4426950408889634 + 6755399441055744.0;
  const double k = shifted - 6755399441055744.0;
  const double r = (low - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10;
  double p = 1.0 / 6227020800.0;  // Taylor to degree 13: 1e-17 for |r| <= ln 2 / 2
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r * r + r + 1.0;
  const double scale = bits<double>((bits<int64_t>(shifted) << 52) + 0x3ff0000000000000);
  return x < -700.0 ? 0.0 : p * scale;
}

// sums[0, columns) = sum_i weights[i] * matrix[i * stride ...]; columns is a whole number of halves.
// Four full vectors (or what is left) of sums stay in registers, in several chains, while the rows pass by.
template <typename scalar, int fulls, bool tail, int chains>
inline void weighted_sum_tile(const scalar* matrix, int64_t stride, const scalar* weights, int64_t rows, scalar* sums) {
  using V = Vectors<scalar>;
  typename V::full sum[chains][fulls ? fulls : 1] = {};
  typename V::half rest[chains] = {};
  int64_t i = 0;
  for (; i + chains <= rows; i += chains) {
#pragma GCC unroll 8
    for (int c = 0; c < chains; ++c) {
      const scalar* row = matrix + (i + c) * stride;
      const scalar w = weights[i + c];
#pragma GCC unroll 8
      for (int k = 0; k < fulls; ++k) sum[c][k] += w * load<typename V::full>(row + k * V::lanes);
      if (tail) rest[c] += w * load<typename V::half>(row + fulls * V::lanes);
    }
  }
  for (; i < rows; ++i) {
    const scalar* row = matrix + i * stride;
    for (int k = 0; k < fulls; ++k) sum[0][k] += weights[i] * load<typename V::full>(row + k * V::lanes);
    if (tail) rest[0] += weights[i] * load<typename V::half>(row + fulls * V::lanes);
  }
  for (int c = 1; c < chains; ++c) {
    for (int k = 0; k < fulls; ++k) sum[0][k] += sum[c][k];
    rest[0] += rest[c];
  }
  for (int k = 0; k < fulls; ++k) store(sums + k * V::lanes, sum[0][k]);
  if (tail) store(sums + fulls * V::lanes, rest[0]);
}

template <typename scalar>
inline void weighted_sum(const scalar* matrix, int64_t stride, const scalar* weights, int64_t rows, scalar* sums, int64_t columns) {
  using V = Vectors<scalar>;
  for (; columns >= 4 * V::lanes; matrix += 4 * V::lanes, sums += 4 * V::lanes, columns -= 4 * V::lanes)
    weighted_sum_tile<scalar, 4, false, 2>(matrix, stride, weights, rows, sums);
  switch (columns / V::unit) {
    case 1: return weighted_sum_tile<scalar, 0, true, 8>(matrix, stride, weights, rows, sums);
    case 2: return weighted_sum_tile<scalar, 1, false, 8>(matrix, stride, weights, rows, sums);
    case 3: return weighted_sum_tile<scalar, 1, true, 4>(matrix, stride, weights, rows, sums);
    case 4: return weighted_sum_tile<scalar, 2, false, 4>(matrix, stride, weights, rows, sums);
    case 5: return weighted_sum_tile<scalar, 2, true, 4>(matrix, stride, weights, rows, sums);
    case 6: return weighted_sum_tile<scalar, 3, false, 2>(matrix, stride, weights, rows, sums);
    case 7: return weighted_sum_tile<scalar, 3, true, 2>(matrix, stride, weights, rows, sums);
    default: return;
  }
}

}  // namespace HELO_FAST_SET
}  // namespace
