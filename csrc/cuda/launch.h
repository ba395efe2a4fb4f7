// What every CUDA launcher needs: the current stream of torch, a grid, and a launch check.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

// Lives in the CUDA build of torch. Weak, so that this library links and loads beside a CPU build too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace helo_fast {

inline cudaStream_t current_stream(int32_t device_index) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "helo_fast._C_cuda needs a CUDA build of torch");
  void* stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(device_index, &stream);  // 0: it worked, in every version
  STD_TORCH_CHECK(error == 0, "cannot read torch's current stream on device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": launch failed: ", cudaGetErrorString(error));
}

// A problem a block, up to the largest grid: blocks that end early make room.
inline unsigned blocks_for(int64_t batch, int64_t most = INT32_MAX) { return static_cast<unsigned>(batch < most ? batch : most); }

// Where all problems take the same time: no more blocks than find room at once, each of which takes several problems.
inline unsigned resident_blocks_for(int64_t batch, int per_multiprocessor, int32_t device_index) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_index);
  STD_TORCH_CHECK(error == cudaSuccess, "cannot read the device's size: ", cudaGetErrorString(error));
  return blocks_for(batch, int64_t(count) * per_multiprocessor);
}

}  // namespace helo_fast
