// Log-likelihoods of images under every class (see genrep_fast/reference/scoring.py), and their
// streaming update.
//
//     r = a_s x + b_s x_t + c_s o             residual of a row: one image b, class k and step s
//     l = -1/2 v_s sum r^2 + D n_s,   L = logsumexp_s l - log S  or the mean of l
//
// Reads o, B K S D elements, and x and x_t as often through the caches; 4 multiply-adds an element:
// bound by memory.
//
// Rows of few elements are a part of a warp's, longer ones a warp's or a block's, as their size
// alone decides. A block works on some steps of one image and class; its state is merged with those
// of the other steps by a second kernel, in their order. Single locations and centres that
// images share have kernels of their own (scoring_locations.cu, shared_centers.cu).
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "introspection.h"
#include "states.cuh"

namespace genrep_fast {
namespace {

constexpr int64_t kBlocks = 1024;  // that few images and classes are cut into

template <typename Access>
__global__ __launch_bounds__(kThreads, Access::kBlocks) void log_likelihood_rows_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Groups groups,
    const __grid_constant__ Destination destination, int team) {
  // The grid is [K, groups, B].
  const int64_t b = blockIdx.x % chunk.batch;
  const int64_t rest = blockIdx.x / chunk.batch;
  const int64_t group = rest % groups.number;
  const int64_t k = rest / groups.number;
  const int64_t end = min((group + 1) * groups.steps, chunk.steps);
  // The block is [teams, team].
  const int lane = threadIdx.x % team;
  const int index = threadIdx.x / team;
  const int teams = blockDim.x / team;
  State state = empty_state(chunk.mixture);
#pragma unroll 1
  for (int64_t first = group * groups.steps; first < end; first += teams) {
    const int64_t s = min(first + index, end - 1);
    const Row row = row_at(chunk, b, k, s);
    const int quads = first + index < end ? chunk.row_quads() : 0;
    const double squares = team_sum(row_squares<Access>(chunk, row, quads, lane, team), team);
    if (first + index < end) {
      add_step(state, step_likelihood(chunk, s, squares, chunk.elements), chunk.mixture);
    }
  }
  __shared__ State states[kThreads];
  if (lane == 0) {
    states[index] = state;
  }
  state = reduced_over_block(
      states, teams, [&](const State& a, const State& b) { return merged(a, b, chunk.mixture); });
  if (threadIdx.x == 0) {
    destination.take(chunk, b, k, groups, group, state);
  }
}

void launch_rows(
    const DeviceChunk& chunk, Destination destination, const Tensor& x, cudaStream_t stream) {
  const int team = team_of(chunk.elements);
  const int64_t pairs = chunk.batch * chunk.classes;
  const int64_t teams = std::clamp<int64_t>(chunk.steps, 1, kThreads / team);
  const Groups groups = groups_of(chunk.steps, teams, kBlocks, pairs);
  const Tensor partials = new_partials(chunk, groups, x, destination);
  const unsigned threads = static_cast<unsigned>(round_up(teams * team, 32));
  with_access(chunk, false, true, [&](auto access) {
    log_likelihood_rows_kernel<decltype(access)>
        <<<grid_of(pairs * groups.number), threads, 0, stream>>>(chunk, groups, destination, team);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  launch_merge(chunk, groups, destination, stream);
}

// The states of every image, class and location, to `destination`.
void score(
    const DeviceChunk& chunk, bool per_location, const Destination& destination, const Tensor& x,
    cudaStream_t stream) {
  if (chunk.batch * chunk.classes * (per_location ? chunk.locations : 1) == 0) {
    return;
  }
  if (per_location) {
    launch_locations(chunk, destination, stream);
  } else if (shares_centers(chunk, false)) {
    launch_shared_centers(chunk, destination, x, stream);
  } else {
    launch_rows(chunk, destination, x, stream);
  }
}

// ---- operators ----

std::tuple<Tensor, Tensor> log_likelihood(
    const Tensor& x, const Tensor& model_output, const std::optional<Tensor>& x_t,
    const Tensor& tables, const std::string& reduction, bool per_location) {
  DeviceScope scope(x);
  const ScoredChunk chunk = checked_chunk(x, model_output, x_t, tables, reduction, per_location);
  const std::vector<int64_t> sizes = result_sizes(chunk, x, per_location);
  Tensor likelihood = new_tensor(x, sizes, ScalarType::Float);
  Tensor remainder =
      new_tensor(x, chunk.mixture ? sizes : std::vector<int64_t>{0}, ScalarType::Float);
  Destination destination{};
  destination.likelihood = static_cast<float*>(likelihood.data_ptr());
  destination.remainder = static_cast<float*>(remainder.data_ptr());
  score(device_chunk(chunk, false), chunk.per_location, destination, x, scope.stream());
  return {likelihood, remainder};
}

void score_update(
    const Tensor& x, const Tensor& model_output, const std::optional<Tensor>& x_t,
    const Tensor& tables, const std::optional<Tensor>& classes, const std::string& reduction,
    bool per_location, const Tensor& count, const Tensor& state) {
  DeviceScope scope(x);
  const ScoredChunk chunk = checked_chunk(x, model_output, x_t, tables, reduction, per_location);
  std::optional<Tensor> places;
  if (classes) {
    places = torch::stable::contiguous(*classes);
    check_tensor(*places, ScalarType::Long, {chunk.classes}, x, "classes");
  }
  std::vector<int64_t> sizes = result_sizes(chunk, x, per_location);
  sizes[1] = classes ? count.size(0) : chunk.classes;
  check_tensor(count, ScalarType::Long, {sizes[1]}, x, "count");
  sizes.insert(sizes.begin(), chunk.mixture ? 3 : 2);
  check_tensor(state, ScalarType::Double, sizes, x, "state");
  Destination destination{};
  destination.state = static_cast<double*>(state.data_ptr());
  destination.count = static_cast<const int64_t*>(count.data_ptr());
  destination.classes = places ? static_cast<const int64_t*>(places->data_ptr()) : nullptr;
  destination.all_classes = count.size(0);
  score(device_chunk(chunk, false), chunk.per_location, destination, x, scope.stream());
  launch_count(chunk, destination, static_cast<int64_t*>(count.data_ptr()), scope.stream());
}

}  // namespace

std::vector<Kernel> scoring_kernels() {
  std::vector<Kernel> kernels;
  for_each_access([&](auto access, const char* name) {
    kernels.push_back(
        {std::string("log_likelihood_rows_kernel<") + name + ">",
         reinterpret_cast<const void*>(&log_likelihood_rows_kernel<decltype(access)>)});
  });
  return kernels;
}

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cuda, CUDA, m) {
  m.impl("log_likelihood", TORCH_BOX(&log_likelihood));
  m.impl("score_update", TORCH_BOX(&score_update));
}

}  // namespace genrep_fast
