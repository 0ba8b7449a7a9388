// Lists of tensors as the kernels see them: flat memory, cut into chunks of at most kChunk
// elements.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensor_list.h"

namespace genrep_fast {

constexpr int64_t kMaxLosses = 8;
// Elements. The order of every sum follows from it, and never from the number of threads.
constexpr int64_t kChunk = 16384;
// Elements that are asked for ahead of their use: memory then delivers 5 to 10 % more.
constexpr int64_t kPrefetch = 2048;

struct Chunk {
  int64_t tensor;
  int64_t begin;  // elements
  int64_t length;
};

// Gradients of n losses for T tensors, flattened loss by loss in the operators' arguments.
struct Gradients {
  int64_t n;
  std::vector<Buffer> buffers;  // [T, n]
  std::vector<int64_t> numel;   // [T], 0 where no loss reaches the tensor

  Gradients(const TensorList& gradients, int64_t num_tensors) : n(0), numel(num_tensors) {
    STD_TORCH_CHECK(
        num_tensors > 0 && gradients.size() % num_tensors == 0,
        "gradients must be a multiple of the number of groups");
    n = gradients.size() / num_tensors;
    STD_TORCH_CHECK(n <= kMaxLosses, "gradients of at most 8 losses are supported");
    buffers.resize(gradients.size());
    for (int64_t t = 0; t < num_tensors; ++t) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t place = i * num_tensors + t;
        if (gradients.has(place)) {
          const int64_t elements = gradients.numel(place);
          STD_TORCH_CHECK(
              numel[t] == 0 || elements == numel[t],
              "gradients of a tensor must have the same size");
          buffers[t * n + i] = gradients.buffer(place);
          numel[t] = elements;
        }
      }
    }
  }

  const Buffer* of(int64_t tensor) const { return &buffers[tensor * n]; }
};

// Memory of T tensors that belong to the gradients of `table`.
inline std::vector<Buffer> buffers_of(const TensorList& tensors, const Gradients& table) {
  STD_TORCH_CHECK(
      tensors.size() == static_cast<int64_t>(table.numel.size()),
      "as many tensors are needed as there are groups");
  std::vector<Buffer> buffers;
  buffers.reserve(tensors.size());
  for (int64_t t = 0; t < tensors.size(); ++t) {
    STD_TORCH_CHECK(
        table.numel[t] == 0 || tensors.numel(t) == table.numel[t],
        "tensors must have the sizes of their gradients");
    buffers.push_back(tensors.buffer(t));
  }
  return buffers;
}

// [T, n] float32 factors of the gradients: row groups[t] of `coefficients` [G, n] float64, or
// `weights` for group -1.
inline std::vector<float> factors_of(
    const Tensor& coefficients, const std::vector<int64_t>& groups,
    const std::vector<double>& weights, int64_t n) {
  STD_TORCH_CHECK(
      coefficients.scalar_type() == ScalarType::Double && coefficients.dim() == 2 &&
          coefficients.size(1) == n,
      "coefficients must be a float64 tensor of shape [groups, n]");
  Tensor dense = torch::stable::contiguous(coefficients);
  const double* rows = static_cast<const double*>(dense.const_data_ptr());
  std::vector<float> factors;
  factors.reserve(groups.size() * n);
  for (int64_t group : groups) {
    STD_TORCH_CHECK(
        group >= -1 && group < coefficients.size(0), "groups must be rows of coefficients, or -1");
    STD_TORCH_CHECK(
        group >= 0 || static_cast<int64_t>(weights.size()) == n,
        "weights must be n numbers where a group is -1");
    const double* row = group < 0 ? weights.data() : rows + group * n;
    factors.insert(factors.end(), row, row + n);
  }
  return factors;
}

// All elements of all tensors, in order.
inline std::vector<Chunk> chunks_of(const std::vector<int64_t>& numel) {
  std::vector<Chunk> chunks;
  chunks.reserve(numel.size());
  for (size_t t = 0; t < numel.size(); ++t) {
    for (int64_t begin = 0; begin < numel[t]; begin += kChunk) {
      chunks.push_back({static_cast<int64_t>(t), begin, std::min(kChunk, numel[t] - begin)});
    }
  }
  return chunks;
}

// The gradients that are there, as float32, and their factors.
struct Present {
  const float* values[kMaxLosses];
  float factors[kMaxLosses];
  int64_t count = 0;
};

// `count` <= kBlock elements from `index` on; `scratch` takes copies of what is not float32.
GENREP_FAST_INLINE Present read_present(
    const Buffer* gradients, const float* coefficients, int64_t n, int64_t index, int64_t count,
    float (*scratch)[kBlock]) {
  Present present;
  for (int64_t i = 0; i < n; ++i) {
    if (gradients[i].data) {
      present.values[present.count] = read(gradients[i], index, count, scratch[i]);
      present.factors[present.count++] = coefficients[i];
    }
  }
  return present;
}

}  // namespace genrep_fast
