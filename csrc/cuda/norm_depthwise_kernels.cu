// Depthwise convolution whose input is normalised and activated as it is loaded, and which leaves
// the sums of its output's statistics: x is read and y written once, nothing else moves.
//
// Going down its strip, a thread loads a row of it, ahead of its use, and adds it to the output
// rows that it is part of: one to K of them, held in registers. Sums are in fp32, those of the
// statistics of differences from the first output of the thread, so an offset costs no digits.
//
// Windows and index lists are as in depthwise_conv_kernels.cu.
#include "cuda/norm_depthwise.h"

namespace sacl::cuda {
namespace {

// Outputs of a strip: as many as leave registers for what is loaded ahead. The images of most
// encoders are multiples of 7 wide.
template <class T, int K, int S>
constexpr int kStrip = K == 3 && S == 1 ? 7 : (K == 5 && sizeof(T) == 4 ? 3 : 4);

// Blocks on a multiprocessor, all of which run at a time.
template <int V, int K>
constexpr int kPerProcessor = V == 1 && K != 7 ? 5 : 4;

// y (N, OH, OW, K) = window over the operand of x (N, H, W, C), channel source[c] for channel c.
// sums (blocks, 3, K).
template <class T, int V, bool GATHERED, int K, int S>
__global__ void __launch_bounds__(kWalkThreads, kPerProcessor<V, K>)
    norm_convolve(Walks walks, const T* x, const float* affine, int act, const T* weight,
                  const int64_t* source, T* y, float* sums) {
  constexpr int kWidth = kGroups * V, L = kStrip<T, K, S>, kColumnsRead = (L - 1) * S + K;
  constexpr int kOpen = (K + S - 1) / S;  // output rows that rows still to come are part of
  __shared__ __align__(16) float taps[K * K * kWidth];
  const DepthwiseConvShape& s = walks.s;
  const int width = blockDim.x * V, first = blockIdx.y * width;
  const int own = threadIdx.x * V, channel = first + own;
  stage_weight<K * K, kWidth>(taps, weight, first, width, s.K, s.C, nullptr, false, false);
  __syncthreads();
  const bool inside = channel < s.K;
  const Channels<V> from(source, channel, s.C, inside);
  const int apart = from.at(V - 1) - from.at(0);
  const Normalisation<V> norm(affine, from, s.C);
  int count = 0;
  float origin[V], sum[V], sum_of_squares[V];
  clear(origin), clear(sum), clear(sum_of_squares);
  const int stop = inside ? walks.stop() : 0;
  for (int walk = walks.first(); walk < stop; walk += blockDim.y) {
    int n, strip, top, bottom;
    walks.locate(walk, n, strip, top, bottom);
    const int left = strip * L * S - s.pad_w, columns = min(L, s.OW - strip * L);
    const unsigned columns_there = columns_inside<kColumnsRead>(left, s.W);
    // The row that is loaded next, and the first one that is not.
    int h = top * S - s.pad_h;
    const int last = min(s.H, h + (bottom - top - 1) * S + K);
    const T* in = x + ((static_cast<int64_t>(n) * s.H + h) * s.W + left) * s.C + from.at(0);
    T* out = y + ((static_cast<int64_t>(n) * s.OH + top) * s.OW + strip * L) * s.K + channel;
    Vec<T, V> next[kColumnsRead];
    unsigned next_there = h >= 0 && h < last ? columns_there : 0;
    load_row<GATHERED>(next, in, s.C, apart, next_there);
    float open[kOpen][L][V];  // the one that is complete next is last
#pragma unroll
    for (int j = 0; j < kOpen; ++j) {
#pragma unroll
      for (int t = 0; t < L; ++t) clear(open[j][t]);
    }
    for (int row = top - (kOpen - 1); row < bottom; ++row) {
#pragma unroll
      for (int r = 0; r < S; ++r) {
        float values[kColumnsRead][V];
        with_the_activation(
            act, [&](auto a) { normalise<decltype(a)>(norm, next, next_there, values); });
        ++h, in += static_cast<int64_t>(s.W) * s.C;
        next_there = h >= 0 && h < last ? columns_there : 0;
        load_row<GATHERED>(next, in, s.C, apart, next_there);
#pragma unroll
        for (int j = kOpen - 1; j >= 0; --j) {
          if (r + S * j >= K) continue;
#pragma unroll
          for (int kw = 0; kw < K; ++kw) {
            float tap[V];
            Vec<float, V>::load_shared(taps + ((r + S * j) * K + kw) * kWidth + own).unpack(tap);
#pragma unroll
            for (int t = 0; t < L; ++t) {
#pragma unroll
              for (int v = 0; v < V; ++v) {
                // With its first row an output row moves one on.
                const float before = r || kw ? open[j][t][v] : (j ? open[j - 1][t][v] : 0.0f);
                open[j][t][v] = before + values[t * S + kw][v] * tap[v];
              }
            }
          }
        }
      }
      if (row < top) continue;
      const float (&complete)[L][V] = open[kOpen - 1];
#pragma unroll
      for (int v = 0; v < V; ++v) origin[v] = count ? origin[v] : complete[0][v];
#pragma unroll
      for (int t = 0; t < L; ++t) {
        if (t >= columns) break;
        Vec<T, V>::store(out + static_cast<int64_t>(t) * s.K, complete[t]);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float d = complete[t][v] - origin[v];
          sum[v] += d;
          sum_of_squares[v] += d * d;
        }
      }
      count += columns;
      out += static_cast<int64_t>(s.OW) * s.K;
    }
  }
  Moments<V> moments(count, origin, sum, sum_of_squares);
  moments.template leave<kWalkThreads>(channel, s.K, sums);
}

// Any window.
template <class T>
__global__ void norm_convolve_any(Problem p, const T* x, const float* affine, int act,
                                  const T* weight, const int64_t* source, T* y, float* sums) {
  const DepthwiseConvShape& s = p.s;
  const int channel = blockIdx.y * blockDim.x + threadIdx.x;
  const bool inside = channel < s.K;
  const Channels<1> from(source, channel, s.C, inside);
  const Normalisation<1> norm(affine, from, s.C);
  int count = 0;
  float origin[1] = {0}, total[1] = {0}, total_of_squares[1] = {0};
  const int stop = inside ? min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk) : 0;
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
        const float raw =
            to_float(x[((static_cast<int64_t>(n) * s.H + h) * s.W + w) * s.C + from.at(0)]);
        sum += activate(act, norm.before_activation(0, raw)) *
               to_float(weight[(static_cast<int64_t>(channel) * s.kh + kh) * s.kw + kw]);
      }
    }
    y[((static_cast<int64_t>(n) * s.OH + row) * s.OW + column) * s.K + channel] =
        from_float<T>(sum);
    if (!count) origin[0] = sum;
    ++count;
    total[0] += sum - origin[0];
    total_of_squares[0] += (sum - origin[0]) * (sum - origin[0]);
  }
  Moments<1> moments(count, origin, total, total_of_squares);
  moments.template leave<kThreads>(channel, s.K, sums);
}

// `f` with the walks, their tile and, as types, the window and the channels taken; `any` with
// strips of one output and their tile.
template <class T, class F, class Any>
const char* with_launch(const DepthwiseConvShape& s, const void* x, const int64_t* in_index,
                        const F& f, const Any& any) {
  const bool pairs = in_index ? pairs_fit<T>(s.K, {}) : pairs_fit<T>(s.K, {x});
  return with_window(
      s,
      [&](auto window) {
        constexpr int K = window.kSize, S = window.kStride;
        return with_taken<T, K>(pairs, in_index, [&](auto taken) {
          constexpr int V = taken.kCount;
          const Tile tile(s.K, V, 1, kWalkThreads);
          const Walks walks(s, ceil_div(s.OW, kStrip<T, K, S>), s.OH, (K + S - 1) / S - 1, tile,
                            kPerProcessor<V, K>);
          return f(walks, tile, window, taken);
        });
      },
      [&] {
        const Tile tile(s.K, 1);
        return any(Problem(s, s.OW, s.OH, 1, 0, tile, kPerProcessor<1, 3>), tile);
      });
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

int sacl_cuda_norm_depthwise_sets(DepthwiseConvShape shape, const void* x,
                                  const int64_t* in_index) {
  int sets = 0;
  with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_launch<T>(
        shape, x, in_index,
        [&](const Walks& walks, auto...) {
          sets = walks.blocks();
          return static_cast<const char*>(nullptr);
        },
        [&](const Problem& p, const Tile& tile) {
          sets = static_cast<int>(p.grid(tile).x);
          return static_cast<const char*>(nullptr);
        });
  });
  return sets;
}

const char* sacl_cuda_norm_depthwise(DepthwiseConvShape shape, const void* x, const float* affine,
                                     int act, const void* weight, const int64_t* in_index, void* y,
                                     float* sums, void* stream) {
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_launch<T>(
        shape, x, in_index,
        [&](const Walks& walks, const Tile& tile, auto window, auto taken) {
          return launch(
              &norm_convolve<T, taken.kCount, taken.kGathered, window.kSize, window.kStride>,
              dim3(walks.blocks(), tile.slices), dim3(tile.groups, tile.rows), stream, walks,
              static_cast<const T*>(x), affine, act, static_cast<const T*>(weight), in_index,
              static_cast<T*>(y), sums);
        },
        [&](const Problem& p, const Tile& tile) {
          return launch(&norm_convolve_any<T>, p.grid(tile), dim3(tile.groups, tile.rows), stream,
                        p, static_cast<const T*>(x), affine, act, static_cast<const T*>(weight),
                        in_index, static_cast<T*>(y), sums);
        });
  });
}
}
