// The activations of ../activation_list.h, for an N that is a float or a vector of them. The
// including file has `exp_of`, `third` and `sixth` of that N. Not a number stays what it is.
//
// value(z), and through(dy, z): dy times the derivative at z, PyTorch's, at the kinks too.

template <class N>
SACL_INLINE N clamp_low(N z, float low) {
  return z < low ? N{} + low : z;
}
template <class N>
SACL_INLINE N clamp_high(N z, float high) {
  return z > high ? N{} + high : z;
}

struct None {
  template <class N>
  static SACL_INLINE N value(N z) {
    return z;
  }
  template <class N>
  static SACL_INLINE N through(N dy, N) {
    return dy;
  }
};

struct Relu {
  template <class N>
  static SACL_INLINE N value(N z) {
    return clamp_low(z, 0);
  }
  template <class N>
  static SACL_INLINE N through(N dy, N z) {
    return z > 0.0f ? dy : N{};
  }
};

struct Relu6 {
  template <class N>
  static SACL_INLINE N value(N z) {
    return clamp_high(clamp_low(z, 0), 6);
  }
  template <class N>
  static SACL_INLINE N through(N dy, N z) {
    return (z > 0.0f) & (z < 6.0f) ? dy : N{};
  }
};

struct Hardswish {
  template <class N>
  static SACL_INLINE N value(N z) {
    return sixth(z * clamp_high(clamp_low(z + 3.0f, 0), 6));
  }
  template <class N>
  static SACL_INLINE N through(N dy, N z) {
    const N inner = dy * (third(z) + 0.5f);
    return z < -3.0f ? N{} : (z <= 3.0f ? inner : dy);
  }
};

struct Silu {
  template <class N>
  static SACL_INLINE N value(N z) {
    return z / (1.0f + exp_of(-z));
  }
  template <class N>
  static SACL_INLINE N through(N dy, N z) {
    const N s = 1.0f / (1.0f + exp_of(-z));
    return dy * s * (1.0f + z * (1.0f - s));
  }
};
