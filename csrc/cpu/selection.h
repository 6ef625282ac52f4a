// Channels taken out of a row of pixels by a list, as the kernels do it, and memory for the result.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/common.h"

namespace sacl {

// Memory aligned to a cache line, so that no vector crosses two.
class Scratch {
 public:
  float* get(int64_t size) {
    if (static_cast<int64_t>(memory_.size()) < size + kLanes) memory_.resize(size + kLanes);
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    return reinterpret_cast<float*>((address + 63) / 64 * 64);
  }

 private:
  std::vector<float> memory_;
};

class Selected {
 public:
  Selected(std::vector<int32_t> source, int64_t given) : source_(std::move(source)), given_(given) {
    const int64_t taken = source_.size();
    for (int64_t b = 0; b < (taken + kLanes - 1) / kLanes; ++b) {
      const int64_t start = std::max<int64_t>(0, std::min(b * kLanes, taken - kLanes));
      const int64_t lanes = std::min(kLanes, taken);
      std::vector<bool> done(kLanes);
      for (;;) {
        Selection::Part part = {{-1, -1}, {}, {}};
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const int32_t wanted = source_[start + lane];
          if (done[lane] || wanted < 0) continue;
          for (int32_t side = 0; side < 2; ++side) {
            if (part.from[side] < 0)
              part.from[side] = std::max(0, std::min(wanted, static_cast<int32_t>(given - kLanes)));
            const int32_t offset = wanted - part.from[side];
            if (offset < 0 || offset >= kLanes) continue;
            part.lane[lane] = side * static_cast<int32_t>(kLanes) + offset;
            part.keep[lane] = -1;
            done[lane] = true;
            break;
          }
        }
        if (part.from[0] < 0) break;
        if (part.from[1] < 0) part.from[1] = part.from[0];
        parts_.push_back(part);
      }
      ends_.push_back(static_cast<int32_t>(parts_.size()));
    }
    if (parts_.empty()) parts_.push_back({{0, 0}, {}, {}});  // nothing is taken
  }

  // The first `taken` of `given` channels; those beyond are 0.
  static Selected first(int64_t given, int64_t taken) {
    std::vector<int32_t> source(taken, -1);
    for (int64_t c = 0; c < std::min(given, taken); ++c) source[c] = static_cast<int32_t>(c);
    return Selected(std::move(source), given);
  }

  // From `channels` channels those that `list` names, of which there are `filters`, and as many
  // zeros as make them a vector; nothing where that is all of them.
  static std::optional<Selected> of(const std::optional<Tensor>& list, int64_t channels,
                                    int64_t filters) {
    if (!list.has_value()) {
      STD_TORCH_CHECK(channels == filters,
                      "without in_index there must be a filter for each input channel");
      if (filters >= kLanes) return std::nullopt;
      return first(filters, kLanes);
    }
    STD_TORCH_CHECK(list->dim() == 1 && list->size(0) == filters && list->is_contiguous() &&
                        list->scalar_type() == torch::headeronly::ScalarType::Long,
                    "in_index must hold one input channel (int64) for each filter");
    const int64_t* index = static_cast<const int64_t*>(list->const_data_ptr());
    std::vector<int32_t> source;
    std::vector<bool> named(channels);
    for (int64_t j = 0; j < filters; ++j) {
      STD_TORCH_CHECK(index[j] >= 0 && index[j] < channels, "in_index is out of range");
      STD_TORCH_CHECK(!named[index[j]], "in_index names a channel twice");
      named[index[j]] = true;
      source.push_back(static_cast<int32_t>(index[j]));
    }
    if (filters < kLanes) source.resize(kLanes, -1);
    return Selected(std::move(source), channels);
  }

  // Back to all channels, those that were not taken 0.
  Selected inverse() const {
    std::vector<int32_t> back(given_, -1);
    for (size_t j = 0; j < source_.size(); ++j)
      if (source_[j] >= 0) back[source_[j]] = static_cast<int32_t>(j);
    return Selected(std::move(back), static_cast<int64_t>(source_.size()));
  }

  Selection view() const {
    return {source_.data(), given_, static_cast<int64_t>(source_.size()), parts_.data(),
            ends_.data()};
  }

 private:
  std::vector<int32_t> source_, ends_;
  std::vector<Selection::Part> parts_;
  int64_t given_;
};

inline const Selected* pointer(const std::optional<Selected>& s) { return s ? &*s : nullptr; }

}  // namespace sacl
