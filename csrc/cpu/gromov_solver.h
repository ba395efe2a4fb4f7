// Gromov-Wasserstein forward, one problem at a time, for one instruction set (see each_set.h). The formulas, and why costs enter
// products less their means c and d, stand in helo_fast/ops/gromov/reference.py.
//
// IPOT meets the column marginal last, Sinkhorn the row marginal: so "entropic" is solved with x and y exchanged, and only the
// inner solver tells the two methods apart. Points without mass are left out. Nothing but the results leaves the thread's scratch,
// which is O((n + m)^2), or of tokens O((n + m) width) besides.
#include "gromov_space.h"

namespace {
namespace HELO_FAST_SET {

template <typename scalar>
class GromovSolver {
 public:
  using V = Vectors<scalar>;
  using full = typename V::full;

  GromovSolver(const GromovArguments<scalar>& x, Arena& arena)
      : x_(x), s_(x.spaces),
        rows_(arena, x.entropic ? s_.m : s_.n, s_.width),
        cols_(arena, x.entropic ? s_.n : s_.m, s_.width),
        inner_(arena, rows_.size, cols_.size) {
    const int64_t np = padded_rows(rows_.size), nl = padded<scalar>(rows_.size), mp = padded<scalar>(cols_.size);
    T_ = arena.take<scalar>(np * mp);
    cross_ = arena.take<scalar>(s_.cost_xy || s_.alpha < 1 ? np * mp : 0);
    Ct_space_ = arena.take<scalar>(x.entropic && !s_.width ? np * nl : 0);
    Dt_space_ = arena.take<scalar>(s_.width ? 0 : padded_rows(cols_.size) * mp);
    for (scalar** p : {&row_sum_, &row_mean_, &row_square_}) *p = arena.take<scalar>(nl);
    for (scalar** p : {&col_sum_, &col_mean_, &col_square_, &columns_}) *p = arena.take<scalar>(mp);
  }

  void solve(int64_t problem) {
    problem_ = problem;
    rows_.select(x_.entropic ? s_.b + problem * s_.m : s_.a + problem * s_.n);
    cols_.select(x_.entropic ? s_.a + problem * s_.n : s_.b + problem * s_.m);
    iterations_ = 1;
    change_ = 0;
    if (rows_.count > 0 && cols_.count > 0) {
      read(rows_, !x_.entropic);
      read(cols_, x_.entropic);
      read_cross();
      centre();
      inner_.start(rows_.mass, rows_.count, cols_.mass, cols_.count);
      iterate();
    } else if (x_.tol < 0) {
      iterations_ = x_.outer_iter;
    }
    write();
  }

 private:
  void read(Space<scalar>& side, bool is_x) {
    if (!s_.width) return side.read_cost((is_x ? s_.cost_x : s_.cost_y) + problem_ * side.size * side.size);
    side.read_tokens((is_x ? s_.x : s_.y) + problem_ * side.size * side.width);
    if (s_.extremes)
      side.low = s_.extremes[is_x ? 0 : 2], side.high = s_.extremes[is_x ? 1 : 3];
    else
      side.find_extremes();
    side.cut(s_.threshold);
  }

  void read_cross() {
    fused_ = s_.cost_xy || s_.alpha < 1;
    if (s_.alpha == 1) return;  // it has no weight
    if (!s_.cost_xy) return cross_costs(rows_, cols_, cross_);
    const scalar* from = s_.cost_xy + problem_ * s_.n * s_.m;
    for (int64_t i = 0; i < rows_.count; ++i)
      for (int64_t j = 0; j < cols_.stride; ++j) cross_[i * cols_.stride + j] = j < cols_.count ? from[place(i, j)] : 0;
  }

  // Of an entry in a result or in cost_xy.
  int64_t place(int64_t i, int64_t j) const {
    return x_.entropic ? cols_.where[j] * s_.m + rows_.where[i] : rows_.where[i] * s_.m + cols_.where[j];
  }

  // C - c, D - d and their transposes where they are needed; the columns' own term; T = a b'.
  void centre() {
    const int64_t n = rows_.count, m = cols_.count, mp = cols_.stride;
    const bool symmetric = s_.width || (rows_.symmetric() && cols_.symmetric());
    both_ = x_.entropic && !symmetric;
    C_ = rows_.cost;
    D_ = cols_.cost;
    Dt_ = symmetric ? cols_.cost : Dt_space_;
    if (!symmetric) {
      transpose(D_, mp, m, m, Dt_space_, mp);
      if (both_) transpose(C_, rows_.stride, n, n, Ct_space_, rows_.stride);
    }
    c_ = scalar(rows_.mean());
    d_ = scalar(cols_.mean());
    for (int64_t j = 0; j < mp; ++j) col_sum_[j] = col_square_[j] = 0;
    weigh_rows(Dt_, mp, cols_.mass, m, col_sum_, col_square_);
    if (both_) weigh_rows(D_, mp, cols_.mass, m, col_sum_, col_square_);
    for (int64_t j = 0; j < mp; ++j) columns_[j] = col_square_[j] - 2 * c_ * col_sum_[j];
    subtract(C_, rows_.stride, n, c_);
    subtract(D_, mp, m, d_);
    if (!symmetric) subtract(Dt_, mp, m, d_);
    if (both_) subtract(Ct_space_, rows_.stride, n, c_);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < mp; ++j) T_[i * mp + j] = rows_.mass[i] * cols_.mass[j];
  }

  static void subtract(scalar* cost, int64_t stride, int64_t count, scalar mean) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < count; ++j) cost[i * stride + j] -= mean;
  }

  // out = left T right, less the means.
  void between(const scalar* left, const scalar* right, scalar* out) {
    const int64_t n = rows_.count, m = cols_.count, mp = cols_.stride;
    product(left, rows_.stride, T_, mp, n, n, m, inner_.scratch(0), mp);
    product(inner_.scratch(0), mp, right, mp, n, m, m, out, mp);
  }

  // The same at T = a b', where it is (left a) (right' b)'.
  void between_at_start(const scalar* left, const scalar* right_transposed, scalar* out) {
    const int64_t n = rows_.count, m = cols_.count, mp = cols_.stride;
    product_with_vector(left, rows_.stride, rows_.mass, n, row_mean_);
    product_with_vector(right_transposed, mp, cols_.mass, m, col_mean_);
    for (int64_t j = m; j < mp; ++j) col_mean_[j] = 0;
    for (int64_t i = 0; i < n; ++i)
      for_columns<scalar>(m, [&](auto zero, int64_t j) HELO_FAST_LAMBDA {
        store(out + i * mp + j, row_mean_[i] * load<decltype(zero)>(col_mean_ + j));
      });
  }

  // out = C T D', or C' T D, less the means.
  void transport(bool transposed, bool at_start, scalar* out) {
    const scalar *left = transposed ? Ct_space_ : C_, *right = transposed ? D_ : Dt_;
    at_start ? between_at_start(left, transposed ? Dt_ : D_, out) : between(left, right, out);
  }

  void iterate() {
    const scalar alpha = fused_ ? scalar(s_.alpha) : 1, twice = x_.entropic && !both_ ? 2 : 1;
    const double per_epsilon = inner_.finite(1 / x_.epsilon);
    for (iterations_ = 1;; ++iterations_) {
      scalar* gain = inner_.gain();
      transport(false, iterations_ == 1, gain);
      if (both_) {
        transport(true, iterations_ == 1, inner_.scratch(1));
        for (int64_t k = 0; k < rows_.count * cols_.stride; ++k) gain[k] += inner_.scratch(1)[k];
      }
      inner_.set(2 * twice * alpha, s_.alpha == 1 ? nullptr : cross_, scalar(1 - s_.alpha), columns_, twice * alpha, per_epsilon);
      inner_.solve(x_.inner_iter, !x_.entropic);
      change_ = inner_.write(T_);
      if (iterations_ == x_.outer_iter || (x_.tol >= 0 && change_ <= x_.tol)) return;
    }
  }

  void write() {
    scalar* plan = x_.plan + problem_ * s_.n * s_.m;
    const int64_t n = rows_.count, m = cols_.count, mp = cols_.stride;
    const bool solved = n > 0 && m > 0;
    if (!solved || n < rows_.size || m < cols_.size)
      for (int64_t k = 0; k < s_.n * s_.m; ++k) plan[k] = 0;
    double error = 0;
    if (solved) {
      for (int64_t i = 0; i < n; ++i) {
        if (!x_.entropic && m == cols_.size)
          for (int64_t j = 0; j < m; ++j) plan[rows_.where[i] * m + j] = T_[i * mp + j];
        else
          for (int64_t j = 0; j < m; ++j) plan[place(i, j)] = T_[i * mp + j];
      }
      x_.gw_cost[problem_] = scalar(objective());  // which leaves the plan's marginals
      for (int64_t i = 0; i < n; ++i) error += std::fabs(double(row_sum_[i]) - rows_.mass[i]);
      for (int64_t j = 0; j < m; ++j) error += std::fabs(double(col_sum_[j]) - cols_.mass[j]);
    } else {
      x_.gw_cost[problem_] = 0;
      for (int64_t i = 0; i < n; ++i) error += rows_.mass[i];
      for (int64_t j = 0; j < m; ++j) error += cols_.mass[j];
    }
    x_.marginal_error[problem_] = scalar(error);
    x_.n_iter[problem_] = static_cast<int32_t>(iterations_);
    x_.converged[problem_] = scalar(change_) <= scalar(x_.bound) && scalar(error) <= scalar(x_.bound);
  }

  // With the means out, its quadratic part is sum_ijkl (C_ik - D_jl + c - d)^2 T_ij T_kl.
  double objective() {
    const int64_t n = rows_.count, m = cols_.count, mp = cols_.stride;
    scalar* gain = inner_.gain();
    between(C_, Dt_, gain);
    for (int64_t j = 0; j < mp; ++j) col_sum_[j] = 0;
    double inner = 0, across = 0;
    for (int64_t i = 0; i < n; ++i) {
      Sum<scalar> row, product, crossed;
      for_columns<scalar>(m, [&](auto zero, int64_t j) HELO_FAST_LAMBDA {
        using vector = decltype(zero);
        const vector T = load<vector>(T_ + i * mp + j);
        row.see(T);
        product.see(T * load<vector>(gain + i * mp + j));
        if (s_.alpha != 1) crossed.see(T * load<vector>(cross_ + i * mp + j));
        store(col_sum_ + j, load<vector>(col_sum_ + j) + T);
      });
      row_sum_[i] = row.result();
      inner += product.result();
      across += crossed.result();
    }
    double mass = 0;
    for (int64_t i = 0; i < n; ++i) mass += row_sum_[i];
    double x = 0, x_square = 0, y = 0, y_square = 0;
    moments(C_, rows_.stride, n, row_sum_, row_mean_, row_square_, x, x_square);
    moments(Dt_, mp, m, col_sum_, col_mean_, col_square_, y, y_square);
    const double shift = double(c_) - d_;
    double quadratic = x_square + y_square - 2 * inner + 2 * shift * (x - y) + shift * shift * mass * mass;
    quadratic = quadratic > 0 ? quadratic : 0;  // below by rounding alone
    return fused_ ? s_.alpha * quadratic + (1 - s_.alpha) * across : quadratic;
  }

  // sum_ik cost_ik w_i w_k, and of the squares.
  static void moments(
      const scalar* cost, int64_t stride, int64_t count, const scalar* weights, scalar* sums, scalar* squares, double& first, double& second) {
    for (int64_t j = 0; j < stride; ++j) sums[j] = squares[j] = 0;
    weigh_rows(cost, stride, weights, count, sums, squares);
    for (int64_t j = 0; j < count; ++j) first += double(weights[j]) * sums[j], second += double(weights[j]) * squares[j];
  }

  const GromovArguments<scalar>& x_;
  const GromovSpaces<scalar>& s_;
  Space<scalar> rows_, cols_;
  PlanSolver<scalar> inner_;
  int64_t problem_ = 0, iterations_ = 1;
  double change_ = 0;
  bool both_ = false, fused_ = false;  // the gradient needs C' T D besides C T D'
  scalar c_ = 0, d_ = 0;               // means
  scalar *C_, *D_, *Dt_;               // [n, n], [m, m] less their means
  scalar *Ct_space_, *Dt_space_;
  scalar *T_, *cross_;                             // [n, m]
  scalar *row_sum_, *row_mean_, *row_square_;      // [n]
  scalar *col_sum_, *col_mean_, *col_square_, *columns_;  // [m]
};

template <typename scalar>
void solve_some(const GromovArguments<scalar>& x, int64_t begin, int64_t end, unsigned char* scratch) {
  Arena arena{scratch};
  GromovSolver<scalar> solver(x, arena);
  for (int64_t problem = begin; problem < end; ++problem) solver.solve(problem);
}

template <typename scalar>
int64_t solve_bytes(const GromovArguments<scalar>& x) {
  Arena arena{nullptr};
  GromovSolver<scalar> solver(x, arena);
  return arena.used;
}

template <typename scalar>
void find_extremes(const GromovSpaces<scalar>& s, scalar* extremes, int64_t begin, int64_t end, unsigned char* scratch) {
  Arena arena{scratch};
  Space<scalar> x(arena, s.n, s.width), y(arena, s.m, s.width);
  for (int64_t problem = begin; problem < end; ++problem) {
    x.select(s.a + problem * s.n);
    y.select(s.b + problem * s.m);
    x.read_tokens(s.x + problem * s.n * s.width);
    y.read_tokens(s.y + problem * s.m * s.width);
    x.find_extremes();
    y.find_extremes();
    const scalar ends[4] = {x.low, x.high, y.low, y.high};
    for (int k = 0; k < 4; ++k) extremes[4 * problem + k] = ends[k];
  }
}

template <typename scalar>
int64_t extremes_bytes(const GromovSpaces<scalar>& s) {
  Arena arena{nullptr};
  Space<scalar> x(arena, s.n, s.width), y(arena, s.m, s.width);
  return arena.used;
}

}  // namespace HELO_FAST_SET
}  // namespace
