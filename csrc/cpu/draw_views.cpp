// What is random about the views of a batch, as data/views/draw.py draws it with numpy: the same
// streams (Philox 4x64-10, Salmon et al., SC 2011), the same draws from them in the same order, and
// the same roundings. In Python this takes longer than to make the views of 32 px.
//
// Bit for bit: sums and products are rounded one by one, exp is that of the C library, which
// Python's math calls as well, and halves are rounded to even.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <thread>
#include <utility>

#include "cpu/common.h"

#if defined(__clang__)
#pragma clang fp contract(off)
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace sacl {
namespace {

constexpr int kAttempts = 10;   // to find a crop that fits
constexpr double kNever = 256;  // no value is solarised
constexpr int64_t kLeast = 64;  // draws that are worth a thread

// A row of `settings`: of one view. Logarithms are taken by who calls.
struct Settings {
  double scale_low, scale_high, ratio_low, ratio_high, log_low, log_high;
  double flip, jitter, strength[3], hue, grayscale, blur, sigma_low, sigma_high, solarize,
      threshold;
};
constexpr int64_t kSettings = sizeof(Settings) / sizeof(double);

struct Drawn {  // a row of `draws`, as augment takes it
  double top, left, height, width, flip, operation[4], factor[4], grayscale, sigma, threshold;
};
constexpr int64_t kDrawn = sizeof(Drawn) / sizeof(double);

// numpy's Generator(Philox(counter=, key=)): its stream of 64-bit words, of which a 32-bit one is
// the lower half, and the next one the upper half.
class Stream {
 public:
  Stream(std::array<uint64_t, 4> counter, std::array<uint64_t, 2> key)
      : counter_(counter), key_(key) {}

  double random() { return static_cast<double>(next64() >> 11) * (1.0 / 9007199254740992.0); }

  double uniform(double low, double high) { return low + (high - low) * random(); }

  bool chance(double probability) { return random() < probability; }

  // 0..last, the first of the numbers masked to its bits that is not above it: that of shuffle.
  uint32_t bounded(uint32_t last) {
    const uint32_t mask = std::bit_ceil(last + 1) - 1;
    for (;;)
      if (const uint32_t value = next32() & mask; value <= last) return value;
  }

 private:
  uint64_t next64() {
    if (used_ == 4) refill();
    return words_[used_++];
  }

  uint32_t next32() {
    if (has_half_) {
      has_half_ = false;
      return half_;
    }
    const uint64_t word = next64();
    has_half_ = true;
    half_ = static_cast<uint32_t>(word >> 32);
    return static_cast<uint32_t>(word);
  }

  void refill() {
    for (uint64_t& word : counter_)
      if (++word) break;
    auto [x0, x1, x2, x3] = counter_;
    auto [k0, k1] = key_;
    for (int round = 0; round < 10; ++round) {
      const Wide a = Wide{0xD2E7470EE14C6C93} * x0, b = Wide{0xCA5A826395121157} * x2;
      x0 = static_cast<uint64_t>(b >> 64) ^ x1 ^ k0;
      x1 = static_cast<uint64_t>(b);
      x2 = static_cast<uint64_t>(a >> 64) ^ x3 ^ k1;
      x3 = static_cast<uint64_t>(a);
      k0 += 0x9E3779B97F4A7C15;
      k1 += 0xBB67AE8584CAA73B;
    }
    words_ = {x0, x1, x2, x3};
    used_ = 0;
  }

  using Wide = unsigned __int128;
  std::array<uint64_t, 4> counter_, words_{};
  std::array<uint64_t, 2> key_;
  int used_ = 4;
  bool has_half_ = false;
  uint32_t half_ = 0;
};

void draw_crop(const Settings& view, Stream& stream, int64_t width, int64_t height, Drawn& drawn) {
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const double area =
        static_cast<double>(width * height) * stream.uniform(view.scale_low, view.scale_high);
    const double ratio = std::exp(stream.uniform(view.log_low, view.log_high));
    const double w = std::nearbyint(std::sqrt(area * ratio));
    const double h = std::nearbyint(std::sqrt(area / ratio));
    if (0 < w && w <= width && 0 < h && h <= height) {
      drawn.top = std::trunc(stream.random() * (height - h + 1));
      drawn.left = std::trunc(stream.random() * (width - w + 1));
      drawn.height = h;
      drawn.width = w;
      return;
    }
  }
  // The image is too elongated: its centre, at the nearest allowed ratio.
  double w = width, h = height;
  if (w / h < view.ratio_low)
    h = std::max(1.0, std::nearbyint(w / view.ratio_low));
  else if (w / h > view.ratio_high)
    w = std::max(1.0, std::nearbyint(h * view.ratio_high));
  drawn.top = std::floor((height - h) / 2);
  drawn.left = std::floor((width - w) / 2);
  drawn.height = h;
  drawn.width = w;
}

void draw_jitter(const Settings& view, Stream& stream, Drawn& drawn) {
  double factor[4];
  int operation[4], order[4], count = 0;
  for (int i = 0; i < 3; ++i) {
    if (!(view.strength[i] > 0)) continue;
    factor[count] = stream.uniform(std::max(0.0, 1 - view.strength[i]), 1 + view.strength[i]);
    operation[count++] = i + 1;
  }
  if (view.hue > 0) {
    factor[count] = stream.uniform(-view.hue, view.hue);
    operation[count++] = 4;
  }
  for (int i = 0; i < count; ++i) order[i] = i;
  for (int i = count - 1; i > 0; --i) std::swap(order[i], order[stream.bounded(i)]);
  for (int i = 0; i < count; ++i) {
    drawn.operation[i] = operation[order[i]];
    drawn.factor[i] = factor[order[i]];
  }
}

Drawn draw_view(const Settings& view, Stream stream, int64_t width, int64_t height) {
  Drawn drawn{};
  draw_crop(view, stream, width, height, drawn);
  drawn.flip = stream.chance(view.flip);
  if (stream.chance(view.jitter)) draw_jitter(view, stream, drawn);
  drawn.grayscale = stream.chance(view.grayscale);
  if (stream.chance(view.blur)) drawn.sigma = stream.uniform(view.sigma_low, view.sigma_high);
  drawn.threshold = stream.chance(view.solarize) ? view.threshold : kNever;
  return drawn;
}

template <class T>
const T* rows_of(const Tensor& t, int64_t width, torch::headeronly::ScalarType type,
                 const char* what) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(1) == width && t.is_contiguous() &&
                      t.scalar_type() == type,
                  what);
  return static_cast<const T*>(t.const_data_ptr());
}

}  // namespace

Tensor draw_views(int64_t seed, int64_t epoch, Tensor image_index, Tensor sizes, Tensor settings,
                  int64_t threads) {
  using torch::headeronly::ScalarType;
  const int64_t* size = rows_of<int64_t>(sizes, 2, ScalarType::Long, "sizes must be (n, 2) int64");
  const Settings* view = rows_of<Settings>(settings, kSettings, ScalarType::Double,
                                           "settings must be (views, 18) float64");
  const int64_t count = sizes.size(0), views = settings.size(0);
  STD_TORCH_CHECK(image_index.is_cpu() && image_index.dim() == 1 && image_index.size(0) == count &&
                      image_index.is_contiguous() && image_index.scalar_type() == ScalarType::Long,
                  "image_index must be (n,) int64");
  STD_TORCH_CHECK(seed >= 0 && epoch >= 0 && threads > 0,
                  "seed and epoch must not be negative, threads must be positive");
  const int64_t* image = static_cast<const int64_t*>(image_index.const_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(image[i] >= 0, "an index is negative");
    STD_TORCH_CHECK(size[2 * i] >= 1 && size[2 * i + 1] >= 1 && size[2 * i] <= INT32_MAX &&
                        size[2 * i + 1] <= INT32_MAX,
                    "height and width must be 1 or more, of 31 bits");
  }
  Tensor draws = torch::stable::empty({views, count, kDrawn}, ScalarType::Double);
  Drawn* out = static_cast<Drawn*>(draws.mutable_data_ptr());
  auto work = [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t v = at / count, i = at % count;
      const Stream stream({0, static_cast<uint64_t>(v), static_cast<uint64_t>(image[i]), 0},
                          {static_cast<uint64_t>(seed), static_cast<uint64_t>(epoch)});
      out[at] = draw_view(view[v], stream, size[2 * i + 1], size[2 * i]);
    }
  };
  const int64_t all = views * count;
  const int64_t parts = std::clamp<int64_t>(all / kLeast, 1, threads);
  std::vector<std::thread> helpers;
  for (int64_t part = 1; part < parts; ++part)
    helpers.emplace_back(work, all * part / parts, all * (part + 1) / parts);
  work(0, all / parts);
  for (std::thread& helper : helpers) helper.join();
  return draws;
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, CPU, m) { m.impl("draw_views", TORCH_BOX(&draw_views)); }

}  // namespace sacl
