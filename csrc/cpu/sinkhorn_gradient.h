// Sinkhorn's gradients for one instruction set (see each_set.h): what both kernels share, then the kernels.
#include "simd.h"

namespace {
namespace HELO_FAST_SET {

// Hands out 64-byte aligned parts of a scratch memory.
class Workspace {
 public:
  explicit Workspace(unsigned char* scratch) : scratch_(scratch) {}

  template <typename T>
  T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(scratch_);
    scratch_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }

 private:
  unsigned char* scratch_;
};

typedef Vectors<double>::full Doubles;
typedef Vectors<double>::words Longs;
constexpr int64_t kLanes = Vectors<double>::lanes;
constexpr int64_t kPad = kLanes > 4 ? kLanes : 4;  // rows are padded to a multiple of it

inline int64_t padded(int64_t count) { return (count + kPad - 1) / kPad * kPad; }

inline double dot(const double* x, const double* y, int64_t padded_size) {
  Doubles sum = {}, other = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= padded_size; k += 2 * kLanes) {
    sum += load<Doubles>(x + k) * load<Doubles>(y + k);
    other += load<Doubles>(x + k + kLanes) * load<Doubles>(y + k + kLanes);
  }
  if (k < padded_size) sum += load<Doubles>(x + k) * load<Doubles>(y + k);
  return sum_of<double>(sum + other);
}

inline void add_scaled(double* y, double scale, const double* x, int64_t padded_size) {
  for (int64_t k = 0; k < padded_size; k += kLanes) store(y + k, load<Doubles>(y + k) + scale * load<Doubles>(x + k));
}

HELO_FAST_INLINE Doubles only_where(Longs condition, Doubles v) { return bits<Doubles>(bits<Longs>(v) & condition); }

// Row i of a problem's matrix, in double, padded with 0.
template <typename scalar>
void read_row(const Strided<scalar>& from, int64_t problem, int64_t i, int64_t m, double* to) {
  const scalar* row = from.data + problem * from.batch + i * from.row;
  if (from.column == 1) return widen(row, m, to, padded(m));
  for (int64_t j = m; j < padded(m); ++j) to[j] = 0;
  for (int64_t j = 0; j < m; ++j) to[j] = row[j * from.column];
}

// A row of the plan, and of the gradient that reaches it, directly and through transport_cost = <plan, cost>: 0 where the plan is,
// whatever stands in cost there.
template <typename scalar>
void read_rows(const SinkhornGradientArguments<scalar>& x, int64_t problem, int64_t i, double* plan, double* grad, double* cost) {
  const int64_t stride = padded(x.m);
  widen(x.plan + (problem * x.n + i) * x.m, x.m, plan, stride);
  if (x.grad_plan.data)
    read_row(x.grad_plan, problem, i, x.m, grad);
  else
    for (int64_t k = 0; k < stride; k += kLanes) store(grad + k, Doubles{});
  if (x.grad_transport) {
    read_row(x.cost, problem, i, x.m, cost);
    add_scaled(grad, x.grad_transport[problem], cost, stride);
  }
  for (int64_t k = 0; k < stride; k += kLanes)
    store(grad + k, only_where(load<Doubles>(plan + k) > 0, load<Doubles>(grad + k)));
}

}  // namespace HELO_FAST_SET
}  // namespace

#include "sinkhorn_implicit.h"
#include "sinkhorn_unrolled.h"
