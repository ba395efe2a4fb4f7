// Gromov-Wasserstein on the CPU, the torch side: allocates, picks the instruction set, spreads problems over threads.
// The algorithm stands in gromov_solver.h and gromov_plan.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arena.h"
#include "capability.h"
#include "gromov_problem.h"
#include "problems.h"

#define HELO_FAST_KERNEL "gromov_solver.h"
#include "each_set.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Entries of a plan decay through the denormal numbers, on which some processors are a hundred times slower: 0 instead, on this
// thread, for the time of a call.
class FlushToZero {
 public:
#if defined(__x86_64__)
  FlushToZero() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8000); }
  ~FlushToZero() { __builtin_ia32_ldmxcsr(before_); }
  FlushToZero(const FlushToZero&) = delete;

 private:
  unsigned before_;
#endif
};

template <typename scalar>
const scalar* in(const Tensor& t) {
  return static_cast<const scalar*>(t.const_data_ptr());
}

template <typename scalar>
scalar* out(Tensor& t) {
  return static_cast<scalar*>(t.mutable_data_ptr());
}

template <typename scalar>
const GromovKernel<scalar>& kernels() {
  return pick(baseline::gromov<scalar>, avx2::gromov<scalar>, avx512::gromov<scalar>);
}

template <typename scalar>
int64_t work_of(const GromovSpaces<scalar>& s) {  // of the costs and one product with the plan
  return (s.n * s.n + s.m * s.m) * s.width + s.n * s.m * (s.n + s.m);
}

// The extremes of each problem [B, 4] merged into those of the batch.
template <typename scalar>
std::vector<scalar> extremes_of_batch(const GromovSpaces<scalar>& s, int64_t batch) {
  const auto& kernel = kernels<scalar>();
  std::vector<scalar> each(4 * batch);
  for_each_problem(batch, work_of(s), kernel.extremes_bytes(s), [&](int64_t begin, int64_t end, auto* scratch) {
    kernel.extremes(s, each.data(), begin, end, scratch);
  });
  std::vector<scalar> ends(each.begin(), each.begin() + 4);
  for (int64_t k = 4; k < 4 * batch; ++k) ends[k % 4] = k % 2 ? std::max(ends[k % 4], each[k]) : std::min(ends[k % 4], each[k]);
  return ends;
}

struct Options {
  std::string method;
  double epsilon;
  int64_t outer_iter, inner_iter;
  std::optional<double> tol;
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename scalar>
Results solve_all(GromovSpaces<scalar> spaces, const Tensor& a, bool over_batch, const Options& options) {
  const int64_t batch = a.size(0), n = spaces.n, m = spaces.m;
  Tensor plan = torch::stable::new_empty(a, {batch, n, m}), gw_cost = torch::stable::new_empty(a, {batch});
  Tensor marginal_error = torch::stable::new_empty(a, {batch});
  Tensor n_iter = torch::stable::new_empty(a, {batch}, ScalarType::Int), converged = torch::stable::new_empty(a, {batch}, ScalarType::Bool);
  if (batch > 0) {
    std::vector<scalar> ends;
    if (over_batch) {
      ends = extremes_of_batch(spaces, batch);
      spaces.extremes = ends.data();
    }
    const GromovArguments<scalar> x{
        spaces, out<scalar>(plan), out<scalar>(gw_cost), out<scalar>(marginal_error), out<int32_t>(n_iter), out<bool>(converged),
        options.outer_iter, options.inner_iter, options.epsilon, options.tol.value_or(-1), options.tol.value_or(1e-4),
        options.method == "entropic"};
    const auto& kernel = kernels<scalar>();
    const int64_t work = work_of(spaces) * options.outer_iter + 3 * n * m * options.outer_iter * options.inner_iter;
    for_each_problem(batch, work, kernel.solve_bytes(x), [&](int64_t begin, int64_t end, auto* scratch) {
      const FlushToZero flush;
      kernel.solve(x, begin, end, scratch);
    });
  }
  return {plan, gw_cost, marginal_error, n_iter, converged};
}

template <typename Run>
auto with_scalar(const Tensor& t, const Run& run) {
  return t.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

Results gromov_wasserstein_fwd(
    const Tensor& cost_x,  // [B, n, n], contiguous as all others, float32 or float64
    const Tensor& cost_y,  // [B, m, m]
    const Tensor& a,       // [B, n]
    const Tensor& b,       // [B, m]
    const std::optional<Tensor>& cost_xy, double alpha, const std::string& method, double epsilon, int64_t outer_iter, int64_t inner_iter,
    std::optional<double> tol) {
  return with_scalar(a, [&](auto zero) {
    using scalar = decltype(zero);
    const GromovSpaces<scalar> spaces{
        in<scalar>(cost_x), in<scalar>(cost_y), nullptr, nullptr, cost_xy ? in<scalar>(*cost_xy) : nullptr, in<scalar>(a), in<scalar>(b),
        nullptr, a.size(1), b.size(1), 0, alpha, 0};
    return solve_all<scalar>(spaces, a, false, {method, epsilon, outer_iter, inner_iter, tol});
  });
}

Results gromov_from_tokens_fwd(
    const Tensor& x,  // [B, n, d]
    const Tensor& y,  // [B, m, d]
    const Tensor& a, const Tensor& b, const std::optional<Tensor>& cost_xy, double threshold, bool over_batch, double alpha,
    const std::string& method, double epsilon, int64_t outer_iter, int64_t inner_iter, std::optional<double> tol) {
  return with_scalar(a, [&](auto zero) {
    using scalar = decltype(zero);
    const GromovSpaces<scalar> spaces{
        nullptr, nullptr, in<scalar>(x), in<scalar>(y), cost_xy ? in<scalar>(*cost_xy) : nullptr, in<scalar>(a), in<scalar>(b),
        nullptr, a.size(1), b.size(1), x.size(2), alpha, threshold};
    return solve_all<scalar>(spaces, a, over_batch, {method, epsilon, outer_iter, inner_iter, tol});
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cpu, CPU, m) {
  m.impl("gromov_wasserstein_fwd", TORCH_BOX(&gromov_wasserstein_fwd));
  m.impl("gromov_from_tokens_fwd", TORCH_BOX(&gromov_from_tokens_fwd));
}
