// Depthwise convolution of images in NHWC memory: forward, gradient of the input, of the weight.
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
// In the input's gradient the list is inverted first; channels that no filter reads get 0.
//
// Windows other than 3x3, 5x5, 7x7 of stride 1, 2 and dilation 1 go through plain loops.
#include "cuda/device.h"

namespace sacl::cuda {
namespace {

// Outputs of a strip: more share more loads, in more registers.
template <int V, int K, int S>
constexpr int kStrip = V == 1 ? 8 : (K * S < 14 ? 4 : 2);
// In the weight's gradient, which keeps sums of all taps.
template <int V, int S>
constexpr int kWeightStrip = V == 1 ? 8 : (S == 1 ? 4 : 2);
constexpr int kWeightThreads = 128;  // those sums take registers for more threads
// Rows of the window whose sums one thread keeps there; the others are other threads'.
template <int K>
constexpr int kWeightRows = K == 3 ? 3 : 1;

struct Problem {
  DepthwiseShape s;
  Divisor strips, rows;  // of an output row; of an image
  int first_strip;       // place of the first strip's first number, from `pad_w` before the image
  int count;             // strips in all
  int chunk;             // strips that a block takes

  // `width` numbers in a row from `first` on, `strip` at a time.
  Problem(DepthwiseShape s, int width, int height, int strip, int first, const Tile& tile,
          int per_processor)
      : s(s), strips(ceil_div(width - first, strip)), rows(height), first_strip(first) {
    count = s.N * height * ceil_div(width - first, strip);
    chunk = static_cast<int>(Deal(count, tile, per_processor).chunk);
  }

  dim3 grid(const Tile& tile) const { return dim3(ceil_div(count, chunk), tile.slices); }

  // Which image, row and strip of the row.
  __device__ void place(int strip, int& n, int& row, int& at) const {
    int rest = strip;
    const int line = strips.split(rest);
    at = rest;
    row = line;
    n = rows.split(row);
  }
};

// The channel that is read for channel `c`; -1: none. A wrong index list ends the kernel, as in
// PyTorch's own.
__device__ inline int source_of(const int64_t* source, int c, int channels) {
  if (!source) return c;
  const int64_t from = source[c];
  if (from < -1 || from >= channels) __trap();
  return static_cast<int>(from);
}

// How weights lie in shared memory. As fp32 where there is room for it: then a vector of them is not
// taken apart again for each strip.
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

// The block's slice of the weight (K, taps), tap after tap. `by_source`: channel c's filter is
// source[c], and the last tap is first if `flipped`.
template <int TAPS, int WIDTH, class S, class T>
__device__ void stage_weight(S (&staged)[TAPS * WIDTH], const T* weight, int first, int width,
                             int channels, int filters, const int64_t* source, bool by_source,
                             bool flipped) {
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < width * TAPS;
       i += blockDim.x * blockDim.y) {
    const int channel = i / TAPS, tap = i % TAPS, c = first + channel;
    const int filter = c < channels && by_source ? source_of(source, c, filters) : c;
    const bool there = c < channels && filter >= 0;
    staged[(flipped ? TAPS - 1 - tap : tap) * WIDTH + channel] =
        from_float<S>(there ? to_float(weight[static_cast<int64_t>(filter) * TAPS + tap]) : 0.0f);
  }
}

// N columns beside one another, of which those beyond the image are 0; the first one, at `first`, is
// its column `left`.
template <class T, int V, int N>
__device__ void load_columns(Vec<T, V> (&columns)[N], const T* first, int step, int left,
                             int width) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool inside = static_cast<unsigned>(left + i) < static_cast<unsigned>(width);
    columns[i] = inside ? Vec<T, V>::load(first + i * step) : Vec<T, V>::zero();
  }
}

// y (N, OH, OW, K) = window over x (N, H, W, C), channel source[c] of it for channel c.
template <class T, int V, int K, int S>
__global__ void __launch_bounds__(kThreads, 2)
    convolve(Problem p, const T* x, const T* weight, const int64_t* source, T* y, bool backwards) {
  constexpr int kWidth = kGroups * V, L = kStrip<V, K, S>, kColumnsRead = (L - 1) * S + K;
  __shared__ __align__(16) StagedType<T, V, K> taps[K * K * kWidth];
  const DepthwiseShape& s = p.s;
  const int width = blockDim.x * V, first = blockIdx.y * width;
  const int own = threadIdx.x * V, channel = first + own;
  stage_weight<K * K, kWidth>(taps, weight, first, width, s.K, s.C, source, backwards,
                                 backwards);
  __syncthreads();
  if (channel >= s.K) return;
  const int from = source_of(source, channel, s.C);
  const int high = from < 0 ? 0 : s.H;  // no row is read for a channel that reads none
  const int stop = min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk);
  for (int strip = blockIdx.x * p.chunk + threadIdx.y; strip < stop; strip += blockDim.y) {
    int n, row, at;
    p.place(strip, n, row, at);
    float sums[L][V];
#pragma unroll
    for (int t = 0; t < L; ++t) clear(sums[t]);
    const int left = at * L * S - s.pad_w;
#pragma unroll(K == 3 ? 3 : 1)
    for (int kh = 0; kh < K; ++kh) {
      const int h = row * S - s.pad_h + kh;
      if (static_cast<unsigned>(h) >= static_cast<unsigned>(high)) continue;
      Vec<T, V> in[kColumnsRead];
      load_columns(in, x + ((static_cast<int64_t>(n) * s.H + h) * s.W + left) * s.C + from, s.C,
                   left, s.W);
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
  const DepthwiseShape& s = p.s;
  const int width = blockDim.x * V, first = blockIdx.y * width;
  const int own = threadIdx.x * V, channel = first + own;
  stage_weight<K * K, kWidth>(taps, weight, first, width, s.C, s.K, source, true, false);
  __syncthreads();
  if (channel >= s.C) return;
  const int from = source_of(source, channel, s.K);
  const int stop = min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk);
  for (int strip = blockIdx.x * p.chunk + threadIdx.y; strip < stop; strip += blockDim.y) {
    int n, row, at;
    p.place(strip, n, row, at);
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

// partial (blocks, taps, K): the weight's gradient over a block's strips of dy.
template <class T, int V, int K, int S>
__global__ void __launch_bounds__(kWeightThreads, 3)
    weight_sums(Problem p, const T* x, const T* dy, const int64_t* source, float* partial) {
  constexpr int L = kWeightStrip<V, S>, kRows = kWeightRows<K>, kColumnsRead = (L - 1) * S + K;
  __shared__ float buffer[kSumBuffer<kRows * K * V, kWeightThreads>];
  const DepthwiseShape& s = p.s;
  const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * V, top = threadIdx.z * kRows;
  const bool inside = channel < s.K;
  const int from = inside ? source_of(source, channel, s.C) : 0;
  float sums[kRows * K * V];
  clear(sums);
  const int stop = inside ? min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk) : 0;
  for (int strip = blockIdx.x * p.chunk + threadIdx.y; strip < stop; strip += blockDim.y) {
    int n, row, at;
    p.place(strip, n, row, at);
    Vec<T, V> gradient[L];
    load_columns(gradient,
                 dy + ((static_cast<int64_t>(n) * s.OH + row) * s.OW + at * L) * s.K + channel, s.K,
                 at * L, s.OW);
    const int left = at * L * S - s.pad_w;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int h = row * S - s.pad_h + top + r;
      if (static_cast<unsigned>(h) >= static_cast<unsigned>(s.H)) continue;
      Vec<T, V> in[kColumnsRead];
      load_columns(in, x + ((static_cast<int64_t>(n) * s.H + h) * s.W + left) * s.C + from, s.C,
                   left, s.W);
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

// dweight (K, taps) of partial (count, taps, K).
template <class T>
__global__ void finish_weight(const float* partial, int count, int taps, int K, T* dweight) {
  const int column = blockIdx.x * kColumns + threadIdx.x, columns = taps * K;
  const bool inside = column < columns;
  const double sum = sum_of_column(partial, count, columns, column, inside);
  if (inside && threadIdx.y == 0)
    dweight[static_cast<int64_t>(column % K) * taps + column / K] =
        from_float<T>(static_cast<float>(sum));
}

// ---- any window ----

template <class T>
__global__ void convolve_any(Problem p, const T* x, const T* weight, const int64_t* source, T* y) {
  const DepthwiseShape& s = p.s;
  const int channel = blockIdx.y * blockDim.x + threadIdx.x;
  if (channel >= s.K) return;
  const int from = source_of(source, channel, s.C);
  const int stop = min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk);
  for (int strip = blockIdx.x * p.chunk + threadIdx.y; strip < stop; strip += blockDim.y) {
    int n, row, column;
    p.place(strip, n, row, column);
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
  const DepthwiseShape& s = p.s;
  const int channel = blockIdx.y * blockDim.x + threadIdx.x;
  if (channel >= s.C) return;
  const int filter = source_of(source, channel, s.K);
  const int stop = min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk);
  for (int strip = blockIdx.x * p.chunk + threadIdx.y; strip < stop; strip += blockDim.y) {
    int n, row, column;
    p.place(strip, n, row, column);
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
    dx[((static_cast<int64_t>(n) * s.H + row) * s.W + column) * s.C + channel] =
        from_float<T>(sum);
  }
}

// blockIdx.z: the tap.
template <class T>
__global__ void weight_sums_any(Problem p, const T* x, const T* dy, const int64_t* source,
                                float* partial) {
  __shared__ float buffer[kSumBuffer<1>];
  const DepthwiseShape& s = p.s;
  const int channel = blockIdx.y * blockDim.x + threadIdx.x;
  const int kh = blockIdx.z / s.kw, kw = blockIdx.z % s.kw;
  const bool inside = channel < s.K;
  const int from = inside ? source_of(source, channel, s.C) : 0;
  float sum[1] = {0};
  const int stop = inside ? min(p.count, static_cast<int>(blockIdx.x + 1) * p.chunk) : 0;
  for (int strip = blockIdx.x * p.chunk + threadIdx.y; strip < stop; strip += blockDim.y) {
    int n, row, column;
    p.place(strip, n, row, column);
    const int h = row * s.stride_h - s.pad_h + kh * s.dilation_h;
    const int w = column * s.stride_w - s.pad_w + kw * s.dilation_w;
    if (h < 0 || h >= s.H || w < 0 || w >= s.W) continue;
    sum[0] += to_float(x[((static_cast<int64_t>(n) * s.H + h) * s.W + w) * s.C + from]) *
              to_float(dy[((static_cast<int64_t>(n) * s.OH + row) * s.OW + column) * s.K + channel]);
  }
  sum_rows_of_block(buffer, sum);
  const int64_t line = static_cast<int64_t>(blockIdx.x) * s.kh * s.kw + blockIdx.z;
  if (threadIdx.y == 0 && inside) partial[line * s.K + channel] = sum[0];
}

// ---- which kernel ----

// Blocks on a multiprocessor, of which two or three run at a time: whole waves in either case.
constexpr int kPerProcessor = 6;
constexpr int kPerProcessorSums = 3;  // one wave: each block leaves sums to be added up

template <int K, int S>
struct WindowOf {
  static constexpr int kSize = K, kStride = S;
};

// `f` with the window as a type where there are kernels for it, else `any`.
template <class F, class Any>
const char* with_window(const DepthwiseShape& s, const F& f, const Any& any) {
  const bool plain = s.kh == s.kw && s.stride_h == s.stride_w && s.dilation_h == 1 &&
                     s.dilation_w == 1 && s.stride_h <= 2;
  switch (plain ? s.kh * 10 + s.stride_h : 0) {
    case 31: return f(WindowOf<3, 1>());
    case 32: return f(WindowOf<3, 2>());
    case 51: return f(WindowOf<5, 1>());
    case 52: return f(WindowOf<5, 2>());
    case 71: return f(WindowOf<7, 1>());
    case 72: return f(WindowOf<7, 2>());
    default: return any();
  }
}

template <int N>
struct Lanes {
  static constexpr int kCount = N;
};

// `f` with the number of channels that a thread takes.
template <class T, class F>
const char* with_lanes(bool vectors, const F& f) {
  return vectors ? f(Lanes<kLanes<T>>()) : f(Lanes<1>());
}

template <class T>
bool vectors_fit(const DepthwiseShape& s, const int64_t* index, const void* a, const void* b) {
  return !index && s.K % kLanes<T> == 0 && aligned(a) && aligned(b);
}

template <class T>
const char* convolution(const DepthwiseShape& s, const T* x, const T* weight,
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
DepthwiseShape transposed(DepthwiseShape s) {
  DepthwiseShape t = s;
  t.H = s.OH, t.W = s.OW, t.C = s.K, t.OH = s.H, t.OW = s.W, t.K = s.C;
  t.pad_h = s.kh - 1 - s.pad_h, t.pad_w = s.kw - 1 - s.pad_w;
  return t;
}

template <class T>
const char* input_gradient(const DepthwiseShape& s, const T* dy, const T* weight,
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
            constexpr int V = decltype(lanes)::kCount;
            const Tile tile(s.C, V);
            const Problem p(s, s.W, s.H, kStrip<V, window.kSize, 1>, -(s.pad_w & 1), tile, kPerProcessor);
            return launch(&input_of_stride_2<T, V, window.kSize>, p.grid(tile),
                          dim3(tile.groups, tile.rows), stream, p, dy, weight, source, dx);
          });
        }
      },
      any);
}

// The launch of the first stage, whose blocks say how much scratch it takes.
struct WeightLaunch {
  Tile tile;
  Problem p;
  int depth;  // threads for rows of the window

  WeightLaunch(const DepthwiseShape& s, int V, int strip, int depth)
      : tile(s.K, V, depth, kWeightThreads), p(s, s.OW, s.OH, strip, 0, tile, kPerProcessorSums), depth(depth) {}

  int blocks() const { return ceil_div(p.count, p.chunk); }
  dim3 block() const { return dim3(tile.groups, tile.rows, depth); }
};

// `f` with the launch and, as types, the window and the lanes; `any` with the launch alone.
template <class T, class F, class Any>
const char* with_weight_launch(const DepthwiseShape& s, bool vectors, const F& f, const Any& any) {
  return with_window(
      s,
      [&](auto window) {
        return with_lanes<T>(vectors, [&](auto lanes) {
          constexpr int V = decltype(lanes)::kCount, K = window.kSize;
          const WeightLaunch how(s, V, kWeightStrip<V, window.kStride>, K / kWeightRows<K>);
          return f(how, window, lanes);
        });
      },
      [&] { return any(WeightLaunch(s, 1, 1, 1)); });
}

template <class T>
const char* weight_gradient(const DepthwiseShape& s, const T* x, const T* dy, const int64_t* index,
                            T* dweight, float* partial, void* stream) {
  int blocks = 0;
  const char* failure = with_weight_launch<T>(
      s, vectors_fit<T>(s, index, x, dy),
      [&](const WeightLaunch& how, auto window, auto lanes) {
        blocks = how.blocks();
        return launch(&weight_sums<T, decltype(lanes)::kCount, window.kSize, window.kStride>,
                      how.p.grid(how.tile), how.block(), stream, how.p, x, dy, index, partial);
      },
      [&](const WeightLaunch& how) {
        blocks = how.blocks();
        const dim3 grid(blocks, how.tile.slices, s.kh * s.kw);
        return launch(&weight_sums_any<T>, grid, how.block(), stream, how.p, x, dy, index, partial);
      });
  if (failure) return failure;
  const int taps = s.kh * s.kw;
  return launch(&finish_weight<T>, dim3(ceil_div(taps * s.K, kColumns)),
                dim3(kColumns, kColumnRows), stream, partial, blocks, taps, s.K, dweight);
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

const char* sacl_cuda_depthwise(DepthwiseShape shape, const void* x, const void* weight,
                                const int64_t* index, void* y, void* stream) {
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return convolution<T>(shape, static_cast<const T*>(x), static_cast<const T*>(weight), index,
                          static_cast<T*>(y), false, vectors_fit<T>(shape, index, x, y), stream);
  });
}

const char* sacl_cuda_depthwise_input(DepthwiseShape shape, const void* dy, const void* weight,
                                      const int64_t* index, void* dx, int64_t* places,
                                      void* stream) {
  if (index) {
    if (const char* failure =
            sacl_cuda_places(index, shape.K, nullptr, 0, places, shape.C, stream)) {
      return failure;
    }
  }
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return input_gradient<T>(shape, static_cast<const T*>(dy), static_cast<const T*>(weight),
                             index ? places : nullptr, static_cast<T*>(dx), stream);
  });
}

int64_t sacl_cuda_depthwise_weight_scratch(DepthwiseShape shape) {
  int blocks = 0;
  const auto most = [&](const WeightLaunch& how, auto...) {
    blocks = std::max(blocks, how.blocks());
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

const char* sacl_cuda_depthwise_weight(DepthwiseShape shape, const void* x, const void* dy,
                                       const int64_t* index, void* dweight, float* partial,
                                       void* stream) {
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return weight_gradient<T>(shape, static_cast<const T*>(x), static_cast<const T*>(dy), index,
                              static_cast<T*>(dweight), partial, stream);
  });
}
}
