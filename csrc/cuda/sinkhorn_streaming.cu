// Sinkhorn forward on CUDA, of any size: common/sinkhorn_streaming.h, a block per problem.
//
// Grid: x = problem (a share of them beyond the largest grid). Traffic: two reads of cost an iteration, from L2 while it fits.

#include "common/sinkhorn_streaming.h"
#include "launch.h"
#include "sinkhorn.h"
#include "team.h"

namespace helo_fast {
namespace {

constexpr int kThreads = 256;

template <typename scalar>
__global__ void __launch_bounds__(kThreads, sizeof(scalar) == 4 ? 3 : 2) sinkhorn_streaming(const SinkhornBatch<scalar> x, double* scratch) {
  using Team = Block<kThreads>;
  __shared__ typename Team::Shared between_warps;
  Team team(between_warps);
  SinkhornStreaming<scalar, Team>(x, scratch, team).solve_share(blockIdx.x, gridDim.x);
}

template <typename scalar>
void launch(const SinkhornBatch<scalar>& x, double* scratch, int32_t device_index) {
  const unsigned blocks = blocks_for(x.batch);
  sinkhorn_streaming<scalar><<<blocks, kThreads, 0, current_stream(device_index)>>>(x, scratch);
  check_launch("sinkhorn_streaming");
}

}  // namespace

void launch_streaming(const SinkhornBatch<float>& x, double* scratch, int32_t device_index) { launch(x, scratch, device_index); }
void launch_streaming(const SinkhornBatch<double>& x, double* scratch, int32_t device_index) { launch(x, scratch, device_index); }

}  // namespace helo_fast
