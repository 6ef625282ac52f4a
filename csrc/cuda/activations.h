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

// The same on the device, for the few values where a kernel for each activation is not worth it.
__device__ inline float activate(int act, float z) {
  switch (act) {
#define SACL_ROW(name) \
  case k##name: return name::value(z);
    SACL_ACTIVATIONS(SACL_ROW)
#undef SACL_ROW
    default: return z;
  }
}

__device__ inline float through_activation(int act, float dy, float z) {
  switch (act) {
#define SACL_ROW(name) \
  case k##name: return name::through(dy, z);
    SACL_ACTIVATIONS(SACL_ROW)
#undef SACL_ROW
    default: return dy;
  }
}

}  // namespace sacl::cuda
