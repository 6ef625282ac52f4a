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
// A view of 224 px, of a crop of 340 rows of 300, in 16 bits: the least is 306 KB read and 301 KB
// written. Scratch adds 201 KB written and read, and as much again where a view is blurred. It
// takes some 25 million instructions of a lane, as sm_90a has them: 14 a pixel and tap of the
// crop's rows, whose taps are taken by fours (8 million), 9 of its columns (2.5), 120 a weight (2),
// about 100 a pixel for four colours (5), and 12 a pixel and channel for each unit of the blur's
// radius, which is 5.5 on average (10, for 55 % of ImageNet's views). So arithmetic bounds it: 132
// multiprocessors of 128 lanes at 1.7 GHz start 29 10^12 of them a second, for 1.1 million such
// views at most; memory of 3.3 TB/s would move 5 million. All of this is counted, not measured.
//
// The crop holds 80 registers a thread, so 24 of 64 warps on a multiprocessor; the others 64 or
// fewer, so 32 or more.
#include "cuda/augment_blur.h"
#include "cuda/augment_crop.h"

namespace sacl::cuda {
namespace {

constexpr int64_t kHeld = 32 << 20;  // bytes of pixels in scratch

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
