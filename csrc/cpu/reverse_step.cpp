// One reverse step of B chains with counter-based noise, and the score of the same step (see
// genrep_fast/reference/reverse_step.py).
//
//     x' = mean_noisy x_t + mean_output o + std scale z,        r = data x + noisy x_t + output o
//     score = sum(-1/2 inv_var r^2 / scale^2 + log_norm - log scale)
//
// Reads x_t, o and x once and writes x': 4 B D elements. Noise is Philox 4x32-10 (Salmon et al., SC
// 2011), 10 rounds of two products for four elements, and Box and Muller's transformation: about 60
// vector instructions for 16 elements, as long as memory takes or longer.
#include <cmath>
#include <tuple>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../arithmetic.h"
#include "rows.h"
#include "vector_math.h"

namespace genrep_fast {
namespace {

constexpr int64_t kChunk =
    16 * kBlock;  // elements; partial scores follow from it, never from the number of threads

// ---- noise ----

constexpr int64_t kCounters = kBlock / 4;  // that draw a block's noise
constexpr uint32_t kMultipliers[2] = {0xD2511F53, 0xCD9E8D57},
                   kIncrements[2] = {0x9E3779B9, 0xBB67AE85};
constexpr int kRounds = 10;

// What a block's counters and keys have in common; the counters themselves count from `index` on.
struct Draw {
  uint64_t index;
  uint32_t chain, row, keys[2];
};

// The four output words of each of `count` counters, rounded up to a multiple of 16.
using PhiloxWords = uint32_t[4][kCounters];

GENREP_FAST_INLINE void philox_kernel(const Draw& draw, int64_t count, PhiloxWords& words) {
  using Wide = uint64_t
      __attribute__((vector_size(64)));  // 32-bit words, each in the lower half of its lane
  using Half = uint32_t __attribute__((vector_size(32)));
  constexpr uint64_t kWord = 0xffffffff;
  for (int64_t i = 0; i < count; i += 8) {
    Wide index = Wide{0, 1, 2, 3, 4, 5, 6, 7} + (draw.index + i);
    Wide c[4] = {index & kWord, index >> 32, Wide{} + draw.chain, Wide{} + draw.row};
    uint32_t keys[2] = {draw.keys[0], draw.keys[1]};
    for (int round = 0; round < kRounds; ++round) {
      Wide first = c[0] * kMultipliers[0], second = c[2] * kMultipliers[1];
      c[0] = (second >> 32) ^ c[1] ^ keys[0];
      c[1] = second & kWord;
      c[2] = (first >> 32) ^ c[3] ^ keys[1];
      c[3] = first & kWord;
      keys[0] += kIncrements[0];
      keys[1] += kIncrements[1];
    }
    for (int k = 0; k < 4; ++k) {
      store(words[k] + i, __builtin_convertvector(c[k], Half));
    }
  }
}

GENREP_FAST_CLONES(
    philox, (const Draw& draw, int64_t count, PhiloxWords& words), philox_kernel,
    (draw, count, words))

#if defined(__x86_64__)
// The same with the product of two 32-bit words, of which AVX-512 has eight in one instruction; the
// compiler takes three from a 64-bit one.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC's own header
__attribute__((target("avx512f"))) void philox_avx512f(
    const Draw& draw, int64_t count, PhiloxWords& words) {
  const __m512i multipliers[2] = {
      _mm512_set1_epi64(kMultipliers[0]), _mm512_set1_epi64(kMultipliers[1])};
  for (int64_t i = 0; i < count; i += 8) {
    __m512i index = _mm512_add_epi64(
        _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi64(draw.index + i));
    // Upper halves of lanes are never read: a product takes the lower ones, and so does the result.
    __m512i c[4] = {
        index, _mm512_srli_epi64(index, 32), _mm512_set1_epi64(draw.chain),
        _mm512_set1_epi64(draw.row)};
    uint32_t keys[2] = {draw.keys[0], draw.keys[1]};
    for (int round = 0; round < kRounds; ++round) {
      __m512i first = _mm512_mul_epu32(c[0], multipliers[0]),
              second = _mm512_mul_epu32(c[2], multipliers[1]);
      c[0] = _mm512_xor_epi64(
          _mm512_xor_epi64(_mm512_srli_epi64(second, 32), c[1]), _mm512_set1_epi64(keys[0]));
      c[1] = second;
      c[2] = _mm512_xor_epi64(
          _mm512_xor_epi64(_mm512_srli_epi64(first, 32), c[3]), _mm512_set1_epi64(keys[1]));
      c[3] = first;
      keys[0] += kIncrements[0];
      keys[1] += kIncrements[1];
    }
    for (int k = 0; k < 4; ++k) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words[k] + i), _mm512_cvtepi64_epi32(c[k]));
    }
  }
}
#pragma GCC diagnostic pop
#endif

void draw_words(const Draw& draw, int64_t count, PhiloxWords& words) {
#if defined(__x86_64__)
  if (capability() == Capability::kAvx512) {
    return philox_avx512f(draw, count, words);
  }
#endif
  philox(draw, count, words);
}

// sqrt(-2 ln u) of u = (word + 1/2) 2^-32. Next to 1, ln u comes from 1 - u, which float32 has in
// full where it rounds u.
GENREP_FAST_INLINE Floats radius(Words word) {
  Floats complement = (__builtin_convertvector(~word, Floats) + 0.5f) * 0x1p-32f;
  Floats uniform = (__builtin_convertvector(word, Floats) + 0.5f) * 0x1p-32f;
  Integers exponent = (as<Integers>(uniform) - 0x3f3504f3) >> 23;
  Floats mantissa = as<Floats>(as<Integers>(uniform) - (exponent << 23));
  auto near_one = complement <= 0.29289321f;
  Floats logarithm = log1p_scaled(
      near_one ? -complement : mantissa - 1.0f,
      near_one ? Floats{} : __builtin_convertvector(exponent, Floats));
  return square_root(logarithm * -2.0f);
}

struct Direction {
  Floats cosine, sine;
};

// Of the angle 2 pi (word + 1/2) 2^-32: the nearest quarter turn by integers, the rest, at most pi
// / 4, by polynomials.
GENREP_FAST_INLINE Direction direction(Words word) {
  Words quarter = (word + 0x20000000) >> 30;
  Integers rest = as<Integers>(word - (quarter << 30));
  Floats angle =
      (__builtin_convertvector(rest, Floats) + 0.5f) * 1.46291807926715968e-9f;  // 2 pi 2^-32
  Floats square = angle * angle;
  Floats sine = polynomial(square, {-1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f}) *
                    square * angle +
                angle;
  Floats cosine =
      polynomial(square, {2.443315711809948e-5f, -1.388731625493765e-3f, 4.166664568298827e-2f}) *
      square * square;
  cosine = cosine - square * 0.5f + 1.0f;
  auto odd = (quarter & 1) != 0;
  Words cosine_sign = ((quarter + 1) & 2) << 30, sine_sign = (quarter & 2) << 30;
  Floats turned_cosine = odd ? sine : cosine, turned_sine = odd ? cosine : sine;
  return {
      as<Floats>(as<Words>(turned_cosine) ^ cosine_sign),
      as<Floats>(as<Words>(turned_sine) ^ sine_sign)};
}

// 64 elements of noise from the words of 16 counters, from `counter` on.
GENREP_FAST_INLINE void transform(const PhiloxWords& words, int64_t counter, float* noise) {
  Floats pairs[2][2];  // [pair][cosine or sine]
  for (int pair = 0; pair < 2; ++pair) {
    Floats length = radius(load<Words>(words[2 * pair] + counter));
    Direction of = direction(load<Words>(words[2 * pair + 1] + counter));
    pairs[pair][0] = length * of.cosine;
    pairs[pair][1] = length * of.sine;
  }
  // The four draws of a counter become neighbours.
  constexpr Words kFirst = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr Words kTwoFirst = {0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7, 22, 23};
  for (uint32_t half = 0; half < 2; ++half) {
    Floats a = __builtin_shuffle(pairs[0][0], pairs[0][1], kFirst + 8 * half);
    Floats b = __builtin_shuffle(pairs[1][0], pairs[1][1], kFirst + 8 * half);
    store(noise + 32 * half, __builtin_shuffle(a, b, kTwoFirst));
    store(noise + 32 * half + kLanes, __builtin_shuffle(a, b, kTwoFirst + 8));
  }
}

// ---- step ----

struct Step {
  int64_t elements, locations;       // of a chain
  Source x_t, output, x, std_scale;  // the last two may not be there
  Buffer target;
  float data, noisy, output_factor, inv_var, mean_noisy, mean_output, std;
  double log_norm;
  Draw draw;  // without its place
  const int64_t* chain_ids;
  bool streaming;
};

// `count` <= kBlock elements, or zeros where there is no such tensor; padded to a multiple of 16 by
// whatever is there.
GENREP_FAST_INLINE const float* read_padded(
    const Step& step, const Source& source, int64_t b, int64_t begin, int64_t count,
    float* scratch) {
  const float* values =
      read_row(source, source.offset(b, 0, 0), step.locations, begin, count, scratch);
  if (count % kLanes != 0 && values != scratch) {
    std::copy_n(values, count, scratch);
    values = scratch;
  }
  if (count % kLanes != 0) {
    std::fill(scratch + count, scratch + round_up(count, kLanes), 0.0f);
  }
  return values;
}

GENREP_FAST_INLINE void write_values(
    const Step& step, int64_t index, int64_t count, const float* values) {
  if (step.target.element != Element::kFloat) {
    return write(step.target, index, count, values);
  }
  float* target = reinterpret_cast<float*>(step.target.at(index));
  int64_t i = 0;
  for (; step.streaming && reinterpret_cast<uintptr_t>(target) % 16 == 0 && i + kLanes <= count;
       i += kLanes) {
    stream(target + i, load<Floats>(values + i));
  }
  std::memcpy(target + i, values + i, 4 * (count - i));
}

// Sums over one block: of r^2 / scale^2, and of log scale.
struct Sums {
  float squares = 0, logarithms = 0;
};

// Moves a block of a chain, and adds up its score where `x` is there. Elements past `count` are
// zeros with a scale of 1.
GENREP_FAST_INLINE Sums move_block(const Step& step, int64_t b, int64_t begin, int64_t count) {
  alignas(64) float scratch[4][kBlock], noise[kBlock], moved[kBlock];
  const float* x_t = read_padded(step, step.x_t, b, begin, count, scratch[0]);
  const float* output = read_padded(step, step.output, b, begin, count, scratch[1]);
  const float* x =
      step.x.buffer.data ? read_padded(step, step.x, b, begin, count, scratch[2]) : nullptr;
  const float* scale = step.std_scale.buffer.data
                           ? read_padded(step, step.std_scale, b, begin, count, scratch[3])
                           : nullptr;
  if (scale && count % kLanes != 0) {
    std::fill(scratch[3] + count, scratch[3] + round_up(count, kLanes), 1.0f);
  }
  PhiloxWords words;
  Draw draw = step.draw;
  draw.index = begin / 4;
  draw.chain = static_cast<uint32_t>(step.chain_ids[b]);
  draw_words(draw, (count + 63) / 64 * 16, words);
  for (int64_t i = 0; i < count; i += 64) {
    transform(words, i / 4, noise + i);
  }
  Floats squares{}, logarithms{};
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats sample = load<Floats>(x_t + i), prediction = load<Floats>(output + i);
    Floats scales = scale ? load<Floats>(scale + i) : broadcast(1.0f);
    Floats mean = sample * step.mean_noisy + prediction * step.mean_output;
    store(moved + i, mean + load<Floats>(noise + i) * (scales * step.std));
    if (x) {
      Floats r =
          load<Floats>(x + i) * step.data + sample * step.noisy + prediction * step.output_factor;
      squares += scale ? r * r / (scales * scales) : r * r;
      logarithms += scale ? logarithm(scales) : Floats{};
    }
  }
  write_values(step, b * step.elements + begin, count, moved);
  return {horizontal_sum(squares), horizontal_sum(logarithms)};
}

GENREP_FAST_INLINE void move_chunk_kernel(
    const Step& step, int64_t b, int64_t begin, int64_t end, double& score) {
  double squares = 0, logarithms = 0;
  for (int64_t first = begin; first < end; first += kBlock) {
    Sums sums = move_block(step, b, first, std::min(kBlock, end - first));
    squares += sums.squares;
    logarithms += sums.logarithms;
  }
  score = -0.5 * static_cast<double>(step.inv_var) * squares +
          step.log_norm * static_cast<double>(end - begin) - logarithms;
}

GENREP_FAST_CLONES(
    move_chunk, (const Step& step, int64_t b, int64_t begin, int64_t end, double& score),
    move_chunk_kernel, (step, b, begin, end, score))

// Takes the step's column of the tables [8, S], whose rows are in the order of StepCoefficients.
void read_tables(const Tensor& tables, int64_t row, Step& step) {
  const bool fits = tables.scalar_type() == ScalarType::Float && tables.dim() == 2 &&
                    tables.size(0) == 8 && tables.is_contiguous();
  STD_TORCH_CHECK(
      fits && 0 <= row && row < tables.size(1),
      "tables must be contiguous float32 [8, S] with a step ", row);
  const float* column = static_cast<const float*>(tables.const_data_ptr()) + row;
  auto entry = [&](int64_t table) { return column[table * tables.size(1)]; };
  step.data = entry(0);
  step.noisy = entry(1);
  step.output_factor = entry(2);
  step.inv_var = entry(3);
  step.log_norm = entry(4);
  step.mean_noisy = entry(5);
  step.mean_output = entry(6);
  step.std = entry(7);
}

// Elements of x_t's shape, those of its channels where the tensor has more, broadcast where it has
// fewer.
Source chains_of(Tensor tensor, const Tensor& x_t, std::vector<Tensor>& copies) {
  std::vector<int64_t> sizes = sizes_of(tensor), wanted = sizes_of(x_t);
  if (sizes.size() == wanted.size() && sizes[1] > wanted[1]) {
    sizes[1] = wanted[1];
  }
  if (sizes != wanted) {
    Tensor whole = torch::stable::empty(wanted, tensor.scalar_type());
    tensor = torch::stable::copy_(whole, tensor);
    copies.push_back(tensor);
  }
  int64_t locations = 1;
  for (size_t axis = 2; axis < wanted.size(); ++axis) {
    locations *= wanted[axis];
  }
  return source_of(view_of(tensor, 1, false, copies), wanted[1], locations);
}

std::tuple<Tensor, Tensor> reverse_step(
    Tensor x_t, Tensor model_output, Tensor tables, int64_t row, int64_t seed, Tensor chain_ids,
    std::optional<Tensor> x, std::optional<Tensor> std_scale) {
  const int64_t batch = x_t.size(0);
  STD_TORCH_CHECK(
      chain_ids.scalar_type() == ScalarType::Long && chain_ids.numel() == batch,
      "chain_ids must be int64, one for each chain");
  Tensor x_prev = torch::stable::empty(sizes_of(x_t), x_t.scalar_type());
  Tensor score = torch::stable::empty({x ? batch : 0}, ScalarType::Float);
  Tensor chains = dense(chain_ids);
  std::vector<Tensor> copies;

  Step step{};
  step.elements = batch == 0 ? 0 : x_t.numel() / batch;
  step.locations = step.elements / std::max<int64_t>(x_t.size(1), 1);
  step.x_t = chains_of(x_t, x_t, copies);
  step.output = chains_of(model_output, x_t, copies);
  step.x = x ? chains_of(*x, x_t, copies) : Source{};
  step.std_scale = std_scale ? chains_of(*std_scale, x_t, copies) : Source{};
  step.target = buffer_of(x_prev);
  read_tables(tables, row, step);
  step.draw.row = static_cast<uint32_t>(row);
  step.draw.keys[0] = static_cast<uint32_t>(seed);
  step.draw.keys[1] = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  step.chain_ids = static_cast<const int64_t*>(chains.const_data_ptr());
  step.streaming =
      x_prev.scalar_type() == ScalarType::Float && is_streamed(x_prev, 4 * x_prev.numel());

  const int64_t chunks = ceil_div(step.elements, kChunk);
  std::vector<double> partials(batch * chunks);
  torch::stable::parallel_for(0, batch * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      int64_t begin = task % chunks * kChunk;
      move_chunk(
          step, task / chunks, begin, std::min(begin + kChunk, step.elements), partials[task]);
    }
    stream_fence();
  });
  for (int64_t b = 0; x && b < batch; ++b) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sum += partials[b * chunks + chunk];
    }
    static_cast<float*>(score.mutable_data_ptr())[b] = static_cast<float>(sum);
  }
  return {x_prev, score};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(genrep_fast_cpu, CPU, m) {
  m.impl("reverse_step", TORCH_BOX(&reverse_step));
}

}  // namespace genrep_fast
