// What every CUDA launcher needs: the current stream of torch, shared memory, a grid, and a launch check.
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

// Of a call that only sets up or asks; its error is taken back, or the next launch would be blamed for it.
inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": cannot be launched: ", cudaGetErrorString(error));
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": launch failed: ", cudaGetErrorString(error));
}

// Dynamic shared memory beyond the 48 KB that every launch may have: as much as the device gives, the same at every call, so that calls
// from several threads do not take it from each other.
template <typename Kernel>
void allow_shared(Kernel* kernel, const char* name, int64_t bytes, int32_t device_index) {
  int most = 0;
  cudaFuncAttributes attributes{};
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_index), name);
  check(cudaFuncGetAttributes(&attributes, kernel), name);
  most -= static_cast<int>(attributes.sharedSizeBytes);
  STD_TORCH_CHECK(bytes <= most, name, ": a block takes ", bytes, " bytes of shared memory, of which this device has ", most);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
}

// A problem a block, up to the largest grid: blocks that end early make room.
inline unsigned blocks_for(int64_t batch, int64_t most = INT32_MAX) { return static_cast<unsigned>(batch < most ? batch : most); }

// Where all problems take the same time: no more blocks than find room at once, each of which takes several problems.
template <typename Kernel>
unsigned resident_blocks_for(Kernel* kernel, const char* name, int threads, int64_t bytes, int64_t batch, int32_t device_index) {
  int room = 0, multiprocessors = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&room, kernel, threads, static_cast<size_t>(bytes)), name);
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device_index), name);
  STD_TORCH_CHECK(room > 0, name, ": no block finds room on a multiprocessor");
  return blocks_for(batch, int64_t(multiprocessors) * room);
}

}  // namespace helo_fast
