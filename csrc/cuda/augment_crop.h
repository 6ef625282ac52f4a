// Both passes of the crop, and the colours that need no more than a pixel; see augment_kernels.cu.
#pragma once

#include "cuda/augment.h"
#include "cuda/augment_pixels.h"

namespace sacl::cuda {
namespace {

constexpr int kAcross = 32, kDeep = kThreads / 32;   // threads of a block of the crop
constexpr int kRows = 4, kTileRows = kRows * kDeep;  // of a view, that a thread and a block take
constexpr int kPiece = 16, kPieceRows = kPiece / kDeep;  // rows of a crop at a time
constexpr int kTaps = 32;                                // weights of a column at a time

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

}  // namespace
}  // namespace sacl::cuda
