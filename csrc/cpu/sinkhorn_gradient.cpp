// Sinkhorn's gradients on the CPU, the torch side: allocates, picks the instruction set, spreads problems over threads.
// The algorithms stand in sinkhorn_implicit.h and sinkhorn_unrolled.h.

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
#include "problems.h"
#include "sinkhorn_gradient_problem.h"

#define HELO_FAST_KERNEL "sinkhorn_gradient.h"
#include "each_set.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using Optional = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

template <typename scalar>
const scalar* data(const Optional& t) {
  return t ? static_cast<const scalar*>(t->const_data_ptr()) : nullptr;
}

template <typename scalar>
Strided<scalar> strided(const Optional& t) {
  return t ? Strided<scalar>{data<scalar>(t), t->stride(0), t->stride(1), t->stride(2)} : Strided<scalar>{nullptr, 0, 0, 0};
}

template <typename scalar>
void run_all(const SinkhornGradientKernel<scalar>& kernel, const SinkhornGradientArguments<scalar>& x, int64_t batch, int64_t work) {
  for_each_problem(batch, work, kernel.scratch_bytes(x.n, x.m), [&](int64_t begin, int64_t end, auto* scratch) {
    kernel.differentiate(x, begin, end, scratch);
  });
}

// history and n_iter of the iterations to reverse; without them, through the fixed point. cost and grad_plan may have any strides.
Gradients differentiate(
    const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& plan, const Optional& history, const Optional& n_iter,
    const Optional& grad_plan, const Optional& grad_f, const Optional& grad_g, const Optional& grad_transport, double epsilon,
    std::optional<double> tau_a, std::optional<double> tau_b) {
  const int64_t batch = plan.size(0), n = plan.size(1), m = plan.size(2), kept = history ? history->size(1) : 0;
  Tensor d_cost = torch::stable::empty_like(plan), d_a = torch::stable::empty_like(a), d_b = torch::stable::empty_like(b);
  const auto run = [&](auto zero) {
    using scalar = decltype(zero);
    const auto out = [](Tensor& t) { return static_cast<scalar*>(t.mutable_data_ptr()); };
    const SinkhornGradientArguments<scalar> x{
        data<scalar>(a), data<scalar>(b), data<scalar>(plan), strided<scalar>(cost), strided<scalar>(grad_plan), data<scalar>(grad_f),
        data<scalar>(grad_g), data<scalar>(grad_transport), data<scalar>(history), data<int32_t>(n_iter), out(d_cost), out(d_a), out(d_b),
        n, m, kept, epsilon, tau_a ? epsilon / *tau_a : 0, tau_b ? epsilon / *tau_b : 0};
    if (batch == 0) return;
    if (history) {
      const auto& kernel = pick(baseline::sinkhorn_unrolled<scalar>, avx2::sinkhorn_unrolled<scalar>, avx512::sinkhorn_unrolled<scalar>);
      run_all(kernel, x, batch, 6 * n * m * kept);
    } else {
      const auto& kernel = pick(baseline::sinkhorn_implicit<scalar>, avx2::sinkhorn_implicit<scalar>, avx512::sinkhorn_implicit<scalar>);
      run_all(kernel, x, batch, n * m * std::min(n, m));
    }
  };
  if (plan.scalar_type() == ScalarType::Double)
    run(double(0));
  else
    run(float(0));
  return {d_cost, d_a, d_b};
}

Gradients sinkhorn_implicit_bwd(
    const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& plan, const Optional& grad_plan, const Optional& grad_f,
    const Optional& grad_g, const Optional& grad_transport, double epsilon, std::optional<double> tau_a, std::optional<double> tau_b) {
  return differentiate(
      cost, a, b, plan, std::nullopt, std::nullopt, grad_plan, grad_f, grad_g, grad_transport, epsilon, tau_a, tau_b);
}

Gradients sinkhorn_unrolled_bwd(
    const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& plan, const Tensor& history, const Tensor& n_iter,
    const Optional& grad_plan, const Optional& grad_f, const Optional& grad_g, const Optional& grad_transport, double epsilon,
    std::optional<double> tau_a, std::optional<double> tau_b) {
  return differentiate(cost, a, b, plan, history, n_iter, grad_plan, grad_f, grad_g, grad_transport, epsilon, tau_a, tau_b);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cpu, CPU, m) {
  m.impl("sinkhorn_implicit_bwd", TORCH_BOX(&sinkhorn_implicit_bwd));
  m.impl("sinkhorn_unrolled_bwd", TORCH_BOX(&sinkhorn_unrolled_bwd));
}
