// 1x1 convolution from live inputs to kept filters on the full weight: oneDNN's convolution of the
// live activation with the weights that the index lists name (a product of matrices where there are
// few pixels), and what constants and offsets add.
// The weight's gradient is written into the full one.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common.h"
#include "cpu/folded.h"

namespace sacl {
namespace {

using torch::stable::matmul;
using torch::stable::new_empty;
using torch::stable::new_zeros;
using torch::stable::transpose;

constexpr int64_t kRowsAtOnce = 16;  // of a weight, in one task
// With so few pixels (of all samples), or up to so many in so small a product, oneDNN's convolution
// takes longer than a product of matrices. Forward and backward together, two cores, as a share of
// the convolution's time: 32 pixels, 960 to 240 channels, 0.50; 128 pixels, 256 to 256, 0.84; 512
// pixels, 240 to 40, 0.83, but 256 to 256, 1.3; 800 pixels, 28 to 168, 1.07.
constexpr int64_t kFewPixels = 128, kMorePixels = 512, kSmallProduct = 1 << 23;
const std::array<int64_t, 2> kOnes = {1, 1}, kZeros = {0, 0};

// (b, C, 1, 1) as (b, C), and back
Tensor matrix(const Tensor& t) { return torch::stable::view(t, {t.size(0), t.size(1)}); }
Tensor by_channel(const Tensor& t) { return torch::stable::view(t, {t.size(0), t.size(1), 1, 1}); }

bool is_product(const Tensor& x, const Tensor& weight) {
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  return pixels <= kFewPixels ||
         (pixels <= kMorePixels && pixels * weight.numel() <= kSmallProduct);
}

// (N, C, H, W) in channels-last memory as (N * H * W, C)
Tensor pixels(const Tensor& x) {
  const Tensor last = transpose(transpose(x, 1, 2), 2, 3);
  return torch::stable::view(last, {x.size(0) * x.size(2) * x.size(3), x.size(1)});
}

// Pixels of x times a matrix (C, columns), and a bias: (N, columns, H, W). Not a view: PyTorch's
// in-place operations refuse those.
Tensor times(const Tensor& x, const Tensor& columns, const std::optional<Tensor>& bias) {
  const Tensor y = new_nhwc(x.size(0), columns.size(1), x.size(2), x.size(3));
  const Tensor to = pixels(y), from = pixels(x);
  if (bias.has_value()) {
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(to.get(), bias->get(), from.get(), columns.get(), 1, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(to.get(), from.get(), columns.get()));
  }
  return y;
}

// weight[out][:, in], (O, K, 1, 1)
Tensor gathered(const Tensor& weight, const ChannelIndex& out, const ChannelIndex& in) {
  if (out.all() && in.all()) return by_channel(weight);
  Tensor chosen = new_empty(weight, {out.size(), in.size(), 1, 1});
  const float* from = floats(weight);
  float* to = floats_out(chosen);
  const int64_t columns = weight.size(1), K = in.size();
  torch::stable::parallel_for(0, out.size(), kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const float* row = from + out[o] * columns;
      if (in.all())
        std::copy_n(row, K, to + o * K);
      else
        for (int64_t i = 0; i < K; ++i) to[o * K + i] = row[in[i]];
    }
  });
  return chosen;
}

// full[out][:, in] = chosen
void scatter(const Tensor& chosen, const ChannelIndex& out, const ChannelIndex& in,
             const Tensor& full) {
  const float* from = floats(chosen);
  const int64_t columns = full.size(1), K = in.size();
  torch::stable::parallel_for(0, out.size(), kRowsAtOnce, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      float* row = floats_out(full) + out[o] * columns;
      if (in.all())
        std::copy_n(from + o * K, K, row);
      else
        for (int64_t i = 0; i < K; ++i) row[in[i]] = from[o * K + i];
    }
  });
}

ChannelIndex all_or_listed(const std::optional<Tensor>& index, int64_t of) {
  return index.has_value() ? ChannelIndex::listed(index, of) : ChannelIndex(index, of, of);
}

// Of two vectors
Tensor sum_of(const Tensor& a, const Tensor& b) {
  Tensor total = new_empty(a, {a.numel()});
  for (int64_t i = 0; i < a.numel(); ++i) floats_out(total)[i] = floats(a)[i] + floats(b)[i];
  return total;
}

Tensor convolved(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (is_product(x, weight)) return times(x, transpose(matrix(weight), 0, 1), bias);
  AtenTensorHandle result = nullptr, bias_handle = bias.has_value() ? bias->get() : nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(
      x.get(), weight.get(), bias.has_value() ? &bias_handle : nullptr, kOnes.data(), 2,
      kZeros.data(), 2, kOnes.data(), 2, false, kZeros.data(), 2, 1, &result));
  Tensor y(result);
  if (is_nhwc(y)) return y;  // not always where x has one channel, which is in any order
  Tensor last = new_nhwc(y.size(0), y.size(1), y.size(2), y.size(3));
  return torch::stable::copy_(last, y);
}

// dx and dweight (O, K, 1, 1). With the bias's gradient oneDNN would take twice the time.
std::array<Tensor, 2> gradients(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  if (is_product(x, weight)) {
    const Tensor product = matmul(transpose(pixels(dy), 0, 1), pixels(x));
    return {times(dy, matrix(weight), std::nullopt),
            by_channel(torch::stable::contiguous(product))};
  }
  const std::array<int32_t, 3> wanted = {1, 1, 0};
  AtenTensorHandle dx = nullptr, dweight = nullptr, dbias = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
      dy.get(), x.get(), weight.get(), nullptr, 0, kOnes.data(), 2, kZeros.data(), 2, kOnes.data(),
      2, false, kZeros.data(), 2, 1, wanted.data(), 3, &dx, &dweight, &dbias));
  const Tensor undefined(dbias);
  return {Tensor(dx), Tensor(dweight)};
}

// What is added to y (N, O, H, W): of its own for each sample, for each pixel, for both or neither.
struct Offset {
  bool by_sample, by_pixel;
  int64_t N, H, W, O;

  Offset(const Tensor& y, int64_t samples, int64_t height, int64_t width)
      : by_sample(samples > 1), by_pixel(height > 1 || width > 1), N(y.size(0)), H(y.size(2)),
        W(y.size(3)), O(y.size(1)) {
    STD_TORCH_CHECK((samples == 1 || samples == N) &&
                        ((height == 1 && width == 1) || (height == H && width == W)),
                    "an offset has one value for each channel, or one for each sample, each pixel "
                    "or both");
  }

  bool is_bias() const { return !by_sample && !by_pixel; }

  // `one(row of y, row of the offset)`, O channels each. Rows of an offset are met in the same
  // order whatever the number of threads.
  template <class F>
  void for_rows(float* y, float* offset, const F& one) const {
    const int64_t size = by_pixel ? H * W * O : O;  // of one sample's
    torch::stable::parallel_for(0, by_sample ? N : H, 1, [&](int64_t begin, int64_t end) {
      const int64_t first = by_sample ? begin : 0, last = by_sample ? end : N;
      const int64_t top = by_sample ? 0 : begin, bottom = by_sample ? H : end;
      for (int64_t n = first; n < last; ++n)
        for (int64_t pixel = top * W; pixel < bottom * W; ++pixel)
          one(y + (n * H * W + pixel) * O,
              offset + (by_sample ? n * size : 0) + (by_pixel ? pixel * O : 0));
    });
  }
};

void add(const Tensor& y, const Tensor& values) {
  const Offset offset(y, values.size(0), values.size(2), values.size(3));
  offset.for_rows(floats_out(y), const_cast<float*>(nhwc(values)), [&](float* out, float* row) {
    for (int64_t o = 0; o < offset.O; ++o) out[o] += row[o];
  });
}

// dy (N, O, H, W) summed to the shape of an offset
Tensor sum_to(const Tensor& dy, int64_t samples, int64_t height, int64_t width) {
  const Offset offset(dy, samples, height, width);
  Tensor sums = new_nhwc(samples, offset.O, height, width);
  if (offset.is_bias()) {
    const std::vector<double> total = column_sums(dy);
    std::copy(total.begin(), total.end(), floats_out(sums));
    return sums;
  }
  torch::stable::zero_(sums);
  offset.for_rows(const_cast<float*>(nhwc(dy)), floats_out(sums), [&](float* row, float* sum) {
    for (int64_t o = 0; o < offset.O; ++o) sum[o] += row[o];
  });
  return sums;
}

}  // namespace

Tensor slim_pointwise(Tensor x, Tensor weight, std::optional<Tensor> in_index,
                      std::optional<Tensor> out_index, std::optional<Tensor> rest,
                      std::optional<Tensor> rest_index, std::optional<Tensor> offset) {
  const ChannelIndex in(in_index, x.size(1), weight.size(1));
  const ChannelIndex out = all_or_listed(out_index, weight.size(0));
  nhwc(x);  // checks
  std::optional<Tensor> bias;
  std::vector<Tensor> added;
  const auto take = [&](const Tensor& values) {
    if (values.numel() != out.size())
      added.push_back(values);
    else if (!bias.has_value())
      bias = torch::stable::view(values, {out.size()});
    else
      bias = sum_of(*bias, values);
  };
  if (offset.has_value()) take(*offset);
  if (rest.has_value()) {
    const Tensor chosen =
        matrix(gathered(weight, out, ChannelIndex::listed(rest_index, weight.size(1))));
    take(by_channel(matmul(*rest, transpose(chosen, 0, 1))));
  }
  Tensor y = convolved(x, gathered(weight, out, in), bias);
  for (const Tensor& values : added) add(y, values);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> slim_pointwise_backward(
    Tensor dy, Tensor x, Tensor weight, std::optional<Tensor> in_index,
    std::optional<Tensor> out_index, std::optional<Tensor> rest, std::optional<Tensor> rest_index,
    std::vector<int64_t> offset_shape, std::optional<Tensor> /*out_positions*/,
    std::optional<Tensor> /*in_positions*/) {
  const ChannelIndex in(in_index, x.size(1), weight.size(1));
  const ChannelIndex out = all_or_listed(out_index, weight.size(0));
  nhwc(dy), nhwc(x);
  auto [dx, chosen] = gradients(dy, x, gathered(weight, out, in));
  const bool is_full = out.all() && in.all();
  Tensor dweight = is_full ? matrix(chosen) : new_zeros(weight, {weight.size(0), weight.size(1)});
  if (!is_full) scatter(chosen, out, in, dweight);
  Tensor drest = new_empty(x, {0}), doffset = new_empty(x, {0});
  if (!offset_shape.empty())
    doffset = sum_to(dy, offset_shape[0], offset_shape[2], offset_shape[3]);
  if (rest.has_value()) {
    const ChannelIndex constant = ChannelIndex::listed(rest_index, weight.size(1));
    const std::vector<int64_t> shape = {rest->size(0), out.size(), 1, 1};
    const Tensor response = matrix(offset_shape == shape ? doffset : sum_to(dy, shape[0], 1, 1));
    drest = matmul(response, matrix(gathered(weight, out, constant)));
    const Tensor outer = torch::stable::contiguous(matmul(transpose(response, 0, 1), *rest));
    scatter(outer, out, constant, dweight);
  }
  return {dx, dweight, drest, doffset};
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, CPU, m) {
  m.impl("slim_pointwise", TORCH_BOX(&slim_pointwise));
  m.impl("slim_pointwise_backward", TORCH_BOX(&slim_pointwise_backward));
}

}  // namespace sacl
