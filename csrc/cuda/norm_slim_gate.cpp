// A raw slim activation times a gate on a CUDA device; see ../operators.cpp and slim_gate.cpp.
#include "cuda/slim.h"

namespace sacl::cuda {

Tensor norm_slim_gate(Tensor x, Tensor affine, int64_t act, std::optional<Tensor> map, Tensor gate,
                      std::optional<Tensor> x_index, std::optional<Tensor> map_index) {
  return gate_operand(x, affine, act, map, gate, x_index, map_index);
}

std::tuple<Tensor, Tensor> norm_slim_gate_backward(Tensor dy, Tensor x, Tensor affine, int64_t act,
                                                   std::optional<Tensor> map, Tensor gate,
                                                   std::optional<Tensor> x_index,
                                                   std::optional<Tensor> map_index) {
  const auto [dx, dmap, dgate] =
      gate_operand_backward(dy, x, affine, act, map, gate, x_index, map_index);
  return {dmap, dgate};
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, SACL_DISPATCH_KEY, m) {
  m.impl("norm_slim_gate", TORCH_BOX(&norm_slim_gate));
  m.impl("norm_slim_gate_backward", TORCH_BOX(&norm_slim_gate_backward));
}

}  // namespace sacl::cuda
