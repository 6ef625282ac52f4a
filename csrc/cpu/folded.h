// Rows of channels cut into tasks, and sums over them. Sums are in fp32 over 64 rows and in double
// above, and are added in a fixed order, whatever the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/common.h"

namespace sacl {

// Rows of fewer channels than a vector has are taken 16 at a time, as one row of 16 K channels; the
// rows that are left over are of a narrow kind of their own.
struct Folded {
  static constexpr int64_t kTask = 32768;   // values of one task
  static constexpr int64_t kTogether = 64;  // rows that the kernels sum in fp32

  int64_t M, K, fold, wide_rows;
  Folded(int64_t M, int64_t K) : M(M), K(K), fold(K < kLanes ? kLanes : 1), wide_rows(M / fold) {}

  int64_t wide() const { return fold * K; }
  int64_t chunk() const { return round_up(std::max<int64_t>(1, kTask / wide()), kTogether); }
  int64_t chunks() const { return (wide_rows + chunk() - 1) / chunk(); }
  int64_t narrow_rows() const { return M - wide_rows * fold; }
  int64_t narrow_start() const { return wide_rows * wide(); }  // in floats

  std::vector<float> repeated(const float* values) const {
    std::vector<float> out;
    for (int64_t i = 0; i < fold; ++i) out.insert(out.end(), values, values + K);
    return out;
  }

  // The sums (2 K) over all rows, by `one(offset, rows, channels, scratch, total)`.
  template <class F>
  std::vector<double> sums(const F& one) const {
    std::vector<double> partial(chunks() * 2 * wide(), 0.0), total(2 * K, 0.0);
    torch::stable::parallel_for(0, chunks(), 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(2 * round_up(wide(), kLanes));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * chunk();
        one(first * wide(), std::min(chunk(), wide_rows - first), wide(), scratch.data(),
            &partial[i * 2 * wide()]);
      }
    });
    if (narrow_rows()) {
      std::vector<float> scratch(2 * kLanes);
      one(narrow_start(), narrow_rows(), K, scratch.data(), total.data());
    }
    for (int64_t i = 0; i < chunks(); ++i)
      for (int64_t which = 0; which < 2; ++which)
        for (int64_t c = 0; c < wide(); ++c)
          total[which * K + c % K] += partial[(i * 2 + which) * wide() + c];
    return total;
  }

  // `one(offset, rows, channels)` for all rows.
  template <class F>
  void for_rows(const F& one) const {
    torch::stable::parallel_for(0, chunks(), 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * chunk();
      one(first * wide(), std::min(end * chunk(), wide_rows) - first, wide());
    });
    if (narrow_rows()) one(narrow_start(), narrow_rows(), K);
  }
};

// Column sums (C) of images.
inline std::vector<double> column_sums(const Tensor& x) {
  const Folded rows(x.size(0) * x.size(2) * x.size(3), x.size(1));
  const std::vector<float> origin(rows.wide(), 0.0f);
  const float* in = nhwc(x);
  std::vector<double> sums =
      rows.sums([&](int64_t at, int64_t count, int64_t K, float* part, double* total) {
        kernels().sums_forward(in + at, origin.data(), count, K, part, total);
      });
  sums.resize(rows.K);  // without those of the squares
  return sums;
}

}  // namespace sacl
