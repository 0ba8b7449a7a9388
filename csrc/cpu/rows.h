// Rows of elements, one for each image, class and step, in whatever memory format.
#pragma once

#include "../scoring.h"
#include "elements.h"

namespace genrep_fast {

struct Source {
  Buffer buffer;
  View strides;
  bool flat = false;

  int64_t offset(int64_t b, int64_t k, int64_t s) const {
    return b * strides.batch + k * strides.classes + s * strides.steps;
  }
};

inline Source source_of(const View& view, int64_t outer_size, int64_t inner_size) {
  return {
      {static_cast<char*>(view.data), element_of(view.type)},
      view,
      view.is_flat(outer_size, inner_size)};
}

template <typename Word>
GENREP_FAST_INLINE void gather(
    const Word* source, const View& strides, int64_t inner_size, int64_t begin, int64_t count,
    Word* target) {
  int64_t outer = begin / inner_size, inner = begin % inner_size;
  while (count > 0) {
    int64_t run = std::min(inner_size - inner, count);
    const Word* from = source + outer * strides.outer + inner * strides.inner;
    for (int64_t i = 0; i < run; ++i) {
      target[i] = from[i * strides.inner];
    }
    target += run;
    count -= run;
    inner = 0;
    ++outer;
  }
}

// `count` <= kBlock elements of a row from `begin` on as float32: the memory itself, or a copy in
// `scratch`.
GENREP_FAST_INLINE const float* read_row(
    const Source& source, int64_t offset, int64_t inner_size, int64_t begin, int64_t count,
    float* scratch) {
  if (source.flat) {
    return read(source.buffer, offset + begin, count, scratch);
  }
  const char* row = source.buffer.at(offset);
  if (source.buffer.element == Element::kFloat) {
    gather(reinterpret_cast<const float*>(row), source.strides, inner_size, begin, count, scratch);
    return scratch;
  }
  alignas(64) uint16_t words[kBlock];
  gather(reinterpret_cast<const uint16_t*>(row), source.strides, inner_size, begin, count, words);
  return read({reinterpret_cast<char*>(words), source.buffer.element}, 0, count, scratch);
}

}  // namespace genrep_fast
