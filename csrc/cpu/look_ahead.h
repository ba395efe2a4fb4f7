// The next head's rows, asked for while this one's are worked on, for one instruction set (see each_set.h); on storage.h.
//
// Rows of [B, n, H, d] memory lie H d apart: the processor does not foresee them.

namespace {
namespace HELO_FAST_SET {

class LookAhead {
 public:
  void clear() { count_ = 0; }

  // Rows of head (b, h).
  void add(const View& x, int64_t b, int64_t h, int64_t rows, int64_t columns) {
    const int64_t size = stored_bytes(x.storage);
    if (x.column == 1) of_[count_++] = {x.data + offset(x, b, h, 0) * size, x.row * size, rows, columns * size};
  }

  // Share i of `shares`. Into the second cache, as few misses of the first can be under way. Inline, as GCC leaves out calls of a
  // function that does nothing else.
  HELO_FAST_INLINE void fetch(int64_t i, int64_t shares) const {
    for (const Rows *x = of_, *end = of_ + count_; x < end; ++x)
      for (int64_t row = i; row < x->count; row += shares)
        for (int64_t byte = 0; byte < x->bytes; byte += 64) __builtin_prefetch(x->data + row * x->stride + byte, 0, 2);
  }

 private:
  struct Rows {
    const unsigned char* data;
    int64_t stride, count, bytes;
  };
  Rows of_[8];  // as many operands as the backward pass has
  int64_t count_ = 0;
};

}  // namespace HELO_FAST_SET
}  // namespace
