#include "cpu/kernels.h"

namespace sacl {

const Kernels& kernels() {
#if defined(__x86_64__)
  static const Kernels& best =
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") ? kernels_avx512
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")        ? kernels_avx2
                                                                               : kernels_baseline;
  return best;
#else
  return kernels_baseline;
#endif
}

}  // namespace sacl
