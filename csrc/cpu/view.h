// A tensor of up to four dimensions as the kernels see it.
#pragma once

#include <cstdint>

enum class Storage { float64, float32, float16, bfloat16 };

// A [B, H, rows, columns] tensor. Strides count elements; they are 0 along what is broadcast.
struct View {
  unsigned char* data;  // null where there is none
  Storage storage;
  int64_t batch, head, row, column;
};
