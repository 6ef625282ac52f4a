// What batch norm's kernels share: passes over images as M rows of K channels in NHWC memory, what
// the blocks of such a pass leave, and passes over what is as long as the channels.
#pragma once

#include "cuda/device.h"

namespace sacl::cuda {

struct ChannelRows {
  int64_t M, chunk;  // chunk: rows that a block takes
  int K;

  // Where this block's rows begin and end.
  __device__ int64_t first() const { return blockIdx.x * chunk; }
  __device__ int64_t stop() const { return min(M, first() + chunk); }
};

__device__ inline int first_channel(int V) { return (blockIdx.y * blockDim.x + threadIdx.x) * V; }

// use(row, values) for the block's rows, several loads ahead: those of the V channels that lie at
// at(k, row), for each of the INPUTS images k. Rows are counted from the last one if `backwards`.
template <class T, int V, int INPUTS, class At, class Use>
__device__ void for_rows_at(const ChannelRows& rows, bool backwards, const At& at, const Use& use) {
  const int last = static_cast<int>(rows.M) - 1, stop = static_cast<int>(rows.stop());
  for (int start = static_cast<int>(rows.first()) + threadIdx.y; start < stop;
       start += kLoads<V> * blockDim.y) {
    Vec<T, V> loaded[kLoads<V>][INPUTS];
#pragma unroll
    for (int i = 0; i < kLoads<V>; ++i) {
      const int row = start + i * blockDim.y;
#pragma unroll
      for (int k = 0; k < INPUTS; ++k)
        if (row < stop) loaded[i][k] = Vec<T, V>::load(at(k, backwards ? last - row : row));
    }
#pragma unroll
    for (int i = 0; i < kLoads<V>; ++i) {
      const int row = start + i * blockDim.y;
      if (row >= stop) break;
      float values[INPUTS][V];
#pragma unroll
      for (int k = 0; k < INPUTS; ++k) loaded[i][k].unpack(values[k]);
      use(backwards ? last - row : row, values);
    }
  }
}

// use(row, where its V channels are, their values in each of `inputs`), of K channels each.
template <class T, int V, int INPUTS, class Use>
__device__ void for_rows(const ChannelRows& rows, const T* const (&inputs)[INPUTS], int channel,
                         bool backwards, const Use& use) {
  for_rows_at<T, V, INPUTS>(
      rows, backwards, [&](int k, int row) { return inputs[k] + int64_t{row} * rows.K + channel; },
      [&](int row, const float (&in)[INPUTS][V]) {
        use(row, int64_t{row} * rows.K + channel, in);
      });
}

// V values of a vector of channels.
template <int V>
__device__ void load_channels(const float* from, int channel, float (&out)[V]) {
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = from[channel + v];
}

// (x - mean) * scale + bias of V channels.
template <int V>
struct Affine {
  float scale[V], bias[V], mean[V];

  __device__ float at(int v, float x) const { return (x - mean[v]) * scale[v] + bias[v]; }
};

// rows: scale, bias, mean, 1 / deviation (4, K), or null, for x itself.
template <int V>
__device__ Affine<V> affine_of(const float* rows, int K, int channel) {
  Affine<V> affine;
  if (!rows) {
#pragma unroll
    for (int v = 0; v < V; ++v) affine.scale[v] = 1, affine.bias[v] = affine.mean[v] = 0;
    return affine;
  }
  load_channels(rows, channel, affine.scale);
  load_channels(rows + K, channel, affine.bias);
  load_channels(rows + 2 * K, channel, affine.mean);
  return affine;
}

// The gradient of what a norm is given, from that of its output: coefficients (4, K).
template <int V>
struct InputGradient {
  float c[4][V];

  __device__ InputGradient(const float* coefficients, int K, int channel) {
#pragma unroll
    for (int i = 0; i < 4; ++i) load_channels(coefficients + i * K, channel, c[i]);
  }
  __device__ float at(int v, float g, float y) const {
    return c[0][v] * g + c[1][v] * (y - c[3][v]) + c[2][v];
  }
};

// sets (blocks, ROWS, K): ROWS values of each of V channels, this block's.
template <int ROWS, int V>
__device__ void leave(const float (&values)[ROWS * V], int channel, int K, float* sets) {
  float* own = sets + static_cast<int64_t>(blockIdx.x) * ROWS * K + channel;
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int v = 0; v < V; ++v) own[i * K + v] = values[i * V + v];
}

// sets (blocks, 2, K) = this block's two sums of each channel. Called by all its threads.
template <int V>
__device__ void leave_sums(float (&sums)[2 * V], int channel, int K, float* sets) {
  __shared__ float buffer[kSumBuffer<2 * V>];
  sum_rows_of_block(buffer, sums);
  if (threadIdx.y == 0 && channel < K) leave<2, V>(sums, channel, K, sets);
}

// Sums of the differences of x from row 0 and of their squares, over this thread's rows. So an
// offset costs no digits.
template <class T, int V>
__device__ void sum_differences(const ChannelRows& rows, const T* x, int channel, bool backwards,
                                float (&origin)[V], float (&sums)[2 * V]) {
  clear(origin);
  clear(sums);
  if (channel >= rows.K) return;
  Vec<T, V>::load(x + channel).unpack(origin);
  const T* const inputs[] = {x};
  const auto use = [&](int64_t, int64_t, const float (&in)[1][V]) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float d = in[0][v] - origin[v];
      sums[v] += d;
      sums[V + v] += d * d;
    }
  };
  for_rows<T, V>(rows, inputs, channel, backwards, use);
}

// What is as long as the channels.

// The blocks of (COLUMNS, ROWS) threads that go through the channels: first those for the K live
// ones, a column for each, then those for the R zeroed ones, a thread for each.
template <int COLUMNS, int ROWS>
struct ChannelBlocks {
  int K, R, live_blocks;

  ChannelBlocks(int K, int R) : K(K), R(R), live_blocks(ceil_div(K, COLUMNS)) {}

  dim3 grid() const { return dim3(live_blocks + ceil_div(R, COLUMNS * ROWS)); }
  dim3 block() const { return dim3(COLUMNS, ROWS); }

  __device__ bool are_live() const { return static_cast<int>(blockIdx.x) < live_blocks; }
  __device__ int live() const { return blockIdx.x * COLUMNS + threadIdx.x; }
  __device__ int zeroed() const {
    return ((blockIdx.x - live_blocks) * ROWS + threadIdx.y) * COLUMNS + threadIdx.x;
  }
};

__device__ inline int64_t number_of(const int64_t* index, int channel) {
  return index ? index[channel] : channel;
}

// The running statistics of channel `number` of all move to these.
__device__ inline void move_running(const BatchNormStatistics& statistics, int64_t number,
                                    double mean, double variance) {
  const auto move = [&](float* running, double to) {
    if (running)
      running[number] += statistics.momentum * (static_cast<float>(to) - running[number]);
  };
  const double n = statistics.count;
  move(statistics.running_mean, mean);
  move(statistics.running_var, variance * (n / (n > 2 ? n - 1 : 1)));
}

__device__ inline double not_negative(double x) { return x < 0 ? 0 : x; }  // NaN stays NaN

template <class T>
__global__ void clear_both(T* a, T* b, int count) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) a[i] = b[i] = 0;
}

// Zeros in the gradients of C channels, before those of the live and the zeroed are written.
inline const char* launch_clear(float* dweight, float* dbias, int C, void* stream) {
  return launch(&clear_both<float>, dim3(ceil_div(C, kThreads)), dim3(kThreads), stream, dweight,
                dbias, C);
}

// The blocks over M rows: fewer where each leaves sums.
struct RowBlocks {
  static constexpr int kPerProcessor = 8, kPerProcessorSums = 4;

  int64_t M;
  int K;
  Tile tile;
  Chunks sums, images;

  RowBlocks(int64_t M, int K, int V)
      : M(M), K(K), tile(K, V), sums(M, tile, kPerProcessorSums), images(M, tile, kPerProcessor) {}

  ChannelRows rows(const Chunks& chunks) const { return {M, chunks.size, K}; }
  dim3 grid(const Chunks& chunks) const { return dim3(chunks.count, tile.slices); }
  dim3 block() const { return dim3(tile.groups, tile.rows); }
};

}  // namespace sacl::cuda
