// Exponential, logarithm and sums of vectors of floats, in any instruction set.
//
// Polynomials and reductions are those of the Cephes library (S. L. Moshier): about one unit in the
// last place of float32.
#pragma once

#include <limits>

#include "vector.h"

namespace genrep_fast {

using Integers = int32_t __attribute__((vector_size(64)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

GENREP_FAST_INLINE Floats broadcast(float value) { return Floats{} + value; }

// Evaluates coefficients[0] x^(n - 1) + ... + coefficients[n - 1].
template <int n>
GENREP_FAST_INLINE Floats polynomial(Floats x, const float (&coefficients)[n]) {
  Floats sum = broadcast(coefficients[0]);
  for (int i = 1; i < n; ++i) {
    sum = sum * x + coefficients[i];
  }
  return sum;
}

// e^x for x <= 88; 0 below -87, where float32 has subnormal numbers.
GENREP_FAST_INLINE Floats exponential(Floats x) {
  Floats clamped = x < -87.0f ? broadcast(-87.0f) : x;
  Floats rounder = broadcast(0x1.8p23f);
  Floats shifted = clamped * 1.44269504f + rounder;  // its last bits are the power of two
  Floats power = shifted - rounder;
  Floats rest = clamped - power * 0.693359375f + power * 2.12194440e-4f;
  Floats series = polynomial(
      rest, {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
             1.6666665459e-1f, 5.0000001201e-1f});
  Floats mantissa = series * rest * rest + rest + 1.0f;
  Floats scale = as<Floats>((as<Words>(shifted) + 127) << 23);
  return x < -87.0f ? Floats{} : mantissa * scale;
}

// ln(1 + f) + exponent ln 2, for f from sqrt(1/2) - 1 to sqrt(2) - 1.
GENREP_FAST_INLINE Floats log1p_scaled(Floats f, Floats exponent) {
  Floats square = f * f;
  Floats series = polynomial(
      f,
      {7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
       -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f});
  Floats sum = series * f * square - exponent * 2.12194440e-4f - square * 0.5f;
  return f + sum + exponent * 0.693359375f;
}

// ln x for normal positive x; whatever for other x.
GENREP_FAST_INLINE Floats logarithm(Floats x) {
  // Taking the bits of sqrt(1/2) off leaves an exponent that is rounded to the nearest power of
  // two.
  Integers exponent = (as<Integers>(x) - 0x3f3504f3) >> 23;
  Floats mantissa = as<Floats>(as<Integers>(x) - (exponent << 23));  // from sqrt(1/2) to sqrt(2)
  return log1p_scaled(mantissa - 1.0f, __builtin_convertvector(exponent, Floats));
}

GENREP_FAST_INLINE Floats square_root(Floats x) {
  alignas(64) float lanes[kLanes];
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) {
    lanes[i] = __builtin_sqrtf(lanes[i]);
  }
  return load<Floats>(lanes);
}

// Where b is NaN the result is a.
GENREP_FAST_INLINE Floats larger(Floats a, Floats b) { return b > a ? b : a; }

GENREP_FAST_INLINE float horizontal_sum(Floats values) {
  float sums[8];
  for (int i = 0; i < 8; ++i) {
    sums[i] = values[i] + values[i + 8];
  }
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

GENREP_FAST_INLINE double horizontal_sum(Doubles values) {
  return ((values[0] + values[4]) + (values[1] + values[5])) +
         ((values[2] + values[6]) + (values[3] + values[7]));
}

GENREP_FAST_INLINE float horizontal_maximum(Floats values) {
  float largest = values[0];
  for (int i = 1; i < kLanes; ++i) {
    largest = values[i] > largest ? values[i] : largest;
  }
  return largest;
}

}  // namespace genrep_fast
