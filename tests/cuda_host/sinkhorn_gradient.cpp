// The CUDA gradient of Sinkhorn on the host, lane by lane: problems from standard input, results to standard output.

#include <cmath>
#include <memory>

#include "common/sinkhorn_gradient.h"
#include "io.h"
#include "team.h"

namespace {

using namespace helo_fast;

constexpr int kLanes = 128;

// In: int64 batch, n, m, blocks, whether grad_plan, grad_f, grad_g and grad_transport are given; float64 epsilon, lambda_a, lambda_b;
// then cost and grad_plan, their last two dimensions swapped, a, b, plan and what else is given. Out: d_cost, d_a, d_b.
template <typename scalar>
int differentiate() {
  const auto sizes = read<int64_t>(8);
  const auto options = read<double>(3);
  const int64_t batch = sizes[0], n = sizes[1], m = sizes[2], blocks = sizes[3];
  const auto cost = read<scalar>(batch * n * m), grad_plan = read<scalar>(sizes[4] * batch * n * m);
  const auto a = read<scalar>(batch * n), b = read<scalar>(batch * m), plan = read<scalar>(batch * n * m);
  const auto grad_f = read<scalar>(sizes[5] * batch * n), grad_g = read<scalar>(sizes[6] * batch * m);
  const auto grad_transport = read<scalar>(sizes[7] * batch);
  auto d_cost = unwritten<scalar>(batch * n * m), d_a = unwritten<scalar>(batch * n), d_b = unwritten<scalar>(batch * m);
  const auto given = [](const std::vector<scalar>& values) { return values.empty() ? nullptr : values.data(); };
  SinkhornGradientBatch<scalar> x{};
  x.a = a.data(), x.b = b.data(), x.plan = plan.data();
  x.cost = {cost.data(), n * m, 1, n}, x.grad_plan = {given(grad_plan), n * m, 1, n};
  x.grad_f = given(grad_f), x.grad_g = given(grad_g), x.grad_transport = given(grad_transport);
  x.d_cost = d_cost.data(), x.d_a = d_a.data(), x.d_b = d_b.data();
  x.n = n, x.m = m, x.epsilon = options[0], x.lambda_a = options[1], x.lambda_b = options[2], x.batch = batch;
  using Team = HostTeam<kLanes>;
  using Gradient = SinkhornGradient<scalar, Team>;
  auto lanes = std::make_unique<Lanes<kLanes>>();
  for (int64_t block = 0; block < blocks; ++block) {
    auto memory = unwritten<double>(Gradient::shared_bytes(n, m) / 8);
    lanes->run([&](int lane) {
      Team team(*lanes, lane);
      Gradient(x, memory.data(), team).differentiate_share(block, blocks);
    });
  }
  for (const auto* values : {&d_cost, &d_a, &d_b}) write(*values);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  return std::strcmp(arguments[1], "float32") ? differentiate<double>() : differentiate<float>();
}
