// lcd_attention on the CPU, the torch side: allocates, picks the instruction set, spreads heads over threads.
// The algorithm stands in attention_kernel.h.
//
// No result depends on the number of threads: what several heads add to (the gradients of a shared query or bias) is added up by
// tasks whose extent depends on the shapes alone, and the tasks' sums in their order.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "../common/half.h"
#include "../common/philox.h"
#include "attention_problem.h"
#include "attention_tensors.h"
#include "capability.h"
#include "problems.h"
#include "tensors.h"

#define HELO_FAST_KERNEL "attention_kernel.h"
#include "each_set.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const AttentionKernel& float_attention() { return pick(baseline::attention<float>, avx2::attention<float>, avx512::attention<float>); }

namespace {

constexpr int64_t kMostTasks = 64;                // that add to one gradient
constexpr int64_t kMostPartials = int64_t(1) << 24;  // entries of their sums together, or one task's where that is more

const AttentionKernel& kernel(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? pick(baseline::attention<double>, avx2::attention<double>, avx512::attention<double>)
                                               : float_attention();
}

AttentionArguments arguments(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
                             const std::optional<Tensor>& seed, double scale, int64_t drop_below, int64_t cut_below, double rescale) {
  AttentionArguments x{};
  describe(x, q, k, v, bias, seed, scale, drop_below, cut_below, rescale);
  if (x.masked) x.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  return x;
}

std::tuple<Tensor, Tensor> lcd_attention_fwd(
    const Tensor& q,                      // [B or 1, H, n, d]
    const Tensor& k, const Tensor& v,     // [B, H, m, d]
    const std::optional<Tensor>& bias,    // [B or 1, H or 1, n, m]
    const std::optional<Tensor>& seed,    // int64, one element
    double scale, int64_t drop_below, int64_t cut_below, double rescale) {
  AttentionArguments x = arguments(q, k, v, bias, seed, scale, drop_below, cut_below, rescale);
  Tensor out = empty_heads(q, x.B, x.H, x.n, x.d), lse = torch::stable::new_empty(q, {x.B, x.H, x.n}, compute_type(q));
  x.out = view(out), x.lse = view(lse);
  const AttentionKernel& run = kernel(q);
  const int64_t row_blocks = (x.n + kTile - 1) / kTile;
  for_each_problem(x.B * x.H * row_blocks, 2 * std::min(x.n, kTile) * x.m * x.d, run.scratch_bytes(x.n, x.d),
                   [&](int64_t begin, int64_t end, unsigned char* scratch) { run.fwd(x, begin, end, scratch); });
  return {out, lse};
}

// Of `heads` slices of the total, each is the sum of the like of `h_parts` slices of every part (h_parts is heads, or heads 1).
void sum(const AttentionKernel& run, const Tensor& parts, int64_t h_parts, const Tensor& total, int64_t heads) {
  const AttentionSums x{static_cast<const unsigned char*>(parts.const_data_ptr()), parts.size(0), h_parts,
                        total.size(1) * total.size(2) * total.size(3) / heads,
                        static_cast<unsigned char*>(const_cast<void*>(total.const_data_ptr())), storage(total), total.size(0), heads};
  torch::stable::parallel_for(0, x.batches * x.heads * x.size, 4096, [&](int64_t begin, int64_t end) { run.sum(x, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lcd_attention_bwd(
    const Tensor& grad_out,  // [B, H, n, d]
    const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& bias,
    const Tensor& out,  // [B, H, n, d]
    const Tensor& lse,  // [B, H, n]
    const std::optional<Tensor>& seed, double scale, int64_t drop_below, int64_t cut_below, double rescale, bool bias_grad) {
  AttentionArguments x = arguments(q, k, v, bias, seed, scale, drop_below, cut_below, rescale);
  Tensor dq = empty_heads(q), dk = empty_heads(k), dv = empty_heads(v);
  Tensor dbias = bias_grad ? torch::stable::new_empty(q, bias->sizes()) : torch::stable::new_empty(q, {0});
  x.grad_out = view(grad_out), x.out = view(out), x.lse = view(lse);
  x.dq = view(dq), x.dk = view(dk), x.dv = view(dv);
  if (bias_grad) x.dbias = view(dbias);

  part_sums(x, q, bias, bias_grad, kMostTasks, kMostPartials);
  std::optional<Tensor> dq_parts, dbias_parts;
  if (x.add_dq) {
    dq_parts = torch::stable::transpose(torch::stable::new_zeros(q, {x.b_parts, x.n, x.H, x.d}, compute_type(q)), 1, 2);
    x.dq = view(*dq_parts);
  }
  if (x.add_dbias) {
    dbias_parts = torch::stable::new_zeros(q, {x.dbias_over_batch ? x.b_parts : x.B, x.h_parts, x.n, x.m}, compute_type(q));
    x.dbias = view(*dbias_parts);
  }

  const AttentionKernel& run = kernel(q);
  const int64_t count = x.b_parts * x.h_parts, heads = count > 0 ? x.B * x.H / count : 0;
  for_each_problem(count, 5 * heads * x.n * x.m * x.d, run.scratch_bytes(x.n, x.d),
                   [&](int64_t begin, int64_t end, unsigned char* scratch) { run.bwd(x, begin, end, scratch); });
  if (x.add_dq) sum(run, *dq_parts, 1, dq, 1);
  if (x.add_dbias) sum(run, *dbias_parts, x.h_parts, dbias, bias->size(1));
  return {dq, dk, dv, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cpu, CPU, m) {
  m.impl("lcd_attention_fwd", TORCH_BOX(&lcd_attention_fwd));
  m.impl("lcd_attention_bwd", TORCH_BOX(&lcd_attention_bwd));
}
