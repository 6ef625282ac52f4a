// What the kernels of views share: what is kept of a view's draw, the weights of the crop, scratch.
#pragma once

#include "cuda/device.h"

namespace sacl::cuda {

// A row of `draws`.
struct Draw {
  double top, left, height, width, flip, operation[4], factor[4], grayscale, sigma, threshold;
};

// A row of `images`: where an image begins among the pixels, and its size.
struct Placement {
  int64_t offset, height, width;
};

constexpr int kWeightBits = 22;         // of the crop's weights
constexpr double kLeftOut = 1e-6;       // weight of the blur's taps that are left out, at most
constexpr int64_t kMostSide = 1 << 24;  // of an image

// An axis of a crop, of `in` pixels, that becomes one of `out`: bicubic (a = -0.5), widened where
// it shrinks; Pillow's, term by term. Products are rounded before they are added, as on the CPU.
struct Axis {
  double scale, narrowing;  // inputs an output; 1 where it does not shrink, else 1 / scale

  __device__ static Axis of(int in, int out) {
    const double scale = static_cast<double>(in) / out;
    return {scale, 1 / max(scale, 1.0)};
  }
  // Inputs of an output, at most.
  __device__ int most() const { return static_cast<int>(ceil(2 * max(scale, 1.0))) * 2 + 1; }
  __device__ double centre(int output) const { return __dmul_rn(output + 0.5, scale); }
  // What `input` weighs in the output around `centre`, before the sum is made 1.
  __device__ double weight(int input, double centre) const {
    const double distance = __dmul_rn(input - centre + 0.5, narrowing), x = fabs(distance);
    if (x < 1) {
      const double slope = __dmul_rn(1.5, x) - 2.5;
      return __dmul_rn(__dmul_rn(slope, x), x) + 1;
    }
    if (x >= 2) return 0;
    const double slope = __dmul_rn(x - 5, x) + 8;
    return __dmul_rn(-0.5, __dmul_rn(slope, x) - 4);
  }
  __device__ int rounded_weight(int input, double centre, double total) const {
    return static_cast<int>(round(weight(input, centre) / total * (1 << kWeightBits)));
  }
};

// The inputs that an output of an axis sums, and their weights' sum.
struct __align__(16) Span {
  int first, end;
  double total;

  __device__ static Span of(const Axis& axis, int output, int in) {
    const double support = 2 * max(axis.scale, 1.0), centre = axis.centre(output);
    Span span{max(static_cast<int>(centre - support + 0.5), 0),
              min(static_cast<int>(centre + support + 0.5), in), 0};
    for (int i = span.first; i < span.end; ++i) span.total += axis.weight(i, centre);
    return span;
  }
};

// What is kept of a view's draw and of the image that it is a view of.
struct __align__(16) View {
  int64_t corner;  // the byte at which the crop begins
  int64_t stride;  // bytes from a row of the image to the next
  Axis across, down;
  int height, width;  // of the crop
  int operation[4];
  float factor[4];
  int shift[4];  // of the hue
  int early;     // operations before the contrast, or 4
  int radius;    // of the blur; 0: none
  int threshold;
  bool flip, gray;
  bool ragged;  // words of 4 bytes that hold parts of the crop reach beyond the pixels
};

// Scratch of all views: what is kept of them, spans (2, S), weights of the blur and, of as many
// views as are made at a time, pixels (S, S).
struct Scratch {
  View* views;
  Span* spans;
  float* weights;
  int* luma;  // sums, one of each tile of the crop
  uint32_t* pixels;
};

// The view that a task makes: an image's views are next to each other, so that one finds in the
// cache what another has read of it.
__device__ inline int view_of(const AugmentShape& s, int task) {
  return task % s.V * s.n + task / s.V;
}

// Of `own`, over the block; in all threads. Called by all of them.
__device__ inline int sum_of_block(int own) {
  __shared__ int sums[kThreads];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  sums[thread] = own;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  __syncthreads();
  const int sum = sums[0];
  __syncthreads();
  return sum;
}

}  // namespace sacl::cuda
