// A slim activation times a gate, in one pass in NHWC memory. Which thread takes which channels is
// as in slim_add_kernels.cu.
#include "cuda/rows.h"

namespace sacl::cuda {
namespace {

// The gate's factor for channel `c` of the K + R.
__device__ inline int64_t factor_of(const GateShape& s, const int64_t* x_index,
                                    const int64_t* map_index, int c) {
  const int64_t factor = c < s.K ? (x_index ? x_index[c] : c) : map_index[c - s.K];
  if (factor < 0 || factor >= s.C) __trap();
  return factor;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    multiply(Rows rows, GateShape s, Divisor image, const T* x, const T* map, const T* gate,
             const int64_t* x_index, const int64_t* map_index, T* y) {
  const int all = s.K + s.R, channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  if (channel >= all) return;
  const int64_t factor = V > 1 ? channel : factor_of(s, x_index, map_index, channel);
#pragma unroll 4
  for (int64_t row = rows.first(); row < rows.stop(); row += blockDim.y) {
    int pixel = static_cast<int>(row);
    const int64_t n = image.split(pixel);
    const T* in = channel < s.K ? x + row * s.K + channel
                                : map + static_cast<int64_t>(pixel) * s.R + channel - s.K;
    float value[V], own[V];
    Vec<T, V>::load(in).unpack(value);
    Vec<T, V>::load(gate + n * s.C + factor).unpack(own);
#pragma unroll
    for (int v = 0; v < V; ++v) value[v] *= own[v];
    Vec<T, V>::store(y + row * all + channel, value);
  }
}

// dx, and the products of dy with what was multiplied, summed over the image blockIdx.x.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    multiply_backward(GateShape s, const T* dy, const T* x, const T* map, const T* gate,
                      const int64_t* x_index, const int64_t* map_index, T* dx, T* dgate) {
  __shared__ float buffer[kSumBuffer<V>];
  const int all = s.K + s.R, channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  const int64_t n = blockIdx.x;
  float sums[V], own[V];
  clear(sums);
  const bool inside = channel < all;
  int64_t factor = channel;
  if (inside) {
    if (V == 1) factor = factor_of(s, x_index, map_index, channel);
    Vec<T, V>::load(gate + n * s.C + factor).unpack(own);
  }
  const int stop = inside ? s.HW : 0;
#pragma unroll 4
  for (int pixel = threadIdx.y; pixel < stop; pixel += blockDim.y) {
    const int64_t row = n * s.HW + pixel;
    const T* in = channel < s.K ? x + row * s.K + channel
                                : map + static_cast<int64_t>(pixel) * s.R + channel - s.K;
    float gradient[V], value[V];
    Vec<T, V>::load(dy + row * all + channel).unpack(gradient);
    Vec<T, V>::load(in).unpack(value);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sums[v] += gradient[v] * value[v];
      gradient[v] *= own[v];
    }
    if (channel < s.K) Vec<T, V>::store(dx + row * s.K + channel, gradient);
  }
  sum_rows_of_block(buffer, sums);
  if (threadIdx.y == 0 && inside) Vec<T, V>::store(dgate + n * s.C + factor, sums);
}

// dmap (HW, R): the sum over samples.
template <class T>
__global__ void __launch_bounds__(kThreads)
    map_backward(Rows rows, GateShape s, const T* dy, const T* gate, const int64_t* map_index,
                 T* dmap) {
  const int all = s.K + s.R, channel = blockIdx.y * blockDim.x + threadIdx.x;
  if (channel >= s.R) return;
  const int64_t factor = factor_of(s, nullptr, map_index, s.K + channel);
  for (int64_t pixel = rows.first(); pixel < rows.stop(); pixel += blockDim.y) {
    float sum = 0;
#pragma unroll 4
    for (int64_t n = 0; n < s.N; ++n)
      sum += to_float(load_one(dy + (n * s.HW + pixel) * all + s.K + channel)) *
             to_float(load_one(gate + n * s.C + factor));
    dmap[pixel * s.R + channel] = from_float<T>(sum);
  }
}

template <class T>
__global__ void fill_zero(T* values, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) values[i] = from_float<T>(0);
}

// Launches.

template <class T, int V>
const char* launch_gate(const GateShape& s, const T* x, const T* map, const T* gate,
                        const int64_t* x_index, const int64_t* map_index, T* y, void* stream) {
  const RowLaunch over(static_cast<int64_t>(s.N) * s.HW, s.K + s.R, V);
  return launch(&multiply<T, V>, over.grid(), over.block(), stream, over.rows(), s, Divisor(s.HW),
                x, map, gate, x_index, map_index, y);
}

template <class T, int V>
const char* launch_gate_backward(const GateShape& s, const T* dy, const T* x, const T* map,
                                 const T* gate, const int64_t* x_index, const int64_t* map_index,
                                 T* dx, T* dgate, void* stream) {
  const Tile tile(s.K + s.R, V);
  return launch(&multiply_backward<T, V>, dim3(s.N, tile.slices), dim3(tile.groups, tile.rows),
                stream, s, dy, x, map, gate, x_index, map_index, dx, dgate);
}

template <class T>
bool vectors_fit(const GateShape& s, const int64_t* x_index, const void* a, const void* b,
                 const void* c, const void* d) {
  return !x_index && !s.R && s.K % kLanes<T> == 0 && aligned(a) && aligned(b) && aligned(c) &&
         aligned(d);
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

const char* sacl_cuda_slim_gate(GateShape shape, const void* x, const void* map, const void* gate,
                                const int64_t* x_index, const int64_t* map_index, void* y,
                                void* stream) {
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool vectors = shape.K == shape.C && vectors_fit<T>(shape, x_index, x, gate, y, nullptr);
    const auto run = vectors ? &launch_gate<T, kLanes<T>> : &launch_gate<T, 1>;
    return run(shape, static_cast<const T*>(x), static_cast<const T*>(map),
               static_cast<const T*>(gate), x_index, map_index, static_cast<T*>(y), stream);
  });
}

const char* sacl_cuda_slim_gate_backward(GateShape shape, const void* dy, const void* x,
                                         const void* map, const void* gate, const int64_t* x_index,
                                         const int64_t* map_index, void* dx, void* dmap,
                                         void* dgate, void* stream) {
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t factors = static_cast<int64_t>(shape.N) * shape.C;
    if (shape.K + shape.R < shape.C) {  // factors that no channel was multiplied by
      const dim3 blocks(static_cast<unsigned>(ceil_div<int64_t>(factors, kThreads)));
      if (const char* failure = launch(&fill_zero<T>, blocks, dim3(kThreads), stream,
                                       static_cast<T*>(dgate), factors)) {
        return failure;
      }
    }
    const bool vectors =
        shape.K == shape.C && aligned(dgate) && vectors_fit<T>(shape, x_index, dy, x, gate, dx);
    const auto run = vectors ? &launch_gate_backward<T, kLanes<T>> : &launch_gate_backward<T, 1>;
    const char* failure = run(shape, static_cast<const T*>(dy), static_cast<const T*>(x),
                              static_cast<const T*>(map), static_cast<const T*>(gate), x_index,
                              map_index, static_cast<T*>(dx), static_cast<T*>(dgate), stream);
    if (failure || !shape.R) return failure;
    const RowLaunch over(shape.HW, shape.R, 1);
    return launch(&map_backward<T>, over.grid(), over.block(), stream, over.rows(), shape,
                  static_cast<const T*>(dy), static_cast<const T*>(gate), map_index,
                  static_cast<T*>(dmap));
  });
}
}
