// Sinkhorn's gradient through the fixed point on CUDA, up to 64 x 64: common/sinkhorn_gradient.h, a block per problem.
//
// Grid: x = block; problems block, block + gridDim.x, ... Traffic: plan, cost and incoming gradient are read twice, d_cost is written
// once. Shared memory: two matrices of the problem in double, 26 KB at 36 x 36, 71 KB at 64 x 64.

#include "common/sinkhorn_gradient.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "launch.h"
#include "team.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace helo_fast {
namespace {

constexpr int kThreads = 128, kResident = 4;
using Optional = std::optional<Tensor>;

template <typename scalar>
__global__ void __launch_bounds__(kThreads, kResident) sinkhorn_gradient(const SinkhornGradientBatch<scalar> x) {
  using Team = Block<kThreads>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ typename Team::Shared between_warps;
  Team team(between_warps);
  SinkhornGradient<scalar, Team>(x, reinterpret_cast<double*>(memory), team).differentiate_share(blockIdx.x, gridDim.x);
}

template <typename scalar>
void launch(const SinkhornGradientBatch<scalar>& x, int32_t device_index) {
  const int64_t bytes = SinkhornGradient<scalar, Block<kThreads>>::shared_bytes(x.n, x.m);
  const auto kernel = sinkhorn_gradient<scalar>;
  allow_shared(kernel, "sinkhorn_gradient", bytes, device_index);
  const unsigned blocks = resident_blocks_for(kernel, "sinkhorn_gradient", kThreads, bytes, x.batch, device_index);
  kernel<<<blocks, kThreads, bytes, current_stream(device_index)>>>(x);
  check_launch("sinkhorn_gradient");
}

template <typename scalar>
const scalar* data(const Optional& t) {
  return t ? static_cast<const scalar*>(t->const_data_ptr()) : nullptr;
}

template <typename scalar>
Strided<scalar> strided(const Optional& t) {
  return t ? Strided<scalar>{data<scalar>(t), t->stride(0), t->stride(1), t->stride(2)} : Strided<scalar>{nullptr, 0, 0, 0};
}

// cost and grad_plan may have any strides; the others are contiguous.
std::tuple<Tensor, Tensor, Tensor> sinkhorn_implicit_bwd(
    const Tensor& cost, const Tensor& a, const Tensor& b, const Tensor& plan, const Optional& grad_plan, const Optional& grad_f,
    const Optional& grad_g, const Optional& grad_transport, double epsilon, std::optional<double> tau_a, std::optional<double> tau_b) {
  const int64_t batch = plan.size(0), n = plan.size(1), m = plan.size(2);
  STD_TORCH_CHECK(n <= 64 && m <= 64, "sinkhorn_implicit_bwd: n and m may be 64 at most");
  const int32_t device = plan.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor d_cost = torch::stable::empty_like(plan), d_a = torch::stable::empty_like(a), d_b = torch::stable::empty_like(b);
  const auto run = [&](auto zero) {
    using scalar = decltype(zero);
    const auto out = [](Tensor& t) { return static_cast<scalar*>(t.mutable_data_ptr()); };
    const SinkhornGradientBatch<scalar> x{
        {data<scalar>(a), data<scalar>(b), data<scalar>(plan), strided<scalar>(cost), strided<scalar>(grad_plan), data<scalar>(grad_f),
         data<scalar>(grad_g), data<scalar>(grad_transport), nullptr, nullptr, out(d_cost), out(d_a), out(d_b), n, m, 0, epsilon,
         tau_a ? epsilon / *tau_a : 0, tau_b ? epsilon / *tau_b : 0},
        batch};
    if (batch > 0) launch(x, device);
  };
  if (plan.scalar_type() == ScalarType::Double)
    run(double(0));
  else
    run(float(0));
  return {d_cost, d_a, d_b};
}

}  // namespace
}  // namespace helo_fast

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cuda, CUDA, m) { m.impl("sinkhorn_implicit_bwd", TORCH_BOX(&helo_fast::sinkhorn_implicit_bwd)); }
