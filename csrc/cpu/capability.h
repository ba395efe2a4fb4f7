// Which instruction set the CPU kernels run with: the best that the processor has, or what HELO_FAST_CPU_CAPABILITY names.
#pragma once

enum class Capability { baseline, avx2, avx512 };

// Throws where HELO_FAST_CPU_CAPABILITY names none, or one that this processor lacks. Decided once.
Capability capability();

const char* capability_name(Capability);
