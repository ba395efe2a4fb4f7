// Scratch memory handed out piece by piece, each aligned for any vector.
#pragma once

#include <cstdint>

struct Arena {
  unsigned char* memory;  // null: only measures
  int64_t used = 0;

  template <typename T>
  T* take(int64_t count) {
    unsigned char* piece = memory ? memory + used : nullptr;
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
};
