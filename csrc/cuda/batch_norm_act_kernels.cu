// Batch norm in training with the activation after it, on M rows of K live channels in NHWC memory.
//
// Forward: x is read for the statistics and again for the output, which is written. Backward: dy
// and x are read for the sums, and again for dx. The second pass goes through the rows from the
// last to the first, so that what the cache still holds of the first pass is not read again.
// Between the two a small kernel adds up the blocks' sums, in double, and deals with all that is
// as long as the channels: running statistics, the zeroed channels, gradients of weight and bias.
//
// Sums are in fp32, of differences to the first row, so an offset costs no digits.
#include "cuda/activations.h"
#include "cuda/device.h"

namespace sacl::cuda {
namespace {

// Rows whose loads are under way at a time.
template <int V>
constexpr int kLoads = V == 1 ? 8 : 4;
constexpr int kPerProcessor = 8, kPerProcessorSums = 4;

struct Rows {
  int64_t M, chunk;  // chunk: rows that a block takes
  int K;
};

// use(where a row's V channels are, their values in each of `inputs`) for the block's rows, several
// loads ahead; rows are counted from the last one if `backwards`.
template <class T, int V, int INPUTS, class Use>
__device__ void for_rows(const Rows& rows, const T* const (&inputs)[INPUTS], int channel,
                         bool backwards, const Use& use) {
  const int64_t first = blockIdx.x * rows.chunk, stop = min(rows.M, first + rows.chunk);
  for (int64_t start = first + threadIdx.y; start < stop; start += kLoads<V> * blockDim.y) {
    Vec<T, V> loaded[kLoads<V>][INPUTS];
    int64_t at[kLoads<V>];
#pragma unroll
    for (int i = 0; i < kLoads<V>; ++i) {
      const int64_t row = start + static_cast<int64_t>(i) * blockDim.y;
      at[i] = (backwards ? rows.M - 1 - row : row) * rows.K + channel;
#pragma unroll
      for (int k = 0; k < INPUTS; ++k)
        if (row < stop) loaded[i][k] = Vec<T, V>::load(inputs[k] + at[i]);
    }
#pragma unroll
    for (int i = 0; i < kLoads<V>; ++i) {
      if (start + static_cast<int64_t>(i) * blockDim.y >= stop) break;
      float values[INPUTS][V];
#pragma unroll
      for (int k = 0; k < INPUTS; ++k) loaded[i][k].unpack(values[k]);
      use(at[i], values);
    }
  }
}

struct Vectors {  // of the full channels, and where in them the live ones are
  const float *weight, *bias;
  const int64_t* kept_index;
  const float *mean, *rstd;  // of the live ones

  // The number that a live channel has among all.
  __device__ int64_t number(int channel) const {
    return kept_index ? kept_index[channel] : channel;
  }
};

// y = act((x - mean) * scale + bias) of V channels.
template <int V>
struct Affine {
  float mean[V], scale[V], bias[V];

  __device__ Affine(const Vectors& vectors, int channel) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t number = vectors.number(channel + v);
      mean[v] = vectors.mean[channel + v];
      scale[v] = vectors.rstd[channel + v] * vectors.weight[number];
      bias[v] = vectors.bias[number];
    }
  }
  __device__ float at(int v, float x) const { return (x - mean[v]) * scale[v] + bias[v]; }
};

// partial (blocks, 2, K) = this block's two sums of each channel. Called by all its threads.
template <int V>
__device__ void leave_sums(float (&sums)[2 * V], int channel, int K, float* partial) {
  __shared__ float buffer[kSumBuffer<2 * V>];
  sum_rows_of_block(buffer, sums);
  if (threadIdx.y != 0 || channel >= K) return;
  float* own = partial + static_cast<int64_t>(blockIdx.x) * 2 * K + channel;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    own[v] = sums[v];
    own[K + v] = sums[V + v];
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) moments(Rows rows, const T* x, float* partial) {
  const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  float sums[2 * V];  // of differences, of their squares
  clear(sums);
  if (channel < rows.K) {
    float origin[V];
    Vec<T, V>::load(x + channel).unpack(origin);
    const T* const inputs[] = {x};
    for_rows<T, V>(rows, inputs, channel, false, [&](int64_t, const float (&in)[1][V]) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float d = in[0][v] - origin[v];
        sums[v] += d;
        sums[V + v] += d * d;
      }
    });
  }
  leave_sums<V>(sums, channel, rows.K, partial);
}

template <class T, int V, class A>
__global__ void __launch_bounds__(kThreads) apply(Rows rows, const T* x, Vectors vectors, T* y) {
  const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  if (channel >= rows.K) return;
  const Affine<V> affine(vectors, channel);
  const T* const inputs[] = {x};
  for_rows<T, V>(rows, inputs, channel, true, [&](int64_t at, const float (&in)[1][V]) {
    float out[V];
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = A::value(affine.at(v, in[0][v]));
    Vec<T, V>::store(y + at, out);
  });
}

template <class T, int V, class A>
__global__ void __launch_bounds__(kThreads)
    gradient_sums(Rows rows, const T* dy, const T* x, Vectors vectors, float* partial) {
  const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  float sums[2 * V];  // of dz, of dz (x - mean)
  clear(sums);
  if (channel < rows.K) {
    const Affine<V> affine(vectors, channel);
    const T* const inputs[] = {dy, x};
    for_rows<T, V>(rows, inputs, channel, false, [&](int64_t, const float (&in)[2][V]) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float dz = A::through(in[0][v], affine.at(v, in[1][v]));
        sums[v] += dz;
        sums[V + v] += dz * (in[1][v] - affine.mean[v]);
      }
    });
  }
  leave_sums<V>(sums, channel, rows.K, partial);
}

// dx = scale * dz - constant - (x - mean) * projection
template <class T, int V, class A>
__global__ void __launch_bounds__(kThreads)
    gradient(Rows rows, const T* dy, const T* x, Vectors vectors, const float* constant,
             const float* projection, T* dx) {
  const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  if (channel >= rows.K) return;
  const Affine<V> affine(vectors, channel);
  float less[V], slope[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    less[v] = constant[channel + v];
    slope[v] = projection[channel + v];
  }
  const T* const inputs[] = {dy, x};
  for_rows<T, V>(rows, inputs, channel, true, [&](int64_t at, const float (&in)[2][V]) {
    float out[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float dz = A::through(in[0][v], affine.at(v, in[1][v]));
      out[v] = affine.scale[v] * dz - less[v] - (in[1][v] - affine.mean[v]) * slope[v];
    }
    Vec<T, V>::store(dx + at, out);
  });
}

// What is as long as the channels.

// The blocks that go through the channels: first those for the live ones, then those for the
// zeroed.
struct ChannelBlocks {
  int K, R,
      row_blocks;  // row_blocks: of the pass over the rows, which left sums (row_blocks, 2, K)
  const int64_t* zeroed_index;

  int live_blocks() const { return ceil_div(K, kColumns); }
  dim3 grid() const { return dim3(live_blocks() + ceil_div(R, kColumns * kColumnRows)); }
};

__device__ inline int zeroed_channel(int live_blocks) {
  return ((blockIdx.x - live_blocks) * kColumnRows + threadIdx.y) * kColumns + threadIdx.x;
}

__device__ inline void move(float* running, int64_t number, double to, float momentum) {
  if (running) running[number] += momentum * (static_cast<float>(to) - running[number]);
}

template <class T>
__global__ void finish_moments(ChannelBlocks channels, int live_blocks, const T* x, double M,
                               const float* partial, const float* bias, const int64_t* kept_index,
                               BatchNormStatistics statistics, int act, float* mean, float* rstd,
                               T* rest) {
  if (static_cast<int>(blockIdx.x) < live_blocks) {
    const int c = blockIdx.x * kColumns + threadIdx.x;
    const bool inside = c < channels.K;
    const double sum = sum_of_column(partial, channels.row_blocks, 2 * channels.K, c, inside);
    const double squares =
        sum_of_column(partial, channels.row_blocks, 2 * channels.K, channels.K + c, inside);
    if (!inside || threadIdx.y != 0) return;
    const double beyond = sum / M, variance = squares / M - beyond * beyond;
    const double positive = variance < 0 ? 0 : variance;  // NaN stays NaN
    const double own_mean = to_float(x[c]) + beyond;
    mean[c] = static_cast<float>(own_mean);
    rstd[c] = static_cast<float>(1 / sqrt(positive + statistics.eps));
    const int64_t number = kept_index ? kept_index[c] : c;
    const double n = statistics.count;
    move(statistics.running_mean, number, own_mean, statistics.momentum);
    move(statistics.running_var, number, positive * (n / (n > 2 ? n - 1 : 1)), statistics.momentum);
    return;
  }
  const int r = zeroed_channel(live_blocks);
  if (r >= channels.R) return;
  const int64_t number = channels.zeroed_index[r];
  rest[r] = from_float<T>(activate(act, bias[number]));
  move(statistics.running_mean, number, 0, statistics.momentum);
  move(statistics.running_var, number, 0, statistics.momentum);
}

template <class T>
__global__ void finish_gradient(ChannelBlocks channels, int live_blocks, double M,
                                const float* partial, Vectors vectors, const T* drest, int act,
                                float* constant, float* projection, float* dweight, float* dbias) {
  if (static_cast<int>(blockIdx.x) < live_blocks) {
    const int c = blockIdx.x * kColumns + threadIdx.x;
    const bool inside = c < channels.K;
    const double sum = sum_of_column(partial, channels.row_blocks, 2 * channels.K, c, inside);
    const double products =
        sum_of_column(partial, channels.row_blocks, 2 * channels.K, channels.K + c, inside);
    if (!inside || threadIdx.y != 0) return;
    const int64_t number = vectors.number(c);
    const double rstd = vectors.rstd[c], scale = rstd * vectors.weight[number];
    dbias[number] = static_cast<float>(sum);
    dweight[number] = static_cast<float>(products * rstd);
    constant[c] = static_cast<float>(scale * sum / M);
    projection[c] = static_cast<float>(scale * products * rstd * rstd / M);
    return;
  }
  const int r = zeroed_channel(live_blocks);
  if (r >= channels.R) return;
  const int64_t number = channels.zeroed_index[r];
  dbias[number] = drest ? through_activation(act, to_float(drest[r]), vectors.bias[number]) : 0.0f;
  dweight[number] = 0;
}

__global__ void clear_both(float* a, float* b, int count) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) a[i] = b[i] = 0;
}

// Launches.

// The blocks over M rows: fewer where each leaves sums.
struct RowBlocks {
  Tile tile;
  Chunks sums, images;

  RowBlocks(const BatchNormActShape& s, int V)
      : tile(s.K, V), sums(s.M, tile, kPerProcessorSums), images(s.M, tile, kPerProcessor) {}

  Rows rows(const BatchNormActShape& s, const Chunks& chunks) const {
    return {s.M, chunks.size, s.K};
  }
  dim3 grid(const Chunks& chunks) const { return dim3(chunks.count, tile.slices); }
  dim3 block() const { return dim3(tile.groups, tile.rows); }
};

template <class T, int V>
const char* forward(const BatchNormActShape& s, const T* x, Vectors vectors,
                    const int64_t* zeroed_index, BatchNormStatistics statistics, T* y, T* rest,
                    float* mean, float* rstd, float* scratch, void* stream) {
  const RowBlocks blocks(s, V);
  if (const char* failure = launch(&moments<T, V>, blocks.grid(blocks.sums), blocks.block(), stream,
                                   blocks.rows(s, blocks.sums), x, scratch)) {
    return failure;
  }
  const ChannelBlocks channels{s.K, s.R, blocks.sums.count, zeroed_index};
  if (const char* failure =
          launch(&finish_moments<T>, channels.grid(), dim3(kColumns, kColumnRows), stream, channels,
                 channels.live_blocks(), x, static_cast<double>(s.M), scratch, vectors.bias,
                 vectors.kept_index, statistics, s.act, mean, rstd, rest)) {
    return failure;
  }
  return with_activation(s.act, [&](auto act) {
    return launch(&apply<T, V, decltype(act)>, blocks.grid(blocks.images), blocks.block(), stream,
                  blocks.rows(s, blocks.images), x, vectors, y);
  });
}

template <class T, int V>
const char* backward(const BatchNormActShape& s, const T* dy, const T* drest, const T* x,
                     Vectors vectors, const int64_t* zeroed_index, T* dx, float* dweight,
                     float* dbias, float* scratch, void* stream) {
  const RowBlocks blocks(s, V);
  if (s.K + s.R < s.C) {  // channels that are in neither list
    if (const char* failure = launch(&clear_both, dim3(ceil_div(s.C, kThreads)), dim3(kThreads),
                                     stream, dweight, dbias, s.C)) {
      return failure;
    }
  }
  float *constant = scratch, *projection = scratch + s.K, *partial = scratch + 2 * s.K;
  return with_activation(s.act, [&](auto act) {
    using A = decltype(act);
    if (const char* failure =
            launch(&gradient_sums<T, V, A>, blocks.grid(blocks.sums), blocks.block(), stream,
                   blocks.rows(s, blocks.sums), dy, x, vectors, partial)) {
      return failure;
    }
    const ChannelBlocks channels{s.K, s.R, blocks.sums.count, zeroed_index};
    if (const char* failure =
            launch(&finish_gradient<T>, channels.grid(), dim3(kColumns, kColumnRows), stream,
                   channels, channels.live_blocks(), static_cast<double>(s.M), partial, vectors,
                   drest, s.act, constant, projection, dweight, dbias)) {
      return failure;
    }
    return launch(&gradient<T, V, A>, blocks.grid(blocks.images), blocks.block(), stream,
                  blocks.rows(s, blocks.images), dy, x, vectors, constant, projection, dx);
  });
}

template <class T>
bool vectors_fit(const BatchNormActShape& s, const void* a, const void* b, const void* c) {
  return s.K % kLanes<T> == 0 && aligned(a) && aligned(b) && aligned(c);
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

int64_t sacl_cuda_batch_norm_act_scratch(BatchNormActShape shape) {
  int chunks = 0;
  with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    chunks = std::max(RowBlocks(shape, 1).sums.count, RowBlocks(shape, kLanes<T>).sums.count);
    return static_cast<const char*>(nullptr);
  });
  return 2 * static_cast<int64_t>(shape.K) * (1 + chunks);
}

const char* sacl_cuda_batch_norm_act(BatchNormActShape shape, const void* x, const float* weight,
                                     const float* bias, const int64_t* kept_index,
                                     const int64_t* zeroed_index, BatchNormStatistics statistics,
                                     void* y, void* rest, float* mean, float* rstd, float* scratch,
                                     void* stream) {
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = vectors_fit<T>(shape, x, y, nullptr) ? &forward<T, kLanes<T>> : &forward<T, 1>;
    return run(shape, static_cast<const T*>(x), Vectors{weight, bias, kept_index, mean, rstd},
               zeroed_index, statistics, static_cast<T*>(y), static_cast<T*>(rest), mean, rstd,
               scratch, stream);
  });
}

const char* sacl_cuda_batch_norm_act_backward(BatchNormActShape shape, const void* dy,
                                              const void* drest, const void* x, const float* weight,
                                              const float* bias, const int64_t* kept_index,
                                              const int64_t* zeroed_index, const float* mean,
                                              const float* rstd, void* dx, float* dweight,
                                              float* dbias, float* scratch, void* stream) {
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto run = vectors_fit<T>(shape, dy, x, dx) ? &backward<T, kLanes<T>> : &backward<T, 1>;
    return run(shape, static_cast<const T*>(dy), static_cast<const T*>(drest),
               static_cast<const T*>(x), Vectors{weight, bias, kept_index, mean, rstd},
               zeroed_index, static_cast<T*>(dx), dweight, dbias, scratch, stream);
  });
}
}
