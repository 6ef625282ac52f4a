// Sums of two slim activations and products with a gate on a CUDA device; see ../operators.cpp. All
// tensors of values are of one type. Whether an index list is in order is not looked at: only
// without one is the gradient of a sum's operand dy itself.
#include <tuple>

#include "cuda/sums.h"

namespace sacl::cuda {
namespace {

int pixels(const Tensor& x) { return static_cast<int>(x.numel() / x.size(1)); }

Operand operand_of(const Tensor& x, const std::optional<Tensor>& rest,
                   const std::optional<Tensor>& source, const Tensor& like) {
  images(x, "an operand");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && pixels(x) == pixels(like),
                  "both operands must be of one type and have the same number of values");
  const int64_t constants = rest ? rest->numel() : 0;
  const void* values = rest ? plain(*rest, {constants}, like.scalar_type(), "a_rest or b_rest")
                            : nullptr;
  return {x.const_data_ptr(), values, source ? indices(source, source->numel(), "source") : nullptr,
          static_cast<int>(x.size(1)), static_cast<int>(constants)};
}

// Gradients of an operand with `live` channels and constants; empty where it is dy itself.
std::tuple<Tensor, Tensor> operand_gradients(const Tensor& dy, int64_t live, int64_t constants,
                                             const std::optional<Tensor>& source, void* stream) {
  Tensor drest = new_tensor(dy, {constants}, dy.scalar_type());
  if (!source) return {new_tensor(dy, {0}, dy.scalar_type()), drest};
  const int U = static_cast<int>(dy.size(1));
  const Tensor from = places(dy, *source, std::nullopt, live + constants, stream);
  const auto* channels = static_cast<const int64_t*>(from.const_data_ptr());
  Tensor dx = new_images(dy, dy.size(0), live, dy.size(2), dy.size(3));
  check(sacl_cuda_select(dtype_of(dy), pixels(dy), U, static_cast<int>(live), dy.const_data_ptr(),
                         channels, dx.mutable_data_ptr(), stream));
  if (constants) {
    const Tensor total = sums(dy, 1, 1, 1, stream);
    check(sacl_cuda_select(dtype_of(dy), 1, U, static_cast<int>(constants), total.const_data_ptr(),
                           channels + live, drest.mutable_data_ptr(), stream));
  }
  return {dx, drest};
}

GateShape gate_shape(const Tensor& x, const std::optional<Tensor>& map, const Tensor& gate,
                     const std::optional<Tensor>& index, const std::optional<Tensor>& map_index) {
  images(x, "x");
  GateShape s{};
  s.dtype = dtype_of(x);
  s.N = static_cast<int>(x.size(0)), s.HW = static_cast<int>(x.size(2) * x.size(3));
  s.K = static_cast<int>(x.size(1)), s.R = map ? static_cast<int>(map->size(1)) : 0;
  s.C = gate.dim() == 2 ? static_cast<int>(gate.size(1)) : 0;
  plain(gate, {s.N, s.C}, x.scalar_type(), "gate");
  STD_TORCH_CHECK(index || s.K <= s.C, s.K, " channels and a gate of ", s.C);
  indices(index, s.K, "index");
  if (map) {
    images(*map, "map");
    check_sizes(*map, {1, s.R, x.size(2), x.size(3)}, "map");
    STD_TORCH_CHECK(map->scalar_type() == x.scalar_type() && map_index,
                    "map is of x's type and goes with map_index");
    indices(map_index, s.R, "map_index");
  }
  return s;
}

const void* values_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

}  // namespace

Tensor slim_add(Tensor a, std::optional<Tensor> a_rest, std::optional<Tensor> a_source, Tensor b,
                std::optional<Tensor> b_rest, std::optional<Tensor> b_source) {
  const Operand left = operand_of(a, a_rest, a_source, a);
  const Operand right = operand_of(b, b_rest, b_source, a);
  const int64_t U = a_source ? a_source->numel() : a.size(1);
  STD_TORCH_CHECK((b_source ? b_source->numel() : b.size(1)) == U,
                  "both operands must have the same number of values");
  const OnDevice device(a);
  Tensor y = new_images(a, a.size(0), U, a.size(2), a.size(3));
  check(sacl_cuda_add(dtype_of(a), pixels(a), static_cast<int>(U), left, right,
                      y.mutable_data_ptr(), device.stream()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> slim_add_backward(
    Tensor dy, int64_t a_live, int64_t a_rest, std::optional<Tensor> a_source, int64_t b_live,
    int64_t b_rest, std::optional<Tensor> b_source) {
  images(dy, "dy");
  const OnDevice device(dy);
  const auto [da, da_rest] = operand_gradients(dy, a_live, a_rest, a_source, device.stream());
  const auto [db, db_rest] = operand_gradients(dy, b_live, b_rest, b_source, device.stream());
  return {da, da_rest, db, db_rest};
}

Tensor slim_gate(Tensor x, std::optional<Tensor> map, Tensor gate, std::optional<Tensor> index,
                 std::optional<Tensor> map_index) {
  const GateShape s = gate_shape(x, map, gate, index, map_index);
  const OnDevice device(x);
  Tensor y = new_images(x, s.N, s.K + s.R, x.size(2), x.size(3));
  check(sacl_cuda_gate(s, x.const_data_ptr(), values_of(map), gate.const_data_ptr(),
                       indices(index, s.K, "index"), indices(map_index, s.R, "map_index"),
                       y.mutable_data_ptr(), device.stream()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> slim_gate_backward(Tensor dy, Tensor x,
                                                      std::optional<Tensor> map, Tensor gate,
                                                      std::optional<Tensor> index,
                                                      std::optional<Tensor> map_index) {
  const GateShape s = gate_shape(x, map, gate, index, map_index);
  images(dy, "dy");
  check_sizes(dy, {s.N, s.K + s.R, x.size(2), x.size(3)}, "dy");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "x and dy are of different types");
  const OnDevice device(x);
  Tensor dx = new_images(x, s.N, s.K, x.size(2), x.size(3));
  Tensor dmap = s.R ? new_images(x, 1, s.R, x.size(2), x.size(3))
                    : new_tensor(x, {0}, x.scalar_type());
  Tensor dgate = new_tensor(x, {s.N, s.C}, x.scalar_type());
  check(sacl_cuda_gate_backward(s, dy.const_data_ptr(), x.const_data_ptr(), values_of(map),
                                gate.const_data_ptr(), indices(index, s.K, "index"),
                                indices(map_index, s.R, "map_index"), dx.mutable_data_ptr(),
                                dmap.mutable_data_ptr(), dgate.mutable_data_ptr(),
                                device.stream()));
  return {dx, dmap, dgate};
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, SACL_DISPATCH_KEY, m) {
  m.impl("slim_add", TORCH_BOX(&slim_add));
  m.impl("slim_add_backward", TORCH_BOX(&slim_add_backward));
  m.impl("slim_gate", TORCH_BOX(&slim_gate));
  m.impl("slim_gate_backward", TORCH_BOX(&slim_gate_backward));
}

}  // namespace sacl::cuda
