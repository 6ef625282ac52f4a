// The kernels' C interface, by which torch's side (*.cpp) calls them: the .cu files include no
// torch header, and the .cpp files none of CUDA's.
//
// Pointers are to device memory. A launcher starts kernels on a stream and returns null, or what
// failed; it neither waits, nor allocates, nor reads device memory, so it can be captured in a CUDA
// graph. The same input gives the same bits: sums are added in an order that depends on the shape
// and on the device's number of multiprocessors alone.
//
// Images are (N, H, W, C) in memory. Index lists (int64) are null for all channels in order.
#pragma once

#include <cstdint>

#include "activation_list.h"

namespace sacl::cuda {

enum Dtype : int { kFloat32, kFloat16, kBFloat16 };

struct DepthwiseConvShape {
  int dtype;  // of images, weight and the weight's gradient
  int N, H, W, C;
  int OH, OW, K;  // of the output, K filters
  int kh, kw, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// How many sets of gsums the backward pass of norm_depthwise leaves, and the floats of its scratch.
struct NormDepthwiseSums {
  int sets;
  int64_t scratch;
};

struct BatchNormActShape {
  int dtype;  // of activations and of the rest; all else is float32
  int act;
  int64_t M;    // rows: N H W
  int K, R, C;  // live channels, zeroed channels, channels of the full vectors
};

struct BatchNormStatistics {
  float* running_mean;  // (C) or null, as running_var
  float* running_var;
  double count;  // values of a channel, for the unbiased variance
  float momentum, eps;
};

// What is added to images, one value for each sample, each pixel, both or neither; backwards, what
// the images' gradient is summed to.
struct OffsetShape {
  int dtype;
  int N, H, W, O;  // of the images
  int n, h, w;     // of the offset: as the image, or 1
};

// Rows at the top and the bottom of an image, columns at its left and right.
struct OffsetBorder {
  int top, bottom, left, right;
};

inline OffsetBorder whole_image(const OffsetShape& s) { return {s.H, 0, 0, 0}; }

struct NormActShape {
  int dtype;     // of images
  int N, HW, K;  // samples, pixels of an image, channels
};

// What a norm in training does with sums of its live channels.
struct NormActChannels {
  int sets;     // sets of sums
  int K, R, C;  // live channels, zeroed channels, channels of the full vectors
  int act;
};

// The weight (Cout, Cin) of a 1x1 convolution and its parts: (O, K) from live channels and (O, R)
// from channels that are constant.
struct WeightShape {
  int weight_dtype, dtype;  // of the full weight, of its parts
  int Cout, Cin, O, K;
};

// One operand of a sum: the result's channel u is index[u] of its live channels (M, live), or
// beyond those of its constants; index null: all live ones in order. affine (4, live), or null for
// values that are not raw.
struct Operand {
  const void* values;
  const void* constants;
  const int64_t* index;
  int live, constant;
  const float* affine;
};

struct GateShape {
  int dtype;
  int N, HW;    // samples, pixels of an image
  int K, R, C;  // channels of x, of the map, of the gate
};

// Numbers of a type that only the launch knows.
struct Numbers {
  void* data;
  int dtype;
};

constexpr int kLargestWindow = 7;                  // taps along a side
constexpr int kMostRuns = 2 * kLargestWindow + 1;  // of outputs along a side

// Runs of outputs along a side of a convolution's image: run i begins at start[i], and of its
// outputs' taps first[i] to last[i] lie inside the input; start[count]: the side's length.
struct Runs {
  int count;
  int start[kMostRuns + 1], first[kMostRuns], last[kMostRuns];
};

// S filters of kh x kw taps on constants, and a 1x1 convolution of what a norm makes of that.
struct SlimBorderShape {
  Runs rows, columns;
  int classes;  // of pixels: a run of rows and a run of columns each
  int S, kh, kw, act;
  int rest, O, Cin;                             // constants, outputs and all inputs of the 1x1
  int constants, filters, norm_channels, Cout;  // all that there are
};

struct SlimBorderInputs {
  Numbers constants, filters, weight, rest;
  const float *norm_weight, *norm_bias;
  const int64_t *filter_index, *in_index, *norm_index, *map_index, *out_index, *rest_index;
};

struct SlimBorderGradients {
  Numbers constants, filters, weight, rest;
  float *norm_weight, *norm_bias;
};

// V views of n images, of S x S pixels.
struct AugmentShape {
  int dtype;  // of the views
  int V, n, S;
  int radius;     // of the blur, at most; below S
  int64_t bytes;  // of pixels
};

struct AugmentInputs {
  const uint8_t* pixels;    // (bytes)
  const int64_t* images;    // (n, 3): offset, height, width
  const double* draws;      // (V, n, 16)
  const float *mean, *std;  // (3)
};

}  // namespace sacl::cuda

extern "C" {

// Makes the device that torch has chosen that of the kernels' own runtime.
const char* sacl_cuda_use_device(int device);

// y (N, OH, OW, K) of x (N, H, W, C) and weight (K, kh, kw).
const char* sacl_cuda_depthwise_conv(sacl::cuda::DepthwiseConvShape shape, const void* x,
                                     const void* weight, const int64_t* in_index, void* y,
                                     void* stream);

// dx (N, H, W, C) of dy (N, OH, OW, K). positions (C): the filter that reads a channel, or -1; null
// where they are as many, in order.
const char* sacl_cuda_depthwise_conv_backward_input(sacl::cuda::DepthwiseConvShape shape,
                                                    const void* dy, const void* weight,
                                                    const int64_t* positions, void* dx,
                                                    void* stream);

// dweight (K, kh, kw). partial: scratch of as many floats as this says.
int64_t sacl_cuda_depthwise_conv_backward_weight_scratch(sacl::cuda::DepthwiseConvShape shape);
const char* sacl_cuda_depthwise_conv_backward_weight(sacl::cuda::DepthwiseConvShape shape,
                                                     const void* x, const void* dy,
                                                     const int64_t* in_index, void* dweight,
                                                     float* partial, void* stream);

// y (N, OH, OW, K) of the operand of x (N, H, W, C), with affine (4, C) or null, and sums
// (sets, 3, K); as many sets as this says. weight (K, kh, kw), or with
// out_index (listed) those rows of more, and zeros for the filters after them.
int sacl_cuda_norm_depthwise_sets(sacl::cuda::DepthwiseConvShape shape, const void* x,
                                  const int64_t* in_index);
const char* sacl_cuda_norm_depthwise(sacl::cuda::DepthwiseConvShape shape, const void* x,
                                     const float* affine, int act, const void* weight,
                                     const int64_t* out_index, int listed, const int64_t* in_index,
                                     void* y, float* sums, void* stream);

// dx (N, H, W, C), gsums (sets, 2, C) and the rows out_index of dweight of g, y (N, OH, OW, K), the
// operand of x, and coefficients (4, K); y and coefficients may be null. gsums null: dx is the
// gradient of the operand. positions: scratch of C where there is in_index, else null; partial:
// scratch.
sacl::cuda::NormDepthwiseSums sacl_cuda_norm_depthwise_backward_sums(
    sacl::cuda::DepthwiseConvShape shape, const void* g, const void* y, const void* x,
    const int64_t* in_index);
const char* sacl_cuda_norm_depthwise_backward(sacl::cuda::DepthwiseConvShape shape, const void* g,
                                              const void* y, const float* coefficients,
                                              const void* x, const float* affine, int act,
                                              const void* weight, const int64_t* out_index,
                                              int listed, const int64_t* in_index,
                                              int64_t* positions, void* dx, float* gsums,
                                              void* dweight, float* partial, void* stream);

// Floats of scratch that both passes of batch norm take.
int64_t sacl_cuda_batch_norm_act_scratch(sacl::cuda::BatchNormActShape shape);

// x, y (M, K); weight, bias (C); kept_index (K); zeroed_index (R); rest (R); mean, rstd (K).
const char* sacl_cuda_batch_norm_act(sacl::cuda::BatchNormActShape shape, const void* x,
                                     const float* weight, const float* bias,
                                     const int64_t* kept_index, const int64_t* zeroed_index,
                                     sacl::cuda::BatchNormStatistics statistics, void* y,
                                     void* rest, float* mean, float* rstd, float* scratch,
                                     void* stream);

// dy, dx (M, K); drest (R) or null; dweight, dbias (C).
const char* sacl_cuda_batch_norm_act_backward(sacl::cuda::BatchNormActShape shape, const void* dy,
                                              const void* drest, const void* x, const float* weight,
                                              const float* bias, const int64_t* kept_index,
                                              const int64_t* zeroed_index, const float* mean,
                                              const float* rstd, void* dx, float* dweight,
                                              float* dbias, float* scratch, void* stream);

// What a norm's neighbours leave to it. x, dy, g, y, other (N, HW, K), gate, dmean (N, K) are of
// the shape's type, all else float32: affine, coefficients (4, K), sums (sets, 3, K), gsums (sets,
// 2, K).

// The sets of sums that a pass over images leaves.
int64_t sacl_cuda_norm_act_sets(sacl::cuda::NormActShape shape);
const char* sacl_cuda_norm_act_moments(sacl::cuda::NormActShape shape, const void* x, float* sums,
                                       void* stream);

// y = act_after(act(x) + other); other or the affine of it may be null.
const char* sacl_cuda_norm_act_apply(sacl::cuda::NormActShape shape, const void* x,
                                     const float* affine, int act, const void* other,
                                     const float* other_affine, int act_after, void* y,
                                     void* stream);

// dy (N, HW, width), the first K count. gate, dmean may be null, and g too, which then is not
// written.
const char* sacl_cuda_norm_act_gradient(sacl::cuda::NormActShape shape, const void* dy, int width,
                                        const void* x, const float* affine, int act,
                                        const void* gate, const void* dmean, void* g, float* gsums,
                                        void* stream);
const char* sacl_cuda_norm_act_input_gradient(sacl::cuda::NormActShape shape, const void* g,
                                              const void* y, const float* coefficients, void* dy,
                                              void* stream);

// weight, bias (C); kept_index (K); zeroed_index (R); mean_shift (K) or null; rest (R).
const char* sacl_cuda_norm_act_affine(sacl::cuda::NormActChannels channels, const float* sums,
                                      const float* weight, const float* bias,
                                      const int64_t* kept_index, const int64_t* zeroed_index,
                                      sacl::cuda::BatchNormStatistics statistics,
                                      const float* mean_shift, float* affine, float* rest,
                                      void* stream);

// drest (R) or null; dweight, dbias (C). count: values of a live channel.
const char* sacl_cuda_norm_act_coefficients(sacl::cuda::NormActChannels channels,
                                            const float* gsums, const float* drest,
                                            const float* bias, const int64_t* kept_index,
                                            const int64_t* zeroed_index, const float* affine,
                                            double count, float* coefficients, float* dweight,
                                            float* dbias, void* stream);

// Floats of scratch that the three sums below take.
int64_t sacl_cuda_norm_act_sums_scratch(sacl::cuda::OffsetShape shape,
                                        sacl::cuda::OffsetBorder border);

// mean (N, O) of the shape's type; dgate (N, O): sums over the image, to n = N, h = w = 1.
const char* sacl_cuda_norm_act_mean(sacl::cuda::OffsetShape shape, const void* x,
                                    const float* affine, int act, void* mean, float* scratch,
                                    void* stream);
const char* sacl_cuda_norm_act_gate_gradient(sacl::cuda::OffsetShape shape, const void* dy,
                                             const void* x, const float* affine, int act,
                                             float* dgate, float* scratch, void* stream);

// doffset (n, h, w, O). y and coefficients may be null. Pixels within the border are not read, but
// given, each, the same share of what is missing to a sum of 0.
const char* sacl_cuda_norm_act_offset_gradient(sacl::cuda::OffsetShape shape,
                                               sacl::cuda::OffsetBorder border, const void* g,
                                               const void* y, const float* coefficients,
                                               float* doffset, float* scratch, void* stream);

// part (O, K) = weight[out_index][:, in_index], in the activations' type.
const char* sacl_cuda_take_weight(sacl::cuda::WeightShape shape, const void* weight,
                                  const int64_t* out_index, const int64_t* in_index, void* part,
                                  void* stream);

// positions (C): where `first` (count) and, after them, `second` hold a channel, or -1.
const char* sacl_cuda_invert_index(const int64_t* first, int first_count, const int64_t* second,
                                   int second_count, int64_t* positions, int C, void* stream);

// dweight (Cout, Cin) from its parts: live (O, K) and, from column K on, rest (O, R); 0 elsewhere.
// Positions of the outputs (Cout) and inputs (Cin); null: in order.
const char* sacl_cuda_put_weight(sacl::cuda::WeightShape shape, const void* live, const void* rest,
                                 int R, const int64_t* out_positions, const int64_t* in_positions,
                                 void* dweight, void* stream);

// y (N, H, W, O) = offset (n, h, w, O) + response (N or 1, O); one of them may be null.
const char* sacl_cuda_spread_offset(sacl::cuda::OffsetShape shape, const void* offset,
                                    const void* response, int response_n, void* y, void* stream);

// sums (n, h, w, O) of dy (N, H, W, O); scratch of as many floats as this says.
int64_t sacl_cuda_sum_to_offset_scratch(sacl::cuda::OffsetShape shape);
const char* sacl_cuda_sum_to_offset(sacl::cuda::OffsetShape shape, const void* dy, void* sums,
                                    float* scratch, void* stream);

// y (M, U) = a + b.
const char* sacl_cuda_slim_add(int dtype, int64_t M, int U, sacl::cuda::Operand a,
                               sacl::cuda::Operand b, void* y, void* stream);

// out (M, C_out): channel source[c] of in (M, C_in), or 0 where that is -1.
const char* sacl_cuda_select(int dtype, int64_t M, int C_in, int C_out, const void* in,
                             const int64_t* source, void* out, void* stream);

// y (N, HW, K + R) = act(x) (N, HW, K) and map (HW, R) times their factors of gate (N, C); affine
// (4, K), or null for x itself.
const char* sacl_cuda_slim_gate(sacl::cuda::GateShape shape, const void* x, const float* affine,
                                int act, const void* map, const void* gate, const int64_t* x_index,
                                const int64_t* map_index, void* y, void* stream);

// With affine, dx is null and not formed, and dgate is float32.
const char* sacl_cuda_slim_gate_backward(sacl::cuda::GateShape shape, const void* dy, const void* x,
                                         const float* affine, int act, const void* map,
                                         const void* gate, const int64_t* x_index,
                                         const int64_t* map_index, void* dx, void* dmap,
                                         void* dgate, void* stream);

// offset (OH, OW, O), saved (classes + 1, S); scratch of (classes S + rest) floats.
const char* sacl_cuda_slim_border(sacl::cuda::SlimBorderShape shape,
                                  sacl::cuda::SlimBorderInputs inputs,
                                  sacl::cuda::BatchNormStatistics statistics,
                                  sacl::cuda::Numbers offset, float* saved, float* scratch,
                                  void* stream);

// doffset (OH, OW, O); scratch of as many floats as this says.
int64_t sacl_cuda_slim_border_backward_scratch(sacl::cuda::SlimBorderShape shape);
const char* sacl_cuda_slim_border_backward(sacl::cuda::SlimBorderShape shape,
                                           sacl::cuda::SlimBorderInputs inputs,
                                           const float* doffset, const float* saved,
                                           sacl::cuda::SlimBorderGradients gradients,
                                           float* scratch, void* stream);

// out (V n, S, S, 3); scratch of as many floats as this says. An image outside the pixels, a crop
// outside its image and a second contrast end the kernel.
int64_t sacl_cuda_augment_scratch(sacl::cuda::AugmentShape shape);
const char* sacl_cuda_augment(sacl::cuda::AugmentShape shape, sacl::cuda::AugmentInputs inputs,
                              void* out, float* scratch, void* stream);
}
