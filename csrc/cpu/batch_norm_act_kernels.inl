// Included by simd.inl: the loops of batch_norm_act.cpp.

constexpr int64_t kStep = 4;  // rows added up in registers

// exp to 2 units in the last digit (Cephes' coefficients).
SACL_INLINE Vec exp_of(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x;
  x = x > 87.0f ? Vec{} + 87.0f : x;
  const Vec n = x * 1.44269504088896341f + 12582912.0f - 12582912.0f;  // rounded to an integer
  Vec r = x - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Bits exponent = (__builtin_convertvector(n, Bits) + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return p * power;
}

SACL_INLINE Vec third(Vec z) { return z * (1.0f / 3); }
SACL_INLINE Vec sixth(Vec z) { return z * (1.0f / 6); }

#include "cpu/activations.inl"

// `total` (2 K): += the column sums over the rows of both terms of `pair(row, channel)`.
template <class F>
SACL_INLINE void add_sums(int64_t rows, Blocks blocks, float* part, double* total, const F& pair) {
  for (int64_t start = 0; start < rows; start += kRows) {
    const int64_t stop = smaller(start + kRows, rows);
    std::memset(part, 0, 2 * blocks.count * sizeof(Vec));
    for (int64_t row = start; row < stop; row += kStep) {
      for (int64_t b = 0; b < blocks.count; ++b) {
        float* own = part + 2 * b * kLanes;
        Vec first = load(own), second = load(own + kLanes);
        for (int64_t r = row; r < smaller(row + kStep, stop); ++r) {
          const auto [x, y] = pair(r, blocks.start(b));
          first += x;
          second += y;
        }
        store(own, first);
        store(own + kLanes, second);
      }
    }
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t new_from = b * kLanes - blocks.start(b);  // the lanes before overlap
      for (int64_t lane = new_from; lane < blocks.lanes; ++lane) {
        const int64_t c = blocks.start(b) + lane;
        total[c] += part[2 * b * kLanes + lane];
        total[blocks.K + c] += part[(2 * b + 1) * kLanes + lane];
      }
    }
  }
}

struct Pair {
  Vec first, second;
};

template <bool FULL>
SACL_INLINE void sums_forward_rows(const float* x, const float* origin, int64_t rows, Blocks blocks,
                                   float* part, double* total) {
  auto pair = [=](int64_t r, int64_t c) __attribute__((always_inline)) {
    const Vec d = get<FULL>(x + r * blocks.K + c, blocks) - get<FULL>(origin + c, blocks);
    return Pair{d, d * d};
  };
  add_sums(rows, blocks, part, total, pair);
}

template <class A, bool FULL>
SACL_INLINE void sums_backward_rows(const float* dy, const float* x, int64_t rows, Blocks blocks,
                                    Channels k, float* part, double* total) {
  auto pair = [=](int64_t r, int64_t c) __attribute__((always_inline)) {
    const Vec in = get<FULL>(x + r * blocks.K + c, blocks);
    const Vec centred = in - get<FULL>(k.mean + c, blocks);
    const Vec z = centred * get<FULL>(k.scale + c, blocks) + get<FULL>(k.bias + c, blocks);
    const Vec dz = A::through(get<FULL>(dy + r * blocks.K + c, blocks), z);
    return Pair{dz, dz * centred};
  };
  add_sums(rows, blocks, part, total, pair);
}

template <class A, bool FULL>
SACL_INLINE void apply_rows(const float* x, float* y, int64_t rows, Blocks blocks, Channels k) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t c = blocks.start(b), at = r * blocks.K + c;
      const Vec centred = get<FULL>(x + at, blocks) - get<FULL>(k.mean + c, blocks);
      const Vec z = centred * get<FULL>(k.scale + c, blocks) + get<FULL>(k.bias + c, blocks);
      put<FULL>(y + at, A::value(z), blocks);
    }
  }
}

// dx = scale * dz - constant - (x - mean) * projection
template <class A, bool FULL>
SACL_INLINE void gradient_rows(const float* dy, const float* x, float* dx, int64_t rows,
                               Blocks blocks, Channels k, const float* constant,
                               const float* projection) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t c = blocks.start(b), at = r * blocks.K + c;
      const Vec scale = get<FULL>(k.scale + c, blocks);
      const Vec centred = get<FULL>(x + at, blocks) - get<FULL>(k.mean + c, blocks);
      const Vec z = centred * scale + get<FULL>(k.bias + c, blocks);
      const Vec dz = A::through(get<FULL>(dy + at, blocks), z);
      put<FULL>(dx + at,
                scale * dz - get<FULL>(constant + c, blocks) -
                    centred * get<FULL>(projection + c, blocks),
                blocks);
    }
  }
}

// CALL(activation, whether blocks are full) for the activation that `act` names.
#define SACL_CASE(name)         \
  case k##name:                 \
    if (blocks.lanes == kLanes) \
      CALL(name, true);         \
    else                        \
      CALL(name, false);        \
    break;
#define SACL_SWITCH(act, blocks) \
  switch (act) { SACL_ACTIVATIONS(SACL_CASE) }

void sums_forward(const float* x, const float* origin, int64_t rows, int64_t K, float* part,
                  double* total) {
  const Blocks blocks(K);
  if (blocks.lanes == kLanes)
    sums_forward_rows<true>(x, origin, rows, blocks, part, total);
  else
    sums_forward_rows<false>(x, origin, rows, blocks, part, total);
}

void apply(int64_t act, const float* x, float* y, int64_t rows, int64_t K, Channels k) {
  const Blocks blocks(K);
#define CALL(A, FULL) apply_rows<A, FULL>(x, y, rows, blocks, k)
  SACL_SWITCH(act, blocks)
#undef CALL
}

void sums_backward(int64_t act, const float* dy, const float* x, int64_t rows, int64_t K,
                   Channels k, float* part, double* total) {
  const Blocks blocks(K);
#define CALL(A, FULL) sums_backward_rows<A, FULL>(dy, x, rows, blocks, k, part, total)
  SACL_SWITCH(act, blocks)
#undef CALL
}

void gradient(int64_t act, const float* dy, const float* x, float* dx, int64_t rows, int64_t K,
              Channels k, const float* constant, const float* projection) {
  const Blocks blocks(K);
#define CALL(A, FULL) gradient_rows<A, FULL>(dy, x, dx, rows, blocks, k, constant, projection)
  SACL_SWITCH(act, blocks)
#undef CALL
}

#undef SACL_SWITCH
#undef SACL_CASE
