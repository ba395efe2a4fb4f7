// Sinkhorn forward on the CPU: T = diag(u) K diag(v), K_ij = exp(phi_i + psi_j - cost_ij / epsilon).
//
// The iteration is the log-domain one. Its potentials are log u + phi and log v + psi (the marginals folded in); phi and psi
// are held in double, and K is rebuilt around the current potentials ("absorbed", u = v = 1) whenever a scaling leaves
// [1/kRange, kRange]. A half-iteration that would leave it, or that meets an underflowed sum, is redone as a log-sum-exp.
// Between absorptions an iteration is two passes of multiply-adds over K and over its transpose, without exponentials.
//
// Threads run over problems. A problem touches 2 n m values of scratch and writes each output once.
// Rows and columns of zero mass are left out of the scratch problem, so that their cost is never read.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr double kRange = 1e8;  // of the scalings: an entry of K that underflows is then below 1e-21 of its row

struct Options {
  double epsilon;
  int64_t max_iter;
  double tol;  // negative: never stop early
  int64_t check_every;
  double kappa_a, kappa_b;  // tau / (tau + epsilon); 1 for a hard marginal
  double slope_b;           // epsilon / tau_b; 0 for a hard marginal
};

double damping(std::optional<double> tau, double epsilon) { return tau ? *tau / (*tau + epsilon) : 1.0; }

// One problem, compacted to its rows and columns of positive mass. Reused by a thread from problem to problem.
template <typename scalar>
class Problem {
 public:
  void load(const scalar* cost, const scalar* a, const scalar* b, int64_t n, int64_t m, const Options& options) {
    o_ = &options;
    select(a, n, rows_, log_a_);
    select(b, m, cols_, log_b_);
    a_.assign(rows_.size(), 0);
    b_.assign(cols_.size(), 0);
    for (size_t i = 0; i < rows_.size(); ++i) a_[i] = a[rows_[i]];
    for (size_t j = 0; j < cols_.size(); ++j) b_[j] = b[cols_[j]];
    cost_.resize(rows_.size() * cols_.size());
    for (size_t i = 0; i < rows_.size(); ++i)
      for (size_t j = 0; j < cols_.size(); ++j) cost_[i * cols_.size() + j] = cost[rows_[i] * m + cols_[j]];
    K_.resize(cost_.size());
    Kt_.resize(cost_.size());
    phi_ = log_a_;  // f = 0
    psi_.assign(cols_.size(), 0);
    u_.assign(rows_.size(), 1);
    v_.assign(cols_.size(), 1);
    row_sum_.resize(rows_.size());
    col_sum_.resize(cols_.size());
    exact_cols();
    exact_rows();
    absorb();
  }

  bool empty() const { return rows_.empty() || cols_.empty(); }

  // Runs to the end; history (or null) receives phi and gamma after each iteration. Returns the iterations run.
  int64_t solve(scalar* history, int64_t n, int64_t m) {
    record(history, n, m);
    for (int64_t iteration = 1;; ++iteration) {
      if (iteration >= o_->max_iter) return iteration;
      weigh_cols();
      if (o_->tol >= 0 && iteration % o_->check_every == 0 && marginal_error() <= o_->tol) return iteration;
      step_cols();
      step_rows();
      if (history) record(history + iteration * (n + m), n, m);
    }
  }

  // L1 distance of the column marginal from its optimal value; needs col_sum_ of the current u.
  double marginal_error() const {
    double error = 0;
    for (size_t j = 0; j < cols_.size(); ++j) {
      const double target = o_->slope_b == 0 ? b_[j] : b_[j] * std::exp(-o_->slope_b * gamma(j));
      error += std::abs(double(v_[j]) * col_sum_[j] - target);
    }
    return error;
  }

  // Writes plan [n, m], f [n], g [m]; returns (transport cost, marginal error).
  std::tuple<double, double> store(scalar* plan, scalar* f, scalar* g, int64_t n, int64_t m) {
    std::fill(plan, plan + n * m, scalar(0));
    std::fill(f, f + n, -std::numeric_limits<scalar>::infinity());
    std::fill(g, g + m, -std::numeric_limits<scalar>::infinity());
    weigh_cols();
    double transport_cost = 0;
    for (size_t i = 0; i < rows_.size(); ++i) {
      scalar* out = plan + rows_[i] * m;
      double row_cost = 0;
      for (size_t j = 0; j < cols_.size(); ++j) {
        const scalar mass = u_[i] * K_[i * cols_.size() + j] * v_[j];
        out[cols_[j]] = mass;
        if (mass > 0) row_cost += double(mass) * cost_[i * cols_.size() + j];
      }
      transport_cost += row_cost;
    }
    for (size_t i = 0; i < rows_.size(); ++i) f[rows_[i]] = scalar(o_->epsilon * scaled_f(i));
    for (size_t j = 0; j < cols_.size(); ++j) g[cols_[j]] = scalar(o_->epsilon * gamma(j));
    return {transport_cost, marginal_error()};
  }

 private:
  static void select(const scalar* mass, int64_t size, std::vector<int64_t>& where, std::vector<double>& log_mass) {
    where.clear();
    log_mass.clear();
    for (int64_t i = 0; i < size; ++i)
      if (mass[i] > 0) {
        where.push_back(i);
        log_mass.push_back(std::log(double(mass[i])));
      }
  }

  double scaled_f(size_t i) const { return phi_[i] + std::log(double(u_[i])) - log_a_[i]; }
  double gamma(size_t j) const { return psi_[j] + std::log(double(v_[j])) - log_b_[j]; }

  void record(scalar* history, int64_t n, int64_t m) const {
    if (!history) return;
    std::fill(history, history + n + m, -std::numeric_limits<scalar>::infinity());
    for (size_t i = 0; i < rows_.size(); ++i) history[rows_[i]] = scalar(scaled_f(i));
    for (size_t j = 0; j < cols_.size(); ++j) history[n + cols_[j]] = scalar(gamma(j));
  }

  // K around the current potentials: u = v = 1.
  void absorb() {
    const size_t rows = rows_.size(), cols = cols_.size();
    for (size_t i = 0; i < rows; ++i) phi_[i] += std::log(double(u_[i])), u_[i] = 1;
    for (size_t j = 0; j < cols; ++j) psi_[j] += std::log(double(v_[j])), v_[j] = 1;
    for (size_t i = 0; i < rows; ++i)
      for (size_t j = 0; j < cols; ++j) {
        const scalar k = std::exp(scalar(phi_[i] + psi_[j] - cost_[i * cols + j] / o_->epsilon));
        K_[i * cols + j] = k;
        Kt_[j * rows + i] = k;
      }
  }

  // sums[j] = sum_i weights[i] * matrix[i][j], several rows a pass so that sums stays in cache.
  static void weighted_sum(const scalar* matrix, const scalar* weights, scalar* sums, size_t rows, size_t cols) {
    std::fill(sums, sums + cols, scalar(0));
    size_t i = 0;
    for (; i + 4 <= rows; i += 4) {
      const scalar *p = matrix + i * cols, *q = p + cols, *r = q + cols, *s = r + cols;
      const scalar w0 = weights[i], w1 = weights[i + 1], w2 = weights[i + 2], w3 = weights[i + 3];
      for (size_t j = 0; j < cols; ++j) sums[j] += (w0 * p[j] + w1 * q[j]) + (w2 * r[j] + w3 * s[j]);
    }
    for (; i < rows; ++i)
      for (size_t j = 0; j < cols; ++j) sums[j] += weights[i] * matrix[i * cols + j];
  }

  void weigh_cols() { weighted_sum(K_.data(), u_.data(), col_sum_.data(), rows_.size(), cols_.size()); }
  void weigh_rows() { weighted_sum(Kt_.data(), v_.data(), row_sum_.data(), cols_.size(), rows_.size()); }

  // scalings = mass * exp((kappa - 1) * potential) * sums^-kappa; false if one leaves the safe range.
  static bool rescale(
      scalar* scalings, const scalar* sums, const scalar* mass, const double* log_mass, const double* potential, double kappa,
      size_t size) {
    bool safe = true;
    for (size_t i = 0; i < size; ++i) {
      if (kappa == 1)
        scalings[i] = mass[i] / sums[i];
      else
        scalings[i] = scalar(std::exp(log_mass[i] + (kappa - 1) * potential[i] - kappa * std::log(double(sums[i]))));
      safe &= scalings[i] > scalar(1 / kRange) && scalings[i] < scalar(kRange);
    }
    return safe;
  }

  // g from u: expects col_sum_ of the current u.
  void step_cols() {
    if (rescale(v_.data(), col_sum_.data(), b_.data(), log_b_.data(), psi_.data(), o_->kappa_b, cols_.size())) return;
    exact_cols();
    absorb();
  }

  void step_rows() {
    weigh_rows();
    if (rescale(u_.data(), row_sum_.data(), a_.data(), log_a_.data(), phi_.data(), o_->kappa_a, rows_.size())) return;
    exact_rows();
    absorb();
  }

  // The same half-iterations as log-sum-exps, into the potentials (the other side's potentials include its scalings).
  void exact_cols() {
    const size_t rows = rows_.size(), cols = cols_.size();
    for (size_t j = 0; j < cols; ++j) {
      double top = -std::numeric_limits<double>::infinity(), sum = 0;
      for (size_t i = 0; i < rows; ++i) row_term_at(i, j, top);
      for (size_t i = 0; i < rows; ++i)
        sum += std::exp(phi_[i] + std::log(double(u_[i])) - cost_[i * cols + j] / o_->epsilon - top);
      psi_[j] = log_b_[j] - o_->kappa_b * (top + std::log(sum));
      v_[j] = 1;
    }
  }

  void row_term_at(size_t i, size_t j, double& top) const {
    top = std::max(top, phi_[i] + std::log(double(u_[i])) - cost_[i * cols_.size() + j] / o_->epsilon);
  }

  void exact_rows() {
    const size_t rows = rows_.size(), cols = cols_.size();
    for (size_t i = 0; i < rows; ++i) {
      double top = -std::numeric_limits<double>::infinity(), sum = 0;
      for (size_t j = 0; j < cols; ++j)
        top = std::max(top, psi_[j] + std::log(double(v_[j])) - cost_[i * cols + j] / o_->epsilon);
      for (size_t j = 0; j < cols; ++j)
        sum += std::exp(psi_[j] + std::log(double(v_[j])) - cost_[i * cols + j] / o_->epsilon - top);
      phi_[i] = log_a_[i] - o_->kappa_a * (top + std::log(sum));
      u_[i] = 1;
    }
  }

  const Options* o_ = nullptr;
  std::vector<int64_t> rows_, cols_;       // where the mass is
  std::vector<double> log_a_, log_b_;      // of the masses
  std::vector<double> phi_, psi_;          // absorbed potentials, marginals folded in
  std::vector<scalar> a_, b_, u_, v_;      // masses and scalings
  std::vector<scalar> row_sum_, col_sum_;  // K v and K' u
  std::vector<scalar> cost_, K_, Kt_;      // [rows, cols], [rows, cols], [cols, rows]
};

template <typename scalar>
void solve_all(
    const Tensor& cost, const Tensor& a, const Tensor& b, const Options& options, Tensor& plan, Tensor& f, Tensor& g,
    Tensor& transport_cost, Tensor& marginal_error, Tensor& n_iter, Tensor& history) {
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2);
  const auto* cost_p = static_cast<const scalar*>(cost.const_data_ptr());
  const auto* a_p = static_cast<const scalar*>(a.const_data_ptr());
  const auto* b_p = static_cast<const scalar*>(b.const_data_ptr());
  auto* plan_p = static_cast<scalar*>(plan.mutable_data_ptr());
  auto* f_p = static_cast<scalar*>(f.mutable_data_ptr());
  auto* g_p = static_cast<scalar*>(g.mutable_data_ptr());
  auto* transport_cost_p = static_cast<scalar*>(transport_cost.mutable_data_ptr());
  auto* marginal_error_p = static_cast<scalar*>(marginal_error.mutable_data_ptr());
  auto* n_iter_p = static_cast<int32_t*>(n_iter.mutable_data_ptr());
  const int64_t kept = history.size(1);
  auto* history_p = static_cast<scalar*>(history.mutable_data_ptr());

  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    Problem<scalar> problem;
    for (int64_t i = begin; i < end; ++i) {
      problem.load(cost_p + i * n * m, a_p + i * n, b_p + i * m, n, m, options);
      n_iter_p[i] = static_cast<int32_t>(problem.solve(kept ? history_p + i * kept * (n + m) : nullptr, n, m));
      const auto [spent, error] = problem.store(plan_p + i * n * m, f_p + i * n, g_p + i * m, n, m);
      transport_cost_p[i] = scalar(spent);
      marginal_error_p[i] = scalar(error);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_fwd(
    const Tensor& cost,  // [B, n, m], contiguous, float32 or float64
    const Tensor& a,     // [B, n]
    const Tensor& b,     // [B, m]
    double epsilon, int64_t max_iter, std::optional<double> tol, int64_t check_every, std::optional<double> tau_a,
    std::optional<double> tau_b, bool keep_history) {
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2);
  const Options options{
      epsilon, max_iter, tol.value_or(-1), check_every, damping(tau_a, epsilon), damping(tau_b, epsilon),
      tau_b ? epsilon / *tau_b : 0};
  Tensor plan = torch::stable::empty_like(cost), f = torch::stable::empty_like(a), g = torch::stable::empty_like(b);
  Tensor transport_cost = torch::stable::new_empty(cost, {batch});
  Tensor marginal_error = torch::stable::new_empty(cost, {batch});
  Tensor n_iter = torch::stable::new_empty(cost, {batch}, ScalarType::Int);
  Tensor history = torch::stable::new_zeros(cost, {batch, keep_history ? max_iter : 0, n + m});
  if (cost.scalar_type() == ScalarType::Double)
    solve_all<double>(cost, a, b, options, plan, f, g, transport_cost, marginal_error, n_iter, history);
  else
    solve_all<float>(cost, a, b, options, plan, f, g, transport_cost, marginal_error, n_iter, history);
  return {plan, f, g, transport_cost, marginal_error, n_iter, history};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cpu, CPU, m) { m.impl("sinkhorn_fwd", TORCH_BOX(&sinkhorn_fwd)); }
