// What padding makes of constants, up to the product after it: see ../operators.cpp.
//
// All is computed by class of pixels (SlimBorderShape), and in float32, where few numbers are added
// in double. Only two passes are of the image's size: offset_by_class writes the offset, and
// sum_classes reads its gradient. The product over S channels and the rest is shared out: eight
// outputs (backward: eight inputs) are a block's, and 64 threads share each one's sum.
// (More than 400 lines, because both passes go through the same classes and tables.)
#include "cuda/activations.h"
#include "cuda/norm.h"

namespace sacl::cuda {
namespace {

constexpr int kMostClasses = kMostRuns * kMostRuns;
constexpr int kSeries = 8, kShares = 64;  // sums of a block, threads of a sum
constexpr int kProductThreads = kSeries * kShares;
constexpr int kTogether = 9;  // classes whose sums a thread has at a time
constexpr int kTableColumns = 16, kTableRows = 16;

__device__ float number(const Numbers& numbers, int64_t i) {
  switch (numbers.dtype) {
    case kFloat16: return to_float(load_one(static_cast<const Half*>(numbers.data) + i));
    case kBFloat16: return to_float(load_one(static_cast<const BFloat*>(numbers.data) + i));
    default: return load_one(static_cast<const float*>(numbers.data) + i);
  }
}

__device__ void put(const Numbers& numbers, int64_t i, float value) {
  switch (numbers.dtype) {
    case kFloat16: static_cast<Half*>(numbers.data)[i] = from_float<Half>(value); break;
    case kBFloat16: static_cast<BFloat*>(numbers.data)[i] = from_float<BFloat>(value); break;
    default: static_cast<float*>(numbers.data)[i] = value;
  }
}

// The run that output i is of.
__device__ int run_of(const Runs& runs, int i) {
  int run = 0;
  for (int next = 1; next < runs.count; ++next) run += i >= runs.start[next];
  return run;
}

__device__ int length(const Runs& runs, int run) { return runs.start[run + 1] - runs.start[run]; }

__device__ double pixels_of(const SlimBorderShape& s, int c) {
  return static_cast<double>(length(s.rows, c / s.columns.count)) *
         length(s.columns, c % s.columns.count);
}

__device__ double all_pixels(const SlimBorderShape& s) {
  return static_cast<double>(s.rows.start[s.rows.count]) * s.columns.start[s.columns.count];
}

// Forward.

// saved (classes + 1, S), and values: (classes, S) after the activation and, behind them, the rest.
// Blocks from map_blocks on take the rest.
__global__ void values_of_classes(SlimBorderShape s, SlimBorderInputs in,
                                  BatchNormStatistics statistics, int map_blocks, float* saved,
                                  float* values) {
  __shared__ float taps[kLargestWindow * kLargestWindow][kTableColumns];
  const int x = threadIdx.x, y = threadIdx.y, classes = s.classes, window = s.kh * s.kw;
  if (static_cast<int>(blockIdx.x) >= map_blocks) {
    const int r = ((blockIdx.x - map_blocks) * kTableRows + y) * kTableColumns + x;
    if (r < s.rest) values[static_cast<int64_t>(classes) * s.S + r] = number(in.rest, r);
    return;
  }
  const int channel = blockIdx.x * kTableColumns + x;
  const bool inside = channel < s.S;
  double constant = 0;
  if (inside) {
    const int64_t filter = in.filter_index[channel] * window;
    constant = number(in.constants, in.in_index[channel]);
    for (int t = y; t < window; t += kTableRows) taps[t][x] = number(in.filters, filter + t);
  }
  __syncthreads();
  const auto response = [&](int c) {
    const int r = c / s.columns.count, q = c % s.columns.count;
    double sum = 0;
    for (int i = s.rows.first[r]; i <= s.rows.last[r]; ++i)
      for (int j = s.columns.first[q]; j <= s.columns.last[q]; ++j) sum += taps[i * s.kw + j][x];
    return constant * sum;
  };
  const double origin = inside ? response(0) : 0, pixels = all_pixels(s);
  double sums[2] = {0, 0};  // of differences from the origin, of their squares
  for (int c = y; inside && c < classes; c += kTableRows) {
    const double beyond = response(c) - origin, n = pixels_of(s, c);
    sums[0] += n * beyond;
    sums[1] += n * beyond * beyond;
  }
  sum_columns_of_block<kTableColumns, kTableRows>(sums);
  if (!inside) return;
  const int64_t channel_of_norm = in.norm_index[channel];
  const double beyond = sums[0] / pixels;
  const double variance = not_negative(sums[1] / pixels - beyond * beyond);
  const double rstd = 1 / sqrt(variance + statistics.eps);
  const float scale = in.norm_weight[channel_of_norm], bias = in.norm_bias[channel_of_norm];
  for (int c = y; c < classes; c += kTableRows) {
    const float normalised = static_cast<float>((response(c) - origin - beyond) * rstd);
    const int64_t at = static_cast<int64_t>(c) * s.S + channel;
    saved[at] = normalised;
    values[at] = activate(s.act, normalised * scale + bias);
  }
  if (y != 0) return;
  saved[static_cast<int64_t>(classes) * s.S + channel] = static_cast<float>(rstd);
  move_running(statistics, channel_of_norm, origin + beyond, variance);
}

// The sums over i of the block's series, factor(i) * rows[class, i], for all classes; those of a
// column of threads are in its sums[class]. Called by all threads of the block.
template <class Factor>
__device__ void sum_by_class(int classes, int count, const float* rows, int stride, float constant,
                             const Factor& factor, float (*sums)[kSeries]) {
  __shared__ float buffer[kSumBuffer<kTogether, kProductThreads>];
  for (int first = 0; first < classes; first += kTogether) {
    float own[kTogether];
    const float* row[kTogether];
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      own[k] = constant;
      row[k] = rows + static_cast<int64_t>(min(first + k, classes - 1)) * stride;
    }
#pragma unroll 4
    for (int i = threadIdx.y; i < count; i += kShares) {
      const float by = factor(i);
#pragma unroll
      for (int k = 0; k < kTogether; ++k) own[k] += by * __ldg(row[k] + i);
    }
    sum_rows_of_block<kProductThreads>(buffer, own);
    if (threadIdx.y == 0) {
#pragma unroll
      for (int k = 0; k < kTogether; ++k)
        if (first + k < classes) sums[first + k][threadIdx.x] = own[k];
    }
  }
  __syncthreads();
}

// offset (OH, OW, O); a block writes `chunk` pixels.
template <class W>
__global__ void __launch_bounds__(kProductThreads)
    offset_by_class(SlimBorderShape s, SlimBorderInputs in, Divisor width, int pixels, int chunk,
                    const float* values, Numbers offset) {
  __shared__ float sums[kMostClasses][kSeries];
  const int output = blockIdx.x * kSeries + threadIdx.x, classes = s.classes;
  const bool inside = output < s.O;
  const W* filter = static_cast<const W*>(in.weight.data) +
                    (inside ? number_of(in.out_index, output) * s.Cin : 0);
  const float* rest = values + static_cast<int64_t>(classes) * s.S;
  float constant = 0;
#pragma unroll 4
  for (int r = threadIdx.y; r < s.rest; r += kShares)
    constant += to_float(load_one(filter + in.rest_index[r])) * __ldg(rest + r);
  const auto factor = [&](int i) { return to_float(load_one(filter + in.map_index[i])); };
  sum_by_class(classes, s.S, values, s.S, constant, factor, sums);
  if (!inside) return;
  const int stop = min(pixels, static_cast<int>(blockIdx.y + 1) * chunk);
  for (int pixel = blockIdx.y * chunk + threadIdx.y; pixel < stop; pixel += kShares) {
    int column = pixel;
    const int row = width.split(column);
    const int c = run_of(s.rows, row) * s.columns.count + run_of(s.columns, column);
    put(offset, static_cast<int64_t>(pixel) * s.O + output, sums[c][threadIdx.x]);
  }
}

// Backward.

// The rows of each run in chunks, which blocks sum up; all chunks are counted through.
struct RowChunks {
  static constexpr int kPerProcessor = 2, kPixels = 256;  // of a block, at least

  int size, count;

  explicit RowChunks(const SlimBorderShape& s) : count(0) {
    const int wanted = ceil_div(multiprocessors() * kPerProcessor, ceil_div(s.O, kThreads / 2));
    const int high = s.rows.start[s.rows.count], wide = s.columns.start[s.columns.count];
    size = std::max(ceil_div(high, wanted), ceil_div(kPixels, wide));
    for (int run = 0; run < s.rows.count; ++run)
      count += ceil_div(s.rows.start[run + 1] - s.rows.start[run], size);
  }

  __device__ int of_run(const Runs& rows, int run) const {
    return (length(rows, run) + size - 1) / size;
  }
};

// Memory that is filled with zeros, as much as the thread's share.
struct Cleared {
  static constexpr int kSpans = 5;

  void* data[kSpans];
  int64_t bytes[kSpans];

  int64_t all() const {
    int64_t sum = 0;
    for (const int64_t n : bytes) sum += n;
    return sum;
  }

  __device__ void clear(int64_t thread, int64_t threads) const {
#pragma unroll
    for (int i = 0; i < kSpans; ++i) {
      const bool vectors = reinterpret_cast<uintptr_t>(data[i]) % sizeof(uint4) == 0;
      const int64_t whole = vectors ? bytes[i] / static_cast<int64_t>(sizeof(uint4)) : 0;
      auto* const words = static_cast<uint4*>(data[i]);
      auto* const rest = static_cast<uint16_t*>(data[i]);
      for (int64_t at = thread; at < whole; at += threads) words[at] = uint4{0, 0, 0, 0};
      for (int64_t at = whole * 8 + thread; at < bytes[i] / 2; at += threads) rest[at] = 0;
    }
  }
};

// partial (chunks, runs of columns, O): doffset summed over rows of a chunk and columns of a run.
// Blocks from sum_blocks on clear the gradients.
template <int V>
__global__ void __launch_bounds__(kThreads)
    sum_classes(SlimBorderShape s, RowChunks chunks, int slices, int sum_blocks, Cleared cleared,
                const float* doffset, float* partial) {
  __shared__ float buffer[kSumBuffer<V>];
  const int block = blockIdx.x;
  if (block >= sum_blocks) {
    const int threads = blockDim.x * blockDim.y;
    const int64_t thread =
        static_cast<int64_t>(block - sum_blocks) * threads + threadIdx.y * blockDim.x + threadIdx.x;
    cleared.clear(thread, static_cast<int64_t>(gridDim.x - sum_blocks) * threads);
    return;
  }
  const int cell = block / slices, chunk = cell / s.columns.count, run = cell % s.columns.count;
  const int channel = (block % slices * blockDim.x + threadIdx.x) * V;
  int of_rows = 0, in_run = chunk;
  for (int count; in_run >= (count = chunks.of_run(s.rows, of_rows)); ++of_rows) in_run -= count;
  const int first_row = s.rows.start[of_rows] + in_run * chunks.size;
  const int rows = min(chunks.size, s.rows.start[of_rows + 1] - first_row);
  const int first_column = s.columns.start[run], wide = length(s.columns, run);
  const int whole = s.columns.start[s.columns.count];
  float sum[V];
  clear(sum);
  if (channel < s.O) {
#pragma unroll 4
    for (int i = threadIdx.y; i < rows * wide; i += blockDim.y) {
      const int64_t pixel =
          static_cast<int64_t>(first_row + i / wide) * whole + first_column + i % wide;
      float values[V];
      Vec<float, V>::load(doffset + pixel * s.O + channel).unpack(values);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += values[v];
    }
  }
  sum_rows_of_block(buffer, sum);
  if (threadIdx.y != 0 || channel >= s.O) return;
  float* own = partial + static_cast<int64_t>(cell) * s.O + channel;
#pragma unroll
  for (int v = 0; v < V; ++v) own[v] = sum[v];
}

// totals (classes, O) of the chunks.
__global__ void add_chunks(SlimBorderShape s, RowChunks chunks, const float* partial,
                           float* totals) {
  const int of_row = s.columns.count * s.O, column = blockIdx.x * kColumns + threadIdx.x;
  const bool inside = column < s.rows.count * of_row;
  const int run = inside ? column / of_row : 0;
  int first = 0;
  for (int before = 0; before < run; ++before) first += chunks.of_run(s.rows, before);
  const double sum = sum_of_column(partial + static_cast<int64_t>(first) * of_row,
                                   chunks.of_run(s.rows, run), of_row, column % of_row, inside);
  if (inside && threadIdx.y == 0) totals[column] = static_cast<float>(sum);
}

// From totals (classes, O), the gradients of the weight's columns and of what they are multiplied
// by; the first map_blocks blocks take the map's columns, from where it goes on to the norm, the
// filters and the constants, the others those of the rest.
template <class W>
__global__ void __launch_bounds__(kProductThreads)
    gradients_of_columns(SlimBorderShape s, SlimBorderInputs in, int map_blocks,
                         const float* totals, const float* saved, SlimBorderGradients out) {
  __shared__ float values[kMostClasses][kSeries], gradient[kMostClasses][kSeries];
  const int x = threadIdx.x, y = threadIdx.y, classes = s.classes;
  const bool of_map = static_cast<int>(blockIdx.x) < map_blocks;
  const int channel = (of_map ? blockIdx.x : blockIdx.x - map_blocks) * kSeries + x;
  const bool inside = channel < (of_map ? s.S : s.rest);
  const int64_t own = inside ? channel : 0;
  const int64_t column = of_map ? in.map_index[own] : in.rest_index[own];
  const int64_t norm_channel = of_map ? in.norm_index[own] : 0;
  const float scale = in.norm_weight[norm_channel], bias = in.norm_bias[norm_channel];
  const auto normalised = [&](int c) { return saved[static_cast<int64_t>(c) * s.S + own]; };
  for (int c = y; c < classes; c += kShares)
    values[c][x] = of_map ? activate(s.act, normalised(c) * scale + bias) : number(in.rest, own);
  __syncthreads();

  const W* weights = static_cast<const W*>(in.weight.data) + column;
  for (int o = y; inside && o < s.O; o += kShares) {
    float sum = 0;
#pragma unroll 4
    for (int c = 0; c < classes; ++c)
      sum += __ldg(totals + static_cast<int64_t>(c) * s.O + o) * values[c][x];
    put(out.weight, number_of(in.out_index, o) * s.Cin + column, sum);
  }
  const auto factor = [&](int o) {
    return to_float(load_one(weights + number_of(in.out_index, o) * s.Cin));
  };
  sum_by_class(classes, s.O, totals, s.O, 0, factor, gradient);

  double sums[2] = {0, 0};
  if (!of_map) {
    for (int c = 0; c < classes; ++c) sums[0] += gradient[c][x];
    if (inside && y == 0) put(out.rest, channel, static_cast<float>(sums[0]));
    return;
  }
  for (int c = y; c < classes; c += kShares) {
    const float z = normalised(c) * scale + bias;
    gradient[c][x] = through_activation(s.act, gradient[c][x], z);
    sums[0] += gradient[c][x];
    sums[1] += static_cast<double>(gradient[c][x]) * normalised(c);
  }
  sum_columns_of_block<kSeries, kShares>(sums);
  const double factor_of_norm =
      static_cast<double>(scale) * saved[static_cast<int64_t>(classes) * s.S + own];
  const double pixels = all_pixels(s);
  for (int c = y; c < classes; c += kShares) {
    const double share = pixels_of(s, c) / pixels;
    gradient[c][x] = static_cast<float>(
        factor_of_norm * (gradient[c][x] - share * (sums[0] + normalised(c) * sums[1])));
  }
  __syncthreads();

  double of_constant[1] = {0};
  const int64_t source = in.in_index[own], window = s.kh * s.kw;
  const int64_t filter = in.filter_index[own] * window;
  const double constant = number(in.constants, source);
  for (int t = y; t < window; t += kShares) {
    const int i = t / s.kw, j = t % s.kw;
    double sum = 0;
    for (int r = 0; r < s.rows.count; ++r) {
      if (i < s.rows.first[r] || i > s.rows.last[r]) continue;
      for (int q = 0; q < s.columns.count; ++q)
        if (j >= s.columns.first[q] && j <= s.columns.last[q])
          sum += gradient[r * s.columns.count + q][x];
    }
    if (inside) put(out.filters, filter + t, static_cast<float>(constant * sum));
    of_constant[0] += sum * number(in.filters, filter + t);
  }
  sum_columns_of_block<kSeries, kShares>(of_constant);
  if (!inside || y != 0) return;
  put(out.constants, source, static_cast<float>(of_constant[0]));
  out.norm_weight[norm_channel] = static_cast<float>(sums[1]);
  out.norm_bias[norm_channel] = static_cast<float>(sums[0]);
}

// Launches.

template <int V>
const char* launch_sums(const SlimBorderShape& s, const RowChunks& chunks, const Cleared& cleared,
                        const float* doffset, float* partial, void* stream) {
  const Tile tile(s.O, V);
  const int sum_blocks = chunks.count * s.columns.count * tile.slices;
  const int64_t vectors = ceil_div<int64_t>(cleared.all(), sizeof(uint4));
  const int clear_blocks = static_cast<int>(
      std::min<int64_t>(ceil_div<int64_t>(vectors, 2 * kThreads), 2 * multiprocessors()));
  return launch(&sum_classes<V>, dim3(sum_blocks + clear_blocks), dim3(tile.groups, tile.rows),
                stream, s, chunks, tile.slices, sum_blocks, cleared, doffset, partial);
}

int64_t bytes_of(const Numbers& numbers, int64_t count) {
  return count * (numbers.dtype == kFloat32 ? 4 : 2);
}

Cleared before(const SlimBorderShape& s, const SlimBorderGradients& out) {
  const int64_t vector = bytes_of({nullptr, kFloat32}, s.norm_channels);
  const int64_t window = static_cast<int64_t>(s.kh) * s.kw;
  return {{out.constants.data, out.filters.data, out.weight.data, out.norm_weight, out.norm_bias},
          {bytes_of(out.constants, s.constants), bytes_of(out.filters, s.filters * window),
           bytes_of(out.weight, static_cast<int64_t>(s.Cout) * s.Cin), vector, vector}};
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

const char* sacl_cuda_slim_border(SlimBorderShape shape, SlimBorderInputs inputs,
                                  BatchNormStatistics statistics, Numbers offset, float* saved,
                                  float* scratch, void* stream) {
  if (const char* failure = unknown_activation(shape.act)) return failure;
  const int map_blocks = ceil_div(shape.S, kTableColumns);
  const int rest_blocks = ceil_div(shape.rest, kTableColumns * kTableRows);
  if (const char* failure = launch(&values_of_classes, dim3(map_blocks + rest_blocks),
                                   dim3(kTableColumns, kTableRows), stream, shape, inputs,
                                   statistics, map_blocks, saved, scratch)) {
    return failure;
  }
  const int wide = shape.columns.start[shape.columns.count];
  const int pixels = shape.rows.start[shape.rows.count] * wide;
  const int slices = ceil_div(shape.O, kSeries);
  const int most = std::max(1, pixels / (4 * kShares));  // blocks that have pixels enough
  const int blocks = std::min(most, ceil_div(2 * multiprocessors(), slices));
  const int chunk = ceil_div(pixels, blocks);
  return with_type(inputs.weight.dtype, [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    return launch(&offset_by_class<W>, dim3(slices, ceil_div(pixels, chunk)),
                  dim3(kSeries, kShares), stream, shape, inputs, Divisor(wide), pixels, chunk,
                  scratch, offset);
  });
}

int64_t sacl_cuda_slim_border_backward_scratch(SlimBorderShape shape) {
  const RowChunks chunks(shape);
  const int64_t totals = chunks.count == shape.rows.count ? 0 : shape.rows.count;
  return (chunks.count + totals) * shape.columns.count * shape.O;
}

const char* sacl_cuda_slim_border_backward(SlimBorderShape shape, SlimBorderInputs inputs,
                                           const float* doffset, const float* saved,
                                           SlimBorderGradients gradients, float* scratch,
                                           void* stream) {
  if (const char* failure = unknown_activation(shape.act)) return failure;
  const RowChunks chunks(shape);
  const auto sum = shape.O % kLanes<float> == 0 && aligned(doffset) ? &launch_sums<kLanes<float>>
                                                                    : &launch_sums<1>;
  if (const char* failure =
          sum(shape, chunks, before(shape, gradients), doffset, scratch, stream)) {
    return failure;
  }
  float* totals = scratch;
  if (chunks.count > shape.rows.count) {
    totals += static_cast<int64_t>(chunks.count) * shape.columns.count * shape.O;
    const int columns = shape.classes * shape.O;
    if (const char* failure =
            launch(&add_chunks, dim3(ceil_div(columns, kColumns)), dim3(kColumns, kColumnRows),
                   stream, shape, chunks, scratch, totals)) {
      return failure;
    }
  }
  const int map_blocks = ceil_div(shape.S, kSeries);
  const int blocks = map_blocks + ceil_div(shape.rest, kSeries);
  return with_type(inputs.weight.dtype, [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    return launch(&gradients_of_columns<W>, dim3(blocks), dim3(kSeries, kShares), stream, shape,
                  inputs, map_blocks, totals, saved, gradients);
  });
}
}
