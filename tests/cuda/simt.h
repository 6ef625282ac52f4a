// CUDA's words for a C++ compiler: the kernels of csrc/cuda run on the CPU, block after block, the
// threads of a block as fibers that take turns at barriers. It shows that their arithmetic, their
// indices and their barriers are right; it says nothing of speed, or of what hardware does in
// parallel without a barrier.
//
// - A barrier that only some threads of a block reach is an error.
// - Threads may take turns in reverse (sacl_simt_reverse): a result that depends on it misses one.
// - Memory from sacl_simt_allocate lies before a page that is not there and is filled with NaN, so
//   reading or writing beyond it is an error, and what no thread wrote shows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __shared__ static
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

void __syncthreads();
[[noreturn]] void __trap();

using std::max;
using std::min;

template <class T>
T __ldg(const T* from) {
  return *from;
}
inline float __uint_as_float(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selectors) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(bytes >> 8 * (selectors >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }

namespace sacl::cuda {

inline float half_to_float(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
}
inline uint32_t half_bits(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}
inline uint32_t bfloat_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline uint32_t two_halves(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline uint32_t two_bfloats(float low, float high) {
  return bfloat_bits(low) | bfloat_bits(high) << 16;
}

// Runs `thread` for each thread of the grid; null, or what went wrong.
const char* run_grid(dim3 grid, dim3 block, const std::function<void()>& thread);

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void*,
                   Arguments... arguments) {
  return run_grid(grid, block, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

inline int multiprocessors() { return 3; }

}  // namespace sacl::cuda
