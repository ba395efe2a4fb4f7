// Sinkhorn's CPU kernel without torch: problems from standard input, results to standard output, all as raw numbers.
// test_portable.py runs it for other processors.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/sinkhorn_problem.h"

#define HELO_FAST_KERNEL "cpu/sinkhorn_solver.h"
#include "cpu/each_set.h"

template <typename scalar>
std::vector<scalar> read(int64_t count) {
  std::vector<scalar> values(count);
  if (std::fread(values.data(), sizeof(scalar), count, stdin) != size_t(count)) std::abort();
  return values;
}

// In: int64 batch, n, m, max_iter; float64 epsilon, kappa_a, kappa_b, slope_b; then cost, a, b. Out: plan, f, g.
template <typename scalar>
void solve(const SinkhornKernel<scalar>& kernel) {
  const auto sizes = read<int64_t>(4);
  const auto options = read<double>(4);
  const int64_t batch = sizes[0], n = sizes[1], m = sizes[2];
  const auto cost = read<scalar>(batch * n * m), a = read<scalar>(batch * n), b = read<scalar>(batch * m);
  std::vector<scalar> plan(batch * n * m), f(batch * n), g(batch * m), transport_cost(batch), marginal_error(batch);
  std::vector<int32_t> n_iter(batch);
  SinkhornArguments<scalar> x{};
  x.cost = cost.data(), x.a = a.data(), x.b = b.data();
  x.plan = plan.data(), x.f = f.data(), x.g = g.data();
  x.transport_cost = transport_cost.data(), x.marginal_error = marginal_error.data(), x.n_iter = n_iter.data();
  x.n = n, x.m = m, x.max_iter = sizes[3], x.check_every = 10, x.tol = -1;
  x.epsilon = options[0], x.kappa_a = options[1], x.kappa_b = options[2], x.slope_b = options[3];
  auto* scratch = static_cast<unsigned char*>(::operator new(kernel.scratch_bytes(n, m), std::align_val_t(64)));
  kernel.solve(x, 0, batch, scratch, nullptr);
  ::operator delete(scratch, std::align_val_t(64));
  for (const auto* values : {&plan, &f, &g}) std::fwrite(values->data(), sizeof(scalar), values->size(), stdout);
}

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const bool single = !std::strcmp(arguments[1], "float32");
  switch (arguments[2][0]) {  // the width of vectors
    case '1': single ? solve(baseline::sinkhorn<float>) : solve(baseline::sinkhorn<double>); break;
    case '3': single ? solve(avx2::sinkhorn<float>) : solve(avx2::sinkhorn<double>); break;
    case '6': single ? solve(avx512::sinkhorn<float>) : solve(avx512::sinkhorn<double>); break;
  }
}
