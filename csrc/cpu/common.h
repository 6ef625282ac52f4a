// What the CPU operators share: tensors in and out.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "cpu/kernels.h"

namespace sacl {

using torch::stable::Tensor;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

inline const float* floats(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() &&
                      t.scalar_type() == torch::headeronly::ScalarType::Float,
                  "a contiguous float32 tensor on the CPU was expected");
  return static_cast<const float*>(t.const_data_ptr());
}

inline float* floats_out(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace sacl
