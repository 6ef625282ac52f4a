// The shape of a depthwise convolution, checked, for the operators on torch's side.
#pragma once

#include "cuda/host.h"

namespace sacl::cuda {

using Pair = const std::vector<int64_t>&;

inline int output_length(int64_t size, int64_t k, int64_t stride, int64_t pad, int64_t dilation) {
  STD_TORCH_CHECK(k > 0 && stride > 0 && dilation > 0 && pad >= 0,
                  "sizes, strides and dilations of a window are positive, its padding is not "
                  "negative");
  const int64_t covered = size + 2 * pad - dilation * (k - 1) - 1;
  STD_TORCH_CHECK(covered >= 0, "the window is larger than the padded image");
  return static_cast<int>(covered / stride + 1);
}

inline DepthwiseConvShape depthwise_shape(const Tensor& images, int64_t H, int64_t W, int64_t C,
                                          int64_t K, int64_t kh, int64_t kw, Pair stride,
                                          Pair padding, Pair dilation) {
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "stride, padding and dilation are pairs");
  DepthwiseConvShape s{};
  s.dtype = dtype_of(images);
  s.N = static_cast<int>(images.size(0)), s.H = static_cast<int>(H), s.W = static_cast<int>(W);
  s.C = static_cast<int>(C), s.K = static_cast<int>(K);
  s.OH = output_length(H, kh, stride[0], padding[0], dilation[0]);
  s.OW = output_length(W, kw, stride[1], padding[1], dilation[1]);
  s.kh = static_cast<int>(kh), s.kw = static_cast<int>(kw);
  s.stride_h = static_cast<int>(stride[0]), s.stride_w = static_cast<int>(stride[1]);
  s.pad_h = static_cast<int>(padding[0]), s.pad_w = static_cast<int>(padding[1]);
  s.dilation_h = static_cast<int>(dilation[0]), s.dilation_w = static_cast<int>(dilation[1]);
  return s;
}

inline const int64_t* in_index_of(const std::optional<Tensor>& in_index,
                                  const DepthwiseConvShape& s) {
  STD_TORCH_CHECK(in_index ? s.K <= s.C : s.K == s.C, "there are ", s.K, " filters for ", s.C,
                  " channels", in_index ? "" : " and no in_index");
  return indices(in_index, s.K, "in_index");
}

}  // namespace sacl::cuda
