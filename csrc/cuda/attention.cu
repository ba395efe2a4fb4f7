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

#include "cpu/attention_tensors.h"
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

template <typename scalar, typename Grid, bool backward>
__global__ void __launch_bounds__(Grid::kLanes, resident<scalar, Grid, backward>()) attention_heads(const AttentionBatch x) {
  using Team = TeamOf<Grid::kLanes>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ typename Team::Shared between_warps;
  Team team(between_warps);
  Attention<scalar, Grid, Team> attention(x, backward, memory, team);
  backward ? attention.backward_share(blockIdx.x, gridDim.x) : attention.forward_share(blockIdx.x, gridDim.x);
}

// As many blocks as find room at once, of `teams` that have work: all take about the same time.
template <typename Kernel>
void start(Kernel* kernel, const AttentionBatch& x, int lanes, int64_t bytes, int64_t teams, int32_t device_index) {
  const char* name = "lcd_attention";
  allow_shared(kernel, name, bytes, device_index);
  const unsigned blocks = resident_blocks_for(kernel, name, lanes, bytes, teams, device_index);
  kernel<<<blocks, lanes, bytes, current_stream(device_index)>>>(x);
  check_launch(name);
}

template <typename scalar>
void launch(const AttentionBatch& x, bool backward, int32_t device_index) {
  const int64_t teams = backward ? x.b_parts * x.h_parts : x.B * x.H;
  if (teams == 0) return;
  STD_TORCH_CHECK(x.B * x.H <= INT32_MAX, "lcd_attention: fewer than 2^31 heads");
  const bool served = with_attention_grid<scalar>(x.n, x.m, x.d, [&](auto grid) {
    using Grid = decltype(grid);
    const int64_t bytes = Attention<scalar, Grid, TeamOf<Grid::kLanes>>::shared_bytes(x, backward);
    start(backward ? attention_heads<scalar, Grid, true> : attention_heads<scalar, Grid, false>, x, Grid::kLanes, bytes, teams, device_index);
  });
  STD_TORCH_CHECK(served, "lcd_attention: n and m may be 64 at most, d 128 (float64: 56, 64)");
}
void launch(const AttentionBatch& x, const Tensor& like, bool backward) {
  const int32_t device = like.get_device_index();
  like.scalar_type() == ScalarType::Double ? launch<double>(x, backward, device) : launch<float>(x, backward, device);
}

AttentionBatch arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& bias, const Optional& seed, double scale,
                         int64_t drop_below, int64_t cut_below, double rescale) {
  AttentionBatch x{};
  describe(x, q, k, v, bias, seed, scale, drop_below, cut_below, rescale);
  if (x.masked) x.seed_at = static_cast<const int64_t*>(seed->const_data_ptr());
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
  part_sums(x, q, bias, bias_grad, kMostParts, kMostSums);

  Tensor dk = empty_heads(k, x.B, x.H, x.m, x.d), dv = empty_heads(v, x.B, x.H, x.m, x.d);
  Tensor dq = empty_heads(q, x.add_dq ? x.b_parts : x.B, x.H, x.n, x.d, x.add_dq ? compute_type(q) : q.scalar_type());
  Tensor dbias = torch::stable::new_empty(q, {0});
  if (bias_grad)
    dbias = torch::stable::new_empty(q, {x.dbias_over_batch ? x.b_parts : x.B, x.add_dbias ? x.h_parts : x.H, x.n, x.m},
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
