// Lists of tensors as the kernels see them: a table in the kernel's parameters, cut into chunks of
// a fixed number of elements.
//
// A table holds pointers, sizes, dtypes and groups by value, so that no launch copies anything to
// the device first and every launch can be captured into a CUDA graph. A launch copies all of a
// kernel's parameters: short lists have a kernel with 4 KB of them, longer ones the same kernel
// with the 32 KB that CUDA 12.1 takes, the longest several launches. A thread block works on
// one chunk and finds its tensor by a binary search. Chunks depend on the sizes alone, never on the
// device: so do the order of every sum, and its bits.
//
// Threads read and write quads, four neighbouring elements: 16 bytes of float32, 8 of bfloat16 or
// float16. Every dtype and every alignment has the same quads in the same threads. WholeQuads is
// the fast path for one dtype that the compiler knows and memory that is aligned; AnyQuads does the
// rest: mixed dtypes, unaligned views, missing gradients, the end of a tensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "elements.cuh"

namespace genrep_fast {

using OptionalTensors = std::vector<std::optional<Tensor>>;

constexpr int kMaxLosses = 8;
constexpr int kQuadsPerRun = 4;  // of a thread; a run is what a block reads with them
constexpr int kRun = kThreads * kQuadsPerRun * kQuad;
constexpr size_t kParameterBytes = 4096;
constexpr size_t kLargeParameterBytes = CUDART_VERSION >= 12010 ? 32764 : kParameterBytes;

// ---- tables ----

// One parameter: the gradients of every loss first, then the tensors that the operator writes. Null
// pointer: there is no such tensor.
template <int kPointers>
struct TensorEntry {
  void* pointers[kPointers];
  int64_t numel;
  int32_t group;
  uint32_t dtypes : 29;  // two bits a pointer
  uint32_t aligned : 1;  // every quad of every tensor can be read at once
  uint32_t uniform : 1;  // one dtype, no missing gradient

  __device__ Dtype dtype(int slot) const { return static_cast<Dtype>(dtypes >> 2 * slot & 3); }
};

template <typename Entry, size_t kTableParameterBytes>
struct TensorTable {
  static constexpr size_t kBytes = kTableParameterBytes;  // of all parameters
  // 192 bytes are left for a kernel's other parameters.
  static constexpr int kCapacity = (kBytes - 192) / (sizeof(Entry) + sizeof(int32_t));

  Entry entries[kCapacity];
  int32_t first_chunk[kCapacity + 1];  // of each entry; then the number of chunks
  int32_t size;

  struct Place {
    const Entry& entry;
    int64_t begin;  // first element
  };

  // Where the block's chunk of `length` elements lies.
  __device__ Place place(int64_t length) const {
    const int chunk = static_cast<int>(blockIdx.x);
    int low = 0, high = size;  // first_chunk[low] <= chunk < first_chunk[high]
    while (high - low > 1) {
      int middle = (low + high) / 2;
      (first_chunk[middle] <= chunk ? low : high) = middle;
    }
    return {entries[low], (chunk - first_chunk[low]) * length};
  }
};

template <typename Entry>
Entry empty_entry(int64_t numel, int64_t group) {
  Entry entry{};
  entry.numel = numel;
  entry.group = static_cast<int32_t>(group);
  entry.aligned = entry.uniform = 1;
  return entry;
}

template <typename Entry>
void set_tensor(Entry& entry, int slot, const Tensor& tensor, const DeviceScope& scope) {
  scope.check(tensor);
  Dtype dtype = dtype_of(tensor);
  STD_TORCH_CHECK(dtype != kFloat64, "tensors must be float32, bfloat16 or float16, got float64");
  const int64_t numel = tensor.numel();
  STD_TORCH_CHECK(
      numel == entry.numel, "tensors of one parameter must have equal sizes, got ", numel, " and ",
      entry.numel);
  entry.pointers[slot] = tensor.data_ptr();
  entry.dtypes |= dtype << 2 * slot;
  entry.aligned &=
      reinterpret_cast<uintptr_t>(entry.pointers[slot]) % (dtype == kFloat32 ? 16 : 8) == 0;
  entry.uniform &= dtype == (entry.dtypes & 3);
}

// Number of losses of gradients that are flattened loss by loss.
inline int64_t number_of_losses(const OptionalTensors& gradients, size_t num_tensors) {
  int64_t n = num_tensors == 0 ? 0 : static_cast<int64_t>(gradients.size() / num_tensors);
  STD_TORCH_CHECK(
      2 <= n && n <= kMaxLosses && gradients.size() == n * num_tensors,
      "gradients must hold 2 to 8 tensors for every group index, got ", gradients.size(), " for ",
      num_tensors);
  return n;
}

template <typename Entry>
void set_gradients(
    Entry& entry, const OptionalTensors& gradients, size_t num_tensors, size_t t,
    const DeviceScope& scope) {
  for (size_t i = 0; i * num_tensors < gradients.size(); ++i) {
    const std::optional<Tensor>& gradient = gradients[i * num_tensors + t];
    if (gradient.has_value()) {
      set_tensor(entry, static_cast<int>(i), *gradient, scope);
    } else {
      entry.uniform = 0;
    }
  }
}

// Calls launch(table) with as many of the entries from `first` on as the table holds, and returns
// their number.
template <typename Table, typename Entry, typename Launch>
size_t launch_table(const std::vector<Entry>& entries, size_t first, int64_t chunk, Launch launch) {
  Table table{};
  table.size = static_cast<int32_t>(std::min<size_t>(Table::kCapacity, entries.size() - first));
  for (int k = 0; k < table.size; ++k) {
    table.entries[k] = entries[first + k];
    table.first_chunk[k + 1] =
        table.first_chunk[k] + static_cast<int32_t>(ceil_div(table.entries[k].numel, chunk));
  }
  launch(table);
  return table.size;
}

// Calls launch(table) for as many tables as the entries need, in order.
template <typename Entry, typename Launch>
void for_each_table(const std::vector<Entry>& entries, int64_t chunk, Launch launch) {
  using Short = TensorTable<Entry, kParameterBytes>;
  using Long = TensorTable<Entry, kLargeParameterBytes>;
  for (size_t first = 0; first < entries.size();) {
    const bool is_short = entries.size() - first <= Short::kCapacity;
    first += is_short ? launch_table<Short>(entries, first, chunk, launch)
                      : launch_table<Long>(entries, first, chunk, launch);
  }
}

// Calls function(std::integral_constant<int, N>) with a number of losses that the kernels are
// compiled for; further gradients stay null.
template <typename Function>
void with_compiled_losses(int64_t n, Function function) {
  if (n == 2) {
    function(std::integral_constant<int, 2>{});
  } else if (n <= 4) {
    function(std::integral_constant<int, 4>{});
  } else {
    function(std::integral_constant<int, 8>{});
  }
}

// Calls function(losses, bytes, name) for each pair of constants that the kernels are compiled for.
template <typename Function>
void for_each_compiled_table(Function function) {
  for (int n : {2, 4, 8}) {
    with_compiled_losses(n, [&](auto losses) {
      const std::string name = std::to_string(n);
      function(losses, std::integral_constant<size_t, kParameterBytes>{}, name);
      function(losses, std::integral_constant<size_t, kLargeParameterBytes>{}, name + ", long");
    });
  }
}

// ---- quads of a table ----

// Quads inside aligned tensors of one dtype.
template <Dtype kDtype, typename Entry>
struct WholeQuads {
  const Entry& entry;

  __device__ Dtype dtype(int) const { return kDtype; }
  __device__ Quad load(int slot, int64_t offset) const {
    return load_aligned(entry.pointers[slot], kDtype, offset);
  }
  __device__ void store(int slot, int64_t offset, const float (&values)[kQuad]) const {
    store_aligned(entry.pointers[slot], kDtype, offset, pack(values, kDtype));
  }
};

// Quads of any tensors; elements past the end and tensors that are not there read as zeros.
template <typename Entry>
struct AnyQuads {
  const Entry& entry;

  __device__ Dtype dtype(int slot) const { return entry.dtype(slot); }

  __device__ Quad load(int slot, int64_t offset) const {
    const void* pointer = entry.pointers[slot];
    if (pointer == nullptr) {
      return {};
    }
    return load_quad(pointer, dtype(slot), is_whole(offset), entry.numel - offset, [offset](int k) {
      return offset + k;
    });
  }

  __device__ void store(int slot, int64_t offset, const float (&values)[kQuad]) const {
    store_quad(
        entry.pointers[slot], dtype(slot), is_whole(offset), entry.numel - offset, offset, values);
  }

  __device__ bool is_whole(int64_t offset) const {
    return entry.aligned && offset + kQuad <= entry.numel;
  }
};

// Calls work(quads) with the fastest way to read and write `length` elements from `begin` on; for
// two gradients, WholeQuads if possible.
template <int N, typename Entry, typename Work>
__device__ void with_quads(const Entry& entry, int64_t begin, int64_t length, Work work) {
  if constexpr (N == 2) {
    if (entry.uniform && entry.aligned && begin + length <= entry.numel) {
      switch (entry.dtype(0)) {
        case kFloat32:
          return work(WholeQuads<kFloat32, Entry>{entry});
        case kBFloat16:
          return work(WholeQuads<kBFloat16, Entry>{entry});
        default:
          return work(WholeQuads<kFloat16, Entry>{entry});
      }
    }
  }
  work(AnyQuads<Entry>{entry});
}

// Element of a tensor that quad `quad` of this thread begins at, in the run that begins at element
// `run`.
__device__ inline int64_t quad_offset(int64_t run, int quad) {
  return run + kQuad * (quad * kThreads + static_cast<int>(threadIdx.x));
}

// Quads of each of N gradients that a thread loads before it uses the first.
template <int N>
constexpr int kBatch = 8 / N;

template <int N, typename Quads>
__device__ void load_batch(
    const Quads& quads, int64_t run, int first, Quad (&batch)[kBatch<N>][N]) {
#pragma unroll
  for (int q = 0; q < kBatch<N>; ++q) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      batch[q][i] = quads.load(i, quad_offset(run, first + q));
    }
  }
}

// ---- combination of gradients ----

// Factors of the gradients: row `group` of `rows` [G, n], or `weights` for group -1.
struct Coefficients {
  const double* rows;
  int32_t n;
  float weights[kMaxLosses];

  // A gradient that is missing has the factor 0, so that its coefficient, which may be NaN, does
  // not enter.
  template <int N, typename Entry>
  __device__ void read(const Entry& entry, float (&factors)[N]) const {
    for (int i = 0; i < N; ++i) {
      if (entry.pointers[i] == nullptr) {
        factors[i] = 0;
      } else {
        factors[i] = entry.group < 0
                         ? weights[i]
                         : static_cast<float>(rows[static_cast<int64_t>(entry.group) * n + i]);
      }
    }
  }
};

// `rows` must be contiguous and outlive the launches.
inline Coefficients coefficients_of(
    const Tensor& rows, const std::vector<int64_t>& groups, const std::vector<double>& weights,
    int64_t n) {
  const bool matrix =
      rows.scalar_type() == ScalarType::Double && rows.dim() == 2 && rows.size(1) == n;
  STD_TORCH_CHECK(matrix, "coefficients must be float64 [groups, ", n, "]");
  const int64_t num_rows = rows.size(0), num_weights = static_cast<int64_t>(weights.size());
  for (int64_t group : groups) {
    STD_TORCH_CHECK(
        group < num_rows, "groups must be below the number of rows of coefficients, ", num_rows,
        ", got ", group);
    STD_TORCH_CHECK(
        group >= 0 || num_weights == n, "weights must have ", n, " entries for group -1, got ",
        num_weights);
  }
  Coefficients coefficients{
      static_cast<const double*>(rows.data_ptr()), static_cast<int32_t>(n), {}};
  std::copy(
      weights.begin(), weights.begin() + std::min<size_t>(weights.size(), n), coefficients.weights);
  return coefficients;
}

// sum_i factors_i gradients_i of a quad in float32, gradient after gradient.
template <int N, typename Quads>
__device__ void weighted_sum(
    const Quads& quads, const Quad (&gradients)[N], const float (&factors)[N],
    float (&sum)[kQuad]) {
  for (int k = 0; k < kQuad; ++k) {
    sum[k] = factors[0] * unpack(gradients[0], quads.dtype(0), k);
    for (int i = 1; i < N; ++i) {
      sum[k] += factors[i] * unpack(gradients[i], quads.dtype(i), k);
    }
  }
}

}  // namespace genrep_fast
