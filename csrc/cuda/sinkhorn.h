// The launches of Sinkhorn's kernels, on the current stream of a device; a batch of at least one problem.
#pragma once

#include <cstdint>

#include "common/sinkhorn_batch.h"

namespace helo_fast {

// False, and nothing is launched, where a problem is too large for registers.
bool launch_in_registers(const SinkhornBatch<float>& x, int32_t device_index);
bool launch_in_registers(const SinkhornBatch<double>& x, int32_t device_index);

// Of any size; scratch [B, n + m] in float64.
void launch_streaming(const SinkhornBatch<float>& x, double* scratch, int32_t device_index);
void launch_streaming(const SinkhornBatch<double>& x, double* scratch, int32_t device_index);

}  // namespace helo_fast
