// Posteriors, and the loss of distilling them into a student with its gradients (see
// genrep_fast/reference/posterior.py).
//
//     s = L / temperature + log prior,   log p = s - logsumexp_y s,   log q likewise of the student
//     KL = sum_y p (log p - log q)
//     dKL/dlogits = q - p,   dKL/dL = p (log p - log q - KL) / temperature
//
// K numbers of an image or location are read once for their logsumexp and, from the caches, once
// for every result: 4 to 8 bytes each way and an exponential or two, bound by memory. A thread
// works on an image or location, a block on an image of many classes. Sums are float64.
#include "elements.cuh"

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "introspection.h"

namespace genrep_fast {
namespace {

constexpr int64_t kThreadClasses = 32;  // of an image that is a thread's at most

// s [B, K, locations] of the posterior, or of the student, which has neither prior nor temperature.
struct Scores {
  const void* data;
  Dtype dtype;
  double inverse_temperature;
  const float* prior;  // [1 or B, K], or null
  int64_t prior_stride;

  __device__ double at(int64_t image, int64_t index, int64_t y) const {
    const double score = read_element(data, dtype, index) * inverse_temperature;
    return prior == nullptr ? score : score + prior[image * prior_stride + y];
  }
};

struct Sizes {
  int64_t batch, classes, locations;
};

// sum exp(s) as exp(maximum) weight
struct LogSum {
  double maximum = -INFINITY, weight = 0;

  __device__ void add(double score) {
    if (score != -INFINITY) {
      const double difference = score - maximum;
      const bool grows = difference > 0 || score != score;
      const double scale = exp(-fabs(difference));
      weight = grows ? fma(weight, scale, 1.0) : weight + scale;
      maximum = grows ? score : maximum;
    }
  }

  // As torch.log_softmax, where an infinite score leaves nothing defined.
  __device__ double value() const { return maximum == INFINITY ? NAN : maximum + log(weight); }
};

__device__ LogSum combined(const LogSum& a, const LogSum& b) {
  if (a.weight == 0 || b.weight == 0) {
    return a.weight == 0 ? b : a;
  }
  LogSum sum;
  sum.maximum = a.maximum != a.maximum || a.maximum > b.maximum ? a.maximum : b.maximum;
  sum.weight = exp(a.maximum - sum.maximum) * a.weight + exp(b.maximum - sum.maximum) * b.weight;
  return sum;
}

// What works on an image or location: a block, or a thread.
template <bool kBlock>
struct Team {
  Sizes sizes;
  int64_t item, image, location;

  __device__ explicit Team(const Sizes& given) : sizes(given) {
    item = kBlock ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    image = item / sizes.locations;
    location = item - image * sizes.locations;
  }

  __device__ bool exists() const { return image < sizes.batch; }

  // Calls work(y, index) for this thread's classes.
  template <typename Work>
  __device__ void for_each_class(Work work) const {
#pragma unroll 4
    constexpr int64_t kStride = kBlock ? kThreads : 1;
    for (int64_t y = kBlock ? threadIdx.x : 0; y < sizes.classes; y += kStride) {
      work(y, (image * sizes.classes + y) * sizes.locations + location);
    }
  }

  template <typename Value, typename Combine>
  __device__ Value reduced(const Value& own, Combine combine) const {
    if constexpr (kBlock) {
      alignas(16) __shared__ char memory[kThreads * sizeof(Value)];
      Value* values = reinterpret_cast<Value*>(memory);
      __syncthreads();  // until the last result has been read
      values[threadIdx.x] = own;
      return reduced_over_block(values, kThreads, combine);
    } else {
      return own;
    }
  }

  __device__ double log_sum(const Scores& scores) const {
    LogSum sum;
    for_each_class([&](int64_t y, int64_t index) { sum.add(scores.at(image, index, y)); });
    return reduced(sum, combined).value();
  }
};

template <bool kBlock>
__global__ __launch_bounds__(kThreads, 4) void posterior_kernel(
    const Sizes sizes, const Scores scores, float* result) {
  const Team<kBlock> team(sizes);
  if (!team.exists()) {
    return;
  }
  const double total = team.log_sum(scores);
  team.for_each_class([&](int64_t y, int64_t index) {
    result[index] = static_cast<float>(scores.at(team.image, index, y) - total);
  });
}

// p, q and log p - log q of one class
struct Ratio {
  float p, q;
  double log_ratio;
};

struct Pair {
  Scores teacher, student;
  double teacher_total, student_total;

  template <bool kBlock>
  __device__ void set_totals(const Team<kBlock>& team) {
    teacher_total = team.log_sum(teacher);
    student_total = team.log_sum(student);
  }

  __device__ Ratio at(int64_t image, int64_t index, int64_t y) const {
    const double log_p = teacher.at(image, index, y) - teacher_total,
                 log_q = student.at(image, index, y) - student_total;
    return {expf(static_cast<float>(log_p)), expf(static_cast<float>(log_q)), log_p - log_q};
  }

  // 0 log 0 = 0
  template <bool kBlock>
  __device__ double divergence(const Team<kBlock>& team) const {
    double sum = 0;
    team.for_each_class([&](int64_t y, int64_t index) {
      const Ratio ratio = at(team.image, index, y);
      sum += ratio.p == 0 ? 0.0 : ratio.p * ratio.log_ratio;
    });
    return team.reduced(sum, [](double a, double b) { return a + b; });
  }
};

template <bool kBlock>
__global__ __launch_bounds__(kThreads, 4) void distillation_loss_kernel(
    const Sizes sizes, Pair pair, float* loss) {
  const Team<kBlock> team(sizes);
  if (!team.exists()) {
    return;
  }
  pair.set_totals(team);
  const double divergence = pair.divergence(team);
  if (!kBlock || threadIdx.x == 0) {
    loss[team.item] = static_cast<float>(divergence);
  }
}

// A gradient whose memory is null is not wanted.
template <bool kBlock>
__global__ __launch_bounds__(kThreads, 2) void distillation_loss_backward_kernel(
    const Sizes sizes, Pair pair, const float* grad, void* grad_student, void* grad_teacher) {
  const Team<kBlock> team(sizes);
  if (!team.exists()) {
    return;
  }
  pair.set_totals(team);
  const double divergence = grad_teacher == nullptr ? 0.0 : pair.divergence(team);
  const float factor = grad[team.item];
  team.for_each_class([&](int64_t y, int64_t index) {
    const Ratio ratio = pair.at(team.image, index, y);
    if (grad_student != nullptr) {
      store_element(grad_student, pair.student.dtype, index, factor * (ratio.q - ratio.p));
    }
    if (grad_teacher != nullptr) {
      const double slope = ratio.p == 0 ? 0.0 : ratio.p * (ratio.log_ratio - divergence);
      store_element(
          grad_teacher, pair.teacher.dtype, index,
          static_cast<float>(factor * slope * pair.teacher.inverse_temperature));
    }
  });
}

// ---- launches ----

Sizes sizes_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= 2, "log_likelihood must be [B, K, *loc]");
  Sizes sizes{tensor.size(0), tensor.size(1), 1};
  for (int64_t axis = 2; axis < tensor.dim(); ++axis) {
    sizes.locations *= tensor.size(axis);
  }
  return sizes;
}

// `tensor` and `prior` must be contiguous and outlive the launch.
Scores scores_of(const Tensor& tensor, const std::optional<Tensor>& prior, double temperature) {
  const Dtype dtype = dtype_of(tensor);
  STD_TORCH_CHECK(
      dtype != kFloat64,
      "likelihoods and logits must be float32, bfloat16 or float16, got float64");
  Scores scores{tensor.data_ptr(), dtype, 1 / temperature, nullptr, 0};
  if (prior) {
    const bool matches = prior->scalar_type() == ScalarType::Float &&
                         prior->dim() == tensor.dim() && prior->size(1) == tensor.size(1) &&
                         (prior->size(0) == 1 || prior->size(0) == tensor.size(0)) &&
                         prior->numel() == prior->size(0) * prior->size(1);
    const bool together = prior->device() == tensor.device();
    STD_TORCH_CHECK(
        matches && together,
        "log_prior must be float32 [1 or B, K, 1, ...] on log_likelihood's device");
    scores.prior = static_cast<const float*>(prior->data_ptr());
    scores.prior_stride = prior->size(0) == 1 ? 0 : tensor.size(1);
  }
  return scores;
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

void check_shape(
    const Tensor& tensor, const std::vector<int64_t>& sizes, const Tensor& like, const char* name) {
  const auto own = tensor.sizes();
  const bool fits = std::equal(own.begin(), own.end(), sizes.begin(), sizes.end()) &&
                    tensor.device() == like.device();
  STD_TORCH_CHECK(fits, name, " has the wrong shape or device");
}

// Calls launch(std::bool_constant of blocks or threads, blocks), unless there is nothing to do.
template <typename Launch>
void with_team(const Sizes& sizes, Launch launch) {
  const int64_t items = sizes.batch * sizes.locations;
  if (items * sizes.classes == 0) {
    return;
  }
  if (sizes.locations == 1 && sizes.classes > kThreadClasses) {
    launch(std::true_type{}, grid_of(items));
  } else {
    launch(std::false_type{}, grid_of(ceil_div(items, kThreads)));
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::vector<int64_t> sizes_without_classes(const Tensor& tensor) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.erase(sizes.begin() + 1);
  return sizes;
}

Tensor posterior(
    const Tensor& log_likelihood, const std::optional<Tensor>& log_prior, double temperature) {
  DeviceScope scope(log_likelihood);
  const Sizes sizes = sizes_of(log_likelihood);
  const Tensor teacher = torch::stable::contiguous(log_likelihood);
  const std::optional<Tensor> prior = contiguous(log_prior);
  const Scores scores = scores_of(teacher, prior, temperature);
  Tensor result = torch::stable::new_empty(teacher, teacher.sizes(), ScalarType::Float);
  with_team(sizes, [&](auto is_block, unsigned blocks) {
    posterior_kernel<is_block><<<blocks, kThreads, 0, scope.stream()>>>(
        sizes, scores, static_cast<float*>(result.data_ptr()));
  });
  return result;
}

Tensor distillation_loss(
    const Tensor& student_logits, const Tensor& log_likelihood,
    const std::optional<Tensor>& log_prior, double temperature) {
  DeviceScope scope(log_likelihood);
  const Sizes sizes = sizes_of(log_likelihood);
  const Tensor teacher = torch::stable::contiguous(log_likelihood),
               student = torch::stable::contiguous(student_logits);
  check_shape(student, {teacher.sizes().begin(), teacher.sizes().end()}, teacher, "student_logits");
  const std::optional<Tensor> prior = contiguous(log_prior);
  const Pair pair{
      scores_of(teacher, prior, temperature), scores_of(student, std::nullopt, 1), 0, 0};
  Tensor loss =
      torch::stable::new_empty(teacher, sizes_without_classes(teacher), ScalarType::Float);
  with_team(sizes, [&](auto is_block, unsigned blocks) {
    distillation_loss_kernel<is_block><<<blocks, kThreads, 0, scope.stream()>>>(
        sizes, pair, static_cast<float*>(loss.data_ptr()));
  });
  return loss;
}

std::tuple<Tensor, Tensor> distillation_loss_backward(
    const Tensor& grad, const Tensor& student_logits, const Tensor& log_likelihood,
    const std::optional<Tensor>& log_prior, double temperature,
    const std::vector<bool>& output_mask) {
  DeviceScope scope(log_likelihood);
  STD_TORCH_CHECK(
      output_mask.size() == 2, "output_mask must have 2 entries, got ", output_mask.size());
  const Sizes sizes = sizes_of(log_likelihood);
  const Tensor teacher = torch::stable::contiguous(log_likelihood),
               student = torch::stable::contiguous(student_logits);
  const Tensor upstream = torch::stable::contiguous(grad);
  check_shape(student, {teacher.sizes().begin(), teacher.sizes().end()}, teacher, "student_logits");
  check_shape(upstream, sizes_without_classes(teacher), teacher, "grad");
  STD_TORCH_CHECK(upstream.scalar_type() == ScalarType::Float, "grad must be float32");
  const std::optional<Tensor> prior = contiguous(log_prior);
  const Pair pair{
      scores_of(teacher, prior, temperature), scores_of(student, std::nullopt, 1), 0, 0};
  auto gradient_of = [&](bool needed, const Tensor& like) {
    return needed ? torch::stable::new_empty(like, like.sizes())
                  : torch::stable::new_empty(grad, std::vector<int64_t>{0});
  };
  Tensor grad_student = gradient_of(output_mask[0], student),
         grad_teacher = gradient_of(output_mask[1], teacher);
  with_team(sizes, [&](auto is_block, unsigned blocks) {
    distillation_loss_backward_kernel<is_block><<<blocks, kThreads, 0, scope.stream()>>>(
        sizes, pair, static_cast<const float*>(upstream.data_ptr()),
        output_mask[0] ? grad_student.data_ptr() : nullptr,
        output_mask[1] ? grad_teacher.data_ptr() : nullptr);
  });
  return {grad_student, grad_teacher};
}

}  // namespace

std::vector<Kernel> posterior_kernels() {
  return {
      {"posterior_kernel<block>", reinterpret_cast<const void*>(&posterior_kernel<true>)},
      {"posterior_kernel<thread>", reinterpret_cast<const void*>(&posterior_kernel<false>)},
      {"distillation_loss_kernel<block>",
       reinterpret_cast<const void*>(&distillation_loss_kernel<true>)},
      {"distillation_loss_kernel<thread>",
       reinterpret_cast<const void*>(&distillation_loss_kernel<false>)},
      {"distillation_loss_backward_kernel<block>",
       reinterpret_cast<const void*>(&distillation_loss_backward_kernel<true>)},
      {"distillation_loss_backward_kernel<thread>",
       reinterpret_cast<const void*>(&distillation_loss_backward_kernel<false>)},
  };
}

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cuda, CUDA, m) {
  m.impl("posterior", TORCH_BOX(&posterior));
  m.impl("distillation_loss", TORCH_BOX(&distillation_loss));
  m.impl("distillation_loss_backward", TORCH_BOX(&distillation_loss_backward));
}

}  // namespace genrep_fast
