// Gromov-Wasserstein on the CPU, the torch side: allocates, picks the instruction set, spreads problems over threads.
// The algorithms stand in gromov_solver.h, gromov_plan.h and gromov_backward.h.

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
#include <vector>

#include "arena.h"
#include "capability.h"
#include "gromov_problem.h"
#include "outputs.h"
#include "problems.h"

#define HELO_FAST_KERNEL "gromov_backward.h"
#include "each_set.h"

using helo_fast::Handle;
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

using Results = std::tuple<Handle, Handle, Handle, Handle, Handle>;

template <typename scalar>
Results solve_all(GromovSpaces<scalar> spaces, const Tensor& a, bool over_batch, const Options& options) {
  const int64_t batch = a.size(0), n = spaces.n, m = spaces.m;
  const ScalarType dtype = a.scalar_type();
  Output plan(dtype, {batch, n, m}), gw_cost(dtype, {batch}), marginal_error(dtype, {batch});
  Output n_iter(ScalarType::Int, {batch}), converged(ScalarType::Bool, {batch});
  if (batch > 0) {
    std::vector<scalar> ends;
    if (over_batch) {
      ends = extremes_of_batch(spaces, batch);
      spaces.extremes = ends.data();
    }
    const GromovArguments<scalar> x{
        spaces, plan.data<scalar>(), gw_cost.data<scalar>(), marginal_error.data<scalar>(), n_iter.data<int32_t>(),
        converged.data<bool>(), options.outer_iter, options.inner_iter, options.epsilon, options.tol.value_or(-1), options.tol.value_or(1e-4),
        options.method == "entropic"};
    const auto& kernel = kernels<scalar>();
    const int64_t work = work_of(spaces) * options.outer_iter + 3 * n * m * options.outer_iter * options.inner_iter;
    for_each_problem(batch, work, kernel.solve_bytes(x), [&](int64_t begin, int64_t end, auto* scratch) {
      [[maybe_unused]] const FlushToZero flush;
      kernel.solve(x, begin, end, scratch);
    });
  }
  return {plan.release(), gw_cost.release(), marginal_error.release(), n_iter.release(), converged.release()};
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

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

template <typename scalar>
Gradients differentiate_all(
    GromovSpaces<scalar> spaces, const Tensor& x, const Tensor& y, const Tensor& plan, const Tensor& grad_cost, bool over_batch, bool fused,
    bool cross) {
  const int64_t batch = plan.size(0);
  Tensor d_x = torch::stable::empty_like(x), d_y = torch::stable::empty_like(y);
  Tensor d_xy = cross ? torch::stable::empty_like(plan) : torch::stable::new_empty(plan, {0});
  if (batch > 0) {
    GromovGradients<scalar> g{
        spaces, in<scalar>(plan), in<scalar>(grad_cost), out<scalar>(d_x), out<scalar>(d_y), cross ? out<scalar>(d_xy) : nullptr, nullptr,
        fused};
    const auto& kernel = kernels<scalar>();
    const int64_t bytes = kernel.differentiate_bytes(g), work = 4 * work_of(spaces);
    std::vector<scalar> ends;
    double of_ends[4];
    if (over_batch) {  // the threshold's gradient is the batch's: a pass of its own adds it up, in the order of the problems
      ends = extremes_of_batch(spaces, batch);
      g.spaces.extremes = ends.data();
      std::vector<double> each(6 * batch);
      for_each_problem(batch, work, bytes, [&](int64_t begin, int64_t end, auto* scratch) {
        kernel.add_up(g, each.data(), begin, end, scratch);
      });
      double sums[6] = {};
      for (int64_t k = 0; k < 6 * batch; ++k) sums[k % 6] += each[k];
      for (int side = 0; side < 2; ++side) {
        of_ends[2 * side] = (1 - spaces.threshold) * sums[3 * side] / std::max(sums[3 * side + 1], 1.0);
        of_ends[2 * side + 1] = spaces.threshold * sums[3 * side] / std::max(sums[3 * side + 2], 1.0);
      }
      g.threshold_gradients = of_ends;
    }
    for_each_problem(batch, work, bytes, [&](int64_t begin, int64_t end, auto* scratch) { kernel.differentiate(g, begin, end, scratch); });
  }
  return {d_x, d_y, d_xy};
}

Gradients gromov_wasserstein_bwd(
    const Tensor& cost_x, const Tensor& cost_y, const Tensor& plan, const Tensor& grad_cost, double alpha, bool fused) {
  return with_scalar(plan, [&](auto zero) {
    using scalar = decltype(zero);
    const GromovSpaces<scalar> spaces{
        in<scalar>(cost_x), in<scalar>(cost_y), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, plan.size(1), plan.size(2), 0, alpha,
        0};
    return differentiate_all<scalar>(spaces, cost_x, cost_y, plan, grad_cost, false, fused, fused);
  });
}

Gradients gromov_from_tokens_bwd(
    const Tensor& x, const Tensor& y, const Tensor& a, const Tensor& b, const Tensor& plan, const Tensor& grad_cost, double threshold,
    bool over_batch, double alpha, bool cross_given) {
  return with_scalar(plan, [&](auto zero) {
    using scalar = decltype(zero);
    const GromovSpaces<scalar> spaces{
        nullptr, nullptr, in<scalar>(x), in<scalar>(y), nullptr, in<scalar>(a), in<scalar>(b), nullptr, plan.size(1), plan.size(2),
        x.size(2), alpha, threshold};
    return differentiate_all<scalar>(spaces, x, y, plan, grad_cost, over_batch, cross_given || alpha < 1, cross_given);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cpu, CPU, m) {
  m.impl("gromov_wasserstein_fwd", TORCH_BOX(&gromov_wasserstein_fwd));
  m.impl("gromov_from_tokens_fwd", TORCH_BOX(&gromov_from_tokens_fwd));
  m.impl("gromov_wasserstein_bwd", TORCH_BOX(&gromov_wasserstein_bwd));
  m.impl("gromov_from_tokens_bwd", TORCH_BOX(&gromov_from_tokens_bwd));
}
