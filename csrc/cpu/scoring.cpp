// Log-likelihoods of images under every class (see genrep_fast/reference/scoring.py), and their
// streaming update.
//
//     r = a_s x + b_s x_t + c_s o                       residual of a row, i.e. of one image, class and step
//     l = -1/2 v_s sum r^2 + D n_s,   L = logsumexp_s l - log S  or the mean of l
//
// Reads the denoiser's outputs o once, B K S D elements, at 3 multiply-adds an element: bound by
// memory. Squares are summed in float32, at most 16 to an accumulator, then in float64. The state
// of an image and class is a running maximum, sum of weights and sum of squared weights, or mean
// and sum of squared deviations; the steps are cut into groups by the sizes alone and merged in
// their order, so that no result depends on the number of threads.
#include <cmath>
#include <tuple>

#include "score_states.h"

namespace genrep_fast {
namespace {

constexpr int64_t kTogether = 4;  // steps that are added to the states of locations together

// ---- a likelihood an image ----

// Merges the rows from `first` to `last` of [B, K, S] into states, the first of which is that of
// the first row's image and class.
GENREP_FAST_INLINE void score_rows_kernel(
    const Problem& problem, int64_t first, int64_t last, State* states) {
  const ScoredChunk& chunk = problem.chunk;
  double l[kSteps];
  alignas(64) double steps[kSteps];
  for (int64_t begin = first; begin < last; begin += kSteps) {
    int64_t count = std::min(kSteps, last - begin);
    for (int64_t i = 0; i < count; i += kRows) {
      Row rows[kRows];
      for (int64_t q = 0; q < kRows; ++q) {
        int64_t row = std::min(begin + i + q, last - 1), pair = row / chunk.steps;
        rows[q] = {pair / chunk.classes, pair % chunk.classes, row % chunk.steps};
      }
      step_log_likelihoods(problem, rows, l + i);
    }
    for (int64_t i = 0; i < count;) {
      int64_t pair = (begin + i) / chunk.steps,
              end = std::min(count, (pair + 1) * chunk.steps - begin);
      std::copy(l + i, l + end, steps);
      State& state = states[pair - first / chunk.steps];
      state = merge(
          state, chunk.mixture ? mixture_state(steps, end - i) : mean_state(steps, end - i),
          chunk.mixture);
      i = end;
    }
  }
}

GENREP_FAST_CLONES(
    score_rows, (const Problem& problem, int64_t first, int64_t last, State* states),
    score_rows_kernel, (problem, first, last, states))

}  // namespace

std::vector<State> row_states(const Problem& problem) {
  const ScoredChunk& chunk = problem.chunk;
  const int64_t pairs = chunk.batch * chunk.classes, steps = chunk.steps;
  if (steps == 0) {
    return std::vector<State>(pairs);
  }
  const int64_t groups = problem.groups(pairs, ceil_div(steps, kRows));
  // Of images and classes with few steps, some make a task.
  const int64_t fair = ceil_div(ceil_div(2 * pairs, kTasks), kRows) * kRows;
  const int64_t together = groups > 1 ? 1 : std::max<int64_t>(1, std::min(kSteps / steps, fair));
  const int64_t tasks = groups > 1 ? pairs * groups : ceil_div(pairs, together);
  std::vector<State> states(pairs * groups);
  parallel(tasks, together * ceil_div(steps, groups) * chunk.elements(), [&](int64_t task) {
    if (groups > 1) {
      int64_t row = task / groups * steps, group = task % groups;
      score_rows(
          problem, row + first_step(steps, groups, group),
          row + first_step(steps, groups, group + 1), &states[task]);
    } else {
      int64_t first = task * together, last = std::min(pairs, first + together);
      score_rows(problem, first * steps, last * steps, &states[first]);
    }
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

namespace {

// [B, K]
std::vector<State> image_states(const Problem& problem) {
  return is_tiled(problem.chunk) ? tile_states(problem) : row_states(problem);
}

// ---- a likelihood a location ----

// States of a block of locations of one image and class.
struct LocationStates {
  alignas(64) float maximum[kBlock];  // "mixture"
  alignas(64) double sum[kBlock],
      squares[kBlock];  // of weights and their squares, or mean and sum of squared deviations
};

// sums = sums * scale + values
GENREP_FAST_INLINE void rescale_and_add(double* sums, Floats scale, Floats values) {
  HalfFloats scales[2], added[2];
  std::memcpy(scales, &scale, sizeof(scale));
  std::memcpy(added, &values, sizeof(values));
  for (int half = 0; half < 2; ++half) {
    Doubles old = load<Doubles>(sums + 8 * half);
    store(
        sums + 8 * half, old * __builtin_convertvector(scales[half], Doubles) +
                             __builtin_convertvector(added[half], Doubles));
  }
}

// Adds kTogether steps, some of which may be -inf, as if they were not there.
GENREP_FAST_INLINE void add_to_mixture(
    const float (*l)[kBlock], int64_t count, LocationStates& states) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats values[kTogether], old = load<Floats>(states.maximum + i), maximum = old;
    for (int64_t u = 0; u < kTogether; ++u) {
      values[u] = load<Floats>(l[u] + i);
      maximum = larger(maximum, values[u]);
    }
    Floats level = maximum == -kInfinity ? Floats{} : maximum, scale = exponential(old - level),
           sum{}, squares{};
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

GENREP_FAST_INLINE void add_to_mean(
    const float* l, int64_t count, int64_t seen, LocationStates& states) {
  double share = 1.0 / static_cast<double>(seen + 1);
  for (int64_t i = 0; i < count; ++i) {
    double difference = l[i] - states.sum[i];
    states.sum[i] += difference - difference == 0 ? difference * share
                                                  : static_cast<double>(l[i]);  // -inf stays
    states.squares[i] += difference * (l[i] - states.sum[i]);
  }
}

GENREP_FAST_INLINE void score_locations_kernel(
    const Problem& problem, int64_t b, int64_t k, int64_t begin, int64_t count,
    LocationStates& states) {
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
      location_log_likelihoods(problem, {b, k, first + u}, begin, count, l[u]);
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
    score_locations,
    (const Problem& problem, int64_t b, int64_t k, int64_t begin, int64_t count,
     LocationStates& states),
    score_locations_kernel, (problem, b, k, begin, count, states))

// Calls take(pair, location, State) for every image, class and location, in any order.
template <typename Take>
void for_each_location(const Problem& problem, const Take& take) {
  const ScoredChunk& chunk = problem.chunk;
  const int64_t blocks = ceil_div(chunk.locations, kBlock);
  const int64_t elements = chunk.steps * chunk.channels * std::min(kBlock, chunk.locations);
  parallel(chunk.batch * chunk.classes * blocks, elements, [&](int64_t task) {
    int64_t pair = task / blocks, begin = task % blocks * kBlock,
            count = std::min(kBlock, chunk.locations - begin);
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

// ---- operators ----

std::vector<int64_t> likelihood_shape(const Tensor& x, const ScoredChunk& chunk) {
  std::vector<int64_t> shape = {chunk.batch, chunk.classes};
  for (int64_t axis = 2; chunk.per_location && axis < x.dim(); ++axis) {
    shape.push_back(x.size(axis));
  }
  return shape;
}

std::tuple<Tensor, Tensor> log_likelihood(
    Tensor x, Tensor model_output, std::optional<Tensor> x_t, Tensor tables, std::string reduction,
    bool per_location) {
  Problem problem(scored_chunk(x, model_output, x_t, tables, reduction, per_location));
  const ScoredChunk& chunk = problem.chunk;
  const std::vector<int64_t> shape = likelihood_shape(x, chunk);
  Tensor result = torch::stable::empty(shape, ScalarType::Float);
  Tensor remainder =
      torch::stable::empty(chunk.mixture ? shape : std::vector<int64_t>{0}, ScalarType::Float);
  float* results = static_cast<float*>(result.mutable_data_ptr());
  float* remainders = chunk.mixture ? static_cast<float*>(remainder.mutable_data_ptr()) : nullptr;
  const int64_t locations = kept_locations(chunk);
  for_each_state(problem, [&](int64_t pair, int64_t location, const State& state) {
    double exact = log_likelihood_of(state, chunk.mixture);
    float rounded = static_cast<float>(exact);
    results[pair * locations + location] = rounded;
    if (remainders) {
      remainders[pair * locations + location] =
          std::isinf(rounded) ? 0.0f : static_cast<float>(exact - rounded);
    }
  });
  return {result, remainder};
}

void score_update(
    Tensor x, Tensor model_output, std::optional<Tensor> x_t, Tensor tables,
    std::optional<Tensor> classes, std::string reduction, bool per_location, Tensor count,
    Tensor state) {
  Problem problem(scored_chunk(x, model_output, x_t, tables, reduction, per_location));
  const ScoredChunk& chunk = problem.chunk;
  const int64_t num_classes = count.numel(), locations = kept_locations(chunk),
                rows = chunk.batch * num_classes * locations;
  STD_TORCH_CHECK(
      count.scalar_type() == ScalarType::Long && count.is_contiguous(),
      "count must be a contiguous int64 tensor");
  STD_TORCH_CHECK(
      state.scalar_type() == ScalarType::Double && state.is_contiguous() &&
          state.numel() == (chunk.mixture ? 3 : 2) * rows,
      "state must be a contiguous float64 tensor of 3 (mixture) or 2 (mean) times [B, K, ...]");
  std::vector<int64_t> indices(chunk.classes);
  for (int64_t k = 0; k < chunk.classes; ++k) {
    indices[k] = k;
  }
  STD_TORCH_CHECK(
      classes || chunk.classes == num_classes,
      "classes must be given where the chunk does not have all of them");
  if (classes) {
    STD_TORCH_CHECK(
        classes->scalar_type() == ScalarType::Long && classes->numel() == chunk.classes,
        "classes must be int64, one a class");
    Tensor given = dense(*classes);
    std::copy_n(
        static_cast<const int64_t*>(given.const_data_ptr()), chunk.classes, indices.begin());
  }
  for (int64_t k : indices) {
    STD_TORCH_CHECK(
        0 <= k && k < num_classes, "classes must lie in [0, ", num_classes, "), got ", k);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cpu, CPU, m) {
  m.impl("log_likelihood", TORCH_BOX(&log_likelihood));
  m.impl("score_update", TORCH_BOX(&score_update));
}

}  // namespace genrep_fast
