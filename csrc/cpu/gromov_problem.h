// What the torch side of gromov hands to the kernels of whichever instruction set runs.
#pragma once

#include <cstdint>

template <typename scalar>
struct GromovSpaces {             // B pairs, given by costs or by the tokens to take them from (the other pair of pointers is null)
  const scalar *cost_x, *cost_y;  // [B, n, n], [B, m, m]
  const scalar *x, *y;            // [B, n, width], [B, m, width]
  const scalar* cost_xy;          // [B, n, m]; null with tokens and alpha < 1: their cosine cost
  const scalar *a, *b;            // [B, n], [B, m]
  const scalar* extremes;         // [4]: (min, max) of the cosine costs of x, then of y, over the batch; null: each problem's own
  int64_t n, m, width;            // width 0: costs
  double alpha, threshold;
};

template <typename scalar>
struct GromovArguments {
  GromovSpaces<scalar> spaces;
  scalar *plan, *gw_cost, *marginal_error;  // [B, n, m], [B], [B]
  int32_t* n_iter;                          // [B]
  bool* converged;                          // [B]
  int64_t outer_iter, inner_iter;
  double epsilon, tol, bound;  // tol < 0: never stop early; bound: the change and the marginal error that count as converged
  bool entropic;
};

template <typename scalar>
struct GromovGradients {
  GromovSpaces<scalar> spaces;
  const scalar *plan, *grad_cost;     // [B, n, m], [B]
  scalar *d_x, *d_y, *d_xy;           // as cost_x and cost_y, or as x and y; [B, n, m] or null
  const double* threshold_gradients;  // [4]: what each pair at an extreme receives, ordered as extremes; null: found in each problem
  bool fused;
};

template <typename scalar>
struct GromovKernel {  // each for problems [begin, end)
  void (*solve)(const GromovArguments<scalar>&, int64_t begin, int64_t end, unsigned char* scratch);
  int64_t (*solve_bytes)(const GromovArguments<scalar>&);
  void (*extremes)(const GromovSpaces<scalar>&, scalar* extremes, int64_t begin, int64_t end, unsigned char* scratch);  // [B, 4]
  int64_t (*extremes_bytes)(const GromovSpaces<scalar>&);
  void (*differentiate)(const GromovGradients<scalar>&, int64_t begin, int64_t end, unsigned char* scratch);
  // [B, 6], of x, then y: minus the sum of the costs' gradient, the number of pairs at the lower and at the upper extreme.
  void (*add_up)(const GromovGradients<scalar>&, double* sums, int64_t begin, int64_t end, unsigned char* scratch);
  int64_t (*differentiate_bytes)(const GromovGradients<scalar>&);
};
