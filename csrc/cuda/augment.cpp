// The views of a batch of images on a CUDA device; see ../operators.cpp. Where images lie and what
// is drawn is on the device, so it is checked there: a wrong one ends the kernel.
#include "cuda/host.h"

namespace sacl::cuda {

void augment_packed(Tensor pixels, Tensor images, Tensor draws, int64_t window, Tensor mean,
                    Tensor std, Tensor out, int64_t) {
  STD_TORCH_CHECK(out.dim() == 4 && draws.dim() == 3 && out.size(1) == 3 &&
                      out.size(2) == out.size(3) && out.size(2) > 0 &&
                      out.size(0) == draws.size(0) * draws.size(1),
                  "out must be (views * images, 3, size, size)");
  STD_TORCH_CHECK(window > 0 && window % 2 == 1, "window must be positive and odd");
  const int64_t V = draws.size(0), n = draws.size(1), S = out.size(2);
  AugmentShape s{};
  s.dtype = dtype_of(out);
  AugmentInputs in{};
  in.pixels =
      static_cast<const uint8_t*>(plain(pixels, {pixels.numel()}, ScalarType::Byte, "pixels"));
  in.images = static_cast<const int64_t*>(plain(images, {n, 3}, ScalarType::Long, "images"));
  in.draws = static_cast<const double*>(plain(draws, {V, n, 16}, ScalarType::Double, "draws"));
  in.mean = floats(mean, {3}, "mean"), in.std = floats(std, {3}, "std");
  if (V * n == 0) return;
  sacl::cuda::images(out, "out");
  s.V = static_cast<int>(V), s.n = static_cast<int>(n), s.S = static_cast<int>(S);
  s.radius = static_cast<int>(std::min(window / 2, S - 1)), s.bytes = pixels.numel();
  const OnDevice device(out);
  const Tensor memory = scratch(out, sacl_cuda_augment_scratch(s));
  check(sacl_cuda_augment(s, in, out.mutable_data_ptr(), floats_out(memory), device.stream()));
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, SACL_DISPATCH_KEY, m) {
  m.impl("augment_packed", TORCH_BOX(&augment_packed));
}

}  // namespace sacl::cuda
