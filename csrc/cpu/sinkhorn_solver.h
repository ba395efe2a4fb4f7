// Sinkhorn forward for one instruction set (see each_set.h).
//
// T = diag(u) K diag(v) with K_ij = exp(phi_i + psi_j - cost_ij / epsilon). The iteration is the log-domain one; its potentials
// are log u + phi and log v + psi (the marginals folded in). phi and psi are held in double, and K is rebuilt around the current
// potentials ("absorbed", u = v = 1) whenever a scaling leaves [1/kRange, kRange]; a half-iteration that would leave it, or that
// meets an underflowed sum, is redone as a log-sum-exp. Between absorptions an iteration is multiply-adds without exponentials:
// v = b / w, then for each group of rows u = a / (K v) and w += K' u while that part of K is in cache: one pass over K.
//
// Layout: a vector holds a brick of K, `count` rows of `width` columns (16 bytes); a group is `lanes` rows, so bricks `width` deep
// (fewer in the last group); K is [group][columns / width][depth][lanes]. Then K v needs no sum across a vector but two within its
// 16-byte pieces per group, K' u one per `width` columns per pass, and neither dimension is padded beyond a brick. Row r of piece p
// of brick k stands at slot p * width + k of its group in everything per row. An empty slot, or a padded column, has K = 0, mass 1,
// and 1 added to its sum, so that its scaling is 1.
//
// The groups of a large problem are cut into slices, by its shape alone; threads may take one each. Rows and columns without mass
// are left out.

#include "simd.h"

namespace {
namespace HELO_FAST_SET {

constexpr int64_t kPairBytes = 60000;   // scratch of one problem, half of it costs, so that two K stay near
constexpr int64_t kCacheBytes = 16384;  // of K, so that two passes over it cost what one does
constexpr double kRange = 1e8;          // an entry of K that underflows is then below 1e-21 of its row

template <typename scalar>
class SinkhornSolver {
 public:
  using P = Pieces<scalar>;
  using full = typename P::full;
  using piece = typename P::piece;
  using wide_piece = typename Vectors<scalar>::wide_piece;
  static constexpr int64_t lanes = P::lanes, width = P::width;

  SinkhornSolver(const SinkhornArguments<scalar>& x, unsigned char* scratch, ForEach for_each)
      : x_(x), scratch_(scratch), for_each_(for_each), hard_rows_(x.kappa_a == 1), hard_columns_(x.kappa_b == 1) {
    const Sizes size(x.n, x.m);
    for (double** p : {&phi_, &log_a_, &alpha_}) *p = take<double>(size.rows);
    for (double** p : {&psi_, &log_b_, &beta_, &top_, &total_}) *p = take<double>(size.columns);
    for (scalar** p : {&a_, &u_, &empty_row_}) *p = take<scalar>(size.rows);
    for (scalar** p : {&b_, &v_, &w_, &empty_column_}) *p = take<scalar>(size.columns);
    rows_ = take<int64_t>(size.rows);
    columns_ = take<int64_t>(size.columns);
    slices_ = take<Slice>(size.slices);
    for (int64_t s = 0; s < size.slices; ++s)
      slices_[s] = {take<scalar>(size.columns * P::count), take<scalar>(size.columns), wide_piece{}, true};
    K_ = take<scalar>(size.rows * size.columns);
    copy_ = take<scalar>(size.rows * size.columns);
  }

  static int64_t scratch_bytes(int64_t n, int64_t m) {
    const Sizes size(n, m);
    const int64_t slice = int64_t(sizeof(Slice)) + size.columns * (P::count + 1) * int64_t(sizeof(scalar)) + 3 * 64;
    const int64_t bytes = size.rows * (3 * 8 + 8 + 3 * int64_t(sizeof(scalar))) +
                          size.columns * (5 * 8 + 8 + 4 * int64_t(sizeof(scalar))) + size.slices * slice +
                          2 * size.rows * size.columns * int64_t(sizeof(scalar)) + 32 * 64;
    return (bytes + 63) / 64 * 64;
  }

  void begin(int64_t problem) {
    problem_ = problem;
    load_marginals();
    iterations_ = 0;
    if (!solvable()) return;
    load_costs();
    start();
  }

  // One iteration is front(), then back(); false after the last one, when the result is written.
  void front() {
    if (!solvable()) return;
    ++iterations_;
    step_columns();
    if (in_cache_) u_safe_ = sum_rows();
  }

  bool back() {
    if (solvable()) {
      if (!(in_cache_ ? add_rows() : step_rows())) {
        exact_rows();
        absorb();
      }
      if (iterations_ < x_.max_iter && !(x_.kept || x_.tol >= 0)) return true;
      if (x_.kept) record(x_.history + (problem_ * x_.kept + iterations_ - 1) * (x_.n + x_.m));
      const bool check = x_.tol >= 0 && iterations_ % x_.check_every == 0;
      if (iterations_ < x_.max_iter && !(check && marginal_error() <= x_.tol)) return true;
    }
    write();
    return false;
  }

 private:
  using Check = RangeCheck<scalar>;
  static Check new_check() { return Check(scalar(1 / kRange), scalar(kRange)); }

  struct Sizes {
    Sizes(int64_t n, int64_t m)
        : rows(padded(n)), columns(padded(m)), slices(n * m < 65536 ? 1 : (rows / lanes + kSliceGroups - 1) / kSliceGroups) {}
    int64_t rows, columns, slices;
  };
  struct Slice {
    scalar* partial;   // [columns / width, lanes] parts of w, or [columns] of what is reduced over rows
    scalar* terms;     // [columns] of a row
    wide_piece spent;  // parts of <plan, cost>
    bool safe;
  };
  static constexpr int64_t kBlockGroups = HELO_FAST_VECTOR_BYTES == 64 ? 12 / width : 8 / width;  // sums and weights fit the registers
  static constexpr int64_t kSliceGroups = 96 / lanes;                                             // whole blocks
  static constexpr scalar kTiny = sizeof(scalar) == 4 ? 1e-22 : 1e-200;  // sums above it have lost nothing to underflow

  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(scratch_);
    scratch_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }

  static int64_t padded(int64_t count) { return (count + lanes - 1) / lanes * lanes; }
  bool solvable() const { return n_ > 0 && m_ > 0; }
  int64_t depth(int64_t group) const { return group < n_ / lanes ? width : (n_ % lanes + P::count - 1) / P::count; }
  // Of the block that starts with this group.
  int64_t block_depth(int64_t group) const { return group + block_groups_ <= n_ / lanes ? block_groups_ * width : (groups_ - 1 - group) * width + depth(groups_ - 1); }
  scalar* bricks(int64_t group) const { return K_ + group * lanes * chunks_ * width; }
  // Of a row: where its first `width` entries are; the next ones follow at stride().
  scalar* row(int64_t slot) const {
    const int64_t group = slot / lanes, first = group / block_groups_ * block_groups_;
    return bricks(first) + ((group - first) * width + slot % width) * lanes + slot % lanes / width * width;
  }
  int64_t stride(int64_t slot) const { return block_depth(slot / lanes / block_groups_ * block_groups_) * lanes; }

  // What holds mass, and where; logarithms in double.
  void load_marginals() {
    const scalar *a = x_.a + problem_ * x_.n, *b = x_.b + problem_ * x_.m;
    n_ = m_ = 0;
    for (int64_t i = 0; i < x_.n; ++i) n_ += a[i] > 0;
    np_ = padded(n_), groups_ = np_ / lanes;
    clear(np_ - lanes, np_, rows_, a_, empty_row_);  // only the last group has empty slots
    for (int64_t group = 0, i = 0, left = n_; group < groups_; ++group)
      for (int64_t p = 0; p < P::count; ++p)
        for (int64_t k = 0; k < depth(group) && left > 0; ++k, ++i, --left) {
          while (!(a[i] > 0)) ++i;
          const int64_t slot = group * lanes + p * width + k;
          rows_[slot] = i, a_[slot] = a[i], empty_row_[slot] = 0;
        }
    for (int64_t j = 0; j < x_.m; ++j)
      if (b[j] > 0) columns_[m_] = j, b_[m_] = b[j], empty_column_[m_] = 0, ++m_;
    mp_ = padded(m_), chunks_ = (m_ + width - 1) / width;
    clear(m_, mp_, columns_, b_, empty_column_);
    block_groups_ = m_ <= 64 ? kBlockGroups : 1;
    in_cache_ = block_groups_ > 1 && np_ * mp_ * int64_t(sizeof(scalar)) <= kCacheBytes;
    slice_count_ = Sizes(n_, m_).slices;
    for (int64_t i = 0; i < np_; ++i) log_a_[i] = log_vectorised(double(a_[i]));
    for (int64_t j = 0; j < mp_; ++j) log_b_[j] = log_vectorised(double(b_[j]));
  }

  static void clear(int64_t begin, int64_t end, int64_t* where, scalar* mass, scalar* empty) {
    for (int64_t i = begin < 0 ? 0 : begin; i < end; ++i) where[i] = -1, mass[i] = 1, empty[i] = 1;
  }

  // The costs between what holds mass, in rows of whole vectors: where they do not stand so already, they are copied.
  void load_costs() {
    const scalar* from = x_.cost + problem_ * x_.n * x_.m;
    copied_ = m_ != x_.m || mp_ != m_;
    if (!copied_) {
      cost_ = from;
      return;
    }
    for_rows([](Slice&) {}, [&](Slice&, int64_t slot) {
      const scalar* row = from + rows_[slot] * x_.m;
      scalar* to = copy_ + slot * mp_;
      for (int64_t j = m_ / lanes * lanes; j < mp_; ++j) to[j] = 1e30;  // K = 0 there
      if (m_ == x_.m) {
        int64_t j = 0;
        for (; j + width <= m_; j += width) store(to + j, load<piece>(row + j));
        for (; j < m_; ++j) to[j] = row[j];
      } else {
        for (int64_t j = 0; j < m_; ++j) to[j] = row[columns_[j]];
      }
    });
    cost_ = copy_;
  }

  const scalar* cost_row(int64_t slot) const { return cost_ + (copied_ ? slot : rows_[slot]) * mp_; }

  // before(slice), then row(slice, slot) for each of its rows.
  template <typename Before, typename Row>
  void for_rows(const Before& before, const Row& row) {
    for_slices([&](Slice& slice, int64_t first, int64_t last) {
      before(slice);
      for (int64_t slot = first * lanes; slot < last * lanes; ++slot)
        if (rows_[slot] >= 0) row(slice, slot);
    });
  }

  template <typename Body>
  void for_slices(const Body& body) {
    const auto run = [&](int64_t s) {
      body(slices_[s], s * kSliceGroups, s + 1 == slice_count_ ? groups_ : (s + 1) * kSliceGroups);
    };
    if (for_each_ == nullptr || slice_count_ == 1) {
      for (int64_t s = 0; s < slice_count_; ++s) run(s);
    } else {
      auto* context = const_cast<void*>(static_cast<const void*>(&run));
      for_each_(slice_count_, [](void* p, int64_t s) { (*static_cast<decltype(run)*>(p))(s); }, context);
    }
  }

  // K around f = 0, its columns scaled so that the largest entry of each is about b_j.
  void start() {
    for (int64_t i = 0; i < np_; ++i) phi_[i] = log_a_[i];
    for_slices([&](Slice& slice, int64_t first, int64_t last) {
      int64_t j = 0;
      for (; j + 4 * lanes <= mp_; j += 4 * lanes) top_of_columns<4>(first, last, j, slice.partial);
      for (; j < mp_; j += lanes) top_of_columns<1>(first, last, j, slice.partial);
    });
    for (int64_t j = 0; j < m_; ++j) {
      scalar top = slices_[0].partial[j];
      for (int64_t s = 1; s < slice_count_; ++s) top = top > slices_[s].partial[j] ? top : slices_[s].partial[j];
      psi_[j] = log_b_[j] - top;
    }
    for (int64_t j = m_; j < mp_; ++j) psi_[j] = 0;
    build();
  }

  template <int vectors>
  void top_of_columns(int64_t first, int64_t last, int64_t j, scalar* top) const {
    const scalar per_epsilon = scalar(1 / x_.epsilon);
    full tops[vectors];
    for (full& each : tops) each = full{} - scalar(HUGE_VAL);
    for (int64_t slot = first * lanes; slot < last * lanes; ++slot) {
      if (rows_[slot] < 0) continue;
      const scalar *cost = cost_row(slot) + j, phi = scalar(phi_[slot]);
#pragma GCC unroll 4
      for (int k = 0; k < vectors; ++k) {
        const full x = phi - load<full>(cost + k * lanes) * per_epsilon;
        tops[k] = x > tops[k] ? x : tops[k];
      }
    }
    for (int k = 0; k < vectors; ++k) store(top + j + k * lanes, tops[k]);
  }

  // K from phi and psi, and its column sums w; u = v = 1.
  void build() {
    const double per_epsilon = 1 / x_.epsilon;
    for (int64_t i = 0; i < np_; ++i) u_[i] = 1;
    for (int64_t j = 0; j < mp_; ++j) v_[j] = 1;
    for_slices([&](Slice& slice, int64_t first, int64_t last) {
      for (int64_t j = 0; j < mp_; ++j) slice.partial[j] = 0;
      if (last == groups_ && n_ % lanes != 0) {  // empty slots
        const int64_t block = (groups_ - 1) / block_groups_ * block_groups_;
        std::memset(bricks(block), 0, sizeof(scalar) * chunks_ * block_depth(block) * lanes);
      }
      for (int64_t slot = first * lanes; slot < last * lanes; ++slot)
        if (rows_[slot] >= 0) build_row(slice, slot, per_epsilon);
    });
    for (int64_t j = 0; j < mp_; ++j) {
      w_[j] = empty_column_[j];
      for (int64_t s = 0; s < slice_count_; ++s) w_[j] += slices_[s].partial[j];
    }
  }

  void build_row(Slice& slice, int64_t slot, double per_epsilon) {
    const scalar* cost = cost_row(slot);
    scalar *sums = slice.partial, *to = row(slot);
    const double phi = phi_[slot];
    const int64_t step = stride(slot);
    for (int64_t j = 0, c = 0; j < mp_; j += lanes) {
      const full entries = exp_of_wide(exponents(phi, psi_ + j, cost + j, per_epsilon));
      store(sums + j, load<full>(sums + j) + entries);
      piece pieces[P::count];
      std::memcpy(pieces, &entries, sizeof entries);
      for (int64_t p = 0; p < P::count && c < chunks_; ++p, ++c) store(to + c * step, pieces[p]);
    }
  }

  // phi + psi - cost / epsilon, in double
  static HELO_FAST_INLINE typename Vectors<scalar>::wide exponents(double phi, const double* psi, const scalar* cost, double per_epsilon) {
    using wide = typename Vectors<scalar>::wide;
    return phi + load<wide>(psi) - __builtin_convertvector(load<full>(cost), wide) * per_epsilon;
  }

  void absorb() {
    for (int64_t i = 0; i < np_; ++i) phi_[i] += log_vectorised(double(u_[i]));
    for (int64_t j = 0; j < mp_; ++j) psi_[j] += log_vectorised(double(v_[j]));
    build();
  }

  // Passes over K, in sinkhorn_sweeps.h.
  void step_columns();
  bool sum_rows();
  bool add_rows();
  bool step_rows();
  void step_long_rows(int64_t first, int64_t last, scalar* w, Check& check);
  void finish_columns(scalar* parts);
  template <int deep>
  void sum_block(int64_t group, Check& check);
  template <int deep>
  void add_block(int64_t group, bool fresh, scalar* w) const;
  template <int deep, int next, bool fresh>
  void sweep(const scalar* K, const full* weights, scalar* w, const scalar* K_next, full* sums) const;
  full scale(int64_t group, const full* sums, Check& check);
  static full rescale(
      bool hard, full sums, scalar* scalings, const scalar* mass, const double* log_mass, const double* potential, double kappa, int64_t at);
  static full damped(full sums, const double* log_mass, const double* potential, double kappa);

  // The same half-iterations as log-sum-exps, into psi and phi.
  void exact_columns() {
    const double per_epsilon = 1 / x_.epsilon;
    for (int64_t i = 0; i < np_; ++i) alpha_[i] = phi_[i] + log_vectorised(double(u_[i]));
    for (int64_t j = 0; j < m_; ++j) top_[j] = -HUGE_VAL, total_[j] = 0;
    for (int64_t slot = 0; slot < np_; ++slot) {
      if (rows_[slot] < 0) continue;
      const scalar* cost = cost_row(slot);
      for (int64_t j = 0; j < m_; ++j) top_[j] = larger(top_[j], alpha_[slot] - cost[j] * per_epsilon);
    }
    for (int64_t slot = 0; slot < np_; ++slot) {
      if (rows_[slot] < 0) continue;
      const scalar* cost = cost_row(slot);
      for (int64_t j = 0; j < m_; ++j) total_[j] += exp_vectorised(scalar(alpha_[slot] - cost[j] * per_epsilon - top_[j]));
    }
    for (int64_t j = 0; j < m_; ++j) psi_[j] = log_b_[j] - x_.kappa_b * (top_[j] + log_vectorised(total_[j]));
    for (int64_t j = 0; j < mp_; ++j) v_[j] = 1;
  }

  void exact_rows() {
    const double per_epsilon = 1 / x_.epsilon;
    scalar* terms = slices_[0].terms;
    for (int64_t j = 0; j < mp_; ++j) beta_[j] = psi_[j] + log_vectorised(double(v_[j]));
    for (int64_t slot = 0; slot < np_; ++slot) {
      if (rows_[slot] < 0) continue;
      const scalar* cost = cost_row(slot);
      double top = -HUGE_VAL, total = 0;
      for (int64_t j = 0; j < m_; ++j) top = larger(top, beta_[j] - cost[j] * per_epsilon);
      for (int64_t j = 0; j < m_; ++j) terms[j] = exp_vectorised(scalar(beta_[j] - cost[j] * per_epsilon - top));
      for (int64_t j = 0; j < m_; ++j) total += terms[j];
      phi_[slot] = log_a_[slot] - x_.kappa_a * (top + log_vectorised(total));
    }
    for (int64_t i = 0; i < np_; ++i) u_[i] = 1;
  }

  static double larger(double x, double y) { return x > y ? x : y; }

  // Potentials in units of epsilon: alpha_ of f (by slot), beta_ of g.
  void take_potentials() {
    for (int64_t i = 0; i < np_; ++i) alpha_[i] = phi_[i] + log_vectorised(double(u_[i])) - log_a_[i];
    for (int64_t j = 0; j < mp_; ++j) beta_[j] = psi_[j] + log_vectorised(double(v_[j])) - log_b_[j];
  }

  void put_potentials(scalar* f, scalar* g, double unit) const {
    for (int64_t i = 0; i < np_; ++i)
      if (rows_[i] >= 0) f[rows_[i]] = scalar(unit * alpha_[i]);
    for (int64_t j = 0; j < m_; ++j) g[columns_[j]] = scalar(unit * beta_[j]);
  }

  // L1 distance of the column marginal from its optimal value; needs w of the current u.
  double marginal_error() {
    if (x_.slope_b != 0) take_potentials();
    double error = 0;
    for (int64_t j = 0; j < m_; ++j) {
      const double target = x_.slope_b == 0 ? b_[j] : b_[j] * std::exp(-x_.slope_b * beta_[j]);
      error += std::fabs(double(v_[j]) * w_[j] - target);
    }
    return error;
  }

  void record(scalar* history) {
    for (int64_t i = 0; i < x_.n + x_.m; ++i) history[i] = -HUGE_VAL;
    take_potentials();
    put_potentials(history, history + x_.n, 1);
  }

  void write() {
    scalar *f = x_.f + problem_ * x_.n, *g = x_.g + problem_ * x_.m;
    if (n_ < x_.n || m_ < x_.m || !solvable()) {
      std::memset(x_.plan + problem_ * x_.n * x_.m, 0, sizeof(scalar) * x_.n * x_.m);
      for (int64_t i = 0; i < x_.n; ++i) f[i] = -HUGE_VAL;
      for (int64_t j = 0; j < x_.m; ++j) g[j] = -HUGE_VAL;
    }
    double transport_cost = 0, error = 0;
    if (solvable()) {
      for_rows([](Slice& slice) { slice.spent = wide_piece{}; }, [&](Slice& slice, int64_t slot) { write_row(slice, slot); });
      for (int64_t s = 0; s < slice_count_; ++s)
        for (int64_t k = 0; k < width; ++k) transport_cost += slices_[s].spent[k];
      error = marginal_error();
      take_potentials();
      put_potentials(f, g, x_.epsilon);
    } else {
      iterations_ = x_.max_iter;
      for (int64_t j = 0; j < m_; ++j) error += b_[j];
    }
    x_.transport_cost[problem_] = scalar(transport_cost);
    x_.marginal_error[problem_] = scalar(error);
    x_.n_iter[problem_] = static_cast<int32_t>(iterations_);
  }

  void write_row(Slice& slice, int64_t slot) {
    const int64_t step = stride(slot);
    const scalar *K = row(slot), *cost = cost_row(slot);
    scalar *plan = x_.plan + (problem_ * x_.n + rows_[slot]) * x_.m, *terms = m_ == x_.m ? plan : slice.terms;
    const scalar u = u_[slot], *v = v_;
    const int64_t whole = m_ / width, chunks = chunks_;
    const auto entries = [&](int64_t c) { return u * load<piece>(K + c * step) * load<piece>(v + c * width); };
    piece spent = {};
    for (int64_t c = 0; c < whole; ++c) {
      const piece each = entries(c);
      spent += each * load<piece>(cost + c * width);
      store(terms + c * width, each);
    }
    if (whole < chunks) {
      const piece each = entries(whole);
      spent += each * load<piece>(cost + whole * width);
      for (int64_t j = whole * width; j < m_; ++j) terms[j] = each[j - whole * width];
    }
    slice.spent += __builtin_convertvector(spent, wide_piece);
    if (terms != plan)
      for (int64_t j = 0; j < m_; ++j) plan[columns_[j]] = terms[j];
  }

  const SinkhornArguments<scalar>& x_;
  unsigned char* scratch_;
  ForEach for_each_;
  const bool hard_rows_, hard_columns_;  // marginals
  int64_t problem_ = 0, iterations_ = 0;
  int64_t n_ = 0, m_ = 0, np_ = 0, mp_ = 0;             // rows and columns with mass; padded to whole vectors
  int64_t groups_ = 0, block_groups_ = 1, chunks_ = 0, slice_count_ = 0;   // a chunk is `width` columns
  int64_t *rows_, *columns_;                            // where the mass is; -1 in an empty slot
  double *phi_, *log_a_, *alpha_;                       // [np]
  double *psi_, *log_b_, *beta_, *top_, *total_;        // [mp]
  scalar *a_, *u_, *empty_row_;                         // [np]
  scalar *b_, *v_, *w_, *empty_column_;                 // [mp]
  Slice* slices_;
  scalar *K_, *copy_;   // [np, mp]
  const scalar* cost_;  // [.., mp]
  bool copied_ = false, in_cache_ = false, u_safe_ = true;
};

}  // namespace HELO_FAST_SET
}  // namespace

#include "sinkhorn_sweeps.h"

namespace {
namespace HELO_FAST_SET {

// Two small problems advance in turn, half an iteration each, so that the processor works on one while it waits for the other's sums.
template <typename scalar>
void solve_some(const SinkhornArguments<scalar>& x, int64_t begin, int64_t end, unsigned char* scratch, ForEach for_each) {
  using Solver = SinkhornSolver<scalar>;
  const int64_t bytes = Solver::scratch_bytes(x.n, x.m);
  const auto next = [&](Solver& solver) { return begin < end && (solver.begin(begin++), true); };
  Solver first(x, scratch, for_each);
  bool first_runs = next(first);
  if (bytes <= kPairBytes) {
    Solver second(x, scratch + bytes, for_each);
    for (bool second_runs = next(second); second_runs;) {
      if (first_runs) first.front();
      second.front();
      if (first_runs) first_runs = first.back() || next(first);
      second_runs = second.back() || next(second);
    }
  }
  while (first_runs) {
    first.front();
    first_runs = first.back() || next(first);
  }
}

template <typename scalar>
int64_t scratch_of_two(int64_t n, int64_t m) {
  const int64_t bytes = SinkhornSolver<scalar>::scratch_bytes(n, m);
  return bytes > kPairBytes ? bytes : 2 * bytes;
}

template <typename scalar>
constexpr SinkhornKernel<scalar> sinkhorn = {solve_some<scalar>, scratch_of_two<scalar>};

}  // namespace HELO_FAST_SET
}  // namespace
