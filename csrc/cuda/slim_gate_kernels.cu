// A slim activation times a gate, in one pass in NHWC memory.
//
// A thread takes V channels of x or of the map. They are 16 bytes where both K and R suit, index
// lists or not: those say which of the gate's channels to read, which is done once a sample.
#include <algorithm>
#include <initializer_list>

#include "cuda/values.h"

namespace sacl::cuda {
namespace {

// The K + R channels: x (N, HW, K), formed by a Value, and map (HW, R), which is taken as it is.
template <class T>
struct Gated {
  GateShape s;
  const T *x, *map, *gate;
  const int64_t *x_index, *map_index;
  ValueArguments of_x;
  bool side_by_side;  // the factors of 16 bytes of channels are 16 bytes of the gate

  __device__ const T* at(int row, int pixel, int channel) const {
    return channel < s.K ? x + static_cast<int64_t>(row) * s.K + channel
                         : map + static_cast<int64_t>(pixel) * s.R + channel - s.K;
  }
  template <template <int> class Value, int V>
  __device__ Value<V> value_of(int channel) const {
    return Value<V>(channel < s.K ? of_x : ValueArguments{nullptr, kNone}, s.K, channel);
  }
  // The gate's channel by which `channel` is multiplied.
  __device__ int factor_of(int channel) const {
    const int64_t factor = channel >= s.K ? map_index[channel - s.K]
                           : x_index      ? x_index[channel]
                                          : channel;
    if (factor < 0 || factor >= s.C) __trap();
    return static_cast<int>(factor);
  }
};

// The factors of V channels for one sample.
template <class T, int V>
struct Factors {
  const T* gate;
  int C;
  bool side_by_side;
  int channel[V];  // of the gate
  int sample = -1;
  float own[V];

  __device__ Factors(const Gated<T>& in, int first)
      : gate(in.gate), C(in.s.C), side_by_side(in.side_by_side) {
#pragma unroll
    for (int v = 0; v < V; ++v) channel[v] = in.factor_of(first + v);
  }
  __device__ void move_to(int n) {
    if (n == sample) return;
    sample = n;
    if (V > 1 && side_by_side)
      Vec<T, V>::load(of(n) + channel[0]).unpack(own);
    else
      load(n);
  }
  __device__ void load(int n) {
#pragma unroll
    for (int v = 0; v < V; ++v) own[v] = to_float(load_one(of(n) + channel[v]));
  }
  __device__ void apply(float (&values)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] *= own[v];
  }

 private:
  __device__ const T* of(int n) const { return gate + static_cast<int64_t>(n) * C; }
};

template <class T, int V, template <int> class Value>
__global__ void __launch_bounds__(kThreads, 2)
    multiply(ChannelRows rows, Divisor image, Gated<T> in, T* y) {
  const int channel = first_channel(V);
  if (channel >= rows.K) return;
  const auto value = in.template value_of<Value, V>(channel);
  Factors<T, V> factors(in, channel);
  const auto at = [&](int, int row) {
    int pixel = row;
    image.split(pixel);
    return in.at(row, pixel, channel);
  };
  const auto use = [&](int row, const float (&loaded)[1][V]) {
    float out[V];
    value(loaded, out);
    factors.move_to(image.quotient(row));
    factors.apply(out);
    Vec<T, V>::store(y + static_cast<int64_t>(row) * rows.K + channel, out);
  };
  for_rows_at<T, V, 1>(rows, true, at, use);
}

// The products of dy with what was multiplied, summed over the image blockIdx.x, whose rows these
// are, and dx, where it is not null.
template <class T, int V, template <int> class Value, class Out>
__global__ void __launch_bounds__(kThreads)
    multiply_backward(ChannelRows rows, Gated<T> in, const T* dy, T* dx, Out* dgate) {
  __shared__ float buffer[kSumBuffer<V>];
  const int channel = first_channel(V);
  const bool inside = channel < rows.K;
  float sums[V];
  clear(sums);
  if (inside) {
    const auto value = in.template value_of<Value, V>(channel);
    Factors<T, V> factors(in, channel);
    const bool writes = dx && channel < in.s.K;
    if (writes) factors.move_to(blockIdx.x);
    const int first = static_cast<int>(rows.first());
    const auto at = [&](int k, int row) {
      return k == 0 ? dy + static_cast<int64_t>(row) * rows.K + channel
                    : in.at(row, row - first, channel);
    };
    const auto use = [&](int row, const float (&loaded)[2][V]) {
      float gradient[V], given[1][V], out[V];
#pragma unroll
      for (int v = 0; v < V; ++v) gradient[v] = loaded[0][v], given[0][v] = loaded[1][v];
      value(given, out);
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += gradient[v] * out[v];
      if (!writes) return;
      factors.apply(gradient);
      Vec<T, V>::store(dx + static_cast<int64_t>(row) * in.s.K + channel, gradient);
    };
    for_rows_at<T, V, 2>(rows, false, at, use);
  }
  sum_rows_of_block(buffer, sums);
  if (threadIdx.y != 0 || !inside) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    dgate[static_cast<int64_t>(blockIdx.x) * in.s.C + in.factor_of(channel + v)] =
        from_float<Out>(sums[v]);
  }
}

// dmap (HW, R): the sum over the samples, which the rows of a block share; its depth is pixels.
template <class T, int V>
__global__ void __launch_bounds__(kThreads) map_backward(Gated<T> in, const T* dy, T* dmap) {
  __shared__ float buffer[kSumBuffer<V>];
  const GateShape& s = in.s;
  const int channel = first_channel(V), pixel = blockIdx.x * blockDim.z + threadIdx.z;
  const bool inside = channel < s.R && pixel < s.HW;
  float sums[V];
  clear(sums);
  if (inside) {
    Factors<T, V> factors(in, s.K + channel);
#pragma unroll 4
    for (int n = threadIdx.y; n < s.N; n += blockDim.y) {
      const int64_t row = static_cast<int64_t>(n) * s.HW + pixel;
      float gradient[V];
      Vec<T, V>::load(dy + row * (s.K + s.R) + s.K + channel).unpack(gradient);
      factors.load(n);
      factors.apply(gradient);
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += gradient[v];
    }
  }
  sum_rows_of_block(buffer, sums);
  if (threadIdx.y == 0 && inside)
    Vec<T, V>::store(dmap + static_cast<int64_t>(pixel) * s.R + channel, sums);
}

template <class T>
__global__ void fill_zero(T* values, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) values[i] = from_float<T>(0);
}

// Launches.

// Without `affine`, x is taken as it is.
template <class T>
Gated<T> gated(const GateShape& s, const void* x, const float* affine, int act, const void* map,
               const void* gate, const int64_t* x_index, const int64_t* map_index) {
  const bool side_by_side = !x_index && !s.R && s.C % kLanes<T> == 0 && aligned(gate);
  return {s,
          static_cast<const T*>(x),
          static_cast<const T*>(map),
          static_cast<const T*>(gate),
          x_index,
          map_index,
          {affine, act},
          side_by_side};
}

// Whether vectors fit the channels and these images.
template <class T>
bool vectors_fit(const Gated<T>& in, std::initializer_list<const void*> images) {
  return in.s.K % kLanes<T> == 0 && in.s.R % kLanes<T> == 0 && aligned(in.x) && aligned(in.map) &&
         std::all_of(images.begin(), images.end(), aligned);
}

int64_t rows_of(const GateShape& s) { return static_cast<int64_t>(s.N) * s.HW; }

template <class T, int V>
const char* launch_gate(const Gated<T>& in, T* y, void* stream) {
  const RowBlocks blocks(rows_of(in.s), in.s.K + in.s.R, V);
  const auto kernel = in.of_x.rows ? &multiply<T, V, Activated> : &multiply<T, V, Itself>;
  return launch(kernel, blocks.grid(blocks.images), blocks.block(), stream,
                blocks.rows(blocks.images), Divisor(in.s.HW), in, y);
}

template <class T, int V, template <int> class Value, class Out>
const char* launch_gate_backward(const Gated<T>& in, const T* dy, T* dx, T* dmap, Out* dgate,
                                 void* stream) {
  const GateShape& s = in.s;
  const int all = s.K + s.R;
  const Tile tile(all, V);
  const char* failure = launch(&multiply_backward<T, V, Value, Out>, dim3(s.N, tile.slices),
                               dim3(tile.groups, tile.rows), stream,
                               ChannelRows{rows_of(s), s.HW, all}, in, dy, dx, dgate);
  if (failure || !s.R) return failure;
  constexpr int kSamples = 32;  // that a thread sums up, where there are pixels enough
  constexpr int kDeepest = 64;  // a block, by CUDA's limit
  const int pixels =
      std::clamp(Tile(s.R, V).rows / ceil_div(s.N, kSamples), 1, std::min(s.HW, kDeepest));
  const Tile of_map(s.R, V, pixels);
  return launch(&map_backward<T, V>, dim3(ceil_div(s.HW, pixels), of_map.slices),
                dim3(of_map.groups, of_map.rows, pixels), stream, in, dy, dmap);
}

template <template <int> class Value, class T, class Out>
const char* gate_backward(const Gated<T>& in, const void* dy, void* dx, void* dmap, void* dgate,
                          void* stream) {
  const int64_t factors = static_cast<int64_t>(in.s.N) * in.s.C;
  Out* const sums = static_cast<Out*>(dgate);
  if (in.s.K + in.s.R < in.s.C) {  // factors that no channel was multiplied by
    const dim3 blocks(static_cast<unsigned>(ceil_div<int64_t>(factors, kThreads)));
    if (const char* failure =
            launch(&fill_zero<Out>, blocks, dim3(kThreads), stream, sums, factors)) {
      return failure;
    }
  }
  const auto run = vectors_fit(in, {dy, dx, dmap}) ? &launch_gate_backward<T, kLanes<T>, Value, Out>
                                                   : &launch_gate_backward<T, 1, Value, Out>;
  return run(in, static_cast<const T*>(dy), static_cast<T*>(dx), static_cast<T*>(dmap), sums,
             stream);
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

const char* sacl_cuda_slim_gate(GateShape shape, const void* x, const float* affine, int act,
                                const void* map, const void* gate, const int64_t* x_index,
                                const int64_t* map_index, void* y, void* stream) {
  if (const char* failure = unknown_activation(act)) return failure;
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto in = gated<T>(shape, x, affine, act, map, gate, x_index, map_index);
    const auto run = vectors_fit(in, {y}) ? &launch_gate<T, kLanes<T>> : &launch_gate<T, 1>;
    return run(in, static_cast<T*>(y), stream);
  });
}

const char* sacl_cuda_slim_gate_backward(GateShape shape, const void* dy, const void* x,
                                         const float* affine, int act, const void* map,
                                         const void* gate, const int64_t* x_index,
                                         const int64_t* map_index, void* dx, void* dmap,
                                         void* dgate, void* stream) {
  if (const char* failure = unknown_activation(act)) return failure;
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto in = gated<T>(shape, x, affine, act, map, gate, x_index, map_index);
    const auto run = affine ? &gate_backward<Activated, T, float> : &gate_backward<Itself, T, T>;
    return run(in, dy, dx, dmap, dgate, stream);
  });
}
}
