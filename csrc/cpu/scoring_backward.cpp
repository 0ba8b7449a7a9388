// Gradients of the log-likelihood (see genrep_fast/reference/scoring.py).
//
//     dL/dr = -v_s r softmax_s(l)  or  -v_s r / S
//
// and from there to x, o and x_t by the tables a, c and b.
//
// The gradient of o reads every row once from memory and once more from the caches, because its
// weight exp(l - logsumexp) needs the whole row, and writes as much: 2 B K S D elements. An input
// that images, classes or steps share gets the sum over them, in a fixed order.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "scaled_residuals.h"
#include "scoring_locations.h"

namespace genrep_fast {
namespace {

constexpr int64_t kMostTogether = 32;  // rows that one thread writes one after the other

// Gradient of one of the operator's inputs, and the table that its part of the residual is
// multiplied with.
struct Target {
  const float* table;
  Buffer gradient;                // contiguous [B or 1, K or 1, S or 1, channels, locations]
  int64_t batch, classes, steps;  // of the gradient
  int64_t channels;               // of the gradient, C or more
  bool streaming;                 // past the caches

  int64_t rows() const { return batch * classes * steps; }
};

struct __attribute__((visibility("hidden"))) Backward {
  Problem problem;
  const float *grad, *likelihood, *remainder;  // [B, K, *loc]; the last two for "mixture"
  // Log-likelihoods where forward had another order of summation.
  std::vector<double> recomputed;  // [B, K]

  // exp(l - logsumexp_s l), or 1/S, times the gradient and -v: what the residuals of kRows rows are
  // multiplied with.
  GENREP_FAST_INLINE void scale(const Row (&rows)[kRows], double (&scales)[kRows]) const {
    const ScoredChunk& chunk = problem.chunk;
    if (chunk.mixture) {
      step_log_likelihoods(problem, rows, scales);
    }
    for (int64_t q = 0; q < kRows; ++q) {
      const int64_t pair = rows[q].b * chunk.classes + rows[q].k;
      double weight = 1.0 / static_cast<double>(chunk.steps);
      if (chunk.mixture) {
        double total = recomputed.empty() ? static_cast<double>(likelihood[pair]) + remainder[pair]
                                          : recomputed[pair];
        weight *= likelihood[pair] == -kInfinity ? 0.0 : std::exp(scales[q] - total);
      }
      scales[q] = -static_cast<double>(chunk.inv_var[rows[q].s]) * weight * grad[pair];
    }
  }
};

// The rows that an element of the target's gradient adds up: `index` below their number, in a fixed
// order.
struct Owner {
  int64_t b, k, s;                // place in the gradient
  int64_t batch, classes, steps;  // ranges of the contributions

  int64_t contributions() const { return batch * classes * steps; }

  Row at(int64_t index) const {
    const int64_t pair = index / steps;
    return {b + pair / classes, k + pair % classes, s + index % steps};
  }
};

Owner owner_of(const ScoredChunk& chunk, const Target& target, int64_t row) {
  Owner owner{};
  owner.s = row % target.steps;
  const int64_t pair = row / target.steps;
  owner.k = pair % target.classes;
  owner.b = pair / target.classes;
  owner.batch = target.batch == 1 ? chunk.batch : 1;
  owner.classes = target.classes == 1 ? chunk.classes : 1;
  owner.steps = target.steps == 1 ? chunk.steps : 1;
  return owner;
}

// Writes `count` <= kBlock elements of a gradient's row from `begin` on, in the order of the
// problem's elements.
GENREP_FAST_INLINE void write_row(
    const ScoredChunk& chunk, Buffer gradient, int64_t row, int64_t begin, int64_t count,
    const float* values, bool streaming) {
  if (chunk.channels_inner) {  // the gradient is [channels, locations]
    for (int64_t i = 0; i < count; ++i) {
      const int64_t index = begin + i;
      const int64_t location = index / chunk.inner_size;
      const int64_t channel = index % chunk.inner_size;
      const int64_t place = row + channel * chunk.outer_size + location;
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

// Writes a block of a gradient's row, which begins at `row`: scaled residuals of `count` <= kBlock
// elements.
template <typename Factors>
GENREP_FAST_INLINE void write_block(
    const ScoredChunk& chunk, const Residual& block, const Factors& factors, const Target& target,
    int64_t row, int64_t begin, int64_t count) {
  if (block.element == target.gradient.element && !chunk.channels_inner) {
    char* place = target.gradient.at(row + begin);
    return write_scaled_residual(block, factors, count, place, target.streaming);
  }
  alignas(64) float values[kBlock + kLanes];
  scaled_residual(block, factors, count, values);
  write_row(chunk, target.gradient, row, begin, count, values, target.streaming);
}

// The row's residual times scale and the target's factor, a block from `begin` on; zeros where the
// scale is 0, even of infinities.
GENREP_FAST_INLINE void gradient_block(
    const Backward& backward, const Target& target, const Row& row, double scale, int64_t begin,
    int64_t count, float* values) {
  if (scale == 0) {
    std::fill_n(values, count, 0.0f);
    return;
  }
  Scratch scratch;
  float factor = static_cast<float>(scale * target.table[row.s]);
  const Residual block = residual(backward.problem, row, begin, count, scratch);
  scaled_residual(block, RowFactor{factor}, count, values);
}

// The gradient of one row, at `place`.
GENREP_FAST_INLINE void write_row_gradient(
    const Backward& backward, const Target& target, const Row& row, double scale, int64_t place) {
  const ScoredChunk& chunk = backward.problem.chunk;
  if (scale == 0) {  // even of infinities
    alignas(64) static constexpr float kZeros[kBlock]{};
    for (int64_t begin = 0; begin < chunk.elements(); begin += kBlock) {
      const int64_t count = std::min(kBlock, chunk.elements() - begin);
      write_row(chunk, target.gradient, place, begin, count, kZeros, target.streaming);
    }
    return;
  }
  Scratch scratch;
  const RowFactor factor{static_cast<float>(scale * target.table[row.s])};
  for (int64_t begin = 0; begin < chunk.elements(); begin += kBlock) {
    const int64_t count = std::min(kBlock, chunk.elements() - begin);
    const Residual block = residual(backward.problem, row, begin, count, scratch);
    write_block(chunk, block, factor, target, place, begin, count);
  }
}

// Gradients of the rows from `first` to `last`, that have one contribution each.
GENREP_FAST_INLINE void write_gradients_kernel(
    const Backward& backward, const Target& target, int64_t first, int64_t last) {
  const ScoredChunk& chunk = backward.problem.chunk;
  const int64_t row_elements = target.channels * chunk.locations;
  const int64_t stride = ceil_div(last - first, kRows);
  for (int64_t i = first; i < first + stride; ++i) {
    Row rows[kRows];
    double scales[kRows];
    for (int64_t q = 0; q < kRows; ++q) {
      rows[q] = owner_of(chunk, target, std::min(i + q * stride, last - 1)).at(0);
    }
    backward.scale(rows, scales);
    for (int64_t q = 0; q < kRows && i + q * stride < last; ++q) {
      write_row_gradient(backward, target, rows[q], scales[q], (i + q * stride) * row_elements);
    }
  }
}

GENREP_FAST_CLONES(
    write_gradients, (const Backward& backward, const Target& target, int64_t first, int64_t last),
    write_gradients_kernel, (backward, target, first, last))

// Adds contributions from `first` to `last` to `sums` [D].
GENREP_FAST_INLINE void add_gradients_kernel(
    const Backward& backward, const Target& target, const Owner& owner, int64_t first, int64_t last,
    double* sums) {
  const ScoredChunk& chunk = backward.problem.chunk;
  alignas(64) float values[kBlock + kLanes];
  Row rows[kRows];
  double scales[kRows];
  for (; first < last; first += kRows) {
    for (int64_t q = 0; q < kRows; ++q) {
      rows[q] = owner.at(std::min(first + q, last - 1));
    }
    backward.scale(rows, scales);
    for (int64_t q = 0; q < std::min(kRows, last - first); ++q) {
      for (int64_t begin = 0; scales[q] != 0 && begin < chunk.elements(); begin += kBlock) {
        int64_t count = std::min(kBlock, chunk.elements() - begin);
        gradient_block(backward, target, rows[q], scales[q], begin, count, values);
        for (int64_t i = 0; i < count; ++i) {
          sums[begin + i] += values[i];
        }
      }
    }
  }
}

GENREP_FAST_CLONES(
    add_gradients,
    (const Backward& backward, const Target& target, const Owner& owner, int64_t first,
     int64_t last, double* sums),
    add_gradients_kernel, (backward, target, owner, first, last, sums))

// What the residual at `count` <= kBlock locations is multiplied with.
GENREP_FAST_INLINE void location_scales(
    const Backward& backward, const Row& from, int64_t begin, int64_t count, float* scales) {
  const ScoredChunk& chunk = backward.problem.chunk;
  const int64_t first = (from.b * chunk.classes + from.k) * chunk.locations + begin;
  if (chunk.mixture) {
    location_log_likelihoods(backward.problem, from, begin, count, scales);
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
    const Backward& backward, const Target& target, const Row& from, int64_t row, int64_t begin,
    int64_t count) {
  const ScoredChunk& chunk = backward.problem.chunk;
  alignas(64) float scales[kBlock];
  Scratch scratch;
  location_scales(backward, from, begin, count, scales);
  const LocationFactors factors{target.table[from.s], scales};
  for (int64_t c = 0; c < chunk.channels; ++c) {
    const int64_t place = c * chunk.locations + begin;
    const Residual block = residual(backward.problem, from, place, count, scratch);
    write_block(chunk, block, factors, target, row, place, count);
  }
}

GENREP_FAST_CLONES(
    write_location_gradient,
    (const Backward& backward, const Target& target, const Row& from, int64_t row, int64_t begin,
     int64_t count),
    write_location_gradient_kernel, (backward, target, from, row, begin, count))

// Gradient of a block of locations: every channel's sum over the owner's contributions, [C, count].
GENREP_FAST_INLINE void add_location_gradients_kernel(
    const Backward& backward, const Target& target, const Owner& owner, int64_t begin,
    int64_t count, double* sums) {
  const ScoredChunk& chunk = backward.problem.chunk;
  alignas(64) float scales[kBlock], values[kBlock + kLanes];
  Scratch scratch;
  for (int64_t index = 0; index < owner.contributions(); ++index) {
    Row from = owner.at(index);
    location_scales(backward, from, begin, count, scales);
    for (int64_t c = 0; c < chunk.channels; ++c) {
      Residual block =
          residual(backward.problem, from, c * chunk.locations + begin, count, scratch);
      scaled_residual(block, LocationFactors{target.table[from.s], scales}, count, values);
      for (int64_t i = 0; i < count; ++i) {
        sums[c * count + i] += values[i];
      }
    }
  }
}

GENREP_FAST_CLONES(
    add_location_gradients,
    (const Backward& backward, const Target& target, const Owner& owner, int64_t begin,
     int64_t count, double* sums),
    add_location_gradients_kernel, (backward, target, owner, begin, count, sums))

void write_sums(
    const ScoredChunk& chunk, Buffer gradient, int64_t row, int64_t begin, int64_t count,
    const double* sums) {
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
  const int64_t rows = target.rows(), blocks = ceil_div(chunk.locations, kBlock);
  const int64_t row_elements = target.channels * chunk.locations;
  parallel(rows * blocks, row_elements, [&](int64_t task) {
    const int64_t row = task / blocks;
    const int64_t begin = task % blocks * kBlock;
    const int64_t count = std::min(kBlock, chunk.locations - begin);
    Owner owner = owner_of(chunk, target, row);
    if (owner.contributions() == 1) {
      write_location_gradient(backward, target, owner.at(0), row * row_elements, begin, count);
      stream_fence();
    } else {
      std::vector<double> sums(chunk.channels * count);
      add_location_gradients(backward, target, owner, begin, count, sums.data());
      for (int64_t c = 0; c < chunk.channels; ++c) {
        write_sums(
            chunk, target.gradient, row * row_elements, c * chunk.locations + begin, count,
            &sums[c * count]);
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
  const int64_t rows = target.rows(), row_elements = target.channels * chunk.locations;
  const int64_t contributions = owner_of(chunk, target, 0).contributions();
  const int64_t groups = backward.problem.groups(rows, contributions);
  std::vector<std::vector<double>> sums(rows * groups);
  auto finish = [&](int64_t row) {
    std::vector<double>& total = sums[row * groups];
    for (int64_t group = 1; group < groups; ++group) {
      std::transform(
          total.begin(), total.end(), sums[row * groups + group].begin(), total.begin(),
          std::plus<>());
    }
    write_sums(chunk, target.gradient, row * row_elements, 0, chunk.elements(), total.data());
    zero_further_channels(chunk, target, row * row_elements);
    std::vector<double>().swap(total);
  };
  parallel(rows * groups, contributions / groups * chunk.elements(), [&](int64_t task) {
    Owner owner = owner_of(chunk, target, task / groups);
    sums[task].resize(chunk.elements());
    const int64_t first = first_step(contributions, groups, task % groups);
    const int64_t last = first_step(contributions, groups, task % groups + 1);
    add_gradients(backward, target, owner, first, last, sums[task].data());
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
  const int64_t rows = target.rows(), row_elements = target.channels * chunk.locations;
  const int64_t fair = round_up(ceil_div(rows, kTasks), kRows);
  const int64_t together = std::min(fair, kMostTogether);
  parallel(ceil_div(rows, together), together * row_elements, [&](int64_t task) {
    const int64_t first = task * together, last = std::min(rows, first + together);
    write_gradients(backward, target, first, last);
    for (int64_t row = first; row < last; ++row) {
      zero_further_channels(chunk, target, row * row_elements);
    }
    stream_fence();
  });
}

Tensor gradient_of(
    const Backward& backward, const Tensor& input, int64_t channel_axis, const float* table) {
  const ScoredChunk& chunk = backward.problem.chunk;
  Tensor gradient = torch::stable::empty(sizes_of(input), input.scalar_type());
  auto size = [&](int64_t axis) { return axis < channel_axis ? input.size(axis) : 1; };
  Target target{table,   buffer_of(gradient),      size(0), size(1),
                size(2), input.size(channel_axis), false};
  if (gradient.numel() == 0) {
    return gradient;
  }
  const int64_t element_bytes = gradient.scalar_type() == ScalarType::Float ? 4 : 2;
  target.streaming = is_streamed(gradient, element_bytes * gradient.numel());
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
    Tensor grad, Tensor log_likelihood, Tensor remainder, Tensor x, Tensor model_output,
    std::optional<Tensor> x_t, Tensor tables, std::string reduction, bool per_location,
    std::vector<bool> output_mask) {
  ScoredChunk arguments = scored_chunk(x, model_output, x_t, tables, reduction, per_location);
  Backward backward{Problem(std::move(arguments)), nullptr, nullptr, nullptr, {}};
  const Problem& problem = backward.problem;
  const ScoredChunk& chunk = problem.chunk;
  const int64_t likelihoods = chunk.batch * chunk.classes * kept_locations(chunk);
  grad = dense(grad);
  log_likelihood = dense(log_likelihood);
  remainder = dense(remainder);
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
  if (chunk.mixture && shares_centers(chunk)) {
    for (const State& state : row_states(problem)) {
      backward.recomputed.push_back(log_likelihood_of(state, true));
    }
  }
  Tensor none = torch::stable::empty({0}, x.scalar_type());
  Tensor grad_x = output_mask[0] ? gradient_of(backward, x, 1, chunk.data_table) : none;
  Tensor grad_output =
      output_mask[1] ? gradient_of(backward, model_output, 3, chunk.output_table) : none;
  Tensor grad_x_t =
      x_t && output_mask[2] ? gradient_of(backward, *x_t, 3, chunk.noisy_table) : none;
  return {grad_x, grad_output, grad_x_t};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cpu, CPU, m) {
  m.impl("log_likelihood_backward", TORCH_BOX(&log_likelihood_backward));
}

}  // namespace genrep_fast
