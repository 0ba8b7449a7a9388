// Combination of the gradients, AdamW and the moving average of the parameters in one pass (see genrep_fast/reference/optimizer.py).
//
//     h = sum_i c_i g_i,    m <- m + (1 - beta1) (h - m),    v <- beta2 v + (1 - beta2) h^2
//     param <- (1 - lr weight_decay) param - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
//     ema <- ema + (1 - ema_decay) (param - ema)
//
// Reads n gradients, param, m, v and ema, and writes the last four: 10 N elements for two gradients, with some 20 operations an element, a square
// root and a division among them; bound by memory.
#include <cmath>

#include "multi_tensor.h"

namespace genrep_fast {
namespace {

// Factors of one tensor's update; each is formed in float64.
struct Step {
  float beta1_complement, beta2, beta2_complement, eps;
  float decay;                   // 1 - lr weight_decay
  float step_size;               // lr / (1 - beta1^step)
  float inverse_sqrt_correction; // 1 / sqrt(1 - beta2^step)
  float ema_weight;              // 1 - ema_decay
};

struct State {
  Buffer param, exp_avg, exp_avg_sq, ema;  // ema.data may be null
};

// start + weight (end - start), exact for the weights 0 and 1.
GENREP_FAST_INLINE float lerp(float start, float end, float weight) {
  return weight < 0.5f ? start + weight * (end - start) : end - (end - start) * (1.0f - weight);
}

GENREP_FAST_INLINE void update(
    const Step& s, const float* __restrict h, float* __restrict param, float* __restrict m, float* __restrict v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    float first = lerp(m[i], h[i], s.beta1_complement);
    float second = s.beta2 * v[i] + s.beta2_complement * h[i] * h[i];
    float denominator = std::sqrt(second) * s.inverse_sqrt_correction + s.eps;
    m[i] = first;
    v[i] = second;
    param[i] = s.decay * param[i] - s.step_size * (first / denominator);
  }
}

GENREP_FAST_INLINE void follow(float weight, const float* __restrict param, float* __restrict ema, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    ema[i] = lerp(ema[i], param[i], weight);
  }
}

// `count` elements that are worked on in place: the memory itself, or a copy in `scratch` that `put` writes back.
GENREP_FAST_INLINE float* take(Buffer buffer, int64_t index, int64_t count, float* scratch) {
  return const_cast<float*>(read(buffer, index, count, scratch));
}

GENREP_FAST_INLINE void put(Buffer buffer, int64_t index, int64_t count, const float* values) {
  if (buffer.element != Element::kFloat) {
    write(buffer, index, count, values);
  }
}

GENREP_FAST_INLINE void adamw_chunk_kernel(
    const Buffer* gradients, const float* coefficients, int64_t n, const State& state, const Step& step, int64_t begin, int64_t length) {
  alignas(64) float scratch[kMaxLosses][kBlock], states[4][kBlock], combined[kBlock];
  for (int64_t offset = 0; offset < length; offset += kBlock) {
    int64_t index = begin + offset, count = std::min(kBlock, length - offset);
    combine_block(gradients, coefficients, n, index, count, scratch, combined, false);
    float* param = take(state.param, index, count, states[0]);
    float* exp_avg = take(state.exp_avg, index, count, states[1]);
    float* exp_avg_sq = take(state.exp_avg_sq, index, count, states[2]);
    update(step, combined, param, exp_avg, exp_avg_sq, count);
    put(state.param, index, count, param);
    put(state.exp_avg, index, count, exp_avg);
    put(state.exp_avg_sq, index, count, exp_avg_sq);
    if (state.ema.data) {
      float* ema = take(state.ema, index, count, states[3]);
      follow(step.ema_weight, take(state.param, index, count, states[0]), ema, count);  // the parameter as it was rounded
      put(state.ema, index, count, ema);
    }
  }
}

GENREP_FAST_CLONES(
    adamw_chunk,
    (const Buffer* gradients, const float* coefficients, int64_t n, const State& state, const Step& step, int64_t begin, int64_t length),
    adamw_chunk_kernel,
    (gradients, coefficients, n, state, step, begin, length))

double scalar_of(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Double) {
    return *static_cast<const double*>(tensor.const_data_ptr());
  }
  float value;
  return *read(buffer_of(tensor), 0, 1, &value);
}

void adamw_step(
    std::vector<Tensor> params, std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> emas,
    OptionalTensors gradients, Tensor coefficients, std::vector<int64_t> groups, std::vector<double> weights, std::vector<Tensor> steps,
    Tensor lr, double beta1, double beta2, double eps, double weight_decay, double ema_decay, std::optional<Tensor> found_inf) {
  if (found_inf.has_value() && scalar_of(*found_inf) != 0) {
    return;
  }
  Gradients table(gradients, groups.size());
  std::vector<float> factors = factors_of(coefficients, groups, weights, table.n);
  std::vector<State> states(groups.size());
  std::vector<Step> updates(groups.size());
  double rate = scalar_of(lr);
  for (size_t t = 0; t < groups.size(); ++t) {
    states[t] = {buffer_of(params[t]), buffer_of(exp_avgs[t]), buffer_of(exp_avg_sqs[t]), emas.empty() ? Buffer{} : buffer_of(emas[t])};
    double step = scalar_of(steps[t]);
    updates[t] = {
        static_cast<float>(1 - beta1),
        static_cast<float>(beta2),
        static_cast<float>(1 - beta2),
        static_cast<float>(eps),
        static_cast<float>(1 - rate * weight_decay),
        static_cast<float>(rate / (1 - std::pow(beta1, step))),
        static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, step))),
        static_cast<float>(1 - ema_decay)};
  }
  std::vector<Chunk> chunks = chunks_of(table.numel);
  torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Chunk& chunk = chunks[c];
      adamw_chunk(
          table.of(chunk.tensor), &factors[chunk.tensor * table.n], table.n, states[chunk.tensor], updates[chunk.tensor], chunk.begin,
          chunk.length);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cpu, CPU, m) { m.impl("adamw_step", TORCH_BOX(&adamw_step)); }

}  // namespace genrep_fast
