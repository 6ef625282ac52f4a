// The views of a batch of images: random resized crop, flip, jitter, grayscale, Gaussian blur,
// solarise, normalisation, as they were drawn for each, from 8-bit pixels to floats.
//
// The crop and the colours are Pillow's to the bit: bicubic weights of 22 bits, 8 bits after each
// of two passes, and 8 bits after each operation. The blur is that of data/views/draw.py, two
// passes of floats, rounded once.
//
// One view is made by one thread from start to end and lies in its cache meanwhile, as rows of
// three planes. Both passes of the crop are sums of rows, the first one on the transposed image: a
// sum of rows is a vector at a time whatever the weights, and transposing the bytes (H, 3 W) takes
// the channels apart besides.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/common.h"

namespace sacl {
namespace {

constexpr int64_t kStrip = 64;     // rows that are transposed at once
constexpr double kLeftOut = 1e-6;  // weight of the blur's taps that are left out, at most

enum Operation { kNothing, kBrightness, kContrast, kSaturation, kHue };

struct Draw {  // a row of `draws`
  double top, left, height, width, flip, operation[4], factor[4], grayscale, sigma, threshold;
};
constexpr int64_t kDrawn = sizeof(Draw) / sizeof(double);

struct Image {  // (height, width, 3)
  const uint8_t* pixels;
  int64_t height, width;
};

// Of the outputs of one axis, which inputs they sum and with which weights.
class Resampling {
 public:
  struct Sum {
    int64_t first, count;
    const int32_t* weight;
  };

  // Bicubic (a = -0.5), widened where it shrinks: Pillow's, term by term.
  void set(int64_t in, int64_t out) {
    const double scale = static_cast<double>(in) / out, stretch = std::max(scale, 1.0);
    const double support = 2 * stretch;
    most_ = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
    bounds_.resize(out);
    weights_.resize(out * most_);
    exact_.resize(most_);
    for (int64_t i = 0; i < out; ++i) {
      const double centre = (i + 0.5) * scale;
      const int64_t first = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
      const int64_t end = std::min<int64_t>(static_cast<int64_t>(centre + support + 0.5), in);
      double total = 0;
      for (int64_t k = 0; k < end - first; ++k)
        total += exact_[k] = cubic(std::abs((k + first - centre + 0.5) * (1 / stretch)));
      for (int64_t k = 0; k < end - first; ++k)
        weights_[i * most_ + k] =
            static_cast<int32_t>(std::round(exact_[k] / total * (1 << kWeightBits)));
      bounds_[i] = {first, end - first};
    }
  }

  Sum operator[](int64_t i) const {
    return {bounds_[i].first, bounds_[i].second, &weights_[i * most_]};
  }

 private:
  static double cubic(double x) {
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0;
  }

  int64_t most_ = 0;
  std::vector<std::pair<int64_t, int64_t>> bounds_;
  std::vector<int32_t> weights_;
  std::vector<double> exact_;
};

// What the views have in common, and the memory of one thread.
class Augmentation {
 public:
  Augmentation(int64_t size, int64_t window, const float* mean, const float* std)
      : size_(size), pitch_(round_up(size, kLanes)), window_(std::min(window, 2 * size - 1)),
        mean_(mean), std_(std), pixels_(size * 3 * pitch_), other_(size * 3 * pitch_),
        side_(3 * pitch_ * kStrip), sums_(std::max(3 * pitch_, kStrip)), column_(3 * pitch_),
        line_(window_ + pitch_), blurred_(pitch_), weight_(window_ / 2 + 1), rows_(window_) {}

  // One view, to `out` (size, size, 3).
  void operator()(const Image& image, const Draw& draw, float* out) {
    crop(image, draw);
    for (int i = 0; i < 4; ++i) adjust(draw.operation[i], draw.factor[i]);
    if (draw.grayscale) for_rows([&](uint8_t* row) { kernels().blend_luma(row, pitch_, 0); });
    if (draw.sigma > 0) blur(draw.sigma);
    for (int64_t y = 0; y < size_; ++y)
      kernels().normalise(row(y), pitch_, size_, static_cast<int32_t>(draw.threshold), mean_, std_,
                          out + y * 3 * size_);
  }

 private:
  uint8_t* row(int64_t y) { return pixels_.data() + y * 3 * pitch_; }

  template <class F>
  void for_rows(const F& one) {
    for (int64_t y = 0; y < size_; ++y) one(row(y));
  }

  void crop(const Image& image, const Draw& draw) {
    const int64_t height = static_cast<int64_t>(draw.height);
    const int64_t width = static_cast<int64_t>(draw.width);
    const uint8_t* corner = image.pixels + 3 * (static_cast<int64_t>(draw.top) * image.width +
                                                static_cast<int64_t>(draw.left));
    const int64_t line = 3 * pitch_;
    turned_.resize(3 * width * kStrip);
    narrowed_.resize(height * line);
    across_.set(width, size_);
    down_.set(height, size_);
    for (int64_t y = 0; y < height; y += kStrip) {
      const int64_t rows = std::min(kStrip, height - y), lanes = round_up(rows, kLanes);
      kernels().transpose(corner + y * 3 * image.width, 3 * image.width, rows, 3 * width,
                          turned_.data(), kStrip);
      for (int64_t x = 0; x < size_; ++x) {
        const Resampling::Sum sum = across_[x];
        const int64_t to = draw.flip ? size_ - 1 - x : x;
        for (int64_t c = 0; c < 3; ++c)
          kernels().weigh_rows(&turned_[(3 * sum.first + c) * kStrip], 3 * kStrip, sum.weight,
                               sum.count, sums_.data(), &side_[(c * pitch_ + to) * kStrip], lanes);
      }
      kernels().transpose(side_.data(), kStrip, line, rows, &narrowed_[y * line], line);
    }
    for (int64_t y = 0; y < size_; ++y) {
      const Resampling::Sum sum = down_[y];
      kernels().weigh_rows(&narrowed_[sum.first * line], line, sum.weight, sum.count, sums_.data(),
                           row(y), line);
    }
  }

  void adjust(double operation, double given) {
    const float factor = static_cast<float>(given);
    switch (static_cast<int>(operation)) {
      case kBrightness: kernels().blend_constant(row(0), size_ * 3 * pitch_, 0, factor); break;
      case kContrast:
        kernels().blend_constant(row(0), size_ * 3 * pitch_, mean_luma(), factor);
        break;
      case kSaturation:
        for_rows([&](uint8_t* row) { kernels().blend_luma(row, pitch_, factor); });
        break;
      case kHue: {
        const int32_t shift = static_cast<int32_t>(given * 255);  // rounded towards 0
        for_rows([&](uint8_t* row) { kernels().turn_hue(row, pitch_, shift); });
      }
    }
  }

  int32_t mean_luma() {
    int64_t sum = 0;
    for_rows([&](uint8_t* row) { sum += kernels().luma_sum(row, pitch_, size_); });
    return static_cast<int32_t>(static_cast<double>(sum) / (size_ * size_) + 0.5);
  }

  // Index -1 is 1, size is size - 2.
  int64_t mirrored(int64_t i) const { return i < 0 ? -i : (i < size_ ? i : 2 * (size_ - 1) - i); }

  void blur(double sigma) {
    const int64_t radius = set_weights(sigma);
    float* line = line_.data() + window_ / 2;
    for (int64_t y = 0; y < size_; ++y) {
      const uint8_t** middle = rows_.data() + window_ / 2;
      for (int64_t j = -radius; j <= radius; ++j) middle[j] = row(mirrored(y + j));
      kernels().blur_columns(middle, weight_.data(), radius, column_.data(), 3 * pitch_);
      for (int64_t c = 0; c < 3; ++c) {
        const float* plane = column_.data() + c * pitch_;
        std::memcpy(line, plane, size_ * sizeof(float));
        for (int64_t j = 1; j <= radius; ++j) {
          line[-j] = plane[mirrored(-j)];
          line[size_ - 1 + j] = plane[mirrored(size_ - 1 + j)];
        }
        kernels().blur_row(line, weight_.data(), radius, blurred_.data(),
                           &other_[(3 * y + c) * pitch_], pitch_);
      }
    }
    pixels_.swap(other_);
  }

  // The weights of the blur from the middle outwards, and how far they count.
  int64_t set_weights(double sigma) {
    int64_t radius = window_ / 2;
    double total = 1;
    auto weight = [=](int64_t j) { return std::exp(-0.5 * (j / sigma) * (j / sigma)); };
    for (int64_t j = 1; j <= radius; ++j) total += 2 * weight(j);
    for (double left_out = 0; radius > 0; --radius)
      if ((left_out += 2 * weight(radius)) > kLeftOut * total) break;
    for (int64_t j = 0; j <= radius; ++j) weight_[j] = static_cast<float>(weight(j) / total);
    return radius;
  }

  int64_t size_, pitch_, window_;
  const float *mean_, *std_;
  std::vector<uint8_t> pixels_, other_, turned_, side_, narrowed_;
  std::vector<int32_t> sums_;
  std::vector<float> column_, line_, blurred_, weight_;
  std::vector<const uint8_t*> rows_;
  Resampling across_, down_;
};

// Memory of 4 KiB pages that is new for every batch takes as long as the arithmetic.
void in_huge_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory),
                  end = (begin + bytes) / kPage * kPage;
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

std::vector<Image> images_of(const std::vector<Tensor>& tensors) {
  std::vector<Image> images;
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.is_cpu() && t.dim() == 3 && t.size(2) == 3 && t.is_contiguous() &&
                        t.scalar_type() == torch::headeronly::ScalarType::Byte,
                    "contiguous images (H, W, 3) uint8 on the CPU were expected");
    images.push_back({static_cast<const uint8_t*>(t.const_data_ptr()), t.size(0), t.size(1)});
  }
  return images;
}

// What a row of `images` says of packed pixels: where an image begins, and its size.
struct Placement {
  int64_t offset, height, width;
};

std::vector<Image> images_of(const Tensor& pixels, const Tensor& images) {
  STD_TORCH_CHECK(pixels.is_cpu() && pixels.dim() == 1 && pixels.is_contiguous() &&
                      pixels.scalar_type() == torch::headeronly::ScalarType::Byte,
                  "pixels must be (bytes,) uint8 on the CPU");
  STD_TORCH_CHECK(images.is_cpu() && images.dim() == 2 && images.size(1) == 3 &&
                      images.is_contiguous() &&
                      images.scalar_type() == torch::headeronly::ScalarType::Long,
                  "images must be (images, 3) int64 on the CPU");
  const uint8_t* bytes = static_cast<const uint8_t*>(pixels.const_data_ptr());
  const Placement* placed = static_cast<const Placement*>(images.const_data_ptr());
  std::vector<Image> found;
  for (int64_t i = 0; i < images.size(0); ++i) {
    const auto [offset, height, width] = placed[i];
    STD_TORCH_CHECK(offset >= 0 && offset <= pixels.numel() && height >= 1 && width >= 1 &&
                        width <= (pixels.numel() - offset) / 3 / height,
                    "an image lies outside the pixels");
    found.push_back({bytes + offset, height, width});
  }
  return found;
}

// The views of `images` as `draws` (views, images, 16) says, to `out` (views * images, size, size,
// 3).
void make_views(const std::vector<Image>& images, const Tensor& draws, int64_t size, int64_t window,
                const Tensor& mean, const Tensor& std, int64_t threads, float* out) {
  const int64_t count = images.size(), views = draws.size(0);
  STD_TORCH_CHECK(draws.is_cpu() && draws.dim() == 3 && draws.size(1) == count &&
                      draws.size(2) == kDrawn && draws.is_contiguous() &&
                      draws.scalar_type() == torch::headeronly::ScalarType::Double,
                  "draws must be (views, images, 16) float64");
  STD_TORCH_CHECK(size > 0 && window > 0 && window % 2 == 1 && threads > 0,
                  "size and threads must be positive, window positive and odd");
  STD_TORCH_CHECK(mean.numel() == 3 && std.numel() == 3, "mean and std must hold 3 values");
  const Draw* drawn = static_cast<const Draw*>(draws.const_data_ptr());
  for (int64_t i = 0; i < views * count; ++i) {
    const Draw& draw = drawn[i];
    const Image& image = images[i % count];
    STD_TORCH_CHECK(draw.top >= 0 && draw.left >= 0 && draw.height >= 1 && draw.width >= 1 &&
                        draw.top + draw.height <= image.height &&
                        draw.left + draw.width <= image.width,
                    "a crop lies outside its image");
  }
  std::atomic<int64_t> next = 0;
  auto work = [&, mean = floats(mean), std = floats(std)] {
    Augmentation augmentation(size, window, mean, std);
    for (int64_t task; (task = next++) < views * count;) {
      const int64_t image = task / views, at = task % views * count + image;  // an image's in a row
      augmentation(images[image], drawn[at], out + at * 3 * size * size);
    }
  };
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < threads; ++i) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

Tensor augment(std::vector<Tensor> images, Tensor draws, int64_t size, int64_t window, Tensor mean,
               Tensor std, int64_t threads) {
  STD_TORCH_CHECK(size > 0 && draws.dim() == 3, "size must be positive, draws (views, images, 16)");
  Tensor out = new_nhwc(draws.size(0) * draws.size(1), 3, size, size);
  in_huge_pages(floats_out(out), out.numel() * sizeof(float));
  make_views(images_of(images), draws, size, window, mean, std, threads, floats_out(out));
  return out;
}

void augment_packed(Tensor pixels, Tensor images, Tensor draws, int64_t window, Tensor mean,
                    Tensor std, Tensor out, int64_t threads) {
  STD_TORCH_CHECK(is_nhwc(out) && out.size(1) == 3 && out.size(2) == out.size(3) &&
                      draws.dim() == 3 && out.size(0) == draws.size(0) * draws.size(1),
                  "out must be (views * images, 3, size, size) float32 in channels-last memory");
  in_huge_pages(floats_out(out), out.numel() * sizeof(float));
  make_views(images_of(pixels, images), draws, out.size(2), window, mean, std, threads,
             floats_out(out));
}

STABLE_TORCH_LIBRARY_IMPL(sacl_fast, CPU, m) {
  m.impl("augment", TORCH_BOX(&augment));
  m.impl("augment_packed", TORCH_BOX(&augment_packed));
}

}  // namespace sacl
