// Fresh tensors for a kernel to write to.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace helo_fast {

// What an op returns for a tensor that it made: torch passes on any eight bytes as they are. (Of a type without a namespace it does not
// know which of its conversions is meant.)
struct Handle {
  AtenTensorHandle owned;
};

}  // namespace helo_fast

// A contiguous, uninitialised tensor on the CPU that an op makes and returns, by release(). The usual ways take longer than to solve a
// small problem: torch::stable::empty looks its op up by name and boxes its arguments at every call, and a torch::stable::Tensor
// shares its handle, for another allocation, and is copied to be returned, for a third.
class Output {
 public:
  template <std::size_t dims>
  Output(torch::headeronly::ScalarType dtype, const int64_t (&sizes)[dims]) {
    std::array<int64_t, dims> strides;
    int64_t stride = 1;
    for (std::size_t i = dims; i-- > 0; stride *= sizes[i] > 1 ? sizes[i] : 1) strides[i] = stride;
    const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));  // torch's own number of the dtype
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides.data(), code, aoti_torch_device_type_cpu(), 0, &handle));
    handle_.reset(handle);
  }

  template <typename scalar>
  scalar* data() const {
    void* data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle_.get(), &data));
    return static_cast<scalar*>(data);
  }

  helo_fast::Handle release() { return {handle_.release()}; }  // to who owns it from now on

 private:
  struct Delete {
    void operator()(AtenTensorHandle handle) const { aoti_torch_delete_tensor_object(handle); }
  };
  std::unique_ptr<AtenTensorOpaque, Delete> handle_;
};

template <std::size_t dims>
torch::stable::Tensor empty(torch::headeronly::ScalarType dtype, const int64_t (&sizes)[dims]) {
  return torch::stable::Tensor(Output(dtype, sizes).release().owned);
}
