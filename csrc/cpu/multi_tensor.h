// Lists of tensors as the kernels see them: flat memory, cut into chunks of at most kChunk elements.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "vector.h"

namespace genrep_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensors = std::vector<std::optional<Tensor>>;

constexpr int64_t kMaxLosses = 8;
constexpr int64_t kChunk = 16384;  // elements; the order of every sum follows from it, and never from the number of threads
constexpr int64_t kBlock = 1024;     // elements that are worked on together; their copies in float32 stay in the first-level cache
constexpr int64_t kPrefetch = 2048;  // elements that are asked for ahead of their use: memory then delivers 5 to 10 % more

enum class Element : int32_t { kFloat, kBFloat16, kHalf };

// Memory of one tensor; null where a loss does not reach the parameter.
struct Buffer {
  char* data = nullptr;
  Element element = Element::kFloat;

  char* at(int64_t index) const { return data + index * (element == Element::kFloat ? 4 : 2); }
};

struct Chunk {
  int64_t tensor;
  int64_t begin;  // elements
  int64_t length;
};

inline Buffer buffer_of(const Tensor& tensor) {
  Buffer buffer{static_cast<char*>(tensor.data_ptr())};
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      buffer.element = Element::kFloat;
      break;
    case ScalarType::BFloat16:
      buffer.element = Element::kBFloat16;
      break;
    case ScalarType::Half:
      buffer.element = Element::kHalf;
      break;
    default:
      STD_TORCH_CHECK(false, "tensors must be float32, bfloat16 or float16");
  }
  return buffer;
}

// Gradients of n losses for T tensors, flattened loss by loss in the operators' arguments.
struct Gradients {
  int64_t n;
  std::vector<Buffer> buffers;  // [T, n]
  std::vector<int64_t> numel;   // [T], 0 where no loss reaches the tensor

  Gradients(const OptionalTensors& gradients, int64_t num_tensors) : n(0), numel(num_tensors) {
    STD_TORCH_CHECK(num_tensors > 0 && gradients.size() % num_tensors == 0, "gradients must be a multiple of the number of groups");
    n = static_cast<int64_t>(gradients.size()) / num_tensors;
    STD_TORCH_CHECK(n <= kMaxLosses, "gradients of at most 8 losses are supported");
    buffers.resize(gradients.size());
    for (int64_t t = 0; t < num_tensors; ++t) {
      for (int64_t i = 0; i < n; ++i) {
        const std::optional<Tensor>& gradient = gradients[i * num_tensors + t];
        if (gradient.has_value()) {
          STD_TORCH_CHECK(numel[t] == 0 || gradient->numel() == numel[t], "gradients of a tensor must have the same size");
          buffers[t * n + i] = buffer_of(*gradient);
          numel[t] = gradient->numel();
        }
      }
    }
  }

  const Buffer* of(int64_t tensor) const { return &buffers[tensor * n]; }
};

// Memory of T tensors that belong to the gradients of `table`.
inline std::vector<Buffer> buffers_of(const std::vector<Tensor>& tensors, const Gradients& table) {
  STD_TORCH_CHECK(tensors.size() == table.numel.size(), "as many tensors are needed as there are groups");
  std::vector<Buffer> buffers;
  buffers.reserve(tensors.size());
  for (size_t t = 0; t < tensors.size(); ++t) {
    STD_TORCH_CHECK(table.numel[t] == 0 || tensors[t].numel() == table.numel[t], "tensors must have the sizes of their gradients");
    buffers.push_back(buffer_of(tensors[t]));
  }
  return buffers;
}

// [T, n] float32 factors of the gradients: row groups[t] of `coefficients` [G, n] float64, or `weights` for group -1.
inline std::vector<float> factors_of(
    const Tensor& coefficients, const std::vector<int64_t>& groups, const std::vector<double>& weights, int64_t n) {
  STD_TORCH_CHECK(
      coefficients.scalar_type() == ScalarType::Double && coefficients.dim() == 2 && coefficients.size(1) == n,
      "coefficients must be a float64 tensor of shape [groups, n]");
  Tensor dense = torch::stable::contiguous(coefficients);
  const double* rows = static_cast<const double*>(dense.const_data_ptr());
  std::vector<float> factors;
  factors.reserve(groups.size() * n);
  for (int64_t group : groups) {
    STD_TORCH_CHECK(group >= -1 && group < coefficients.size(0), "groups must be rows of coefficients, or -1");
    STD_TORCH_CHECK(group >= 0 || static_cast<int64_t>(weights.size()) == n, "weights must be n numbers where a group is -1");
    const double* row = group < 0 ? weights.data() : rows + group * n;
    factors.insert(factors.end(), row, row + n);
  }
  return factors;
}

// All elements of all tensors, in order.
inline std::vector<Chunk> chunks_of(const std::vector<int64_t>& numel) {
  std::vector<Chunk> chunks;
  for (size_t t = 0; t < numel.size(); ++t) {
    for (int64_t begin = 0; begin < numel[t]; begin += kChunk) {
      chunks.push_back({static_cast<int64_t>(t), begin, std::min(kChunk, numel[t] - begin)});
    }
  }
  return chunks;
}

// Integer arithmetic, because the baseline has no instructions for float16 and the others spend less time on it than on memory.
GENREP_FAST_INLINE Floats widen(HalfWords words, Element element) {
  Words bits = __builtin_convertvector(words, Words);
  if (element == Element::kBFloat16) {
    return as<Floats>(bits << 16);
  }
  // The exponent's bias differs by 112; the multiplication gives subnormal numbers their exponent, too.
  Words magnitude = as<Words>(as<Floats>((bits & 0x7fff) << 13) * 0x1p112f);
  magnitude |= (bits & 0x7c00) == 0x7c00 ? Words{} + 0x7f800000 : Words{};
  return as<Floats>(magnitude | (bits & 0x8000) << 16);
}

GENREP_FAST_INLINE HalfWords narrow(Floats values, Element element) {
  Words bits = as<Words>(values), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
  if (element == Element::kBFloat16) {
    Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    // Rounding would carry some NaNs over to infinity or zero.
    return __builtin_convertvector(magnitude > 0x7f800000 ? bits >> 16 | 0x40 : rounded, HalfWords);
  }
  Words normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Below 2^-14, adding 1/2 leaves the rounded multiple of 2^-24 in the last bits of the sum.
  Words subnormal = as<Words>(as<Floats>(magnitude) + 0.5f) - 0x3f000000;
  Words half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x47800000 ? Words{} + 0x7c00 : half;
  half = magnitude > 0x7f800000 ? Words{} + 0x7e00 : half;
  return __builtin_convertvector(half | sign, HalfWords);
}

// `count` <= kBlock elements from `index` on as float32: the memory itself, or a copy in `scratch`.
GENREP_FAST_INLINE const float* read(Buffer buffer, int64_t index, int64_t count, float* scratch) {
  const char* source = buffer.at(index);
  if (buffer.element == Element::kFloat) {
    return reinterpret_cast<const float*>(source);
  }
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(scratch + i, widen(load<HalfWords>(source + 2 * i), buffer.element));
  }
  if (i < count) {
    HalfWords rest{};
    std::memcpy(&rest, source + 2 * i, 2 * (count - i));
    Floats values = widen(rest, buffer.element);
    std::memcpy(scratch + i, &values, 4 * (count - i));
  }
  return scratch;
}

// Rounds `count` elements to the nearest bfloat16 or float16, ties to even, and stores them from `index` on.
GENREP_FAST_INLINE void write(Buffer buffer, int64_t index, int64_t count, const float* source) {
  char* target = buffer.at(index);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    store(target + 2 * i, narrow(load<Floats>(source + i), buffer.element));
  }
  if (i < count) {
    Floats rest{};
    std::memcpy(&rest, source + i, 4 * (count - i));
    HalfWords values = narrow(rest, buffer.element);
    std::memcpy(target + 2 * i, &values, 2 * (count - i));
  }
}

// The gradients that are there, as float32, and their factors.
struct Present {
  const float* values[kMaxLosses];
  float factors[kMaxLosses];
  int64_t count = 0;
};

// `count` <= kBlock elements from `index` on; `scratch` takes copies of what is not float32.
GENREP_FAST_INLINE Present read_present(
    const Buffer* gradients, const float* coefficients, int64_t n, int64_t index, int64_t count, float (*scratch)[kBlock]) {
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
