// What padding makes of constants, up to the product after it, on a CUDA device; see
// ../operators.cpp. Constants, filters, weight and rest are each float32, float16 or bfloat16;
// their gradients are of the same types, all else is float32. Index lists that are out of range or
// hold a number twice are not looked for.
#include <tuple>
#include <utility>

#include "cuda/depthwise_conv_shape.h"

namespace sacl::cuda {
namespace {

// The runs along a side of n outputs.
Runs runs_of(int n, int64_t size, int64_t k, int64_t stride, int64_t pad, int64_t dilation) {
  STD_TORCH_CHECK(k <= kLargestWindow, "a window has at most ", kLargestWindow, " taps a side");
  Runs runs{};
  for (int i = 0; i < n; ++i) {
    int first = 0, last = -1;
    for (int tap = 0; tap < k; ++tap) {
      const int64_t at = i * stride - pad + tap * dilation;
      if (at < 0 || at >= size) continue;
      if (last < 0) first = tap;
      last = tap;
    }
    const int own = runs.count - 1;
    if (i > 0 && runs.first[own] == first && runs.last[own] == last) continue;
    runs.start[runs.count] = i, runs.first[runs.count] = first, runs.last[runs.count] = last;
    ++runs.count;
  }
  runs.start[runs.count] = n;
  return runs;
}

Numbers numbers(const Tensor& t, std::initializer_list<int64_t> sizes, const char* name) {
  return {const_cast<void*>(plain(t, sizes, t.scalar_type(), name)), dtype_of(t)};
}

Numbers out(const Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t)}; }

// What both passes are given, checked.
struct Border {
  SlimBorderShape shape{};
  SlimBorderInputs inputs{};

  Border(const Tensor& constants, const Tensor& filters, const Tensor& filter_index,
         const Tensor& in_index, int64_t H, int64_t W, Pair stride, Pair padding, Pair dilation,
         const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& norm_index, int64_t act,
         const Tensor& weight, const Tensor& map_index, const std::optional<Tensor>& out_index,
         const std::optional<Tensor>& rest, const std::optional<Tensor>& rest_index) {
    STD_TORCH_CHECK(filters.dim() == 3, "filters is not (Cdw, kh, kw)");
    STD_TORCH_CHECK(weight.dim() == 2, "weight is not (Cout, Cin)");
    STD_TORCH_CHECK(!rest == !rest_index, "rest goes with rest_index");
    const int64_t S = filter_index.numel(), kh = filters.size(1), kw = filters.size(2);
    const int64_t C = norm_weight.numel(), Cout = weight.size(0), Cin = weight.size(1);
    const int64_t O = out_index ? out_index->numel() : Cout, R = rest ? rest->numel() : 0;
    STD_TORCH_CHECK(S > 0 && O > 0, "there are no filters");
    STD_TORCH_CHECK(S <= constants.numel() && S <= filters.size(0) && S <= C && S + R <= Cin &&
                        O <= Cout,
                    "an index list is longer than what it is of");
    STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                    "stride, padding and dilation are pairs");
    const int OH = output_length(H, kh, stride[0], padding[0], dilation[0]);
    const int OW = output_length(W, kw, stride[1], padding[1], dilation[1]);
    STD_TORCH_CHECK(static_cast<int64_t>(OH) * OW <= INT_MAX / 2, "more than 2^30 pixels");
    shape.rows = runs_of(OH, H, kh, stride[0], padding[0], dilation[0]);
    shape.columns = runs_of(OW, W, kw, stride[1], padding[1], dilation[1]);
    shape.classes = shape.rows.count * shape.columns.count;
    shape.S = static_cast<int>(S), shape.act = static_cast<int>(act);
    shape.kh = static_cast<int>(kh), shape.kw = static_cast<int>(kw);
    shape.rest = static_cast<int>(R), shape.O = static_cast<int>(O);
    shape.Cin = static_cast<int>(Cin), shape.Cout = static_cast<int>(Cout);
    shape.constants = static_cast<int>(constants.numel());
    shape.filters = static_cast<int>(filters.size(0));
    shape.norm_channels = static_cast<int>(C);
    inputs.constants = numbers(constants, {constants.numel()}, "constants");
    inputs.filters = numbers(filters, {filters.size(0), kh, kw}, "filters");
    inputs.weight = numbers(weight, {Cout, Cin}, "weight");
    if (rest) inputs.rest = numbers(*rest, {R}, "rest");
    inputs.norm_weight = floats(norm_weight, {C}, "norm_weight");
    inputs.norm_bias = floats(norm_bias, {C}, "norm_bias");
    inputs.filter_index = indices(filter_index, S, "filter_index");
    inputs.in_index = indices(in_index, S, "in_index");
    inputs.norm_index = indices(norm_index, S, "norm_index");
    inputs.map_index = indices(map_index, S, "map_index");
    inputs.out_index = indices(out_index, O, "out_index");
    inputs.rest_index = indices(rest_index, R, "rest_index");
  }

  int OH() const { return shape.rows.start[shape.rows.count]; }
  int OW() const { return shape.columns.start[shape.columns.count]; }
};

}  // namespace

std::tuple<Tensor, Tensor> slim_border(
    Tensor constants, Tensor filters, Tensor filter_index, Tensor in_index, int64_t H, int64_t W,
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    Tensor norm_weight, Tensor norm_bias, Tensor norm_index, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, int64_t count, double momentum, double eps, int64_t act,
    Tensor weight, Tensor map_index, std::optional<Tensor> out_index, std::optional<Tensor> rest,
    std::optional<Tensor> rest_index) {
  const Border border(constants, filters, filter_index, in_index, H, W, stride, padding, dilation,
                      norm_weight, norm_bias, norm_index, act, weight, map_index, out_index, rest,
                      rest_index);
  const SlimBorderShape& s = border.shape;
  const BatchNormStatistics statistics{
      running(running_mean, s.norm_channels), running(running_var, s.norm_channels),
      static_cast<double>(count), static_cast<float>(momentum), static_cast<float>(eps)};
  const OnDevice device(constants);
  Tensor offset = new_images(constants, 1, s.O, border.OH(), border.OW());
  const int64_t classes = s.classes;
  Tensor saved = new_tensor(constants, {classes + 1, s.S}, ScalarType::Float);
  const Tensor values = scratch(constants, classes * s.S + s.rest);
  check(sacl_cuda_slim_border(s, border.inputs, statistics, out(offset), floats_out(saved),
                              floats_out(values), device.stream()));
  return {offset, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> slim_border_backward(
    Tensor doffset, Tensor saved, Tensor constants, Tensor filters, Tensor filter_index,
    Tensor in_index, int64_t H, int64_t W, std::vector<int64_t> stride,
    std::vector<int64_t> padding, std::vector<int64_t> dilation, Tensor norm_weight,
    Tensor norm_bias, Tensor norm_index, int64_t act, Tensor weight, Tensor map_index,
    std::optional<Tensor> out_index, std::optional<Tensor> rest, std::optional<Tensor> rest_index) {
  const Border border(constants, filters, filter_index, in_index, H, W, stride, padding, dilation,
                      norm_weight, norm_bias, norm_index, act, weight, map_index, out_index, rest,
                      rest_index);
  const SlimBorderShape& s = border.shape;
  images(doffset, "doffset");
  check_sizes(doffset, {1, s.O, border.OH(), border.OW()}, "doffset");
  STD_TORCH_CHECK(doffset.scalar_type() == ScalarType::Float, "doffset is not float32");
  const OnDevice device(constants);
  const auto like = [](const Tensor& t, std::vector<int64_t> sizes) {
    return new_tensor(t, std::move(sizes), t.scalar_type());
  };
  Tensor dconstants = like(constants, {s.constants});
  Tensor dfilters = like(filters, {s.filters, s.kh, s.kw});
  Tensor dnorm_weight = like(norm_weight, {s.norm_channels});
  Tensor dnorm_bias = like(norm_bias, {s.norm_channels});
  Tensor dweight = like(weight, {s.Cout, s.Cin});
  Tensor drest = like(rest ? *rest : constants, {s.rest});
  const Tensor partial = scratch(constants, sacl_cuda_slim_border_backward_scratch(s));
  check(sacl_cuda_slim_border_backward(s, border.inputs,
                                       static_cast<const float*>(doffset.const_data_ptr()),
                                       floats(saved, {s.classes + 1, s.S}, "saved"),
                                       {out(dconstants), out(dfilters), out(dweight), out(drest),
                                        floats_out(dnorm_weight), floats_out(dnorm_bias)},
                                       floats_out(partial), device.stream()));
  return {dconstants, dfilters, dnorm_weight, dnorm_bias, dweight, drest};
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, SACL_DISPATCH_KEY, m) {
  m.impl("slim_border", TORCH_BOX(&slim_border));
  m.impl("slim_border_backward", TORCH_BOX(&slim_border_backward));
}

}  // namespace sacl::cuda
