// The operators' side of simt.h: tensors of the CPU stand for those of a device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#define SACL_DISPATCH_KEY CPU
#define SACL_SHIM(name) aoti_torch_cpu_##name

extern "C" void* sacl_simt_allocate(size_t bytes);
extern "C" void sacl_simt_free(void* data);

namespace sacl::cuda {

class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor&) {}
  void* stream() const { return nullptr; }
};

inline bool on_device(const torch::stable::Tensor& t) { return t.is_cpu(); }

inline torch::stable::Tensor new_tensor(const torch::stable::Tensor& like,
                                        std::vector<int64_t> sizes,
                                        torch::headeronly::ScalarType type) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i > 1; --i) strides[i - 2] = strides[i - 1] * sizes[i - 1];
  using torch::headeronly::ScalarType;
  const int64_t bytes = type == ScalarType::Long ? 8 : type == ScalarType::Float ? 4 : 2;
  const int64_t count = sizes.empty() ? 1 : strides[0] * sizes[0];
  return torch::stable::from_blob(sacl_simt_allocate(static_cast<size_t>(count * bytes)), sizes,
                                  strides, like.device(), type,
                                  [](void* data) { sacl_simt_free(data); });
}

}  // namespace sacl::cuda
