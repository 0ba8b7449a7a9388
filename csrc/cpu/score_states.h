// States of the streaming sums over the steps of an image and class.
#pragma once

#include <cmath>
#include <vector>

#include "residuals.h"

namespace genrep_fast {

constexpr int64_t kSteps = 128;  // whose log-likelihoods become a state at once
constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// Of some steps of one image and class: maximum, sum of w and of w^2 with w = exp(l - maximum); or
// mean and sum of squared deviations.
struct State {
  double level = 0, sum = 0, squares = 0;
  int64_t count = 0;
};

inline double finite(double maximum) { return maximum == kMinusInfinity ? 0.0 : maximum; }

inline State merge(const State& a, const State& b, bool mixture) {
  if (a.count == 0 || b.count == 0) {
    return a.count == 0 ? b : a;
  }
  State merged;
  merged.count = a.count + b.count;
  if (mixture) {
    const State &high = a.level < b.level ? b : a, &low = a.level < b.level ? a : b;
    double scale = std::exp(low.level - finite(high.level));
    merged.level = high.level;
    merged.sum = high.sum + scale * low.sum;
    merged.squares = high.squares + scale * scale * low.squares;
  } else {
    double n = static_cast<double>(a.count), m = static_cast<double>(b.count),
           difference = b.level - a.level;
    merged.level =
        std::isfinite(difference) ? a.level + difference * (m / (n + m)) : a.level + b.level;
    merged.sum = a.sum + b.sum + difference * difference * (n * m / (n + m));
  }
  return merged;
}

// State of `count` <= kSteps values of l, which are padded to a multiple of 16.
GENREP_FAST_INLINE State mixture_state(double* l, int64_t count) {
  int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  std::fill(l + count, l + padded, kMinusInfinity);
  Doubles levels = Doubles{} + kMinusInfinity;
  for (int64_t i = 0; i < padded; i += 8) {
    Doubles values = load<Doubles>(l + i);
    levels = values > levels ? values : levels;  // passes NaN over: it comes to light in the sum
  }
  State state;
  state.level = kMinusInfinity;
  for (int i = 0; i < 8; ++i) {
    state.level = std::max(state.level, levels[i]);
  }
  Doubles level = Doubles{} + (state.level == kMinusInfinity ? 0.0 : state.level);
  Floats sum{}, squares{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    HalfFloats gaps[2];
    gaps[0] = __builtin_convertvector(load<Doubles>(l + i) - level, HalfFloats);
    gaps[1] = __builtin_convertvector(load<Doubles>(l + i + 8) - level, HalfFloats);
    Floats weight = exponential(load<Floats>(gaps));
    sum += weight;
    squares += weight * weight;
  }
  state.sum = horizontal_sum(sum);
  state.squares = horizontal_sum(squares);
  state.count = count;
  return state;
}

GENREP_FAST_INLINE State mean_state(const double* l, int64_t count) {
  State state;
  state.count = count;
  for (int64_t i = 0; i < count; ++i) {
    state.level += l[i];
  }
  state.level /= static_cast<double>(count);
  for (int64_t i = 0; i < count; ++i) {
    state.sum += (l[i] - state.level) * (l[i] - state.level);
  }
  return state;
}

inline double log_likelihood_of(const State& state, bool mixture) {
  if (!mixture) {
    return state.level;
  }
  return state.count == 0
             ? kMinusInfinity
             : state.level + std::log(state.sum) - std::log(static_cast<double>(state.count));
}

// [B, K] states of every step, from the outputs row by row.
std::vector<State> row_states(const Problem& problem);

// The same where `is_tiled`, in another order of summation: centres are read once for many images.
std::vector<State> tile_states(const Problem& problem);

}  // namespace genrep_fast
