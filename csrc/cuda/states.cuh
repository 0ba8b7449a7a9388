// The streaming state of an image and class, or location, and where it goes in the end. The words
// center, weight and squares are those of genrep_fast/reference/scoring.py.
#pragma once

#include "reductions.cuh"
#include "scoring.cuh"

namespace genrep_fast {

struct State {
  double center, weight, squares;
};

__device__ inline State empty_state(bool mixture) { return {mixture ? -INFINITY : 0.0, 0, 0}; }

// One more step; NaN stays.
__device__ inline void add_step(State& state, double likelihood, bool mixture) {
  if (!mixture) {
    const double weight = state.weight + 1;
    const double deviation = likelihood - state.center;
    state.center = (state.weight * state.center + likelihood) / weight;
    state.squares += deviation * deviation * (state.weight / weight);
    state.weight = weight;
  } else if (likelihood != -INFINITY) {
    const double difference = likelihood - state.center;
    const bool grows = difference > 0 || likelihood != likelihood;
    const double scale = exp(-fabs(difference));
    state.weight = grows ? fma(state.weight, scale, 1.0) : state.weight + scale;
    state.squares =
        grows ? fma(state.squares, scale * scale, 1.0) : fma(scale, scale, state.squares);
    state.center = grows ? likelihood : state.center;
  }
}

__device__ inline State merged(const State& a, const State& b, bool mixture) {
  if (b.weight == 0) {
    return a;
  }
  if (a.weight == 0) {
    return b;
  }
  if (mixture) {
    const double center = a.center != a.center || a.center > b.center ? a.center : b.center;
    const double scale = exp(a.center - center);
    const double other_scale = exp(b.center - center);
    return {
        center, scale * a.weight + other_scale * b.weight,
        scale * scale * a.squares + other_scale * other_scale * b.squares};
  }
  const double weight = a.weight + b.weight;
  const double deviation = b.center - a.center;
  const double squares =
      a.squares + b.squares + deviation * deviation * (a.weight * b.weight / weight);
  return {(a.weight * a.center + b.weight * b.center) / weight, weight, squares};
}

// Merges with the threads of the warp whose numbers differ below `width`, a power of two; the
// result of the first is in their order.
__device__ inline State merged_over_warp(const State& state, int width, bool mixture) {
  return reduced_over_warp(
      state, 1, width, [mixture](const State& a, const State& b) { return merged(a, b, mixture); });
}

// Steps in groups, a block each.
struct Groups {
  int64_t number, steps;
};

// Where the state of an image and class, or of a location, goes: into a likelihood, or into the
// state of the streaming update.
struct Destination {
  // Null where the streaming update wants the state.
  float *likelihood, *remainder;  // [B, K, *loc]
  double* state;                  // [3 or 2, B, all_classes, *loc]
  int64_t* count;                 // [all_classes]
  const int64_t* classes;         // [K], or null
  int64_t all_classes;
  bool counts_steps;  // in the kernel that makes the states
  // Not null where there are several groups of steps.
  State* partials;  // [B, K, groups]

  __device__ __host__ bool exists() const { return likelihood != nullptr || state != nullptr; }

  // Of a class of the chunk, among all classes; -1 where it is none, as the caller's assertion says
  // later.
  __device__ int64_t place_of(int64_t k) const {
    const int64_t own_class = classes == nullptr ? k : classes[k];
    return own_class < all_classes ? max(own_class, int64_t{-1}) : -1;
  }

  // Adds the chunk's steps to the count of every class, by all threads of the grid.
  __device__ void count_steps(const DeviceChunk& chunk) const {
    const int64_t threads = int64_t{gridDim.x} * blockDim.x;
    for (int64_t k = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; k < chunk.classes;
         k += threads) {
      const int64_t own_class = place_of(k);
      if (own_class >= 0) {
        count[own_class] += chunk.steps;
      }
    }
  }

  // Takes the state of a group of steps of an image and class.
  __device__ void take(
      const DeviceChunk& chunk, int64_t b, int64_t k, const Groups& groups, int64_t group,
      const State& state) const {
    if (partials != nullptr) {
      partials[(b * chunk.classes + k) * groups.number + group] = state;
    } else {
      finish(chunk, b, k, 0, 1, state);
    }
  }

  __device__ void finish(
      const DeviceChunk& chunk, int64_t b, int64_t k, int64_t location, int64_t locations,
      const State& state) const {
    if (likelihood != nullptr) {
      const int64_t index = (b * chunk.classes + k) * locations + location;
      const double exact =
          chunk.mixture ? state.center + log(state.weight) - chunk.log_steps : state.center;
      likelihood[index] = static_cast<float>(exact);
      if (chunk.mixture) {
        remainder[index] =
            isinf(likelihood[index]) ? 0.f : static_cast<float>(exact - likelihood[index]);
      }
    } else {
      update(chunk, b, k, location, locations, state);
    }
  }

  __device__ void update(
      const DeviceChunk& chunk, int64_t b, int64_t k, int64_t location, int64_t locations,
      const State& added) const {
    const int64_t own_class = place_of(k);
    if (own_class < 0) {
      return;
    }
    const int64_t plane = chunk.batch * all_classes * locations;
    double* place = state + (b * all_classes + own_class) * locations + location;
    if (chunk.mixture) {
      const State sum = merged({place[0], place[plane], place[2 * plane]}, added, true);
      place[0] = sum.center;
      place[plane] = sum.weight;
      place[2 * plane] = sum.squares;
    } else {
      const State sum =
          merged({place[0], static_cast<double>(count[own_class]), place[plane]}, added, false);
      place[0] = sum.center;
      place[plane] = sum.squares;
    }
  }
};

// ---- groups of steps ----

// At least `share` steps a group, and no more groups than make `blocks` of `pairs` of images and
// classes.
Groups groups_of(int64_t steps, int64_t share, int64_t blocks, int64_t pairs);

// Memory for the states of the groups, to which it points `destination`; empty for one group.
Tensor new_partials(
    const DeviceChunk& chunk, const Groups& groups, const Tensor& x, Destination& destination);

// Merges the states of the groups, unless there is one.
void launch_merge(
    const DeviceChunk& chunk, const Groups& groups, const Destination& destination,
    cudaStream_t stream);

// ---- launches ----

// The states of locations, to `destination`.
void launch_locations(
    const DeviceChunk& chunk, const Destination& destination, cudaStream_t stream);

// The states of images and classes, to `destination`, where `shares_centers`.
void launch_shared_centers(
    const DeviceChunk& chunk, const Destination& destination, const Tensor& x, cudaStream_t stream);

// Adds the chunk's steps to the count of every class.
void launch_count(const DeviceChunk& chunk, const Destination& destination, cudaStream_t stream);

}  // namespace genrep_fast
