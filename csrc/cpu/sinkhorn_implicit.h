// Sinkhorn's gradient through the fixed point, one problem at a time, for one instruction set (see each_set.h).
//
// T is the plan, r = T 1, s = T' 1, lambda = epsilon / tau (0 if balanced), W the incoming gradient times T. The optimality
// conditions give a symmetric system for the adjoints x, y of the log scalings,
//   (1 + lambda_a) r_i x_i + sum_j T_ij y_j = w_i = sum_j W_ij + epsilon f_bar_i,
//   sum_i T_ij x_i + (1 + lambda_b) s_j y_j = z_j = sum_i W_ij + epsilon g_bar_j,
// whose solution makes d_cost = (T (x + y) - W) / epsilon. Eliminating the longer side leaves the Laplacian of a graph, with the
// conductance c_jk = sum_i T_ij T_ik / ((1 + lambda_a) r_i) between j and k and a conductance e_j >= 0 to the ground.
//
// Up to kDirect nodes it is eliminated node by node. Only c, e and their sums appear, all non-negative: nothing cancels, so the
// factor is exact to a few roundings per entry, however badly conditioned the system is. Larger ones are solved by conjugate
// gradients, two passes over the plan per iteration. All in double: weak links between parts of the plan decide x and y, and their
// right-hand sides are what is left of sums of ordinary size.
//
// Balanced problems do not see the constant (x + c, y - c). It is projected out of the right-hand side; y (x if that side is the
// shorter) has mean 0 in the solution. A part of the graph without a link to the rest is grounded at one of its nodes.
//
// Memory: plan and incoming gradient are read twice, d_cost written once; scratch O(n m) up to kDirect nodes, then O(n + m).

namespace {
namespace HELO_FAST_SET {

constexpr int64_t kDirect = 256;      // nodes that elimination serves: where it takes as long as conjugate gradients
constexpr double kTolerance = 1e-13;  // of conjugate gradients, on the residual
constexpr double kNoLink = 1e-15;     // of a node's mass: a conductance below is rounding

template <typename scalar>
class ImplicitGradient {
 public:
  ImplicitGradient(const SinkhornGradientArguments<scalar>& x, unsigned char* scratch) : x_(x), np_(padded(x.n)), mp_(padded(x.m)) {
    Workspace workspace(scratch);
    for (double** p : {&rows_.mass, &rows_.right, &rows_.solution, &rows_.weight}) *p = workspace.take<double>(np_);
    for (double** p : {&columns_.mass, &columns_.right, &columns_.solution, &columns_.weight}) *p = workspace.take<double>(mp_);
    for (double** p : {&plan_row_, &grad_row_, &cost_row_, &residual_, &direction_, &product_}) *p = workspace.take<double>(mp_);
    rows_.size = x.n, rows_.padded_size = np_, rows_.lambda = x.lambda_a;
    columns_.size = x.m, columns_.padded_size = mp_, columns_.lambda = x.lambda_b;
    if (!direct(x.n, x.m)) return;
    const Side& near = x.m > x.n ? rows_ : columns_;
    const Side& far = x.m > x.n ? columns_ : rows_;
    matrix_ = workspace.take<double>(far.size * near.padded_size);
    links_ = workspace.take<double>(near.padded_size * near.padded_size);
    ground_ = workspace.take<double>(near.padded_size);
    inverse_pivot_ = workspace.take<double>(near.padded_size);
  }

  static int64_t scratch_bytes(int64_t n, int64_t m) {
    const int64_t np = padded(n), mp = padded(m), near = np < mp ? np : mp;
    return ((4 * np + 10 * mp) + (direct(n, m) ? (np > mp ? np : mp) * near + near * near + 2 * near : 0)) * 8 + 18 * 64;
  }

  void differentiate(int64_t problem) {
    const bool swap = x_.m > x_.n, small = direct(x_.n, x_.m);
    Side &near = swap && small ? rows_ : columns_, &far = swap && small ? columns_ : rows_;
    read(problem, small, swap);
    const bool balanced = x_.lambda_a == 0 && x_.lambda_b == 0;
    add_potential_gradients(problem, balanced);
    for (int64_t i = 0; i < far.padded_size; ++i) far.weight[i] = far.mass[i] > 0 ? 1 / ((1 + far.lambda) * far.mass[i]) : 0;
    small ? eliminate(near, far) : iterate(problem);
    if (balanced) center(swap ? rows_ : columns_, swap ? columns_ : rows_);
    write(problem);
  }

 private:
  struct Side {
    int64_t size, padded_size;
    double lambda;
    double *mass, *right, *solution, *weight;  // of the plan; w or z; x or y; 1 / ((1 + lambda) mass) where eliminated
  };

  static bool direct(int64_t n, int64_t m) { return (n < m ? n : m) <= kDirect; }

  void read_plan_row(int64_t problem, int64_t i) { widen(x_.plan + (problem * x_.n + i) * x_.m, x_.m, plan_row_, mp_); }

  // Sums of the plan and of W over rows and columns; the plan itself into matrix_, a row per eliminated node.
  void read(int64_t problem, bool keep, bool swap) {
    for (int64_t k = 0; k < np_; ++k) rows_.mass[k] = rows_.right[k] = 0;
    for (int64_t k = 0; k < mp_; ++k) columns_.mass[k] = columns_.right[k] = 0;
    for (int64_t i = 0; i < x_.n; ++i) {
      read_rows(x_, problem, i, plan_row_, grad_row_, cost_row_);
      Doubles mass = {}, right = {};
      for (int64_t k = 0; k < mp_; k += kLanes) {
        const Doubles T = load<Doubles>(plan_row_ + k), W = T * load<Doubles>(grad_row_ + k);
        mass += T;
        right += W;
        store(columns_.mass + k, load<Doubles>(columns_.mass + k) + T);
        store(columns_.right + k, load<Doubles>(columns_.right + k) + W);
        if (keep && !swap) store(matrix_ + i * mp_ + k, T);
      }
      rows_.mass[i] = sum_of<double>(mass);
      rows_.right[i] = sum_of<double>(right);
      if (keep && swap)
        for (int64_t j = 0; j < x_.m; ++j) matrix_[j * np_ + i] = plan_row_[j];
    }
    if (keep && swap)
      for (int64_t j = 0; j < x_.m; ++j)
        for (int64_t i = x_.n; i < np_; ++i) matrix_[j * np_ + i] = 0;
  }

  // epsilon f_bar into w and epsilon g_bar into z; if balanced, less its component along (1, -1). W itself has none, and the rounding
  // of its sums stays where it is: shared out equally, it would be large beside a tiny mass.
  void add_potential_gradients(int64_t problem, bool balanced) {
    double excess = 0;
    int64_t count = 0;
    for (Side* side : {&rows_, &columns_}) {
      const scalar* grad = potential_gradient(*side, problem);
      for (int64_t i = 0; i < side->size; ++i) {
        if (!(side->mass[i] > 0)) continue;
        ++count;
        const double change = grad ? x_.epsilon * grad[i] : 0;
        side->right[i] += change;
        excess += side == &rows_ ? change : -change;
      }
    }
    if (!balanced || excess == 0) return;
    excess /= count;
    for (int64_t i = 0; i < x_.n; ++i) rows_.right[i] -= rows_.mass[i] > 0 ? excess : 0;
    for (int64_t j = 0; j < x_.m; ++j) columns_.right[j] += columns_.mass[j] > 0 ? excess : 0;
  }

  const scalar* potential_gradient(const Side& side, int64_t problem) const {
    const scalar* grad = &side == &rows_ ? x_.grad_f : x_.grad_g;
    return grad ? grad + problem * side.size : nullptr;
  }

  // Moves a constant from one side to the other, so that the first has mean 0.
  static void center(Side& side, Side& other) {
    double mean = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < side.size; ++i)
      if (side.mass[i] > 0) mean += side.solution[i], ++count;
    mean /= count > 0 ? count : 1;
    for (int64_t i = 0; i < side.size; ++i) side.solution[i] -= mean;
    for (int64_t i = 0; i < other.size; ++i) other.solution[i] += mean;
  }

  // Directly: matrix_ [far, near] becomes T / sqrt((1 + lambda) mass of far), so that c = matrix' matrix.
  void eliminate(Side& near, Side& far) {
    const int64_t stride = near.padded_size;
    const double grounding = near.lambda + far.lambda / (1 + far.lambda);
    for (int64_t j = 0; j < stride; ++j) ground_[j] = grounding * near.mass[j];
    double* root = far.weight;
    for (int64_t i = 0; i < far.size; ++i) root[i] = std::sqrt(root[i]);
    for (int64_t i = 0; i < far.size; ++i) {
      double* row = matrix_ + i * stride;
      for (int64_t k = 0; k < stride; k += kLanes) store(row + k, root[i] * load<Doubles>(row + k));
      add_scaled(near.right, -root[i] * far.right[i], row, stride);
    }
    const int64_t heaviest = heaviest_to_the_end(near, far.size);
    link(far.size, stride);
    factor(near);
    substitute(near);
    for (int64_t i = 0; i < far.size; ++i)
      far.solution[i] = root[i] * (root[i] * far.right[i] - dot(matrix_ + i * stride, near.solution, stride));
    swap_with_last(near.mass, near.size, heaviest);
    swap_with_last(near.solution, near.size, heaviest);
  }

  static void swap_with_last(double* values, int64_t size, int64_t i) {
    const double last = values[size - 1];
    values[size - 1] = values[i];
    values[i] = last;
  }

  // The last node takes up what rounding left of the others' right-hand sides: it must not be one of next to no mass.
  int64_t heaviest_to_the_end(Side& near, int64_t far_size) {
    int64_t heaviest = near.size - 1;
    for (int64_t j = 0; j < near.size; ++j)
      if (near.mass[j] > 1e3 * near.mass[heaviest]) heaviest = j;
    if (heaviest == near.size - 1) return heaviest;
    for (double* values : {near.mass, near.right, ground_}) swap_with_last(values, near.size, heaviest);
    for (int64_t i = 0; i < far_size; ++i) swap_with_last(matrix_ + i * near.padded_size, near.size, heaviest);
    return heaviest;
  }

  // The upper triangle of c = matrix' matrix, with whatever comes along below the diagonal, in tiles of 4 x 3 vectors.
  void link(int64_t far_size, int64_t stride) {
    for (int64_t j = 0; j < stride; j += 4) {
      int64_t k = j / kLanes * kLanes;
      for (; k + 3 * kLanes <= stride; k += 3 * kLanes) link_tile<3>(far_size, stride, j, k);
      if (k + 2 * kLanes <= stride)
        link_tile<2>(far_size, stride, j, k);
      else if (k < stride)
        link_tile<1>(far_size, stride, j, k);
    }
  }

  template <int vectors>
  void link_tile(int64_t far_size, int64_t stride, int64_t j, int64_t k) {
    Doubles sum[4][vectors] = {};
    for (int64_t i = 0; i < far_size; ++i) {
      const double* row = matrix_ + i * stride;
#pragma GCC unroll 4
      for (int q = 0; q < vectors; ++q) {
        const Doubles T = load<Doubles>(row + k + q * kLanes);
#pragma GCC unroll 4
        for (int p = 0; p < 4; ++p) sum[p][q] += row[j + p] * T;
      }
    }
    for (int p = 0; p < 4; ++p)
      for (int q = 0; q < vectors; ++q) store(links_ + (j + p) * stride + k + q * kLanes, sum[p][q]);
  }

  // Takes the nodes out one by one: a star becomes a mesh, c_jk += c_ji c_ik / d_i, and so with ground and right-hand side.
  // Four at a time: each changes the other three at once, the rows below wait for all four.
  void factor(Side& near) {
    const int64_t stride = near.padded_size;
    Longs lane;
    for (int64_t k = 0; k < kLanes; ++k) lane[k] = k;
    for (int64_t i = 0; i < stride; i += 4) {
      double* rows[4] = {links_ + i * stride, links_ + (i + 1) * stride, links_ + (i + 2) * stride, links_ + (i + 3) * stride};
      for (int64_t p = 0; p < 4; ++p) {
        const int64_t first = (i + p) / kLanes * kLanes, size = stride - first;
        double* row = rows[p] + first;
        Doubles sum = only_where(lane > i + p - first, load<Doubles>(row));
        store(row, sum);  // nothing up to the diagonal
        for (int64_t k = kLanes; k < size; k += kLanes) sum += load<Doubles>(row + k);
        const double pivot = ground_[i + p] + sum_of<double>(sum);
        const double inverse = pivot > kNoLink * near.mass[i + p] ? 1 / pivot : 0;
        inverse_pivot_[i + p] = inverse;
        for (int64_t q = p + 1; q < 4; ++q) add_scaled(rows[q] + first, inverse * rows[p][i + q], row, size);
        add_scaled(ground_ + first, inverse * ground_[i + p], row, size);
        add_scaled(near.right + first, inverse * near.right[i + p], row, size);
      }
      for (int64_t j = i + 4; j < near.size; ++j) {
        double factors[4];
        for (int64_t p = 0; p < 4; ++p) factors[p] = inverse_pivot_[i + p] * rows[p][j];
        for (int64_t k = j / kLanes * kLanes; k < stride; k += kLanes) {
          Doubles sum = load<Doubles>(links_ + j * stride + k);
#pragma GCC unroll 4
          for (int64_t p = 0; p < 4; ++p) sum += factors[p] * load<Doubles>(rows[p] + k);
          store(links_ + j * stride + k, sum);
        }
      }
    }
  }

  // Back through the nodes, four at a time.
  void substitute(Side& near) {
    const int64_t stride = near.padded_size;
    double* y = near.solution;
    for (int64_t j = 0; j < stride; ++j) y[j] = 0;
    for (int64_t i = stride - 4; i >= 0; i -= 4) {
      const int64_t first = i / kLanes * kLanes;
      double sum[4];
      for (int64_t p = 0; p < 4; ++p)
        sum[p] = near.right[i + p] + dot(links_ + (i + p) * stride + first, y + first, stride - first);
      for (int64_t p = 3; p >= 0; --p) {
        for (int64_t q = p + 1; q < 4; ++q) sum[p] += links_[(i + p) * stride + i + q] * y[i + q];
        y[i + p] = inverse_pivot_[i + p] * sum[p];
      }
    }
  }

  // y by conjugate gradients, preconditioned by the diagonal; x from y.
  void iterate(int64_t problem) {
    const double grounding = columns_.lambda + rows_.lambda / (1 + rows_.lambda);
    double *y = columns_.solution, *z = columns_.right, *inverse_diagonal = columns_.weight;
    for (int64_t j = 0; j < mp_; ++j) {
      residual_[j] = z[j];
      inverse_diagonal[j] = grounding * columns_.mass[j];
      y[j] = direction_[j] = 0;
    }
    for (int64_t i = 0; i < x_.n; ++i) {
      read_plan_row(problem, i);
      add_scaled(residual_, -rows_.weight[i] * rows_.right[i], plan_row_, mp_);
      const double weight = rows_.weight[i], mass = rows_.mass[i];
      for (int64_t j = 0; j < mp_; ++j) inverse_diagonal[j] += plan_row_[j] * weight * (mass - plan_row_[j]);
    }
    double scale = 0;  // of a residual that is all rounding
    for (int64_t j = 0; j < mp_; ++j) {
      inverse_diagonal[j] = inverse_diagonal[j] > kNoLink * columns_.mass[j] ? 1 / inverse_diagonal[j] : 0;
      scale += inverse_diagonal[j] * z[j] * z[j];
    }
    double left = weighted_square(residual_), previous = HUGE_VAL;
    const double enough = left * kTolerance * kTolerance + scale * 1e-32;
    for (int64_t step = 0; step < 2 * x_.m + 50 && left > enough; ++step) {
      const double ratio = left / previous;
      for (int64_t j = 0; j < mp_; ++j) direction_[j] = inverse_diagonal[j] * residual_[j] + ratio * direction_[j];
      apply(problem);
      const double curvature = dot(direction_, product_, mp_);
      if (!(curvature > 0)) break;  // rounding
      add_scaled(y, left / curvature, direction_, mp_);
      add_scaled(residual_, -left / curvature, product_, mp_);
      previous = left;
      left = weighted_square(residual_);
    }
    for (int64_t i = 0; i < x_.n; ++i) {
      read_plan_row(problem, i);
      rows_.solution[i] = rows_.weight[i] * (rows_.right[i] - dot(plan_row_, y, mp_));
    }
  }

  double weighted_square(const double* values) const {
    Doubles sum = {};
    for (int64_t j = 0; j < mp_; j += kLanes) {
      const Doubles v = load<Doubles>(values + j);
      sum += load<Doubles>(columns_.weight + j) * v * v;
    }
    return sum_of<double>(sum);
  }

  // product = ((1 + lambda_b) diag(s) - T' diag(1 / ((1 + lambda_a) r)) T) direction
  void apply(int64_t problem) {
    for (int64_t j = 0; j < mp_; ++j) product_[j] = (1 + columns_.lambda) * columns_.mass[j] * direction_[j];
    for (int64_t i = 0; i < x_.n; ++i) {
      read_plan_row(problem, i);
      add_scaled(product_, -rows_.weight[i] * dot(plan_row_, direction_, mp_), plan_row_, mp_);
    }
  }

  void write(int64_t problem) {
    const double per_epsilon = 1 / x_.epsilon, envelope = x_.grad_transport ? x_.grad_transport[problem] : 0;
    for (int64_t i = 0; i < x_.n; ++i) {
      read_rows(x_, problem, i, plan_row_, grad_row_, cost_row_);
      const double x = rows_.solution[i];
      for (int64_t k = 0; k < mp_; k += kLanes) {
        const Doubles change = x + load<Doubles>(columns_.solution + k) - load<Doubles>(grad_row_ + k);
        store(plan_row_ + k, load<Doubles>(plan_row_ + k) * (change * per_epsilon + envelope));
      }
      narrow(plan_row_, x_.m, x_.d_cost + (problem * x_.n + i) * x_.m);
    }
    write_marginal(rows_, x_.a + problem * x_.n, potential_gradient(rows_, problem), x_.d_a + problem * x_.n);
    write_marginal(columns_, x_.b + problem * x_.m, potential_gradient(columns_, problem), x_.d_b + problem * x_.m);
  }

  void write_marginal(const Side& side, const scalar* mass, const scalar* grad, scalar* out) const {
    for (int64_t i = 0; i < side.size; ++i) {
      const double flow = (1 + side.lambda) * side.mass[i] * side.solution[i] - (grad && mass[i] > 0 ? x_.epsilon * grad[i] : 0);
      out[i] = mass[i] > 0 ? scalar(flow / mass[i]) : 0;
    }
  }

  const SinkhornGradientArguments<scalar>& x_;
  int64_t np_, mp_;
  Side rows_, columns_;
  double *plan_row_, *grad_row_, *cost_row_, *residual_, *direction_, *product_;  // [mp]
  double *matrix_ = nullptr, *links_ = nullptr;                                   // [far, near], [near, near]
  double *ground_ = nullptr, *inverse_pivot_ = nullptr;                           // [near]
};

template <typename scalar>
void differentiate_implicit(const SinkhornGradientArguments<scalar>& x, int64_t begin, int64_t end, unsigned char* scratch) {
  ImplicitGradient<scalar> gradient(x, scratch);
  for (int64_t problem = begin; problem < end; ++problem) gradient.differentiate(problem);
}

template <typename scalar>
constexpr SinkhornGradientKernel<scalar> sinkhorn_implicit = {differentiate_implicit<scalar>, ImplicitGradient<scalar>::scratch_bytes};

}  // namespace HELO_FAST_SET
}  // namespace
