// The sinkhorn kernel for the compiler's baseline.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "sinkhorn_problem.h"

#define HELO_FAST_SET baseline
#define HELO_FAST_VECTOR_BYTES 16
#include "sinkhorn_solver.h"

const SinkhornKernels& sinkhorn_baseline() { return baseline::kernels; }
