// Philox 4x32-10 in the layout of helo_fast/ops/attention/philox.py, for one instruction set (see each_set.h); on simd.h and, for the
// constants, common/philox.h.
//
// Lanes are calls: each holds one counter, its words in the low halves of 64-bit lanes, so that a product is one multiplication.

namespace {
namespace HELO_FAST_SET {

using Lanes64 = Vectors<double>::unsigned_words;
typedef uint32_t Lanes32 __attribute__((vector_size(HELO_FAST_VECTOR_BYTES / 2)));
constexpr int64_t kPhiloxCalls = HELO_FAST_VECTOR_BYTES / 8;  // at once; arrays are read and written in whole vectors

// A vector's lanes as unsigned integers: of their own width, and as many of 32 bits.
template <int bytes>
struct Unsigned;
template <>
struct Unsigned<4> {
  using type = uint32_t;
  typedef uint32_t full __attribute__((vector_size(HELO_FAST_VECTOR_BYTES)));
  using narrow = full;
};
template <>
struct Unsigned<8> {
  using type = uint64_t;
  typedef uint64_t full __attribute__((vector_size(HELO_FAST_VECTOR_BYTES)));
  typedef uint32_t narrow __attribute__((vector_size(HELO_FAST_VECTOR_BYTES / 2)));
};

// words[4 c + w] = word w of call c, for calls [0, count) whose counter is (block0 + block[c], row0 + row[c], problem).
inline void philox(uint64_t seed, uint64_t problem, const uint32_t* block, int64_t block0, const uint32_t* row, int64_t row0,
                   int64_t count, uint32_t* words) {
  constexpr uint64_t low = 0xffffffff;
  for (int64_t c = 0; c < count; c += kPhiloxCalls) {
    Lanes64 c0 = __builtin_convertvector(load<Lanes32>(block + c) + uint32_t(block0), Lanes64);
    Lanes64 c1 = __builtin_convertvector(load<Lanes32>(row + c) + uint32_t(row0), Lanes64);
    Lanes64 c2 = Lanes64{} + (problem & low), c3 = Lanes64{} + (problem >> 32);
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < helo_fast::kPhiloxRounds; ++round) {
      const Lanes64 p0 = product_of_halves(c0, Lanes64{} + uint64_t(helo_fast::kPhiloxMultiplier0));
      const Lanes64 p1 = product_of_halves(c2, Lanes64{} + uint64_t(helo_fast::kPhiloxMultiplier1));
      c0 = (p1 >> 32) ^ c1 ^ uint64_t(key0);  // above the low half stands what nobody reads
      c2 = (p0 >> 32) ^ c3 ^ uint64_t(key1);
      c1 = p1;
      c3 = p0;
      key0 += helo_fast::kPhiloxWeyl0;
      key1 += helo_fast::kPhiloxWeyl1;
    }
    const Lanes64 first = (c0 & low) | (c1 << 32), last = (c2 & low) | (c3 << 32);
    uint32_t* to = words + 4 * c;
#if HELO_FAST_VECTOR_BYTES == 64
    store(to, Lanes64(__builtin_shufflevector(first, last, 0, 8, 1, 9, 2, 10, 3, 11)));
    store(to + 16, Lanes64(__builtin_shufflevector(first, last, 4, 12, 5, 13, 6, 14, 7, 15)));
#elif HELO_FAST_VECTOR_BYTES == 32
    store(to, Lanes64(__builtin_shufflevector(first, last, 0, 4, 1, 5)));
    store(to + 8, Lanes64(__builtin_shufflevector(first, last, 2, 6, 3, 7)));
#else
    store(to, Lanes64(__builtin_shufflevector(first, last, 0, 2)));
    store(to + 4, Lanes64(__builtin_shufflevector(first, last, 1, 3)));
#endif
  }
}

}  // namespace HELO_FAST_SET
}  // namespace
