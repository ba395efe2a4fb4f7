// gromov_from_tokens on CUDA, up to 64 tokens a side: common/gromov_tokens.h, a warp per problem (four beyond 36 tokens, eight in
// float64).
//
// Grid: x = block; problems block, block + gridDim.x, ... Traffic: tokens are read once (twice where the threshold is over the batch,
// whose extremes a first kernel finds) and each output is written once. Shared memory: four matrices of the problem, 24 KB at 36 x 36,
// 71 KB at 64 x 64 in float32, and one more for a cost across.

#include "common/gromov_sizes.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "launch.h"
#include "team.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace helo_fast {
namespace {

constexpr double converged_by_default = 1e-4;  // as in helo_fast/ops/sinkhorn/reference.py

template <typename scalar, typename Grid>
constexpr int resident() {
  return Grid::kLanes == 32 ? 8 : sizeof(scalar) == 4 ? 2 : 1;
}

template <typename scalar, typename Grid>
__global__ void __launch_bounds__(Grid::kLanes, resident<scalar, Grid>()) gromov_tokens(const GromovBatch<scalar> x) {
  using Team = TeamOf<Grid::kLanes>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ typename Team::Shared between_warps;
  Team team(between_warps);
  GromovTokens<scalar, Grid, Team>(x, memory, team).solve_share(blockIdx.x, gridDim.x);
}

template <typename scalar, typename Grid>
__global__ void __launch_bounds__(Grid::kLanes, resident<scalar, Grid>()) gromov_extremes(const GromovBatch<scalar> x, scalar* extremes) {
  using Team = TeamOf<Grid::kLanes>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ typename Team::Shared between_warps;
  Team team(between_warps);
  GromovTokens<scalar, Grid, Team>(x, memory, team).find_extremes_share(extremes + 4 * blockIdx.x, blockIdx.x, gridDim.x);
}

// False where there is no kernel for the size.
template <typename scalar>
bool launch(GromovBatch<scalar> x, const Tensor& like, bool over_batch, int32_t device_index) {
  return with_gromov_grid<scalar>(x.spaces.n, x.spaces.m, [&](auto grid) {
    using Grid = decltype(grid);
    const int64_t bytes = GromovTokens<scalar, Grid, TeamOf<Grid::kLanes>>::shared_bytes(x);
    const auto kernel = gromov_tokens<scalar, Grid>;
    allow_shared(kernel, "gromov_tokens", bytes, device_index);
    const unsigned blocks = resident_blocks_for(kernel, "gromov_tokens", Grid::kLanes, bytes, x.batch, device_index);
    Tensor extremes = torch::stable::new_empty(like, {over_batch ? blocks : 0, 4});
    if (over_batch) {
      allow_shared(gromov_extremes<scalar, Grid>, "gromov_extremes", bytes, device_index);
      auto* ends = static_cast<scalar*>(extremes.mutable_data_ptr());
      gromov_extremes<scalar, Grid><<<blocks, Grid::kLanes, bytes, current_stream(device_index)>>>(x, ends);
      check_launch("gromov_extremes");
      x.spaces.extremes = ends, x.extremes = blocks;
    }
    kernel<<<blocks, Grid::kLanes, bytes, current_stream(device_index)>>>(x);
    check_launch("gromov_tokens");
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gromov_from_tokens_fwd(
    const Tensor& x,                       // [B, n, width], contiguous, as all others; float32 or float64
    const Tensor& y,                       // [B, m, width]
    const Tensor& a,                       // [B, n]
    const Tensor& b,                       // [B, m]
    const std::optional<Tensor>& cost_xy,  // [B, n, m]; none with alpha < 1: the tokens' cosine cost
    double threshold, bool over_batch, double alpha, std::string method, double epsilon, int64_t outer_iter, int64_t inner_iter,
    std::optional<double> tol) {
  const int64_t batch = a.size(0), n = a.size(1), m = b.size(1);
  const int32_t device = a.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  Tensor plan = torch::stable::new_empty(a, {batch, n, m}), gw_cost = torch::stable::new_empty(a, {batch});
  Tensor marginal_error = torch::stable::new_empty(a, {batch});
  Tensor n_iter = torch::stable::new_empty(a, {batch}, ScalarType::Int), converged = torch::stable::new_empty(a, {batch}, ScalarType::Bool);
  const auto run = [&](auto zero) {
    using scalar = decltype(zero);
    const auto in = [](const Tensor& t) { return static_cast<const scalar*>(t.const_data_ptr()); };
    const auto out = [](Tensor& t) { return static_cast<scalar*>(t.mutable_data_ptr()); };
    GromovBatch<scalar> problem{};
    GromovSpaces<scalar>& spaces = problem.spaces;
    spaces.x = in(x), spaces.y = in(y), spaces.a = in(a), spaces.b = in(b), spaces.cost_xy = cost_xy ? in(*cost_xy) : nullptr;
    spaces.n = n, spaces.m = m, spaces.width = x.size(2), spaces.alpha = alpha, spaces.threshold = threshold;
    problem.plan = out(plan), problem.gw_cost = out(gw_cost), problem.marginal_error = out(marginal_error);
    problem.n_iter = static_cast<int32_t*>(n_iter.mutable_data_ptr()), problem.converged = static_cast<bool*>(converged.mutable_data_ptr());
    problem.outer_iter = outer_iter, problem.inner_iter = inner_iter, problem.epsilon = epsilon, problem.tol = tol.value_or(-1);
    problem.bound = tol.value_or(converged_by_default), problem.entropic = method == "entropic", problem.batch = batch;
    if (batch == 0) return;
    STD_TORCH_CHECK(launch(problem, a, over_batch, device), "gromov_from_tokens_fwd: n and m may be 64 at most");
  };
  if (a.scalar_type() == ScalarType::Double)
    run(double(0));
  else
    run(float(0));
  return {plan, gw_cost, marginal_error, n_iter, converged};
}

}  // namespace
}  // namespace helo_fast

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cuda, CUDA, m) { m.impl("gromov_from_tokens_fwd", TORCH_BOX(&helo_fast::gromov_from_tokens_fwd)); }
