// Sums of images (N, H, W, O), or of what is formed of them as they are loaded, to the shape of an
// offset (n, h, w, O).
#pragma once

#include "cuda/values.h"

namespace sacl::cuda {

// The pixels of an image's border and those within, each in order. Where all rows are of the border
// there are none within.
struct Border {
  int H, W, top, bottom, left, right;
  int inner_width, inner;  // inner: pixels within
  Divisor sides, within;

  Border(const OffsetShape& s, const OffsetBorder& border)
      : H(s.H), W(s.W), top(border.top), bottom(border.bottom), left(border.left),
        right(border.right), inner_width(W - left - right), inner((H - top - bottom) * inner_width),
        sides(std::max(1, left + right)), within(std::max(1, inner_width)) {}

  // Rows at the top come first, then those at the bottom, then the columns at the sides.
  __device__ int pixel(int i) const {
    if (i < top * W) return i;
    i -= top * W;
    if (i < bottom * W) return (H - bottom) * W + i;
    i -= bottom * W;
    const int row = top + sides.split(i);
    return row * W + (i < left ? i : i + inner_width);
  }
  __device__ int inner_pixel(int i) const {
    const int row = top + within.split(i);
    return row * W + left + i;
  }
};

// The pixels that are summed up to one value of an offset, in parts that a block takes.
struct Summed {
  static constexpr int kPerProcessor = 8;

  OffsetShape s;
  Border border;
  Divisor width, height;  // of what is summed over
  Divisor sums_width, sums_height;
  int cells;         // values of the offset for a channel, but for those within the border
  int count;         // pixels of a sum
  int parts, chunk;  // blocks of a sum, pixels of a block

  // enough: blocks of a multiprocessor from which on no sum is cut, for its parts take a launch
  // more
  Summed(const OffsetShape& s, const OffsetBorder& border, const Tile& tile, int enough)
      : s(s), border(s, border), width(over(s.W, s.w)), height(over(s.H, s.h)), sums_width(s.w),
        sums_height(s.h), cells(s.n * s.h * s.w - this->border.inner) {
    count = over(s.W, s.w) * over(s.H, s.h) * over(s.N, s.n);
    const int64_t whole = static_cast<int64_t>(tile.slices) * std::max(1, cells);
    const int64_t wanted =
        whole < multiprocessors() * enough ? multiprocessors() * kPerProcessor : 1;
    const int blocks = static_cast<int>(ceil_div(wanted, whole));
    chunk = ceil_div(ceil_div(count, blocks), tile.rows) * tile.rows;
    parts = ceil_div(count, chunk);
  }
  static int over(int size, int kept) { return kept == size ? 1 : size; }

  int64_t columns() const { return static_cast<int64_t>(cells) * s.O; }
  int64_t scratch() const { return parts == 1 ? 1 : parts * columns(); }

  // The number that the `i`th cell has in the offset.
  __device__ int number(int i) const { return border.inner ? border.pixel(i) : i; }

  // The `i`th of the pixels that are summed up to the offset's value `number`.
  __device__ int64_t pixel(int number, int i) const {
    int w = number;
    int h = sums_width.split(w);
    int n = sums_height.split(h);
    int own_w = i;
    int own_h = width.split(own_w);
    n += height.split(own_h);
    return (static_cast<int64_t>(n) * s.H + h + own_h) * s.W + w + own_w;
  }
};

template <class Out, int V>
__device__ void store_sums(Out* to, const float (&sums)[V]) {
  if constexpr (V == 1 || V == kLanes<Out>) {
    Vec<Out, V>::store(to, sums);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) to[v] = from_float<Out>(sums[v]);
  }
}

// partial (parts, cells, O), or sums (n, h, w, O) where a sum has one part: factor times the sums.
template <class T, int V, template <int> class Value, class Out>
__global__ void __launch_bounds__(kThreads)
    sum_to_offset(Summed summed, ValueArguments arguments, const T* first, const T* second,
                  float factor, float* partial, Out* sums) {
  constexpr int kInputs = Value<V>::kInputs, kAhead = V == 1 ? 8 : 8 / kInputs;
  __shared__ float buffer[kSumBuffer<V>];
  const int O = summed.s.O, channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  const int cell = blockIdx.x / summed.parts, part = blockIdx.x % summed.parts;
  const int number = summed.number(cell);
  float sum[V];
  clear(sum);
  if (channel < O) {
    const Value<V> value(arguments, O, channel);
    const T* const inputs[] = {first, second};
    const int step = blockDim.y, stop = min(summed.count, (part + 1) * summed.chunk);
    for (int i = part * summed.chunk + threadIdx.y; i < stop; i += kAhead * step) {
      Vec<T, V> loaded[kAhead][kInputs];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (i + j * step >= stop) break;
        const int64_t at = summed.pixel(number, i + j * step) * O + channel;
#pragma unroll
        for (int k = 0; k < kInputs; ++k) loaded[j][k] = Vec<T, V>::load(inputs[k] + at);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (i + j * step >= stop) break;
        float in[kInputs][V], out[V];
#pragma unroll
        for (int k = 0; k < kInputs; ++k) loaded[j][k].unpack(in[k]);
        value(in, out);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += out[v];
      }
    }
  }
  sum_rows_of_block(buffer, sum);
  if (threadIdx.y != 0 || channel >= O) return;
  if (summed.parts == 1) {
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] *= factor;
    store_sums(sums + static_cast<int64_t>(number) * O + channel, sum);
    return;
  }
  float* own = partial + (static_cast<int64_t>(part) * summed.cells + cell) * O + channel;
#pragma unroll
  for (int v = 0; v < V; ++v) own[v] = sum[v];
}

template <class Out>
__global__ void add_parts(Summed summed, float factor, const float* partial, Out* sums) {
  const int64_t columns = static_cast<int64_t>(summed.cells) * summed.s.O;
  const int column = blockIdx.x * kColumns + threadIdx.x;
  const bool inside = column < columns;
  const double sum = sum_of_column(partial, summed.parts, columns, column, inside);
  if (!inside || threadIdx.y != 0) return;
  const int O = summed.s.O, cell = column / O;
  sums[static_cast<int64_t>(summed.number(cell)) * O + column % O] =
      from_float<Out>(static_cast<float>(sum * factor));
}

template <class T, int V, template <int> class Value, class Out>
const char* launch_sums(const OffsetShape& s, const OffsetBorder& border, int enough,
                        ValueArguments arguments, const T* first, const T* second, float factor,
                        Out* sums, float* scratch, void* stream) {
  const Tile tile(s.O, V);
  const Summed summed(s, border, tile, enough);
  const dim3 grid(static_cast<unsigned>(summed.cells) * summed.parts, tile.slices);
  const char* failure = launch(&sum_to_offset<T, V, Value, Out>, grid, dim3(tile.groups, tile.rows),
                               stream, summed, arguments, first, second, factor, scratch, sums);
  if (failure || summed.parts == 1) return failure;
  const dim3 blocks(static_cast<unsigned>(ceil_div<int64_t>(summed.columns(), kColumns)));
  return launch(&add_parts<Out>, blocks, dim3(kColumns, kColumnRows), stream, summed, factor,
                scratch, sums);
}

// Floats of scratch that these sums take.
inline int64_t sums_scratch(const OffsetShape& s, const OffsetBorder& border, int enough) {
  int64_t floats = 1;
  with_type(s.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (const int V : {1, kLanes<T>})
      floats = std::max(floats, Summed(s, border, Tile(s.O, V), enough).scratch());
    return static_cast<const char*>(nullptr);
  });
  return floats;
}

}  // namespace sacl::cuda
