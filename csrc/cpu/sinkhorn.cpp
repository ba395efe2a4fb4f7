// Sinkhorn forward on the CPU, the torch side: allocates, picks the instruction set, spreads problems over threads.
// The algorithm stands in sinkhorn_solver.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <type_traits>

#include "capability.h"
#include "sinkhorn_problem.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

const SinkhornKernels& kernels() {
  switch (capability()) {
    case Capability::avx512: return sinkhorn_avx512();
    case Capability::avx2: return sinkhorn_avx2();
    default: return sinkhorn_baseline();
  }
}

double damping(std::optional<double> tau, double epsilon) { return tau ? *tau / (*tau + epsilon) : 1.0; }

struct Release {
  void operator()(unsigned char* p) const { ::operator delete(p, std::align_val_t(64)); }
};

// Threads take problems in small batches, so that hard ones do not pile up on one of them.
template <typename scalar>
void solve_all(const SinkhornArguments<scalar>& x, int64_t batch) {
  const SinkhornKernels& k = kernels();
  const auto solve = [&] {
    if constexpr (std::is_same_v<scalar, float>)
      return k.solve_float;
    else
      return k.solve_double;
  }();
  const int64_t bytes = std::is_same_v<scalar, float> ? k.scratch_float(x.n, x.m) : k.scratch_double(x.n, x.m);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), batch);
  const int64_t work = x.n * x.m * x.max_iter;  // of one problem
  const int64_t share = std::max<int64_t>(1, std::min<int64_t>(batch / (8 * std::max<int64_t>(threads, 1)), 2000000 / work));
  std::atomic<int64_t> next{0};
  const auto worker = [&](int64_t, int64_t) {
    const std::unique_ptr<unsigned char, Release> scratch(
        static_cast<unsigned char*>(::operator new(bytes, std::align_val_t(64))));
    for (int64_t begin; (begin = next.fetch_add(share)) < batch;) solve(x, begin, std::min(begin + share, batch), scratch.get());
  };
  if (threads <= 1 || batch * work < 20000)  // not worth waking a thread
    worker(0, 1);
  else
    torch::stable::parallel_for(0, threads, 1, worker);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_fwd(
    const Tensor& cost,  // [B, n, m], contiguous, float32 or float64
    const Tensor& a,     // [B, n]
    const Tensor& b,     // [B, m]
    double epsilon, int64_t max_iter, std::optional<double> tol, int64_t check_every, std::optional<double> tau_a,
    std::optional<double> tau_b, bool keep_history) {
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2);
  Tensor plan = torch::stable::empty_like(cost), f = torch::stable::empty_like(a), g = torch::stable::empty_like(b);
  Tensor transport_cost = torch::stable::new_empty(cost, {batch});
  Tensor marginal_error = torch::stable::new_empty(cost, {batch});
  Tensor n_iter = torch::stable::new_empty(cost, {batch}, ScalarType::Int);
  Tensor history = torch::stable::new_zeros(cost, {batch, keep_history ? max_iter : 0, n + m});
  const auto run = [&](auto zero) {
    using scalar = decltype(zero);
    const auto in = [](const Tensor& t) { return static_cast<const scalar*>(t.const_data_ptr()); };
    const auto out = [](Tensor& t) { return static_cast<scalar*>(t.mutable_data_ptr()); };
    const SinkhornArguments<scalar> x{
        in(cost), in(a), in(b), out(plan), out(f), out(g), out(transport_cost), out(marginal_error), out(history),
        static_cast<int32_t*>(n_iter.mutable_data_ptr()), n, m, keep_history ? max_iter : 0, max_iter, check_every, epsilon,
        tol.value_or(-1), damping(tau_a, epsilon), damping(tau_b, epsilon), tau_b ? epsilon / *tau_b : 0};
    if (batch > 0) solve_all<scalar>(x, batch);
  };
  if (cost.scalar_type() == ScalarType::Double)
    run(double(0));
  else
    run(float(0));
  return {plan, f, g, transport_cost, marginal_error, n_iter, history};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cpu, CPU, m) { m.impl("sinkhorn_fwd", TORCH_BOX(&sinkhorn_fwd)); }
