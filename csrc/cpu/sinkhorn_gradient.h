// Sinkhorn's gradients for one instruction set (see each_set.h): what both kernels share, then the kernels.
#include "simd.h"

namespace {
namespace HELO_FAST_SET {

// Hands out 64-byte aligned pieces of a scratch memory.
class Pieces {
 public:
  explicit Pieces(unsigned char* scratch) : scratch_(scratch) {}

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
typedef int64_t Longs __attribute__((vector_size(HELO_FAST_VECTOR_BYTES)));
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

// grad[0, m): the gradient that reaches entry (i, j) of the plan, directly and through transport_cost = <plan, cost>.
// Zero where the plan is: whatever stands in cost there is never used.
template <typename scalar>
void incoming(const SinkhornGradientArguments<scalar>& x, int64_t problem, int64_t i, const scalar* plan, double* grad) {
  const double weight = x.grad_transport ? x.grad_transport[problem] : 0;
  const auto row = [&](const Strided<scalar>& t) { return t.data + problem * t.batch + i * t.row; };
  const Strided<scalar>&G = x.grad_plan, &cost = x.cost;
  if (!G.data)
    for (int64_t j = 0; j < x.m; ++j) grad[j] = 0;
  else if (G.column == 1)
    for (int64_t j = 0; j < x.m; ++j) grad[j] = row(G)[j];
  else
    for (int64_t j = 0; j < x.m; ++j) grad[j] = row(G)[j * G.column];
  if (x.grad_transport && cost.column == 1)
    for (int64_t j = 0; j < x.m; ++j) grad[j] += weight * row(cost)[j];
  else if (x.grad_transport)
    for (int64_t j = 0; j < x.m; ++j) grad[j] += weight * row(cost)[j * cost.column];
  for (int64_t j = 0; j < x.m; ++j) grad[j] = plan[j] > 0 ? grad[j] : 0;
}

}  // namespace HELO_FAST_SET
}  // namespace

#include "sinkhorn_implicit.h"
#include "sinkhorn_unrolled.h"
