// Log-likelihoods of images under centres that they share, such as those of a bank of chains.
//
// Centres, K S D elements, are read once for 64 images and the work is bound by arithmetic, 2
// multiply-adds for each pair: differences of four images and four steps at a time stay in
// registers, and D elements are cut into blocks whose centres stay in the first-level cache. It is
// the direct difference that is squared: |x|^2 - 2 <x, o> + |o|^2 loses digits where an image is
// near to a centre.
#include "states.h"

namespace genrep_fast {
namespace {

constexpr int64_t kTileImages = 64, kTileSteps = 16, kTileBlock = 512;

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
      vectors[i] =
          __builtin_shuffle(a, b, kLow[stage]) + __builtin_shuffle(a, b, kLow[stage] + step);
    }
  }
  return vectors[0];
}

// Adds the squared residuals of four images x and four steps, whose other terms are y; `count` is a
// multiple of 16.
GENREP_FAST_INLINE void add_tile(
    const float* const (&x)[4], const float (*y)[kTileBlock], const float* data_factors,
    int64_t count, const char* next, TileSums& sums) {
  Floats totals[16]{};
  Floats factors[4];
  for (int j = 0; j < 4; ++j) {
    factors[j] = broadcast(data_factors[j]);
  }
  for (int64_t i = 0; i < count; i += kLanes) {
    if (i % (4 * kLanes) == 0) {
      __builtin_prefetch(next + i, 0, 2);  // a line now and then: in bursts they stall the loads
    }
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
    const Problem& problem, int64_t k, int64_t first, int64_t steps, int64_t begin, int64_t count,
    float (*y)[kTileBlock]) {
  const ScoredChunk& chunk = problem.chunk;
  Scratch scratch;
  for (int64_t j = 0; j < steps; ++j) {
    int64_t s = first + j;
    const float* output = read_row(
        problem.output, problem.output.offset(0, k, s), chunk.inner_size, begin, count,
        scratch.output);
    const float* noisy = nullptr;
    if (problem.noisy.buffer.data) {
      noisy = read_row(
          problem.noisy, problem.noisy.offset(0, k, s), chunk.inner_size, begin, count,
          scratch.noisy);
    }
    float output_factor = chunk.output_table[s], noisy_factor = chunk.noisy_table[s];
    for (int64_t i = 0; i < count; ++i) {
      y[j][i] = output_factor * output[i];
    }
    for (int64_t i = 0; noisy && i < count; ++i) {
      y[j][i] += noisy_factor * noisy[i];
    }
    std::fill(y[j] + count, y[j] + round_up(count, kLanes), 0.0f);
  }
}

// The block of a center that comes after the one from `begin` on, of the same step or of the next
// tile of steps.
GENREP_FAST_INLINE const char* next_center(
    const Problem& problem, int64_t k, int64_t s, int64_t begin) {
  bool ends = begin + kTileBlock >= problem.chunk.elements();
  int64_t next = ends ? std::min(s + kTileSteps, problem.chunk.steps - 1) : s;
  return problem.output.buffer.at(
      problem.output.offset(0, k, next) + (ends ? 0 : begin + kTileBlock));
}

// Images that end within a vector are copied a block at a time.
struct Tile {
  alignas(64) float y[kTileSteps][kTileBlock] = {};
  alignas(64) float x[kTileImages][kTileBlock];
  alignas(64) TileSums sums[kTileImages / 4][kTileSteps / 4];
  alignas(64) double l[kTileImages][kSteps];
};

GENREP_FAST_INLINE void score_tile_block(
    const Problem& problem, int64_t first_image, int64_t images, int64_t k, int64_t first,
    int64_t begin, int64_t count, Tile& tile) {
  const ScoredChunk& chunk = problem.chunk;
  float data_factors[kTileSteps]{};
  for (int64_t j = 0; j < std::min(kTileSteps, chunk.steps - first); ++j) {
    data_factors[j] = chunk.data_table[first + j];
  }
  int64_t padded = round_up(count, kLanes);
  for (int64_t i = 0; i < images; i += 4) {
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
    const char* next = next_center(problem, k, std::min(first + i / 4, chunk.steps - 1), begin);
    for (int64_t j = 0; j < kTileSteps; j += 4) {
      add_tile(
          x, tile.y + j, data_factors + j, padded, next + j * kTileBlock / 4,
          tile.sums[i / 4][j / 4]);
    }
  }
}

// l of the tile's images at `steps` <= kTileSteps steps from `first` on, into columns `column` on.
GENREP_FAST_INLINE void score_tile_steps(
    const Problem& problem, int64_t first_image, int64_t images, int64_t k, int64_t first,
    int64_t steps, int64_t column, Tile& tile) {
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
    // Lane 4 q + r of a tile's sums belongs to image q and step r.
    for (int64_t j = 0; j < kTileSteps; ++j) {
      double sum = reinterpret_cast<const double*>(tile.sums[i / 4][j / 4])[i % 4 * 4 + j % 4];
      tile.l[i][column + j] = sum * factors[j] + shifts[j];
    }
  }
}

GENREP_FAST_INLINE void score_tile_kernel(
    const Problem& problem, int64_t first_image, int64_t images, int64_t k, int64_t first,
    int64_t last, State* states, Tile& tile) {
  for (int64_t begin = first; begin < last; begin += kSteps) {
    int64_t count = std::min(kSteps, last - begin);
    for (int64_t column = 0; column < count; column += kTileSteps) {
      score_tile_steps(
          problem, first_image, images, k, begin + column, std::min(kTileSteps, count - column),
          column, tile);
    }
    for (int64_t i = 0; i < images; ++i) {
      const bool mixture = problem.chunk.mixture;
      states[i] = merge(states[i], state_of(tile.l[i], count, mixture), mixture);
    }
  }
}

GENREP_FAST_CLONES(
    score_tile,
    (const Problem& problem, int64_t first_image, int64_t images, int64_t k, int64_t first,
     int64_t last, State* states, Tile& tile),
    score_tile_kernel, (problem, first_image, images, k, first, last, states, tile))

}  // namespace

std::vector<State> tile_states(const Problem& problem) {
  const ScoredChunk& chunk = problem.chunk;
  const int64_t tiles = ceil_div(chunk.batch, kTileImages);
  const int64_t groups = problem.groups(tiles * chunk.classes, ceil_div(chunk.steps, kSteps));
  std::vector<State> states(chunk.classes * groups * chunk.batch);  // [K, groups, B]
  torch::stable::parallel_for(
      0, chunk.classes * groups * tiles, 1, [&](int64_t begin, int64_t end) {
        Tile tile;
        for (int64_t task = begin; task < end; ++task) {
          // Tasks are [K, groups, tiles].
          const int64_t first_image = task % tiles * kTileImages;
          const int64_t group = task / tiles % groups;
          const int64_t k = task / tiles / groups;
          const int64_t first = first_step(chunk.steps, groups, group);
          const int64_t last = first_step(chunk.steps, groups, group + 1);
          State* target = &states[(k * groups + group) * chunk.batch + first_image];
          score_tile(
              problem, first_image, std::min(kTileImages, chunk.batch - first_image), k, first,
              last, target, tile);
        }
      });
  std::vector<State> merged(chunk.batch * chunk.classes);
  for (int64_t pair = 0; pair < chunk.batch * chunk.classes; ++pair) {
    for (int64_t group = 0; group < groups; ++group) {
      const State& state =
          states[(pair % chunk.classes * groups + group) * chunk.batch + pair / chunk.classes];
      merged[pair] = merge(merged[pair], state, chunk.mixture);
    }
  }
  return merged;
}

}  // namespace genrep_fast
