// The inner loops of the CPU operators, built once for each instruction set (isa_*.cpp) and picked
// when they are first called. Floats and bytes are contiguous.
#pragma once

#include <cstdint>

#include "activation_list.h"

#define SACL_INLINE inline __attribute__((always_inline))

namespace sacl {

constexpr int64_t kLanes = 16;       // channels, or pixels, at a time
constexpr int64_t kWeightBits = 22;  // after the point, of the weights of a crop

struct Channels {     // (K,) each
  const float* mean;  // y = act((x - mean) * scale + bias)
  const float* scale;
  const float* bias;
};

struct Window {  // of a convolution, over an image that is padded already
  int64_t kh, kw, stride_h, stride_w, dilation_h, dilation_w;
};

struct Tap {  // one term of a sum over a window: which tap it is, and where it reads
  int32_t tap, at;
};

// Columns first, first + step, ... that read with the same taps, each one column further than the
// one before.
struct Run {
  int32_t first, step, count;
  int32_t taps, tap_count;  // which of a list
};

// Channel c of the result is channel source[c] of what is given, or 0 where that is -1. As 16
// channels at a time are put together from vectors of 16: the results of block b are the parts
// ends[b - 1] .. ends[b], which do not overlap.
struct Selection {
  struct Part {
    int32_t from[2];   // first channels of two vectors
    int32_t lane[16];  // which of their 32 channels
    int32_t keep[16];  // all bits set, or 0
  };
  const int32_t* source;
  int64_t given, taken;  // channels
  const Part* parts;
  const int32_t* ends;
};

struct Kernels {
  // Batch norm over `rows` rows of K channels (batch_norm_act.cpp). `part` is scratch of 2 K
  // rounded up to kLanes; `total` (2 K) += sums of x - origin and of its square, or of dz and of
  // dz (x - mean).
  void (*sums_forward)(const float* x, const float* origin, int64_t rows, int64_t K, float* part,
                       double* total);
  void (*apply)(int64_t act, const float* x, float* y, int64_t rows, int64_t K, Channels k);
  void (*sums_backward)(int64_t act, const float* dy, const float* x, int64_t rows, int64_t K,
                        Channels k, float* part, double* total);
  // dx = scale * dz - constant - (x - mean) * projection
  void (*gradient)(int64_t act, const float* dy, const float* x, float* dx, int64_t rows, int64_t K,
                   Channels k, const float* constant, const float* projection);

  // The sum of two activations (slim_add.cpp): out = a + b + constant, rows of K channels.
  void (*add)(const float* a, const float* b, const float* constant, float* out, int64_t rows,
              int64_t K);
  // Products with a gate (slim_gate.cpp); rows of K channels, `stride` apart.
  // out = in * factor, or out += that
  void (*scale)(const float* in, int64_t in_stride, const float* factor, float* out,
                int64_t out_stride, int64_t rows, int64_t K, bool accumulate);
  // total (K) = the column sums of a * b
  void (*products)(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
                   int64_t K, float* total);

  // Depthwise convolution (depthwise_conv.cpp). Images are (rows, width, K), weights (kh kw, K); K
  // is at least kLanes. A row of pixels with other channels.
  void (*select)(const float* in, float* out, int64_t width, Selection selection);
  // `rows` rows of `width` pixels of the output.
  void (*depthwise_conv)(const float* in, int64_t in_width, const float* weight, float* out,
                         int64_t rows, int64_t width, int64_t K, Window window);
  // One row of the input's gradient: the sum over taps of rows of dy, and in them over columns.
  void (*depthwise_conv_backward_input)(const float* dy, int64_t dy_width, const float* weight,
                                        float* dx, int64_t K, int64_t kw, const Tap* rows,
                                        int64_t row_count, const Run* runs, int64_t run_count,
                                        const Tap* columns);
  // total (kh kw, K) += the weight's gradient over `rows` rows of dy.
  void (*depthwise_conv_backward_weight)(const float* in, int64_t in_width, const float* dy,
                                         double* total, int64_t rows, int64_t width, int64_t K,
                                         Window window);

  // Augmentation (augment.cpp). A row of an image is three planes of `pitch` bytes, a multiple of
  // kLanes; what is beyond the image's width counts for nothing.
  void (*transpose)(const uint8_t* in, int64_t in_stride, int64_t rows, int64_t columns,
                    uint8_t* out, int64_t out_stride);
  // The weighted sum of `count` rows, rounded; `sums` is scratch of `width`.
  void (*weigh_rows)(const uint8_t* in, int64_t stride, const int32_t* weight, int64_t count,
                     int32_t* sums, uint8_t* out, int64_t width);
  int64_t (*luma_sum)(const uint8_t* row, int64_t pitch, int64_t width);
  // constant + factor (x - constant) for `count` bytes.
  void (*blend_constant)(uint8_t* row, int64_t count, int32_t constant, float factor);
  // luma + factor (x - luma)
  void (*blend_luma)(uint8_t* row, int64_t pitch, float factor);
  // Hue in 256ths of the circle.
  void (*turn_hue)(uint8_t* row, int64_t pitch, int32_t shift);
  // Symmetric windows: weight[j] of what is j away, up to `radius`; rows[-radius .. radius] and
  // in[-radius .. width + radius - 1]; `sums` is scratch of `width`.
  void (*blur_columns)(const uint8_t* const* rows, const float* weight, int64_t radius, float* out,
                       int64_t width);
  void (*blur_row)(const float* in, const float* weight, int64_t radius, float* sums, uint8_t* out,
                   int64_t width);
  // Inverted from `threshold` on, (x - mean) / std, to (width, 3).
  void (*normalise)(const uint8_t* row, int64_t pitch, int64_t width, int32_t threshold,
                    const float* mean, const float* std, float* out);
};

extern const Kernels kernels_avx512, kernels_avx2, kernels_baseline;

const Kernels& kernels();

}  // namespace sacl
