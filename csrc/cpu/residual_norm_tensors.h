// The torch side of residual_norm that whoever runs its kernel shares: tensors as the kernel sees them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "residual_norm_problem.h"
#include "tensors.h"

// Rows, however many dimensions they stand in.
inline View rows(const torch::stable::Tensor& t, int64_t width) {
  return {static_cast<unsigned char*>(const_cast<void*>(t.const_data_ptr())), storage(t), 0, 0, width, 1};
}

inline ResidualNormArguments norm_arguments(const torch::stable::Tensor& x, const torch::stable::Tensor& y,
                                            const torch::stable::Tensor& weight, const std::optional<torch::stable::Tensor>& seed,
                                            int64_t cut_below, double rescale) {
  ResidualNormArguments a{};
  a.width = weight.size(0), a.rows = x.numel() / a.width;
  a.x = rows(x, a.width), a.y = rows(y, a.width), a.weight = rows(weight, a.width);
  a.masked = seed && cut_below > 0;
  if (a.masked) a.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  a.cut_below = static_cast<uint32_t>(cut_below), a.rescale = rescale;
  return a;
}
