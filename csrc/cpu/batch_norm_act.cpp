// Batch normalisation over rows, with the activation after it, on (M, K) floats: M = N H W rows of
// an NHWC activation. Statistics take one read, the output one read and one write, the backward
// pass two reads of both inputs and one write; the activation costs no pass of its own.
//
// Sums are in fp32 over 64 rows and in double above, of differences to the first row, so an offset
// costs no digits; they are added in a fixed order, whatever the number of threads.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/common.h"

namespace sacl {
namespace {

constexpr int64_t kChunk = 1024;  // rows of one task

// The sums (2 K) of all chunks of rows, by `one(first, rows, scratch, total)`.
template <class F>
std::vector<double> sum_chunks(int64_t M, int64_t K, const F& one) {
  const int64_t chunks = (M + kChunk - 1) / kChunk;
  std::vector<double> partial(chunks * 2 * K, 0.0), total(2 * K, 0.0);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * round_up(K, kLanes));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i * kChunk;
      one(first, std::min(kChunk, M - first), scratch.data(), &partial[i * 2 * K]);
    }
  });
  for (int64_t i = 0; i < chunks; ++i)
    for (int64_t c = 0; c < 2 * K; ++c) total[c] += partial[i * 2 * K + c];
  return total;
}

template <class F>
void for_chunks(int64_t M, const F& one) {
  const int64_t chunks = (M + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kChunk;
    one(first, std::min(end * kChunk, M) - first);
  });
}

std::vector<float> scale_of(const Tensor& weight, const float* rstd) {
  std::vector<float> scale(floats(weight), floats(weight) + weight.size(0));
  for (size_t c = 0; c < scale.size(); ++c) scale[c] *= rstd[c];
  return scale;
}

}  // namespace

// x (M, K); weight, bias (K) -> y (M, K), mean (K), 1 / deviation (K)
std::tuple<Tensor, Tensor, Tensor> batch_norm_act(Tensor x, Tensor weight, Tensor bias, double eps,
                                                  int64_t act) {
  const int64_t M = x.size(0), K = x.size(1);
  const float* in = floats(x);
  Tensor y = torch::stable::new_empty(x, {M, K});
  Tensor mean = torch::stable::new_empty(x, {K}), rstd = torch::stable::new_empty(x, {K});
  auto total = sum_chunks(M, K, [&](int64_t first, int64_t rows, float* part, double* sums) {
    kernels().sums_forward(in + first * K, in, rows, K, part, sums);
  });
  for (int64_t c = 0; c < K; ++c) {
    const double rest = total[c] / M, variance = total[K + c] / M - rest * rest;
    floats_out(mean)[c] = static_cast<float>(in[c] + rest);
    const double positive = variance < 0 ? 0 : variance;  // NaN stays NaN
    floats_out(rstd)[c] = static_cast<float>(1 / std::sqrt(positive + eps));
  }
  const std::vector<float> scale = scale_of(weight, floats(rstd));
  const Channels k{floats(mean), scale.data(), floats(bias)};
  float* out = floats_out(y);
  for_chunks(M, [&](int64_t first, int64_t rows) {
    kernels().apply(act, in + first * K, out + first * K, rows, K, k);
  });
  return {y, mean, rstd};
}

// -> dx (M, K), dweight (K), dbias (K)
std::tuple<Tensor, Tensor, Tensor> batch_norm_act_backward(Tensor dy, Tensor x, Tensor weight,
                                                           Tensor bias, Tensor mean, Tensor rstd,
                                                           int64_t act) {
  const int64_t M = x.size(0), K = x.size(1);
  const float *g = floats(dy), *in = floats(x), *r = floats(rstd);
  Tensor dx = torch::stable::new_empty(x, {M, K});
  Tensor dweight = torch::stable::new_empty(x, {K}), dbias = torch::stable::new_empty(x, {K});
  const std::vector<float> scale = scale_of(weight, r);
  const Channels k{floats(mean), scale.data(), floats(bias)};
  auto total = sum_chunks(M, K, [&](int64_t first, int64_t rows, float* part, double* sums) {
    kernels().sums_backward(act, g + first * K, in + first * K, rows, K, k, part, sums);
  });
  std::vector<float> constant(K), projection(K);
  for (int64_t c = 0; c < K; ++c) {
    floats_out(dbias)[c] = static_cast<float>(total[c]);
    floats_out(dweight)[c] = static_cast<float>(total[K + c] * r[c]);
    constant[c] = static_cast<float>(scale[c] * total[c] / M);
    projection[c] = static_cast<float>(scale[c] * total[K + c] * r[c] * r[c] / M);
  }
  float* out = floats_out(dx);
  for_chunks(M, [&](int64_t first, int64_t rows) {
    kernels().gradient(act, g + first * K, in + first * K, out + first * K, rows, K, k, constant.data(),
             projection.data());
  });
  return {dx, dweight, dbias};
}

STABLE_TORCH_LIBRARY_FRAGMENT(sacl_fast, m) {
  m.def("batch_norm_act(Tensor x, Tensor weight, Tensor bias, float eps, int act) -> "
        "(Tensor, Tensor, Tensor)");
  m.def("batch_norm_act_backward(Tensor dy, Tensor x, Tensor weight, Tensor bias, Tensor mean, "
        "Tensor rstd, int act) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&batch_norm_act));
  m.impl("batch_norm_act_backward", TORCH_BOX(&batch_norm_act_backward));
}

}  // namespace sacl
