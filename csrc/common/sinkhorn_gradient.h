// Sinkhorn's gradient through the fixed point for a team of lanes, in the steps of cpu/sinkhorn_implicit.h, where the derivation stands.
//
// The adjoints x, y of the log scalings solve (1 + lambda_a) r x + T y = w, T' x + (1 + lambda_b) s y = z; then
// d_cost = (T (x + y) - W) / epsilon. The longer side is eliminated at once; what is left is a graph on the shorter side, with
// conductances c = M' M, M = T / sqrt((1 + lambda) mass of the longer side), and one to the ground. It is eliminated node by node: only
// sums of non-negative numbers appear, so nothing cancels. All in double.
//
// Balanced problems do not see the constant (x + c, y - c): it is projected out, and y (x if that side is the shorter) has mean 0.
//
// Everything stays in shared memory: M (longer side by shorter), and where W stood first, then c. Rows are `stride` long: whole
// tiles of 4, and 2 more, so that lanes that read down a column or along a row meet few banks twice. Sums over a side run in one lane,
// or over lanes in a fixed order: the result is the same at every run.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/sinkhorn_gradient_problem.h"
#include "split.h"

namespace helo_fast {

template <typename scalar>
struct SinkhornGradientBatch : SinkhornGradientArguments<scalar> {
  int64_t batch;
};

template <typename scalar, typename Team>
class SinkhornGradient {
 public:
  static constexpr int kLargest = 64;  // of n and m

  // memory: shared_bytes() of shared memory, aligned to 16 bytes.
  HELO_FAST_HD SinkhornGradient(const SinkhornGradientBatch<scalar>& x, double* memory, Team& team)
      : x_(x), team_(team), n_(int(x.n)), m_(int(x.m)), swap_(x.m > x.n), stride_(stride(n_, m_)), sides_(memory),
        M_(memory + 8 * kLargest), c_(M_ + size(kFar) * stride_) {}

  HELO_FAST_HD void differentiate_share(int64_t block, int64_t blocks) {
    for (int64_t problem = block; problem < x_.batch; problem += blocks) differentiate(problem);
  }

  HELO_FAST_HD static int64_t shared_bytes(int64_t n, int64_t m) {
    return (8 * kLargest + 2 * (n > m ? n : m) * stride(int(n), int(m))) * 8;
  }

 private:
  static constexpr double kNoLink = 1e-15;  // of a node's mass: a conductance below is rounding

  // A side is known by whether it is the near one, the shorter, on which the graph stands.
  static constexpr bool kNear = true, kFar = false;
  HELO_FAST_HD bool rows() const { return swap_; }
  HELO_FAST_HD bool columns() const { return !swap_; }
  HELO_FAST_HD int size(bool near) const { return near == swap_ ? n_ : m_; }
  HELO_FAST_HD double lambda(bool near) const { return near == swap_ ? x_.lambda_a : x_.lambda_b; }
  HELO_FAST_HD double* vector(bool near, int which) const { return sides_ + (near ? which : 4 + which) * kLargest; }
  HELO_FAST_HD double* mass(bool near) const { return vector(near, 0); }      // of the plan
  HELO_FAST_HD double* right(bool near) const { return vector(near, 1); }     // w or z
  HELO_FAST_HD double* solution(bool near) const { return vector(near, 2); }  // x or y
  HELO_FAST_HD double* weight(bool near) const { return vector(near, 3); }    // far: 1 / sqrt((1 + lambda) mass); near: see scale()

  HELO_FAST_HD static int stride(int n, int m) { return ((n < m ? n : m) + 3) / 4 * 4 + 2; }
  // Of T_ij in a matrix [far, near].
  HELO_FAST_HD int place(int i, int j) const { return swap_ ? j * stride_ + i : i * stride_ + j; }

  HELO_FAST_HD void differentiate(int64_t problem) {
    problem_ = problem;
    team_.sync();  // the previous problem has been written
    read();
    const bool balanced = x_.lambda_a == 0 && x_.lambda_b == 0;
    add_potential_gradients(balanced);
    scale();
    link();
    eliminate();
    substitute();
    if (balanced) centre();
    write();
  }

  // The plan's entry, and the gradient that reaches it, directly and through transport_cost = <plan, cost>: 0 where the plan is,
  // whatever stands in cost there.
  HELO_FAST_HD void read_entry(int i, int j, double& mass, double& grad) const {
    mass = x_.plan[(problem_ * x_.n + i) * x_.m + j];
    grad = 0;
    if (!(mass > 0)) return;
    if (x_.grad_plan.data) grad = at(x_.grad_plan, i, j);
    if (x_.grad_transport) grad += double(x_.grad_transport[problem_]) * double(at(x_.cost, i, j));
  }

  HELO_FAST_HD scalar at(const Strided<scalar>& from, int64_t i, int64_t j) const {
    return from.data[problem_ * from.batch + i * from.row + j * from.column];
  }

  // T and W, and their sums over both sides.
  HELO_FAST_HD void read() {
    for (int k = team_.lane(); k < size(kFar) * stride_; k += Team::kLanes) M_[k] = c_[k] = 0;
    team_.sync();
    for (int k = team_.lane(); k < n_ * m_; k += Team::kLanes) {
      const int i = k / m_, j = k % m_;
      double mass, grad;
      read_entry(i, j, mass, grad);
      M_[place(i, j)] = mass;
      c_[place(i, j)] = mass * grad;
    }
    team_.sync();
    for (int k = team_.lane(); k < size(kNear) + size(kFar); k += Team::kLanes) {
      const bool of_far = k < size(kFar);
      const int own = of_far ? k : k - size(kFar);
      const int first = of_far ? own * stride_ : own, step = of_far ? 1 : stride_, count = of_far ? size(kNear) : size(kFar);
      double plan = 0, grad = 0;
      for (int e = 0; e < count; ++e) plan += M_[first + e * step], grad += c_[first + e * step];
      mass(!of_far)[own] = plan;
      right(!of_far)[own] = grad;
    }
    team_.sync();
  }

  HELO_FAST_HD const scalar* potential_gradient(bool of_rows) const {
    const scalar* grad = of_rows ? x_.grad_f : x_.grad_g;
    return grad ? grad + problem_ * (of_rows ? x_.n : x_.m) : nullptr;
  }

  // epsilon f_bar into w and epsilon g_bar into z; if balanced, less its component along (1, -1). W itself has none.
  HELO_FAST_HD void add_potential_gradients(bool balanced) {
    if (!x_.grad_f && !x_.grad_g) return;
    double excess = 0, count = 0;
    for (int k = team_.lane(); k < n_ + m_; k += Team::kLanes) {
      const bool of_rows = k < n_;
      const int own = of_rows ? k : k - n_;
      const bool side = of_rows ? rows() : columns();
      if (!(mass(side)[own] > 0)) continue;
      const scalar* grad = potential_gradient(of_rows);
      const double change = grad ? x_.epsilon * double(grad[own]) : 0;
      right(side)[own] += change;
      excess += of_rows ? change : -change;
      ++count;
    }
    if (balanced) {
      excess = reduce_all(team_, excess, Plus());
      count = reduce_all(team_, count, Plus());
      for (int k = team_.lane(); k < n_ + m_; k += Team::kLanes) {
        const bool of_rows = k < n_;
        const int own = of_rows ? k : k - n_;
        const bool side = of_rows ? rows() : columns();
        if (mass(side)[own] > 0) right(side)[own] -= (of_rows ? excess : -excess) / count;
      }
    }
    team_.sync();
  }

  // T becomes M; right-hand side and ground of what is left.
  HELO_FAST_HD void scale() {
    for (int i = team_.lane(); i < size(kFar); i += Team::kLanes)
      weight(kFar)[i] = mass(kFar)[i] > 0 ? 1 / std::sqrt((1 + lambda(kFar)) * mass(kFar)[i]) : 0;
    team_.sync();
    for (int k = team_.lane(); k < size(kFar) * stride_; k += Team::kLanes) M_[k] *= weight(kFar)[k / stride_];
    team_.sync();
    const double grounding = lambda(kNear) + lambda(kFar) / (1 + lambda(kFar));
    for (int j = team_.lane(); j < size(kNear); j += Team::kLanes) {
      double sum = 0;
      for (int i = 0; i < size(kFar); ++i) sum += weight(kFar)[i] * right(kFar)[i] * M_[i * stride_ + j];
      right(kNear)[j] -= sum;
      weight(kNear)[j] = grounding * mass(kNear)[j];
    }
    put_heaviest_last();
  }

  // The last node takes up what rounding left of the others' right-hand sides: it must not be one of next to no mass.
  HELO_FAST_HD void put_heaviest_last() {
    const int last = size(kNear) - 1;
    heaviest_ = last;
    for (int j = 0; j < last; ++j)
      if (mass(kNear)[j] > 1e3 * mass(kNear)[heaviest_]) heaviest_ = j;
    team_.sync();
    if (heaviest_ != last) {
      swap_with_last(mass(kNear)), swap_with_last(right(kNear)), swap_with_last(weight(kNear));
      for (int i = team_.lane(); i < size(kFar); i += Team::kLanes) swap(M_[i * stride_ + heaviest_], M_[i * stride_ + last]);
    }
    team_.sync();
  }

  HELO_FAST_HD static void swap(double& x, double& y) {
    const double kept = x;
    x = y, y = kept;
  }
  HELO_FAST_HD void swap_with_last(double* values) {
    if (team_.lane() == 0) swap(values[heaviest_], values[size(kNear) - 1]);
  }

  // The upper triangle of c = M' M, in tiles of 4 x 4, a lane each.
  HELO_FAST_HD void link() {
    const int tiles = (size(kNear) + 3) / 4;
    for (int t = team_.lane(); t < tiles * (tiles + 1) / 2; t += Team::kLanes) {
      int row = 0, rest = t;
      while (rest >= tiles - row) rest -= tiles - row++;
      const int j = 4 * row, k = 4 * (row + rest);
      double sum[4][4] = {};
      for (int i = 0; i < size(kFar); ++i) {
        const double *left = M_ + i * stride_ + j, *other = M_ + i * stride_ + k;
        HELO_FAST_UNROLL
        for (int p = 0; p < 4; ++p) {
          HELO_FAST_UNROLL
          for (int q = 0; q < 4; ++q) sum[p][q] += left[p] * other[q];
        }
      }
      HELO_FAST_UNROLL
      for (int p = 0; p < 4; ++p) {
        HELO_FAST_UNROLL
        for (int q = 0; q < 4; ++q)
          if (j + p < size(kNear)) c_[(j + p) * stride_ + k + q] = sum[p][q];
      }
    }
    team_.sync();
  }

  // Takes the nodes out one by one: a star becomes a mesh, c_jk += c_ji c_ik / d_i, and so with ground and right-hand side.
  HELO_FAST_HD void eliminate() {
    constexpr int kWarp = 32, kWarps = Team::kLanes / kWarp;
    const int warp = team_.lane() / kWarp, lane = team_.lane() % kWarp, nodes = size(kNear);
    for (int i = 0; i < nodes; ++i) {
      const double* row = c_ + i * stride_;
      double pivot = 0;  // every warp adds it up
      for (int k = i + 1 + lane; k < nodes; k += kWarp) pivot += row[k];
      for (int mask = 1; mask < kWarp; mask *= 2) pivot += team_.exchange(pivot, mask);
      pivot += weight(kNear)[i];
      const double inverse = pivot > kNoLink * mass(kNear)[i] ? 1 / pivot : 0, ground = weight(kNear)[i], right_i = right(kNear)[i];
      for (int j = i + 1 + warp; j < nodes; j += kWarps) {
        const double factor = inverse * row[j];
        for (int k = j + 1 + lane; k < nodes; k += kWarp) c_[j * stride_ + k] += factor * row[k];
        if (lane == 0) weight(kNear)[j] += factor * ground, right(kNear)[j] += factor * right_i;
      }
      team_.sync();
      if (team_.lane() == 0) weight(kNear)[i] = inverse;
    }
    team_.sync();
  }

  // Back through the nodes, then x from y.
  HELO_FAST_HD void substitute() {
    for (int i = size(kNear) - 1; i >= 0; --i) {
      const double y = weight(kNear)[i] * right(kNear)[i];
      if (team_.lane() == 0) solution(kNear)[i] = y;
      for (int k = team_.lane(); k < i; k += Team::kLanes) right(kNear)[k] += c_[k * stride_ + i] * y;
      team_.sync();
    }
    for (int i = team_.lane(); i < size(kFar); i += Team::kLanes) {
      double sum = 0;
      for (int j = 0; j < size(kNear); ++j) sum += M_[i * stride_ + j] * solution(kNear)[j];
      solution(kFar)[i] = weight(kFar)[i] * (weight(kFar)[i] * right(kFar)[i] - sum);
    }
    team_.sync();
    if (heaviest_ != size(kNear) - 1) swap_with_last(mass(kNear)), swap_with_last(solution(kNear));
    team_.sync();
  }

  // Moves a constant between the sides, so that the near one has mean 0.
  HELO_FAST_HD void centre() {
    double mean = 0, count = 0;
    for (int j = team_.lane(); j < size(kNear); j += Team::kLanes)
      if (mass(kNear)[j] > 0) mean += solution(kNear)[j], ++count;
    mean = reduce_all(team_, mean, Plus());
    count = reduce_all(team_, count, Plus());
    mean /= count > 0 ? count : 1;
    for (int j = team_.lane(); j < size(kNear); j += Team::kLanes) solution(kNear)[j] -= mean;
    for (int i = team_.lane(); i < size(kFar); i += Team::kLanes) solution(kFar)[i] += mean;
    team_.sync();
  }

  HELO_FAST_HD void write() {
    const double per_epsilon = 1 / x_.epsilon, envelope = x_.grad_transport ? double(x_.grad_transport[problem_]) : 0;
    for (int k = team_.lane(); k < n_ * m_; k += Team::kLanes) {
      const int i = k / m_, j = k % m_;
      double mass, grad;
      read_entry(i, j, mass, grad);
      const double change = solution(rows())[i] + solution(columns())[j] - grad;
      x_.d_cost[problem_ * x_.n * x_.m + k] = scalar(mass * (change * per_epsilon + envelope));
    }
    write_marginal(true, x_.a, x_.d_a);
    write_marginal(false, x_.b, x_.d_b);
  }

  HELO_FAST_HD void write_marginal(bool of_rows, const scalar* given, scalar* out) {
    const scalar* grad = potential_gradient(of_rows);
    const bool side = of_rows ? rows() : columns();
    for (int k = team_.lane(); k < size(side); k += Team::kLanes) {
      const int64_t at = problem_ * size(side) + k;
      const double flow = (1 + lambda(side)) * mass(side)[k] * solution(side)[k] - (grad ? x_.epsilon * double(grad[k]) : 0);
      out[at] = given[at] > 0 ? scalar(flow / double(given[at])) : scalar(0);
    }
  }

  const SinkhornGradientBatch<scalar>& x_;
  Team& team_;
  const int n_, m_;
  const bool swap_;  // n < m: the rows are the near side
  const int stride_;
  double* const sides_;
  double *const M_, *const c_;  // [far, stride]
  int64_t problem_ = 0;
  int heaviest_ = 0;
};

}  // namespace helo_fast
