// What a 1x1 convolution on index lists needs around its matrix products, which are a library's:
// parts of the weight, the full weight's gradient from those of its parts, offsets that are spread
// over an image and, backwards, summed over it.
#include "cuda/sum_to_offset.h"

namespace sacl::cuda {
namespace {

constexpr int kPerProcessor = 8;

template <class W, class T>
__global__ void take_weight(WeightShape s, const W* weight, const int64_t* out_index,
                            const int64_t* in_index, T* part) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(s.O) * s.K) return;
  const int64_t o = i / s.K, k = i % s.K;
  const int64_t row = out_index ? out_index[o] : o, column = in_index ? in_index[k] : k;
  if (row < 0 || row >= s.Cout || column < 0 || column >= s.Cin) __trap();
  part[i] = from_float<T>(to_float(weight[row * s.Cin + column]));
}

// One block.
__global__ void invert(const int64_t* first, int first_count, const int64_t* second,
                       int second_count, int64_t* positions, int C) {
  for (int c = threadIdx.x; c < C; c += kThreads) positions[c] = -1;
  __syncthreads();
  for (int i = threadIdx.x; i < first_count + second_count; i += kThreads) {
    const int64_t c = i < first_count ? first[i] : second[i - first_count];
    if (c < 0 || c >= C) __trap();
    positions[c] = i;
  }
}

template <class W, class T>
__global__ void put_weight(WeightShape s, const T* live, const T* rest, int R,
                           const int64_t* out_positions, const int64_t* in_positions, W* dweight) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(s.Cout) * s.Cin) return;
  const int64_t o = out_positions ? out_positions[i / s.Cin] : i / s.Cin;
  const int64_t k = in_positions ? in_positions[i % s.Cin] : i % s.Cin;
  float value = 0;
  if (o >= 0 && k >= 0) value = to_float(k < s.K ? live[o * s.K + k] : rest[o * R + k - s.K]);
  dweight[i] = from_float<W>(value);
}

// The pixels of images, and which value of an offset (n, h, w) each of them gets.
struct OffsetOfPixels {
  OffsetShape s;
  Divisor width, height;

  explicit OffsetOfPixels(const OffsetShape& s) : s(s), width(s.W), height(s.H) {}

  // The offset's value for a pixel; n: the pixel's image.
  __device__ int64_t cell(int pixel, int& n) const {
    int w = pixel;
    int h = width.split(w);
    n = height.split(h);
    return (static_cast<int64_t>(s.n > 1 ? n : 0) * s.h + (s.h > 1 ? h : 0)) * s.w +
           (s.w > 1 ? w : 0);
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    spread(OffsetOfPixels offsets, int count, int chunk, const T* offset, const T* response,
           int response_n, T* y) {
  const int O = offsets.s.O, channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  if (channel >= O) return;
  const int stop = min(count, static_cast<int>(blockIdx.x + 1) * chunk);
  for (int pixel = blockIdx.x * chunk + threadIdx.y; pixel < stop; pixel += blockDim.y) {
    int n;
    const int64_t cell = offsets.cell(pixel, n);
    float sum[V], more[V];
    clear(sum);
    if (offset) Vec<T, V>::load(offset + cell * O + channel).unpack(sum);
    if (response) {
      Vec<T, V>::load(response + static_cast<int64_t>(response_n > 1 ? n : 0) * O + channel)
          .unpack(more);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += more[v];
    }
    Vec<T, V>::store(y + static_cast<int64_t>(pixel) * O + channel, sum);
  }
}

// Launches.

// `f` with null pointers to the weight's type and to that of its parts.
template <class F>
const char* with_types(const WeightShape& s, const F& f) {
  return with_type(s.weight_dtype, [&](auto* weight) {
    return with_type(s.dtype, [&](auto* part) { return f(weight, part); });
  });
}

dim3 blocks_for(int64_t threads) {
  return dim3(static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads)));
}

template <class T, int V>
const char* launch_spread(const OffsetShape& s, const T* offset, const T* response, int response_n,
                          T* y, void* stream) {
  const Tile tile(s.O, V);
  const int count = s.N * s.H * s.W;
  const Chunks chunks(count, tile, kPerProcessor);
  return launch(&spread<T, V>, dim3(chunks.count, tile.slices), dim3(tile.groups, tile.rows),
                stream, OffsetOfPixels(s), count, static_cast<int>(chunks.size), offset, response,
                response_n, y);
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

const char* sacl_cuda_take_weight(WeightShape shape, const void* weight, const int64_t* out_index,
                                  const int64_t* in_index, void* part, void* stream) {
  return with_types(shape, [&](auto* full, auto* taken) {
    using W = std::remove_pointer_t<decltype(full)>;
    using T = std::remove_pointer_t<decltype(taken)>;
    return launch(&take_weight<W, T>, blocks_for(static_cast<int64_t>(shape.O) * shape.K),
                  dim3(kThreads), stream, shape, static_cast<const W*>(weight), out_index, in_index,
                  static_cast<T*>(part));
  });
}

const char* sacl_cuda_invert_index(const int64_t* first, int first_count, const int64_t* second,
                                   int second_count, int64_t* positions, int C, void* stream) {
  return launch(&invert, dim3(1), dim3(kThreads), stream, first, first_count, second, second_count,
                positions, C);
}

const char* sacl_cuda_put_weight(WeightShape shape, const void* live, const void* rest, int R,
                                 const int64_t* out_positions, const int64_t* in_positions,
                                 void* dweight, void* stream) {
  return with_types(shape, [&](auto* full, auto* taken) {
    using W = std::remove_pointer_t<decltype(full)>;
    using T = std::remove_pointer_t<decltype(taken)>;
    return launch(&put_weight<W, T>, blocks_for(static_cast<int64_t>(shape.Cout) * shape.Cin),
                  dim3(kThreads), stream, shape, static_cast<const T*>(live),
                  static_cast<const T*>(rest), R, out_positions, in_positions,
                  static_cast<W*>(dweight));
  });
}

const char* sacl_cuda_spread_offset(OffsetShape shape, const void* offset, const void* response,
                                    int response_n, void* y, void* stream) {
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool vectors =
        shape.O % kLanes<T> == 0 && aligned(offset) && aligned(response) && aligned(y);
    const auto run = vectors ? &launch_spread<T, kLanes<T>> : &launch_spread<T, 1>;
    return run(shape, static_cast<const T*>(offset), static_cast<const T*>(response), response_n,
               static_cast<T*>(y), stream);
  });
}

int64_t sacl_cuda_sum_to_offset_scratch(OffsetShape shape) {
  return sums_scratch(shape, whole_image(shape), kPerProcessor);
}

const char* sacl_cuda_sum_to_offset(OffsetShape shape, const void* dy, void* sums, float* scratch,
                                    void* stream) {
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool vectors = shape.O % kLanes<T> == 0 && aligned(dy) && aligned(sums);
    const auto run =
        vectors ? &launch_sums<T, kLanes<T>, Itself, T> : &launch_sums<T, 1, Itself, T>;
    return run(shape, whole_image(shape), kPerProcessor, {}, static_cast<const T*>(dy), nullptr, 1,
               static_cast<T*>(sums), scratch, stream);
  });
}
}
