// A slim activation times a gate on a CUDA device; see ../operators.cpp. All tensors of values are
// of one type.
#include "cuda/slim.h"

namespace sacl::cuda {
namespace {

GateShape gate_shape(const Tensor& x, const std::optional<Tensor>& map, const Tensor& gate,
                     const std::optional<Tensor>& x_index, const std::optional<Tensor>& map_index) {
  images(x, "x");
  GateShape s{};
  s.dtype = dtype_of(x);
  s.N = static_cast<int>(x.size(0)), s.HW = static_cast<int>(x.size(2) * x.size(3));
  s.K = static_cast<int>(x.size(1)), s.R = map ? static_cast<int>(map->size(1)) : 0;
  s.C = gate.dim() == 2 ? static_cast<int>(gate.size(1)) : 0;
  plain(gate, {s.N, s.C}, x.scalar_type(), "gate");
  STD_TORCH_CHECK(x_index || s.K <= s.C, s.K, " channels and a gate of ", s.C);
  if (map) {
    images(*map, "map");
    check_sizes(*map, {1, s.R, x.size(2), x.size(3)}, "map");
    STD_TORCH_CHECK(map->scalar_type() == x.scalar_type() && map_index,
                    "map is of x's type and goes with map_index");
  }
  return s;
}

const void* values_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

}  // namespace

Tensor gate_operand(Tensor x, std::optional<Tensor> affine, int64_t act, std::optional<Tensor> map,
                    Tensor gate, std::optional<Tensor> x_index, std::optional<Tensor> map_index) {
  const GateShape s = gate_shape(x, map, gate, x_index, map_index);
  const OnDevice device(x);
  Tensor y = new_images(x, s.N, s.K + s.R, x.size(2), x.size(3));
  check(sacl_cuda_slim_gate(s, x.const_data_ptr(), affine_of(affine, x), static_cast<int>(act),
                            values_of(map), gate.const_data_ptr(), indices(x_index, s.K, "x_index"),
                            indices(map_index, s.R, "map_index"), y.mutable_data_ptr(),
                            device.stream()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> gate_operand_backward(Tensor dy, Tensor x,
                                                         std::optional<Tensor> affine, int64_t act,
                                                         std::optional<Tensor> map, Tensor gate,
                                                         std::optional<Tensor> x_index,
                                                         std::optional<Tensor> map_index) {
  const GateShape s = gate_shape(x, map, gate, x_index, map_index);
  images(dy, "dy");
  check_sizes(dy, {s.N, s.K + s.R, x.size(2), x.size(3)}, "dy");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "x and dy are of different types");
  const OnDevice device(x);
  Tensor dx =
      affine ? new_tensor(x, {0}, x.scalar_type()) : new_images(x, s.N, s.K, x.size(2), x.size(3));
  Tensor dmap =
      s.R ? new_images(x, 1, s.R, x.size(2), x.size(3)) : new_tensor(x, {0}, x.scalar_type());
  Tensor dgate = new_tensor(x, {s.N, s.C}, affine ? ScalarType::Float : x.scalar_type());
  check(sacl_cuda_slim_gate_backward(
      s, dy.const_data_ptr(), x.const_data_ptr(), affine_of(affine, x), static_cast<int>(act),
      values_of(map), gate.const_data_ptr(), indices(x_index, s.K, "x_index"),
      indices(map_index, s.R, "map_index"), affine ? nullptr : dx.mutable_data_ptr(),
      dmap.mutable_data_ptr(), dgate.mutable_data_ptr(), device.stream()));
  return {dx, dmap, dgate};
}

Tensor slim_gate(Tensor x, std::optional<Tensor> map, Tensor gate, std::optional<Tensor> x_index,
                 std::optional<Tensor> map_index) {
  return gate_operand(x, std::nullopt, kNone, map, gate, x_index, map_index);
}

std::tuple<Tensor, Tensor, Tensor> slim_gate_backward(Tensor dy, Tensor x,
                                                      std::optional<Tensor> map, Tensor gate,
                                                      std::optional<Tensor> x_index,
                                                      std::optional<Tensor> map_index) {
  return gate_operand_backward(dy, x, std::nullopt, kNone, map, gate, x_index, map_index);
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, SACL_DISPATCH_KEY, m) {
  m.impl("slim_gate", TORCH_BOX(&slim_gate));
  m.impl("slim_gate_backward", TORCH_BOX(&slim_gate_backward));
}

}  // namespace sacl::cuda
