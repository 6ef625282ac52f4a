// Included by simd.inl: the loops of augment.cpp, on rows of bytes. Loops over a row are left to
// the compiler, which widens bytes better than it does in vectors that are spelled out.

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

SACL_INLINE uint8_t clipped(int32_t x) {
  return static_cast<uint8_t>(x < 0 ? 0 : (x > 255 ? 255 : x));
}

// --- crop ----------------------------------------------------------------------------------------

// Every byte of the lower halves of two rows in turn, or of the upper ones.
SACL_INLINE Bytes interleaved(Bytes a, Bytes b, bool upper) {
#if defined(__clang__)
  return upper ? __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30,
                                         15, 31)
               : __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                         23);
#else
  const Bytes lower = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  return upper ? __builtin_shuffle(a, b, lower + 8) : __builtin_shuffle(a, b, lower);
#endif
}

// Interleaving rows i and i + 8 turns the index of an element by one bit, the highest of the row's
// becoming the lowest of the column's; four times over, row and column are exchanged.
SACL_INLINE void transpose_tile(const uint8_t* in, int64_t in_stride, uint8_t* out,
                                int64_t out_stride) {
  Bytes rows[kLanes], turned[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) std::memcpy(&rows[i], in + i * in_stride, sizeof(Bytes));
  for (int64_t bit = 0; bit < 4; ++bit) {
    for (int64_t i = 0; i < kLanes / 2; ++i) {
      turned[2 * i] = interleaved(rows[i], rows[i + kLanes / 2], false);
      turned[2 * i + 1] = interleaved(rows[i], rows[i + kLanes / 2], true);
    }
    for (int64_t i = 0; i < kLanes; ++i) rows[i] = turned[i];
  }
  for (int64_t i = 0; i < kLanes; ++i) std::memcpy(out + i * out_stride, &rows[i], sizeof(Bytes));
}

void transpose(const uint8_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint8_t* out,
               int64_t out_stride) {
  if (rows < kLanes || columns < kLanes) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) out[c * out_stride + r] = in[r * in_stride + c];
    return;
  }
  for (int64_t r = 0; r < rows; r += kLanes) {  // the last tile overlaps the one before it
    const int64_t row = smaller(r, rows - kLanes);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const int64_t column = smaller(c, columns - kLanes);
      transpose_tile(in + row * in_stride + column, in_stride, out + column * out_stride + row,
                     out_stride);
    }
  }
}

template <int ROWS>
SACL_INLINE void add_weighted(const uint8_t* in, int64_t stride, const int32_t* weight,
                              int32_t* __restrict sums, int64_t width) {
  for (int64_t i = 0; i < width; ++i) {
    int32_t sum = sums[i];
    for (int64_t k = 0; k < ROWS; ++k) sum += weight[k] * in[k * stride + i];
    sums[i] = sum;
  }
}

void weigh_rows(const uint8_t* in, int64_t stride, const int32_t* weight, int64_t count,
                int32_t* __restrict sums, uint8_t* __restrict out, int64_t width) {
  for (int64_t i = 0; i < width; ++i) sums[i] = 1 << (kWeightBits - 1);
  for (; count >= 4; count -= 4, weight += 4, in += 4 * stride)
    add_weighted<4>(in, stride, weight, sums, width);
  if (count == 3) add_weighted<3>(in, stride, weight, sums, width);
  if (count == 2) add_weighted<2>(in, stride, weight, sums, width);
  if (count == 1) add_weighted<1>(in, stride, weight, sums, width);
  for (int64_t i = 0; i < width; ++i) out[i] = clipped(sums[i] >> kWeightBits);
}

// --- colours -------------------------------------------------------------------------------------

// Pillow's grayscale.
SACL_INLINE int32_t luma_of(int32_t r, int32_t g, int32_t b) {
  return (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16;
}

// Pillow's blend, rounded down: every operation rounds as its plain float32 does. Added to 0 first,
// the product is rounded even where the compiler fuses multiplications with additions.
SACL_INLINE uint8_t blended(int32_t from, int32_t to, float factor) {
  const float change = factor * static_cast<float>(to - from) + 0.0f;
  return clipped(static_cast<int32_t>(static_cast<float>(from) + change));
}

int64_t luma_sum(const uint8_t* row, int64_t pitch, int64_t width) {
  int32_t sum = 0;
  for (int64_t x = 0; x < width; ++x) sum += luma_of(row[x], row[pitch + x], row[2 * pitch + x]);
  return sum;
}

void blend_constant(uint8_t* row, int64_t count, int32_t constant, float factor) {
  for (int64_t i = 0; i < count; ++i) row[i] = blended(constant, row[i], factor);
}

void blend_luma(uint8_t* row, int64_t pitch, float factor) {
  uint8_t* __restrict r = row, * __restrict g = row + pitch, * __restrict b = row + 2 * pitch;
  for (int64_t x = 0; x < pitch; ++x) {
    const int32_t luma = luma_of(r[x], g[x], b[x]);
    r[x] = blended(luma, r[x], factor);
    g[x] = blended(luma, g[x], factor);
    b[x] = blended(luma, b[x], factor);
  }
}

// 255 x rounded down, not the product that float32 rounds: x in 0..1. All terms are exact.
SACL_INLINE int32_t of_255(float x) {
  const int32_t whole = static_cast<int32_t>(x * 255.0f);
  return whole - (x * 256.0f - static_cast<float>(whole) < x);
}

// condition ? then : otherwise, of which the compiler would make a branch.
SACL_INLINE int32_t either(bool condition, int32_t then, int32_t otherwise) {
  return otherwise ^ ((then ^ otherwise) & -static_cast<int32_t>(condition));
}

// Pillow's way from RGB to HSV in 8 bits, `shift` added to the hue, and back.
//
// Of the three channels only the distance of the middle one counts, q = (max - mid) / (max - min):
// the hue is an odd integer plus or minus q, in sixths of the circle. Pillow computes much of this
// in double; float32 gives the same 8 bits, which was tried for every colour and every HSV. `&` and
// `|`, since with branches the compiler would take one pixel at a time.
void turn_hue(uint8_t* row, int64_t pitch, int32_t shift) {
  uint8_t* __restrict red = row, * __restrict green = row + pitch, * __restrict blue = row + 2 * pitch;
  for (int64_t x = 0; x < pitch; ++x) {
    const int32_t r = red[x], g = green[x], b = blue[x];
    const int32_t rg_high = r > g ? r : g, rg_low = r > g ? g : r;
    const int32_t high = rg_high > b ? rg_high : b, low = rg_low < b ? rg_low : b;
    const int32_t chroma = high - low, from_high = 2 * high + low - (r + g + b);
    const int32_t r_high = r == high, g_high = (g == high) & (r < high),
                  b_high = 1 - r_high - g_high;
    const int32_t rising = (r_high & (g == low)) | (g_high & (b == low)) | (b_high & (r == low));
    const int32_t sign = 2 * rising - 1, base = 2 * g_high + 4 * b_high - sign;
    const float q = static_cast<float>(from_high) / static_cast<float>(chroma > 1 ? chroma : 1);
    const float sixths = static_cast<float>(base) + static_cast<float>(sign) * q;
    const float turn = sixths / 6.0f, hue = turn + (turn < 0.0f ? 1.0f : 0.0f);
    const float saturation = static_cast<float>(chroma) / static_cast<float>(high > 1 ? high : 1);

    const int32_t h = (of_255(hue) + shift) & 255, s = of_255(saturation);
    const int32_t sector = 1543 * h >> 16, within = 2 * h - 85 * sector;  // 6 h / 255; of 85
    const int32_t odd = sector & 1, away = either(odd, within, 85 - within);
    const int32_t bottom =
        static_cast<int32_t>(static_cast<float>(high * (255 - s)) / 255.0f + 0.5f);
    const int32_t middle = static_cast<int32_t>(
        static_cast<float>(high * (255 * 85 - s * away)) / (255.0f * 85.0f) + 0.5f);
    // The lowest channel is blue in the sectors 0, 1 and 6, red in 2 and 3, green in 4 and 5.
    const int32_t ahead = either(odd, middle, high), behind = either(odd, high, middle);
    const int32_t third = sector >> 1;
    red[x] = static_cast<uint8_t>(either(third == 1, bottom, either(third == 2, behind, ahead)));
    green[x] = static_cast<uint8_t>(either(third == 1, ahead, either(third == 2, bottom, behind)));
    blue[x] = static_cast<uint8_t>(either(third == 1, behind, either(third == 2, ahead, bottom)));
  }
}

// --- blur and output -----------------------------------------------------------------------------

// out += the rows that are j, ..., j + TAPS - 1 away, weighted.
template <int TAPS>
SACL_INLINE void add_columns(const uint8_t* const* rows, const float* weight, int64_t j,
                             float* __restrict out, int64_t width) {
  const uint8_t *above[TAPS], *below[TAPS];
  for (int64_t t = 0; t < TAPS; ++t) above[t] = rows[-j - t], below[t] = rows[j + t];
  for (int64_t i = 0; i < width; ++i) {
    float sum = out[i];
    for (int64_t t = 0; t < TAPS; ++t)
      sum += weight[j + t] * static_cast<float>(above[t][i] + below[t][i]);
    out[i] = sum;
  }
}

void blur_columns(const uint8_t* const* rows, const float* weight, int64_t radius,
                  float* __restrict out, int64_t width) {
  const uint8_t* middle = rows[0];
  for (int64_t i = 0; i < width; ++i) out[i] = weight[0] * static_cast<float>(middle[i]);
  int64_t j = 1;
  for (; j + 2 <= radius; j += 3) add_columns<3>(rows, weight, j, out, width);
  for (; j <= radius; ++j) add_columns<1>(rows, weight, j, out, width);
}

void blur_row(const float* in, const float* weight, int64_t radius, float* __restrict sums,
              uint8_t* __restrict out, int64_t width) {
  for (int64_t i = 0; i < width; i += kLanes) {
    Vec sum = weight[0] * load(in + i);
    for (int64_t j = 1; j <= radius; ++j) sum += weight[j] * (load(in + i - j) + load(in + i + j));
    store(sums + i, sum);
  }
  for (int64_t i = 0; i < width; ++i)
    out[i] = static_cast<uint8_t>(static_cast<int32_t>(sums[i] + 0.5f));
}

void normalise(const uint8_t* row, int64_t pitch, int64_t width, int32_t threshold,
               const float* mean, const float* std, float* __restrict out) {
  const uint8_t *r = row, *g = row + pitch, *b = row + 2 * pitch;
  const float mean_r = mean[0], mean_g = mean[1], mean_b = mean[2];
  const float std_r = std[0], std_g = std[1], std_b = std[2];
  for (int64_t x = 0; x < width; ++x) {
    const int32_t red = either(r[x] >= threshold, 255 - r[x], r[x]);
    const int32_t green = either(g[x] >= threshold, 255 - g[x], g[x]);
    const int32_t blue = either(b[x] >= threshold, 255 - b[x], b[x]);
    out[3 * x] = (static_cast<float>(red) - mean_r) / std_r;
    out[3 * x + 1] = (static_cast<float>(green) - mean_g) / std_g;
    out[3 * x + 2] = (static_cast<float>(blue) - mean_b) / std_b;
  }
}
