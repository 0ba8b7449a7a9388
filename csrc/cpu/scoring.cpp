// Log-likelihoods of images under every class (see genrep_fast/reference/scoring.py), and their
// streaming update.
//
//     r = a_s x + b_s x_t + c_s o           residual of a row, i.e. of one image, class and step
//     l = -1/2 v_s sum r^2 + D n_s,   L = logsumexp_s l - log S  or the mean of l
//
// Reads the denoiser's outputs o once, B K S D elements, at 3 multiply-adds an element: bound by
// memory. Squares are summed in float32, at most 16 to an accumulator, then in float64. The steps
// are cut into groups by the sizes alone, whose states are merged in their order, so that no result
// depends on the number of threads.
#include <cmath>
#include <tuple>

#include "scoring_locations.h"

namespace genrep_fast {
namespace {

// Merges the rows from `first` to `last` of [B, K, S] into states, the first of which is that of
// the first row's image and class.
GENREP_FAST_INLINE void score_rows_kernel(
    const Problem& problem, int64_t first, int64_t last, State* states) {
  const ScoredChunk& chunk = problem.chunk;
  double l[kSteps];
  alignas(64) double steps[kSteps];
  for (int64_t begin = first; begin < last; begin += kSteps) {
    int64_t count = std::min(kSteps, last - begin);
    const int64_t stride = ceil_div(count, kRows);
    for (int64_t i = 0; i < stride; ++i) {
      Row rows[kRows];
      double together[kRows];
      for (int64_t q = 0; q < kRows; ++q) {
        const int64_t row = std::min(begin + q * stride + i, last - 1);
        const int64_t pair = row / chunk.steps;
        rows[q] = {pair / chunk.classes, pair % chunk.classes, row % chunk.steps};
      }
      step_log_likelihoods(problem, rows, together);
      for (int64_t q = 0; q < kRows; ++q) {
        l[q * stride + i] = together[q];
      }
    }
    for (int64_t i = 0; i < count;) {
      const int64_t pair = (begin + i) / chunk.steps;
      const int64_t end = std::min(count, (pair + 1) * chunk.steps - begin);
      std::copy(l + i, l + end, steps);
      State& state = states[pair - first / chunk.steps];
      state = merge(state, state_of(steps, end - i, chunk.mixture), chunk.mixture);
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
  const int64_t fair = round_up(ceil_div(2 * pairs, kTasks), kRows);
  const int64_t together = groups > 1 ? 1 : std::max<int64_t>(1, std::min(kSteps / steps, fair));
  const int64_t tasks = groups > 1 ? pairs * groups : ceil_div(pairs, together);
  std::vector<State> states(pairs * groups);
  parallel(tasks, together * ceil_div(steps, groups) * chunk.elements(), [&](int64_t task) {
    if (groups > 1) {
      const int64_t row = task / groups * steps;
      const int64_t group = task % groups;
      score_rows(
          problem, row + first_step(steps, groups, group),
          row + first_step(steps, groups, group + 1), &states[task]);
    } else {
      const int64_t first = task * together;
      const int64_t last = std::min(pairs, first + together);
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
  return shares_centers(problem.chunk) ? tile_states(problem) : row_states(problem);
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
  const int64_t num_classes = count.numel();
  const int64_t locations = kept_locations(chunk);
  const int64_t plane = chunk.batch * num_classes * locations;
  STD_TORCH_CHECK(
      count.scalar_type() == ScalarType::Long && count.is_contiguous(),
      "count must be a contiguous int64 tensor");
  STD_TORCH_CHECK(
      state.scalar_type() == ScalarType::Double && state.is_contiguous() &&
          state.numel() == (chunk.mixture ? 3 : 2) * plane,
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
  double* states = static_cast<double*>(state.mutable_data_ptr());
  for_each_state(problem, [&](int64_t pair, int64_t location, const State& added) {
    int64_t k = indices[pair % chunk.classes];
    double* place = states + (pair / chunk.classes * num_classes + k) * locations + location;
    if (chunk.mixture) {
      const State old{place[0], place[plane], place[2 * plane], counts[k]};
      const State merged = merge(old, added, true);
      place[0] = std::isnan(merged.weight) ? merged.weight : merged.center;
      place[plane] = merged.weight;
      place[2 * plane] = merged.squares;
    } else {
      const State merged = merge({place[0], 0, place[plane], counts[k]}, added, false);
      place[0] = merged.center;
      place[plane] = merged.squares;
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
