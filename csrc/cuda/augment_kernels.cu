// The views of a batch of images: csrc/cpu/augment.cpp, which says what a view is, on a GPU. Pixels
// before normalisation are the CPU's to the bit, but for what differs in exp and in fused
// multiplications of the blur.
//
// What needs the whole view, the mean of the contrast and the blur, cuts the work into three
// kernels of small tiles, between which pixels of 8 bits lie in scratch, in words of 4 bytes:
//
//   prepare_views   checks a draw; sums of the crop's weights, weights of the blur; once for all
//   crop_views      both passes of the crop, the colours before the contrast, the sum of its mean
//   colour_views    the other colours; views that are not blurred are normalised and written
//   blur_views      both passes of the blur of the other views, which are then written
//
// The last three take as many views at a time as fit kHeld bytes of scratch, which stay in the L2
// cache. Crops of any size: their rows and the weights of their columns are taken piece by piece.
//
// A view of 224 px, of a crop of 300 x 340, in 16 bits: the least is 306 KB read and 301 KB
// written; scratch adds 201 KB written and read, and as much again where a view is blurred. Of
// integer and float operations it takes some 15 million: 8 a pixel and tap of both passes of the
// crop (6 taps at scale 1.5; 4 million and 3 million), 100 a pixel for four colours, 10 for an
// output, and 12 a pixel and channel for each unit of the blur's radius. So arithmetic bounds it:
// 132 multiprocessors of 128 lanes at 1.7 GHz do 29 million millions a second, or two million such
// views; memory of 3.3 TB/s would move five million.
#include "cuda/augment.h"
#include "cuda/augment_pixels.h"

namespace sacl::cuda {
namespace {

constexpr int64_t kHeld = 32 << 20;                  // bytes of pixels in scratch
constexpr int kAcross = 32, kDeep = kThreads / 32;   // threads of a block of the crop
constexpr int kRows = 4, kTileRows = kRows * kDeep;  // of a view, that a thread and a block take
constexpr int kPiece = 16, kPieceRows = kPiece / kDeep;  // rows of a crop at a time
constexpr int kTaps = 32;                                // weights of a column at a time
constexpr int kRun = 2048;                               // pixels of a block of the blur

// Of `own`, over the block; in all threads. Called by all of them.
__device__ int sum_of_block(int own) {
  __shared__ int sums[kThreads];
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  sums[thread] = own;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) sums[thread] += sums[thread + half];
  }
  __syncthreads();
  const int sum = sums[0];
  __syncthreads();
  return sum;
}

// The view that a task makes: an image's views are next to each other, so that one finds in the
// cache what another has read of it.
__device__ int view_of(const AugmentShape& s, int task) { return task % s.V * s.n + task / s.V; }

// --- what is drawn -------------------------------------------------------------------------------

// Whether the image lies among the pixels, and the crop in it. A draw that is not a number is not.
__device__ bool fits(const Draw& draw, const Placement& image, int64_t bytes) {
  return image.offset >= 0 && image.offset <= bytes && image.height >= 1 && image.width >= 1 &&
         image.height < kMostSide && image.width < kMostSide &&
         image.width <= (bytes - image.offset) / 3 / image.height && draw.top >= 0 &&
         draw.left >= 0 && draw.height >= 1 && draw.width >= 1 &&
         draw.top + draw.height <= image.height && draw.left + draw.width <= image.width;
}

__device__ double blur_weight(int j, double sigma) {
  return exp(__dmul_rn(__dmul_rn(-0.5, j / sigma), j / sigma));
}

// The weights of the blur from the middle outwards; how far they count is returned.
__device__ int blur_weights(double sigma, int radius, float* weights) {
  double total = 1, left_out = 0;
  for (int j = 1; j <= radius; ++j) total += 2 * blur_weight(j, sigma);
  for (; radius > 0; --radius)
    if ((left_out += 2 * blur_weight(radius, sigma)) > kLeftOut * total) break;
  for (int j = 0; j <= radius; ++j) weights[j] = static_cast<float>(blur_weight(j, sigma) / total);
  return radius;
}

// Block: a view.
__global__ void __launch_bounds__(kThreads)
    prepare_views(AugmentShape s, AugmentInputs in, Scratch scratch) {
  const int task = blockIdx.x;
  const Draw& draw = reinterpret_cast<const Draw*>(in.draws)[view_of(s, task)];
  const Placement& image = reinterpret_cast<const Placement*>(in.images)[task / s.V];
  if (!fits(draw, image, s.bytes)) __trap();
  const int height = static_cast<int>(draw.height), width = static_cast<int>(draw.width);
  const Axis across = Axis::of(width, s.S), down = Axis::of(height, s.S);
  Span* const spans = scratch.spans + static_cast<int64_t>(task) * 2 * s.S;
  for (int i = threadIdx.x; i < 2 * s.S; i += kThreads)
    spans[i] = i < s.S ? Span::of(across, i, width) : Span::of(down, i - s.S, height);
  if (threadIdx.x != 0) return;

  View view;
  view.stride = 3 * image.width;
  view.corner = image.offset + static_cast<int64_t>(draw.top) * view.stride +
                3 * static_cast<int64_t>(draw.left);
  view.across = across, view.down = down;
  view.height = height, view.width = width;
  view.early = 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    view.operation[i] = static_cast<int>(draw.operation[i]);
    view.factor[i] = static_cast<float>(draw.factor[i]);
    view.shift[i] = static_cast<int>(draw.factor[i] * 255);
    if (view.operation[i] != kContrast) continue;
    if (view.early != 4) __trap();  // there is one mean
    view.early = i;
  }
  const int radius = s.radius;
  view.radius = draw.sigma > 0
                    ? blur_weights(draw.sigma, radius,
                                   scratch.weights + static_cast<int64_t>(task) * (radius + 1))
                    : 0;
  view.threshold = static_cast<int>(draw.threshold);
  view.flip = draw.flip != 0, view.gray = draw.grayscale != 0;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(in.pixels), end = begin + s.bytes;
  const uintptr_t last = begin + view.corner + (height - 1) * view.stride + 3 * width - 1;
  view.ragged = (begin + view.corner) / 4 * 4 < begin || last / 4 * 4 + 4 > end;
  scratch.views[task] = view;
}

// --- crop ----------------------------------------------------------------------------------------

// The word of 4 bytes at an address that is a multiple of 4. Of a ragged view, bytes that are not
// among the pixels are 0.
template <bool RAGGED>
__device__ uint32_t word_at(uintptr_t address, uintptr_t begin, uintptr_t end) {
  if constexpr (!RAGGED) return __ldg(reinterpret_cast<const uint32_t*>(address));
  uint32_t word = 0;
#pragma unroll 1
  for (int i = 0; i < 4; ++i)
    if (address + i >= begin && address + i < end)
      word |= static_cast<uint32_t>(*reinterpret_cast<const uint8_t*>(address + i)) << 8 * i;
  return word;
}

struct Pixels {
  uintptr_t begin, end;
};

// sums[i] += the weighted sums of `count` pixels that begin at `first` and i * kDeep rows further
// down; weights [kTaps][kAcross], from the thread's own column on, are 0 beyond `count`. `left`:
// rows from the first to the last one there is, which stands for those after it.
template <bool RAGGED>
__device__ void add_pixels(const Pixels& pixels, uintptr_t first, int64_t stride, int left,
                           const int* weights, int count, int (&sums)[kPieceRows][3]) {
  // Where rows begin, from the word that the first one begins in; below 2^31 (kMostSide).
  const uintptr_t base = first / 4 * 4;
  int offset[kPieceRows];
  uint32_t carried[kPieceRows];
#pragma unroll
  for (int i = 0; i < kPieceRows; ++i) {
    offset[i] = static_cast<int>(first - base) + min(i * kDeep, left) * static_cast<int>(stride);
    carried[i] = word_at<RAGGED>(base + offset[i] / 4 * 4, pixels.begin, pixels.end);
  }
  // Four pixels are three words, and the rest of the one before.
  for (int k = 0; k < count; k += 4) {
    int weight[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) weight[t] = weights[(k + t) * kAcross];
#pragma unroll
    for (int i = 0; i < kPieceRows; ++i) {
      const int before = offset[i] & 3, end = before + 3 * (count - k);
      const uintptr_t word = base + (offset[i] - before) + 3 * k;
      uint32_t bytes[3];
#pragma unroll
      for (int t = 0; t < 3; ++t) {
        const uint32_t next =
            4 * (t + 1) < end ? word_at<RAGGED>(word + 4 * (t + 1), pixels.begin, pixels.end) : 0;
        bytes[t] = __funnelshift_r(carried[i], next, 8 * before);
        carried[i] = next;
      }
#pragma unroll
      for (int t = 0; t < 12; ++t) sums[i][t % 3] += weight[t / 3] * byte_of(bytes[t / 4], t % 4);
    }
  }
}

__device__ uint32_t pixel_of(const int (&sums)[3]) {
  return packed(clipped(sums[0] >> kWeightBits), clipped(sums[1] >> kWeightBits),
                clipped(sums[2] >> kWeightBits));
}

template <int N>
__device__ void clear_to_half(int (&sums)[N][3]) {
#pragma unroll
  for (int i = 0; i < N; ++i) sums[i][0] = sums[i][1] = sums[i][2] = 1 << (kWeightBits - 1);
}

// A block's tile of a view: kAcross columns and up to kTileRows rows.
struct CropTiles {
  int columns, rows;  // tiles along a row and a column of a view
  int height;         // rows of a tile

  explicit CropTiles(int S)
      : columns(ceil_div(S, kAcross)), rows(ceil_div(S, kTileRows)), height(ceil_div(S, rows)) {}
  int count() const { return columns * rows; }
};

// Block: a tile. Thread (x, y): column x, of rows y, y + kDeep, ...: of a piece of the crop, which
// it sums along rows, then of the tile, to which it adds that piece.
__global__ void __launch_bounds__(kThreads, 3)
    crop_views(AugmentShape s, AugmentInputs in, CropTiles tiles, Scratch scratch, int first_task) {
  __shared__ int across[kTaps][kAcross];   // weights of columns, as far as they are held
  __shared__ int down[kPiece][kTileRows];  // weights of the piece's rows in the tile's
  __shared__ uint32_t narrowed[kPiece][kAcross];
  __shared__ int begins[kTileRows], ends[kTileRows];

  const int x = threadIdx.x, y = threadIdx.y;
  const int count = tiles.columns * tiles.rows, slot = blockIdx.x / count;
  const int tile = blockIdx.x % count, task = first_task + slot;
  const View& view = scratch.views[task];
  const Span* spans = scratch.spans + static_cast<int64_t>(task) * 2 * s.S;

  const int column = tile % tiles.columns * kAcross + x;
  const int top = tile / tiles.columns * tiles.height;
  const int rows = min(tiles.height, s.S - top);
  const int from = view.flip ? s.S - 1 - column : column;
  int begin = 0, inputs = 0;  // of the column: the first, and how many
  if (column < s.S) begin = spans[from].first, inputs = spans[from].end - begin;
  const int most = min(view.across.most(), view.width);

  // Of the tile's row `line`, every kThreads / kTileRows-th weight is made by this thread.
  const int thread = y * kAcross + x, line = thread % kTileRows;
  const Span* const of_line = spans + s.S + top + line;
  if (thread < kTileRows) {
    begins[line] = line < rows ? of_line->first : 0;
    ends[line] = line < rows ? of_line->end : 0;
  }

  const Pixels pixels{reinterpret_cast<uintptr_t>(in.pixels),
                      reinterpret_cast<uintptr_t>(in.pixels) + s.bytes};
  const uintptr_t corner = pixels.begin + view.corner + 3 * static_cast<int64_t>(begin);
  const int64_t stride = view.stride;
  const bool ragged = view.ragged;
  const int first_row = spans[s.S + top].first, end_row = spans[s.S + top + rows - 1].end;

  int sums[kRows][3];
  clear_to_half(sums);
  for (int piece = first_row; piece < end_row; piece += kPiece) {
    const int height = min(kPiece, end_row - piece);
    int narrow[kPieceRows][3];
    clear_to_half(narrow);
    for (int k = 0; k < most; k += kTaps) {
      if (piece == first_row || most > kTaps) {
        __syncthreads();
        const Axis axis = view.across;
        const double centre = axis.centre(from), total = inputs > 0 ? spans[from].total : 1;
        for (int t = y; t < kTaps; t += kDeep)
          across[t][x] = k + t < inputs ? axis.rounded_weight(begin + k + t, centre, total) : 0;
        __syncthreads();
      }
      const int taps = min(kTaps, inputs - k);
      if (y < height && taps > 0) {
        const uintptr_t at = corner + (piece + y) * stride + 3 * k;
        if (ragged)
          add_pixels<true>(pixels, at, stride, height - 1 - y, &across[0][x], taps, narrow);
        else
          add_pixels<false>(pixels, at, stride, height - 1 - y, &across[0][x], taps, narrow);
      }
    }
    __syncthreads();  // the piece before is summed up
#pragma unroll
    for (int i = 0; i < kPieceRows; ++i) narrowed[y + i * kDeep][x] = pixel_of(narrow[i]);
    if (line < rows) {
      const Axis axis = view.down;
      const double centre = axis.centre(top + line), total = of_line->total;
      const int end = min(ends[line] - piece, height);
      for (int r = max(begins[line] - piece, 0) + thread / kTileRows; r < end;
           r += kThreads / kTileRows)
        down[r][line] = axis.rounded_weight(piece + r, centre, total);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = y + i * kDeep;
      if (row >= rows) break;
      const int last = min(ends[row] - piece, height);
      for (int r = max(begins[row] - piece, 0); r < last; ++r) {
        const uint32_t pixel = narrowed[r][x];
        const int weight = down[r][row];
#pragma unroll
        for (int c = 0; c < 3; ++c) sums[i][c] += weight * byte_of(pixel, c);
      }
    }
  }

  uint32_t own[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) own[i] = pixel_of(sums[i]);
  const int early = view.early;
  for (int i = 0; i < early; ++i) adjust(own, view.operation[i], view.factor[i], view.shift[i], 0);
  if (early == 4 && view.gray) make_gray(own);
  uint32_t* const out = scratch.pixels + static_cast<int64_t>(slot) * s.S * s.S;
  int luma = 0;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const int row = y + i * kDeep;
    if (row >= rows || column >= s.S) break;
    out[static_cast<int64_t>(top + row) * s.S + column] = own[i];
    luma += luma_of(own[i]);
  }
  if (early == 4) return;
  luma = sum_of_block(luma);
  if (thread == 0) scratch.luma[static_cast<int64_t>(slot) * count + tile] = luma;
}

// --- colours -------------------------------------------------------------------------------------

// The mean over a view's pixels, of the sums of its tiles, rounded. Called by all threads.
__device__ int mean_luma(const int* sums, int tiles, int S) {
  int high = 0, low = 0;  // of sums that an int may not hold
  for (int i = threadIdx.x; i < tiles; i += kThreads) high += sums[i] >> 12, low += sums[i] & 4095;
  const int64_t sum = (static_cast<int64_t>(sum_of_block(high)) << 12) + sum_of_block(low);
  const int64_t pixels = static_cast<int64_t>(S) * S;
  return static_cast<int>(static_cast<double>(sum) / static_cast<double>(pixels) + 0.5);
}

// Block: kThreads times P pixels of a view, side by side, P a thread.
template <class T, int P>
__global__ void __launch_bounds__(kThreads, 4)
    colour_views(AugmentShape s, AugmentInputs in, int crop_tiles, Scratch scratch, int first_task,
                 int blocks, T* out) {
  __shared__ Normalised normalised;
  const int slot = blockIdx.x / blocks, task = first_task + slot;
  const View& view = scratch.views[task];
  const bool blurred = view.radius > 0;
  const int early = view.early;
  if (blurred && early == 4) return;
  const int mean = early == 4 ? 0
                              : mean_luma(scratch.luma + static_cast<int64_t>(slot) * crop_tiles,
                                          crop_tiles, s.S);
  if (!blurred) normalised.fill(view.threshold, in.mean, in.std);
  __syncthreads();
  const int pixel = (blockIdx.x % blocks * kThreads + threadIdx.x) * P, all = s.S * s.S;
  if (pixel >= all) return;
  uint32_t* const at = scratch.pixels + static_cast<int64_t>(slot) * all + pixel;
  uint32_t pixels[P];
  load_pixels(at, pixels);
  for (int i = early; i < 4; ++i)
    adjust(pixels, view.operation[i], view.factor[i], view.shift[i], mean);
  if (early != 4 && view.gray) make_gray(pixels);
  if (blurred)
    store_pixels(pixels, at);
  else
    normalised.write(pixels, out + 3 * (static_cast<int64_t>(view_of(s, task)) * all + pixel));
}

// --- blur ----------------------------------------------------------------------------------------

// Calls f(j, below, above) with the places that are j = 1, ..., radius away from `place` on a line
// of `size`, mirrored: -1 is 1, size is size - 2.
template <class F>
__device__ void for_taps(int place, int size, int radius, const F& f) {
  const int inside = min(radius, min(place, size - 1 - place));
  for (int j = 1; j <= inside; ++j) f(j, place - j, place + j);
  for (int j = inside + 1; j <= radius; ++j) {
    const int above = place + j;
    f(j, abs(place - j), above < size ? above : 2 * (size - 1) - above);
  }
}

// A view that is blurred. weights: from the middle outwards.
struct Blurred {
  const uint32_t* pixels;
  const float* weights;
  int S, radius;

  // Of the column's pixels around row y.
  __device__ void column_sum(int y, int x, float (&sums)[3]) const {
    const uint32_t middle = pixels[y * S + x];
#pragma unroll
    for (int c = 0; c < 3; ++c)
      sums[c] = __fmul_rn(__ldg(weights), static_cast<float>(byte_of(middle, c)));
    for_taps(y, S, radius, [&](int j, int below, int above) {
      const uint32_t low = pixels[below * S + x], high = pixels[above * S + x];
      const float weight = __ldg(weights + j);
#pragma unroll
      for (int c = 0; c < 3; ++c)
        sums[c] =
            __fmaf_rn(weight, static_cast<float>(byte_of(low, c) + byte_of(high, c)), sums[c]);
    });
  }

  // The pixel at column x of a row, of whose columns at(x, sums) gives the sums.
  template <class F>
  __device__ uint32_t row_sum(int x, const F& at) const {
    float own[3], sums[3];
    at(x, own);
#pragma unroll
    for (int c = 0; c < 3; ++c) sums[c] = __fmul_rn(__ldg(weights), own[c]);
    for_taps(x, S, radius, [&](int j, int left, int right) {
      float low[3], high[3];
      at(left, low), at(right, high);
      const float weight = __ldg(weights + j);
#pragma unroll
      for (int c = 0; c < 3; ++c) sums[c] = __fmaf_rn(weight, __fadd_rn(low[c], high[c]), sums[c]);
    });
    return packed(static_cast<int>(sums[0] + 0.5f), static_cast<int>(sums[1] + 0.5f),
                  static_cast<int>(sums[2] + 0.5f));
  }
};

// Block: `run` pixels of a view, side by side. They are whole rows, whose sums of columns the block
// holds; of views that are wider than that (WIDE), sums of columns are made anew for each tap.
template <class T, int P, bool WIDE>
__global__ void __launch_bounds__(kThreads, 4)
    blur_views(AugmentShape s, AugmentInputs in, Scratch scratch, int first_task, int run,
               Divisor row, T* out) {
  __shared__ Normalised normalised;
  __shared__ __align__(16) uint32_t done[kRun];
  __shared__ float columns[WIDE ? 1 : 3 * kRun];
  const int all = s.S * s.S, blocks = (all + run - 1) / run;
  const int slot = blockIdx.x / blocks, task = first_task + slot;
  const View& view = scratch.views[task];
  if (view.radius == 0) return;
  normalised.fill(view.threshold, in.mean, in.std);
  const Blurred blurred{scratch.pixels + static_cast<int64_t>(slot) * all,
                        scratch.weights + static_cast<int64_t>(task) * (s.radius + 1), s.S,
                        view.radius};
  const int first = blockIdx.x % blocks * run, count = min(run, all - first);
  if constexpr (!WIDE) {
    for (int i = threadIdx.x; i < count; i += kThreads) {
      int x = first + i;
      const int y = row.split(x);
      float sums[3];
      blurred.column_sum(y, x, sums);
#pragma unroll
      for (int c = 0; c < 3; ++c) columns[3 * i + c] = sums[c];
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < count; i += kThreads) {
    int x = first + i;
    const int y = row.split(x);
    if constexpr (WIDE) {
      done[i] =
          blurred.row_sum(x, [&](int x, float (&sums)[3]) { blurred.column_sum(y, x, sums); });
    } else {
      const float* const line = columns + 3 * (i - x);
      done[i] = blurred.row_sum(x, [&](int x, float (&sums)[3]) {
#pragma unroll
        for (int c = 0; c < 3; ++c) sums[c] = line[3 * x + c];
      });
    }
  }
  __syncthreads();
  T* const to = out + 3 * (static_cast<int64_t>(view_of(s, task)) * all + first);
  for (int i = threadIdx.x * P; i < count; i += kThreads * P) {
    uint32_t pixels[P];
    load_pixels(done + i, pixels);
    normalised.write(pixels, to + 3 * i);
  }
}

// --- launches ------------------------------------------------------------------------------------

// Views that are made at a time.
int views_held(const AugmentShape& s) {
  const int64_t bytes = static_cast<int64_t>(s.S) * s.S * sizeof(uint32_t);
  return static_cast<int>(std::clamp<int64_t>(kHeld / bytes, 1, static_cast<int64_t>(s.V) * s.n));
}

// Cuts `memory` into its parts, each at a multiple of 16 bytes; what lies after the last is
// returned.
uintptr_t cut(const AugmentShape& s, uintptr_t memory, Scratch& scratch) {
  const int64_t views = static_cast<int64_t>(s.V) * s.n, held = views_held(s);
  const auto take = [&](auto*& part, int64_t count) {
    part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(memory);
    memory += ceil_div<int64_t>(count * sizeof(*part), 16) * 16;
  };
  take(scratch.views, views);
  take(scratch.spans, views * 2 * s.S);
  take(scratch.weights, views * (s.radius + 1));
  take(scratch.luma, held * CropTiles(s.S).count());
  take(scratch.pixels, held * s.S * s.S);
  return memory;
}

template <class T, int P>
const char* launch_augment(const AugmentShape& s, const AugmentInputs& in, T* out,
                           const Scratch& scratch, void* stream) {
  const int tasks = s.V * s.n, all = s.S * s.S;
  const CropTiles tiles(s.S);
  const int blocks = ceil_div(all, kThreads * P);
  const bool wide = s.S > kRun;
  const int run = wide ? kRun : std::min(kRun / s.S, s.S) * s.S;
  const dim3 line(kThreads);
  const char* failure = launch(&prepare_views, dim3(tasks), line, stream, s, in, scratch);
  const int held = views_held(s);
  for (int first = 0; !failure && first < tasks; first += held) {
    const int now = std::min(held, tasks - first);
    failure = launch(&crop_views, dim3(now * tiles.count()), dim3(kAcross, kDeep), stream, s, in,
                     tiles, scratch, first);
    if (failure) break;
    failure = launch(&colour_views<T, P>, dim3(now * blocks), line, stream, s, in, tiles.count(),
                     scratch, first, blocks, out);
    if (failure || s.radius == 0) continue;
    const auto blur = wide ? &blur_views<T, P, true> : &blur_views<T, P, false>;
    failure = launch(blur, dim3(now * ceil_div(all, run)), line, stream, s, in, scratch, first, run,
                     Divisor(s.S), out);
  }
  return failure;
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

int64_t sacl_cuda_augment_scratch(AugmentShape shape) {
  Scratch none;
  return static_cast<int64_t>(cut(shape, 0, none) / sizeof(float));
}

const char* sacl_cuda_augment(AugmentShape shape, AugmentInputs inputs, void* out, float* scratch,
                              void* stream) {
  Scratch parts;
  cut(shape, reinterpret_cast<uintptr_t>(scratch), parts);
  return with_type(shape.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const bool vectors = shape.S % kLanes<T> == 0 && aligned(out);
    const auto run = vectors ? &launch_augment<T, kLanes<T>> : &launch_augment<T, 1>;
    return run(shape, inputs, static_cast<T*>(out), parts, stream);
  });
}
}
