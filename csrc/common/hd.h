// For headers that nvcc compiles for the GPU, and any C++17 compiler for the host.
//
// Such code is written for one lane of a team, and touches the rest of the team through an object with
//   lane()                      this lane, 0 to kLanes - 1
//   exchange(value, mask)       the value that lane() ^ mask gave
//   any(condition)              whether it holds on a lane
//   sync()                      until every lane has come here; what they wrote to shared memory is then seen by all
//   copy_in<bytes>(to, from)    4, 8 or 16 aligned bytes from global to shared memory, there after await_copies()
//   copy_out<bytes>(to, from)   the other way, at once
// All lanes make the same calls in the same order. cuda/team.h has teams of threads; tests/cuda_host/team.h lets lanes take turns on
// a CPU, and stops where their calls differ.
#pragma once

#include <utility>

#ifdef __CUDACC__
#define HELO_FAST_HD __host__ __device__ __forceinline__
#define HELO_FAST_UNROLL _Pragma("unroll")
#define HELO_FAST_ROLLED _Pragma("unroll 1")
#else
#define HELO_FAST_HD inline
#define HELO_FAST_UNROLL
#define HELO_FAST_ROLLED
#endif

namespace helo_fast {

template <int number>
struct Constant {
  static constexpr int value = number;
  HELO_FAST_HD constexpr operator int() const { return number; }
};

// body(0), body(1), ... body(count - 1), each number a constant.
template <typename Body, int... numbers>
HELO_FAST_HD void unroll(const Body& body, std::integer_sequence<int, numbers...>) {
  (body(Constant<numbers>()), ...);
}
template <int count, typename Body>
HELO_FAST_HD void unroll(const Body& body) {
  unroll(body, std::make_integer_sequence<int, count>());
}

// The same number, about which the compiler knows nothing: what is computed from it is not moved out of a loop, to wait in registers.
HELO_FAST_HD int opaque(int value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(value));
#endif
  return value;
}
HELO_FAST_HD float opaque(float value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+f"(value));
#endif
  return value;
}
HELO_FAST_HD double opaque(double value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+d"(value));
#endif
  return value;
}

// value; known only after the result, which is not negative: what is made of it waits for that, rather than be computed or loaded
// early and held in registers.
template <typename T, typename Value>
HELO_FAST_HD Value after(T result, Value value) {
  return result < 0 ? value + 1 : value;
}

}  // namespace helo_fast
