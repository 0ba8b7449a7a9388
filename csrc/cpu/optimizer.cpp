// Combination of the gradients, AdamW and the moving average of the parameters in one pass (see
// genrep_fast/reference/optimizer.py).
//
//     h = sum_i c_i g_i,    m <- m + (1 - beta1) (h - m),    v <- beta2 v + (1 - beta2) h^2
//     param <- (1 - lr weight_decay) param - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
//     ema <- ema + (1 - ema_decay) (param - ema)
//
// Reads n gradients, param, m, v and ema, and writes the last four: 10 N elements for two
// gradients, with some 20 operations an element, a square root and a division among them; bound by
// memory.
#include <cmath>

#include "multi_tensor.h"

namespace genrep_fast {
namespace {

// Factors of one tensor's update; each is formed in float64.
struct Step {
  float beta1_complement, beta2, beta2_complement, eps;
  float decay;                    // 1 - lr weight_decay
  float step_size;                // lr / (1 - beta1^step)
  float inverse_sqrt_correction;  // 1 / sqrt(1 - beta2^step)
  float ema_weight;               // 1 - ema_decay
};

struct State {
  Buffer param, exp_avg, exp_avg_sq, ema;  // ema.data may be null
};

// start + weight (end - start), exact for the weights 0 and 1.
GENREP_FAST_INLINE Floats lerp(Floats start, Floats end, float weight) {
  return weight < 0.5f ? start + weight * (end - start) : end - (end - start) * (1.0f - weight);
}

GENREP_FAST_INLINE Floats square_root(Floats values) {
  for (int i = 0; i < kLanes; ++i) {
    values[i] = std::sqrt(values[i]);
  }
  return values;
}

// Pointers to float32 values of one block, whose gradients are already there.
struct Block {
  const float* const* gradients;
  float *param, *exp_avg, *exp_avg_sq, *ema;  // ema may be null
};

// 16 elements from `i` on. All of memory is walked in one loop: one array after the other would
// wait at the start of every page.
GENREP_FAST_INLINE void update(
    const Step& s, const float* factors, int64_t n, Element param_element, const Block& block,
    int64_t i) {
  Floats h = factors[0] * load<Floats>(block.gradients[0] + i);
  prefetch_to_second_level(block.gradients[0] + i, kPrefetch);
  for (int64_t j = 1; j < n; ++j) {
    h += factors[j] * load<Floats>(block.gradients[j] + i);
    prefetch_to_second_level(block.gradients[j] + i, kPrefetch);
  }
  prefetch_to_second_level(block.param + i, kPrefetch);
  prefetch_to_second_level(block.exp_avg + i, kPrefetch);
  prefetch_to_second_level(block.exp_avg_sq + i, kPrefetch);
  Floats first = lerp(load<Floats>(block.exp_avg + i), h, s.beta1_complement);
  Floats second = s.beta2 * load<Floats>(block.exp_avg_sq + i) + s.beta2_complement * h * h;
  Floats denominator = square_root(second) * s.inverse_sqrt_correction + s.eps;
  Floats param = s.decay * load<Floats>(block.param + i) - s.step_size * (first / denominator);
  store(block.exp_avg + i, first);
  store(block.exp_avg_sq + i, second);
  store(block.param + i, param);
  if (block.ema) {
    prefetch_to_second_level(block.ema + i, kPrefetch);
    if (param_element != Element::kFloat) {
      param = widen(narrow(param, param_element), param_element);  // as it is stored
    }
    store(block.ema + i, lerp(load<Floats>(block.ema + i), param, s.ema_weight));
  }
}

// `count` elements that are worked on in place: the memory itself, or a copy in `scratch` that
// `put` writes back.
GENREP_FAST_INLINE float* take(Buffer buffer, int64_t index, int64_t count, float* scratch) {
  return const_cast<float*>(read(buffer, index, count, scratch));
}

GENREP_FAST_INLINE void put(Buffer buffer, int64_t index, int64_t count, const float* values) {
  if (buffer.element != Element::kFloat) {
    write(buffer, index, count, values);
  }
}

// `n` gradients that are there, with one factor each.
GENREP_FAST_INLINE void update_block(
    const Step& step, const float* factors, int64_t n, Element param_element, const Block& block,
    int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    update(step, factors, n, param_element, block, i);
  }
  if (i == count) {
    return;
  }
  // The rest, in copies that have all 16 elements.
  alignas(64) float copies[kMaxLosses + 4][kLanes]{};
  const float* gradients[kMaxLosses];
  size_t bytes = sizeof(float) * (count - i);
  for (int64_t j = 0; j < n; ++j) {
    std::memcpy(copies[j], block.gradients[j] + i, bytes);
    gradients[j] = copies[j];
  }
  float* states[] = {block.param, block.exp_avg, block.exp_avg_sq, block.ema};
  for (int k = 0; k < 4; ++k) {
    if (states[k]) {
      std::memcpy(copies[kMaxLosses + k], states[k] + i, bytes);
    }
  }
  float (*rest)[kLanes] = copies + kMaxLosses;
  update(
      step, factors, n, param_element,
      {gradients, rest[0], rest[1], rest[2], block.ema ? rest[3] : nullptr}, 0);
  for (int k = 0; k < 4; ++k) {
    if (states[k]) {
      std::memcpy(states[k] + i, rest[k], bytes);
    }
  }
}

GENREP_FAST_INLINE void adamw_chunk_kernel(
    const Buffer* gradients, const float* coefficients, int64_t n, const State& state,
    const Step& step, int64_t begin, int64_t length) {
  alignas(64) float scratch[kMaxLosses][kBlock], states[4][kBlock];
  for (int64_t offset = 0; offset < length; offset += kBlock) {
    int64_t index = begin + offset, count = std::min(kBlock, length - offset);
    Present present = read_present(gradients, coefficients, n, index, count, scratch);
    Block block{
        present.values, take(state.param, index, count, states[0]),
        take(state.exp_avg, index, count, states[1]),
        take(state.exp_avg_sq, index, count, states[2]),
        state.ema.data ? take(state.ema, index, count, states[3]) : nullptr};
    if (present.count == 2) {  // unrolled by the compiler
      update_block(step, present.factors, 2, state.param.element, block, count);
    } else {
      update_block(step, present.factors, present.count, state.param.element, block, count);
    }
    put(state.param, index, count, block.param);
    put(state.exp_avg, index, count, block.exp_avg);
    put(state.exp_avg_sq, index, count, block.exp_avg_sq);
    if (state.ema.data) {
      put(state.ema, index, count, block.ema);
    }
  }
}

GENREP_FAST_CLONES(
    adamw_chunk,
    (const Buffer* gradients, const float* coefficients, int64_t n, const State& state,
     const Step& step, int64_t begin, int64_t length),
    adamw_chunk_kernel, (gradients, coefficients, n, state, step, begin, length))

double scalar_of(const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Double) {
    return *static_cast<const double*>(tensor.const_data_ptr());
  }
  float value;
  return *read(buffer_of(tensor), 0, 1, &value);
}

void adamw_step(
    StableListHandle params, StableListHandle exp_avgs, StableListHandle exp_avg_sqs,
    StableListHandle emas, StableListHandle gradients, const Tensor& coefficients,
    const std::vector<int64_t>& groups, const std::vector<double>& weights, StableListHandle steps,
    const Tensor& lr, double beta1, double beta2, double eps, double weight_decay, double ema_decay,
    const std::optional<Tensor>& found_inf) {
  const TensorList parameters = TensorList::of(params), means = TensorList::of(exp_avgs),
                   squares = TensorList::of(exp_avg_sqs), averages = TensorList::of(emas),
                   of_losses = TensorList::of_optional(gradients), numbers = TensorList::of(steps);
  Gradients table(of_losses, groups.size());
  std::vector<float> factors = factors_of(coefficients, groups, weights, table.n);
  std::vector<Buffer> param = buffers_of(parameters, table), exp_avg = buffers_of(means, table),
                      exp_avg_sq = buffers_of(squares, table);
  std::vector<Buffer> ema =
      averages.size() == 0 ? std::vector<Buffer>(groups.size()) : buffers_of(averages, table);
  check_layouts({&parameters, &means, &squares, &averages, &of_losses}, groups.size());
  STD_TORCH_CHECK(
      numbers.size() == static_cast<int64_t>(groups.size()),
      "as many steps are needed as there are groups");
  std::vector<State> states(groups.size());
  std::vector<Step> updates(groups.size());
  double rate = scalar_of(lr), last = 0;
  for (size_t t = 0; t < groups.size(); ++t) {
    states[t] = {param[t], exp_avg[t], exp_avg_sq[t], ema[t]};
    double step = numbers.number(t, 0);
    // Powers take longer than the rest for a small tensor, and most steps are alike.
    if (t > 0 && step == last) {
      updates[t] = updates[t - 1];
      continue;
    }
    last = step;
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
  if (found_inf.has_value() && scalar_of(*found_inf) != 0) {
    return;
  }
  std::vector<Chunk> chunks = chunks_of(table.numel);
  torch::stable::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      const Chunk& chunk = chunks[c];
      adamw_chunk(
          table.of(chunk.tensor), &factors[chunk.tensor * table.n], table.n, states[chunk.tensor],
          updates[chunk.tensor], chunk.begin, chunk.length);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cpu, CPU, m) { m.impl("adamw_step", TORCH_BOX(&adamw_step)); }

}  // namespace genrep_fast
