// Batch norm with the activation after it on a CUDA device; see ../operators.cpp. Activations,
// their gradients and the rest are of one type; parameters, statistics and the gradients of
// parameters are float32, as under autocast.
#include <tuple>

#include "cuda/host.h"

namespace sacl::cuda {
namespace {

BatchNormActShape shape_of(const Tensor& x, const Tensor& weight,
                           const std::optional<Tensor>& kept_index,
                           const std::optional<Tensor>& zeroed_index, int64_t act) {
  BatchNormActShape s{};
  s.dtype = dtype_of(x);
  s.act = static_cast<int>(act);
  s.M = x.numel() / x.size(1);
  s.K = static_cast<int>(x.size(1));
  s.R = zeroed_index ? static_cast<int>(zeroed_index->numel()) : 0;
  s.C = static_cast<int>(weight.numel());
  check_channels(s.K, s.R, s.C, kept_index);
  return s;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act(
    Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> kept_index,
    std::optional<Tensor> zeroed_index, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, int64_t count, double momentum, double eps, int64_t act) {
  const void* in = images(x, "x");
  const BatchNormActShape s = shape_of(x, weight, kept_index, zeroed_index, act);
  const BatchNormStatistics statistics{running(running_mean, s.C), running(running_var, s.C),
                                       static_cast<double>(count), static_cast<float>(momentum),
                                       static_cast<float>(eps)};
  const OnDevice device(x);
  Tensor y = new_images(x, x.size(0), s.K, x.size(2), x.size(3));
  Tensor rest = new_tensor(x, {1, s.R, 1, 1}, x.scalar_type());
  Tensor mean = new_tensor(x, {s.K}, ScalarType::Float);
  Tensor rstd = new_tensor(x, {s.K}, ScalarType::Float);
  const Tensor partial = scratch(x, sacl_cuda_batch_norm_act_scratch(s));
  check(sacl_cuda_batch_norm_act(
      s, in, floats(weight, {s.C}, "weight"), floats(bias, {s.C}, "bias"),
      indices(kept_index, s.K, "kept_index"), indices(zeroed_index, s.R, "zeroed_index"),
      statistics, y.mutable_data_ptr(), rest.mutable_data_ptr(), floats_out(mean), floats_out(rstd),
      floats_out(partial), device.stream()));
  return {y, rest, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward(Tensor dy, std::optional<Tensor> drest,
                                                           Tensor x, Tensor weight, Tensor bias,
                                                           std::optional<Tensor> kept_index,
                                                           std::optional<Tensor> zeroed_index,
                                                           Tensor mean, Tensor rstd, int64_t act) {
  const void *in = images(x, "x"), *g = images(dy, "dy");
  const BatchNormActShape s = shape_of(x, weight, kept_index, zeroed_index, act);
  check_sizes(dy, {x.size(0), s.K, x.size(2), x.size(3)}, "dy");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "x and dy are of different types");
  const void* g_rest = drest ? plain(*drest, {1, s.R, 1, 1}, x.scalar_type(), "drest") : nullptr;
  const OnDevice device(x);
  Tensor dx = new_images(x, x.size(0), s.K, x.size(2), x.size(3));
  Tensor dweight = new_tensor(x, {s.C}, ScalarType::Float);
  Tensor dbias = new_tensor(x, {s.C}, ScalarType::Float);
  const Tensor partial = scratch(x, sacl_cuda_batch_norm_act_scratch(s));
  check(sacl_cuda_batch_norm_act_backward(
      s, g, g_rest, in, floats(weight, {s.C}, "weight"), floats(bias, {s.C}, "bias"),
      indices(kept_index, s.K, "kept_index"), indices(zeroed_index, s.R, "zeroed_index"),
      floats(mean, {s.K}, "mean"), floats(rstd, {s.K}, "rstd"), dx.mutable_data_ptr(),
      floats_out(dweight), floats_out(dbias), floats_out(partial), device.stream()));
  return {dx, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, SACL_DISPATCH_KEY, m) {
  m.impl("batch_norm_act", TORCH_BOX(&batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
}

}  // namespace sacl::cuda
