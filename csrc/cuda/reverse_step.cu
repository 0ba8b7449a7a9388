// One step of chains with counter-based noise, and the score of the same step (see
// genrep_fast/reference/reverse_step.py).
//
//     x' = mean_noisy x_t + mean_output o + std scale z,        r = data x + noisy x_t + output o
//     score = sum(-1/2 inv_var (r / scale)^2 + log_norm - log scale)
//
// Reads x_t, o and x and writes x', 16 bytes an element in float32, for about 50 operations, most
// of them the noise z: bound by memory, in 16-bit dtypes by arithmetic. Four elements have one
// Philox 4x32-10 counter (Salmon et al., SC 2011); a thread reads the elements of two of them before
// it draws their noise. A chain is a part of a warp's or a block's, which sums its score in float64;
// long ones are cut into parts, a block each, whose sums a second kernel adds up.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../scoring.h"
#include "chain_noise.cuh"
#include "introspection.h"
#include "reductions.cuh"

namespace genrep_fast {
namespace {

constexpr int kStepThreads = 512;      // of a block at most
constexpr int kStepQuads = 2;          // of each tensor that a thread loads before it draws noise
constexpr int64_t kBlockQuads = 4096;  // of a chain that is one block's at most
constexpr int64_t kPartQuads = kStepQuads * kStepThreads;  // of a longer chain that are a block's

// ---- step ----

struct Place {
  int64_t channel, location;
};

// [B, channels, locations], strides in elements; 0 along what it shares.
struct Sample {
  const void* data;  // null: there is no such tensor
  Dtype dtype;
  bool quads;  // four elements of a chain can be read at once
  int64_t batch, channel, location;
};

// The step's column of the tables.
struct Column {
  const float *data, *noisy, *model, *inv_var, *log_norm, *mean_noisy, *mean_output, *std;
};

struct Step {
  Sample x_t, output, x, scale;
  void* x_prev;
  Column column;
  const int64_t* chain_ids;
  uint64_t seed;
  uint32_t row;
  int64_t batch, elements, locations;
  int64_t parts, part_quads;  // of a chain

  __device__ int64_t quads() const { return ceil_div(elements, kQuad); }
};

// How a kernel reads and writes samples that are whole quads of these dtypes.
template <Dtype kOutput, Dtype kOther>
struct WholeSamples {
  static __device__ Dtype output_dtype(const Step&) { return kOutput; }
  static __device__ Dtype other_dtype(const Sample&) { return kOther; }
  static __device__ Place place(const Step&, int64_t) { return {}; }
  static __device__ Quad
  load(const Step&, const Sample& sample, Dtype dtype, int64_t b, int64_t element, Place) {
    return load_aligned(sample.data, dtype, b * sample.batch + element);
  }
  static __device__ void store(
      const Step& step, int64_t b, int64_t element, const float (&values)[kQuad]) {
    store_aligned(step.x_prev, kOther, b * step.elements + element, pack(values, kOther));
  }
};

// Any dtypes, strides and alignments.
struct AnySamples {
  static __device__ Dtype output_dtype(const Step& step) { return step.output.dtype; }
  static __device__ Dtype other_dtype(const Sample& sample) { return sample.dtype; }
  static __device__ Place place(const Step& step, int64_t element) {
    const int64_t channel = element / step.locations;
    return {channel, element - channel * step.locations};
  }
  static __device__ Quad load(
      const Step& step, const Sample& sample, Dtype dtype, int64_t b, int64_t element,
      Place place) {
    return load_quad(sample.data, dtype, sample.quads, step.elements - element, [&](int k) {
      int64_t channel = place.channel, location = place.location + k;
      while (location >= step.locations) {
        location -= step.locations;
        ++channel;
      }
      return b * sample.batch + channel * sample.channel + location * sample.location;
    });
  }
  static __device__ void store(
      const Step& step, int64_t b, int64_t element, const float (&values)[kQuad]) {
    store_quad(
        step.x_prev, step.x_t.dtype, step.elements % kQuad == 0, step.elements - element,
        b * step.elements + element, values);
  }
};

// Four elements of every sample.
template <typename Access, bool kScaled>
struct StepQuads {
  Quad x_t, output, x, scale;

  __device__ static StepQuads load(const Step& step, int64_t b, int64_t element) {
    const Place place = Access::place(step, element);
    auto quad_of = [&](const Sample& sample, Dtype dtype) {
      return Access::load(step, sample, dtype, b, element, place);
    };
    StepQuads quads{};
    quads.x_t = quad_of(step.x_t, Access::other_dtype(step.x_t));
    quads.output = quad_of(step.output, Access::output_dtype(step));
    if (step.x.data != nullptr) {
      quads.x = quad_of(step.x, Access::other_dtype(step.x));
    }
    if constexpr (kScaled) {
      const Sample& scale = step.scale;
      quads.scale =
          scale.quads ? load_aligned(scale.data, scale.dtype, b * scale.batch + element)
                      : AnySamples::load(
                            step, scale, scale.dtype, b, element, AnySamples::place(step, element));
    }
    return quads;
  }
};

// What a thread knows of its chain, and sums up.
struct Chain {
  float data, noisy, model, mean_noisy, mean_output, std;
  uint32_t id;
  double squares, logs;  // sum (r / scale)^2 and sum log scale

  __device__ Chain(const Step& step, int64_t b)
      : data(*step.column.data),
        noisy(*step.column.noisy),
        model(*step.column.model),
        mean_noisy(*step.column.mean_noisy),
        mean_output(*step.column.mean_output),
        std(*step.column.std),
        id(static_cast<uint32_t>(step.chain_ids[b])),
        squares(0),
        logs(0) {}

  // Every rounding is spelled out: the same numbers for every way to read them.
  template <typename Access, bool kScaled>
  __device__ void take(
      const Step& step, const StepQuads<Access, kScaled>& quads, int64_t b, int64_t index) {
    float z[kQuad], result[kQuad], sum = 0, log_sum = 0;
    draw(step.seed, id, step.row, index, z);
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      const float x_t = unpack(quads.x_t, Access::other_dtype(step.x_t), k);
      const float output = unpack(quads.output, Access::output_dtype(step), k);
      float r = __fmul_rn(data, unpack(quads.x, Access::other_dtype(step.x), k));
      r = __fmaf_rn(model, output, __fmaf_rn(noisy, x_t, r));
      float own_std = std;
      const bool counts = step.x.data != nullptr && kQuad * index + k < step.elements;
      if constexpr (kScaled) {
        const float scale = unpack(quads.scale, step.scale.dtype, k);
        own_std = __fmul_rn(own_std, scale);
        r /= scale;
        log_sum += counts ? logf(scale) : 0.f;
      }
      result[k] =
          __fmaf_rn(own_std, z[k], __fmaf_rn(mean_output, output, __fmul_rn(mean_noisy, x_t)));
      sum = counts ? __fmaf_rn(r, r, sum) : sum;
    }
    squares += sum;
    logs += log_sum;
    Access::store(step, b, kQuad * index, result);
  }
};

// The score to `scores` [B], where it is not null; of chains in parts the sum of each part, but for
// log_norm, to `sums` [B, parts].
template <typename Access, bool kScaled>
__global__ __launch_bounds__(kStepThreads, 2) void reverse_step_kernel(
    const __grid_constant__ Step step, int team, double* sums, float* scores) {
  // The grid is [chains, parts], the block [chains, team].
  const int64_t part = blockIdx.x % step.parts;
  const int64_t b =
      blockIdx.x / step.parts * (blockDim.x / team) + static_cast<int>(threadIdx.x) / team;
  const int lane = static_cast<int>(threadIdx.x) % team;
  // With four samples two quads of each do not fit into the registers of a thread.
  constexpr int kQuads = kScaled ? 1 : kStepQuads;
  double score = 0;
  if (b < step.batch) {
    Chain chain(step, b);
    const int64_t end = min((part + 1) * step.part_quads, step.quads());
#pragma unroll 1
    for (int64_t first = part * step.part_quads + lane; first < end; first += kQuads * team) {
      StepQuads<Access, kScaled> batch[kQuads];
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const int64_t index = min(first + q * team, end - 1);
        batch[q] = StepQuads<Access, kScaled>::load(step, b, kQuad * index);
      }
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        if (first + q * team < end) {
          chain.take(step, batch[q], b, first + q * team);
        }
      }
    }
    score = -0.5 * *step.column.inv_var * chain.squares - chain.logs;
  }
  if (scores == nullptr) {
    return;
  }
  score = team <= kWarp ? reduced_over_warp(score, 1, team, Sum{})
                        : reduced_over_rows<kStepThreads / kWarp>(score, 1, Sum{});
  if (lane == 0 && b < step.batch) {
    if (step.parts > 1) {
      sums[b * step.parts + part] = score;
    } else {
      scores[b] =
          static_cast<float>(score + static_cast<double>(step.elements) * *step.column.log_norm);
    }
  }
}

// A block a chain.
__global__ __launch_bounds__(kThreads) void reverse_step_score_kernel(
    const double* sums, int64_t parts, const float* log_norm, int64_t elements, float* scores) {
  double sum = 0;
  for (int64_t part = threadIdx.x; part < parts; part += blockDim.x) {
    sum += sums[blockIdx.x * parts + part];
  }
  sum = reduced_over_block(sum, Sum{});
  if (threadIdx.x == 0) {
    scores[blockIdx.x] = static_cast<float>(sum + static_cast<double>(elements) * *log_norm);
  }
}

// ---- launches ----

// Like `view_of`, for a tensor that broadcasts to x_t: every axis that it lacks or has once has the
// stride 0.
std::optional<View> broadcast_view(const Tensor& tensor, const Tensor& x_t) {
  const int64_t missing = x_t.dim() - tensor.dim();
  auto stride = [&](int64_t axis) {
    return axis < missing || tensor.size(axis - missing) == 1 ? 0 : tensor.stride(axis - missing);
  };
  View view{tensor.data_ptr(), tensor.scalar_type(), stride(0), 0, 0, stride(1), 0};
  bool first = true;
  int64_t expected = 0;
  for (int64_t axis = x_t.dim() - 1; axis >= 2; --axis) {
    if (x_t.size(axis) != 1) {
      if (first) {
        view.inner = expected = stride(axis);
        first = false;
      } else if (stride(axis) != expected) {
        return std::nullopt;
      }
      expected *= x_t.size(axis);
    }
  }
  return view;
}

Sample sample_of(const View& view, int64_t channels, int64_t locations) {
  const Dtype dtype = dtype_of(view.type);
  STD_TORCH_CHECK(dtype != kFloat64, "tensors must be float32, bfloat16 or float16, got float64");
  const bool aligned = reinterpret_cast<uintptr_t>(view.data) % (dtype == kFloat32 ? 16 : 8) == 0 &&
                       view.batch % kQuad == 0;
  const bool quads =
      aligned && channels * locations % kQuad == 0 && view.is_flat(channels, locations);
  return {
      view.data,
      dtype,
      quads,
      view.batch,
      channels == 1 ? 0 : view.outer,
      locations == 1 ? 0 : view.inner};
}

// std_scale itself where its strides are those of a view, or a copy of x_t's shape.
Sample scale_of(
    const Tensor& std_scale, const Tensor& x_t, int64_t locations, std::vector<Tensor>& copies) {
  const int64_t missing = x_t.dim() - std_scale.dim();
  bool fits = missing >= 0 && std_scale.device() == x_t.device();
  for (int64_t axis = 0; fits && axis < std_scale.dim(); ++axis) {
    fits = std_scale.size(axis) == 1 || std_scale.size(axis) == x_t.size(axis + missing);
  }
  STD_TORCH_CHECK(fits, "std_scale must broadcast to x_t's shape and be on its device");
  std::optional<View> view = broadcast_view(std_scale, x_t);
  if (!view) {
    copies.push_back(torch::stable::new_empty(x_t, x_t.sizes(), std_scale.scalar_type()));
    torch::stable::copy_(copies.back(), std_scale);
    view = broadcast_view(copies.back(), x_t);
  }
  return sample_of(*view, x_t.size(1), locations);
}

void check_sample(
    const Tensor& tensor, const Tensor& x_t, bool further_channels, const char* name) {
  bool fits = tensor.dim() == x_t.dim() && tensor.device() == x_t.device();
  for (int64_t axis = 0; fits && axis < x_t.dim(); ++axis) {
    fits = tensor.size(axis) == x_t.size(axis) ||
           (axis == 1 && further_channels && tensor.size(axis) > x_t.size(axis));
  }
  STD_TORCH_CHECK(fits, name, " must have x_t's shape and device");
}

// The step's column of the tables [8, S], whose rows are in the order of StepCoefficients.
Column column_of(const Tensor& tables, int64_t step, const Tensor& x_t) {
  const bool fits = tables.scalar_type() == ScalarType::Float && tables.dim() == 2 &&
                    tables.size(0) == 8 && tables.is_contiguous();
  STD_TORCH_CHECK(
      fits && tables.device() == x_t.device(),
      "tables must be contiguous float32 [8, S] on x_t's device");
  const int64_t steps = tables.size(1);
  STD_TORCH_CHECK(0 <= step && step < steps, "step must lie in [0, ", steps, "), got ", step);
  const float* column = static_cast<const float*>(tables.const_data_ptr()) + step;
  auto row = [&](int64_t number) { return column + number * steps; };
  return {row(0), row(1), row(2), row(3), row(4), row(5), row(6), row(7)};
}

// Threads that work on a chain, or on a part of one: some of a warp, or a block, whose threads load
// twice, so that a multiprocessor has several blocks, of which some load while others draw.
int team_of(int64_t quads) {
  const int64_t loads = ceil_div(quads, kStepQuads);
  if (loads > kWarp) {
    return static_cast<int>(std::min<int64_t>(round_up(ceil_div(loads, 2), kWarp), kStepThreads));
  }
  int team = 1;
  while (team < loads) {
    team *= 2;
  }
  return team;
}

// Calls function(access, name) for each access that the kernel is compiled for.
template <typename Function>
void for_each_access(Function function) {
  function(WholeSamples<kFloat32, kFloat32>{}, "float32");
  function(WholeSamples<kBFloat16, kBFloat16>{}, "bfloat16");
  function(WholeSamples<kBFloat16, kFloat32>{}, "bfloat16, float32");
  function(WholeSamples<kFloat16, kFloat16>{}, "float16");
  function(WholeSamples<kFloat16, kFloat32>{}, "float16, float32");
  function(AnySamples{}, "any");
}

// Calls function(access) with the access that fits the samples.
template <typename Function>
void with_access(const Step& step, Function function) {
  const Sample &x_t = step.x_t, &output = step.output, &x = step.x;
  const bool x_fits = x.data == nullptr || (x.dtype == x_t.dtype && x.quads);
  if (!(x_t.quads && output.quads && x_fits)) {
    function(AnySamples{});
  } else if (output.dtype == kFloat32 && x_t.dtype == kFloat32) {
    function(WholeSamples<kFloat32, kFloat32>{});
  } else if (output.dtype == kBFloat16 && x_t.dtype == kBFloat16) {
    function(WholeSamples<kBFloat16, kBFloat16>{});
  } else if (output.dtype == kBFloat16 && x_t.dtype == kFloat32) {
    function(WholeSamples<kBFloat16, kFloat32>{});
  } else if (output.dtype == kFloat16 && x_t.dtype == kFloat16) {
    function(WholeSamples<kFloat16, kFloat16>{});
  } else if (output.dtype == kFloat16 && x_t.dtype == kFloat32) {
    function(WholeSamples<kFloat16, kFloat32>{});
  } else {
    function(AnySamples{});
  }
}

// Scores are null where there is no x.
void launch_step(const Step& step, double* sums, float* scores, cudaStream_t stream) {
  const int team = team_of(step.part_quads);
  int threads = team;
  if (team <= kWarp) {
    threads = static_cast<int>(std::min<int64_t>(round_up(step.batch * team, kWarp), kThreads));
  }
  const unsigned blocks = grid_of(ceil_div(step.batch, threads / team) * step.parts);
  with_access(step, [&](auto access) {
    auto kernel = step.scale.data == nullptr ? reverse_step_kernel<decltype(access), false>
                                             : reverse_step_kernel<decltype(access), true>;
    kernel<<<blocks, threads, 0, stream>>>(step, team, sums, scores);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
  if (scores != nullptr && step.parts > 1) {
    const int threads_of_sums =
        static_cast<int>(std::min<int64_t>(round_up(step.parts, kWarp), kThreads));
    reverse_step_score_kernel<<<grid_of(step.batch), threads_of_sums, 0, stream>>>(
        sums, step.parts, step.column.log_norm, step.elements, scores);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::tuple<Tensor, Tensor> reverse_step(
    const Tensor& x_t, const Tensor& model_output, const Tensor& tables, int64_t step, int64_t seed,
    const Tensor& chain_ids, const std::optional<Tensor>& x,
    const std::optional<Tensor>& std_scale) {
  STD_TORCH_CHECK(x_t.dim() >= 2, "x_t must be [B, C, *spatial]");
  DeviceScope scope(x_t);
  const int64_t batch = x_t.size(0), channels = x_t.size(1);
  Step arguments{};
  arguments.column = column_of(tables, step, x_t);
  check_sample(model_output, x_t, true, "model_output");
  const Tensor chains = torch::stable::contiguous(chain_ids);
  const bool is_chains =
      chains.scalar_type() == ScalarType::Long && chains.dim() == 1 && chains.size(0) == batch;
  STD_TORCH_CHECK(
      is_chains && chains.device() == x_t.device(), "chain_ids must be int64 [", batch,
      "] on x_t's device");

  arguments.locations = 1;
  for (int64_t axis = 2; axis < x_t.dim(); ++axis) {
    arguments.locations *= x_t.size(axis);
  }
  arguments.elements = channels * arguments.locations;
  std::vector<Tensor> copies;
  auto sample = [&](const Tensor& tensor) {
    return sample_of(view_of(tensor, 1, false, copies), channels, arguments.locations);
  };
  arguments.x_t = sample(x_t);
  arguments.output = sample(model_output);
  if (x) {
    check_sample(*x, x_t, false, "x");
    arguments.x = sample(*x);
  }
  if (std_scale) {
    arguments.scale = scale_of(*std_scale, x_t, arguments.locations, copies);
  }
  arguments.chain_ids = static_cast<const int64_t*>(chains.data_ptr());
  arguments.seed = static_cast<uint64_t>(seed);
  arguments.row = static_cast<uint32_t>(step);
  arguments.batch = batch;
  const int64_t quads = ceil_div(arguments.elements, kQuad);
  arguments.part_quads = quads > kBlockQuads ? kPartQuads : std::max<int64_t>(quads, 1);
  arguments.parts = std::max<int64_t>(ceil_div(quads, arguments.part_quads), 1);

  Tensor x_prev = torch::stable::new_empty(x_t, x_t.sizes());
  Tensor score =
      torch::stable::new_empty(x_t, std::vector<int64_t>{x ? batch : 0}, ScalarType::Float);
  const int64_t num_sums = x && arguments.parts > 1 ? batch * arguments.parts : 0;
  Tensor sums = torch::stable::new_empty(x_t, std::vector<int64_t>{num_sums}, ScalarType::Double);
  arguments.x_prev = x_prev.data_ptr();
  if (batch > 0) {
    launch_step(
        arguments, static_cast<double*>(sums.data_ptr()),
        x ? static_cast<float*>(score.data_ptr()) : nullptr, scope.stream());
  }
  return {x_prev, score};
}

}  // namespace

std::vector<Kernel> reverse_step_kernels() {
  std::vector<Kernel> kernels{
      {"reverse_step_score_kernel", reinterpret_cast<const void*>(&reverse_step_score_kernel)}};
  for_each_access([&](auto access, const char* name) {
    using Access = decltype(access);
    kernels.push_back(
        {std::string("reverse_step_kernel<") + name + ">",
         reinterpret_cast<const void*>(&reverse_step_kernel<Access, false>)});
    kernels.push_back(
        {std::string("reverse_step_kernel<") + name + ", scaled>",
         reinterpret_cast<const void*>(&reverse_step_kernel<Access, true>)});
  });
  return kernels;
}

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cuda, CUDA, m) {
  m.impl("reverse_step", TORCH_BOX(&reverse_step));
}

}  // namespace genrep_fast
