// The sum of two slim activations in one pass over the live channels, on floats in channels-last
// memory.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common.h"
#include "cpu/folded.h"
#include "cpu/selection.h"

namespace sacl {
namespace {

constexpr int64_t kRowBlock = 128;  // rows that are worked on at once

int64_t pixels(const Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

// One operand of a sum: channel u of the result is live channel index[u], or beyond those one of
// the constants.
struct Operand {
  int64_t live, constants;
  ChannelIndex index;

  Operand(int64_t live, int64_t constants, const std::optional<Tensor>& list)
      : live(live), constants(constants), index(list, list.has_value() ? list->numel() : live,
                                                list.has_value() ? live + constants : live) {}

  bool is_whole() const { return index.all(); }

  // For each channel of the result the live one, or -1.
  Selected taken() const {
    std::vector<int32_t> from(index.size());
    for (int64_t u = 0; u < index.size(); ++u)
      from[u] = index[u] < live ? static_cast<int32_t>(index[u]) : -1;
    return Selected(std::move(from), live);
  }

  void add_constants(const std::optional<Tensor>& rest, std::vector<float>& sum) const {
    for (int64_t u = 0; u < index.size(); ++u)
      if (index[u] >= live) sum[u] += floats(*rest)[index[u] - live];
  }

  // dy's channels back where the live ones were.
  Tensor gradient(const Tensor& dy) const {
    Tensor dx = new_nhwc(dy.size(0), live, dy.size(2), dy.size(3));
    const Selected back = taken().inverse();
    const float* in = nhwc(dy);
    float* out = floats_out(dx);
    torch::stable::parallel_for(0, pixels(dy), kRowBlock, [&](int64_t begin, int64_t end) {
      kernels().select(in + begin * index.size(), out + begin * live, end - begin, back.view());
    });
    return dx;
  }

  Tensor constant_gradient(const Tensor& dy, const std::vector<double>& sums) const {
    Tensor drest = torch::stable::new_zeros(dy, {constants});
    for (int64_t u = 0; u < index.size(); ++u)
      if (index[u] >= live) floats_out(drest)[index[u] - live] = static_cast<float>(sums[u]);
    return drest;
  }
};

}  // namespace

Tensor slim_add(Tensor a, std::optional<Tensor> a_rest, std::optional<Tensor> a_index, Tensor b,
                std::optional<Tensor> b_rest, std::optional<Tensor> b_index) {
  const Operand left(a.size(1), a_rest.has_value() ? a_rest->numel() : 0, a_index);
  const Operand right(b.size(1), b_rest.has_value() ? b_rest->numel() : 0, b_index);
  const int64_t channels = left.index.size();
  STD_TORCH_CHECK(right.index.size() == channels && pixels(a) == pixels(b),
                  "both operands must have the same number of values");
  std::vector<float> constant(channels, 0.0f);
  left.add_constants(a_rest, constant);
  right.add_constants(b_rest, constant);
  const int64_t fold = channels < kLanes ? kLanes : 1;
  for (int64_t i = channels; i < fold * channels; ++i) constant.push_back(constant[i - channels]);
  std::optional<Selected> from_a, from_b;
  if (!left.is_whole()) from_a = left.taken();
  if (!right.is_whole()) from_b = right.taken();
  Tensor y = new_nhwc(a.size(0), channels, a.size(2), a.size(3));
  const float *x_a = nhwc(a), *x_b = nhwc(b);
  float* out = floats_out(y);
  torch::stable::parallel_for(0, pixels(a), kRowBlock, [&](int64_t begin, int64_t end) {
    Scratch scratch_a, scratch_b;
    for (int64_t row = begin; row < end; row += kRowBlock) {
      const int64_t rows = std::min(kRowBlock, end - row);
      const auto own = [&](const float* x, int64_t live, const Selected* from, Scratch& scratch) {
        if (!from) return x + row * live;
        float* taken = scratch.get(rows * channels);
        kernels().select(x + row * live, taken, rows, from->view());
        return static_cast<const float*>(taken);
      };
      const float* of_a = own(x_a, left.live, pointer(from_a), scratch_a);
      const float* of_b = own(x_b, right.live, pointer(from_b), scratch_b);
      // `fold` rows of a few channels are as one row of more, which fills vectors.
      const int64_t wide = rows / fold * fold;
      kernels().add(of_a, of_b, constant.data(), out + row * channels, wide / fold,
                    fold * channels);
      kernels().add(of_a + wide * channels, of_b + wide * channels, constant.data(),
                    out + (row + wide) * channels, rows - wide, channels);
    }
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> slim_add_backward(Tensor dy, int64_t a_live,
                                                             int64_t a_rest,
                                                             std::optional<Tensor> a_index,
                                                             int64_t b_live, int64_t b_rest,
                                                             std::optional<Tensor> b_index) {
  const Operand left(a_live, a_rest, a_index), right(b_live, b_rest, b_index);
  std::vector<double> sums;
  if (a_rest || b_rest) sums = column_sums(dy);
  const Tensor none = torch::stable::new_empty(dy, {0});
  return {left.is_whole() ? none : left.gradient(dy), left.constant_gradient(dy, sums),
          right.is_whole() ? none : right.gradient(dy), right.constant_gradient(dy, sums)};
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, CPU, m) {
  m.impl("slim_add", TORCH_BOX(&slim_add));
  m.impl("slim_add_backward", TORCH_BOX(&slim_add_backward));
}

}  // namespace sacl
