// Launches over rows of channels, for kernels that take each row once.
#pragma once

#include "cuda/device.h"

namespace sacl::cuda {

constexpr int kRowBlocksPerProcessor = 8;

struct Rows {
  int64_t M, chunk;

  __device__ int64_t first() const { return blockIdx.x * chunk + threadIdx.y; }
  __device__ int64_t stop() const { return min(M, (blockIdx.x + 1) * chunk); }
};

// Blocks over M rows of `channels`.
struct RowLaunch {
  Tile tile;
  Chunks chunks;
  int64_t M;

  RowLaunch(int64_t M, int channels, int V)
      : tile(channels, V), chunks(M, tile, kRowBlocksPerProcessor), M(M) {}

  Rows rows() const { return {M, chunks.size}; }
  dim3 grid() const { return dim3(chunks.count, tile.slices); }
  dim3 block() const { return dim3(tile.groups, tile.rows); }
};

}  // namespace sacl::cuda
