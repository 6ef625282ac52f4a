// The kernels in the instruction set that the including file has set, as `SACL_KERNELS`. No header
// of the standard library with code in it may come in here: the linker keeps one copy of an inline
// function, and must not keep one that only some processors can run.
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

namespace sacl {
namespace {

constexpr int64_t kRows = 64;  // rows summed in fp32

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

SACL_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

SACL_INLINE Vec load(const float* p, int64_t lanes) {  // the others 0
  Vec v = {};
  std::memcpy(&v, p, lanes * sizeof(float));
  return v;
}

SACL_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

SACL_INLINE void store(float* p, Vec v, int64_t lanes) {
  std::memcpy(p, &v, lanes * sizeof(float));
}

SACL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

typedef int32_t Bits __attribute__((vector_size(sizeof(Vec))));

// Vectors of 16 channels; where K is no multiple, the last one overlaps the one before it, and
// where K < 16 the only one is partly filled.
struct Blocks {
  int64_t K, count, lanes;
  explicit Blocks(int64_t channels)
      : K(channels), count((channels + kLanes - 1) / kLanes), lanes(smaller(channels, kLanes)) {}
  SACL_INLINE int64_t start(int64_t block) const {
    return block + 1 < count ? block * kLanes : K - lanes;
  }
};

template <bool FULL>
SACL_INLINE Vec get(const float* p, Blocks blocks) {
  return FULL ? load(p) : load(p, blocks.lanes);
}

template <bool FULL>
SACL_INLINE void put(float* p, Vec v, Blocks blocks) {
  FULL ? store(p, v) : store(p, v, blocks.lanes);
}

#include "cpu/augment_kernels.inl"
#include "cpu/batch_norm_act_kernels.inl"
#include "cpu/depthwise_conv_kernels.inl"
#include "cpu/slim_add_kernels.inl"
#include "cpu/slim_gate_kernels.inl"

}  // namespace

extern const Kernels SACL_KERNELS = {
    .sums_forward = sums_forward,
    .apply = apply,
    .sums_backward = sums_backward,
    .gradient = gradient,
    .add = add,
    .scale = scale,
    .products = products,
    .select = select,
    .depthwise_conv = depthwise_conv,
    .depthwise_conv_backward_input = depthwise_conv_backward_input,
    .depthwise_conv_backward_weight = depthwise_conv_backward_weight,
    .transpose = transpose,
    .weigh_rows = weigh_rows,
    .luma_sum = luma_sum,
    .blend_constant = blend_constant,
    .blend_luma = blend_luma,
    .turn_hue = turn_hue,
    .blur_columns = blur_columns,
    .blur_row = blur_row,
    .normalise = normalise,
};

}  // namespace sacl
