// What the torch side of residual_norm hands to the kernel of whichever instruction set runs.
#pragma once

#include <cstdint>

#include "view.h"

// Every tensor is [rows, width] with adjacent columns, but weight and bias, [1, width]; mean and rstd are [rows], in the compute dtype.
struct ResidualNormArguments {
  int64_t rows, width;
  View x, y, weight, bias, out, grad_out, dx, dy;  // dy is null where it equals dx
  unsigned char *mean, *rstd;
  unsigned char* parts;  // [slices, 2, padded width] sums for dweight and dbias, in the compute dtype
  View dweight, dbias;
  int64_t slices;        // of the rows, by their number alone: the bits do not depend on the threads
  double eps, rescale;   // rescale: of the entries that dropout keeps
  bool masked;
  uint64_t seed;
  int64_t first_row;   // Philox's, of the first row
  uint32_t cut_below;  // T(dropout_p)
};

struct ResidualNormKernel {
  void (*fwd)(const ResidualNormArguments&, int64_t begin, int64_t end, unsigned char* scratch);  // rows
  void (*bwd)(const ResidualNormArguments&, int64_t begin, int64_t end, unsigned char* scratch);  // slices
  void (*sum)(const ResidualNormArguments&, unsigned char* scratch);                              // of the parts
  int64_t (*scratch_bytes)(int64_t width);
  int64_t (*padded)(int64_t width);
};

// Of float32 and halves, for transformer_layer too.
const ResidualNormKernel& float_residual_norm();
