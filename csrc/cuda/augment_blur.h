// Both passes of the blur of views whose colours are done; see augment_kernels.cu.
#pragma once

#include "cuda/augment.h"
#include "cuda/augment_pixels.h"

namespace sacl::cuda {
namespace {

constexpr int kRun = 2048;  // pixels of a block of the blur

// Calls f(j, below, above) with the indices that are j = 1, ..., radius away from `middle` on a
// line of `size`, mirrored: -1 is 1, size is size - 2.
template <class F>
__device__ void for_taps(int middle, int size, int radius, const F& f) {
  const int inside = min(radius, min(middle, size - 1 - middle));
  for (int j = 1; j <= inside; ++j) f(j, middle - j, middle + j);
  for (int j = inside + 1; j <= radius; ++j) {
    const int above = middle + j;
    f(j, abs(middle - j), above < size ? above : 2 * (size - 1) - above);
  }
}

// A view that is blurred. weights: from the middle outwards.
struct Blurred {
  const uint32_t* pixels;
  const float* weights;
  int S, radius;

  // Of the column's pixels around row y.
  __device__ void column_sum(int y, int x, float (&sums)[3]) const {
    const uint32_t middle = pixels[y * S + x];
#pragma unroll
    for (int c = 0; c < 3; ++c)
      sums[c] = __fmul_rn(__ldg(weights), static_cast<float>(byte_of(middle, c)));
    for_taps(y, S, radius, [&](int j, int below, int above) {
      const uint32_t low = pixels[below * S + x], high = pixels[above * S + x];
      const float weight = __ldg(weights + j);
#pragma unroll
      for (int c = 0; c < 3; ++c)
        sums[c] =
            __fmaf_rn(weight, static_cast<float>(byte_of(low, c) + byte_of(high, c)), sums[c]);
    });
  }

  // The pixel at column x of a row, of whose columns at(x, sums) gives the sums.
  template <class F>
  __device__ uint32_t row_sum(int x, const F& at) const {
    float own[3], sums[3];
    at(x, own);
#pragma unroll
    for (int c = 0; c < 3; ++c) sums[c] = __fmul_rn(__ldg(weights), own[c]);
    for_taps(x, S, radius, [&](int j, int left, int right) {
      float low[3], high[3];
      at(left, low), at(right, high);
      const float weight = __ldg(weights + j);
#pragma unroll
      for (int c = 0; c < 3; ++c) sums[c] = __fmaf_rn(weight, __fadd_rn(low[c], high[c]), sums[c]);
    });
    return packed(static_cast<int>(sums[0] + 0.5f), static_cast<int>(sums[1] + 0.5f),
                  static_cast<int>(sums[2] + 0.5f));
  }
};

// Block: `run` pixels of a view, side by side. They are whole rows, whose sums of columns the block
// holds; of views that are wider than that (WIDE), sums of columns are made anew for each tap.
template <class T, int P, bool WIDE>
__global__ void __launch_bounds__(kThreads, 4)
    blur_views(AugmentShape s, AugmentInputs in, Scratch scratch, int first_task, int run,
               Divisor row, T* out) {
  __shared__ Normalised normalised;
  __shared__ __align__(16) uint32_t done[kRun];
  __shared__ float columns[WIDE ? 1 : 3 * kRun];
  const int all = s.S * s.S, blocks = (all + run - 1) / run;
  const int slot = blockIdx.x / blocks, task = first_task + slot;
  const View& view = scratch.views[task];
  if (view.radius == 0) return;
  normalised.fill(view.threshold, in.mean, in.std);
  const Blurred blurred{scratch.pixels + static_cast<int64_t>(slot) * all,
                        scratch.weights + static_cast<int64_t>(task) * (s.radius + 1), s.S,
                        view.radius};
  const int first = blockIdx.x % blocks * run, count = min(run, all - first);
  if constexpr (!WIDE) {
    for (int i = threadIdx.x; i < count; i += kThreads) {
      int x = first + i;
      const int y = row.split(x);
      float sums[3];
      blurred.column_sum(y, x, sums);
#pragma unroll
      for (int c = 0; c < 3; ++c) columns[3 * i + c] = sums[c];
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < count; i += kThreads) {
    int x = first + i;
    const int y = row.split(x);
    if constexpr (WIDE) {
      done[i] =
          blurred.row_sum(x, [&](int x, float (&sums)[3]) { blurred.column_sum(y, x, sums); });
    } else {
      const float* const line = columns + 3 * (i - x);
      done[i] = blurred.row_sum(x, [&](int x, float (&sums)[3]) {
#pragma unroll
        for (int c = 0; c < 3; ++c) sums[c] = line[3 * x + c];
      });
    }
  }
  __syncthreads();
  T* const to = out + 3 * (static_cast<int64_t>(view_of(s, task)) * all + first);
  for (int i = threadIdx.x * P; i < count; i += kThreads * P) {
    uint32_t pixels[P];
    load_pixels(done + i, pixels);
    normalised.write(pixels, to + 3 * i);
  }
}

}  // namespace
}  // namespace sacl::cuda
