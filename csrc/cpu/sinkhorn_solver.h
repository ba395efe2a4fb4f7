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
// of brick k stands at slot p * width + k of its group in everything per row. Masses are kept times a count, which is 1; but uniform ones
// are 1 times n and m, and the scalings divided by these: rounded, 1/n and 1/m would differ in sum, and f and g move apart by as much at
// every iteration. An empty slot, or a padded column, has K = 0, 1 as its mass times the count, and 1 / count added to its sum, so that
// its scaling is 1.
//
// The groups of a large problem are cut into slices, by its shape alone; threads may take one each. Rows and columns without mass
// are left out. How K comes from the costs, and the plan from K, stands in sinkhorn_matrix.h; the passes over K in sinkhorn_sweeps.h.

#include "simd.h"

namespace {
namespace HELO_FAST_SET {

constexpr int64_t kCacheBytes = 16384;  // of K: two of them stay in the first-level cache
constexpr int64_t kBlockColumns = 64;   // beyond, a block's part of K no longer stays there from its first pass to its second
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
      : x_(x),
        scratch_(scratch),
        for_each_(for_each),
        hard_rows_(x.kappa_a == 1),
        hard_columns_(x.kappa_b == 1),
        count_a_(x.a ? 1 : scalar(x.n)),
        count_b_(x.b ? 1 : scalar(x.m)) {
    const Sizes size(x.n, x.m);
    for (double** p : {&phi_, &log_a_, &alpha_}) *p = take<double>(size.rows);
    for (double** p : {&psi_, &log_b_, &beta_, &g_, &next_g_, &top_, &total_}) *p = take<double>(size.columns);
    for (scalar** p : {&a_, &u_, &sums_, &empty_row_}) *p = take<scalar>(size.rows);
    for (scalar** p : {&b_, &v_, &next_v_, &w_, &empty_column_}) *p = take<scalar>(size.columns);
    rows_ = take<int64_t>(size.rows);
    columns_ = take<int64_t>(size.columns);
    slices_ = take<Slice>(size.slices);
    for (int64_t s = 0; s < size.slices; ++s)
      slices_[s] = {take<scalar>(size.columns * P::count), wide_piece{}, true};
    K_ = take<scalar>(size.rows * size.columns);
    copy_ = take<scalar>(size.rows * size.columns);
  }

  static int64_t scratch_bytes(int64_t n, int64_t m) {
    const Sizes size(n, m);
    const int64_t slice = int64_t(sizeof(Slice)) + size.columns * P::count * int64_t(sizeof(scalar)) + 64;
    const int64_t bytes = size.rows * (3 * 8 + 8 + 4 * int64_t(sizeof(scalar))) +
                          size.columns * (7 * 8 + 8 + 5 * int64_t(sizeof(scalar))) + size.slices * slice +
                          2 * size.rows * size.columns * int64_t(sizeof(scalar)) + 34 * 64;
    return (bytes + 63) / 64 * 64;
  }

  static bool in_cache(int64_t n, int64_t m) {
    return m <= kBlockColumns && padded(n) * padded(m) * int64_t(sizeof(scalar)) <= kCacheBytes;
  }

  // Takes up the next of the problems [begin, end), up to its first v; false, and no work from then on, where there is none.
  bool next(int64_t& begin, int64_t end) {
    while (begin < end) {
      problem_ = begin++;
      load_marginals();
      iterations_ = 0;
      iterating_ = false;
      if (n_ > 0 && m_ > 0) {
        load_costs();
        start();
        scalar* parts = slices_[0].partial;
        for (int64_t c = chunks_; c < mp_ / width; ++c) store(parts + c * lanes, full{});  // no sweep writes there
        columns_of_sums();
        take_columns();
        return true;
      }
      write_nothing();
    }
    n_ = m_ = np_ = mp_ = groups_ = chunks_ = 0;
    return false;
  }

  bool running() const { return n_ > 0; }

  // An iteration: u, w, and v of the next. False after the last one, when the result is written.
  bool iterate() {
    iterating_ = true;
    if (step_rows())
      new_columns();
    else
      redo_rows();
    return end_iteration();
  }

  // The same in steps, for problems in cache: sum_rows(), scaling, check_rows(), add_rows(), finishing, end_iteration(). Two problems
  // advance in turn. Scaling and finishing are short chains of instructions that wait for each other: they come as a tail, and are
  // worked off in pieces while the other problem sweeps its K.
  struct Scaling;
  struct Finishing;
  template <typename Tail>
  void sum_rows(Tail tail);
  template <typename Tail>
  void add_rows(Tail tail);

  void check_rows() {
    if (!u_safe_) redo_rows();
  }

  HELO_FAST_INLINE bool end_iteration() {
    if (!iterating_) return running();
    iterating_ = redone_ = false;
    if (++iterations_ == x_.max_iter || x_.kept || x_.tol >= 0) return end_iteration_with_results();
    take_columns();
    return true;
  }

 private:
  __attribute__((noinline)) bool end_iteration_with_results() {
    bool more = iterations_ < x_.max_iter;
    if (x_.kept) record(x_.history + (problem_ * x_.kept + iterations_ - 1) * (x_.n + x_.m));
    if (more && x_.tol >= 0 && iterations_ % x_.check_every == 0) more = !(marginal_error() <= x_.tol);
    more ? take_columns() : write();
    return more;
  }

  using Check = RangeCheck<scalar>;
  static Check new_check() { return Check(scalar(1 / kRange), scalar(kRange)); }

  struct Sizes {
    Sizes(int64_t n, int64_t m)
        : rows(padded(n)), columns(padded(m)), slices(n * m < 65536 ? 1 : (rows / lanes + kSliceGroups - 1) / kSliceGroups) {}
    int64_t rows, columns, slices;
  };
  struct Slice {
    scalar* partial;   // [columns / width, lanes] parts of w, or [count, columns] of what is reduced over rows or written to them
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
    const scalar *a = x_.a ? x_.a + problem_ * x_.n : nullptr, *b = x_.b ? x_.b + problem_ * x_.m : nullptr;
    n_ = a ? 0 : x_.n, m_ = 0;
    for (int64_t i = 0; a && i < x_.n; ++i) n_ += a[i] > 0;
    np_ = padded(n_), groups_ = np_ / lanes;
    clear(np_ - lanes, np_, rows_, a_, empty_row_, count_a_);  // only the last group has empty slots
    for (int64_t group = 0, i = 0, left = n_; group < groups_; ++group)
      for (int64_t p = 0; p < P::count; ++p)
        for (int64_t k = 0; k < depth(group) && left > 0; ++k, ++i, --left) {
          while (a && !(a[i] > 0)) ++i;
          const int64_t slot = group * lanes + p * width + k;
          rows_[slot] = i, a_[slot] = a ? a[i] : 1, empty_row_[slot] = 0;
        }
    for (int64_t j = 0; j < x_.m; ++j)
      if (!b || b[j] > 0) columns_[m_] = j, b_[m_] = b ? b[j] : 1, empty_column_[m_] = 0, ++m_;
    mp_ = padded(m_), chunks_ = (m_ + width - 1) / width;
    clear(m_, mp_, columns_, b_, empty_column_, count_b_);
    block_groups_ = m_ <= kBlockColumns ? kBlockGroups : 1;
    slice_count_ = Sizes(n_, m_).slices;
    for (int64_t i = 0; i < np_; ++i) log_a_[i] = log_vectorised(double(a_[i]) / count_a_);
    for (int64_t j = 0; j < mp_; ++j) log_b_[j] = log_vectorised(double(b_[j]) / count_b_);
  }

  static void clear(int64_t begin, int64_t end, int64_t* where, scalar* mass, scalar* empty, scalar count) {
    for (int64_t i = begin < 0 ? 0 : begin; i < end; ++i) where[i] = -1, mass[i] = 1, empty[i] = 1 / count;
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

  const scalar* cost_row(int64_t slot) const { return cost_ + (copied_ ? slot : rows_[slot]) * chunks_ * width; }

  void absorb() {
    for (int64_t i = 0; i < np_; ++i) phi_[i] += log_vectorised(double(u_[i]));
    for (int64_t j = 0; j < mp_; ++j) psi_[j] += log_vectorised(double(v_[j]));
    build();
  }

  // In sinkhorn_matrix.h.
  void load_costs();
  void copy_cost_row(const scalar* from, scalar* to) const;
  void start();
  void build();
  void write_plan();
  template <typename Body>
  void for_bricks(int64_t first, int64_t last, const Body& body) const;
  template <typename vector, int vectors>
  void top_of_columns(int64_t first, int64_t last, int64_t j, scalar* top) const;
  void build_bricks(int64_t slot, double per_epsilon, scalar* sums, full* tail_sums) const;
  void write_bricks(Slice& slice, int64_t slot) const;

  // In sinkhorn_sweeps.h.
  bool step_rows();
  void step_long_rows(int64_t first, int64_t last, scalar* w, Check& check);
  void new_columns();
  template <int deep, typename Tail>
  void sum_block(int64_t group, Tail& tail);
  template <int deep, typename Tail>
  void add_block(int64_t group, bool fresh, scalar* w, Tail& tail) const;
  template <int deep, int next, bool fresh, typename Tail>
  void sweep(const scalar* K, const full* weights, scalar* w, const scalar* K_next, full* sums, Tail& tail) const;
  full scale(int64_t group, full sums, Check& check);
  void finish(int64_t j, Check& check);
  void next_columns(int64_t j, full sums, Check& check);
  full rescale(bool hard, full sums, const scalar* mass, scalar count, const double* log_mass, const double* potential, double kappa,
               int64_t at, double* updated) const;
  static full damped(full sums, const double* log_mass, const double* potential, double kappa, double* updated);

  // v of the next iteration takes its place; redone where it is not safe.
  HELO_FAST_INLINE void take_columns() {
    if (!v_safe_) return redo_columns();
    std::swap(v_, next_v_);
    std::swap(g_, next_g_);
  }

  __attribute__((noinline)) void redo_columns() {
    exact_columns();
    absorb();
  }

  __attribute__((noinline)) void redo_rows() {
    exact_rows();
    absorb();
    columns_of_sums();
    redone_ = true;
  }

  void columns_of_sums() {
    Check check = new_check();
    for (int64_t j = 0; j < mp_; j += lanes) next_columns(j, load<full>(w_ + j), check);
    v_safe_ = check.passed();
  }

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
    for (int64_t j = 0; j < m_; ++j) g_[j] = -x_.kappa_b * (top_[j] + log_vectorised(total_[j])), psi_[j] = log_b_[j] + g_[j];
    for (int64_t j = 0; j < mp_; ++j) v_[j] = 1;
  }

  void exact_rows() {
    const double per_epsilon = 1 / x_.epsilon;
    scalar* terms = slices_[0].partial;
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
    double error = 0;
    for (int64_t j = 0; j < m_; ++j) {
      const double mass = double(b_[j]) / count_b_, target = x_.slope_b == 0 ? mass : mass * std::exp(-x_.slope_b * g_[j]);
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
    if (n_ < x_.n || m_ < x_.m) clear_result();
    write_plan();
    double transport_cost = 0;
    for (int64_t s = 0; s < slice_count_; ++s)
      for (int64_t k = 0; k < width; ++k) transport_cost += slices_[s].spent[k];
    const double error = marginal_error();
    take_potentials();
    put_potentials(x_.f + problem_ * x_.n, x_.g + problem_ * x_.m, x_.epsilon);
    write_numbers(transport_cost, error, iterations_);
  }

  // Of a problem without mass on a side.
  void write_nothing() {
    clear_result();
    double error = 0;
    for (int64_t j = 0; j < m_; ++j) error += double(b_[j]) / count_b_;
    write_numbers(0, error, x_.max_iter);
  }

  void clear_result() {
    std::memset(x_.plan + problem_ * x_.n * x_.m, 0, sizeof(scalar) * x_.n * x_.m);
    for (int64_t i = 0; i < x_.n; ++i) x_.f[problem_ * x_.n + i] = -HUGE_VAL;
    for (int64_t j = 0; j < x_.m; ++j) x_.g[problem_ * x_.m + j] = -HUGE_VAL;
  }

  void write_numbers(double transport_cost, double error, int64_t iterations) {
    x_.transport_cost[problem_] = scalar(transport_cost);
    x_.marginal_error[problem_] = scalar(error);
    x_.n_iter[problem_] = static_cast<int32_t>(iterations);
  }

  const SinkhornArguments<scalar>& x_;
  unsigned char* scratch_;
  ForEach for_each_;
  const bool hard_rows_, hard_columns_;  // marginals
  const scalar count_a_, count_b_;       // a_ and b_ are masses times these
  int64_t problem_ = 0, iterations_ = 0;
  int64_t n_ = 0, m_ = 0, np_ = 0, mp_ = 0;             // rows and columns with mass; padded to whole vectors
  int64_t groups_ = 0, block_groups_ = 1, chunks_ = 0, slice_count_ = 0;   // a chunk is `width` columns
  int64_t *rows_, *columns_;                            // where the mass is; -1 in an empty slot
  double *phi_, *log_a_, *alpha_;                       // [np]
  double *psi_, *log_b_, *beta_, *top_, *total_;        // [mp]
  double *g_, *next_g_;                                 // [mp]; of v where the marginal is soft: log v, rounded, would be too coarse
  scalar *a_, *u_, *sums_, *empty_row_;                 // [np]
  scalar *b_, *v_, *next_v_, *w_, *empty_column_;       // [mp]
  Slice* slices_;
  scalar *K_, *copy_;   // [np, mp]
  const scalar* cost_;  // rows that can be read in pieces: [.., chunks * width]
  bool copied_ = false, iterating_ = false, redone_ = false, u_safe_ = true, v_safe_ = true;
};

}  // namespace HELO_FAST_SET
}  // namespace

#include "sinkhorn_matrix.h"
#include "sinkhorn_sweeps.h"

namespace {
namespace HELO_FAST_SET {

template <typename scalar>
void solve_some(const SinkhornArguments<scalar>& x, int64_t begin, int64_t end, unsigned char* scratch, ForEach for_each) {
  using Solver = SinkhornSolver<scalar>;
  Solver first(x, scratch, for_each);
  if (!Solver::in_cache(x.n, x.m)) {
    while (first.next(begin, end))
      while (first.iterate()) {}
    return;
  }
  Solver second(x, scratch + Solver::scratch_bytes(x.n, x.m), for_each);
  first.next(begin, end);
  second.next(begin, end);
  while (first.running() || second.running()) {
    first.sum_rows(typename Solver::Finishing(second));
    if (!second.end_iteration()) second.next(begin, end);
    second.sum_rows(typename Solver::Scaling(first));
    first.check_rows();
    first.add_rows(typename Solver::Scaling(second));
    second.check_rows();
    second.add_rows(typename Solver::Finishing(first));
    if (!first.end_iteration()) first.next(begin, end);
  }
}

template <typename scalar>
int64_t scratch_bytes(int64_t n, int64_t m) {
  return (SinkhornSolver<scalar>::in_cache(n, m) ? 2 : 1) * SinkhornSolver<scalar>::scratch_bytes(n, m);
}

template <typename scalar>
constexpr SinkhornKernel<scalar> sinkhorn = {solve_some<scalar>, scratch_bytes<scalar>};

}  // namespace HELO_FAST_SET
}  // namespace
