// Residuals times the factors of a gradient, written as float32 or as the output's own elements.
#pragma once

#include "scoring.h"

namespace genrep_fast {

// What a row's residual is multiplied with.
struct RowFactor {
  float factor;

  GENREP_FAST_INLINE Floats times(int64_t, Floats r) const { return r * factor; }
};

// What the residual of a location is multiplied with, one after the other; 0 makes a zero of
// everything, even of infinities.
struct LocationFactors {
  float factor;
  const float* scales;  // up to 15 more are read

  GENREP_FAST_INLINE Floats times(int64_t i, Floats r) const {
    Floats scale = load<Floats>(scales + i);
    return scale == 0.0f ? Floats{} : r * factor * scale;
  }
};

// Scaled residuals of `count` <= kBlock elements; 15 more may be written.
template <typename Factors>
GENREP_FAST_INLINE void scaled_residual(
    const Residual& block, const Factors& factors, int64_t count, float* values) {
  with_layout(block, [&](auto element, auto has_noisy) GENREP_FAST_LAMBDA {
    constexpr Element kElement = decltype(element)::value;
    constexpr bool kNoisy = decltype(has_noisy)::value;
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      Floats r[2];
      block.pair_at<kElement, kNoisy>(i, r);
      r[0] = factors.times(i, r[0]);
      r[1] = factors.times(i + kLanes, r[1]);
      if constexpr (kElement == Element::kFloat) {
        std::memcpy(values + i, r, sizeof(r));
      } else {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          values[i + 2 * lane] = r[0][lane];
          values[i + 2 * lane + 1] = r[1][lane];
        }
      }
    }
    for (; i + kLanes <= count; i += kLanes) {
      store(values + i, factors.times(i, block.at<kElement, kNoisy>(i)));
    }
    if (i < count) {
      store(values + i, factors.times(i, block.rest<kElement, kNoisy>(i, count - i)));
    }
  });
}

// The same for a gradient of the output's dtype and order.
template <typename Factors>
GENREP_FAST_INLINE void write_scaled_residual(
    const Residual& block, const Factors& factors, int64_t count, char* target, bool streaming) {
  streaming = streaming && reinterpret_cast<uintptr_t>(target) % 16 == 0;
  with_layout(block, [&](auto element, auto has_noisy) GENREP_FAST_LAMBDA {
    constexpr Element kElement = decltype(element)::value;
    constexpr bool kNoisy = decltype(has_noisy)::value;
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
      if constexpr (kElement != Element::kFloat) {
        prefetch_to_second_level(block.output + 2 * i, kAhead);
      }
      Floats r[2];
      block.pair_at<kElement, kNoisy>(i, r);
      const Floats values[2] = {factors.times(i, r[0]), factors.times(i + kLanes, r[1])};
      store_pair<kElement>(target, i, values, streaming);
    }
    for (; i < count; i += kLanes) {
      const int64_t rest = std::min(kLanes, count - i);
      const Floats value = factors.times(i, block.rest<kElement, kNoisy>(i, rest));
      store_rest<kElement>(target, i, rest, value);
    }
  });
}

}  // namespace genrep_fast
