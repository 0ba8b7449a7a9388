// Gradient alignment: Gram matrices, GenRep's coefficients, and the combination of the gradients
// (see genrep_fast/reference/alignment.py).
//
//     Gram[k, i, j] = sum over the tensors of group k of <g_i, g_j>          reads n N elements, n (n + 1) / 2 N multiply-adds
//     out = sum_i c_i g_i                                                    reads n N, writes N, n N multiply-adds
//
// Between the two stand a few numbers a tensor and a group: sums of the tensors' own Gram matrices,
// coefficients, the choice of a tensor's.
//
// Both are bound by memory. Gram of two gradients multiplies in float32, where every accumulator
// takes 16 products, and adds up in float64; a block of 1024 elements whose sum of squares may have
// overflowed or lost terms to underflow is done again in float64. Every chunk has a partial sum of
// its own, and the partial sums of a group are added in the order of the chunks, so that the result
// does not depend on the number of threads. Combine writes past the caches unless its output is
// small or one of its inputs: that saves reading the lines it overwrites.
#include <cmath>
#include <numeric>
#include <tuple>

#include "multi_tensor.h"
#include "vector_math.h"

namespace genrep_fast {
namespace {

// A float32 sum of squares outside this range may have overflowed, or lost terms to underflow.
constexpr float kSmallest = 1e-28f, kLargest = 1e38f;

// <a,b> in float64.
GENREP_FAST_INLINE double dot(const float* a, const float* b, int64_t count) {
  constexpr int kUnroll = 4;
  Doubles sums[kUnroll]{};
  int64_t i = 0;
  for (; i + 8 * kUnroll <= count; i += 8 * kUnroll) {
    for (int u = 0; u < kUnroll; ++u) {
      Doubles x = __builtin_convertvector(load<HalfFloats>(a + i + 8 * u), Doubles);
      sums[u] += x * __builtin_convertvector(load<HalfFloats>(b + i + 8 * u), Doubles);
    }
  }
  Doubles total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double sum = horizontal_sum(total);
  for (; i < count; ++i) {
    sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  }
  return sum;
}

// Whether the float32 sum `sum` of squares of all values is right, as it may not be after an
// overflow or underflow; zeros, which are common in gradients, have the right one.
GENREP_FAST_INLINE bool reliable(float sum, const float* values, int64_t count) {
  if (sum != 0) {
    return sum > kSmallest && sum < kLargest;
  }
  Words bits{};
  for (int64_t i = 0; i + kLanes <= count; i += kLanes) {
    bits |= load<Words>(values + i) & 0x7fffffff;
  }
  uint32_t any = 0;
  for (int i = 0; i < kLanes; ++i) {
    any |= bits[i];
  }
  return any == 0;
}

// Adds <a,a>, <a,b>, <b,b> of at most kBlock elements to `sums`: in float32, where every
// accumulator takes 16 products, or in float64.
GENREP_FAST_INLINE void add_pair(const float* a, const float* b, int64_t count, double* sums) {
  constexpr int kUnroll = 4;
  Floats aa[kUnroll]{}, ab[kUnroll]{}, bb[kUnroll]{};
  int64_t i = 0;
  for (; i + kUnroll * kLanes <= count; i += kUnroll * kLanes) {
    for (int u = 0; u < kUnroll; ++u) {
      Floats x = load<Floats>(a + i + u * kLanes), y = load<Floats>(b + i + u * kLanes);
      prefetch(a + i + u * kLanes, kPrefetch);
      prefetch(b + i + u * kLanes, kPrefetch);
      aa[u] += x * x;
      ab[u] += x * y;
      bb[u] += y * y;
    }
  }
  float first = horizontal_sum((aa[0] + aa[1]) + (aa[2] + aa[3]));
  float second = horizontal_sum((bb[0] + bb[1]) + (bb[2] + bb[3]));
  if (reliable(first, a, i) && reliable(second, b, i)) {
    sums[0] += first;
    sums[1] += horizontal_sum((ab[0] + ab[1]) + (ab[2] + ab[3]));
    sums[2] += second;
  } else {
    i = 0;
  }
  sums[0] += dot(a + i, a + i, count - i);
  sums[1] += dot(a + i, b + i, count - i);
  sums[2] += dot(b + i, b + i, count - i);
}

// Upper triangle of one chunk's Gram matrix into `sums`, row by row; rows of missing gradients are
// left alone.
GENREP_FAST_INLINE void gram_chunk_kernel(
    const Buffer* gradients, int64_t n, int64_t begin, int64_t length, double* sums) {
  alignas(64) float scratch[kMaxLosses][kBlock];
  for (int64_t offset = 0; offset < length; offset += kBlock) {
    int64_t count = std::min(kBlock, length - offset);
    const float* values[kMaxLosses]{};
    for (int64_t i = 0; i < n; ++i) {
      if (gradients[i].data) {
        values[i] = read(gradients[i], begin + offset, count, scratch[i]);
      }
    }
    if (n == 2 && values[0] && values[1]) {
      add_pair(values[0], values[1], count, sums);
      continue;
    }
    double* sum = sums;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i; j < n; ++j, ++sum) {
        if (values[i] && values[j]) {
          *sum += dot(values[i], values[j], count);
        }
      }
    }
  }
}

// target = sum_i factors_i values_i; `streaming` stores past the caches.
GENREP_FAST_INLINE void weighted_sum(
    const float* const* values, const float* factors, int64_t n, float* target, int64_t count,
    bool streaming) {
  int64_t i = 0;
  auto one = [&](int64_t end) __attribute__((always_inline)) {
    for (; i < end; ++i) {
      float sum = factors[0] * values[0][i];
      for (int64_t j = 1; j < n; ++j) {
        sum += factors[j] * values[j][i];
      }
      target[i] = sum;
    }
  };
  if (streaming) {  // up to the next cache line
    one(std::min<int64_t>(count, (-(reinterpret_cast<uintptr_t>(target) / 4)) % 16));
  }
  for (; i + kLanes <= count; i += kLanes) {
    Floats sum = factors[0] * load<Floats>(values[0] + i);
    for (int64_t j = 1; j < n; ++j) {
      sum += factors[j] * load<Floats>(values[j] + i);
    }
    streaming ? stream(target + i, sum) : store(target + i, sum);
  }
  one(count);
}

// out = sum_i c_i gradients_i for one chunk; `streaming` asks for stores past the caches.
GENREP_FAST_INLINE void combine_chunk_kernel(
    const Buffer* gradients, const float* coefficients, int64_t n, Buffer out, int64_t begin,
    int64_t length, bool streaming) {
  alignas(64) float scratch[kMaxLosses][kBlock], result[kBlock];
  bool direct = out.element == Element::kFloat;
  for (int64_t offset = 0; offset < length; offset += kBlock) {
    int64_t index = begin + offset, count = std::min(kBlock, length - offset);
    float* target = direct ? reinterpret_cast<float*>(out.at(index)) : result;
    Present present = read_present(gradients, coefficients, n, index, count, scratch);
    if (present.count == 2) {  // unrolled by the compiler
      weighted_sum(present.values, present.factors, 2, target, count, direct && streaming);
    } else {
      weighted_sum(
          present.values, present.factors, present.count, target, count, direct && streaming);
    }
    if (!direct) {
      write(out, index, count, result);
    }
  }
}

GENREP_FAST_CLONES(
    gram_chunk, (const Buffer* gradients, int64_t n, int64_t begin, int64_t length, double* sums),
    gram_chunk_kernel, (gradients, n, begin, length, sums))

GENREP_FAST_CLONES(
    combine_chunk,
    (const Buffer* gradients, const float* coefficients, int64_t n, Buffer out, int64_t begin,
     int64_t length, bool streaming),
    combine_chunk_kernel, (gradients, coefficients, n, out, begin, length, streaming))

Tensor gram(
    StableListHandle gradients, int64_t n, const std::vector<int64_t>& groups, int64_t num_groups) {
  const TensorList tensors = TensorList::of_optional(gradients);
  Gradients table(tensors, groups.size());
  STD_TORCH_CHECK(table.n == n, "gradients must hold n tensors for every group index");
  for (int64_t group : groups) {
    STD_TORCH_CHECK(
        group >= 0 && group < num_groups, "groups must be between 0 and num_groups - 1");
  }
  check_layouts({&tensors}, groups.size());
  std::vector<Chunk> chunks = chunks_of(table.numel);
  int64_t pairs = n * (n + 1) / 2;
  std::vector<double> partials(chunks.size() * pairs);
  torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      gram_chunk(
          table.of(chunks[c].tensor), n, chunks[c].begin, chunks[c].length, &partials[c * pairs]);
    }
  });
  Tensor result = torch::stable::empty({num_groups, n, n}, ScalarType::Double);
  double* matrices = static_cast<double*>(result.mutable_data_ptr());
  std::fill_n(matrices, num_groups * n * n, 0.0);
  for (size_t c = 0; c < chunks.size(); ++c) {
    double* matrix = matrices + groups[chunks[c].tensor] * n * n;
    const double* sum = &partials[c * pairs];
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = i; j < n; ++j) {
        matrix[i * n + j] += *sum++;
      }
    }
  }
  for (int64_t k = 0; k < num_groups; ++k) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        matrices[(k * n + i) * n + j] = matrices[(k * n + j) * n + i];
      }
    }
  }
  return result;
}

// cos, rho = ((cos + 1) / 2) ^ power and c_p = w_p - w_g (1 - rho) <p,g> / |p|^2, c_g likewise; the
// weights where a gradient is zero.
std::tuple<Tensor, Tensor, Tensor> alignment_coefficients(
    Tensor gram, std::vector<double> weights, double power) {
  STD_TORCH_CHECK(
      gram.scalar_type() == ScalarType::Double && gram.dim() == 3 && gram.size(1) == 2 &&
          gram.size(2) == 2,
      "gram must be a float64 tensor of shape [groups, 2, 2]");
  STD_TORCH_CHECK(weights.size() == 2, "weights must be two numbers");
  int64_t groups = gram.size(0);
  gram = torch::stable::contiguous(gram);
  Tensor coefficients = torch::stable::empty({groups, 2}, ScalarType::Double);
  Tensor cosine = torch::stable::empty({groups}, ScalarType::Double);
  Tensor alpha = torch::stable::empty({groups}, ScalarType::Double);
  const double* matrices = static_cast<const double*>(gram.const_data_ptr());
  double* c = static_cast<double*>(coefficients.mutable_data_ptr());
  double* cosines = static_cast<double*>(cosine.mutable_data_ptr());
  double* alphas = static_cast<double*>(alpha.mutable_data_ptr());
  for (int64_t k = 0; k < groups; ++k) {
    double first = matrices[4 * k], inner = matrices[4 * k + 1], second = matrices[4 * k + 3];
    bool zero = first == 0 || second == 0;
    double cosine_k = zero ? 0.0 : inner / std::sqrt(first) / std::sqrt(second);
    cosine_k = cosine_k < -1 ? -1.0 : cosine_k > 1 ? 1.0 : cosine_k;  // lets NaN through
    double rho = std::pow((cosine_k + 1) / 2, power);
    cosines[k] = cosine_k;
    alphas[k] = rho;
    c[2 * k] = weights[0] - (zero ? 0.0 : weights[1] * (1 - rho) * (inner / first));
    c[2 * k + 1] = weights[1] - (zero ? 0.0 : weights[0] * (1 - rho) * (inner / second));
  }
  return {coefficients, cosine, alpha};
}

// Asking first takes less than the call of an operator that has nothing to do.
Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// The tensors' own Gram matrices, checked: [T, n, n] float64 and T group indices from -1 on.
struct OwnMatrices {
  Tensor tensor;
  const std::vector<int64_t>& groups;
  int64_t n;
  const double* matrices;

  OwnMatrices(const Tensor& grams, const std::vector<int64_t>& group_indices, int64_t num_groups)
      : tensor(dense(grams)), groups(group_indices) {
    STD_TORCH_CHECK(
        grams.scalar_type() == ScalarType::Double && grams.dim() == 3 &&
            grams.size(1) == grams.size(2),
        "grams must be a float64 tensor of shape [tensors, n, n]");
    STD_TORCH_CHECK(
        grams.size(0) == static_cast<int64_t>(groups.size()),
        "as many group indices are needed as there are tensors");
    for (int64_t group : groups) {
      STD_TORCH_CHECK(
          group >= -1 && group < num_groups,
          "groups must be between -1 and the number of groups - 1");
    }
    n = grams.size(1);
    matrices = static_cast<const double*>(tensor.const_data_ptr());
  }

  const double* of(int64_t t) const { return matrices + t * n * n; }

  // Whether tensor t has a group and every loss reaches it: no gradient of it is zero everywhere.
  // A NaN is not zero.
  bool shared(int64_t t) const {
    bool reached = groups[t] >= 0;
    for (int64_t i = 0; i < n; ++i) {
      reached &= of(t)[i * (n + 1)] != 0;
    }
    return reached;
  }
};

// Sums of the Gram matrices of each group's shared tensors, in the order of the tensors.
Tensor group_gram(Tensor grams, std::vector<int64_t> groups, int64_t num_groups) {
  OwnMatrices own(grams, groups, num_groups);
  int64_t entries = own.n * own.n;
  Tensor result = torch::stable::empty({num_groups, own.n, own.n}, ScalarType::Double);
  double* matrices = static_cast<double*>(result.mutable_data_ptr());
  std::fill_n(matrices, num_groups * entries, 0.0);
  for (size_t t = 0; t < groups.size(); ++t) {
    if (own.shared(t)) {
      for (int64_t k = 0; k < entries; ++k) {
        matrices[groups[t] * entries + k] += own.of(t)[k];
      }
    }
  }
  return result;
}

// Row groups[t] of `coefficients` for a shared tensor, `weights` for any other one.
Tensor tensor_coefficients(
    Tensor coefficients, Tensor grams, std::vector<int64_t> groups, std::vector<double> weights) {
  STD_TORCH_CHECK(
      coefficients.scalar_type() == ScalarType::Double && coefficients.dim() == 2,
      "coefficients must be a float64 tensor of shape [groups, n]");
  OwnMatrices own(grams, groups, coefficients.size(0));
  STD_TORCH_CHECK(
      coefficients.size(1) == own.n, "coefficients must have as many columns as there are losses");
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == own.n, "weights must be n numbers");
  Tensor rows_of_groups = dense(coefficients);
  const double* group_rows = static_cast<const double*>(rows_of_groups.const_data_ptr());
  int64_t num_tensors = static_cast<int64_t>(groups.size());
  Tensor result = torch::stable::empty({num_tensors, own.n}, ScalarType::Double);
  double* rows = static_cast<double*>(result.mutable_data_ptr());
  for (int64_t t = 0; t < num_tensors; ++t) {
    const double* row = own.shared(t) ? group_rows + groups[t] * own.n : weights.data();
    std::copy_n(row, own.n, rows + t * own.n);
  }
  return result;
}

void combine(
    StableListHandle gradients, const Tensor& coefficients, const std::vector<int64_t>& groups,
    const std::vector<double>& weights, StableListHandle out) {
  const TensorList tensors = TensorList::of_optional(gradients);
  const TensorList results = TensorList::of(out);
  Gradients table(tensors, groups.size());
  std::vector<Buffer> targets = buffers_of(results, table);
  check_layouts({&tensors, &results}, groups.size());
  std::vector<float> factors = factors_of(coefficients, groups, weights, table.n);
  std::vector<Chunk> chunks = chunks_of(table.numel);
  int64_t bytes = 4 * std::accumulate(table.numel.begin(), table.numel.end(), int64_t{0});
  // Where an output is one of the inputs, its lines are in the caches already.
  std::vector<char> streaming(groups.size());
  for (size_t t = 0; t < groups.size(); ++t) {
    auto is_output = [&](Buffer gradient) { return gradient.data == targets[t].data; };
    streaming[t] =
        bytes >= kStreamingBytes && std::none_of(table.of(t), table.of(t) + table.n, is_output);
  }
  torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Chunk& chunk = chunks[c];
      combine_chunk(
          table.of(chunk.tensor), &factors[chunk.tensor * table.n], table.n, targets[chunk.tensor],
          chunk.begin, chunk.length, streaming[chunk.tensor]);
    }
    stream_fence();
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cpu, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("group_gram", TORCH_BOX(&group_gram));
  m.impl("alignment_coefficients", TORCH_BOX(&alignment_coefficients));
  m.impl("tensor_coefficients", TORCH_BOX(&tensor_coefficients));
  m.impl("combine", TORCH_BOX(&combine));
}

}  // namespace genrep_fast
