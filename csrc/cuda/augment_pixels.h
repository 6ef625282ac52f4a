// Pixels of views as they lie in scratch, red, green and blue in the low bytes of a word, and what
// is done to the colours of one: 8 bits after each operation, as Pillow and
// csrc/cpu/augment_kernels.inl have it, to the bit.
#pragma once

#include "cuda/device.h"

namespace sacl::cuda {

enum Operation { kNothing, kBrightness, kContrast, kSaturation, kHue };

__device__ inline int byte_of(uint32_t word, int i) {
  return static_cast<int>(__byte_perm(word, 0, 0x4440u + i));  // one instruction, a shift is two
}

__device__ inline int clipped(int x) { return min(max(x, 0), 255); }

__device__ inline uint32_t packed(int r, int g, int b) {
  return static_cast<uint32_t>(r | g << 8 | b << 16);
}

// Pillow's grayscale.
__device__ inline int luma_of(uint32_t pixel) {
  return (19595 * byte_of(pixel, 0) + 38470 * byte_of(pixel, 1) + 7471 * byte_of(pixel, 2) +
          0x8000) >>
         16;
}

__device__ inline uint32_t gray_of(uint32_t pixel) {
  return static_cast<uint32_t>(luma_of(pixel)) * 0x010101u;
}

// Pillow's blend, rounded down. The product is rounded before it is added.
__device__ inline int blended(int from, int to, float factor) {
  const float change = __fmul_rn(factor, static_cast<float>(to - from));
  return clipped(static_cast<int>(__fadd_rn(static_cast<float>(from), change)));
}

__device__ inline uint32_t blended_with(int from, uint32_t pixel, float factor) {
  return packed(blended(from, byte_of(pixel, 0), factor), blended(from, byte_of(pixel, 1), factor),
                blended(from, byte_of(pixel, 2), factor));
}

// 255 x rounded down, not the product that float32 rounds: x in 0..1. All terms are exact.
__device__ inline int of_255(float x) {
  const int whole = static_cast<int>(__fmul_rn(x, 255.0f));
  return whole - (__fadd_rn(__fmul_rn(x, 256.0f), -static_cast<float>(whole)) < x);
}

// x / 6 as division rounds it, for every x that is a hue in sixths of the circle.
__device__ inline float sixth(float x) {
  constexpr float kSixth = 1.0f / 6;
  const float near = __fmul_rn(x, kSixth);
  return __fmaf_rn(__fmaf_rn(-6.0f, near, x), kSixth, near);
}

// Pillow's way from RGB to HSV in 8 bits, `shift` added to the hue, and back; turn_hue of the CPU,
// which says what q is. Its quotients that end as integers are those of integers here: they are the
// same for every colour, and so is the hue, whose division is rounded as there.
__device__ inline uint32_t turned(uint32_t pixel, int shift) {
  const int r = byte_of(pixel, 0), g = byte_of(pixel, 1), b = byte_of(pixel, 2);
  const int high = max(max(r, g), b), low = min(min(r, g), b);
  const int chroma = high - low, from_high = 2 * high + low - (r + g + b);
  const int r_high = r == high, g_high = (g == high) & (r < high), b_high = 1 - r_high - g_high;
  const int rising = (r_high & (g == low)) | (g_high & (b == low)) | (b_high & (r == low));
  const int sign = 2 * rising - 1, base = 2 * g_high + 4 * b_high - sign;
  const float q = static_cast<float>(from_high) / static_cast<float>(max(chroma, 1));
  const float turn =
      sixth(__fadd_rn(static_cast<float>(base), __fmul_rn(static_cast<float>(sign), q)));
  const float hue = __fadd_rn(turn, turn < 0.0f ? 1.0f : 0.0f);
  const int h = (of_255(hue) + shift) & 255;
  // 255 chroma / high, rounded down: its fraction is 0 or at least 1/255 away from the next
  // integer.
  const float share =
      __fdividef(static_cast<float>(255 * chroma), static_cast<float>(max(high, 1)));
  const int s = static_cast<int>(share + 1e-3f);
  const int sector = 1543 * h >> 16, within = 2 * h - 85 * sector;  // 6 h / 255; of 85
  const bool odd = sector & 1;
  const int away = odd ? within : 85 - within;
  const int bottom = (high * (255 - s) + 127) / 255;
  const int middle = (high * (255 * 85 - s * away) + 255 * 85 / 2) / (255 * 85);
  // The lowest channel is blue in the sectors 0, 1 and 6, red in 2 and 3, green in 4 and 5.
  const int ahead = odd ? middle : high, behind = odd ? high : middle, third = sector >> 1;
  return packed(third == 1 ? bottom : (third == 2 ? behind : ahead),
                third == 1 ? ahead : (third == 2 ? bottom : behind),
                third == 1 ? behind : (third == 2 ? ahead : bottom));
}

// One operation of the jitter on N pixels. mean: of the view's luma, for the contrast; shift: of
// the hue.
template <int N>
__device__ void adjust(uint32_t (&pixels)[N], int operation, float factor, int shift, int mean) {
  if (operation == kBrightness || operation == kContrast) {
    const int from = operation == kContrast ? mean : 0;
#pragma unroll
    for (int i = 0; i < N; ++i) pixels[i] = blended_with(from, pixels[i], factor);
  } else if (operation == kSaturation) {
#pragma unroll
    for (int i = 0; i < N; ++i) pixels[i] = blended_with(luma_of(pixels[i]), pixels[i], factor);
  } else if (operation == kHue) {
#pragma unroll
    for (int i = 0; i < N; ++i) pixels[i] = turned(pixels[i], shift);
  }
}

template <int N>
__device__ void make_gray(uint32_t (&pixels)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) pixels[i] = gray_of(pixels[i]);
}

// What the 256 values of each channel become: solarised and normalised. Filled by all threads of
// the block; a barrier follows.
struct Normalised {
  float values[3][256];

  __device__ void fill(int threshold, const float* mean, const float* std) {
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < 3 * 256;
         i += blockDim.x * blockDim.y) {
      const int channel = i / 256, value = i % 256;
      const int shown = value >= threshold ? 255 - value : value;
      values[channel][value] = (static_cast<float>(shown) - mean[channel]) / std[channel];
    }
  }

  // P pixels side by side, to 3 P channels.
  template <class T, int P>
  __device__ void write(const uint32_t (&pixels)[P], T* out) const {
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      float channels[P];
#pragma unroll
      for (int i = 0; i < P; ++i) {
        const int at = part * P + i, channel = at % 3;
        channels[i] = values[channel][byte_of(pixels[at / 3], channel)];
      }
      Vec<T, P>::store(out + part * P, channels);
    }
  }
};

// P pixels of scratch, in words of 16 bytes where there are four or more.
template <int P>
__device__ void load_pixels(const uint32_t* from, uint32_t (&pixels)[P]) {
  if constexpr (P % 4 == 0) {
#pragma unroll
    for (int i = 0; i < P; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(from + i);
      pixels[i] = four.x, pixels[i + 1] = four.y, pixels[i + 2] = four.z, pixels[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < P; ++i) pixels[i] = from[i];
  }
}

template <int P>
__device__ void store_pixels(const uint32_t (&pixels)[P], uint32_t* to) {
  if constexpr (P % 4 == 0) {
#pragma unroll
    for (int i = 0; i < P; i += 4)
      *reinterpret_cast<uint4*>(to + i) =
          uint4{pixels[i], pixels[i + 1], pixels[i + 2], pixels[i + 3]};
  } else {
#pragma unroll
    for (int i = 0; i < P; ++i) to[i] = pixels[i];
  }
}

}  // namespace sacl::cuda
