// Merges the states of groups of steps, and counts the steps of the streaming update.
#include "states.cuh"

#include <algorithm>
#include <vector>

#include "introspection.h"

namespace genrep_fast {
namespace {

constexpr int64_t kMaxGroups = 128;  // of steps

// A warp an image and class: merges the states of the groups.
__global__ __launch_bounds__(kThreads, 4) void log_likelihood_merge_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Groups groups,
    const __grid_constant__ Destination destination) {
  const int64_t pair = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (pair >= chunk.batch * chunk.classes) {
    return;
  }
  const int lane = threadIdx.x % 32;
  const int64_t share = ceil_div(groups.number, 32);
  State state = empty_state(chunk.mixture);
  for (int64_t group = lane * share; group < min((lane + 1) * share, groups.number); ++group) {
    state = merged(state, destination.partials[pair * groups.number + group], chunk.mixture);
  }
  state = merged_over_warp(state, 32, chunk.mixture);
  if (lane == 0) {
    const int64_t b = pair / chunk.classes;
    const int64_t k = pair % chunk.classes;
    destination.finish(chunk, b, k, 0, 1, state);
  }
}

__global__ void score_update_count_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Destination destination) {
  destination.count_steps(chunk);
}

}  // namespace

Groups groups_of(int64_t steps, int64_t share, int64_t blocks, int64_t pairs) {
  const int64_t most = std::min(ceil_div(blocks, pairs), kMaxGroups);
  const int64_t length = round_up(std::max<int64_t>(ceil_div(steps, most), 1), share);
  return {std::max<int64_t>(ceil_div(steps, length), 1), length};
}

Tensor new_partials(
    const DeviceChunk& chunk, const Groups& groups, const Tensor& x, Destination& destination) {
  const int64_t states = groups.number > 1 ? chunk.batch * chunk.classes * groups.number : 0;
  Tensor partials = new_tensor(x, {3 * states}, ScalarType::Double);
  destination.partials = states > 0 ? static_cast<State*>(partials.data_ptr()) : nullptr;
  return partials;
}

void launch_merge(
    const DeviceChunk& chunk, const Groups& groups, const Destination& destination,
    cudaStream_t stream) {
  if (groups.number != 1) {
    const unsigned blocks = grid_of(ceil_div(chunk.batch * chunk.classes * 32, kThreads));
    log_likelihood_merge_kernel<<<blocks, kThreads, 0, stream>>>(chunk, groups, destination);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

void launch_count(const DeviceChunk& chunk, const Destination& destination, cudaStream_t stream) {
  if (chunk.classes > 0) {
    const unsigned blocks = grid_of(ceil_div(chunk.classes, kThreads));
    score_update_count_kernel<<<blocks, kThreads, 0, stream>>>(chunk, destination);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::vector<Kernel> states_kernels() {
  return {
      {"log_likelihood_merge_kernel", reinterpret_cast<const void*>(&log_likelihood_merge_kernel)},
      {"score_update_count_kernel", reinterpret_cast<const void*>(&score_update_count_kernel)},
  };
}

}  // namespace genrep_fast
