// Posteriors, and the loss of distilling them into a student with its gradients (see
// genrep_fast/reference/posterior.py).
//
//     s = L / temperature + log prior,   log p = s - logsumexp_y s,   log q likewise of the student
//     KL = sum_y p (log p - log q)
//     dKL/dlogits = q - p,   dKL/dL = p (log p - log q - KL) / temperature
//
// Reads K numbers of an image or location once, 2 or 4 bytes each, and writes as many at most: bound
// by memory.
#include "posterior.cuh"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "introspection.h"

namespace genrep_fast {
namespace {

// Of a multiprocessor, for enough loads in flight; those that read several shares need registers
// more.
template <int kClasses, bool kSeveral>
constexpr int blocks_of(int few, int many) {
  if (kSeveral) {
    return 1;
  }
  return kClasses == kFewClasses ? few : many;
}

template <int kClasses, bool kSeveral>
__global__ __launch_bounds__(kThreads, blocks_of<kClasses, kSeveral>(6, 3)) void posterior_kernel(
    const __grid_constant__ Sizes sizes, const __grid_constant__ Scores scores, float* result) {
  const Team team(sizes);
  Share<kClasses, kSeveral> share(team, scores);
  const LogSum total = log_sum(team, scores, share);
  share.for_each(team, [&](int first) {
    share.require(team, scores, first);
    const float shift = share.shift(total.maximum);
    const int count = team.count(first);
    float* target = result + team.index(first);
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      if (j < count) {
        *target = share.differences[j] + shift - total.log_weight;
      }
      target += team.step();
    }
  });
}

// p, q and log p - log q of one class
struct Ratio {
  float p, q, log_ratio;
};

// The scores of teacher and student of a thread's classes.
template <int kClasses, bool kSeveral>
struct Pair {
  const Team& team;
  const Scores &teacher_scores, &student_scores;
  Share<kClasses, kSeveral> teacher, student;
  LogSum teacher_total, student_total;

  __device__ Pair(const Team& given, const Scores& p, const Scores& q)
      : team(given),
        teacher_scores(p),
        student_scores(q),
        teacher(team, p),
        student(team, q),
        teacher_total(log_sum(team, p, teacher)),
        student_total(log_sum(team, q, student)) {}

  // Calls work(first, ratio_at) for each share, in which ratio_at(j) is a class's.
  template <typename Work>
  __device__ void for_each_share(Work work) {
    teacher.for_each(team, [&](int first) {
      teacher.require(team, teacher_scores, first);
      student.require(team, student_scores, first);
      const float teacher_shift = teacher.shift(teacher_total.maximum),
                  student_shift = student.shift(student_total.maximum);
      work(first, [&](int j) -> Ratio {
        const float log_p = teacher.differences[j] + teacher_shift - teacher_total.log_weight,
                    log_q = student.differences[j] + student_shift - student_total.log_weight;
        return {expf(log_p), expf(log_q), log_p - log_q};
      });
    });
  }

  // KL; 0 log 0 = 0
  __device__ float divergence() {
    double total = 0;
    for_each_share([&](int, auto ratio_at) {
#pragma unroll
      for (int begin = 0; begin < kClasses; begin += 8) {
        float sum = 0;
#pragma unroll
        for (int j = begin; j < begin + 8; ++j) {
          const Ratio ratio = ratio_at(j);
          sum += ratio.p == 0 ? 0.f : ratio.p * ratio.log_ratio;
        }
        total += sum;
      }
    });
    return static_cast<float>(team.sum(total));
  }
};

template <int kClasses, bool kSeveral>
__global__
__launch_bounds__(kThreads, blocks_of<kClasses, kSeveral>(5, 2)) void distillation_loss_kernel(
    const __grid_constant__ Sizes sizes, const __grid_constant__ Scores teacher,
    const __grid_constant__ Scores student, float* loss) {
  const Team team(sizes);
  Pair<kClasses, kSeveral> pair(team, teacher, student);
  const float divergence = pair.divergence();
  if (team.slice == 0 && team.exists()) {
    loss[team.item()] = divergence;
  }
}

// A gradient whose memory is null is not wanted.
template <int kClasses, bool kSeveral>
__global__
__launch_bounds__(kThreads, blocks_of<kClasses, kSeveral>(4, 2)) void distillation_loss_backward_kernel(
    const __grid_constant__ Sizes sizes, const __grid_constant__ Scores teacher,
    const __grid_constant__ Scores student, const float* grad, void* grad_student,
    void* grad_teacher) {
  const Team team(sizes);
  Pair<kClasses, kSeveral> pair(team, teacher, student);
  const float divergence = grad_teacher == nullptr ? 0.f : pair.divergence();
  const float factor = team.exists() ? grad[team.item()] : 0.f;
  pair.for_each_share([&](int first, auto ratio_at) {
    const int count = team.count(first);
    int64_t index = team.index(first);
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      if (j < count) {
        const Ratio ratio = ratio_at(j);
        if (grad_student != nullptr) {
          store_element(grad_student, student.dtype, index, factor * (ratio.q - ratio.p));
        }
        if (grad_teacher != nullptr) {
          const float slope = ratio.p == 0 ? 0.f : ratio.p * (ratio.log_ratio - divergence);
          store_element(
              grad_teacher, teacher.dtype, index, factor * slope * teacher.rounded_inverse);
        }
      }
      index += team.step();
    }
  });
}

// ---- launches ----

Sizes sizes_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() >= 2, "log_likelihood must be [B, K, *loc]");
  STD_TORCH_CHECK(
      tensor.size(1) <= int64_t{1} << 30, "there must be at most 2^30 classes, got ",
      tensor.size(1));
  Sizes sizes{tensor.size(0), tensor.size(1), 1, 0};
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
  const double inverse = 1 / temperature;
  const float rounded = static_cast<float>(std::clamp<double>(inverse, FLT_MIN, FLT_MAX));
  Scores scores{tensor.data_ptr(), dtype, inverse == 1 && !prior, inverse, rounded, nullptr, 0};
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

// Classes of a thread, and whether a block's threads have several shares of so many.
template <int kClassesOfAThread, bool kSeveralShares>
struct Division {
  static constexpr int kClasses = kClassesOfAThread;
  static constexpr bool kSeveral = kSeveralShares;
};

// Calls launch(division, sizes, blocks), unless there is nothing to do.
template <typename Launch>
void with_division(Sizes sizes, Launch launch) {
  const int64_t items = sizes.batch * sizes.locations;
  if (items * sizes.classes == 0) {
    return;
  }
  const int64_t most = sizes.locations == 1 ? kThreads : kMostLocationSlices;
  const bool few = sizes.classes <= kFewClasses * most;
  const int64_t share = few ? kFewClasses : kManyClasses;
  while (share << sizes.slice_bits < sizes.classes && sizes.slices() < kThreads) {
    ++sizes.slice_bits;
  }
  const unsigned blocks = grid_of(ceil_div(items, sizes.width()));
  if (few) {
    launch(Division<kFewClasses, false>{}, sizes, blocks);
  } else if (sizes.classes <= kManyClasses * kThreads) {
    launch(Division<kManyClasses, false>{}, sizes, blocks);
  } else {
    launch(Division<kManyClasses, true>{}, sizes, blocks);
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
  const Tensor teacher = torch::stable::contiguous(log_likelihood);
  const std::optional<Tensor> prior = contiguous(log_prior);
  const Scores scores = scores_of(teacher, prior, temperature);
  Tensor result = torch::stable::new_empty(teacher, teacher.sizes(), ScalarType::Float);
  with_division(sizes_of(teacher), [&](auto division, const Sizes& sizes, unsigned blocks) {
    using D = decltype(division);
    posterior_kernel<D::kClasses, D::kSeveral><<<blocks, kThreads, 0, scope.stream()>>>(
        sizes, scores, static_cast<float*>(result.data_ptr()));
  });
  return result;
}

Tensor distillation_loss(
    const Tensor& student_logits, const Tensor& log_likelihood,
    const std::optional<Tensor>& log_prior, double temperature) {
  DeviceScope scope(log_likelihood);
  const Tensor teacher = torch::stable::contiguous(log_likelihood),
               student = torch::stable::contiguous(student_logits);
  check_shape(student, {teacher.sizes().begin(), teacher.sizes().end()}, teacher, "student_logits");
  const std::optional<Tensor> prior = contiguous(log_prior);
  const Scores teacher_scores = scores_of(teacher, prior, temperature);
  const Scores student_scores = scores_of(student, std::nullopt, 1);
  Tensor loss =
      torch::stable::new_empty(teacher, sizes_without_classes(teacher), ScalarType::Float);
  with_division(sizes_of(teacher), [&](auto division, const Sizes& sizes, unsigned blocks) {
    using D = decltype(division);
    distillation_loss_kernel<D::kClasses, D::kSeveral><<<blocks, kThreads, 0, scope.stream()>>>(
        sizes, teacher_scores, student_scores, static_cast<float*>(loss.data_ptr()));
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
  const Tensor teacher = torch::stable::contiguous(log_likelihood),
               student = torch::stable::contiguous(student_logits);
  const Tensor upstream = torch::stable::contiguous(grad);
  check_shape(student, {teacher.sizes().begin(), teacher.sizes().end()}, teacher, "student_logits");
  check_shape(upstream, sizes_without_classes(teacher), teacher, "grad");
  STD_TORCH_CHECK(upstream.scalar_type() == ScalarType::Float, "grad must be float32");
  const std::optional<Tensor> prior = contiguous(log_prior);
  const Scores teacher_scores = scores_of(teacher, prior, temperature);
  const Scores student_scores = scores_of(student, std::nullopt, 1);
  auto gradient_of = [&](bool needed, const Tensor& like) {
    return needed ? torch::stable::new_empty(like, like.sizes())
                  : torch::stable::new_empty(grad, std::vector<int64_t>{0});
  };
  Tensor grad_student = gradient_of(output_mask[0], student),
         grad_teacher = gradient_of(output_mask[1], teacher);
  with_division(sizes_of(teacher), [&](auto division, const Sizes& sizes, unsigned blocks) {
    using D = decltype(division);
    distillation_loss_backward_kernel<D::kClasses, D::kSeveral>
        <<<blocks, kThreads, 0, scope.stream()>>>(
            sizes, teacher_scores, student_scores, static_cast<const float*>(upstream.data_ptr()),
            output_mask[0] ? grad_student.data_ptr() : nullptr,
            output_mask[1] ? grad_teacher.data_ptr() : nullptr);
  });
  return {grad_student, grad_teacher};
}

}  // namespace

std::vector<Kernel> posterior_kernels() {
  std::vector<Kernel> kernels;
  auto add = [&](auto division, const std::string& classes) {
    using D = decltype(division);
    auto add_kernel = [&](const char* name, auto* kernel) {
      kernels.push_back({name + classes, reinterpret_cast<const void*>(kernel)});
    };
    add_kernel("posterior_kernel", &posterior_kernel<D::kClasses, D::kSeveral>);
    add_kernel("distillation_loss_kernel", &distillation_loss_kernel<D::kClasses, D::kSeveral>);
    add_kernel(
        "distillation_loss_backward_kernel",
        &distillation_loss_backward_kernel<D::kClasses, D::kSeveral>);
  };
  add(Division<kFewClasses, false>{}, "<8>");
  add(Division<kManyClasses, false>{}, "<32>");
  add(Division<kManyClasses, true>{}, "<32, several>");
  return kernels;
}

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cuda, CUDA, m) {
  m.impl("posterior", TORCH_BOX(&posterior));
  m.impl("distillation_loss", TORCH_BOX(&distillation_loss));
  m.impl("distillation_loss_backward", TORCH_BOX(&distillation_loss_backward));
}

}  // namespace genrep_fast
