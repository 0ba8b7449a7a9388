// Scoring: log-likelihoods of images under every class, posteriors, the distillation loss (see genrep_fast/reference/scoring.py).
//
//     r = a_s x + b_s x_t + c_s o                       residual of a row, i.e. of one image, class and step, element by element
//     l = -1/2 v_s sum r^2 + D n_s,   L = logsumexp_s l - log S  or the mean of l
//
// Forward reads the denoiser's outputs o once, B K S D elements, at 3 multiply-adds an element: bound by memory. Backward reads them once and
// writes as much: a row is read a second time while it is still in the caches, because its weight exp(l - logsumexp) needs the whole row.
// Centres that images share, K S D elements, are read once for 64 images and bound by arithmetic, 2 multiply-adds for each pair: four images
// and four steps at a time, differences of which stay in registers.
//
// Squares are summed in float32, at most 32 to an accumulator, then in float64. The state of an image and class is a running maximum,
// sum of weights and sum of squared weights, or mean and sum of squared deviations; the steps are cut into groups by the sizes alone and
// merged in their order, so that no result depends on the number of threads.
#include <cmath>
#include <tuple>

#include "rows.h"
#include "vector_math.h"

namespace genrep_fast {
namespace {

constexpr int64_t kSteps = 128;                           // of a row's states that are merged at once
constexpr int64_t kParallelElements = 32768;              // a thread's least share
constexpr int64_t kTasks = 32;                            // that the steps of few images and classes are cut into
constexpr int64_t kTileImages = 64, kTileSteps = 16, kTileBlock = 512;
constexpr int64_t kTogether = 4;                          // steps that are added to the states of locations together
constexpr int64_t kChannels = 4;                          // whose squares at a location are added up together
constexpr int64_t kStreamingBytes = int64_t{1} << 20;     // of gradients; smaller ones are better left in the caches
constexpr int64_t kPrefetch = 2048;                       // elements that are asked for ahead of their use
constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- residuals ----

struct __attribute__((visibility("hidden"))) Problem {
  ScoredChunk chunk;
  std::vector<float> floats;  // x, where it is not float32 memory in the order of the elements
  const float* x;
  int64_t x_stride;
  Source output, noisy;  // noisy.buffer.data is null where there is none

  explicit Problem(ScoredChunk arguments);

  const float* image(int64_t b) const { return x + b * x_stride; }
  int64_t groups(int64_t tasks, int64_t most) const {
    return std::max<int64_t>(1, std::min(ceil_div(kTasks, std::max<int64_t>(tasks, 1)), most));
  }
};

Problem::Problem(ScoredChunk arguments) : chunk(std::move(arguments)) {
  output = source_of(chunk.output, chunk.outer_size, chunk.inner_size);
  if (chunk.noisy.data) {
    noisy = source_of(chunk.noisy, chunk.outer_size, chunk.inner_size);
  }
  Source images = source_of(chunk.x, chunk.outer_size, chunk.inner_size);
  x = reinterpret_cast<const float*>(images.buffer.data);
  x_stride = chunk.x.batch;
  if (!images.flat || images.buffer.element != Element::kFloat) {
    // A K S-th of the outputs: less work than converting it again for every row.
    floats.resize(chunk.batch * chunk.elements());
    x = floats.data();
    x_stride = chunk.elements();
    float scratch[kBlock];
    for (int64_t b = 0; b < chunk.batch; ++b) {
      for (int64_t begin = 0; begin < chunk.elements(); begin += kBlock) {
        int64_t count = std::min(kBlock, chunk.elements() - begin);
        const float* block = read_row(images, images.offset(b, 0, 0), chunk.inner_size, begin, count, scratch);
        std::copy_n(block, count, floats.data() + b * x_stride + begin);
      }
    }
  }
}

// x, o and x_t of a block of a row, and what they are multiplied with.
struct Residual {
  const float* x;
  const char* output;  // as it lies in memory, or gathered
  Element element;     // of output
  const float* noisy;  // null where there is none
  float data_factor, output_factor, noisy_factor;

  template <Element kElement, bool kNoisy>
  GENREP_FAST_INLINE Floats at(int64_t i) const {
    Floats r = load<Floats>(x + i) * data_factor + load_as<kElement>(output, i) * output_factor;
    return kNoisy ? r + load<Floats>(noisy + i) * noisy_factor : r;
  }

  // Of the last `count` < 16 elements.
  template <Element kElement, bool kNoisy>
  GENREP_FAST_INLINE Floats rest(int64_t i, int64_t count) const {
    constexpr int64_t kBytes = kElement == Element::kFloat ? 4 : 2;
    Floats parts[3]{};
    std::memcpy(&parts[0], x + i, 4 * count);
    std::memcpy(&parts[1], output + kBytes * i, kBytes * count);
    if (kNoisy) {
      std::memcpy(&parts[2], noisy + i, 4 * count);
    }
    Floats r = parts[0] * data_factor + load_as<kElement>(reinterpret_cast<const char*>(&parts[1]), 0) * output_factor;
    return kNoisy ? r + parts[2] * noisy_factor : r;
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

// Reads `count` <= kBlock elements from `begin` on.
GENREP_FAST_INLINE Residual residual(
    const Problem& problem, int64_t b, int64_t k, int64_t s, int64_t begin, int64_t count, Scratch& scratch) {
  const ScoredChunk& chunk = problem.chunk;
  const int64_t inner = chunk.inner_size;
  Residual result;
  result.x = problem.image(b) + begin;
  const int64_t output = problem.output.offset(b, k, s);
  if (problem.output.flat) {
    result.output = problem.output.buffer.at(output + begin);
    result.element = problem.output.buffer.element;
  } else {
    result.output = reinterpret_cast<const char*>(read_row(problem.output, output, inner, begin, count, scratch.output));
    result.element = Element::kFloat;
  }
  result.noisy = nullptr;
  if (problem.noisy.buffer.data) {
    result.noisy = read_row(problem.noisy, problem.noisy.offset(b, k, s), inner, begin, count, scratch.noisy);
  }
  result.data_factor = chunk.data_table[s];
  result.output_factor = chunk.output_table[s];
  result.noisy_factor = chunk.noisy_table[s];
  return result;
}

template <Element kElement, bool kNoisy>
GENREP_FAST_INLINE float sum_of_squares(const Residual& block, int64_t count) {
  constexpr int kUnroll = 4;
  Floats sums[kUnroll]{};
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= count; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) {
      if (kElement == Element::kFloat || u % 2 == 0) {  // once a line
        prefetch(block.output + (kElement == Element::kFloat ? 4 : 2) * (i + u * kLanes), kPrefetch);
      }
      Floats r = block.at<kElement, kNoisy>(i + u * kLanes);
      sums[u] += r * r;
    }
  }
  for (; i + kLanes <= count; i += kLanes) {
    Floats r = block.at<kElement, kNoisy>(i);
    sums[0] += r * r;
  }
  if (i < count) {
    Floats r = block.rest<kElement, kNoisy>(i, count - i);
    sums[1] += r * r;
  }
  return horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// l of one image, class and step. The same bits in forward and backward: backward's weights then add up to 1.
GENREP_FAST_INLINE double step_log_likelihood(const Problem& problem, int64_t b, int64_t k, int64_t s) {
  const ScoredChunk& chunk = problem.chunk;
  const int64_t elements = chunk.elements();
  Scratch scratch;
  double sum = 0;
  for (int64_t begin = 0; begin < elements; begin += kBlock) {
    int64_t count = std::min(kBlock, elements - begin);
    Residual block = residual(problem, b, k, s, begin, count, scratch);
    with_layout(block, [&](auto element, auto has_noisy) GENREP_FAST_LAMBDA {
      sum += sum_of_squares<decltype(element)::value, decltype(has_noisy)::value>(block, count);
    });
  }
  return -0.5 * static_cast<double>(chunk.inv_var[s]) * sum + static_cast<double>(chunk.log_norm[s]) * static_cast<double>(elements);
}

// ---- states ----

// Of some steps of one image and class: maximum, sum of w and of w^2 with w = exp(l - maximum); or mean and sum of squared deviations.
struct State {
  double level = 0, sum = 0, squares = 0;
  int64_t count = 0;
};

double finite(double maximum) { return maximum == kMinusInfinity ? 0.0 : maximum; }

State merge(const State& a, const State& b, bool mixture) {
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
    double n = static_cast<double>(a.count), m = static_cast<double>(b.count), difference = b.level - a.level;
    merged.level = std::isfinite(difference) ? a.level + difference * (m / (n + m)) : a.level + b.level;
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

// ---- forward, a likelihood an image ----

GENREP_FAST_INLINE void score_steps_kernel(const Problem& problem, int64_t b, int64_t k, int64_t first, int64_t last, State& state) {
  alignas(64) double l[kSteps];
  for (int64_t begin = first; begin < last; begin += kSteps) {
    int64_t count = std::min(kSteps, last - begin);
    for (int64_t i = 0; i < count; ++i) {
      l[i] = step_log_likelihood(problem, b, k, begin + i);
    }
    bool mixture = problem.chunk.mixture;
    state = merge(state, mixture ? mixture_state(l, count) : mean_state(l, count), mixture);
  }
}

GENREP_FAST_CLONES(
    score_steps, (const Problem& problem, int64_t b, int64_t k, int64_t first, int64_t last, State& state), score_steps_kernel,
    (problem, b, k, first, last, state))

using TileSums = Doubles[2];  // of four images times four steps

// Lane i of the result is the sum of vectors[i].
GENREP_FAST_INLINE Floats sums_of(Floats (&vectors)[16]) {
  constexpr Words kLow[4] = {
      {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
      {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27},
      {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29},
      {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}};
#pragma GCC unroll 4
  for (int stage = 0; stage < 4; ++stage) {
    const uint32_t step = 8 >> stage;
#pragma GCC unroll 8
    for (int i = 0; i < 8 >> stage; ++i) {
      Floats a = vectors[2 * i], b = vectors[2 * i + 1];
      vectors[i] = __builtin_shuffle(a, b, kLow[stage]) + __builtin_shuffle(a, b, kLow[stage] + step);
    }
  }
  return vectors[0];
}

// Adds the squared residuals of four images x and four steps, whose other terms are y; `count` is a multiple of 16.
GENREP_FAST_INLINE void add_tile(
    const float* const (&x)[4], const float (*y)[kTileBlock], const float* data_factors, int64_t count, TileSums& sums) {
  Floats totals[16]{};
  Floats factors[4];
  for (int j = 0; j < 4; ++j) {
    factors[j] = broadcast(data_factors[j]);
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats rest[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      rest[j] = load<Floats>(y[j] + i);
    }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      Floats image = load<Floats>(x[q] + i);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Floats r = image * factors[j] + rest[j];
        totals[4 * q + j] += r * r;
      }
    }
  }
  Floats result = sums_of(totals);
  HalfFloats halves[2];
  std::memcpy(halves, &result, sizeof(result));
  sums[0] += __builtin_convertvector(halves[0], Doubles);
  sums[1] += __builtin_convertvector(halves[1], Doubles);
}

// What the steps from `first` on have besides a x: c o + b x_t, with zeros up to a multiple of 16.
GENREP_FAST_INLINE void read_centers(
    const Problem& problem, int64_t k, int64_t first, int64_t steps, int64_t begin, int64_t count, float (*y)[kTileBlock]) {
  const ScoredChunk& chunk = problem.chunk;
  Scratch scratch;
  for (int64_t j = 0; j < steps; ++j) {
    int64_t s = first + j;
    const float* output = read_row(problem.output, problem.output.offset(0, k, s), chunk.inner_size, begin, count, scratch.output);
    const float* noisy = nullptr;
    if (problem.noisy.buffer.data) {
      noisy = read_row(problem.noisy, problem.noisy.offset(0, k, s), chunk.inner_size, begin, count, scratch.noisy);
    }
    float output_factor = chunk.output_table[s], noisy_factor = chunk.noisy_table[s];
    for (int64_t i = 0; i < count; ++i) {
      y[j][i] = output_factor * output[i];
    }
    for (int64_t i = 0; noisy && i < count; ++i) {
      y[j][i] += noisy_factor * noisy[i];
    }
    std::fill(y[j] + count, y[j] + (count + kLanes - 1) / kLanes * kLanes, 0.0f);
  }
}

// Asks for the block of a center that comes after the one from `begin` on: of the same step, or of the next tile of steps.
GENREP_FAST_INLINE void prefetch_center(const Problem& problem, int64_t k, int64_t s, int64_t begin) {
  bool ends = begin + kTileBlock >= problem.chunk.elements();
  s += ends ? kTileSteps : 0;
  if (!problem.output.flat || s >= problem.chunk.steps) {
    return;
  }
  const char* block = problem.output.buffer.at(problem.output.offset(0, k, s) + (ends ? 0 : begin + kTileBlock));
  const int64_t bytes = problem.output.buffer.element == Element::kFloat ? 4 * kTileBlock : 2 * kTileBlock;
  for (int64_t line = 0; line < bytes; line += 64) {
    __builtin_prefetch(block + line, 0, 2);
  }
}

// Images that end within a vector are copied a block at a time.
struct Tile {
  alignas(64) float y[kTileSteps][kTileBlock] = {};
  alignas(64) float x[kTileImages][kTileBlock];
  alignas(64) TileSums sums[kTileImages / 4][kTileSteps / 4];
  alignas(64) double l[kTileImages][kSteps];
};

GENREP_FAST_INLINE void score_tile_block(
    const Problem& problem, int64_t first_image, int64_t images, int64_t k, int64_t first, int64_t begin, int64_t count, Tile& tile) {
  const ScoredChunk& chunk = problem.chunk;
  const int64_t quads = ceil_div(images, 4);
  float data_factors[kTileSteps]{};
  for (int64_t j = 0; j < std::min(kTileSteps, chunk.steps - first); ++j) {
    data_factors[j] = chunk.data_table[first + j];
  }
  int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = 0; i < images; i += 4) {
    for (int64_t j = i / 4; j < kTileSteps; j += quads) {
      prefetch_center(problem, k, first + j, begin);
    }
    const float* x[4];
    for (int64_t q = 0; q < 4; ++q) {
      int64_t image = std::min(i + q, images - 1);
      x[q] = problem.image(first_image + image) + begin;
      if (padded != count) {
        std::copy_n(x[q], count, tile.x[image]);
        std::fill(tile.x[image] + count, tile.x[image] + padded, 0.0f);
        x[q] = tile.x[image];
      }
    }
    for (int64_t j = 0; j < kTileSteps; j += 4) {
      add_tile(x, tile.y + j, data_factors + j, padded, tile.sums[i / 4][j / 4]);
    }
  }
}

// l of the tile's images at `steps` <= kTileSteps steps from `first` on, into columns `column` on.
GENREP_FAST_INLINE void score_tile_steps(
    const Problem& problem, int64_t first_image, int64_t images, int64_t k, int64_t first, int64_t steps, int64_t column, Tile& tile) {
  const ScoredChunk& chunk = problem.chunk;
  const int64_t elements = chunk.elements();
  std::memset(tile.sums, 0, sizeof(tile.sums));
  for (int64_t begin = 0; begin < elements; begin += kTileBlock) {
    int64_t count = std::min(kTileBlock, elements - begin);
    read_centers(problem, k, first, steps, begin, count, tile.y);
    score_tile_block(problem, first_image, images, k, first, begin, count, tile);
  }
  alignas(64) double factors[kTileSteps]{}, shifts[kTileSteps]{};
  for (int64_t j = 0; j < steps; ++j) {
    factors[j] = -0.5 * static_cast<double>(chunk.inv_var[first + j]);
    shifts[j] = static_cast<double>(chunk.log_norm[first + j]) * static_cast<double>(elements);
  }
  for (int64_t i = 0; i < images; ++i) {
    for (int64_t j = 0; j < kTileSteps; ++j) {  // lane 4 q + r of a tile's sums belongs to image q and step r
      double sum = reinterpret_cast<const double*>(tile.sums[i / 4][j / 4])[i % 4 * 4 + j % 4];
      tile.l[i][column + j] = sum * factors[j] + shifts[j];
    }
  }
}

GENREP_FAST_INLINE void score_tile_kernel(
    const Problem& problem, int64_t first_image, int64_t images, int64_t k, int64_t first, int64_t last, State* states, Tile& tile) {
  for (int64_t begin = first; begin < last; begin += kSteps) {
    int64_t count = std::min(kSteps, last - begin);
    for (int64_t column = 0; column < count; column += kTileSteps) {
      score_tile_steps(problem, first_image, images, k, begin + column, std::min(kTileSteps, count - column), column, tile);
    }
    for (int64_t i = 0; i < images; ++i) {
      bool mixture = problem.chunk.mixture;
      states[i] = merge(states[i], mixture ? mixture_state(tile.l[i], count) : mean_state(tile.l[i], count), mixture);
    }
  }
}

GENREP_FAST_CLONES(
    score_tile,
    (const Problem& problem, int64_t first_image, int64_t images, int64_t k, int64_t first, int64_t last, State* states, Tile& tile),
    score_tile_kernel, (problem, first_image, images, k, first, last, states, tile))

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

// Centres are shared by the images.
bool is_tiled(const ScoredChunk& chunk) {
  return !chunk.per_location && chunk.batch > 1 && chunk.output.batch == 0 && (!chunk.noisy.data || chunk.noisy.batch == 0);
}

// First step of group `group` of `groups`.
int64_t first_step(int64_t steps, int64_t groups, int64_t group) { return steps * group / groups; }

std::vector<State> row_states(const Problem& problem) {
  const ScoredChunk& chunk = problem.chunk;
  const int64_t pairs = chunk.batch * chunk.classes, groups = problem.groups(pairs, chunk.steps);
  std::vector<State> states(pairs * groups);
  parallel(pairs * groups, chunk.steps / groups * chunk.elements(), [&](int64_t task) {
    int64_t pair = task / groups, group = task % groups;
    int64_t first = first_step(chunk.steps, groups, group), last = first_step(chunk.steps, groups, group + 1);
    score_steps(problem, pair / chunk.classes, pair % chunk.classes, first, last, states[task]);
  });
  for (int64_t pair = 0; pair < pairs; ++pair) {
    State merged;
    for (int64_t group = 0; group < groups; ++group) {
      merged = merge(merged, states[pair * groups + group], chunk.mixture);
    }
    states[pair] = merged;
  }
  states.resize(pairs);
  return states;
}

std::vector<State> tile_states(const Problem& problem) {
  const ScoredChunk& chunk = problem.chunk;
  const int64_t tiles = ceil_div(chunk.batch, kTileImages);
  const int64_t groups = problem.groups(tiles * chunk.classes, ceil_div(chunk.steps, kSteps));
  std::vector<State> states(chunk.classes * groups * chunk.batch);  // [K, groups, B]
  torch::stable::parallel_for(0, chunk.classes * groups * tiles, 1, [&](int64_t begin, int64_t end) {
    Tile tile;
    for (int64_t task = begin; task < end; ++task) {
      int64_t first_image = task % tiles * kTileImages, group = task / tiles % groups, k = task / tiles / groups;
      int64_t first = first_step(chunk.steps, groups, group), last = first_step(chunk.steps, groups, group + 1);
      State* target = &states[(k * groups + group) * chunk.batch + first_image];
      score_tile(problem, first_image, std::min(kTileImages, chunk.batch - first_image), k, first, last, target, tile);
    }
  });
  std::vector<State> merged(chunk.batch * chunk.classes);
  for (int64_t pair = 0; pair < chunk.batch * chunk.classes; ++pair) {
    for (int64_t group = 0; group < groups; ++group) {
      const State& state = states[(pair % chunk.classes * groups + group) * chunk.batch + pair / chunk.classes];
      merged[pair] = merge(merged[pair], state, chunk.mixture);
    }
  }
  return merged;
}

// [B, K]
std::vector<State> image_states(const Problem& problem) { return is_tiled(problem.chunk) ? tile_states(problem) : row_states(problem); }

// ---- forward, a likelihood a location ----

// States of a block of locations of one image and class.
struct LocationStates {
  alignas(64) float maximum[kBlock];                // "mixture"
  alignas(64) double sum[kBlock], squares[kBlock];  // of weights and their squares, or mean and sum of squared deviations
};

// Adds the squared residuals of `channels` <= kChannels channels to `sums`.
template <Element kElement, bool kNoisy>
GENREP_FAST_INLINE void add_channels(const Residual* blocks, int64_t channels, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats sum = load<Floats>(sums + i);
    for (int64_t c = 0; c < channels; ++c) {
      prefetch(blocks[c].output + (kElement == Element::kFloat ? 4 : 2) * i, kPrefetch);
      Floats r = count - i < kLanes ? blocks[c].rest<kElement, kNoisy>(i, count - i) : blocks[c].at<kElement, kNoisy>(i);
      sum += r * r;
    }
    store(sums + i, sum);
  }
}

// l of one step at `count` <= kBlock locations; 16 more may be written.
GENREP_FAST_INLINE void location_log_likelihoods(
    const Problem& problem, int64_t b, int64_t k, int64_t s, int64_t begin, int64_t count, float* l) {
  const ScoredChunk& chunk = problem.chunk;
  Scratch scratch[kChannels];
  Residual blocks[kChannels];
  std::fill_n(l, ceil_div(count, kLanes) * kLanes, 0.0f);
  for (int64_t first = 0; first < chunk.channels; first += kChannels) {
    int64_t channels = std::min(kChannels, chunk.channels - first);
    for (int64_t c = 0; c < channels; ++c) {
      blocks[c] = residual(problem, b, k, s, (first + c) * chunk.locations + begin, count, scratch[c]);
    }
    with_layout(blocks[0], [&](auto element, auto has_noisy) GENREP_FAST_LAMBDA {
      constexpr bool kNoisy = decltype(has_noisy)::value;
      if (channels == kChannels) {  // unrolled by the compiler
        add_channels<decltype(element)::value, kNoisy>(blocks, kChannels, count, l);
      } else {
        add_channels<decltype(element)::value, kNoisy>(blocks, channels, count, l);
      }
    });
  }
  Floats factor = broadcast(-0.5f * chunk.inv_var[s]), shift = broadcast(chunk.log_norm[s] * static_cast<float>(chunk.channels));
  for (int64_t i = 0; i < count; i += kLanes) {
    store(l + i, load<Floats>(l + i) * factor + shift);
  }
}

// sums = sums * scale + values
GENREP_FAST_INLINE void rescale_and_add(double* sums, Floats scale, Floats values) {
  HalfFloats scales[2], added[2];
  std::memcpy(scales, &scale, sizeof(scale));
  std::memcpy(added, &values, sizeof(values));
  for (int half = 0; half < 2; ++half) {
    Doubles old = load<Doubles>(sums + 8 * half);
    store(sums + 8 * half, old * __builtin_convertvector(scales[half], Doubles) + __builtin_convertvector(added[half], Doubles));
  }
}

// Adds kTogether steps, some of which may be -inf, as if they were not there.
GENREP_FAST_INLINE void add_to_mixture(const float (*l)[kBlock], int64_t count, LocationStates& states) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats values[kTogether], old = load<Floats>(states.maximum + i), maximum = old;
    for (int64_t u = 0; u < kTogether; ++u) {
      values[u] = load<Floats>(l[u] + i);
      maximum = larger(maximum, values[u]);
    }
    Floats level = maximum == -kInfinity ? Floats{} : maximum, scale = exponential(old - level), sum{}, squares{};
    for (int64_t u = 0; u < kTogether; ++u) {
      Floats weight = exponential(values[u] - level);
      sum += weight;
      squares += weight * weight;
    }
    store(states.maximum + i, maximum);
    rescale_and_add(states.sum + i, scale, sum);
    rescale_and_add(states.squares + i, scale * scale, squares);
  }
}

GENREP_FAST_INLINE void add_to_mean(const float* l, int64_t count, int64_t seen, LocationStates& states) {
  double share = 1.0 / static_cast<double>(seen + 1);
  for (int64_t i = 0; i < count; ++i) {
    double difference = l[i] - states.sum[i];
    states.sum[i] += difference - difference == 0 ? difference * share : static_cast<double>(l[i]);  // -inf stays
    states.squares[i] += difference * (l[i] - states.sum[i]);
  }
}

GENREP_FAST_INLINE void score_locations_kernel(
    const Problem& problem, int64_t b, int64_t k, int64_t begin, int64_t count, LocationStates& states) {
  alignas(64) float l[kTogether][kBlock];
  std::fill_n(states.maximum, kBlock, -kInfinity);
  std::fill_n(states.sum, kBlock, 0.0);
  std::fill_n(states.squares, kBlock, 0.0);
  for (int64_t first = 0; first < problem.chunk.steps; first += kTogether) {
    for (int64_t u = 0; u < kTogether; ++u) {
      if (first + u >= problem.chunk.steps) {
        std::fill_n(l[u], kBlock, -kInfinity);
        continue;
      }
      location_log_likelihoods(problem, b, k, first + u, begin, count, l[u]);
      if (!problem.chunk.mixture) {
        add_to_mean(l[u], count, first + u, states);
      }
    }
    if (problem.chunk.mixture) {
      add_to_mixture(l, count, states);
    }
  }
}

GENREP_FAST_CLONES(
    score_locations, (const Problem& problem, int64_t b, int64_t k, int64_t begin, int64_t count, LocationStates& states),
    score_locations_kernel, (problem, b, k, begin, count, states))

// Calls take(pair, first location, State) for every image, class and location, in any order.
template <typename Take>
void for_each_location(const Problem& problem, const Take& take) {
  const ScoredChunk& chunk = problem.chunk;
  const int64_t blocks = ceil_div(chunk.locations, kBlock);
  const int64_t elements = chunk.steps * chunk.channels * std::min(kBlock, chunk.locations);
  parallel(chunk.batch * chunk.classes * blocks, elements, [&](int64_t task) {
    int64_t pair = task / blocks, begin = task % blocks * kBlock, count = std::min(kBlock, chunk.locations - begin);
    LocationStates states;
    score_locations(problem, pair / chunk.classes, pair % chunk.classes, begin, count, states);
    for (int64_t i = 0; i < count; ++i) {
      State state;
      state.count = chunk.steps;
      state.level = chunk.mixture ? states.maximum[i] : states.sum[i];
      state.sum = chunk.mixture ? states.sum[i] : states.squares[i];
      state.squares = chunk.mixture ? states.squares[i] : 0.0;
      take(pair, begin + i, state);
    }
  });
}

// Calls take(pair, location, State) for every likelihood.
template <typename Take>
void for_each_state(const Problem& problem, const Take& take) {
  if (problem.chunk.per_location) {
    return for_each_location(problem, take);
  }
  std::vector<State> states = image_states(problem);
  for (size_t pair = 0; pair < states.size(); ++pair) {
    take(static_cast<int64_t>(pair), int64_t{0}, states[pair]);
  }
}

double log_likelihood_of(const State& state, bool mixture) {
  if (!mixture) {
    return state.level;
  }
  return state.count == 0 ? kMinusInfinity : state.level + std::log(state.sum) - std::log(static_cast<double>(state.count));
}

std::vector<int64_t> likelihood_shape(const Tensor& x, const ScoredChunk& chunk) {
  std::vector<int64_t> shape = {chunk.batch, chunk.classes};
  for (int64_t axis = 2; chunk.per_location && axis < x.dim(); ++axis) {
    shape.push_back(x.size(axis));
  }
  return shape;
}

int64_t kept_locations(const ScoredChunk& chunk) { return chunk.per_location ? chunk.locations : 1; }

std::tuple<Tensor, Tensor> log_likelihood(
    Tensor x, Tensor model_output, std::optional<Tensor> x_t, Tensor data, Tensor noisy, Tensor output, Tensor inv_var, Tensor log_norm,
    std::string reduction, bool per_location) {
  Problem problem(scored_chunk(x, model_output, x_t, data, noisy, output, inv_var, log_norm, reduction, per_location));
  const ScoredChunk& chunk = problem.chunk;
  const std::vector<int64_t> shape = likelihood_shape(x, chunk);
  Tensor result = torch::stable::empty(shape, ScalarType::Float);
  Tensor remainder = torch::stable::empty(chunk.mixture ? shape : std::vector<int64_t>{0}, ScalarType::Float);
  float* results = static_cast<float*>(result.mutable_data_ptr());
  float* remainders = chunk.mixture ? static_cast<float*>(remainder.mutable_data_ptr()) : nullptr;
  const int64_t locations = kept_locations(chunk);
  for_each_state(problem, [&](int64_t pair, int64_t location, const State& state) {
    double exact = log_likelihood_of(state, chunk.mixture);
    float rounded = static_cast<float>(exact);
    results[pair * locations + location] = rounded;
    if (remainders) {
      remainders[pair * locations + location] = std::isinf(rounded) ? 0.0f : static_cast<float>(exact - rounded);
    }
  });
  return {result, remainder};
}

// ---- update of a running state ----

void score_update(
    Tensor x, Tensor model_output, std::optional<Tensor> x_t, Tensor data, Tensor noisy, Tensor output, Tensor inv_var, Tensor log_norm,
    std::optional<Tensor> classes, std::string reduction, bool per_location, Tensor count, Tensor state) {
  Problem problem(scored_chunk(x, model_output, x_t, data, noisy, output, inv_var, log_norm, reduction, per_location));
  const ScoredChunk& chunk = problem.chunk;
  const int64_t num_classes = count.numel(), locations = kept_locations(chunk), rows = chunk.batch * num_classes * locations;
  STD_TORCH_CHECK(count.scalar_type() == ScalarType::Long && count.is_contiguous(), "count must be a contiguous int64 tensor");
  STD_TORCH_CHECK(
      state.scalar_type() == ScalarType::Double && state.is_contiguous() && state.numel() == (chunk.mixture ? 3 : 2) * rows,
      "state must be a contiguous float64 tensor of 3 (mixture) or 2 (mean) times [B, K, ...]");
  std::vector<int64_t> indices(chunk.classes);
  for (int64_t k = 0; k < chunk.classes; ++k) {
    indices[k] = k;
  }
  STD_TORCH_CHECK(classes || chunk.classes == num_classes, "classes must be given where the chunk does not have all of them");
  if (classes) {
    STD_TORCH_CHECK(classes->scalar_type() == ScalarType::Long && classes->numel() == chunk.classes, "classes must be int64, one a class");
    Tensor dense = torch::stable::contiguous(*classes);
    std::copy_n(static_cast<const int64_t*>(dense.const_data_ptr()), chunk.classes, indices.begin());
  }
  for (int64_t k : indices) {
    STD_TORCH_CHECK(0 <= k && k < num_classes, "classes must lie in [0, ", num_classes, "), got ", k);
  }
  int64_t* counts = static_cast<int64_t*>(count.mutable_data_ptr());
  double* levels = static_cast<double*>(state.mutable_data_ptr());
  for_each_state(problem, [&](int64_t pair, int64_t location, const State& added) {
    int64_t k = indices[pair % chunk.classes];
    double* level = levels + (pair / chunk.classes * num_classes + k) * locations + location;
    State old{level[0], level[rows], chunk.mixture ? level[2 * rows] : 0.0, counts[k]};
    State merged = merge(old, added, chunk.mixture);
    level[0] = chunk.mixture && std::isnan(merged.sum) ? merged.sum : merged.level;
    level[rows] = merged.sum;
    if (chunk.mixture) {
      level[2 * rows] = merged.squares;
    }
  });
  for (int64_t k : indices) {
    counts[k] += chunk.steps;
  }
}

// ---- backward ----

// Gradient of one of the operator's inputs, and the table that its part of the residual is multiplied with.
struct Target {
  const float* table;
  Buffer gradient;                  // contiguous [B or 1, K or 1, S or 1, channels, locations]
  int64_t batch, classes, steps;    // of the gradient
  int64_t channels;                 // of the gradient, C or more
};

struct __attribute__((visibility("hidden"))) Backward {
  Problem problem;
  const float *grad, *likelihood, *remainder;  // [B, K, *loc]; the last two for "mixture"
  std::vector<double> recomputed;              // log-likelihoods [B, K] where forward had another order of summation

  // exp(l - logsumexp_s l), or 1/S, times the gradient and -v: what the residual is multiplied with.
  GENREP_FAST_INLINE double scale(int64_t b, int64_t k, int64_t s) const {
    const ScoredChunk& chunk = problem.chunk;
    const int64_t pair = b * chunk.classes + k;
    double weight = 1.0 / static_cast<double>(chunk.steps);
    if (chunk.mixture) {
      if (likelihood[pair] == -kInfinity) {
        return 0;
      }
      double total = recomputed.empty() ? static_cast<double>(likelihood[pair]) + remainder[pair] : recomputed[pair];
      weight *= std::exp(step_log_likelihood(problem, b, k, s) - total);
    }
    return -static_cast<double>(chunk.inv_var[s]) * weight * grad[pair];
  }
};

struct Contribution {
  int64_t b, k, s;
};

// The rows that an element of the target's gradient adds up: `index` below their number, in a fixed order.
struct Owner {
  int64_t b, k, s;                       // place in the gradient
  int64_t batch, classes, steps;         // ranges of the contributions

  int64_t contributions() const { return batch * classes * steps; }

  Contribution at(int64_t index) const {
    return {b + index / steps / classes, k + index / steps % classes, s + index % steps};
  }
};

Owner owner_of(const ScoredChunk& chunk, const Target& target, int64_t row) {
  Owner owner{};
  owner.s = row % target.steps;
  owner.k = row / target.steps % target.classes;
  owner.b = row / target.steps / target.classes;
  owner.batch = target.batch == 1 ? chunk.batch : 1;
  owner.classes = target.classes == 1 ? chunk.classes : 1;
  owner.steps = target.steps == 1 ? chunk.steps : 1;
  return owner;
}

// Writes `count` <= kBlock elements of a gradient's row from `begin` on, in the order of the problem's elements.
GENREP_FAST_INLINE void write_row(
    const ScoredChunk& chunk, Buffer gradient, int64_t row, int64_t begin, int64_t count, const float* values, bool streaming) {
  if (chunk.channels_inner) {  // the gradient is [channels, locations]
    for (int64_t i = 0; i < count; ++i) {
      int64_t index = begin + i, place = row + index % chunk.inner_size * chunk.outer_size + index / chunk.inner_size;
      if (gradient.element == Element::kFloat) {
        std::memcpy(gradient.at(place), values + i, 4);
      } else {
        write(gradient, place, 1, values + i);
      }
    }
    return;
  }
  if (gradient.element != Element::kFloat) {
    return write(gradient, row + begin, count, values);
  }
  float* target = reinterpret_cast<float*>(gradient.at(row + begin));
  if (streaming && reinterpret_cast<uintptr_t>(target) % 16 == 0) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      stream(target + i, load<Floats>(values + i));
    }
    std::memcpy(target + i, values + i, 4 * (count - i));
  } else {
    std::memcpy(target, values, 4 * count);
  }
}

// factor times the residual, for `count` <= kBlock elements; 16 more may be written.
GENREP_FAST_INLINE void scaled_residual(const Residual& block, float factor, int64_t count, float* values) {
  with_layout(block, [&](auto element, auto has_noisy) GENREP_FAST_LAMBDA {
    constexpr Element kElement = decltype(element)::value;
    constexpr bool kNoisy = decltype(has_noisy)::value;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      store(values + i, block.at<kElement, kNoisy>(i) * factor);
    }
    if (i < count) {
      store(values + i, block.rest<kElement, kNoisy>(i, count - i) * factor);
    }
  });
}

// Gradient of a row that has one contribution.
GENREP_FAST_INLINE void write_gradient_kernel(const Backward& backward, const Target& target, const Contribution& from, int64_t row, bool streaming) {
  const ScoredChunk& chunk = backward.problem.chunk;
  alignas(64) float values[kBlock + kLanes];
  Scratch scratch;
  double scale = backward.scale(from.b, from.k, from.s);
  float factor = static_cast<float>(scale * target.table[from.s]);
  for (int64_t begin = 0; begin < chunk.elements(); begin += kBlock) {
    int64_t count = std::min(kBlock, chunk.elements() - begin);
    if (scale == 0) {  // even where the residual is infinite
      std::fill_n(values, count, 0.0f);
    } else {
      scaled_residual(residual(backward.problem, from.b, from.k, from.s, begin, count, scratch), factor, count, values);
    }
    write_row(chunk, target.gradient, row, begin, count, values, streaming);
  }
}

GENREP_FAST_CLONES(
    write_gradient, (const Backward& backward, const Target& target, const Contribution& from, int64_t row, bool streaming),
    write_gradient_kernel, (backward, target, from, row, streaming))

// Adds one contribution to `sums` [D].
GENREP_FAST_INLINE void add_gradient_kernel(const Backward& backward, const Target& target, const Contribution& from, double* sums) {
  const ScoredChunk& chunk = backward.problem.chunk;
  double scale = backward.scale(from.b, from.k, from.s);
  if (scale == 0) {
    return;
  }
  alignas(64) float values[kBlock + kLanes];
  Scratch scratch;
  float factor = static_cast<float>(scale * target.table[from.s]);
  for (int64_t begin = 0; begin < chunk.elements(); begin += kBlock) {
    int64_t count = std::min(kBlock, chunk.elements() - begin);
    scaled_residual(residual(backward.problem, from.b, from.k, from.s, begin, count, scratch), factor, count, values);
    for (int64_t i = 0; i < count; ++i) {
      sums[begin + i] += values[i];
    }
  }
}

GENREP_FAST_CLONES(
    add_gradient, (const Backward& backward, const Target& target, const Contribution& from, double* sums), add_gradient_kernel,
    (backward, target, from, sums))

// What the residual at `count` <= kBlock locations is multiplied with.
GENREP_FAST_INLINE void location_scales(
    const Backward& backward, const Contribution& from, int64_t begin, int64_t count, float* scales) {
  const ScoredChunk& chunk = backward.problem.chunk;
  const int64_t first = (from.b * chunk.classes + from.k) * chunk.locations + begin;
  if (chunk.mixture) {
    location_log_likelihoods(backward.problem, from.b, from.k, from.s, begin, count, scales);
  }
  float share = -chunk.inv_var[from.s] / static_cast<float>(chunk.steps);
  for (int64_t i = 0; i < count; i += kLanes) {
    int64_t rest = std::min(kLanes, count - i);
    Floats grad{}, total{}, remainder{}, weight = broadcast(1.0f);
    std::memcpy(&grad, backward.grad + first + i, 4 * rest);
    if (chunk.mixture) {
      std::memcpy(&total, backward.likelihood + first + i, 4 * rest);
      std::memcpy(&remainder, backward.remainder + first + i, 4 * rest);
      weight = exponential(load<Floats>(scales + i) - total - remainder);
      weight = total == -kInfinity ? Floats{} : weight;
    }
    store(scales + i, weight * share * grad);
  }
}

// Gradient of a block of locations, of rows that have one contribution.
GENREP_FAST_INLINE void write_location_gradient_kernel(
    const Backward& backward, const Target& target, const Contribution& from, int64_t row, int64_t begin, int64_t count, bool streaming) {
  const ScoredChunk& chunk = backward.problem.chunk;
  alignas(64) float scales[kBlock], values[kBlock + kLanes];
  Scratch scratch;
  location_scales(backward, from, begin, count, scales);
  for (int64_t c = 0; c < chunk.channels; ++c) {
    int64_t place = c * chunk.locations + begin;
    Residual block = residual(backward.problem, from.b, from.k, from.s, place, count, scratch);
    scaled_residual(block, target.table[from.s], count, values);
    for (int64_t i = 0; i < count; i += kLanes) {
      Floats scale = load<Floats>(scales + i);
      store(values + i, scale == 0.0f ? Floats{} : load<Floats>(values + i) * scale);
    }
    write_row(chunk, target.gradient, row, place, count, values, streaming);
  }
}

GENREP_FAST_CLONES(
    write_location_gradient,
    (const Backward& backward, const Target& target, const Contribution& from, int64_t row, int64_t begin, int64_t count, bool streaming),
    write_location_gradient_kernel, (backward, target, from, row, begin, count, streaming))

// Gradient of a block of locations: every channel's sum over the owner's contributions, [C, count].
GENREP_FAST_INLINE void add_location_gradients_kernel(
    const Backward& backward, const Target& target, const Owner& owner, int64_t begin, int64_t count, double* sums) {
  const ScoredChunk& chunk = backward.problem.chunk;
  alignas(64) float scales[kBlock], values[kBlock + kLanes];
  Scratch scratch;
  for (int64_t index = 0; index < owner.contributions(); ++index) {
    Contribution from = owner.at(index);
    location_scales(backward, from, begin, count, scales);
    for (int64_t c = 0; c < chunk.channels; ++c) {
      Residual block = residual(backward.problem, from.b, from.k, from.s, c * chunk.locations + begin, count, scratch);
      scaled_residual(block, target.table[from.s], count, values);
      for (int64_t i = 0; i < count; ++i) {
        sums[c * count + i] += scales[i] == 0 ? 0.0f : values[i] * scales[i];
      }
    }
  }
}

GENREP_FAST_CLONES(
    add_location_gradients,
    (const Backward& backward, const Target& target, const Owner& owner, int64_t begin, int64_t count, double* sums),
    add_location_gradients_kernel, (backward, target, owner, begin, count, sums))

void write_sums(const ScoredChunk& chunk, Buffer gradient, int64_t row, int64_t begin, int64_t count, const double* sums) {
  float values[kBlock];
  for (int64_t done = 0; done < count; done += kBlock) {
    int64_t length = std::min(kBlock, count - done);
    std::copy_n(sums + done, length, values);
    write_row(chunk, gradient, row, begin + done, length, values, false);
  }
}

void zero_further_channels(const ScoredChunk& chunk, const Target& target, int64_t row) {
  char* begin = target.gradient.at(row + chunk.elements());
  char* end = target.gradient.at(row + target.channels * chunk.locations);
  std::fill(begin, end, char{0});
}

void differentiate_locations(const Backward& backward, const Target& target) {
  const ScoredChunk& chunk = backward.problem.chunk;
  const int64_t rows = target.batch * target.classes * target.steps, blocks = ceil_div(chunk.locations, kBlock);
  const int64_t row_elements = target.channels * chunk.locations;
  const bool streaming = 4 * rows * row_elements >= kStreamingBytes;
  parallel(rows * blocks, row_elements, [&](int64_t task) {
    int64_t row = task / blocks, begin = task % blocks * kBlock, count = std::min(kBlock, chunk.locations - begin);
    Owner owner = owner_of(chunk, target, row);
    if (owner.contributions() == 1) {
      write_location_gradient(backward, target, owner.at(0), row * row_elements, begin, count, streaming);
      stream_fence();
    } else {
      std::vector<double> sums(chunk.channels * count);
      add_location_gradients(backward, target, owner, begin, count, sums.data());
      for (int64_t c = 0; c < chunk.channels; ++c) {
        write_sums(chunk, target.gradient, row * row_elements, c * chunk.locations + begin, count, &sums[c * count]);
      }
    }
    if (begin == 0) {
      zero_further_channels(chunk, target, row * row_elements);
    }
  });
}

// Rows with many contributions: these are cut into groups, whose sums are added in order.
void differentiate_shared(const Backward& backward, const Target& target) {
  const ScoredChunk& chunk = backward.problem.chunk;
  const int64_t rows = target.batch * target.classes * target.steps, row_elements = target.channels * chunk.locations;
  const int64_t contributions = owner_of(chunk, target, 0).contributions(), groups = backward.problem.groups(rows, std::max<int64_t>(contributions, 1));
  std::vector<std::vector<double>> sums(rows * groups);
  auto finish = [&](int64_t row) {
    std::vector<double>& total = sums[row * groups];
    for (int64_t group = 1; group < groups; ++group) {
      std::transform(total.begin(), total.end(), sums[row * groups + group].begin(), total.begin(), std::plus<>());
    }
    write_sums(chunk, target.gradient, row * row_elements, 0, chunk.elements(), total.data());
    zero_further_channels(chunk, target, row * row_elements);
    total = {};
  };
  parallel(rows * groups, contributions / groups * chunk.elements(), [&](int64_t task) {
    Owner owner = owner_of(chunk, target, task / groups);
    sums[task].resize(chunk.elements());
    for (int64_t i = first_step(contributions, groups, task % groups); i < first_step(contributions, groups, task % groups + 1); ++i) {
      add_gradient(backward, target, owner.at(i), sums[task].data());
    }
    if (groups == 1) {
      finish(task);
    }
  });
  for (int64_t row = 0; groups > 1 && row < rows; ++row) {
    finish(row);
  }
}

void differentiate_rows(const Backward& backward, const Target& target) {
  const ScoredChunk& chunk = backward.problem.chunk;
  const int64_t rows = target.batch * target.classes * target.steps, row_elements = target.channels * chunk.locations;
  const bool streaming = 4 * rows * row_elements >= kStreamingBytes;
  parallel(rows, row_elements, [&](int64_t row) {
    write_gradient(backward, target, owner_of(chunk, target, row).at(0), row * row_elements, streaming);
    zero_further_channels(chunk, target, row * row_elements);
    stream_fence();
  });
}

Tensor gradient_of(const Backward& backward, const Tensor& input, int64_t channel_axis, const float* table) {
  const ScoredChunk& chunk = backward.problem.chunk;
  Tensor gradient = torch::stable::empty(sizes_of(input), input.scalar_type());
  auto size = [&](int64_t axis) { return axis < channel_axis ? input.size(axis) : 1; };
  Target target{table, buffer_of(gradient), size(0), size(1), size(2), input.size(channel_axis)};
  if (gradient.numel() == 0) {
    return gradient;
  }
  if (chunk.per_location) {
    differentiate_locations(backward, target);
  } else if (owner_of(chunk, target, 0).contributions() == 1) {
    differentiate_rows(backward, target);
  } else {
    differentiate_shared(backward, target);
  }
  return gradient;
}

std::tuple<Tensor, Tensor, Tensor> log_likelihood_backward(
    Tensor grad, Tensor log_likelihood, Tensor remainder, Tensor x, Tensor model_output, std::optional<Tensor> x_t, Tensor data, Tensor noisy,
    Tensor output, Tensor inv_var, Tensor log_norm, std::string reduction, bool per_location, std::vector<bool> output_mask) {
  Backward backward{
      Problem(scored_chunk(x, model_output, x_t, data, noisy, output, inv_var, log_norm, reduction, per_location)), nullptr, nullptr, nullptr,
      {}};
  const Problem& problem = backward.problem;
  const ScoredChunk& chunk = problem.chunk;
  const int64_t likelihoods = chunk.batch * chunk.classes * kept_locations(chunk);
  grad = torch::stable::contiguous(grad);
  log_likelihood = torch::stable::contiguous(log_likelihood);
  remainder = torch::stable::contiguous(remainder);
  for (const Tensor* tensor : {&grad, &log_likelihood, &remainder}) {
    bool unused = tensor == &remainder && !chunk.mixture;
    STD_TORCH_CHECK(
        unused || (tensor->scalar_type() == ScalarType::Float && tensor->numel() == likelihoods),
        "grad, log_likelihood and remainder must be float32 tensors of the likelihood's shape");
  }
  STD_TORCH_CHECK(output_mask.size() == 3, "output_mask must have 3 entries");
  backward.grad = static_cast<const float*>(grad.const_data_ptr());
  backward.likelihood = static_cast<const float*>(log_likelihood.const_data_ptr());
  backward.remainder = static_cast<const float*>(remainder.const_data_ptr());
  if (chunk.mixture && is_tiled(chunk)) {
    for (const State& state : row_states(problem)) {
      backward.recomputed.push_back(log_likelihood_of(state, true));
    }
  }
  Tensor none = torch::stable::empty({0}, x.scalar_type());
  Tensor grad_x = output_mask[0] ? gradient_of(backward, x, 1, chunk.data_table) : none;
  Tensor grad_output = output_mask[1] ? gradient_of(backward, model_output, 3, chunk.output_table) : none;
  Tensor grad_x_t = x_t && output_mask[2] ? gradient_of(backward, *x_t, 3, chunk.noisy_table) : none;
  return {grad_x, grad_output, grad_x_t};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cpu, CPU, m) {
  m.impl("log_likelihood", TORCH_BOX(&log_likelihood));
  m.impl("log_likelihood_backward", TORCH_BOX(&log_likelihood_backward));
  m.impl("score_update", TORCH_BOX(&score_update));
}

}  // namespace genrep_fast
