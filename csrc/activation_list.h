// The activations that batch norm can end with. A new one is a row here, its formulas in
// cpu/activations.inl and in cuda/activations.h, and a row of ACTIVATIONS in
// sacl_fast/ops/batch_norm_act.py, whose order is the order here.
#pragma once

#define SACL_ACTIVATIONS(ROW) ROW(None) ROW(Relu) ROW(Relu6) ROW(Hardswish) ROW(Silu)

namespace sacl {

enum Activation : int {  // kNone, kRelu, ...
#define SACL_ROW(name) k##name,
  SACL_ACTIVATIONS(SACL_ROW)
#undef SACL_ROW
      kActivations  // how many
};

}  // namespace sacl
