// States of single locations (see genrep_fast/reference/scoring.py).
//
// A block of locations passes over all steps; their squares are summed over the channels in
// float32, their states in float64.
#include "scoring_locations.h"

namespace genrep_fast {
namespace {

constexpr int64_t kTogether = 4;  // steps that are added to the states of locations together

// sums = sums * scale + values
GENREP_FAST_INLINE void rescale_and_add(double* sums, Floats scale, Floats values) {
  HalfFloats scales[2], added[2];
  std::memcpy(scales, &scale, sizeof(scale));
  std::memcpy(added, &values, sizeof(values));
  for (int half = 0; half < 2; ++half) {
    Doubles old = load<Doubles>(sums + 8 * half);
    store(
        sums + 8 * half, old * __builtin_convertvector(scales[half], Doubles) +
                             __builtin_convertvector(added[half], Doubles));
  }
}

// Adds kTogether steps, some of which may be -inf, as if they were not there.
GENREP_FAST_INLINE void add_to_mixture(
    const float (*l)[kBlock], int64_t count, LocationStates& states) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats values[kTogether];
    Floats old = load<Floats>(states.center + i);
    Floats center = old;
    for (int64_t u = 0; u < kTogether; ++u) {
      values[u] = load<Floats>(l[u] + i);
      center = larger(center, values[u]);
    }
    Floats finite_center = center == -kInfinity ? Floats{} : center;
    Floats scale = exponential(old - finite_center);
    Floats weights{}, squares{};
    for (int64_t u = 0; u < kTogether; ++u) {
      Floats weight = exponential(values[u] - finite_center);
      weights += weight;
      squares += weight * weight;
    }
    store(states.center + i, center);
    rescale_and_add(states.weight + i, scale, weights);
    rescale_and_add(states.squares + i, scale * scale, squares);
  }
}

GENREP_FAST_INLINE void add_to_mean(
    const float* l, int64_t count, int64_t seen, LocationStates& states) {
  double share = 1.0 / static_cast<double>(seen + 1);
  for (int64_t i = 0; i < count; ++i) {
    double& center = states.mean_center[i];
    const double deviation = l[i] - center;
    // -inf stays.
    center += deviation - deviation == 0 ? deviation * share : static_cast<double>(l[i]);
    states.squares[i] += deviation * (l[i] - center);
  }
}

GENREP_FAST_INLINE void score_locations_kernel(
    const Problem& problem, int64_t b, int64_t k, int64_t begin, int64_t count,
    LocationStates& states) {
  alignas(64) float l[kTogether][kBlock];
  std::fill_n(states.center, kBlock, -kInfinity);
  std::fill_n(states.mean_center, kBlock, 0.0);
  std::fill_n(states.weight, kBlock, 0.0);
  std::fill_n(states.squares, kBlock, 0.0);
  for (int64_t first = 0; first < problem.chunk.steps; first += kTogether) {
    for (int64_t u = 0; u < kTogether; ++u) {
      if (first + u >= problem.chunk.steps) {
        std::fill_n(l[u], kBlock, -kInfinity);
        continue;
      }
      location_log_likelihoods(problem, {b, k, first + u}, begin, count, l[u]);
      if (!problem.chunk.mixture) {
        add_to_mean(l[u], count, first + u, states);
      }
    }
    if (problem.chunk.mixture) {
      add_to_mixture(l, count, states);
    }
  }
}

}  // namespace

GENREP_FAST_CLONES(
    score_locations,
    (const Problem& problem, int64_t b, int64_t k, int64_t begin, int64_t count,
     LocationStates& states),
    score_locations_kernel, (problem, b, k, begin, count, states))

}  // namespace genrep_fast
