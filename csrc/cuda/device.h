// What the kernels share: numbers and 16-byte vectors of them, launches, and sums over rows that
// are taken in two stages, without atomics. For tests they run on the CPU (tests/cuda/simt.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#ifdef SACL_EMULATED
#include "simt.h"
#else
#include <cuda_runtime.h>
#endif

#include "cuda/launchers.h"

namespace sacl::cuda {

constexpr int kThreads = 256;  // of a block, at most
constexpr int kGroups = 32;    // vectors of channels that a block takes, at most

// Numbers.

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

#ifndef SACL_EMULATED
__device__ inline float half_to_float(uint16_t bits) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(bits));
  return out;
}
// Two numbers in a word, the first one low; rounded to nearest even.
__device__ inline uint32_t two_halves(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ inline uint32_t two_bfloats(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
#endif

// How a type lies in words of 32 bits, of which it fills one or half of one.
template <class T>
struct Words;

template <>
struct Words<float> {
  static constexpr int kNumbers = 1;
  __device__ static void unpack(uint32_t word, float* out) { out[0] = __uint_as_float(word); }
  __device__ static uint32_t pack(const float* in) { return __float_as_uint(in[0]); }
};
template <>
struct Words<Half> {
  static constexpr int kNumbers = 2;
  __device__ static void unpack(uint32_t word, float* out) {
    out[0] = half_to_float(static_cast<uint16_t>(word));
    out[1] = half_to_float(static_cast<uint16_t>(word >> 16));
  }
  __device__ static uint32_t pack(const float* in) { return two_halves(in[0], in[1]); }
};
template <>
struct Words<BFloat> {
  static constexpr int kNumbers = 2;
  __device__ static void unpack(uint32_t word, float* out) {
    out[0] = __uint_as_float(word << 16);
    out[1] = __uint_as_float(word & 0xffff0000u);
  }
  __device__ static uint32_t pack(const float* in) { return two_bfloats(in[0], in[1]); }
};

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Half x) { return half_to_float(x.bits); }
__device__ inline float to_float(BFloat x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline Half from_float<Half>(float x) {
  return {static_cast<uint16_t>(two_halves(x, 0))};
}
template <>
__device__ inline BFloat from_float<BFloat>(float x) {
  return {static_cast<uint16_t>(two_bfloats(x, 0))};
}

// Vectors of V channels: as many as 16 bytes hold, or one.

template <class T>
constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

template <class T, int V>
struct Vec {
  static_assert(V == kLanes<T>);
  uint4 words;

  __device__ static Vec load(const T* from) {
    return {__ldg(reinterpret_cast<const uint4*>(from))};
  }
  __device__ static Vec load_shared(const T* from) {
    return {*reinterpret_cast<const uint4*>(from)};
  }
  __device__ static Vec zero() { return {uint4{0, 0, 0, 0}}; }

  __device__ void unpack(float (&out)[V]) const {
    constexpr int n = Words<T>::kNumbers;
    Words<T>::unpack(words.x, out);
    Words<T>::unpack(words.y, out + n);
    Words<T>::unpack(words.z, out + 2 * n);
    Words<T>::unpack(words.w, out + 3 * n);
  }
  __device__ static void store(T* to, const float (&in)[V]) {
    constexpr int n = Words<T>::kNumbers;
    *reinterpret_cast<uint4*>(to) = uint4{Words<T>::pack(in), Words<T>::pack(in + n),
                                          Words<T>::pack(in + 2 * n), Words<T>::pack(in + 3 * n)};
  }
};

__device__ inline float load_one(const float* from) { return __ldg(from); }
template <class T>
__device__ T load_one(const T* from) {
  return {__ldg(&from->bits)};
}

template <class T>
struct Vec<T, 1> {
  T number;

  __device__ static Vec load(const T* from) { return {load_one(from)}; }
  __device__ static Vec load_shared(const T* from) { return {*from}; }
  __device__ static Vec zero() { return {from_float<T>(0)}; }
  __device__ void unpack(float (&out)[1]) const { out[0] = to_float(number); }
  __device__ static void store(T* to, const float (&in)[1]) { *to = from_float<T>(in[0]); }
};

template <int V>
__device__ void clear(float (&values)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) values[v] = 0;
}

// Rows whose vectors a thread has under way at a time.
template <int V>
constexpr int kLoads = V == 1 ? 8 : 4;

// Launches.

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

#ifndef SACL_EMULATED
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, void* stream,
                   Arguments... arguments) {
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(arguments)...);
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// Of the current device; a guess where there is none, for the launch will then fail and say so.
inline int multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    return 1;
  }
  return count;
}
#endif

// Calls `f` with a null pointer to the type that `dtype` names.
template <class F>
const char* with_type(int dtype, const F& f) {
  switch (dtype) {
    case kFloat32: return f(static_cast<float*>(nullptr));
    case kFloat16: return f(static_cast<Half*>(nullptr));
    case kBFloat16: return f(static_cast<BFloat*>(nullptr));
    default: return "no such number type";
  }
}

// Blocks of (groups of V channels, rows, depth) threads over `channels` channels.
struct Tile {
  int groups, rows, slices;  // slices: blocks side by side

  Tile(int channels, int V, int depth = 1, int threads = kThreads) {
    const int all = ceil_div(channels, V);
    slices = ceil_div(all, std::min(kGroups, threads / depth));
    groups = ceil_div(all, slices);
    rows = threads / (groups * depth);
  }
};

// `items` rows cut into chunks, one a block, which goes through its own Tile::rows at a time.
struct Chunks {
  int64_t size;  // rows of a chunk
  int count;

  // per_processor: blocks that a multiprocessor is to have where there is work enough.
  Chunks(int64_t items, const Tile& tile, int per_processor) {
    const int64_t blocks = ceil_div(multiprocessors() * per_processor, tile.slices);
    size = ceil_div(ceil_div(items, blocks), static_cast<int64_t>(tile.rows)) * tile.rows;
    count = static_cast<int>(ceil_div(items, size));
  }
};

// Quotients of numbers below 2^31 by one that is fixed: a multiplication and a shift.
struct Divisor {
  uint32_t divisor, multiplier, shift;

  explicit Divisor(int of) : divisor(static_cast<uint32_t>(of)), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(
        ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }
  __device__ int quotient(int n) const {
    const uint32_t high = __umulhi(static_cast<uint32_t>(n), multiplier);
    return static_cast<int>((high + static_cast<uint32_t>(n)) >> shift);
  }
  // n / divisor; n becomes the remainder.
  __device__ int split(int& n) const {
    const int q = quotient(n);
    n -= q * static_cast<int>(divisor);
    return q;
  }
};

// Sums in two stages.

// Floats of shared memory that summing N numbers over a block's rows takes.
template <int N, int THREADS = kThreads>
constexpr int kSumBuffer = N * THREADS / 2;

// The N sums of each column of threads over the block's rows, in those of row 0: the lower half of
// the rows is added to the upper one until one is left. Called by all threads of the block.
template <int THREADS = kThreads, int N>
__device__ void sum_rows_of_block(float* buffer, float (&own)[N]) {
  const int row = threadIdx.y;
  for (int rows = blockDim.y; rows > 1;) {
    const int stay = (rows + 1) / 2, go = rows - stay;
    const int to = row < stay ? row : row - stay;
    float* slot = buffer + (threadIdx.z * go + to) * blockDim.x + threadIdx.x;
    if (row >= stay && row < rows) {
#pragma unroll
      for (int i = 0; i < N; ++i) slot[i * (THREADS / 2)] = own[i];
    }
    __syncthreads();
    if (row < go) {
#pragma unroll
      for (int i = 0; i < N; ++i) own[i] += slot[i * (THREADS / 2)];
    }
    __syncthreads();
    rows = stay;
  }
}

// The N sums of each column of (COLUMNS, ROWS) threads, in all of them: half of the rows is added
// to the other until one is left. Called by all threads of the block; ROWS is a power of two.
template <int COLUMNS, int ROWS, int N>
__device__ void sum_columns_of_block(double (&own)[N]) {
  __shared__ double sums[N][ROWS][COLUMNS];
  const int x = threadIdx.x, y = threadIdx.y;
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i][y][x] = own[i];
  for (int rows = ROWS / 2; rows > 0; rows /= 2) {
    __syncthreads();
    if (y >= rows) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i][y][x] += sums[i][y + rows][x];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) own[i] = sums[i][0][x];
  __syncthreads();
}

constexpr int kColumns = 32, kColumnRows = 16;  // threads of a block that sums up columns

// The sum of column blockIdx.x * kColumns + threadIdx.x of `partial` (count, columns), whose rows
// are `stride` apart. Called by all threads of the block.
__device__ inline double sum_of_column(const float* partial, int count, int64_t stride, int column,
                                       bool inside) {
  double sum[1] = {0};
  if (inside) {
#pragma unroll 4
    for (int row = threadIdx.y; row < count; row += kColumnRows)
      sum[0] += partial[row * stride + column];
  }
  sum_columns_of_block<kColumns, kColumnRows>(sum);
  return sum[0];
}

}  // namespace sacl::cuda
