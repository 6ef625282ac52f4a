// What the CPU operators share: tensors in and out.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <vector>

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

// Whether an image batch (N, C, H, W) lies in memory as (N, H, W, C).
inline bool is_nhwc(const Tensor& t) {
  bool last = t.is_cpu() && t.dim() == 4 && t.scalar_type() == torch::headeronly::ScalarType::Float;
  int64_t expected = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    last = last && (t.size(dim) == 1 || t.stride(dim) == expected);
    expected *= t.size(dim);
  }
  return last;
}

inline const float* nhwc(const Tensor& t) {
  STD_TORCH_CHECK(is_nhwc(t), "float32 images in channels-last memory on the CPU were expected");
  return static_cast<const float*>(t.const_data_ptr());
}

inline Tensor new_nhwc(int64_t N, int64_t C, int64_t H, int64_t W) {
  return torch::stable::empty({N, C, H, W}, torch::headeronly::ScalarType::Float, std::nullopt,
                              std::nullopt, std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

inline float* floats_out(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// The numbers of some channels among `of`: an index list, or 0, 1, ... where there is none.
class ChannelIndex {
 public:
  ChannelIndex(const std::optional<Tensor>& index, int64_t count, int64_t of) : size_(count) {
    if (!index.has_value()) {
      STD_TORCH_CHECK(count == of, "without an index list there must be ", of, " channels, not ",
                      count);
      return;
    }
    STD_TORCH_CHECK(index->dim() == 1 && index->size(0) == count && index->is_contiguous() &&
                        index->scalar_type() == torch::headeronly::ScalarType::Long,
                    "an index list must hold one number (int64) for each of ", count, " channels");
    numbers_ = static_cast<const int64_t*>(index->const_data_ptr());
    for (int64_t i = 0; i < count; ++i)
      STD_TORCH_CHECK(numbers_[i] >= 0 && numbers_[i] < of, "an index is out of range");
  }

  // Those that the list names; none without one.
  static ChannelIndex listed(const std::optional<Tensor>& index, int64_t of) {
    return index.has_value() ? ChannelIndex(index, index->numel(), of)
                             : ChannelIndex(std::nullopt, 0, 0);
  }

  int64_t size() const { return size_; }
  bool all() const { return !numbers_; }
  int64_t operator[](int64_t i) const { return numbers_ ? numbers_[i] : i; }

  std::vector<float> of(const float* values) const {  // those of the channels
    std::vector<float> chosen(size_);
    for (int64_t i = 0; i < size_; ++i) chosen[i] = values[(*this)[i]];
    return chosen;
  }

 private:
  const int64_t* numbers_ = nullptr;
  int64_t size_;
};

}  // namespace sacl
