// Gradient alignment from Gram matrices: GenRep's coefficients, the choice of a tensor's, and the
// combination of the gradients (see genrep_fast/reference/alignment.py).
//
//     out = sum_i c_i g_i                                                    reads n N, writes N, n N multiply-adds
//
// Bound by memory: two float32 gradients take 12 bytes and 2 multiply-adds. The coefficients are a
// few numbers a tensor and a group; their kernels take as long as a launch.
#include <tuple>

#include "alignment.cuh"
#include "introspection.h"

namespace genrep_fast {
namespace {

constexpr int kCombineChunk = kRun;  // small enough that every multiprocessor has several

// cos, rho = ((cos + 1) / 2) ^ power and c_p = w_p - w_g (1 - rho) <p,g> / |p|^2, c_g likewise; the
// weights where a gradient is zero. A thread a group.
__global__ void alignment_coefficients_kernel(
    const double* matrices, int64_t groups, double first_weight, double second_weight, double power,
    double* coefficients, double* cosines, double* alphas) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (group >= groups) {
    return;
  }
  const double first = matrices[4 * group], dot = matrices[4 * group + 1],
               second = matrices[4 * group + 3];
  const bool has_zero = first == 0 || second == 0;
  double cosine = has_zero ? 0.0 : dot / sqrt(first) / sqrt(second);
  cosine = cosine > 1 ? 1.0 : cosine < -1 ? -1.0 : cosine;  // lets NaN through
  const double alpha = pow((cosine + 1) / 2, power);
  coefficients[2 * group] =
      first_weight - (has_zero ? 0.0 : second_weight * (1 - alpha) * (dot / first));
  coefficients[2 * group + 1] =
      second_weight - (has_zero ? 0.0 : first_weight * (1 - alpha) * (dot / second));
  cosines[group] = cosine;
  alphas[group] = alpha;
}

// Groups of consecutive tensors, and what tensors that are not shared get.
struct TensorGroups {
  static constexpr int kCapacity = 960;
  int32_t groups[kCapacity];
  double weights[kMaxLosses];
};

// A thread a tensor, of `count`: row `group` of `coefficients` [G, n] for a shared tensor, the
// weights for any other one.
__global__ void alignment_tensor_coefficients_kernel(
    const __grid_constant__ TensorGroups table, const double* coefficients, const double* grams,
    double* rows, int count, int n) {
  static_assert(
      sizeof(table) + sizeof(coefficients) + sizeof(grams) + sizeof(rows) + sizeof(count) +
          sizeof(n) <=
      kParameterBytes);
  const int t = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (t >= count) {
    return;
  }
  const int64_t group = table.groups[t];
  const double* own = grams + static_cast<int64_t>(t) * n * n;
  const bool is_shared = group >= 0 && every_loss_reaches(own, n);
  for (int i = 0; i < n; ++i) {
    rows[static_cast<int64_t>(t) * n + i] =
        is_shared ? coefficients[group * n + i] : table.weights[i];
  }
}

// out may be one of the gradients: every element is read by the thread that writes it, and before.
template <int N, size_t kBytes>
__global__ __launch_bounds__(kThreads) void alignment_combine_kernel(
    const __grid_constant__ TensorTable<TensorEntry<N + 1>, kBytes> table,
    const __grid_constant__ Coefficients coefficients) {
  static_assert(sizeof(table) + sizeof(coefficients) <= kBytes);
  const auto place = table.place(kCombineChunk);
  float factors[N];
  coefficients.read(place.entry, factors);
  with_quads<N>(place.entry, place.begin, kCombineChunk, [&](const auto& quads) {
#pragma unroll 1
    for (int first = 0; first < kQuadsPerRun; first += kBatch<N>) {
      Quad batch[kBatch<N>][N];
      load_batch<N>(quads, place.begin, first, batch);
#pragma unroll
      for (int q = 0; q < kBatch<N>; ++q) {
        float sum[kQuad];
        weighted_sum<N>(quads, batch[q], factors, sum);
        quads.store(N, quad_offset(place.begin, first + q), sum);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> alignment_coefficients(
    const Tensor& gram, const std::vector<double>& weights, double power) {
  const bool matrices_of_pairs = gram.scalar_type() == ScalarType::Double && gram.dim() == 3 &&
                                 gram.size(1) == 2 && gram.size(2) == 2;
  STD_TORCH_CHECK(matrices_of_pairs, "gram must be float64 [groups, 2, 2]");
  STD_TORCH_CHECK(weights.size() == 2, "weights must have 2 entries, got ", weights.size());
  const int64_t groups = gram.size(0);
  DeviceScope scope(gram);
  Tensor matrices = torch::stable::contiguous(gram);
  Tensor coefficients = new_float64(gram, {groups, 2}), cosine = new_float64(gram, {groups}),
         alpha = new_float64(gram, {groups});
  if (groups > 0) {
    constexpr int kBlock = 64;
    const unsigned blocks = static_cast<unsigned>(ceil_div(groups, kBlock));
    alignment_coefficients_kernel<<<blocks, kBlock, 0, scope.stream()>>>(
        static_cast<const double*>(matrices.data_ptr()), groups, weights[0], weights[1], power,
        static_cast<double*>(coefficients.data_ptr()), static_cast<double*>(cosine.data_ptr()),
        static_cast<double*>(alpha.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {coefficients, cosine, alpha};
}

Tensor tensor_coefficients(
    const Tensor& coefficients, const Tensor& grams, const std::vector<int64_t>& groups,
    const std::vector<double>& weights) {
  const bool matrix = coefficients.scalar_type() == ScalarType::Double && coefficients.dim() == 2;
  STD_TORCH_CHECK(matrix, "coefficients must be float64 [groups, n]");
  const int n = number_of_losses_in(grams, groups, coefficients.size(0));
  STD_TORCH_CHECK(coefficients.size(1) == n, "coefficients must be float64 [groups, ", n, "]");
  const int num_weights = static_cast<int>(weights.size());
  STD_TORCH_CHECK(num_weights == n, "weights must have ", n, " entries, got ", num_weights);
  DeviceScope scope(grams);
  Tensor own = torch::stable::contiguous(grams);
  Tensor group_rows = torch::stable::contiguous(coefficients);
  const int64_t num_tensors = static_cast<int64_t>(groups.size());
  Tensor rows = new_float64(grams, {num_tensors, n});
  TensorGroups table{};
  std::copy(weights.begin(), weights.end(), table.weights);
  for (int64_t first = 0; first < num_tensors; first += TensorGroups::kCapacity) {
    const int64_t left = num_tensors - first;
    const int count = static_cast<int>(std::min<int64_t>(TensorGroups::kCapacity, left));
    std::copy_n(groups.begin() + first, count, table.groups);
    constexpr int kBlock = 64;
    const unsigned blocks = static_cast<unsigned>(ceil_div(count, kBlock));
    alignment_tensor_coefficients_kernel<<<blocks, kBlock, 0, scope.stream()>>>(
        table, static_cast<const double*>(group_rows.data_ptr()),
        static_cast<const double*>(own.data_ptr()) + first * n * n,
        static_cast<double*>(rows.data_ptr()) + first * n, count, n);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return rows;
}

void combine(
    const OptionalTensors& gradients, const Tensor& coefficients,
    const std::vector<int64_t>& groups, const std::vector<double>& weights,
    const std::vector<Tensor>& out) {
  const size_t num_tensors = groups.size();
  STD_TORCH_CHECK(
      out.size() == num_tensors, "out must have ", num_tensors, " entries, got ", out.size());
  const int64_t n = number_of_losses(gradients, num_tensors);
  DeviceScope scope(out[0]);
  scope.check(coefficients);
  Tensor rows = torch::stable::contiguous(coefficients);
  const Coefficients factors = coefficients_of(rows, groups, weights, n);
  with_compiled_losses(n, [&](auto losses) {
    constexpr int N = decltype(losses)::value;
    std::vector<TensorEntry<N + 1>> entries;
    for (size_t t = 0; t < num_tensors; ++t) {
      if (int64_t numel = out[t].numel(); numel > 0) {
        entries.push_back(empty_entry<TensorEntry<N + 1>>(numel, groups[t]));
        set_gradients(entries.back(), gradients, num_tensors, t, scope);
        set_tensor(entries.back(), N, out[t], scope);
      }
    }
    for_each_table(entries, kCombineChunk, [&](const auto& table) {
      alignment_combine_kernel<N, std::decay_t<decltype(table)>::kBytes>
          <<<table.first_chunk[table.size], kThreads, 0, scope.stream()>>>(table, factors);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
}

}  // namespace

std::vector<Kernel> alignment_kernels() {
  std::vector<Kernel> kernels{
      {"alignment_coefficients_kernel",
       reinterpret_cast<const void*>(&alignment_coefficients_kernel)},
      {"alignment_tensor_coefficients_kernel",
       reinterpret_cast<const void*>(&alignment_tensor_coefficients_kernel)},
  };
  for_each_compiled_table([&](auto losses, auto bytes, const std::string& name) {
    kernels.push_back(
        {"alignment_combine_kernel<" + name + ">",
         reinterpret_cast<const void*>(&alignment_combine_kernel<losses.value, bytes.value>)});
  });
  return kernels;
}

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cuda, CUDA, m) {
  m.impl("alignment_coefficients", TORCH_BOX(&alignment_coefficients));
  m.impl("tensor_coefficients", TORCH_BOX(&tensor_coefficients));
  m.impl("combine", TORCH_BOX(&combine));
}

}  // namespace genrep_fast
