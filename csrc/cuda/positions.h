// Inverted index lists: where in a list each channel is. Lists stay the same for many calls, so
// their inverse is given as a rule, and worked out in a call only where it is not.
#pragma once

#include "cuda/host.h"

namespace sacl::cuda {

class Positions {
 public:
  // Of C channels in a list `first` and, after it, `second`; null for no list, which is all
  // channels in order.
  Positions(const Tensor& like, const std::optional<Tensor>& given,
            const std::optional<Tensor>& first, const std::optional<Tensor>& second, int64_t C,
            void* stream) {
    if (!first) return;
    if (given) {
      indices(given, C, "positions");
      positions_ = given;
      return;
    }
    positions_ = new_tensor(like, {C}, ScalarType::Long);
    const int64_t count = first->numel(), more = second ? second->numel() : 0;
    check(sacl_cuda_invert_index(indices(first, count, "index"), static_cast<int>(count),
                                 indices(second, more, "index"), static_cast<int>(more),
                                 static_cast<int64_t*>(positions_->mutable_data_ptr()),
                                 static_cast<int>(C), stream));
  }

  const int64_t* data() const {
    return positions_ ? static_cast<const int64_t*>(positions_->const_data_ptr()) : nullptr;
  }

 private:
  std::optional<Tensor> positions_;
};

}  // namespace sacl::cuda
