// The CUDA solver of gromov_from_tokens on the host, lane by lane: problems from standard input, results to standard output.

#include <cmath>
#include <memory>

#include "common/gromov_sizes.h"
#include "io.h"
#include "team.h"

namespace {

using namespace helo_fast;

// Under a sanitizer one grid a dtype, whatever fits it: compiling them all takes a minute.
template <typename scalar, typename Call>
bool with_grid_here(int64_t n, int64_t m, const Call& call) {
#if defined(__SANITIZE_ADDRESS__)
  using Grid = std::conditional_t<sizeof(scalar) == 4, GromovGrid36, GromovGrid64Double>;
  const bool found = n <= 36 && m <= 36;
  if (found) call(Grid());
  return found;
#else
  return with_gromov_grid<scalar>(n, m, call);
#endif
}

// run(solver, block) on every lane of every block, each block with its own shared memory.
template <typename Grid, typename scalar, typename Run>
void on_blocks(const GromovBatch<scalar>& x, int64_t blocks, const Run& run) {
  using Team = HostTeam<Grid::kLanes>;
  using Solver = GromovTokens<scalar, Grid, Team>;
  if (Solver::shared_bytes(x) > kSharedBytes<Grid::kLanes>) std::abort();
  auto lanes = std::make_unique<Lanes<Grid::kLanes>>();
  for (int64_t block = 0; block < blocks; ++block) {
    auto memory = unwritten<double>((Solver::shared_bytes(x) + 7) / 8);
    lanes->run([&](int lane) {
      Team team(*lanes, lane);
      Solver solver(x, reinterpret_cast<unsigned char*>(memory.data()), team);
      run(solver, block);
    });
  }
}

// In: int64 batch, n, m, width, outer_iter, inner_iter, entropic, over_batch, whether cost_xy is given, blocks, shift; float64 alpha,
// threshold, epsilon, tol, bound; then x, y, a, b and cost_xy. Out: plan, gw_cost, marginal_error, n_iter, converged.
template <typename scalar>
int solve() {
  const auto sizes = read<int64_t>(11);
  const auto options = read<double>(5);
  const int64_t batch = sizes[0], n = sizes[1], m = sizes[2], width = sizes[3], blocks = sizes[9], shift = sizes[10];
  auto tokens_x = read<scalar>(batch * n * width), tokens_y = read<scalar>(batch * m * width);
  const auto a = read<scalar>(batch * n), b = read<scalar>(batch * m), cross = read<scalar>(sizes[8] * batch * n * m);
  for (auto* tokens : {&tokens_x, &tokens_y}) tokens->insert(tokens->begin(), shift, scalar(0));  // begin on an odd address
  auto plan = unwritten<scalar>(batch * n * m), gw_cost = unwritten<scalar>(batch), marginal_error = unwritten<scalar>(batch);
  auto n_iter = unwritten<int32_t>(batch);
  auto converged = unwritten<unsigned char>(batch);
  GromovBatch<scalar> x{};
  x.spaces.x = tokens_x.data() + shift, x.spaces.y = tokens_y.data() + shift, x.spaces.a = a.data(), x.spaces.b = b.data();
  x.spaces.cost_xy = sizes[8] ? cross.data() : nullptr;
  x.spaces.n = n, x.spaces.m = m, x.spaces.width = width, x.spaces.alpha = options[0], x.spaces.threshold = options[1];
  x.plan = plan.data(), x.gw_cost = gw_cost.data(), x.marginal_error = marginal_error.data();
  x.n_iter = n_iter.data(), x.converged = reinterpret_cast<bool*>(converged.data());
  x.outer_iter = sizes[4], x.inner_iter = sizes[5], x.entropic = sizes[6];
  x.epsilon = options[2], x.tol = options[3], x.bound = options[4], x.batch = batch;
  auto extremes = unwritten<scalar>(4 * blocks);
  const bool served = with_grid_here<scalar>(n, m, [&](auto grid) {
    using Grid = decltype(grid);
    if (sizes[7]) {
      on_blocks<Grid>(x, blocks, [&](auto& solver, int64_t block) { solver.find_extremes_share(&extremes[4 * block], block, blocks); });
      x.spaces.extremes = extremes.data(), x.extremes = blocks;
    }
    on_blocks<Grid>(x, blocks, [&](auto& solver, int64_t block) { solver.solve_share(block, blocks); });
  });
  if (!served) return 3;
  for (const auto* values : {&plan, &gw_cost, &marginal_error}) write(*values);
  write(n_iter);
  write(converged);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  return std::strcmp(arguments[1], "float32") ? solve<double>() : solve<float>();
}
