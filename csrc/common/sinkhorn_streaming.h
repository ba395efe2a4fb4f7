// Sinkhorn forward of any size: the log-domain iteration, a team of whole warps per problem.
//
//   gamma_j = -kappa_b logsumexp_i(log a_i + phi_i - cost_ij / epsilon), then phi_i likewise over j; from phi = 0.
//
// A column update gives each lane whole columns (loads of a row of cost are coalesced); a row update gives each warp whole rows. The
// potentials stand in `scratch`, in double and with the logs of the masses: alpha = log a + phi, beta = log b + gamma, -inf where there
// is no mass. Traffic: two reads of cost an iteration (from cache while it fits), one write of each output.
// Rows and columns of zero mass are skipped: their cost is never used, their plan is 0 and their potential -inf.
#pragma once

#include <cmath>
#include <cstdint>

#include "sinkhorn_batch.h"
#include "split.h"

namespace helo_fast {

// A running logsumexp: total * exp(top). Each term is 1 and what it differs by: the rounding of exponentials near 1, the same at every
// iteration once they have converged, would move the potentials by a constant that grows.
template <typename scalar>
struct LogSum {
  double top = -HUGE_VAL, total = 0;

  HELO_FAST_HD void add(double term) {
    if (term == -HUGE_VAL) return;  // no mass, or an infinite cost
    if (term <= top) {
      total += relative(term - top);
    } else {
      total = total * relative(top - term) + 1;
      top = term;
    }
  }

  HELO_FAST_HD static double relative(double exponent) { return 1 + double(std::expm1(scalar(exponent))); }

  HELO_FAST_HD void merge(double other_top, double other_total) {
    const double high = Larger()(top, other_top);
    if (high == -HUGE_VAL) return;
    total = total * std::exp(top - high) + other_total * std::exp(other_top - high);
    top = high;
  }

  HELO_FAST_HD double value() const { return top + std::log(total); }
};

template <typename scalar, typename Team>
class SinkhornStreaming {
 public:
  HELO_FAST_HD SinkhornStreaming(const SinkhornBatch<scalar>& x, double* scratch, Team& team)  // scratch [B, n + m]
      : x_(x), scratch_(scratch), team_(team), per_epsilon_(1 / x.epsilon) {}

  HELO_FAST_HD void solve_share(int64_t block, int64_t blocks) {
    for (int64_t problem = block; problem < x_.batch; problem += blocks) solve(problem);
  }

 private:
  static constexpr int kWarp = 32, kLanes = Team::kLanes;

  HELO_FAST_HD void solve(int64_t problem) {
    if (!start(problem)) return x_.write_nothing(problem, team_);
    int64_t iteration = 0;
    while (true) {
      update_columns();
      update_rows();
      ++iteration;
      if (x_.kept) record(iteration);
      if (iteration >= x_.max_iter) break;
      if (x_.tol >= 0 && iteration % x_.check_every == 0 && column_error() <= x_.tol) break;
    }
    write(iteration);
  }

  // phi = 0; false where a side has no mass.
  HELO_FAST_HD bool start(int64_t problem) {
    problem_ = problem;
    cost_ = x_.cost + problem * x_.n * x_.m;
    alpha_ = scratch_ + problem * (x_.n + x_.m), beta_ = alpha_ + x_.n;
    bool rows = false, columns = false;
    for (int64_t i = team_.lane(); i < x_.n; i += kLanes) {
      const double mass = x_.mass_a(problem, i);
      rows |= mass > 0;
      alpha_[i] = with_mass(mass, 0);
    }
    for (int64_t j = team_.lane(); j < x_.m; j += kLanes) columns |= x_.mass_b(problem, j) > 0;
    rows = team_.any(rows), columns = team_.any(columns);
    team_.sync();
    return rows && columns;
  }

  HELO_FAST_HD static double with_mass(double mass, double potential) {
    return mass > 0 ? std::log(mass) + potential : -HUGE_VAL;
  }
  HELO_FAST_HD static double without_mass(double mass, double potential) {
    return mass > 0 ? potential - std::log(mass) : -HUGE_VAL;
  }

  HELO_FAST_HD double exponent(double potential, int64_t i, int64_t j) const {
    return potential - double(cost_[i * x_.m + j]) * per_epsilon_;
  }

  HELO_FAST_HD void update_columns() {
    for (int64_t j = team_.lane(); j < x_.m; j += kLanes) {
      const double mass = x_.mass_b(problem_, j);
      LogSum<scalar> sum;
      if (mass > 0)
        for (int64_t i = 0; i < x_.n; ++i)
          if (alpha_[i] > -HUGE_VAL) sum.add(exponent(alpha_[i], i, j));
      beta_[j] = with_mass(mass, -x_.kappa_b * sum.value());
    }
    team_.sync();
  }

  HELO_FAST_HD void update_rows() {
    for (int64_t first = 0; first < x_.n; first += kLanes / kWarp) {  // the same for all warps, so that all make the same exchanges
      const int64_t i = first + team_.lane() / kWarp;
      LogSum<scalar> sum;
      if (i < x_.n)
        for (int64_t j = team_.lane() % kWarp; j < x_.m; j += kWarp)
          if (beta_[j] > -HUGE_VAL) sum.add(exponent(beta_[j], i, j));
      for (int mask = 1; mask < kWarp; mask *= 2) {
        const double top = team_.exchange(sum.top, mask);
        sum.merge(top, team_.exchange(sum.total, mask));
      }
      if (i < x_.n && team_.lane() % kWarp == 0) alpha_[i] = with_mass(x_.mass_a(problem_, i), -x_.kappa_a * sum.value());
    }
    team_.sync();
  }

  HELO_FAST_HD scalar plan_entry(int64_t i, int64_t j) const {
    const double potentials = alpha_[i] + beta_[j];
    return potentials > -HUGE_VAL ? std::exp(scalar(exponent(potentials, i, j))) : scalar(0);
  }

  // L1 error of the column marginal for the current potentials, known to every lane.
  HELO_FAST_HD double column_error() {
    double error = 0;
    for (int64_t j = team_.lane(); j < x_.m; j += kLanes) {
      const double mass = x_.mass_b(problem_, j);
      if (!(mass > 0)) continue;
      double sum = 0;
      for (int64_t i = 0; i < x_.n; ++i) sum += double(plan_entry(i, j));
      error += std::fabs(sum - (x_.slope_b == 0 ? mass : mass * std::exp(-x_.slope_b * without_mass(mass, beta_[j]))));
    }
    return reduce_all(team_, error, Plus());
  }

  HELO_FAST_HD void record(int64_t iteration) {
    scalar* history = x_.history + (problem_ * x_.kept + iteration - 1) * (x_.n + x_.m);
    write_potentials(history, history + x_.n, 1);
  }

  HELO_FAST_HD void write_potentials(scalar* f, scalar* g, double unit) const {
    for (int64_t i = team_.lane(); i < x_.n; i += kLanes) f[i] = scalar(unit * without_mass(x_.mass_a(problem_, i), alpha_[i]));
    for (int64_t j = team_.lane(); j < x_.m; j += kLanes) g[j] = scalar(unit * without_mass(x_.mass_b(problem_, j), beta_[j]));
  }

  HELO_FAST_HD void write(int64_t iterations) {
    const double error = column_error();
    double spent = 0;
    scalar* plan = x_.plan + problem_ * x_.n * x_.m;
    for (int64_t i = 0; i < x_.n; ++i)
      for (int64_t j = team_.lane(); j < x_.m; j += kLanes) {
        const scalar mass = plan_entry(i, j);
        if (mass > 0) spent += double(mass) * double(cost_[i * x_.m + j]);
        plan[i * x_.m + j] = mass;
      }
    spent = reduce_all(team_, spent, Plus());
    write_potentials(x_.f + problem_ * x_.n, x_.g + problem_ * x_.m, x_.epsilon);
    if (team_.lane() == 0) x_.write_numbers(problem_, spent, error, iterations);
  }

  const SinkhornBatch<scalar>& x_;
  double* scratch_;
  Team& team_;
  const double per_epsilon_;
  int64_t problem_ = 0;
  const scalar* cost_ = nullptr;
  double *alpha_ = nullptr, *beta_ = nullptr;  // [n], [m]
};

}  // namespace helo_fast
