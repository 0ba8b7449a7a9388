// Bayes' rule and the distillation loss with its gradients (see
// genrep_fast/reference/posterior.py).
//
//     s = L / temperature + log prior,   log p = log_softmax_y s,   log q = log_softmax_y z
//     KL = sum_y p (log p - log q)
//     dKL/dz = q - p,   dKL/dL = p (log p - log q - KL) / temperature
//
// Each reads L, and the student's logits z, from memory once, B K numbers a location, and writes
// its result; the passes for maximum, sum and result find them in the caches. The 16 lanes of a
// vector are 16 locations, or 16 classes where a likelihood is of a whole image.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "../arithmetic.h"
#include "../scoring.h"
#include "elements.h"
#include "vector_math.h"

namespace genrep_fast {
namespace {

constexpr int64_t kRun = 32;                  // vectors that are added up in one accumulator
constexpr int64_t kParallelElements = 16384;  // a thread's least share

// [B, K, locations]
struct Shape {
  int64_t batch, classes, locations;
};

Shape shape_of(const Tensor& tensor) {
  Shape shape{tensor.size(0), tensor.size(1), 1};
  for (int64_t axis = 2; axis < tensor.dim(); ++axis) {
    shape.locations *= tensor.size(axis);
  }
  return shape;
}

struct Arguments {
  const float *likelihood, *logits, *prior, *grad;  // logits, prior and grad may be null
  int64_t prior_stride;                             // of images, in elements
  float temperature;
  float *loss, *grad_logits,
      *result;  // result: the posterior, or the gradient of the likelihood; each may be null
};

// Up to 16 locations of an image, or all classes where it has one location. kAcross: lanes are
// classes.
template <bool kAcross>
struct Columns {
  Shape shape;
  int64_t image, location;  // the first one

  GENREP_FAST_INLINE int64_t vectors() const {
    return kAcross ? ceil_div(shape.classes, kLanes) : shape.classes;
  }

  GENREP_FAST_INLINE int64_t lanes(int64_t j) const {
    return std::min(kLanes, kAcross ? shape.classes - j * kLanes : shape.locations - location);
  }

  GENREP_FAST_INLINE int64_t offset(int64_t j) const {
    int64_t first = image * shape.classes * shape.locations;
    return kAcross ? first + j * kLanes : first + j * shape.locations + location;
  }

  GENREP_FAST_INLINE Floats read(const float* data, int64_t j) const {
    Floats values = kAcross ? broadcast(-kInfinity) : Floats{};
    int64_t count = lanes(j);
    if (count == kLanes) {
      return load<Floats>(data + offset(j));
    }
    std::memcpy(&values, data + offset(j), 4 * count);
    return values;
  }

  GENREP_FAST_INLINE void write(float* data, int64_t j, Floats values) const {
    std::memcpy(data + offset(j), &values, 4 * lanes(j));
  }

  GENREP_FAST_INLINE Floats score(const Arguments& arguments, int64_t j) const {
    Floats values = read(arguments.likelihood, j) / arguments.temperature;
    if (!arguments.prior) {
      return values;
    }
    const float* prior = arguments.prior + image * arguments.prior_stride;
    if (!kAcross) {
      return values + prior[j];
    }
    Floats log_prior{};
    std::memcpy(&log_prior, prior + j * kLanes, 4 * lanes(j));
    return values + log_prior;
  }

  GENREP_FAST_INLINE Floats total(Floats sums) const {
    return kAcross ? broadcast(horizontal_sum(sums)) : sums;
  }
  GENREP_FAST_INLINE Floats largest(Floats values) const {
    return kAcross ? broadcast(horizontal_maximum(values)) : values;
  }

  // Sum over the classes of term(j), in two levels.
  template <typename Term>
  GENREP_FAST_INLINE Floats sum(const Term& term) const {
    Floats outer{};
    for (int64_t first = 0; first < vectors(); first += kRun) {
      Floats inner{};
      for (int64_t j = first; j < std::min(first + kRun, vectors()); ++j) {
        inner += term(j);
      }
      outer += inner;
    }
    return total(outer);
  }
};

// log_softmax_y of values(j) is values(j) - maximum - log_sum; the maximum is taken off first,
// which loses no digits.
struct LogSoftmax {
  Floats maximum, log_sum;

  GENREP_FAST_INLINE Floats of(Floats value) const { return value - maximum - log_sum; }
};

template <bool kAcross, typename Values>
GENREP_FAST_INLINE LogSoftmax log_softmax(const Columns<kAcross>& columns, const Values& values) {
  LogSoftmax result;
  Floats maximum = broadcast(-kInfinity);
  for (int64_t j = 0; j < columns.vectors(); ++j) {
    maximum = larger(maximum, values(j));
  }
  result.maximum = columns.largest(maximum);
  Floats sum = columns.sum(
      [&](int64_t j) GENREP_FAST_LAMBDA { return exponential(values(j) - result.maximum); });
  result.log_sum = sum == sum ? logarithm(sum) : sum;
  return result;
}

template <bool kAcross>
GENREP_FAST_INLINE void posterior_columns(
    const Arguments& arguments, const Columns<kAcross>& columns) {
  auto score = [&](int64_t j) GENREP_FAST_LAMBDA { return columns.score(arguments, j); };
  LogSoftmax p = log_softmax(columns, score);
  for (int64_t j = 0; j < columns.vectors(); ++j) {
    columns.write(arguments.result, j, p.of(score(j)));
  }
}

template <bool kAcross>
GENREP_FAST_INLINE void distillation_columns(
    const Arguments& arguments, const Columns<kAcross>& columns) {
  auto score = [&](int64_t j) GENREP_FAST_LAMBDA { return columns.score(arguments, j); };
  auto logit = [&](int64_t j) GENREP_FAST_LAMBDA { return columns.read(arguments.logits, j); };
  LogSoftmax p = log_softmax(columns, score), q = log_softmax(columns, logit);
  Floats divergence = columns.sum([&](int64_t j) GENREP_FAST_LAMBDA {
    Floats log_p = p.of(score(j)), probability = exponential(log_p);
    return probability == 0.0f ? Floats{} : probability * (log_p - q.of(logit(j)));
  });
  Columns<false> one = {
      {columns.shape.batch, 1, columns.shape.locations}, columns.image, columns.location};
  if (arguments.loss) {
    one.write(arguments.loss, 0, divergence);
    return;
  }
  Floats grad = one.read(arguments.grad, 0);
  if (kAcross) {
    grad = broadcast(grad[0]);
  }
  for (int64_t j = 0; j < columns.vectors(); ++j) {
    Floats log_p = p.of(score(j)), log_q = q.of(logit(j)), probability = exponential(log_p);
    if (arguments.grad_logits) {
      columns.write(arguments.grad_logits, j, grad * (exponential(log_q) - probability));
    }
    if (arguments.result) {
      Floats slope = probability == 0.0f ? Floats{} : probability * (log_p - log_q - divergence);
      columns.write(arguments.result, j, grad * slope / arguments.temperature);
    }
  }
}

GENREP_FAST_CLONES(
    image_posterior, (const Arguments& arguments, const Columns<true>& columns),
    posterior_columns<true>, (arguments, columns))
GENREP_FAST_CLONES(
    location_posterior, (const Arguments& arguments, const Columns<false>& columns),
    posterior_columns<false>, (arguments, columns))
GENREP_FAST_CLONES(
    image_distillation, (const Arguments& arguments, const Columns<true>& columns),
    distillation_columns<true>, (arguments, columns))
GENREP_FAST_CLONES(
    location_distillation, (const Arguments& arguments, const Columns<false>& columns),
    distillation_columns<false>, (arguments, columns))

void for_each_column(const Shape& shape, const Arguments& arguments) {
  const bool across = shape.locations == 1;
  const int64_t blocks = across ? 1 : ceil_div(shape.locations, kLanes);
  const int64_t grain =
      std::max<int64_t>(1, kParallelElements / (shape.classes * std::min(shape.locations, kLanes)));
  torch::stable::parallel_for(0, shape.batch * blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t image = task / blocks;
      const int64_t location = task % blocks * kLanes;
      if (across) {
        (arguments.logits ? image_distillation : image_posterior)(
            arguments, {shape, image, location});
      } else {
        (arguments.logits ? location_distillation : location_posterior)(
            arguments, {shape, image, location});
      }
    }
  });
}

// Contiguous float32 values of the operators' inputs.
struct __attribute__((visibility("hidden"))) Inputs {
  Shape shape;
  Tensor likelihood;
  std::optional<Tensor> prior;
  Arguments arguments{};

  Inputs(const Tensor& log_likelihood, const std::optional<Tensor>& log_prior, double temperature)
      : shape(shape_of(log_likelihood)), likelihood(as_floats(log_likelihood)) {
    arguments.likelihood = data(likelihood);
    arguments.temperature =
        static_cast<float>(std::min(temperature, 3e38));  // not infinite: padding is -inf
    if (log_prior) {
      STD_TORCH_CHECK(
          log_prior->size(1) == shape.classes &&
              (log_prior->numel() == shape.classes ||
               log_prior->numel() == shape.batch * shape.classes),
          "log_prior must be [1 or B, K, 1, ...]");
      prior = as_floats(*log_prior);
      arguments.prior = data(*prior);
      arguments.prior_stride = prior->size(0) == 1 ? 0 : shape.classes;
    }
  }

  static Tensor as_floats(const Tensor& tensor) {
    return dense(
        tensor.scalar_type() == ScalarType::Float ? tensor
                                                  : torch::stable::to(tensor, ScalarType::Float));
  }
  static const float* data(const Tensor& tensor) {
    return static_cast<const float*>(tensor.const_data_ptr());
  }
};

Tensor posterior(Tensor log_likelihood, std::optional<Tensor> log_prior, double temperature) {
  Inputs inputs(log_likelihood, log_prior, temperature);
  Tensor result = torch::stable::empty(sizes_of(log_likelihood), ScalarType::Float);
  inputs.arguments.result = static_cast<float*>(result.mutable_data_ptr());
  if (result.numel() > 0) {
    for_each_column(inputs.shape, inputs.arguments);
  }
  return result;
}

Tensor distillation_loss(
    Tensor student_logits, Tensor log_likelihood, std::optional<Tensor> log_prior,
    double temperature) {
  Inputs inputs(log_likelihood, log_prior, temperature);
  STD_TORCH_CHECK(
      sizes_of(student_logits) == sizes_of(log_likelihood),
      "student_logits must have log_likelihood's shape");
  Tensor logits = Inputs::as_floats(student_logits);
  std::vector<int64_t> shape = sizes_of(log_likelihood);
  shape.erase(shape.begin() + 1);
  Tensor loss = torch::stable::empty(shape, ScalarType::Float);
  inputs.arguments.logits = Inputs::data(logits);
  inputs.arguments.loss = static_cast<float*>(loss.mutable_data_ptr());
  if (loss.numel() > 0) {
    for_each_column(inputs.shape, inputs.arguments);
  }
  return loss;
}

std::tuple<Tensor, Tensor> distillation_loss_backward(
    Tensor grad, Tensor student_logits, Tensor log_likelihood, std::optional<Tensor> log_prior,
    double temperature, std::vector<bool> output_mask) {
  Inputs inputs(log_likelihood, log_prior, temperature);
  STD_TORCH_CHECK(
      sizes_of(student_logits) == sizes_of(log_likelihood) &&
          grad.numel() == inputs.shape.batch * inputs.shape.locations,
      "student_logits must have log_likelihood's shape, and grad the loss's");
  STD_TORCH_CHECK(output_mask.size() == 2, "output_mask must have 2 entries");
  Tensor logits = Inputs::as_floats(student_logits), grads = Inputs::as_floats(grad);
  auto new_gradient = [&](bool needed) {
    return torch::stable::empty(
        needed ? sizes_of(log_likelihood) : std::vector<int64_t>{0}, ScalarType::Float);
  };
  Tensor grad_logits = new_gradient(output_mask[0]), grad_likelihood = new_gradient(output_mask[1]);
  inputs.arguments.logits = Inputs::data(logits);
  inputs.arguments.grad = Inputs::data(grads);
  inputs.arguments.grad_logits =
      output_mask[0] ? static_cast<float*>(grad_logits.mutable_data_ptr()) : nullptr;
  inputs.arguments.result =
      output_mask[1] ? static_cast<float*>(grad_likelihood.mutable_data_ptr()) : nullptr;
  if (log_likelihood.numel() > 0) {
    for_each_column(inputs.shape, inputs.arguments);
  }
  auto in_dtype = [](const Tensor& gradient, const Tensor& like) {
    bool done = like.scalar_type() == ScalarType::Float;
    return done ? gradient : torch::stable::to(gradient, like.scalar_type());
  };
  return {
      output_mask[0] ? in_dtype(grad_logits, student_logits) : grad_logits,
      output_mask[1] ? in_dtype(grad_likelihood, log_likelihood) : grad_likelihood};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cpu, CPU, m) {
  m.impl("posterior", TORCH_BOX(&posterior));
  m.impl("distillation_loss", TORCH_BOX(&distillation_loss));
  m.impl("distillation_loss_backward", TORCH_BOX(&distillation_loss_backward));
}

}  // namespace genrep_fast
