// Sinkhorn's gradient through the iterations that ran, one problem at a time, for one instruction set (see each_set.h).
//
// In scaled potentials phi = f / epsilon and gamma = g / epsilon, with M = -cost / epsilon, an iteration is
//   gamma_j = -kappa_b log sum_i a_i exp(phi_i + M_ij),    phi_i = -kappa_a log sum_j b_j exp(gamma_j + M_ij);
// its derivative is -kappa times a stochastic matrix: P_ij proportional to b_j exp(gamma_j + M_ij), of row sum 1, for the second, and
// likewise Q_ji for the first. Walking back through the stored potentials, the adjoints pass through each of them,
//   gamma_bar -= kappa_a P' phi_bar,    phi_bar = -kappa_b Q' gamma_bar,
// and every step adds -kappa phi_bar_i P_ij to the gradient of M.
//
// P of another iteration is the P at hand with its columns scaled by v = exp(gamma' - gamma) and its rows made to sum to 1 again:
// multiply-adds, no exponentials, until some v leaves [1/kScalingRange, kScalingRange] and P is rebuilt. What a step adds to the
// gradient of M is then P times a matrix of rank 1: kSteps of them are added in one pass.
//
// In double: rounding of the row sums would add up over the iterations, as the constant part of an adjoint never decays.
// Scratch: P, what it added, and the same transposed for Q, for the rows and columns that hold mass.

namespace {
namespace HELO_FAST_SET {

constexpr double kScalingRange = 1e8;
constexpr int64_t kSteps = 8;

// The entries of a matrix in the rows and columns that hold mass.
template <typename scalar>
struct Selection {
  const scalar* data;
  const int64_t *rows, *columns;
  int64_t row_stride, column_stride;

  double operator()(int64_t i, int64_t j) const { return data[rows[i] * row_stride + columns[j] * column_stride]; }
};

// One half of the iteration: rows make their potential from that of the columns.
template <typename scalar>
class HalfIteration {
 public:
  static int64_t scratch_bytes(int64_t rows, int64_t columns) {
    const int64_t stride = padded(columns);
    return (2 * rows * stride + kSteps * (rows + stride) + 3 * stride) * 8 + 7 * 64;
  }

  HalfIteration(int64_t rows, int64_t columns, Workspace& workspace) {
    const int64_t stride = padded(columns);
    for (double** p : {&P_, &sum_}) *p = workspace.take<double>(rows * stride);
    row_terms_ = workspace.take<double>(kSteps * rows);
    column_terms_ = workspace.take<double>(kSteps * stride);
    for (double** p : {&flow_, &anchor_, &shift_}) *p = workspace.take<double>(stride);
  }

  void start(int64_t rows, int64_t columns, const Selection<scalar>& cost, double kappa, double per_epsilon) {
    rows_ = rows, columns_ = columns, stride_ = padded(columns);
    cost_ = cost, kappa_ = kappa, per_epsilon_ = per_epsilon;
    kept_ = 0;
    built_ = false;
    for (int64_t k = 0; k < rows_ * stride_; ++k) sum_[k] = 0;
  }

  const double* sum(int64_t i) const { return sum_ + i * stride_; }

  // potential [columns]: with the log of the marginal. Returns flow [columns], the adjoint that arrives at the columns.
  const double* reverse(const double* potential, const double* row_bar) {
    if (!rescale(potential)) {
      flush();
      build(potential);
    }
    const double* v = column_terms_ + kept_ * stride_;
    for (int64_t k = 0; k < stride_; ++k) flow_[k] = 0;
    int64_t i = 0;
    for (; i + 4 <= rows_; i += 4) reverse_rows<4>(i, v, row_bar);
    for (; i < rows_; ++i) reverse_rows<1>(i, v, row_bar);
    for (int64_t k = 0; k < stride_; ++k) flow_[k] *= v[k];
    if (++kept_ == kSteps) flush();
    return flow_;
  }

  // Adds what the kept steps owe to sum().
  void flush() {
    if (kept_ == 0) return;
    int64_t i = 0;
    for (; i + 4 <= rows_; i += 4) flush_rows<4>(i);
    for (; i < rows_; ++i) flush_rows<1>(i);
    kept_ = 0;
  }

 private:
  // The scalings of this step; false where P has to be rebuilt.
  bool rescale(const double* potential) {
    if (!built_) return false;
    double* v = column_terms_ + kept_ * stride_;
    const double limit = std::log(kScalingRange);
    int unsafe = 0;
    for (int64_t j = 0; j < columns_; ++j) {
      shift_[j] = potential[j] - anchor_[j];
      unsafe |= !(shift_[j] < limit) | !(shift_[j] > -limit);
    }
    if (unsafe) return false;
    for (int64_t k = 0; k < stride_; k += kLanes) store(v + k, exp_vectorised(load<Doubles>(shift_ + k)));  // 0 in the padding
    return true;
  }

  void build(const double* potential) {
    built_ = true;
    for (int64_t j = 0; j < stride_; ++j) column_terms_[j] = j < columns_;  // flushed: the first step kept
    for (int64_t j = 0; j < stride_; ++j) anchor_[j] = shift_[j] = j < columns_ ? potential[j] : -HUGE_VAL;
    for (int64_t i = 0; i < rows_; ++i) {
      double* P = P_ + i * stride_;
      double top = -HUGE_VAL;
      for (int64_t j = 0; j < columns_; ++j) {
        shift_[j] = potential[j] - cost_(i, j) * per_epsilon_;
        top = top < shift_[j] ? shift_[j] : top;
      }
      Doubles total = {};
      for (int64_t k = 0; k < stride_; k += kLanes) {
        const Doubles terms = exp_vectorised(load<Doubles>(shift_ + k) - top);
        store(P + k, terms);
        total += terms;
      }
      const double inverse = 1 / sum_of<double>(total);
      for (int64_t j = 0; j < stride_; ++j) P[j] *= inverse;
    }
  }

  template <int count>
  void reverse_rows(int64_t i, const double* v, const double* row_bar) {
    const double* P = P_ + i * stride_;
    Doubles total[count] = {};
    for (int64_t k = 0; k < stride_; k += kLanes) {
      const Doubles scalings = load<Doubles>(v + k);
#pragma GCC unroll 4
      for (int r = 0; r < count; ++r) total[r] += load<Doubles>(P + r * stride_ + k) * scalings;
    }
    double term[count];
    for (int r = 0; r < count; ++r) {
      term[r] = -kappa_ * row_bar[i + r] / sum_of<double>(total[r]);
      row_terms_[kept_ * rows_ + i + r] = term[r];
    }
    for (int64_t k = 0; k < stride_; k += kLanes) {
      Doubles flow = load<Doubles>(flow_ + k);
#pragma GCC unroll 4
      for (int r = 0; r < count; ++r) flow += load<Doubles>(P + r * stride_ + k) * term[r];
      store(flow_ + k, flow);
    }
  }

  template <int count>
  void flush_rows(int64_t i) {
    for (int64_t k = 0; k < stride_; k += kLanes) {
      Doubles owed[count] = {};
      for (int64_t step = 0; step < kept_; ++step) {
        const Doubles v = load<Doubles>(column_terms_ + step * stride_ + k);
#pragma GCC unroll 4
        for (int r = 0; r < count; ++r) owed[r] += row_terms_[step * rows_ + i + r] * v;
      }
#pragma GCC unroll 4
      for (int r = 0; r < count; ++r) {
        double* sum = sum_ + (i + r) * stride_ + k;
        store(sum, load<Doubles>(sum) + load<Doubles>(P_ + (i + r) * stride_ + k) * owed[r]);
      }
    }
  }

  int64_t rows_ = 0, columns_ = 0, stride_ = 0, kept_ = 0;
  Selection<scalar> cost_ = {};
  double kappa_ = 1, per_epsilon_ = 1;
  bool built_ = false;
  double *P_, *sum_;                   // [rows, stride]
  double *row_terms_, *column_terms_;  // [kSteps, rows], [kSteps, stride]
  double *flow_, *anchor_, *shift_;    // [stride]; anchor: the potential that P was built with
};

template <typename scalar>
class UnrolledGradient {
 public:
  UnrolledGradient(const SinkhornGradientArguments<scalar>& x, unsigned char* scratch)
      : x_(x), workspace_(scratch), to_rows_(x.n, x.m, workspace_), to_columns_(x.m, x.n, workspace_) {
    for (double** p : {&log_a_, &phi_, &phi_bar_, &d_log_a_}) *p = workspace_.take<double>(x.n);
    for (double** p : {&log_b_, &gamma_, &gamma_bar_, &d_log_b_}) *p = workspace_.take<double>(x.m);
    for (double** p : {&plan_row_, &grad_row_, &cost_row_}) *p = workspace_.take<double>(padded(x.m));
    rows_ = workspace_.take<int64_t>(x.n);
    columns_ = workspace_.take<int64_t>(x.m);
  }

  static int64_t scratch_bytes(int64_t n, int64_t m) {
    return HalfIteration<scalar>::scratch_bytes(n, m) + HalfIteration<scalar>::scratch_bytes(m, n) + (5 * n + 8 * padded(m)) * 8 + 13 * 64;
  }

  void differentiate(int64_t problem) {
    n_ = select(x_.a + problem * x_.n, x_.n, rows_, log_a_);
    m_ = select(x_.b + problem * x_.m, x_.m, columns_, log_b_);
    start(problem);
    if (n_ > 0 && m_ > 0) {
      for (int64_t iteration = x_.n_iter[problem]; iteration > 0; --iteration) reverse(problem, iteration);
      to_rows_.flush();
      to_columns_.flush();
    }
    write(problem);
  }

 private:
  static int64_t select(const scalar* mass, int64_t size, int64_t* where, double* log_mass) {
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i)
      if (mass[i] > 0) {
        where[count] = i;
        const bool again = count > 0 && mass[where[count - 1]] == mass[i];  // uniform marginals need one logarithm
        log_mass[count] = again ? log_mass[count - 1] : std::log(double(mass[i]));
        ++count;
      }
    return count;
  }

  // The adjoints at the end of the last iteration: W = plan * grad passes to phi, gamma and the log marginals alike.
  void start(int64_t problem) {
    const scalar* cost = x_.cost.data + problem * x_.cost.batch;
    const double per_epsilon = 1 / x_.epsilon;
    to_rows_.start(n_, m_, {cost, rows_, columns_, x_.cost.row, x_.cost.column}, 1 / (1 + x_.lambda_a), per_epsilon);
    to_columns_.start(m_, n_, {cost, columns_, rows_, x_.cost.column, x_.cost.row}, 1 / (1 + x_.lambda_b), per_epsilon);
    for (int64_t j = 0; j < m_; ++j) d_log_b_[j] = 0;
    for (int64_t i = 0; i < n_; ++i) {
      read_rows(x_, problem, rows_[i], plan_row_, grad_row_, cost_row_);
      double total = 0;
      for (int64_t j = 0; j < m_; ++j) {
        const double W = plan_row_[columns_[j]] * grad_row_[columns_[j]];
        total += W;
        d_log_b_[j] += W;
      }
      d_log_a_[i] = total;
    }
    const scalar *f = x_.grad_f ? x_.grad_f + problem * x_.n : nullptr, *g = x_.grad_g ? x_.grad_g + problem * x_.m : nullptr;
    for (int64_t i = 0; i < n_; ++i) phi_bar_[i] = d_log_a_[i] + (f ? x_.epsilon * f[rows_[i]] : 0);
    for (int64_t j = 0; j < m_; ++j) gamma_bar_[j] = d_log_b_[j] + (g ? x_.epsilon * g[columns_[j]] : 0);
  }

  void reverse(int64_t problem, int64_t iteration) {
    const scalar* after = x_.history + (problem * x_.kept + iteration - 1) * (x_.n + x_.m);
    with_mass(after + x_.n, columns_, m_, x_.m, log_b_, gamma_);
    const double* flow = to_rows_.reverse(gamma_, phi_bar_);
    for (int64_t j = 0; j < m_; ++j) gamma_bar_[j] += flow[j];
    for (int64_t j = 0; j < m_; ++j) d_log_b_[j] += flow[j];
    const bool first = iteration == 1;  // from phi = 0
    if (!first) with_mass(after - (x_.n + x_.m), rows_, n_, x_.n, log_a_, phi_);
    flow = to_columns_.reverse(first ? log_a_ : phi_, gamma_bar_);
    for (int64_t i = 0; i < n_; ++i) phi_bar_[i] = flow[i];
    for (int64_t i = 0; i < n_; ++i) d_log_a_[i] += flow[i];
    for (int64_t j = 0; j < m_; ++j) gamma_bar_[j] = 0;
  }

  static void with_mass(const scalar* potential, const int64_t* where, int64_t count, int64_t size, const double* log_mass, double* to) {
    if (count == size)
      for (int64_t i = 0; i < count; ++i) to[i] = log_mass[i] + potential[i];
    else
      for (int64_t i = 0; i < count; ++i) to[i] = log_mass[i] + potential[where[i]];
  }

  void write(int64_t problem) {
    scalar* d_cost = x_.d_cost + problem * x_.n * x_.m;
    scalar *d_a = x_.d_a + problem * x_.n, *d_b = x_.d_b + problem * x_.m;
    if (n_ < x_.n || m_ < x_.m) {
      for (int64_t k = 0; k < x_.n * x_.m; ++k) d_cost[k] = 0;
      for (int64_t i = 0; i < x_.n; ++i) d_a[i] = 0;
      for (int64_t j = 0; j < x_.m; ++j) d_b[j] = 0;
    }
    const double per_epsilon = 1 / x_.epsilon, envelope = x_.grad_transport ? x_.grad_transport[problem] : 0;
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t row = rows_[i] * x_.m;
      read_rows(x_, problem, rows_[i], plan_row_, grad_row_, cost_row_);
      const double* sum = to_rows_.sum(i);
      for (int64_t j = 0; j < m_; ++j) {
        const double T = plan_row_[columns_[j]], flow = sum[j] + to_columns_.sum(j)[i];
        d_cost[row + columns_[j]] = scalar(T * envelope - (T * grad_row_[columns_[j]] + flow) * per_epsilon);
      }
    }
    for (int64_t i = 0; i < n_; ++i) d_a[rows_[i]] = scalar(d_log_a_[i] / x_.a[problem * x_.n + rows_[i]]);
    for (int64_t j = 0; j < m_; ++j) d_b[columns_[j]] = scalar(d_log_b_[j] / x_.b[problem * x_.m + columns_[j]]);
  }

  const SinkhornGradientArguments<scalar>& x_;
  Workspace workspace_;
  HalfIteration<scalar> to_rows_, to_columns_;      // from gamma to phi; from phi to gamma
  int64_t n_ = 0, m_ = 0;                           // rows and columns with mass
  int64_t *rows_, *columns_;                        // where it is
  double *log_a_, *phi_, *phi_bar_, *d_log_a_;      // [n]; the potentials with the log marginals
  double *log_b_, *gamma_, *gamma_bar_, *d_log_b_;  // [m]
  double *plan_row_, *grad_row_, *cost_row_;        // [m], padded
};

template <typename scalar>
void differentiate_unrolled(const SinkhornGradientArguments<scalar>& x, int64_t begin, int64_t end, unsigned char* scratch) {
  UnrolledGradient<scalar> gradient(x, scratch);
  for (int64_t problem = begin; problem < end; ++problem) gradient.differentiate(problem);
}

template <typename scalar>
constexpr SinkhornGradientKernel<scalar> sinkhorn_unrolled = {differentiate_unrolled<scalar>, UnrolledGradient<scalar>::scratch_bytes};

}  // namespace HELO_FAST_SET
}  // namespace
