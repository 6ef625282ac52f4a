// Depthwise convolution of images in NHWC memory: forward, and the gradient of the input. (That of
// the weight is in depthwise_conv_weight_kernels.cu.)
//
// These are bound by memory: 9 multiplications for 4 bytes in bf16. A thread takes 16 bytes of
// channels (8 in 16-bit types, 4 in fp32) of a strip of outputs beside one another, so a column of
// the window is loaded once for the strip and the rows of neighbouring strips come from the L1
// cache: a block walks through consecutive strips, row after row. The weights of its channels
// lie in shared memory, the last tap first for the input's gradient at stride 1, which is a
// convolution too; at stride 2 only the taps that meet an output are visited. Sums are in fp32.
//
// With an index list channels are gathered one by one, 32 threads taking 32 channels in a row (2 or
// 4 bytes each), and so they are where the number of channels or an address does not suit vectors.
// In the input's gradient that is the inverted list; channels that no filter reads get 0.
//
// Windows other than 3x3, 5x5, 7x7 of stride 1, 2 and dilation 1 go through plain loops.
#include "cuda/depthwise_conv.h"

namespace sacl::cuda {
namespace {

// Outputs of a strip: more share more loads, in more registers.
template <int V, int K, int S>
constexpr int kStrip = V == 1 ? 8 : (K * S < 14 ? 4 : 2);

// Blocks on a multiprocessor, of which two or three run at a time: whole waves in either case.
constexpr int kPerProcessor = 6;

// How weights lie in shared memory. As fp32 where there is room for it: then a vector of them is
// not taken apart again for each strip.
template <class T, int V, int K>
using StagedType = std::conditional_t<K == 3, float, T>;

// V weights of one tap.
template <class T, int V, int K>
struct Staged {
  static constexpr bool kWide = sizeof(StagedType<T, V, K>) > sizeof(T) && V > 1;
  using Part = Vec<StagedType<T, V, K>, V == 1 ? 1 : kLanes<StagedType<T, V, K>>>;
  Part parts[kWide ? 2 : 1];

  __device__ void load(const StagedType<T, V, K>* from) {
    parts[0] = Part::load_shared(from);
    if constexpr (kWide) parts[1] = Part::load_shared(from + V / 2);
  }
  __device__ void unpack(float (&out)[V]) const {
    if constexpr (kWide) {
      float half[V / 2];
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        parts[part].unpack(half);
#pragma unroll
        for (int v = 0; v < V / 2; ++v) out[part * (V / 2) + v] = half[v];
      }
    } else {
      parts[0].unpack(out);
    }
  }
};

// y (N, OH, OW, K) = window over x (N, H, W, C), channel source[c] of it for channel c.
template <class T, int V, int K, int S>
__global__ void __launch_bounds__(kThreads, 2)
    convolve(Problem p, const T* x, const T* weight, const int64_t* source, T* y, bool backwards) {
  constexpr int kWidth = kGroups * V, L = kStrip<V, K, S>, kColumnsRead = (L - 1) * S + K;
  // Without a branch for rows beyond the image, a row's loads start while the one before is summed
  // up. Elsewhere there are no registers for that.
  constexpr bool kLoadAhead = K == 3 && S == 1;
  __shared__ __align__(16) StagedType<T, V, K> taps[K * K * kWidth];
  const DepthwiseConvShape& s = p.s;
  const int width = blockDim.x * V, first = blockIdx.y * width;
  const int own = threadIdx.x * V, channel = first + own;
  stage_weight<K * K, kWidth>(taps, weight, first, width, s.K, s.C, source, backwards, backwards);
  __syncthreads();
  if (channel >= s.K) return;
  const int from = source_of(source, channel, s.C);
  const int high = from < 0 ? 0 : s.H;  // no row is read for a channel that reads none
  const int stop = min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk);
  for (int strip = blockIdx.x * p.chunk + threadIdx.y; strip < stop; strip += blockDim.y) {
    int n, row, at;
    p.locate(strip, n, row, at);
    float sums[L][V];
#pragma unroll
    for (int t = 0; t < L; ++t) clear(sums[t]);
    const int left = at * L * S - s.pad_w;
#pragma unroll(K == 3 ? 3 : 1)
    for (int kh = 0; kh < K; ++kh) {
      const int h = row * S - s.pad_h + kh;
      const bool there = static_cast<unsigned>(h) < static_cast<unsigned>(high);
      if (!kLoadAhead && !there) continue;
      Vec<T, V> in[kColumnsRead];
      load_columns(in, x + ((static_cast<int64_t>(n) * s.H + h) * s.W + left) * s.C + from, s.C,
                   left, there ? s.W : 0);
      Staged<T, V, K> weights[K];
#pragma unroll
      for (int kw = 0; kw < K; ++kw) weights[kw].load(taps + (kh * K + kw) * kWidth + own);
#pragma unroll
      for (int i = 0; i < kColumnsRead; ++i) {
        float value[V];
        in[i].unpack(value);
#pragma unroll
        for (int kw = i % S; kw < K; kw += S) {
          const int t = (i - kw) / S;
          if (i < kw || t >= L) continue;
          float tap[V];
          weights[kw].unpack(tap);
#pragma unroll
          for (int v = 0; v < V; ++v) sums[t][v] += value[v] * tap[v];
        }
      }
    }
    T* out = y + ((static_cast<int64_t>(n) * s.OH + row) * s.OW + at * L) * s.K + channel;
#pragma unroll
    for (int t = 0; t < L; ++t)
      if (at * L + t < s.OW) Vec<T, V>::store(out + static_cast<int64_t>(t) * s.K, sums[t]);
  }
}

// dx (N, H, W, C) at stride 2. Strips start where w + pad_w is even, so which taps meet an output
// is known when this is compiled.
template <class T, int V, int K>
__global__ void __launch_bounds__(kThreads, 2)
    input_of_stride_2(Problem p, const T* dy, const T* weight, const int64_t* source, T* dx) {
  constexpr int kWidth = kGroups * V, L = kStrip<V, K, 1>, kBefore = (K - 1) / 2;
  constexpr int kColumnsRead = L / 2 + kBefore;
  __shared__ __align__(16) StagedType<T, V, K> taps[K * K * kWidth];
  const DepthwiseConvShape& s = p.s;
  const int width = blockDim.x * V, first = blockIdx.y * width;
  const int own = threadIdx.x * V, channel = first + own;
  stage_weight<K * K, kWidth>(taps, weight, first, width, s.C, s.K, source, true, false);
  __syncthreads();
  if (channel >= s.C) return;
  const int from = source_of(source, channel, s.K);
  const int stop = min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk);
  for (int strip = blockIdx.x * p.chunk + threadIdx.y; strip < stop; strip += blockDim.y) {
    int n, row, at;
    p.locate(strip, n, row, at);
    float sums[L][V];
#pragma unroll
    for (int t = 0; t < L; ++t) clear(sums[t]);
    const int left = p.first_strip + at * L, middle = (left + s.pad_w) / 2 - kBefore;
#pragma unroll 1
    for (int kh = (row + s.pad_h) & 1; kh < K; kh += 2) {
      const int h = (row + s.pad_h - kh) / 2;
      if (row + s.pad_h < kh || h >= s.OH || from < 0) continue;
      Vec<T, V> in[kColumnsRead];
      load_columns(in, dy + ((static_cast<int64_t>(n) * s.OH + h) * s.OW + middle) * s.K + from,
                   s.K, middle, s.OW);
#pragma unroll
      for (int i = 0; i < kColumnsRead; ++i) {
        float value[V];
        in[i].unpack(value);
#pragma unroll
        for (int kw = 0; kw < K; ++kw) {
          const int t = 2 * (i - kBefore) + kw;
          if (t < 0 || t >= L) continue;
          Staged<T, V, K> weight_of;
          weight_of.load(taps + (kh * K + kw) * kWidth + own);
          float tap[V];
          weight_of.unpack(tap);
#pragma unroll
          for (int v = 0; v < V; ++v) sums[t][v] += value[v] * tap[v];
        }
      }
    }
    T* out = dx + (static_cast<int64_t>(n) * s.H + row) * s.W * s.C + channel;
#pragma unroll
    for (int t = 0; t < L; ++t) {
      const int w = left + t;
      if (w >= 0 && w < s.W) Vec<T, V>::store(out + static_cast<int64_t>(w) * s.C, sums[t]);
    }
  }
}

// Any window.

template <class T>
__global__ void convolve_any(Problem p, const T* x, const T* weight, const int64_t* source, T* y) {
  const DepthwiseConvShape& s = p.s;
  const int channel = blockIdx.y * blockDim.x + threadIdx.x;
  if (channel >= s.K) return;
  const int from = source_of(source, channel, s.C);
  const int stop = min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk);
  for (int strip = blockIdx.x * p.chunk + threadIdx.y; strip < stop; strip += blockDim.y) {
    int n, row, column;
    p.locate(strip, n, row, column);
    float sum = 0;
    for (int kh = 0; kh < s.kh; ++kh) {
      const int h = row * s.stride_h - s.pad_h + kh * s.dilation_h;
      if (h < 0 || h >= s.H) continue;
      for (int kw = 0; kw < s.kw; ++kw) {
        const int w = column * s.stride_w - s.pad_w + kw * s.dilation_w;
        if (w < 0 || w >= s.W) continue;
        sum += to_float(x[((static_cast<int64_t>(n) * s.H + h) * s.W + w) * s.C + from]) *
               to_float(weight[(static_cast<int64_t>(channel) * s.kh + kh) * s.kw + kw]);
      }
    }
    y[((static_cast<int64_t>(n) * s.OH + row) * s.OW + column) * s.K + channel] =
        from_float<T>(sum);
  }
}

template <class T>
__global__ void input_of_any(Problem p, const T* dy, const T* weight, const int64_t* source,
                             T* dx) {
  const DepthwiseConvShape& s = p.s;
  const int channel = blockIdx.y * blockDim.x + threadIdx.x;
  if (channel >= s.C) return;
  const int filter = source_of(source, channel, s.K);
  const int stop = min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk);
  for (int strip = blockIdx.x * p.chunk + threadIdx.y; strip < stop; strip += blockDim.y) {
    int n, row, column;
    p.locate(strip, n, row, column);
    float sum = 0;
    for (int kh = 0; kh < s.kh && filter >= 0; ++kh) {
      const int high = row + s.pad_h - kh * s.dilation_h, h = high / s.stride_h;
      if (high < 0 || high % s.stride_h || h >= s.OH) continue;
      for (int kw = 0; kw < s.kw; ++kw) {
        const int wide = column + s.pad_w - kw * s.dilation_w, w = wide / s.stride_w;
        if (wide < 0 || wide % s.stride_w || w >= s.OW) continue;
        sum += to_float(dy[((static_cast<int64_t>(n) * s.OH + h) * s.OW + w) * s.K + filter]) *
               to_float(weight[(static_cast<int64_t>(filter) * s.kh + kh) * s.kw + kw]);
      }
    }
    dx[((static_cast<int64_t>(n) * s.H + row) * s.W + column) * s.C + channel] = from_float<T>(sum);
  }
}

// Which kernel runs.

template <class T>
const char* convolution(const DepthwiseConvShape& s, const T* x, const T* weight,
                        const int64_t* source, T* y, bool backwards, bool vectors, void* stream) {
  return with_window(
      s,
      [&](auto window) {
        return with_lanes<T>(vectors, [&](auto lanes) {
          constexpr int V = decltype(lanes)::kCount, K = window.kSize;
          const Tile tile(s.K, V);
          const Problem p(s, s.OW, s.OH, kStrip<V, K, window.kStride>, 0, tile, kPerProcessor);
          return launch(&convolve<T, V, K, window.kStride>, p.grid(tile),
                        dim3(tile.groups, tile.rows), stream, p, x, weight, source, y, backwards);
        });
      },
      [&] {
        const Tile tile(s.K, 1);
        const Problem p(s, s.OW, s.OH, 1, 0, tile, kPerProcessor);
        return launch(&convolve_any<T>, p.grid(tile), dim3(tile.groups, tile.rows), stream, p, x,
                      weight, source, y);
      });
}

// The convolution that gives the input's gradient at stride 1.
DepthwiseConvShape transposed(DepthwiseConvShape s) {
  DepthwiseConvShape t = s;
  t.H = s.OH, t.W = s.OW, t.C = s.K, t.OH = s.H, t.OW = s.W, t.K = s.C;
  t.pad_h = s.kh - 1 - s.pad_h, t.pad_w = s.kw - 1 - s.pad_w;
  return t;
}

template <class T>
const char* input_gradient(const DepthwiseConvShape& s, const T* dy, const T* weight,
                           const int64_t* source, T* dx, void* stream) {
  const bool vectors = vectors_fit<T>(s, source, dy, dx);
  const auto any = [&] {
    const Tile tile(s.C, 1);
    const Problem p(s, s.W, s.H, 1, 0, tile, kPerProcessor);
    return launch(&input_of_any<T>, p.grid(tile), dim3(tile.groups, tile.rows), stream, p, dy,
                  weight, source, dx);
  };
  return with_window(
      s,
      [&](auto window) {
        if constexpr (window.kStride == 1) {
          return convolution<T>(transposed(s), dy, weight, source, dx, true, vectors, stream);
        } else {
          return with_lanes<T>(vectors, [&](auto lanes) {
            constexpr int V = decltype(lanes)::kCount, strip = kStrip<V, window.kSize, 1>;
            const Tile tile(s.C, V);
            const Problem p(s, s.W, s.H, strip, -(s.pad_w & 1), tile, kPerProcessor);
            return launch(&input_of_stride_2<T, V, window.kSize>, p.grid(tile),
                          dim3(tile.groups, tile.rows), stream, p, dy, weight, source, dx);
          });
        }
      },
      any);
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

const char* sacl_cuda_depthwise_conv(DepthwiseConvShape shape, const void* x, const void* weight,
                                     const int64_t* in_index, void* y, void* stream) {
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return convolution<T>(shape, static_cast<const T*>(x), static_cast<const T*>(weight), in_index,
                          static_cast<T*>(y), false, vectors_fit<T>(shape, in_index, x, y), stream);
  });
}

const char* sacl_cuda_depthwise_conv_backward_input(DepthwiseConvShape shape, const void* dy,
                                                    const void* weight, const int64_t* positions,
                                                    void* dx, void* stream) {
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return input_gradient<T>(shape, static_cast<const T*>(dy), static_cast<const T*>(weight),
                             positions, static_cast<T*>(dx), stream);
  });
}
}
