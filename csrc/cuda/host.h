// What the CUDA operators share on torch's side: tensors in and out, the device and its stream.
#pragma once

#ifdef SACL_EMULATED
#include "simt_host.h"
#else
#define USE_CUDA  // torch's header then declares aoti_torch_get_current_cuda_stream
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#define SACL_DISPATCH_KEY CUDA
#define SACL_SHIM(name) aoti_torch_cuda_##name
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <climits>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "cuda/launchers.h"

namespace sacl::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(const char* failure) {
  STD_TORCH_CHECK(!failure, "a kernel could not be started: ", failure);
}

#ifndef SACL_EMULATED
// For as long as it lives, kernels go to the tensor's device, to torch's current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
    check(sacl_cuda_use_device(t.get_device_index()));
  }
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

inline bool on_device(const Tensor& t) { return t.is_cuda(); }

inline Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}
#endif

inline Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    default: STD_TORCH_CHECK(false, "float32, float16 or bfloat16 was expected");
  }
}

inline void check_sizes(const Tensor& t, std::initializer_list<int64_t> sizes, const char* name) {
  bool equal = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t dim = 0;
  for (int64_t size : sizes) equal = equal && t.size(dim++) == size;
  if (equal) return;
  std::string expected;
  for (int64_t size : sizes) expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(false, name, " has not the shape (", expected, ")");
}

// A tensor of this shape and type, in order in memory.
inline const void* plain(const Tensor& t, std::initializer_list<int64_t> sizes, ScalarType type,
                         const char* name) {
  check_sizes(t, sizes, name);
  STD_TORCH_CHECK(on_device(t) && t.is_contiguous() && t.scalar_type() == type, name,
                  " is not contiguous, of the expected type and on the device of the others");
  return t.const_data_ptr();
}

inline const float* floats(const Tensor& t, std::initializer_list<int64_t> sizes,
                           const char* name) {
  return static_cast<const float*>(plain(t, sizes, ScalarType::Float, name));
}

inline const int64_t* indices(const std::optional<Tensor>& t, int64_t count, const char* name) {
  return t ? static_cast<const int64_t*>(plain(*t, {count}, ScalarType::Long, name)) : nullptr;
}

// A running statistic of C channels, which is updated, or null.
inline float* running(const std::optional<Tensor>& t, int64_t C) {
  return t ? const_cast<float*>(floats(*t, {C}, "a running statistic")) : nullptr;
}

// Of a norm's C channels, K are live and R zeroed.
inline void check_channels(int64_t K, int64_t R, int64_t C,
                           const std::optional<Tensor>& kept_index) {
  STD_TORCH_CHECK(kept_index ? K + R <= C : K == C && R == 0, K, " live and ", R,
                  " zeroed channels are not of ", C,
                  kept_index ? "" : " without a list of the live");
}

// Images (N, C, H, W) that lie in memory as (N, H, W, C), of pixels that an int counts.
inline const void* images(const Tensor& t, const char* name) {
  bool last = on_device(t) && t.dim() == 4;
  int64_t expected = 1;
  for (int64_t dim : {1, 3, 2, 0}) {
    last = last && (t.size(dim) == 1 || t.stride(dim) == expected);
    expected *= last ? t.size(dim) : 1;
  }
  STD_TORCH_CHECK(last, name, " is not images in channels-last memory on the device");
  STD_TORCH_CHECK(t.numel() > 0, name, " is empty");
  STD_TORCH_CHECK(t.numel() / t.size(1) <= INT_MAX / 2, name, " has more than 2^30 pixels");
  return t.const_data_ptr();
}

// The same memory, seen with other sizes and strides.
inline Tensor seen_as(const Tensor& t, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
  AtenTensorHandle view = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()),
                                                        sizes.data(), strides.data(), 0, &view));
  return Tensor(view);
}

inline Tensor new_images(const Tensor& like, int64_t N, int64_t C, int64_t H, int64_t W) {
  const Tensor memory = new_tensor(like, {N, H, W, C}, like.scalar_type());
  return seen_as(memory, {N, C, H, W}, {H * W * C, 1, W * C, C});
}

// Scratch of the kernels: torch's allocator gives it to others on this stream afterwards.
inline Tensor scratch(const Tensor& like, int64_t floats) {
  return new_tensor(like, {floats}, ScalarType::Float);
}

inline float* floats_out(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace sacl::cuda
