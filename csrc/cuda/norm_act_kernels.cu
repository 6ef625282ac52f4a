// The passes over images that a norm's neighbours do not do for it, each in one kernel: M = N HW
// rows of K channels in NHWC memory.
//
// Which activation it is, a kernel asks for every vector: it waits for memory, and one for each
// activation is spared. A pass reads what another kernel has most likely just written, from the
// first row to the last, so it begins with the last, which the cache still holds; that of
// input_gradient begins with the first, where the pass of `gradient` ends.
#include <algorithm>
#include <initializer_list>

#include "cuda/activations.h"
#include "cuda/norm.h"

namespace sacl::cuda {
namespace {

// sums (blocks, 3, K)
template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    block_moments(ChannelRows rows, const T* x, float* sums) {
  __shared__ float buffer[kSumBuffer<2 * V>];
  const int channel = first_channel(V);
  float origin[V], differences[2 * V];
  sum_differences(rows, x, channel, true, origin, differences);
  sum_rows_of_block(buffer, differences);
  if (threadIdx.y != 0 || channel >= rows.K) return;
  const float count = static_cast<float>(rows.stop() - rows.first());
  float own[3 * V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const float beyond = differences[v] / count;
    own[v] = count;
    own[V + v] = origin[v] + beyond;
    own[2 * V + v] = differences[V + v] - differences[v] * beyond;
  }
  leave<3, V>(own, channel, rows.K, sums);
}

// y = act_after(act(x) + other), other null: y = act_after(act(x))
template <class T, int V, int INPUTS>
__global__ void __launch_bounds__(kThreads)
    apply_add(ChannelRows rows, const T* x, const float* affine, int act, const T* other,
              const float* other_affine, int act_after, T* y) {
  const int channel = first_channel(V);
  if (channel >= rows.K) return;
  const Affine<V> own = affine_of<V>(affine, rows.K, channel);
  Affine<V> others;
  if (INPUTS == 2) others = affine_of<V>(other_affine, rows.K, channel);
  const T* const all[] = {x, other};
  const T* inputs[INPUTS];
#pragma unroll
  for (int k = 0; k < INPUTS; ++k) inputs[k] = all[k];
  const auto use = [&](int64_t, int64_t at, const float (&in)[INPUTS][V]) {
    float out[V];
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = own.at(v, in[0][v]);
    activate(act, out);
    if (INPUTS == 2) {
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] += others.at(v, in[INPUTS - 1][v]);
    }
    activate(act_after, out);
    Vec<T, V>::store(y + at, out);
  };
  for_rows<T, V>(rows, inputs, channel, true, use);
}

// What a sample's gradient is multiplied by and what is added to it, as it lies in memory:
// unpacked, it would take registers that a second block needs.
template <class T, int V>
struct Gate {
  const T *gate, *mean;  // either may be null
  float share;           // of a pixel in the mean
  int sample = -1;
  Vec<T, V> factor, more;

  __device__ void move_to(int n, int K, int channel) {
    if (n == sample) return;
    sample = n;
    const int64_t at = static_cast<int64_t>(n) * K + channel;
    if (gate) factor = Vec<T, V>::load(gate + at);
    if (mean) more = Vec<T, V>::load(mean + at);
  }
  __device__ void apply(float (&dy)[V]) const {
    float own[V];
    if (gate) {
      factor.unpack(own);
#pragma unroll
      for (int v = 0; v < V; ++v) dy[v] *= own[v];
    }
    if (mean) {
      more.unpack(own);
#pragma unroll
      for (int v = 0; v < V; ++v) dy[v] += own[v] * share;
    }
  }
};

// gsums (blocks, 2, K), and g where it is not null. dy has `width` channels, of which K count.
template <class T, int V, bool GATED>
__global__ void __launch_bounds__(kThreads, 2)
    operand_gradient(ChannelRows rows, Divisor image, const T* dy, int width, const T* x,
                     const float* affine, int act, const T* gate, const T* dmean, T* g,
                     float* gsums) {
  const int channel = first_channel(V);
  float sums[2 * V];  // of g, of g (x - mean)
  clear(sums);
  if (channel < rows.K) {
    const Affine<V> own = affine_of<V>(affine, rows.K, channel);
    Gate<T, V> gates{gate, dmean, 1.0f / image.divisor};
    const auto at = [&](int k, int row) {
      return (k == 0 ? dy + int64_t{row} * width : x + int64_t{row} * rows.K) + channel;
    };
    const auto use = [&](int row, const float (&in)[2][V]) {
      float out[V], z[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        out[v] = in[0][v];
        z[v] = own.at(v, in[1][v]);
      }
      if (GATED) {
        gates.move_to(image.quotient(row), rows.K, channel);
        gates.apply(out);
      }
      through_activation(act, out, z);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        sums[v] += out[v];
        sums[V + v] += out[v] * (in[1][v] - own.mean[v]);
      }
      if (g) Vec<T, V>::store(g + int64_t{row} * rows.K + channel, out);
    };
    for_rows_at<T, V, 2>(rows, true, at, use);
    float rstd[V];
    load_channels(affine + 3 * rows.K, channel, rstd);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[V + v] *= rstd[v];
  }
  leave_sums<V>(sums, channel, rows.K, gsums);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads)
    input_gradient(ChannelRows rows, const T* g, const T* y, const float* coefficients, T* dy) {
  const int channel = first_channel(V);
  if (channel >= rows.K) return;
  const InputGradient<V> gradient(coefficients, rows.K, channel);
  const T* const inputs[] = {g, y};
  const auto use = [&](int64_t, int64_t at, const float (&in)[2][V]) {
    float out[V];
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = gradient.at(v, in[0][v], in[1][v]);
    Vec<T, V>::store(dy + at, out);
  };
  for_rows<T, V>(rows, inputs, channel, false, use);
}

// Launches.

int64_t rows_of(const NormActShape& s) { return static_cast<int64_t>(s.N) * s.HW; }

// The blocks that leave sums: of so many rows that their number depends on the shape alone, not on
// where the images lie.
template <class T>
Chunks chunks_of_sums(const NormActShape& s) {
  return RowBlocks(rows_of(s), s.K, s.K % kLanes<T> ? 1 : kLanes<T>).sums;
}

// Calls `f` with a null pointer to the type, the width of a vector that fits the images, of K or
// `width` channels, and the blocks over their rows.
template <class F>
const char* over_rows(const NormActShape& s, int width, std::initializer_list<const void*> images,
                      const F& f) {
  return with_type(s.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool fit = s.K % kLanes<T> == 0 && width % kLanes<T> == 0 &&
                     std::all_of(images.begin(), images.end(), aligned);
    using Wide = std::integral_constant<int, kLanes<T>>;
    using Single = std::integral_constant<int, 1>;
    return fit ? f(type, Wide(), RowBlocks(rows_of(s), s.K, kLanes<T>))
               : f(type, Single(), RowBlocks(rows_of(s), s.K, 1));
  });
}
template <class F>
const char* over_rows(const NormActShape& s, std::initializer_list<const void*> images,
                      const F& f) {
  return over_rows(s, s.K, images, f);
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

int64_t sacl_cuda_norm_act_sets(NormActShape shape) {
  int64_t count = 0;
  with_type(shape.dtype, [&](auto* type) {
    count = chunks_of_sums<std::remove_pointer_t<decltype(type)>>(shape).count;
    return static_cast<const char*>(nullptr);
  });
  return count;
}

const char* sacl_cuda_norm_act_moments(NormActShape shape, const void* x, float* sums,
                                       void* stream) {
  return over_rows(shape, {x}, [&](auto* type, auto V, const RowBlocks& blocks) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Chunks chunks = chunks_of_sums<T>(shape);
    return launch(&block_moments<T, V()>, blocks.grid(chunks), blocks.block(), stream,
                  blocks.rows(chunks), static_cast<const T*>(x), sums);
  });
}

const char* sacl_cuda_norm_act_apply(NormActShape shape, const void* x, const float* affine,
                                     int act, const void* other, const float* other_affine,
                                     int act_after, void* y, void* stream) {
  for (const int each : {act, act_after})
    if (const char* failure = unknown_activation(each)) return failure;
  return over_rows(shape, {x, other, y}, [&](auto* type, auto V, const RowBlocks& blocks) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto kernel = other ? &apply_add<T, V(), 2> : &apply_add<T, V(), 1>;
    return launch(kernel, blocks.grid(blocks.images), blocks.block(), stream,
                  blocks.rows(blocks.images), static_cast<const T*>(x), affine, act,
                  static_cast<const T*>(other), other_affine, act_after, static_cast<T*>(y));
  });
}

const char* sacl_cuda_norm_act_gradient(NormActShape shape, const void* dy, int width,
                                        const void* x, const float* affine, int act,
                                        const void* gate, const void* dmean, void* g, float* gsums,
                                        void* stream) {
  if (const char* failure = unknown_activation(act)) return failure;
  return over_rows(
      shape, width, {dy, x, gate, dmean, g}, [&](auto* type, auto V, const RowBlocks& blocks) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Chunks chunks = chunks_of_sums<T>(shape);
        const bool gated = gate || dmean;
        const auto kernel =
            gated ? &operand_gradient<T, V(), true> : &operand_gradient<T, V(), false>;
        return launch(kernel, blocks.grid(chunks), blocks.block(), stream, blocks.rows(chunks),
                      Divisor(shape.HW), static_cast<const T*>(dy), width, static_cast<const T*>(x),
                      affine, act, static_cast<const T*>(gate), static_cast<const T*>(dmean),
                      static_cast<T*>(g), gsums);
      });
}

const char* sacl_cuda_norm_act_input_gradient(NormActShape shape, const void* g, const void* y,
                                              const float* coefficients, void* dy, void* stream) {
  return over_rows(shape, {g, y, dy}, [&](auto* type, auto V, const RowBlocks& blocks) {
    using T = std::remove_pointer_t<decltype(type)>;
    return launch(&input_gradient<T, V()>, blocks.grid(blocks.images), blocks.block(), stream,
                  blocks.rows(blocks.images), static_cast<const T*>(g), static_cast<const T*>(y),
                  coefficients, static_cast<T*>(dy));
  });
}
}
