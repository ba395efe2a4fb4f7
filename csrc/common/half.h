// The half-precision formats, and the way to float and back, rounded to nearest with ties to even; float and double stay as they are.
// On the CPU integer arithmetic, which vectorises everywhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "hd.h"

namespace helo_fast {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

template <typename To, typename From>
HELO_FAST_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

HELO_FAST_HD float widen(float x) { return x; }
HELO_FAST_HD double widen(double x) { return x; }
HELO_FAST_HD float widen(Bfloat x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

HELO_FAST_HD float widen(Half x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t exponent = magnitude & 0x0f800000;
  // Subnormal: the mantissa placed below 2^-14, less 2^-14. Otherwise the exponent's bias moves from 15 to 127, inf's and NaN's to 255.
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude + 0x38800000) - bit_cast<float>(uint32_t(0x38800000)));
  const uint32_t large = magnitude + (exponent == 0x0f800000 ? 0x70000000 : 0x38000000);
  return bit_cast<float>(sign | (exponent == 0 ? small : large));
#endif
}

// The second argument says to which format.
HELO_FAST_HD float narrow(float x, float) { return x; }
HELO_FAST_HD double narrow(double x, double) { return x; }

HELO_FAST_HD Bfloat narrow(float x, Bfloat) {
#ifdef __CUDA_ARCH__
  Bfloat result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t b = bit_cast<uint32_t>(x);
  return {uint16_t((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (b + 0x7fff + ((b >> 16) & 1)) >> 16)};
#endif
}

HELO_FAST_HD Half narrow(float x, Half) {
#ifdef __CUDA_ARCH__
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
#else
  const uint32_t b = bit_cast<uint32_t>(x), magnitude = b & 0x7fffffff;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;  // the sum rounds to multiples of 2^-24
  const uint32_t rounded = magnitude > 0x7f800000 ? 0x7e00 : magnitude >= 0x477ff000 ? 0x7c00 : magnitude < 0x38800000 ? small : normal;
  return {uint16_t((b >> 16 & 0x8000) | rounded)};
#endif
}

}  // namespace helo_fast
