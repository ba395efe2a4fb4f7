// Spreads the independent problems of a batch over torch's threads, each with scratch memory of its own.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>

struct Release {
  void operator()(unsigned char* p) const { ::operator delete(p, std::align_val_t(64)); }
};
using Scratch = std::unique_ptr<unsigned char, Release>;

inline Scratch take_scratch(int64_t bytes) {
  return Scratch(static_cast<unsigned char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t(64))));
}

// Scratch memory up to this size stands on the stack: a small problem takes no longer than an allocation. Not so for the address
// sanitizer, which sees the end of an allocation but not where the part in use ends.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kBytesOnStack = 64;
#else
constexpr int64_t kBytesOnStack = 16384;
#endif

// solve(begin, end, scratch) for all of [0, batch); scratch is 64-byte aligned. work estimates the multiply-adds of one problem.
// Threads take problems in small batches, so that hard ones do not pile up on one of them.
template <typename Solve>
void for_each_problem(int64_t batch, int64_t work, int64_t scratch_bytes, const Solve& solve) {
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), batch);
  const int64_t at_once = 2000000 / std::max<int64_t>(work, 1);
  const int64_t share = std::max<int64_t>(1, std::min<int64_t>(batch / (8 * std::max<int64_t>(threads, 1)), at_once));
  std::atomic<int64_t> next{0};
  const auto worker = [&](int64_t, int64_t) {
    alignas(64) unsigned char small[kBytesOnStack];
    const Scratch large = scratch_bytes > kBytesOnStack ? take_scratch(scratch_bytes) : nullptr;
    unsigned char* scratch = large ? large.get() : small;
    for (int64_t begin; (begin = next.fetch_add(share)) < batch;) solve(begin, std::min(begin + share, batch), scratch);
  };
  if (threads <= 1 || batch * work < 20000)  // not worth waking a thread
    worker(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, worker);
}

// The slices of one problem, on torch's threads.
inline void for_each_in_parallel(int64_t count, void (*body)(void* context, int64_t i), void* context) {
  torch::stable::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, i);
  });
}
