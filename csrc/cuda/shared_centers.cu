// Log-likelihoods of images under centres that they share, such as those of a bank of chains.
//
// A block keeps the sums of up to 64 images and 64 steps in registers, so that a centre of the K S D
// elements is read once for 64 images: 2 multiply-adds for each pair and element, bound by
// arithmetic. Tiles are smaller where they would be fewer than a GPU's multiprocessors need. The next
// elements are on their way to registers, and then to a second buffer, while those of the first are
// multiplied.
#include <optional>
#include <string>
#include <vector>

#include "introspection.h"
#include "scoring_backward.cuh"
#include "states.cuh"

namespace genrep_fast {
namespace {

constexpr int64_t kTileBlocks = 512;  // that few images and classes are cut into
constexpr int64_t kFewBlocks = 200;   // with less of them tiles are smaller
constexpr int kDepth = 32;            // elements of a tile's rows that are in shared memory at once
constexpr int kLineQuads = kDepth / kQuad;
// Of a row there: no two of eight neighbouring rows begin in the same bank.
constexpr int kPitch = kDepth + 4;

// The block is [16, width]; a thread has images and steps that lie 16 and `width` apart.
template <int kTheImages, int kTheSteps, int kTheWidth>
struct Tile {
  static constexpr int kImages = kTheImages, kSteps = kTheSteps, kWidth = kTheWidth;
  static constexpr int kHeight = 16, kBlock = kHeight * kWidth;
  static constexpr int kAllImages = kHeight * kImages, kAllSteps = kWidth * kSteps;
  // Of a multiprocessor, with 128 registers a thread.
  static constexpr int kBlocks = 512 / kBlock;
  // Lines that the block loads at once.
  static constexpr int kLines = kBlock / kLineQuads;
  static constexpr int kImageLoads = kAllImages / kLines, kStepLoads = kAllSteps / kLines;
  static_assert(kImageLoads * kLines == kAllImages && kStepLoads * kLines == kAllSteps);
};

// x, and b x_t + c o, of some elements.
template <typename Tile>
struct Lines {
  alignas(16) float images[Tile::kAllImages][kPitch], centers[Tile::kAllSteps][kPitch];
};

// Rows that are whole quads one behind the other, of any dtype.
struct FlatRows {
  using Row = const char*;
  static __device__ Row row(const Operand& operand, int64_t offset) {
    return static_cast<const char*>(operand.data) + offset * (operand.dtype == kFloat32 ? 4 : 2);
  }
  static __device__ Quad load(const DeviceChunk&, const Operand& operand, Row row, int quad) {
    return load_aligned(row, operand.dtype, int64_t{kQuad} * quad);
  }
};

// Rows of any strides.
struct AnyRows {
  using Row = int64_t;
  static __device__ Row row(const Operand&, int64_t offset) { return offset; }
  static __device__ Quad load(const DeviceChunk& chunk, const Operand& operand, Row row, int quad) {
    return AnyAccess::load(
        operand, operand.dtype, row, AnyAccess::place(chunk, quad), chunk.inner_size);
  }
};

// What a thread loads of the lines of a tile; images, steps and elements beyond the last stand for
// the last.
template <typename Tile, typename Rows>
struct Loads {
  typename Rows::Row image_rows[Tile::kImageLoads], output_rows[Tile::kStepLoads],
      noisy_rows[Tile::kStepLoads];
  Quad images[Tile::kImageLoads], outputs[Tile::kStepLoads], noisy[Tile::kStepLoads];
  float output_factors[Tile::kStepLoads], noisy_factors[Tile::kStepLoads];
  int line, own_quad;

  __device__ Loads(const DeviceChunk& chunk, int64_t first_image, int64_t k, int64_t first_step)
      : line(static_cast<int>(threadIdx.x) / kLineQuads),
        own_quad(static_cast<int>(threadIdx.x) % kLineQuads) {
#pragma unroll
    for (int i = 0; i < Tile::kImageLoads; ++i) {
      const int64_t b = min(first_image + line + i * Tile::kLines, chunk.batch - 1);
      image_rows[i] = Rows::row(chunk.x, chunk.x.row(b, 0, 0));
    }
#pragma unroll
    for (int j = 0; j < Tile::kStepLoads; ++j) {
      const int64_t s = min(first_step + line + j * Tile::kLines, chunk.steps - 1);
      output_rows[j] = Rows::row(chunk.output, chunk.output.row(0, k, s));
      noisy_rows[j] = Rows::row(chunk.noisy, chunk.noisy.row(0, k, s));
      noisy[j] = {};
      output_factors[j] = chunk.output_table[s];
      noisy_factors[j] = chunk.noisy.data != nullptr ? chunk.noisy_table[s] : 0.f;
    }
  }

  // Begins to load the elements from quad `first` on.
  __device__ void begin(const DeviceChunk& chunk, int first) {
    const int quad = min(first + own_quad, chunk.row_quads() - 1);
#pragma unroll
    for (int i = 0; i < Tile::kImageLoads; ++i) {
      images[i] = Rows::load(chunk, chunk.x, image_rows[i], quad);
    }
#pragma unroll
    for (int j = 0; j < Tile::kStepLoads; ++j) {
      outputs[j] = Rows::load(chunk, chunk.output, output_rows[j], quad);
      if (chunk.noisy.data != nullptr) {
        noisy[j] = Rows::load(chunk, chunk.noisy, noisy_rows[j], quad);
      }
    }
  }

  // Stores them when they have come; zeros past the end of the rows.
  __device__ void end(const DeviceChunk& chunk, int first, Lines<Tile>& lines) const {
    const bool exists = first + own_quad < chunk.row_quads();
    auto store = [&](float (&target)[kPitch], const float4& values) {
      *reinterpret_cast<float4*>(&target[kQuad * own_quad]) =
          exists ? values : make_float4(0, 0, 0, 0);
    };
#pragma unroll
    for (int i = 0; i < Tile::kImageLoads; ++i) {
      store(lines.images[line + i * Tile::kLines], unpack(images[i], chunk.x.dtype));
    }
#pragma unroll
    for (int j = 0; j < Tile::kStepLoads; ++j) {
      const float b = noisy_factors[j], c = output_factors[j];
      const float4 x_t = unpack(noisy[j], chunk.noisy.dtype);
      const float4 o = unpack(outputs[j], chunk.output.dtype);
      store(
          lines.centers[line + j * Tile::kLines],
          make_float4(
              __fmaf_rn(c, o.x, __fmul_rn(b, x_t.x)), __fmaf_rn(c, o.y, __fmul_rn(b, x_t.y)),
              __fmaf_rn(c, o.z, __fmul_rn(b, x_t.z)), __fmaf_rn(c, o.w, __fmul_rn(b, x_t.w))));
    }
  }
};

// Adds r^2 of the elements in shared memory: 32 squares in float32, above that float64.
template <typename Tile>
__device__ void add_squares(
    const Lines<Tile>& lines, const float (&factors)[Tile::kSteps],
    double (&squares)[Tile::kImages][Tile::kSteps]) {
  const int tx = static_cast<int>(threadIdx.x) % Tile::kWidth;
  const int ty = static_cast<int>(threadIdx.x) / Tile::kWidth;
  float sums[Tile::kImages][Tile::kSteps] = {};
#pragma unroll 2
  for (int column = 0; column < kDepth; column += kQuad) {
    float4 x[Tile::kImages];
#pragma unroll
    for (int i = 0; i < Tile::kImages; ++i) {
      x[i] = *reinterpret_cast<const float4*>(&lines.images[ty + Tile::kHeight * i][column]);
    }
#pragma unroll
    for (int j = 0; j < Tile::kSteps; ++j) {
      const float4 center =
          *reinterpret_cast<const float4*>(&lines.centers[tx + Tile::kWidth * j][column]);
#pragma unroll
      for (int i = 0; i < Tile::kImages; ++i) {
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
  for (int i = 0; i < Tile::kImages; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kSteps; ++j) {
      squares[i][j] += sums[i][j];
    }
  }
}

// sum r^2 of a tile: images ty + 16 i and steps tx + width j of thread (tx, ty).
template <typename Tile, typename Rows>
__device__ void tile_squares(
    const DeviceChunk& chunk, int64_t first_image, int64_t k, int64_t first_step,
    double (&squares)[Tile::kImages][Tile::kSteps]) {
  __shared__ Lines<Tile> buffers[2];
  const int tx = static_cast<int>(threadIdx.x) % Tile::kWidth;
  float factors[Tile::kSteps];
  for (int j = 0; j < Tile::kSteps; ++j) {
    factors[j] = chunk.data_table[min(first_step + tx + Tile::kWidth * j, chunk.steps - 1)];
    for (int i = 0; i < Tile::kImages; ++i) {
      squares[i][j] = 0;
    }
  }
  const int quads = chunk.row_quads();
  if (quads == 0) {
    return;
  }
  Loads<Tile, Rows> loads(chunk, first_image, k, first_step);
  loads.begin(chunk, 0);
  loads.end(chunk, 0, buffers[0]);
  __syncthreads();
  int own = 0;
#pragma unroll 1
  for (int next = kLineQuads; next < quads; next += kLineQuads) {
    loads.begin(chunk, next);
    add_squares<Tile>(buffers[own], factors, squares);
    own ^= 1;
    loads.end(chunk, next, buffers[own]);
    __syncthreads();
  }
  add_squares<Tile>(buffers[own], factors, squares);
  __syncthreads();  // before the next tile is stored
}

// A block some steps of a class and a tile's images: their states, or where `factors` is not null,
// the factors of the rows.
template <typename Tile, typename Rows>
__global__ __launch_bounds__(Tile::kBlock, Tile::kBlocks) void log_likelihood_shared_centers_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Groups groups,
    const __grid_constant__ Destination destination, const __grid_constant__ Upstream upstream,
    float* factors) {
  const int64_t tiles = ceil_div(chunk.batch, Tile::kAllImages);
  // The grid is [K, groups, tiles].
  const int64_t rest = blockIdx.x / tiles;
  const int64_t group = rest % groups.number;
  const int64_t k = rest / groups.number;
  const int64_t first_image = blockIdx.x % tiles * Tile::kAllImages;
  const int64_t end = min((group + 1) * groups.steps, chunk.steps);
  const int tx = static_cast<int>(threadIdx.x) % Tile::kWidth;
  const int ty = static_cast<int>(threadIdx.x) / Tile::kWidth;
  State states[Tile::kImages];
  for (int i = 0; i < Tile::kImages; ++i) {
    states[i] = empty_state(chunk.mixture);
  }
#pragma unroll 1
  for (int64_t first = group * groups.steps; first < end; first += Tile::kAllSteps) {
    double squares[Tile::kImages][Tile::kSteps];
    tile_squares<Tile, Rows>(chunk, first_image, k, first, squares);
#pragma unroll
    for (int i = 0; i < Tile::kImages; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kSteps; ++j) {
        const int64_t s = first + tx + Tile::kWidth * j;
        const int64_t b = first_image + ty + Tile::kHeight * i;
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
  for (int i = 0; i < Tile::kImages; ++i) {
    const State state = merged_over_warp(states[i], Tile::kWidth, chunk.mixture);
    const int64_t b = first_image + ty + Tile::kHeight * i;
    if (tx == 0 && b < chunk.batch) {
      destination.take(chunk, b, k, groups, group, state);
    }
  }
}

// Where the kernel's results go: states, with memory on the device of `x`, or, where it is not null,
// `factors`.
struct Results {
  Destination destination;
  Upstream upstream;
  float* factors;
  const Tensor* x;
};

template <typename Tile, typename Rows>
void launch_tiles(const DeviceChunk& chunk, const Results& results, cudaStream_t stream) {
  const int64_t tiles = ceil_div(chunk.batch, Tile::kAllImages) * chunk.classes;
  const Groups groups = groups_of(chunk.steps, Tile::kAllSteps, kTileBlocks, tiles);
  Destination destination = results.destination;
  std::optional<Tensor> partials;
  if (results.factors == nullptr) {
    partials = new_partials(chunk, groups, *results.x, destination);
  }
  const unsigned blocks = grid_of(tiles * groups.number);
  log_likelihood_shared_centers_kernel<Tile, Rows><<<blocks, Tile::kBlock, 0, stream>>>(
      chunk, groups, destination, results.upstream, results.factors);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (results.factors == nullptr) {
    launch_merge(chunk, groups, destination, stream);
  }
}

// Calls function(tile) with the tile of the sizes: the largest of so many images of which there are
// enough.
template <typename Function>
void with_tile(const DeviceChunk& chunk, Function function) {
  auto fits = [&](int64_t images, int64_t steps) {
    const int64_t tiles = ceil_div(chunk.batch, images) * ceil_div(chunk.steps, steps);
    return chunk.steps > steps / 2 && tiles * chunk.classes >= kFewBlocks;
  };
  if (chunk.batch > 32 && fits(64, 64)) {
    function(Tile<4, 4, 16>{});
  } else if (chunk.batch > 32 && fits(64, 32)) {
    function(Tile<4, 4, 8>{});
  } else if (chunk.batch > 32) {
    function(Tile<4, 2, 8>{});
  } else if (chunk.batch > 16 && fits(32, 32)) {
    function(Tile<2, 4, 8>{});
  } else if (chunk.batch > 16) {
    function(Tile<2, 2, 8>{});
  } else if (fits(16, 32)) {
    function(Tile<1, 4, 8>{});
  } else {
    function(Tile<1, 2, 8>{});
  }
}

void launch_any_tiles(const DeviceChunk& chunk, const Results& results, cudaStream_t stream) {
  const bool noisy_is_flat = chunk.noisy.data == nullptr || chunk.noisy.quads;
  const bool is_flat =
      chunk.outer_size == 1 && chunk.x.quads && chunk.output.quads && noisy_is_flat;
  with_tile(chunk, [&](auto tile) {
    auto launch =
        is_flat ? launch_tiles<decltype(tile), FlatRows> : launch_tiles<decltype(tile), AnyRows>;
    launch(chunk, results, stream);
  });
}

template <typename Tile>
void add_kernels(std::vector<Kernel>& kernels) {
  const std::string name = "log_likelihood_shared_centers_kernel<" +
                           std::to_string(Tile::kAllImages) + ", " +
                           std::to_string(Tile::kAllSteps);
  kernels.push_back(
      {name + ", flat>",
       reinterpret_cast<const void*>(&log_likelihood_shared_centers_kernel<Tile, FlatRows>)});
  kernels.push_back(
      {name + ", any>",
       reinterpret_cast<const void*>(&log_likelihood_shared_centers_kernel<Tile, AnyRows>)});
}

}  // namespace

void launch_shared_centers(
    const DeviceChunk& chunk, const Destination& destination, const Tensor& x,
    cudaStream_t stream) {
  launch_any_tiles(chunk, {destination, {}, nullptr, &x}, stream);
}

void launch_shared_factors(
    const DeviceChunk& chunk, const Upstream& upstream, float* factors, cudaStream_t stream) {
  launch_any_tiles(chunk, {{}, upstream, factors, nullptr}, stream);
}

std::vector<Kernel> shared_centers_kernels() {
  std::vector<Kernel> kernels;
  add_kernels<Tile<4, 4, 16>>(kernels);
  add_kernels<Tile<4, 4, 8>>(kernels);
  add_kernels<Tile<4, 2, 8>>(kernels);
  add_kernels<Tile<2, 4, 8>>(kernels);
  add_kernels<Tile<2, 2, 8>>(kernels);
  add_kernels<Tile<1, 4, 8>>(kernels);
  add_kernels<Tile<1, 2, 8>>(kernels);
  return kernels;
}

}  // namespace genrep_fast
