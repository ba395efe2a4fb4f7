// A batch of Sinkhorn problems for the kernels of csrc/cuda: what the CPU's kernels take, and what those leave to their caller.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/sinkhorn_problem.h"
#include "split.h"

namespace helo_fast {

template <typename scalar>
struct SinkhornBatch : SinkhornArguments<scalar> {
  int64_t batch;
  bool* converged;      // [B]
  scalar converged_at;  // the largest marginal error that counts as converged
  double total = 1;     // mass where a solver needs that of uniform marginals to be exact: see total_mass()

  // In double: what the sums of both sides differ by moves the potentials at every iteration, and 1/n and 1/m, rounded, differ.
  HELO_FAST_HD double mass_a(int64_t problem, int64_t i) const {
    return this->a ? double(this->a[problem * this->n + i]) : 1.0 / double(this->n);
  }
  HELO_FAST_HD double mass_b(int64_t problem, int64_t j) const {
    return this->b ? double(this->b[problem * this->m + j]) : 1.0 / double(this->m);
  }

  HELO_FAST_HD void write_numbers(int64_t problem, double transport_cost, double error, int64_t iterations) const {
    this->transport_cost[problem] = scalar(transport_cost);
    this->marginal_error[problem] = scalar(error);
    this->n_iter[problem] = static_cast<int32_t>(iterations);
    converged[problem] = scalar(error) <= converged_at;
  }

  // Of a problem without mass on a side.
  template <typename Team>
  HELO_FAST_HD void write_nothing(int64_t problem, Team& team) const {
    const int64_t n = this->n, m = this->m;
    double error = 0;
    for (int64_t k = team.lane(); k < n * m; k += Team::kLanes) this->plan[problem * n * m + k] = 0;
    for (int64_t i = team.lane(); i < n; i += Team::kLanes) this->f[problem * n + i] = -HUGE_VAL;
    for (int64_t j = team.lane(); j < m; j += Team::kLanes) {
      this->g[problem * m + j] = -HUGE_VAL;
      error += mass_b(problem, j);
    }
    error = reduce_all(team, error, Plus());
    if (team.lane() == 0) write_numbers(problem, 0, error, this->max_iter);
  }
};

// n m over a power of 2, in [1, 2), where both marginals are uniform and hard: times 1/n and 1/m, it is exact in either dtype; else 1.
template <typename scalar>
double total_mass(const SinkhornBatch<scalar>& x) {
  const double pairs = double(x.n) * double(x.m);
  return !x.a && !x.b && x.kappa_a == 1 && x.kappa_b == 1 ? std::ldexp(pairs, -std::ilogb(pairs)) : 1;
}

}  // namespace helo_fast
