// Sinkhorn forward on CUDA, the torch side: allocates, and launches the kernel for the size.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <tuple>

#include "sinkhorn.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr double converged_by_default = 1e-4;  // as in helo_fast/ops/sinkhorn/reference.py

double damping(std::optional<double> tau, double epsilon) { return tau ? *tau / (*tau + epsilon) : 1.0; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>> sinkhorn_fwd(
    const Tensor& cost,              // [B, n, m], contiguous, float32 or float64
    const std::optional<Tensor>& a,  // [B, n]; none is uniform
    const std::optional<Tensor>& b,  // [B, m]
    double epsilon, int64_t max_iter, std::optional<double> tol, int64_t check_every, std::optional<double> tau_a,
    std::optional<double> tau_b, bool keep_history) {
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2), kept = keep_history ? max_iter : 0;
  const int32_t device = cost.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto empty = [&](std::initializer_list<int64_t> sizes, std::optional<ScalarType> type = std::nullopt) {
    return torch::stable::new_empty(cost, sizes, type);
  };
  Tensor plan = empty({batch, n, m}), f = empty({batch, n}), g = empty({batch, m});
  Tensor transport_cost = empty({batch}), marginal_error = empty({batch});
  Tensor n_iter = empty({batch}, ScalarType::Int), converged = empty({batch}, ScalarType::Bool);
  std::optional<Tensor> history;
  if (keep_history) history = torch::stable::new_zeros(cost, {batch, kept, n + m});
  const auto run = [&](auto zero) {
    using scalar = decltype(zero);
    const auto in = [](const Tensor& t) { return static_cast<const scalar*>(t.const_data_ptr()); };
    const auto out = [](Tensor& t) { return static_cast<scalar*>(t.mutable_data_ptr()); };
    helo_fast::SinkhornBatch<scalar> x{
        {in(cost), a ? in(*a) : nullptr, b ? in(*b) : nullptr, out(plan), out(f), out(g), out(transport_cost), out(marginal_error),
         history ? out(*history) : nullptr, static_cast<int32_t*>(n_iter.mutable_data_ptr()), n, m, kept, max_iter, check_every, epsilon, tol.value_or(-1),
         damping(tau_a, epsilon), damping(tau_b, epsilon), tau_b ? epsilon / *tau_b : 0},
        batch, static_cast<bool*>(converged.mutable_data_ptr()), scalar(tol.value_or(converged_by_default))};
    x.total = helo_fast::total_mass(x);
    if (batch == 0 || helo_fast::launch_in_registers(x, device)) return;
    Tensor scratch = empty({batch, n + m}, ScalarType::Double);
    helo_fast::launch_streaming(x, static_cast<double*>(scratch.mutable_data_ptr()), device);
  };
  if (cost.scalar_type() == ScalarType::Double)
    run(double(0));
  else
    run(float(0));
  return {plan, f, g, transport_cost, marginal_error, n_iter, converged, history};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cuda, CUDA, m) { m.impl("sinkhorn_fwd", TORCH_BOX(&sinkhorn_fwd)); }
