// Gradients of the log-likelihoods (see genrep_fast/reference/scoring.py).
//
//     dl/do = -v_s c_s r,   dL/dl = exp(l - logsumexp l)  or  1/S
//
// The gradient of o alone reads o and writes as much: the residuals of a row stay in registers until
// its weight is known, which needs the whole row; those of more than 8,192 elements, whose parts are
// several blocks', are read twice. Gradients that are summed over images, classes or steps (that of x;
// those of o and x_t where they are shared) need the factor of every row or location first, 4 bytes
// each, and read the chunk once more.
#include "scoring_backward.cuh"

#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "introspection.h"

namespace genrep_fast {
namespace {

// The residuals of kHeld batches, and sum r^2 of the part. Where several warps share it they exchange
// the sums of their batches, and each adds up all of them in forward's order.
template <typename Access, int kHeld>
__device__ double held_squares(
    const DeviceChunk& chunk, const Row& row, int quads, const RowLayout& layout,
    const PartThread& own, float (&residuals)[kHeld][kBatch * kQuad]) {
  // Of every batch of the block's parts, in their order.
  __shared__ float sums[kHeld * kWarps][kWarp];
  float (*own_sums)[kWarp] = sums + own.index * layout.batches();
  double squares = 0;
#pragma unroll
  for (int held = 0; held < kHeld; ++held) {
    const int batch = own.warp + held * kWarps;
    Residuals<Access> loaded[kBatch];
    load_batch<Access>(
        chunk, row, quads, layout.first_quad(own.part, batch, own.lane), layout.team(), loaded);
    const float sum = batch_squares<Access>(chunk, row, loaded, residuals[held]);
    squares += sum;
    if (layout.batch_bits > 0) {
      own_sums[batch][own.lane] = sum;
    }
  }
  // Sums of one part are its row's.
  if (!chunk.mixture || layout.parts > 1) {
    return 0;
  }
  if (layout.batch_bits > 0) {
    __syncthreads();
    squares = 0;
#pragma unroll 1
    for (int batch = 0; batch < layout.batches(); ++batch) {
      squares += own_sums[batch][own.lane];
    }
  }
  return lanes_sum(squares, layout.team_bits);
}

// The gradients of a batch of residuals, to row `target` of the output's.
template <typename Access>
__device__ void store_batch(
    const DeviceChunk& chunk, const Row& row, const OutputGradient& output, int64_t target,
    int quads, int first, int team, float factor, const float (&residuals)[kBatch * kQuad]) {
#pragma unroll
  for (int q = 0; q < kBatch; ++q) {
    if (first + q * team < quads) {
      float values[kQuad];
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        values[j] = row.output_factor * gradient(factor, residuals[q * kQuad + j]);
      }
      output.store<Access>(chunk, target, Access::place(chunk, first + q * team), values);
    }
  }
}

// Of a multiprocessor: two batches of residuals need registers of their own.
template <typename Access, int kHeld>
constexpr int kRowBlocks =
    kHeld == 2 && Access::kBlocks > 2 ? Access::kBlocks - 1 : Access::kBlocks;

// A row's factor, and the gradient of o where `output` has memory, of a part. A thread keeps kHeld
// batches of residuals in registers until the factor is known. `squares` [B, K, S, parts], or null
// where rows are one part.
template <typename Access, int kHeld>
__global__
__launch_bounds__(kThreads, kRowBlocks<Access, kHeld>) void log_likelihood_backward_rows_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Upstream upstream,
    const __grid_constant__ OutputGradient output, float* factors, const double* squares,
    const __grid_constant__ RowLayout layout) {
  const PartThread own(chunk, layout);
  const bool exists = own.pair < chunk.batch * chunk.classes;
  const int64_t b = exists ? own.pair / chunk.classes : 0;
  const int64_t k = exists ? own.pair - b * chunk.classes : 0;
  const int quads = exists ? chunk.row_quads() : 0;
  const Row row = row_at(chunk, b, k, own.s);

  float residuals[kHeld][kBatch * kQuad];
  double own_squares = held_squares<Access, kHeld>(chunk, row, quads, layout, own, residuals);
  const int64_t index = own.pair * chunk.steps + own.s;
  if (squares != nullptr) {
    own_squares = row_squares(squares + (exists ? index : 0) * layout.parts, layout);
  }
  if (!exists) {
    return;
  }
  const double step =
      chunk.mixture ? step_likelihood(chunk, own.s, own_squares, chunk.elements) : 0;
  const float factor = upstream.factor(chunk, own.pair, own.s, step);
  if (factors != nullptr && own.part == 0 && own.warp == 0 && own.lane == 0) {
    factors[index] = factor;
  }
  if (output.operand.data == nullptr) {
    return;
  }
  const int64_t target = output.operand.row(b, k, own.s);
#pragma unroll
  for (int held = 0; held < kHeld; ++held) {
    store_batch<Access>(
        chunk, row, output, target, quads,
        layout.first_quad(own.part, own.warp + held * kWarps, own.lane), layout.team(), factor,
        residuals[held]);
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

// A thread four locations of a row: their factors, [B, K, S, locations], where these have memory, and
// the gradient of o where `output` has.
template <typename Access>
__global__ __launch_bounds__(kThreads) void log_likelihood_backward_locations_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Upstream upstream,
    const __grid_constant__ OutputGradient output, float* all_factors) {
  // Items are [B, K, S, quads].
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t index = item / chunk.inner_quads;
  const int64_t pair = index / chunk.steps;
  const int64_t s = index - pair * chunk.steps;
  if (pair >= chunk.batch * chunk.classes) {
    return;
  }
  const int64_t b = pair / chunk.classes;
  const int64_t k = pair % chunk.classes;
  const int location = kQuad * static_cast<int>(item - index * chunk.inner_quads);
  const Row row = row_at(chunk, b, k, s);
  float factors[kQuad];
  location_factors<Access>(chunk, upstream, row, b, k, s, location, factors);
  if (all_factors != nullptr) {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      if (location + j < chunk.locations) {
        all_factors[index * chunk.locations + location + j] = factors[j];
      }
    }
  }
  if (output.operand.data == nullptr) {
    return;
  }
  const int64_t target = output.operand.row(b, k, s);
#pragma unroll 1
  for (int first = 0; first < chunk.channels; first += kBatch) {
    Residuals<Access> batch[kBatch];
    load_channels<Access>(chunk, row, first, location, batch);
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
    const int64_t images = batch == 1 ? chunk.batch : 1;
    const int64_t shared_classes = classes == 1 ? chunk.classes : 1;
    const int64_t shared_steps = steps == 1 ? chunk.steps : 1;
    return images * shared_classes * shared_steps;
  }
};

// A thread four elements of the gradient, or some of their terms. `factors` [B, K, S], with
// kPerLocation [B, K, S, locations] or null: then each is made where it is needed.
template <bool kPerLocation>
__global__ __launch_bounds__(kThreads, 1) void log_likelihood_backward_sums_kernel(
    const __grid_constant__ DeviceChunk chunk, const __grid_constant__ Upstream upstream,
    const __grid_constant__ SummedGradient sum, const float* factors, int slices) {
  // The block is [slices, width].
  const int width = kThreads / slices;
  const int lane = threadIdx.x % width;
  const int slice = threadIdx.x / width;
  // Items are [rows of the gradient, quads].
  const int64_t item = static_cast<int64_t>(blockIdx.x) * width + lane;
  const int64_t target = item / chunk.row_quads();
  const bool exists = target < sum.rows();
  const Place place = AnyAccess::place(chunk, static_cast<int>(item - target * chunk.row_quads()));
  // Rows of the gradient are [images, classes, steps].
  const int64_t own_step = target % sum.steps;
  const int64_t own_pair = target / sum.steps;
  const int64_t own_class = own_pair % sum.classes;
  const int64_t own_image = own_pair / sum.classes;
  const int64_t steps = sum.steps == 1 ? chunk.steps : 1;
  const int64_t classes = sum.classes == 1 ? chunk.classes : 1;
  double totals[kQuad] = {};
#pragma unroll 1
  for (int64_t term = slice; term < (exists ? sum.terms(chunk) : 0); term += slices) {
    // Terms are [images, classes, steps] that share the row.
    const int64_t pair = term / steps;
    const int64_t s = own_step + term % steps;
    const int64_t k = own_class + pair % classes;
    const int64_t b = own_image + pair / classes;
    const Row row = row_at(chunk, b, k, s);
    const Residuals<AnyAccess> residuals = Residuals<AnyAccess>::load(chunk, row, place);
    float own_factors[kQuad];
    const int64_t index = (b * chunk.classes + k) * chunk.steps + s;
    if (kPerLocation && factors == nullptr) {
      location_factors<AnyAccess>(chunk, upstream, row, b, k, s, place.inner, own_factors);
    } else {
#pragma unroll
      for (int j = 0; j < kQuad; ++j) {
        own_factors[j] =
            kPerLocation
                ? factors[index * chunk.locations + min(place.inner + j, chunk.locations - 1)]
                : factors[index];
      }
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

// ---- launches ----

// A gradient and the axes that it has.
struct Target {
  Tensor gradient;
  const float* table;
  int64_t batch, classes, steps, channels;
};

// Zeros in the channels of o beyond x's.
void clear_further_channels(const Target& target, const ScoredChunk& chunk, cudaStream_t stream) {
  const size_t bytes = target.gradient.element_size() * chunk.locations;
  const size_t rows = target.batch * target.classes * target.steps;
  const size_t own = bytes * chunk.channels;
  const size_t all = bytes * target.channels;
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
    auto kernel = chunk.per_location ? log_likelihood_backward_sums_kernel<true>
                                     : log_likelihood_backward_sums_kernel<false>;
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

// As many threads a part as hold its residuals. Those of a mixture's rows of several parts depend on
// all of them, whose squares are summed first.
template <typename Access>
void launch_rows(
    const DeviceChunk& device, const Upstream& upstream, const OutputGradient& output,
    float* factors, const Tensor& x, cudaStream_t stream) {
  const RowLayout layout = layout_of(device);
  const int64_t parts = device.batch * device.classes * device.steps * layout.parts;
  const bool needs_squares = device.mixture && layout.parts > 1;
  const Tensor memory = new_tensor(x, {needs_squares ? parts : 0}, ScalarType::Double);
  double* squares = needs_squares ? static_cast<double*>(memory.data_ptr()) : nullptr;
  if (needs_squares) {
    launch_row_squares(device, squares, x, stream);
  }
  const auto kernel = layout.batches() <= kWarps ? log_likelihood_backward_rows_kernel<Access, 1>
                                                 : log_likelihood_backward_rows_kernel<Access, 2>;
  const int threads = layout.team() * std::min(layout.batches(), kWarps);
  const unsigned blocks = grid_of(ceil_div(parts * threads, kThreads));
  kernel<<<blocks, kThreads, 0, stream>>>(device, upstream, output, factors, squares, layout);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
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
        log_likelihood_backward_locations_kernel<decltype(access)>
            <<<grid_of(ceil_div(items, kThreads)), kThreads, 0, stream>>>(
                device, upstream, output, factors);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
    });
  } else if (shares_centers(device, false)) {
    launch_shared_factors(device, upstream, factors, stream);
  } else {
    with_access(device, false, whole, [&](auto access) {
      launch_rows<decltype(access)>(device, upstream, output, factors, x, stream);
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
  const Tensor upstream_grad = torch::stable::contiguous(grad);
  const Tensor rounded = torch::stable::contiguous(log_likelihood);
  const Tensor rest = torch::stable::contiguous(remainder);
  check_tensor(upstream_grad, ScalarType::Float, sizes, x, "grad");
  check_tensor(rounded, ScalarType::Float, sizes, x, "log_likelihood");
  check_tensor(rest, ScalarType::Float, pair_sizes, x, "remainder");
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

  // Of locations, where each channel's gradient would read all channels for a factor of its own.
  const bool needs_factors =
      !chunk.per_location || (chunk.mixture && chunk.channels > kBatch && chunk.locations > 0);
  const bool has_factors = needs_factors && (summed[0] || summed[1] || summed[2]);
  const int64_t all_factors =
      chunk.batch * chunk.classes * chunk.steps * (chunk.per_location ? chunk.locations : 1);
  Tensor factors = new_tensor(x, {has_factors ? all_factors : 0}, ScalarType::Float);
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

}  // namespace

std::vector<Kernel> scoring_backward_kernels() {
  std::vector<Kernel> kernels{
      {"log_likelihood_backward_sums_kernel<images>",
       reinterpret_cast<const void*>(&log_likelihood_backward_sums_kernel<false>)},
      {"log_likelihood_backward_sums_kernel<locations>",
       reinterpret_cast<const void*>(&log_likelihood_backward_sums_kernel<true>)},
  };
  for_each_access([&](auto access, const char* name) {
    using Access = decltype(access);
    auto add_rows = [&](const char* held, auto* kernel) {
      kernels.push_back(
          {std::string("log_likelihood_backward_rows_kernel<") + name + held + ">",
           reinterpret_cast<const void*>(kernel)});
    };
    add_rows(", 1", &log_likelihood_backward_rows_kernel<Access, 1>);
    add_rows(", 2", &log_likelihood_backward_rows_kernel<Access, 2>);
    kernels.push_back(
        {std::string("log_likelihood_backward_locations_kernel<") + name + ">",
         reinterpret_cast<const void*>(&log_likelihood_backward_locations_kernel<Access>)});
  });
  return kernels;
}

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cuda, CUDA, m) {
  m.impl("log_likelihood_backward", TORCH_BOX(&log_likelihood_backward));
}

}  // namespace genrep_fast
