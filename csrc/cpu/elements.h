// Memory of float32, bfloat16 and float16 tensors, which kernels work on in float32, a block at a
// time.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#if defined(__linux__)
#include <sys/resource.h>
#endif

#include "vector.h"

namespace genrep_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Smaller results are better left in the caches for whoever reads them next.
constexpr int64_t kStreamingBytes = int64_t{1} << 20;
// Elements that are worked on together; their copies in float32 stay in the first-level cache.
constexpr int64_t kBlock = 1024;

enum class Element : int32_t { kFloat, kBFloat16, kHalf };

// Memory of one tensor; null where a loss does not reach the parameter.
struct Buffer {
  char* data = nullptr;
  Element element = Element::kFloat;

  char* at(int64_t index) const { return data + index * (element == Element::kFloat ? 4 : 2); }
};

inline Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Element::kFloat;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kHalf;
    default:
      STD_TORCH_CHECK(false, "tensors must be float32, bfloat16 or float16");
  }
}

inline Buffer buffer_of(const Tensor& tensor) {
  return {static_cast<char*>(tensor.data_ptr()), element_of(tensor.scalar_type())};
}

// Whether a new tensor of `bytes` > 0 bytes is worth streaming into, past the caches: it is large,
// and the system has not just given its memory, whose pages come zeroed in the caches and are
// better written there. Writes one byte of it.
inline bool is_streamed(const Tensor& tensor, int64_t bytes) {
  if (bytes < kStreamingBytes) {
    return false;
  }
#if defined(__linux__)
  rusage before, after;
  getrusage(RUSAGE_THREAD, &before);
  static_cast<volatile char*>(tensor.data_ptr())[bytes / 2] = 0;
  getrusage(RUSAGE_THREAD, &after);
  return after.ru_minflt == before.ru_minflt;
#else
  return true;
#endif
}

// Integer arithmetic, because the baseline has no instructions for float16 and the others spend
// less time on it than on memory.
// `bits` are 16 in the lower half of each word.
GENREP_FAST_INLINE Floats widen(Words bits, Element element) {
  if (element == Element::kBFloat16) {
    return as<Floats>(bits << 16);
  }
  // The exponent's bias differs by 112; the multiplication gives subnormal numbers their exponent,
  // too.
  Words magnitude = as<Words>(as<Floats>((bits & 0x7fff) << 13) * 0x1p112f);
  magnitude |= (bits & 0x7c00) == 0x7c00 ? Words{} + 0x7f800000 : Words{};
  return as<Floats>(magnitude | (bits & 0x8000) << 16);
}

GENREP_FAST_INLINE Floats widen(HalfWords words, Element element) {
  return widen(__builtin_convertvector(words, Words), element);
}

// The 16 bits of each number: bfloat16 in the upper half of its word, the lower one arbitrary;
// float16 in the lower half, below zeros.
GENREP_FAST_INLINE Words narrow_bits(Floats values, Element element) {
  Words bits = as<Words>(values);
  if (element == Element::kBFloat16) {
    Words rounded = bits + 0x7fff + (bits >> 16 & 1);
    // Rounding would carry some NaNs over to infinity or zero.
    return values != values ? bits | 0x400000 : rounded;
  }
  Words magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  Words normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Below 2^-14, adding 1/2 leaves the rounded multiple of 2^-24 in the last bits of the sum.
  Words subnormal = as<Words>(as<Floats>(magnitude) + 0.5f) - 0x3f000000;
  Words half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x47800000 ? Words{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? Words{} + 0x7e00 : half;
  return half | sign;
}

GENREP_FAST_INLINE HalfWords narrow(Floats values, Element element) {
  Words bits = narrow_bits(values, element);
  return __builtin_convertvector(element == Element::kBFloat16 ? bits >> 16 : bits, HalfWords);
}

// 16 elements as float32.
template <Element kElement>
GENREP_FAST_INLINE Floats load_as(const char* source, int64_t i) {
  if constexpr (kElement == Element::kFloat) {
    return load<Floats>(source + 4 * i);
  } else {
    return widen(load<HalfWords>(source + 2 * i), kElement);
  }
}

// 32 elements as float32: the first and the second 16, or of half-precision ones the even and the
// odd ones, which lie in the halves of 16 words and so need not be moved between the lanes.
template <Element kElement>
GENREP_FAST_INLINE void load_pair(const char* source, int64_t i, Floats (&values)[2]) {
  if constexpr (kElement == Element::kFloat) {
    values[0] = load<Floats>(source + 4 * i);
    values[1] = load<Floats>(source + 4 * (i + kLanes));
  } else {
    Words words = load<Words>(source + 2 * i);
    if constexpr (kElement == Element::kBFloat16) {
      values[0] = as<Floats>(words << 16);
      values[1] = as<Floats>(words & 0xffff0000);
    } else {
      values[0] = widen(words & 0xffff, kElement);
      values[1] = widen(words >> 16, kElement);
    }
  }
}

// Stores 32 elements in the order of `load_pair`, rounded to the nearest, ties to even; `streaming`
// does so past the caches, where the address must be a multiple of 16.
template <Element kElement>
GENREP_FAST_INLINE void store_pair(
    char* target, int64_t i, const Floats (&values)[2], bool streaming) {
  auto put = [&](char* place, Floats value) GENREP_FAST_LAMBDA {
    streaming ? stream(reinterpret_cast<float*>(place), value) : store(place, value);
  };
  if constexpr (kElement == Element::kFloat) {
    put(target + 4 * i, values[0]);
    put(target + 4 * (i + kLanes), values[1]);
  } else {
    const Words even = narrow_bits(values[0], kElement), odd = narrow_bits(values[1], kElement);
    if constexpr (kElement == Element::kBFloat16) {
      put(target + 2 * i, as<Floats>(even >> 16 | (odd & 0xffff0000)));
    } else {
      put(target + 2 * i, as<Floats>(even | odd << 16));
    }
  }
}

// Stores the first `count` <= 16 elements.
template <Element kElement>
GENREP_FAST_INLINE void store_rest(char* target, int64_t i, int64_t count, Floats values) {
  if constexpr (kElement == Element::kFloat) {
    std::memcpy(target + 4 * i, &values, 4 * count);
  } else {
    HalfWords words = narrow(values, kElement);
    std::memcpy(target + 2 * i, &words, 2 * count);
  }
}

template <Element kElement>
GENREP_FAST_INLINE void widen_all(const char* source, int64_t count, float* target) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    // GCC widens 32 words with an instruction for each register, but takes 16 apart.
    WordPair pair = __builtin_convertvector(load<HalfWordPair>(source + 2 * i), WordPair);
    Words bits[2];
    std::memcpy(bits, &pair, sizeof(pair));
    store(target + i, widen(bits[0], kElement));
    store(target + i + kLanes, widen(bits[1], kElement));
  }
  for (; i + kLanes <= count; i += kLanes) {
    store(target + i, widen(load<HalfWords>(source + 2 * i), kElement));
  }
  if (i < count) {
    HalfWords rest{};
    std::memcpy(&rest, source + 2 * i, 2 * (count - i));
    Floats values = widen(rest, kElement);
    std::memcpy(target + i, &values, 4 * (count - i));
  }
}

// `count` <= kBlock elements from `index` on as float32: the memory itself, or a copy in `scratch`.
GENREP_FAST_INLINE const float* read(Buffer buffer, int64_t index, int64_t count, float* scratch) {
  const char* source = buffer.at(index);
  if (buffer.element == Element::kFloat) {
    return reinterpret_cast<const float*>(source);
  }
  if (buffer.element == Element::kBFloat16) {
    widen_all<Element::kBFloat16>(source, count, scratch);
  } else {
    widen_all<Element::kHalf>(source, count, scratch);
  }
  return scratch;
}

template <Element kElement>
GENREP_FAST_INLINE void narrow_all(char* target, int64_t count, const float* source) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(target + 2 * i, narrow(load<Floats>(source + i), kElement));
  }
  if (i < count) {
    Floats rest{};
    std::memcpy(&rest, source + i, 4 * (count - i));
    store_rest<kElement>(target, i, count - i, rest);
  }
}

// Rounds `count` elements to the nearest bfloat16 or float16, ties to even, and stores them from
// `index` on.
GENREP_FAST_INLINE void write(Buffer buffer, int64_t index, int64_t count, const float* source) {
  if (buffer.element == Element::kBFloat16) {
    narrow_all<Element::kBFloat16>(buffer.at(index), count, source);
  } else {
    narrow_all<Element::kHalf>(buffer.at(index), count, source);
  }
}

// Calls function(std::integral_constant<Element, element>).
template <typename Function>
GENREP_FAST_INLINE auto with_element(Element element, const Function& function) {
  switch (element) {
    case Element::kBFloat16:
      return function(std::integral_constant<Element, Element::kBFloat16>{});
    case Element::kHalf:
      return function(std::integral_constant<Element, Element::kHalf>{});
    default:
      return function(std::integral_constant<Element, Element::kFloat>{});
  }
}

}  // namespace genrep_fast
