// Included by simd.inl: the loops of depthwise.cpp.

void select(const float* in, float* out, int64_t width, Selection selection) {
  const Blocks blocks(selection.taken);
  int64_t done = 0;
#ifdef __AVX512F__  // a permutation of two vectors is one instruction
  if (blocks.K) {
    // Vectors of pixels with fewer channels than lanes reach into the next pixels: those read there
    // are not taken, those written there are written again. The last pixels have no next ones.
    const int64_t least = smaller(blocks.K, selection.given);
    const int64_t beyond = least < kLanes ? kLanes / (least ? least : 1) : 0;
    for (int64_t p = 0; p < width - beyond; ++p, ++done) {
      const float* from = in + p * selection.given;
      const Selection::Part* part = selection.parts;
      for (int64_t b = 0; b < blocks.count; ++b) {
        Bits all = {};
        for (; part != selection.parts + selection.ends[b]; ++part) {
          Bits lane, keep;
          std::memcpy(&lane, part->lane, sizeof lane);
          std::memcpy(&keep, part->keep, sizeof keep);
          const Vec taken =
              __builtin_shuffle(load(from + part->from[0]), load(from + part->from[1]), lane);
          all |= reinterpret_cast<const Bits&>(taken) & keep;
        }
        store(out + p * blocks.K + blocks.start(b), reinterpret_cast<const Vec&>(all));
      }
    }
  }
#endif
  for (int64_t p = done; p < width; ++p) {
    const float* from = in + p * selection.given;
    float* to = out + p * blocks.K;
    for (int64_t c = 0; c < blocks.K; ++c)
      to[c] = selection.source[c] < 0 ? 0.0f : from[selection.source[c]];
  }
}

// SIDE: the window's, known to the compiler so that weights stay in registers; 0: any window.
template <int SIDE>
SACL_INLINE void convolve_blocks(const float* in, int64_t in_width, const float* weight, float* out,
                                 int64_t rows, int64_t width, Blocks blocks, Window w) {
  const int64_t K = blocks.K, kh = SIDE ? SIDE : w.kh, kw = SIDE ? SIDE : w.kw;
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t c = blocks.start(b);
    Vec own[SIDE ? SIDE * SIDE : 1];
    for (int64_t t = 0; t < SIDE * SIDE; ++t) own[t] = load(weight + t * K + c);
    for (int64_t y = 0; y < rows; ++y) {
      for (int64_t x = 0; x < width; ++x) {
        const float* corner = in + (y * w.stride_h * in_width + x * w.stride_w) * K + c;
        Vec sum = {};
        for (int64_t i = 0; i < kh; ++i) {
          for (int64_t j = 0; j < kw; ++j) {
            const int64_t at = (i * w.dilation_h * in_width + j * w.dilation_w) * K;
            const int64_t t = i * kw + j;
            sum += load(corner + at) * (SIDE ? own[SIDE ? t : 0] : load(weight + t * K + c));
          }
        }
        store(out + (y * width + x) * K + c, sum);
      }
    }
  }
}

template <int SIDE>
SACL_INLINE void weight_blocks(const float* in, int64_t in_width, const float* dy, double* total,
                               int64_t rows, int64_t width, Blocks blocks, Window w) {
  const int64_t K = blocks.K, kh = SIDE ? SIDE : w.kh, kw = SIDE ? SIDE : w.kw;
  const int64_t together = SIDE ? SIDE * SIDE : 1;  // taps that are summed in one sweep
  const int64_t batch = 1 + kRows / width;          // rows that are summed in fp32
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t c = blocks.start(b);
    for (int64_t from = 0; from < kh * kw; from += together) {
      for (int64_t top = 0; top < rows; top += batch) {
        Vec sums[SIDE ? SIDE * SIDE : 1] = {};
        for (int64_t y = top; y < smaller(top + batch, rows); ++y) {
          for (int64_t x = 0; x < width; ++x) {
            const Vec g = load(dy + (y * width + x) * K + c);
            const float* corner = in + (y * w.stride_h * in_width + x * w.stride_w) * K + c;
            for (int64_t t = 0; t < together; ++t) {
              const int64_t i = (from + t) / kw, j = (from + t) % kw;
              const int64_t at = (i * w.dilation_h * in_width + j * w.dilation_w) * K;
              sums[t] += g * load(corner + at);
            }
          }
        }
        for (int64_t t = 0; t < together; ++t) {
          float lanes[kLanes];
          store(lanes, sums[t]);
          for (int64_t lane = b * kLanes - c; lane < blocks.lanes; ++lane)
            total[(from + t) * K + c + lane] += lanes[lane];
        }
      }
    }
  }
}

void depthwise_conv(const float* in, int64_t in_width, const float* weight, float* out,
                    int64_t rows, int64_t width, int64_t K, Window window) {
  const int64_t side = window.kh == window.kw ? window.kh : 0;
  if (side == 3)
    convolve_blocks<3>(in, in_width, weight, out, rows, width, Blocks(K), window);
  else if (side == 5)
    convolve_blocks<5>(in, in_width, weight, out, rows, width, Blocks(K), window);
  else
    convolve_blocks<0>(in, in_width, weight, out, rows, width, Blocks(K), window);
}

void depthwise_conv_backward_weight(const float* in, int64_t in_width, const float* dy,
                                    double* total, int64_t rows, int64_t width, int64_t K,
                                    Window window) {
  const int64_t side = window.kh == window.kw ? window.kh : 0;
  if (side == 3)
    weight_blocks<3>(in, in_width, dy, total, rows, width, Blocks(K), window);
  else if (side == 5)
    weight_blocks<5>(in, in_width, dy, total, rows, width, Blocks(K), window);
  else
    weight_blocks<0>(in, in_width, dy, total, rows, width, Blocks(K), window);
}

// ROWS x COLUMNS taps, known to the compiler so that weights stay in registers; 0: any number.
template <int ROWS, int COLUMNS>
SACL_INLINE void input_run(const float* dy, int64_t dy_width, const float* weight, float* dx,
                           int64_t K, int64_t kw, const Tap* rows, int64_t row_count, Run run,
                           const Tap* columns) {
  const int64_t height = ROWS ? ROWS : row_count, width = COLUMNS ? COLUMNS : run.tap_count;
  Vec own[ROWS ? ROWS * COLUMNS : 1];
  for (int64_t t = 0; t < ROWS * COLUMNS; ++t)
    own[t] = load(weight + (rows[t / width].tap * kw + columns[t % width].tap) * K);
  for (int64_t x = 0; x < run.count; ++x) {
    Vec sum = {};
    for (int64_t i = 0; i < height; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const Vec g = load(dy + (rows[i].at * dy_width + columns[j].at + x) * K);
        sum += g * (ROWS ? own[ROWS ? i * width + j : 0]
                         : load(weight + (rows[i].tap * kw + columns[j].tap) * K));
      }
    }
    store(dx + (run.first + x * run.step) * K, sum);
  }
}

void depthwise_conv_backward_input(const float* dy, int64_t dy_width, const float* weight,
                                   float* dx, int64_t K, int64_t kw, const Tap* rows,
                                   int64_t row_count, const Run* runs, int64_t run_count,
                                   const Tap* columns) {
  const Blocks blocks(K);
  for (int64_t b = 0; b < blocks.count; ++b) {
    const int64_t c = blocks.start(b);
    for (int64_t r = 0; r < run_count; ++r) {
      const Run run = runs[r];
      const Tap* taps = columns + run.taps;
#define CALL(ROWS, COLUMNS)                                                                     \
  case ROWS * 4 + COLUMNS:                                                                      \
    input_run<ROWS, COLUMNS>(dy + c, dy_width, weight + c, dx + c, K, kw, rows, row_count, run, \
                             taps);                                                             \
    break
      switch (row_count <= 3 && run.tap_count <= 3 ? row_count * 4 + run.tap_count : 0) {
        CALL(1, 1);
        CALL(1, 2);
        CALL(1, 3);
        CALL(2, 1);
        CALL(2, 2);
        CALL(2, 3);
        CALL(3, 1);
        CALL(3, 2);
        CALL(3, 3);
        default:
          input_run<0, 0>(dy + c, dy_width, weight + c, dx + c, K, kw, rows, row_count, run, taps);
      }
#undef CALL
    }
  }
}
