// The CUDA solvers of Sinkhorn on the host, lane by lane: problems from standard input, results to standard output.

#include <cmath>
#include <memory>

#include "common/sinkhorn_sizes.h"
#include "common/sinkhorn_streaming.h"
#include "io.h"
#include "team.h"

namespace {

using namespace helo_fast;

template <typename Grid, bool general, typename scalar>
void solve_in_registers(const SinkhornBatch<scalar>& x, int64_t blocks) {
  using Team = HostTeam<Grid::kLanes>;
  using Solver = SinkhornRegisters<scalar, Grid, general, Team>;
  auto lanes = std::make_unique<Lanes<Grid::kLanes>>();
  for (int64_t block = 0; block < blocks; ++block) {
    auto shared = std::make_unique<typename Solver::Shared>();
    std::memset(static_cast<void*>(shared.get()), 0xff, sizeof *shared);
    lanes->run([&](int lane) {
      Team team(*lanes, lane);
      Solver(x, *shared, team).solve_share(block, blocks);
    });
  }
}

template <typename scalar>
void solve_streaming(const SinkhornBatch<scalar>& x, int64_t blocks) {
  constexpr int kLanes = 64;
  using Team = HostTeam<kLanes>;
  auto lanes = std::make_unique<Lanes<kLanes>>();
  auto scratch = unwritten<double>(x.batch * (x.n + x.m));
  for (int64_t block = 0; block < blocks; ++block)
    lanes->run([&](int lane) {
      Team team(*lanes, lane);
      SinkhornStreaming<scalar, Team>(x, scratch.data(), team).solve_share(block, blocks);
    });
}

// In: int64 batch, n, m, kept, max_iter, check_every, uniform, blocks, shift; float64 epsilon, tol, kappa_a, kappa_b, slope_b,
// converged_at; then cost and, unless uniform, a and b. Out: plan, f, g, transport_cost, marginal_error, history, n_iter, converged.
template <typename scalar>
int solve(bool streaming) {
  const auto sizes = read<int64_t>(9);
  const auto options = read<double>(6);
  const int64_t batch = sizes[0], n = sizes[1], m = sizes[2], kept = sizes[3], shift = sizes[8];
  const bool uniform = sizes[6];
  auto cost = read<scalar>(batch * n * m);
  cost.insert(cost.begin(), shift, scalar(0));  // where a problem begins on an odd address
  const auto a = read<scalar>(uniform ? 0 : batch * n), b = read<scalar>(uniform ? 0 : batch * m);
  auto plan = unwritten<scalar>(batch * n * m + shift), f = unwritten<scalar>(batch * n), g = unwritten<scalar>(batch * m);
  auto transport_cost = unwritten<scalar>(batch), marginal_error = unwritten<scalar>(batch);
  std::vector<scalar> history(batch * kept * (n + m));
  auto n_iter = unwritten<int32_t>(batch);
  auto converged = unwritten<unsigned char>(batch);
  SinkhornBatch<scalar> x{};
  x.cost = cost.data() + shift, x.a = uniform ? nullptr : a.data(), x.b = uniform ? nullptr : b.data();
  x.plan = plan.data() + shift, x.f = f.data(), x.g = g.data();
  x.transport_cost = transport_cost.data(), x.marginal_error = marginal_error.data(), x.history = history.data();
  x.n_iter = n_iter.data(), x.converged = reinterpret_cast<bool*>(converged.data());
  x.batch = batch, x.n = n, x.m = m, x.kept = kept, x.max_iter = sizes[4], x.check_every = sizes[5];
  x.epsilon = options[0], x.tol = options[1], x.kappa_a = options[2], x.kappa_b = options[3], x.slope_b = options[4];
  x.converged_at = scalar(options[5]), x.total = total_mass(x);
  if (streaming) solve_streaming(x, sizes[7]);
  const bool served = streaming || with_grid<scalar>(n, m, [&](auto grid) {
    if (is_general(x))
      solve_in_registers<decltype(grid), true>(x, sizes[7]);
    else
      solve_in_registers<decltype(grid), false>(x, sizes[7]);
  });
  if (!served) return 3;
  plan.erase(plan.begin(), plan.begin() + shift);
  for (const auto* values : {&plan, &f, &g, &transport_cost, &marginal_error, &history}) write(*values);
  write(n_iter);
  write(converged);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const bool streaming = !std::strcmp(arguments[2], "streaming");
  return std::strcmp(arguments[1], "float32") ? solve<double>(streaming) : solve<float>(streaming);
}
