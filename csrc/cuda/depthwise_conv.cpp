// Depthwise convolution on a CUDA device; see ../operators.cpp. Weights are of the images' type and
// so is their gradient. An in_index that is out of range or names a channel twice is not looked
// for.
#include "cuda/depthwise_conv_shape.h"
#include "cuda/positions.h"

namespace sacl::cuda {

Tensor depthwise_conv(Tensor x, Tensor weight, std::optional<Tensor> in_index,
                      std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation) {
  const void* in = images(x, "x");
  STD_TORCH_CHECK(weight.dim() == 3, "weight is not (K, kh, kw)");
  const int64_t K = weight.size(0), kh = weight.size(1), kw = weight.size(2);
  const DepthwiseConvShape s =
      depthwise_shape(x, x.size(2), x.size(3), x.size(1), K, kh, kw, stride, padding, dilation);
  const OnDevice device(x);
  Tensor y = new_images(x, s.N, K, s.OH, s.OW);
  check(sacl_cuda_depthwise_conv(s, in, plain(weight, {K, kh, kw}, x.scalar_type(), "weight"),
                                 in_index_of(in_index, s), y.mutable_data_ptr(), device.stream()));
  return y;
}

Tensor depthwise_conv_backward_input(Tensor dy, Tensor weight, std::optional<Tensor> in_index,
                                     int64_t H, int64_t W, int64_t C, std::vector<int64_t> stride,
                                     std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                     std::optional<Tensor> positions) {
  const void* g = images(dy, "dy");
  STD_TORCH_CHECK(weight.dim() == 3, "weight is not (K, kh, kw)");
  const int64_t K = dy.size(1), kh = weight.size(1), kw = weight.size(2);
  const DepthwiseConvShape s = depthwise_shape(dy, H, W, C, K, kh, kw, stride, padding, dilation);
  check_sizes(dy, {s.N, K, s.OH, s.OW}, "dy");
  const OnDevice device(dy);
  Tensor dx = new_images(dy, s.N, C, H, W);
  in_index_of(in_index, s);  // checks
  const Positions in(dy, positions, in_index, std::nullopt, C, device.stream());
  check(sacl_cuda_depthwise_conv_backward_input(
      s, g, plain(weight, {K, kh, kw}, dy.scalar_type(), "weight"), in.data(),
      dx.mutable_data_ptr(), device.stream()));
  return dx;
}

Tensor depthwise_conv_backward_weight(Tensor x, Tensor dy, std::optional<Tensor> in_index,
                                      int64_t kh, int64_t kw, std::vector<int64_t> stride,
                                      std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const void *in = images(x, "x"), *g = images(dy, "dy");
  const DepthwiseConvShape s = depthwise_shape(x, x.size(2), x.size(3), x.size(1), dy.size(1), kh,
                                               kw, stride, padding, dilation);
  check_sizes(dy, {s.N, s.K, s.OH, s.OW}, "dy");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "x and dy are of different types");
  const OnDevice device(x);
  Tensor dweight = new_tensor(x, {s.K, kh, kw}, x.scalar_type());
  Tensor partial = scratch(x, sacl_cuda_depthwise_conv_backward_weight_scratch(s));
  check(sacl_cuda_depthwise_conv_backward_weight(s, in, g, in_index_of(in_index, s),
                                                 dweight.mutable_data_ptr(), floats_out(partial),
                                                 device.stream()));
  return dweight;
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, SACL_DISPATCH_KEY, m) {
  m.impl("depthwise_conv", TORCH_BOX(&depthwise_conv));
  m.impl("depthwise_conv_backward_input", TORCH_BOX(&depthwise_conv_backward_input));
  m.impl("depthwise_conv_backward_weight", TORCH_BOX(&depthwise_conv_backward_weight));
}

}  // namespace sacl::cuda
