// Sinkhorn forward on CUDA: the log-domain iteration, one block per problem, any size.
//
//   gamma_j = -kappa_b logsumexp_i(log a_i + phi_i - cost_ij / epsilon), then phi_i likewise over j; from phi = 0.
//
// Grid: x = problem. A column update gives each thread whole columns (loads of a row of cost are coalesced); a row update gives
// each warp whole rows. The potentials live in the outputs f and g (in units of epsilon until the end) and are shared by the
// block through global memory. Traffic: two reads of cost an iteration (from L2 while n m fits), one write of each output.
// Rows and columns of zero mass are skipped: their cost is never read, their plan is 0 and their potential -inf.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "launch.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;

template <typename scalar>
struct Arguments {
  const scalar *cost, *a, *b;                                            // [B, n, m], [B, n], [B, m]
  scalar *plan, *f, *g, *transport_cost, *marginal_error, *history;      // history [B, kept, n + m]
  int32_t* n_iter;
  int64_t n, m, max_iter, check_every, kept;
  scalar epsilon, tol, kappa_a, kappa_b, slope_b;  // tol < 0: never stop early
};

// A running logsumexp: total * exp(top).
template <typename scalar>
struct LogSum {
  scalar top = -INFINITY, total = 0;

  __device__ void add(scalar term) {
    if (term == -INFINITY) return;  // an infinite cost
    if (term <= top) {
      total += exp(term - top);
    } else {
      total = total * exp(top - term) + 1;
      top = term;
    }
  }

  __device__ void merge(scalar other_top, scalar other_total) {
    const scalar high = max(top, other_top);
    if (high == -INFINITY) return;
    total = total * exp(top - high) + other_total * exp(other_top - high);
    top = high;
  }

  __device__ scalar value() const { return top + log(total); }
};

template <typename scalar>
__device__ scalar warp_sum(scalar value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffff, value, offset);
  return value;
}

// Sum over the block, known to every thread.
template <typename scalar>
__device__ scalar block_sum(scalar value) {
  __shared__ scalar partial[kThreads / kWarp];
  value = warp_sum(value);
  __syncthreads();  // the previous sum has been read
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  scalar sum = 0;
  for (int w = 0; w < kThreads / kWarp; ++w) sum += partial[w];
  return sum;
}

template <typename scalar>
__device__ scalar plan_entry(scalar mass_a, scalar mass_b, scalar phi, scalar gamma, scalar cost, scalar epsilon) {
  return mass_a > 0 && mass_b > 0 ? exp(log(mass_a) + log(mass_b) + phi + gamma - cost / epsilon) : scalar(0);
}

template <typename scalar>
__global__ void __launch_bounds__(kThreads, 4) sinkhorn_fwd_kernel(const Arguments<scalar> x) {
  const int64_t problem = blockIdx.x;
  const int64_t n = x.n, m = x.m;
  const scalar* cost = x.cost + problem * n * m;
  const scalar *a = x.a + problem * n, *b = x.b + problem * m;
  scalar *phi = x.f + problem * n, *gamma = x.g + problem * m;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  for (int64_t i = threadIdx.x; i < n; i += kThreads) phi[i] = a[i] > 0 ? scalar(0) : scalar(-INFINITY);
  __syncthreads();

  // L1 error of the column marginal for the current potentials, known to every thread.
  const auto column_error = [&]() {
    scalar error = 0;
    for (int64_t j = threadIdx.x; j < m; j += kThreads) {
      if (!(b[j] > 0)) continue;
      scalar sum = 0;
      for (int64_t i = 0; i < n; ++i)
        if (a[i] > 0) sum += plan_entry(a[i], b[j], phi[i], gamma[j], cost[i * m + j], x.epsilon);
      error += abs(sum - (x.slope_b == 0 ? b[j] : b[j] * exp(-x.slope_b * gamma[j])));
    }
    return block_sum(error);
  };

  int64_t iteration = 0;
  while (true) {
    ++iteration;
    for (int64_t j = threadIdx.x; j < m; j += kThreads) {
      LogSum<scalar> sum;
      if (b[j] > 0)
        for (int64_t i = 0; i < n; ++i)
          if (a[i] > 0) sum.add(log(a[i]) + phi[i] - cost[i * m + j] / x.epsilon);
      gamma[j] = b[j] > 0 ? -x.kappa_b * sum.value() : scalar(-INFINITY);
    }
    __syncthreads();
    for (int64_t i = warp; i < n; i += kThreads / kWarp) {
      if (!(a[i] > 0)) continue;
      LogSum<scalar> sum;
      for (int64_t j = lane; j < m; j += kWarp)
        if (b[j] > 0) sum.add(log(b[j]) + gamma[j] - cost[i * m + j] / x.epsilon);
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const scalar top = __shfl_down_sync(0xffffffff, sum.top, offset);
        const scalar total = __shfl_down_sync(0xffffffff, sum.total, offset);
        sum.merge(top, total);
      }
      if (lane == 0) phi[i] = -x.kappa_a * sum.value();
    }
    __syncthreads();
    if (x.kept) {
      scalar* kept = x.history + (problem * x.kept + iteration - 1) * (n + m);
      for (int64_t i = threadIdx.x; i < n; i += kThreads) kept[i] = phi[i];
      for (int64_t j = threadIdx.x; j < m; j += kThreads) kept[n + j] = gamma[j];
    }
    if (iteration >= x.max_iter) break;
    if (x.tol >= 0 && iteration % x.check_every == 0 && column_error() <= x.tol) break;
  }

  const scalar error = column_error();
  scalar spent = 0;
  for (int64_t k = threadIdx.x; k < n * m; k += kThreads) {
    const int64_t i = k / m, j = k % m;
    scalar mass = 0;
    if (a[i] > 0 && b[j] > 0) {
      mass = plan_entry(a[i], b[j], phi[i], gamma[j], cost[k], x.epsilon);
      spent += mass * cost[k];
    }
    x.plan[problem * n * m + k] = mass;
  }
  spent = block_sum(spent);  // its barriers also order the reads of phi and gamma above before the writes below
  for (int64_t i = threadIdx.x; i < n; i += kThreads) phi[i] *= x.epsilon;
  for (int64_t j = threadIdx.x; j < m; j += kThreads) gamma[j] *= x.epsilon;
  if (threadIdx.x == 0) {
    x.transport_cost[problem] = spent;
    x.marginal_error[problem] = error;
    x.n_iter[problem] = static_cast<int32_t>(iteration);
  }
}

double damping(std::optional<double> tau, double epsilon) { return tau ? *tau / (*tau + epsilon) : 1.0; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sinkhorn_fwd(
    const Tensor& cost,  // [B, n, m], contiguous, float32 or float64
    const Tensor& a,     // [B, n]
    const Tensor& b,     // [B, m]
    double epsilon, int64_t max_iter, std::optional<double> tol, int64_t check_every, std::optional<double> tau_a,
    std::optional<double> tau_b, bool keep_history) {
  const int64_t batch = cost.size(0), n = cost.size(1), m = cost.size(2);
  const torch::stable::accelerator::DeviceGuard guard(cost.get_device_index());
  Tensor plan = torch::stable::empty_like(cost), f = torch::stable::empty_like(a), g = torch::stable::empty_like(b);
  Tensor transport_cost = torch::stable::new_empty(cost, {batch});
  Tensor marginal_error = torch::stable::new_empty(cost, {batch});
  Tensor n_iter = torch::stable::new_empty(cost, {batch}, ScalarType::Int);
  Tensor history = torch::stable::new_zeros(cost, {batch, keep_history ? max_iter : 0, n + m});
  const auto launch = [&](auto zero) {
    using scalar = decltype(zero);
    const auto in = [](const Tensor& t) { return static_cast<const scalar*>(t.const_data_ptr()); };
    const auto out = [](Tensor& t) { return static_cast<scalar*>(t.mutable_data_ptr()); };
    const Arguments<scalar> arguments{
        in(cost), in(a), in(b), out(plan), out(f), out(g), out(transport_cost), out(marginal_error), out(history),
        static_cast<int32_t*>(n_iter.mutable_data_ptr()), n, m, max_iter, check_every, history.size(1), scalar(epsilon),
        scalar(tol.value_or(-1)), scalar(damping(tau_a, epsilon)), scalar(damping(tau_b, epsilon)),
        scalar(tau_b ? epsilon / *tau_b : 0)};
    sinkhorn_fwd_kernel<scalar>
        <<<static_cast<unsigned>(batch), kThreads, 0, helo_fast::current_stream(cost.get_device_index())>>>(arguments);
    helo_fast::check_launch("sinkhorn_fwd");
  };
  if (batch > 0) {
    if (cost.scalar_type() == ScalarType::Double)
      launch(double(0));
    else
      launch(float(0));
  }
  return {plan, f, g, transport_cost, marginal_error, n_iter, history};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cuda, CUDA, m) { m.impl("sinkhorn_fwd", TORCH_BOX(&sinkhorn_fwd)); }
