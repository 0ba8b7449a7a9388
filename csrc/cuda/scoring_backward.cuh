// What gradients are multiplied with: the factor of every row.
#pragma once

#include "scoring.cuh"

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

// The factors of all rows, [B, K, S], where `shares_centers`.
void launch_shared_factors(
    const DeviceChunk& chunk, const Upstream& upstream, float* factors, cudaStream_t stream);

}  // namespace genrep_fast
