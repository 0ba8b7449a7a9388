// Log-likelihoods of single locations: a thread works on four of one image and class.
#include <string>
#include <vector>

#include "introspection.h"
#include "states.cuh"

namespace genrep_fast {
namespace {

// A thread four locations of an image and class, or some of their steps.
template <typename Access>
__global__ __launch_bounds__(kThreads) void log_likelihood_locations_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Destination destination,
    int slices) {
  // The block is [slices, width].
  const int width = kThreads / slices;
  const int lane = threadIdx.x % width;
  const int slice = threadIdx.x / width;
  // Items are [K, B, quads].
  const int64_t item = static_cast<int64_t>(blockIdx.x) * width + lane;
  const int64_t pair = item / chunk.inner_quads;
  const int64_t b = pair % chunk.batch;
  const int64_t k = pair / chunk.batch;
  const int location = kQuad * static_cast<int>(item - pair * chunk.inner_quads);
  const bool exists = k < chunk.classes;
  State states[kQuad];
  for (int j = 0; j < kQuad; ++j) {
    states[j] = empty_state(chunk.mixture);
  }
#pragma unroll 1
  for (int64_t s = slice; s < (exists ? chunk.steps : 0); s += slices) {
    double squares[kQuad];
    location_squares<Access>(chunk, row_at(chunk, b, k, s), location, squares);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      add_step(states[j], step_likelihood(chunk, s, squares[j], chunk.channels), chunk.mixture);
    }
  }
  __shared__ State shared[kThreads];
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    __syncthreads();
    shared[threadIdx.x] = states[j];
    __syncthreads();
    if (slice == 0 && exists && location + j < chunk.locations) {
      State state = states[j];
#pragma unroll 1
      for (int other = lane + width; other < kThreads; other += width) {
        state = merged(state, shared[other], chunk.mixture);
      }
      destination.finish(chunk, b, k, location + j, chunk.locations, state);
    }
  }
}

}  // namespace

void launch_locations(
    const DeviceChunk& chunk, const Destination& destination, cudaStream_t stream) {
  const int64_t items = chunk.batch * chunk.classes * chunk.inner_quads;
  const int slices = slices_of(items, chunk.steps);
  with_access(chunk, true, true, [&](auto access) {
    const unsigned blocks = grid_of(ceil_div(items, kThreads / slices));
    log_likelihood_locations_kernel<decltype(access)>
        <<<blocks, kThreads, 0, stream>>>(chunk, destination, slices);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

std::vector<Kernel> scoring_locations_kernels() {
  std::vector<Kernel> kernels;
  for_each_access([&](auto access, const char* name) {
    kernels.push_back(
        {std::string("log_likelihood_locations_kernel<") + name + ">",
         reinterpret_cast<const void*>(&log_likelihood_locations_kernel<decltype(access)>)});
  });
  return kernels;
}

}  // namespace genrep_fast
