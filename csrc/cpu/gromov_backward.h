// The envelope gradient of gromov's objective, one problem at a time, for one instruction set (see each_set.h):
//     d_C = w (C r r' - T D T'), d_D = w (D s s' - T' C T), d_M = (1 - alpha) grad T,   w = 2 alpha grad, r = T 1, s = T' 1,
// entry by entry in the first terms. Of tokens it goes on through the costs: C = relu(c - t) with t = low + share (high - low), the
// gradient of low and high in equal parts to the pairs that are them; c = 1 - u u'; u = x / norm. Scratch is O((n + m)^2).
#include "gromov_solver.h"

namespace {
namespace HELO_FAST_SET {

template <typename scalar>
class GromovBackward {
 public:
  using V = Vectors<scalar>;
  using full = typename V::full;

  GromovBackward(const GromovGradients<scalar>& g, Arena& arena)
      : g_(g), s_(g.spaces), x_(arena, s_.n, s_.width), y_(arena, s_.m, s_.width) {
    const int64_t n = padded_rows(s_.n), m = padded_rows(s_.m), nl = padded<scalar>(s_.n), ml = padded<scalar>(s_.m);
    const int64_t wide = padded<scalar>(s_.width);
    T_ = arena.take<scalar>(n * ml);
    Tt_ = arena.take<scalar>(m * nl);
    between_ = arena.take<scalar>(n * ml > m * nl ? n * ml : m * nl);
    for (scalar** p : {&C_, &d_C_}) *p = arena.take<scalar>(n * nl);
    for (scalar** p : {&D_, &d_D_}) *p = arena.take<scalar>(m * ml);
    r_ = arena.take<scalar>(nl);
    s_sum_ = arena.take<scalar>(ml);
    d_unit_x_ = arena.take<scalar>(n * wide);
    d_unit_y_ = arena.take<scalar>(m * wide);
    across_ = arena.take<scalar>((n > m ? n : m) * wide);
  }

  void solve(int64_t problem) {
    problem_ = problem;
    read();
    find_cost_gradients();
    const int64_t n = s_.n, m = s_.m, width = s_.width;
    if (!width) {
      scatter(x_, d_C_, g_.d_x + problem * n * n);
      scatter(y_, d_D_, g_.d_y + problem * m * m);
    } else {
      x_.normalise();
      y_.normalise();
      through_costs(x_, d_C_, g_.threshold_gradients, d_unit_x_);
      through_costs(y_, d_D_, g_.threshold_gradients ? g_.threshold_gradients + 2 : nullptr, d_unit_y_);
      if (s_.alpha < 1 && !g_.d_xy) {
        add_across(T_, y_.stride, x_, y_, d_unit_x_);
        add_across(Tt_, x_.stride, y_, x_, d_unit_y_);
      }
      through_norm(x_, d_unit_x_, g_.d_x + problem * n * width);
      through_norm(y_, d_unit_y_, g_.d_y + problem * m * width);
    }
    if (g_.d_xy)
      for (int64_t k = problem * n * m; k < (problem + 1) * n * m; ++k)
        g_.d_xy[k] = scalar(1 - s_.alpha) * g_.grad_cost[problem] * g_.plan[k];
  }

  // What a threshold over the batch needs of each problem: minus the sum of the costs' gradient, and how many pairs are at either
  // extreme; for x, then y.
  void add_up(int64_t problem, double* sums) {
    problem_ = problem;
    read();
    find_cost_gradients();
    measure(x_, d_C_, sums);
    measure(y_, d_D_, sums + 3);
  }

 private:
  void read() {
    const int64_t n = s_.n, m = s_.m;
    const scalar* plan = g_.plan + problem_ * n * m;
    if (s_.width) {
      x_.select(s_.a + problem_ * n);
      y_.select(s_.b + problem_ * m);
      x_.read_tokens(s_.x + problem_ * n * s_.width);
      y_.read_tokens(s_.y + problem_ * m * s_.width);
      if (s_.extremes) {
        x_.low = s_.extremes[0], x_.high = s_.extremes[1], y_.low = s_.extremes[2], y_.high = s_.extremes[3];
      } else {
        x_.find_extremes();
        y_.find_extremes();
      }
    } else {
      for (int64_t i = 0; i < n; ++i) r_[i] = 0;
      for (int64_t j = 0; j < m; ++j) s_sum_[j] = 0;
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < m; ++j) r_[i] += plan[i * m + j], s_sum_[j] += plan[i * m + j];
      x_.select(r_);
      y_.select(s_sum_);
      x_.read_cost(s_.cost_x + problem_ * n * n);
      y_.read_cost(s_.cost_y + problem_ * m * m);
    }
    copy_cost(x_, C_);
    copy_cost(y_, D_);
    for (int64_t i = 0; i < x_.count; ++i)
      for (int64_t j = 0; j < y_.stride; ++j) T_[i * y_.stride + j] = j < y_.count ? plan[x_.where[i] * m + y_.where[j]] : 0;
    transpose(T_, y_.stride, x_.count, y_.count, Tt_, x_.stride);
  }

  // The space keeps the cosine costs, which tell who is at an extreme.
  void copy_cost(const Space<scalar>& side, scalar* cost) const {
    const scalar t = s_.width ? side.threshold(s_.threshold) : 0;
    for (int64_t i = 0; i < side.count; ++i)
      for (int64_t j = 0; j < side.stride; ++j) {
        const scalar c = side.cost[i * side.stride + j] - t;
        cost[i * side.stride + j] = j >= side.count || (s_.width && !(c > 0)) ? 0 : c;
      }
  }

  void find_cost_gradients() {
    const scalar weight = 2 * (g_.fused ? scalar(s_.alpha) : 1) * g_.grad_cost[problem_];
    one_side(T_, Tt_, C_, D_, x_, y_, r_, weight, d_C_);
    one_side(Tt_, T_, D_, C_, y_, x_, s_sum_, weight, d_D_);
  }

  void one_side(
      const scalar* T, const scalar* Tt, const scalar* own, const scalar* other, const Space<scalar>& side, const Space<scalar>& opposite,
      scalar* marginal, scalar weight, scalar* gradient) {
    const int64_t n = side.count, m = opposite.count, stride = side.stride;
    product(T, opposite.stride, other, opposite.stride, n, m, opposite.stride, between_, opposite.stride);
    product(between_, opposite.stride, Tt, stride, n, m, stride, gradient, stride);
    for (int64_t i = 0; i < stride; ++i) marginal[i] = 0;
    for (int64_t j = 0; j < m; ++j)
      for (int64_t i = 0; i < stride; ++i) marginal[i] += Tt[j * stride + i];
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < stride; ++k) {
        scalar& d = gradient[i * stride + k];
        d = weight * (own[i * stride + k] * marginal[i] * marginal[k] - d);
        if (s_.width && !(own[i * stride + k] > 0)) d = 0;  // below the threshold
      }
  }

  void measure(const Space<scalar>& side, const scalar* gradient, double* sums) const {
    double sum = 0;
    int64_t at_low = 0, at_high = 0;
    for (int64_t i = 0; i < side.count; ++i)
      for (int64_t j = 0; j < side.count; ++j) {
        sum -= gradient[i * side.stride + j];
        at_low += side.cost[i * side.stride + j] == side.low;
        at_high += side.cost[i * side.stride + j] == side.high;
      }
    sums[0] = sum, sums[1] = double(at_low), sums[2] = double(at_high);
  }

  // of_ends: what each pair at (low, high) receives; null: found here, for this problem alone.
  void through_costs(const Space<scalar>& side, scalar* gradient, const double* of_ends, scalar* d_unit) {
    const int64_t n = side.count, stride = side.stride, wide = padded<scalar>(s_.width);
    double own[2];
    if (!of_ends) {
      double sums[3];
      measure(side, gradient, sums);
      own[0] = (1 - s_.threshold) * sums[0] / larger(sums[1], 1.0);
      own[1] = s_.threshold * sums[0] / larger(sums[2], 1.0);
      of_ends = own;
    }
    const scalar at_low = scalar(of_ends[0]), at_high = scalar(of_ends[1]);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const scalar c = side.cost[i * stride + j];
        gradient[i * stride + j] += (c == side.low ? at_low : 0) + (c == side.high ? at_high : 0);
      }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j <= i; ++j) gradient[i * stride + j] = gradient[j * stride + i] = -(gradient[i * stride + j] + gradient[j * stride + i]);
    product(gradient, stride, side.unit, wide, n, n, wide, d_unit, wide);
  }

  // The cosine costs across.
  void add_across(const scalar* T, int64_t T_stride, const Space<scalar>& side, const Space<scalar>& opposite, scalar* d_unit) {
    const int64_t wide = padded<scalar>(s_.width);
    const scalar weight = scalar(1 - s_.alpha) * g_.grad_cost[problem_];
    product(T, T_stride, opposite.unit, wide, side.count, opposite.count, wide, across_, wide);
    for (int64_t k = 0; k < side.count * wide; ++k) d_unit[k] -= weight * across_[k];
  }

  void through_norm(const Space<scalar>& side, const scalar* d_unit, scalar* out) const {
    const int64_t wide = padded<scalar>(s_.width);
    if (side.count < side.size)
      for (int64_t k = 0; k < side.size * side.width; ++k) out[k] = 0;
    for (int64_t i = 0; i < side.count; ++i) {
      const scalar *unit = side.unit + i * wide, *d = d_unit + i * wide;
      full dots = {};
      for (int64_t k = 0; k < wide; k += V::lanes) dots += load<full>(unit + k) * load<full>(d + k);
      const bool floored = !(side.norm[i] > scalar(kNormFloor));  // then the norm is a constant
      const scalar along = floored ? 0 : scalar(sum_lanes<scalar>(dots)), scale = 1 / (floored ? scalar(kNormFloor) : side.norm[i]);
      for (int64_t k = 0; k < side.width; ++k) out[side.where[i] * side.width + k] = (d[k] - along * unit[k]) * scale;
    }
  }

  static void scatter(const Space<scalar>& side, const scalar* gradient, scalar* out) {
    if (side.count < side.size)
      for (int64_t k = 0; k < side.size * side.size; ++k) out[k] = 0;
    for (int64_t i = 0; i < side.count; ++i)
      for (int64_t j = 0; j < side.count; ++j) out[side.where[i] * side.size + side.where[j]] = gradient[i * side.stride + j];
  }

  const GromovGradients<scalar>& g_;
  const GromovSpaces<scalar>& s_;
  Space<scalar> x_, y_;
  int64_t problem_ = 0;
  scalar *T_, *Tt_, *between_;                   // [n, m], [m, n], either
  scalar *C_, *d_C_, *D_, *d_D_;                 // [n, n], [m, m]: costs above the threshold, their gradients
  scalar *r_, *s_sum_;                           // [n], [m]: the plan's marginals
  scalar *d_unit_x_, *d_unit_y_, *across_;       // [n, width], [m, width], either
};

template <typename scalar>
void differentiate_some(const GromovGradients<scalar>& g, int64_t begin, int64_t end, unsigned char* scratch) {
  Arena arena{scratch};
  GromovBackward<scalar> backward(g, arena);
  for (int64_t problem = begin; problem < end; ++problem) backward.solve(problem);
}

template <typename scalar>
void add_up_some(const GromovGradients<scalar>& g, double* sums, int64_t begin, int64_t end, unsigned char* scratch) {
  Arena arena{scratch};
  GromovBackward<scalar> backward(g, arena);
  for (int64_t problem = begin; problem < end; ++problem) backward.add_up(problem, sums + 6 * problem);
}

template <typename scalar>
int64_t differentiate_bytes(const GromovGradients<scalar>& g) {
  Arena arena{nullptr};
  GromovBackward<scalar> backward(g, arena);
  return arena.used;
}

template <typename scalar>
constexpr GromovKernel<scalar> gromov = {
    solve_some<scalar>,     solve_bytes<scalar>, find_extremes<scalar>,       extremes_bytes<scalar>,
    differentiate_some<scalar>, add_up_some<scalar>, differentiate_bytes<scalar>};

}  // namespace HELO_FAST_SET
}  // namespace
