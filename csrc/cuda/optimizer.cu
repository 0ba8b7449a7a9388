// Optimizer step fused with the combination of gradients and the moving average of the parameters
// (see genrep_fast/reference/optimizer.py).
//
//     h = sum_i c_i g_i
//     m <- m + (1 - beta1) (h - m),    v <- beta2 v + (1 - beta2) h^2
//     param <- (1 - lr weight_decay) param - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
//     ema <- ema + (1 - ema_decay) (param - ema)
//
// Reads n gradients and 4 tensors and writes 4: 10 N elements, 40 N bytes for two losses in
// float32, for about 25 N operations: bound by memory. What depends on the step and the learning
// rate is computed in float64, once a block, from numbers that may lie on the device; the rest in
// float32.
#include "introspection.h"
#include "multi_tensor.cuh"

namespace genrep_fast {
namespace {

constexpr int kAdamWChunk = kRun;

// A number that is known now, or where `pointer` is set, when the kernel runs.
struct Scalar {
  double value;
  const void* pointer;
  Dtype dtype;

  __device__ double read() const {
    if (pointer == nullptr) {
      return value;
    }
    switch (dtype) {
      case kFloat32:
        return *static_cast<const float*>(pointer);
      case kBFloat16:
        return __bfloat162float(*static_cast<const __nv_bfloat16*>(pointer));
      case kFloat16:
        return __half2float(*static_cast<const __half*>(pointer));
      default:
        return *static_cast<const double*>(pointer);
    }
  }
};

// Slots after the gradients of N losses.
template <int N>
struct AdamWEntry : TensorEntry<N + 4> {
  static constexpr int kParam = N, kExpAvg = N + 1, kExpAvgSq = N + 2, kEma = N + 3;
  Scalar step;
};

struct AdamWArguments {
  Coefficients coefficients;
  Scalar lr, found_inf;
  double beta1, beta2, weight_decay;
  float exp_avg_weight, exp_avg_sq_decay, exp_avg_sq_weight, eps,
      ema_weight;  // 1 - beta1, beta2, 1 - beta2, eps, 1 - ema_decay
};

// What a block computes once: 1 - lr weight_decay, lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step).
struct StepFactors {
  float param_decay, step_size, denominator_scale;
};

// Two threads of different warps do one power each.
__device__ void set_step_factors(
    const AdamWArguments& arguments, const Scalar& step, StepFactors& factors) {
  if (threadIdx.x == 0) {
    const double lr = arguments.lr.read();
    factors.param_decay = static_cast<float>(1 - lr * arguments.weight_decay);
    factors.step_size = static_cast<float>(lr / (1 - pow(arguments.beta1, step.read())));
  } else if (threadIdx.x == 32) {
    factors.denominator_scale = static_cast<float>(1 / sqrt(1 - pow(arguments.beta2, step.read())));
  }
}

// As torch.lerp: exact at both ends.
__device__ float lerp(float start, float end, float weight) {
  return weight < 0.5f ? start + weight * (end - start) : end - (end - start) * (1 - weight);
}

// One quad of every tensor of a parameter.
template <int N, typename Quads>
__device__ void update_quad(
    const Quads& quads, int64_t offset, const float (&factors)[N], const StepFactors& step,
    const AdamWArguments& arguments) {
  using Entry = AdamWEntry<N>;
  Quad gradients[N];
  for (int i = 0; i < N; ++i) {
    gradients[i] = quads.load(i, offset);
  }
  const Quad params = quads.load(Entry::kParam, offset),
             exp_avgs = quads.load(Entry::kExpAvg, offset);
  const Quad exp_avg_sqs = quads.load(Entry::kExpAvgSq, offset);
  const bool has_ema = quads.entry.pointers[Entry::kEma] != nullptr;
  const Quad emas = has_ema ? quads.load(Entry::kEma, offset) : Quad{};

  float sum[kQuad], param[kQuad], exp_avg[kQuad], exp_avg_sq[kQuad];
  weighted_sum<N>(quads, gradients, factors, sum);
  for (int k = 0; k < kQuad; ++k) {
    exp_avg[k] =
        lerp(unpack(exp_avgs, quads.dtype(Entry::kExpAvg), k), sum[k], arguments.exp_avg_weight);
    exp_avg_sq[k] =
        arguments.exp_avg_sq_decay * unpack(exp_avg_sqs, quads.dtype(Entry::kExpAvgSq), k);
    exp_avg_sq[k] += arguments.exp_avg_sq_weight * sum[k] * sum[k];
    const float update =
        exp_avg[k] / (sqrtf(exp_avg_sq[k]) * step.denominator_scale + arguments.eps);
    param[k] =
        step.param_decay * unpack(params, quads.dtype(Entry::kParam), k) - step.step_size * update;
  }
  quads.store(Entry::kExpAvg, offset, exp_avg);
  quads.store(Entry::kExpAvgSq, offset, exp_avg_sq);
  quads.store(Entry::kParam, offset, param);
  if (has_ema) {
    const Quad stored = pack(param, quads.dtype(Entry::kParam));
    float ema[kQuad];
    for (int k = 0; k < kQuad; ++k) {
      ema[k] = lerp(
          unpack(emas, quads.dtype(Entry::kEma), k), unpack(stored, quads.dtype(Entry::kParam), k),
          arguments.ema_weight);
    }
    quads.store(Entry::kEma, offset, ema);
  }
}

template <int N, size_t kBytes>
__global__ __launch_bounds__(kThreads) void adamw_step_kernel(
    const __grid_constant__ TensorTable<AdamWEntry<N>, kBytes> table,
    const __grid_constant__ AdamWArguments arguments) {
  static_assert(sizeof(table) + sizeof(arguments) <= kBytes);
  if (arguments.found_inf.read() != 0) {
    return;
  }
  const auto place = table.place(kAdamWChunk);
  __shared__ StepFactors step;
  set_step_factors(arguments, place.entry.step, step);
  float factors[N];
  arguments.coefficients.read(place.entry, factors);
  __syncthreads();
  with_quads<N>(place.entry, place.begin, kAdamWChunk, [&](const auto& quads) {
#pragma unroll 1
    for (int quad = 0; quad < kQuadsPerRun; ++quad) {
      update_quad<N>(quads, quad_offset(place.begin, quad), factors, step, arguments);
    }
  });
}

double host_value(const Tensor& tensor, Dtype dtype) {
  const void* pointer = tensor.data_ptr();
  switch (dtype) {
    case kFloat32:
      return *static_cast<const float*>(pointer);
    case kBFloat16:
      return static_cast<float>(*static_cast<const torch::headeronly::BFloat16*>(pointer));
    case kFloat16:
      return static_cast<float>(*static_cast<const torch::headeronly::Half*>(pointer));
    default:
      return *static_cast<const double*>(pointer);
  }
}

Scalar scalar_of(const Tensor& tensor, const DeviceScope& scope) {
  STD_TORCH_CHECK(
      tensor.numel() == 1, "step, lr and found_inf must have one element, got ", tensor.numel());
  const Dtype dtype = dtype_of(tensor);
  if (tensor.is_cpu()) {
    return {host_value(tensor, dtype), nullptr, dtype};
  }
  scope.check(tensor);
  return {0, tensor.data_ptr(), dtype};
}

void adamw_step(
    const std::vector<Tensor>& params, const std::vector<Tensor>& exp_avgs,
    const std::vector<Tensor>& exp_avg_sqs, const std::vector<Tensor>& emas,
    const OptionalTensors& gradients, const Tensor& coefficients,
    const std::vector<int64_t>& groups, const std::vector<double>& weights,
    const std::vector<Tensor>& steps, const Tensor& lr, double beta1, double beta2, double eps,
    double weight_decay, double ema_decay, const std::optional<Tensor>& found_inf) {
  const size_t num_tensors = params.size();
  for (size_t length :
       {exp_avgs.size(), exp_avg_sqs.size(), emas.empty() ? num_tensors : emas.size(),
        groups.size(), steps.size()}) {
    STD_TORCH_CHECK(
        length == num_tensors, "there are ", num_tensors, " params, but ", length,
        " of their other tensors or groups");
  }
  const int64_t n = number_of_losses(gradients, num_tensors);
  DeviceScope scope(params[0]);
  scope.check(coefficients);
  Tensor rows = torch::stable::contiguous(coefficients);
  const AdamWArguments arguments{
      coefficients_of(rows, groups, weights, n),
      scalar_of(lr, scope),
      found_inf.has_value() ? scalar_of(*found_inf, scope) : Scalar{},
      beta1,
      beta2,
      weight_decay,
      static_cast<float>(1 - beta1),
      static_cast<float>(beta2),
      static_cast<float>(1 - beta2),
      static_cast<float>(eps),
      static_cast<float>(1 - ema_decay),
  };
  with_compiled_losses(n, [&](auto losses) {
    using Entry = AdamWEntry<decltype(losses)::value>;
    std::vector<Entry> entries;
    for (size_t t = 0; t < num_tensors; ++t) {
      if (params[t].numel() == 0) {
        continue;
      }
      Entry entry = empty_entry<Entry>(params[t].numel(), groups[t]);
      set_gradients(entry, gradients, num_tensors, t, scope);
      set_tensor(entry, Entry::kParam, params[t], scope);
      set_tensor(entry, Entry::kExpAvg, exp_avgs[t], scope);
      set_tensor(entry, Entry::kExpAvgSq, exp_avg_sqs[t], scope);
      if (!emas.empty()) {
        set_tensor(entry, Entry::kEma, emas[t], scope);
      }
      entry.step = scalar_of(steps[t], scope);
      entries.push_back(entry);
    }
    for_each_table(entries, kAdamWChunk, [&](const auto& table) {
      adamw_step_kernel<decltype(losses)::value, std::decay_t<decltype(table)>::kBytes>
          <<<table.first_chunk[table.size], kThreads, 0, scope.stream()>>>(table, arguments);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
}

}  // namespace

std::vector<Kernel> optimizer_kernels() {
  std::vector<Kernel> kernels;
  for_each_compiled_table([&](auto losses, auto bytes, const std::string& name) {
    kernels.push_back(
        {"adamw_step_kernel<" + name + ">",
         reinterpret_cast<const void*>(&adamw_step_kernel<losses.value, bytes.value>)});
  });
  return kernels;
}

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cuda, CUDA, m) {
  m.impl("adamw_step", TORCH_BOX(&adamw_step));
}

}  // namespace genrep_fast
