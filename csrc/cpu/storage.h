// Tensors of any strides and floating dtype to padded matrices of the compute dtype and back, for one instruction set (see
// each_set.h); on simd.h and attention_problem.h. Halves are converted by integer arithmetic, which vectorises everywhere.

namespace {
namespace HELO_FAST_SET {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

inline float widen(Bfloat x) { return bits<float>(uint32_t(x.bits) << 16); }

inline float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t exponent = magnitude & 0x0f800000;
  // Subnormal: the mantissa placed below 2^-14, less 2^-14. Otherwise the exponent's bias moves from 15 to 127, inf's and NaN's to 255.
  const uint32_t small = bits<uint32_t>(bits<float>(magnitude + 0x38800000) - bits<float>(uint32_t(0x38800000)));
  const uint32_t large = magnitude + (exponent == 0x0f800000 ? 0x70000000 : 0x38000000);
  return bits<float>(sign | (exponent == 0 ? small : large));
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

// Rounded to nearest, ties to even.
inline Bfloat narrow(float x, Bfloat) {
  const uint32_t b = bits<uint32_t>(x);
  return {uint16_t((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (b + 0x7fff + ((b >> 16) & 1)) >> 16)};
}

inline Half narrow(float x, Half) {
  const uint32_t b = bits<uint32_t>(x), magnitude = b & 0x7fffffff;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t small = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000;  // the sum rounds to multiples of 2^-24
  const uint32_t rounded = magnitude > 0x7f800000 ? 0x7e00 : magnitude >= 0x477ff000 ? 0x7c00 : magnitude < 0x38800000 ? small : normal;
  return {uint16_t((b >> 16 & 0x8000) | rounded)};
}

inline float narrow(float x, float) { return x; }
inline double narrow(double x, double) { return x; }

// use(pointer of the stored type) for data of a storage whose compute dtype is scalar
template <typename Use>
inline void typed(float, Storage storage, unsigned char* data, const Use& use) {
  switch (storage) {
    case Storage::float16: return use(reinterpret_cast<Half*>(data));
    case Storage::bfloat16: return use(reinterpret_cast<Bfloat*>(data));
    default: return use(reinterpret_cast<float*>(data));
  }
}

template <typename Use>
inline void typed(double, Storage, unsigned char* data, const Use& use) {
  use(reinterpret_cast<double*>(data));
}

inline int64_t stored_bytes(Storage storage) { return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2; }

inline int64_t offset(const View& x, int64_t b, int64_t h, int64_t row) { return b * x.batch + h * x.head + row * x.row; }

template <typename scalar>
struct Matrix {
  const scalar* data;
  int64_t stride;
};

template <typename scalar>
struct Place {  // a matrix to write to
  scalar* data;
  int64_t stride;
};

// Rows [row, row + rows) of head (b, h) with zeros up to padded columns: where they lie if they can be used there, else a copy in buffer.
template <typename scalar>
Matrix<scalar> take(const View& x, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t columns, int64_t padded, scalar* buffer) {
  Matrix<scalar> result{buffer, padded};
  typed(scalar(), x.storage, x.data, [&](auto* data) {
    const auto* from = data + offset(x, b, h, row);
    using stored = decltype(narrow(scalar(), *data));
    if (sizeof(stored) == sizeof(scalar) && x.column == 1 && columns == padded) {
      result = {reinterpret_cast<const scalar*>(from), x.row};
      return;
    }
    for (int64_t i = 0; i < rows; ++i, from += x.row) {
      scalar* to = buffer + i * padded;
      if (x.column == 1)
        for (int64_t j = 0; j < columns; ++j) to[j] = widen(from[j]);
      else
        for (int64_t j = 0; j < columns; ++j) to[j] = widen(from[j * x.column]);
      for (int64_t j = columns; j < padded; ++j) to[j] = 0;
    }
  });
  return result;
}

// The reverse; x's columns are adjacent. With add, onto what is there.
template <typename scalar>
void put(const scalar* from, int64_t stride, const View& x, int64_t b, int64_t h, int64_t row, int64_t rows, int64_t columns,
         bool add) {
  typed(scalar(), x.storage, x.data, [&](auto* data) {
    auto* to = data + offset(x, b, h, row);
    using stored = decltype(narrow(scalar(), *data));
    for (int64_t i = 0; i < rows; ++i, to += x.row, from += stride) {
      if (add)
        for (int64_t j = 0; j < columns; ++j) to[j] = narrow(widen(to[j]) + from[j], stored{});
      else
        for (int64_t j = 0; j < columns; ++j) to[j] = narrow(from[j], stored{});
    }
  });
}

}  // namespace HELO_FAST_SET
}  // namespace
