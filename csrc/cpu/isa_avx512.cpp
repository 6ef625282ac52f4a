#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define SACL_KERNELS kernels_avx512
#include "cpu/simd.inl"
#endif
