// The sinkhorn kernel for x86-64 processors with avx2, fma.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "sinkhorn_problem.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define HELO_FAST_SET avx2
#define HELO_FAST_VECTOR_BYTES 32
#include "sinkhorn_solver.h"

const SinkhornKernels& sinkhorn_avx2() { return avx2::kernels; }

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const SinkhornKernels& sinkhorn_avx2() { return sinkhorn_baseline(); }
#endif
