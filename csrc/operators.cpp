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
  // positions (C) int64: where in in_index each channel is, or -1; not given, it is worked out (as
  // it is on CPUs, where it costs nothing).
  m.def("depthwise_conv_backward_input(Tensor dy, Tensor weight, Tensor? in_index, int H, int W, "
        "int C, int[] stride, int[] padding, int[] dilation, *, Tensor? positions=None) -> Tensor");
  // -> dweight (K, kh, kw)
  m.def("depthwise_conv_backward_weight(Tensor x, Tensor dy, Tensor? in_index, int kh, int kw, "
        "int[] stride, int[] padding, int[] dilation) -> Tensor");

  // 1x1 convolution of stride 1 from live inputs to kept filters: x (N, K, H, W); weight (Cout,
  // Cin); in_index (K), out_index (O); rest (1 or N, R), constants over the image that the inputs
  // rest_index (R) hold, or null; offset (1 or N, O, 1 or H, 1 or W), added, or null.
  // -> (N, O, H, W)
  m.def("slim_pointwise(Tensor x, Tensor weight, Tensor? in_index, Tensor? out_index, "
        "Tensor? rest, Tensor? rest_index, Tensor? offset) -> Tensor");
  // offset_shape: of the forward pass, empty without one. out_positions (Cout) and in_positions
  // (Cin): as positions above, of out_index, and of in_index with rest_index after it.
  // -> dx, dweight (Cout, Cin), drest, doffset; empty (0) tensors for what there was none of
  m.def("slim_pointwise_backward(Tensor dy, Tensor x, Tensor weight, Tensor? in_index, "
        "Tensor? out_index, Tensor? rest, Tensor? rest_index, int[] offset_shape, *, "
        "Tensor? out_positions=None, Tensor? in_positions=None) -> "
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

  // What padding makes of constants that a depthwise convolution reads, up to the product after it,
  // for CUDA devices (sacl_fast/ops has the CPUs' reference). Filters filter_index (S) of filters
  // (Cdw, kh, kw) read constants (R) in_index (S), no constant twice, at every pixel of an image
  // (H, W). The map (1, S, OH, OW) that they give is what a norm in training has in its channels
  // norm_index (S), and, after the activation, a 1x1 convolution in its inputs map_index (S), with
  // constants rest (R2) or null in its inputs rest_index (R2).
  // norm_weight, norm_bias, running_mean, running_var (C), count: as in batch_norm_act; weight
  // (Cout, Cin), out_index (O): as in slim_pointwise.
  // -> the filters' outputs for these inputs, an offset (1, O, OH, OW) in the constants' type;
  // saved (classes + 1, S) float32. Pixels are of one class where the same taps are inside the
  // image.
  m.def("slim_border(Tensor constants, Tensor filters, Tensor filter_index, Tensor in_index, "
        "int H, int W, int[] stride, int[] padding, int[] dilation, Tensor norm_weight, "
        "Tensor norm_bias, Tensor norm_index, Tensor(a!)? running_mean, "
        "Tensor(b!)? running_var, int count, float momentum, float eps, int act, Tensor weight, "
        "Tensor map_index, Tensor? out_index, Tensor? rest, Tensor? rest_index) -> "
        "(Tensor, Tensor)");
  // doffset (1, O, OH, OW) float32
  // -> dconstants (R), dfilters (Cdw, kh, kw), dnorm_weight (C), dnorm_bias (C), dweight (Cout,
  // Cin), 0 where nothing was read, and drest (R2) or empty (0)
  m.def("slim_border_backward(Tensor doffset, Tensor saved, Tensor constants, Tensor filters, "
        "Tensor filter_index, Tensor in_index, int H, int W, int[] stride, int[] padding, "
        "int[] dilation, Tensor norm_weight, Tensor norm_bias, Tensor norm_index, int act, "
        "Tensor weight, Tensor map_index, Tensor? out_index, Tensor? rest, "
        "Tensor? rest_index) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  // What follows fuses a batch norm into its neighbours, on CUDA devices; sacl_fast/ops has what it
  // is equal to, in plain PyTorch, as its implementation on CPUs.
  //
  // An operand that is not normalised yet is given raw, with affine (4, K), the rows scale, bias,
  // mean and 1 / deviation, and an activation: act((x - mean) * scale + bias); affine null: x
  // itself. The gradient of what a norm is given is given as g, that of the norm's output before
  // the activation, y, the norm's raw input, and coefficients (4, K): c0 * g + c1 * (y - c3) + c2;
  // both null: g itself. sums (T, 3, K): of T sets of values, their count, mean, and sum of squared
  // differences from it. gsums (T, 2, K): of T sets, sums of g and of g * (x - mean) / deviation.
  // All of these are float32.

  // sums of x (N, K, H, W)
  m.def("norm_act_moments(Tensor x) -> Tensor");
  // The affine of a norm in training whose input has these sums, and rest (R) in float32, the
  // constants that the zeroed channels become. Running statistics are updated, where mean_shift (K)
  // is added to the mean; count: as in batch_norm_act.
  m.def("norm_act_affine(Tensor sums, Tensor weight, Tensor bias, Tensor? kept_index, "
        "Tensor? zeroed_index, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
        "Tensor? mean_shift, int count, float momentum, float eps, int act) -> (Tensor, Tensor)");
  // act_after(operand + other), other (N, K, H, W) an operand without activation, or null
  m.def("norm_act_apply(Tensor x, Tensor affine, int act, Tensor? other, Tensor? other_affine, "
        "int act_after) -> Tensor");
  // The operand's mean over the image (N, K, 1, 1)
  m.def("norm_act_mean(Tensor x, Tensor affine, int act) -> Tensor");
  // g of dy * gate + dmean / (H W), the operand's gradient, and its gsums; gate, dmean (N, K) or
  // null. dy (N, K or more, H, W): the first K channels count. g is empty (0) where it is dy
  // itself.
  m.def("norm_act_gradient(Tensor dy, Tensor x, Tensor affine, int act, Tensor? gate, "
        "Tensor? dmean) -> (Tensor, Tensor)");
  // Sums over the image of dy times the operand (N, K)
  m.def("norm_act_gate_gradient(Tensor dy, Tensor x, Tensor affine, int act) -> Tensor");
  // -> coefficients, dweight (C), dbias (C). drest (R), of rest. count: values of a live channel.
  m.def("norm_act_coefficients(Tensor gsums, Tensor? drest, Tensor weight, Tensor bias, "
        "Tensor? kept_index, Tensor? zeroed_index, Tensor affine, int count, int act) -> "
        "(Tensor, Tensor, Tensor)");
  // The gradient of what a norm is given, as such
  m.def("norm_act_input_gradient(Tensor g, Tensor y, Tensor coefficients) -> Tensor");
  // It, summed to shape (1 or N, K, 1 or H, 1 or W). border: rows at the top and the bottom,
  // columns at the left and the right; if not empty, shape is (1, K, H, W), the gradient is of a
  // map that is constant elsewhere, and its sum over samples and pixels is 0: so pixels off the
  // border are not read, and are given the mean of what is missing to 0.
  m.def("norm_act_offset_gradient(Tensor g, Tensor? y, Tensor? coefficients, int[] shape, "
        "int[] border) -> Tensor");

  // slim_add of operands without activation: a_affine, b_affine null: a, b themselves.
  m.def("norm_slim_add(Tensor a, Tensor? a_affine, Tensor? a_rest, Tensor? a_index, Tensor b, "
        "Tensor? b_affine, Tensor? b_rest, Tensor? b_index) -> Tensor");
  // slim_gate of an operand
  m.def("norm_slim_gate(Tensor x, Tensor affine, int act, Tensor? map, Tensor gate, "
        "Tensor? x_index, Tensor? map_index) -> Tensor");
  // -> dmap (1, R, H, W) or empty (0), dgate (N, C) float32; dy (N, K + R, H, W), whose first K
  // channels norm_act_gradient takes
  m.def("norm_slim_gate_backward(Tensor dy, Tensor x, Tensor affine, int act, Tensor? map, "
        "Tensor gate, Tensor? x_index, Tensor? map_index) -> (Tensor, Tensor)");

  // depthwise_conv of an operand -> (N, K, OH, OW) and its sums. weight (Cout, kh, kw), of which
  // out_index (K or fewer) are the filters, those after them being zeros; null: all.
  m.def("norm_depthwise(Tensor x, Tensor? affine, int act, Tensor weight, "
        "Tensor? out_index, Tensor? in_index, int[] stride, int[] padding, int[] dilation) -> "
        "(Tensor, Tensor)");
  // -> dx, gsums, dweight (Cout, kh, kw), 0 where no filter is. to_norm: dx is the gradient before
  // the operand's activation, with its gsums; else that of the operand, and gsums is empty (0).
  m.def("norm_depthwise_backward(Tensor g, Tensor? y, Tensor? coefficients, Tensor x, "
        "Tensor? affine, int act, Tensor weight, Tensor? out_index, Tensor? in_index, "
        "int[] stride, int[] padding, int[] dilation, bool to_norm) -> (Tensor, Tensor, Tensor)");

  // Views of images (H, W, 3) uint8, normalised: (x - mean) / std in 0..255. draws (V, n, 16)
  // float64, a row for each view and image: top, left, height and width of the crop; whether it is
  // flipped; four operations (0 none, 1 brightness, 2 contrast, 3 saturation, 4 hue), their
  // factors; whether it is gray; sigma of the blur (0: none); the value from which on it is
  // solarised (256: not at all). window: of the blur, odd. Work is shared among `threads` threads
  // of its own.
  // -> (V n, 3, size, size) float32
  m.def("augment(Tensor[] images, Tensor draws, int size, int window, Tensor mean, Tensor std, "
        "int threads) -> Tensor");
  // The same of images that lie in one buffer: pixels (bytes,) uint8; images (n, 3) int64: the
  // offset of each, its height and width. out (V * n, 3, size, size), channels last in memory; on a
  // CUDA device float32, float16 or bfloat16, and threads does not count.
  m.def("augment_packed(Tensor pixels, Tensor images, Tensor draws, int window, Tensor mean, "
        "Tensor std, Tensor(a!) out, int threads) -> ()");

  // The draws that augment takes, of V views (0: a, 1: b) of images image_index (n) of sizes (n,
  // 2), height and width, all int64, in one epoch; on the CPU. settings (V, 18) float64, a row for
  // each view: scale and ratio of the crop, and the ratio's logarithms, from and to; probabilities
  // of flip and jitter; strengths of brightness, contrast, saturation and hue; probabilities of
  // gray and blur; sigma from and to; probability of solarising, its threshold.
  // -> (V, n, 16) float64
  m.def("draw_views(int seed, int epoch, Tensor image_index, Tensor sizes, Tensor settings, "
        "int threads) -> Tensor");
}
