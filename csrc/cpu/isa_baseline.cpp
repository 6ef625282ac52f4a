#define SACL_KERNELS kernels_baseline
#include "cpu/simd.inl"
