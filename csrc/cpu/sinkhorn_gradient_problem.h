// What the torch side of sinkhorn's gradients hands to the kernels of whichever instruction set runs.
#pragma once

#include <cstdint>

// A [B, n, m] tensor of any strides, read a row at a time; data is null where an incoming gradient is absent.
template <typename scalar>
struct Strided {
  const scalar* data;
  int64_t batch, row, column;
};

template <typename scalar>
struct SinkhornGradientArguments {
  const scalar *a, *b, *plan;                         // [B, n], [B, m], [B, n, m]
  Strided<scalar> cost, grad_plan;                    // [B, n, m]
  const scalar *grad_f, *grad_g, *grad_transport;     // [B, n], [B, m], [B], or null
  const scalar* history;                              // [B, kept, n + m] scaled potentials; unrolled only
  const int32_t* n_iter;                              // [B]; unrolled only
  scalar *d_cost, *d_a, *d_b;                         // [B, n, m], [B, n], [B, m]
  int64_t n, m, kept;
  double epsilon, lambda_a, lambda_b;  // lambda = epsilon / tau; 0 for a hard marginal
};

template <typename scalar>
struct SinkhornGradientKernel {
  void (*differentiate)(const SinkhornGradientArguments<scalar>&, int64_t begin, int64_t end, unsigned char* scratch);
  int64_t (*scratch_bytes)(int64_t n, int64_t m);
};
