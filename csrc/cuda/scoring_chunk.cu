// What every launch of a scoring kernel needs: the arguments as the device sees them, and how many
// threads share what.
#include <algorithm>
#include <array>

#include "scoring_rows.cuh"

namespace genrep_fast {

constexpr int kSlices = 8;  // that few items are cut into, within a block

Operand operand_of(const View& view, int64_t inner_size) {
  if (view.data == nullptr) {
    return {};
  }
  const Dtype dtype = dtype_of(view.type);
  STD_TORCH_CHECK(dtype != kFloat64, "tensors must be float32, bfloat16 or float16, got float64");
  bool quads = view.inner == 1 && inner_size % kQuad == 0 &&
               reinterpret_cast<uintptr_t>(view.data) % (dtype == kFloat32 ? 16 : 8) == 0;
  for (int64_t stride : {view.batch, view.classes, view.steps, view.outer}) {
    quads &= stride % kQuad == 0;
  }
  return {view.data, dtype, quads, view.batch, view.classes, view.steps, view.outer, view.inner};
}

DeviceChunk device_chunk(const ScoredChunk& chunk, bool logical) {
  STD_TORCH_CHECK(
      chunk.elements() <= int64_t{1} << 30, "an image must have at most 2^30 elements, got ",
      chunk.elements());
  std::array<View, 3> views{chunk.x, chunk.output, chunk.noisy};
  int64_t outer = chunk.outer_size, inner = chunk.inner_size;
  const bool flat = std::all_of(views.begin(), views.end(), [&](const View& view) {
    return !view.data || view.is_flat(outer, inner);
  });
  // Locations stay an axis of their own where they have their own likelihood.
  const bool swapped = !chunk.per_location && inner == 1;
  if (!chunk.per_location && flat && !(logical && chunk.channels_inner)) {
    inner = chunk.elements();
    outer = 1;
    for (View& view : views) {
      view.inner = 1;
      view.outer = 0;
    }
  } else if (swapped || (logical && chunk.channels_inner)) {
    std::swap(inner, outer);
    for (View& view : views) {
      std::swap(view.inner, view.outer);
    }
  }
  DeviceChunk device{};
  device.batch = chunk.batch;
  device.classes = chunk.classes;
  device.steps = chunk.steps;
  device.elements = static_cast<int>(chunk.elements());
  device.channels = static_cast<int>(chunk.channels);
  device.locations = static_cast<int>(chunk.locations);
  device.outer_size = static_cast<int>(outer);
  device.inner_size = static_cast<int>(inner);
  device.inner_quads = static_cast<int>(ceil_div(inner, kQuad));
  device.mixture = chunk.mixture;
  device.log_steps = std::log(static_cast<double>(std::max<int64_t>(chunk.steps, 1)));
  device.x = operand_of(views[0], inner);
  device.output = operand_of(views[1], inner);
  device.noisy = operand_of(views[2], inner);
  device.data_table = chunk.data_table;
  device.noisy_table = chunk.noisy_table;
  device.output_table = chunk.output_table;
  device.inv_var = chunk.inv_var;
  device.log_norm = chunk.log_norm;
  return device;
}

ScoredChunk checked_chunk(
    const Tensor& x, const Tensor& model_output, const std::optional<Tensor>& x_t,
    const Tensor& tables, const std::string& reduction, bool per_location) {
  ScoredChunk chunk = scored_chunk(x, model_output, x_t, tables, reduction, per_location);
  chunk.per_location &= chunk.locations != 1;  // the one location is the image
  return chunk;
}

// With less of them each is read on its own faster than a few multiprocessors work on tiles.
constexpr int64_t kTiledRows = 2048;

bool shares_centers(const DeviceChunk& chunk, bool per_location) {
  const bool shares = chunk.batch > 1 && chunk.output.batch == 0 && chunk.noisy.batch == 0;
  return !per_location && shares && chunk.batch * chunk.classes * chunk.steps >= kTiledRows;
}

RowLayout layout_of(const DeviceChunk& chunk) {
  const int64_t quads = int64_t{chunk.outer_size} * chunk.inner_quads;
  RowLayout layout{0, 0, static_cast<int>(std::max<int64_t>(ceil_div(quads, kPartQuads), 1)), 0};
  while (layout.team() < kWarp && kBatch * layout.team() < quads) {
    ++layout.team_bits;
  }
  while (layout.batch_bits < kBatchBits && kBatch * layout.team() * layout.batches() < quads) {
    ++layout.batch_bits;
  }
  while (1 << layout.part_lane_bits < std::min(layout.parts, kWarp)) {
    ++layout.part_lane_bits;
  }
  return layout;
}

int slices_of(int64_t items, int64_t terms) {
  int slices = 1;
  while (slices < kSlices && 2 * slices <= terms && items * slices < int64_t{1} << 17) {
    slices *= 2;
  }
  return slices;
}

std::vector<int64_t> result_sizes(const ScoredChunk& chunk, const Tensor& x, bool per_location) {
  std::vector<int64_t> sizes{chunk.batch, chunk.classes};
  for (int64_t axis = 2; per_location && axis < x.dim(); ++axis) {
    sizes.push_back(x.size(axis));
  }
  return sizes;
}

void check_tensor(
    const Tensor& tensor, ScalarType type, const std::vector<int64_t>& sizes, const Tensor& x,
    const char* name) {
  bool fits = tensor.scalar_type() == type && tensor.device() == x.device() &&
              tensor.is_contiguous() && tensor.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t axis = 0; fits && axis < tensor.dim(); ++axis) {
    fits = tensor.size(axis) == sizes[axis];
  }
  STD_TORCH_CHECK(fits, name, " has the wrong dtype, shape or device, or is not contiguous");
}

}  // namespace genrep_fast
