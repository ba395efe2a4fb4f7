// gromov_from_tokens for a team of lanes: cosine costs, threshold, products with the plan and the inner solver (gromov_registers.h),
// all in shared memory and registers, in the steps of cpu/gromov_solver.h. Nothing is written but the results.
//
// IPOT meets the column marginal last, Sinkhorn the row marginal: "entropic" is solved with x and y exchanged, as rows and columns.
// Costs stand less their means: C of the rows' space, D of the columns', both symmetric. G's part C T D is two products of rows with rows,
// P = C T and P D (row_products.h): so the plan stands transposed.
//
// Points without mass are zero tokens; they count nowhere, and their costs are 0.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/gromov_problem.h"
#include "gromov_registers.h"

namespace helo_fast {

template <typename scalar>
struct GromovBatch : GromovArguments<scalar> {  // of tokens; spaces.extremes [extremes, 4], or null
  int64_t batch, extremes;
};

template <typename scalar, typename Grid, typename Team>
class GromovTokens {
 public:
  // memory: shared_bytes() of shared memory, aligned to 16 bytes.
  HELO_FAST_HD GromovTokens(const GromovBatch<scalar>& x, unsigned char* memory, Team& team)
      : x_(x), s_(x.spaces), team_(team), rows_(space(x.entropic)), columns_(space(!x.entropic)), layout_(layout(x)),
        values_(reinterpret_cast<scalar*>(memory + sizeof(PlanShared))), C_(matrix(layout_.C, rows_.count)),
        D_(matrix(layout_.D, columns_.count)), T_(matrix(layout_.T, rows_.count)), P_(matrix(layout_.P, columns_.count)),
        cross_{layout_.cross < 0 ? nullptr : values_ + layout_.cross, RowProducts::stride(columns_.count)},
        plan_(*reinterpret_cast<PlanShared*>(memory), P_, team) {
    take_place();
    for (int k = team.lane(); k < layout_.T; k += Team::kLanes) values_[k] = 0;
  }

  HELO_FAST_HD static int64_t shared_bytes(const GromovBatch<scalar>& x) {
    return int64_t(sizeof(PlanShared)) + int64_t(layout(x).count) * int64_t(sizeof(scalar));
  }

  // Of `blocks` teams, number `block` solves every blocks-th problem.
  HELO_FAST_HD void solve_share(int64_t block, int64_t blocks) {
    if (s_.extremes) merge_extremes();
    for (int64_t problem = block; problem < x_.batch; problem += blocks) solve(problem);
  }

  // to [4]: (min, max) of the cosine costs of x, then of y, over the team's share.
  HELO_FAST_HD void find_extremes_share(scalar* to, int64_t block, int64_t blocks) {
    Ends of_rows, of_columns;
    for (int64_t problem = block; problem < x_.batch; problem += blocks) {
      problem_ = problem;
      load_masses();
      HELO_FAST_ROLLED
      for (int which = kRows; which <= kColumns; ++which) {
        Tile costs;
        Ends ends;
        gram(which, costs);
        find_costs(which == kRows, costs, ends);
        if (which == kRows)
          of_rows.include(ends);
        else
          of_columns.include(ends);
      }
    }
    merge(of_rows), merge(of_columns);
    if (team_.lane() != 0) return;
    const int rows_at = x_.entropic ? 2 : 0;
    to[rows_at] = of_rows.low, to[rows_at + 1] = of_rows.high;
    to[2 - rows_at] = of_columns.low, to[3 - rows_at] = of_columns.high;
  }

 private:
  using Plan = GromovPlan<scalar, Grid, Team>;
  using PlanShared = typename Plan::Shared;
  using RowProducts = helo_fast::RowProducts<scalar, Grid>;
  using Matrix = typename RowProducts::Matrix;
  using Tile = typename RowProducts::Tile;
  static constexpr int kPiece = RowProducts::kPiece;
  static constexpr scalar kInfinity = scalar(HUGE_VAL);
  static constexpr int kMost = Grid::kMaxRows > Grid::kMaxColumns ? Grid::kMaxRows : Grid::kMaxColumns;
  static constexpr int kChunk = 64;  // columns of the tokens that are in shared memory at a time
  static constexpr int kChunkStride = kChunk + kPiece;
  enum Which { kRows, kColumns, kAcross };  // whose costs: their loops are rolled, for there is much code in them
  static constexpr double kNormFloor = 1e-12;  // of a token, in its cosine cost
  static_assert(sizeof(PlanShared) % 16 == 0 && kMost * int(sizeof(scalar)) % 16 == 0);

  struct Ends {  // the extremes of costs
    scalar low = kInfinity, high = -kInfinity;
    HELO_FAST_HD void include(const Ends& other) {
      low = -Larger()(-low, -other.low);
      high = Larger()(high, other.high);
    }
  };
  // Those of all lanes.
  HELO_FAST_HD void merge(Ends& ends) {
    ends.low = -reduce_all(team_, -ends.low, Larger());
    ends.high = reduce_all(team_, ends.high, Larger());
  }

  struct Space {
    const scalar *tokens, *mass;
    int count;
  };
  HELO_FAST_HD Space space(bool is_y) const {
    return is_y ? Space{s_.y, s_.b, int(s_.m)} : Space{s_.x, s_.a, int(s_.n)};
  }

  // Where each matrix and vector begins; the chunks of tokens stand where T and P, which is also N, come after them.
  struct Layout {
    int row_mass, column_mass, scale, columns, row_sum, column_sum, numbers;  // scale of rows, then of columns
    int C, D, T, P, cross, count;
  };
  HELO_FAST_HD static Layout layout(const GromovBatch<scalar>& x) {
    const auto& s = x.spaces;
    const int across = RowProducts::stride(int(x.entropic ? s.n : s.m)), down = RowProducts::stride(int(x.entropic ? s.m : s.n));
    const bool fused = s.alpha < 1, chunks_of_both = fused && !s.cost_xy;
    Layout at;
    at.row_mass = 0, at.column_mass = kMost, at.scale = 2 * kMost, at.columns = 4 * kMost, at.row_sum = 5 * kMost;
    at.column_sum = 6 * kMost, at.numbers = 7 * kMost, at.C = at.numbers + 8;
    at.D = at.C + Grid::kMaxRows * down;
    at.T = at.D + Grid::kMaxColumns * across;
    at.P = at.T + Grid::kMaxColumns * down;
    const int chunks = at.T + (chunks_of_both ? 2 : 1) * kMost * kChunkStride, end = at.P + Grid::kMaxRows * across;
    at.count = chunks > end ? chunks : end;
    at.cross = fused ? at.count : -1;
    if (fused) at.count += Grid::kMaxRows * across;
    return at;
  }
  HELO_FAST_HD Matrix matrix(int at, int count) const { return {values_ + at, RowProducts::stride(count)}; }
  HELO_FAST_HD scalar* vector(int at) const { return values_ + at; }

  HELO_FAST_HD scalar* masses(bool of_rows) const { return vector(of_rows ? layout_.row_mass : layout_.column_mass); }
  HELO_FAST_HD scalar* scales(bool of_rows) const { return vector(layout_.scale + (of_rows ? 0 : kMost)); }
  HELO_FAST_HD int count(bool of_rows) const { return of_rows ? rows_.count : columns_.count; }

  HELO_FAST_HD void take_place() { products_.take_place(team_.lane()); }

  // What would wait in registers for long: the extremes over the batch of the rows' costs, then of the columns', and their means.
  enum Number { kRowEnds, kColumnEnds = 2, kRowMean = 4, kColumnMean };
  HELO_FAST_HD scalar& number(int which) const { return values_[layout_.numbers + which]; }

  // Extremes of the batch from those of the first kernel's blocks.
  HELO_FAST_HD void merge_extremes() {
    team_.sync();  // the numbers have been cleared
    HELO_FAST_ROLLED
    for (int which = kRows; which <= kColumns; ++which) {
      const bool is_y = (which == kColumns) != x_.entropic;
      Ends ends;
      for (int64_t e = team_.lane(); e < x_.extremes; e += Team::kLanes) {
        const scalar* found = s_.extremes + 4 * e + (is_y ? 2 : 0);
        ends.include({found[0], found[1]});
      }
      merge(ends);
      const int at = which == kRows ? kRowEnds : kColumnEnds;
      if (team_.lane() == 0) number(at) = ends.low, number(at + 1) = ends.high;
    }
  }

  // False if a side has none.
  HELO_FAST_HD bool load_masses() {
    team_.sync();  // the previous problem has been written
    alive_rows_ = load_masses(true);
    alive_columns_ = load_masses(false);
    team_.sync();
    return alive_rows_ > 0 && alive_columns_ > 0;
  }
  // 0 in the padding; returns how many are above 0.
  HELO_FAST_HD int load_masses(bool of_rows) {
    const int size = count(of_rows);
    const scalar* given = (of_rows ? rows_.mass : columns_.mass) + problem_ * size;
    int alive = 0;
    for (int i = team_.lane(); i < kMost; i += Team::kLanes) {
      const scalar mass = i < size ? given[i] : scalar(0);
      masses(of_rows)[i] = mass > 0 ? mass : scalar(0);
      alive += mass > 0;
    }
    return reduce_all(team_, alive, Plus());
  }

  // Columns [first, first + length) of the tokens, 0 where there is no mass and past the last column; there after await_copies().
  HELO_FAST_HD void fetch(bool of_rows, int first, int length, Matrix to) {
    const int width = int(s_.width);
    const scalar* tokens = (of_rows ? rows_.tokens : columns_.tokens) + problem_ * count(of_rows) * width + first;
    const scalar* mass = masses(of_rows);
    const bool aligned = width % kPiece == 0 && reinterpret_cast<uintptr_t>(tokens) % 16 == 0;
    HELO_FAST_ROLLED
    for (int e = team_.lane(); e < kMost * (kChunk / kPiece); e += Team::kLanes) {
      const int i = e / (kChunk / kPiece), k = e % (kChunk / kPiece) * kPiece;
      if (k >= length) continue;
      scalar* there = &to(i, k);
      const scalar* here = tokens + int64_t(i) * width + k;
      if (!(mass[i] > 0)) {
        HELO_FAST_UNROLL
        for (int p = 0; p < kPiece; ++p) there[p] = 0;
      } else if (aligned) {
        team_.template copy_in<16>(there, here);
      } else {
        HELO_FAST_UNROLL
        for (int p = 0; p < kPiece; ++p) {
          if (first + k + p < width)
            team_.template copy_in<int(sizeof(scalar))>(there + p, here + p);
          else
            there[p] = 0;
        }
      }
    }
  }

  // Inner products of the tokens of one side, or of rows with columns.
  HELO_FAST_HD void gram(int which, Tile& tile) {
    const Matrix left{values_ + layout_.T, kChunkStride}, right{left.data + (which == kAcross ? kMost * kChunkStride : 0), kChunkStride};
    products_.clear(tile);
    HELO_FAST_ROLLED
    for (int first = 0; first < int(s_.width); first += kChunk) {
      const int rest = RowProducts::whole_pieces(int(s_.width) - first), length = rest < kChunk ? rest : kChunk;
      team_.sync();  // what stood here has been read
      HELO_FAST_ROLLED
      for (int side = which == kColumns ? 1 : 0; side <= (which == kRows ? 0 : 1); ++side)
        fetch(side == 0, first, length, side == 0 ? left : right);
      team_.await_copies();
      products_.add(left, right, length, tile);
    }
  }

  // scale, the inverse of the product of the norms, is 0 where that is beyond all numbers.
  HELO_FAST_HD static scalar cosine_cost(scalar product, scalar scale) { return scale > 0 ? 1 - product * scale : scalar(1); }

  // From the inner products within a space its cosine costs, 0 where there is no mass; ends: this lane's.
  HELO_FAST_HD void find_costs(bool of_rows, Tile& costs, Ends& ends) {
    take_place();
    const scalar *mass = masses(of_rows), floor = scalar(kNormFloor);
    scalar* scale = scales(of_rows);
    products_.for_tile([&](auto s, auto t, int i, int j) {
      if (i == j) scale[i] = 1 / Larger()(std::sqrt(costs[s][t]), floor);
    });
    team_.sync();
    products_.for_tile([&](auto s, auto t, int i, int j) {
      const bool inside = mass[i] > 0 && mass[j] > 0;
      const scalar c = inside ? cosine_cost(costs[s][t], scale[i] * scale[j]) : 0;
      costs[s][t] = c;
      ends.low = inside && c < ends.low ? c : ends.low;
      ends.high = inside && c > ends.high ? c : ends.high;
    });
  }

  // C, then D and the columns' own term, which asks for C's mean, then the costs across.
  HELO_FAST_HD void read_costs() {
    const bool across = cross_.data && !s_.cost_xy;
    HELO_FAST_ROLLED
    for (int which = kRows; which <= (across ? kAcross : kColumns); ++which) {
      Tile costs;
      gram(which, costs);
      if (which == kAcross)
        keep_across(costs);
      else
        keep_costs(which == kRows, costs);
    }
    if (cross_.data && s_.cost_xy) read_across();
  }

  // The costs above the threshold, less their mean.
  HELO_FAST_HD void keep_costs(bool of_rows, Tile& costs) {
    Ends ends;
    find_costs(of_rows, costs, ends);
    if (s_.extremes) {
      ends.low = number(of_rows ? kRowEnds : kColumnEnds);
      ends.high = number(of_rows ? kRowEnds + 1 : kColumnEnds + 1);
    } else {
      merge(ends);
    }
    const scalar cut = ends.low + scalar(s_.threshold) * (ends.high - ends.low);
    const scalar* mass = masses(of_rows);
    double sum = 0;
    products_.for_tile([&](auto s, auto t, int i, int j) {
      const bool inside = mass[i] > 0 && mass[j] > 0;
      costs[s][t] = inside ? Larger()(costs[s][t] - cut, scalar(0)) : 0;
      sum += double(costs[s][t]);
    });
    const int alive = of_rows ? alive_rows_ : alive_columns_, size = count(of_rows);
    take_place();
    const scalar mean = scalar(reduce_all(team_, sum, Plus()) / (double(alive) * double(alive)));
    if (team_.lane() == 0) number(of_rows ? kRowMean : kColumnMean) = mean;
    if (!of_rows) {
      const scalar c = number(kRowMean);
      unroll<Grid::kTileRows>([&](auto s) {
        scalar part = 0;
        unroll<Grid::kTileColumns>([&](auto t) { part += mass[products_.column(t)] * (costs[s][t] * (costs[s][t] - 2 * c)); });
        HELO_FAST_UNROLL
        for (int mask = 1; mask < Grid::kColumns; mask *= 2) part += team_.exchange(part, mask);
        if (products_.is_first_column()) vector(layout_.columns)[products_.row(s)] = part;
      });
    }
    scalar* const to = of_rows ? C_.data : D_.data;
    const int stride = of_rows ? C_.stride : D_.stride;
    products_.for_tile([&](auto s, auto t, int i, int j) {
      if (i < size && j < size) to[i * stride + j] = mass[i] > 0 && mass[j] > 0 ? costs[s][t] - mean : 0;
    });
  }

  HELO_FAST_HD void keep_across(const Tile& products) {
    take_place();
    products_.for_tile([&](auto s, auto t, int i, int j) {
      if (masses(true)[i] > 0 && masses(false)[j] > 0) cross_(i, j) = cosine_cost(products[s][t], scales(true)[i] * scales(false)[j]);
    });
  }

  HELO_FAST_HD void read_across() {
    const scalar* given = s_.cost_xy + problem_ * s_.n * s_.m;
    HELO_FAST_ROLLED
    for (int k = team_.lane(); k < int(s_.n * s_.m); k += Team::kLanes) {
      const int i = k / columns_.count, j = k % columns_.count;
      if (masses(true)[i] > 0 && masses(false)[j] > 0) cross_(i, j) = given[place(i, j)];
    }
  }

  // Of an entry in a result or in cost_xy.
  HELO_FAST_HD int place(int i, int j) const { return x_.entropic ? j * rows_.count + i : i * columns_.count + j; }

  HELO_FAST_HD void solve(int64_t problem) {
    problem_ = problem;
    const bool solved = load_masses();
    const int most = int(x_.outer_iter);
    int iterations = solved ? 0 : x_.tol < 0 ? most : 1;
    double change = 0;
    PlanSums sums;
    if (solved) {
      read_costs();
      start();
      HELO_FAST_ROLLED
      while (true) {
        Tile product;
        between(product);
        if (iterations == most || (iterations > 0 && x_.tol >= 0 && change <= x_.tol)) {
          sums = with_plan(product);
          break;
        }
        change = iterate(product);
        ++iterations;
      }
    }
    write(solved, sums, change, iterations);
  }

  // T = a b'.
  HELO_FAST_HD void start() {
    team_.sync();  // the tokens have been read
    HELO_FAST_ROLLED
    for (int k = team_.lane(); k < Grid::kMaxColumns * T_.stride; k += Team::kLanes) {
      const int j = k / T_.stride, i = k % T_.stride;
      T_(j, i) = i < rows_.count ? masses(true)[i] * masses(false)[j] : scalar(0);
    }
    plan_.start(masses(true), masses(false));
    team_.sync();
  }

  // C T D of the plan; what P held has been read, or is lost.
  HELO_FAST_HD void between(Tile& product) {
    take_place();
    products_.clear(product);
    products_.add(C_, T_, RowProducts::whole_pieces(rows_.count), product);
    products_.for_tile([&](auto s, auto t, int i, int j) {
      if (j < P_.stride) P_(i, j) = product[s][t];
    });
    team_.sync();
    take_place();
    products_.clear(product);
    products_.add(P_, D_, RowProducts::whole_pieces(columns_.count), product);
    team_.sync();
  }

  // The next plan, from C T D of this one; returns its change.
  HELO_FAST_HD double iterate(const Tile& product) {
    take_place();
    products_.for_tile([&](auto s, auto t, int i, int j) {
      if (j < P_.stride) P_(i, j) = product[s][t];
    });
    team_.sync();
    const scalar alpha = cross_.data ? scalar(s_.alpha) : 1, twice = x_.entropic ? 2 : 1;
    plan_.set(2 * twice * alpha, cross_, scalar(1 - s_.alpha), vector(layout_.columns), twice * alpha, Plan::finite(1 / x_.epsilon));
    plan_.solve(int(x_.inner_iter), !x_.entropic);
    const double change = plan_.write(T_);
    team_.sync();
    return change;
  }

  // Of the plan with C T D and with the costs across; this lane's part.
  struct PlanSums {
    double inner = 0, across = 0;
  };
  HELO_FAST_HD PlanSums with_plan(const Tile& product) {
    take_place();
    PlanSums sums;
    products_.for_tile([&](auto s, auto t, int i, int j) {
      if (i >= rows_.count || j >= columns_.count) return;
      const scalar T = T_(j, i);
      sums.inner += double(T * product[s][t]);
      if (cross_.data && T > 0) sums.across += double(T * cross_(i, j));
    });
    return sums;
  }

  // The plan's marginals; how far (L1) they are from the masses. Every lane knows that.
  HELO_FAST_HD double find_marginals(bool solved) {
    double error = 0;
    for (int k = team_.lane(); k < rows_.count + columns_.count; k += Team::kLanes) {
      const bool of_rows = k < rows_.count;
      const int own = of_rows ? k : k - rows_.count, others = solved ? of_rows ? columns_.count : rows_.count : 0;
      scalar sum = 0;
      for (int e = 0; e < others; ++e) sum += of_rows ? T_(e, own) : T_(own, e);
      vector(of_rows ? layout_.row_sum : layout_.column_sum)[own] = sum;
      error += std::fabs(double(sum) - double(vector(of_rows ? layout_.row_mass : layout_.column_mass)[own]));
    }
    error = reduce_all(team_, error, Plus());
    team_.sync();
    return error;
  }

  // sum_ik cost_ik w_i w_k, and of the squares; this lane's part.
  HELO_FAST_HD void add_moments(Matrix cost, int count, const scalar* weights, double& first, double& second) const {
    products_.for_tile([&](auto, auto, int i, int j) {
      if (i >= count || j >= count) return;
      const scalar v = cost(i, j), weighed = weights[i] * weights[j] * v;
      first += double(weighed);
      second += double(weighed * v);
    });
  }

  // With the means out, its quadratic part is sum_ijkl (C_ik - D_jl + c - d)^2 T_ij T_kl.
  HELO_FAST_HD double objective(const PlanSums& sums) {
    take_place();
    double mass = 0, x = 0, x_square = 0, y = 0, y_square = 0;
    const scalar *row_sum = vector(layout_.row_sum), *column_sum = vector(layout_.column_sum);
    for (int i = team_.lane(); i < rows_.count; i += Team::kLanes) mass += double(row_sum[i]);
    add_moments(C_, rows_.count, row_sum, x, x_square);
    add_moments(D_, columns_.count, column_sum, y, y_square);
    mass = reduce_all(team_, mass, Plus());
    const double shift = double(number(kRowMean)) - double(number(kColumnMean));
    const double part = x_square + y_square - 2 * sums.inner + 2 * shift * (x - y);
    double quadratic = reduce_all(team_, part, Plus()) + shift * shift * mass * mass;
    quadratic = quadratic > 0 ? quadratic : 0;  // below by rounding alone
    return cross_.data ? s_.alpha * quadratic + (1 - s_.alpha) * reduce_all(team_, sums.across, Plus()) : quadratic;
  }

  HELO_FAST_HD void write(bool solved, const PlanSums& sums, double change, int iterations) {
    const int64_t entries = s_.n * s_.m;
    scalar* plan = x_.plan + problem_ * entries;
    HELO_FAST_ROLLED
    for (int k = team_.lane(); k < int(entries); k += Team::kLanes) {
      const int across = int(s_.m), i = k / across, j = k % across;
      plan[k] = !solved ? scalar(0) : x_.entropic ? T_(i, j) : T_(j, i);
    }
    const double error = find_marginals(solved), cost = solved ? objective(sums) : 0;
    if (team_.lane() != 0) return;
    x_.gw_cost[problem_] = scalar(cost);
    x_.marginal_error[problem_] = scalar(error);
    x_.n_iter[problem_] = static_cast<int32_t>(iterations);
    x_.converged[problem_] = scalar(change) <= scalar(x_.bound) && scalar(error) <= scalar(x_.bound);
  }

  const GromovBatch<scalar>& x_;
  const GromovSpaces<scalar>& s_;
  Team& team_;
  const Space rows_, columns_;
  const Layout layout_;
  scalar* const values_;
  const Matrix C_, D_;      // [rows, rows], [columns, columns] less their means
  const Matrix T_, P_;      // the plan [columns, rows]; C T [rows, columns], which becomes the gain, then N
  const Matrix cross_;      // [rows, columns], or none
  Plan plan_;
  RowProducts products_;
  int64_t problem_ = 0;
  int alive_rows_ = 0, alive_columns_ = 0;
};

}  // namespace helo_fast
