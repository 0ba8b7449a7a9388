// Log-likelihoods of images under every class, their gradients and the streaming update (see
// genrep_fast/reference/scoring.py).
//
//     r = a_s x + b_s x_t + c_s o                                       residual of a row: one image b, class k and step s
//     l = -1/2 v_s sum r^2 + D n_s,   L = logsumexp_s l - log S  or the mean of l
//     dl/do = -v_s c_s r,   dL/dl = exp(l - logsumexp l)  or  1/S
//
// Forward reads o, B K S D elements, and x and x_t as often through the caches; 4 multiply-adds an
// element: bound by memory. Backward for o alone reads o and writes as much: a row is read a second
// time, from the caches, because its weight needs the whole row.
//
// Rows of few elements are a part of a warp's, longer ones a warp's or a block's, as their size
// alone decides. A block works on some steps of one image and class; its state is merged with those
// of the other steps by a second kernel, in their order. With a likelihood for every location a
// thread works on four locations. Where images share the centres, K S D elements, a block keeps the
// sums of 64 images and 64 steps in registers, so that a centre is read once for 64 images: 2
// multiply-adds for each pair and element, bound by arithmetic.
//
// Gradients that are summed over images, classes or steps (that of x; those of o and x_t where they
// are shared) need the factor of every row first, 4 bytes each, and read the chunk once more.
#include "scoring.cuh"

#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "introspection.h"

namespace genrep_fast {
namespace {

constexpr int kWarpRow = 8192;        // elements of a row that is a warp's at most
constexpr int64_t kBlocks = 1024;     // that few images and classes are cut into
constexpr int64_t kTileBlocks = 512;  // likewise, for tiles
constexpr int64_t kMaxGroups = 128;   // of steps
constexpr int kSlices = 8;  // that the steps of few locations are cut into, within a block
constexpr int kDepth = 32;  // elements of a tile's rows that are in shared memory at once
constexpr int kPitch =
    kDepth + 4;  // of a row there: no two of eight neighbouring rows begin in the same bank

// ---- what becomes of the states ----

struct Destination {
  float *likelihood, *remainder;  // [B, K, *loc]; or null, and
  double* state;                  // [3 or 2, B, all_classes, *loc]
  const int64_t *count, *classes;
  int64_t all_classes;
  State* partials;  // [B, K, groups], where there are several groups of steps

  __device__ void finish(
      const DeviceChunk& chunk, int64_t b, int64_t k, int64_t location, int64_t locations,
      const State& state) const {
    if (likelihood != nullptr) {
      const int64_t index = (b * chunk.classes + k) * locations + location;
      const double exact =
          chunk.mixture ? state.center + log(state.weight) - chunk.log_steps : state.center;
      likelihood[index] = static_cast<float>(exact);
      if (chunk.mixture) {
        remainder[index] =
            isinf(likelihood[index]) ? 0.f : static_cast<float>(exact - likelihood[index]);
      }
    } else {
      update(chunk, b, k, location, locations, state);
    }
  }

  __device__ void update(
      const DeviceChunk& chunk, int64_t b, int64_t k, int64_t location, int64_t locations,
      const State& added) const {
    const int64_t own_class = classes == nullptr ? k : classes[k];
    if (own_class < 0 || own_class >= all_classes) {
      return;  // as the caller's assertion says, later
    }
    const int64_t plane = chunk.batch * all_classes * locations;
    double* place = state + (b * all_classes + own_class) * locations + location;
    if (chunk.mixture) {
      const State sum = merged({place[0], place[plane], place[2 * plane]}, added, true);
      place[0] = sum.center;
      place[plane] = sum.weight;
      place[2 * plane] = sum.squares;
    } else {
      const State sum =
          merged({place[0], static_cast<double>(count[own_class]), place[plane]}, added, false);
      place[0] = sum.center;
      place[plane] = sum.squares;
    }
  }
};

// Steps in groups, a block each.
struct Groups {
  int64_t number, steps;
};

template <typename Access>
__global__ __launch_bounds__(kThreads, Access::kBlocks) void rows_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Groups groups,
    const __grid_constant__ Destination destination, int team) {
  const int64_t b = blockIdx.x % chunk.batch, rest = blockIdx.x / chunk.batch,
                group = rest % groups.number, k = rest / groups.number;
  const int64_t end = min((group + 1) * groups.steps, chunk.steps);
  const int lane = threadIdx.x % team, index = threadIdx.x / team, teams = blockDim.x / team;
  State state = empty_state(chunk.mixture);
#pragma unroll 1
  for (int64_t first = group * groups.steps; first < end; first += teams) {
    const int64_t s = min(first + index, end - 1);
    const Row row = row_at(chunk, b, k, s);
    const int quads = first + index < end ? chunk.row_quads() : 0;
    const double squares = team_sum(row_squares<Access>(chunk, row, quads, lane, team), team);
    if (first + index < end) {
      add_step(state, step_likelihood(chunk, s, squares, chunk.elements), chunk.mixture);
    }
  }
  __shared__ State states[kThreads];
  if (lane == 0) {
    states[index] = state;
  }
  state = reduced_over_block(
      states, teams, [&](const State& a, const State& b) { return merged(a, b, chunk.mixture); });
  if (threadIdx.x == 0) {
    if (destination.partials != nullptr) {
      destination.partials[(b * chunk.classes + k) * groups.number + group] = state;
    } else {
      destination.finish(chunk, b, k, 0, 1, state);
    }
  }
}

__device__ State shuffled(const State& state, int distance) {
  return {
      __shfl_xor_sync(0xffffffff, state.center, distance),
      __shfl_xor_sync(0xffffffff, state.weight, distance),
      __shfl_xor_sync(0xffffffff, state.squares, distance)};
}

// Merges with the threads of the warp whose numbers differ below `width`, a power of two; the
// result of the first is in their order.
__device__ State merged_over_warp(State state, int width, bool mixture) {
#pragma unroll 1
  for (int distance = 1; distance < width; distance *= 2) {
    state = merged(state, shuffled(state, distance), mixture);
  }
  return state;
}

// A warp an image and class: merges the states of the groups.
__global__ __launch_bounds__(kThreads, 4) void groups_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Groups groups,
    const __grid_constant__ Destination destination) {
  const int64_t pair = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (pair >= chunk.batch * chunk.classes) {
    return;
  }
  const int lane = threadIdx.x % 32;
  const int64_t share = (groups.number + 31) / 32;
  State state = empty_state(chunk.mixture);
  for (int64_t group = lane * share; group < min((lane + 1) * share, groups.number); ++group) {
    state = merged(state, destination.partials[pair * groups.number + group], chunk.mixture);
  }
  state = merged_over_warp(state, 32, chunk.mixture);
  if (lane == 0) {
    destination.finish(chunk, pair / chunk.classes, pair % chunk.classes, 0, 1, state);
  }
}

// A thread four locations of an image and class, or some of their steps.
template <typename Access>
__global__ __launch_bounds__(kThreads) void locations_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Destination destination,
    int slices) {
  const int width = kThreads / slices, lane = threadIdx.x % width, slice = threadIdx.x / width;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * width + lane;  // [K, B, quads]
  const int64_t pair = item / chunk.inner_quads, b = pair % chunk.batch, k = pair / chunk.batch;
  const int location = kQuad * static_cast<int>(item - pair * chunk.inner_quads);
  const bool exists = k < chunk.classes;
  State states[kQuad];
  for (int j = 0; j < kQuad; ++j) {
    states[j] = empty_state(chunk.mixture);
  }
#pragma unroll 1
  for (int64_t s = slice; s < (exists ? chunk.steps : 0); s += slices) {
    double squares[kQuad];
    location_squares<Access>(chunk, row_at(chunk, b, k, s), location, squares);
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      add_step(states[j], step_likelihood(chunk, s, squares[j], chunk.channels), chunk.mixture);
    }
  }
  __shared__ State shared[kThreads];
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    __syncthreads();
    shared[threadIdx.x] = states[j];
    __syncthreads();
    if (slice == 0 && exists && location + j < chunk.locations) {
      State state = states[j];
#pragma unroll 1
      for (int other = lane + width; other < kThreads; other += width) {
        state = merged(state, shared[other], chunk.mixture);
      }
      destination.finish(chunk, b, k, location + j, chunk.locations, state);
    }
  }
}

__global__ void count_kernel(
    int64_t* count, const int64_t* classes, int64_t number, int64_t all_classes, int64_t steps) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k < number) {
    const int64_t own_class = classes == nullptr ? k : classes[k];
    if (0 <= own_class && own_class < all_classes) {
      count[own_class] += steps;
    }
  }
}

// ---- gradients ----

struct Upstream {
  const float *grad, *likelihood,
      *remainder;  // [B, K, *loc]; the last two are not there for the mean

  // -v dL/dl grad, by which r is multiplied; `index` is that of the image, class and location.
  __device__ float factor(const DeviceChunk& chunk, int64_t index, int64_t s, double step) const {
    float weight = 1.f / chunk.steps;
    if (chunk.mixture) {
      const double total =
          static_cast<double>(likelihood[index]) + remainder[index] + chunk.log_steps;
      weight = likelihood[index] == -INFINITY ? 0.f : static_cast<float>(exp(step - total));
    }
    return -chunk.inv_var[s] * weight * grad[index];
  }
};

// A step without weight passes no gradient, even where its residual is infinite.
__device__ float gradient(float factor, float r) { return factor == 0 ? 0.f : factor * r; }

// Gradient [B, K, S, outer, inner] of o, contiguous but for the channels that o has beyond x's.
struct OutputGradient {
  Operand operand;
  int inner_size;  // may be less than that of a chunk whose rows are flat

  template <typename Access>
  __device__ void store(
      const DeviceChunk& chunk, int64_t row, Place place, const float (&values)[kQuad]) const {
    const Dtype dtype = Access::output_dtype(chunk);
    if constexpr (Access::kWhole) {
      store_aligned(
          operand.data, dtype, row + place.outer * operand.outer + place.inner,
          pack(values, dtype));
      return;
    }
    const int element = place.outer * chunk.inner_size + place.inner;
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      if (place.inner + k < chunk.inner_size) {
        const int outer = (element + k) / inner_size, inner = element + k - outer * inner_size;
        store_element(
            operand.data, dtype, row + outer * operand.outer + inner * operand.inner, values[k]);
      }
    }
  }
};

// A team a row: its factor, and the gradient of o where `output` has memory.
template <typename Access>
__global__ __launch_bounds__(kThreads, Access::kBlocks) void rows_gradient_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Upstream upstream,
    const __grid_constant__ OutputGradient output, float* factors, int team) {
  const int64_t index =
      (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / team;  // [B, K, S]
  const int64_t pair = index / chunk.steps, s = index - pair * chunk.steps;
  const bool exists = pair < chunk.batch * chunk.classes;
  const int64_t b = exists ? pair / chunk.classes : 0, k = exists ? pair % chunk.classes : 0;
  const int lane = threadIdx.x % team, quads = exists ? chunk.row_quads() : 0;
  const Row row = row_at(chunk, b, k, s);
  double step = 0;
  if (chunk.mixture) {
    step = step_likelihood(
        chunk, s, team_sum(row_squares<Access>(chunk, row, quads, lane, team), team),
        chunk.elements);
  }
  if (!exists) {
    return;
  }
  const float factor = upstream.factor(chunk, pair, s, step);
  if (factors != nullptr && lane == 0) {
    factors[index] = factor;
  }
  if (output.operand.data == nullptr) {
    return;
  }
  const int64_t target = output.operand.row(b, k, s);
#pragma unroll 1
  for (int first = lane; first < quads; first += kBatch * team) {
    Residuals<Access> batch[kBatch];
    load_batch<Access>(chunk, row, quads, first, team, batch);
#pragma unroll
    for (int q = 0; q < kBatch; ++q) {
      if (first + q * team < quads) {
        float values[kQuad];
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          values[j] = row.output_factor * gradient(factor, batch[q].at(chunk, row, j));
        }
        output.store<Access>(chunk, target, Access::place(chunk, first + q * team), values);
      }
    }
  }
}

// Factors of four locations of a row from `location` on.
template <typename Access>
__device__ void location_factors(
    const DeviceChunk& chunk, const Upstream& upstream, const Row& row, int64_t b, int64_t k,
    int64_t s, int location, float (&factors)[kQuad]) {
  double squares[kQuad] = {};
  if (chunk.mixture) {
    location_squares<Access>(chunk, row, location, squares);
  }
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const int64_t index =
        (b * chunk.classes + k) * chunk.locations + min(location + j, chunk.locations - 1);
    factors[j] =
        upstream.factor(chunk, index, s, step_likelihood(chunk, s, squares[j], chunk.channels));
  }
}

// A thread four locations of a row.
template <typename Access>
__global__ __launch_bounds__(kThreads) void locations_gradient_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Upstream upstream,
    const __grid_constant__ OutputGradient output) {
  const int64_t item =
      static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;  // [B, K, S, quads]
  const int64_t index = item / chunk.inner_quads, pair = index / chunk.steps,
                s = index - pair * chunk.steps;
  if (pair >= chunk.batch * chunk.classes) {
    return;
  }
  const int64_t b = pair / chunk.classes, k = pair % chunk.classes;
  const int location = kQuad * static_cast<int>(item - index * chunk.inner_quads);
  const Row row = row_at(chunk, b, k, s);
  float factors[kQuad];
  location_factors<Access>(chunk, upstream, row, b, k, s, location, factors);
  const int64_t target = output.operand.row(b, k, s);
#pragma unroll 1
  for (int first = 0; first < chunk.channels; first += kBatch) {
    Residuals<Access> batch[kBatch];
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      batch[c] = first + c < chunk.channels
                     ? Residuals<Access>::load(chunk, row, {first + c, location})
                     : Residuals<Access>{};
    }
#pragma unroll
    for (int c = 0; c < kBatch; ++c) {
      if (first + c < chunk.channels) {
        float values[kQuad];
#pragma unroll
        for (int j = 0; j < kQuad; ++j) {
          values[j] = row.output_factor * gradient(factors[j], batch[c].at(chunk, row, j));
        }
        output.store<Access>(chunk, target, {first + c, location}, values);
      }
    }
  }
}

// Gradient [1 or B, 1 or K, 1 or S, channels, locations] of x, o or x_t, summed over the axes of
// size 1.
struct SummedGradient {
  void* data;
  Dtype dtype;
  const float* table;  // dr/dx, dr/do or dr/dx_t, [S]
  int64_t batch, classes, steps, stride;

  __device__ __host__ int64_t rows() const { return batch * classes * steps; }
  __device__ __host__ int64_t terms(const DeviceChunk& chunk) const {
    return (batch == 1 ? chunk.batch : 1) * (classes == 1 ? chunk.classes : 1) *
           (steps == 1 ? chunk.steps : 1);
  }
};

// A thread four elements of the gradient, or some of their terms. `factors` [B, K, S], or null
// where locations have their own.
template <bool kPerLocation>
__global__ __launch_bounds__(kThreads, 1) void sum_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Upstream upstream,
    const __grid_constant__ SummedGradient sum, const float* factors, int slices) {
  const int width = kThreads / slices, lane = threadIdx.x % width, slice = threadIdx.x / width;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * width + lane,
                target = item / chunk.row_quads();
  const bool exists = target < sum.rows();
  const Place place = AnyAccess::place(chunk, static_cast<int>(item - target * chunk.row_quads()));
  const int64_t own_step = target % sum.steps, own_class = target / sum.steps % sum.classes,
                own_image = target / sum.steps / sum.classes;
  const int64_t steps = sum.steps == 1 ? chunk.steps : 1,
                classes = sum.classes == 1 ? chunk.classes : 1;
  double totals[kQuad] = {};
#pragma unroll 1
  for (int64_t term = slice; term < (exists ? sum.terms(chunk) : 0); term += slices) {
    const int64_t s = own_step + term % steps, k = own_class + term / steps % classes,
                  b = own_image + term / steps / classes;
    const Row row = row_at(chunk, b, k, s);
    const Residuals<AnyAccess> residuals = Residuals<AnyAccess>::load(chunk, row, place);
    float own_factors[kQuad];
    if constexpr (kPerLocation) {
      location_factors<AnyAccess>(chunk, upstream, row, b, k, s, place.inner, own_factors);
    } else {
      own_factors[0] = own_factors[1] = own_factors[2] = own_factors[3] =
          factors[(b * chunk.classes + k) * chunk.steps + s];
    }
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      totals[j] += sum.table[s] * gradient(own_factors[j], residuals.at(chunk, row, j));
    }
  }
  __shared__ double shared[kThreads];
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    __syncthreads();
    shared[threadIdx.x] = totals[j];
    __syncthreads();
    if (slice == 0 && exists && place.inner + j < chunk.inner_size) {
      double total = 0;
#pragma unroll 1
      for (int other = lane; other < kThreads; other += width) {
        total += shared[other];
      }
      const int64_t offset = target * sum.stride +
                             static_cast<int64_t>(place.outer) * chunk.inner_size + place.inner + j;
      store_element(sum.data, sum.dtype, offset, static_cast<float>(total));
    }
  }
}

// ---- centres that images share ----

template <int kImages, int kSteps>
struct Tile {
  static constexpr int kSide = 16;  // threads along either axis
  alignas(16) float images[kSide * kImages][kPitch], centers[kSide * kSteps][kPitch];

  // x, and b x_t + c o, of the elements from quad `first` on; zeros past the ends.
  __device__ void load(
      const DeviceChunk& chunk, int64_t first_image, int64_t k, int64_t first_step, int first) {
    for (int i = threadIdx.x; i < kSide * (kImages + kSteps) * (kDepth / kQuad); i += kThreads) {
      const int line = i / (kDepth / kQuad), quad = first + i % (kDepth / kQuad),
                column = kQuad * (i % (kDepth / kQuad));
      const bool is_image = line < kSide * kImages;
      const int64_t b = first_image + line, s = first_step + line - kSide * kImages;
      float4 values = make_float4(0, 0, 0, 0);
      if (quad < chunk.row_quads() && (is_image ? b < chunk.batch : s < chunk.steps)) {
        values = is_image ? image(chunk, b, quad) : center(chunk, k, s, quad);
      }
      float* target = is_image ? images[line] : centers[line - kSide * kImages];
      *reinterpret_cast<float4*>(target + column) = values;
    }
  }

  static __device__ float4 image(const DeviceChunk& chunk, int64_t b, int index) {
    const Quad quad = AnyAccess::load(
        chunk.x, chunk.x.dtype, chunk.x.row(b, 0, 0), AnyAccess::place(chunk, index),
        chunk.inner_size);
    const Dtype dtype = chunk.x.dtype;
    return make_float4(
        unpack(quad, dtype, 0), unpack(quad, dtype, 1), unpack(quad, dtype, 2),
        unpack(quad, dtype, 3));
  }

  static __device__ float4 center(const DeviceChunk& chunk, int64_t k, int64_t s, int index) {
    Residuals<AnyAccess> quads = {};
    Row row = row_at(chunk, 0, k, s);
    const Place place = AnyAccess::place(chunk, index);
    quads.output =
        AnyAccess::load(chunk.output, chunk.output.dtype, row.output, place, chunk.inner_size);
    if (chunk.noisy.data != nullptr) {
      quads.noisy =
          AnyAccess::load(chunk.noisy, chunk.noisy.dtype, row.noisy, place, chunk.inner_size);
    }
    row.data_factor = 0;
    return make_float4(
        quads.at(chunk, row, 0), quads.at(chunk, row, 1), quads.at(chunk, row, 2),
        quads.at(chunk, row, 3));
  }
};

// sum r^2 of a tile: images ty + 16 i and steps tx + 16 j of thread (tx, ty); 32 squares in
// float32, above that float64.
template <int kImages, int kSteps>
__device__ void tile_squares(
    const DeviceChunk& chunk, int64_t first_image, int64_t k, int64_t first_step,
    double (&squares)[kImages][kSteps]) {
  using Shared = Tile<kImages, kSteps>;
  __shared__ Shared tile;
  const int tx = threadIdx.x % Shared::kSide, ty = threadIdx.x / Shared::kSide;
  float factors[kSteps];
  for (int j = 0; j < kSteps; ++j) {
    factors[j] = chunk.data_table[min(first_step + tx + Shared::kSide * j, chunk.steps - 1)];
    for (int i = 0; i < kImages; ++i) {
      squares[i][j] = 0;
    }
  }
#pragma unroll 1
  for (int first = 0; first < chunk.row_quads(); first += kDepth / kQuad) {
    __syncthreads();
    tile.load(chunk, first_image, k, first_step, first);
    __syncthreads();
    float sums[kImages][kSteps] = {};
#pragma unroll 2
    for (int column = 0; column < kDepth; column += kQuad) {
      float4 x[kImages];
#pragma unroll
      for (int i = 0; i < kImages; ++i) {
        x[i] = *reinterpret_cast<const float4*>(&tile.images[ty + Shared::kSide * i][column]);
      }
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        const float4 center =
            *reinterpret_cast<const float4*>(&tile.centers[tx + Shared::kSide * j][column]);
#pragma unroll
        for (int i = 0; i < kImages; ++i) {
          const float r[kQuad] = {
              __fmaf_rn(factors[j], x[i].x, center.x), __fmaf_rn(factors[j], x[i].y, center.y),
              __fmaf_rn(factors[j], x[i].z, center.z), __fmaf_rn(factors[j], x[i].w, center.w)};
#pragma unroll
          for (int q = 0; q < kQuad; ++q) {
            sums[i][j] = __fmaf_rn(r[q], r[q], sums[i][j]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kImages; ++i) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        squares[i][j] += sums[i][j];
      }
    }
  }
}

// A block some steps of a class and 16 kImages images: their states, or where `factors` is not
// null, the factors of the rows.
template <int kImages, int kSteps>
__global__ __launch_bounds__(kThreads, 2) void tiles_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Groups groups,
    const __grid_constant__ Destination destination, const __grid_constant__ Upstream upstream,
    float* factors) {
  constexpr int kSide = Tile<kImages, kSteps>::kSide;
  const int64_t tiles = (chunk.batch + kSide * kImages - 1) / (kSide * kImages);
  const int64_t group = blockIdx.x / tiles % groups.number, k = blockIdx.x / tiles / groups.number;
  const int64_t first_image = blockIdx.x % tiles * (kSide * kImages),
                end = min((group + 1) * groups.steps, chunk.steps);
  const int tx = threadIdx.x % kSide, ty = threadIdx.x / kSide;
  State states[kImages];
  for (int i = 0; i < kImages; ++i) {
    states[i] = empty_state(chunk.mixture);
  }
#pragma unroll 1
  for (int64_t first = group * groups.steps; first < end; first += kSide * kSteps) {
    double squares[kImages][kSteps];
    tile_squares<kImages, kSteps>(chunk, first_image, k, first, squares);
#pragma unroll
    for (int i = 0; i < kImages; ++i) {
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        const int64_t s = first + tx + kSide * j, b = first_image + ty + kSide * i;
        if (s < end && b < chunk.batch) {
          const double step = step_likelihood(chunk, s, squares[i][j], chunk.elements);
          if (factors == nullptr) {
            add_step(states[i], step, chunk.mixture);
          } else {
            const int64_t pair = b * chunk.classes + k;
            factors[pair * chunk.steps + s] = upstream.factor(chunk, pair, s, step);
          }
        }
      }
    }
  }
  if (factors != nullptr) {
    return;
  }
#pragma unroll
  for (int i = 0; i < kImages; ++i) {
    const State state = merged_over_warp(states[i], kSide, chunk.mixture);
    const int64_t b = first_image + ty + kSide * i;
    if (tx == 0 && b < chunk.batch) {
      if (destination.partials != nullptr) {
        destination.partials[(b * chunk.classes + k) * groups.number + group] = state;
      } else {
        destination.finish(chunk, b, k, 0, 1, state);
      }
    }
  }
}

// ---- launches ----

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

// With `logical`, channels outside and locations inside, whatever the memory format.
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

// Calls function(access) with the access that the kernels are compiled for.
template <typename Function>
void with_access(
    const DeviceChunk& chunk, bool per_location, bool gradient_is_whole, Function function) {
  const Operand &x = chunk.x, &output = chunk.output, &noisy = chunk.noisy;
  const bool one_dtype = noisy.data == nullptr || noisy.dtype == x.dtype;
  const bool quads = x.quads && output.quads && (noisy.data == nullptr || noisy.quads);
  if (!one_dtype || !quads || !gradient_is_whole || !(per_location || chunk.outer_size == 1)) {
    function(AnyAccess{});
  } else if (output.dtype == kFloat32 && x.dtype == kFloat32) {
    function(WholeAccess<kFloat32, kFloat32>{});
  } else if (output.dtype == kBFloat16 && x.dtype == kBFloat16) {
    function(WholeAccess<kBFloat16, kBFloat16>{});
  } else if (output.dtype == kBFloat16 && x.dtype == kFloat32) {
    function(WholeAccess<kBFloat16, kFloat32>{});
  } else if (output.dtype == kFloat16 && x.dtype == kFloat16) {
    function(WholeAccess<kFloat16, kFloat16>{});
  } else {
    function(AnyAccess{});
  }
}

// Threads that work on a row.
int team_of(int elements) {
  int team = elements > kWarpRow ? kThreads : 1;
  while (team < 32 && team * kBatch * kQuad < elements) {
    team *= 2;
  }
  return team;
}

// At least `share` steps a group, and no more groups than make `blocks` of `pairs` of images and
// classes.
Groups groups_of(int64_t steps, int64_t share, int64_t blocks, int64_t pairs) {
  const int64_t most = std::min(ceil_div(blocks, pairs), kMaxGroups);
  const int64_t length = ceil_div(std::max<int64_t>(ceil_div(steps, most), 1), share) * share;
  return {std::max<int64_t>(ceil_div(steps, length), 1), length};
}

bool shares_centers(const DeviceChunk& chunk, bool per_location) {
  return !per_location && chunk.batch > 1 && chunk.output.batch == 0 && chunk.noisy.batch == 0;
}

Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

// Writes states or, where it is not null, `factors`.
template <int kImages, int kSteps>
void launch_tiles(
    const DeviceChunk& chunk, Destination destination, const Upstream& upstream, float* factors,
    const Tensor& x, cudaStream_t stream) {
  constexpr int kSide = Tile<kImages, kSteps>::kSide;
  const int64_t tiles = ceil_div(chunk.batch, kSide * kImages) * chunk.classes;
  const Groups groups = groups_of(chunk.steps, kSide * kSteps, kTileBlocks, tiles);
  const bool partial = factors == nullptr && groups.number > 1;
  Tensor partials = new_tensor(
      x, {partial ? chunk.batch * chunk.classes * groups.number * 3 : 0}, ScalarType::Double);
  destination.partials = partial ? static_cast<State*>(partials.data_ptr()) : nullptr;
  tiles_kernel<kImages, kSteps><<<grid_of(tiles * groups.number), kThreads, 0, stream>>>(
      chunk, groups, destination, upstream, factors);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (partial) {
    const unsigned blocks = grid_of(ceil_div(chunk.batch * chunk.classes * 32, kThreads));
    groups_kernel<<<blocks, kThreads, 0, stream>>>(chunk, groups, destination);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

void launch_any_tiles(
    const DeviceChunk& chunk, const Destination& destination, const Upstream& upstream,
    float* factors, const Tensor& x, cudaStream_t stream) {
  const bool few_images = chunk.batch <= 16, few_steps = chunk.steps <= 16;
  auto launch = few_images ? (few_steps ? launch_tiles<1, 1> : launch_tiles<1, 4>)
                           : (few_steps ? launch_tiles<4, 1> : launch_tiles<4, 4>);
  launch(chunk, destination, upstream, factors, x, stream);
}

void launch_rows(
    const DeviceChunk& chunk, Destination destination, const Tensor& x, cudaStream_t stream) {
  const int team = team_of(chunk.elements);
  const int64_t pairs = chunk.batch * chunk.classes;
  const int64_t teams = std::clamp<int64_t>(chunk.steps, 1, kThreads / team);
  const Groups groups = groups_of(chunk.steps, teams, kBlocks, pairs);
  const bool partial = groups.number > 1;
  Tensor partials = new_tensor(x, {partial ? pairs * groups.number * 3 : 0}, ScalarType::Double);
  destination.partials = partial ? static_cast<State*>(partials.data_ptr()) : nullptr;
  const unsigned threads = static_cast<unsigned>(ceil_div(teams * team, 32) * 32);
  with_access(chunk, false, true, [&](auto access) {
    rows_kernel<decltype(access)>
        <<<grid_of(pairs * groups.number), threads, 0, stream>>>(chunk, groups, destination, team);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  if (partial) {
    groups_kernel<<<grid_of(ceil_div(pairs * 32, kThreads)), kThreads, 0, stream>>>(
        chunk, groups, destination);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// Threads that share the `terms` of one of `items`: more than one where items are few.
int slices_of(int64_t items, int64_t terms) {
  int slices = 1;
  while (slices < kSlices && 2 * slices <= terms && items * slices < int64_t{1} << 17) {
    slices *= 2;
  }
  return slices;
}

// The states of every image, class and location, to `destination`.
void score(
    const DeviceChunk& chunk, bool per_location, const Destination& destination, const Tensor& x,
    cudaStream_t stream) {
  if (chunk.batch * chunk.classes * (per_location ? chunk.locations : 1) == 0) {
    return;
  }
  if (shares_centers(chunk, per_location)) {
    launch_any_tiles(chunk, destination, {}, nullptr, x, stream);
  } else if (!per_location) {
    launch_rows(chunk, destination, x, stream);
  } else {
    const int64_t items = chunk.batch * chunk.classes * chunk.inner_quads;
    const int slices = slices_of(items, chunk.steps);
    with_access(chunk, true, true, [&](auto access) {
      const unsigned blocks = grid_of(ceil_div(items, kThreads / slices));
      locations_kernel<decltype(access)>
          <<<blocks, kThreads, 0, stream>>>(chunk, destination, slices);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
}

// [B, K, *loc]
std::vector<int64_t> result_sizes(const ScoredChunk& chunk, const Tensor& x, bool per_location) {
  std::vector<int64_t> sizes{chunk.batch, chunk.classes};
  for (int64_t axis = 2; per_location && axis < x.dim(); ++axis) {
    sizes.push_back(x.size(axis));
  }
  return sizes;
}

ScoredChunk checked_chunk(
    const Tensor& x, const Tensor& model_output, const std::optional<Tensor>& x_t,
    const Tensor& tables, const std::string& reduction, bool per_location) {
  ScoredChunk chunk = scored_chunk(x, model_output, x_t, tables, reduction, per_location);
  chunk.per_location &= chunk.locations != 1;  // the one location is the image
  return chunk;
}

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

void check_state(
    const Tensor& tensor, ScalarType type, const std::vector<int64_t>& sizes, const Tensor& x,
    const char* name) {
  bool fits = tensor.scalar_type() == type && tensor.device() == x.device() &&
              tensor.is_contiguous() && tensor.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t axis = 0; fits && axis < tensor.dim(); ++axis) {
    fits = tensor.size(axis) == sizes[axis];
  }
  STD_TORCH_CHECK(fits, name, " has the wrong dtype, shape or device, or is not contiguous");
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
    check_state(*places, ScalarType::Long, {chunk.classes}, x, "classes");
  }
  std::vector<int64_t> sizes = result_sizes(chunk, x, per_location);
  sizes[1] = classes ? count.size(0) : chunk.classes;
  check_state(count, ScalarType::Long, {sizes[1]}, x, "count");
  sizes.insert(sizes.begin(), chunk.mixture ? 3 : 2);
  check_state(state, ScalarType::Double, sizes, x, "state");
  Destination destination{};
  destination.state = static_cast<double*>(state.data_ptr());
  destination.count = static_cast<const int64_t*>(count.data_ptr());
  destination.classes = places ? static_cast<const int64_t*>(places->data_ptr()) : nullptr;
  destination.all_classes = count.size(0);
  score(device_chunk(chunk, false), chunk.per_location, destination, x, scope.stream());
  if (chunk.classes > 0) {
    count_kernel<<<grid_of(ceil_div(chunk.classes, kThreads)), kThreads, 0, scope.stream()>>>(
        static_cast<int64_t*>(count.data_ptr()), destination.classes, chunk.classes,
        destination.all_classes, chunk.steps);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// ---- launches of gradients ----

// A gradient and the axes that it has.
struct Target {
  Tensor gradient;
  const float* table;
  int64_t batch, classes, steps, channels;
};

// Zeros in the channels of o beyond x's.
void clear_further_channels(const Target& target, const ScoredChunk& chunk, cudaStream_t stream) {
  const size_t bytes = target.gradient.element_size() * chunk.locations,
               rows = target.batch * target.classes * target.steps;
  const size_t own = bytes * chunk.channels, all = bytes * target.channels;
  if (all > own && rows > 0) {
    STD_CUDA_CHECK(cudaMemset2DAsync(
        static_cast<char*>(target.gradient.data_ptr()) + own, all, 0, all - own, rows, stream));
  }
}

void launch_sum(
    const ScoredChunk& chunk, const Upstream& upstream, const float* factors, const Target& target,
    cudaStream_t stream) {
  const DeviceChunk device = device_chunk(chunk, true);
  const Dtype dtype = dtype_of(target.gradient);
  const SummedGradient sum{target.gradient.data_ptr(),
                           dtype,
                           target.table,
                           target.batch,
                           target.classes,
                           target.steps,
                           target.channels * chunk.locations};
  const int64_t items = sum.rows() * device.outer_size * device.inner_quads;
  if (items > 0) {
    const int slices = slices_of(items, sum.terms(device));
    auto kernel = chunk.per_location ? sum_kernel<true> : sum_kernel<false>;
    kernel<<<grid_of(ceil_div(items, kThreads / slices)), kThreads, 0, stream>>>(
        device, upstream, sum, factors, slices);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

// The gradient of o as the chunk's order of elements sees it; an empty operand where it is summed,
// or not wanted.
OutputGradient output_gradient(
    const ScoredChunk& chunk, const DeviceChunk& device, const Target* target) {
  if (target == nullptr) {
    return {};
  }
  const int64_t row = target->channels * chunk.locations;
  View view{
      target->gradient.data_ptr(),
      target->gradient.scalar_type(),
      target->classes * target->steps * row,
      target->steps * row,
      row,
      chunk.locations,
      1};
  int64_t inner_size = chunk.inner_size;
  if (chunk.channels_inner) {
    std::swap(view.outer, view.inner);
  } else if (device.outer_size == 1) {
    inner_size = device.inner_size;
    view.outer = 0;
  }
  return {operand_of(view, inner_size), static_cast<int>(inner_size)};
}

// Factors of all rows where `factors` is not null, and the gradient of o.
void launch_row_gradients(
    const ScoredChunk& chunk, const Upstream& upstream, const Target* target, float* factors,
    const Tensor& x, cudaStream_t stream) {
  const DeviceChunk device = device_chunk(chunk, false);
  const OutputGradient output = output_gradient(chunk, device, target);
  const bool whole = target == nullptr || output.operand.quads;
  const int64_t rows = chunk.batch * chunk.classes * chunk.steps;
  if (rows == 0) {
    return;
  }
  if (chunk.per_location) {
    const int64_t items = rows * device.inner_quads;
    with_access(device, true, whole, [&](auto access) {
      if (items > 0) {
        locations_gradient_kernel<decltype(access)>
            <<<grid_of(ceil_div(items, kThreads)), kThreads, 0, stream>>>(device, upstream, output);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
    });
  } else if (shares_centers(device, false)) {
    launch_any_tiles(device, {}, upstream, factors, x, stream);
  } else {
    const int team = team_of(device.elements);
    with_access(device, false, whole, [&](auto access) {
      const unsigned blocks = grid_of(ceil_div(rows * team, kThreads));
      rows_gradient_kernel<decltype(access)>
          <<<blocks, kThreads, 0, stream>>>(device, upstream, output, factors, team);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
}

std::tuple<Tensor, Tensor, Tensor> log_likelihood_backward(
    const Tensor& grad, const Tensor& log_likelihood, const Tensor& remainder, const Tensor& x,
    const Tensor& model_output, const std::optional<Tensor>& x_t, const Tensor& tables,
    const std::string& reduction, bool per_location, const std::vector<bool>& output_mask) {
  DeviceScope scope(x);
  const ScoredChunk chunk = checked_chunk(x, model_output, x_t, tables, reduction, per_location);
  STD_TORCH_CHECK(
      output_mask.size() == 3 && (x_t || !output_mask[2]),
      "output_mask must have 3 entries, False for an x_t that is None");
  const std::vector<int64_t> sizes = result_sizes(chunk, x, per_location);
  const std::vector<int64_t> pair_sizes = chunk.mixture ? sizes : std::vector<int64_t>{0};
  const Tensor upstream_grad = torch::stable::contiguous(grad),
               rounded = torch::stable::contiguous(log_likelihood);
  const Tensor rest = torch::stable::contiguous(remainder);
  check_state(upstream_grad, ScalarType::Float, sizes, x, "grad");
  check_state(rounded, ScalarType::Float, sizes, x, "log_likelihood");
  check_state(rest, ScalarType::Float, pair_sizes, x, "remainder");
  const Upstream upstream{
      static_cast<const float*>(upstream_grad.data_ptr()),
      static_cast<const float*>(rounded.data_ptr()), static_cast<const float*>(rest.data_ptr())};

  const bool shared = shares_centers(device_chunk(chunk, false), chunk.per_location);
  const bool direct =
      !shared && model_output.size(0) == chunk.batch && model_output.size(1) == chunk.classes;
  auto target_of = [&](int index, const Tensor& like, const float* table) {
    const std::vector<int64_t> like_sizes(like.sizes().begin(), like.sizes().end());
    Tensor gradient = output_mask[index] ? new_tensor(like, like_sizes, like.scalar_type())
                                         : new_tensor(x, {0}, x.scalar_type());
    const bool is_x = like.dim() == x.dim();
    return Target{
        gradient,
        table,
        like.size(0),
        is_x ? 1 : like.size(1),
        is_x ? 1 : like.size(2),
        like.size(is_x ? 1 : 3)};
  };
  const std::array<Target, 3> targets{
      target_of(0, x, chunk.data_table), target_of(1, model_output, chunk.output_table),
      target_of(2, x_t ? *x_t : x, chunk.noisy_table)};
  const std::array<bool, 3> summed{output_mask[0], output_mask[1] && !direct, output_mask[2]};

  const bool has_factors = !chunk.per_location && (summed[0] || summed[1] || summed[2]);
  Tensor factors = new_tensor(
      x, {has_factors ? chunk.batch * chunk.classes * chunk.steps : 0}, ScalarType::Float);
  float* factor_data = has_factors ? static_cast<float*>(factors.data_ptr()) : nullptr;
  const bool writes_output = output_mask[1] && direct;
  if (writes_output || has_factors) {
    launch_row_gradients(
        chunk, upstream, writes_output ? &targets[1] : nullptr, factor_data, x, scope.stream());
  }
  for (int i = 0; i < 3; ++i) {
    if (summed[i]) {
      launch_sum(chunk, upstream, factor_data, targets[i], scope.stream());
    }
  }
  if (output_mask[1]) {
    clear_further_channels(targets[1], chunk, scope.stream());
  }
  return {targets[0].gradient, targets[1].gradient, targets[2].gradient};
}

// ---- report ----

template <typename Access>
void add_kernels(std::vector<Kernel>& kernels, const std::string& access) {
  kernels.push_back(
      {"rows_kernel<" + access + ">", reinterpret_cast<const void*>(&rows_kernel<Access>)});
  kernels.push_back(
      {"rows_gradient_kernel<" + access + ">",
       reinterpret_cast<const void*>(&rows_gradient_kernel<Access>)});
  kernels.push_back(
      {"locations_kernel<" + access + ">",
       reinterpret_cast<const void*>(&locations_kernel<Access>)});
  kernels.push_back(
      {"locations_gradient_kernel<" + access + ">",
       reinterpret_cast<const void*>(&locations_gradient_kernel<Access>)});
}

}  // namespace

std::vector<Kernel> scoring_kernels() {
  std::vector<Kernel> kernels{
      {"groups_kernel", reinterpret_cast<const void*>(&groups_kernel)},
      {"count_kernel", reinterpret_cast<const void*>(&count_kernel)},
      {"sum_kernel<images>", reinterpret_cast<const void*>(&sum_kernel<false>)},
      {"sum_kernel<locations>", reinterpret_cast<const void*>(&sum_kernel<true>)},
      {"tiles_kernel<1, 1>", reinterpret_cast<const void*>(&tiles_kernel<1, 1>)},
      {"tiles_kernel<1, 4>", reinterpret_cast<const void*>(&tiles_kernel<1, 4>)},
      {"tiles_kernel<4, 1>", reinterpret_cast<const void*>(&tiles_kernel<4, 1>)},
      {"tiles_kernel<4, 4>", reinterpret_cast<const void*>(&tiles_kernel<4, 4>)},
  };
  add_kernels<WholeAccess<kFloat32, kFloat32>>(kernels, "float32");
  add_kernels<WholeAccess<kBFloat16, kBFloat16>>(kernels, "bfloat16");
  add_kernels<WholeAccess<kBFloat16, kFloat32>>(kernels, "bfloat16, float32");
  add_kernels<WholeAccess<kFloat16, kFloat16>>(kernels, "float16");
  add_kernels<AnyAccess>(kernels, "any");
  return kernels;
}

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cuda, CUDA, m) {
  m.impl("log_likelihood", TORCH_BOX(&log_likelihood));
  m.impl("log_likelihood_backward", TORCH_BOX(&log_likelihood_backward));
  m.impl("score_update", TORCH_BOX(&score_update));
}

}  // namespace genrep_fast
