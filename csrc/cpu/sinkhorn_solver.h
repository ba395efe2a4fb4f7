// Sinkhorn forward, one problem at a time, for one instruction set (see each_set.h).
//
// T = diag(u) K diag(v) with K_ij = exp(phi_i + psi_j - cost_ij / epsilon). The iteration is the log-domain one; its potentials
// are log u + phi and log v + psi (the marginals folded in). phi and psi are held in double, and K is rebuilt around the current
// potentials ("absorbed", u = v = 1) whenever a scaling leaves [1/kRange, kRange]; a half-iteration that would leave it, or that
// meets an underflowed sum, is redone as a log-sum-exp. Between absorptions an iteration is two passes of multiply-adds, one over
// K and one over its transpose, without exponentials.
//
// Scratch: K, its transpose and the costs of the rows and columns that hold mass, padded to whole vectors. A padded entry of K is
// 1 in the first row and 0 below, its mass is 1: so its scaling is 1/u_0, safe when the others are, and read by nobody.
#include "simd.h"

namespace {
namespace HELO_FAST_SET {

constexpr double kRange = 1e8;  // an entry of K that underflows is then below 1e-21 of its row

inline double larger(double x, double y) { return x > y ? x : y; }

template <typename scalar>
class SinkhornSolver {
 public:
  using V = Vectors<scalar>;

  SinkhornSolver(const SinkhornArguments<scalar>& x, unsigned char* scratch) : x_(x), scratch_(scratch) {
    const int64_t n = x.n + V::lanes, m = x.m + V::lanes;  // padded rows and columns at most
    for (double** p : {&phi_, &log_a_, &alpha_}) *p = take<double>(n);
    for (double** p : {&psi_, &log_b_, &beta_, &top_, &total_}) *p = take<double>(m);
    for (scalar** p : {&a_, &u_, &row_sum_}) *p = take<scalar>(n);
    for (scalar** p : {&b_, &v_, &col_sum_, &terms_}) *p = take<scalar>(m);
    rows_ = take<int64_t>(n);
    cols_ = take<int64_t>(m);
    cost_ = take<scalar>(x.n * m);
    K_ = take<scalar>(x.n * m);
    Kt_ = take<scalar>(x.m * n);
  }

  static int64_t scratch_bytes(int64_t n, int64_t m) {
    const int64_t np = n + V::lanes, mp = m + V::lanes;
    return (3 * np + 5 * mp) * 8 + (3 * np + 4 * mp) * int64_t(sizeof(scalar)) + (np + mp) * 8 +
           (2 * n * mp + m * np) * int64_t(sizeof(scalar)) + 20 * 64;
  }

  void solve(int64_t problem) {
    load_problem(problem);
    if (n_ > 0 && m_ > 0) {
      start();
      iterate(problem);
    }
    write(problem);
  }

 private:
  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(scratch_);
    scratch_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }

  static int64_t padded(int64_t count) { return (count + V::unit - 1) / V::unit * V::unit; }

  static int64_t select(const scalar* mass, int64_t size, int64_t* where, scalar* kept, double* log_mass) {
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i)
      if (mass[i] > 0) {
        where[count] = i;
        kept[count] = mass[i];
        const bool again = count > 0 && kept[count - 1] == mass[i];  // uniform marginals need one logarithm
        log_mass[count] = again ? log_mass[count - 1] : std::log(double(mass[i]));
        ++count;
      }
    return count;
  }

  void load_problem(int64_t problem) {
    const scalar* cost = x_.cost + problem * x_.n * x_.m;
    n_ = select(x_.a + problem * x_.n, x_.n, rows_, a_, log_a_);
    m_ = select(x_.b + problem * x_.m, x_.m, cols_, b_, log_b_);
    np_ = padded(n_);
    mp_ = padded(m_);
    for (int64_t i = n_; i < np_; ++i) a_[i] = 1, log_a_[i] = phi_[i] = 0;
    for (int64_t j = m_; j < mp_; ++j) b_[j] = 1, log_b_[j] = psi_[j] = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const scalar* from = cost + rows_[i] * x_.m;
      scalar* to = cost_ + i * mp_;
      if (m_ == x_.m)
        for (int64_t j = 0; j < m_; ++j) to[j] = from[j];
      else
        for (int64_t j = 0; j < m_; ++j) to[j] = from[cols_[j]];
      for (int64_t j = m_; j < mp_; ++j) to[j] = 0;
    }
  }

  // K around f = 0, its columns scaled so that the largest entry of each is b_j.
  void start() {
    const double per_epsilon = 1 / x_.epsilon;
    for (int64_t i = 0; i < n_; ++i) phi_[i] = log_a_[i];
    for (int64_t j = 0; j < mp_; ++j) top_[j] = -HUGE_VAL;
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j < mp_; ++j) top_[j] = larger(top_[j], phi_[i] - cost_[i * mp_ + j] * per_epsilon);
    for (int64_t j = 0; j < m_; ++j) psi_[j] = log_b_[j] - top_[j];
    for (int64_t i = 0; i < np_; ++i) u_[i] = 1;
    for (int64_t j = 0; j < mp_; ++j) v_[j] = 1;
    build();
  }

  // K and its transpose from phi and psi.
  void build() {
    const double per_epsilon = 1 / x_.epsilon;
    for (int64_t i = 0; i < n_; ++i) {
      const scalar* cost = cost_ + i * mp_;
      scalar* K = K_ + i * mp_;
      const double phi = phi_[i];
      for (int64_t j = 0; j < mp_; ++j) K[j] = exp_vectorised(scalar(phi + psi_[j] - cost[j] * per_epsilon));
      for (int64_t j = m_; j < mp_; ++j) K[j] = i == 0;
    }
    for (int64_t j = 0; j < m_; ++j) {
      scalar* Kt = Kt_ + j * np_;
      for (int64_t i = 0; i < n_; ++i) Kt[i] = K_[i * mp_ + j];
      for (int64_t i = n_; i < np_; ++i) Kt[i] = j == 0;
    }
  }

  void absorb() {
    for (int64_t i = 0; i < n_; ++i) phi_[i] += u_[i] == 1 ? 0 : std::log(double(u_[i]));
    for (int64_t j = 0; j < m_; ++j) psi_[j] += v_[j] == 1 ? 0 : std::log(double(v_[j]));
    for (int64_t i = 0; i < np_; ++i) u_[i] = 1;
    for (int64_t j = 0; j < mp_; ++j) v_[j] = 1;
    build();
  }

  void iterate(int64_t problem) {
    scalar* history = x_.kept ? x_.history + problem * x_.kept * (x_.n + x_.m) : nullptr;
    for (iterations_ = 1;; ++iterations_) {
      step_cols();
      step_rows();
      if (history) record(history + (iterations_ - 1) * (x_.n + x_.m));
      weigh_cols();  // serves the error, the next iteration, and the error of the result
      if (iterations_ >= x_.max_iter) return;
      if (x_.tol >= 0 && iterations_ % x_.check_every == 0 && marginal_error() <= x_.tol) return;
    }
  }

  void weigh_cols() { weighted_sum(K_, mp_, u_, n_, col_sum_, mp_); }

  // scalings = mass * exp((kappa - 1) * potential) * sums^-kappa; false where one leaves the safe range.
  static bool rescale(
      scalar* scalings, const scalar* sums, const scalar* mass, const double* log_mass, const double* potential, double kappa,
      int64_t size, int64_t padded_size) {
    if (kappa != 1) {
      for (int64_t i = 0; i < size; ++i)
        scalings[i] = scalar(std::exp(log_mass[i] + (kappa - 1) * potential[i] - kappa * std::log(double(sums[i]))));
      for (int64_t i = size; i < padded_size; ++i) scalings[i] = 1;
    } else {
      for (int64_t i = 0; i < padded_size; ++i) scalings[i] = mass[i] / sums[i];
    }
    int unsafe = 0;  // NaN compares false: unsafe
    for (int64_t i = 0; i < padded_size; ++i) unsafe |= !(scalings[i] > scalar(1 / kRange)) | !(scalings[i] < scalar(kRange));
    return !unsafe;
  }

  void step_cols() {
    if (iterations_ == 1) weigh_cols();  // later ones find it done
    if (rescale(v_, col_sum_, b_, log_b_, psi_, x_.kappa_b, m_, mp_)) return;
    exact_cols();
    absorb();
  }

  void step_rows() {
    weighted_sum(Kt_, np_, v_, m_, row_sum_, np_);
    if (rescale(u_, row_sum_, a_, log_a_, phi_, x_.kappa_a, n_, np_)) return;
    exact_rows();
    absorb();
  }

  // The same half-iterations as log-sum-exps, into psi and phi.
  void exact_cols() {
    const double per_epsilon = 1 / x_.epsilon;
    for (int64_t i = 0; i < n_; ++i) alpha_[i] = phi_[i] + std::log(double(u_[i]));
    for (int64_t j = 0; j < mp_; ++j) top_[j] = -HUGE_VAL, total_[j] = 0;
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j < mp_; ++j) top_[j] = larger(top_[j], alpha_[i] - cost_[i * mp_ + j] * per_epsilon);
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j < mp_; ++j)
        total_[j] += exp_vectorised(scalar(alpha_[i] - cost_[i * mp_ + j] * per_epsilon - top_[j]));
    for (int64_t j = 0; j < m_; ++j) psi_[j] = log_b_[j] - x_.kappa_b * (top_[j] + std::log(total_[j]));
    for (int64_t j = 0; j < mp_; ++j) v_[j] = 1;
  }

  void exact_rows() {
    const double per_epsilon = 1 / x_.epsilon;
    for (int64_t j = 0; j < m_; ++j) beta_[j] = psi_[j] + std::log(double(v_[j]));
    for (int64_t j = m_; j < mp_; ++j) beta_[j] = -HUGE_VAL;
    for (int64_t i = 0; i < n_; ++i) {
      const scalar* cost = cost_ + i * mp_;
      double top = -HUGE_VAL, total = 0;
      for (int64_t j = 0; j < m_; ++j) top = larger(top, beta_[j] - cost[j] * per_epsilon);
      for (int64_t j = 0; j < mp_; ++j) terms_[j] = exp_vectorised(scalar(beta_[j] - cost[j] * per_epsilon - top));
      for (int64_t j = 0; j < m_; ++j) total += terms_[j];
      phi_[i] = log_a_[i] - x_.kappa_a * (top + std::log(total));
    }
    for (int64_t i = 0; i < np_; ++i) u_[i] = 1;
  }

  double scaled_f(int64_t i) const { return phi_[i] + std::log(double(u_[i])) - log_a_[i]; }
  double scaled_g(int64_t j) const { return psi_[j] + std::log(double(v_[j])) - log_b_[j]; }

  // L1 distance of the column marginal from its optimal value; needs col_sum_ of the current u.
  double marginal_error() const {
    double error = 0;
    for (int64_t j = 0; j < m_; ++j) {
      const double target = x_.slope_b == 0 ? b_[j] : b_[j] * std::exp(-x_.slope_b * scaled_g(j));
      error += std::fabs(double(v_[j]) * col_sum_[j] - target);
    }
    return error;
  }

  void record(scalar* history) const {
    for (int64_t i = 0; i < x_.n + x_.m; ++i) history[i] = -HUGE_VAL;
    for (int64_t i = 0; i < n_; ++i) history[rows_[i]] = scalar(scaled_f(i));
    for (int64_t j = 0; j < m_; ++j) history[x_.n + cols_[j]] = scalar(scaled_g(j));
  }

  void write(int64_t problem) {
    scalar* plan = x_.plan + problem * x_.n * x_.m;
    scalar *f = x_.f + problem * x_.n, *g = x_.g + problem * x_.m;
    const bool solved = n_ > 0 && m_ > 0;
    if (n_ < x_.n || m_ < x_.m || !solved) {
      for (int64_t i = 0; i < x_.n * x_.m; ++i) plan[i] = 0;
      for (int64_t i = 0; i < x_.n; ++i) f[i] = -HUGE_VAL;
      for (int64_t j = 0; j < x_.m; ++j) g[j] = -HUGE_VAL;
    }
    double transport_cost = 0, error = 0;
    if (solved) {
      for (int64_t i = 0; i < n_; ++i) {
        const scalar *K = K_ + i * mp_, *cost = cost_ + i * mp_;
        const scalar u = u_[i];
        for (int64_t j = 0; j < m_; ++j) terms_[j] = u * K[j] * v_[j];
        double spent = 0;
        for (int64_t j = 0; j < m_; ++j) spent += terms_[j] > 0 ? double(terms_[j]) * cost[j] : 0;
        transport_cost += spent;
        scalar* to = plan + rows_[i] * x_.m;
        if (m_ == x_.m)
          for (int64_t j = 0; j < m_; ++j) to[j] = terms_[j];
        else
          for (int64_t j = 0; j < m_; ++j) to[cols_[j]] = terms_[j];
      }
      for (int64_t i = 0; i < n_; ++i) f[rows_[i]] = scalar(x_.epsilon * scaled_f(i));
      for (int64_t j = 0; j < m_; ++j) g[cols_[j]] = scalar(x_.epsilon * scaled_g(j));
      error = marginal_error();
    } else {
      iterations_ = x_.max_iter;
      for (int64_t j = 0; j < m_; ++j) error += b_[j];
    }
    x_.transport_cost[problem] = scalar(transport_cost);
    x_.marginal_error[problem] = scalar(error);
    x_.n_iter[problem] = static_cast<int32_t>(iterations_);
  }

  const SinkhornArguments<scalar>& x_;
  unsigned char* scratch_;
  int64_t n_ = 0, m_ = 0, np_ = 0, mp_ = 0, iterations_ = 1;  // with mass; padded
  int64_t *rows_, *cols_;                                      // where the mass is
  double *phi_, *log_a_, *alpha_;                              // [np]
  double *psi_, *log_b_, *beta_, *top_, *total_;               // [mp]
  scalar *a_, *u_, *row_sum_;                                  // [np]
  scalar *b_, *v_, *col_sum_, *terms_;                         // [mp]
  scalar *cost_, *K_, *Kt_;                                    // [n, mp], [n, mp], [m, np]
};

template <typename scalar>
void solve_some(const SinkhornArguments<scalar>& x, int64_t begin, int64_t end, unsigned char* scratch) {
  SinkhornSolver<scalar> solver(x, scratch);
  for (int64_t problem = begin; problem < end; ++problem) solver.solve(problem);
}

template <typename scalar>
constexpr SinkhornKernel<scalar> sinkhorn = {solve_some<scalar>, SinkhornSolver<scalar>::scratch_bytes};

}  // namespace HELO_FAST_SET
}  // namespace
