// What gradients are multiplied with, the factor of every row, and where that of o goes.
#pragma once

#include "scoring_rows.cuh"

namespace genrep_fast {

struct Upstream {
  // The last two are not there for the mean.
  const float *grad, *likelihood, *remainder;  // [B, K, *loc]

  // -v dL/dl grad, by which r is multiplied; `index` is that of the image, class and location.
  __device__ float factor(const DeviceChunk& chunk, int64_t index, int64_t s, double step) const {
    float weight = 1.f / chunk.steps;
    if (chunk.mixture) {
      const double total =
          static_cast<double>(likelihood[index]) + remainder[index] + chunk.log_steps;
      weight = likelihood[index] == -INFINITY ? 0.f : static_cast<float>(exp(step - total));
    }
    return -chunk.inv_var[s] * weight * grad[index];
  }
};

// A step without weight passes no gradient, even where its residual is infinite.
__device__ inline float gradient(float factor, float r) { return factor == 0 ? 0.f : factor * r; }

// Gradient [B, K, S, outer, inner] of o, contiguous but for the channels that o has beyond x's.
struct OutputGradient {
  Operand operand;
  int inner_size;  // may be less than that of a chunk whose rows are flat

  template <typename Access>
  __device__ void store(
      const DeviceChunk& chunk, int64_t row, Place place, const float (&values)[kQuad]) const {
    const Dtype dtype = Access::output_dtype(chunk);
    if constexpr (Access::kWhole) {
      store_aligned(
          operand.data, dtype, row + place.outer * operand.outer + place.inner,
          pack(values, dtype));
      return;
    }
    const int element = place.outer * chunk.inner_size + place.inner;
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      if (place.inner + k < chunk.inner_size) {
        const int outer = (element + k) / inner_size;
        const int inner = element + k - outer * inner_size;
        store_element(
            operand.data, dtype, row + outer * operand.outer + inner * operand.inner, values[k]);
      }
    }
  }
};

// A thread among those of a part of a row: the block is [parts, warps, team].
struct PartThread {
  int index, warp, lane;  // of the block's parts, of the part's warps, of the warp's lanes
  int64_t pair, s;
  int part;

  __device__ PartThread(const DeviceChunk& chunk, const RowLayout& layout) {
    const int thread = threadIdx.x;
    const int warp_bits = min(layout.batch_bits, kWarpBits);
    index = thread >> layout.team_bits >> warp_bits;
    warp = (thread >> layout.team_bits) & ((1 << warp_bits) - 1);
    lane = thread & (layout.team() - 1);
    // Parts are [B, K, S, parts].
    const int64_t first = int64_t{blockIdx.x} * (kThreads >> layout.team_bits >> warp_bits);
    const int64_t row = (first + index) / layout.parts;
    part = static_cast<int>(first + index - row * layout.parts);
    pair = row / chunk.steps;
    s = row - pair * chunk.steps;
  }
};

// The factors of all rows, [B, K, S], where `shares_centers`.
void launch_shared_factors(
    const DeviceChunk& chunk, const Upstream& upstream, float* factors, cudaStream_t stream);

}  // namespace genrep_fast
