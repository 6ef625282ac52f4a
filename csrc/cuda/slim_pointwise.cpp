// 1x1 convolution between live channels on a CUDA device; see ../operators.cpp.
//
// An image in NHWC memory is a matrix (N H W, channels), so the convolution and its two gradients
// are one matrix product each, which torch's own library does (cuBLASLt), on the activations as
// they lie. Only the part of the weight that is used is copied, in the activations' type, and its
// gradient is written into the full one from there. A vector of offsets is added inside the
// product; an offset that differs over the image is written to the output first and the product
// added to it.
//
// Activations, rest and offset are of one type; the weight is of that type or float32, and its
// gradient of the weight's. It is rounded to the activations' type on the way, as under autocast.
#include <algorithm>
#include <tuple>

#include "cuda/positions.h"
#include "cuda/sums.h"

namespace sacl::cuda {
namespace {

Tensor matrix(const Tensor& t, int64_t rows, int64_t columns) {
  return seen_as(t, {rows, columns}, {columns, 1});
}

Tensor transposed(const Tensor& t, int64_t rows, int64_t columns) {
  return seen_as(t, {columns, rows}, {1, columns});
}

// out = a b
void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(SACL_SHIM(mm_out)(out.get(), a.get(), b.get()));
}

// out = a b + c, where c is a row or out itself.
void multiply_add(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor& c) {
  TORCH_ERROR_CODE_CHECK(SACL_SHIM(addmm_out)(out.get(), c.get(), a.get(), b.get(), 1, 1));
}

// No rest at all where it is of no channels.
void drop_if_empty(std::optional<Tensor>& rest, std::optional<Tensor>& rest_index) {
  if (rest && rest->numel() == 0) rest = rest_index = std::nullopt;
}

// What both passes are given.
struct Convolution {
  Tensor x, weight;
  std::optional<Tensor> in_index, out_index, rest, rest_index;
  int64_t M, K, O, R, Cout, Cin, images_of_rest;
  int dtype;

  Convolution(Tensor x, Tensor weight, std::optional<Tensor> in_index,
              std::optional<Tensor> out_index, std::optional<Tensor> rest,
              std::optional<Tensor> rest_index)
      : x(x), weight(weight), in_index(in_index), out_index(out_index), rest(rest),
        rest_index(rest_index) {
    images(x, "x");
    STD_TORCH_CHECK(weight.dim() == 2, "weight is not (Cout, Cin)");
    dtype = dtype_of(x);
    Cout = weight.size(0), Cin = weight.size(1);
    M = x.numel() / x.size(1), K = x.size(1);
    O = out_index ? out_index->numel() : Cout;
    R = rest ? rest->size(1) : 0;
    images_of_rest = rest ? rest->size(0) : 0;
    STD_TORCH_CHECK(in_index || K == Cin, K, " inputs of ", Cin, " without in_index");
    STD_TORCH_CHECK(!rest == !rest_index && (!rest || in_index),
                    "rest goes with rest_index and in_index");
    const bool own_type = weight.scalar_type() == x.scalar_type();
    plain(weight, {Cout, Cin}, own_type ? x.scalar_type() : ScalarType::Float, "weight");
    indices(in_index, K, "in_index");
    indices(out_index, O, "out_index");
    indices(rest_index, R, "rest_index");
    if (rest) {
      STD_TORCH_CHECK(images_of_rest == 1 || images_of_rest == x.size(0),
                      "rest has neither one sample nor those of x");
      plain(*rest, {images_of_rest, R}, x.scalar_type(), "rest");
    }
  }

  WeightShape weight_shape(int64_t columns) const {
    return {dtype_of(weight),       dtype,
            static_cast<int>(Cout), static_cast<int>(Cin),
            static_cast<int>(O),    static_cast<int>(columns)};
  }

  // weight[out_index][:, index], (O, columns), in the activations' type.
  Tensor part(const std::optional<Tensor>& index, int64_t columns, void* stream) const {
    if (!index && !out_index && weight.scalar_type() == x.scalar_type()) return weight;
    Tensor taken = new_tensor(x, {O, columns}, x.scalar_type());
    check(sacl_cuda_take_weight(
        weight_shape(columns), weight.const_data_ptr(), indices(out_index, O, "out_index"),
        indices(index, columns, "index"), taken.mutable_data_ptr(), stream));
    return taken;
  }

  Tensor inputs() const { return matrix(x, M, K); }
};

// dweight (Cout, Cin) from the gradients of its parts.
Tensor put(const Convolution& c, const Tensor& live, const std::optional<Tensor>& rest,
           const std::optional<Tensor>& out_positions, const std::optional<Tensor>& in_positions,
           void* stream) {
  Tensor dweight = new_tensor(c.x, {c.Cout, c.Cin}, c.weight.scalar_type());
  const Positions out(c.x, out_positions, c.out_index, std::nullopt, c.Cout, stream);
  const Positions in(c.x, in_positions, c.in_index, c.rest_index, c.Cin, stream);
  check(sacl_cuda_put_weight(c.weight_shape(c.K), live.const_data_ptr(),
                             rest ? rest->const_data_ptr() : nullptr, static_cast<int>(c.R),
                             out.data(), in.data(), dweight.mutable_data_ptr(), stream));
  return dweight;
}

}  // namespace

Tensor slim_pointwise(Tensor x, Tensor weight, std::optional<Tensor> in_index,
                      std::optional<Tensor> out_index, std::optional<Tensor> rest,
                      std::optional<Tensor> rest_index, std::optional<Tensor> offset) {
  drop_if_empty(rest, rest_index);
  const Convolution c(x, weight, in_index, out_index, rest, rest_index);
  const OnDevice device(x);
  void* stream = device.stream();
  Tensor y = new_images(x, x.size(0), c.O, x.size(2), x.size(3));
  const Tensor out = matrix(y, c.M, c.O);
  const Tensor taps = transposed(c.part(in_index, c.K, stream), c.O, c.K);  // (K, O)
  std::optional<Tensor> response;
  if (rest) {
    response = new_tensor(x, {c.images_of_rest, c.O}, x.scalar_type());
    multiply(*response, *rest, transposed(c.part(rest_index, c.R, stream), c.O, c.R));
  }
  if (!response && !offset) {
    multiply(out, c.inputs(), taps);
    return y;
  }
  OffsetShape s = offset_shape_of(x, c.O, 1, 1, 1);
  if (offset) {
    STD_TORCH_CHECK(offset->dim() == 4 && offset->size(1) == c.O, "offset has not ", c.O,
                    " channels");
    s = offset_shape_of(x, c.O, offset->size(0), offset->size(2), offset->size(3));
    STD_TORCH_CHECK(offset->scalar_type() == x.scalar_type(), "offset is not of x's type");
    offset = torch::stable::contiguous(*offset, torch::headeronly::MemoryFormat::ChannelsLast);
    images(*offset, "offset");
  }
  const bool one_row = c.images_of_rest <= 1 && s.n == 1 && s.h == 1 && s.w == 1;
  if (one_row) s.N = s.H = s.W = 1;
  const Tensor added = one_row ? new_tensor(x, {1, c.O}, x.scalar_type()) : y;
  check(sacl_cuda_spread_offset(s, offset ? offset->const_data_ptr() : nullptr,
                                response ? response->const_data_ptr() : nullptr,
                                static_cast<int>(c.images_of_rest), added.mutable_data_ptr(),
                                stream));
  multiply_add(out, c.inputs(), taps, one_row ? seen_as(added, {c.O}, {1}) : out);
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> slim_pointwise_backward(
    Tensor dy, Tensor x, Tensor weight, std::optional<Tensor> in_index,
    std::optional<Tensor> out_index, std::optional<Tensor> rest, std::optional<Tensor> rest_index,
    std::vector<int64_t> offset_shape, std::optional<Tensor> out_positions,
    std::optional<Tensor> in_positions) {
  drop_if_empty(rest, rest_index);
  const Convolution c(x, weight, in_index, out_index, rest, rest_index);
  images(dy, "dy");
  check_sizes(dy, {x.size(0), c.O, x.size(2), x.size(3)}, "dy");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "x and dy are of different types");
  const OnDevice device(x);
  void* stream = device.stream();
  const Tensor none = new_tensor(x, {0}, x.scalar_type());

  Tensor dx = new_images(x, x.size(0), c.K, x.size(2), x.size(3));
  multiply(matrix(dx, c.M, c.K), matrix(dy, c.M, c.O), c.part(in_index, c.K, stream));

  const bool whole = !in_index && !out_index && weight.scalar_type() == x.scalar_type();
  Tensor dlive = new_tensor(x, {c.O, c.K}, x.scalar_type());
  multiply(dlive, transposed(dy, c.M, c.O), c.inputs());

  Tensor drest = none;
  std::optional<Tensor> dtaps;
  if (rest) {
    const Tensor summed = sums(dy, c.images_of_rest, 1, 1, stream);
    const int64_t n = c.images_of_rest;
    drest = new_tensor(x, {n, c.R}, x.scalar_type());
    multiply(drest, matrix(summed, n, c.O), c.part(rest_index, c.R, stream));
    dtaps = new_tensor(x, {c.O, c.R}, x.scalar_type());
    multiply(*dtaps, transposed(summed, n, c.O), *rest);
  }
  const Tensor dweight = whole ? dlive : put(c, dlive, dtaps, out_positions, in_positions, stream);

  Tensor doffset = none;
  if (!offset_shape.empty()) {
    STD_TORCH_CHECK(offset_shape.size() == 4 && offset_shape[1] == c.O, "offset_shape is not (n, ",
                    c.O, ", h, w)");
    doffset = sums(dy, offset_shape[0], offset_shape[2], offset_shape[3], stream);
  }
  return {dx, dweight, drest, doffset};
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, SACL_DISPATCH_KEY, m) {
  m.impl("slim_pointwise", TORCH_BOX(&slim_pointwise));
  m.impl("slim_pointwise_backward", TORCH_BOX(&slim_pointwise_backward));
}

}  // namespace sacl::cuda
