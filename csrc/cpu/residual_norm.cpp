// residual_norm on the CPU, the torch side: allocates, picks the instruction set, spreads rows over threads.
// The algorithm stands in residual_norm_kernel.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>

#include "../common/half.h"
#include "../common/philox.h"
#include "capability.h"
#include "problems.h"
#include "residual_norm_problem.h"
#include "residual_norm_tensors.h"
#include "tensors.h"

#define HELO_FAST_KERNEL "residual_norm_kernel.h"
#include "each_set.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const ResidualNormKernel& float_residual_norm() {
  return pick(baseline::residual_norm<float>, avx2::residual_norm<float>, avx512::residual_norm<float>);
}

namespace {

constexpr int64_t kMostSlices = 64;

const ResidualNormKernel& kernel(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double
             ? pick(baseline::residual_norm<double>, avx2::residual_norm<double>, avx512::residual_norm<double>)
             : float_residual_norm();
}

// Every tensor is contiguous.
std::tuple<Tensor, Tensor, Tensor> residual_norm_fwd(
    const Tensor& x, const Tensor& y,           // [.., D]
    const Tensor& weight, const Tensor& bias,   // [D]
    const std::optional<Tensor>& seed,          // int64, one element
    double eps, int64_t cut_below, double rescale) {
  ResidualNormArguments a = norm_arguments(x, y, weight, seed, cut_below, rescale);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  Tensor mean = torch::stable::new_empty(x, {a.rows}, compute_type(x)), rstd = torch::stable::new_empty(x, {a.rows}, compute_type(x));
  a.bias = rows(bias, a.width), a.out = rows(out, a.width), a.eps = eps;
  a.mean = static_cast<unsigned char*>(mean.mutable_data_ptr()), a.rstd = static_cast<unsigned char*>(rstd.mutable_data_ptr());
  const ResidualNormKernel& run = kernel(x);
  for_each_problem(a.rows, 8 * a.width, run.scratch_bytes(a.width),
                   [&](int64_t begin, int64_t end, unsigned char* scratch) { run.fwd(a, begin, end, scratch); });
  return {out, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_bwd(
    const Tensor& grad_out, const Tensor& x, const Tensor& y, const Tensor& weight,
    const Tensor& mean, const Tensor& rstd,  // [rows]
    const std::optional<Tensor>& seed, int64_t cut_below, double rescale) {
  ResidualNormArguments a = norm_arguments(x, y, weight, seed, cut_below, rescale);
  Tensor dx = torch::stable::new_empty(x, x.sizes());
  Tensor dy = a.masked ? torch::stable::new_empty(y, y.sizes()) : torch::stable::new_empty(y, {0});
  Tensor dweight = torch::stable::new_empty(weight, {a.width}), dbias = torch::stable::new_empty(weight, {a.width});
  const ResidualNormKernel& run = kernel(x);
  a.slices = std::max<int64_t>(1, std::min(kMostSlices, a.rows / 16));
  Tensor parts = torch::stable::new_empty(x, {a.slices, 2, run.padded(a.width)}, compute_type(x));
  a.grad_out = rows(grad_out, a.width), a.dx = rows(dx, a.width), a.dweight = rows(dweight, a.width), a.dbias = rows(dbias, a.width);
  if (a.masked) a.dy = rows(dy, a.width);
  a.mean = static_cast<unsigned char*>(const_cast<void*>(mean.const_data_ptr()));
  a.rstd = static_cast<unsigned char*>(const_cast<void*>(rstd.const_data_ptr()));
  a.parts = static_cast<unsigned char*>(parts.mutable_data_ptr());
  for_each_problem(a.slices, 16 * a.rows / a.slices * a.width, run.scratch_bytes(a.width),
                   [&](int64_t begin, int64_t end, unsigned char* scratch) { run.bwd(a, begin, end, scratch); });
  run.sum(a, take_scratch(run.scratch_bytes(a.width)).get());
  return {dx, dy, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cpu, CPU, m) {
  m.impl("residual_norm_fwd", TORCH_BOX(&residual_norm_fwd));
  m.impl("residual_norm_bwd", TORCH_BOX(&residual_norm_bwd));
}
