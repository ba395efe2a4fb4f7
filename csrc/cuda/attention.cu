// lcd_attention on CUDA, forward and backward, up to 64 x 64 (float64: 56 x 56): common/attention.h, a warp per head (four beyond 36 rows
// or columns, eight in float64).
//
// Grid: x = block; heads block, block + gridDim.x, ..., or of the backward parts of them (attention_problem.h), so that what is shared is
// summed in an order that depends on the shapes alone; the parts are the caller's to add up. Traffic: every operand is read once (the
// backward reads no output) and every result written once. Shared memory: the operands, at 36 x 36 and d 32 in float32 17 KB forward and
// 22 KB backward, of a bias 5 KB more.

#include "common/attention_sizes.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>

#include "cpu/tensors.h"
#include "launch.h"
#include "team.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace helo_fast {
namespace {

using Optional = std::optional<Tensor>;

constexpr int64_t kMostParts = 8192;             // that add to one gradient
constexpr int64_t kMostSums = int64_t(1) << 24;  // entries of their sums together, or one part's where that is more

template <typename scalar, typename Grid, bool backward>
constexpr int resident() {
  if (sizeof(scalar) == 8) return backward ? 1 : 2;
  return Grid::kLanes > 32 ? backward ? 3 : 4 : Grid::kTileRows == 3 ? 16 : backward ? 8 : 12;
}

template <typename scalar, typename Grid>
__global__ void __launch_bounds__(Grid::kLanes, resident<scalar, Grid, false>()) attention_fwd(const AttentionBatch x) {
  using Team = TeamOf<Grid::kLanes>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ typename Team::Shared between_warps;
  Team team(between_warps);
  Attention<scalar, Grid, Team>(x, false, memory, team).forward_share(blockIdx.x, gridDim.x);
}

template <typename scalar, typename Grid>
__global__ void __launch_bounds__(Grid::kLanes, resident<scalar, Grid, true>()) attention_bwd(const AttentionBatch x) {
  using Team = TeamOf<Grid::kLanes>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ typename Team::Shared between_warps;
  Team team(between_warps);
  Attention<scalar, Grid, Team>(x, true, memory, team).backward_share(blockIdx.x, gridDim.x);
}

// As many blocks as find room at once, of `teams` that have work: all take about the same time.
template <typename Kernel>
void start(Kernel* kernel, const AttentionBatch& x, int lanes, int64_t bytes, int64_t teams, int32_t device_index) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  STD_TORCH_CHECK(error == cudaSuccess, "lcd_attention: ", bytes, " bytes of shared memory: ", cudaGetErrorString(error));
  int room = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&room, kernel, lanes, bytes);
  STD_TORCH_CHECK(error == cudaSuccess && room > 0, "lcd_attention: no block finds room on a multiprocessor: ", cudaGetErrorString(error));
  kernel<<<resident_blocks_for(teams, room, device_index), lanes, bytes, current_stream(device_index)>>>(x);
  check_launch("lcd_attention");
}

template <typename scalar>
void launch(const AttentionBatch& x, bool backward, int32_t device_index) {
  const int64_t teams = backward ? x.b_parts * x.h_parts : x.B * x.H;
  if (teams == 0) return;
  STD_TORCH_CHECK(x.B * x.H <= INT32_MAX, "lcd_attention: fewer than 2^31 heads");
  const bool served = with_attention_grid<scalar>(x.n, x.m, x.d, [&](auto grid) {
    using Grid = decltype(grid);
    const int64_t bytes = Attention<scalar, Grid, TeamOf<Grid::kLanes>>::shared_bytes(x, backward);
    start(backward ? attention_bwd<scalar, Grid> : attention_fwd<scalar, Grid>, x, Grid::kLanes, bytes, teams, device_index);
  });
  STD_TORCH_CHECK(served, "lcd_attention: n and m may be 64 at most, d 128 (float64: 56, 64)");
}
void launch(const AttentionBatch& x, const Tensor& like, bool backward) {
  const int32_t device = like.get_device_index();
  like.scalar_type() == ScalarType::Double ? launch<double>(x, backward, device) : launch<float>(x, backward, device);
}

View view(const Tensor& t) {
  const auto stride = [&](int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); };
  auto* data = static_cast<unsigned char*>(const_cast<void*>(t.const_data_ptr()));  // what is written to was made here
  return {data, storage(t), stride(0), stride(1), t.stride(2), t.dim() == 4 ? t.stride(3) : 1};
}

// [B, H, n, d] in the memory of [B, n, H, d]: joining the heads of a result copies nothing.
Tensor empty_heads(const Tensor& like, int64_t B, int64_t H, int64_t n, int64_t d, std::optional<ScalarType> type = std::nullopt) {
  return torch::stable::transpose(torch::stable::new_empty(like, {B, n, H, d}, type), 1, 2);
}

AttentionBatch arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& seed, double scale,
                         int64_t drop_below, int64_t cut_below, double rescale) {
  AttentionBatch x{};
  x.B = k.size(0), x.H = k.size(1), x.n = q.size(2), x.m = k.size(2), x.d = q.size(3);
  x.q = view(q), x.k = view(k), x.v = view(v);
  if (bias) x.bias = view(*bias);
  x.scale = scale, x.rescale = rescale;
  x.masked = seed && (drop_below > 0 || cut_below > 0);
  if (x.masked) x.seed_at = static_cast<const int64_t*>(seed->const_data_ptr());
  x.drop_below = static_cast<uint32_t>(drop_below), x.cut_below = static_cast<uint32_t>(cut_below);
  return x;
}

std::tuple<Tensor, Tensor> lcd_attention_fwd(const Tensor& q,                    // [B or 1, H, n, d], any strides, as of the others
                                             const Tensor& k, const Tensor& v,  // [B, H, m, d]
                                             const Optional& bias,              // [B or 1, H or 1, n, m]
                                             const Optional& seed,              // int64, one element
                                             double scale, int64_t drop_below, int64_t cut_below, double rescale) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  AttentionBatch x = arguments(q, k, v, bias, seed, scale, drop_below, cut_below, rescale);
  Tensor out = empty_heads(q, x.B, x.H, x.n, x.d), lse = torch::stable::new_empty(q, {x.B, x.H, x.n}, compute_type(q));
  x.out = view(out), x.lse = view(lse);
  launch(x, q, false);
  return {out, lse};
}

// dq [b_parts or B, H, n, d] and dbias [b_parts or B, h_parts or H, n, m]: in the compute dtype the sums of the parts, where a query or a
// bias is shared.
std::tuple<Tensor, Tensor, Tensor, Tensor> lcd_attention_bwd(
    const Tensor& grad_out,  // [B, H, n, d]
    const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias,
    const Tensor& lse,  // [B, H, n]
    const Optional& seed, double scale, int64_t drop_below, int64_t cut_below, double rescale, bool bias_grad) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  AttentionBatch x = arguments(q, k, v, bias, seed, scale, drop_below, cut_below, rescale);
  const bool over_batch = bias_grad && bias->size(0) != x.B, over_heads = bias_grad && bias->size(1) != x.H;
  x.add_dq = q.size(0) != x.B, x.add_dbias = over_batch || over_heads, x.dbias_over_batch = over_batch;
  const int64_t entries = (x.add_dbias ? x.n * x.m : 0) + (x.add_dq ? x.n * x.d : 0);
  const int64_t parts = std::max<int64_t>(1, std::min(kMostParts, kMostSums / std::max<int64_t>(entries, 1)));
  const bool any_over_batch = x.add_dq || over_batch;
  x.h_parts = over_heads && (any_over_batch ? x.H : x.B * x.H) > parts ? 1 : x.H;
  x.b_parts = any_over_batch ? std::min(x.B, std::max<int64_t>(1, parts / x.h_parts)) : x.B;

  Tensor dk = empty_heads(k, x.B, x.H, x.m, x.d), dv = empty_heads(v, x.B, x.H, x.m, x.d);
  Tensor dq = empty_heads(q, x.add_dq ? x.b_parts : x.B, x.H, x.n, x.d, x.add_dq ? compute_type(q) : q.scalar_type());
  Tensor dbias = torch::stable::new_empty(q, {0});
  if (bias_grad)
    dbias = torch::stable::new_empty(q, {over_batch ? x.b_parts : x.B, x.add_dbias ? x.h_parts : x.H, x.n, x.m},
                                     x.add_dbias ? compute_type(q) : q.scalar_type());
  x.grad_out = view(grad_out), x.lse = view(lse);
  x.dq = view(dq), x.dk = view(dk), x.dv = view(dv);
  if (bias_grad) x.dbias = view(dbias);
  launch(x, q, true);
  return {dq, dk, dv, dbias};
}

}  // namespace
}  // namespace helo_fast

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cuda, CUDA, m) {
  m.impl("lcd_attention_fwd", TORCH_BOX(&helo_fast::lcd_attention_fwd));
  m.impl("lcd_attention_bwd", TORCH_BOX(&helo_fast::lcd_attention_bwd));
}
