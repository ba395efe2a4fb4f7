// The passes of sinkhorn_solver.h over K: how an iteration is spent.

namespace {
namespace HELO_FAST_SET {

// call(depth as a constant)
template <int most, typename Call>
HELO_FAST_INLINE void with_depth(int64_t depth, const Call& call) {
  switch (depth) {
#define HELO_FAST_DEPTH(deep) \
case deep:                  \
  if constexpr (deep < most) return call(std::integral_constant<int, deep>());
    HELO_FAST_DEPTH(1)
    HELO_FAST_DEPTH(2)
    HELO_FAST_DEPTH(3)
    HELO_FAST_DEPTH(4)
    HELO_FAST_DEPTH(5)
    HELO_FAST_DEPTH(6)
    HELO_FAST_DEPTH(7)
    HELO_FAST_DEPTH(8)
    HELO_FAST_DEPTH(9)
    HELO_FAST_DEPTH(10)
    HELO_FAST_DEPTH(11)
#undef HELO_FAST_DEPTH
    default: return call(std::integral_constant<int, most>());
  }
}

// Each brick's part of u.
template <typename scalar>
HELO_FAST_INLINE void spread(typename Vectors<scalar>::full u, typename Vectors<scalar>::full* weights) {
  using P = Pieces<scalar>;
  weights[0] = P::template spread<0>(u);
  weights[1] = P::template spread<1>(u);
  if constexpr (P::width == 4) {
    weights[2] = P::template spread<2>(u);
    weights[3] = P::template spread<3>(u);
  }
}

struct NoTail {
  HELO_FAST_INLINE void operator()() {}
};

// What is left after sum_rows(): u = a / sums, a group a piece. A sweep calls for one at every chunk.
template <typename scalar>
struct SinkhornSolver<scalar>::Scaling {
  explicit Scaling(SinkhornSolver& solver) : solver(solver), check(new_check()) {}
  HELO_FAST_INLINE void operator()() {
    if (group < solver.groups_) piece();
  }
  HELO_FAST_INLINE void piece() {
    solver.scale(group, load<full>(solver.sums_ + group * lanes), check);
    ++group;
  }
  HELO_FAST_INLINE void finish() {
    while (group < solver.groups_) piece();
    solver.u_safe_ = check.passed();
  }
  SinkhornSolver& solver;
  Check check;
  int64_t group = 0;
};

// What is left after add_rows(): w from its parts, and v of the next iteration, a vector a piece.
template <typename scalar>
struct SinkhornSolver<scalar>::Finishing {
  explicit Finishing(SinkhornSolver& solver) : solver(solver), check(new_check()), needed(solver.iterating_ && !solver.redone_) {
    if (!needed) j = solver.mp_;
  }
  HELO_FAST_INLINE void operator()() {
    if (j < solver.mp_) piece();
  }
  HELO_FAST_INLINE void piece() {
    solver.finish(j, check);
    j += lanes;
  }
  HELO_FAST_INLINE void finish() {
    while (j < solver.mp_) piece();
    if (needed) solver.v_safe_ = check.passed();
  }
  SinkhornSolver& solver;
  Check check;
  const bool needed;
  int64_t j = 0;
};

// K v
template <typename scalar>
template <typename Tail>
HELO_FAST_INLINE void SinkhornSolver<scalar>::sum_rows(Tail tail) {
  iterating_ = running();
  for (int64_t group = 0; group < groups_; group += kBlockGroups)
    with_depth<kBlockGroups * width>(block_depth(group), [&](auto deep) HELO_FAST_LAMBDA { sum_block<deep>(group, tail); });
  tail.finish();
}

// w = K' u
template <typename scalar>
template <typename Tail>
HELO_FAST_INLINE void SinkhornSolver<scalar>::add_rows(Tail tail) {
  scalar* w = slices_[0].partial;
  if (!redone_)
    for (int64_t group = 0; group < groups_; group += kBlockGroups)
      with_depth<kBlockGroups * width>(
          block_depth(group), [&](auto deep) HELO_FAST_LAMBDA { add_block<deep>(group, group == 0, w, tail); });
  tail.finish();
}

// u = a / (K v) and w = K' u in one pass over K; whether u is safe.
template <typename scalar>
bool SinkhornSolver<scalar>::step_rows() {
  for_slices([&](Slice& slice, int64_t first, int64_t last) {
    Check check = new_check();
    NoTail none;
    if (block_groups_ == 1)
      step_long_rows(first, last, slice.partial, check);
    else
      for (int64_t group = first; group < last; group += kBlockGroups)
        with_depth<kBlockGroups * width>(block_depth(group), [&](auto deep) {
          constexpr int sets = (deep + int(width) - 1) / int(width);
          sum_block<deep>(group, none);
          for (int set = 0; set < sets; ++set) scale(group + set, load<full>(sums_ + (group + set) * lanes), check);
          add_block<deep>(group, group == first, slice.partial, none);
        });
    slice.safe = check.passed();
  });
  bool safe = slices_[0].safe;
  for (int64_t s = 1; s < slice_count_; ++s) {
    safe &= slices_[s].safe;
    for (int64_t i = 0; i < chunks_ * lanes; i += lanes)
      store(slices_[0].partial + i, load<full>(slices_[0].partial + i) + load<full>(slices_[s].partial + i));
  }
  return safe;
}

// w and the next v from w's parts.
template <typename scalar>
void SinkhornSolver<scalar>::new_columns() {
  Check check = new_check();
  for (int64_t j = 0; j < mp_; j += lanes) finish(j, check);
  v_safe_ = check.passed();
}

template <typename scalar>
HELO_FAST_INLINE void SinkhornSolver<scalar>::finish(int64_t j, Check& check) {
  const full sums = P::piece_sums(slices_[0].partial + j * P::count) + load<full>(empty_column_ + j);
  store(w_ + j, sums);
  next_columns(j, sums, check);
}

template <typename scalar>
HELO_FAST_INLINE void SinkhornSolver<scalar>::next_columns(int64_t j, full sums, Check& check) {
  const full v = rescale(hard_columns_, sums, b_, count_b_, log_b_, psi_, x_.kappa_b, j, next_g_);
  store(next_v_ + j, v);
  check.see(v);
}

template <typename scalar>
template <int deep, typename Tail>
HELO_FAST_INLINE void SinkhornSolver<scalar>::sum_block(int64_t group, Tail& tail) {
  constexpr int sets = (deep + int(width) - 1) / int(width);
  full sums[sets * width] = {};
  sweep<0, deep, true>(nullptr, nullptr, nullptr, bricks(group), sums, tail);
  scalar* to = sums_ + group * lanes;
#pragma GCC unroll 8
  for (int set = 0; set < sets; ++set) store(to + set * lanes, P::transposed_sums(sums + set * width));
}

template <typename scalar>
template <int deep, typename Tail>
HELO_FAST_INLINE void SinkhornSolver<scalar>::add_block(int64_t group, bool fresh, scalar* w, Tail& tail) const {
  constexpr int sets = (deep + int(width) - 1) / int(width);
  full weights[sets * width];
#pragma GCC unroll 8
  for (int set = 0; set < sets; ++set) spread<scalar>(load<full>(u_ + (group + set) * lanes), weights + set * width);
  if (fresh)
    sweep<deep, 0, true>(bricks(group), weights, w, nullptr, nullptr, tail);
  else
    sweep<deep, 0, false>(bricks(group), weights, w, nullptr, nullptr, tail);
}

// Where rows are long, a sweep adds one group's part to w, from the first-level cache, while the next group arrives in it.
template <typename scalar>
void SinkhornSolver<scalar>::step_long_rows(int64_t first, int64_t last, scalar* w, Check& check) {
  full sums[width] = {}, weights[width];
  NoTail none;
  for (int64_t c = 0; c < chunks_; ++c) store(w + c * lanes, full{});
  with_depth<width>(depth(first), [&](auto next) { sweep<0, next, false>(nullptr, weights, w, bricks(first), sums, none); });
  for (int64_t group = first; group < last; ++group) {
    spread<scalar>(scale(group, P::transposed_sums(sums), check), weights);
    for (full& sum : sums) sum = full{};
    if (group + 1 < last)
      with_depth<width>(
          depth(group + 1), [&](auto next) { sweep<width, next, false>(bricks(group), weights, w, bricks(group + 1), sums, none); });
    else
      with_depth<width>(depth(group), [&](auto deep) { sweep<deep, 0, false>(bricks(group), weights, w, nullptr, sums, none); });
  }
}

// w (from nothing where fresh) += K' u of bricks `deep` deep; sums += K_next v of bricks `next` deep.
template <typename scalar>
template <int deep, int next, bool fresh, typename Tail>
HELO_FAST_INLINE void SinkhornSolver<scalar>::sweep(
    const scalar* K, const full* weights, scalar* w, const scalar* K_next, full* sums, Tail& tail) const {
  const scalar* v = v_;
  const auto sum = [&]() HELO_FAST_LAMBDA {
    const full vc = P::repeat(v);
    v += width;
#pragma GCC unroll 16
    for (int k = 0; k < next; ++k) sums[k] += load<full>(K_next + k * lanes) * vc;
    K_next += next * lanes;
  };
  const auto add = [&]() HELO_FAST_LAMBDA {
    full even = load<full>(K) * weights[0], odd = fresh ? full{} : load<full>(w);
#pragma GCC unroll 16
    for (int k = 1; k < deep; ++k) (k % 2 ? odd : even) += load<full>(K + k * lanes) * weights[k];
    store(w, even + odd);
    K += deep * lanes;
    w += lanes;
  };
  for (int64_t c = 0; c < chunks_; ++c) {
    if constexpr (next > 0) sum();
    if constexpr (deep > 0) add();
    tail();
  }
}

template <typename scalar>
HELO_FAST_INLINE typename SinkhornSolver<scalar>::full SinkhornSolver<scalar>::scale(int64_t group, full sums, Check& check) {
  const int64_t slot = group * lanes;
  sums += load<full>(empty_row_ + slot);
  const full u = rescale(hard_rows_, sums, a_, count_a_, log_a_, phi_, x_.kappa_a, slot, alpha_);
  store(u_ + slot, u);
  check.see(u);
  return u;
}

// mass * exp((kappa - 1) * potential) * sums^-kappa. Where the marginal is soft, `updated` receives the new potential less log mass.
template <typename scalar>
HELO_FAST_INLINE typename SinkhornSolver<scalar>::full SinkhornSolver<scalar>::rescale(
    bool hard, full sums, const scalar* mass, scalar count, const double* log_mass, const double* potential, double kappa, int64_t at,
    double* updated) const {
  if (!hard) return damped(sums, log_mass + at, potential + at, kappa, updated + at);
  return sums > kTiny ? load<full>(mass + at) / (sums * count) : full{} + scalar(HUGE_VAL);
}

template <typename scalar>
__attribute__((noinline)) typename SinkhornSolver<scalar>::full SinkhornSolver<scalar>::damped(
    full sums, const double* log_mass, const double* potential, double kappa, double* updated) {
  full result;
  for (int64_t i = 0; i < lanes; ++i) {
    updated[i] = kappa * (potential[i] - log_vectorised(double(sums[i])));
    const double x = log_mass[i] - potential[i] + updated[i];
    result[i] = sums[i] > kTiny ? scalar(exp_vectorised(x < 80 ? x : 80)) : scalar(HUGE_VAL);
  }
  return result;
}

}  // namespace HELO_FAST_SET
}  // namespace
