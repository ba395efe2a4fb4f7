// Which instruction set the CPU kernels run with: the best that the processor has, or what HELO_FAST_CPU_CAPABILITY names.
#pragma once

enum class Capability { baseline, avx2, avx512 };

// Throws where HELO_FAST_CPU_CAPABILITY names none, or one that this processor lacks. Decided once.
Capability capability();

const char* capability_name(Capability);

// The kernels to run, out of those of the three namespaces that each_set.h makes.
template <typename Kernels>
const Kernels& pick(const Kernels& baseline, const Kernels& avx2, const Kernels& avx512) {
  switch (capability()) {
    case Capability::avx512: return avx512;
    case Capability::avx2: return avx2;
    default: return baseline;
  }
}
