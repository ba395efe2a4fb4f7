// Vectors for one instruction set, by the compilers' vector extensions (GCC and clang, any processor); intrinsics stand here alone, for
// the few instructions that compilers do not find.
//
// Included once per instruction set by each_set.h, which defines HELO_FAST_SET (a namespace) and HELO_FAST_VECTOR_BYTES: so it has
// no include guard, and neither have the kernels on it.

#undef HELO_FAST_INLINE
#define HELO_FAST_INLINE inline __attribute__((always_inline))
#undef HELO_FAST_LAMBDA
#define HELO_FAST_LAMBDA __attribute__((always_inline))

namespace {
namespace HELO_FAST_SET {

// Written out for each scalar: GCC forgets a vector size that depends on a template's parameter.
template <typename scalar>
struct Vectors;

template <>
struct Vectors<float> {
  typedef float full __attribute__((vector_size(HELO_FAST_VECTOR_BYTES)));
  typedef int32_t words __attribute__((vector_size(HELO_FAST_VECTOR_BYTES)));
  typedef uint32_t unsigned_words __attribute__((vector_size(HELO_FAST_VECTOR_BYTES)));
  typedef double wide __attribute__((vector_size(2 * HELO_FAST_VECTOR_BYTES)));  // as many lanes, in double
  typedef float piece __attribute__((vector_size(16)));
  typedef double wide_piece __attribute__((vector_size(32)));
  static constexpr int64_t lanes = HELO_FAST_VECTOR_BYTES / 4;
};

template <>
struct Vectors<double> {
  typedef double full __attribute__((vector_size(HELO_FAST_VECTOR_BYTES)));
  typedef int64_t words __attribute__((vector_size(HELO_FAST_VECTOR_BYTES)));
  typedef uint64_t unsigned_words __attribute__((vector_size(HELO_FAST_VECTOR_BYTES)));
  typedef double wide __attribute__((vector_size(HELO_FAST_VECTOR_BYTES)));
  typedef double piece __attribute__((vector_size(16)));
  typedef double wide_piece __attribute__((vector_size(16)));
  static constexpr int64_t lanes = HELO_FAST_VECTOR_BYTES / 8;
};

// From and to any address: a plain dereference would promise the vector's own alignment.
template <typename vector, typename scalar>
HELO_FAST_INLINE vector load(const scalar* p) {
  vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename vector, typename scalar>
HELO_FAST_INLINE void store(scalar* p, vector v) {
  std::memcpy(p, &v, sizeof v);
}

template <typename to, typename from>
HELO_FAST_INLINE to bits(from x) {
  static_assert(sizeof(to) == sizeof(from), "");
  to y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <typename scalar>
struct Exponential;

template <>
struct Exponential<float> {
  static constexpr float lowest = -87.0f, highest = 89.0f, per_log2 = 1.44269504f, whole = 12582912.0f, log2_high = 0.693359375f, log2_low = -2.12194440e-4f;
  static constexpr int mantissa = 23, one = 0x3f800000;
  static constexpr float terms[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};

template <>
struct Exponential<double> {
  static constexpr double lowest = -700.0, highest = 710.0, per_log2 = 1.4426950408889634, whole = 6755399441055744.0;
  static constexpr double log2_high = 6.93147180369123816490e-01, log2_low = 1.90821492927058770002e-10;
  static constexpr int mantissa = 52;
  static constexpr int64_t one = 0x3ff0000000000000;
  static constexpr double terms[] = {  // Taylor to degree 13: 1e-17 for |r| <= ln 2 / 2
      1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0,
      1.0 / 5040.0,       1.0 / 720.0,       1.0 / 120.0,      1.0 / 24.0,      1.0 / 6.0,      0.5};
};

// exp where the power of two is a number, 2 ulp. x = k ln 2 + r: 2^k goes into the exponent, e^r is a polynomial; adding and
// subtracting 1.5 * 2^mantissa rounds to whole k.
template <typename scalar, typename words, typename number>
HELO_FAST_INLINE number exp_within(number within) {
  using E = Exponential<scalar>;
  const number shifted = within * E::per_log2 + E::whole;
  const number k = shifted - E::whole;
  const number r = (within - k * E::log2_high) - k * E::log2_low;
  number p = r * E::terms[0] + E::terms[1];
#pragma GCC unroll 16
  for (size_t i = 2; i < sizeof(E::terms) / sizeof(scalar); ++i) p = p * r + E::terms[i];
  p = (p * r) * r + r + scalar(1);
  return p * bits<number>((bits<words>(shifted) << E::mantissa) + E::one);
}

// exp, scalar or vector, without branches; 0 below the normal numbers, infinity near the largest and above. 2 ulp.
template <typename scalar, typename words, typename number>
HELO_FAST_INLINE number exp_of(number x) {
  using E = Exponential<scalar>;
  const number high = x > E::highest ? number{} + E::highest : x;
  const number within = high < E::lowest ? number{} + E::lowest : high;
  return x < E::lowest ? number{} : exp_within<scalar, words>(within);
}

// The larger and the smaller of scalars or vectors, y where one is NaN.
template <typename number>
HELO_FAST_INLINE number larger(number x, number y) { return x > y ? x : y; }
template <typename number>
HELO_FAST_INLINE number smaller(number x, number y) { return x < y ? x : y; }

// GCC makes two instructions of these expressions of full vectors, and one of the intrinsics (without the mask, which it drops, GCC 12
// warns of its own header).
#if defined(__x86_64__) && HELO_FAST_VECTOR_BYTES == 64
HELO_FAST_INLINE Vectors<float>::full larger(Vectors<float>::full x, Vectors<float>::full y) { return _mm512_maskz_max_ps(0xffff, x, y); }
HELO_FAST_INLINE Vectors<float>::full smaller(Vectors<float>::full x, Vectors<float>::full y) { return _mm512_maskz_min_ps(0xffff, x, y); }
HELO_FAST_INLINE Vectors<double>::full larger(Vectors<double>::full x, Vectors<double>::full y) { return _mm512_maskz_max_pd(0xff, x, y); }
HELO_FAST_INLINE Vectors<double>::full smaller(Vectors<double>::full x, Vectors<double>::full y) { return _mm512_maskz_min_pd(0xff, x, y); }
#elif defined(__x86_64__) && HELO_FAST_VECTOR_BYTES == 32
HELO_FAST_INLINE Vectors<float>::full larger(Vectors<float>::full x, Vectors<float>::full y) { return _mm256_max_ps(x, y); }
HELO_FAST_INLINE Vectors<float>::full smaller(Vectors<float>::full x, Vectors<float>::full y) { return _mm256_min_ps(x, y); }
HELO_FAST_INLINE Vectors<double>::full larger(Vectors<double>::full x, Vectors<double>::full y) { return _mm256_max_pd(x, y); }
HELO_FAST_INLINE Vectors<double>::full smaller(Vectors<double>::full x, Vectors<double>::full y) { return _mm256_min_pd(x, y); }
#endif

// exp of a vector of numbers that are at most about 0, or NaN; 0 below the normal numbers. What is below 2^-127 is taken for that,
// whose power of two has the bits of 0.
template <typename scalar>
HELO_FAST_INLINE typename Vectors<scalar>::full exp_of_nonpositive(typename Vectors<scalar>::full x) {
  using full = typename Vectors<scalar>::full;
  constexpr double least = sizeof(scalar) == 4 ? -127 * 0.6931471805599453 : -1023 * 0.6931471805599453;
  return exp_within<scalar, typename Vectors<scalar>::unsigned_words>(larger(full{} + scalar(least), x));
}

inline float exp_vectorised(float x) { return exp_of<float, uint32_t>(x); }
inline double exp_vectorised(double x) { return exp_of<double, uint64_t>(x); }
HELO_FAST_INLINE Vectors<float>::full exp_vectorised(Vectors<float>::full x) { return exp_of<float, Vectors<float>::unsigned_words>(x); }
#if HELO_FAST_VECTOR_BYTES > 16
HELO_FAST_INLINE Vectors<float>::piece exp_vectorised(Vectors<float>::piece x) {
  typedef uint32_t words __attribute__((vector_size(16)));
  return exp_of<float, words>(x);
}
#endif
HELO_FAST_INLINE Vectors<double>::full exp_vectorised(Vectors<double>::full x) { return exp_of<double, Vectors<double>::unsigned_words>(x); }

// exp of arguments in double: a float argument of -28, half a unit in its last place off, would put e^-28 off by eight.
HELO_FAST_INLINE Vectors<double>::full exp_of_wide(const Vectors<double>::wide& x) { return exp_vectorised(x); }
HELO_FAST_INLINE Vectors<float>::full exp_of_wide(const Vectors<float>::wide& x) {
  using E = Exponential<float>;
  using D = Exponential<double>;
  using wide = Vectors<float>::wide;
  using full = Vectors<float>::full;
  const wide whole = x * D::per_log2 + D::whole - D::whole;
  const full r = __builtin_convertvector(x - whole * (D::log2_high + D::log2_low), full);
  const full k = __builtin_convertvector(whole, full);
  full p = r * E::terms[0] + E::terms[1];
#pragma GCC unroll 16
  for (size_t i = 2; i < sizeof(E::terms) / sizeof(float); ++i) p = p * r + E::terms[i];
  p = (p * r) * r + r + 1.0f;
  const full shifted = k + E::whole;
  const full scale = bits<full>((bits<Vectors<float>::unsigned_words>(shifted) << E::mantissa) + E::one);
  const full value = k > 127.5f ? full{} + HUGE_VALF : p * scale;
  return k < -125.5f ? full{} : value;
}

// log of normal positive numbers, in the same way: x = 2^k z with z in [sqrt(1/2), sqrt(2)), log z = 2 atanh((z - 1) / (z + 1)). 2 ulp.
inline double log_vectorised(double x) {
  const int64_t above = bits<int64_t>(x) - 0x3fe6a09e667f3bcd;  // sqrt(1/2)
  const int64_t k = above >> 52;
  const double z = bits<double>(bits<uint64_t>(x) - (uint64_t(k) << 52));
  const double s = (z - 1.0) / (z + 1.0), q = s * s;
  double p = 1.0 / 23.0;  // Taylor: the next term is below 1e-18
  for (int i = 21; i >= 3; i -= 2) p = p * q + 1.0 / i;
  return double(k) * 6.93147180369123816490e-01 + (2.0 * s * (p * q) + (double(k) * 1.90821492927058770002e-10 + 2.0 * s));
}

// A vector as pieces of 16 bytes: pieces() of them, each of piece_lanes() scalars.
template <typename scalar>
struct Pieces {
  using full = typename Vectors<scalar>::full;
  using piece = typename Vectors<scalar>::piece;
  static constexpr int64_t lanes = Vectors<scalar>::lanes;
  static constexpr int64_t width = 16 / sizeof(scalar);
  static constexpr int64_t count = lanes / width;

  // The 16 bytes at p, in every piece.
  static full repeat(const scalar* p) {
#if defined(__x86_64__) && HELO_FAST_VECTOR_BYTES == 64  // one load; GCC makes a detour through memory out of a shuffle
    return bits<full>(_mm512_maskz_broadcast_f32x4(0xffff, load<__m128>(p)));
#elif defined(__x86_64__) && HELO_FAST_VECTOR_BYTES == 32
    return bits<full>(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)));
#else
    return repeat(load<piece>(p), std::make_index_sequence<lanes>());
#endif
  }
  // Piece p: the sum of the pieces of vector p of those at x.
  static HELO_FAST_INLINE full piece_sums(const scalar* vectors) {
    full x[count];
#pragma GCC unroll 4
    for (int64_t p = 0; p < count; ++p) x[p] = load<full>(vectors + p * lanes);
    return piece_sums(x);
  }
  static HELO_FAST_INLINE full piece_sums(const full* x) {
    const auto all = std::make_index_sequence<lanes>();
    if constexpr (count == 1) {
      return x[0];
    } else if constexpr (count == 2) {
      return gather<0, 2>(x[0], x[1], all) + gather<1, 3>(x[0], x[1], all);
    } else {
      const full x01 = gather<0, 1, 4, 5>(x[0], x[1], all) + gather<2, 3, 6, 7>(x[0], x[1], all);
      const full x23 = gather<0, 1, 4, 5>(x[2], x[3], all) + gather<2, 3, 6, 7>(x[2], x[3], all);
      return gather<0, 2, 4, 6>(x01, x23, all) + gather<1, 3, 5, 7>(x01, x23, all);
    }
  }

  // Of x, `count` vectors, in place: piece p of vector q and piece q of vector p change places.
  static HELO_FAST_INLINE void transpose_pieces(full* x) {
    const auto all = std::make_index_sequence<lanes>();
    if constexpr (count == 2) {
      const full first = gather<0, 2>(x[0], x[1], all);
      x[1] = gather<1, 3>(x[0], x[1], all);
      x[0] = first;
    } else if constexpr (count == 4) {
      const full low01 = gather<0, 1, 4, 5>(x[0], x[1], all), high01 = gather<2, 3, 6, 7>(x[0], x[1], all);
      const full low23 = gather<0, 1, 4, 5>(x[2], x[3], all), high23 = gather<2, 3, 6, 7>(x[2], x[3], all);
      x[0] = gather<0, 2, 4, 6>(low01, low23, all);
      x[1] = gather<1, 3, 5, 7>(low01, low23, all);
      x[2] = gather<0, 2, 4, 6>(high01, high23, all);
      x[3] = gather<1, 3, 5, 7>(high01, high23, all);
    }
  }

  // Of x, `width` vectors, in place: within each piece, lane k of vector r and lane r of vector k change places.
  static HELO_FAST_INLINE void transpose_within(full* x) {
    const auto all = std::make_index_sequence<lanes>();
    if constexpr (width == 2) {
      const full first = shuffle<0, 2>(x[0], x[1], all);
      x[1] = shuffle<1, 3>(x[0], x[1], all);
      x[0] = first;
    } else {
      const full low01 = shuffle<0, 4, 1, 5>(x[0], x[1], all), high01 = shuffle<2, 6, 3, 7>(x[0], x[1], all);
      const full low23 = shuffle<0, 4, 1, 5>(x[2], x[3], all), high23 = shuffle<2, 6, 3, 7>(x[2], x[3], all);
      x[0] = shuffle<0, 1, 4, 5>(low01, low23, all);
      x[1] = shuffle<2, 3, 6, 7>(low01, low23, all);
      x[2] = shuffle<0, 1, 4, 5>(high01, high23, all);
      x[3] = shuffle<2, 3, 6, 7>(high01, high23, all);
    }
  }

  // Lane k of each piece, in all lanes of that piece.
  template <int k>
  static full spread(full x) { return shuffle<k, k, k, k>(x, x, std::make_index_sequence<lanes>()); }

  // Lane k of each piece: the sum of that piece of x[k].
  static HELO_FAST_INLINE full transposed_sums(const full* x) {
    const auto all = std::make_index_sequence<lanes>();
    if constexpr (width == 2) {
      return shuffle<0, 2, 0, 2>(x[0], x[1], all) + shuffle<1, 3, 1, 3>(x[0], x[1], all);
    } else {
      const full x01 = shuffle<0, 4, 1, 5>(x[0], x[1], all) + shuffle<2, 6, 3, 7>(x[0], x[1], all);
      const full x23 = shuffle<0, 4, 1, 5>(x[2], x[3], all) + shuffle<2, 6, 3, 7>(x[2], x[3], all);
      return shuffle<0, 1, 4, 5>(x01, x23, all) + shuffle<2, 3, 6, 7>(x01, x23, all);
    }
  }

  // Piece p: lane p of it, in all lanes.
  static full diagonal(full x) {
    static_assert(count == width, "as many pieces as lanes in one");
    return shuffle_diagonal(x, std::make_index_sequence<lanes>());
  }

  // Lane k: the sum of the lanes of x[k].
  static HELO_FAST_INLINE full lane_sums(const full* x) {
    full sums[count];
#pragma GCC unroll 4
    for (int64_t p = 0; p < count; ++p) sums[p] = transposed_sums(x + p * width);
    return piece_sums(sums);
  }

 private:
  // Within each piece of (x, y): from[lane], counting y's lanes after x's.
  template <int... from, size_t... i>
  static full shuffle(full x, full y, std::index_sequence<i...>) {
    return __builtin_shufflevector(x, y, source<from...>(i)...);
  }
  template <int... from>
  static constexpr int source(int64_t i) {
    constexpr int table[] = {from...};
    const int lane = table[i % width];
    return int(i / width * width + lane % width + lane / width * lanes);
  }
  template <size_t... i>
  static full shuffle_diagonal(full x, std::index_sequence<i...>) {
    return __builtin_shufflevector(x, x, int(i / width * width + i / width)...);
  }
  // Whole pieces of (x, y).
  template <int... from, size_t... i>
  static full gather(full x, full y, std::index_sequence<i...>) {
    return __builtin_shufflevector(x, y, piece_source<from...>(i)...);
  }
  template <int... from>
  static constexpr int piece_source(int64_t i) {
    constexpr int table[] = {from...};
    return int(table[i / width] * width + i % width);
  }
  template <size_t... i>
  static full repeat(piece p, std::index_sequence<i...>) { return __builtin_shufflevector(p, p, int(i % width)...); }
};

// Whether all of x lies in [low, high], two normal positive numbers; false for NaN. Of positive numbers the bits are in order too.
template <typename scalar>
class RangeCheck {
 public:
  RangeCheck(scalar low, scalar high) : low_(bits<word>(low)), span_(bits<word>(high) - low_) {}
  HELO_FAST_INLINE void see(typename Vectors<scalar>::full x) {
    const words above = bits<words>(x) - low_;
    worst_ = above > worst_ ? above : worst_;
  }
  bool passed() const {
    word worst = 0;
    for (int64_t i = 0; i < Vectors<scalar>::lanes; ++i) worst = worst_[i] > worst ? worst_[i] : worst;
    return worst <= span_;
  }

 private:
  using word = std::conditional_t<sizeof(scalar) == 4, uint32_t, uint64_t>;
  using words = typename Vectors<scalar>::unsigned_words;
  word low_, span_;
  words worst_ = {};
};

// The 64-bit products of the low halves of 64-bit lanes; what stands in the high halves does not matter.
HELO_FAST_INLINE Vectors<double>::unsigned_words product_of_halves(Vectors<double>::unsigned_words x, Vectors<double>::unsigned_words y) {
#if defined(__x86_64__) && HELO_FAST_VECTOR_BYTES == 64  // GCC multiplies all 64 bits
  return bits<Vectors<double>::unsigned_words>(_mm512_maskz_mul_epu32(0xff, bits<__m512i>(x), bits<__m512i>(y)));
#elif defined(__x86_64__) && HELO_FAST_VECTOR_BYTES == 32
  return bits<Vectors<double>::unsigned_words>(_mm256_mul_epu32(bits<__m256i>(x), bits<__m256i>(y)));
#elif defined(__x86_64__)
  return bits<Vectors<double>::unsigned_words>(_mm_mul_epu32(bits<__m128i>(x), bits<__m128i>(y)));
#else
  return (x & 0xffffffff) * (y & 0xffffffff);
#endif
}

// The sum of the lanes of a full vector: each step adds to every lane the one half, a quarter, ... of the vector away.
template <typename scalar>
HELO_FAST_INLINE scalar sum_of(typename Vectors<scalar>::full v) {
  constexpr int64_t lanes = Vectors<scalar>::lanes;
  if constexpr (lanes == 16) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  } else if constexpr (lanes == 8) {
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
  } else if constexpr (lanes == 4) {
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2);
  } else {
    v += __builtin_shufflevector(v, v, 1, 0);
  }
  return v[0];
}

// The largest lane, of lanes none of which is NaN.
template <typename scalar>
HELO_FAST_INLINE scalar max_of(typename Vectors<scalar>::full v) {
  constexpr int64_t lanes = Vectors<scalar>::lanes;
  if constexpr (lanes == 16) {
    v = larger(__builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7), v);
    v = larger(__builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11), v);
    v = larger(__builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13), v);
    v = larger(__builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14), v);
  } else if constexpr (lanes == 8) {
    v = larger(__builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3), v);
    v = larger(__builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5), v);
    v = larger(__builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6), v);
  } else if constexpr (lanes == 4) {
    v = larger(__builtin_shufflevector(v, v, 2, 3, 0, 1), v);
    v = larger(__builtin_shufflevector(v, v, 1, 0, 3, 2), v);
  } else {
    v = larger(__builtin_shufflevector(v, v, 1, 0), v);
  }
  return v[0];
}

// Half a vector of floats, to and from a vector of doubles.
typedef float HalfOfFloats __attribute__((vector_size(HELO_FAST_VECTOR_BYTES / 2)));
HELO_FAST_INLINE Vectors<double>::full load_double(const float* p) {
  return __builtin_convertvector(load<HalfOfFloats>(p), Vectors<double>::full);
}
HELO_FAST_INLINE Vectors<double>::full load_double(const double* p) { return load<Vectors<double>::full>(p); }
HELO_FAST_INLINE void store_double(float* p, Vectors<double>::full v) { store(p, __builtin_convertvector(v, HalfOfFloats)); }
HELO_FAST_INLINE void store_double(double* p, Vectors<double>::full v) { store(p, v); }

// Converts size numbers to double; zeros follow, up to a padded size of whole vectors.
template <typename scalar>
inline void widen(const scalar* from, int64_t size, double* to, int64_t padded_size) {
  constexpr int64_t lanes = Vectors<double>::lanes;
  int64_t k = 0;
  for (; k + lanes <= size; k += lanes) store(to + k, load_double(from + k));
  for (int64_t zero = k; zero < padded_size; zero += lanes) store(to + zero, Vectors<double>::full{});
  for (; k < size; ++k) to[k] = from[k];
}

// The other way.
template <typename scalar>
inline void narrow(const double* from, int64_t size, scalar* to) {
  constexpr int64_t lanes = Vectors<double>::lanes;
  int64_t k = 0;
  for (; k + lanes <= size; k += lanes) store_double(to + k, load_double(from + k));
  for (; k < size; ++k) to[k] = scalar(from[k]);
}

}  // namespace HELO_FAST_SET
}  // namespace
