// The compiled module sacl_fast._C: importing it registers the operators; by itself it tells how it
// was built.
//
// .cu files include no torch header (that takes nvcc minutes) and are called through the extern "C"
// launchers of cuda/*.h.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#ifdef SACL_WITH_CUDA
#include "cuda/build_info.h"
#endif

#define SACL_TEXT_OF(x) #x
#define SACL_TEXT(x) SACL_TEXT_OF(x)

namespace py = pybind11;

namespace {

constexpr const char* kCompiler =
#if defined(__clang__)
    "clang " SACL_TEXT(__clang_major__) "." SACL_TEXT(__clang_minor__) "." SACL_TEXT(
        __clang_patchlevel__);
#elif defined(__GNUC__)
    "gcc " SACL_TEXT(__GNUC__) "." SACL_TEXT(__GNUC_MINOR__) "." SACL_TEXT(__GNUC_PATCHLEVEL__);
#else
    "unknown";
#endif

py::dict build_info() {
  py::dict info;
  info["version"] = SACL_VERSION;
  info["cxx"] = kCompiler;
#ifdef SACL_WITH_CUDA
  info["cuda"] = sacl_cuda_version();
  info["architectures"] = py::str(sacl_cuda_architectures()).attr("split")(",");
#else
  info["cuda"] = py::none();
  info["architectures"] = py::list();
#endif
  return info;
}

std::string device_architecture() {
#ifdef SACL_WITH_CUDA
  int architecture = 0;
  if (const char* failure = sacl_device_architecture(&architecture)) {
    throw std::runtime_error("no kernel could run on a CUDA device (" + std::string(failure) +
                             "); this build holds code for " + sacl_cuda_architectures());
  }
  return "sm_" + std::to_string(architecture / 10);
#else
  throw std::runtime_error("sacl_fast._C was built without CUDA");
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled operators of sacl-fast.";
  m.def("build_info", &build_info, "How this module was built; see _C.pyi.");
  m.def(
      "device_architecture", &device_architecture,
      "The architecture, such as \"sm_90\", of the code that a kernel ran on the current device.");
}
