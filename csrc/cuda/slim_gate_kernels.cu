// Sums of two slim activations and their products with a gate, each in one pass in NHWC memory.
//
// With index lists a thread takes one channel of some rows, looks up once where it comes from, and
// neighbouring threads read neighbouring channels; without them it takes 16 bytes of channels.
#include "cuda/device.h"

namespace sacl::cuda {
namespace {

constexpr int kPerProcessor = 8;

struct Rows {
  int64_t M, chunk;

  __device__ int64_t first() const { return blockIdx.x * chunk + threadIdx.y; }
  __device__ int64_t stop() const { return min(M, (blockIdx.x + 1) * chunk); }
};

// Where V channels of one operand come from.
template <class T, int V>
struct Column {
  const T* values;  // of row 0; null: the constant
  int live;
  float constant;

  __device__ Column(const Operand& operand, int channel) : live(operand.live), constant(0) {
    const T* all = static_cast<const T*>(operand.values);
    values = all + channel;
    if (V > 1 || !operand.source) return;
    const int64_t from = operand.source[channel];
    if (from < 0 || from >= operand.live + operand.constant) __trap();
    values = from < operand.live ? all + from : nullptr;
    if (!values)
      constant = to_float(static_cast<const T*>(operand.constants)[from - operand.live]);
  }
  __device__ void read(int64_t row, float (&out)[V]) const {
    if (V > 1 || values)
      Vec<T, V>::load(values + row * live).unpack(out);
    else
      out[0] = constant;
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) add(Rows rows, int U, Operand a, Operand b, T* y) {
  const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  if (channel >= U) return;
  const Column<T, V> left(a, channel), right(b, channel);
#pragma unroll 4
  for (int64_t row = rows.first(); row < rows.stop(); row += blockDim.y) {
    float sum[V], other[V];
    left.read(row, sum);
    right.read(row, other);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += other[v];
    Vec<T, V>::store(y + row * U + channel, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    select(Rows rows, int C_in, int C_out, const T* in, const int64_t* source, T* out) {
  const int channel = blockIdx.y * blockDim.x + threadIdx.x;
  if (channel >= C_out) return;
  const int64_t from = source[channel];
#pragma unroll 4
  for (int64_t row = rows.first(); row < rows.stop(); row += blockDim.y)
    out[row * C_out + channel] = from < 0 ? from_float<T>(0) : load_one(in + row * C_in + from);
}

// The gate's factor for channel `c` of the K + R.
__device__ inline int64_t factor_of(const GateShape& s, const int64_t* index,
                                    const int64_t* map_index, int c) {
  const int64_t factor = c < s.K ? (index ? index[c] : c) : map_index[c - s.K];
  if (factor < 0 || factor >= s.C) __trap();
  return factor;
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    multiply(Rows rows, GateShape s, Divisor image, const T* x, const T* map, const T* gate,
             const int64_t* index, const int64_t* map_index, T* y) {
  const int all = s.K + s.R, channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  if (channel >= all) return;
  const int64_t factor = V > 1 ? channel : factor_of(s, index, map_index, channel);
#pragma unroll 4
  for (int64_t row = rows.first(); row < rows.stop(); row += blockDim.y) {
    int place = static_cast<int>(row);
    const int64_t n = image.split(place);
    const T* in = channel < s.K ? x + row * s.K + channel
                                : map + static_cast<int64_t>(place) * s.R + channel - s.K;
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
                      const int64_t* index, const int64_t* map_index, T* dx, T* dgate) {
  __shared__ float buffer[kSumBuffer<V>];
  const int all = s.K + s.R, channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  const int64_t n = blockIdx.x;
  float sums[V], own[V];
  clear(sums);
  const bool inside = channel < all;
  int64_t factor = channel;
  if (inside) {
    if (V == 1) factor = factor_of(s, index, map_index, channel);
    Vec<T, V>::load(gate + n * s.C + factor).unpack(own);
  }
  const int stop = inside ? s.HW : 0;
#pragma unroll 4
  for (int place = threadIdx.y; place < stop; place += blockDim.y) {
    const int64_t row = n * s.HW + place;
    const T* in = channel < s.K ? x + row * s.K + channel
                                : map + static_cast<int64_t>(place) * s.R + channel - s.K;
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
  for (int64_t place = rows.first(); place < rows.stop(); place += blockDim.y) {
    float sum = 0;
#pragma unroll 4
    for (int64_t n = 0; n < s.N; ++n)
      sum += to_float(load_one(dy + (n * s.HW + place) * all + s.K + channel)) *
             to_float(load_one(gate + n * s.C + factor));
    dmap[place * s.R + channel] = from_float<T>(sum);
  }
}

template <class T>
__global__ void fill_zero(T* values, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) values[i] = from_float<T>(0);
}

// Launches.

// Blocks over M rows of `channels`.
struct How {
  Tile tile;
  Deal deal;
  int64_t M;

  How(int64_t M, int channels, int V)
      : tile(channels, V), deal(M, tile, kPerProcessor), M(M) {}

  Rows rows() const { return {M, deal.chunk}; }
  dim3 grid() const { return dim3(deal.chunks, tile.slices); }
  dim3 block() const { return dim3(tile.groups, tile.rows); }
};

template <class T, int V>
const char* launch_add(int64_t M, int U, const Operand& a, const Operand& b, T* y, void* stream) {
  const How how(M, U, V);
  return launch(&add<T, V>, how.grid(), how.block(), stream, how.rows(), U, a, b, y);
}

template <class T, int V>
const char* launch_gate(const GateShape& s, const T* x, const T* map, const T* gate,
                        const int64_t* index, const int64_t* map_index, T* y, void* stream) {
  const How how(static_cast<int64_t>(s.N) * s.HW, s.K + s.R, V);
  return launch(&multiply<T, V>, how.grid(), how.block(), stream, how.rows(), s, Divisor(s.HW), x,
                map, gate, index, map_index, y);
}

template <class T, int V>
const char* launch_gate_backward(const GateShape& s, const T* dy, const T* x, const T* map,
                                 const T* gate, const int64_t* index, const int64_t* map_index,
                                 T* dx, T* dgate, void* stream) {
  const Tile tile(s.K + s.R, V);
  return launch(&multiply_backward<T, V>, dim3(s.N, tile.slices), dim3(tile.groups, tile.rows),
                stream, s, dy, x, map, gate, index, map_index, dx, dgate);
}

template <class T>
bool vectors_fit(const GateShape& s, const int64_t* index, const void* a, const void* b,
                 const void* c, const void* d) {
  return !index && !s.R && s.K % kLanes<T> == 0 && aligned(a) && aligned(b) && aligned(c) &&
         aligned(d);
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

const char* sacl_cuda_add(int dtype, int64_t M, int U, Operand a, Operand b, void* y,
                          void* stream) {
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool vectors = !a.source && !b.source && U % kLanes<T> == 0 && aligned(a.values) &&
                         aligned(b.values) && aligned(y);
    const auto run = vectors ? &launch_add<T, kLanes<T>> : &launch_add<T, 1>;
    return run(M, U, a, b, static_cast<T*>(y), stream);
  });
}

const char* sacl_cuda_select(int dtype, int64_t M, int C_in, int C_out, const void* in,
                             const int64_t* source, void* out, void* stream) {
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const How how(M, C_out, 1);
    return launch(&select<T>, how.grid(), how.block(), stream, how.rows(), C_in, C_out,
                  static_cast<const T*>(in), source, static_cast<T*>(out));
  });
}

const char* sacl_cuda_gate(GateShape shape, const void* x, const void* map, const void* gate,
                           const int64_t* index, const int64_t* map_index, void* y, void* stream) {
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool vectors = shape.K == shape.C && vectors_fit<T>(shape, index, x, gate, y, nullptr);
    const auto run = vectors ? &launch_gate<T, kLanes<T>> : &launch_gate<T, 1>;
    return run(shape, static_cast<const T*>(x), static_cast<const T*>(map),
               static_cast<const T*>(gate), index, map_index, static_cast<T*>(y), stream);
  });
}

const char* sacl_cuda_gate_backward(GateShape shape, const void* dy, const void* x, const void* map,
                                    const void* gate, const int64_t* index,
                                    const int64_t* map_index, void* dx, void* dmap, void* dgate,
                                    void* stream) {
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
    const bool vectors = shape.K == shape.C && aligned(dgate) &&
                         vectors_fit<T>(shape, index, dy, x, gate, dx);
    const auto run = vectors ? &launch_gate_backward<T, kLanes<T>> : &launch_gate_backward<T, 1>;
    const char* failure = run(shape, static_cast<const T*>(dy), static_cast<const T*>(x),
                              static_cast<const T*>(map), static_cast<const T*>(gate), index,
                              map_index, static_cast<T*>(dx), static_cast<T*>(dgate), stream);
    if (failure || !shape.R) return failure;
    const How how(shape.HW, shape.R, 1);
    return launch(&map_backward<T>, how.grid(), how.block(), stream, how.rows(), shape,
                  static_cast<const T*>(dy), static_cast<const T*>(gate), map_index,
                  static_cast<T*>(dmap));
  });
}
}
