// Scores over the classes of an image or location, shared by a team of threads, and their logsumexp.
//
// A thread keeps its classes in registers between the maximum, the sum and the results, so that
// memory is read once; only more classes than a block's registers hold are read again, from the
// caches.
//
// s - max s is taken in float64, as scores of a million and more differ by less than one; what
// follows from it is float32. Consumer GPUs have one float64 unit for 64 of float32.
#pragma once

#include "reductions.cuh"

#include <cmath>

namespace genrep_fast {

// Classes of a thread: the first where so few threads share an image or location that a block still
// reads many neighbouring locations.
constexpr int kFewClasses = 8, kManyClasses = 32;
constexpr int kMostLocationSlices = 8;

// s [B, K, locations] of the posterior, or of the student, which has neither prior nor temperature.
struct Scores {
  const void* data;
  Dtype dtype;
  bool plain;  // s = L
  double inverse_temperature;
  float rounded_inverse;  // within the finite range of float32
  const float* prior;     // [1 or B, K], or null
  int64_t prior_stride;
};

struct Sizes {
  int64_t batch, classes, locations;
  int slice_bits;  // 2^slice_bits threads share the classes of an image or location

  __host__ __device__ int slices() const { return 1 << slice_bits; }
  __host__ __device__ int width() const { return kThreads >> slice_bits; }  // items of a block
};

// A thread among those that share the classes of an image or location.
struct Team {
  const Sizes& sizes;
  int64_t image, location;
  int slice;  // of the thread, which is that of its first class
  int end;    // of the classes; 0 past the last item

  __device__ explicit Team(const Sizes& given) : sizes(given) {
    const int thread = threadIdx.x;
    // Neighbouring threads read neighbouring numbers: classes of an image, or locations.
    const bool classes_inside = sizes.locations == 1;
    slice = classes_inside ? thread & (sizes.slices() - 1) : thread / sizes.width();
    const int lane = classes_inside ? thread >> sizes.slice_bits : thread % sizes.width();
    const int64_t item = static_cast<int64_t>(blockIdx.x) * sizes.width() + lane;
    // A division of 64 bits takes as long as some loads.
    image = classes_inside ? item : item / sizes.locations;
    location = item - image * sizes.locations;
    end = image < sizes.batch ? static_cast<int>(sizes.classes) : 0;
  }

  __device__ bool exists() const { return end > 0; }
  __device__ int64_t item() const { return image * sizes.locations + location; }
  __device__ int64_t index(int y) const {
    return (image * sizes.classes + y) * sizes.locations + location;
  }

  // Classes first, first + slices, ...: how many, and from each to the next in memory.
  __device__ int count(int first) const {
    return first < end ? (end - first + sizes.slices() - 1) >> sizes.slice_bits : 0;
  }
  __device__ int64_t step() const { return sizes.locations << sizes.slice_bits; }

  // combine(a, b) of `own` over the team, in a fixed order.
  template <typename Combine>
  __device__ double reduced(double own, Combine combine) const {
    if (sizes.slice_bits == 0) {
      return own;
    }
    return sizes.locations == 1 ? reduced_over_neighbours(own, combine)
                                : reduced_over_rows(own, combine);
  }

  // The team's threads are neighbours, in a warp or in several.
  template <typename Combine>
  __device__ double reduced_over_neighbours(double own, Combine combine) const {
    __shared__ double values[kThreads / kWarp];
    own = reduced_over_warp(own, 1, min(sizes.slices(), kWarp), combine);
    if (sizes.slices() <= kWarp) {
      return own;
    }
    const int warp = threadIdx.x / kWarp, warps = sizes.slices() / kWarp;
    __syncthreads();  // until the last result has been read
    if (threadIdx.x % kWarp == 0) {
      values[warp] = own;
    }
    __syncthreads();
    const double* own_values = values + warp / warps * warps;
    own = own_values[0];
#pragma unroll 1
    for (int other = 1; other < warps; ++other) {
      own = combine(own, own_values[other]);
    }
    return own;
  }

  // The block is [slices, width].
  template <typename Combine>
  __device__ double reduced_over_rows(double own, Combine combine) const {
    __shared__ double values[kThreads];
    const int thread = threadIdx.x;
    __syncthreads();  // until the last result has been read
    values[thread] = own;
#pragma unroll 1
    for (int half = sizes.slices() / 2; half > 0; half /= 2) {
      __syncthreads();
      if (slice < half) {
        values[thread] = combine(values[thread], values[thread + half * sizes.width()]);
      }
    }
    __syncthreads();
    return values[thread - slice * sizes.width()];
  }

  __device__ double largest(double own) const {
    return reduced(own, [](double a, double b) { return fmax(a, b); });
  }
  __device__ double sum(double own) const {
    return reduced(own, [](double a, double b) { return a + b; });
  }
};

// A thread's classes first, first + slices, first + 2 slices, ...: their scores in registers. With
// kSeveral a team's registers do not hold all classes: one share after the other is read, for the
// maximum, the sum and the results.
template <int kClasses, bool kSeveral>
struct Share {
  float differences[kClasses];  // s - reference; -inf where there is no class
  double reference;             // the largest s, but for rounding; -inf where none is finite
  int first;

  __device__ Share(const Team& team, const Scores& scores) { load(team, scores, team.slice); }

  // Calls work(first) for the first class of each share.
  template <typename Work>
  static __device__ void for_each(const Team& team, Work work) {
    if constexpr (!kSeveral) {
      work(team.slice);
      return;
    }
#pragma unroll 1
    for (int begin = team.slice; begin < team.end; begin += kClasses << team.sizes.slice_bits) {
      work(begin);
    }
  }

  // Reads the share again where another one has taken its registers.
  __device__ void require(const Team& team, const Scores& scores, int wanted) {
    if constexpr (kSeveral) {
      if (first != wanted) {
        load(team, scores, wanted);
      }
    }
  }

  __device__ void load(const Team& team, const Scores& scores, int wanted) {
    first = wanted;
    switch (scores.dtype) {
      case kFloat32:
        load_elements(team, static_cast<const float*>(scores.data));
        break;
      case kBFloat16:
        load_elements(team, static_cast<const __nv_bfloat16*>(scores.data));
        break;
      default:
        load_elements(team, static_cast<const __half*>(scores.data));
    }
    if (scores.plain) {
      subtract_largest();
    } else {
      subtract_largest_score(team, scores);
    }
  }

  // All loads before anything else, so that they are under way together.
  template <typename Element>
  __device__ void load_elements(const Team& team, const Element* data) {
    const int count = team.count(first);
    const int64_t step = team.step();
    const Element* element = data + team.index(first);
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      differences[j] = -INFINITY;
      if (j < count) {
        differences[j] = static_cast<float>(*element);
      }
      element += step;
    }
  }

  // s = L: float32 rounds the difference of two of its numbers as well as float64 would.
  __device__ void subtract_largest() {
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      largest = fmaxf(largest, differences[j]);
    }
    reference = largest;
    const float finite = largest == -INFINITY ? 0.f : largest;
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      differences[j] -= finite;
    }
  }

  __device__ void subtract_largest_score(const Team& team, const Scores& scores) {
    const int count = team.count(first);
    const int slices = team.sizes.slices();
    const float* prior = scores.prior;
    if (prior != nullptr) {
      prior += team.image * scores.prior_stride + first;
    }
    auto prior_at = [&](int j) { return prior == nullptr ? 0.f : prior[j * slices]; };
    auto score_of = [&](float value, float own_prior) {
      return fma(
          static_cast<double>(value), scores.inverse_temperature, static_cast<double>(own_prior));
    };
    // Found in float32, which may take a score for the largest that is a rounding below it.
    float largest = -INFINITY, value = 0, own_prior = 0;
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      if (j < count) {
        const float score = fmaf(differences[j], scores.rounded_inverse, prior_at(j));
        if (score > largest) {
          largest = score;
          value = differences[j];
          own_prior = prior_at(j);
        }
      }
    }
    const double score = score_of(value, own_prior);
    reference = largest == -INFINITY ? -INFINITY : score;
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      if (j < count) {
        differences[j] = static_cast<float>(score_of(differences[j], prior_at(j)) - score);
      }
    }
  }

  __device__ double largest() const {
    float difference = -INFINITY;
#pragma unroll
    for (int j = 0; j < kClasses; ++j) {
      difference = fmaxf(difference, differences[j]);
    }
    return reference + difference;
  }

  // What makes differences those from `maximum`.
  __device__ float shift(double maximum) const {
    return reference == -INFINITY ? 0.f : static_cast<float>(reference - maximum);
  }

  // sum exp(s - maximum): eight terms in float32, above that float64
  __device__ double weight(double maximum) const {
    const float own_shift = shift(maximum);
    double total = 0;
#pragma unroll
    for (int begin = 0; begin < kClasses; begin += 8) {
      float sum = 0;
#pragma unroll
      for (int j = begin; j < begin + 8; ++j) {
        sum += expf(differences[j] + own_shift);
      }
      total += sum;
    }
    return total;
  }
};

// log sum exp(s) = maximum + log_weight
struct LogSum {
  double maximum;
  float log_weight;
};

// As torch.log_softmax, where an infinite score leaves nothing defined.
template <int kClasses, bool kSeveral>
__device__ LogSum
log_sum(const Team& team, const Scores& scores, Share<kClasses, kSeveral>& share) {
  double maximum = -INFINITY, weight = 0;
  share.for_each(team, [&](int first) {
    share.require(team, scores, first);
    maximum = fmax(maximum, share.largest());
  });
  maximum = team.largest(maximum);
  share.for_each(team, [&](int first) {
    share.require(team, scores, first);
    weight += share.weight(maximum);
  });
  return {maximum, logf(static_cast<float>(team.sum(weight)))};
}

}  // namespace genrep_fast
