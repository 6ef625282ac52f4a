// The parts of a batch norm whose neighbours do most of its work, on a CUDA device; see
// ../operators.cpp. Images, gate, dmean and the mean are of one type, all else is float32. An index
// out of range is not looked for.
#include <tuple>

#include "cuda/sums.h"

namespace sacl::cuda {
namespace {

NormActShape shape_of(const Tensor& x) {
  return {dtype_of(x), static_cast<int>(x.size(0)), static_cast<int>(x.size(2) * x.size(3)),
          static_cast<int>(x.size(1))};
}

// Images of x's size and type.
const void* like(const Tensor& t, const Tensor& x, const char* name) {
  check_sizes(t, {x.size(0), x.size(1), x.size(2), x.size(3)}, name);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " is of another type than x or g");
  return images(t, name);
}

// A value of each sample and channel, or null.
const void* by_sample(const std::optional<Tensor>& t, const Tensor& x, const char* name) {
  return t ? plain(*t, {x.size(0), x.size(1)}, x.scalar_type(), name) : nullptr;
}

// Vectors of x's channels.
const float* rows(const Tensor& t, const Tensor& x, const char* name) {
  return floats(t, {4, x.size(1)}, name);
}

NormActChannels channels_of(const Tensor& sums, int64_t vectors, const Tensor& weight,
                            const std::optional<Tensor>& kept_index,
                            const std::optional<Tensor>& zeroed_index, int64_t act) {
  STD_TORCH_CHECK(sums.dim() == 3 && sums.size(0) > 0 && sums.size(2) > 0,
                  "there are no sets of sums");
  floats(sums, {sums.size(0), vectors, sums.size(2)}, "sums");
  NormActChannels s{};
  s.sets = static_cast<int>(sums.size(0)), s.K = static_cast<int>(sums.size(2));
  s.R = zeroed_index ? static_cast<int>(zeroed_index->numel()) : 0;
  s.C = static_cast<int>(weight.numel()), s.act = static_cast<int>(act);
  check_channels(s.K, s.R, s.C, kept_index);
  return s;
}

// To which the sum over each image is.
OffsetShape sample_shape(const Tensor& x) { return offset_shape_of(x, x.size(1), x.size(0), 1, 1); }

Tensor sums_scratch_of(const Tensor& x, const OffsetShape& s, const OffsetBorder& border) {
  return scratch(x, sacl_cuda_norm_act_sums_scratch(s, border));
}

}  // namespace

Tensor norm_act_moments(Tensor x) {
  const void* in = images(x, "x");
  const NormActShape s = shape_of(x);
  const OnDevice device(x);
  Tensor sums = new_tensor(x, {sacl_cuda_norm_act_sets(s), 3, s.K}, ScalarType::Float);
  check(sacl_cuda_norm_act_moments(s, in, floats_out(sums), device.stream()));
  return sums;
}

std::tuple<Tensor, Tensor> norm_act_affine(Tensor sums, Tensor weight, Tensor bias,
                                           std::optional<Tensor> kept_index,
                                           std::optional<Tensor> zeroed_index,
                                           std::optional<Tensor> running_mean,
                                           std::optional<Tensor> running_var,
                                           std::optional<Tensor> mean_shift, int64_t count,
                                           double momentum, double eps, int64_t act) {
  const NormActChannels s = channels_of(sums, 3, weight, kept_index, zeroed_index, act);
  const BatchNormStatistics statistics{running(running_mean, s.C), running(running_var, s.C),
                                       static_cast<double>(count), static_cast<float>(momentum),
                                       static_cast<float>(eps)};
  const OnDevice device(sums);
  Tensor affine = new_tensor(sums, {4, s.K}, ScalarType::Float);
  Tensor rest = new_tensor(sums, {s.R}, ScalarType::Float);
  check(sacl_cuda_norm_act_affine(s, floats(sums, {s.sets, 3, s.K}, "sums"),
                                  floats(weight, {s.C}, "weight"), floats(bias, {s.C}, "bias"),
                                  indices(kept_index, s.K, "kept_index"),
                                  indices(zeroed_index, s.R, "zeroed_index"), statistics,
                                  mean_shift ? floats(*mean_shift, {s.K}, "mean_shift") : nullptr,
                                  floats_out(affine), floats_out(rest), device.stream()));
  return {affine, rest};
}

Tensor norm_act_apply(Tensor x, Tensor affine, int64_t act, std::optional<Tensor> other,
                      std::optional<Tensor> other_affine, int64_t act_after) {
  const void* in = images(x, "x");
  const NormActShape s = shape_of(x);
  STD_TORCH_CHECK(other || !other_affine, "other_affine goes with other");
  const OnDevice device(x);
  Tensor y = new_images(x, s.N, s.K, x.size(2), x.size(3));
  check(sacl_cuda_norm_act_apply(s, in, rows(affine, x, "affine"), static_cast<int>(act),
                                 other ? like(*other, x, "other") : nullptr,
                                 other_affine ? rows(*other_affine, x, "other_affine") : nullptr,
                                 static_cast<int>(act_after), y.mutable_data_ptr(),
                                 device.stream()));
  return y;
}

Tensor norm_act_mean(Tensor x, Tensor affine, int64_t act) {
  const void* in = images(x, "x");
  const OffsetShape s = sample_shape(x);
  const OnDevice device(x);
  Tensor mean = new_images(x, s.N, s.O, 1, 1);
  const Tensor partial = sums_scratch_of(x, s, whole_image(s));
  check(sacl_cuda_norm_act_mean(s, in, rows(affine, x, "affine"), static_cast<int>(act),
                                mean.mutable_data_ptr(), floats_out(partial), device.stream()));
  return mean;
}

std::tuple<Tensor, Tensor> norm_act_gradient(Tensor dy, Tensor x, Tensor affine, int64_t act,
                                             std::optional<Tensor> gate,
                                             std::optional<Tensor> dmean) {
  const void *in = images(x, "x"), *gradient = images(dy, "dy");
  const NormActShape s = shape_of(x);
  const int width = static_cast<int>(dy.size(1));
  STD_TORCH_CHECK(width >= s.K, "dy has ", width, " channels, fewer than x's ", s.K);
  check_sizes(dy, {s.N, width, x.size(2), x.size(3)}, "dy");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy is of another type than x");
  const bool unchanged = act == kNone && !gate && !dmean && width == s.K;
  const OnDevice device(x);
  Tensor g = unchanged ? new_tensor(x, {0}, x.scalar_type())
                       : new_images(x, s.N, s.K, x.size(2), x.size(3));
  Tensor gsums = new_tensor(x, {sacl_cuda_norm_act_sets(s), 2, s.K}, ScalarType::Float);
  check(sacl_cuda_norm_act_gradient(
      s, gradient, width, in, rows(affine, x, "affine"), static_cast<int>(act),
      by_sample(gate, x, "gate"), by_sample(dmean, x, "dmean"),
      unchanged ? nullptr : g.mutable_data_ptr(), floats_out(gsums), device.stream()));
  return {g, gsums};
}

Tensor norm_act_gate_gradient(Tensor dy, Tensor x, Tensor affine, int64_t act) {
  const void *in = images(x, "x"), *gradient = like(dy, x, "dy");
  const OffsetShape s = sample_shape(x);
  const OnDevice device(x);
  Tensor dgate = new_tensor(x, {s.N, s.O}, ScalarType::Float);
  const Tensor partial = sums_scratch_of(x, s, whole_image(s));
  check(sacl_cuda_norm_act_gate_gradient(s, gradient, in, rows(affine, x, "affine"),
                                         static_cast<int>(act), floats_out(dgate),
                                         floats_out(partial), device.stream()));
  return dgate;
}

std::tuple<Tensor, Tensor, Tensor> norm_act_coefficients(Tensor gsums, std::optional<Tensor> drest,
                                                         Tensor weight, Tensor bias,
                                                         std::optional<Tensor> kept_index,
                                                         std::optional<Tensor> zeroed_index,
                                                         Tensor affine, int64_t count,
                                                         int64_t act) {
  const NormActChannels s = channels_of(gsums, 2, weight, kept_index, zeroed_index, act);
  const OnDevice device(gsums);
  Tensor coefficients = new_tensor(gsums, {4, s.K}, ScalarType::Float);
  Tensor dweight = new_tensor(gsums, {s.C}, ScalarType::Float);
  Tensor dbias = new_tensor(gsums, {s.C}, ScalarType::Float);
  check(sacl_cuda_norm_act_coefficients(
      s, floats(gsums, {s.sets, 2, s.K}, "gsums"), drest ? floats(*drest, {s.R}, "drest") : nullptr,
      floats(bias, {s.C}, "bias"), indices(kept_index, s.K, "kept_index"),
      indices(zeroed_index, s.R, "zeroed_index"), floats(affine, {4, s.K}, "affine"),
      static_cast<double>(count), floats_out(coefficients), floats_out(dweight), floats_out(dbias),
      device.stream()));
  return {coefficients, dweight, dbias};
}

Tensor norm_act_input_gradient(Tensor g, Tensor y, Tensor coefficients) {
  const void *gradient = images(g, "g"), *in = like(y, g, "y");
  const NormActShape s = shape_of(g);
  const OnDevice device(g);
  Tensor dy = new_images(g, s.N, s.K, g.size(2), g.size(3));
  check(sacl_cuda_norm_act_input_gradient(s, gradient, in, rows(coefficients, g, "coefficients"),
                                          dy.mutable_data_ptr(), device.stream()));
  return dy;
}

Tensor norm_act_offset_gradient(Tensor g, std::optional<Tensor> y,
                                std::optional<Tensor> coefficients, std::vector<int64_t> shape,
                                std::vector<int64_t> border) {
  const void* gradient = images(g, "g");
  STD_TORCH_CHECK(!y == !coefficients, "y goes with coefficients");
  STD_TORCH_CHECK(shape.size() == 4 && shape[1] == g.size(1),
                  "the offset's shape is not (1 or N, K, 1 or H, 1 or W)");
  const OffsetShape s = offset_shape_of(g, shape[1], shape[0], shape[2], shape[3]);
  OffsetBorder sides = whole_image(s);
  if (!border.empty()) {
    STD_TORCH_CHECK(border.size() == 4 && s.n == 1 && s.h == s.H && s.w == s.W,
                    "a border has four sides and goes with the shape (1, K, H, W)");
    for (int64_t side : border) STD_TORCH_CHECK(side >= 0, "a side of the border is negative");
    STD_TORCH_CHECK(border[0] + border[1] <= s.H && border[2] + border[3] <= s.W,
                    "the border is larger than the image");
    sides = {static_cast<int>(border[0]), static_cast<int>(border[1]), static_cast<int>(border[2]),
             static_cast<int>(border[3])};
  }
  const OnDevice device(g);
  const Tensor memory = new_tensor(g, {s.n, s.h, s.w, s.O}, ScalarType::Float);
  const Tensor partial = sums_scratch_of(g, s, sides);
  check(sacl_cuda_norm_act_offset_gradient(
      s, sides, gradient, y ? like(*y, g, "y") : nullptr,
      coefficients ? rows(*coefficients, g, "coefficients") : nullptr, floats_out(memory),
      floats_out(partial), device.stream()));
  return seen_as(memory, {s.n, s.O, s.h, s.w},
                 {int64_t{s.h} * s.w * s.O, 1, int64_t{s.w} * s.O, s.O});
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, SACL_DISPATCH_KEY, m) {
  m.impl("norm_act_moments", TORCH_BOX(&norm_act_moments));
  m.impl("norm_act_affine", TORCH_BOX(&norm_act_affine));
  m.impl("norm_act_apply", TORCH_BOX(&norm_act_apply));
  m.impl("norm_act_mean", TORCH_BOX(&norm_act_mean));
  m.impl("norm_act_gradient", TORCH_BOX(&norm_act_gradient));
  m.impl("norm_act_gate_gradient", TORCH_BOX(&norm_act_gate_gradient));
  m.impl("norm_act_coefficients", TORCH_BOX(&norm_act_coefficients));
  m.impl("norm_act_input_gradient", TORCH_BOX(&norm_act_input_gradient));
  m.impl("norm_act_offset_gradient", TORCH_BOX(&norm_act_offset_gradient));
}

}  // namespace sacl::cuda
