#include "capability.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace {

Capability best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  return avx512 ? Capability::avx512 : avx2 ? Capability::avx2 : Capability::baseline;
#else
  return Capability::baseline;
#endif
}

Capability decide() {
  const char* wish = std::getenv("HELO_FAST_CPU_CAPABILITY");
  if (wish == nullptr || *wish == '\0') return best();
  for (Capability each : {Capability::baseline, Capability::avx2, Capability::avx512})
    if (std::string(wish) == capability_name(each)) {
      STD_TORCH_CHECK(each <= best(), "HELO_FAST_CPU_CAPABILITY=", wish, ": this processor has at most ", capability_name(best()));
      return each;
    }
  STD_TORCH_CHECK(false, "HELO_FAST_CPU_CAPABILITY=", wish, ": choose baseline, avx2 or avx512");
}

}  // namespace

Capability capability() {
  static const Capability decided = decide();
  return decided;
}

const char* capability_name(Capability which) {
  return which == Capability::avx512 ? "avx512" : which == Capability::avx2 ? "avx2" : "baseline";
}
