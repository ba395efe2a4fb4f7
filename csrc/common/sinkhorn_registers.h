// Sinkhorn forward where a team of lanes holds a whole problem in registers, in the steps of cpu/sinkhorn_solver.h.
//
// T = diag(u) K diag(v) with K_ij = exp(phi_i + psi_j - cost_ij / epsilon). The iteration is the log-domain one; its potentials are
// log u + phi and log v + psi (the marginals folded in), phi and psi in double. v = b / (K' u), then u = a / (K v): multiply-adds
// without exponentials. A half-iteration whose scaling leaves [1/kRange, kRange], or that meets an underflowed sum, is redone:
// the other side's scaling is absorbed in its potential, this side's potential is centred anew (the largest entry of K in each of its
// rows or columns becomes that one's mass, or for a mass near underflow exp(kLowest), so that its sum neither overflows nor underflows),
// and K is rebuilt. So is it at the start.
//
// Lanes form a grid (grid.h), whose tiles hold K.
// The costs stay in shared memory, each row kStride apart so that every access of a tile meets all banks; the plan takes their place.
// cost is read once and every output is written once, in whole rows.
//
// Rows and columns without mass, and the padding of a tile, have K = 0, mass 1, and 1 added to their sum, so that their scaling is 1;
// their potential is -inf, and their cost is never used.
// Uniform masses 1/n and 1/m, rounded, would differ in sum, and f and g move apart by as much at every iteration. Hard ones are m and n
// over a power of 2 instead, which is exact: all mass is `total` times what it is to be, and so is the plan, until it is written. f is not
// moved by that, and g by log total.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "grid.h"
#include "sinkhorn_batch.h"

namespace helo_fast {

template <typename scalar, typename Grid>
struct SinkhornShared {
  alignas(16) scalar cost[Grid::kMaxRows * Grid::kStride];  // and in the end the plan
  double phi[Grid::kMaxRows], psi[Grid::kMaxColumns];
  double log_a[Grid::kMaxRows], log_b[Grid::kMaxColumns];
  double g[Grid::kMaxColumns];  // where the column marginal is soft: log v, rounded, would be too coarse
};

template <typename scalar, typename Grid, bool general, typename Team>
class SinkhornRegisters {
 public:
  using Shared = SinkhornShared<scalar, Grid>;
  static_assert(Team::kLanes == Grid::kLanes);

  HELO_FAST_HD SinkhornRegisters(const SinkhornBatch<scalar>& x, Shared& shared, Team& team) : x_(x), shared_(shared), team_(team) {
    take_place();
    for (int k = team.lane(); k < Grid::kMaxRows * Grid::kStride; k += Grid::kLanes) shared.cost[k] = 0;
  }

  // Of `blocks` teams, number `block` solves every blocks-th problem.
  HELO_FAST_HD void solve_share(int64_t block, int64_t blocks) {
    for (int64_t problem = block; problem < x_.batch; problem += blocks) solve(problem);
  }

 private:
  static constexpr double kRange = 1e8;
  static constexpr scalar kTiny = sizeof(scalar) == 4 ? 1e-22 : 1e-200;  // sums above it have lost nothing to underflow
  static constexpr double kLowest = sizeof(scalar) == 4 ? -46 : -455;    // log of a sum that is safely above

  using Rows = RowsOf<scalar, Grid>;
  using Columns = ColumnsOf<scalar, Grid>;

  template <bool of_rows>
  HELO_FAST_HD auto& side() {
    if constexpr (of_rows)
      return rows_;
    else
      return columns_;
  }

  template <bool of_rows>
  HELO_FAST_HD double kappa() const {
    return !general ? 1 : of_rows ? x_.kappa_a : x_.kappa_b;
  }
  template <bool of_rows>
  HELO_FAST_HD double& potential(int at) {
    return (of_rows ? shared_.phi : shared_.psi)[at];
  }
  template <bool of_rows>
  HELO_FAST_HD double& log_mass(int at) {
    return (of_rows ? shared_.log_a : shared_.log_b)[at];
  }

  HELO_FAST_HD void take_place() { helo_fast::take_place<Grid>(team_.lane(), rows_, columns_); }

  HELO_FAST_HD void solve(int64_t problem) {
    problem_ = problem;
    if (!load()) return x_.write_nothing(problem, team_);
    const int max_iter = int(x_.max_iter), check_every = int(x_.check_every < x_.max_iter ? x_.check_every : x_.max_iter);
    int iteration = 0, until_check = x_.tol >= 0 ? check_every : -1;
    HELO_FAST_ROLLED
    while (true) {
      if (iteration == 0 || !rescale<false>()) recentre<false>();
      sum<true>();
      if (!rescale<true>()) recentre<true>();
      sum<false>();
      ++iteration;
      if (general && x_.kept) record(iteration);
      if (iteration >= max_iter) break;
      if (--until_check == 0) {
        if (marginal_error() <= x_.tol) break;
        until_check = check_every;
      }
    }
    write(iteration);
  }

  // Costs and masses; false if a side has none.
  HELO_FAST_HD bool load() {
    team_.sync();  // the previous problem has been read
    const scalar* cost = x_.cost + problem_ * x_.n * x_.m;
    for_pieces(cost, [&](auto bytes, int64_t from, int to) { team_.template copy_in<bytes>(shared_.cost + to, cost + from); });
    bool full_rows = true, full_columns = true;
    const bool some_rows = load_side<true>(int(x_.n), full_rows), some_columns = load_side<false>(int(x_.m), full_columns);
    team_.await_copies();
    if (team_.any(!full_rows || !full_columns)) clear_unused_costs();
    return some_rows && some_columns;
  }

  // What stands where there is no mass is not to be used: it may be NaN.
  HELO_FAST_HD void clear_unused_costs() {
    HELO_FAST_ROLLED
    for (int k = team_.lane(); k < Grid::kMaxRows * Grid::kMaxColumns; k += Grid::kLanes) {
      const int i = k / Grid::kMaxColumns, j = k % Grid::kMaxColumns;
      if (!(shared_.log_a[i] > -HUGE_VAL && shared_.log_b[j] > -HUGE_VAL)) shared_.cost[i * Grid::kStride + j] = 0;
    }
    team_.sync();
  }

  // Whether there is mass at all; not full where some rows or columns have none.
  template <bool of_rows>
  HELO_FAST_HD bool load_side(int size, bool& full) {
    auto& mine = side<of_rows>();
    using Split = typename std::decay_t<decltype(mine)>::Split;
    bool some = false;
    Split::for_owned([&](int k, auto slot) {
      const int at = mine.at(slot);
      const double given = at >= size ? 0 : of_rows ? x_.mass_a(problem_, at) : x_.mass_b(problem_, at);
      const bool empty = !(given > 0);
      const double mass = given * x_.total;
      some |= !empty;
      full &= !empty || at >= size;
      mine.mass[k] = opaque(empty ? scalar(1) : scalar(mass));
      mine.empty[k] = opaque(empty ? scalar(1) : scalar(0));
      mine.owned[k] = 1;
      if (Split::counts(slot, mine.peer))
        potential<of_rows>(at) = log_mass<of_rows>(at) = empty ? -HUGE_VAL : std::log(of_rows ? mass : given);
    });
    for (scalar& each : mine.scaling) each = 1;
    return team_.any(some);
  }

  // body(bytes, index in the problem, index in shared memory) for this lane's part of a matrix, in the largest aligned pieces.
  template <typename Body>
  HELO_FAST_HD void for_pieces(const scalar* matrix, const Body& body) const {
    const int64_t row_bytes = x_.m * int64_t(sizeof(scalar));
    if (row_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(matrix) % 16 == 0)
      for_pieces_of<16>(body);
    else
      for_pieces_of<int(sizeof(scalar))>(body);
  }

  template <int bytes, typename Body>
  HELO_FAST_HD void for_pieces_of(const Body& body) const {
    constexpr int size = bytes / int(sizeof(scalar));
    const int row = int(x_.m) / size, rows = int(x_.n);
    int i = team_.lane() / row, j = team_.lane() % row;
    const int step_i = Grid::kLanes / row, step_j = Grid::kLanes % row;
    HELO_FAST_ROLLED
    while (i < rows) {
      body(Constant<bytes>(), int64_t(i * row + j) * size, i * Grid::kStride + j * size);
      i += step_i, j += step_j;
      if (j >= row) j -= row, ++i;
    }
  }

  template <bool of_rows>
  HELO_FAST_HD void sum() {
    sum_products<of_rows>(team_, K_, side<of_rows>(), side<!of_rows>());
  }

  // This side's scaling from its sums; false, and nothing changed but `owned`, if a lane's is not safe.
  template <bool of_rows>
  HELO_FAST_HD bool rescale() {
    auto& mine = side<of_rows>();
    using Split = typename std::decay_t<decltype(mine)>::Split;
    bool safe = true;
    Split::for_owned([&](int k, auto slot) {
      if (kappa<of_rows>() == 1) {
        mine.owned[k] = quotient(mine.mass[k], mine.sums[k]);
      } else {
        const double now = potential<of_rows>(mine.at(slot)), next = soft_potential<of_rows>(k, slot);
        mine.owned[k] = mine.empty[k] > 0 ? scalar(1) : scalar(std::exp(std::fmin(next - now, 80.0)));
      }
      safe &= mine.sums[k] > kTiny && mine.owned[k] <= scalar(kRange) && mine.owned[k] >= scalar(1 / kRange);
    });
    if (team_.any(!safe)) return false;
    Split::gather(team_, mine.owned, mine.scaling);
    return true;
  }

  // Where the marginal is soft: the potential, with the log of the mass, that the sums ask for.
  template <bool of_rows, typename Slot>
  HELO_FAST_HD double soft_potential(int k, Slot slot) {
    auto& mine = side<of_rows>();
    const int at = mine.at(slot);
    const double damped = kappa<of_rows>() * (potential<of_rows>(at) - std::log(double(mine.sums[k])));
    if (!of_rows && mine.holds(k, slot)) shared_.g[at] = damped;
    return log_mass<of_rows>(mine.at(slot)) + damped;
  }

  // The same half-iteration around a new K.
  template <bool of_rows>
  HELO_FAST_HD void recentre() {
    auto& mine = side<of_rows>();
    using Split = typename std::decay_t<decltype(mine)>::Split;
    take_place();
    absorb<!of_rows>();
    team_.sync();
    centre<of_rows>();
    bool settled = false;
    HELO_FAST_ROLLED
    while (true) {
      team_.sync();
      build();
      if (settled) break;
      sum<of_rows>();
      if (kappa<of_rows>() == 1) {
        Split::for_owned([&](int k, auto) { mine.owned[k] = quotient(mine.mass[k], mine.sums[k]); });
        break;
      }
      team_.sync();  // the potentials have been read
      Split::for_owned([&](int k, auto slot) {
        if (mine.holds(k, slot)) potential<of_rows>(mine.at(slot)) = soft_potential<of_rows>(k, slot);
        mine.owned[k] = 1;
      });
      settled = true;
    }
    Split::gather(team_, mine.owned, mine.scaling);
  }

  template <bool of_rows>
  HELO_FAST_HD void absorb() {
    auto& mine = side<of_rows>();
    using Split = typename std::decay_t<decltype(mine)>::Split;
    Split::for_owned([&](int k, auto slot) {
      if (mine.holds(k, slot)) potential<of_rows>(mine.at(slot)) += std::log(double(mine.owned[k]));
      mine.owned[k] = 1;
    });
    for (scalar& each : mine.scaling) each = 1;
  }

  // This side's potential, so that the largest entry of K is the mass of its row or column. That place need not be exact: only where
  // exponents are so large that their type has no digits left for it, it is looked for again from there.
  template <bool of_rows>
  HELO_FAST_HD void centre() {
    if (!team_.any(place<of_rows, false>())) return;
    team_.sync();
    place<of_rows, true>();
  }

  // Whether exponents are that large.
  template <bool of_rows, bool again>
  HELO_FAST_HD bool place() {
    auto& mine = side<of_rows>();
    auto& other = side<!of_rows>();
    using Split = typename std::decay_t<decltype(mine)>::Split;
    const double per_epsilon = 1 / x_.epsilon;
    int at[mine.kTile];
    scalar tops[mine.kTile], top[mine.kOwned];
    unroll<mine.kTile>([&](auto s) {
      at[s] = mine.at(s);
      tops[s] = -HUGE_VAL;
    });
    unroll<other.kTile>([&](auto t) {
      const int across = other.at(t);
      const double alpha = this->template potential<!of_rows>(across);
      HELO_FAST_UNROLL
      for (int s = 0; s < mine.kTile; ++s) {
        const scalar cost = shared_.cost[of_rows ? at[s] * Grid::kStride + across : across * Grid::kStride + at[s]];
        const scalar exponent = again ? scalar(alpha + this->template potential<of_rows>(at[s]) - double(cost) * per_epsilon)
                                      : scalar(alpha) - cost * scalar(per_epsilon);
        tops[s] = Larger()(tops[s], exponent);
      }
    });
    Split::reduce(team_, tops, top, Larger());
    bool large = false;
    if (again) team_.sync();  // the potentials have been read
    Split::for_owned([&](int k, auto slot) {
      if (!mine.holds(k, slot)) return;
      const double mass = log_mass<of_rows>(mine.at(slot)), level = mass > kLowest ? mass : kLowest;
      double& placed = potential<of_rows>(mine.at(slot));
      placed = (again ? placed : 0) + level - double(top[k]);
      large |= sizeof(scalar) == 4 && std::fabs(top[k]) > 1e7f;
    });
    return large;
  }

  // K from the potentials; the exponent in double.
  HELO_FAST_HD void build() {
    take_place();
    const double per_epsilon = 1 / x_.epsilon;
    int rows[Grid::kTileRows];
    unroll<Grid::kTileRows>([&](auto s) { rows[s] = rows_.at(s); });
    unroll<Grid::kTileColumns>([&](auto t) {
      const int column = columns_.at(t);
      const double psi = shared_.psi[column];
      HELO_FAST_UNROLL
      for (int s = 0; s < Grid::kTileRows; ++s) {
        const double potentials = psi + shared_.phi[rows[s]];
        K_[s][t] = std::exp(scalar(potentials - double(shared_.cost[rows[s] * Grid::kStride + column]) * per_epsilon));
      }
      columns_.place = after(K_[Grid::kTileRows - 1][t], columns_.place);
    });
  }

  // L1 distance of the column marginal from its optimal value, known to every lane; needs the sums of the current u.
  HELO_FAST_HD double marginal_error() {
    double error = 0;
    Columns::Split::for_owned([&](int k, auto slot) {
      if (!columns_.holds(k, slot)) return;
      const double b = columns_.mass[k], target = !general || x_.slope_b == 0 ? b : b * std::exp(-x_.slope_b * shared_.g[columns_.at(slot)]);
      error += std::fabs(double(columns_.owned[k]) * double(columns_.sums[k]) - target);
    });
    return reduce_all(team_, error, Plus()) / x_.total;
  }

  HELO_FAST_HD void record(int64_t iteration) {
    scalar* history = x_.history + (problem_ * x_.kept + iteration - 1) * (x_.n + x_.m);
    write_potentials<true>(history, x_.n, 1);
    write_potentials<false>(history + x_.n, x_.m, 1);
  }

  template <bool of_rows>
  HELO_FAST_HD void write_potentials(scalar* to, int64_t size, double unit) {
    auto& mine = side<of_rows>();
    using Split = typename std::decay_t<decltype(mine)>::Split;
    Split::for_owned([&](int k, auto slot) {
      const int at = mine.at(slot);
      if (mine.holds(k, slot))
        to[at] = scalar(unit * (potential<of_rows>(at) + std::log(double(mine.owned[k])) - log_mass<of_rows>(mine.at(slot))));
      else if (at < size && Split::counts(slot, mine.peer))
        to[at] = -HUGE_VAL;
    });
  }

  HELO_FAST_HD void write(int64_t iterations) {
    take_place();
    const double error = marginal_error();
    scalar spent = 0, mass = 0;
    const scalar per_total = scalar(1 / x_.total);
    HELO_FAST_UNROLL
    for (int s = 0; s < Grid::kTileRows; ++s) rows_.scaling[s] *= per_total;
    int rows[Grid::kTileRows];
    unroll<Grid::kTileRows>([&](auto s) { rows[s] = rows_.at(s) * Grid::kStride; });
    unroll<Grid::kTileColumns>([&](auto t) {
      columns_.place = after(mass, columns_.place);
      const int column = columns_.at(t);
      const scalar v = after(mass, columns_.scaling[t]);
      HELO_FAST_UNROLL
      for (int s = 0; s < Grid::kTileRows; ++s) {
        scalar& cost = shared_.cost[rows[s] + column];
        mass = K_[s][t] * v * rows_.scaling[s];
        if (mass > 0) spent += mass * cost;  // an infinite cost moves nothing
        cost = mass;
      }
    });
    const double transport_cost = reduce_all(team_, double(spent), Plus());
    team_.sync();
    scalar* plan = x_.plan + problem_ * x_.n * x_.m;
    for_pieces(plan, [&](auto bytes, int64_t to, int from) {
      team_.template copy_out<bytes>(plan + to, shared_.cost + from);
    });
    write_potentials<true>(x_.f + problem_ * x_.n, x_.n, x_.epsilon);
    write_potentials<false>(x_.g + problem_ * x_.m, x_.m, x_.epsilon);
    if (team_.lane() == 0) x_.write_numbers(problem_, transport_cost, error, iterations);
  }

  const SinkhornBatch<scalar>& x_;
  Shared& shared_;
  Team& team_;
  int64_t problem_ = 0;
  Rows rows_;
  Columns columns_;
  scalar K_[Grid::kTileRows][Grid::kTileColumns];
};

}  // namespace helo_fast
