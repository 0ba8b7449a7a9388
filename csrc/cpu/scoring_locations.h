// Log-likelihoods of single locations, a block of them at a time, and their states.
#pragma once

#include "states.h"

namespace genrep_fast {

constexpr int64_t kChannels = 4;  // whose squares at a location are added up together

// Adds the squared residuals of `channels` <= kChannels channels, which are float32 here, to `sums`.
template <bool kNoisy>
GENREP_FAST_INLINE void add_channels(
    const Residual* blocks, int64_t channels, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats sum = load<Floats>(sums + i);
    for (int64_t c = 0; c < channels; ++c) {
      Floats r = count - i < kLanes ? blocks[c].rest<Element::kFloat, kNoisy>(i, count - i)
                                    : blocks[c].at<Element::kFloat, kNoisy>(i);
      sum += r * r;
    }
    store(sums + i, sum);
  }
}

// l of one step at `count` <= kBlock locations; 16 more may be written.
GENREP_FAST_INLINE void location_log_likelihoods(
    const Problem& problem, const Row& row, int64_t begin, int64_t count, float* l) {
  const ScoredChunk& chunk = problem.chunk;
  Scratch scratch[kChannels];
  Residual blocks[kChannels];
  std::fill_n(l, round_up(count, kLanes), 0.0f);
  for (int64_t first = 0; first < chunk.channels; first += kChannels) {
    int64_t channels = std::min(kChannels, chunk.channels - first);
    for (int64_t c = 0; c < channels; ++c) {
      blocks[c] = residual(problem, row, (first + c) * chunk.locations + begin, count, scratch[c]);
    }
    auto add = [&](auto has_noisy) GENREP_FAST_LAMBDA {
      constexpr bool kNoisy = decltype(has_noisy)::value;
      if (channels == kChannels) {  // unrolled by the compiler
        add_channels<kNoisy>(blocks, kChannels, count, l);
      } else {
        add_channels<kNoisy>(blocks, channels, count, l);
      }
    };
    blocks[0].noisy ? add(std::true_type{}) : add(std::false_type{});
  }
  Floats factor = broadcast(-0.5f * chunk.inv_var[row.s]);
  Floats shift = broadcast(chunk.log_norm[row.s] * static_cast<float>(chunk.channels));
  for (int64_t i = 0; i < count; i += kLanes) {
    store(l + i, load<Floats>(l + i) * factor + shift);
  }
}

// States of a block of locations of one image and class.
struct LocationStates {
  // That of "mixture" is one of the float32 likelihoods, that of "mean" is not.
  alignas(64) float center[kBlock];
  alignas(64) double mean_center[kBlock];
  alignas(64) double weight[kBlock], squares[kBlock];

  State at(int64_t i, bool mixture, int64_t steps) const {
    const double own_center = mixture ? center[i] : mean_center[i];
    return {own_center, weight[i], squares[i], steps};
  }
};

// Writes the states of `count` <= kBlock locations from `begin` on, of all steps.
void score_locations(
    const Problem& problem, int64_t b, int64_t k, int64_t begin, int64_t count,
    LocationStates& states);

// Calls take(pair, location, State) for every image, class and location, in any order.
template <typename Take>
void for_each_location(const Problem& problem, const Take& take) {
  const ScoredChunk& chunk = problem.chunk;
  const int64_t blocks = ceil_div(chunk.locations, kBlock);
  const int64_t elements = chunk.steps * chunk.channels * std::min(kBlock, chunk.locations);
  parallel(chunk.batch * chunk.classes * blocks, elements, [&](int64_t task) {
    const int64_t pair = task / blocks;
    const int64_t begin = task % blocks * kBlock;
    const int64_t count = std::min(kBlock, chunk.locations - begin);
    LocationStates states;
    score_locations(problem, pair / chunk.classes, pair % chunk.classes, begin, count, states);
    for (int64_t i = 0; i < count; ++i) {
      take(pair, begin + i, states.at(i, chunk.mixture, chunk.steps));
    }
  });
}

}  // namespace genrep_fast
