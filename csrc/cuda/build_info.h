// How the CUDA part was built, and a probe that runs on a device.
#pragma once

extern "C" {

// The toolkit's version, such as "13.0".
const char* sacl_cuda_version();

// The machine code in the binary, separated by commas, such as "sm_80,sm_90a".
const char* sacl_cuda_architectures();

// Sets `architecture` to the __CUDA_ARCH__ (900 for sm_90) of the code that ran on the current
// device. Returns null, or what failed.
const char* sacl_device_architecture(int* architecture);
}
