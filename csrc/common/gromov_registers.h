// The inner solver of gromov, IPOT or Sinkhorn on one linear cost, where a team of lanes holds the Gibbs kernel in registers, in the
// steps of cpu/gromov_plan.h, where the algorithm stands: K and the factor A by which a step of IPOT multiplies it are tiles of a grid
// (grid.h); a step that meets an unsafe scaling is done again by log-sum-exps of N = -cost / epsilon, which stays in shared memory.
//
// Rows and columns without mass, and the padding of a tile, have K = A = 0, mass 1, and 1 added to their sum, so that their scaling
// is 1; their entries of N are never touched.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "grid.h"
#include "row_products.h"

namespace helo_fast {

template <typename Grid>
struct GromovPlanShared {
  double alpha[Grid::kMaxRows];  // log x, and the mass
  double log_u[Grid::kMaxColumns], beta[Grid::kMaxColumns], psi[Grid::kMaxColumns], g[Grid::kMaxColumns];
};

template <typename scalar, typename Grid, typename Team>
class GromovPlan {
 public:
  using Shared = GromovPlanShared<Grid>;
  using Matrix = SharedMatrix<scalar>;
  static_assert(Team::kLanes == Grid::kLanes);

  HELO_FAST_HD GromovPlan(Shared& shared, Matrix N, Team& team) : shared_(shared), N_(N), team_(team) {
    take_place();
  }

  HELO_FAST_HD static double finite(double x) { return x < double(kLarge) ? x : double(kLarge); }

  // Before every problem: the masses of all rows and columns of the grid, 0 in the padding. Both sides have some.
  HELO_FAST_HD void start(const scalar* a, const scalar* b) {
    take_place();
    alive_rows_ = load_side<true>(a);
    alive_columns_ = load_side<false>(b);
    scalar largest = 0, minus_least = -HUGE_VAL;
    Columns::Split::for_owned([&](int k, auto) {
      if (columns_.empty[k] > 0) return;
      largest = Larger()(largest, columns_.mass[k]);
      minus_least = Larger()(minus_least, -columns_.mass[k]);
    });
    largest_b_ = reduce_all(team_, largest, Larger());
    uneven_b_ = -reduce_all(team_, minus_least, Larger()) < largest_b_ / kRange;
  }

  // N_ij = (weight gain_ij - cross_weight cross_ij) / epsilon less the maxima of its rows, then of its columns, which would cost it
  // digits: a term of i alone does not change the plan, one of j alone goes to the start. That is -columns / epsilon besides.
  // gain stands where N will, cross may be null.
  HELO_FAST_HD void set(scalar weight, Matrix cross, scalar cross_weight, const scalar* columns, scalar column_weight, double per_epsilon) {
    take_place();
    scalar row_tops[Rows::kTile], row_top[Rows::kOwned], column_tops[Columns::kTile], column_top[Columns::kOwned];
    for (scalar& top : row_tops) top = -kLarge;
    for (scalar& top : column_tops) top = -kLarge;
    for_tile([&](auto s, auto t, int i, int j, bool alive) {
      scalar v = alive ? weight * N_(i, j) : -kLarge;
      if (alive && cross.data) v -= cross_weight * cross(i, j);
      K_[s][t] = v;
      row_tops[s] = Larger()(row_tops[s], v);
    });
    Rows::Split::reduce(team_, row_tops, row_top, Larger());
    Rows::Split::gather(team_, row_top, row_tops);
    for_tile([&](auto s, auto t, int, int, bool alive) {
      K_[s][t] -= row_tops[s];
      if (alive) column_tops[t] = Larger()(column_tops[t], K_[s][t]);
    });
    Columns::Split::reduce(team_, column_tops, column_top, Larger());
    Columns::Split::for_owned([&](int k, auto slot) {
      if (!Columns::Split::counts(slot, columns_.peer)) return;
      const int j = columns_.at(slot);
      shared_.log_u[j] = columns_.empty[k] > 0 ? 0 : (double(column_top[k]) - double(column_weight) * double(columns[j])) * per_epsilon;
    });
    Columns::Split::gather(team_, column_top, column_tops);
    const scalar scale = scalar(per_epsilon);
    for_tile([&](auto s, auto t, int i, int j, bool alive) {
      if (alive) N_(i, j) = Larger()((K_[s][t] - column_tops[t]) * scale, -kLarge);
    });
    team_.sync();
  }

  // steps >= 1 of IPOT (powers) or of Sinkhorn.
  HELO_FAST_HD void solve(int steps, bool powers) {
    begin(powers);
    HELO_FAST_ROLLED
    for (int step = 1; step <= steps; ++step) {
      const bool safe = !(powers && step == 2 && uneven_b_) && sweep(powers && step > 1);
      if (!safe)
        exact(step, powers);
      else if (step == 1)
        keep_first(powers && steps > 1);
    }
  }

  // The plan, its rows and columns exchanged; returns how far (L1) it is from what stood there. Known to every lane.
  HELO_FAST_HD double write(Matrix plan) {
    take_place();
    Columns::Split::for_owned([&](int k, auto) { columns_.owned[k] = columns_.mass[k] / last_[k]; });
    Columns::Split::gather(team_, columns_.owned, columns_.scaling);
    scalar moved = 0;
    for_tile([&](auto s, auto t, int i, int j, bool alive) {
      if (!alive) return;
      const scalar T = rows_.scaling[s] * K_[s][t] * columns_.scaling[t];
      moved += std::fabs(T - plan(j, i));
      plan(j, i) = T;
    });
    return reduce_all(team_, double(moved), Plus());
  }

 private:
  static constexpr scalar kRange = sizeof(scalar) == 4 ? 1e10 : 1e80;
  static constexpr scalar kLarge = sizeof(scalar) == 4 ? 1e30 : 1e200;  // exp(-kLarge) is 0 in any company

  using Rows = RowsOf<scalar, Grid>;
  using Columns = ColumnsOf<scalar, Grid>;

  HELO_FAST_HD void take_place() { helo_fast::take_place<Grid>(team_.lane(), rows_, columns_); }

  template <bool of_rows>
  HELO_FAST_HD auto& side() {
    if constexpr (of_rows)
      return rows_;
    else
      return columns_;
  }

  // body(s, t, i, j, whether both have mass) over this lane's tile.
  template <typename Body>
  HELO_FAST_HD void for_tile(const Body& body) {
    unroll<Columns::kTile>([&](auto t) {
      const int j = columns_.at(t);
      const bool alive = alive_columns_ >> t & 1;
      unroll<Rows::kTile>([&](auto s) { body(s, t, rows_.at(s), j, alive && (alive_rows_ >> s & 1)); });
    });
  }

  // Returns which of the tile have mass, a bit each.
  template <bool of_rows>
  HELO_FAST_HD unsigned load_side(const scalar* masses) {
    auto& mine = side<of_rows>();
    using Mine = std::decay_t<decltype(mine)>;
    Mine::Split::for_owned([&](int k, auto slot) {
      const scalar mass = masses[mine.at(slot)];
      mine.mass[k] = mass > 0 ? mass : scalar(1);
      mine.empty[k] = mass > 0 ? 0 : 1;
    });
    unsigned alive = 0;
    unroll<Mine::kTile>([&](auto s) { alive |= unsigned(masses[mine.at(s)] > 0) << s; });
    return alive;
  }

  template <bool of_rows>
  HELO_FAST_HD void sum() {
    sum_products<of_rows>(team_, K_, side<of_rows>(), side<!of_rows>());
  }

  HELO_FAST_HD static bool is_safe(scalar x) { return x > 1 / kRange && x < kRange; }

  // K *= A if powers; z = a / (K u), then the next u from K' z. False, and u as it was, where a sum or a scaling is not safe (or NaN).
  HELO_FAST_HD bool sweep(bool powers) {
    if (powers) for_tile([&](auto s, auto t, int, int, bool) { K_[s][t] *= A_[s][t]; });
    bool safe = true;
    sum<true>();
    Rows::Split::for_owned([&](int k, auto) {
      safe &= is_safe(rows_.sums[k]);
      rows_.owned[k] = quotient(rows_.mass[k], rows_.sums[k]);
    });
    Rows::Split::gather(team_, rows_.owned, rows_.scaling);
    sum<false>();
    scalar next[Columns::kOwned];
    Columns::Split::for_owned([&](int k, auto) {
      const scalar y = quotient(scalar(1), columns_.sums[k]), u = powers ? y * y * last_[k] : y;
      safe &= is_safe(y) && is_safe(u);
      next[k] = columns_.mass[k] * u;
    });
    if (team_.any(!safe)) return false;
    Columns::Split::for_owned([&](int k, auto) {
      columns_.owned[k] = next[k];
      last_[k] = columns_.sums[k];
    });
    Columns::Split::gather(team_, columns_.owned, columns_.scaling);
    return true;
  }

  // K and u of the first step.
  HELO_FAST_HD void begin(bool powers) {
    take_place();
    double most = -HUGE_VAL;
    Columns::Split::for_owned([&](int k, auto slot) {
      if (columns_.empty[k] == 0) most = Larger()(most, shared_.log_u[columns_.at(slot)]);
      columns_.owned[k] = powers ? scalar(1) : columns_.mass[k];
      last_[k] = 1;
    });
    most = reduce_all(team_, most, Larger());
    Columns::Split::gather(team_, columns_.owned, columns_.scaling);
    for_tile([&](auto s, auto t, int i, int j, bool alive) {
      K_[s][t] = alive ? std::exp(N_(i, j) + scalar(shared_.log_u[j] - most)) : 0;
    });
    psi_of_first_ = true;
  }

  // After a safe first step: its sums; and A, K and u of IPOT's second.
  HELO_FAST_HD void keep_first(bool second) {
    for (int k = 0; k < Columns::kOwned; ++k) first_[k] = last_[k];
    if (!second) return;
    // exp(N + f + g) with g = psi: K itself, but for a factor of its row, which makes no difference.
    scalar inverse[Columns::kOwned], tops[Rows::kTile], top[Rows::kOwned];
    Columns::Split::for_owned([&](int k, auto) { inverse[k] = 1 / last_[k]; });
    Columns::Split::gather(team_, inverse, columns_.scaling);
    for (scalar& each : tops) each = 0;
    for_tile([&](auto s, auto t, int, int, bool) {
      K_[s][t] *= columns_.scaling[t];
      tops[s] = Larger()(tops[s], K_[s][t]);
    });
    Rows::Split::reduce(team_, tops, top, Larger());
    Rows::Split::for_owned([&](int k, auto) { top[k] = 1 / (top[k] + rows_.empty[k]); });
    Rows::Split::gather(team_, top, tops);
    for_tile([&](auto s, auto t, int, int, bool) {
      K_[s][t] *= tops[s];
      A_[s][t] = K_[s][t];
    });
    start_from_b();
  }

  // After the first step: y^2 / 1, where psi + g is 2 log(y / b): one b is left over, here of size 1 at most.
  HELO_FAST_HD void start_from_b() {
    Columns::Split::for_owned([&](int k, auto) {
      columns_.owned[k] = columns_.empty[k] > 0 ? scalar(1) : columns_.mass[k] * (columns_.mass[k] / largest_b_);
      last_[k] = 1;
    });
    Columns::Split::gather(team_, columns_.owned, columns_.scaling);
  }

  // K = exp(power N + the other side's potential), each over its largest along this side; of what this lane owns, the log of that, and
  // the sum.
  template <bool of_rows, int owned>
  HELO_FAST_HD void exponentials(double power, const double* potential, double (&top)[owned], scalar (&total)[owned]) {
    take_place();
    auto& mine = side<of_rows>();
    using Mine = std::decay_t<decltype(mine)>;
    double tops[Mine::kTile];
    scalar parts[Mine::kTile];
    for (double& each : tops) each = -HUGE_VAL;
    for (scalar& each : parts) each = 0;
    for_tile([&](auto s, auto t, int i, int j, bool alive) {
      if (alive) tops[of_rows ? s : t] = Larger()(tops[of_rows ? s : t], power * double(N_(i, j)) + potential[of_rows ? j : i]);
    });
    Mine::Split::reduce(team_, tops, top, Larger());
    Mine::Split::gather(team_, top, tops);
    for_tile([&](auto s, auto t, int i, int j, bool alive) {
      K_[s][t] = alive ? std::exp(scalar(power * double(N_(i, j)) + potential[of_rows ? j : i] - tops[of_rows ? s : t])) : 0;
      parts[of_rows ? s : t] += K_[s][t];
    });
    Mine::Split::reduce(team_, parts, total, Plus());
    Mine::Split::for_owned([&](int k, auto) { total[k] += mine.empty[k]; });
  }

  // Step `step` by log-sum-exps; sets psi, g, K and A from it.
  HELO_FAST_HD void exact(int step, bool powers) {
    take_place();
    const double power = powers ? step : 1;
    team_.sync();  // what this step overwrites has been read
    find_logarithms(step, powers);
    team_.sync();
    {
      double top[Rows::kOwned];
      scalar total[Rows::kOwned];
      exponentials<true>(power, shared_.log_u, top, total);
      Rows::Split::for_owned([&](int k, auto slot) {
        rows_.owned[k] = Larger()(rows_.mass[k], 1 / kLarge);
        if (rows_.holds(k, slot)) shared_.alpha[rows_.at(slot)] = std::log(double(rows_.mass[k])) - top[k] - std::log(double(total[k]));
      });
      Rows::Split::gather(team_, rows_.owned, rows_.scaling);
    }
    team_.sync();
    {
      double top[Columns::kOwned];
      scalar total[Columns::kOwned];
      exponentials<false>(power, shared_.alpha, top, total);
      Columns::Split::for_owned([&](int k, auto slot) {
        if (!columns_.holds(k, slot)) return;
        const int j = columns_.at(slot);
        shared_.psi[j] = -(top[k] + std::log(double(total[k])));
        shared_.g[j] = powers ? shared_.psi[j] - shared_.beta[j] : 0;
      });
      Columns::Split::gather(team_, total, columns_.scaling);
    }
    for_tile([&](auto s, auto t, int, int, bool) { K_[s][t] /= rows_.scaling[s] * columns_.scaling[t]; });
    team_.sync();
    if (powers) {
      take_place();
      double tops[Rows::kTile], top[Rows::kOwned];
      for (double& each : tops) each = -HUGE_VAL;
      for_tile([&](auto s, auto, int i, int j, bool alive) {
        if (alive) tops[s] = Larger()(tops[s], double(N_(i, j)) + shared_.g[j]);
      });
      Rows::Split::reduce(team_, tops, top, Larger());
      Rows::Split::gather(team_, top, tops);
      for_tile([&](auto s, auto t, int i, int j, bool alive) {
        A_[s][t] = alive ? std::exp(scalar(double(N_(i, j)) + shared_.g[j] - tops[s])) : 0;
      });
    }
    base_ = step;
    psi_of_first_ = false;
    if (powers && step == 1) return start_from_b();
    Columns::Split::for_owned([&](int k, auto) {
      columns_.owned[k] = columns_.mass[k];
      last_[k] = 1;
    });
    Columns::Split::gather(team_, columns_.owned, columns_.scaling);
  }

  // log u of this step and beta, which is log(y / b) of the step before (of the first: the start y = 1 counts as b, and
  // start_from_b makes up for it).
  HELO_FAST_HD void find_logarithms(int step, bool powers) {
    if (step > 1 && psi_of_first_) base_ = 1;
    Columns::Split::for_owned([&](int k, auto slot) {
      if (!columns_.holds(k, slot)) return;
      const int j = columns_.at(slot);
      const double log_b = std::log(double(columns_.mass[k]));
      if (step == 1) {
        shared_.log_u[j] += powers ? 0 : log_b;
        shared_.beta[j] = 0;
        return;
      }
      if (psi_of_first_) {
        shared_.psi[j] = shared_.log_u[j] - (powers ? std::log(double(first_[k])) : 0);
        shared_.g[j] = powers ? shared_.psi[j] : 0;
      }
      const double before = shared_.psi[j] + (step - 1 - base_) * shared_.g[j];
      const double log_u = powers && step == 2 ? 2 * log_b : std::log(double(columns_.owned[k]) + 1e-300);
      shared_.log_u[j] = before + shared_.g[j] + log_u;
      shared_.beta[j] = before - std::log(double(last_[k]));
    });
  }

  Shared& shared_;
  const Matrix N_;
  Team& team_;
  Rows rows_;
  Columns columns_;  // owned: u
  scalar last_[Columns::kOwned], first_[Columns::kOwned];  // sums K' z of the last step and of the first
  scalar largest_b_ = 0;
  unsigned alive_rows_ = 0, alive_columns_ = 0;  // of the tile, a bit each
  bool uneven_b_ = false;                        // b spans more than the safe range
  bool psi_of_first_ = false;                    // psi and g are not computed yet: log_u - log first_
  int base_ = 1;                                 // the step of psi and g
  scalar K_[Grid::kTileRows][Grid::kTileColumns], A_[Grid::kTileRows][Grid::kTileColumns];
};

}  // namespace helo_fast
