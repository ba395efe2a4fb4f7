// Includes HELO_FAST_KERNEL, a header on simd.h, once per instruction set: what it defines stands in namespaces baseline, avx2 and
// avx512, and pick() in capability.h chooses among them at run time. On other processors the three are the same code.
//
// Every other header has to be included before this one, so that no shared inline function of the standard library is ever
// compiled for a processor that may not be there.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors are passed between inlined functions alone
#endif

#define HELO_FAST_SET baseline
#define HELO_FAST_VECTOR_BYTES 16
#include HELO_FAST_KERNEL
#undef HELO_FAST_SET
#undef HELO_FAST_VECTOR_BYTES

#if defined(__clang__) && defined(__x86_64__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#elif defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define HELO_FAST_SET avx2
#define HELO_FAST_VECTOR_BYTES 32
#include HELO_FAST_KERNEL
#undef HELO_FAST_SET
#undef HELO_FAST_VECTOR_BYTES
#if defined(__clang__) && defined(__x86_64__)
#pragma clang attribute pop
#elif defined(__x86_64__)
#pragma GCC pop_options
#endif

#if defined(__clang__) && defined(__x86_64__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#elif defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif
#define HELO_FAST_SET avx512
#define HELO_FAST_VECTOR_BYTES 64
#include HELO_FAST_KERNEL
#undef HELO_FAST_SET
#undef HELO_FAST_VECTOR_BYTES
#if defined(__clang__) && defined(__x86_64__)
#pragma clang attribute pop
#elif defined(__x86_64__)
#pragma GCC pop_options
#endif

#undef HELO_FAST_KERNEL
