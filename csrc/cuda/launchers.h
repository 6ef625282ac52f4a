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

namespace sacl::cuda {

enum Dtype : int { kFloat32, kFloat16, kBFloat16 };

enum Activation : int { kNone, kRelu, kRelu6, kHardswish, kSilu };  // as in ../cpu/kernels.h

struct DepthwiseShape {
  int dtype;  // of images, weight and the weight's gradient
  int N, H, W, C;
  int OH, OW, K;  // of the output, K filters
  int kh, kw, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

struct BatchNormShape {
  int dtype;  // of activations and of the rest; all else is float32
  int act;
  int64_t M;  // rows: N H W
  int K, R, C;  // live channels, zeroed channels, channels of the full vectors
};

struct BatchNormStatistics {
  float* running_mean;  // (C) or null, as running_var
  float* running_var;
  double count;  // values of a channel, for the unbiased variance
  float momentum, eps;
};

// A sum over places: one of (N or 1, H or 1, W or 1) for each that is kept.
struct PlacesShape {
  int dtype;
  int N, H, W, O;  // of the image
  int n, h, w;     // of the sums: as the image, or 1
};

// The weight (Cout, Cin) of a 1x1 convolution and its parts: (O, K) from live channels and (O, R)
// from channels that are constant.
struct WeightShape {
  int weight_dtype, dtype;  // of the full weight, of its parts
  int Cout, Cin, O, K;
};

// One operand of a sum: the result's channel u is source[u] of its live channels (M, live), or
// beyond those of its constants; source null: all live ones in order.
struct Operand {
  const void* values;
  const void* constants;
  const int64_t* source;
  int live, constant;
};

struct GateShape {
  int dtype;
  int N, HW;    // samples, places of an image
  int K, R, C;  // channels of each sample's own, shared ones, of the gate
};

}  // namespace sacl::cuda

extern "C" {

// Makes the device that torch has chosen that of the kernels' own runtime.
const char* sacl_cuda_use_device(int device);

// y (N, OH, OW, K) of x (N, H, W, C) and weight (K, kh, kw).
const char* sacl_cuda_depthwise(sacl::cuda::DepthwiseShape shape, const void* x, const void* weight,
                                const int64_t* index, void* y, void* stream);

// dx (N, H, W, C) of dy (N, OH, OW, K). places: scratch of C where there is an index, else null.
const char* sacl_cuda_depthwise_input(sacl::cuda::DepthwiseShape shape, const void* dy,
                                      const void* weight, const int64_t* index, void* dx,
                                      int64_t* places, void* stream);

// dweight (K, kh, kw). partial: scratch of as many floats as this says.
int64_t sacl_cuda_depthwise_weight_scratch(sacl::cuda::DepthwiseShape shape);
const char* sacl_cuda_depthwise_weight(sacl::cuda::DepthwiseShape shape, const void* x,
                                       const void* dy, const int64_t* index, void* dweight,
                                       float* partial, void* stream);

// Floats of scratch that both passes of batch norm take.
int64_t sacl_cuda_batch_norm_scratch(sacl::cuda::BatchNormShape shape);

// x, y (M, K); weight, bias (C); kept (K); zeroed (R); rest (R); mean, rstd (K).
const char* sacl_cuda_batch_norm(sacl::cuda::BatchNormShape shape, const void* x,
                                 const float* weight, const float* bias, const int64_t* kept,
                                 const int64_t* zeroed, sacl::cuda::BatchNormStatistics statistics,
                                 void* y, void* rest, float* mean, float* rstd, float* scratch,
                                 void* stream);

// dy, dx (M, K); drest (R) or null; dweight, dbias (C).
const char* sacl_cuda_batch_norm_backward(sacl::cuda::BatchNormShape shape, const void* dy,
                                          const void* drest, const void* x, const float* weight,
                                          const float* bias, const int64_t* kept,
                                          const int64_t* zeroed, const float* mean,
                                          const float* rstd, void* dx, float* dweight,
                                          float* dbias, float* scratch, void* stream);

// part (O, K) = weight[out_index][:, in_index], in the activations' type.
const char* sacl_cuda_take_weight(sacl::cuda::WeightShape shape, const void* weight,
                                  const int64_t* out_index, const int64_t* in_index, void* part,
                                  void* stream);

// places (C): where `first` (count) and, after them, `second` hold a channel, or -1.
const char* sacl_cuda_places(const int64_t* first, int first_count, const int64_t* second,
                             int second_count, int64_t* places, int C, void* stream);

// dweight (Cout, Cin) from its parts: live (O, K) and, from place K on, rest (O, R); 0 elsewhere.
// Places of the outputs (Cout) and inputs (Cin); null: in order.
const char* sacl_cuda_put_weight(sacl::cuda::WeightShape shape, const void* live, const void* rest,
                                 int R, const int64_t* out_places, const int64_t* in_places,
                                 void* dweight, void* stream);

// y (N, H, W, O) = offset (n, h, w, O) + response (N or 1, O); one of them may be null.
const char* sacl_cuda_spread(sacl::cuda::PlacesShape shape, const void* offset,
                             const void* response, int response_n, void* y, void* stream);

// sums (n, h, w, O) of dy (N, H, W, O); scratch of as many floats as this says.
int64_t sacl_cuda_sum_places_scratch(sacl::cuda::PlacesShape shape);
const char* sacl_cuda_sum_places(sacl::cuda::PlacesShape shape, const void* dy, void* sums,
                                 float* scratch, void* stream);

// y (M, U) = a + b.
const char* sacl_cuda_add(int dtype, int64_t M, int U, sacl::cuda::Operand a, sacl::cuda::Operand b,
                          void* y, void* stream);

// out (M, C_out): channel source[c] of in (M, C_in), or 0 where that is -1.
const char* sacl_cuda_select(int dtype, int64_t M, int C_in, int C_out, const void* in,
                             const int64_t* source, void* out, void* stream);

// y (N, HW, K + R) = x (N, HW, K) and map (HW, R) times their factors of gate (N, C).
const char* sacl_cuda_gate(sacl::cuda::GateShape shape, const void* x, const void* map,
                           const void* gate, const int64_t* index, const int64_t* map_index,
                           void* y, void* stream);
const char* sacl_cuda_gate_backward(sacl::cuda::GateShape shape, const void* dy, const void* x,
                                    const void* map, const void* gate, const int64_t* index,
                                    const int64_t* map_index, void* dx, void* dmap, void* dgate,
                                    void* stream);
}
