// Residuals of scored steps, and what they add up to: the log-likelihood of a step.
#pragma once

#include "../arithmetic.h"
#include "rows.h"
#include "vector_math.h"

namespace genrep_fast {

constexpr int64_t kParallelElements = 32768;  // a thread's least share
constexpr int64_t kTasks = 32;  // that the steps of few images and classes are cut into
// Rows that are read together: memory delivers a fourth more to four streams than to one, and again
// a fifth more where each goes on to the row that lies behind its last one.
constexpr int64_t kRows = 4;
// Of so many half-precision rows an image the faster reading pays for a copy of the image.
constexpr int64_t kPairedRows = 32;

// Whether images share the outputs, and x_t.
inline bool shares_centers(const ScoredChunk& chunk) {
  return !chunk.per_location && chunk.batch > 1 && chunk.output.batch == 0 &&
         (!chunk.noisy.data || chunk.noisy.batch == 0);
}

struct __attribute__((visibility("hidden"))) Problem {
  ScoredChunk chunk;
  std::vector<float> floats;  // x, where it is not float32 memory in the order of the elements
  const float* x;
  int64_t x_stride;
  Source output, noisy;  // noisy.buffer.data is null where there is none
  // Half-precision outputs, and x_t, are read as they lie in memory, 32 at a time, the even ones
  // apart from the odd ones (see load_pair); `floats` is in that order, up to the last elements.
  bool paired;
  bool in_place;  // no block of a row is copied

  explicit Problem(ScoredChunk arguments);

  const float* image(int64_t b) const { return x + b * x_stride; }
  int64_t groups(int64_t tasks, int64_t most) const {
    return std::max<int64_t>(1, std::min(ceil_div(kTasks, std::max<int64_t>(tasks, 1)), most));
  }

 private:
  void copy_images(const Source& images);
};

inline Problem::Problem(ScoredChunk arguments) : chunk(std::move(arguments)) {
  output = source_of(chunk.output, chunk.outer_size, chunk.inner_size);
  if (chunk.noisy.data) {
    noisy = source_of(chunk.noisy, chunk.outer_size, chunk.inner_size);
  }
  const bool as_it_lies =
      output.flat &&
      (!noisy.buffer.data || (noisy.flat && noisy.buffer.element == output.buffer.element));
  const bool half = output.buffer.element != Element::kFloat;
  Source images = source_of(chunk.x, chunk.outer_size, chunk.inner_size);
  const bool is_copied = !images.flat || images.buffer.element != Element::kFloat;
  const bool pays = is_copied || chunk.classes * chunk.steps >= kPairedRows;
  paired = as_it_lies && half && pays && !chunk.per_location && !shares_centers(chunk);
  in_place = as_it_lies && (paired || !half);
  x = reinterpret_cast<const float*>(images.buffer.data);
  x_stride = chunk.x.batch;
  if (paired || is_copied) {
    copy_images(images);
  }
}

// x, o and x_t of a block of a row, and what they are multiplied with.
struct Residual {
  const float* x;
  const char* output;  // as it lies in memory, or gathered
  const char* noisy;   // of the output's element; null where there is none
  Element element;     // half precision where the problem is paired
  float data_factor, output_factor, noisy_factor;

  // Of 16 elements.
  template <Element kElement, bool kNoisy>
  GENREP_FAST_INLINE Floats at(int64_t i) const {
    Floats r = load<Floats>(x + i) * data_factor + load_as<kElement>(output, i) * output_factor;
    return kNoisy ? r + load_as<kElement>(noisy, i) * noisy_factor : r;
  }

  // Of 32 elements, in the order of load_pair.
  template <Element kElement, bool kNoisy>
  GENREP_FAST_INLINE void pair_at(int64_t i, Floats (&r)[2]) const {
    Floats outputs[2], noise[2];
    load_pair<kElement>(output, i, outputs);
    if (kNoisy) {
      load_pair<kElement>(noisy, i, noise);
    }
#pragma GCC unroll 2
    for (int64_t u = 0; u < 2; ++u) {
      r[u] = load<Floats>(x + i + u * kLanes) * data_factor + outputs[u] * output_factor;
      if (kNoisy) {
        r[u] += noise[u] * noisy_factor;
      }
    }
  }

  // Of the last `count` < 16 elements.
  template <Element kElement, bool kNoisy>
  GENREP_FAST_INLINE Floats rest(int64_t i, int64_t count) const {
    constexpr int64_t kBytes = kElement == Element::kFloat ? 4 : 2;
    Floats parts[3]{};
    std::memcpy(&parts[0], x + i, 4 * count);
    std::memcpy(&parts[1], output + kBytes * i, kBytes * count);
    if (kNoisy) {
      std::memcpy(&parts[2], noisy + kBytes * i, kBytes * count);
    }
    auto part = [&](int index) GENREP_FAST_LAMBDA {
      return load_as<kElement>(reinterpret_cast<const char*>(&parts[index]), 0);
    };
    Floats r = parts[0] * data_factor + part(1) * output_factor;
    return kNoisy ? r + part(2) * noisy_factor : r;
  }
};

// Calls work(element, noisy), two constants, with which the residual's `at` and `rest` are called.
template <typename Work>
GENREP_FAST_INLINE void with_layout(const Residual& block, const Work& work) {
  with_element(block.element, [&](auto element) GENREP_FAST_LAMBDA {
    if (block.noisy) {
      work(element, std::true_type{});
    } else {
      work(element, std::false_type{});
    }
  });
}

struct Scratch {
  alignas(64) float output[kBlock], noisy[kBlock];
};

// An image, class and step.
struct Row {
  int64_t b, k, s;
};

// Reads `count` elements from `begin` on, at most kBlock if they are not all read in place.
GENREP_FAST_INLINE Residual
residual(const Problem& problem, const Row& row, int64_t begin, int64_t count, Scratch& scratch) {
  const ScoredChunk& chunk = problem.chunk;
  const auto [b, k, s] = row;
  const int64_t inner = chunk.inner_size;
  Residual result;
  result.x = problem.image(b) + begin;
  result.element = problem.paired ? problem.output.buffer.element : Element::kFloat;
  auto read = [&](const Source& source, float* copy) GENREP_FAST_LAMBDA {
    const int64_t offset = source.offset(b, k, s);
    if (problem.paired) {
      return static_cast<const char*>(source.buffer.at(offset + begin));
    }
    return reinterpret_cast<const char*>(read_row(source, offset, inner, begin, count, copy));
  };
  result.output = read(problem.output, scratch.output);
  result.noisy = problem.noisy.buffer.data ? read(problem.noisy, scratch.noisy) : nullptr;
  result.data_factor = chunk.data_table[s];
  result.output_factor = chunk.output_table[s];
  result.noisy_factor = chunk.noisy_table[s];
  return result;
}

// Memory of so many float32 numbers is asked for ahead of the use of half-precision rows, in the
// next row where there is one behind: they are so short that the processor foresees too little.
constexpr int64_t kAhead = 1024;

// Sums of squares of kRows rows, in float32 over kBlock elements and in float64 above.
template <Element kElement, bool kNoisy>
GENREP_FAST_INLINE void add_squares(
    const Residual (&blocks)[kRows], int64_t count, double (&sums)[kRows]) {
  constexpr int64_t kUnroll = 4;
  Doubles totals[kRows]{};
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    Floats partial[kRows][kUnroll]{};
    int64_t i = begin;
    for (; i + kUnroll * kLanes <= end; i += kUnroll * kLanes) {
#pragma GCC unroll 4
      for (int64_t row = 0; row < kRows; ++row) {
        if constexpr (kElement != Element::kFloat) {
          prefetch_to_second_level(blocks[row].output + 2 * i, kAhead);
          prefetch_to_second_level(blocks[row].output + 2 * (i + 2 * kLanes), kAhead);
        }
#pragma GCC unroll 2
        for (int64_t u = 0; u < kUnroll; u += 2) {
          Floats r[2];
          blocks[row].pair_at<kElement, kNoisy>(i + u * kLanes, r);
          partial[row][u] += r[0] * r[0];
          partial[row][u + 1] += r[1] * r[1];
        }
      }
    }
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      for (int64_t row = 0; row < kRows; ++row) {
        Floats r[2];
        blocks[row].pair_at<kElement, kNoisy>(i, r);
        partial[row][0] += r[0] * r[0];
        partial[row][0] += r[1] * r[1];
      }
    }
    for (; i < end; i += kLanes) {
      for (int64_t row = 0; row < kRows; ++row) {
        Floats r = end - i < kLanes ? blocks[row].rest<kElement, kNoisy>(i, end - i)
                                    : blocks[row].at<kElement, kNoisy>(i);
        partial[row][0] += r * r;
      }
    }
    for (int64_t row = 0; row < kRows; ++row) {
      Floats sum = (partial[row][0] + partial[row][1]) + (partial[row][2] + partial[row][3]);
      HalfFloats halves[2];
      std::memcpy(halves, &sum, sizeof(sum));
      totals[row] +=
          __builtin_convertvector(halves[0], Doubles) + __builtin_convertvector(halves[1], Doubles);
    }
  }
  for (int64_t row = 0; row < kRows; ++row) {
    sums[row] += horizontal_sum(totals[row]);
  }
}

// l of kRows rows, some of which may be the same one. The same bits in forward and backward:
// backward's weights then add up to 1.
GENREP_FAST_INLINE void step_log_likelihoods(
    const Problem& problem, const Row (&rows)[kRows], double* l) {
  const ScoredChunk& chunk = problem.chunk;
  const int64_t elements = chunk.elements();
  const int64_t block = problem.in_place ? elements : kBlock;
  Scratch scratch[kRows];
  Residual blocks[kRows];
  double sums[kRows]{};
  for (int64_t begin = 0; begin < elements; begin += block) {
    int64_t count = std::min(block, elements - begin);
    for (int64_t q = 0; q < kRows; ++q) {
      blocks[q] = residual(problem, rows[q], begin, count, scratch[q]);
    }
    with_layout(blocks[0], [&](auto element, auto has_noisy) GENREP_FAST_LAMBDA {
      add_squares<decltype(element)::value, decltype(has_noisy)::value>(blocks, count, sums);
    });
  }
  for (int64_t q = 0; q < kRows; ++q) {
    int64_t s = rows[q].s;
    l[q] = -0.5 * static_cast<double>(chunk.inv_var[s]) * sums[q] +
           static_cast<double>(chunk.log_norm[s]) * static_cast<double>(elements);
  }
}

// Calls work(i) for every i below `tasks`, each of which takes about `elements` elements.
template <typename Work>
void parallel(int64_t tasks, int64_t elements, const Work& work) {
  int64_t grain = std::max<int64_t>(1, kParallelElements / std::max<int64_t>(elements, 1));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      work(task);
    }
  });
}

// A K S-th of the outputs: less work than converting it again for every row.
inline void Problem::copy_images(const Source& images) {
  floats.resize(chunk.batch * chunk.elements());
  x = floats.data();
  x_stride = chunk.elements();
  parallel(chunk.batch, chunk.elements(), [&](int64_t b) {
    float scratch[kBlock];
    for (int64_t begin = 0; begin < chunk.elements(); begin += kBlock) {
      const int64_t count = std::min(kBlock, chunk.elements() - begin);
      const float* block =
          read_row(images, images.offset(b, 0, 0), chunk.inner_size, begin, count, scratch);
      float* target = floats.data() + b * x_stride + begin;
      int64_t i = 0;
      for (; paired && i + 2 * kLanes <= count; i += 2 * kLanes) {
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          target[i + lane] = block[i + 2 * lane];
          target[i + kLanes + lane] = block[i + 2 * lane + 1];
        }
      }
      std::copy(block + i, block + count, target + i);
    }
  });
}

// First step of group `group` of `groups`.
inline int64_t first_step(int64_t steps, int64_t groups, int64_t group) {
  return steps * group / groups;
}

inline int64_t kept_locations(const ScoredChunk& chunk) {
  return chunk.per_location ? chunk.locations : 1;
}

}  // namespace genrep_fast
