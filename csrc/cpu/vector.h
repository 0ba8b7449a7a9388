// Vectors that every instruction set has, and the choice among the copies of a kernel at run time.
//
// A kernel is written once, in the vectors of 16 floats below, which the compiler lowers to one
// AVX-512 register, two of AVX2 or four of SSE2. GENREP_FAST_CLONES compiles it for all three; only
// functions that carry a target attribute may use what the baseline lacks.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#define GENREP_FAST_INLINE __attribute__((always_inline)) inline
#define GENREP_FAST_LAMBDA __attribute__((always_inline))

namespace genrep_fast {

constexpr int64_t kLanes = 16;
using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using HalfWords = uint16_t __attribute__((vector_size(32)));
using WordPair = uint32_t __attribute__((vector_size(128)));
using HalfWordPair = uint16_t __attribute__((vector_size(64)));
using HalfFloats =
    float __attribute__((vector_size(32)));  // 8 of them fill one register of doubles
using Doubles = double __attribute__((vector_size(64)));

template <typename Vector>
GENREP_FAST_INLINE Vector load(const void* source) {
  Vector result;
  std::memcpy(&result, source, sizeof(Vector));
  return result;
}

template <typename Vector>
GENREP_FAST_INLINE void store(void* target, Vector value) {
  std::memcpy(target, &value, sizeof(Vector));
}

template <typename Vector, typename Other>
GENREP_FAST_INLINE Vector as(Other bits) {
  static_assert(sizeof(Vector) == sizeof(Other));
  return load<Vector>(&bits);
}

// Asks for memory `elements` float32 numbers ahead of `pointer`, where there need not be any.
GENREP_FAST_INLINE void prefetch(const void* pointer, int64_t elements) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(pointer) + 4 * elements));
}

// The same into the second-level cache, on the way to which more requests can be than to the first:
// for more than two streams, and half-precision ones.
GENREP_FAST_INLINE void prefetch_to_second_level(const void* pointer, int64_t elements) {
  __builtin_prefetch(
      reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(pointer) + 4 * elements), 0, 2);
}

// Past the caches, so that the line that is overwritten need not be read first; `target` is aligned
// to 16 bytes.
GENREP_FAST_INLINE void stream(float* target, Floats value) {
#if defined(__SSE2__)
  __m128 quarters[4];
  std::memcpy(quarters, &value, sizeof(value));
  for (int i = 0; i < 4; ++i) {
    _mm_stream_ps(target + 4 * i, quarters[i]);
  }
#else
  store(target, value);
#endif
}

// Streamed stores become visible to other threads.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

enum class Capability { kBaseline, kAvx2, kAvx512 };

// The best instruction set that this processor has, at most the one that GENREP_FAST_CPU_CAPABILITY
// names (default, avx2, avx512).
Capability capability();

}  // namespace genrep_fast

// Defines `name(parameters)`, which calls `kernel(arguments)`, an always-inlined function, in the
// copy for this processor.
#if defined(__x86_64__)
#define GENREP_FAST_CLONES(name, parameters, kernel, arguments)                            \
  void name##_baseline parameters { kernel arguments; }                                    \
  __attribute__((target("avx2,fma"))) void name##_avx2 parameters { kernel arguments; }    \
  __attribute__((                                                                          \
      target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"))) void \
      name##_avx512 parameters {                                                           \
    kernel arguments;                                                                      \
  }                                                                                        \
  void name parameters {                                                                   \
    switch (genrep_fast::capability()) {                                                   \
      case genrep_fast::Capability::kAvx512:                                               \
        return name##_avx512 arguments;                                                    \
      case genrep_fast::Capability::kAvx2:                                                 \
        return name##_avx2 arguments;                                                      \
      case genrep_fast::Capability::kBaseline:                                             \
        return name##_baseline arguments;                                                  \
    }                                                                                      \
  }
#else
#define GENREP_FAST_CLONES(name, parameters, kernel, arguments) \
  void name parameters { kernel arguments; }
#endif
