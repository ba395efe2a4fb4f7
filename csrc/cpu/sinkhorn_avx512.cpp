// The sinkhorn kernel for x86-64 processors with avx512f, avx512dq, avx512vl, avx512bw, avx2, fma.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "sinkhorn_problem.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif

#define HELO_FAST_SET avx512
#define HELO_FAST_VECTOR_BYTES 64
#include "sinkhorn_solver.h"

const SinkhornKernels& sinkhorn_avx512() { return avx512::kernels; }

#if defined(__clang__)
#pragma clang attribute pop
#endif
#else
const SinkhornKernels& sinkhorn_avx512() { return sinkhorn_baseline(); }
#endif
