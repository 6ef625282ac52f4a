// The sum and the gate of slim activations whose live channels may be raw: what slim_add.cpp and
// slim_gate.cpp do, norm_slim_add.cpp and norm_slim_gate.cpp have done too.
#pragma once

#include <tuple>

#include "cuda/host.h"

namespace sacl::cuda {

Tensor add_operands(Tensor a, std::optional<Tensor> a_affine, std::optional<Tensor> a_rest,
                    std::optional<Tensor> a_index, Tensor b, std::optional<Tensor> b_affine,
                    std::optional<Tensor> b_rest, std::optional<Tensor> b_index);

Tensor gate_operand(Tensor x, std::optional<Tensor> affine, int64_t act, std::optional<Tensor> map,
                    Tensor gate, std::optional<Tensor> x_index, std::optional<Tensor> map_index);

// -> dx, dmap, dgate. With affine: dx is empty (0) and dgate float32.
std::tuple<Tensor, Tensor, Tensor> gate_operand_backward(Tensor dy, Tensor x,
                                                         std::optional<Tensor> affine, int64_t act,
                                                         std::optional<Tensor> map, Tensor gate,
                                                         std::optional<Tensor> x_index,
                                                         std::optional<Tensor> map_index);

// The affine (4, K) of x's channels, or null.
inline const float* affine_of(const std::optional<Tensor>& affine, const Tensor& x) {
  return affine ? floats(*affine, {4, x.size(1)}, "affine") : nullptr;
}

}  // namespace sacl::cuda
