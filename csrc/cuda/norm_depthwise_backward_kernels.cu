// The gradients of depthwise convolution between batch norms, in one kernel. The gradient of its
// output, dy, is formed of g and of the raw output y as these are loaded; the gradient of its input
// goes through the activation before it and leaves the sums of that norm's backward pass; the
// weight's is of the input as it was normalised. So g, y and x are read and dx is written once.
//
// Going down its strip, a thread keeps the rows of dy that it needs in shared memory of its own,
// and the sums of all taps of the weight in registers: a value of dy in the window meets a tap for
// dx and a value of x for the tap. At stride S a row of dy comes with S rows and S times the
// columns of x; which taps meet which is then known when this is compiled. Sums are in fp32; blocks
// leave theirs to be added up.
//
// Windows and index lists are as in depthwise_conv_kernels.cu.
#include "cuda/norm_depthwise.h"

namespace sacl::cuda {
namespace {

// Columns of dy that a strip begins with: as many as leave registers for the sums of all taps.
template <class T, int K, int S>
constexpr int kStrip = K == 3 ? (S == 1 ? 7 : 4) : (S == 1 ? (sizeof(T) == 4 ? 3 : 4) : 2);

// Blocks on a multiprocessor, all of which run at a time.
template <int V, int K>
constexpr int kPerProcessor = V == 1 && K != 7 ? 4 : 3;

// Activations whose slope is that at their own value.
template <class A>
constexpr bool kSlopeOfValue =
    std::is_same_v<A, None> || std::is_same_v<A, Relu> || std::is_same_v<A, Relu6>;

// Where dy and x meet: the rows of dy, and the columns, that have an x at their stride.
struct Meeting {
  int first, count;

  Meeting(int size, int pad, int stride)
      : first(pad / stride), count((size - 1 + pad) / stride - first + 1) {}
};

// dx (N, H, W, C) of g, y (N, OH, OW, K) and x (N, H, W, C), where filters[c] is that of channel c,
// -1: none. gsums (blocks, 2, C) or null; partial (blocks, taps, K), the weight's gradient.
template <class T, int V, bool GATHERED, int K, int S>
__global__ void __launch_bounds__(kWalkThreads, kPerProcessor<V, K>)
    norm_gradients(Walks walks, int first_row, int first_column, const T* g, const T* y,
                   const float* coefficients, const T* x, const float* affine, int act,
                   int act_backward, const T* weight, const int64_t* filters, T* dx, float* gsums,
                   float* partial) {
  constexpr int kWidth = kGroups * V, L = kStrip<T, K, S>, kColumns = L * S;
  constexpr int kHeld = (K + S - 1) / S, kColumnsHeld = L + kHeld - 1;  // of dy
  constexpr int kRing = kHeld * kColumnsHeld * kWalkThreads * V;
  constexpr int kBuffer = kSumBuffer<K * K * V, kWalkThreads>;
  __shared__ __align__(16) float taps[K * K * kWidth];
  __shared__ __align__(16) float memory[kRing > kBuffer ? kRing : kBuffer];
  const DepthwiseConvShape& s = walks.s;
  const int width = blockDim.x * V, first = blockIdx.y * width;
  const int own = threadIdx.x * V, channel = first + own;
  stage_weight<K * K, kWidth>(taps, weight, first, width, s.C, s.K, filters, true, false);
  __syncthreads();
  const bool inside = channel < s.C;
  const Channels<V> filter(filters, channel, s.K, inside);
  const int apart = filter.at(V - 1) - filter.at(0);
  const Normalisation<V> norm(affine, Channels<V>(nullptr, channel, s.C, inside), s.C);
  const Gradient<V> gradient(coefficients, filter, s.K);
  float* const held = memory + (threadIdx.y * blockDim.x + threadIdx.x) * V;
  float tap_sums[K * K * V], sums[2 * V];  // sums: of dx, of dx (x - mean)
  clear(tap_sums), clear(sums);
  const int stop = inside ? walks.stop() : 0;
  for (int walk = walks.first(); walk < stop; walk += blockDim.y) {
    int n, strip, top, bottom;
    walks.locate(walk, n, strip, top, bottom);
    top += first_row, bottom += first_row;
    const int begin = first_column + strip * L, left = begin - (kHeld - 1);
    const int x_left = begin * S - s.pad_w;
    const unsigned dy_columns = filter.any() ? columns_inside<kColumnsHeld>(left, s.OW) : 0;
    const unsigned x_columns = columns_inside<kColumns>(x_left, s.W);
    int row = top - (kHeld - 1), h = top * S - s.pad_h, head = 0;
    const int64_t from =
        ((static_cast<int64_t>(n) * s.OH + row) * s.OW + left) * s.K + filter.at(0);
    const int64_t to = ((static_cast<int64_t>(n) * s.H + h) * s.W + x_left) * s.C + channel;
    const T *g_row = g + from, *y_row = y + from, *x_row = x + to;
    T* dx_row = dx + to;
    Vec<T, V> next_g[kColumnsHeld], next_y[kColumnsHeld];
    unsigned there = row >= 0 && row < s.OH ? dy_columns : 0;
    load_row<GATHERED>(next_g, g_row, s.K, apart, there);
    load_row<GATHERED>(next_y, y_row, s.K, apart, y ? there : 0);
    for (; row < bottom; ++row) {
#pragma unroll
      for (int c = 0; c < kColumnsHeld; ++c) {
        float of_g[V], of_y[V], dy[V];
        next_g[c].unpack(of_g), next_y[c].unpack(of_y);
#pragma unroll
        for (int v = 0; v < V; ++v)
          dy[v] = there >> c & 1 ? gradient.at(v, of_g[v], of_y[v]) : 0.0f;
        Vec<float, V>::store(held + (head * kColumnsHeld + c) * kWalkThreads * V, dy);
      }
      g_row += static_cast<int64_t>(s.OW) * s.K, y_row += static_cast<int64_t>(s.OW) * s.K;
      there = row + 1 >= 0 && row + 1 < s.OH ? dy_columns : 0;
      load_row<GATHERED>(next_g, g_row, s.K, apart, there);
      load_row<GATHERED>(next_y, y_row, s.K, apart, y ? there : 0);
#pragma unroll
      for (int r = 0; r < S; ++r) {
        if (row < top) break;
        const unsigned x_there = h >= 0 && h < s.H ? x_columns : 0;
        Vec<T, V> in[kColumns];
        load_row<false>(in, x_row, s.C, 0, filter.any() ? x_there : 0);
        if constexpr (GATHERED) {  // what no filter reads may be NaN
#pragma unroll
          for (int i = 0; i < kColumns; ++i) in[i] = in[i].kept(filter.has(0), filter.has(1));
        }
        float values[kColumns][V], out[kColumns][V];
        with_the_activation(act,
                            [&](auto a) { normalise<decltype(a)>(norm, in, x_there, values); });
#pragma unroll
        for (int i = 0; i < kColumns; ++i) clear(out[i]);
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
          const int kh = r + S * j;
          if (kh >= K) continue;
          const float* line =
              held + (head < j ? head - j + kHeld : head - j) * kColumnsHeld * kWalkThreads * V;
          float tap[K][V];
#pragma unroll
          for (int kw = 0; kw < K; ++kw)
            Vec<float, V>::load_shared(taps + (kh * K + kw) * kWidth + own).unpack(tap[kw]);
#pragma unroll
          for (int c = 0; c < kColumnsHeld; ++c) {
            float dy[V];
            Vec<float, V>::load_shared(line + c * kWalkThreads * V).unpack(dy);
#pragma unroll
            for (int kw = 0; kw < K; ++kw) {
              const int t = c - (kHeld - 1) + kw / S, i = t * S + kw % S;
              if (t < 0 || t >= L) continue;
#pragma unroll
              for (int v = 0; v < V; ++v) {
                out[i][v] += dy[v] * tap[kw][v];
                tap_sums[(kh * K + kw) * V + v] += dy[v] * values[i][v];
              }
            }
          }
        }
        with_the_activation(act_backward, [&](auto a) {
          using A = decltype(a);
#pragma unroll
          for (int i = 0; i < kColumns; ++i) {
            float of_x[V];
            in[i].unpack(of_x);
#pragma unroll
            for (int v = 0; v < V; ++v)
              out[i][v] = A::through(
                  out[i][v], kSlopeOfValue<A> ? values[i][v] : norm.before_activation(v, of_x[v]));
          }
        });
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          if (!(x_there >> i & 1)) continue;
          float of_x[V];
          in[i].unpack(of_x);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            sums[v] += out[i][v];
            sums[V + v] += out[i][v] * (of_x[v] - norm.mean[v]);
          }
          Vec<T, V>::store(dx_row + static_cast<int64_t>(i) * s.C, out[i]);
        }
        ++h, x_row += static_cast<int64_t>(s.W) * s.C, dx_row += static_cast<int64_t>(s.W) * s.C;
      }
      head = head + 1 == kHeld ? 0 : head + 1;
    }
  }
  __syncthreads();
  sum_rows_of_block<kWalkThreads>(memory, tap_sums);
  sum_rows_of_block<kWalkThreads>(memory, sums);
  if (threadIdx.y != 0 || !inside) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (!filter.has(v)) continue;
    float* of_taps = partial + static_cast<int64_t>(blockIdx.x) * K * K * s.K + filter.of[v];
#pragma unroll
    for (int tap = 0; tap < K * K; ++tap)
      of_taps[static_cast<int64_t>(tap) * s.K] = tap_sums[tap * V + v];
  }
  if (!gsums) return;
  float* of_norm = gsums + static_cast<int64_t>(blockIdx.x) * 2 * s.C + channel;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    of_norm[v] = sums[v];
    of_norm[s.C + v] = sums[V + v] * affine[3 * s.C + channel + v];
  }
}

// Any window.

template <class T>
__global__ void norm_input_of_any(Problem p, const T* g, const T* y, const float* coefficients,
                                  const T* x, const float* affine, int act_backward,
                                  const T* weight, const int64_t* filters, T* dx, float* gsums) {
  __shared__ float buffer[kSumBuffer<2>];
  const DepthwiseConvShape& s = p.s;
  const int channel = blockIdx.y * blockDim.x + threadIdx.x;
  const bool inside = channel < s.C;
  const Channels<1> filter(filters, channel, s.K, inside);
  const Normalisation<1> norm(affine, Channels<1>(nullptr, channel, s.C, inside), s.C);
  const Gradient<1> gradient(coefficients, filter, s.K);
  float sums[2] = {0, 0};
  const int stop = inside ? min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk) : 0;
  for (int strip = blockIdx.x * p.chunk + threadIdx.y; strip < stop; strip += blockDim.y) {
    int n, row, column;
    p.locate(strip, n, row, column);
    const int64_t at = ((static_cast<int64_t>(n) * s.H + row) * s.W + column) * s.C + channel;
    float sum = 0;
    for (int kh = 0; kh < s.kh && filter.has(0); ++kh) {
      const int high = row + s.pad_h - kh * s.dilation_h, h = high / s.stride_h;
      if (high < 0 || high % s.stride_h || h >= s.OH) continue;
      for (int kw = 0; kw < s.kw; ++kw) {
        const int wide = column + s.pad_w - kw * s.dilation_w, w = wide / s.stride_w;
        if (wide < 0 || wide % s.stride_w || w >= s.OW) continue;
        const int64_t from = ((static_cast<int64_t>(n) * s.OH + h) * s.OW + w) * s.K + filter.of[0];
        sum += gradient.at(0, to_float(g[from]), y ? to_float(y[from]) : 0.0f) *
               to_float(weight[(static_cast<int64_t>(filter.of[0]) * s.kh + kh) * s.kw + kw]);
      }
    }
    if (filter.has(0) && gsums) {
      const float raw = to_float(x[at]);
      sum = through_activation(act_backward, sum, norm.before_activation(0, raw));
      sums[0] += sum;
      sums[1] += sum * (raw - norm.mean[0]);
    }
    dx[at] = from_float<T>(sum);
  }
  sum_rows_of_block(buffer, sums);
  if (threadIdx.y != 0 || !inside || !gsums) return;
  float* own = gsums + static_cast<int64_t>(blockIdx.x) * 2 * s.C + channel;
  own[0] = sums[0];
  own[s.C] = sums[1] * affine[3 * s.C + channel];
}

// blockIdx.z: the tap.
template <class T>
__global__ void norm_weight_sums_any(Problem p, const T* g, const T* y, const float* coefficients,
                                     const T* x, const float* affine, int act,
                                     const int64_t* source, float* partial) {
  __shared__ float buffer[kSumBuffer<1>];
  const DepthwiseConvShape& s = p.s;
  const int channel = blockIdx.y * blockDim.x + threadIdx.x;
  const int kh = blockIdx.z / s.kw, kw = blockIdx.z % s.kw;
  const bool inside = channel < s.K;
  const Channels<1> from(source, channel, s.C, inside);
  const Normalisation<1> norm(affine, from, s.C);
  const Gradient<1> gradient(coefficients, Channels<1>(nullptr, channel, s.K, inside), s.K);
  float sum[1] = {0};
  const int stop = inside ? min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk) : 0;
  for (int strip = blockIdx.x * p.chunk + threadIdx.y; strip < stop; strip += blockDim.y) {
    int n, row, column;
    p.locate(strip, n, row, column);
    const int h = row * s.stride_h - s.pad_h + kh * s.dilation_h;
    const int w = column * s.stride_w - s.pad_w + kw * s.dilation_w;
    if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
    const float raw =
        to_float(x[((static_cast<int64_t>(n) * s.H + h) * s.W + w) * s.C + from.of[0]]);
    const int64_t at = ((static_cast<int64_t>(n) * s.OH + row) * s.OW + column) * s.K + channel;
    sum[0] += activate(act, norm.before_activation(0, raw)) *
              gradient.at(0, to_float(g[at]), y ? to_float(y[at]) : 0.0f);
  }
  sum_rows_of_block(buffer, sum);
  const int64_t line = static_cast<int64_t>(blockIdx.x) * s.kh * s.kw + blockIdx.z;
  if (threadIdx.y == 0 && inside) partial[line * s.K + channel] = sum[0];
}

// Launches.

struct Images {
  const void *g, *y, *x;
};

// A walk's launch.
struct WalkLaunch {
  Meeting rows, columns;
  Tile tile;
  Walks walks;

  WalkLaunch(const DepthwiseConvShape& s, int V, int strip, int ahead, int per_processor)
      : rows(s.H, s.pad_h, s.stride_h), columns(s.W, s.pad_w, s.stride_w),
        tile(s.C, V, 1, kWalkThreads),
        walks(s, ceil_div(columns.count, strip), rows.count, ahead, tile, per_processor) {}
};

// Those of any window: over x and over dy.
struct AnyLaunch {
  Tile of_input, of_weight;
  Problem input, weight;

  explicit AnyLaunch(const DepthwiseConvShape& s)
      : of_input(s.C, 1), of_weight(s.K, 1),
        input(s, s.W, s.H, 1, 0, of_input, kPerProcessor<1, 3>),
        weight(s, s.OW, s.OH, 1, 0, of_weight, kPerProcessor<1, 3>) {}
};

// `f` with the launch and, as types, the window and the channels taken; `any` with that of any
// window.
template <class T, class F, class Any>
const char* with_launch(const DepthwiseConvShape& s, const Images& images, const int64_t* in_index,
                        const F& f, const Any& any) {
  const bool pairs =
      in_index ? pairs_fit<T>(s.C, {images.x}) : pairs_fit<T>(s.C, {images.g, images.y, images.x});
  return with_window(
      s,
      [&](auto window) {
        constexpr int K = window.kSize, S = window.kStride;
        return with_taken<T, K>(pairs, in_index, [&](auto taken) {
          constexpr int V = taken.kCount;
          return f(WalkLaunch(s, V, kStrip<T, K, S>, (K + S - 1) / S - 1, kPerProcessor<V, K>),
                   window, taken);
        });
      },
      [&] { return any(AnyLaunch(s)); });
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

NormDepthwiseSums sacl_cuda_norm_depthwise_backward_sums(DepthwiseConvShape shape, const void* g,
                                                         const void* y, const void* x,
                                                         const int64_t* in_index) {
  NormDepthwiseSums sums{};
  const int64_t taps = int64_t{shape.kh} * shape.kw * shape.K;
  with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return with_launch<T>(
        shape, {g, y, x}, in_index,
        [&](const WalkLaunch& one, auto...) {
          sums = {one.walks.blocks(), one.walks.blocks() * taps};
          return static_cast<const char*>(nullptr);
        },
        [&](const AnyLaunch& two) {
          sums = {two.input.blocks(), two.weight.blocks() * taps};
          return static_cast<const char*>(nullptr);
        });
  });
  return sums;
}

const char* sacl_cuda_norm_depthwise_backward(DepthwiseConvShape shape, const void* g,
                                              const void* y, const float* coefficients,
                                              const void* x, const float* affine, int act,
                                              const void* weight, const int64_t* in_index,
                                              int64_t* positions, void* dx, float* gsums,
                                              void* dweight, float* partial, void* stream) {
  if (in_index) {
    if (const char* failure =
            sacl_cuda_invert_index(in_index, shape.K, nullptr, 0, positions, shape.C, stream)) {
      return failure;
    }
  }
  const int64_t* filters = in_index ? positions : nullptr;
  const int act_backward = gsums ? act : sacl::kNone;
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *of_g = static_cast<const T*>(g), *of_y = static_cast<const T*>(y);
    const T *of_x = static_cast<const T*>(x), *of_weight = static_cast<const T*>(weight);
    T* of_dx = static_cast<T*>(dx);
    int blocks = 0;
    const char* failure = with_launch<T>(
        shape, {g, y, x}, in_index,
        [&](const WalkLaunch& one, auto window, auto taken) {
          blocks = one.walks.blocks();
          return launch(
              &norm_gradients<T, taken.kCount, taken.kGathered, window.kSize, window.kStride>,
              dim3(blocks, one.tile.slices), dim3(one.tile.groups, one.tile.rows), stream,
              one.walks, one.rows.first, one.columns.first, of_g, of_y, coefficients, of_x, affine,
              act, act_backward, of_weight, filters, of_dx, gsums, partial);
        },
        [&](const AnyLaunch& two) {
          blocks = two.weight.blocks();
          const char* input =
              launch(&norm_input_of_any<T>, two.input.grid(two.of_input),
                     dim3(two.of_input.groups, two.of_input.rows), stream, two.input, of_g, of_y,
                     coefficients, of_x, affine, act_backward, of_weight, filters, of_dx, gsums);
          if (input) return input;
          const dim3 grid(blocks, two.of_weight.slices, shape.kh * shape.kw);
          return launch(&norm_weight_sums_any<T>, grid,
                        dim3(two.of_weight.groups, two.of_weight.rows), stream, two.weight, of_g,
                        of_y, coefficients, of_x, affine, act, in_index, partial);
        });
    if (failure) return failure;
    return add_up_weight(partial, blocks, shape, static_cast<T*>(dweight), stream);
  });
}
}
