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
#include "cuda/norm.h"

namespace sacl::cuda {
namespace {

struct Vectors {  // of the full channels, and where in them the live ones are
  const float *weight, *bias;
  const int64_t* kept_index;
  const float *mean, *rstd;  // of the live ones

  // The number that a live channel has among all.
  __device__ int64_t number(int channel) const { return number_of(kept_index, channel); }

  // y = act(that of x).
  template <int V>
  __device__ Affine<V> affine(int channel) const {
    Affine<V> out;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t of = number(channel + v);
      out.mean[v] = mean[channel + v];
      out.scale[v] = rstd[channel + v] * weight[of];
      out.bias[v] = bias[of];
    }
    return out;
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kThreads) moments(ChannelRows rows, const T* x, float* partial) {
  const int channel = first_channel(V);
  float origin[V], sums[2 * V];
  sum_differences(rows, x, channel, false, origin, sums);
  leave_sums<V>(sums, channel, rows.K, partial);
}

template <class T, int V, class A>
__global__ void __launch_bounds__(kThreads)
    apply(ChannelRows rows, const T* x, Vectors vectors, T* y) {
  const int channel = first_channel(V);
  if (channel >= rows.K) return;
  const Affine<V> affine = vectors.affine<V>(channel);
  const T* const inputs[] = {x};
  for_rows<T, V>(rows, inputs, channel, true, [&](int64_t, int64_t at, const float (&in)[1][V]) {
    float out[V];
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = A::value(affine.at(v, in[0][v]));
    Vec<T, V>::store(y + at, out);
  });
}

template <class T, int V, class A>
__global__ void __launch_bounds__(kThreads)
    gradient_sums(ChannelRows rows, const T* dy, const T* x, Vectors vectors, float* partial) {
  const int channel = first_channel(V);
  float sums[2 * V];  // of dz, of dz (x - mean)
  clear(sums);
  if (channel < rows.K) {
    const Affine<V> affine = vectors.affine<V>(channel);
    const T* const inputs[] = {dy, x};
    for_rows<T, V>(rows, inputs, channel, false, [&](int64_t, int64_t, const float (&in)[2][V]) {
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
    gradient(ChannelRows rows, const T* dy, const T* x, Vectors vectors, const float* constant,
             const float* projection, T* dx) {
  const int channel = first_channel(V);
  if (channel >= rows.K) return;
  const Affine<V> affine = vectors.affine<V>(channel);
  float less[V], slope[V];
  load_channels(constant, channel, less);
  load_channels(projection, channel, slope);
  const T* const inputs[] = {dy, x};
  for_rows<T, V>(rows, inputs, channel, true, [&](int64_t, int64_t at, const float (&in)[2][V]) {
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

using Blocks = ChannelBlocks<kColumns, kColumnRows>;

// row_blocks: of the pass over the rows, which left sums (row_blocks, 2, K).
template <class T>
__global__ void finish_moments(Blocks channels, int row_blocks, const T* x, double M,
                               const float* partial, const float* bias, const int64_t* kept_index,
                               const int64_t* zeroed_index, BatchNormStatistics statistics, int act,
                               float* mean, float* rstd, T* rest) {
  if (channels.are_live()) {
    const int c = channels.live();
    const bool inside = c < channels.K;
    const double sum = sum_of_column(partial, row_blocks, 2 * channels.K, c, inside);
    const double squares =
        sum_of_column(partial, row_blocks, 2 * channels.K, channels.K + c, inside);
    if (!inside || threadIdx.y != 0) return;
    const double beyond = sum / M, variance = squares / M - beyond * beyond;
    const double positive = not_negative(variance);
    const double own_mean = to_float(x[c]) + beyond;
    mean[c] = static_cast<float>(own_mean);
    rstd[c] = static_cast<float>(1 / sqrt(positive + statistics.eps));
    move_running(statistics, number_of(kept_index, c), own_mean, positive);
    return;
  }
  const int r = channels.zeroed();
  if (r >= channels.R) return;
  const int64_t number = zeroed_index[r];
  rest[r] = from_float<T>(activate(act, bias[number]));
  move_running(statistics, number, 0, 0);
}

template <class T>
__global__ void finish_gradient(Blocks channels, int row_blocks, const int64_t* zeroed_index,
                                double M, const float* partial, Vectors vectors, const T* drest,
                                int act, float* constant, float* projection, float* dweight,
                                float* dbias) {
  if (channels.are_live()) {
    const int c = channels.live();
    const bool inside = c < channels.K;
    const double sum = sum_of_column(partial, row_blocks, 2 * channels.K, c, inside);
    const double products =
        sum_of_column(partial, row_blocks, 2 * channels.K, channels.K + c, inside);
    if (!inside || threadIdx.y != 0) return;
    const int64_t number = vectors.number(c);
    const double rstd = vectors.rstd[c], scale = rstd * vectors.weight[number];
    dbias[number] = static_cast<float>(sum);
    dweight[number] = static_cast<float>(products * rstd);
    constant[c] = static_cast<float>(scale * sum / M);
    projection[c] = static_cast<float>(scale * products * rstd * rstd / M);
    return;
  }
  const int r = channels.zeroed();
  if (r >= channels.R) return;
  const int64_t number = zeroed_index[r];
  dbias[number] = drest ? through_activation(act, to_float(drest[r]), vectors.bias[number]) : 0.0f;
  dweight[number] = 0;
}

// Launches.

template <class T, int V>
const char* forward(const BatchNormActShape& s, const T* x, Vectors vectors,
                    const int64_t* zeroed_index, BatchNormStatistics statistics, T* y, T* rest,
                    float* mean, float* rstd, float* scratch, void* stream) {
  const RowBlocks blocks(s.M, s.K, V);
  if (const char* failure = launch(&moments<T, V>, blocks.grid(blocks.sums), blocks.block(), stream,
                                   blocks.rows(blocks.sums), x, scratch)) {
    return failure;
  }
  const Blocks channels(s.K, s.R);
  if (const char* failure =
          launch(&finish_moments<T>, channels.grid(), channels.block(), stream, channels,
                 blocks.sums.count, x, static_cast<double>(s.M), scratch, vectors.bias,
                 vectors.kept_index, zeroed_index, statistics, s.act, mean, rstd, rest)) {
    return failure;
  }
  return with_activation(s.act, [&](auto act) {
    return launch(&apply<T, V, decltype(act)>, blocks.grid(blocks.images), blocks.block(), stream,
                  blocks.rows(blocks.images), x, vectors, y);
  });
}

template <class T, int V>
const char* backward(const BatchNormActShape& s, const T* dy, const T* drest, const T* x,
                     Vectors vectors, const int64_t* zeroed_index, T* dx, float* dweight,
                     float* dbias, float* scratch, void* stream) {
  const RowBlocks blocks(s.M, s.K, V);
  if (s.K + s.R < s.C) {  // channels that are in neither list
    if (const char* failure = launch_clear(dweight, dbias, s.C, stream)) return failure;
  }
  float *constant = scratch, *projection = scratch + s.K, *partial = scratch + 2 * s.K;
  return with_activation(s.act, [&](auto act) {
    using A = decltype(act);
    if (const char* failure =
            launch(&gradient_sums<T, V, A>, blocks.grid(blocks.sums), blocks.block(), stream,
                   blocks.rows(blocks.sums), dy, x, vectors, partial)) {
      return failure;
    }
    const Blocks channels(s.K, s.R);
    if (const char* failure =
            launch(&finish_gradient<T>, channels.grid(), channels.block(), stream, channels,
                   blocks.sums.count, zeroed_index, static_cast<double>(s.M), partial, vectors,
                   drest, s.act, constant, projection, dweight, dbias)) {
      return failure;
    }
    return launch(&gradient<T, V, A>, blocks.grid(blocks.images), blocks.block(), stream,
                  blocks.rows(blocks.images), dy, x, vectors, constant, projection, dx);
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
    chunks = std::max(RowBlocks(shape.M, shape.K, 1).sums.count,
                      RowBlocks(shape.M, shape.K, kLanes<T>).sums.count);
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
