// Sinkhorn forward on the CPU, the torch side: allocates, picks the instruction set, spreads problems over threads.
// The algorithm stands in sinkhorn_solver.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "capability.h"
#include "outputs.h"
#include "problems.h"
#include "sinkhorn_problem.h"

#define HELO_FAST_KERNEL "sinkhorn_solver.h"
#include "each_set.h"

using helo_fast::Handle;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr double converged_by_default = 1e-4;  // as in helo_fast/ops/sinkhorn/reference.py

double damping(std::optional<double> tau, double epsilon) { return tau ? *tau / (*tau + epsilon) : 1.0; }

template <typename scalar>
void solve_all(const SinkhornArguments<scalar>& x, int64_t batch) {
  const auto& kernel = pick(baseline::sinkhorn<scalar>, avx2::sinkhorn<scalar>, avx512::sinkhorn<scalar>);
  const int64_t scratch_bytes = kernel.scratch_bytes(x.n, x.m);
  if (x.n * x.m >= 65536 && batch < torch::stable::get_num_threads()) {  // too few problems for the threads: cut each
    const Scratch scratch = take_scratch(scratch_bytes);
    kernel.solve(x, 0, batch, scratch.get(), for_each_in_parallel);
  } else {
    for_each_problem(batch, x.n * x.m * x.max_iter, scratch_bytes, [&](int64_t begin, int64_t end, unsigned char* scratch) {
      kernel.solve(x, begin, end, scratch, nullptr);
    });
  }
}

std::tuple<Handle, Handle, Handle, Handle, Handle, Handle, Handle, std::optional<Tensor>> sinkhorn_fwd(
    const Tensor& cost,              // [B, n, m], contiguous, float32 or float64
    const std::optional<Tensor>& a,  // [B, n]; none is uniform
    const std::optional<Tensor>& b,  // [B, m]
    double epsilon, int64_t max_iter, std::optional<double> tol, int64_t check_every, std::optional<double> tau_a,
    std::optional<double> tau_b, bool keep_history) {
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2);
  const ScalarType dtype = cost.scalar_type();
  Output plan(dtype, {batch, n, m}), f(dtype, {batch, n}), g(dtype, {batch, m});
  Output transport_cost(dtype, {batch}), marginal_error(dtype, {batch});
  Output n_iter(ScalarType::Int, {batch}), converged(ScalarType::Bool, {batch});
  std::optional<Tensor> history;
  if (keep_history) history = torch::stable::new_zeros(cost, {batch, max_iter, n + m});
  const auto run = [&](auto zero) {
    using scalar = decltype(zero);
    const auto in = [](const Tensor& t) { return static_cast<const scalar*>(t.const_data_ptr()); };
    const SinkhornArguments<scalar> x{
        in(cost), a ? in(*a) : nullptr, b ? in(*b) : nullptr, plan.data<scalar>(), f.data<scalar>(), g.data<scalar>(),
        transport_cost.data<scalar>(), marginal_error.data<scalar>(),
        history ? static_cast<scalar*>(history->mutable_data_ptr()) : nullptr, n_iter.data<int32_t>(), n, m, keep_history ? max_iter : 0,
        max_iter, check_every, epsilon, tol.value_or(-1), damping(tau_a, epsilon), damping(tau_b, epsilon),
        tau_b ? epsilon / *tau_b : 0};
    if (batch > 0) solve_all<scalar>(x, batch);
    const scalar converged_at = static_cast<scalar>(tol.value_or(converged_by_default));
    bool* each = converged.data<bool>();
    for (int64_t i = 0; i < batch; ++i) each[i] = x.marginal_error[i] <= converged_at;
  };
  if (dtype == ScalarType::Double)
    run(double(0));
  else
    run(float(0));
  return {plan.release(),           f.release(),      g.release(),         transport_cost.release(),
          marginal_error.release(), n_iter.release(), converged.release(), std::move(history)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cpu, CPU, m) { m.impl("sinkhorn_fwd", TORCH_BOX(&sinkhorn_fwd)); }
