// What kernels form of what they load, V channels at a time: a class Value<V> is made of
// ValueArguments and calculates from the values of kInputs images.
#pragma once

#include "cuda/activations.h"
#include "cuda/norm.h"

namespace sacl::cuda {

struct ValueArguments {
  const float* rows;  // vectors of the channels
  int act;
};

template <int V>
struct Itself {
  static constexpr int kInputs = 1;

  __device__ Itself(const ValueArguments&, int, int) {}
  __device__ void operator()(const float (&in)[1][V], float (&out)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = in[0][v];
  }
};

// An operand: act((x - mean) * scale + bias), of the rows of affine; without rows, act(x).
template <int V>
struct Activated {
  static constexpr int kInputs = 1;
  Affine<V> affine;
  int act;

  __device__ Activated(const ValueArguments& arguments, int K, int channel)
      : affine(affine_of<V>(arguments.rows, K, channel)), act(arguments.act) {}
  __device__ void operator()(const float (&in)[1][V], float (&out)[V]) const {
#pragma unroll
    for (int v = 0; v < V; ++v) out[v] = affine.at(v, in[0][v]);
    activate(act, out);
  }
};

}  // namespace sacl::cuda
