// The activations of ../activation_list.h on a device.
//
// value(z), in which NaN stays NaN, and through(dy, z): dy times the derivative at z, PyTorch's, at
// the kinks too.
#pragma once

#include "activation_list.h"
#include "cuda/device.h"

namespace sacl::cuda {

struct None {
  __device__ static float value(float z) { return z; }
  __device__ static float through(float dy, float) { return dy; }
};

struct Relu {
  __device__ static float value(float z) { return z < 0 ? 0.0f : z; }
  __device__ static float through(float dy, float z) { return z > 0 ? dy : 0.0f; }
};

struct Relu6 {
  __device__ static float value(float z) { return z < 0 ? 0.0f : (z > 6 ? 6.0f : z); }
  __device__ static float through(float dy, float z) { return z > 0 && z < 6 ? dy : 0.0f; }
};

struct Hardswish {
  __device__ static float value(float z) {
    return z * (z < -3 ? 0.0f : (z > 3 ? 6.0f : z + 3)) * (1.0f / 6);
  }
  __device__ static float through(float dy, float z) {
    return z < -3 ? 0.0f : (z <= 3 ? dy * (z * (1.0f / 3) + 0.5f) : dy);
  }
};

struct Silu {
  __device__ static float value(float z) { return __fdividef(z, 1 + __expf(-z)); }
  __device__ static float through(float dy, float z) {
    const float s = __fdividef(1, 1 + __expf(-z));
    return dy * s * (1 + z * (1 - s));
  }
};

// Calls `f` with the activation that `act` names.
template <class F>
const char* with_activation(int act, const F& f) {
  switch (act) {
#define SACL_ROW(name) \
  case k##name: return f(name());
    SACL_ACTIVATIONS(SACL_ROW)
#undef SACL_ROW
    default: return "no such activation";
  }
}

// What is wrong with `act`, or null.
inline const char* unknown_activation(int act) {
  return with_activation(act, [](auto) { return static_cast<const char*>(nullptr); });
}

// The same on the device, for few values, or for vectors of them in kernels that wait for memory: a
// kernel for each activation is not worth it.
template <class F>
__device__ void on_activation(int act, const F& f) {
  switch (act) {
#define SACL_ROW(name) \
  case k##name: f(name()); break;
    SACL_ACTIVATIONS(SACL_ROW)
#undef SACL_ROW
  }
}

// z becomes its activation.
template <int V>
__device__ void activate(int act, float (&z)[V]) {
  on_activation(act, [&](auto activation) {
#pragma unroll
    for (int v = 0; v < V; ++v) z[v] = decltype(activation)::value(z[v]);
  });
}

// dy becomes the gradient of z.
template <int V>
__device__ void through_activation(int act, float (&dy)[V], const float (&z)[V]) {
  on_activation(act, [&](auto activation) {
#pragma unroll
    for (int v = 0; v < V; ++v) dy[v] = decltype(activation)::through(dy[v], z[v]);
  });
}

__device__ inline float activate(int act, float z) {
  float values[1] = {z};
  activate(act, values);
  return values[0];
}

__device__ inline float through_activation(int act, float dy, float z) {
  float gradient[1] = {dy};
  const float values[1] = {z};
  through_activation(act, gradient, values);
  return gradient[0];
}

}  // namespace sacl::cuda
