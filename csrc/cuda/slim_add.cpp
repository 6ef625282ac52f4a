// The sum of two slim activations on a CUDA device; see ../operators.cpp. All tensors of values are
// of one type. Whether an index list is in order is not looked at: only without one is the gradient
// of an operand dy itself.
#include <tuple>

#include "cuda/positions.h"
#include "cuda/sums.h"

namespace sacl::cuda {
namespace {

int pixels(const Tensor& x) { return static_cast<int>(x.numel() / x.size(1)); }

Operand operand_of(const Tensor& x, const std::optional<Tensor>& rest,
                   const std::optional<Tensor>& index, const Tensor& like) {
  images(x, "an operand");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type() && pixels(x) == pixels(like),
                  "both operands must be of one type and have the same number of values");
  const int64_t constants = rest ? rest->numel() : 0;
  const void* values =
      rest ? plain(*rest, {constants}, like.scalar_type(), "a_rest or b_rest") : nullptr;
  return {x.const_data_ptr(), values,
          index ? indices(index, index->numel(), "a_index or b_index") : nullptr,
          static_cast<int>(x.size(1)), static_cast<int>(constants)};
}

// Gradients of an operand with `live` channels and constants; empty where it is dy itself.
std::tuple<Tensor, Tensor> operand_gradients(const Tensor& dy, int64_t live, int64_t constants,
                                             const std::optional<Tensor>& index, void* stream) {
  Tensor drest = new_tensor(dy, {constants}, dy.scalar_type());
  if (!index) return {new_tensor(dy, {0}, dy.scalar_type()), drest};
  const int U = static_cast<int>(dy.size(1));
  const Positions from(dy, std::nullopt, index, std::nullopt, live + constants, stream);
  const int64_t* channels = from.data();
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

}  // namespace

Tensor slim_add(Tensor a, std::optional<Tensor> a_rest, std::optional<Tensor> a_index, Tensor b,
                std::optional<Tensor> b_rest, std::optional<Tensor> b_index) {
  const Operand left = operand_of(a, a_rest, a_index, a);
  const Operand right = operand_of(b, b_rest, b_index, a);
  const int64_t U = a_index ? a_index->numel() : a.size(1);
  STD_TORCH_CHECK((b_index ? b_index->numel() : b.size(1)) == U,
                  "both operands must have the same number of values");
  const OnDevice device(a);
  Tensor y = new_images(a, a.size(0), U, a.size(2), a.size(3));
  check(sacl_cuda_slim_add(dtype_of(a), pixels(a), static_cast<int>(U), left, right,
                           y.mutable_data_ptr(), device.stream()));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> slim_add_backward(Tensor dy, int64_t a_live,
                                                             int64_t a_rest,
                                                             std::optional<Tensor> a_index,
                                                             int64_t b_live, int64_t b_rest,
                                                             std::optional<Tensor> b_index) {
  images(dy, "dy");
  const OnDevice device(dy);
  const auto [da, da_rest] = operand_gradients(dy, a_live, a_rest, a_index, device.stream());
  const auto [db, db_rest] = operand_gradients(dy, b_live, b_rest, b_index, device.stream());
  return {da, da_rest, db, db_rest};
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, SACL_DISPATCH_KEY, m) {
  m.impl("slim_add", TORCH_BOX(&slim_add));
  m.impl("slim_add_backward", TORCH_BOX(&slim_add_backward));
}

}  // namespace sacl::cuda
