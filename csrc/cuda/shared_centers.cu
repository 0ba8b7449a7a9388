// Log-likelihoods of images under centres that they share, such as those of a bank of chains.
//
// A block keeps the sums of 64 images and 64 steps in registers, so that a centre of the K S D
// elements is read once for 64 images: 2 multiply-adds for each pair and element, bound by
// arithmetic.
#include <optional>
#include <string>
#include <vector>

#include "introspection.h"
#include "scoring_backward.cuh"
#include "states.cuh"

namespace genrep_fast {
namespace {

constexpr int64_t kTileBlocks = 512;  // that few images and classes are cut into
constexpr int kDepth = 32;            // elements of a tile's rows that are in shared memory at once
constexpr int kLineQuads = kDepth / kQuad;
// Of a row there: no two of eight neighbouring rows begin in the same bank.
constexpr int kPitch = kDepth + 4;

template <int kImages, int kSteps>
struct Tile {
  static constexpr int kSide = 16;  // threads along either axis
  alignas(16) float images[kSide * kImages][kPitch], centers[kSide * kSteps][kPitch];

  // x, and b x_t + c o, of the elements from quad `first` on; zeros past the ends.
  __device__ void load(
      const DeviceChunk& chunk, int64_t first_image, int64_t k, int64_t first_step, int first) {
    for (int i = threadIdx.x; i < kSide * (kImages + kSteps) * kLineQuads; i += kThreads) {
      const int line = i / kLineQuads;
      const int own_quad = i % kLineQuads;
      const int quad = first + own_quad;
      const bool is_image = line < kSide * kImages;
      const int64_t b = first_image + line;
      const int64_t s = first_step + line - kSide * kImages;
      float4 values = make_float4(0, 0, 0, 0);
      const bool exists = is_image ? b < chunk.batch : s < chunk.steps;
      if (quad < chunk.row_quads() && exists) {
        values = is_image ? image(chunk, b, quad) : center(chunk, k, s, quad);
      }
      float* target = is_image ? images[line] : centers[line - kSide * kImages];
      *reinterpret_cast<float4*>(target + kQuad * own_quad) = values;
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
  const int tx = threadIdx.x % Shared::kSide;
  const int ty = threadIdx.x / Shared::kSide;
  float factors[kSteps];
  for (int j = 0; j < kSteps; ++j) {
    factors[j] = chunk.data_table[min(first_step + tx + Shared::kSide * j, chunk.steps - 1)];
    for (int i = 0; i < kImages; ++i) {
      squares[i][j] = 0;
    }
  }
#pragma unroll 1
  for (int first = 0; first < chunk.row_quads(); first += kLineQuads) {
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
__global__ __launch_bounds__(kThreads, 2) void log_likelihood_shared_centers_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Groups groups,
    const __grid_constant__ Destination destination, const __grid_constant__ Upstream upstream,
    float* factors) {
  constexpr int kSide = Tile<kImages, kSteps>::kSide;
  const int64_t tiles = ceil_div(chunk.batch, kSide * kImages);
  // The grid is [K, groups, tiles].
  const int64_t rest = blockIdx.x / tiles;
  const int64_t group = rest % groups.number;
  const int64_t k = rest / groups.number;
  const int64_t first_image = blockIdx.x % tiles * (kSide * kImages);
  const int64_t end = min((group + 1) * groups.steps, chunk.steps);
  // The block is [images, steps].
  const int tx = threadIdx.x % kSide;
  const int ty = threadIdx.x / kSide;
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
        const int64_t s = first + tx + kSide * j;
        const int64_t b = first_image + ty + kSide * i;
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
      destination.take(chunk, b, k, groups, group, state);
    }
  }
}

// Writes states, with memory on the device of `x`, or, where it is not null, `factors`.
template <int kImages, int kSteps>
void launch_tiles(
    const DeviceChunk& chunk, Destination destination, const Upstream& upstream, float* factors,
    const Tensor* x, cudaStream_t stream) {
  constexpr int kSide = Tile<kImages, kSteps>::kSide;
  const int64_t tiles = ceil_div(chunk.batch, kSide * kImages) * chunk.classes;
  const Groups groups = groups_of(chunk.steps, kSide * kSteps, kTileBlocks, tiles);
  std::optional<Tensor> partials;
  if (factors == nullptr) {
    partials = new_partials(chunk, groups, *x, destination);
  }
  const unsigned blocks = grid_of(tiles * groups.number);
  log_likelihood_shared_centers_kernel<kImages, kSteps>
      <<<blocks, kThreads, 0, stream>>>(chunk, groups, destination, upstream, factors);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (factors == nullptr) {
    launch_merge(chunk, groups, destination, stream);
  }
}

void launch_any_tiles(
    const DeviceChunk& chunk, const Destination& destination, const Upstream& upstream,
    float* factors, const Tensor* x, cudaStream_t stream) {
  const bool few_steps = chunk.steps <= 16;
  auto launch = few_steps ? launch_tiles<4, 1> : launch_tiles<4, 4>;
  if (chunk.batch <= 16) {
    launch = few_steps ? launch_tiles<1, 1> : launch_tiles<1, 4>;
  }
  launch(chunk, destination, upstream, factors, x, stream);
}

template <int kImages, int kSteps>
Kernel kernel_of(const char* name) {
  auto function = &log_likelihood_shared_centers_kernel<kImages, kSteps>;
  return {
      std::string("log_likelihood_shared_centers_kernel<") + name + ">",
      reinterpret_cast<const void*>(function)};
}

}  // namespace

void launch_shared_centers(
    const DeviceChunk& chunk, const Destination& destination, const Tensor& x,
    cudaStream_t stream) {
  launch_any_tiles(chunk, destination, {}, nullptr, &x, stream);
}

void launch_shared_factors(
    const DeviceChunk& chunk, const Upstream& upstream, float* factors, cudaStream_t stream) {
  launch_any_tiles(chunk, {}, upstream, factors, nullptr, stream);
}

std::vector<Kernel> shared_centers_kernels() {
  return {
      kernel_of<1, 1>("1, 1"), kernel_of<1, 4>("1, 4"), kernel_of<4, 1>("4, 1"),
      kernel_of<4, 4>("4, 4")};
}

}  // namespace genrep_fast
