// From the sums that a norm's neighbours leave: its affine, and the coefficients of its gradient. A
// kernel each, which also deals with the running statistics, the zeroed channels, and the gradients
// of weight and bias.
//
// Sets of sums are combined in double, in fixed order, relative to the mean of the first set, so an
// offset costs no digits. There are some hundred of them and few channels: 64 threads share the
// sets of a channel, eight channels are a block's, which is the 32 bytes that memory gives at a
// time.
#include "cuda/activations.h"
#include "cuda/norm.h"

namespace sacl::cuda {
namespace {

constexpr int kSetColumns = 8, kSetRows = 64;
using Blocks = ChannelBlocks<kSetColumns, kSetRows>;

struct Lists {
  const int64_t *kept, *zeroed;
};

__global__ void affine_of_sums(Blocks channels, int sets, const float* sums, const float* weight,
                               const float* bias, Lists lists, BatchNormStatistics statistics,
                               const float* mean_shift, int act, float* affine, float* rest) {
  if (channels.are_live()) {
    const int K = channels.K, c = channels.live();
    double origin = 0,
           totals[3] = {0, 0, 0};  // count, differences from the origin, squares of them
    if (c < K) {
      if (sums[c] > 0) origin = sums[K + c];
#pragma unroll 4
      for (int t = threadIdx.y; t < sets; t += kSetRows) {
        const float* own = sums + static_cast<int64_t>(t) * 3 * K + c;
        const double n = own[0], mean = own[K], squares = own[2 * K];
        const double beyond = n > 0 ? mean - origin : 0;  // an empty set has no mean
        totals[0] += n;
        totals[1] += n * beyond;
        totals[2] += (n > 0 ? squares : 0) + n * beyond * beyond;
      }
    }
    sum_columns_of_block<kSetColumns, kSetRows>(totals);
    if (c >= K || threadIdx.y != 0) return;
    const int64_t number = number_of(lists.kept, c);
    const double beyond = totals[1] / totals[0], mean = origin + beyond;
    const double variance = not_negative(totals[2] / totals[0] - beyond * beyond);
    const float rstd = static_cast<float>(1 / sqrt(variance + statistics.eps));
    affine[c] = rstd * weight[number];
    affine[K + c] = bias[number];
    affine[2 * K + c] = static_cast<float>(mean);
    affine[3 * K + c] = rstd;
    move_running(statistics, number, mean_shift ? mean + mean_shift[c] : mean, variance);
    return;
  }
  const int r = channels.zeroed();
  if (r >= channels.R) return;
  const int64_t number = lists.zeroed[r];
  rest[r] = activate(act, bias[number]);
  move_running(statistics, number, 0, 0);
}

__global__ void coefficients_of_sums(Blocks channels, int sets, const float* gsums,
                                     const float* drest, const float* bias, Lists lists,
                                     const float* affine, double count, int act,
                                     float* coefficients, float* dweight, float* dbias) {
  if (channels.are_live()) {
    const int K = channels.K, c = channels.live();
    double totals[2] = {0, 0};  // of g, of g (x - mean) / deviation
    if (c < K) {
#pragma unroll 4
      for (int t = threadIdx.y; t < sets; t += kSetRows) {
        const float* own = gsums + static_cast<int64_t>(t) * 2 * K + c;
        totals[0] += own[0];
        totals[1] += own[K];
      }
    }
    sum_columns_of_block<kSetColumns, kSetRows>(totals);
    if (c >= K || threadIdx.y != 0) return;
    const int64_t number = number_of(lists.kept, c);
    const double scale = affine[c], rstd = affine[3 * K + c];
    dbias[number] = static_cast<float>(totals[0]);
    dweight[number] = static_cast<float>(totals[1]);
    coefficients[c] = affine[c];
    coefficients[K + c] = static_cast<float>(-scale * rstd * totals[1] / count);
    coefficients[2 * K + c] = static_cast<float>(-scale * totals[0] / count);
    coefficients[3 * K + c] = affine[2 * K + c];
    return;
  }
  const int r = channels.zeroed();
  if (r >= channels.R) return;
  const int64_t number = lists.zeroed[r];
  dbias[number] = drest ? through_activation(act, drest[r], bias[number]) : 0.0f;
  dweight[number] = 0;
}

}  // namespace
}  // namespace sacl::cuda

using namespace sacl::cuda;

extern "C" {

const char* sacl_cuda_norm_act_affine(NormActChannels channels, const float* sums,
                                      const float* weight, const float* bias,
                                      const int64_t* kept_index, const int64_t* zeroed_index,
                                      BatchNormStatistics statistics, const float* mean_shift,
                                      float* affine, float* rest, void* stream) {
  if (const char* failure = unknown_activation(channels.act)) return failure;
  const Blocks blocks(channels.K, channels.R);
  return launch(&affine_of_sums, blocks.grid(), blocks.block(), stream, blocks, channels.sets, sums,
                weight, bias, Lists{kept_index, zeroed_index}, statistics, mean_shift, channels.act,
                affine, rest);
}

const char* sacl_cuda_norm_act_coefficients(NormActChannels channels, const float* gsums,
                                            const float* drest, const float* bias,
                                            const int64_t* kept_index, const int64_t* zeroed_index,
                                            const float* affine, double count, float* coefficients,
                                            float* dweight, float* dbias, void* stream) {
  if (const char* failure = unknown_activation(channels.act)) return failure;
  if (channels.K + channels.R < channels.C) {  // channels that are in neither list
    if (const char* failure = launch_clear(dweight, dbias, channels.C, stream)) return failure;
  }
  const Blocks blocks(channels.K, channels.R);
  return launch(&coefficients_of_sums, blocks.grid(), blocks.block(), stream, blocks, channels.sets,
                gsums, drest, bias, Lists{kept_index, zeroed_index}, affine, count, channels.act,
                coefficients, dweight, dbias);
}
}
