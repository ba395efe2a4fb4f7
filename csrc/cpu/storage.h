// Tensors of any strides and floating dtype to padded matrices of the compute dtype and back, for one instruction set (see
// each_set.h); on attention_problem.h and common/half.h.

namespace {
namespace HELO_FAST_SET {

using helo_fast::Bfloat;
using helo_fast::Half;
using helo_fast::narrow;
using helo_fast::widen;

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
