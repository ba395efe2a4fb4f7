// Teams of threads for the code in csrc/common: one warp, or one block. The block is the team: blockDim.x is kLanes.
#pragma once

#include <cuda_pipeline_primitives.h>

#include <cstdint>
#include <type_traits>

namespace helo_fast {

template <int bytes>
struct Piece;
template <>
struct Piece<4> {
  using type = uint32_t;
};
template <>
struct Piece<8> {
  using type = uint2;
};
template <>
struct Piece<16> {
  using type = uint4;
};

struct Copies {
  template <int bytes>
  __device__ __forceinline__ void copy_in(void* to, const void* from) const {
    __pipeline_memcpy_async(to, from, bytes);
  }
  template <int bytes>
  __device__ __forceinline__ void copy_out(void* to, const void* from) const {
    using type = typename Piece<bytes>::type;
    *static_cast<type*>(to) = *static_cast<const type*>(from);
  }
};

struct Warp : Copies {
  static constexpr int kLanes = 32;
  struct Shared {};

  __device__ __forceinline__ explicit Warp(Shared&) {}
  __device__ __forceinline__ int lane() const { return threadIdx.x; }
  __device__ __forceinline__ void sync() const { __syncwarp(); }
  __device__ __forceinline__ bool any(bool condition) const { return __any_sync(0xffffffff, condition); }
  template <typename T>
  __device__ __forceinline__ T exchange(T value, int mask) const {
    return __shfl_xor_sync(0xffffffff, value, mask);
  }
  __device__ __forceinline__ void await_copies() const {
    __pipeline_commit();
    __pipeline_wait_prior(0);
    sync();
  }
};

// Exchanges between warps go through two buffers in turn: when one is written again, a barrier has passed since it was read.
template <int lanes>
struct Block : Copies {
  static constexpr int kLanes = lanes;
  struct Shared {
    double buffer[2][lanes];
  };

  __device__ __forceinline__ explicit Block(Shared& shared) : shared_(shared) {}
  __device__ __forceinline__ int lane() const { return threadIdx.x; }
  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ bool any(bool condition) const { return __syncthreads_or(condition); }
  template <typename T>
  __device__ __forceinline__ T exchange(T value, int mask) {
    if (mask < 32) return __shfl_xor_sync(0xffffffff, value, mask);
    T* buffer = reinterpret_cast<T*>(shared_.buffer[turn_]);
    turn_ ^= 1;
    buffer[threadIdx.x] = value;
    __syncthreads();
    return buffer[threadIdx.x ^ mask];
  }
  __device__ __forceinline__ void await_copies() const {
    __pipeline_commit();
    __pipeline_wait_prior(0);
    sync();
  }

 private:
  Shared& shared_;
  int turn_ = 0;
};

template <int lanes>
using TeamOf = std::conditional_t<lanes == 32, Warp, Block<lanes>>;

}  // namespace helo_fast
