// The inner solver of gromov: IPOT or Sinkhorn on one linear cost, for one instruction set (see each_set.h).
//
// Given N = -cost / epsilon [n, m] and a start log u (of Sinkhorn, log (u / b)), step k is
//     x = a / (P u), y = b / (P' x), where P = exp(k N) for IPOT and exp(N) for Sinkhorn; the plan is diag(x) P diag(y).
// The next u is y for Sinkhorn, and y^2 / (y of the step before) for IPOT: y times what its usual form calls s.
//
// K_ij = P_ij exp(phi_i + psi_j) stands for P. phi and psi drift by f and g from step to step: a step of IPOT multiplies K by
// A_ij = exp(N_ij + f_i + g_j), and no exponential is left in it. psi is log(y / b) and g its increment at the step that set them,
// f makes the largest entry of each row of A 1: so the scalings that are left change little, K never grows, and an entry that
// underflows stays below 1e-38 kRange^2 of a_i b_j. A step that meets a scaling outside [1 / kRange, kRange] is done again by
// log-sum-exps, whose result sets phi, psi and g anew. The first step sets them too, where it can without.
//
// K and A stand apart in whole vectors of their rows and in their tails, so that the tails of four rows are one vector.
// Padding: K and A are 0 there; b and the columns' scalings 1; a is 0 and the rows' sums 1. So nothing meets 0 / 0.
#include "gromov_product.h"

namespace {
namespace HELO_FAST_SET {


template <typename scalar>
class PlanSolver {
 public:
  using V = Vectors<scalar>;
  using full = typename V::full;
  static constexpr scalar kRange = sizeof(scalar) == 4 ? 1e10 : 1e80;
  static constexpr scalar kLarge = sizeof(scalar) == 4 ? 1e30 : 1e200;  // exp(-kLarge) is 0 in any company

  PlanSolver(Arena& arena, int64_t n, int64_t m) {
    const int64_t np = padded_rows(n), mp = padded<scalar>(m);
    for (scalar** p : {&N_, &A_, &K_}) *p = arena.take<scalar>(np * mp);
    for (scalar** p : {&a_, &z_, &row_pad_}) *p = arena.take<scalar>(np);
    for (scalar** p : {&b_, &u_, &next_u_, &col_sum_, &last_sum_, &first_sum_, &col_pad_, &top_}) *p = arena.take<scalar>(mp);
    for (double** p : {&phi_, &alpha_}) *p = arena.take<double>(np);
    for (double** p : {&psi_, &g_, &log_u_, &beta_, &log_top_, &total_}) *p = arena.take<double>(mp);
  }

  static double finite(double x) { return x < kLarge ? x : double(kLarge); }

  // Before every problem: masses a of n rows and b of m columns, all above 0.
  void start(const scalar* a, int64_t n, const scalar* b, int64_t m) {
    n_ = n, m_ = m, np_ = padded_rows(n), mp_ = padded<scalar>(m);
    tail_ = has_tail<scalar>(m);
    whole_ = (m - (tail_ ? kTail<scalar> : 0) + V::lanes - 1) / V::lanes * V::lanes;
    for (int64_t i = 0; i < np_; ++i) a_[i] = i < n ? a[i] : 0, row_pad_[i] = i >= n;
    for (int64_t j = 0; j < mp_; ++j) b_[j] = j < m ? b[j] : 1, col_sum_[j] = last_sum_[j] = col_pad_[j] = j >= m;
    scalar smallest = b[0];
    largest_b_ = b[0];
    for (int64_t j = 1; j < m; ++j) {
      largest_b_ = b[j] > largest_b_ ? b[j] : largest_b_;
      smallest = b[j] < smallest ? b[j] : smallest;
    }
    uneven_b_ = smallest < largest_b_ / kRange;
  }

  scalar* gain() { return N_; }                // [n, mp]: the caller writes what set() scales
  scalar* scratch(int k) { return k ? A_ : K_; }  // [n, mp], the caller's from solve's end to set()

  // N_ij = (weight gain_ij - cross_weight cross_ij) / epsilon less the maxima of its rows, then of its columns, which would cost it
  // digits: a term of i alone does not change the plan, one of j alone goes to the start. That is -columns / epsilon besides.
  void set(scalar weight, const scalar* cross, scalar cross_weight, const scalar* columns, scalar column_weight, double per_epsilon) {
    for (int64_t j = 0; j < mp_; ++j) top_[j] = -kLarge;
    for (int64_t i = 0; i < n_; ++i) {
      scalar* N = N_ + i * mp_;
      Largest<scalar> most(-kLarge);
      for_columns<scalar>(m_, [&](auto zero, int64_t j) HELO_FAST_LAMBDA {
        using vector = decltype(zero);
        vector v = weight * load<vector>(N + j) - kLarge * load<vector>(col_pad_ + j);
        if (cross) v -= cross_weight * load<vector>(cross + i * mp_ + j);
        most.see(v);
        store(N + j, v);
      });
      const scalar row_top = most.result();
      for_columns<scalar>(m_, [&](auto zero, int64_t j) HELO_FAST_LAMBDA {
        using vector = decltype(zero);
        const vector v = load<vector>(N + j) - row_top;
        store(N + j, v);
        store(top_ + j, larger(v, load<vector>(top_ + j)));
      });
    }
    const scalar scale = scalar(per_epsilon);
    for (int64_t i = 0; i < n_; ++i)
      for_columns<scalar>(m_, [&](auto zero, int64_t j) HELO_FAST_LAMBDA {
        using vector = decltype(zero);
        scalar* N = N_ + i * mp_ + j;
        const vector v = (load<vector>(N) - load<vector>(top_ + j)) * scale - kLarge * load<vector>(col_pad_ + j);
        store(N, larger(v, zero - kLarge));
      });
    for (int64_t j = 0; j < m_; ++j) log_u_[j] = (double(top_[j]) - double(column_weight) * columns[j]) * per_epsilon;
  }

  // steps >= 1 of IPOT (powers) or of Sinkhorn.
  void solve(int64_t steps, bool powers) {
    first(steps, powers);
    for (int64_t step = 2; step <= steps; ++step) {
      const bool safe = !(powers && step == 2 && uneven_b_) && sweep(powers) && advance(powers);
      if (powers) K_of_first_ = false;
      if (!safe) exact(step, powers);
    }
  }

  // The plan [n, mp]; returns how far (L1) it is from what stood there.
  double write(scalar* plan) {
    const scalar* K = K_of_first_ ? A_ : K_;
    for (int64_t j = 0; j < mp_; ++j) next_u_[j] = b_[j] / last_sum_[j];
    Sum<scalar> moved;
    for (int64_t i = 0; i < n_; ++i)
      for_columns<scalar>(m_, [&](auto zero, int64_t j) HELO_FAST_LAMBDA {
        using vector = decltype(zero);
        const vector T = z_[i] * load<vector>(at<vector>(K, i, j)) * load<vector>(next_u_ + j);
        const vector d = T - load<vector>(plan + i * mp_ + j);
        moved.see(larger(d, -d));
        store(plan + i * mp_ + j, T);
      });
    return moved.result();
  }

 private:
  // Of K and A: [np, whole_] the whole vectors of their rows, then [np, kTail] the tails.
  template <typename vector, typename pointer>
  HELO_FAST_INLINE pointer at(pointer matrix, int64_t i, int64_t j) const {
    return sizeof(vector) == sizeof(full) ? matrix + i * whole_ + j : matrix + np_ * whole_ + i * kTail<scalar>;
  }
  scalar& entry(scalar* matrix, int64_t i, int64_t j) const {
    return j < whole_ ? matrix[i * whole_ + j] : matrix[np_ * whole_ + i * kTail<scalar> + j - whole_];
  }
  int64_t padded_columns() const { return whole_ + (tail_ ? kTail<scalar> : 0); }
  void clear_padding(scalar* matrix) const {
    for (int64_t i = n_; i < np_; ++i)
      for (int64_t j = 0; j < padded_columns(); ++j) entry(matrix, i, j) = 0;
  }

  bool sweep(bool powers) {
    const scalar* K = K_of_first_ ? A_ : K_;
    switch (whole_ / V::lanes) {
      case 1: return powers ? sweep<true, 1>(K) : sweep<false, 1>(K);
      case 2: return powers ? sweep<true, 2>(K) : sweep<false, 2>(K);
      case 3: return powers ? sweep<true, 3>(K) : sweep<false, 3>(K);
      case 4: return powers ? sweep<true, 4>(K) : sweep<false, 4>(K);
      default: return powers ? sweep<true, 0>(K) : sweep<false, 0>(K);
    }
  }

  template <bool powers, int vectors>
  bool sweep(const scalar* from) {
    if constexpr (kTail<scalar> > 0)
      if (tail_) return sweep<powers, vectors, true>(from);
    return sweep<powers, vectors, false>(from);
  }

  // K *= A if powers (from is where K stands before); z = a / (K u), col_sum = K' z. False where a sum leaves the safe range.
  // Four rows at a time: while they are in cache, once for their sums and once for the columns', four rows later, when z has arrived.
  // Up to four vectors of columns stay in registers (vectors > 0). The tails of four rows are one vector.
  template <bool powers, int vectors, bool tail>
  bool sweep(const scalar* from) {
    using four = typename Pack<scalar, 4>::type;
    using P = Pieces<scalar>;
    constexpr int lanes = V::lanes;
    const int64_t rows = np_, stride = vectors ? vectors * lanes : whole_, to_tails = rows * stride;
    const scalar *A = A_, *u = u_, *a = a_, *pad = row_pad_;
    scalar *K = K_, *z = z_, *columns = col_sum_;
    const scalar *from_tails = from + to_tails, *A_tails = A_ + to_tails;
    scalar* K_tails = K_ + to_tails;
    full tail_u = {}, tail_columns = {};
    if constexpr (tail) tail_u = P::repeat(u + stride);
    full even[vectors ? vectors : 1], odd[vectors ? vectors : 1] = {};
    if (vectors)
      for (int v = 0; v < vectors; ++v) even[v] = load<full>(col_pad_ + v * lanes);
    else
      for (int64_t j = 0; j < stride; ++j) columns[j] = col_pad_[j];
    auto safe = four{} == four{};
    const auto add = [&](int64_t i, const scalar* scaled, const scalar* tails) HELO_FAST_LAMBDA {
      const scalar* scale = z + i;
#pragma GCC unroll 4
      for (int64_t j = 0; j < stride; j += lanes) {
        const full first = scale[0] * load<full>(scaled + j) + scale[1] * load<full>(scaled + stride + j);
        const full second = scale[2] * load<full>(scaled + 2 * stride + j) + scale[3] * load<full>(scaled + 3 * stride + j);
        if (vectors) {
          even[j / lanes] += first;
          odd[j / lanes] += second;
        } else {
          store(columns + j, load<full>(columns + j) + first + second);
        }
      }
      if constexpr (tail) tail_columns += P::diagonal(P::repeat(scale)) * load<full>(tails + i * kTail<scalar>);
    };
    const scalar* const result = powers ? K : from;
    const scalar* const result_tails = powers ? K_tails : from_tails;
    for (int64_t i = 0; i < rows; i += 4, from += 4 * stride, A += 4 * stride, K += 4 * stride) {
      full sums[4] = {}, tail_sums = {};
#pragma GCC unroll 4
      for (int64_t j = 0; j < stride; j += lanes) {
        const full weight = load<full>(u + j);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          full v = load<full>(from + r * stride + j);
          if (powers) {
            v *= load<full>(A + r * stride + j);
            store(K + r * stride + j, v);
          }
          sums[r] += v * weight;
        }
      }
      if constexpr (tail) {
        full v = load<full>(from_tails + i * kTail<scalar>);
        if (powers) {
          v *= load<full>(A_tails + i * kTail<scalar>);
          store(K_tails + i * kTail<scalar>, v);
        }
        tail_sums = v * tail_u;
      }
      scalar scale[4];
      sum_four<scalar>(sums, scale, tail_sums);
      four sum, top, extra;
      std::memcpy(&sum, scale, sizeof sum);
      std::memcpy(&top, a + i, sizeof top);
      std::memcpy(&extra, pad + i, sizeof extra);
      sum += extra;
      safe &= (sum > 1 / kRange) & (sum < kRange);
      top /= sum;
      std::memcpy(z + i, &top, sizeof top);
      if (i > 0) add(i - 4, result + (i - 4) * stride, result_tails);
    }
    add(rows - 4, result + (rows - 4) * stride, result_tails);
    for (int v = 0; v < vectors; ++v) store(columns + v * lanes, even[v] + odd[v]);
    if constexpr (tail) {
      Sum<scalar> all_rows;
      all_rows.see(tail_columns);
      store(columns + stride, all_rows.to_piece() + load<typename V::piece>(col_pad_ + stride));
    }
    return all(safe);
  }

  template <typename mask>
  static bool all(const mask& lanes) {
    int64_t words[sizeof lanes / 8], every = -1;
    std::memcpy(words, &lanes, sizeof lanes);
    for (int64_t word : words) every &= word;
    return every == -1;
  }

  // The next u from col_sum; false, and no change, where it or a scaling leaves the safe range (or is NaN).
  bool advance(bool powers) {
    const scalar *sums = col_sum_, *last = last_sum_, *b = b_;
    scalar* next = next_u_;
    const full low = full{} + 1 / kRange, high = full{} + kRange;
    auto safe = low < high;
    for (int64_t j = 0; j < mp_; j += V::lanes) {
      const full y = 1 / load<full>(sums + j), u = powers ? y * y * load<full>(last + j) : y;
      safe &= (y > low) & (y < high) & (u > low) & (u < high);
      store(next + j, load<full>(b + j) * u);
    }
    if (!all(safe)) return false;
    swap(u_, next_u_);
    swap(last_sum_, col_sum_);
    return true;
  }

  static void swap(scalar*& x, scalar*& y) {
    scalar* z = x;
    x = y;
    y = z;
  }

  void first(int64_t steps, bool powers) {
    double most = log_u_[0];
    for (int64_t j = 1; j < m_; ++j) most = larger(most, log_u_[j]);
    for (int64_t j = 0; j < mp_; ++j) next_u_[j] = j < m_ ? scalar(log_u_[j] - most) : 0;
    for (int64_t i = 0; i < n_; ++i)
      for_columns<scalar>(m_, [&](auto zero, int64_t j) HELO_FAST_LAMBDA {
        using vector = decltype(zero);
        store(at<vector>(A_, i, j), exp_vectorised(load<vector>(N_ + i * mp_ + j) + load<vector>(next_u_ + j)));
      });
    clear_padding(A_);
    for (int64_t j = 0; j < mp_; ++j) u_[j] = powers ? 1 : b_[j];
    K_of_first_ = psi_of_first_ = true;
    if (!sweep(false) || !advance(false)) return exact(1, powers);
    for (int64_t j = 0; j < mp_; ++j) first_sum_[j] = last_sum_[j];
    if (!powers || steps == 1) return;
    // exp(N + f + g) with g = psi: K itself, but for a factor of its row, which makes no difference.
    for (int64_t j = 0; j < mp_; ++j) next_u_[j] = 1 / last_sum_[j];
    for (int64_t i = 0; i < n_; ++i) {
      Largest<scalar> most_of_row(0);
      for_columns<scalar>(m_, [&](auto zero, int64_t j) HELO_FAST_LAMBDA {
        using vector = decltype(zero);
        const vector v = load<vector>(at<vector>(A_, i, j)) * load<vector>(next_u_ + j);
        most_of_row.see(v);
        store(at<vector>(A_, i, j), v);
      });
      const scalar scale = 1 / most_of_row.result();
      for_columns<scalar>(m_, [&](auto zero, int64_t j) HELO_FAST_LAMBDA {
        using vector = decltype(zero);
        store(at<vector>(A_, i, j), scale * load<vector>(at<vector>(A_, i, j)));
      });
    }
    start_from_b();
  }

  // After the first step: y^2 / 1, where psi + g is 2 log(y / b): one b is left over, here of size 1 at most.
  void start_from_b() {
    for (int64_t j = 0; j < mp_; ++j) u_[j] = b_[j] * (j < m_ ? b_[j] / largest_b_ : 1), last_sum_[j] = 1;
  }

  // Step `step` by log-sum-exps; sets phi, psi, g, K and A from it.
  void exact(int64_t step, bool powers) {
    const double power = powers ? step : 1;
    find_logarithms(step, powers);
    for (int64_t i = 0; i < n_; ++i) {
      const scalar* N = N_ + i * mp_;
      double most = -HUGE_VAL, total = 0;
      for (int64_t j = 0; j < m_; ++j) most = larger(most, power * N[j] + log_u_[j]);
      for (int64_t j = 0; j < m_; ++j) total += exp_vectorised(scalar(power * N[j] + log_u_[j] - most));
      phi_[i] = -(most + std::log(total));
      alpha_[i] = phi_[i] + std::log(double(a_[i]));
      z_[i] = a_[i] > 1 / kLarge ? a_[i] : 1 / kLarge;
    }
    for (int64_t j = 0; j < m_; ++j) log_top_[j] = -HUGE_VAL, total_[j] = 0;
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j < m_; ++j) log_top_[j] = larger(log_top_[j], power * N_[i * mp_ + j] + alpha_[i]);
    for (int64_t i = 0; i < n_; ++i) {
      const scalar* N = N_ + i * mp_;
      for (int64_t j = 0; j < m_; ++j) {
        const scalar K = exp_vectorised(scalar(power * N[j] + alpha_[i] - log_top_[j]));
        entry(K_, i, j) = K;
        total_[j] += K;
      }
    }
    for (int64_t j = 0; j < m_; ++j) {
      psi_[j] = -(log_top_[j] + std::log(total_[j]));
      g_[j] = powers ? psi_[j] - beta_[j] : 0;
    }
    for (int64_t i = 0; i < n_; ++i) {
      const scalar* N = N_ + i * mp_;
      for (int64_t j = 0; j < m_; ++j) entry(K_, i, j) /= scalar(z_[i] * total_[j]);
      for (int64_t j = m_; j < padded_columns(); ++j) entry(K_, i, j) = entry(A_, i, j) = 0;
      if (!powers) continue;
      double most = -HUGE_VAL;
      for (int64_t j = 0; j < m_; ++j) most = larger(most, N[j] + g_[j]);
      for (int64_t j = 0; j < m_; ++j) entry(A_, i, j) = exp_vectorised(scalar(N[j] + g_[j] - most));
    }
    clear_padding(K_);
    clear_padding(A_);
    base_ = step;
    K_of_first_ = psi_of_first_ = false;
    for (int64_t j = 0; j < mp_; ++j) u_[j] = b_[j], last_sum_[j] = 1;
    if (powers && step == 1) start_from_b();
  }

  // log u of this step and beta, which is log(y / b) of the step before (of the first: the start y = 1 counts as b, and
  // start_from_b makes up for it).
  void find_logarithms(int64_t step, bool powers) {
    if (step == 1) {
      for (int64_t j = 0; j < m_; ++j) log_u_[j] += powers ? 0 : std::log(double(b_[j])), beta_[j] = 0;
      return;
    }
    if (psi_of_first_) {
      for (int64_t j = 0; j < m_; ++j) {
        psi_[j] = log_u_[j] - (powers ? std::log(double(first_sum_[j])) : 0);
        g_[j] = powers ? psi_[j] : 0;
      }
      base_ = 1;
    }
    for (int64_t j = 0; j < m_; ++j) {
      const double log_u = powers && step == 2 ? 2 * std::log(double(b_[j])) : std::log(u_[j] + 1e-300);
      log_u_[j] = psi_[j] + (step - base_) * g_[j] + log_u;
      beta_[j] = psi_[j] + (step - 1 - base_) * g_[j] - std::log(double(last_sum_[j]));
    }
  }

  int64_t n_ = 0, m_ = 0, np_ = 0, mp_ = 0;  // padded
  int64_t whole_ = 0;                        // columns in whole vectors
  bool tail_ = false;                        // whether a tail comes after them
  int64_t base_ = 1;                         // the step of psi and g
  bool K_of_first_ = false;                  // K stands in A
  bool psi_of_first_ = false;                // psi and g are not computed yet: log_u - log first_sum
  bool uneven_b_ = false;                    // b spans more than the safe range
  scalar largest_b_ = 0;
  scalar *N_, *A_, *K_;                                                        // [np, mp]; of A and K see at()
  scalar *a_, *z_, *row_pad_;                                                  // [np]
  scalar *b_, *u_, *next_u_, *col_sum_, *last_sum_, *first_sum_, *col_pad_, *top_;  // [mp]; sums K' z of this step, the last, the first
  double *phi_, *alpha_;                                                       // [n]
  double *psi_, *g_, *log_u_, *beta_, *log_top_, *total_;                      // [m]
};

}  // namespace HELO_FAST_SET
}  // namespace
