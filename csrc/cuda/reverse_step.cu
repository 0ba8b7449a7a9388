// One step of chains with counter-based noise, and the score of the same step (see
// genrep_fast/reference/reverse_step.py).
//
//     x' = mean_noisy x_t + mean_output o + std scale z,        r = data x + noisy x_t + output o
//     score = sum(-1/2 inv_var (r / scale)^2 + log_norm - log scale)
//
// Reads x_t, o and x and writes x', 16 bytes an element in float32, for about 50 operations, most
// of them the noise z: bound by memory, in 16-bit dtypes by arithmetic. Four elements have one
// Philox 4x32-10 counter (Salmon et al., SC 2011), and a thread of their own. Scores are summed in
// float64, a partial sum a block, and by a second kernel.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "introspection.h"
#include "scoring.cuh"

namespace genrep_fast {
namespace {

// ---- noise ----

struct Words {
  uint32_t values[4];
};

__device__ Words philox_4x32_10(Words counter, uint32_t key0, uint32_t key1) {
  auto& [c0, c1, c2, c3] = counter.values;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// -ln u, u = (word + 1/2) / 2^32. Near u = 1 from 1 - u, which float32 holds exactly. Polynomial:
// Cephes, logf.
__device__ float minus_log_uniform(uint32_t word) {
  const float rest = (static_cast<float>(~word) + 0.5f) * 0x1p-32f;  // 1 - u
  float fraction = -rest, exponent = 0;
  if (word < 0x80000000u || rest > 0.29289322f) {  // 1 - sqrt(1/2)
    const uint32_t bits = __float_as_uint((static_cast<float>(word) + 0.5f) * 0x1p-32f);
    const int shift =
        static_cast<int>(bits - 0x3f3504f3) >> 23;  // makes the mantissa lie in [sqrt(1/2), sqrt 2)
    fraction = __uint_as_float(bits - (static_cast<uint32_t>(shift) << 23)) - 1;
    exponent = static_cast<float>(shift);
  }
  const float coefficients[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f,
                                1.4249322787e-1f,  -1.6668057665e-1f, 2.0000714765e-1f,
                                -2.4999993993e-1f, 3.3333331174e-1f};
  const float square = fraction * fraction;
  float sum = 7.0376836292e-2f;
#pragma unroll
  for (float coefficient : coefficients) {
    sum = sum * fraction + coefficient;
  }
  sum = sum * fraction * square + exponent * -2.12194440e-4f;  // ln 2 in two parts
  return -(exponent * 0.693359375f + (fraction + (sum - 0.5f * square)));
}

// cos and sin of 2 pi (word + 1/2) / 2^32, from at most pi / 4. Polynomials: Cephes, sinf and cosf.
__device__ float2 cos_sin(uint32_t word) {
  const uint32_t quadrant = (word + 0x20000000u) >> 30;
  const float angle = (static_cast<float>(static_cast<int32_t>(word - (quadrant << 30))) + 0.5f) *
                      1.4629180792671596e-9f;
  const float square = angle * angle;
  const float sine = ((-1.9515295891e-4f * square + 8.3321608736e-3f) * square - 1.6666654611e-1f) *
                         square * angle +
                     angle;
  const float tail =
      (2.443315711809948e-5f * square - 1.388731625493765e-3f) * square + 4.166664568298827e-2f;
  const float cosine = tail * square * square - 0.5f * square + 1;
  const float first = quadrant % 2 == 0 ? cosine : sine, second = quadrant % 2 == 0 ? sine : cosine;
  return make_float2(
      quadrant == 1 || quadrant == 2 ? -first : first, quadrant >= 2 ? -second : second);
}

// Standard normal numbers by Box-Muller: elements 4 index to 4 index + 3 of a chain.
__device__ void draw(
    uint64_t seed, uint32_t chain, uint32_t step, int64_t index, float (&z)[kQuad]) {
  const Words counter{
      {static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), chain, step}};
  const Words words =
      philox_4x32_10(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
#pragma unroll
  for (int k = 0; k < kQuad; k += 2) {
    const float radius = __fsqrt_rn(2 * minus_log_uniform(words.values[k]));
    const float2 direction = cos_sin(words.values[k + 1]);
    z[k] = radius * direction.x;
    z[k + 1] = radius * direction.y;
  }
}

// ---- step ----

// [B, channels, locations], strides in elements
struct Sample {
  const void* data;  // null: there is no such tensor
  Dtype dtype;
  bool quads, constant;  // four elements can be read at once; a chain has one number
  int64_t batch, channel, location;

  __device__ void read(
      int64_t b, int64_t element, int64_t elements, int64_t locations,
      float (&values)[kQuad]) const {
    Quad quad{};
    if (quads) {
      quad = load_aligned(data, dtype, b * batch + element);
    } else {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (element + k < elements) {
          const int64_t c = constant ? 0 : (element + k) / locations;
          load_element(
              quad, k, data, dtype,
              b * batch + c * channel + (constant ? 0 : element + k - c * locations) * location);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      values[k] = unpack(quad, dtype, k);
    }
  }
};

struct Step {
  Sample x_t, output, x, scale;
  void* x_prev;
  const float *data, *noisy, *model, *inv_var, *log_norm, *mean_noisy, *mean_output,
      *std;  // of this step
  const int64_t* chain_ids;
  uint64_t seed;
  uint32_t row;
  int64_t elements, locations, blocks;  // of a chain
};

// `sums` [B, blocks] of the score but for log_norm, where there is x.
__global__ __launch_bounds__(kThreads) void reverse_step_kernel(
    const __grid_constant__ Step step, double* sums) {
  const int64_t b = blockIdx.x / step.blocks, block = blockIdx.x - b * step.blocks;
  const int64_t index = block * kThreads + threadIdx.x, element = kQuad * index;
  double score = 0;
  if (element < step.elements) {
    float x_t[kQuad], output[kQuad], x[kQuad] = {}, scale[kQuad] = {1, 1, 1, 1}, z[kQuad],
                                     result[kQuad];
    step.x_t.read(b, element, step.elements, step.locations, x_t);
    step.output.read(b, element, step.elements, step.locations, output);
    if (step.x.data != nullptr) {
      step.x.read(b, element, step.elements, step.locations, x);
    }
    if (step.scale.data != nullptr) {
      step.scale.read(b, element, step.elements, step.locations, scale);
    }
    draw(step.seed, static_cast<uint32_t>(step.chain_ids[b]), step.row, index, z);
    float squares = 0, logs = 0;
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      result[k] =
          *step.mean_noisy * x_t[k] + *step.mean_output * output[k] + *step.std * scale[k] * z[k];
      if (step.x.data != nullptr && element + k < step.elements) {
        float r = *step.data * x[k] + *step.noisy * x_t[k] + *step.model * output[k];
        if (step.scale.data != nullptr) {
          r /= scale[k];
          logs += logf(scale[k]);
        }
        squares += r * r;
      }
    }
    score = -0.5 * *step.inv_var * squares - logs;
    const Dtype dtype = step.x_t.dtype;
    const int64_t target = b * step.elements + element;
    if (step.elements % kQuad == 0) {
      store_aligned(step.x_prev, dtype, target, pack(result, dtype));
    } else {
#pragma unroll
      for (int k = 0; k < kQuad; ++k) {
        if (element + k < step.elements) {
          store_element(step.x_prev, dtype, target + k, result[k]);
        }
      }
    }
  }
  if (sums != nullptr) {
    score = team_sum(score, kThreads);
    if (threadIdx.x == 0) {
      sums[blockIdx.x] = score;
    }
  }
}

// A block a chain.
__global__ __launch_bounds__(kThreads) void reverse_step_score_kernel(
    const double* sums, int64_t blocks, const float* log_norm, int64_t elements, float* scores) {
  double sum = 0;
  for (int64_t block = threadIdx.x; block < blocks; block += kThreads) {
    sum += sums[blockIdx.x * blocks + block];
  }
  sum = team_sum(sum, kThreads);
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
  const bool constant = (view.outer == 0 || channels == 1) && (view.inner == 0 || locations == 1);
  return {view.data, dtype, quads && !constant, constant, view.batch, view.outer, view.inner};
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

// Points at the step's column of the tables [8, S]. Rows are in the order of StepCoefficients.
void point_at_tables(const Tensor& tables, int64_t step, const Tensor& x_t, Step& arguments) {
  const bool fits = tables.scalar_type() == ScalarType::Float && tables.dim() == 2 &&
                    tables.size(0) == 8 && tables.is_contiguous();
  STD_TORCH_CHECK(
      fits && tables.device() == x_t.device(),
      "tables must be contiguous float32 [8, S] on x_t's device");
  const int64_t steps = tables.size(1);
  STD_TORCH_CHECK(0 <= step && step < steps, "step must lie in [0, ", steps, "), got ", step);
  const float* column = static_cast<const float*>(tables.const_data_ptr()) + step;
  arguments.data = column;
  arguments.noisy = column + steps;
  arguments.model = column + 2 * steps;
  arguments.inv_var = column + 3 * steps;
  arguments.log_norm = column + 4 * steps;
  arguments.mean_noisy = column + 5 * steps;
  arguments.mean_output = column + 6 * steps;
  arguments.std = column + 7 * steps;
}

std::tuple<Tensor, Tensor> reverse_step(
    const Tensor& x_t, const Tensor& model_output, const Tensor& tables, int64_t step, int64_t seed,
    const Tensor& chain_ids, const std::optional<Tensor>& x,
    const std::optional<Tensor>& std_scale) {
  STD_TORCH_CHECK(x_t.dim() >= 2, "x_t must be [B, C, *spatial]");
  DeviceScope scope(x_t);
  const int64_t batch = x_t.size(0), channels = x_t.size(1);
  Step arguments{};
  point_at_tables(tables, step, x_t, arguments);
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
  arguments.blocks = ceil_div(ceil_div(arguments.elements, kQuad), kThreads);

  Tensor x_prev = torch::stable::new_empty(x_t, x_t.sizes());
  Tensor score =
      torch::stable::new_empty(x_t, std::vector<int64_t>{x ? batch : 0}, ScalarType::Float);
  Tensor sums = torch::stable::new_empty(
      x_t, std::vector<int64_t>{x ? batch * arguments.blocks : 0}, ScalarType::Double);
  arguments.x_prev = x_prev.data_ptr();
  double* sum_data = x ? static_cast<double*>(sums.data_ptr()) : nullptr;
  if (batch * arguments.elements > 0) {
    reverse_step_kernel<<<grid_of(batch * arguments.blocks), kThreads, 0, scope.stream()>>>(
        arguments, sum_data);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (x && batch > 0) {
    reverse_step_score_kernel<<<grid_of(batch), kThreads, 0, scope.stream()>>>(
        sum_data, arguments.blocks, arguments.log_norm, arguments.elements,
        static_cast<float*>(score.data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {x_prev, score};
}

}  // namespace

std::vector<Kernel> reverse_step_kernels() {
  return {
      {"reverse_step_kernel", reinterpret_cast<const void*>(&reverse_step_kernel)},
      {"reverse_step_score_kernel", reinterpret_cast<const void*>(&reverse_step_score_kernel)},
  };
}

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cuda, CUDA, m) {
  m.impl("reverse_step", TORCH_BOX(&reverse_step));
}

}  // namespace genrep_fast
