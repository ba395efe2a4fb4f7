// Of sinkhorn_solver.h: K from the costs, and the plan from K. Rows of the costs and of the plan are read and written in whole
// vectors, and turned into bricks and back in registers, those of `count` rows at a time; the last columns go in pieces.

namespace {
namespace HELO_FAST_SET {

// body(slot) for the bricks of the groups [first, last): rows slot, slot + width, ... of them.
template <typename scalar>
template <typename Body>
HELO_FAST_INLINE void SinkhornSolver<scalar>::for_bricks(int64_t first, int64_t last, const Body& body) const {
  for (int64_t group = first; group < last; ++group)
    for (int64_t k = 0; k < depth(group); ++k) body(group * lanes + k);
}

// The costs between what holds mass, in rows of whole pieces: where they do not stand so already, they are copied.
template <typename scalar>
void SinkhornSolver<scalar>::load_costs() {
  const scalar* from = x_.cost + problem_ * x_.n * x_.m;
  copied_ = m_ != x_.m || m_ % width != 0;
  cost_ = copied_ ? copy_ : from;
  if (!copied_) return;
  for_slices([&](Slice&, int64_t first, int64_t last) {
    for (int64_t slot = first * lanes; slot < last * lanes; ++slot)
      if (rows_[slot] >= 0) copy_cost_row(from + rows_[slot] * x_.m, copy_ + slot * chunks_ * width);
  });
}

template <typename scalar>
void SinkhornSolver<scalar>::copy_cost_row(const scalar* from, scalar* to) const {
  for (int64_t j = (chunks_ - 1) * width; j < chunks_ * width; ++j) to[j] = 1e30;  // K = 0 there
  if (m_ != x_.m) {
    for (int64_t j = 0; j < m_; ++j) to[j] = from[columns_[j]];
    return;
  }
  int64_t j = 0;
  for (; j + width <= m_; j += width) store(to + j, load<piece>(from + j));
  for (; j < m_; ++j) to[j] = from[j];
}

// K around f = 0, its columns scaled so that the largest entry of each is about b_j.
template <typename scalar>
void SinkhornSolver<scalar>::start() {
  for (int64_t i = 0; i < np_; ++i) phi_[i] = log_a_[i];
  for_slices([&](Slice& slice, int64_t first, int64_t last) {
    const int64_t end = chunks_ * width;
    int64_t j = 0;
    for (; j + 8 * lanes <= end; j += 8 * lanes) top_of_columns<full, 8>(first, last, j, slice.partial);
    for (; j + 2 * lanes <= end; j += 2 * lanes) top_of_columns<full, 2>(first, last, j, slice.partial);
    for (; j + lanes <= end; j += lanes) top_of_columns<full, 1>(first, last, j, slice.partial);
    for (; j < end; j += width) top_of_columns<piece, 1>(first, last, j, slice.partial);
  });
  for (int64_t j = 0; j < m_; ++j) {
    scalar top = slices_[0].partial[j];
    for (int64_t s = 1; s < slice_count_; ++s) top = top > slices_[s].partial[j] ? top : slices_[s].partial[j];
    psi_[j] = log_b_[j] - top;
  }
  for (int64_t j = m_; j < mp_; ++j) psi_[j] = log_b_[j];
  build();
}

template <typename scalar>
template <typename vector, int vectors>
HELO_FAST_INLINE void SinkhornSolver<scalar>::top_of_columns(int64_t first, int64_t last, int64_t j, scalar* top) const {
  constexpr int64_t size = sizeof(vector) / sizeof(scalar);
  const scalar per_epsilon = scalar(1 / x_.epsilon);
  vector tops[vectors];
  for (vector& each : tops) each = vector{} - scalar(HUGE_VAL);
  for (int64_t slot = first * lanes; slot < last * lanes; ++slot) {
    if (rows_[slot] < 0) continue;
    const scalar *cost = cost_row(slot) + j, phi = scalar(phi_[slot]);
#pragma GCC unroll 8
    for (int k = 0; k < vectors; ++k) {
      const vector x = phi - load<vector>(cost + k * size) * per_epsilon;
      tops[k] = x > tops[k] ? x : tops[k];
    }
  }
  for (int k = 0; k < vectors; ++k) store(top + j + k * size, tops[k]);
}

// K from phi and psi, and its column sums w; u = v = 1.
template <typename scalar>
void SinkhornSolver<scalar>::build() {
  const double per_epsilon = 1 / x_.epsilon;
  for (int64_t i = 0; i < np_; ++i) u_[i] = 1;
  for (int64_t j = 0; j < mp_; ++j) v_[j] = 1;
  for_slices([&](Slice& slice, int64_t first, int64_t last) {
    for (int64_t j = 0; j < mp_; ++j) slice.partial[j] = 0;
    full tail_sums[P::count] = {};
    for_bricks(first, last, [&](int64_t slot) { build_bricks(slot, per_epsilon, slice.partial, tail_sums); });
    for (int64_t c = chunks_ / P::count * P::count; c < chunks_; ++c)
      for (int64_t i = 0; i < lanes; ++i) slice.partial[c * width + i % width] += tail_sums[c % P::count][i];
  });
  for (int64_t j = 0; j < mp_; ++j) {
    w_[j] = empty_column_[j];
    for (int64_t s = 0; s < slice_count_; ++s) w_[j] += slices_[s].partial[j];
  }
}

// exp(phi + psi - cost / epsilon), the exponent in double.
template <typename scalar>
HELO_FAST_INLINE void SinkhornSolver<scalar>::build_bricks(int64_t slot, double per_epsilon, scalar* sums, full* tail_sums) const {
  using wide = typename Vectors<scalar>::wide;
  const scalar* cost[P::count];
  double phi[P::count];
  for (int64_t p = 0; p < P::count; ++p) {
    const int64_t each = slot + p * width;
    const bool empty = rows_[each] < 0;  // K = 0 there
    cost[p] = cost_row(empty ? slot : each);
    phi[p] = empty ? -HUGE_VAL : phi_[each];
  }
  scalar* to = row(slot);
  const int64_t step = stride(slot);
  const double* psi = psi_;
  int64_t c = 0;
  for (; c + P::count <= chunks_; c += P::count) {
    const int64_t j = c * width;
    full rows[P::count];
    const wide psi_j = load<wide>(psi + j);
#pragma GCC unroll 4
    for (int64_t p = 0; p < P::count; ++p)
      rows[p] = exp_of_wide(phi[p] + psi_j - __builtin_convertvector(load<full>(cost[p] + j), wide) * per_epsilon);
    full sum = load<full>(sums + j);
#pragma GCC unroll 4
    for (int64_t p = 0; p < P::count; ++p) sum += rows[p];
    store(sums + j, sum);
    P::transpose_pieces(rows);
#pragma GCC unroll 4
    for (int64_t p = 0; p < P::count; ++p) store(to + (c + p) * step, rows[p]);
  }
  for (int64_t k = 0; c < chunks_; ++c, ++k) {
    const int64_t j = c * width;
    wide_piece pieces[P::count];
#pragma GCC unroll 4
    for (int64_t p = 0; p < P::count; ++p)
      pieces[p] = phi[p] + load<wide_piece>(psi + j) - __builtin_convertvector(load<piece>(cost[p] + j), wide_piece) * per_epsilon;
    wide exponents;
    std::memcpy(&exponents, pieces, sizeof exponents);
    const full brick = exp_of_wide(exponents);
    tail_sums[k] += brick;
    store(to + c * step, brick);
  }
}

template <typename scalar>
void SinkhornSolver<scalar>::write_plan() {
  for_slices([&](Slice& slice, int64_t first, int64_t last) {
    slice.spent = wide_piece{};
    for_bricks(first, last, [&](int64_t slot) { write_bricks(slice, slot); });
  });
}

template <typename scalar>
HELO_FAST_INLINE void SinkhornSolver<scalar>::write_bricks(Slice& slice, int64_t slot) const {
  const scalar *K = row(slot), *const v = v_, *cost[P::count];
  scalar *plan[P::count], *to[P::count], u[P::count];
  for (int64_t p = 0; p < P::count; ++p) {
    const int64_t each = slot + p * width;
    const bool empty = rows_[each] < 0;
    cost[p] = cost_row(empty ? slot : each);
    u[p] = empty ? 0 : u_[each];
    plan[p] = empty ? nullptr : x_.plan + (problem_ * x_.n + rows_[each]) * x_.m;
    to[p] = empty || m_ < x_.m ? slice.partial + p * mp_ : plan[p];
  }
  const int64_t step = stride(slot);
  full spent = {};
  int64_t c = 0;
  for (; (c + P::count) * width <= m_; c += P::count) {
    const int64_t j = c * width;
    full rows[P::count];
#pragma GCC unroll 4
    for (int64_t p = 0; p < P::count; ++p) rows[p] = load<full>(K + (c + p) * step);
    P::transpose_pieces(rows);
    const full v_j = load<full>(v + j);
#pragma GCC unroll 4
    for (int64_t p = 0; p < P::count; ++p) {
      const full each = u[p] * rows[p] * v_j;
      spent += each > 0 ? each * load<full>(cost[p] + j) : full{};  // a cost may be infinite where there is nothing to pay
      store(to[p] + j, each);
    }
  }
  piece pieces[P::count];
  std::memcpy(pieces, &spent, sizeof spent);
  for (; c < chunks_; ++c) {
    const int64_t j = c * width;
    for (int64_t p = 0; p < P::count; ++p) {
      const piece each = u[p] * load<piece>(K + c * step + p * width) * load<piece>(v + j);
      pieces[p] += each > 0 ? each * load<piece>(cost[p] + j) : piece{};
      if (j + width <= m_)
        store(to[p] + j, each);
      else
        for (int64_t k = 0; j + k < m_; ++k) to[p][j + k] = each[k];
    }
  }
  for (int64_t p = 0; p < P::count; ++p) slice.spent += __builtin_convertvector(pieces[p], wide_piece);
  if (m_ == x_.m) return;
  for (int64_t p = 0; p < P::count; ++p)
    for (int64_t j = 0; j < m_ && plan[p]; ++j) plan[p][columns_[j]] = to[p][j];
}

}  // namespace HELO_FAST_SET
}  // namespace
