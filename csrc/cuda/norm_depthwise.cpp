// Depthwise convolution between batch norms on a CUDA device; see ../operators.cpp. Images, weights
// and their gradients are of one type. An in_index that is out of range or names a channel twice is
// not looked for.
#include <tuple>

#include "cuda/depthwise_conv_shape.h"

namespace sacl::cuda {
namespace {

// Four rows of what a norm makes of its channels.
const float* rows_of(const std::optional<Tensor>& rows, int64_t channels, const char* name) {
  return rows ? floats(*rows, {4, channels}, name) : nullptr;
}

// The activation after a norm; an operand that is not normalised has none.
int activation_of(const std::optional<Tensor>& affine, int64_t act) {
  STD_TORCH_CHECK(act >= 0 && act < kActivations, "there is no activation ", act);
  return affine ? static_cast<int>(act) : kNone;
}

DepthwiseConvShape shape_of(const Tensor& x, const Tensor& weight, Pair stride, Pair padding,
                            Pair dilation) {
  STD_TORCH_CHECK(weight.dim() == 3, "weight is not (K, kh, kw)");
  return depthwise_shape(x, x.size(2), x.size(3), x.size(1), weight.size(0), weight.size(1),
                         weight.size(2), stride, padding, dilation);
}

}  // namespace

std::tuple<Tensor, Tensor> norm_depthwise(Tensor x, std::optional<Tensor> affine, int64_t act,
                                          Tensor weight, std::optional<Tensor> in_index,
                                          std::vector<int64_t> stride, std::vector<int64_t> padding,
                                          std::vector<int64_t> dilation) {
  const void* in = images(x, "x");
  const DepthwiseConvShape s = shape_of(x, weight, stride, padding, dilation);
  const OnDevice device(x);
  const int64_t* source = in_index_of(in_index, s);
  const int64_t sets = sacl_cuda_norm_depthwise_sets(s, in, source);
  Tensor y = new_images(x, s.N, s.K, s.OH, s.OW);
  Tensor sums = new_tensor(x, {sets, 3, s.K}, ScalarType::Float);
  check(sacl_cuda_norm_depthwise(s, in, rows_of(affine, s.C, "affine"), activation_of(affine, act),
                                 plain(weight, {s.K, s.kh, s.kw}, x.scalar_type(), "weight"),
                                 source, y.mutable_data_ptr(), floats_out(sums), device.stream()));
  return {y, sums};
}

std::tuple<Tensor, Tensor, Tensor> norm_depthwise_backward(
    Tensor g, std::optional<Tensor> y, std::optional<Tensor> coefficients, Tensor x,
    std::optional<Tensor> affine, int64_t act, Tensor weight, std::optional<Tensor> in_index,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    bool to_norm) {
  const void *in = images(x, "x"), *of_g = images(g, "g");
  const DepthwiseConvShape s = shape_of(x, weight, stride, padding, dilation);
  check_sizes(g, {s.N, s.K, s.OH, s.OW}, "g");
  STD_TORCH_CHECK(g.scalar_type() == x.scalar_type(), "x and g are of different types");
  STD_TORCH_CHECK(y.has_value() == coefficients.has_value(), "y goes with coefficients");
  const void* of_y = y ? images(*y, "y") : nullptr;
  if (y) {
    check_sizes(*y, {s.N, s.K, s.OH, s.OW}, "y");
    STD_TORCH_CHECK(y->scalar_type() == x.scalar_type(), "x and y are of different types");
  }
  const OnDevice device(x);
  const int64_t* source = in_index_of(in_index, s);
  const NormDepthwiseSums sizes = sacl_cuda_norm_depthwise_backward_sums(s, of_g, of_y, in, source);
  const bool to_sums = to_norm && affine;
  Tensor dx = new_images(x, s.N, s.C, s.H, s.W);
  Tensor gsums = to_sums ? new_tensor(x, {sizes.sets, 2, s.C}, ScalarType::Float)
                         : new_tensor(x, {0}, ScalarType::Float);
  Tensor dweight = new_tensor(x, {s.K, s.kh, s.kw}, x.scalar_type());
  const Tensor partial = scratch(x, sizes.scratch);
  std::optional<Tensor> positions;
  if (in_index) positions = new_tensor(x, {s.C}, ScalarType::Long);
  check(sacl_cuda_norm_depthwise_backward(
      s, of_g, of_y, rows_of(coefficients, s.K, "coefficients"), in, rows_of(affine, s.C, "affine"),
      activation_of(affine, act), plain(weight, {s.K, s.kh, s.kw}, x.scalar_type(), "weight"),
      source, positions ? static_cast<int64_t*>(positions->mutable_data_ptr()) : nullptr,
      dx.mutable_data_ptr(), to_sums ? floats_out(gsums) : nullptr, dweight.mutable_data_ptr(),
      floats_out(partial), device.stream()));
  return {dx, gsums, dweight};
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, SACL_DISPATCH_KEY, m) {
  m.impl("norm_depthwise", TORCH_BOX(&norm_depthwise));
  m.impl("norm_depthwise_backward", TORCH_BOX(&norm_depthwise_backward));
}

}  // namespace sacl::cuda
