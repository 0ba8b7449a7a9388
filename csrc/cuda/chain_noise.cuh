// Noise that a chain's number, its step and its seed decide: Philox 4x32-10 (Salmon et al., SC 2011)
// and Box-Muller. The same bits wherever the chain lies.
#pragma once

#include "elements.cuh"

namespace genrep_fast {

struct Words {
  uint32_t values[4];
};

__device__ inline Words philox_4x32_10(Words counter, uint32_t key0, uint32_t key1) {
  auto& [c0, c1, c2, c3] = counter.values;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// -ln u, u = (word + 1/2) / 2^32. Near u = 1 from 1 - u, which float32 holds exactly. Polynomial:
// Cephes, logf.
__device__ inline float minus_log_uniform(uint32_t word) {
  const float rest = (static_cast<float>(~word) + 0.5f) * 0x1p-32f;  // 1 - u
  float fraction = -rest, exponent = 0;
  if (word < 0x80000000u || rest > 0.29289322f) {  // 1 - sqrt(1/2)
    const uint32_t bits = __float_as_uint((static_cast<float>(word) + 0.5f) * 0x1p-32f);
    const int shift =
        static_cast<int>(bits - 0x3f3504f3) >> 23;  // makes the mantissa lie in [sqrt(1/2), sqrt 2)
    fraction = __uint_as_float(bits - (static_cast<uint32_t>(shift) << 23)) - 1;
    exponent = static_cast<float>(shift);
  }
  const float coefficients[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f,
                                1.4249322787e-1f,  -1.6668057665e-1f, 2.0000714765e-1f,
                                -2.4999993993e-1f, 3.3333331174e-1f};
  const float square = fraction * fraction;
  float sum = 7.0376836292e-2f;
#pragma unroll
  for (float coefficient : coefficients) {
    sum = sum * fraction + coefficient;
  }
  sum = sum * fraction * square + exponent * -2.12194440e-4f;  // ln 2 in two parts
  return -(exponent * 0.693359375f + (fraction + (sum - 0.5f * square)));
}

// cos and sin of 2 pi (word + 1/2) / 2^32, from at most pi / 4. Polynomials: Cephes, sinf and cosf.
__device__ inline float2 cos_sin(uint32_t word) {
  const uint32_t quadrant = (word + 0x20000000u) >> 30;
  const float angle = (static_cast<float>(static_cast<int32_t>(word - (quadrant << 30))) + 0.5f) *
                      1.4629180792671596e-9f;
  const float square = angle * angle;
  const float sine = ((-1.9515295891e-4f * square + 8.3321608736e-3f) * square - 1.6666654611e-1f) *
                         square * angle +
                     angle;
  const float tail =
      (2.443315711809948e-5f * square - 1.388731625493765e-3f) * square + 4.166664568298827e-2f;
  const float cosine = tail * square * square - 0.5f * square + 1;
  const float first = quadrant % 2 == 0 ? cosine : sine, second = quadrant % 2 == 0 ? sine : cosine;
  return make_float2(
      quadrant == 1 || quadrant == 2 ? -first : first, quadrant >= 2 ? -second : second);
}

// Standard normal numbers by Box-Muller: elements 4 index to 4 index + 3 of a chain.
__device__ inline void draw(
    uint64_t seed, uint32_t chain, uint32_t step, int64_t index, float (&z)[kQuad]) {
  const Words counter{
      {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), chain, step}};
  const Words words =
      philox_4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
#pragma unroll
  for (int k = 0; k < kQuad; k += 2) {
    const float radius = __fsqrt_rn(2 * minus_log_uniform(words.values[k]));
    const float2 direction = cos_sin(words.values[k + 1]);
    z[k] = radius * direction.x;
    z[k + 1] = radius * direction.y;
  }
}

}  // namespace genrep_fast
