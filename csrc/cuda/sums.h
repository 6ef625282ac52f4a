// Sums over images, for gradients of more than one operator.
#pragma once

#include "cuda/host.h"

namespace sacl::cuda {

inline OffsetShape offset_shape_of(const Tensor& like, int64_t O, int64_t n, int64_t h, int64_t w) {
  OffsetShape s{};
  s.dtype = dtype_of(like);
  s.N = static_cast<int>(like.size(0)), s.H = static_cast<int>(like.size(2));
  s.W = static_cast<int>(like.size(3)), s.O = static_cast<int>(O);
  s.n = static_cast<int>(n), s.h = static_cast<int>(h), s.w = static_cast<int>(w);
  STD_TORCH_CHECK((n == 1 || n == s.N) && (h == 1 || h == s.H) && (w == 1 || w == s.W),
                  "an offset of size (", n, ", ", O, ", ", h, ", ", w,
                  ") does not spread over the output");
  return s;
}

// The sums of dy (N, O, H, W) over what n, h, w leave out, as (n, O, h, w).
inline Tensor sums(const Tensor& dy, int64_t n, int64_t h, int64_t w, void* stream) {
  const OffsetShape s = offset_shape_of(dy, dy.size(1), n, h, w);
  if (n == s.N && h == s.H && w == s.W) return torch::stable::clone(dy);
  Tensor out = new_images(dy, n, s.O, h, w);
  const Tensor partial = scratch(dy, sacl_cuda_sum_to_offset_scratch(s));
  check(sacl_cuda_sum_to_offset(s, dy.const_data_ptr(), out.mutable_data_ptr(), floats_out(partial),
                                stream));
  return out;
}

}  // namespace sacl::cuda
