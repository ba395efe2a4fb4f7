// Sinkhorn forward on CUDA up to 64 x 64: common/sinkhorn_registers.h, a warp (float64 beyond 16 x 16: four) per problem.
//
// Grid: x = block; problems block, block + gridDim.x, ... Traffic: cost is read once and each output written once, in 16-byte pieces
// where a row is whole ones. Shared memory: one problem's costs and potentials. Registers: K, which is why the blocks a multiprocessor
// holds are stated: the compiler may use what that leaves, and nothing spills.

#include "common/sinkhorn_sizes.h"
#include "launch.h"
#include "sinkhorn.h"
#include "team.h"

namespace helo_fast {
namespace {

template <typename scalar, typename Grid, bool general>
constexpr int resident() {
  constexpr int entries = Grid::kTileRows * Grid::kTileColumns * int(sizeof(scalar)) / 4;  // registers that hold K
  constexpr int warps = entries <= 8 ? 24 : entries <= 32 ? 16 : entries <= 45 && !general ? 16 : entries <= 64 ? 10 : 8;
  return warps * 32 / Grid::kLanes;
}

template <typename scalar, typename Grid, bool general>
__global__ void __launch_bounds__(Grid::kLanes, resident<scalar, Grid, general>()) sinkhorn_registers(const SinkhornBatch<scalar> x) {
  using Team = TeamOf<Grid::kLanes>;
  __shared__ SinkhornShared<scalar, Grid> shared;
  __shared__ typename Team::Shared between_warps;
  Team team(between_warps);
  SinkhornRegisters<scalar, Grid, general, Team>(x, shared, team).solve_share(blockIdx.x, gridDim.x);
}

template <typename scalar>
bool launch(const SinkhornBatch<scalar>& x, int32_t device_index) {
  const auto start = [&](auto grid, auto general) {
    using Grid = decltype(grid);
    const auto kernel = sinkhorn_registers<scalar, Grid, general>;
    const unsigned blocks =
        x.tol < 0 ? resident_blocks_for(kernel, "sinkhorn_registers", Grid::kLanes, 0, x.batch, device_index) : blocks_for(x.batch);
    kernel<<<blocks, Grid::kLanes, 0, current_stream(device_index)>>>(x);
    check_launch("sinkhorn_registers");
  };
  return with_grid<scalar>(x.n, x.m, [&](auto grid) { is_general(x) ? start(grid, std::true_type()) : start(grid, std::false_type()); });
}

}  // namespace

bool launch_in_registers(const SinkhornBatch<float>& x, int32_t device_index) { return launch(x, device_index); }
bool launch_in_registers(const SinkhornBatch<double>& x, int32_t device_index) { return launch(x, device_index); }

}  // namespace helo_fast
