// A chunk of scored steps as the kernels of both libraries see it: pointers and strides, in
// elements, whatever the memory format.
//
// The elements of one image are in an order of two levels, `outer` times `inner`, which follows the
// memory of the denoiser's output: channels outside, locations inside for contiguous tensors, the
// other way round for channels_last ones. Where the likelihood is kept for each location it is
// always channels outside, locations inside.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace genrep_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// [B, K, S, outer, inner] of one tensor; the strides of axes that it does not have, or shares, are
// 0.
struct View {
  void* data = nullptr;  // null where there is no tensor
  ScalarType type = ScalarType::Float;
  int64_t batch = 0, classes = 0, steps = 0, outer = 0, inner = 0;

  // The elements of one image, class and step lie one behind the other.
  bool is_flat(int64_t outer_size, int64_t inner_size) const {
    return (inner == 1 || inner_size == 1) && (outer == inner_size || outer_size == 1);
  }
};

// Sizes and tables of `log_likelihood`'s arguments.
struct __attribute__((visibility("hidden"))) ScoredChunk {
  int64_t batch, classes, steps, channels, locations;
  int64_t outer_size, inner_size;  // their product is channels * locations
  bool channels_inner, mixture, per_location;
  View x, output, noisy;  // output: the first `channels` of the denoiser's
  const float *data_table, *noisy_table, *output_table, *inv_var, *log_norm;  // [S] each
  std::vector<Tensor> copies;  // of what had strides that no View has

  int64_t elements() const { return channels * locations; }
};

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    sizes.push_back(tensor.size(axis));
  }
  return sizes;
}

// The tensor itself where it is contiguous: a call into torch takes longer than a small kernel.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Stride of the spatial axes as one, from axis `first` on; nothing where they are no such axis.
inline std::optional<int64_t> spatial_stride(const Tensor& tensor, int64_t first) {
  std::optional<int64_t> stride;
  int64_t expected = 0;
  for (int64_t axis = tensor.dim() - 1; axis >= first; --axis) {
    if (tensor.size(axis) == 1) {
      continue;
    }
    if (!stride) {
      stride = expected = tensor.stride(axis);
    }
    if (tensor.stride(axis) != expected) {
      return std::nullopt;
    }
    expected *= tensor.size(axis);
  }
  return stride.value_or(0);
}

// View of [B, (K, S,) C, *spatial], whose first axis of channels is `channel_axis`; a tensor whose
// spatial axes are not one becomes a copy.
inline View view_of(
    Tensor tensor, int64_t channel_axis, bool channels_inner, std::vector<Tensor>& copies) {
  std::optional<int64_t> location = spatial_stride(tensor, channel_axis + 1);
  if (!location) {
    tensor = torch::stable::contiguous(tensor);
    copies.push_back(tensor);
    location = spatial_stride(tensor, channel_axis + 1);
  }
  auto leading = [&](int64_t axis) {
    return axis >= channel_axis || tensor.size(axis) == 1 ? 0 : tensor.stride(axis);
  };
  View view{tensor.data_ptr(), tensor.scalar_type(),        leading(0), leading(1),
            leading(2),        tensor.stride(channel_axis), *location};
  if (channels_inner) {
    std::swap(view.outer, view.inner);
  }
  return view;
}

// Points the chunk at the rows of tables [5, S].
inline void set_tables(ScoredChunk& chunk, const Tensor& tables, const Tensor& x) {
  const bool fits = tables.scalar_type() == ScalarType::Float && tables.dim() == 2 &&
                    tables.size(0) == 5 && tables.size(1) == chunk.steps;
  STD_TORCH_CHECK(
      fits && (tables.stride(1) == 1 || chunk.steps <= 1) && tables.device() == x.device(),
      "tables must be a float32 tensor of shape [5, ", chunk.steps,
      "] on x's device, with contiguous rows");
  const float* row = static_cast<const float*>(tables.const_data_ptr());
  const int64_t stride = tables.stride(0);
  chunk.data_table = row;
  chunk.noisy_table = row + stride;
  chunk.output_table = row + 2 * stride;
  chunk.inv_var = row + 3 * stride;
  chunk.log_norm = row + 4 * stride;
}

inline ScoredChunk scored_chunk(
    const Tensor& x, const Tensor& model_output, const std::optional<Tensor>& x_t,
    const Tensor& tables, const std::string& reduction, bool per_location) {
  const int64_t axes = x.dim() + 2;
  STD_TORCH_CHECK(
      x.dim() >= 2 && model_output.dim() == axes, "model_output must have two axes more than x");
  STD_TORCH_CHECK(!x_t || x_t->dim() == axes, "x_t must have two axes more than x");
  STD_TORCH_CHECK(
      reduction == "mixture" || reduction == "mean", "reduction must be mixture or mean, got ",
      reduction);
  ScoredChunk chunk{};
  chunk.batch = x.size(0);
  chunk.classes = x_t && model_output.size(1) == 1 ? x_t->size(1) : model_output.size(1);
  chunk.steps = model_output.size(2);
  chunk.channels = x.size(1);
  chunk.locations = 1;
  auto fits = [](int64_t size, int64_t whole) { return size == whole || size == 1; };
  for (int64_t axis = 4; axis < axes; ++axis) {
    chunk.locations *= x.size(axis - 2);
    STD_TORCH_CHECK(
        model_output.size(axis) == x.size(axis - 2), "model_output must have x's spatial shape");
    STD_TORCH_CHECK(!x_t || x_t->size(axis) == x.size(axis - 2), "x_t must have x's spatial shape");
  }
  STD_TORCH_CHECK(
      fits(model_output.size(0), chunk.batch) && fits(model_output.size(1), chunk.classes) &&
          model_output.size(3) >= chunk.channels,
      "model_output must be [1 or B, 1 or K, S, at least C, *spatial]");
  STD_TORCH_CHECK(
      !x_t || (fits(x_t->size(0), chunk.batch) && fits(x_t->size(1), chunk.classes) &&
               fits(x_t->size(2), chunk.steps) && x_t->size(3) == chunk.channels),
      "x_t must be [1 or B, 1 or K, 1 or S, C, *spatial]");
  STD_TORCH_CHECK(
      x.device() == model_output.device() && (!x_t || x.device() == x_t->device()),
      "x, model_output and x_t must be on one device");

  const int64_t location_stride = spatial_stride(model_output, 4).value_or(0);
  chunk.per_location = per_location;
  chunk.mixture = reduction == "mixture";
  chunk.channels_inner = !per_location && chunk.channels > 1 && chunk.locations > 1 &&
                         location_stride > model_output.stride(3);
  chunk.outer_size = chunk.channels_inner ? chunk.locations : chunk.channels;
  chunk.inner_size = chunk.channels_inner ? chunk.channels : chunk.locations;
  chunk.x = view_of(x, 1, chunk.channels_inner, chunk.copies);
  chunk.output = view_of(model_output, 3, chunk.channels_inner, chunk.copies);
  if (x_t) {
    chunk.noisy = view_of(*x_t, 3, chunk.channels_inner, chunk.copies);
  }
  set_tables(chunk, tables, x);
  return chunk;
}

}  // namespace genrep_fast
