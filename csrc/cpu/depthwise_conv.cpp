// Depthwise convolution on floats in channels-last memory, over all channels or over those of an
// index list: output channel j reads input channel in_index[j]. Rows of the input are copied into a
// padded block that stays in the cache (where the index list costs nothing extra) and convolved
// there.
//
// The weight's gradient is summed in fp32 over some 64 pixels and in double above, in a fixed
// order.
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/common.h"
#include "cpu/selection.h"

namespace sacl {
namespace {

constexpr int64_t kBlockBytes = 128 * 1024;  // of padded input that is worked on at once
constexpr int64_t kGroups = 32;              // partial sums of the weight's gradient

// A convolution of (N, H, W) images of K channels, which are selected from C as they are read.
struct Problem {
  int64_t N, H, W, C, K, pad_h, pad_w;
  Window window;
  const Selected* selected = nullptr;
  int64_t OH, OW, padded_width, block;  // block: rows of output

  Problem(int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, Window window, int64_t pad_h,
          int64_t pad_w, const Selected* selected)
      : N(N), H(H), W(W), C(C), K(K), pad_h(pad_h), pad_w(pad_w), window(window),
        selected(selected) {
    OH = (H + 2 * pad_h - window.dilation_h * (window.kh - 1) - 1) / window.stride_h + 1;
    OW = (W + 2 * pad_w - window.dilation_w * (window.kw - 1) - 1) / window.stride_w + 1;
    STD_TORCH_CHECK(OH > 0 && OW > 0, "the window is larger than the padded image");
    padded_width = W + 2 * pad_w;
    const int64_t fits = kBlockBytes / (padded_width * K * static_cast<int64_t>(sizeof(float)));
    block = std::clamp((fits - window.dilation_h * (window.kh - 1)) / window.stride_h,
                       std::min<int64_t>(4, OH), OH);
  }

  int64_t blocks() const { return (OH + block - 1) / block; }

  // `one(n, first, rows, padded)` for each block of output rows, with the input that they read:
  // (rows, padded_width, K), padded with zeros.
  template <class F>
  void for_blocks(const float* x, int64_t begin, int64_t end, const F& one) const {
    Scratch scratch;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks(), first = task % blocks() * block;
      const int64_t rows = std::min(block, OH - first);
      const int64_t rows_in =
          (rows - 1) * window.stride_h + window.dilation_h * (window.kh - 1) + 1;
      const int64_t top = first * window.stride_h - pad_h, side = pad_w * K;
      float* padded = scratch.get(rows_in * padded_width * K);
      for (int64_t r = 0; r < rows_in; ++r) {
        float* out = padded + r * padded_width * K;
        if (top + r < 0 || top + r >= H) {
          std::fill_n(out, padded_width * K, 0.0f);
          continue;
        }
        const float* in = x + (n * H + top + r) * W * C;
        std::fill_n(out, side, 0.0f);
        if (selected)
          kernels().select(in, out + side, W, selected->view());
        else
          std::copy_n(in, W * K, out + side);
        std::fill_n(out + side + W * K, side, 0.0f);
      }
      one(n, first, rows, padded);
    }
  }
};

int64_t padded_channels(int64_t K) { return std::max(K, kLanes); }

// (K, kh, kw) to (kh kw, K), the last tap first if `flipped`; K padded.
std::vector<float> taps_first(const Tensor& weight, bool flipped = false) {
  const int64_t filters = weight.size(0), taps = weight.size(1) * weight.size(2);
  const int64_t K = padded_channels(filters);
  const float* w = floats(weight);
  std::vector<float> out(taps * K, 0.0f);
  for (int64_t c = 0; c < filters; ++c)
    for (int64_t t = 0; t < taps; ++t) out[(flipped ? taps - 1 - t : t) * K + c] = w[c * taps + t];
  return out;
}

// The output (N, OH, OW, K) or, with `back`, that with other channels (N, OH, OW, back's).
void convolve(const Problem& p, const float* x, const std::vector<float>& taps, float* y,
              const Selected* back) {
  const int64_t channels = back ? back->view().taken : p.K;
  torch::stable::parallel_for(0, p.N * p.blocks(), 1, [&](int64_t begin, int64_t end) {
    Scratch live;
    p.for_blocks(x, begin, end, [&](int64_t n, int64_t first, int64_t rows, const float* padded) {
      float* out = y + (n * p.OH + first) * p.OW * channels;
      float* own = back ? live.get(rows * p.OW * p.K) : out;
      kernels().depthwise_conv(padded, p.padded_width, taps.data(), own, rows, p.OW, p.K, p.window);
      if (back) kernels().select(own, out, rows * p.OW, back->view());
    });
  });
}

// For each row (or column) of the input, the taps and rows of the output that it contributes to.
void contributions(int64_t size, int64_t out, int64_t k, int64_t stride, int64_t pad,
                   int64_t dilation, std::vector<Tap>& taps, std::vector<int32_t>& ends) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t t = 0; t < k; ++t) {
      const int64_t shifted = i + pad - t * dilation;
      if (shifted >= 0 && shifted % stride == 0 && shifted / stride < out)
        taps.push_back({static_cast<int32_t>(t), static_cast<int32_t>(shifted / stride)});
    }
    ends.push_back(static_cast<int32_t>(taps.size()));
  }
}

// Runs of columns with the same taps; those of column i are the ones from ends[i - 1] to ends[i].
std::vector<Run> runs_of(const std::vector<Tap>& taps, const std::vector<int32_t>& ends,
                         int64_t stride) {
  std::vector<Run> runs;
  std::vector<int64_t> last(stride, -1);  // the run of the column `stride` before
  for (int64_t i = 0; i < static_cast<int64_t>(ends.size()); ++i) {
    const int32_t first = i ? ends[i - 1] : 0, count = ends[i] - first;
    int64_t& current = last[i % stride];
    bool same = current >= 0 && runs[current].tap_count == count;
    for (int32_t t = 0; same && t < count; ++t) {
      const Tap& before = taps[runs[current].taps + t];
      same = before.tap == taps[first + t].tap &&
             before.at + runs[current].count == taps[first + t].at;
    }
    if (same) {
      ++runs[current].count;
    } else {
      current = static_cast<int64_t>(runs.size());
      runs.push_back({static_cast<int32_t>(i), static_cast<int32_t>(stride), 1, first, count});
    }
  }
  return runs;
}

Window window_of(int64_t kh, int64_t kw, const std::vector<int64_t>& stride,
                 const std::vector<int64_t>& dilation) {
  return {kh, kw, stride[0], stride[1], dilation[0], dilation[1]};
}

}  // namespace

// x (N, C, H, W), weight (K, kh, kw) -> (N, K, OH, OW)
Tensor depthwise_conv(Tensor x, Tensor weight, std::optional<Tensor> in_index,
                      std::vector<int64_t> stride, std::vector<int64_t> padding,
                      std::vector<int64_t> dilation) {
  const int64_t C = x.size(1), filters = weight.size(0), K = padded_channels(filters);
  const auto selected = Selected::of(in_index, C, filters);
  const Problem p(x.size(0), x.size(2), x.size(3), C, K,
                  window_of(weight.size(1), weight.size(2), stride, dilation), padding[0],
                  padding[1], pointer(selected));
  std::optional<Selected> back;
  if (filters < K) back = Selected::first(K, filters);
  Tensor y = new_nhwc(p.N, filters, p.OH, p.OW);
  convolve(p, nhwc(x), taps_first(weight), floats_out(y), pointer(back));
  return y;
}

// dy (N, K, OH, OW), weight (K, kh, kw) -> dx (N, C, H, W)
Tensor depthwise_conv_backward_input(Tensor dy, Tensor weight, std::optional<Tensor> in_index,
                                     int64_t H, int64_t W, int64_t C, std::vector<int64_t> stride,
                                     std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                     std::optional<Tensor> /*positions*/) {
  const int64_t N = dy.size(0), filters = dy.size(1), OH = dy.size(2), OW = dy.size(3);
  const int64_t kh = weight.size(1), kw = weight.size(2), K = padded_channels(filters);
  const auto selected = Selected::of(in_index, C, filters);
  std::optional<Selected> back, padded;
  if (selected) back = selected->inverse();
  if (filters < K) padded = Selected::first(filters, K);
  Tensor dx = new_nhwc(N, C, H, W);
  const float* g = nhwc(dy);
  float* out = floats_out(dx);
  const int64_t pad_h = dilation[0] * (kh - 1) - padding[0];
  const int64_t pad_w = dilation[1] * (kw - 1) - padding[1];
  if (stride[0] == 1 && stride[1] == 1 && pad_h >= 0 && pad_w >= 0) {
    // The convolution of dy with the flipped weight.
    const Problem p(N, OH, OW, filters, K, window_of(kh, kw, stride, dilation), pad_h, pad_w,
                    pointer(padded));
    convolve(p, g, taps_first(weight, true), out, pointer(back));
    return dx;
  }
  const std::vector<float> taps = taps_first(weight);
  std::vector<Tap> rows, columns;
  std::vector<int32_t> row_ends, column_ends;
  contributions(H, OH, kh, stride[0], padding[0], dilation[0], rows, row_ends);
  contributions(W, OW, kw, stride[1], padding[1], dilation[1], columns, column_ends);
  const std::vector<Run> runs = runs_of(columns, column_ends, stride[1]);
  std::vector<float> wide(padded ? N * OH * OW * K : 0);
  if (padded) {
    torch::stable::parallel_for(0, N * OH, 8, [&](int64_t begin, int64_t end) {
      kernels().select(g + begin * OW * filters, wide.data() + begin * OW * K, (end - begin) * OW,
                       padded->view());
    });
    g = wide.data();
  }
  torch::stable::parallel_for(0, N * H, 8, [&](int64_t begin, int64_t end) {
    Scratch live;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / H, h = task % H, from = h ? row_ends[h - 1] : 0;
      float* row = out + task * W * C;
      float* own = back ? live.get(W * K) : row;
      kernels().depthwise_conv_backward_input(g + n * OH * OW * K, OW, taps.data(), own, K, kw,
                                              rows.data() + from, row_ends[h] - from, runs.data(),
                                              static_cast<int64_t>(runs.size()), columns.data());
      if (back) kernels().select(own, row, W, back->view());
    }
  });
  return dx;
}

// x (N, C, H, W), dy (N, K, OH, OW) -> dweight (K, kh, kw)
Tensor depthwise_conv_backward_weight(Tensor x, Tensor dy, std::optional<Tensor> in_index,
                                      int64_t kh, int64_t kw, std::vector<int64_t> stride,
                                      std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const int64_t filters = dy.size(1), K = padded_channels(filters), taps = kh * kw;
  const auto selected = Selected::of(in_index, x.size(1), filters);
  std::optional<Selected> padded;
  if (filters < K) padded = Selected::first(filters, K);
  const Problem p(x.size(0), x.size(2), x.size(3), x.size(1), K,
                  window_of(kh, kw, stride, dilation), padding[0], padding[1], pointer(selected));
  const float *in = nhwc(x), *g = nhwc(dy);
  const int64_t tasks = p.N * p.blocks(), groups = std::min(tasks, kGroups);
  std::vector<double> partial(groups * taps * K, 0.0);
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    Scratch wide;
    for (int64_t group = begin; group < end; ++group) {
      p.for_blocks(in, group * tasks / groups, (group + 1) * tasks / groups,
                   [&](int64_t n, int64_t first, int64_t rows, const float* image) {
                     const float* own = g + (n * p.OH + first) * p.OW * filters;
                     if (padded) {
                       float* scratch = wide.get(rows * p.OW * K);
                       kernels().select(own, scratch, rows * p.OW, padded->view());
                       own = scratch;
                     }
                     kernels().depthwise_conv_backward_weight(image, p.padded_width, own,
                                                              &partial[group * taps * K], rows,
                                                              p.OW, K, p.window);
                   });
    }
  });
  for (int64_t group = 1; group < groups; ++group)
    for (int64_t i = 0; i < taps * K; ++i) partial[i] += partial[group * taps * K + i];
  Tensor dweight = torch::stable::new_empty(x, {filters, kh, kw});
  float* out = floats_out(dweight);
  for (int64_t c = 0; c < filters; ++c)
    for (int64_t t = 0; t < taps; ++t) out[c * taps + t] = static_cast<float>(partial[t * K + c]);
  return dweight;
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, CPU, m) {
  m.impl("depthwise_conv", TORCH_BOX(&depthwise_conv));
  m.impl("depthwise_conv_backward_input", TORCH_BOX(&depthwise_conv_backward_input));
  m.impl("depthwise_conv_backward_weight", TORCH_BOX(&depthwise_conv_backward_weight));
}

}  // namespace sacl
