// What the kernels of depthwise convolution share: how strips of outputs are dealt to threads, how
// channels and columns are read, and which kernels there are for a window.
#pragma once

#include "cuda/device.h"

namespace sacl::cuda {

// The strips of an image batch's rows, which are numbered through.
struct Problem {
  DepthwiseConvShape s;
  Divisor strips, rows;  // of an output row; of an image
  int first_strip;       // where in its row the first strip starts: at 0 or before it
  int count;             // strips in all
  int chunk;             // strips that a block takes

  // `width` numbers in a row from `first` on, `strip` at a time.
  Problem(DepthwiseConvShape s, int width, int height, int strip, int first, const Tile& tile,
          int per_processor)
      : s(s), strips(ceil_div(width - first, strip)), rows(height), first_strip(first) {
    count = s.N * height * ceil_div(width - first, strip);
    chunk = static_cast<int>(Chunks(count, tile, per_processor).size);
  }

  int blocks() const { return ceil_div(count, chunk); }
  dim3 grid(const Tile& tile) const { return dim3(blocks(), tile.slices); }

  // Which image, row and strip of the row.
  __device__ void locate(int strip, int& n, int& row, int& at) const {
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

// N columns beside one another, of which those beyond the image are 0; the first one, at `first`,
// is its column `left`.
template <class T, int V, int N>
__device__ void load_columns(Vec<T, V> (&columns)[N], const T* first, int step, int left,
                             int width) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool inside = static_cast<unsigned>(left + i) < static_cast<unsigned>(width);
    columns[i] = inside ? Vec<T, V>::load(first + i * step) : Vec<T, V>::zero();
  }
}

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

template <class T>
const char* add_up_weight(const float* partial, int count, const DepthwiseConvShape& s, T* dweight,
                          void* stream) {
  const int taps = s.kh * s.kw;
  return launch(&finish_weight<T>, dim3(ceil_div(taps * s.K, kColumns)),
                dim3(kColumns, kColumnRows), stream, partial, count, taps, s.K, dweight);
}

template <int K, int S>
struct WindowOf {
  static constexpr int kSize = K, kStride = S;
};

// `f` with the window as a type where there are kernels for it, else `any`.
template <class F, class Any>
const char* with_window(const DepthwiseConvShape& s, const F& f, const Any& any) {
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
bool vectors_fit(const DepthwiseConvShape& s, const int64_t* in_index, const void* a,
                 const void* b) {
  return !in_index && s.K % kLanes<T> == 0 && aligned(a) && aligned(b);
}

}  // namespace sacl::cuda
