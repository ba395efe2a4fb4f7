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

  // In double, so that uniform masses have the same sum on both sides: what they differ by moves the potentials at every iteration.
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

}  // namespace helo_fast
