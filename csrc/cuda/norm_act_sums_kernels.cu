// Sums over the image or the samples of what a norm's neighbours leave raw, formed as it is loaded:
// the mean for a squeeze, the gradient of a gate, the gradient of an offset.
#include "cuda/sum_to_offset.h"

namespace sacl::cuda {
namespace {

constexpr int kEnough = 1;  // blocks of a multiprocessor from which on a sum is not cut into parts

// dy times the operand.
template <int V>
struct Product {
  static constexpr int kInputs = 2;
  Affine<V> affine;
  int act;

  __device__ Product(const ValueArguments& arguments, int K, int channel)
      : affine(affine_of<V>(arguments.rows, K, channel)), act(arguments.act) {}
  __device__ void operator()(const float (&in)[2][V], float (&out)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = affine.at(v, in[1][v]);
    activate(act, out);
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] *= in[0][v];
  }
};

// Of the rows of coefficients.
template <int V>
struct NormInput {
  static constexpr int kInputs = 2;
  InputGradient<V> gradient;

  __device__ NormInput(const ValueArguments& arguments, int K, int channel)
      : gradient(arguments.rows, K, channel) {}
  __device__ void operator()(const float (&in)[2][V], float (&out)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = gradient.at(v, in[0][v], in[1][v]);
  }
};

// Pixels within the border get equal shares of what is missing to a sum of 0. Each block sums up
// the border anew, for that is little.
__global__ void fill_inner(Border border, int K, int chunk, float* sums) {
  const int channel = blockIdx.y * kColumns + threadIdx.x;
  double sum[1] = {0};
  if (channel < K) {
    const int outer = border.H * border.W - border.inner;
#pragma unroll 4
    for (int i = threadIdx.y; i < outer; i += kColumnRows)
      sum[0] += sums[static_cast<int64_t>(border.pixel(i)) * K + channel];
  }
  sum_columns_of_block<kColumns, kColumnRows>(sum);
  if (channel >= K) return;
  const float share = static_cast<float>(-sum[0] / border.inner);
  const int stop = min(border.inner, static_cast<int>(blockIdx.x + 1) * chunk);
  for (int i = blockIdx.x * chunk + threadIdx.y; i < stop; i += kColumnRows)
    sums[static_cast<int64_t>(border.inner_pixel(i)) * K + channel] = share;
}

// Launches.

template <template <int> class Value, class T, class Out>
const char* sum(const OffsetShape& s, const OffsetBorder& border, ValueArguments arguments,
                const void* first, const void* second, float factor, Out* sums, float* scratch,
                void* stream) {
  const bool vectors = s.O % kLanes<T> == 0 && aligned(first) && aligned(second) && aligned(sums);
  const auto run =
      vectors ? &launch_sums<T, kLanes<T>, Value, Out> : &launch_sums<T, 1, Value, Out>;
  return run(s, border, kEnough, arguments, static_cast<const T*>(first),
             static_cast<const T*>(second), factor, sums, scratch, stream);
}

const char* launch_fill(const Border& border, int K, float* sums, void* stream) {
  const int slices = ceil_div(K, kColumns);
  const int blocks = ceil_div(2 * multiprocessors(), slices);
  const int chunk = ceil_div(ceil_div(border.inner, blocks), kColumnRows) * kColumnRows;
  return launch(&fill_inner, dim3(ceil_div(border.inner, chunk), slices),
                dim3(kColumns, kColumnRows), stream, border, K, chunk, sums);
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

int64_t sacl_cuda_norm_act_sums_scratch(OffsetShape shape, OffsetBorder border) {
  return sums_scratch(shape, border, kEnough);
}

const char* sacl_cuda_norm_act_mean(OffsetShape shape, const void* x, const float* affine, int act,
                                    void* mean, float* scratch, void* stream) {
  if (const char* failure = unknown_activation(act)) return failure;
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const float share = 1.0f / (static_cast<float>(shape.H) * shape.W);
    return sum<Activated, T>(shape, whole_image(shape), {affine, act}, x, nullptr, share,
                             static_cast<T*>(mean), scratch, stream);
  });
}

const char* sacl_cuda_norm_act_gate_gradient(OffsetShape shape, const void* dy, const void* x,
                                             const float* affine, int act, float* dgate,
                                             float* scratch, void* stream) {
  if (const char* failure = unknown_activation(act)) return failure;
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return sum<Product, T>(shape, whole_image(shape), {affine, act}, dy, x, 1, dgate, scratch,
                           stream);
  });
}

const char* sacl_cuda_norm_act_offset_gradient(OffsetShape shape, OffsetBorder border,
                                               const void* g, const void* y,
                                               const float* coefficients, float* doffset,
                                               float* scratch, void* stream) {
  const Border pixels(shape, border);
  if (pixels.inner < shape.H * shape.W) {
    const char* failure = with_type(shape.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const auto run = coefficients ? &sum<NormInput, T, float> : &sum<Itself, T, float>;
      return run(shape, border, {coefficients, sacl::kNone}, g, y, 1, doffset, scratch, stream);
    });
    if (failure) return failure;
  }
  return pixels.inner ? launch_fill(pixels, shape.O, doffset, stream) : nullptr;
}
}
