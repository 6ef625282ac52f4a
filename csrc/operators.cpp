// The operators' schemas. Their CPU implementations are in cpu/, their CUDA ones in cuda/; shapes
// of outputs and gradients for autograd are registered in Python (sacl_fast/ops). An operator NAME
// is in cpu/NAME.cpp, cuda/NAME.cpp and sacl_fast/ops/NAME.py; what its backward pass calls is
// named NAME_backward and more.
//
// Images are (N, C, H, W) in channels-last memory. K channels of an activation are live; the rest
// are constants (1, R, 1, 1), a map (1, R, H, W) that is the same for all samples, or by sample
// (N, R, 1, 1). An index list x_index (int64) says which of the C channels of the full activation
// those of x are; null is all of them in order. Weights, biases, running statistics and their
// gradients are full.
//
// On the CPU all values are float32. On a CUDA device activations are float32, float16 or bfloat16;
// what weights then are, the files in cuda/ say.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(sacl_fast, m) {
  // act(batch norm in training). x (N, K, H, W); weight, bias, running_mean, running_var (C);
  // kept_index (K); zeroed_index (R) or null: channels of value 0.
  // -> y (N, K, H, W); rest (1, R, 1, 1), of the zeroed channels; mean (K); 1 / deviation (K).
  // Running statistics, of the kept and the zeroed, are updated; count: values of a channel of the
  // full activation, for the unbiased variance.
  m.def("batch_norm_act(Tensor x, Tensor weight, Tensor bias, Tensor? kept_index, "
        "Tensor? zeroed_index, Tensor(a!)? running_mean, Tensor(b!)? running_var, int count, "
        "float momentum, float eps, int act) -> (Tensor, Tensor, Tensor, Tensor)");
  // -> dx (N, K, H, W), dweight (C), dbias (C)
  m.def("batch_norm_act_backward(Tensor dy, Tensor? drest, Tensor x, Tensor weight, Tensor bias, "
        "Tensor? kept_index, Tensor? zeroed_index, Tensor mean, Tensor rstd, int act) -> "
        "(Tensor, Tensor, Tensor)");

  // Depthwise convolution: output j reads channel in_index[j] of x (N, C, H, W) with weight[j].
  // weight (K, kh, kw) -> (N, K, OH, OW)
  m.def("depthwise_conv(Tensor x, Tensor weight, Tensor? in_index, int[] stride, int[] padding, "
        "int[] dilation) -> Tensor");
  // dy (N, K, OH, OW) -> dx (N, C, H, W)
  m.def("depthwise_conv_backward_input(Tensor dy, Tensor weight, Tensor? in_index, int H, int W, "
        "int C, int[] stride, int[] padding, int[] dilation) -> Tensor");
  // -> dweight (K, kh, kw)
  m.def("depthwise_conv_backward_weight(Tensor x, Tensor dy, Tensor? in_index, int kh, int kw, "
        "int[] stride, int[] padding, int[] dilation) -> Tensor");

  // 1x1 convolution of stride 1 from live inputs to kept filters: x (N, K, H, W); weight (Cout,
  // Cin); in_index (K), out_index (O); rest (1 or N, R), constants over the image that the inputs
  // rest_index (R) hold, or null; offset (1 or N, O, 1 or H, 1 or W), added, or null.
  // -> (N, O, H, W)
  m.def("slim_pointwise(Tensor x, Tensor weight, Tensor? in_index, Tensor? out_index, "
        "Tensor? rest, Tensor? rest_index, Tensor? offset) -> Tensor");
  // offset_shape: of the forward pass, empty without one.
  // -> dx, dweight (Cout, Cin), drest, doffset; empty (0) tensors for what there was none of
  m.def("slim_pointwise_backward(Tensor dy, Tensor x, Tensor weight, Tensor? in_index, "
        "Tensor? out_index, Tensor? rest, Tensor? rest_index, int[] offset_shape) -> "
        "(Tensor, Tensor, Tensor, Tensor)");

  // The sum of two activations of which each channel may be live or constant over samples and
  // image: a (N, Ka, H, W), a_rest (Ra) or null, b and b_rest likewise. Channel u of the result is
  // channel a_index[u] (U) of a's live channels and, after them, its constants (null: all live ones
  // in order), plus b's.
  // -> (N, U, H, W)
  m.def("slim_add(Tensor a, Tensor? a_rest, Tensor? a_index, Tensor b, Tensor? b_rest, "
        "Tensor? b_index) -> Tensor");
  // -> da, da_rest (Ra), db, db_rest (Rb); da or db is empty (0) where it is dy itself.
  m.def("slim_add_backward(Tensor dy, int a_live, int a_rest, Tensor? a_index, int b_live, "
        "int b_rest, Tensor? b_index) -> (Tensor, Tensor, Tensor, Tensor)");

  // Channels times a gate for each sample: x (N, K, H, W), map (1, R, H, W) or null, gate (N, C),
  // x_index (K) or null, map_index (R).
  // -> (N, K + R, H, W)
  m.def("slim_gate(Tensor x, Tensor? map, Tensor gate, Tensor? x_index, Tensor? map_index) -> "
        "Tensor");
  // -> dx, dmap (1, R, H, W) or empty (0), dgate (N, C)
  m.def("slim_gate_backward(Tensor dy, Tensor x, Tensor? map, Tensor gate, Tensor? x_index, "
        "Tensor? map_index) -> (Tensor, Tensor, Tensor)");

  // Views of images (H, W, 3) uint8, normalised: (x - mean) / std in 0..255. draws (V, n, 16)
  // float64, a row for each view and image: top, left, height and width of the crop; whether it is
  // flipped; four operations (0 none, 1 brightness, 2 contrast, 3 saturation, 4 hue), their
  // factors; whether it is gray; sigma of the blur (0: none); the value from which on it is
  // solarised (256: not at all). window: of the blur, odd. Work is shared among `threads` threads
  // of its own.
  // -> (V n, 3, size, size) float32
  m.def("augment(Tensor[] images, Tensor draws, int size, int window, Tensor mean, Tensor std, "
        "int threads) -> Tensor");
}
