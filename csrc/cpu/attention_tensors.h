// The torch side of lcd_attention that all devices share: tensors as the kernels see them, and how sums over what is shared are parted.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "attention_problem.h"
#include "tensors.h"

inline View view(const torch::stable::Tensor& t) {
  const auto stride = [&](int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); };
  auto* data = static_cast<unsigned char*>(const_cast<void*>(t.const_data_ptr()));  // what is written to was made here
  return {data, storage(t), stride(0), stride(1), t.stride(2), t.dim() == 4 ? t.stride(3) : 1};
}

// [B, H, n, d] in the memory of [B, n, H, d]: joining the heads of a result copies nothing.
inline torch::stable::Tensor empty_heads(const torch::stable::Tensor& like, int64_t B, int64_t H, int64_t n, int64_t d,
                                         std::optional<torch::headeronly::ScalarType> type = std::nullopt) {
  return torch::stable::transpose(torch::stable::new_empty(like, {B, n, H, d}, type), 1, 2);
}

inline torch::stable::Tensor empty_heads(const torch::stable::Tensor& like) {
  return empty_heads(like, like.size(0), like.size(1), like.size(2), like.size(3));
}

// All of x that forward and backward have in common, but for the seed, which is where the device is.
inline void describe(AttentionArguments& x, const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                     const std::optional<torch::stable::Tensor>& bias, const std::optional<torch::stable::Tensor>& seed, double scale,
                     int64_t drop_below, int64_t cut_below, double rescale) {
  x.B = k.size(0), x.H = k.size(1), x.n = q.size(2), x.m = k.size(2), x.d = q.size(3);
  x.q = view(q), x.k = view(k), x.v = view(v);
  if (bias) x.bias = view(*bias);
  x.scale = scale, x.rescale = rescale;
  x.masked = seed && (drop_below > 0 || cut_below > 0);
  x.drop_below = static_cast<uint32_t>(drop_below), x.cut_below = static_cast<uint32_t>(cut_below);
}

// The backward's tasks, at most most_tasks where they add to what is shared, and most_entries of their sums (or one task's, where that is
// more): by the shapes alone.
inline void part_sums(AttentionArguments& x, const torch::stable::Tensor& q, const std::optional<torch::stable::Tensor>& bias,
                      bool bias_grad, int64_t most_tasks, int64_t most_entries) {
  const bool over_batch = bias_grad && bias->size(0) != x.B, over_heads = bias_grad && bias->size(1) != x.H;
  x.add_dq = q.size(0) != x.B, x.add_dbias = over_batch || over_heads, x.dbias_over_batch = over_batch;
  const int64_t entries = (x.add_dbias ? x.n * x.m : 0) + (x.add_dq ? x.n * x.d : 0);
  const int64_t tasks = std::max<int64_t>(1, std::min(most_tasks, most_entries / std::max<int64_t>(entries, 1)));
  const bool any_over_batch = x.add_dq || over_batch;
  x.h_parts = over_heads && (any_over_batch ? x.H : x.B * x.H) > tasks ? 1 : x.H;
  x.b_parts = any_over_batch ? std::min(x.B, std::max<int64_t>(1, tasks / x.h_parts)) : x.B;
}
