// Included by simd.inl: the loops of slim_gate.cpp.

template <bool FULL, bool ACCUMULATE>
SACL_INLINE void scale_rows(const float* in, int64_t in_stride, const float* factor, float* out,
                            int64_t out_stride, int64_t rows, Blocks blocks) {
  for (int64_t i = 0; i < blocks.count; ++i) {
    const int64_t c = blocks.start(i);
    const Vec by = get<FULL>(factor + c, blocks);
    Vec fresh = by;  // what of the block was not written by the one before
    if (ACCUMULATE)
      for (int64_t lane = 0; lane < i * kLanes - c; ++lane) fresh[lane] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      float* to = out + r * out_stride + c;
      const Vec product = get<FULL>(in + r * in_stride + c, blocks) * fresh;
      put<FULL>(to, ACCUMULATE ? get<FULL>(to, blocks) + product : product, blocks);
    }
  }
}

template <bool FULL>
SACL_INLINE void products_rows(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                               int64_t rows, Blocks blocks, float* total) {
  for (int64_t i = 0; i < blocks.count; ++i) {
    const int64_t c = blocks.start(i);
    Vec sum = {};
    for (int64_t start = 0; start < rows; start += kRows) {
      Vec part = {};
      for (int64_t r = start; r < smaller(start + kRows, rows); ++r)
        part += get<FULL>(a + r * a_stride + c, blocks) * get<FULL>(b + r * b_stride + c, blocks);
      sum += part;
    }
    put<FULL>(total + c, sum, blocks);
  }
}

void scale(const float* in, int64_t in_stride, const float* factor, float* out, int64_t out_stride,
           int64_t rows, int64_t K, bool accumulate) {
  const Blocks blocks(K);
#define CALL(FULL, ACCUMULATE) \
  scale_rows<FULL, ACCUMULATE>(in, in_stride, factor, out, out_stride, rows, blocks)
  if (blocks.lanes == kLanes)
    accumulate ? CALL(true, true) : CALL(true, false);
  else
    accumulate ? CALL(false, true) : CALL(false, false);
#undef CALL
}

void products(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t rows,
              int64_t K, float* total) {
  const Blocks blocks(K);
  if (blocks.lanes == kLanes)
    products_rows<true>(a, a_stride, b, b_stride, rows, blocks, total);
  else
    products_rows<false>(a, a_stride, b, b_stride, rows, blocks, total);
}
