// The streaming state of an image and class, or location. The words center, weight and squares are
// those of genrep_fast/reference/scoring.py.
#pragma once

#include <cmath>
#include <vector>

#include "scoring.h"

namespace genrep_fast {

constexpr int64_t kSteps = 128;  // whose log-likelihoods become a state at once
constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// Of `count` steps, which are the weight of "mean".
struct State {
  double center = 0, weight = 0, squares = 0;
  int64_t count = 0;
};

inline double finite(double center) { return center == kMinusInfinity ? 0.0 : center; }

inline State merge(const State& a, const State& b, bool mixture) {
  if (a.count == 0 || b.count == 0) {
    return a.count == 0 ? b : a;
  }
  State merged;
  merged.count = a.count + b.count;
  if (mixture) {
    const State& high = a.center < b.center ? b : a;
    const State& low = a.center < b.center ? a : b;
    const double scale = std::exp(low.center - finite(high.center));
    merged.center = high.center;
    merged.weight = high.weight + scale * low.weight;
    merged.squares = high.squares + scale * scale * low.squares;
  } else {
    const double n = static_cast<double>(a.count);
    const double m = static_cast<double>(b.count);
    const double deviation = b.center - a.center;
    merged.center =
        std::isfinite(deviation) ? a.center + deviation * (m / (n + m)) : a.center + b.center;
    merged.squares = a.squares + b.squares + deviation * deviation * (n * m / (n + m));
  }
  return merged;
}

// State of `count` <= kSteps values of l, which are padded to a multiple of 16.
GENREP_FAST_INLINE State mixture_state(double* l, int64_t count) {
  int64_t padded = round_up(count, kLanes);
  std::fill(l + count, l + padded, kMinusInfinity);
  Doubles largest = Doubles{} + kMinusInfinity;
  for (int64_t i = 0; i < padded; i += 8) {
    Doubles values = load<Doubles>(l + i);
    // Passes NaN over: it comes to light in the sum.
    largest = values > largest ? values : largest;
  }
  State state;
  state.center = kMinusInfinity;
  for (int i = 0; i < 8; ++i) {
    state.center = std::max(state.center, largest[i]);
  }
  Doubles center = Doubles{} + finite(state.center);
  Floats weights{}, squares{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    HalfFloats gaps[2];
    gaps[0] = __builtin_convertvector(load<Doubles>(l + i) - center, HalfFloats);
    gaps[1] = __builtin_convertvector(load<Doubles>(l + i + 8) - center, HalfFloats);
    Floats weight = exponential(load<Floats>(gaps));
    weights += weight;
    squares += weight * weight;
  }
  state.weight = horizontal_sum(weights);
  state.squares = horizontal_sum(squares);
  state.count = count;
  return state;
}

GENREP_FAST_INLINE State mean_state(const double* l, int64_t count) {
  State state;
  state.count = count;
  for (int64_t i = 0; i < count; ++i) {
    state.center += l[i];
  }
  state.center /= static_cast<double>(count);
  for (int64_t i = 0; i < count; ++i) {
    state.squares += (l[i] - state.center) * (l[i] - state.center);
  }
  return state;
}

GENREP_FAST_INLINE State state_of(double* l, int64_t count, bool mixture) {
  return mixture ? mixture_state(l, count) : mean_state(l, count);
}

inline double log_likelihood_of(const State& state, bool mixture) {
  if (!mixture) {
    return state.center;
  }
  if (state.count == 0) {
    return kMinusInfinity;
  }
  return state.center + std::log(state.weight) - std::log(static_cast<double>(state.count));
}

// [B, K] states of every step, from the outputs row by row.
std::vector<State> row_states(const Problem& problem);

// The same where `shares_centers`, in another order of summation: centres are read once for many
// images.
std::vector<State> tile_states(const Problem& problem);

}  // namespace genrep_fast
