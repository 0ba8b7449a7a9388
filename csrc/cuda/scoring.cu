// Log-likelihoods of images under every class (see genrep_fast/reference/scoring.py), and their
// streaming update.
//
//     r = a_s x + b_s x_t + c_s o             residual of a row: one image b, class k and step s
//     l = -1/2 v_s sum r^2 + D n_s,   L = logsumexp_s l - log S  or the mean of l
//
// Reads o, B K S D elements, and x and x_t as often through the caches; 4 multiply-adds an element:
// bound by memory.
//
// As many blocks as run at once share all rows, or the parts of wide ones (scoring_rows.cuh), evenly:
// each has a range of neighbouring ones, whose sums of squares it writes to memory, 8 bytes a part.
// Every lane reads its next batch before its block adds up the sums of the last eight. What has an
// image and class to itself makes their state as it goes along; where two blocks or more share them,
// the last to arrive does. Its order is that of the steps, whatever the blocks: the same bits on
// every GPU.
//
// Single locations and centres that images share have kernels of their own (scoring_locations.cu,
// shared_centers.cu).
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "introspection.h"
#include "scoring_rows.cuh"
#include "states.cuh"

namespace genrep_fast {
namespace {

// Of every warp, before a block adds them up.
constexpr int kTileBatches = 8;
constexpr int kTileSlots = kTileBatches * kWarps;
// With so many images and classes a block they are not shared: what blocks do differs by a sixteenth
// at most.
constexpr int64_t kUncutPairs = 16;

// Quotients of numbers below 2^31 by multiplication.
struct Divisor {
  uint32_t divisor, multiplier, shift;

  struct Result {
    uint32_t quotient, remainder;
  };

  explicit Divisor(int64_t number) : divisor(static_cast<uint32_t>(number)), shift(0) {
    while ((uint64_t{1} << shift) < divisor) {
      ++shift;
    }
    const uint64_t rest = (uint64_t{1} << shift) - divisor;
    multiplier = static_cast<uint32_t>((rest << 32) / divisor + 1);
  }

  __device__ Result divide(uint32_t number) const {
    const uint32_t high = static_cast<uint32_t>(uint64_t{number} * multiplier >> 32);
    const uint32_t quotient = (high + number) >> shift;
    return {quotient, number - quotient * divisor};
  }
};

// All parts, [B, K, S, parts], cut into neighbouring ranges, one a block.
struct Ranges {
  int64_t share, rest;  // units of a range; the first `rest` ranges have one more
  int64_t unit;         // parts: one, or those of an image and class

  __device__ int64_t begin(int64_t block) const {
    return unit * (block * share + min(block, rest));
  }

  // The block whose range has a part, where units are parts.
  __device__ int64_t block_of(int64_t part) const {
    const int64_t longer = rest * (share + 1);
    return part < longer ? part / (share + 1) : rest + (part - longer) / share;
  }
};

struct RowWork {
  RowLayout layout;
  Ranges ranges;
  Divisor parts, steps, classes;
  Divisor pair_parts;  // of an image and class
  int pair_lane_bits;  // 2^pair_lane_bits lanes make the state of an image and class
  double* squares;     // [B, K, S, parts]; null where an image and class have one part
  unsigned* arrivals;  // [blocks] zeros; null where no range cuts an image and class
};

struct Part {
  int64_t b;
  uint32_t k, s, part;
};

__device__ inline Part part_at(const DeviceChunk& chunk, const RowWork& work, int64_t index) {
  const int64_t row = index / work.layout.parts;
  const int64_t pair = row / chunk.steps;
  const int64_t b = pair / chunk.classes;
  return {
      b, static_cast<uint32_t>(pair - b * chunk.classes),
      static_cast<uint32_t>(row - pair * chunk.steps),
      static_cast<uint32_t>(index - row * work.layout.parts)};
}

// The part `offset` parts behind another one.
__device__ inline Part part_after(const RowWork& work, const Part& part, uint32_t offset) {
  const Divisor::Result row = work.parts.divide(part.part + offset);
  const Divisor::Result pair = work.steps.divide(part.s + row.quotient);
  const Divisor::Result image = work.classes.divide(part.k + pair.quotient);
  return {part.b + image.quotient, image.remainder, pair.remainder, row.remainder};
}

// What a block works on: parts in the order of its slots, which are warps' batches. In shared memory,
// as registers are scarce.
struct Range {
  int64_t begin, first_pair;
  Part first;
  uint32_t first_of_pair;  // among the parts of its image and class
  int parts;

  __device__ void set(const DeviceChunk& chunk, const RowWork& work) {
    begin = work.ranges.begin(blockIdx.x);
    parts = static_cast<int>(work.ranges.begin(int64_t{blockIdx.x} + 1) - begin);
    first = part_at(chunk, work, begin);
    first_pair = first.b * chunk.classes + first.k;
    first_of_pair = first.s * work.layout.parts + first.part;
  }

  // Images and classes from `first_pair` on whose last part is before a slot; at least the one that
  // the range begins within.
  __device__ int pairs_before(const RowWork& work, int slot) const {
    const int part = min((slot >> work.layout.batch_bits) * work.layout.teams(), parts);
    const uint32_t pairs = work.pair_parts.divide(first_of_pair + part).quotient;
    return static_cast<int>(max(pairs, first_of_pair > 0 ? 1u : 0u));
  }

  // The part of a lane in a slot; it may be past the range's end.
  __device__ int part_of(const RowLayout& layout, int slot) const {
    const int lane = threadIdx.x % kWarp;
    return (slot >> layout.batch_bits) * layout.teams() + (lane >> layout.team_bits);
  }

  __device__ int slots(const RowLayout& layout) const {
    return (parts + layout.teams() - 1) / layout.teams() << layout.batch_bits;
  }
};

// A batch of a part of a row.
template <typename Access>
struct PartBatch {
  Row row;
  Residuals<Access> quads[kBatch];

  __device__ void load(
      const DeviceChunk& chunk, const RowWork& work, const Range& range, int slot) {
    const RowLayout& layout = work.layout;
    const int index = range.part_of(layout, slot);
    const bool exists = index < range.parts;
    const Part part = part_after(work, range.first, exists ? index : 0);
    row = row_at(chunk, part.b, part.k, part.s);
    const int batch = slot & (layout.batches() - 1);
    load_batch<Access>(
        chunk, row, exists ? chunk.row_quads() : 0,
        layout.first_quad(part.part, batch, threadIdx.x), layout.team(), quads);
  }
};

// The state of the steps of an image and class, in the first of the lanes that share them.
__device__ State pair_state(
    const DeviceChunk& chunk, const RowWork& work, int64_t pair, bool exists, int lane_bits) {
  const RowLayout& layout = work.layout;
  const int lane = threadIdx.x & ((1 << lane_bits) - 1);
  const int step_lane = lane & ((1 << layout.part_lane_bits) - 1);
  State state = empty_state(chunk.mixture);
#pragma unroll 1
  for (int64_t first = 0; first < chunk.steps; first += 1 << (lane_bits - layout.part_lane_bits)) {
    const int64_t s = first + (lane >> layout.part_lane_bits);
    const int64_t own = exists ? pair * chunk.steps + min(s, chunk.steps - 1) : 0;
    const double squares = row_squares(work.squares + own * layout.parts, layout);
    if (step_lane == 0 && s < chunk.steps) {
      add_step(state, step_likelihood(chunk, s, squares, chunk.elements), chunk.mixture);
    }
  }
  return merged_over_warp(state, 1 << lane_bits, chunk.mixture);
}

// Images and classes from `first` to `end` of the range, whose squares this block has written.
__device__ void finish_pairs(
    const DeviceChunk& chunk, const RowWork& work, const Destination& destination,
    const Range& range, int first, int end) {
  const int warp = threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int width = kWarp >> work.pair_lane_bits;
#pragma unroll 1
  for (int own = first + warp * width; own < end; own += kWarps * width) {
    const int index = own + (lane >> work.pair_lane_bits);
    const int64_t pair = range.first_pair + index;
    const State state = pair_state(chunk, work, pair, index < end, work.pair_lane_bits);
    if (index < end && (lane & ((1 << work.pair_lane_bits) - 1)) == 0) {
      destination.finish(chunk, pair / chunk.classes, pair % chunk.classes, 0, 1, state);
    }
  }
}

// Whether this block is the last of those that share an image and class.
__device__ bool arrives_last(const RowWork& work, int64_t pair) {
  const int64_t parts = work.pair_parts.divisor;
  const int64_t first = work.ranges.block_of(pair * parts);
  const int64_t last = work.ranges.block_of((pair + 1) * parts - 1);
  __threadfence();  // the squares before the arrival
  return atomicAdd(work.arrivals + first, 1u) == static_cast<unsigned>(last - first);
}

// The image and class that the range begins within, and those that it ends within.
__device__ void finish_shared_pairs(
    const DeviceChunk& chunk, const RowWork& work, const Destination& destination,
    const Range& range) {
  __shared__ bool complete[2];
  const int warp = threadIdx.x / kWarp;
  const int64_t parts = work.pair_parts.divisor;
  const int64_t end = range.first_of_pair + range.parts;
  const int64_t pair = range.first_pair + (warp == 0 ? 0 : end / parts);
  const bool begins_within = range.first_of_pair > 0 && (warp == 0 || end < parts);
  const bool ends_within = end % parts != 0;
  if (warp < 2 && threadIdx.x % kWarp == 0) {
    const bool shared = warp == 0 ? begins_within : ends_within && !begins_within;
    complete[warp] = shared && arrives_last(work, pair);
  }
  __syncthreads();
  if (warp < 2 && complete[warp]) {
    __threadfence();  // the arrivals before the squares
    const State state = pair_state(chunk, work, pair, true, work.pair_lane_bits);
    if (threadIdx.x % kWarp == 0) {
      destination.finish(chunk, pair / chunk.classes, pair % chunk.classes, 0, 1, state);
    }
  }
}

// The sums of a tile's batches, of slots from `first` on: to memory, or where images and classes have
// one part, their states.
template <bool kFinishes>
__device__ void add_up_tile(
    const DeviceChunk& chunk, const RowWork& work, const Destination& destination,
    const Range& range, const float (*tile)[kWarp], int first, int end) {
  const RowLayout& layout = work.layout;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
#pragma unroll 1
  for (int slot = warp << layout.batch_bits; slot < end; slot += kWarps << layout.batch_bits) {
    double squares = 0;
#pragma unroll 1
    for (int other = 0; other < layout.batches(); ++other) {
      squares += tile[slot + other][lane];
    }
    squares = lanes_sum(squares, layout.team_bits);
    const int part = range.part_of(layout, first + slot);
    if (part >= range.parts || (lane & (layout.team() - 1)) != 0) {
      continue;
    }
    if (!kFinishes || work.squares != nullptr) {
      work.squares[range.begin + part] = squares;
      continue;
    }
    const Part own = part_after(work, range.first, part);
    State state = empty_state(chunk.mixture);
    add_step(state, step_likelihood(chunk, 0, squares, chunk.elements), chunk.mixture);
    destination.finish(chunk, own.b, own.k, 0, 1, state);
  }
}

template <typename Access>
__global__ __launch_bounds__(kThreads, Access::kBlocks) void log_likelihood_rows_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ RowWork work,
    const __grid_constant__ Destination destination) {
  // While one half is added up, the other is filled.
  __shared__ float sums[2][kTileSlots][kWarp];
  __shared__ Range range;
  if (threadIdx.x == 0) {
    range.set(chunk, work);
  }
  __syncthreads();
  const RowLayout& layout = work.layout;
  const int warp = threadIdx.x / kWarp;
  const int slots = range.slots(layout);
  const bool makes_states = destination.exists() && work.squares != nullptr;
  if (destination.counts_steps) {
    destination.count_steps(chunk);
  }

  PartBatch<Access> batch;
  batch.load(chunk, work, range, warp);
#pragma unroll 1
  for (int first = 0; first < slots; first += kTileSlots) {
    float (*tile)[kWarp] = sums[first / kTileSlots % 2];
    const int end = min(kTileSlots, slots - first);
    // Of images and classes of earlier tiles alone, whose squares the barrier below shows to the
    // block. States need the registers of a batch.
    const bool finishes = work.squares == nullptr || (makes_states && first > 0 &&
                                                      range.pairs_before(work, first - kTileSlots) <
                                                          range.pairs_before(work, first));
#pragma unroll 1
    for (int slot = warp; slot < end; slot += kWarps) {
      float residuals[kBatch * kQuad];
      tile[slot][threadIdx.x % kWarp] =
          batch_squares<Access>(chunk, batch.row, batch.quads, residuals);
      if (slot + kWarps < end || !finishes) {
        batch.load(chunk, work, range, first + slot + kWarps);
      }
    }
    __syncthreads();
    if (!finishes) {
      add_up_tile<false>(chunk, work, destination, range, tile, first, end);
      continue;
    }
    add_up_tile<true>(chunk, work, destination, range, tile, first, end);
    if (makes_states) {
      finish_pairs(
          chunk, work, destination, range, range.pairs_before(work, first - kTileSlots),
          range.pairs_before(work, first));
    }
    batch.load(chunk, work, range, first + kTileSlots + warp);
  }
  if (makes_states) {
    __syncthreads();
    const int last_tile = (slots - 1) / kTileSlots * kTileSlots;
    finish_pairs(
        chunk, work, destination, range, range.pairs_before(work, last_tile),
        range.pairs_before(work, slots));
    if (work.arrivals != nullptr) {
      finish_shared_pairs(chunk, work, destination, range);
    }
  }
}

int processors(const Tensor& x) {
  int number = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&number, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  return number;
}

// As many ranges as blocks run at once, unless that leaves some without a batch for each lane.
RowWork row_work(const DeviceChunk& chunk, const RowLayout& layout, int64_t most, int64_t& blocks) {
  const int64_t pairs = chunk.batch * chunk.classes;
  const int64_t pair_parts = chunk.steps * layout.parts;
  const int64_t lanes = layout.team() * layout.batches();
  blocks = std::clamp<int64_t>(ceil_div(pairs * pair_parts * lanes, kThreads), 1, most);
  const bool cut = pair_parts > 1 && pairs < kUncutPairs * blocks;
  blocks = std::min(blocks, cut ? pairs * pair_parts : pairs);
  const int64_t unit = cut ? 1 : pair_parts;
  const int64_t units = pairs * pair_parts / unit;
  const Ranges ranges{units / blocks, units % blocks, unit};
  STD_TORCH_CHECK(
      (ranges.share + 1) * unit + pair_parts + chunk.classes < int64_t{1} << 31,
      "too many elements for one call: ", (ranges.share + 1) * unit, " rows a block");
  int pair_lane_bits = layout.part_lane_bits;
  while (pair_lane_bits < 5 &&
         int64_t{1} << (pair_lane_bits - layout.part_lane_bits) < chunk.steps) {
    ++pair_lane_bits;
  }
  return {
      layout,
      ranges,
      Divisor(layout.parts),
      Divisor(chunk.steps),
      Divisor(chunk.classes),
      Divisor(pair_parts),
      pair_lane_bits,
      nullptr,
      nullptr};
}

// The states of rows, to `destination` where it exists; their squares to `squares` where that is not
// null.
void launch_rows(
    const DeviceChunk& chunk, const Destination& destination, double* squares, const Tensor& x,
    cudaStream_t stream) {
  const RowLayout layout = layout_of(chunk);
  with_access(chunk, false, true, [&](auto access) {
    int64_t blocks = 0;
    RowWork work =
        row_work(chunk, layout, int64_t{processors(x)} * decltype(access)::kBlocks, blocks);
    const bool needs_squares = squares == nullptr && work.pair_parts.divisor > 1;
    const bool needs_arrivals =
        destination.exists() && work.ranges.unit == 1 && work.pair_parts.divisor > 1 && blocks > 1;
    const int64_t all_squares =
        needs_squares ? chunk.batch * chunk.classes * work.pair_parts.divisor : 0;
    const Tensor memory =
        new_tensor(x, {all_squares + (needs_arrivals ? blocks : 0)}, ScalarType::Double);
    work.squares = needs_squares ? static_cast<double*>(memory.data_ptr()) : squares;
    if (needs_arrivals) {
      work.arrivals =
          reinterpret_cast<unsigned*>(static_cast<double*>(memory.data_ptr()) + all_squares);
      STD_CUDA_CHECK(cudaMemsetAsync(work.arrivals, 0, blocks * sizeof(unsigned), stream));
    }
    log_likelihood_rows_kernel<decltype(access)>
        <<<grid_of(blocks), kThreads, 0, stream>>>(chunk, work, destination);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

// The states of every image, class and location, to `destination`. Returns whether their steps have
// been counted, where it counts them.
bool score(
    const DeviceChunk& chunk, bool per_location, const Destination& destination, const Tensor& x,
    cudaStream_t stream) {
  if (chunk.batch * chunk.classes * (per_location ? chunk.locations : 1) == 0) {
    return false;
  }
  if (per_location) {
    launch_locations(chunk, destination, stream);
    return false;
  }
  if (shares_centers(chunk, false)) {
    launch_shared_centers(chunk, destination, x, stream);
    return false;
  }
  if (chunk.steps == 0) {
    launch_merge(chunk, {0, 0}, destination, stream);
    return false;
  }
  launch_rows(chunk, destination, nullptr, x, stream);
  return true;
}

// ---- operators ----

std::tuple<Tensor, Tensor> log_likelihood(
    const Tensor& x, const Tensor& model_output, const std::optional<Tensor>& x_t,
    const Tensor& tables, const std::string& reduction, bool per_location) {
  DeviceScope scope(x);
  const ScoredChunk chunk = checked_chunk(x, model_output, x_t, tables, reduction, per_location);
  const std::vector<int64_t> sizes = result_sizes(chunk, x, per_location);
  Tensor likelihood = new_tensor(x, sizes, ScalarType::Float);
  Tensor remainder =
      new_tensor(x, chunk.mixture ? sizes : std::vector<int64_t>{0}, ScalarType::Float);
  Destination destination{};
  destination.likelihood = static_cast<float*>(likelihood.data_ptr());
  destination.remainder = static_cast<float*>(remainder.data_ptr());
  score(device_chunk(chunk, false), chunk.per_location, destination, x, scope.stream());
  return {likelihood, remainder};
}

void score_update(
    const Tensor& x, const Tensor& model_output, const std::optional<Tensor>& x_t,
    const Tensor& tables, const std::optional<Tensor>& classes, const std::string& reduction,
    bool per_location, const Tensor& count, const Tensor& state) {
  DeviceScope scope(x);
  const ScoredChunk chunk = checked_chunk(x, model_output, x_t, tables, reduction, per_location);
  std::optional<Tensor> places;
  if (classes) {
    places = torch::stable::contiguous(*classes);
    check_tensor(*places, ScalarType::Long, {chunk.classes}, x, "classes");
  }
  std::vector<int64_t> sizes = result_sizes(chunk, x, per_location);
  sizes[1] = classes ? count.size(0) : chunk.classes;
  check_tensor(count, ScalarType::Long, {sizes[1]}, x, "count");
  sizes.insert(sizes.begin(), chunk.mixture ? 3 : 2);
  check_tensor(state, ScalarType::Double, sizes, x, "state");
  Destination destination{};
  destination.state = static_cast<double*>(state.data_ptr());
  destination.count = static_cast<int64_t*>(count.data_ptr());
  // The mean's update reads the count.
  destination.counts_steps = chunk.mixture;
  destination.classes = places ? static_cast<const int64_t*>(places->data_ptr()) : nullptr;
  destination.all_classes = count.size(0);
  const DeviceChunk device = device_chunk(chunk, false);
  const bool counted = score(device, chunk.per_location, destination, x, scope.stream());
  if (!counted || !destination.counts_steps) {
    launch_count(device, destination, scope.stream());
  }
}

}  // namespace

void launch_row_squares(
    const DeviceChunk& chunk, double* squares, const Tensor& x, cudaStream_t stream) {
  launch_rows(chunk, {}, squares, x, stream);
}

std::vector<Kernel> scoring_kernels() {
  std::vector<Kernel> kernels;
  for_each_access([&](auto access, const char* name) {
    kernels.push_back(
        {std::string("log_likelihood_rows_kernel<") + name + ">",
         reinterpret_cast<const void*>(&log_likelihood_rows_kernel<decltype(access)>)});
  });
  return kernels;
}

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cuda, CUDA, m) {
  m.impl("log_likelihood", TORCH_BOX(&log_likelihood));
  m.impl("score_update", TORCH_BOX(&score_update));
}

}  // namespace genrep_fast
