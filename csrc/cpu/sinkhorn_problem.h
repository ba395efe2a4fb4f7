// What the torch side of sinkhorn hands to the kernel of whichever instruction set runs.
#pragma once

#include <cstdint>

template <typename scalar>
struct SinkhornArguments {
  const scalar *cost, *a, *b;                           // [B, n, m], [B, n], [B, m]; a or b null: uniform
  scalar *plan, *f, *g;                                 // [B, n, m], [B, n], [B, m]
  scalar *transport_cost, *marginal_error, *history;    // [B], [B], [B, kept, n + m]
  int32_t* n_iter;                                      // [B]
  int64_t n, m, kept, max_iter, check_every;
  double epsilon, tol;      // tol < 0: never stop early
  double kappa_a, kappa_b;  // tau / (tau + epsilon); 1 for a hard marginal
  double slope_b;           // epsilon / tau_b; 0 for a hard marginal
};

// Runs body(context, i) for all i in [0, count), in any order, on any thread.
using ForEach = void (*)(int64_t count, void (*body)(void* context, int64_t i), void* context);

template <typename scalar>
struct SinkhornKernel {
  // Problems [begin, end). for_each spreads the slices of one problem; the result does not depend on it.
  void (*solve)(const SinkhornArguments<scalar>&, int64_t begin, int64_t end, unsigned char* scratch, ForEach for_each);
  int64_t (*scratch_bytes)(int64_t n, int64_t m);
};
