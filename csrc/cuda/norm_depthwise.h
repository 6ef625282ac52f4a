// What the two passes of depthwise convolution between batch norms share: how a thread walks
// through an image, two channels at a time, and what it reads on the way.
//
// What a norm and an activation make of a value costs more than the value's part in the window, so
// it is done once for each row that a thread meets: it takes a strip of a few columns down through
// rows, and each row goes to all outputs that it is part of. Two channels a thread are a 128-byte
// line a warp, and leave registers for that.
#pragma once

#include "cuda/activations.h"
#include "cuda/depthwise_conv.h"

namespace sacl::cuda {

constexpr int kWalkThreads = 128;  // of a block

// Two numbers, in a word or two.
template <class T>
struct Vec<T, 2> {
  using Word = std::conditional_t<sizeof(T) == 2, unsigned, unsigned long long>;
  Word word;

  __device__ static Vec load(const T* from) { return {__ldg(reinterpret_cast<const Word*>(from))}; }
  __device__ static Vec load_shared(const T* from) {
    return {*reinterpret_cast<const Word*>(from)};
  }
  __device__ static Vec zero() { return {0}; }
  // Of 16-bit types: two that are not beside one another.
  __device__ static Vec gather(const T* low, const T* high) {
    return {load_one(low).bits | static_cast<Word>(load_one(high).bits) << 16};
  }
  // 0 for those that are not to be kept.
  __device__ Vec kept(bool low, bool high) const {
    return {word & ((low ? 0xffffu : 0u) | (high ? 0xffff0000u : 0u))};
  }

  __device__ void unpack(float (&out)[2]) const {
    Words<T>::unpack(static_cast<uint32_t>(word), out);
    if constexpr (sizeof(T) == 4) Words<T>::unpack(static_cast<uint32_t>(word >> 32), out + 1);
  }
  __device__ static void store(T* to, const float (&in)[2]) {
    Word word = Words<T>::pack(in);
    if constexpr (sizeof(T) == 4) word |= static_cast<Word>(Words<T>::pack(in + 1)) << 32;
    *reinterpret_cast<Word*>(to) = word;
  }
};

// The channels of one tensor that are V channels' own in another: `source` of them, or the same.
template <int V>
struct Channels {
  int of[V];  // -1: none

  __device__ Channels(const int64_t* source, int channel, int count, bool inside) {
#pragma unroll
    for (int v = 0; v < V; ++v) of[v] = inside ? source_of(source, channel + v, count) : -1;
  }
  __device__ bool has(int v) const { return of[v] >= 0; }
  __device__ bool any() const { return has(0) || has(V - 1); }
  // One that is there, in place of none.
  __device__ int at(int v) const { return max(of[v], 0); }
};

// Walks: a strip of columns through a segment of an image's rows each. They are numbered through,
// and a block takes a chunk of them.
struct Walks {
  DepthwiseConvShape s;
  Divisor strips, segments;
  int count, chunk;
  int rows, height;  // of an image, of a segment

  // `ahead`: rows that a walk reads before those of its segment. Segments are as high as it takes
  // for the threads that run at a time to be done soonest.
  Walks(const DepthwiseConvShape& s, int strips, int rows, int ahead, const Tile& tile,
        int per_processor)
      : s(s), strips(strips), segments(1), rows(rows) {
    const int64_t at_a_time =
        int64_t{ceil_div(multiprocessors() * per_processor, tile.slices)} * tile.rows;
    int64_t least = INT64_MAX;
    for (int cuts = 1; cuts <= std::min(rows, 64); ++cuts) {
      const int high = ceil_div(rows, cuts), made = ceil_div(rows, high);
      const int64_t walks = int64_t{s.N} * strips * made;
      const int64_t time = ceil_div(walks, at_a_time) * (high + ahead);
      if (time >= least) continue;
      least = time, height = high, segments = Divisor(made), count = static_cast<int>(walks);
    }
    chunk = static_cast<int>(Chunks(count, tile, per_processor).size);
  }

  int blocks() const { return ceil_div(count, chunk); }

  __device__ int first() const { return static_cast<int>(blockIdx.x) * chunk + threadIdx.y; }
  __device__ int stop() const { return min(count, static_cast<int>(blockIdx.x + 1) * chunk); }

  // Which image, strip and rows [top, bottom).
  __device__ void locate(int walk, int& n, int& strip, int& top, int& bottom) const {
    strip = walk;
    int segment = strips.split(strip);
    n = segments.split(segment);
    top = segment * height;
    bottom = min(rows, top + height);
  }
};

// A bit for each of N columns from `left` on that is one of `width`.
template <int N>
__device__ unsigned columns_inside(int left, int width) {
  unsigned inside = 0;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (static_cast<unsigned>(left + i) < static_cast<unsigned>(width)) inside |= 1u << i;
  return inside;
}

// The columns beside one another from `first` on that have a bit; 0 for the others. `apart`: how
// far a second channel is from the first, if they are GATHERED.
template <bool GATHERED, class T, int V, int N>
__device__ void load_row(Vec<T, V> (&row)[N], const T* first, int step, int apart,
                         unsigned inside) {
#ifndef SACL_EMULATED
  // Else the compiler does not step from row to row, but multiplies anew for each column.
  asm("" : "+l"(first));
#endif
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const T* at = first + static_cast<int64_t>(i) * step;
    row[i] = Vec<T, V>::zero();
    if (!(inside >> i & 1)) continue;
    if constexpr (GATHERED) {
      row[i] = Vec<T, V>::gather(at, at + apart);
    } else {
      row[i] = Vec<T, V>::load(at);
    }
  }
}

// What makes an operand of raw values, for V channels; nothing where `affine` (4, K) is null.
template <int V>
struct Normalisation {
  float scale[V], bias[V], mean[V];

  __device__ Normalisation(const float* affine, const Channels<V>& channels, int K) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      scale[v] = affine ? affine[channels.at(v)] : 1.0f;
      bias[v] = affine ? affine[K + channels.at(v)] : 0.0f;
      mean[v] = affine ? affine[2 * K + channels.at(v)] : 0.0f;
    }
  }
  __device__ float before_activation(int v, float x) const {
    return (x - mean[v]) * scale[v] + bias[v];
  }
};

// The operand's values of a row, 0 at columns without a bit.
template <class A, class T, int V, int N>
__device__ void normalise(const Normalisation<V>& norm, const Vec<T, V> (&row)[N], unsigned inside,
                          float (&values)[N][V]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    row[i].unpack(values[i]);
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float value = A::value(norm.before_activation(v, values[i][v]));
      values[i][v] = inside >> i & 1 ? value : 0.0f;
    }
  }
}

// What makes the gradient of a norm's input, for V channels; g itself where `coefficients` (4, K)
// is null, 0 for none.
template <int V>
struct Gradient {
  float c[4][V];

  __device__ Gradient(const float* coefficients, const Channels<V>& channels, int K) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        c[i][v] = i == 0 ? 1.0f : 0.0f;
        if (coefficients) c[i][v] = coefficients[i * K + channels.at(v)];
        if (!channels.has(v)) c[i][v] = 0;
      }
    }
  }
  __device__ float at(int v, float g, float y) const {
    return c[0][v] * g + (c[1][v] * (y - c[3][v]) + c[2][v]);
  }
};

// Count, mean and sum of squared differences from it, of V channels.
template <int V>
struct Moments {
  float count, mean[V], squares[V];

  // Of values whose sum and sum of squares, less an origin, are these.
  __device__ Moments(int n, const float (&origin)[V], const float (&sum)[V],
                     const float (&sum_of_squares)[V])
      : count(static_cast<float>(n)) {
    const float one_over = n ? 1 / count : 0.0f;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float beyond = sum[v] * one_over, rest = sum_of_squares[v] - sum[v] * beyond;
      mean[v] = origin[v] + beyond;
      squares[v] = rest < 0 ? 0.0f : rest;  // NaN stays NaN
    }
  }

  // Merges with those of the other rows of the block, in row 0, and leaves them as
  // sums (blocks, 3, K). Called by all threads of the block.
  template <int THREADS>
  __device__ void leave(int channel, int K, float* sums) {
    constexpr int kNumbers = 1 + 2 * V, kHalf = THREADS / 2;
    __shared__ float buffer[kNumbers * kHalf];
    const int row = threadIdx.y;
    for (int rows = blockDim.y; rows > 1;) {
      const int stay = (rows + 1) / 2, go = rows - stay;
      float* slot = buffer + (row < stay ? row : row - stay) * blockDim.x + threadIdx.x;
      if (row >= stay && row < rows) {
        slot[0] = count;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          slot[(1 + v) * kHalf] = mean[v];
          slot[(1 + V + v) * kHalf] = squares[v];
        }
      }
      __syncthreads();
      if (row < go && slot[0] > 0) {
        const float total = count + slot[0], share = slot[0] / total;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float apart = slot[(1 + v) * kHalf] - mean[v];
          mean[v] += apart * share;
          squares[v] += slot[(1 + V + v) * kHalf] + apart * apart * count * share;
        }
        count = total;
      }
      __syncthreads();
      rows = stay;
    }
    if (row != 0 || channel >= K) return;
    float* own = sums + static_cast<int64_t>(blockIdx.x) * 3 * K + channel;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      own[v] = count;
      own[K + v] = mean[v];
      own[2 * K + v] = squares[v];
    }
  }
};

// `use(A())` with the activation that `act` names: a branch that all threads take alike.
template <class Use>
__device__ void with_the_activation(int act, const Use& use) {
  switch (act) {
#define SACL_ROW(name) \
  case k##name: use(name()); break;
    SACL_ACTIVATIONS(SACL_ROW)
#undef SACL_ROW
    default: break;
  }
}

template <class T>
bool pairs_fit(int channels, std::initializer_list<const void*> images) {
  bool fit = channels % 2 == 0;
  for (const void* image : images)
    fit = fit && reinterpret_cast<uintptr_t>(image) % (2 * sizeof(T)) == 0;
  return fit;
}

template <int N, bool GATHERED>
struct Taken {
  static constexpr int kCount = N;
  static constexpr bool kGathered = GATHERED;
};

// `f` with how many channels a thread takes, and whether it gathers them. Numbers of 32 bits make
// full lines one by one, and for a window of 7x7 there are no registers for two.
template <class T, int K, class F>
const char* with_taken(bool pairs, bool gathered, const F& f) {
  if constexpr (K == 7) {
    return f(Taken<1, false>());
  } else {
    if (pairs && !gathered) return f(Taken<2, false>());
    if constexpr (sizeof(T) == 2) {
      if (pairs) return f(Taken<2, true>());
    }
    return f(Taken<1, false>());
  }
}

}  // namespace sacl::cuda
