// The sum of two slim activations that may be raw, on a CUDA device; see ../operators.cpp and
// slim_add.cpp.
#include "cuda/slim.h"

namespace sacl::cuda {

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, SACL_DISPATCH_KEY, m) {
  m.impl("norm_slim_add", TORCH_BOX(&add_operands));
}

}  // namespace sacl::cuda
