// Batch normalisation with the activation after it, on floats in channels-last memory: M = N H W
// rows of K channels, which are some or all of the norm's. Statistics take one read, the output one
// read and one write, the backward pass two reads of both inputs and one write; the activation
// costs no pass of its own. Sums are of differences to the first row, so an offset costs no digits.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common.h"
#include "cpu/folded.h"

namespace sacl {
namespace {

float exp_of(float z) { return std::exp(z); }
float third(float z) { return z / 3; }
float sixth(float z) { return z / 6; }

#include "cpu/activations.inl"

float activate(int64_t act, float z) {
  switch (act) {
#define SACL_ROW(name) \
  case k##name: return name::value(z);
    SACL_ACTIVATIONS(SACL_ROW)
#undef SACL_ROW
    default: STD_TORCH_CHECK(false, "no such activation");
  }
}

float derivative(int64_t act, float z) {
  switch (act) {
#define SACL_ROW(name) \
  case k##name: return name::through(1.0f, z);
    SACL_ACTIVATIONS(SACL_ROW)
#undef SACL_ROW
    default: STD_TORCH_CHECK(false, "no such activation");
  }
}

void check_activation(int64_t act) {
  STD_TORCH_CHECK(act >= 0 && act < kActivations, "no such activation");
}

void move_to(const std::optional<Tensor>& running, int64_t channel, double value, double momentum) {
  if (!running.has_value()) return;
  float& own = floats_out(*running)[channel];
  own = static_cast<float>(own + momentum * (value - own));
}

// Mean, scale and bias of the channels, repeated for folded rows.
class Repeated {
 public:
  Repeated(const Folded& rows, const Tensor& weight, const Tensor& bias, const ChannelIndex& kept,
           const Tensor& mean, const Tensor& rstd)
      : mean_(rows.repeated(floats(mean))) {
    std::vector<float> scale(rows.K), shift(rows.K);
    for (int64_t c = 0; c < rows.K; ++c) {
      scale[c] = floats(weight)[kept[c]] * floats(rstd)[c];
      shift[c] = floats(bias)[kept[c]];
    }
    scale_ = rows.repeated(scale.data());
    bias_ = rows.repeated(shift.data());
  }
  Channels view() const { return {mean_.data(), scale_.data(), bias_.data()}; }

 private:
  std::vector<float> mean_, scale_, bias_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_act(
    Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> kept_index,
    std::optional<Tensor> zeroed_index, std::optional<Tensor> running_mean,
    std::optional<Tensor> running_var, int64_t count, double momentum, double eps, int64_t act) {
  check_activation(act);
  const Folded rows(x.size(0) * x.size(2) * x.size(3), x.size(1));
  const ChannelIndex kept(kept_index, rows.K, weight.numel()),
      zeroed = ChannelIndex::listed(zeroed_index, weight.numel());
  const float* in = nhwc(x);
  Tensor y = new_nhwc(x.size(0), x.size(1), x.size(2), x.size(3));
  Tensor rest = torch::stable::new_empty(x, {1, zeroed.size(), 1, 1});
  Tensor mean = torch::stable::new_empty(x, {rows.K}), rstd = torch::stable::new_empty(x, {rows.K});
  const std::vector<float> origin = rows.repeated(in);  // the first row
  const std::vector<double> total =
      rows.sums([&](int64_t at, int64_t count, int64_t K, float* part, double* sums) {
        kernels().sums_forward(in + at, origin.data(), count, K, part, sums);
      });
  const double unbiased = static_cast<double>(count) / std::max<int64_t>(1, count - 1);
  for (int64_t c = 0; c < rows.K; ++c) {
    const double rest = total[c] / rows.M, variance = total[rows.K + c] / rows.M - rest * rest;
    const double positive = variance < 0 ? 0 : variance;  // NaN stays NaN
    floats_out(mean)[c] = static_cast<float>(in[c] + rest);
    floats_out(rstd)[c] = static_cast<float>(1 / std::sqrt(positive + eps));
    move_to(running_mean, kept[c], in[c] + rest, momentum);
    move_to(running_var, kept[c], positive * unbiased, momentum);
  }
  for (int64_t c = 0; c < zeroed.size(); ++c) {
    floats_out(rest)[c] = activate(act, floats(bias)[zeroed[c]]);
    move_to(running_mean, zeroed[c], 0, momentum);
    move_to(running_var, zeroed[c], 0, momentum);
  }
  const Repeated channels(rows, weight, bias, kept, mean, rstd);
  float* out = floats_out(y);
  rows.for_rows([&](int64_t at, int64_t count, int64_t K) {
    kernels().apply(act, in + at, out + at, count, K, channels.view());
  });
  return {y, rest, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward(Tensor dy, std::optional<Tensor> drest,
                                                           Tensor x, Tensor weight, Tensor bias,
                                                           std::optional<Tensor> kept_index,
                                                           std::optional<Tensor> zeroed_index,
                                                           Tensor mean, Tensor rstd, int64_t act) {
  check_activation(act);
  const Folded rows(x.size(0) * x.size(2) * x.size(3), x.size(1));
  const ChannelIndex kept(kept_index, rows.K, weight.numel()),
      zeroed = ChannelIndex::listed(zeroed_index, weight.numel());
  const float *g = nhwc(dy), *in = nhwc(x), *r = floats(rstd);
  Tensor dx = new_nhwc(x.size(0), x.size(1), x.size(2), x.size(3));
  Tensor dweight = torch::stable::new_zeros(x, {weight.numel()});
  Tensor dbias = torch::stable::new_zeros(x, {weight.numel()});
  const Repeated channels(rows, weight, bias, kept, mean, rstd);
  const std::vector<double> total =
      rows.sums([&](int64_t at, int64_t count, int64_t K, float* part, double* sums) {
        kernels().sums_backward(act, g + at, in + at, count, K, channels.view(), part, sums);
      });
  std::vector<float> constant(rows.K), projection(rows.K);
  for (int64_t c = 0; c < rows.K; ++c) {
    const double scale = channels.view().scale[c];
    floats_out(dbias)[kept[c]] = static_cast<float>(total[c]);
    floats_out(dweight)[kept[c]] = static_cast<float>(total[rows.K + c] * r[c]);
    constant[c] = static_cast<float>(scale * total[c] / rows.M);
    projection[c] = static_cast<float>(scale * total[rows.K + c] * r[c] * r[c] / rows.M);
  }
  if (drest.has_value()) {
    const float* dr = floats(*drest);
    for (int64_t c = 0; c < zeroed.size(); ++c)
      floats_out(dbias)[zeroed[c]] = dr[c] * derivative(act, floats(bias)[zeroed[c]]);
  }
  constant = rows.repeated(constant.data());
  projection = rows.repeated(projection.data());
  float* out = floats_out(dx);
  rows.for_rows([&](int64_t at, int64_t count, int64_t K) {
    kernels().gradient(act, g + at, in + at, out + at, count, K, channels.view(), constant.data(),
                       projection.data());
  });
  return {dx, dweight, dbias};
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
}

}  // namespace sacl
