// The gradient of a depthwise convolution's weight: for each tap and channel the sum of x times dy
// over all outputs. Strips, vectors of channels and index lists are as in
// depthwise_conv_kernels.cu.
//
// A thread keeps the sums of all taps of its channels (of one row of taps at 5x5 and 7x7) in
// registers while it walks through its strips; each block leaves the sums of its threads, and a
// second kernel adds those up.
#include "cuda/depthwise_conv.h"

namespace sacl::cuda {
namespace {

// Outputs of a strip: as many as leave registers for the sums of all taps.
template <int V, int S>
constexpr int kWeightStrip = V == 1 ? 8 : (S == 1 ? (V == 4 ? 4 : 3) : 2);
constexpr int kWeightThreads = 128;  // of a block: more would not have the registers for the sums

// Rows of the window whose sums one thread keeps there; the others are other threads'.
template <int K>
constexpr int kWeightRows = K == 3 ? 3 : 1;

constexpr int kPerProcessor = 3;  // one wave: each block leaves sums to be added up

// partial (blocks, taps, K): the weight's gradient over a block's strips of dy.
template <class T, int V, int K, int S>
__global__ void __launch_bounds__(kWeightThreads, 3)
    weight_sums(Problem p, const T* x, const T* dy, const int64_t* source, float* partial) {
  constexpr int L = kWeightStrip<V, S>, kRows = kWeightRows<K>, kColumnsRead = (L - 1) * S + K;
  constexpr bool kLoadAhead = K == 3;  // as in depthwise_conv_kernels.cu
  __shared__ float buffer[kSumBuffer<kRows * K * V, kWeightThreads>];
  const DepthwiseConvShape& s = p.s;
  const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * V, top = threadIdx.z * kRows;
  const bool inside = channel < s.K;
  const int from = inside ? source_of(source, channel, s.C) : 0;
  float sums[kRows * K * V];
  clear(sums);
  const int stop = inside ? min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk) : 0;
  for (int strip = blockIdx.x * p.chunk + threadIdx.y; strip < stop; strip += blockDim.y) {
    int n, row, at;
    p.locate(strip, n, row, at);
    Vec<T, V> gradient[L];
    load_columns(gradient,
                 dy + ((static_cast<int64_t>(n) * s.OH + row) * s.OW + at * L) * s.K + channel, s.K,
                 at * L, s.OW);
    const int left = at * L * S - s.pad_w;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int h = row * S - s.pad_h + top + r;
      const bool there = static_cast<unsigned>(h) < static_cast<unsigned>(s.H);
      if (!kLoadAhead && !there) continue;
      Vec<T, V> in[kColumnsRead];
      load_columns(in, x + ((static_cast<int64_t>(n) * s.H + h) * s.W + left) * s.C + from, s.C,
                   left, there ? s.W : 0);
#pragma unroll
      for (int i = 0; i < kColumnsRead; ++i) {
        float value[V];
        in[i].unpack(value);
#pragma unroll
        for (int kw = i % S; kw < K; kw += S) {
          const int t = (i - kw) / S;
          if (i < kw || t >= L) continue;
          float g[V];
          gradient[t].unpack(g);
#pragma unroll
          for (int v = 0; v < V; ++v) sums[(r * K + kw) * V + v] += g[v] * value[v];
        }
      }
    }
  }
  sum_rows_of_block<kWeightThreads>(buffer, sums);
  if (threadIdx.y != 0 || !inside) return;
  float* own = partial + (static_cast<int64_t>(blockIdx.x) * K + top) * K * s.K + channel;
#pragma unroll
  for (int tap = 0; tap < kRows * K; ++tap) {
#pragma unroll
    for (int v = 0; v < V; ++v) own[static_cast<int64_t>(tap) * s.K + v] = sums[tap * V + v];
  }
}

// blockIdx.z: the tap.
template <class T>
__global__ void weight_sums_any(Problem p, const T* x, const T* dy, const int64_t* source,
                                float* partial) {
  __shared__ float buffer[kSumBuffer<1>];
  const DepthwiseConvShape& s = p.s;
  const int channel = blockIdx.y * blockDim.x + threadIdx.x;
  const int kh = blockIdx.z / s.kw, kw = blockIdx.z % s.kw;
  const bool inside = channel < s.K;
  const int from = inside ? source_of(source, channel, s.C) : 0;
  float sum[1] = {0};
  const int stop = inside ? min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk) : 0;
  for (int strip = blockIdx.x * p.chunk + threadIdx.y; strip < stop; strip += blockDim.y) {
    int n, row, column;
    p.locate(strip, n, row, column);
    const int h = row * s.stride_h - s.pad_h + kh * s.dilation_h;
    const int w = column * s.stride_w - s.pad_w + kw * s.dilation_w;
    if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
    const int64_t read = (static_cast<int64_t>(n) * s.H + h) * s.W + w;
    const int64_t written = (static_cast<int64_t>(n) * s.OH + row) * s.OW + column;
    sum[0] += to_float(x[read * s.C + from]) * to_float(dy[written * s.K + channel]);
  }
  sum_rows_of_block(buffer, sum);
  const int64_t line = static_cast<int64_t>(blockIdx.x) * s.kh * s.kw + blockIdx.z;
  if (threadIdx.y == 0 && inside) partial[line * s.K + channel] = sum[0];
}

// The launch of the first stage, whose blocks say how much scratch it takes.
struct WeightLaunch {
  Tile tile;
  Problem p;
  int depth;  // threads for rows of the window

  WeightLaunch(const DepthwiseConvShape& s, int V, int strip, int depth)
      : tile(s.K, V, depth, kWeightThreads), p(s, s.OW, s.OH, strip, 0, tile, kPerProcessor),
        depth(depth) {}

  int blocks() const { return p.blocks(); }
  dim3 block() const { return dim3(tile.groups, tile.rows, depth); }
};

// `f` with the launch and, as types, the window and the lanes; `any` with the launch alone.
template <class T, class F, class Any>
const char* with_weight_launch(const DepthwiseConvShape& s, bool vectors, const F& f,
                               const Any& any) {
  return with_window(
      s,
      [&](auto window) {
        return with_lanes<T>(vectors, [&](auto lanes) {
          constexpr int V = decltype(lanes)::kCount, K = window.kSize;
          const WeightLaunch first_stage(s, V, kWeightStrip<V, window.kStride>, K / kWeightRows<K>);
          return f(first_stage, window, lanes);
        });
      },
      [&] { return any(WeightLaunch(s, 1, 1, 1)); });
}

template <class T>
const char* weight_gradient(const DepthwiseConvShape& s, const T* x, const T* dy,
                            const int64_t* in_index, T* dweight, float* partial, void* stream) {
  int blocks = 0;
  const char* failure = with_weight_launch<T>(
      s, vectors_fit<T>(s, in_index, x, dy),
      [&](const WeightLaunch& first_stage, auto window, auto lanes) {
        blocks = first_stage.blocks();
        return launch(&weight_sums<T, decltype(lanes)::kCount, window.kSize, window.kStride>,
                      first_stage.p.grid(first_stage.tile), first_stage.block(), stream,
                      first_stage.p, x, dy, in_index, partial);
      },
      [&](const WeightLaunch& first_stage) {
        blocks = first_stage.blocks();
        const dim3 grid(blocks, first_stage.tile.slices, s.kh * s.kw);
        return launch(&weight_sums_any<T>, grid, first_stage.block(), stream, first_stage.p, x, dy,
                      in_index, partial);
      });
  if (failure) return failure;
  return add_up_weight(partial, blocks, s, dweight, stream);
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

int64_t sacl_cuda_depthwise_conv_backward_weight_scratch(DepthwiseConvShape shape) {
  int blocks = 0;
  const auto most = [&](const WeightLaunch& first_stage, auto...) {
    blocks = std::max(blocks, first_stage.blocks());
    return static_cast<const char*>(nullptr);
  };
  for (const bool vectors : {false, true}) {
    with_type(shape.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      return with_weight_launch<T>(shape, vectors, most, most);
    });
  }
  return static_cast<int64_t>(blocks) * shape.kh * shape.kw * shape.K;
}

const char* sacl_cuda_depthwise_conv_backward_weight(DepthwiseConvShape shape, const void* x,
                                                     const void* dy, const int64_t* in_index,
                                                     void* dweight, float* partial, void* stream) {
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return weight_gradient<T>(shape, static_cast<const T*>(x), static_cast<const T*>(dy), in_index,
                              static_cast<T*>(dweight), partial, stream);
  });
}
}
