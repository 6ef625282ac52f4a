#include <cuda_runtime.h>

#include "build_info.h"

#define SACL_TEXT_OF(x) #x
#define SACL_TEXT(x) SACL_TEXT_OF(x)

namespace {

__global__ void sacl_probe(int* architecture) {
#ifdef __CUDA_ARCH__
  *architecture = __CUDA_ARCH__;
#endif
}

cudaError_t probe(int* architecture) {
  int* on_device = nullptr;
  cudaError_t status = cudaMalloc(&on_device, sizeof(int));
  if (status != cudaSuccess) return status;
  sacl_probe<<<1, 1>>>(on_device);
  status = cudaGetLastError();
  if (status == cudaSuccess) {
    status = cudaMemcpy(architecture, on_device, sizeof(int), cudaMemcpyDeviceToHost);
  }
  cudaFree(on_device);
  return status;
}

}  // namespace

extern "C" {

const char* sacl_cuda_version() {
  return SACL_TEXT(__CUDACC_VER_MAJOR__) "." SACL_TEXT(__CUDACC_VER_MINOR__);
}

// nvcc tells the host code its list of architectures without the "a" of sm_90a, so the build
// passes the list it gave to nvcc.
const char* sacl_cuda_architectures() { return SACL_CUDA_ARCHITECTURES; }

const char* sacl_device_architecture(int* architecture) {
  const cudaError_t status = probe(architecture);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
}
