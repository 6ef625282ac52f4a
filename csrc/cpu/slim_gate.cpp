// A slim activation times a gate for each sample, in one pass over the live channels, on floats in
// channels-last memory.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/common.h"

namespace sacl {

Tensor slim_gate(Tensor x, std::optional<Tensor> map, Tensor gate, std::optional<Tensor> x_index,
                 std::optional<Tensor> map_index) {
  const int64_t N = x.size(0), K = x.size(1), HW = x.size(2) * x.size(3), C = gate.size(1);
  const int64_t R = map.has_value() ? map->size(1) : 0;
  const ChannelIndex own(x_index, K, C), others = ChannelIndex::listed(map_index, C);
  Tensor y = new_nhwc(N, K + R, x.size(2), x.size(3));
  const float *in = nhwc(x), *of_map = R ? nhwc(*map) : nullptr, *factors = floats(gate);
  float* out = floats_out(y);
  torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const std::vector<float> f = own.of(factors + n * C), g = others.of(factors + n * C);
      float* to = out + n * HW * (K + R);
      kernels().scale(in + n * HW * K, K, f.data(), to, K + R, HW, K, false);
      if (R) kernels().scale(of_map, R, g.data(), to + K, K + R, HW, R, false);
    }
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> slim_gate_backward(Tensor dy, Tensor x,
                                                      std::optional<Tensor> map, Tensor gate,
                                                      std::optional<Tensor> x_index,
                                                      std::optional<Tensor> map_index) {
  const int64_t N = x.size(0), K = x.size(1), HW = x.size(2) * x.size(3), C = gate.size(1);
  const int64_t R = map.has_value() ? map->size(1) : 0, all = K + R;
  const ChannelIndex own(x_index, K, C), others = ChannelIndex::listed(map_index, C);
  Tensor dx = new_nhwc(N, K, x.size(2), x.size(3));
  Tensor dmap = R ? new_nhwc(1, R, x.size(2), x.size(3)) : torch::stable::new_empty(x, {0});
  Tensor dgate = torch::stable::new_zeros(gate, {N, C});
  const float *g = nhwc(dy), *in = nhwc(x), *of_map = R ? nhwc(*map) : nullptr;
  const float* factors = floats(gate);
  torch::stable::parallel_for(0, N, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(all);
    for (int64_t n = begin; n < end; ++n) {
      const float* own_dy = g + n * HW * all;
      kernels().scale(own_dy, all, own.of(factors + n * C).data(), floats_out(dx) + n * HW * K, K,
                      HW, K, false);
      kernels().products(own_dy, all, in + n * HW * K, K, HW, K, sums.data());
      if (R) kernels().products(own_dy + K, all, of_map, R, HW, R, sums.data() + K);
      float* dfactors = floats_out(dgate) + n * C;
      for (int64_t c = 0; c < K; ++c) dfactors[own[c]] = sums[c];
      for (int64_t c = 0; c < R; ++c) dfactors[others[c]] = sums[K + c];
    }
  });
  if (R) {
    torch::stable::parallel_for(0, HW, 16, [&](int64_t begin, int64_t end) {
      float* to = floats_out(dmap) + begin * R;
      std::fill_n(to, (end - begin) * R, 0.0f);
      for (int64_t n = 0; n < N; ++n)
        kernels().scale(g + (n * HW + begin) * all + K, all, others.of(factors + n * C).data(), to,
                        R, end - begin, R, true);
    });
  }
  return {dx, dmap, dgate};
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, CPU, m) {
  m.impl("slim_gate", TORCH_BOX(&slim_gate));
  m.impl("slim_gate_backward", TORCH_BOX(&slim_gate_backward));
}

}  // namespace sacl
