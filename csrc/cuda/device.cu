#include <cuda_runtime.h>

#include "cuda/launchers.h"

// torch has a runtime of its own; a thread's device is chosen in each.
extern "C" const char* sacl_cuda_use_device(int device) {
  const cudaError_t status = cudaSetDevice(device);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
