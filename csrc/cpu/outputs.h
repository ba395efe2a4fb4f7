// Fresh tensors for a kernel to write to.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstddef>
#include <cstdint>

// A contiguous, uninitialised tensor on the CPU. torch::stable::empty looks its op up by name and boxes its arguments at every call,
// which for a small problem takes longer than to solve it.
template <std::size_t dims>
torch::stable::Tensor empty(torch::headeronly::ScalarType dtype, const int64_t (&sizes)[dims]) {
  std::array<int64_t, dims> strides;
  int64_t stride = 1;
  for (std::size_t i = dims; i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));  // torch's own number of the dtype
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides.data(), code, aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}
