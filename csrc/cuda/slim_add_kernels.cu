// The sum of two slim activations, in one pass in NHWC memory.
//
// With index lists a thread takes one channel of some rows, looks up once where it comes from, and
// neighbouring threads read neighbouring channels; without them it takes 16 bytes of channels.
#include "cuda/rows.h"
#include "cuda/values.h"

namespace sacl::cuda {
namespace {

// Where V channels of one operand come from; what is live is formed by a Value.
template <class T, int V, template <int> class Value>
struct Column {
  const T* values;  // of row 0; null: the constant
  int live;
  float constant;
  Value<V> value;

  __device__ Column(const Operand& operand, int channel)
      : Column(operand, static_cast<const T*>(operand.values), source(operand, channel)) {}
  __device__ void read(int64_t row, float (&out)[V]) const {
    if (V > 1 || values) {
      float in[1][V];
      Vec<T, V>::load(values + row * live).unpack(in[0]);
      value(in, out);
    } else {
      out[0] = constant;
    }
  }

 private:
  __device__ Column(const Operand& operand, const T* all, int from)
      : values(from < operand.live ? all + from : nullptr), live(operand.live), constant(0),
        value({values ? operand.affine : nullptr, kNone}, live, from) {
    if (!values) constant = to_float(static_cast<const T*>(operand.constants)[from - live]);
  }
  __device__ static int source(const Operand& operand, int channel) {
    if (V > 1 || !operand.index) return channel;
    const int64_t from = operand.index[channel];
    if (from < 0 || from >= operand.live + operand.constant) __trap();
    return static_cast<int>(from);
  }
};

template <class T, int V, template <int> class Value>
__global__ void __launch_bounds__(kThreads) add(Rows rows, int U, Operand a, Operand b, T* y) {
  const int channel = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  if (channel >= U) return;
  const Column<T, V, Value> left(a, channel), right(b, channel);
#pragma unroll 4
  for (int64_t row = rows.first(); row < rows.stop(); row += blockDim.y) {
    float sum[V], other[V];
    left.read(row, sum);
    right.read(row, other);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] += other[v];
    Vec<T, V>::store(y + row * U + channel, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    select(Rows rows, int C_in, int C_out, const T* in, const int64_t* source, T* out) {
  const int channel = blockIdx.y * blockDim.x + threadIdx.x;
  if (channel >= C_out) return;
  const int64_t from = source[channel];
#pragma unroll 4
  for (int64_t row = rows.first(); row < rows.stop(); row += blockDim.y)
    out[row * C_out + channel] = from < 0 ? from_float<T>(0) : load_one(in + row * C_in + from);
}

// Launches.

template <class T, int V>
const char* launch_add(int64_t M, int U, const Operand& a, const Operand& b, T* y, void* stream) {
  const RowLaunch over(M, U, V);
  const auto kernel = a.affine || b.affine ? &add<T, V, Activated> : &add<T, V, Itself>;
  return launch(kernel, over.grid(), over.block(), stream, over.rows(), U, a, b, y);
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

const char* sacl_cuda_slim_add(int dtype, int64_t M, int U, Operand a, Operand b, void* y,
                               void* stream) {
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool vectors = !a.index && !b.index && U % kLanes<T> == 0 && aligned(a.values) &&
                         aligned(b.values) && aligned(y);
    const auto run = vectors ? &launch_add<T, kLanes<T>> : &launch_add<T, 1>;
    return run(M, U, a, b, static_cast<T*>(y), stream);
  });
}

const char* sacl_cuda_select(int dtype, int64_t M, int C_in, int C_out, const void* in,
                             const int64_t* source, void* out, void* stream) {
  return with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const RowLaunch over(M, C_out, 1);
    return launch(&select<T>, over.grid(), over.block(), stream, over.rows(), C_in, C_out,
                  static_cast<const T*>(in), source, static_cast<T*>(out));
  });
}
}
