// What a 1x1 convolution on index lists needs around its matrix products, which are a library's:
// parts of the weight, the full weight's gradient from those of its parts, offsets that are spread
// over an image and, backwards, summed over it.
#include "cuda/device.h"

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

// The pixels that are summed up to one value of an offset, in parts that a block takes.
struct Summed {
  OffsetShape s;
  Divisor width, height;  // of what is summed over
  Divisor sums_width, sums_height;
  int count;         // pixels of a sum
  int parts, chunk;  // blocks of a sum, pixels of a block

  Summed(const OffsetShape& s, const Tile& tile)
      : s(s), width(over(s.W, s.w)), height(over(s.H, s.h)), sums_width(s.w), sums_height(s.h) {
    count = over(s.W, s.w) * over(s.H, s.h) * over(s.N, s.n);
    const int64_t blocks = ceil_div<int64_t>(multiprocessors() * kPerProcessor,
                                             static_cast<int64_t>(tile.slices) * cells());
    const int least = ceil_div(ceil_div(count, static_cast<int>(blocks)), tile.rows) * tile.rows;
    chunk = least;
    parts = ceil_div(count, chunk);
  }
  static int over(int size, int kept) { return kept == size ? 1 : size; }
  int64_t cells() const { return static_cast<int64_t>(s.n) * s.h * s.w; }

  // The `i`th of the pixels that are summed up to value `cell`.
  __device__ int64_t pixel(int cell, int i) const {
    int w = cell;
    int h = sums_width.split(w);
    int n = sums_height.split(h);
    int own_w = i;
    int own_h = width.split(own_w);
    n += height.split(own_h);
    return (static_cast<int64_t>(n) * s.H + h + own_h) * s.W + w + own_w;
  }
};

// partial (parts, cells, O), or sums (cells, O) where a sum has one part.
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    sum_to_offset(Summed summed, const T* dy, float* partial, T* sums) {
  __shared__ float buffer[kSumBuffer<V>];
  const int O = summed.s.O, channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  const int cell = blockIdx.x / summed.parts, part = blockIdx.x % summed.parts;
  float sum[V];
  clear(sum);
  const int stop = channel < O ? min(summed.count, (part + 1) * summed.chunk) : 0;
#pragma unroll 4
  for (int i = part * summed.chunk + threadIdx.y; i < stop; i += blockDim.y) {
    float value[V];
    Vec<T, V>::load(dy + summed.pixel(cell, i) * O + channel).unpack(value);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += value[v];
  }
  sum_rows_of_block(buffer, sum);
  if (threadIdx.y != 0 || channel >= O) return;
  if (summed.parts == 1) {
    Vec<T, V>::store(sums + static_cast<int64_t>(cell) * O + channel, sum);
    return;
  }
  const int64_t cells = gridDim.x / summed.parts;
  float* own = partial + (part * cells + cell) * O + channel;
#pragma unroll
  for (int v = 0; v < V; ++v) own[v] = sum[v];
}

template <class T>
__global__ void add_parts(const float* partial, int parts, int columns, T* sums) {
  const int column = blockIdx.x * kColumns + threadIdx.x;
  const bool inside = column < columns;
  const double sum = sum_of_column(partial, parts, columns, column, inside);
  if (inside && threadIdx.y == 0) sums[column] = from_float<T>(static_cast<float>(sum));
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

template <class T, int V>
const char* launch_sums(const OffsetShape& s, const T* dy, T* sums, float* scratch, void* stream) {
  const Tile tile(s.O, V);
  const Summed summed(s, tile);
  const int64_t columns = summed.cells() * s.O;
  const dim3 grid(static_cast<unsigned>(summed.cells() * summed.parts), tile.slices);
  const char* failure = launch(&sum_to_offset<T, V>, grid, dim3(tile.groups, tile.rows), stream,
                               summed, dy, scratch, sums);
  if (failure || summed.parts == 1) return failure;
  return launch(&add_parts<T>, dim3(static_cast<unsigned>(ceil_div<int64_t>(columns, kColumns))),
                dim3(kColumns, kColumnRows), stream, scratch, summed.parts,
                static_cast<int>(columns), sums);
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
  int parts = 0;
  with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (const int V : {1, kLanes<T>}) {
      const Tile tile(shape.O, V);
      parts = std::max(parts, Summed(shape, tile).parts);
    }
    return static_cast<const char*>(nullptr);
  });
  const int64_t cells = static_cast<int64_t>(shape.n) * shape.h * shape.w;
  return parts == 1 ? 1 : parts * cells * shape.O;
}

const char* sacl_cuda_sum_to_offset(OffsetShape shape, const void* dy, void* sums, float* scratch,
                                    void* stream) {
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool vectors = shape.O % kLanes<T> == 0 && aligned(dy) && aligned(sums);
    const auto run = vectors ? &launch_sums<T, kLanes<T>> : &launch_sums<T, 1>;
    return run(shape, static_cast<const T*>(dy), static_cast<T*>(sums), scratch, stream);
  });
}
}
