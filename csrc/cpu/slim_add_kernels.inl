// Included by simd.inl: the loop of slim_add.cpp.

template <bool FULL>
SACL_INLINE void add_rows(const float* a, const float* b, const float* constant, float* out,
                          int64_t rows, Blocks blocks) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < blocks.count; ++i) {
      const int64_t c = blocks.start(i), at = r * blocks.K + c;
      put<FULL>(out + at,
                get<FULL>(a + at, blocks) + get<FULL>(b + at, blocks) +
                    get<FULL>(constant + c, blocks),
                blocks);
    }
  }
}

void add(const float* a, const float* b, const float* constant, float* out, int64_t rows,
         int64_t K) {
  const Blocks blocks(K);
  if (blocks.lanes == kLanes)
    add_rows<true>(a, b, constant, out, rows, blocks);
  else
    add_rows<false>(a, b, constant, out, rows, blocks);
}
