// A chunk of scored steps on the device: residuals and squares of its rows, and what every launch
// of a scoring kernel needs.
//
// Backward recomputes what forward has summed up and must get the same bits, so both call
// batch_squares and location_squares, in which every operation whose rounding the compiler could
// choose is spelled out. Threads read quads in a fixed order, whatever the memory format.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "../scoring.h"
#include "elements.cuh"

namespace genrep_fast {

constexpr int kBatch = 4;  // quads of each tensor that a thread loads before it uses the first

// ---- elements of a row ----

// [B, K, S, outer, inner] of one tensor, strides in elements.
struct Operand {
  void* data;  // null: there is no such tensor
  Dtype dtype;
  bool quads;  // four neighbours along the inner axis can be read at once
  int64_t batch, classes, steps, outer, inner;

  __device__ int64_t row(int64_t b, int64_t k, int64_t s) const {
    return b * batch + k * classes + s * steps;
  }
};

struct DeviceChunk {
  int64_t batch, classes, steps;
  int elements, channels, locations;
  int outer_size, inner_size, inner_quads;  // a quad never reaches beyond the inner axis
  bool mixture;
  double log_steps;
  Operand x, output, noisy;
  const float *data_table, *noisy_table, *output_table, *inv_var, *log_norm;

  __device__ int row_quads() const { return outer_size * inner_quads; }
};

// A row is one image, class and step: where it begins in every tensor, and its residual's factors.
struct Row {
  int64_t x, output, noisy;
  float data_factor, output_factor, noisy_factor;
};

__device__ inline Row row_at(const DeviceChunk& chunk, int64_t b, int64_t k, int64_t s) {
  const bool has_noisy = chunk.noisy.data != nullptr;
  return {chunk.x.row(b, 0, 0), chunk.output.row(b, k, s), chunk.noisy.row(b, k, s),
          chunk.data_table[s],  chunk.output_table[s],     has_noisy ? chunk.noisy_table[s] : 0.f};
}

struct Place {
  int outer, inner;
};

// How a kernel reads memory that is whole and has these dtypes.
template <Dtype kOutput, Dtype kOther>
struct WholeAccess {
  static constexpr bool kWhole = true;
  // Of a multiprocessor, for enough loads in flight.
  static constexpr int kBlocks = kOutput == kFloat32 || kOther == kFloat32 ? 3 : 4;
  static __device__ Dtype output_dtype(const DeviceChunk&) { return kOutput; }
  static __device__ Dtype other_dtype(const Operand&) { return kOther; }
  static __device__ Place place(const DeviceChunk&, int quad) { return {0, kQuad * quad}; }
  static __device__ Quad load(const Operand& operand, Dtype dtype, int64_t row, Place place, int) {
    return load_aligned(operand.data, dtype, row + place.outer * operand.outer + place.inner);
  }
};

// Any strides, alignments and dtypes; elements past the end read as zeros.
struct AnyAccess {
  static constexpr bool kWhole = false;
  static constexpr int kBlocks = 2;
  static __device__ Dtype output_dtype(const DeviceChunk& chunk) { return chunk.output.dtype; }
  static __device__ Dtype other_dtype(const Operand& operand) { return operand.dtype; }
  static __device__ Place place(const DeviceChunk& chunk, int quad) {
    if (chunk.outer_size == 1) {
      return {0, kQuad * quad};
    }
    const int outer =
        static_cast<int>(static_cast<unsigned>(quad) / static_cast<unsigned>(chunk.inner_quads));
    return {outer, kQuad * (quad - outer * chunk.inner_quads)};
  }
  static __device__ Quad
  load(const Operand& operand, Dtype dtype, int64_t row, Place place, int inner_size) {
    const int64_t offset = row + place.outer * operand.outer + place.inner * operand.inner;
    if (operand.quads) {
      return load_aligned(operand.data, dtype, offset);
    }
    Quad quad{};
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      if (place.inner + k < inner_size) {
        load_element(quad, k, operand.data, dtype, offset + k * operand.inner);
      }
    }
    return quad;
  }
};

// A quad of every tensor, and the residuals r = a x + b x_t + c o of its elements.
template <typename Access>
struct Residuals {
  Quad x, output, noisy;

  __device__ static Residuals load(const DeviceChunk& chunk, const Row& row, Place place) {
    Residuals quads{};
    quads.output = Access::load(
        chunk.output, Access::output_dtype(chunk), row.output, place, chunk.inner_size);
    quads.x = Access::load(chunk.x, Access::other_dtype(chunk.x), row.x, place, chunk.inner_size);
    if (chunk.noisy.data != nullptr) {
      quads.noisy = Access::load(
          chunk.noisy, Access::other_dtype(chunk.noisy), row.noisy, place, chunk.inner_size);
    }
    return quads;
  }

  __device__ float at(const DeviceChunk& chunk, const Row& row, int k) const {
    const float own = __fmul_rn(row.data_factor, unpack(x, Access::other_dtype(chunk.x), k));
    const float given =
        __fmaf_rn(row.noisy_factor, unpack(noisy, Access::other_dtype(chunk.noisy), k), own);
    return __fmaf_rn(row.output_factor, unpack(output, Access::output_dtype(chunk), k), given);
  }
};

// ---- sums of squares ----

// kBatch quads of a whole tensor, `team` quads from each to the next: one address and its steps.
template <typename Access>
__device__ void load_whole_quads(
    const Operand& operand, Dtype dtype, int64_t row, int first, int team,
    Quad Residuals<Access>::* own, Residuals<Access> (&batch)[kBatch]) {
  const int bytes = dtype == kFloat32 ? 4 : 2;
  const char* place =
      static_cast<const char*>(operand.data) + (row + int64_t{kQuad} * first) * bytes;
#pragma unroll
  for (int q = 0; q < kBatch; ++q) {
    batch[q].*own = load_aligned(place, dtype, 0);
    place += kQuad * team * bytes;
  }
}

// The quads of a row that one of `team` threads reads next, beginning with quad `first`; those past
// the last of `quads` are zeros.
template <typename Access>
__device__ void load_batch(
    const DeviceChunk& chunk, const Row& row, int quads, int first, int team,
    Residuals<Access> (&batch)[kBatch]) {
  using Own = Residuals<Access>;
  if (Access::kWhole && first + (kBatch - 1) * team < quads) {
    load_whole_quads(
        chunk.output, Access::output_dtype(chunk), row.output, first, team, &Own::output, batch);
    load_whole_quads(chunk.x, Access::other_dtype(chunk.x), row.x, first, team, &Own::x, batch);
    if (chunk.noisy.data != nullptr) {
      load_whole_quads(
          chunk.noisy, Access::other_dtype(chunk.noisy), row.noisy, first, team, &Own::noisy,
          batch);
      return;
    }
#pragma unroll
    for (int q = 0; q < kBatch; ++q) {
      batch[q].noisy = {};
    }
    return;
  }
#pragma unroll
  for (int q = 0; q < kBatch; ++q) {
    const int quad = first + q * team;
    batch[q] = quad < quads ? Own::load(chunk, row, Access::place(chunk, quad)) : Own{};
  }
}

// The residuals of a batch, and the sum of their squares: 16 in float32.
template <typename Access>
__device__ float batch_squares(
    const DeviceChunk& chunk, const Row& row, const Residuals<Access> (&batch)[kBatch],
    float (&residuals)[kBatch * kQuad]) {
  float sum = 0;
#pragma unroll
  for (int q = 0; q < kBatch; ++q) {
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const float r = batch[q].at(chunk, row, k);
      residuals[q * kQuad + k] = r;
      sum = __fmaf_rn(r, r, sum);
    }
  }
  return sum;
}

// The channels from `first` on at four locations from `location` on; those past the last are zeros.
template <typename Access>
__device__ void load_channels(
    const DeviceChunk& chunk, const Row& row, int first, int location,
    Residuals<Access> (&batch)[kBatch]) {
#pragma unroll
  for (int c = 0; c < kBatch; ++c) {
    batch[c] = first + c < chunk.channels
                   ? Residuals<Access>::load(chunk, row, {first + c, location})
                   : Residuals<Access>{};
  }
}

// sum r^2 over the channels at each of four locations from `location` on.
template <typename Access>
__device__ void location_squares(
    const DeviceChunk& chunk, const Row& row, int location, double (&squares)[kQuad]) {
  for (int k = 0; k < kQuad; ++k) {
    squares[k] = 0;
  }
#pragma unroll 1
  for (int first = 0; first < chunk.channels; first += kBatch) {
    Residuals<Access> batch[kBatch];
    load_channels<Access>(chunk, row, first, location, batch);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      float sum = 0;
#pragma unroll
      for (int c = 0; c < kBatch; ++c) {
        const float r = batch[c].at(chunk, row, k);
        sum = __fmaf_rn(r, r, sum);
      }
      squares[k] += sum;
    }
  }
}

// l = -1/2 v sum r^2 + n of `elements` elements
__device__ inline double step_likelihood(
    const DeviceChunk& chunk, int64_t s, double squares, int elements) {
  return __fma_rn(
      -0.5 * chunk.inv_var[s], squares, static_cast<double>(elements) * chunk.log_norm[s]);
}

// ---- launches ----

Operand operand_of(const View& view, int64_t inner_size);

// With `logical`, channels outside and locations inside, whatever the memory format.
DeviceChunk device_chunk(const ScoredChunk& chunk, bool logical);

ScoredChunk checked_chunk(
    const Tensor& x, const Tensor& model_output, const std::optional<Tensor>& x_t,
    const Tensor& tables, const std::string& reduction, bool per_location);

// Whether images share the outputs, and x_t, and are worth the tiles of shared_centers.cu.
bool shares_centers(const DeviceChunk& chunk, bool per_location);

// Threads that share the `terms` of one of `items`: more than one where items are few.
int slices_of(int64_t items, int64_t terms);

// [B, K, *loc]
std::vector<int64_t> result_sizes(const ScoredChunk& chunk, const Tensor& x, bool per_location);

void check_tensor(
    const Tensor& tensor, ScalarType type, const std::vector<int64_t>& sizes, const Tensor& x,
    const char* name);

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

// Calls function(access, name) for each access that the kernels are compiled for.
template <typename Function>
void for_each_access(Function function) {
  function(WholeAccess<kFloat32, kFloat32>{}, "float32");
  function(WholeAccess<kBFloat16, kBFloat16>{}, "bfloat16");
  function(WholeAccess<kBFloat16, kFloat32>{}, "bfloat16, float32");
  function(WholeAccess<kFloat16, kFloat16>{}, "float16");
  function(WholeAccess<kFloat16, kFloat32>{}, "float16, float32");
  function(AnyAccess{}, "any");
}

// Calls function(access) with the access that fits the chunk.
template <typename Function>
void with_access(
    const DeviceChunk& chunk, bool per_location, bool gradient_is_whole, Function function) {
  const Operand &x = chunk.x, &output = chunk.output, &noisy = chunk.noisy;
  const bool noisy_fits = noisy.data == nullptr || (noisy.dtype == x.dtype && noisy.quads);
  const bool whole = x.quads && output.quads && noisy_fits && gradient_is_whole;
  if (!whole || !(per_location || chunk.outer_size == 1)) {
    function(AnyAccess{});
  } else if (output.dtype == kFloat32 && x.dtype == kFloat32) {
    function(WholeAccess<kFloat32, kFloat32>{});
  } else if (output.dtype == kBFloat16 && x.dtype == kBFloat16) {
    function(WholeAccess<kBFloat16, kBFloat16>{});
  } else if (output.dtype == kBFloat16 && x.dtype == kFloat32) {
    function(WholeAccess<kBFloat16, kFloat32>{});
  } else if (output.dtype == kFloat16 && x.dtype == kFloat16) {
    function(WholeAccess<kFloat16, kFloat16>{});
  } else if (output.dtype == kFloat16 && x.dtype == kFloat32) {
    function(WholeAccess<kFloat16, kFloat32>{});
  } else {
    function(AnyAccess{});
  }
}

}  // namespace genrep_fast
