#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define SACL_KERNELS kernels_avx2
#include "cpu/simd.inl"
#endif
